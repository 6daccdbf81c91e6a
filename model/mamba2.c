/* mamba2.c: the Mamba-2 layer (arXiv 2405.21060, section 7): one projection in, a short convolution, the SSD
 * recurrence, a gated norm, one projection out. The mathematics is in docs/mamba2.md; the operations are
 * kernels/ops.h's.
 *
 *   [z | x | B | C | dt] = in_proj(input);   [x | B | C] = silu(conv1d([x | B | C]));   dt = softplus(dt + dt_bias)
 *   per head: S[t] = exp(-exp(A_log) dt) S[t-1] + dt x[t] (outer) B[t];   y[t] = S[t] C[t] + D x[t]
 *   output = out_proj(norm(y * silu(z)))
 *
 * Saved for backward: the projection, the convolution's output, dt and a = -exp(A_log) dt, what SSD saves, y, the
 * norm's statistics and its output; less what the layer's level of recomputation (mixer.h) has computed again: the
 * outputs of convolution and norm, then y and what SSD saves. The norm's backward gives its output with the rest, so
 * no pass of its own is needed for it. State: the convolution's last W-1 inputs and S. Reached
 * through the mixer table (mixer.c); owns no memory.
 */
#include "model/mamba2.h"
#include "model/mixer_parts.h"

#include <math.h>
#include <stddef.h>

#define FIELD(name) offsetof(struct mamba2_options, name)
static const struct option mamba2_options_table[] = {
    {"d_state", OPTION_INT, FIELD(d_state), "128", 1, 4096, "",
     "State size N: each head keeps head_dim x d_state numbers.", NULL},
    {"head_dim", OPTION_INT, FIELD(head_dim), "64", 1, 4096, "", "Width P of a head; must divide expand * d_model.",
     NULL},
    MIXER_EXPAND_OPTION(struct mamba2_options),
    {"n_groups", OPTION_INT, FIELD(n_groups), "1", 1, 1024, "",
     "Groups of heads that share B and C; must divide the number of heads. Exported models need 1.", NULL},
    MIXER_CONV_OPTION(struct mamba2_options),
    {"chunk", OPTION_INT, FIELD(chunk), "64", 1, 4096, "tokens",
     "Length of the pieces in which the recurrence is computed: a matter of speed, not of the result.", NULL},
    MIXER_DT_OPTIONS(struct mamba2_options),
    {"A_init_min", OPTION_FLOAT, FIELD(A_init_min), "1", 1e-10, 1e6, "", "Smallest initial -A (drawn uniformly).",
     NULL},
    {"A_init_max", OPTION_FLOAT, FIELD(A_init_max), "16", 1e-10, 1e6, "", "Largest initial -A.", NULL},
    {"dt_limit_min", OPTION_FLOAT, FIELD(dt_limit_min), "0", 0, 1e6, "",
     "Step sizes are clamped from below to it, always.", NULL},
    {"dt_limit_max", OPTION_FLOAT, FIELD(dt_limit_max), "0", 0, 1e6, "",
     "Step sizes are clamped from above to it; 0 = not clamped.", NULL},
    OPTIONS_END,
};

struct mamba2_sizes mamba2_sizes(const struct mamba2_options *o, int64_t d_model) {
    struct mamba2_sizes s = {.D = d_model,
                             .I = o->expand * d_model,
                             .P = o->head_dim,
                             .G = o->n_groups,
                             .N = o->d_state,
                             .W = o->d_conv,
                             .Q = o->chunk};
    s.H = s.I / s.P;
    s.C = s.I + 2 * s.G * s.N;
    s.E = s.I + s.C + s.H;
    return s;
}

static int mamba2_check(void *options, const struct layer_context *context, const char *section, error *err) {
    const struct mamba2_options *o = options;
    int64_t inner = o->expand * context->d_model;
    TRY(mixer_check_divides(section, "head_dim", o->head_dim, "expand * d_model", inner, err));
    TRY(mixer_check_divides(section, "n_groups", o->n_groups, "the number of heads, expand * d_model / head_dim",
                            inner / o->head_dim, err));
    TRY(mixer_check_dt(o->dt_min, o->dt_max, section, err));
    if (o->A_init_min > o->A_init_max)
        return error_input(err, "%s.A_init_min = %g must not be above A_init_max = %g; it may be at most that", section,
                           o->A_init_min, o->A_init_max);
    if (o->dt_limit_max != 0 && o->dt_limit_min > o->dt_limit_max)
        return error_input(err,
                           "%s.dt_limit_min = %g must not be above dt_limit_max = %g; it may be at most that, and "
                           "dt_limit_max = 0 sets no limit",
                           section, o->dt_limit_min, o->dt_limit_max);
    return 0;
}

static struct mamba2_sizes sizes_of(const struct layer *layer) {
    return mamba2_sizes(layer->options, layer->context.d_model);
}

