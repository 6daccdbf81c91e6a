/* cell_convergence.c: how fast the solvers of the nonlinear cells converge: tables in Markdown, for
 * docs/measurements/pararnn-convergence.md.
 *
 *   cell_convergence [--device cpu|cuda] [--precision fp32|fp64]
 *
 * For every cell: CHANNELS channels with random weights and pre-activations, solved with so many iterations; the
 * largest difference of any output from the exact recurrence, which the double CPU table computes token after token
 * from the same (rounded) inputs.
 */
#include "common/rng.h"
#include "kernels/cells/cells.h"
#include "kernels/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHANNELS = 256, LENGTH = 2048, MOST_ITERATIONS = 6 };

/* Weights uniform within +-limit, or normal with a deviation of -limit where that is negative; pre-activations normal.
 * */
struct setting {
    const char *name;
    double limit, deviation;
    double keep; /* moves the mean of the first gate's pre-activation this far to where it keeps the state */
};

static const struct setting settings[] = {
    {"fresh (normal, deviation 0.03)", -0.03, 1, 0}, {"0.5", 0.5, 1, 0}, {"0.9", 0.9, 1, 0}, {"2", 2, 1, 0},
    {"0.5, inputs of deviation 3", 0.5, 3, 0},        {"0.5, long memory", 0.5, 1, 4},
};
enum { SETTINGS = sizeof settings / sizeof *settings, HALF = 1, LONG_MEMORY = 5 };

struct problem {
    const struct cell *cell;
    int64_t T;
    double *u, *w, *y; /* (T,U,CHANNELS), (W,CHANNELS), (T,CHANNELS): inputs, exact outputs */
};

static void *allocate(int64_t count, size_t size) {
    void *memory = calloc((size_t)count, size);
    ASSERT(memory != NULL);
    return memory;
}

static void give_up(const error *err) {
    fprintf(stderr, "cell_convergence: %s\n", err->text);
    exit(error_exit_code(err));
}

static double normal(uint32_t stream, int64_t i) {
    return rng_normal((rng_key){.seed = 1, .purpose = RNG_TEST, .stream = stream}, (uint64_t)i);
}

static double uniform(uint32_t stream, int64_t i) {
    return 2 * rng_uniform((rng_key){.seed = 1, .purpose = RNG_TEST, .stream = stream}, (uint64_t)i) - 1;
}

/* Where the first pre-activation is large, is the state kept or overwritten? By the trace of the Jacobian. */
static double keeping_sign(const struct cell *cell) {
    double w[CELL_WEIGHTS_MAX] = {0}, before[CELL_STATES_MAX] = {0.5, 0.5}, after[CELL_STATES_MAX];
    double trace[2] = {0, 0}, J[CELL_STATES_MAX * CELL_STATES_MAX];
    for (int side = 0; side < 2; side++) {
        double u[CELL_INPUTS_MAX] = {side ? 4 : -4};
        cell->own.jacobian(before, u, w, after, after, J);
        for (int i = 0; i < cell->states; i++) trace[side] += J[i * cell->states + i];
    }
    return trace[1] > trace[0] ? 1 : -1;
}

/* --- solving ------------------------------------------------------------------------------------------------------ */

/* What a device computes from the problem's inputs. */
struct result {
    double *y;
    float residual;
};

struct memory {
    tensor y, u, w, doc;
    struct cell_report *report;
    void *scratch;
};

static void carve(struct memory *m, const struct problem *p, const struct ops *ops, struct cell_solver solver,
                  arena *a) {
    int64_t U = p->cell->inputs, W = p->cell->weights, N = CHANNELS;
    size_t real = dtype_size(ops->real);
    ASSERT(ops->act == ops->real);
    m->u = tensor_5d(arena_take(a, (size_t)(p->T * U * N) * real), ops->act, 1, p->T, 1, U, N);
    m->y = tensor_3d(arena_take(a, (size_t)(p->T * N) * real), ops->act, 1, p->T, N);
    m->w = tensor_2d(arena_take(a, (size_t)(W * N) * real), ops->real, W, N);
    m->doc = tensor_2d(arena_take(a, (size_t)p->T * sizeof(int32_t)), DTYPE_I32, 1, p->T);
    m->report = arena_take(a, sizeof *m->report);
    m->scratch = arena_take(a, ops->cell_forward_scratch((struct cell_shape){1, p->T, N, p->cell}, solver));
}

