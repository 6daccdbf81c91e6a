/* norm.c: residual add + norm (RMSNorm or LayerNorm), and the gated RMSNorm of Mamba-2; forward and backward of both.
 *
 * Residual add + norm, one row of D elements, r the residual stream; m = mean(r) for LayerNorm, 0 for RMSNorm:
 *   forward    r = scale residual + branch;  rstd = 1/sqrt(mean((r - m)^2) + eps);  y = (r - m) rstd weight
 *   backward   xh = (r - m) rstd;  wdy = weight dy;  c = mean(xh wdy);  b = mean(wdy) for LayerNorm, 0 for RMSNorm;
 *              dr = (wdy - b - xh c) rstd + next_scale dnext;  dweight += sum dy xh;  dnext_scale += sum dnext r
 *   elements of memory traffic: forward 4RD (read residual, branch; write r, y), backward 4RD (read dy, dnext, r; write
 *   dr); about 5 and 11 FLOPs an element.
 *
 * Gated RMSNorm, one row of I elements, normalised in groups of n = I/groups:
 *   forward    u = y silu(z);  rstd = 1/sqrt(mean(u^2) + eps);  g = u rstd weight
 *   backward   xh = u rstd;  wdg = weight dg;  c = mean(xh wdg);  du = (wdg - xh c) rstd;
 *              dy = du silu(z);  dz = du y silu'(z);  dweight += sum dg xh
 * and with the norm first:
 *   forward    rstd = 1/sqrt(mean(y^2) + eps);  g = y rstd weight silu(z)
 *   backward   xh = y rstd;  wdg = weight dg silu(z);  c = mean(xh wdg);
 *              dy = (wdg - xh c) rstd;  dz = dg xh weight silu'(z);  dweight += sum dg silu(z) xh
 *   elements: forward 3RI (read y, z; write g), backward 5RI (read dg, y, z; write dy, dz); one exp and about 8 FLOPs
 *   an element forward, one exp and about 22 backward.
 *
 * Each row is read from memory once: the second pass over it finds it in the first cache. All are bound by memory
 * bandwidth. Deterministic, whatever the number of threads: rows are independent, and the gradients of the weights are
 * partial sums of fixed blocks of rows (cpu.h), added in order. Scratch: row_blocks(R) rows of the width, for each of
 * those gradients. */
#include "kernels/cpu/cpu.h"

/* Sums along a row are made of many lanes: `omp simd reduction` lets the compiler reorder them, always the same way. */

/* The sum of (a+b)^2, b optional, where a+b also goes to `sum`. `sum` may be `a`. */
static real add_and_square(real *sum, const real *a, const real *b, int64_t n) {
    real squares = 0;
    if (b) {
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; i++) {
            real r = a[i] + b[i];
            sum[i] = r;
            squares += r * r;
        }
    } else {
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; i++) {
            real r = a[i];
            sum[i] = r;
            squares += r * r;
        }
    }
    return squares;
}

/* sum = a scale, where sum may be a. */
static void scale_row(real *sum, const real *a, const real *scale, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) sum[i] = a[i] * scale[i];
}

/* The mean of a row, and in *squares the sum of the squares of what is left without it. */
static real mean_and_squares(const real *row, int64_t n, real *squares) {
    real sum = 0, left = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += row[i];
    real mean = sum / (real)n;
#pragma omp simd reduction(+ : left)
    for (int64_t i = 0; i < n; i++) left += (row[i] - mean) * (row[i] - mean);
    *squares = left;
    return mean;
}

static real reciprocal_rms(real squares, int64_t n, double eps) {
    return (real)1 / sqrt_real(squares / (real)n + (real)eps);
}

void OP(add_norm_forward)(struct device *dev, tensor out_residual, tensor y, tensor mean, tensor rstd, tensor residual,
                          tensor scale, tensor branch, tensor weight, double eps) {
    (void)dev;
    int64_t R = residual.dim[0], D = residual.dim[1];
    CHECK_DENSE(residual, R, D);
    CHECK_DENSE(out_residual, R, D);
    CHECK_DENSE(y, R, D);
    CHECK_OPTIONAL(mean, R);
    CHECK_DENSE(rstd, R);
    CHECK_DENSE(weight, D);
    CHECK_OPTIONAL(scale, D);
    CHECK_OPTIONAL(branch, R, D);
    const real *w = weight.data;

#pragma omp parallel for schedule(static) if (R * D > 8192)
    for (int64_t r = 0; r < R; r++) {
        real *sum = row_of(out_residual, r), *normed = row_of(y, r), m = 0;
        const real *add = tensor_given(branch) ? row_of(branch, r) : NULL;
        if (tensor_given(scale)) scale_row(sum, row_of(residual, r), scale.data, D);
        real squares = add_and_square(sum, tensor_given(scale) ? sum : row_of(residual, r), add, D);
        if (tensor_given(mean)) ((real *)mean.data)[r] = m = mean_and_squares(sum, D, &squares);
        real s = reciprocal_rms(squares, D, eps);
        ((real *)rstd.data)[r] = s;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) normed[i] = (sum[i] - m) * s * w[i];
    }
}

