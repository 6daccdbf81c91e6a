/* mixer.h: the contract of a layer: the thing between a norm and the residual stream.
 *
 * A mixer mixes along time (mamba2, ...); the MLP is one that does not. Each is a struct of functions in one file of
 * model/, and one line in the table of mixer.c; the rest of riverrun knows mixers by this interface only. The model does
 * r += previous output, a = RMSNorm(r), and calls the mixer with x = a; see model.h.
 *
 * Memory: forward and backward are given two arenas. `saved` is positioned at the start of this layer's own region;
 * the mixer carves from it what forward leaves for backward, always by the same function, so that backward finds the same
 * views. `scratch` is free again after the call. With measuring arenas (base NULL) the same carving gives the sizes: that
 * is what `carve` is for.
 */
#ifndef RIVERRUN_MIXER_H
#define RIVERRUN_MIXER_H

#include "common/arena.h"
#include "common/config.h"
#include "kernels/device.h"
#include "model/params.h"

/* What a mixer may know of the model around it. */
struct layer_context {
    int64_t d_model;
    int64_t blocks;    /* number of blocks: scales the initialisation of output projections */
    double norm_eps;
};

struct mixer;

/* One layer of a model: a mixer with its options. */
struct layer {
    const struct mixer *mixer;
    void *options;  /* the mixer's options struct, filled by config_bind and check */
    int block;      /* index of the block it belongs to */
    const char *block_name; /* NAME of [block.NAME] */
    bool is_mlp;    /* second layer of its block */
    struct layer_context context;
    int norm;       /* table index of the pre-norm weight */
    int first, params; /* the mixer's own tensors: table indices first .. first+params-1, in declare order */
};

struct mixer_call {
    struct device *dev;
    const struct layer *layer;
    int64_t B, T;
    bool keep;           /* a backward will follow: leave what it needs in `saved` */
    tensor doc;          /* (B,T) i32 or none; see kernels/ops.h */
    const tensor *w;     /* parameter views under their logical shapes, in declare order */
    const tensor *dw;    /* gradient views (real), accumulated into; NULL in forward */
    struct arena *saved, *scratch;
    tensor x, y;         /* (B*T, D) act: the normed input; the output (forward: =) */
    tensor dy, dx;       /* backward: gradient at y; gradient at x (=) */
    void *initial;       /* state before the first token, laid out by the mixer, or NULL = zero state */
    void *final;         /* where forward puts the state after the last token, or NULL; may be the memory of initial */
};

struct mixer {
    const char *name;                /* as written in a config: mixer = NAME */
    const char *help;                /* one sentence for docs */
    const struct option *options;    /* its keys in [block.NAME] */
    size_t options_size;

    /* Derive and check what the option table can't (divisibility, ...). `section` names the config section in messages. */
    int (*check)(void *options, const struct layer_context *context, const char *section, error *err);
    /* Append its tensors; names start with `prefix` ("backbone.layers.3.mixer."). */
    void (*declare)(const struct layer *layer, struct params *params, const char *prefix);

    /* Carve what forward (keep = backward follows) and backward take from saved and scratch; used with measuring arenas. */
    void (*carve)(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep, struct arena *saved,
                  struct arena *scratch);
    void (*forward)(const struct mixer_call *call);
    void (*backward)(const struct mixer_call *call);

    /* Decoding: x (B, D) in, y (B, D) out, T = 1, `final` is the state that is read and updated. */
    void (*step)(const struct mixer_call *call);
    size_t (*state_bytes)(const struct layer *layer, const struct ops *ops, int64_t B); /* multiple of 64; 0 = stateless */

    double (*forward_flops)(const struct layer *layer, int64_t T); /* per token, in sequences of T; a multiply-add is 2 */
};

/* The table. */
const struct mixer *mixer_find(const char *name); /* NULL if unknown */
const char *const *mixer_names(void);             /* NULL-terminated; without the MLP */

extern const struct mixer mixer_mamba2;
extern const struct mixer mixer_mlp; /* SwiGLU */

#endif
