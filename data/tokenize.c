/* tokenize.c: `riverrun tokenize` without its command line: checks, encoding, shards, commit.
 *
 * The calling thread takes encoded blocks in order (data/encode_pipeline.h) and appends them to the current shard,
 * whose writer compresses on its own threads (data/shard_writer.c). All failures come out here. Called by
 * command_tokenize.
 */
#include "data/tokenize.h"

#include "common/limits.h"
#include "data/encode_pipeline.h"
#include "data/input_list.h"
#include "data/json_scan.h"
#include "data/shard.h"
#include "data/split.h"
#include "data/stage.h"
#include <string.h>

struct output {
    const tokenizer *tokenizer;
    const struct tokenize_options *options;
    struct shard_writer_options shard;
    stage *stage;
    shard_writer *writer;       /* NULL between shards */
    uint64_t tokens, documents; /* in the current shard */
    struct tokenize_result total;
};

/* ---- shards ------------------------------------------------------------------------------------------------------ */

static int open_shard(struct output *o, error *err) {
    char path[LIMIT_PATH];
    TRY(stage_shard_path(o->stage, o->total.shards, path, sizeof path, err));
    TRY(shard_writer_open(&o->writer, path, &o->shard, o->options->threads, err));
    o->tokens = o->documents = 0;
    o->total.shards++;
    return 0;
}

static int finish_shard(struct output *o, error *err) {
    shard_writer *writer = o->writer;
    struct shard_info info;
    o->writer = NULL; /* finishing frees it, whether or not it succeeds */
    TRY(shard_writer_finish(writer, &info, err));
    o->total.file_bytes += info.file_bytes;
    return 0;
}

/* Append a run of tokens of one document, going on in new shards as they fill up. Its text is counted here token by
 * token only if the caller could not count it at once. */
static int append(struct output *o, const int32_t *ids, size_t count, bool count_text, error *err) {
    while (count > 0) {
        if (!o->writer) TRY(open_shard(o, err));
        uint64_t room = o->options->shard_tokens - o->tokens;
        size_t now = count < room ? count : room;
        TRY(shard_writer_append(o->writer, ids, NULL, now, err));
        if (count_text) shard_writer_text_bytes(o->writer, tokenizer_text_bytes(o->tokenizer, ids, now));
        o->tokens += now;
        ids += now;
        count -= now;
        if (o->tokens == o->options->shard_tokens) TRY(finish_shard(o, err));
    }
    return 0;
}

static int begin_document(struct output *o, uint32_t flags, error *err) {
    if (o->writer && o->documents == TOKENIZE_SHARD_DOCUMENTS) TRY(finish_shard(o, err));
    if (!o->writer) TRY(open_shard(o, err));
    TRY(shard_writer_document(o->writer, flags, err));
    o->documents++;
    return 0;
}

static int append_block(struct output *o, const struct encoded_block *b, error *err) {
    /* A block that can't reach the current shard's end belongs to it with all its text. */
    bool whole = o->writer && o->tokens + b->id_count < o->options->shard_tokens &&
                 o->documents + b->mark_count < TOKENIZE_SHARD_DOCUMENTS;
    size_t at = 0;
    for (size_t m = 0; m < b->mark_count; m++) {
        TRY(append(o, b->ids + at, b->marks[m].at - at, !whole, err));
        TRY(begin_document(o, b->marks[m].flags, err));
        at = b->marks[m].at;
    }
    TRY(append(o, b->ids + at, b->id_count - at, !whole, err));
    if (whole) shard_writer_text_bytes(o->writer, b->text_bytes);
    o->total.text_bytes += b->text_bytes;
    o->total.tokens += b->id_count;
    o->total.documents += b->mark_count;
    return 0;
}

/* ---- tokenizing -------------------------------------------------------------------------------------------------- */

static int check_options(const struct tokenize_options *o, error *err) {
    size_t length = strlen(o->separator);
    if (length > SPLIT_SEPARATOR_MAX || strchr(o->separator, '\n')) {
        return error_input(err, "the separator must be one line of at most %d bytes; this one has %zu bytes%s",
                           SPLIT_SEPARATOR_MAX, length, strchr(o->separator, '\n') ? " and a line end" : "");
    }
    if (o->jsonl_key) TRY(json_scan_check_key(o->jsonl_key, err));
    if (o->shard_tokens < 1) return error_input(err, "a shard must have at least 1 token");
    if (o->threads < 1) return error_input(err, "%d threads; at least 1 is needed", o->threads);
    return 0;
}

static int run(struct output *o, encode_pipeline *p, error *err) {
    for (;;) {
        const struct encoded_block *block;
        TRY(encode_pipeline_next(p, &block, err));
        if (!block) break;
        TRY(append_block(o, block, err));
        if (o->options->progress) {
            o->options->progress(o->options->progress_self, o->total.text_bytes, o->total.tokens, o->total.documents);
        }
    }
    return o->writer ? finish_shard(o, err) : 0;
}

static int write_shards(struct output *o, const struct input_list *inputs, error *err) {
    encode_pipeline *p;
    const struct tokenize_options *options = o->options;
    if (encode_pipeline_open(&p, o->tokenizer, inputs, options->separator, options->jsonl_key, options->threads,
                             options->interrupted, err) != 0) {
        stage_abandon(o->stage);
        return -1;
    }
    int failed = run(o, p, err);
    encode_pipeline_close(p);
    shard_writer_abandon(o->writer); /* NULL unless something failed */
    if (failed) {
        if (options->interrupted && atomic_load(options->interrupted)) {
            error_system(err, "interrupted by a signal; nothing was left in %s", options->out);
        }
        stage_abandon(o->stage);
        return -1;
    }
    return stage_commit(o->stage, o->total.shards, err);
}

int tokenize(const tokenizer *t, const char *const *inputs, size_t count, const struct tokenize_options *options,
             struct tokenize_result *result, error *err) {
    uint64_t vocab = (uint64_t)tokenizer_vocab(t);
    struct output o = {
        .tokenizer = t,
        .options = options,
        .shard = {.token_bytes = shard_token_bytes(vocab),
                  .frame_tokens = options->frame_tokens,
                  .zstd_level = options->zstd_level,
                  .planes = shard_planes_pay(vocab),
                  .vocab = vocab,
                  .eod = tokenizer_eod(t),
                  .tokenizer_identity = tokenizer_identity(t),
                  .tokenizer_name = tokenizer_name(t),
                  .separator = options->jsonl_key ? "" : options->separator},
    };
    struct input_list list;
    TRY(check_options(options, err));
    TRY(shard_writer_check(&o.shard, options->out, err));
    TRY(input_list_make(&list, inputs, count, err));
    int failed = stage_open(&o.stage, options->out, options->prefix, options->overwrite, t, err);
    if (!failed) failed = write_shards(&o, &list, err);
    input_list_free(&list);
    if (!failed && result) *result = o.total;
    return failed;
}
