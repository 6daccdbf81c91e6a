/* support_corpus.c: makes the data sets of support_corpus.h. Owns the arrays and the open data set of a struct
 * corpus. */
#include "common/rng.h"
#include "test/support_corpus.h"
#include "test/unit.h"

#define GOOD(call)                                                                                                   \
    do {                                                                                                             \
        error err = {.kind = ERROR_NONE};                                                                            \
        if ((call) != 0) fail_msg("%s: %s", #call, err.text);                                                        \
    } while (0)

static void *copy(const void *bytes, size_t size) {
    void *result = malloc(size + 1); /* an empty array has an address too */
    assert_non_null(result);
    memcpy(result, bytes, size);
    return result;
}

/* Tokens [from, to) of the corpus as one shard. */
static void write_shard(const struct corpus *c, const struct corpus_plan *plan, const char *path, uint64_t from,
                        uint64_t to) {
    struct shard_writer_options options = {
        .token_bytes = plan->token_bytes ? plan->token_bytes : 4,
        .frame_tokens = plan->frame_tokens ? plan->frame_tokens : 64,
        .zstd_level = 3,
        .has_mask = plan->has_mask,
        .vocab = plan->vocab,
        .eod = -1,
        .tokenizer_identity = plan->tokenizer_identity,
        .tokenizer_name = "test",
        .separator = "",
    };
    shard_writer *w;
    GOOD(shard_writer_open(&w, path, &options, 1, &err));
    for (uint64_t at = from, end; at < to; at = end) {
        for (end = at + 1; end < to && !c->starts[end];) end++;
        if (c->starts[at]) GOOD(shard_writer_document(w, SHARD_DOC_SEPARATED, &err));
        GOOD(shard_writer_append(w, c->ids + at, plan->has_mask ? c->mask + at : NULL, end - at, &err));
    }
    GOOD(shard_writer_finish(w, NULL, &err));
}

void corpus_write(struct corpus *c, const struct corpus_plan *plan, const int32_t *ids, const uint8_t *mask,
                  const uint8_t *starts, uint64_t count) {
    *c = (struct corpus){.tokens = count};
    c->ids = copy(ids, count * sizeof *ids);
    c->mask = copy(mask, count);
    c->starts = copy(starts, count);
    GOOD(file_make_directories(plan->directory, &err));
    uint64_t at = 0;
    for (int i = 0, part = 0; at < count || i == 0; i++) {
        uint64_t size = plan->shard_sizes[part] ? plan->shard_sizes[part] : count;
        if (part + 1 < 4 && plan->shard_sizes[part + 1]) part++;
        char path[4096 + 32];
        snprintf(path, sizeof path, "%s/part-%05d" SHARD_SUFFIX, plan->directory, i);
        uint64_t end = at + size < count ? at + size : count;
        write_shard(c, plan, path, at, end);
        at = end;
    }
    GOOD(dataset_open(&c->data, plan->directory, &err));
    snprintf(c->path, sizeof c->path, "%s", plan->directory);
    GOOD(row_source_open_shards(&c->rows, c->path, &err));
    assert_int_equal(dataset_get_info(c->data)->tokens, count);
}

void corpus_make(struct corpus *c, const struct corpus_plan *plan) {
    struct corpus_plan full = *plan;
    if (full.vocab == 0) full.vocab = (uint64_t)full.first_id + full.tokens;
    rng_key key = {.seed = full.key, .purpose = RNG_TEST};
    int32_t *ids = malloc(full.tokens * sizeof *ids + 1);
    uint8_t *mask = malloc(full.tokens + 1), *starts = malloc(full.tokens + 1);
    assert_true(ids && mask && starts);
    for (uint64_t p = 0; p < full.tokens; p++) {
        ids[p] = (int32_t)(((uint64_t)full.first_id + p) % full.vocab);
        mask[p] = !full.has_mask || rng_below(key, 2 * p, 3) > 0;
        starts[p] = p == 0 || (full.document_tokens && rng_below(key, 2 * p + 1, full.document_tokens) == 0);
    }
    corpus_write(c, &full, ids, mask, starts, full.tokens);
    free(ids);
    free(mask);
    free(starts);
}

void corpus_free(struct corpus *c) {
    if (c->data) dataset_close(c->data);
    row_source_close(c->rows);
    free(c->ids);
    free(c->mask);
    free(c->starts);
    *c = (struct corpus){.tokens = 0};
}
