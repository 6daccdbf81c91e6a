/* mlp.h: the one option of the SwiGLU MLP layer, for the translation to and from other software's config files. */
#ifndef RIVERRUN_MLP_H
#define RIVERRUN_MLP_H

#include "model/mixer.h"

#define MLP_WIDTH_UNIT 128 /* a width of 0 becomes 8/3 d_model rounded up to a multiple of it */

struct mlp_options {
    int64_t width; /* mlp_width, F; 0 before `check` stands for the rule above */
};

#endif
