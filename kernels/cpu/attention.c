/* attention.c: causal attention within documents, with grouped heads, a window and a cache, on the CPU: forward,
 * backward, one token.
 *
 *   z_tj = s q_t . k_j;   lse_t = log sum_j exp(z_tj);   o_t = sum_j exp(z_tj - lse_t) v_j
 *   backward   p_tj = exp(z_tj - lse_t);  delta_t = do_t . o_t;  dz_tj = p_tj (do_t . v_j - delta_t)
 *              dq_t = s sum_j dz_tj k_j;   dk_j = s sum_t dz_tj q_t;   dv_j = sum_t p_tj do_t
 *
 * Tokens of a row are counted from 0, those in the cache -1, -2, ... back. A token's visible keys are a range that ends
 * with itself, and the beginnings of these ranges never decrease along a row. Queries and keys are taken in blocks of
 * BLOCK; forward keeps a running maximum and sum for each query of a block, so that scores exist for one pair of blocks
 * only. Work is divided into blocks of queries (forward) and heads of keys (backward), each of which adds in a fixed
 * order, so the bits don't depend on the number of threads. FLOPs of full causal attention: 2 B H T^2 P forward, 5 B H
 * T^2 P backward. */
#include "kernels/cpu/cpu.h"

enum { BLOCK = 64 };

/* The arguments of a problem, B .. C as in ops.h. */
struct problem {
    int64_t B, T, H, G, P, C;
    tensor q, k, v, positions;
    struct attention_cache cache;
    struct attention_rule rule;
    real scale;
};

/* Memory of one thread. */
struct room {
    real *z, *dz;    /* (BLOCK, BLOCK): scores, then probabilities; their gradients */
    real *keys, *values; /* (BLOCK, P): gathered from the cache */
    real *sum;       /* (BLOCK, P) */
    real *high, *total; /* (BLOCK): running maximum and sum */
};

static struct room room_carve(struct carver *c, int64_t P) {
    return (struct room){.z = carve_reals(c, BLOCK * BLOCK),  .dz = carve_reals(c, BLOCK * BLOCK),
                         .keys = carve_reals(c, BLOCK * P),   .values = carve_reals(c, BLOCK * P),
                         .sum = carve_reals(c, BLOCK * P),    .high = carve_reals(c, BLOCK),
                         .total = carve_reals(c, BLOCK)};
}

static struct room room_of(void *scratch, int64_t P) {
    struct carver measured = {.base = NULL};
    room_carve(&measured, P);
    struct carver c = {.base = (char *)scratch + (size_t)worker_index() * measured.used};
    return room_carve(&c, P);
}