/* One row of the backward pass; mean is NULL for RMSNorm. dr may be dnext: each element is read before it is
 * written. */
static void add_norm_row(real *dr, real *dbranch, real *dw, const real *dy, const real *dnext, const real *res,
                         const real *w, const real *mean, real rstd, int64_t n) {
    real m = mean ? *mean : 0, dot = 0, total = 0;
#pragma omp simd reduction(+ : dot, total)
    for (int64_t i = 0; i < n; i++) {
        dot += (res[i] - m) * (w[i] * dy[i]);
        total += w[i] * dy[i];
    }
    real c = dot * rstd / (real)n, b = mean ? total / (real)n : 0;
    if (dnext) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            real xh = (res[i] - m) * rstd;
            dr[i] = (w[i] * dy[i] - b - xh * c) * rstd + dnext[i];
            dw[i] += dy[i] * xh;
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            real xh = (res[i] - m) * rstd;
            dr[i] = (w[i] * dy[i] - b - xh * c) * rstd;
            dw[i] += dy[i] * xh;
        }
    }
    if (dbranch) memcpy(dbranch, dr, (size_t)n * sizeof(real));
}

/* dnext on its way down through a scaled addition, into dr, which may be dnext. */
static void scale_next(real *dr, real *dscale, const real *dnext, const real *res, const real *scale, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        dscale[i] += dnext[i] * res[i];
        dr[i] = dnext[i] * scale[i];
    }
}

void OP(add_norm_backward)(struct device *dev, tensor dresidual, tensor dbranch, tensor dweight, tensor dnext_scale,
                           tensor dy, tensor dnext, tensor residual, tensor mean, tensor rstd, tensor weight,
                           tensor next_scale, void *scratch) {
    (void)dev;
    int64_t R = residual.dim[0], D = residual.dim[1], blocks = row_blocks(R);
    CHECK_DENSE(residual, R, D);
    CHECK_DENSE(dresidual, R, D);
    CHECK_OPTIONAL(dbranch, R, D);
    CHECK_DENSE(dweight, D);
    CHECK_DENSE(dy, R, D);
    CHECK_OPTIONAL(dnext, R, D);
    CHECK_OPTIONAL(mean, R);
    CHECK_DENSE(rstd, R);
    CHECK_DENSE(weight, D);
    CHECK_OPTIONAL(next_scale, D);
    CHECK_OPTIONAL(dnext_scale, D);
    bool scaled = tensor_given(next_scale);
    ASSERT(tensor_given(dnext_scale) == scaled && (!scaled || tensor_given(dnext)));

#pragma omp parallel for schedule(static) if (R * D > 8192)
    for (int64_t b = 0; b < blocks; b++) {
        real *dw = (real *)scratch + b * D, *dscale = (real *)scratch + (blocks + b) * D;
        memset(dw, 0, (size_t)D * sizeof(real));
        if (scaled) memset(dscale, 0, (size_t)D * sizeof(real));
        for (int64_t r = row_block_first(R, blocks, b); r < row_block_first(R, blocks, b + 1); r++) {
            const real *next = tensor_given(dnext) ? row_of(dnext, r) : NULL;
            if (scaled) scale_next(row_of(dresidual, r), dscale, next, row_of(residual, r), next_scale.data, D);
            add_norm_row(row_of(dresidual, r), tensor_given(dbranch) ? row_of(dbranch, r) : NULL, dw, row_of(dy, r),
                         scaled ? row_of(dresidual, r) : next, row_of(residual, r), weight.data,
                         tensor_given(mean) ? row_of(mean, r) : NULL, *row_of(rstd, r), D);
        }
    }
    add_partials(dweight.data, scratch, blocks, D);
    if (scaled) add_partials(dnext_scale.data, (real *)scratch + blocks * D, blocks, D);
}

size_t OP(add_norm_backward_scratch)(int64_t R, int64_t D) {
    return 2 * (size_t)row_blocks(R) * (size_t)D * sizeof(real);
}

