/* attention_tensor.cuh: what files for tensor cores share (attention_mma.cu, attention_wgmma.cu, rat_mma.cu): tiles
 * in shared memory, the softmax of scores that lie in accumulators, sums on their way out. attention.cu has the
 * mathematics. */
#ifndef RIVERRUN_CUDA_ATTENTION_TENSOR_CUH
#define RIVERRUN_CUDA_ATTENTION_TENSOR_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/shared.cuh"

#include <math.h>

typedef __nv_bfloat16 bf16;

enum {
    QUERIES = 128,     /* of a block, forward and dq */
    KEYS = 64,         /* of a tile there */
    BACK_QUERIES = 64, /* of a tile of dk and dv */
    BACK_THREADS = 256,
};

/* --- tiles -------------------------------------------------------------------------------------------------------- */

/* Offset in a tile of rows of W: eight columns stay together, and are exchanged by the row's last three bits, so that
 * the eight rows that ldmatrix takes at once lie in different banks. */
template <int W> __device__ __forceinline__ int place(int row, int column) {
    return row * W + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
}

/* `rows` rows into a tile, row i from from(i), zeros where that is NULL and beyond P columns. To be waited for. */
template <int THREADS, int W, class F> __device__ __forceinline__ void load_tile(bf16 *tile, int rows, int P, F from) {
    constexpr int PIECES = W / 8;
    for (int i = threadIdx.x; i < rows * PIECES; i += THREADS) {
        int row = i / PIECES, column = i % PIECES * 8;
        const bf16 *source = from(row);
        bool there = source != NULL && column < P;
        cp_async_16_or_zeros(tile + place<W>(row, column), there ? source + column : NULL, there);
    }
}

/* The same of rows that lie `step` apart from `first` on, of which `there` exist: a thread's pieces are so many rows
 * apart that the exchange of columns is the same for all of them. `thread` is one of THREADS. */
template <int THREADS, int W, int ROWS>
__device__ __forceinline__ void load_rows(bf16 *tile, int P, const bf16 *first, int64_t step, int there,
                                          int thread = threadIdx.x) {
    constexpr int PIECES = W / 8, APART = THREADS / PIECES;
    static_assert(APART % 8 == 0 && ROWS % APART == 0, "whole rounds, and one place in the exchange");
    int row = thread / PIECES, column = thread % PIECES * 8;
    const bf16 *source = first + row * step + column;
    bf16 *target = tile + place<W>(row, column);
    if (column >= P) there = 0;
#pragma unroll
    for (int i = 0; i < ROWS; i += APART)
        cp_async_16_or_zeros(target + i * W, source + i * step, row + i < there);
}

struct operands {
    attention_rows<bf16> q, k, v, cache_k, cache_v;
};

/* What the columns of a tile of transposed scores need to know: their tokens' lse, deltas and places in documents. */
struct query_facts {
    alignas(16) float log_sum[BACK_QUERIES];
    float dot[BACK_QUERIES];
    int position[BACK_QUERIES];
};

/* Those of a lane's two columns of eight, 8 n on, lie side by side: one access of shared memory for both. */
__device__ __forceinline__ float2 two_facts(const float *facts, int n) {
    return *reinterpret_cast<const float2 *>(facts + 8 * n + threadIdx.x % 4 * 2);
}

__device__ __forceinline__ int2 two_facts(const int *facts, int n) {
    return *reinterpret_cast<const int2 *>(facts + 8 * n + threadIdx.x % 4 * 2);
}

__device__ __forceinline__ void load_facts(query_facts *facts, const float *delta, const float *lse,
                                           const attention_problem &p, int64_t b, int h, int t0) {
    if (threadIdx.x >= BACK_QUERIES) return;
    int i = threadIdx.x;
    bool exists = t0 + i < p.T;
    facts->log_sum[i] = exists ? lse[(b * p.H + h) * p.T + t0 + i] : 0.0f;
    facts->dot[i] = exists ? delta[(b * p.H + h) * p.T + t0 + i] : 0.0f;
    facts->position[i] = !exists ? 0 : p.positions ? p.positions[b * p.T + t0 + i] : t0 + i;
}

/* The tile of queries behind (i, t0): the i-th head that reads the block's `keys` keys, from token t0 on. A head's
 * last is followed by the next head's first, the last head's last by i = share. */
__device__ __forceinline__ void next_queries(const attention_problem &p, int64_t b, int j0, int keys, int *i, int *t0) {
    *t0 += BACK_QUERIES;
    if (*t0 < p.T && first_key(p, b, *t0) < j0 + keys) return;
    *t0 = j0;
    *i += 1;
}

