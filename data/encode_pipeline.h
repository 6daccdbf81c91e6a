/* encode_pipeline.h: inputs to token ids on several threads, handed over in order.
 *
 * One thread reads and splits the inputs into blocks of text, `threads` threads encode blocks, the caller takes them in
 * order. Where a block ends does not depend on timing, nor on how reads were cut. A document longer than a block is
 * encoded in parts, cut where the tokenizer says that it makes no difference (tokenizer_last_cut). Memory is a fixed
 * number of blocks, which grow only where a document has no such place, up to 1 GiB of text.
 */
#ifndef RIVERRUN_ENCODE_PIPELINE_H
#define RIVERRUN_ENCODE_PIPELINE_H

#include "common/error.h"
#include "data/input_list.h"
#include "data/tokenizer.h"
#include <stdatomic.h>
#include <stdint.h>

struct document_mark {
    size_t at;      /* index in ids of the document's first token */
    uint32_t flags; /* enum shard_document_flags */
};

/* A run of tokens, the end-of-document ids included. */
struct encoded_block {
    const int32_t *ids;
    size_t id_count;
    const struct document_mark *marks; /* documents that start in this block, ascending */
    size_t mark_count;
    uint64_t text_bytes; /* of text that the ids stand for */
};

typedef struct encode_pipeline encode_pipeline;

/* `jsonl_key`: NULL, and inputs are text that is split at `separator`; or inputs are JSON lines (data/jsonl.h), and
 * `separator` does not matter. The tokenizer, the list and the strings must outlive the pipeline. *interrupted (may be
 * NULL) is looked at while the caller waits; once it is true, the pipeline stops. */
int encode_pipeline_open(encode_pipeline **p, const tokenizer *t, const struct input_list *inputs,
                         const char *separator, const char *jsonl_key, int threads, const atomic_bool *interrupted,
                         error *err);

/* The next block, valid until the next call; *block = NULL at the end of the last input. */
int encode_pipeline_next(encode_pipeline *p, const struct encoded_block **block, error *err);

void encode_pipeline_close(encode_pipeline *p); /* stops and joins the threads, wherever they are; NULL is fine */

#endif
