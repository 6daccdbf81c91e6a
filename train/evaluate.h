/* evaluate.h: loss of a model on a data set. The trainer's validation and `riverrun eval` are this one function.
 *
 * Every token of the stream but the first is predicted once. EVAL_WINDOW: the stream is cut into windows of `window`
 * inputs, each from a zero state (the last one may be shorter). EVAL_CARRY: the stream runs through in pieces of
 * `window`, the state carried over and reset where a document starts. Document starts inside a window reset the state
 * if `reset`. Masked targets don't count.
 */
#ifndef RIVERRUN_EVALUATE_H
#define RIVERRUN_EVALUATE_H

#include "data/row_source.h"
#include "data/tokenizer.h"
#include "model/model.h"
#include "train/comm.h"
#include "train/options.h"

struct evaluation {
    double loss;       /* mean nats a token */
    double perplexity; /* exp(loss) */
    double
        bits_per_byte; /* nats / ln 2 / bytes of text predicted; an end of document has none; NaN if there are none */
    double accuracy;   /* share of targets that are the argmax */
    double tokens;     /* targets */
    double bytes;      /* of text that the targets stand for */
};

/* Collective: windows are dealt out to the ranks (EVAL_CARRY runs on rank 0). The model was opened for at least
 * batch x window (EVAL_CARRY: 1 x window); options->window is given, not 0. The result does not depend on batch or
 * ranks beyond rounding. A failure is returned on the rank where it happened, while the others wait for it: the
 * caller ends the job. */
int evaluate(struct evaluation *e, struct model *m, const row_source *d, const tokenizer *t,
             const struct eval_options *options, bool reset, struct comm *comm, error *err);

#endif
