/* shard_format.h: the structures of a shard as they lie on disk, shared by its writer and its reader.
 *
 * A shard file is: header, frames back to back, seek table (one entry a frame), document table (one entry a document),
 * nothing between and nothing after. All integers are little-endian. docs/formats.md is the specification; this file is
 * its translation into C.
 *
 * A frame decompresses to the bytes of its tokens and, in shards with masks, one bit a token behind them. The tokens
 * lie one after the other or, in the layout "planes", first the lowest byte of every token, then the next byte of every
 * token and so on: where the high bytes say little that saves a quarter of the space.
 */
#ifndef RIVERRUN_SHARD_FORMAT_H
#define RIVERRUN_SHARD_FORMAT_H

#include "data/shard.h"
#include <stddef.h>
#include <stdint.h>

#define SHARD_VERSION 1
/* As in PNG, the first bytes tell apart a shard from text, and from one that went through a text-mode copy. */
#define SHARD_MAGIC "\x89RRS\r\n\x1a\n"
#define SHARD_MAGIC_BYTES 8

enum shard_header_flags {
    SHARD_HAS_MASK = 1, /* every frame carries mask bits */
    SHARD_PLANES = 2,   /* tokens are stored plane by plane */
    SHARD_FLAGS_KNOWN = SHARD_HAS_MASK | SHARD_PLANES,
};

struct shard_header {
    char magic[SHARD_MAGIC_BYTES];
    uint32_t version;
    uint32_t header_bytes; /* sizeof(struct shard_header) */
    uint32_t flags;        /* enum shard_header_flags */
    uint32_t token_bytes;
    uint32_t frame_tokens;
    uint32_t reserved_0; /* zero, as all that is reserved */
    uint64_t tokens, documents, frames;
    uint64_t text_bytes;
    uint64_t vocab;
    int64_t eod;
    uint64_t tokenizer_identity;
    uint64_t seek_offset;     /* of the seek table, where the last frame ends */
    uint64_t document_offset; /* of the document table, where the seek table ends */
    uint64_t file_bytes;      /* where the document table ends */
    uint64_t seek_hash;       /* XXH64, seed 0, of the seek table */
    uint64_t document_hash;   /* XXH64, seed 0, of the document table */
    char tokenizer_name[64];  /* zero-filled, at least one zero */
    char separator[256];      /* likewise */
    char reserved_1[56];
    uint64_t header_hash; /* XXH64, seed 0, of the header's bytes before this field */
};

struct shard_seek {
    uint64_t offset; /* of the frame, in the file */
    uint64_t bytes;  /* compressed */
    uint64_t hash;   /* XXH64, seed 0, of what it decompresses to */
};

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are read and written as they lie in memory");
_Static_assert(sizeof(struct shard_header) == 512, "the header is 512 bytes on disk");
_Static_assert(offsetof(struct shard_header, tokens) == 32, "no padding before the counts");
_Static_assert(offsetof(struct shard_header, tokenizer_name) == 128, "no padding before the names");
_Static_assert(offsetof(struct shard_header, header_hash) == 504, "the header's hash is its last field");
_Static_assert(sizeof(struct shard_seek) == 24, "a seek entry is 24 bytes on disk");
_Static_assert(sizeof(struct shard_document) == 16, "a document entry is 16 bytes on disk");
_Static_assert(offsetof(struct shard_document, reserved) == 12, "a document entry has no padding");

/* Bytes that a frame of `tokens` tokens decompresses to. */
static inline size_t shard_frame_bytes(uint32_t tokens, uint32_t token_bytes, bool has_mask) {
    return (size_t)tokens * token_bytes + (has_mask ? ((size_t)tokens + 7) / 8 : 0);
}

/* What a header says, in the form that callers see. The header must have been checked. In shard_reader.c. */
void shard_info_fill(struct shard_info *info, const char *path, const struct shard_header *header);

#endif
