/* mlstm.c: the mLSTM of xLSTM (arXiv 2405.04517, section 2.3) on the CPU: forward and backward pass, and step.
 *
 * With the stabiliser m worked out first, token by token, in double,
 *   m_t = max(lf_t + m_t-1, i_t);   a_t = lf_t + m_t-1 - m_t <= 0;   dt_t = exp(i_t - m_t) <= 1
 * (with a sigmoid input gate: a_t = lf_t, dt_t = sigmoid(i_t)), the stabilised mLSTM is an SSD with decay exp(a), step
 * size dt, b = k, c = q, and x = v with a column of ones behind it, which makes n the last row of the state and den the
 * last column of the output:
 *   S_t = exp(a_t) S_t-1 + dt_t [v_t 1] (outer) k_t,   S = [C n]^T;      [num den] = s S_t q_t,   s = K^-1/2
 *   h = num / (N + eps),   N = max(|den|, exp(-m_t)), or 1 for exp(-m_t) with a sigmoid input gate
 * So the chunks, documents and matrix products are those of ssd.c, whose exponents are sums that are never subtracted
 * from each other; a decay of -infinity is allowed. m is what the recurrence gives in every chunk, so that the chunk
 * changes nothing but rounding.
 *
 * Backward. m is held fixed, which is right because h does not depend on it but for eps. With E = dh / (N + eps) and
 *   dden = -sign(den) (dh . h) / (N + eps) where |den| is the larger in N, else 0 (truncated: always 0)
 * ssd_backward takes s [E dden] for dy and gives dv, dk, dq at once, and
 *   di_t = ddt_t dt_t (sigmoid: times sigmoid(-i_t));   df_t = da_t sigmoid(-f_t)
 * N is infinite where exp(-m) overflows: then 1 / (N + eps), which all products use, is 0, and so are h and its
 * gradients.
 *
 * saved: the states of ssd_saved(), then two numbers a token and head: 1 / (N + eps), and what makes dden of dh . h.
 * FLOPs per token and head: 4 K (V+1) + (K + V) Q forward; about twice that backward. Extra memory: v, num and their
 * gradients once more, V + 1 wide.
 */
#include "kernels/cpu/cpu.h"

/* --- the problem -------------------------------------------------------------------------------------------------- */

/* The arguments of a problem, with B..V as in ops.h; W is the width of x: V, and 1 where there is a normaliser. */
struct problem {
    int64_t B, T, H, K, V, W, chunk;
    tensor q, k, v, i, f, doc;
    struct mlstm_state initial;
    struct mlstm_rule rule;
    real scale;
};

static void check_state(struct problem *p, struct mlstm_state s, bool with_m) {
    CHECK_OPTIONAL(s.C, p->B, p->H, p->K, p->V);
    if (!tensor_given(s.C)) return;
    if (p->rule.normalise) CHECK_DENSE(s.n, p->B, p->H, p->K);
    if (with_m) CHECK_DENSE(s.m, p->B, p->H);
}

static struct problem describe(tensor q, tensor k, tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc,
                               struct mlstm_rule rule, int64_t chunk) {
    struct problem p = {.B = q.dim[0], .T = q.dim[1], .H = q.dim[2], .K = q.dim[3], .V = v.dim[3], .chunk = chunk,
                        .q = q, .k = k, .v = v, .i = i, .f = f, .doc = doc, .initial = initial, .rule = rule};
    p.W = p.V + (rule.normalise ? 1 : 0);
    p.scale = (real)(1 / sqrt((double)p.K));
    ASSERT(rule.normalise || rule.sigmoid_input);
    CHECK_ROWS(q, p.B, p.T, p.H, p.K);
    CHECK_ROWS(k, p.B, p.T, p.H, p.K);
    CHECK_ROWS(v, p.B, p.T, p.H, p.V);
    CHECK_ROWS(i, p.B, p.T, p.H);
    CHECK_ROWS(f, p.B, p.T, p.H);
    check_state(&p, initial, true);
    return p;
}

/* Element h of token t of a strided (B,T,H) view; the vector of head h in a strided (B,T,H,n) view. */
static inline real *gate_at(tensor x, int64_t row, int64_t t, int64_t h) {
    return (real *)x.data + row * x.stride[0] + t * x.stride[1] + h;
}

static inline real *head_at(tensor x, int64_t row, int64_t t, int64_t h) {
    return (real *)x.data + row * x.stride[0] + t * x.stride[1] + h * x.stride[2];
}

/* --- the gates ---------------------------------------------------------------------------------------------------- */

