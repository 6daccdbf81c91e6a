/* test_data_bpe.c: encoding with byte-level BPE: the ids that Hugging Face's library gave for the texts of
 * test/tokenizer/ids.json (scripts/make_test_tokenizers.py), merging and normalizing against the plainest means, places
 * to cut, and text that is no UTF-8. */
#include "common/json.h"
#include "data/added_tokens.h"
#include "data/bpe.h"
#include "data/tokenizer.h"
#include "data/unicode.h"
#include "test/unit.h"

#define DATA "test/tokenizer/"

static uint64_t random_state = 1;

static uint32_t draw(uint32_t below) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % below;
}

static tokenizer *open_tokenizer(const char *path) {
    error err;
    tokenizer *t;
    if (tokenizer_open(&t, path, &err) != 0) fail_msg("%s", err.text);
    return t;
}

static encoder *open_encoder(const tokenizer *t) {
    error err;
    encoder *e;
    assert_int_equal(encoder_open(&e, t, &err), 0);
    return e;
}

static struct token_list encode(encoder *e, const char *text, size_t size) {
    error err;
    struct token_list list = {0};
    if (encoder_append(e, text, size, &list, &err) != 0) fail_msg("%s", err.text);
    return list;
}

/* ---- the library's ids ------------------------------------------------------------------------------------------- */

static size_t from_hexadecimal(const char *digits, char *bytes) {
    size_t size = strlen(digits) / 2;
    for (size_t i = 0; i < size; i++) {
        unsigned value;
        assert_int_equal(sscanf(digits + 2 * i, "%2x", &value), 1);
        bytes[i] = (char)value;
    }
    return size;
}

static void expect_ids(const char *name, const char *digits, const struct token_list *got, const json_t *want) {
    bool same = got->count == json_array_size(want);
    for (size_t i = 0; same && i < got->count; i++) same = got->ids[i] == json_integer_value(json_array_get(want, i));
    if (!same) fail_msg("%s: other ids for the text %s", name, digits);
}

/* The same ids come of the text as a whole and, where the tokenizer says that it may be cut, of every two parts. */
static void check_text(const char *name, encoder *e, const tokenizer *t, const json_t *row) {
    static char text[4096];
    error err;
    const char *digits = json_string_value(json_array_get(row, 0));
    assert_true(strlen(digits) < 2 * sizeof text);
    size_t size = from_hexadecimal(digits, text);
    struct token_list list = encode(e, text, size);
    expect_ids(name, digits, &list, json_array_get(row, 1));
    for (size_t cut = tokenizer_last_cut(t, text, 0, size); cut > 0; cut = tokenizer_last_cut(t, text, 0, cut)) {
        assert_true(cut < size);
        list.count = 0;
        assert_int_equal(encoder_append(e, text, cut, &list, &err), 0);
        assert_int_equal(encoder_append(e, text + cut, size - cut, &list, &err), 0);
        expect_ids(name, digits, &list, json_array_get(row, 1));
        size_t only = tokenizer_last_cut(t, text, cut - 1, cut + 1); /* asked about this place alone */
        assert_int_equal(only, cut);
    }
    free(list.ids);
}

