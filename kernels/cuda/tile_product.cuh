/* tile_product.cuh: products of matrices that a block of four warps makes tile by tile: 128 x 128 accumulators in fp32,
 * 64 x 64 of them in each warp, from operands that come through shared memory in stages.
 *
 * A step of a product goes DEPTH along what is summed over: 64 of bf16, 32 of fp32, 128 bytes. Each operand of a step
 * is 16 KB, in one of two forms: flat (128 rows of DEPTH columns: memory has rows of what is not summed over) or deep
 * (DEPTH rows of 128 columns). In bf16 the products are made by tensor cores, in fp32 by ordinary ones, element by
 * element where the tensor cores' accumulators would lie, so that all else is written once for both.
 *
 * A warp and step of bf16: 128 products m16n8k16, 32 loads of fragments by ldmatrix (16 KB): at the 2,650 FLOP a clock
 * that a multiprocessor of sm_90 reaches with mma, 790 clocks for a block's step, of which shared memory is busy 512.
 */
#ifndef RIVERRUN_CUDA_TILE_PRODUCT_CUH
#define RIVERRUN_CUDA_TILE_PRODUCT_CUH

#include "kernels/cuda/tile.cuh"

enum { PRODUCT = 128, PRODUCT_THREADS = 128, PRODUCT_SIDE = 16384 /* bytes */ };

template <class T> struct product_shape {
    enum {
        DEPTH = 128 / sizeof(T),
        STEPS = PRODUCT / DEPTH,                         /* of a product over 128 */
        PARTS = PRODUCT * PRODUCT * sizeof(T) / (2 * PRODUCT_SIDE), /* stages that a whole matrix of 128 x 128 takes */
        PART_ROWS = PRODUCT / PARTS,
    };
    typedef shared_tile<DEPTH, T, PRODUCT> flat;
    typedef shared_tile<PRODUCT, T, DEPTH> deep;
    typedef shared_tile<PRODUCT, T, PART_ROWS> part;
};

/* The lower triangle of a matrix of 128 x 128, in three blocks of 64 x 64: both of the left columns, then that of the
 * right ones. */
template <class T> struct product_triangle {
    enum { BLOCK = PRODUCT / 2 };
    shared_tile<BLOCK, T, 3 * BLOCK> blocks;

    /* Column 0 of a row, for columns 0 .. 63, or column 64 for those from there on. */
    __device__ __forceinline__ T *from(int row, int column) {
        return blocks.v + (row + column / BLOCK * BLOCK) * BLOCK;
    }
    __device__ __forceinline__ T *at(int row, int column) {
        return blocks.at(row + column / BLOCK * BLOCK, column % BLOCK);
    }
};

template <class T> struct alignas(128) product_stage {
    typedef product_shape<T> shape;
    char sides[2][PRODUCT_SIDE];

    __device__ __forceinline__ typename shape::flat &flat(int side) {
        return *reinterpret_cast<typename shape::flat *>(sides[side]);
    }
    __device__ __forceinline__ typename shape::deep &deep(int side) {
        return *reinterpret_cast<typename shape::deep *>(sides[side]);
    }
    __device__ __forceinline__ typename shape::part &part() {
        return *reinterpret_cast<typename shape::part *>(sides[0]);
    }
};

/* Where a warp is in the 2 x 2, and a lane in its fragments. */
struct product_place {
    int lane, g, q, m0, n0; /* g = lane / 4, q = 2 (lane % 4); the warp's first row and column */
};

__device__ __forceinline__ product_place product_place_of() {
    int lane = threadIdx.x % WARP, warp = warp_of_block();
    return {lane, lane / 4, lane % 4 * 2, warp / 2 * 64, warp % 2 * 64};
}

/* Element e of v[i][n]: row m0 + 16 i + g + 8 (e / 2), column n0 + 8 n + q + e % 2. */
struct product_sums {
    float v[4][8][4];

    template <class F> __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) f(v[i][n][e]);
    }
    __device__ __forceinline__ void clear() {
        each([](float &sum) { sum = 0.0f; });
    }
    __device__ __forceinline__ void scale(float by) {
        each([=](float &sum) { sum *= by; });
    }
    /* Every row by its own factor. */
    template <class F> __device__ __forceinline__ void scale_rows(const product_place &at, F factor) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float by = factor(at.m0 + 16 * i + 8 * h + at.g);
#pragma unroll
                for (int n = 0; n < 8; n++) v[i][n][2 * h] *= by, v[i][n][2 * h + 1] *= by;
            }
    }
};

/* A column beside the accumulators, which warps may add up with them from what they hold of a: the sum over k of
 * a[row][k] value[k]. row m0 + 16 i + g + 8 h is v[i][2 h] of the lanes with q = 0. */
struct product_column {
    float v[4][4];
    const float *value; /* of the step's k; NULL: no such column */
};

