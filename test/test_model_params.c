/* test_model_params.c: the tensor table: layout for any number of ranks, views, slices, and initial values. */
#include "test/unit.h"

#include "model/params.h"
#include <math.h>

static const struct init one = {INIT_CONSTANT, 1, 0, 0};

/* Three buckets: a matrix; a vector kept real and a small tensor that isn't, whose sizes are no multiples of anything;
 * one element. */
static void make(struct params *p) {
    params_open(p);
    params_add(p, 2, (int64_t[]){7, 5}, one, true, false, "a.%d.weight", 3);
    params_next_bucket(p);
    params_add(p, 1, (int64_t[]){13}, one, false, true, "b");
    params_add(p, 3, (int64_t[]){3, 1, 2}, one, false, false, "c");
    params_next_bucket(p);
    params_next_bucket(p); /* an empty one is not made */
    params_add(p, 1, (int64_t[]){1}, one, false, true, "d");
}

static void test_table(void **state) {
    (void)state;
    struct params p;
    make(&p);
    assert_int_equal(p.count, 4);
    assert_int_equal(p.bucket_count, 3);
    assert_int_equal(p.total, 35 + 13 + 6 + 1);
    assert_string_equal(p.list[0].name, "a.3.weight");
    assert_int_equal(params_find(&p, "c"), 2);
    assert_int_equal(params_find(&p, "missing"), -1);
    assert_int_equal(p.list[2].count, 6);
    assert_int_equal(p.list[2].bucket, 1);
    assert_int_equal(p.buckets[1].first, 1);
    assert_int_equal(p.buckets[1].params, 2);
    assert_int_equal(p.list[1].offset, -1);
    params_close(&p);
}

/* A part: its tensors don't overlap and start aligned; the slices of all ranks tile it. */
static void check_part(const struct params *p, int b, int kind, int64_t from, bool rounds) {
    const struct bucket *bucket = &p->buckets[b];
    const struct part *part = &bucket->part[kind];
    int64_t used = from, end = from;
    assert_int_equal(part->offset, from);
    assert_int_equal(part->count % (PARAM_ALIGN * p->ranks), 0);
    for (int i = bucket->first; i < bucket->first + bucket->params; i++) {
        const struct param *t = &p->list[i];
        assert_int_equal(t->part, rounds && !t->keep_real ? PART_ROUNDED : PART_REAL);
        if (t->part != kind) continue;
        assert_true(t->offset >= used);
        assert_int_equal(t->offset % PARAM_ALIGN, 0);
        used = t->offset + t->count;
    }
    assert_true(used <= from + part->count);
    assert_true(from + part->count - used < PARAM_ALIGN * (int64_t)(p->ranks + 1));
    for (int r = 0; r < p->ranks; r++) {
        int64_t offset, count;
        params_slice(p, b, kind, r, &offset, &count);
        assert_int_equal(offset, end);
        end = offset + count;
    }
    assert_int_equal(end, from + part->count);
}

/* Parts tile buckets, and buckets the flat array; the parts of a kind tile an array of theirs. */
static void check_layout(int ranks, bool rounds) {
    struct params table, p;
    make(&table);
    assert_int_equal(params_copy(&p, &table, &(error){0}), 0);
    params_layout(&p, ranks, rounds);
    assert_int_equal(table.list[0].offset, -1); /* the copy is one */
    int64_t end = 0, places[PARTS] = {0, 0};
    for (int b = 0; b < p.bucket_count; b++) {
        const struct bucket *bucket = &p.buckets[b];
        assert_int_equal(bucket->offset, end);
        for (int kind = 0; kind < PARTS; kind++) {
            check_part(&p, b, kind, end, rounds);
            end += bucket->part[kind].count;
            assert_int_equal(bucket->part[kind].place, places[kind]);
            places[kind] += bucket->part[kind].count;
        }
        assert_int_equal(end, bucket->offset + bucket->count);
    }
    assert_int_equal(p.elements, end);
    for (int kind = 0; kind < PARTS; kind++) assert_int_equal(p.part_elements[kind], places[kind]);
    params_close(&p);
    params_close(&table);
}