/* What one token makes of the stabiliser: the decay's logarithm, the input's weight, and the floor of |den|. */
struct gates {
    double a, dt, floor;
};

static double log_sigmoid(double v) {
    return (v < 0 ? v : 0) - log1p(exp(-fabs(v)));
}

/* *m is m_t-1 and becomes m_t. -infinity minus -infinity, which two shut gates would make, is not formed. */
static struct gates open_gates(double *m, double i, double f, bool sigmoid_input) {
    double lf = log_sigmoid(f), carried = lf + *m;
    if (sigmoid_input) return (struct gates){lf, 1 / (1 + exp(-i)), 1};
    *m = carried > i ? carried : i;
    return (struct gates){.a = carried == -INFINITY ? carried : carried - *m, .dt = i == -INFINITY ? 0 : exp(i - *m),
                          .floor = exp(-*m)};
}

/* a, dt and floor (B,T,H), floor unless NULL, of one head of one batch row. Returns the final m. */
static double head_gates(const struct problem *p, real *a, real *dt, real *floor, int64_t row, int64_t h) {
    const int32_t *doc = tensor_given(p->doc) ? (const int32_t *)p->doc.data + row * p->T : NULL;
    bool stabilised = !p->rule.sigmoid_input;
    double m = stabilised && tensor_given(p->initial.C) ? ((const real *)p->initial.m.data)[row * p->H + h] : 0;
    for (int64_t t = 0; t < p->T; t++) {
        int64_t at = (row * p->T + t) * p->H + h;
        if (doc && doc[t] != (t > 0 ? doc[t - 1] : 0)) m = 0;
        struct gates g = open_gates(&m, *gate_at(p->i, row, t, h), *gate_at(p->f, row, t, h), !stabilised);
        a[at] = (real)g.a;
        dt[at] = (real)g.dt;
        if (floor) floor[at] = (real)g.floor;
    }
    return m;
}

/* --- the arguments of SSD ----------------------------------------------------------------------------------------- */

/* An SSD's state (V+1,K) from C (K,V) and n (K), or back. */
static void state_to_ssd(const struct problem *p, real *state, const real *C, const real *n) {
    for (int64_t j = 0; j < p->V; j++)
        for (int64_t i = 0; i < p->K; i++) state[j * p->K + i] = C[i * p->V + j];
    if (p->W == p->V) return;
    for (int64_t i = 0; i < p->K; i++) state[p->V * p->K + i] = n ? n[i] : 0;
}

static void state_from_ssd(const struct problem *p, real *C, real *n, const real *state) {
    for (int64_t i = 0; i < p->K; i++)
        for (int64_t j = 0; j < p->V; j++) C[i * p->V + j] = state[j * p->K + i];
    if (n) memcpy(n, state + p->V * p->K, (size_t)p->K * sizeof(real));
}

/* The states of all heads, in `memory`; none where s is. Of a truncated gradient, n is not read. */
static tensor states_to_ssd(const struct problem *p, real *memory, struct mlstm_state s, bool with_n) {
    if (!tensor_given(s.C)) return tensor_none();
    for (int64_t head = 0; head < p->B * p->H; head++)
        state_to_ssd(p, memory + head * p->W * p->K, (const real *)s.C.data + head * p->K * p->V,
                     with_n ? (const real *)s.n.data + head * p->K : NULL);
    return tensor_4d(memory, REAL_DTYPE, p->B, p->H, p->W, p->K);
}

/* Where SSD puts the states that states_from_ssd() takes over; none where s is. */
static tensor states_wanted(const struct problem *p, real *memory, struct mlstm_state s) {
    return tensor_given(s.C) ? tensor_4d(memory, REAL_DTYPE, p->B, p->H, p->W, p->K) : tensor_none();
}

static void states_from_ssd(const struct problem *p, struct mlstm_state s, const real *memory) {
    for (int64_t head = 0; tensor_given(s.C) && head < p->B * p->H; head++)
        state_from_ssd(p, (real *)s.C.data + head * p->K * p->V,
                       p->rule.normalise ? (real *)s.n.data + head * p->K : NULL, memory + head * p->W * p->K);
}

/* A (B,T,H,W) or (B,T,H) view of scratch. */
static tensor wide(const struct problem *p, real *memory) {
    return tensor_4d(memory, REAL_DTYPE, p->B, p->T, p->H, p->W);
}

static tensor narrow(const struct problem *p, real *memory) {
    return tensor_3d(memory, REAL_DTYPE, p->B, p->T, p->H);
}

