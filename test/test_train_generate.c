/* test_train_generate.c: drawing from logits, and generation against the parallel forward. */
#include "common/rng.h"
#include "test/support_model.h"
#include "test/unit.h"
#include "train/generate.h"

#include <math.h>

enum { VOCAB = 6 };

static const struct generate_options greedy = {.tokens = 1, .temperature = 0, .top_p = 1, .piece = 8, .eod = -1};

static int32_t pick(const double *logits, int64_t count, struct generate_options options, uint64_t position) {
    /* Exactly as many as are needed: a sanitizer sees one too many. */
    struct generate_candidate *scratch = malloc((size_t)count * sizeof *scratch);
    int32_t token = generate_pick(logits, count, &options, position, scratch);
    free(scratch);
    return token;
}

static void test_greedy(void **state) {
    (void)state;
    const double logits[VOCAB] = {-1, 3, 2, 3, -INFINITY, 0};
    assert_int_equal(pick(logits, VOCAB, greedy, 0), 1); /* the lowest of equals */
    assert_int_equal(pick(logits, 1, greedy, 0), 0);
    assert_int_equal(pick(logits + 2, 4, greedy, 7), 1);
}

static void test_no_numbers(void **state) {
    (void)state;
    const double nan_last[3] = {1, 2, NAN}, infinite[2] = {INFINITY, 0}, nothing[2] = {-INFINITY, -INFINITY},
                 nan_first[2] = {NAN, 1};
    struct generate_options warm = greedy;
    warm.temperature = 1;
    for (int i = 0; i < 2; i++) {
        struct generate_options options = i ? warm : greedy;
        assert_int_equal(pick(nan_last, 3, options, 0), -1);
        assert_int_equal(pick(nan_first, 2, options, 0), -1);
        assert_int_equal(pick(infinite, 2, options, 0), -1);
        assert_int_equal(pick(nothing, 2, options, 0), -1);
    }
}

/* Draw often; the frequencies must be the probabilities, within 5 standard deviations. */
static void check_frequencies(const double *logits, struct generate_options options, const double *probability) {
    enum { DRAWS = 40000 };
    int seen[VOCAB] = {0};
    for (int i = 0; i < DRAWS; i++) seen[pick(logits, VOCAB, options, (uint64_t)i)]++;
    for (int i = 0; i < VOCAB; i++) {
        double mean = DRAWS * probability[i], deviation = sqrt(mean * (1 - probability[i]));
        if (fabs(seen[i] - mean) > 5 * deviation + 1e-9) fail_msg("token %d: %d draws, expected %g", i, seen[i], mean);
    }
}

static void test_frequencies(void **state) {
    (void)state;
    const double p[VOCAB] = {0.1, 0.4, 0.05, 0.25, 0, 0.2};
    double logits[VOCAB];
    for (int i = 0; i < VOCAB; i++) logits[i] = p[i] > 0 ? log(p[i]) + 3 : -INFINITY;
    struct generate_options options = {.temperature = 1, .top_p = 1, .seed = 11};
    check_frequencies(logits, options, p);

    options.top_k = 2; /* 0.4 and 0.25 remain */
    check_frequencies(logits, options, (const double[VOCAB]){0, 0.4 / 0.65, 0, 0.25 / 0.65, 0, 0});
    options.top_k = 100;
    check_frequencies(logits, options, p);

    options.top_k = 0;
    options.top_p = 0.7; /* 0.4 + 0.25 do not reach it, with 0.2 they do */
    check_frequencies(logits, options, (const double[VOCAB]){0, 0.4 / 0.85, 0, 0.25 / 0.85, 0, 0.2 / 0.85});
    options.top_k = 3; /* of the 0.85 left, 0.65 is a share of 0.76 */
    check_frequencies(logits, options, (const double[VOCAB]){0, 0.4 / 0.65, 0, 0.25 / 0.65, 0, 0});

    options = (struct generate_options){.temperature = 0.5, .top_p = 1, .seed = 11};
    double squares = 0, sharper[VOCAB];
    for (int i = 0; i < VOCAB; i++) squares += p[i] * p[i];
    for (int i = 0; i < VOCAB; i++) sharper[i] = p[i] * p[i] / squares;
    check_frequencies(logits, options, sharper);
}

