/* test/test_kernels_scan.c: the selective scan on the CPU against numbers worked out by hand, against SSD, and against
 * itself with other numbers of threads. The case table (test/ops_scan.c) covers shapes, documents and gradients.
 */
#include "common/rng.h"
#include "kernels/device.h"
#include "test/unit.h"

#include <math.h>
#ifdef RIVERRUN_OPENMP
#include <omp.h>
#endif

/* --- a problem on a device ---------------------------------------------------------------------------------------- */

enum member { X, RAW, Z, B_IN, C_IN, BIAS, A_LOG, SKIP, INITIAL, Y, FINAL, MEMBERS };

static const char *const names[MEMBERS] = {"x",    "raw",   "z",      "b",       "c",    "bias",
                                           "A_log", "d",     "initial", "g",       "final"};

/* Values and gradients of everything, in the device's real type. Those of Y and FINAL go in, the others come out. */
struct problem {
    struct scan_shape s;
    enum dtype dtype;
    tensor value[MEMBERS], gradient[MEMBERS], doc;
};

static tensor member_shape(struct scan_shape s, enum member m, void *data, enum dtype dtype) {
    switch (m) {
    case B_IN:
    case C_IN: return tensor_3d(data, dtype, s.B, s.T, s.N);
    case BIAS:
    case SKIP: return tensor_1d(data, dtype, s.D);
    case A_LOG: return tensor_2d(data, dtype, s.D, s.N);
    case INITIAL:
    case FINAL: return tensor_3d(data, dtype, s.B, s.D, s.N);
    default: return tensor_3d(data, dtype, s.B, s.T, s.D);
    }
}

static void put(tensor t, int64_t i, double value) {
    if (t.dtype == DTYPE_F64) ((double *)t.data)[i] = value;
    else ((float *)t.data)[i] = (float)value;
}

static double get(tensor t, int64_t i) {
    return t.dtype == DTYPE_F64 ? ((double *)t.data)[i] : ((float *)t.data)[i];
}

/* Everything random, one document a row; gradients of parameters, which are added to, start at 0. */
static void problem_open(struct problem *p, struct scan_shape s, enum dtype dtype) {
    *p = (struct problem){.s = s, .dtype = dtype};
    p->doc = tensor_2d(test_calloc((size_t)(s.B * s.T), sizeof(int32_t)), DTYPE_I32, s.B, s.T);
    for (int m = 0; m < MEMBERS; m++) {
        int64_t count = tensor_count(member_shape(s, (enum member)m, p, dtype));
        for (int g = 0; g < 2; g++) {
            tensor *t = g ? &p->gradient[m] : &p->value[m];
            *t = member_shape(s, (enum member)m, test_calloc((size_t)count, dtype_size(dtype)), dtype);
            rng_key key = {1, RNG_TEST, (uint32_t)(100 * g + m)};
            for (int64_t i = 0; i < count && !(g && m < Y); i++) put(*t, i, (float)rng_normal(key, (uint64_t)i));
        }
    }
}

static void problem_close(struct problem *p) {
    test_free(p->doc.data);
    for (int m = 0; m < MEMBERS; m++) {
        test_free(p->value[m].data);
        test_free(p->gradient[m].data);
    }
}

static void problem_solve(struct problem *p) {
    struct device *dev;
    error err = {0};
    tensor *v = p->value, *g = p->gradient;
    assert_int_equal(device_open(&dev, DEVICE_CPU, p->dtype == DTYPE_F64 ? PRECISION_F64 : PRECISION_F32, &err), 0);
    const struct ops *ops = dev->ops;
    void *saved = test_malloc(ops->scan_saved(p->s)), *forward = test_malloc(ops->scan_forward_scratch(p->s));
    void *backward = test_malloc(ops->scan_backward_scratch(p->s));
    ops->scan_forward(dev, v[Y], v[FINAL], saved, v[X], v[RAW], v[BIAS], v[A_LOG], v[B_IN], v[C_IN], v[SKIP], v[Z],
                      v[INITIAL], p->doc, forward);
    ops->scan_backward(dev, g[X], g[RAW], g[B_IN], g[C_IN], g[Z], g[INITIAL], g[BIAS], g[A_LOG], g[SKIP], g[Y],
                       g[FINAL], saved, v[X], v[RAW], v[BIAS], v[A_LOG], v[B_IN], v[C_IN], v[SKIP], v[Z], v[INITIAL],
                       p->doc, backward);
    test_free(saved);
    test_free(forward);
    test_free(backward);
    device_close(dev);
}

/* ||a - b|| / ||b||; the two zero: 0. */
static double distance(tensor a, tensor b) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < tensor_count(b); i++) {
        difference += (get(a, i) - get(b, i)) * (get(a, i) - get(b, i));
        size += get(b, i) * get(b, i);
    }
    return difference == 0 ? 0 : sqrt(difference / size);
}

