/* test_train_trainer.c: what a training step computes, against the same batch run by hand: mean over the valid
 * targets of the global batch where micro-batches hold very different numbers of them, gradient norm, order of
 * samples, resuming, and steps that are skipped. In fp64, so that nothing hides in rounding. Started plainly it is
 * one rank; test/test_mpi.sh starts it under mpirun. */
#include "common/json.h"
#include "common/rng.h"
#include "test/support_corpus.h"
#include "test/support_model.h"
#include "test/support_ranks.h"
#include "test/unit.h"
#include "train/checkpoint.h"
#include "train/options.h"
#include "train/trainer.h"

#include <math.h>
#include <unistd.h>

enum { T = 16, SAMPLES = 36, BATCH = 12, TOKENS = SAMPLES * T + 1 };

static const char model_text[] = "[model]\nd_model = 12\nvocab_size = 257\npad_vocab_to = 1\npattern = m s\n"
                                 "[block.m]\nmixer = mamba2\nd_state = 4\nhead_dim = 8\nchunk = 8\n"
                                 "[block.s]\nmixer = mamba\nd_state = 4\n";

static struct comm world;
static char directory[256];
static int32_t ids[TOKENS];
static uint8_t mask[TOKENS], starts[TOKENS];

/* Whether target i of sample s counts: none, two, half or all of a sample's, so that the mean of means is far from
 * the mean; and nothing at all in the third batch. */
static bool counts(int s, int i) {
    if (s >= 2 * BATCH) return false;
    switch (s % 4) {
    case 0: return i % 2 == 0;
    case 1: return false;
    case 2: return i < 2;
    default: return true;
    }
}

static void write_data(const char *path) {
    rng_key key = {77, RNG_TEST, 0};
    for (int p = 0; p < TOKENS; p++) {
        ids[p] = (int32_t)rng_below(key, (uint64_t)p, 256);
        mask[p] = p > 0 && counts((p - 1) / T, (p - 1) % T);
        starts[p] = p == 0 || p % 23 == 0;
    }
    if (world.rank != 0) return;
    error err = {0};
    tokenizer *t;
    struct corpus c;
    char file[400];
    size_t size;
    assert_int_equal(tokenizer_open(&t, TOKENIZER_BYTES, &err), 0);
    struct corpus_plan plan = {.directory = path,
                               .token_bytes = 2,
                               .vocab = BYTES_VOCAB,
                               .has_mask = true,
                               .tokenizer_identity = tokenizer_identity(t)};
    corpus_write(&c, &plan, ids, mask, starts, TOKENS);
    corpus_free(&c);
    const char *json = tokenizer_json(t, &size);
    snprintf(file, sizeof file, "%s/tokenizer.json", path);
    assert_int_equal(file_write_all(file, json, size, &err), 0);
    tokenizer_close(t);
}

static int group_setup(void **state) {
    (void)state;
    char path[400];
    if (world.rank == 0) unit_directory(directory);
    comm_broadcast(&world, directory, sizeof directory, 0);
    snprintf(path, sizeof path, "%s/data", directory);
    write_data(path);
    comm_barrier(&world);
    return 0;
}

static int group_teardown(void **state) {
    (void)state;
    comm_barrier(&world);
    if (world.rank == 0) unit_directory_remove(directory);
    return 0;
}

/* ---- running the trainer ---------------------------------------------------------------------------------------- */

/* Train with the options in `more` (sections and keys); the run's directory is NAME below the test's. */
static void run(const char *name, int steps, int micro_batch, const char *more) {
    char text[4096];
    error err = {0};
    config *c = NULL;
    struct trainer *t = NULL;
    snprintf(text, sizeof text,
             "%s[data]\ntrain = %s/data\nseq_len = %d\nshuffle = false\n"
             "[train]\nout = %s/%s\nsteps = %d\nbatch = %d\nmicro_batch = %d\nprecision = fp64\nseed = 3\n%s",
             model_text, directory, T, directory, name, steps, BATCH, micro_batch, more);
    assert_int_equal(config_parse(&c, text, strlen(text), "test.ini", &err), 0);
    int kept = dup(2); /* what a run says is for people */
    if (!getenv("SHOW")) assert_non_null(freopen("/dev/null", "w", stderr));
    int result = trainer_open(&t, c, &world, &err);
    if (result == 0) result = trainer_run(t, &err);
    trainer_close(t);
    fflush(stderr);
    dup2(kept, 2);
    close(kept);
    config_free(c);
    if (result != 0) fail_msg("%s", err.text);
    comm_barrier(&world); /* the log is read by all ranks */
}

