/* processors.c: asks the scheduler, as processors.h describes. Called by the commands that work on all processors. */
#include "train/processors.h"

#include <sched.h>
#include <unistd.h>

int processors_available(void) {
    cpu_set_t set; /* of 1,024 processors; on a larger machine the call fails, and all that are online count */
    long count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : count > 1024 ? 1024 : (int)count;
}