/* Results of a problem: values of what forward gives, gradients of what it takes. */
static tensor result(struct problem *p, int m) {
    return m >= Y ? p->value[m] : p->gradient[m];
}

/* --- numbers worked out by hand ----------------------------------------------------------------------------------- */

/* One channel, two states, three tokens; the loss is the sum of the results. */
static const struct {
    enum member member;
    bool given;
    double numbers[6];
} hand[] = {
    {X, true, {1, -2, 0.5}},
    {RAW, true, {0.1, -0.3, 0.7}},
    {Z, true, {0.3, -0.6, 1.2}},
    {B_IN, true, {1, 0.5, -0.5, 1, 0.25, -1}},
    {C_IN, true, {0.5, -1, 1, 1, -0.25, 0.75}},
    {BIAS, true, {-0.2}},
    {A_LOG, true, {0, 0.693147180559945309}},
    {SKIP, true, {0.5}},
    {INITIAL, true, {0, 0}},
    {Y, false, {0.086166378, 0.201578059, -0.291736564}},
    {FINAL, false, {0.452178572, -0.604391508}},
    {X, false, {-0.048260506, -0.089327283, -0.268772376}},
    {RAW, false, {-0.099093573, 0.029087322, -0.084738890}},
    {BIAS, false, {-0.154745141}},
    {B_IN, false, {-0.064667911, -0.139517946, 0.284115308, 0.108106004, -0.112290346, 0.336871037}},
    {C_IN, false, {0.111050652, 0.055525326, -0.186070345, 0.175042188, 0.417012527, -0.557387824}},
    {A_LOG, false, {0.131186563, 0.171627018}},
    {SKIP, false, {1.058660058}},
    {Z, false, {0.323890005, -0.205813287, -0.310643588}},
};

static void by_hand(void **unused) {
    (void)unused;
    enum { LINES = sizeof hand / sizeof *hand };
    struct problem p;
    problem_open(&p, (struct scan_shape){1, 3, 1, 2}, DTYPE_F64);
    for (int k = 0; k < LINES; k++)
        for (int64_t i = 0; hand[k].given && i < tensor_count(p.value[hand[k].member]); i++)
            put(p.value[hand[k].member], i, hand[k].numbers[i]);
    for (int64_t i = 0; i < 3; i++) put(p.gradient[Y], i, 1);
    for (int64_t i = 0; i < 2; i++) put(p.gradient[FINAL], i, 0);
    problem_solve(&p);
    for (int k = 0; k < LINES; k++) {
        tensor got = result(&p, hand[k].member);
        for (int64_t i = 0; !hand[k].given && i < tensor_count(got); i++)
            if (!(fabs(get(got, i) - hand[k].numbers[i]) <= 1.5e-9)) /* printed to nine digits */
                fail_msg("%s[%lld] is %.10f, by hand %.10f", names[hand[k].member], (long long)i, get(got, i),
                         hand[k].numbers[i]);
    }
    problem_close(&p);
}

/* --- against SSD -------------------------------------------------------------------------------------------------- */

/* SSD with heads of P channels, whose decay and step the scan's channels repeat: the same recurrence by another
 * algorithm. The step sizes of the heads are those of their first channels. */
struct ssd_problem {
    struct ssd_shape s;
    tensor x, dt, a, b, c, d, initial, y, final, dx, ddt, da, db, dc, dd, dinitial, dy, dfinal;
};

/* The scan's arrays in SSD's shapes, and arrays of its own for what SSD puts out. */
static void ssd_open(struct ssd_problem *q, struct problem *p, int64_t P) {
    struct scan_shape s = p->s;
    int64_t H = s.D / P, own_count = s.B * s.T * (2 * s.D + 4 * H + 2 * s.N) + 2 * s.B * s.D * s.N + 2 * H;
    double *own = test_calloc((size_t)own_count, sizeof *own);
    const int64_t tokens[] = {s.B, s.T, H, P}, groups[] = {s.B, s.T, 1, s.N}, states[] = {s.B, H, P, s.N};
    *q = (struct ssd_problem){.s = {s.B, s.T, H, P, 1, s.N, 16}};
    q->x = tensor_reshape(p->value[X], 4, tokens);
    q->dy = tensor_reshape(p->gradient[Y], 4, tokens);
    q->b = tensor_reshape(p->value[B_IN], 4, groups);
    q->c = tensor_reshape(p->value[C_IN], 4, groups);
    q->initial = tensor_reshape(p->value[INITIAL], 4, states);
    q->dfinal = tensor_reshape(p->gradient[FINAL], 4, states);
    tensor *wide[] = {&q->y, &q->dx}, *steps[] = {&q->dt, &q->a, &q->ddt, &q->da}, *shared[] = {&q->db, &q->dc};
    tensor *state[] = {&q->final, &q->dinitial}, *heads[] = {&q->d, &q->dd};
    for (int i = 0; i < 2; i++, own += s.B * s.T * s.D) *wide[i] = tensor_4d(own, DTYPE_F64, s.B, s.T, H, P);
    for (int i = 0; i < 4; i++, own += s.B * s.T * H) *steps[i] = tensor_3d(own, DTYPE_F64, s.B, s.T, H);
    for (int i = 0; i < 2; i++, own += s.B * s.T * s.N) *shared[i] = tensor_4d(own, DTYPE_F64, s.B, s.T, 1, s.N);
    for (int i = 0; i < 2; i++, own += s.B * s.D * s.N) *state[i] = tensor_4d(own, DTYPE_F64, s.B, H, P, s.N);
    for (int i = 0; i < 2; i++, own += H) *heads[i] = tensor_1d(own, DTYPE_F64, H);
}

