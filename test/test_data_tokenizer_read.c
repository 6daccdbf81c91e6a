/* test_data_tokenizer_read.c: which files open as byte-level BPE: what is refused and in which words, other spellings
 * of the same tokenizer, GPT-2's two files, and files that are damaged anywhere. The ids are test_data_bpe.c's. */
#include "common/json.h"
#include "data/tokenizer.h"
#include "test/unit_directory.h"

#define DATA "test/tokenizer/"

static char *read_file(const char *path, size_t *size) {
    error err;
    char *text = NULL;
    assert_int_equal(file_read_all(path, 1 << 20, &text, size, &err), 0);
    return text;
}

static void write_file(const char *path, const char *text, size_t size) {
    error err;
    assert_int_equal(file_write_all(path, text, size, &err), 0);
}

/* ---- one change -------------------------------------------------------------------------------------------------- */

static json_t *at(json_t *root, const char *key) {
    json_t *value = json_object_get(root, key);
    assert_non_null(value);
    return value;
}

/* A value written as JSON with ' for ". */
static json_t *value_of(const char *text) {
    char copy[600];
    assert_true(strlen(text) < sizeof copy);
    strcpy(copy, text);
    for (char *c = copy; *c; c++) *c = *c == '\'' ? '"' : *c;
    json_error_t problem;
    json_t *value = json_loads(copy, JSON_DECODE_ANY, &problem);
    if (!value) fail_msg("%s: %s", text, problem.text);
    return value;
}

