/* test/test_kernels_real.c: the mathematics under the CPU kernels (kernels/cpu/real.h): exp and what is made of it in
 * float, and the matrix product in both types and both ways, OpenBLAS (where the build has it) and riverrun's loops. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define REAL_IS_FLOAT
#include "kernels/cpu/activation.h"
#include "common/rng.h"
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* --- exp ---------------------------------------------------------------------------------------------------------- */

static float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Error of exp_real(v) in units of the last place of the true value. */
static double exp_error(float v) {
    double want = exp((double)v);
    float got = exp_real(v), nearest = (float)want;
    if (isinf(nearest)) return isinf(got) && got > 0 ? 0 : INFINITY;
    int exponent;
    frexp(want, &exponent);
    double place = ldexp(1, exponent - 24 < -149 ? -149 : exponent - 24);
    return fabs((double)got - want) / place;
}

/* About 2.6 million of the 2^32 floats: every 1637th, a prime step that visits every exponent and sign; then the ends
 * of the range one by one. (All 2^32 were tried once: the worst is 1.03.) */
static void test_exp_accuracy(void **state) {
    (void)state;
    double worst = 0;
    for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 1637) {
        float v = float_of((uint32_t)bits);
        if (isnan(v)) assert_true(isnan(exp_real(v)));
        else worst = fmax(worst, exp_error(v));
    }
    float high = logf(FLT_MAX), low = logf(FLT_MIN), least = -103.97208f;
    for (int i = 0; i < 300; i++, high = nextafterf(high, i % 2 ? 0 : 100)) worst = fmax(worst, exp_error(high));
    for (int i = 0; i < 300; i++, low = nextafterf(low, -200)) worst = fmax(worst, exp_error(low));
    for (int i = 0; i < 300; i++, least = nextafterf(least, -200)) worst = fmax(worst, exp_error(least));
    if (!(worst < 1.05)) fail_msg("exp_real is off by %g units in the last place", worst);
}

static void test_exp_special(void **state) {
    (void)state;
    assert_true(exp_real(0) == 1 && exp_real(-0.0f) == 1);
    assert_true(isinf(exp_real(INFINITY)) && exp_real(-INFINITY) == 0);
    assert_true(isnan(exp_real(NAN)) && isnan(exp_real(-NAN)));
    assert_true(isinf(exp_real(1e30f)) && exp_real(-1e30f) == 0);
    assert_true(isfinite(exp_real(88.72283f)) && isinf(exp_real(88.72284f))); /* log(FLT_MAX) lies between */
    assert_true(exp_real(-103.9f) > 0 && exp_real(-104.1f) == 0);
}

/* 2^v for v <= 0: every 211th float down to the bound, below which everything counts as it. (All were tried once.) */
static void test_exp2_decay(void **state) {
    (void)state;
    double worst = 0;
    for (uint32_t bits = 0x80000000u; float_of(bits) >= EXP2_LOWEST; bits += 211) {
        double want = exp2((double)float_of(bits)), place = ldexp(1, ilogb(want) - 23);
        worst = fmax(worst, fabs((double)exp2_decay(float_of(bits)) - want) / place);
    }
    /* Debug and sanitizer builds, and processors without the instruction, round products and sums apart. */
#if defined(__FMA__) && !defined(RIVERRUN_DEBUG)
    double limit = 1;
#else
    double limit = 1.25;
#endif
    if (!(worst < limit)) fail_msg("exp2_decay is off by %g units in the last place, allowed %g", worst, limit);
    assert_true(exp2_decay(0) == 1 && exp2_decay(-0.0f) == 1 && isnan(exp2_decay(NAN)));
    assert_true(exp2_decay(-1e30f) == 0x1p-100f && exp2_decay(-INFINITY) == 0x1p-100f);
}

static void test_sigmoid_family(void **state) {
    (void)state;
    for (float v = -200; v <= 200; v += 0.37f) {
        double s = 1 / (1 + exp(-(double)v)), slope = s * (1 + v * (1 - s));
        assert_true(fabs(sigmoid(v) - s) <= 4e-7 * s + 1e-38);
        assert_true(fabs(silu(v) - v * s) <= 5e-7 * fabs(v * s) + 1e-36);
        /* 1 - s is rounded to the spacing of float at 1, times v up to 16 before s becomes 1 */
        assert_true(fabs(silu_derivative(v) - slope) <= 2e-6 * (1 + fabs(v) * (1 - s)) * s + 1e-36);
        double plus = v <= 20 ? log1p(exp((double)v)) : v;
        assert_true(fabs(softplus(v) - plus) <= 4e-7 * plus + 1e-44);
        assert_true(fabs(softplus_derivative(v) - (v <= 20 ? s : 1)) <= 4e-7 * s + 1e-38);
    }
    assert_true(softplus_derivative(20.5f) == 1 && softplus(1e4f) == 1e4f && isnan(softplus(NAN)) && isnan(silu(NAN)));
    assert_true(sigmoid(-INFINITY) == 0 && sigmoid(INFINITY) == 1);
}

