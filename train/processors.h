/* processors.h: how many threads are worth starting. */
#ifndef RIVERRUN_PROCESSORS_H
#define RIVERRUN_PROCESSORS_H

/* Processors this process may run on, at least 1: under taskset, in a container or a batch job fewer than there are. */
int processors_available(void);

#endif
