/* block_linear.cu: a product with a block-diagonal matrix of G blocks, and its gradients.
 *
 *   y[r, g O + o] = sum_i w[g,o,i] x[r, g I + i]
 *   dx[r, g I + i] = (or +=) sum_o dy[r, g O + o] w[g,o,i];   dw[g,o,i] += sum_r dy[r, g O + o] x[r, g I + i]
 *
 * Blocks of 4 x 4 (the paper's q, k and v): a lane has one block, its 16 weights in registers, and walks down the rows,
 * four of them on their way at once; a warp takes 32 neighbouring blocks, the eight warps of a thread block the rows in
 * turns. Backward keeps dw's 16 sums in registers as well; they are added over the warps, and over the blocks of rows
 * (reduce.cu), cut by R and G only, so the bits are always the same.
 * Bytes, with e bytes an activation: forward 2eRGI, backward 3eRGI, one eRGI more to add to dx. Bound by bandwidth; in
 * bf16 at 3.0 TB/s, R 32,768, G 384: 0.07 / 0.10 ms (0.13 adding).
 *
 * Other blocks, of which there are few and large ones: one product of linear.cu for all of them, 2RGOI FLOPs each. R
 * 32,768, 4 blocks of 192 x 192: bytes again, 0.03 / 0.10 ms.
 */
#include "kernels/cuda/gemm.cuh"

enum {
    SIDE = 4, /* of a block that lanes work on */
    WARPS = 8,
    ROWS_AT_ONCE = 4,
    WALK = 16,              /* rows of a lane in a forward pass */
    BLOCKS_MOST = 12 * 132, /* of a backward pass, where that leaves one for each 32 blocks of the matrix */
    ROWS_LEAST = 64         /* of a block of it */
};

/* Four neighbours; `WIDE`: they lie together as one word. */
template <bool WIDE, class T> __device__ __forceinline__ pack<T, SIDE> load_four(const T *from) {
    pack<T, SIDE> p;
    if constexpr (WIDE) {
        p = *reinterpret_cast<const pack<T, SIDE> *>(from);
    } else {
#pragma unroll
        for (int i = 0; i < SIDE; i++) p.v[i] = from[i];
    }
    return p;
}

template <bool WIDE, class T> __device__ __forceinline__ void store_four(T *to, const float (&in)[SIDE]) {
    if constexpr (WIDE) {
        store_floats<SIDE>(to, in);
    } else {
#pragma unroll
        for (int i = 0; i < SIDE; i++) to[i] = from_float<T>(in[i]);
    }
}

/* The block of this lane. */
template <class T> __device__ __forceinline__ void load_block(float (&w)[SIDE][SIDE], const T *weights, int64_t g) {
#pragma unroll
    for (int o = 0; o < SIDE; o++)
#pragma unroll
        for (int i = 0; i < SIDE; i++) w[o][i] = to_float(weights[(g * SIDE + o) * SIDE + i]);
}

template <class T, bool WIDE>
__global__ void __launch_bounds__(WARP *WARPS)
block4_forward_kernel(T *y, int64_t y_step, const T *x, int64_t x_step, const T *weights, int64_t R, int64_t G) {
    int64_t g = (int64_t)blockIdx.x * WARP + threadIdx.x, step = (int64_t)gridDim.y * WARPS;
    if (g >= G) return;
    float w[SIDE][SIDE];
    load_block(w, weights, g);
    for (int64_t first = (int64_t)blockIdx.y * WARPS + threadIdx.y; first < R; first += ROWS_AT_ONCE * step) {
        pack<T, SIDE> in[ROWS_AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < ROWS_AT_ONCE; k++)
            if (first + k * step < R) in[k] = load_four<WIDE>(x + (first + k * step) * x_step + g * SIDE);
#pragma unroll
        for (int k = 0; k < ROWS_AT_ONCE; k++) {
            float out[SIDE] = {};
#pragma unroll
            for (int i = 0; i < SIDE; i++)
#pragma unroll
                for (int o = 0; o < SIDE; o++) out[o] += w[o][i] * to_float(in[k].v[i]);
            if (first + k * step < R) store_four<WIDE>(y + (first + k * step) * y_step + g * SIDE, out);
        }
    }
}

/* The sums of 32 blocks that the warps hold, added in the order of the warps. */
__device__ __forceinline__ void add_warps(float *partial, const float (&sum)[SIDE][SIDE], int64_t g0, int64_t G) {
    enum { EACH = SIDE * SIDE, GAP = EACH + 1 };
    __shared__ float room[WARPS][WARP * GAP];
#pragma unroll
    for (int e = 0; e < EACH; e++) room[threadIdx.y][threadIdx.x * GAP + e] = sum[e / SIDE][e % SIDE];
    __syncthreads();
    for (int at = (int)(threadIdx.y * WARP + threadIdx.x); at < WARP * EACH; at += WARP * WARPS) {
        if (g0 + at / EACH >= G) break;
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += room[w][at / EACH * GAP + at % EACH];
        partial[g0 * EACH + at] = total;
    }
}

