/* comm_none.c: communication of one process with itself: sums are there already, slices are the whole. */
#include "train/comm_internal.h"

#include <string.h>

static void nothing(struct comm *c) { (void)c; }
static void none_abort(struct comm *c, int exit_code) { (void)c, (void)exit_code; }
static void none_sum_f64(struct comm *c, double *values, int count) { (void)c, (void)values, (void)count; }
static void none_max_i64(struct comm *c, int64_t *values, int count) { (void)c, (void)values, (void)count; }
static void none_broadcast(struct comm *c, void *bytes, size_t count, int root) {
    (void)c, (void)bytes, (void)count, (void)root;
}
static void in_place(struct comm *c, void *buffer, int64_t count, enum dtype dtype) {
    (void)c, (void)buffer, (void)count, (void)dtype;
}

static void copy(void *to, const void *from, int64_t count, enum dtype dtype) {
    if (to != from && count > 0) memcpy(to, from, (size_t)count * dtype_size(dtype));
}

static void none_gather(struct comm *c, void *all, const void *mine, int64_t count, enum dtype dtype) {
    (void)c;
    copy(all, mine, count, dtype);
}

static void none_scatter(struct comm *c, void *mine, const void *all, int64_t count, enum dtype dtype) {
    (void)c;
    copy(mine, all, count, dtype);
}

static const struct comm_functions none_functions = {
    .close = nothing,
    .abort = none_abort,
    .sum_f64 = none_sum_f64,
    .max_i64 = none_max_i64,
    .broadcast = none_broadcast,
    .barrier = nothing,
    .reduce_scatter = in_place,
    .all_gather = in_place,
    .gather = none_gather,
    .scatter = none_scatter,
};

void comm_open_alone(struct comm *c) {
    *c = (struct comm){
        .rank = 0, .ranks = 1, .local_ranks = 1, .name = "none", .queued = true, .functions = &none_functions};
}
