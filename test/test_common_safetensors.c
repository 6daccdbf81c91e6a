/* test_common_safetensors.c: what is written reads back, values convert exactly, and no damaged file is believed. */
#include "test/unit.h"

#include "common/safetensors.h"
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <unistd.h>

static char directory[256], path[300];

static int make_directory(void **state) {
    (void)state;
    unit_directory(directory);
    snprintf(path, sizeof path, "%s/t.safetensors", directory);
    return 0;
}

static int remove_directory(void **state) {
    (void)state;
    unit_directory_remove(directory);
    return 0;
}

/* Plain writing, so that broken files can be made. */
static void put(const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
}

/* A file of this header (padded to 8) and `data_size` bytes of data, all 1. Returns its size. */
static size_t put_header(const char *header, size_t data_size) {
    char bytes[4096];
    uint64_t length = strlen(header);
    memset(bytes, 1, sizeof bytes);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, length);
    assert_true(8 + length + data_size <= sizeof bytes);
    put(bytes, 8 + length + data_size);
    return 8 + length + data_size;
}

static void refused(const char *sentence) {
    error err = {0};
    safetensors *s = NULL;
    char expected[1024];
    snprintf(expected, sizeof expected, "%s%s", path, sentence);
    unit_expect(safetensors_open(&s, path, &err), &err, ERROR_INPUT, expected);
    assert_null(s);
}

static void opened(safetensors **s) {
    error err = {0};
    if (safetensors_open(s, path, &err) != 0) fail_msg("%s", err.text);
}

/* ---- round trip -------------------------------------------------------------------------------------------------- */

static const struct safetensors_entry entries[] = {
    {.name = "f64", .dtype = ST_F64, .ndim = 1, .dim = {3}},
    {.name = "i64", .dtype = ST_I64, .ndim = 2, .dim = {1, 3}},
    {.name = "scalar", .dtype = ST_F32, .ndim = 0},
    {.name = "f32", .dtype = ST_F32, .ndim = 3, .dim = {5, 1, 7}},
    {.name = "empty", .dtype = ST_F32, .ndim = 2, .dim = {0, 4}},
    {.name = "i32", .dtype = ST_I32, .ndim = 1, .dim = {2}},
    {.name = "f16", .dtype = ST_F16, .ndim = 1, .dim = {5}},
    {.name = "bf16", .dtype = ST_BF16, .ndim = 1, .dim = {7}},
    {.name = "i16", .dtype = ST_I16, .ndim = 1, .dim = {2}},
    {.name = "i8", .dtype = ST_I8, .ndim = 1, .dim = {3}},
    {.name = "u8", .dtype = ST_U8, .ndim = 1, .dim = {3}},
    {.name = "bool", .dtype = ST_BOOL, .ndim = 1, .dim = {1}},
    {.name = "empty last", .dtype = ST_U8, .ndim = 1, .dim = {0}},
};
enum { ENTRIES = sizeof entries / sizeof *entries, DATA = 24 + 24 + 4 + 140 + 8 + 10 + 14 + 4 + 3 + 3 + 1 };

static void write_all(const unsigned char *data, size_t piece) {
    static const char *const metadata[] = {"format", "pt", "note", "\xc3\xa9\"", NULL};
    error err = {0};
    safetensors_writer *w;
    assert_int_equal(safetensors_create(&w, path, entries, ENTRIES, metadata, &err), 0);
    for (size_t at = 0; at < DATA; at += piece) {
        assert_int_equal(safetensors_append(w, data + at, at + piece < DATA ? piece : DATA - at, &err), 0);
    }
    uint64_t size, hash, size_on_disk, hash_on_disk;
    assert_int_equal(safetensors_finish(w, &size, &hash, &err), 0);
    assert_int_equal(file_hash_of(path, &hash_on_disk, &size_on_disk, &err), 0);
    assert_true(size == size_on_disk && hash == hash_on_disk);
}

