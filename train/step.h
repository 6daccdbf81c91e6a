/* step.h: one training step as work that is queued on the device: this rank's micro-batches, the optimizer, and a
 * report that comes back late. Called by trainer.c and bench.c.
 *
 * Nothing waits for the device before step_wait. On a GPU the work of a micro-batch is recorded at its second run and
 * replayed from then on (device_run); so all that changes from step to step lies in device memory, and a step's
 * decisions are the device's (step_scalars). On the CPU the same calls compute at once.
 */
#ifndef RIVERRUN_STEP_H
#define RIVERRUN_STEP_H

#include "train/optimizer.h"

struct step;

/* Gradients are those of the sum over targets times `scale`; a step whose solvers left more than `residual_max` changes
 * nothing. Model, optimizer and comm must outlive it; micro-batches all have the same shape, and all have document
 * numbers or none. */
int step_open(struct step **s, struct model *m, struct optimizer *o, struct comm *comm, double scale, double z_loss,
              double residual_max, error *err);
void step_close(struct step *s);

/* Queue a step: its word (optimizer_begin), then each of this rank's micro-batches (model_set_batch), `last` for the
 * one that ends the step. The arrays are the caller's again on return. */
void step_begin(struct step *s, double lr, bool signalled);
void step_batch(struct step *s, const int32_t *tokens, const int32_t *targets, const int32_t *doc, int64_t B, int64_t T,
                bool last);

/* From the next step on, layer `solver` (its number in model.h) is solved so. What was recorded is forgotten. */
void step_set_level(struct step *s, int solver, enum solver_level level);

/* Wait for the oldest step under way; its report is the same on all ranks. *worst (NULL: not asked for): the largest
 * residual of each layer with a solver, on any rank, to be read before the step after the next is queued. Fails with
 * the device's failure, if any. */
int step_wait(struct step *s, struct step_report *report, const struct cell_report **worst, error *err);

/* Steps that should be under way while the report of the one before is waited for: 1 where the device works by itself,
 * so that it always has something to do. One more may be queued. */
int step_ahead(const struct step *s);

#endif
