/* test/test_kernels_cell.c: the nonlinear cells of kernels/cells/ and their solvers on the CPU: derivatives of every
 * cell in the list against dual numbers and finite differences; numbers worked out by hand; what Newton's method and
 * multiple shooting have reached after so many iterations; reports, bounds, views with gaps, numbers of threads. The
 * case table (test/ops_cell.c) covers shapes, documents, initial states and the gradient of a whole recurrence.
 */
#include "kernels/cells/cells.h"
#include "test/unit_kernels.h"

#ifdef RIVERRUN_OPENMP
#include <omp.h>
#endif

/* --- the functions of one channel --------------------------------------------------------------------------------- */

enum { S_MAX = CELL_STATES_MAX, U_MAX = CELL_INPUTS_MAX, W_MAX = CELL_WEIGHTS_MAX };

static void draw(double *to, int count, uint32_t stream, int64_t point, double scale) {
    for (int i = 0; i < count; i++) to[i] = scale * uniform(stream, point * 16 + i);
}

static void list(void **unused) {
    (void)unused;
    for (int i = 0; i < CELL_COUNT; i++) {
        const struct cell *c = cells[i];
        assert_int_equal(c->id, i);
        assert_ptr_equal(cell_find(c->name), c);
        assert_true(strlen(c->help) > 0 && c->bound >= 0 && c->limit > 0);
        assert_in_range(c->states, 1, S_MAX);
        assert_in_range(c->inputs, 1, U_MAX);
        assert_in_range(c->weights, 1, W_MAX);
        assert_in_range(c->output, 0, c->states - 1);
    }
    assert_null(cell_find("gr"));
    assert_null(cell_find(""));
    assert_int_equal(cell_find("lstm")->id, CELL_ID_lstm);
}

/* A step's inputs, one behind the other, so that each number of them can be varied. */
struct point {
    double before[S_MAX], u[U_MAX], w[W_MAX];
};

static double *number_of(const struct cell *c, struct point *p, int i) {
    if (i < c->states) return &p->before[i];
    i -= c->states;
    return i < c->inputs ? &p->u[i] : &p->w[i - c->inputs];
}

/* Derivatives of all states behind the token by each number that goes in: [number][state]. */
static void differences(const struct cell *c, struct point p, double slope[][S_MAX]) {
    const double step = 1e-5;
    double after[4][S_MAX];
    for (int i = 0; i < c->states + c->inputs + c->weights; i++) {
        double *place = number_of(c, &p, i), centre = *place;
        for (int k = 0; k < 4; k++) {
            *place = centre + step * (k < 2 ? k - 2 : k - 1);
            c->own.step(p.before, p.u, p.w, after[k]);
        }
        *place = centre;
        for (int s = 0; s < c->states; s++)
            slope[i][s] = (after[0][s] - 8 * after[1][s] + 8 * after[2][s] - after[3][s]) / (12 * step);
    }
}

static void assert_derivatives(const struct cell *c, const struct cell_functions *f, const struct point *p,
                               double slope[][S_MAX], const char *whose) {
    double after[S_MAX] = {0}, want[S_MAX], J[S_MAX * S_MAX], lambda[S_MAX], g[S_MAX + U_MAX + W_MAX];
    int S = c->states, numbers = S + c->inputs + c->weights;
    draw(lambda, S, 9, 0, 1);
    f->step(p->before, p->u, p->w, want);
    f->jacobian(p->before, p->u, p->w, after, after, J);
    f->gradient(p->before, p->u, p->w, want, lambda, g, g + S, g + S + c->inputs);
    for (int i = 0; i < S; i++) {
        assert_close(after[i], want[i], 0, 1e-15, c->name, i);
        for (int j = 0; j < S; j++) assert_close(J[i * S + j], slope[j][i], 1e-9, 1e-10, whose, i * S + j);
    }
    for (int k = 0; k < numbers; k++) {
        double sum = 0;
        for (int i = 0; i < S; i++) sum += lambda[i] * slope[k][i];
        assert_close(g[k], sum, 1e-9, 1e-10, whose, 100 + k);
    }
}

/* Both are the derivatives of the step: those that a cell's header has, and those by dual numbers; and so closer to
 * each other than differences can tell. */
