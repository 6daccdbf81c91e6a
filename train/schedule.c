/* schedule.c: the learning rate as a pure function of the step, so that resuming needs no state. The formulas are
 * in options.h. Called by the trainer once a step. */
#include "train/options.h"

#include <math.h>

#define PI 3.14159265358979323846

/* How far the decay is at step t, from 0 to 1, when it takes `length` steps from step `from` on. */
static double progress(int64_t t, int64_t from, int64_t length) {
    if (t <= from) return 0;
    if (t - from >= length) return 1;
    return (double)(t - from) / (double)length;
}

/* The learning rate without the cool-down. */
static double decayed(const struct schedule_options *s, double peak, int64_t steps, int64_t t) {
    double range = peak - s->min_lr;
    int64_t length = s->decay_steps > 0 ? s->decay_steps : steps - s->warmup - s->cooldown;
    int64_t since = t - s->warmup; /* steps after the warm-up */
    switch ((enum schedule_kind)s->kind) {
    case SCHEDULE_CONSTANT: return peak;
    case SCHEDULE_COSINE: return s->min_lr + range * 0.5 * (1 + cos(PI * progress(since, 0, length)));
    case SCHEDULE_LINEAR: return s->min_lr + range * (1 - progress(since, 0, length));
    case SCHEDULE_WSD: return s->min_lr + range * (1 - progress(t, steps - s->decay_steps, s->decay_steps));
    case SCHEDULE_EXPONENTIAL:
        if (s->decay_steps > 0 && since > s->decay_steps) since = s->decay_steps;
        return s->min_lr + range * exp2(-(double)since / s->half_life);
    }
    ASSERT(!"a schedule kind from the option table");
    return 0;
}

double schedule_lr(const struct schedule_options *s, double peak, int64_t steps, int64_t t) {
    if (t < s->warmup) return peak * (double)(t + 1) / (double)s->warmup;
    int64_t cooling = steps - s->cooldown;
    if (s->cooldown == 0 || t <= cooling) return decayed(s, peak, steps, t);
    return t < steps ? decayed(s, peak, steps, cooling) * (double)(steps - t) / (double)s->cooldown : 0;
}
