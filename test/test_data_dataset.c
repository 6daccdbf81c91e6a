/* test_data_dataset.c: several shards as one stream: order, reading and document starts across shards, what must agree,
 * the tokenizer.json beside them, and more shards than a process may open files at first. */
#include "data/tokenizer.h"
#include "test/support_shard.h"
#include "test/unit_directory.h"

#include <sys/resource.h>
#include <sys/stat.h>

/* A shard with `count` tokens that are first, first + 1, ... and documents at every multiple of 10 of that number. */
struct part {
    const char *name;
    int32_t first;
    size_t count;
};

static void write_part(const struct part *p, const struct shard_writer_options *options) {
    error err;
    shard_writer *w;
    assert_int_equal(shard_writer_open(&w, in_directory(p->name), options, 1, &err), 0);
    for (int32_t id = p->first; id < p->first + (int32_t)p->count; id++) {
        if (id % 10 == 0) assert_int_equal(shard_writer_document(w, SHARD_DOC_SEPARATED, &err), 0);
        uint8_t mask = id % 3 != 0;
        assert_int_equal(shard_writer_append(w, &id, options->has_mask ? &mask : NULL, 1, &err), 0);
    }
    shard_writer_text_bytes(w, p->count);
    assert_int_equal(shard_writer_finish(w, NULL, &err), 0);
}

static struct shard_writer_options part_options(void) {
    return (struct shard_writer_options){.token_bytes = 2,
                                         .frame_tokens = 16,
                                         .zstd_level = 1,
                                         .has_mask = true,
                                         .vocab = 1000,
                                         .eod = -1,
                                         .tokenizer_identity = 7,
                                         .tokenizer_name = "sample",
                                         .separator = ""};
}

/* 211 tokens, 0 to 210, in five shards, of which two hold nothing; written in another order than their names'. */
static const struct part parts[] = {
    {"b-00001.rrs", 105, 1}, {"a-00000.rrs", 0, 100}, {"b-00002.rrs", 106, 0},
    {"c.rrs", 106, 105},     {"B.rrs", 0, 0},         {"b-00000.rrs", 100, 5},
};
enum { ALL = 211, PARTS = sizeof parts / sizeof *parts };

static void write_parts(void) {
    struct shard_writer_options options = part_options();
    for (size_t i = 0; i < PARTS; i++) {
        options.frame_tokens = 16 + (uint32_t)i; /* may differ, as may the width and layout of tokens */
        options.token_bytes = i % 2 ? 2 : 4;
        options.planes = i % 3 == 0;
        write_part(&parts[i], &options);
    }
    error err;
    assert_int_equal(file_write_all(in_directory("notes.txt"), "x", 1, &err), 0);
    assert_int_equal(file_write_all(in_directory("a-00000.rrs.tmp"), "x", 1, &err), 0);
}

static void one_stream(void **state) {
    (void)state;
    error err;
    dataset *d;
    shard_cursor *c;
    write_parts();
    assert_int_equal(dataset_open(&d, directory, &err), 0);
    assert_int_equal(shard_cursor_open(&c, &err), 0);
    const struct dataset_info *info = dataset_get_info(d);
    assert_int_equal(info->tokens, ALL);
    assert_int_equal(info->text_bytes, ALL);
    assert_int_equal(info->documents, 22);
    assert_int_equal(info->shards, PARTS);
    assert_int_equal(info->vocab, 1000);
    assert_int_equal(info->eod, -1);
    assert_int_equal(info->tokenizer_identity, 7);
    assert_string_equal(info->tokenizer_name, "sample");
    assert_string_equal(info->tokenizer_path, "");
    assert_true(info->has_mask);
    assert_string_equal(shard_get_info(dataset_shard(d, 0))->path,
                        in_directory("B.rrs")); /* bytewise: capitals first */
    for (uint64_t from = 0; from <= ALL; from++) {
        for (size_t count = 0; from + count <= ALL; count++) {
            int32_t ids[ALL + 1];
            uint8_t mask[ALL + 1];
            ids[count] = -5;
            assert_int_equal(dataset_read(d, c, from, count, ids, count % 2 ? mask : NULL, &err), 0);
            for (size_t i = 0; i < count; i++) {
                assert_int_equal(ids[i], from + i);
                if (count % 2) assert_int_equal(mask[i], (from + i) % 3 != 0);
            }
            assert_int_equal(ids[count], -5);
        }
    }
    int32_t ids[2];
    unit_expect(dataset_read(d, c, 210, 2, ids, NULL, &err), &err, ERROR_INPUT,
                "cannot read 2 tokens from token 210: the data set has 211");
    unit_expect(dataset_read(d, c, UINT64_MAX, 2, ids, NULL, &err), &err, ERROR_INPUT,
                "cannot read 2 tokens from token 18446744073709551615: the data set has 211");
    shard_cursor_close(c);
    dataset_close(d);
}

