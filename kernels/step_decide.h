/* step_decide.h: the arithmetic of step_scalars and worst_reports (kernels/ops.h), once for all tables: a few dozen
 * operations in double that one thread does, and the look through a layer's reports. Included by
 * kernels/cpu/optimizer.c and kernels/cuda/optimizer.cu. */
#ifndef RIVERRUN_STEP_DECIDE_H
#define RIVERRUN_STEP_DECIDE_H

#include "kernels/ops.h"

#include <math.h>

#ifdef __CUDACC__
#define STEP_DECIDE static __host__ __device__ inline
#else
#define STEP_DECIDE static inline
#endif

/* Also false for what is not a number. */
STEP_DECIDE bool step_is_finite(double v) {
    return fabs(v) <= 1.7976931348623157e308;
}

/* The largest residual of layer i on any rank; infinite if one is not a number. */
STEP_DECIDE float worst_report(const struct cell_report *reports, int64_t ranks, int64_t n, int64_t i) {
    float worst = 0;
    for (int64_t r = 0; r < ranks; r++) {
        float residual = reports[r * n + i].residual;
        if (!(residual <= worst)) worst = residual == residual ? residual : INFINITY;
    }
    return worst;
}

STEP_DECIDE void step_decide(struct adamw_step *step, struct step_report *report, int64_t *steps,
                             const struct step_totals *totals, const struct step_rates *rates,
                             const struct step_rule *rule) {
    double to_mean = 1 / (rule->scale * totals->loss.valid);
    double norm = sqrt(totals->squares) * to_mean;
    bool finite = step_is_finite(totals->loss.nll) && step_is_finite(totals->loss.z) && step_is_finite(norm);
    bool skip = !finite || !(totals->loss.valid > 0) || !(totals->residual <= rule->residual_max);
    double clipping = rule->clip > 0 ? fmin(1.0, rule->clip / (norm + 1e-6)) : 1;
    double t = (double)(*steps + 1);
    step->lr = rates->lr;
    step->decay_rate = rates->decay_rate;
    step->beta1 = rule->beta1;
    step->beta2 = rule->beta2;
    step->eps = rule->eps;
    step->correction1 = 1 - pow(rule->beta1, t);
    step->correction2 = 1 - pow(rule->beta2, t);
    step->grad_scale = to_mean * clipping;
    step->skip = skip;
    step->unused = 0;
    if (!skip) ++*steps;
    report->totals = *totals;
    report->grad_norm = norm;
    report->steps = *steps;
    report->skipped = skip;
    report->unused = 0;
}

#endif
