/* normal_tail.h: the polynomial of the normal distribution's tail, in float, for GELU on all devices. Included by
 * kernels/cpu/activation.h and kernels/cuda/activation.cuh.
 *
 * Phi(-|v|) = exp(-v^2/2) f(t), t = 1 / (1 + 0.26 |v|), and f is t times a polynomial in t, within 2e-8 of it for all
 * |v| for which exp(-v^2/2) is a float: also the lower tail is right to some units of its own. */
#ifndef RIVERRUN_NORMAL_TAIL_H
#define RIVERRUN_NORMAL_TAIL_H

#ifdef __CUDACC__
#define NORMAL_TAIL static __host__ __device__ __forceinline__
#else
#define NORMAL_TAIL static inline
#endif

#define NORMAL_TAIL_SCALE 0.26f           /* of |v| in t */
#define NORMAL_DENSITY 3.9894228040e-1f   /* 1 / sqrt(2 pi) */

NORMAL_TAIL float normal_tail(float t) {
    float p = 3.0952546614e-2f;
    p = p * t - 1.5501707122e-1f;
    p = p * t + 2.5604486370e-1f;
    p = p * t - 1.5620638237e-1f;
    p = p * t + 1.6462353114e-1f;
    p = p * t + 4.9437522778e-2f;
    p = p * t + 1.0344517297e-1f;
    p = p * t + 1.0295714015e-1f;
    p = p * t + 1.0376266635e-1f;
    return t * p;
}

#endif
