/* mamba.h: the options and sizes of the Mamba layer (arXiv 2312.00752), for those who must know more of it than mixer.h
 * tells: the translation to and from other software's config files. */
#ifndef RIVERRUN_MAMBA_H
#define RIVERRUN_MAMBA_H

#include "model/mixer.h"

struct mamba_options { /* keys of [block.NAME] with mixer = mamba */
    int64_t d_state;   /* N */
    int64_t expand;    /* I = expand * d_model */
    int64_t d_conv;    /* W */
    int64_t dt_rank;   /* columns of x_proj that the step sizes are made from; after check never 0 */
    double dt_min, dt_max,
        dt_init_floor; /* initial step sizes: log-uniform between the first two, at least the third */
    double dt_scale;   /* of dt_proj's initial weights */
};

/* The sizes that follow. */
struct mamba_sizes {
    int64_t D, I, N, W;
    int64_t rank; /* of the step sizes */
    int64_t X;    /* columns of x_proj: [dt: rank | B: N | C: N] */
};
struct mamba_sizes mamba_sizes(const struct mamba_options *options, int64_t d_model);

/* What dt_rank = 0 stands for. */
int64_t mamba_dt_rank(int64_t d_model);

#endif
