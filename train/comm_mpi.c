/* comm_mpi.c: communication between processes by MPI.
 *
 * Sums are made here, not by MPI's reductions, because those may add in any order: every rank receives the others'
 * values and adds them in rank order, so a run on n ranks gives the same bits every time. Messages are cut into
 * pieces whose length fits MPI's int and the buffer taken at the start; counts and offsets are 64-bit.
 *
 * Errors that MPI reports end the whole job, with one line that names rank and operation.
 */
#include "train/comm_internal.h"
#include "train/watchdog.h"

#ifdef RIVERRUN_MPI

#include "common/limits.h"
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SMALL = COMM_VOTES,      /* values that one call of sum_f64 or max_i64 may have */
    BUFFER_BYTES = 16 << 20, /* for pieces received from all ranks */
    PIECE_LEAST = 1 << 12,   /* elements: with very many ranks the buffer grows, pieces shrink no further */
    PLAIN_PIECE = 1 << 28,   /* bytes of a message that needs no buffer */
    TAG = 1,
};

struct mpi {
    MPI_Comm world, local; /* local: the ranks of this machine */
    MPI_Win board;         /* memory that they share, for the watchdog */
    MPI_Request *requests; /* 2 * ranks */
    int pending;
    double *small;  /* ranks * SMALL: sums */
    int64_t *votes; /* ranks * SMALL */
    char *buffer;   /* ranks pieces */
    int64_t piece;  /* elements of up to 8 bytes in a piece */
};

static _Noreturn void fail(struct comm *c, const char *operation, int code) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    comm_fail(c, operation, text);
}

static void check(struct comm *c, const char *operation, int code) {
    if (code != MPI_SUCCESS) fail(c, operation, code);
}

/* ---- pieces: a few messages at a time, then all are waited for -------------------------------------------------- */

static void send_to(struct comm *c, const char *operation, const void *bytes, int64_t size, int rank) {
    struct mpi *m = c->impl;
    check(c, operation, MPI_Isend(bytes, (int)size, MPI_BYTE, rank, TAG, m->world, &m->requests[m->pending++]));
}

static void receive_from(struct comm *c, const char *operation, void *bytes, int64_t size, int rank) {
    struct mpi *m = c->impl;
    check(c, operation, MPI_Irecv(bytes, (int)size, MPI_BYTE, rank, TAG, m->world, &m->requests[m->pending++]));
}

static void wait_all(struct comm *c, const char *operation) {
    struct mpi *m = c->impl;
    check(c, operation, MPI_Waitall(m->pending, m->requests, MPI_STATUSES_IGNORE));
    m->pending = 0;
}

static int64_t piece_bytes(int64_t at, int64_t total) { return total - at < PLAIN_PIECE ? total - at : PLAIN_PIECE; }

/* ---- the calls -------------------------------------------------------------------------------------------------- */

static void mpi_sum_f64(struct comm *c, double *values, int count) {
    struct mpi *m = c->impl;
    ASSERT(count <= SMALL);
    check(c, "sum", MPI_Allgather(values, count, MPI_DOUBLE, m->small, count, MPI_DOUBLE, m->world));
    memcpy(values, m->small, (size_t)count * sizeof *values);
    for (int r = 1; r < c->ranks; r++) comm_add(values, m->small + (int64_t)r * count, count, DTYPE_F64);
}

static void mpi_max_i64(struct comm *c, int64_t *values, int count) {
    struct mpi *m = c->impl;
    ASSERT(count <= SMALL);
    check(c, "vote", MPI_Allreduce(values, m->votes, count, MPI_INT64_T, MPI_MAX, m->world));
    memcpy(values, m->votes, (size_t)count * sizeof *values);
}

static void mpi_broadcast(struct comm *c, void *bytes, size_t count, int root) {
    struct mpi *m = c->impl;
    for (int64_t at = 0; at < (int64_t)count; at += PLAIN_PIECE) {
        check(c, "broadcast",
              MPI_Bcast((char *)bytes + at, (int)piece_bytes(at, (int64_t)count), MPI_BYTE, root, m->world));
    }
}

