/* step.c: a training step on the device, as step.h describes. Owns the recorded work and the pinned memory that reports
 * come back to. */
#include "train/step.h"

#include <stdlib.h>

enum { UNDER_WAY = 2 }; /* steps queued and not waited for, at most */

struct step {
    struct model *model;
    struct optimizer *optimizer;
    struct comm *comm;
    struct device *dev;
    double scale, z_loss, residual_max;

    bool first, last; /* of the micro-batch at work */
    struct device_record *records[2][2]; /* by first and last */
    arena memory;
    struct step_report *reports; /* UNDER_WAY of them, in memory that the device writes to */
    struct cell_report *worst;   /* likewise, one a layer with a solver; or NULL */
    int solvers;
    uint64_t marks[UNDER_WAY];
    int64_t begun, ended; /* steps queued, and waited for */
};

static void await_bucket(void *self, int bucket) {
    struct step *s = self;
    optimizer_await(s->optimizer, bucket);
}

static void carve(struct step *s, arena *a) {
    s->reports = arena_take(a, UNDER_WAY * sizeof *s->reports);
    if (s->solvers > 0) s->worst = arena_take(a, UNDER_WAY * (size_t)s->solvers * sizeof *s->worst);
}

static void forget_records(struct step *s) {
    for (int i = 0; i < 4; i++) {
        device_record_close(s->dev, s->records[i / 2][i % 2]);
        s->records[i / 2][i % 2] = NULL;
    }
}

int step_open(struct step **out, struct model *m, struct optimizer *o, struct comm *comm, double scale, double z_loss,
              double residual_max, error *err) {
    *out = NULL;
    struct step *s = calloc(1, sizeof *s);
    if (!s) return error_system(err, "no memory for the steps");
    *s = (struct step){.model = m, .optimizer = o, .comm = comm, .dev = model_device(m)};
    s->scale = scale;
    s->z_loss = z_loss;
    s->residual_max = residual_max;
    s->solvers = model_get_config(m)->solver_count;
    arena counted = arena_measure("reports of steps");
    carve(s, &counted);
    if (arena_open(&s->memory, "reports of steps", counted.peak, s->dev->host_memory, err) != 0) {
        step_close(s);
        return -1;
    }
    carve(s, &s->memory);
    model_on_needed(m, await_bucket, s);
    *out = s;
    return 0;
}

void step_close(struct step *s) {
    if (!s) return;
    model_on_needed(s->model, NULL, NULL);
    forget_records(s);
    if (s->memory.base) arena_close(&s->memory);
    free(s);
}

int step_ahead(const struct step *s) {
    return s->dev->kind == DEVICE_CPU ? 0 : UNDER_WAY - 1;
}

void step_set_level(struct step *s, int solver, enum solver_level level) {
    if (level == model_level(s->model, solver)) return;
    model_set_level(s->model, solver, level);
    forget_records(s);
}

void step_begin(struct step *s, double lr, bool signalled) {
    ASSERT(s->begun - s->ended < UNDER_WAY);
    optimizer_begin(s->optimizer, lr, signalled);
    s->first = true;
}

static void reduce_bucket(void *self, int bucket) {
    struct step *s = self;
    optimizer_reduce(s->optimizer, bucket);
}

/* One micro-batch: forward, loss and backward; around them what begins and what ends a step. */
static void compute(void *self) {
    struct step *s = self;
    if (s->first) {
        optimizer_spread(s->optimizer);
        model_begin_grads(s->model);
        model_zero_sums(s->model);
        model_zero_reports(s->model);
    }
    model_forward(s->model, NULL, NULL, true);
    if (s->last) optimizer_share_reports(s->optimizer);
    model_loss(s->model, NULL, true, s->scale, s->z_loss);
    model_backward(s->model, s->last ? reduce_bucket : NULL, s);
    if (s->last) optimizer_step(s->optimizer, s->scale, s->residual_max);
}

void step_batch(struct step *s, const int32_t *tokens, const int32_t *targets, const int32_t *doc, int64_t B, int64_t T,
                bool last) {
    model_set_batch(s->model, tokens, targets, doc, B, T);
    s->last = last;
    if (s->comm->queued) device_run(s->dev, &s->records[s->first][last], compute, s);
    else compute(s);
    s->first = false;
    if (!last) return;
    int slot = (int)(s->begun++ % UNDER_WAY);
    optimizer_fetch(s->optimizer, &s->reports[slot], s->worst ? s->worst + slot * s->solvers : NULL);
    s->marks[slot] = device_mark(s->dev);
}

int step_wait(struct step *s, struct step_report *report, const struct cell_report **worst, error *err) {
    ASSERT(s->ended < s->begun);
    int slot = (int)(s->ended++ % UNDER_WAY);
    device_wait(s->dev, s->marks[slot]);
    TRY(device_failure(s->dev, err));
    *report = s->reports[slot];
    if (worst) *worst = s->worst ? s->worst + slot * s->solvers : NULL;
    return 0;
}