struct logged {
    double loss, accuracy, valid, batch, norm, lr;
    bool skipped;
};

static double number(const json_t *line, const char *key) {
    const json_t *value = json_object_get(line, key);
    assert_non_null(value);
    return json_is_null(value) ? NAN : json_number_value(value);
}

/* The steps of a run's log, in order. */
static void read_log(const char *name, struct logged *steps, int count) {
    char path[400], line[1 << 14];
    int found = 0;
    snprintf(path, sizeof path, "%s/%s/log.jsonl", directory, name);
    FILE *in = fopen(path, "r");
    assert_non_null(in);
    while (fgets(line, sizeof line, in)) {
        error err = {0};
        json_t *o = NULL;
        assert_int_equal(json_read_text(&o, line, strlen(line), "log", &err), 0);
        if (strcmp(json_string_value(json_object_get(o, "type")), "step") == 0) {
            assert_true(found < count);
            assert_int_equal(json_integer_value(json_object_get(o, "step")), found + 1);
            steps[found++] = (struct logged){.loss = number(o, "loss"),
                                             .accuracy = number(o, "accuracy"),
                                             .valid = number(o, "valid"),
                                             .batch = number(o, "batch"),
                                             .norm = number(o, "grad_norm"),
                                             .lr = number(o, "lr"),
                                             .skipped = json_is_true(json_object_get(o, "skipped"))};
        }
        json_decref(o);
    }
    fclose(in);
    assert_int_equal(found, count);
}

/* ---- the batch by hand ------------------------------------------------------------------------------------------ */

/* `count` samples of the data from `first` on at the initial weights, in one piece. */
static struct logged samples_by_hand(int first, int count, double z_loss) {
    struct lm lm;
    int32_t targets[BATCH * T], tokens[BATCH * T], doc[BATCH * T];
    assert_true(count <= BATCH);
    for (int b = 0; b < count; b++) {
        int s = (first + b) % SAMPLES;
        for (int i = 0, number_of = 0; i < T; i++) {
            tokens[b * T + i] = ids[s * T + i];
            targets[b * T + i] = counts(s, i) ? ids[s * T + i + 1] : -1;
            doc[b * T + i] = number_of += starts[s * T + i];
        }
    }
    lm_open(&lm, model_text, PRECISION_F64, MODEL_TRAIN, count, T);
    model_init(lm.m, 3);
    model_zero_grads(lm.m);
    model_zero_sums(lm.m);
    model_set_batch(lm.m, tokens, targets, doc, count, T);
    model_forward(lm.m, NULL, NULL, true);
    model_loss(lm.m, NULL, true, 1, z_loss);
    model_backward(lm.m, NULL, NULL);
    struct loss_sums sums;
    model_read_sums(lm.m, &sums);
    tensor grads = model_flat_grads(lm.m);
    double squares = 0;
    for (int64_t i = 0; i < grads.dim[0]; i++) squares += ((double *)grads.data)[i] * ((double *)grads.data)[i];
    lm_close(&lm);
    return (struct logged){.loss = sums.nll / sums.valid,
                           .accuracy = sums.correct / sums.valid,
                           .valid = sums.valid,
                           .norm = sqrt(squares) / sums.valid};
}

/* Global batch `step`. */
static struct logged by_hand(int step, double z_loss) { return samples_by_hand(step * BATCH, BATCH, z_loss); }

static void check_near(double got, double want, double tolerance) {
    if (!(fabs(got - want) <= tolerance * fabs(want))) fail_msg("%.17g is not %.17g", got, want);
}

static void check_step(const struct logged *got, const struct logged *want, double tolerance) {
    check_near(got->loss, want->loss, tolerance);
    check_near(got->accuracy, want->accuracy, 1e-15);
    check_near(got->valid, want->valid, 0);
    check_near(got->norm, want->norm, 100 * tolerance);
    assert_false(got->skipped);
}

