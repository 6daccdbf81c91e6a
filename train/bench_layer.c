/* bench_layer.c: a layer of a model as a row of bench_ops.h: the norm before it and its mixer, forward and backward.
 * bench_layer.h describes it. Owns nothing beyond a call. */
#include "train/bench_layer.h"

#include <string.h>

#define SIZE(letter) bench_size(p, #letter[0])
#define VALUE(name) bench_value(p, name)
#define GRADIENT(name) bench_gradient(p, name)

/* ---- weights ---------------------------------------------------------------------------------------------------- */

enum { OWN_LETTERS = 31, SEED = 1 }; /* letters 1 to 31 are sizes of weights */

static struct bench_layer *layer_of(const struct bench_problem *p) {
    return p->context;
}

/* The letter of a size: the one that has it, or a new one. */
static char letter_of(struct bench_problem *p, int64_t size) {
    int letter = 1;
    while (letter < OWN_LETTERS && p->size[letter] && p->size[letter] != size) letter++;
    ASSERT(!p->size[letter] || p->size[letter] == size);
    p->size[letter] = size;
    return (char)letter;
}

/* The part of a tensor's name that says which of the layer's it is. */
static const char *short_name(const struct layer *layer, const struct param *t) {
    static const char *const owners[] = {"mixer.", "mlp."};
    for (int i = 0; layer->params > 0 && i < 2; i++) {
        const char *at = strstr(t->name, owners[i]);
        if (at) return at + strlen(owners[i]);
    }
    return t->name;
}

static void add_weight(struct bench_problem *p, int index) {
    struct bench_layer *l = layer_of(p);
    const struct param *t = &l->mc->params.list[index];
    char *letters = l->letters[p->count];
    for (int i = 0; i < t->ndim; i++) letters[i] = letter_of(p, t->dim[i]);
    letters[t->ndim] = 0;
    struct bench_operand *o = bench_parameter(p, short_name(l->layer, t), letters);
    o->type = t->keep_real ? BENCH_REAL : BENCH_ACT;
    o->fill = BENCH_GIVEN;
    o->index = index;
}

void bench_layer_weights(struct bench_problem *p) {
    const struct layer *layer = layer_of(p)->layer;
    add_weight(p, layer->norm);
    for (int i = 0; i < layer->params; i++) add_weight(p, layer->first + i);
}

void bench_layer_given(const struct bench_problem *p, const struct bench_operand *o, int64_t from, int64_t count,
                       double *values) {
    params_initial_part(&layer_of(p)->mc->params, o->index, SEED, from, count, values, DTYPE_F64);
}

/* The norm's weight comes first, then the mixer's tensors, in the order of declaration. */
struct mixer_call bench_layer_call(struct bench_problem *p, int64_t B, int64_t T, tensor *w, tensor *dw) {
    struct bench_layer *l = layer_of(p);
    int found = 0;
    for (int i = 0; i < p->count; i++) {
        const struct bench_operand *o = &p->operands[i];
        if (o->fill != BENCH_GIVEN) continue;
        w[found] = o->value;
        if (dw) {
            dw[found] = o->gradient;
            dw[found].empty = l->mc->params.list[o->index].filled; /* as in the first micro-batch of a step */
        }
        found++;
    }
    return (struct mixer_call){.dev = p->dev,
                               .layer = l->layer,
                               .B = B,
                               .T = T,
                               .doc = tensor_none(),
                               .level = p->reference ? SOLVER_SEQUENTIAL : SOLVER_CHOSEN,
                               .report = p->reports ? p->constant : NULL,
                               .w = w + 1,
                               .dw = dw ? dw + 1 : NULL};
}

/* ---- training --------------------------------------------------------------------------------------------------- */

static int64_t rows(const struct bench_problem *p) {
    return SIZE(B) * SIZE(T);
}

static tensor matrix(const struct bench_problem *p, tensor t) {
    return tensor_reshape(t, 2, (int64_t[]){rows(p), SIZE(D)});
}

static tensor flat(const struct bench_problem *p, tensor t) {
    return tensor_given(t) ? tensor_1d(t.data, t.dtype, rows(p)) : t;
}

/* The gradient at the norm's output lies before what the mixer and the norm work with. */
static tensor take_dnormed(const struct bench_problem *p, arena *scratch) {
    size_t bytes = (size_t)(rows(p) * SIZE(D)) * dtype_size(p->ops->act);
    return tensor_2d(arena_take(scratch, bytes), p->ops->act, rows(p), SIZE(D));
}

