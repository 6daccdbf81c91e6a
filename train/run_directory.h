/* run_directory.h: the directory of a run (train.out): who may write into it, and what it holds.
 *
 *   RUN/lock         held (flock) by the one process that trains into it
 *   RUN/config.ini   the effective config of the session that runs or ran last
 *   RUN/log.jsonl    train/report.h
 *   RUN/step-NNNNNNNN/, RUN/latest   train/checkpoint.h
 */
#ifndef RIVERRUN_RUN_DIRECTORY_H
#define RIVERRUN_RUN_DIRECTORY_H

#include "common/error.h"

/* Take the lock; *descriptor is what run_unlock gives back. Another holder is ERROR_INPUT naming it. Where the
 * file system knows no locks, a line on standard error says so and *descriptor is -1. */
int run_lock(int *descriptor, const char *run, error *err);
void run_unlock(int descriptor); /* -1 is fine */

/* Whether there is a checkpoint in RUN to go on from: RUN/latest, also if what it points to is gone, or any step-N.
 * Such a run is not begun anew. */
int run_has_checkpoint(bool *has, const char *run, error *err);

/* Write RUN/config.ini in place of what was there; complete or not at all. */
int run_write_config(const char *run, const char *text, error *err);

#endif
