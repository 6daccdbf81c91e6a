/* activation.cuh: the elementwise functions of enum activation and their derivatives, V elements of a thread at a time.
 * Used by glu.cu and head_norm.cu. Which function it is is an argument of the kernel, the same for all threads: asked
 * once for the V elements, it costs nothing beside their memory, and saves three kernels out of four. */
#ifndef RIVERRUN_CUDA_ACTIVATION_CUH
#define RIVERRUN_CUDA_ACTIVATION_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/normal_tail.h"

/* The normal distribution's Phi(v), and its density. */
__device__ __forceinline__ float normal_cdf(float v, float &density) {
    float e = power_of_two(-0.5f * LOG2E * v * v);
    float tail = e * normal_tail(reciprocal(1.0f + NORMAL_TAIL_SCALE * fabsf(v)));
    density = e * NORMAL_DENSITY;
    return v > 0 ? 1.0f - tail : tail;
}

/* v = act(v), slope = act'(v). */
template <int V>
__device__ __forceinline__ void activate_with_slope(float (&v)[V], float (&slope)[V], enum activation act) {
    auto each = [&](auto f) {
#pragma unroll
        for (int j = 0; j < V; j++) f(v[j], slope[j]);
    };
    switch (act) {
    case ACTIVATION_SILU:
        return each([](float &value, float &by) {
            float s = sigmoid_of(value);
            by = s * (1.0f + value * (1.0f - s));
            value *= s;
        });
    case ACTIVATION_GELU:
        return each([](float &value, float &by) {
            float density, cdf = normal_cdf(value, density);
            by = cdf + value * density;
            value *= cdf;
        });
    case ACTIVATION_RELU2:
        return each([](float &value, float &by) {
            float positive = value < 0 ? 0 : value; /* of NaN itself */
            by = 2.0f * positive;
            value = positive * positive;
        });
    case ACTIVATION_SIGMOID: /* 1 - s would lose the digits of a gate that is nearly open */
        return each([](float &value, float &by) {
            float e = power_of_two(-LOG2E * fabsf(value)), larger = reciprocal(1.0f + e), smaller = e * larger;
            by = larger * smaller;
            value = value < 0 ? smaller : larger;
        });
    }
}

/* v = act(v). */
template <int V> __device__ __forceinline__ void activate(float (&v)[V], enum activation act) {
    float unused[V];
    activate_with_slope(v, unused, act);
}

#endif
