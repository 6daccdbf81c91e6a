/* tokenizer.c: opening a tokenizer by name or path, and what all of them have in common, as tokenizer.h describes.
 *
 * A tokenizer is its tokenizer.json, from which everything else follows; GPT-2's files are turned into one first.
 * Called by tokenize, checkpoints, evaluation and generation.
 */
#include "data/tokenizer_parts.h"

#include "common/file.h"
#include "common/limits.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

bool tokenizer_has_null(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return !value || json_is_null(value);
}

bool tokenizer_has_string(const json_t *object, const char *key, const char *value) {
    const char *text = json_string_value(json_object_get(object, key));
    return text && strcmp(text, value) == 0;
}

/* ---- making one -------------------------------------------------------------------------------------------------- */

int tokenizer_reserve_text(tokenizer *t, int64_t vocab, size_t bytes, error *err) {
    t->vocab = vocab;
    t->text = malloc(bytes + 1);
    t->starts = calloc((size_t)vocab + 1, sizeof *t->starts);
    if (!t->text || !t->starts) return error_system(err, "no memory for a vocabulary of %lld ids", (long long)vocab);
    return 0;
}

void tokenizer_set_text(tokenizer *t, int32_t id, const char *bytes, size_t size) {
    memcpy(t->text + t->starts[id], bytes, size);
    t->starts[id + 1] = t->starts[id] + (uint32_t)size;
}

/* tokenizer_config.json: what tells transformers which class opens tokenizer.json and which special tokens there are.
 * The length stands for "no limit": it is the number that transformers itself writes then. */
static int make_config(tokenizer *t, error *err) {
    static const char format[] = "{\n"
                                 "  \"bos_token\": %s,\n"
                                 "  \"clean_up_tokenization_spaces\": false,\n"
                                 "  \"eos_token\": %s,\n"
                                 "  \"model_max_length\": 1000000000000000019884624838656,\n"
                                 "  \"pad_token\": %s,\n"
                                 "  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
                                 "  \"unk_token\": %s\n"
                                 "}\n";
    json_t *string = json_string(t->eod_text);
    char *quoted = string ? json_dumps(string, JSON_ENCODE_ANY) : NULL;
    int size = quoted ? asprintf(&t->config, format, quoted, quoted, quoted, quoted) : -1;
    json_decref(string);
    free(quoted);
    if (size < 0) {
        t->config = NULL;
        return error_system(err, "no memory for a tokenizer_config.json");
    }
    t->config_size = (size_t)size;
    return 0;
}

static int new_tokenizer(tokenizer **t, error *err) {
    *t = calloc(1, sizeof **t);
    return *t ? 0 : error_system(err, "no memory for a tokenizer");
}

static int finish(tokenizer *t, error *err) {
    t->identity = XXH64(t->json, t->json_size, 0);
    return make_config(t, err);
}

static int open_bytes(tokenizer **out, error *err) {
    TRY(new_tokenizer(out, err));
    if (tokenizer_make_bytes(*out, err) == 0 && finish(*out, err) == 0) return 0;
    tokenizer_close(*out);
    *out = NULL;
    return -1;
}

static int fill_bpe(tokenizer *t, const char *text, size_t size, const json_t *root, const char *name, error *err) {
    t->json = malloc(size + 1);
    if (!t->json) return error_system(err, "no memory for the %zu bytes of %s", size, name);
    memcpy(t->json, text, size);
    t->json_size = size;
    TRY(tokenizer_read_bpe(t, root, name, err));
    snprintf(t->name, sizeof t->name, "bpe-%lld", (long long)t->vocab);
    return finish(t, err);
}

