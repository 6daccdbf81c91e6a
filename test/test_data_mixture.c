/* test_data_mixture.c: which sample stands at a global sample number: shares of a block, epochs, orders, refusals. */
#include "data/mixture.h"
#include "test/unit.h"

#include <math.h>

#define MANY 4

struct set { /* a mixture and the sources it was made of */
    struct loader_source sources[LIMIT_SOURCES];
    struct mixture mixture;
    struct mixture_block block;
};

static int make(struct set *set, const double *weights, const uint64_t *samples, size_t count, uint64_t seed,
                bool shuffle, error *err) {
    static const char *const names[] = {"a", "b", "c", "d", "e"};
    memset(set, 0, sizeof *set);
    for (size_t s = 0; s < count; s++) {
        set->sources[s] = (struct loader_source){.name = s < 5 ? names[s] : "more", .weight = weights[s]};
    }
    set->block.number = MIXTURE_NO_BLOCK;
    return mixture_make(&set->mixture, set->sources, samples, count, seed, shuffle, err);
}

static void make_good(struct set *set, const double *weights, const uint64_t *samples, size_t count, uint64_t seed,
                      bool shuffle) {
    error err = {.kind = ERROR_NONE};
    if (make(set, weights, samples, count, seed, shuffle, &err) != 0) fail_msg("%s", err.text);
}

static void test_places(void **state) {
    (void)state;
    static const struct {
        size_t count;
        double weights[MANY];
        uint32_t places[MANY];
    } cases[] = {
        {1, {0.001}, {4096}},
        {2, {1, 1}, {2048, 2048}},
        {2, {3, 1}, {3072, 1024}},
        {2, {0.3, 0.1}, {3072, 1024}},
        {2, {0.7, 0.3}, {2867, 1229}},
        {3, {1, 1, 1}, {1366, 1365, 1365}},
        {3, {1e308, 1e308, 1e308}, {1366, 1365, 1365}},
        {3, {1e-308, 1e-308, 2e-308}, {1024, 1024, 2048}},
        {4, {1, 2, 3, 4}, {410, 819, 1229, 1638}},
        {4, {4095, 0.4, 0.35, 0.25}, {4095, 1, 0, 0}}, /* refused below: here only the first two would have places */
    };
    static const uint64_t samples[MANY] = {10, 20, 30, 40};
    struct set set;
    for (size_t i = 0; i + 1 < sizeof cases / sizeof *cases; i++) {
        make_good(&set, cases[i].weights, samples, cases[i].count, 1, true);
        for (size_t s = 0; s < cases[i].count; s++)
            assert_int_equal(mixture_places(&set.mixture, s), cases[i].places[s]);
    }
    error err;
    size_t last = sizeof cases / sizeof *cases - 1;
    assert_int_equal(make(&set, cases[last].weights, samples, cases[last].count, 1, true, &err), -1);
    assert_non_null(strstr(err.text, "'c'"));
}

/* Every block holds each source exactly as often as it has places, and blocks differ in their order. */
static void test_every_block_has_the_shares(void **state) {
    (void)state;
    static const double weights[] = {5, 0.01, 3, 1.5};
    static const uint64_t samples[] = {1000, 3, 77, 1};
    static const uint64_t blocks[] = {0, 1, 2, 1000003, UINT64_MAX / LOADER_BLOCK};
    struct set set;
    make_good(&set, weights, samples, 4, 42, true);
    uint8_t before[LOADER_BLOCK] = {0}, order[LOADER_BLOCK];
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        uint32_t seen[4] = {0};
        for (uint64_t p = 0; p < LOADER_BLOCK; p++) {
            struct loader_place place = mixture_locate(&set.mixture, &set.block, blocks[i] * LOADER_BLOCK + p);
            assert_true(place.source < 4 && place.sample < samples[place.source]);
            seen[place.source]++;
            order[p] = (uint8_t)place.source;
        }
        for (size_t s = 0; s < 4; s++) assert_int_equal(seen[s], mixture_places(&set.mixture, s));
        assert_memory_not_equal(order, before, sizeof order);
        memcpy(before, order, sizeof order);
    }
}

/* Sources are spread over a block, not bunched: in each sixteenth of a block a half share stays near a half. The
 * bounds are five standard deviations of 256 draws. */
