/* test_data_jsonl.c: JSON lines: what json_scan finds and refuses, by hand and compared with jansson, and what tokenize
 * makes of lines of every length, compressed or not. */
#include "test/support_text.h"
#include "test/unit_directory.h"

#include "data/json_scan.h"
#include <jansson.h>
#include <zlib.h>
#include <zstd.h>

/* ---- one line ---------------------------------------------------------------------------------------------------- */

/* Scan a copy that ends where its memory does, so that AddressSanitizer sees a read past it. *copy is to be freed. */
static int scan(const char *json, size_t size, const char *key, char **copy, char **found, size_t *found_size,
                error *err) {
    *copy = malloc(size + (size == 0));
    assert_non_null(*copy);
    memcpy(*copy, json, size);
    *found = NULL;
    return json_scan_string(*copy, size, key, found, found_size, err);
}

static void finds(const char *json, size_t size, const char *key, const char *text, size_t text_size) {
    char *copy, *found;
    size_t found_size;
    error err = {0};
    if (scan(json, size, key, &copy, &found, &found_size, &err) != 0) fail_msg("%s: %s", json, err.text);
    assert_int_equal(found_size, text_size);
    assert_memory_equal(found, text, text_size);
    free(copy);
}

static void refuses(const char *json, size_t size, const char *key, const char *text) {
    char *copy, *found;
    size_t found_size;
    error err = {0};
    unit_expect(scan(json, size, key, &copy, &found, &found_size, &err), &err, ERROR_INPUT, text);
    free(copy);
}

#define FINDS(json, key, text) finds(json, sizeof(json) - 1, key, text, sizeof(text) - 1)
#define REFUSES(json, key, text) refuses(json, sizeof(json) - 1, key, text)

static void finds_strings(void **state) {
    (void)state;
    FINDS("{\"text\":\"\"}", "text", "");
    FINDS(" \t\r{ \"text\" : \"a b\" } \r", "text", "a b");
    FINDS("{\"meta\":{\"text\":\"no\"},\"text\":\"yes\",\"x\":[{\"text\":\"no\"}]}", "text", "yes");
    FINDS("{\"text\":{\"text\":\"yes\"},\"x\":1}", "text.text", "yes");
    FINDS("{\"a\":{\"b\":{\"c\":\"deep\",\"d\":\"e\"}},\"b\":{\"c\":\"no\"}}", "a.b.c", "deep");
    FINDS("{\"a\":1,\"a\":2,\"text\":\"other keys may come twice\"}", "text", "other keys may come twice");
    FINDS("{\"t\\u0065xt\":\"an escaped key\"}", "text", "an escaped key");
    FINDS("{\"\xC3\xA9t\xC3\xA9\":\"a key of many bytes\"}", "\xC3\xA9t\xC3\xA9", "a key of many bytes");
    FINDS("{\"a\":[true,false,null,-0,0.5,-1.25e+10,1E-7,[],{},[[]]],\"text\":\"x\"}", "text", "x");
    FINDS("{\"text\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"}", "text", "\"\\/\b\f\n\r\t");
    FINDS("{\"text\":\"a\\u0000b\\u001fc\\u007f\"}", "text", "a\0b\x1F" "c\x7F");
    FINDS("{\"text\":\"\\u00e9\\u07FF\\u0800\\uFFFF\\uD7ff\\ue000\"}", "text",
          "\xC3\xA9\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xED\x9F\xBF\xEE\x80\x80");
    FINDS("{\"text\":\"\\ud83d\\ude00\\uD800\\uDC00\\uDBFF\\uDFFFz\"}", "text",
          "\xF0\x9F\x98\x80\xF0\x90\x80\x80\xF4\x8F\xBF\xBFz");
    FINDS("{\"text\":\"\xC2\x80\xED\x9F\xBF\xEE\x80\x80\xF0\x90\x80\x80\xF4\x8F\xBF\xBF\"}", "text",
          "\xC2\x80\xED\x9F\xBF\xEE\x80\x80\xF0\x90\x80\x80\xF4\x8F\xBF\xBF");
    FINDS("{\"text\":\"one\\ntwo\xE2\x82\xAC\\tthree\"}", "text", "one\ntwo\xE2\x82\xAC\tthree");
}

