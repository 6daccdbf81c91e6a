/* mamba2.h: the options and sizes of the Mamba-2 layer (arXiv 2405.21060), for those who must know more of it than
 * mixer.h tells: the translation to and from other software's config files. */
#ifndef RIVERRUN_MAMBA2_H
#define RIVERRUN_MAMBA2_H

#include "model/mixer.h"

struct mamba2_options { /* keys of [block.NAME] with mixer = mamba2 */
    int64_t d_state;    /* N */
    int64_t head_dim;   /* P */
    int64_t expand;     /* I = expand * d_model */
    int64_t n_groups;   /* G */
    int64_t d_conv;     /* W */
    int64_t chunk;      /* Q: how the scan is cut for speed; no effect on the result beyond rounding */
    double dt_min, dt_max,
        dt_init_floor;                 /* initial step sizes: log-uniform between the first two, at least the third */
    double A_init_min, A_init_max;     /* initial -A: uniform */
    double dt_limit_min, dt_limit_max; /* clamp of the step size; dt_limit_max 0 = none */
};

/* The sizes that follow. */
struct mamba2_sizes {
    int64_t D, I, H, P, G, N, W, Q;
    int64_t C; /* channels of the convolution: [x: I | B: GN | C: GN] */
    int64_t E; /* columns of in_proj: [z: I | x: I | B: GN | C: GN | dt: H] */
};
struct mamba2_sizes mamba2_sizes(const struct mamba2_options *options, int64_t d_model);

#endif
