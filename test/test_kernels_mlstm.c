/* test/test_kernels_mlstm.c: the mLSTM on the CPU against its definition, in double, written down twice without any
 * common code with the kernels: as the recurrence, one token after the other, with its gradient by reverse mode
 * likewise; and in parallel, every token against all before it in its document. Both with exact and with truncated
 * gradients. Then extremes that the case table (test/ops_mlstm.c) can't compare with anything.
 */
#include "test/unit_kernels.h"

enum { Q_, K_, V_, I_, F_, INPUTS };

/* One head of one row: arrays of T tokens, and states. */
struct head {
    int64_t T, K, V;
    struct mlstm_rule rule;
    int32_t *doc;
    double *in[INPUTS], *gradient[INPUTS], *h, *dh;
    double *C, *n, m;    /* initial */
    double *dC, *dn;     /* of the final state; afterwards of the initial one */
    double *C1, *n1, m1; /* final */
};

static int64_t width(const struct head *p, int i) {
    return i == V_ ? p->V : i < V_ ? p->K : 1;
}

static double *numbers(int64_t count, uint32_t stream, double scale) {
    double *p = must_allocate((size_t)count * sizeof *p);
    for (int64_t i = 0; i < count; i++) p[i] = (float)(scale * uniform(stream, i));
    return p;
}

/* Values between -1 and 1 times 2, gates i and f around 0 and 1; documents start as the callers like. */
static struct head head_open(int64_t T, int64_t K, int64_t V, struct mlstm_rule rule) {
    struct head p = {.T = T, .K = K, .V = V, .rule = rule, .doc = must_allocate((size_t)T * sizeof(int32_t))};
    memset(p.doc, 0, (size_t)T * sizeof *p.doc);
    for (int i = 0; i < INPUTS; i++) {
        p.in[i] = numbers(T * width(&p, i), (uint32_t)i + 1, i == I_ ? 3 : 2);
        p.gradient[i] = numbers(T * width(&p, i), 0, 0);
    }
    for (int64_t t = 0; t < T; t++) p.in[F_][t] += 1;
    p.h = numbers(T * V, 0, 0), p.dh = numbers(T * V, 20, 1);
    p.C = numbers(K * V, 21, 1), p.n = numbers(K, 22, 1), p.m = rule.sigmoid_input ? 0 : 0.5;
    p.dC = numbers(K * V, 23, 1), p.dn = numbers(K, 24, rule.normalise && !rule.truncated ? 1 : 0);
    p.C1 = numbers(K * V, 0, 0), p.n1 = numbers(K, 0, 0);
    return p;
}

static void head_close(struct head *p) {
    for (int i = 0; i < INPUTS; i++) free(p->in[i]), free(p->gradient[i]);
    double *rest[] = {p->h, p->dh, p->C, p->n, p->dC, p->dn, p->C1, p->n1};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) free(rest[i]);
    free(p->doc);
}

static double gate(double v) {
    return 1 / (1 + exp(-v));
}

static bool starts(const struct head *p, int64_t t) {
    return p->doc[t] != (t > 0 ? p->doc[t - 1] : 0);
}

/* h, E = dh / (N + eps) and dden of a token, from num (V) and den. */
static void outcome(const struct head *p, int64_t t, const double *num, double den, double floor, double *E,
                    double *dden) {
    double N = p->rule.normalise ? fmax(fabs(den), floor) + p->rule.eps : 1, sum = 0;
    for (int64_t j = 0; j < p->V; j++) {
        p->h[t * p->V + j] = num[j] / N;
        E[j] = p->dh[t * p->V + j] / N;
        sum += p->dh[t * p->V + j] * num[j] / N;
    }
    bool through = p->rule.normalise && !p->rule.truncated && fabs(den) > floor;
    *dden = through ? -sum / N * (den > 0 ? 1 : -1) : 0;
}

/* --- token by token ----------------------------------------------------------------------------------------------- */

/* States and gates of all tokens, kept for the way back; index t + 1 is after token t. */
struct course {
    double *C, *n, *keep, *weight, *E, *dden;
};

