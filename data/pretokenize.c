/* pretokenize.c: GPT-2's regular expression, by hand: a look at one or two characters says which of its alternatives
 * matches, and all of them end where a class of characters ends. Called by the encoder for every word, and by the
 * pipeline of tokenize to cut long documents.
 */
#include "data/pretokenize.h"

#include <string.h>

enum { CLASSES = UNICODE_LETTER | UNICODE_NUMBER | UNICODE_SPACE }; /* no flag of these: [^\s\p{L}\p{N}] */

/* Where the run of characters of `class` ends that `at` is in. */
static size_t run_end(const struct unicode *u, const char *text, size_t at, size_t size, unsigned class) {
    while (at < size) {
        size_t length;
        if ((unicode_at(u, text + at, size - at, &length) & CLASSES) != class) break;
        at += length;
    }
    return at;
}

/* Bytes of the contraction at `text`, which begins with an apostrophe, or 0. */
static size_t contraction(const char *text, size_t size) {
    if (size >= 2 && strchr("stmd", text[1]) && text[1]) return 2;
    if (size < 3) return 0;
    bool two =
        (text[1] == 'r' && text[2] == 'e') || (text[1] == 'v' && text[2] == 'e') || (text[1] == 'l' && text[2] == 'l');
    return two ? 3 : 0;
}

/* \s+(?!\S)|\s+: the run of spaces, without its last one if something follows that could take it. */
static size_t spaces(const struct unicode *u, const char *text, size_t size) {
    size_t at = 0, last = 0;
    while (at < size) {
        size_t length;
        if (!(unicode_at(u, text + at, size - at, &length) & UNICODE_SPACE)) break;
        last = at;
        at += length;
    }
    return at < size && last > 0 ? last : at;
}

size_t pretokenize_word(const struct unicode *u, const char *text, size_t size) {
    size_t length, at = 0;
    unsigned class = unicode_at(u, text, size, &length) & CLASSES;
    if (text[0] == '\'') {
        size_t bytes = contraction(text, size);
        if (bytes) return bytes;
    } else if (text[0] == ' ' && size > 1) {
        unsigned next = unicode_at(u, text + 1, size - 1, &length) & CLASSES;
        if (next != UNICODE_SPACE) {
            class = next;
            at = 1;
        }
    }
    if (class == UNICODE_SPACE) return spaces(u, text, size);
    return run_end(u, text, at + length, size, class);
}

static bool is_blank(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

size_t pretokenize_last_cut(const struct unicode *u, const char *text, size_t from, size_t size) {
    for (size_t at = size; at-- > from + 1;) {
        size_t length;
        if (is_blank(text[at]) && !(unicode_before(u, text, at, &length) & UNICODE_SPACE)) return at;
    }
    return 0;
}
