/* test/test_kernels_basic.c: tensor views, the CPU device, and what the case table (test/ops.c) can't say about the
 * operations without recurrence: exact references written out by hand, accumulation, numbers that are not finite,
 * independence of the number of threads, broken shapes. The head with its loss: test/test_kernels_head.c. */
#include "test/unit_kernels.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* --- threads ------------------------------------------------------------------------------------------------------ */

static void use_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

static int threads_now(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* --- tensor views ------------------------------------------------------------------------------------------------- */

static void test_tensor_views(void **state) {
    (void)state;
    float data[2 * 3 * 8];
    tensor t = tensor_2d(data, DTYPE_F32, 6, 8);
    assert_true(tensor_contiguous(t) && tensor_is(t, 2, (int64_t)6, (int64_t)8));
    assert_true(tensor_is(t, 2, (int64_t)-1, (int64_t)8));
    assert_false(tensor_is(t, 2, (int64_t)6, (int64_t)7));
    assert_false(tensor_is(t, 1, (int64_t)6));
    assert_int_equal(tensor_count(t), 48);

    tensor columns = tensor_columns(t, 2, 4);
    assert_ptr_equal(columns.data, data + 2);
    assert_true(tensor_is(columns, 2, (int64_t)6, (int64_t)4) && columns.stride[0] == 8);
    assert_false(tensor_contiguous(columns));

    tensor heads = tensor_split_last(columns, 2, 2);
    assert_true(tensor_is(heads, 3, (int64_t)6, (int64_t)2, (int64_t)2));
    assert_true(heads.stride[0] == 8 && heads.stride[1] == 2 && heads.stride[2] == 1);

    tensor batch = tensor_split_first(heads, 2, 3);
    assert_true(tensor_is(batch, 4, (int64_t)2, (int64_t)3, (int64_t)2, (int64_t)2));
    assert_true(batch.stride[0] == 24 && batch.stride[1] == 8 && batch.stride[3] == 1);

    tensor joined = tensor_join_first(batch);
    assert_true(joined.ndim == 3 && joined.dim[0] == 6 && joined.stride[0] == 8 && joined.stride[2] == 1);

    int64_t dims[] = {4, 12};
    tensor reshaped = tensor_reshape(t, 2, dims);
    assert_true(tensor_contiguous(reshaped) && reshaped.dim[0] == 4 && reshaped.stride[0] == 12);
    tensor five = tensor_5d(data, DTYPE_F32, 1, 2, 3, 4, 2);
    assert_true(tensor_contiguous(five) && five.stride[0] == 48 && tensor_count(five) == 48);
    assert_true(tensor_contiguous(tensor_columns(tensor_2d(data, DTYPE_F32, 1, 8), 2, 3))); /* one row has no gaps */
}

/* An arena that only counts hands out NULL: views of it must stay NULL, or they'd look given. */
static void test_tensor_absent(void **state) {
    (void)state;
    assert_false(tensor_given(tensor_none()));
    tensor t = tensor_columns(tensor_3d(NULL, DTYPE_F64, 2, 3, 8), 5, 2);
    assert_false(tensor_given(t));
    assert_true(tensor_is(t, 3, (int64_t)2, (int64_t)3, (int64_t)2));
    assert_int_equal(tensor_count(tensor_none()), 0);
    assert_int_equal(tensor_count(tensor_4d(NULL, DTYPE_F32, 2, 0, 3, 1)), 0);
}

static void test_dtypes(void **state) {
    (void)state;
    static const size_t sizes[DTYPE_COUNT] = {4, 8, 2, 2, 4, 8, 1};
    for (int d = 0; d < DTYPE_COUNT; d++) {
        assert_int_equal(dtype_size((enum dtype)d), sizes[d]);
        assert_true(strlen(dtype_name((enum dtype)d)) >= 2);
    }
    assert_string_equal(dtype_name(DTYPE_BF16), "bf16");
}

/* --- the device --------------------------------------------------------------------------------------------------- */

static void test_device(void **state) {
    (void)state;
    struct device *dev;
    error err = {0};
    if (device_open(&dev, DEVICE_CUDA, PRECISION_F32, &err) == 0) {
        assert_int_equal(device_check(dev, &err), 0);
        device_close(dev);
    } else { /* without a GPU, or a build for one */
        assert_int_equal(err.kind, ERROR_INPUT);
        assert_non_null(strstr(err.text, "cpu"));
    }
    const struct ops *ops;
    assert_int_equal(device_table(&ops, DEVICE_CUDA, PRECISION_F64, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_BF16, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_non_null(strstr(err.text, "bf16"));
    assert_null(dev);

    dev = open_cpu(PRECISION_F64);
    assert_ptr_equal(dev->ops, &ops_cpu_f64);
    assert_string_equal(dev->ops->name, "cpu-f64");
    int from[3] = {1, 2, 3}, to[3] = {0};
    device_write(dev, to, from, sizeof to);
    assert_memory_equal(to, from, sizeof to);
    device_zero(dev, to, sizeof to);
    device_read(dev, from, to, sizeof to);
    assert_int_equal(from[2], 0);
    assert_int_equal(device_check(dev, &err), 0);
    char text[128], small[8];
    device_describe(dev, text, sizeof text);
    assert_non_null(strstr(text, "thread"));
    device_describe(dev, small, sizeof small);
    assert_int_equal(strlen(small), 7);
    device_close(dev);
    dev = open_cpu(PRECISION_F32);
    assert_ptr_equal(dev->ops, &ops_cpu_f32);
    device_close(dev);
}

/* Every entry of both tables is filled. */
static void test_tables_complete(void **state) {
    (void)state;
    const struct ops *tables[] = {&ops_cpu_f32, &ops_cpu_f64};
    for (int t = 0; t < 2; t++) {
        const unsigned char *entry = (const unsigned char *)tables[t] + offsetof(struct ops, embedding_forward);
        const unsigned char *end = (const unsigned char *)(tables[t] + 1);
        for (; entry < end; entry += sizeof(void (*)(void))) {
            static const unsigned char empty[sizeof(void (*)(void))];
            assert_true(memcmp(entry, empty, sizeof empty) != 0);
        }
    }
}

/* --- forward values by the definition ----------------------------------------------------------------------------- */

/* The case table compares the two tables, which share their source, and gradients with differences of the same forward;
 * so the formulas themselves are written out once more here. */
enum { ROWS = 5, COLUMNS = 12, GROUPS = 3 };

static void test_norm_definitions(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F64);
    tensor x = random_matrix(dev, ROWS, COLUMNS, 1, 2), branch = random_matrix(dev, ROWS, COLUMNS, 2, 3);
    tensor r = random_matrix(dev, ROWS, COLUMNS, 0, 0), y = random_matrix(dev, ROWS, COLUMNS, 0, 0);
    tensor rstd = random_matrix(dev, ROWS, GROUPS, 0, 0), weight = random_vector(dev, COLUMNS, 3, 1);
    const double eps = 0.125;
    enum { N = COLUMNS / GROUPS };

    dev->ops->add_norm_forward(dev, r, y, tensor_none(), tensor_1d(rstd.data, rstd.dtype, ROWS), x, tensor_none(),
                               branch, weight, eps);
    for (int row = 0; row < ROWS; row++) {
        double squares = 0;
        for (int i = row * COLUMNS; i < (row + 1) * COLUMNS; i++) squares += pow(get(x, i) + get(branch, i), 2);
        double want = 1 / sqrt(squares / COLUMNS + eps);
        assert_close(get(rstd, row), want, 1e-14, 0, "rstd", row);
        for (int c = 0, i = row * COLUMNS; c < COLUMNS; c++, i++) {
            assert_close(get(r, i), get(x, i) + get(branch, i), 0, 0, "r", i);
            assert_close(get(y, i), get(r, i) * want * get(weight, c), 1e-13, 0, "y", i);
        }
    }
    dev->ops->gated_rmsnorm_forward(dev, y, rstd, x, branch, weight, false, eps);
    for (int group = 0; group < ROWS * GROUPS; group++) {
        double u[N], squares = 0;
        for (int c = 0, i = group * N; c < N; c++, i++) {
            u[c] = get(x, i) * get(branch, i) / (1 + exp(-get(branch, i)));
            squares += u[c] * u[c];
        }
        double want = 1 / sqrt(squares / N + eps);
        assert_close(get(rstd, group), want, 1e-14, 0, "rstd", group);
        for (int c = 0, i = group * N; c < N; c++, i++)
            assert_close(get(y, i), u[c] * want * get(weight, i % COLUMNS), 1e-13, 0, "g", i);
    }
    tensor owned[] = {x, branch, r, y, rstd, weight};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i].data);
    device_close(dev);
}

