/* test_faults_memory.c: every command with one request for memory, or for a thread, failing in each run. What must hold
 * is said in test/support_faults.h.
 *
 * The linker puts the functions __wrap_NAME below in front of every call of NAME from riverrun's code and from
 * libraries that are linked into it (the Makefile lists the names). Shared libraries keep theirs: what libgomp,
 * OpenBLAS and MPI do without memory is theirs to say (docs/testing.md tells). An undisturbed run notes from where each
 * request comes; then the first request of every such place that no earlier scene has tried fails, and a keyed sample
 * of the others. FAULTS=all tries all of them. */
#include "test/unit.h"

#include "common/rng.h"
#include "test/support_faults.h"
#include <dirent.h>
#include <errno.h>
#include <execinfo.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <xxhash.h>

enum {
    REQUESTS_MAX = 1 << 20,
    PLACES_MAX = 1 << 14,
    FRAMES = 7,      /* of the stack that tell one place from another */
    FRAMES_OURS = 2, /* those of this file on top of it */
};

/* Shared with the child that counts. */
struct requests {
    atomic_ulong count;
    uint64_t places[REQUESTS_MAX]; /* from where each came: a digest of the stack */
};
static struct requests *requests;

static atomic_bool armed;
static bool noting;
static unsigned long fails_at; /* 0: none */
static atomic_ulong made;

/* Counts a request; true if it is the one to fail. */
static bool is_refused(void) {
    if (!atomic_load_explicit(&armed, memory_order_relaxed)) return false;
    unsigned long n = atomic_fetch_add(&made, 1) + 1;
    if (noting && n <= REQUESTS_MAX) {
        static _Thread_local bool inside; /* the unwinder may ask for memory itself */
        void *frames[FRAMES + FRAMES_OURS];
        if (inside) return false;
        inside = true;
        int depth = backtrace(frames, FRAMES + FRAMES_OURS);
        inside = false;
        requests->places[n - 1] =
            depth <= FRAMES_OURS ? 0 : XXH64(frames + FRAMES_OURS, (size_t)(depth - FRAMES_OURS) * sizeof *frames, 0);
        atomic_store(&requests->count, n);
    }
    if (n != fails_at) return false;
    errno = ENOMEM;
    return true;
}

/* ---- what the linker calls --------------------------------------------------------------------------------------- */

#define WRAP(type, name, parameters, arguments, refusal)                                                               \
    type __real_##name parameters;                                                                                     \
    type __wrap_##name parameters;                                                                                     \
    type __wrap_##name parameters { return is_refused() ? (refusal) : __real_##name arguments; }

WRAP(void *, malloc, (size_t size), (size), NULL)
WRAP(void *, calloc, (size_t count, size_t size), (count, size), NULL)
WRAP(void *, realloc, (void *memory, size_t size), (memory, size), NULL)
WRAP(void *, aligned_alloc, (size_t align, size_t size), (align, size), NULL)
WRAP(int, posix_memalign, (void **out, size_t align, size_t size), (out, align, size), ENOMEM)
WRAP(char *, strdup, (const char *text), (text), NULL)
WRAP(char *, strndup, (const char *text, size_t size), (text, size), NULL)
WRAP(char *, realpath, (const char *path, char *out), (path, out), NULL)
WRAP(FILE *, open_memstream, (char **text, size_t *size), (text, size), NULL)
WRAP(FILE *, fopen, (const char *path, const char *mode), (path, mode), NULL)
WRAP(DIR *, opendir, (const char *path), (path), NULL)
WRAP(DIR *, fdopendir, (int descriptor), (descriptor), NULL)
WRAP(ssize_t, getline, (char **line, size_t *size, FILE *in), (line, size, in), -1)
WRAP(void *, mmap, (void *at, size_t size, int protection, int flags, int descriptor, off_t offset),
     (at, size, protection, flags, descriptor, offset), MAP_FAILED)
WRAP(int, pthread_create, (pthread_t * thread, const pthread_attr_t *a, void *(*run)(void *), void *self),
     (thread, a, run, self), EAGAIN)

int __wrap_asprintf(char **text, const char *format, ...) __attribute__((format(printf, 2, 3)));
int __wrap_asprintf(char **text, const char *format, ...) {
    if (is_refused()) return -1;
    va_list arguments;
    va_start(arguments, format);
    int size = vasprintf(text, format, arguments);
    va_end(arguments);
    return size;
}

/* ---- one scene --------------------------------------------------------------------------------------------------- */