/* --- tensors ---------------------------------------------------------------------------------- */

enum { IN_PROJ, CONV_WEIGHT, CONV_BIAS, DT_BIAS, A_LOG, SKIP, NORM, OUT_PROJ }; /* in declare order */

static void mamba2_declare(const struct layer *layer, struct params *p, const char *prefix) {
    const struct mamba2_options *o = layer->options;
    struct mamba2_sizes s = sizes_of(layer);
    struct init one = {INIT_CONSTANT, 1, 0, 0};
    mixer_declare_linear(p, prefix, "in_proj.weight", s.E, s.D, 1);
    params_filled(p, 1);
    mixer_declare_conv(p, prefix, s.C, s.W);
    params_add(p, 1, &s.H, (struct init){INIT_DT_BIAS, o->dt_min, o->dt_max, o->dt_init_floor}, false, true,
               "%sdt_bias", prefix);
    params_add(p, 1, &s.H, (struct init){INIT_LOG_UNIFORM, o->A_init_min, o->A_init_max, 0}, false, true, "%sA_log",
               prefix);
    params_add(p, 1, &s.H, one, false, true, "%sD", prefix);
    params_add(p, 1, &s.I, one, false, true, "%snorm.weight", prefix);
    mixer_declare_linear(p, prefix, "out_proj.weight", s.D, s.I, mixer_residual_scale(layer));
    params_filled(p, 1);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* What forward computes on the way; all of it is saved when a backward follows. */
struct views {
    tensor zxbcdt;         /* (R, E) act, rows in whole lines: in_proj's output */
    tensor xbc_in, dt_raw; /* its columns (B, T, C) and (B, T, H) */
    tensor xbc;            /* (B, T, C) act: after the convolution */
    tensor x, b, c;        /* its columns (B, T, H, P), (B, T, G, N) twice */
    tensor dt, a;          /* (B, T, H) real */
    struct mixer_gated out; /* of SSD's output y and of z, columns of zxbcdt */
    void *ssd;             /* what SSD saves; NULL without backward */
};

static struct ssd_shape ssd_shape_of(const struct mamba2_sizes *s, int64_t B, int64_t T) {
    return (struct ssd_shape){.B = B, .T = T, .H = s->H, .P = s->P, .G = s->G, .N = s->N, .Q = s->Q};
}

/* Columns of the projection, or of its gradient. */
static void cut_projection(const struct mamba2_sizes *s, tensor zxbcdt, int64_t B, int64_t T, tensor *z, tensor *xbc,
                           tensor *dt) {
    *z = tensor_columns(zxbcdt, 0, s->I);
    *xbc = tensor_split_first(tensor_columns(zxbcdt, s->I, s->C), B, T);
    *dt = tensor_split_first(tensor_columns(zxbcdt, s->I + s->C, s->H), B, T);
}

/* Columns of the convolution's output, or of its gradient. */
static void cut_conv(const struct mamba2_sizes *s, tensor xbc, tensor *x, tensor *b, tensor *c) {
    *x = tensor_split_last(tensor_columns(xbc, 0, s->I), s->H, s->P);
    *b = tensor_split_last(tensor_columns(xbc, s->I, s->G * s->N), s->G, s->N);
    *c = tensor_split_last(tensor_columns(xbc, s->I + s->G * s->N, s->G * s->N), s->G, s->N);
}

/* keep: of a forward, that a backward follows; and true in backward, which reads what SSD saves. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                                arena *saved, arena *scratch) {
    struct mamba2_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct views v = {.out = {.g = tensor_none(), .norm = NORM, .out_proj = OUT_PROJ}, .ssd = NULL};
    arena *light = mixer_repeats_light(layer) ? scratch : saved, *of_ssd = mixer_repeats_scan(layer) ? scratch : saved;
    v.zxbcdt = mixer_take_lines(saved, ops->act, R, s.E);
    v.xbc = tensor_split_first(mixer_take(light, ops->act, R, s.C), B, T);
    v.dt = tensor_split_first(mixer_take(saved, ops->real, R, s.H), B, T);
    v.a = tensor_split_first(mixer_take(saved, ops->real, R, s.H), B, T);
    v.out.y = mixer_take(of_ssd, ops->act, R, s.I);
    v.out.rstd = mixer_take(saved, ops->real, R, s.G);
    if (!mixer_repeats_light(layer)) v.out.g = mixer_take(saved, ops->act, R, s.I);
    if (keep) v.ssd = arena_take(of_ssd, ops->ssd_saved(ssd_shape_of(&s, B, T)));
    cut_projection(&s, v.zxbcdt, B, T, &v.out.z, &v.xbc_in, &v.dt_raw);
    cut_conv(&s, v.xbc, &v.x, &v.b, &v.c);
    return v;
}

/* Gradients on the way back, and memory for the operation at work. */
struct gradients {
    tensor dg, dy;           /* (R, I) act */
    tensor dxbc, dx, db, dc; /* as xbc and its columns */
    tensor ddt, da;          /* (B, T, H) real */
    tensor dzxbcdt, dz, dxbc_in, ddt_raw;
    void *work;
};

static struct gradients carve_gradients(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                        arena *scratch) {
    struct mamba2_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct gradients d;
    d.dy = mixer_take(scratch, ops->act, R, s.I);
    d.dxbc = tensor_split_first(mixer_take(scratch, ops->act, R, s.C), B, T);
    d.dg = tensor_2d(d.dxbc.data, ops->act, R, s.I); /* no longer needed when SSD writes there */
    d.ddt = tensor_split_first(mixer_take(scratch, ops->real, R, s.H), B, T);
    d.da = tensor_split_first(mixer_take(scratch, ops->real, R, s.H), B, T);
    d.dzxbcdt = mixer_take_lines(scratch, ops->act, R, s.E);
    cut_projection(&s, d.dzxbcdt, B, T, &d.dz, &d.dxbc_in, &d.ddt_raw);
    cut_conv(&s, d.dxbc, &d.dx, &d.db, &d.dc);
    size_t work = ops->gated_rmsnorm_backward_scratch(R, s.I);
    work = mixer_largest(work, ops->ssd_backward_scratch(ssd_shape_of(&s, B, T)));
    work = mixer_largest(work, ops->conv_backward_scratch(B, T, s.C, s.W));
    work = mixer_largest(work, ops->ssd_dt_backward_scratch(B, T, s.H));
    if (mixer_repeats_scan(layer)) work = mixer_largest(work, ops->ssd_forward_scratch(ssd_shape_of(&s, B, T)));
    d.work = arena_take(scratch, work);
    return d;
}

static void *carve_forward_work(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                arena *scratch) {
    struct mamba2_sizes s = sizes_of(layer);
    return arena_take(scratch, ops->ssd_forward_scratch(ssd_shape_of(&s, B, T)));
}

static void mamba2_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                         arena *saved, arena *scratch) {
    size_t mark = arena_mark(scratch);
    /* A step carves the same views for one token, so its saved memory and scratch are never more than these. */
    struct views v = carve_views(layer, ops, B, T, keep, saved, scratch);
    size_t behind = arena_mark(scratch);
    mixer_gated_carve(layer, ops, &v.out, scratch);
    carve_forward_work(layer, ops, B, T, scratch);
    arena_rewind(scratch, behind);
    if (keep) carve_gradients(layer, ops, B, T, scratch);
    arena_rewind(scratch, mark);
}

