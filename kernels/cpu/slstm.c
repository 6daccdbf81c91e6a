/* slstm.c: the sLSTM cell (xLSTM, arXiv 2405.04517, section 2.2) over a sequence, its gradient through time, and one
 * token. kernels/ops.h has the equations.
 *
 * Heads see only themselves, so the work is divided into heads of batch rows, each of which walks its tokens: per token
 * the product of the head's r (4P,P) with the y before, then P units by themselves. Backward walks the other way: the
 * units' gradients first, then the product with r turned round, which is what comes to the y before. The gradient of r
 * is a product over all tokens at once, made afterwards from dx and y, and that of bias a sum of dx, so no sum is
 * shared between threads.
 *
 * saved: SAVED numbers for each token and unit (enum saved).
 *
 * Cost, for a token's head: 8 P^2 FLOPs forward, twice that and 8 P^2 for dr backward; some 100 for each unit.
 */
#include "kernels/cpu/cpu.h"

/* Of one token and unit: gates, what the forget gate's logarithm is derived by, and the states after the token. */
enum saved { SAVED_I, SAVED_F, SAVED_SLOPE, SAVED_Z, SAVED_O, SAVED_C, SAVED_N, SAVED };
enum gate { GATE_I, GATE_F, GATE_Z, GATE_O, GATES };
enum part { PART_Y, PART_C, PART_N, PART_M, PARTS }; /* of a state */

struct problem {
    int64_t B, T, H, P, D;
    tensor x, r, bias, initial, doc;
};

static struct problem problem_of(tensor x, tensor r, tensor bias, tensor initial, tensor doc) {
    struct problem p = {.B = x.dim[0], .T = x.dim[1], .H = r.dim[0], .P = r.dim[2], .x = x, .r = r, .bias = bias,
                        .initial = initial, .doc = doc};
    p.D = p.H * p.P;
    ASSERT(p.B >= 1 && p.T >= 1 && p.H >= 1 && p.P >= 1);
    CHECK_ROWS(x, p.B, p.T, GATES * p.D);
    CHECK_DENSE(r, p.H, GATES * p.P, p.P);
    CHECK_DENSE(bias, GATES, p.D);
    CHECK_OPTIONAL(initial, p.B, PARTS, p.D);
    if (tensor_given(doc)) CHECK_INDEX(doc, p.B, p.T);
    return p;
}

/* Token t of row b starts a document: what was before does not count. */
static bool begins(const struct problem *p, int64_t b, int64_t t) {
    const int32_t *doc = p->doc.data;
    return doc && doc[b * p->T + t] != (t > 0 ? doc[b * p->T + t - 1] : 0);
}

static real *token_of(tensor t, int64_t b, int64_t i) {
    return (real *)t.data + b * t.stride[0] + i * t.stride[1];
}

/* Units of head h in part k of the state of row b. */
static real *state_of(tensor state, int64_t b, enum part k, int64_t h, int64_t P) {
    int64_t D = state.dim[2];
    return (real *)state.data + (b * PARTS + (int64_t)k) * D + h * P;
}

/* --- scratch: each thread's vectors of one head ------------------------------------------------------------------- */

struct slot {
    real *raw;                 /* 4 P: what enters the gates; in backward its gradient */
    real *y, *c, *n, *m;       /* P: the state; in backward the gradients of y, c, n, and nothing */
};

struct layout {
    struct slot slot[WORKERS_MAX];
    size_t size;
};

static struct layout lay_out(struct slstm_shape s, void *scratch) {
    struct carver k = {.base = scratch};
    struct layout l;
    int64_t slots = s.B * s.H < WORKERS_MAX ? s.B * s.H : WORKERS_MAX;
    for (int64_t i = 0; i < slots; i++)
        l.slot[i] = (struct slot){.raw = carve_reals(&k, GATES * s.P), .y = carve_reals(&k, s.P),
                                  .c = carve_reals(&k, s.P), .n = carve_reals(&k, s.P), .m = carve_reals(&k, s.P)};
    l.size = k.used;
    return l;
}

size_t OP(slstm_saved)(struct slstm_shape s) {
    return (size_t)(s.B * s.T * SAVED * s.H * s.P) * sizeof(real);
}

