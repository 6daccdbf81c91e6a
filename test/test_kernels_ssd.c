/* test/test_kernels_ssd.c: SSD on the CPU against numbers worked out by hand and against a plain recurrence.
 *
 * The recurrence below is the definition of kernels/ops.h taken literally, one token after the other in double, with
 * its gradient by reverse mode one token after the other: no chunks, no decays between tokens, no common code with the
 * kernels. The case table (test/ops_recurrent.c) covers more shapes, but knows only finite differences and the kernels
 * themselves.
 */
#include "common/rng.h"
#include "kernels/device.h"
#include "test/unit.h"

#include <math.h>
#ifdef RIVERRUN_OPENMP
#include <omp.h>
#endif

/* --- a problem, in double ----------------------------------------------------------------------------------------- */

struct numbers {
    double *x, *dt, *a, *b, *c, *d, *initial, *y, *final;
};

struct problem {
    struct ssd_shape s;
    int32_t *doc;           /* (B,T) */
    struct numbers value;   /* y and final: what the recurrence gives */
    struct numbers gradient; /* y and final: what backward receives */
};

enum { MEMBERS = sizeof(struct numbers) / sizeof(double *) };

static double **member(struct numbers *n, int i) {
    return (double **)n + i;
}

static int64_t member_count(struct ssd_shape s, int i) {
    const int64_t tokens = s.B * s.T, heads = s.H * s.P, groups = s.G * s.N, state = s.B * s.H * s.P * s.N;
    const int64_t counts[MEMBERS] = {tokens * heads,  tokens * s.H, tokens * s.H,   tokens * groups, tokens * groups,
                                     s.H,             state,        tokens * heads, state};
    return counts[i];
}

/* Everything random; a <= 0 and dt >= 0; documents as the callers like. */
static void problem_open(struct problem *p, struct ssd_shape s, uint64_t seed) {
    p->s = s;
    p->doc = test_calloc((size_t)(s.B * s.T), sizeof *p->doc);
    for (int i = 0; i < MEMBERS; i++) {
        int64_t count = member_count(s, i);
        *member(&p->value, i) = test_calloc((size_t)count, sizeof(double));
        *member(&p->gradient, i) = test_calloc((size_t)count, sizeof(double));
        rng_key value = {seed, RNG_TEST, (uint32_t)i}, gradient = {seed, RNG_TEST, (uint32_t)(100 + i)};
        for (int64_t k = 0; k < count; k++) {
            (*member(&p->value, i))[k] = (float)rng_normal(value, (uint64_t)k);
            (*member(&p->gradient, i))[k] = (float)rng_normal(gradient, (uint64_t)k);
        }
    }
    for (int64_t k = 0; k < s.B * s.T * s.H; k++) {
        p->value.a[k] = -fabs(p->value.a[k]);
        p->value.dt[k] = fabs(p->value.dt[k]);
    }
}

static void problem_close(struct problem *p) {
    test_free(p->doc);
    for (int i = 0; i < MEMBERS; i++) {
        test_free(*member(&p->value, i));
        test_free(*member(&p->gradient, i));
    }
}

/* --- the recurrence ----------------------------------------------------------------------------------------------- */

/* Does token t carry the state on, and which number precedes the row's first? */
static bool carries_on(const struct problem *p, int64_t row, int64_t t) {
    const int32_t *doc = p->doc + row * p->s.T;
    return t == 0 ? doc[0] == 0 : doc[t] == doc[t - 1];
}

/* Forward: S (T+1,P,N) of one head, S[0] the initial state; y and final into p->value. */
static void recur(struct problem *p, int64_t row, int64_t h, double *S) {
    struct ssd_shape s = p->s;
    int64_t size = s.P * s.N;
    struct numbers *v = &p->value;
    memcpy(S, v->initial + (row * s.H + h) * size, (size_t)size * sizeof *S);
    for (int64_t t = 0; t < s.T; t++, S += size) {
        int64_t token = row * s.T + t, head = token * s.H + h, group = token * s.G + h / (s.H / s.G);
        double keep = carries_on(p, row, t) ? exp(v->a[head]) : 0;
        for (int64_t i = 0; i < s.P; i++) {
            double sum = 0, x = v->x[head * s.P + i];
            for (int64_t n = 0; n < s.N; n++) {
                double next = keep * S[i * s.N + n] + v->dt[head] * x * v->b[group * s.N + n];
                S[size + i * s.N + n] = next;
                sum += next * v->c[group * s.N + n];
            }
            v->y[head * s.P + i] = sum + v->d[h] * x;
        }
    }
    memcpy(v->final + (row * s.H + h) * size, S, (size_t)size * sizeof *S);
}

