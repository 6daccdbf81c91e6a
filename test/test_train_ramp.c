/* test_train_ramp.c: the size of every step's batch and the sample it starts with, against the rules of train/ramp.h
 * written out step by step; how the ramp's batches are dealt out; and what is refused. */
#include "test/support_options.h"
#include "test/unit.h"

static void bound(const char *text, struct run_options *o) {
    error err = {0};
    if (options_bind(text, o, &err) != 0) fail_msg("%s", err.text);
}

/* ---- sizes ------------------------------------------------------------------------------------------------------ */

static void test_no_ramp(void **state) {
    (void)state;
    struct run_options o;
    bound("[train]\nbatch = 6\n", &o);
    for (int64_t t = 0; t < 5; t++) {
        assert_int_equal(ramp_batch(&o.ramp, t), 6);
        assert_int_equal(ramp_samples(&o.ramp, t), 6 * t);
    }
    assert_int_equal(ramp_samples(&o.ramp, 1000000000000), 6000000000000);
    assert_int_equal(ramp_divisor(&o.ramp), 6);
}

static void test_stages(void **state) {
    (void)state;
    /* As xLSTM-7B was trained: 128, 256, 512. */
    struct run_options o;
    bound("[train]\nbatch = 512\nsteps = 550000\n[ramp]\nstages = 128*2000, 256*2000\n", &o);
    assert_int_equal(ramp_batch(&o.ramp, 0), 128);
    assert_int_equal(ramp_batch(&o.ramp, 1999), 128);
    assert_int_equal(ramp_batch(&o.ramp, 2000), 256);
    assert_int_equal(ramp_batch(&o.ramp, 3999), 256);
    assert_int_equal(ramp_batch(&o.ramp, 4000), 512);
    assert_int_equal(ramp_batch(&o.ramp, 549999), 512);
    assert_int_equal(ramp_samples(&o.ramp, 0), 0);
    assert_int_equal(ramp_samples(&o.ramp, 2000), 256000);
    assert_int_equal(ramp_samples(&o.ramp, 2001), 256256);
    assert_int_equal(ramp_samples(&o.ramp, 4000), 768000);
    assert_int_equal(ramp_samples(&o.ramp, 550000), 768000 + 512 * (int64_t)546000);
    assert_int_equal(ramp_divisor(&o.ramp), 128);
}

/* Step by step: the batch has grown by floor(done * n / length) increments, done being steps or tokens so far. */
static void check_rule(int64_t batch, int64_t start, int64_t increment, int64_t steps, int64_t tokens, int64_t T) {
    struct run_options o;
    char text[400];
    snprintf(text, sizeof text,
             "[train]\nbatch = %lld\nsteps = 100k\n[data]\nseq_len = %lld\n[ramp]\nstart = %lld\nincrement = %lld\n"
             "steps = %lld\ntokens = %lld\n",
             (long long)batch, (long long)T, (long long)start, (long long)increment, (long long)steps,
             (long long)tokens);
    bound(text, &o);
    int64_t n = (batch - start) / increment, samples = 0, grown = 0;
    for (int64_t t = 0; t < 3000; t++) {
        int64_t now = steps > 0 ? t * n / steps : samples * T * n / tokens;
        if (now > n) now = n;
        assert_true(now >= grown); /* it never shrinks */
        grown = now;
        assert_int_equal(ramp_batch(&o.ramp, t), start + grown * increment);
        assert_int_equal(ramp_samples(&o.ramp, t), samples);
        samples += start + grown * increment;
    }
    assert_int_equal(grown, n);
}

static void test_rules(void **state) {
    (void)state;
    check_rule(512, 64, 64, 700, 0, 16);
    check_rule(512, 64, 64, 701, 0, 16);
    check_rule(12, 2, 1, 7, 0, 16); /* more increments than steps: some are jumped over */
    check_rule(8, 2, 6, 1, 0, 16);
    check_rule(1000, 1, 1, 2500, 0, 1);
    check_rule(512, 64, 64, 0, 1000000, 16);
    check_rule(512, 64, 32, 0, 999983, 7);
    check_rule(12, 2, 2, 0, 1, 16); /* the first step is beyond the ramp's end already */
    check_rule(12, 2, 2, 0, 200, 16);
    struct run_options o;
    bound("[train]\nbatch = 8\n[ramp]\nstart = 8\nincrement = 1\nsteps = 5\n", &o); /* nothing to grow */
    assert_int_equal(o.ramp.count, 1);
    assert_int_equal(ramp_batch(&o.ramp, 0), 8);
}

/* Far behind the end of a run numbers stop growing; they don't wrap. */
static void test_far_away(void **state) {
    (void)state;
    struct run_options o;
    bound("[train]\nbatch = 1Gi\nsteps = 10\n[ramp]\nstages = 1000000000*1000000000000 1*5\n", &o);
    assert_true(ramp_samples(&o.ramp, INT64_MAX) == UINT64_MAX);
    assert_int_equal(ramp_samples(&o.ramp, 10), 10000000000);
    options_refused("[train]\nbatch = 1Gi\nsteps = 1000g\n", "are too many to count; their product must be below 2^63");
}

