/* head_norm.c: LayerNorm of every head's channels, then skip and gate, as the xLSTM's blocks put it behind a cell.
 *
 *   forward    u = (y - mean) rstd weight;  v = u + skip x;  g = v act(z)            in H groups of P = I/H channels
 *   backward   dv = dg act(z);  dz = dg v act'(z);  dx = dv skip;  dskip += sum dv x
 *              yh = (y - mean) rstd;  wdv = weight dv;  b = mean(wdv);  c = mean(yh wdv);  dy = (wdv - b - yh c) rstd;
 *              dweight += sum dv yh
 *
 * Elements of memory traffic, with skip and gate: forward 4RI, backward 7RI; one exp and about 15 FLOPs an element
 * forward, 30 backward. Each head's part of a row is read from memory once: what passes over it again finds it in the
 * first cache. Bound by memory bandwidth. Deterministic, whatever the number of threads: rows are independent, and the
 * gradients of weight and skip are partial sums of fixed blocks of rows (cpu.h), added in order. Scratch: row_blocks(R)
 * rows of 2 I. */
#include "kernels/cpu/activation.h"
#include "kernels/cpu/cpu.h"

/* What head k of a row needs of the layer, and the numbers of its row; NULL where there is none. */
struct head {
    const real *y, *weight, *x, *skip, *z;
    real mean, rstd;
    int64_t n;
};

/* v: the normed head with its skip, before the gate. */
static void before_gate(real *restrict v, struct head h) {
    if (h.x) {
#pragma omp simd
        for (int64_t i = 0; i < h.n; i++) v[i] = (h.y[i] - h.mean) * h.rstd * h.weight[i] + h.skip[i] * h.x[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < h.n; i++) v[i] = (h.y[i] - h.mean) * h.rstd * h.weight[i];
    }
}

static inline __attribute__((always_inline)) void close_gate(real *restrict v, const real *restrict z, int64_t n,
                                                             enum activation act) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) v[i] *= activation_of(act, z[i]);
}

/* dz from v and dg; then v = dv. */
static inline __attribute__((always_inline)) void open_gate(real *restrict v, real *restrict dz,
                                                            const real *restrict dg, const real *restrict z, int64_t n,
                                                            enum activation act) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real slope, value = activation_and_slope(act, z[i], &slope);
        dz[i] = dg[i] * v[i] * slope;
        v[i] = dg[i] * value;
    }
}

/* The mean of a head and the reciprocal of its standard deviation. */
static void find_statistics(struct head *h, double eps) {
    real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h->n; i++) sum += h->y[i];
    real mean = sum / (real)h->n;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < h->n; i++) squares += (h->y[i] - mean) * (h->y[i] - mean);
    h->mean = mean;
    h->rstd = (real)1 / sqrt_real(squares / (real)h->n + (real)eps);
}

/* Head k of row r; mean and rstd are the caller's to fill in. */
static struct head head_of(int64_t r, int64_t k, int64_t n, tensor y, tensor weight, tensor x, tensor skip, tensor z) {
    return (struct head){.y = row_of(y, r) + k * n,
                         .weight = (const real *)weight.data + k * n,
                         .x = tensor_given(x) ? row_of(x, r) + k * n : NULL,
                         .skip = tensor_given(x) ? (const real *)skip.data + k * n : NULL,
                         .z = tensor_given(z) ? row_of(z, r) + k * n : NULL,
                         .n = n};
}

static void check(tensor y, tensor mean, tensor rstd, tensor weight, tensor x, tensor skip, tensor z) {
    int64_t R = y.dim[0], I = y.dim[1], H = mean.dim[1];
    ASSERT(H > 0 && I % H == 0 && tensor_given(x) == tensor_given(skip));
    CHECK_DENSE(y, R, I);
    CHECK_DENSE(mean, R, H);
    CHECK_DENSE(rstd, R, H);
    CHECK_DENSE(weight, I);
    CHECK_OPTIONAL_ROWS(x, R, I);
    CHECK_OPTIONAL(skip, I);
    CHECK_OPTIONAL_ROWS(z, R, I);
}