size_t OP(slstm_forward_scratch)(struct slstm_shape s) {
    return lay_out(s, NULL).size;
}

size_t OP(slstm_backward_scratch)(struct slstm_shape s) {
    return lay_out(s, NULL).size;
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

/* raw (4P) = x + bias + r y, for one head; x and bias have their gates D apart. */
static void gates_enter(real *restrict raw, const real *x, const real *bias, const real *restrict r,
                        const real *restrict y, int64_t P, int64_t D) {
    for (int64_t g = 0; g < GATES; g++) {
        for (int64_t j = 0; j < P; j++, r += P) {
            real sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < P; k++) sum += r[k] * y[k];
            raw[g * P + j] = x[g * D + j] + bias[g * D + j] + sum;
        }
    }
}

/* log sigmoid(v), without loss for any v. */
static real log_sigmoid(real v) {
#ifdef REAL_IS_FLOAT
    return -softplus(-v);
#else
    return (v < 0 ? v : 0) - log1p(exp(-fabs(v)));
#endif
}

/* One token of P units: the state moves on. `saved`: SAVED rows of P numbers, D apart, or NULL. */
static void units_forward(const struct slot *s, real *saved, int64_t P, int64_t D) {
    const real *raw = s->raw;
    for (int64_t j = 0; j < P; j++) {
        real in = raw[GATE_I * P + j], forget = raw[GATE_F * P + j];
        real kept = log_sigmoid(forget) + s->m[j];
        real m = s->n[j] == 0 || in > kept ? in : kept;
        real i = exp_real(in - m), f = exp_real(kept - m);
        if (f > 1) f = 1; /* only where n was 0; i is at most 1 in any case */
        real z = tanh_real(raw[GATE_Z * P + j]), o = sigmoid(raw[GATE_O * P + j]);
        s->m[j] = m;
        s->c[j] = f * s->c[j] + i * z;
        s->n[j] = f * s->n[j] + i;
        s->y[j] = o * s->c[j] / s->n[j];
        if (!saved) continue;
        saved[SAVED_I * D + j] = i;
        saved[SAVED_F * D + j] = f;
        saved[SAVED_SLOPE * D + j] = sigmoid(-forget);
        saved[SAVED_Z * D + j] = z;
        saved[SAVED_O * D + j] = o;
        saved[SAVED_C * D + j] = s->c[j];
        saved[SAVED_N * D + j] = s->n[j];
    }
}

static void state_clear(const struct slot *s, int64_t P) {
    size_t size = (size_t)P * sizeof(real);
    memset(s->y, 0, size);
    memset(s->c, 0, size);
    memset(s->n, 0, size);
    memset(s->m, 0, size);
}

/* Between a thread's vectors and a state (B,4,D). */
static void state_copy(const struct slot *s, tensor state, int64_t b, int64_t h, int64_t P, bool out) {
    real *const own[PARTS] = {s->y, s->c, s->n, s->m};
    for (int k = 0; k < PARTS; k++) {
        real *there = state_of(state, b, (enum part)k, h, P);
        memcpy(out ? there : own[k], out ? own[k] : there, (size_t)P * sizeof(real));
    }
}

static void head_forward(const struct problem *p, const struct slot *s, int64_t b, int64_t h, tensor y, real *saved) {
    const real *r = (const real *)p->r.data + h * GATES * p->P * p->P, *bias = (const real *)p->bias.data + h * p->P;
    for (int64_t t = 0; t < p->T; t++) {
        if (begins(p, b, t)) state_clear(s, p->P);
        gates_enter(s->raw, token_of(p->x, b, t) + h * p->P, bias, r, s->y, p->P, p->D);
        units_forward(s, saved ? saved + (b * p->T + t) * SAVED * p->D + h * p->P : NULL, p->P, p->D);
        memcpy(token_of(y, b, t) + h * p->P, s->y, (size_t)p->P * sizeof(real));
    }
}

