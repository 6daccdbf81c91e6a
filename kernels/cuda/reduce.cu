/* reduce.cu: sums over rows. Used by the backward passes whose parameter gradients are sums over all tokens: each
 * writes one partial row per block of tokens, and the rows are added here.
 *
 * One block takes WARP columns; its SUM_WARPS warps take the rows in turn, UNROLL of them on their way at once, and
 * their sums are added in the order of the warps. The order of every sum depends on the number of rows only. Bytes: 4
 * per element read, mostly from the second cache; with a few hundred rows a thread waits for memory two or three times,
 * so a launch takes about 4 us whatever its size: what can be added in one launch is (parts). */
#include "kernels/cuda/launch.cuh"

enum { SUM_WARPS = 32, UNROLL = 8 };

template <class T>
__device__ __forceinline__ float strided_column_sum(const T *column, int64_t step, int64_t end) {
    float sum = 0;
    int64_t r = threadIdx.y;
    for (; r + (UNROLL - 1) * SUM_WARPS < end; r += UNROLL * SUM_WARPS) {
        T v[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) v[i] = column[(r + i * SUM_WARPS) * step];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) sum += to_float(v[i]);
    }
#pragma unroll 4
    for (; r < end; r += SUM_WARPS) sum += to_float(column[r * step]);
    return sum;
}

/* *to += the sum of `end` numbers of this thread's column, for the first warp's threads. The block is (WARP,
 * SUM_WARPS); `inside`: the column exists. */
template <class T>
__device__ __forceinline__ void sum_column(float *to, const T *column, int64_t step, int64_t end, bool inside) {
    __shared__ float part[SUM_WARPS][WARP];
    part[threadIdx.y][threadIdx.x] = inside ? strided_column_sum(column, step, end) : 0;
    __syncthreads();
    if (threadIdx.y != 0 || !inside) return;
    float sum = *to;
    for (int w = 0; w < SUM_WARPS; w++) sum += part[w][threadIdx.x];
    *to = sum;
}

/* Block (columns, part). */
__global__ void __launch_bounds__(WARP *SUM_WARPS)
add_partials_kernel(const __grid_constant__ struct sum_parts parts, const float *partial, int64_t rows, int64_t n) {
    int64_t j = blockIdx.x * (int64_t)WARP + threadIdx.x, step = gridDim.y * n;
    struct sum_part part = parts.part[blockIdx.y];
    sum_column(part.sum + j * part.step, partial + blockIdx.y * n + j, step, rows, j < n && part.sum);
}

void cuda_add_partial_parts(struct device *dev, struct sum_parts parts, const float *partial, int64_t rows, int64_t n) {
    ASSERT(parts.count >= 0 && parts.count <= SUM_PARTS);
    dim3 grid((unsigned)ceil_div(n, WARP), (unsigned)parts.count);
    LAUNCH(dev, add_partials_kernel, grid, dim3(WARP, SUM_WARPS), 0, parts, partial, rows, n);
}

void cuda_add_partials(struct device *dev, float *sum, const float *partial, int64_t rows, int64_t n) {
    struct sum_parts one = {1, {{sum, 1}}};
    cuda_add_partial_parts(dev, one, partial, rows, n);
}

template <class T>
__global__ void __launch_bounds__(WARP *SUM_WARPS)
column_sums_kernel(float *sum, const T *rows, int64_t R, int64_t n, int64_t step) {
    int64_t j = blockIdx.x * (int64_t)WARP + threadIdx.x;
    sum_column(sum + j, rows + j, step, R, j < n);
}

void cuda_add_column_sums(struct device *dev, float *sum, tensor rows) {
    int64_t R = rows.dim[0], n = rows.dim[1];
    dim3 grid((unsigned)ceil_div(n, WARP)), block(WARP, SUM_WARPS);
    with_type(rows.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, column_sums_kernel<T>, grid, block, 0, sum, data_of<const T>(rows), R, n, rows.stride[0]);
    });
}
