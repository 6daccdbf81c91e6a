/* tokenizer_read.c: a byte-level BPE tokenizer from a parsed tokenizer.json.
 *
 * Everything that could change an id is looked at: a member that riverrun does not know, or a value that it does not
 * carry out, is refused by name, so that what opens encodes as the library does. The vocabulary's ids are 0, 1, 2 and
 * so on without a gap, and added tokens that are not in it follow, as the library numbers them. Called by tokenizer.c.
 */
#include "data/tokenizer_parts.h"

#include "common/limits.h"
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* While reading: the parsed file, and what it is called in messages. */
struct reader {
    tokenizer *t;
    struct bpe_tokenizer *b;
    const char *name;
    const json_t *root, *model, *vocab, *added;
    const char **tokens;        /* of each id, as they are spelled in the file; owned by the parsed file */
    int64_t vocab_count, count; /* entries of the vocabulary; of it and the added tokens */
    json_t *seen;               /* added tokens so far, as the keys of an object */
    struct unicode_scratch scratch;
};

/* ---- checking members -------------------------------------------------------------------------------------------- */

/* "type" of an object, for messages. */
static const char *type_of(const json_t *object) {
    const char *type = json_string_value(json_object_get(object, "type"));
    return type ? type : "unknown";
}

/* `what` is an object, and has no members but `known`, which ends with NULL. */
static int check_members(const struct reader *r, const json_t *object, const char *what, const char *const *known,
                         error *err) {
    if (!json_is_object(object)) return error_input(err, "%s: %s is not an object", r->name, what);
    const char *key;
    json_t *value;
    /* The cast: jansson's iterator takes no const, though it only reads. */
    json_object_foreach((json_t *)object, key, value) {
        size_t i = 0;
        while (known[i] && strcmp(known[i], key) != 0) i++;
        if (!known[i]) return error_input(err, "%s: %s has '%.60s', which riverrun does not know", r->name, what, key);
    }
    return 0;
}

/* A member that is false or absent. */
static int want_false(const struct reader *r, const json_t *object, const char *what, const char *key, error *err) {
    const json_t *value = json_object_get(object, key);
    if (!value || json_is_false(value)) return 0;
    return error_input(err, "%s: '%s' of %s must be false: riverrun does nothing else", r->name, key, what);
}

/* ---- what comes before and after the model ----------------------------------------------------------------------- */

static int read_normalizer(struct reader *r, const json_t *normalizer, error *err) {
    static const char *const members[] = {"type", "normalizers", NULL};
    if (!normalizer || json_is_null(normalizer)) return 0;
    TRY(check_members(r, normalizer, "'normalizer'", members, err));
    if (tokenizer_has_string(normalizer, "type", "NFC")) {
        r->b->nfc = true;
        return 0;
    }
    const json_t *parts = json_object_get(normalizer, "normalizers");
    if (tokenizer_has_string(normalizer, "type", "Sequence") && json_is_array(parts)) {
        for (size_t i = 0; i < json_array_size(parts); i++) {
            const json_t *part = json_array_get(parts, i);
            if (!tokenizer_has_string(part, "type", "NFC")) {
                return error_input(err, "%s: the normalizer '%.60s' is not known; NFC is, and none", r->name,
                                   type_of(part));
            }
            r->b->nfc = true;
        }
        return 0;
    }
    return error_input(err, "%s: the normalizer '%.60s' is not known; NFC is, and none", r->name, type_of(normalizer));
}

static int read_byte_level(struct reader *r, const json_t *p, bool *regex, error *err) {
    static const char *const members[] = {"type", "add_prefix_space", "trim_offsets", "use_regex", NULL};
    TRY(check_members(r, p, "the pre-tokenizer ByteLevel", members, err));
    bool prefix;
    TRY(json_get_bool(p, "add_prefix_space", r->name, &prefix, err));
    if (prefix) TRY(want_false(r, p, "the pre-tokenizer ByteLevel", "add_prefix_space", err));
    return json_get_bool_or(p, "use_regex", r->name, true, regex, err);
}

