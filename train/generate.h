/* generate.h: text from a model, token by token, in constant memory. */
#ifndef RIVERRUN_GENERATE_H
#define RIVERRUN_GENERATE_H

#include "data/tokenizer.h"
#include "model/model.h"

struct generate_options {
    int64_t tokens;      /* at most this many new tokens */
    double temperature;  /* 0 = greedy */
    int64_t top_k;       /* draw among the k most probable only; 0 = off */
    double top_p;        /* then among the fewest most probable that have this share of what is left; 1 = off */
    uint64_t seed;
    bool stop_at_eod;
    int32_t eod;         /* end-of-document token */
    int64_t piece;       /* prompt tokens read at once: at most the T that the model was opened for */
};

/* The prompt (at least one token; an empty text is the end-of-document token alone) is read in pieces with carried
 * state, then tokens are drawn: padding rows of the vocabulary never are. emit gets each new token, but not an end
 * of document that stops; returning non-zero stops too. Model: B = 1. Fails if the model's logits are not numbers. */
int generate(struct model *m, const int32_t *prompt, size_t count, const struct generate_options *options,
             int (*emit)(void *self, int32_t token), void *self, error *err);

/* A token that may be drawn. */
struct generate_candidate {
    double logit, weight;
    int32_t token;
};

/* Draw from logits[0..count): a pure function of (logits, options, position). Greedy: the lowest index among the
 * largest. `scratch` has room for count candidates. -1 if the largest logit is not a finite number, or one is NaN. */
int32_t generate_pick(const double *logits, int64_t count, const struct generate_options *options, uint64_t position,
                      struct generate_candidate *scratch);

#endif
