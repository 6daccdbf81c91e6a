/* ssd_chunk_forward.cuh: what the two kernels that walk over chunks with outputs share (ssd_chunk_forward.cu,
 * ssd_wgmma_forward.cu): the problem, and the weights of a chunk. */
#ifndef RIVERRUN_CUDA_SSD_CHUNK_FORWARD_CUH
#define RIVERRUN_CUDA_SSD_CHUNK_FORWARD_CUH

#include "kernels/cuda/ssd_chunk.cuh"

/* C B^T of a chunk as the accumulators of the warps that made it: of 16 tokens and 8 columns, four elements a lane. */
enum { PRODUCTS = 4 * 8 * WARP };

struct forward_problem {
    ssd_chunked p;
    ssd_rows y, x, b, c;
    const float *d;
    const float *entering; /* (B, segments, H, P, N), or NULL */
    float *final;
    const ssd_factors *factors;
    const float4 *products; /* (B, chunks, G, PRODUCTS) */
};

/* The same by Hopper's products of groups of warps, for aligned views. False: they don't serve.
 * (ssd_wgmma_forward.cu) */
bool ssd_wgmma_forward(struct device *dev, const forward_problem &f, dim3 grid);

/* Place of the thread's block in the problem: a head, and the chunks of a segment. */
struct forward_place {
    int64_t row, head, group, first, end, of_segment;

    __device__ __forceinline__ int64_t of_factors(const ssd_chunked &p, int64_t chunk) const {
        return (row * p.chunks + chunk) * p.H + head;
    }
    __device__ __forceinline__ int64_t of_products(const ssd_chunked &p, int64_t chunk) const {
        return ((row * p.chunks + chunk) * p.G + group) * PRODUCTS;
    }
    __device__ __forceinline__ int64_t of_outputs(const ssd_rows &y, int64_t t0) const {
        return row * y.row + t0 * y.step + head * y.width;
    }
};

__device__ __forceinline__ forward_place forward_place_of(const ssd_chunked &p) {
    forward_place at;
    int64_t segment = blockIdx.y;
    at.row = blockIdx.z, at.head = blockIdx.x, at.group = at.head / (p.H / p.G);
    at.first = segment * p.per_segment, at.end = at_most(at.first + p.per_segment, p.chunks);
    at.of_segment = (at.row * p.segments + segment) * p.H + at.head;
    return at;
}

/* A chunk's weights M_ij = (c_i . b_j) L_ij dt_j of one of the four times 16 tokens i, and all j up to the last of
 * them, by a warp. */
__device__ __forceinline__ void weights_store(shared_tile<SSD_P> &weights, const ssd_factors &f, const float4 *products,
                                              int tile, int lane) {
    products += tile * 8 * WARP + lane;
    int i[2] = {16 * tile + lane / 4, 16 * tile + lane / 4 + 8};
    float log[2] = {f.log[i[0]], f.log[i[1]]}, run[2] = {f.run[i[0]], f.run[i[1]]};
#pragma unroll
    for (int n0 = 0; n0 < 8; n0 += 4) { /* four on their way at once: registers */
        float4 cb[4];
#pragma unroll
        for (int n = 0; n < 4; n++)
            if ((n0 + n) / 2 <= tile) cb[n] = products[(n0 + n) * WARP];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if ((n0 + n) / 2 > tile) continue;
            int j = 8 * (n0 + n) + lane % 4 * 2;
            float2 logs = two_at(f.log, j), runs = two_at(f.run, j), dt = two_at(f.dt, j);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float left = decay_between(i[h], log[h], run[h], j, logs.x, runs.x) * dt.x;
                float right = decay_between(i[h], log[h], run[h], j + 1, logs.y, runs.y) * dt.y;
                weights.pair(i[h], j) = pack_bf16((h ? cb[n].z : cb[n].x) * left, (h ? cb[n].w : cb[n].y) * right);
            }
        }
    }
}

#endif