/* A Split whose pattern is ByteLevel's own. */
static int read_split(const struct reader *r, const json_t *p, error *err) {
    static const char *const members[] = {"type", "pattern", "behavior", "invert", NULL};
    TRY(check_members(r, p, "the pre-tokenizer Split", members, err));
    const char *pattern = json_string_value(json_object_get(json_object_get(p, "pattern"), "Regex"));
    if (!pattern || strcmp(pattern, PRETOKENIZE_PATTERN) != 0) {
        return error_input(err, "%s: the pattern of the pre-tokenizer Split is not known: '%.200s'; GPT-2's is '%s'",
                           r->name, pattern ? pattern : "no Regex", PRETOKENIZE_PATTERN);
    }
    if (!tokenizer_has_string(p, "behavior", "Isolated")) {
        return error_input(err, "%s: 'behavior' of the pre-tokenizer Split must be 'Isolated'", r->name);
    }
    return want_false(r, p, "the pre-tokenizer Split", "invert", err);
}

static int read_pre_tokenizer(struct reader *r, const json_t *p, error *err) {
    static const char *const members[] = {"type", "pretokenizers", NULL};
    bool split = false, regex, byte_level = false;
    const json_t *parts = json_object_get(p, "pretokenizers");
    bool sequence = tokenizer_has_string(p, "type", "Sequence") && json_is_array(parts);
    if (sequence) TRY(check_members(r, p, "the pre-tokenizer Sequence", members, err));
    size_t count = sequence ? json_array_size(parts) : 1;
    for (size_t i = 0; i < count; i++) {
        const json_t *part = sequence ? json_array_get(parts, i) : p;
        bool last = i + 1 == count;
        if (last && tokenizer_has_string(part, "type", "ByteLevel")) {
            TRY(read_byte_level(r, part, &regex, err));
            byte_level = true;
            split = split || regex;
        } else if (!last && i == 0 && tokenizer_has_string(part, "type", "Split")) {
            TRY(read_split(r, part, err));
            split = true;
        } else {
            const char *type = type_of(part);
            bool elsewhere = strcmp(type, "Split") == 0 || strcmp(type, "ByteLevel") == 0;
            return error_input(err, "%s: the pre-tokenizer '%.60s' is not known%s; ByteLevel is", r->name, type,
                               elsewhere ? " where it stands" : "");
        }
    }
    if (!byte_level) return error_input(err, "%s: 'pre_tokenizer' must be or end with ByteLevel", r->name);
    r->b->split = split;
    return 0;
}

/* Does a TemplateProcessing give back the ids as they are? */
static bool adds_nothing(const json_t *template) {
    const json_t *single = json_object_get(template, "single");
    return json_array_size(single) == 1 && json_object_get(json_array_get(single, 0), "Sequence");
}

static int read_post_processor(const struct reader *r, const json_t *p, error *err) {
    if (!p || json_is_null(p) || tokenizer_has_string(p, "type", "ByteLevel")) return 0; /* moves offsets, not ids */
    const json_t *parts = json_object_get(p, "processors");
    if (tokenizer_has_string(p, "type", "Sequence") && json_is_array(parts)) {
        for (size_t i = 0; i < json_array_size(parts); i++) {
            const json_t *part = json_array_get(parts, i);
            if (tokenizer_has_string(part, "type", "Sequence")) {
                return error_input(err, "%s: the post-processor has a Sequence in a Sequence", r->name);
            }
            TRY(read_post_processor(r, part, err));
        }
        return 0;
    }
    if (tokenizer_has_string(p, "type", "TemplateProcessing")) {
        if (adds_nothing(p)) return 0;
        return error_input(err,
                           "%s: the post-processor TemplateProcessing adds tokens to every text, which riverrun does "
                           "not; set 'post_processor' to null",
                           r->name);
    }
    return error_input(err, "%s: the post-processor '%.60s' is not known; ByteLevel is, and none", r->name, type_of(p));
}

