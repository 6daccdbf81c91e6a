/* attention_wgmma.cu: attention by Hopper's products of groups of warps (wgmma.cuh): bf16, heads of up to 64 channels, no
 * cache. attention.cu has the mathematics; attention_mma.cu the same by the products of single warps, whose operands
 * all come from shared memory through registers, which is what bounds them; here second operands are read where they
 * lie, and products go on while other warps are busy with exponentials.
 *
 * Forward and dq: a block has 128 queries of one head, a group of warps 64; it walks over keys in tiles of 64. dk and dv: a
 * block is one group and has 64 keys, walking over the queries of all heads that share them, with scores transposed.
 * Scores stay in registers and are, rounded, the first operand of the next product. Scores and their gradients are made
 * twice in backward, so that every sum belongs to one group: nothing is added atomically, and two runs give the same bits.
 * Two blocks (dk and dv: three) share a multiprocessor, so that one group's exponentials hide behind another's products.
 *
 * A tile of 64 x 64 is, in clocks of a multiprocessor: 128 for each product (forward 2, dq 3, dk and dv 4), 256 for its
 * exponentials, as many for what is done to scores in other instructions. Full causal attention of B 16, T 2048, 12 heads
 * of 64 has 104,000 of them, 790 a multiprocessor: forward 0.12 ms of products and 0.12 of exponentials, expected 0.25;
 * backward 0.42 ms of products and 0.24 of exponentials, expected 0.9. Documents leave tiles out. */
#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/wgmma.cuh"

#include <stdlib.h>
#include <string.h>

enum {
    W = TILE_COLUMNS,
    THREADS = 2 * WARPGROUP,
    SLOTS = 4,      /* of tiles on their way and in use, forward */
    DQ_SLOTS = 3,
    TILE = KEYS * W,
};

static_assert(KEYS == 64 && BACK_QUERIES == 64, "tiles are square");

#ifndef WITHOUT_WGMMA
/* z = a b^T over all 64 channels, to be ended and waited for. */
__device__ __forceinline__ void start_scores(float (&z)[8][4], matrix a, matrix b) {
#pragma unroll
    for (int k = 0; k < W; k += 16) product_of_rows(z, matrix_columns(a, k), matrix_columns(b, k), k > 0);
}

/* sum += a b. */
__device__ __forceinline__ void start_sums(float (&sum)[8][4], const uint32_t (&a)[4][4], matrix b) {
#pragma unroll
    for (int k = 0; k < 4; k++) product_of_columns(sum, a[k], matrix_rows(b, 16 * k));
}

/* Keys and values j0 .. before `end` into a slot of two tiles, or nothing: a group of copies either way. */
template <int N>
__device__ __forceinline__ void load_slot(bf16 *slot, const operands &x, const attention_problem &p, int64_t b, int g,
                                          int j0, int end) {
    if (j0 < end) {
        load_rows<N, W, KEYS>(slot, p.P, x.k.at(b, j0, g), x.k.step, end - j0);
        load_rows<N, W, KEYS>(slot + TILE, p.P, x.v.at(b, j0, g), x.v.step, end - j0);
    }
    cp_async_commit();
}
#endif

/* --- forward ------------------------------------------------------------------------------------------------------ */

/* The slot of the tile before last is free when all have passed a tile's barrier: whoever did has waited for the products
 * of the tile before last. */
