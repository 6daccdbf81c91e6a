/* attention_tile.cuh: attention in fp32 tiles, whatever the operands: what attention.cu's plain path and rat.cu share. A
 * block has TILE queries, or keys, and walks over tiles of the others; a warp has ROWS of its own; a lane is one of the
 * others for scores, a channel (and that plus 32, ...) for sums. Backward passes take blocks of half as many warps, and
 * half a tile, where a block can't have the shared memory for whole ones. */
#ifndef RIVERRUN_CUDA_ATTENTION_TILE_CUH
#define RIVERRUN_CUDA_ATTENTION_TILE_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/shared.cuh"

enum {
    TILE = 32,
    THREADS = 256,
    WARPS = THREADS / WARP,
    ROWS = TILE / WARPS, /* of a warp */
    WIDEST = 256,
    PARTS = WIDEST / WARP, /* channels of a lane, at most */
};

/* Queries or keys that are the block's own. */
__device__ __forceinline__ int own_rows() {
    return (int)blockDim.x / WARP * ROWS;
}

/* Rows of P floats, P + 1 apart. Those that are not there are zeros. */
__device__ __forceinline__ float *tile_row(float *tile, int P, int i) {
    return tile + i * (P + 1);
}

/* Products of the warp's ROWS rows of one tile with this lane's row of another. */
__device__ __forceinline__ void multiply(float (&z)[ROWS], const float *rows, const float *mine, int P) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) z[r] = 0;
    for (int c = 0; c < P; c++) {
        float v = mine[c];
#pragma unroll
        for (int r = 0; r < ROWS; r++) z[r] += rows[r * (P + 1) + c] * v;
    }
}

/* sum[r] += sum over the lanes of share[r] times their rows of a tile. */
__device__ __forceinline__ void add_rows(float (&sum)[ROWS][PARTS], const float (&share)[ROWS], float *tile, int P) {
    for (int j = 0; j < TILE; j++) {
        const float *row = tile_row(tile, P, j);
        float weight[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) weight[r] = __shfl_sync(FULL, share[r], j);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int c = threadIdx.x % WARP + i * WARP;
            float v = c < P ? row[c] : 0.0f;
#pragma unroll
            for (int r = 0; r < ROWS; r++) sum[r][i] += weight[r] * v;
        }
    }
}

/* Bytes of so many rows. */
static inline size_t rows_bytes(int P, int rows) {
    return (size_t)rows * (size_t)(P + 1) * sizeof(float);
}

/* A block of a backward pass: two tiles of its own rows, and two of the others. */
struct back_block {
    unsigned threads, rows;
    size_t bytes;
};

static inline back_block back_block_of(struct device *dev, int P) {
    if (rows_bytes(P, 4 * TILE) <= cuda_shared_most(dev)) return {THREADS, TILE, rows_bytes(P, 4 * TILE)};
    return {THREADS / 2, TILE / 2, rows_bytes(P, 3 * TILE)};
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(FULL, v, offset));
    return v;
}

#endif
