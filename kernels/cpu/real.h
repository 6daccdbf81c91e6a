/* real.h: the number type that a file of kernels/cpu/ is compiled for, and the mathematics that depends on it.
 *
 * Every file of kernels/cpu/ is compiled twice: with REAL_IS_FLOAT for the table that trains, and with REAL_IS_DOUBLE
 * for the oracle that everything else is compared with. `real` is the type, OP(name) a function's name in that table.
 *
 * The functions of one number are inline, branch-free in float, and built from operations that have vector forms, so
 * that a loop over them (under `#pragma omp simd` where it reduces) runs in SIMD without -ffast-math. */
#ifndef RIVERRUN_CPU_REAL_H
#define RIVERRUN_CPU_REAL_H

#include "kernels/tensor.h"
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(REAL_IS_FLOAT) && !defined(REAL_IS_DOUBLE)
typedef float real;
#define OP(name) name##_f32
#define REAL_DTYPE DTYPE_F32
#define REAL_EPS FLT_EPSILON
#define REAL_MAX FLT_MAX
#define REAL_MIN FLT_MIN       /* the smallest normal number; arithmetic below it is a hundred times slower */
#define REAL_EXP_LOWEST -87.0f /* exp of it is just above REAL_MIN */
#elif defined(REAL_IS_DOUBLE) && !defined(REAL_IS_FLOAT)
typedef double real;
#define OP(name) name##_f64
#define REAL_DTYPE DTYPE_F64
#define REAL_EPS DBL_EPSILON
#define REAL_MAX DBL_MAX
#define REAL_MIN DBL_MIN
#define REAL_EXP_LOWEST -708.0
#else
#error "compile with -DREAL_IS_FLOAT or -DREAL_IS_DOUBLE"
#endif

/* C (M,N) = alpha op(A) op(B) + beta C, all row-major with leading dimensions lda, ldb, ldc (elements from row to row).
 * op(A) is (M,K): A is stored (M,K), or (K,M) when transA; op(B) is (K,N): B is stored (K,N), or (N,K) when transB.
 * beta = 0 overwrites C whatever it held. Any size may be 0. Sizes beyond BLAS's int are a programmer error.
 * Call it outside OpenMP regions and it uses all threads; inside a region it uses the calling thread only. */
#define gemm OP(gemm)
void gemm(bool transA, bool transB, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda,
          const real *B, int64_t ldb, real beta, real *C, int64_t ldc);

/* The same by riverrun's own loops: what gemm is without OpenBLAS, and for small products. Its bits don't depend on the
 * number of threads. */
#define gemm_plain OP(gemm_plain)
void gemm_plain(bool transA, bool transB, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda,
                const real *B, int64_t ldb, real beta, real *C, int64_t ldc);

/* exp(v). In float within 1.03 ulp of the true value over the whole range, subnormal results, 0, infinity, NaN
 * included: v = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r), then two exact multiplications by powers of 2
 * (two, because 2^n alone would overflow or underflow at the ends of the range). */
static inline real exp_real(real v) {
#ifdef REAL_IS_FLOAT
    /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; comparisons let NaN pass. */
    const float round_to_int = 12582912.0f;
    v = v > 89.0f ? 89.0f : v;
    v = v < -105.0f ? -105.0f : v;
    float shifted = v * 1.44269504088896341f + round_to_int;
    float n = shifted - round_to_int;
    float r = v - n * 0.693359375f;  /* the high bits of ln 2: n times them is exact */
    r = r - n * -2.12194440e-4f;     /* the rest */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    int32_t whole = (int32_t)(bits - 0x4B400000u); /* n as an integer; of NaN anything, p is NaN then */
    int32_t half = whole >> 1;
    uint32_t bits1 = (uint32_t)(half + 127) << 23, bits2 = (uint32_t)(whole - half + 127) << 23;
    float scale1, scale2;
    memcpy(&scale1, &bits1, sizeof scale1);
    memcpy(&scale2, &bits2, sizeof scale2);
    return p * scale1 * scale2;
#else
    return exp(v);
#endif
}

/* 2^v for v <= 0, cheaper than exp_real because the exponent needs one bound only: anything below EXP2_LOWEST counts as
 * it, so that no result is zero or subnormal. In float within 1 ulp above that where the compiler fuses products with
 * sums, within 1.25 where it rounds them apart; 2^0 is exactly 1, NaN stays NaN. */
