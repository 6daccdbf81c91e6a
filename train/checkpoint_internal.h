/* checkpoint_internal.h: what the files of checkpoint.h, import and export share. Nobody else includes it. */
#ifndef RIVERRUN_CHECKPOINT_INTERNAL_H
#define RIVERRUN_CHECKPOINT_INTERNAL_H

#include "model/architecture.h"
#include "train/checkpoint.h"
#include "train/manifest.h"
#include "train/weights.h"

#define OPTIMIZER_NAME "optimizer.safetensors"
#define CONFIG_NAME "config.ini"

struct checkpoint {
    char path[LIMIT_PATH]; /* resolved: no links */
    bool ours;
    config *config;
    struct trainer_state state;
    int64_t eod;   /* eos_token_id of config.json; -1: none */
    int64_t rows;  /* vocab_size of config.json */
    struct weights weights;
    struct model *model; /* the one that checkpoint_load_model filled */
};

/* Parse a config.json: strict JSON, but for the bare words Infinity and NaN that Python writes, which become strings.
 */
int checkpoint_read_config_json(json_t **object, const char *path, error *err);

/* For a config made from config.json, which counts rows of the embedding: with a tokenizer, the rows beyond its ids are
 * known to be padding, by the most usual number that pads to them. */
int checkpoint_set_vocabulary(struct checkpoint *c, const tokenizer *t, error *err);

/* A weight_source over an open checkpoint. After weights_check; `reader` must live as long. */
struct checkpoint_reader {
    struct checkpoint *checkpoint;
    const struct params *params;
};
struct weight_source checkpoint_source(struct checkpoint_reader *reader);

#endif
