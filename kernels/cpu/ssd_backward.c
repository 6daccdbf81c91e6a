/* ssd_backward.c: the complete backward pass of SSD on the CPU (forward and notation: ssd.c).
 *
 * D_k is the gradient of the state that enters chunk k, so that of the state that leaves it is D_k+1. In a chunk, with
 * e_ij = exp(cum_i - cum_j) for j <= i in one document, else 0, and w_ij = dy_i . x_j:
 *   1. E_k = sum_i exp(cum_i) dy_i (outer) c_i
 *   2. D_k = E_k + exp(cum_last) D_k+1,   D_K = dfinal,   dinitial = D_0
 *   3. u_j = D_k+1^T x_j,  v_i = Z_k^T dy_i,  out_j = exp(cum_last - cum_j),  into_i = exp(cum_i)
 *      f_ij = w_ij (c_i . b_j) e_ij,  r_j = u_j . b_j,  q_i = into_i (v_i . c_i)
 *      dx_j  = out_j dt_j D_k+1 b_j + sum_{i>=j} (c_i . b_j) e_ij dt_j dy_i + d dy_j
 *      db_j  = sum_heads out_j dt_j u_j + sum_i (sum_heads w_ij e_ij dt_j) c_i
 *      dc_i  = sum_heads into_i v_i     + sum_j (sum_heads w_ij e_ij dt_j) b_j
 *      dd    = sum_i w_ii
 *      ddt_j = out_j r_j + sum_{i>=j} f_ij                   (dt and a are independent values here)
 *      da_m  = sum_{i>=m} sum_{j<m} f_ij dt_j + sum_{j<m} out_j dt_j r_j + sum_{i>=m} q_i
 *              + exp(cum_last) <Z_k, D_k+1>
 * da_m is a sum over the paths that cross position m and nothing else: unlike the reverse cumulative sum of
 * dy.(y - d x) - dt ddt, to which it is equal, it does not cancel in float. Its first term: rows i are visited from the
 * last to the first, s_j = sum_{i>=m} f_ij is kept, and the term is sum_{j<m} s_j dt_j.
 *
 * Work: 1 and 3 in parallel over (batch row, group, chunk), heads of a group in order, tiles of SSD_ROWS rows from the
 * last to the first; 2 over (batch row, head). Only dd is summed over items, and that in their order: the order of sums
 * does not depend on the number of threads. FLOPs per token: G 6N Q/2 + H (4P Q/2 + 8PN).
 */
#include "kernels/cpu/ssd.h"

/* What one thread needs: tiles of rows x L, vectors of L for every head of a group. */
struct head_slot {
    struct ssd_decay decay;
    real *flow;   /* s_j, and after the first row: sum_{i>=j} f_ij */
    real *across; /* the first term of da */
    real *r, *q;
};

struct slot {
    real *cb, *dcb, *w, *weights; /* tiles */
    real *scaled, *product;       /* (L,N) */
    real *heads;                  /* H/G times head_reals() */
};

struct layout {
    real *gradients; /* D: (B,H,K+1,P,N) */
    real *wholes;    /* (B,H,K) */
    real *through;   /* (B,H,K): exp(cum_last) <Z_k, D_k+1> */
    real *skip;      /* (B,H,K): parts of dd */
    struct slot slot[WORKERS_MAX];
    size_t size;
};

/* The vectors of one head; with base NULL only their size counts. */
static struct head_slot carve_head(struct carver *c, int64_t Q) {
    return (struct head_slot){.decay = ssd_carve_decay(c, Q), .flow = carve_reals(c, Q), .across = carve_reals(c, Q),
                              .r = carve_reals(c, Q), .q = carve_reals(c, Q)};
}

static int64_t head_reals(int64_t Q) {
    struct carver c = {.base = NULL};
    carve_head(&c, Q);
    return (int64_t)(c.used / sizeof(real));
}