/* Micro-batches that this number of ranks allows. */
static int micro_batches(int sizes[4]) {
    int found = 0;
    for (int micro = 1; micro <= BATCH / world.ranks && found < 4; micro++) {
        if (BATCH % (micro * world.ranks) == 0) sizes[found++] = micro;
    }
    assert_true(found > 0);
    return found;
}

/* ---- tests ------------------------------------------------------------------------------------------------------ */

static void test_mean_over_the_global_batch(void **state) {
    (void)state;
    int sizes[4], n = micro_batches(sizes);
    for (int k = 0; k < n; k++) {
        char name[40];
        struct logged got[2];
        snprintf(name, sizeof name, "mean%d", sizes[k]);
        /* lr = 0: the weights stay, so every step is comparable. */
        run(name, 2, sizes[k], "[optimizer]\nlr = 0\nz_loss = 0.01\n[schedule]\nkind = constant\n");
        read_log(name, got, 2);
        for (int step = 0; step < 2; step++) {
            struct logged want = by_hand(step, 0.01);
            check_step(&got[step], &want, 1e-13);
        }
        /* The two batches differ, or the order of samples would not be tested. */
        assert_true(fabs(got[0].loss - got[1].loss) > 1e-3);
    }
}

static void test_split_changes_nothing(void **state) {
    (void)state;
    int sizes[4], n = micro_batches(sizes);
    struct logged first[6], got[6];
    static const char options[] = "[optimizer]\nlr = 0.01\n[schedule]\nkind = constant\n";
    for (int k = 0; k < n; k++) {
        char name[40];
        snprintf(name, sizeof name, "split%d", sizes[k]);
        run(name, 6, sizes[k], options);
        read_log(name, k == 0 ? first : got, 6);
        for (int step = 0; step < 6 && k > 0; step++) {
            if (first[step].skipped) continue;
            check_near(got[step].loss, first[step].loss, 1e-11);
            check_near(got[step].norm, first[step].norm, 1e-9);
        }
    }
}

static void test_resumes_at_the_next_sample(void **state) {
    (void)state;
    struct logged got[2];
    static const char options[] = "[optimizer]\nlr = 0\n[schedule]\nkind = constant\n";
    run("resumed", 1, 1, options);
    run("resumed", 2, 1, options);
    read_log("resumed", got, 2);
    for (int step = 0; step < 2; step++) {
        struct logged want = by_hand(step, 0);
        check_step(&got[step], &want, 1e-7); /* a checkpoint's weights are rounded to fp32 */
    }
}

static void test_learning_rate(void **state) {
    (void)state;
    struct logged got[5];
    static const char options[] = "[optimizer]\nlr = 0.02\n[schedule]\nkind = linear\nwarmup = 2\ndecay_steps = 4\n";
    run("rates", 2, 0, options); /* across two sessions */
    run("rates", 5, 0, options);
    read_log("rates", got, 5);
    static const double want[5] = {0.01, 0.02, 0.02, 0.015, 0.01};
    for (int step = 0; step < 5; step++) check_near(got[step].lr, want[step], 1e-15);
}

static void read_state(const char *name, struct trainer_state *s) {
    char path[400];
    error err = {0};
    struct checkpoint *c = NULL;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    if (checkpoint_open(&c, path, &err) != 0) fail_msg("%s", err.text);
    *s = *checkpoint_state(c);
    checkpoint_close(c);
}

static void check_same_weights(const char *a, const char *b) {
    uint64_t hash[2], size[2];
    const char *names[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        char path[400];
        error err = {0};
        snprintf(path, sizeof path, "%s/%s/latest/model.safetensors", directory, names[i]);
        assert_int_equal(file_hash_of(path, &hash[i], &size[i], &err), 0);
    }
    assert_true(hash[0] == hash[1] && size[0] == size[1]);
}

