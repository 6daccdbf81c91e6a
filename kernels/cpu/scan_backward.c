/* scan_backward.c: the backward pass of the selective scan on the CPU (forward and notation: scan.c).
 *
 * With dy = dg silu(z), and e[t] = exp(delta[t] A), which is 0 where a document starts, for every channel and state:
 *   dh[t] = c[t] dy[t] + e[t+1] dh[t+1]        from the last token to the first; dh[T] = dfinal, e[T] = 1
 *   dc[t] = sum over channels of dy h[t]       db[t] = sum over channels of dh[t] delta x
 *   s = sum_n dh b      dx = d dy + delta s    dz = dg y silu'(z)    dd = sum dy x    dinitial = e[0] dh[0]
 *   r = dh[t] e[t] h[t-1]                      ddelta = x s + sum_n A r    dA_log = A sum_t delta r
 *   draw = ddelta softplus'(raw + bias)        dbias = sum draw
 *
 * Blocks of channels walk the row's chunks from the last to the first. In a chunk the states are made again from the one
 * that was saved at its start, state by state: forwards for h and e, then backwards for dh.
 *
 * Work is divided into (batch row, stripe): a stripe is a run of blocks, and each has its own sums of db and dc, added
 * up in the order of stripes at the end; the sums over tokens of dbias, dd, dA_log are kept for each batch row, and added
 * in their order. How many stripes there are depends on the shape only, so the bits don't depend on the number of threads.
 */
#include "kernels/cpu/scan.h"

/* What one thread needs. */
struct slot {
    scan_lanes *rate;                          /* N */
    scan_lanes *carry;                         /* N: the gradient of the state that the walk has reached */
    scan_lanes *dA;                            /* N: sum_t delta r */
    scan_lanes *delta, *slope, *x, *inflow;    /* SCAN_CHUNK; slope: softplus' */
    scan_lanes *y, *dg, *dy, *s, *ddelta;      /* SCAN_CHUNK; ddelta: sum_n rate r */
    scan_lanes *decay, *h;                     /* SCAN_CHUNK; of one state */
    scan_lanes *dbias, *dd;                    /* 1 */
};

struct layout {
    real *db, *dc;          /* (B, stripes, T, N) */
    real *dbias, *dd, *dA;  /* (B, D), (B, D), (B, D, N) */
    int64_t stripes;
    struct slot slot[WORKERS_MAX];
    size_t size;
};

/* Enough stripes for WORKERS_MAX items, at most one a block. */
static int64_t stripe_count(struct scan_shape s) {
    int64_t blocks = (s.D + SCAN_LANES - 1) / SCAN_LANES, wanted = (WORKERS_MAX + s.B - 1) / s.B;
    return scan_min(blocks, wanted);
}

static struct slot carve_slot(struct carver *c, int64_t N) {
    return (struct slot){.rate = scan_carve(c, N),
                         .carry = scan_carve(c, N),
                         .dA = scan_carve(c, N),
                         .delta = scan_carve(c, SCAN_CHUNK),
                         .slope = scan_carve(c, SCAN_CHUNK),
                         .x = scan_carve(c, SCAN_CHUNK),
                         .inflow = scan_carve(c, SCAN_CHUNK),
                         .y = scan_carve(c, SCAN_CHUNK),
                         .dg = scan_carve(c, SCAN_CHUNK),
                         .dy = scan_carve(c, SCAN_CHUNK),
                         .s = scan_carve(c, SCAN_CHUNK),
                         .ddelta = scan_carve(c, SCAN_CHUNK),
                         .decay = scan_carve(c, SCAN_CHUNK),
                         .h = scan_carve(c, SCAN_CHUNK),
                         .dbias = scan_carve(c, 1),
                         .dd = scan_carve(c, 1)};
}

