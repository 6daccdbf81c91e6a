/* attention_mma.cu: attention on tensor cores: bf16, heads of a multiple of 8 channels up to 128. attention.cu has the
 * mathematics, and what other operands take.
 *
 * Heads are padded with zeros to W = 64 or 128 channels. Forward: a block has 128 queries of one head and four warps of
 * 32 queries each, so that what is loaded of keys and values serves two products; it walks over keys in tiles of 64,
 * the next one on its way into shared memory meanwhile. Scores stay in registers: as an accumulator's layout is that of
 * a first operand, probabilities are multiplied with values as they are, rounded to bf16, under a running maximum and
 * sum in fp32. Blocks with the most keys start first.
 * Backward: delta (a warp has a token's head); then dq, whose blocks have 128 queries, eight warps of 16; then dk and dv,
 * whose blocks have 128 keys, a warp 16, walking over the queries of all heads that share them, with scores transposed.
 * Scores and their gradients are made twice, so that every sum belongs to one warp: nothing is added atomically, and two
 * runs give the same bits.
 *
 * Of full causal attention: 2 B H T^2 P FLOPs forward, 7 B H T^2 P backward. mma.sync reaches some 600 TFLOP/s on an H100,
 * of which softmax and loads from shared memory leave about 350: B 8, T 2048, 16 heads of 128 should take 0.4 ms
 * forward and 1.6 ms backward. */
#include "kernels/cuda/attention_mma.cuh"

enum {
    BACK_KEYS = 128, /* of a block of dk and dv */
    FORWARD_THREADS = 128,
};

bool attention_mma_serves(tensor q, tensor k, tensor v, tensor o) {
    int64_t P = q.dim[3];
    return q.dtype == DTYPE_BF16 && P <= 128 && vectors_fit(q, 8) && vectors_fit(k, 8) && vectors_fit(v, 8) &&
           vectors_fit(o, 8);
}

