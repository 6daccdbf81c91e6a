/* rat.h: the options of the RAT layer and the sizes that follow from them. */
#ifndef RIVERRUN_RAT_H
#define RIVERRUN_RAT_H

#include "model/mixer.h"

struct rat_options {
    int64_t heads, groups, chunk, context;
    double rope_base;
};

/* D model width, H heads, G groups of queries and keys, P head width, Q chunk, E columns of the projection, C slots of
 * the state. */
struct rat_sizes {
    int64_t D, H, G, P, Q, E, C;
};
struct rat_sizes rat_sizes(const struct rat_options *o, int64_t d_model);

#endif
