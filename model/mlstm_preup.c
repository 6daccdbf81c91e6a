/* mlstm_preup.c: the mLSTM block of the xLSTM paper (arXiv 2405.04517, figure 11): up-projection, short convolution,
 * queries, keys and values by many small matrices, the mLSTM, a norm for every head, a learnable skip, a gate,
 * down-projection. The mathematics is in docs/xlstm.md; the operations are kernels/ops.h's.
 *
 *   [xm | z] = proj_up(input);   xc = silu(conv1d(xm))
 *   q = q_proj(xc);  k = k_proj(xc);  v = v_proj(xm)          (block-diagonal; v does not see the convolution)
 *   i = igate([q | k | v]);  f = fgate([q | k | v])           (one number a head)
 *   h = mLSTM(q, k, v, i, f);   output = proj_down((norm(h) + skip xc) silu(z))
 *
 * So xc goes three ways, and the gates' gradients reach q, k and v beside those of the mLSTM itself.
 *
 * Saved for backward: the projection, xc, [q | k | v], the gates, what the mLSTM saves and puts out, the norm's
 * statistics and the gated output; less what the layer's level of recomputation (mixer.h) has computed again: xc,
 * [q | k | v] and the gated output, then what the mLSTM saves and puts out. State: the convolution's last W-1 inputs
 * and C, n, m. Reached through the mixer table (mixer.c); owns no memory.
 */
#include "model/mlstm_preup.h"
#include "model/mixer_parts.h"

#include <inttypes.h>
#include <stddef.h>

#define INNER_UNIT 64     /* the inner width is a multiple of it */
#define HEAD_WIDTH_MAX 2048 /* the mLSTM's, in kernels/ops.h */

#define FIELD(name) offsetof(struct mlstm_preup_options, name)
static const struct option mlstm_preup_options_table[] = {
    {"heads", OPTION_INT, FIELD(heads), "4", 1, 1024, "", "Number of heads H; must divide the inner width.", NULL},
    {"expand", OPTION_INT, FIELD(expand), "2", 1, 16, "",
     "Inner width as a multiple of d_model, rounded up to a multiple of 64.", NULL},
    MIXER_CONV_OPTION(struct mlstm_preup_options),
    {"qkv_block", OPTION_INT, FIELD(qkv_block), "4", 1, 4096, "",
     "Queries, keys and values are made by square matrices of this width side by side; must divide the inner width.",
     NULL},
    {"chunk", OPTION_INT, FIELD(chunk), "64", 1, 4096, "tokens",
     "Length of the pieces in which the recurrence is computed: a matter of speed, not of the result.", NULL},
    {"eps", OPTION_FLOAT, FIELD(eps), "1e-6", 0, 1, "", "Added to the mLSTM's normaliser.", NULL},
    OPTIONS_END,
};

struct mlstm_preup_sizes mlstm_preup_sizes(const struct mlstm_preup_options *o, int64_t d_model) {
    struct mlstm_preup_sizes s = {.D = d_model, .H = o->heads, .W = o->d_conv, .Q = o->chunk, .block = o->qkv_block};
    s.I = (o->expand * d_model + INNER_UNIT - 1) / INNER_UNIT * INNER_UNIT;
    s.P = s.I / s.H;
    s.blocks = s.I / s.block;
    return s;
}

static int mlstm_preup_check(void *options, const struct layer_context *context, const char *section, error *err) {
    const struct mlstm_preup_options *o = options;
    struct mlstm_preup_sizes s = mlstm_preup_sizes(o, context->d_model);
    static const char whole[] = "the inner width, expand * d_model rounded up to a multiple of 64,";
    TRY(mixer_check_divides(section, "heads", o->heads, whole, s.I, err));
    TRY(mixer_check_divides(section, "qkv_block", o->qkv_block, whole, s.I, err));
    if (s.P <= HEAD_WIDTH_MAX) return 0;
    return error_input(err, "%s.heads = %" PRId64 " makes heads %" PRId64 " wide; they may be %d wide at most", section,
                       s.H, s.P, HEAD_WIDTH_MAX);
}

static struct mlstm_preup_sizes sizes_of(const struct layer *layer) {
    return mlstm_preup_sizes(layer->options, layer->context.d_model);
}

static struct mlstm_rule rule_of(const struct layer *layer) {
    return (struct mlstm_rule){.normalise = true, .eps = ((const struct mlstm_preup_options *)layer->options)->eps};
}

/* --- tensors ---------------------------------------------------------------------------------- */

