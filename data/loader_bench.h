/* loader_bench.h: how fast the loader delivers, and where its time goes. Called by `riverrun bench loader`. */
#ifndef RIVERRUN_LOADER_BENCH_H
#define RIVERRUN_LOADER_BENCH_H

#include "data/loader.h"

struct loader_bench_result {
    uint64_t batches, tokens; /* delivered; tokens are input positions of this rank */
    uint64_t valid;           /* targets that count */
    double seconds;           /* from opening the loader to the last batch, so no batch is had for nothing */
    double tokens_per_s;
    double first_batch_s; /* from opening the loader to the first batch */
    struct loader_stats stats;
};

/* Open a loader with these options, take `batches` >= 1 batches as fast as they come, close it. Every batch is looked
 * at: its number, and that each token and each unmasked target is an id of the vocabulary. */
int loader_bench(const struct loader_source *sources, size_t count, const struct loader_options *options,
                 uint64_t batches, struct loader_bench_result *result, error *err);

#endif
