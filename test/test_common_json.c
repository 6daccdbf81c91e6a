/* test_common_json.c: reading with clear sentences, typed look-ups, and a writer whose numbers read back exactly. */
#include "test/unit.h"

#include "common/json.h"
#include <limits.h>
#include <math.h>

static json_t *parsed(const char *text) {
    error err;
    json_t *value = NULL;
    assert_int_equal(json_read_text(&value, text, strlen(text), "c.json", &err), 0);
    return value;
}

static void expect_unreadable(const char *text, const char *sentence) {
    error err;
    json_t *value = NULL;
    unit_expect(json_read_text(&value, text, strlen(text), "c.json", &err), &err, ERROR_INPUT, sentence);
    assert_null(value);
}

static void damaged_texts_are_refused(void **state) {
    (void)state;
    expect_unreadable("", "c.json:1: is not valid JSON: '[' or '{' expected near end of file (column 0)");
    expect_unreadable("{\"a\": 1,\n \"a\": 2}",
                      "c.json:2: is not valid JSON: duplicate object key near '\"a\"' (column 4)");
    expect_unreadable("{\"a\": \x01}", "c.json:1: is not valid JSON: invalid token near '?' (column 7)");
    expect_unreadable("{} x", "c.json:1: is not valid JSON: end of file expected near 'x' (column 4)");
    expect_unreadable("{\"a\": 1e999}", "c.json:1: is not valid JSON: real number overflow near '1e999' (column 11)");
    expect_unreadable("{\"a\": NaN}", "c.json:1: is not valid JSON: invalid token near 'NaN' (column 9)");
}