/* d += a b over one step, and over k of a[row][k] factor[k] b[k][column] if SCALED. A side is DEEP or flat, its rows
 * are so many WIDE. */
template <bool A_DEEP, int A_WIDE, bool B_DEEP, int B_WIDE, bool SCALED>
__device__ __forceinline__ void product_step(product_sums &d, const __nv_bfloat16 *a, const __nv_bfloat16 *b,
                                             const product_place &at, const float *factor, product_column *column) {
    int of_a = A_DEEP ? right_down<A_WIDE>(0, at.m0, at.lane) : down_right<A_WIDE>(at.m0, 0, at.lane);
    int of_b = B_DEEP ? down_right<B_WIDE>(0, at.n0, at.lane) : right_down<B_WIDE>(at.n0, 0, at.lane);
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
        uint32_t x[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (A_DEEP) ldmatrix_x4_transposed(x[i], a + (of_a ^ 16 * i) + k * A_WIDE);
            else ldmatrix_x4(x[i], a + (of_a ^ k) + 16 * i * A_WIDE);
        }
        if (SCALED) {
            float2 by[2] = {two_at(factor, k + at.q), two_at(factor, k + at.q + 8)};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    x[i][e] = pack_bf16(by[e / 2].x * low_bf16(x[i][e]), by[e / 2].y * high_bf16(x[i][e]));
        }
        if (column && column->value) {
            float2 low = two_at(column->value, k + at.q), high = two_at(column->value, k + at.q + 8);
            uint32_t y[2] = {at.g == 0 ? pack_bf16(low.x, low.y) : 0u, at.g == 0 ? pack_bf16(high.x, high.y) : 0u};
#pragma unroll
            for (int i = 0; i < 4; i++) mma_bf16_m16n8k16(column->v[i], x[i], y);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t y[4];
            if (B_DEEP) ldmatrix_x4_transposed(y, b + (of_b ^ 16 * j) + k * B_WIDE);
            else ldmatrix_x4(y, b + (of_b ^ k) + 16 * j * B_WIDE);
#pragma unroll
            for (int i = 0; i < 4; i++) mma_two(d.v[i][2 * j], d.v[i][2 * j + 1], x[i], y);
        }
    }
}

template <bool A_DEEP, int A_WIDE, bool B_DEEP, int B_WIDE, bool SCALED>
__device__ __forceinline__ void product_step(product_sums &d, const float *a, const float *b, const product_place &at,
                                             const float *factor, product_column *column) {
    for (int k = 0; k < 32; k++) {
        float x[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = at.m0 + 16 * i + 8 * h + at.g;
                x[i][h] = a[shared_tile<A_WIDE, float>::offset(A_DEEP ? k : row, A_DEEP ? row : k)];
                if (SCALED) x[i][h] *= factor[k];
                if (column && column->value) column->v[i][2 * h] += x[i][h] * column->value[k];
            }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int of = at.n0 + 8 * n + at.q + e;
                float y = b[shared_tile<B_WIDE, float>::offset(B_DEEP ? k : of, B_DEEP ? of : k)];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    d.v[i][n][e] += x[i][0] * y, d.v[i][n][2 + e] += x[i][1] * y;
            }
    }
}

/* Both operands flat in a stage; a flat and b deep; both deep, with factors for k. */
template <class T>
__device__ __forceinline__ void product_flat_flat(product_sums &d, product_stage<T> &stage, const product_place &at) {
    enum { DEPTH = product_shape<T>::DEPTH };
    product_step<false, DEPTH, false, DEPTH, false>(d, stage.flat(0).v, stage.flat(1).v, at, NULL, NULL);
}

template <class T>
__device__ __forceinline__ void product_flat_deep(product_sums &d, product_stage<T> &stage, const product_place &at) {
    enum { DEPTH = product_shape<T>::DEPTH };
    product_step<false, DEPTH, true, PRODUCT, false>(d, stage.flat(0).v, stage.deep(1).v, at, NULL, NULL);
}

template <class T>
__device__ __forceinline__ void product_deep_deep(product_sums &d, product_stage<T> &stage, const product_place &at,
                                                  const float *factor, product_column &column) {
    product_step<true, PRODUCT, true, PRODUCT, true>(d, stage.deep(0).v, stage.deep(1).v, at, factor, &column);
}

/* A triangle w (row i, column j <= i) times the step's deep b, whose k are the columns from k0 on; or the triangle
 * turned over, whose k are its rows. What lies beyond the triangle in blocks of 64 is not read. */