static void note(void) {
    noting = true;
    fails_at = 0;
    atomic_store(&armed, true);
}

static void refuse(void) {
    noting = false;
    atomic_store(&armed, true);
}

static void disarm(void) {
    atomic_store(&armed, false);
}

static int by_place(const void *a, const void *b) {
    const unsigned long *x = a, *y = b;
    uint64_t p = requests->places[*x - 1], q = requests->places[*y - 1];
    if (p != q) return p < q ? -1 : 1;
    return *x < *y ? -1 : *x > *y;
}

/* Places of earlier scenes. */
struct places {
    uint64_t list[PLACES_MAX];
    unsigned long count;
};

static bool add_place(struct places *known, uint64_t place) {
    for (unsigned long i = 0; i < known->count; i++) {
        if (known->list[i] == place) return false;
    }
    assert_true(known->count < PLACES_MAX);
    known->list[known->count++] = place;
    return true;
}

/* Marks the first request of each place that is not known yet; returns the number of places. */
static unsigned long mark_places(bool *marked, unsigned long all, struct places *known) {
    unsigned long *order = malloc(all * sizeof *order), places = 0;
    assert_non_null(order);
    for (unsigned long i = 0; i < all; i++) order[i] = i + 1;
    qsort(order, all, sizeof *order, by_place);
    for (unsigned long i = 0; i < all; i++) {
        uint64_t place = requests->places[order[i] - 1];
        if (i > 0 && requests->places[order[i - 1] - 1] == place) continue;
        marked[order[i]] = add_place(known, place);
        places++;
    }
    free(order);
    return places;
}

#if defined __SANITIZE_ADDRESS__
enum { ONE_OF = 10, SAMPLE = 4 };
#else
enum { ONE_OF = 1, SAMPLE = 20 };
#endif

static void sweep(const struct fault_scene *s, uint32_t stream, struct places *known) {
    static const char *const reasons[] = {"memory", "cannot allocate", "thread", NULL};
    struct fault_whole whole = faults_undisturbed(s);
    struct fault counting = {.arm = note, .disarm = disarm}, f = {.arm = refuse, .disarm = disarm};
    atomic_store(&requests->count, 0);
    faults_prepare(s);
    assert_int_equal(faults_run(s->words, &counting), 0);
    unsigned long all = atomic_load(&requests->count), tried = 0, refused = 0, wrong = 0;
    assert_true(all > 10 && all < REQUESTS_MAX);
    bool *marked = calloc(all + 1, sizeof *marked);
    assert_non_null(marked);
    unsigned long places = mark_places(marked, all, known);
    rng_key key = {.seed = 1, .purpose = RNG_TEST, .stream = stream};
    /* A sanitizer makes children slow; it gets a keyed share of the places. */
    for (unsigned long n = 1; n <= all; n++) marked[n] = marked[n] && rng_below(key, n, ONE_OF) == 0;
    for (unsigned long i = 0; i < SAMPLE; i++) marked[1 + rng_below(key, all + 1 + i, all)] = true;
    for (unsigned long n = 1; n <= all; n++) {
        char what[64];
        if (!marked[n] && !faults_all()) continue;
        snprintf(what, sizeof what, "request %lu", n);
        fails_at = n;
        int code = faults_attempt(s, &whole, &f, what, reasons);
        refused += code == 1;
        wrong += code == -1;
        tried++;
    }
    free(marked);
    print_message("%s: %lu requests from %lu places, %lu tried, %lu refused\n", s->name, all, places, tried, refused);
    assert_int_equal(wrong, 0);
    assert_true(2 * refused > tried);
}

static void each_request(void **state) {
    (void)state;
    const char *only = getenv("FAULTS_SCENE");
    struct places *known = calloc(1, sizeof *known);
    assert_non_null(known);
    for (uint32_t i = 0; fault_scenes[i].name; i++) {
        if (!only || strcmp(only, fault_scenes[i].name) == 0) sweep(&fault_scenes[i], i, known);
    }
    free(known);
}

static char directory[256];

static int enter(void **state) {
    (void)state;
    void *frames[4];
    backtrace(frames, 4); /* loads what it needs before anything is counted */
    requests = mmap(NULL, sizeof *requests, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(requests != MAP_FAILED);
    faults_enter(directory);
    return 0;
}

static int leave(void **state) {
    (void)state;
    munmap(requests, sizeof *requests);
    faults_leave(directory);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_request),
    };
    return cmocka_run_group_tests(tests, enter, leave);
}
