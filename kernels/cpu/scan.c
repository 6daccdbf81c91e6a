/* scan.c: the selective scan of Mamba (arXiv 2312.00752, its section 3.2) on the CPU: forward pass and step.
 *
 *   delta = softplus(raw + bias)   A = -exp(A_log)
 *   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] b[t,n] x[t]
 *   y[t] = sum_n c[t,n] h[t,n] + d x[t]   g[t] = y[t] silu(z[t])
 *
 * Channels are independent of each other, so they stand side by side in vectors: work is divided into blocks of
 * SCAN_LANES channels of one batch row, which walk the row in chunks of SCAN_CHUNK tokens. A chunk's delta, delta x and
 * skip are made first, then token by token all states of the block, last the gate. b and c are read as scalars that all
 * lanes share, and no sum crosses lanes, so N and the lengths may be anything, no block waits for another, and the bits
 * don't depend on the number of threads. A document's first token finds the state cleared. A block's state and decay
 * rates take 2 N SCAN_LANES numbers: with N 16 they stay in the first cache.
 *
 * Cost, for a token's channel: N exponentials, of 13 operations each (exp2_decay; A is multiplied by log2(e) once), and
 * 3N more for the recurrence; besides, softplus and SiLU, about 60. Memory: x, raw, z read and g written once. With
 * AVX-512 at two operations a cycle that is about 8 + 2 cycles for N 16; measured are about 1.5 times as many in cache,
 * twice as many with rows from memory.
 *
 * saved: the state at the start of every chunk, (B, blocks, K, N, lanes): N / SCAN_CHUNK numbers for a token's channel.
 */
#include "kernels/cpu/scan.h"

/* --- the problem, its blocks and chunks --------------------------------------------------------------------------- */

struct scan_problem OP(scan_problem)(tensor x, tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d,
                                     tensor z, tensor initial, tensor doc) {
    struct scan_problem p = {.B = x.dim[0], .T = x.dim[1], .D = x.dim[2], .N = A_log.dim[1], .x = x, .raw = raw,
                             .bias = bias, .A_log = A_log, .b = b, .c = c, .d = d, .z = z, .initial = initial,
                             .doc = doc};
    ASSERT(p.B >= 1 && p.T >= 1 && p.D >= 1 && p.N >= 1);
    p.K = (p.T + SCAN_CHUNK - 1) / SCAN_CHUNK;
    p.M = (p.D + SCAN_LANES - 1) / SCAN_LANES;
    CHECK_ROWS(x, p.B, p.T, p.D);
    CHECK_ROWS(raw, p.B, p.T, p.D);
    CHECK_DENSE(bias, p.D);
    CHECK_DENSE(A_log, p.D, p.N);
    CHECK_ROWS(b, p.B, p.T, p.N);
    CHECK_ROWS(c, p.B, p.T, p.N);
    CHECK_OPTIONAL(d, p.D);
    CHECK_OPTIONAL_ROWS(z, p.B, p.T, p.D);
    CHECK_OPTIONAL(initial, p.B, p.D, p.N);
    if (tensor_given(doc)) CHECK_INDEX(doc, p.B, p.T);
    return p;
}

void OP(scan_block)(struct scan_block *block, const struct scan_problem *p, int64_t row, int64_t index,
                    scan_lanes *rate) {
    int64_t first = index * SCAN_LANES, count = scan_min(SCAN_LANES, p->D - first);
    *block = (struct scan_block){.p = p, .row = row, .first = first, .count = count, .rate = rate};
    scan_read(block->bias, (const real *)p->bias.data + first, count);
    if (tensor_given(p->d)) scan_read(block->skip, (const real *)p->d.data + first, count);
    const real *A_log = (const real *)p->A_log.data + first * p->N;
    memset(rate, 0, (size_t)p->N * sizeof *rate);
    for (int64_t l = 0; l < count; l++)
        for (int64_t n = 0; n < p->N; n++) rate[n][l] = -exp_real(A_log[l * p->N + n]) * SCAN_LOG2_E;
}

struct scan_chunk OP(scan_chunk)(const struct scan_problem *p, int64_t row, int64_t index) {
    struct scan_chunk k = {.t0 = index * SCAN_CHUNK};
    k.L = scan_min(SCAN_CHUNK, p->T - k.t0);
    if (!tensor_given(p->doc)) return k;
    const int32_t *doc = (const int32_t *)p->doc.data + row * p->T + k.t0;
    for (int64_t i = 0; i < k.L; i++) k.begins[i] = doc[i] != (k.t0 + i > 0 ? doc[i - 1] : 0);
    return k;
}

