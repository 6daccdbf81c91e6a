/* wgmma.h: the instructions of kernels/cuda/wgmma.cuh, which includes this in its place and says what they do. Products
 * are made when they are asked for, or, in any order of threads but the forward one (emulation.h), when they are waited
 * for: a kernel must not be able to tell. */
#ifndef RIVERRUN_TEST_EMULATION_WGMMA_H
#define RIVERRUN_TEST_EMULATION_WGMMA_H

#include "emulation.h"

struct matrix {
    const char *tile;
    int row, column;
};

namespace emulation {

/* The operands of one lane; from is NULL where a lies in shared memory. */
struct group_product {
    float (*d)[4];
    const uint32_t *from;
    matrix a, b;
    bool columns, add; /* columns: of b */
    bool a_columns;
};

/* By warps, whose rows are apart. (mma.cc) */
void group_product_all(void **all);
void group_end_all(void **all);
void group_wait_all(void **all); /* each brings the number of rounds that may be left, an int */

} // namespace emulation

static inline matrix matrix_at(const __nv_bfloat16 *tile) {
    return {(const char *)tile, 0, 0};
}

static inline matrix matrix_columns(matrix x, int k) {
    x.column += k;
    return x;
}

static inline matrix matrix_rows(matrix x, int k) {
    x.row += k;
    return x;
}

static inline __nv_bfloat16 *tile_start(__nv_bfloat16 *shared) {
    return (__nv_bfloat16 *)(((uintptr_t)shared + TILE_ALIGN - 1) / TILE_ALIGN * TILE_ALIGN);
}

static inline void shared_for_products() {
}

static inline void products_begin() {
}

static inline void products_end() {
    int none = 0;
    emulation::meet("products_end", emulation::ALL_LANES, &none, emulation::group_end_all, true);
}

template <int N> static inline void products_wait() {
    int left = N;
    emulation::meet("products_wait", emulation::ALL_LANES, &left, emulation::group_wait_all, true);
}

static inline void product_of_rows(float (&d)[8][4], matrix a, matrix b, bool add) {
    emulation::group_product mine = {d, NULL, a, b, false, add, false};
    emulation::meet("product_of_rows", emulation::ALL_LANES, &mine, emulation::group_product_all, true);
}

static inline void product_of_rows(float (&d)[8][4], const uint32_t (&a)[4], matrix b, bool add) {
    emulation::group_product mine = {d, a, {}, b, false, add, false};
    emulation::meet("product_of_rows", emulation::ALL_LANES, &mine, emulation::group_product_all, true);
}

static inline void product_of_columns(float (&d)[8][4], const uint32_t (&a)[4], matrix b) {
    emulation::group_product mine = {d, a, {}, b, true, true, false};
    emulation::meet("product_of_columns", emulation::ALL_LANES, &mine, emulation::group_product_all, true);
}

static inline void product_of_columns(float (&d)[8][4], matrix a, matrix b, bool add) {
    emulation::group_product mine = {d, NULL, a, b, true, add, false};
    emulation::meet("product_of_columns", emulation::ALL_LANES, &mine, emulation::group_product_all, true);
}

static inline void product_of_columns_and_rows(float (&d)[8][4], matrix a, matrix b, bool add) {
    emulation::group_product mine = {d, NULL, a, b, false, add, true};
    emulation::meet("product_of_columns_and_rows", emulation::ALL_LANES, &mine, emulation::group_product_all, true);
}

static inline void arrived(float (&d)[8][4]) {
    __asm__ volatile("" : : "r"(d) : "memory");
}

template <int N> static inline void arrived(uint32_t (&a)[N][4]) {
    __asm__ volatile("" : : "r"(a) : "memory");
}

#endif
