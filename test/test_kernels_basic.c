/* test/test_kernels_basic.c: tensor views, the CPU device, and what the case table (test/ops.c) can't say about the
 * operations without recurrence: exact references written out by hand, ties, accumulation, numbers that are not finite,
 * independence of the number of threads, broken shapes. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/device.h"
#include "common/rng.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* --- help --------------------------------------------------------------------------------------------------------- */

static struct device *open_cpu(enum precision precision) {
    struct device *dev;
    error err = {0};
    assert_int_equal(device_open(&dev, DEVICE_CPU, precision, &err), 0);
    return dev;
}

static double uniform(uint32_t stream, int64_t i) {
    return 2 * rng_uniform((rng_key){.seed = 7, .purpose = RNG_TEST, .stream = stream}, (uint64_t)i) - 1;
}

static void *must_allocate(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);
    assert_non_null(p);
    return p;
}

static double get(tensor t, int64_t i) {
    return t.dtype == DTYPE_F64 ? ((double *)t.data)[i] : (double)((float *)t.data)[i];
}

static void set(tensor t, int64_t i, double v) {
    if (t.dtype == DTYPE_F64) ((double *)t.data)[i] = v;
    else ((float *)t.data)[i] = (float)v;
}

/* A contiguous (a,b) tensor of the device's type with values scale * uniform(stream). Freed by the caller. */
static tensor random_matrix(struct device *dev, int64_t a, int64_t b, uint32_t stream, double scale) {
    tensor t = tensor_2d(must_allocate((size_t)(a * b) * 8), dev->ops->real, a, b);
    for (int64_t i = 0; i < a * b; i++) set(t, i, scale * uniform(stream, i));
    return t;
}

static tensor random_vector(struct device *dev, int64_t n, uint32_t stream, double scale) {
    tensor t = random_matrix(dev, 1, n, stream, scale);
    return tensor_1d(t.data, t.dtype, n);
}

static void assert_close(double got, double want, double share, double floor, const char *what, int64_t i) {
    if (fabs(got - want) <= share * fabs(want) + floor) return;
    fail_msg("%s[%lld] is %.17g, should be %.17g", what, (long long)i, got, want);
}

static double unit_of(const struct device *dev) {
    return dev->precision == PRECISION_F64 ? 0x1p-53 : 0x1p-24;
}

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

    dev->ops->add_rmsnorm_forward(dev, r, y, tensor_1d(rstd.data, rstd.dtype, ROWS), x, branch, weight, eps);
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
    dev->ops->gated_rmsnorm_forward(dev, y, rstd, x, branch, weight, eps);
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

/* --- head with loss against all logits at once -------------------------------------------------------------------- */

struct head_case {
    int64_t R, D, V;
    double scale, z_loss;
    int mask; /* every mask-th row has no target; 0: none is masked; 1: all */
};

struct head_operands {
    tensor x, w, dx, dw, dw_before, losses;
    int32_t *targets;
    void *scratch;
};

static struct head_operands head_open(struct device *dev, const struct head_case *c) {
    struct head_operands o = {
        .x = random_matrix(dev, c->R, c->D, 1, 2), .w = random_matrix(dev, c->V, c->D, 2, 1),
        .dx = random_matrix(dev, c->R, c->D, 3, 1), .dw = random_matrix(dev, c->V, c->D, 4, 1),
        .dw_before = random_matrix(dev, c->V, c->D, 4, 1), .losses = random_vector(dev, c->R, 5, 1),
        .targets = must_allocate((size_t)c->R * sizeof(int32_t)),
        .scratch = must_allocate(dev->ops->head_loss_scratch(c->R, c->D, c->V)),
    };
    for (int64_t r = 0; r < c->R; r++) {
        o.targets[r] = (int32_t)((double)c->V * (uniform(6, r) + 1) / 2);
        if (c->mask && r % c->mask == 0) o.targets[r] = -100;
    }
    return o;
}

static void head_close(struct head_operands *o) {
    free(o->x.data);
    free(o->w.data);
    free(o->dx.data);
    free(o->dw.data);
    free(o->dw_before.data);
    free(o->losses.data);
    free(o->targets);
    free(o->scratch);
}

