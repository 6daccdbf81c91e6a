/* attention.c: the attention layer of Transformers (arXiv 1706.03762) with rotary positions, grouped heads of keys and
 * values (arXiv 2305.13245) and a sliding window, as Llama and its kin have it. The mathematics is in
 * docs/attention.md; the operations are kernels/ops.h's.
 *
 *   q, k, v = W_q x, W_k x, W_v x;   q, k = rotated by the token's position, each head normed before if qk_norm says so
 *   per head: o_t = sum_j softmax_j(P^-1/2 q_t . k_j) v_j over the tokens j that t sees;   output = W_o o
 *
 * A token sees those of its document up to itself, the last `window` of them where there is a window. Saved for
 * backward: the projections (rotated in place), the attention's output and the logarithms of its sums, and with qk_norm
 * the normed and rotated queries and keys; less what the layer's level of recomputation (mixer.h) has computed again:
 * those last ones, then the attention's output.
 * State: keys and values of the last `context` (or `window`) tokens, and how many tokens there were: a ring
 * (struct attention_cache). A forward may have the same memory as initial and final state. No gradient goes into it.
 * Reached through the mixer table (mixer.c); owns no memory. */
#include "model/attention.h"
#include "model/mixer_parts.h"

#include <inttypes.h>
#include <stddef.h>

#define FIELD(name) offsetof(struct attention_options, name)
#define HEAD_MAX 256 /* widest head of the operation */

static const struct option attention_options_table[] = {
    {"heads", OPTION_INT, FIELD(heads), NULL, 1, 4096, "", "Number of heads of queries.", NULL},
    {"kv_heads", OPTION_INT, FIELD(kv_heads), "0", 0, 4096, "",
     "Number of heads of keys and values, each shared by heads / kv_heads neighbouring heads of queries; 0 = heads.",
     NULL},
    {"head_dim", OPTION_INT, FIELD(head_dim), "0", 0, HEAD_MAX, "",
     "Width of a head, an even number; 0 = d_model / heads.", NULL},
    {"window", OPTION_INT, FIELD(window), "0", 0, 1 << 30, "tokens",
     "How many tokens of its document a token sees at most, itself included; 0 = all.", NULL},
    {"context", OPTION_INT, FIELD(context), "4096", 1, 1 << 24, "tokens",
     "How many tokens a state holds, for generation and for evaluation that carries it on; with more, the oldest are "
     "forgotten. Training does not look at it, nor does a window that is shorter.", NULL},
    {"rope_base", OPTION_FLOAT, FIELD(rope_base), "10000", 0, 1e12, "",
     "Base of the rotary positions' frequencies; 0 = no positions.", NULL},
    {"qk_norm", OPTION_BOOL, FIELD(qk_norm), "false", 0, 0, "",
     "Whether each head of queries and keys passes an RMSNorm, with a gain that all heads share, before it is rotated.",
     NULL},
    OPTIONS_END,
};

struct attention_sizes attention_sizes(const struct attention_options *o, int64_t d_model) {
    struct attention_sizes s = {.D = d_model, .H = o->heads, .G = o->kv_heads, .P = o->head_dim, .C = o->context};
    s.HP = s.H * s.P;
    s.GP = s.G * s.P;
    s.E = s.HP + 2 * s.GP;
    if (o->window > 0 && o->window < s.C) s.C = o->window;
    return s;
}

static int attention_check(void *options, const struct layer_context *context, const char *section, error *err) {
    struct attention_options *o = options;
    if (o->kv_heads == 0) o->kv_heads = o->heads;
    TRY(mixer_check_divides(section, "kv_heads", o->kv_heads, "heads", o->heads, err));
    if (o->head_dim == 0 && context->d_model % o->heads != 0)
        return error_input(err,
                           "%s.heads = %" PRId64 " must divide d_model = %" PRId64 "; the nearest that does is %" PRId64
                           ", or give head_dim",
                           section, o->heads, context->d_model, mixer_nearest_divisor(context->d_model, o->heads));
    if (o->head_dim % 2 != 0)
        return error_input(err,
                           "%s.head_dim = %" PRId64 " is odd, but rotary positions turn pairs of channels; the nearest "
                           "that is possible is %" PRId64,
                           section, o->head_dim, o->head_dim + 1);
    if (o->head_dim == 0) o->head_dim = context->d_model / o->heads;
    if (o->head_dim % 2 == 0 && o->head_dim <= HEAD_MAX) return 0;
    return error_input(err,
                       "%s.heads = %" PRId64 " makes heads %" PRId64 " wide, d_model being %" PRId64 "; they must be "
                       "an even number of channels wide, at most %d: give another number of heads, or head_dim",
                       section, o->heads, o->head_dim, context->d_model, HEAD_MAX);
}