static void test_narrow_is_greedy(void **state) {
    (void)state;
    rng_key key = {3, RNG_TEST, 0};
    for (int round = 0; round < 50; round++) {
        double logits[VOCAB];
        for (int i = 0; i < VOCAB; i++) logits[i] = rng_normal(key, (uint64_t)(round * VOCAB + i));
        int32_t want = pick(logits, VOCAB, greedy, 0);
        struct generate_options options = {.temperature = 1, .top_p = 1, .top_k = 1};
        assert_int_equal(pick(logits, VOCAB, options, (uint64_t)round), want);
        options = (struct generate_options){.temperature = 1, .top_p = 1e-6};
        assert_int_equal(pick(logits, VOCAB, options, (uint64_t)round), want);
        options = (struct generate_options){.temperature = 1e-4, .top_p = 1};
        assert_int_equal(pick(logits, VOCAB, options, (uint64_t)round), want);
    }
}

static void test_keyed(void **state) {
    (void)state;
    const double logits[VOCAB] = {0, 0, 0, 0, 0, 0};
    struct generate_options a = {.temperature = 1, .top_p = 1, .seed = 1}, b = a;
    b.seed = 2;
    int equal = 0;
    for (uint64_t i = 0; i < 300; i++) {
        assert_int_equal(pick(logits, VOCAB, a, i), pick(logits, VOCAB, a, i));
        equal += pick(logits, VOCAB, a, i) == pick(logits, VOCAB, b, i);
    }
    assert_in_range(equal, 20, 90); /* 50 expected */
}

/* ---- with a model ----------------------------------------------------------------------------------------------- */

/* 13 ids, padded to 32 rows. */
static const char model_text[] = "[model]\nd_model = 24\nvocab_size = 13\npad_vocab_to = 32\npattern = m s m\n"
                                 "[block.m]\nmixer = mamba2\nd_state = 8\nhead_dim = 12\nchunk = 4\nmlp = swiglu\n"
                                 "[block.s]\nmixer = mamba\nd_state = 4\n";
enum { NEW = 60, PROMPT_MAX = 40 };

struct collected {
    int32_t tokens[NEW];
    int count, stop_after;
};

static int collect(void *self, int32_t token) {
    struct collected *c = self;
    assert_true(c->count < NEW);
    c->tokens[c->count++] = token;
    return c->count == c->stop_after;
}

/* The rows of padding get weights that would win if they could. */
static void make_padding_tempting(struct lm *lm) {
    int index = lm->mc->embedding;
    const struct param *p = &model_params(lm->m)->list[index];
    double *values = malloc((size_t)p->count * sizeof *values);
    model_read_param(lm->m, index, values, DTYPE_F64);
    for (int64_t i = 13 * 24; i < p->count; i++) values[i] *= 6;
    model_write_param(lm->m, index, values, DTYPE_F64);
    free(values);
}

static void draw_prompt(int32_t *prompt, int count) {
    for (int i = 0; i < count; i++)
        prompt[i] = (int32_t)rng_below((rng_key){9, RNG_TEST, (uint32_t)count}, (uint64_t)i, 13);
}

/* Generate greedily; then all of it at once through the parallel forward, whose largest logits must be the same
 * tokens. */
static void check_against_forward(enum precision precision, int prompt_count, int64_t piece) {
    struct lm lm, whole;
    struct collected got = {.stop_after = -1};
    int32_t all[PROMPT_MAX + NEW];
    error err = {0};
    draw_prompt(all, prompt_count);
    lm_open(&lm, model_text, precision, MODEL_INFER, 1, piece);
    make_padding_tempting(&lm);
    struct generate_options options = greedy;
    options.tokens = NEW;
    options.piece = piece;
    assert_int_equal(generate(lm.m, all, (size_t)prompt_count, &options, collect, &got, &err), 0);
    assert_int_equal(got.count, NEW);
    memcpy(all + prompt_count, got.tokens, sizeof got.tokens);

    lm_open(&whole, model_text, precision, MODEL_INFER, 1, PROMPT_MAX + NEW);
    lm_copy_params(&whole, &lm);
    model_set_batch(whole.m, all, NULL, NULL, 1, prompt_count + NEW - 1);
    model_forward(whole.m, NULL, NULL, false);
    double *logits = lm_read_logits(&whole, 0, prompt_count + NEW - 1);
    int tempted = 0, distinct = 0;
    for (int i = 0; i < NEW; i++) {
        const double *row = logits + (int64_t)(prompt_count - 1 + i) * lm.mc->rows;
        int best = 0, best_padded = 13;
        for (int v = 0; v < 13; v++) best = row[v] > row[best] ? v : best;
        for (int v = 13; v < lm.mc->rows; v++) best_padded = row[v] > row[best_padded] ? v : best_padded;
        tempted += row[best_padded] > row[best];
        distinct += i > 0 && got.tokens[i] != got.tokens[i - 1];
        assert_int_equal(got.tokens[i], best);
    }
    assert_true(tempted > NEW / 4);  /* or the padding was no temptation */
    assert_true(distinct > NEW / 4); /* or the text was one token again and again */
    free(logits);
    lm_close(&lm);
    lm_close(&whole);
}

