/* mixer.h: the contract of a layer: the thing between a norm and the residual stream.
 *
 * A mixer mixes along time (mamba, mamba2, ...); the MLP is one that does not. Each is a struct of functions in one
 * file of model/, and one line in the table of mixer.c; the rest of riverrun knows mixers by this interface only. The
 * model adds the previous output to the residual stream r, a = norm(r), and calls the mixer with x = a; see model.h.
 *
 * Memory: forward and backward are given two arenas. `saved` is positioned at the start of this layer's own region;
 * the mixer carves from it what forward leaves for backward, always by the same function, so that backward finds the
 * same views. `scratch` is free again after the call. With measuring arenas (base NULL) the same carving gives the
 * sizes: that is what `carve` is for. A layer's level of recomputation says what of it lies in `scratch` instead, for
 * backward to compute again by the same operations on the same operands, which gives the same bits.
 */
#ifndef RIVERRUN_MIXER_H
#define RIVERRUN_MIXER_H

#include "common/arena.h"
#include "common/config.h"
#include "kernels/device.h"
#include "model/params.h"

/* model.init */
enum model_start { MODEL_INIT_DEFAULT = 0, MODEL_INIT_SMALL, MODEL_INIT_OPEN_LM, MODEL_INIT_NORMAL };

/* What a mixer may know of the model around it. */
struct layer_context {
    int64_t d_model;
    int64_t blocks; /* number of blocks: scales the initialisation of output projections */
    double norm_eps;
    int init; /* enum model_start, for layers that leave their initialisation to the model */
};

struct mixer;

/* How a layer's nonlinear recurrence is solved, where it is: as its config says, with more iterations, or token after
 * token, which is exact. train/ladder.h says when a level is raised. */
enum solver_level { SOLVER_CHOSEN, SOLVER_MORE, SOLVER_SEQUENTIAL };
#define SOLVER_MORE_ITERATIONS 3

/* What backward computes once more instead of finding it saved; each level includes those before it. */
enum recompute {
    RECOMPUTE_NONE,
    RECOMPUTE_LIGHT, /* what elementwise operations made: normed input, convolution, gated norm, product of SwiGLU */
    RECOMPUTE_SCAN,  /* the recurrence, too: its output and what it saves */
    RECOMPUTE_LAYER, /* everything between the residual streams; to a mixer it is like RECOMPUTE_NONE */
};

/* One layer of a model: a mixer with its options. */
struct layer {
    const struct mixer *mixer;
    void *options;          /* the mixer's options struct, filled by config_bind and check */
    int block;              /* index of the block it belongs to */
    const char *block_name; /* NAME of [block.NAME] */
    bool is_mlp;            /* second layer of its block */
    enum recompute recompute;
    int span; /* RECOMPUTE_LAYER: the stream is kept before the layer that is so many before this one; else 0 */
    struct layer_context context;
    int norm;          /* table index of the pre-norm weight */
    bool scaled;       /* the stream is multiplied by a vector when the layer's output is added to it, */
    int scale;         /* which has this table index; -1: it is not */
    int solver;        /* its number among the model's layers whose mixers have a solver; -1: it has none */
    int first, params; /* the mixer's own tensors: table indices first .. first+params-1, in declare order */
};

struct mixer_call {
    struct device *dev;
    const struct layer *layer;
    int64_t B, T;
    bool keep;        /* a backward will follow: leave what it needs in `saved` */
    tensor doc;       /* (B,T) i32 or none; see kernels/ops.h */
    const tensor *w;  /* parameter views under their logical shapes, in declare order */
    const tensor *dw; /* gradient views (real), accumulated into; NULL in forward */
    struct arena *saved, *scratch;
    tensor x, y;   /* (B*T, D) act: the normed input; the output (forward: =) */
    tensor dy, dx; /* backward: gradient at y; gradient at x (=) */
    /* The state before the first token (NULL: zero), which backward reads again, and where forward leaves the one after
     * the last token (NULL: nowhere), never the same memory but for mixers that take it (state_in_place). In a step:
     * `final` is read and updated. */
    const void *initial;
    void *final;
    /* For mixers with a solver, in forward and wherever backward computes a recurrence again: */
    enum solver_level level;
    struct cell_report *report; /* what is found is added to it, as cell_forward does; device memory */
};

