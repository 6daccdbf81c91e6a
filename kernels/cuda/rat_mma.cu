/* rat_mma.cu: RAT's attention over the ends of chunks on tensor cores: bf16, heads of a multiple of 8 channels up to
 * 128. rat.cu has the mathematics, rat_walk.cu what comes before and after, attention_mma.cuh the tiles.
 *
 * Rows are tokens, columns the ends of their row: token t sees ends first .. before last, which never decrease along
 * the row, so that of the tiles of 64 ends only a first and a last one need a mask. The softmax begins with the
 * token's own state, already seen: its maximum is the own score, its sum 1, what is summed up v~. Nothing is to be
 * merged, and a token that sees no end needs no case of its own.
 *
 * forward   a block has 128 tokens of a head and four warps of 32; ends in tiles, the next on its way. Writes o, lse
 *           and the gated y.
 * dq        a block has 64 tokens of all heads of a group, which have the query in common, and adds over these in
 *           registers; four warps of 16; the next tile, of the next head too, is on its way.
 * dk, dv    a block has 64 ends of a head and walks over the tokens that see them, scores transposed.
 * Scores are made twice on the way back, so that every sum belongs to one warp: nothing is added atomically.
 *
 * 2 B H T (T / Q) P FLOPs forward, 3.5 times as many backward, and a power of two for each score. With 16 heads of 128
 * and Q = 16: 17 GFLOP at B 4, T 4096, of which little is felt beside 10D bytes a token forward (0.33 GB, 0.11 ms at
 * 3 TB/s) and 6D backward; 4.4 TFLOP at T 131,072, where these kernels, at 200 to 250 TFLOP/s, would take 20 ms and
 * 75 ms back: long rows are rat_fold.cu's where they can be. */
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/rat.cuh"

enum {
    TOKENS = 128,     /* of a block, forward */
    ENDS = 64,        /* of a tile, and of a block of dk and dv */
    BACK_TOKENS = 64, /* of a block of dq, and of a tile of dk and dv */
    THREADS = 128,
};

/* Turned keys and values of the ends e0 .. before `last`, ENDS rows of keys and then of values. */
template <int W>
__device__ __forceinline__ void load_ends(bf16 *tiles, const rat_operands<bf16> &x, const rat_arrays &a,
                                          const rat_problem &p, int64_t b, int h, int e0, int last) {
    int64_t step = (int64_t)p.H * p.P;
    if (e0 >= 0) {
        int64_t from = ((b * p.E + e0) * p.H + h) * p.P;
        load_rows<THREADS, W, ENDS>(tiles, p.P, a.end_keys + from, step, last - e0);
        load_rows<THREADS, W, ENDS>(tiles + ENDS * W, p.P, a.end_values + from, step, last - e0);
        return;
    }
    int closed = p.count[b] / p.Q, slots = (int)p.C;
    auto end_of = [&](int i, const bf16 *ends, const attention_rows<bf16> &state) {
        int e = e0 + i;
        if (e >= last) return (const bf16 *)NULL;
        return e < 0 ? state.at(b, (closed + e) % slots, h) : ends + ((b * p.E + e) * p.H + h) * p.P;
    };
    load_tile<THREADS, W>(tiles, ENDS, p.P, [&](int i) { return end_of(i, a.end_keys, x.state_k); });
    load_tile<THREADS, W>(tiles + ENDS * W, ENDS, p.P, [&](int i) { return end_of(i, a.end_values, x.state_v); });
}

/* Rows of one of the arrays by token: heads of it are `heads`. */
template <int W, int ROWS>
__device__ __forceinline__ void load_tokens(bf16 *tile, const bf16 *array, const rat_problem &p, int64_t b, int t0,
                                            int h, int heads) {
    load_rows<THREADS, W, ROWS>(tile, p.P, array + ((b * p.T + t0) * heads + h) * p.P, (int64_t)heads * p.P,
                                (int)at_most(ROWS, p.T - t0));
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

/* A warp's 32 rows of a tile in the layout of an accumulator. */
template <int W> __device__ __forceinline__ void take_rows(float (&sum)[2][W / 8][4], const bf16 *tile, int row) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < W / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int r = row + 16 * m + 8 * i + lane / 4;
                uint32_t pair = *reinterpret_cast<const uint32_t *>(tile + place<W>(r, 8 * n + 2 * (lane % 4)));
                sum[m][n][2 * i] = low_bf16(pair), sum[m][n][2 * i + 1] = high_bf16(pair);
            }
}