static void derivatives(void **unused) {
    (void)unused;
    for (int i = 0; i < CELL_COUNT; i++) {
        const struct cell *c = cells[i];
        for (int64_t n = 0; n < 200; n++) {
            struct point p;
            double slope[S_MAX + U_MAX + W_MAX][S_MAX], after[S_MAX] = {0}, J[2][S_MAX * S_MAX];
            draw(p.before, c->states, 1, n, c->bound > 0 ? c->bound : 2);
            draw(p.u, c->inputs, 2, n, n % 4 == 0 ? 8 : 2);
            draw(p.w, c->weights, 3, n, n % 2 ? c->limit : 3);
            differences(c, p, slope);
            assert_derivatives(c, &c->own, &p, slope, c->name);
            assert_derivatives(c, &c->automatic, &p, slope, "by dual numbers");
            c->own.jacobian(p.before, p.u, p.w, after, after, J[0]);
            c->automatic.jacobian(p.before, p.u, p.w, after, after, J[1]);
            for (int k = 0; k < c->states * c->states; k++) assert_close(J[0][k], J[1][k], 1e-14, 1e-15, c->name, k);
        }
    }
}

/* Nothing but zeros goes in, and what is beyond exp. */
static void extremes(void **unused) {
    (void)unused;
    static const double sizes[] = {0, 1, 40, 800, 1e30, -1e30};
    for (int i = 0; i < CELL_COUNT; i++) {
        for (int n = 0; n < 6; n++) {
            const struct cell *c = cells[i];
            struct point p = {{0}, {0}, {0}};
            double after[S_MAX] = {0}, J[S_MAX * S_MAX], lambda[S_MAX] = {1, 1}, g[S_MAX + U_MAX + W_MAX];
            for (int k = 0; k < c->inputs; k++) p.u[k] = sizes[n] * (k % 2 ? -1 : 1);
            for (int k = 0; k < c->weights; k++) p.w[k] = n ? 0.5 : 0;
            const struct cell_functions *both[] = {&c->own, &c->automatic};
            for (int f = 0; f < 2; f++) {
                both[f]->jacobian(p.before, p.u, p.w, after, after, J);
                both[f]->gradient(p.before, p.u, p.w, after, lambda, g, g + c->states, g + c->states + c->inputs);
                for (int k = 0; k < c->states; k++) assert_true(isfinite(after[k]));
                for (int k = 0; k < c->states * c->states; k++) assert_true(isfinite(J[k]));
                for (int k = 0; k < c->states + c->inputs + c->weights; k++) assert_true(isfinite(g[k]));
            }
        }
    }
}

/* --- whole recurrences -------------------------------------------------------------------------------------------- */

/* B rows of T tokens of H heads of P channels, in the device's type; everything that the operations take and give. */
struct sequence {
    struct device *dev;
    const struct cell *cell;
    int64_t B, T, H, P, N;
    tensor u, bias, weight, initial, doc, y, others, final;
    tensor du, dbias, dweight, dinitial, dy, dfinal;
    struct cell_report report;
};

static tensor numbers(const struct sequence *q, int ndim, const int64_t *dim, uint32_t stream, double scale) {
    tensor t = {.dtype = q->dev->ops->real, .ndim = ndim};
    int64_t count = 1;
    for (int i = ndim - 1; i >= 0; i--) t.dim[i] = dim[i], t.stride[i] = count, count *= dim[i];
    t.data = must_allocate((size_t)count * 8);
    for (int64_t i = 0; i < count; i++) set(t, i, scale * uniform(stream, i));
    return t;
}

#define NUMBERS(q, stream, scale, ...)                                                                                 \
    numbers(q, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}, stream, scale)

/* Pre-activations of standard deviation 1, weights within the cell's limit. */
static void sequence_open(struct sequence *q, enum precision precision, const struct cell *cell, int64_t B, int64_t T,
                          int64_t H, int64_t P) {
    int64_t S = cell->states, U = cell->inputs, W = cell->weights, N = H * P;
    *q = (struct sequence){.dev = open_cpu(precision), .cell = cell, .B = B, .T = T, .H = H, .P = P, .N = N};
    q->u = NUMBERS(q, 1, sqrt(3), B, T, H, U, P);
    q->bias = NUMBERS(q, 2, 0.1, U, N);
    q->weight = NUMBERS(q, 3, cell->limit, W, N);
    q->initial = NUMBERS(q, 4, 0.9, B, S, N);
    q->y = NUMBERS(q, 0, 0, B, T, N);
    q->others = S > 1 ? NUMBERS(q, 0, 0, B, T, S - 1, N) : tensor_none();
    q->final = NUMBERS(q, 0, 0, B, S, N);
    q->du = NUMBERS(q, 0, 0, B, T, H, U, P);
    q->dbias = NUMBERS(q, 0, 0, U, N);
    q->dweight = NUMBERS(q, 0, 0, W, N);
    q->dinitial = NUMBERS(q, 0, 0, B, S, N);
    q->dy = NUMBERS(q, 5, 1, B, T, N);
    q->dfinal = NUMBERS(q, 6, 1, B, S, N);
}

