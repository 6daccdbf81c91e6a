/* softcap.c: the soft cap of gates: y = cap tanh((x + bias) / cap), or x + bias where cap is 0.
 *
 *   backward   dx = dy (1 - (y / cap)^2), or dy;   dbias += sum over rows of dx
 *
 * Elements of memory traffic: forward 2RN, backward 3RN. Deterministic: dbias is summed in the order of the rows. */
#include "kernels/cpu/cpu.h"

void OP(softcap_forward)(struct device *dev, tensor y, tensor x, tensor bias, double cap) {
    (void)dev;
    int64_t R = y.dim[0], N = y.dim[1];
    CHECK_ROWS(y, R, N);
    CHECK_ROWS(x, R, N);
    CHECK_OPTIONAL(bias, N);
    real limit = (real)cap, inverse = cap != 0 ? (real)(1 / cap) : 0;

#pragma omp parallel for schedule(static) if (R * N > 4096)
    for (int64_t r = 0; r < R; r++) {
        const real *from = row_of(x, r), *shift = bias.data;
        real *to = row_of(y, r);
        for (int64_t i = 0; i < N; i++) to[i] = shift ? from[i] + shift[i] : from[i];
        if (cap == 0) continue;
        for (int64_t i = 0; i < N; i++) to[i] = limit * tanh_real(to[i] * inverse);
    }
}

void OP(softcap_backward)(struct device *dev, tensor dx, tensor dbias, tensor dy, tensor y, double cap, void *scratch) {
    (void)dev;
    (void)scratch;
    int64_t R = dy.dim[0], N = dy.dim[1];
    CHECK_ROWS(dx, R, N);
    CHECK_ROWS(dy, R, N);
    CHECK_ROWS(y, R, N);
    CHECK_OPTIONAL(dbias, N);
    real inverse = cap != 0 ? (real)(1 / cap) : 0;

#pragma omp parallel for schedule(static) if (R * N > 4096)
    for (int64_t r = 0; r < R; r++) {
        const real *from = row_of(dy, r), *value = row_of(y, r);
        real *to = row_of(dx, r);
        for (int64_t i = 0; i < N; i++) {
            real part = value[i] * inverse;
            to[i] = from[i] * (1 - part * part);
        }
    }
    if (tensor_given(dbias)) add_column_sums(dbias.data, dx.data, R, N, dx.stride[0]);
}

size_t OP(softcap_backward_scratch)(int64_t R, int64_t N) {
    (void)R;
    (void)N;
    return 0;
}