/* --- scores ------------------------------------------------------------------------------------------------------- */

/* The four lanes of a row of an accumulator. */
__device__ __forceinline__ float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(FULL, v, 1));
    return fmaxf(v, __shfl_xor_sync(FULL, v, 2));
}

__device__ __forceinline__ float row_sum(float v) {
    v += __shfl_xor_sync(FULL, v, 1);
    return v + __shfl_xor_sync(FULL, v, 2);
}

/* Scores of 16 M rows with a tile of keys become powers of two of them, under the running maximum; what has been summed
 * up is to be scaled to it, by `rest`. What is not to be seen is -INFINITY. Row r of a lane is lane / 4 + 8 r of the
 * rows. */
template <int M>
__device__ __forceinline__ void raise_scores(float (&z)[M][KEYS / 8][4], float (&rest)[2 * M], float (&high)[2 * M],
                                             float (&total)[2 * M], float scale) {
#pragma unroll
    for (int r = 0; r < 2 * M; r++) {
        int m = r / 2, half = r % 2 * 2;
        float now = high[r];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) now = fmaxf(now, fmaxf(z[m][n][half], z[m][n][half + 1]));
        now = row_max(now);
        float base = now == -INFINITY ? 0.0f : now * scale, added = 0;
        rest[r] = power_of_two(high[r] * scale - base);
        high[r] = now;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                z[m][n][half + i] = power_of_two(z[m][n][half + i] * scale - base);
                added += z[m][n][half + i];
            }
        }
        total[r] = total[r] * rest[r] + added; /* of this lane's columns */
    }
}

template <int M, int W>
__device__ __forceinline__ void scale_sums(float (&sum)[M][W / 8][4], const float (&rest)[2 * M]) {
#pragma unroll
    for (int r = 0; r < 2 * M; r++) {
#pragma unroll
        for (int n = 0; n < W / 8; n++) sum[r / 2][n][r % 2 * 2] *= rest[r], sum[r / 2][n][r % 2 * 2 + 1] *= rest[r];
    }
}

/* Both. */
template <int M, int W>
__device__ __forceinline__ void sum_scores(float (&z)[M][KEYS / 8][4], float (&sum)[M][W / 8][4], float (&high)[2 * M],
                                           float (&total)[2 * M], float scale) {
    float rest[2 * M];
    raise_scores<M>(z, rest, high, total, scale);
    scale_sums<M, W>(sum, rest);
}

/* A lane's row r is token t + 8 r, which sees keys from first[r] on up to its own. */
template <int M>
__device__ __forceinline__ void hide_scores(float (&z)[M][KEYS / 8][4], const int (&first)[2 * M], int t, int j0) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < M * KEYS / 2; i++) {
        int m = i / (KEYS / 2), n = i / 4 % (KEYS / 8), r = 2 * m + i / 2 % 2;
        int j = j0 + 8 * n + 2 * (lane % 4) + i % 2;
        if (j < first[r] || j > t + 8 * r) z[m][n][i % 4] = -INFINITY;
    }
}

/* How many keys before its own the token at a position sees; those before the row are none. */
__device__ __forceinline__ int seen_before(const attention_problem &p, int position) {
    return min(position, (int)p.window - 1);
}

/* Is there anything in a tile of queries t0 .. and `keys` keys j0 .. that is not seen? First keys never decrease, so
 * the last query's decides; beyond the row, where rows are zeros and add nothing, it sees less than those before. */
__device__ __forceinline__ bool back_masks(const query_facts &facts, const attention_problem &p, int j0, int keys,
                                           int t0) {
    int last = BACK_QUERIES - 1;
    return t0 < j0 + keys - 1 || t0 + last - seen_before(p, facts.position[last]) > j0;
}

/* Transposed scores of a warp's 16 keys with a tile of queries become probabilities: COUNT of a lane's from FROM on. */
template <int FROM, int COUNT>
__device__ __forceinline__ void raise_back_scores(float (&z)[BACK_QUERIES / 8][4], const query_facts &facts,
                                                  float scale) {
#pragma unroll
    for (int n = FROM / 4; n < (FROM + COUNT) / 4; n++) {
        float2 log_sum = two_facts(facts.log_sum, n);
        float log2_sum[2] = {log_sum.x * LOG2E, log_sum.y * LOG2E};
#pragma unroll
        for (int i = 0; i < 4; i++) z[n][i] = power_of_two(z[n][i] * scale - log2_sum[i % 2]);
    }
}