/* LayerNorm, and the norm of heads with skip and gate, from their definitions; a block-diagonal product. */
static void test_head_norm_definitions(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F64);
    tensor y = random_matrix(dev, ROWS, COLUMNS, 1, 2), x = random_matrix(dev, ROWS, COLUMNS, 2, 3);
    tensor z = random_matrix(dev, ROWS, COLUMNS, 3, 2), g = random_matrix(dev, ROWS, COLUMNS, 0, 0);
    tensor mean = random_matrix(dev, ROWS, GROUPS, 0, 0), rstd = random_matrix(dev, ROWS, GROUPS, 0, 0);
    tensor weight = random_vector(dev, COLUMNS, 4, 1), skip = random_vector(dev, COLUMNS, 5, 1);
    const double eps = 0.125;
    enum { N = COLUMNS / GROUPS };

    dev->ops->head_norm_forward(dev, g, mean, rstd, y, weight, x, skip, z, ACTIVATION_SIGMOID, eps);
    for (int head = 0; head < ROWS * GROUPS; head++) {
        double sum = 0, squares = 0;
        for (int i = head * N; i < (head + 1) * N; i++) sum += get(y, i);
        for (int i = head * N; i < (head + 1) * N; i++) squares += pow(get(y, i) - sum / N, 2);
        double scale = 1 / sqrt(squares / N + eps);
        assert_close(get(mean, head), sum / N, 1e-14, 1e-14, "mean", head);
        assert_close(get(rstd, head), scale, 1e-14, 0, "rstd", head);
        for (int i = head * N; i < (head + 1) * N; i++) {
            int c = i % COLUMNS;
            double normed = (get(y, i) - sum / N) * scale * get(weight, c) + get(skip, c) * get(x, i);
            assert_close(get(g, i), normed / (1 + exp(-get(z, i))), 1e-13, 1e-13, "g", i);
        }
    }
    tensor w = tensor_3d(weight.data, weight.dtype, GROUPS, 1, N), out = tensor_2d(mean.data, mean.dtype, ROWS, GROUPS);
    dev->ops->block_linear_forward(dev, out, y, w);
    for (int block = 0; block < ROWS * GROUPS; block++) {
        double want = 0;
        for (int i = 0; i < N; i++) want += get(y, block * N + i) * get(weight, block % GROUPS * N + i);
        assert_close(get(out, block), want, 1e-13, 1e-13, "y of a block", block);
    }
    tensor owned[] = {y, x, z, g, mean, rstd, weight, skip};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i].data);
    device_close(dev);
}

