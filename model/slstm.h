/* slstm.h: the options and sizes of the sLSTM layer (arXiv 2405.04517), for those who must know more of it than mixer.h
 * tells. */
#ifndef RIVERRUN_SLSTM_H
#define RIVERRUN_SLSTM_H

#include "model/mixer.h"

enum slstm_recurrent_init { SLSTM_RECURRENT_ZEROS, SLSTM_RECURRENT_UNIFORM };

struct slstm_options { /* keys of [block.NAME] with mixer = slstm */
    int64_t heads;      /* H */
    int64_t d_conv;     /* W; 0 = no convolution */
    int recurrent_init; /* enum slstm_recurrent_init */
    double clip;        /* of the gradient through the recurrent weights; 0 = none */
};

/* The sizes that follow. */
struct slstm_sizes {
    int64_t D, H, P, W;
};
struct slstm_sizes slstm_sizes(const struct slstm_options *options, int64_t d_model);

#endif
