/* mixer_parts.c: what mixers are put together from. See mixer_parts.h. Owns no state. */
#include "model/mixer_parts.h"

#include <inttypes.h>
#include <math.h>

tensor mixer_take(arena *a, enum dtype dtype, int64_t rows, int64_t columns) {
    return tensor_2d(arena_take(a, (size_t)(rows * columns) * dtype_size(dtype)), dtype, rows, columns);
}

#define LINE 128 /* bytes */

tensor mixer_take_lines(arena *a, enum dtype dtype, int64_t rows, int64_t columns) {
    int64_t line = LINE / (int64_t)dtype_size(dtype), step = (columns + line - 1) / line * line;
    return tensor_columns(mixer_take(a, dtype, rows, step), 0, columns);
}

void mixer_state_views(const struct mixer_call *call, const void *memory, tensor views[MIXER_STATES]) {
    for (int i = 0; i < MIXER_STATES; i++) views[i] = tensor_none();
    if (memory) call->layer->mixer->state(call->layer, call->dev->ops, call->B, (void *)memory, views);
}

void mixer_declare_linear(struct params *p, const char *prefix, const char *name, int64_t outputs, int64_t inputs,
                          double scale) {
    params_add(p, 2, (int64_t[]){outputs, inputs}, mixer_uniform_init(inputs, scale), true, false, "%s%s", prefix,
               name);
}

struct init mixer_uniform_init(int64_t inputs, double scale) {
    double bound = scale / sqrt((double)inputs);
    return (struct init){INIT_UNIFORM, -bound, bound, 0};
}

double mixer_residual_scale(const struct layer *layer) {
    return 1 / sqrt((double)layer->context.blocks);
}

struct init mixer_small_init(int64_t d_model) {
    return (struct init){INIT_NORMAL, sqrt(2 / (5 * (double)d_model)), 0, 0};
}

struct init mixer_wang_init(const struct layer *layer) {
    double deviation = 2 / ((double)layer->context.blocks * sqrt((double)layer->context.d_model));
    return (struct init){INIT_NORMAL, deviation, 0, 0};
}

struct init mixer_normal_init(void) {
    return (struct init){INIT_NORMAL, 0.02, 0, 0};
}

struct init mixer_open_lm_init(int64_t inputs) {
    double deviation = 1 / sqrt((double)inputs);
    return (struct init){INIT_TRUNCATED, deviation, 3 * deviation, 0};
}

struct init mixer_open_lm_residual_init(const struct layer *layer, int64_t inputs) {
    double deviation = 1 / sqrt((double)inputs) / sqrt(2 * (double)(layer->block + 1));
    return (struct init){INIT_TRUNCATED, deviation, 3 * deviation, 0};
}

void mixer_declare_projection(const struct layer *layer, struct params *p, const char *prefix, const char *name,
                              int64_t outputs, int64_t inputs, bool residual, struct init usual) {
    struct init init = usual;
    if (layer->context.init == MODEL_INIT_SMALL)
        init = residual ? mixer_wang_init(layer) : mixer_small_init(layer->context.d_model);
    if (layer->context.init == MODEL_INIT_OPEN_LM)
        init = residual ? mixer_open_lm_residual_init(layer, inputs) : mixer_open_lm_init(inputs);
    if (layer->context.init == MODEL_INIT_NORMAL) init = mixer_normal_init();
    params_add(p, 2, (int64_t[]){outputs, inputs}, init, true, false, "%s%s", prefix, name);
}

void mixer_declare_conv(struct params *p, const char *prefix, int64_t channels, int64_t taps) {
    double bound = 1 / sqrt((double)taps);
    struct init init = {INIT_UNIFORM, -bound, bound, 0};
    params_add(p, 3, (int64_t[]){channels, 1, taps}, init, true, true, "%sconv1d.weight", prefix);
    params_add(p, 1, &channels, init, false, true, "%sconv1d.bias", prefix);
}

/* The weight, or its gradient, as the operation wants it: (channels, taps). */
static tensor conv_weight(tensor w) {
    return tensor_reshape(w, 2, (int64_t[]){w.dim[0], w.dim[2]});
}

void mixer_conv_forward(const struct mixer_call *call, tensor y, tensor final, tensor x, int weight, tensor initial,
                        bool with_silu) {
    call->dev->ops->conv_forward(call->dev, y, final, x, conv_weight(call->w[weight]), call->w[weight + 1], initial,
                                 call->doc, with_silu);
}

void mixer_conv_backward(const struct mixer_call *call, tensor dx, tensor dy, tensor x, int weight, tensor initial,
                         bool with_silu, void *work) {
    const tensor *w = &call->w[weight], *dw = &call->dw[weight];
    call->dev->ops->conv_backward(call->dev, dx, tensor_none(), conv_weight(dw[0]), dw[1], dy, tensor_none(), x,
                                  conv_weight(w[0]), w[1], initial, call->doc, with_silu, work);
}

void mixer_conv_step(const struct mixer_call *call, tensor y, tensor state, tensor x, int weight, bool with_silu) {
    call->dev->ops->conv_step(call->dev, y, state, x, conv_weight(call->w[weight]), call->w[weight + 1], with_silu);
}

/* --- a gated norm and the projection behind it --------------------------------------------------- */

void mixer_gated_carve(const struct layer *layer, const struct ops *ops, struct mixer_gated *v, arena *scratch) {
    if (mixer_repeats_light(layer)) v->g = mixer_take(scratch, ops->act, v->y.dim[0], v->y.dim[1]);
}

void mixer_gated_norm(const struct mixer_call *call, const struct mixer_gated *v) {
    call->dev->ops->gated_rmsnorm_forward(call->dev, v->g, v->rstd, v->y, v->z, call->w[v->norm], v->norm_first,
                                          call->layer->context.norm_eps);
}

