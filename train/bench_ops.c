/* bench_ops.c: times operations on the device, as bench_ops.h describes. Owns nothing beyond a call. */
#include "train/bench_ops.h"

#include "common/text.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARM_UP = 2, REPEATS_LEAST = 5, REPEATS_MOST = 60 };
static const double seconds_wanted = 0.1; /* that the repetitions of one measurement take together */

/* Between repetitions a GPU reads this much: nothing of the operands stays in its cache, which holds lines that need
 * not be written back, and the host has the time to submit the next repetition whole. */
enum { FLUSH_FLOATS = 64 << 20 };

struct stand {
    struct device *dev;
    struct device_timer *timer;
    arena memory;
    tensor flush;
    double *sum;
};

static void stand_carve(struct stand *s, arena *a) {
    int64_t floats = s->dev->kind == DEVICE_CUDA ? FLUSH_FLOATS : 1;
    s->flush = tensor_1d(arena_take(a, (size_t)floats * dtype_size(s->dev->ops->real)), s->dev->ops->real, floats);
    s->sum = arena_take(a, sizeof *s->sum);
}

static int stand_open(struct stand *s, struct device *dev, error *err) {
    *s = (struct stand){.dev = dev};
    arena counted = arena_measure("cache");
    stand_carve(s, &counted);
    TRY(arena_open(&s->memory, "cache", counted.peak, dev->memory, err));
    stand_carve(s, &s->memory);
    return device_timer_open(&s->timer, dev, REPEATS_MOST, err);
}

static void stand_close(struct stand *s) {
    device_timer_close(s->timer);
    arena_close(&s->memory);
}

