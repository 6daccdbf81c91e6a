/* rat.c: the RAT layer (arXiv 2507.04416): a gated recurrence within chunks, attention over the ends of chunks. The
 * mathematics is in docs/rat.md; the operations are kernels/ops.h's.
 *
 *   [z | v | g | q | k] = W_in x;   a = sigmoid(g + gate_bias), per channel; q and k are shared by the heads of a group
 *   k~[t] = a k~[t-1] + (1 - a) k[t];   v~[t] likewise, from 0 in every chunk
 *   o = softmax over the last k~ of all earlier chunks (rotated by the chunk's index) and the token's own k~, of v~
 *   output = W_out (sigmoid(z) o)
 *
 * Chunks are cut from each document's start. Saved for backward: the projection, what RAT saves (its output before the
 * gate, the logarithms of its sums) and the gated output; from `recompute = scan` on the last two are made again.
 * State: keys and values at the ends of the last `context` tokens' chunks, where the recurrence stands, and how many
 * tokens there were (struct rat_state). A forward may have the same memory as initial and final state. No gradient goes
 * into it. Reached through the mixer table (mixer.c); owns no memory. */
#include "model/rat.h"
#include "model/mixer_parts.h"

#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#define FIELD(name) offsetof(struct rat_options, name)
#define HEAD_MAX 256 /* widest head of the operation */

static const struct option rat_options_table[] = {
    {"heads", OPTION_INT, FIELD(heads), NULL, 1, 4096, "", "Number of heads; must divide d_model.", NULL},
    {"groups", OPTION_INT, FIELD(groups), "2", 1, 4096, "",
     "Number of queries and keys of a head's width; head h has those of group h modulo groups. Must divide heads.",
     NULL},
    {"chunk", OPTION_INT, FIELD(chunk), "16", 1, 1 << 24, "tokens",
     "Length of the chunks in which the recurrence runs and over whose ends attention goes. As long as the documents: "
     "the recurrence alone.", NULL},
    {"context", OPTION_INT, FIELD(context), "4096", 1, 1 << 24, "tokens",
     "How many tokens' chunks a state holds, for generation and for evaluation that carries it on; with more, the "
     "oldest are forgotten. Training does not look at it.", NULL},
    {"rope_base", OPTION_FLOAT, FIELD(rope_base), "10000", 0, 1e12, "",
     "Base of the rotary positions' frequencies, by the chunk's index; 0 = no positions.", NULL},
    OPTIONS_END,
};

struct rat_sizes rat_sizes(const struct rat_options *o, int64_t d_model) {
    struct rat_sizes s = {.D = d_model, .H = o->heads, .G = o->groups, .Q = o->chunk};
    s.P = s.D / s.H;
    s.E = 3 * s.D + 2 * s.G * s.P;
    s.C = (o->context + s.Q - 1) / s.Q;
    return s;
}

/* The number nearest to `wanted` of heads that are evenly and not too wide; 0 if there is none. */
static int64_t nearest_heads(int64_t D, int64_t groups, int64_t wanted) {
    int64_t best = 0;
    for (int64_t heads = groups; heads <= D / 2; heads += groups) {
        bool fits = D % heads == 0 && D / heads % 2 == 0 && D / heads <= HEAD_MAX;
        if (fits && (best == 0 || llabs(heads - wanted) < llabs(best - wanted))) best = heads;
    }
    return best;
}

static int rat_check(void *options, const struct layer_context *context, const char *section, error *err) {
    const struct rat_options *o = options;
    int64_t D = context->d_model;
    TRY(mixer_check_divides(section, "heads", o->heads, "d_model", D, err));
    TRY(mixer_check_divides(section, "groups", o->groups, "heads", o->heads, err));
    int64_t P = D / o->heads, better = nearest_heads(D, o->groups, o->heads);
    if (P % 2 == 0 && P <= HEAD_MAX) return 0;
    char valid[60] = "no number of heads does that";
    if (better) snprintf(valid, sizeof valid, "the nearest number that does is %" PRId64, better);
    return error_input(err,
                       "%s.heads = %" PRId64 " makes heads %" PRId64 " wide, d_model being %" PRId64
                       "; they must be an even number of channels wide, at most %d: %s",
                       section, o->heads, P, D, HEAD_MAX, valid);
}

static const struct rat_options *options_of(const struct layer *layer) {
    return layer->options;
}

static struct rat_sizes sizes_of(const struct layer *layer) {
    return rat_sizes(layer->options, layer->context.d_model);
}

/* --- tensors ---------------------------------------------------------------------------------- */

enum { IN_PROJ, GATE_BIAS, OUT_PROJ }; /* in declare order */