static void upload(struct device *dev, tensor to, const double *from) {
    int64_t count = tensor_count(to);
    float *single = allocate(count, sizeof *single);
    for (int64_t i = 0; i < count; i++) single[i] = (float)from[i];
    device_write(dev, to.data, to.dtype == DTYPE_F64 ? (const void *)from : single,
                 (size_t)count * dtype_size(to.dtype));
    free(single);
}

static void download(struct device *dev, double *to, tensor from) {
    int64_t count = tensor_count(from);
    float *single = allocate(count, sizeof *single);
    bool wide = from.dtype == DTYPE_F64;
    device_read(dev, wide ? (void *)to : single, from.data, (size_t)count * dtype_size(from.dtype));
    for (int64_t i = 0; !wide && i < count; i++) to[i] = single[i];
    free(single);
}

/* With `documents` every token is a document of its own. */
static struct result solve(struct device *dev, const struct problem *p, struct cell_solver solver, bool documents) {
    struct result r = {.y = allocate(p->T * CHANNELS, sizeof *r.y)};
    struct memory m;
    struct cell_report report = {0, 0};
    arena measured = arena_measure("cells"), a;
    error err = {0};
    int32_t *doc = allocate(p->T, sizeof *doc);
    const tensor none = tensor_none();
    carve(&m, p, dev->ops, solver, &measured);
    if (arena_open(&a, "cells", measured.peak, dev->memory, &err) != 0) give_up(&err);
    carve(&m, p, dev->ops, solver, &a);
    for (int64_t t = 0; t < p->T; t++) doc[t] = (int32_t)t;
    upload(dev, m.u, p->u);
    upload(dev, m.w, p->w);
    device_write(dev, m.doc.data, doc, (size_t)p->T * sizeof *doc);
    device_write(dev, m.report, &report, sizeof report);
    dev->ops->cell_forward(dev, m.y, none, none, m.report, m.u, none, m.w, none, documents ? m.doc : none, p->cell,
                           solver, m.scratch);
    download(dev, r.y, m.y);
    device_read(dev, &report, m.report, sizeof report);
    if (device_check(dev, &err) != 0) give_up(&err);
    r.residual = report.residual;
    arena_close(&a);
    free(doc);
    return r;
}

/* The problem, with inputs rounded to the device's numbers, and its solution by the double CPU table. */
static struct problem problem_open(struct device *oracle, const struct cell *cell, int64_t T, const struct setting *s,
                                   bool single) {
    int64_t U = cell->inputs, W = cell->weights, N = CHANNELS;
    struct problem p = {.cell = cell, .T = T};
    p.u = allocate(T * U * N, sizeof *p.u);
    p.w = allocate(W * N, sizeof *p.w);
    for (int64_t i = 0; i < T * U * N; i++) {
        p.u[i] = s->deviation * normal(1, i) + (i / N % U == 0 ? s->keep * keeping_sign(cell) : 0);
        if (single) p.u[i] = (float)p.u[i];
    }
    for (int64_t i = 0; i < W * N; i++) {
        p.w[i] = s->limit > 0 ? s->limit * uniform(2, i) : -s->limit * normal(2, i);
        if (single) p.w[i] = (float)p.w[i];
    }
    p.y = solve(oracle, &p, (struct cell_solver){.method = CELL_SEQUENTIAL}, false).y;
    return p;
}

static void problem_close(struct problem *p) {
    free(p->u);
    free(p->w);
    free(p->y);
}