static void test_layout(void **state) {
    (void)state;
    for (int rounds = 0; rounds < 2; rounds++) {
        for (int ranks = 1; ranks <= 8; ranks++) check_layout(ranks, rounds);
        check_layout(63, rounds);
    }
}

static void test_views(void **state) {
    (void)state;
    struct params p;
    make(&p);
    params_layout(&p, 2, false);
    float *flat = calloc((size_t)p.elements, sizeof *flat);
    tensor c = params_view(&p, 2, flat, DTYPE_F32);
    assert_true(tensor_is(c, 3, (int64_t)3, (int64_t)1, (int64_t)2));
    assert_ptr_equal(c.data, flat + p.list[2].offset);
    assert_null(params_view(&p, 2, NULL, DTYPE_F64).data);
    free(flat);
    params_close(&p);
}

/* --- initial values ----------------------------------------------------------------------------- */

enum { MANY = 20000 };

struct statistics {
    double min, max, mean, deviation;
};

static struct statistics draw(struct init init, int index, uint64_t seed, double *values) {
    struct params p;
    params_open(&p);
    for (int i = 0; i <= index; i++) params_add(&p, 1, (int64_t[]){MANY}, init, false, false, "t%d", i);
    params_initial(&p, index, seed, values, DTYPE_F64);
    params_close(&p);
    struct statistics s = {values[0], values[0], 0, 0};
    for (int i = 0; i < MANY; i++) {
        s.min = fmin(s.min, values[i]);
        s.max = fmax(s.max, values[i]);
        s.mean += values[i] / MANY;
    }
    for (int i = 0; i < MANY; i++) s.deviation += (values[i] - s.mean) * (values[i] - s.mean) / MANY;
    s.deviation = sqrt(s.deviation);
    return s;
}

/* Bounds on means are five standard errors. */
static void test_distributions(void **state) {
    (void)state;
    double *x = malloc(MANY * sizeof *x);
    struct statistics s = draw((struct init){INIT_NORMAL, 0.02, 0, 0}, 0, 1, x);
    assert_true(fabs(s.mean) < 5 * 0.02 / sqrt(MANY));
    assert_true(fabs(s.deviation / 0.02 - 1) < 0.03);
    assert_true(s.max > 3 * 0.02 && s.max < 6 * 0.02 && s.min < -3 * 0.02);

    s = draw((struct init){INIT_UNIFORM, -0.5, 0.5, 0}, 1, 1, x);
    assert_true(s.min >= -0.5 && s.min < -0.499 && s.max < 0.5 && s.max > 0.499);
    assert_true(fabs(s.mean) < 5 / sqrt(12.0 * MANY));
    assert_true(fabs(s.deviation * sqrt(12) - 1) < 0.02);

    s = draw((struct init){INIT_LOG_UNIFORM, 1, 16, 0}, 2, 1, x);
    assert_true(s.min >= 0 && s.max < log(16) && s.max > log(15.9));
    double mean = 0;
    for (int i = 0; i < MANY; i++) mean += exp(x[i]) / MANY; /* uniform itself, not in its logarithm */
    assert_true(fabs(mean - 8.5) < 5 * 15 / sqrt(12.0 * MANY));

    draw((struct init){INIT_LOG_COUNT, 16, 0, 0}, 0, 1, x);
    for (int i = 0; i < MANY; i++) assert_true(x[i] == log(1 + i % 16));

    s = draw((struct init){INIT_CONSTANT, 1, 0, 0}, 0, 1, x);
    assert_true(s.min == 1 && s.max == 1);
    free(x);
}

