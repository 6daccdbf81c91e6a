/* generate.h: text from a model, token by token, in constant memory. */
#ifndef RIVERRUN_GENERATE_H
#define RIVERRUN_GENERATE_H

#include "data/tokenizer.h"
#include "model/model.h"

struct generate_options {
    int64_t tokens;      /* at most this many new tokens */
    double temperature;  /* 0 = greedy */
    int64_t top_k;       /* 0 = off */
    double top_p;        /* 1 = off */
    uint64_t seed;
    bool stop_at_eod;
};

/* The prompt (at least one token; an empty text prompt is the end-of-document token) is read in pieces of the model's T with carried state, then
 * tokens are drawn: logits of padding rows never win. emit gets each new token; returning non-zero stops. Model: MODEL_INFER, B = 1. */
int generate(struct model *m, const int32_t *prompt, size_t count, const struct generate_options *options,
             int (*emit)(void *self, int32_t token), void *self, error *err);

/* Draw from logits[0..count): pure function of (logits, options, position). Greedy: the lowest index among the largest. */
int32_t generate_pick(const float *logits, int64_t count, const struct generate_options *options, uint64_t position);

#endif
