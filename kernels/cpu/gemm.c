/* gemm.c: C = alpha op(A) op(B) + beta C, row-major: OpenBLAS where the build has it, else riverrun's own loops, which
 * also do the small products where they are faster (SMALL_PRODUCT).
 *
 * The loops (gemm_plain) are always compiled, so that the tests can compare the two. The threads share C in panels. In
 * a panel, GEMM_DEPTH terms of the sums and BLOCK_COLUMNS columns at a time:
 *   - a block of op(B) is copied into contiguous strips of GEMM_COLUMNS columns, transposed in registers where B is
 *     stored transposed; a panel of few rows reads B where it lies, because a copy would not pay;
 *   - GEMM_ROWS rows of op(A) are copied into a strip, and the tile of C under each strip of op(B) is summed up in
 *     vector registers: GEMM_ROWS x GEMM_VECTORS accumulators.
 * A block of op(B) stays in the second cache, the strip of op(A) in the first.
 *
 * 2MNK FLOPs. Each element of C is summed in the order of k by one thread, in equal parts of at most GEMM_DEPTH terms:
 * its bits depend on M, N, K only, those of OpenBLAS's large products on the number of threads as well. Called by
 * linear.c, head_loss.c and ssd.c. */
#include "common/error.h"
#include "kernels/cpu/real.h"
#include <limits.h>

#ifdef RIVERRUN_OPENBLAS
#include <cblas.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* Multiply-adds up to which a product is worked out by the loops below although there is OpenBLAS. With AVX-512,
 * products of 64 to 128 rows, columns and terms take 0.7 to 1.04 times as long as in OpenBLAS 0.3.21; from some
 * hundreds on it is OpenBLAS that is faster. Without AVX-512 nothing was measured. */
#if defined(__AVX512F__)
#define SMALL_PRODUCT (160 * 160 * 160)
#else
#define SMALL_PRODUCT 0
#endif

/* A vector as wide as the machine's registers, or one that the compiler splits. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define GEMM_ROWS 12
#else
#define VECTOR_BYTES 32
#define GEMM_ROWS 6
#endif
typedef real vector __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(sizeof(real)))); /* anywhere */

#define LANES ((int64_t)(VECTOR_BYTES / sizeof(real)))
#define GEMM_VECTORS 2
#define GEMM_THIRD (GEMM_ROWS / 3) /* tiles have one, two or three thirds of the rows: fewer at the lower edge */
#define GEMM_COLUMNS (GEMM_VECTORS * LANES)
#define GEMM_DEPTH 256
#define STRIP_ROWS ((GEMM_ROWS + LANES - 1) / LANES * LANES) /* from term to term of a strip of A */
#define BLOCK_COLUMNS (12 * GEMM_COLUMNS)
#define ROWS_UNPACKED 192    /* of a panel; with more it pays to copy B */
#define AHEAD 8              /* terms between asking for a row of op(B) and using it */
#define PARALLEL_MIN 1000000 /* multiply-adds; fewer are not worth waking threads */

struct product {
    bool transA, transB;
    int64_t M, N, K;
    real alpha, beta;
    const real *A, *B;
    real *C;
    int64_t lda, ldb, ldc;
};

static inline int64_t at_most(int64_t a, int64_t most) {
    return a < most ? a : most;
}

/* --- copies of the operands --------------------------------------------------------------------------------------- */