/* In declare order. The two gates' weights are neighbours, so that they are one product. */
enum {
    PROJ_UP,
    CONV_WEIGHT,
    CONV_BIAS,
    Q_PROJ,
    K_PROJ,
    V_PROJ,
    I_WEIGHT,
    F_WEIGHT,
    I_BIAS,
    F_BIAS,
    NORM,
    SKIP,
    PROJ_DOWN
};

static void mlstm_preup_declare(const struct layer *layer, struct params *p, const char *prefix) {
    static const char *const small[] = {"q_proj", "k_proj", "v_proj"}, *const gates[] = {"igate", "fgate"};
    struct mlstm_preup_sizes s = sizes_of(layer);
    struct init draw = mixer_small_init(s.D), one = {INIT_CONSTANT, 1, 0, 0}, zero = {INIT_CONSTANT, 0, 0, 0};
    params_add(p, 2, (int64_t[]){2 * s.I, s.D}, draw, true, false, "%sproj_up.weight", prefix);
    params_filled(p, 1);
    mixer_declare_conv(p, prefix, s.I, s.W);
    for (int i = 0; i < 3; i++)
        params_add(p, 3, (int64_t[]){s.blocks, s.block, s.block}, draw, true, false, "%s%s.weight", prefix, small[i]);
    for (int i = 0; i < 2; i++)
        params_add(p, 2, (int64_t[]){s.H, 3 * s.I}, zero, true, false, "%s%s.weight", prefix, gates[i]);
    params_filled(p, 2);
    params_add(p, 1, &s.H, (struct init){INIT_NORMAL, 0.1, 0, 0}, false, true, "%sigate.bias", prefix);
    params_add(p, 1, &s.H, (struct init){INIT_LINSPACE, 3, 6, (double)s.H}, false, true, "%sfgate.bias", prefix);
    params_add(p, 1, &s.I, one, false, true, "%soutnorm.weight", prefix);
    params_add(p, 1, &s.I, one, false, true, "%slearnable_skip", prefix);
    params_add(p, 2, (int64_t[]){s.D, s.I}, mixer_wang_init(layer), true, false, "%sproj_down.weight", prefix);
    params_filled(p, 1);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* What forward computes on the way; all but `raw` is saved when a backward follows. */
struct views {
    tensor xz;         /* (R, 2I) act: proj_up's output */
    tensor xm, z;      /* its columns (R, I) */
    tensor xc;         /* (R, I) act: after the convolution */
    tensor qkv;        /* (R, 3I) act */
    tensor q, k, v;    /* its columns (R, I) */
    tensor gates;      /* (R, 2H) real: [i | f] as they enter the mLSTM */
    tensor h;          /* (R, I) act: the mLSTM's output */
    tensor mean, rstd; /* (R, H) real */
    tensor g;          /* (R, I) act: what goes into proj_down */
    void *mlstm;       /* what the mLSTM saves; NULL without backward */
};

static struct mlstm_shape shape_of(const struct mlstm_preup_sizes *s, int64_t B, int64_t T) {
    return (struct mlstm_shape){.B = B, .T = T, .H = s->H, .K = s->P, .V = s->P, .Q = s->Q};
}

/* Columns of [q | k | v], or of its gradient. */
static void cut_qkv(const struct mlstm_preup_sizes *s, tensor qkv, tensor *q, tensor *k, tensor *v) {
    *q = tensor_columns(qkv, 0, s->I);
    *k = tensor_columns(qkv, s->I, s->I);
    *v = tensor_columns(qkv, 2 * s->I, s->I);
}

/* keep: of a forward, that a backward follows; and true in backward, which reads what the mLSTM saves. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                                arena *saved, arena *scratch) {
    struct mlstm_preup_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct views v = {.mlstm = NULL};
    arena *light = mixer_repeats_light(layer) ? scratch : saved;
    arena *of_mlstm = mixer_repeats_scan(layer) ? scratch : saved;
    v.xz = mixer_take(saved, ops->act, R, 2 * s.I);
    v.xc = mixer_take(light, ops->act, R, s.I);
    v.qkv = mixer_take(light, ops->act, R, 3 * s.I);
    v.gates = mixer_take(saved, ops->real, R, 2 * s.H);
    v.h = mixer_take(of_mlstm, ops->act, R, s.I);
    v.mean = mixer_take(saved, ops->real, R, s.H);
    v.rstd = mixer_take(saved, ops->real, R, s.H);
    v.g = mixer_take(light, ops->act, R, s.I);
    if (keep) v.mlstm = arena_take(of_mlstm, ops->mlstm_saved(shape_of(&s, B, T)));
    v.xm = tensor_columns(v.xz, 0, s.I);
    v.z = tensor_columns(v.xz, s.I, s.I);
    cut_qkv(&s, v.qkv, &v.q, &v.k, &v.v);
    return v;
}

/* Gradients on the way back, and memory for the operation at work. */
struct gradients {
    tensor dxz, dxm, dz;
    tensor dxc, dh, dg; /* (R, I) act */
    tensor dqkv, dq, dk, dv;
    tensor dgates; /* (R, 2H) real */
    tensor draw;   /* (R, 2H) act: the same for the products */
    void *work;
};

static struct gradients carve_gradients(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                        arena *scratch) {
    struct mlstm_preup_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct gradients d;
    d.dxz = mixer_take(scratch, ops->act, R, 2 * s.I);
    d.dxc = mixer_take(scratch, ops->act, R, s.I);
    d.dh = mixer_take(scratch, ops->act, R, s.I);
    d.dqkv = mixer_take(scratch, ops->act, R, 3 * s.I);
    d.dg = tensor_2d(d.dqkv.data, ops->act, R, s.I); /* the norm has read it before the mLSTM writes there */
    d.dgates = mixer_take(scratch, ops->real, R, 2 * s.H);
    d.draw = mixer_take(scratch, ops->act, R, 2 * s.H);
    d.dxm = tensor_columns(d.dxz, 0, s.I);
    d.dz = tensor_columns(d.dxz, s.I, s.I);
    cut_qkv(&s, d.dqkv, &d.dq, &d.dk, &d.dv);
    size_t work = ops->head_norm_backward_scratch(R, s.I, s.H);
    work = mixer_largest(work, ops->mlstm_backward_scratch(shape_of(&s, B, T)));
    work = mixer_largest(work, ops->softcap_backward_scratch(R, s.H));
    work = mixer_largest(work, ops->block_linear_backward_scratch(R, s.blocks, s.block, s.block));
    work = mixer_largest(work, ops->conv_backward_scratch(B, T, s.I, s.W));
    if (mixer_repeats_scan(layer)) work = mixer_largest(work, ops->mlstm_forward_scratch(shape_of(&s, B, T)));
    d.work = arena_take(scratch, work);
    return d;
}

/* Of a forward: the gates before their biases, and memory for the mLSTM. */
struct forward_work {
    tensor raw; /* (R, 2H) real */
    void *mlstm;
};

static struct forward_work carve_forward_work(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                              arena *scratch) {
    struct mlstm_preup_sizes s = sizes_of(layer);
    struct forward_work work;
    work.raw = mixer_take(scratch, ops->real, B * T, 2 * s.H);
    work.mlstm = arena_take(scratch, ops->mlstm_forward_scratch(shape_of(&s, B, T)));
    return work;
}

static void mlstm_preup_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                              arena *saved, arena *scratch) {
    size_t mark = arena_mark(scratch);
    /* A step carves the same views for one token, so its saved memory and scratch are never more than these. */
    carve_views(layer, ops, B, T, keep, saved, scratch);
    size_t behind = arena_mark(scratch);
    carve_forward_work(layer, ops, B, T, scratch);
    arena_rewind(scratch, behind);
    if (keep) carve_gradients(layer, ops, B, T, scratch);
    arena_rewind(scratch, mark);
}

