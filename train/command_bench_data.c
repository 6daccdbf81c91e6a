/* command_bench_data.c: `riverrun bench loader|verify`: how fast this machine reads shards. What measures the loader is
 * data/loader_bench.c. Called by command_bench.c. */
#include "train/command_bench.h"

#include "common/limits.h"
#include "common/text.h"
#include "data/loader_bench.h"
#include "data/shard.h"
#include "train/processors.h"
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

/* ---- loader ----------------------------------------------------------------------------------------------------- */

struct loader_flags {
    int64_t seq, batch, batches, threads, ahead, seed;
    bool shuffle, reset;
};

#define LOADER(field) offsetof(struct loader_flags, field)
static const struct option loader_table[] = {
    {"seq", OPTION_INT, LOADER(seq), "2048", 1, 1 << 24, "tokens", "Tokens in a row.", NULL},
    {"batch", OPTION_INT, LOADER(batch), "16", 1, 1 << 20, "rows", "Rows in a batch.", NULL},
    {"batches", OPTION_INT, LOADER(batches), "2000", 1, 1e12, "batches", "Batches that are taken.", NULL},
    {"threads", OPTION_INT, LOADER(threads), "0", 0, 1024, "threads",
     "Threads that prepare batches; 0 = as many as this process may run on.", NULL},
    {"ahead", OPTION_INT, LOADER(ahead), "4", 1, 1024, "batches", "Batches prepared ahead.", NULL},
    {"seed", OPTION_INT, LOADER(seed), "1", 0, 9007199254740991.0, "", "Key of the order.", NULL},
    {"shuffle", OPTION_BOOL, LOADER(shuffle), "true", 0, 0, "", "Keyed order; --no-shuffle reads in order.", NULL},
    {"reset", OPTION_BOOL, LOADER(reset), "true", 0, 0, "", "Document numbers with every batch.", NULL},
    OPTIONS_END,
};
#undef LOADER

const struct flags bench_loader_flags = {
    .command = "bench loader",
    .arguments = "SHARDS...",
    .summary =
        "Times how fast the loader delivers batches from one or more data sets (mixed in equal parts), opening it\n"
        "included. Every batch is looked at: its number, and that its tokens are ids of the vocabulary.",
    .table = loader_table,
    .least = 1,
    .most = LIMIT_SOURCES,
};

static void print_loader(const struct loader_flags *f, int threads, size_t sources,
                         const struct loader_bench_result *r) {
    struct json_line line;
    char number[24];
    fprintf(stderr, "loader          %s tokens/s: %" PRIu64 " batches of %" PRId64 " x %" PRId64,
            text_count(number, sizeof number, r->tokens_per_s), r->batches, f->batch, f->seq);
    fprintf(stderr, " in %.2f s, %d thread%s\n", r->seconds, threads, threads == 1 ? "" : "s");
    fprintf(stderr, "first batch     %.2f ms\n", 1e3 * r->first_batch_s);
    fprintf(stderr, "threads' time   %.2f s reading, %.2f s filling, %.2f s waiting for room\n", r->stats.thread_read_s,
            r->stats.thread_fill_s, r->stats.thread_idle_s);
    bench_begin_line(&line, "loader");
    json_line_int(&line, "sources", (int64_t)sources);
    json_line_int(&line, "seq", f->seq);
    json_line_int(&line, "batch", f->batch);
    json_line_int(&line, "threads", threads);
    json_line_bool(&line, "shuffle", f->shuffle);
    json_line_int(&line, "batches", (int64_t)r->batches);
    json_line_int(&line, "tokens", (int64_t)r->tokens);
    json_line_real(&line, "seconds", r->seconds);
    json_line_real(&line, "tokens_per_s", r->tokens_per_s);
    json_line_real(&line, "first_batch_s", r->first_batch_s);
    json_line_real(&line, "thread_read_s", r->stats.thread_read_s);
    json_line_real(&line, "thread_fill_s", r->stats.thread_fill_s);
    json_line_real(&line, "thread_idle_s", r->stats.thread_idle_s);
    bench_end_line(&line);
}