/* Lane l of one of the two rows that take part in a step of a transposition: rows `s` apart swap blocks of s lanes. */
#define OF_FIRST(l, s) ((l) & (s) ? VECTOR_BYTES / sizeof(real) + (l) - (s) : (l))
#define OF_SECOND(l, s) ((l) & (s) ? VECTOR_BYTES / sizeof(real) + (l) : (l) + (s))
#define LIST4(f, s, l) f((l), s), f((l) + 1, s), f((l) + 2, s), f((l) + 3, s)
#define LIST8(f, s, l) LIST4(f, s, l), LIST4(f, s, (l) + 4)
#define LIST16(f, s, l) LIST8(f, s, l), LIST8(f, s, (l) + 8)
#if VECTOR_BYTES == 64 && defined(REAL_IS_FLOAT)
#define LIST LIST16
#elif VECTOR_BYTES == 64 || defined(REAL_IS_FLOAT)
#define LIST LIST8
#else
#define LIST LIST4
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#ifdef REAL_IS_FLOAT
typedef int32_t lane_numbers __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int64_t lane_numbers __attribute__((vector_size(VECTOR_BYTES)));
#endif
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lane_numbers){__VA_ARGS__})
#endif
#define SWAP_BLOCKS(s)                                                                                                 \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) {                                                         \
        if (i & (s)) continue;                                                                                         \
        vector first = row[i], second = row[i + (s)];                                                                  \
        row[i] = SHUFFLE(first, second, LIST(OF_FIRST, s, 0));                                                         \
        row[i + (s)] = SHUFFLE(first, second, LIST(OF_SECOND, s, 0));                                                  \
    }

/* to[k][j] = from[j][k] for LANES x LANES elements, in registers; rows from `rows` on are taken as 0. */
static inline void transpose(real *to, int64_t to_step, const real *from, int64_t from_step, int64_t rows) {
    vector row[VECTOR_BYTES / sizeof(real)];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) row[j] = j < rows ? *(const vector *)(from + j * from_step) : (vector){0};
    SWAP_BLOCKS(1)
    SWAP_BLOCKS(2)
#if VECTOR_BYTES == 64 || defined(REAL_IS_FLOAT)
    SWAP_BLOCKS(4)
#endif
#if VECTOR_BYTES == 64 && defined(REAL_IS_FLOAT)
    SWAP_BLOCKS(8)
#endif
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) *(vector *)(to + k * to_step) = row[k];
}

/* strip[k * STRIP_ROWS + i] = op(A)[i0+i][k0+k] for i < GEMM_ROWS; 0 beyond the last row. */
static void pack_rows(const struct product *g, int64_t i0, int64_t rows, int64_t k0, int64_t depth, real *strip) {
    if (g->transA) {
        const real *from = g->A + k0 * g->lda + i0;
        if (rows == GEMM_ROWS)
            for (int64_t k = 0; k < depth; k++)
                memcpy(strip + k * STRIP_ROWS, from + k * g->lda, GEMM_ROWS * sizeof(real));
        else
            for (int64_t k = 0; k < depth; k++)
                for (int64_t i = 0; i < GEMM_ROWS; i++) strip[k * STRIP_ROWS + i] = i < rows ? from[k * g->lda + i] : 0;
        return;
    }
    for (int64_t i = 0; i < STRIP_ROWS; i += LANES) {
        const real *from = g->A + (i0 + i) * g->lda + k0;
        int64_t whole = depth / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES)
            transpose(strip + k * STRIP_ROWS + i, STRIP_ROWS, from + k, g->lda, rows - i);
        for (int64_t k = whole; k < depth; k++)
            for (int64_t j = 0; j < LANES; j++) strip[k * STRIP_ROWS + i + j] = i + j < rows ? from[j * g->lda + k] : 0;
    }
}

/* strip[k][j] = op(B)[k0+k][j0+j], 0 beyond the last column. */
static void pack_columns(const struct product *g, int64_t j0, int64_t columns, int64_t k0, int64_t depth, real *strip) {
    columns = at_most(columns, GEMM_COLUMNS);
    if (!g->transB) {
        for (int64_t k = 0; k < depth; k++) {
            const real *from = g->B + (k0 + k) * g->ldb + j0;
            real *to = strip + k * GEMM_COLUMNS;
            if (columns == GEMM_COLUMNS) memcpy(to, from, GEMM_COLUMNS * sizeof(real));
            else
                for (int64_t j = 0; j < GEMM_COLUMNS; j++) to[j] = j < columns ? from[j] : 0;
        }
        return;
    }
    for (int64_t j = 0; j < GEMM_COLUMNS; j += LANES) {
        const real *from = g->B + (j0 + j) * g->ldb + k0;
        int64_t whole = depth / LANES * LANES;
        for (int64_t k = 0; k < whole; k += LANES)
            transpose(strip + k * GEMM_COLUMNS + j, GEMM_COLUMNS, from + k, g->ldb, columns - j);
        for (int64_t k = whole; k < depth; k++)
            for (int64_t i = 0; i < LANES; i++)
                strip[k * GEMM_COLUMNS + j + i] = j + i < columns ? from[i * g->ldb + k] : 0;
    }
}

