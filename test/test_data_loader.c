/* test_data_loader.c: batches against what the data sets hold: any ranks, threads and start; documents, masks,
 * shards; errors where they belong; closing at any moment. */
#include "common/rng.h"
#include "data/loader.h"
#include "data/loader_bench.h"
#include "data/mixture.h"
#include "test/support_corpus.h"
#include "test/unit.h"

#include <dirent.h>
#include <inttypes.h>
#include <signal.h>
#include <unistd.h>

#define VOCAB 100000

struct world { /* two sources: one long, in many shards, with masks; one short and plain */
    char directory[256];
    struct corpus corpora[2];
    struct loader_source sources[2];
};

static void path_of(char *out, size_t size, const struct world *world, const char *name) {
    snprintf(out, size, "%s/%s", world->directory, name);
}

static int set_up(void **state) {
    struct world *world = calloc(1, sizeof *world);
    if (!world) return -1;
    unit_directory(world->directory);
    char path[512];
    path_of(path, sizeof path, world, "long");
    corpus_make(&world->corpora[0], &(struct corpus_plan){.directory = path,
                                                          .tokens = 5003,
                                                          .vocab = VOCAB,
                                                          .shard_sizes = {700, 1, 33, 1001},
                                                          .has_mask = true,
                                                          .document_tokens = 20,
                                                          .key = 1});
    path_of(path, sizeof path, world, "short");
    corpus_make(
        &world->corpora[1],
        &(struct corpus_plan){
            .directory = path, .tokens = 411, .first_id = 50000, .vocab = VOCAB, .document_tokens = 5, .key = 2});
    world->sources[0] = (struct loader_source){.name = "long", .rows = world->corpora[0].rows, .weight = 3};
    world->sources[1] = (struct loader_source){.name = "short", .rows = world->corpora[1].rows, .weight = 1};
    *state = world;
    return 0;
}

static int tear_down(void **state) {
    struct world *world = *state;
    corpus_free(&world->corpora[0]);
    corpus_free(&world->corpora[1]);
    unit_directory_remove(world->directory);
    free(world);
    return 0;
}

static struct loader_options usual_options(void) {
    return (struct loader_options){
        .seed = 77, .T = 7, .shuffle = true, .reset = true, .threads = 2, .ahead = 3, .B = 6, .ranks = 1};
}

static loader *open_good(const struct loader_source *sources, size_t count, const struct loader_options *o) {
    loader *l = NULL;
    error err = {.kind = ERROR_NONE};
    if (loader_open(&l, sources, count, o, &err) != 0) fail_msg("loader_open: %s", err.text);
    return l;
}

static void next_good(loader *l, struct batch *batch) {
    error err = {.kind = ERROR_NONE};
    if (loader_next(l, batch, &err) != 0) fail_msg("loader_next: %s", err.text);
}

/* ---- what a batch must hold, from the arrays and the mixture alone -------------------------------------------- */

struct expectation {
    const struct loader_options *options;
    const struct corpus *corpora;
    struct mixture mixture;
    struct mixture_block block;
};

static void expect(struct expectation *e, const struct corpus *corpora, const struct loader_source *sources,
                   size_t count, const struct loader_options *o) {
    uint64_t samples[LIMIT_SOURCES];
    error err;
    for (size_t s = 0; s < count; s++) samples[s] = (corpora[s].tokens - 1) / (uint64_t)o->T;
    *e = (struct expectation){.options = o, .corpora = corpora};
    assert_int_equal(mixture_make(&e->mixture, sources, samples, count, o->seed, o->shuffle, &err), 0);
    e->block.number = MIXTURE_NO_BLOCK;
}

/* Row b of a batch against global sample g; returns its valid targets. */
static int64_t check_row(struct expectation *e, const struct batch *batch, int64_t b, uint64_t g) {
    struct loader_place place = mixture_locate(&e->mixture, &e->block, g);
    const struct corpus *c = &e->corpora[place.source];
    int64_t T = e->options->T, valid = 0;
    uint64_t from = place.sample * (uint64_t)T;
    int32_t doc = 0;
    for (int64_t t = 0; t < T; t++) {
        bool counts = c->mask[from + (uint64_t)t + 1];
        assert_int_equal(batch->tokens[b * T + t], c->ids[from + (uint64_t)t]);
        assert_int_equal(batch->targets[b * T + t], counts ? c->ids[from + (uint64_t)t + 1] : -1);
        doc += c->starts[from + (uint64_t)t];
        if (e->options->reset) assert_int_equal(batch->doc[b * T + t], doc);
        valid += counts;
    }
    return valid;
}

