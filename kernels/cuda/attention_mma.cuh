/* attention_mma.cuh: products of tiles by single warps, whose operands come from shared memory through registers: what
 * attention_mma.cu and rat_mma.cu share. Rows are padded with zeros to W = 64 or 128 channels; scores stay in
 * registers, since an accumulator's layout is that of a first operand. */
#ifndef RIVERRUN_CUDA_ATTENTION_MMA_CUH
#define RIVERRUN_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/attention_tensor.cuh"

/* Offsets of what a lane names to ldmatrix, for 16 rows from `row` on, a multiple of 16, and 16 columns (mma.cuh): a
 * of a tile that is m x k, or two b of one that is k x n, transposed ... Those of columns c from there, a multiple of
 * 16, are the offset with c put in by an exclusive or: one instruction, and rows are an addition that folds into the
 * load. */
template <int W> __device__ __forceinline__ int down_right(int row) {
    int lane = threadIdx.x % WARP;
    return (row + lane % 16) * W + (((lane / 16) ^ (lane % 8)) << 3);
}

/* ... and two b of one that is n x k, from its beginning. */
template <int W> __device__ __forceinline__ int right_down() {
    int lane = threadIdx.x % WARP;
    return (lane % 8 + 8 * (lane / 16)) * W + (((lane / 8 % 2) ^ (lane % 8)) << 3);
}

/* Sixteen columns: d, d_next += a b. */
__device__ __forceinline__ void mma_pair(float (&d)[4], float (&d_next)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
    uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_bf16_m16n8k16(d, a, first);
    mma_bf16_m16n8k16(d_next, a, second);
}

/* sum (16 M rows, W columns) of the products of 16 M rows of one tile, `row` on, with all of N rows of another: M first
 * operands share each second one. */
template <int M, int N, int W>
__device__ __forceinline__ void scores(float (&z)[M][N / 8][4], const bf16 *rows, int row, const bf16 *columns) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) z[m][n][i] = 0;
    const int first = down_right<W>(row), second = right_down<W>();
#pragma unroll
    for (int k = 0; k < W; k += 16) {
        uint32_t a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(a[m], rows + (first ^ k) + 16 * m * W);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            ldmatrix_x4(b, columns + (second ^ k) + 16 * n * W);
#pragma unroll
            for (int m = 0; m < M; m++) mma_pair(z[m][2 * n], z[m][2 * n + 1], a[m], b);
        }
    }
}

/* sum (16 M, W) += z (16 M, N), rounded, times a tile of N rows. */
template <int M, int N, int W>
__device__ __forceinline__ void accumulate(float (&sum)[M][W / 8][4], const float (&z)[M][N / 8][4], const bf16 *tile) {
    const int second = down_right<W>(0);
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; m++) pack_scores(a[m], z[m], k);
#pragma unroll
        for (int n = 0; n < W / 16; n++) {
            ldmatrix_x4_transposed(b, tile + (second ^ (16 * n)) + 16 * k * W);
#pragma unroll
            for (int m = 0; m < M; m++) mma_pair(sum[m][2 * n], sum[m][2 * n + 1], a[m], b);
        }
    }
}

/* with_padding(P, [&](auto width) { constexpr int W = width.value; ... }) */
template <class F> static void with_padding(int P, F f) {
    if (P <= 64) f(constant<64>());
    else f(constant<128>());
}

#endif
