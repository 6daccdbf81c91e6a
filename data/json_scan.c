/* json_scan.c: a validating JSON reader that keeps one string; see json_scan.h.
 *
 * jansson builds a tree of every line and goes over every byte several times: 33 MB/s on a core where this pass, with
 * one table look-up for each ordinary byte of a string, makes 980; and the sets that come as JSON lines have a
 * terabyte. test_data_jsonl.c and test/fuzz/fuzz_json_scan.c compare the two. Called by jsonl.c.
 */
#include "data/json_scan.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum kind { KIND_OBJECT, KIND_ARRAY, KIND_STRING, KIND_NUMBER, KIND_BOOLEAN, KIND_NULL };

static const char *const kind_names[] = {"an object", "an array", "a string", "a number", "a boolean", "null"};

struct scan {
    char *start, *at, *end;
    const char *key; /* all of it, for messages */
    int depth;
    char *found; /* NULL: not met yet */
    size_t found_size;
    error *err;
};

/* The byte at hand, 0 at the end: 0 is no part of valid JSON outside of strings. */
static unsigned char peek(const struct scan *s) {
    return s->at < s->end ? (unsigned char)*s->at : 0;
}

static int wrong(const struct scan *s, const char *problem) {
    return error_input(s->err, "is not valid JSON: %s%s (column %zu)", s->at < s->end ? "" : "it ends where ",
                       problem, (size_t)(s->at - s->start) + 1);
}

static void skip_space(struct scan *s) {
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\t' || *s->at == '\n' || *s->at == '\r')) s->at++;
}

/* ---- strings ----------------------------------------------------------------------------------------------------- */

/* What ends a run of bytes that are taken as they are: a quote, a backslash, a control, the start of more. */
static bool is_special(unsigned char byte) {
    static const bool special[256] = {
        [0 ... 31] = true, ['"'] = true, ['\\'] = true, [0x80 ... 0xFF] = true,
    };
    return special[byte];
}

/* The bytes of the character of more than one byte at `at`, or 0 if it is no UTF-8: too long a form, a surrogate, a
 * number past U+10FFFF, or cut. */
static size_t utf8_size(const unsigned char *at, const unsigned char *end) {
    unsigned char lead = at[0], low = 0x80, high = 0xBF;
    size_t size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || (size_t)(end - at) < size) return 0;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
    if (at[1] < low || at[1] > high) return 0;
    for (size_t i = 2; i < size; i++) {
        if (at[i] < 0x80 || at[i] > 0xBF) return 0;
    }
    return size;
}

static char *utf8_write(char *to, uint32_t c) {
    if (c < 0x80) {
        *to++ = (char)c;
    } else if (c < 0x800) {
        *to++ = (char)(0xC0 | c >> 6);
        *to++ = (char)(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        *to++ = (char)(0xE0 | c >> 12);
        *to++ = (char)(0x80 | (c >> 6 & 0x3F));
        *to++ = (char)(0x80 | (c & 0x3F));
    } else {
        *to++ = (char)(0xF0 | c >> 18);
        *to++ = (char)(0x80 | (c >> 12 & 0x3F));
        *to++ = (char)(0x80 | (c >> 6 & 0x3F));
        *to++ = (char)(0x80 | (c & 0x3F));
    }
    return to;
}

/* The four hexadecimal digits at `at`, or -1. */
static int32_t hex4(const char *at, const char *end) {
    int32_t value = 0;
    if (end - at < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = at[i];
        int lower = c | 0x20; /* 'A' to 'F' become 'a' to 'f', digits stay */
        bool letter = lower >= 'a' && lower <= 'f';
        if (!letter && (c < '0' || c > '9')) return -1;
        value = value * 16 + (letter ? lower - 'a' + 10 : c - '0');
    }
    return value;
}

/* \uXXXX, or two of them for one character, at s->at; decoded to *to. */
static int unicode_escape(struct scan *s, char **to) {
    int32_t c = hex4(s->at + 2, s->end);
    if (c < 0) return wrong(s, "\\u must have four hexadecimal digits after it");
    size_t size = 6;
    if (c >= 0xD800 && c <= 0xDFFF) {
        const char *next = s->at + 6;
        bool paired = c < 0xDC00 && s->end - next >= 2 && next[0] == '\\' && next[1] == 'u';
        int32_t low = paired ? hex4(next + 2, s->end) : -1;
        if (low < 0xDC00 || low > 0xDFFF) return wrong(s, "an invalid escape, \\u with half a surrogate pair");
        c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
        size = 12;
    }
    *to = utf8_write(*to, (uint32_t)c);
    s->at += size;
    return 0;
}

static int escape(struct scan *s, char **to) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    char c = s->end - s->at > 1 ? s->at[1] : 0;
    if (c == 'u') return unicode_escape(s, to);
    const char *known = c ? strchr(names, c) : NULL;
    if (!known) return wrong(s, "an invalid escape, \\ must be followed by one of \" \\ / b f n r t u");
    *(*to)++ = values[known - names];
    s->at += 2;
    return 0;
}