static void run_forward(struct head *p, struct course *c) {
    int64_t K = p->K, V = p->V, size = K * V;
    double m = p->m, s = 1 / sqrt((double)K), *num = numbers(V, 0, 0);
    memcpy(c->C, p->C, (size_t)size * sizeof(double));
    memcpy(c->n, p->n, (size_t)K * sizeof(double));
    for (int64_t t = 0; t < p->T; t++) {
        const double *q = p->in[Q_] + t * K, *k = p->in[K_] + t * K, *v = p->in[V_] + t * V;
        double lf = log(gate(p->in[F_][t])), i = p->in[I_][t], den = 0;
        if (starts(p, t)) m = 0;
        double next = p->rule.sigmoid_input ? 0 : fmax(lf + m, i);
        c->keep[t] = starts(p, t) ? 0 : p->rule.sigmoid_input ? gate(p->in[F_][t]) : exp(lf + m - next);
        c->weight[t] = p->rule.sigmoid_input ? gate(i) : exp(i - next);
        m = next;
        for (int64_t j = 0; j < V; j++) num[j] = 0;
        for (int64_t r = 0; r < K; r++) {
            double *n = c->n + (t + 1) * K + r;
            *n = c->keep[t] * n[-K] + c->weight[t] * k[r];
            den += s * q[r] * *n;
            for (int64_t j = 0; j < V; j++) {
                double *C = c->C + (t + 1) * size + r * V + j;
                *C = c->keep[t] * C[-size] + c->weight[t] * k[r] * v[j];
                num[j] += s * q[r] * *C;
            }
        }
        outcome(p, t, num, den, exp(-m), c->E + t * V, c->dden + t);
    }
    memcpy(p->C1, c->C + p->T * size, (size_t)size * sizeof(double));
    memcpy(p->n1, c->n + p->T * K, (size_t)K * sizeof(double));
    p->m1 = m;
    free(num);
}

static void run_backward(struct head *p, const struct course *c) {
    int64_t K = p->K, V = p->V, size = K * V;
    double s = 1 / sqrt((double)K);
    for (int64_t t = p->T - 1; t >= 0; t--) {
        const double *q = p->in[Q_] + t * K, *k = p->in[K_] + t * K, *v = p->in[V_] + t * V, *E = c->E + t * V;
        double di = 0, dlf = 0, *dv = p->gradient[V_] + t * V;
        for (int64_t j = 0; j < V; j++) dv[j] = 0;
        for (int64_t r = 0; r < K; r++) {
            const double *C = c->C + (t + 1) * size + r * V, *n = c->n + (t + 1) * K + r;
            double dq = c->dden[t] * *n, dk, *dC = p->dC + r * V;
            p->dn[r] += s * q[r] * c->dden[t];
            dk = p->dn[r];
            for (int64_t j = 0; j < V; j++) {
                dq += C[j] * E[j];
                dC[j] += s * q[r] * E[j];
                dk += dC[j] * v[j];
                dv[j] += c->weight[t] * dC[j] * k[r];
                dlf += c->keep[t] * C[j - size] * dC[j];
                dC[j] *= c->keep[t];
            }
            dlf += c->keep[t] * n[-K] * p->dn[r];
            p->dn[r] *= c->keep[t];
            p->gradient[Q_][t * K + r] = s * dq;
            p->gradient[K_][t * K + r] = c->weight[t] * dk;
            di += c->weight[t] * dk * k[r];
        }
        p->gradient[I_][t] = p->rule.sigmoid_input ? di * gate(-p->in[I_][t]) : di;
        p->gradient[F_][t] = dlf * gate(-p->in[F_][t]);
    }
}

static void solve_by_recurrence(struct head *p) {
    int64_t T = p->T, K = p->K, V = p->V;
    struct course c = {.C = numbers((T + 1) * K * V, 0, 0), .n = numbers((T + 1) * K, 0, 0), .keep = numbers(T, 0, 0),
                       .weight = numbers(T, 0, 0), .E = numbers(T * V, 0, 0), .dden = numbers(T, 0, 0)};
    run_forward(p, &c);
    run_backward(p, &c);
    double *all[] = {c.C, c.n, c.keep, c.weight, c.E, c.dden};
    for (int i = 0; i < 6; i++) free(all[i]);
}

/* --- in parallel -------------------------------------------------------------------------------------------------- */

/* log of what the input of token j weighs in token i of its document: the decays between, and its gate. */
static double log_weight(const struct head *p, int64_t i, int64_t j) {
    double sum = p->rule.sigmoid_input ? log(gate(p->in[I_][j])) : p->in[I_][j];
    for (int64_t t = j + 1; t <= i; t++) sum += log(gate(p->in[F_][t]));
    return sum;
}

