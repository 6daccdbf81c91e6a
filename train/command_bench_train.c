/* command_bench_train.c: `riverrun bench train`: how fast this machine trains a model. What measures is train/bench.c.
 * Called by command_bench.c. */
#include "train/command_bench.h"

#include "common/text.h"
#include "train/optimizer.h"
#include "train/version.h"
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct train_flags {
    int64_t steps, warmup, product;
    bool silent;
    const char *csv;
};

static const struct option train_table[] = {
    {"steps", OPTION_INT, offsetof(struct train_flags, steps), "20", 1, BENCH_REPEATS_MAX, "steps",
     "Steps that are timed.", NULL},
    {"warmup", OPTION_INT, offsetof(struct train_flags, warmup), "3", 1, BENCH_REPEATS_MAX, "steps",
     "Steps before them that are not.", NULL},
    {"product", OPTION_INT, offsetof(struct train_flags, product), "2048", 1, PRODUCT_MAX, "rows",
     "Size of the square matrices whose product is the rate that training is compared with.", NULL},
    {"silent", OPTION_BOOL, offsetof(struct train_flags, silent), "false", 0, 0, "",
     "Ranks do not exchange gradients and weights: what a step takes without; the losses are then wrong.", NULL},
    {"csv", OPTION_STRING, offsetof(struct train_flags, csv), "", 0, 0, "", "File to which a line of results is added.",
     NULL},
    OPTIONS_END,
};
enum { PRODUCTS = 10 }; /* multiplied in a measurement of training */

const struct flags bench_train_flags = {
    .command = "bench train",
    .arguments = "CONFIG [section.key=value ...]",
    .summary =
        "Times whole training steps of the model and batch that CONFIG describes (forward, backward, clipping, AdamW)\n"
        "on tokens generated in memory, and matrix products before and behind them; under mpirun on all ranks. What\n"
        "matters of the config: [model], [block.*], [optimizer], data.seq_len, data.reset, train.batch, micro_batch,\n"
        "device, precision and seed; model.vocab_size must be given. Threads: OMP_NUM_THREADS.",
    .table = train_table,
    .least = 1,
    .most = -1,
};

/* What a measurement is of, and what follows from its times. */
struct trained {
    const char *config;
    const struct model_config *mc;
    const struct run_options *o;
    const struct train_flags *f;
    const struct bench_training *r;
    char machine[160];
    double tokens_per_s, rate, product; /* FLOP/s: of 6 FLOPs a parameter and token, and of a product on one rank */
    double ratio, best, by_cpu;         /* of a rank's rate to a product's: of medians, of the quietest moments, and by
                                         * processor time, which other programs disturb less */
    double mfu;                         /* of the rate to what the data sheets of all ranks' GPUs promise; 0: unknown */
};

static struct trained derive(const char *path, const struct model_config *mc, const struct run_options *o,
                             const struct train_flags *f, struct device *dev, const struct bench_training *r) {
    struct trained t = {.config = path, .mc = mc, .o = o, .f = f, .r = r};
    double flops = 6 * (double)mc->params.total * (double)r->tokens, of_rank = flops / r->ranks;
    double peak = device_peak_flops(dev) * r->ranks;
    device_describe(dev, t.machine, sizeof t.machine);
    t.tokens_per_s = (double)r->tokens / r->step.median;
    t.rate = flops / r->step.median;
    t.product = r->product_flops / r->product.median;
    t.ratio = of_rank / r->step.median / t.product;
    t.best = of_rank / r->step.least / (r->product_flops / r->product.least);
    t.by_cpu = of_rank / r->step.cpu / (r->product_flops / r->product.cpu);
    t.mfu = peak > 0 ? t.rate / peak : 0;
    return t;
}

static void say_training(const struct trained *t) {
    char number[24];
    const struct bench_training *r = t->r;
    fprintf(stderr, "model           %s parameters: %s, width %" PRId64 ", vocabulary %" PRId64 "\n",
            text_count(number, sizeof number, (double)t->mc->params.total), t->mc->options.pattern,
            t->mc->options.d_model, t->mc->rows);
    fprintf(stderr, "machine         %s, %s, %d rank%s\n", t->machine, precision_choices[t->o->train.precision],
            r->ranks, r->ranks == 1 ? "" : "s");
    fprintf(stderr, "batch           %" PRId64 " x %" PRId64 " tokens\n", t->o->train.batch, t->o->data.T);
    bench_say_times("step", &r->step);
    fprintf(stderr, "tokens/s        %s\n", text_count(number, sizeof number, t->tokens_per_s));
    bench_say_rate("6 N tokens/s", 6 * (double)t->mc->params.total * (double)r->tokens, r->step.median);
    bench_say_rate("product", r->product_flops, r->product.median);
    fprintf(stderr, "ratio           %.1f %% (%.1f %% between the fastest of both, %.1f %% by processor time)\n",
            100 * t->ratio, 100 * t->best, 100 * t->by_cpu);
    if (t->mfu > 0) fprintf(stderr, "MFU             %.1f %% of the data sheet's bf16\n", 100 * t->mfu);
    if (r->memory_peak > 0)
        fprintf(stderr, "memory          %s of the GPU at most\n",
                text_bytes(number, sizeof number, (double)r->memory_peak));
    fprintf(stderr, "loss            %.4f in the first step, %.4f in the last\n", r->loss_first, r->loss_last);
}