/* One token of reverse mode: G (P,N) is the gradient of the state after the token, at return of the one before it. */
static void reverse_token(struct problem *p, int64_t row, int64_t t, int64_t h, const double *before, double *G) {
    struct ssd_shape s = p->s;
    struct numbers *v = &p->value, *g = &p->gradient;
    int64_t token = row * s.T + t, head = token * s.H + h, group = token * s.G + h / (s.H / s.G);
    const double *after = before + s.P * s.N;
    double keep = carries_on(p, row, t) ? exp(v->a[head]) : 0;
    g->dt[head] = g->a[head] = 0;
    for (int64_t i = 0; i < s.P; i++) {
        double x = v->x[head * s.P + i], dy = g->y[head * s.P + i], dx = v->d[h] * dy;
        g->d[h] += dy * x;
        for (int64_t n = 0; n < s.N; n++) {
            double b = v->b[group * s.N + n], *at = &G[i * s.N + n];
            g->c[group * s.N + n] += dy * after[i * s.N + n];
            *at += dy * v->c[group * s.N + n];
            dx += *at * v->dt[head] * b;
            g->b[group * s.N + n] += *at * v->dt[head] * x;
            g->dt[head] += *at * x * b;
            g->a[head] += *at * keep * before[i * s.N + n];
            *at *= keep;
        }
        g->x[head * s.P + i] = dx;
    }
}

/* Fill y and final, and all gradients but those of y and final. */
static void problem_solve(struct problem *p) {
    struct ssd_shape s = p->s;
    int64_t size = s.P * s.N;
    double *S = test_calloc((size_t)((s.T + 1) * size), sizeof *S), *G = test_calloc((size_t)size, sizeof *G);
    memset(p->gradient.b, 0, (size_t)member_count(s, 3) * sizeof(double));
    memset(p->gradient.c, 0, (size_t)member_count(s, 4) * sizeof(double));
    memset(p->gradient.d, 0, (size_t)s.H * sizeof(double));
    for (int64_t row = 0; row < s.B; row++) {
        for (int64_t h = 0; h < s.H; h++) {
            recur(p, row, h, S);
            memcpy(G, p->gradient.final + (row * s.H + h) * size, (size_t)size * sizeof *G);
            for (int64_t t = s.T - 1; t >= 0; t--) reverse_token(p, row, t, h, S + t * size, G);
            memcpy(p->gradient.initial + (row * s.H + h) * size, G, (size_t)size * sizeof *G);
        }
    }
    test_free(S);
    test_free(G);
}

/* --- the kernels on the same problem ------------------------------------------------------------------------------ */

/* One array as a tensor of the device's type, converted from and to double. */
struct array {
    void *data;
    int64_t count;
    bool wide;
};

static struct array array_make(const double *from, int64_t count, bool wide) {
    struct array a = {test_malloc((size_t)count * (wide ? sizeof(double) : sizeof(float))), count, wide};
    for (int64_t i = 0; i < count; i++) {
        if (wide) ((double *)a.data)[i] = from ? from[i] : NAN;
        else ((float *)a.data)[i] = from ? (float)from[i] : NAN;
    }
    return a;
}

static double array_get(struct array a, int64_t i) {
    return a.wide ? ((double *)a.data)[i] : ((float *)a.data)[i];
}

/* ||a - b|| / ||b||; the two zero: 0. */
static double array_distance(struct array a, const double *want) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < a.count; i++) {
        double e = array_get(a, i) - want[i];
        difference += e * e;
        size += want[i] * want[i];
    }
    return difference == 0 ? 0 : sqrt(difference / size);
}

static tensor member_tensor(struct ssd_shape s, int i, struct array a) {
    enum dtype dtype = a.wide ? DTYPE_F64 : DTYPE_F32;
    switch (i) {
    case 0:
    case 7: return tensor_4d(a.data, dtype, s.B, s.T, s.H, s.P);
    case 1:
    case 2: return tensor_3d(a.data, dtype, s.B, s.T, s.H);
    case 3:
    case 4: return tensor_4d(a.data, dtype, s.B, s.T, s.G, s.N);
    case 5: return tensor_1d(a.data, dtype, s.H);
    default: return tensor_4d(a.data, dtype, s.B, s.H, s.P, s.N);
    }
}