/* Phi is right to some units of its own also in the lower tail; gelu, relu2 and sigmoid with their derivatives. */
static void test_activations(void **state) {
    (void)state;
    for (float v = -13; v <= 13; v += 0.0137f) {
        double cdf = 0.5 * erfc(-(double)v * sqrt(0.5)), density = exp(-0.5 * (double)v * v) / sqrt(2 * acos(-1));
        double s = 1 / (1 + exp(-(double)v)), places = 4e-7 + 6e-8 * (double)v * v;
        float got_density, slope;
        assert_true(fabs(normal_cdf(v, &got_density) - cdf) <= places * cdf + 1e-37);
        assert_true(fabs(got_density - density) <= places * density + 1e-37);
        assert_true(fabs(activation_and_slope(ACTIVATION_GELU, v, &slope) - v * cdf) <= places * fabs(v * cdf) + 1e-36);
        assert_true(fabs(slope - (cdf + v * density)) <= places * (cdf + fabs(v) * density) + 1e-36);
        assert_true(activation_and_slope(ACTIVATION_RELU2, v, &slope) == (v > 0 ? v * v : 0));
        assert_true(slope == (v > 0 ? 2 * v : 0));
        assert_true(fabs(activation_and_slope(ACTIVATION_SIGMOID, v, &slope) - s) <= 4e-7 * s);
        assert_true(fabs(slope - s / (1 + exp((double)v))) <= 6e-7 * s / (1 + exp((double)v)));
        assert_true(activation_of(ACTIVATION_SILU, v) == silu(v));
    }
    for (int act = ACTIVATION_SILU; act <= ACTIVATION_SIGMOID; act++)
        assert_true(isnan(activation_of((enum activation)act, NAN)));
    assert_true(activation_of(ACTIVATION_GELU, 0) == 0 && activation_of(ACTIVATION_GELU, 30) == 30);
    assert_true(activation_of(ACTIVATION_GELU, -30) == 0 && activation_of(ACTIVATION_SIGMOID, -INFINITY) == 0);
}

/* --- the matrix product ------------------------------------------------------------------------------------------- */

void gemm_f64(bool transA, bool transB, int64_t M, int64_t N, int64_t K, double alpha, const double *A, int64_t lda,
              const double *B, int64_t ldb, double beta, double *C, int64_t ldc);
void gemm_plain_f64(bool transA, bool transB, int64_t M, int64_t N, int64_t K, double alpha, const double *A,
                    int64_t lda, const double *B, int64_t ldb, double beta, double *C, int64_t ldc);

enum product { GEMM_F32, PLAIN_F32, GEMM_F64, PLAIN_F64, PRODUCTS };

/* One product: shape, and gaps between rows. */
struct problem {
    bool transA, transB;
    int64_t M, N, K, gap;
    double alpha, beta;
};

static double number(uint32_t stream, int64_t i) {
    return 2 * rng_uniform((rng_key){.seed = 11, .purpose = RNG_TEST, .stream = stream}, (uint64_t)i) - 1;
}

/* Run a product on numbers given as double; C goes in and comes out. lda, ldb, ldc are rows plus gap. */
static void run_product(enum product which, const struct problem *p, const double *A, int64_t a_count, const double *B,
                        int64_t b_count, double *C, int64_t c_count) {
    int64_t lda = (p->transA ? p->M : p->K) + p->gap, ldb = (p->transB ? p->K : p->N) + p->gap, ldc = p->N + p->gap;
    if (which == GEMM_F64 || which == PLAIN_F64) {
        (which == GEMM_F64 ? gemm_f64 : gemm_plain_f64)(p->transA, p->transB, p->M, p->N, p->K, p->alpha, A, lda, B,
                                                        ldb, p->beta, C, ldc);
        return;
    }
    float *a = malloc(((size_t)(a_count + b_count + c_count) + 1) * sizeof *a), *b = a + a_count, *c = b + b_count;
    assert_non_null(a);
    for (int64_t i = 0; i < a_count; i++) a[i] = (float)A[i];
    for (int64_t i = 0; i < b_count; i++) b[i] = (float)B[i];
    for (int64_t i = 0; i < c_count; i++) c[i] = (float)C[i];
    (which == GEMM_F32 ? gemm : gemm_plain)(p->transA, p->transB, p->M, p->N, p->K, (float)p->alpha, a, lda, b, ldb,
                                            (float)p->beta, c, ldc);
    for (int64_t i = 0; i < c_count; i++) C[i] = c[i];
    free(a);
}

