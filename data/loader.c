/* loader.c: the prefetching threads and the ring of batches behind loader.h. Owns the threads, their readers and the
 * batches' memory; which sample a row holds is decided in data/mixture.c, how it is made in data/row_source.c.
 * Called by the trainer and the loader's bench.
 *
 * Batches are numbered from 0 in the order of loader_next, and batch n lives in slot n % slots. Rows are handed out
 * in order, a run at a time, to whichever thread asks. Invariants, under `lock`:
 *   1. delivered <= handing <= delivered + ahead: there are ahead + 1 slots, and the one of batch delivered - 1
 *      belongs to the caller, so a batch being filled never shares a slot with one that is still needed.
 *   2. slots[n % slots].left counts rows of batch n that are not finished; batch n is complete when it is 0.
 *   3. Once a row of batch f has failed, rows of f are still handed out (its lowest failing row is then the same for
 *      any number of threads), rows of later batches no more. delivered never passes f. */
#include "data/loader.h"

#include "common/limits.h"
#include "common/text.h"
#include "data/mixture.h"
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NO_BATCH UINT64_MAX
/* Tokens a thread takes at a time: short rows don't fight over the lock, and neighbouring samples of an unshuffled
 * source stay with one thread, whose cursor then decompresses their frame once. */
#define RUN_TOKENS 16384

struct slot {
    struct batch batch;
    uint64_t number; /* of the batch that is, or was last, filled here; NO_BATCH at first */
    int64_t left;    /* rows not finished */
    int64_t failed_row;
    error failure; /* of failed_row; kind ERROR_NONE: none. Final: no batch comes into a slot after a failed one */
};

struct worker {
    loader *owner;
    pthread_t thread;
    struct row_reader reader;
    struct mixture_block block;
    double read_s; /* since the last time the totals were brought up to date */
};

struct source {
    char name[LIMIT_NAME];
    const row_source *rows;
};

struct lookup { /* what loader_locate, const for its callers, caches */
    pthread_mutex_t lock;
    struct mixture_block block;
};

struct loader {
    struct loader_options options;
    struct source sources[LIMIT_SOURCES];
    struct mixture mixture;
    struct lookup *lookup;
    arena memory, scratch;
    struct slot *slots;
    uint64_t slot_count;
    struct worker *workers;
    int threads;          /* started so far, so that a failed opening is undone exactly */
    int64_t run;          /* rows handed out at a time */
    atomic_bool stop;     /* set under `lock`; looked at between rows without it */

    pthread_mutex_t lock; /* guards what follows, and the slots but for rows in the hands of a thread */
    pthread_cond_t room, done;
    uint64_t delivered; /* batches given to the caller */
    uint64_t handing;   /* the batch whose rows are being handed out... */
    int64_t next_row;   /* ...from here on */
    uint64_t failed;    /* the first batch with a failed row, or NO_BATCH */
    struct loader_stats stats;
};

/* ---- one row -------------------------------------------------------------------------------------------------- */

/* Fill row b of a slot's batch; *valid gets its number of targets that count. */
static int fill_row(struct worker *w, struct slot *slot, int64_t b, int64_t *valid, error *err) {
    loader *l = w->owner;
    const struct batch *batch = &slot->batch;
    int64_t T = l->options.T;
    uint64_t g = batch->first + (uint64_t)(l->options.rank * l->options.B + b);
    struct loader_place place = mixture_locate(&l->mixture, &w->block, g);
    const struct source *source = &l->sources[place.source];
    int32_t *targets = batch->targets + b * T;

    double before = clock_seconds();
    int failed = row_source_read(source->rows, &w->reader, place.sample, T, T, batch->tokens + b * T, targets,
                                 batch->doc ? batch->doc + b * T : NULL, err);
    w->read_s += clock_seconds() - before;
    if (failed) {
        return error_context(err, "source '%s', sample %" PRIu64 " (global sample %" PRIu64 ")", source->name,
                             place.sample, g);
    }
    *valid = 0;
    for (int64_t t = 0; t < T; t++) *valid += targets[t] >= 0;
    return 0;
}

/* ---- threads -------------------------------------------------------------------------------------------------- */

/* Wait until there is a row to fill; false: the loader is closing. Called and left with the lock held. */
static bool wait_for_work(loader *l) {
    while (!l->stop) {
        bool room = l->handing < l->delivered + (uint64_t)l->options.ahead;
        if (room && (l->failed == NO_BATCH || l->handing <= l->failed)) return true;
        double before = clock_seconds();
        pthread_cond_wait(&l->room, &l->lock);
        l->stats.thread_idle_s += clock_seconds() - before;
    }
    return false;
}