/* o and the gated y of 16 rows of a warp, which are rows `row` .. of a tile that is the warp's own by now. */
template <int W>
__device__ __forceinline__ void store_gated(bf16 *tile, int row, const float (&sum)[W / 8][4], float upper, float lower,
                                            attention_rows<bf16> y, bf16 *o, const attention_rows<bf16> &z,
                                            const rat_problem &p, int64_t b, int t0, int h) {
    place_sum<W>(tile, row, sum, upper, lower);
    for (int i = threadIdx.x % WARP; i < 16 * (W / 8); i += WARP) {
        int r = row + i / (W / 8), column = i % (W / 8) * 8;
        if (t0 + r >= p.T || column >= p.P) continue;
        const bf16 *mine = tile + place<W>(r, column);
        float value[8], gate[8];
        load_floats<8>(value, mine);
        load_floats<8>(gate, z.at(b, t0 + r, h) + column);
        if (o)
            *reinterpret_cast<uint4 *>(o + place_of(p, b, t0 + r, h) + column) = *reinterpret_cast<const uint4 *>(mine);
#pragma unroll
        for (int k = 0; k < 8; k++) value[k] *= sigmoid_of(gate[k]);
        store_floats<8>(y.at(b, t0 + r, h) + column, value);
    }
    __syncwarp();
}

/* Scores of tokens t + 8 r with the ends e0 .. that they don't see become nothing. */
__device__ __forceinline__ void mask_rows(float (&z)[2][ENDS / 8][4], const rat_problem &p, int64_t b, int t, int e0) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int64_t token = at_most(t + 8 * r, p.T - 1);
        int first = first_end(p, b, token), last = last_end(p, b, token);
#pragma unroll
        for (int i = 0; i < ENDS / 4; i++) {
            int e = e0 + i / 2 * 8 + 2 * (lane % 4) + i % 2;
            if (e < first || e >= last) z[r / 2][i / 2][r % 2 * 2 + i % 2] = -INFINITY;
        }
    }
}

