/* support_corpus.h: data sets made for tests: tokens, masks and document starts that the test knows, as shards on
 * disk. Used by the tests of the loader and of the data options. A failure to make one fails the test that asked. */
#ifndef RIVERRUN_SUPPORT_CORPUS_H
#define RIVERRUN_SUPPORT_CORPUS_H

#include "data/row_source.h"

struct corpus_plan {
    const char *directory; /* created; its shards are part-00000.rrs, ... */
    uint64_t tokens;
    int32_t first_id;         /* token p is first_id + p, so that a row tells where it came from */
    uint64_t vocab;           /* 0: first_id + tokens */
    uint32_t token_bytes;     /* 0: 4 */
    uint32_t frame_tokens;    /* 0: 64 */
    uint64_t shard_sizes[4];  /* tokens of the shards; the last one that is not 0 repeats; none: one shard */
    bool has_mask;            /* about a third of the tokens don't count, by `key` */
    uint64_t document_tokens; /* mean length of a document, by `key`; 0: one document */
    uint64_t key;
    uint64_t tokenizer_identity;
};

struct corpus {
    uint64_t tokens;
    int32_t *ids;
    uint8_t *mask;   /* 1 = counts */
    uint8_t *starts; /* 1 = the token starts a document */
    dataset *data;   /* open */
    row_source *rows; /* open: the same as a source of rows; it needs `path` */
    char path[4096];
};

void corpus_make(struct corpus *c, const struct corpus_plan *plan);
void corpus_free(struct corpus *c);

/* Write tokens with their masks and document starts as the shards of a plan (tokens, first_id and key are not looked
 * at), and open them. ids, mask and starts are copied. */
void corpus_write(struct corpus *c, const struct corpus_plan *plan, const int32_t *ids, const uint8_t *mask,
                  const uint8_t *starts, uint64_t count);

#endif
