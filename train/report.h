/* report.h: what a training run tells: log.jsonl for programs, lines on standard error for people.
 *
 * RUN/log.jsonl has one JSON object a line, in the order of steps. Its "type" says what it is:
 *   run     a session starts: step it starts from, version, commit, compiler, host, machine (with its threads),
 *           precision, ranks, seed, parameters, training_flops_per_token and its parts by kinds of layers (flops), how
 *           kinds of blocks are solved (solvers: method, iterations, chunk; where there are some),
 *           peak_flops of all ranks' devices (null where it is not known), planned_bytes of a rank's device memory,
 *           config
 *   start   step, seconds from the start of the program to the end of the session's first step
 *   step    step, loss, perplexity, lr, grad_norm, accuracy, tokens (valid targets of the run so far), valid (of this
 *           step), batch (sequences of this step), tokens_per_s, flops_per_s (masked targets count, recomputation does
 *           not), mfu (its share of the peak, where that is known), skipped (true where the step was not finite, or a
 *           solver failed, and nothing was changed), seconds (of training so far);
 *           of a model with solvers also residual (the largest of a layer), residual_block (whose it is), iterations
 *           (the most that a layer was solved with; 0: all of them sequentially), raised (layers above their config's
 *           level)
 *   solver  a layer's level changes (train/ladder.h): step behind which that was decided, block, residual, level and
 *           what it was before, first_step with it, method and iterations from there on
 *   valid   step, loss, perplexity, bits_per_byte, accuracy, tokens, for a task sequences and sequence_accuracy
 *           (samples, and the share of them that are right in every target), with solvers residual and sequential
 *           (layers that were solved again, token after token), seconds it took
 *   save    step, path, seconds it took
 *   memory  on a GPU, at the end of a session: step, peak_bytes (of everything on the device), planned_bytes
 *   stop    step, signal
 * Numbers are written so that reading them gives the same double; one that is not finite is null. A run that goes on
 * from step s cuts off what a killed session logged beyond s, so the file always holds one curve.
 *
 * Only rank 0 has a report; all functions do nothing when given NULL.
 */
#ifndef RIVERRUN_REPORT_H
#define RIVERRUN_REPORT_H

#include "common/error.h"
#include "train/evaluate.h"
#include "train/ladder.h"
#include "train/settings.h"
#include <stdint.h>

struct report;

/* What the log of earlier sessions holds up to the step a run goes on from. */
struct report_history {
    int64_t valid_step; /* step of the last validation, or -1 */
    double valid_loss;
};

/* Opens RUN/log.jsonl for appending and cuts off what lies beyond `step`, and a last line without an end. `steps` and
 * `log_every` are those of the run; `unit` is "nats/byte" or "nats/token". */
int report_open(struct report **r, const char *run, int64_t step, int64_t steps, int64_t log_every, const char *unit,
                struct report_history *history, error *err);
/* Only reads what report_open would find. A log that is not there is an empty one. */
int report_read_history(const char *run, int64_t step, struct report_history *history, error *err);
void report_close(struct report *r);

struct report_run {
    int64_t step;
    const char *machine, *precision;
    int ranks;
    int64_t seed, parameters;
    double flops_per_sequence, flops_per_token; /* of training */
    const struct model_flops *flops;            /* by kinds, forward */
    int flop_kinds;
    const struct model_solving *solvers; /* by kinds of blocks */
    int solver_kinds;
    double peak_flops; /* of all ranks' devices; 0 = not known */
    size_t planned;    /* bytes on a rank's device */
    const struct settings *config;
};
int report_run(struct report *r, const struct report_run *run, error *err);

struct report_step {
    int64_t step; /* done, this one included */
    double loss, lr, grad_norm, accuracy;
    double tokens, valid;
    int64_t batch;         /* sequences of this step */
    uint64_t samples_left; /* sequences in the steps still to do */
    double step_seconds, seconds;
    bool skipped;
    int64_t skipped_total;
    const struct report_solvers *solvers; /* NULL: none */
};
/* How the recurrences of a step were solved. */
struct report_solvers {
    double residual; /* the largest, over ranks and layers, and a layer that has it */
    const struct layer *layer;
    int iterations, raised;
    bool inexact; /* the residual is above solver.warn */
    int64_t inexact_total;
};
int report_step(struct report *r, const struct report_step *s, error *err);
/* Behind `step` it was decided that a layer is solved differently from `first_step` on, because of `residual`, or
 * because it was raised for long enough. */
struct report_level {
    int64_t step, first_step; /* counted from 1, as in the log */
    const struct layer *layer;
    double residual;
    enum solver_level level, before;
    struct cell_solver solver; /* at that level */
};
int report_level(struct report *r, const struct report_level *l, error *err);
/* After the session's first step: how long that took from the start of the program on. */
int report_start(struct report *r, int64_t step, double seconds, error *err);
/* On a GPU: the most bytes of device memory that were seen in use, beside what report_run said of the plan. */
int report_memory(struct report *r, int64_t step, size_t peak, error *err);

int report_valid(struct report *r, int64_t step, const struct evaluation *e, double seconds, error *err);
int report_save(struct report *r, int64_t step, const char *path, double seconds, error *err);
int report_stop(struct report *r, int64_t step, const char *signal, error *err);

/* What is logged so far survives a power cut; before a save, so that the log is never behind the checkpoint. */
int report_sync(struct report *r, error *err);

#endif
