/* glu.c: the activation of an MLP, gated (SwiGLU, GEGLU and their like) or plain.
 *
 *   forward    h = act(gate) up                        u (R,2F) = [gate | up], h (R,F)
 *   backward   dgate = dh up act'(gate);   dup = dh act(gate)
 *   forward    h = act(u);   backward   du = dh act'(u)              u (R,F)
 *
 * Elements of memory traffic: forward 3RF, backward 5RF; without a gate 2RF and 3RF. One exp and 5 to 30 FLOPs an
 * element. Bound by memory bandwidth. Deterministic: elements are independent. */
#include "kernels/cpu/activation.h"
#include "kernels/cpu/cpu.h"

/* `up` is NULL without a gate. */
static inline __attribute__((always_inline)) void forward_row(real *restrict h, const real *restrict gate,
                                                              const real *restrict up, int64_t F, enum activation act) {
    if (up) {
#pragma omp simd
        for (int64_t i = 0; i < F; i++) h[i] = activation_of(act, gate[i]) * up[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < F; i++) h[i] = activation_of(act, gate[i]);
    }
}

static inline __attribute__((always_inline)) void backward_row(real *restrict dgate, real *restrict dup,
                                                               const real *restrict dh, const real *restrict gate,
                                                               const real *restrict up, int64_t F,
                                                               enum activation act) {
    if (up) {
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            real slope, value = activation_and_slope(act, gate[i], &slope);
            dgate[i] = dh[i] * up[i] * slope;
            dup[i] = dh[i] * value;
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            real slope;
            activation_and_slope(act, gate[i], &slope);
            dgate[i] = dh[i] * slope;
        }
    }
}

/* Is u (R,2F), beside h (R,F)? */
static bool is_gated(tensor h, tensor u) {
    int64_t R = h.dim[0], F = h.dim[1];
    bool gated = u.dim[1] != F;
    CHECK_DENSE(h, R, F);
    CHECK_DENSE(u, R, gated ? 2 * F : F);
    return gated;
}

void OP(glu_forward)(struct device *dev, tensor h, tensor u, enum activation act) {
    (void)dev;
    int64_t R = h.dim[0], F = h.dim[1];
    bool gated = is_gated(h, u);

#pragma omp parallel for schedule(static) if (R * F > 4096)
    for (int64_t r = 0; r < R; r++) {
        const real *gate = row_of(u, r), *up = gated ? gate + F : NULL;
        WITH_ACTIVATION(act, forward_row, row_of(h, r), gate, up, F);
    }
}

void OP(glu_backward)(struct device *dev, tensor du, tensor dh, tensor u, enum activation act) {
    (void)dev;
    int64_t R = dh.dim[0], F = dh.dim[1];
    bool gated = is_gated(dh, u);
    CHECK_DENSE(du, R, u.dim[1]);

#pragma omp parallel for schedule(static) if (R * F > 4096)
    for (int64_t r = 0; r < R; r++) {
        const real *gate = row_of(u, r), *up = gated ? gate + F : NULL;
        real *dgate = row_of(du, r), *dup = gated ? dgate + F : NULL;
        WITH_ACTIVATION(act, backward_row, dgate, dup, row_of(dh, r), gate, up, F);
    }
}
