/* attention.h: the options of the attention layer and the sizes that follow from them, for the translation to and from
 * other software's config files. */
#ifndef RIVERRUN_ATTENTION_H
#define RIVERRUN_ATTENTION_H

#include "model/mixer.h"

struct attention_options {
    int64_t heads, kv_heads, head_dim; /* H, G, P; kv_heads = 0 and head_dim = 0 before `check` stand for their rules */
    int64_t window, context;
    double rope_base;
    bool qk_norm;
};

/* D model width, H heads, G heads of keys and values, P head width, HP and GP all of them together, E columns of the
 * projections, C slots of the cache. */
struct attention_sizes {
    int64_t D, H, G, P, HP, GP, E, C;
};
struct attention_sizes attention_sizes(const struct attention_options *o, int64_t d_model);

#endif