static void document_starts(void **state) {
    (void)state;
    error err;
    dataset *d;
    write_parts();
    assert_int_equal(dataset_open(&d, directory, &err), 0);
    for (uint64_t from = 0; from < ALL + 5; from++) {
        for (size_t count = 0; count < ALL + 10; count++) {
            uint64_t expected[32], got[32], end = from + count < ALL ? from + count : ALL;
            size_t n = 0;
            for (uint64_t p = (from + 9) / 10 * 10; p < end; p += 10) expected[n++] = p;
            for (size_t max = 0; max <= 24; max += 6) {
                got[max] = 12345;
                assert_int_equal(dataset_document_starts(d, from, count, got, max), n);
                for (size_t i = 0; i < n && i < max; i++) assert_int_equal(got[i], expected[i]);
                assert_int_equal(got[max], 12345);
            }
        }
    }
    assert_int_equal(dataset_document_starts(d, UINT64_MAX, SIZE_MAX, NULL, 0), 0);
    assert_int_equal(dataset_document_starts(d, 0, SIZE_MAX, NULL, 0), 22);
    dataset_close(d);
}

static void single_file(void **state) {
    (void)state;
    error err;
    dataset *d;
    shard_cursor *c;
    int32_t ids[105];
    write_parts();
    assert_int_equal(dataset_open(&d, in_directory("c.rrs"), &err), 0);
    assert_int_equal(shard_cursor_open(&c, &err), 0);
    assert_int_equal(dataset_get_info(d)->tokens, 105);
    assert_int_equal(dataset_get_info(d)->shards, 1);
    assert_int_equal(dataset_read(d, c, 0, 105, ids, NULL, &err), 0);
    assert_int_equal(ids[104], 210);
    shard_cursor_close(c);
    dataset_close(d);
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

static void expect_refusal(const char *path, const char *format, const char *a, const char *b) {
    char text[9000];
    error err = {0};
    dataset *d;
    snprintf(text, sizeof text, format, a, b);
    if (strlen(text) > sizeof err.text - 1) text[sizeof err.text - 1] = 0;
    unit_expect(dataset_open(&d, path, &err), &err, ERROR_INPUT, text);
    assert_null(d);
}

static void must_agree(void **state) {
    (void)state;
    const struct part a = {"a.rrs", 0, 50}, b = {"b.rrs", 50, 50};
    const struct shard_writer_options first = part_options();
    write_part(&a, &first);
    struct shard_writer_options other = first;
    other.tokenizer_identity = 8;
    write_part(&b, &other);
    expect_refusal(directory,
                   "%s and %s were made with different tokenizers: 'sample' (0000000000000007) and 'sample' "
                   "(0000000000000008); the shards of a data set must share one",
                   in_directory("a.rrs"), in_directory("b.rrs"));
    other = first;
    other.tokenizer_name = "other";
    write_part(&b, &other);
    expect_refusal(directory,
                   "%s and %s were made with different tokenizers: 'sample' (0000000000000007) and 'other' "
                   "(0000000000000007); the shards of a data set must share one",
                   in_directory("a.rrs"), in_directory("b.rrs"));
    other = first;
    other.vocab = 999;
    write_part(&b, &other);
    expect_refusal(
        directory,
        "%s and %s differ in their vocabulary: 1000 ids with end-of-document id -1, and 999 with -1; the shards "
        "of a data set must share one",
        in_directory("a.rrs"), in_directory("b.rrs"));
    other = first;
    other.eod = 5;
    write_part(&b, &other);
    expect_refusal(
        directory,
        "%s and %s differ in their vocabulary: 1000 ids with end-of-document id -1, and 1000 with 5; the shards "
        "of a data set must share one",
        in_directory("a.rrs"), in_directory("b.rrs"));
    other = first;
    other.has_mask = false;
    write_part(&b, &other);
    expect_refusal(directory,
                   "%s has target masks and %s has none; the shards of a data set must all have them or none",
                   in_directory("a.rrs"), in_directory("b.rrs"));
    const struct part none = {"a.rrs", 0, 0};
    write_part(&none, &first); /* a shard without tokens must agree, too */
    expect_refusal(directory,
                   "%s has target masks and %s has none; the shards of a data set must all have them or none",
                   in_directory("a.rrs"), in_directory("b.rrs"));
}

static void needs_shards(void **state) {
    (void)state;
    expect_refusal(directory, "%s holds no shards: no file there ends in .rrs (riverrun tokenize makes them)%s",
                   directory, "");
    expect_refusal(in_directory("none"), "cannot open shard %s: No such file or directory%s", in_directory("none"), "");
    error err;
    assert_int_equal(file_write_all(in_directory("a.rrs"), "text", 4, &err), 0);
    expect_refusal(directory, "%s is no shard: it has 4 bytes, expected at least the 512 of a header%s",
                   in_directory("a.rrs"), "");
    char long_path[5000];
    memset(long_path, 'x', sizeof long_path);
    long_path[sizeof long_path - 1] = 0;
    dataset *d;
    assert_int_equal(dataset_open(&d, long_path, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
}

/* What a killed tokenize leaves when it had begun to put shards in place. */
static void unfinished_commit(void **state) {
    (void)state;
    error err;
    write_parts();
    assert_int_equal(mkdir(in_directory(".b" DATASET_COMMIT_SUFFIX), 0700), 0);
    expect_refusal(
        directory,
        "%s is not complete: a tokenize run was killed while it put its shards in place (it left %s); run it "
        "again with --overwrite",
        directory, ".b" DATASET_COMMIT_SUFFIX);
    assert_int_equal(file_remove_tree(in_directory(".b" DATASET_COMMIT_SUFFIX), &err), 0);
    dataset *d;
    assert_int_equal(dataset_open(&d, directory, &err), 0);
    dataset_close(d);
}

static void tokenizer_beside(void **state) {
    (void)state;
    error err;
    tokenizer *t;
    dataset *d;
    size_t size;
    assert_int_equal(tokenizer_open(&t, "bytes", &err), 0);
    const char *json = tokenizer_json(t, &size);
    struct shard_writer_options options = part_options();
    options.tokenizer_identity = tokenizer_identity(t);
    options.tokenizer_name = "bytes";
    const struct part a = {"a.rrs", 0, 50};
    write_part(&a, &options);
    assert_int_equal(file_write_all(in_directory("tokenizer.json"), json, size, &err), 0);
    const char *opened[] = {directory, in_directory("a.rrs")};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(dataset_open(&d, opened[i], &err), 0);
        assert_string_equal(dataset_get_info(d)->tokenizer_path, in_directory("tokenizer.json"));
        dataset_close(d);
    }
    /* Another spelling of the same tokenizer is the same tokenizer. */
    char *spaced = malloc(size + 1);
    assert_non_null(spaced);
    memcpy(spaced, json, size);
    spaced[size] = '\n';
    assert_int_equal(file_write_all(in_directory("tokenizer.json"), spaced, size + 1, &err), 0);
    free(spaced);
    assert_int_equal(dataset_open(&d, directory, &err), 0);
    dataset_close(d);
    assert_int_equal(file_write_all(in_directory("tokenizer.json"), "{}", 2, &err), 0);
    assert_int_equal(dataset_open(&d, directory, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    char text[6000];
    snprintf(text, sizeof text,
             "%s has the identity %016llx, but %s was made with the tokenizer 'bytes' (%016llx): shards "
             "and tokenizer.json must belong together",
             in_directory("tokenizer.json"), (unsigned long long)XXH64("{}", 2, 0), in_directory("a.rrs"),
             (unsigned long long)tokenizer_identity(t));
    assert_string_equal(err.text, text);
    tokenizer_close(t);
}

/* The soft limit on open files is raised where it is too low; under the hard one too many shards are an error. */
static void more_shards_than_descriptors(void **state) {
    (void)state;
    error err;
    dataset *d;
    struct rlimit before, low;
    const struct shard_writer_options options = part_options();
    for (int i = 0; i < 60; i++) {
        char name[32];
        snprintf(name, sizeof name, "s-%05d.rrs", i);
        const struct part p = {name, i * 3, 3};
        write_part(&p, &options);
    }
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    low = before;
    low.rlim_cur = 40;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    int result = dataset_open(&d, directory, &err);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(result, 0);
    assert_int_equal(dataset_get_info(d)->tokens, 180);
    dataset_close(d);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(one_stream),   TEST(document_starts),   TEST(single_file),      TEST(must_agree),
        TEST(needs_shards), TEST(unfinished_commit), TEST(tokenizer_beside), TEST(more_shards_than_descriptors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
