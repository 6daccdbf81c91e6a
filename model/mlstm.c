/* mlstm.c: the mLSTM layer of the xLSTM 7B architecture (arXiv 2503.13427): a matrix memory for each head between dense
 * projections. The mathematics is in docs/xlstm.md; the operations are kernels/ops.h's.
 *
 *   q, k, v, o = W_q x, W_k x, W_v x, W_o x;   i = cap(W_i x + b_i);   f = cap(W_f x + b_f);   cap(u) = c tanh(u / c)
 *   per head, with f' = sigmoid(f), i' = exp(i) and s = K^-1/2:   C[t] = f' C[t-1] + i' k[t] (outer) v[t];
 *   n[t] = f' n[t-1] + i' k[t];   h[t] = C[t]^T s q[t] / max(|n[t] . s q[t]|, 1)
 *   output = W_out (sigmoid(o) * head norm(h))
 *
 * The gates' pre-activations are never rounded: their sums over a sequence stand in exponents. Saved for backward: the
 * projections, what enters the gates, what the mLSTM saves and puts out, the norm's statistics and its gated output;
 * less what the layer's level of recomputation (mixer.h) has computed again: that last output, then the mLSTM.
 * State: C, n and the stabiliser m. Reached through the mixer table (mixer.c); owns no memory.
 */
#include "model/mlstm.h"
#include "model/mixer_parts.h"

#include <inttypes.h>
#include <stddef.h>

#define FIELD(name) offsetof(struct mlstm_options, name)
#define HEAD_MAX 2048 /* widest head of the operation */

static const char *const gate_names[] = {"exp", "sigmoid", NULL};
static const char *const backward_names[] = {"exact", "truncated", NULL};

static const struct option mlstm_options_table[] = {
    {"heads", OPTION_INT, FIELD(heads), "4", 1, 4096, "",
     "Number of heads; must divide the widths of q and k and of v. A head keeps a matrix, its part of the one width "
     "times that of the other.", NULL},
    {"qk_factor", OPTION_FLOAT, FIELD(qk_factor), "0.5", 1e-6, 16, "",
     "Width of q and of k, all heads together, as a multiple of d_model; rounded down.", NULL},
    {"v_factor", OPTION_FLOAT, FIELD(v_factor), "1", 1e-6, 16, "", "The same for v and the output gate.", NULL},
    {"chunk", OPTION_INT, FIELD(chunk), "64", 1, 4096, "tokens",
     "Length of the pieces in which the recurrence is computed: a matter of speed, not of the result.", NULL},
    {"input_gate", OPTION_CHOICE, FIELD(input_gate), "exp", 0, 0, "",
     "How the input gate weighs a token: exp, kept in range by a stabiliser; sigmoid, which needs none (arXiv "
     "2503.14376).",
     gate_names},
    {"normalise", OPTION_BOOL, FIELD(normalise), "true", 0, 0, "",
     "Whether what is read from the memory is divided by the normaliser. Only input_gate = sigmoid can do without; the "
     "paper's variant does.", NULL},
    {"backward", OPTION_CHOICE, FIELD(backward), "exact", 0, 0, "",
     "exact: the gradient; truncated: as the published kernels compute it, with the normaliser held fixed. The head "
     "norm behind it lets little of the difference through.", backward_names},
    {"gate_soft_cap", OPTION_FLOAT, FIELD(gate_soft_cap), "15", 0, 1e6, "",
     "Pre-activations u of the input and forget gates become cap tanh(u / cap); 0 = they stay as they are.", NULL},
    {"eps", OPTION_FLOAT, FIELD(eps), "1e-6", 0, 1, "", "Added to the normaliser.", NULL},
    OPTIONS_END,
};

struct mlstm_sizes mlstm_sizes(const struct mlstm_options *o, int64_t d_model) {
    struct mlstm_sizes s = {.D = d_model, .H = o->heads, .Q = o->chunk};
    s.K = (int64_t)(o->qk_factor * (double)d_model) / s.H;
    s.V = (int64_t)(o->v_factor * (double)d_model) / s.H;
    s.HK = s.H * s.K;
    s.HV = s.H * s.V;
    s.E = 2 * s.HK + 2 * s.HV;
    return s;
}

