/* test/test_kernels_slstm.c: the sLSTM on the CPU against its equations written again as they are printed, without a
 * stabiliser: C and N with gates exp(i) and sigmoid(f), y = sigmoid(o) C / N; the gradient through time written again
 * from those; numbers worked out by hand; clipping; other numbers of threads. The case table (test/ops_slstm.c) covers
 * shapes, documents and finite differences.
 */
#include "common/rng.h"
#include "kernels/device.h"
#include "test/unit.h"

#include <math.h>
#include <string.h>
#ifdef RIVERRUN_OPENMP
#include <omp.h>
#endif

enum { B = 2, T = 9, H = 2, P = 3, D = H * P, GATES = 4 };

/* A problem and its results, in double. */
struct problem {
    double x[B][T][GATES][D], r[H][GATES][P][P], bias[GATES][D], initial[B][4][D], dy[B][T][D], dfinal[B][4][D];
    int32_t doc[B][T];
    double clip;
    double y[B][T][D], final[B][4][D];
    double dx[B][T][GATES][D], dr[H][GATES][P][P], dbias[GATES][D], dinitial[B][4][D];
};

static void fill(double *to, size_t size, uint32_t stream, double scale) {
    rng_key key = {.seed = 1, .purpose = RNG_TEST, .stream = stream};
    for (size_t i = 0; i < size / sizeof *to; i++) to[i] = scale * rng_normal(key, i);
}

/* Documents start at token 4 of row 0 and at tokens 0 and 7 of row 1. */
static void problem_open(struct problem *p) {
    memset(p, 0, sizeof *p);
    fill(&p->x[0][0][0][0], sizeof p->x, 0, 1.5);
    fill(&p->r[0][0][0][0], sizeof p->r, 1, 0.6);
    fill(&p->bias[0][0], sizeof p->bias, 2, 1);
    fill(&p->initial[0][0][0], sizeof p->initial, 3, 1);
    fill(&p->dy[0][0][0], sizeof p->dy, 4, 1);
    fill(&p->dfinal[0][0][0], sizeof p->dfinal, 5, 1);
    for (int b = 0; b < B; b++)
        for (int j = 0; j < D; j++) p->initial[b][2][j] = 0.3 + fabs(p->initial[b][2][j]);
    for (int t = 0; t < T; t++) {
        p->doc[0][t] = t >= 4;
        p->doc[1][t] = t >= 7 ? 3 : 1;
    }
}

/* By the operation. */
static void solve(struct problem *p) {
    struct device *dev;
    error err = {0};
    struct slstm_shape s = {B, T, H, P};
    const enum dtype f64 = DTYPE_F64;
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F64, &err), 0);
    const struct ops *ops = dev->ops;
    void *saved = test_malloc(ops->slstm_saved(s)), *forward = test_malloc(ops->slstm_forward_scratch(s));
    void *backward = test_malloc(ops->slstm_backward_scratch(s));
    tensor x = tensor_3d(p->x, f64, B, T, GATES * D), r = tensor_3d(p->r, f64, H, GATES * P, P);
    tensor bias = tensor_2d(p->bias, f64, GATES, D), initial = tensor_3d(p->initial, f64, B, 4, D);
    tensor doc = tensor_2d(p->doc, DTYPE_I32, B, T), y = tensor_3d(p->y, f64, B, T, D);
    memset(p->dr, 0, sizeof p->dr);
    memset(p->dbias, 0, sizeof p->dbias);
    ops->slstm_forward(dev, y, tensor_3d(p->final, f64, B, 4, D), saved, x, r, bias, initial, doc, forward);
    ops->slstm_backward(dev, tensor_3d(p->dx, f64, B, T, GATES * D), tensor_3d(p->dr, f64, H, GATES * P, P),
                        tensor_2d(p->dbias, f64, GATES, D), tensor_3d(p->dinitial, f64, B, 4, D),
                        tensor_3d(p->dy, f64, B, T, D), tensor_3d(p->dfinal, f64, B, 4, D), saved, y, x, r, bias,
                        initial, doc, p->clip, backward);
    test_free(saved);
    test_free(forward);
    test_free(backward);
    device_close(dev);
}

/* --- the equations again ------------------------------------------------------------------------------------------ */

/* What one row goes through: [t+1] is after token t, [0] the initial state. C and N are not stabilised. */
struct course {
    double y[T + 1][D], C[T + 1][D], N[T + 1][D], raw[T][GATES][D];
};

static double squash(double v) {
    return 1 / (1 + exp(-v));
}