static struct layout lay_out(struct ssd_shape s, void *scratch) {
    struct carver c = {.base = scratch};
    int64_t Q = ssd_min(s.Q, s.T), K = (s.T + Q - 1) / Q, rows = ssd_min(Q, SSD_ROWS);
    int64_t slots = ssd_min(WORKERS_MAX, s.B * s.G * K);
    struct layout l = {.gradients = carve_reals(&c, s.B * s.H * (K + 1) * s.P * s.N),
                       .wholes = carve_reals(&c, s.B * s.H * K),
                       .through = carve_reals(&c, s.B * s.H * K),
                       .skip = carve_reals(&c, s.B * s.H * K)};
    for (int64_t i = 0; i < slots; i++) {
        struct slot *t = &l.slot[i];
        t->cb = carve_reals(&c, rows * Q);
        t->dcb = carve_reals(&c, rows * Q);
        t->w = carve_reals(&c, rows * Q);
        t->weights = carve_reals(&c, rows * Q);
        t->scaled = carve_reals(&c, Q * s.N);
        t->product = carve_reals(&c, Q * s.N);
        t->heads = carve_reals(&c, s.H / s.G * head_reals(Q));
    }
    l.size = c.used;
    return l;
}

size_t OP(ssd_backward_scratch)(struct ssd_shape shape) {
    return lay_out(shape, NULL).size;
}

/* The vectors of the i-th head of a group. */
static struct head_slot head_slot(const struct slot *t, int64_t i, int64_t Q) {
    struct carver c = {.base = (char *)(t->heads + i * head_reals(Q))};
    return carve_head(&c, Q);
}

struct backward {
    struct ssd_problem p;
    struct layout l;
    tensor dx, ddt, da, db, dc, dinitial, dd, dy, dfinal;
    const real *states; /* Z: (B,H,K,P,N) */
};

static const real *state_entering(const struct backward *w, int64_t row, int64_t h, int64_t index) {
    return w->states + ((row * w->p.H + h) * w->p.K + index) * w->p.P * w->p.N;
}

static real *state_gradient(const struct backward *w, int64_t row, int64_t h, int64_t index) {
    return w->l.gradients + ((row * w->p.H + h) * (w->p.K + 1) + index) * w->p.P * w->p.N;
}

static int64_t place(const struct backward *w, int64_t row, int64_t h, int64_t index) {
    return (row * w->p.H + h) * w->p.K + index;
}

/* --- 1 and 2: gradients of the states ----------------------------------------------------------------------------- */

/* 1: E_k of every head of the group, to where D_k goes. */
static void chunk_outflow(const struct backward *w, const struct slot *t, int64_t row, int64_t g, int64_t index) {
    const struct ssd_problem *p = &w->p;
    struct ssd_chunk k = OP(ssd_chunk)(p, row, index);
    struct ssd_decay decay = head_slot(t, 0, p->Q).decay;
    const real *c = ssd_rows(p->c, row, k.t0, g * p->N);
    bool wanted = index > 0 || tensor_given(w->dinitial);
    for (int64_t h = g * (p->H / p->G); h < (g + 1) * (p->H / p->G); h++) {
        OP(ssd_decay)(&decay, p, &k, h);
        w->l.wholes[place(w, row, h, index)] = decay.whole;
        if (!wanted) continue;
        const real *dy = ssd_rows(w->dy, row, k.t0, h * p->P);
        OP(ssd_scale_rows)(t->scaled, c, p->c.stride[1], decay.into, NULL, k.entering, p->N);
        gemm(true, false, p->P, p->N, k.entering, 1, dy, w->dy.stride[1], t->scaled, p->N, 0,
             state_gradient(w, row, h, index), p->N);
    }
}

static real dot(const real *a, const real *b, int64_t count) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* 2: from the last chunk to the first. */
static void pass_gradients(const struct backward *w, int64_t row, int64_t h) {
    const struct ssd_problem *p = &w->p;
    int64_t size = p->P * p->N;
    real *last = state_gradient(w, row, h, p->K);
    if (tensor_given(w->dfinal)) memcpy(last, ssd_state(p, w->dfinal.data, row, h), (size_t)size * sizeof(real));
    else memset(last, 0, (size_t)size * sizeof(real));
    for (int64_t index = p->K - 1; index >= 0; index--) {
        const real *leaving = state_gradient(w, row, h, index + 1), *state = state_entering(w, row, h, index);
        real *entering = state_gradient(w, row, h, index), whole = w->l.wholes[place(w, row, h, index)];
        w->l.through[place(w, row, h, index)] = whole == 0 ? 0 : whole * dot(state, leaving, size);
        if (whole == 0 || (index == 0 && !tensor_given(w->dinitial))) continue;
        for (int64_t i = 0; i < size; i++) entering[i] += whole * leaving[i];
    }
    if (!tensor_given(w->dinitial)) return;
    memcpy(ssd_state(p, w->dinitial.data, row, h), state_gradient(w, row, h, 0), (size_t)size * sizeof(real));
}

