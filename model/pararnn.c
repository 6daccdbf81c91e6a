/* pararnn.c: the ParaRNN layer (arXiv 2510.21450, appendix C.1): Mamba's frame around a nonlinear recurrence, ParaGRU,
 * ParaLSTM or any other cell of kernels/cells/. The mathematics is in docs/pararnn.md; the operations are
 * kernels/ops.h's.
 *
 *   [a | z] = in_proj(input);   c = silu(conv1d(a));   u = cell.in_proj(c), head by head
 *   per channel: s[t] = cell(s[t-1], u[t] + cell.bias; cell.weight),  y its output
 *   output = out_proj(norm(y * silu(z)))
 *
 * The cell's weights are kept within +-weight_limit after every step, without which no number of iterations is sure to
 * solve a long recurrence. How it is solved along time is the solver's matter, and no matter of the result beyond its
 * residual; backward solves a linear system, exactly, whatever forward did.
 *
 * Saved for backward: the projection, the convolution's output, u, the cell's states (y and the others), the norm's
 * statistics and its output; less what the layer's level of recomputation (mixer.h) has computed again: convolution, u
 * (which costs a product of 2 U D^2 / H FLOPs a token) and the norm's output, then the recurrence. State: the
 * convolution's last W-1 inputs and the cell's states. Reached through the mixer table (mixer.c); owns no memory.
 */
#include "model/pararnn.h"
#include "model/mixer_parts.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define NAME_OF(cell) #cell,
static const char *const cell_names[] = {CELLS(NAME_OF) NULL};
static const char *const gate_names[] = {"gate_first", "norm_first", NULL};
static const char *const init_names[] = {"paper", "code", NULL};
static const char *const solver_names[] = {"auto", "sequential", "newton", "shooting", NULL};

#define FIELD(name) offsetof(struct pararnn_options, name)
static const struct option pararnn_options_table[] = {
    {"cell", OPTION_CHOICE, FIELD(cell), NULL, 0, 0, "", "What recurs, channel by channel (docs/pararnn.md).",
     cell_names},
    {"heads", OPTION_INT, FIELD(heads), "4", 1, 4096, "",
     "Heads H of the projection into the cell, each of which reads d_model / H channels and feeds as many; must divide "
     "d_model.", NULL},
    {"d_conv", OPTION_INT, FIELD(d_conv), "4", 0, 8, "tokens",
     "Width of the causal convolution, the current token included; 0 = none.", NULL},
    {"conv_silu", OPTION_BOOL, FIELD(conv_silu), "true", 0, 0, "",
     "Whether the convolution is followed by a SiLU, as Mamba's is; the paper does not say.", NULL},
    {"gate_order", OPTION_CHOICE, FIELD(gate_order), "gate_first", 0, 0, "",
     "gate_first: norm(y silu(z)), as in Mamba-2; norm_first: norm(y) silu(z). The paper does not say.", gate_names},
    {"weight_limit", OPTION_FLOAT, FIELD(weight_limit), "0.5", 0, 1e6, "",
     "The cell's weights are kept within +-limit after every step, which keeps its iteration from expanding; 0 = not "
     "at all.", NULL},
    {"cell_init", OPTION_CHOICE, FIELD(cell_init), "paper", 0, 0, "",
     "Initial values of the cell. paper: as its language models were trained, Kaiming's for the projection, weights of "
     "deviation 1/sqrt(d_model), no biases; code: as the published code draws them by default.", init_names},
    {"solver", OPTION_CHOICE, FIELD(solver), "auto", 0, 0, "",
     "How the recurrence is solved along time. sequential: token after token; newton: all tokens at once, as the paper "
     "does; shooting: pieces of time at once; auto: what is known to be fastest for the batch on the device.",
     solver_names},
    {"iterations", OPTION_INT, FIELD(iterations), "3", 1, 64, "",
     "Corrections that newton and shooting make to what they begin with.", NULL},
    {"chunk", OPTION_INT, FIELD(chunk), "0", 0, 1 << 20, "tokens",
     "Length of shooting's pieces; 0 = as the device likes it.", NULL},
    {"bounded", OPTION_BOOL, FIELD(bounded), "true", 0, 0, "",
     "Whether newton and shooting keep corrected states within the bounds that a cell's states never leave; the "
     "published code does not.", NULL},
    OPTIONS_END,
};

