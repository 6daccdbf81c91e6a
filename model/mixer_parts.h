/* mixer_parts.h: what mixers are put together from: memory in rows, projections, the short convolution, a gated norm,
 * positions within documents, and the initial step sizes of Mamba and Mamba-2. Included by the mixers of model/, and by
 * model_config.c for the initial values. */
#ifndef RIVERRUN_MIXER_PARTS_H
#define RIVERRUN_MIXER_PARTS_H

#include "model/mixer.h"

#include <stddef.h>

static inline size_t mixer_largest(size_t a, size_t b) {
    return a > b ? a : b;
}

/* What backward computes again: what is light, and the recurrence, too. */
static inline bool mixer_repeats_light(const struct layer *layer) {
    return mixer_recomputes(layer, RECOMPUTE_LIGHT);
}
static inline bool mixer_repeats_scan(const struct layer *layer) {
    return mixer_recomputes(layer, RECOMPUTE_SCAN);
}

/* Rows (B*T, ...) of a call's batch as (B,T,...). */
static inline tensor mixer_by_token(const struct mixer_call *call, tensor rows) {
    return tensor_split_first(rows, call->B, call->T);
}
/* Columns of rows (B*T, ...) from `from` on as `heads` of P channels: (B,T,heads,P). */
static inline tensor mixer_heads(tensor rows, int64_t from, int64_t heads, int64_t P, int64_t B, int64_t T) {
    return tensor_split_first(tensor_split_last(tensor_columns(rows, from, heads * P), heads, P), B, T);
}

/* (rows, columns) from an arena. */
tensor mixer_take(arena *a, enum dtype dtype, int64_t rows, int64_t columns);

/* The same with every row at the start of a line of a GPU's memory, for rows whose width is not a multiple of it: what
 * reads or writes a tile of such rows would otherwise touch a line more for each of them. */
tensor mixer_take_lines(arena *a, enum dtype dtype, int64_t rows, int64_t columns);

/* The layer's state at `memory` as its views, the rest none; all none for NULL. The operations only read what is passed
 * to them as an initial state. */
void mixer_state_views(const struct mixer_call *call, const void *memory, tensor views[MIXER_STATES]);

/* A projection `prefix``name`, (outputs, inputs): Uniform +-scale/sqrt(inputs), decayed. PyTorch's own has scale 1. */
void mixer_declare_linear(struct params *p, const char *prefix, const char *name, int64_t outputs, int64_t inputs,
                          double scale);
/* The scale of projections that end in the residual stream: the more blocks add to it, the smaller. */
double mixer_residual_scale(const struct layer *layer);
/* The same two as xLSTM draws them: normal, of variance 2/(5 d_model) whatever the inputs; and of deviation
 * 2/(blocks sqrt(d_model)) where the projection ends in the residual stream. */
struct init mixer_small_init(int64_t d_model);
struct init mixer_wang_init(const struct layer *layer);
/* The same two as open_lm and DCLM draw them: normal within three deviations, of deviation 1/sqrt(inputs), and less by
 * sqrt(2 (block + 1)) where the projection ends in the residual stream. */
struct init mixer_open_lm_init(int64_t inputs);
struct init mixer_open_lm_residual_init(const struct layer *layer, int64_t inputs);
/* Both as RAT's code and many others draw them: normal, of deviation 0.02 whatever the inputs. */
struct init mixer_normal_init(void);
/* What model.init says of a projection `prefix``name` that reads the stream or, `residual`, ends in it; `usual` is what
 * the default says. Decayed. */
void mixer_declare_projection(const struct layer *layer, struct params *p, const char *prefix, const char *name,
                              int64_t outputs, int64_t inputs, bool residual, struct init usual);
/* The usual one of mixer_declare_linear. */
struct init mixer_uniform_init(int64_t inputs, double scale);
/* conv1d.weight (channels, 1, taps) and conv1d.bias (channels), as PyTorch draws them. */
void mixer_declare_conv(struct params *p, const char *prefix, int64_t channels, int64_t taps);
/* The operation with these two, which are the call's tensors `weight` and the next: y, x, dx, dy (B, T, channels), in a
 * step (B, channels). No gradient goes into the state before the first token. */
void mixer_conv_forward(const struct mixer_call *call, tensor y, tensor final, tensor x, int weight, tensor initial,
                        bool with_silu);