/* x = v, and 1 behind it. */
static void extend_values(const struct problem *p, real *x) {
#pragma omp parallel for collapse(2) schedule(static) if (p->B * p->T * p->H * p->V >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p->B; row++) {
        for (int64_t t = 0; t < p->T; t++) {
            for (int64_t h = 0; h < p->H; h++) {
                real *to = x + ((row * p->T + t) * p->H + h) * p->W;
                memcpy(to, head_at(p->v, row, t, h), (size_t)p->V * sizeof(real));
                if (p->W > p->V) to[p->V] = 1;
            }
        }
    }
}

/* --- sizes -------------------------------------------------------------------------------------------------------- */

static struct ssd_shape ssd_shape_of(struct mlstm_shape s) {
    return (struct ssd_shape){.B = s.B, .T = s.T, .H = s.H, .P = s.V + 1, .G = s.H, .N = s.K, .Q = s.Q};
}

static struct mlstm_shape shape_of(const struct problem *p) {
    return (struct mlstm_shape){.B = p->B, .T = p->T, .H = p->H, .K = p->K, .V = p->V, .Q = p->chunk};
}

/* What backward reads; with base NULL only the size counts. */
struct saved {
    real *inverse; /* (B,T,H): 1 / (N + eps), or 1 without a normaliser */
    real *slope;   /* (B,T,H): dden / (dh . h) */
    void *states;  /* ssd_saved() */
    size_t size;
};

static struct saved lay_out_saved(struct mlstm_shape s, void *base) {
    struct carver c = {.base = base};
    struct saved l = {.inverse = carve_reals(&c, s.B * s.T * s.H), .slope = carve_reals(&c, s.B * s.T * s.H)};
    l.states = base ? (char *)base + c.used : NULL;
    l.size = c.used + OP(ssd_saved)(ssd_shape_of(s));
    return l;
}

size_t OP(mlstm_saved)(struct mlstm_shape s) {
    return lay_out_saved(s, NULL).size;
}

/* Scratch of both passes: SSD's arguments, and what is left for SSD itself. */
struct layout {
    real *a, *dt, *floor; /* (B,T,H) */
    real *da, *ddt;       /* (B,T,H), backward only */
    real *x, *y, *dx;     /* (B,T,H,V+1); y: dy in backward; dx: backward only */
    real *initial, *final, *dinitial; /* (B,H,V+1,K); final: dfinal in backward; dinitial: backward only */
    char *ssd;
    size_t size;
};

static struct layout lay_out(struct mlstm_shape s, bool backward, void *base) {
    struct carver c = {.base = base};
    int64_t gates = s.B * s.T * s.H, width = s.V + 1, states = s.B * s.H * width * s.K;
    struct layout l = {.a = carve_reals(&c, gates), .dt = carve_reals(&c, gates),
                       .x = carve_reals(&c, gates * width), .y = carve_reals(&c, gates * width),
                       .initial = carve_reals(&c, states), .final = carve_reals(&c, states)};
    if (backward) {
        l.da = carve_reals(&c, gates);
        l.ddt = carve_reals(&c, gates);
        l.dx = carve_reals(&c, gates * width);
        l.dinitial = carve_reals(&c, states);
    } else {
        l.floor = carve_reals(&c, gates);
    }
    l.ssd = base ? c.base + c.used : NULL;
    l.size = c.used + (backward ? OP(ssd_backward_scratch) : OP(ssd_forward_scratch))(ssd_shape_of(s));
    return l;
}

size_t OP(mlstm_forward_scratch)(struct mlstm_shape s) {
    return lay_out(s, false, NULL).size;
}