void OP(scan_state_read)(scan_lanes *state, const struct scan_block *block, tensor from) {
    int64_t N = block->p->N;
    memset(state, 0, (size_t)N * sizeof *state);
    if (!tensor_given(from)) return;
    const real *in = (const real *)from.data + (block->row * block->p->D + block->first) * N;
    for (int64_t l = 0; l < block->count; l++)
        for (int64_t n = 0; n < N; n++) state[n][l] = in[l * N + n];
}

void OP(scan_state_write)(tensor to, const struct scan_block *block, const scan_lanes *state) {
    int64_t N = block->p->N;
    if (!tensor_given(to)) return;
    real *out = (real *)to.data + (block->row * block->p->D + block->first) * N;
    for (int64_t l = 0; l < block->count; l++)
        for (int64_t n = 0; n < N; n++) out[l * N + n] = state[n][l];
}

/* --- scratch ------------------------------------------------------------------------------------------------------ */

/* What one thread needs. */
struct slot {
    scan_lanes *rate, *state;       /* N */
    scan_lanes *delta, *inflow, *y; /* SCAN_CHUNK; inflow: delta x */
};

struct layout {
    struct slot slot[WORKERS_MAX];
    size_t size;
};

static struct layout lay_out(struct scan_shape s, void *scratch) {
    struct carver c = {.base = scratch};
    struct layout l;
    int64_t slots = scan_min(WORKERS_MAX, s.B * ((s.D + SCAN_LANES - 1) / SCAN_LANES));
    for (int64_t i = 0; i < slots; i++)
        l.slot[i] = (struct slot){.rate = scan_carve(&c, s.N), .state = scan_carve(&c, s.N),
                                  .delta = scan_carve(&c, SCAN_CHUNK), .inflow = scan_carve(&c, SCAN_CHUNK),
                                  .y = scan_carve(&c, SCAN_CHUNK)};
    l.size = c.used;
    return l;
}

size_t OP(scan_forward_scratch)(struct scan_shape shape) {
    return lay_out(shape, NULL).size;
}