/* Batch n of the loader that these options open. */
static void check_batch(struct expectation *e, const struct batch *batch, uint64_t n) {
    const struct loader_options *o = e->options;
    int64_t valid = 0;
    assert_int_equal(batch->B, o->B);
    assert_int_equal(batch->T, o->T);
    assert_int_equal(batch->first, o->start + n * (uint64_t)(o->ranks * o->B));
    assert_true((batch->doc != NULL) == o->reset);
    for (int64_t b = 0; b < o->B; b++) valid += check_row(e, batch, b, batch->first + (uint64_t)(o->rank * o->B + b));
    assert_int_equal(batch->valid, valid);
}

/* Open a loader, check its first `batches` batches, close it. */
static void check_loader(const struct corpus *corpora, const struct loader_source *sources, size_t count,
                         const struct loader_options *o, uint64_t batches) {
    struct expectation e;
    expect(&e, corpora, sources, count, o);
    loader *l = open_good(sources, count, o);
    for (uint64_t n = 0; n < batches; n++) {
        struct batch batch;
        next_good(l, &batch);
        check_batch(&e, &batch, n);
    }
    assert_int_equal(loader_get_stats(l).batches, batches);
    loader_close(l);
}

/* ---- purity --------------------------------------------------------------------------------------------------- */

static void test_any_number_of_ranks(void **state) {
    struct world *world = *state;
    for (int ranks = 1; ranks <= 6; ranks++) {
        if (6 % ranks) continue;
        for (int rank = 0; rank < ranks; rank++) {
            struct loader_options o = usual_options();
            o.ranks = ranks;
            o.rank = rank;
            o.B = 6 / ranks;
            check_loader(world->corpora, world->sources, 2, &o, 150);
        }
    }
}

/* The same, said without the mixture: the rows of several ranks, put together, are the rows of one. */
static void test_ranks_share_one_stream(void **state) {
    struct world *world = *state;
    struct loader_options whole = usual_options();
    for (int ranks = 2; ranks <= 3; ranks++) {
        loader *one = open_good(world->sources, 2, &whole), *parts[3];
        for (int rank = 0; rank < ranks; rank++) {
            struct loader_options o = whole;
            o.ranks = ranks;
            o.rank = rank;
            o.B = whole.B / ranks;
            parts[rank] = open_good(world->sources, 2, &o);
        }
        for (int n = 0; n < 30; n++) {
            struct batch all, part;
            int64_t valid = 0;
            next_good(one, &all);
            for (int rank = 0; rank < ranks; rank++) {
                next_good(parts[rank], &part);
                size_t offset = (size_t)(rank * part.B * part.T), size = (size_t)(part.B * part.T) * sizeof(int32_t);
                assert_int_equal(part.first, all.first);
                assert_memory_equal(part.tokens, all.tokens + offset, size);
                assert_memory_equal(part.targets, all.targets + offset, size);
                assert_memory_equal(part.doc, all.doc + offset, size);
                valid += part.valid;
            }
            assert_int_equal(valid, all.valid);
        }
        for (int rank = 0; rank < ranks; rank++) loader_close(parts[rank]);
        loader_close(one);
    }
}

static void test_resume_from_anywhere(void **state) {
    struct world *world = *state;
    for (uint64_t batch = 0; batch < 120; batch++) {
        struct loader_options o = usual_options();
        o.ranks = 2;
        o.rank = (int)(batch % 2);
        o.B = 3;
        o.start = batch * 6;
        check_loader(world->corpora, world->sources, 2, &o, 3);
    }
    static const uint64_t odd[] = {1, 5, LOADER_BLOCK - 2, LOADER_BLOCK, 1000 * LOADER_BLOCK - 7, UINT64_C(1) << 40};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        struct loader_options o = usual_options();
        o.start = odd[i];
        check_loader(world->corpora, world->sources, 2, &o, 5);
    }
}

static void test_any_number_of_threads(void **state) {
    struct world *world = *state;
    static const int threads[] = {1, 2, 4, 9}, aheads[] = {1, 2, 7};
    static const int64_t rows[] = {1, 5, 40}, lengths[] = {1, 7, 64, 300};
    for (size_t i = 0; i < 4 * 3 * 3 * 4; i++) {
        struct loader_options o = usual_options();
        o.threads = threads[i % 4];
        o.ahead = aheads[i / 4 % 3];
        o.B = rows[i / 12 % 3];
        o.T = lengths[i / 36];
        o.reset = i % 5 != 0;
        o.shuffle = i % 7 != 0;
        check_loader(world->corpora, world->sources, 2, &o, 12);
    }
}