static void refuses_the_wrong_thing(void **state) {
    (void)state;
    REFUSES("{}", "text", "'text' is missing, it must be a string");
    REFUSES("{\"tex\":\"\",\"textt\":\"\",\"x\":{\"text\":\"\"}}", "text", "'text' is missing, it must be a string");
    REFUSES("{\"a\":{}}", "a.b", "'a.b' is missing, it must be a string");
    REFUSES("{\"text\":null}", "text", "'text' is null, it must be a string");
    REFUSES("{\"text\":[\"a\"]}", "text", "'text' is an array, it must be a string");
    REFUSES("{\"text\":1.5}", "text", "'text' is a number, it must be a string");
    REFUSES("{\"text\":true}", "text", "'text' is a boolean, it must be a string");
    REFUSES("{\"text\":{\"a\":\"b\"}}", "text", "'text' is an object, it must be a string");
    REFUSES("{\"a\":\"b\"}", "a.b", "'a' is a string, it must be an object");
    REFUSES("{\"a\":{\"b\":[]}}", "a.b.c", "'a.b' is an array, it must be an object");
    REFUSES("{\"text\":\"a\",\"text\":\"b\"}", "text", "'text' is there twice");
    REFUSES("{\"a\":{\"b\":\"c\"},\"a\":{\"b\":\"c\"}}", "a.b", "'a' is there twice");
    REFUSES("[\"text\"]", "text", "is an array, it must be an object");
    REFUSES("\"text\"", "text", "is a string, it must be an object");
    REFUSES("1", "text", "is a number, it must be an object");
}

static void refuses_what_is_not_json(void **state) {
    (void)state;
#define BAD(json, problem) REFUSES(json, "text", "is not valid JSON: " problem)
    BAD("", "it ends where a value is expected (column 1)");
    BAD("text", "a value is expected (column 1)");
    BAD("{", "it ends where a key is expected (column 2)");
    BAD("{\"text\":\"a\",}", "a key is expected (column 13)");
    BAD("{text:\"a\"}", "a key is expected (column 2)");
    BAD("{\"text\" \"a\"}", "':' is expected (column 9)");
    BAD("{\"text\":}", "a value is expected (column 9)");
    BAD("{\"text\":\"a\" \"b\":1}", "',' or '}' is expected (column 13)");
    BAD("{\"text\":\"a\",\"b\":[1 2]}", "',' or ']' is expected (column 20)");
    BAD("{\"text\":\"a\"", "it ends where ',' or '}' is expected (column 12)");
    BAD("{\"text\":\"a\"} {}", "something follows the object (column 14)");
    BAD("{\"text\":\"a}", "the string that begins here does not end (column 9)");
    BAD("{\"text\":\"a\\\"}", "the string that begins here does not end (column 9)");
    BAD("{\"text\":'a'}", "a value is expected (column 9)");
    BAD("{\"text\":\"a\tb\"}", "a control character in a string; it must be written as an escape (column 11)");
    BAD("{\"text\":\"\\x41\"}",
        "an invalid escape, \\ must be followed by one of \" \\ / b f n r t u (column 10)");
    BAD("{\"text\":\"\\", "an invalid escape, \\ must be followed by one of \" \\ / b f n r t u (column 10)");
    BAD("{\"text\":\"\\u12g4\"}", "\\u must have four hexadecimal digits after it (column 10)");
    BAD("{\"text\":\"\\u123", "\\u must have four hexadecimal digits after it (column 10)");
    const char *const halves[] = {"\\ud800", "\\udbff", "\\udc00", "\\ud800x", "\\ud800\\n", "\\ud800\\u0041",
                                  "\\ud800\\ud800", "\\ud800\\ue000", "\\ud800\\u12"};
    for (size_t i = 0; i < sizeof halves / sizeof *halves; i++) {
        char json[64];
        int size = snprintf(json, sizeof json, "{\"text\":\"%s\"}", halves[i]);
        refuses(json, (size_t)size, "text",
                "is not valid JSON: an invalid escape, \\u with half a surrogate pair (column 10)");
    }
    const char *const no_utf8[] = {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xC3", "\xC3x", "\xE0\x9F\xBF",
                                   "\xED\xA0\x80", "\xE2\x82", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80",
                                   "\xF5\x80\x80\x80", "\xF0\x9F\x98", "\xFF", "\xE2(\xA1"};
    for (size_t i = 0; i < sizeof no_utf8 / sizeof *no_utf8; i++) {
        char json[64];
        int size = snprintf(json, sizeof json, "{\"text\":\"%s\"}", no_utf8[i]);
        refuses(json, (size_t)size, "text", "is not valid JSON: a string is not UTF-8 (column 10)");
        /* Nor may a string that is left out. */
        size = snprintf(json, sizeof json, "{\"%s\":0,\"text\":\"\"}", no_utf8[i]);
        refuses(json, (size_t)size, "text", "is not valid JSON: a string is not UTF-8 (column 3)");
    }
    BAD("{\"a\":01,\"text\":\"\"}", "',' or '}' is expected (column 7)");
    BAD("{\"a\":-,\"text\":\"\"}", "a number needs a digit (column 7)");
    BAD("{\"a\":1.,\"text\":\"\"}", "a number needs a digit (column 8)");
    BAD("{\"a\":1e,\"text\":\"\"}", "a number needs a digit (column 8)");
    BAD("{\"a\":tru,\"text\":\"\"}", "a value is expected (column 6)");
    BAD("{\"a\":NaN,\"text\":\"\"}", "a value is expected (column 6)");
    BAD("\xEF\xBB\xBF{\"text\":\"\"}", "a value is expected (column 1)");
    BAD("{\"text\":\"\"}\0", "something follows the object (column 12)");
#undef BAD
}