struct pararnn_sizes pararnn_sizes(const struct pararnn_options *o, int64_t d_model) {
    const struct cell *cell = cells[o->cell];
    return (struct pararnn_sizes){.D = d_model,
                                  .H = o->heads,
                                  .W = o->d_conv,
                                  .U = cell->inputs,
                                  .S = cell->states,
                                  .V = cell->weights,
                                  .cell = cell};
}

static int pararnn_check(void *options, const struct layer_context *context, const char *section, error *err) {
    const struct pararnn_options *o = options;
    TRY(mixer_check_divides(section, "heads", o->heads, "d_model", context->d_model, err));
    if (o->d_conv == 1)
        return error_input(err, "%s.d_conv = 1 is no convolution; 0 leaves it out, and the narrowest is 2", section);
    return 0;
}

static const struct pararnn_options *options_of(const struct layer *layer) {
    return layer->options;
}

static struct pararnn_sizes sizes_of(const struct layer *layer) {
    return pararnn_sizes(layer->options, layer->context.d_model);
}

/* --- tensors ---------------------------------------------------------------------------------- */

/* In declare order; without a convolution its two are not there. */
enum { IN_PROJ, CELL_PROJ, CELL_BIAS, CELL_WEIGHT, NORM, OUT_PROJ, CONV_WEIGHT, CONV_BIAS };

/* What the published code's defaults say: Xavier's bound for the projection, whose outputs it counts as those of all
 * heads, except for its LSTM; Kaiming's deviation with a slope of 1/2 for weights, as though they were a full matrix; a
 * first gate that is biased by 0 to -1 along the channels. */
static void declare_cell_by_code(const struct pararnn_sizes *s, struct init *projection, struct init *weight,
                                 struct init *bias) {
    double N = (double)s->D, H = (double)s->H;
    double outputs = strcmp(s->cell->name, "lstm") == 0 ? N / H : N, bound = sqrt(6 / (N / H + outputs));
    *projection = (struct init){INIT_UNIFORM, -bound, bound, 0};
    *weight = (struct init){INIT_NORMAL, 2 / sqrt(5 * N), 0, 0};
    *bias = (struct init){INIT_FIRST_ROW, 0, -1, N};
}

static void declare_cell(const struct layer *layer, struct params *p, const char *prefix) {
    const struct pararnn_options *o = options_of(layer);
    struct pararnn_sizes s = sizes_of(layer);
    double N = (double)s.D, bound = sqrt(3 * (double)s.H / N);
    struct init projection = {INIT_UNIFORM, -bound, bound, 0}, weight = {INIT_TRUNCATED, 1 / sqrt(N), 0.9, 0};
    struct init bias = {INIT_CONSTANT, 0, 0, 0};
    if (o->cell_init == PARARNN_INIT_CODE) declare_cell_by_code(&s, &projection, &weight, &bias);
    params_add(p, 3, (int64_t[]){s.H, s.U * s.D / s.H, s.D / s.H}, projection, true, false, "%scell.in_proj.weight",
               prefix);
    params_add(p, 2, (int64_t[]){s.U, s.D}, bias, false, true, "%scell.bias", prefix);
    params_add(p, 2, (int64_t[]){s.V, s.D}, weight, false, true, "%scell.weight", prefix);
    params_clamp(p, o->weight_limit);
}

