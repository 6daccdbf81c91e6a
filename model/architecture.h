/* architecture.h: how a model looks to other software: the config.json of a Hugging Face architecture, both ways.
 *
 * An architecture recognises the models it can express (say, all blocks Mamba-2 with equal options and no MLP) and
 * turns their config into config.json; or reads a config.json into [model] and [block.*] settings. Models that no
 * architecture expresses get a config.json of model_type "riverrun" holding the same settings, which riverrun reads
 * back, and Python files by which transformers opens them. Called by train/ (checkpoints, import, export), and by
 * model_config.c, which gives every tensor the name that it has in the architecture's checkpoints. Layers declare
 * theirs as backbone.layers.N.mixer.*, N.mlp.*, N.norm.* and N.norm2.* (before mixer and MLP), between
 * backbone.embeddings.weight and backbone.norm_f.weight, lm_head.weight: Mamba's names, which models without an
 * architecture keep.
 */
#ifndef RIVERRUN_ARCHITECTURE_H
#define RIVERRUN_ARCHITECTURE_H

#include "common/json.h"
#include "model/model.h"

/* How names of tensors differ: one that starts with `ours` starts with `theirs` in the checkpoint. `#` in both is the
 * number of a block. */
struct architecture_name {
    const char *ours, *theirs;
};

struct architecture {
    const char *model_type; /* config.json's "model_type": "mamba2" */
    const char *class_name; /* "Mamba2ForCausalLM" */
    /* The first that fits a name counts; what fits none stays. Ends with a NULL; NULL: all names are the same. */
    const struct architecture_name *names;
    bool (*expresses)(const struct model_config *mc);
    /* A sentence on where transformers' class fails with this model, for whom exports it; NULL: nowhere. The function
     * may be NULL. */
    const char *(*caveat)(const struct model_config *mc);
    /* A new object with every key that transformers reads; eod is the end-of-document id, below 0 for none. */
    json_t *(*write)(const struct model_config *mc, int64_t eod);
    /* Set [model] and [block.NAME] keys in `c` from config.json; what is not said has the default that transformers
     * gives it. Values that riverrun's layer can't have (an activation, a bias, groups, ...) are refused by key. */
    int (*read)(const json_t *object, const char *name, config *c, error *err);
};

extern const struct architecture architecture_mamba;
extern const struct architecture architecture_mamba2;
extern const struct architecture architecture_xlstm;
extern const struct architecture architecture_llama;
extern const struct architecture architecture_arcee;

/* The config.json of a model. `c` is the config that mc was bound from. */
json_t *architecture_write(const struct model_config *mc, const config *c, int64_t eod);

/* [model] and [block.*] from a config.json; `name` stands for the file in messages. The vocabulary is set to the number
 * of rows; a caller that knows the tokenizer may set model.vocab_size and model.pad_vocab_to once more. */
int architecture_read(const json_t *object, const char *name, config *c, error *err);

/* Rename the tensors of a model's table as its architecture does. */
void architecture_name_tensors(struct model_config *mc);

/* The class name, or NULL if transformers has no such architecture. */
const char *architecture_class(const struct model_config *mc);

/* What its user should know of that class (see above), or NULL. */
const char *architecture_caveat(const struct model_config *mc);

/* What a model directory holds beside config.json for transformers to open it: Python files (model/hub/) where it has
 * no such architecture, else none. The list ends with a NULL. */
struct architecture_file {
    const char *name, *text;
};
const struct architecture_file *architecture_files(const struct model_config *mc);

/* architecture_write and architecture_read for models that no architecture expresses. */
#define ARCHITECTURE_OWN_TYPE "riverrun" /* their "model_type" */
json_t *architecture_write_own(const struct model_config *mc, const config *c, int64_t eod);
int architecture_read_own(const json_t *object, const char *name, config *c, error *err);

/* For implementations: config_set with a number; members of a new config.json; bos, eos and pad ids (null if eod < 0)
 * as members. */
int architecture_set_int(config *c, const char *section, const char *key, int64_t value, error *err);
int architecture_set_real(config *c, const char *section, const char *key, double value, error *err);
void architecture_put_int(json_t *object, const char *key, int64_t value);
void architecture_put_real(json_t *object, const char *key, double value);
void architecture_put_bool(json_t *object, const char *key, bool value);
void architecture_put_text(json_t *object, const char *key, const char *value);
void architecture_put_ids(json_t *object, int64_t eod);
/* An integer of config.json, and the option it is set to (section NULL: none). */
struct architecture_int {
    const char *key;
    int64_t fallback;    /* what transformers takes where the key is missing */
    int64_t least, most; /* what riverrun can have */
    const char *section, *option;
};
int architecture_read_ints(const json_t *object, const char *name, const struct architecture_int *ints, int count,
                           int64_t *values, config *c, error *err);
/* A flag that changes what is computed and that the layer has in one way only. */
int architecture_check_flag(const json_t *object, const char *name, const char *key, bool fallback, bool wanted,
                            const char *layer, error *err);

/* A text from a file for a message: its first 64 bytes without control characters. */
const char *architecture_shown(const char *text, char out[65]);

#endif
