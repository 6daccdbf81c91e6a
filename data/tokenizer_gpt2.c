/* tokenizer_gpt2.c: GPT-2's two files as one tokenizer.json, laid out to the byte as the Hugging Face library saves it.
 *
 * encoder.json (also called vocab.json) gives tokens their ids; vocab.bpe (also called merges.txt) lists the merges,
 * one "a b" a line, below a line that begins with #version. What they leave unsaid is how GPT-2 encodes: its regular
 * expression, no normalization, and <|endoftext|> as a token of its own. Called by tokenizer.c.
 */
#include "data/tokenizer_parts.h"

#include "common/file.h"
#include "common/limits.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const endings[2][2] = {{"encoder.json", "vocab.bpe"}, {"vocab.json", "merges.txt"}};

/* Does the path end with one of the names? Which pair it is, and which of the two, and the bytes before the name. */
static bool find_ending(const char *path, int *pair, int *which, size_t *stem) {
    size_t length = strlen(path);
    for (*pair = 0; *pair < 2; ++*pair) {
        for (*which = 0; *which < 2; ++*which) {
            const char *ending = endings[*pair][*which];
            if (length < strlen(ending)) continue;
            *stem = length - strlen(ending);
            if (strcmp(path + *stem, ending) == 0) return true;
        }
    }
    return false;
}

