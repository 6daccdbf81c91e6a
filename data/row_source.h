/* row_source.h: where rows of tokens and targets come from: what the loader and evaluation read.
 *
 * A source holds samples, each one row of T inputs with a target for every input. Two kinds fill this interface:
 *   shards   a data set (data/shard.h) cut into rows: sample i holds inputs [i*T, i*T+T) and the token that follows
 *            each of them as its target
 *   a task   a generated one (data/task.h): sample i is made from the task's seed and i
 * Sample i is the same whoever asks, in any order and from any thread; what a caller needs for reading is its own
 * reader.
 */
#ifndef RIVERRUN_ROW_SOURCE_H
#define RIVERRUN_ROW_SOURCE_H

#include "data/shard.h"

/* What one thread reads with. */
struct row_reader {
    shard_cursor *cursor;
    void *scratch; /* the caller's: row_source_scratch bytes of the source that needs most */
};

struct row_source_info {
    const char *path;                  /* as the source was opened; for messages */
    uint64_t vocab;                    /* ids are below this */
    int64_t length;                    /* inputs that a row needs at least: a task's longest sample; 1 for shards */
    bool separate;                     /* every row stands alone (a task); false: rows follow each other as a stream */
    const struct dataset_info *shards; /* what the data set is; NULL for a task */
    const char *task;                  /* the kind of a task; NULL for shards */
};

typedef struct row_source row_source;

/* What a kind of source implements; the functions below call it. */
struct row_source_class {
    void (*close)(row_source *s);
    uint64_t (*inputs)(const row_source *s, int64_t T);
    size_t (*scratch)(const row_source *s, int64_t T);
    int (*check)(const row_source *s, const char *name, int64_t T, error *err);
    int (*read)(const row_source *s, struct row_reader *r, uint64_t sample, int64_t T, int64_t count, int32_t *tokens,
                int32_t *targets, int32_t *doc, error *err);
};
struct row_source { /* what every kind begins with */
    const struct row_source_class *class;
    struct row_source_info info;
};

/* The data set at `path` (a directory of shards or one shard); `path` must outlive the source. */
int row_source_open_shards(row_source **s, const char *path, error *err);
void row_source_close(row_source *s); /* NULL is fine */

static inline const struct row_source_info *row_source_get_info(const row_source *s) { return &s->info; }

/* Inputs that have a target: samples 0 .. inputs/T - 1 are whole rows, and the rest, if any, are the first inputs of
 * one more. A task has whole samples only. Refusals of T are row_source_check's. */
uint64_t row_source_inputs(const row_source *s, int64_t T);

/* Refuse a T for which the source has no whole row, or that a sample does not fit in; `name` is the source's, for the
 * message. */
int row_source_check(const row_source *s, const char *name, int64_t T, error *err);

/* Sources that can't feed one model: of different tokenizers or vocabularies. a_name and b_name (paths, or "source
 * 'x'") go into the message. */
int row_source_same_tokens(const row_source *a, const char *a_name, const row_source *b, const char *b_name,
                           error *err);

size_t row_source_scratch(const row_source *s, int64_t T);
int row_reader_open(struct row_reader *r, error *err); /* scratch is given before or after */
void row_reader_close(struct row_reader *r);

/* The first `count` <= T inputs of a sample, as a row: tokens (T), 0 behind the inputs; targets (T), -1 where masked
 * and behind the inputs; doc (T), or NULL: documents numbered as kernels/ops.h wants, 0 for the row's first unless its
 * first token starts one, then 1. */
int row_source_read(const row_source *s, struct row_reader *r, uint64_t sample, int64_t T, int64_t count,
                    int32_t *tokens, int32_t *targets, int32_t *doc, error *err);

#endif
