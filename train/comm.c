/* comm.c: chooses the implementation of train/comm.h by how the process was started, and hands the calls on to it. */
#include "train/comm_internal.h"
#include "train/watchdog.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Whether a launcher of parallel jobs started this process, and of how many (0: it does not say). The variables
 * are those of Open MPI, of MPICH and its kin, and of what Slurm sets when it starts MPI programs itself. */
static bool launched(long *processes) {
    static const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"};
    static const char *const ranks[] = {"PMIX_RANK", "PMI_RANK"};
    *processes = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const char *text = getenv(sizes[i]);
        if (!text) continue;
        *processes = strtol(text, NULL, 10);
        return true;
    }
    for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++) {
        if (getenv(ranks[i])) return true;
    }
    return false;
}

int comm_open(struct comm *c, error *err) {
    long processes;
    bool parallel = launched(&processes);
#ifdef RIVERRUN_MPI
    (void)processes;
    if (parallel) return comm_mpi_open(c, err);
#else
    if (parallel && processes != 1) {
        return error_input(err,
                           "this riverrun was built without MPI but started as one of several processes; build it with "
                           "MPI=1 where MPI is installed, or start it without mpirun");
    }
#endif
    (void)err;
    comm_open_alone(c);
    return 0;
}

void comm_close(struct comm *c) {
    comm_detach(c);
    if (c->functions) c->functions->close(c);
    *c = (struct comm){0};
}

void comm_abort(struct comm *c, int exit_code) {
    fflush(NULL);
    watchdog_told(c->watchdog);
    if (c->functions) c->functions->abort(c, exit_code);
    /* Other threads may be at work: leave without running what cleans up behind them. */
    _exit(exit_code);
}

int comm_agree(struct comm *c, int result, error *err) {
    int64_t failed = result == 0 ? 0 : c->ranks - c->rank; /* the largest belongs to the lowest failing rank */
    comm_max_i64(c, &failed, 1);
    if (failed == 0) return 0;
    int teller = c->ranks - (int)failed;
    int64_t kind = err->kind;
    comm_broadcast(c, &kind, sizeof kind, teller);
    if (c->rank != teller) {
        err->kind = (enum error_kind)kind;
        err->text[0] = '\0';
    } else if (c->ranks > 1) {
        error_context(err, "rank %d", c->rank);
    }
    return -1;
}

/* ---- the calls: each tells the watchdog what this rank is waiting in --------------------------------------------- */

#define WAITING_IN(c, operation, call)                                                                                 \
    do {                                                                                                               \
        watchdog_enter((c)->watchdog, operation);                                                                      \
        call;                                                                                                          \
        watchdog_leave((c)->watchdog);                                                                                 \
    } while (0)

void comm_tell(struct comm *c, error *err) {
    if (c->ranks > 1 && err->text[0]) {
        fprintf(stderr, "riverrun: %s\n", err->text);
        err->text[0] = '\0';
    }
    comm_barrier(c);
}

void comm_sum_f64(struct comm *c, double *values, int count) {
    WAITING_IN(c, "a sum over ranks", c->functions->sum_f64(c, values, count));
}

void comm_max_i64(struct comm *c, int64_t *values, int count) {
    WAITING_IN(c, "a vote of the ranks", c->functions->max_i64(c, values, count));
}

void comm_barrier(struct comm *c) {
    WAITING_IN(c, "a barrier", c->functions->barrier(c));
}

void comm_broadcast(struct comm *c, void *bytes, size_t count, int root) {
    ASSERT(root >= 0 && root < c->ranks);
    WAITING_IN(c, "a broadcast", c->functions->broadcast(c, bytes, count, root));
}

void comm_gather(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype) {
    ASSERT(c->rank != 0 || all);
    WAITING_IN(c, "a gather", c->functions->gather(c, all, mine, count, dtype));
}

void comm_scatter(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype) {
    ASSERT(c->rank != 0 || all);
    WAITING_IN(c, "a scatter", c->functions->scatter(c, mine, all, count, dtype));
}

/* ---- on the memory of a device ----------------------------------------------------------------------------------- */

int comm_device_index(const struct comm *c) {
    return c->local_rank;
}

/* A number that two ranks have in common only if they compute on the same GPU: no double holds 64 bits, so two
 * halves. */
static int refuse_sharing(struct comm *c, struct device *dev, error *err) {
    double mine[2], *all = c->rank == 0 ? calloc(2 * (size_t)c->ranks, sizeof *all) : NULL;
    uint64_t identity = device_identity(dev);
    int64_t shared = 0;
    mine[0] = (double)(identity >> 32);
    mine[1] = (double)(identity & 0xffffffff);
    if (c->rank == 0 && !all) comm_fail(c, "comparing the GPUs of the ranks", "no memory");
    comm_gather(c, all, mine, 2, DTYPE_F64);
    for (int a = 0; a < c->ranks && c->rank == 0; a++) {
        for (int b = 0; b < a; b++) shared |= all[2 * a] == all[2 * b] && all[2 * a + 1] == all[2 * b + 1];
    }
    free(all);
    comm_broadcast(c, &shared, sizeof shared, 0);
    if (!shared) return 0;
    return error_input(err,
                       "device cuda wants a GPU for each rank, and %d ranks were started on this machine, which offers "
                       "%d: start at most as many ranks as there are GPUs",
                       c->local_ranks, device_count(dev));
}