int command_bench_loader(int argc, char **argv, error *err) {
    struct loader_flags f;
    int count, opened = 0, status = 0;
    bool helped;
    struct loader_source sources[LIMIT_SOURCES];
    row_source *data[LIMIT_SOURCES];
    TRY(flags_parse(&bench_loader_flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    for (; status == 0 && opened < count; opened += status == 0) {
        status = row_source_open_shards(&data[opened], argv[1 + opened], err);
        if (status == 0) sources[opened] = (struct loader_source){argv[1 + opened], data[opened], 1};
    }
    struct loader_options o = {.seed = (uint64_t)f.seed,
                               .T = f.seq,
                               .shuffle = f.shuffle,
                               .reset = f.reset,
                               .threads = f.threads ? (int)f.threads : processors_available(),
                               .ahead = (int)f.ahead,
                               .B = f.batch,
                               .rank = 0,
                               .ranks = 1};
    struct loader_bench_result result;
    if (status == 0) status = loader_bench(sources, (size_t)count, &o, (uint64_t)f.batches, &result, err);
    if (status == 0) print_loader(&f, o.threads, (size_t)count, &result);
    while (opened > 0) row_source_close(data[--opened]);
    return status;
}

/* ---- verify ----------------------------------------------------------------------------------------------------- */

struct verify_flags {
    int64_t threads, repeats;
};

static const struct option verify_table[] = {
    {"threads", OPTION_INT, offsetof(struct verify_flags, threads), "0", 0, 1024, "threads",
     "Threads that decompress and check; 0 = as many as this process may run on.", NULL},
    {"repeats", OPTION_INT, offsetof(struct verify_flags, repeats), "3", 1, 1000, "times",
     "How often everything is read; the fastest counts.", NULL},
    OPTIONS_END,
};

const struct flags bench_verify_flags = {
    .command = "bench verify",
    .arguments = "SHARDS...",
    .summary = "Times what `riverrun shards verify` does to the shards of one or more data sets, in bytes of tokens\n"
               "after decompression.",
    .table = verify_table,
    .least = 1,
    .most = -1,
};

struct verified {
    uint64_t shards, tokens, token_bytes, file_bytes; /* token_bytes: of all tokens, decompressed */
};

static int verify_data(const char *path, int threads, struct verified *v, error *err) {
    dataset *d;
    TRY(dataset_open(&d, path, err));
    int status = 0;
    for (size_t i = 0; status == 0 && i < dataset_get_info(d)->shards; i++) {
        struct shard_info info;
        status = shard_verify_with(shard_get_info(dataset_shard(d, i))->path, threads, &info, err);
        if (status != 0) break;
        v->shards++;
        v->tokens += info.tokens;
        v->token_bytes += info.tokens * info.token_bytes;
        v->file_bytes += info.file_bytes;
    }
    dataset_close(d);
    return status;
}

int command_bench_verify(int argc, char **argv, error *err) {
    struct verify_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&bench_verify_flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    int threads = f.threads ? (int)f.threads : processors_available();
    struct verified v = {0};
    double fastest = 0;
    for (int64_t n = 0; n < f.repeats; n++) {
        v = (struct verified){0};
        double begun = clock_seconds();
        for (int i = 1; i <= count; i++) TRY(verify_data(argv[i], threads, &v, err));
        double seconds = clock_seconds() - begun;
        if (n == 0 || seconds < fastest) fastest = seconds;
    }
    struct json_line line;
    double rate = (double)v.token_bytes / fastest;
    fprintf(stderr, "verify          %.0f MB/s decompressed: %" PRIu64 " shards, %" PRIu64 " tokens", 1e-6 * rate,
            v.shards, v.tokens);
    fprintf(stderr, ", %.3f s, %d thread%s\n", fastest, threads, threads == 1 ? "" : "s");
    bench_begin_line(&line, "verify");
    json_line_int(&line, "shards", (int64_t)v.shards);
    json_line_int(&line, "tokens", (int64_t)v.tokens);
    json_line_int(&line, "decompressed_bytes", (int64_t)v.token_bytes);
    json_line_int(&line, "file_bytes", (int64_t)v.file_bytes);
    json_line_int(&line, "threads", threads);
    json_line_real(&line, "seconds", fastest);
    json_line_real(&line, "bytes_per_s", rate);
    bench_end_line(&line);
    return 0;
}
