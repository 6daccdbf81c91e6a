/* gemm.c: C = alpha op(A) op(B) + beta C, row-major: OpenBLAS where the build has it, else the loops below.
 *
 * gemm_plain is always compiled, so that the tests can compare the two. It cuts C into panels of PANEL_ROWS x
 * PANEL_COLUMNS, one panel a task. Inside a panel, GEMM_DEPTH terms of the sum at a time, it copies strips of GEMM_ROWS
 * rows of op(A) and of GEMM_COLUMNS columns of op(B) into small contiguous arrays (which also takes care of the
 * transposes) and multiplies them with GEMM_ROWS x GEMM_COLUMNS accumulators held in vector registers.
 *
 * 2MNK FLOPs; bytes about (MK N/PANEL_COLUMNS + KN M/PANEL_ROWS + 2MN K/GEMM_DEPTH) elements, many of them cache hits.
 * Each element of C is summed in the order of k by one thread, GEMM_DEPTH terms at a time: its bits depend on M, N, K
 * only. OpenBLAS's depend on the number of threads as well. Called by linear.c, head_loss.c and ssd.c. */
#include "common/error.h"
#include "kernels/cpu/real.h"
#include <limits.h>

#ifdef RIVERRUN_OPENBLAS
#include <cblas.h>
#endif

/* A vector as wide as the machine's registers, or one that the compiler splits. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define GEMM_ROWS 8
#else
#define VECTOR_BYTES 32
#define GEMM_ROWS 4
#endif
typedef real vector __attribute__((vector_size(VECTOR_BYTES), may_alias));

#define GEMM_LANES ((int64_t)(VECTOR_BYTES / sizeof(real)))
#define GEMM_COLUMNS (2 * GEMM_LANES)
#define GEMM_DEPTH 256
#define PANEL_ROWS 96 /* a multiple of GEMM_ROWS */
#define PANEL_COLUMNS (8 * GEMM_COLUMNS)

struct gemm_plan {
    bool transA, transB;
    int64_t M, N, K;
    real alpha, beta;
    const real *A, *B;
    real *C;
    int64_t lda, ldb, ldc;
};

/* strip[k][i] = op(A)[i0+i][k0+k], 0 beyond the last row. */
static void pack_rows(const struct gemm_plan *g, int64_t i0, int64_t rows, int64_t k0, int64_t depth, real *strip) {
    if (g->transA) {
        for (int64_t k = 0; k < depth; k++) {
            const real *from = g->A + (k0 + k) * g->lda + i0;
            for (int64_t i = 0; i < GEMM_ROWS; i++) strip[k * GEMM_ROWS + i] = i < rows ? from[i] : 0;
        }
        return;
    }
    for (int64_t i = 0; i < GEMM_ROWS; i++) {
        const real *from = g->A + (i0 + (i < rows ? i : 0)) * g->lda + k0;
        for (int64_t k = 0; k < depth; k++) strip[k * GEMM_ROWS + i] = i < rows ? from[k] : 0;
    }
}

/* strip[k][j] = op(B)[k0+k][j0+j], 0 beyond the last column. */
static void pack_columns(const struct gemm_plan *g, int64_t j0, int64_t columns, int64_t k0, int64_t depth,
                         real *strip) {
    if (!g->transB) {
        for (int64_t k = 0; k < depth; k++) {
            const real *from = g->B + (k0 + k) * g->ldb + j0;
            for (int64_t j = 0; j < GEMM_COLUMNS; j++) strip[k * GEMM_COLUMNS + j] = j < columns ? from[j] : 0;
        }
        return;
    }
    for (int64_t j = 0; j < GEMM_COLUMNS; j++) {
        const real *from = g->B + (j0 + (j < columns ? j : 0)) * g->ldb + k0;
        for (int64_t k = 0; k < depth; k++) strip[k * GEMM_COLUMNS + j] = j < columns ? from[k] : 0;
    }
}

/* tile = left^T right: GEMM_ROWS x GEMM_COLUMNS sums over depth terms, in registers. */
static void multiply_tile(const real *left, const real *right, int64_t depth, real *tile) {
    vector sum[GEMM_ROWS][2] = {0};
    for (int64_t k = 0; k < depth; k++) {
        vector first = ((const vector *)right)[2 * k], second = ((const vector *)right)[2 * k + 1];
#pragma GCC unroll 8
        for (int i = 0; i < GEMM_ROWS; i++) {
            sum[i][0] += left[k * GEMM_ROWS + i] * first;
            sum[i][1] += left[k * GEMM_ROWS + i] * second;
        }
    }
    memcpy(tile, sum, sizeof sum);
}