void OP(head_norm_forward)(struct device *dev, tensor g, tensor mean, tensor rstd, tensor y, tensor weight, tensor x,
                           tensor skip, tensor z, enum activation act, double eps) {
    (void)dev;
    int64_t R = y.dim[0], I = y.dim[1], H = mean.dim[1], n = I / H;
    check(y, mean, rstd, weight, x, skip, z);
    CHECK_DENSE(g, R, I);

#pragma omp parallel for schedule(static) if (R * I > 4096)
    for (int64_t r = 0; r < R; r++)
        for (int64_t k = 0; k < H; k++) {
            struct head h = head_of(r, k, n, y, weight, x, skip, z);
            real *v = row_of(g, r) + k * n;
            find_statistics(&h, eps);
            row_of(mean, r)[k] = h.mean;
            row_of(rstd, r)[k] = h.rstd;
            before_gate(v, h);
            if (h.z) WITH_ACTIVATION(act, close_gate, v, h.z, n);
        }
}

/* One head of one row: dy holds v, dv and then the gradient. dx and dz may be NULL, where x and z are. */
static void backward_head(real *restrict dy, real *restrict dx, real *restrict dz, real *restrict dweight,
                          real *restrict dskip, const real *restrict dg, struct head h, enum activation act) {
    int64_t n = h.n;
    if (h.z) {
        before_gate(dy, h);
        WITH_ACTIVATION(act, open_gate, dy, dz, dg, h.z, n);
    } else {
        memcpy(dy, dg, (size_t)n * sizeof(real));
    }
    if (h.x) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            dx[i] = dy[i] * h.skip[i];
            dskip[i] += dy[i] * h.x[i];
        }
    }
    real total = 0, dot = 0;
#pragma omp simd reduction(+ : total, dot)
    for (int64_t i = 0; i < n; i++) {
        real yh = (h.y[i] - h.mean) * h.rstd, dv = dy[i];
        dweight[i] += dv * yh;
        total += h.weight[i] * dv;
        dot += h.weight[i] * dv * yh;
    }
    real b = total / (real)n, c = dot / (real)n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        dy[i] = (h.weight[i] * dy[i] - b - (h.y[i] - h.mean) * h.rstd * c) * h.rstd;
}

void OP(head_norm_backward)(struct device *dev, tensor dy, tensor dx, tensor dz, tensor dweight, tensor dskip,
                            tensor dg, tensor y, tensor mean, tensor rstd, tensor weight, tensor x, tensor skip,
                            tensor z, enum activation act, void *scratch) {
    (void)dev;
    int64_t R = y.dim[0], I = y.dim[1], H = mean.dim[1], n = I / H, blocks = row_blocks(R);
    bool skips = tensor_given(x), gated = tensor_given(z);
    check(y, mean, rstd, weight, x, skip, z);
    CHECK_DENSE(dg, R, I);
    CHECK_DENSE(dy, R, I);
    CHECK_DENSE(dweight, I);
    ASSERT(tensor_given(dx) == skips && tensor_given(dskip) == skips && tensor_given(dz) == gated);
    CHECK_OPTIONAL_ROWS(dx, R, I);
    CHECK_OPTIONAL(dskip, I);
    CHECK_OPTIONAL_ROWS(dz, R, I);
    real *partial = scratch, *skip_partial = partial + blocks * I;

#pragma omp parallel for schedule(static) if (R * I > 4096)
    for (int64_t b = 0; b < blocks; b++) {
        real *dw = partial + b * I, *ds = skip_partial + b * I;
        memset(dw, 0, (size_t)I * sizeof(real));
        memset(ds, 0, (size_t)I * sizeof(real));
        for (int64_t r = row_block_first(R, blocks, b); r < row_block_first(R, blocks, b + 1); r++)
            for (int64_t k = 0, at = 0; k < H; k++, at += n) {
                struct head h = head_of(r, k, n, y, weight, x, skip, z);
                h.mean = row_of(mean, r)[k];
                h.rstd = row_of(rstd, r)[k];
                backward_head(row_of(dy, r) + at, skips ? row_of(dx, r) + at : NULL, gated ? row_of(dz, r) + at : NULL,
                              dw + at, ds + at, row_of(dg, r) + at, h, act);
            }
    }
    add_partials(dweight.data, partial, blocks, I);
    if (skips) add_partials(dskip.data, skip_partial, blocks, I);
}

size_t OP(head_norm_backward_scratch)(int64_t R, int64_t I, int64_t H) {
    (void)H;
    return (size_t)row_blocks(R) * 2 * (size_t)I * sizeof(real);
}
