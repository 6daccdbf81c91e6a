/* bench_layer.h: times of one layer of a model, norm and mixer (or MLP) as a model runs them, and whether its results
 * are right. Called by `riverrun bench layer` (command_bench_layer.c).
 *
 * Training: the norm before the layer adds what the layer before put out to the residual stream (ops.h: add_norm), the
 * mixer makes its output from it; backward gives the gradients of all of these and of all weights. This is a row of
 * bench_ops.h, timed and checked as operations are: a few first tokens of the last sequence are computed again in
 * double on the CPU. Generation: a sequence of T tokens is read (prefill), its state is given to B sequences, and these
 * go on token by token; the outputs of such steps are compared with those of one pass over the whole sequence. */
#ifndef RIVERRUN_BENCH_LAYER_H
#define RIVERRUN_BENCH_LAYER_H

#include "model/model.h"
#include "train/bench_ops.h"

struct bench_layer {
    const struct model_config *mc;
    const struct layer *layer;
    int64_t B, T;
    struct device *dev, *oracle;
    char letters[BENCH_OPERANDS][PARAM_DIMS + 1]; /* of the layer's tensors */
};

/* Bytes of device memory that a measurement will ask for. */
int bench_layer_size(struct bench_layer *l, size_t *bytes, error *err);
int bench_layer_train(struct bench_layer *l, struct bench_measured *measured, error *err);
/* Bytes that forward keeps for backward, for each token. */
double bench_layer_saved(const struct bench_layer *l);

struct bench_decoded {
    struct bench_times prefill; /* T tokens of one sequence */
    struct bench_times step;    /* one token of B sequences, as generation takes it: recorded and replayed */
    struct bench_times call;    /* the same by as many calls as it has operations: one of a row of steps */
    size_t state_bytes;         /* of one sequence */
    double difference;          /* between steps and the whole pass: norms over a token, the largest */
    bool wrong;                 /* beyond what rounding explains */
};
/* How many tokens behind T a cache needs room for. */
enum { BENCH_DECODE_AHEAD = 64 };
int bench_decode_size(struct bench_layer *l, size_t *bytes, error *err);
int bench_layer_decode(struct bench_layer *l, struct bench_decoded *decoded, error *err);

/* For bench_decode.c: append the weights of the layer and of the norm before it as operands; then their views, the
 * gradients too if asked for; and a call of the mixer with them. */
void bench_layer_weights(struct bench_problem *p);
void bench_layer_given(const struct bench_problem *p, const struct bench_operand *o, int64_t from, int64_t count,
                       double *values);
struct mixer_call bench_layer_call(struct bench_problem *p, int64_t B, int64_t T, tensor *w, tensor *dw);

#endif