static void depth_has_a_limit(void **state) {
    (void)state;
    for (int depth = JSON_SCAN_DEPTH_MAX - 2; depth <= JSON_SCAN_DEPTH_MAX; depth++) {
        char json[3 * JSON_SCAN_DEPTH_MAX] = "{\"a\":";
        size_t size = strlen(json);
        memset(json + size, '[', (size_t)depth), size += (size_t)depth;
        memset(json + size, ']', (size_t)depth), size += (size_t)depth;
        size += (size_t)sprintf(json + size, ",\"text\":\"t\"}");
        if (depth < JSON_SCAN_DEPTH_MAX) {
            finds(json, size, "text", "t", 1);
        } else {
            refuses(json, size, "text", "has more than 512 arrays and objects within each other (column 517)");
        }
    }
}

/* What counts is what lies within each other, not what stands side by side. */
static void breadth_has_no_limit(void **state) {
    (void)state;
    struct text json = {0};
    text_add(&json, "{\"a\":[", 6);
    for (int i = 0; i < 2 * JSON_SCAN_DEPTH_MAX; i++) text_add(&json, "[],{},[{}],", 11);
    text_add(&json, "0],\"text\":\"t\"}", 14);
    finds(json.bytes, json.size, "text", "t", 1);
    text_free(&json);
}

/* Mutilated lines by the thousand: json_scan takes what jansson takes, and finds the same string. */
static void agrees_with_jansson(void **state) {
    (void)state;
    const char *const seeds[] = {
        "{\"text\":\"plain \\u00e9 \\ud83d\\ude00 \\n \xE2\x82\xAC\",\"meta\":{\"set\":\"a\",\"n\":[1,2.5e3,-0,true]}}",
        "{\"id\":12,\"text\":\"\",\"list\":[[],{},{\"text\":\"x\"},null,false]}",
        " {\"a\":{\"text\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"} , \"text\" : \"z\\u0000\" }\r",
    };
    const char alphabet[] = "{}[]\",:\\u0dD8\x80\xE2\xED\xF4\x01 eE+-.tfn";
    uint64_t seed = 5, taken = 0;
    for (int round = 0; round < 60000; round++) {
        char line[256];
        size_t size = strlen(seeds[round % 3]);
        memcpy(line, seeds[round % 3], size);
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        for (uint64_t n = 0; n <= (seed >> 60 & 1); n++) {
            size_t at = (size_t)(seed >> 20) % size;
            char byte = alphabet[(seed >> 33) % (sizeof alphabet - 1)];
            switch (seed >> 50 & 3) {
            case 0: line[at] = byte; break;
            case 1: memmove(line + at, line + at + 1, --size - at); break;
            case 2: memmove(line + at + 1, line + at, size++ - at), line[at] = byte; break;
            default: line[at] = line[(seed >> 10) % size]; break;
            }
            seed = seed * 6364136223846793005u + 1442695040888963407u;
        }
        json_error_t problem;
        json_t *tree = json_loadb(line, size, JSON_ALLOW_NUL, &problem);
        const json_t *text = json_object_get(tree, "text");
        char *copy, *found;
        size_t found_size;
        error err = {0};
        int failed = scan(line, size, "text", &copy, &found, &found_size, &err);
        if (!failed) {
            if (!json_is_string(text)) fail_msg("%.*s: %s", (int)size, line, tree ? "no text" : problem.text);
            assert_int_equal(found_size, json_string_length(text));
            assert_memory_equal(found, json_string_value(text), found_size);
            taken++;
        } else if (json_is_string(text)) {
            /* jansson keeps the last of several, and json_scan takes none. */
            assert_string_equal(err.text, "'text' is there twice");
        }
        free(copy);
        json_decref(tree);
    }
    assert_true(taken > 10000 && taken < 50000);
}

