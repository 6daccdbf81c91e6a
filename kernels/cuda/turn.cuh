/* turn.cuh: rotary positions on the GPU: what rope.cu and rat.cu share. Angles are multiplied out in double, as turns,
 * and reduced there: right at any position. Rates of turning come from the host as a kernel's argument. */
#ifndef RIVERRUN_CUDA_TURN_CUH
#define RIVERRUN_CUDA_TURN_CUH

#include "kernels/cuda/launch.cuh"

#include <math.h>

enum { HALF_MAX = 128 }; /* pairs of channels */

/* Turns for a step of one position, for each pair of channels. */
struct turn_rates {
    double v[HALF_MAX];
};

static inline turn_rates rates_of(int64_t P, double base) {
    turn_rates rates;
    for (int64_t i = 0; i < P / 2; i++)
        rates.v[i] = base > 0 ? pow(base, -2.0 * (double)i / (double)P) / (2 * M_PI) : 0;
    return rates;
}

/* Cosine and sine of the angle at a position; direction -1: of the inverse. */
__device__ __forceinline__ float2 turn_by(int64_t position, double rate, float direction) {
    double turns = (double)position * rate;
    float2 turn;
    sincosf(6.2831853071795864769f * (float)(turns - rint(turns)), &turn.y, &turn.x);
    turn.y *= direction;
    return turn;
}

#endif