bool tokenizer_is_gpt2_path(const char *path) {
    int pair, which;
    size_t stem;
    return find_ending(path, &pair, &which, &stem);
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

static void write_string(FILE *out, const char *text, size_t size) {
    json_t *string = json_stringn(text, size);
    if (string) json_dumpf(string, out, JSON_ENCODE_ANY);
    json_decref(string);
}

static void write_head(FILE *out, json_int_t eod) {
    fputs("{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [", out);
    if (eod >= 0) {
        fprintf(out,
                "\n    {\n      \"id\": %lld,\n      \"content\": \"" TOKENIZER_EOD_TEXT "\",\n"
                "      \"single_word\": false,\n      \"lstrip\": false,\n      \"rstrip\": false,\n"
                "      \"normalized\": false,\n      \"special\": true\n    }\n  ",
                (long long)eod);
    }
    fputs("],\n  \"normalizer\": null,\n", out);
    /* The decoder looks at none of its members; these are the ones that the library gives it. */
    fputs("  \"pre_tokenizer\": {\n    \"type\": \"ByteLevel\",\n    \"add_prefix_space\": false,\n"
          "    \"trim_offsets\": true,\n    \"use_regex\": true\n  },\n  \"post_processor\": null,\n"
          "  \"decoder\": {\n    \"type\": \"ByteLevel\",\n    \"add_prefix_space\": true,\n"
          "    \"trim_offsets\": true,\n    \"use_regex\": true\n  },\n",
          out);
    fputs("  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
          "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n    \"fuse_unk\": false,\n"
          "    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n    \"vocab\": {",
          out);
}

/* The vocabulary in the order of its ids. An id that is no number is written as it is, and refused by the reader. */
struct entry {
    const char *token;
    const json_t *id;
};

static int by_id(const void *left, const void *right) {
    json_int_t a = json_integer_value(((const struct entry *)left)->id);
    json_int_t b = json_integer_value(((const struct entry *)right)->id);
    return a < b ? -1 : a > b;
}

static int write_vocab(FILE *out, const json_t *vocab, error *err) {
    size_t count = json_object_size(vocab), i = 0;
    struct entry *entries = malloc((count + 1) * sizeof *entries);
    if (!entries) return error_system(err, "no memory for %zu tokens", count);
    const char *token;
    json_t *id;
    json_object_foreach((json_t *)vocab, token, id) entries[i++] = (struct entry){token, id};
    qsort(entries, count, sizeof *entries, by_id);
    for (i = 0; i < count; i++) {
        fputs(i > 0 ? ",\n      " : "\n      ", out);
        write_string(out, entries[i].token, strlen(entries[i].token));
        fputs(": ", out);
        json_dumpf(entries[i].id, out, JSON_ENCODE_ANY);
    }
    free(entries);
    fputs("\n    },\n    \"merges\": [", out);
    return 0;
}

/* One line "a b" of the merges. */
static int write_merge(FILE *out, const char *line, size_t size, bool first, size_t number, const char *path,
                       error *err) {
    const char *space = memchr(line, ' ', size);
    size_t left = space ? (size_t)(space - line) : 0, right = space ? size - left - 1 : 0;
    if (!space || left == 0 || right == 0 || memchr(space + 1, ' ', right)) {
        return error_input(err, "%s:%zu: is not a pair of tokens with a space between them", path, number);
    }
    json_t *check = json_stringn(line, size);
    if (!check) return error_input(err, "%s:%zu: is not UTF-8", path, number);
    json_decref(check);
    fputs(first ? "\n      [\n        " : ",\n      [\n        ", out);
    write_string(out, line, left);
    fputs(",\n        ", out);
    write_string(out, space + 1, right);
    fputs("\n      ]", out);
    return 0;
}

static int write_merges(FILE *out, const char *text, size_t size, const char *path, error *err) {
    bool first = true;
    size_t number = 1;
    for (size_t at = 0; at < size; number++) {
        const char *line = text + at, *end = memchr(line, '\n', size - at);
        size_t length = end ? (size_t)(end - line) : size - at;
        at += length + 1;
        bool version = number == 1 && length >= 8 && memcmp(line, "#version", 8) == 0;
        if (length > 0 && line[length - 1] == '\r') length--;
        if (version || (length == 0 && at >= size)) continue;
        TRY(write_merge(out, line, length, first, number, path, err));
        first = false;
    }
    fputs(first ? "]\n  }\n}" : "\n    ]\n  }\n}", out);
    return 0;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

static int write_json(FILE *out, const json_t *vocab, const char *merges_path, error *err) {
    char *merges;
    size_t size;
    TRY(file_read_all(merges_path, LIMIT_JSON_BYTES, &merges, &size, err));
    const json_t *eod = json_object_get(vocab, TOKENIZER_EOD_TEXT);
    write_head(out, json_is_integer(eod) ? json_integer_value(eod) : -1);
    int failed = write_vocab(out, vocab, err);
    if (!failed) failed = write_merges(out, merges, size, merges_path, err);
    free(merges);
    return failed;
}

int tokenizer_read_gpt2(const char *path, char **text, size_t *size, error *err) {
    int pair, which;
    size_t stem;
    char paths[2][LIMIT_PATH];
    *text = NULL;
    ASSERT(find_ending(path, &pair, &which, &stem));
    for (int i = 0; i < 2; i++) {
        if (stem + strlen(endings[pair][i]) >= LIMIT_PATH)
            return error_input(err, "the path %.200s... is too long", path);
        snprintf(paths[i], LIMIT_PATH, "%.*s%s", (int)stem, path, endings[pair][i]);
        if (!file_exists(paths[i])) {
            return error_input(err, "there is no %s, which belongs to %s: GPT-2's tokenizer has two files", paths[i],
                               path);
        }
    }
    json_t *vocab;
    TRY(json_read(&vocab, paths[0], err));
    int failed = json_is_object(vocab) ? 0 : error_input(err, "%s is not an object of tokens and ids", paths[0]);
    FILE *out = failed ? NULL : open_memstream(text, size);
    if (!failed && !out) failed = error_system(err, "no memory to read %s", path);
    if (!failed) failed = write_json(out, vocab, paths[1], err);
    if (out && fclose(out) != 0 && !failed) failed = error_system(err, "no memory to read %s", path);
    json_decref(vocab);
    if (failed) {
        free(*text);
        *text = NULL;
    }
    return failed;
}
