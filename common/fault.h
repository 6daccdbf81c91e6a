/* fault.h: failures on demand, for tests. Called by common/file.c before each change it makes to the disk.
 *
 * RIVERRUN_TEST_FAULT in the environment names one change, counted from 1 (creating or opening for writing, write,
 * sync, make directory, rename, link, cut, remove), and what happens to it:
 *   kill:N         the process ends by SIGKILL in place of it
 *   fail:N         it fails with ENOSPC
 *   fail:N:REASON  it fails with this: ENOSPC, EIO, EDQUOT or EACCES
 *   full:N         it and all later ones that need room (creating, writing, making and linking) fail with ENOSPC, as on
 *                  a disk that is full; cutting, renaming and removing work
 *   short:N        if it is a write, only half of the bytes are written (which the system is free to do at any time)
 * Removing and cutting to put right what failed before count as changes like others. The variable is read once; unset
 * costs nothing.
 */
#ifndef RIVERRUN_FAULT_H
#define RIVERRUN_FAULT_H

#include <stddef.h>

enum fault_change { FAULT_NEEDS_ROOM, FAULT_NEEDS_NONE };

/* Call before a changing operation other than a write: -1 with errno set if it is to fail. */
int fault_change(enum fault_change change);

/* Call before a write: like fault_change; may lower *size, which then is at least 1. */
int fault_write(size_t *size);

/* How many changes there were so far, where RIVERRUN_TEST_FAULT is set. */
unsigned long fault_changes(void);

#endif
