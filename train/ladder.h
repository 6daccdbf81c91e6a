/* ladder.h: what is done about layers whose recurrence was not solved: a ladder of levels for training, and a second
 * computation for everything else. Called by trainer.c; by evaluate.c and generate.c.
 *
 * A solver that iterates leaves a residual. Where that of a step is above `limit`, in any layer and on any rank, the
 * device skips the update by itself (step_scalars), and the layer goes a level up (enum solver_level): first to more
 * iterations, then, should that not do, to the sequential solver, which is exact. After `hold` steps it is tried a
 * level lower.
 *
 * Where each layer stands is a function of the reports of steps that are done, the same on all ranks, and part of the
 * trainer's state. On a GPU a report is known when the step behind it is queued already (`ahead` = 1: step_ahead), so
 * what it changes begins 1 + ahead steps later; that step is kept with the change, so that a run that was stopped and
 * goes on, whose reports are all known, does the same.
 */
#ifndef RIVERRUN_LADDER_H
#define RIVERRUN_LADDER_H

#include "model/model.h"
#include "train/comm.h"
#include "train/options.h"

/* Where a layer stands; all 0: where its config says. */
struct rung {
    int32_t level, before; /* enum solver_level from step `since` on (counted from 0), and until then */
    int64_t since;
};

extern const char *const solver_level_names[]; /* "chosen", "more", "sequential" */

/* The level of a step. */
enum solver_level rung_level(const struct rung *r, int64_t step);

/* Step number `step` is done, and `residual` is what its solver left; `judged`: it can be held against the layer.
 * Returns whether the level changes, up or down. */
bool rung_judge(struct rung *r, int64_t step, double residual, bool judged, int ahead,
                const struct solver_options *options);

/* How many layers, from the first on, can be judged by what they report: a layer whose states are not finite leaves
 * none to those behind it. */
int ladder_judged(const struct cell_report *worst, int count);

/* ---- beside training ---- */

/* A pass forward whose solvers failed is repeated with the layers in question solved sequentially. For that the
 * residual need not be one that spoils a gradient; it only has to show. */
#define GUARD_RESIDUAL 1e-3

struct guard {
    struct model *model;
    enum solver_level *levels; /* as they were */
    struct cell_report *reports;
    int64_t *worst;  /* of a layer, over all ranks: the bits of its residual */
    double residual; /* the largest of the last pass, over all ranks */
    int raised;      /* layers solved sequentially because of it */
};

/* Before the first pass. close gives the model its levels back. */
int guard_open(struct guard *g, struct model *m, error *err);
void guard_close(struct guard *g);
/* Collective, after a pass: is it to be repeated? Then what failed has been raised, and rank 0 has told so in a line
 * that calls the pass `what`. Waits for the device. */
bool guard_repeat(struct guard *g, struct comm *comm, const char *what);

#endif
