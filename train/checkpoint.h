/* checkpoint.h: checkpoints are model directories. The layout is specified in docs/checkpoint.md.
 *
 *   RUN/step-00001000/   config.json model.safetensors generation_config.json    what from_pretrained opens
 *                        tokenizer.json tokenizer_config.json
 *                        *_riverrun.py          where transformers has no class for the model: the Python that opens it
 *                        config.ini             the run's effective config: model and blocks are rebuilt from it
 *                        optimizer.safetensors  m.NAME and v.NAME for every parameter, f32
 *                        trainer.json           step, samples, counters, and size and XXH64 of every other file
 *   RUN/latest           symbolic link to the newest complete one
 *
 * Saving: everything goes to RUN/tmp-step-..., is synced, re-read and compared by checksum, renamed; then `latest`
 * moves; then old ones go. A kill at any moment leaves `latest` pointing to a complete checkpoint, or absent before the
 * first save. A run without it (killed just there, or copied without links) stands at its newest step.
 */
#ifndef RIVERRUN_CHECKPOINT_H
#define RIVERRUN_CHECKPOINT_H

#include "common/config.h"
#include "data/tokenizer.h"
#include "model/model.h"
#include "train/comm.h"
#include "train/ladder.h"
#include "train/optimizer.h"

enum { LIMIT_STEP_NAME = 32 }; /* bytes of step-N, its end included: N has at most 18 digits */

/* The trainer's own state: where a run stands. */
struct trainer_state {
    int64_t step;            /* steps done, skipped ones included */
    int64_t optimizer_steps; /* AdamW's t */
    int64_t skipped;         /* steps that changed nothing: not finite, or a recurrence was not solved */
    uint64_t samples;        /* global sample number of the next batch */
    double tokens;           /* valid targets trained on */
    double seconds;          /* of training, over all sessions */
    double best_valid;       /* lowest validation loss so far; NaN: none */
    int64_t inexact;         /* steps taken although a solver left more than solver.warn */
    struct rung rungs[LIMIT_LAYERS]; /* of the layers with solvers, in their order: train/ladder.h */
};

/* Collective. Saves RUN/step-<state.step>/ and moves latest; keeps the newest `keep` (0 = all). Rank 0 writes; all
 * ranks return alike, with the sentence on one of them (comm_agree). optimizer may be NULL: then no
 * optimizer.safetensors; t may be NULL: then no tokenizer files. A save of what `latest` holds already changes nothing;
 * other contents for the step that `latest` points to are ERROR_INPUT. */
int checkpoint_save(const char *run, const struct trainer_state *state, struct model *m, struct optimizer *optimizer,
                    const config *c, const tokenizer *t, struct comm *comm, int64_t keep, error *err);

/* The last part of a save: of the checkpoints up to `step` the newest `keep` (0 = all) stay, and the one that latest
 * points to; the others go, with what killed saves left. For a run that is over, whose last save may have come short of
 * it. */
int checkpoint_prune(const char *run, int64_t step, int64_t keep, error *err);

/* The name of the newest step-N in a run's directory, by its number; "" where there is none, or no directory. */
int checkpoint_newest(const char *run, char name[LIMIT_STEP_NAME], error *err);
/* Make the `latest` that a run has lost: it points to that one. Rank 0, under the run's lock. */
int checkpoint_mend_latest(const char *run, error *err);

/* A model directory, opened for reading: one of ours (config.ini, trainer.json, every checksum verified) or any
 * directory that transformers could open and riverrun has the architecture of (config.json + model.safetensors, sharded
 * or not). `path` may also be a run's directory: then its `latest`, which is looked up once, or without it its newest
 * step. */
struct checkpoint;
int checkpoint_open(struct checkpoint **c, const char *path, error *err);
void checkpoint_close(struct checkpoint *c);
/* The effective config (owned): [model], [block.*], and the run's other sections if ours. */
config *checkpoint_config(struct checkpoint *c);
const char *checkpoint_path(const struct checkpoint *c);    /* the resolved directory */
bool checkpoint_is_ours(const struct checkpoint *c);
const struct trainer_state *checkpoint_state(const struct checkpoint *c); /* zeros if not ours */
bool checkpoint_has_tokenizer(const struct checkpoint *c); /* false: trained on a task, or a directory without */
int checkpoint_tokenizer(struct checkpoint *c, tokenizer **t, error *err); /* the caller closes */

/* Fill the model's parameters: every tensor of the table must be there with its shape, any floating dtype; extra
 * tensors are refused by name (a tied lm_head.weight equal to the embedding is accepted). */
int checkpoint_load_model(struct checkpoint *c, struct model *m, error *err);
/* Collective: m and v, of the model that checkpoint_load_model filled from the same checkpoint; ours only. Rank 0
 * reads; on failure it has the sentence, the others its kind. The step count is the caller's to set. */
int checkpoint_load_optimizer(struct checkpoint *c, struct optimizer *o, struct comm *comm, error *err);

#endif