static void test_blocks_are_mixed(void **state) {
    (void)state;
    static const double weights[] = {1, 1};
    static const uint64_t samples[] = {100000, 100000};
    struct set set;
    make_good(&set, weights, samples, 2, 7, true);
    for (uint64_t part = 0; part < 64; part++) {
        int first = 0;
        for (uint64_t i = 0; i < 256; i++)
            first += mixture_locate(&set.mixture, &set.block, part * 256 + i).source == 0;
        assert_in_range(first, 128 - 40, 128 + 40);
    }
}

/* Walk from global sample 0 and check that each source's epochs follow each other and visit every sample once. */
static void check_epochs(struct set *set, const uint64_t *samples, size_t count, uint64_t total, bool shuffle) {
    uint8_t *seen[MANY];
    uint64_t visits[MANY] = {0};
    for (size_t s = 0; s < count; s++) assert_non_null(seen[s] = calloc(samples[s], 1));
    for (uint64_t g = 0; g < total; g++) {
        struct loader_place place = mixture_locate(&set->mixture, &set->block, g);
        size_t s = place.source;
        assert_int_equal(place.epoch, visits[s] / samples[s]);
        uint64_t position = visits[s]++ % samples[s];
        if (position == 0) memset(seen[s], 0, samples[s]);
        assert_true(place.sample < samples[s]);
        assert_int_equal(seen[s][place.sample], 0);
        seen[s][place.sample] = 1;
        if (!shuffle) assert_int_equal(place.sample, position);
    }
    for (size_t s = 0; s < count; s++) {
        assert_true(visits[s] > 2 * samples[s]); /* several epochs were walked */
        free(seen[s]);
    }
}

static void test_epochs_visit_every_sample_once(void **state) {
    (void)state;
    static const uint64_t sizes[] = {1, 2, 3, 4, 5, 16, 17, 97, 1000, 4096, 5000};
    static const double weights[] = {1, 2.5, 0.3, 1};
    static const uint64_t samples[] = {1, 700, 13, 2048};
    struct set set;
    for (int shuffle = 0; shuffle < 2; shuffle++) {
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            make_good(&set, weights, &sizes[i], 1, 3, shuffle);
            check_epochs(&set, &sizes[i], 1, sizes[i] * 3 + 2, shuffle);
        }
        make_good(&set, weights, samples, 4, 9, shuffle);
        check_epochs(&set, samples, 4, 6 * LOADER_BLOCK, shuffle);
    }
}

/* The order in which source `s` of a set visits its samples in an epoch. */
static void read_order(struct set *set, size_t s, uint64_t epoch, uint64_t *order) {
    uint64_t found = 0;
    for (uint64_t g = 0; found < set->mixture.samples[s]; g++) {
        struct loader_place place = mixture_locate(&set->mixture, &set->block, g);
        if (place.source == s && place.epoch == epoch) order[found++] = place.sample;
    }
}

static void test_orders_differ(void **state) {
    (void)state;
    static const double weights[] = {1, 1};
    static const uint64_t samples[] = {97, 97};
    uint64_t order[4][97];
    struct set set;
    make_good(&set, weights, samples, 2, 5, true);
    read_order(&set, 0, 0, order[0]);
    read_order(&set, 0, 1, order[1]); /* another epoch */
    read_order(&set, 1, 0, order[2]); /* another source */
    make_good(&set, weights, samples, 2, 6, true);
    read_order(&set, 0, 0, order[3]); /* another seed */
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < i; j++) {
            int equal = 0; /* two random orders of 97 share one place on average; more than 10 is a chance of 1e-8 */
            for (int k = 0; k < 97; k++) equal += order[i][k] == order[j][k];
            assert_in_range(equal, 0, 10);
        }
    }
}

/* A set of three samples takes all its six orders, about equally often. */
static void test_small_sets_take_every_order(void **state) {
    (void)state;
    static const double weight = 1;
    static const uint64_t samples = 3;
    struct set set;
    make_good(&set, &weight, &samples, 1, 11, true);
    int seen[27] = {0};
    for (uint64_t epoch = 0; epoch < 6000; epoch++) {
        int code = 0;
        for (uint64_t i = 0; i < 3; i++)
            code = code * 3 + (int)mixture_locate(&set.mixture, &set.block, epoch * 3 + i).sample;
        seen[code]++;
    }
    static const int orders[6] = {5, 7, 11, 15, 19, 21};                     /* 012 021 102 120 201 210 in base 3 */
    for (int i = 0; i < 6; i++) assert_in_range(seen[orders[i]], 800, 1200); /* 1000 expected, deviation 29 */
}