enum { STATE_CONV, STATE_C, STATE_N, STATE_M };

static int mlstm_preup_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                             tensor views[MIXER_STATES]) {
    struct mlstm_preup_sizes s = sizes_of(layer);
    mixer_state_view(views, STATE_CONV, memory, ops->real, 3, (int64_t[]){B, s.W - 1, s.I});
    mixer_state_view(views, STATE_C, memory, ops->real, 4, (int64_t[]){B, s.H, s.P, s.P});
    mixer_state_view(views, STATE_N, memory, ops->real, 3, (int64_t[]){B, s.H, s.P});
    mixer_state_view(views, STATE_M, memory, ops->real, 2, (int64_t[]){B, s.H});
    return 4;
}

static struct mlstm_state mlstm_of(const tensor *views) {
    return (struct mlstm_state){.C = views[STATE_C], .n = views[STATE_N], .m = views[STATE_M]};
}

static const struct mlstm_state no_state; /* all none */

/* --- computation ------------------------------------------------------------------------------ */

/* Rows of all heads by time and head: (B, T, H, P). */
static tensor by_head(const struct mixer_call *call, tensor rows) {
    int64_t H = ((const struct mlstm_preup_options *)call->layer->options)->heads;
    return mixer_heads(rows, 0, H, rows.dim[1] / H, call->B, call->T);
}

