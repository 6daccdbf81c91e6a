/* ssd.c: SSD, the sequence operation of Mamba-2 (arXiv 2405.21060, section 6), on the CPU: forward pass and step.
 *
 * A row of T tokens is cut into K = ceil(T/Q) chunks of L <= Q tokens. With cum = the running sum of a in the chunk:
 *   1. chunks' states    S_k   = sum_j exp(cum_last - cum_j) dt_j x_j (outer) b_j
 *   2. entering states   Z_k+1 = exp(cum_last) Z_k + S_k,   Z_0 = initial
 *   3. outputs           y_i   = exp(cum_i) Z_k c_i + sum_{j<=i} (c_i . b_j) exp(cum_i - cum_j) dt_j x_j + d x_i
 * Every exponent is at most 0 (clamped against rounding). Documents: see ssd_chunk(); products of positions of
 * different documents are 0.
 *
 * 1 and 3 are matrix products of L x N, L x P and L x L. They run in parallel over (batch row, group, chunk), in 3 also
 * over tiles of SSD_ROWS rows; each item calls BLAS on one thread. c b^T is computed once for the heads of a group, the
 * d x term rides on the diagonal of the L x L matrix. 2 is elementwise, in parallel over (batch row, head). No sum
 * crosses two items, so the order of sums does not depend on the number of threads.
 *
 * FLOPs per token: G 2N Q/2 + H (2P Q/2 + 4PN), where Q/2 becomes (Q + SSD_ROWS)/2 for the tiles on the diagonal. About
 * 70 % of the time is spent in BLAS; with P 64 the whole reaches 40 % (N 64, Q 64) to 60 % (N 128, Q 256) of the speed
 * of a large product on one core with AVX-512. Chunks of about N are the fastest.
 * saved: the states Z_0 .. Z_K-1, (B,H,K,P,N).
 */
#include "kernels/cpu/ssd.h"

/* --- the problem and its chunks ----------------------------------------------------------------------------------- */

struct ssd_problem OP(ssd_problem)(tensor x, tensor dt, tensor a, tensor b, tensor c, tensor d, tensor initial,
                                   tensor doc, int64_t chunk) {
    struct ssd_problem p = {.B = x.dim[0], .T = x.dim[1], .H = x.dim[2], .P = x.dim[3], .G = b.dim[2], .N = b.dim[3],
                            .x = x, .dt = dt, .a = a, .b = b, .c = c, .d = d, .initial = initial, .doc = doc};
    ASSERT(p.B >= 1 && p.T >= 1 && p.H >= 1 && p.P >= 1 && p.G >= 1 && p.N >= 1 && chunk >= 1 && p.H % p.G == 0);
    p.Q = ssd_min(chunk, p.T);
    p.K = (p.T + p.Q - 1) / p.Q;
    CHECK_ROWS(x, p.B, p.T, p.H, p.P);
    CHECK_ROWS(b, p.B, p.T, p.G, p.N);
    CHECK_ROWS(c, p.B, p.T, p.G, p.N);
    CHECK_DENSE(dt, p.B, p.T, p.H);
    CHECK_DENSE(a, p.B, p.T, p.H);
    CHECK_OPTIONAL(d, p.H);
    CHECK_OPTIONAL(initial, p.B, p.H, p.P, p.N);
    if (tensor_given(doc)) CHECK_INDEX(doc, p.B, p.T);
    ASSERT(x.stride[2] == p.P || p.H == 1);
    ASSERT((b.stride[2] == p.N && c.stride[2] == p.N) || p.G == 1);
    return p;
}

struct ssd_chunk OP(ssd_chunk)(const struct ssd_problem *p, int64_t row, int64_t index) {
    struct ssd_chunk k = {.row = row, .t0 = index * p->Q};
    k.L = ssd_min(p->Q, p->T - k.t0);
    k.entering = k.L;
    k.open = true;
    if (!tensor_given(p->doc)) return k;

