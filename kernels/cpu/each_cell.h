/* each_cell.h: the functions of one cell (kernels/cells/cells.h) on the CPU, for one channel: as its header has them,
 * and from its step by dual numbers.
 *
 * C has no operators for types of one's own, but complex numbers have them, and a small imaginary part behaves like a
 * dual number: f(x + i h) = f(x) + i h f'(x) + O(h^2). With h = 2^-40 (2^-300 in double) h^2 is far below what rounding
 * does to anything, so that derivatives are as exact as values, and nothing comes near the smallest numbers. The two
 * functions of a complex argument are given their values and slopes, the rest is the language's arithmetic.
 */
#ifndef RIVERRUN_CPU_EACH_CELL_H
#define RIVERRUN_CPU_EACH_CELL_H

#include "kernels/cpu/cell.h"

#ifdef __clang__
#pragma STDC CX_LIMITED_RANGE ON
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

#ifdef REAL_IS_FLOAT
typedef float _Complex dual;
#define DUAL_STEP 0x1p-40f
#else
typedef double _Complex dual;
#define DUAL_STEP 0x1p-300
#endif

static inline real dual_value(dual x) {
    return __real__ x;
}

static inline real dual_slope(dual x) {
    return __imag__ x;
}

static inline dual dual_of(real value, real slope) {
    dual x;
    __real__ x = value;
    __imag__ x = slope;
    return x;
}

static inline dual dual_sigmoid(dual x) {
    real y = sigmoid(dual_value(x));
    return dual_of(y, dual_slope(x) * y * (1 - y));
}

static inline dual dual_tanh(dual x) {
    real y = tanh_real(dual_value(x));
    return dual_of(y, dual_slope(x) * (1 - y * y));
}

#define cell_sigmoid(x) _Generic((x), real: sigmoid, dual: dual_sigmoid)(x)
#define cell_tanh(x) _Generic((x), real: tanh_real, dual: dual_tanh)(x)

/* The header once with real numbers, and once with dual ones, of which only the step is used. */
#define CELL_FN static inline
#define REAL real
#include CELL_HEADER
#undef REAL
#undef CELL_FN
#define CELL_FN __attribute__((unused)) static inline
#define REAL dual
#define step dual_step
#define step_jacobian dual_step_jacobian
#define step_gradient dual_step_gradient
#include CELL_HEADER
#undef REAL
#undef step
#undef step_jacobian
#undef step_gradient

enum { S = CELL_STATES, U = CELL_INPUTS, W = CELL_WEIGHTS };
_Static_assert(S <= CELL_STATES_MAX && U <= CELL_INPUTS_MAX && W <= CELL_WEIGHTS_MAX, "a cell that is too large");
_Static_assert(CELL_OUTPUT >= 0 && CELL_OUTPUT < S, "CELL_OUTPUT must be a state");

/* The numbers of one kind, of which one, perhaps, is varied. */
static inline void duals(dual *to, const real *from, int count, int varied) {
    UNROLL
    for (int k = 0; k < count; k++) to[k] = dual_of(from[k], k == varied ? DUAL_STEP : 0);
}

/* Derivatives of the states behind the token by one number: that of `before`, of u or of w with this place, and none of
 * a kind whose place is -1. The value of the states, too. */
static inline void dual_pass(const real *before, const real *u, const real *w, int in_before, int in_u, int in_w,
                             real *after, real *slope) {
    dual b[S], inputs[U], weights[W], out[S];
    duals(b, before, S, in_before);
    duals(inputs, u, U, in_u);
    duals(weights, w, W, in_w);
    dual_step(b, inputs, weights, out);
    UNROLL
    for (int i = 0; i < S; i++) {
        after[i] = dual_value(out[i]);
        slope[i] = dual_slope(out[i]) / DUAL_STEP;
    }
}

static inline void automatic_jacobian(const real *before, const real *u, const real *w, const real *now, real *after,
                                      real *J) {
    (void)now;
    UNROLL
    for (int j = 0; j < S; j++) {
        real slope[S];
        dual_pass(before, u, w, j, -1, -1, after, slope);
        UNROLL
        for (int i = 0; i < S; i++) J[i * S + j] = slope[i];
    }
}

/* <lambda, derivatives by one number>. */
static inline real dual_product(const real *before, const real *u, const real *w, const real *lambda, int in_before,
                                int in_u, int in_w) {
    real after[S], slope[S], sum = 0;
    dual_pass(before, u, w, in_before, in_u, in_w, after, slope);
    UNROLL
    for (int i = 0; i < S; i++) sum += lambda[i] * slope[i];
    return sum;
}

static inline void automatic_gradient(const real *before, const real *u, const real *w, const real *now,
                                      const real *lambda, real *dbefore, real *du, real *dw) {
    (void)now;
    UNROLL
    for (int k = 0; k < S; k++) dbefore[k] = dual_product(before, u, w, lambda, k, -1, -1);
    UNROLL
    for (int k = 0; k < U; k++) du[k] = dual_product(before, u, w, lambda, -1, k, -1);
    UNROLL
    for (int k = 0; k < W; k++) dw[k] = dual_product(before, u, w, lambda, -1, -1, k);
}

/* OWN(forward) is the name of this cell's code of that kind (CELL_CODE in kernels/cpu/cell.h). */
#define OWN(name) OWN_OF(CELL, name)
#define OWN_OF(cell, name) OWN_PASTE(cell, name)
#define OWN_PASTE(cell, name) OP(cell##_##name)

/* What the solvers call. */
#ifdef CELL_HAS_JACOBIAN
#define own_jacobian step_jacobian
#else
#define own_jacobian automatic_jacobian
#endif
#ifdef CELL_HAS_GRADIENT
#define own_gradient step_gradient
#else
#define own_gradient automatic_gradient
#endif

#endif