/* Half of [i | f] by time. */
static tensor gate(const struct mixer_call *call, tensor gates, int number) {
    int64_t H = gates.dim[1] / 2;
    return mixer_by_token(call, tensor_columns(gates, number * H, H));
}

static void convolve(const struct mixer_call *call, const struct views *v, tensor initial, tensor final) {
    mixer_conv_forward(call, mixer_by_token(call, v->xc), final, mixer_by_token(call, v->xm), CONV_WEIGHT, initial,
                       true);
}

static void make_qkv(const struct mixer_call *call, const struct views *v) {
    const struct ops *ops = call->dev->ops;
    ops->block_linear_forward(call->dev, v->q, v->xc, call->w[Q_PROJ]);
    ops->block_linear_forward(call->dev, v->k, v->xc, call->w[K_PROJ]);
    ops->block_linear_forward(call->dev, v->v, v->xm, call->w[V_PROJ]);
}

static void make_gates(const struct mixer_call *call, const struct views *v, tensor raw) {
    const struct ops *ops = call->dev->ops;
    int64_t H = raw.dim[1] / 2;
    mixer_linears_forward(call, raw, v->qkv, &call->w[I_WEIGHT], 2);
    for (int i = 0; i < 2; i++)
        ops->softcap_forward(call->dev, tensor_columns(v->gates, i * H, H), tensor_columns(raw, i * H, H),
                             call->w[I_BIAS + i], 0);
}

static void recur(const struct mixer_call *call, const struct views *v, struct mlstm_state initial,
                  struct mlstm_state final, void *work) {
    const struct mlstm_preup_options *o = call->layer->options;
    call->dev->ops->mlstm_forward(call->dev, by_head(call, v->h), final, v->mlstm, by_head(call, v->q),
                                  by_head(call, v->k), by_head(call, v->v), gate(call, v->gates, 0),
                                  gate(call, v->gates, 1), initial, call->doc, rule_of(call->layer), o->chunk,
                                  work);
}

static void normalise(const struct mixer_call *call, const struct views *v) {
    call->dev->ops->head_norm_forward(call->dev, v->g, v->mean, v->rstd, v->h, call->w[NORM], v->xc, call->w[SKIP],
                                      v->z, ACTIVATION_SILU, call->layer->context.norm_eps);
}

