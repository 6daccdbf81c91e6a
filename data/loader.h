/* loader.h: batches as a pure function of (seed, global sample number).
 *
 * A source is a row source (data/row_source.h). Of a data set of n tokens, sample i holds inputs [i*T, i*T+T) and
 * targets one token later, for i < (n-1)/T (integer division), so neighbouring samples overlap by one token and at most
 * T-1 tokens at the end of the data are left unread. A generated task makes sample i from its seed. A source's samples
 * are visited in the order of a keyed permutation, a new one every epoch (shuffle = false: in order). Several sources
 * are interleaved by weight: in every block of LOADER_BLOCK global samples source s has round(weight share *
 * LOADER_BLOCK) places (largest remainder), in keyed order (data/mixture.h). So global sample g names its source, epoch
 * and sample without any state: the same for 1 rank or 64, exact on resume.
 *
 * Masked targets (shards with masks) become -1. With `reset`, `doc` numbers the documents of a row as kernels/ops.h
 * wants: 0 for the row's first document unless the row's first token starts one, then 1.
 *
 * Threads fill a ring of batches ahead of the caller; a batch is cut into runs of rows, so that several threads share
 * one. What a batch holds does not depend on their number. All memory is taken when the loader is opened.
 */
#ifndef RIVERRUN_LOADER_H
#define RIVERRUN_LOADER_H

#include "common/arena.h"
#include "common/error.h"
#include "data/row_source.h"
#include <stdint.h>

#define LOADER_BLOCK 4096

struct loader_source {
    const char *name; /* for messages and the log */
    const row_source *rows;
    double weight; /* > 0, relative */
};

struct loader_options {
    uint64_t seed;
    int64_t T; /* tokens in a row */
    bool shuffle, reset;
    int threads; /* prefetching threads, >= 1 */
    int ahead;   /* batches prepared ahead, >= 1; one more is with the caller */
    /* Rank r of n takes rows [r*B, (r+1)*B) of every micro-batch of n*B samples. */
    int64_t B;
    int rank, ranks;
    uint64_t start;                    /* global sample number of the first micro-batch's first row */
    const struct arena_memory *memory; /* where batches live: NULL = host memory; a device may lend pinned memory */
};

/* One micro-batch of this rank; valid until the next loader_next. Row b holds global sample first + rank*B + b. */
struct batch {
    int64_t B, T;
    int32_t *tokens;  /* (B, T) */
    int32_t *targets; /* (B, T), -1 = masked */
    int32_t *doc;     /* (B, T), or NULL without reset */
    int64_t valid;    /* targets >= 0 in this rank's rows */
    uint64_t first;   /* global sample number of rank 0's first row */
};

typedef struct loader loader;

/* Sources must share tokenizer and vocabulary; each must hold at least one sample, and have a weight whose share is
 * at least one place in a block. The row sources must outlive the loader; names are copied. count is 1 to
 * LIMIT_SOURCES. */
int loader_open(loader **l, const struct loader_source *sources, size_t count, const struct loader_options *options,
                error *err);

/* Ends and joins the threads, whatever they are at (each finishes at most the row in hand). NULL is fine. */
void loader_close(loader *l);

/* The next micro-batch: global samples advance by ranks*B. Blocks until it is there. A read error of a prefetching
 * thread comes out here, for the batch it belongs to (of several in one batch, the lowest row's), and again at every
 * later call: no batch comes after a failed one. One caller at a time. */
int loader_next(loader *l, struct batch *batch, error *err);

/* Where global sample g comes from: a pure function, no I/O. */
struct loader_place {
    size_t source;
    uint64_t epoch, sample; /* sample: index within the source, before cutting tokens */
};
struct loader_place loader_locate(const loader *l, uint64_t g);

uint64_t loader_samples(const loader *l, size_t source); /* samples in one epoch of a source */

/* Where the time went since loader_open. The three kinds of thread time are summed over the threads. */
struct loader_stats {
    uint64_t batches;     /* delivered */
    double caller_wait_s; /* in loader_next, waiting for a batch */
    double thread_read_s; /* in row_source_read: disk, checksums, decompression, or generating; copies */
    double thread_fill_s; /* the rest of making a row: finding it, counting its targets */
    double thread_idle_s; /* waiting for room in the ring */
};
struct loader_stats loader_get_stats(loader *l);

#endif