static void print_training(const struct trained *t) {
    struct json_line line;
    const struct bench_training *r = t->r;
    bench_begin_line(&line, "train");
    json_line_string(&line, "config", t->config);
    json_line_string(&line, "machine", t->machine);
    json_line_string(&line, "precision", precision_choices[t->o->train.precision]);
    json_line_int(&line, "ranks", r->ranks);
    json_line_int(&line, "parameters", t->mc->params.total);
    json_line_int(&line, "batch", t->o->train.batch);
    json_line_int(&line, "seq", t->o->data.T);
    json_line_int(&line, "steps", r->step.count);
    if (t->f->silent) json_line_bool(&line, "silent", true);
    bench_put_times(&line, "step", &r->step);
    json_line_real(&line, "tokens_per_s", t->tokens_per_s);
    json_line_real(&line, "flops_per_s_6n", t->rate);
    json_line_real(&line, "mfu", t->mfu > 0 ? t->mfu : NAN);
    json_line_int(&line, "memory_peak", r->memory_peak);
    json_line_int(&line, "product", t->f->product);
    bench_put_times(&line, "product", &r->product);
    json_line_real(&line, "product_flops_per_s", t->product);
    json_line_real(&line, "ratio", t->ratio);
    json_line_real(&line, "ratio_of_fastest", t->best);
    json_line_real(&line, "ratio_by_cpu", t->by_cpu);
    json_line_real(&line, "loss_first", r->loss_first);
    json_line_real(&line, "loss_last", r->loss_last);
    bench_end_line(&line);
}

/* A line behind those that are there; the names of the columns before the first. */
static int add_to_csv(const struct trained *t, error *err) {
    FILE *csv = fopen(t->f->csv, "a");
    if (!csv) return error_system(err, "cannot write %s: %s", t->f->csv, strerror(errno));
    fseek(csv, 0, SEEK_END);
    if (ftell(csv) == 0)
        fprintf(csv, "config,precision,ranks,batch,seq,parameters,steps,step_ms,step_ms_min,step_ms_max,tokens_per_s,"
                     "mfu,memory_gib,loss_first,loss_last,machine,commit\n");
    const struct bench_training *r = t->r;
    fprintf(csv, "%s,%s,%d,%" PRId64 ",%" PRId64 ",%" PRId64 ",%d,", t->config,
            precision_choices[t->o->train.precision], r->ranks, t->o->train.batch, t->o->data.T, t->mc->params.total,
            r->step.count);
    fprintf(csv, "%.4f,%.4f,%.4f,%.0f,%.4f,%.3f,%.5f,%.5f,\"%s\",%s\n", 1e3 * r->step.median, 1e3 * r->step.least,
            1e3 * r->step.most, t->tokens_per_s, t->mfu, (double)r->memory_peak / (1 << 30), r->loss_first,
            r->loss_last, t->machine, version_commit());
    bool bad = ferror(csv) != 0;
    if (fclose(csv) == 0 && !bad) return 0;
    return error_system(err, "cannot write %s: %s", t->f->csv, strerror(errno));
}

static int report(const struct trained *t, error *err) {
    say_training(t);
    print_training(t);
    return *t->f->csv ? add_to_csv(t, err) : 0;
}

static int run_training(const struct train_flags *f, config *c, const char *path, struct comm *comm, error *err) {
    struct run_options *o = calloc(1, sizeof *o);
    struct model_config *mc = NULL;
    struct device *dev = NULL;
    struct bench_training result;
    struct bench_plan plan = {(int)f->warmup, (int)f->steps, f->product, PRODUCTS};
    int status = o ? 0 : error_system(err, "no memory for the options of a run");
    if (status == 0) status = run_options_bind(o, c, err);
    if (status == 0) status = model_config_bind(&mc, c, 0, err);
    if (status == 0) status = config_finish(c, err);
    if (status == 0)
        status = device_open_at(&dev, (enum device_kind)o->train.device, (enum precision)o->train.precision,
                                comm_device_index(comm), err);
    if (dev) dev->direct = !o->train.graph;
    status = comm_agree(comm, status, err);
    if (status == 0) status = comm_agree(comm, comm_attach(comm, dev, optimizer_slots(mc), err), err);
    if (f->silent) comm_silence(comm);
    if (status == 0) comm->least_bytes = o->comm.bucket_mib << 20;
    if (status == 0) status = bench_train(mc, o, dev, comm, &plan, &result, err);
    if (status == 0 && comm->rank == 0) {
        struct trained t = derive(path, mc, o, f, dev, &result);
        status = report(&t, err);
    }
    comm_detach(comm);
    if (dev) device_close(dev);
    model_config_free(mc);
    free(o);
    return status;
}

static int read_config(config **c, int argc, char **argv, struct train_flags *f, bool *helped, error *err) {
    int count;
    TRY(flags_parse(&bench_train_flags, argc, argv, f, &count, NULL, helped, err));
    if (*helped) return 0;
    TRY(config_load(c, argv[1], err));
    for (int i = 2; i <= count; i++) TRY(config_override(*c, argv[i], err));
    return 0;
}

int command_bench_train(int argc, char **argv, error *err) {
    struct train_flags f;
    struct comm comm;
    config *c = NULL;
    bool helped = false;
    TRY(comm_open(&comm, err));
    int result = comm_agree(&comm, read_config(&c, argc, argv, &f, &helped, err), err);
    if (result == 0 && !helped) result = run_training(&f, c, argv[1], &comm, err);
    config_free(c);
    comm_close(&comm);
    return result;
}