/* Runs of rows so long that each thread works in another block of the mixture. */
static void test_threads_in_different_blocks(void **state) {
    struct world *world = *state;
    struct loader_options o = usual_options();
    o.T = 1;
    o.B = 5 * LOADER_BLOCK;
    o.threads = 5;
    check_loader(world->corpora, world->sources, 2, &o, 3);
}

/* Epochs as they come out of the loader, told by the tokens: every sample once, in a new order each time. */
static void test_epochs_through_the_loader(void **state) {
    struct world *world = *state;
    struct loader_options o = usual_options();
    o.T = 50;
    o.B = 8;
    o.threads = 4;
    uint64_t samples = 410 / 50; /* 8 */
    loader *l = open_good(&world->sources[1], 1, &o);
    assert_int_equal(loader_samples(l, 0), samples);
    uint32_t orders[10] = {0};
    for (int epoch = 0; epoch < 10; epoch++) {
        struct batch batch;
        unsigned seen = 0;
        next_good(l, &batch); /* exactly one epoch */
        for (int64_t b = 0; b < 8; b++) {
            unsigned sample = (unsigned)(batch.tokens[b * 50] - 50000) / 50;
            struct loader_place place = loader_locate(l, batch.first + (uint64_t)b);
            assert_true(place.source == 0 && place.epoch == (uint64_t)epoch && place.sample == sample);
            seen |= 1u << sample;
            orders[epoch] = orders[epoch] * 8 + sample;
        }
        assert_int_equal(seen, 0xFF);
        assert_true(epoch == 0 || orders[epoch] != orders[epoch - 1]);
    }
    loader_close(l);
}

/* ---- rows ----------------------------------------------------------------------------------------------------- */

/* A small case written out by hand, with masks, empty documents and a row that starts with a document. */
static void test_documents_and_masks_by_hand(void **state) {
    struct world *world = *state;
    static const int32_t ids[13] = {10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22};
    static const uint8_t mask[13] = {1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0};
    static const uint8_t starts[13] = {1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1};
    static const int32_t doc[12] = {1, 1, 2, 3, 0, 0, 1, 1, 1, 2, 2, 2};
    static const int32_t targets[12] = {11, 12, -1, 14, -1, -1, 17, 18, 19, 20, 21, -1};
    struct corpus c;
    char path[512];
    path_of(path, sizeof path, world, "hand");
    struct corpus_plan plan = {
        .directory = path, .vocab = 30, .token_bytes = 1, .frame_tokens = 5, .shard_sizes = {3, 7}, .has_mask = true};
    corpus_write(&c, &plan, ids, mask, starts, 13);
    struct loader_source source = {.name = "hand", .rows = c.rows, .weight = 1};
    struct loader_options o = usual_options();
    o.T = 4;
    o.B = 3;
    o.shuffle = false;
    loader *l = open_good(&source, 1, &o);
    assert_int_equal(loader_samples(l, 0), 3);
    for (int epoch = 0; epoch < 3; epoch++) {
        struct batch batch;
        next_good(l, &batch);
        assert_memory_equal(batch.tokens, ids, sizeof(int32_t[12]));
        assert_memory_equal(batch.targets, targets, sizeof targets);
        assert_memory_equal(batch.doc, doc, sizeof doc);
        assert_int_equal(batch.valid, 8);
    }
    loader_close(l);
    corpus_free(&c);
}

static void test_single_sample(void **state) {
    struct world *world = *state;
    struct loader_options o = usual_options();
    o.T = 410;
    o.B = 3;
    check_loader(&world->corpora[1], &world->sources[1], 1, &o, 5);
    loader *l = open_good(&world->sources[1], 1, &o);
    assert_int_equal(loader_samples(l, 0), 1);
    assert_int_equal(loader_locate(l, 5).epoch, 5);
    loader_close(l);
}