static int read_surroundings(struct reader *r, error *err) {
    static const char *const members[] = {"version",       "truncation",     "padding", "added_tokens", "normalizer",
                                          "pre_tokenizer", "post_processor", "decoder", "model",        NULL};
    static const char *const unset[] = {"truncation", "padding"};
    TRY(check_members(r, r->root, "the file", members, err));
    r->model = json_object_get(r->root, "model");
    if (!json_is_object(r->model)) return error_input(err, "%s is no tokenizer.json: it has no 'model'", r->name);
    if (!tokenizer_has_string(r->model, "type", "BPE")) {
        return error_input(err, "%s: the model '%.60s' is not known; BPE is", r->name, type_of(r->model));
    }
    if (json_object_get(r->root, "version") && !tokenizer_has_string(r->root, "version", "1.0")) {
        return error_input(err, "%s: 'version' must be \"1.0\"", r->name);
    }
    for (size_t i = 0; i < 2; i++) {
        if (tokenizer_has_null(r->root, unset[i])) continue;
        return error_input(err, "%s: '%s' must be null: riverrun encodes texts as long as they are", r->name, unset[i]);
    }
    TRY(read_normalizer(r, json_object_get(r->root, "normalizer"), err));
    TRY(read_pre_tokenizer(r, json_object_get(r->root, "pre_tokenizer"), err));
    TRY(read_post_processor(r, json_object_get(r->root, "post_processor"), err));
    const json_t *decoder = json_object_get(r->root, "decoder");
    if (tokenizer_has_string(decoder, "type", "ByteLevel")) return 0;
    return error_input(err, "%s: the decoder '%.60s' is not known; ByteLevel is", r->name, type_of(decoder));
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

static int read_options(struct reader *r, bool *whole_words, error *err) {
    static const char *const members[] = {
        "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
        "ignore_merges", "vocab", "merges", NULL};
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    TRY(check_members(r, r->model, "'model'", members, err));
    const json_t *dropout = json_object_get(r->model, "dropout");
    if (!tokenizer_has_null(r->model, "dropout") && !(json_is_number(dropout) && json_number_value(dropout) == 0)) {
        return error_input(err, "%s: 'dropout' of the model must be null: riverrun's merges are not random", r->name);
    }
    for (size_t i = 0; i < 2; i++) {
        if (tokenizer_has_null(r->model, affixes[i]) || tokenizer_has_string(r->model, affixes[i], "")) continue;
        return error_input(err, "%s: '%s' of the model must be null: byte-level words carry no marks", r->name,
                           affixes[i]);
    }
    TRY(want_false(r, r->model, "the model", "byte_fallback", err));
    return json_get_bool_or(r->model, "ignore_merges", r->name, false, whole_words, err);
}

/* r->tokens by id; every id from 0 on is there once. */
static int read_vocab(struct reader *r, error *err) {
    r->vocab = json_object_get(r->model, "vocab");
    r->added = json_object_get(r->root, "added_tokens");
    if (!json_is_object(r->vocab) || json_object_size(r->vocab) == 0) {
        return error_input(err, "%s: 'vocab' of the model must be an object of tokens and ids", r->name);
    }
    if (r->added && !json_is_array(r->added)) return error_input(err, "%s: 'added_tokens' is not an array", r->name);
    r->vocab_count = r->count = (int64_t)json_object_size(r->vocab);
    size_t most = (size_t)r->vocab_count + json_array_size(r->added);
    if (most > LIMIT_VOCAB) {
        return error_input(err, "%s: a vocabulary of %zu tokens; at most %d are read", r->name, most, LIMIT_VOCAB);
    }
    r->tokens = calloc(most, sizeof *r->tokens);
    if (!r->tokens) return error_system(err, "no memory for the %zu tokens of %s", most, r->name);
    const char *token;
    json_t *id;
    json_object_foreach((json_t *)r->vocab, token, id) {
        json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < 0 || value >= r->vocab_count) {
            return error_input(err, "%s: the id of the token '%.60s' must be a number from 0 to %lld", r->name, token,
                               (long long)r->vocab_count - 1);
        }
        if (r->tokens[value]) {
            return error_input(err, "%s: the tokens '%.60s' and '%.60s' have the same id %lld", r->name,
                               r->tokens[value], token, (long long)value);
        }
        r->tokens[value] = token;
    }
    return 0;
}

