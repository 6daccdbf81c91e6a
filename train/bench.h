/* bench.h: how fast whole training steps and large matrix products run. Called by `riverrun bench train` and
 * `bench gemm` (command_bench_*.c).
 *
 * What is timed is what trains: the model, the optimizer and the table of operations of a run, on tokens that are
 * generated in memory, so that neither disk nor tokenizer takes part. Times are of a monotonic clock; beside them
 * stands the processor time of the whole process, which other programs on the machine disturb less.
 */
#ifndef RIVERRUN_BENCH_H
#define RIVERRUN_BENCH_H

#include "kernels/device.h"
#include "model/model.h"
#include "train/comm.h"
#include "train/options.h"

#define BENCH_REPEATS_MAX 10000

/* A few equal pieces of work, each timed. */
struct bench_times {
    int count;
    double median, least, most; /* seconds */
    double cpu;                 /* processor seconds of one, on the average, over all threads */
};

/* A square product of size x size matrices through the table's linear_forward: 2 size^3 FLOPs. `repeats` of them are
 * timed after one that is not. */
int bench_product(struct device *dev, int64_t size, int repeats, struct bench_times *times, error *err);

struct bench_training {
    struct bench_times step;
    int64_t tokens;                /* of one step */
    double loss_first, loss_last;  /* of the first warm-up step and of the last step that was timed */
    struct bench_times product;    /* half of them before the steps, half behind */
    double product_flops;          /* of one product */
    int ranks;
    int64_t memory_peak;           /* bytes of device memory, the most on any rank; 0 on the CPU */
};

struct bench_plan {
    int warmup, steps;    /* steps that are not timed, and that are */
    int64_t product;      /* size of the products, and how many are timed */
    int product_repeats;
};

/* Steps as a run with these options takes them (train/step.h), on all ranks of `comm`: forward, loss, backward,
 * communication, clipping, AdamW, the batch in micro-batches as the options say. The learning rate rises to the
 * options' peak in ten steps and stays there. Every row of a batch walks through a keyed order of the token ids, which
 * a model learns, so the loss shows that it does; a loss that is not finite is an error. Collective; where one rank
 * fails all do. */
int bench_train(struct model_config *mc, const struct run_options *options, struct device *dev, struct comm *comm,
                const struct bench_plan *plan, struct bench_training *result, error *err);

#endif
