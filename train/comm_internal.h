/* comm_internal.h: what an implementation of train/comm.h provides. Included by comm.c, the implementations, and
 * tests that bring one of their own (ranks as threads). */
#ifndef RIVERRUN_COMM_INTERNAL_H
#define RIVERRUN_COMM_INTERNAL_H

#include "train/comm.h"

/* The calls of comm.h, which say what each does. */
struct comm_functions {
    void (*close)(struct comm *c);
    void (*abort)(struct comm *c, int exit_code); /* ends the job; comm.c ends the process if this returns */
    void (*sum_f64)(struct comm *c, double *values, int count);
    void (*sum_device)(struct comm *c, double *values, int count); /* NULL: sum_f64 */
    void (*max_i64)(struct comm *c, int64_t *values, int count);
    void (*broadcast)(struct comm *c, void *bytes, size_t count, int root);
    void (*barrier)(struct comm *c);
    void (*reduce_scatter)(struct comm *c, void *buffer, int64_t count, enum dtype dtype);
    void (*all_gather)(struct comm *c, void *buffer, int64_t count, enum dtype dtype);
    void (*gather)(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype);
    void (*scatter)(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype);
};

/* into[i] += from[i]; f32 or f64. */
void comm_add(void *into, const void *from, int64_t count, enum dtype dtype);

#ifdef RIVERRUN_MPI
int comm_mpi_open(struct comm *c, error *err);
#endif

#endif