static struct layout lay_out(struct scan_shape s, void *scratch) {
    struct carver c = {.base = scratch};
    struct layout l = {.stripes = stripe_count(s)};
    l.db = carve_reals(&c, s.B * l.stripes * s.T * s.N);
    l.dc = carve_reals(&c, s.B * l.stripes * s.T * s.N);
    l.dbias = carve_reals(&c, s.B * s.D);
    l.dd = carve_reals(&c, s.B * s.D);
    l.dA = carve_reals(&c, s.B * s.D * s.N);
    int64_t slots = scan_min(WORKERS_MAX, s.B * l.stripes);
    for (int64_t i = 0; i < slots; i++) l.slot[i] = carve_slot(&c, s.N);
    l.size = c.used;
    return l;
}

size_t OP(scan_backward_scratch)(struct scan_shape shape) {
    return lay_out(shape, NULL).size;
}

/* --- one block ---------------------------------------------------------------------------------------------------- */

struct backward {
    struct scan_problem p;
    struct layout l;
    const void *saved;
    tensor dx, draw, dz, dinitial, dg, dfinal;
};

/* Everything of the chunk that no state is needed for; sums over states start at 0, y at the skip. */
static void chunk_open(const struct backward *f, const struct slot *s, const struct scan_block *block,
                       const struct scan_chunk *k) {
    const struct scan_problem *p = &f->p;
    for (int64_t i = 0; i < k->L; i++) {
        scan_lanes raw, z;
        scan_read(s->x[i], scan_row(block, p->x, k->t0 + i), block->count);
        scan_read(raw, scan_row(block, p->raw, k->t0 + i), block->count);
        scan_read(s->dg[i], scan_row(block, f->dg, k->t0 + i), block->count);
        for (int64_t l = 0; l < SCAN_LANES; l++) {
            real v = raw[l] + block->bias[l];
            s->delta[i][l] = softplus(v);
            s->slope[i][l] = softplus_derivative(v);
            s->inflow[i][l] = s->delta[i][l] * s->x[i][l];
            s->y[i][l] = block->skip[l] * s->x[i][l];
            s->dy[i][l] = s->dg[i][l];
            s->s[i][l] = s->ddelta[i][l] = 0;
        }
        if (!tensor_given(p->z)) continue;
        scan_read(z, scan_row(block, p->z, k->t0 + i), block->count);
        for (int64_t l = 0; l < SCAN_LANES; l++) s->dy[i][l] *= silu(z[l]);
    }
}

/* State n of the chunk forwards: decays, states, and what it adds to y. */
static void state_forward(const struct slot *s, const struct scan_block *block, const struct scan_chunk *k, int64_t n,
                          const real *entering, const real *b, const real *c) {
    const struct scan_problem *p = block->p;
    int64_t b_step = p->b.stride[1], c_step = p->c.stride[1];
    OP(scan_decays)(s->decay, block, k, (const scan_lanes *)s->delta, n);
    const real *before = entering;
    for (int64_t i = 0; i < k->L; i++) {
        real b_now = b[i * b_step], c_now = c[i * c_step], *h = s->h[i];
        for (int64_t l = 0; l < SCAN_LANES; l++) {
            h[l] = s->decay[i][l] * before[l] + s->inflow[i][l] * b_now;
            s->y[i][l] += c_now * h[l];
        }
        before = h;
    }
}

/* State n of the chunk backwards. db and dc: element n of the chunk's rows, N apart. */
static void state_backward(const struct slot *s, const struct scan_block *block, const struct scan_chunk *k, int64_t n,
                           const real *entering, const real *b, const real *c, real *db, real *dc) {
    const struct scan_problem *p = block->p;
    const real *rate = block->rate[n];
    scan_lanes dh, dA;
    memcpy(dh, s->carry[n], sizeof dh);
    memset(dA, 0, sizeof dA);
    for (int64_t i = k->L - 1; i >= 0; i--) {
        const real *before = i > 0 ? s->h[i - 1] : entering;
        real b_now = b[i * p->b.stride[1]], c_now = c[i * p->c.stride[1]], b_sum = 0, c_sum = 0;
#pragma omp simd reduction(+ : b_sum, c_sum)
        for (int64_t l = 0; l < SCAN_LANES; l++) {
            real to_h = dh[l] + c_now * s->dy[i][l], passed = to_h * s->decay[i][l], r = passed * before[l];
            b_sum += to_h * s->inflow[i][l];
            c_sum += s->dy[i][l] * s->h[i][l];
            s->s[i][l] += to_h * b_now;
            s->ddelta[i][l] += rate[l] * r;
            dA[l] += s->delta[i][l] * r;
            dh[l] = passed;
        }
        db[i * p->N] += b_sum;
        dc[i * p->N] += c_sum;
    }
    memcpy(s->carry[n], dh, sizeof dh);
    for (int64_t l = 0; l < SCAN_LANES; l++) s->dA[n][l] += dA[l];
}

