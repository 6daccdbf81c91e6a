/* added_tokens.c: finding added tokens in a text, as added_tokens.h describes. Called by the encoder.
 *
 * The tokens are sorted, so those that go on with the bytes at hand are a range that each further byte narrows. Two
 * tables, of first bytes and of the first two, keep the search away from nearly all places where nothing begins.
 */
#include "data/added_tokens.h"

#include "data/pretokenize.h"
#include <stdlib.h>
#include <string.h>

/* ---- the set ----------------------------------------------------------------------------------------------------- */

int added_tokens_add(struct added_tokens *a, const struct added_token *token, error *err) {
    if (a->count == a->capacity) {
        size_t capacity = 2 * a->capacity + 16;
        struct added_token *tokens = realloc(a->tokens, capacity * sizeof *tokens);
        if (!tokens) return error_system(err, "no memory for %zu added tokens", capacity);
        a->tokens = tokens;
        a->capacity = capacity;
    }
    ASSERT(token->size >= 1);
    struct added_token copy = *token;
    copy.content = malloc(token->size);
    if (!copy.content) return error_system(err, "no memory for an added token");
    memcpy(copy.content, token->content, token->size);
    a->tokens[a->count++] = copy;
    return 0;
}

static int compare(const void *left, const void *right) {
    const struct added_token *a = left, *b = right;
    int order = memcmp(a->content, b->content, a->size < b->size ? a->size : b->size);
    if (order != 0) return order;
    return a->size < b->size ? -1 : a->size > b->size;
}

static void note_pair(struct added_tokens *a, unsigned char first, unsigned char second) {
    unsigned pair = (unsigned)first << 8 | second;
    a->pairs[pair >> 3] |= (uint8_t)(1u << (pair & 7));
}

bool added_tokens_seal(struct added_tokens *a) {
    if (a->count > 0) qsort(a->tokens, a->count, sizeof *a->tokens, compare);
    for (size_t i = 0; i < a->count; i++) {
        const struct added_token *t = &a->tokens[i];
        if (i > 0 && compare(t - 1, t) == 0) return false;
        unsigned char first = (unsigned char)t->content[0];
        a->begins[first] = true;
        for (unsigned second = 0; t->size == 1 && second < 256; second++) note_pair(a, first, (unsigned char)second);
        if (t->size > 1) note_pair(a, first, (unsigned char)t->content[1]);
    }
    return true;
}

void added_tokens_free(struct added_tokens *a) {
    for (size_t i = 0; i < a->count; i++) free(a->tokens[i].content);
    free(a->tokens);
}

/* ---- searching --------------------------------------------------------------------------------------------------- */

/* The first token of [from, to) whose byte at `depth`, which all of them have, is at least `byte`. */
static size_t first_from(const struct added_tokens *a, size_t from, size_t to, size_t depth, unsigned byte) {
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if ((unsigned char)a->tokens[middle].content[depth] < byte) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    return from;
}

/* The longest token that text[0..size) begins with, or NULL. */
static const struct added_token *longest(const struct added_tokens *a, const char *text, size_t size) {
    const struct added_token *found = NULL;
    size_t from = 0, to = a->count;
    for (size_t depth = 0; depth < size && from < to; depth++) {
        unsigned byte = (unsigned char)text[depth];
        from = first_from(a, from, to, depth, byte);
        to = first_from(a, from, to, depth, byte + 1);
        /* Of those that agree so far, the one that ends here comes first. */
        if (from < to && a->tokens[from].size == depth + 1) found = &a->tokens[from++];
    }
    return found;
}

static const struct added_token *find(const struct added_tokens *a, const char *text, size_t size, size_t *at) {
    for (size_t i = *at; i < size; i++) {
        unsigned char first = (unsigned char)text[i];
        if (!a->begins[first]) continue;
        if (i + 1 < size) {
            unsigned pair = (unsigned)first << 8 | (unsigned char)text[i + 1];
            if (!(a->pairs[pair >> 3] >> (pair & 7) & 1)) continue;
        }
        const struct added_token *t = longest(a, text + i, size - i);
        if (t) {
            *at = i;
            return t;
        }
    }
    return NULL;
}

static bool stands_alone(const struct unicode *u, const char *text, size_t size, size_t start, size_t stop) {
    size_t length;
    bool touched = start > 0 && unicode_before(u, text, start, &length) & UNICODE_WORD;
    return !touched && !(stop < size && unicode_at(u, text + stop, size - stop, &length) & UNICODE_WORD);
}

static size_t spaces_before(const struct unicode *u, const char *text, size_t start) {
    size_t length;
    while (start > 0 && unicode_before(u, text, start, &length) & UNICODE_SPACE) start -= length;
    return start;
}

static size_t spaces_after(const struct unicode *u, const char *text, size_t size, size_t stop) {
    size_t length;
    while (stop < size && unicode_at(u, text + stop, size - stop, &length) & UNICODE_SPACE) stop += length;
    return stop;
}

bool added_tokens_next(const struct added_tokens *a, const struct unicode *u, const char *text, size_t size,
                       struct added_search *s, struct added_match *match) {
    if (a->count == 0) return false;
    for (;;) {
        size_t start = s->at;
        const struct added_token *t = find(a, text, size, &start);
        if (!t) return false;
        size_t stop = s->at = start + t->size;
        if (t->single_word && !stands_alone(u, text, size, start, stop)) continue;
        if (t->lstrip) start = spaces_before(u, text, start);
        if (t->rstrip) stop = spaces_after(u, text, size, stop);
        /* Spaces that the token before has taken are not there to be taken, nor is there text before this one then. */
        *match = (struct added_match){s->done, start > s->done ? start - s->done : 0, t};
        s->done = stop;
        return true;
    }
}

bool added_tokens_can_be_cut(const struct added_tokens *a, const struct unicode *u) {
    for (size_t i = 0; i < a->count; i++) {
        const struct added_token *t = &a->tokens[i];
        size_t length;
        bool spaced = unicode_at(u, t->content, t->size, &length) & UNICODE_SPACE;
        if (t->rstrip || (t->single_word && spaced)) return false;
        if (pretokenize_last_cut(u, t->content, 0, t->size)) return false;
    }
    return true;
}
