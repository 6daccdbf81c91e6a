/* test_data_tokenizer.c: the byte tokenizer: ids, its tokenizer.json to the byte, and which files are recognised as it.
 * Byte-level BPE is test_data_bpe.c's and test_data_tokenizer_read.c's; that Hugging Face's library reads all of it the
 * same way is test_tokenizer.sh's. */
#include "common/json.h"
#include "data/tokenizer.h"
#include "test/unit_directory.h"

#include <sys/stat.h>
#include <xxhash.h>

static tokenizer *open_bytes(void) {
    error err;
    tokenizer *t;
    assert_int_equal(tokenizer_open(&t, TOKENIZER_BYTES, &err), 0);
    return t;
}

static void ids_are_bytes(void **state) {
    (void)state;
    error err;
    tokenizer *t = open_bytes();
    encoder *e;
    struct token_list list = {0};
    char text[256];
    for (int b = 0; b < 256; b++) text[b] = (char)b;
    assert_int_equal(encoder_open(&e, t, &err), 0);
    assert_int_equal(encoder_append(e, text, 256, &list, &err), 0);
    assert_int_equal(list.count, 256);
    for (int b = 0; b < 256; b++) {
        size_t size;
        assert_int_equal(list.ids[b], b);
        const char *bytes = tokenizer_decode(t, b, &size);
        assert_int_equal(size, 1);
        assert_int_equal((unsigned char)*bytes, b);
    }
    assert_int_equal(encoder_append(e, text, 0, &list, &err), 0);
    assert_int_equal(list.count, 256);
    /* Text is never taken for a control token, and it is appended. */
    const char *marker = "<|endoftext|>";
    assert_int_equal(encoder_append(e, marker, 13, &list, &err), 0);
    assert_int_equal(list.count, 269);
    for (int i = 0; i < 13; i++) assert_int_equal(list.ids[256 + i], marker[i]);
    const int32_t silent[] = {256, 257, -1, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < 5; i++) {
        size_t size = 9;
        assert_non_null(tokenizer_decode(t, silent[i], &size));
        assert_int_equal(size, 0);
    }
    assert_int_equal(tokenizer_text_bytes(t, list.ids, list.count), 269);
    assert_int_equal(tokenizer_text_bytes(t, silent, 5), 0);
    assert_int_equal(tokenizer_last_cut(t, text, 3, 256), 256); /* anywhere */
    free(list.ids);
    encoder_close(e);
    tokenizer_close(t);
}

static void facts(void **state) {
    (void)state;
    size_t size;
    tokenizer *t = open_bytes();
    assert_string_equal(tokenizer_name(t), "bytes");
    assert_int_equal(tokenizer_vocab(t), 257);
    assert_int_equal(tokenizer_eod(t), 256);
    const char *json = tokenizer_json(t, &size);
    assert_int_equal(size, 5024);
    assert_int_equal(tokenizer_identity(t), XXH64(json, size, 0));
    /* Shards and checkpoints carry this number: if it changes, no older file is recognised any more. */
    assert_int_equal(tokenizer_identity(t), 0x18F8E12BF5B65336);
    tokenizer_close(t);
    tokenizer_close(NULL);
}

static void config_names_the_tokens(void **state) {
    (void)state;
    error err;
    size_t size;
    json_t *root;
    tokenizer *t = open_bytes();
    const char *text = tokenizer_config_json(t, &size);
    assert_int_equal(size, strlen(text));
    /* jansson refuses integers above 2^63, and transformers' number for "no limit" is one. */
    char *copy = strdup(text), *digits = strstr(copy, "1000000000000000019884624838656");
    assert_non_null(digits);
    memset(digits + 1, ' ', 30);
    assert_int_equal(json_read_text(&root, copy, size, "tokenizer_config.json", &err), 0);
    free(copy);
    const char *names[] = {"eos_token", "bos_token", "unk_token", "pad_token"};
    for (int i = 0; i < 4; i++) {
        const char *value;
        assert_int_equal(json_get_string(root, names[i], "tokenizer_config.json", &value, &err), 0);
        assert_string_equal(value, "<|endoftext|>");
    }
    assert_string_equal(json_string_value(json_object_get(root, "tokenizer_class")), "PreTrainedTokenizerFast");
    assert_true(json_is_false(json_object_get(root, "clean_up_tokenization_spaces")));
    json_decref(root);
    tokenizer_close(t);
}

/* ---- opening files ----------------------------------------------------------------------------------------------- */

static const char *write_file(const char *text, size_t size) {
    static char path[4096];
    error err;
    assert_int_equal(file_join(path, sizeof path, directory, "tokenizer.json", &err), 0);
    assert_int_equal(file_write_all(path, text, size, &err), 0);
    return path;
}

static void opens_its_own_file(void **state) {
    (void)state;
    error err;
    size_t size, again_size;
    tokenizer *t = open_bytes(), *again;
    const char *json = tokenizer_json(t, &size);
    const char *specs[] = {write_file(json, size), directory};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tokenizer_open(&again, specs[i], &err), 0);
        assert_string_equal(tokenizer_name(again), "bytes");
        assert_int_equal(tokenizer_identity(again), tokenizer_identity(t));
        assert_memory_equal(tokenizer_json(again, &again_size), json, size);
        tokenizer_close(again);
    }
    tokenizer_close(t);
}

/* Change one thing in the parsed tokenizer.json, write it in another spelling, and see whether it is recognised: what
 * is not opens as another tokenizer or is refused. */
typedef void change(json_t *root);

