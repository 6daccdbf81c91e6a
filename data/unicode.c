/* unicode.c: the table of character classes and normalization, as unicode.h describes. Called by the tokenizers.
 *
 * Normalizing copies text that cannot change and hands utf8proc the rest, in runs. A stable character has combining
 * class 0, is its own NFC, and never composes with what is before it, so nothing reaches across its beginning: a run is
 * some unstable characters and the one stable character before them.
 */
#include "data/unicode.h"

#include <stdlib.h>
#include <string.h>

enum { FIRST_UNSTABLE_BYTE = 0xCC, /* U+0300, the first character that is not stable, is CC 80 */ DECOMPOSED_MAX = 4 };

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* Unicode's property White_Space, which is not one of utf8proc's. */
static bool is_space(int32_t c) {
    return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

/* Symbols that count as letters of words (Other_Alphabetic outside the marks): circled and squared Latin letters. */
static bool is_alphabetic_symbol(int32_t c) {
    return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
           (c >= 0x1F170 && c <= 0x1F189);
}

static unsigned class_of(int32_t c, utf8proc_category_t category) {
    unsigned flags = is_space(c) ? UNICODE_SPACE : 0;
    switch (category) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: return flags | UNICODE_LETTER | UNICODE_WORD;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL: return flags | UNICODE_NUMBER | UNICODE_WORD;
    case UTF8PROC_CATEGORY_NO: return flags | UNICODE_NUMBER;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_PC: return flags | UNICODE_WORD;
    default: break;
    }
    bool joins = c == 0x200C || c == 0x200D;
    return flags | (joins || is_alphabetic_symbol(c) ? UNICODE_WORD : 0);
}

