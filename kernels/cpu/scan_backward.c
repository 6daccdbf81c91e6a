/* scan_backward.c: the backward pass of the selective scan on the CPU (forward and notation: scan.c).
 *
 * With dy = dg silu(z), and e[t] = exp(delta[t] A), which is 0 where a document starts, for every channel and state:
 *   dh[t] = c[t] dy[t] + e[t+1] dh[t+1]        from the last token to the first; dh[T] = dfinal, e[T] = 1
 *   dc[t] = sum over channels of dy h[t]       db[t] = sum over channels of dh[t] delta x
 *   s = sum_n dh b      dx = d dy + delta s    dz = dg y silu'(z)    dd = sum dy x    dinitial = e[0] dh[0]
 *   r = dh[t] e[t] h[t-1]                      ddelta = x s + sum_n A r    dA_log = A sum_t delta r
 *   draw = ddelta softplus'(raw + bias)        dbias = sum draw
 *
 * Blocks of channels walk the row's chunks from the last to the first. In a chunk the states are made again from the
 * one that was saved at its start, state by state: forwards for h and e, then backwards for dh. So the arrays of one
 * state and of the chunk's tokens are all that is alive, and every exponential is computed once.
 *
 * Cost, for a token's channel and state: 16 operations forwards as in scan.c and 9 backwards, and the sums over lanes
 * of db and dc, twice about 8 operations for SCAN_LANES channels. Memory: x, raw, z, dg read and dx, draw, dz written
 * once. With AVX-512 at two operations a cycle that is about 15 cycles for N 16; measured are about three times as
 * many, because a chunk's arrays, 8 KB each, outgrow the first cache. (Chunks of 16 would be a tenth faster, but
 * twice as many states would be saved.)
 *
 * Work is divided into (batch row, stripe): a stripe is a run of blocks, and each has its own sums of db and dc, added
 * up in the order of stripes at the end; the sums over tokens of dbias, dd, dA_log are kept for each batch row, and
 * added in their order. How many stripes there are depends on the shape only, so the bits don't depend on the number of
 * threads.
 */
#include "kernels/cpu/scan.h"