void mixer_conv_backward(const struct mixer_call *call, tensor dx, tensor dy, tensor x, int weight, tensor initial,
                         bool with_silu, void *work);
void mixer_conv_step(const struct mixer_call *call, tensor y, tensor state, tensor x, int weight, bool with_silu);

/* Several projections (outputs, I) of the same x (R, I), whose results are columns of y side by side. Neighbours in the
 * tensor table lie one behind the other in memory where their sizes are multiples of PARAM_ALIGN; then they make one
 * product. */
void mixer_linears_forward(const struct mixer_call *call, tensor y, tensor x, const tensor *w, int count);
/* dx = or += if add_dx; dw +=; dy has the columns of y. */
void mixer_linears_backward(const struct mixer_call *call, tensor dx, bool add_dx, const tensor *dw, tensor dy,
                            tensor x, const tensor *w, int count);
/* The same of the projections that a layer begins with, of call->x, at the end of its backward: the gradients of the
 * weights are computed beside what the model does next, the backward of the norm before the layer, and joined behind
 * that. So that norm takes no memory of the mixer's, though the mixer has given it back. */
void mixer_first_linears_backward(const struct mixer_call *call, const tensor *dw, tensor dy, const tensor *w,
                                  int count);
/* A projection's backward with the gradient of the weights beside the work that the mixer queues next, best such that
 * is bound by memory, until it calls device_join: till then dy and x have to stay, and dw is not there. */
void mixer_linear_backward_beside(const struct mixer_call *call, tensor dx, tensor dw, tensor dy, tensor x, tensor w);

/* A gated norm and the projection behind it, as Mamba-2 ends: g = norm(y, z), then g out_proj^T. */
struct mixer_gated {
    tensor y, z, g;     /* (R, I); g: none where backward makes it again */
    tensor rstd;        /* (R, groups) real */
    int norm, out_proj; /* the call's tensors */
    bool norm_first;
};
/* A forward that does not keep g for backward needs a place for it. */
void mixer_gated_carve(const struct layer *layer, const struct ops *ops, struct mixer_gated *v, arena *scratch);
/* All but the projection, which is the caller's. */
void mixer_gated_norm(const struct mixer_call *call, const struct mixer_gated *v);
/* From the gradient at the layer's output to dy (R, I) and dz, and those of both tensors; dg (R, I) is made on the way,
 * and work is gated_rmsnorm_backward's. */
void mixer_gated_backward(const struct mixer_call *call, const struct mixer_gated *v, tensor dy, tensor dz, tensor dg,
                          void *work);

/* The positions that operations are given, made at `positions` (B, T): none where they are those within the row.
 * `before` is the count of the state before the first token. */
tensor mixer_find_positions(const struct mixer_call *call, tensor positions, tensor before);

/* The options of Mamba's frame; `type` has them as fields of the same names. */
#define MIXER_EXPAND_OPTION(type)                                                                                      \
    {"expand", OPTION_INT, offsetof(type, expand), "2", 1, 16, "", "Inner width as a multiple of d_model.", NULL}
#define MIXER_CONV_OPTION(type)                                                                                        \
    {"d_conv", OPTION_INT, offsetof(type, d_conv), "4", 2, 8, "tokens",                                                \
     "Width of the causal convolution, the current token included.", NULL}
#define MIXER_DT_OPTIONS(type)                                                                                         \
    {"dt_min", OPTION_FLOAT, offsetof(type, dt_min), "0.001", 1e-10, 1e3, "",                                          \
     "Smallest initial step size (drawn log-uniformly).", NULL},                                                       \
    {"dt_max", OPTION_FLOAT, offsetof(type, dt_max), "0.1", 1e-10, 1e3, "", "Largest initial step size.", NULL},       \
    {"dt_init_floor", OPTION_FLOAT, offsetof(type, dt_init_floor), "1e-4", 1e-10, 1e3, "",                             \
     "Initial step sizes below it are raised to it.", NULL}

/* The divisor of `whole` that is nearest to `wanted`; the smaller one of two. */
int64_t mixer_nearest_divisor(int64_t whole, int64_t wanted);
/* The option `key`, with this value, must divide `whole`, which messages call `what`. */
int mixer_check_divides(const char *section, const char *key, int64_t value, const char *what, int64_t whole,
                        error *err);
/* dt_min must not be above dt_max. */
int mixer_check_dt(double dt_min, double dt_max, const char *section, error *err);

#endif