static int mamba2_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                        tensor views[MIXER_STATES]) {
    struct mamba2_sizes s = sizes_of(layer);
    mixer_state_view(views, 0, memory, ops->real, 3, (int64_t[]){B, s.W - 1, s.C});
    mixer_state_view(views, 1, memory, ops->real, 4, (int64_t[]){B, s.H, s.P, s.N});
    return 2;
}

enum { STATE_CONV, STATE_SSD };

/* --- computation ------------------------------------------------------------------------------ */

static double dt_limit(const struct mamba2_options *o) {
    return o->dt_limit_max > 0 ? o->dt_limit_max : INFINITY;
}

static tensor by_head(const struct mixer_call *call, const struct views *v, tensor rows) {
    return mixer_heads(rows, 0, v->x.dim[2], v->x.dim[3], call->B, call->T);
}

static void convolve(const struct mixer_call *call, const struct views *v, tensor initial, tensor final) {
    mixer_conv_forward(call, v->xbc, final, v->xbc_in, CONV_WEIGHT, initial, true);
}

static void recur(const struct mixer_call *call, const struct views *v, tensor initial, tensor final, void *work) {
    const struct mamba2_options *o = call->layer->options;
    call->dev->ops->ssd_forward(call->dev, by_head(call, v, v->out.y), final, v->ssd, v->x, v->dt, v->a, v->b, v->c,
                                call->w[SKIP], initial, call->doc, o->chunk, work);
}

