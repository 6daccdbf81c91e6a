/* mlp.c: the SwiGLU MLP (arXiv 2002.05202) as a layer: h = silu(gate) * up, [gate | up] = fc1(input); output = fc2(h).
 * The second layer of a block whose config says mlp = swiglu. It mixes nothing along time, so it has no state, and a
 * step is a forward over one token. Called through struct mixer by model.c; owns no memory. */
#include "model/mlp.h"
#include "model/mixer_parts.h"

#include <stddef.h>

static const struct option mlp_options_table[] = {
    {"mlp_width", OPTION_INT, offsetof(struct mlp_options, width), "0", 0, 1 << 20, "",
     "Inner width of the MLP; 0 = 8/3 d_model rounded up to a multiple of 128.", NULL},
    {NULL, OPTION_INT, 0, NULL, 0, 0, NULL, NULL, NULL},
};
_Static_assert(MLP_WIDTH_UNIT == 128, "the help above says what the unit is");

static int64_t width_of(const struct layer *layer) {
    return ((const struct mlp_options *)layer->options)->width;
}

static int mlp_check(void *options, const struct layer_context *context, const char *section, error *err) {
    (void)section;
    (void)err;
    struct mlp_options *o = options;
    if (o->width == 0) {
        int64_t units = (8 * context->d_model + 3 * MLP_WIDTH_UNIT - 1) / (3 * MLP_WIDTH_UNIT);
        o->width = units * MLP_WIDTH_UNIT;
    }
    return 0;
}

enum { FC1, FC2 };

static void mlp_declare(const struct layer *layer, struct params *p, const char *prefix) {
    int64_t D = layer->context.d_model, F = width_of(layer);
    mixer_declare_linear(p, prefix, "fc1.weight", 2 * F, D, 1);
    mixer_declare_linear(p, prefix, "fc2.weight", D, F, mixer_residual_scale(layer));
}

struct views {
    tensor gate_up; /* (R, 2F) act */
    tensor h;       /* (R, F) act */
};

/* The product lies in `products`: the same arena, or scratch where it is computed again. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t R, arena *a,
                                arena *products) {
    int64_t F = width_of(layer);
    struct views v;
    v.gate_up = mixer_take(a, ops->act, R, 2 * F);
    v.h = mixer_take(products, ops->act, R, F);
    return v;
}

static struct views carve_saved(const struct layer *layer, const struct ops *ops, int64_t R, arena *saved,
                                arena *scratch) {
    return carve_views(layer, ops, R, saved, mixer_recomputes(layer, RECOMPUTE_LIGHT) ? scratch : saved);
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
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_saved(call->layer, ops, call->B * call->T, call->saved, call->scratch);
    ops->linear_forward(call->dev, v.gate_up, call->x, call->w[FC1], tensor_none());
    ops->glu_forward(call->dev, v.h, v.gate_up, ACTIVATION_SILU);
    ops->linear_forward(call->dev, call->y, v.h, call->w[FC2], tensor_none());
    arena_rewind(call->scratch, mark);
}

static void mlp_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_saved(call->layer, ops, call->B * call->T, call->saved, call->scratch);
    struct views d = carve_views(call->layer, ops, call->B * call->T, call->scratch, call->scratch);
    if (mixer_recomputes(call->layer, RECOMPUTE_LIGHT)) ops->glu_forward(call->dev, v.h, v.gate_up, ACTIVATION_SILU);
    ops->linear_backward(call->dev, d.h, false, call->dw[FC2], tensor_none(), call->dy, v.h, call->w[FC2]);
    ops->glu_backward(call->dev, d.gate_up, d.h, v.gate_up, ACTIVATION_SILU);
    ops->linear_backward(call->dev, call->dx, false, call->dw[FC1], tensor_none(), d.gate_up, call->x, call->w[FC1]);
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
    return 6 * (double)layer->context.d_model * (double)width_of(layer);
}

const struct mixer mixer_mlp = {
    .name = "swiglu",
    .help = "SwiGLU MLP (arXiv 2002.05202).",
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