static const struct {
    const char *where, *key, *value; /* an object, or an array with an index for a key; value NULL: removed */
    const char *problem;             /* NULL: it opens */
} changes[] = {
    /* What does not change an id, or is another way of saying it. */
    {"", "version", NULL, NULL},
    {"", "post_processor", NULL, NULL},
    {"", "post_processor", "{'type':'ByteLevel','add_prefix_space':true,'trim_offsets':false}", NULL},
    {"", "post_processor", "{'type':'Sequence','processors':[{'type':'ByteLevel'}]}", NULL},
    {"", "post_processor", "{'type':'TemplateProcessing','single':[{'Sequence':{'id':'A','type_id':0}}]}", NULL},
    {"", "normalizer", "{'type':'Sequence','normalizers':[]}", NULL},
    {"", "normalizer", "{'type':'NFC'}", NULL},
    {"pre_tokenizer", "use_regex", NULL, NULL},
    {"", "pre_tokenizer", "{'type':'Sequence','pretokenizers':[{'type':'ByteLevel','add_prefix_space':false}]}", NULL},
    {"model", "dropout", "0.0", NULL},
    {"model", "unk_token", "'<|endoftext|>'", NULL},
    {"model", "continuing_subword_prefix", "''", NULL},
    {"model", "fuse_unk", "true", NULL},
    {"model", "merges", "[]", NULL},
    {"model", "merges", "['t h',['\xC4\xA0','th']]", NULL},
    {"", "added_tokens", NULL, NULL},
    {"", "added_tokens", "[]", NULL},
    /* The form of the file. */
    {"", "model", NULL, "%s is no tokenizer.json: it has no 'model'"},
    {"model", "type", "'Unigram'", "%s: the model 'Unigram' is not known; BPE is"},
    {"model", "type", "5", "%s: the model 'unknown' is not known; BPE is"},
    {"model", "type", "'a\\nb'", "%s: the model 'a?b' is not known; BPE is"},
    {"", "version", "'2.0'", "%s: 'version' must be \"1.0\""},
    {"", "extra", "1", "%s: the file has 'extra', which riverrun does not know"},
    {"", "truncation", "{'max_length':8}", "%s: 'truncation' must be null: riverrun encodes texts as long as they are"},
    {"", "padding", "{}", "%s: 'padding' must be null: riverrun encodes texts as long as they are"},
    /* What comes before and after the model. */
    {"", "normalizer", "{'type':'Lowercase'}", "%s: the normalizer 'Lowercase' is not known; NFC is, and none"},
    {"", "normalizer", "'NFC'", "%s: 'normalizer' is not an object"},
    {"", "normalizer", "{'type':'Sequence','normalizers':[{'type':'NFC'},{'type':'StripAccents'}]}",
     "%s: the normalizer 'StripAccents' is not known; NFC is, and none"},
    {"", "normalizer", "{'type':'NFC','form':1}", "%s: 'normalizer' has 'form', which riverrun does not know"},
    {"", "pre_tokenizer", "null", "%s: the pre-tokenizer 'unknown' is not known; ByteLevel is"},
    {"", "pre_tokenizer", "{'type':'Metaspace'}", "%s: the pre-tokenizer 'Metaspace' is not known; ByteLevel is"},
    {"pre_tokenizer", "add_prefix_space", "true",
     "%s: 'add_prefix_space' of the pre-tokenizer ByteLevel must be false: riverrun does nothing else"},
    {"pre_tokenizer", "add_prefix_space", NULL, "%s: 'add_prefix_space' is missing, it must be true or false"},
    {"pre_tokenizer", "use_regex", "1", "%s: 'use_regex' is an integer, it must be true or false"},
    {"pre_tokenizer", "prefix", "1", "%s: the pre-tokenizer ByteLevel has 'prefix', which riverrun does not know"},
    {"", "pre_tokenizer",
     "{'type':'Sequence','pretokenizers':[{'type':'ByteLevel','add_prefix_space':false},{'type':'ByteLevel',"
     "'add_prefix_space':false}]}",
     "%s: the pre-tokenizer 'ByteLevel' is not known where it stands; ByteLevel is"},
    {"", "pre_tokenizer", "{'type':'Split','pattern':{'Regex':'x'},'behavior':'Isolated','invert':false}",
     "%s: the pre-tokenizer 'Split' is not known where it stands; ByteLevel is"},
    {"", "pre_tokenizer", "{'type':'Sequence','pretokenizers':[]}",
     "%s: 'pre_tokenizer' must be or end with ByteLevel"},
    {"", "pre_tokenizer",
     "{'type':'Sequence','pretokenizers':[{'type':'Digits'},{'type':'ByteLevel','add_prefix_space':false}]}",
     "%s: the pre-tokenizer 'Digits' is not known; ByteLevel is"},
    {"", "pre_tokenizer",
     "{'type':'Sequence','pretokenizers':[{'type':'Split','pattern':{'String':'x'},'behavior':'Isolated','invert':"
     "false}"
     ",{'type':'ByteLevel','add_prefix_space':false,'use_regex':false}]}",
     "%s: the pattern of the pre-tokenizer Split is not known: 'no Regex'; GPT-2's is ''s|'t|'re|'ve|'m|'ll|'d| "
     "?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+'"},
    {"", "post_processor", "{'type':'BertProcessing'}",
     "%s: the post-processor 'BertProcessing' is not known; ByteLevel is, and none"},
    {"", "post_processor",
     "{'type':'TemplateProcessing','single':[{'SpecialToken':{'id':'<s>'}},{'Sequence':{'id':'A'}}]}",
     "%s: the post-processor TemplateProcessing adds tokens to every text, which riverrun does not; set "
     "'post_processor' "
     "to null"},
    {"", "decoder", "null", "%s: the decoder 'unknown' is not known; ByteLevel is"},
    {"", "decoder", "{'type':'WordPiece'}", "%s: the decoder 'WordPiece' is not known; ByteLevel is"},
    /* The model. */
    {"model", "dropout", "0.1", "%s: 'dropout' of the model must be null: riverrun's merges are not random"},
    {"model", "continuing_subword_prefix", "'##'",
     "%s: 'continuing_subword_prefix' of the model must be null: byte-level words carry no marks"},
    {"model", "end_of_word_suffix", "'</w>'",
     "%s: 'end_of_word_suffix' of the model must be null: byte-level words carry no marks"},
    {"model", "byte_fallback", "true", "%s: 'byte_fallback' of the model must be false: riverrun does nothing else"},
    {"model", "ignore_merges", "'no'", "%s: 'ignore_merges' is a string, it must be true or false"},
    {"model", "cache", "1", "%s: 'model' has 'cache', which riverrun does not know"},
    {"model", "vocab", "[]", "%s: 'vocab' of the model must be an object of tokens and ids"},
    {"model", "vocab", "{}", "%s: 'vocab' of the model must be an object of tokens and ids"},
    {"model/vocab", "a", "98", "%s: the tokens 'a' and 'b' have the same id 98"},
    {"model/vocab", "a", "641", "%s: the id of the token 'a' must be a number from 0 to 640"},
    {"model/vocab", "a", "-1", "%s: the id of the token 'a' must be a number from 0 to 640"},
    {"model/vocab", "a", "9223372036854775807", "%s: the id of the token 'a' must be a number from 0 to 640"},
    {"model/vocab", "a", "'97'", "%s: the id of the token 'a' must be a number from 0 to 640"},
    {"model", "merges", NULL, "%s: 'merges' of the model is not an array"},
    {"model", "merges", "['t h','t h']", "%s: merge 1, of 't' and 'h', is there twice"},
    {"model", "merges", "[['t','h'],'th th']",
     "%s: merge 1, of 'th' and 'th', needs the token 'thth', which the vocabulary does not have"},
    {"model", "merges", "['qqq h']",
     "%s: merge 0, of 'qqq' and 'h', needs the token 'qqq', which the vocabulary does not have"},
    {"model", "merges", "['th']", "%s: merge 0 is not a pair of tokens, written \"a b\" or [\"a\", \"b\"]"},
    {"model", "merges", "['t h e']", "%s: merge 0 is not a pair of tokens, written \"a b\" or [\"a\", \"b\"]"},
    {"model", "merges", "[' h']", "%s: merge 0 is not a pair of tokens, written \"a b\" or [\"a\", \"b\"]"},
    {"model", "merges", "[['t','h','e']]", "%s: merge 0 is not a pair of tokens, written \"a b\" or [\"a\", \"b\"]"},
    {"model", "merges", "[['t',5]]", "%s: merge 0 is not a pair of tokens, written \"a b\" or [\"a\", \"b\"]"},
    {"model", "merges", "[7]", "%s: merge 0 is not a pair of tokens, written \"a b\" or [\"a\", \"b\"]"},
    /* Added tokens. */
    {"", "added_tokens", "{}", "%s: 'added_tokens' is not an array"},
    {"", "added_tokens", "['x']", "%s: an added token is not an object"},
    {"added_tokens/0", "content", "''", "%s: an added token is empty"},
    {"added_tokens/0", "content", NULL, "%s: 'content' is missing, it must be a string"},
    {"added_tokens/0", "special", NULL, "%s: 'special' is missing, it must be true or false"},
    {"added_tokens/0", "bold", "1", "%s: an added token has 'bold', which riverrun does not know"},
    {"added_tokens/0", "id", "5", "%s: the added token '<|endoftext|>' has the id 5, it must be 640: the vocabulary's"},
    {"added_tokens/0", "content", "'<new>'",
     "%s: the added token '<new>' has the id 640, it must be 641: ids go on behind the vocabulary without a gap"},
};

