/* trainer.h: a training run, from a config to the last checkpoint. Called by command_train.c. */
#ifndef RIVERRUN_TRAINER_H
#define RIVERRUN_TRAINER_H

#include "common/config.h"
#include "train/comm.h"

struct trainer;

/* Collective. Everything that a run needs: options and data checked, the run's directory locked, the checkpoint to
 * go on from found and read, all memory allocated. Nothing is written before all that config and data can be wrong
 * about has been checked. Failures are agreed on: every rank returns -1 (see comm_agree). The config must outlive
 * the trainer. */
int trainer_open(struct trainer **t, config *c, struct comm *comm, error *err);
void trainer_close(struct trainer *t);

/* Collective. Train to the last step, or until a signal asks to save and stop; both are success. A run that is finished
 * already says so. A failure is returned on the rank where it happened, while others may wait for it: the caller
 * ends the job, and nothing is saved. The last line on standard output (rank 0) is the validation loss, if there is
 * validation data and the run has come to its end. */
int trainer_run(struct trainer *t, error *err);

#endif