/* As the authors draw them: all matrices alike, and gates whose memories reach back over 1 to chunk - 1 tokens. */
static void rat_declare(const struct layer *layer, struct params *p, const char *prefix) {
    struct rat_sizes s = sizes_of(layer);
    struct init matrix = {INIT_NORMAL, 0.02, 0, 0}, gates = {INIT_LOG_UNIFORM, 1, (double)s.Q - 1, 0};
    if (s.Q <= 2) gates = (struct init){INIT_CONSTANT, 0, 0, 0};
    params_add(p, 2, (int64_t[]){s.E, s.D}, matrix, true, false, "%sin_proj.weight", prefix);
    params_filled(p, 1);
    params_add(p, 1, &s.D, gates, false, true, "%sgate_bias", prefix);
    params_add(p, 2, (int64_t[]){s.D, s.D}, matrix, true, false, "%sout_proj.weight", prefix);
    params_filled(p, 1);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* Columns of the projection, or of its gradient, by heads. */
struct columns {
    tensor z, v, g, q, k;
};

static struct columns cut(const struct rat_sizes *s, tensor rows, int64_t B, int64_t T) {
    int64_t D = s->D, group = s->G * s->P;
    return (struct columns){.z = mixer_heads(rows, 0, s->H, s->P, B, T),
                            .v = mixer_heads(rows, D, s->H, s->P, B, T),
                            .g = mixer_heads(rows, 2 * D, s->H, s->P, B, T),
                            .q = mixer_heads(rows, 3 * D, s->G, s->P, B, T),
                            .k = mixer_heads(rows, 3 * D + group, s->G, s->P, B, T)};
}

/* What forward computes on the way; all of it is saved when a backward follows. */
struct views {
    tensor projected; /* (R, E) act */
    struct columns c; /* its columns */
    tensor y;         /* (R, D) act */
    void *rat;        /* what RAT saves; NULL without backward */
};

static struct rat_shape shape_of(const struct rat_sizes *s, int64_t B, int64_t T) {
    return (struct rat_shape){.B = B, .T = T, .H = s->H, .G = s->G, .P = s->P, .Q = s->Q, .C = s->C};
}

/* keep: of a forward, that a backward follows; and true in backward, which reads what RAT saves. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                                arena *saved, arena *scratch) {
    struct rat_sizes s = sizes_of(layer);
    struct views v = {.rat = NULL};
    arena *of_rat = mixer_repeats_scan(layer) ? scratch : saved;
    v.projected = mixer_take(saved, ops->act, B * T, s.E);
    v.c = cut(&s, v.projected, B, T);
    v.y = mixer_take(of_rat, ops->act, B * T, s.D);
    if (keep) v.rat = arena_take(of_rat, ops->rat_saved(shape_of(&s, B, T)));
    return v;
}

/* Positions of tokens, and memory for the operation at work: a step's, too, whatever the number of tokens. */
struct forward_work {
    tensor positions; /* (B, T) i32 */
    void *rat;
};

static struct forward_work carve_forward_work(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                              arena *scratch) {
    struct rat_sizes s = sizes_of(layer);
    struct rat_shape shape = shape_of(&s, B, T);
    struct forward_work work = {.positions = mixer_take(scratch, DTYPE_I32, B, T)};
    work.rat = arena_take(scratch, mixer_largest(ops->rat_forward_scratch(shape), ops->rat_step_scratch(shape)));
    return work;
}

/* Gradients on the way back. */
struct gradients {
    tensor dy;         /* (R, D) act */
    tensor dprojected; /* (R, E) act */
    struct columns c;  /* its columns */
    void *work;
};

static struct gradients carve_gradients(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                        arena *scratch) {
    struct rat_sizes s = sizes_of(layer);
    struct gradients d;
    d.dy = mixer_take(scratch, ops->act, B * T, s.D);
    d.dprojected = mixer_take(scratch, ops->act, B * T, s.E);
    d.c = cut(&s, d.dprojected, B, T);
    d.work = arena_take(scratch, ops->rat_backward_scratch(shape_of(&s, B, T)));
    return d;
}

static void rat_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep, arena *saved,
                      arena *scratch) {
    size_t mark = arena_mark(scratch);
    carve_views(layer, ops, B, T, keep, saved, scratch);
    carve_forward_work(layer, ops, B, T, scratch);
    if (keep) carve_gradients(layer, ops, B, T, scratch);
    arena_rewind(scratch, mark);
}

static int rat_layer_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                           tensor views[MIXER_STATES]) {
    struct rat_sizes s = sizes_of(layer);
    mixer_state_view(views, 0, memory, ops->act, 4, (int64_t[]){B, s.C, s.H, s.P});
    mixer_state_view(views, 1, memory, ops->act, 4, (int64_t[]){B, s.C, s.H, s.P});
    mixer_state_view(views, 2, memory, ops->real, 4, (int64_t[]){B, 2, s.H, s.P});
    mixer_state_view(views, 3, memory, DTYPE_I32, 1, &B);
    return 4;
}

