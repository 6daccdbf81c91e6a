/* watchdog.c: the thread that watchdog.h describes. Owns the thread and its handles, not the board.
 *
 * Everything on the board is written by one rank and read by others at any time, so all of it is atomic; texts are
 * copied word by word. A text that is read while it changes is a mixture of two: it is for a message only.
 */
#include "train/watchdog.h"

#include "common/text.h"
#include "train/comm_internal.h"
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LOOK_MS = 200, TEXT_WORDS = 8, TEXT = TEXT_WORDS * sizeof(uint64_t) };

struct shared_text {
    _Atomic uint64_t words[TEXT_WORDS];
};

/* One local rank. */
struct place {
    _Atomic int64_t rank, process, space; /* space: the name space that the process number is of */
    _Atomic int64_t step;                 /* -1: none yet */
    _Atomic uint64_t beats;
    _Atomic int left; /* in good order */
    struct shared_text note, waiting;
};

struct board {
    _Atomic int told;
    struct place places[];
};

struct watchdog {
    struct comm *comm;
    struct board *board;
    struct place *own;
    struct pollfd *handles; /* one a local rank, then the one that ends the thread; -1: not watched */
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    _Atomic double limit;
    uint64_t seen_beats, seen_progress; /* the thread's */
    double changed;
};

/* ---- texts on the board ------------------------------------------------------------------------------------------ */

static void write_text(struct shared_text *to, const char *text) {
    uint64_t words[TEXT_WORDS] = {0};
    size_t length = strlen(text);
    memcpy(words, text, length < TEXT - 1 ? length : TEXT - 1);
    for (int i = 0; i < TEXT_WORDS; i++) atomic_store_explicit(&to->words[i], words[i], memory_order_relaxed);
}

static void read_text(char out[TEXT], struct shared_text *from) {
    uint64_t words[TEXT_WORDS];
    for (int i = 0; i < TEXT_WORDS; i++) words[i] = atomic_load_explicit(&from->words[i], memory_order_relaxed);
    memcpy(out, words, TEXT);
    out[TEXT - 1] = '\0';
}

