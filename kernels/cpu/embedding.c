/* embedding.c: rows of a table by token, and the scatter of their gradients.
 *
 *   forward    out[r] = table[tokens[r]]            out (R,D), tokens (R), table (V,D)
 *   backward   dtable[tokens[r]] += dout[r]         rows in order
 *
 * No arithmetic in forward, R*D additions in backward; bytes: forward 2RD elements, backward 3RD (read dout, read and
 * write the table's rows), plus 4R for tokens. Bound by memory, in backward by its latency when the table is large.
 * Deterministic: in backward each thread owns a range of columns and walks all rows in order, so every element of
 * dtable is summed in row order whatever the number of threads. Called for the first and last thing of a step. */
#include "kernels/cpu/cpu.h"
#ifdef _OPENMP
#include <omp.h>
#endif

/* Columns for each thread: whole cache lines, and as many as possible, because every range walks through all tokens and
 * meets the table's pages anew. The sums don't depend on it. */
static int64_t columns_each(int64_t D) {
    int64_t threads = 1, line = 64 / (int64_t)sizeof(real);
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    int64_t columns = (D + threads - 1) / threads;
    return columns < 4 * line ? 4 * line : (columns + line - 1) / line * line;
}

void OP(embedding_forward)(struct device *dev, tensor out, tensor tokens, tensor table) {
    (void)dev;
    int64_t R = tokens.dim[0], D = table.dim[1], V = table.dim[0];
    CHECK_INDEX(tokens, R);
    CHECK_DENSE(table, V, D);
    CHECK_DENSE(out, R, D);
    const int32_t *token = tokens.data;

#pragma omp parallel for schedule(static) if (R * D > 16384)
    for (int64_t r = 0; r < R; r++) {
        ASSERT(token[r] >= 0 && token[r] < V);
        memcpy(row_of(out, r), row_of(table, token[r]), (size_t)D * sizeof(real));
    }
}

size_t OP(embedding_backward_scratch)(int64_t R, int64_t D, int64_t V) {
    (void)R, (void)D, (void)V;
    return 0;
}

void OP(embedding_backward)(struct device *dev, tensor dtable, tensor dout, tensor tokens, void *scratch) {
    (void)dev, (void)scratch;
    int64_t R = tokens.dim[0], D = dtable.dim[1], V = dtable.dim[0];
    CHECK_INDEX(tokens, R);
    CHECK_DENSE(dtable, V, D);
    CHECK_DENSE(dout, R, D);
    const int32_t *token = tokens.data;
    for (int64_t r = 0; r < R; r++) ASSERT(token[r] >= 0 && token[r] < V);

    int64_t columns = columns_each(D);
#pragma omp parallel for schedule(static) if (R * D > 16384)
    for (int64_t from = 0; from < D; from += columns) {
        int64_t count = D - from < columns ? D - from : columns;
        for (int64_t r = 0; r < R; r++) {
            real *to = row_of(dtable, token[r]) + from;
            const real *add = row_of(dout, r) + from;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) to[i] += add[i];
        }
    }
}
