/* tokenizer.c: the byte tokenizer, its tokenizer.json, and recognising that file again.
 *
 * In tokenizer.json the byte tokenizer is a byte-level BPE model without merges: the ByteLevel pre-tokenizer turns each
 * byte into one printable character (the table that GPT-2 introduced), the vocabulary gives that character the byte's
 * value as its id, and nothing is ever merged. `<|endoftext|>` is a special token with id 256. The text is laid out as
 * the Hugging Face library lays it out, so that loading and saving there gives back the same bytes and hence the same
 * identity.
 *
 * One difference is wanted: where a text holds the characters `<|endoftext|>`, Hugging Face's encoder makes them id
 * 256; riverrun encodes text, so they are 13 bytes like any others, and only a document's end is id 256.
 *
 * Owns the texts it makes. Called by tokenize, checkpoints, evaluation and generation.
 */
#include "data/tokenizer.h"

#include "common/file.h"
#include "common/json.h"
#include "common/limits.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define EOD_TEXT "<|endoftext|>"

enum { JSON_CAPACITY = 8192 }; /* the byte tokenizer's tokenizer.json has about 5,000 bytes */

struct tokenizer {
    char json[JSON_CAPACITY];
    size_t json_size;
    uint64_t identity;
    char bytes[256]; /* bytes[b] is the byte b: what tokenizer_decode points into */
};

/* ---- tokenizer.json ---------------------------------------------------------------------------------------------- */

/* The code point that stands for a byte: itself where it is printable and no space, else the next one from 256 on. */
static void byte_characters(unsigned characters[256]) {
    unsigned next = 256;
    for (unsigned b = 0; b < 256; b++) {
        bool shown = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        characters[b] = shown ? b : next++;
    }
}

/* UTF-8 of a code point below 0x800; returns its length. */
static size_t put_utf8(char *out, unsigned c) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

static const char json_head[] = "{\n"
                                "  \"version\": \"1.0\",\n"
                                "  \"truncation\": null,\n"
                                "  \"padding\": null,\n"
                                "  \"added_tokens\": [\n"
                                "    {\n"
                                "      \"id\": 256,\n"
                                "      \"content\": \"" EOD_TEXT "\",\n"
                                "      \"single_word\": false,\n"
                                "      \"lstrip\": false,\n"
                                "      \"rstrip\": false,\n"
                                "      \"normalized\": false,\n"
                                "      \"special\": true\n"
                                "    }\n"
                                "  ],\n"
                                "  \"normalizer\": null,\n"
                                "  \"pre_tokenizer\": {\n"
                                "    \"type\": \"ByteLevel\",\n"
                                "    \"add_prefix_space\": false,\n"
                                "    \"trim_offsets\": false,\n"
                                "    \"use_regex\": false\n"
                                "  },\n"
                                "  \"post_processor\": null,\n"
                                "  \"decoder\": {\n"
                                "    \"type\": \"ByteLevel\",\n"
                                "    \"add_prefix_space\": true,\n"
                                "    \"trim_offsets\": true,\n"
                                "    \"use_regex\": true\n"
                                "  },\n"
                                "  \"model\": {\n"
                                "    \"type\": \"BPE\",\n"
                                "    \"dropout\": null,\n"
                                "    \"unk_token\": null,\n"
                                "    \"continuing_subword_prefix\": null,\n"
                                "    \"end_of_word_suffix\": null,\n"
                                "    \"fuse_unk\": false,\n"
                                "    \"byte_fallback\": false,\n"
                                "    \"ignore_merges\": false,\n"
                                "    \"vocab\": {\n";

static const char json_tail[] = "      \"" EOD_TEXT "\": 256\n"
                                "    },\n"
                                "    \"merges\": []\n"
                                "  }\n"
                                "}";

static void make_json(tokenizer *t) {
    unsigned characters[256];
    byte_characters(characters);
    char *out = stpcpy(t->json, json_head);
    for (unsigned b = 0; b < 256; b++) {
        char text[8] = {0};
        size_t length = 0;
        if (b == '"' || b == '\\') text[length++] = '\\';
        put_utf8(text + length, characters[b]);
        out += sprintf(out, "      \"%s\": %u,\n", text, b);
    }
    out = stpcpy(out, json_tail);
    t->json_size = (size_t)(out - t->json);
    ASSERT(t->json_size < JSON_CAPACITY);
    t->identity = XXH64(t->json, t->json_size, 0);
}

/* What tells transformers which class opens tokenizer.json and which special tokens there are. The length stands for
 * "no limit": it is the number that transformers itself writes then. */
static const char config_json[] = "{\n"
                                  "  \"bos_token\": \"" EOD_TEXT "\",\n"
                                  "  \"clean_up_tokenization_spaces\": false,\n"
                                  "  \"eos_token\": \"" EOD_TEXT "\",\n"
                                  "  \"model_max_length\": 1000000000000000019884624838656,\n"
                                  "  \"pad_token\": \"" EOD_TEXT "\",\n"
                                  "  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
                                  "  \"unk_token\": \"" EOD_TEXT "\"\n"
                                  "}\n";

/* ---- recognising ------------------------------------------------------------------------------------------------- */

static bool has_string(const json_t *object, const char *key, const char *value) {
    const char *text = json_string_value(json_object_get(object, key));
    return text && strcmp(text, value) == 0;
}

