/* tile.cuh: tiles of matrices in shared memory, as tensor cores and copies that don't wait want them, and sums over the
 * fragments and tokens of a warp: what the chunked operations (ssd_chunk*.cu, mlstm*.cu) share.
 */
#ifndef RIVERRUN_CUDA_TILE_CUH
#define RIVERRUN_CUDA_TILE_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

/* ROWS rows of W columns. 16 bytes, eight columns of bf16, stay together; in row r they are exchanged by r % 8, so that
 * the eight rows of a matrix that ldmatrix takes lie in different banks. */
template <int W, class T = __nv_bfloat16, int ROWS = 64> struct alignas(128) shared_tile {
    enum { PIECE = 16 / sizeof(T) };
    T v[ROWS * W];

    __device__ __forceinline__ static int offset(int row, int column) {
        return row * W + (((column / PIECE) ^ (row & 7)) * PIECE) + column % PIECE;
    }
    __device__ __forceinline__ T *at(int row, int column) {
        return v + offset(row, column);
    }
    /* Columns c and c + 1, c even, of bf16. */
    __device__ __forceinline__ uint32_t &pair(int row, int column) {
        return *reinterpret_cast<uint32_t *>(at(row, column));
    }
    /* From an offset on: so many rows, a multiple of 8, and columns, a multiple of 8 whose bits the offset's column
     * does not have: an addition that folds into the instruction, and one exclusive or for all rows. */
    __device__ __forceinline__ T *from(int offset, int rows, int columns) {
        return v + (offset ^ columns) + rows * W;
    }
};

/* Offsets of what a lane names to ldmatrix, for the four 8 x 8 matrices of 16 rows and 16 columns from a place on, in
 * the two orders that fragments need (mma.cuh):
 *   down, then right: a of a tile that is m x k (ldmatrix), two b of one that is k x n (transposed)
 *   right, then down: a of a tile that is k x m (transposed), two b of one that is n x k (ldmatrix) */
template <int W> __device__ __forceinline__ int down_right(int row, int column, int lane) {
    return shared_tile<W>::offset(row + lane % 16, column + 8 * (lane / 16));
}

template <int W> __device__ __forceinline__ int right_down(int row, int column, int lane) {
    return shared_tile<W>::offset(row + lane % 8 + 8 * (lane / 16), column + 8 * (lane / 8 % 2));
}

/* Sixteen columns: d, d_next += a b, with b two fragments next to each other. */
__device__ __forceinline__ void mma_two(float (&d)[4], float (&d_next)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[4]) {
    uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_bf16_m16n8k16(d, a, first);
    mma_bf16_m16n8k16(d_next, a, second);
}

/* The rows and columns that exist from `from` on into a tile, zeros beyond them; aligned: every row, and what is behind
 * its last column, starts at 16 bytes. To be waited for with cp_async_wait, and behind a barrier. */
template <int THREADS, int W, class T, int ROWS>
__device__ __forceinline__ void tile_fill(shared_tile<W, T, ROWS> &tile, const T *from, int64_t step, int rows,
                                          int columns, bool aligned) {
    enum { PIECE = shared_tile<W, T, ROWS>::PIECE, ACROSS = W / PIECE, DOWN = THREADS / ACROSS };
    static_assert(THREADS % ACROSS == 0 && ROWS % DOWN == 0, "every thread has as many rows of one piece");
    int r = threadIdx.x / ACROSS, c = threadIdx.x % ACROSS * PIECE;
    from += r * step + c;
    rows = c < columns ? rows - r : 0;
    if (aligned) {
        T *place = tile.at(r, c);
#pragma unroll
        for (int k = 0; k < ROWS; k += DOWN, from += DOWN * step)
            cp_async_16_or_zeros(DOWN % 8 == 0 ? place + k * W : tile.at(r + k, c), from, k < rows);
        return;
    }
#pragma unroll 1 /* seldom: little code */
    for (int k = 0; k < ROWS; k += DOWN, from += DOWN * step) {
        pack<T, PIECE> piece;
        for (int i = 0; i < PIECE; i++) piece.v[i] = k < rows && c + i < columns ? from[i] : from_float<T>(0.0f);
        *reinterpret_cast<pack<T, PIECE> *>(tile.at(r + k, c)) = piece;
    }
}