static struct rat_state state_at(const struct mixer_call *call, const void *memory) {
    tensor views[MIXER_STATES];
    mixer_state_views(call, memory, views);
    return (struct rat_state){.k = views[0], .v = views[1], .running = views[2], .count = views[3]};
}

/* --- computation ------------------------------------------------------------------------------ */

static tensor find_positions(const struct mixer_call *call, tensor positions) {
    return mixer_find_positions(call, positions, state_at(call, call->initial).count);
}

static tensor by_head(const struct mixer_call *call, const struct views *v, tensor rows) {
    return mixer_heads(rows, 0, v->c.z.dim[2], v->c.z.dim[3], call->B, call->T);
}

static void mix(const struct mixer_call *call, const struct views *v, const struct forward_work *work, tensor positions,
                const void *final) {
    const struct rat_options *o = options_of(call->layer);
    call->dev->ops->rat_forward(call->dev, by_head(call, v, v->y), state_at(call, final), v->rat, v->c.z, v->c.v,
                                v->c.g, call->w[GATE_BIAS], v->c.q, v->c.k, positions, state_at(call, call->initial),
                                o->chunk, o->rope_base, work->rat);
}

static void rat_layer_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    size_t mark = arena_mark(call->scratch);
    bool keep = call->keep && !mixer_repeats_scan(call->layer);
    struct views v = carve_views(call->layer, ops, call->B, call->T, keep, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);
    ops->linear_forward(call->dev, v.projected, call->x, call->w[IN_PROJ], tensor_none());
    mix(call, &v, &work, find_positions(call, work.positions), call->final);
    ops->linear_forward(call->dev, call->y, v.y, call->w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

static void rat_layer_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct rat_options *o = options_of(call->layer);
    const tensor *w = call->w, *dw = call->dw, none = tensor_none();
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, call->T, true, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);
    struct gradients d = carve_gradients(call->layer, ops, call->B, call->T, call->scratch);
    tensor positions = find_positions(call, work.positions);
    if (mixer_repeats_scan(call->layer)) mix(call, &v, &work, positions, NULL);
    ops->linear_backward(call->dev, d.dy, false, dw[OUT_PROJ], none, call->dy, v.y, w[OUT_PROJ]);
    ops->rat_backward(call->dev, d.c.z, d.c.v, d.c.g, dw[GATE_BIAS], d.c.q, d.c.k, by_head(call, &v, d.dy), v.rat,
                      v.c.z, v.c.v, v.c.g, w[GATE_BIAS], v.c.q, v.c.k, positions, state_at(call, call->initial),
                      o->chunk, o->rope_base, d.work);
    mixer_first_linears_backward(call, &dw[IN_PROJ], d.dprojected, &w[IN_PROJ], 1);
    arena_rewind(call->scratch, mark);
}

static void rat_layer_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct rat_options *o = options_of(call->layer);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, 1, false, call->saved, call->scratch);
    struct forward_work work = carve_forward_work(call->layer, ops, call->B, 1, call->scratch);
    ops->linear_forward(call->dev, v.projected, call->x, call->w[IN_PROJ], tensor_none());
    ops->rat_step(call->dev, tensor_join_first(by_head(call, &v, v.y)), state_at(call, call->final),
                  tensor_join_first(v.c.z), tensor_join_first(v.c.v), tensor_join_first(v.c.g), call->w[GATE_BIAS],
                  tensor_join_first(v.c.q), tensor_join_first(v.c.k), o->chunk, o->rope_base, work.rat);
    ops->linear_forward(call->dev, call->y, v.y, call->w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* Projections, the recurrences, and a product with the key and value of each earlier chunk and with the own ones. */
static double rat_flops(const struct layer *layer, int64_t T) {
    struct rat_sizes s = sizes_of(layer);
    double D = (double)s.D, chunks = (double)T / (double)s.Q, seen = chunks > 1 ? (chunks - 1) / 2 : 0;
    return 2 * D * (double)(s.E + s.D) + 8 * D + 4 * D * (seen + 1);
}

static int64_t rat_context(const struct layer *layer) {
    return ((const struct rat_options *)layer->options)->context;
}

const struct mixer mixer_rat = {
    .name = "rat",
    .help = "RAT: a gated recurrence within chunks, attention over their ends (arXiv 2507.04416).",
    .options = rat_options_table,
    .options_size = sizeof(struct rat_options),
    .state_in_place = true,
    .check = rat_check,
    .declare = rat_declare,
    .carve = rat_carve,
    .forward = rat_layer_forward,
    .backward = rat_layer_backward,
    .step = rat_layer_step,
    .state = rat_layer_state,
    .context = rat_context,
    .forward_flops = rat_flops,
};