/* --- 3: gradients of the inputs of a chunk ------------------------------------------------------------------------ */

static void add_scaled(real *out, const real *in, real factor, int64_t count) {
    for (int64_t n = 0; n < count; n++) out[n] += factor * in[n];
}

/* The parts of dx and db that come from the leaving state, and r. */
static void through_leaving(const struct backward *w, const struct slot *t, const struct head_slot *s,
                            const struct ssd_chunk *k, int64_t g, int64_t h, int64_t index) {
    const struct ssd_problem *p = &w->p;
    int64_t first = k->leaving, count = k->L - first;
    real *dx = ssd_rows(w->dx, k->row, k->t0, h * p->P);
    bool reached = index + 1 < p->K || tensor_given(w->dfinal);
    for (int64_t j = 0; j < (reached ? first : k->L); j++)
        memset(dx + j * w->dx.stride[1], 0, (size_t)p->P * sizeof(real));
    memset(s->r, 0, (size_t)k->L * sizeof(real));
    if (!reached) return;

    const real *x = ssd_rows(p->x, k->row, k->t0 + first, h * p->P);
    const real *gradient = state_gradient(w, k->row, h, index + 1);
    const real *b = ssd_rows(p->b, k->row, k->t0 + first, g * p->N);
    real *db = ssd_rows(w->db, k->row, k->t0 + first, g * p->N);
    OP(ssd_scale_rows)(t->scaled, b, p->b.stride[1], s->decay.out + first, s->decay.dt + first, count, p->N);
    gemm(false, true, count, p->P, p->N, 1, t->scaled, p->N, gradient, p->N, 0, dx + first * w->dx.stride[1],
         w->dx.stride[1]);
    gemm(false, false, count, p->N, p->P, 1, x, p->x.stride[1], gradient, p->N, 0, t->product, p->N);
    for (int64_t j = 0; j < count; j++) {
        const real *u = t->product + j * p->N;
        s->r[first + j] = dot(u, b + j * p->b.stride[1], p->N);
        add_scaled(db + j * w->db.stride[1], u, s->decay.out[first + j] * s->decay.dt[first + j], p->N);
    }
}

/* The part of dc that comes from the entering state, and q. */
static void through_entering(const struct backward *w, const struct slot *t, const struct head_slot *s,
                             const struct ssd_chunk *k, int64_t g, int64_t h, int64_t index) {
    const struct ssd_problem *p = &w->p;
    memset(s->q, 0, (size_t)k->L * sizeof(real));
    if (index == 0 && !tensor_given(p->initial)) return; /* the state is 0 */

    const real *dy = ssd_rows(w->dy, k->row, k->t0, h * p->P), *c = ssd_rows(p->c, k->row, k->t0, g * p->N);
    real *dc = ssd_rows(w->dc, k->row, k->t0, g * p->N);
    gemm(false, false, k->entering, p->N, p->P, 1, dy, w->dy.stride[1], state_entering(w, k->row, h, index), p->N, 0,
         t->product, p->N);
    for (int64_t i = 0; i < k->entering; i++) {
        const real *v = t->product + i * p->N;
        s->q[i] = s->decay.into[i] * dot(v, c + i * p->c.stride[1], p->N);
        add_scaled(dc + i * w->dc.stride[1], v, s->decay.into[i], p->N);
    }
}

/* The sum over the first `count` of `limit` elements; the last ones by a mask, in whole vectors. */
static real dot_before(const real *a, const real *b, int64_t count, int64_t limit) {
    int64_t whole = count / SSD_PIVOT * SSD_PIVOT, end = ssd_min(whole + SSD_PIVOT, limit);
    real sum = dot(a, b, whole), rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int64_t i = whole; i < end; i++) rest += i < count ? a[i] * b[i] : 0;
    return sum + rest;
}

/* The rows i0..i1-1, from the last to the first, of the L x L matrices of one head; columns start at j0. `weights` is
 * the matrix that took x to y, the gradient of c b^T is added to dcb, and flow and across go on. Columns of other
 * documents have decay 0, so their part of flow and across is 0. */
