/* mma.h: the instructions of kernels/cuda/mma.cuh, which includes this in its place and says what they do. */
#ifndef RIVERRUN_TEST_EMULATION_MMA_H
#define RIVERRUN_TEST_EMULATION_MMA_H

#include "emulation.h"

#include <math.h>

namespace emulation {

/* The operands of one lane; m16n8k8 has half of a and b. */
struct product {
    float *d;
    const uint32_t *a, *b;
};

/* D (16,8) += A (16,K) B (K,8); the sum of a column's products is added up along k. (mma.cc) */
void product_k16(void **all);
void product_k8(void **all);

/* `matrices` registers of one lane, and the row that it gives the address of. */
struct fragment {
    uint32_t *to;
    const void *row;
};
void fragments_x4(void **all);
void fragments_x2(void **all);
void fragments_x4_transposed(void **all);
void fragments_x2_transposed(void **all);
void fragment_turned(void **all); /* each lane's register, in place */

static inline void load_fragments(const char *what, uint32_t *to, const void *row, meeting *work) {
    fragment mine = {to, row};
    meet(what, ALL_LANES, &mine, work, true);
}

} // namespace emulation

static inline void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::product mine = {d, a, b};
    emulation::meet("mma_bf16_m16n8k16", emulation::ALL_LANES, &mine, emulation::product_k16, true);
}

static inline void mma_bf16_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    emulation::product mine = {d, a, &b};
    emulation::meet("mma_bf16_m16n8k8", emulation::ALL_LANES, &mine, emulation::product_k8, true);
}

static inline void ldmatrix_x4(uint32_t (&to)[4], const void *shared) {
    emulation::load_fragments("ldmatrix_x4", to, shared, emulation::fragments_x4);
}

static inline void ldmatrix_x2(uint32_t (&to)[2], const void *shared) {
    emulation::load_fragments("ldmatrix_x2", to, shared, emulation::fragments_x2);
}

static inline void ldmatrix_x4_transposed(uint32_t (&to)[4], const void *shared) {
    emulation::load_fragments("ldmatrix_x4_transposed", to, shared, emulation::fragments_x4_transposed);
}

static inline void ldmatrix_x2_transposed(uint32_t (&to)[2], const void *shared) {
    emulation::load_fragments("ldmatrix_x2_transposed", to, shared, emulation::fragments_x2_transposed);
}

static inline uint32_t transposed(uint32_t pair) {
    emulation::meet("transposed", emulation::ALL_LANES, &pair, emulation::fragment_turned, true);
    return pair;
}

template <int SIZE> static inline void cp_async(void *shared, const void *global, int bytes = SIZE) {
    static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16, "the sizes there are");
    emulation::copy_start(shared, global, SIZE, bytes);
}

static inline void cp_async_16_or_zeros(void *shared, const void *global, bool there) {
    emulation::copy_start(shared, global, 16, there ? 16 : 0);
}

static inline void cp_async_16_or_zeros_of_row(void *shared, const void *global, bool there) {
    cp_async_16_or_zeros(shared, global, there);
}

static inline void cp_async_commit() {
    emulation::copy_commit();
}

template <int N> static inline void cp_async_wait() {
    emulation::copy_wait(N);
}

static inline void prefetch_line(const void *) {
}

/* Subnormal arguments and results are 0. */
static inline float reciprocal(float v) {
    float result = 1 / (fabsf(v) < 0x1p-126f ? copysignf(0, v) : v);
    return fabsf(result) < 0x1p-126f ? copysignf(0, result) : result;
}

static inline float power_of_two(float v) {
    float result = exp2f(v);
    return result < 0x1p-126f ? 0 : result;
}

#endif