static void test_greedy_is_forward(void **state) {
    (void)state;
    for (int precision = PRECISION_F32; precision <= PRECISION_F64; precision++) {
        check_against_forward((enum precision)precision, 1, 8);
        check_against_forward((enum precision)precision, 7, 8);
        check_against_forward((enum precision)precision, 8, 8);
        check_against_forward((enum precision)precision, 29, 8);
        check_against_forward((enum precision)precision, 29, 1);
    }
}

static struct collected run(const struct generate_options *options, int stop_after) {
    struct lm lm;
    struct collected got = {.stop_after = stop_after};
    int32_t prompt[5];
    error err = {0};
    draw_prompt(prompt, 5);
    lm_open(&lm, model_text, PRECISION_F64, MODEL_INFER, 1, 8);
    assert_int_equal(generate(lm.m, prompt, 5, options, collect, &got, &err), 0);
    lm_close(&lm);
    return got;
}

static void test_sampled(void **state) {
    (void)state;
    struct generate_options options = {.tokens = NEW, .temperature = 1, .top_p = 1, .seed = 4, .piece = 3, .eod = -1};
    struct collected a = run(&options, -1), b, c;
    options.piece = 8; /* how the prompt is cut makes no difference */
    b = run(&options, -1);
    options.seed = 5;
    c = run(&options, -1);
    assert_int_equal(a.count, NEW);
    assert_memory_equal(a.tokens, b.tokens, sizeof a.tokens);
    assert_memory_not_equal(a.tokens, c.tokens, sizeof a.tokens);
}

static void test_ends(void **state) {
    (void)state;
    struct generate_options options = {.tokens = NEW, .temperature = 1, .top_p = 1, .seed = 4, .piece = 8, .eod = -1};
    struct collected all = run(&options, -1);
    assert_int_equal(run(&options, 7).count, 7);
    options.tokens = 9;
    struct collected some = run(&options, -1);
    assert_int_equal(some.count, 9);
    assert_memory_equal(some.tokens, all.tokens, 9 * sizeof *all.tokens);
    /* The end of a document stops and is not handed out, unless it may not stop. */
    options.tokens = NEW;
    options.eod = all.tokens[20];
    int first = 0;
    while (all.tokens[first] != options.eod) first++;
    options.stop_at_eod = true;
    assert_int_equal(run(&options, -1).count, first);
    options.stop_at_eod = false;
    assert_int_equal(run(&options, -1).count, NEW);
}

static void test_damaged_weights(void **state) {
    (void)state;
    struct lm lm;
    struct collected got = {.stop_after = -1};
    error err = {0};
    lm_open(&lm, model_text, PRECISION_F32, MODEL_INFER, 1, 8);
    float *norm = calloc(24, sizeof *norm);
    norm[3] = NAN;
    model_write_param(lm.m, lm.mc->final_norm, norm, DTYPE_F32);
    struct generate_options options = greedy;
    unit_expect(generate(lm.m, (int32_t[]){1, 2}, 2, &options, collect, &got, &err), &err, ERROR_INPUT,
                "the model's logits behind token 1 are not numbers; its weights are damaged");
    free(norm);
    lm_close(&lm);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),          cmocka_unit_test(test_no_numbers),
        cmocka_unit_test(test_frequencies),     cmocka_unit_test(test_narrow_is_greedy),
        cmocka_unit_test(test_keyed),           cmocka_unit_test(test_greedy_is_forward),
        cmocka_unit_test(test_sampled),         cmocka_unit_test(test_ends),
        cmocka_unit_test(test_damaged_weights),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