/* Without initial state and without a gradient of the final one; first all values of a token, then its gradients. */
static void solve_in_parallel(struct head *p) {
    int64_t K = p->K, V = p->V;
    double s = 1 / sqrt((double)K), *num = numbers(V, 0, 0), *E = numbers(V, 0, 0);
    for (int i = 0; i < INPUTS; i++) memset(p->gradient[i], 0, (size_t)(p->T * width(p, i)) * sizeof(double));
    for (int64_t i = 0; i < p->T; i++) {
        double m = p->rule.sigmoid_input ? 0 : -INFINITY, den = 0, dden = 0;
        int64_t first = i;
        while (!starts(p, first) && first > 0) first--;
        for (int64_t j = first; !p->rule.sigmoid_input && j <= i; j++) m = fmax(m, log_weight(p, i, j));
        for (int64_t at = 0; at < V; at++) num[at] = 0;
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t j = first; j <= i; j++) {
                const double *q = p->in[Q_] + i * K, *k = p->in[K_] + j * K, *v = p->in[V_] + j * V;
                double D = exp(log_weight(p, i, j) - m), S = 0, W = dden;
                for (int64_t at = 0; at < K; at++) S += s * q[at] * k[at];
                for (int64_t at = 0; at < V && !pass; at++) num[at] += S * D * v[at];
                if (!pass) den += S * D;
                if (!pass) continue;
                for (int64_t at = 0; at < V; at++) W += E[at] * v[at];
                for (int64_t at = 0; at < V; at++) p->gradient[V_][j * V + at] += S * D * E[at];
                for (int64_t at = 0; at < K; at++) {
                    p->gradient[Q_][i * K + at] += s * W * D * k[at];
                    p->gradient[K_][j * K + at] += s * W * D * q[at];
                }
            }
            if (!pass) outcome(p, i, num, den, exp(-m), E, &dden);
        }
    }
    double sum = 0;
    for (int64_t t = p->T - 1; t >= 0; t--) {
        double of_q = 0, of_k = 0;
        for (int64_t at = t * K; at < (t + 1) * K; at++) {
            of_q += p->in[Q_][at] * p->gradient[Q_][at];
            of_k += p->in[K_][at] * p->gradient[K_][at];
        }
        sum += of_q - of_k;
        p->gradient[I_][t] = p->rule.sigmoid_input ? of_k * gate(-p->in[I_][t]) : of_k;
        p->gradient[F_][t] = sum * gate(-p->in[F_][t]);
        if (starts(p, t)) sum = 0;
    }
    free(num);
    free(E);
}

/* --- the kernels -------------------------------------------------------------------------------------------------- */

/* A tensor of the device's type with these values; freed by the caller. */
static tensor take(struct device *dev, const double *from, int64_t count, int ndim, const int64_t *dim) {
    tensor t = tensor_1d(must_allocate((size_t)count * 8), dev->ops->real, count);
    for (int64_t i = 0; i < count; i++) set(t, i, from ? from[i] : NAN);
    return tensor_reshape(t, ndim, dim);
}

static void compare(const struct head *p, const char *what, tensor got, const double *want, double limit) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < tensor_count(got); i++) {
        difference += (get(got, i) - want[i]) * (get(got, i) - want[i]);
        size += want[i] * want[i];
    }
    if (!(sqrt(difference) <= limit * sqrt(size) + 1e-14)) /* a gradient may be 0 */
        fail_msg("T %lld, %s gate%s%s: %s is off by %.3g of %.3g, allowed is %.0e of it", (long long)p->T,
                 p->rule.sigmoid_input ? "sigmoid" : "exponential", p->rule.normalise ? "" : ", plain",
                 p->rule.truncated ? ", truncated" : "", what, sqrt(difference), sqrt(size), limit);
}

/* The kernels on the problem, with states if `states`, dC and dn being the gradients of the final one; compared with
 * what p holds by now. */
