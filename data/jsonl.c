/* jsonl.c: cuts a stream into lines and takes the text out of each; see jsonl.h.
 *
 * Owns the buffer of lines. Called by the reading thread of tokenize (data/encode_pipeline.c).
 */
#include "data/jsonl.h"

#include "common/limits.h"
#include "data/json_scan.h"
#include "data/shard.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { BUFFER_BYTES = 1 << 20 }; /* to begin with; a line that is longer makes it grow */

struct lines {
    input_stream *input;
    char *buffer;
    size_t capacity;
    size_t start, end; /* bytes that were read and not yet used */
    size_t searched;   /* of these, so many hold no newline */
    bool ended;
    uint64_t number; /* of the line that is being read, from 1 */
};

/* Room for more bytes behind those that are there. */
static int make_room(struct lines *l, error *err) {
    if (l->start > 0) {
        memmove(l->buffer, l->buffer + l->start, l->end - l->start);
        l->end -= l->start;
        l->start = 0;
    }
    if (l->end < l->capacity) return 0;
    /* One byte past the limit tells a line that is too long from one that just fits. */
    const size_t most = (size_t)LIMIT_JSON_LINE + 1;
    if (l->capacity == most) {
        return error_input(err, "%s:%" PRIu64 ": the line has more than %d MiB; split it, or leave it out",
                           input_name(l->input), l->number, LIMIT_JSON_LINE >> 20);
    }
    size_t larger = 2 * l->capacity < most ? 2 * l->capacity : most;
    char *grown = realloc(l->buffer, larger);
    if (!grown) return error_system(err, "no memory for a line of %zu bytes of %s", larger, input_name(l->input));
    l->buffer = grown;
    l->capacity = larger;
    return 0;
}

/* The next line without its newline, valid until the next call, writable; *line = NULL at the end. */
static int next_line(struct lines *l, char **line, size_t *size, error *err) {
    *line = NULL;
    l->number++;
    for (;;) {
        char *from = l->buffer + l->start, *newline = NULL;
        size_t there = l->end - l->start;
        if (there > l->searched) newline = memchr(from + l->searched, '\n', there - l->searched);
        if (newline || (l->ended && there > 0)) {
            *line = from;
            *size = newline ? (size_t)(newline - from) : there;
            l->start += *size + (newline != NULL);
            l->searched = 0;
            return 0;
        }
        if (l->ended) return 0;
        l->searched = there;
        TRY(make_room(l, err));
        size_t got;
        TRY(input_read(l->input, l->buffer + l->end, l->capacity - l->end, &got, err));
        l->end += got;
        l->ended = got == 0;
    }
}

static bool is_blank(const char *line, size_t size) {
    for (size_t i = 0; i < size; i++) {
        if (line[i] != ' ' && line[i] != '\t' && line[i] != '\r') return false;
    }
    return true;
}

static int run(struct lines *l, const char *key, const struct split_sink *sink, error *err) {
    for (;;) {
        char *line, *text;
        size_t size;
        TRY(next_line(l, &line, &size, err));
        if (!line) return 0;
        if (is_blank(line, size)) continue;
        if (json_scan_string(line, size, key, &text, &size, err) != 0) {
            return error_context(err, "%s:%" PRIu64, input_name(l->input), l->number);
        }
        TRY(sink->begin(sink->self, SHARD_DOC_FIRST_OF_INPUT, err));
        if (size > 0) TRY(sink->text(sink->self, text, size, err));
        TRY(sink->end(sink->self, err));
    }
}

int jsonl_documents(input_stream *s, const char *key, const struct split_sink *sink, error *err) {
    struct lines l = {.input = s, .capacity = BUFFER_BYTES, .buffer = malloc(BUFFER_BYTES)};
    if (!l.buffer) return error_system(err, "no memory to read the lines of %s", input_name(s));
    int failed = run(&l, key, sink, err);
    free(l.buffer);
    return failed;
}
