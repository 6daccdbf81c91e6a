/* architecture_ssm.h: what the config.json of Mamba and of Mamba-2 have in common, written and read once. Included by
 * architecture_mamba.c and architecture_mamba2.c only.
 *
 * Both describe a model whose blocks are alike and have no MLP. Reading makes one block, [block.m].
 */
#ifndef RIVERRUN_ARCHITECTURE_SSM_H
#define RIVERRUN_ARCHITECTURE_SSM_H

#include "model/architecture.h"

#define SSM_BLOCK "block.m"

/* All blocks have this mixer and no MLP, and `same` holds between the options of the first kind and every other's: same
 * tensors and same function. What only matters for initial weights or speed may differ. */
bool ssm_expresses(const struct model_config *mc, const struct mixer *mixer,
                   bool (*same)(const void *first, const void *other));

/* The options that both have. */
struct ssm_options {
    int64_t d_state, expand, d_conv;
    int64_t dt_rank;
    double dt_min, dt_max, dt_init_floor;
};

/* A new object with the keys of both. */
json_t *ssm_write(const struct architecture *a, const struct model_config *mc, int64_t eod,
                  const struct ssm_options *o);

/* A real that is set to an option of the block if it is there. */
int ssm_read_real(const json_t *object, const char *name, const char *key, const char *option, config *c, error *err);

/* The rest of what both have: `layer` is what messages call it, `tied` what a missing tie_word_embeddings means. */
int ssm_read(const json_t *object, const char *name, const struct mixer *mixer, const char *layer, int64_t blocks,
             bool tied, config *c, error *err);

#endif