static void check(struct device *dev, const struct head *p, bool states, const double *dC, const double *dn,
                  int64_t chunk, double limit) {
    static const char *const names[INPUTS] = {"dq", "dk", "dv", "di", "df"};
    int64_t T = p->T, K = p->K, V = p->V;
    struct mlstm_shape shape = {1, T, 1, K, V, chunk};
    tensor in[INPUTS], out[INPUTS], doc = tensor_2d(p->doc, DTYPE_I32, 1, T);
    for (int i = 0; i < INPUTS; i++) {
        const int64_t dim[] = {1, T, 1, width(p, i)};
        in[i] = take(dev, p->in[i], T * width(p, i), i < I_ ? 4 : 3, dim);
        out[i] = take(dev, NULL, T * width(p, i), i < I_ ? 4 : 3, dim);
    }
    const int64_t y[] = {1, T, 1, V}, size_C[] = {1, 1, K, V}, size_n[] = {1, 1, K}, size_m[] = {1, 1};
    tensor h = take(dev, NULL, T * V, 4, y), dh = take(dev, p->dh, T * V, 4, y);
    struct mlstm_state s[4]; /* initial, final and their gradients */
    const double *C[] = {p->C, NULL, NULL, dC}, *n[] = {p->n, NULL, NULL, dn}, *m[] = {&p->m, NULL, NULL, NULL};
    for (int i = 0; i < 4; i++)
        s[i] = (struct mlstm_state){take(dev, C[i], K * V, 4, size_C), take(dev, n[i], K, 3, size_n),
                                    take(dev, m[i], 1, 2, size_m)};
    struct mlstm_state none = {tensor_none(), tensor_none(), tensor_none()};
    void *saved = must_allocate(dev->ops->mlstm_saved(shape));
    void *forward = must_allocate(dev->ops->mlstm_forward_scratch(shape));
    void *backward = must_allocate(dev->ops->mlstm_backward_scratch(shape));
    dev->ops->mlstm_forward(dev, h, states ? s[1] : none, saved, in[Q_], in[K_], in[V_], in[I_], in[F_],
                            states ? s[0] : none, doc, p->rule, chunk, forward);
    dev->ops->mlstm_backward(dev, out[Q_], out[K_], out[V_], out[I_], out[F_], states ? s[2] : none, dh,
                             states ? s[3] : none, saved, h, in[Q_], in[K_], in[V_], in[I_], in[F_],
                             states ? s[0] : none, doc, p->rule, chunk, backward);
    compare(p, "h", h, p->h, limit);
    for (int i = 0; i < INPUTS; i++) compare(p, names[i], out[i], p->gradient[i], 10 * limit);
    if (states) {
        compare(p, "the final C", s[1].C, p->C1, limit);
        compare(p, "the gradient of the initial C", s[2].C, p->dC, 10 * limit);
        if (p->rule.normalise) compare(p, "the final n", s[1].n, p->n1, limit);
        if (p->rule.normalise) compare(p, "the gradient of the initial n", s[2].n, p->dn, 10 * limit);
        compare(p, "the final m", s[1].m, &p->m1, limit);
    }
    for (int i = 0; i < INPUTS; i++) free(in[i].data), free(out[i].data);
    for (int i = 0; i < 4; i++) free(s[i].C.data), free(s[i].n.data), free(s[i].m.data);
    free(h.data), free(dh.data), free(saved), free(forward), free(backward);
}

static const struct mlstm_rule rules[] = {
    {.normalise = true},
    {.normalise = true, .truncated = true},
    {.sigmoid_input = true, .normalise = true},
    {.sigmoid_input = true, .normalise = true, .truncated = true},
    {.sigmoid_input = true},
};
static const int64_t lengths[] = {1, 2, 3, 7, 17, 40}, chunks[] = {1, 3, 16, 64};
enum { RULES = 5, LENGTHS = 6, CHUNKS = 4 };

/* A row whose documents are of three kinds in turn: one that goes on from the initial state, two, and short ones. */
static void set_documents(struct head *p, int kind) {
    for (int64_t t = 0; t < p->T; t++) p->doc[t] = (int32_t)(kind == 0 ? 0 : kind == 1 ? t >= p->T / 2 : 1 + t / 3);
}

static void check_all(bool states, void (*solve)(struct head *p), double eps, enum precision precision, double limit) {
    struct device *dev = open_cpu(precision);
    for (int at = 0; at < RULES * LENGTHS * 3; at++) {
        struct head p = head_open(lengths[at / 3 % LENGTHS], 5, 4, rules[at / 3 / LENGTHS]);
        set_documents(&p, at % 3);
        p.rule.eps = eps;
        if (!states) {
            p.m = 0;
            memset(p.C, 0, (size_t)(p.K * p.V) * sizeof(double));
            memset(p.n, 0, (size_t)p.K * sizeof(double));
        }
        double *dC = numbers(p.K * p.V, 0, 0), *dn = numbers(p.K, 0, 0);
        memcpy(dC, p.dC, (size_t)(p.K * p.V) * sizeof(double));
        memcpy(dn, p.dn, (size_t)p.K * sizeof(double));
        solve(&p);
        for (int k = 0; k < CHUNKS; k++) check(dev, &p, states, dC, dn, chunks[k], limit);
        free(dC);
        free(dn);
        head_close(&p);
    }
    device_close(dev);
}