static void mamba2_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct mamba2_options *o = call->layer->options;
    const tensor *w = call->w;
    tensor initial[MIXER_STATES], final[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    mixer_state_views(call, call->final, final);
    size_t mark = arena_mark(call->scratch);
    bool keep = call->keep && !mixer_repeats_scan(call->layer);
    struct views v = carve_views(call->layer, ops, call->B, call->T, keep, call->saved, call->scratch);
    mixer_gated_carve(call->layer, ops, &v.out, call->scratch);
    void *work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);

    ops->linear_forward(call->dev, v.zxbcdt, call->x, w[IN_PROJ], tensor_none());
    convolve(call, &v, initial[STATE_CONV], final[STATE_CONV]);
    ops->ssd_dt_forward(call->dev, v.dt, v.a, v.dt_raw, w[DT_BIAS], w[A_LOG], o->dt_limit_min, dt_limit(o));
    recur(call, &v, initial[STATE_SSD], final[STATE_SSD], work);
    mixer_gated_norm(call, &v.out);
    ops->linear_forward(call->dev, call->y, v.out.g, w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* What forward left to be computed again. */
static void restore(const struct mixer_call *call, const struct views *v, const tensor *initial, void *work) {
    if (!mixer_repeats_light(call->layer)) return;
    convolve(call, v, initial[STATE_CONV], tensor_none());
    if (mixer_repeats_scan(call->layer)) recur(call, v, initial[STATE_SSD], tensor_none(), work);
}

static void mamba2_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct mamba2_options *o = call->layer->options;
    const tensor *w = call->w, *dw = call->dw;
    tensor initial[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, call->T, true, call->saved, call->scratch);
    struct gradients d = carve_gradients(call->layer, ops, call->B, call->T, call->scratch);
    tensor dy = by_head(call, &v, d.dy);

    restore(call, &v, initial, d.work);
    mixer_gated_backward(call, &v.out, d.dy, d.dz, d.dg, d.work);
    ops->ssd_backward(call->dev, d.dx, d.ddt, d.da, d.db, d.dc, tensor_none(), dw[SKIP], dy, tensor_none(), v.ssd, v.x,
                      v.dt, v.a, v.b, v.c, w[SKIP], initial[STATE_SSD], call->doc, o->chunk, d.work);
    ops->ssd_dt_backward(call->dev, d.ddt_raw, dw[DT_BIAS], dw[A_LOG], d.ddt, d.da, v.dt_raw, w[DT_BIAS], w[A_LOG],
                         o->dt_limit_min, dt_limit(o), d.work);
    mixer_conv_backward(call, d.dxbc_in, d.dxbc, v.xbc_in, CONV_WEIGHT, initial[STATE_CONV], true, d.work);
    mixer_first_linears_backward(call, &dw[IN_PROJ], d.dzxbcdt, &w[IN_PROJ], 1);
    arena_rewind(call->scratch, mark);
}

static void mamba2_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct mamba2_options *o = call->layer->options;
    const tensor *w = call->w;
    int64_t B = call->B;
    tensor state[MIXER_STATES];
    mixer_state_views(call, call->final, state);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, B, 1, false, call->saved, call->scratch);
    mixer_gated_carve(call->layer, ops, &v.out, call->scratch);
    tensor dt = tensor_join_first(v.dt), a = tensor_join_first(v.a);
    tensor y = tensor_split_last(v.out.y, v.x.dim[2], v.x.dim[3]);

    ops->linear_forward(call->dev, v.zxbcdt, call->x, w[IN_PROJ], tensor_none());
    mixer_conv_step(call, tensor_join_first(v.xbc), state[STATE_CONV], tensor_join_first(v.xbc_in), CONV_WEIGHT, true);
    ops->ssd_dt_forward(call->dev, v.dt, v.a, v.dt_raw, w[DT_BIAS], w[A_LOG], o->dt_limit_min, dt_limit(o));
    ops->ssd_step(call->dev, y, state[STATE_SSD], tensor_join_first(v.x), dt, a, tensor_join_first(v.b),
                  tensor_join_first(v.c), w[SKIP]);
    mixer_gated_norm(call, &v.out);
    ops->linear_forward(call->dev, call->y, v.out.g, w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* Projections, convolution, and SSD as the chunked algorithm computes it: per group C B^T within a chunk, per head its
 * product with x and the products of the states. */
static double mamba2_flops(const struct layer *layer, int64_t T) {
    struct mamba2_sizes s = sizes_of(layer);
    double D = (double)s.D, I = (double)s.I, Q = (double)(s.Q < T ? s.Q : T), P = (double)s.P, N = (double)s.N;
    double projections = 2 * D * (double)s.E + 2 * I * D;
    double conv = 2 * (double)s.W * (double)s.C;
    double ssd = (double)s.G * 2 * Q * N + (double)s.H * (2 * Q * P + 4 * P * N);
    return projections + conv + ssd;
}

const struct mixer mixer_mamba2 = {
    .name = "mamba2",
    .help = "Mamba-2: selective state spaces with a scalar decay per head (arXiv 2405.21060).",
    .options = mamba2_options_table,
    .options_size = sizeof(struct mamba2_options),
    .check = mamba2_check,
    .declare = mamba2_declare,
    .carve = mamba2_carve,
    .forward = mamba2_forward,
    .backward = mamba2_backward,
    .step = mamba2_step,
    .state = mamba2_state,
    .forward_flops = mamba2_flops,
};