    k.doc = (const int32_t *)p->doc.data + row * p->T + k.t0;
    int32_t before = k.t0 > 0 ? k.doc[-1] : 0, last = k.doc[k.L - 1];
    for (k.entering = 0; k.entering < k.L && k.doc[k.entering] == before;) k.entering++;
    k.leaving = OP(ssd_document_start)(&k, k.L - 1);
    k.open = before == last;
    return k;
}

int64_t OP(ssd_document_start)(const struct ssd_chunk *k, int64_t i) {
    if (k->doc == NULL) return 0;
    int64_t start = i;
    while (start > 0 && k->doc[start - 1] == k->doc[i]) start--;
    return start;
}

void OP(ssd_decay)(struct ssd_decay *decay, const struct ssd_problem *p, const struct ssd_chunk *k, int64_t h) {
    const real *a = (const real *)p->a.data + (k->row * p->T + k->t0) * p->H + h;
    const real *dt = (const real *)p->dt.data + (k->row * p->T + k->t0) * p->H + h;
    double before = 0, after = 0;
    for (int64_t i = 0; i < k->L; i++) {
        decay->a[i] = a[i * p->H];
        decay->dt[i] = dt[i * p->H];
        decay->into[i] = (real)(before += decay->a[i]);
    }
    for (int64_t j = k->L - 1; j >= 0; j--) {
        decay->out[j] = (real)after;
        after += decay->a[j];
    }
    for (int64_t i = 0; i < k->L; i++) decay->step[i] = ssd_exp(decay->a[i]);
    for (int64_t i = 0; i < k->L; i++) decay->into[i] = i < k->entering ? ssd_exp(decay->into[i]) : 0;
    for (int64_t j = 0; j < k->L; j++) decay->out[j] = j >= k->leaving ? ssd_exp(decay->out[j]) : 0;
    decay->whole = k->open ? ssd_exp((real)before) : 0;
}

static inline real without_tiny(real v) {
    return v < SSD_DECAY_MIN ? 0 : v;
}

/* `count` columns of row i of e from the pivot m on, where the rows start at m and i and `start` are counted from it:
 * the row before times the step, 1 on the diagonal, 0 behind it and before the document's start. Whole vectors with a
 * mask are faster here than loops of changing length. */
static inline void near_columns(real *row, const real *row_before, real step, int start, int i, int count) {
    for (int j = 0; j < count; j++) {
        real e = j < i ? without_tiny(step * row_before[j]) : 1;
        row[j] = j >= start && j <= i ? e : 0;
    }
}

/* Row i is row i-1 times exp(a[i]). So that roundings don't pile up, SSD_PIVOT rows share a pivot m, the first of them:
 * columns before it are row m-1 times exp(a[m] + ... + a[i]), itself a product of at most SSD_PIVOT steps. Nothing is
 * ever divided, and no difference of sums is taken, so large and small decays can be mixed without loss. */
void OP(ssd_tile_decay)(real *e, const struct ssd_decay *decay, const struct ssd_chunk *k, int64_t i0, int64_t i1,
                        int64_t j0) {
    int64_t columns = i1 - j0, start = j0;
    real *base = decay->work; /* row i0-1 */
    double sum = 0;
    for (int64_t j = i0 - 1; j >= j0; j--) {
        base[j - j0] = (real)sum;
        sum += decay->a[j];
    }
    for (int64_t j = 0; j < i0 - j0; j++) base[j] = ssd_exp(base[j]);
    memset(e, 0, (size_t)((i1 - i0) * columns) * sizeof(real));
    for (int64_t m = i0; m < i1; m += SSD_PIVOT) {
        int64_t end = ssd_min(m + SSD_PIVOT, i1);
        const real *far = m == i0 ? base : e + (m - 1 - i0) * columns; /* row m-1 */
        real product = 1;
        for (int64_t i = m; i < end; i++) {
            real *row = e + (i - i0) * columns, *near = row + m - j0;
            const real *near_before = i > m ? near - columns : near; /* not used where i == m */
            if (k->doc && i > i0 && k->doc[i] != k->doc[i - 1]) start = i;
            int first = start > m ? (int)(start - m) : 0, here = (int)(i - m);
            product *= decay->step[i];
            for (int64_t j = start - j0; j < m - j0; j++) row[j] = without_tiny(product * far[j]);
            if (end - m == SSD_PIVOT) near_columns(near, near_before, decay->step[i], first, here, SSD_PIVOT);
            else near_columns(near, near_before, decay->step[i], first, here, (int)(end - m));
        }
    }
}