#if defined(RIVERRUN_CUDA) && defined(RIVERRUN_NCCL)
/* Whatever fails before the start of NCCL, where each rank waits for all, fails before any rank is there. */
static int attach(struct comm *c, struct device *dev, int slots, error *err) {
    char name[COMM_NCCL_NAME];
    const struct comm_device *table = NULL;
    int result = comm_nccl_load(err);
    if (result == 0 && c->rank == 0) result = comm_nccl_name(name, err);
    int64_t failed = result != 0;
    comm_max_i64(c, &failed, 1);
    if (failed) return result;
    comm_broadcast(c, name, sizeof name, 0);
    WAITING_IN(c, "NCCL's start", result = comm_nccl_open(c, &table, dev, slots, name, err));
    if (result != 0) return -1;
    watchdog_lock(c->watchdog);
    c->device = table;
    watchdog_unlock(c->watchdog);
    c->name = "nccl";
    c->queued = true;
    return 0;
}
#endif

int comm_attach(struct comm *c, struct device *dev, int slots, error *err) {
    ASSERT(!c->device);
    if (c->ranks == 1) c->queued = true; /* nothing is exchanged */
    if (c->ranks == 1 || dev->kind == DEVICE_CPU) return 0;
    TRY(refuse_sharing(c, dev, err));
#if defined(RIVERRUN_CUDA) && defined(RIVERRUN_NCCL)
    return attach(c, dev, slots, err);
#else
    (void)slots;
    return error_input(err,
                       "this riverrun was built without NCCL, by which GPUs talk to each other: build it with NCCL=1 "
                            "where NCCL is installed, or start one process");
#endif
}

void comm_detach(struct comm *c) {
    const struct comm_device *device = c->device;
    if (!device) return;
    watchdog_lock(c->watchdog);
    c->device = NULL;
    watchdog_unlock(c->watchdog);
    device->detach(c);
}

void comm_reduce_scatter(struct comm *c, int slot, const struct comm_piece *pieces, int count) {
    for (int i = 0; i < count; i++) ASSERT(pieces[i].dtype == DTYPE_F32 || pieces[i].dtype == DTYPE_F64);
    if (c->silent || c->ranks == 1) return;
    if (c->device) c->device->reduce_scatter(c, slot, pieces, count);
    for (int i = 0; i < count && !c->device; i++) {
        WAITING_IN(c, "a reduce-scatter of gradients",
                   c->functions->reduce_scatter(c, pieces[i].buffer, pieces[i].count, pieces[i].dtype));
    }
}

void comm_all_gather(struct comm *c, int slot, const struct comm_piece *pieces, int count) {
    if (c->silent || c->ranks == 1) return;
    if (c->device) c->device->all_gather(c, slot, pieces, count);
    for (int i = 0; i < count && !c->device; i++) {
        WAITING_IN(c, "an all-gather of weights",
                   c->functions->all_gather(c, pieces[i].buffer, pieces[i].count, pieces[i].dtype));
    }
}

void comm_wait(struct comm *c, int slot) {
    if (c->device && !c->silent) c->device->wait(c, slot);
}

void comm_sum_device(struct comm *c, double *values, int count) {
    ASSERT(count >= 0 && count <= COMM_SUMS);
    if (c->silent) return;
    if (c->device) c->device->sum_f64(c, values, count);
    else if (c->ranks > 1) comm_sum_f64(c, values, count);
}

void comm_silence(struct comm *c) { c->silent = true; }

/* ---- watching ---------------------------------------------------------------------------------------------------- */

void comm_note(struct comm *c, int64_t step, const char *operation) { watchdog_note(c->watchdog, step, operation); }
void comm_watch(struct comm *c, double timeout_s) { watchdog_limit(c->watchdog, timeout_s); }

void comm_fail(struct comm *c, const char *operation, const char *why) {
    watchdog_tell(c->watchdog, c->rank, "%s failed: %s", operation, why);
    comm_abort(c, 1);
}

void comm_add(void *into, const void *from, int64_t count, enum dtype dtype) {
    if (dtype == DTYPE_F32) {
        float *a = into;
        const float *b = from;
        for (int64_t i = 0; i < count; i++) a[i] += b[i];
    } else {
        double *a = into;
        const double *b = from;
        for (int64_t i = 0; i < count; i++) a[i] += b[i];
    }
}