static size_t rooms(int64_t P) {
    struct carver c = {.base = NULL};
    room_carve(&c, P);
    return c.used * WORKERS_MAX;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* The head of keys and values that head h reads, of H / G that share it. */
static int64_t group_of(const struct problem *p, int64_t h) {
    return p->rule.tiled ? h % p->G : h / (p->H / p->G);
}

static int32_t count_of(const struct problem *p, int64_t b) {
    return p->C ? ((const int32_t *)p->cache.count.data)[b] : 0;
}

/* The first key that token t of row b sees; below 0 for one in the cache. */
static int64_t first_key(const struct problem *p, int64_t b, int64_t t) {
    int64_t back = tensor_given(p->positions) ? ((const int32_t *)p->positions.data)[b * p->T + t] : t;
    if (p->rule.window > 0) back = least(back, p->rule.window - 1);
    return t - least(back, t + least(count_of(p, b), p->C));
}

static real *row_at(tensor x, int64_t b, int64_t t, int64_t h) {
    return (real *)x.data + b * x.stride[0] + t * x.stride[1] + h * x.stride[2];
}

/* `count` keys or values from token j on, as rows `*step` apart: those of the row as they lie, those of the cache
 * gathered in `room`. A block does not span both. */
static const real *rows_from(const struct problem *p, tensor x, tensor cached, int64_t b, int64_t j, int64_t count,
                             int64_t g, real *room, int64_t *step) {
    if (j >= 0) {
        *step = x.stride[1];
        return row_at(x, b, j, g);
    }
    *step = p->P;
    for (int64_t i = 0; i < count; i++)
        memcpy(room + i * p->P, row_at(cached, b, (count_of(p, b) + j + i) % p->C, g), (size_t)p->P * sizeof(real));
    return room;
}

/* The end of the block of keys that begins with key j: at most `end`, and not across the row's beginning. */
static int64_t block_end(int64_t j, int64_t end) {
    return least(least(j + BLOCK, end), j < 0 ? 0 : end);
}

/* Scores of queries t .. t+rows-1 with keys j .. j+count-1 into room->z, minus infinity where a token does not see. */
static void score(const struct problem *p, struct room *room, int64_t b, int64_t h, int64_t t, int64_t rows, int64_t j,
                  int64_t count) {
    int64_t step;
    const real *keys = rows_from(p, p->k, p->cache.k, b, j, count, group_of(p, h), room->keys, &step);
    gemm(false, true, rows, count, p->P, p->scale, row_at(p->q, b, t, h), p->q.stride[1], keys, step, 0, room->z,
         BLOCK);
    for (int64_t i = 0; i < rows; i++) {
        int64_t from = first_key(p, b, t + i) - j, to = t + i - j;
        for (int64_t k = 0; k < count; k++)
            if (k < from || k > to) room->z[i * BLOCK + k] = -(real)INFINITY;
    }
}

/* Take a block of scores into the running softmax of `rows` queries: z becomes exp(z - high), sums so far are
 * scaled. */
static void renormalise(struct room *room, int64_t rows, int64_t count, int64_t P) {
    for (int64_t i = 0; i < rows; i++) {
        real *z = room->z + i * BLOCK, high = room->high[i], total = 0;
        for (int64_t k = 0; k < count; k++) high = z[k] > high ? z[k] : high;
        if (high == -(real)INFINITY) { /* nothing is visible yet */
            memset(z, 0, (size_t)count * sizeof(real));
            continue;
        }
        real old = exp_real(room->high[i] - high);
        for (int64_t k = 0; k < count; k++) {
            z[k] = exp_real(z[k] - high);
            total += z[k];
        }
        for (int64_t c = 0; c < P; c++) room->sum[i * P + c] *= old;
        room->total[i] = room->total[i] * old + total;
        room->high[i] = high;
    }
}

static void forward_block(const struct problem *p, struct room *room, tensor o, tensor lse, int64_t b, int64_t h,
                          int64_t t) {
    int64_t rows = least(BLOCK, p->T - t), P = p->P, step, end;
    memset(room->sum, 0, (size_t)(rows * P) * sizeof(real));
    for (int64_t i = 0; i < rows; i++) {
        room->high[i] = -(real)INFINITY;
        room->total[i] = 0;
    }
    for (int64_t j = first_key(p, b, t); j < t + rows; j = end) {
        end = block_end(j, t + rows);
        score(p, room, b, h, t, rows, j, end - j);
        renormalise(room, rows, end - j, P);
        const real *values = rows_from(p, p->v, p->cache.v, b, j, end - j, group_of(p, h), room->values, &step);
        gemm(false, false, rows, P, end - j, 1, room->z, BLOCK, values, step, 1, room->sum, P);
    }
    for (int64_t i = 0; i < rows; i++) {
        real *out = row_at(o, b, t + i, h);
        for (int64_t c = 0; c < P; c++) out[c] = room->sum[i * P + c] / room->total[i];
        if (tensor_given(lse))
            ((real *)lse.data)[(b * p->H + h) * p->T + t + i] = room->high[i] + log_real(room->total[i]);
    }
}

static struct problem problem_of(tensor q, tensor k, tensor v, tensor positions, struct attention_cache cache,
                                 struct attention_rule rule) {
    struct problem p = {.B = q.dim[0], .T = q.dim[1], .H = q.dim[2], .G = k.dim[2], .P = q.dim[3], .q = q, .k = k,
                        .v = v, .positions = positions, .cache = cache, .rule = rule};
    CHECK_ROWS(q, p.B, p.T, p.H, p.P);
    CHECK_ROWS(k, p.B, p.T, p.G, p.P);
    CHECK_ROWS(v, p.B, p.T, p.G, p.P);
    ASSERT(p.H % p.G == 0 && p.P <= 256 && rule.window >= 0);
    if (tensor_given(positions)) CHECK_INDEX(positions, p.B, p.T);
    if (tensor_given(cache.k)) {
        p.C = cache.k.dim[1];
        CHECK_DENSE(cache.k, p.B, p.C, p.G, p.P);
        CHECK_DENSE(cache.v, p.B, p.C, p.G, p.P);
        CHECK_INDEX(cache.count, p.B);
        ASSERT(tensor_given(positions));
    }
    p.scale = (real)(1 / sqrt((double)p.P));
    return p;
}

void OP(attention_forward)(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v, tensor positions,
                           struct attention_cache cache, struct attention_rule rule, void *scratch) {
    (void)dev;
    struct problem p = problem_of(q, k, v, positions, cache, rule);
    CHECK_ROWS(o, p.B, p.T, p.H, p.P);
    CHECK_OPTIONAL(lse, p.B, p.H, p.T);
    int64_t blocks = (p.T + BLOCK - 1) / BLOCK, items = p.B * p.H * blocks;
    int workers = worker_count(items, p.B * p.H * p.T * (p.T + p.C) * p.P);
    (void)workers;
#pragma omp parallel for schedule(dynamic) num_threads(workers)
    for (int64_t i = 0; i < items; i++) {
        struct room room = room_of(scratch, p.P);
        forward_block(&p, &room, o, lse, i / blocks / p.H, i / blocks % p.H, i % blocks * BLOCK);
    }
}

size_t OP(attention_forward_scratch)(struct attention_shape shape) {
    return rooms(shape.P);
}

struct gradients {
    tensor dq, dk, dv, dout, o, lse;
};

/* Probabilities of a block of scores into room->z, and the gradients of the scores into room->dz. */
static void score_gradients(const struct problem *p, const struct gradients *d, struct room *room, int64_t b, int64_t h,
                            int64_t t, int64_t rows, int64_t j, int64_t count) {
    int64_t step;
    const real *lse = (const real *)d->lse.data + (b * p->H + h) * p->T + t;
    score(p, room, b, h, t, rows, j, count);
    const real *values = rows_from(p, p->v, p->cache.v, b, j, count, group_of(p, h), room->values, &step);
    gemm(false, true, rows, count, p->P, 1, row_at(d->dout, b, t, h), d->dout.stride[1], values, step, 0, room->dz,
         BLOCK);
    for (int64_t i = 0; i < rows; i++) {
        const real *o = row_at(d->o, b, t + i, h), *dout = row_at(d->dout, b, t + i, h);
        real *z = room->z + i * BLOCK, *dz = room->dz + i * BLOCK, delta = 0;
        for (int64_t c = 0; c < p->P; c++) delta += o[c] * dout[c];
        for (int64_t k = 0; k < count; k++) {
            z[k] = exp_real(z[k] - lse[i]);
            dz[k] = z[k] * (dz[k] - delta);
        }
    }
}

/* All gradients of one head: dq =, dk and dv +=. */
static void backward_head(const struct problem *p, const struct gradients *d, struct room *room, int64_t b, int64_t h) {
    int64_t P = p->P, g = group_of(p, h), end, step;
    for (int64_t t = 0; t < p->T; t += BLOCK) {
        int64_t rows = least(BLOCK, p->T - t);
        memset(room->sum, 0, (size_t)(rows * P) * sizeof(real));
        for (int64_t j = first_key(p, b, t); j < t + rows; j = end) {
            end = block_end(j, t + rows);
            score_gradients(p, d, room, b, h, t, rows, j, end - j);
            const real *keys = rows_from(p, p->k, p->cache.k, b, j, end - j, g, room->keys, &step);
            gemm(false, false, rows, P, end - j, p->scale, room->dz, BLOCK, keys, step, 1, room->sum, P);
            if (j < 0) continue;
            gemm(true, false, end - j, P, rows, p->scale, room->dz, BLOCK, row_at(p->q, b, t, h), p->q.stride[1], 1,
                 row_at(d->dk, b, j, g), d->dk.stride[1]);
            gemm(true, false, end - j, P, rows, 1, room->z, BLOCK, row_at(d->dout, b, t, h), d->dout.stride[1], 1,
                 row_at(d->dv, b, j, g), d->dv.stride[1]);
        }
        for (int64_t i = 0; i < rows; i++)
            memcpy(row_at(d->dq, b, t + i, h), room->sum + i * P, (size_t)P * sizeof(real));
    }
}

void OP(attention_backward)(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                            tensor q, tensor k, tensor v, tensor positions, struct attention_cache cache,
                            struct attention_rule rule, void *scratch) {
    (void)dev;
    struct problem p = problem_of(q, k, v, positions, cache, rule);
    struct gradients d = {.dq = dq, .dk = dk, .dv = dv, .dout = dout, .o = o, .lse = lse};
    CHECK_ROWS(dq, p.B, p.T, p.H, p.P);
    CHECK_ROWS(dk, p.B, p.T, p.G, p.P);
    CHECK_ROWS(dv, p.B, p.T, p.G, p.P);
    CHECK_ROWS(dout, p.B, p.T, p.H, p.P);
    CHECK_ROWS(o, p.B, p.T, p.H, p.P);
    CHECK_DENSE(lse, p.B, p.H, p.T);
    int64_t items = p.B * p.G, share = p.H / p.G;
    int workers = worker_count(items, p.B * p.H * p.T * (p.T + p.C) * p.P);
    (void)workers;
#pragma omp parallel for schedule(dynamic) num_threads(workers)
    for (int64_t i = 0; i < items; i++) {
        struct room room = room_of(scratch, p.P);
        int64_t b = i / p.G, g = i % p.G;
        for (int64_t t = 0; t < p.T; t++) {
            memset(row_at(dk, b, t, g), 0, (size_t)p.P * sizeof(real));
            memset(row_at(dv, b, t, g), 0, (size_t)p.P * sizeof(real));
        }
        for (int64_t s = 0; s < share; s++) backward_head(&p, &d, &room, b, rule.tiled ? g + s * p.G : g * share + s);
    }
}

size_t OP(attention_backward_scratch)(struct attention_shape shape) {
    return rooms(shape.P);
}

void OP(attention_store)(struct device *dev, struct attention_cache cache, tensor k, tensor v, tensor positions) {
    (void)dev;
    int64_t B = k.dim[0], T = k.dim[1], G = k.dim[2], P = k.dim[3], C = cache.k.dim[1];
    CHECK_ROWS(k, B, T, G, P);
    CHECK_ROWS(v, B, T, G, P);
    CHECK_DENSE(cache.k, B, C, G, P);
    CHECK_DENSE(cache.v, B, C, G, P);
    CHECK_INDEX(cache.count, B);
    if (tensor_given(positions)) CHECK_INDEX(positions, B, T);
    for (int64_t b = 0; b < B; b++) {
        int64_t last = tensor_given(positions) ? ((const int32_t *)positions.data)[b * T + T - 1] : T - 1;
        int64_t kept = least(least(T, C), last + 1);
        for (int64_t t = T - kept; t < T; t++) {
            for (int64_t g = 0; g < G; g++) {
                int64_t slot = (last - (T - 1 - t)) % C;
                memcpy(row_at(cache.k, b, slot, g), row_at(k, b, t, g), (size_t)P * sizeof(real));
                memcpy(row_at(cache.v, b, slot, g), row_at(v, b, t, g), (size_t)P * sizeof(real));
            }
        }
        ((int32_t *)cache.count.data)[b] = (int32_t)(last + 1);
    }
}

/* One head of one sequence: scores of all slots, then their softmax and the sum of values. */
static void step_head(const struct problem *p, tensor o, real *z, int64_t b, int64_t h) {
    int64_t count = count_of(p, b), seen = least(count, p->C), g = group_of(p, h);
    if (p->rule.window > 0) seen = least(seen, p->rule.window);
    const real *q = (const real *)p->q.data + b * p->q.stride[0] + h * p->q.stride[1];
    real *out = (real *)o.data + b * o.stride[0] + h * o.stride[1], high = -(real)INFINITY, total = 0;
    for (int64_t i = 0; i < seen; i++) {
        const real *key = row_at(p->cache.k, b, (count - 1 - i) % p->C, g);
        real sum = 0;
        for (int64_t c = 0; c < p->P; c++) sum += q[c] * key[c];
        z[i] = p->scale * sum;
        high = z[i] > high ? z[i] : high;
    }
    memset(out, 0, (size_t)p->P * sizeof(real));
    for (int64_t i = 0; i < seen; i++) {
        const real *value = row_at(p->cache.v, b, (count - 1 - i) % p->C, g);
        real share = exp_real(z[i] - high);
        total += share;
        for (int64_t c = 0; c < p->P; c++) out[c] += share * value[c];
    }
    for (int64_t c = 0; c < p->P; c++) out[c] /= total;
}

void OP(attention_step)(struct device *dev, tensor o, tensor q, struct attention_cache cache,
                        struct attention_rule rule, void *scratch) {
    (void)dev;
    struct problem p = {.B = q.dim[0], .H = q.dim[1], .P = q.dim[2], .C = cache.k.dim[1], .G = cache.k.dim[2], .q = q,
                        .cache = cache, .rule = rule};
    CHECK_ROWS(q, p.B, p.H, p.P);
    CHECK_ROWS(o, p.B, p.H, p.P);
    CHECK_DENSE(cache.k, p.B, p.C, p.G, p.P);
    CHECK_DENSE(cache.v, p.B, p.C, p.G, p.P);
    CHECK_INDEX(cache.count, p.B);
    ASSERT(p.H % p.G == 0);
    p.scale = (real)(1 / sqrt((double)p.P));
    int workers = worker_count(p.B * p.H, p.B * p.H * p.C * p.P);
    (void)workers;
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t i = 0; i < p.B * p.H; i++)
        step_head(&p, o, (real *)scratch + worker_index() * p.C, i / p.H, i % p.H);
}

size_t OP(attention_step_scratch)(struct attention_shape shape) {
    return (size_t)(WORKERS_MAX * shape.C) * sizeof(real);
}