static void mlstm_preup_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    tensor initial[MIXER_STATES], final[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    mixer_state_views(call, call->final, final);
    size_t mark = arena_mark(call->scratch);
    bool keep = call->keep && !mixer_repeats_scan(call->layer);
    struct views v = carve_views(call->layer, ops, call->B, call->T, keep, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);

    ops->linear_forward(call->dev, v.xz, call->x, call->w[PROJ_UP], tensor_none());
    convolve(call, &v, initial[STATE_CONV], final[STATE_CONV]);
    make_qkv(call, &v);
    make_gates(call, &v, work.raw);
    recur(call, &v, mlstm_of(initial), mlstm_of(final), work.mlstm);
    normalise(call, &v);
    ops->linear_forward(call->dev, call->y, v.g, call->w[PROJ_DOWN], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* What forward left to be computed again. */
static void restore(const struct mixer_call *call, const struct views *v, const tensor *initial, void *work) {
    if (!mixer_repeats_light(call->layer)) return;
    convolve(call, v, initial[STATE_CONV], tensor_none());
    make_qkv(call, v);
    if (mixer_repeats_scan(call->layer)) recur(call, v, mlstm_of(initial), no_state, work);
    normalise(call, v);
}

/* From the gates' gradients to their biases, their weights, and what they add to that of [q | k | v]. */
static void gates_backward(const struct mixer_call *call, const struct views *v, const struct gradients *d) {
    const struct ops *ops = call->dev->ops;
    int64_t H = d->draw.dim[1] / 2;
    for (int i = 0; i < 2; i++)
        ops->softcap_backward(call->dev, tensor_columns(d->draw, i * H, H), call->dw[I_BIAS + i],
                              tensor_columns(d->dgates, i * H, H), tensor_columns(v->gates, i * H, H), 0, d->work);
    mixer_linears_backward(call, d->dqkv, true, &call->dw[I_WEIGHT], d->draw, v->qkv, &call->w[I_WEIGHT], 2);
}

static void mlstm_preup_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct mlstm_preup_options *o = call->layer->options;
    const tensor *w = call->w, *dw = call->dw;
    tensor initial[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, call->T, true, call->saved, call->scratch);
    struct gradients d = carve_gradients(call->layer, ops, call->B, call->T, call->scratch);

    restore(call, &v, initial, d.work);
    mixer_linear_backward_beside(call, d.dg, dw[PROJ_DOWN], call->dy, v.g, w[PROJ_DOWN]);
    ops->head_norm_backward(call->dev, d.dh, d.dxc, d.dz, dw[NORM], dw[SKIP], d.dg, v.h, v.mean, v.rstd, w[NORM], v.xc,
                            w[SKIP], v.z, ACTIVATION_SILU, d.work);
    device_join(call->dev);
    ops->mlstm_backward(call->dev, by_head(call, d.dq), by_head(call, d.dk), by_head(call, d.dv),
                        gate(call, d.dgates, 0), gate(call, d.dgates, 1), no_state, by_head(call, d.dh), no_state,
                        v.mlstm, by_head(call, v.h), by_head(call, v.q), by_head(call, v.k), by_head(call, v.v),
                        gate(call, v.gates, 0), gate(call, v.gates, 1), mlstm_of(initial), call->doc,
                        rule_of(call->layer), o->chunk, d.work);
    gates_backward(call, &v, &d);
    ops->block_linear_backward(call->dev, d.dxc, true, dw[Q_PROJ], d.dq, v.xc, w[Q_PROJ], d.work);
    ops->block_linear_backward(call->dev, d.dxc, true, dw[K_PROJ], d.dk, v.xc, w[K_PROJ], d.work);
    mixer_conv_backward(call, mixer_by_token(call, d.dxm), mixer_by_token(call, d.dxc), mixer_by_token(call, v.xm),
                        CONV_WEIGHT, initial[STATE_CONV], true, d.work);
    ops->block_linear_backward(call->dev, d.dxm, true, dw[V_PROJ], d.dv, v.xm, w[V_PROJ], d.work);
    mixer_first_linears_backward(call, &dw[PROJ_UP], d.dxz, &w[PROJ_UP], 1);
    arena_rewind(call->scratch, mark);
}

static void mlstm_preup_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w;
    tensor state[MIXER_STATES];
    mixer_state_views(call, call->final, state);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, 1, false, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, 1, call->scratch);

    ops->linear_forward(call->dev, v.xz, call->x, w[PROJ_UP], tensor_none());
    mixer_conv_step(call, v.xc, state[STATE_CONV], v.xm, CONV_WEIGHT, true);
    make_qkv(call, &v);
    make_gates(call, &v, work.raw);
    ops->mlstm_step(call->dev, tensor_join_first(by_head(call, v.h)), mlstm_of(state),
                    tensor_join_first(by_head(call, v.q)), tensor_join_first(by_head(call, v.k)),
                    tensor_join_first(by_head(call, v.v)), tensor_join_first(gate(call, v.gates, 0)),
                    tensor_join_first(gate(call, v.gates, 1)), rule_of(call->layer));
    normalise(call, &v);
    ops->linear_forward(call->dev, call->y, v.g, w[PROJ_DOWN], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* Projections, convolution, small matrices and gates, and the mLSTM as it is computed in chunks. */
static double mlstm_preup_flops(const struct layer *layer, int64_t T) {
    struct mlstm_preup_sizes s = sizes_of(layer);
    double D = (double)s.D, I = (double)s.I, H = (double)s.H, P = (double)s.P, Q = (double)(s.Q < T ? s.Q : T);
    double projections = 2 * D * 2 * I + 2 * I * D + 3 * 2 * I * (double)s.block + 2 * 3 * I * 2 * H;
    return projections + 2 * (double)s.W * I + H * (2 * Q * 2 * P + 4 * P * P);
}

const struct mixer mixer_mlstm_preup = {
    .name = "mlstm_preup",
    .help = "mLSTM between an up- and a down-projection, the block of the xLSTM paper (arXiv 2405.04517).",
    .options = mlstm_preup_options_table,
    .options_size = sizeof(struct mlstm_preup_options),
    .check = mlstm_preup_check,
    .declare = mlstm_preup_declare,
    .carve = mlstm_preup_carve,
    .forward = mlstm_preup_forward,
    .backward = mlstm_preup_backward,
    .step = mlstm_preup_step,
    .state = mlstm_preup_state,
    .forward_flops = mlstm_preup_flops,
};