static void layer_declare(struct bench_problem *p) {
    const struct layer *layer = layer_of(p)->layer;
    arena saved = arena_measure("saved"), scratch = arena_measure("scratch");
    struct bench_operand *residual = bench_input(p, "residual", "BTD");
    residual->type = residual->gradient_type = BENCH_REAL;
    bench_input(p, "branch", "BTD");
    bench_layer_weights(p);
    struct bench_operand *stream = bench_output(p, "stream", "BTD");
    stream->type = stream->gradient_type = BENCH_REAL;
    bench_output(p, "normed", "BTD")->has_gradient = BENCH_NO_GRADIENT;
    if (layer_of(p)->mc->options.norm == MODEL_NORM_LAYER) bench_statistic(p, "mean", "BT");
    bench_statistic(p, "rstd", "BT");
    bench_output(p, "y", "BTD");
    take_dnormed(p, &scratch);
    arena_take(&scratch, p->ops->add_norm_backward_scratch(rows(p), SIZE(D)));
    layer->mixer->carve(layer, p->ops, SIZE(B), SIZE(T), true, &saved, &scratch);
    p->saved_bytes = saved.used;
    p->reports = layer->mixer->solver != NULL;
    if (p->reports) p->solver = mixer_solver(layer, p->ops, SIZE(B), SIZE(T), SOLVER_CHOSEN);
    p->scratch_bytes = scratch.peak;
}

static arena region(const char *name, void *memory, size_t bytes) {
    return (arena){.name = name, .base = memory, .capacity = bytes};
}

static void layer_forward(struct bench_problem *p) {
    tensor w[BENCH_OPERANDS];
    arena saved = region("saved", p->saved, p->saved_bytes), scratch = region("scratch", p->scratch, p->scratch_bytes);
    struct mixer_call call = bench_layer_call(p, SIZE(B), SIZE(T), w, NULL);
    p->ops->add_norm_forward(p->dev, matrix(p, VALUE("stream")), matrix(p, VALUE("normed")), flat(p, VALUE("mean")),
                             flat(p, VALUE("rstd")), matrix(p, VALUE("residual")), tensor_none(),
                             matrix(p, VALUE("branch")), w[0], call.layer->context.norm_eps);
    call.keep = true;
    call.x = matrix(p, VALUE("normed"));
    call.y = matrix(p, VALUE("y"));
    call.saved = &saved;
    call.scratch = &scratch;
    call.layer->mixer->forward(&call);
}

/* What arrives on the stream from above is added to what comes through the layer. */
static void layer_backward(struct bench_problem *p) {
    tensor w[BENCH_OPERANDS], dw[BENCH_OPERANDS];
    arena saved = region("saved", p->saved, p->saved_bytes), scratch = region("scratch", p->scratch, p->scratch_bytes);
    struct mixer_call call = bench_layer_call(p, SIZE(B), SIZE(T), w, dw);
    call.keep = true;
    call.x = matrix(p, VALUE("normed"));
    call.y = matrix(p, VALUE("y"));
    call.dy = matrix(p, GRADIENT("y"));
    call.dx = take_dnormed(p, &scratch);
    void *work = arena_take(&scratch, p->ops->add_norm_backward_scratch(rows(p), SIZE(D)));
    call.saved = &saved;
    call.scratch = &scratch;
    call.layer->mixer->backward(&call);
    p->ops->add_norm_backward(p->dev, matrix(p, GRADIENT("residual")), matrix(p, GRADIENT("branch")), dw[0],
                              tensor_none(), call.dx, matrix(p, GRADIENT("stream")), matrix(p, VALUE("stream")),
                              flat(p, VALUE("mean")), flat(p, VALUE("rstd")), w[0], tensor_none(), work);
    device_join(p->dev);
}

static void layer_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    const struct layer *layer = layer_of(p)->layer;
    forward->products = (double)rows(p) * layer->mixer->forward_flops(layer, SIZE(T));
    both->products = 3 * forward->products;
}

static const struct bench_row layer_row = {.name = "layer",
                                           .slice = "B=1 T=64",
                                           .declare = layer_declare,
                                           .forward = layer_forward,
                                           .backward = layer_backward,
                                           .work = layer_work,
                                           .given = bench_layer_given,
                                           .tolerance = 2.5}; /* several operations, each of which rounds */

static struct bench_problem problem_of(struct bench_layer *l) {
    struct bench_problem p = {.row = &layer_row, .context = l, .dev = l->dev};
    p.size['B'] = l->B;
    p.size['T'] = l->T;
    p.size['D'] = l->layer->context.d_model;
    return p;
}

int bench_layer_size(struct bench_layer *l, size_t *bytes, error *err) {
    struct bench_problem p = problem_of(l);
    return bench_problem_size(&p, bytes, err);
}

int bench_layer_train(struct bench_layer *l, struct bench_measured *m, error *err) {
    struct bench_problem p = problem_of(l);
    *m = (struct bench_measured){0};
    return bench_problem_measure(&p, true, l->oracle, m, err);
}

double bench_layer_saved(const struct bench_layer *l) {
    arena saved = arena_measure("saved"), scratch = arena_measure("scratch");
    l->layer->mixer->carve(l->layer, l->dev->ops, l->B, l->T, true, &saved, &scratch);
    return (double)saved.used / ((double)l->B * (double)l->T);
}
