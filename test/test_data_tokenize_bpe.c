/* test_data_tokenize_bpe.c: tokenizing with byte-level BPE: long documents are cut into blocks without changing an id,
 * whatever they hold; shards know the bytes of text that ids stand for; text comes back. */
#include "data/shard.h"
#include "test/support_text.h"
#include "test/unit_directory.h"

#include <sys/mman.h>
#include <unistd.h>

#define SEP "<|endoftext|>"
#define GPT2 "test/tokenizer/gpt2.json"
#define NEOX "test/tokenizer/neox.json"
#define WHOLE "test/tokenizer/whole.json"
#define FLAGS "test/tokenizer/flags.json"

enum { BLOCK = 1 << 18 }; /* of data/encode_pipeline.c */

static void add_times(struct text *t, const char *piece, size_t times) {
    for (size_t i = 0; i < times; i++) text_add(t, piece, strlen(piece));
}

/* Every document by itself, encoded at once, and its end; and where each begins. */
static struct token_list encode_documents(const tokenizer *t, const struct text *text, struct token_list *starts) {
    struct text_documents documents = {0};
    struct token_list list = {0};
    error err;
    encoder *e;
    text_documents_split(&documents, text->bytes, text->size, SEP);
    assert_int_equal(encoder_open(&e, t, &err), 0);
    for (size_t i = 0; i < documents.count; i++) {
        const struct text_document *d = &documents.list[i];
        assert_int_equal(token_list_add(starts, (int32_t)list.count, &err), 0);
        assert_int_equal(encoder_append(e, documents.all.bytes + d->start, d->size, &list, &err), 0);
        assert_int_equal(token_list_add(&list, tokenizer_eod(t), &err), 0);
    }
    encoder_close(e);
    text_documents_free(&documents);
    return list;
}

static void expect_starts(const dataset *d, const struct token_list *want) {
    size_t tokens = dataset_get_info(d)->tokens;
    uint64_t *starts = malloc((want->count + 1) * sizeof *starts);
    assert_non_null(starts);
    assert_int_equal(dataset_document_starts(d, 0, tokens, starts, want->count + 1), want->count);
    for (size_t i = 0; i < want->count; i++) assert_int_equal(starts[i], want->ids[i]);
    free(starts);
}

static void expect_shards(const char *path, const struct token_list *want, const struct token_list *starts,
                          uint64_t text_bytes) {
    error err;
    dataset *d;
    shard_cursor *cursor;
    assert_int_equal(dataset_open(&d, path, &err), 0);
    const struct dataset_info *info = dataset_get_info(d);
    assert_int_equal(info->tokens, want->count);
    int32_t *ids = malloc((want->count + 1) * sizeof *ids);
    uint8_t *mask = malloc(want->count + 1);
    assert_true(ids && mask);
    assert_int_equal(shard_cursor_open(&cursor, &err), 0);
    assert_int_equal(dataset_read(d, cursor, 0, want->count, ids, mask, &err), 0);
    for (size_t i = 0; i < want->count; i++) {
        if (ids[i] != want->ids[i]) fail_msg("token %zu is %d, of the whole document %d", i, ids[i], want->ids[i]);
    }
    expect_starts(d, starts);
    uint64_t bytes = 0;
    for (size_t i = 0; i < info->shards; i++) bytes += shard_get_info(dataset_shard(d, i))->text_bytes;
    assert_int_equal(bytes, text_bytes);
    shard_cursor_close(cursor);
    free(mask);
    free(ids);
    dataset_close(d);
}

