/* bench_decode.c: generation through one layer: reading a sequence, then token by token. bench_layer.h describes it.
 * Owns nothing beyond a call.
 *
 * Rows of the operands are tokens: those of the sequence, then as many as a step of all sequences takes. The steps'
 * first inputs are the tokens behind the sequence, so that their outputs are known from one pass over all of it. */
#include "train/bench_layer.h"

#include <math.h>
#include <stdlib.h>

enum {
    CHECKED = 4, /* tokens behind the sequence whose outputs are compared */
    CALLS = 16,  /* steps in a row, where each is as many calls as it has operations */
};

#define SIZE(letter) bench_size(p, #letter[0])

/* A problem, and where it keeps states: of one sequence, and of all. */
struct decode {
    struct bench_problem p;
    struct bench_layer *l;
    void *one, *all;
    size_t saved_bytes;
    struct device_record *record;
};

static int64_t rows_of(const struct bench_layer *l) {
    return l->T + (l->B > CHECKED ? l->B : CHECKED);
}

static size_t measure_saved(const struct bench_layer *l, const struct ops *ops, arena *scratch) {
    arena whole = arena_measure("saved"), step = arena_measure("saved");
    l->layer->mixer->carve(l->layer, ops, 1, l->T + CHECKED, false, &whole, scratch);
    l->layer->mixer->carve(l->layer, ops, l->B, 1, false, &step, scratch);
    return whole.used > step.used ? whole.used : step.used;
}

static void decode_declare(struct bench_problem *p) {
    struct bench_layer *l = p->context;
    arena scratch = arena_measure("scratch");
    bench_input(p, "residual", "RD")->type = BENCH_REAL;
    bench_input(p, "branch", "RD");
    bench_layer_weights(p);
    bench_output(p, "stream", "RD")->type = BENCH_REAL;
    bench_output(p, "normed", "RD");
    if (l->mc->options.norm == MODEL_NORM_LAYER) bench_statistic(p, "mean", "R");
    bench_statistic(p, "rstd", "R");
    bench_output(p, "y", "RD");
    for (int i = 0; i < p->count; i++) p->operands[i].has_gradient = BENCH_NO_GRADIENT;
    p->reports = l->layer->mixer->solver != NULL;
    p->saved_bytes = measure_saved(l, p->ops, &scratch) + mixer_state_bytes(l->layer, p->ops, 1) +
                     mixer_state_bytes(l->layer, p->ops, l->B);
    p->scratch_bytes = scratch.peak;
}

static const struct bench_row decode_row = {
    .name = "decode", .declare = decode_declare, .given = bench_layer_given};

static struct bench_problem problem_of(struct bench_layer *l) {
    struct bench_problem p = {.row = &decode_row, .context = l, .dev = l->dev};
    p.size['R'] = rows_of(l);
    p.size['D'] = l->layer->context.d_model;
    return p;
}

int bench_decode_size(struct bench_layer *l, size_t *bytes, error *err) {
    struct bench_problem p = problem_of(l);
    return bench_problem_size(&p, bytes, err);
}

/* ---- work ------------------------------------------------------------------------------------------------------- */

/* `count` rows of an operand, from row `from` on. */
static tensor rows_at(struct bench_problem *p, const char *name, int64_t from, int64_t count) {
    tensor t = bench_value(p, name);
    if (!tensor_given(t)) return t;
    t.data = (char *)t.data + (size_t)(from * t.stride[0]) * dtype_size(t.dtype);
    t.dim[0] = count;
    return t;
}

/* Norm and mixer on the B T rows from `from` on: a pass that leaves the state in `final`, or a step that goes on from
 * it. */
static void run_rows(struct decode *d, int64_t from, int64_t B, int64_t T, void *final, bool step) {
    struct bench_problem *p = &d->p;
    tensor w[BENCH_OPERANDS];
    arena saved = {.name = "saved", .base = p->saved, .capacity = d->saved_bytes};
    arena scratch = {.name = "scratch", .base = p->scratch, .capacity = p->scratch_bytes};
    struct mixer_call call = bench_layer_call(p, B, T, w, NULL);
    call.x = rows_at(p, "normed", from, B * T);
    call.y = rows_at(p, "y", from, B * T);
    call.final = final;
    call.saved = &saved;
    call.scratch = &scratch;
    p->ops->add_norm_forward(p->dev, rows_at(p, "stream", from, B * T), call.x, rows_at(p, "mean", from, B * T),
                             rows_at(p, "rstd", from, B * T), rows_at(p, "residual", from, B * T),
                             tensor_none(), rows_at(p, "branch", from, B * T), w[0], call.layer->context.norm_eps);
    (step ? call.layer->mixer->step : call.layer->mixer->forward)(&call);
}

static void prefill(void *self) {
    struct decode *d = self;
    run_rows(d, 0, 1, d->l->T, d->one, false);
}

static void step_all(void *self) {
    struct decode *d = self;
    run_rows(d, d->l->T, d->l->B, 1, d->all, true);
}

