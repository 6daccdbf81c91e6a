/* model_directory.h: writing the files that make a directory a model for other software: config.json, weights,
 * tokenizer.
 *
 * Used by checkpoint_save.c, import and export, each of which writes to a temporary name, adds files of its own, has
 * all of it verified and renames it. Every file is synced as it is closed; what was written is remembered by size and
 * XXH64 and compared with what the disk gives back.
 */
#ifndef RIVERRUN_MODEL_DIRECTORY_H
#define RIVERRUN_MODEL_DIRECTORY_H

#include "common/json.h"
#include "data/tokenizer.h"
#include "model/model.h"

#define MODEL_DIRECTORY_FILES 24

struct model_file {
    char name[64];
    uint64_t size, hash; /* XXH64, seed 0 */
};

struct model_directory {
    char path[LIMIT_PATH];
    struct model_file files[MODEL_DIRECTORY_FILES];
    int count;
};

/* Make the directory, which must not exist, with its parents. */
int model_directory_begin(struct model_directory *d, const char *path, error *err);

/* One file. */
int model_directory_text(struct model_directory *d, const char *name, const char *text, size_t size, error *err);
int model_directory_json(struct model_directory *d, const char *name, const json_t *value, error *err);

/* Remember a file that the caller wrote there itself. */
void model_directory_add(struct model_directory *d, const char *name, uint64_t size, uint64_t hash);

/* Where weights come from: all elements of tensor `index` of the table as f32. */
struct weight_source {
    const struct params *params;
    void (*read)(void *self, int index, float *values);
    void *self;
};

enum weight_form {
    WEIGHTS_F32,
    WEIGHTS_BF16,    /* the table's keep_real tensors stay f32; they come first in the file, for alignment */
    WEIGHTS_BF16_ALL /* these too in bf16 */
};

/* config.json, generation_config.json, model.safetensors, and the Python files for a model that transformers has no
 * class for. `c` is the config that mc was bound from; eod is the end-of-document id, below 0 for none. Memory: one
 * tensor. */
int model_directory_model(struct model_directory *d, const struct model_config *mc, const config *c, int64_t eod,
                          const struct weight_source *source, enum weight_form form, error *err);

/* tokenizer.json and tokenizer_config.json: riverrun's own, or whatever tokenizer files `from` holds, byte for byte. */
int model_directory_tokenizer(struct model_directory *d, const tokenizer *t, error *err);
int model_directory_copy_tokenizer(struct model_directory *d, const char *from, error *err);

/* Read every file back and compare; then sync the directory. */
int model_directory_verify(const struct model_directory *d, error *err);

/* Give a verified directory its name, and sync its parent: it is complete there, or not there. */
int model_directory_publish(const struct model_directory *d, const char *path, error *err);

/* The parent of a path, without trailing slashes: "a/b/" gives "a", "b" gives ".". */
int model_directory_parent(char *out, size_t out_size, const char *path, error *err);

#endif
