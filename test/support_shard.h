/* support_shard.h: shards whose content a test knows, and changing a shard's bytes behind its back. Used by the tests
 * of shards and, for its inline part, by their fuzzer. */
#ifndef RIVERRUN_SUPPORT_SHARD_H
#define RIVERRUN_SUPPORT_SHARD_H

#include "data/shard_format.h"
#include <string.h>
#include <xxhash.h>

/* What a sample holds is a function of this alone. */
struct sample {
    uint32_t token_bytes, frame_tokens;
    bool has_mask, planes;
    uint64_t vocab, tokens;
    uint64_t document_tokens; /* every document has this many, the last token being eod, which is vocab - 1; 0: none */
};

int32_t sample_id(const struct sample *s, uint64_t position);
uint8_t sample_mask(const struct sample *s, uint64_t position); /* 1 without masks */
uint64_t sample_documents(const struct sample *s);
struct shard_writer_options sample_options(const struct sample *s);

/* Write it with `threads` threads, handing over `piece` tokens at a time (0: pieces of changing size). Fails the test
 * that calls, if it can't. */
void sample_write(const struct sample *s, const char *path, int threads, size_t piece);

/* Fails the calling test unless the shard at `path` is the sample: info, documents, every token and mask. */
void sample_expect(const struct sample *s, const char *path);

/* Bring the checksums of a header and of its tables up to date after a change, as far as the tables lie in the file:
 * what is wrong then has to be found by looking at the numbers. */
static inline void shard_reseal(unsigned char *bytes, size_t size) {
    struct shard_header h;
    if (size < sizeof h) return;
    memcpy(&h, bytes, sizeof h);
    if (h.seek_offset <= h.document_offset && h.document_offset <= size) {
        h.seek_hash = XXH64(bytes + h.seek_offset, h.document_offset - h.seek_offset, 0);
        h.document_hash = XXH64(bytes + h.document_offset, size - h.document_offset, 0);
    }
    h.header_hash = XXH64(&h, offsetof(struct shard_header, header_hash), 0);
    memcpy(bytes, &h, sizeof h);
}

#endif