static void pararnn_declare(const struct layer *layer, struct params *p, const char *prefix) {
    struct pararnn_sizes s = sizes_of(layer);
    struct init in = mixer_uniform_init(s.D, 1), out = mixer_uniform_init(s.D, mixer_residual_scale(layer));
    mixer_declare_projection(layer, p, prefix, "in_proj.weight", 2 * s.D, s.D, false, in);
    params_filled(p, 1);
    declare_cell(layer, p, prefix);
    params_add(p, 1, &s.D, (struct init){INIT_CONSTANT, 1, 0, 0}, false, true, "%snorm.weight", prefix);
    mixer_declare_projection(layer, p, prefix, "out_proj.weight", s.D, s.D, true, out);
    params_filled(p, 1);
    if (s.W > 0) mixer_declare_conv(p, prefix, s.D, s.W);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* What forward computes on the way; all of it is saved when a backward follows. */
struct views {
    tensor az;     /* (R, 2D) act: in_proj's output */
    tensor a;      /* its columns (R, D) */
    tensor c;      /* (R, D) act: after the convolution; a where there is none */
    tensor u;      /* (R, UD) act: what enters the cell */
    tensor others; /* (B, T, S-1, D) act: the cell's other states; none where there are none, or no backward follows */
    struct mixer_gated out; /* of the cell's output y and of z, az's other columns */
};

static struct cell_shape shape_of(const struct pararnn_sizes *s, int64_t B, int64_t T) {
    return (struct cell_shape){.B = B, .T = T, .N = s->D, .cell = s->cell};
}

/* keep: of a forward, that a backward follows; and true in backward. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                                arena *saved, arena *scratch) {
    struct pararnn_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct views v = {.others = tensor_none(), .out = {.g = tensor_none(), .norm = NORM, .out_proj = OUT_PROJ}};
    v.out.norm_first = options_of(layer)->gate_order == PARARNN_NORM_FIRST;
    arena *light = mixer_repeats_light(layer) ? scratch : saved, *of_cell = mixer_repeats_scan(layer) ? scratch : saved;
    v.az = mixer_take(saved, ops->act, R, 2 * s.D);
    v.a = tensor_columns(v.az, 0, s.D);
    v.out.z = tensor_columns(v.az, s.D, s.D);
    v.c = s.W > 0 ? mixer_take(light, ops->act, R, s.D) : v.a;
    v.u = mixer_take(light, ops->act, R, s.U * s.D);
    v.out.y = mixer_take(of_cell, ops->act, R, s.D);
    v.out.rstd = mixer_take(saved, ops->real, R, 1);
    if (!mixer_repeats_light(layer)) v.out.g = mixer_take(saved, ops->act, R, s.D);
    if (!keep || s.S == 1) return v;
    tensor others = mixer_take(of_cell, ops->act, R, (s.S - 1) * s.D);
    v.others = tensor_split_first(tensor_split_last(others, s.S - 1, s.D), B, T);
    return v;
}

/* The recurrence's input, or its gradient, as the operation has it. */
static tensor by_cell(const struct pararnn_sizes *s, tensor u, int64_t B, int64_t T) {
    return tensor_5d(u.data, u.dtype, B, T, s->H, s->U, s->D / s->H);
}

/* By the config alone. */
static struct cell_solver pararnn_solver(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T) {
    static const enum cell_method methods[] = {CELL_SEQUENTIAL, CELL_SEQUENTIAL, CELL_NEWTON, CELL_SHOOTING};
    const struct pararnn_options *o = options_of(layer);
    struct pararnn_sizes s = sizes_of(layer);
    struct cell_solver solver = {.method = methods[o->solver], .iterations = (int)o->iterations, .chunk = o->chunk};
    if (o->solver == PARARNN_AUTO) solver = ops->cell_choose(shape_of(&s, B, T));
    solver.bounded = o->bounded;
    return solver;
}

static size_t cell_scratch(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T) {
    struct pararnn_sizes s = sizes_of(layer);
    return mixer_solver_scratch(layer, ops, shape_of(&s, B, T));
}

/* Gradients on the way back, and memory for the operation at work. */
struct gradients {
    tensor dg, dy;  /* (R, D) act */
    tensor du;      /* (R, UD) act */
    tensor dc;      /* (R, D) act */
    tensor daz, da, dz;
    void *work;
};

static struct gradients carve_gradients(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                        arena *scratch) {
    struct pararnn_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct gradients d;
    d.dg = mixer_take(scratch, ops->act, R, s.D);
    d.dy = mixer_take(scratch, ops->act, R, s.D);
    d.du = mixer_take(scratch, ops->act, R, s.U * s.D);
    d.daz = mixer_take(scratch, ops->act, R, 2 * s.D);
    d.da = tensor_columns(d.daz, 0, s.D);
    d.dz = tensor_columns(d.daz, s.D, s.D);
    d.dc = s.W > 0 ? d.dg : d.da; /* dg is no longer needed */
    size_t work = ops->gated_rmsnorm_backward_scratch(R, s.D);
    work = mixer_largest(work, ops->cell_backward_scratch(shape_of(&s, B, T)));
    work = mixer_largest(work, ops->block_linear_backward_scratch(R, s.H, s.U * s.D / s.H, s.D / s.H));
    if (s.W > 0) work = mixer_largest(work, ops->conv_backward_scratch(B, T, s.D, s.W));
    if (mixer_repeats_scan(layer)) work = mixer_largest(work, cell_scratch(layer, ops, B, T));
    d.work = arena_take(scratch, work);
    return d;
}

static void pararnn_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                          arena *saved, arena *scratch) {
    size_t mark = arena_mark(scratch);
    /* A step carves the same views for one token, so its saved memory and scratch are never more than these. */
    struct views v = carve_views(layer, ops, B, T, keep, saved, scratch);
    size_t behind = arena_mark(scratch);
    mixer_gated_carve(layer, ops, &v.out, scratch);
    arena_take(scratch, cell_scratch(layer, ops, B, T));
    arena_rewind(scratch, behind);
    if (keep) carve_gradients(layer, ops, B, T, scratch);
    arena_rewind(scratch, mark);
}

