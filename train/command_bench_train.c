/* command_bench_train.c: `riverrun bench train`: how fast this machine trains a model. What measures is train/bench.c.
 * Called by command_bench.c. */
#include "train/command_bench.h"

#include "common/text.h"
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

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

const struct flags bench_train_flags = {
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
    bench_say_times("step", &r->step);
    fprintf(stderr, "tokens/s        %s\n", text_count(number, sizeof number, (double)r->tokens / r->step.median));
    bench_say_rate("6 N tokens/s", flops, r->step.median);
    bench_say_rate("product", r->product_flops, r->product.median);
    fprintf(stderr, "ratio           %.1f %% (%.1f %% between the fastest of both, %.1f %% by processor time)\n",
            100 * rate / product, 100 * best, 100 * by_cpu);
    fprintf(stderr, "loss            %.4f in the first step, %.4f in the last\n", r->loss_first, r->loss_last);

    bench_begin_line(&line, "train");
    json_line_string(&line, "config", path);
    json_line_string(&line, "machine", machine);
    json_line_string(&line, "precision", precision_choices[o->train.precision]);
    json_line_int(&line, "parameters", mc->params.total);
    json_line_int(&line, "batch", o->train.batch);
    json_line_int(&line, "seq", o->data.T);
    json_line_int(&line, "steps", r->step.count);
    bench_put_times(&line, "step", &r->step);
    json_line_real(&line, "tokens_per_s", (double)r->tokens / r->step.median);
    json_line_real(&line, "flops_per_s_6n", rate);
    json_line_int(&line, "product", f->product);
    bench_put_times(&line, "product", &r->product);
    json_line_real(&line, "product_flops_per_s", product);
    json_line_real(&line, "ratio", rate / product);
    json_line_real(&line, "ratio_of_fastest", best);
    json_line_real(&line, "ratio_by_cpu", by_cpu);
    json_line_real(&line, "loss_first", r->loss_first);
    json_line_real(&line, "loss_last", r->loss_last);
    bench_end_line(&line);
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
    if (dev) dev->direct = !o->train.graph;
    if (status == 0) status = bench_train(mc, o, dev, &plan, &result, err);
    if (status == 0) print_training(path, mc, o, dev, f, &result);
    if (dev) device_close(dev);
    model_config_free(mc);
    free(o);
    return status;
}

int command_bench_train(int argc, char **argv, error *err) {
    struct train_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&bench_train_flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    config *c = NULL;
    int result = config_load(&c, argv[1], err);
    for (int i = 2; result == 0 && i <= count; i++) result = config_override(c, argv[i], err);
    if (result == 0) result = run_training(&f, c, argv[1], err);
    config_free(c);
    return result;
}
