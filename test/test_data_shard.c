/* test_data_shard.c: shards written and read back: every layout, frame boundaries, ragged pieces, threads, what the
 * writer refuses, what it leaves on disk, and reading by many threads. Damaged shards are test_data_shard_damage.c's.
 */
#include "test/support_shard.h"
#include "test/unit_directory.h"

#include <pthread.h>
#include <zstd.h>

static void assert_same_file(const char *a, const char *b) {
    error err;
    char *x, *y;
    size_t x_size, y_size;
    assert_int_equal(file_read_all(a, 1 << 30, &x, &x_size, &err), 0);
    assert_int_equal(file_read_all(b, 1 << 30, &y, &y_size, &err), 0);
    assert_int_equal(x_size, y_size);
    assert_memory_equal(x, y, x_size);
    free(x);
    free(y);
}

static void assert_empty_directory(void) {
    error err;
    char **names;
    size_t count;
    assert_int_equal(file_list(directory, "", &names, &count, &err), 0);
    if (count > 0) fail_msg("%s is left in the directory", names[0]);
    file_list_free(names, count);
}

/* ---- round trips ------------------------------------------------------------------------------------------------- */

static void every_layout_and_length(void **state) {
    (void)state;
    const struct {
        uint32_t bytes;
        uint64_t vocab;
    } widths[] = {{1, 2}, {1, 256}, {2, 256}, {2, 257}, {2, 65536}, {4, 257}, {4, 65537}, {4, 1 << 24}};
    const uint32_t frames[] = {1, 3, 8, 64, 1000};
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        for (size_t f = 0; f < sizeof frames / sizeof *frames; f++) {
            uint64_t n = frames[f];
            const uint64_t lengths[] = {0, 1, n - 1, n, n + 1, 2 * n, 3 * n + n / 2 + 1};
            for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
                struct sample s = {widths[w].bytes, frames[f],  l % 2 == 0, (l / 2 + f) % 2 == 0,
                                   widths[w].vocab, lengths[l], 0};
                for (s.document_tokens = 0; s.document_tokens <= 11; s.document_tokens += 11) {
                    const char *path = in_directory("a.rrs");
                    sample_write(&s, path, 1 + (int)(l % 2), 0);
                    sample_expect(&s, path);
                }
            }
        }
    }
}

static void documents_of_one_token(void **state) {
    (void)state;
    struct sample s = {2, 16, false, true, 257, 1000, 1};
    sample_write(&s, in_directory("a.rrs"), 2, 0);
    sample_expect(&s, in_directory("a.rrs"));
}

static void largest_frame(void **state) {
    (void)state;
    struct sample s = {4, SHARD_FRAME_TOKENS_MAX, true, true, 70000, SHARD_FRAME_TOKENS_MAX + 1, 1 << 20};
    sample_write(&s, in_directory("a.rrs"), 1, 4096);
    sample_expect(&s, in_directory("a.rrs"));
}

static const struct sample middle = {2, 100, true, true, 300, 20011, 17};

static void threads_and_pieces_leave_no_trace(void **state) {
    (void)state;
    sample_write(&middle, in_directory("one.rrs"), 1, 1);
    const int threads[] = {1, 2, 3, 8};
    const size_t pieces[] = {0, 1, 99, 100, 101, 4096};
    for (size_t t = 0; t < 4; t++) {
        for (size_t p = 0; p < 6; p++) {
            sample_write(&middle, in_directory("other.rrs"), threads[t], pieces[p]);
            assert_same_file(in_directory("one.rrs"), in_directory("other.rrs"));
        }
    }
}