void OP(ssd_scale_rows)(real *out, const real *rows, int64_t step, const real *scale, const real *again, int64_t count,
                        int64_t N) {
    for (int64_t i = 0; i < count; i++) {
        real factor = again ? scale[i] * again[i] : scale[i];
        for (int64_t n = 0; n < N; n++) out[i * N + n] = factor * rows[i * step + n];
    }
}

/* --- scratch ------------------------------------------------------------------------------------------------------ */

/* What one thread needs: c b^T and the weights of one tile, scaled rows of b or c, and the decays of one head. */
struct slot {
    real *cb, *weights, *scaled;
    struct ssd_decay decay;
};

struct layout {
    real *states;  /* (B,H,K,P,N), where the caller wants none saved */
    real *wholes;  /* (B,H,K): decay.whole */
    struct slot slot[WORKERS_MAX];
    size_t size;
};

static struct layout lay_out(struct ssd_shape s, void *scratch) {
    struct carver c = {.base = scratch};
    int64_t Q = ssd_min(s.Q, s.T), K = (s.T + Q - 1) / Q, rows = ssd_min(Q, SSD_ROWS);
    int64_t slots = ssd_min(WORKERS_MAX, s.B * s.G * ((s.T + rows - 1) / rows + K));
    struct layout l = {.states = carve_reals(&c, s.B * s.H * K * s.P * s.N), .wholes = carve_reals(&c, s.B * s.H * K)};
    for (int64_t i = 0; i < slots; i++) {
        struct slot *t = &l.slot[i];
        t->cb = carve_reals(&c, rows * Q);
        t->weights = carve_reals(&c, rows * Q);
        t->scaled = carve_reals(&c, Q * s.N);
        t->decay = ssd_carve_decay(&c, Q);
    }
    l.size = c.used;
    return l;
}

size_t OP(ssd_forward_scratch)(struct ssd_shape shape) {
    return lay_out(shape, NULL).size;
}