/* What Python's json module writes for floating-point numbers that JSON lacks. */
static void words_of_python_are_strings(void **state) {
    (void)state;
    error err;
    json_t *o;
    static const char text[] = "{\"a\": [Infinity, -Infinity,NaN], \"b\\\"NaN\": \"Infinity\"}";
    static const char *const words[] = {"Infinity", "-Infinity", "NaN"};
    assert_int_equal(json_read_python(&o, text, strlen(text), "c.json", &err), 0);
    for (size_t i = 0; i < 3; i++)
        assert_string_equal(json_string_value(json_array_get(json_object_get(o, "a"), i)), words[i]);
    assert_string_equal(json_string_value(json_object_get(o, "b\"NaN")), "Infinity");
    json_decref(o);
    assert_int_equal(json_read_python(&o, "{\"a\": inf}", 10, "c.json", &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_null(o);
}

static void typed_members(void **state) {
    (void)state;
    error err;
    json_t *o = parsed("{\"i\": -9007199254740993, \"r\": 0.5, \"b\": true, \"s\": \"text\", \"n\": null, \"l\": []}");
    int64_t i;
    double r;
    bool b;
    const char *s;
    assert_int_equal(json_get_int(o, "i", "c.json", &i, &err), 0);
    assert_true(i == INT64_C(-9007199254740993)); /* not through a double */
    assert_int_equal(json_get_real(o, "r", "c.json", &r, &err), 0);
    assert_true(r == 0.5);
    assert_int_equal(json_get_real(o, "i", "c.json", &r, &err), 0);
    assert_true(r == -9007199254740992.0);
    assert_int_equal(json_get_bool(o, "b", "c.json", &b, &err), 0);
    assert_true(b);
    assert_int_equal(json_get_string(o, "s", "c.json", &s, &err), 0);
    assert_string_equal(s, "text");
    unit_expect(json_get_int(o, "x", "c.json", &i, &err), &err, ERROR_INPUT,
                "c.json: 'x' is missing, it must be an integer");
    unit_expect(json_get_int(o, "r", "c.json", &i, &err), &err, ERROR_INPUT,
                "c.json: 'r' is a real number, it must be an integer");
    unit_expect(json_get_real(o, "s", "c.json", &r, &err), &err, ERROR_INPUT,
                "c.json: 's' is a string, it must be a number");
    unit_expect(json_get_bool(o, "i", "c.json", &b, &err), &err, ERROR_INPUT,
                "c.json: 'i' is an integer, it must be true or false");
    unit_expect(json_get_string(o, "n", "c.json", &s, &err), &err, ERROR_INPUT,
                "c.json: 'n' is null, it must be a string");
    unit_expect(json_get_string(o, "l", "c.json", &s, &err), &err, ERROR_INPUT,
                "c.json: 'l' is an array, it must be a string");
    json_decref(o);
}

static void fallbacks_stand_in_for_missing_members_only(void **state) {
    (void)state;
    error err;
    json_t *o = parsed("{\"i\": 3, \"b\": false, \"r\": 2}");
    int64_t i;
    double r;
    bool b;
    assert_int_equal(json_get_int_or(o, "i", "c.json", 7, &i, &err), 0);
    assert_int_equal(i, 3);
    assert_int_equal(json_get_int_or(o, "x", "c.json", 7, &i, &err), 0);
    assert_int_equal(i, 7);
    assert_int_equal(json_get_real_or(o, "r", "c.json", 0.1, &r, &err), 0);
    assert_true(r == 2);
    assert_int_equal(json_get_real_or(o, "x", "c.json", 0.1, &r, &err), 0);
    assert_true(r == 0.1);
    assert_int_equal(json_get_bool_or(o, "b", "c.json", true, &b, &err), 0);
    assert_false(b);
    assert_int_equal(json_get_bool_or(o, "x", "c.json", true, &b, &err), 0);
    assert_true(b);
    assert_int_equal(json_get_int_or(o, "b", "c.json", 7, &i, &err), -1);
    assert_int_equal(json_get_real_or(o, "b", "c.json", 7, &r, &err), -1);
    unit_expect(json_get_bool_or(o, "i", "c.json", true, &b, &err), &err, ERROR_INPUT,
                "c.json: 'i' is an integer, it must be true or false");
    json_decref(o);
    json_t *list = parsed("[1]"); /* no object: every member is missing */
    assert_int_equal(json_get_int(list, "i", "c.json", &i, &err), -1);
    json_decref(list);
}

/* What json_write makes of `value`. The caller frees. */
static char *written(const char *directory, const json_t *value) {
    error err;
    char path[PATH_MAX], *text;
    size_t size;
    assert_int_equal(file_join(path, sizeof path, directory, "w.json", &err), 0);
    assert_int_equal(json_write(value, path, &err), 0);
    assert_int_equal(file_read_all(path, 1 << 20, &text, &size, &err), 0);
    json_t *back;
    assert_int_equal(json_read(&back, path, &err), 0);
    assert_true(json_equal(back, value));
    json_decref(back);
    return text;
}

static void writing_keeps_order_and_values(void **state) {
    (void)state;
    char directory[256];
    unit_directory(directory);
    json_t *o = parsed("{\"z\": 1, \"a\": [0.1, 1e-5, 2.0], \"s\": \"\\u00e9\\\"\\n\", \"o\": {\"deep\": -0.25}}");
    char *text = written(directory, o);
    assert_string_equal(
        text, "{\n  \"z\": 1,\n  \"a\": [\n    0.1,\n    1e-5,\n    2.0\n  ],\n  \"s\": \"\xc3\xa9\\\"\\n\",\n"
              "  \"o\": {\n    \"deep\": -0.25\n  }\n}\n");
    free(text);
    json_object_set_new(o, "third", json_real(1.0 / 3)); /* needs all 17 digits */
    json_object_set_new(o, "tiny", json_real(5e-324));
    free(written(directory, o));
    json_decref(o);
    unit_directory_remove(directory);
}

static void missing_places(void **state) {
    (void)state;
    error err;
    json_t *o = parsed("{}");
    assert_int_equal(json_write(o, "/nowhere/at/all.json", &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
    json_decref(o);
    unit_expect(json_read(&o, "/nowhere/at/all.json", &err), &err, ERROR_INPUT,
                "cannot read /nowhere/at/all.json: No such file or directory");
    assert_null(o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(damaged_texts_are_refused),
        cmocka_unit_test(words_of_python_are_strings),
        cmocka_unit_test(typed_members),
        cmocka_unit_test(fallbacks_stand_in_for_missing_members_only),
        cmocka_unit_test(writing_keeps_order_and_values),
        cmocka_unit_test(missing_places),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
