/* test_common_rng.c: the generator against its published vectors, the draws against their distributions, the
 * permutation against what a permutation is. Everything is keyed, so the statistics are the same in every run: their
 * bounds are wide for a right generator (five standard deviations) and still far from what a wrong one gives. */
#include "test/unit.h"

#include "common/rng.h"
#include <math.h>

static const rng_key key = {.seed = 42, .purpose = RNG_TEST, .stream = 3};

static void philox_known_answers(void **state) {
    (void)state;
    /* The known-answer tests published with the generator: zeros, ones, digits of pi. */
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint32_t out[4];
        rng_philox(known[i].counter, known[i].key, out);
        assert_memory_equal(out, known[i].out, sizeof out);
    }
}

static void bits_are_keyed_by_every_field(void **state) {
    (void)state;
    assert_int_equal(rng_bits((rng_key){0}, 0), UINT64_C(0xe169c58d6627e8d5));
    /* The digits of pi again: index is words 0 and 1 of the counter, then stream and purpose; the seed is the key. */
    rng_key pi = {.seed = UINT64_C(0x299f31d0a4093822), .purpose = 0x03707344, .stream = 0x13198a2e};
    assert_int_equal(rng_bits(pi, UINT64_C(0x85a308d3243f6a88)), UINT64_C(0x94fdccebd16cfe09));
    uint64_t base = rng_bits(key, 5);
    rng_key seed = key, high = key, purpose = key, stream = key;
    seed.seed++;
    high.seed += UINT64_C(1) << 32;
    purpose.purpose++;
    stream.stream++;
    assert_int_not_equal(base, rng_bits(seed, 5));
    assert_int_not_equal(base, rng_bits(high, 5));
    assert_int_not_equal(base, rng_bits(purpose, 5));
    assert_int_not_equal(base, rng_bits(stream, 5));
    assert_int_not_equal(base, rng_bits(key, 6));
    assert_int_not_equal(base, rng_bits(key, 5 + (UINT64_C(1) << 32)));
    assert_int_equal(base, rng_bits(key, 5));
}

enum { DRAWS = 200000 };

static void uniform_moments(void **state) {
    (void)state;
    double sum = 0, squares = 0, lag = 0, before = 0, low = 1, high = 0;
    for (int i = 0; i < DRAWS; i++) {
        double u = rng_uniform(key, (uint64_t)i);
        assert_true(u >= 0 && u < 1);
        sum += u;
        squares += u * u;
        lag += (u - 0.5) * (before - 0.5);
        before = u;
        low = fmin(low, u);
        high = fmax(high, u);
    }
    double mean = sum / DRAWS, variance = squares / DRAWS - mean * mean;
    assert_true(fabs(mean - 0.5) < 5 * sqrt(1.0 / 12 / DRAWS));
    assert_true(fabs(variance - 1.0 / 12) < 5 * sqrt(1.0 / 180 / DRAWS)); /* the variance of (u - 1/2)^2 is 1/180 */
    assert_true(fabs(lag / DRAWS) < 5 / 12.0 / sqrt(DRAWS));
    assert_true(low < 1e-4 && high > 1 - 1e-4);
}

static void normals_are_box_muller_of_the_same_bits(void **state) {
    (void)state;
    for (uint32_t i = 0; i < 100; i++) {
        uint32_t out[4];
        rng_philox((uint32_t[]){i, 0, key.stream, key.purpose}, (uint32_t[]){(uint32_t)key.seed, 0}, out);
        double radius = sqrt(-2 * log((out[1] * 0x1p32 + out[0]) * 0x1p-64)); /* to the 53 bits that are used */
        double angle = (out[3] * 0x1p32 + out[2]) * 0x1p-64 * 2 * M_PI;
        assert_true(fabs(rng_normal(key, i) - radius * cos(angle)) < 1e-12);
        assert_true(fabs(rng_uniform(key, i) - (out[1] * 0x1p32 + out[0]) * 0x1p-64) < 1e-15);
    }
}

static void normal_moments(void **state) {
    (void)state;
    double moment[5] = {0};
    int64_t beyond_two = 0;
    for (int i = 0; i < DRAWS; i++) {
        double z = rng_normal(key, (uint64_t)i);
        assert_true(isfinite(z));
        double power = 1;
        for (int m = 0; m < 5; m++, power *= z) moment[m] += power / DRAWS;
        beyond_two += fabs(z) > 2;
    }
    double one = sqrt(1.0 / DRAWS); /* standard deviation of the mean of something with variance 1 */
    assert_true(fabs(moment[1]) < 5 * one);
    assert_true(fabs(moment[2] - 1) < 5 * sqrt(2) * one);
    assert_true(fabs(moment[3]) < 5 * sqrt(15) * one);
    assert_true(fabs(moment[4] - 3) < 5 * sqrt(96) * one);
    double share = 0.0455002639; /* of a normal law beyond two standard deviations */
    assert_true(fabs((double)beyond_two / DRAWS - share) < 5 * sqrt(share * (1 - share)) * one);
}