#define MIXER_STATES 4 /* arrays in one layer's state */

struct mixer {
    const char *name;             /* as written in a config: mixer = NAME */
    const char *help;             /* one sentence for docs */
    const struct option *options; /* its keys in [block.NAME] */
    size_t options_size;
    bool state_in_place; /* a forward may be given the same memory as initial and final state */

    /* Derive and check what the option table can't say (divisibility, ...). `section` is the config's, for messages. */
    int (*check)(void *options, const struct layer_context *context, const char *section, error *err);
    /* Append its tensors; names start with `prefix` ("backbone.layers.3.mixer."). */
    void (*declare)(const struct layer *layer, struct params *params, const char *prefix);

    /* Carve what forward, backward (only if keep) and a step of B sequences take from saved and scratch, by the
     * functions that they themselves carve with; used with measuring arenas. */
    void (*carve)(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                  struct arena *saved, struct arena *scratch);
    void (*forward)(const struct mixer_call *call);
    void (*backward)(const struct mixer_call *call);

    /* Decoding: x (B, D) in, y (B, D) out, T = 1, `final` is the state that is read and updated. */
    void (*step)(const struct mixer_call *call);
    /* The recurrent state of B sequences lying at `memory` (NULL: shapes only) as contiguous views whose first
     * dimension is the sequence, each on a multiple of ARENA_ALIGN bytes; returns how many, 0 = stateless. */
    int (*state)(const struct layer *layer, const struct ops *ops, int64_t B, void *memory, tensor views[MIXER_STATES]);

    /* How many tokens a state holds, if a row of more would look back further; 0 if it forgets nothing that a row
     * remembers. NULL: 0. */
    int64_t (*context)(const struct layer *layer);

    /* How the recurrence of B sequences of T tokens is solved by the config alone (SOLVER_CHOSEN); NULL: the mixer
     * solves nothing. forward and carve ask for it by mixer_solver and mixer_solver_scratch. */
    struct cell_solver (*solver)(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T);

    /* Per token, in sequences of T tokens; a multiply-add is 2. */
    double (*forward_flops)(const struct layer *layer, int64_t T);
};

/* The table, without the MLP. */
extern const char *const mixer_names[];           /* NULL-terminated */
const struct mixer *mixer_find(const char *name); /* NULL if unknown */

/* Whether a mixer is to compute again what belongs to `level`. */
static inline bool mixer_recomputes(const struct layer *layer, enum recompute level) {
    return layer->recompute >= level && layer->recompute != RECOMPUTE_LAYER;
}
/* "sequential", "newton", ... by enum cell_method. */
extern const char *const solver_method_names[];
/* How a layer's recurrence is solved at a level. */
struct cell_solver mixer_solver(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                enum solver_level level);
/* Scratch of cell_forward that suffices at every level: a level may be raised long after memory was taken. */
size_t mixer_solver_scratch(const struct layer *layer, const struct ops *ops, struct cell_shape shape);
/* Bytes of a layer's state of B sequences: a multiple of ARENA_ALIGN, 0 = stateless. */
size_t mixer_state_bytes(const struct layer *layer, const struct ops *ops, int64_t B);
/* For `state` functions: make view `index` (dims: B first) of a state, behind the views before it. */
void mixer_state_view(tensor *views, int index, void *memory, enum dtype dtype, int ndim, const int64_t *dim);

extern const struct mixer mixer_mamba;
extern const struct mixer mixer_mamba2;
extern const struct mixer mixer_mlstm;
extern const struct mixer mixer_mlstm_preup;
extern const struct mixer mixer_slstm;
extern const struct mixer mixer_attention;
extern const struct mixer mixer_rat;
extern const struct mixer mixer_pararnn;
extern const struct mixer mixer_mlp; /* every `mlp =` but none */

#endif
