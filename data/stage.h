/* stage.h: the place where tokenize makes its shards before they appear, all at once, in the output directory.
 *
 * Shards are written to OUT/.PREFIX.tmp/. Committing gives that directory the suffix DATASET_COMMIT_SUFFIX, which makes
 * readers refuse OUT, renames everything into place, and removes the directory. So at any moment OUT holds the old
 * state, the new state, or a mark that says it holds neither; what a killed run left is cleared by the next one.
 */
#ifndef RIVERRUN_STAGE_H
#define RIVERRUN_STAGE_H

#include "common/error.h"
#include "data/tokenizer.h"
#include <stdbool.h>
#include <stddef.h>

#define STAGE_SHARDS_MAX 100000 /* names have five digits, so that their bytewise order is the order of the shards */
#define STAGE_PREFIX_MAX 128    /* bytes in PREFIX */

typedef struct stage stage;

/* Makes `out` if need be and locks it against other runs. Refused without `overwrite` if there are shards, or another
 * tokenizer's tokenizer.json; with it, shards of this prefix are replaced at the commit and others stay, which must
 * have been made with the same tokenizer. */
int stage_open(stage **g, const char *out, const char *prefix, bool overwrite, const tokenizer *t, error *err);

/* Where to write shard `index`, counted from 0. */
int stage_shard_path(const stage *g, size_t index, char *path, size_t size, error *err);

/* Put `shards` shards and tokenizer.json into place. Frees, on failure too; then everything is as it was before. */
int stage_commit(stage *g, size_t shards, error *err);

void stage_abandon(stage *g); /* remove and free; NULL is fine */

#endif