/* Absent counts as null, as it does for the Hugging Face library. */
static bool has_null(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return !value || json_is_null(value);
}

static bool is_byte_vocabulary(const json_t *vocab) {
    unsigned characters[256];
    byte_characters(characters);
    for (unsigned b = 0; b < 256; b++) {
        char text[4] = {0};
        put_utf8(text, characters[b]);
        const json_t *id = json_object_get(vocab, text);
        if (!json_is_integer(id) || json_integer_value(id) != b) return false;
    }
    /* The end-of-document token may also be listed only among the added ones. */
    const json_t *eod = json_object_get(vocab, EOD_TEXT);
    if (!eod) return json_object_size(vocab) == 256;
    return json_object_size(vocab) == 257 && json_is_integer(eod) && json_integer_value(eod) == BYTES_EOD;
}

/* Does this tokenizer.json, whatever its spelling, encode every text as riverrun's byte tokenizer does? */
static bool is_bytes(const json_t *root) {
    const json_t *model = json_object_get(root, "model"), *before = json_object_get(root, "pre_tokenizer");
    const json_t *added = json_object_get(root, "added_tokens"), *eod = json_array_get(added, 0);
    return has_string(model, "type", "BPE") && json_is_array(json_object_get(model, "merges")) &&
           json_array_size(json_object_get(model, "merges")) == 0 &&
           is_byte_vocabulary(json_object_get(model, "vocab")) && has_null(model, "continuing_subword_prefix") &&
           has_null(model, "end_of_word_suffix") && has_null(root, "normalizer") && has_null(root, "post_processor") &&
           has_string(before, "type", "ByteLevel") && json_is_false(json_object_get(before, "add_prefix_space")) &&
           json_is_false(json_object_get(before, "use_regex")) &&
           has_string(json_object_get(root, "decoder"), "type", "ByteLevel") && json_array_size(added) == 1 &&
           has_string(eod, "content", EOD_TEXT) && json_integer_value(json_object_get(eod, "id")) == BYTES_EOD;
}

static int check_kind(const tokenizer *t, const char *path, error *err) {
    char *text;
    size_t size;
    TRY(file_read_all(path, LIMIT_JSON_BYTES, &text, &size, err));
    bool same = size == t->json_size && memcmp(text, t->json, size) == 0;
    json_t *root = NULL;
    int failed = same ? 0 : json_read_text(&root, text, size, path, err);
    free(text);
    if (failed) return -1;
    if (!same && !is_bytes(root)) {
        const json_t *model = json_object_get(root, "model");
        const char *type = json_string_value(json_object_get(model, "type"));
        for (const char *c = type; c && *c; c++) {
            if ((unsigned char)*c < ' ' || *c == 127) type = NULL; /* would make a mess of the message */
            if (!type) break;
        }
        failed =
            error_input(err,
                        "%s is a tokenizer of kind '%.40s' with %zu entries, which this version of riverrun does not "
                        "read; '%s' is the one it knows",
                        path, type ? type : "unknown", json_object_size(json_object_get(model, "vocab")),
                        TOKENIZER_BYTES);
    }
    json_decref(root);
    return failed;
}

int tokenizer_open(tokenizer **out, const char *spec, error *err) {
    *out = NULL;
    tokenizer *t = calloc(1, sizeof *t);
    if (!t) return error_system(err, "no memory for the tokenizer %s", spec);
    make_json(t);
    for (int b = 0; b < 256; b++) t->bytes[b] = (char)b;
    char path[LIMIT_PATH];
    int failed = 0;
    if (strcmp(spec, TOKENIZER_BYTES) != 0) {
        if (file_is_directory(spec)) {
            failed = file_join(path, sizeof path, spec, "tokenizer.json", err);
            spec = path;
        } else if (!file_exists(spec)) {
            failed =
                error_input(err,
                            "there is no tokenizer '%s': give '%s', a tokenizer.json or a directory that holds one",
                            spec, TOKENIZER_BYTES);
        }
        if (!failed) failed = check_kind(t, spec, err);
    }
    if (failed) {
        tokenizer_close(t);
        return -1;
    }
    *out = t;
    return 0;
}

void tokenizer_close(tokenizer *t) {
    free(t);
}

/* ---- use --------------------------------------------------------------------------------------------------------- */

const char *tokenizer_name(const tokenizer *t) {
    (void)t;
    return TOKENIZER_BYTES;
}

uint64_t tokenizer_identity(const tokenizer *t) {
    return t->identity;
}

int64_t tokenizer_vocab(const tokenizer *t) {
    (void)t;
    return BYTES_VOCAB;
}

int32_t tokenizer_eod(const tokenizer *t) {
    (void)t;
    return BYTES_EOD;
}

const char *tokenizer_json(const tokenizer *t, size_t *size) {
    *size = t->json_size;
    return t->json;
}

const char *tokenizer_config_json(const tokenizer *t, size_t *size) {
    (void)t;
    *size = sizeof config_json - 1;
    return config_json;
}

size_t tokenizer_encode(const tokenizer *t, const char *text, size_t size, int32_t *ids, size_t max) {
    (void)t;
    ASSERT(size <= max);
    for (size_t i = 0; i < size; i++) ids[i] = (unsigned char)text[i];
    return size;
}

const char *tokenizer_decode(const tokenizer *t, int32_t id, size_t *size) {
    *size = id >= 0 && id < 256;
    return *size ? t->bytes + id : "";
}