static void mpi_barrier(struct comm *c) {
    struct mpi *m = c->impl;
    check(c, "barrier", MPI_Barrier(m->world));
}

static void mpi_reduce_scatter(struct comm *c, void *buffer, int64_t count, enum dtype dtype) {
    struct mpi *m = c->impl;
    int64_t size = (int64_t)dtype_size(dtype);
    char *slices = buffer;
    for (int64_t at = 0; at < count; at += m->piece) {
        int64_t n = count - at < m->piece ? count - at : m->piece, bytes = n * size, stride = m->piece * size;
        char *mine = slices + (c->rank * count + at) * size;
        for (int r = 0; r < c->ranks; r++) {
            if (r == c->rank) continue;
            receive_from(c, "reduce-scatter", m->buffer + r * stride, bytes, r);
            send_to(c, "reduce-scatter", slices + (r * count + at) * size, bytes, r);
        }
        wait_all(c, "reduce-scatter");
        /* Rank order: 0 first, this rank's own values in their turn. */
        memcpy(m->buffer + c->rank * stride, mine, (size_t)bytes);
        for (int r = 1; r < c->ranks; r++) comm_add(m->buffer, m->buffer + r * stride, n, dtype);
        memcpy(mine, m->buffer, (size_t)bytes);
    }
}

static void mpi_all_gather(struct comm *c, void *buffer, int64_t count, enum dtype dtype) {
    int64_t total = count * (int64_t)dtype_size(dtype);
    char *slices = buffer;
    for (int64_t at = 0; at < total; at += PLAIN_PIECE) {
        int64_t bytes = piece_bytes(at, total);
        for (int r = 0; r < c->ranks; r++) {
            if (r == c->rank) continue;
            receive_from(c, "all-gather", slices + r * total + at, bytes, r);
            send_to(c, "all-gather", slices + c->rank * total + at, bytes, r);
        }
        wait_all(c, "all-gather");
    }
}

static void mpi_gather(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype) {
    int64_t total = count * (int64_t)dtype_size(dtype);
    if (c->rank == 0 && all != mine && total > 0) memcpy(all, mine, (size_t)total);
    for (int64_t at = 0; at < total; at += PLAIN_PIECE) {
        int64_t bytes = piece_bytes(at, total);
        if (c->rank != 0) send_to(c, "gather", (const char *)mine + at, bytes, 0);
        for (int r = 1; r < c->ranks && c->rank == 0; r++)
            receive_from(c, "gather", (char *)all + r * total + at, bytes, r);
        wait_all(c, "gather");
    }
}

static void mpi_scatter(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype) {
    int64_t total = count * (int64_t)dtype_size(dtype);
    if (c->rank == 0 && all != mine && total > 0) memcpy(mine, all, (size_t)total);
    for (int64_t at = 0; at < total; at += PLAIN_PIECE) {
        int64_t bytes = piece_bytes(at, total);
        if (c->rank != 0) receive_from(c, "scatter", (char *)mine + at, bytes, 0);
        for (int r = 1; r < c->ranks && c->rank == 0; r++)
            send_to(c, "scatter", (const char *)all + r * total + at, bytes, r);
        wait_all(c, "scatter");
    }
}

static void mpi_abort(struct comm *c, int exit_code) {
    struct mpi *m = c->impl;
    MPI_Abort(m->world, exit_code);
}

static void release(struct mpi *m) {
    free(m->requests);
    free(m->small);
    free(m->votes);
    free(m->buffer);
    free(m);
}

static void mpi_close(struct comm *c) {
    struct mpi *m = c->impl;
    watchdog_close(c->watchdog);
    if (m->board != MPI_WIN_NULL) MPI_Win_free(&m->board);
    MPI_Comm_free(&m->local);
    MPI_Comm_free(&m->world);
    release(m);
    MPI_Finalize();
}