struct solution {
    struct array value[MEMBERS], gradient[MEMBERS];
};

static void solution_close(struct solution *out) {
    for (int i = 0; i < MEMBERS; i++) {
        test_free(out->value[i].data);
        test_free(out->gradient[i].data);
    }
}

static void kernels_solve(struct solution *out, struct problem *p, enum precision precision, int64_t chunk) {
    struct device *dev;
    error err = {0};
    struct ssd_shape s = p->s;
    bool wide = precision == PRECISION_F64;
    tensor v[MEMBERS], g[MEMBERS];
    assert_int_equal(device_open(&dev, DEVICE_CPU, precision, &err), 0);
    s.Q = chunk;
    for (int i = 0; i < MEMBERS; i++) {
        bool output = i >= 7, sum = i == 5;
        int64_t count = member_count(s, i);
        double *zeros = test_calloc((size_t)count, sizeof *zeros);
        out->value[i] = array_make(output ? NULL : *member(&p->value, i), count, wide);
        out->gradient[i] = array_make(output ? *member(&p->gradient, i) : sum ? zeros : NULL, count, wide);
        v[i] = member_tensor(s, i, out->value[i]);
        g[i] = member_tensor(s, i, out->gradient[i]);
        test_free(zeros);
    }
    tensor doc = tensor_2d(p->doc, DTYPE_I32, s.B, s.T);
    void *saved = test_malloc(dev->ops->ssd_saved(s)), *forward = test_malloc(dev->ops->ssd_forward_scratch(s));
    void *backward = test_malloc(dev->ops->ssd_backward_scratch(s));
    dev->ops->ssd_forward(dev, v[7], v[8], saved, v[0], v[1], v[2], v[3], v[4], v[5], v[6], doc, chunk, forward);
    dev->ops->ssd_backward(dev, g[0], g[1], g[2], g[3], g[4], g[6], g[5], g[7], g[8], saved, v[0], v[1], v[2], v[3],
                           v[4], v[5], v[6], doc, chunk, backward);
    test_free(saved);
    test_free(forward);
    test_free(backward);
    device_close(dev);
}

/* The kernels agree with the recurrence, for some chunk lengths, in both precisions. */
static void check_problem(struct problem *p, const char *what) {
    static const char *const names[MEMBERS] = {"x", "dt", "a", "b", "c", "d", "initial", "y", "final"};
    const int64_t chunks[] = {1, 2, 3, 16, 64, 256};
    problem_solve(p);
    for (int k = 0; k < 12; k++) {
        struct solution got;
        bool wide = k % 2 == 0;
        double limit = wide ? 1e-12 : 5e-6;
        kernels_solve(&got, p, wide ? PRECISION_F64 : PRECISION_F32, chunks[k / 2]);
        for (int i = 0; i < MEMBERS; i++) {
            double *want = i >= 7 ? *member(&p->value, i) : *member(&p->gradient, i);
            double off = array_distance(i >= 7 ? got.value[i] : got.gradient[i], want);
            if (!(off <= limit))
                fail_msg("%s, T %lld, Q %lld, %s: %s%s is off by %.3g, allowed is %.3g", what, (long long)p->s.T,
                         (long long)chunks[k / 2], wide ? "f64" : "f32", i >= 7 ? "" : "the gradient of ", names[i],
                         off, limit);
        }
        solution_close(&got);
    }
}

static const int64_t lengths[] = {1, 2, 3, 5, 7, 16, 17, 64, 97};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

static void one_document(void **unused) {
    (void)unused;
    for (int i = 0; i < LENGTHS; i++) {
        struct problem p;
        problem_open(&p, (struct ssd_shape){2, lengths[i], 4, 3, 2, 5, 0}, 1 + (uint64_t)i);
        check_problem(&p, "one document");
        problem_close(&p);
    }
}

/* Every token starts a document with probability 1/3, the first included; numbers are left out at random, which stands
 * for empty documents. */
