/* reduce.cu: sums over rows. Used by the backward passes whose parameter gradients are sums over all tokens: each
 * writes one partial row per block of tokens, and the rows are added here.
 *
 * One block takes WARP columns; its warps take the rows in turn, and their sums are added in the order of the warps. The
 * order of every sum depends on the number of rows only. Bytes: 4 per element read; rows are a few hundred, so this is
 * a small part of the pass that wrote them. */
#include "kernels/cuda/launch.cuh"

enum { SUM_WARPS = 8 };

template <class T>
__device__ float strided_column_sum(const T *column, int64_t step, int64_t first, int64_t end) {
    float sum = 0;
    for (int64_t r = first + threadIdx.y; r < end; r += SUM_WARPS) sum += to_float(column[r * step]);
    return sum;
}

/* Rows [first, end) of column `j` into *to: added, or as they are. The block is (WARP, SUM_WARPS). */
template <class T>
__device__ void sum_columns(float *to, bool add, const T *rows, int64_t step, int64_t first, int64_t end, int64_t n) {
    __shared__ float part[SUM_WARPS][WARP];
    int64_t j = blockIdx.x * (int64_t)WARP + threadIdx.x;
    part[threadIdx.y][threadIdx.x] = j < n ? strided_column_sum(rows + j, step, first, end) : 0;
    __syncthreads();
    if (threadIdx.y != 0 || j >= n) return;
    float sum = add ? to[j] : 0;
    for (int w = 0; w < SUM_WARPS; w++) sum += part[w][threadIdx.x];
    to[j] = sum;
}

__global__ void add_partials_kernel(float *sum, const float *partial, int64_t rows, int64_t n) {
    sum_columns(sum, true, partial, n, 0, rows, n);
}

void cuda_add_partials(struct device *dev, float *sum, const float *partial, int64_t rows, int64_t n) {
    LAUNCH(dev, add_partials_kernel, dim3((unsigned)ceil_div(n, WARP)), dim3(WARP, SUM_WARPS), 0, sum, partial, rows, n);
}

template <class T> __global__ void column_sums_kernel(float *sum, const T *rows, int64_t R, int64_t n, int64_t step) {
    sum_columns(sum, true, rows, step, 0, R, n);
}

void cuda_add_column_sums(struct device *dev, float *sum, tensor rows) {
    int64_t R = rows.dim[0], n = rows.dim[1];
    dim3 grid((unsigned)ceil_div(n, WARP)), block(WARP, SUM_WARPS);
    with_type(rows.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, column_sums_kernel<T>, grid, block, 0, sum, data_of<const T>(rows), R, n, rows.stride[0]);
    });
}