static bool begins(const struct problem *p, int b, int t) {
    return p->doc[b][t] != (t > 0 ? p->doc[b][t - 1] : 0);
}

/* State t as token t finds it: cleared where a document starts. */
static double found(const struct problem *p, int b, int t, double v) {
    return begins(p, b, t) ? 0 : v;
}

static void run_row(const struct problem *p, int b, struct course *c) {
    for (int j = 0; j < D; j++) {
        double scale = exp(p->initial[b][3][j]);
        c->y[0][j] = p->initial[b][0][j];
        c->C[0][j] = p->initial[b][1][j] * scale;
        c->N[0][j] = p->initial[b][2][j] * scale;
    }
    for (int t = 0; t < T; t++)
        for (int j = 0; j < D; j++) {
            double *raw[GATES];
            for (int g = 0; g < GATES; g++) {
                raw[g] = &c->raw[t][g][j];
                *raw[g] = p->x[b][t][g][j] + p->bias[g][j];
                for (int k = 0; k < P; k++)
                    *raw[g] += p->r[j / P][g][j % P][k] * found(p, b, t, c->y[t][j / P * P + k]);
            }
            c->C[t + 1][j] = squash(*raw[1]) * found(p, b, t, c->C[t][j]) + exp(*raw[0]) * tanh(*raw[2]);
            c->N[t + 1][j] = squash(*raw[1]) * found(p, b, t, c->N[t][j]) + exp(*raw[0]);
            c->y[t + 1][j] = squash(*raw[3]) * c->C[t + 1][j] / c->N[t + 1][j];
        }
}

/* The chain rule applied to run_row; m of a state is held fixed, so a gradient of c is one of C times exp(m). */
static void run_row_back(struct problem *p, int b, const struct course *c, double dr[H][GATES][P][P],
                         double dbias[GATES][D], double dx[T][GATES][D], double dinitial[3][D]) {
    double dy[D], dC[D], dN[D];
    for (int j = 0; j < D; j++) {
        double scale = exp(-p->final[b][3][j]);
        dy[j] = p->dfinal[b][0][j], dC[j] = p->dfinal[b][1][j] * scale, dN[j] = p->dfinal[b][2][j] * scale;
    }
    for (int t = T - 1; t >= 0; t--) {
        double to_y[D] = {0};
        for (int j = 0; j < D; j++) {
            const double i = c->raw[t][0][j], f = c->raw[t][1][j], z = c->raw[t][2][j], o = c->raw[t][3][j];
            double whole = dy[j] + p->dy[b][t][j], C = c->C[t + 1][j], N = c->N[t + 1][j];
            dC[j] += whole * squash(o) / N;
            dN[j] -= whole * squash(o) * C / (N * N);
            double d[GATES] = {
                exp(i) * (tanh(z) * dC[j] + dN[j]),
                squash(f) * squash(-f) * (found(p, b, t, c->C[t][j]) * dC[j] + found(p, b, t, c->N[t][j]) * dN[j]),
                exp(i) * dC[j] / (cosh(z) * cosh(z)),
                squash(o) * squash(-o) * whole * C / N,
            };
            for (int g = 0; g < GATES; g++) {
                dx[t][g][j] = d[g];
                dbias[g][j] += d[g];
                for (int k = 0; k < P; k++) {
                    dr[j / P][g][j % P][k] += d[g] * found(p, b, t, c->y[t][j / P * P + k]);
                    to_y[j / P * P + k] += d[g] * p->r[j / P][g][j % P][k];
                }
            }
            dC[j] = found(p, b, t, dC[j] * squash(f));
            dN[j] = found(p, b, t, dN[j] * squash(f));
        }
        for (int j = 0; j < D; j++) {
            double v = p->clip > 0 ? fmax(-p->clip, fmin(p->clip, to_y[j])) : to_y[j];
            dy[j] = found(p, b, t, v);
        }
    }
    for (int j = 0; j < D; j++) {
        double scale = exp(p->initial[b][3][j]);
        dinitial[0][j] = dy[j], dinitial[1][j] = dC[j] * scale, dinitial[2][j] = dN[j] * scale;
    }
}

/* --- tests -------------------------------------------------------------------------------------------------------- */

static void assert_near(const char *what, const double *got, const double *want, size_t size) {
    for (size_t i = 0; i < size / sizeof *got; i++)
        if (!(fabs(got[i] - want[i]) <= 1e-11 * (1 + fabs(want[i]))))
            fail_msg("%s[%zu] is %.15g, should be %.15g", what, i, got[i], want[i]);
}

