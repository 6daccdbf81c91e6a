/* slstm.c: the sLSTM layer of the xLSTM paper (arXiv 2405.04517, figure 10): short convolution, four gates by
 * block-diagonal matrices, the sLSTM, a norm for every head. Its block goes on with a gated MLP (mlp = geglu). The
 * mathematics is in docs/xlstm.md; the operations are kernels/ops.h's.
 *
 *   u = silu(conv1d(input));   x_i = igate(u);  x_f = fgate(u);  x_z = zgate(input);  x_o = ogate(input)
 *   y = sLSTM(x_i, x_f, x_z, x_o; recurrent_kernel, bias);   output = norm(y)
 *
 * With d_conv = 0 there is no convolution, and u is the input. There is no projection out: what the heads put out is
 * added to the residual stream as it is.
 *
 * Saved for backward: u, the gates' inputs, what the sLSTM saves and puts out, the norm's statistics; less what the
 * layer's level of recomputation (mixer.h) has computed again: u, then what the sLSTM saves and puts out. State: the
 * convolution's last W-1 inputs, and the sLSTM's y, c, n, m. Reached through the mixer table (mixer.c); owns no memory.
 */
#include "model/slstm.h"
#include "model/mixer_parts.h"

#include <math.h>
#include <stddef.h>

static const char *const recurrent_init_names[] = {"zeros", "uniform", NULL};

#define FIELD(name) offsetof(struct slstm_options, name)
static const struct option slstm_options_table[] = {
    {"heads", OPTION_INT, FIELD(heads), "4", 1, 1024, "",
     "Number of heads H; must divide d_model. A head's units see each other, and none of another head.", NULL},
    {"d_conv", OPTION_INT, FIELD(d_conv), "4", 0, 8, "tokens",
     "Width of the causal convolution before the input and the forget gate, the current token included; 0 = none.",
     NULL},
    {"recurrent_init", OPTION_CHOICE, FIELD(recurrent_init), "zeros", 0, 0, "",
     "Initial recurrent weights: zeros, as in the published models, or uniform within 1/sqrt(d_model / heads).",
     recurrent_init_names},
    {"clip", OPTION_FLOAT, FIELD(clip), "0", 0, 1e6, "",
     "The gradient that goes back in time through the recurrent weights is kept within +-clip, element by element; "
     "0 = as it is.", NULL},
    OPTIONS_END,
};

struct slstm_sizes slstm_sizes(const struct slstm_options *o, int64_t d_model) {
    return (struct slstm_sizes){.D = d_model, .H = o->heads, .P = d_model / o->heads, .W = o->d_conv};
}

static int slstm_check(void *options, const struct layer_context *context, const char *section, error *err) {
    const struct slstm_options *o = options;
    TRY(mixer_check_divides(section, "heads", o->heads, "d_model", context->d_model, err));
    if (o->d_conv == 1)
        return error_input(err, "%s.d_conv = 1 is no convolution; 0 leaves it out, and the narrowest is 2", section);
    return 0;
}

static struct slstm_sizes sizes_of(const struct layer *layer) {
    return slstm_sizes(layer->options, layer->context.d_model);
}

/* --- tensors ---------------------------------------------------------------------------------- */

/* In declare order; without a convolution its two are not there. */
enum { I_WEIGHT, F_WEIGHT, Z_WEIGHT, O_WEIGHT, RECURRENT, BIAS, NORM, CONV_WEIGHT, CONV_BIAS };

/* The forget gate's bias falls from 5 to -7 within each head, the deeper the block the later in it. */
static struct init bias_init(const struct layer *layer, const struct slstm_sizes *s) {
    int64_t last = layer->context.blocks - 1;
    double depth = last > 0 ? (double)layer->block / (double)last : 0;
    return (struct init){INIT_SLSTM_BIAS, 0.3 + 1.3 * depth, (double)s->D, (double)s->P};
}

static struct init recurrent_init(const struct layer *layer, const struct slstm_sizes *s) {
    const struct slstm_options *o = layer->options;
    double bound = 1 / sqrt((double)s->P);
    if (o->recurrent_init == SLSTM_RECURRENT_ZEROS) return (struct init){INIT_CONSTANT, 0, 0, 0};
    return (struct init){INIT_UNIFORM, -bound, bound, 0};
}