static int64_t common_divisor(int64_t a, int64_t b) {
    return b == 0 ? a : common_divisor(b, a % b);
}

static int check_width(const char *section, const char *key, double factor, int64_t d_model, int64_t heads,
                       error *err) {
    int64_t width = (int64_t)(factor * (double)d_model);
    if (width < 1)
        return error_input(err, "%s.%s = %g leaves no width; it must be at least 1 / d_model = %g", section, key,
                           factor, 1 / (double)d_model);
    if (width / heads > HEAD_MAX)
        return error_input(err,
                           "%s.%s = %g makes heads %" PRId64 " wide; they may be %d wide, with heads = %" PRId64
                           " or more", section, key, factor, width / heads, HEAD_MAX, (width - 1) / HEAD_MAX + 1);
    return 0;
}

static int mlstm_check(void *options, const struct layer_context *context, const char *section, error *err) {
    const struct mlstm_options *o = options;
    int64_t qk = (int64_t)(o->qk_factor * (double)context->d_model);
    int64_t v = (int64_t)(o->v_factor * (double)context->d_model);
    TRY(check_width(section, "qk_factor", o->qk_factor, context->d_model, o->heads, err));
    TRY(check_width(section, "v_factor", o->v_factor, context->d_model, o->heads, err));
    if (qk % o->heads != 0 || v % o->heads != 0)
        return error_input(err,
                           "%s.heads = %" PRId64 " must divide qk_factor * d_model = %" PRId64
                           " and v_factor * d_model = %" PRId64 "; the nearest that does is %" PRId64,
                           section, o->heads, qk, v, mixer_nearest_divisor(common_divisor(qk, v), o->heads));
    if (!o->normalise && o->input_gate == MLSTM_GATE_EXP)
        return error_input(err,
                           "%s.normalise = false needs input_gate = sigmoid: what input_gate = exp gathers has no "
                           "scale without the normaliser",
                           section);
    return 0;
}

static struct mlstm_sizes sizes_of(const struct layer *layer) {
    return mlstm_sizes(layer->options, layer->context.d_model);
}

static struct mlstm_rule rule_of(const struct layer *layer) {
    const struct mlstm_options *o = layer->options;
    return (struct mlstm_rule){.sigmoid_input = o->input_gate == MLSTM_GATE_SIGMOID,
                               .normalise = o->normalise,
                               .truncated = o->backward == MLSTM_TRUNCATED,
                               .eps = o->eps};
}

static double cap_of(const struct layer *layer) {
    return ((const struct mlstm_options *)layer->options)->gate_soft_cap;
}

/* --- tensors ---------------------------------------------------------------------------------- */

/* In declare order. The six matrices that read the layer's input are neighbours, so that they can be one product. */
enum { W_Q, W_K, W_V, W_O, W_I, W_F, BIAS_I, BIAS_F, NORM, W_OUT };
enum { PROJECTIONS = W_O + 1, GATES = 2 };

static void declare_matrix(struct params *p, const char *prefix, const char *name, int64_t outputs, int64_t inputs,
                           struct init init) {
    params_add(p, 2, (int64_t[]){outputs, inputs}, init, true, false, "%s%s.weight", prefix, name);
    params_filled(p, 1);
}

/* The initialisation with which the 7B model was trained: all gates start from their biases alone, the input gate
 * nearly closed and the forget gates open by a different amount in each head. */
static void mlstm_declare(const struct layer *layer, struct params *p, const char *prefix) {
    struct mlstm_sizes s = sizes_of(layer);
    struct init zero = {INIT_CONSTANT, 0, 0, 0}, one = {INIT_CONSTANT, 1, 0, 0}, small = mixer_small_init(s.D);
    declare_matrix(p, prefix, "q", s.HK, s.D, small);
    declare_matrix(p, prefix, "k", s.HK, s.D, small);
    declare_matrix(p, prefix, "v", s.HV, s.D, small);
    declare_matrix(p, prefix, "ogate_preact", s.HV, s.D, zero);
    declare_matrix(p, prefix, "igate_preact", s.H, s.D, zero);
    declare_matrix(p, prefix, "fgate_preact", s.H, s.D, zero);
    params_add(p, 1, &s.H, (struct init){INIT_CONSTANT, -10, 0, 0}, false, true, "%sigate_preact.bias", prefix);
    params_add(p, 1, &s.H, (struct init){INIT_LINSPACE, 3, 6, (double)s.H}, false, true, "%sfgate_preact.bias", prefix);
    params_add(p, 1, &s.HV, one, false, true, "%smultihead_norm.weight", prefix);
    declare_matrix(p, prefix, "out_proj", s.D, s.HV, mixer_wang_init(layer));
}

