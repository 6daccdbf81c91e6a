/* encoder.c: encoding, the part of tokenizer.h that runs for every word of a corpus.
 *
 * The order is that of Hugging Face's library: added tokens that are looked for in the text as it is cut it into
 * pieces; each piece is normalized; the other added tokens cut what comes out; the rest is cut into words, and each
 * word is merged by itself. Nearly all words of a text are among the last few ten thousand met, so their ids are kept
 * in a table, one entry to a cache line. Called by the threads of tokenize and by generate.
 */
#include "data/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { KNOWN_BITS = 16, KNOWN_WORDS = 1 << KNOWN_BITS, KNOWN_SIZE = 30, KNOWN_IDS = 8 };

/* A word met before; size 0: none. */
struct known_word {
    uint8_t size, count;
    char bytes[KNOWN_SIZE];
    int32_t ids[KNOWN_IDS];
};

struct encoder {
    const tokenizer *tokenizer;
    struct known_word *known; /* KNOWN_WORDS; NULL for bytes */
    struct unicode_scratch unicode;
    struct bpe_scratch bpe;
};

int encoder_open(encoder **out, const tokenizer *t, error *err) {
    encoder *e = *out = calloc(1, sizeof *e);
    if (e) e->tokenizer = t;
    if (e && t->bpe) {
        e->known = aligned_alloc(sizeof *e->known, KNOWN_WORDS * sizeof *e->known);
        if (e->known) memset(e->known, 0, KNOWN_WORDS * sizeof *e->known);
    }
    if (e && (e->known || !t->bpe)) return 0;
    encoder_close(e);
    *out = NULL;
    return error_system(err, "no memory to encode text");
}

void encoder_close(encoder *e) {
    if (!e) return;
    unicode_scratch_free(&e->unicode);
    free(e->bpe.memory);
    free(e->known);
    free(e);
}

/* ---- lists of ids ------------------------------------------------------------------------------------------------ */

static int reserve(struct token_list *list, size_t more, error *err) {
    if (list->capacity - list->count >= more) return 0;
    size_t capacity = list->count + list->count / 2 + more;
    int32_t *ids = realloc(list->ids, capacity * sizeof *ids);
    if (!ids) return error_system(err, "no memory for %zu token ids", capacity);
    list->ids = ids;
    list->capacity = capacity;
    return 0;
}

int token_list_add(struct token_list *list, int32_t id, error *err) {
    TRY(reserve(list, 1, err));
    list->ids[list->count++] = id;
    return 0;
}

/* ---- words ------------------------------------------------------------------------------------------------------- */

/* The id of a word that is a token as a whole, or -1. */
static int32_t whole_word(const tokenizer *t, const char *word, size_t size) {
    const struct whole_words *words = &t->bpe->words;
    if (!words->ids) return -1;
    for (size_t at = XXH3_64bits(word, size) & words->mask; words->ids[at] >= 0; at = (at + 1) & words->mask) {
        int32_t id = words->ids[at];
        size_t length = t->starts[id + 1] - t->starts[id];
        if (length == size && memcmp(t->text + t->starts[id], word, size) == 0) return id;
    }
    return -1;
}

/* The ids of a word, which the list has room for. */
static int encode_word(encoder *e, const char *word, size_t size, struct token_list *list, error *err) {
    int32_t *ids = list->ids + list->count, whole = whole_word(e->tokenizer, word, size);
    size_t count = 1;
    if (whole >= 0) {
        ids[0] = whole;
    } else {
        TRY(bpe_encode(&e->tokenizer->bpe->bpe, &e->bpe, word, size, ids, &count, err));
    }
    list->count += count;
    return 0;
}

static int look_up_word(encoder *e, const char *word, size_t size, struct token_list *list, error *err) {
    if (size > KNOWN_SIZE) return encode_word(e, word, size, list, err);
    struct known_word *known = &e->known[XXH3_64bits(word, size) >> (64 - KNOWN_BITS)];
    if (known->size == size && memcmp(known->bytes, word, size) == 0) {
        memcpy(list->ids + list->count, known->ids, known->count * sizeof *known->ids);
        list->count += known->count;
        return 0;
    }
    size_t before = list->count;
    TRY(encode_word(e, word, size, list, err));
    if (list->count - before <= KNOWN_IDS) {
        known->size = (uint8_t)size;
        known->count = (uint8_t)(list->count - before);
        memcpy(known->bytes, word, size);
        memcpy(known->ids, list->ids + before, known->count * sizeof *known->ids);
    }
    return 0;
}

static int encode_words(encoder *e, const char *text, size_t size, struct token_list *list, error *err) {
    const struct bpe_tokenizer *b = e->tokenizer->bpe;
    TRY(reserve(list, size, err)); /* a word has at most an id a byte */
    for (size_t at = 0; at < size;) {
        size_t length = b->split ? pretokenize_word(b->unicode, text + at, size - at) : size;
        TRY(look_up_word(e, text + at, length, list, err));
        at += length;
    }
    return 0;
}

/* ---- texts ------------------------------------------------------------------------------------------------------- */

static int encode_piece(encoder *e, const char *text, size_t size, struct token_list *list, error *err) {
    const struct bpe_tokenizer *b = e->tokenizer->bpe;
    if (b->normalizes) {
        TRY(unicode_normalize(b->unicode, b->interesting, b->replaced, &e->unicode, text, size, &text, &size, err));
    }
    struct added_search search = {0};
    struct added_match match;
    while (added_tokens_next(&b->normalized, b->unicode, text, size, &search, &match)) {
        TRY(encode_words(e, text + match.text, match.text_size, list, err));
        TRY(token_list_add(list, match.token->id, err));
    }
    return encode_words(e, text + search.done, size - search.done, list, err);
}

static int append_bytes(const char *text, size_t size, struct token_list *list, error *err) {
    TRY(reserve(list, size, err));
    for (size_t i = 0; i < size; i++) list->ids[list->count + i] = (unsigned char)text[i];
    list->count += size;
    return 0;
}

int encoder_append(encoder *e, const char *text, size_t size, struct token_list *list, error *err) {
    const struct bpe_tokenizer *b = e->tokenizer->bpe;
    if (!b) return append_bytes(text, size, list, err);
    struct added_search search = {0};
    struct added_match match;
    while (added_tokens_next(&b->raw, b->unicode, text, size, &search, &match)) {
        TRY(encode_piece(e, text + match.text, match.text_size, list, err));
        TRY(token_list_add(list, match.token->id, err));
    }
    return encode_piece(e, text + search.done, size - search.done, list, err);
}