size_t OP(ssd_saved)(struct ssd_shape s) {
    int64_t Q = ssd_min(s.Q, s.T), K = (s.T + Q - 1) / Q;
    return (size_t)(s.B * s.H * K * s.P * s.N) * sizeof(real);
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

struct forward {
    struct ssd_problem p;
    struct layout l;
    tensor y, final;
    real *states; /* (B,H,K,P,N) */
};

static real *state_entering(const struct forward *f, int64_t row, int64_t h, int64_t index) {
    return f->states + ((row * f->p.H + h) * f->p.K + index) * f->p.P * f->p.N;
}

/* Where the state that leaves a chunk goes; NULL when nobody asks for the last one. */
static real *state_leaving(const struct forward *f, int64_t row, int64_t h, int64_t index) {
    if (index + 1 < f->p.K) return state_entering(f, row, h, index + 1);
    return tensor_given(f->final) ? ssd_state(&f->p, f->final.data, row, h) : NULL;
}

/* 1: the chunk's own state, for every head of the group, to where the leaving state goes. */
static void chunk_state(const struct forward *f, const struct slot *t, int64_t row, int64_t g, int64_t index) {
    const struct ssd_problem *p = &f->p;
    struct ssd_chunk k = OP(ssd_chunk)(p, row, index);
    int64_t first = k.leaving, count = k.L - first;
    const real *b = ssd_rows(p->b, row, k.t0 + first, g * p->N);
    struct ssd_decay decay = t->decay;
    for (int64_t h = g * (p->H / p->G); h < (g + 1) * (p->H / p->G); h++) {
        real *state = state_leaving(f, row, h, index);
        OP(ssd_decay)(&decay, p, &k, h);
        f->l.wholes[(row * p->H + h) * p->K + index] = decay.whole;
        if (state == NULL) continue;
        const real *x = ssd_rows(p->x, row, k.t0 + first, h * p->P);
        OP(ssd_scale_rows)(t->scaled, b, p->b.stride[1], decay.out + first, decay.dt + first, count, p->N);
        gemm(true, false, p->P, p->N, count, 1, x, p->x.stride[1], t->scaled, p->N, 0, state, p->N);
    }
}

/* 2: from the chunks' own states to the states that enter them. */
static void pass_states(const struct forward *f, int64_t row, int64_t h) {
    const struct ssd_problem *p = &f->p;
    int64_t size = p->P * p->N;
    real *first = state_entering(f, row, h, 0);
    if (tensor_given(p->initial)) memcpy(first, ssd_state(p, p->initial.data, row, h), (size_t)size * sizeof(real));
    else memset(first, 0, (size_t)size * sizeof(real));
    for (int64_t index = 0; index < p->K; index++) {
        const real *entering = state_entering(f, row, h, index);
        real *leaving = state_leaving(f, row, h, index), whole = f->l.wholes[(row * p->H + h) * p->K + index];
        if (leaving == NULL || whole == 0) continue;
        for (int64_t i = 0; i < size; i++) leaving[i] += whole * entering[i];
    }
}

/* The rows i0..i1-1 of the matrix that takes x to y inside a chunk, columns j0..i1-1. */
static void tile_weights(real *weights, const real *cb, const struct ssd_decay *decay, const struct ssd_chunk *k,
                         int64_t i0, int64_t i1, int64_t j0, real d) {
    int64_t columns = i1 - j0;
    const real *dt = decay->dt + j0;
    OP(ssd_tile_decay)(weights, decay, k, i0, i1, j0);
    for (int64_t i = i0; i < i1; i++, weights += columns, cb += columns) {
        int64_t end = ssd_whole(i + 1 - j0, columns);
        for (int64_t j = 0; j < end; j++) weights[j] *= cb[j] * dt[j];
        weights[i - j0] += d;
    }
}

/* 3: the outputs of rows i0.. of a chunk, for every head of the group. */
static void tile_outputs(const struct forward *f, const struct slot *t, int64_t row, int64_t g, int64_t index,
                         int64_t i0) {
    const struct ssd_problem *p = &f->p;
    struct ssd_chunk k = OP(ssd_chunk)(p, row, index);
    if (i0 >= k.L) return;
    int64_t i1 = ssd_min(i0 + SSD_ROWS, k.L), j0 = OP(ssd_document_start)(&k, i0), columns = i1 - j0;
    int64_t seeing = ssd_min(i1, k.entering) - i0; /* rows that see the entering state */
    bool state = seeing > 0 && (index > 0 || tensor_given(p->initial));
    struct ssd_decay decay = t->decay;
    const real *c = ssd_rows(p->c, row, k.t0 + i0, g * p->N), *b = ssd_rows(p->b, row, k.t0 + j0, g * p->N);
    gemm(false, true, i1 - i0, columns, p->N, 1, c, p->c.stride[1], b, p->b.stride[1], 0, t->cb, columns);
    for (int64_t h = g * (p->H / p->G); h < (g + 1) * (p->H / p->G); h++) {
        const real *x = ssd_rows(p->x, row, k.t0 + j0, h * p->P);
        real *y = ssd_rows(f->y, row, k.t0 + i0, h * p->P), d = tensor_given(p->d) ? ((const real *)p->d.data)[h] : 0;
        OP(ssd_decay)(&decay, p, &k, h);
        tile_weights(t->weights, t->cb, &decay, &k, i0, i1, j0, d);
        gemm(false, false, i1 - i0, p->P, columns, 1, t->weights, columns, x, p->x.stride[1], 0, y, f->y.stride[1]);
        if (!state) continue;
        OP(ssd_scale_rows)(t->scaled, c, p->c.stride[1], decay.into + i0, NULL, seeing, p->N);
        gemm(false, true, seeing, p->P, p->N, 1, t->scaled, p->N, state_entering(f, row, h, index), p->N, 1, y,
             f->y.stride[1]);
    }
}

static void forward_run(const struct forward *f) {
    const struct ssd_problem *p = &f->p;
    int64_t tiles = (p->Q + SSD_ROWS - 1) / SSD_ROWS, size = p->B * p->T * p->H * p->P * p->N;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(worker_count(p->B * p->G * p->K, size))
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t g = 0; g < p->G; g++)
            for (int64_t index = 0; index < p->K; index++)
                chunk_state(f, &f->l.slot[worker_index()], row, g, index);
#pragma omp parallel for collapse(2) schedule(static) if (size >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t h = 0; h < p->H; h++) pass_states(f, row, h);
#pragma omp parallel for collapse(4) schedule(dynamic) num_threads(worker_count(p->B * p->G * p->K * tiles, size))
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t g = 0; g < p->G; g++)
            for (int64_t index = 0; index < p->K; index++)
                for (int64_t tile = 0; tile < tiles; tile++)
                    tile_outputs(f, &f->l.slot[worker_index()], row, g, index, tile * SSD_ROWS);
}

