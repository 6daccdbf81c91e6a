/* pattern.c: reads block patterns (pattern.h) by recursive descent, expanding repetitions as it goes: a repeated item
 * is the run of blocks it appended, copied. Called by model_config.c; keeps nothing. */
#include "model/pattern.h"

#include <ctype.h>
#include <stdint.h>
#include <string.h>

#define DEPTH_MAX 32 /* parentheses within parentheses: far more than makes sense, far less than overflows a stack */

struct reader {
    struct pattern *p;
    const char *text, *at;
    error *err;
};

static int refuse(struct reader *r, const char *expected) {
    long position = (long)(r->at - r->text) + 1;
    if (*r->at)
        return error_input(r->err, "model.pattern = '%.200s': expected %s at character %ld, not '%c'", r->text,
                           expected, position, isprint((unsigned char)*r->at) ? *r->at : '?');
    return error_input(r->err, "model.pattern = '%.200s': expected %s at its end, character %ld", r->text, expected,
                       position);
}

static void skip_spaces(struct reader *r) {
    while (*r->at == ' ' || *r->at == '\t') r->at++;
}

static bool starts_name(char c) {
    return isalpha((unsigned char)c) || c == '_';
}

static bool continues_name(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == '-';
}

static int too_many(struct reader *r) {
    return error_input(r->err, "model.pattern = '%.200s' stands for more than %d blocks, the most a model may have",
                       r->text, LIMIT_LAYERS);
}

/* Index of the name at the reader, noted if it is new; -1 with an error. */
static int read_name(struct reader *r) {
    const char *start = r->at;
    while (continues_name(*r->at)) r->at++;
    size_t length = (size_t)(r->at - start);
    struct pattern *p = r->p;
    if (length >= PATTERN_NAME)
        return error_input(r->err, "model.pattern: the block name '%.80s...' is longer than %d characters", start,
                           PATTERN_NAME - 1);
    for (int i = 0; i < p->name_count; i++)
        if (strlen(p->names[i]) == length && memcmp(p->names[i], start, length) == 0) return i;
    if (p->name_count == LIMIT_BLOCK_KINDS)
        return error_input(r->err, "model.pattern = '%.200s' names more than %d different blocks", r->text,
                           LIMIT_BLOCK_KINDS);
    memcpy(p->names[p->name_count], start, length);
    p->names[p->name_count][length] = 0;
    return p->name_count++;
}

static int read_count(struct reader *r, int *count) {
    *count = 1;
    skip_spaces(r);
    if (*r->at != '*') return 0;
    r->at++;
    skip_spaces(r);
    if (!isdigit((unsigned char)*r->at)) return refuse(r, "a count");
    const char *start = r->at;
    int64_t value = 0;
    for (; isdigit((unsigned char)*r->at); r->at++)
        if (value <= LIMIT_LAYERS) value = 10 * value + (*r->at - '0');
    if (continues_name(*r->at)) return refuse(r, "a space");
    if (value > LIMIT_LAYERS) return too_many(r);
    if (value == 0) {
        r->at = start;
        return refuse(r, "a count of 1 or more");
    }
    *count = (int)value;
    return 0;
}

/* Append copies of the blocks from `first` on, so that they stand there `count` times. */
static int repeat(struct reader *r, int first, int count) {
    struct pattern *p = r->p;
    int length = p->block_count - first;
    if (length > (LIMIT_LAYERS - first) / count) return too_many(r);
    for (int i = 1; i < count; i++)
        memcpy(&p->blocks[first + i * length], &p->blocks[first], (size_t)length * sizeof *p->blocks);
    p->block_count = first + count * length;
    return 0;
}

static int read_items(struct reader *r, int depth) {
    static const char item[] = "a block's name or '('";
    int items = 0;
    for (;; items++) {
        skip_spaces(r);
        int first = r->p->block_count, count;
        if (*r->at == '(') {
            if (depth == DEPTH_MAX)
                return error_input(r->err, "model.pattern has more than %d parentheses within each other", DEPTH_MAX);
            r->at++;
            TRY(read_items(r, depth + 1));
            if (*r->at != ')') return refuse(r, "a block's name, '(' or ')'");
            r->at++;
        } else if (starts_name(*r->at)) {
            int name = read_name(r);
            if (name < 0) return -1;
            if (first == LIMIT_LAYERS) return too_many(r);
            r->p->blocks[r->p->block_count++] = name;
        } else {
            return items > 0 ? 0 : refuse(r, item);
        }
        TRY(read_count(r, &count));
        TRY(repeat(r, first, count));
    }
}

int pattern_parse(struct pattern *p, const char *text, error *err) {
    memset(p, 0, sizeof *p);
    struct reader r = {.p = p, .text = text, .at = text, .err = err};
    TRY(read_items(&r, 0));
    if (*r.at) return refuse(&r, "a block's name, '(', '*' or the end");
    return 0;
}