static int id_of(const struct reader *r, const char *token) {
    const json_t *id = json_object_get(r->vocab, token);
    return id ? (int)json_integer_value(id) : -1;
}

/* The two sides of a merge, written "a b" or ["a", "b"], one after the other into `text`: `split` bytes and the
 * rest. */
static bool merge_sides(const json_t *merge, char *text, size_t size, size_t *split) {
    if (json_is_string(merge)) {
        const char *both = json_string_value(merge), *space = strchr(both, ' ');
        if (!space || space == both || !space[1] || strchr(space + 1, ' ') || strlen(both) > size) return false;
        *split = (size_t)(space - both);
        memcpy(text, both, *split);
        strcpy(text + *split, space + 1);
        return true;
    }
    const char *left = json_string_value(json_array_get(merge, 0)),
               *right = json_string_value(json_array_get(merge, 1));
    if (json_array_size(merge) != 2 || !left || !right || !*left || !*right) return false;
    if (strlen(left) + strlen(right) >= size) return false;
    *split = strlen(left);
    strcpy(stpcpy(text, left), right);
    return true;
}

enum { MERGE_BYTES = 4096 }; /* no tokenizer has a token as long */

static int read_merge(struct reader *r, size_t i, const json_t *merge, error *err) {
    char text[MERGE_BYTES], left[MERGE_BYTES];
    size_t split;
    if (!merge_sides(merge, text, sizeof text, &split)) {
        return error_input(err, "%s: merge %zu is not a pair of tokens, written \"a b\" or [\"a\", \"b\"]", r->name, i);
    }
    memcpy(left, text, split);
    left[split] = 0;
    const char *parts[] = {left, text + split, text};
    int ids[3];
    for (int k = 0; k < 3; k++) {
        ids[k] = id_of(r, parts[k]);
        if (ids[k] >= 0) continue;
        return error_input(err,
                           "%s: merge %zu, of '%.60s' and '%.60s', needs the token '%.60s', which the vocabulary "
                           "does not have",
                           r->name, i, parts[0], parts[1], parts[k]);
    }
    struct bpe_merge entry = {(uint64_t)(uint32_t)ids[0] << 32 | (uint32_t)ids[1], (uint32_t)i, ids[2]};
    if (bpe_add(&r->b->bpe, &entry)) return 0;
    return error_input(err, "%s: merge %zu, of '%.60s' and '%.60s', is there twice", r->name, i, parts[0], parts[1]);
}

static int read_merges(struct reader *r, error *err) {
    const json_t *merges = json_object_get(r->model, "merges");
    if (!json_is_array(merges)) return error_input(err, "%s: 'merges' of the model is not an array", r->name);
    size_t count = json_array_size(merges);
    TRY(bpe_open(&r->b->bpe, count, err));
    for (size_t i = 0; i < count; i++) TRY(read_merge(r, i, json_array_get(merges, i), err));
    return 0;
}

/* Every byte that occurs in UTF-8 has a token. */
static int read_byte_ids(struct reader *r, error *err) {
    unsigned characters[256];
    byte_characters(characters);
    for (unsigned byte = 0; byte < 256; byte++) {
        char text[4] = {0};
        byte_character_utf8(text, characters[byte]);
        r->b->bpe.byte_ids[byte] = id_of(r, text);
        r->b->replaced[byte] = r->b->bpe.byte_ids[byte] < 0;
        bool never_in_utf8 = byte == 0xC0 || byte == 0xC1 || byte > 0xF4;
        if (!r->b->replaced[byte] || never_in_utf8) continue;
        return error_input(err, "%s: the vocabulary has no token '%s' for the byte %u, so texts would be lost", r->name,
                           text, byte);
    }
    return 0;
}

/* ---- added tokens ------------------------------------------------------------------------------------------------ */

