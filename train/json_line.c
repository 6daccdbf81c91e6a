/* json_line.c: the builder of json_line.h. Called by report.c and command_eval.c. */
#include "train/json_line.h"

#include "common/error.h"
#include "common/text.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

/* Bytes that strings leave free: for what ends them, the keys and numbers behind them, and the end of the line. */
enum { ROOM = 2048 };

static bool add_within(struct json_line *l, const char *text, size_t limit) {
    size_t size = strlen(text);
    if (l->used + size >= limit) return false;
    memcpy(l->text + l->used, text, size + 1);
    l->used += size;
    return true;
}

static void add(struct json_line *l, const char *text) {
    bool fits = add_within(l, text, JSON_LINE - 4);
    ASSERT(fits); /* keys and numbers of one line are far fewer than fill the room for them */
}

static void add_key(struct json_line *l, const char *key) {
    add(l, l->used > 1 ? ",\"" : "\"");
    add(l, key);
    add(l, "\":");
}

void json_line_begin(struct json_line *l) {
    l->used = 0;
    add(l, "{");
}

void json_line_real(struct json_line *l, const char *key, double value) {
    char number[40];
    add_key(l, key);
    add(l, isfinite(value) ? text_real(number, sizeof number, value) : "null");
}

void json_line_int(struct json_line *l, const char *key, int64_t value) {
    char number[40];
    add_key(l, key);
    snprintf(number, sizeof number, "%lld", (long long)value);
    add(l, number);
}

void json_line_bool(struct json_line *l, const char *key, bool value) {
    add_key(l, key);
    add(l, value ? "true" : "false");
}

/* Length of the UTF-8 character at `text`, 0 if there is none. Overlong forms and surrogates are none. */
static int character_size(const unsigned char *text) {
    unsigned char c = text[0];
    int size = c < 0x80 ? 1 : c >= 0xC2 && c < 0xE0 ? 2 : c >= 0xE0 && c < 0xF0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 : 0;
    for (int i = 1; i < size; i++) {
        if ((text[i] & 0xC0) != 0x80) return 0;
    }
    bool wrong = (c == 0xE0 && text[1] < 0xA0) || (c == 0xED && text[1] > 0x9F) || (c == 0xF0 && text[1] < 0x90) ||
                 (c == 0xF4 && text[1] > 0x8F);
    return wrong ? 0 : size;
}

static bool add_character(struct json_line *l, const unsigned char *text, int size) {
    char out[8];
    if (size == 0) return add_within(l, "\xEF\xBF\xBD", JSON_LINE - ROOM);
    if (size == 1 && (*text < ' ' || *text == '"' || *text == '\\')) {
        snprintf(out, sizeof out, *text < ' ' ? "\\u%04x" : "\\%c", *text);
    } else {
        memcpy(out, text, (size_t)size);
        out[size] = '\0';
    }
    return add_within(l, out, JSON_LINE - ROOM);
}

void json_line_string(struct json_line *l, const char *key, const char *value) {
    size_t start = l->used;
    bool fits = true;
    add_key(l, key);
    add(l, "\"");
    for (const unsigned char *at = (const unsigned char *)value; *at && fits;) {
        int size = character_size(at);
        fits = add_character(l, at, size);
        at += size ? size : 1;
    }
    if (fits) {
        add(l, "\"");
    } else {
        l->used = start;
        l->text[start] = '\0';
    }
}

void json_line_end(struct json_line *l) {
    memcpy(l->text + l->used, "}\n", 3);
    l->used += 2;
}