/* Values that are laid down rather than drawn: the biases of xLSTM's gates. */
static void test_rows(void **state) {
    (void)state;
    double *x = malloc(MANY * sizeof *x);
    draw((struct init){INIT_LINSPACE, 3, 6, 4}, 0, 1, x);
    for (int i = 0; i < MANY; i++) assert_true(x[i] == 3 + i % 4);
    draw((struct init){INIT_LINSPACE, 3, 6, 1}, 0, 1, x);
    assert_true(x[0] == 3 && x[1] == 3);
    draw((struct init){INIT_SLSTM_BIAS, 2, MANY / 4, 5}, 0, 1, x);
    for (int i = 0; i < MANY; i++) {
        static const double forget[] = {5, 5 - 12.0 / 16, 5 - 12.0 / 4, 5 - 12 * 9.0 / 16, -7};
        assert_true(i / (MANY / 4) == 1 ? fabs(x[i] - forget[i % 5]) < 1e-14 : x[i] == 0);
    }
    draw((struct init){INIT_SLSTM_BIAS, 0.3, MANY / 4, 1}, 0, 1, x);
    assert_true(x[MANY / 4] == 5 && x[MANY / 4 - 1] == 0);
    free(x);
}

/* softplus(bias) is log-uniform over [0.001, 0.1], raised to the floor. */
static void test_dt_bias(void **state) {
    (void)state;
    double *x = malloc(MANY * sizeof *x), mean_log = 0;
    draw((struct init){INIT_DT_BIAS, 0.001, 0.1, 1e-4}, 0, 7, x);
    for (int i = 0; i < MANY; i++) {
        double dt = log1p(exp(x[i]));
        assert_true(dt >= 0.001 * (1 - 1e-9) && dt <= 0.1 * (1 + 1e-9));
        mean_log += log(dt) / MANY;
    }
    assert_true(fabs(mean_log - log(0.01)) < 5 * log(100) / sqrt(12.0 * MANY));
    draw((struct init){INIT_DT_BIAS, 0.001, 0.1, 0.05}, 0, 7, x);
    int raised = 0;
    for (int i = 0; i < MANY; i++) {
        double dt = log1p(exp(x[i]));
        assert_true(dt >= 0.05 * (1 - 1e-9));
        raised += dt < 0.05 * (1 + 1e-9);
    }
    assert_true(raised > MANY / 2); /* ln(50)/ln(100) of them */
    free(x);
}

/* A value depends on seed, tensor and element, and on nothing else. */
static void test_keys(void **state) {
    (void)state;
    struct params p, many;
    make(&p);
    p.list[0].init = p.list[1].init = (struct init){INIT_NORMAL, 1, 0, 0};
    assert_int_equal(params_copy(&many, &p, &(error){0}), 0);
    params_layout(&p, 1, false);
    params_layout(&many, 3, false);
    double a[35], b[35], part[10];
    float single[35];
    params_initial(&p, 0, 5, a, DTYPE_F64);
    params_initial(&many, 0, 5, b, DTYPE_F64);
    assert_memory_equal(a, b, sizeof a);
    params_initial_part(&p, 0, 5, 20, 10, part, DTYPE_F64);
    assert_memory_equal(part, a + 20, sizeof part);
    params_initial(&p, 0, 5, single, DTYPE_F32);
    for (int i = 0; i < 35; i++) assert_true(single[i] == (float)a[i]);
    params_initial(&p, 0, 6, b, DTYPE_F64);
    assert_true(a[0] != b[0] && a[1] != b[1]);
    params_initial(&p, 1, 5, b, DTYPE_F64);
    assert_true(a[0] != b[0] && a[1] != b[1]);
    params_close(&many);
    params_close(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table),         cmocka_unit_test(test_layout),  cmocka_unit_test(test_views),
        cmocka_unit_test(test_distributions), cmocka_unit_test(test_rows),    cmocka_unit_test(test_dt_bias),
        cmocka_unit_test(test_keys),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
