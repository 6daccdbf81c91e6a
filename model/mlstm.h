/* mlstm.h: the options and sizes of the mLSTM layer of the xLSTM 7B architecture (arXiv 2503.13427), for those who must
 * know more of it than mixer.h tells: the translation to and from other software's config files. */
#ifndef RIVERRUN_MLSTM_H
#define RIVERRUN_MLSTM_H

#include "model/mixer.h"

enum mlstm_gate { MLSTM_GATE_EXP = 0, MLSTM_GATE_SIGMOID };
enum mlstm_way_back { MLSTM_EXACT = 0, MLSTM_TRUNCATED };

struct mlstm_options { /* keys of [block.NAME] with mixer = mlstm */
    int64_t heads;
    double qk_factor, v_factor; /* widths of q and k, and of v, in all heads: times d_model, rounded down */
    int64_t chunk;              /* Q: how the recurrence is cut for speed; no effect on the result beyond rounding */
    int input_gate;             /* enum mlstm_gate */
    bool normalise;
    int backward; /* enum mlstm_way_back */
    double gate_soft_cap;
    double eps; /* of the normaliser */
};

/* The sizes that follow. */
struct mlstm_sizes {
    int64_t D, H, Q;
    int64_t K, V;   /* of a head: width of q and k, width of v */
    int64_t HK, HV; /* of all heads */
    int64_t E;      /* columns of the projection: [q: HK | k: HK | v: HV | o: HV] */
};
struct mlstm_sizes mlstm_sizes(const struct mlstm_options *options, int64_t d_model);

#endif
