/* rope.c: positions of tokens within their documents; rotary positions with an optional norm of each head before them;
 * forward and backward.
 *
 *   u = x rstd weight (or x);   y_i = u_i cos a - u_j sin a;   y_j = u_j cos a + u_i sin a;
 *   a = p base^(-2i/P), j = i + P/2
 *   backward   du_i = dy_i cos a + dy_j sin a;  du_j = dy_j cos a - dy_i sin a;
 *              xh = x rstd;  wdu = weight du;  c = mean(xh wdu);  dx = (wdu - xh c) rstd;  dweight += sum du xh
 *
 * Angles are computed in double and reduced to a turn there, so that they are right at any position; once for a token,
 * since all its heads share them. 2 reals moved and about 3 FLOPs an element without the norm. Rows are independent;
 * the gradient of the weight is made of partial sums of fixed blocks of rows (cpu.h). */
#include "kernels/cpu/turn.h"

void OP(token_positions)(struct device *dev, tensor positions, tensor doc, tensor before) {
    (void)dev;
    int64_t B = positions.dim[0], T = positions.dim[1];
    CHECK_INDEX(positions, B, T);
    if (tensor_given(doc)) CHECK_INDEX(doc, B, T);
    if (tensor_given(before)) CHECK_INDEX(before, B);
    for (int64_t b = 0; b < B; b++) {
        const int32_t *number = tensor_given(doc) ? (const int32_t *)doc.data + b * T : NULL;
        int32_t *out = (int32_t *)positions.data + b * T, next = 0;
        if (tensor_given(before) && (!number || number[0] == 0)) next = ((const int32_t *)before.data)[b];
        for (int64_t t = 0; t < T; t++) {
            if (number && t > 0 && number[t] != number[t - 1]) next = 0;
            out[t] = next++;
        }
    }
}

static double position_of(tensor positions, int64_t b, int64_t t, int64_t T) {
    return tensor_given(positions) ? (double)((const int32_t *)positions.data)[b * T + t] : (double)t;
}

static real *head_of(tensor x, int64_t b, int64_t t, int64_t h) {
    return (real *)x.data + b * x.stride[0] + t * x.stride[1] + h * x.stride[2];
}

static void check_rope(tensor y, tensor x, tensor rstd, tensor weight, tensor positions) {
    int64_t B = y.dim[0], T = y.dim[1], H = y.dim[2], P = y.dim[3];
    ASSERT(P % 2 == 0 && P >= 2 && P / 2 <= ROPE_HALF_MAX);
    CHECK_ROWS(y, B, T, H, P);
    if (tensor_given(x)) CHECK_ROWS(x, B, T, H, P);
    CHECK_OPTIONAL(weight, P);
    if (tensor_given(weight)) CHECK_DENSE(rstd, B, T, H);
    if (tensor_given(positions)) CHECK_INDEX(positions, B, T);
}

/* u of one head into `u`; its reciprocal rms is returned. */
static real norm_head(real *u, const real *x, const real *weight, int64_t P, double eps) {
    real squares = 0;
    for (int64_t i = 0; i < P; i++) squares += x[i] * x[i];
    real rstd = (real)1 / sqrt_real(squares / (real)P + (real)eps);
    for (int64_t i = 0; i < P; i++) u[i] = x[i] * rstd * weight[i];
    return rstd;
}

void OP(rope_forward)(struct device *dev, tensor y, tensor rstd, tensor x, tensor weight, tensor positions, double base,
                      double eps) {
    (void)dev;
    int64_t B = y.dim[0], T = y.dim[1], H = y.dim[2], P = y.dim[3], half = P / 2;
    double rate[ROPE_HALF_MAX];
    check_rope(y, x, rstd, weight, positions);
    turn_rates(rate, half, base);
#pragma omp parallel for schedule(static) if (B * T * H * P > 8192)
    for (int64_t r = 0; r < B * T; r++) {
        struct turn turn;
        real u[2 * ROPE_HALF_MAX];
        turn_make(&turn, rate, half, position_of(positions, r / T, r % T, T));
        for (int64_t h = 0; h < H; h++) {
            const real *from = head_of(x, r / T, r % T, h);
            real *to = head_of(y, r / T, r % T, h);
            if (tensor_given(weight)) {
                ((real *)rstd.data)[r * H + h] = norm_head(u, from, weight.data, P, eps);
                from = u;
            }
            turn_head(to, from, &turn, half, 1);
        }
    }
}

/* Back through the norm of one head: du becomes dx. */
static void norm_head_backward(real *dx, real *dweight, const real *du, const real *x, const real *weight, real rstd,
                               int64_t P) {
    real dot = 0;
    for (int64_t i = 0; i < P; i++) dot += x[i] * (weight[i] * du[i]);
    real c = dot * rstd / (real)P;
    for (int64_t i = 0; i < P; i++) {
        real xh = x[i] * rstd;
        dweight[i] += du[i] * xh;
        dx[i] = (weight[i] * du[i] - xh * c) * rstd;
    }
}

void OP(rope_backward)(struct device *dev, tensor dx, tensor dweight, tensor dy, tensor rstd, tensor x, tensor weight,
                       tensor positions, double base, void *scratch) {
    (void)dev;
    int64_t B = dy.dim[0], T = dy.dim[1], H = dy.dim[2], P = dy.dim[3], half = P / 2, blocks = row_blocks(B * T);
    double rate[ROPE_HALF_MAX];
    check_rope(dx, dy, rstd, weight, positions);
    check_rope(dx, tensor_given(weight) ? x : dy, rstd, dweight, positions);
    turn_rates(rate, half, base);
#pragma omp parallel for schedule(static) if (B * T * H * P > 8192)
    for (int64_t k = 0; k < blocks; k++) {
        real *partial = (real *)scratch + k * P;
        if (tensor_given(weight)) memset(partial, 0, (size_t)P * sizeof(real));
        for (int64_t r = row_block_first(B * T, blocks, k); r < row_block_first(B * T, blocks, k + 1); r++) {
            struct turn turn;
            real u[2 * ROPE_HALF_MAX];
            turn_make(&turn, rate, half, position_of(positions, r / T, r % T, T));
            for (int64_t h = 0; h < H; h++) {
                const real *from = head_of(dy, r / T, r % T, h);
                real *to = head_of(dx, r / T, r % T, h), *du = tensor_given(weight) ? u : to;
                turn_head(du, from, &turn, half, -1);
                if (tensor_given(weight))
                    norm_head_backward(to, partial, u, head_of(x, r / T, r % T, h), weight.data,
                                       ((const real *)rstd.data)[r * H + h], P);
            }
        }
    }
    if (tensor_given(weight)) add_partials(dweight.data, scratch, blocks, P);
}

size_t OP(rope_backward_scratch)(int64_t R, int64_t H, int64_t P) {
    (void)H;
    return (size_t)(row_blocks(R) * P) * sizeof(real);
}
