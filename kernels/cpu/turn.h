/* turn.h: rotary positions on the CPU: what rope.c and rat.c share. Angles are made in double and reduced to a turn
 * there, so that they are right at any position. */
#ifndef RIVERRUN_CPU_TURN_H
#define RIVERRUN_CPU_TURN_H

#include "kernels/cpu/cpu.h"

enum { ROPE_HALF_MAX = 128 };

/* Cosines and sines of one token's angles. */
struct turn {
    real cosine[ROPE_HALF_MAX], sine[ROPE_HALF_MAX];
};

static inline void turn_make(struct turn *turn, const double *rate, int64_t half, double position) {
    for (int64_t i = 0; i < half; i++) {
        double turns = position * rate[i], angle = 2 * M_PI * (turns - rint(turns));
        turn->cosine[i] = (real)cos(angle);
        turn->sine[i] = (real)sin(angle);
    }
}

/* How many turns a step of one position is, for each pair of channels. */
static inline void turn_rates(double *rate, int64_t half, double base) {
    for (int64_t i = 0; i < half; i++)
        rate[i] = base > 0 ? pow(base, -(double)i / (double)half) / (2 * M_PI) : 0;
}

/* to = R from, or its inverse with direction -1; the two may be the same memory. */
static inline void turn_head(real *to, const real *from, const struct turn *turn, int64_t half, real direction) {
    for (int64_t i = 0; i < half; i++) {
        real a = from[i], b = from[i + half], sine = direction * turn->sine[i];
        to[i] = a * turn->cosine[i] - b * sine;
        to[i + half] = b * turn->cosine[i] + a * sine;
    }
}

#endif
