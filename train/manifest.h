/* manifest.h: trainer.json, the file that makes a model directory a checkpoint of riverrun: where the run stood, and
 * size and checksum of every other file. Used by checkpoint_save.c, checkpoint_open.c and import.
 */
#ifndef RIVERRUN_MANIFEST_H
#define RIVERRUN_MANIFEST_H

#include "train/checkpoint.h"
#include "train/model_directory.h"

#define MANIFEST_NAME "trainer.json"

struct manifest {
    struct trainer_state state;
    struct model_file files[MODEL_DIRECTORY_FILES];
    int count;
};

/* Write trainer.json for the files that are in `d`, and add it to them. */
int manifest_write(struct model_directory *d, const struct trainer_state *state, error *err);

/* Read DIRECTORY/trainer.json: its own checksum, every member, the names of the files. */
int manifest_read(struct manifest *m, const char *directory, error *err);

/* Compare every file in the list with what is on disk. */
int manifest_verify(const struct manifest *m, const char *directory, error *err);

const struct model_file *manifest_find(const struct manifest *m, const char *name); /* NULL if not listed */

#endif
