/* support_checkpoint.h: a small model with an optimizer whose whole state is a function of a step number, so that a
 * test can tell which step a checkpoint holds and whether every bit of it is right. Used by the tests of checkpoints,
 * import and export. Failures to open one end the program: the tests run it in child processes and threads too.
 */
#ifndef RIVERRUN_SUPPORT_CHECKPOINT_H
#define RIVERRUN_SUPPORT_CHECKPOINT_H

#include "train/checkpoint.h"

/* As unit_directory, in memory where the machine has a file system there: a save syncs two dozen times, which takes a
 * third of a second on a disk. */
void parts_directory(char out[256]);

struct parts {
    config *c;
    tokenizer *t;
    struct model_config *mc;
    struct device *dev;
    struct model *m;
    struct optimizer *o;
    struct comm *comm;
};

extern const char parts_text[]; /* the usual config: bytes, two Mamba-2 blocks, tied */

/* `text` is a config; only the model's sections count. */
void parts_open(struct parts *p, struct comm *comm, enum precision precision, const char *text);
void parts_close(struct parts *p);

/* The weights and moments of a step, and the trainer's state that goes with it. */
void parts_fill(struct parts *p, int64_t step);
struct trainer_state parts_state(int64_t step);
void parts_expect_state(const struct trainer_state *s, int64_t step);

/* XXH64 of all weights and moments as f32, the same for any number of ranks. Collective; 0 on ranks but the first. */
uint64_t parts_digest(struct parts *p);

/* Fill and save. */
int parts_save(struct parts *p, const char *run, int64_t step, int64_t keep, error *err);

/* Open, load weights and moments (in place of what is there), and close. `state` may be NULL. Collective. */
int parts_load(struct parts *p, const char *path, struct trainer_state *state, error *err);

#endif
