/* bpe.h: byte pair encoding of one word: bytes to ids, by merging neighbours. */
#ifndef RIVERRUN_BPE_H
#define RIVERRUN_BPE_H

#include "common/error.h"
#include <stdint.h>

/* Two neighbours `pair` (left id << 32 | right id) become `id`; of several pairs that of the lowest rank comes first.
 */
struct bpe_merge {
    uint64_t pair;
    uint32_t rank;
    int32_t id;
};

struct bpe {
    int32_t byte_ids[256];   /* -1: the vocabulary has no token for this byte */
    struct bpe_merge *table; /* open addressing; a pair of all ones is an empty place */
    unsigned shift;          /* 64 - log2(places) */
    size_t mask;             /* places - 1 */
};

int bpe_open(struct bpe *b, size_t merges, error *err); /* with room for `merges` merges */
void bpe_close(struct bpe *b);

/* Adds a merge; false if this pair has one. */
bool bpe_add(struct bpe *b, const struct bpe_merge *merge);

/* Room for the words of one thread, all zero at first. */
struct bpe_scratch {
    void *memory;
    size_t capacity;
};

/* The ids of a word of size >= 1 bytes, at most one a byte, into `ids`, which has room for `size`: repeatedly the pair
 * of the lowest rank is merged, of equals the leftmost. Every byte has an id. */
int bpe_encode(const struct bpe *b, struct bpe_scratch *s, const char *word, size_t size, int32_t *ids, size_t *count,
               error *err);

#endif
