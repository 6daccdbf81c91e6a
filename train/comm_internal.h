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
    void (*max_i64)(struct comm *c, int64_t *values, int count);
    void (*broadcast)(struct comm *c, void *bytes, size_t count, int root);
    void (*barrier)(struct comm *c);
    void (*reduce_scatter)(struct comm *c, void *buffer, int64_t count, enum dtype dtype); /* host memory, done */
    void (*all_gather)(struct comm *c, void *buffer, int64_t count, enum dtype dtype);
    void (*gather)(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype);
    void (*scatter)(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype);
};

/* The calls on device memory. */
struct comm_device {
    void (*detach)(struct comm *c);
    void (*reduce_scatter)(struct comm *c, int slot, const struct comm_piece *pieces, int count);
    void (*all_gather)(struct comm *c, int slot, const struct comm_piece *pieces, int count);
    void (*wait)(struct comm *c, int slot);
    void (*sum_f64)(struct comm *c, double *values, int count);
    /* For the watchdog's thread: fills `text` and returns true if an operation has failed meanwhile; *progress changes
     * whenever the device gets further, and `operation` is what it was last seen to start. */
    bool (*look)(struct comm *c, uint64_t *progress, char *operation, size_t operation_size, char *text, size_t size);
};

/* Implementations end the job with this. */
void comm_fail(struct comm *c, const char *operation, const char *why) __attribute__((noreturn));

/* into[i] += from[i]; f32 or f64. */
void comm_add(void *into, const void *from, int64_t count, enum dtype dtype);

#ifdef RIVERRUN_MPI
int comm_mpi_open(struct comm *c, error *err);
#endif
#if defined(RIVERRUN_CUDA) && defined(RIVERRUN_NCCL)
/* In the order in which all ranks call them: load NCCL; the name of the job's group of ranks, which rank 0 makes for
 * all; open that, which is collective, and fill in c->device_impl. *table is what belongs into c->device. */
#define COMM_NCCL_NAME 128
int comm_nccl_load(error *err);
int comm_nccl_name(char name[COMM_NCCL_NAME], error *err);
int comm_nccl_open(struct comm *c, const struct comm_device **table, struct device *dev, int slots,
                   const char name[COMM_NCCL_NAME], error *err);
#endif

#endif