/* The string at s->at, decoded in place: what comes out is never longer than what went in. */
static int string(struct scan *s, char **bytes, size_t *size) {
    const char *opening = s->at++;
    char *to = s->at;
    *bytes = to;
    for (;;) {
        char *run = s->at;
        while (s->at < s->end && !is_special((unsigned char)*s->at)) s->at++;
        if (to != run) memmove(to, run, (size_t)(s->at - run));
        to += s->at - run;
        if (s->at == s->end) {
            s->at = (char *)opening;
            return wrong(s, "the string that begins here does not end");
        }
        unsigned char c = (unsigned char)*s->at;
        if (c == '"') break;
        if (c == '\\') {
            TRY(escape(s, &to));
            continue;
        }
        if (c < 0x20) return wrong(s, "a control character in a string; it must be written as an escape");
        size_t wide = utf8_size((unsigned char *)s->at, (unsigned char *)s->end);
        if (wide == 0) return wrong(s, "a string is not UTF-8");
        for (size_t i = 0; i < wide; i++) *to++ = *s->at++;
    }
    s->at++;
    *size = (size_t)(to - *bytes);
    return 0;
}

/* ---- other values ------------------------------------------------------------------------------------------------ */

static bool is_digit(unsigned char c) {
    return c >= '0' && c <= '9';
}

static int digits(struct scan *s) {
    if (!is_digit(peek(s))) return wrong(s, "a number needs a digit");
    while (is_digit(peek(s))) s->at++;
    return 0;
}

static int number(struct scan *s) {
    if (peek(s) == '-') s->at++;
    if (peek(s) == '0') {
        s->at++; /* no digit may follow, so what follows must end the value */
    } else {
        TRY(digits(s));
    }
    if (peek(s) == '.') {
        s->at++;
        TRY(digits(s));
    }
    if (peek(s) == 'e' || peek(s) == 'E') {
        s->at++;
        if (peek(s) == '+' || peek(s) == '-') s->at++;
        TRY(digits(s));
    }
    return 0;
}

static int word(struct scan *s, const char *expected) {
    size_t size = strlen(expected);
    if ((size_t)(s->end - s->at) < size || memcmp(s->at, expected, size) != 0) return wrong(s, "a value is expected");
    s->at += size;
    return 0;
}

static int object(struct scan *s, const char *key);
static int array(struct scan *s);

/* Any value. `key` is the rest of the key that leads into this value, "" if it is the one looked for, NULL if it is
 * neither. */
static int value(struct scan *s, const char *key, enum kind *kind) {
    char *bytes;
    size_t size;
    skip_space(s);
    switch (peek(s)) {
    case '{': *kind = KIND_OBJECT; return object(s, key && *key ? key : NULL);
    case '[': *kind = KIND_ARRAY; return array(s);
    case '"':
        *kind = KIND_STRING;
        TRY(string(s, &bytes, &size));
        if (key && !*key) s->found = bytes, s->found_size = size;
        return 0;
    case 't': *kind = KIND_BOOLEAN; return word(s, "true");
    case 'f': *kind = KIND_BOOLEAN; return word(s, "false");
    case 'n': *kind = KIND_NULL; return word(s, "null");
    default: break;
    }
    *kind = KIND_NUMBER;
    if (peek(s) != '-' && !is_digit(peek(s))) return wrong(s, "a value is expected");
    return number(s);
}