#ifdef REAL_IS_FLOAT
#define EXP2_LOWEST -100.0f
#else
#define EXP2_LOWEST -1000.0
#endif
static inline real exp2_decay(real v) {
    v = v < EXP2_LOWEST ? EXP2_LOWEST : v;
#ifdef REAL_IS_FLOAT
    const float round_to_int = 12582912.0f; /* as in exp_real */
    float shifted = v + round_to_int;
    float r = v - (shifted - round_to_int); /* |r| <= 1/2, exact; below: 2^r */
    float p = 1.5353364146e-4f;
    p = p * r + 1.3398874533e-3f;
    p = p * r + 9.6184373502e-3f;
    p = p * r + 5.5503324707e-2f;
    p = p * r + 2.4022647914e-1f;
    p = p * r + 6.9314720286e-1f;
    p = p * r + 1.0f;
    uint32_t bits, whole;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&whole, &shifted, sizeof whole);
    bits += whole << 23; /* the integer is in the low bits of `whole`: it is added to the exponent */
    memcpy(&p, &bits, sizeof p);
    return p;
#else
    return exp2(v);
#endif
}

/* 1 / (1 + exp(-v)); exp(-v) may be infinite, which gives the right 0. */
static inline real sigmoid(real v) {
    return (real)1 / ((real)1 + exp_real(-v));
}

static inline real silu(real v) {
    return v * sigmoid(v);
}

/* d silu / dv */
static inline real silu_derivative(real v) {
    real s = sigmoid(v);
    return s * ((real)1 + v * ((real)1 - s));
}

/* log1p(exp(v)) for v <= 20, else v, and its derivative: the references' definition, so that beyond 20 the derivative
 * is exactly 1. In float it is max(v, 0) + log1p(w) with w = exp(-|v|), which beyond 20 rounds to v; log1p(w) / w on
 * [0, 1] is a polynomial within 5e-9 of it. */
static inline real softplus_and_derivative(real v, real *derivative) {
#ifdef REAL_IS_FLOAT
    float w = exp_real(v > 0 ? -v : v);
    float p = -3.2568885e-3f;
    p = p * w + 1.9915603e-2f;
    p = p * w - 5.7093457e-2f;
    p = p * w + 1.0618825e-1f;
    p = p * w - 1.5315683e-1f;
    p = p * w + 1.9679921e-1f;
    p = p * w - 2.4955028e-1f;
    p = p * w + 3.3330065e-1f;
    p = p * w - 4.9999907e-1f;
    p = p * w + 9.9999999564e-1f;
    *derivative = (v > 0 ? 1 : w) / (1 + w);
    return (v > 0 ? v : 0) + p * w;
#else
    *derivative = v > 20 ? 1 : sigmoid(v);
    return v > 20 ? v : log1p(exp(v));
#endif
}

static inline real softplus(real v) {
    real derivative;
    return softplus_and_derivative(v, &derivative);
}

static inline real softplus_derivative(real v) {
    real derivative;
    softplus_and_derivative(v, &derivative);
    return derivative;
}

/* tanh(v). In float within 1.5 ulp: v + v^3 p(v^2) up to 0.625, p within 5e-9; beyond it 1 - 2 / (exp(2 |v|) + 1),
 * where an infinite exp gives the right 1. */
static inline real tanh_real(real v) {
#ifdef REAL_IS_FLOAT
    float size = v < 0 ? -v : v, w = v * v;
    float p = -5.704987175e-3f;
    p = p * w + 2.063908740e-2f;
    p = p * w - 5.373971513e-2f;
    p = p * w + 1.333144220e-1f;
    p = p * w - 3.333328194e-1f;
    float large = 1.0f - 2.0f / (exp_real(2.0f * size) + 1.0f);
    return size < 0.625f ? v + v * w * p : v < 0 ? -large : large;
#else
    return tanh(v);
#endif
}

#ifdef REAL_IS_FLOAT
static inline real sqrt_real(real v) { return sqrtf(v); }
static inline real log_real(real v) { return logf(v); }
static inline real fabs_real(real v) { return fabsf(v); }
#else
static inline real sqrt_real(real v) { return sqrt(v); }
static inline real log_real(real v) { return log(v); }
static inline real fabs_real(real v) { return fabs(v); }
#endif

#endif