/* What one thread needs. */
struct slot {
    scan_lanes *rate;                          /* N */
    scan_lanes *carry;                         /* N: the gradient of the state that the walk has reached */
    scan_lanes *dA;                            /* N: sum_t delta r */
    scan_lanes *delta, *slope, *x, *inflow;    /* SCAN_CHUNK; slope: softplus' */
    scan_lanes *y, *dg, *dy;                   /* SCAN_CHUNK; dg: once opened, dg silu'(z) */
    scan_lanes *s, *ddelta;                    /* SCAN_CHUNK; sums over the states so far; ddelta: of rate r */
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

/* delta, the derivative of softplus, delta x, and of y the skip. */
static void open_lanes(real *restrict delta, real *restrict slope, real *restrict inflow, real *restrict y,
                       const real *restrict x, const real *restrict raw, const struct scan_block *block) {
    const real *restrict bias = block->bias, *restrict skip = block->skip;
    SCAN_SIMD
    for (int64_t l = 0; l < SCAN_LANES; l++) {
        delta[l] = softplus_and_derivative(raw[l] + bias[l], &slope[l]);
        inflow[l] = delta[l] * x[l];
        y[l] = skip[l] * x[l];
    }
}

/* dy = dg silu(z), and dg becomes dg silu'(z), which is dz without the factor y. */
static void open_gate(real *restrict dy, real *restrict dg, const real *restrict z) {
    SCAN_SIMD
    for (int64_t l = 0; l < SCAN_LANES; l++) {
        real s = sigmoid(z[l]);
        dy[l] = dg[l] * z[l] * s;
        dg[l] *= s * (1 + z[l] * (1 - s));
    }
}

/* Everything of the chunk that no state is needed for; sums over states start at 0, y at the skip. */
static void chunk_open(const struct backward *f, const struct slot *s, const struct scan_block *block,
                       const struct scan_chunk *k) {
    const struct scan_problem *p = &f->p;
    const tensor next[] = {p->x, p->raw, f->dg, p->z}, written[] = {f->dx, f->draw, f->dz};
    for (int64_t i = 0; i < k->L; i++) {
        scan_lanes raw, z;
        for (int j = 0; j < 4; j++) scan_prefetch(block, next[j], k->t0 + i - SCAN_CHUNK, 0);
        for (int j = 0; j < 3; j++) scan_prefetch(block, written[j], k->t0 + i, 1);
        scan_read(s->x[i], scan_row(block, p->x, k->t0 + i), block->count);
        scan_read(raw, scan_row(block, p->raw, k->t0 + i), block->count);
        scan_read(s->dg[i], scan_row(block, f->dg, k->t0 + i), block->count);
        open_lanes(s->delta[i], s->slope[i], s->inflow[i], s->y[i], s->x[i], raw, block);
        if (tensor_given(p->z)) {
            scan_read(z, scan_row(block, p->z, k->t0 + i), block->count);
            open_gate(s->dy[i], s->dg[i], z);
        } else {
            memcpy(s->dy[i], s->dg[i], sizeof(scan_lanes));
        }
    }
    memset(s->s, 0, (size_t)k->L * sizeof(scan_lanes));
    memset(s->ddelta, 0, (size_t)k->L * sizeof(scan_lanes));
}

/* One state at one token forwards: its decay, its value h, and what it adds to y. A decay of 0 where a document begins
 * cuts it off from the state before, here and on the way back. */
static inline void token_forward(real *restrict decay, real *restrict h, real *restrict y, const real *before,
                                 const real *restrict delta, const real *restrict inflow, const real *restrict rate,
                                 real b, real c, bool begins) {
    if (begins) {
        memset(decay, 0, sizeof(scan_lanes));
        SCAN_SIMD
        for (int64_t l = 0; l < SCAN_LANES; l++) {
            h[l] = inflow[l] * b;
            y[l] += c * h[l];
        }
    } else {
        SCAN_SIMD
        for (int64_t l = 0; l < SCAN_LANES; l++) {
            decay[l] = exp2_decay(delta[l] * rate[l]);
            h[l] = decay[l] * before[l] + inflow[l] * b;
            y[l] += c * h[l];
        }
    }
}

/* State n of the chunk forwards. b and c: element n of the chunk's rows. */
static void state_forward(const struct slot *s, const struct scan_block *block, const struct scan_chunk *k, int64_t n,
                          const real *entering, const real *b, const real *c) {
    const struct scan_problem *p = block->p;
    const real *before = entering;
    for (int64_t i = 0; i < k->L; i++) {
        token_forward(s->decay[i], s->h[i], s->y[i], before, s->delta[i], s->inflow[i], block->rate[n],
                      b[i * p->b.stride[1]], c[i * p->c.stride[1]], k->begins[i]);
        before = s->h[i];
    }
}

/* The sum of a vector's elements, by halves: a loop over them would be one long chain of additions. */
static inline real vector_sum(scan_vector v) {
    typedef real vector32 __attribute__((vector_size(32)));
    typedef real vector16 __attribute__((vector_size(16)));
    union {
        scan_vector all;
        vector32 half[2];
        vector16 quarter[4];
        real one[SCAN_WIDTH];
    } u = {.all = v};
    if (SCAN_VECTOR_BYTES == 64) u.half[0] += u.half[1];
    if (SCAN_VECTOR_BYTES >= 32) u.quarter[0] += u.quarter[1];
    if (sizeof(vector16) / sizeof(real) == 2) return u.one[0] + u.one[1];
    return (u.one[0] + u.one[2]) + (u.one[1] + u.one[3]);
}

/* State n of the chunk backwards. db and dc: element n of the chunk's rows, N apart. */
static void state_backward(const struct slot *s, const struct scan_block *block, const struct scan_chunk *k, int64_t n,
                           const real *entering, const real *b, const real *c, real *db, real *dc) {
    const struct scan_problem *p = block->p;
    const real *restrict rate = block->rate[n], *restrict decay = *s->decay, *restrict h = *s->h;
    const real *restrict inflow = *s->inflow, *restrict delta = *s->delta, *restrict dy = *s->dy;
    real *restrict to_x = *s->s, *restrict ddelta = *s->ddelta;
    scan_vector dh[SCAN_VECTORS], dA[SCAN_VECTORS];
    for (int v = 0; v < SCAN_VECTORS; v++) dh[v] = *scan_at(s->carry[n], v);
    for (int v = 0; v < SCAN_VECTORS; v++) dA[v] = *scan_at(s->dA[n], v);
    for (int64_t i = k->L - 1, at = i * SCAN_LANES; i >= 0; i--, at -= SCAN_LANES) {
        const real *before = i > 0 ? h + at - SCAN_LANES : entering;
        real b_now = b[i * p->b.stride[1]], c_now = c[i * p->c.stride[1]];
        scan_vector b_sum = {0}, c_sum = {0};
        for (int v = 0; v < SCAN_VECTORS; v++) {
            dh[v] += c_now * *scan_at(dy + at, v);
            b_sum += dh[v] * *scan_at(inflow + at, v);
            c_sum += *scan_at(dy + at, v) * *scan_at(h + at, v);
            *scan_at(to_x + at, v) += dh[v] * b_now;
            dh[v] *= *scan_at(decay + at, v);
            scan_vector r = dh[v] * *scan_at(before, v);
            *scan_at(ddelta + at, v) += *scan_at(rate, v) * r;
            dA[v] += *scan_at(delta + at, v) * r;
        }
        db[i * p->N] += vector_sum(b_sum);
        dc[i * p->N] += vector_sum(c_sum);
    }
    for (int v = 0; v < SCAN_VECTORS; v++) *scan_at(s->carry[n], v) = dh[v];
    for (int v = 0; v < SCAN_VECTORS; v++) *scan_at(s->dA[n], v) = dA[v];
}

/* dx and draw of one token, into the places of inflow and slope, and its part of dbias and dd. */
static void close_lanes(const struct slot *s, int64_t i, const struct scan_block *block) {
    real *restrict inflow = s->inflow[i], *restrict slope = s->slope[i], *restrict dbias = *s->dbias;
    real *restrict dd = *s->dd;
    const real *restrict dy = s->dy[i], *restrict delta = s->delta[i], *restrict x = s->x[i];
    const real *restrict to_x = s->s[i], *restrict ddelta = s->ddelta[i], *restrict skip = block->skip;
    SCAN_SIMD
    for (int64_t l = 0; l < SCAN_LANES; l++) {
        inflow[l] = skip[l] * dy[l] + delta[l] * to_x[l];
        slope[l] *= x[l] * to_x[l] + SCAN_LN_2 * ddelta[l];
        dbias[l] += slope[l];
        dd[l] += dy[l] * x[l];
    }
}

/* The gradients of the chunk's tokens. */
static void chunk_close(const struct backward *f, const struct slot *s, const struct scan_block *block,
                        const struct scan_chunk *k) {
    for (int64_t i = 0; i < k->L; i++) {
        close_lanes(s, i, block);
        scan_write(scan_row(block, f->dx, k->t0 + i), s->inflow[i], block->count);
        scan_write(scan_row(block, f->draw, k->t0 + i), s->slope[i], block->count);
        if (!tensor_given(f->p.z)) continue;
        real *restrict dz = s->dg[i];
        const real *restrict y = s->y[i];
        SCAN_SIMD
        for (int64_t l = 0; l < SCAN_LANES; l++) dz[l] *= y[l];
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