static void gives_the_librarys_ids(void **state) {
    (void)state;
    error err;
    json_t *all, *rows;
    const char *name;
    if (json_read(&all, DATA "ids.json", &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(json_object_size(all), 5);
    json_object_foreach(all, name, rows) {
        char path[256];
        snprintf(path, sizeof path, DATA "%s.json", name);
        tokenizer *t = open_tokenizer(path);
        encoder *e = open_encoder(t);
        assert_true(json_array_size(rows) > 100);
        for (size_t i = 0; i < json_array_size(rows); i++) check_text(name, e, t, json_array_get(rows, i));
        encoder_close(e);
        tokenizer_close(t);
    }
    json_decref(all);
}

/* GPT-2's two files are the same tokenizer as the one file. */
static void gpt2_files_give_the_same_ids(void **state) {
    (void)state;
    error err;
    json_t *all;
    assert_int_equal(json_read(&all, DATA "ids.json", &err), 0);
    const json_t *rows = json_object_get(all, "gpt2");
    const char *const specs[] = {DATA "encoder.json", DATA "vocab.bpe"};
    for (int i = 0; i < 2; i++) {
        tokenizer *t = open_tokenizer(specs[i]);
        encoder *e = open_encoder(t);
        for (size_t k = 0; k < json_array_size(rows); k++) check_text(specs[i], e, t, json_array_get(rows, k));
        encoder_close(e);
        tokenizer_close(t);
    }
    json_decref(all);
}

/* ---- texts of any bytes ------------------------------------------------------------------------------------------ */

static void expect_text(const tokenizer *t, const struct token_list *list, const char *want, size_t size) {
    size_t at = 0;
    for (size_t i = 0; i < list->count; i++) {
        size_t length;
        assert_in_range(list->ids[i], 0, tokenizer_vocab(t) - 1);
        const char *bytes = tokenizer_decode(t, list->ids[i], &length);
        assert_true(at + length <= size);
        assert_memory_equal(bytes, want + at, length);
        at += length;
    }
    assert_int_equal(at, size);
    assert_int_equal(tokenizer_text_bytes(t, list->ids, list->count), size);
}

/* Without normalization, and with a token for every byte, any bytes come back. */
static void any_bytes_come_back(void **state) {
    (void)state;
    tokenizer *t = open_tokenizer(DATA "gpt2.json");
    encoder *e = open_encoder(t);
    const char *const pieces[] = {"the ",
                                  "\xFF",
                                  "\x80",
                                  "\xC3",
                                  "\xC3\xA9",
                                  "\xED\xA0\x80",
                                  "\xF4\x90\x80\x80",
                                  " ",
                                  "\n",
                                  "'s",
                                  "\xE2\x80",
                                  "\xF0\x9F\x98\x80",
                                  "a",
                                  "1",
                                  "\xC0\xAF",
                                  "\xE3\x80\x80"};
    for (int n = 0; n < 3000; n++) {
        char text[256];
        size_t size = 0;
        for (uint32_t k = draw(30); k > 0; k--) size = (size_t)(stpcpy(text + size, pieces[draw(16)]) - text);
        if (draw(2)) text[draw(200) % (size + 1)] = (char)draw(256);
        struct token_list list = encode(e, text, size);
        expect_text(t, &list, text, size);
        for (size_t cut = size; (cut = tokenizer_last_cut(t, text, 0, cut)) > 0;) {
            error err;
            struct token_list parts = {0};
            assert_int_equal(encoder_append(e, text, cut, &parts, &err), 0);
            assert_int_equal(encoder_append(e, text + cut, size - cut, &parts, &err), 0);
            assert_int_equal(parts.count, list.count);
            assert_memory_equal(parts.ids, list.ids, list.count * sizeof *list.ids);
            free(parts.ids);
        }
        free(list.ids);
    }
    encoder_close(e);
    tokenizer_close(t);
}

/* A vocabulary like GPT-NeoX's has no tokens for bytes that UTF-8 never has: U+FFFD stands for them. Other bytes that
 * are no UTF-8 stay, and normalization does not reach across them. */
static void bytes_without_a_token(void **state) {
    (void)state;
    tokenizer *t = open_tokenizer(DATA "neox.json");
    encoder *e = open_encoder(t);
    const struct {
        const char *text, *want;
    } cases[] = {
        {"a\xFF"
         "b",
         "a\xEF\xBF\xBD"
         "b"},
        {"\xC0\xAF\xF5\xC1", "\xEF\xBF\xBD\xAF\xEF\xBF\xBD\xEF\xBF\xBD"},
        {"\x80 \xE2\x82 \xED\xA0\x80", "\x80 \xE2\x82 \xED\xA0\x80"},
        {"e\xCC\x81", "\xC3\xA9"},
        {"e\xE2\xCC\x81", "e\xE2\xCC\x81"},
        {"e\xFF\xCC\x81", "e\xEF\xBF\xBD\xCC\x81"},
        {"\xFF"
         "e\xCC\x81\xFF",
         "\xEF\xBF\xBD\xC3\xA9\xEF\xBF\xBD"},
        {"\xCC", "\xCC"},
        {"x\xCC\x81\xCC", "x\xCC\x81\xCC"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct token_list list = encode(e, cases[i].text, strlen(cases[i].text));
        expect_text(t, &list, cases[i].want, strlen(cases[i].want));
        free(list.ids);
    }
    encoder_close(e);
    tokenizer_close(t);
}

/* What an encoder has met before makes no difference, however much it was. */
static void memory_makes_no_difference(void **state) {
    (void)state;
    tokenizer *t = open_tokenizer(DATA "neox.json");
    encoder *used = open_encoder(t);
    for (int n = 0; n < 300000; n++) {
        char word[16];
        int size = snprintf(word, sizeof word, " w%u", draw(1u << 20));
        struct token_list list = encode(used, word, (size_t)size);
        if (n % 1000 == 0) {
            encoder *fresh = open_encoder(t);
            struct token_list again = encode(fresh, word, (size_t)size);
            assert_int_equal(again.count, list.count);
            assert_memory_equal(again.ids, list.ids, list.count * sizeof *list.ids);
            free(again.ids);
            encoder_close(fresh);
        }
        expect_text(t, &list, word, (size_t)size);
        free(list.ids);
    }
    encoder_close(used);
    tokenizer_close(t);
}

static void ends_of_documents(void **state) {
    (void)state;
    tokenizer *t = open_tokenizer(DATA "neox.json");
    encoder *e = open_encoder(t);
    size_t size;
    assert_int_equal(tokenizer_eod(t), 0);
    assert_memory_equal(tokenizer_eod_text(t, &size), "<|endoftext|>", 13);
    assert_int_equal(size, 13);
    struct token_list list = encode(e, "a<|endoftext|>b<|pad|>", 22);
    assert_int_equal(list.count, 4);
    assert_int_equal(list.ids[1], 0);
    assert_int_equal(list.ids[3], 1);
    expect_text(t, &list, "ab<|pad|>", 9); /* the end of a document stands for no text, other special tokens do */
    free(list.ids);
    encoder_close(e);
    tokenizer_close(t);
}

/* A text must not be cut where an added token could reach across. */
static void added_tokens_that_reach(void **state) {
    (void)state;
    static const struct {
        struct added_token token;
        bool can_be_cut;
    } cases[] = {
        {{.content = (char *)"<x>"}, true},
        {{.content = (char *)"<x>", .lstrip = true}, true},
        {{.content = (char *)"<x>", .single_word = true}, true},
        {{.content = (char *)"   "}, true},
        {{.content = (char *)"  x"}, true},
        {{.content = (char *)"\n\n"}, true},
        {{.content = (char *)"x\xE3\x80\x80y"}, true}, /* not a blank of ASCII */
        {{.content = (char *)"<x>", .rstrip = true}, false},
        {{.content = (char *)" x", .single_word = true}, false},
        {{.content = (char *)"\xE3\x80\x80x", .single_word = true}, false},
        {{.content = (char *)"x y"}, false},
        {{.content = (char *)"x\n"}, false},
        {{.content = (char *)"  \xC3\xA9\t"}, false},
    };
    error err;
    struct unicode *u;
    assert_int_equal(unicode_open(&u, &err), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct added_tokens set = {0};
        struct added_token token = cases[i].token;
        token.size = strlen(token.content);
        assert_int_equal(added_tokens_add(&set, &token, &err), 0);
        assert_true(added_tokens_seal(&set));
        if (added_tokens_can_be_cut(&set, u) != cases[i].can_be_cut) fail_msg("case %zu, '%s'", i, token.content);
        added_tokens_free(&set);
    }
    free(u);
}

/* ---- merging ----------------------------------------------------------------------------------------------------- */

enum { LETTERS = 3, MERGES = 60 };

/* The plainest way: look for the pair of the lowest rank again and again. */
static size_t merge_plainly(const struct bpe_merge *merges, size_t merge_count, int32_t *ids, size_t count) {
    for (;;) {
        size_t best = SIZE_MAX, rank = merge_count;
        for (size_t i = 0; i + 1 < count; i++) {
            uint64_t pair = (uint64_t)(uint32_t)ids[i] << 32 | (uint32_t)ids[i + 1];
            for (size_t m = 0; m < rank; m++) {
                if (merges[m].pair != pair) continue;
                best = i;
                rank = m;
            }
        }
        if (best == SIZE_MAX) return count;
        ids[best] = merges[rank].id;
        memmove(ids + best + 1, ids + best + 2, (count - best - 2) * sizeof *ids);
        count--;
    }
}

/* Random merges in a random order: a token may be merged before the merge that makes it comes up for another pair. */
static size_t random_merges(struct bpe *b, struct bpe_merge *merges) {
    error err;
    size_t count = 0;
    assert_int_equal(bpe_open(b, MERGES, &err), 0);
    for (int i = 0; i < 256; i++) b->byte_ids[i] = i % LETTERS;
    for (uint32_t i = 0; i < MERGES; i++) {
        uint32_t tokens = LETTERS + (i < 9 ? i : 9);
        merges[i] = (struct bpe_merge){(uint64_t)draw(tokens) << 32 | draw(tokens), 0, LETTERS + (int32_t)i};
    }
    for (uint32_t i = MERGES - 1; i > 0; i--) {
        uint32_t other = draw(i + 1);
        struct bpe_merge swapped = merges[i];
        merges[i] = merges[other];
        merges[other] = swapped;
    }
    for (uint32_t i = 0; i < MERGES; i++) {
        merges[count] = merges[i];
        merges[count].rank = (uint32_t)count;
        if (bpe_add(b, &merges[count])) count++;
    }
    return count;
}

static void merges_in_order_of_rank(void **state) {
    (void)state;
    error err;
    struct bpe_scratch scratch = {0};
    for (int round = 0; round < 40; round++) {
        struct bpe b;
        struct bpe_merge merges[MERGES];
        size_t merge_count = random_merges(&b, merges);
        assert_false(bpe_add(&b, &merges[0]));
        for (int n = 0; n < 30; n++) {
            size_t size = 1 + draw(n % 3 == 0 ? 400 : 66), count;
            char word[400];
            int32_t got[400], want[400];
            for (size_t i = 0; i < size; i++) {
                word[i] = (char)draw(draw(4) ? 2 : LETTERS);
                want[i] = b.byte_ids[(unsigned char)word[i]];
            }
            assert_int_equal(bpe_encode(&b, &scratch, word, size, got, &count, &err), 0);
            assert_int_equal(count, merge_plainly(merges, merge_count, want, size));
            assert_memory_equal(got, want, count * sizeof *got);
        }
        bpe_close(&b);
    }
    free(scratch.memory);
}

/* A word of a million letters takes n log n, not n squared: minutes otherwise. */
static void long_words(void **state) {
    (void)state;
    enum { SIZE = 1 << 20 };
    tokenizer *t = open_tokenizer(DATA "neox.json");
    encoder *e = open_encoder(t);
    const char *const pieces[] = {"a", "A\xCC\x81", "\xCC\x81", "\xCC\xA3\xCC\x81", " ", "\xE1\x84\x80", "ACGTTGCA"};
    char *text = malloc(SIZE + 16);
    assert_non_null(text);
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        size_t length = strlen(pieces[i]), size = 0;
        for (; size < SIZE; size += length) memcpy(text + size, pieces[i], length);
        struct token_list list = encode(e, text, size);
        if (length == 1) expect_text(t, &list, text, size);
        assert_true(list.count > 0);
        free(list.ids);
        assert_int_equal(tokenizer_last_cut(t, text, 0, size), 0);
    }
    free(text);
    encoder_close(e);
    tokenizer_close(t);
}

/* ---- normalization ----------------------------------------------------------------------------------------------- */

/* utf8proc normalizes whole strings, too: the runs that are handed to it give the same. */
static void runs_normalize_as_wholes(void **state) {
    (void)state;
    error err;
    struct unicode *u;
    struct unicode_scratch scratch = {0};
    bool interesting[256], replaced[256] = {false};
    static const int32_t odd[] = {0x300,  0x301,  0x323,  0x334,  0x345,  0x5B0,  0x64B,  0x93C,
                                  0x958,  0x9BE,  0x9C7,  0x1100, 0x1161, 0x11A8, 0xAC00, 0xAC01,
                                  0x212B, 0x2126, 0x304B, 0x3099, 0xFB2C, 0x1D15E};
    assert_int_equal(unicode_open(&u, &err), 0);
    assert_true(unicode_interesting(true, replaced, interesting));
    for (int n = 0; n < 20000; n++) {
        char text[256];
        size_t size = 0, got_size;
        for (uint32_t k = draw(20); k > 0; k--) {
            int32_t c = draw(2)   ? odd[draw(22)]
                        : draw(2) ? (int32_t)(1 + draw(0x2FF))
                                  : (int32_t)(0x300 + draw(0x2000));
            size += (size_t)utf8proc_encode_char(c, (utf8proc_uint8_t *)text + size);
        }
        text[size] = 0;
        char *want = (char *)utf8proc_NFC((const utf8proc_uint8_t *)text);
        const char *got;
        assert_int_equal(unicode_normalize(u, interesting, replaced, &scratch, text, size, &got, &got_size, &err), 0);
        assert_int_equal(got_size, strlen(want));
        assert_memory_equal(got, want, got_size);
        free(want);
    }
    unicode_scratch_free(&scratch);
    free(u);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gives_the_librarys_ids),     cmocka_unit_test(gpt2_files_give_the_same_ids),
        cmocka_unit_test(any_bytes_come_back),        cmocka_unit_test(bytes_without_a_token),
        cmocka_unit_test(memory_makes_no_difference), cmocka_unit_test(ends_of_documents),
        cmocka_unit_test(merges_in_order_of_rank),    cmocka_unit_test(long_words),
        cmocka_unit_test(runs_normalize_as_wholes),   cmocka_unit_test(added_tokens_that_reach),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
