/* gemm.cuh: matrix products on row-major operands, for the .cu files of this directory; in linear.cu. */
#ifndef RIVERRUN_CUDA_GEMM_CUH
#define RIVERRUN_CUDA_GEMM_CUH

#include "kernels/cuda/launch.cuh"

#include <string.h>

/* A row-major matrix: `step` elements from row to row; or several, `next` elements from one to the next. */
struct gemm_operand {
    void *data;
    enum dtype dtype;
    int64_t step;
    bool transposed; /* the product takes its transpose */
    int64_t next;
};

static inline struct gemm_operand gemm_rows(tensor t) {
    ASSERT(t.ndim == 2);
    return {t.data, t.dtype, t.dim[0] > 1 ? t.stride[0] : t.dim[1], false, 0};
}

static inline struct gemm_operand gemm_transposed(tensor t) {
    struct gemm_operand operand = gemm_rows(t);
    operand.transposed = true;
    return operand;
}

/* to (m,n) = alpha op(a) op(b) + beta to, op(a) (m,k), op(b) (k,n); operands of one type, added in fp32. `count` such
 * products of matrices that follow each other. */
void cuda_gemm(struct device *dev, struct gemm_operand a, struct gemm_operand b, struct gemm_operand to, int64_t m,
               int64_t n, int64_t k, float alpha, float beta, int64_t count = 1);

#endif
