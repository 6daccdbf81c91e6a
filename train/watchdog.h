/* watchdog.h: a thread beside each rank of a job, so that a job that can't go on ends, and says where it stood.
 *
 * The ranks of a machine share a board in memory, on which each writes its process, the step it is in and the operation
 * it waits in. The thread looks at it a few times a second:
 *   - a rank of this machine that is gone without having said so: one of the others tells its rank, step and operation;
 *   - a failure that NCCL has noticed in the background;
 *   - no progress of this rank for longer than the limit (comm_watch): the rank that is furthest behind is told, too.
 * Then the process ends, at once and from the thread, whatever its other threads wait for; the launcher, which sees one
 * rank end so, ends the others everywhere. Whoever tells first keeps the others of its machine quiet.
 *
 * Used by comm.c and the implementations of train/comm.h. All calls accept NULL: a job of one rank has no watchdog.
 */
#ifndef RIVERRUN_WATCHDOG_H
#define RIVERRUN_WATCHDOG_H

#include "common/error.h"
#include <stdint.h>

struct comm;
struct watchdog;

/* Bytes that the board of this many ranks takes. */
size_t watchdog_board_size(int local_ranks);
/* `board` is zeroed memory that the local ranks share. All of them have written themselves on it before any goes on:
 * the caller sees to that with a barrier. No thread yet. */
int watchdog_open(struct watchdog **w, struct comm *c, void *board, error *err);
/* Once every local rank has opened its own. */
int watchdog_start(struct watchdog *w, error *err);
/* This rank leaves in good order; its board is not touched afterwards. */
void watchdog_close(struct watchdog *w);

void watchdog_note(struct watchdog *w, int64_t step, const char *operation);
/* Around whatever waits for other ranks. */
void watchdog_enter(struct watchdog *w, const char *operation);
void watchdog_leave(struct watchdog *w);
/* Seconds without progress that end the job; 0: none do. */
void watchdog_limit(struct watchdog *w, double timeout_s);

/* The thread does not look at the communicator's device meanwhile. */
void watchdog_lock(struct watchdog *w);
void watchdog_unlock(struct watchdog *w);

/* This rank has told why it ends: the others of its machine need not. */
void watchdog_told(struct watchdog *w);
/* Tell it, if nobody of this machine has told anything: one line "riverrun: rank R: ..." with the step, if known. */
void watchdog_tell(struct watchdog *w, int rank, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