/* --- memory ----------------------------------------------------------------------------------- */

/* What forward computes on the way; all of it is saved when a backward follows. */
struct views {
    tensor qkvo;       /* (R, E) act: the projections */
    tensor q, k, v;    /* its columns (B, T, H, K) twice, (B, T, H, V) */
    tensor o;          /* its columns (R, HV) */
    tensor gates;      /* (R, 2H) real: what enters the gates */
    tensor i, f;       /* its columns (R, H) */
    tensor h;          /* (R, HV) act: the mLSTM's output */
    tensor mean, rstd; /* (R, H) real */
    tensor g;          /* (R, HV) act: normed and gated */
    void *mlstm;       /* what the mLSTM saves; NULL without backward */
};

static struct mlstm_shape shape_of(const struct mlstm_sizes *s, int64_t B, int64_t T) {
    return (struct mlstm_shape){.B = B, .T = T, .H = s->H, .K = s->K, .V = s->V, .Q = s->Q};
}

/* Columns of the projections, or of their gradient. */
static void cut_projections(const struct mlstm_sizes *s, tensor qkvo, int64_t B, int64_t T, tensor *q, tensor *k,
                            tensor *v, tensor *o) {
    *q = mixer_heads(qkvo, 0, s->H, s->K, B, T);
    *k = mixer_heads(qkvo, s->HK, s->H, s->K, B, T);
    *v = mixer_heads(qkvo, 2 * s->HK, s->H, s->V, B, T);
    *o = tensor_columns(qkvo, 2 * s->HK + s->HV, s->HV);
}

/* keep: of a forward, that a backward follows; and true in backward, which reads what the mLSTM saves. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                                arena *saved, arena *scratch) {
    struct mlstm_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct views v = {.mlstm = NULL};
    arena *light = mixer_repeats_light(layer) ? scratch : saved;
    arena *of_mlstm = mixer_repeats_scan(layer) ? scratch : saved;
    v.qkvo = mixer_take(saved, ops->act, R, s.E);
    v.gates = mixer_take(saved, ops->real, R, 2 * s.H);
    v.h = mixer_take(of_mlstm, ops->act, R, s.HV);
    v.mean = mixer_take(saved, ops->real, R, s.H);
    v.rstd = mixer_take(saved, ops->real, R, s.H);
    v.g = mixer_take(light, ops->act, R, s.HV);
    if (keep) v.mlstm = arena_take(of_mlstm, ops->mlstm_saved(shape_of(&s, B, T)));
    cut_projections(&s, v.qkvo, B, T, &v.q, &v.k, &v.v, &v.o);
    v.i = tensor_columns(v.gates, 0, s.H);
    v.f = tensor_columns(v.gates, s.H, s.H);
    return v;
}

/* Gradients on the way back, and memory for the operation at work. */
struct gradients {
    tensor dg, dh;     /* (R, HV) act */
    tensor all;        /* (R, E + 2H) act: at the six projections, in declare order */
    tensor dq, dk, dv; /* its columns, as q, k, v */
    tensor d_o;        /* its columns (R, HV) */
    tensor raw_i, raw_f; /* its columns (R, H): before the cap, rounded for the products */
    tensor di, df;       /* (R, H) real: what enters the gates */
    void *work;
};

#define ROW_UNIT 8 /* elements: rows of gradients begin at multiples of 16 bytes */