/* The object at "a/b/0". */
static json_t *walk(json_t *root, const char *where) {
    char copy[64], *rest = copy, *name;
    strcpy(copy, where);
    while (*where && (name = strsep(&rest, "/"))) {
        root = json_is_array(root) ? json_array_get(root, (size_t)atoi(name)) : at(root, name);
        assert_non_null(root);
    }
    return root;
}

static void says_what_it_does_not_know(void **state) {
    (void)state;
    size_t size;
    char *text = read_file(DATA "gpt2.json", &size);
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        error err;
        json_t *root, *place;
        tokenizer *t;
        char want[1200];
        assert_int_equal(json_read_text(&root, text, size, "gpt2.json", &err), 0);
        place = walk(root, changes[i].where);
        if (changes[i].value) {
            json_object_set_new(place, changes[i].key, value_of(changes[i].value));
        } else {
            json_object_del(place, changes[i].key);
        }
        char *changed = json_dumps(root, JSON_COMPACT);
        int result = tokenizer_open_json(&t, changed, strlen(changed), "T", &err);
        if (result == 0 && !changes[i].problem) assert_string_equal(tokenizer_name(t), "bpe-641");
        if (result == 0 && changes[i].problem) fail_msg("%s %s: opened", changes[i].where, changes[i].key);
        if (result != 0 && !changes[i].problem) fail_msg("%s %s: %s", changes[i].where, changes[i].key, err.text);
        if (changes[i].problem) {
            snprintf(want, sizeof want, changes[i].problem, "T");
            unit_expect(result, &err, ERROR_INPUT, want);
            assert_null(t);
        }
        tokenizer_close(t);
        free(changed);
        json_decref(root);
    }
    free(text);
}

