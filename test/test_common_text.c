/* test_common_text.c: distances and nearest names, and numbers as people read them. */
#include "test/unit.h"

#include "common/text.h"
#include <math.h>

static void distances(void **state) {
    (void)state;
    assert_int_equal(text_distance("", ""), 0);
    assert_int_equal(text_distance("", "abc"), 3);
    assert_int_equal(text_distance("abc", ""), 3);
    assert_int_equal(text_distance("steps", "steps"), 0);
    assert_int_equal(text_distance("step", "steps"), 1);
    assert_int_equal(text_distance("stpes", "steps"), 1); /* a swap */
    assert_int_equal(text_distance("ab", "ba"), 1);
    assert_int_equal(text_distance("kitten", "sitting"), 3);
    assert_int_equal(text_distance("ca", "abc"), 3); /* no edit between swapped letters */
    assert_int_equal(text_distance("sunday", "saturday"), 3);
    char a[200], b[200];
    memset(a, 'x', sizeof a);
    memset(b, 'x', sizeof b);
    a[199] = b[150] = 0;
    b[100] = 'y'; /* beyond the 64 bytes that are looked at */
    assert_int_equal(text_distance(a, b), 0);
}

static void nearest(void **state) {
    (void)state;
    static const char *const names[] = {"steps", "warmup_steps", "lr", "seed", NULL};
    static const char *const none[] = {NULL};
    assert_string_equal(text_nearest("step", names), "steps");
    assert_string_equal(text_nearest("setps", names), "steps");
    assert_string_equal(text_nearest("warmupsteps", names), "warmup_steps");
    assert_string_equal(text_nearest("l", names), "lr");
    assert_string_equal(text_nearest("seeds", names), "seed");
    assert_null(text_nearest("banana", names));
    assert_null(text_nearest("batch", names));
    assert_null(text_nearest("x", none));
    static const char *const close[] = {"beta1", "beta2", "beta", NULL};
    assert_string_equal(text_nearest("beta", close), "beta"); /* the exact one before its neighbours */
    assert_string_equal(text_nearest("beta3", close), "beta1");
}

static void expect(char *(*write)(char *, size_t, double), double value, const char *text) {
    char out[24];
    assert_string_equal(write(out, sizeof out, value), text);
}

static void sizes(void **state) {
    (void)state;
    expect(text_bytes, 0, "0 B");
    expect(text_bytes, 512, "512 B");
    expect(text_bytes, 1023, "1023 B");
    expect(text_bytes, 1024, "1.00 KiB");
    expect(text_bytes, 1536.0 * 1024 * 1024, "1.50 GiB");
    expect(text_bytes, 10.25 * 1024, "10.2 KiB");
    expect(text_bytes, 1023.9 * 1024, "1.00 MiB");
    expect(text_bytes, 0x1p60, "1024 PiB");
    expect(text_bytes, -2048, "-2.00 KiB");
    expect(text_bytes, NAN, "?");
    expect(text_count, 7, "7");
    expect(text_count, 999, "999");
    expect(text_count, 1000, "1.00 k");
    expect(text_count, 12345, "12.3 k");
    expect(text_count, 99960, "100 k");
    expect(text_count, 999600, "1.00 M");
    expect(text_count, 130e6, "130 M");
    expect(text_count, 2.7e9, "2.70 G");
    expect(text_count, INFINITY, "?");
}

static void durations(void **state) {
    (void)state;
    expect(text_duration, 0, "0 ms");
    expect(text_duration, 0.0123, "12 ms");
    expect(text_duration, 0.9996, "1.0 s");
    expect(text_duration, 45.25, "45.2 s");
    expect(text_duration, 59.96, "1m 00s");
    expect(text_duration, 185, "3m 05s");
    expect(text_duration, 3599.7, "1h 00m");
    expect(text_duration, 3720, "1h 02m");
    expect(text_duration, 183600, "2d 03h");
    expect(text_duration, -1, "?");
    expect(text_duration, NAN, "?");
    expect(text_duration, 1e300, "?");
}

static void small_buffers_are_not_overrun(void **state) {
    (void)state;
    char out[8] = "#######";
    text_count(out, 4, 12345);
    assert_string_equal(out, "12.");
    assert_string_equal(out + 4, "###");
}

static void reals_read_back(void **state) {
    (void)state;
    char out[40];
    assert_string_equal(text_real(out, sizeof out, 0.1), "0.1");
    assert_string_equal(text_real(out, sizeof out, 1e-5), "1e-05");
    assert_string_equal(text_real(out, sizeof out, 1), "1");
    assert_string_equal(text_real(out, sizeof out, 0.1 + 0.2), "0.30000000000000004");
    assert_int_equal(text_real_digits(0.5), 1);
    assert_int_equal(text_real_digits(0.1 + 0.7), 16);
    assert_int_equal(text_real_digits(0.1 + 0.2), 17);
    double values[] = {1.0 / 3, 2e-308, 5e-324, 1.7976931348623157e308, -123456.789, 0x1p53 + 2};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        assert_true(strtod(text_real(out, sizeof out, values[i]), NULL) == values[i]);
    }
}

static void the_clock_runs_forward(void **state) {
    (void)state;
    double before = clock_seconds();
    double after = clock_seconds();
    assert_true(after >= before);
    assert_true(after - before < 10);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(distances),
        cmocka_unit_test(nearest),
        cmocka_unit_test(sizes),
        cmocka_unit_test(durations),
        cmocka_unit_test(small_buffers_are_not_overrun),
        cmocka_unit_test(reals_read_back),
        cmocka_unit_test(the_clock_runs_forward),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