static void sequence_close(struct sequence *q) {
    tensor *all[] = {&q->u, &q->bias, &q->weight, &q->initial, &q->doc, &q->y, &q->others, &q->final,
                     &q->du, &q->dbias, &q->dweight, &q->dinitial, &q->dy, &q->dfinal};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]->data);
    device_close(q->dev);
}

static void forget(tensor *t) {
    free(t->data);
    *t = tensor_none();
}

static struct cell_solver sequential(void) {
    return (struct cell_solver){.method = CELL_SEQUENTIAL};
}

static struct cell_solver newton(int iterations) {
    return (struct cell_solver){.method = CELL_NEWTON, .iterations = iterations};
}

static struct cell_solver shooting(int64_t chunk, int iterations) {
    return (struct cell_solver){.method = CELL_SHOOTING, .iterations = iterations, .chunk = chunk};
}

static void forward(struct sequence *q, struct cell_solver solver) {
    const struct ops *ops = q->dev->ops;
    void *scratch = must_allocate(ops->cell_forward_scratch((struct cell_shape){q->B, q->T, q->N, q->cell}, solver));
    ops->cell_forward(q->dev, q->y, q->others, q->final, &q->report, q->u, q->bias, q->weight, q->initial, q->doc,
                      q->cell, solver, scratch);
    free(scratch);
}

static void backward(struct sequence *q) {
    const struct ops *ops = q->dev->ops;
    void *scratch = must_allocate(ops->cell_backward_scratch((struct cell_shape){q->B, q->T, q->N, q->cell}));
    ops->cell_backward(q->dev, q->du, q->dbias, q->dweight, q->dinitial, q->dy, q->dfinal, q->y, q->others, q->u,
                       q->bias, q->weight, q->initial, q->doc, q->cell, scratch);
    free(scratch);
}

static double *copy_of(tensor t) {
    double *values = must_allocate((size_t)tensor_count(t) * sizeof *values);
    for (int64_t i = 0; i < tensor_count(t); i++) values[i] = get(t, i);
    return values;
}

/* Largest difference from numbers kept before; not a number counts as infinite. */
static double distance(tensor t, const double *from) {
    double most = 0;
    for (int64_t i = 0; i < tensor_count(t); i++) {
        double d = fabs(get(t, i) - from[i]);
        if (!(d <= most)) most = isfinite(d) ? d : INFINITY;
    }
    return most;
}

/* --- numbers worked out by hand (4 tokens of one channel) --------------------------------------------------------- */

static void small_open(struct sequence *q, const struct cell *cell, const double *weight) {
    static const double u[] = {0.2, -0.1, 0.7, -0.5, 0.3, -0.4, 1.0, 0.6, 0.9, -1.2, -0.8, 0.3};
    static const double dy[] = {1, -0.5, 0.25, 2};
    sequence_open(q, PRECISION_F64, cell, 1, 4, 1, 1);
    forget(&q->initial);
    forget(&q->bias);
    forget(&q->dbias);
    forget(&q->dinitial);
    forget(&q->dfinal);
    for (int i = 0; i < 12; i++) set(q->u, i, u[i]);
    for (int i = 0; i < 4; i++) set(q->dy, i, dy[i]);
    for (int i = 0; i < cell->weights; i++) set(q->weight, i, weight[i]);
}

static void assert_numbers(const char *what, tensor t, const double *want) {
    for (int64_t i = 0; i < tensor_count(t); i++) assert_close(get(t, i), want[i], 0, 6e-10, what, i);
}

/* J at the solution, of token t > 0. */
static void jacobian_at(const struct sequence *q, int64_t t, double *J) {
    double u[U_MAX], w[W_MAX], before[S_MAX], after[S_MAX] = {0};
    for (int k = 0; k < q->cell->inputs; k++) u[k] = get(q->u, t * q->cell->inputs + k);
    for (int k = 0; k < q->cell->weights; k++) w[k] = get(q->weight, k);
    before[q->cell->output] = get(q->y, t - 1);
    if (q->cell->states > 1) before[0] = get(q->others, t - 1);
    q->cell->own.jacobian(before, u, w, after, after, J);
}