static void slstm_declare(const struct layer *layer, struct params *p, const char *prefix) {
    static const char gates[] = "ifzo";
    struct slstm_sizes s = sizes_of(layer);
    for (int g = 0; g < 4; g++)
        params_add(p, 3, (int64_t[]){s.H, s.P, s.P}, mixer_small_init(s.D), true, false, "%s%cgate.weight", prefix,
                   gates[g]);
    params_add(p, 3, (int64_t[]){s.H, 4 * s.P, s.P}, recurrent_init(layer, &s), false, false, "%srecurrent_kernel",
               prefix);
    params_add(p, 2, (int64_t[]){4, s.D}, bias_init(layer, &s), false, true, "%sbias", prefix);
    params_add(p, 1, &s.D, (struct init){INIT_CONSTANT, 1, 0, 0}, false, true, "%sgroup_norm.weight", prefix);
    if (s.W > 0) mixer_declare_conv(p, prefix, s.D, s.W);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* What forward computes on the way; all of it is saved when a backward follows. */
struct views {
    tensor u;          /* (R, D) act: after the convolution; the input itself where there is none */
    tensor x;          /* (R, 4D) act: what enters the gates i, f, z, o */
    tensor y;          /* (R, D) act: the sLSTM's output */
    tensor mean, rstd; /* (R, H) real */
    void *slstm;       /* what the sLSTM saves; NULL without backward */
};

static struct slstm_shape shape_of(const struct slstm_sizes *s, int64_t B, int64_t T) {
    return (struct slstm_shape){.B = B, .T = T, .H = s->H, .P = s->P};
}

/* keep: of a forward, that a backward follows; and true in backward, which reads what the sLSTM saves. */
static struct views carve_views(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                                arena *saved, arena *scratch) {
    struct slstm_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct views v = {.u = tensor_none(), .slstm = NULL};
    arena *light = mixer_repeats_light(layer) ? scratch : saved;
    arena *of_slstm = mixer_repeats_scan(layer) ? scratch : saved;
    if (s.W > 0) v.u = mixer_take(light, ops->act, R, s.D);
    v.x = mixer_take(saved, ops->act, R, 4 * s.D);
    v.y = mixer_take(of_slstm, ops->act, R, s.D);
    v.mean = mixer_take(saved, ops->real, R, s.H);
    v.rstd = mixer_take(saved, ops->real, R, s.H);
    if (keep) v.slstm = arena_take(of_slstm, ops->slstm_saved(shape_of(&s, B, T)));
    return v;
}

/* Gradients on the way back, and memory for the operation at work. */
struct gradients {
    tensor du, dy; /* (R, D) act */
    tensor dx;     /* (R, 4D) act */
    void *work;
};

static struct gradients carve_gradients(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                        arena *scratch) {
    struct slstm_sizes s = sizes_of(layer);
    int64_t R = B * T;
    struct gradients d;
    d.dy = mixer_take(scratch, ops->act, R, s.D);
    d.du = d.dy; /* the sLSTM has read dy before the gates write there */
    d.dx = mixer_take(scratch, ops->act, R, 4 * s.D);
    size_t work = ops->head_norm_backward_scratch(R, s.D, s.H);
    work = mixer_largest(work, ops->slstm_backward_scratch(shape_of(&s, B, T)));
    work = mixer_largest(work, ops->block_linear_backward_scratch(R, s.H, s.P, s.P));
    if (s.W > 0) work = mixer_largest(work, ops->conv_backward_scratch(B, T, s.D, s.W));
    if (mixer_repeats_scan(layer)) work = mixer_largest(work, ops->slstm_forward_scratch(shape_of(&s, B, T)));
    d.work = arena_take(scratch, work);
    return d;
}

static void *carve_forward_work(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                arena *scratch) {
    struct slstm_sizes s = sizes_of(layer);
    return arena_take(scratch, ops->slstm_forward_scratch(shape_of(&s, B, T)));
}

static void slstm_carve(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep, arena *saved,
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

enum { STATE_SLSTM, STATE_CONV };

static int slstm_state(const struct layer *layer, const struct ops *ops, int64_t B, void *memory,
                       tensor views[MIXER_STATES]) {
    struct slstm_sizes s = sizes_of(layer);
    mixer_state_view(views, STATE_SLSTM, memory, ops->real, 3, (int64_t[]){B, 4, s.D});
    if (s.W == 0) return 1;
    mixer_state_view(views, STATE_CONV, memory, ops->real, 3, (int64_t[]){B, s.W - 1, s.D});
    return 2;
}

/* --- computation ------------------------------------------------------------------------------ */

static bool convolves(const struct mixer_call *call) {
    return ((const struct slstm_options *)call->layer->options)->d_conv > 0;
}

static void convolve(const struct mixer_call *call, const struct views *v, tensor initial, tensor final) {
    mixer_conv_forward(call, mixer_by_token(call, v->u), final, mixer_by_token(call, call->x), CONV_WEIGHT, initial,
                       true);
}

/* What gate g reads. */
static tensor gate_input(const struct mixer_call *call, const struct views *v, int g) {
    return g <= F_WEIGHT && convolves(call) ? v->u : call->x;
}

static tensor gate_columns(tensor x, int g) {
    int64_t D = x.dim[1] / 4;
    return tensor_columns(x, g * D, D);
}

static void make_gates(const struct mixer_call *call, const struct views *v) {
    for (int g = I_WEIGHT; g <= O_WEIGHT; g++)
        call->dev->ops->block_linear_forward(call->dev, gate_columns(v->x, g), gate_input(call, v, g), call->w[g]);
}

static void recur(const struct mixer_call *call, const struct views *v, tensor initial, tensor final, void *work) {
    const tensor *w = call->w;
    call->dev->ops->slstm_forward(call->dev, mixer_by_token(call, v->y), final, v->slstm, mixer_by_token(call, v->x),
                                  w[RECURRENT], w[BIAS], initial, call->doc, work);
}

static void normalise(const struct mixer_call *call, const struct views *v) {
    call->dev->ops->head_norm_forward(call->dev, call->y, v->mean, v->rstd, v->y, call->w[NORM], tensor_none(),
                                      tensor_none(), tensor_none(), ACTIVATION_SILU, call->layer->context.norm_eps);
}

static void slstm_forward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    tensor initial[MIXER_STATES], final[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    mixer_state_views(call, call->final, final);
    size_t mark = arena_mark(call->scratch);
    bool keep = call->keep && !mixer_repeats_scan(call->layer);
    struct views v = carve_views(call->layer, ops, call->B, call->T, keep, call->saved, call->scratch);
    void *work = carve_forward_work(call->layer, ops, call->B, call->T, call->scratch);

    if (convolves(call)) convolve(call, &v, initial[STATE_CONV], final[STATE_CONV]);
    make_gates(call, &v);
    recur(call, &v, initial[STATE_SLSTM], final[STATE_SLSTM], work);
    normalise(call, &v);
    arena_rewind(call->scratch, mark);
}

/* From the gates' inputs to their weights and to the layer's input. Gates i and f go through the convolution, if there
 * is one, whose gradient overwrites; the others are then added to it. */
static void gates_backward(const struct mixer_call *call, const struct views *v, const struct gradients *d,
                           tensor initial) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w, *dw = call->dw;
    bool through = convolves(call);
    for (int g = I_WEIGHT; g <= O_WEIGHT; g++) {
        bool first = g == I_WEIGHT, inner = through && g <= F_WEIGHT;
        ops->block_linear_backward(call->dev, inner ? d->du : call->dx, !first, dw[g], gate_columns(d->dx, g),
                                   gate_input(call, v, g), w[g], d->work);
        if (through && g == F_WEIGHT)
            mixer_conv_backward(call, mixer_by_token(call, call->dx), mixer_by_token(call, d->du),
                                mixer_by_token(call, call->x), CONV_WEIGHT, initial, true, d->work);
    }
}

static void slstm_backward(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const struct slstm_options *o = call->layer->options;
    const tensor *w = call->w, *dw = call->dw;
    tensor initial[MIXER_STATES];
    mixer_state_views(call, call->initial, initial);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, call->T, true, call->saved, call->scratch);
    struct gradients d = carve_gradients(call->layer, ops, call->B, call->T, call->scratch);

    if (convolves(call) && mixer_repeats_light(call->layer))
        convolve(call, &v, initial[STATE_CONV], tensor_none());
    if (mixer_repeats_scan(call->layer)) recur(call, &v, initial[STATE_SLSTM], tensor_none(), d.work);
    ops->head_norm_backward(call->dev, d.dy, tensor_none(), tensor_none(), dw[NORM], tensor_none(), call->dy, v.y,
                            v.mean, v.rstd, w[NORM], tensor_none(), tensor_none(), tensor_none(), ACTIVATION_SILU,
                            d.work);
    ops->slstm_backward(call->dev, mixer_by_token(call, d.dx), dw[RECURRENT], dw[BIAS], tensor_none(),
                        mixer_by_token(call, d.dy), tensor_none(), v.slstm, mixer_by_token(call, v.y),
                        mixer_by_token(call, v.x), w[RECURRENT], w[BIAS], initial[STATE_SLSTM], call->doc, o->clip,
                        d.work);
    gates_backward(call, &v, &d, initial[STATE_CONV]);
    arena_rewind(call->scratch, mark);
}