static struct gradients carve_gradients(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                        arena *scratch) {
    struct mlstm_sizes s = sizes_of(layer);
    int64_t R = B * T, columns = s.E + 2 * s.H, row = (columns + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT;
    struct gradients d;
    d.dg = mixer_take(scratch, ops->act, R, s.HV);
    d.dh = mixer_take(scratch, ops->act, R, s.HV);
    d.all = tensor_columns(mixer_take(scratch, ops->act, R, row), 0, columns);
    cut_projections(&s, d.all, B, T, &d.dq, &d.dk, &d.dv, &d.d_o);
    d.raw_i = tensor_columns(d.all, s.E, s.H);
    d.raw_f = tensor_columns(d.all, s.E + s.H, s.H);
    tensor gates = mixer_take(scratch, ops->real, R, 2 * s.H);
    d.di = tensor_columns(gates, 0, s.H);
    d.df = tensor_columns(gates, s.H, s.H);
    size_t work = ops->head_norm_backward_scratch(R, s.HV, s.H);
    work = mixer_largest(work, ops->mlstm_backward_scratch(shape_of(&s, B, T)));
    work = mixer_largest(work, ops->softcap_backward_scratch(R, s.H));
    if (mixer_repeats_scan(layer)) work = mixer_largest(work, ops->mlstm_forward_scratch(shape_of(&s, B, T)));
    d.work = arena_take(scratch, work);
    return d;
}

/* The gates' pre-activations before the cap, and memory for the mLSTM at work. */
struct forward_work {
    tensor raw; /* (R, 2H) real */
    void *mlstm;
};

static struct forward_work carve_forward_work(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                              arena *scratch) {
    struct mlstm_sizes s = sizes_of(layer);
    struct forward_work work = {.raw = mixer_take(scratch, ops->real, B * T, 2 * s.H)};
    work.mlstm = arena_take(scratch, ops->mlstm_forward_scratch(shape_of(&s, B, T)));
    return work;
}

static void mlstm_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep, arena *saved,
                        arena *scratch) {
    size_t mark = arena_mark(scratch);
    /* A step carves the same for one token, so its saved memory and scratch are never more than these. */
    carve_views(layer, ops, B, T, keep, saved, scratch);
    size_t behind = arena_mark(scratch);
    carve_forward_work(layer, ops, B, T, scratch);
    arena_rewind(scratch, behind);
    if (keep) carve_gradients(layer, ops, B, T, scratch);
    arena_rewind(scratch, mark);
}

static int mlstm_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                       tensor views[MIXER_STATES]) {
    struct mlstm_sizes s = sizes_of(layer);
    mixer_state_view(views, 0, memory, ops->real, 4, (int64_t[]){B, s.H, s.K, s.V});
    mixer_state_view(views, 1, memory, ops->real, 3, (int64_t[]){B, s.H, s.K});
    mixer_state_view(views, 2, memory, ops->real, 2, (int64_t[]){B, s.H});
    return 3;
}

static struct mlstm_state state_at(const struct mixer_call *call, const void *memory) {
    tensor views[MIXER_STATES];
    mixer_state_views(call, memory, views);
    return (struct mlstm_state){.C = views[0], .n = views[1], .m = views[2]};
}

/* --- computation ------------------------------------------------------------------------------ */

static void project(const struct mixer_call *call, const struct views *v, tensor raw) {
    const struct ops *ops = call->dev->ops;
    int64_t H = v->i.dim[1];
    double cap = cap_of(call->layer);
    mixer_linears_forward(call, v->qkvo, call->x, &call->w[W_Q], PROJECTIONS);
    mixer_linears_forward(call, raw, call->x, &call->w[W_I], GATES);
    ops->softcap_forward(call->dev, v->i, tensor_columns(raw, 0, H), call->w[BIAS_I], cap);
    ops->softcap_forward(call->dev, v->f, tensor_columns(raw, H, H), call->w[BIAS_F], cap);
}

static tensor by_head(const struct mixer_call *call, const struct views *v, tensor rows) {
    return mixer_heads(rows, 0, v->v.dim[2], v->v.dim[3], call->B, call->T);
}

static void recur(const struct mixer_call *call, const struct views *v, struct mlstm_state final, void *work) {
    const struct mlstm_options *o = call->layer->options;
    call->dev->ops->mlstm_forward(call->dev, by_head(call, v, v->h), final, v->mlstm, v->q, v->k, v->v,
                                  mixer_by_token(call, v->i), mixer_by_token(call, v->f),
                                  state_at(call, call->initial), call->doc, rule_of(call->layer), o->chunk, work);
}

static void normalise(const struct mixer_call *call, const struct views *v) {
    call->dev->ops->head_norm_forward(call->dev, v->g, v->mean, v->rstd, v->h, call->w[NORM], tensor_none(),
                                      tensor_none(), v->o, ACTIVATION_SIGMOID, call->layer->context.norm_eps);
}