static void expect_problem(const char *text, const char *problem) {
    error err;
    tokenizer *t;
    unit_expect(tokenizer_open_json(&t, text, strlen(text), "T", &err), &err, ERROR_INPUT, problem);
}

/* Replace the first `from` in the file's text. */
static char *replaced(const char *path, const char *from, const char *to) {
    size_t size;
    char *text = read_file(path, &size), *place = strstr(text, from), *out;
    assert_non_null(place);
    assert_true(asprintf(&out, "%.*s%s%s", (int)(place - text), text, to, place + strlen(from)) > 0);
    free(text);
    return out;
}

static void refuses_what_no_parsed_value_shows(void **state) {
    (void)state;
    error err;
    tokenizer *t;
    const struct {
        const char *from, *to, *problem;
    } cases[] = {
        {"\"!\":33", "\"!\":33,\"!\":33", "duplicate object key"},
        {"\"!\":33", "\"!\":99999999999999999999", "too big integer"},
        {"\"!\":33", "\"\\u0000\":0", "NUL byte"},
        {"\"!\":33", "\"\xFF\":0", "unable to decode byte 0xff"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *text = replaced(DATA "gpt2.json", cases[i].from, cases[i].to);
        assert_int_equal(tokenizer_open_json(&t, text, strlen(text), "T", &err), -1);
        assert_int_equal(err.kind, ERROR_INPUT);
        if (!strstr(err.text, cases[i].problem)) fail_msg("%s", err.text);
        free(text);
    }
    expect_problem("[1, 2]", "T: the file is not an object");
    expect_problem("{}", "T is no tokenizer.json: it has no 'model'");
    char *text = replaced(DATA "neox.json", "\"\xC4\x80\":", "\"(\xC4\x80)\":");
    expect_problem(text, "T: the vocabulary has no token '\xC4\x80' for the byte 0, so texts would be lost");
    free(text);
    text = replaced(DATA "neox.json", "\"content\":\"       \"", "\"content\":\"        \"");
    expect_problem(text, "T: the added token '        ' is there twice");
    free(text);
    text = replaced(DATA "flags.json", "\"content\":\"[B]\"", "\"content\":\"caf\xC3\xA9\"");
    expect_problem(text, "T: two added tokens become the same by normalization");
    free(text);
}

/* ---- damage ------------------------------------------------------------------------------------------------------ */

/* Whatever it holds, a file opens or is refused with a sentence; what opens has ids in its vocabulary. */
static void try_text(const char *text, size_t size) {
    error err = {0};
    tokenizer *t;
    if (tokenizer_open_json(&t, text, size, "T", &err) != 0) {
        assert_null(t);
        assert_int_equal(err.kind, ERROR_INPUT);
        assert_true(err.text[0] != 0);
        return;
    }
    encoder *e;
    struct token_list list = {0};
    assert_int_equal(encoder_open(&e, t, &err), 0);
    assert_int_equal(encoder_append(e, "the river's  [R] current e\xCC\x81\xFF", 26, &list, &err), 0);
    for (size_t i = 0; i < list.count; i++) assert_in_range(list.ids[i], 0, tokenizer_vocab(t) - 1);
    free(list.ids);
    encoder_close(e);
    tokenizer_close(t);
}

static void damage_anywhere(void **state) {
    (void)state;
    size_t size;
    char *text = read_file(DATA "flags.json", &size);
    char *copy = malloc(size);
    assert_non_null(copy);
    for (size_t cut = 0; cut < size; cut += 97) try_text(text, cut);
    uint32_t seed = 1;
    for (size_t i = 0; i < size; i += 31) {
        memcpy(copy, text, size);
        seed = seed * 1664525u + 1013904223u;
        copy[i] = (char)(copy[i] ^ (1 << (seed >> 29)));
        try_text(copy, size);
    }
    free(copy);
    free(text);
}

/* ---- files ------------------------------------------------------------------------------------------------------- */

/* GPT-2's files under both pairs of names, by either file or by the directory, are one tokenizer with one identity. */
static void gpt2_files(void **state) {
    (void)state;
    static const char *const names[] = {"encoder.json", "vocab.bpe", "my-vocab.json", "my-merges.txt", "."};
    size_t size;
    char *vocab = read_file(DATA "encoder.json", &size);
    write_file(unit_path(directory, "encoder.json"), vocab, size);
    write_file(unit_path(directory, "my-vocab.json"), vocab, size);
    free(vocab);
    char *merges = read_file(DATA "vocab.bpe", &size);
    write_file(unit_path(directory, "vocab.bpe"), merges, size);
    char *crlf = malloc(2 * size), *end = crlf; /* without the version line, and as Windows writes lines */
    assert_non_null(crlf);
    for (size_t i = strcspn(merges, "\n") + 1; i < size; i++) {
        if (merges[i] == '\n') *end++ = '\r';
        *end++ = merges[i];
    }
    write_file(unit_path(directory, "my-merges.txt"), crlf, (size_t)(end - crlf) - 2);
    free(crlf);
    free(merges);
    uint64_t identity = 0;
    for (size_t i = 0; i < 5; i++) {
        error err;
        tokenizer *t;
        if (tokenizer_open(&t, unit_path(directory, names[i]), &err) != 0) fail_msg("%s: %s", names[i], err.text);
        assert_int_equal(tokenizer_vocab(t), 641);
        assert_int_equal(tokenizer_eod(t), 640);
        if (i > 0) assert_int_equal(tokenizer_identity(t), identity);
        identity = tokenizer_identity(t);
        tokenizer_close(t);
    }
}

/* tokenizer.json is kept to the byte, and its ids are those of its own reading. */
static void keeps_the_file(void **state) {
    (void)state;
    error err;
    tokenizer *t, *again;
    size_t size, kept;
    char *text = read_file(DATA "flags.json", &size);
    assert_int_equal(tokenizer_open(&t, DATA "flags.json", &err), 0);
    const char *json = tokenizer_json(t, &kept);
    assert_int_equal(kept, size);
    assert_memory_equal(json, text, size);
    write_file(unit_path(directory, "tokenizer.json"), json, kept);
    assert_int_equal(tokenizer_open(&again, directory, &err), 0);
    assert_int_equal(tokenizer_identity(again), tokenizer_identity(t));
    const char *settings = tokenizer_config_json(t, &kept);
    assert_int_equal(kept, strlen(settings));
    assert_non_null(strstr(settings, "\"eos_token\": \"<|endoftext|>\""));
    tokenizer_close(again);
    tokenizer_close(t);
    free(text);
}

static void gpt2_files_that_are_wrong(void **state) {
    (void)state;
    error err;
    tokenizer *t;
    char want[9000];
    const char *vocab = unit_path(directory, "encoder.json"), *merges = unit_path(directory, "vocab.bpe");
    write_file(vocab, "{\"a\": 0}", 8);
    snprintf(want, sizeof want, "there is no %s, which belongs to %s: GPT-2's tokenizer has two files", merges, vocab);
    unit_expect(tokenizer_open(&t, vocab, &err), &err, ERROR_INPUT, want);
    static const char *const lines[] = {"ab\n", "a  b\n", " b\n", "a \n", "a b c\n", "\na b\n"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        write_file(merges, lines[i], strlen(lines[i]));
        snprintf(want, sizeof want, "%s:1: is not a pair of tokens with a space between them", merges);
        unit_expect(tokenizer_open(&t, vocab, &err), &err, ERROR_INPUT, want);
    }
    write_file(merges, "#version: 0.2\n\xC4 b\n", 18);
    snprintf(want, sizeof want, "%s:2: is not UTF-8", merges);
    unit_expect(tokenizer_open(&t, merges, &err), &err, ERROR_INPUT, want);
    write_file(vocab, "[]", 2);
    snprintf(want, sizeof want, "%s is not an object of tokens and ids", vocab);
    unit_expect(tokenizer_open(&t, vocab, &err), &err, ERROR_INPUT, want);
    write_file(vocab, "{\"a\": \"x\"}", 10);
    write_file(merges, "", 0);
    snprintf(want, sizeof want, "%s: the id of the token 'a' must be a number from 0 to 0", vocab);
    unit_expect(tokenizer_open(&t, vocab, &err), &err, ERROR_INPUT, want);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(says_what_it_does_not_know),
        TEST(refuses_what_no_parsed_value_shows),
        TEST(damage_anywhere),
        TEST(gpt2_files),
        TEST(keeps_the_file),
        TEST(gpt2_files_that_are_wrong),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