static real tile_rows(const struct slot *t, const struct head_slot *s, const struct ssd_chunk *k, int64_t i0,
                      int64_t i1, int64_t j0, real d) {
    int64_t columns = i1 - j0;
    const real *dt = s->decay.dt + j0;
    real skip = 0, *flow = s->flow + j0;
    OP(ssd_tile_decay)(t->weights, &s->decay, k, i0, i1, j0);
    for (int64_t i = i1 - 1; i >= i0; i--) {
        const real *cb = t->cb + (i - i0) * columns, *w = t->w + (i - i0) * columns;
        real *dcb = t->dcb + (i - i0) * columns, *weights = t->weights + (i - i0) * columns;
        int64_t end = ssd_whole(i + 1 - j0, columns);
#pragma omp simd
        for (int64_t j = 0; j < end; j++) {
            real e = weights[j];
            flow[j] += w[j] * cb[j] * e;
            dcb[j] += w[j] * e * dt[j];
            weights[j] = cb[j] * e * dt[j];
        }
        weights[i - j0] += d;
        skip += w[i - j0];
        s->across[i] = dot_before(flow, dt, i - j0, columns);
    }
    return skip;
}

/* One tile of rows of a chunk, for every head of the group. */
static void tile_gradients(const struct backward *w, const struct slot *t, const struct ssd_chunk *k, int64_t g,
                           int64_t index, int64_t i0) {
    const struct ssd_problem *p = &w->p;
    int64_t i1 = ssd_min(i0 + SSD_ROWS, k->L), j0 = OP(ssd_document_start)(k, i0), rows = i1 - i0, columns = i1 - j0;
    const real *b = ssd_rows(p->b, k->row, k->t0 + j0, g * p->N), *c = ssd_rows(p->c, k->row, k->t0 + i0, g * p->N);
    real *db = ssd_rows(w->db, k->row, k->t0 + j0, g * p->N), *dc = ssd_rows(w->dc, k->row, k->t0 + i0, g * p->N);
    gemm(false, true, rows, columns, p->N, 1, c, p->c.stride[1], b, p->b.stride[1], 0, t->cb, columns);
    memset(t->dcb, 0, (size_t)(rows * columns) * sizeof(real));
    for (int64_t i = 0; i < p->H / p->G; i++) {
        int64_t h = g * (p->H / p->G) + i;
        struct head_slot s = head_slot(t, i, p->Q);
        const real *x = ssd_rows(p->x, k->row, k->t0 + j0, h * p->P);
        const real *dy = ssd_rows(w->dy, k->row, k->t0 + i0, h * p->P);
        real *dx = ssd_rows(w->dx, k->row, k->t0 + j0, h * p->P), d = tensor_given(p->d) ? ((real *)p->d.data)[h] : 0;
        gemm(false, true, rows, columns, p->P, 1, dy, w->dy.stride[1], x, p->x.stride[1], 0, t->w, columns);
        w->l.skip[place(w, k->row, h, index)] += tile_rows(t, &s, k, i0, i1, j0, d);
        gemm(true, false, columns, p->P, rows, 1, t->weights, columns, dy, w->dy.stride[1], 1, dx, w->dx.stride[1]);
    }
    gemm(true, false, columns, p->N, rows, 1, t->dcb, columns, c, p->c.stride[1], 1, db, w->db.stride[1]);
    gemm(false, false, rows, p->N, columns, 1, t->dcb, columns, b, p->b.stride[1], 1, dc, w->dc.stride[1]);
}

/* ddt and da of one head in one chunk, from their parts. */
static void step_gradients(const struct backward *w, const struct head_slot *s, const struct ssd_chunk *k, int64_t h,
                           int64_t index) {
    const struct ssd_problem *p = &w->p;
    int64_t at = (k->row * p->T + k->t0) * p->H + h;
    real *ddt = (real *)w->ddt.data + at, *da = (real *)w->da.data + at;
    real before = w->l.through[place(w, k->row, h, index)], after = 0;
    for (int64_t i = 0; i < k->L; i++) {
        ddt[i * p->H] = s->flow[i] + s->decay.out[i] * s->r[i];
        da[i * p->H] = s->across[i] + before;
        before += s->decay.out[i] * s->decay.dt[i] * s->r[i];
    }
    for (int64_t i = k->L - 1; i >= 0; i--) {
        after += s->q[i];
        da[i * p->H] += after;
    }
}