static void test_linear_glu_embedding_definitions(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F64);
    tensor x = random_matrix(dev, ROWS, 2 * COLUMNS, 1, 3), w = random_matrix(dev, COLUMNS, 2 * COLUMNS, 2, 1);
    tensor y = random_matrix(dev, ROWS, COLUMNS, 0, 0), bias = random_vector(dev, COLUMNS, 3, 1);
    int32_t tokens[ROWS] = {11, 0, 3, 3, 7};

    dev->ops->linear_forward(dev, y, x, w, bias);
    for (int i = 0; i < ROWS * COLUMNS; i++) {
        double want = get(bias, i % COLUMNS);
        for (int k = 0; k < 2 * COLUMNS; k++)
            want += get(x, i / COLUMNS * 2 * COLUMNS + k) * get(w, i % COLUMNS * 2 * COLUMNS + k);
        assert_close(get(y, i), want, 1e-13, 1e-13, "y", i);
    }
    dev->ops->glu_forward(dev, y, x, ACTIVATION_SILU);
    for (int i = 0; i < ROWS * COLUMNS; i++) {
        double gate = get(x, i / COLUMNS * 2 * COLUMNS + i % COLUMNS);
        double up = get(x, i / COLUMNS * 2 * COLUMNS + COLUMNS + i % COLUMNS);
        assert_close(get(y, i), gate / (1 + exp(-gate)) * up, 1e-13, 0, "h", i);
    }
    tensor out = tensor_2d(x.data, x.dtype, ROWS, 2 * COLUMNS);
    dev->ops->embedding_forward(dev, out, tensor_1d(tokens, DTYPE_I32, ROWS), w);
    for (int i = 0; i < ROWS * 2 * COLUMNS; i++)
        assert_true(get(out, i) == get(w, tokens[i / (2 * COLUMNS)] * 2 * COLUMNS + i % (2 * COLUMNS)));
    tensor owned[] = {x, w, y, bias};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i].data);
    device_close(dev);
}