__global__ void __launch_bounds__(THREADS, 2)
wgmma_forward_kernel(attention_rows<bf16> o, float *lse, operands x, attention_problem p) {
#ifndef WITHOUT_WGMMA
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = tile_start(memory), *slots = queries + QUERIES * W;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * 16, t = t0 + row + lane / 4, end = (int)at_most(t0 + QUERIES, p.T);
    int group = threadIdx.x / WARPGROUP * 64, last = t0 + group + 63, start = first_key(p, b, t0);
    int group_first = first_key(p, b, (int)at_most(t0 + group, p.T - 1));
    int last_first = first_key(p, b, (int)at_most(last, p.T - 1));
    int first[2] = {first_key(p, b, t), first_key(p, b, t + 8)};
    float high[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, sum[1][8][4] = {};
    uint32_t a[4][4];
    matrix mine = matrix_rows(matrix_at(queries), group);
    load_tile<THREADS, W>(queries, QUERIES, p.P, [&](int i) {
        return t0 + i < p.T ? x.q.at(b, t0 + i, h) : (const bf16 *)NULL;
    });
    load_slot<THREADS>(slots, x, p, b, g, start, end);
    load_slot<THREADS>(slots + 2 * TILE, x, p, b, g, start + KEYS, end);
    for (int j0 = start, n = 0; j0 < end; j0 += KEYS, n++) {
        const bf16 *slot = slots + n % SLOTS * 2 * TILE;
        cp_async_wait<1>();
        shared_for_products();
        __syncthreads();
        load_slot<THREADS>(slots + (n + 2) % SLOTS * 2 * TILE, x, p, b, g, j0 + 2 * KEYS, end);
        if (j0 > last || j0 + KEYS <= group_first) continue;
        float z[1][8][4];
        products_begin();
        start_scores(z[0], mine, matrix_at(slot));
        products_end();
        products_wait<0>();
        arrived(z[0]);
        bool masks = j0 + KEYS > t0 + group + 1 || j0 < last_first || last >= p.T;
        take_scores<1, W>(z, sum, high, total, first, t, j0, masks, p.scale * LOG2E);
#pragma unroll
        for (int k = 0; k < 4; k++) pack_scores(a[k], z[0], k);
        products_begin();
        start_sums(sum[0], a, matrix_at(slot + TILE));
        products_end();
        products_wait<0>();
        arrived(sum[0]);
        arrived(a);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] = row_sum(total[r]);
        if (lse && lane % 4 == 0 && t + 8 * r < p.T)
            lse[(b * p.H + h) * p.T + t + 8 * r] = high[r] * p.scale + logf(total[r]);
        total[r] = 1.0f / total[r];
    }
    __syncthreads(); /* nobody reads queries any more */
    store_sum<W>(queries, row, sum[0], total[0], total[1], p.P,
                 [&](int i) { return t0 + i < p.T ? o.at(b, t0 + i, h) : (bf16 *)NULL; });
#endif
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* The product of two rows, as far as a lane of four has it. */
__device__ __forceinline__ float part_of_delta(const bf16 *x, const bf16 *y, int P) {
    float sum = 0;
#pragma unroll
    for (int c = threadIdx.x % 4 * 8; c < W; c += W / 2) {
        float left[8], right[8];
        if (c >= P) continue;
        load_floats<8>(left, x + c);
        load_floats<8>(right, y + c);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += left[k] * right[k];
    }
    return sum;
}

/* Leaves delta for the kernel behind it. */
__global__ void __launch_bounds__(THREADS, 2)
wgmma_dq_kernel(attention_rows<bf16> dq, float *delta, attention_rows<bf16> dout, attention_rows<bf16> o,
                const float *lse, operands x, attention_problem p) {
#ifndef WITHOUT_WGMMA
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = tile_start(memory), *douts = queries + QUERIES * W, *slots = douts + QUERIES * W;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * 16, t = t0 + row + lane / 4, end = (int)at_most(t0 + QUERIES, p.T);
    int group = threadIdx.x / WARPGROUP * 64, last = t0 + group + 63, start = first_key(p, b, t0);
    int group_first = first_key(p, b, (int)at_most(t0 + group, p.T - 1));
    int last_first = first_key(p, b, (int)at_most(last, p.T - 1));
    int first[2] = {first_key(p, b, t), first_key(p, b, t + 8)};
    float log_sum[2], dot[2], sum[8][4] = {};
    for (int r = 0; r < 2; r++) {
        bool there = t + 8 * r < p.T;
        log_sum[r] = there ? lse[(b * p.H + h) * p.T + t + 8 * r] * LOG2E : 0.0f;
        dot[r] = row_sum(there ? part_of_delta(dout.at(b, t + 8 * r, h), o.at(b, t + 8 * r, h), p.P) : 0.0f);
        if (there && lane % 4 == 0) delta[(b * p.H + h) * p.T + t + 8 * r] = dot[r];
    }
    load_tile<THREADS, W>(queries, QUERIES, p.P, [&](int i) {
        return t0 + i < p.T ? x.q.at(b, t0 + i, h) : (const bf16 *)NULL;
    });
    load_tile<THREADS, W>(douts, QUERIES, p.P, [&](int i) {
        return t0 + i < p.T ? dout.at(b, t0 + i, h) : (const bf16 *)NULL;
    });
    load_slot<THREADS>(slots, x, p, b, g, start, end);
    load_slot<THREADS>(slots + 2 * TILE, x, p, b, g, start + KEYS, end);
    for (int j0 = start, n = 0; j0 < end; j0 += KEYS, n++) {
        const bf16 *slot = slots + n % DQ_SLOTS * 2 * TILE;
        cp_async_wait<1>();
        shared_for_products();
        __syncthreads();
        load_slot<THREADS>(slots + (n + 2) % DQ_SLOTS * 2 * TILE, x, p, b, g, j0 + 2 * KEYS, end);
        if (j0 > last || j0 + KEYS <= group_first) continue;
        float z[8][4], dz[8][4];
        uint32_t a[4][4];
        products_begin();
        start_scores(z, matrix_rows(matrix_at(queries), group), matrix_at(slot));
        products_end();
        products_begin();
        start_scores(dz, matrix_rows(matrix_at(douts), group), matrix_at(slot + TILE));
        products_end();
        products_wait<1>();
        arrived(z);
        bool masks = j0 + KEYS > t0 + group + 1 || j0 < last_first || last >= p.T;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int r = i / 2 % 2, j = j0 + i / 4 * 8 + 2 * (lane % 4) + i % 2;
            float share = power_of_two(z[i / 4][i % 4] * (p.scale * LOG2E) - log_sum[r]);
            z[i / 4][i % 4] = masks && (j < first[r] || j > t + 8 * r) ? 0.0f : share;
        }
        products_wait<0>();
        arrived(dz);
#pragma unroll
        for (int i = 0; i < 32; i++) z[i / 4][i % 4] *= dz[i / 4][i % 4] - dot[i / 2 % 2];
#pragma unroll
        for (int k = 0; k < 4; k++) pack_scores(a[k], z, k);
        products_begin();
        start_sums(sum, a, matrix_at(slot));
        products_end();
        products_wait<0>();
        arrived(sum);
        arrived(a);
    }
    __syncthreads(); /* nobody reads queries any more */
    store_sum<W>(queries, row, sum, p.scale, p.scale, p.P,
                 [&](int i) { return t0 + i < p.T ? dq.at(b, t0 + i, h) : (bf16 *)NULL; });
#endif
}