static void what_is_written_reads_back(void **state) {
    (void)state;
    unsigned char data[DATA];
    for (int i = 0; i < DATA; i++) data[i] = (unsigned char)(i * 37 + 11);
    for (size_t piece = 1; piece <= DATA; piece = piece * 3 + 1) {
        write_all(data, piece);
        safetensors *s;
        opened(&s);
        assert_int_equal(safetensors_count(s), ENTRIES);
        size_t at = 0;
        for (size_t i = 0; i < ENTRIES; i++) {
            const struct safetensors_entry *e = safetensors_find(s, entries[i].name);
            assert_non_null(e);
            assert_int_equal(e->dtype, entries[i].dtype);
            assert_int_equal(e->ndim, entries[i].ndim);
            size_t count = 1;
            for (int d = 0; d < e->ndim; d++) {
                assert_true(e->dim[d] == entries[i].dim[d]);
                count *= (size_t)e->dim[d];
            }
            assert_int_equal(e->count, count);
            assert_memory_equal(e->data, data + at, count * safetensors_dtype_size(e->dtype));
            assert_int_equal((uintptr_t)e->data % safetensors_dtype_size(e->dtype), 0);
            at += count * safetensors_dtype_size(e->dtype);
        }
        assert_null(safetensors_find(s, "f6"));
        assert_null(safetensors_find(s, "zzz"));
        assert_string_equal(safetensors_metadata(s, "format"), "pt");
        assert_string_equal(safetensors_metadata(s, "note"), "\xc3\xa9\"");
        assert_null(safetensors_metadata(s, "absent"));
        safetensors_close(s);
    }
}

static void the_bytes_are_those_of_the_format(void **state) {
    (void)state;
    static const struct safetensors_entry e[] = {{.name = "ab", .dtype = ST_F32, .ndim = 2, .dim = {1, 2}}};
    /* 57 bytes of JSON and 7 spaces, so that the data begins at a multiple of 8. */
    static const char expected[] =
        "\x40\0\0\0\0\0\0\0{\"ab\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]}}       "
        "\0\0\x80\x3f\0\0\0\xc0";
    static const float values[] = {1, -2};
    error err = {0};
    safetensors_writer *w;
    assert_int_equal(safetensors_create(&w, path, e, 1, NULL, &err), 0);
    assert_int_equal(safetensors_append(w, values, sizeof values, &err), 0);
    assert_int_equal(safetensors_finish(w, NULL, NULL, &err), 0);
    char *bytes;
    size_t size;
    assert_int_equal(file_read_all(path, 1000, &bytes, &size, &err), 0);
    assert_int_equal(size, sizeof expected - 1);
    assert_memory_equal(bytes, expected, size);
    free(bytes);
}

static void headers_of_others_are_read(void **state) {
    (void)state;
    safetensors *s;
    /* Any order of members, of keys, spaces, no metadata, unknown keys; entries come in the order of their data. */
    put_header(
        "{ \"b\":{\"data_offsets\":[2,6],\"dtype\":\"F32\",\"shape\":[1]} , \"a\":{\"shape\":[1,1],\"dtype\":\"BF16\","
        "\"data_offsets\":[0,2],\"more\":0}}   ",
        6);
    opened(&s);
    assert_int_equal(safetensors_count(s), 2);
    assert_string_equal(safetensors_at(s, 0)->name, "a");
    assert_string_equal(safetensors_at(s, 1)->name, "b");
    float x;
    safetensors_to_f32(safetensors_find(s, "b"), 0, 1, &x); /* unaligned */
    assert_memory_equal(&x, "\1\1\1\1", 4);
    safetensors_close(s);
    put_header("{}", 0);
    opened(&s);
    assert_int_equal(safetensors_count(s), 0);
    assert_null(safetensors_find(s, "a"));
    safetensors_close(s);
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static double value_of(enum safetensors_dtype dtype, const void *bytes, float *single) {
    struct safetensors_entry e = {.dtype = dtype, .ndim = 1, .dim = {1}, .count = 1, .data = bytes};
    double x;
    safetensors_to_f64(&e, 0, 1, &x);
    safetensors_to_f32(&e, 0, 1, single);
    return x;
}

/* Every half: the definition (sign, exponent, mantissa) in double arithmetic. */
static void every_f16_converts(void **state) {
    (void)state;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        uint16_t half = (uint16_t)bits;
        int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
        double expected = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                         : ldexp(mantissa, -24);
        if (bits & 0x8000) expected = -expected;
        float single;
        double x = value_of(ST_F16, &half, &single);
        if (isnan(expected)) assert_true(isnan(x) && isnan(single));
        else assert_true(x == expected && single == (float)expected && signbit(x) == signbit(expected));
    }
}

/* Every bf16 converts exactly and rounds back to itself; of floats between two the nearer is taken, of a tie the even.
 */
