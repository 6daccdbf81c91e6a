/* block_linear.c: a product with a block-diagonal matrix, G blocks of O x I.
 *
 *   forward    y[r, g O + o] = sum_i w[g,o,i] x[r, g I + i]
 *   backward   dx[r, g I + i] = (or +=) sum_o dy[r, g O + o] w[g,o,i]
 *              dw[g,o,i] += sum_r dy[r, g O + o] x[r, g I + i]
 *
 * Blocks of hundreds are products of their own (gemm.c), which read their columns where they lie: bound by arithmetic,
 * 2RGOI FLOPs each. Small blocks (4 x 4) are elementwise work, bound by memory: RG(I + O) elements forward, RG(2I + O)
 * backward. Deterministic: dw of small blocks is made of partial sums of fixed blocks of rows (cpu.h), added in order;
 * scratch: row_blocks(R) of them. That of large ones is as deterministic as the products are (gemm.c). */
#include "kernels/cpu/cpu.h"

enum { SMALL = 64 }; /* elements of the largest block that is worked on row by row */

static bool blocks_are_small(tensor w) {
    return w.dim[1] * w.dim[2] <= SMALL;
}

/* The dimensions agree; and the columns of a block, as a view of x or y. */
static void check(tensor y, tensor x, tensor w) {
    int64_t R = y.dim[0], G = w.dim[0], O = w.dim[1], I = w.dim[2];
    CHECK_ROWS(y, R, G * O);
    CHECK_ROWS(x, R, G * I);
    CHECK_DENSE(w, G, O, I);
}

static inline void forward_row(real *restrict y, const real *restrict x, const real *restrict w, int64_t G, int64_t O,
                        int64_t I) {
    for (int64_t g = 0; g < G; g++, y += O, x += I, w += O * I)
        for (int64_t o = 0; o < O; o++) {
            real sum = 0;
            for (int64_t i = 0; i < I; i++) sum += w[o * I + i] * x[i];
            y[o] = sum;
        }
}

static inline void backward_row(real *restrict dx, real *restrict dw, bool add_dx, const real *restrict dy,
                         const real *restrict x, const real *restrict w, int64_t G, int64_t O, int64_t I) {
    for (int64_t g = 0; g < G; g++, dx += I, dw += O * I, dy += O, x += I, w += O * I) {
        for (int64_t i = 0; i < I; i++) {
            real sum = add_dx ? dx[i] : 0;
            for (int64_t o = 0; o < O; o++) sum += dy[o] * w[o * I + i];
            dx[i] = sum;
        }
        for (int64_t o = 0; o < O; o++)
            for (int64_t i = 0; i < I; i++) dw[o * I + i] += dy[o] * x[i];
    }
}

void OP(block_linear_forward)(struct device *dev, tensor y, tensor x, tensor w) {
    (void)dev;
    int64_t R = y.dim[0], G = w.dim[0], O = w.dim[1], I = w.dim[2];
    check(y, x, w);
    if (!blocks_are_small(w)) {
        for (int64_t g = 0; g < G; g++)
            gemm(false, true, R, O, I, 1, (const real *)x.data + g * I, x.stride[0], (const real *)w.data + g * O * I,
                 I, 0, (real *)y.data + g * O, y.stride[0]);
        return;
    }
#pragma omp parallel for schedule(static) if (R * G * O * I > WORKERS_WORK_MIN)
    for (int64_t r = 0; r < R; r++) {
        if (O == 4 && I == 4) forward_row(row_of(y, r), row_of(x, r), w.data, G, 4, 4);
        else forward_row(row_of(y, r), row_of(x, r), w.data, G, O, I);
    }
}

void OP(block_linear_backward)(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dy, tensor x, tensor w,
                               void *scratch) {
    (void)dev;
    int64_t R = dy.dim[0], G = w.dim[0], O = w.dim[1], I = w.dim[2], blocks = row_blocks(R);
    check(dy, x, w);
    CHECK_ROWS(dx, R, G * I);
    CHECK_DENSE(dw, G, O, I);
    if (!blocks_are_small(w)) {
        for (int64_t g = 0; g < G; g++) {
            const real *from = (const real *)dy.data + g * O, *in = (const real *)x.data + g * I;
            gemm(false, false, R, I, O, 1, from, dy.stride[0], (const real *)w.data + g * O * I, I, add_dx,
                 (real *)dx.data + g * I, dx.stride[0]);
            gemm(true, false, O, I, R, 1, from, dy.stride[0], in, x.stride[0], 1, (real *)dw.data + g * O * I, I);
        }
        return;
    }
#pragma omp parallel for schedule(static) if (R * G * O * I > WORKERS_WORK_MIN)
    for (int64_t b = 0; b < blocks; b++) {
        real *sum = (real *)scratch + b * G * O * I;
        memset(sum, 0, (size_t)(G * O * I) * sizeof(real));
        for (int64_t r = row_block_first(R, blocks, b); r < row_block_first(R, blocks, b + 1); r++) {
            if (O == 4 && I == 4)
                backward_row(row_of(dx, r), sum, add_dx, row_of(dy, r), row_of(x, r), w.data, G, 4, 4);
            else backward_row(row_of(dx, r), sum, add_dx, row_of(dy, r), row_of(x, r), w.data, G, O, I);
        }
    }
    add_partials(dw.data, scratch, blocks, G * O * I);
}

size_t OP(block_linear_backward_scratch)(int64_t R, int64_t G, int64_t O, int64_t I) {
    return O * I <= SMALL ? (size_t)(row_blocks(R) * G * O * I) * sizeof(real) : 0;
}