static void test_nothing_to_learn_is_skipped(void **state) {
    (void)state;
    struct logged got[4];
    struct trainer_state after;
    static const char options[] = "[optimizer]\nlr = 0.01\n[schedule]\nkind = constant\n";
    run("two", 2, 0, options);
    run("three", 3, 0, options); /* the third batch has no valid target */
    run("four", 4, 0, options);
    read_log("four", got, 4);
    assert_false(got[0].skipped || got[1].skipped || got[3].skipped);
    assert_true(got[2].skipped && isnan(got[2].loss) && got[2].valid == 0);
    read_state("three", &after);
    assert_true(after.step == 3 && after.optimizer_steps == 2 && after.skipped == 1 && after.samples == 3 * BATCH);
    check_same_weights("two", "three");
    read_state("four", &after);
    assert_true(after.step == 4 && after.optimizer_steps == 3 && after.skipped == 1);
    /* Tokens are the valid targets: two batches with 3 samples of each kind, and one of them again. */
    assert_true(after.tokens == 3 * 3 * (2 + T / 2 + T));
}

/* A checkpoint whose weights are not all numbers, written by rank 0 on its own. */
static void save_damaged(const char *name) {
    struct lm lm;
    error err = {0};
    tokenizer *t;
    char path[400];
    float norm[12] = {1, NAN};
    struct comm alone = {0};
    if (world.rank != 0) return;
    lm_open(&lm, model_text, PRECISION_F32, MODEL_INFER, 1, 1);
    model_write_param(lm.m, lm.mc->final_norm, norm, DTYPE_F32);
    assert_int_equal(tokenizer_open(&t, TOKENIZER_BYTES, &err), 0);
    snprintf(path, sizeof path, "%s/%s", directory, name);
    assert_int_equal(file_make_directories(path, &err), 0);
    comm_open_alone(&alone);
    struct trainer_state state = {.best_valid = NAN};
    if (checkpoint_save(path, &state, lm.m, NULL, lm.c, t, &alone, 0, &err) != 0) fail_msg("%s", err.text);
    tokenizer_close(t);
    lm_close(&lm);
}

/* Steps of growing batches: each of the samples that follow, each the mean over its own targets, over two sessions. */
static void test_ramp(void **state) {
    (void)state;
    int sizes[3] = {2 * world.ranks, 4 * world.ranks, BATCH}, first = 0, tokens = 0;
    if (sizes[1] > BATCH) sizes[1] = BATCH;
    char options[300];
    snprintf(options, sizeof options,
             "[ramp]\nstages = %d*1 %d*1\n[optimizer]\nlr = 0\nz_loss = 0.01\n[schedule]\nkind = constant\n", sizes[0],
             sizes[1]);
    struct logged got[3];
    struct trainer_state after;
    run("ramp", 2, 1, options);
    run("ramp", 3, 1, options);
    read_log("ramp", got, 3);
    for (int step = 0; step < 3; step++) {
        struct logged want = samples_by_hand(first, sizes[step], 0.01);
        check_step(&got[step], &want, step < 2 ? 1e-13 : 1e-7); /* a checkpoint's weights are rounded to fp32 */
        assert_true(got[step].batch == sizes[step]);
        first += sizes[step];
        tokens += (int)want.valid;
    }
    read_state("ramp", &after);
    assert_true(after.samples == (uint64_t)first && after.tokens == tokens);
}

static void test_not_finite_is_skipped(void **state) {
    (void)state;
    struct logged got[3];
    struct trainer_state after;
    char options[400];
    save_damaged("damaged");
    comm_barrier(&world);
    snprintf(options, sizeof options, "init = %s/damaged\n[optimizer]\nlr = 0.01\n", directory);
    run("hopeless", 2, 1, options);
    read_log("hopeless", got, 2);
    for (int step = 0; step < 2; step++) assert_true(got[step].skipped && isnan(got[step].loss) && got[step].valid > 0);
    read_state("hopeless", &after);
    assert_true(after.step == 2 && after.optimizer_steps == 0 && after.skipped == 2);
    check_same_weights("damaged", "hopeless");
}

int main(void) {
    if (ranks_world(&world) != 0) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mean_over_the_global_batch),  cmocka_unit_test(test_split_changes_nothing),
        cmocka_unit_test(test_resumes_at_the_next_sample),  cmocka_unit_test(test_learning_rate),
        cmocka_unit_test(test_nothing_to_learn_is_skipped), cmocka_unit_test(test_not_finite_is_skipped),
        cmocka_unit_test(test_ramp),
    };
    int failed = cmocka_run_group_tests(tests, group_setup, group_teardown);
    comm_close(&world);
    return failed;
}