/* Every channel of a head, and every state, gets the numbers of the head's first. */
static void repeat_heads(struct problem *p, int64_t P) {
    struct scan_shape s = p->s;
    for (int64_t i = 0; i < s.B * s.T * s.D; i++) put(p->value[RAW], i, get(p->value[RAW], i / P * P));
    for (int64_t i = 0; i < s.D; i++) put(p->value[BIAS], i, get(p->value[BIAS], i / P * P));
    for (int64_t i = 0; i < s.D; i++) put(p->value[SKIP], i, get(p->value[SKIP], i / P * P));
    for (int64_t i = 0; i < s.D * s.N; i++) put(p->value[A_LOG], i, get(p->value[A_LOG], i / (P * s.N) * P * s.N));
}

static void ssd_solve(struct ssd_problem *q, struct problem *p) {
    struct device *dev;
    error err = {0};
    struct ssd_shape s = q->s;
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F64, &err), 0);
    for (int64_t i = 0; i < s.B * s.T * s.H; i++) {
        int64_t channel = i % s.H * s.P;
        double v = get(p->value[RAW], i * s.P) + get(p->value[BIAS], channel);
        put(q->dt, i, log1p(exp(v)));
        put(q->a, i, -exp(get(p->value[A_LOG], channel * s.N)) * log1p(exp(v)));
    }
    for (int64_t h = 0; h < s.H; h++) put(q->d, h, get(p->value[SKIP], h * s.P));
    void *saved = test_malloc(dev->ops->ssd_saved(s)), *forward = test_malloc(dev->ops->ssd_forward_scratch(s));
    void *backward = test_malloc(dev->ops->ssd_backward_scratch(s));
    dev->ops->ssd_forward(dev, q->y, q->final, saved, q->x, q->dt, q->a, q->b, q->c, q->d, q->initial, p->doc, s.Q,
                          forward);
    dev->ops->ssd_backward(dev, q->dx, q->ddt, q->da, q->db, q->dc, q->dinitial, q->dd, q->dy, q->dfinal, saved, q->x,
                           q->dt, q->a, q->b, q->c, q->d, q->initial, p->doc, s.Q, backward);
    test_free(saved);
    test_free(forward);
    test_free(backward);
    device_close(dev);
}

static void expect_equal(const char *what, tensor got, tensor want) {
    double off = distance(got, want);
    if (!(off <= 1e-12)) fail_msg("%s is off by %.3g", what, off);
}

/* The sums over a head's channels (and states) of the scan's gradients are SSD's gradients of the head. */
static void expect_head_sums(struct problem *p, struct ssd_problem *q) {
    struct ssd_shape s = q->s;
    double dbias = 0, want_bias = 0;
    for (int64_t i = 0; i < s.B * s.T * s.H; i++) {
        int64_t channel = i % s.H * s.P;
        double v = get(p->value[RAW], i * s.P) + get(p->value[BIAS], channel), sum = 0;
        double rate = -exp(get(p->value[A_LOG], channel * s.N));
        double want = (get(q->ddt, i) + rate * get(q->da, i)) / (1 + exp(-v));
        for (int64_t k = 0; k < s.P; k++) sum += get(p->gradient[RAW], i * s.P + k);
        want_bias += want;
        if (!(fabs(sum - want) <= 1e-11 * (1 + fabs(want)))) fail_msg("draw is %.15g, of SSD %.15g", sum, want);
    }
    for (int64_t i = 0; i < s.H * s.P; i++) dbias += get(p->gradient[BIAS], i);
    if (!(fabs(dbias - want_bias) <= 1e-10 * (1 + fabs(want_bias))))
        fail_msg("dbias is %g, of SSD %g", dbias, want_bias);
    for (int64_t h = 0; h < s.H; h++) {
        double dA = 0, dd = 0, want = 0, rate = -exp(get(p->value[A_LOG], h * s.P * s.N));
        for (int64_t i = 0; i < s.P * s.N; i++) dA += get(p->gradient[A_LOG], h * s.P * s.N + i);
        for (int64_t i = 0; i < s.P; i++) dd += get(p->gradient[SKIP], h * s.P + i);
        for (int64_t i = 0; i < s.B * s.T; i++) want += rate * get(q->dt, i * s.H + h) * get(q->da, i * s.H + h);
        if (!(fabs(dA - want) <= 1e-10 * (1 + fabs(want)))) fail_msg("dA_log is %.15g, of SSD %.15g", dA, want);
        if (!(fabs(dd - get(q->dd, h)) <= 1e-10 * (1 + fabs(dd)))) fail_msg("dd is %g, of SSD %g", dd, get(q->dd, h));
    }
}