/* Block (tokens, head, row); those that see the most begin first. */
template <int W>
__global__ void __launch_bounds__(THREADS)
rat_mma_forward_kernel(attention_rows<bf16> y, bf16 *o, float *lse, rat_operands<bf16> x, rat_arrays a,
                       __grid_constant__ const rat_problem p) {
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = memory, *tiles = queries + TOKENS * W;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, t0 = (int)(gridDim.x - 1 - blockIdx.x) * TOKENS, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * 32, t = t0 + row + lane / 4, last_token = (int)p.T - 1;
    int start = first_end(p, b, t0), last = last_end(p, b, at_most(t0 + TOKENS - 1, last_token));
    int top = (int)at_most(t0 + row, last_token), bottom = (int)at_most(t0 + row + 31, last_token);
    int warp_first = first_end(p, b, top), full_first = first_end(p, b, bottom);
    int full_last = last_end(p, b, top), warp_last = last_end(p, b, bottom);
    float high[4], total[4], sum[2][W / 8][4];
    load_tokens<W, TOKENS>(queries, a.queries, p, b, t0, h % p.G, a.query_heads);
    load_tokens<W, TOKENS>(tiles + 2 * ENDS * W, a.values, p, b, t0, h, p.H); /* where the second tiles will be */
    cp_async_commit();
    if (start < last) load_ends<W>(tiles, x, a, p, b, h, start, last);
    cp_async_commit();
    for (int r = 0; r < 4; r++) {
        high[r] = a.own[(b * p.H + h) * p.T + at_most(t + 8 * r, last_token)];
        total[r] = lane % 4 == 0 ? 1.0f : 0.0f;
    }
    cp_async_wait<1>();
    __syncthreads();
    take_rows<W>(sum, tiles + 2 * ENDS * W, row);
    __syncthreads();
    for (int e0 = start, turn = 0; e0 < last; e0 += ENDS, turn ^= 1) {
        const bf16 *keys = tiles + turn * 2 * ENDS * W;
        if (e0 + ENDS < last) load_ends<W>(tiles + (turn ^ 1) * 2 * ENDS * W, x, a, p, b, h, e0 + ENDS, last);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        if (t0 + row < p.T && e0 < warp_last && e0 + ENDS > warp_first) {
            float z[2][ENDS / 8][4];
            bool masks = e0 < full_first || e0 + ENDS > full_last;
            scores<2, ENDS, W>(z, queries, row, keys);
            if (masks) mask_rows(z, p, b, t, e0);
            sum_scores<2, W>(z, sum, high, total, p.scale * LOG2E);
            accumulate<2, ENDS, W>(sum, z, keys + ENDS * W);
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    for (int r = 0; r < 4; r++) {
        total[r] = row_sum(total[r]);
        if (lse && lane % 4 == 0 && t + 8 * r < p.T)
            lse[(b * p.H + h) * p.T + t + 8 * r] = high[r] * p.scale + logf(total[r]);
        total[r] = 1.0f / total[r];
    }
    store_gated<W>(queries, row, sum[0], total[0], total[1], y, o, x.z, p, b, t0, h);
    store_gated<W>(queries, row + 16, sum[1], total[2], total[3], y, o, x.z, p, b, t0, h);
}

/* --- dq ----------------------------------------------------------------------------------------------------------- */

/* What a lane knows of its two rows of a head. */
struct row_facts {
    float log_sum[2], dot[2];
};

__device__ __forceinline__ row_facts read_facts(const rat_arrays &a, const rat_problem &p, int64_t b, int t, int h) {
    row_facts f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int64_t at = (b * p.H + h) * p.T + at_most(t + 8 * r, p.T - 1);
        f.log_sum[r] = a.log_sum[at];
        f.dot[r] = a.delta[at];
    }
    return f;
}

/* Block (tokens, group, row). STAGES: places for a tile. With two the next tile is on its way meanwhile; one is for
 * chips that give a block less shared memory. */
template <int W, int STAGES>
__global__ void __launch_bounds__(THREADS)
rat_mma_dq_kernel(rat_operands<bf16> x, rat_arrays a, __grid_constant__ const rat_problem p) {
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = memory, *douts = queries + BACK_TOKENS * W, *tiles = douts + STAGES * BACK_TOKENS * W;
    int64_t b = blockIdx.z;
    int group = blockIdx.y, share = p.H / p.G, t0 = (int)(gridDim.x - 1 - blockIdx.x) * BACK_TOKENS;
    int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16, t = t0 + row + lane / 4, last_token = (int)p.T - 1;
    int start = first_end(p, b, t0), last = last_end(p, b, at_most(t0 + BACK_TOKENS - 1, last_token));
    int first[2], stop[2];
    float sum[1][W / 8][4] = {};
    for (int r = 0; r < 2; r++) { /* tokens beyond the row repeat its last, and go nowhere */
        first[r] = first_end(p, b, at_most(t + 8 * r, last_token));
        stop[r] = last_end(p, b, at_most(t + 8 * r, last_token));
    }
    int warp_first = first_end(p, b, at_most(t0 + row, last_token));
    int warp_last = last_end(p, b, at_most(t0 + row + 15, last_token));
    row_facts facts = read_facts(a, p, b, t, group), next_facts = facts;
    load_tokens<W, BACK_TOKENS>(queries, a.queries, p, b, t0, group, a.query_heads);
    load_tokens<W, BACK_TOKENS>(douts, a.dout, p, b, t0, group, p.H);
    if (start < last) load_ends<W>(tiles, x, a, p, b, group, start, last);
    cp_async_commit();
    for (int i = start < last ? 0 : share, e0 = start, turn = 0; i < share; turn = STAGES - 1 - turn) {
        int now = e0, head = i;
        e0 += ENDS;
        if (e0 >= last) e0 = start, i++;
        auto load_next = [&] {
            bf16 *to = tiles + (STAGES - 1 - turn) * 2 * ENDS * W;
            if (i < share) load_ends<W>(to, x, a, p, b, group + i * p.G, e0, last);
            if (i < share && i != head) {
                bf16 *its = douts + i % STAGES * BACK_TOKENS * W;
                load_tokens<W, BACK_TOKENS>(its, a.dout, p, b, t0, group + i * p.G, p.H);
                next_facts = read_facts(a, p, b, t, group + i * p.G);
            }
            cp_async_commit();
        };
        if (STAGES == 2) load_next();
        cp_async_wait<STAGES - 1>();
        __syncthreads();
        const bf16 *keys = tiles + turn * 2 * ENDS * W;
        if (now < warp_last && now + ENDS > warp_first) {
            float z[1][ENDS / 8][4], dz[1][ENDS / 8][4];
            scores<1, ENDS, W>(z, queries, row, keys);
            scores<1, ENDS, W>(dz, douts + head % STAGES * BACK_TOKENS * W, row, keys + ENDS * W);
#pragma unroll
            for (int n = 0; n < ENDS / 8; n++) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    int e = now + 8 * n + 2 * (lane % 4) + k % 2, r = k / 2;
                    bool sees = e >= first[r] && e < stop[r];
                    float part = power_of_two(z[0][n][k] * (p.scale * LOG2E) - facts.log_sum[r]);
                    dz[0][n][k] = sees ? part * (dz[0][n][k] - facts.dot[r]) : 0.0f;
                }
            }
            accumulate<1, ENDS, W>(sum, dz, keys);
        }
        __syncthreads();
        if (STAGES == 1) load_next();
        facts = next_facts;
    }
    cp_async_wait<0>();
    __syncthreads();
    store_sum<W>(queries, row, sum[0], p.scale, p.scale, p.P, [&](int i) {
        return t0 + i < p.T ? a.dqueries + ((b * p.T + t0 + i) * p.G + group) * p.P : (bf16 *)NULL;
    });
}