/* Keys and values j0 .. before `end`, into the place that the tile's number has. */
template <int THREADS, int W>
__device__ __forceinline__ void load_keys(bf16 *keys, bf16 *values, const operands &x, const attention_problem &p,
                                          int64_t b, int g, int j0, int end) {
    if (j0 >= 0) {
        load_rows<THREADS, W, KEYS>(keys, p.P, x.k.at(b, j0, g), x.k.step, end - j0);
        load_rows<THREADS, W, KEYS>(values, p.P, x.v.at(b, j0, g), x.v.step, end - j0);
        cp_async_commit();
        return;
    }
    load_tile<THREADS, W>(keys, KEYS, p.P, [&](int i) {
        return j0 + i < end ? key_at(p, x.k, x.cache_k, b, j0 + i, g) : (const bf16 *)NULL;
    });
    load_tile<THREADS, W>(values, KEYS, p.P, [&](int i) {
        return j0 + i < end ? key_at(p, x.v, x.cache_v, b, j0 + i, g) : (const bf16 *)NULL;
    });
    cp_async_commit();
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

template <int W>
__global__ void __launch_bounds__(FORWARD_THREADS)
mma_forward_kernel(attention_rows<bf16> o, float *lse, operands x, attention_problem p) {
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = memory, *keys = queries + QUERIES * W, *values = keys + 2 * KEYS * W;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * 32, t = t0 + row + lane / 4, end = (int)at_most(t0 + QUERIES, p.T);
    int first[4], start = first_key(p, b, t0), last_first = first_key(p, b, (int)at_most(t0 + row + 31, p.T - 1));
    int warp_first = first_key(p, b, (int)at_most(t0 + row, p.T - 1));
    float high[4], total[4], sum[2][W / 8][4] = {};
    for (int r = 0; r < 4; r++) {
        first[r] = first_key(p, b, t + 8 * r);
        high[r] = -INFINITY, total[r] = 0;
    }
    load_tile<FORWARD_THREADS, W>(queries, QUERIES, p.P, [&](int i) {
        return t0 + i < p.T ? x.q.at(b, t0 + i, h) : (const bf16 *)NULL;
    });
    load_keys<FORWARD_THREADS, W>(keys, values, x, p, b, g, start, end);
    for (int j0 = start, turn = 0; j0 < end; j0 += KEYS, turn ^= 1) {
        bf16 *next_keys = keys + (turn ^ 1) * KEYS * W, *next_values = values + (turn ^ 1) * KEYS * W;
        if (j0 + KEYS < end) load_keys<FORWARD_THREADS, W>(next_keys, next_values, x, p, b, g, j0 + KEYS, end);
        else cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (j0 <= t0 + row + 31 && j0 + KEYS > warp_first) {
            float z[2][KEYS / 8][4];
            bool masks = j0 + KEYS > t0 + row + 1 || j0 < last_first || t0 + row + 32 > p.T;
            scores<2, KEYS, W>(z, queries, row, keys + turn * KEYS * W);
            if (masks) hide_scores<2>(z, first, t, j0);
            sum_scores<2, W>(z, sum, high, total, p.scale * LOG2E);
            accumulate<2, KEYS, W>(sum, z, values + turn * KEYS * W);
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        total[r] = row_sum(total[r]);
        if (lse && lane % 4 == 0 && t + 8 * r < p.T)
            lse[(b * p.H + h) * p.T + t + 8 * r] = high[r] * p.scale + logf(total[r]);
        total[r] = 1.0f / total[r];
    }
    auto to = [&](int i) { return t0 + i < p.T ? o.at(b, t0 + i, h) : (bf16 *)NULL; };
    store_sum<W>(queries, row, sum[0], total[0], total[1], p.P, to);
    store_sum<W>(queries, row + 16, sum[1], total[2], total[3], p.P, to);
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* delta (B,H,T): a warp has a head of a token. */
__global__ void mma_delta_kernel(float *delta, attention_rows<bf16> dout, attention_rows<bf16> o, attention_problem p) {
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP, h = i % p.H, t = i / p.H % p.T;
    int64_t b = i / p.H / p.T;
    int c = threadIdx.x % WARP * 4;
    if (b >= p.B) return;
    float sum = 0;
    if (c < p.P) {
        float x[4], y[4];
        load_floats<4>(x, dout.at(b, t, h) + c);
        load_floats<4>(y, o.at(b, t, h) + c);
        for (int k = 0; k < 4; k++) sum += x[k] * y[k];
    }
    sum = warp_sum(sum);
    if (c == 0) delta[(b * p.H + h) * p.T + t] = sum;
}

/* STAGES: places for a tile. With two the next tile is on its way meanwhile; one is for chips that give a block less
 * shared memory. */
template <int W, int STAGES>
__global__ void __launch_bounds__(BACK_THREADS)
mma_dq_kernel(attention_rows<bf16> dq, attention_rows<bf16> dout, const float *delta, const float *lse, operands x,
              attention_problem p) {
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = memory, *douts = queries + QUERIES * W, *keys = douts + QUERIES * W;
    bf16 *values = keys + STAGES * KEYS * W;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = (int)(gridDim.x - 1 - blockIdx.x) * QUERIES, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * 16, t = t0 + row + lane / 4, end = (int)at_most(t0 + QUERIES, p.T);
    int first[2], start = first_key(p, b, t0);
    float log_sum[2], dot[2], sum[1][W / 8][4] = {};
    for (int r = 0; r < 2; r++) {
        bool there = t + 8 * r < p.T;
        first[r] = first_key(p, b, t + 8 * r);
        log_sum[r] = there ? lse[(b * p.H + h) * p.T + t + 8 * r] * LOG2E : 0.0f;
        dot[r] = there ? delta[(b * p.H + h) * p.T + t + 8 * r] : 0.0f;
    }
    load_tile<BACK_THREADS, W>(queries, QUERIES, p.P, [&](int i) {
        return t0 + i < p.T ? x.q.at(b, t0 + i, h) : (const bf16 *)NULL;
    });
    load_tile<BACK_THREADS, W>(douts, QUERIES, p.P, [&](int i) {
        return t0 + i < p.T ? dout.at(b, t0 + i, h) : (const bf16 *)NULL;
    });
    load_keys<BACK_THREADS, W>(keys, values, x, p, b, g, start, end);
    for (int j0 = start, turn = 0; j0 < end; j0 += KEYS, turn = STAGES - 1 - turn) {
        bf16 *next_keys = keys + (STAGES - 1 - turn) * KEYS * W, *next_values = next_keys + STAGES * KEYS * W;
        bool more = j0 + KEYS < end;
        if (STAGES == 2 && more) load_keys<BACK_THREADS, W>(next_keys, next_values, x, p, b, g, j0 + KEYS, end);
        if (STAGES == 2 && !more) cp_async_commit();
        cp_async_wait<STAGES - 1>();
        __syncthreads();
        if (j0 <= t0 + row + 15) {
            float z[1][KEYS / 8][4], dz[1][KEYS / 8][4];
            scores<1, KEYS, W>(z, queries, row, keys + turn * KEYS * W);
            scores<1, KEYS, W>(dz, douts, row, values + turn * KEYS * W);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int j = j0 + 8 * n + 2 * (lane % 4) + i % 2, r = i / 2;
                    bool sees = j >= first[r] && j <= t + 8 * r;
                    float share = power_of_two(z[0][n][i] * (p.scale * LOG2E) - log_sum[r]);
                    dz[0][n][i] = sees ? share * (dz[0][n][i] - dot[r]) : 0.0f;
                }
            }
            accumulate<1, KEYS, W>(sum, dz, keys + turn * KEYS * W);
        }
        __syncthreads();
        if (STAGES == 1 && more) load_keys<BACK_THREADS, W>(keys, values, x, p, b, g, j0 + KEYS, end);
    }
    store_sum<W>(queries, row, sum[0], p.scale, p.scale, p.P,
                 [&](int i) { return t0 + i < p.T ? dq.at(b, t0 + i, h) : (bf16 *)NULL; });
}

template <int W>
__device__ __forceinline__ void load_back_queries(bf16 *queries, bf16 *douts, query_facts *facts, const operands &x,
                                                  const attention_rows<bf16> &dout, const float *delta, const float *lse,
                                                  const attention_problem &p, int64_t b, int h, int t0) {
    int there = (int)at_most(BACK_QUERIES, p.T - t0);
    load_rows<BACK_THREADS, W, BACK_QUERIES>(queries, p.P, x.q.at(b, t0, h), x.q.step, there);
    load_rows<BACK_THREADS, W, BACK_QUERIES>(douts, p.P, dout.at(b, t0, h), dout.step, there);
    cp_async_commit();
    load_facts(facts, delta, lse, p, b, h, t0);
}

template <int W, int STAGES>
__global__ void __launch_bounds__(BACK_THREADS)
mma_dkv_kernel(attention_rows<bf16> dk, attention_rows<bf16> dv, attention_rows<bf16> dout, const float *delta,
               const float *lse, operands x, attention_problem p) {
    DYNAMIC_SHARED(bf16, memory);
    __shared__ query_facts facts[STAGES];
    bf16 *keys = memory, *values = keys + BACK_KEYS * W, *queries = values + BACK_KEYS * W;
    bf16 *douts = queries + STAGES * BACK_QUERIES * W;
    int64_t b = blockIdx.z;
    int g = blockIdx.y, j0 = blockIdx.x * BACK_KEYS, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16;
    float sum_k[1][W / 8][4] = {}, sum_v[1][W / 8][4] = {};
    load_tile<BACK_THREADS, W>(keys, BACK_KEYS, p.P, [&](int i) {
        return j0 + i < p.T ? x.k.at(b, j0 + i, g) : (const bf16 *)NULL;
    });
    load_tile<BACK_THREADS, W>(values, BACK_KEYS, p.P, [&](int i) {
        return j0 + i < p.T ? x.v.at(b, j0 + i, g) : (const bf16 *)NULL;
    });
    int i = 0, t0 = j0, turn = 0;
    auto load = [&](int stage) {
        load_back_queries<W>(queries + stage * BACK_QUERIES * W, douts + stage * BACK_QUERIES * W, &facts[stage], x,
                             dout, delta, lse, p, b, query_head(p, g, i), t0);
    };
    load(0);
    while (i < p.share) {
        int now = t0;
        bf16 *mine = queries + turn * BACK_QUERIES * W, *its = douts + turn * BACK_QUERIES * W;
        next_queries(p, b, j0, BACK_KEYS, &i, &t0);
        if (STAGES == 2 && i < p.share) load(turn ^ 1);
        if (STAGES == 2 && i >= p.share) cp_async_commit();
        cp_async_wait<STAGES - 1>();
        __syncthreads();
        float z[1][BACK_QUERIES / 8][4], dz[1][BACK_QUERIES / 8][4];
        scores<1, BACK_QUERIES, W>(z, keys, row, mine);
        scores<1, BACK_QUERIES, W>(dz, values, row, its);
        bool masks = back_masks(facts[turn], p, j0, BACK_KEYS, now);
        raise_back_scores<0, BACK_QUERIES / 2>(z[0], facts[turn], p.scale * LOG2E);
        if (masks) hide_back_scores(z[0], facts[turn], p, j0 + row + lane / 4, now);
        take_back_gradients(dz[0], z[0], facts[turn]);
        accumulate<1, BACK_QUERIES, W>(sum_v, z, its);
        accumulate<1, BACK_QUERIES, W>(sum_k, dz, mine);
        __syncthreads();
        if (STAGES == 1 && i < p.share) load(0);
        turn = STAGES - 1 - turn;
    }
    store_sum<W>(keys, row, sum_k[0], p.scale, p.scale, p.P,
                 [&](int r) { return j0 + r < p.T ? dk.at(b, j0 + r, g) : (bf16 *)NULL; });
    store_sum<W>(keys, row, sum_v[0], 1, 1, p.P,
                 [&](int r) { return j0 + r < p.T ? dv.at(b, j0 + r, g) : (bf16 *)NULL; });
}

/* --- launches ----------------------------------------------------------------------------------------------------- */

void attention_mma_forward(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v,
                           struct attention_cache cache, const attention_problem &p) {
    operands x = operands_of(q, k, v, cache);
    if (attention_wgmma_forward(dev, o, lse, x, p)) return;
    with_padding(p.P, [&](auto width) {
        constexpr int W = width.value;
        size_t bytes = (QUERIES + 4 * KEYS) * W * sizeof(bf16);
        allow_shared(dev, mma_forward_kernel<W>, bytes, "attention");
        LAUNCH(dev, mma_forward_kernel<W>, grid_of(p, QUERIES, p.H), FORWARD_THREADS, bytes, attention_rows_of<bf16>(o),
               data_of<float>(lse), x, p);
    });
}

void attention_mma_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                            tensor q, tensor k, tensor v, struct attention_cache cache, const attention_problem &p,
                            float *delta) {
    operands x = operands_of(q, k, v, cache);
    if (attention_wgmma_backward(dev, dq, dk, dv, dout, o, lse, x, p, delta)) return;
    attention_rows<bf16> douts = attention_rows_of<bf16>(dout);
    const float *log_sums = data_of<float>(lse);
    LAUNCH(dev, mma_delta_kernel, (unsigned)ceil_div(p.B * p.T * p.H, 256 / WARP), 256, 0, delta, douts,
           attention_rows_of<bf16>(o), p);
    with_padding(p.P, [&](auto width) {
        constexpr int W = width.value;
        auto launch = [&](auto stages) {
            constexpr int STAGES = decltype(stages)::value;
            size_t of_dq = (2 * QUERIES + STAGES * 2 * KEYS) * W * sizeof(bf16);
            size_t of_dkv = (2 * BACK_KEYS + STAGES * 2 * BACK_QUERIES) * W * sizeof(bf16);
            allow_shared(dev, mma_dq_kernel<W, STAGES>, of_dq, "attention");
            allow_shared(dev, mma_dkv_kernel<W, STAGES>, of_dkv, "attention");
            LAUNCH(dev, (mma_dq_kernel<W, STAGES>), grid_of(p, QUERIES, p.H), BACK_THREADS, of_dq,
                   attention_rows_of<bf16>(dq), douts, delta, log_sums, x, p);
            LAUNCH(dev, (mma_dkv_kernel<W, STAGES>), grid_of(p, BACK_KEYS, p.G), BACK_THREADS, of_dkv,
                   attention_rows_of<bf16>(dk), attention_rows_of<bf16>(dv), douts, delta, log_sums, x, p);
        };
        if constexpr (W > 64) { /* 128 KB with two stages, 96 KB with one; and a little for the queries' facts */
            if (cuda_shared_most(dev) < 136 << 10) return launch(constant<1>());
        }
        launch(constant<2>());
    });
}