/* The gradients of the chunk's tokens. */
static void chunk_close(const struct backward *f, const struct slot *s, const struct scan_block *block,
                        const struct scan_chunk *k) {
    const struct scan_problem *p = &f->p;
    for (int64_t i = 0; i < k->L; i++) {
        scan_lanes dx, draw, dz;
        for (int64_t l = 0; l < SCAN_LANES; l++) {
            dx[l] = block->skip[l] * s->dy[i][l] + s->delta[i][l] * s->s[i][l];
            draw[l] = (s->x[i][l] * s->s[i][l] + SCAN_LN_2 * s->ddelta[i][l]) * s->slope[i][l];
            (*s->dbias)[l] += draw[l];
            (*s->dd)[l] += s->dy[i][l] * s->x[i][l];
        }
        scan_write(scan_row(block, f->dx, k->t0 + i), dx, block->count);
        scan_write(scan_row(block, f->draw, k->t0 + i), draw, block->count);
        if (!tensor_given(p->z)) continue;
        scan_read(dz, scan_row(block, p->z, k->t0 + i), block->count);
        for (int64_t l = 0; l < SCAN_LANES; l++) dz[l] = s->dg[i][l] * s->y[i][l] * silu_derivative(dz[l]);
        scan_write(scan_row(block, f->dz, k->t0 + i), dz, block->count);
    }
}

/* The block's sums over tokens, to the place of its batch row. */
static void block_sums(const struct backward *f, const struct slot *s, const struct scan_block *block) {
    const struct scan_problem *p = &f->p;
    int64_t at = block->row * p->D + block->first;
    for (int64_t l = 0; l < block->count; l++) {
        f->l.dbias[at + l] = (*s->dbias)[l];
        f->l.dd[at + l] = (*s->dd)[l];
        for (int64_t n = 0; n < p->N; n++) f->l.dA[(at + l) * p->N + n] = SCAN_LN_2 * block->rate[n][l] * s->dA[n][l];
    }
}

/* db, dc: (T,N), added to. */
static void block_backward(const struct backward *f, const struct slot *s, const struct scan_block *block, real *db,
                           real *dc) {
    const struct scan_problem *p = &f->p;
    OP(scan_state_read)(s->carry, block, f->dfinal);
    memset(s->dA, 0, (size_t)p->N * sizeof *s->dA);
    memset(s->dbias, 0, sizeof *s->dbias);
    memset(s->dd, 0, sizeof *s->dd);
    for (int64_t index = p->K - 1; index >= 0; index--) {
        struct scan_chunk k = OP(scan_chunk)(p, block->row, index);
        const real *b = (const real *)p->b.data + block->row * p->b.stride[0] + k.t0 * p->b.stride[1];
        const real *c = (const real *)p->c.data + block->row * p->c.stride[0] + k.t0 * p->c.stride[1];
        const scan_lanes *entering = (const scan_lanes *)scan_saved_state(block, f->saved, index);
        chunk_open(f, s, block, &k);
        for (int64_t n = 0; n < p->N; n++) {
            state_forward(s, block, &k, n, entering[n], b + n, c + n);
            state_backward(s, block, &k, n, entering[n], b + n, c + n, db + k.t0 * p->N + n, dc + k.t0 * p->N + n);
        }
        chunk_close(f, s, block, &k);
    }
    OP(scan_state_write)(f->dinitial, block, (const scan_lanes *)s->carry);
    block_sums(f, s, block);
}

