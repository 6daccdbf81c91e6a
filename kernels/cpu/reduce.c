/* reduce.c: sums over rows in a fixed order, shared by the operations that have gradients of vectors (norms, biases).
 *
 * Both are bound by memory bandwidth and give each thread columns of its own, so no sum is shared between threads and
 * the bits don't depend on their number. */
#include "kernels/cpu/cpu.h"

#define COLUMNS_AT_ONCE 256

void add_partials(real *sum, const real *partial, int64_t blocks, int64_t n) {
#pragma omp parallel for schedule(static) if (blocks * n > 16384)
    for (int64_t from = 0; from < n; from += COLUMNS_AT_ONCE) {
        int64_t to = from + COLUMNS_AT_ONCE < n ? from + COLUMNS_AT_ONCE : n;
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t i = from; i < to; i++) sum[i] += partial[b * n + i];
    }
}

void add_column_sums(real *sum, const real *rows, int64_t R, int64_t n, int64_t stride) {
#pragma omp parallel for schedule(static) if (R * n > 16384)
    for (int64_t from = 0; from < n; from += COLUMNS_AT_ONCE) {
        int64_t count = from + COLUMNS_AT_ONCE < n ? COLUMNS_AT_ONCE : n - from;
        double total[COLUMNS_AT_ONCE] = {0}; /* in double: R may be 10^5 and more */
        for (int64_t r = 0; r < R; r++)
            for (int64_t i = 0; i < count; i++) total[i] += (double)rows[r * stride + from + i];
        for (int64_t i = 0; i < count; i++) sum[from + i] += (real)total[i];
    }
}