/* Where the norm's output was not kept, its backward puts it in dg's place, so the gradient of out_proj's weights,
 * which needs it, comes last. */
void mixer_gated_backward(const struct mixer_call *call, const struct mixer_gated *v, tensor dy, tensor dz, tensor dg,
                          void *work) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w, *dw = call->dw, none = tensor_none();
    bool again = mixer_repeats_light(call->layer);
    tensor g = again ? dg : v->g;
    if (again) ops->linear_backward(call->dev, dg, false, none, none, call->dy, g, w[v->out_proj]);
    else mixer_linear_backward_beside(call, dg, dw[v->out_proj], call->dy, g, w[v->out_proj]);
    ops->gated_rmsnorm_backward(call->dev, dy, dz, dw[v->norm], again ? g : none, dg, v->y, v->z, v->rstd, w[v->norm],
                                v->norm_first, work);
    if (again) ops->linear_backward(call->dev, none, false, dw[v->out_proj], none, call->dy, g, w[v->out_proj]);
    else device_join(call->dev);
}

tensor mixer_find_positions(const struct mixer_call *call, tensor positions, tensor before) {
    if (!tensor_given(call->doc) && !call->initial) return tensor_none();
    call->dev->ops->token_positions(call->dev, positions, call->doc, before);
    return positions;
}

/* --- several projections of one input ------------------------------------------------------------- */

static bool follows(tensor before, tensor w) {
    return (char *)before.data + (size_t)tensor_count(before) * dtype_size(before.dtype) == (char *)w.data &&
           before.dtype == w.dtype && before.dim[1] == w.dim[1] && before.empty == w.empty;
}

/* How many of the first weights are one matrix in memory, and their gradients, too. */
static int together(const tensor *w, const tensor *dw, int count) {
    int n = 1;
    while (n < count && follows(w[n - 1], w[n]) && (!dw || follows(dw[n - 1], dw[n]))) n++;
    return n;
}

static tensor joined(const tensor *w, int count) {
    int64_t outputs = 0;
    for (int i = 0; i < count; i++) outputs += w[i].dim[0];
    tensor all = tensor_2d(w[0].data, w[0].dtype, outputs, w[0].dim[1]);
    all.empty = w[0].empty;
    return all;
}

void mixer_linears_forward(const struct mixer_call *call, tensor y, tensor x, const tensor *w, int count) {
    int64_t column = 0;
    for (int i = 0, n; i < count; i += n) {
        n = together(&w[i], NULL, count - i);
        tensor all = joined(&w[i], n);
        call->dev->ops->linear_forward(call->dev, tensor_columns(y, column, all.dim[0]), x, all, tensor_none());
        column += all.dim[0];
    }
    ASSERT(column == y.dim[1]);
}

/* dx is optional, and so are the gradients of the weights. */
static void linears_backward(const struct mixer_call *call, tensor dx, bool add_dx, bool weights, const tensor *dw,
                             tensor dy, tensor x, const tensor *w, int count) {
    int64_t column = 0;
    for (int i = 0, n; i < count; i += n) {
        n = together(&w[i], &dw[i], count - i);
        tensor all = joined(&w[i], n), all_dw = weights ? joined(&dw[i], n) : tensor_none();
        call->dev->ops->linear_backward(call->dev, dx, add_dx || i > 0, all_dw, tensor_none(),
                                        tensor_columns(dy, column, all.dim[0]), x, all);
        column += all.dim[0];
    }
    ASSERT(column == dy.dim[1]);
}

void mixer_linears_backward(const struct mixer_call *call, tensor dx, bool add_dx, const tensor *dw, tensor dy,
                            tensor x, const tensor *w, int count) {
    linears_backward(call, dx, add_dx, true, dw, dy, x, w, count);
}

void mixer_first_linears_backward(const struct mixer_call *call, const tensor *dw, tensor dy, const tensor *w,
                                  int count) {
    linears_backward(call, call->dx, false, false, dw, dy, call->x, w, count);
    device_fork(call->dev);
    linears_backward(call, tensor_none(), false, true, dw, dy, call->x, w, count);
    device_back(call->dev);
}

void mixer_linear_backward_beside(const struct mixer_call *call, tensor dx, tensor dw, tensor dy, tensor x, tensor w) {
    const struct ops *ops = call->dev->ops;
    ops->linear_backward(call->dev, dx, false, tensor_none(), tensor_none(), dy, x, w);
    device_fork(call->dev);
    ops->linear_backward(call->dev, tensor_none(), false, dw, tensor_none(), dy, x, w);
    device_back(call->dev);
}

/* --- checks of options ---------------------------------------------------------------------------- */

int64_t mixer_nearest_divisor(int64_t whole, int64_t wanted) {
    for (int64_t away = 0;; away++) {
        if (wanted - away >= 1 && whole % (wanted - away) == 0) return wanted - away;
        if (wanted + away <= whole && whole % (wanted + away) == 0) return wanted + away;
    }
}

int mixer_check_divides(const char *section, const char *key, int64_t value, const char *what, int64_t whole,
                        error *err) {
    if (whole % value == 0) return 0;
    return error_input(err, "%s.%s = %" PRId64 " must divide %s = %" PRId64 "; the nearest that does is %" PRId64,
                       section, key, value, what, whole, mixer_nearest_divisor(whole, value));
}

int mixer_check_dt(double dt_min, double dt_max, const char *section, error *err) {
    if (dt_min <= dt_max) return 0;
    return error_input(err, "%s.dt_min = %g must not be above dt_max = %g; it may be at most that", section, dt_min,
                       dt_max);
}