static const struct attention_options *options_of(const struct layer *layer) {
    return layer->options;
}

static struct attention_sizes sizes_of(const struct layer *layer) {
    return attention_sizes(layer->options, layer->context.d_model);
}

/* --- tensors ---------------------------------------------------------------------------------- */

enum { W_Q, W_K, W_V, W_O, Q_NORM, K_NORM, PROJECTIONS = W_V + 1 }; /* in declare order */

static void attention_declare(const struct layer *layer, struct params *p, const char *prefix) {
    struct attention_sizes s = sizes_of(layer);
    struct init in = {INIT_NORMAL, 0.02, 0, 0}, out = {INIT_NORMAL, 0.02 * mixer_residual_scale(layer), 0, 0};
    mixer_declare_projection(layer, p, prefix, "q_proj.weight", s.HP, s.D, false, in);
    mixer_declare_projection(layer, p, prefix, "k_proj.weight", s.GP, s.D, false, in);
    mixer_declare_projection(layer, p, prefix, "v_proj.weight", s.GP, s.D, false, in);
    mixer_declare_projection(layer, p, prefix, "o_proj.weight", s.D, s.HP, true, out);
    params_filled(p, PROJECTIONS + 1);
    if (!options_of(layer)->qk_norm) return;
    struct init one = {INIT_CONSTANT, 1, 0, 0};
    params_add(p, 1, &s.P, one, false, true, "%sq_norm.weight", prefix);
    params_add(p, 1, &s.P, one, false, true, "%sk_norm.weight", prefix);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* What forward computes on the way; all of it is saved when a backward follows. */
struct views {
    tensor qkv;          /* (R, E) act: the projections; without qk_norm q and k in it are rotated */
    tensor raw_q, raw_k; /* its columns (B, T, H, P), (B, T, G, P) */
    tensor q, k, v;      /* what attention reads: (B, T, H, P), (B, T, G, P) twice */
    tensor qk;           /* q and k as one (B, T, H+G, P), where they are rotated in place */
    tensor q_rstd, k_rstd; /* (B, T, H), (B, T, G) real, with qk_norm */
    tensor o;              /* (R, HP) act */
    tensor lse;            /* (B, H, T) real */
};

static struct attention_shape shape_of(const struct attention_sizes *s, int64_t B, int64_t T) {
    return (struct attention_shape){.B = B, .T = T, .H = s->H, .G = s->G, .P = s->P, .C = s->C};
}

static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, arena *saved,
                                arena *scratch) {
    struct attention_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct views v;
    arena *light = mixer_repeats_light(layer) ? scratch : saved;
    arena *of_attention = mixer_repeats_scan(layer) ? scratch : saved;
    v.qkv = mixer_take(saved, ops->act, R, s.E);
    v.raw_q = v.q = mixer_heads(v.qkv, 0, s.H, s.P, B, T);
    v.raw_k = v.k = mixer_heads(v.qkv, s.HP, s.G, s.P, B, T);
    v.v = mixer_heads(v.qkv, s.HP + s.GP, s.G, s.P, B, T);
    v.qk = mixer_heads(v.qkv, 0, s.H + s.G, s.P, B, T);
    if (options_of(layer)->qk_norm) {
        tensor normed = mixer_take(light, ops->act, R, s.HP + s.GP);
        v.q = mixer_heads(normed, 0, s.H, s.P, B, T);
        v.k = mixer_heads(normed, s.HP, s.G, s.P, B, T);
        v.q_rstd = tensor_split_first(mixer_take(light, ops->real, R, s.H), B, T);
        v.k_rstd = tensor_split_first(mixer_take(light, ops->real, R, s.G), B, T);
    }
    v.o = mixer_take(of_attention, ops->act, R, s.HP);
    tensor lse = mixer_take(of_attention, ops->real, R, s.H);
    v.lse = tensor_reshape(lse, 3, (int64_t[]){B, s.H, T});
    return v;
}

/* Positions of tokens, and memory for the operation at work. */
struct forward_work {
    tensor positions; /* (B, T) i32 */
    void *attention;
};