/* ---- dealing out ------------------------------------------------------------------------------------------------ */

static void check_split(const char *text, int ranks, int64_t want_micro, int64_t want_accumulate) {
    struct run_options o;
    int64_t micro, accumulate;
    error err = {0};
    bound(text, &o);
    if (run_options_split(&o, ranks, &micro, &accumulate, &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(micro, want_micro);
    assert_int_equal(accumulate, want_accumulate);
}

static void check_split_refused(const char *text, int ranks, const char *message) {
    struct run_options o;
    int64_t micro, accumulate;
    error err = {0};
    bound(text, &o);
    unit_expect(run_options_split(&o, ranks, &micro, &accumulate, &err), &err, ERROR_INPUT, message);
}

static void test_split(void **state) {
    (void)state;
    static const char open[] = "[train]\nbatch = 24\n[ramp]\nstages = 8*3 12*3\n";
    static const char fixed[] = "[train]\nbatch = 24\nmicro_batch = 4\n[ramp]\nstages = 8*3 16*3\n";
    check_split(open, 1, 4, 6);
    check_split(open, 2, 2, 6);
    check_split(open, 4, 1, 6);
    check_split_refused(open, 3,
                        "the batches of [ramp], from 8 to 24 sequences, do not all divide among 3 ranks; their "
                        "greatest common divisor is 4, and the number of ranks must divide it");
    check_split(fixed, 1, 4, 6);
    check_split(fixed, 2, 4, 3);
    check_split_refused(fixed, 3,
                        "[ramp] has a batch of 8 sequences from step 0 on, which is no multiple of ranks * "
                        "train.micro_batch = 3 * 4 = 12");
    check_split_refused("[train]\nbatch = 24\nmicro_batch = 8\n[ramp]\nstages = 8*3 12*3\n", 1,
                        "[ramp] has a batch of 12 sequences from step 3 on, which is no multiple of ranks * "
                        "train.micro_batch = 1 * 8 = 8");
}

static void test_refused(void **state) {
    (void)state;
    static const char *const stages[] = {"4", "4*", "*4", "4*0", "0*4", "4*2x", "4*-2", "-4*2", "4x2", "4 *2",
                                         "4*2 8*1*3", "4*1000000000001", "4*99999999999999999999", "a"};
    for (size_t i = 0; i < sizeof stages / sizeof *stages; i++) {
        char text[200];
        snprintf(text, sizeof text, "[ramp]\nstages = %s\n", stages[i]);
        options_refused(text,
                        "is no stage; write BATCH*STEPS, such as 128*2000, with a batch from 1 to train.batch = 8");
    }
    options_refused("[ramp]\nstages = 4*2 16*2\n",
                    "ramp.stages = 4*2 16*2 has a batch of 16, but a ramp leads up to train.batch = 8; give smaller "
                    "ones, or ramp.stages= (nothing) for no ramp");
    options_refused("[ramp]\nstages = 4*2\nstart = 2\n", "ramp.stages = 4*2 says all of a ramp");
    options_refused("[ramp]\nsteps = 2\n", "ramp.start = 0 means no ramp");
    options_refused("[ramp]\nstart = 2\nincrement = 2\n", "ramp.start = 2 needs either ramp.steps or ramp.tokens");
    options_refused("[ramp]\nstart = 2\nincrement = 2\nsteps = 1\ntokens = 1\n", "needs either ramp.steps or");
    options_refused("[ramp]\nstart = 16\nincrement = 2\nsteps = 5\n", "ramp.start = 16 is above train.batch = 8");
    options_refused("[ramp]\nstart = 2\nincrement = 4\nsteps = 5\n",
                    "ramp.increment = 4 does not divide train.batch - ramp.start = 8 - 2 = 6");
    options_refused("[ramp]\nstart = 2\nsteps = 5\n", "ramp.increment = 0 does not divide");
    options_refused("[train]\nbatch = 5000\n[ramp]\nstart = 1\nincrement = 1\nsteps = 9000\n",
                    "ramp.increment = 1 makes 4999 stages; at most 1024 are possible");
    char many[6000] = ""; /* more than a line of a config holds */
    struct ramp ramp;
    error err = {0};
    for (int i = 0; i < LIMIT_RAMP_STAGES; i++) strcat(many, "4*1 ");
    assert_int_equal(ramp_make(&ramp, &(struct ramp_options){.stages = many}, 8, 10, 1, &err), 0);
    assert_int_equal(ramp_batch(&ramp, LIMIT_RAMP_STAGES), 8);
    strcat(many, "4*1");
    unit_expect(ramp_make(&ramp, &(struct ramp_options){.stages = many}, 8, 10, 1, &err), &err, ERROR_INPUT,
                "ramp.stages has more than the 1024 stages that are possible");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_ramp),  cmocka_unit_test(test_stages), cmocka_unit_test(test_rules),
        cmocka_unit_test(test_far_away), cmocka_unit_test(test_split),  cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