static void equals_ssd(void **unused) {
    (void)unused;
    static const int64_t lengths[] = {1, 31, 70};
    for (int k = 0; k < 6; k++) {
        enum { P = 5 };
        struct problem p;
        struct ssd_problem q;
        problem_open(&p, (struct scan_shape){2, lengths[k / 2], 8 * P, 6}, DTYPE_F64);
        for (int64_t i = 0; k % 2 && i < p.s.B * p.s.T; i++) ((int32_t *)p.doc.data)[i] = (int32_t)(i % p.s.T / 9);
        repeat_heads(&p, P);
        tensor value_z = p.value[Z], gradient_z = p.gradient[Z];
        p.value[Z] = p.gradient[Z] = tensor_none(); /* SSD has no gate */
        problem_solve(&p);
        ssd_open(&q, &p, P);
        ssd_solve(&q, &p);
        expect_equal("y", p.value[Y], q.y);
        expect_equal("final", p.value[FINAL], q.final);
        expect_equal("dx", p.gradient[X], q.dx);
        expect_equal("db", p.gradient[B_IN], q.db);
        expect_equal("dc", p.gradient[C_IN], q.dc);
        expect_equal("dinitial", p.gradient[INITIAL], q.dinitial);
        expect_head_sums(&p, &q);
        test_free(q.y.data);
        p.value[Z] = value_z;
        p.gradient[Z] = gradient_z;
        problem_close(&p);
    }
}

/* --- extremes and threads ----------------------------------------------------------------------------------------- */

/* Decays so strong that nothing is left of a state after one token, and steps so large or small that softplus changes
 * form: float stays with double. */
static void extreme_decays(void **unused) {
    (void)unused;
    for (int k = 0; k < 3; k++) {
        struct problem p[2];
        for (int wide = 0; wide < 2; wide++) {
            problem_open(&p[wide], (struct scan_shape){1, 70, 40, 5}, wide ? DTYPE_F64 : DTYPE_F32);
            for (int64_t i = 0; i < 70 * 40; i++)
                put(p[wide].value[RAW], i, k == 0 ? -40 : k == 1 ? 30 : i % 7 * 10 - 30);
            for (int64_t i = 0; i < 40 * 5; i++) put(p[wide].value[A_LOG], i, i % 3 * 4);
            problem_solve(&p[wide]);
        }
        for (int m = 0; m < MEMBERS; m++) {
            double off = distance(result(&p[0], m), result(&p[1], m));
            if (!(off <= 1e-5)) fail_msg("case %d: %s%s is off by %.3g", k, m >= Y ? "" : "d", names[m], off);
        }
        problem_close(&p[0]);
        problem_close(&p[1]);
    }
}

/* Large enough for several threads: the same bits as with one. */
static void threads_agree(void **unused) {
    (void)unused;
#ifdef RIVERRUN_OPENMP
    struct problem p[2];
    int threads = omp_get_max_threads();
    for (int i = 0; i < 2; i++) {
        problem_open(&p[i], (struct scan_shape){3, 70, 200, 8}, DTYPE_F32);
        omp_set_num_threads(i ? 3 : 1);
        problem_solve(&p[i]);
    }
    omp_set_num_threads(threads);
    for (int m = 0; m < MEMBERS; m++)
        assert_memory_equal(result(&p[0], m).data, result(&p[1], m).data,
                            (size_t)tensor_count(result(&p[0], m)) * sizeof(float));
    problem_close(&p[0]);
    problem_close(&p[1]);
#else
    skip();
#endif
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(by_hand),
        cmocka_unit_test(equals_ssd),
        cmocka_unit_test(extreme_decays),
        cmocka_unit_test(threads_agree),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