static void step_recorded(void *self) {
    struct decode *d = self;
    device_run(d->p.dev, &d->record, step_all, d);
}

static void step_calls(void *self) {
    for (int i = 0; i < CALLS; i++) step_all(self);
}

/* Give every sequence the state of the one that was read. */
static void copy_states(struct decode *d) {
    tensor one[MIXER_STATES], all[MIXER_STATES];
    const struct layer *layer = d->l->layer;
    int count = layer->mixer->state(layer, d->p.ops, 1, d->one, one);
    layer->mixer->state(layer, d->p.ops, d->l->B, d->all, all);
    for (int v = 0; v < count; v++) {
        size_t bytes = (size_t)tensor_count(one[v]) * dtype_size(one[v].dtype);
        for (int64_t b = 0; b < d->l->B; b++)
            device_copy(d->p.dev, (char *)all[v].data + (size_t)b * bytes, one[v].data, bytes);
    }
}

/* ---- the check -------------------------------------------------------------------------------------------------- */

/* Outputs of the tokens behind the sequence, (CHECKED, D). */
static void read_outputs(struct decode *d, int64_t count, void *room, double *values) {
    tensor y = rows_at(&d->p, "y", d->l->T, count);
    device_read(d->p.dev, room, y.data, (size_t)tensor_count(y) * dtype_size(y.dtype));
    for (int64_t i = 0; i < tensor_count(y); i++) values[i] = bench_get_number(room, y.dtype, i);
}

static void compare(const struct decode *d, const double *got, const double *want, int64_t tokens,
                    struct bench_decoded *out) {
    static const double limits[] = {[PRECISION_F32] = 5e-4, [PRECISION_F64] = 1e-10, [PRECISION_BF16] = 5e-2};
    int64_t D = d->l->layer->context.d_model;
    for (int64_t t = 0; t < tokens; t++) {
        double sum = 0, apart = 0;
        for (int64_t i = t * D; i < (t + 1) * D; i++) {
            sum += want[i] * want[i];
            apart += (got[i] - want[i]) * (got[i] - want[i]);
        }
        double difference = sum > 0 ? sqrt(apart / sum) : apart > 0 ? HUGE_VAL : 0;
        if (!(difference <= out->difference)) out->difference = difference;
    }
    out->wrong |= !(out->difference <= limits[d->p.dev->precision]);
}

/* One pass over the sequence and the tokens behind it; the sequence, and then steps; the first step of all
 * sequences. */
static void check(struct decode *d, double *want, double *got, void *room, struct bench_decoded *out) {
    run_rows(d, 0, 1, d->l->T + CHECKED, NULL, false);
    read_outputs(d, CHECKED, room, want);
    prefill(d);
    for (int i = 0; i < CHECKED; i++) run_rows(d, d->l->T + i, 1, 1, d->one, true);
    read_outputs(d, CHECKED, room, got);
    compare(d, got, want, CHECKED, out);
    prefill(d);
    copy_states(d);
    step_all(d);
    read_outputs(d, 1, room, got);
    compare(d, got, want, 1, out);
}

static int run_check(struct decode *d, struct bench_decoded *out, error *err) {
    size_t count = (size_t)(CHECKED * d->l->layer->context.d_model);
    double *want = malloc(count * sizeof *want), *got = malloc(count * sizeof *got);
    void *room = malloc(count * sizeof(double));
    bool found = want && got && room;
    if (found) check(d, want, got, room, out);
    free(want);
    free(got);
    free(room);
    if (!found) return error_system(err, "no memory for results that are to be checked");
    return device_check(d->p.dev, err);
}

/* ---- times ------------------------------------------------------------------------------------------------------ */

static int run_times(struct decode *d, struct bench_decoded *out, error *err) {
    struct bench_stand s;
    int status = bench_stand_open(&s, d->p.dev, err);
    if (status == 0) status = bench_take_times(&s, prefill, d, &out->prefill, err);
    if (status == 0) {
        copy_states(d);
        status = bench_take_times(&s, step_recorded, d, &out->step, err);
    }
    if (status == 0) status = bench_take_times(&s, step_calls, d, &out->call, err);
    out->call.median /= CALLS;
    out->call.least /= CALLS;
    out->call.most /= CALLS;
    bench_stand_close(&s);
    return status;
}

int bench_layer_decode(struct bench_layer *l, struct bench_decoded *out, error *err) {
    struct decode d = {.p = problem_of(l), .l = l};
    arena scratch = arena_measure("scratch");
    *out = (struct bench_decoded){.state_bytes = mixer_state_bytes(l->layer, l->dev->ops, 1)};
    d.saved_bytes = measure_saved(l, l->dev->ops, &scratch);
    int status = bench_problem_open(&d.p, err);
    if (status == 0) {
        d.one = (char *)d.p.saved + d.saved_bytes;
        d.all = (char *)d.one + out->state_bytes;
        status = run_check(&d, out, err);
    }
    if (status == 0) status = run_times(&d, out, err);
    device_record_close(l->dev, d.record);
    bench_problem_close(&d.p);
    return status;
}