/* The answer does not depend on what was asked before. */
static void test_locating_is_pure(void **state) {
    (void)state;
    static const double weights[] = {1, 2, 3};
    static const uint64_t samples[] = {50, 7000, 12};
    struct set set, fresh;
    make_good(&set, weights, samples, 3, 8, true);
    for (uint64_t i = 0; i < 300; i++) {
        uint64_t g = i * 2654435761u % (5 * LOADER_BLOCK); /* jumps between blocks */
        make_good(&fresh, weights, samples, 3, 8, true);
        struct loader_place a = mixture_locate(&set.mixture, &set.block, g),
                            b = mixture_locate(&fresh.mixture, &fresh.block, g);
        assert_true(a.source == b.source && a.epoch == b.epoch && a.sample == b.sample);
    }
}

/* Runs on disk depend on these numbers: a change here changes what every resumed run reads. */
static void test_fixed_answers(void **state) {
    (void)state;
    static const double weights[] = {3, 1};
    static const uint64_t samples[] = {1000, 100};
    static const struct {
        uint64_t g;
        struct loader_place place;
    } expected[] = {
        {UINT64_C(0), {0, 0, 981}},       {UINT64_C(1), {0, 0, 583}},
        {UINT64_C(2), {0, 0, 453}},       {UINT64_C(3), {1, 0, 18}},
        {UINT64_C(4095), {0, 3, 162}},    {UINT64_C(4096), {1, 10, 13}},
        {UINT64_C(123456), {0, 92, 351}}, {UINT64_C(10000000000), {0, 7500000, 490}},
    };
    struct set set;
    make_good(&set, weights, samples, 2, 1234, true);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct loader_place place = mixture_locate(&set.mixture, &set.block, expected[i].g);
        assert_int_equal(place.source, expected[i].place.source);
        assert_int_equal(place.epoch, expected[i].place.epoch);
        assert_int_equal(place.sample, expected[i].place.sample);
    }
}

static void test_refused_weights(void **state) {
    (void)state;
    static const uint64_t samples[] = {10, 10};
    static const double bad[] = {0, -1, NAN, INFINITY};
    struct set set;
    error err;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        double weights[] = {2, bad[i]};
        assert_int_equal(make(&set, weights, samples, 2, 1, true, &err), -1);
        assert_int_equal(err.kind, ERROR_INPUT);
        assert_non_null(strstr(err.text, "source 'b' has weight"));
        assert_non_null(strstr(err.text, "a weight must be a finite number above 0"));
    }
    /* The weight that the message offers is accepted, and a third of it is not. */
    double weights[] = {2, 1e-9};
    assert_int_equal(make(&set, weights, samples, 2, 1, true, &err), -1);
    const char *offer = strstr(err.text, "a weight of ");
    assert_non_null(offer);
    double enough = strtod(offer + strlen("a weight of "), NULL);
    weights[1] = enough;
    assert_int_equal(make(&set, weights, samples, 2, 1, true, &err), 0);
    assert_int_equal(mixture_places(&set.mixture, 1), 1);
    weights[1] = enough / 3;
    assert_int_equal(make(&set, weights, samples, 2, 1, true, &err), -1);
}

static void test_as_many_sources_as_the_limit(void **state) {
    (void)state;
    double weights[LIMIT_SOURCES];
    uint64_t samples[LIMIT_SOURCES];
    for (size_t s = 0; s < LIMIT_SOURCES; s++) {
        weights[s] = 1.0 + (double)s;
        samples[s] = 1 + s;
    }
    struct set set;
    make_good(&set, weights, samples, LIMIT_SOURCES, 1, true);
    uint32_t seen[LIMIT_SOURCES] = {0};
    for (uint64_t g = 0; g < LOADER_BLOCK; g++) seen[mixture_locate(&set.mixture, &set.block, g).source]++;
    for (size_t s = 0; s < LIMIT_SOURCES; s++) assert_int_equal(seen[s], mixture_places(&set.mixture, s));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_places),           cmocka_unit_test(test_every_block_has_the_shares),
        cmocka_unit_test(test_blocks_are_mixed), cmocka_unit_test(test_epochs_visit_every_sample_once),
        cmocka_unit_test(test_orders_differ),    cmocka_unit_test(test_small_sets_take_every_order),
        cmocka_unit_test(test_locating_is_pure), cmocka_unit_test(test_fixed_answers),
        cmocka_unit_test(test_refused_weights),  cmocka_unit_test(test_as_many_sources_as_the_limit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
