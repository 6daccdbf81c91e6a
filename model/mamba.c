/* mamba.c: the Mamba layer (arXiv 2312.00752, section 3.4): one projection in, a short convolution, the selective scan
 * with its gate, one projection out. The mathematics is in docs/mamba.md; the operations are kernels/ops.h's.
 *
 *   [x | z] = in_proj(input);   x = silu(conv1d(x));   [low | B | C] = x_proj(x);   raw = dt_proj(low) without its bias
 *   per channel and state: h[t] = exp(delta A) h[t-1] + delta B[t] x[t], delta = softplus(raw + bias), A = -exp(A_log)
 *   output = out_proj((C[t] . h[t] + D x[t]) * silu(z))
 *
 * Backward computes the convolution's output and raw once more: they are as wide as the layer and cheap to have again;
 * where the layer recomputes its scan, the scan's output and what it saves, too.
 * State: the convolution's last W-1 inputs and h. Reached through the mixer table (mixer.c); owns no memory.
 */
#include "model/mamba.h"
#include "model/mixer_parts.h"

#include <stddef.h>

#define FIELD(name) offsetof(struct mamba_options, name)
static const struct option mamba_options_table[] = {
    {"d_state", OPTION_INT, FIELD(d_state), "16", 1, 4096, "", "State size N: each channel keeps as many numbers.",
     NULL},
    MIXER_EXPAND_OPTION(struct mamba_options),
    MIXER_CONV_OPTION(struct mamba_options),
    {"dt_rank", OPTION_INT, FIELD(dt_rank), "0", 0, 65536, "",
     "Numbers per token from which the step sizes of all channels are made; 0 = d_model / 16, rounded up.", NULL},
    MIXER_DT_OPTIONS(struct mamba_options),
    {"dt_scale", OPTION_FLOAT, FIELD(dt_scale), "1", 1e-10, 1e3, "",
     "Initial weights of dt_proj are drawn from +-dt_scale / sqrt(dt_rank).", NULL},
    OPTIONS_END,
};

int64_t mamba_dt_rank(int64_t d_model) {
    return (d_model + 15) / 16;
}

struct mamba_sizes mamba_sizes(const struct mamba_options *o, int64_t d_model) {
    return (struct mamba_sizes){.D = d_model,
                                .I = o->expand * d_model,
                                .N = o->d_state,
                                .W = o->d_conv,
                                .rank = o->dt_rank,
                                .X = o->dt_rank + 2 * o->d_state};
}

static int mamba_check(void *options, const struct layer_context *context, const char *section, error *err) {
    struct mamba_options *o = options;
    if (o->dt_rank == 0) o->dt_rank = mamba_dt_rank(context->d_model);
    return mixer_check_dt(o->dt_min, o->dt_max, section, err);
}

static struct mamba_sizes sizes_of(const struct layer *layer) {
    return mamba_sizes(layer->options, layer->context.d_model);
}

/* --- tensors ---------------------------------------------------------------------------------- */

enum { IN_PROJ, CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_WEIGHT, DT_BIAS, A_LOG, SKIP, OUT_PROJ }; /* in declare order */