static void gru_by_hand(void **unused) {
    (void)unused;
    static const double weight[] = {0.4, -0.3, 0.5};
    static const double iterates[][4] = {
        {0.332301951, -0.143446185, 0.523655703, 0.067431650}, {0.332301951, 0.073865003, 0.560867045, 0.506060416},
        {0.332301951, 0.073865003, 0.555572308, 0.502036227},  {0.332301951, 0.073865003, 0.555572308, 0.502033965}};
    static const double J[] = {0, 0.627538970, 0.424047274, 0.739930716};
    static const double du[] = {0.171514707, 0, 0.400150127, -0.035655576, 0.003578645, 0.087021145,
                                0.219297886, 0.005100184, 0.599786129, -0.077808957, 0.026391513, 0.475937944};
    static const double dw[] = {-0.038878481, 0.016228310, 0.117140130};
    struct sequence q;
    small_open(&q, cell_find("gru"), weight);
    q.doc = tensor_2d(must_allocate(4 * sizeof(int32_t)), DTYPE_I32, 1, 4);
    for (int i = 0; i < 4; i++) ((int32_t *)q.doc.data)[i] = i;
    forward(&q, sequential()); /* every token a document: Newton's guess */
    assert_numbers("guess", q.y, iterates[0]);
    forget(&q.doc);
    for (int k = 1; k <= 3; k++) {
        forward(&q, newton(k));
        assert_numbers("iterate", q.y, iterates[k]);
    }
    forward(&q, sequential());
    assert_numbers("y", q.y, iterates[3]);
    for (int64_t t = 1; t < 4; t++) {
        double got;
        jacobian_at(&q, t, &got);
        assert_close(got, J[t], 0, 6e-10, "J", t);
    }
    backward(&q);
    assert_numbers("du", q.du, du);
    assert_numbers("dweight", q.dweight, dw);
    sequence_close(&q);
}

static void lstm_by_hand(void **unused) {
    (void)unused;
    static const double weight[] = {0.4, -0.3, 0.5, 0.2, -0.25};
    static const double c[][4] = {{0.272065826, -0.085991536, 0.130619593, 0.279634729},
                                  {0.272065826, -0.085991536, 0.132277681, 0.281643172},
                                  {0.272065826, -0.085991536, 0.132277681, 0.281641805}};
    static const double h[][4] = {{0.121645160, -0.048960997, 0.079767334, 0.078546571},
                                  {0.121645160, -0.048960997, 0.084356738, 0.079565419},
                                  {0.121645160, -0.048960997, 0.084356738, 0.079564100}};
    static const double J[][4] = {{0},
                                  {0.430841884, 0.324638812, 0.246366867, 0.191941740},
                                  {0.692170353, 0.006441242, 0.431072759, -0.005062586},
                                  {0.235116877, 0.323232879, 0.059713354, 0.065143654}};
    static const double du[] = {-0.057664597, 0.064856344, 0.110146818, -0.005755293, 0.010531992, -0.021353375,
                                -0.056281007, 0.011502538, 0.049614366, -0.018387348, 0.112991946, 0.343079661};
    static const double dw[] = {0.000504374, 0.010249622, 0.023914377, 0.000841636, 0.050084317};
    struct sequence q;
    small_open(&q, cell_find("lstm"), weight);
    for (int k = 1; k <= 3; k++) {
        forward(&q, newton(k));
        assert_numbers("iterate of c", q.others, c[k - 1]);
        assert_numbers("iterate of h", q.y, h[k - 1]);
    }
    forward(&q, sequential());
    assert_numbers("c", q.others, c[2]);
    assert_numbers("h", q.y, h[2]);
    for (int64_t t = 1; t < 4; t++) {
        double got[4];
        jacobian_at(&q, t, got);
        for (int k = 0; k < 4; k++) assert_close(got[k], J[t][k], 0, 6e-10, "J", 4 * t + k);
    }
    backward(&q);
    assert_numbers("du", q.du, du);
    assert_numbers("dweight", q.dweight, dw);
    sequence_close(&q);
}

/* --- what has been reached ---------------------------------------------------------------------------------------- */

/* For every cell in the list and both types. */
static void each(void (*check)(const struct cell *cell, enum precision precision)) {
    for (int i = 0; i < CELL_COUNT; i++) {
        check(cells[i], PRECISION_F64);
        check(cells[i], PRECISION_F32);
    }
}

static void weights_within(struct sequence *q, double limit) {
    for (int64_t i = 0; i < tensor_count(q->weight); i++) set(q->weight, i, limit * uniform(3, i));
}

/* After k iterations the first k + 1 states are exact, those of a channel at a time. */
static void check_prefix(const struct cell *cell, enum precision precision) {
    enum { T = 24, LAST = 11 };
    struct sequence q;
    sequence_open(&q, precision, cell, 1, T, 1, 40);
    weights_within(&q, 1.4);
    forward(&q, sequential());
    double *y = copy_of(q.y);
    for (int k = 1; k <= LAST; k++) {
        forward(&q, newton(k));
        for (int64_t i = 0; i < (k + 1) * q.N; i++)
            assert_close(get(q.y, i), y[i], 0, 8 * unit_of(q.dev), "y", i);
        assert_true(k > 2 || distance(q.y, y) > 1e-4);
    }
    free(y);
    sequence_close(&q);
}

