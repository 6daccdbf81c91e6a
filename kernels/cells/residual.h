/* residual.h: what Newton's method says of a solution that it does not evaluate. Included by the solvers of both
 * devices. */
#ifndef RIVERRUN_RESIDUAL_H
#define RIVERRUN_RESIDUAL_H

#ifdef __CUDACC__
#define CELL_RESIDUAL static __host__ __device__ inline
#else
#define CELL_RESIDUAL static inline
#endif

/* The residual that the last correction leaves, from the one that it started from. Convergence is quadratic with a
 * factor below 1 for the cells of the paper (docs/pararnn.md), so the square bounds it; from 1 on nothing says that the
 * correction helped. What is not a number counts as infinite. */
CELL_RESIDUAL float cell_newton_residual(float before) {
    if (before < 1) return before * before;
    return before <= 3.4028235e38f ? before : __builtin_inff();
}

#endif