static int add_token(struct reader *r, const struct added_token *token, bool normalized, error *err) {
    struct added_token copy = *token;
    const char *content = token->content;
    if (normalized && r->b->normalizes) {
        TRY(unicode_normalize(r->b->unicode, r->b->interesting, r->b->replaced, &r->scratch, token->content,
                              token->size, &content, &copy.size, err));
    }
    copy.content = (char *)content; /* only read, and copied */
    return added_tokens_add(normalized ? &r->b->normalized : &r->b->raw, &copy, err);
}

static int read_added_token(struct reader *r, const json_t *entry, error *err) {
    static const char *const members[] = {"id",     "content", "single_word", "lstrip",
                                          "rstrip", "special", "normalized",  NULL};
    struct added_token token = {0};
    const char *content;
    int64_t id;
    bool normalized, special;
    TRY(check_members(r, entry, "an added token", members, err));
    TRY(json_get_string(entry, "content", r->name, &content, err));
    TRY(json_get_int(entry, "id", r->name, &id, err));
    TRY(json_get_bool(entry, "single_word", r->name, &token.single_word, err));
    TRY(json_get_bool(entry, "lstrip", r->name, &token.lstrip, err));
    TRY(json_get_bool(entry, "rstrip", r->name, &token.rstrip, err));
    TRY(json_get_bool(entry, "normalized", r->name, &normalized, err));
    TRY(json_get_bool(entry, "special", r->name, &special, err));
    if (!*content) return error_input(err, "%s: an added token is empty", r->name);
    if (json_object_get(r->seen, content)) {
        return error_input(err, "%s: the added token '%.60s' is there twice", r->name, content);
    }
    if (json_object_set_new(r->seen, content, json_true()) != 0) {
        return error_system(err, "no memory for the added tokens of %s", r->name);
    }
    int64_t known = id_of(r, content), want = known >= 0 ? known : r->count;
    if (id != want) {
        return error_input(err, "%s: the added token '%.60s' has the id %lld, it must be %lld: %s", r->name, content,
                           (long long)id, (long long)want,
                           known >= 0 ? "the vocabulary's" : "ids go on behind the vocabulary without a gap");
    }
    if (known < 0) r->tokens[r->count++] = content;
    token.content = (char *)content; /* only read */
    token.size = strlen(content);
    token.id = (int32_t)id;
    return add_token(r, &token, normalized, err);
}

static int read_added(struct reader *r, error *err) {
    struct bpe_tokenizer *b = r->b;
    for (size_t i = 0; i < json_array_size(r->added); i++) {
        TRY(read_added_token(r, json_array_get(r->added, i), err));
    }
    if (!added_tokens_seal(&b->raw) || !added_tokens_seal(&b->normalized)) {
        return error_input(err, "%s: two added tokens become the same by normalization", r->name);
    }
    b->cuttable =
        b->split && added_tokens_can_be_cut(&b->raw, b->unicode) && added_tokens_can_be_cut(&b->normalized, b->unicode);
    return 0;
}

/* ---- what ids stand for ------------------------------------------------------------------------------------------ */

/* byte_of[c] is the byte that the character c stands for in a vocabulary, or -1. */
static void make_byte_of(int16_t byte_of[512]) {
    unsigned characters[256];
    byte_characters(characters);
    for (int c = 0; c < 512; c++) byte_of[c] = -1;
    for (int byte = 0; byte < 256; byte++) byte_of[characters[byte]] = (int16_t)byte;
}

/* The bytes that a token of the vocabulary stands for, one a character, into `bytes`, which has room for as many as the
 * token is long. False if one of its characters stands for none: such a token is never the outcome of encoding. */
static bool token_bytes(const int16_t byte_of[512], const char *token, char *bytes, size_t *size) {
    *size = 0;
    for (const char *c = token; *c;) {
        unsigned first = (unsigned char)c[0], character = first;
        if (first >= 0x80) character = first < 0xE0 ? (first & 0x1F) << 6 | ((unsigned char)c[1] & 0x3F) : 511;
        if (character >= 512 || byte_of[character] < 0) return false;
        bytes[(*size)++] = (char)byte_of[character];
        c += first < 0x80 ? 1 : 2;
    }
    return true;
}