static void checks_keys(void **state) {
    (void)state;
    error err = {0};
    char longest[257];
    memset(longest, 'k', 256);
    longest[256] = 0;
    unit_expect(json_scan_check_key(longest, &err), &err, ERROR_INPUT,
                "the key of JSON lines must have 1 to 255 bytes; this one has 256");
    assert_int_equal(json_scan_check_key(longest + 1, &err), 0);
    const char *const bad[] = {".", ".a", "a.", "a..b"};
    for (size_t i = 0; i < 4; i++) {
        char text[256];
        snprintf(text, sizeof text,
                 "the key of JSON lines '%s' has an empty name; write a name, or names with single dots between them, "
                 "as in meta.text",
                 bad[i]);
        unit_expect(json_scan_check_key(bad[i], &err), &err, ERROR_INPUT, text);
    }
}

/* ---- inputs ------------------------------------------------------------------------------------------------------ */

static struct tokenize_options options(void) {
    struct tokenize_options o = text_options(unit_path(directory, "out"));
    o.jsonl_key = "text";
    return o;
}

static const char *write_input(const char *name, const struct text *t) {
    error err;
    const char *path = unit_path(directory, name);
    assert_int_equal(file_write_all(path, t->bytes, t->size, &err), 0);
    return path;
}

static void add_line(struct text *lines, const char *text, size_t size) {
    json_t *line = json_pack("{s:i, s:s%, s:{s:s}}", "id", 7, "text", text, size, "meta", "text", "other");
    char *json = json_dumps(line, lines->size % 2 ? JSON_ENSURE_ASCII : 0);
    assert_non_null(json);
    text_add(lines, json, strlen(json));
    text_add(lines, "\n", 1);
    free(json);
    json_decref(line);
}

static void add_document(struct text_documents *d, const char *text, size_t size) {
    text_documents_split(d, text, size, ""); /* as an input of its own that is not split */
}

/* Documents of many lengths: about the lengths of blocks and buffers, empty ones, with newlines and separators. */
static void make_lines(struct text *lines, struct text_documents *d) {
    const size_t block = 1 << 18, buffer = 1 << 20;
    const size_t sizes[] = {0, 1, 100, 5000, block, block - 1, 0, 0, block + 1, buffer - 40, buffer, 3000000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct text text = {0};
        for (size_t n = 0; n < sizes[i]; n++) text_add(&text, n % 61 == 60 ? "\n" : &"abc\"\\ xyz"[(n * 7 + i) % 9], 1);
        add_line(lines, text.size ? text.bytes : "", text.size);
        add_document(d, text.size ? text.bytes : "", text.size);
        text_free(&text);
        if (i == 4) text_add(lines, "\n \t\r\n", 5); /* blank lines are no documents */
    }
    for (int i = 0; i < 30000; i++) {
        char text[64];
        int size = snprintf(text, sizeof text, "%d\n<|endoftext|>\n\xC3\xA9", i);
        add_line(lines, text, (size_t)size);
        add_document(d, text, (size_t)size);
    }
}