/* The largest difference from the exact outputs; what the solver says of itself. */
struct quality {
    double distance, residual;
};

static struct quality quality_of(struct device *dev, const struct problem *p, struct cell_solver solver,
                                 bool documents) {
    struct result r = solve(dev, p, solver, documents);
    struct quality q = {0, (double)r.residual};
    for (int64_t i = 0; i < p->T * CHANNELS; i++) {
        double d = fabs(r.y[i] - p->y[i]);
        if (!(d <= q.distance)) q.distance = isfinite(d) ? d : INFINITY;
    }
    free(r.y);
    return q;
}

static struct quality newton(struct device *dev, const struct problem *p, int iterations) {
    struct cell_solver solver = {.method = CELL_NEWTON, .iterations = iterations};
    /* A document a token leaves nothing but the guess. */
    if (iterations == 0) return quality_of(dev, p, (struct cell_solver){.method = CELL_SEQUENTIAL}, true);
    return quality_of(dev, p, solver, false);
}

static struct quality shooting(struct device *dev, const struct problem *p, int64_t chunk, int iterations) {
    struct cell_solver solver = {.method = CELL_SHOOTING, .iterations = iterations, .chunk = chunk};
    return quality_of(dev, p, solver, false);
}

/* The largest Lyapunov exponent of any channel: how a small change of the state grows a token, in nats. */
static double exponent(const struct problem *p) {
    const struct cell *c = p->cell;
    double most = -INFINITY;
    for (int64_t n = 0; n < CHANNELS; n++) {
        double state[CELL_STATES_MAX] = {0}, way[CELL_STATES_MAX] = {1, 1, 1, 1}, sum = 0;
        double w[CELL_WEIGHTS_MAX];
        for (int k = 0; k < c->weights; k++) w[k] = p->w[k * CHANNELS + n];
        for (int64_t t = 0; t < p->T; t++) {
            double u[CELL_INPUTS_MAX], after[CELL_STATES_MAX], next[CELL_STATES_MAX], size = 0;
            double J[CELL_STATES_MAX * CELL_STATES_MAX];
            for (int k = 0; k < c->inputs; k++) u[k] = p->u[(t * c->inputs + k) * CHANNELS + n];
            c->own.jacobian(state, u, w, after, after, J);
            for (int i = 0; i < c->states; i++) {
                next[i] = 0;
                for (int j = 0; j < c->states; j++) next[i] += J[i * c->states + j] * way[j];
                size += next[i] * next[i];
            }
            size = sqrt(size);
            sum += log(fmax(size, 1e-300));
            for (int i = 0; i < c->states; i++) way[i] = size > 0 ? next[i] / size : 1, state[i] = after[i];
        }
        most = fmax(most, sum / (double)p->T);
    }
    return most;
}

/* --- the tables --------------------------------------------------------------------------------------------------- */

struct devices {
    struct device *dev, *oracle;
    bool single;
};

static void print_newton(const struct devices *d) {
    printf("Newton, T = %d: after so many iterations; and the largest Lyapunov exponent of any channel.\n\n", LENGTH);
    printf("| cell | weights within | 0 | 1 | 2 | 3 | 4 | 5 | 6 | exponent |\n"
           "|---|---|---|---|---|---|---|---|---|---|\n");
    for (int c = 0; c < CELL_COUNT; c++) {
        for (int s = 0; s < SETTINGS; s++) {
            struct problem p = problem_open(d->oracle, cells[c], LENGTH, &settings[s], d->single);
            printf("| %s | %s |", cells[c]->name, settings[s].name);
            for (int k = 0; k <= MOST_ITERATIONS; k++) printf(" %.0e |", newton(d->dev, &p, k).distance);
            printf(" %.2f |\n", exponent(&p));
            fflush(stdout);
            problem_close(&p);
        }
    }
}

