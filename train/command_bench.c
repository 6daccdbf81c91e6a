/* command_bench.c: `riverrun bench train|gemm|loader|verify`: how fast this machine trains, multiplies and reads. A
 * table for people goes to standard error, one JSON object to standard output. Called by main.c; what measures is
 * train/bench.c and data/loader_bench.c. */
#include "train/commands.h"

#include "common/text.h"
#include "data/loader_bench.h"
#include "train/bench.h"
#include "train/flags.h"
#include "train/json_line.h"
#include "train/processors.h"
#include "train/version.h"
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OPTIONS_END                                                                                                    \
    { NULL, OPTION_INT, 0, NULL, 0, 0, NULL, NULL, NULL }
#define PRODUCT_MAX 32768 /* three matrices of it are 12 GiB in float */

/* ---- what all print --------------------------------------------------------------------------------------------- */

static void begin_line(struct json_line *line, const char *action) {
    json_line_begin(line);
    json_line_string(line, "bench", action);
    json_line_string(line, "version", version_number());
    json_line_string(line, "commit", version_commit());
}

static void end_line(struct json_line *line) {
    json_line_end(line);
    fwrite(line->text, 1, line->used, stdout);
}

/* Median, least and most seconds and the mean processor time, under names that start with `what`. */
static void put_times(struct json_line *line, const char *what, const struct bench_times *times) {
    char key[48];
    const struct {
        const char *name;
        double value;
    } values[] = {{"s", times->median}, {"s_min", times->least}, {"s_max", times->most}, {"cpu_s", times->cpu}};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        snprintf(key, sizeof key, "%s_%s", what, values[i].name);
        json_line_real(line, key, values[i].value);
    }
}

static void say_times(const char *what, const struct bench_times *times) {
    fprintf(stderr, "%-16s%.2f ms median of %d (%.2f to %.2f), %.2f ms of processor time\n", what, 1e3 * times->median,
            times->count, 1e3 * times->least, 1e3 * times->most, 1e3 * times->cpu);
}

static void say_rate(const char *what, double flops, double seconds) {
    fprintf(stderr, "%-16s%.1f GFLOP/s\n", what, 1e-9 * flops / seconds);
}

/* ---- train ------------------------------------------------------------------------------------------------------ */

struct train_flags {
    int64_t steps, warmup, product;
};

static const struct option train_table[] = {
    {"steps", OPTION_INT, offsetof(struct train_flags, steps), "20", 1, BENCH_REPEATS_MAX, "steps",
     "Steps that are timed.", NULL},
    {"warmup", OPTION_INT, offsetof(struct train_flags, warmup), "3", 1, BENCH_REPEATS_MAX, "steps",
     "Steps before them that are not.", NULL},
    {"product", OPTION_INT, offsetof(struct train_flags, product), "2048", 1, PRODUCT_MAX, "rows",
     "Size of the square matrices whose product is the rate that training is compared with.", NULL},
    OPTIONS_END,
};
enum { PRODUCTS = 10 }; /* multiplied in a measurement of training */

static const struct flags train_command = {
    .command = "bench train",
    .arguments = "CONFIG [section.key=value ...]",
    .summary =
        "Times whole training steps of the model and batch that CONFIG describes (forward, backward, clipping, AdamW)\n"
        "on tokens generated in memory, in one process, and matrix products before and behind them. What matters of\n"
        "the config: [model], [block.*], [optimizer], data.seq_len, data.reset, train.batch, micro_batch, precision\n"
        "and seed; model.vocab_size must be given. Threads: OMP_NUM_THREADS.",
    .table = train_table,
    .least = 1,
    .most = -1,
};

