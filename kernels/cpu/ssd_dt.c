/* ssd_dt.c: step sizes and decay exponents of SSD on the CPU.
 *
 *   v = raw + bias[h]    dt = clamp(softplus(v), dt_min, dt_max)    a = A[h] dt,  A = -exp(A_log)
 *   d = ddt + A da (0 where dt was clamped)    draw = d softplus'(v)    dbias = sum draw    dA_log = A sum da dt
 *
 * One pass over (B,T,H), H fastest. The sums over tokens are made per block of rows, then over blocks in order.
 */
#include "kernels/cpu/cpu.h"

static void check_dt(tensor raw, tensor bias, tensor A_log, tensor one, tensor other) {
    int64_t B = raw.dim[0], T = raw.dim[1], H = raw.dim[2];
    CHECK_ROWS(raw, B, T, H);
    CHECK_DENSE(bias, H);
    CHECK_DENSE(A_log, H);
    CHECK_DENSE(one, B, T, H);
    CHECK_DENSE(other, B, T, H);
}

/* Row r, counted over B and T, of a strided (B,T,H) view. */
static real *token_row(tensor t, int64_t r) {
    return (real *)t.data + r / t.dim[1] * t.stride[0] + r % t.dim[1] * t.stride[1];
}

static inline real clamp(real v, real low, real high) {
    return v < low ? low : v > high ? high : v;
}

void OP(ssd_dt_forward)(struct device *dev, tensor dt, tensor a, tensor raw, tensor bias, tensor A_log, double dt_min,
                        double dt_max) {
    (void)dev;
    check_dt(raw, bias, A_log, dt, a);
    int64_t R = raw.dim[0] * raw.dim[1], H = raw.dim[2];
    const real *shift = bias.data, *log_rate = A_log.data, low = (real)dt_min, high = (real)dt_max;
#pragma omp parallel for schedule(static) if (R * H >= 2048)
    for (int64_t r = 0; r < R; r++) {
        const real *in = token_row(raw, r);
        real *out_dt = (real *)dt.data + r * H, *out_a = (real *)a.data + r * H;
        for (int64_t h = 0; h < H; h++) {
            out_dt[h] = clamp(softplus(in[h] + shift[h]), low, high);
            out_a[h] = -exp_real(log_rate[h]) * out_dt[h];
        }
    }
}

/* partial: (2, H), the sums of draw and of a da over the rows from `first` to `end`. */
static void rows_backward(int64_t first, int64_t end, tensor draw, tensor ddt, tensor da, tensor raw, const real *shift,
                          const real *log_rate, real low, real high, real *partial) {
    int64_t H = raw.dim[2];
    memset(partial, 0, (size_t)(2 * H) * sizeof(real));
    for (int64_t r = first; r < end; r++) {
        const real *in = token_row(raw, r), *of_dt = (real *)ddt.data + r * H, *of_a = (real *)da.data + r * H;
        real *out = token_row(draw, r);
        for (int64_t h = 0; h < H; h++) {
            real v = in[h] + shift[h], rate = -exp_real(log_rate[h]), dt = softplus(v);
            bool clamped = dt < low || dt > high;
            real d = clamped ? 0 : (of_dt[h] + rate * of_a[h]) * softplus_derivative(v);
            out[h] = d;
            partial[h] += d;
            partial[H + h] += rate * clamp(dt, low, high) * of_a[h];
        }
    }
}

void OP(ssd_dt_backward)(struct device *dev, tensor draw, tensor dbias, tensor dA_log, tensor ddt, tensor da,
                         tensor raw, tensor bias, tensor A_log, double dt_min, double dt_max, void *scratch) {
    (void)dev;
    check_dt(raw, bias, A_log, ddt, da);
    check_dt(draw, dbias, dA_log, ddt, da);
    int64_t R = raw.dim[0] * raw.dim[1], H = raw.dim[2], blocks = row_blocks(R);
    real *partial = scratch;
#pragma omp parallel for schedule(static) if (R * H >= 2048)
    for (int64_t i = 0; i < blocks; i++)
        rows_backward(row_block_first(R, blocks, i), row_block_first(R, blocks, i + 1), draw, ddt, da, raw, bias.data,
                      A_log.data, (real)dt_min, (real)dt_max, partial + i * 2 * H);
    for (int64_t i = 0; i < blocks; i++) {
        for (int64_t h = 0; h < H; h++) {
            ((real *)dbias.data)[h] += partial[i * 2 * H + h];
            ((real *)dA_log.data)[h] += partial[i * 2 * H + H + h];
        }
    }
}

size_t OP(ssd_dt_backward_scratch)(int64_t B, int64_t T, int64_t H) {
    return (size_t)(row_blocks(B * T) * 2 * H) * sizeof(real);
}