/* --- optimizer ---------------------------------------------------------------------------------------------------- */

enum { PARAMETERS = 50 };

/* Three steps by the definition, in double, for elements [from, from + count). */
static void reference_adamw(double *p, double *m, double *v, const double *g, int64_t from, int64_t count, double lr,
                            double loss, double bound, const struct adamw_step *step) {
    for (int64_t i = from; i < from + count; i++) {
        double grad = step->grad_scale * g[i];
        m[i] = step->beta1 * m[i] + (1 - step->beta1) * grad;
        v[i] = step->beta2 * v[i] + (1 - step->beta2) * grad * grad;
        p[i] = p[i] - loss * p[i] - lr * (m[i] / step->correction1) / (sqrt(v[i] / step->correction2) + step->eps);
        if (fabs(p[i]) > bound) p[i] = p[i] > 0 ? bound : -bound;
    }
}

static void test_adamw(void **state) {
    (void)state;
    static const struct adamw_segment segments[4] = {
        {.offset = 1, .count = 20, .decay = 0.25f, .lr_scale = 1},
        {.offset = 24, .count = 10, .decay = 2, .lr_scale = 0.5f},
        {.offset = 34, .count = 9, .decay = 0, .lr_scale = 3},
        {.offset = 43, .count = 6, .decay = 1, .lr_scale = 2, .clamp_min = -0.25f, .clamp_max = 0.25f, .clamped = 1}};
    for (int precision = 0; precision < 2; precision++) {
        struct device *dev = open_cpu(precision ? PRECISION_F64 : PRECISION_F32);
        double p[PARAMETERS], m[PARAMETERS] = {0}, v[PARAMETERS] = {0}, g[PARAMETERS];
        tensor tp = random_vector(dev, PARAMETERS, 1, 1), tm = random_vector(dev, PARAMETERS, 0, 0);
        tensor tv = random_vector(dev, PARAMETERS, 0, 0), tg = random_vector(dev, PARAMETERS, 0, 0);
        for (int i = 0; i < PARAMETERS; i++) p[i] = get(tp, i);
        for (int t = 1; t <= 3; t++) {
            /* The decay has a rate of its own, which the learning rate and its scale don't touch. */
            struct adamw_step step = {.lr = 0.01 * t, .decay_rate = 0.03 / t, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-3,
                                      .grad_scale = 0.5, .correction1 = 1 - pow(0.9, t),
                                      .correction2 = 1 - pow(0.95, t)};
            for (int i = 0; i < PARAMETERS; i++) {
                set(tg, i, uniform(10 + (uint32_t)t, i));
                g[i] = get(tg, i);
            }
            reference_adamw(p, m, v, g, 1, 20, step.lr, 0.25 * step.decay_rate, INFINITY, &step);
            reference_adamw(p, m, v, g, 24, 10, 0.5 * step.lr, 2 * step.decay_rate, INFINITY, &step);
            reference_adamw(p, m, v, g, 34, 9, 3 * step.lr, 0, INFINITY, &step);
            reference_adamw(p, m, v, g, 43, 6, 2 * step.lr, step.decay_rate, 0.25, &step);
            struct adamw_slice slice = {.p = tp, .m = tm, .v = tv, .g = tg, .segments = segments, .count = 4};
            dev->ops->adamw(dev, &slice, 1, &step);
            step.skip = 1;
            dev->ops->adamw(dev, &slice, 1, &step); /* changes nothing */
        }
        int at_bound = 0;
        for (int i = 43; i < 49; i++) at_bound += fabs(get(tp, i)) == 0.25;
        assert_in_range(at_bound, 1, 5); /* or the clamp was not tried */
        for (int i = 0; i < PARAMETERS; i++) {
            assert_close(get(tp, i), p[i], 32 * unit_of(dev), 0, "p", i);
            assert_close(get(tm, i), m[i], 32 * unit_of(dev), 4 * unit_of(dev), "m", i);
            assert_close(get(tv, i), v[i], 32 * unit_of(dev), 0, "v", i);
        }
        free(tp.data);
        free(tm.data);
        free(tv.data);
        free(tg.data);
        device_close(dev);
    }
}