/* After an element: is there another one? `closing` is ']' or '}'. */
static int more(struct scan *s, unsigned char closing, bool *another) {
    skip_space(s);
    *another = peek(s) == ',';
    if (!*another && peek(s) != closing) {
        return wrong(s, closing == ']' ? "',' or ']' is expected" : "',' or '}' is expected");
    }
    s->at++;
    return 0;
}

static int enter(struct scan *s) {
    if (s->depth == JSON_SCAN_DEPTH_MAX) {
        return error_input(s->err, "has more than %d arrays and objects within each other (column %zu)",
                           JSON_SCAN_DEPTH_MAX, (size_t)(s->at - s->start) + 1);
    }
    s->depth++;
    s->at++;
    skip_space(s);
    return 0;
}

static int array(struct scan *s) {
    TRY(enter(s));
    bool another = peek(s) != ']';
    if (!another) s->at++;
    while (another) {
        enum kind kind;
        TRY(value(s, NULL, &kind));
        TRY(more(s, ']', &another));
    }
    s->depth--;
    return 0;
}

/* The first `size` bytes of s->key, up to and with the name at `rest`, lead to something of the wrong kind. */
static int wrong_kind(const struct scan *s, const char *rest, size_t name_size, enum kind kind) {
    int size = (int)(rest + name_size - s->key);
    return error_input(s->err, "'%.*s' is %s, it must be %s", size, s->key, kind_names[kind],
                       rest[name_size] ? "an object" : "a string");
}

/* One member. `key` as for value(), but never "". *met: the member that leads on was here before. */
static int member(struct scan *s, const char *key, bool *met) {
    char *name;
    size_t size, name_size = key ? strcspn(key, ".") : 0;
    skip_space(s);
    if (peek(s) != '"') return wrong(s, "a key is expected");
    TRY(string(s, &name, &size));
    skip_space(s);
    if (peek(s) != ':') return wrong(s, "':' is expected");
    s->at++;
    enum kind kind;
    if (!key || size != name_size || memcmp(name, key, size) != 0) return value(s, NULL, &kind);
    if (*met) {
        return error_input(s->err, "'%.*s' is there twice", (int)(key + name_size - s->key), s->key);
    }
    *met = true;
    const char *rest = key + name_size + (key[name_size] == '.');
    TRY(value(s, rest, &kind));
    if (kind != (*rest ? KIND_OBJECT : KIND_STRING)) return wrong_kind(s, key, name_size, kind);
    return 0;
}

static int object(struct scan *s, const char *key) {
    TRY(enter(s));
    bool met = false, another = peek(s) != '}';
    if (!another) s->at++;
    while (another) {
        TRY(member(s, key, &met));
        TRY(more(s, '}', &another));
    }
    s->depth--;
    return 0;
}

/* ---- the whole --------------------------------------------------------------------------------------------------- */

int json_scan_check_key(const char *key, error *err) {
    size_t size = strlen(key);
    if (size == 0 || size > JSON_SCAN_KEY_MAX) {
        return error_input(err, "the key of JSON lines must have 1 to %d bytes; this one has %zu", JSON_SCAN_KEY_MAX,
                           size);
    }
    if (key[0] == '.' || key[size - 1] == '.' || strstr(key, "..")) {
        return error_input(err,
                           "the key of JSON lines '%s' has an empty name; write a name, or names with single dots "
                           "between them, as in meta.text",
                           key);
    }
    return 0;
}

int json_scan_string(char *text, size_t text_size, const char *key, char **found, size_t *size, error *err) {
    struct scan s = {.start = text, .at = text, .end = text + text_size, .key = key, .err = err};
    enum kind kind;
    TRY(value(&s, key, &kind));
    if (kind != KIND_OBJECT) return error_input(err, "is %s, it must be an object", kind_names[kind]);
    skip_space(&s);
    if (s.at < s.end) return wrong(&s, "something follows the object");
    if (!s.found) return error_input(err, "'%s' is missing, it must be a string", key);
    *found = s.found;
    *size = s.found_size;
    return 0;
}