/* Other software finds standard zstd frames, each by itself with checksum and size, and all of them as one file. */
static void frames_are_standard(void **state) {
    (void)state;
    error err;
    char *file;
    size_t size;
    sample_write(&middle, in_directory("a.rrs"), 2, 0);
    assert_int_equal(file_read_all(in_directory("a.rrs"), 1 << 30, &file, &size, &err), 0);
    struct shard_header h;
    memcpy(&h, file, sizeof h);
    size_t raw_size = shard_frame_bytes(100, 2, true), total = 0;
    char raw[1000];
    for (uint64_t f = 0; f < h.frames; f++) {
        struct shard_seek e;
        memcpy(&e, file + h.seek_offset + f * sizeof e, sizeof e);
        uint32_t tokens = f + 1 < h.frames ? 100 : 11;
        raw_size = shard_frame_bytes(tokens, 2, true);
        assert_true(file[e.offset + 4] & 4); /* the descriptor's checksum flag */
        assert_int_equal(ZSTD_getFrameContentSize(file + e.offset, e.bytes), raw_size);
        assert_int_equal(ZSTD_decompress(raw, sizeof raw, file + e.offset, e.bytes), raw_size);
        assert_int_equal(XXH64(raw, raw_size, 0), e.hash);
        uint64_t first = f * 100;
        for (uint32_t i = 0; i < tokens; i++) { /* planes: the low bytes, then the high bytes, then the mask bits */
            int32_t id = (unsigned char)raw[i] | (unsigned char)raw[tokens + i] << 8;
            assert_int_equal(id, sample_id(&middle, first + i));
            assert_int_equal(raw[2 * tokens + i / 8] >> (i % 8) & 1, sample_mask(&middle, first + i));
        }
        total += raw_size;
    }
    char *all = malloc(total);
    assert_non_null(all);
    assert_int_equal(ZSTD_decompress(all, total, file + sizeof h, h.seek_offset - sizeof h), total);
    free(all);
    free(file);
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

struct opened {
    shard *shard;
    shard_cursor *cursor;
};

static struct opened open_sample(const struct sample *s, const char *name) {
    error err;
    struct opened o;
    sample_write(s, in_directory(name), 2, 0);
    assert_int_equal(shard_open(&o.shard, in_directory(name), &err), 0);
    assert_int_equal(shard_cursor_open(&o.cursor, &err), 0);
    return o;
}

static void close_sample(struct opened *o) {
    shard_cursor_close(o->cursor);
    shard_close(o->shard);
}

static void expect_range(const struct sample *s, const shard *opened, shard_cursor *c, uint64_t from, size_t count) {
    error err;
    int32_t ids[400];
    uint8_t mask[400];
    assert_true(count < 399);
    memset(ids, 0x55, sizeof ids);
    assert_int_equal(shard_read(opened, c, from, count, ids, from % 2 ? mask : NULL, &err), 0);
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(ids[i], sample_id(s, from + i));
        if (from % 2) assert_int_equal(mask[i], sample_mask(s, from + i));
    }
    assert_int_equal(ids[count], 0x55555555); /* nothing written beyond */
}

static void ranges_anywhere(void **state) {
    (void)state;
    struct opened o = open_sample(&middle, "a.rrs");
    for (uint64_t i = 0; i < 3000; i++) {
        size_t count = i * 7919 % 390;
        expect_range(&middle, o.shard, o.cursor, i * 104729 % (middle.tokens - count + 1), count);
    }
    for (uint64_t from = 0; from + 130 <= middle.tokens; from += 129) {
        expect_range(&middle, o.shard, o.cursor, from, 130);
    }
    close_sample(&o);
}

static void ranges_outside_are_refused(void **state) {
    (void)state;
    struct opened o = open_sample(&middle, "a.rrs");
    const struct {
        uint64_t from;
        size_t count;
    } ranges[] = {{20011, 1}, {20010, 2}, {20012, 0}, {0, 20012}, {UINT64_MAX, 1}, {1, SIZE_MAX}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        error err;
        char text[6000];
        int32_t ids[2];
        snprintf(text, sizeof text, "cannot read %zu tokens from token %llu of %s: it has 20011", ranges[i].count,
                 (unsigned long long)ranges[i].from, in_directory("a.rrs"));
        unit_expect(shard_read(o.shard, o.cursor, ranges[i].from, ranges[i].count, ids, NULL, &err), &err, ERROR_INPUT,
                    text);
    }
    expect_range(&middle, o.shard, o.cursor, 20011, 0);
    close_sample(&o);
}

