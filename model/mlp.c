/* mlp.c: the MLP as a layer, the second one of a block whose config says mlp = ...:
 *
 *   gated (swiglu, geglu: arXiv 2002.05202)    output = down(act(gate(input)) * up(input)),  act silu or gelu
 *   plain (gelu, relu2)                        output = down(act(up(input))),                act gelu or max(., 0)^2
 *
 * It mixes nothing along time, so it has no state, and a step is a forward over one token. Called through struct mixer
 * by model.c; owns no memory. */
#include "model/mlp.h"
#include "model/mixer_parts.h"

#include <stddef.h>

const char *const mlp_names[] = {"none", "swiglu", "geglu", "gelu", "relu2", NULL};

static const struct option mlp_options_table[] = {
    {"mlp_width", OPTION_INT, offsetof(struct mlp_options, width), "0", 0, 1 << 20, "",
     "Inner width of the MLP; 0 = 8/3 d_model rounded up to a multiple of 128, or 4 d_model where it has no gate.",
     NULL},
    OPTIONS_END,
};
_Static_assert(MLP_WIDTH_UNIT == 128, "the help above says what the unit is");

static const struct mlp_options *options_of(const struct layer *layer) {
    return layer->options;
}

static enum activation activation_of(const struct layer *layer) {
    switch (options_of(layer)->kind) {
    case MLP_SWIGLU: return ACTIVATION_SILU;
    case MLP_GEGLU:
    case MLP_GELU: return ACTIVATION_GELU;
    case MLP_RELU2: return ACTIVATION_RELU2;
    case MLP_NONE: break;
    }
    ASSERT(!"a kind of MLP");
    return ACTIVATION_SILU;
}

static int mlp_check(void *options, const struct layer_context *context, const char *section, error *err) {
    (void)section;
    (void)err;
    struct mlp_options *o = options;
    if (o->width == 0) {
        int64_t units = (8 * context->d_model + 3 * MLP_WIDTH_UNIT - 1) / (3 * MLP_WIDTH_UNIT);
        o->width = mlp_gated(o) ? units * MLP_WIDTH_UNIT : 4 * context->d_model;
    }
    return 0;
}

/* Gate and up are neighbours, so that they can be one product. */
static void mlp_declare(const struct layer *layer, struct params *p, const char *prefix) {
    const struct mlp_options *o = options_of(layer);
    int64_t D = layer->context.d_model, F = o->width;
    struct init in = mixer_uniform_init(D, 1), out = mixer_uniform_init(F, mixer_residual_scale(layer));
    if (mlp_gated(o)) mixer_declare_projection(layer, p, prefix, "gate.weight", F, D, false, in);
    mixer_declare_projection(layer, p, prefix, "up.weight", F, D, false, in);
    mixer_declare_projection(layer, p, prefix, "down.weight", D, F, true, out);
    params_filled(p, mlp_gated(o) ? 3 : 2);
}

/* How many projections read the input. They come first in declare order, and `down` behind them. */
static int inputs_of(const struct layer *layer) {
    return mlp_gated(options_of(layer)) ? 2 : 1;
}

struct views {
    tensor u; /* (R, 2F) act: [gate | up]; (R, F) without a gate */
    tensor h; /* (R, F) act */
};

/* The product lies in `products`: the same arena, or scratch where it is computed again. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t R, arena *a,
                                arena *products) {
    int64_t F = options_of(layer)->width;
    struct views v;
    v.u = mixer_take(a, ops->act, R, inputs_of(layer) * F);
    v.h = mixer_take(products, ops->act, R, F);
    return v;
}

static struct views carve_saved(const struct layer *layer, const struct ops *ops, int64_t R, arena *saved,
                                arena *scratch) {
    return carve_views(layer, ops, R, saved, mixer_repeats_light(layer) ? scratch : saved);
}

static void mlp_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep, arena *saved,
                      arena *scratch) {
    size_t mark = arena_mark(scratch);
    carve_saved(layer, ops, B * T, saved, scratch);
    if (keep) carve_views(layer, ops, B * T, scratch, scratch); /* the gradients of the same two */
    arena_rewind(scratch, mark);
}

static void mlp_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    int inputs = inputs_of(call->layer);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_saved(call->layer, ops, call->B * call->T, call->saved, call->scratch);
    mixer_linears_forward(call, v.u, call->x, call->w, inputs);
    ops->glu_forward(call->dev, v.h, v.u, activation_of(call->layer));
    ops->linear_forward(call->dev, call->y, v.h, call->w[inputs], tensor_none());
    arena_rewind(call->scratch, mark);
}

static void mlp_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    enum activation act = activation_of(call->layer);
    int down = inputs_of(call->layer);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_saved(call->layer, ops, call->B * call->T, call->saved, call->scratch);
    struct views d = carve_views(call->layer, ops, call->B * call->T, call->scratch, call->scratch);
    if (mixer_repeats_light(call->layer)) ops->glu_forward(call->dev, v.h, v.u, act);
    mixer_linear_backward_beside(call, d.h, call->dw[down], call->dy, v.h, call->w[down]);
    ops->glu_backward(call->dev, d.u, d.h, v.u, act);
    device_join(call->dev);
    mixer_first_linears_backward(call, call->dw, d.u, call->w, down);
    arena_rewind(call->scratch, mark);
}

static int mlp_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                     tensor views[MIXER_STATES]) {
    (void)layer;
    (void)ops;
    (void)B;
    (void)memory;
    (void)views;
    return 0;
}

static double mlp_flops(const struct layer *layer, int64_t T) {
    (void)T;
    return 2 * (inputs_of(layer) + 1) * (double)layer->context.d_model * (double)options_of(layer)->width;
}

const struct mixer mixer_mlp = {
    .name = "mlp",
    .help = "An MLP, with a gate (SwiGLU, GEGLU: arXiv 2002.05202) or without.",
    .options = mlp_options_table,
    .options_size = sizeof(struct mlp_options),
    .check = mlp_check,
    .declare = mlp_declare,
    .carve = mlp_carve,
    .forward = mlp_forward,
    .backward = mlp_backward,
    .step = mlp_forward,
    .state = mlp_state,
    .forward_flops = mlp_flops,
};
