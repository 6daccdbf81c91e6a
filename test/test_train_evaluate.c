/* test_train_evaluate.c: the loss on a data set against losses computed from the logits of plain forwards, token
 * by token: windows and carried state, documents, masks, ragged ends, any batch, ranks, limits; samples of a task. */
#include "common/rng.h"
#include "data/task.h"
#include "test/support_corpus.h"
#include "test/support_model.h"
#include "test/unit.h"
#include "train/comm_internal.h"
#include "train/evaluate.h"

#include <math.h>

/* Ids as the byte tokenizer has them, so that a token's bytes can be counted. */
static const char model_text[] = "[model]\nd_model = 16\nvocab_size = 257\npad_vocab_to = 1\npattern = m s\n"
                                 "[block.m]\nmixer = mamba2\nd_state = 6\nhead_dim = 8\nchunk = 8\n"
                                 "[block.s]\nmixer = mamba\nd_state = 4\n";
enum { TOKENS = 203, WINDOW_MAX = 300 };

struct fixture {
    char directory[256];
    struct corpus corpus;
    tokenizer *tokenizer;
    struct lm lm;       /* evaluates: up to 7 windows of up to 300 */
    double *row_losses; /* scratch */
};

static void make_corpus(struct fixture *f, bool masked) {
    int32_t ids[TOKENS];
    uint8_t mask[TOKENS], starts[TOKENS];
    rng_key key = {21, RNG_TEST, 1};
    for (int i = 0; i < TOKENS; i++) {
        ids[i] = (int32_t)rng_below(key, (uint64_t)(3 * i), 256);
        mask[i] = !masked || rng_below(key, (uint64_t)(3 * i + 1), 3) != 0;
        starts[i] = i == 0 || rng_below(key, (uint64_t)(3 * i + 2), 13) == 0;
        if (i > 0 && starts[i]) ids[i - 1] = BYTES_EOD;
    }
    ids[TOKENS - 1] = BYTES_EOD;
    struct corpus_plan plan = {.directory = f->directory,
                               .token_bytes = 2,
                               .vocab = BYTES_VOCAB,
                               .has_mask = masked,
                               .shard_sizes = {90, 40},
                               .frame_tokens = 32};
    corpus_write(&f->corpus, &plan, ids, mask, starts, TOKENS);
}

static void fixture_open(struct fixture *f, bool masked, enum precision precision) {
    error err = {0};
    unit_directory(f->directory);
    make_corpus(f, masked);
    assert_int_equal(tokenizer_open(&f->tokenizer, TOKENIZER_BYTES, &err), 0);
    lm_open(&f->lm, model_text, precision, MODEL_INFER, 7, WINDOW_MAX);
}

static void fixture_close(struct fixture *f) {
    lm_close(&f->lm);
    tokenizer_close(f->tokenizer);
    corpus_free(&f->corpus);
    unit_directory_remove(f->directory);
}

/* ---- the reference ---------------------------------------------------------------------------------------------- */

/* Add the losses of predicting tokens [from + 1, from + count] from inputs [from, from + count), by the logits of
 * one forward over inputs [begin, from + count), which starts from nothing. */
static void add_losses(struct fixture *f, int begin, int from, int count, bool reset, double sums[4]) {
    int T = from + count - begin;
    int32_t doc[WINDOW_MAX];
    for (int i = 0, number = 0; i < T; i++) doc[i] = number += f->corpus.starts[begin + i];
    model_set_batch(f->lm.m, f->corpus.ids + begin, NULL, reset ? doc : NULL, 1, T);
    model_forward(f->lm.m, NULL, NULL, false);
    double *logits = lm_read_logits(&f->lm, from - begin, count);
    for (int i = 0; i < count; i++) {
        const double *row = logits + (int64_t)i * 257;
        int target = f->corpus.ids[from + i + 1], best = 0;
        if (!f->corpus.mask[from + i + 1]) continue;
        double sum = 0;
        for (int v = 0; v < 257; v++) best = row[v] > row[best] ? v : best;
        for (int v = 0; v < 257; v++) sum += exp(row[v] - row[best]);
        sums[0] += log(sum) + row[best] - row[target];
        sums[1] += 1;
        sums[2] += best == target;
        sums[3] += target != BYTES_EOD;
    }
    free(logits);
}