template <bool TURNED, class T>
__device__ __forceinline__ void product_of_triangle(product_sums &d, product_triangle<T> &w, int k0,
                                                    product_stage<T> &stage, const product_place &at) {
    enum { DEPTH = product_shape<T>::DEPTH, BLOCK = product_triangle<T>::BLOCK };
    if (TURNED ? k0 + DEPTH <= at.m0 : k0 >= at.m0 + BLOCK) return;
    const T *from = TURNED ? w.from(k0, at.m0) : w.from(0, k0) + k0 % BLOCK;
    product_place in_blocks = at;
    if (TURNED) in_blocks.m0 = 0; /* of the block, whose columns are the warp's rows */
    product_step<TURNED, BLOCK, true, PRODUCT, false>(d, from, stage.deep(1).v, in_blocks, NULL, NULL);
}

/* Two neighbours in a tile, the first in an even column. */
__device__ __forceinline__ float2 two_of(const __nv_bfloat16 *at) {
    uint32_t pair = *reinterpret_cast<const uint32_t *>(at);
    return make_float2(low_bf16(pair), high_bf16(pair));
}

__device__ __forceinline__ float2 two_of(const float *at) {
    return *reinterpret_cast<const float2 *>(at);
}

__device__ __forceinline__ void two_store(__nv_bfloat16 *at, float left, float right) {
    *reinterpret_cast<uint32_t *>(at) = pack_bf16(left, right);
}

__device__ __forceinline__ void two_store(float *at, float left, float right) {
    *reinterpret_cast<float2 *>(at) = make_float2(left, right);
}

/* f(row, sum) for each of the lane's rows that the stage has of a whole matrix: the lane's part of the product of that
 * row of the accumulators with the same row of the matrix. */
template <class T, class F>
__device__ __forceinline__ void product_row_dots(const product_sums &d, product_stage<T> &stage, int part,
                                                 const product_place &at, F f) {
    enum { ROWS = product_shape<T>::PART_ROWS };
    typename product_shape<T>::part &tile = stage.part();
    if (at.m0 / ROWS != part) return;
    int place = tile.offset(at.m0 % ROWS + at.g, at.n0 + at.q);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = 0;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float2 w = two_of(tile.from(place, 16 * i + 8 * h, 8 * n));
                sum += d.v[i][n][2 * h] * w.x + d.v[i][n][2 * h + 1] * w.y;
            }
            f(at.m0 + 16 * i + 8 * h + at.g, sum);
        }
}

/* The tile to memory: `to` is its first element; so many rows and columns exist. */
__device__ __forceinline__ void product_store(const product_sums &d, __nv_bfloat16 *to, int64_t step, int rows,
                                              int columns, bool aligned, const product_place &at) {
    int column = at.n0 + row_of_16_column(at.lane);
    to += (at.m0 + at.g) * step + column;
    rows -= at.m0 + at.g, columns -= column;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++, to += 8 * step)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float *left = d.v[i][2 * j] + 2 * h, *right = d.v[i][2 * j + 1] + 2 * h;
                uint2 four = row_of_16(pack_bf16(left[0], left[1]), pack_bf16(right[0], right[1]), at.lane);
                if (16 * i + 8 * h >= rows || 16 * j >= columns) continue;
                if (aligned) {
                    *reinterpret_cast<uint2 *>(to + 16 * j) = four;
                } else {
                    const float v[4] = {low_bf16(four.x), high_bf16(four.x), low_bf16(four.y), high_bf16(four.y)};
                    for (int k = 0; k < 4 && 16 * j + k < columns; k++) to[16 * j + k] = __float2bfloat16_rn(v[k]);
                }
            }
}

__device__ __forceinline__ void product_store(const product_sums &d, float *to, int64_t step, int rows, int columns,
                                              bool aligned, const product_place &at) {
    (void)aligned;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = at.m0 + 16 * i + at.g + e / 2 * 8, column = at.n0 + 8 * n + at.q + e % 2;
                if (row < rows && column < columns) to[row * step + column] = d.v[i][n][e];
            }
}

/* The stages of a block's steps, in a ring: loads are STAGES - 1 steps ahead. load(step, stage) starts the copies. In
 * bf16 two stages and a triangle, or three stages, fit in the 99 KB that every chip gives a block; in fp32 one and a
 * triangle. */
template <class T, int STAGES> struct product_ring {
    product_stage<T> *stages;
    int count, next, at;

    template <class F> __device__ __forceinline__ product_ring(product_stage<T> *room, int steps, F load) {
        stages = room, count = steps, at = 0;
        for (next = 0; next < STAGES - 1; next++) {
            if (next < count) load(next, stages[next]);
            cp_async_commit();
        }
    }
    /* The next step's stage, behind a barrier; it may be read until the next call. */
    template <class F> __device__ __forceinline__ product_stage<T> &take(F load) {
        if constexpr (STAGES > 1) cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (next < count) load(next, stages[next % STAGES]);
        cp_async_commit();
        next++;
        if (STAGES > 1) return stages[at++ % STAGES];
        cp_async_wait<0>();
        __syncthreads();
        return stages[0];
    }
};

#endif