static void print_training(const char *path, const struct model_config *mc, const struct run_options *o,
                           struct device *dev, const struct train_flags *f, const struct bench_training *r) {
    char machine[160], number[24];
    struct json_line line;
    double parameters = (double)mc->params.total, flops = 6 * parameters * (double)r->tokens;
    double rate = flops / r->step.median, product = r->product_flops / r->product.median;
    /* The quietest moments of both, and both by processor time: where other programs run beside, these are nearer to
     * the machine's own ratio. */
    double best = flops / r->step.least / (r->product_flops / r->product.least);
    double by_cpu = flops / r->step.cpu / (r->product_flops / r->product.cpu);
    device_describe(dev, machine, sizeof machine);
    fprintf(stderr, "model           %s parameters: %s, width %" PRId64 ", vocabulary %" PRId64 "\n",
            text_count(number, sizeof number, parameters), mc->options.pattern, mc->options.d_model, mc->rows);
    fprintf(stderr, "machine         %s, %s\n", machine, precision_choices[o->train.precision]);
    fprintf(stderr, "batch           %" PRId64 " x %" PRId64 " tokens\n", o->train.batch, o->data.T);
    say_times("step", &r->step);
    fprintf(stderr, "tokens/s        %s\n", text_count(number, sizeof number, (double)r->tokens / r->step.median));
    say_rate("6 N tokens/s", flops, r->step.median);
    say_rate("product", r->product_flops, r->product.median);
    fprintf(stderr, "ratio           %.1f %% (%.1f %% between the fastest of both, %.1f %% by processor time)\n",
            100 * rate / product, 100 * best, 100 * by_cpu);
    fprintf(stderr, "loss            %.4f in the first step, %.4f in the last\n", r->loss_first, r->loss_last);

    begin_line(&line, "train");
    json_line_string(&line, "config", path);
    json_line_string(&line, "machine", machine);
    json_line_string(&line, "precision", precision_choices[o->train.precision]);
    json_line_int(&line, "parameters", mc->params.total);
    json_line_int(&line, "batch", o->train.batch);
    json_line_int(&line, "seq", o->data.T);
    json_line_int(&line, "steps", r->step.count);
    put_times(&line, "step", &r->step);
    json_line_real(&line, "tokens_per_s", (double)r->tokens / r->step.median);
    json_line_real(&line, "flops_per_s_6n", rate);
    json_line_int(&line, "product", f->product);
    put_times(&line, "product", &r->product);
    json_line_real(&line, "product_flops_per_s", product);
    json_line_real(&line, "ratio", rate / product);
    json_line_real(&line, "ratio_of_fastest", best);
    json_line_real(&line, "ratio_by_cpu", by_cpu);
    json_line_real(&line, "loss_first", r->loss_first);
    json_line_real(&line, "loss_last", r->loss_last);
    end_line(&line);
}

static int run_training(const struct train_flags *f, config *c, const char *path, error *err) {
    struct run_options *o = calloc(1, sizeof *o);
    struct model_config *mc = NULL;
    struct device *dev = NULL;
    struct bench_training result;
    struct bench_plan plan = {(int)f->warmup, (int)f->steps, f->product, PRODUCTS};
    if (!o) return error_system(err, "no memory for the options of a run");
    int status = run_options_bind(o, c, err);
    if (status == 0) status = model_config_bind(&mc, c, 0, err);
    if (status == 0) status = config_finish(c, err);
    if (status == 0) 
        status = device_open(&dev, (enum device_kind)o->train.device, (enum precision)o->train.precision, err);
    if (status == 0) status = bench_train(mc, o, dev, &plan, &result, err);
    if (status == 0) print_training(path, mc, o, dev, f, &result);
    if (dev) device_close(dev);
    model_config_free(mc);
    free(o);
    return status;
}

static int train(int argc, char **argv, error *err) {
    struct train_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&train_command, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    config *c = NULL;
    int result = config_load(&c, argv[1], err);
    for (int i = 2; result == 0 && i <= count; i++) result = config_override(c, argv[i], err);
    if (result == 0) result = run_training(&f, c, argv[1], err);
    config_free(c);
    return result;
}

/* ---- gemm ------------------------------------------------------------------------------------------------------- */

struct gemm_flags {
    int64_t size, repeats;
    int device, precision;
};

static const struct option gemm_table[] = {
    {"size", OPTION_INT, offsetof(struct gemm_flags, size), "2048", 1, PRODUCT_MAX, "rows",
     "Size of the square matrices.", NULL},
    {"repeats", OPTION_INT, offsetof(struct gemm_flags, repeats), "20", 1, BENCH_REPEATS_MAX, "products",
     "Products that are timed, after one that is not.", NULL},
    {"device", OPTION_CHOICE, offsetof(struct gemm_flags, device), "cpu", 0, 0, "", "What computes.", device_choices},
    {"precision", OPTION_CHOICE, offsetof(struct gemm_flags, precision), "fp32", 0, 0, "",
     "Numbers that are computed with.", precision_choices},
    OPTIONS_END,
};