/* --- a tile of C -------------------------------------------------------------------------------------------------- */

/* Element (i,k) of op(A) lies at a[k * STRIP_ROWS + i], (k,j) of op(B) at b[k * b_step + j]. */
struct operands {
    const real *a, *b;
    int64_t b_step, depth;
};

/* Where the sums go: C = beta C + alpha sums, `rows` x `columns` of it. */
struct target {
    real *C;
    int64_t ldc, rows, columns;
    real alpha, beta;
};

/* C's part of the tile from sums that were put into memory, for tiles over the edge. beta = 0 does not read C. */
static void store_part(const struct target *t, const real *tile) {
    for (int64_t i = 0; i < t->rows; i++) {
        real *to = t->C + i * t->ldc;
        const real *from = tile + i * GEMM_COLUMNS;
        if (t->beta == 0)
            for (int64_t j = 0; j < t->columns; j++) to[j] = t->alpha * from[j];
        else
            for (int64_t j = 0; j < t->columns; j++) to[j] = t->beta * to[j] + t->alpha * from[j];
    }
}

/* One tile; `rows` and `vectors` are constants where this is inlined, so that the sums are registers. C, which the sums
 * will meet at the end, is asked for first. */
__attribute__((always_inline)) static inline void multiply_tile(const struct operands *o, const struct target *t,
                                                                const int rows, const int vectors) {
    vector sum[GEMM_ROWS][GEMM_VECTORS];
    const real *a = o->a, *b = o->b;
    const int64_t b_step = o->b_step;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        __builtin_prefetch(t->C + (i < t->rows ? i : 0) * t->ldc, 1);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[i][v] = (vector){0};
    }
    for (int64_t k = 0; k < o->depth; k++, a += STRIP_ROWS, b += b_step) {
        vector of_b[GEMM_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            of_b[v] = *(const vector *)(b + v * LANES);
            __builtin_prefetch(b + AHEAD * b_step + v * LANES);
        }
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[i][v] += a[i] * of_b[v];
        }
    }
    if (t->rows < rows || t->columns < vectors * LANES) {
        real tile[GEMM_ROWS * GEMM_COLUMNS];
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++) *(vector *)(tile + i * GEMM_COLUMNS + v * LANES) = sum[i][v];
        store_part(t, tile);
        return;
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            vector *to = (vector *)(t->C + i * t->ldc + v * LANES);
            if (t->beta == 0) *to = t->alpha * sum[i][v];
            else *to = t->beta * *to + t->alpha * sum[i][v];
        }
    }
}

/* Rows and vectors that hold only zeros of a strip's end are left out. */
static void multiply_any_tile(const struct operands *o, const struct target *t) {
    bool narrow = t->columns <= LANES;
    switch ((t->rows + GEMM_THIRD - 1) / GEMM_THIRD) {
    case 1:
        if (narrow) multiply_tile(o, t, GEMM_THIRD, 1);
        else multiply_tile(o, t, GEMM_THIRD, 2);
        return;
    case 2:
        if (narrow) multiply_tile(o, t, 2 * GEMM_THIRD, 1);
        else multiply_tile(o, t, 2 * GEMM_THIRD, 2);
        return;
    default:
        if (narrow) multiply_tile(o, t, GEMM_ROWS, 1);
        else multiply_tile(o, t, GEMM_ROWS, 2);
        return;
    }
}

/* --- a panel, and the whole --------------------------------------------------------------------------------------- */