static void check(const char *const *inputs, size_t count, const struct text_documents *expected, size_t times) {
    error err = {0};
    struct tokenize_options o = options();
    struct tokenize_result result;
    struct text_documents got;
    if (text_tokenize(inputs, count, &o, &result, &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(result.documents, times * expected->count);
    assert_int_equal(result.text_bytes, times * expected->all.size);
    text_documents_read(&got, o.out);
    assert_int_equal(got.count, times * expected->count);
    for (size_t k = 0; k < times; k++) {
        struct text_documents part = {.all = got.all, .list = got.list + k * expected->count, .count = expected->count};
        part.all.bytes += part.list[0].start;
        for (size_t i = part.count; i-- > 0;) part.list[i].start -= part.list[0].start;
        text_documents_equal(&part, expected);
    }
    text_documents_free(&got);
    assert_int_equal(file_remove_tree(o.out, &err), 0);
}

static struct text compressed(const struct text *t, bool gzip) {
    size_t bound = ZSTD_compressBound(t->size) + compressBound(t->size) + 100;
    struct text out = {.bytes = malloc(bound)};
    assert_non_null(out.bytes);
    if (!gzip) {
        out.size = ZSTD_compress(out.bytes, bound, t->bytes, t->size, 1);
        assert_false(ZSTD_isError(out.size));
        return out;
    }
    z_stream z = {.next_in = (unsigned char *)t->bytes, .avail_in = (unsigned)t->size,
                  .next_out = (unsigned char *)out.bytes, .avail_out = (unsigned)bound};
    assert_int_equal(deflateInit2(&z, 1, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    out.size = z.total_out;
    deflateEnd(&z);
    return out;
}

/* Plain, .gz and .zst; of several members and frames, cut in the middle of a line; the last newline may be missing. */
static void lines_to_documents(void **state) {
    (void)state;
    struct text lines = {0};
    struct text_documents expected = {0};
    make_lines(&lines, &expected);
    const char *inputs[] = {write_input("plain", &lines), NULL, NULL};
    check(inputs, 1, &expected, 1);
    struct text cut = {.bytes = lines.bytes, .size = lines.size - 1};
    const char *unended[] = {write_input("unended", &cut)};
    check(unended, 1, &expected, 1);
    for (int gzip = 0; gzip < 2; gzip++) {
        struct text head = {.bytes = lines.bytes, .size = 1500000};
        struct text tail = {.bytes = lines.bytes + head.size, .size = lines.size - head.size};
        struct text packed = compressed(&head, gzip), rest = compressed(&tail, gzip);
        text_add(&packed, rest.bytes, rest.size);
        inputs[1 + gzip] = write_input(gzip ? "gz" : "zst", &packed);
        text_free(&packed);
        text_free(&rest);
    }
    check(inputs, 3, &expected, 3);
    text_free(&lines);
    text_documents_free(&expected);
}

/* What is wrong is named with file and line, however much was read before, and nothing is left. */
static void bad_lines(void **state) {
    (void)state;
    struct text lines = {0};
    for (int i = 0; i < 50000; i++) {
        const char *line = i % 3 ? "{\"text\":\"good\"}\n" : "{\"text\":\"good\"}\r\n";
        text_add(&lines, line, strlen(line));
    }
    const size_t good = lines.size;
    const struct {
        const char *line, *problem;
    } cases[] = {
        {"{\"text\":1}\n", "'text' is a number, it must be a string"},
        {"{\"txt\":\"\"}\n", "'text' is missing, it must be a string"},
        {"{\"text\":\"cut", "is not valid JSON: the string that begins here does not end (column 9)"},
        {"{\"text\":\"two\nlines\"}\n", "is not valid JSON: the string that begins here does not end (column 9)"},
        {"not JSON\n{\"text\":1}\n", "is not valid JSON: a value is expected (column 1)"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        lines.size = good;
        text_add(&lines, cases[i].line, strlen(cases[i].line));
        const struct text head = {.bytes = lines.bytes, .size = good};
        const char *inputs[] = {write_input("good", &head), write_input("bad", &lines)};
        struct tokenize_options o = options();
        char text[1000];
        error err = {0};
        o.shard_tokens = 5000;
        snprintf(text, sizeof text, "%s:50001: %s", inputs[1], cases[i].problem);
        unit_expect(text_tokenize(inputs, 2, &o, NULL, &err), &err, ERROR_INPUT, text);
        assert_false(file_exists(o.out));
    }
    text_free(&lines);
}

static void truncated_inputs(void **state) {
    (void)state;
    struct text lines = {0};
    for (int i = 0; i < 9000; i++) text_add(&lines, "{\"text\":\"good\"}\n", 16);
    for (int gzip = 0; gzip < 2; gzip++) {
        struct text packed = compressed(&lines, gzip);
        packed.size -= 3;
        const char *inputs[] = {write_input("cut", &packed)};
        struct tokenize_options o = options();
        char text[1000];
        error err = {0};
        snprintf(text, sizeof text, "input %s is cut off: it ends inside %s", inputs[0],
                 gzip ? "gzip data" : "a zstd frame");
        unit_expect(text_tokenize(inputs, 1, &o, NULL, &err), &err, ERROR_INPUT, text);
        assert_false(file_exists(o.out));
        text_free(&packed);
    }
    text_free(&lines);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(finds_strings),
        cmocka_unit_test(refuses_the_wrong_thing),
        cmocka_unit_test(refuses_what_is_not_json),
        cmocka_unit_test(depth_has_a_limit),
        cmocka_unit_test(breadth_has_no_limit),
        cmocka_unit_test(agrees_with_jansson),
        cmocka_unit_test(checks_keys),
        TEST(lines_to_documents),
        TEST(bad_lines),
        TEST(truncated_inputs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