/* The cell's comes first, since a convolution may not be there. */
enum { STATE_CELL, STATE_CONV };

static int pararnn_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                         tensor views[MIXER_STATES]) {
    struct pararnn_sizes s = sizes_of(layer);
    mixer_state_view(views, STATE_CELL, memory, ops->real, 3, (int64_t[]){B, s.S, s.D});
    if (s.W == 0) return 1;
    mixer_state_view(views, STATE_CONV, memory, ops->real, 3, (int64_t[]){B, s.W - 1, s.D});
    return 2;
}

/* --- computation ------------------------------------------------------------------------------ */

/* From a to u. */
static void feed_cell(const struct mixer_call *call, const struct views *v, tensor initial, tensor final) {
    const struct pararnn_options *o = options_of(call->layer);
    if (o->d_conv > 0)
        mixer_conv_forward(call, mixer_by_token(call, v->c), final, mixer_by_token(call, v->a), CONV_WEIGHT, initial,
                           o->conv_silu);
    call->dev->ops->block_linear_forward(call->dev, v->u, v->c, call->w[CELL_PROJ]);
}

static void recur(const struct mixer_call *call, const struct views *v, struct cell_report *report, tensor initial,
                  tensor final, void *work) {
    const struct ops *ops = call->dev->ops;
    struct pararnn_sizes s = sizes_of(call->layer);
    struct cell_solver solver = mixer_solver(call->layer, ops, call->B, call->T, call->level);
    ops->cell_forward(call->dev, mixer_by_token(call, v->out.y), v->others, final, report,
                      by_cell(&s, v->u, call->B, call->T), call->w[CELL_BIAS], call->w[CELL_WEIGHT], initial, call->doc,
                      s.cell, solver, work);
}

