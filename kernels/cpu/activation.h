/* activation.h: the elementwise functions of enum activation and their derivatives, for loops over rows (glu.c,
 * head_norm.c). `act` is meant to be a constant where a loop is compiled: WITH_ACTIVATION writes the loop once for each
 * function, so that it runs in SIMD. */
#ifndef RIVERRUN_CPU_ACTIVATION_H
#define RIVERRUN_CPU_ACTIVATION_H

#include "kernels/cpu/real.h"
#include "kernels/normal_tail.h"
#include "kernels/ops.h"

/* The normal distribution's Phi(v), and its density. */
static inline real normal_cdf(real v, real *density) {
#ifdef REAL_IS_FLOAT
    float e = exp_real(-0.5f * v * v), tail = e * normal_tail(1.0f / (1.0f + NORMAL_TAIL_SCALE * fabs_real(v)));
    *density = e * NORMAL_DENSITY;
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