static json_t *member(json_t *root, const char *a, const char *b) {
    json_t *value = json_object_get(json_object_get(root, a), b);
    assert_non_null(value);
    return value;
}

#define CHANGE(name, action)         \
    static void name(json_t *root) { \
        action;                      \
    }
CHANGE(nothing, (void)root)
CHANGE(eod_only_added, json_object_del(member(root, "model", "vocab"), "<|endoftext|>"))
CHANGE(no_post_processor, json_object_del(root, "post_processor"))
CHANGE(offsets_trimmed, json_object_set_new(json_object_get(root, "pre_tokenizer"), "trim_offsets", json_true()))
CHANGE(another_model, json_object_set_new(json_object_get(root, "model"), "type", json_string("WordLevel")))
CHANGE(a_merge, json_array_append_new(member(root, "model", "merges"), json_string("a b")))
CHANGE(two_ids_swapped, json_t *v = member(root, "model", "vocab"); json_object_set_new(v, "a", json_integer(98));
       json_object_set_new(v, "b", json_integer(97)))
CHANGE(an_id_too_many, json_object_set_new(member(root, "model", "vocab"), "ab", json_integer(257)))
CHANGE(a_byte_missing, json_object_del(member(root, "model", "vocab"), "a"))
CHANGE(another_eod, json_object_set_new(member(root, "model", "vocab"), "<|endoftext|>", json_integer(257)))
CHANGE(prefix_space, json_object_set_new(json_object_get(root, "pre_tokenizer"), "add_prefix_space", json_true()))
CHANGE(with_regex, json_object_set_new(json_object_get(root, "pre_tokenizer"), "use_regex", json_true()))
CHANGE(no_pre_tokenizer, json_object_set_new(root, "pre_tokenizer", json_null()))
CHANGE(a_normalizer, json_object_set_new(root, "normalizer", json_pack("{s:s}", "type", "NFC")))
CHANGE(a_post_processor, json_object_set_new(root, "post_processor", json_pack("{s:s}", "type", "TemplateProcessing")))
CHANGE(no_decoder, json_object_set_new(root, "decoder", json_null()))
CHANGE(a_suffix, json_object_set_new(json_object_get(root, "model"), "end_of_word_suffix", json_string("</w>")))
CHANGE(another_added_token, json_array_append_new(json_object_get(root, "added_tokens"),
                                                  json_pack("{s:i, s:s}", "id", 257, "content", "<pad>")))
CHANGE(no_added_token, json_array_clear(json_object_get(root, "added_tokens")))
CHANGE(added_id, json_object_set_new(json_array_get(json_object_get(root, "added_tokens"), 0), "id", json_integer(300)))
CHANGE(no_model, json_object_del(root, "model"))

static const struct {
    const char *name;
    change *change;
    bool recognised;
} changes[] = {
#define ROW(name, recognised) \
    { #name, name, recognised }
    ROW(nothing, true),
    ROW(eod_only_added, true),
    ROW(no_post_processor, true),
    ROW(offsets_trimmed, true),
    ROW(another_model, false),
    ROW(a_merge, false),
    ROW(two_ids_swapped, false),
    ROW(an_id_too_many, false),
    ROW(a_byte_missing, false),
    ROW(another_eod, false),
    ROW(prefix_space, false),
    ROW(with_regex, false),
    ROW(no_pre_tokenizer, false),
    ROW(a_normalizer, false),
    ROW(a_post_processor, false),
    ROW(no_decoder, false),
    ROW(a_suffix, false),
    ROW(no_added_token, false),
    ROW(another_added_token, false),
    ROW(added_id, false),
    ROW(no_model, false),
};

static void recognises_by_content(void **state) {
    (void)state;
    size_t size;
    tokenizer *t = open_bytes(), *again;
    const char *json = tokenizer_json(t, &size);
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        error err;
        json_t *root;
        assert_int_equal(json_read_text(&root, json, size, "tokenizer.json", &err), 0);
        changes[i].change(root);
        char *text = json_dumps(root, JSON_COMPACT | JSON_SORT_KEYS | JSON_ENSURE_ASCII);
        assert_non_null(text);
        const char *path = write_file(text, strlen(text));
        bool opened = tokenizer_open(&again, path, &err) == 0;
        bool recognised = opened && strcmp(tokenizer_name(again), TOKENIZER_BYTES) == 0;
        if (recognised != changes[i].recognised) {
            fail_msg("%s: %s", changes[i].name, recognised ? "recognised" : err.text);
        }
        if (recognised) {
            assert_int_equal(tokenizer_identity(again), tokenizer_identity(t)); /* of its own spelling */
        } else if (!opened) {
            assert_null(again);
            assert_int_equal(err.kind, ERROR_INPUT);
            assert_memory_equal(err.text, path, strlen(path));
        }
        tokenizer_close(again);
        free(text);
        json_decref(root);
    }
    tokenizer_close(t);
}

static void refuses(void **state) {
    (void)state;
    error err;
    tokenizer *t;
    unit_expect(tokenizer_open(&t, "byte", &err), &err, ERROR_INPUT,
                "there is no tokenizer 'byte': give 'bytes', a tokenizer.json or a directory that holds one");
    assert_int_equal(tokenizer_open(&t, directory, &err), -1); /* a directory without tokenizer.json */
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_int_equal(tokenizer_open(&t, write_file("{\"model\": ", 10), &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_non_null(strstr(err.text, "is not valid JSON"));
    assert_null(t);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_are_bytes), cmocka_unit_test(facts),     cmocka_unit_test(config_names_the_tokens),
        TEST(opens_its_own_file),        TEST(recognises_by_content), TEST(refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