static void print_shooting(const struct devices *d) {
    static const int64_t chunks[] = {1, 4, 16, 64};
    static const int which[] = {HALF, LONG_MEMORY};
    printf("\nMultiple shooting, T = %d: after 1 / 2 / 3 iterations, which are 2 / 3 / 4 evaluations, with chunks of "
           "so many tokens.\n\n",
           LENGTH);
    printf("| cell | weights within | 1 | 4 | 16 | 64 |\n|---|---|---|---|---|---|\n");
    for (int c = 0; c < CELL_COUNT; c++) {
        for (int s = 0; s < 2; s++) {
            struct problem p = problem_open(d->oracle, cells[c], LENGTH, &settings[which[s]], d->single);
            printf("| %s | %s |", cells[c]->name, settings[which[s]].name);
            for (int q = 0; q < 4; q++) {
                printf(" ");
                for (int k = 1; k <= 3; k++)
                    printf("%s%.0e", k > 1 ? " / " : "", shooting(d->dev, &p, chunks[q], k).distance);
                printf(" |");
            }
            printf("\n");
            fflush(stdout);
            problem_close(&p);
        }
    }
}

static void print_lengths(const struct devices *d) {
    static const int64_t lengths[] = {64, 512, 2048, 8192};
    printf("\nNewton, 3 iterations, weights within 0.5: by length.\n\n");
    printf("| cell | inputs | 64 | 512 | 2048 | 8192 |\n|---|---|---|---|---|---|\n");
    for (int c = 0; c < CELL_COUNT; c++) {
        for (int s = 0; s < 2; s++) {
            printf("| %s | %s |", cells[c]->name, s ? "long memory" : "of deviation 1");
            for (int l = 0; l < 4; l++) {
                const struct setting *setting = &settings[s ? LONG_MEMORY : HALF];
                struct problem p = problem_open(d->oracle, cells[c], lengths[l], setting, d->single);
                printf(" %.0e |", newton(d->dev, &p, 3).distance);
                problem_close(&p);
            }
            printf("\n");
            fflush(stdout);
        }
    }
}

/* What struct cell_report says, beside the truth. */
static void print_reports(const struct devices *d) {
    printf("\nWhat solvers report of themselves, beside their largest difference, T = %d: report / difference after 1, "
           "2, 3 iterations.\n\n",
           LENGTH);
    printf("| cell | weights within | Newton 1 | 2 | 3 | chunks of 16: 1 | 2 | 3 |\n"
           "|---|---|---|---|---|---|---|---|\n");
    for (int c = 0; c < CELL_COUNT; c++) {
        for (int s = HALF; s < HALF + 3; s++) {
            struct problem p = problem_open(d->oracle, cells[c], LENGTH, &settings[s], d->single);
            printf("| %s | %s |", cells[c]->name, settings[s].name);
            for (int k = 0; k < 6; k++) {
                struct quality q = k < 3 ? newton(d->dev, &p, k + 1) : shooting(d->dev, &p, 16, k - 2);
                printf(" %.0e / %.0e |", q.residual, q.distance);
            }
            printf("\n");
            fflush(stdout);
            problem_close(&p);
        }
    }
}

int main(int argc, char **argv) {
    struct devices d = {NULL, NULL, true};
    enum device_kind kind = DEVICE_CPU;
    error err = {0};
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--device") == 0 && strcmp(argv[i + 1], "cuda") == 0) kind = DEVICE_CUDA;
        if (strcmp(argv[i], "--precision") == 0 && strcmp(argv[i + 1], "fp64") == 0) d.single = false;
    }
    if (device_open(&d.dev, kind, d.single ? PRECISION_F32 : PRECISION_F64, &err) != 0 ||
        device_open(&d.oracle, DEVICE_CPU, PRECISION_F64, &err) != 0)
        give_up(&err);
    print_newton(&d);
    print_shooting(&d);
    print_lengths(&d);
    print_reports(&d);
    device_close(d.oracle);
    device_close(d.dev);
    return 0;
}