__global__ void __launch_bounds__(WARPGROUP, 3)
wgmma_dkv_kernel(attention_rows<bf16> dk, attention_rows<bf16> dv, attention_rows<bf16> dout, const float *delta,
                 const float *lse, operands x, attention_problem p) {
#ifndef WITHOUT_WGMMA
    DYNAMIC_SHARED(bf16, memory);
    bf16 *keys = tile_start(memory), *values = keys + TILE, *slots = values + TILE;
    query_facts *facts = (query_facts *)(slots + 4 * TILE);
    int64_t b = blockIdx.z;
    int g = blockIdx.y, j0 = blockIdx.x * KEYS, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16;
    float sum_k[8][4] = {}, sum_v[8][4] = {};
    load_rows<WARPGROUP, W, KEYS>(keys, p.P, x.k.at(b, j0, g), x.k.step, (int)at_most(KEYS, p.T - j0));
    load_rows<WARPGROUP, W, KEYS>(values, p.P, x.v.at(b, j0, g), x.v.step, (int)at_most(KEYS, p.T - j0));
    int head = 0, now = j0, ahead = 0, next = j0; /* the head and first token of the tile at work, and of the next */
    auto load = [&](int slot) {
        if (ahead < p.share)
            load_back_queries<WARPGROUP, W>(slots + slot * 2 * TILE, slots + (slot * 2 + 1) * TILE, &facts[slot], x, dout,
                                            delta, lse, p, b, query_head(p, g, ahead), next);
    };
    load(0);
    for (int turn = 0; head < p.share; turn ^= 1, head = ahead, now = next) {
        const bf16 *slot = slots + turn * 2 * TILE;
        const query_facts &its = facts[turn];
        cp_async_wait<0>();
        shared_for_products();
        __syncthreads();
        next_queries(p, b, j0, KEYS, &ahead, &next);
        load(turn ^ 1);
        float z[8][4], dz[8][4];
        uint32_t a[4][4], da[4][4];
        products_begin();
        start_scores(z, matrix_at(keys), matrix_at(slot));
        products_end();
        products_begin();
        start_scores(dz, matrix_at(values), matrix_at(slot + TILE));
        products_end();
        products_wait<1>();
        arrived(z);
        take_back_scores(z, its, j0 + row + lane / 4, now, back_masks(its, j0, KEYS, now), p.scale * LOG2E);
        products_wait<0>();
        arrived(dz);
        take_back_gradients(dz, z, its);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            pack_scores(a[k], z, k);
            pack_scores(da[k], dz, k);
        }
        products_begin();
        start_sums(sum_v, a, matrix_at(slot + TILE));
        start_sums(sum_k, da, matrix_at(slot));
        products_end();
        products_wait<0>();
        arrived(sum_v);
        arrived(sum_k);
        arrived(a);
        arrived(da);
    }
    __syncthreads(); /* nobody reads keys and values any more */
    store_sum<W>(keys, row, sum_k, p.scale, p.scale, p.P,
                 [&](int i) { return j0 + i < p.T ? dk.at(b, j0 + i, g) : (bf16 *)NULL; });
    store_sum<W>(values, row, sum_v, 1, 1, p.P,
                 [&](int i) { return j0 + i < p.T ? dv.at(b, j0 + i, g) : (bf16 *)NULL; });
