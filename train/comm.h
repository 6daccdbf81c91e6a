/* comm.h: communication between ranks, one small interface, several implementations: none (one process), MPI, and MPI
 * with NCCL for what lies in the memory of GPUs. All calls are collective: every rank makes them in the same order.
 * Sums are deterministic for a given number of ranks.
 *
 * Failure: a rank that fails calls comm_abort, which ends the whole job; errors inside MPI or NCCL do the same with one
 * line that names rank and operation, and so does the death or the silence of another rank (train/watchdog.h). So the
 * calls return nothing.
 */
#ifndef RIVERRUN_COMM_H
#define RIVERRUN_COMM_H

#include "common/error.h"
#include "kernels/device.h"

struct comm {
    int rank, ranks;
    int local_rank, local_ranks; /* among the ranks of this machine */
    const char *name;            /* "none", "mpi", "nccl" */
    /* Whether the calls on device memory only queue work on the device's streams, so that a step with them can be
     * recorded; else they are done when they return. */
    bool queued;
    bool silent;         /* comm_silence was called */
    int64_t least_bytes; /* of gradients that are worth a call of their own: option comm.bucket_mib */
    const struct comm_functions *functions;
    const struct comm_device *device; /* calls on device memory; NULL where that is the host's, or there is one rank */
    struct watchdog *watchdog;        /* NULL where there is one rank */
    void *impl, *device_impl;
};

/* Under mpirun (found by the launcher's environment variables) MPI, else none: a plain start never initialises
 * MPI. Under mpirun with a build without MPI: ERROR_INPUT. What communication needs besides the callers' buffers
 * is allocated here. */
int comm_open(struct comm *c, error *err);
/* One process, however it was started: for work that belongs to one rank alone. */
void comm_open_alone(struct comm *c);
void comm_close(struct comm *c);
void comm_abort(struct comm *c, int exit_code) __attribute__((noreturn));

/* Agree on how a stage went that may have failed on some ranks only: 0 if result was 0 on all; else -1 on all, and
 * the lowest failing rank keeps its *err (with "rank N: " in front if there are several). The others get its kind
 * and an empty text, so that one rank tells it and all leave with the same exit code. */
int comm_agree(struct comm *c, int result, error *err);
/* Tell a failure that was agreed on before comm_close: a launcher ends all ranks as soon as one of them has left with
 * an exit code, and what this one prints after that is lost. Among several ranks the text is then empty. */
void comm_tell(struct comm *c, error *err);

/* Sum over ranks, in place, in rank order; every rank gets the same bits. */
void comm_sum_f64(struct comm *c, double *values, int count);
/* Largest of each value over ranks: flags, votes; at most COMM_VOTES of them. */
#define COMM_VOTES 64
void comm_max_i64(struct comm *c, int64_t *values, int count);
void comm_broadcast(struct comm *c, void *bytes, size_t count, int root);
void comm_barrier(struct comm *c);

/* ---- on the memory of a device ---- */

/* Which GPU is this rank's: the local rank's, counted around where there are fewer (comm_attach refuses to share). */
int comm_device_index(const struct comm *c);
/* The device whose memory the next four calls are about; `slots` is how many of them may be under way. With one rank,
 * or where the device's memory is the host's, there is nothing to open. Needs NCCL for GPUs, and a GPU for each rank.
 * Fails on all ranks or on some, and then opens nothing on any: agree on it. Detach before closing the device. */
int comm_attach(struct comm *c, struct device *dev, int slots, error *err);
void comm_detach(struct comm *c);

/* `buffer` holds ranks * count elements on every rank; one call takes several such pieces. reduce_scatter (f32, f64):
 * rank r's slice [r*count, (r+1)*count) of each becomes the sum of all ranks' slices, in a fixed order (rank order but
 * for NCCL); other slices are left undefined. all_gather (any type): every rank's own slice is copied to all.
 *
 * On a GPU they start when what the device was given before is done, run beside what it is given afterwards, and one
 * after the other among themselves. comm_wait: what the device is given from here on waits for the last call that was
 * given this slot. All of it may be recorded (kernels/device.h) if whatever is started there is waited for there. */
struct comm_piece {
    void *buffer;
    int64_t count;
    enum dtype dtype;
};
void comm_reduce_scatter(struct comm *c, int slot, const struct comm_piece *pieces, int count);
void comm_all_gather(struct comm *c, int slot, const struct comm_piece *pieces, int count);
void comm_wait(struct comm *c, int slot);
/* comm_sum_f64 of at most COMM_SUMS values in device memory, in the order of the device's work: rank order, same bits
 * everywhere. */
#define COMM_SUMS 16
void comm_sum_device(struct comm *c, double *values, int count);
/* For measurements: from here on these calls do nothing, and what is computed is wrong. */
void comm_silence(struct comm *c);

/* ---- between hosts ---- */

/* Rank 0 receives every rank's `count` elements into `all` (ranks * count; NULL elsewhere), and the reverse. */
void comm_gather(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype);
void comm_scatter(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype);

/* ---- watching over the job: train/watchdog.h says how; nothing with one rank ---- */

/* What this rank is about to do, for whoever has to tell where it was. */
void comm_note(struct comm *c, int64_t step, const char *operation);
/* From now on, `timeout_s` seconds without any progress here end the job with a line that names rank, step and
 * operation; 0: for as long as it takes. */
void comm_watch(struct comm *c, double timeout_s);

#endif
