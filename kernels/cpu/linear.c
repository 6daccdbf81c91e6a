/* linear.c: y = x w^T + bias and its gradients, three matrix products.
 *
 *   forward    y (R,O) = x (R,I) w^T (I,O), plus bias (O) in every row
 *   backward   dx (R,I) = or += dy w;   dw (O,I) += dy^T x;   dbias (O) += sum of dy's rows
 *
 * 2RIO FLOPs a product; bytes RI + RO + OI elements a product, so bound by arithmetic from R of some dozens on.
 * Deterministic for a fixed number of threads (OpenBLAS divides its sums by threads; dbias doesn't depend on them). */
#include "kernels/cpu/cpu.h"

void OP(linear_forward)(struct device *dev, tensor y, tensor x, tensor w, tensor bias) {
    (void)dev;
    int64_t R = x.dim[0], I = x.dim[1], O = w.dim[0];
    CHECK_ROWS(y, R, O);
    CHECK_ROWS(x, R, I);
    CHECK_DENSE(w, O, I);
    CHECK_OPTIONAL(bias, O);
    bool biased = tensor_given(bias);

    if (biased) { /* every row starts as the bias, and the product is added to it */
#pragma omp parallel for schedule(static) if (R * O > 16384)
        for (int64_t r = 0; r < R; r++) memcpy(row_of(y, r), bias.data, (size_t)O * sizeof(real));
    }
    gemm(false, true, R, O, I, 1, x.data, x.stride[0], w.data, I, biased ? 1 : 0, y.data, y.stride[0]);
}

void OP(linear_backward)(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dbias, tensor dy, tensor x,
                         tensor w) {
    (void)dev;
    int64_t R = dy.dim[0], O = dy.dim[1], I = w.dim[1];
    CHECK_ROWS(dy, R, O);
    CHECK_ROWS(x, R, I);
    CHECK_DENSE(w, O, I);
    CHECK_OPTIONAL_ROWS(dx, R, I);
    CHECK_OPTIONAL(dw, O, I);
    CHECK_OPTIONAL(dbias, O);

    if (tensor_given(dx))
        gemm(false, false, R, I, O, 1, dy.data, dy.stride[0], w.data, I, add_dx ? 1 : 0, dx.data, dx.stride[0]);
    if (tensor_given(dw))
        gemm(true, false, O, I, R, 1, dy.data, dy.stride[0], x.data, x.stride[0], dw.empty ? 0 : 1, dw.data, I);
    if (tensor_given(dbias)) add_column_sums(dbias.data, dy.data, R, O, dy.stride[0]);
}
