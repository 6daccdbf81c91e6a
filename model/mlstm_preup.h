/* mlstm_preup.h: the options and sizes of the mLSTM block of the xLSTM paper (arXiv 2405.04517), for those who must
 * know more of it than mixer.h tells. */
#ifndef RIVERRUN_MLSTM_PREUP_H
#define RIVERRUN_MLSTM_PREUP_H

#include "model/mixer.h"

struct mlstm_preup_options { /* keys of [block.NAME] with mixer = mlstm_preup */
    int64_t heads;     /* H */
    int64_t expand;    /* I = expand * d_model, rounded up to a multiple of 64 */
    int64_t d_conv;    /* W */
    int64_t qkv_block; /* width of the square blocks that q, k and v are made by */
    int64_t chunk;     /* Q: how the recurrence is cut for speed */
    double eps;        /* added to the normaliser */
};

/* The sizes that follow; P is the width of a head, of its queries, keys and values alike. */
struct mlstm_preup_sizes {
    int64_t D, I, H, P, W, Q;
    int64_t blocks, block; /* of q_proj, k_proj, v_proj: I = blocks * block */
};
struct mlstm_preup_sizes mlstm_preup_sizes(const struct mlstm_preup_options *options, int64_t d_model);

#endif