/* Take the next run of rows: slot and [*first, *end). With the lock held. */
static struct slot *take_run(loader *l, int64_t *first, int64_t *end) {
    struct slot *slot = &l->slots[l->handing % l->slot_count];
    int64_t B = l->options.B;
    if (l->next_row == 0) {
        slot->number = l->handing;
        slot->left = B;
        slot->batch.valid = 0;
        slot->batch.first = l->options.start + l->handing * (uint64_t)l->options.ranks * (uint64_t)B;
    }
    *first = l->next_row;
    *end = *first + l->run < B ? *first + l->run : B;
    l->next_row = *end;
    if (l->next_row == B) {
        l->next_row = 0;
        l->handing++;
    }
    return slot;
}

/* Fill rows [first, end). The first failure ends the run; *failed_row says where. */
static int64_t fill_run(struct worker *w, struct slot *slot, int64_t first, int64_t end, int64_t *failed_row,
                        error *err) {
    int64_t valid = 0;
    *failed_row = -1;
    for (int64_t b = first; b < end && !w->owner->stop; b++) {
        int64_t row_valid = 0;
        if (fill_row(w, slot, b, &row_valid, err) != 0) {
            *failed_row = b;
            break;
        }
        valid += row_valid;
    }
    return valid;
}

static void *worker_main(void *argument) {
    struct worker *w = argument;
    loader *l = w->owner;
    pthread_mutex_lock(&l->lock);
    while (wait_for_work(l)) {
        int64_t first, end, failed_row;
        error err = {.kind = ERROR_NONE};
        struct slot *slot = take_run(l, &first, &end);
        pthread_mutex_unlock(&l->lock);

        double before = clock_seconds();
        w->read_s = 0;
        int64_t valid = fill_run(w, slot, first, end, &failed_row, &err);
        double spent = clock_seconds() - before;

        pthread_mutex_lock(&l->lock);
        l->stats.thread_read_s += w->read_s;
        l->stats.thread_fill_s += spent - w->read_s;
        slot->batch.valid += valid;
        slot->left -= end - first;
        if (failed_row >= 0) {
            if (slot->failure.kind == ERROR_NONE || failed_row < slot->failed_row) {
                slot->failed_row = failed_row;
                slot->failure = err;
            }
            if (slot->number < l->failed) l->failed = slot->number;
        }
        if (slot->left == 0) pthread_cond_signal(&l->done);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

/* Signals are for the main thread: a prefetching thread that caught one would have its read interrupted. */
static int start_threads(loader *l, error *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = 0;
    for (; l->threads < l->options.threads && !failed; l->threads += !failed) {
        failed = pthread_create(&l->workers[l->threads].thread, NULL, worker_main, &l->workers[l->threads]);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        return error_system(err, "starting loader thread %d of %d failed: %s", l->threads + 1, l->options.threads,
                            strerror(failed));
    }
    return 0;
}

/* ---- opening and closing -------------------------------------------------------------------------------------- */

static int check_first_source(const struct loader_source *first, const struct loader_source *other, error *err) {
    char names[2][LIMIT_NAME + 16];
    snprintf(names[0], sizeof names[0], "source '%s'", first->name);
    snprintf(names[1], sizeof names[1], "source '%s'", other->name);
    return row_source_same_tokens(first->rows, names[0], other->rows, names[1], err);
}

/* Copy the sources, count their samples, and refuse those that can't give one row. */
static int take_sources(loader *l, const struct loader_source *sources, size_t count, error *err) {
    uint64_t samples[LIMIT_SOURCES], T = (uint64_t)l->options.T;
    for (size_t s = 0; s < count; s++) {
        TRY(row_source_check(sources[s].rows, sources[s].name, l->options.T, err));
        samples[s] = row_source_inputs(sources[s].rows, l->options.T) / T;
        if (s > 0) TRY(check_first_source(&sources[0], &sources[s], err));
        snprintf(l->sources[s].name, sizeof l->sources[s].name, "%s", sources[s].name);
        l->sources[s].rows = sources[s].rows;
    }
    return mixture_make(&l->mixture, sources, samples, count, l->options.seed, l->options.shuffle, err);
}

/* Carve the batches: run once to measure, once to take. */
static void carve_batches(loader *l, arena *a) {
    int64_t B = l->options.B, T = l->options.T;
    size_t size = (size_t)(B * T) * sizeof(int32_t);
    for (uint64_t i = 0; i < l->slot_count; i++) {
        l->slots[i].number = NO_BATCH;
        l->slots[i].batch = (struct batch){.B = B, .T = T};
        l->slots[i].batch.tokens = arena_take(a, size);
        l->slots[i].batch.targets = arena_take(a, size);
        l->slots[i].batch.doc = l->options.reset ? arena_take(a, size) : NULL;
    }
}

/* Each thread's reader works in the scratch of the source that needs most. */
static void carve_scratch(loader *l, arena *a) {
    size_t most = 0;
    for (size_t s = 0; s < l->mixture.count; s++) {
        size_t size = row_source_scratch(l->sources[s].rows, l->options.T);
        if (size > most) most = size;
    }
    for (int i = 0; i < l->options.threads; i++) l->workers[i].reader.scratch = arena_take(a, most);
}

static int take_memory(loader *l, error *err) {
    const struct loader_options *o = &l->options;
    int64_t row_bytes, bytes; /* an upper bound of everything, to know that the sizes fit in 63 bits */
    if (__builtin_mul_overflow(o->T, 3 * (int64_t)sizeof(int32_t), &row_bytes) ||
        __builtin_mul_overflow(row_bytes + 3 * ARENA_ALIGN, o->B, &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)o->ahead + 1, &bytes)) {
        return error_input(err, "%d batches of %" PRId64 " rows of %" PRId64 " tokens don't fit in memory",
                           o->ahead + 1, o->B, o->T);
    }
    l->slot_count = (uint64_t)o->ahead + 1;
    l->slots = calloc(l->slot_count, sizeof *l->slots);
    l->workers = calloc((size_t)o->threads, sizeof *l->workers);
    l->lookup = malloc(sizeof *l->lookup);
    if (!l->slots || !l->workers || !l->lookup) return error_system(err, "no memory for the loader's threads");
    pthread_mutex_init(&l->lookup->lock, NULL);
    l->lookup->block.number = MIXTURE_NO_BLOCK;

    arena measure = arena_measure("batches");
    carve_batches(l, &measure);
    TRY(arena_open(&l->memory, "batches", measure.peak, o->memory, err));
    carve_batches(l, &l->memory);
    measure = arena_measure("loader scratch");
    carve_scratch(l, &measure);
    TRY(arena_open(&l->scratch, "loader scratch", measure.peak, NULL, err));
    carve_scratch(l, &l->scratch);
    for (int i = 0; i < o->threads; i++) {
        l->workers[i].owner = l;
        l->workers[i].block.number = MIXTURE_NO_BLOCK;
        TRY(row_reader_open(&l->workers[i].reader, err));
    }
    return 0;
}

int loader_open(loader **out, const struct loader_source *sources, size_t count, const struct loader_options *options,
                error *err) {
    const struct loader_options *o = options;
    ASSERT(count >= 1 && count <= LIMIT_SOURCES);
    ASSERT(o->T >= 1 && o->B >= 1 && o->threads >= 1 && o->ahead >= 1 && o->rank >= 0 && o->rank < o->ranks);
    loader *l = calloc(1, sizeof *l);
    if (!l) return error_system(err, "no memory for the loader");
    l->options = *o;
    l->failed = NO_BATCH;
    /* Long enough to be worth the lock, short enough that every thread gets a share of each batch. */
    int64_t share = (o->B + o->threads - 1) / o->threads, run = RUN_TOKENS / o->T;
    l->run = run < 1 ? 1 : run < share ? run : share;
    atomic_init(&l->stop, false);
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->room, NULL);
    pthread_cond_init(&l->done, NULL);
    if (take_sources(l, sources, count, err) != 0 || take_memory(l, err) != 0 || start_threads(l, err) != 0) {
        loader_close(l);
        return -1;
    }
    *out = l;
    return 0;
}