static void prefix(void **unused) {
    (void)unused;
    each(check_prefix);
}

/* As many iterations as there are unknowns: exact, whatever the weights. */
static void check_finite_end(const struct cell *cell, enum precision precision) {
    struct sequence q;
    sequence_open(&q, precision, cell, 2, 33, 1, 33);
    weights_within(&q, 2);
    forward(&q, sequential());
    double *y = copy_of(q.y), *final = copy_of(q.final);
    assert_true(q.report.residual == 0);
    const struct cell_solver solvers[] = {newton(32), newton(40), shooting(1, 32), shooting(4, 8), shooting(33, 1),
                                          shooting(100, 1)};
    for (int i = 0; i < 6; i++) {
        q.report.residual = 0;
        forward(&q, solvers[i]);
        assert_true(distance(q.y, y) < 64 * unit_of(q.dev));
        assert_true(distance(q.final, final) < 64 * unit_of(q.dev));
        assert_true(q.report.residual < 64 * unit_of(q.dev));
    }
    free(y);
    free(final);
    sequence_close(&q);
}

static void finite_end(void **unused) {
    (void)unused;
    each(check_finite_end);
}

/* Without weights nothing of the GRU is nonlinear in the state: one iteration. Of the LSTM's states h is a function of
 * the new c, so that it comes one later. */
static void no_weights(void **unused) {
    (void)unused;
    for (int i = 0; i < 2; i++) {
        struct sequence q;
        sequence_open(&q, PRECISION_F64, cell_find(i ? "lstm" : "gru"), 1, 50, 1, 20);
        weights_within(&q, 0);
        forward(&q, sequential());
        double *y = copy_of(q.y), *c = i ? copy_of(q.others) : NULL;
        forward(&q, newton(1));
        assert_true(i ? distance(q.others, c) < 1e-15 && distance(q.y, y) > 1e-3 : distance(q.y, y) < 1e-15);
        forward(&q, newton(2));
        assert_true(distance(q.y, y) < 1e-15);
        free(y);
        free(c);
        sequence_close(&q);
    }
}

/* What a cell's header promises of CELL_LIMIT: three iterations are enough. Chunks that are longer need fewer. */
static void check_three(const struct cell *cell, enum precision precision) {
    struct sequence q;
    sequence_open(&q, precision, cell, 1, 2048, 1, 256);
    forward(&q, sequential());
    double *y = copy_of(q.y);
    for (int bounded = 0; bounded < 2; bounded++) {
        struct cell_solver solver = newton(3);
        solver.bounded = bounded;
        q.report.residual = 0;
        forward(&q, solver);
        assert_true(distance(q.y, y) <= 1e-5);
        assert_true(q.report.residual > 0 && q.report.residual <= 1e-3);
    }
    static const double after[3] = {5e-3, 5e-5, 1e-6}; /* iterations of chunks of 16, with room for other cells */
    for (int k = 1; k <= 3; k++) {
        q.report.residual = 0;
        forward(&q, shooting(16, k));
        assert_true(distance(q.y, y) <= after[k - 1]);
        assert_true(q.report.residual <= 2 * after[k - 1]);
    }
    free(y);
    sequence_close(&q);
}

static void three_iterations(void **unused) {
    (void)unused;
    each(check_three);
}

/* A cell that says of itself that it is linear gets one iteration. */
static void linear(void **unused) {
    (void)unused;
    struct sequence q;
    struct cell cell = *cell_find("gru");
    sequence_open(&q, PRECISION_F64, &cell, 1, 20, 1, 4);
    forward(&q, newton(1));
    double *y = copy_of(q.y);
    forward(&q, newton(3));
    assert_true(distance(q.y, y) > 0);
    cell.linear = true;
    forward(&q, newton(3));
    assert_true(distance(q.y, y) == 0);
    free(y);
    sequence_close(&q);
}

/* Nothing but quadratic: from 2e-3 to 6e-7 to 8e-14 (docs/pararnn.md), which a Jacobian with a mistake does not do. */
static void quadratic(void **unused) {
    (void)unused;
    for (int i = 0; i < CELL_COUNT; i++) {
        struct sequence q;
        double wrong[2][6] = {{0}};
        sequence_open(&q, PRECISION_F64, cells[i], 1, 512, 1, 128);
        forward(&q, sequential());
        double *y = copy_of(q.y);
        for (int k = 1; k <= 5; k++) {
            forward(&q, newton(k));
            wrong[0][k] = distance(q.y, y);
            forward(&q, shooting(4, k));
            wrong[1][k] = distance(q.y, y);
        }
        for (int m = 0; m < 2; m++)
            for (int k = 1; k < 5; k++)
                if (wrong[m][k] < 0.05) assert_true(wrong[m][k + 1] <= 8 * wrong[m][k] * wrong[m][k] + 1e-14);
        assert_true(wrong[0][5] < 1e-13 && wrong[1][4] < 1e-13);
        free(y);
        sequence_close(&q);
    }
}