/* Row blockIdx.y of partial has the sums of this block's rows. */
template <class T, bool WIDE>
__global__ void __launch_bounds__(WARP *WARPS)
block4_backward_kernel(T *dx, int64_t dx_step, bool add_dx, float *partial, const T *dy, int64_t dy_step, const T *x,
                       int64_t x_step, const T *weights, int64_t R, int64_t G) {
    int64_t g = (int64_t)blockIdx.x * WARP + threadIdx.x, step = (int64_t)gridDim.y * WARPS, end = g < G ? R : 0;
    float w[SIDE][SIDE] = {}, sum[SIDE][SIDE] = {};
    if (g < G) load_block(w, weights, g);
    for (int64_t first = (int64_t)blockIdx.y * WARPS + threadIdx.y; first < end; first += ROWS_AT_ONCE * step) {
        pack<T, SIDE> in[ROWS_AT_ONCE] = {}, back[ROWS_AT_ONCE] = {}, before[ROWS_AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < ROWS_AT_ONCE; k++) {
            int64_t row = first + k * step;
            if (row >= end) break;
            in[k] = load_four<WIDE>(x + row * x_step + g * SIDE);
            back[k] = load_four<WIDE>(dy + row * dy_step + g * SIDE);
            if (add_dx) before[k] = load_four<WIDE>(dx + row * dx_step + g * SIDE);
        }
#pragma unroll
        for (int k = 0; k < ROWS_AT_ONCE; k++) {
            float out[SIDE];
#pragma unroll
            for (int i = 0; i < SIDE; i++) out[i] = to_float(before[k].v[i]);
#pragma unroll
            for (int o = 0; o < SIDE; o++)
#pragma unroll
                for (int i = 0; i < SIDE; i++) {
                    out[i] += w[o][i] * to_float(back[k].v[o]);
                    sum[o][i] += to_float(back[k].v[o]) * to_float(in[k].v[i]);
                }
            if (first + k * step < end) store_four<WIDE>(dx + (first + k * step) * dx_step + g * SIDE, out);
        }
    }
    add_warps(partial + (int64_t)blockIdx.y * G * SIDE * SIDE, sum, g - threadIdx.x, G);
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

static bool in_lanes(int64_t O, int64_t I) {
    return O == SIDE && I == SIDE;
}

/* Blocks of rows of a backward pass. */
static int64_t runs_of(int64_t R, int64_t G) {
    return at_most(ceil_div(R, ROWS_LEAST), at_least(BLOCKS_MOST / at_least(ceil_div(G, WARP), 1), 1));
}

template <class F> static void with_lanes(bool wide, F f) {
    if (wide) f(constant<1>());
    else f(constant<0>());
}

/* The G matrices (R, n) that lie side by side in the rows of a view; and those of w. */
static struct gemm_operand columns_of(tensor t, int64_t n, bool transposed) {
    return {t.data, t.dtype, t.dim[0] > 1 ? t.stride[0] : t.dim[1], transposed, n};
}

static struct gemm_operand blocks_of(tensor w, bool transposed) {
    return {w.data, w.dtype, w.dim[2], transposed, w.dim[1] * w.dim[2]};
}

static void check(tensor y, tensor x, tensor w) {
    int64_t R = x.dim[0], G = w.dim[0];
    ASSERT(w.ndim == 3 && tensor_is(y, 2, R, G * w.dim[1]) && tensor_is(x, 2, R, G * w.dim[2]));
    ASSERT(y.dtype == x.dtype && w.dtype == x.dtype);
}

extern "C" void cuda_block_linear_forward(struct device *dev, tensor y, tensor x, tensor w) {
    int64_t R = x.dim[0], G = w.dim[0], O = w.dim[1], I = w.dim[2];
    check(y, x, w);
    if (!in_lanes(O, I)) {
        cuda_gemm(dev, columns_of(x, I, false), blocks_of(w, true), columns_of(y, O, false), R, O, I, 1, 0, G);
        return;
    }
    dim3 grid((unsigned)ceil_div(G, WARP), (unsigned)at_most(ceil_div(R, WARPS * WALK), 65535));
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_lanes(vectors_fit(x, SIDE) && vectors_fit(y, SIDE), [&](auto wide) {
            LAUNCH(dev, (block4_forward_kernel<T, wide.value != 0>), grid, dim3(WARP, WARPS), 0, data_of<T>(y),
                   y.stride[0], data_of<T>(x), x.stride[0], data_of<T>(w), R, G);
        });
    });
}

extern "C" size_t cuda_block_linear_backward_scratch(int64_t R, int64_t G, int64_t O, int64_t I) {
    return in_lanes(O, I) ? (size_t)(runs_of(R, G) * G * O * I) * sizeof(float) : 0;
}

extern "C" void cuda_block_linear_backward(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dy, tensor x,
                                           tensor w, void *scratch) {
    int64_t R = x.dim[0], G = w.dim[0], O = w.dim[1], I = w.dim[2], runs = runs_of(R, G);
    check(dy, x, w);
    ASSERT(tensor_is(dx, 2, R, G * I) && dx.dtype == x.dtype && tensor_is(dw, 3, G, O, I) && dw.dtype == DTYPE_F32);
    if (!in_lanes(O, I)) {
        cuda_gemm(dev, columns_of(dy, O, false), blocks_of(w, false), columns_of(dx, I, false), R, I, O, 1,
                  add_dx ? 1 : 0, G);
        cuda_gemm(dev, columns_of(dy, O, true), columns_of(x, I, false), blocks_of(dw, false), O, I, R, 1, 1, G);
        return;
    }
    dim3 grid((unsigned)ceil_div(G, WARP), (unsigned)runs);
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_lanes(vectors_fit(x, SIDE) && vectors_fit(dy, SIDE) && vectors_fit(dx, SIDE), [&](auto wide) {
            LAUNCH(dev, (block4_backward_kernel<T, wide.value != 0>), grid, dim3(WARP, WARPS), 0, data_of<T>(dx),
                   dx.stride[0], add_dx, (float *)scratch, data_of<T>(dy), dy.stride[0], data_of<T>(x), x.stride[0],
                   data_of<T>(w), R, G);
        });
    });
    cuda_add_partials(dev, data_of<float>(dw), (const float *)scratch, runs, G * O * I);
}