size_t OP(mlstm_backward_scratch)(struct mlstm_shape s) {
    return lay_out(s, true, NULL).size;
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

/* h (V) of one token and head from s^-1 [num den] in y. The two numbers are what backward needs. */
static void normalise(const struct problem *p, real *h, real *inverse, real *slope, const real *y, real floor) {
    *inverse = 1;
    *slope = 0;
    if (p->rule.normalise) {
        real den = p->scale * y[p->V], size = fabs_real(den);
        bool above = size > floor;
        *inverse = 1 / ((above ? size : floor) + (real)p->rule.eps);
        if (above) *slope = den > 0 ? -*inverse : *inverse;
    }
    real factor = p->scale * *inverse;
    for (int64_t j = 0; j < p->V; j++) h[j] = factor * y[j];
}

void OP(mlstm_forward)(struct device *dev, tensor h, struct mlstm_state final, void *saved, tensor q, tensor k,
                       tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc, struct mlstm_rule rule,
                       int64_t chunk, void *scratch) {
    struct problem p = describe(q, k, v, i, f, initial, doc, rule, chunk);
    struct layout l = lay_out(shape_of(&p), false, scratch);
    struct saved s = lay_out_saved(shape_of(&p), saved);
    CHECK_ROWS(h, p.B, p.T, p.H, p.V);
    check_state(&p, final, true);

#pragma omp parallel for collapse(2) schedule(static) if (p.B * p.T * p.H * 16 >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p.B; row++) {
        for (int64_t head = 0; head < p.H; head++) {
            double m = head_gates(&p, l.a, l.dt, l.floor, row, head);
            if (tensor_given(final.C)) ((real *)final.m.data)[row * p.H + head] = (real)m;
        }
    }
    extend_values(&p, l.x);
    OP(ssd_forward)(dev, wide(&p, l.y), states_wanted(&p, l.final, final), s.states, wide(&p, l.x), narrow(&p, l.dt),
                    narrow(&p, l.a), k, q, tensor_none(), states_to_ssd(&p, l.initial, initial, rule.normalise), doc,
                    chunk, l.ssd);
    states_from_ssd(&p, final, l.final);
#pragma omp parallel for collapse(2) schedule(static) if (p.B * p.T * p.H * p.V >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p.B; row++) {
        for (int64_t t = 0; t < p.T; t++) {
            for (int64_t head = 0; head < p.H; head++) {
                int64_t at = (row * p.T + t) * p.H + head;
                real inverse, slope;
                normalise(&p, head_at(h, row, t, head), &inverse, &slope, l.y + at * p.W, l.floor[at]);
                if (saved) s.inverse[at] = inverse, s.slope[at] = slope;
            }
        }
    }
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* dy = s [E dden]. */
static void spread_gradient(const struct problem *p, real *dy, const struct saved *s, tensor dh, tensor h) {
    bool through_n = p->rule.normalise && !p->rule.truncated;
#pragma omp parallel for collapse(2) schedule(static) if (p->B * p->T * p->H * p->V >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p->B; row++) {
        for (int64_t t = 0; t < p->T; t++) {
            for (int64_t head = 0; head < p->H; head++) {
                int64_t at = (row * p->T + t) * p->H + head;
                const real *from = head_at(dh, row, t, head), *value = head_at(h, row, t, head);
                real *to = dy + at * p->W, factor = p->scale * s->inverse[at], sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < p->V; j++) sum += from[j] * value[j];
                for (int64_t j = 0; j < p->V; j++) to[j] = factor * from[j];
                if (p->W > p->V) to[p->V] = through_n ? p->scale * s->slope[at] * sum : 0;
            }
        }
    }
}

/* dv, di and df from what SSD gave. */
static void gather_gradients(const struct problem *p, const struct layout *l, tensor dv, tensor di, tensor df) {
#pragma omp parallel for collapse(2) schedule(static) if (p->B * p->T * p->H * p->V >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p->B; row++) {
        for (int64_t t = 0; t < p->T; t++) {
            for (int64_t h = 0; h < p->H; h++) {
                int64_t at = (row * p->T + t) * p->H + h;
                real d = l->ddt[at] * l->dt[at];
                memcpy(head_at(dv, row, t, h), l->dx + at * p->W, (size_t)p->V * sizeof(real));
                *gate_at(di, row, t, h) = p->rule.sigmoid_input ? d * sigmoid(-*gate_at(p->i, row, t, h)) : d;
                *gate_at(df, row, t, h) = l->da[at] * sigmoid(-*gate_at(p->f, row, t, h));
            }
        }
    }
}

