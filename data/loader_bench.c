/* loader_bench.c: times loader_next, as loader_bench.h describes. Owns nothing beyond the call. */
#include "data/loader_bench.h"

#include "common/text.h"
#include <inttypes.h>

/* The largest id of `count` ids, or a value above INT32_MAX if one is negative. */
static uint32_t largest_id(const int32_t *ids, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) largest = (uint32_t)ids[i] > largest ? (uint32_t)ids[i] : largest;
    return largest;
}

/* As largest_id over targets, where -1 is masked and stands for nothing: id + 1 is compared, so that -1 becomes 0. */
static uint32_t largest_target(const int32_t *ids, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) largest = (uint32_t)ids[i] + 1 > largest ? (uint32_t)ids[i] + 1 : largest;
    return largest;
}

static int check_batch(const struct batch *batch, uint64_t first, uint64_t vocab, error *err) {
    int64_t count = batch->B * batch->T;
    if (batch->first != first) {
        return error_system(err, "the loader delivered global sample %" PRIu64 " in place of %" PRIu64, batch->first,
                            first);
    }
    if (largest_id(batch->tokens, count) >= vocab || largest_target(batch->targets, count) > vocab) {
        return error_system(err,
                            "the loader delivered an id outside the vocabulary of %" PRIu64
                            " in the batch of global sample %" PRIu64,
                            vocab, first);
    }
    return 0;
}

static int take_batches(loader *l, const struct loader_options *o, uint64_t vocab, uint64_t batches, double start,
                        struct loader_bench_result *result, error *err) {
    for (uint64_t n = 0; n < batches; n++) {
        struct batch batch;
        TRY(loader_next(l, &batch, err));
        if (n == 0) result->first_batch_s = clock_seconds() - start;
        TRY(check_batch(&batch, o->start + n * (uint64_t)o->ranks * (uint64_t)o->B, vocab, err));
        result->batches++;
        result->tokens += (uint64_t)(batch.B * batch.T);
        result->valid += (uint64_t)batch.valid;
    }
    result->seconds = clock_seconds() - start;
    result->tokens_per_s = (double)result->tokens / result->seconds;
    result->stats = loader_get_stats(l);
    return 0;
}

int loader_bench(const struct loader_source *sources, size_t count, const struct loader_options *options,
                 uint64_t batches, struct loader_bench_result *result, error *err) {
    ASSERT(batches >= 1);
    *result = (struct loader_bench_result){0};
    double start = clock_seconds();
    loader *l;
    TRY(loader_open(&l, sources, count, options, err));
    int failed = take_batches(l, options, row_source_get_info(sources[0].rows)->vocab, batches, start, result, err);
    loader_close(l);
    return failed;
}