void loader_close(loader *l) {
    if (!l) return;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_broadcast(&l->room);
    pthread_mutex_unlock(&l->lock);
    for (int i = 0; i < l->threads; i++) pthread_join(l->workers[i].thread, NULL);
    for (int i = 0; l->workers && i < l->options.threads; i++) row_reader_close(&l->workers[i].reader);
    arena_close(&l->memory);
    arena_close(&l->scratch);
    if (l->lookup) pthread_mutex_destroy(&l->lookup->lock);
    free(l->lookup);
    free(l->workers);
    free(l->slots);
    pthread_cond_destroy(&l->done);
    pthread_cond_destroy(&l->room);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

/* ---- the caller's side ---------------------------------------------------------------------------------------- */

int loader_next(loader *l, struct batch *batch, error *err) {
    int result = 0;
    pthread_mutex_lock(&l->lock);
    struct slot *slot = &l->slots[l->delivered % l->slot_count];
    while (slot->number != l->delivered || slot->left > 0) {
        double before = clock_seconds();
        pthread_cond_wait(&l->done, &l->lock);
        l->stats.caller_wait_s += clock_seconds() - before;
    }
    if (slot->failure.kind != ERROR_NONE) {
        *err = slot->failure;
        result = -1;
    } else {
        *batch = slot->batch;
        l->delivered++;
        l->stats.batches++;
        pthread_cond_broadcast(&l->room);
    }
    pthread_mutex_unlock(&l->lock);
    return result;
}

struct loader_place loader_locate(const loader *l, uint64_t g) {
    struct lookup *lookup = l->lookup;
    pthread_mutex_lock(&lookup->lock);
    struct loader_place place = mixture_locate(&l->mixture, &lookup->block, g);
    pthread_mutex_unlock(&lookup->lock);
    return place;
}

uint64_t loader_samples(const loader *l, size_t source) {
    ASSERT(source < l->mixture.count);
    return l->mixture.samples[source];
}

struct loader_stats loader_get_stats(loader *l) {
    pthread_mutex_lock(&l->lock);
    struct loader_stats stats = l->stats;
    pthread_mutex_unlock(&l->lock);
    return stats;
}
