/* swiglu.c: the gate of a SwiGLU MLP.
 *
 *   forward    h = silu(gate) up                     gate_up (R,2F) = [gate | up], h (R,F)
 *   backward   dgate = dh up silu'(gate);   dup = dh silu(gate)
 *
 * Elements of memory traffic: forward 3RF, backward 5RF; one exp and about 5 (11) FLOPs an element. Bound by memory
 * bandwidth. Deterministic: elements are independent. */
#include "kernels/cpu/cpu.h"

void OP(swiglu_forward)(struct device *dev, tensor h, tensor gate_up) {
    (void)dev;
    int64_t R = h.dim[0], F = h.dim[1];
    CHECK_DENSE(h, R, F);
    CHECK_DENSE(gate_up, R, 2 * F);

#pragma omp parallel for schedule(static) if (R * F > 4096)
    for (int64_t r = 0; r < R; r++) {
        const real *restrict gate = row_of(gate_up, r), *restrict up = gate + F;
        real *restrict out = row_of(h, r);
#pragma omp simd
        for (int64_t i = 0; i < F; i++) out[i] = silu(gate[i]) * up[i];
    }
}

void OP(swiglu_backward)(struct device *dev, tensor dgate_up, tensor dh, tensor gate_up) {
    (void)dev;
    int64_t R = dh.dim[0], F = dh.dim[1];
    CHECK_DENSE(dh, R, F);
    CHECK_DENSE(gate_up, R, 2 * F);
    CHECK_DENSE(dgate_up, R, 2 * F);

#pragma omp parallel for schedule(static) if (R * F > 4096)
    for (int64_t r = 0; r < R; r++) {
        const real *restrict gate = row_of(gate_up, r), *restrict up = gate + F, *restrict dout = row_of(dh, r);
        real *restrict dgate = row_of(dgate_up, r), *restrict dup = dgate + F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            real s = sigmoid(gate[i]), silu_gate = gate[i] * s;
            dgate[i] = dout[i] * up[i] * (s * ((real)1 + gate[i] * ((real)1 - s)));
            dup[i] = dout[i] * silu_gate;
        }
    }
}
