/* dataset.c: the shards of a directory, or a single shard, as one stream of tokens.
 *
 * Shards follow each other in bytewise order of their names. Opening compares them and the tokenizer.json beside them;
 * a directory in which `tokenize` was killed while it put its shards in place is refused, because shards are missing
 * there. Owns the open shards. Called by the loader, evaluation and `riverrun shards`.
 */
#include "data/shard.h"

#include "common/file.h"
#include "common/limits.h"
#include "data/tokenizer.h"
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct dataset {
    struct dataset_info info;
    shard **shards;
    uint64_t *starts; /* position in the stream of each shard's first token; one more entry: the end */
};

/* ---- opening ----------------------------------------------------------------------------------------------------- */

/* Both files must hold the same kind of tokens. */
static int check_agreement(const struct shard_info *a, const struct shard_info *b, error *err) {
    if (a->tokenizer_identity != b->tokenizer_identity || strcmp(a->tokenizer_name, b->tokenizer_name) != 0) {
        return error_input(err,
                           "%s and %s were made with different tokenizers: '%s' (%016" PRIx64 ") and '%s' (%016" PRIx64
                           "); the shards of a data set must share one",
                           a->path, b->path, a->tokenizer_name, a->tokenizer_identity, b->tokenizer_name,
                           b->tokenizer_identity);
    }
    if (a->vocab != b->vocab || a->eod != b->eod) {
        return error_input(err,
                           "%s and %s differ in their vocabulary: %" PRIu64 " ids with end-of-document id %" PRId64
                           ", and %" PRIu64 " with %" PRId64 "; the shards of a data set must share one",
                           a->path, b->path, a->vocab, a->eod, b->vocab, b->eod);
    }
    if (a->has_mask != b->has_mask) {
        return error_input(err,
                           "%s has target masks and %s has none; the shards of a data set must all have them or none",
                           a->has_mask ? a->path : b->path, a->has_mask ? b->path : a->path);
    }
    return 0;
}

static int add_shard(dataset *d, const char *path, error *err) {
    shard *s;
    TRY(shard_open(&s, path, err));
    d->shards[d->info.shards++] = s; /* from here on dataset_close closes it */
    const struct shard_info *info = shard_get_info(s);
    TRY(check_agreement(shard_get_info(d->shards[0]), info, err));
    d->starts[d->info.shards] = d->starts[d->info.shards - 1] + info->tokens;
    d->info.tokens += info->tokens;
    d->info.documents += info->documents;
    d->info.text_bytes += info->text_bytes;
    return 0;
}

static int reserve(dataset *d, size_t shards, error *err) {
    d->shards = calloc(shards, sizeof *d->shards);
    d->starts = calloc(shards + 1, sizeof *d->starts);
    return d->shards && d->starts ? 0 : error_system(err, "no memory for a data set of %zu shards", shards);
}

static int refuse_unfinished(const char *directory, error *err) {
    char **names;
    size_t count;
    TRY(file_list(directory, DATASET_COMMIT_SUFFIX, &names, &count, err));
    int failed = 0;
    if (count > 0) {
        failed =
            error_input(err,
                        "%s is not complete: a tokenize run was killed while it put its shards in place (it left %s); "
                        "run it again with --overwrite",
                        directory, names[0]);
    }
    file_list_free(names, count);
    return failed;
}

static int add_directory(dataset *d, const char *directory, error *err) {
    TRY(refuse_unfinished(directory, err));
    char **names, path[LIMIT_PATH];
    size_t count;
    TRY(file_list(directory, SHARD_SUFFIX, &names, &count, err));
    int failed = 0;
    if (count == 0) {
        failed = error_input(err, "%s holds no shards: no file there ends in %s (riverrun tokenize makes them)",
                             directory, SHARD_SUFFIX);
    }
    if (!failed) failed = reserve(d, count, err);
    for (size_t i = 0; !failed && i < count; i++) {
        failed = file_join(path, sizeof path, directory, names[i], err) != 0 || add_shard(d, path, err) != 0;
    }
    file_list_free(names, count);
    return failed ? -1 : 0;
}