static void mamba_declare(const struct layer *layer, struct params *p, const char *prefix) {
    const struct mamba_options *o = layer->options;
    struct mamba_sizes s = sizes_of(layer);
    mixer_declare_linear(p, prefix, "in_proj.weight", 2 * s.I, s.D, 1);
    params_filled(p, 1);
    mixer_declare_conv(p, prefix, s.I, s.W);
    mixer_declare_linear(p, prefix, "x_proj.weight", s.X, s.I, 1);
    params_filled(p, 1);
    mixer_declare_linear(p, prefix, "dt_proj.weight", s.I, s.rank, o->dt_scale);
    params_filled(p, 1);
    params_add(p, 1, &s.I, (struct init){INIT_DT_BIAS, o->dt_min, o->dt_max, o->dt_init_floor}, false, true,
               "%sdt_proj.bias", prefix);
    params_add(p, 2, (int64_t[]){s.I, s.N}, (struct init){INIT_LOG_COUNT, (double)s.N, 0, 0}, false, true, "%sA_log",
               prefix);
    params_add(p, 1, &s.I, (struct init){INIT_CONSTANT, 1, 0, 0}, false, true, "%sD", prefix);
    mixer_declare_linear(p, prefix, "out_proj.weight", s.D, s.I, mixer_residual_scale(layer));
    params_filled(p, 1);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* What the layer computes on the way. */
struct views {
    tensor xz;          /* (R, 2I) act: in_proj's output */
    tensor x_in, z;     /* its columns (B, T, I): before the convolution; the gate */
    tensor low_bc;      /* (R, X) act: x_proj's output */
    tensor low, b, c;   /* its columns (R, rank), (B, T, N) twice */
    tensor g;           /* (R, I) act: the scan's gated output */
    void *scan;         /* what the scan saves; NULL without backward */
    tensor x, raw;      /* in scratch, (R, I) act: after the convolution; step sizes before bias and softplus */
    void *work;         /* in scratch: of the operation at work */
    tensor dg, dx;      /* the rest in scratch, in backward only: gradients, named as what they are gradients of */
    tensor draw;
    tensor dxz, dx_in, dz;
    tensor dlow_bc, dlow, db, dc;
};

static struct scan_shape scan_shape_of(const struct mamba_sizes *s, int64_t B, int64_t T) {
    return (struct scan_shape){.B = B, .T = T, .D = s->I, .N = s->N};
}

/* Columns of in_proj's output, or of its gradient. */
static void cut_in(const struct mamba_sizes *s, tensor xz, int64_t B, int64_t T, tensor *x, tensor *z) {
    *x = tensor_split_first(tensor_columns(xz, 0, s->I), B, T);
    *z = tensor_split_first(tensor_columns(xz, s->I, s->I), B, T);
}

/* Columns of x_proj's output, or of its gradient. */
static void cut_x(const struct mamba_sizes *s, tensor low_bc, int64_t B, int64_t T, tensor *low, tensor *b, tensor *c) {
    *low = tensor_columns(low_bc, 0, s->rank);
    *b = tensor_split_first(tensor_columns(low_bc, s->rank, s->N), B, T);
    *c = tensor_split_first(tensor_columns(low_bc, s->rank + s->N, s->N), B, T);
}

/* keep: of a forward, that a backward follows; and true in backward, which reads what the scan saves. */
static struct views carve_saved(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                                arena *saved, arena *scratch) {
    struct mamba_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct views v = {.scan = NULL};
    arena *of_scan = mixer_repeats_scan(layer) ? scratch : saved;
    v.xz = mixer_take(saved, ops->act, R, 2 * s.I);
    v.low_bc = mixer_take(saved, ops->act, R, s.X);
    v.g = mixer_take(of_scan, ops->act, R, s.I);
    if (keep) v.scan = arena_take(of_scan, ops->scan_saved(scan_shape_of(&s, B, T)));
    cut_in(&s, v.xz, B, T, &v.x_in, &v.z);
    cut_x(&s, v.low_bc, B, T, &v.low, &v.b, &v.c);
    return v;
}

static void carve_forward_scratch(struct views *v, const struct layer *layer, const struct ops *ops, int64_t B,
                                  int64_t T, arena *scratch) {
    struct mamba_sizes s = sizes_of(layer);
    v->x = mixer_take(scratch, ops->act, B * T, s.I);
    v->raw = mixer_take(scratch, ops->act, B * T, s.I);
    v->work = arena_take(scratch, ops->scan_forward_scratch(scan_shape_of(&s, B, T)));
}

static void carve_backward_scratch(struct views *v, const struct layer *layer, const struct ops *ops, int64_t B,
                                   int64_t T, arena *scratch) {
    struct mamba_sizes s = sizes_of(layer);
    int64_t R = B * T;
    v->x = mixer_take(scratch, ops->act, R, s.I);
    v->raw = mixer_take(scratch, ops->act, R, s.I);
    v->dx = mixer_take(scratch, ops->act, R, s.I);
    v->draw = mixer_take(scratch, ops->act, R, s.I);
    v->dxz = mixer_take(scratch, ops->act, R, 2 * s.I);
    v->dlow_bc = mixer_take(scratch, ops->act, R, s.X);
    cut_in(&s, v->dxz, B, T, &v->dx_in, &v->dz);
    v->dg = tensor_join_first(v->dx_in); /* the scan has read it before the convolution writes there */
    cut_x(&s, v->dlow_bc, B, T, &v->dlow, &v->db, &v->dc);
    size_t scan = ops->scan_backward_scratch(scan_shape_of(&s, B, T));
    size_t conv = ops->conv_backward_scratch(B, T, s.I, s.W), again = 0;
    if (mixer_repeats_scan(layer)) again = ops->scan_forward_scratch(scan_shape_of(&s, B, T));
    v->work = arena_take(scratch, mixer_largest(mixer_largest(scan, conv), again));
}

static void mamba_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep, arena *saved,
                        arena *scratch) {
    size_t mark = arena_mark(scratch);
    /* A step carves the same for one token, so its saved memory and scratch are never more than these. */
    struct views v = carve_saved(layer, ops, B, T, keep, saved, scratch);
    size_t behind = arena_mark(scratch);
    carve_forward_scratch(&v, layer, ops, B, T, scratch);
    arena_rewind(scratch, behind);
    if (keep) carve_backward_scratch(&v, layer, ops, B, T, scratch);
    arena_rewind(scratch, mark);
}

