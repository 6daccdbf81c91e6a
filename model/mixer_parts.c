/* mixer_parts.c: what mixers are put together from. See mixer_parts.h. Owns no state. */
#include "model/mixer_parts.h"

#include <math.h>

tensor mixer_take(arena *a, enum dtype dtype, int64_t rows, int64_t columns) {
    return tensor_2d(arena_take(a, (size_t)(rows * columns) * dtype_size(dtype)), dtype, rows, columns);
}

void mixer_state_views(const struct mixer_call *call, const void *memory, tensor views[MIXER_STATES]) {
    for (int i = 0; i < MIXER_STATES; i++) views[i] = tensor_none();
    if (memory) call->layer->mixer->state(call->layer, call->dev->ops, call->B, (void *)memory, views);
}

void mixer_declare_linear(struct params *p, const char *prefix, const char *name, int64_t outputs, int64_t inputs,
                          double scale) {
    double bound = scale / sqrt((double)inputs);
    params_add(p, 2, (int64_t[]){outputs, inputs}, (struct init){INIT_UNIFORM, -bound, bound, 0}, true, false, "%s%s",
               prefix, name);
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

void mixer_declare_conv(struct params *p, const char *prefix, int64_t channels, int64_t taps) {
    double bound = 1 / sqrt((double)taps);
    struct init init = {INIT_UNIFORM, -bound, bound, 0};
    params_add(p, 3, (int64_t[]){channels, 1, taps}, init, true, true, "%sconv1d.weight", prefix);
    params_add(p, 1, &channels, init, false, true, "%sconv1d.bias", prefix);
}

tensor mixer_conv_weight(tensor w) {
    return tensor_reshape(w, 2, (int64_t[]){w.dim[0], w.dim[2]});
}

int mixer_check_dt(double dt_min, double dt_max, const char *section, error *err) {
    if (dt_min <= dt_max) return 0;
    return error_input(err, "%s.dt_min = %g must not be above dt_max = %g; it may be at most that", section, dt_min,
                       dt_max);
}
