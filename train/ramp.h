/* ramp.h: how many sequences each step has: train.batch, or fewer at the start of the run ([ramp]).
 *
 * The size of a step's batch is a pure function of the step's number, and so is the global sample number it starts
 * with: neither depends on ranks, on micro-batches, or on where a run was interrupted. A ramp is written in one of two
 * ways; both become a list of stages:
 *
 *   stages = 128*2000 256*2000    2000 steps of 128 sequences, 2000 of 256, then train.batch
 *   start, increment, steps       n = (train.batch - start) / increment increments, spread evenly over the steps:
 *                                 stage k of start + k increment sequences lasts to step ceil((k + 1) steps / n)
 *   start, increment, tokens      the same spread over tokens: stage k lasts until the first step before which at least
 *                                 (k + 1) tokens / n tokens were seen
 *
 * Called by options.c, trainer.c and `riverrun plan`.
 */
#ifndef RIVERRUN_RAMP_H
#define RIVERRUN_RAMP_H

#include "common/config.h"
#include "common/limits.h"
#include <stdint.h>

struct ramp_options { /* [ramp] */
    const char *stages;                        /* "" = not given */
    int64_t start, increment, steps, tokens;   /* 0 = not given */
};

struct ramp {
    int count; /* at least 1 */
    struct ramp_stage {
        int64_t step;    /* it starts at */
        uint64_t sample; /* global number of the first sample of that step */
        int64_t batch;   /* sequences in its steps */
    } stages[LIMIT_RAMP_STAGES + 1]; /* by step; the last one has train.batch and does not end */
};

/* `batch` is train.batch, `steps` train.steps, T tokens in a sequence. Refuses options that contradict each other. */
int ramp_make(struct ramp *r, const struct ramp_options *o, int64_t batch, int64_t steps, int64_t T, error *err);

int64_t ramp_batch(const struct ramp *r, int64_t step);    /* sequences in a step, counted from 0 */
uint64_t ramp_samples(const struct ramp *r, int64_t step); /* sequences in all steps before it */

/* The greatest common divisor of all stages' batches. */
int64_t ramp_divisor(const struct ramp *r);

#endif