/* The batch in the caller's hands stays as it is while the threads fill all the others. */
static void test_batch_stays_until_next(void **state) {
    struct world *world = *state;
    for (int ahead = 1; ahead <= 3; ahead++) {
        struct loader_options o = usual_options();
        o.ahead = ahead;
        struct expectation e;
        expect(&e, world->corpora, world->sources, 2, &o);
        loader *l = open_good(world->sources, 2, &o);
        for (uint64_t n = 0; n < 8; n++) {
            struct batch batch;
            next_good(l, &batch);
            usleep(3000);
            check_batch(&e, &batch, n);
        }
        loader_close(l);
    }
}

/* ---- memory, signals, the bench ------------------------------------------------------------------------------- */

struct lender {
    char *block;
    size_t size;
    int given, returned;
    bool refuse;
};

static void *lend(void *self, size_t size) {
    struct lender *lender = self;
    if (lender->refuse) return NULL;
    lender->given++;
    lender->size = size;
    lender->block = aligned_alloc(ARENA_ALIGN, size);
    memset(lender->block, 0, size);
    return lender->block;
}

static void take_back(void *self, void *block) {
    struct lender *lender = self;
    lender->returned++;
    free(block);
}

static void test_memory_of_a_device(void **state) {
    struct world *world = *state;
    struct lender lender = {.refuse = true};
    struct arena_memory memory = {lend, take_back, &lender};
    struct loader_options o = usual_options();
    o.memory = &memory;
    loader *l;
    error err;
    assert_int_equal(loader_open(&l, world->sources, 2, &o, &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
    lender.refuse = false;
    l = open_good(world->sources, 2, &o);
    struct batch batch;
    next_good(l, &batch);
    const int32_t *parts[] = {batch.tokens, batch.targets, batch.doc};
    for (int i = 0; i < 3; i++) {
        assert_true((const char *)parts[i] >= lender.block);
        assert_true((const char *)(parts[i] + o.B * o.T) <= lender.block + lender.size);
    }
    loader_close(l);
    assert_true(lender.given == 1 && lender.returned == 1);
}

/* Threads of this process that block `signal`. */
static int threads_that_block(int signal) {
    DIR *tasks = opendir("/proc/self/task");
    assert_non_null(tasks);
    int count = 0;
    for (struct dirent *task; (task = readdir(tasks));) {
        char path[sizeof task->d_name + 32], line[256];
        snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
        FILE *status = task->d_name[0] == '.' ? NULL : fopen(path, "r");
        uint64_t blocked = 0;
        while (status && fgets(line, sizeof line, status)) sscanf(line, "SigBlk: %" SCNx64, &blocked);
        if (status) fclose(status);
        count += blocked >> (signal - 1) & 1;
    }
    closedir(tasks);
    return count;
}

static void test_signals_are_left_to_the_main_thread(void **state) {
    struct world *world = *state;
    int before = threads_that_block(SIGTERM);
    struct loader_options o = usual_options();
    o.threads = 3;
    loader *l = open_good(world->sources, 2, &o);
    assert_int_equal(threads_that_block(SIGTERM), before + 3);
    loader_close(l);
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    assert_false(sigismember(&mask, SIGTERM));
}

static void test_bench(void **state) {
    struct world *world = *state;
    struct loader_bench_result r;
    struct loader_options o = usual_options();
    error err = {.kind = ERROR_NONE};
    o.start = 100;
    if (loader_bench(world->sources, 2, &o, 25, &r, &err) != 0) fail_msg("%s", err.text);
    assert_true(r.batches == 25 && r.tokens == 25 * 6 * 7);
    int64_t valid = 0;
    loader *l = open_good(world->sources, 2, &o);
    for (int n = 0; n < 25; n++) {
        struct batch batch;
        next_good(l, &batch);
        valid += batch.valid;
    }
    loader_close(l);
    assert_int_equal(r.valid, valid);
    assert_true(r.seconds > 0 && r.first_batch_s > 0 && r.first_batch_s <= r.seconds && r.stats.batches == 25);
    assert_true(r.stats.thread_read_s > 0 && r.stats.thread_fill_s > 0);
}

/* ---- refusals ------------------------------------------------------------------------------------------------- */

static void check_refused(const struct loader_source *sources, size_t count, const struct loader_options *o,
                          const char *words) {
    loader *l;
    error err = {.kind = ERROR_NONE};
    assert_int_equal(loader_open(&l, sources, count, o, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    if (!strstr(err.text, words)) fail_msg("'%s' does not say '%s'", err.text, words);
}

static void test_refusals(void **state) {
    struct world *world = *state;
    struct corpus tiny, stranger, wider;
    char path[512];
    path_of(path, sizeof path, world, "tiny");
    corpus_make(&tiny, &(struct corpus_plan){.directory = path, .tokens = 1, .vocab = VOCAB});
    path_of(path, sizeof path, world, "stranger");
    corpus_make(&stranger,
                &(struct corpus_plan){.directory = path, .tokens = 100, .vocab = VOCAB, .tokenizer_identity = 9});
    path_of(path, sizeof path, world, "wider");
    corpus_make(&wider, &(struct corpus_plan){.directory = path, .tokens = 100, .vocab = VOCAB + 1});
    struct loader_source sources[2] = {world->sources[0], {.name = "other", .weight = 1}};
    struct loader_options o = usual_options();

    sources[1].rows = tiny.rows;
    check_refused(sources, 2, &o, "source 'other' holds 1 tokens");
    sources[1].rows = stranger.rows;
    check_refused(sources, 2, &o, "source 'long' and source 'other' were made with different tokenizers");
    sources[1].rows = wider.rows;
    check_refused(sources, 2, &o, "vocabularies of 100000 and 100001");
    sources[1] = world->sources[1];
    sources[1].weight = 1e-9;
    check_refused(sources, 2, &o, "source 'short' has weight 1e-09, too small");
    o.T = 411;
    check_refused(world->sources, 2, &o, "(data.seq_len) 411 is too long for source 'short', which holds 411 tokens");
    check_refused(world->sources, 2, &o, "at most 410 is possible");
    o.T = INT64_MAX;
    check_refused(world->sources, 2, &o, "too long for source 'long'");
    o.T = 7;
    o.B = INT64_MAX / 8;
    check_refused(world->sources, 2, &o, "don't fit in memory");
    loader_close(NULL);
    corpus_free(&tiny);
    corpus_free(&stranger);
    corpus_free(&wider);
}

/* ---- errors in the middle, closing at any moment -------------------------------------------------------------- */

#define DAMAGED_TOKENS 6000

struct damage { /* a data set with a frame that can't be read, and the samples it takes with it */
    struct corpus corpus;
    struct loader_source source;
    bool bad[DAMAGED_TOKENS];
    uint64_t samples, first_bad;
    int64_t T;
};

/* Flip bits in the middle of the only shard: a frame, as the tables are small beside the random tokens. */
static void flip_middle(const char *path) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    fseek(file, 0, SEEK_END);
    long middle = ftell(file) / 2;
    fseek(file, middle, SEEK_SET);
    int byte = fgetc(file);
    fseek(file, middle, SEEK_SET);
    fputc(byte ^ 0x55, file);
    fclose(file);
}

static void make_damage(struct damage *d, struct world *world, int64_t T) {
    static int32_t ids[DAMAGED_TOKENS];
    static uint8_t mask[DAMAGED_TOKENS], starts[DAMAGED_TOKENS];
    rng_key key = {.seed = 3, .purpose = RNG_TEST};
    for (uint64_t p = 0; p < DAMAGED_TOKENS; p++) {
        ids[p] = (int32_t)rng_below(key, p, 65536);
        mask[p] = 1;
        starts[p] = p == 0;
    }
    char path[512];
    path_of(path, sizeof path, world, "damaged");
    struct corpus_plan plan = {.directory = path, .vocab = VOCAB, .frame_tokens = 128};
    memset(d, 0, sizeof *d);
    corpus_write(&d->corpus, &plan, ids, mask, starts, DAMAGED_TOKENS);
    dataset_close(d->corpus.data);
    row_source_close(d->corpus.rows);
    d->corpus.data = NULL;
    d->corpus.rows = NULL;
    error err = {.kind = ERROR_NONE};
    char file[600];
    snprintf(file, sizeof file, "%s/part-00000" SHARD_SUFFIX, path);
    flip_middle(file);
    if (dataset_open(&d->corpus.data, path, &err) != 0) fail_msg("only a frame should be damaged: %s", err.text);
    assert_int_equal(row_source_open_shards(&d->corpus.rows, d->corpus.path, &err), 0);

    d->T = T;
    d->samples = (DAMAGED_TOKENS - 1) / (uint64_t)T;
    d->first_bad = d->samples;
    d->source = (struct loader_source){.name = "damaged", .rows = d->corpus.rows, .weight = 1};
    shard_cursor *cursor;
    assert_int_equal(shard_cursor_open(&cursor, &err), 0);
    for (uint64_t i = d->samples; i-- > 0;) {
        int32_t row[256];
        d->bad[i] = dataset_read(d->corpus.data, cursor, i * (uint64_t)T, (size_t)T + 1, row, NULL, &err) != 0;
        if (d->bad[i]) d->first_bad = i;
    }
    shard_cursor_close(cursor);
    assert_in_range(d->first_bad, d->samples / 4, 3 * d->samples / 4);
}

static void test_error_at_its_batch(void **state) {
    struct world *world = *state;
    static const int threads[] = {1, 2, 4, 8};
    static struct damage d;
    make_damage(&d, world, 20);
    char sample[64];
    snprintf(sample, sizeof sample, "source 'damaged', sample %" PRIu64 " (global", d.first_bad);
    for (size_t i = 0; i < 4 * 3; i++) {
        struct loader_options o = usual_options();
        o.T = 20;
        o.threads = threads[i % 4];
        o.ahead = i / 4 == 0 ? 1 : 6;
        o.B = i / 4 == 2 ? 50 : 3;
        o.shuffle = false;
        struct expectation e;
        expect(&e, &d.corpus, &d.source, 1, &o);
        loader *l = open_good(&d.source, 1, &o);
        struct batch batch;
        error err;
        for (uint64_t n = 0; n < d.first_bad / (uint64_t)o.B; n++) {
            next_good(l, &batch);
            check_batch(&e, &batch, n);
        }
        for (int again = 0; again < 3; again++) {
            err = (error){.kind = ERROR_NONE};
            assert_int_equal(loader_next(l, &batch, &err), -1);
            assert_true(err.kind != ERROR_NONE);
            if (!strstr(err.text, sample)) fail_msg("'%s' does not name '%s'", err.text, sample);
            assert_non_null(strstr(err.text, "part-00000"));
        }
        loader_close(l);
    }
    corpus_free(&d.corpus);
}

/* With shuffling too, the first failing batch is the first that holds a bad sample. */
static void test_error_when_shuffled(void **state) {
    struct world *world = *state;
    static struct damage d;
    make_damage(&d, world, 20);
    for (uint64_t seed = 0; seed < 20; seed++) {
        struct loader_options o = usual_options();
        o.T = 20;
        o.seed = seed;
        o.threads = 3;
        loader *l = open_good(&d.source, 1, &o);
        uint64_t bad = 0;
        while (!d.bad[loader_locate(l, bad).sample]) bad++;
        char sample[64];
        snprintf(sample, sizeof sample, "(global sample %" PRIu64 ")", bad);
        struct batch batch;
        error err = {.kind = ERROR_NONE};
        uint64_t n = 0;
        while (loader_next(l, &batch, &err) == 0) n++;
        assert_int_equal(n, bad / (uint64_t)o.B);
        assert_non_null(strstr(err.text, sample));
        loader_close(l);
    }
    corpus_free(&d.corpus);
}

static void test_closing_at_any_moment(void **state) {
    struct world *world = *state;
    static struct damage d;
    make_damage(&d, world, 20);
    for (int round = 0; round < 200; round++) {
        struct loader_options o = usual_options();
        o.T = 20;
        o.B = 1 + round % 7;
        o.threads = 1 + round % 4;
        o.ahead = 1 + round % 5;
        bool damaged = round % 3 == 0;
        loader *l = open_good(damaged ? &d.source : world->sources, damaged ? 1 : 2, &o);
        struct batch batch;
        error err;
        for (int n = 0; n < round % 11; n++) {
            if (loader_next(l, &batch, &err) != 0) break;
        }
        if (round % 2) usleep((unsigned)(round % 13) * 50);
        loader_close(l);
    }
    corpus_free(&d.corpus);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_number_of_ranks),
        cmocka_unit_test(test_ranks_share_one_stream),
        cmocka_unit_test(test_resume_from_anywhere),
        cmocka_unit_test(test_any_number_of_threads),
        cmocka_unit_test(test_threads_in_different_blocks),
        cmocka_unit_test(test_epochs_through_the_loader),
        cmocka_unit_test(test_documents_and_masks_by_hand),
        cmocka_unit_test(test_single_sample),
        cmocka_unit_test(test_batch_stays_until_next),
        cmocka_unit_test(test_memory_of_a_device),
        cmocka_unit_test(test_signals_are_left_to_the_main_thread),
        cmocka_unit_test(test_bench),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_error_at_its_batch),
        cmocka_unit_test(test_error_when_shuffled),
        cmocka_unit_test(test_closing_at_any_moment),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