static struct evaluation reference(struct fixture *f, int mode, int window, int inputs, bool reset) {
    double sums[4] = {0};
    for (int from = 0; from < inputs; from += window) {
        int count = inputs - from < window ? inputs - from : window;
        add_losses(f, mode == EVAL_CARRY ? 0 : from, from, count, reset, sums);
    }
    return (struct evaluation){
        .loss = sums[0] / sums[1],
        .perplexity = exp(sums[0] / sums[1]),
        .bits_per_byte = sums[0] / log(2) / sums[3],
        .accuracy = sums[2] / sums[1],
        .tokens = sums[1],
        .bytes = sums[3],
    };
}

static void check_near(double got, double want, double tolerance, const char *what) {
    if (!(fabs(got - want) <= tolerance * fabs(want))) fail_msg("%s is %.15g, not %.15g", what, got, want);
}

static void check_equal(const struct evaluation *got, const struct evaluation *want, double tolerance) {
    check_near(got->loss, want->loss, tolerance, "loss");
    check_near(got->perplexity, want->perplexity, 10 * tolerance, "perplexity");
    check_near(got->bits_per_byte, want->bits_per_byte, tolerance, "bits_per_byte");
    check_near(got->accuracy, want->accuracy, 1e-14, "accuracy");
    check_near(got->tokens, want->tokens, 0, "tokens");
    check_near(got->bytes, want->bytes, 0, "bytes");
}

/* ---- ranks, one after the other --------------------------------------------------------------------------------- */

/* A communication whose sum only keeps what this rank would have added. */
static void keep_sum(struct comm *c, double *values, int count) {
    double *kept = c->impl;
    for (int i = 0; i < count; i++) kept[i] += values[i];
}
static const struct comm_functions keeping = {.sum_f64 = keep_sum};

static struct evaluation run(struct fixture *f, struct eval_options o, bool reset, int ranks) {
    struct evaluation e;
    error err = {0};
    double sums[6] = {0};
    for (int r = 0; r < ranks; r++) {
        struct comm c = {.rank = r, .ranks = ranks, .functions = &keeping, .impl = sums};
        if (evaluate(&e, f->lm.m, f->corpus.rows, f->tokenizer, &o, reset, &c, &err) != 0) fail_msg("%s", err.text);
    }
    if (ranks > 1) { /* what the last rank would have made of the sums */
        e = (struct evaluation){.loss = sums[0] / sums[1],
                                .perplexity = exp(sums[0] / sums[1]),
                                .bits_per_byte = sums[0] / log(2) / sums[3],
                                .accuracy = sums[2] / sums[1],
                                .tokens = sums[1],
                                .bytes = sums[3]};
    }
    return e;
}

/* ---- tests ------------------------------------------------------------------------------------------------------ */

static void check_modes(bool masked, enum precision precision, double tolerance) {
    static const int windows[] = {1, 10, 64, 101, 202, 300};
    struct fixture f;
    fixture_open(&f, masked, precision);
    for (size_t w = 0; w < sizeof windows / sizeof *windows; w++) {
        for (int mode = EVAL_WINDOW; mode <= EVAL_CARRY; mode++) {
            for (int reset = 0; reset < 2; reset++) {
                struct evaluation want = reference(&f, mode, windows[w], TOKENS - 1, reset);
                struct eval_options o = {.mode = mode, .window = windows[w], .batch = mode == EVAL_WINDOW ? 3 : 1};
                struct evaluation got = run(&f, o, reset, 1);
                check_equal(&got, &want, tolerance);
            }
        }
    }
    fixture_close(&f);
}