/* Mark c if NFC changes it, and what a decomposition of c ends with: that composes with what is before it. */
static void mark_unstable(struct unicode *u, int32_t c) {
    int32_t parts[DECOMPOSED_MAX];
    int boundary = 0;
    utf8proc_ssize_t count =
        utf8proc_decompose_char(c, parts, DECOMPOSED_MAX, UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, &boundary);
    ASSERT(count >= 1 && count <= DECOMPOSED_MAX);
    if (count > 1) u->flags[parts[count - 1]] |= UNICODE_UNSTABLE;
    count = utf8proc_normalize_utf32(parts, count, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    if (count != 1 || parts[0] != c) u->flags[c] |= UNICODE_UNSTABLE;
}

int unicode_open(struct unicode **out, error *err) {
    struct unicode *u = *out = calloc(1, sizeof *u);
    if (!u) return error_system(err, "no memory for the table of Unicode characters");
    for (int32_t c = 0; c < UNICODE_CHARACTERS; c++) {
        const utf8proc_property_t *p = utf8proc_get_property(c);
        u->flags[c] |= (uint8_t)class_of(c, p->category);
        if (p->combining_class != 0) u->flags[c] |= UNICODE_UNSTABLE;
        bool hangul = c >= 0xAC00 && c <= 0xD7A3;
        if (p->decomp_seqindex != UINT16_MAX || hangul) mark_unstable(u, c);
    }
    return 0;
}

unsigned unicode_before(const struct unicode *u, const char *text, size_t size, size_t *length) {
    for (size_t back = 1; back <= 4 && back <= size; back++) {
        if (((unsigned char)text[size - back] & 0xC0) == 0x80) continue; /* not a character's first byte */
        unsigned flags = unicode_at(u, text + size - back, back, length);
        if (*length == back) return flags;
        break;
    }
    *length = 1;
    return 0;
}

/* ---- normalization ----------------------------------------------------------------------------------------------- */

static int buffer_reserve(struct unicode_buffer *b, size_t more, error *err) {
    if (b->capacity - b->size >= more) return 0;
    size_t capacity = b->capacity + b->capacity / 2 + more + 256;
    char *bytes = realloc(b->bytes, capacity);
    if (!bytes) return error_system(err, "no memory for %zu bytes of normalized text", capacity);
    b->bytes = bytes;
    b->capacity = capacity;
    return 0;
}

static int buffer_add(struct unicode_buffer *b, const char *bytes, size_t size, error *err) {
    if (size == 0) return 0;
    TRY(buffer_reserve(b, size, err));
    memcpy(b->bytes + b->size, bytes, size);
    b->size += size;
    return 0;
}

static int reserve_characters(struct unicode_scratch *s, size_t count, error *err) {
    if (s->capacity >= count) return 0;
    size_t capacity = count + count / 2 + 64;
    free(s->characters);
    free(s->sorted);
    s->characters = malloc(capacity * sizeof *s->characters);
    s->sorted = malloc(capacity * sizeof *s->sorted);
    s->capacity = s->characters && s->sorted ? capacity : 0;
    if (!s->capacity) return error_system(err, "no memory to normalize %zu characters", count);
    return 0;
}

static int combining_class(int32_t c) {
    return utf8proc_get_property(c)->combining_class;
}

/* Sort marks by combining class, keeping the order within a class: by counting, so that a text of nothing but marks
 * takes no longer than any other. */
static void sort_marks(int32_t *marks, int32_t *sorted, size_t count) {
    size_t starts[257] = {0};
    for (size_t i = 0; i < count; i++) starts[combining_class(marks[i]) + 1]++;
    for (int k = 1; k < 257; k++) starts[k] += starts[k - 1];
    for (size_t i = 0; i < count; i++) sorted[starts[combining_class(marks[i])]++] = marks[i];
    memcpy(marks, sorted, count * sizeof *marks);
}

static void order_marks(struct unicode_scratch *s, size_t count) {
    for (size_t i = 0; i < count;) {
        size_t end = i;
        bool ordered = true;
        for (int before = 0; end < count; end++) {
            int class = combining_class(s->characters[end]);
            if (class == 0) break;
            ordered = ordered && class >= before;
            before = class;
        }
        if (!ordered) sort_marks(s->characters + i, s->sorted, end - i);
        i = end + 1;
    }
}

/* Append the NFC of a run of valid UTF-8. */
static int normalize_run(struct unicode_scratch *s, const char *text, size_t size, error *err) {
    TRY(reserve_characters(s, size * DECOMPOSED_MAX, err));
    size_t count = 0;
    int boundary = 0;
    for (size_t at = 0; at < size;) {
        int32_t c;
        at += (size_t)utf8proc_iterate((const utf8proc_uint8_t *)text + at, (long)(size - at), &c);
        count += (size_t)utf8proc_decompose_char(c, s->characters + count, DECOMPOSED_MAX,
                                                 UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, &boundary);
    }
    order_marks(s, count);
    count = (size_t)utf8proc_normalize_utf32(s->characters, (long)count, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    TRY(buffer_reserve(&s->out, count * 4, err));
    for (size_t i = 0; i < count; i++) {
        char *end = s->out.bytes + s->out.size;
        s->out.size += (size_t)utf8proc_encode_char(s->characters[i], (utf8proc_uint8_t *)end);
    }
    return 0;
}

/* Where a run ends that has begun: at the next stable character or at bytes that are no UTF-8. */
static size_t run_end(const struct unicode *u, const char *text, size_t size, size_t at) {
    size_t length;
    while (at < size && unicode_at(u, text + at, size - at, &length) & UNICODE_UNSTABLE) at += length;
    return at;
}

/* Is there UTF-8 at `text`, and not a byte that only looks like the beginning of a character? */
static bool is_character(const char *text, size_t size) {
    utf8proc_int32_t c;
    return utf8proc_iterate((const utf8proc_uint8_t *)text, size < 4 ? (long)size : 4, &c) > 0;
}

int unicode_normalize(const struct unicode *u, const bool interesting[256], const bool replaced[256],
                      struct unicode_scratch *s, const char *text, size_t size, const char **out, size_t *out_size,
                      error *err) {
    size_t copied = 0; /* text before this is in the buffer */
    s->out.size = 0;
    for (size_t at = 0; at < size;) {
        if (!interesting[(unsigned char)text[at]]) {
            at++;
            continue;
        }
        size_t length, end = at;
        bool valid = is_character(text + at, size - at);
        unsigned flags = unicode_at(u, text + at, size - at, &length);
        if (valid && flags & UNICODE_UNSTABLE) {
            end = run_end(u, text, size, at);
            size_t before = 0;
            if (at > copied) unicode_before(u, text + copied, at - copied, &before);
            if (before > 0 && is_character(text + at - before, before)) at -= before;
            TRY(buffer_add(&s->out, text + copied, at - copied, err));
            TRY(normalize_run(s, text + at, end - at, err));
            copied = end;
        } else if (!valid && replaced[(unsigned char)text[at]]) {
            end = at + 1;
            TRY(buffer_add(&s->out, text + copied, at - copied, err));
            TRY(buffer_add(&s->out, "\xEF\xBF\xBD", 3, err));
            copied = end;
        }
        at = end > at ? end : at + length;
    }
    *out = text;
    *out_size = size;
    if (copied == 0) return 0;
    TRY(buffer_add(&s->out, text + copied, size - copied, err));
    *out = s->out.bytes;
    *out_size = s->out.size;
    return 0;
}

bool unicode_interesting(bool nfc, const bool replaced[256], bool interesting[256]) {
    bool any = false;
    for (int b = 0; b < 256; b++) {
        interesting[b] = replaced[b] || (nfc && b >= FIRST_UNSTABLE_BYTE);
        any = any || interesting[b];
    }
    return any;
}

void unicode_scratch_free(struct unicode_scratch *s) {
    free(s->out.bytes);
    free(s->characters);
    free(s->sorted);
}
