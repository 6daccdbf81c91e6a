/* comm.c: chooses the implementation of train/comm.h by how the process was started, and hands the calls on to it. */
#include "train/comm_internal.h"

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
    if (c->functions) c->functions->close(c);
    *c = (struct comm){0};
}

void comm_abort(struct comm *c, int exit_code) {
    fflush(NULL);
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

void comm_sum_f64(struct comm *c, double *values, int count) { c->functions->sum_f64(c, values, count); }
void comm_sum_device(struct comm *c, double *values, int count) {
    (c->functions->sum_device ? c->functions->sum_device : c->functions->sum_f64)(c, values, count);
}
void comm_max_i64(struct comm *c, int64_t *values, int count) { c->functions->max_i64(c, values, count); }
void comm_barrier(struct comm *c) { c->functions->barrier(c); }

void comm_broadcast(struct comm *c, void *bytes, size_t count, int root) {
    ASSERT(root >= 0 && root < c->ranks);
    c->functions->broadcast(c, bytes, count, root);
}

void comm_reduce_scatter(struct comm *c, void *buffer, int64_t count, enum dtype dtype) {
    ASSERT(dtype == DTYPE_F32 || dtype == DTYPE_F64);
    c->functions->reduce_scatter(c, buffer, count, dtype);
}

void comm_all_gather(struct comm *c, void *buffer, int64_t count, enum dtype dtype) {
    c->functions->all_gather(c, buffer, count, dtype);
}

void comm_gather(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype) {
    ASSERT(c->rank != 0 || all);
    c->functions->gather(c, all, mine, count, dtype);
}

void comm_scatter(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype) {
    ASSERT(c->rank != 0 || all);
    c->functions->scatter(c, mine, all, count, dtype);
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