int tokenizer_open_json(tokenizer **out, const char *text, size_t size, const char *name, error *err) {
    TRY(open_bytes(out, err));
    if (size == (*out)->json_size && memcmp(text, (*out)->json, size) == 0) return 0;
    json_t *root;
    int failed = json_read_text(&root, text, size, name, err);
    if (!failed && tokenizer_is_bytes(root)) {
        json_decref(root);
        return 0;
    }
    tokenizer_close(*out);
    *out = NULL;
    if (failed) return -1;
    failed = new_tokenizer(out, err);
    if (!failed) failed = fill_bpe(*out, text, size, root, name, err);
    json_decref(root);
    if (failed) {
        tokenizer_close(*out);
        *out = NULL;
    }
    return failed;
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

/* The tokenizer's file in a directory: tokenizer.json, unless there is only a pair of GPT-2's files. */
static int path_in(const char *directory, char *path, size_t size, error *err) {
    static const char *const names[] = {"tokenizer.json", "encoder.json", "vocab.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        TRY(file_join(path, size, directory, names[i], err));
        if (file_exists(path)) return 0;
    }
    return error_input(err, "%s holds no tokenizer: there is no tokenizer.json, encoder.json or vocab.json", directory);
}

int tokenizer_open(tokenizer **out, const char *spec, error *err) {
    *out = NULL;
    char path[LIMIT_PATH], *text;
    size_t size;
    if (strcmp(spec, TOKENIZER_BYTES) == 0) return open_bytes(out, err);
    if (file_is_directory(spec)) {
        TRY(path_in(spec, path, sizeof path, err));
        spec = path;
    } else if (!file_exists(spec)) {
        return error_input(err, "there is no tokenizer '%s': give '%s', a tokenizer.json or a directory that holds one",
                           spec, TOKENIZER_BYTES);
    }
    if (tokenizer_is_gpt2_path(spec)) {
        TRY(tokenizer_read_gpt2(spec, &text, &size, err));
    } else {
        TRY(file_read_all(spec, LIMIT_JSON_BYTES, &text, &size, err));
    }
    int failed = tokenizer_open_json(out, text, size, spec, err);
    free(text);
    return failed;
}

void tokenizer_close(tokenizer *t) {
    if (!t) return;
    if (t->bpe) {
        bpe_close(&t->bpe->bpe);
        added_tokens_free(&t->bpe->raw);
        added_tokens_free(&t->bpe->normalized);
        free(t->bpe->words.ids);
        free(t->bpe->unicode);
        free(t->bpe);
    }
    free(t->json);
    free(t->config);
    free(t->text);
    free(t->starts);
    free(t);
}

/* ---- use --------------------------------------------------------------------------------------------------------- */

const char *tokenizer_name(const tokenizer *t) {
    return t->name;
}

uint64_t tokenizer_identity(const tokenizer *t) {
    return t->identity;
}

int64_t tokenizer_vocab(const tokenizer *t) {
    return t->vocab;
}

int32_t tokenizer_eod(const tokenizer *t) {
    return t->eod;
}

const char *tokenizer_json(const tokenizer *t, size_t *size) {
    *size = t->json_size;
    return t->json;
}

const char *tokenizer_config_json(const tokenizer *t, size_t *size) {
    *size = t->config_size;
    return t->config;
}

const char *tokenizer_decode(const tokenizer *t, int32_t id, size_t *size) {
    *size = 0;
    if (id < 0 || id >= t->vocab || id == t->eod) return "";
    *size = t->starts[id + 1] - t->starts[id];
    return t->text + t->starts[id];
}

const char *tokenizer_eod_text(const tokenizer *t, size_t *size) {
    *size = strlen(t->eod_text);
    return t->eod_text;
}

uint64_t tokenizer_text_bytes(const tokenizer *t, const int32_t *ids, size_t count) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < count; i++) {
        size_t size;
        tokenizer_decode(t, ids[i], &size);
        bytes += size;
    }
    return bytes;
}

size_t tokenizer_last_cut(const tokenizer *t, const char *text, size_t from, size_t size) {
    if (!t->bpe) return size;
    return t->bpe->cuttable ? pretokenize_last_cut(t->bpe->unicode, text, from, size) : 0;
}
