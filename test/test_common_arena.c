/* test_common_arena.c: measuring and taking agree, alignment, zeros, rewinding, foreign memory, and what is refused. */
#include "test/unit.h"

#include "common/arena.h"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PIECES = 9 };
static const size_t piece_size[PIECES] = {1, 64, 65, 0, 4096, 63, 128, 7, 1000};

static void carve(arena *a, char *pieces[PIECES]) {
    for (int i = 0; i < PIECES; i++) pieces[i] = arena_take(a, piece_size[i]);
}

static void measured_size_is_what_a_run_needs(void **state) {
    (void)state;
    error err = {0};
    char *pieces[PIECES];
    arena counted = arena_measure("counted");
    carve(&counted, pieces);
    for (int i = 0; i < PIECES; i++) assert_null(pieces[i]);

    arena real;
    assert_int_equal(arena_open(&real, "real", counted.peak, NULL, &err), 0);
    carve(&real, pieces);
    assert_int_equal(real.used, counted.used);
    assert_int_equal(real.peak, counted.peak);
    for (int i = 0; i < PIECES; i++) {
        assert_int_equal((uintptr_t)pieces[i] % ARENA_ALIGN, 0);
        for (size_t k = 0; k < piece_size[i]; k++) assert_int_equal(pieces[i][k], 0);
        memset(pieces[i], i + 1, piece_size[i]);
    }
    for (int i = 0; i < PIECES; i++) { /* nobody's bytes overlap */
        for (size_t k = 0; k < piece_size[i]; k++) assert_int_equal(pieces[i][k], i + 1);
    }
    arena_close(&real);
    assert_null(real.base);
}

static void rewinding_reuses_and_keeps_the_peak(void **state) {
    (void)state;
    error err = {0};
    arena a;
    assert_int_equal(arena_open(&a, "scratch", 64 << 10, NULL, &err), 0);
    char *kept = arena_take(&a, 100);
    memset(kept, 5, 100);
    size_t mark = arena_mark(&a);
    char *first = arena_take(&a, 2000);
    memset(first, 6, 2000);
    arena_take(&a, 3000);
    size_t peak = a.used;
    arena_rewind(&a, mark);
    assert_int_equal(a.used, mark);
    assert_int_equal(a.peak, peak);
    char *again = arena_take(&a, 500);
    assert_ptr_equal(again, first);
    memset(again, 7, 500); /* usable once more, also under AddressSanitizer */
    assert_int_equal(kept[99], 5);
    assert_int_equal(a.peak, peak);
    arena_close(&a);
}

static void an_empty_arena_opens(void **state) {
    (void)state;
    error err = {0};
    arena a;
    assert_int_equal(arena_open(&a, "nothing", 0, NULL, &err), 0);
    arena_close(&a);
    arena never = {0};
    arena_close(&never); /* what was never opened may be closed */
}

static void too_much_is_a_system_error(void **state) {
    (void)state;
    error err = {0};
    arena a;
    unit_expect(arena_open(&a, "moon", SIZE_MAX - 8, NULL, &err), &err, ERROR_SYSTEM,
                "cannot allocate 18446744073709551607 bytes (17179869184.00 GiB) for moon; riverrun plan shows what a "
                "run takes, and which batch fits");
    assert_null(a.base);
    arena_close(&a);
}

struct pool {
    int allocated, released;
    size_t size;
    void *block;
};

static void *pool_allocate(void *self, size_t size) {
    struct pool *p = self;
    p->allocated++;
    p->size = size;
    p->block = aligned_alloc(ARENA_ALIGN, size);
    assert_non_null(p->block);
    memset(p->block, 0, size);
    return p->block;
}

static void pool_release(void *self, void *block) {
    struct pool *p = self;
    p->released++;
    assert_ptr_equal(block, p->block);
    free(block);
}

static void foreign_memory_is_taken_and_given_back(void **state) {
    (void)state;
    error err = {0};
    struct pool pool = {0};
    const struct arena_memory memory = {pool_allocate, pool_release, &pool};
    arena a;
    assert_int_equal(arena_open(&a, "device", 1000, &memory, &err), 0);
    assert_int_equal(pool.size, 1024);
    assert_ptr_equal(arena_take(&a, 10), pool.block);
    arena_rewind(&a, 0);
    arena_close(&a);
    assert_int_equal(pool.allocated, 1);
    assert_int_equal(pool.released, 1);
}

/* The signal that ends a child which does `misuse`; 0 if it lives. Its messages are dropped. */
static int end_of(void (*misuse)(void)) {
    pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        signal(SIGSEGV, SIG_DFL);
        if (!freopen("/dev/null", "w", stderr)) _exit(3);
        misuse();
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status)) return WTERMSIG(status);
    return WEXITSTATUS(status) == 0 ? 0 : -1; /* sanitizers exit with a code of their own */
}

static void take_too_much(void) {
    error err;
    arena a;
    if (arena_open(&a, "small", 128, NULL, &err) != 0) _exit(3);
    arena_take(&a, 129);
}

static void take_too_much_in_pieces(void) {
    error err;
    arena a;
    if (arena_open(&a, "small", 1024, NULL, &err) != 0) _exit(3);
    for (int i = 0; i < 17; i++) arena_take(&a, 64);
}

static void take_a_negative_size(void) {
    error err;
    arena a;
    if (arena_open(&a, "small", 128, NULL, &err) != 0) _exit(3);
    arena_take(&a, (size_t)-1);
}

static void rewind_forwards(void) {
    arena a = arena_measure("counted");
    arena_rewind(&a, 64);
}

static void misuse_aborts(void **state) {
    (void)state;
    assert_int_equal(end_of(take_too_much), SIGABRT);
    assert_int_equal(end_of(take_too_much_in_pieces), SIGABRT);
    assert_int_equal(end_of(take_a_negative_size), SIGABRT);
    assert_int_equal(end_of(rewind_forwards), SIGABRT);
}

#ifdef __SANITIZE_ADDRESS__
static volatile char *touched;

static void write_past_a_piece(void) {
    error err;
    arena a;
    if (arena_open(&a, "guarded", 4096, NULL, &err) != 0) _exit(3);
    touched = arena_take(&a, 64);
    arena_take(&a, 64);
    touched[64] = 1;
}

static void write_into_what_was_given_back(void) {
    error err;
    arena a;
    if (arena_open(&a, "guarded", 4096, NULL, &err) != 0) _exit(3);
    touched = arena_take(&a, 64);
    arena_rewind(&a, 0);
    touched[0] = 1;
}

static void sanitizer_sees_pieces(void **state) {
    (void)state;
    assert_int_not_equal(end_of(write_past_a_piece), 0);
    assert_int_not_equal(end_of(write_into_what_was_given_back), 0);
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(measured_size_is_what_a_run_needs),
        cmocka_unit_test(rewinding_reuses_and_keeps_the_peak),
        cmocka_unit_test(an_empty_arena_opens),
        cmocka_unit_test(too_much_is_a_system_error),
        cmocka_unit_test(foreign_memory_is_taken_and_given_back),
        cmocka_unit_test(misuse_aborts),
#ifdef __SANITIZE_ADDRESS__
        cmocka_unit_test(sanitizer_sees_pieces),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
