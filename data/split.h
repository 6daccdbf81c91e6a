/* split.h: one input's bytes cut into documents at separator lines. */
#ifndef RIVERRUN_SPLIT_H
#define RIVERRUN_SPLIT_H

#include "common/error.h"
#include "data/input_stream.h"
#include <stdint.h>

#define SPLIT_SEPARATOR_MAX 255 /* bytes in a separator line: what a shard's header holds */

/* Where the documents go. Every function returns 0, or -1 with *err filled, which ends the splitting. */
struct split_sink {
    int (*begin)(void *self, uint32_t flags, error *err);                /* enum shard_document_flags */
    int (*text)(void *self, const char *bytes, size_t size, error *err); /* a part of the document's text, size >= 1 */
    int (*end)(void *self, error *err);
    void *self;
};

/* A separator line is a line that equals `separator` to the byte; the newline that ends it belongs to it, the one
 * before it to the document before. The input's start begins a document, each separator line ends one and begins the
 * next, the input's end ends the last: n separator lines make n + 1 documents, of which any may be empty. "" splits
 * nothing. */
int split_documents(input_stream *s, const char *separator, const struct split_sink *sink, error *err);

#endif
