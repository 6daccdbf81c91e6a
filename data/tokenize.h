/* tokenize.h: text files to shards: what `riverrun tokenize` does.
 *
 * Inputs are read in the order given: plain files, .zst, .gz, "-" for standard input; a directory stands for all regular
 * files below it in bytewise order of path. Each input starts a new document; a line equal to `separator` ends one. Memory
 * is constant; reading, encoding and compression run on all cores; the shards' bytes do not depend on the number of threads.
 */
#ifndef RIVERRUN_TOKENIZE_H
#define RIVERRUN_TOKENIZE_H

#include "common/error.h"
#include "data/tokenizer.h"
#include <stdint.h>

struct tokenize_options {
    const char *out;         /* directory; created; must not hold shards yet unless `overwrite` */
    const char *prefix;      /* shard names are PREFIX-00000.rrs */
    const char *separator;   /* "" = do not split */
    uint64_t shard_tokens;   /* a new shard after this many */
    uint32_t frame_tokens;
    int zstd_level;
    int threads;
    bool overwrite;
    void (*progress)(void *self, uint64_t text_bytes, uint64_t tokens, uint64_t documents); /* now and then; may be NULL */
    void *progress_self;
};

struct tokenize_result {
    uint64_t text_bytes, tokens, documents, shards;
};

/* Inputs are checked (they exist, can be opened) before anything is written. On failure nothing new is left in `out`. */
int tokenize(const tokenizer *t, const char *const *inputs, size_t count, const struct tokenize_options *options,
             struct tokenize_result *result, error *err);

/* Write a data set's text back to a stream, separators included: byte for byte what tokenize read (inputs joined). */
int detokenize(const tokenizer *t, const char *dataset_path, int descriptor, error *err);

#endif
