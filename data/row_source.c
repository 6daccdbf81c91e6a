/* row_source.c: the calls of row_source.h, and shards as a source of rows. Called by the loader, evaluation and the
 * data options; data/task.c is the other kind of source. */
#include "data/row_source.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- shards ------------------------------------------------------------------------------------------------------ */

struct shard_rows {
    row_source base;
    dataset *data;
};

static const dataset *data_of(const row_source *s) { return ((const struct shard_rows *)s)->data; }

static void shards_close(row_source *s) {
    dataset_close(((struct shard_rows *)s)->data);
    free(s);
}

static uint64_t shards_inputs(const row_source *s, int64_t T) {
    (void)T;
    uint64_t tokens = s->info.shards->tokens;
    return tokens > 0 ? tokens - 1 : 0;
}

static int shards_check(const row_source *s, const char *name, int64_t T, error *err) {
    uint64_t tokens = s->info.shards->tokens;
    if (tokens < 2) {
        return error_input(err, "source '%s' holds %" PRIu64 " tokens; a data set to learn from needs at least 2", name,
                           tokens);
    }
    if (tokens - 1 >= (uint64_t)T) return 0;
    return error_input(err,
                       "sequence length (data.seq_len) %" PRId64 " is too long for source '%s', which holds %" PRIu64
                       " tokens: with the token that follows a row, at most %" PRIu64 " is possible",
                       T, name, tokens, tokens - 1);
}

/* The scratch of a row: its document starts, its tokens with the one that follows, their mask. */
static size_t shards_scratch(const row_source *s, int64_t T) {
    (void)s;
    return (size_t)T * sizeof(uint64_t) + ((size_t)T + 1) * (sizeof(int32_t) + 1);
}

/* doc[t] counts the document starts in [0, t]. */
static void number_documents(const dataset *d, uint64_t from, int64_t T, int64_t count, uint64_t *starts,
                             int32_t *doc) {
    memset(doc, 0, (size_t)T * sizeof *doc);
    size_t found = dataset_document_starts(d, from, (size_t)count, starts, (size_t)count);
    ASSERT(found <= (size_t)count);
    for (size_t i = 0; i < found; i++) doc[starts[i] - from] = 1;
    for (int64_t t = 1; found > 0 && t < T; t++) doc[t] += doc[t - 1];
}

static int shards_read(const row_source *s, struct row_reader *r, uint64_t sample, int64_t T, int64_t count,
                       int32_t *tokens, int32_t *targets, int32_t *doc, error *err) {
    const dataset *d = data_of(s);
    uint64_t from = sample * (uint64_t)T, *starts = r->scratch;
    int32_t *ids = (int32_t *)(starts + T);
    uint8_t *mask = (uint8_t *)(ids + T + 1);
    TRY(dataset_read(d, r->cursor, from, (size_t)count + 1, ids, s->info.shards->has_mask ? mask : NULL, err));
    memcpy(tokens, ids, (size_t)count * sizeof *ids);
    memcpy(targets, ids + 1, (size_t)count * sizeof *ids);
    for (int64_t t = 0; s->info.shards->has_mask && t < count; t++) {
        if (!mask[t + 1]) targets[t] = -1;
    }
    for (int64_t t = count; t < T; t++) {
        tokens[t] = 0;
        targets[t] = -1;
    }
    if (doc) number_documents(d, from, T, count, starts, doc);
    return 0;
}

int row_source_open_shards(row_source **out, const char *path, error *err) {
    static const struct row_source_class class = {
        .close = shards_close,
        .inputs = shards_inputs,
        .scratch = shards_scratch,
        .check = shards_check,
        .read = shards_read,
    };
    *out = NULL;
    struct shard_rows *s = calloc(1, sizeof *s);
    if (!s) return error_system(err, "no memory to open %s", path);
    if (dataset_open(&s->data, path, err) != 0) {
        free(s);
        return -1;
    }
    const struct dataset_info *info = dataset_get_info(s->data);
    s->base.class = &class;
    s->base.info = (struct row_source_info){.path = path, .vocab = info->vocab, .length = 1, .shards = info};
    *out = &s->base;
    return 0;
}

/* ---- every kind -------------------------------------------------------------------------------------------------- */

void row_source_close(row_source *s) {
    if (s) s->class->close(s);
}

uint64_t row_source_inputs(const row_source *s, int64_t T) { return s->class->inputs(s, T); }

int row_source_check(const row_source *s, const char *name, int64_t T, error *err) {
    return s->class->check(s, name, T, err);
}

size_t row_source_scratch(const row_source *s, int64_t T) { return s->class->scratch(s, T); }

int row_reader_open(struct row_reader *r, error *err) { return shard_cursor_open(&r->cursor, err); }

void row_reader_close(struct row_reader *r) {
    shard_cursor_close(r->cursor);
    r->cursor = NULL;
}

int row_source_read(const row_source *s, struct row_reader *r, uint64_t sample, int64_t T, int64_t count,
                    int32_t *tokens, int32_t *targets, int32_t *doc, error *err) {
    ASSERT(count >= 1 && count <= T);
    return s->class->read(s, r, sample, T, count, tokens, targets, doc, err);
}

int row_source_same_tokens(const row_source *a, const char *a_name, const row_source *b, const char *b_name,
                           error *err) {
    const struct dataset_info *x = a->info.shards, *y = b->info.shards;
    if (!x != !y) {
        return error_input(err,
                           "%s is %s and %s is %s, so their ids mean different things; the data of one run must be all "
                           "of one kind",
                           a_name, x ? "text" : "a generated task", b_name, y ? "text" : "a generated task");
    }
    if (x && x->tokenizer_identity != y->tokenizer_identity) {
        return error_input(err,
                           "%s and %s were made with different tokenizers (%s %016" PRIx64 " and %s %016" PRIx64
                           "); the data of one run must share one",
                           a_name, b_name, x->tokenizer_name, x->tokenizer_identity, y->tokenizer_name,
                           y->tokenizer_identity);
    }
    if (a->info.vocab != b->info.vocab) {
        return error_input(
            err, "%s and %s have vocabularies of %" PRIu64 " and %" PRIu64 " ids; the data of one run must share one",
            a_name, b_name, a->info.vocab, b->info.vocab);
    }
    return 0;
}