/* ... of which some are not seen; j: the lane's first key, t0: the first query. */
__device__ __forceinline__ void hide_back_scores(float (&z)[BACK_QUERIES / 8][4], const query_facts &facts,
                                                 const attention_problem &p, int j, int t0) {
    int before = t0 + threadIdx.x % 4 * 2 - j; /* so far lies the key before the lane's first query */
#pragma unroll
    for (int n = 0; n < BACK_QUERIES / 8; n++) {
        int2 position = two_facts(facts.position, n);
        int seen[2] = {seen_before(p, position.x), seen_before(p, position.y)};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if ((unsigned)(before + 8 * n + i % 2 - i / 2 * 8) > (unsigned)seen[i % 2]) z[n][i] = 0.0f;
    }
}

/* ... and what the values gave becomes their gradients. */
__device__ __forceinline__ void take_back_gradients(float (&dz)[BACK_QUERIES / 8][4],
                                                    const float (&z)[BACK_QUERIES / 8][4],
                                                    const query_facts &facts) {
#pragma unroll
    for (int n = 0; n < BACK_QUERIES / 8; n++) {
        float2 dot = two_facts(facts.dot, n);
#pragma unroll
        for (int i = 0; i < 4; i++) dz[n][i] = z[n][i] * (dz[n][i] - (i % 2 ? dot.y : dot.x));
    }
}

/* Sixteen rows and columns of an accumulator, 16 k on, rounded: mma's first operand. */
template <int N> __device__ __forceinline__ void pack_scores(uint32_t (&a)[4], const float (&z)[N][4], int k) {
    a[0] = pack_bf16(z[2 * k][0], z[2 * k][1]);
    a[1] = pack_bf16(z[2 * k][2], z[2 * k][3]);
    a[2] = pack_bf16(z[2 * k + 1][0], z[2 * k + 1][1]);
    a[3] = pack_bf16(z[2 * k + 1][2], z[2 * k + 1][3]);
}

/* 16 rows of a warp's sum, times a factor for the upper and the lower eight, into rows `row` .. of a tile. */
template <int W>
__device__ __forceinline__ void place_sum(bf16 *tile, int row, const float (&sum)[W / 8][4], float upper, float lower) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < W / 8; n++) {
        int column = 8 * n + 2 * (lane % 4);
        *reinterpret_cast<uint32_t *>(tile + place<W>(row + lane / 4, column)) =
            pack_bf16(sum[n][0] * upper, sum[n][1] * upper);
        *reinterpret_cast<uint32_t *>(tile + place<W>(row + lane / 4 + 8, column)) =
            pack_bf16(sum[n][2] * lower, sum[n][3] * lower);
    }
    __syncwarp();
}

/* The same through rows of a tile that only this warp uses by now, to where to(i) says for row i; NULL: nowhere. */
template <int W, class F>
__device__ __forceinline__ void store_sum(bf16 *tile, int row, const float (&sum)[W / 8][4], float upper, float lower,
                                          int P, F to) {
    place_sum<W>(tile, row, sum, upper, lower);
    for (int i = threadIdx.x % WARP; i < 16 * (W / 8); i += WARP) {
        int r = i / (W / 8), column = i % (W / 8) * 8;
        bf16 *target = to(row + r);
        if (target && column < P)
            *reinterpret_cast<uint4 *>(target + column) = *reinterpret_cast<uint4 *>(tile + place<W>(row + r, column));
    }
    __syncwarp();
}

/* --- for the host ------------------------------------------------------------------------------------------------- */

static inline operands operands_of(tensor q, tensor k, tensor v, struct attention_cache cache) {
    return {attention_rows_of<bf16>(q), attention_rows_of<bf16>(k), attention_rows_of<bf16>(v),
            attention_rows_of<bf16>(cache.k), attention_rows_of<bf16>(cache.v)};
}

static inline dim3 grid_of(const attention_problem &p, int tokens, int heads) {
    return dim3((unsigned)ceil_div(p.T, tokens), (unsigned)heads, (unsigned)p.B);
}

/* Hopper's products for groups of warps: no cache. False: they don't serve. (attention_wgmma.cu) */
bool attention_wgmma_forward(struct device *dev, tensor o, tensor lse, const operands &x, const attention_problem &p);
bool attention_wgmma_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                              const operands &x, const attention_problem &p, float *delta);

#endif
