/* optimizer.h: AdamW over ZeRO-1 shards: each rank holds m and v of, and updates, its slice of every bucket.
 *
 * With the step's learning rate lr, the mean gradient g after clipping, and the tensor's treatment (groups.h):
 *   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
 *   w -= lr lr_scale u + rate w, then clamped to [clamp_min, clamp_max], where
 *   rate = lr lr_scale weight_decay          decay_mode = lr
 *        = (lr / optimizer.lr) weight_decay  decay_mode = detached: the course of the learning rate without its height
 */
#ifndef RIVERRUN_OPTIMIZER_H
#define RIVERRUN_OPTIMIZER_H

#include "common/arena.h"
#include "model/model.h"
#include "train/comm.h"
#include "train/groups.h"
#include "train/options.h"

struct optimizer;

/* m and v zeroed; segments built from the treatments of the tensors (groups_treat, whose refusals come out here).
 * Model and comm must outlive the optimizer. */
int optimizer_open(struct optimizer **o, struct model *m, struct comm *comm, const struct optimizer_options *options,
                   error *err);
void optimizer_close(struct optimizer *o);

/* Weights travel late. A step updates this rank's slices only, and all-gathers those that the next forward needs at
 * once. The next step begins with optimizer_spread, which starts the all-gathers of the others, in the order in
 * which forward needs them; optimizer_await makes the device's further work wait for a bucket's, if one is under way
 * (called from model_forward's hook). Between steps, whoever is to compute with the weights settles them first. */
void optimizer_spread(struct optimizer *o);
void optimizer_await(struct optimizer *o, int bucket);
void optimizer_settle(struct optimizer *o);

/* Give one bucket's gradients, complete on this rank, to the sum over ranks (called from model_backward's `ready`
 * in the last micro-batch of a step). */
void optimizer_reduce(struct optimizer *o, int bucket);

/* Give the reports of this rank's solvers (model_reports), complete for the step, to all ranks: called behind its last
 * forward, so that they travel while it goes back. Nothing where the model solves nothing. */
void optimizer_share_reports(struct optimizer *o);

/* A step, in three calls that only queue work on the device. The host's word on it: the learning rate, and whether this
 * rank was asked to stop, which the ranks add up. */
void optimizer_begin(struct optimizer *o, double lr, bool signalled);
/* After every bucket was reduced: norm over all ranks, the decision (step_scalars of kernels/ops.h, on the model's loss
 * sums over all ranks), AdamW on this rank's slices, all-gather of the first weights. Gradients hold the sum over valid
 * targets times `scale`; a step with a residual above `residual_max` is skipped. One that is skipped leaves weights, m,
 * v and the step count untouched. May be recorded. */
void optimizer_step(struct optimizer *o, double scale, double residual_max);
/* What came of it, into memory from device_fetch's kind of host memory; the same on all ranks. `worst`: for each layer
 * with a solver, the largest residual on any rank; NULL: not asked for. */
void optimizer_fetch(struct optimizer *o, struct step_report *report, struct cell_report *worst);
/* Slots that the optimizer's calls of comm.h take, for comm_attach. */
int optimizer_slots(const struct model_config *mc);

/* Runs of equal treatment within elements [offset, offset + count) of the flat array, for the tensors [first,
 * first + params) of the table, `treatments` being those of the whole table and `mode` an enum decay_mode; their
 * offsets are counted from `offset`. Returns the number of runs; `segments` may be NULL to ask for it. */
int optimizer_segments(const struct params *p, int first, int params, int64_t offset, int64_t count,
                       const struct treatment *treatments, int mode, struct adamw_segment *segments);

/* Steps taken, skipped ones not counted; it lives on the device, so reading it waits. */
int64_t optimizer_steps(const struct optimizer *o);
void optimizer_set_steps(struct optimizer *o, int64_t steps);

/* Collective, for checkpoints: bucket's m (which = 0), v (1) or master weights on rank 0 as `count` elements in flat
 * order (host memory, real), and back (m and v). */
#define OPTIMIZER_WEIGHTS 2
void optimizer_gather(struct optimizer *o, int bucket, int which, void *host_all);
void optimizer_scatter(struct optimizer *o, int bucket, int which, const void *host_all);

#endif