size_t OP(scan_saved)(struct scan_shape s) {
    int64_t K = (s.T + SCAN_CHUNK - 1) / SCAN_CHUNK, M = (s.D + SCAN_LANES - 1) / SCAN_LANES;
    return (size_t)(s.B * M * K * s.N) * sizeof(scan_lanes);
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

/* delta, delta x, and of y the skip. */
static void open_lanes(real *restrict delta, real *restrict inflow, real *restrict y, const real *restrict x,
                       const real *restrict raw, const struct scan_block *block) {
    const real *restrict bias = block->bias, *restrict skip = block->skip;
    SCAN_SIMD
    for (int64_t l = 0; l < SCAN_LANES; l++) {
        delta[l] = softplus(raw[l] + bias[l]);
        inflow[l] = delta[l] * x[l];
        y[l] = skip[l] * x[l];
    }
}

static void chunk_open(const struct slot *s, const struct scan_block *block, const struct scan_chunk *k) {
    const struct scan_problem *p = block->p;
    for (int64_t i = 0; i < k->L; i++) {
        scan_lanes x, raw;
        scan_read(x, scan_row(block, p->x, k->t0 + i), block->count);
        scan_read(raw, scan_row(block, p->raw, k->t0 + i), block->count);
        open_lanes(s->delta[i], s->inflow[i], s->y[i], x, raw, block);
    }
}

/* One token: all states of the block, and what they add to y. b and c: N numbers that the lanes share; `begins`: the
 * state before is another document's. */
static void token_forward(scan_lanes *restrict state, real *restrict y, const scan_lanes *restrict rate,
                          const real *restrict delta, const real *restrict inflow, const real *restrict b,
                          const real *restrict c, bool begins, int64_t N) {
    if (begins) memset(state, 0, (size_t)N * sizeof *state);
    for (int64_t n = 0; n < N; n++) {
        real b_now = b[n], c_now = c[n];
        SCAN_SIMD
        for (int64_t l = 0; l < SCAN_LANES; l++) {
            real h = exp2_decay(delta[l] * rate[n][l]) * state[n][l] + inflow[l] * b_now;
            state[n][l] = h;
            y[l] += c_now * h;
        }
    }
}

/* The gate, and out with it. */
static void chunk_close(const struct slot *s, const struct scan_block *block, const struct scan_chunk *k, tensor g) {
    const struct scan_problem *p = block->p;
    for (int64_t i = 0; i < k->L; i++) {
        scan_lanes z;
        if (tensor_given(p->z)) {
            scan_read(z, scan_row(block, p->z, k->t0 + i), block->count);
            real *y = s->y[i];
            SCAN_SIMD
            for (int64_t l = 0; l < SCAN_LANES; l++) y[l] *= silu(z[l]);
        }
        scan_write(scan_row(block, g, k->t0 + i), s->y[i], block->count);
    }
}

static void block_forward(const struct scan_block *block, const struct slot *s, tensor g, tensor final, void *saved) {
    const struct scan_problem *p = block->p;
    OP(scan_state_read)(s->state, block, p->initial);
    for (int64_t index = 0; index < p->K; index++) {
        struct scan_chunk k = OP(scan_chunk)(p, block->row, index);
        if (saved) memcpy(scan_saved_state(block, saved, index), s->state, (size_t)p->N * sizeof *s->state);
        const real *b = (const real *)p->b.data + block->row * p->b.stride[0] + k.t0 * p->b.stride[1];
        const real *c = (const real *)p->c.data + block->row * p->c.stride[0] + k.t0 * p->c.stride[1];
        chunk_open(s, block, &k);
        for (int64_t i = 0; i < k.L; i++, b += p->b.stride[1], c += p->c.stride[1]) {
            scan_prefetch(block, p->z, k.t0 + i, 0); /* for this chunk's close and the next one's open */
            scan_prefetch(block, g, k.t0 + i, 1);
            scan_prefetch(block, p->x, k.t0 + i + SCAN_CHUNK, 0);
            scan_prefetch(block, p->raw, k.t0 + i + SCAN_CHUNK, 0);
            token_forward(s->state, s->y[i], block->rate, s->delta[i], s->inflow[i], b, c, k.begins[i], p->N);
        }
        chunk_close(s, block, &k, g);
    }
    OP(scan_state_write)(final, block, (const scan_lanes *)s->state);
}

void OP(scan_forward)(struct device *dev, tensor g, tensor final, void *saved, tensor x, tensor raw, tensor bias,
                      tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial, tensor doc,
                      void *scratch) {
    (void)dev;
    struct scan_problem p = OP(scan_problem)(x, raw, bias, A_log, b, c, d, z, initial, doc);
    CHECK_ROWS(g, p.B, p.T, p.D);
    CHECK_OPTIONAL(final, p.B, p.D, p.N);
    struct layout layout = lay_out((struct scan_shape){p.B, p.T, p.D, p.N}, scratch);
    int workers = worker_count(p.B * p.M, p.B * p.T * p.D * p.N);
#pragma omp parallel for collapse(2) schedule(static) num_threads(workers)
    for (int64_t row = 0; row < p.B; row++) {
        for (int64_t index = 0; index < p.M; index++) {
            const struct slot *s = &layout.slot[worker_index()];
            struct scan_block block;
            OP(scan_block)(&block, &p, row, index, s->rate);
            block_forward(&block, s, g, final, saved);
        }
    }
}

/* --- one token ---------------------------------------------------------------------------------------------------- */

/* One channel: y without the gate; state, b, c and A_log are N long. */
static real step_channel(real *state, real x, real delta, const real *A_log, const real *b, const real *c, int64_t N) {
    real sum = 0, inflow = delta * x, scaled = -delta * SCAN_LOG2_E;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < N; n++) {
        state[n] = exp2_decay(scaled * exp_real(A_log[n])) * state[n] + inflow * b[n];
        sum += state[n] * c[n];
    }
    return sum;
}

void OP(scan_step)(struct device *dev, tensor g, tensor state, tensor x, tensor raw, tensor bias, tensor A_log,
                   tensor b, tensor c, tensor d, tensor z) {
    (void)dev;
    int64_t B = x.dim[0], D = x.dim[1], N = A_log.dim[1];
    CHECK_ROWS(g, B, D);
    CHECK_DENSE(state, B, D, N);
    CHECK_ROWS(x, B, D);
    CHECK_ROWS(raw, B, D);
    CHECK_DENSE(bias, D);
    CHECK_DENSE(A_log, D, N);
    CHECK_ROWS(b, B, N);
    CHECK_ROWS(c, B, N);
    CHECK_OPTIONAL(d, D);
    CHECK_OPTIONAL_ROWS(z, B, D);
    const real *shift = bias.data, *skip = d.data, *rates = A_log.data;
#pragma omp parallel for collapse(2) schedule(static) if (B * D * N >= WORKERS_WORK_MIN)
    for (int64_t row = 0; row < B; row++) {
        for (int64_t i = 0; i < D; i++) {
            real now = row_of(x, row)[i], delta = softplus(row_of(raw, row)[i] + shift[i]);
            real y = step_channel((real *)state.data + (row * D + i) * N, now, delta, rates + i * N, row_of(b, row),
                                  row_of(c, row), N);
            if (skip) y += skip[i] * now;
            row_of(g, row)[i] = tensor_given(z) ? y * silu(row_of(z, row)[i]) : y;
        }
    }
}