static void test_modes(void **state) {
    (void)state;
    check_modes(false, PRECISION_F64, 1e-12);
    check_modes(true, PRECISION_F64, 1e-12);
    check_modes(true, PRECISION_F32, 1e-5);
}

static void test_batch_and_ranks(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, true, PRECISION_F64);
    for (int mode = EVAL_WINDOW; mode <= EVAL_CARRY; mode++) {
        struct evaluation want = run(&f, (struct eval_options){.mode = mode, .window = 10, .batch = 1}, true, 1);
        for (int batch = 1; batch <= 7; batch += 3) {
            for (int ranks = 1; ranks <= 5; ranks += 2) {
                struct evaluation got =
                    run(&f, (struct eval_options){.mode = mode, .window = 10, .batch = batch}, true, ranks);
                check_equal(&got, &want, 1e-13);
            }
        }
    }
    fixture_close(&f);
}

static void test_modes_differ(void **state) {
    (void)state;
    /* What the comparisons above could not tell apart if it were equal. */
    struct fixture f;
    fixture_open(&f, false, PRECISION_F64);
    struct eval_options window = {.mode = EVAL_WINDOW, .window = 10, .batch = 2},
                        carry = {.mode = EVAL_CARRY, .window = 10, .batch = 2};
    double losses[4] = {run(&f, window, false, 1).loss, run(&f, window, true, 1).loss, run(&f, carry, false, 1).loss,
                        run(&f, carry, true, 1).loss};
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < i; k++) assert_true(fabs(losses[i] - losses[k]) > 1e-6);
    }
    /* Carried, the pieces make no difference. */
    carry.window = 64;
    check_near(run(&f, carry, true, 1).loss, losses[3], 1e-12, "the carried loss");
    fixture_close(&f);
}

static void test_limit(void **state) {
    (void)state;
    struct fixture f;
    fixture_open(&f, false, PRECISION_F64);
    static const int limits[] = {1, 9, 10, 11, 201, 202, 100000};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        int inputs = limits[i] < TOKENS - 1 ? limits[i] : TOKENS - 1;
        struct evaluation want = reference(&f, EVAL_WINDOW, 10, inputs, true);
        struct evaluation got = run(&f, (struct eval_options){.window = 10, .batch = 2, .tokens = limits[i]}, true, 2);
        check_equal(&got, &want, 1e-12);
        assert_int_equal((int)got.tokens, inputs);
    }
    fixture_close(&f);
}

static void test_nothing_counts(void **state) {
    (void)state;
    struct fixture f = {0};
    error err = {0};
    unit_directory(f.directory);
    const int32_t ids[4] = {1, 2, 3, BYTES_EOD};
    const uint8_t mask[4] = {1, 0, 0, 0}, starts[4] = {1, 0, 0, 0};
    struct corpus_plan plan = {.directory = f.directory, .token_bytes = 2, .vocab = BYTES_VOCAB, .has_mask = true};
    corpus_write(&f.corpus, &plan, ids, mask, starts, 4);
    assert_int_equal(tokenizer_open(&f.tokenizer, TOKENIZER_BYTES, &err), 0);
    lm_open(&f.lm, model_text, PRECISION_F64, MODEL_INFER, 1, 8);
    struct evaluation e = run(&f, (struct eval_options){.window = 8, .batch = 1}, true, 1);
    assert_true(e.tokens == 0 && isnan(e.loss) && isnan(e.bits_per_byte));
    fixture_close(&f);
}

/* ---- tasks ------------------------------------------------------------------------------------------------------ */

enum { SAMPLES = 150 };
static const char task_text[] = "[task.t]\nkind = repetition\nlength = 7\nvocab = 4\nvalid_samples = 150\n";
static const char task_model[] = "[model]\nd_model = 16\nvocab_size = 4\npad_vocab_to = 1\ntie_embeddings = no\n"
                                 "pattern = m*2\n[block.m]\nmixer = mamba2\nd_state = 6\nhead_dim = 8\nchunk = 8\n";