static void below_is_even(void **state) {
    (void)state;
    static const uint64_t bounds[] = {1, 2, 3, 7, 10, 100};
    for (size_t b = 0; b < sizeof bounds / sizeof *bounds; b++) {
        uint64_t bound = bounds[b];
        int64_t count[100] = {0};
        for (int i = 0; i < DRAWS; i++) {
            uint64_t value = rng_below(key, (uint64_t)i, bound);
            assert_true(value < bound);
            count[value]++;
        }
        double expected = (double)DRAWS / (double)bound;
        for (uint64_t v = 0; v < bound; v++) {
            assert_true(fabs((double)count[v] - expected) <= 5 * sqrt(expected));
        }
    }
    for (uint64_t i = 0; i < 1000; i++) assert_true(rng_below(key, i, UINT64_MAX) < UINT64_MAX);
    /* The whole range is reached: among 64 draws one lies in the upper half. */
    uint64_t most = 0;
    for (uint64_t i = 0; i < 64; i++)
        most = most > rng_below(key, i, UINT64_MAX) ? most : rng_below(key, i, UINT64_MAX);
    assert_true(most > UINT64_MAX / 2);
}

static void permutation_is_a_bijection(void **state) {
    (void)state;
    static unsigned char seen[2000];
#ifdef RIVERRUN_DEBUG
    enum { STEP = 7 }; /* sanitizers make it slow, and see in a few sizes what they see in all */
#else
    enum { STEP = 1 };
#endif
    for (uint64_t n = 1; n <= 2000; n += n < 200 ? 1 : STEP) {
        memset(seen, 0, sizeof seen);
        for (uint64_t i = 0; i < n; i++) {
            uint64_t to = rng_permute(key, n, i);
            assert_true(to < n);
            assert_false(seen[to]);
            seen[to] = 1;
        }
    }
}

/* Which of the n! orders `keys` keys reach, and how evenly: returns the largest count over the expected one. */
static double small_orders(uint64_t n, int factorial, int keys, int *reached) {
    int *count = calloc((size_t)factorial, sizeof *count);
    assert_non_null(count);
    for (int k = 0; k < keys; k++) {
        rng_key other = {.seed = (uint64_t)k, .purpose = RNG_SHUFFLE};
        int code = 0; /* the order's number: its inversion table as mixed digits */
        for (uint64_t i = 0; i < n; i++) {
            int smaller = 0;
            for (uint64_t j = i + 1; j < n; j++) smaller += rng_permute(other, n, j) < rng_permute(other, n, i);
            code = code * (int)(n - i) + smaller;
        }
        count[code]++;
    }
    int most = 0;
    *reached = 0;
    for (int i = 0; i < factorial; i++) {
        *reached += count[i] > 0;
        most = count[i] > most ? count[i] : most;
    }
    free(count);
    return (double)most * factorial / keys;
}

static void small_sets_reach_every_order(void **state) {
    (void)state;
    int reached;
    assert_true(small_orders(2, 2, 2000, &reached) < 1.15);
    assert_int_equal(reached, 2);
    assert_true(small_orders(3, 6, 6000, &reached) < 1.2);
    assert_int_equal(reached, 6);
    assert_true(small_orders(5, 120, 24000, &reached) < 1.6);
    assert_int_equal(reached, 120);
}

static void large_sets_look_shuffled(void **state) {
    (void)state;
    enum { N = 10007 };
    double correlation = 0, distance = 0;
    int fixed = 0, neighbours = 0;
    uint64_t before = 0;
    for (uint64_t i = 0; i < N; i++) {
        uint64_t to = rng_permute(key, N, i);
        double x = (double)i / N - 0.5, y = (double)to / N - 0.5;
        correlation += 12 * x * y / N;
        distance += fabs((double)to - (double)i) / N;
        fixed += to == i;
        neighbours += i > 0 && (to == before + 1 || before == to + 1);
        before = to;
    }
    assert_true(fabs(correlation) < 5 / sqrt(N));
    assert_true(fabs(distance / N - 1.0 / 3) < 5 * 0.24 / sqrt(N)); /* |x - y| of two uniform numbers */
    assert_true(fixed < 8);                                         /* one is expected, and two pairs of neighbours */
    assert_true(neighbours < 12);
    rng_key other = key;
    other.stream++; /* another epoch is another order */
    int same = 0;
    for (uint64_t i = 0; i < N; i++) same += rng_permute(key, N, i) == rng_permute(other, N, i);
    assert_true(same < 8);
}

static void huge_sets_stay_in_range(void **state) {
    (void)state;
    static const uint64_t sizes[] = {UINT64_MAX, (UINT64_C(1) << 63) + 1, UINT64_C(1) << 62, (UINT64_C(1) << 40) + 7};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        uint64_t n = sizes[s], high = 0;
        for (uint64_t i = 0; i < 50; i++) {
            uint64_t to = rng_permute(key, n, i), last = rng_permute(key, n, n - 1 - i);
            assert_true(to < n && last < n && to != last);
            high += to >= n / 2;
        }
        assert_true(high > 8 && high < 42);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_known_answers),
        cmocka_unit_test(bits_are_keyed_by_every_field),
        cmocka_unit_test(uniform_moments),
        cmocka_unit_test(normals_are_box_muller_of_the_same_bits),
        cmocka_unit_test(normal_moments),
        cmocka_unit_test(below_is_even),
        cmocka_unit_test(permutation_is_a_bijection),
        cmocka_unit_test(small_sets_reach_every_order),
        cmocka_unit_test(large_sets_look_shuffled),
        cmocka_unit_test(huge_sets_stay_in_range),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
