/* model.h: the language model: embedding, layers, final norm, head; forward, loss, backward, decode.
 *
 *   r = E[token];   for each layer i: (r = s_i-1 r + out of layer i-1), a = norm_i(r), out = mixer_i(a); s_i is 1, or a
 *   vector of weights;
 *   f = norm_f(r + out);   logits = f W^T, W = E if tied, or c tanh(f W^T / c) with a cap c.
 * A block is a mixer layer and, if the config says so, an MLP layer. Source: arXiv 2312.00752 and 2405.21060;
 * docs/mamba2.md.
 */
#ifndef RIVERRUN_MODEL_H
#define RIVERRUN_MODEL_H

#include "common/config.h"
#include "kernels/device.h"
#include "model/mixer.h"
#include "model/params.h"

/* --- configuration -------------------------------------------------------------------------------------------------
 * [model] d_model, vocab_size (0 = the tokenizer's), pad_vocab_to, tie_embeddings, norm, norm_eps, logit_cap, init,
 * pattern ("m*24", "(m*7 a)*4"), recompute_span; [block.NAME] mixer, mlp, recompute, residual_scale, and the keys of
 * both. */
#define MODEL_FLOPS_MAX (2 * LIMIT_BLOCK_KINDS + 1)
enum model_norm { MODEL_NORM_RMS = 0, MODEL_NORM_LAYER };
struct model_options {
    int64_t d_model, vocab_size, pad_vocab_to;
    bool tie_embeddings;
    int norm; /* enum model_norm */
    double norm_eps;
    double logit_cap; /* 0 = none */
    int init;         /* enum model_start */
    const char *pattern;
    int64_t recompute_span;
};
extern const struct option model_options_table[]; /* [model] */
extern const struct option block_options_table[]; /* the keys common to all [block.NAME] */

struct block_options {
    int mixer; /* index into mixer_names */
    int mlp;   /* enum mlp_kind: model/mlp.h */
    int recompute; /* enum recompute */
    bool residual_scale;
};

/* A [block.NAME] section; all blocks of that name share its options. */
struct block_kind {
    char name[64];
    struct block_options options;
    const struct mixer *mixer;
    void *mixer_options; /* of mixer->options_size bytes */
    void *mlp_options;   /* struct mlp_options, or NULL */
};

struct model_config {
    struct model_options options; /* pattern is a copy of the config's */
    int64_t vocab;                /* logical ids: options.vocab_size or the tokenizer's */
    int64_t rows;                 /* of the embedding: vocab rounded up to pad_vocab_to */
    int blocks;
    struct block_kind *kinds; /* in order of first appearance in the pattern */
    int kind_count;
    struct layer *layers;
    int layer_count, solver_count;
    int embedding, final_norm, head; /* table indices; a tied head is the embedding's */
    struct params params;            /* declared, not laid out: a model lays out a copy */
};

/* Bind [model] and all [block.*] of the config; a section that the pattern doesn't name is refused. tokenizer_vocab is
 * used when vocab_size is 0 and checked against it otherwise (vocab_size >= tokenizer_vocab); 0 = unknown. Does not
 * call config_finish. */
int model_config_bind(struct model_config **mc, config *c, int64_t tokenizer_vocab, error *err);
void model_config_free(struct model_config *mc);
double model_forward_flops(const struct model_config *mc, int64_t T); /* per token; training is three times that */

/* The same by kinds of layers: those of each block, in the order of the pattern, then the head. Returns how many
 * entries of `list` there are. */
struct model_flops {
    const char *block, *layer; /* "m" and "mamba2"; "" and "head" */
    int count;                 /* layers of the kind */
    double forward;            /* of one, per token */
};
int model_list_flops(const struct model_config *mc, int64_t T, struct model_flops list[MODEL_FLOPS_MAX]);

/* How each kind of block with a solver is solved by its config, in batches of B sequences of T tokens; likewise. */
struct model_solving {
    const struct layer *layer; /* the first of the kind */
    struct cell_solver solver;
};
int model_list_solvers(const struct model_config *mc, const struct ops *ops, int64_t B, int64_t T,
                       struct model_solving list[LIMIT_BLOCK_KINDS]);

/* --- memory ----------------------------------------------------------------------------------- */
enum model_mode { MODEL_TRAIN, MODEL_INFER };
struct model_memory { /* bytes on one rank */
    size_t parameters, gradients, optimizer, activations, scratch, batch;
    size_t device; /* what a GPU takes by itself: context, code, recorded steps */
    size_t total;
};
/* What model_open will allocate, what the device takes by itself, and the optimizer's m and v (1/ranks of them each),
 * for micro-batches of B x T. No device is opened, and nothing but a copy of the tensor table is allocated. */
int model_plan(struct model_memory *memory, const struct model_config *mc, const struct ops *ops, enum model_mode mode,
               int64_t B, int64_t T, int ranks, error *err);
/* Refuse micro-batches so large that their bytes might not be countable in 64 bits; model_open does it too. */
int model_check_batch(const struct model_config *mc, int64_t B, int64_t T, error *err);

/* --- the model -------------------------------------------------------------------------------- */
struct model; /* fields below are read by the optimizer and checkpoints through accessors */

/* Allocate for micro-batches of at most B x T, as rank `rank` of `ranks`. mc must outlive the model. */
int model_open(struct model **m, struct model_config *mc, struct device *dev, enum model_mode mode, int64_t B,
               int64_t T, int rank, int ranks, error *err);
