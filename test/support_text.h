/* support_text.h: tokenizing in a test: inputs from memory, shards back to documents and text. Used by the tests of
 * tokenize. Every function fails the calling test if something goes wrong that should not. */
#ifndef RIVERRUN_SUPPORT_TEXT_H
#define RIVERRUN_SUPPORT_TEXT_H

#include "data/tokenize.h"
#include "data/shard.h"

struct text {
    char *bytes; /* malloc'ed */
    size_t size, capacity;
};

void text_add(struct text *t, const char *bytes, size_t size);
void text_free(struct text *t);

struct text_document {
    uint32_t flags;
    size_t start, size; /* in all.bytes */
};

/* The documents of a data set as they are in the shards. */
struct text_documents {
    struct text all;
    struct text_document *list;
    size_t count, capacity;
};

void text_documents_read(struct text_documents *d, const char *directory);
/* What the documents of one input should be, by the plainest means; added to those that are there. */
void text_documents_split(struct text_documents *d, const char *bytes, size_t size, const char *separator);
void text_documents_equal(const struct text_documents *got, const struct text_documents *expected);
void text_documents_free(struct text_documents *d);

/* What detokenize writes. */
struct text text_of(const char *directory);

/* Options that suit most tests: "bytes", the default separator, large shards, frames of 1,000 tokens, 2 threads. */
struct tokenize_options text_options(const char *out);
/* Tokenize with the byte tokenizer. */
int text_tokenize(const char *const *inputs, size_t count, const struct tokenize_options *options,
                  struct tokenize_result *result, error *err);

#endif
