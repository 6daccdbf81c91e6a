/* ssd_chunk_backward.cuh: what the two kernels for a chunk by itself share (ssd_chunk_backward.cu, ssd_wgmma.cu): the
 * problem, and what is made of the sums of a token. */
#ifndef RIVERRUN_CUDA_SSD_CHUNK_BACKWARD_CUH
#define RIVERRUN_CUDA_SSD_CHUNK_BACKWARD_CUH

#include "kernels/cuda/ssd_chunk.cuh"

struct backward_memory {
    ssd_factors *factors;         /* (B, chunks, H) */
    __nv_bfloat16 *states, *grads; /* S, G: (B, chunks, H, SSD_P, SSD_N) */
    float *db, *dc;               /* (B, T, G, splits, SSD_N) */
    float *skips;                 /* (B, chunks, H): parts of dd */
    float *carries, *decays;
};

/* A group's heads are split over `splits` blocks of at most `heads`. */
struct backward_problem {
    ssd_chunked p;
    int heads, splits;
    const float *d;
    float *ddt, *da;
    ssd_rows dx, dy, x, b, c;
    backward_memory m;
    bool dd;
};

/* The same by Hopper's products of groups of warps, for aligned views. False: they don't serve. (ssd_wgmma.cu) */
bool ssd_wgmma_backward(struct device *dev, const backward_problem &b, dim3 grid);

/* Of one token of a head: over j < i of K_ij dt_j, over i > j of K_ij, K_jj, U_i . c_i and x_j . V_j. */
struct token_sums {
    float rows, columns, own, enters, leaves;
};

/* ddt and da of a head's chunk and its part of dd, by one warp, two tokens a lane; through: <S, G>, diagonal: the sum
 * of D_ii. A pair of different tokens counts in da, and only within its run: where no state passes, nothing is left
 * over of roundings. */
__device__ __forceinline__ void ssd_steps_store(const token_sums (&two)[2], float through, float diagonal,
                                                const ssd_factors &f, const backward_problem &b, int64_t row,
                                                int64_t chunk, int64_t head, int lane) {
    float pairs[2], into[2], run[2] = {f.run[2 * lane], f.run[2 * lane + 1]};
    const ssd_chunked &p = b.p;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int i = 2 * lane + k;
        float leaves = two[k].leaves * f.leave[i];
        pairs[k] = two[k].rows - f.dt[i] * two[k].columns + f.enter[i] * two[k].enters;
        into[k] = f.dt[i] * leaves;
        int64_t t = chunk * SSD_CHUNK + i;
        if (t < p.T) b.ddt[(row * p.T + t) * p.H + head] = two[k].columns + two[k].own + leaves;
    }
    float run_before = __shfl_up_sync(FULL, run[1], 1), run_behind = __shfl_down_sync(FULL, run[0], 1);
    bool one_run = run[0] == run[1], on = lane < WARP - 1 && run[1] == run_behind;
    float behind = sum_behind(one_run ? pairs[0] + pairs[1] : pairs[0], one_run && on, lane);
    behind = __shfl_down_sync(FULL, behind, 1);
    float before = __shfl_up_sync(FULL, sum_before(into[0] + into[1], lane), 1);
    if (lane == 0) before = 0, run_before = 0;
    through *= f.enter[SSD_CHUNK - 1];
    float second = pairs[1] + (on ? behind : 0.0f), first = one_run ? pairs[0] + second : pairs[0];
    float da[2] = {through + first + before, through + second + (before + into[0])};
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t t = chunk * SSD_CHUNK + 2 * lane + k;
        bool begins = run[k] != (k ? run[0] : run_before);
        if (t < p.T) b.da[(row * p.T + t) * p.H + head] = begins ? 0.0f : da[k];
    }
    if (b.dd && lane == 0) b.m.skips[(row * p.chunks + chunk) * p.H + head] = diagonal;
}

#endif