static void pararnn_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w;
    tensor initial[MIXER_STATES], final[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    mixer_state_views(call, call->final, final);
    size_t mark = arena_mark(call->scratch);
    bool keep = call->keep && !mixer_repeats_scan(call->layer);
    struct views v = carve_views(call->layer, ops, call->B, call->T, keep, call->saved, call->scratch);
    mixer_gated_carve(call->layer, ops, &v.out, call->scratch);
    void *work = arena_take(call->scratch, cell_scratch(call->layer, ops, call->B, call->T));

    ops->linear_forward(call->dev, v.az, call->x, w[IN_PROJ], tensor_none());
    feed_cell(call, &v, initial[STATE_CONV], final[STATE_CONV]);
    recur(call, &v, call->report, initial[STATE_CELL], final[STATE_CELL], work);
    mixer_gated_norm(call, &v.out);
    ops->linear_forward(call->dev, call->y, v.out.g, w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* What forward left to be computed again. */
static void restore(const struct mixer_call *call, const struct views *v, const tensor *initial, void *work) {
    if (!mixer_repeats_light(call->layer)) return;
    feed_cell(call, v, initial[STATE_CONV], tensor_none());
    if (mixer_repeats_scan(call->layer)) recur(call, v, NULL, initial[STATE_CELL], tensor_none(), work);
}

static void pararnn_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct pararnn_options *o = options_of(call->layer);
    struct pararnn_sizes s = sizes_of(call->layer);
    const tensor *w = call->w, *dw = call->dw;
    tensor initial[MIXER_STATES], none = tensor_none();
    mixer_state_views(call, call->initial, initial);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, call->T, true, call->saved, call->scratch);
    struct gradients d = carve_gradients(call->layer, ops, call->B, call->T, call->scratch);

    restore(call, &v, initial, d.work);
    mixer_gated_backward(call, &v.out, d.dy, d.dz, d.dg, d.work);
    ops->cell_backward(call->dev, by_cell(&s, d.du, call->B, call->T), dw[CELL_BIAS], dw[CELL_WEIGHT], none,
                       mixer_by_token(call, d.dy), none, mixer_by_token(call, v.out.y), v.others,
                       by_cell(&s, v.u, call->B, call->T), w[CELL_BIAS], w[CELL_WEIGHT], initial[STATE_CELL], call->doc,
                       s.cell, d.work);
    ops->block_linear_backward(call->dev, d.dc, false, dw[CELL_PROJ], d.du, v.c, w[CELL_PROJ], d.work);
    if (s.W > 0)
        mixer_conv_backward(call, mixer_by_token(call, d.da), mixer_by_token(call, d.dc), mixer_by_token(call, v.a),
                            CONV_WEIGHT, initial[STATE_CONV], o->conv_silu, d.work);
    mixer_first_linears_backward(call, &dw[IN_PROJ], d.daz, &w[IN_PROJ], 1);
    arena_rewind(call->scratch, mark);
}

static void pararnn_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct pararnn_options *o = options_of(call->layer);
    struct pararnn_sizes s = sizes_of(call->layer);
    const tensor *w = call->w;
    tensor state[MIXER_STATES];
    mixer_state_views(call, call->final, state);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, 1, false, call->saved, call->scratch);
    mixer_gated_carve(call->layer, ops, &v.out, call->scratch);

    ops->linear_forward(call->dev, v.az, call->x, w[IN_PROJ], tensor_none());
    if (s.W > 0)
        mixer_conv_step(call, v.c, state[STATE_CONV], v.a, CONV_WEIGHT, o->conv_silu);
    ops->block_linear_forward(call->dev, v.u, v.c, w[CELL_PROJ]);
    ops->cell_step(call->dev, v.out.y, state[STATE_CELL], tensor_join_first(by_cell(&s, v.u, call->B, 1)), w[CELL_BIAS],
                   w[CELL_WEIGHT], s.cell);
    mixer_gated_norm(call, &v.out);
    ops->linear_forward(call->dev, call->y, v.out.g, w[OUT_PROJ], tensor_none());
    arena_rewind(call->scratch, mark);
}

/* Projections, convolution, and the cell once: a multiply-add for each of its weights and inputs, as many again for its
 * nonlinear functions. */
static double pararnn_flops(const struct layer *layer, int64_t T) {
    (void)T;
    struct pararnn_sizes s = sizes_of(layer);
    double D = (double)s.D, projections = 2 * D * (3 * D + (double)s.U * D / (double)s.H);
    return projections + 2 * (double)s.W * D + 4 * (double)(s.U + s.V) * D;
}

const struct mixer mixer_pararnn = {
    .name = "pararnn",
    .help = "ParaRNN: a nonlinear GRU or LSTM, or any such cell, solved in parallel over time (arXiv 2510.21450).",
    .options = pararnn_options_table,
    .options_size = sizeof(struct pararnn_options),
    .check = pararnn_check,
    .declare = pararnn_declare,
    .carve = pararnn_carve,
    .forward = pararnn_forward,
    .backward = pararnn_backward,
    .step = pararnn_step,
    .state = pararnn_state,
    .solver = pararnn_solver,
    .forward_flops = pararnn_flops,
};