/* Tokenize the text as one input, with so many tokens to a shard, and compare with the whole documents' ids. */
static void check(const char *spec, const struct text *text, uint64_t shard_tokens, int threads) {
    error err;
    tokenizer *t;
    struct tokenize_result result;
    const char *input = unit_path(directory, "input"), *out = unit_path(directory, "out");
    if (tokenizer_open(&t, spec, &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(file_write_all(input, text->bytes, text->size, &err), 0);
    struct tokenize_options o = text_options(out);
    o.shard_tokens = shard_tokens;
    o.threads = threads;
    if (tokenize(t, &input, 1, &o, &result, &err) != 0) fail_msg("%s", err.text);
    struct token_list starts = {0}, want = encode_documents(t, text, &starts);
    uint64_t bytes = tokenizer_text_bytes(t, want.ids, want.count);
    assert_int_equal(result.tokens, want.count);
    assert_int_equal(result.text_bytes, bytes);
    expect_shards(out, &want, &starts, bytes);
    assert_int_equal(result.documents, starts.count);
    free(starts.ids);
    free(want.ids);
    tokenizer_close(t);
    assert_int_equal(file_remove_tree(out, &err), 0);
}

static void check_all(const struct text *text) {
    check(GPT2, text, UINT64_C(1) << 30, 1);
    check(NEOX, text, 100003, 3);
}

/* ---- long documents ---------------------------------------------------------------------------------------------- */

static void nowhere_to_cut(void **state) {
    (void)state;
    static const char *const pieces[] = {" ",    "a",   "\xCC\x81", "\n", "e\xCC\xA3\xCC\x81", "\xE3\x80\x80",
                                         "\xFF", "ACGT"};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        struct text text = {0};
        add_times(&text, pieces[i], (1 << 20) / strlen(pieces[i]));
        check(i % 2 ? GPT2 : NEOX, &text, UINT64_C(1) << 30, 2);
        text_free(&text);
    }
}

/* Long documents that can be cut rarely, between short ones, so that they begin anywhere in a block. */
static void few_places_to_cut(void **state) {
    (void)state;
    struct text text = {0};
    for (size_t i = 0; i < 6; i++) {
        add_times(&text, "short one's \xC3\xA9\n" SEP "\n", 20 + 1000 * i);
        add_times(&text, "x", BLOCK - 5000 * i);
        add_times(&text, " ", i % 3);
        add_times(&text, "y\xCC\x81", BLOCK / 4 * i);
        add_times(&text, "\n" SEP "\n", i % 2);
        add_times(&text, "  z", 70000);
        add_times(&text, "q", 3 * BLOCK * (i == 4));
        add_times(&text, "\n" SEP "\n", 1);
    }
    check_all(&text);
    text_free(&text);
}

/* A document that begins in the last bytes of a block, or with the next one. */
static void around_a_blocks_end(void **state) {
    (void)state;
    for (int k = -3; k <= 3; k++) {
        struct text text = {0};
        add_times(&text, "w ", BLOCK / 2 - 10);
        add_times(&text, "v", (size_t)(19 + k));
        add_times(&text, "\n" SEP "\n", 1);
        add_times(&text, "u", (k & 1 ? BLOCK : 100));
        add_times(&text, " tail's\n", 3);
        check_all(&text);
        text_free(&text);
    }
}

/* Words, blanks, marks, tokens and bytes that are no UTF-8, in random order. */
static void mixed_texts(void **state) {
    (void)state;
    static const char *const pieces[] = {"the ", "river",        " current", "'s",    "\n",
                                         "  ",   "          ",   SEP,        "12 ",   "e\xCC\x81",
                                         "\xFF", "\xE6\xBC\xA2", "\xCC\x81", " ",     "<|pad|>",
                                         "\t",   "[R]   ",       "[S]",      "wordy", "cafe\xCC\x81"};
    struct text text = {0};
    uint64_t seed = 5;
    while (text.size < 900000) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const char *piece = pieces[(seed >> 33) % 20];
        text_add(&text, piece, strlen(piece));
    }
    check_all(&text);
    check(FLAGS, &text, UINT64_C(1) << 30, 2); /* tokens that swallow spaces: not cut at all */
    text_free(&text);
}

static void a_text_that_is_one_word(void **state) {
    (void)state;
    struct text text = {0};
    add_times(&text, "no word of these ends. ", 30000);
    check(WHOLE, &text, UINT64_C(1) << 30, 2);
    text_free(&text);
}

/* ---- back to text ------------------------------------------------------------------------------------------------ */

static struct text text_back(const tokenizer *t, const char *path) {
    error err;
    struct text text = {0};
    int descriptor = memfd_create("text", MFD_CLOEXEC);
    assert_true(descriptor >= 0);
    assert_int_equal(detokenize(t, path, descriptor, &err), 0);
    off_t size = lseek(descriptor, 0, SEEK_END);
    text.bytes = malloc((size_t)size + 1);
    assert_non_null(text.bytes);
    text.size = (size_t)size;
    assert_int_equal(pread(descriptor, text.bytes, text.size, 0), size);
    close(descriptor);
    return text;
}

/* The separator inside a line is a token of the document and comes back, at shards' ends, too. */
static void text_comes_back(void **state) {
    (void)state;
    static const char bytes[] =
        "a" SEP SEP "\n" SEP "\nb " SEP "\n" SEP SEP "x\n" SEP "\n" SEP "\n\xFF\0\xC3 caf\xC3\xA9" SEP "\n" SEP;
    error err;
    tokenizer *t;
    const char *input = unit_path(directory, "input"), *out = unit_path(directory, "out");
    assert_int_equal(file_write_all(input, bytes, sizeof bytes - 1, &err), 0);
    assert_int_equal(tokenizer_open(&t, GPT2, &err), 0);
    for (uint64_t shard_tokens = 1; shard_tokens < 30; shard_tokens++) {
        struct tokenize_options o = text_options(out);
        o.shard_tokens = shard_tokens;
        assert_int_equal(tokenize(t, &input, 1, &o, NULL, &err), 0);
        struct text back = text_back(t, out);
        assert_int_equal(back.size, sizeof bytes - 1);
        assert_memory_equal(back.bytes, bytes, back.size);
        text_free(&back);
        assert_int_equal(file_remove_tree(out, &err), 0);
    }
    tokenizer_close(t);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(nowhere_to_cut), TEST(few_places_to_cut),       TEST(around_a_blocks_end),
        TEST(mixed_texts),    TEST(a_text_that_is_one_word), TEST(text_comes_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