static const struct flags gemm_command = {
    .command = "bench gemm",
    .arguments = "",
    .summary = "Times products of square matrices through the operation that training multiplies with.",
    .table = gemm_table,
    .least = 0,
    .most = 0,
};

static int gemm_bench(int argc, char **argv, error *err) {
    struct gemm_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&gemm_command, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    struct device *dev;
    struct bench_times times;
    struct json_line line;
    char machine[160];
    double size = (double)f.size, flops = 2 * size * size * size;
    TRY(device_open(&dev, (enum device_kind)f.device, (enum precision)f.precision, err));
    device_describe(dev, machine, sizeof machine);
    int result = bench_product(dev, f.size, (int)f.repeats, &times, err);
    device_close(dev);
    if (result != 0) return -1;
    fprintf(stderr, "machine         %s, %s\n", machine, precision_choices[f.precision]);
    say_times("product", &times);
    say_rate("rate", flops, times.median);
    begin_line(&line, "gemm");
    json_line_string(&line, "machine", machine);
    json_line_string(&line, "precision", precision_choices[f.precision]);
    json_line_int(&line, "size", f.size);
    json_line_int(&line, "repeats", times.count);
    put_times(&line, "product", &times);
    json_line_real(&line, "flops_per_s", flops / times.median);
    end_line(&line);
    return 0;
}

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

static const struct flags loader_command = {
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
    begin_line(&line, "loader");
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
    end_line(&line);
}

static int loader_command_run(int argc, char **argv, error *err) {
    struct loader_flags f;
    int count, opened = 0, status = 0;
    bool helped;
    struct loader_source sources[LIMIT_SOURCES];
    row_source *data[LIMIT_SOURCES];
    TRY(flags_parse(&loader_command, argc, argv, &f, &count, NULL, &helped, err));
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

static const struct flags verify_command = {
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

static int verify(int argc, char **argv, error *err) {
    struct verify_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&verify_command, argc, argv, &f, &count, NULL, &helped, err));
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
    begin_line(&line, "verify");
    json_line_int(&line, "shards", (int64_t)v.shards);
    json_line_int(&line, "tokens", (int64_t)v.tokens);
    json_line_int(&line, "decompressed_bytes", (int64_t)v.token_bytes);
    json_line_int(&line, "file_bytes", (int64_t)v.file_bytes);
    json_line_int(&line, "threads", threads);
    json_line_real(&line, "seconds", fastest);
    json_line_real(&line, "bytes_per_s", rate);
    end_line(&line);
    return 0;
}

/* ---- the command ------------------------------------------------------------------------------------------------ */

static const struct action {
    const char *name;
    int (*run)(int argc, char **argv, error *err);
    const struct flags *flags;
} table[] = {{"train", train, &train_command},
             {"gemm", gemm_bench, &gemm_command},
             {"loader", loader_command_run, &loader_command},
             {"verify", verify, &verify_command}};
enum { ACTIONS = sizeof table / sizeof *table };

int command_bench(int argc, char **argv, error *err) {
    const char *names[ACTIONS + 1] = {NULL};
    if (argc >= 2 && flags_is_help(argv[1])) {
        for (int i = 0; i < ACTIONS; i++) {
            if (i > 0) printf("\n");
            flags_help(stdout, table[i].flags);
        }
        return 0;
    }
    if (argc < 2) return error_input(err, "riverrun bench needs an action: train, gemm, loader or verify");
    for (int i = 0; i < ACTIONS; i++) {
        if (strcmp(argv[1], table[i].name) == 0) return table[i].run(argc - 1, argv + 1, err);
        names[i] = table[i].name;
    }
    const char *nearest = text_nearest(argv[1], names);
    if (nearest) return error_input(err, "'%.100s' is no action of riverrun bench; did you mean %s?", argv[1], nearest);
    return error_input(err, "'%.100s' is no action of riverrun bench; train, gemm, loader and verify are", argv[1]);
}
