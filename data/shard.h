/* shard.h: the token file: independent zstd frames with checksums, a seek table, document starts, optional target
 * masks. The bytes on disk are specified in docs/formats.md, sufficient to write a reader (scripts/read_shard.py is
 * one).
 *
 * A shard holds a run of tokens. A data set is a directory of shards NAME-00000.rrs, NAME-00001.rrs, ... read in
 * bytewise order of their names as one stream, and the tokenizer.json they were made with. Documents follow each other;
 * each one ends with the end-of-document token (an empty document is that token alone). A document may continue in the
 * next shard.
 */
#ifndef RIVERRUN_SHARD_H
#define RIVERRUN_SHARD_H

#include "common/error.h"
#include <stdbool.h>
#include <stdint.h>

#define SHARD_SUFFIX ".rrs"
#define SHARD_FRAME_TOKENS 4096 /* default tokens in a frame: a shuffled sample of 2,048 touches one or two */
#define SHARD_FRAME_TOKENS_MAX (1 << 22) /* a reader holds a few frames decompressed: 16 MiB each at the most */

/* How a document begins, kept so that `shards cat` gives back the input byte for byte. */
enum shard_document_flags {
    SHARD_DOC_SEPARATED = 0,       /* after a separator line */
    SHARD_DOC_FIRST_OF_INPUT = 1,  /* at the start of an input file: no separator before it */
    SHARD_DOC_UNTERMINATED = 2,    /* after a separator line that was the input's last line and had no newline */
};

struct shard_document {
    uint64_t start; /* token position in this shard */
    uint32_t flags;    /* enum shard_document_flags */
    uint32_t reserved; /* zero: the struct is an entry of the file's document table */
};

struct shard_info {
    char path[4096];
    uint32_t version;
    uint32_t token_bytes;  /* 1, 2 or 4 */
    uint32_t frame_tokens; /* tokens in every frame but the last */
    bool has_mask;         /* one bit a token: does it count as a target */
    bool planes;           /* tokens lie byte plane by byte plane within a frame */
    uint64_t tokens, documents, frames;
    uint64_t text_bytes;   /* bytes of text the tokens stand for */
    uint64_t file_bytes;
    uint64_t vocab;        /* ids are below this */
    int64_t eod;           /* end-of-document id, or -1 */
    uint64_t tokenizer_identity;
    char tokenizer_name[64];
    char separator[256];   /* the separator line without its newline; "" = input was not split */
};

/* --- writing ---------------------------------------------------------------------------------------------------- */
struct shard_writer_options {
    uint32_t token_bytes, frame_tokens;
    int zstd_level; /* 1 to 22 */
    bool has_mask;
    bool planes; /* see shard_planes_pay */
    uint64_t vocab;
    int64_t eod;
    uint64_t tokenizer_identity;
    const char *tokenizer_name, *separator;
};
typedef struct shard_writer shard_writer;

/* The fewest bytes (1, 2 or 4) that hold every id below `vocab`. */
uint32_t shard_token_bytes(uint64_t vocab);
/* Whether the layout in byte planes makes smaller files for tokens of this vocabulary: it does where the upper byte is
 * nearly constant, as with bytes and their end-of-document id. */
bool shard_planes_pay(uint64_t vocab);

/* Would opening accept these options? `path` is for the message. */
int shard_writer_check(const struct shard_writer_options *options, const char *path, error *err);

/* Writes PATH.tmp; shard_writer_finish syncs and renames it to PATH. Frames are compressed by `threads` workers (>= 1)
 * and written in order, so the bytes don't depend on their number. Memory: a few frames a worker and the tables. */
int shard_writer_open(shard_writer **w, const char *path, const struct shard_writer_options *options, int threads,
                      error *err);

/* The next token starts a document; flags: enum shard_document_flags. Every document needs at least one token. */
int shard_writer_document(shard_writer *w, uint32_t flags, error *err);

/* `mask`: a byte a token, not 0 = counts; NULL = all count. */
int shard_writer_append(shard_writer *w, const int32_t *tokens, const uint8_t *mask, size_t count, error *err);
int shard_writer_text_bytes(shard_writer *w, uint64_t bytes); /* add to the count of text bytes; can't fail */

/* Either way of ending frees the writer. After a failed finish, as after abandoning, the .tmp is gone. `info` may be
 * NULL; abandoning NULL is fine. */
int shard_writer_finish(shard_writer *w, struct shard_info *info, error *err);
void shard_writer_abandon(shard_writer *w);

/* --- reading: a shard opened once may be read by many threads, each with its own cursor --------------------------- */
typedef struct shard shard;
typedef struct shard_cursor shard_cursor; /* a zstd context and the last decompressed frames */

/* Checks the header, the seek table and the document table (sizes, order, checksums) before believing any number. */
int shard_open(shard **s, const char *path, error *err);
void shard_close(shard *s);
const struct shard_info *shard_get_info(const shard *s);
const struct shard_document *shard_documents(const shard *s); /* info.documents entries, ascending */
uint64_t shard_document_from(const shard *s, uint64_t position); /* index of the first that starts there or later */

int shard_cursor_open(shard_cursor **c, error *err);
void shard_cursor_close(shard_cursor *c);
/* Tokens [from, from+count) as int32, and their mask bytes (1 = counts) if mask is not NULL. Every touched frame's
 * checksums and ids are checked. Thread-safe for distinct cursors. */
int shard_read(const shard *s, shard_cursor *c, uint64_t from, size_t count, int32_t *tokens, uint8_t *mask,
               error *err);

/* Decompress and check everything: every frame against its checksums, ids below vocab, each document after the first
 * preceded by the end-of-document id. Of several faults the first in the file is reported. shard_verify_with spreads
 * the frames over `threads` threads. */
int shard_verify(const char *path, struct shard_info *info, error *err);
int shard_verify_with(const char *path, int threads, struct shard_info *info, error *err);

/* --- a data set: the shards of a directory (or a single file) as one stream -------------------------------------- */
/* `tokenize` keeps a directory with this suffix beside the shards while it renames them into place; where one is found,
 * shards may be missing. */
#define DATASET_COMMIT_SUFFIX ".riverrun-commit"

typedef struct dataset dataset;
struct dataset_info {
    uint64_t tokens, documents, text_bytes;
    size_t shards;
    bool has_mask;
    uint64_t vocab;
    int64_t eod;
    uint64_t tokenizer_identity;
    char tokenizer_name[64];
    char tokenizer_path[4096]; /* tokenizer.json in the directory, or "" */
};
/* All shards must agree on tokenizer, vocabulary and mask; a disagreement names both files. A tokenizer.json beside
 * them must be the one they were made with. */
int dataset_open(dataset **d, const char *path, error *err);
void dataset_close(dataset *d);
const struct dataset_info *dataset_get_info(const dataset *d);
/* As shard_read, by position in the stream. */
int dataset_read(const dataset *d, shard_cursor *c, uint64_t from, size_t count, int32_t *tokens, uint8_t *mask,
                 error *err);
/* Document starts p with from <= p < from+count, as positions in the stream, ascending; at most `max` are written, the
 * number there are is returned. */
size_t dataset_document_starts(const dataset *d, uint64_t from, size_t count, uint64_t *starts, size_t max);
const shard *dataset_shard(const dataset *d, size_t index);

#endif
