/* bench_ops.c: times operations on the device, as bench_ops.h describes. Owns nothing beyond a call. */
#include "train/bench_ops.h"

#include "common/text.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

/* A problem and which of its functions is timed. */
struct timed {
    struct bench_problem *p;
    void (*work)(struct bench_problem *p);
};

static void run_timed(void *self) {
    const struct timed *t = self;
    t->work(t->p);
}

static int take_times(struct bench_stand *s, void (*work)(struct bench_problem *p), struct bench_problem *p,
                      struct bench_times *times, error *err) {
    struct timed t = {p, work};
    return bench_take_times(s, run_timed, &t, times, err);
}

static int time_row(const struct bench_row *row, const char *shape, struct bench_stand *s, struct bench_times *times,
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
    struct bench_stand s;
    struct bench_times copied, multiplied;
    struct bench_work copy_work, product_work;
    int status = bench_stand_open(&s, dev, err);
    if (status == 0)
        status = time_row(&copy_row, gpu ? "n=536870912" : "n=16777216", &s, &copied, &copy_work, err);
    if (status == 0)
        status = time_row(&bench_linear, gpu ? "R=8192 I=8192 O=8192" : "R=1024 I=1024 O=1024", &s, &multiplied,
                          &product_work, err);
    bench_stand_close(&s);
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
    for (int i = 0; i < 128; i++) changed.size[i] = -1;
    TRY(bench_sizes(p, shape, err));
    TRY(bench_sizes(&changed, changes, err));
    if (*changes) p->size['p'] = p->size['q'] = 0;
    for (const char *at = shape; *at; at++) {
        int letter = *at;
        if (at[1] != '=' || ((letter == 'p' || letter == 'q') && !p->size[letter])) continue;
        if (changed.size[letter] >= 0) p->size[letter] = changed.size[letter];
        used += snprintf(text + used, (size_t)(BENCH_SHAPE_TEXT - used), "%s%c=%lld", used ? " " : "", letter,
                         (long long)p->size[letter]);
        ASSERT(used < BENCH_SHAPE_TEXT);
    }
    return 0;
}

static int time_problem(struct bench_problem *p, struct bench_measured *m, error *err) {
    struct bench_stand s;
    int status = bench_stand_open(&s, p->dev, err);
    bench_problem_bytes(p, &m->forward_work, &m->both_work);
    if (p->row->work) p->row->work(p, &m->forward_work, &m->both_work);
    if (status == 0) status = take_times(&s, p->row->forward, p, &m->forward, err);
    if (status == 0 && (p->row->backward || p->row->both)) status = take_times(&s, bench_call_both, p, &m->both, err);
    bench_stand_close(&s);
    return status;
}

const char *const bench_solver_names[] = {"sequential", "newton", "shooting", NULL};

static void read_report(const struct bench_problem *p, struct bench_measured *m) {
    struct cell_report report;
    if (!p->reports) return;
    device_read(p->dev, &report, p->constant, sizeof report);
    m->solved = true;
    m->solver = p->solver;
    m->residual = report.residual;
}

int bench_problem_measure(struct bench_problem *p, bool timed, struct device *oracle, struct bench_measured *m,
                          error *err) {
    int status = bench_problem_open(p, err);
    if (status == 0 && timed) status = time_problem(p, m, err);
    if (status == 0) status = bench_check(p, oracle, &m->difference, err);
    if (status == 0) read_report(p, m);
    bench_problem_close(p);
    return status;
}

int bench_operation(const struct bench_row *row, const char *shape, const char *changes, bool timed,
                    struct device *dev, struct device *oracle, struct bench_measured *m, error *err) {
    struct bench_problem p = {.row = row, .dev = dev};
    *m = (struct bench_measured){0};
    TRY(set_shape(&p, shape, changes, m->shape, err));
    int status = bench_problem_measure(&p, timed, oracle, m, err);
    if (status != 0) error_context(err, "measuring %s, %s", row->name, m->shape);
    return status;
}
