/* mlp.h: the options of the MLP layer, for the translation to and from other software's config files. */
#ifndef RIVERRUN_MLP_H
#define RIVERRUN_MLP_H

#include "model/mixer.h"

#define MLP_WIDTH_UNIT 128 /* a gated MLP's width of 0 becomes 8/3 d_model rounded up to a multiple of it */

enum mlp_kind { MLP_NONE = 0, MLP_SWIGLU, MLP_GEGLU, MLP_GELU, MLP_RELU2 };
extern const char *const mlp_names[]; /* as written in a config: mlp = NAME; NULL-terminated */

struct mlp_options {
    int64_t width;      /* mlp_width, F; 0 before `check` stands for the rule above, or for 4 d_model without a gate */
    enum mlp_kind kind; /* the block's own option */
};

static inline bool mlp_gated(const struct mlp_options *o) {
    return o->kind == MLP_SWIGLU || o->kind == MLP_GEGLU;
}

#endif