static void slstm_step(const struct mixer_call *call) {
    const struct ops *ops = call->dev->ops;
    const tensor *w = call->w;
    tensor state[MIXER_STATES];
    mixer_state_views(call, call->final, state);
    size_t mark = arena_mark(call->scratch);
    struct views v = carve_views(call->layer, ops, call->B, 1, false, call->saved, call->scratch);
    void *work = carve_forward_work(call->layer, ops, call->B, 1, call->scratch);

    if (convolves(call)) mixer_conv_step(call, v.u, state[STATE_CONV], call->x, CONV_WEIGHT, true);
    make_gates(call, &v);
    ops->slstm_step(call->dev, v.y, state[STATE_SLSTM], v.x, w[RECURRENT], w[BIAS], work);
    normalise(call, &v);
    arena_rewind(call->scratch, mark);
}

/* The gates' matrices and the recurrent ones are of the same size; what is left is elementwise. */
static double slstm_flops(const struct layer *layer, int64_t T) {
    (void)T;
    struct slstm_sizes s = sizes_of(layer);
    double D = (double)s.D;
    return 2 * 8 * D * (double)s.P + 2 * (double)s.W * D;
}

const struct mixer mixer_slstm = {
    .name = "slstm",
    .help = "sLSTM: scalar memories with exponential gates that see each other's last outputs (arXiv 2405.04517).",
    .options = slstm_options_table,
    .options_size = sizeof(struct slstm_options),
    .check = slstm_check,
    .declare = slstm_declare,
    .carve = slstm_carve,
    .forward = slstm_forward,
    .backward = slstm_backward,
    .step = slstm_step,
    .state = slstm_state,
    .forward_flops = slstm_flops,
};