/* Nothing unknown lies behind a document's start: Newton needs as many iterations as the longest document has tokens
 * but one; and where a document starts in every chunk, the chunks' ends don't answer to their starts, so that one is
 * enough. */
static void check_documents(const struct cell *cell, enum precision precision) {
    enum { T = 60 };
    struct sequence q;
    sequence_open(&q, precision, cell, 1, T, 1, 40);
    weights_within(&q, 1.4);
    q.doc = tensor_2d(must_allocate(T * sizeof(int32_t)), DTYPE_I32, 1, T);
    for (int t = 0; t < T; t++) ((int32_t *)q.doc.data)[t] = (t + 4) / 8;
    forward(&q, sequential());
    double *y = copy_of(q.y);
    forward(&q, newton(7));
    assert_true(distance(q.y, y) < 16 * unit_of(q.dev));
    forward(&q, newton(2));
    assert_true(distance(q.y, y) > 1e-4);
    forward(&q, shooting(8, 1));
    assert_true(distance(q.y, y) < 16 * unit_of(q.dev));
    for (int t = 0; t < T; t++) ((int32_t *)q.doc.data)[t] = t / 8; /* chunks that are documents */
    forward(&q, sequential());
    free(y);
    y = copy_of(q.y);
    q.report.residual = 0;
    forward(&q, shooting(8, 1));
    assert_true(distance(q.y, y) == 0 && q.report.residual == 0);
    free(y);
    sequence_close(&q);
}

static void documents(void **unused) {
    (void)unused;
    each(check_documents);
}

/* One chunk a token: the unknowns are Newton's, and what is written is one step from them. */
static void chunks_of_one(void **unused) {
    (void)unused;
    for (int i = 0; i < CELL_COUNT; i++) {
        struct sequence q;
        sequence_open(&q, PRECISION_F64, cells[i], 1, 20, 1, 1);
        const struct cell *c = q.cell;
        if (c->states > 1) { /* whose Newton takes another Jacobian */
            sequence_close(&q);
            continue;
        }
        forward(&q, newton(2));
        double *iterate = copy_of(q.y);
        forward(&q, shooting(1, 2));
        for (int64_t t = 1; t < q.T; t++) {
            double u[U_MAX], w[W_MAX], after[S_MAX];
            for (int k = 0; k < c->inputs; k++) u[k] = get(q.u, t * c->inputs + k) + get(q.bias, k);
            for (int k = 0; k < c->weights; k++) w[k] = get(q.weight, k);
            c->own.step(&iterate[t - 1], u, w, after);
            assert_close(get(q.y, t), after[0], 0, 1e-15, "y", t);
        }
        free(iterate);
        sequence_close(&q);
    }
}

/* --- reports ------------------------------------------------------------------------------------------------------ */

/* Newton: the square of the residual before the last iteration; shooting: what chunks' ends and starts differ by.
 * Neither forgets what was there before. */
static void reports(void **unused) {
    (void)unused;
    struct sequence q;
    sequence_open(&q, PRECISION_F64, cell_find("mgru"), 1, 30, 1, 1);
    const struct cell *c = q.cell;
    forward(&q, newton(1));
    double *iterate = copy_of(q.y), most = 0;
    q.report.residual = 0;
    forward(&q, newton(2));
    for (int64_t t = 1; t < q.T; t++) {
        double u[U_MAX], w[W_MAX], after[S_MAX];
        for (int k = 0; k < c->inputs; k++) u[k] = get(q.u, t * c->inputs + k) + get(q.bias, k);
        for (int k = 0; k < c->weights; k++) w[k] = get(q.weight, k);
        c->own.step(&iterate[t - 1], u, w, after);
        most = fmax(most, fabs(after[0] - iterate[t]));
    }
    assert_true(most > 1e-3);
    assert_close(q.report.residual, most * most, 1e-6, 0, "residual", 0);
    free(iterate);

    q.report.residual = 0;
    forward(&q, shooting(7, 1));
    assert_true(q.report.residual > 0 && q.report.residual < 0.1);
    q.report.residual = 0.5;
    q.report.unused = 3;
    forward(&q, shooting(7, 2));
    assert_true(q.report.residual == 0.5f && q.report.unused == 3);
    q.report.residual = 0;
    forward(&q, sequential());
    assert_true(q.report.residual == 0);
    sequence_close(&q);
}