static void assert_equations(struct problem *p) {
    static struct course c;
    double dr[H][GATES][P][P] = {{{{0}}}}, dbias[GATES][D] = {{0}}, dx[T][GATES][D], dinitial[3][D];
    solve(p);
    for (int b = 0; b < B; b++) {
        run_row(p, b, &c);
        run_row_back(p, b, &c, dr, dbias, dx, dinitial);
        assert_near("y", &p->y[b][0][0], &c.y[1][0], sizeof p->y[b]);
        assert_near("final y", p->final[b][0], c.y[T], sizeof c.y[T]);
        for (int j = 0; j < D; j++) {
            double scale = exp(p->final[b][3][j]), stabilised[2] = {p->final[b][1][j] * scale,
                                                                    p->final[b][2][j] * scale};
            assert_near("final c", &stabilised[0], &c.C[T][j], sizeof(double));
            assert_near("final n", &stabilised[1], &c.N[T][j], sizeof(double));
            assert_true(p->dinitial[b][3][j] == 0);
        }
        assert_near("dx", &p->dx[b][0][0][0], &dx[0][0][0], sizeof dx);
        assert_near("dinitial", p->dinitial[b][0], dinitial[0], sizeof dinitial);
    }
    assert_near("dr", &p->dr[0][0][0][0], &dr[0][0][0][0], sizeof dr);
    assert_near("dbias", p->dbias[0], dbias[0], sizeof dbias);
}

static void equations(void **unused) {
    (void)unused;
    struct problem p;
    problem_open(&p);
    assert_equations(&p);
}

/* Most of what goes back through r is beyond the clip, some is not. */
static void clipped(void **unused) {
    (void)unused;
    struct problem p;
    problem_open(&p);
    for (p.clip = 0.01; p.clip < 100; p.clip *= 10) assert_equations(&p);
}

/* The first token after n = 0, then one on which the forget gate wins; one row of the numbers is on paper. */
static void by_hand(void **unused) {
    (void)unused;
    static struct problem p;
    problem_open(&p);
    memset(p.r, 0, sizeof p.r);
    memset(p.bias, 0, sizeof p.bias);
    memset(p.initial, 0, sizeof p.initial);
    memset(p.doc, 0, sizeof p.doc);
    memset(p.x, 0, sizeof p.x);
    p.x[0][0][0][0] = -3, p.x[0][0][2][0] = 1000; /* i = -3, z = 1, o = 1/2: n = 1, c = 1, y = 1/2 */
    p.x[0][1][0][0] = -1000, p.x[0][1][1][0] = 0; /* nothing new, half is kept: c / n stays 1 */
    solve(&p);
    assert_true(fabs(p.y[0][0][0] - 0.5) < 1e-15);
    assert_true(fabs(p.y[0][1][0] - 0.5) < 1e-15);
    assert_true(fabs(p.y[0][2][0] - 0.5 * exp(-3) / 4 / (exp(-3) / 4 + 1)) < 1e-15); /* i = 0, z = 0 */
    assert_true(p.y[1][0][0] == 0);
}

/* Gates beyond what exp can hold. */
static void extremes(void **unused) {
    (void)unused;
    static struct problem p;
    static const double numbers[] = {0, 3e4, -3e4, 800, -800, 1e-300, 36, -36};
    problem_open(&p);
    for (size_t i = 0; i < sizeof p.x / sizeof(double); i++) (&p.x[0][0][0][0])[i] = numbers[i * 5 / 3 % 8];
    solve(&p);
    const double *results[] = {&p.y[0][0][0], &p.final[0][0][0], &p.dx[0][0][0][0], &p.dr[0][0][0][0],
                               &p.dinitial[0][0][0]};
    const size_t sizes[] = {sizeof p.y, sizeof p.final, sizeof p.dx, sizeof p.dr, sizeof p.dinitial};
    for (int k = 0; k < 5; k++)
        for (size_t i = 0; i < sizes[k] / sizeof(double); i++) assert_true(isfinite(results[k][i]));
}

static void threads(void **unused) {
    (void)unused;
#ifdef RIVERRUN_OPENMP
    static struct problem one, more;
    int before = omp_get_max_threads();
    problem_open(&one);
    problem_open(&more);
    omp_set_num_threads(1);
    solve(&one);
    omp_set_num_threads(3);
    solve(&more);
    omp_set_num_threads(before);
    assert_memory_equal(&one, &more, sizeof one);
#else
    skip();
#endif
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equations), cmocka_unit_test(clipped), cmocka_unit_test(by_hand), cmocka_unit_test(extremes),
        cmocka_unit_test(threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
