/* architecture.h: how a model looks to other software: the config.json of a Hugging Face architecture, both ways.
 *
 * An architecture recognises the models it can express (say, all blocks Mamba-2 with equal options and no MLP) and turns their config
 * into config.json; or reads a config.json into [model] and [block.*] settings. Models that no architecture expresses get a config.json of
 * model_type "riverrun" holding the same settings: riverrun reads it back, transformers says that it does not know it.
 */
#ifndef RIVERRUN_ARCHITECTURE_H
#define RIVERRUN_ARCHITECTURE_H

#include "common/json.h"
#include "model/model.h"

struct architecture {
    const char *model_type; /* config.json's "model_type": "mamba2" */
    const char *class_name; /* "Mamba2ForCausalLM" */
    bool (*expresses)(const struct model_config *mc);
    /* A new object with every key that transformers reads; eod is the end-of-document id. */
    json_t *(*write)(const struct model_config *mc, int64_t eod);
    /* Set [model] and [block.NAME] keys in `c` from config.json; unsupported values (an activation, a bias, n_groups...) are refused by key. */
    int (*read)(const json_t *object, const char *name, config *c, error *err);
};

json_t *architecture_write(const struct model_config *mc, const config *c, int64_t eod); /* picks; never fails */
int architecture_read(const json_t *object, const char *name, config *c, error *err);
/* The class name, or NULL if transformers has no such architecture. */
const char *architecture_class(const struct model_config *mc);

#endif