void OP(gated_rmsnorm_forward)(struct device *dev, tensor g, tensor rstd, tensor y, tensor z, tensor weight,
                               bool norm_first, double eps) {
    (void)dev;
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1];
    CHECK_DENSE(y, R, I);
    CHECK_DENSE(g, R, I);
    CHECK_DENSE(rstd, R, groups);
    CHECK_ROWS(z, R, I);
    CHECK_DENSE(weight, I);
    ASSERT(groups > 0 && I % groups == 0);
    int64_t n = I / groups;

#pragma omp parallel for schedule(static) if (R * I > 4096)
    for (int64_t r = 0; r < R; r++) {
        for (int64_t k = 0; k < groups; k++) {
            real *restrict u = row_of(g, r) + k * n; /* holds u first, then g */
            const real *restrict in = row_of(y, r) + k * n, *restrict gate = row_of(z, r) + k * n;
            const real *restrict w = (const real *)weight.data + k * n;
            real squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < n; i++) {
                real open = silu(gate[i]), gated = in[i] * open, normed = norm_first ? in[i] : gated;
                u[i] = gated;
                squares += normed * normed;
            }
            real s = reciprocal_rms(squares, n, eps);
            row_of(rstd, r)[k] = s;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) u[i] = u[i] * s * w[i];
        }
    }
}

/* One group of one row of the backward pass. In both orders dweight is the sum of dg y silu(z) rstd, and c has the same
 * terms; what differs is where the mean's share goes. dy and dz hold silu(z) and silu'(z) between the two loops. g,
 * which may be dg, is forward's again, unless it is NULL. */
static void gated_rmsnorm_group(real *restrict dy, real *restrict dz, real *restrict dw, real *g, const real *dg,
                                const real *restrict y, const real *restrict z, const real *restrict w, real rstd,
                                bool norm_first, int64_t n) {
    real dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < n; i++) {
        real s = sigmoid(z[i]), gate = z[i] * s;
        dy[i] = gate;
        dz[i] = s * ((real)1 + z[i] * ((real)1 - s));
        dot += y[i] * gate * (w[i] * dg[i]);
    }
    real c = dot * rstd / (real)n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real gate = dy[i], xh = y[i] * gate * rstd;
        real du = (w[i] * dg[i] - xh * c) * rstd, dn = w[i] * dg[i] * rstd;
        dy[i] = norm_first ? dn * gate - y[i] * rstd * c * rstd : du * gate;
        dz[i] = (norm_first ? dn : du) * y[i] * dz[i];
        dw[i] += dg[i] * xh;
        if (g) g[i] = xh * w[i];
    }
}

void OP(gated_rmsnorm_backward)(struct device *dev, tensor dy, tensor dz, tensor dweight, tensor g, tensor dg, tensor y,
                                tensor z, tensor rstd, tensor weight, bool norm_first, void *scratch) {
    (void)dev;
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1], blocks = row_blocks(R);
    CHECK_DENSE(y, R, I);
    CHECK_DENSE(dy, R, I);
    CHECK_ROWS(dz, R, I);
    CHECK_DENSE(dweight, I);
    CHECK_OPTIONAL(g, R, I);
    CHECK_DENSE(dg, R, I);
    CHECK_ROWS(z, R, I);
    CHECK_DENSE(rstd, R, groups);
    CHECK_DENSE(weight, I);
    ASSERT(groups > 0 && I % groups == 0);
    int64_t n = I / groups;

#pragma omp parallel for schedule(static) if (R * I > 4096)
    for (int64_t b = 0; b < blocks; b++) {
        real *dw = (real *)scratch + b * I;
        memset(dw, 0, (size_t)I * sizeof(real));
        for (int64_t r = row_block_first(R, blocks, b); r < row_block_first(R, blocks, b + 1); r++)
            for (int64_t k = 0, at = 0; k < groups; k++, at += n)
                gated_rmsnorm_group(row_of(dy, r) + at, row_of(dz, r) + at, dw + at,
                                    tensor_given(g) ? row_of(g, r) + at : NULL, row_of(dg, r) + at, row_of(y, r) + at,
                                    row_of(z, r) + at, (const real *)weight.data + at, row_of(rstd, r)[k], norm_first,
                                    n);
    }
    add_partials(dweight.data, scratch, blocks, I);
}

size_t OP(gated_rmsnorm_backward_scratch)(int64_t R, int64_t I) {
    return (size_t)row_blocks(R) * (size_t)I * sizeof(real);
}
