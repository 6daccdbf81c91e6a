/* ramp.c: the batch ramp, as ramp.h describes. */
#include "train/ramp.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STEPS_MAX 1000000000000 /* of a stage; the bound of train.steps */

/* sum + a b, or the largest number where that is too small: far behind the last step of any run. */
static uint64_t add_product(uint64_t sum, uint64_t a, uint64_t b) {
    uint64_t product;
    return __builtin_mul_overflow(a, b, &product) || __builtin_add_overflow(sum, product, &sum) ? UINT64_MAX : sum;
}

/* Append a stage of `length` steps; one of no steps is none. */
static void add_stage(struct ramp *r, struct ramp_stage *next, int64_t batch, int64_t length) {
    if (length == 0) return;
    next->batch = batch;
    r->stages[r->count++] = *next;
    next->step += length;
    next->sample = add_product(next->sample, (uint64_t)batch, (uint64_t)length);
}

/* ---- stages as a list ------------------------------------------------------------------------------------------- */

/* A whole number of `text`, from 1 to `most`; 0: it starts with none. */
static int64_t read_count(const char **text, int64_t most) {
    char *end;
    errno = 0;
    long long value = **text >= '0' && **text <= '9' ? strtoll(*text, &end, 10) : 0;
    if (value < 1 || value > most || errno != 0) return 0;
    *text = end;
    return value;
}

static int read_stages(struct ramp *r, struct ramp_stage *next, const char *text, int64_t batch_most, error *err) {
    static const char separators[] = " \t,";
    for (const char *at = text + strspn(text, separators); *at; at += strspn(at, separators)) {
        const char *item = at;
        int64_t batch = read_count(&at, INT64_MAX), steps = 0;
        if (batch > batch_most) {
            return error_input(err,
                               "ramp.stages = %.200s has a batch of %lld, but a ramp leads up to train.batch = %lld; "
                               "give smaller ones, or ramp.stages= (nothing) for no ramp",
                               text, (long long)batch, (long long)batch_most);
        }
        if (batch > 0 && *at == '*') {
            at++;
            steps = read_count(&at, STEPS_MAX);
        }
        if (steps == 0 || (*at && !strchr(separators, *at))) {
            size_t length = strcspn(item, separators);
            return error_input(err,
                               "ramp.stages: '%.*s' is no stage; write BATCH*STEPS, such as 128*2000, with a batch "
                               "from 1 to train.batch = %lld and steps from 1 to %lld",
                               (int)(length < 60 ? length : 60), item, (long long)batch_most, (long long)STEPS_MAX);
        }
        if (r->count == LIMIT_RAMP_STAGES) {
            return error_input(err, "ramp.stages has more than the %d stages that are possible", LIMIT_RAMP_STAGES);
        }
        add_stage(r, next, batch, steps);
    }
    return 0;
}

/* ---- stages by a rule ------------------------------------------------------------------------------------------- */

static int check_rule(const struct ramp_options *o, int64_t batch, error *err) {
    if (o->start > batch) {
        return error_input(err, "ramp.start = %lld is above train.batch = %lld, which the ramp ends with",
                           (long long)o->start, (long long)batch);
    }
    if ((o->steps > 0) == (o->tokens > 0)) {
        return error_input(err, "ramp.start = %lld needs either ramp.steps or ramp.tokens, the length of the ramp",
                           (long long)o->start);
    }
    if (o->increment == 0 || (batch - o->start) % o->increment != 0) {
        return error_input(err,
                           "ramp.increment = %lld does not divide train.batch - ramp.start = %lld - %lld = %lld; give "
                           "a number that does",
                           (long long)o->increment, (long long)batch, (long long)o->start,
                           (long long)(batch - o->start));
    }
    int64_t increments = (batch - o->start) / o->increment;
    if (increments > LIMIT_RAMP_STAGES) {
        return error_input(err, "ramp.increment = %lld makes %lld stages; at most %d are possible",
                           (long long)o->increment, (long long)increments, LIMIT_RAMP_STAGES);
    }
    return 0;
}

/* ceil(a b / c) without overflow on the way. */
static int64_t share_of(int64_t a, int64_t b, int64_t c) {
    return (int64_t)(((__int128)a * b + c - 1) / c);
}

static void spread_stages(struct ramp *r, struct ramp_stage *next, const struct ramp_options *o, int64_t batch,
                          int64_t T) {
    int64_t increments = (batch - o->start) / o->increment;
    for (int64_t k = 0; k < increments; k++) {
        int64_t size = o->start + k * o->increment, length;
        if (o->steps > 0) {
            length = share_of(k + 1, o->steps, increments) - next->step;
        } else {
            /* Samples that must have been seen before the next stage may start. */
            int64_t until = share_of(k + 1, o->tokens, increments * T), seen = (int64_t)next->sample; /* < tokens */
            length = until > seen ? (until - seen + size - 1) / size : 0;
        }
        add_stage(r, next, size, length);
    }
}

/* ---- the ramp --------------------------------------------------------------------------------------------------- */

int ramp_make(struct ramp *r, const struct ramp_options *o, int64_t batch, int64_t steps, int64_t T, error *err) {
    int64_t all;
    if (__builtin_mul_overflow(batch, steps, &all)) {
        return error_input(err,
                           "train.steps = %lld of train.batch = %lld sequences are too many to count; their product "
                           "must be below 2^63",
                           (long long)steps, (long long)batch);
    }
    *r = (struct ramp){.count = 0};
    struct ramp_stage next = {0};
    bool rule = o->start > 0 || o->increment > 0 || o->steps > 0 || o->tokens > 0;
    if (o->stages[0] && rule) {
        return error_input(err, "ramp.stages = %.100s says all of a ramp; leave out start, increment, steps and tokens",
                           o->stages);
    }
    if (rule && o->start == 0) {
        return error_input(err, "ramp.start = 0 means no ramp, but increment, steps or tokens are given; give the "
                                "batch that the ramp starts with, or none of them");
    }
    if (rule) {
        TRY(check_rule(o, batch, err));
        spread_stages(r, &next, o, batch, T);
    } else {
        TRY(read_stages(r, &next, o->stages, batch, err));
    }
    next.batch = batch;
    r->stages[r->count++] = next;
    return 0;
}

static const struct ramp_stage *stage_of(const struct ramp *r, int64_t step) {
    int i = r->count - 1;
    while (i > 0 && r->stages[i].step > step) i--;
    return &r->stages[i];
}

int64_t ramp_batch(const struct ramp *r, int64_t step) { return stage_of(r, step)->batch; }

uint64_t ramp_samples(const struct ramp *r, int64_t step) {
    const struct ramp_stage *s = stage_of(r, step);
    return add_product(s->sample, (uint64_t)(step - s->step), (uint64_t)s->batch);
}

static int64_t common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

int64_t ramp_divisor(const struct ramp *r) {
    int64_t divisor = 0;
    for (int i = 0; i < r->count; i++) divisor = common_divisor(r->stages[i].batch, divisor);
    return divisor;
}