/* Added tokens, and those of which a character stands for no byte, are their own text, as for the library's decoder. */
static int make_texts(struct reader *r, char *bytes, error *err) {
    int16_t byte_of[512];
    make_byte_of(byte_of);
    size_t all = 0;
    for (int64_t id = 0; id < r->count; id++) all += strlen(r->tokens[id]);
    TRY(tokenizer_reserve_text(r->t, r->count, all, err));
    for (int64_t id = 0; id < r->count; id++) {
        size_t size;
        const char *text = bytes;
        if (id >= r->vocab_count || !token_bytes(byte_of, r->tokens[id], bytes, &size)) {
            text = r->tokens[id];
            size = strlen(text);
        }
        tokenizer_set_text(r->t, (int32_t)id, text, size);
    }
    return 0;
}

/* The table of whole words: every token of the vocabulary by its bytes. */
static int make_words(struct reader *r, char *bytes, error *err) {
    struct whole_words *words = &r->b->words;
    int16_t byte_of[512];
    make_byte_of(byte_of);
    size_t places = 16;
    while (places < 2 * (size_t)r->vocab_count) places *= 2;
    words->ids = malloc(places * sizeof *words->ids);
    if (!words->ids) return error_system(err, "no memory for the tokens of %s", r->name);
    words->mask = places - 1;
    for (size_t i = 0; i < places; i++) words->ids[i] = -1;
    for (int32_t id = 0; id < r->vocab_count; id++) {
        size_t size;
        if (!token_bytes(byte_of, r->tokens[id], bytes, &size)) continue;
        size_t at = XXH3_64bits(bytes, size) & words->mask;
        while (words->ids[at] >= 0) at = (at + 1) & words->mask;
        words->ids[at] = id;
    }
    return 0;
}

static int make_tables(struct reader *r, bool whole_words, error *err) {
    size_t longest = 0;
    for (int64_t id = 0; id < r->count; id++) {
        size_t length = strlen(r->tokens[id]);
        longest = length > longest ? length : longest;
    }
    char *bytes = malloc(longest + 1);
    if (!bytes) return error_system(err, "no memory for the tokens of %s", r->name);
    int failed = make_texts(r, bytes, err);
    if (!failed && whole_words) failed = make_words(r, bytes, err);
    free(bytes);
    return failed;
}

static int find_eod(struct reader *r, error *err) {
    static const char *const names[] = {TOKENIZER_EOD_TEXT, "<|end_of_text|>", "</s>", "<eos>"};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        for (int64_t id = 0; id < r->count; id++) {
            if (strcmp(r->tokens[id], names[k]) != 0) continue;
            r->t->eod = (int32_t)id;
            r->t->eod_text = names[k];
            return 0;
        }
    }
    return error_input(err, "%s: there is no token to end a document with: none is called %s, %s, %s or %s", r->name,
                       names[0], names[1], names[2], names[3]);
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

static int read_all(struct reader *r, error *err) {
    bool whole_words;
    TRY(read_surroundings(r, err));
    TRY(read_options(r, &whole_words, err));
    TRY(read_vocab(r, err));
    TRY(read_byte_ids(r, err));
    TRY(read_merges(r, err));
    TRY(unicode_open(&r->b->unicode, err));
    r->b->normalizes = unicode_interesting(r->b->nfc, r->b->replaced, r->b->interesting);
    TRY(read_added(r, err));
    TRY(make_tables(r, whole_words, err));
    return find_eod(r, err);
}

int tokenizer_read_bpe(tokenizer *t, const json_t *root, const char *name, error *err) {
    t->bpe = calloc(1, sizeof *t->bpe);
    if (!t->bpe) return error_system(err, "no memory for the tokenizer %s", name);
    struct reader r = {.t = t, .b = t->bpe, .name = name, .root = root, .seen = json_object()};
    int failed = read_all(&r, err);
    json_decref(r.seen);
    unicode_scratch_free(&r.scratch);
    free(r.tokens);
    return failed;
}