/* One row by the definition: dlogits, and its part of the sums. */
static struct loss_sums reference_row(const struct head_case *c, const struct head_operands *o, int64_t r,
                                      long double *dlogits) {
    long double most = -INFINITY, sum = 0;
    int64_t argmax = 0, target = o->targets[r];
    for (int64_t v = 0; v < c->V; v++) {
        dlogits[v] = 0;
        for (int64_t i = 0; i < c->D; i++)
            dlogits[v] += (long double)get(o->x, r * c->D + i) * (long double)get(o->w, v * c->D + i);
        if (dlogits[v] > most) {
            most = dlogits[v];
            argmax = v;
        }
    }
    long double at_target = dlogits[target];
    for (int64_t v = 0; v < c->V; v++) sum += expl(dlogits[v] - most);
    long double lse = most + logl(sum);
    for (int64_t v = 0; v < c->V; v++) {
        long double p = expl(dlogits[v] - lse);
        dlogits[v] = c->scale * (p - (v == target) + 2 * c->z_loss * lse * p);
    }
    return (struct loss_sums){(double)(lse - at_target), (double)(c->z_loss * lse * lse), 1, argmax == target};
}

/* dx (R,D), and dw (V,D) = dw_before + ..., by the definition, with all logits of a row in memory. */
static struct loss_sums reference(const struct head_case *c, const struct head_operands *o, long double *dx,
                                  long double *dw, double *losses) {
    struct loss_sums sums = {0};
    long double *dlogits = must_allocate((size_t)c->V * sizeof *dlogits);
    memset(dx, 0, (size_t)(c->R * c->D) * sizeof *dx);
    for (int64_t i = 0; i < c->V * c->D; i++) dw[i] = get(o->dw_before, i);
    for (int64_t r = 0; r < c->R; r++) {
        losses[r] = 0;
        if (o->targets[r] < 0) continue;
        struct loss_sums one = reference_row(c, o, r, dlogits);
        losses[r] = one.nll;
        sums = (struct loss_sums){sums.nll + one.nll, sums.z + one.z, sums.valid + 1, sums.correct + one.correct};
        for (int64_t v = 0; v < c->V; v++)
            for (int64_t i = 0; i < c->D; i++) {
                dx[r * c->D + i] += dlogits[v] * (long double)get(o->w, v * c->D + i);
                dw[v * c->D + i] += dlogits[v] * (long double)get(o->x, r * c->D + i);
            }
    }
    free(dlogits);
    return sums;
}

static void check_head(struct device *dev, const struct head_case *c) {
    struct head_operands o = head_open(dev, c);
    long double *dx = must_allocate((size_t)(c->R * c->D) * sizeof *dx);
    long double *dw = must_allocate((size_t)(c->V * c->D) * sizeof *dw);
    double *losses = must_allocate((size_t)c->R * sizeof *losses), unit = unit_of(dev);
    struct loss_sums want = reference(c, &o, dx, dw, losses), got = {10, 20, 30, 40}, only = {0};
    tensor targets = tensor_1d(o.targets, DTYPE_I32, c->R), none = tensor_none();

    dev->ops->head_loss(dev, &got, o.losses, o.dx, o.dw, o.x, o.w, targets, c->scale, c->z_loss, o.scratch);
    dev->ops->head_loss(dev, &only, none, none, none, o.x, o.w, targets, c->scale, c->z_loss, o.scratch);
    double share = 100 * unit * sqrt((double)(c->V + c->R));
    assert_close(got.nll - 10, want.nll, share, share, "nll", 0);
    assert_close(got.z - 20, want.z, share, share, "z", 0);
    assert_true(got.valid - 30 == want.valid && got.correct - 40 == want.correct);
    assert_close(only.nll, want.nll, share, share, "nll without gradients", 0);
    assert_close(only.z, want.z, share, share, "z without gradients", 0);
    assert_true(only.valid == want.valid && only.correct == want.correct);
    for (int64_t r = 0; r < c->R; r++) assert_close(get(o.losses, r), losses[r], share, share, "losses", r);
    for (int64_t i = 0; i < c->R * c->D; i++)
        assert_close(get(o.dx, i), (double)dx[i], share, share * c->scale, "dx", i);
    for (int64_t i = 0; i < c->V * c->D; i++)
        assert_close(get(o.dw, i), (double)dw[i], share, share * c->scale, "dw", i);
    free(dx);
    free(dw);
    free(losses);
    head_close(&o);
}