void model_close(struct model *m);

const struct params *model_params(const struct model *m);
const struct model_config *model_get_config(const struct model *m);
struct device *model_device(const struct model *m);
struct model_memory model_allocated(const struct model *m); /* what model_open took; optimizer is 0: not the model's */
tensor model_flat_grads(const struct model *m);             /* (elements) real; NULL data in MODEL_INFER */

/* Weights exist up to twice. A part as kernels read it is whole on every rank. Its masters are what the optimizer
 * updates, always real, and each rank holds its own slice of them only: of a real part they are that slice of the part
 * itself, of a rounded part an array of their own (which MODEL_INFER lacks). Both views are one-dimensional, and empty
 * where the part is. */
tensor model_part(const struct model *m, int bucket, int part);
tensor model_masters(const struct model *m, int bucket, int part); /* MODEL_TRAIN */
/* This rank's slice of a rounded part, which whoever changes the masters writes too; none where the masters are what
 * kernels read. The other ranks' slices are theirs to send (train/optimizer.h). */
tensor model_rounded(const struct model *m, int bucket, int part);

void model_init(struct model *m, uint64_t seed); /* the papers' initialisation */
/* One tensor to or from host memory, `count` elements of f32 or f64 (converted). Written: masters and what kernels
 * read. Read: the masters; where this rank does not hold them all, what kernels read in their stead. */
void model_read_param(const struct model *m, int index, void *values, enum dtype dtype);
void model_write_param(struct model *m, int index, const void *values, enum dtype dtype);

/* The layer whose state holds the fewest tokens (mixer->context), and how many; NULL where none forgets. */
const struct layer *model_least_context(const struct model_config *mc, int64_t *tokens);

/* Layers that solve a nonlinear recurrence are numbered from 0 in their order (layer.solver;
 * model_config.solver_count).
 * Each forward adds what their solvers say to the reports, which are in device memory and are zeroed by
 * model_zero_reports. A level holds for what is queued from then on; work that was recorded keeps the one it was
 * recorded with. */
const struct layer *model_solver_layer(const struct model_config *mc, int solver);
struct cell_report *model_reports(const struct model *m);
void model_zero_reports(struct model *m);
enum solver_level model_level(const struct model *m, int solver);
void model_set_level(struct model *m, int solver, enum solver_level level);
/* How it is solved at its level, in batches of B sequences of T tokens. */
struct cell_solver model_solver(const struct model *m, int solver, int64_t B, int64_t T);

/* Recurrent state of a batch of sequences. */
struct model_state;
int model_state_open(struct model_state **s, const struct model *m, int64_t B, error *err); /* zeroed */
void model_state_reset(struct model_state *s, int64_t row);                                 /* row < 0: all */
void model_state_close(struct model_state *s);
size_t model_state_bytes(const struct model_config *mc, const struct ops *ops, int64_t B);

/* Copy a micro-batch from host memory: tokens, targets (NULL: none; negative: masked) and doc (NULL: one document a
 * row), (B,T) int32. B and T at most those of model_open. Ids at or above the table's rows are a programmer error. */
void model_set_batch(struct model *m, const int32_t *tokens, const int32_t *targets, const int32_t *doc, int64_t B,
                     int64_t T);

/* Run the layers on the batch, from `initial` (NULL: zero) and, if `final` is given, leave the states behind the last
 * token there (its B must equal the batch's). keep: a backward follows (MODEL_TRAIN only); backward reads `initial`
 * again, so it must stay as it is until then. Without keep, `final` may be the same object as `initial`. */
void model_forward(struct model *m, const struct model_state *initial, struct model_state *final, bool keep);

/* model_forward and model_loss call `needed` just before the first work that reads a bucket's weights, and maybe again
 * later; NULL ends that. For weights that are still on their way. */
void model_on_needed(struct model *m, void (*needed)(void *self, int bucket), void *self);

/* After model_forward: add to the sums; losses (NULL or B*T values of the real dtype in host memory) per target. With
 * `backward` the gradient of scale * (sum of losses + z terms) at the final norm's output and at the head is computed
 * in the same pass (gradients of parameters are accumulated: zero them with model_zero_grads). */
void model_loss(struct model *m, void *losses, bool backward, double scale, double z_loss);
void model_read_sums(struct model *m, struct loss_sums *sums);
void model_zero_sums(struct model *m);
struct loss_sums *model_sums(const struct model *m); /* in device memory */
void model_zero_grads(struct model *m);
/* The same, for who runs model_loss(backward) and model_backward next: gradients that a product fills are not zeroed
 * but written by it. */
void model_begin_grads(struct model *m);

/* After model_loss(backward = true). ready (may be NULL) is called when a bucket's gradients are complete for this
 * micro-batch, last bucket first; a tied embedding's bucket comes last. */
void model_backward(struct model *m, void (*ready)(void *self, int bucket), void *self);

/* After model_forward: logits of rows [from, from+count) of the flattened (B*T) batch to host memory (count, rows) in
 * the real dtype; columns are all padded vocabulary rows. */
void model_logits(struct model *m, int64_t from, int64_t count, void *logits);

/* One token for each of the state's B sequences (at most model_open's B): updates the state; logits as above (B, rows).
 * Ends what model_forward began: a batch has to be set and run again before its loss or backward. */
void model_step(struct model *m, struct model_state *s, const int32_t *tokens, void *logits);

#endif