/* "a sum over ranks at step 7" */
static void describe(char *out, size_t size, struct place *p) {
    char note[TEXT], waiting[TEXT];
    read_text(note, &p->note);
    read_text(waiting, &p->waiting);
    long long step = atomic_load(&p->step);
    const char *doing = waiting[0] ? waiting : note[0] ? note : "the start";
    if (step >= 0) snprintf(out, size, "%s at step %lld", doing, step);
    else snprintf(out, size, "%s", doing);
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

size_t watchdog_board_size(int local_ranks) {
    return sizeof(struct board) + (size_t)local_ranks * sizeof(struct place);
}

int watchdog_open(struct watchdog **out, struct comm *c, void *board, error *err) {
    *out = NULL;
    struct watchdog *w = calloc(1, sizeof *w);
    struct pollfd *handles = calloc((size_t)c->local_ranks + 1, sizeof *handles);
    if (!w || !handles) {
        free(w);
        free(handles);
        return error_system(err, "no memory for the watchdog");
    }
    *w = (struct watchdog){.comm = c, .board = board, .handles = handles};
    pthread_mutex_init(&w->lock, NULL);
    w->own = &w->board->places[c->local_rank];
    struct stat space;
    atomic_store(&w->own->space, stat("/proc/self/ns/pid", &space) == 0 ? (int64_t)space.st_ino : 0);
    atomic_store(&w->own->rank, c->rank);
    atomic_store(&w->own->step, -1);
    atomic_store(&w->own->process, getpid());
    *out = w;
    return 0;
}

/* A handle that becomes readable when a process ends; -1 where there can be none. */
static int handle_of(struct watchdog *w, int local_rank) {
    struct place *p = &w->board->places[local_rank];
    if (p == w->own || atomic_load(&p->space) != atomic_load(&w->own->space)) return -1;
#ifdef SYS_pidfd_open
    return (int)syscall(SYS_pidfd_open, (pid_t)atomic_load(&p->process), 0);
#else
    return -1;
#endif
}

static void *watch(void *self);

int watchdog_start(struct watchdog *w, error *err) {
    int ranks = w->comm->local_ranks;
    for (int i = 0; i < ranks; i++) w->handles[i] = (struct pollfd){.fd = handle_of(w, i), .events = POLLIN};
    w->handles[ranks] = (struct pollfd){.fd = eventfd(0, EFD_CLOEXEC), .events = POLLIN};
    if (w->handles[ranks].fd < 0) return error_system(err, "the watchdog's eventfd: %s", strerror(errno));
    /* Signals are the main thread's. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&w->thread, NULL, watch, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) return error_system(err, "the watchdog's thread: %s", strerror(failed));
    w->started = true;
    return 0;
}

void watchdog_close(struct watchdog *w) {
    if (!w) return;
    atomic_store(&w->own->left, 1);
    int ranks = w->comm->local_ranks;
    if (w->started) {
        uint64_t one = 1;
        while (write(w->handles[ranks].fd, &one, sizeof one) < 0 && errno == EINTR) {}
        pthread_join(w->thread, NULL);
        for (int i = 0; i <= ranks; i++)
            if (w->handles[i].fd >= 0) close(w->handles[i].fd);
    }
    pthread_mutex_destroy(&w->lock);
    free(w->handles);
    free(w);
}

/* ---- what the rank says ------------------------------------------------------------------------------------------ */

static void beat(struct watchdog *w) { atomic_fetch_add_explicit(&w->own->beats, 1, memory_order_release); }

void watchdog_note(struct watchdog *w, int64_t step, const char *operation) {
    if (!w) return;
    atomic_store(&w->own->step, step);
    write_text(&w->own->note, operation);
    beat(w);
}

void watchdog_enter(struct watchdog *w, const char *operation) {
    if (!w) return;
    write_text(&w->own->waiting, operation);
    beat(w);
}

void watchdog_leave(struct watchdog *w) {
    if (!w) return;
    write_text(&w->own->waiting, "");
    beat(w);
}

void watchdog_limit(struct watchdog *w, double timeout_s) {
    if (!w) return;
    beat(w);
    atomic_store(&w->limit, timeout_s);
}

void watchdog_lock(struct watchdog *w) {
    if (w) pthread_mutex_lock(&w->lock);
}

void watchdog_unlock(struct watchdog *w) {
    if (w) pthread_mutex_unlock(&w->lock);
}

/* ---- telling ----------------------------------------------------------------------------------------------------- */

void watchdog_told(struct watchdog *w) {
    if (w) atomic_store(&w->board->told, 1);
}

void watchdog_tell(struct watchdog *w, int rank, const char *format, ...) {
    if (w && atomic_exchange(&w->board->told, 1)) return;
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "riverrun: rank %d: %s\n", rank, text);
}

/* ---- the thread -------------------------------------------------------------------------------------------------- */

/* Whatever the other threads are doing. The launcher sees a rank end that has not left in good order. */
static _Noreturn void end_job(void) { _exit(1); }

static void look_for_the_gone(struct watchdog *w) {
    for (int i = 0; i < w->comm->local_ranks; i++) {
        struct place *p = &w->board->places[i];
        if (w->handles[i].fd < 0 || !(w->handles[i].revents & POLLIN)) continue;
        if (atomic_load(&p->left)) {
            close(w->handles[i].fd);
            w->handles[i].fd = -1;
            continue;
        }
        char where[2 * TEXT];
        describe(where, sizeof where, p);
        watchdog_tell(w, (int)atomic_load(&p->rank), "killed or crashed in %s; the job ends", where);
        end_job();
    }
}

/* The device's part: failures in the background, and how far it is. */
static void look_at_device(struct watchdog *w, char operation[TEXT]) {
    struct comm *c = w->comm;
    char why[512];
    uint64_t progress = w->seen_progress;
    operation[0] = '\0';
    pthread_mutex_lock(&w->lock);
    bool failed = c->device && c->device->look(c, &progress, operation, TEXT, why, sizeof why);
    pthread_mutex_unlock(&w->lock);
    if (failed) {
        watchdog_tell(w, c->rank, "%s%s%s; the job ends", operation, operation[0] ? ": " : "", why);
        end_job();
    }
    if (progress != w->seen_progress) w->changed = clock_seconds();
    w->seen_progress = progress;
}

/* Is `a` behind `b`: in a lower step, or in the same one waiting for nobody, or with fewer calls behind it? */
static bool is_behind(struct place *a, struct place *b) {
    int64_t step_a = atomic_load(&a->step), step_b = atomic_load(&b->step);
    if (step_a != step_b) return step_a < step_b;
    bool waits_a = atomic_load(&a->waiting.words[0]) != 0, waits_b = atomic_load(&b->waiting.words[0]) != 0;
    if (waits_a != waits_b) return !waits_a;
    return atomic_load(&a->beats) < atomic_load(&b->beats);
}

static struct place *find_last(struct watchdog *w) {
    struct place *last = w->own;
    for (int i = 0; i < w->comm->local_ranks; i++)
        if (is_behind(&w->board->places[i], last)) last = &w->board->places[i];
    return last;
}

static void tell_hang(struct watchdog *w, double limit, const char *operation) {
    char where[2 * TEXT], there[2 * TEXT], device[TEXT + 64] = "", other[2 * TEXT + 64] = "";
    struct place *last = find_last(w);
    describe(where, sizeof where, w->own);
    if (operation[0]) snprintf(device, sizeof device, " (the GPU has begun %s)", operation);
    if (last != w->own) {
        describe(there, sizeof there, last);
        snprintf(other, sizeof other, "; rank %d is furthest behind, in %s", (int)atomic_load(&last->rank), there);
    }
    watchdog_tell(w, w->comm->rank, "no progress for %g s (comm.timeout) in %s%s%s; the job ends", limit, where,
                  device, other);
}

static void *watch(void *self) {
    struct watchdog *w = self;
    int ranks = w->comm->local_ranks;
    w->changed = clock_seconds();
    for (;;) {
        poll(w->handles, (nfds_t)ranks + 1, LOOK_MS);
        if (w->handles[ranks].revents & POLLIN) return NULL;
        look_for_the_gone(w);
        char operation[TEXT];
        look_at_device(w, operation);
        uint64_t beats = atomic_load(&w->own->beats);
        if (beats != w->seen_beats) w->changed = clock_seconds();
        w->seen_beats = beats;
        double limit = atomic_load(&w->limit);
        if (limit <= 0 || clock_seconds() - w->changed < limit) continue;
        tell_hang(w, limit, operation);
        end_job();
    }
}
