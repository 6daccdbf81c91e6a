/* tokenize.h: text files to shards: what `riverrun tokenize` does.
 *
 * Inputs are read in the order given: plain files, .zst, .gz, "-" for standard input; a directory stands for all
 * regular files below it in bytewise order of path. Each input starts a new document; a line equal to `separator` ends
 * one. Or inputs are JSON lines, each line a document. Memory is constant, but for a JSON line, which is held whole;
 * reading, encoding and compression run on all cores; the shards' bytes do not depend on the number of threads.
 */
#ifndef RIVERRUN_TOKENIZE_H
#define RIVERRUN_TOKENIZE_H

#include "common/error.h"
#include "data/tokenizer.h"
#include <stdatomic.h>
#include <stdint.h>

#define TOKENIZE_SEPARATOR "<|endoftext|>"           /* what document collections commonly use */
#define TOKENIZE_SHARD_DOCUMENTS (UINT64_C(1) << 22) /* a shard ends after this many, to bound its document table */

struct tokenize_options {
    const char *out;         /* directory; created; must not hold shards yet unless `overwrite` */
    const char *prefix;      /* shard names are PREFIX-00000.rrs */
    const char *separator;   /* a line without its newline, at most 255 bytes; "" = do not split */
    const char *jsonl_key;   /* inputs are JSON lines, this leads to their text (data/json_scan.h); NULL = plain text */
    uint64_t shard_tokens;   /* a new shard after this many */
    uint32_t frame_tokens;
    int zstd_level;
    int threads;
    bool overwrite;
    /* Called now and then from the calling thread; may be NULL. */
    void (*progress)(void *self, uint64_t text_bytes, uint64_t tokens, uint64_t documents);
    void *progress_self;
    const atomic_bool *interrupted; /* true: stop and leave nothing behind; may be NULL */
};

struct tokenize_result {
    uint64_t text_bytes, tokens, documents, shards;
    uint64_t file_bytes; /* of all shards */
};

/* Inputs are checked (they exist, can be read) before anything is written. On failure nothing new is left in `out`:
 * shards are made in a temporary directory there and appear together when all are complete (data/stage.h). */
int tokenize(const tokenizer *t, const char *const *inputs, size_t count, const struct tokenize_options *options,
             struct tokenize_result *result, error *err);

/* Write a data set's text back to a stream, separators included: byte for byte what tokenize read (inputs joined). */
int detokenize(const tokenizer *t, const char *dataset_path, int descriptor, error *err);

#endif
