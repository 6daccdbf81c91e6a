/* activation.h: the elementwise functions of enum activation and their derivatives, for loops over rows (glu.c,
 * head_norm.c). `act` is meant to be a constant where a loop is compiled: WITH_ACTIVATION writes the loop once for each
 * function, so that it runs in SIMD. */
#ifndef RIVERRUN_CPU_ACTIVATION_H
#define RIVERRUN_CPU_ACTIVATION_H

#include "kernels/cpu/real.h"
#include "kernels/ops.h"

/* The normal distribution's Phi(v), and its density. In float Phi(-|v|) = exp(-v^2/2) f(|v|), and f is t times a
 * polynomial in t = 1 / (1 + 0.26 |v|), within 2e-8 of it for all |v| for which exp(-v^2/2) is a float: also the lower
 * tail is right to some units of its own. */
static inline real normal_cdf(real v, real *density) {
#ifdef REAL_IS_FLOAT
    float e = exp_real(-0.5f * v * v), t = 1.0f / (1.0f + 0.26f * fabs_real(v));
    float p = 3.0952546614e-2f;
    p = p * t - 1.5501707122e-1f;
    p = p * t + 2.5604486370e-1f;
    p = p * t - 1.5620638237e-1f;
    p = p * t + 1.6462353114e-1f;
    p = p * t + 4.9437522778e-2f;
    p = p * t + 1.0344517297e-1f;
    p = p * t + 1.0295714015e-1f;
    p = p * t + 1.0376266635e-1f;
    float tail = e * (t * p);
    *density = e * 3.9894228040e-1f;
    return v > 0 ? 1.0f - tail : tail;
#else
    *density = exp(-0.5 * v * v) * 0.39894228040143268;
    return 0.5 * erfc(v * -0.70710678118654752);
#endif
}

/* act(v), and its derivative in *slope. */
static inline real activation_and_slope(enum activation act, real v, real *slope) {
    if (act == ACTIVATION_GELU) {
        real density, cdf = normal_cdf(v, &density);
        *slope = cdf + v * density;
        return v * cdf;
    }
    if (act == ACTIVATION_RELU2) {
        real positive = v < 0 ? 0 : v; /* of NaN itself */
        *slope = (real)2 * positive;
        return positive * positive;
    }
    if (act == ACTIVATION_SIGMOID) { /* 1 - s would lose the digits of a gate that is nearly open */
        real e = exp_real(v < 0 ? v : -v), larger = (real)1 / ((real)1 + e), smaller = e * larger;
        *slope = larger * smaller;
        return v < 0 ? smaller : larger;
    }
    real s = sigmoid(v);
    *slope = s * ((real)1 + v * ((real)1 - s));
    return v * s;
}

static inline real activation_of(enum activation act, real v) {
    real slope;
    return activation_and_slope(act, v, &slope);
}

/* Run call(..., act) with act a constant. */
#define WITH_ACTIVATION(act, call, ...)                                                                                \
    do {                                                                                                               \
        switch (act) {                                                                                                 \
        case ACTIVATION_SILU: call(__VA_ARGS__, ACTIVATION_SILU); break;                                               \
        case ACTIVATION_GELU: call(__VA_ARGS__, ACTIVATION_GELU); break;                                               \
        case ACTIVATION_RELU2: call(__VA_ARGS__, ACTIVATION_RELU2); break;                                             \
        case ACTIVATION_SIGMOID: call(__VA_ARGS__, ACTIVATION_SIGMOID); break;                                         \
        }                                                                                                              \
    } while (0)

#endif