/* --- dk and dv ---------------------------------------------------------------------------------------------------- */

/* The token behind the last that sees end e of row b. */
__device__ __forceinline__ int seen_until(const rat_problem &p, int64_t b, int e) {
    int low = end_at(p, b, e) + 1, high = (int)p.T;
    if (!p.first) return high;
    while (low < high) {
        int middle = (low + high) / 2;
        if (p.first[b * p.T + middle] > e) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* What the columns of a tile of transposed scores need to know. */
struct token_facts {
    float log_sum[BACK_TOKENS], dot[BACK_TOKENS];
};

/* Queries and do of tokens t0 .., queries first; tokens beyond the row are zeros, and give nothing. */
template <int W>
__device__ __forceinline__ void load_seers(bf16 *tiles, token_facts *facts, const rat_arrays &a, const rat_problem &p,
                                           int64_t b, int t0, int h) {
    load_tokens<W, BACK_TOKENS>(tiles, a.queries, p, b, t0, h % p.G, a.query_heads);
    load_tokens<W, BACK_TOKENS>(tiles + BACK_TOKENS * W, a.dout, p, b, t0, h, p.H);
    int i = threadIdx.x % BACK_TOKENS;
    const float *from = (threadIdx.x < BACK_TOKENS ? a.log_sum : a.delta) + (b * p.H + h) * p.T;
    float *to = threadIdx.x < BACK_TOKENS ? facts->log_sum : facts->dot;
    bool there = t0 + i < p.T;
    cp_async<4>(to + i, there ? from + t0 + i : from, there ? 4 : 0);
    cp_async_commit();
}

/* Block (ends, head, row). */
template <int W>
__global__ void __launch_bounds__(THREADS)
rat_mma_dkv_kernel(rat_operands<bf16> x, rat_arrays a, __grid_constant__ const rat_problem p) {
    DYNAMIC_SHARED(bf16, memory);
    __shared__ token_facts facts[2];
    bf16 *keys = memory, *values = keys + ENDS * W, *tiles = values + ENDS * W;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, e0 = blockIdx.x * ENDS, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16;
    int count = ends_of(p, b), last = (int)at_most(e0 + ENDS, count), from[2], until[2];
    if (e0 >= count) return;
    float sum_k[1][W / 8][4] = {}, sum_v[1][W / 8][4] = {};
    for (int r = 0; r < 2; r++) {
        int e = (int)at_most(e0 + row + lane / 4 + 8 * r, count - 1);
        from[r] = end_at(p, b, e) + 1;
        until[r] = seen_until(p, b, e);
    }
    int first_token = end_at(p, b, e0) + 1, stop = seen_until(p, b, last - 1);
    int full_from = end_at(p, b, last - 1) + 1, full_until = seen_until(p, b, e0);
    load_ends<W>(keys, x, a, p, b, h, e0, last);
    if (first_token < stop) load_seers<W>(tiles, &facts[0], a, p, b, first_token, h);
    else cp_async_commit(); /* nobody sees these ends: their tile is waited for all the same, before sums go there */
    for (int t0 = first_token, turn = 0; t0 < stop; t0 += BACK_TOKENS, turn ^= 1) {
        const bf16 *mine = tiles + turn * 2 * BACK_TOKENS * W, *its = mine + BACK_TOKENS * W;
        if (t0 + BACK_TOKENS < stop)
            load_seers<W>(tiles + (turn ^ 1) * 2 * BACK_TOKENS * W, &facts[turn ^ 1], a, p, b, t0 + BACK_TOKENS, h);
        else cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        float z[1][BACK_TOKENS / 8][4], dz[1][BACK_TOKENS / 8][4];
        scores<1, BACK_TOKENS, W>(z, keys, row, mine);
        scores<1, BACK_TOKENS, W>(dz, values, row, its);
        bool masks = t0 < full_from || t0 + BACK_TOKENS > full_until;
#pragma unroll
        for (int n = 0; n < BACK_TOKENS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int c = 8 * n + 2 * (lane % 4) + i % 2, r = i / 2;
                bool sees = !masks || (t0 + c >= from[r] && t0 + c < until[r]);
                float part = power_of_two(z[0][n][i] * (p.scale * LOG2E) - facts[turn].log_sum[c]);
                z[0][n][i] = sees ? part : 0.0f;
                dz[0][n][i] = z[0][n][i] * (dz[0][n][i] - facts[turn].dot[c]);
            }
        }
        accumulate<1, BACK_TOKENS, W>(sum_v, z, its);
        accumulate<1, BACK_TOKENS, W>(sum_k, dz, mine);
        __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();
    auto row_of = [&](bf16 *ends, int i) {
        return e0 + i < last ? ends + ((b * p.E + e0 + i) * p.H + h) * p.P : (bf16 *)NULL;
    };
    store_sum<W>(keys, row, sum_k[0], p.scale, p.scale, p.P, [&](int i) { return row_of(a.dend_keys, i); });
    store_sum<W>(keys, row, sum_v[0], 1, 1, p.P, [&](int i) { return row_of(a.dend_values, i); });
}

/* --- launches ----------------------------------------------------------------------------------------------------- */

static dim3 grid_of(const rat_problem &p, int64_t rows, int tile, int heads) {
    return dim3((unsigned)ceil_div(rows, tile), (unsigned)heads, (unsigned)p.B);
}

void rat_mma_forward(struct device *dev, attention_rows<bf16> y, bf16 *o, float *lse, const rat_operands<bf16> &x,
                     const rat_arrays &a, const rat_problem &p) {
    with_padding(p.P, [&](auto width) {
        constexpr int W = width.value;
        size_t bytes = (TOKENS + 4 * ENDS) * W * sizeof(bf16);
        allow_shared(dev, rat_mma_forward_kernel<W>, bytes, "rat");
        LAUNCH(dev, rat_mma_forward_kernel<W>, grid_of(p, p.T, TOKENS, p.H), THREADS, bytes, y, o, lse, x, a, p);
    });
}

void rat_mma_backward(struct device *dev, const rat_operands<bf16> &x, const rat_arrays &a, const rat_problem &p) {
    with_padding(p.P, [&](auto width) {
        constexpr int W = width.value;
        size_t of_dkv = (2 * ENDS + 4 * BACK_TOKENS) * W * sizeof(bf16);
        allow_shared(dev, rat_mma_dkv_kernel<W>, of_dkv, "rat");
        auto launch_dq = [&](auto stages) {
            constexpr int STAGES = decltype(stages)::value;
            size_t of_dq = ((1 + STAGES) * BACK_TOKENS + STAGES * 2 * ENDS) * W * sizeof(bf16);
            allow_shared(dev, rat_mma_dq_kernel<W, STAGES>, of_dq, "rat");
            LAUNCH(dev, (rat_mma_dq_kernel<W, STAGES>), grid_of(p, p.T, BACK_TOKENS, p.G), THREADS, of_dq, x, a, p);
        };
        if (W == 64 || cuda_shared_most(dev) >= 112 << 10) launch_dq(constant<2>());
        else launch_dq(constant<W == 64 ? 2 : 1>()); /* 112 KB with two stages, 80 KB with one */
        LAUNCH(dev, rat_mma_dkv_kernel<W>, grid_of(p, p.E, ENDS, p.H), THREADS, of_dkv, x, a, p);
    });
}
