/* unicode.h: what tokenizers ask of Unicode: classes of characters, and normalization form C. The knowledge is
 * utf8proc's; here it is laid out so that a look at a character is one load.
 *
 * Text is any bytes. What is no UTF-8 is taken byte by byte, each a character of no class that nothing composes with.
 */
#ifndef RIVERRUN_UNICODE_H
#define RIVERRUN_UNICODE_H

#include "common/error.h"
#include <stdint.h>
#include <utf8proc.h>

#define UNICODE_CHARACTERS 0x110000

enum unicode_flag {
    UNICODE_LETTER = 1,
    UNICODE_NUMBER = 2,
    UNICODE_SPACE = 4,
    UNICODE_WORD = 8,     /* what \w means in Unicode's rules for regular expressions */
    UNICODE_UNSTABLE = 16 /* NFC may change it, or make one character of it and what is before */
};

struct unicode {
    uint8_t flags[UNICODE_CHARACTERS];
};

int unicode_open(struct unicode **u, error *err); /* free() it */

/* Flags of the character at `text` and its length in bytes; size >= 1. A byte that is no UTF-8 has no flags. */
static inline unsigned unicode_at(const struct unicode *u, const char *text, size_t size, size_t *length) {
    unsigned char first = (unsigned char)text[0];
    if (first < 0x80) {
        *length = 1;
        return u->flags[first];
    }
    utf8proc_int32_t c;
    utf8proc_ssize_t got = utf8proc_iterate((const utf8proc_uint8_t *)text, size < 4 ? (long)size : 4, &c);
    *length = got > 0 ? (size_t)got : 1;
    return got > 0 ? u->flags[c] : 0;
}

/* The same of the last character of text[0..size). */
unsigned unicode_before(const struct unicode *u, const char *text, size_t size, size_t *length);

/* Bytes that grow. */
struct unicode_buffer {
    char *bytes;
    size_t size, capacity;
};

/* Room for normalizing, kept from one call to the next. All zero at first. */
struct unicode_scratch {
    struct unicode_buffer out;
    int32_t *characters, *sorted;
    size_t capacity;
};

/* The text in NFC, and with U+FFFD for every byte of `replaced` that is no UTF-8. `interesting` says at which bytes to
 * look closer: unicode_interesting made it. *out is `text` itself where nothing changes, else in the scratch. */
int unicode_normalize(const struct unicode *u, const bool interesting[256], const bool replaced[256],
                      struct unicode_scratch *s, const char *text, size_t size, const char **out, size_t *out_size,
                      error *err);

/* Bytes that may begin a change: with `nfc`, those of characters from U+0300 on; always those that are `replaced`.
 * Returns whether there are any. */
bool unicode_interesting(bool nfc, const bool replaced[256], bool interesting[256]);

void unicode_scratch_free(struct unicode_scratch *s);

#endif