static const struct comm_functions mpi_functions = {
    .close = mpi_close,
    .abort = mpi_abort,
    .sum_f64 = mpi_sum_f64,
    .max_i64 = mpi_max_i64,
    .broadcast = mpi_broadcast,
    .barrier = mpi_barrier,
    .reduce_scatter = mpi_reduce_scatter,
    .all_gather = mpi_all_gather,
    .gather = mpi_gather,
    .scatter = mpi_scatter,
};

/* One rank can't go on, the others wait for it: end the job. */
static _Noreturn void die(const struct comm *c, const char *what) {
    fprintf(stderr, "riverrun: rank %d: %s\n", c->rank, what);
    MPI_Abort(MPI_COMM_WORLD, 1);
    abort();
}

/* The ranks of this machine, and the board that they share. */
static void open_local(struct comm *c) {
    struct mpi *m = c->impl;
    void *board = NULL;
    m->board = MPI_WIN_NULL;
    if (MPI_Comm_split_type(m->world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &m->local) != MPI_SUCCESS)
        die(c, "MPI_Comm_split_type failed");
    MPI_Comm_rank(m->local, &c->local_rank);
    MPI_Comm_size(m->local, &c->local_ranks);
    if (c->ranks == 1) return;
    MPI_Aint size = (MPI_Aint)watchdog_board_size(c->local_ranks);
    if (MPI_Win_allocate_shared(c->local_rank == 0 ? size : 0, 1, MPI_INFO_NULL, m->local, &board, &m->board) !=
        MPI_SUCCESS)
        die(c, "MPI_Win_allocate_shared failed");
    int unit;
    MPI_Win_shared_query(m->board, 0, &size, &unit, &board);
    if (c->local_rank == 0) memset(board, 0, (size_t)size);
    MPI_Barrier(m->local);
    error err = {0};
    if (watchdog_open(&c->watchdog, c, board, &err) != 0) die(c, err.text);
    MPI_Barrier(m->local);
    if (watchdog_start(c->watchdog, &err) != 0) die(c, err.text);
}

int comm_mpi_open(struct comm *c, error *err) {
    int provided = 0;
    *c = (struct comm){.name = "mpi", .functions = &mpi_functions, .local_ranks = 1};
    /* Threads of this process never call MPI, only the main one does. */
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        *c = (struct comm){0};
        return error_system(err, "MPI can't be initialised");
    }
    MPI_Comm_rank(MPI_COMM_WORLD, &c->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &c->ranks);
    if (c->ranks > LIMIT_RANKS) {
        error_input(err, "the job has %d processes; riverrun takes at most %d", c->ranks, LIMIT_RANKS);
        MPI_Finalize();
        *c = (struct comm){0};
        return -1;
    }
    struct mpi *m = calloc(1, sizeof *m);
    size_t ranks = (size_t)c->ranks;
    if (m) {
        m->piece = BUFFER_BYTES / 8 / c->ranks;
        if (m->piece < PIECE_LEAST) m->piece = PIECE_LEAST;
        m->requests = calloc(2 * ranks, sizeof *m->requests);
        m->small = calloc(ranks * SMALL, sizeof *m->small);
        m->votes = calloc(ranks * SMALL, sizeof *m->votes);
        m->buffer = calloc(ranks, (size_t)m->piece * 8);
    }
    if (!m || !m->requests || !m->small || !m->votes || !m->buffer) die(c, "no memory for the buffers of MPI messages");
    c->impl = m;
    if (MPI_Comm_dup(MPI_COMM_WORLD, &m->world) != MPI_SUCCESS) die(c, "MPI_Comm_dup failed");
    MPI_Comm_set_errhandler(m->world, MPI_ERRORS_RETURN);
    open_local(c);
    return 0;
}

#endif