static int mamba_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                       tensor views[MIXER_STATES]) {
    struct mamba_sizes s = sizes_of(layer);
    mixer_state_view(views, 0, memory, ops->real, 3, (int64_t[]){B, s.W - 1, s.I});
    mixer_state_view(views, 1, memory, ops->real, 3, (int64_t[]){B, s.I, s.N});
    return 2;
}

enum { STATE_CONV, STATE_SCAN };

/* --- computation ------------------------------------------------------------------------------ */

/* x after the convolution; its last inputs go to `final` where that is wanted. */
static void convolve(const struct mixer_call *call, const struct views *v, tensor initial, tensor final) {
    mixer_conv_forward(call, mixer_by_token(call, v->x), final, v->x_in, CONV_WEIGHT, initial, true);
}

/* Step sizes without bias, from x_proj's output. The bias is the scan's, which adds it in full precision. */
static void expand_steps(const struct mixer_call *call, const struct views *v) {
    call->dev->ops->linear_forward(call->dev, v->raw, v->low, call->w[DT_WEIGHT], tensor_none());
}

/* The scan with its gate. */
static void scan(const struct mixer_call *call, const struct views *v, tensor initial, tensor final) {
    const tensor *w = call->w;
    call->dev->ops->scan_forward(call->dev, mixer_by_token(call, v->g), final, v->scan, mixer_by_token(call, v->x),
                                 mixer_by_token(call, v->raw), w[DT_BIAS], w[A_LOG], v->b, v->c, w[SKIP], v->z, initial,
                                 call->doc, v->work);
}