/* Add the tile to C; the first part of a sum also applies beta, and beta = 0 does not read C. */
static void store_tile(const struct gemm_plan *g, const real *tile, int64_t i0, int64_t rows, int64_t j0,
                       int64_t columns, bool first) {
    real beta = first ? g->beta : 1;
    for (int64_t i = 0; i < rows; i++) {
        real *to = g->C + (i0 + i) * g->ldc + j0;
        const real *from = tile + i * GEMM_COLUMNS;
        if (beta == 0)
            for (int64_t j = 0; j < columns; j++) to[j] = g->alpha * from[j];
        else
            for (int64_t j = 0; j < columns; j++) to[j] = beta * to[j] + g->alpha * from[j];
    }
}

static inline int64_t at_most(int64_t a, int64_t most) {
    return a < most ? a : most;
}

static void multiply_panel(const struct gemm_plan *g, int64_t first_row, int64_t first_column) {
    real left[GEMM_DEPTH * PANEL_ROWS] __attribute__((aligned(64)));
    real right[GEMM_DEPTH * GEMM_COLUMNS] __attribute__((aligned(64)));
    real tile[GEMM_ROWS * GEMM_COLUMNS] __attribute__((aligned(64)));
    int64_t rows = at_most(g->M - first_row, PANEL_ROWS), columns = at_most(g->N - first_column, PANEL_COLUMNS);

    for (int64_t k0 = 0; k0 == 0 || k0 < g->K; k0 += GEMM_DEPTH) { /* K = 0 still scales C */
        int64_t depth = at_most(g->K - k0, GEMM_DEPTH);
        for (int64_t i = 0; i < rows; i += GEMM_ROWS)
            pack_rows(g, first_row + i, rows - i, k0, depth, left + i * GEMM_DEPTH);
        for (int64_t j = 0; j < columns; j += GEMM_COLUMNS) {
            pack_columns(g, first_column + j, columns - j, k0, depth, right);
            for (int64_t i = 0; i < rows; i += GEMM_ROWS) {
                multiply_tile(left + i * GEMM_DEPTH, right, depth, tile);
                store_tile(g, tile, first_row + i, at_most(rows - i, GEMM_ROWS), first_column + j,
                           at_most(columns - j, GEMM_COLUMNS), k0 == 0);
            }
        }
    }
}

void gemm_plain(bool transA, bool transB, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda,
                const real *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    struct gemm_plan g = {transA, transB, M, N, K, alpha, beta, A, B, C, lda, ldb, ldc};
    int64_t panels_down = (M + PANEL_ROWS - 1) / PANEL_ROWS, panels_across = (N + PANEL_COLUMNS - 1) / PANEL_COLUMNS;

#pragma omp parallel for schedule(static) if (M * N * K > 32768)
    for (int64_t p = 0; p < panels_down * panels_across; p++)
        multiply_panel(&g, p / panels_across * PANEL_ROWS, p % panels_across * PANEL_COLUMNS);
}

#ifdef RIVERRUN_OPENBLAS
static blasint blas_size(int64_t size) {
    ASSERT(size >= 0 && size <= INT_MAX);
    return (blasint)size;
}

/* The leading dimension of a stored (rows, columns) matrix as BLAS wants it: at least `columns`, even where a matrix of
 * one row has a view whose stride means nothing. */
static blasint leading(int64_t ld, int64_t rows, int64_t columns) {
    int64_t least = columns > 1 ? columns : 1;
    ASSERT(rows <= 1 || ld >= columns);
    return blas_size(ld > least ? ld : least);
}
#endif

void gemm(bool transA, bool transB, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda,
          const real *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    if (M == 0 || N == 0) return;
#ifdef RIVERRUN_OPENBLAS
    blasint a = leading(lda, transA ? K : M, transA ? M : K);
    blasint b = leading(ldb, transB ? N : K, transB ? K : N);
    blasint c = leading(ldc, M, N);
    CBLAS_TRANSPOSE ta = transA ? CblasTrans : CblasNoTrans, tb = transB ? CblasTrans : CblasNoTrans;
#ifdef REAL_IS_FLOAT
    cblas_sgemm(CblasRowMajor, ta, tb, blas_size(M), blas_size(N), blas_size(K), alpha, A, a, B, b, beta, C, c);
#else
    cblas_dgemm(CblasRowMajor, ta, tb, blas_size(M), blas_size(N), blas_size(K), alpha, A, a, B, b, beta, C, c);
#endif
#else
    gemm_plain(transA, transB, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
#endif
}