/* A tokenizer.json beside the shards must be theirs: these bytes, or another spelling of a tokenizer that we know. */
static int check_tokenizer(dataset *d, const char *directory, error *err) {
    char *path = d->info.tokenizer_path;
    TRY(file_join(path, sizeof d->info.tokenizer_path, directory, "tokenizer.json", err));
    if (!file_exists(path)) {
        path[0] = '\0';
        return 0;
    }
    uint64_t identity, size;
    TRY(file_hash_of(path, &identity, &size, err));
    if (identity == d->info.tokenizer_identity) return 0;
    tokenizer *t;
    if (tokenizer_open(&t, path, err) == 0) {
        identity = tokenizer_identity(t);
        tokenizer_close(t);
        if (identity == d->info.tokenizer_identity) return 0;
    } else if (err->kind == ERROR_SYSTEM) {
        return -1;
    } /* anything else that can't be opened is another tokenizer anyway */
    return error_input(err,
                       "%s has the identity %016" PRIx64 ", but %s was made with the tokenizer '%s' (%016" PRIx64
                       "): shards and tokenizer.json must belong together",
                       path, identity, shard_get_info(d->shards[0])->path, d->info.tokenizer_name,
                       d->info.tokenizer_identity);
}

static int open_all(dataset *d, const char *path, error *err) {
    char copy[LIMIT_PATH];
    if (strlen(path) >= sizeof copy) {
        return error_input(err, "the path %.200s... is longer than %d bytes", path, LIMIT_PATH - 1);
    }
    strcpy(copy, path);
    const char *directory = copy;
    if (file_is_directory(path)) {
        TRY(add_directory(d, path, err));
    } else {
        TRY(reserve(d, 1, err));
        TRY(add_shard(d, path, err));
        directory = dirname(copy);
    }
    const struct shard_info *first = shard_get_info(d->shards[0]);
    d->info.has_mask = first->has_mask;
    d->info.vocab = first->vocab;
    d->info.eod = first->eod;
    d->info.tokenizer_identity = first->tokenizer_identity;
    memcpy(d->info.tokenizer_name, first->tokenizer_name, sizeof d->info.tokenizer_name);
    return check_tokenizer(d, directory, err);
}

int dataset_open(dataset **out, const char *path, error *err) {
    *out = NULL;
    dataset *d = calloc(1, sizeof *d);
    if (!d) return error_system(err, "no memory to open data set %s", path);
    if (open_all(d, path, err) != 0) {
        dataset_close(d);
        return -1;
    }
    *out = d;
    return 0;
}

void dataset_close(dataset *d) {
    if (!d) return;
    for (size_t i = 0; i < d->info.shards; i++) shard_close(d->shards[i]);
    free(d->shards);
    free(d->starts);
    free(d);
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

const struct dataset_info *dataset_get_info(const dataset *d) {
    return &d->info;
}

const shard *dataset_shard(const dataset *d, size_t index) {
    ASSERT(index < d->info.shards);
    return d->shards[index];
}

/* The shard that holds the token at `position`, which lies before the end. Shards without tokens are passed over. */
static size_t shard_at(const dataset *d, uint64_t position) {
    size_t low = 0, high = d->info.shards; /* starts[low] <= position < starts[high] */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (d->starts[middle] <= position) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

int dataset_read(const dataset *d, shard_cursor *c, uint64_t from, size_t count, int32_t *tokens, uint8_t *mask,
                 error *err) {
    if (from > d->info.tokens || count > d->info.tokens - from) {
        return error_input(err, "cannot read %zu tokens from token %" PRIu64 ": the data set has %" PRIu64, count, from,
                           d->info.tokens);
    }
    while (count > 0) {
        size_t i = shard_at(d, from);
        uint64_t there = d->starts[i + 1] - from;
        size_t now = count < there ? count : there;
        TRY(shard_read(d->shards[i], c, from - d->starts[i], now, tokens, mask, err));
        from += now;
        count -= now;
        tokens += now;
        if (mask) mask += now;
    }
    return 0;
}

size_t dataset_document_starts(const dataset *d, uint64_t from, size_t count, uint64_t *starts, size_t max) {
    size_t found = 0;
    if (from >= d->info.tokens || count == 0) return 0;
    uint64_t end = count < d->info.tokens - from ? from + count : d->info.tokens;
    for (size_t i = shard_at(d, from); i < d->info.shards && d->starts[i] < end; i++) {
        const struct shard_document *documents = shard_documents(d->shards[i]);
        uint64_t all = shard_get_info(d->shards[i])->documents;
        uint64_t first = from > d->starts[i] ? shard_document_from(d->shards[i], from - d->starts[i]) : 0;
        for (uint64_t n = first; n < all && d->starts[i] + documents[n].start < end; n++, found++) {
            if (found < max) starts[found] = d->starts[i] + documents[n].start;
        }
    }
    return found;
}