static void test_recurrence(void **state) {
    (void)state;
    check_all(true, solve_by_recurrence, 1e-6, PRECISION_F64, 1e-12);
}

/* Without eps: m is another here, where the weight of an empty initial state is the largest. */
static void test_parallel(void **state) {
    (void)state;
    check_all(false, solve_in_parallel, 0, PRECISION_F64, 1e-12);
}

static void test_recurrence_in_float(void **state) {
    (void)state;
    check_all(true, solve_by_recurrence, 1e-6, PRECISION_F32, 1e-4);
}

/* --- extremes ----------------------------------------------------------------------------------------------------- */

static void expect_finite(struct device *dev, struct head *p, bool zero) {
    struct mlstm_shape s = {1, p->T, 1, p->K, p->V, 4};
    struct mlstm_state none = {tensor_none(), tensor_none(), tensor_none()};
    tensor in[INPUTS], out[INPUTS];
    for (int i = 0; i < INPUTS; i++) {
        const int64_t dim[] = {1, p->T, 1, width(p, i)};
        in[i] = take(dev, p->in[i], p->T * width(p, i), i < I_ ? 4 : 3, dim);
        out[i] = take(dev, NULL, p->T * width(p, i), i < I_ ? 4 : 3, dim);
    }
    tensor h = take(dev, NULL, p->T * p->V, 4, (int64_t[]){1, p->T, 1, p->V});
    tensor dh = take(dev, p->dh, p->T * p->V, 4, (int64_t[]){1, p->T, 1, p->V});
    void *saved = must_allocate(dev->ops->mlstm_saved(s)), *forward = must_allocate(dev->ops->mlstm_forward_scratch(s));
    void *backward = must_allocate(dev->ops->mlstm_backward_scratch(s));
    dev->ops->mlstm_forward(dev, h, none, saved, in[0], in[1], in[2], in[3], in[4], none, tensor_none(), p->rule, 4,
                            forward);
    dev->ops->mlstm_backward(dev, out[0], out[1], out[2], out[3], out[4], none, dh, none, saved, h, in[0], in[1], in[2],
                             in[3], in[4], none, tensor_none(), p->rule, 4, backward);
    for (int64_t t = 0; t < p->T * p->V; t++) assert_true(isfinite(get(h, t)));
    for (int64_t t = 0; zero && t < p->V; t++) assert_true(get(h, (p->T - 1) * p->V + t) == 0);
    for (int i = 0; i < INPUTS; i++)
        for (int64_t t = 0; t < tensor_count(out[i]); t++) assert_true(isfinite(get(out[i], t)));
    for (int i = 0; i < INPUTS; i++) free(in[i].data), free(out[i].data);
    free(h.data), free(dh.data), free(saved), free(forward), free(backward);
}

/* Gates shut as far as numbers go: exp(-m) overflows, log sigmoid is -infinity, both at once. Nothing becomes NaN. */
static void test_extremes(void **state) {
    (void)state;
    const double i[] = {-120, -120, -INFINITY, -INFINITY, 80, 0}, f[] = {-200, -INFINITY, 0, -INFINITY, 100, -INFINITY};
    const bool zero[] = {true, true, false, true, false, false}; /* in float */
    for (int at = 0; at < 6; at++) {
        for (int precision = 0; precision < 2; precision++) {
            struct device *dev = open_cpu(precision ? PRECISION_F64 : PRECISION_F32);
            for (int rule = 0; rule < RULES; rule++) {
                struct head p = head_open(9, 3, 2, rules[rule]);
                for (int64_t t = 0; t < p.T; t++) p.in[I_][t] = i[at], p.in[F_][t] = f[at];
                expect_finite(dev, &p, zero[at] && precision == 0 && !p.rule.sigmoid_input);
                head_close(&p);
            }
            device_close(dev);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recurrence),
        cmocka_unit_test(test_parallel),
        cmocka_unit_test(test_recurrence_in_float),
        cmocka_unit_test(test_extremes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