static void chunk_gradients(const struct backward *w, const struct slot *t, int64_t row, int64_t g, int64_t index) {
    const struct ssd_problem *p = &w->p;
    struct ssd_chunk k = OP(ssd_chunk)(p, row, index);
    int64_t heads = p->H / p->G;
    for (int64_t j = 0; j < k.L; j++) {
        memset(ssd_rows(w->db, row, k.t0 + j, g * p->N), 0, (size_t)p->N * sizeof(real));
        memset(ssd_rows(w->dc, row, k.t0 + j, g * p->N), 0, (size_t)p->N * sizeof(real));
    }
    for (int64_t i = 0; i < heads; i++) {
        struct head_slot s = head_slot(t, i, p->Q);
        OP(ssd_decay)(&s.decay, p, &k, g * heads + i);
        through_leaving(w, t, &s, &k, g, g * heads + i, index);
        through_entering(w, t, &s, &k, g, g * heads + i, index);
        memset(s.flow, 0, (size_t)k.L * sizeof(real));
        w->l.skip[place(w, row, g * heads + i, index)] = 0;
    }
    for (int64_t i0 = (k.L - 1) / SSD_ROWS * SSD_ROWS; i0 >= 0; i0 -= SSD_ROWS) tile_gradients(w, t, &k, g, index, i0);
    for (int64_t i = 0; i < heads; i++) {
        struct head_slot s = head_slot(t, i, p->Q);
        step_gradients(w, &s, &k, g * heads + i, index);
    }
}

/* --- the whole ---------------------------------------------------------------------------------------------------- */

static void check_gradients(const struct backward *w) {
    const struct ssd_problem *p = &w->p;
    CHECK_ROWS(w->dx, p->B, p->T, p->H, p->P);
    CHECK_ROWS(w->dy, p->B, p->T, p->H, p->P);
    CHECK_ROWS(w->db, p->B, p->T, p->G, p->N);
    CHECK_ROWS(w->dc, p->B, p->T, p->G, p->N);
    CHECK_DENSE(w->ddt, p->B, p->T, p->H);
    CHECK_DENSE(w->da, p->B, p->T, p->H);
    CHECK_OPTIONAL(w->dinitial, p->B, p->H, p->P, p->N);
    CHECK_OPTIONAL(w->dfinal, p->B, p->H, p->P, p->N);
    CHECK_OPTIONAL(w->dd, p->H);
    ASSERT((w->dx.stride[2] == p->P && w->dy.stride[2] == p->P) || p->H == 1);
    ASSERT((w->db.stride[2] == p->N && w->dc.stride[2] == p->N) || p->G == 1);
    ASSERT(w->states != NULL);
}

static void backward_run(const struct backward *w) {
    const struct ssd_problem *p = &w->p;
    int64_t size = p->B * p->T * p->H * p->P * p->N;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(worker_count(p->B * p->G * p->K, size))
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t g = 0; g < p->G; g++)
            for (int64_t index = 0; index < p->K; index++)
                chunk_outflow(w, &w->l.slot[worker_index()], row, g, index);
#pragma omp parallel for collapse(2) schedule(static) if (size >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t h = 0; h < p->H; h++) pass_gradients(w, row, h);
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(worker_count(p->B * p->G * p->K, size))
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t g = 0; g < p->G; g++)
            for (int64_t index = 0; index < p->K; index++)
                chunk_gradients(w, &w->l.slot[worker_index()], row, g, index);
    if (!tensor_given(w->dd)) return;
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t index = 0; index < p->K; index++)
                ((real *)w->dd.data)[h] += w->l.skip[place(w, row, h, index)];
}

void OP(ssd_backward)(struct device *dev, tensor dx, tensor ddt, tensor da, tensor db, tensor dc, tensor dinitial,
                      tensor dd, tensor dy, tensor dfinal, const void *saved, tensor x, tensor dt, tensor a, tensor b,
                      tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch) {
    (void)dev;
    struct backward w = {.p = OP(ssd_problem)(x, dt, a, b, c, d, initial, doc, chunk), .dx = dx, .ddt = ddt, .da = da,
                         .db = db, .dc = dc, .dinitial = dinitial, .dd = dd, .dy = dy, .dfinal = dfinal,
                         .states = saved};
    check_gradients(&w);
    w.l = lay_out((struct ssd_shape){w.p.B, w.p.T, w.p.H, w.p.P, w.p.G, w.p.N, w.p.Q}, scratch);
    backward_run(&w);
}