static double *numbers(int64_t count, uint32_t stream, bool as_float) {
    double *x = malloc(((size_t)count + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < count; i++) x[i] = as_float ? (double)(float)number(stream, i) : number(stream, i);
    return x;
}

/* Compare with the definition in long double. Gaps of C keep what they held; with beta 0 C is NaN before. */
static void check_product(enum product which, const struct problem *p) {
    bool as_float = which == GEMM_F32 || which == PLAIN_F32;
    int64_t lda = (p->transA ? p->M : p->K) + p->gap, ldb = (p->transB ? p->K : p->N) + p->gap, ldc = p->N + p->gap;
    int64_t a_count = lda * (p->transA ? p->K : p->M), b_count = ldb * (p->transB ? p->N : p->K), c_count = ldc * p->M;
    double *A = numbers(a_count, 1, as_float), *B = numbers(b_count, 2, as_float), *C = numbers(c_count, 3, as_float);
    double *before = numbers(c_count, 3, as_float), unit = as_float ? 0x1p-24 : 0x1p-53;
    for (int64_t i = 0; i < c_count && p->beta == 0; i++)
        if (i % ldc < p->N) C[i] = NAN;
    run_product(which, p, A, a_count, B, b_count, C, c_count);
    for (int64_t i = 0; i < p->M; i++) {
        for (int64_t j = 0; j < ldc; j++) {
            long double want = before[i * ldc + j];
            if (j < p->N) {
                long double sum = 0;
                for (int64_t k = 0; k < p->K; k++)
                    sum += (long double)(p->transA ? A[k * lda + i] : A[i * lda + k]) *
                           (long double)(p->transB ? B[j * ldb + k] : B[k * ldb + j]);
                want = p->alpha * sum + (p->beta == 0 ? 0 : p->beta * want);
            }
            double allowed = j < p->N ? unit * (8 + (double)p->K) : 0;
            if (!(fabsl(C[i * ldc + j] - want) <= allowed * (1 + fabsl(want))))
                fail_msg("product %d, trans %d %d, M=%d N=%d K=%d gap=%d beta=%g: [%d][%d] is %.17g, should be %.17Lg",
                         which, p->transA, p->transB, (int)p->M, (int)p->N, (int)p->K, (int)p->gap, p->beta, (int)i,
                         (int)j, C[i * ldc + j], want);
        }
    }
    free(A);
    free(B);
    free(C);
    free(before);
}

static void test_gemm(void **state) {
    (void)state;
    static const int64_t shapes[][3] = {{1, 1, 1},    {1, 7, 5},     {9, 1, 5},     {5, 7, 1},    {3, 4, 0},
                                        {0, 4, 3},    {4, 0, 3},     {8, 32, 16},   {13, 33, 17}, {17, 19, 257},
                                        {131, 35, 23}, {1, 130, 513}, {100, 300, 5}};
    static const double scales[][2] = {{1, 0}, {1, 1}, {-0.5, 2}};
    for (int which = 0; which < PRODUCTS; which++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int t = 0; t < 4; t++)
                for (int g = 0; g < 2; g++)
                    for (int k = 0; k < 3; k++) {
                        struct problem p = {t & 1, t & 2, shapes[s][0], shapes[s][1], shapes[s][2], 3 * g,
                                            scales[k][0], scales[k][1]};
                        check_product((enum product)which, &p);
                    }
}

/* A NaN in one row of A makes that row of C NaN and no other. */
static void test_gemm_nan(void **state) {
    (void)state;
    enum { M = 11, N = 37, K = 20 };
    for (int which = 0; which < PRODUCTS; which++) {
        struct problem p = {false, true, M, N, K, 0, 1, 0};
        double *A = numbers(M * K, 1, true), *B = numbers(N * K, 2, true), *C = numbers(M * N, 3, true);
        A[4 * K + 3] = NAN;
        run_product((enum product)which, &p, A, M * K, B, N * K, C, M * N);
        for (int i = 0; i < M * N; i++) assert_true(isnan(C[i]) == (i / N == 4));
        free(A);
        free(B);
        free(C);
    }
}

/* riverrun's own loops give the same bits with any number of threads. */
static void test_gemm_plain_threads(void **state) {
    (void)state;
#ifdef _OPENMP
    enum { M = 150, N = 70, K = 300 };
    struct problem p = {true, false, M, N, K, 0, 1, 1};
    double *A = numbers(M * K, 1, true), *B = numbers(N * K, 2, true), *C[2];
    int before = omp_get_max_threads();
    for (int i = 0; i < 2; i++) {
        C[i] = numbers(M * N, 3, true);
        omp_set_num_threads(i ? 3 : 1);
        run_product(PLAIN_F32, &p, A, M * K, B, N * K, C[i], M * N);
    }
    omp_set_num_threads(before);
    assert_memory_equal(C[0], C[1], M * N * sizeof *C[0]);
    free(A);
    free(B);
    free(C[0]);
    free(C[1]);
#else
    skip();
#endif
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp_accuracy),   cmocka_unit_test(test_exp_special),
        cmocka_unit_test(test_exp2_decay),     cmocka_unit_test(test_sigmoid_family),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_gemm_nan),       cmocka_unit_test(test_gemm_plain_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