/* Samples, solved samples, targets, right targets of the first `inputs` inputs, and samples whose first or whose last
 * target is right, from the logits of one row at a time. */
static void count_answers(struct lm *lm, const row_source *rows, int64_t inputs, double want[6]) {
    int32_t tokens[6], targets[6];
    struct row_reader reader = {.scratch = malloc(row_source_scratch(rows, 6))};
    error err = {0};
    memset(want, 0, 6 * sizeof *want);
    for (int64_t i = 0; i * 6 < inputs; i++) {
        int64_t count = inputs - i * 6 < 6 ? inputs - i * 6 : 6;
        assert_int_equal(row_source_read(rows, &reader, (uint64_t)i, 6, count, tokens, targets, NULL, &err), 0);
        model_set_batch(lm->m, tokens, NULL, NULL, 1, 6);
        model_forward(lm->m, NULL, NULL, false);
        double *logits = lm_read_logits(lm, 0, 6), all = 0, right = 0, first = 0, last = 0;
        for (int t = 0; t < 6; t++) {
            int best = 0;
            for (int v = 1; v < 4; v++) best = logits[4 * t + v] > logits[4 * t + best] ? v : best;
            if (targets[t] < 0) continue;
            last = targets[t] == best;
            if (all == 0) first = last;
            all += 1;
            right += last;
        }
        free(logits);
        want[0] += all > 0;
        want[1] += all > 0 && right == all;
        want[2] += all;
        want[3] += right;
        want[4] += first;
        want[5] += last;
    }
    free(reader.scratch);
}

static void check_task(enum precision precision) {
    struct task_options o;
    error err = {0};
    config *c;
    struct lm lm;
    row_source *rows;
    assert_int_equal(config_parse(&c, task_text, strlen(task_text), "test", &err), 0);
    assert_int_equal(task_options_bind(c, "task.t", &o, &err), 0);
    assert_int_equal(task_open(&rows, "task:t", &o, TASK_VALID, &err), 0);
    lm_open(&lm, task_model, precision, MODEL_INFER, 7, 6);
    lm_jitter(&lm, 3);
    assert_int_equal(evaluate_window(rows, 100), 6);
    static const int64_t limits[] = {0, 1, 100, 101, 102, 103}; /* inputs; some end before a sample's answer */
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        double want[6];
        count_answers(&lm, rows, limits[i] ? limits[i] : SAMPLES * 6, want);
        for (int64_t batch = 1; batch <= 7; batch += 3) {
            struct eval_options options = {.window = 6, .batch = batch, .tokens = limits[i]};
            struct evaluation e;
            double sums[6] = {0};
            struct comm one = {.ranks = 1, .functions = &keeping, .impl = sums};
            assert_int_equal(evaluate(&e, lm.m, rows, NULL, &options, true, &one, &err), 0);
            assert_true(e.sequences == want[0] && e.tokens == want[2] && e.bytes == 0 && isnan(e.bits_per_byte));
            if (want[0] == 0) continue;
            check_near(e.sequence_accuracy, want[1] / want[0], 1e-14, "sequence_accuracy");
            check_near(e.accuracy, want[3] / want[2], 1e-14, "accuracy");
        }
        /* Enough right and wrong ones that the counts could not agree by chance. */
        if (limits[i] != 0) continue;
        assert_true(want[0] == SAMPLES && want[1] > 10 && want[4] > want[1] + 10 && want[5] > want[1] + 10);
    }
    lm_close(&lm);
    row_source_close(rows);
    config_free(c);
}

static void test_tasks(void **state) {
    (void)state;
    check_task(PRECISION_F64);
    check_task(PRECISION_F32);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_modes), cmocka_unit_test(test_batch_and_ranks), cmocka_unit_test(test_modes_differ),
        cmocka_unit_test(test_limit), cmocka_unit_test(test_nothing_counts), cmocka_unit_test(test_tasks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