static void test_head_loss(void **state) {
    (void)state;
    static const struct head_case cases[] = {
        {.R = 1, .D = 1, .V = 1, .scale = 1, .z_loss = 0.1},
        {.R = 7, .D = 5, .V = 13, .scale = 0.25, .z_loss = 0, .mask = 3},
        {.R = 7, .D = 5, .V = 13, .scale = 0.25, .z_loss = 0.02, .mask = 2},
        {.R = 9, .D = 8, .V = 11, .scale = 3, .z_loss = 0.02, .mask = 1},
        {.R = 1237, .D = 6, .V = 257, .scale = 1e-3, .z_loss = 1e-4, .mask = 5}, /* more rows than a tile */
        {.R = 180, .D = 2, .V = 50021, .scale = 1e-2, .z_loss = 1e-4}, /* more rows than the bytes of a tile allow */
    };
    for (int p = 0; p < 2; p++) {
        struct device *dev = open_cpu(p ? PRECISION_F64 : PRECISION_F32);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
            if (p == 1 || cases[i].V < 10000) check_head(dev, &cases[i]); /* the large one takes seconds */
        device_close(dev);
    }
}

/* Rows of w that are equal give equal logits: only the lowest index counts as the argmax. */
static void test_head_ties(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    float x[3 * 2] = {1, 0, 1, 0, 1, 0}, w[4 * 2] = {0, 0, 2, 5, 2, -5, 1, 0};
    int32_t targets[3] = {1, 2, 3};
    struct loss_sums sums = {0};
    void *scratch = must_allocate(dev->ops->head_loss_scratch(3, 2, 4));
    dev->ops->head_loss(dev, &sums, tensor_none(), tensor_none(), tensor_none(), tensor_2d(x, DTYPE_F32, 3, 2),
                        tensor_2d(w, DTYPE_F32, 4, 2), tensor_1d(targets, DTYPE_I32, 3), 1, 0, scratch);
    assert_true(sums.valid == 3 && sums.correct == 1);
    free(scratch);
    device_close(dev);
}

/* Logits of hundreds and thousands: the largest is subtracted before exp, so nothing overflows. */
static void test_head_large_logits(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    float x[2] = {1000, -1000}, w[3] = {1, 2, 2.5f}, losses[2], dx[2];
    int32_t targets[2] = {2, 2};
    struct loss_sums sums = {0};
    void *scratch = must_allocate(dev->ops->head_loss_scratch(2, 1, 3));
    dev->ops->head_loss(dev, &sums, tensor_1d(losses, DTYPE_F32, 2), tensor_2d(dx, DTYPE_F32, 2, 1), tensor_none(),
                        tensor_2d(x, DTYPE_F32, 2, 1), tensor_2d(w, DTYPE_F32, 3, 1), tensor_1d(targets, DTYPE_I32, 2),
                        1, 0, scratch);
    assert_true(losses[0] == 0 && losses[1] == 1500);
    assert_true(dx[0] == 0 && dx[1] == 1 - 2.5f);
    free(scratch);
    device_close(dev);
}

/* Scratch is a tile: it must not grow with the number of rows, nor hold R x V logits. */
static void test_head_scratch(void **state) {
    (void)state;
    for (int t = 0; t < 2; t++) {
        const struct ops *ops = t ? &ops_cpu_f64 : &ops_cpu_f32;
        assert_true(ops->head_loss_scratch(1 << 20, 768, 50288) == ops->head_loss_scratch(4096, 768, 50288));
        assert_true(ops->head_loss_scratch(1 << 20, 768, 50288) < (size_t)80 << 20);
        assert_true(ops->head_loss_scratch(1 << 20, 256, 257) < (size_t)16 << 20);
        assert_true(ops->head_loss_scratch(1, 8, 257) < 8192);
    }
}

