/* support_ranks.h: several ranks as threads of one process, with communication by shared memory, so that a unit
 * test sees what many ranks do without mpirun. Sums are in rank order, as train/comm.h promises. */
#ifndef RIVERRUN_SUPPORT_RANKS_H
#define RIVERRUN_SUPPORT_RANKS_H

#include "train/comm.h"

/* Run `body` on `ranks` threads, each with its own communication, and wait for all. */
void ranks_run(int ranks, void (*body)(struct comm *c, void *self), void *self);

/* Open the communication of a program that may have been started under mpirun. Not 0, and told, if it can't be, or if
 * there are not EXPECT_RANKS ranks (set by test_mpi.sh): a job of single processes must not pass for one of several. */
int ranks_world(struct comm *world);

#endif
