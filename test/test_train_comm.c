/* test_train_comm.c: every call of train/comm.h, checked on every rank with exact data. Started plainly it is one
 * process, and also plays three ranks as threads (test/support_ranks.h); test/test_mpi.sh starts it under mpirun. */
#include "test/support_ranks.h"
#include "test/unit.h"
#include "train/comm.h"

#include <math.h>

/* A failed check on a thread can't leave through cmocka; it ends the program, which is as red. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: rank %d of %d: %s\n", __FILE__, __LINE__, c->rank, c->ranks, #condition);          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Values whose sum depends on the order of adding: 1e16 + 1 is 1e16 in double, 1e8 + 1 is 1e8 in float. */
static double ordered(int rank, enum dtype dtype) {
    double large = dtype == DTYPE_F32 ? 1e8 : 1e16, values[] = {large, 1, -large, 1, 3};
    return values[rank % 5];
}

static void check_sum(struct comm *c) {
    double values[3] = {ordered(c->rank, DTYPE_F64), (double)(c->rank + 1), -0.5}, want = 0;
    for (int r = 0; r < c->ranks; r++) want += ordered(r, DTYPE_F64);
    comm_sum_f64(c, values, 3);
    CHECK(values[0] == want);
    CHECK(values[1] == c->ranks * (c->ranks + 1) / 2.0);
    CHECK(values[2] == -0.5 * c->ranks);
    double nothing[2] = {c->rank == c->ranks - 1 ? NAN : 1, c->rank == 0 ? INFINITY : 1};
    comm_sum_f64(c, nothing, 2);
    CHECK(isnan(nothing[0]) && isinf(nothing[1]));
}

static void check_max(struct comm *c) {
    int64_t values[2] = {c->rank == c->ranks / 2 ? INT64_C(1) << 60 : c->rank, -c->rank - 1};
    comm_max_i64(c, values, 2);
    CHECK(values[0] == INT64_C(1) << 60 && values[1] == -1);
}

static void check_broadcast(struct comm *c) {
    for (int root = 0; root < c->ranks; root++) {
        char bytes[5] = {(char)c->rank, 1, 2, 3, (char)(c->rank + 7)};
        comm_broadcast(c, bytes, sizeof bytes, root);
        CHECK(bytes[0] == root && bytes[4] == root + 7 && bytes[2] == 2);
        comm_broadcast(c, bytes, 0, root);
    }
}

static void put(void *array, enum dtype dtype, int64_t i, double value) {
    if (dtype == DTYPE_F32) ((float *)array)[i] = (float)value;
    else ((double *)array)[i] = value;
}

static double get(const void *array, enum dtype dtype, int64_t i) {
    return dtype == DTYPE_F32 ? (double)((const float *)array)[i] : ((const double *)array)[i];
}

/* Whole numbers below 2^24 even as sums, so that float is exact. */
static double exact(int rank, int64_t i) { return (double)((i * 7 + rank * 1013) % 65521 - 30000); }

static void check_reduce_scatter(struct comm *c, int64_t count, enum dtype dtype) {
    void *buffer = calloc((size_t)(c->ranks * count) + 1, dtype_size(dtype));
    CHECK(buffer != NULL);
    for (int64_t i = 0; i < c->ranks * count; i++) put(buffer, dtype, i, exact(c->rank, i));
    if (count > 0) put(buffer, dtype, c->ranks * count - 1, ordered(c->rank, dtype));
    struct comm_piece piece = {buffer, count, dtype};
    comm_reduce_scatter(c, 0, &piece, 1);
    comm_wait(c, 0);
    for (int64_t i = c->rank * count; i < (c->rank + 1) * count; i++) {
        double want = 0;
        bool last = i == c->ranks * count - 1;
        for (int r = 0; r < c->ranks; r++) {
            double value = last ? ordered(r, dtype) : exact(r, i);
            want = dtype == DTYPE_F32 ? (double)((float)want + (float)value) : want + value;
        }
        CHECK(get(buffer, dtype, i) == want);
    }
    free(buffer);
}

static void check_all_gather(struct comm *c, int64_t count, enum dtype dtype) {
    void *buffer = calloc((size_t)(c->ranks * count) + 1, dtype_size(dtype));
    CHECK(buffer != NULL);
    for (int64_t i = 0; i < c->ranks * count; i++)
        put(buffer, dtype, i, i / (count ? count : 1) == c->rank ? exact(c->rank, i) : -1);
    struct comm_piece piece = {buffer, count, dtype};
    comm_all_gather(c, 1, &piece, 1);
    comm_wait(c, 1);
    for (int64_t i = 0; i < c->ranks * count; i++) CHECK(get(buffer, dtype, i) == exact((int)(i / count), i));
    free(buffer);
}

static void check_gather_scatter(struct comm *c, int64_t count, enum dtype dtype) {
    size_t size = dtype_size(dtype);
    void *mine = calloc((size_t)count + 1, size),
         *all = c->rank == 0 ? calloc((size_t)(c->ranks * count) + 1, size) : NULL;
    CHECK(mine && (all || c->rank != 0));
    for (int64_t i = 0; i < count; i++) put(mine, dtype, i, exact(c->rank, i));
    comm_gather(c, all, mine, count, dtype);
    for (int64_t i = 0; i < c->ranks * count && c->rank == 0; i++) {
        CHECK(get(all, dtype, i) == exact((int)(i / count), i % count));
        put(all, dtype, i, get(all, dtype, i) + 1);
    }
    comm_scatter(c, mine, all, count, dtype);
    for (int64_t i = 0; i < count; i++) CHECK(get(mine, dtype, i) == exact(c->rank, i) + 1);
    free(mine);
    free(all);
}

static void check_agree(struct comm *c) {
    error err = {0};
    CHECK(comm_agree(c, 0, &err) == 0 && err.kind == ERROR_NONE);
    for (int failing = 0; failing < c->ranks; failing++) {
        error mine = {0};
        /* The lowest failing rank tells; a higher one that failed too keeps quiet. */
        int result = c->rank >= failing ? error_input(&mine, "trouble on %d", c->rank) : 0;
        CHECK(comm_agree(c, result, &mine) == -1 && mine.kind == ERROR_INPUT);
        char want[64] = "";
        if (c->rank == failing)
            snprintf(want, sizeof want, c->ranks > 1 ? "rank %d: trouble on %d" : "trouble on 0", failing, failing);
        CHECK(strcmp(mine.text, want) == 0);
    }
}

static void check_all(struct comm *c, void *self) {
    (void)self;
    /* 1.5 million elements: more than one piece of the MPI implementation's buffer. */
    static const int64_t counts[] = {0, 1, 7, 4096, 1500007};
    check_sum(c);
    check_max(c);
    check_broadcast(c);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        for (int d = 0; d < 2; d++) {
            enum dtype dtype = d ? DTYPE_F64 : DTYPE_F32;
            check_reduce_scatter(c, counts[i], dtype);
            check_all_gather(c, counts[i], dtype);
            check_gather_scatter(c, counts[i], dtype);
        }
    }
    comm_barrier(c);
    check_agree(c);
}

static struct comm world;

static void test_started_so(void **state) {
    (void)state;
    check_all(&world, NULL);
}

static void test_threads(void **state) {
    (void)state;
    if (world.ranks == 1) ranks_run(3, check_all, NULL);
}

int main(void) {
    if (ranks_world(&world) != 0) return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_started_so), cmocka_unit_test(test_threads)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    comm_close(&world);
    return failed;
}