/* A NaN in one row of x makes that row's loss and gradient NaN, and the total; it does not spread to others. */
static void test_head_not_finite(void **state) {
    (void)state;
    for (int p = 0; p < 2; p++) {
        struct device *dev = open_cpu(p ? PRECISION_F64 : PRECISION_F32);
        struct head_case c = {.R = 5, .D = 4, .V = 37, .scale = 1, .z_loss = 1e-3};
        struct head_operands o = head_open(dev, &c);
        struct loss_sums sums = {0};
        set(o.x, 1 * c.D + 2, NAN);
        set(o.x, 3 * c.D + 1, INFINITY);
        dev->ops->head_loss(dev, &sums, o.losses, o.dx, o.dw, o.x, o.w, tensor_1d(o.targets, DTYPE_I32, c.R), 1,
                            c.z_loss, o.scratch);
        assert_true(isnan(sums.nll) && isnan(sums.z));
        for (int64_t r = 0; r < c.R; r++) {
            bool sick = r == 1 || r == 3;
            assert_true(isfinite(get(o.losses, r)) == !sick);
            assert_true(isfinite(get(o.dx, r * c.D)) == !sick);
        }
        assert_true(isnan(get(o.dw, 0)));
        head_close(&o);
        device_close(dev);
    }
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

/* --- linear and embedding: gradients add up ----------------------------------------------------------------------- */

/* A tied table gets its gradient from the head, then from the embedding, onto what is there. */
static void test_tied_gradient(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F64);
    struct head_case c = {.R = 6, .D = 3, .V = 5, .scale = 1, .z_loss = 0};
    struct head_operands o = head_open(dev, &c);
    tensor tokens = tensor_1d(o.targets, DTYPE_I32, c.R), apart = random_matrix(dev, c.V, c.D, 0, 0);
    struct loss_sums sums = {0};
    dev->ops->head_loss(dev, &sums, tensor_none(), o.dx, apart, o.x, o.w, tokens, 1, 0, o.scratch);
    dev->ops->embedding_backward(dev, apart, o.dx, tokens, NULL);
    dev->ops->head_loss(dev, &sums, tensor_none(), o.dx, o.dw, o.x, o.w, tokens, 1, 0, o.scratch);
    dev->ops->embedding_backward(dev, o.dw, o.dx, tokens, NULL);
    for (int64_t i = 0; i < c.V * c.D; i++)
        assert_close(get(o.dw, i), get(o.dw_before, i) + get(apart, i), 1e-14, 1e-14, "dw", i);
    free(apart.data);
    head_close(&o);
    device_close(dev);
}

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
        if (op == 0) dev->ops->add_rmsnorm_forward(dev, r, y, rstd, x, tensor_none(), weight, 1e-5);
        if (op == 1) dev->ops->linear_forward(dev, y, x, w, tensor_none());
        if (op == 2) dev->ops->gated_rmsnorm_forward(dev, y, rstd_groups, x, r, weight, 1e-5);
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
    dev->ops->add_rmsnorm_backward(dev, dx, none, sums[0], a, none, b, tensor_1d(rstd.data, rstd.dtype, MANY_ROWS),
                                   weight, scratch);
    dev->ops->gated_rmsnorm_backward(dev, dx, dz, sums[1], none, a, b, a, rstd, weight, scratch);
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
        cmocka_unit_test(test_linear_glu_embedding_definitions),
        cmocka_unit_test(test_head_loss),
        cmocka_unit_test(test_head_ties),
        cmocka_unit_test(test_head_large_logits),
        cmocka_unit_test(test_head_scratch),
        cmocka_unit_test(test_head_not_finite),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_adamw_small_numbers),
        cmocka_unit_test(test_adamw_clamp),
        cmocka_unit_test(test_sum_squares),
        cmocka_unit_test(test_tied_gradient),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_any_number_of_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