/* The operation's memory serves a step, too, whatever the number of tokens. */
static struct forward_work carve_forward_work(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                              arena *scratch) {
    struct attention_sizes s = sizes_of(layer);
    struct attention_shape shape = shape_of(&s, B, T);
    struct forward_work work = {.positions = mixer_take(scratch, DTYPE_I32, B, T)};
    work.attention = arena_take(
        scratch, mixer_largest(ops->attention_forward_scratch(shape), ops->attention_step_scratch(shape)));
    return work;
}

/* Gradients on the way back. */
struct gradients {
    tensor d_o;        /* (R, HP) act */
    tensor dqkv;       /* (R, E) act */
    tensor dq, dk, dv; /* its columns by heads */
    tensor dqk;        /* the first two as one */
    void *work;
};

static struct gradients carve_gradients(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                        arena *scratch) {
    struct attention_sizes s = sizes_of(layer);
    struct gradients d;
    d.d_o = mixer_take(scratch, ops->act, B * T, s.HP);
    d.dqkv = mixer_take(scratch, ops->act, B * T, s.E);
    d.dq = mixer_heads(d.dqkv, 0, s.H, s.P, B, T);
    d.dk = mixer_heads(d.dqkv, s.HP, s.G, s.P, B, T);
    d.dv = mixer_heads(d.dqkv, s.HP + s.GP, s.G, s.P, B, T);
    d.dqk = mixer_heads(d.dqkv, 0, s.H + s.G, s.P, B, T);
    size_t work = ops->attention_backward_scratch(shape_of(&s, B, T));
    if (options_of(layer)->qk_norm) work = mixer_largest(work, ops->rope_backward_scratch(B * T, s.H, s.P));
    d.work = arena_take(scratch, work);
    return d;
}

static void attention_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                            arena *saved, arena *scratch) {
    size_t mark = arena_mark(scratch);
    carve_views(layer, ops, B, T, saved, scratch);
    carve_forward_work(layer, ops, B, T, scratch);
    if (keep) carve_gradients(layer, ops, B, T, scratch);
    arena_rewind(scratch, mark);
}

static int attention_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                           tensor views[MIXER_STATES]) {
    struct attention_sizes s = sizes_of(layer);
    mixer_state_view(views, 0, memory, ops->act, 4, (int64_t[]){B, s.C, s.G, s.P});
    mixer_state_view(views, 1, memory, ops->act, 4, (int64_t[]){B, s.C, s.G, s.P});
    mixer_state_view(views, 2, memory, DTYPE_I32, 1, &B);
    return 3;
}

static struct attention_cache cache_at(const struct mixer_call *call, const void *memory) {
    tensor views[MIXER_STATES];
    mixer_state_views(call, memory, views);
    return (struct attention_cache){.k = views[0], .v = views[1], .count = views[2]};
}

/* --- computation ------------------------------------------------------------------------------ */

static struct attention_rule rule_of(const struct layer *layer) {
    return (struct attention_rule){.window = options_of(layer)->window};
}

static tensor find_positions(const struct mixer_call *call, tensor positions) {
    return mixer_find_positions(call, positions, cache_at(call, call->initial).count);
}

/* q and k as attention reads them. With qk_norm this can be done once more, from the same projections. */
static void rotate(const struct mixer_call *call, const struct views *v, tensor positions) {
    const struct ops *ops = call->dev->ops;
    const struct attention_options *o = options_of(call->layer);
    const tensor *w = call->w, none = tensor_none();
    double eps = call->layer->context.norm_eps;
    if (o->qk_norm) {
        ops->rope_forward(call->dev, v->q, v->q_rstd, v->raw_q, w[Q_NORM], positions, o->rope_base, eps);
        ops->rope_forward(call->dev, v->k, v->k_rstd, v->raw_k, w[K_NORM], positions, o->rope_base, eps);
    } else if (o->rope_base > 0) {
        ops->rope_forward(call->dev, v->qk, none, v->qk, none, positions, o->rope_base, eps);
    }
}

static tensor by_head(tensor rows, const struct views *v) {
    return mixer_heads(rows, 0, v->q.dim[2], v->q.dim[3], v->q.dim[0], v->q.dim[1]);
}

static void attend(const struct mixer_call *call, const struct views *v, const struct forward_work *work,
                   tensor positions) {
    call->dev->ops->attention_forward(call->dev, by_head(v->o, v), v->lse, v->q, v->k, v->v, positions,
                                      cache_at(call, call->initial), rule_of(call->layer), work->attention);
}

/* The state behind the last token. */
static void keep_state(const struct mixer_call *call, const struct views *v, tensor positions) {
    if (!call->final) return;
    if (call->initial && call->initial != call->final)
        device_copy(call->dev, call->final, call->initial, mixer_state_bytes(call->layer, call->dev->ops, call->B));
    call->dev->ops->attention_store(call->dev, cache_at(call, call->final), v->k, v->v, positions);
}