/* What is not finite is reported so by every method, also where the bound cuts it off or a document ends it. */
static void not_finite(void **unused) {
    (void)unused;
    const struct cell_solver solvers[] = {sequential(), newton(3), shooting(4, 2)};
    for (int i = 0; i < 3; i++) {
        for (int bounded = 0; bounded < 2; bounded++) {
            struct sequence q;
            struct cell_solver solver = solvers[i];
            solver.bounded = bounded;
            sequence_open(&q, PRECISION_F32, cell_find("lstm"), 1, 16, 1, 40);
            q.doc = tensor_2d(must_allocate(16 * sizeof(int32_t)), DTYPE_I32, 1, 16);
            for (int t = 0; t < 16; t++) ((int32_t *)q.doc.data)[t] = t >= 9;
            set(q.u, (5 * 3 + 2) * 40 + 37, NAN); /* token 5, candidate of channel 37 */
            forward(&q, solver);
            assert_true(isinf(q.report.residual));
            assert_true(isnan(get(q.y, 5 * 40 + 37)) && isfinite(get(q.y, 9 * 40 + 37)));
            assert_true(isfinite(get(q.y, 5 * 40 + 36)));
            sequence_close(&q);
        }
    }
}

/* Iterates that leave the bound don't where they are kept in it, and the solution is the same. */
static void bounds(void **unused) {
    (void)unused;
    for (int i = 0; i < CELL_COUNT; i++) {
        struct sequence q;
        bool left = false;
        if (cells[i]->bound == 0) continue;
        sequence_open(&q, PRECISION_F64, cells[i], 1, 200, 1, 64);
        weights_within(&q, 2);
        forward(&q, sequential());
        double *y = copy_of(q.y);
        for (int method = 1; method <= 2; method++) {
            for (int k = 1; k <= 4; k++) {
                struct cell_solver solver = method == 1 ? newton(k) : shooting(2, k);
                forward(&q, solver);
                double *free_y = copy_of(q.y);
                for (int64_t n = 0; n < tensor_count(q.y); n++) left |= fabs(get(q.y, n)) > q.cell->bound;
                solver.bounded = true;
                forward(&q, solver);
                for (int64_t n = 0; method == 1 && k == 1 && n < tensor_count(q.y); n++) /* the same corrections, cut */
                    assert_true(get(q.y, n) == fmax(-q.cell->bound, fmin(q.cell->bound, free_y[n])));
                free(free_y);
                for (int64_t n = 0; n < tensor_count(q.y); n++) assert_true(fabs(get(q.y, n)) <= q.cell->bound);
                for (int64_t n = 0; n < tensor_count(q.final); n++)
                    assert_true(fabs(get(q.final, n)) <= q.cell->bound);
            }
        }
        assert_true(left);
        struct cell_solver solver = newton(199);
        solver.bounded = true;
        forward(&q, solver);
        assert_true(distance(q.y, y) < 1e-12);
        free(y);
        sequence_close(&q);
    }
}

/* --- views, threads, sizes ---------------------------------------------------------------------------------------- */

/* u and du may lie in any order of dimensions but the last. */
static void views(void **unused) {
    (void)unused;
    struct sequence q;
    sequence_open(&q, PRECISION_F32, cell_find("lstm"), 2, 5, 3, 7);
    forward(&q, sequential());
    backward(&q);
    double *y = copy_of(q.y), *du = copy_of(q.du), *dweight = copy_of(q.dweight);
    int64_t U = q.cell->inputs, stride[5] = {7 + 1, 2 * U * 8 * 3, 2 * 8, 2 * 3 * 8, 1}; /* T, U, H, B, P */
    float *pieces[2] = {must_allocate(5 * 2 * 3 * 3 * 8 * 4), must_allocate(5 * 2 * 3 * 3 * 8 * 4)};
    tensor views[2] = {q.u, q.du};
    for (int k = 0; k < 2; k++) {
        views[k].data = pieces[k];
        memcpy(views[k].stride, stride, sizeof stride);
    }
    for (int64_t i = 0; i < tensor_count(q.u); i++) {
        int64_t at = i % 7 + i / 7 % U * stride[3] + i / 7 / U % 3 * stride[2] + i / 7 / U / 3 % 5 * stride[1] +
                     i / 7 / U / 15 * stride[0];
        pieces[0][at] = ((float *)q.u.data)[i];
    }
    struct sequence v = q;
    v.u = views[0], v.du = views[1];
    for (int64_t i = 0; i < tensor_count(q.dweight); i++) set(q.dweight, i, 0);
    forward(&v, sequential());
    backward(&v);
    assert_true(distance(q.y, y) == 0);
    assert_true(distance(q.dweight, dweight) == 0);
    for (int64_t i = 0; i < tensor_count(q.u); i++) {
        int64_t at = i % 7 + i / 7 % U * stride[3] + i / 7 / U % 3 * stride[2] + i / 7 / U / 3 % 5 * stride[1] +
                     i / 7 / U / 15 * stride[0];
        assert_true((double)pieces[1][at] == du[i]);
    }
    free(pieces[0]);
    free(pieces[1]);
    free(y);
    free(du);
    free(dweight);
    sequence_close(&q);
}

