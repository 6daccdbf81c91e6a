/* evaluate.h: loss of a model on a data set or a generated task. The trainer's validation and `riverrun eval` are this
 * one function.
 *
 * Every token of the stream but the first is predicted once. EVAL_WINDOW: the stream is cut into windows of `window`
 * inputs, each from a zero state (the last one may be shorter). EVAL_CARRY: the stream runs through in pieces of
 * `window`, the state carried over and reset where a document starts. Document starts inside a window reset the state
 * if `reset`. Masked targets don't count.
 *
 * A task's samples are rows of their own: each is a window from a zero state, as long as the longest sample where
 * nothing else is asked for, and it is also counted whether all of a sample's targets are the argmax.
 */
#ifndef RIVERRUN_EVALUATE_H
#define RIVERRUN_EVALUATE_H

#include "data/row_source.h"
#include "data/tokenizer.h"
#include "model/model.h"
#include "train/comm.h"
#include "train/json_line.h"
#include "train/options.h"

struct evaluation {
    double loss;       /* mean nats a token */
    double perplexity; /* exp(loss) */
    double bits_per_byte; /* nats / ln 2 / bytes of text predicted, of which an end of document has none; NaN if there
                           * are none */
    double accuracy;   /* share of targets that are the argmax */
    double tokens;     /* targets */
    double bytes;      /* of text that the targets stand for */
    double sequences;  /* samples of a task; 0 for text */
    double sequence_accuracy; /* share of them of which all targets are the argmax; NaN for text */
    int solvers;       /* layers with one; 0: what follows says nothing */
    double residual;   /* the largest that one left */
    int sequential;    /* layers that were solved again, token after token, because more was left (train/ladder.h) */
};

/* The members "residual" and "sequential" of a result; nothing for a model without solvers. */
void evaluation_log_solvers(const struct evaluation *e, struct json_line *l);

/* The window that eval.window = 0 stands for: T, the length of a training row, or a task's longest sample. */
int64_t evaluate_window(const row_source *d, int64_t T);

/* Refuse what can't be evaluated: data without a target, a task in windows too short for its samples or with a carried
 * state. `name` is that of the data, for the message; options->window is given. */
int evaluate_check(const row_source *d, const char *name, const struct eval_options *options, error *err);

/* Collective: windows are dealt out to the ranks (EVAL_CARRY runs on rank 0). `t` is NULL for a task. The model was
 * opened for at least batch x window (EVAL_CARRY: 1 x window); options are what evaluate_check accepts, the window
 * given, not 0. The result does not depend on batch or ranks beyond rounding. A failure is returned on the rank where
 * it happened, while the others wait for it: the caller ends the job. */
int evaluate(struct evaluation *e, struct model *m, const row_source *d, const tokenizer *t,
             const struct eval_options *options, bool reset, struct comm *comm, error *err);

#endif