/* A weight decay far below the spacing of float at 1 still shrinks weights, and moments don't linger as subnormals. */
static void test_adamw_small_numbers(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    float p[2] = {1e-3f, 1}, m[2] = {1.2e-38f, 0}, v[2] = {1.2e-38f, 1}, g[2] = {0, 0};
    struct adamw_segment segment = {.offset = 0, .count = 2, .decay = 0.1f, .lr_scale = 1};
    struct adamw_step step = {.lr = 1e-5, .decay_rate = 1e-5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                              .grad_scale = 1, .correction1 = 1, .correction2 = 1};
    struct adamw_slice slice = {.p = tensor_1d(p, DTYPE_F32, 2), .m = tensor_1d(m, DTYPE_F32, 2),
                                .v = tensor_1d(v, DTYPE_F32, 2), .g = tensor_1d(g, DTYPE_F32, 2),
                                .segments = &segment, .count = 1};
    dev->ops->adamw(dev, &slice, 1, &step);
    assert_true(m[0] == 0 && v[0] == 0);
    assert_close(p[0], 1e-3 * (1 - 1e-6), 0, 0x1p-33, "p", 0); /* half the spacing of float at 1e-3 */
    assert_close(p[1], 1 - 1e-6, 0, 0x1p-24, "p", 1);
    device_close(dev);
}

/* A clamp on one side leaves the other open, and what is not a number stays visible. */
static void test_adamw_clamp(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    float p[5] = {-7, -1, 0.5f, 2, NAN}, zeros[3][5] = {{0}};
    tensor tp = tensor_1d(p, DTYPE_F32, 5), t[3];
    for (int i = 0; i < 3; i++) t[i] = tensor_1d(zeros[i], DTYPE_F32, 5);
    struct adamw_segment segment = {
        .count = 5, .lr_scale = 1, .clamp_min = -INFINITY, .clamp_max = 1.5f, .clamped = 1};
    struct adamw_step step = {.lr = 1, .eps = 1e-8, .grad_scale = 1, .correction1 = 1, .correction2 = 1};
    struct adamw_slice slice = {.p = tp, .m = t[0], .v = t[1], .g = t[2], .segments = &segment, .count = 1};
    dev->ops->adamw(dev, &slice, 1, &step);
    assert_true(p[0] == -7 && p[1] == -1 && p[2] == 0.5f && p[3] == 1.5f && isnan(p[4]));
    p[3] = 2;
    segment.clamp_min = -1.5f;
    segment.clamp_max = INFINITY;
    dev->ops->adamw(dev, &slice, 1, &step);
    assert_true(p[0] == -1.5f && p[1] == -1 && p[2] == 0.5f && p[3] == 2 && isnan(p[4]));
    device_close(dev);
}

static void test_sum_squares(void **state) {
    (void)state;
    for (int precision = 0; precision < 2; precision++) {
        struct device *dev = open_cpu(precision ? PRECISION_F64 : PRECISION_F32);
        static const int64_t lengths[] = {0, 1, 1023, 1025, 300007};
        for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
            int64_t n = lengths[k];
            tensor x = random_vector(dev, n, 3, 1e3);
            long double want = 5;
            double sum = 5; /* added to */
            for (int64_t i = 0; i < n; i++) want += (long double)get(x, i) * (long double)get(x, i);
            dev->ops->sum_squares(dev, &sum, x);
            assert_close(sum, (double)want, 1e-14, 0, "sum", 0);
            if (n > 1000) {
                set(x, 1000, NAN);
                dev->ops->sum_squares(dev, &sum, x);
                assert_true(isnan(sum));
            }
            free(x.data);
        }
        float huge[4] = {3e38f, 1e-30f, -3e38f, 0}; /* squares that float can't hold */
        double sum = 0;
        if (precision == 0) {
            dev->ops->sum_squares(dev, &sum, tensor_1d(huge, DTYPE_F32, 4));
            assert_close(sum, 2 * 9e76, 1e-6, 0, "sum of huge numbers", 0);
        }
        device_close(dev);
    }
}

/* --- numbers that are not finite ---------------------------------------------------------------------------------- */