#endif
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

/* Only where RIVERRUN_WGMMA=1 in the environment asks for it, until it has been seen on a GPU. */
static bool serves(const attention_problem &p) {
    const char *wanted = getenv("RIVERRUN_WGMMA");
    return p.P <= W && !p.count && wanted && strcmp(wanted, "1") == 0 && products_fit(wgmma_forward_kernel);
}

bool attention_wgmma_forward(struct device *dev, tensor o, tensor lse, const operands &x, const attention_problem &p) {
    if (!serves(p)) return false;
    size_t bytes = TILE_ALIGN + (QUERIES * W + SLOTS * 2 * TILE) * sizeof(bf16);
    allow_shared(dev, wgmma_forward_kernel, bytes);
    LAUNCH(dev, wgmma_forward_kernel, grid_of(p, QUERIES, p.H), THREADS, bytes, attention_rows_of<bf16>(o),
           data_of<float>(lse), x, p);
    return true;
}

bool attention_wgmma_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                              const operands &x, const attention_problem &p, float *delta) {
    if (!serves(p)) return false;
    attention_rows<bf16> douts = attention_rows_of<bf16>(dout);
    size_t of_dq = TILE_ALIGN + (2 * QUERIES * W + DQ_SLOTS * 2 * TILE) * sizeof(bf16);
    size_t of_dkv = TILE_ALIGN + 6 * TILE * sizeof(bf16) + 2 * sizeof(query_facts);
    allow_shared(dev, wgmma_dq_kernel, of_dq);
    allow_shared(dev, wgmma_dkv_kernel, of_dkv);
    LAUNCH(dev, wgmma_dq_kernel, grid_of(p, QUERIES, p.H), THREADS, of_dq, attention_rows_of<bf16>(dq), delta, douts,
           attention_rows_of<bf16>(o), data_of<float>(lse), x, p);
    LAUNCH(dev, wgmma_dkv_kernel, grid_of(p, KEYS, p.G), WARPGROUP, of_dkv, attention_rows_of<bf16>(dk),
           attention_rows_of<bf16>(dv), douts, delta, data_of<float>(lse), x, p);
    return true;
}