static void mamba_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w;
    tensor initial[MIXER_STATES], final[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    mixer_state_views(call, call->final, final);
    size_t mark = arena_mark(call->scratch);
    bool keep = call->keep && !mixer_repeats_scan(call->layer);
    struct views v = carve_saved(call->layer, ops, call->B, call->T, keep, call->saved, call->scratch);
    carve_forward_scratch(&v, call->layer, ops, call->B, call->T, call->scratch);

    ops->linear_forward(call->dev, v.xz, call->x, w[IN_PROJ], tensor_none());
    convolve(call, &v, initial[STATE_CONV], final[STATE_CONV]);
    ops->linear_forward(call->dev, v.low_bc, v.x, w[X_PROJ], tensor_none());
    expand_steps(call, &v);
    scan(call, &v, initial[STATE_SCAN], final[STATE_SCAN]);
    ops->linear_forward(call->dev, call->y, v.g, w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

static void mamba_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w, *dw = call->dw;
    tensor initial[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_saved(call->layer, ops, call->B, call->T, true, call->saved, call->scratch);
    carve_backward_scratch(&v, call->layer, ops, call->B, call->T, call->scratch);
    tensor dx = mixer_by_token(call, v.dx);

    convolve(call, &v, initial[STATE_CONV], tensor_none());
    expand_steps(call, &v);
    if (mixer_repeats_scan(call->layer)) scan(call, &v, initial[STATE_SCAN], tensor_none());
    ops->linear_backward(call->dev, v.dg, false, dw[OUT_PROJ], tensor_none(), call->dy, v.g, w[OUT_PROJ]);
    ops->scan_backward(call->dev, dx, mixer_by_token(call, v.draw), v.db, v.dc, v.dz, tensor_none(), dw[DT_BIAS],
                       dw[A_LOG], dw[SKIP], mixer_by_token(call, v.dg), tensor_none(), v.scan,
                       mixer_by_token(call, v.x), mixer_by_token(call, v.raw), w[DT_BIAS], w[A_LOG], v.b, v.c, w[SKIP],
                       v.z, initial[STATE_SCAN], call->doc, v.work);
    ops->linear_backward(call->dev, v.dlow, false, dw[DT_WEIGHT], tensor_none(), v.draw, v.low, w[DT_WEIGHT]);
    ops->linear_backward(call->dev, v.dx, true, dw[X_PROJ], tensor_none(), v.dlow_bc, v.x, w[X_PROJ]);
    mixer_conv_backward(call, v.dx_in, dx, v.x_in, CONV_WEIGHT, initial[STATE_CONV], true, v.work);
    mixer_first_linears_backward(call, &dw[IN_PROJ], v.dxz, &w[IN_PROJ], 1);
    arena_rewind(call->scratch, mark);
}

static void mamba_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w;
    tensor state[MIXER_STATES];
    mixer_state_views(call, call->final, state);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_saved(call->layer, ops, call->B, 1, false, call->saved, call->scratch);
    carve_forward_scratch(&v, call->layer, ops, call->B, 1, call->scratch);

    ops->linear_forward(call->dev, v.xz, call->x, w[IN_PROJ], tensor_none());
    mixer_conv_step(call, v.x, state[STATE_CONV], tensor_join_first(v.x_in), CONV_WEIGHT, true);
    ops->linear_forward(call->dev, v.low_bc, v.x, w[X_PROJ], tensor_none());
    expand_steps(call, &v);
    ops->scan_step(call->dev, v.g, state[STATE_SCAN], v.x, v.raw, w[DT_BIAS], w[A_LOG], tensor_join_first(v.b),
                   tensor_join_first(v.c), w[SKIP], tensor_join_first(v.z));
    ops->linear_forward(call->dev, call->y, v.g, w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* Projections, convolution, and for each number of the state delta A, the two products and the sum of its update, and
 * its part of y; exponentials are not counted. */
static double mamba_flops(const struct layer *layer, int64_t T) {
    (void)T;
    struct mamba_sizes s = sizes_of(layer);
    double D = (double)s.D, I = (double)s.I, X = (double)s.X;
    double projections = 2 * D * 2 * I + 2 * I * X + 2 * (double)s.rank * I + 2 * I * D;
    return projections + 2 * (double)s.W * I + 6 * I * (double)s.N;
}

const struct mixer mixer_mamba = {
    .name = "mamba",
    .help = "Mamba: selective state spaces with a decay for each number of the state (arXiv 2312.00752).",
    .options = mamba_options_table,
    .options_size = sizeof(struct mamba_options),
    .check = mamba_check,
    .declare = mamba_declare,
    .carve = mamba_carve,
    .forward = mamba_forward,
    .backward = mamba_backward,
    .step = mamba_step,
    .state = mamba_state,
    .forward_flops = mamba_flops,
};