void OP(slstm_forward)(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor r, tensor bias,
                       tensor initial, tensor doc, void *scratch) {
    (void)dev;
    struct problem p = problem_of(x, r, bias, initial, doc);
    CHECK_ROWS(y, p.B, p.T, p.D);
    CHECK_OPTIONAL(final, p.B, PARTS, p.D);
    struct layout layout = lay_out((struct slstm_shape){p.B, p.T, p.H, p.P}, scratch);
    int workers = worker_count(p.B * p.H, p.B * p.T * p.D * p.P * GATES);
#pragma omp parallel for collapse(2) schedule(static) num_threads(workers)
    for (int64_t b = 0; b < p.B; b++) {
        for (int64_t h = 0; h < p.H; h++) {
            const struct slot *s = &layout.slot[worker_index()];
            state_clear(s, p.P);
            if (tensor_given(initial)) state_copy(s, initial, b, h, p.P, false);
            head_forward(&p, s, b, h, y, saved);
            if (tensor_given(final)) state_copy(s, final, b, h, p.P, true);
        }
    }
}

void OP(slstm_step)(struct device *dev, tensor y, tensor state, tensor x, tensor r, tensor bias, void *scratch) {
    int64_t B = x.dim[0];
    tensor tokens = tensor_split_first(x, B, 1), out = tensor_split_first(y, B, 1);
    OP(slstm_forward)(dev, out, state, NULL, tokens, r, bias, state, tensor_none(), scratch);
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* What backward walks with, beside the problem. */
struct gradients {
    tensor dx, dy;
    const real *saved;
    real clip;
};

/* One token of P units. s->y: the gradient of y; s->c, s->n: what comes from the tokens after, and goes to those
 * before. `before`: the states c and n before the token, NULL where they are 0. */
static void units_backward(const struct slot *s, const real *saved, const real *y, const real *c_before,
                           const real *n_before, int64_t P, int64_t D) {
    for (int64_t j = 0; j < P; j++) {
        real i = saved[SAVED_I * D + j], f = saved[SAVED_F * D + j], z = saved[SAVED_Z * D + j];
        real o = saved[SAVED_O * D + j], share = s->y[j] / saved[SAVED_N * D + j];
        real dc = s->c[j] + share * o, dn = s->n[j] - share * y[j];
        real kept = c_before ? c_before[j] * dc + n_before[j] * dn : 0;
        s->raw[GATE_I * P + j] = i * (z * dc + dn);
        s->raw[GATE_F * P + j] = f * kept * saved[SAVED_SLOPE * D + j];
        s->raw[GATE_Z * P + j] = i * (1 - z * z) * dc;
        s->raw[GATE_O * P + j] = (1 - o) * y[j] * s->y[j];
        s->c[j] = f * dc;
        s->n[j] = f * dn;
    }
}

/* y (P) = r^T raw (4P): what comes to the y before; kept within the clip. */
static void gates_leave(real *restrict y, const real *restrict raw, const real *restrict r, real clip, int64_t P) {
    memset(y, 0, (size_t)P * sizeof *y);
    for (int64_t i = 0; i < GATES * P; i++, r += P) {
        real v = raw[i];
#pragma omp simd
        for (int64_t k = 0; k < P; k++) y[k] += v * r[k];
    }
    for (int64_t k = 0; clip > 0 && k < P; k++) y[k] = y[k] > clip ? clip : y[k] < -clip ? -clip : y[k];
}

static void head_backward(const struct problem *p, const struct slot *s, int64_t b, int64_t h, tensor y,
                          const struct gradients *g) {
    int64_t P = p->P, D = p->D;
    const real *r = (const real *)p->r.data + h * GATES * P * P;
    for (int64_t t = p->T - 1; t >= 0; t--) {
        const real *saved = g->saved + (b * p->T + t) * SAVED * D + h * P, *before = saved - SAVED * D;
        const real *c = before + SAVED_C * D, *n = before + SAVED_N * D, *dy = token_of(g->dy, b, t) + h * P;
        bool first = begins(p, b, t);
        if (t == 0 && tensor_given(p->initial))
            c = state_of(p->initial, b, PART_C, h, P), n = state_of(p->initial, b, PART_N, h, P);
        else if (t == 0) c = n = NULL;
        for (int64_t j = 0; j < P; j++) s->y[j] += dy[j];
        units_backward(s, saved, token_of(y, b, t) + h * P, first ? NULL : c, n, P, D);
        for (int64_t k = 0; k < GATES; k++)
            memcpy(token_of(g->dx, b, t) + k * D + h * P, s->raw + k * P, (size_t)P * sizeof(real));
        gates_leave(s->y, s->raw, r, g->clip, P);
        if (first) state_clear(s, P);
    }
}

/* dr of one head += the products of dx with the y before, over the tokens from..to of row b, none of which but perhaps
 * the first starts a document. `before` is the y of the token before the first, NULL where it is 0. */
static void add_dr(const struct problem *p, real *dr, int64_t h, int64_t b, int64_t from, int64_t to,
                   const real *before, tensor dx, tensor y) {
    int64_t P = p->P, last = to - from - 1;
    int64_t x_step = dx.stride[1], y_step = y.stride[1];
    for (int64_t g = 0; g < GATES; g++) {
        const real *gates = token_of(dx, b, from) + g * p->D + h * P;
        real *sum = dr + (h * GATES + g) * P * P;
        if (before) gemm(true, false, P, P, 1, 1, gates, x_step, before, P, 1, sum, P);
        if (last > 0)
            gemm(true, false, P, P, last, 1, gates + x_step, x_step, token_of(y, b, from) + h * P, y_step, 1, sum, P);
    }
}

static void gradient_of_r(const struct problem *p, tensor dr, tensor dx, tensor y) {
    for (int64_t b = 0; b < p->B; b++) {
        for (int64_t from = 0, to; from < p->T; from = to) {
            for (to = from + 1; to < p->T && !begins(p, b, to);) to++;
            for (int64_t h = 0; h < p->H; h++) {
                bool goes_on = from == 0 && !begins(p, b, 0) && tensor_given(p->initial);
                const real *before = goes_on ? state_of(p->initial, b, PART_Y, h, p->P) : NULL;
                add_dr(p, dr.data, h, b, from, to, before, dx, y);
            }
        }
    }
}

void OP(slstm_backward)(struct device *dev, tensor dx, tensor dr, tensor dbias, tensor dinitial, tensor dy,
                        tensor dfinal, const void *saved, tensor y, tensor x, tensor r, tensor bias, tensor initial,
                        tensor doc, double clip, void *scratch) {
    (void)dev;
    struct problem p = problem_of(x, r, bias, initial, doc);
    struct gradients g = {.dx = dx, .dy = dy, .saved = saved, .clip = (real)clip};
    CHECK_ROWS(dx, p.B, p.T, GATES * p.D);
    CHECK_DENSE(dr, p.H, GATES * p.P, p.P);
    CHECK_DENSE(dbias, GATES, p.D);
    CHECK_OPTIONAL(dinitial, p.B, PARTS, p.D);
    CHECK_ROWS(dy, p.B, p.T, p.D);
    CHECK_OPTIONAL(dfinal, p.B, PARTS, p.D);
    CHECK_ROWS(y, p.B, p.T, p.D);
    struct layout layout = lay_out((struct slstm_shape){p.B, p.T, p.H, p.P}, scratch);
    int workers = worker_count(p.B * p.H, p.B * p.T * p.D * p.P * GATES);
#pragma omp parallel for collapse(2) schedule(static) num_threads(workers)
    for (int64_t b = 0; b < p.B; b++) {
        for (int64_t h = 0; h < p.H; h++) {
            const struct slot *s = &layout.slot[worker_index()];
            state_clear(s, p.P);
            if (tensor_given(dfinal)) state_copy(s, dfinal, b, h, p.P, false);
            head_backward(&p, s, b, h, y, &g);
            memset(s->m, 0, (size_t)p.P * sizeof(real));
            if (tensor_given(dinitial)) state_copy(s, dinitial, b, h, p.P, true);
        }
    }
    gradient_of_r(&p, dr, dx, y);
    for (int64_t b = 0; b < p.B; b++)
        add_column_sums(dbias.data, token_of(dx, b, 0), p.T, GATES * p.D, dx.stride[1]);
}
