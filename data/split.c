/* split.c: finds separator lines in a stream of bytes with a fixed buffer, as split.h describes.
 *
 * Called by the reading thread of tokenize.
 */
#include "data/split.h"

#include "data/shard.h"
#include <stdlib.h>
#include <string.h>

enum { BUFFER_BYTES = 1 << 18 };

struct splitter {
    input_stream *input;
    const char *separator;
    size_t separator_size;
    const struct split_sink *sink;
    char buffer[BUFFER_BYTES];
    size_t start, end; /* bytes read and not yet passed on */
    bool ended;
    bool line_start; /* buffer[start] is the first byte of a line */
};

/* Have at least `wanted` bytes in the buffer, or all that are left. */
static int have(struct splitter *p, size_t wanted, error *err) {
    if (p->end - p->start >= wanted || p->ended) return 0;
    memmove(p->buffer, p->buffer + p->start, p->end - p->start);
    p->end -= p->start;
    p->start = 0;
    while (p->end < wanted && !p->ended) {
        size_t got;
        TRY(input_read(p->input, p->buffer + p->end, BUFFER_BYTES - p->end, &got, err));
        p->end += got;
        p->ended = got == 0;
    }
    return 0;
}

/* Is there a separator line at `at`? All of it is in the buffer, if so. */
static bool is_separator(const struct splitter *p, size_t at) {
    size_t size = p->separator_size, there = p->end - at;
    if (size == 0 || there < size || memcmp(p->buffer + at, p->separator, size) != 0) return false;
    return there == size ? p->ended : p->buffer[at + size] == '\n';
}

/* End the document, begin the next, and step over the separator line at the buffer's start. */
static int cross_separator(struct splitter *p, error *err) {
    bool unterminated = p->end - p->start == p->separator_size;
    TRY(p->sink->end(p->sink->self, err));
    TRY(p->sink->begin(p->sink->self, unterminated ? SHARD_DOC_UNTERMINATED : SHARD_DOC_SEPARATED, err));
    p->start += p->separator_size + !unterminated;
    p->line_start = !unterminated;
    return 0;
}

/* Pass on text: whole lines up to the next separator line or to a line too near to the buffer's end to be judged. */
static int pass_text(struct splitter *p, error *err) {
    size_t at = p->start;
    do {
        const char *newline = p->separator_size ? memchr(p->buffer + at, '\n', p->end - at) : NULL;
        p->line_start = newline != NULL;
        at = newline ? (size_t)(newline - p->buffer) + 1 : p->end;
    } while (at < p->end && !is_separator(p, at) && (p->ended || p->end - at > p->separator_size));
    size_t from = p->start;
    p->start = at;
    return p->sink->text(p->sink->self, p->buffer + from, at - from, err);
}

static int run(struct splitter *p, error *err) {
    TRY(p->sink->begin(p->sink->self, SHARD_DOC_FIRST_OF_INPUT, err));
    for (;;) {
        TRY(have(p, p->separator_size + 1, err));
        if (p->start == p->end) break;
        if (p->line_start && is_separator(p, p->start)) {
            TRY(cross_separator(p, err));
        } else {
            TRY(pass_text(p, err));
        }
    }
    return p->sink->end(p->sink->self, err);
}

int split_documents(input_stream *s, const char *separator, const struct split_sink *sink, error *err) {
    ASSERT(strlen(separator) <= SPLIT_SEPARATOR_MAX);
    struct splitter *p = malloc(sizeof *p);
    if (!p) return error_system(err, "no memory to split the input into documents");
    p->input = s;
    p->separator = separator;
    p->separator_size = strlen(separator);
    p->sink = sink;
    p->start = p->end = 0;
    p->ended = false;
    p->line_start = true;
    int failed = run(p, err);
    free(p);
    return failed;
}