static void random_documents(void **unused) {
    (void)unused;
    for (int i = 0; i < LENGTHS; i++) {
        struct problem p;
        problem_open(&p, (struct ssd_shape){3, lengths[i], 2, 5, 1, 3, 0}, 100 + (uint64_t)i);
        rng_key key = {100 + (uint64_t)i, RNG_TEST, 999};
        for (int64_t k = 0, number = 0; k < p.s.B * p.s.T; k++) {
            if (k % p.s.T == 0) number = 0;
            if (rng_below(key, (uint64_t)(2 * k), 3) == 0)
                number += 1 + (int64_t)rng_below(key, (uint64_t)(2 * k + 1), 3);
            p.doc[k] = (int32_t)number;
        }
        check_problem(&p, "random documents");
        problem_close(&p);
    }
}

/* A row that goes on with document 0, one that starts a document at its first token, and one of one-token documents. */
static void special_documents(void **unused) {
    (void)unused;
    for (int i = 0; i < LENGTHS; i++) {
        struct problem p;
        int64_t T = lengths[i];
        problem_open(&p, (struct ssd_shape){3, T, 2, 3, 2, 4, 0}, 200 + (uint64_t)i);
        for (int64_t t = 0; t < T; t++) {
            p.doc[t] = t >= T / 2 ? 5 : 0;
            p.doc[T + t] = t >= 16 ? 2 : 1; /* a boundary that is one of chunks, too */
            p.doc[2 * T + t] = (int32_t)t;
        }
        check_problem(&p, "special documents");
        problem_close(&p);
    }
}

/* Decays so strong that most products between tokens vanish, and so weak that none does; steps of size 0. */
static void extreme_decays(void **unused) {
    (void)unused;
    for (int i = 0; i < 3; i++) {
        struct problem p;
        problem_open(&p, (struct ssd_shape){1, 97, 2, 4, 1, 4, 0}, 300 + (uint64_t)i);
        for (int64_t k = 0; k < p.s.T * p.s.H; k++) {
            p.value.a[k] = i == 0 ? -20 : i == 1 ? 0 : k % 5 ? -1e-3 : -300;
            if (k % 7 == 0) p.value.dt[k] = 0;
        }
        check_problem(&p, i == 0 ? "strong decay" : i == 1 ? "no decay" : "both decays");
        problem_close(&p);
    }
}

/* --- numbers worked out by hand ----------------------------------------------------------------------------------- */

/* One head of one channel, two state elements, four tokens; the loss is the sum of y. */
static struct {
    const double x[4], raw[4], bias, A_log, d, b[8], c[8];
    const double dt[4], final[2], y[4], dx[4], da[4], draw[4], dA_log, dd, db[8], dc[8];
} hand = {
    .x = {1, -2, 0.5, 1.5}, .raw = {0.1, -0.3, 0.7, 0.2}, .bias = -0.2, .A_log = 0.693147180559945309, .d = 0.5,
    .b = {1, 0.5, -0.5, 1, 0.25, -1, 0.5, 0.5}, .c = {0.5, -1, 1, 1, -0.25, 0.75, 1, -0.5},
    .dt = {0.644396660, 0.474076984, 0.974076984, 0.693147181}, .final = {0.576090646, 0.368762508},
    .y = {0.5, -1.099564324, -0.259523892, 1.141709392},
    .dx = {0.885633888, 0.779271924, -0.108798115, 0.673286795}, .da = {0, 0.385633888, -0.073345635, 0.131779199},
    .draw = {0.284272304, -0.735992493, -0.103209191, 0.055720801}, .dA_log = -0.405436473, .dd = 1.0,
    .db = {0.571873437, -0.372479097, -0.948153968, -1.032620832, 0, 0.304399058, 1.039720771, -0.519860385},
    .dc = {0.644396660, 0.322198330, 0.723752091, -0.823316415, 0.224921043, -0.604391508, 0.576090646, 0.368762508},
};

static void expect_close(const char *what, int64_t chunk, const double *got, const double *want, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!(fabs(got[i] - want[i]) <= 1.5e-9)) /* printed to nine digits */
            fail_msg("Q %lld: %s[%lld] is %.10f, by hand %.10f", (long long)chunk, what, (long long)i, got[i], want[i]);
}

static tensor by_head(const double *data) {
    return tensor_3d((void *)data, DTYPE_F64, 1, 4, 1);
}

static tensor by_channel(const double *data) {
    return tensor_4d((void *)data, DTYPE_F64, 1, 4, 1, 1);
}

static tensor by_state(const double *data) {
    return tensor_4d((void *)data, DTYPE_F64, 1, 4, 1, 2);
}

static tensor single(const double *data) {
    return tensor_1d((void *)data, DTYPE_F64, 1);
}