/* A bias is nothing but a part of the pre-activations. */
static void biases(void **unused) {
    (void)unused;
    struct sequence q;
    sequence_open(&q, PRECISION_F64, cell_find("gru"), 2, 6, 2, 3);
    forward(&q, sequential());
    double *y = copy_of(q.y);
    for (int64_t i = 0; i < tensor_count(q.u); i++) {
        int64_t j = i % 3, gate = i / 3 % 3, head = i / 9 % 2;
        set(q.u, i, get(q.u, i) + get(q.bias, gate * 6 + head * 3 + j));
    }
    forget(&q.bias);
    forward(&q, sequential());
    assert_true(distance(q.y, y) < 1e-15);
    free(y);
    sequence_close(&q);
}

static void threads(void **unused) {
    (void)unused;
#ifdef RIVERRUN_OPENMP
    int before = omp_get_max_threads();
    const struct cell_solver solvers[] = {sequential(), newton(2), shooting(8, 1)};
    for (int i = 0; i < 3; i++) {
        struct sequence one, more;
        omp_set_num_threads(1);
        sequence_open(&one, PRECISION_F32, cell_find("gru"), 3, 70, 2, 90);
        forward(&one, solvers[i]);
        backward(&one);
        omp_set_num_threads(3);
        sequence_open(&more, PRECISION_F32, cell_find("gru"), 3, 70, 2, 90);
        forward(&more, solvers[i]);
        backward(&more);
        const tensor a[] = {one.y, one.final, one.du, one.dbias, one.dweight, one.dinitial};
        const tensor b[] = {more.y, more.final, more.du, more.dbias, more.dweight, more.dinitial};
        for (int k = 0; k < 6; k++) assert_memory_equal(a[k].data, b[k].data, (size_t)tensor_count(a[k]) * 4);
        assert_true(one.report.residual == more.report.residual);
        sequence_close(&one);
        sequence_close(&more);
    }
    omp_set_num_threads(before);
#else
    skip();
#endif
}

/* Memory is planned from the largest shape that comes. */
static void scratch_sizes(void **unused) {
    (void)unused;
    struct device *dev = open_cpu(PRECISION_F32);
    for (int i = 0; i < CELL_COUNT; i++) {
        struct cell_shape small = {2, 40, 50, cells[i]}, more_rows = small, longer = small;
        more_rows.B++, longer.T++;
        const struct cell_solver solvers[] = {sequential(), newton(3), shooting(0, 3), shooting(7, 3)};
        for (int k = 0; k < 4; k++) {
            size_t size = dev->ops->cell_forward_scratch(small, solvers[k]);
            assert_true(dev->ops->cell_forward_scratch(more_rows, solvers[k]) >= size);
            assert_true(dev->ops->cell_forward_scratch(longer, solvers[k]) >= size);
        }
        assert_true(dev->ops->cell_backward_scratch(more_rows) >= dev->ops->cell_backward_scratch(small));
        assert_true(dev->ops->cell_backward_scratch(longer) >= dev->ops->cell_backward_scratch(small));
        assert_int_equal(dev->ops->cell_choose(small).method, CELL_SEQUENTIAL);
    }
    device_close(dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(list), cmocka_unit_test(derivatives), cmocka_unit_test(extremes),
        cmocka_unit_test(gru_by_hand), cmocka_unit_test(lstm_by_hand), cmocka_unit_test(prefix),
        cmocka_unit_test(finite_end), cmocka_unit_test(no_weights), cmocka_unit_test(three_iterations),
        cmocka_unit_test(quadratic), cmocka_unit_test(linear), cmocka_unit_test(documents),
        cmocka_unit_test(chunks_of_one), cmocka_unit_test(reports), cmocka_unit_test(not_finite),
        cmocka_unit_test(bounds), cmocka_unit_test(views), cmocka_unit_test(biases), cmocka_unit_test(threads),
        cmocka_unit_test(scratch_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