/* Numbers that are not finite pass through: into the result of their row and no further. */
static void test_not_finite(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    enum { R = 3, D = 40 };
    tensor x = random_matrix(dev, R, D, 1, 1), y = random_matrix(dev, R, D, 2, 1), r = random_matrix(dev, R, D, 3, 1);
    tensor w = random_matrix(dev, D, D, 4, 1), weight = random_vector(dev, D, 5, 1), rstd = random_vector(dev, R, 6, 1);
    set(x, 1 * D + 7, NAN);
    for (int op = 0; op < 3; op++) {
        tensor rstd_groups = tensor_2d(rstd.data, DTYPE_F32, R, 1);
        if (op == 0) dev->ops->add_norm_forward(dev, r, y, tensor_none(), rstd, x, tensor_none(), tensor_none(), weight,
                                                1e-5);
        if (op == 1) dev->ops->linear_forward(dev, y, x, w, tensor_none());
        if (op == 2) dev->ops->gated_rmsnorm_forward(dev, y, rstd_groups, x, r, weight, false, 1e-5);
        for (int64_t row = 0; row < R; row++)
            for (int64_t i = 0; i < D; i++)
                if (isnan(get(y, row * D + i)) != (row == 1))
                    fail_msg("operation %d: element %lld of row %lld is %g", op, (long long)i, (long long)row,
                             get(y, row * D + i));
    }
    tensor h = tensor_2d(y.data, DTYPE_F32, R, D / 2);
    dev->ops->glu_forward(dev, h, x, ACTIVATION_SILU);
    for (int64_t i = 0; i < R * D / 2; i++) assert_true(isnan(get(h, i)) == (i == D / 2 + 7));
    free(x.data);
    free(y.data);
    free(r.data);
    free(w.data);
    free(weight.data);
    free(rstd.data);
    device_close(dev);
}

/* --- the number of threads ---------------------------------------------------------------------------------------- */

enum { MANY_ROWS = 2111, WIDTH = 97, TABLE_ROWS = 31 };

/* What sums over rows or over everything, all into one array of results. */
static size_t sums_over_rows(struct device *dev, double *results) {
    tensor a = random_matrix(dev, MANY_ROWS, WIDTH, 1, 1), b = random_matrix(dev, MANY_ROWS, WIDTH, 2, 1);
    tensor dx = random_matrix(dev, MANY_ROWS, WIDTH, 3, 1), dz = random_matrix(dev, MANY_ROWS, WIDTH, 4, 1);
    tensor weight = random_vector(dev, WIDTH, 5, 1), rstd = random_matrix(dev, MANY_ROWS, 1, 6, 1);
    tensor dweight = random_matrix(dev, 3, WIDTH, 7, 1), table = random_matrix(dev, TABLE_ROWS, WIDTH, 8, 1);
    void *scratch = must_allocate(dev->ops->gated_rmsnorm_backward_scratch(MANY_ROWS, WIDTH));
    int32_t tokens[MANY_ROWS];
    tensor none = tensor_none(), sums[3], w = tensor_2d(table.data, table.dtype, TABLE_ROWS, WIDTH);
    for (int i = 0; i < MANY_ROWS; i++) tokens[i] = i * i % TABLE_ROWS;
    for (int i = 0; i < 3; i++) {
        tensor row = tensor_columns(tensor_2d(dweight.data, dweight.dtype, 1, 3 * WIDTH), i * WIDTH, WIDTH);
        sums[i] = tensor_1d(row.data, row.dtype, WIDTH);
    }
    results[0] = 0;
    dev->ops->sum_squares(dev, &results[0], tensor_1d(a.data, a.dtype, MANY_ROWS * WIDTH));
    dev->ops->add_norm_backward(dev, dx, none, sums[0], none, a, none, b, none,
                                tensor_1d(rstd.data, rstd.dtype, MANY_ROWS), weight, none, scratch);
    dev->ops->gated_rmsnorm_backward(dev, dx, dz, sums[1], none, a, b, a, rstd, weight, false, scratch);
    tensor y = tensor_2d(dz.data, dz.dtype, MANY_ROWS, TABLE_ROWS);
    dev->ops->linear_backward(dev, none, false, none, tensor_1d(sums[2].data, dev->ops->real, TABLE_ROWS), y, a, w);
    dev->ops->embedding_backward(dev, table, a, tensor_1d(tokens, DTYPE_I32, MANY_ROWS), NULL);
    size_t count = 1;
    for (int64_t i = 0; i < 3 * WIDTH; i++) results[count++] = get(dweight, i);
    for (int64_t i = 0; i < TABLE_ROWS * WIDTH; i++) results[count++] = get(table, i);
    tensor owned[] = {a, b, dx, dz, weight, rstd, dweight, table};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i].data);
    free(scratch);
    return count;
}

