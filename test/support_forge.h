/* support_forge.h: shards put together by hand, so that they can lie: every number may be changed while the checksums
 * are those of what is written. Without a lie the bytes equal the writer's. Used by the tests of damaged shards. */
#ifndef RIVERRUN_SUPPORT_FORGE_H
#define RIVERRUN_SUPPORT_FORGE_H

#include "test/support_shard.h"

enum { FORGE_FRAMES = 8, FORGE_DOCUMENTS = 16, FORGE_BYTES = 1024 };

struct forged_frame {
    unsigned char raw[FORGE_BYTES], packed[FORGE_BYTES];
    size_t raw_size, packed_size;
};

struct forgery {
    struct shard_header header;
    struct forged_frame frames[FORGE_FRAMES];
    struct shard_seek seek[FORGE_FRAMES];
    struct shard_document documents[FORGE_DOCUMENTS];
    size_t frame_count, document_count;
    unsigned char bytes[FORGE_FRAMES * FORGE_BYTES + 4096]; /* the file */
    size_t size;
};

/* A lie changes the forgery between two of its steps; NULL tells the truth. */
typedef void forge_lie(struct forgery *f);

/* Tokens to raw frames, about_tokens; compression, about_frames; layout, about_numbers; checksums and the file. */
void forge(struct forgery *f, const struct sample *s, forge_lie *about_tokens, forge_lie *about_frames,
           forge_lie *about_numbers);

/* Compress a frame's raw bytes as the writer does. */
void forge_pack(struct forged_frame *frame);

#endif