void OP(ssd_forward)(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor dt, tensor a, tensor b,
                     tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch) {
    (void)dev;
    struct forward f = {.p = OP(ssd_problem)(x, dt, a, b, c, d, initial, doc, chunk), .y = y, .final = final};
    struct ssd_problem *p = &f.p;
    CHECK_ROWS(y, p->B, p->T, p->H, p->P);
    CHECK_OPTIONAL(final, p->B, p->H, p->P, p->N);
    ASSERT(y.stride[2] == p->P || p->H == 1);
    f.l = lay_out((struct ssd_shape){p->B, p->T, p->H, p->P, p->G, p->N, p->Q}, scratch);
    f.states = saved ? saved : f.l.states;
    forward_run(&f);
}

/* --- one token ---------------------------------------------------------------------------------------------------- */

/* One head: state (P,N), x and y (P), b and c (N). */
static void step_head(real *y, real *state, const real *x, real dt, real a, const real *b, const real *c, real d,
                      int64_t P, int64_t N) {
    real keep = ssd_exp(a);
    for (int64_t i = 0; i < P; i++, state += N) {
        real sum = 0, inflow = dt * x[i];
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < N; n++) {
            state[n] = keep * state[n] + inflow * b[n];
            sum += state[n] * c[n];
        }
        y[i] = sum + d * x[i];
    }
}

void OP(ssd_step)(struct device *dev, tensor y, tensor state, tensor x, tensor dt, tensor a, tensor b, tensor c,
                  tensor d) {
    (void)dev;
    int64_t B = x.dim[0], H = x.dim[1], P = x.dim[2], G = b.dim[1], N = b.dim[2];
    CHECK_ROWS(x, B, H, P);
    CHECK_ROWS(y, B, H, P);
    CHECK_ROWS(b, B, G, N);
    CHECK_ROWS(c, B, G, N);
    CHECK_DENSE(dt, B, H);
    CHECK_DENSE(a, B, H);
    CHECK_DENSE(state, B, H, P, N);
    CHECK_OPTIONAL(d, H);
    ASSERT(H % G == 0);
#pragma omp parallel for collapse(2) schedule(static) if (B * H * P * N >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < B; row++) {
        for (int64_t h = 0; h < H; h++) {
            int64_t g = h / (H / G), head = row * H + h;
            step_head(row_of(y, row) + h * y.stride[1], (real *)state.data + head * P * N,
                      row_of(x, row) + h * x.stride[1], ((const real *)dt.data)[head], ((const real *)a.data)[head],
                      row_of(b, row) + g * b.stride[1], row_of(c, row) + g * c.stride[1],
                      tensor_given(d) ? ((const real *)d.data)[h] : 0, P, N);
        }
    }
}
