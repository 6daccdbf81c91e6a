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

#define COLUMNS_AT_ONCE 64 /* at least a cache line, so that threads don't share one */

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

void OP(embedding_backward)(struct device *dev, tensor dtable, tensor dout, tensor tokens) {
    (void)dev;
    int64_t R = tokens.dim[0], D = dtable.dim[1], V = dtable.dim[0];
    CHECK_INDEX(tokens, R);
    CHECK_DENSE(dtable, V, D);
    CHECK_DENSE(dout, R, D);
    const int32_t *token = tokens.data;
    for (int64_t r = 0; r < R; r++) ASSERT(token[r] >= 0 && token[r] < V);

#pragma omp parallel for schedule(static) if (R * D > 16384)
    for (int64_t from = 0; from < D; from += COLUMNS_AT_ONCE) {
        int64_t count = D - from < COLUMNS_AT_ONCE ? D - from : COLUMNS_AT_ONCE;
        for (int64_t r = 0; r < R; r++) {
            real *to = row_of(dtable, token[r]) + from;
            const real *add = row_of(dout, r) + from;
#pragma omp simd
            for (int64_t i = 0; i < count; i++) to[i] += add[i];
        }
    }
}
