/* bench.c: times training steps and matrix products, as bench.h describes. Owns nothing beyond a call. */
#include "train/bench.h"

#include "common/rng.h"
#include "common/text.h"
#include "train/step.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- times ------------------------------------------------------------------------------------------------------ */

/* The times of one kind of work, as they come: what runs between start and pause belongs to the piece in hand, which
 * stopwatch_lap ends. */
struct stopwatch {
    double seconds[BENCH_REPEATS_MAX];
    int count;
    double cpu;                  /* of all pieces */
    double piece;                /* seconds of the piece in hand so far */
    double started, started_cpu; /* when the watch was started */
};

static double process_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void stopwatch_start(struct stopwatch *w) {
    w->started_cpu = process_seconds();
    w->started = clock_seconds();
}

static void stopwatch_pause(struct stopwatch *w) {
    w->piece += clock_seconds() - w->started;
    w->cpu += process_seconds() - w->started_cpu;
}

static void stopwatch_lap(struct stopwatch *w) {
    ASSERT(w->count < BENCH_REPEATS_MAX);
    w->seconds[w->count++] = w->piece;
    w->piece = 0;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static struct bench_times stopwatch_read(struct stopwatch *w) {
    ASSERT(w->count > 0);
    qsort(w->seconds, (size_t)w->count, sizeof *w->seconds, ascending);
    double upper = w->seconds[w->count / 2], lower = w->seconds[(w->count - 1) / 2];
    return (struct bench_times){.count = w->count,
                                .median = (lower + upper) / 2,
                                .least = w->seconds[0],
                                .most = w->seconds[w->count - 1],
                                .cpu = w->cpu / w->count};
}

/* ---- products --------------------------------------------------------------------------------------------------- */

struct product {
    struct device *dev;
    arena memory;
    tensor x, w, y;
};

static void product_carve(struct product *p, arena *a, int64_t size) {
    enum dtype act = p->dev->ops->act;
    size_t count = (size_t)(size * size);
    p->x = tensor_2d(arena_take(a, count * dtype_size(act)), act, size, size);
    p->w = tensor_2d(arena_take(a, count * dtype_size(act)), act, size, size);
    p->y = tensor_2d(arena_take(a, count * dtype_size(act)), act, size, size);
}

static int product_open(struct product *p, struct device *dev, int64_t size, error *err) {
    p->dev = dev;
    arena counted = arena_measure("matrices");
    product_carve(p, &counted, size);
    TRY(arena_open(&p->memory, "matrices", counted.peak, dev->memory, err));
    product_carve(p, &p->memory, size);
    return 0;
}

/* The matrices hold zeros, which a processor multiplies as fast as anything else that is not subnormal. */
static int product_run(struct product *p, int repeats, bool warm_up, struct stopwatch *watch, error *err) {
    const struct ops *ops = p->dev->ops;
    if (warm_up) ops->linear_forward(p->dev, p->y, p->x, p->w, tensor_none());
    TRY(device_check(p->dev, err));
    for (int i = 0; i < repeats; i++) {
        stopwatch_start(watch);
        ops->linear_forward(p->dev, p->y, p->x, p->w, tensor_none());
        TRY(device_check(p->dev, err));
        stopwatch_pause(watch);
        stopwatch_lap(watch);
    }
    return 0;
}

static void product_close(struct product *p) {
    arena_close(&p->memory);
}

int bench_product(struct device *dev, int64_t size, int repeats, struct bench_times *times, error *err) {
    struct stopwatch *watch = calloc(1, sizeof *watch);
    if (!watch) return error_system(err, "no memory for the times of a measurement");
    struct product p = {0};
    int result = product_open(&p, dev, size, err);
    if (result == 0) result = product_run(&p, repeats, true, watch, err);
    if (result == 0) *times = stopwatch_read(watch);
    product_close(&p);
    free(watch);
    return result;
}

/* ---- training --------------------------------------------------------------------------------------------------- */

struct training {
    const struct run_options *options;
    struct comm *comm;
    struct model *model;
    struct optimizer *optimizer;
    struct step *step;
    int64_t micro_batch, accumulate, vocab;
    int32_t *tokens, *targets, *doc; /* of a micro-batch; doc is NULL without data.reset */
    int64_t steps;                   /* taken */
};

static void training_close(struct training *t) {
    step_close(t->step);
    optimizer_close(t->optimizer);
    model_close(t->model);
    free(t->tokens);
    free(t->targets);
    free(t->doc);
}

static int training_open(struct training *t, struct model_config *mc, const struct run_options *o, struct device *dev,
                         struct comm *comm, error *err) {
    *t = (struct training){.options = o, .comm = comm, .vocab = mc->vocab};
    TRY(run_options_split(o, comm->ranks, &t->micro_batch, &t->accumulate, err));
    int64_t T = o->data.T;
    TRY(model_open(&t->model, mc, dev, MODEL_TRAIN, t->micro_batch, T, comm->rank, comm->ranks, err));
    TRY(optimizer_open(&t->optimizer, t->model, comm, &o->optimizer, err));
    double scale = 1 / ((double)o->train.batch * (double)T);
    TRY(step_open(&t->step, t->model, t->optimizer, comm, scale, o->optimizer.z_loss, o->solver.limit, err));
    size_t count = (size_t)(t->micro_batch * T);
    t->tokens = calloc(count, sizeof *t->tokens);
    t->targets = calloc(count, sizeof *t->targets);
    if (o->data.reset) t->doc = calloc(count, sizeof *t->doc); /* a row is one document */
    if (!t->tokens || !t->targets || (o->data.reset && !t->doc))
        return error_system(err, "no memory for a batch of %lld x %lld tokens", (long long)t->micro_batch,
                            (long long)T);
    model_init(t->model, (uint64_t)o->train.seed);
    return 0;
}

/* Row number `row`, counted over the whole measurement, enters the keyed order of ids at a keyed place. */
static void fill_batch(struct training *t, int64_t row) {
    int64_t T = t->options->data.T;
    uint64_t vocab = (uint64_t)t->vocab;
    rng_key order = {(uint64_t)t->options->data.seed, RNG_TEST, 0}, place = order;
    place.stream = 1;
    for (int64_t b = 0; b < t->micro_batch; b++) {
        uint64_t at = rng_below(place, (uint64_t)(row + b), vocab);
        int32_t *tokens = t->tokens + b * T, *targets = t->targets + b * T;
        tokens[0] = (int32_t)rng_permute(order, vocab, at);
        for (int64_t i = 0; i < T; i++) {
            targets[i] = (int32_t)rng_permute(order, vocab, (at + 1 + (uint64_t)i) % vocab);
            if (i + 1 < T) tokens[i + 1] = targets[i];
        }
    }
}

/* One step, as train/step.h takes it; *loss is the mean over its targets. The watch stands still while tokens are
 * made. */
static int training_step(struct training *t, struct stopwatch *watch, double lr, double *loss, error *err) {
    const struct run_options *o = t->options;
    for (int64_t k = 0; k < t->accumulate; k++) {
        bool last = k + 1 == t->accumulate;
        fill_batch(t, t->steps * o->train.batch + (k * t->comm->ranks + t->comm->rank) * t->micro_batch);
        stopwatch_start(watch);
        if (k == 0) step_begin(t->step, lr, false);
        step_batch(t->step, t->tokens, t->targets, t->doc, t->micro_batch, o->data.T, last);
        if (!last) stopwatch_pause(watch);
    }
    struct step_report done;
    TRY(step_wait(t->step, &done, NULL, err));
    *loss = done.totals.loss.nll / done.totals.loss.valid;
    stopwatch_pause(watch);
    stopwatch_lap(watch);
    t->steps++;
    if (isfinite(*loss)) return 0;
    return error_system(err, "the loss of step %lld is not finite: what was timed is not training",
                        (long long)t->steps);
}

/* Warm-up and timed steps, between two halves of the products. */
static int take_steps(struct training *t, struct product *p, const struct bench_plan *plan, struct stopwatch *steps,
                      struct stopwatch *products, struct bench_training *result, error *err) {
    int half = plan->product_repeats / 2;
    double loss = 0, peak = t->options->optimizer.lr;
    TRY(product_run(p, half, true, products, err));
    for (int i = 0; i < plan->warmup + plan->steps; i++) {
        if (i == plan->warmup) memset(steps, 0, sizeof *steps);
        TRY(training_step(t, steps, peak * fmin(1, (i + 1) / 10.0), &loss, err));
        if (i == 0) result->loss_first = loss;
    }
    result->loss_last = loss;
    TRY(product_run(p, plan->product_repeats - half, false, products, err));
    result->step = stopwatch_read(steps);
    result->product = stopwatch_read(products);
    return 0;
}

/* Whatever a rank may fail in alone: the others don't start without it. */
static int open_all(struct training *t, struct product *p, struct model_config *mc, const struct run_options *options,
                    struct device *dev, struct comm *comm, int64_t size, error *err) {
    int status = training_open(t, mc, options, dev, comm, err);
    if (status == 0) status = product_open(p, dev, size, err);
    return comm_agree(comm, status, err);
}

int bench_train(struct model_config *mc, const struct run_options *options, struct device *dev, struct comm *comm,
                const struct bench_plan *plan, struct bench_training *result, error *err) {
    double size = (double)plan->product;
    *result = (struct bench_training){.tokens = options->train.batch * options->data.T,
                                      .product_flops = 2 * size * size * size,
                                      .ranks = comm->ranks};
    struct stopwatch *watches = calloc(2, sizeof *watches);
    TRY(comm_agree(comm, watches ? 0 : error_system(err, "no memory for the times of a measurement"), err));
    struct product p = {0};
    struct training t = {.comm = comm};
    int status = open_all(&t, &p, mc, options, dev, comm, plan->product, err);
    if (status == 0) {
        status = take_steps(&t, &p, plan, &watches[0], &watches[1], result, err);
        result->memory_peak = (int64_t)device_memory(dev).peak;
        status = comm_agree(comm, status, err);
    }
    if (status == 0) comm_max_i64(comm, &result->memory_peak, 1);
    product_close(&p);
    training_close(&t);
    free(watches);
    return status;
}