static void time_lap(struct stand *s, int lap, void (*work)(struct bench_problem *p), struct bench_problem *p) {
    if (s->dev->kind == DEVICE_CUDA) s->dev->ops->sum_squares(s->dev, s->sum, s->flush);
    device_timer_start(s->timer, lap);
    work(p);
    device_timer_stop(s->timer, lap);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* As many repetitions as the time allows, after some that tell how long one takes. */
static int take_times(struct stand *s, void (*work)(struct bench_problem *p), struct bench_problem *p,
                      struct bench_times *times, error *err) {
    double seconds[REPEATS_MOST];
    for (int i = 0; i < WARM_UP; i++) time_lap(s, i, work, p);
    TRY(device_check(s->dev, err));
    double one = device_timer_seconds(s->timer, WARM_UP - 1);
    int count = (int)fmax(REPEATS_LEAST, fmin(REPEATS_MOST, seconds_wanted / one));
    for (int i = 0; i < count; i++) time_lap(s, i, work, p);
    TRY(device_check(s->dev, err));
    for (int i = 0; i < count; i++) seconds[i] = device_timer_seconds(s->timer, i);
    qsort(seconds, (size_t)count, sizeof *seconds, ascending);
    *times = (struct bench_times){.count = count,
                                  .median = (seconds[count / 2] + seconds[(count - 1) / 2]) / 2,
                                  .least = seconds[0],
                                  .most = seconds[count - 1]};
    return 0;
}

/* ---- ceilings --------------------------------------------------------------------------------------------------- */

static void declare_copy(struct bench_problem *p) {
    bench_input(p, "from", "n")->has_gradient = BENCH_NO_GRADIENT;
    bench_output(p, "to", "n")->has_gradient = BENCH_NO_GRADIENT;
}

static void copy(struct bench_problem *p) {
    tensor to = bench_value(p, "to");
    device_copy(p->dev, to.data, bench_value(p, "from").data, (size_t)tensor_count(to) * dtype_size(to.dtype));
}

static const struct bench_row copy_row = {.name = "copy", .declare = declare_copy, .forward = copy};

static int time_row(const struct bench_row *row, const char *shape, struct stand *s, struct bench_times *times,
                    struct bench_work *work, error *err) {
    struct bench_problem p = {.row = row, .dev = s->dev};
    struct bench_work both;
    TRY(bench_sizes(&p, shape, err));
    int status = bench_problem_open(&p, err);
    if (status == 0) {
        bench_problem_bytes(&p, work, &both);
        if (row->work) row->work(&p, work, &both);
        status = take_times(s, row->forward, &p, times, err);
    }
    bench_problem_close(&p);
    return status;
}

/* 132 multiprocessors give 16 special functions a clock at 1.755 GHz; a processor's cost is in its times. */
static const double special_of_cuda = 3.7e12;

int bench_ceilings(struct device *dev, struct bench_ceilings *c, error *err) {
    bool gpu = dev->kind == DEVICE_CUDA;
    struct stand s;
    struct bench_times copied, multiplied;
    struct bench_work copy_work, product_work;
    int status = stand_open(&s, dev, err);
    if (status == 0)
        status = time_row(&copy_row, gpu ? "n=536870912" : "n=16777216", &s, &copied, &copy_work, err);
    if (status == 0)
        status = time_row(&bench_linear, gpu ? "R=8192 I=8192 O=8192" : "R=1024 I=1024 O=1024", &s, &multiplied,
                          &product_work, err);
    stand_close(&s);
    if (status != 0) return status;
    c->bytes_per_s = copy_work.bytes / copied.median;
    c->products_per_s = product_work.products / multiplied.median;
    c->special_per_s = gpu ? special_of_cuda : HUGE_VAL;
    return 0;
}

double bench_floor(const struct bench_work *w, const struct bench_ceilings *c) {
    return fmax(w->bytes / c->bytes_per_s, fmax(w->products / c->products_per_s, w->special / c->special_per_s));
}

/* ---- an operation ----------------------------------------------------------------------------------------------- */

/* The sizes of the case, some of them changed, and how they are written. Views of other sizes are dense. */
static int set_shape(struct bench_problem *p, const char *shape, const char *changes, char text[BENCH_SHAPE_TEXT],
                     error *err) {
    struct bench_problem changed = {0};
    int used = 0;
    TRY(bench_sizes(p, shape, err));
    TRY(bench_sizes(&changed, changes, err));
    if (*changes) p->size['p'] = p->size['q'] = 0;
    for (const char *at = shape; *at; at++) {
        int letter = *at;
        if (at[1] != '=' || !p->size[letter]) continue;
        if (changed.size[letter]) p->size[letter] = changed.size[letter];
        used += snprintf(text + used, (size_t)(BENCH_SHAPE_TEXT - used), "%s%c=%lld", used ? " " : "", letter,
                         (long long)p->size[letter]);
        ASSERT(used < BENCH_SHAPE_TEXT);
    }
    return 0;
}

static int time_problem(struct bench_problem *p, struct bench_measured *m, error *err) {
    struct stand s;
    int status = stand_open(&s, p->dev, err);
    bench_problem_bytes(p, &m->forward_work, &m->both_work);
    if (p->row->work) p->row->work(p, &m->forward_work, &m->both_work);
    if (status == 0) status = take_times(&s, p->row->forward, p, &m->forward, err);
    if (status == 0 && (p->row->backward || p->row->both)) status = take_times(&s, bench_call_both, p, &m->both, err);
    stand_close(&s);
    return status;
}

int bench_operation(const struct bench_row *row, const char *shape, const char *changes, bool timed,
                    struct device *dev, struct device *oracle, struct bench_measured *m, error *err) {
    struct bench_problem p = {.row = row, .dev = dev};
    *m = (struct bench_measured){0};
    TRY(set_shape(&p, shape, changes, m->shape, err));
    int status = bench_problem_open(&p, err);
    if (status == 0 && timed) status = time_problem(&p, m, err);
    if (status == 0) status = bench_check(&p, oracle, &m->difference, err);
    if (status != 0) error_context(err, "measuring %s, %s", row->name, m->shape);
    bench_problem_close(&p);
    return status;
}