void OP(mlstm_backward)(struct device *dev, tensor dq, tensor dk, tensor dv, tensor di, tensor df,
                        struct mlstm_state dinitial, tensor dh, struct mlstm_state dfinal, const void *saved, tensor h,
                        tensor q, tensor k, tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc,
                        struct mlstm_rule rule, int64_t chunk, void *scratch) {
    struct problem p = describe(q, k, v, i, f, initial, doc, rule, chunk);
    struct layout l = lay_out(shape_of(&p), true, scratch);
    ASSERT(saved != NULL);
    struct saved s = lay_out_saved(shape_of(&p), (void *)saved);
    CHECK_ROWS(dv, p.B, p.T, p.H, p.V);
    CHECK_ROWS(dh, p.B, p.T, p.H, p.V);
    CHECK_ROWS(h, p.B, p.T, p.H, p.V);
    CHECK_ROWS(di, p.B, p.T, p.H);
    CHECK_ROWS(df, p.B, p.T, p.H);
    check_state(&p, dinitial, false);
    check_state(&p, dfinal, false);

#pragma omp parallel for collapse(2) schedule(static) if (p.B * p.T * p.H * 16 >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p.B; row++)
        for (int64_t head = 0; head < p.H; head++) head_gates(&p, l.a, l.dt, NULL, row, head);
    extend_values(&p, l.x);
    spread_gradient(&p, l.y, &s, dh, h);
    OP(ssd_backward)(dev, wide(&p, l.dx), narrow(&p, l.ddt), narrow(&p, l.da), dk, dq,
                     states_wanted(&p, l.dinitial, dinitial), tensor_none(), wide(&p, l.y),
                     states_to_ssd(&p, l.final, dfinal, rule.normalise && !rule.truncated), s.states, wide(&p, l.x),
                     narrow(&p, l.dt), narrow(&p, l.a), k, q, tensor_none(),
                     states_to_ssd(&p, l.initial, initial, rule.normalise), doc, chunk, l.ssd);
    states_from_ssd(&p, dinitial, l.dinitial);
    gather_gradients(&p, &l, dv, di, df);
}

/* --- one token ---------------------------------------------------------------------------------------------------- */

/* The gates of one token, and *m, for a state that stays in memory: all are those of the rounded m that is kept with
 * it. Otherwise the state and its m would drift apart, by a rounding at every token. */
static struct gates step_gates(real *m, double i, double f, bool sigmoid_input) {
    double next = sigmoid_input ? 0 : *m;
    struct gates g = open_gates(&next, i, f, sigmoid_input);
    *m = (real)next;
    if ((double)*m == next) return g;
    double shift = next - (double)*m;
    return (struct gates){.a = g.a + shift, .dt = g.dt * exp(shift), .floor = g.floor * exp(shift)};
}

/* One head: C (K,V), n (K), or NULL without a normaliser, and *m go from one token to the next; h (V). */
static void step_head(real *h, real *C, real *n, real *m, const real *q, const real *k, const real *v, double i,
                      double f, int64_t K, int64_t V, struct mlstm_rule rule) {
    struct gates g = step_gates(m, i, f, rule.sigmoid_input);
    real keep = (real)exp(g.a), input = (real)g.dt, scale = (real)(1 / sqrt((double)K)), den = 0;
    memset(h, 0, (size_t)V * sizeof(real));
    for (int64_t r = 0; r < K; r++, C += V) {
        real inflow = input * k[r], query = scale * q[r];
        for (int64_t j = 0; j < V; j++) {
            C[j] = keep * C[j] + inflow * v[j];
            h[j] += query * C[j];
        }
        if (n == NULL) continue;
        n[r] = keep * n[r] + inflow;
        den += query * n[r];
    }
    if (n == NULL) return;
    real size = fabs_real(den), floor = (real)g.floor, inverse = 1 / ((size > floor ? size : floor) + (real)rule.eps);
    for (int64_t j = 0; j < V; j++) h[j] *= inverse;
}

void OP(mlstm_step)(struct device *dev, tensor h, struct mlstm_state state, tensor q, tensor k, tensor v, tensor i,
                    tensor f, struct mlstm_rule rule) {
    (void)dev;
    int64_t B = q.dim[0], H = q.dim[1], K = q.dim[2], V = v.dim[2];
    CHECK_ROWS(q, B, H, K);
    CHECK_ROWS(k, B, H, K);
    CHECK_ROWS(v, B, H, V);
    CHECK_ROWS(h, B, H, V);
    CHECK_ROWS(i, B, H);
    CHECK_ROWS(f, B, H);
    CHECK_DENSE(state.C, B, H, K, V);
    if (rule.normalise) CHECK_DENSE(state.n, B, H, K);
    CHECK_DENSE(state.m, B, H);
    ASSERT(rule.normalise || rule.sigmoid_input);
#pragma omp parallel for collapse(2) schedule(static) if (B * H * K * V >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < B; row++) {
        for (int64_t head = 0; head < H; head++) {
            int64_t at = row * H + head;
            step_head(row_of(h, row) + head * h.stride[1], (real *)state.C.data + at * K * V,
                      rule.normalise ? (real *)state.n.data + at * K : NULL, (real *)state.m.data + at,
                      row_of(q, row) + head * q.stride[1], row_of(k, row) + head * k.stride[1],
                      row_of(v, row) + head * v.stride[1], row_of(i, row)[head], row_of(f, row)[head], K, V, rule);
        }
    }
}