/* The cursor keeps frames: not to be taken for those of another shard, nor for those of a file that was replaced. */
static void one_cursor_for_several_shards(void **state) {
    (void)state;
    struct sample other = middle;
    other.document_tokens = 19;
    struct opened a = open_sample(&middle, "a.rrs"), b = open_sample(&other, "b.rrs");
    for (uint64_t from = 0; from < 2000; from += 50) {
        expect_range(&middle, a.shard, a.cursor, from, 120);
        expect_range(&other, b.shard, a.cursor, from, 120);
    }
    close_sample(&b);
    shard_close(a.shard);
    error err;
    sample_write(&other, in_directory("a.rrs"), 1, 0);
    assert_int_equal(shard_open(&a.shard, in_directory("a.rrs"), &err), 0); /* likely at the same address */
    expect_range(&other, a.shard, a.cursor, 1900, 120);
    close_sample(&a);
}

static void document_search(void **state) {
    (void)state;
    struct opened o = open_sample(&middle, "a.rrs");
    for (uint64_t p = 0; p < middle.tokens + 40; p++) {
        uint64_t expected = (p + 16) / 17;
        if (expected > sample_documents(&middle)) expected = sample_documents(&middle);
        assert_int_equal(shard_document_from(o.shard, p), expected);
    }
    close_sample(&o);
}

struct reader {
    const shard *shard;
    uint64_t seed;
    bool good;
};

static void *read_ranges(void *argument) {
    struct reader *r = argument;
    error err;
    shard_cursor *c;
    int32_t ids[256];
    uint8_t mask[256];
    r->good = shard_cursor_open(&c, &err) == 0;
    for (uint64_t i = 0; r->good && i < 2000; i++) {
        uint64_t from = (i + r->seed) * 104729 % (middle.tokens - 255);
        r->good = shard_read(r->shard, c, from, 255, ids, mask, &err) == 0;
        for (uint64_t k = 0; r->good && k < 255; k++) {
            r->good = ids[k] == sample_id(&middle, from + k) && mask[k] == sample_mask(&middle, from + k);
        }
    }
    shard_cursor_close(c);
    return NULL;
}