__device__ __forceinline__ float2 two_at(const float *from, int i) {
    return *reinterpret_cast<const float2 *>(from + i);
}

/* Two accumulators of a warp, rows g and g + 8, as one row of 16 bf16: lanes in pairs exchange halves, so that each has
 * four neighbours of one row, which start at this column. */
__device__ __forceinline__ int row_of_16_column(int lane) {
    return 8 * (lane & 1) + 4 * (lane >> 1 & 1);
}

__device__ __forceinline__ uint2 row_of_16(uint32_t left, uint32_t right, int lane) {
    bool odd = lane & 1;
    uint32_t get = __shfl_xor_sync(FULL, odd ? left : right, 1);
    return odd ? make_uint2(get, right) : make_uint2(left, get);
}

/* 16 tokens and 16 columns of a part, from two accumulators. `at` is the lane's place, token lane / 4, column
 * row_of_16_column(lane), and goes on by 16 tokens; `tokens` and `columns` exist from there on. */
template <bool ALIGNED>
__device__ __forceinline__ void rows_store(__nv_bfloat16 *&at, int64_t step, int tokens, int columns,
                                           const float (&left)[4], const float (&right)[4], int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++, at += 8 * step) {
        uint32_t pair = pack_bf16(left[2 * h], left[2 * h + 1]), next = pack_bf16(right[2 * h], right[2 * h + 1]);
        uint2 four = row_of_16(pair, next, lane);
        if (8 * h >= tokens || columns <= 0) continue;
        if (ALIGNED) {
            *reinterpret_cast<uint2 *>(at) = four;
        } else {
            const float v[4] = {low_bf16(four.x), high_bf16(four.x), low_bf16(four.y), high_bf16(four.y)};
            for (int k = 0; k < 4 && k < columns; k++) at[k] = __float2bfloat16_rn(v[k]);
        }
    }
}

/* The warp of a block, so that the compiler knows all its lanes to agree. */
__device__ __forceinline__ int warp_of_block() {
    return __shfl_sync(FULL, (int)threadIdx.x / WARP, 0);
}

/* --- sums --------------------------------------------------------------------------------------------------------- */

/* Over the lanes of the same row of an accumulator. */
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(FULL, v, 1);
    return v + __shfl_xor_sync(FULL, v, 2);
}

/* Over the lanes of the same column of an accumulator. */
__device__ __forceinline__ float column_sum(float v) {
    v += __shfl_xor_sync(FULL, v, 4);
    v += __shfl_xor_sync(FULL, v, 8);
    return v + __shfl_xor_sync(FULL, v, 16);
}

/* Of each lane's sum over its first tokens of a run: with all that follow in the same run. `on` says whether that run
 * goes on behind the lane. */
__device__ __forceinline__ float sum_behind(float sum, bool on, int lane) {
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        float more = __shfl_down_sync(FULL, sum, offset);
        bool further = __shfl_down_sync(FULL, (int)on, offset);
        if (on && lane + offset < WARP) sum += more;
        on = on && further && lane + offset < WARP;
    }
    return sum;
}

__device__ __forceinline__ float sum_before(float sum, int lane) {
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        float more = __shfl_up_sync(FULL, sum, offset);
        if (lane >= offset) sum += more;
    }
    return sum;
}

/* --- walks over chunks -------------------------------------------------------------------------------------------- */

/* How many of a walk's `count` chunks leave nothing at its end, 2^-100 or less, so that its sum may begin behind them:
 * long before the end, or before a document that starts on the way. pass(k): how much of a state passes the k-th. Every
 * warp finds the same. */
template <class F> __device__ __forceinline__ int chunks_without_trace(int count, int lane, F pass) {
    const float nothing = 0x1p-100f;
    float behind = 1;
    for (int end = count; end > 0; end -= WARP) {
        int k = end - WARP + lane;
        float product = k >= 0 ? pass(k) : 1.0f; /* of chunks from k on */
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            float more = __shfl_down_sync(FULL, product, offset);
            if (lane + offset < WARP) product *= more;
        }
        float after = __shfl_down_sync(FULL, product, 1);
        unsigned lost = __ballot_sync(FULL, k >= 0 && behind * (lane < WARP - 1 ? after : 1.0f) < nothing);
        if (lost) return end - __clz(lost);
        behind *= __shfl_sync(FULL, product, 0);
    }
    return 0;
}

#endif
