/* support_ranks.c: ranks as threads. Every call publishes this rank's buffer, waits for all, reads the others',
 * and waits again before anyone may go on to change its own. */
#include "test/support_ranks.h"

#include "train/comm_internal.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct group {
    int ranks;
    pthread_barrier_t barrier;
    void **published; /* one a rank */
    void (*body)(struct comm *c, void *self);
    void *self;
};

struct rank_thread {
    struct group *group;
    int rank;
    pthread_t thread;
};

static struct group *group_of(struct comm *c) { return c->impl; }
static void wait_for_all(struct comm *c) { pthread_barrier_wait(&group_of(c)->barrier); }

/* Show the others `bytes`; afterwards published[r] is rank r's. */
static char **publish(struct comm *c, const void *bytes) {
    group_of(c)->published[c->rank] = (void *)(uintptr_t)bytes;
    wait_for_all(c);
    return (char **)group_of(c)->published;
}

static void ranks_sum_f64(struct comm *c, double *values, int count) {
    double *sums = calloc((size_t)count + 1, sizeof *sums);
    char **all = publish(c, values);
    memcpy(sums, all[0], (size_t)count * sizeof *sums);
    for (int r = 1; r < c->ranks; r++) comm_add(sums, all[r], count, DTYPE_F64);
    wait_for_all(c);
    memcpy(values, sums, (size_t)count * sizeof *sums);
    free(sums);
    wait_for_all(c);
}

static void ranks_max_i64(struct comm *c, int64_t *values, int count) {
    int64_t *largest = calloc((size_t)count + 1, sizeof *largest);
    char **all = publish(c, values);
    memcpy(largest, all[0], (size_t)count * sizeof *largest);
    for (int r = 1; r < c->ranks; r++) {
        const int64_t *theirs = (const int64_t *)all[r];
        for (int i = 0; i < count; i++) largest[i] = theirs[i] > largest[i] ? theirs[i] : largest[i];
    }
    wait_for_all(c);
    memcpy(values, largest, (size_t)count * sizeof *largest);
    free(largest);
    wait_for_all(c);
}

static void ranks_broadcast(struct comm *c, void *bytes, size_t count, int root) {
    char **all = publish(c, bytes);
    if (c->rank != root) memcpy(bytes, all[root], count);
    wait_for_all(c);
}

static void ranks_reduce_scatter(struct comm *c, void *buffer, int64_t count, enum dtype dtype) {
    int64_t bytes = count * (int64_t)dtype_size(dtype);
    char *sum = calloc(1, (size_t)bytes + 1);
    char **all = publish(c, buffer);
    memcpy(sum, all[0] + c->rank * bytes, (size_t)bytes);
    for (int r = 1; r < c->ranks; r++) comm_add(sum, all[r] + c->rank * bytes, count, dtype);
    wait_for_all(c);
    /* What is left in the other slices is undefined: make that visible. */
    memset(buffer, 0xFF, (size_t)(bytes * c->ranks));
    memcpy((char *)buffer + c->rank * bytes, sum, (size_t)bytes);
    free(sum);
    wait_for_all(c);
}

static void ranks_all_gather(struct comm *c, void *buffer, int64_t count, enum dtype dtype) {
    int64_t bytes = count * (int64_t)dtype_size(dtype);
    char **all = publish(c, buffer);
    for (int r = 0; r < c->ranks; r++) {
        if (r != c->rank) memcpy((char *)buffer + r * bytes, all[r] + r * bytes, (size_t)bytes);
    }
    wait_for_all(c);
}

static void ranks_gather(struct comm *c, void *to, const void *mine, int64_t count, enum dtype dtype) {
    int64_t bytes = count * (int64_t)dtype_size(dtype);
    char **all = publish(c, mine);
    for (int r = 0; r < c->ranks && c->rank == 0; r++) memcpy((char *)to + r * bytes, all[r], (size_t)bytes);
    wait_for_all(c);
}

static void ranks_scatter(struct comm *c, void *mine, const void *from, int64_t count, enum dtype dtype) {
    int64_t bytes = count * (int64_t)dtype_size(dtype);
    char **all = publish(c, from);
    memcpy(mine, all[0] + c->rank * bytes, (size_t)bytes);
    wait_for_all(c);
}

static void ranks_close(struct comm *c) { (void)c; }
static void ranks_abort(struct comm *c, int exit_code) {
    (void)c, (void)exit_code;
    abort();
}

static const struct comm_functions ranks_functions = {
    .close = ranks_close,
    .abort = ranks_abort,
    .sum_f64 = ranks_sum_f64,
    .max_i64 = ranks_max_i64,
    .broadcast = ranks_broadcast,
    .barrier = wait_for_all,
    .reduce_scatter = ranks_reduce_scatter,
    .all_gather = ranks_all_gather,
    .gather = ranks_gather,
    .scatter = ranks_scatter,
};

static void *run_rank(void *self) {
    struct rank_thread *t = self;
    struct comm c = {
        .rank = t->rank, .ranks = t->group->ranks, .name = "threads", .functions = &ranks_functions, .impl = t->group};
    t->group->body(&c, t->group->self);
    return NULL;
}

void ranks_run(int ranks, void (*body)(struct comm *c, void *self), void *self) {
    struct group group = {.ranks = ranks, .body = body, .self = self};
    struct rank_thread *threads = calloc((size_t)ranks, sizeof *threads);
    group.published = calloc((size_t)ranks, sizeof *group.published);
    ASSERT(threads && group.published && pthread_barrier_init(&group.barrier, NULL, (unsigned)ranks) == 0);
    for (int r = 0; r < ranks; r++) {
        threads[r] = (struct rank_thread){.group = &group, .rank = r};
        ASSERT(pthread_create(&threads[r].thread, NULL, run_rank, &threads[r]) == 0);
    }
    for (int r = 0; r < ranks; r++) pthread_join(threads[r].thread, NULL);
    pthread_barrier_destroy(&group.barrier);
    free(group.published);
    free(threads);
}

int ranks_world(struct comm *world) {
    error err = {0};
    const char *want = getenv("EXPECT_RANKS");
    int result = comm_open(world, &err);
    if (result != 0) fprintf(stderr, "%s\n", err.text);
    else if (want && atoi(want) != world->ranks) fprintf(stderr, "%d ranks, not %s\n", world->ranks, want);
    else return 0;
    return 1;
}