static void many_threads_read(void **state) {
    (void)state;
    struct opened o = open_sample(&middle, "a.rrs");
    struct reader readers[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        readers[i] = (struct reader){o.shard, (uint64_t)i * 977, false};
        assert_int_equal(pthread_create(&threads[i], NULL, read_ranges, &readers[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_true(readers[i].good);
    }
    close_sample(&o);
}

/* ---- the writer's rules ------------------------------------------------------------------------------------------ */

static void refuses_options(void **state) {
    (void)state;
    const struct shard_writer_options good = sample_options(&middle);
    char line[300], name[80];
    memset(line, 'x', 256);
    line[256] = 0;
    memset(name, 'n', 64);
    name[64] = 0;
    struct {
        struct shard_writer_options options;
        const char *text;
    } cases[] = {
        {good, "3 bytes a token; 1, 2 or 4 are possible"},
        {good, "a vocabulary of 65537 ids does not go into 2-byte tokens (and 16777216 is the most)"},
        {good, "a vocabulary of 0 ids does not go into 2-byte tokens (and 16777216 is the most)"},
        {good, "the end-of-document id 300 is not one of the vocabulary's 300 ids, nor -1 for none"},
        {good, "the end-of-document id -2 is not one of the vocabulary's 300 ids, nor -1 for none"},
        {good, "frames of 0 tokens; 1 to 4194304 are possible"},
        {good, "frames of 4194305 tokens; 1 to 4194304 are possible"},
        {good, "zstd level 0; 1 to 22 are possible"},
        {good, "zstd level 23; 1 to 22 are possible"},
        {good, "a separator must be one line of at most 255 bytes"},
        {good, "a separator must be one line of at most 255 bytes"},
        {good, NULL},
    };
    cases[0].options.token_bytes = 3;
    cases[1].options.vocab = 65537;
    cases[2].options.vocab = 0;
    cases[3].options.eod = 300;
    cases[4].options.eod = -2;
    cases[5].options.frame_tokens = 0;
    cases[6].options.frame_tokens = SHARD_FRAME_TOKENS_MAX + 1;
    cases[7].options.zstd_level = 0;
    cases[8].options.zstd_level = 23;
    cases[9].options.separator = "a\nb";
    cases[10].options.separator = line;
    cases[11].options.tokenizer_name = name;
    char named[200];
    snprintf(named, sizeof named, "the tokenizer's name '%s' has more than 63 bytes", name);
    cases[11].text = named;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error err;
        shard_writer *w = (shard_writer *)&err;
        char text[6000];
        snprintf(text, sizeof text, "%s: %s", in_directory("a.rrs"), cases[i].text);
        unit_expect(shard_writer_open(&w, in_directory("a.rrs"), &cases[i].options, 1, &err), &err, ERROR_INPUT, text);
        assert_null(w);
    }
    assert_empty_directory();
}

static void longest_names(void **state) {
    (void)state;
    error err;
    shard_writer *w;
    struct shard_info info;
    char line[256], name[64];
    memset(line, '\xFF', 255); /* a separator is bytes, not text */
    line[255] = 0;
    memset(name, 'n', 63);
    name[63] = 0;
    struct shard_writer_options options = sample_options(&middle);
    options.separator = line;
    options.tokenizer_name = name;
    assert_int_equal(shard_writer_open(&w, in_directory("a.rrs"), &options, 1, &err), 0);
    assert_int_equal(shard_writer_finish(w, &info, &err), 0);
    assert_int_equal(shard_verify(in_directory("a.rrs"), &info, &err), 0);
    assert_string_equal(info.separator, line);
    assert_string_equal(info.tokenizer_name, name);
}

static shard_writer *open_writer(void) {
    error err;
    shard_writer *w;
    struct shard_writer_options options = sample_options(&middle);
    assert_int_equal(shard_writer_open(&w, in_directory("a.rrs"), &options, 2, &err), 0);
    return w;
}

static void refuses_ids(void **state) {
    (void)state;
    const int32_t bad[] = {-1, 300, INT32_MIN, INT32_MAX};
    for (size_t i = 0; i < 4; i++) {
        error err;
        char text[6000];
        int32_t ids[9] = {0, 299, 1, 2, 3, 4, 5, 6, 7};
        ids[2 * i + 1] = bad[i];
        shard_writer *w = open_writer();
        snprintf(text, sizeof text, "%s: token id %d is not one of the vocabulary's 300 ids", in_directory("a.rrs"),
                 bad[i]);
        unit_expect(shard_writer_append(w, ids, NULL, 9, &err), &err, ERROR_INPUT, text);
        shard_writer_abandon(w);
        assert_empty_directory();
    }
}

static void refuses_documents_without_tokens(void **state) {
    (void)state;
    error err;
    char text[6000];
    snprintf(text, sizeof text, "%s: document 0 has no token; every document needs at least one",
             in_directory("a.rrs"));
    shard_writer *w = open_writer();
    assert_int_equal(shard_writer_document(w, SHARD_DOC_SEPARATED, &err), 0);
    unit_expect(shard_writer_document(w, SHARD_DOC_SEPARATED, &err), &err, ERROR_INPUT, text);
    shard_writer_abandon(w);
    assert_empty_directory();
    w = open_writer();
    assert_int_equal(shard_writer_document(w, SHARD_DOC_SEPARATED, &err), 0);
    unit_expect(shard_writer_finish(w, NULL, &err), &err, ERROR_INPUT, text);
    assert_empty_directory();
}

/* The final name appears when the shard is complete, and what had it before stays until then. */
static void appears_at_once(void **state) {
    (void)state;
    error err;
    struct sample first = {1, 10, false, false, 10, 55, 5};
    shard_writer *w = open_writer();
    int32_t ids[300] = {0};
    assert_int_equal(shard_writer_append(w, ids, NULL, 300, &err), 0);
    assert_false(file_exists(in_directory("a.rrs")));
    assert_true(file_exists(in_directory("a.rrs.tmp")));
    shard_writer_abandon(w);
    assert_empty_directory();
    sample_write(&first, in_directory("a.rrs"), 1, 0);
    w = open_writer();
    assert_int_equal(shard_writer_append(w, ids, NULL, 300, &err), 0);
    sample_expect(&first, in_directory("a.rrs"));
    assert_int_equal(shard_writer_finish(w, NULL, &err), 0);
    assert_false(file_exists(in_directory("a.rrs.tmp")));
    struct shard_info info;
    assert_int_equal(shard_verify(in_directory("a.rrs"), &info, &err), 0);
    assert_int_equal(info.tokens, 300);
    shard_writer_abandon(NULL);
}

/* A writer that was killed leaves a file without a header, which is refused even under a shard's name. */
static void unfinished_is_no_shard(void **state) {
    (void)state;
    error err;
    shard_writer *w = open_writer();
    static int32_t ids[100000];
    assert_int_equal(shard_writer_append(w, ids, NULL, 100000, &err), 0);
    char *bytes;
    size_t size;
    char expected[6000];
    assert_int_equal(file_read_all(in_directory("a.rrs.tmp"), 1 << 30, &bytes, &size, &err), 0);
    shard_writer_abandon(w);
    char padded[2048] = {0}; /* the writer buffers: stand in for what a longer run would have written */
    memcpy(padded, bytes, size < sizeof padded ? size : sizeof padded);
    free(bytes);
    assert_int_equal(file_write_all(in_directory("a.rrs"), padded, sizeof padded, &err), 0);
    shard *s;
    snprintf(expected, sizeof expected,
             "%s is no shard: its first bytes are not a shard's; riverrun tokenize makes shards of text (of one that "
             "it made, the writing was not finished)",
             in_directory("a.rrs"));
    unit_expect(shard_open(&s, in_directory("a.rrs"), &err), &err, ERROR_INPUT, expected);
}

static void cannot_be_created(void **state) {
    (void)state;
    error err;
    shard_writer *w;
    struct shard_writer_options options = sample_options(&middle);
    assert_int_equal(shard_writer_open(&w, in_directory("none/a.rrs"), &options, 1, &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
    assert_non_null(strstr(err.text, "cannot create"));
    assert_empty_directory();
}

static void helpers(void **state) {
    (void)state;
    assert_int_equal(shard_token_bytes(1), 1);
    assert_int_equal(shard_token_bytes(256), 1);
    assert_int_equal(shard_token_bytes(257), 2);
    assert_int_equal(shard_token_bytes(65536), 2);
    assert_int_equal(shard_token_bytes(65537), 4);
    assert_false(shard_planes_pay(256));
    assert_true(shard_planes_pay(257));
    assert_false(shard_planes_pay(50257));
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_layout_and_length),
        TEST(documents_of_one_token),
        TEST(largest_frame),
        TEST(threads_and_pieces_leave_no_trace),
        TEST(frames_are_standard),
        TEST(ranges_anywhere),
        TEST(ranges_outside_are_refused),
        TEST(one_cursor_for_several_shards),
        TEST(document_search),
        TEST(many_threads_read),
        TEST(refuses_options),
        TEST(longest_names),
        TEST(refuses_ids),
        TEST(refuses_documents_without_tokens),
        TEST(appears_at_once),
        TEST(unfinished_is_no_shard),
        TEST(cannot_be_created),
        cmocka_unit_test(helpers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