static void bf16_rounds_to_nearest_even(void **state) {
    (void)state;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        uint16_t brain = (uint16_t)bits;
        float x;
        double wide = value_of(ST_BF16, &brain, &x);
        if (isnan(x)) {
            assert_true(isnan(wide));
            uint16_t back = safetensors_bf16(x);
            float again;
            value_of(ST_BF16, &back, &again);
            assert_true(isnan(again));
            continue;
        }
        assert_true((double)x == wide);
        assert_int_equal(safetensors_bf16(x), brain);
        if (isinf(x) || (bits & 0x7fff) == 0x7f7f) continue; /* nothing, or infinity, above */
        static const struct {
            uint32_t extra, up; /* low bits of the float; 2: up if odd */
        } cases[] = {{1, 0}, {0x7fff, 0}, {0x8000, 2}, {0x8001, 1}, {0xffff, 1}};
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            uint32_t between = bits << 16 | cases[i].extra;
            float y;
            memcpy(&y, &between, sizeof y);
            uint32_t up = cases[i].up == 2 ? bits & 1 : cases[i].up;
            assert_int_equal(safetensors_bf16(y), bits + up);
        }
    }
    assert_int_equal(safetensors_bf16(3.4028235e38f), 0x7f80);
    uint32_t low_nan = 0x7f800001, negative_nan = 0xff800001; /* a NaN whose payload the cut takes away */
    float x;
    memcpy(&x, &low_nan, sizeof x);
    assert_int_equal(safetensors_bf16(x), 0x7fc0);
    memcpy(&x, &negative_nan, sizeof x);
    assert_int_equal(safetensors_bf16(x), 0xffc0);
}

static void other_types_convert(void **state) {
    (void)state;
    float f;
    assert_true(value_of(ST_F64, &(double){0.1}, &f) == 0.1 && f == 0.1f);
    assert_true(value_of(ST_F32, &(float){0.1f}, &f) == (double)0.1f && f == 0.1f);
    assert_true(value_of(ST_I64, &(int64_t){-(INT64_C(1) << 40)}, &f) == -0x1p40 && f == -0x1p40f);
    assert_true(value_of(ST_I32, &(int32_t){INT32_MIN}, &f) == -0x1p31 && f == -0x1p31f);
    assert_true(value_of(ST_I16, &(int16_t){-300}, &f) == -300 && f == -300);
    assert_true(value_of(ST_I8, &(int8_t){-3}, &f) == -3 && f == -3);
    assert_true(value_of(ST_U8, &(uint8_t){253}, &f) == 253 && f == 253);
    assert_true(value_of(ST_BOOL, &(uint8_t){7}, &f) == 1 && f == 1);
    int32_t many[] = {1, 2, 3, 4, 5};
    double part[2];
    struct safetensors_entry e = {.dtype = ST_I32, .ndim = 1, .dim = {5}, .count = 5, .data = many};
    safetensors_to_f64(&e, 3, 2, part);
    assert_true(part[0] == 4 && part[1] == 5);
    safetensors_to_f64(&e, 5, 0, part);
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

#define NAME_192 "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
                 "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
                 "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

static void broken_headers_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *header;
        size_t data;
        const char *sentence;
    } cases[] = {
        {"{\"a\":1}", 0, ": tensor a is not described by an object"},
        {"{\"a\":{}}", 0, ": tensor a has no dtype"},
        {"{\"a\":{\"dtype\":4,\"shape\":[],\"data_offsets\":[0,4]}}", 4, ": tensor a has no dtype"},
        {"{\"a\":{\"dtype\":\"F8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4,
         ": tensor a has dtype F8; riverrun reads F64, F32, F16, BF16, I64, I32, I16, I8, U8 and BOOL"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, ": tensor a has no shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,-1],\"data_offsets\":[0,4]}}", 4,
         ": dimension 1 of tensor a is not a count"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", 4,
         ": dimension 0 of tensor a is not a count"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1,
         ": tensor a has 9 dimensions; riverrun reads at most 8"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0,
         ": tensor a has a shape too large to exist"},
        {"{\"a\":{\"dtype\":\"F64\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]}}", 0,
         ": tensor a has a shape too large to exist"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, ": tensor a has no pair of data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,4]}}", 4,
         ": tensor a has no pair of data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4.0]}}", 4,
         ": tensor a has no pair of data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 3,
         ": the data of tensor a (bytes 0 to 4) lies outside the file's 3 bytes of data"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4,
         ": the data of tensor a (bytes -4 to 0) lies outside the file's 4 bytes of data"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4,
         ": the data of tensor a (bytes 4 to 0) lies outside the file's 4 bytes of data"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4,
         ": tensor a has 4 bytes of data where its shape and dtype need 8"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[1,5]}}", 5,
         ": the data of tensor a starts at byte 1, behind the end of the tensor before it (0)"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_"
         "offsets\":[3,5]}}",
         5, ": the data of tensor b starts at byte 3, before the end of the tensor before it (4)"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 7,
         ": 3 bytes behind the last tensor belong to none"},
        {"{\"__metadata__\":[]}", 0, ": __metadata__ is not an object"},
        {"{\"__metadata__\":{\"a\":1}}", 0, ": an entry of __metadata__ is not a string"},
        {"{\"\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0,
         ": a tensor's name has 0 bytes, it must have 1 to 191"},
        {"{\"" NAME_192 "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0,
         ": a tensor's name has 192 bytes, it must have 1 to 191"},
        {"{\"a\\nb\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0,
         ": a tensor's name holds the control character 0x0a"},
        {"{\"a\":{\"dtype\":\"F\\n\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4,
         ": tensor a has dtype ?; riverrun reads F64, F32, F16, BF16, I64, I32, I16, I8, U8 and BOOL"},
        {"[]", 0, " is no safetensors file: its first 8 bytes give a header of 2 bytes, which is not there"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_header(cases[i].header, cases[i].data);
        refused(cases[i].sentence);
    }
    /* The rest of these sentences is the JSON library's. */
    static const char *const no_json[] = {
        "{\"a\":", "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
                  "\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"};
    for (size_t i = 0; i < sizeof no_json / sizeof *no_json; i++) {
        error err = {0};
        safetensors *s;
        put_header(no_json[i], 0);
        assert_int_equal(safetensors_open(&s, path, &err), -1);
        assert_int_equal(err.kind, ERROR_INPUT);
        assert_non_null(strstr(err.text, "t.safetensors:1: is not valid JSON"));
    }
}