static void mlstm_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    size_t mark = arena_mark(call->scratch);
    bool keep = call->keep && !mixer_repeats_scan(call->layer);
    struct views v = carve_views(call->layer, ops, call->B, call->T, keep, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);
    project(call, &v, work.raw);
    recur(call, &v, state_at(call, call->final), work.mlstm);
    normalise(call, &v);
    ops->linear_forward(call->dev, call->y, v.g, call->w[W_OUT], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* What forward left to be computed again. */
static void restore(const struct mixer_call *call, const struct views *v, void *work) {
    if (!mixer_repeats_light(call->layer)) return;
    if (mixer_repeats_scan(call->layer)) recur(call, v, state_at(call, NULL), work);
    normalise(call, v);
}

static void mlstm_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct mlstm_options *o = call->layer->options;
    const tensor *w = call->w, *dw = call->dw, none = tensor_none();
    int64_t B = call->B, T = call->T;
    double cap = cap_of(call->layer);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, B, T, true, call->saved, call->scratch);
    struct gradients d = carve_gradients(call->layer, ops, B, T, call->scratch);

    restore(call, &v, d.work);
    mixer_linear_backward_beside(call, d.dg, dw[W_OUT], call->dy, v.g, w[W_OUT]);
    ops->head_norm_backward(call->dev, d.dh, none, d.d_o, dw[NORM], none, d.dg, v.h, v.mean, v.rstd, w[NORM], none,
                            none, v.o, ACTIVATION_SIGMOID, d.work);
    device_join(call->dev);
    ops->mlstm_backward(call->dev, d.dq, d.dk, d.dv, mixer_by_token(call, d.di), mixer_by_token(call, d.df),
                        state_at(call, NULL), by_head(call, &v, d.dh), state_at(call, NULL), v.mlstm,
                        by_head(call, &v, v.h), v.q, v.k, v.v, mixer_by_token(call, v.i), mixer_by_token(call, v.f),
                        state_at(call, call->initial), call->doc, rule_of(call->layer), o->chunk, d.work);
    ops->softcap_backward(call->dev, d.raw_i, dw[BIAS_I], d.di, v.i, cap, d.work);
    ops->softcap_backward(call->dev, d.raw_f, dw[BIAS_F], d.df, v.f, cap, d.work);
    mixer_first_linears_backward(call, &dw[W_Q], d.all, &w[W_Q], PROJECTIONS + GATES);
    arena_rewind(call->scratch, mark);
}

static void mlstm_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, 1, false, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, 1, call->scratch);
    project(call, &v, work.raw);
    ops->mlstm_step(call->dev, tensor_split_last(v.h, v.v.dim[2], v.v.dim[3]), state_at(call, call->final),
                    tensor_join_first(v.q), tensor_join_first(v.k), tensor_join_first(v.v), v.i, v.f,
                    rule_of(call->layer));
    normalise(call, &v);
    ops->linear_forward(call->dev, call->y, v.g, call->w[W_OUT], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* Projections, and the mLSTM as the chunked algorithm computes it, per head: update and reading of the state, the
 * square of scores within a chunk and its product with v, and the decay of the state once a chunk. */
static double mlstm_flops(const struct layer *layer, int64_t T) {
    struct mlstm_sizes s = sizes_of(layer);
    double D = (double)s.D, K = (double)s.K, V = (double)s.V, Q = (double)(s.Q < T ? s.Q : T);
    double projections = 2 * D * (double)(s.E + 2 * s.H) + 2 * D * (double)s.HV;
    return projections + (double)s.H * (4 * K * V + 2 * Q * (K + V) + 2 * K * V / Q);
}

const struct mixer mixer_mlstm = {
    .name = "mlstm",
    .help = "The mLSTM of the xLSTM 7B architecture: a matrix memory with exponential gates (arXiv 2503.13427).",
    .options = mlstm_options_table,
    .options_size = sizeof(struct mlstm_options),
    .check = mlstm_check,
    .declare = mlstm_declare,
    .carve = mlstm_carve,
    .forward = mlstm_forward,
    .backward = mlstm_backward,
    .step = mlstm_step,
    .state = mlstm_state,
    .forward_flops = mlstm_flops,
};
