/* weights.h: the tensors of a model directory: model.safetensors, or several files behind model.safetensors.index.json.
 *
 * Used by checkpoint_open.c (and through it by everything that reads a model), import and export. Files are mapped;
 * what is returned lives until weights_close.
 */
#ifndef RIVERRUN_WEIGHTS_H
#define RIVERRUN_WEIGHTS_H

#include "common/safetensors.h"
#include "model/params.h"

struct weights {
    char directory[LIMIT_PATH];
    safetensors **files;
    size_t count;
};

/* Open what `directory` holds. A directory with nothing but pytorch_model.bin is refused with a sentence that says how
 * to convert it. On failure there is nothing to close. */
int weights_open(struct weights *w, const char *directory, error *err);
void weights_close(struct weights *w);

/* By its name in the tensor table; other software's spellings of it are known. NULL if there is none. */
const struct safetensors_entry *weights_find(const struct weights *w, const char *name);

/* Every tensor of the table must be there, in its shape and a floating dtype, and nothing else may be: a sentence that
 * names what is missing, too much or wrong. An lm_head.weight beside a tied embedding is accepted if it equals that. */
int weights_check(const struct weights *w, const struct params *params, error *err);

/* All elements of tensor `index` as f32. After weights_check. */
void weights_read(const struct weights *w, const struct params *params, int index, float *values);

#endif