static void attention_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, call->T, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);
    tensor positions = find_positions(call, work.positions);
    mixer_linears_forward(call, v.qkv, call->x, &call->w[W_Q], PROJECTIONS);
    rotate(call, &v, positions);
    attend(call, &v, &work, positions);
    keep_state(call, &v, positions);
    ops->linear_forward(call->dev, call->y, v.o, call->w[W_O], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* From gradients of what attention read to those of the projections, in place. */
static void rotate_back(const struct mixer_call *call, const struct views *v, const struct gradients *d,
                        tensor positions) {
    const struct ops *ops = call->dev->ops;
    const struct attention_options *o = options_of(call->layer);
    const tensor *w = call->w, *dw = call->dw, none = tensor_none();
    if (o->qk_norm) {
        ops->rope_backward(call->dev, d->dq, dw[Q_NORM], d->dq, v->q_rstd, v->raw_q, w[Q_NORM], positions, o->rope_base,
                           d->work);
        ops->rope_backward(call->dev, d->dk, dw[K_NORM], d->dk, v->k_rstd, v->raw_k, w[K_NORM], positions, o->rope_base,
                           d->work);
    } else if (o->rope_base > 0) {
        ops->rope_backward(call->dev, d->dqk, none, d->dqk, none, none, none, positions, o->rope_base, NULL);
    }
}

static void attention_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, call->T, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);
    struct gradients d = carve_gradients(call->layer, ops, call->B, call->T, call->scratch);
    tensor positions = find_positions(call, work.positions);
    if (mixer_repeats_light(call->layer) && options_of(call->layer)->qk_norm)
        rotate(call, &v, positions);
    if (mixer_repeats_scan(call->layer)) attend(call, &v, &work, positions);
    ops->linear_backward(call->dev, d.d_o, false, call->dw[W_O], tensor_none(), call->dy, v.o, call->w[W_O]);
    ops->attention_backward(call->dev, d.dq, d.dk, d.dv, by_head(d.d_o, &v), by_head(v.o, &v), v.lse, v.q, v.k, v.v,
                            positions, cache_at(call, call->initial), rule_of(call->layer), d.work);
    rotate_back(call, &v, &d, positions);
    mixer_first_linears_backward(call, &call->dw[W_Q], d.dqkv, &call->w[W_Q], PROJECTIONS);
    arena_rewind(call->scratch, mark);
}

/* A token's position is the number of those before it, which is where the cache counts. */
static void attention_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, 1, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, 1, call->scratch);
    struct attention_cache cache = cache_at(call, call->final);
    tensor positions = tensor_reshape(cache.count, 2, (int64_t[]){call->B, 1});
    mixer_linears_forward(call, v.qkv, call->x, &call->w[W_Q], PROJECTIONS);
    rotate(call, &v, positions);
    ops->attention_store(call->dev, cache, v.k, v.v, positions);
    ops->attention_step(call->dev, tensor_join_first(by_head(v.o, &v)), tensor_join_first(v.q), cache,
                        rule_of(call->layer), work.attention);
    ops->linear_forward(call->dev, call->y, v.o, call->w[W_O], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* Projections, and a product with each visible key and value. */
static double attention_flops(const struct layer *layer, int64_t T) {
    struct attention_sizes s = sizes_of(layer);
    double tokens = (double)T, window = (double)options_of(layer)->window, keys = (tokens + 1) / 2;
    if (window > 0 && window < tokens) keys = window - window * (window - 1) / (2 * tokens);
    return 2 * (double)s.D * (double)(s.E + s.HP) + 4 * (double)s.HP * keys;
}

static int64_t attention_context(const struct layer *layer) {
    const struct attention_options *o = options_of(layer);
    return o->window > 0 && o->window <= o->context ? 0 : o->context;
}

const struct mixer mixer_attention = {
    .name = "attention",
    .help = "Causal attention with rotary positions, over all or the last tokens (arXiv 1706.03762, 2104.09864).",
    .options = attention_options_table,
    .options_size = sizeof(struct attention_options),
    .state_in_place = true,
    .check = attention_check,
    .declare = attention_declare,
    .carve = attention_carve,
    .forward = attention_forward,
    .backward = attention_backward,
    .step = attention_step,
    .state = attention_state,
    .context = attention_context,
    .forward_flops = attention_flops,
};