static void broken_files_are_refused(void **state) {
    (void)state;
    put("", 0);
    refused(" is no safetensors file: it has 0 bytes");
    put("\2\0\0\0\0\0\0\0{", 9);
    refused(" is no safetensors file: it has 9 bytes");
    put("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    refused(
        " is no safetensors file: its first 8 bytes give a header of 18446744073709551615 bytes, which is not there");
    put("\3\0\0\0\0\0\0\0{}", 10);
    refused(" is no safetensors file: its first 8 bytes give a header of 3 bytes, which is not there");
    assert_int_equal(unlink(path), 0);
    refused(" does not exist");
    char file[300];
    snprintf(file, sizeof file, "%s", path);
    snprintf(path, sizeof path, "%s", directory);
    refused(" is not a regular file");
    snprintf(path, sizeof path, "%s", file);
}

/* No prefix of a good file is good. */
static void cut_files_are_refused(void **state) {
    (void)state;
    unsigned char data[DATA] = {0};
    write_all(data, DATA);
    error err = {0};
    char *bytes;
    size_t size;
    assert_int_equal(file_read_all(path, 1 << 20, &bytes, &size, &err), 0);
    for (size_t cut = 0; cut < size; cut++) {
        put(bytes, cut);
        safetensors *s;
        if (safetensors_open(&s, path, &err) == 0) fail_msg("a file cut to %zu of %zu bytes was opened", cut, size);
        assert_int_equal(err.kind, ERROR_INPUT);
    }
    free(bytes);
}

/* ---- failures of the disk ---------------------------------------------------------------------------------------- */

static void a_failed_write_is_told(void **state) {
    (void)state;
    error err = {0};
    safetensors_writer *w;
    char absent[400];
    snprintf(absent, sizeof absent, "%s/absent/t", directory);
    assert_int_equal(safetensors_create(&w, absent, entries, ENTRIES, NULL, &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
    assert_null(w);
    /* /dev/full takes the opening and refuses the flush. */
    static const struct safetensors_entry one[] = {{.name = "a", .dtype = ST_U8, .ndim = 1, .dim = {1}}};
    assert_int_equal(safetensors_create(&w, "/dev/full", one, 1, NULL, &err), 0);
    assert_int_equal(safetensors_append(w, "x", 1, &err), 0);
    assert_int_equal(safetensors_finish(w, NULL, NULL, &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
    /* Abandoning half-way leaves a file that is refused. */
    assert_int_equal(safetensors_create(&w, path, entries, ENTRIES, NULL, &err), 0);
    assert_int_equal(safetensors_append(w, "x", 1, &err), 0);
    safetensors_abandon(w);
    safetensors_abandon(NULL);
    safetensors *s;
    assert_int_equal(safetensors_open(&s, path, &err), -1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_reads_back),
        cmocka_unit_test(the_bytes_are_those_of_the_format),
        cmocka_unit_test(headers_of_others_are_read),
        cmocka_unit_test(every_f16_converts),
        cmocka_unit_test(bf16_rounds_to_nearest_even),
        cmocka_unit_test(other_types_convert),
        cmocka_unit_test(broken_headers_are_refused),
        cmocka_unit_test(broken_files_are_refused),
        cmocka_unit_test(cut_files_are_refused),
        cmocka_unit_test(a_failed_write_is_told),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
