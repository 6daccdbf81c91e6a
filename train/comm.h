/* comm.h: communication between ranks, one small interface, several implementations: none (one process), MPI (CPU
 * ranks); NCCL later. All calls are collective: every rank makes them in the same order. Sums are deterministic for a
 * given number of ranks.
 *
 * Failure: a rank that fails calls comm_abort, which ends the whole job; errors inside MPI do the same with one line
 * that names rank and operation. So the calls return nothing.
 */
#ifndef RIVERRUN_COMM_H
#define RIVERRUN_COMM_H

#include "common/error.h"
#include "kernels/tensor.h"

struct comm {
    int rank, ranks;
    const char *name; /* "none", "mpi" */
    /* Reductions, gathers and comm_sum_device of a step only queue work on the device that it computes with, and the host
     * does not take part: such a step may be recorded (device_run). */
    bool queued;
    const struct comm_functions *functions;
    void *impl;
};

/* Under mpirun (found by the launcher's environment variables) MPI, else none: a plain start never initialises
 * MPI. Under mpirun with a build without MPI: ERROR_INPUT. What communication needs besides the callers' buffers
 * is allocated here. */
int comm_open(struct comm *c, error *err);
/* One process, however it was started: for work that belongs to one rank alone. */
void comm_open_alone(struct comm *c);
void comm_close(struct comm *c);
_Noreturn void comm_abort(struct comm *c, int exit_code);

/* Agree on how a stage went that may have failed on some ranks only: 0 if result was 0 on all; else -1 on all, and
 * the lowest failing rank keeps its *err (with "rank N: " in front if there are several). The others get its kind
 * and an empty text, so that one rank tells it and all leave with the same exit code. */
int comm_agree(struct comm *c, int result, error *err);

/* Sum over ranks, in place, in rank order; every rank gets the same bits. */
void comm_sum_f64(struct comm *c, double *values, int count);
/* The same for numbers in device memory, queued behind the device's work where the implementation can; elsewhere the
 * device's memory is the host's. */
void comm_sum_device(struct comm *c, double *values, int count);
/* Largest of each value over ranks: flags, votes. */
void comm_max_i64(struct comm *c, int64_t *values, int count);
void comm_broadcast(struct comm *c, void *bytes, size_t count, int root);
void comm_barrier(struct comm *c);

/* `buffer` holds ranks * count elements (f32 or f64) on every rank. reduce_scatter: rank r's slice [r*count,
 * (r+1)*count) becomes the sum of all ranks' slices, added in rank order; other slices are left undefined.
 * all_gather: every rank's own slice is copied to all. */
void comm_reduce_scatter(struct comm *c, void *buffer, int64_t count, enum dtype dtype);
void comm_all_gather(struct comm *c, void *buffer, int64_t count, enum dtype dtype);
/* Rank 0 receives every rank's `count` elements into `all` (ranks * count; NULL elsewhere), and the reverse. */
void comm_gather(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype);
void comm_scatter(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype);

#endif