/* Rows i0..i1-1 and columns j0..j1-1 of C, `depth` terms from k0 on; j1 - j0 is at most BLOCK_COLUMNS. */
static void multiply_block(const struct product *g, int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t k0,
                           int64_t depth) {
    real block[GEMM_DEPTH * BLOCK_COLUMNS] __attribute__((aligned(64)));
    real strip[GEMM_DEPTH * STRIP_ROWS] __attribute__((aligned(64)));
    bool unpacked = !g->transB && i1 - i0 <= ROWS_UNPACKED;
    for (int64_t j = j0; j < j1; j += GEMM_COLUMNS)
        if (!unpacked || at_most(j1 - j, GEMM_COLUMNS) % LANES != 0)
            pack_columns(g, j, j1 - j, k0, depth, block + (j - j0) * GEMM_DEPTH);

    struct operands o = {.a = strip, .depth = depth};
    struct target t = {.ldc = g->ldc, .alpha = g->alpha, .beta = k0 == 0 ? g->beta : 1};
    for (int64_t i = i0; i < i1; i += GEMM_ROWS) {
        t.rows = at_most(i1 - i, GEMM_ROWS);
        pack_rows(g, i, t.rows, k0, depth, strip);
        for (int64_t j = j0; j < j1; j += GEMM_COLUMNS) {
            t.columns = at_most(j1 - j, GEMM_COLUMNS);
            t.C = g->C + i * g->ldc + j;
            if (unpacked && t.columns % LANES == 0) o.b = g->B + k0 * g->ldb + j, o.b_step = g->ldb;
            else o.b = block + (j - j0) * GEMM_DEPTH, o.b_step = GEMM_COLUMNS;
            multiply_any_tile(&o, &t);
        }
    }
}

static void multiply_panel(const struct product *g, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    int64_t parts = (g->K + GEMM_DEPTH - 1) / GEMM_DEPTH;
    if (parts == 0) parts = 1; /* K = 0 still scales C */
    int64_t depth = (g->K + parts - 1) / parts;
    for (int64_t j = j0; j < j1; j += BLOCK_COLUMNS)
        for (int64_t part = 0; part < parts; part++)
            multiply_block(g, i0, i1, j, at_most(j + BLOCK_COLUMNS, j1), part * depth,
                           at_most(g->K - part * depth, depth));
}

/* How many threads share a product: one inside a parallel region. */
static int64_t sharers(const struct product *g) {
    (void)g;
#ifdef _OPENMP
    if (g->M * g->N * g->K >= PARALLEL_MIN && !omp_in_parallel()) return omp_get_max_threads();
#endif
    return 1;
}

/* Of all ways to cut C into `threads` panels, `down` x `across`, the one that reads the least: each panel takes all of
 * its rows of A and its columns of B. */
static int64_t panels_down(const struct product *g, int64_t threads) {
    int64_t best = threads;
    for (int64_t down = 1; down <= threads; down++)
        if (threads % down == 0 && down * g->N + threads / down * g->M < best * g->N + threads / best * g->M)
            best = down;
    return best;
}

/* Where panel `index` of `count` begins: at a multiple of `unit` elements, `limit` at the end. */
static int64_t panel_first(int64_t limit, int64_t unit, int64_t count, int64_t index) {
    int64_t units = (limit + unit - 1) / unit;
    return at_most(units * index / count * unit, limit);
}

void gemm_plain(bool transA, bool transB, int64_t M, int64_t N, int64_t K, real alpha, const real *A, int64_t lda,
                const real *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    struct product g = {transA, transB, M, N, K, alpha, beta, A, B, C, lda, ldb, ldc};
    int64_t threads = sharers(&g);
    if (threads == 1) {
        multiply_panel(&g, 0, M, 0, N);
        return;
    }
    int64_t down = panels_down(&g, threads), across = threads / down;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < threads; p++) {
        int64_t row = p / across, column = p % across;
        multiply_panel(&g, panel_first(M, GEMM_ROWS, down, row), panel_first(M, GEMM_ROWS, down, row + 1),
                       panel_first(N, GEMM_COLUMNS, across, column), panel_first(N, GEMM_COLUMNS, across, column + 1));
    }
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
    if (M <= ROWS_UNPACKED && M * N * K <= SMALL_PRODUCT) {
        gemm_plain(transA, transB, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
        return;
    }
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