static void test_any_number_of_threads(void **state) {
    (void)state;
    static double one[1 + 3 * WIDTH + TABLE_ROWS * WIDTH], more[1 + 3 * WIDTH + TABLE_ROWS * WIDTH];
    int before = threads_now();
    for (int precision = 0; precision < 2; precision++) {
        struct device *dev = open_cpu(precision ? PRECISION_F64 : PRECISION_F32);
        use_threads(1);
        size_t count = sums_over_rows(dev, one);
        for (int threads = 2; threads <= 5; threads++) {
            use_threads(threads);
            assert_int_equal(sums_over_rows(dev, more), count);
            assert_memory_equal(one, more, count * sizeof *one);
        }
        device_close(dev);
    }
    use_threads(before);
}

/* --- broken calls ------------------------------------------------------------------------------------------------- */

/* True if the call aborts, as a broken precondition must. */
static bool aborts(void (*call)(struct device *dev)) {
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct device *dev = open_cpu(PRECISION_F32);
        if (freopen("/dev/null", "w", stderr) == NULL) _exit(3);
        call(dev);
        _exit(0);
    }
    int status;
    assert_true(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

static float broken[64];

static void call_wrong_width(struct device *dev) {
    dev->ops->linear_forward(dev, tensor_2d(broken, DTYPE_F32, 2, 3), tensor_2d(broken + 8, DTYPE_F32, 2, 4),
                             tensor_2d(broken + 16, DTYPE_F32, 3, 5), tensor_none());
}

static void call_wrong_dtype(struct device *dev) {
    dev->ops->glu_forward(dev, tensor_2d(broken, DTYPE_F32, 2, 2), tensor_2d(broken + 8, DTYPE_F64, 2, 4),
                          ACTIVATION_SILU);
}

static void call_wrong_stride(struct device *dev) {
    tensor h = tensor_columns(tensor_2d(broken, DTYPE_F32, 2, 4), 0, 2);
    dev->ops->glu_forward(dev, h, tensor_2d(broken + 8, DTYPE_F32, 2, 4), ACTIVATION_SILU);
}

static void call_wrong_token(struct device *dev) {
    int32_t tokens[2] = {0, 7};
    dev->ops->embedding_forward(dev, tensor_2d(broken, DTYPE_F32, 2, 3), tensor_1d(tokens, DTYPE_I32, 2),
                                tensor_2d(broken + 8, DTYPE_F32, 7, 3));
}

static void call_segment_beyond_end(struct device *dev) {
    struct adamw_segment segment = {.offset = 3, .count = 6, .lr_scale = 1};
    struct adamw_step step = {.correction1 = 1, .correction2 = 1};
    tensor t = tensor_1d(broken, DTYPE_F32, 8);
    struct adamw_slice slice = {.p = t, .m = t, .v = t, .g = t, .segments = &segment, .count = 1};
    dev->ops->adamw(dev, &slice, 1, &step);
}

static void call_join_gap(struct device *dev) {
    (void)dev;
    tensor gap = tensor_columns(tensor_2d(broken, DTYPE_F32, 4, 8), 0, 6);
    tensor_join_first(tensor_split_last(gap, 2, 3));
}

static void test_broken_calls_abort(void **state) {
    (void)state;
    assert_true(aborts(call_wrong_width));
    assert_true(aborts(call_wrong_dtype));
    assert_true(aborts(call_wrong_stride));
    assert_true(aborts(call_wrong_token));
    assert_true(aborts(call_segment_beyond_end));
    assert_true(aborts(call_join_gap));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_broken_calls_abort), /* first: it forks, before any thread is started */
        cmocka_unit_test(test_tensor_views),
        cmocka_unit_test(test_tensor_absent),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_device),
        cmocka_unit_test(test_tables_complete),
        cmocka_unit_test(test_norm_definitions),
        cmocka_unit_test(test_head_norm_definitions),
        cmocka_unit_test(test_linear_glu_embedding_definitions),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_adamw_small_numbers),
        cmocka_unit_test(test_adamw_clamp),
        cmocka_unit_test(test_sum_squares),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_any_number_of_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