static void by_hand_with(struct device *dev, int64_t chunk) {
    const struct ops *ops = dev->ops;
    struct ssd_shape s = {1, 4, 1, 1, 1, 2, chunk};
    const double ones[4] = {1, 1, 1, 1};
    double dt[4], a[4], y[4], final[2], dx[4], ddt[4], da[4], draw[4], db[8], dc[8], dd = 0, dbias = 0, dA_log = 0;
    void *saved = test_malloc(ops->ssd_saved(s)), *forward = test_malloc(ops->ssd_forward_scratch(s));
    void *backward = test_malloc(ops->ssd_backward_scratch(s));
    void *steps = test_malloc(ops->ssd_dt_backward_scratch(1, 4, 1));
    tensor none = tensor_none(), state = tensor_4d(final, DTYPE_F64, 1, 1, 1, 2);
    ops->ssd_dt_forward(dev, by_head(dt), by_head(a), by_head(hand.raw), single(&hand.bias), single(&hand.A_log), 0,
                        INFINITY);
    ops->ssd_forward(dev, by_channel(y), state, saved, by_channel(hand.x), by_head(dt), by_head(a), by_state(hand.b),
                     by_state(hand.c), single(&hand.d), none, none, chunk, forward);
    ops->ssd_backward(dev, by_channel(dx), by_head(ddt), by_head(da), by_state(db), by_state(dc), none, single(&dd),
                      by_channel(ones), none, saved, by_channel(hand.x), by_head(dt), by_head(a), by_state(hand.b),
                      by_state(hand.c), single(&hand.d), none, none, chunk, backward);
    ops->ssd_dt_backward(dev, by_head(draw), single(&dbias), single(&dA_log), by_head(ddt), by_head(da),
                         by_head(hand.raw), single(&hand.bias), single(&hand.A_log), 0, INFINITY, steps);
    const struct {
        const char *what;
        const double *got, *want;
        int64_t count;
    } checks[] = {{"dt", dt, hand.dt, 4},       {"final", final, hand.final, 2}, {"y", y, hand.y, 4},
                  {"dx", dx, hand.dx, 4},       {"da", da, hand.da, 4},          {"draw", draw, hand.draw, 4},
                  {"dA_log", &dA_log, &hand.dA_log, 1}, {"dd", &dd, &hand.dd, 1}, {"db", db, hand.db, 8},
                  {"dc", dc, hand.dc, 8}};
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        expect_close(checks[i].what, chunk, checks[i].got, checks[i].want, checks[i].count);
    double sum = draw[0] + draw[1] + draw[2] + draw[3];
    expect_close("dbias", chunk, &dbias, &sum, 1);
    test_free(saved);
    test_free(forward);
    test_free(backward);
    test_free(steps);
}

static void by_hand(void **unused) {
    (void)unused;
    struct device *dev;
    error err = {0};
    const int64_t chunks[] = {1, 2, 3, 4, 256};
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F64, &err), 0);
    for (int i = 0; i < 5; i++) by_hand_with(dev, chunks[i]);
    device_close(dev);
}

/* --- threads ------------------------------------------------------------------------------------------------------ */

/* Large enough for several threads: the same bits as with one. */
static void threads_agree(void **unused) {
    (void)unused;
#ifdef RIVERRUN_OPENMP
    struct problem p;
    struct solution one, many;
    int threads = omp_get_max_threads();
    problem_open(&p, (struct ssd_shape){2, 150, 4, 32, 2, 32, 0}, 400);
    omp_set_num_threads(1);
    kernels_solve(&one, &p, PRECISION_F32, 64);
    omp_set_num_threads(3);
    kernels_solve(&many, &p, PRECISION_F32, 64);
    omp_set_num_threads(threads);
    for (int i = 0; i < MEMBERS; i++) {
        assert_memory_equal(one.value[i].data, many.value[i].data, (size_t)one.value[i].count * sizeof(float));
        assert_memory_equal(one.gradient[i].data, many.gradient[i].data, (size_t)one.gradient[i].count * sizeof(float));
    }
    solution_close(&one);
    solution_close(&many);
    problem_close(&p);
#else
    skip();
#endif
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(by_hand),           cmocka_unit_test(one_document),   cmocka_unit_test(random_documents),
        cmocka_unit_test(special_documents), cmocka_unit_test(extreme_decays), cmocka_unit_test(threads_agree),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