/* --- the whole ---------------------------------------------------------------------------------------------------- */

static void stripe_backward(const struct backward *f, int64_t row, int64_t stripe) {
    const struct scan_problem *p = &f->p;
    const struct slot *s = &f->l.slot[worker_index()];
    int64_t first = row_block_first(p->M, f->l.stripes, stripe), end = row_block_first(p->M, f->l.stripes, stripe + 1);
    int64_t size = p->T * p->N, at = (row * f->l.stripes + stripe) * size;
    memset(f->l.db + at, 0, (size_t)size * sizeof(real));
    memset(f->l.dc + at, 0, (size_t)size * sizeof(real));
    for (int64_t index = first; index < end; index++) {
        struct scan_block block;
        OP(scan_block)(&block, p, row, index, s->rate);
        block_backward(f, s, &block, f->l.db + at, f->l.dc + at);
    }
}

/* One row of db or dc: the stripes' sums in their order. */
static void add_stripes(const struct backward *f, tensor out, const real *sums, int64_t row, int64_t t) {
    int64_t N = f->p.N, size = f->p.T * N;
    const real *first = sums + row * f->l.stripes * size + t * N;
    real *to = (real *)out.data + row * out.stride[0] + t * out.stride[1];
    memcpy(to, first, (size_t)N * sizeof(real));
    for (int64_t stripe = 1; stripe < f->l.stripes; stripe++)
        for (int64_t n = 0; n < N; n++) to[n] += first[stripe * size + n];
}

void OP(scan_backward)(struct device *dev, tensor dx, tensor draw, tensor db, tensor dc, tensor dz, tensor dinitial,
                       tensor dbias, tensor dA_log, tensor dd, tensor dg, tensor dfinal, const void *saved, tensor x,
                       tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial,
                       tensor doc, void *scratch) {
    (void)dev;
    struct backward f = {.p = OP(scan_problem)(x, raw, bias, A_log, b, c, d, z, initial, doc), .saved = saved,
                         .dx = dx, .draw = draw, .dz = dz, .dinitial = dinitial, .dg = dg, .dfinal = dfinal};
    const struct scan_problem *p = &f.p;
    CHECK_ROWS(dx, p->B, p->T, p->D);
    CHECK_ROWS(draw, p->B, p->T, p->D);
    CHECK_ROWS(dg, p->B, p->T, p->D);
    CHECK_ROWS(db, p->B, p->T, p->N);
    CHECK_ROWS(dc, p->B, p->T, p->N);
    if (tensor_given(z)) CHECK_ROWS(dz, p->B, p->T, p->D);
    CHECK_OPTIONAL(dinitial, p->B, p->D, p->N);
    CHECK_OPTIONAL(dfinal, p->B, p->D, p->N);
    CHECK_DENSE(dbias, p->D);
    CHECK_DENSE(dA_log, p->D, p->N);
    CHECK_OPTIONAL(dd, p->D);
    ASSERT(saved != NULL);
    f.l = lay_out((struct scan_shape){p->B, p->T, p->D, p->N}, scratch);
    int workers = worker_count(p->B * f.l.stripes, p->B * p->T * p->D * p->N);
#pragma omp parallel for collapse(2) schedule(static) num_threads(workers)
    for (int64_t row = 0; row < p->B; row++)
        for (int64_t stripe = 0; stripe < f.l.stripes; stripe++) stripe_backward(&f, row, stripe);
#pragma omp parallel for collapse(2) schedule(static) num_threads(workers)
    for (int64_t row = 0; row < p->B; row++) {
        for (int64_t t = 0; t < p->T; t++) {
            add_stripes(&f, db, f.l.db, row, t);
            add_stripes(&f, dc, f.l.dc, row, t);
        }
    }
    add_partials(dbias.data, f.l.dbias, p->B, p->D);
    add_partials(dA_log.data, f.l.dA, p->B, p->D * p->N);
    if (tensor_given(dd)) add_partials(dd.data, f.l.dd, p->B, p->D);
}
