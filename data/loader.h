/* loader.h: batches as a pure function of (seed, global sample number).
 *
 * A source is a data set cut into samples: sample i of a source of n tokens holds inputs [i*T, i*T+T) and targets one
 * token later, for i < (n-1)/T (integer division). A source's samples are visited in the order of a keyed permutation,
 * a new one every epoch (shuffle = false: in order). Several sources are interleaved by weight: in every block of
 * LOADER_BLOCK global samples source s has round(weight share * LOADER_BLOCK) places (largest remainder), in keyed order.
 * So global sample g names its source, epoch and sample without any state: the same for 1 rank or 64, exact on resume.
 *
 * Masked targets (shards with masks) become -1. With `reset`, `doc` numbers the documents of a row as kernels/ops.h
 * wants: 0 for the row's first document unless the row's first token starts one, then 1.
 */
#ifndef RIVERRUN_LOADER_H
#define RIVERRUN_LOADER_H

#include "common/config.h"
#include "common/error.h"
#include "data/shard.h"
#include <stdint.h>

#define LOADER_BLOCK 4096

struct loader_source {
    const char *name;   /* for messages and the log */
    const dataset *data;
    double weight;      /* > 0, relative */
};

struct loader_options {
    uint64_t seed;
    int64_t T;           /* tokens in a row */
    bool shuffle, reset;
    int threads;         /* prefetching threads, >= 1 */
    int ahead;           /* batches prepared ahead, >= 1 */
    /* Rank r of n takes rows [r*B, (r+1)*B) of every micro-batch of n*B samples. */
    int64_t B;
    int rank, ranks;
    uint64_t start;      /* global sample number of the first micro-batch's first row */
};

/* One micro-batch of this rank; valid until the next loader_next. Row b holds global sample first + rank*B + b. */
struct batch {
    int64_t B, T;
    int32_t *tokens;   /* (B, T) */
    int32_t *targets;  /* (B, T), -1 = masked */
    int32_t *doc;      /* (B, T), or NULL without reset */
    int64_t valid;     /* targets >= 0 in this rank's rows */
    uint64_t first;    /* global sample number of rank 0's first row */
};

typedef struct loader loader;

/* Sources must share tokenizer and vocabulary; each must hold at least one sample. */
int loader_open(loader **l, const struct loader_source *sources, size_t count, const struct loader_options *options, error *err);
void loader_close(loader *l);

/* The next micro-batch: global samples advance by ranks*B. Blocks until it is there. A read error of a prefetching
 * thread comes out here, for the batch it belongs to. */
int loader_next(loader *l, struct batch *batch, error *err);

/* Where global sample g comes from: a pure function, no I/O. */
struct loader_place {
    size_t source;
    uint64_t epoch, sample; /* sample: index within the source, before cutting tokens */
};
struct loader_place loader_locate(const loader *l, uint64_t g);

uint64_t loader_samples(const loader *l, size_t source); /* samples in one epoch of a source */

#endif
