/* groups.h: how the optimizer treats each tensor: the table's decay and clamp, changed by the [group.NAME] sections
 * that match its name. Called by optimizer.c, and by the trainer and `riverrun plan`, which check a config before
 * anything starts.
 *
 * A tensor may be in several groups, and takes each number from the one group that gives it. Two groups that give the
 * same number to one tensor are refused, so the order of sections never matters.
 */
#ifndef RIVERRUN_GROUPS_H
#define RIVERRUN_GROUPS_H

#include "model/params.h"
#include "train/options.h"

struct treatment {
    double lr_scale;
    double weight_decay;         /* 0: exempt */
    double clamp_min, clamp_max; /* infinite where there is no bound */
};

/* The treatment of every tensor of the table: `out` has room for p->count of them. Refuses globs that match no tensor,
 * numbers given twice and a clamp that leaves no room. */
int groups_treat(struct treatment *out, const struct params *p, const struct optimizer_options *options, error *err);
/* The same, for its refusals alone. */
int groups_check(const struct params *p, const struct optimizer_options *options, error *err);

#endif
