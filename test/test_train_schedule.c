/* test_train_schedule.c: the learning rate at points computed by hand, its edges, the options that belong to it,
 * and how a global batch is dealt out. */
#include "test/support_options.h"
#include "test/unit.h"

#include <math.h>

static void check_near(double got, double want) {
    if (fabs(got - want) > 1e-15) fail_msg("%.17g is not %.17g", got, want);
}

static void test_warmup(void **state) {
    (void)state;
    for (int kind = SCHEDULE_CONSTANT; kind <= SCHEDULE_EXPONENTIAL; kind++) {
        struct schedule_options s = {.kind = kind, .warmup = 4, .min_lr = 0.1, .decay_steps = 8, .half_life = 3};
        check_near(schedule_lr(&s, 1, 100, 0), 0.25);
        check_near(schedule_lr(&s, 1, 100, 2), 0.75);
        check_near(schedule_lr(&s, 1, 100, 3), 1);
        check_near(schedule_lr(&s, 1, 100, 4), 1);
    }
}

static void test_no_warmup(void **state) {
    (void)state;
    for (int kind = SCHEDULE_CONSTANT; kind <= SCHEDULE_EXPONENTIAL; kind++) {
        struct schedule_options s = {.kind = kind, .decay_steps = 1, .half_life = 1};
        check_near(schedule_lr(&s, 0.5, 2, 0), 0.5);
    }
}

static void test_all_warmup(void **state) {
    (void)state;
    /* The whole run is warm-up; what lies behind it must be a number all the same. */
    for (int kind = SCHEDULE_CONSTANT; kind <= SCHEDULE_EXPONENTIAL; kind++) {
        struct schedule_options s = {.kind = kind, .warmup = 10, .min_lr = 0.01, .half_life = 1};
        check_near(schedule_lr(&s, 2, 10, 9), 2);
        assert_true(isfinite(schedule_lr(&s, 2, 10, 10)));
    }
}

static void test_constant(void **state) {
    (void)state;
    struct schedule_options s = {.kind = SCHEDULE_CONSTANT, .warmup = 1, .min_lr = 0.1};
    check_near(schedule_lr(&s, 0.3, 10, 1), 0.3);
    check_near(schedule_lr(&s, 0.3, 10, 9), 0.3);
}

static void test_cosine(void **state) {
    (void)state;
    struct schedule_options s = {.kind = SCHEDULE_COSINE, .warmup = 10, .min_lr = 0.2};
    /* 90 steps of decay behind the warm-up: a third, half, two thirds of the way */
    check_near(schedule_lr(&s, 1, 100, 10), 1);
    check_near(schedule_lr(&s, 1, 100, 40), 0.2 + 0.8 * 0.75);
    check_near(schedule_lr(&s, 1, 100, 55), 0.6);
    check_near(schedule_lr(&s, 1, 100, 70), 0.2 + 0.8 * 0.25);
    check_near(schedule_lr(&s, 1, 100, 100), 0.2);
    check_near(schedule_lr(&s, 1, 100, 5000), 0.2);
    /* A decay shorter than the run ends at the floor and stays. */
    s.decay_steps = 30;
    check_near(schedule_lr(&s, 1, 100, 20), 0.2 + 0.8 * 0.75);
    check_near(schedule_lr(&s, 1, 100, 40), 0.2);
    check_near(schedule_lr(&s, 1, 100, 99), 0.2);
}

static void test_linear(void **state) {
    (void)state;
    struct schedule_options s = {.kind = SCHEDULE_LINEAR, .warmup = 0, .min_lr = 0.5};
    check_near(schedule_lr(&s, 1, 4, 0), 1);
    check_near(schedule_lr(&s, 1, 4, 1), 0.875);
    check_near(schedule_lr(&s, 1, 4, 3), 0.625);
    check_near(schedule_lr(&s, 1, 4, 4), 0.5);
    s.decay_steps = 2;
    check_near(schedule_lr(&s, 1, 4, 1), 0.75);
    check_near(schedule_lr(&s, 1, 4, 3), 0.5);
}

static void test_wsd(void **state) {
    (void)state;
    struct schedule_options s = {.kind = SCHEDULE_WSD, .warmup = 2, .min_lr = 0, .decay_steps = 4};
    check_near(schedule_lr(&s, 1, 10, 1), 1);
    check_near(schedule_lr(&s, 1, 10, 5), 1);
    check_near(schedule_lr(&s, 1, 10, 6), 1);
    check_near(schedule_lr(&s, 1, 10, 7), 0.75);
    check_near(schedule_lr(&s, 1, 10, 9), 0.25);
    s.min_lr = 0.4;
    check_near(schedule_lr(&s, 1, 10, 8), 0.7);
    check_near(schedule_lr(&s, 1, 10, 10), 0.4);
}

static void test_exponential(void **state) {
    (void)state;
    struct schedule_options s = {.kind = SCHEDULE_EXPONENTIAL, .warmup = 5, .min_lr = 0.1, .half_life = 10};
    check_near(schedule_lr(&s, 0.9, 100, 5), 0.9);
    check_near(schedule_lr(&s, 0.9, 100, 15), 0.5);
    check_near(schedule_lr(&s, 0.9, 100, 25), 0.3);
    check_near(schedule_lr(&s, 0.9, 100, 10), 0.1 + 0.8 * sqrt(0.5));
    s.decay_steps = 20; /* then it stays */
    check_near(schedule_lr(&s, 0.9, 100, 25), 0.3);
    check_near(schedule_lr(&s, 0.9, 100, 95), 0.3);
}

static void test_cooldown(void **state) {
    (void)state;
    struct schedule_options s = {.kind = SCHEDULE_CONSTANT, .warmup = 2, .min_lr = 0.4, .cooldown = 4};
    check_near(schedule_lr(&s, 1, 10, 1), 1);
    check_near(schedule_lr(&s, 1, 10, 6), 1);
    check_near(schedule_lr(&s, 1, 10, 7), 0.75);
    check_near(schedule_lr(&s, 1, 10, 9), 0.25);
    check_near(schedule_lr(&s, 1, 10, 10), 0);
    check_near(schedule_lr(&s, 1, 10, 11), 0);
    /* The decay before it ends where it begins: 100 - 10 - 30 = 60 steps of cosine, then from the floor to 0. */
    s = (struct schedule_options){.kind = SCHEDULE_COSINE, .warmup = 10, .min_lr = 0.2, .cooldown = 30};
    check_near(schedule_lr(&s, 1, 100, 30), 0.2 + 0.8 * 0.75);
    check_near(schedule_lr(&s, 1, 100, 70), 0.2);
    check_near(schedule_lr(&s, 1, 100, 85), 0.1);
    s.decay_steps = 120; /* a decay that the cool-down cuts off half-way */
    check_near(schedule_lr(&s, 1, 100, 70), 0.6);
    check_near(schedule_lr(&s, 1, 100, 85), 0.3);
    /* xLSTM: a tenth of the peak after the main part, then linearly to 0. */
    double half_life = 60 / log2(10);
    s = (struct schedule_options){.kind = SCHEDULE_EXPONENTIAL, .warmup = 10, .half_life = half_life, .cooldown = 30};
    check_near(schedule_lr(&s, 1, 100, 40), sqrt(0.1));
    check_near(schedule_lr(&s, 1, 100, 70), 0.1);
    check_near(schedule_lr(&s, 1, 100, 97), 0.01);
}

static void test_falls_and_is_bounded(void **state) {
    (void)state;
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_EXPONENTIAL; kind++) {
        struct schedule_options s = {.kind = kind, .warmup = 7, .min_lr = 1e-5, .decay_steps = 50, .half_life = 9};
        double before = schedule_lr(&s, 3e-3, 200, 7);
        for (int64_t t = 8; t < 200; t++) {
            double lr = schedule_lr(&s, 3e-3, 200, t);
            assert_true(lr <= before && lr >= 1e-5 && lr <= 3e-3);
            before = lr;
        }
    }
}

/* ---- options ---------------------------------------------------------------------------------------------------- */

static void test_option_rules(void **state) {
    (void)state;
    struct run_options o;
    error err = {0};
    assert_int_equal(options_bind("", &o, &err), 0);
    assert_int_equal(options_bind("[train]\nsteps = 5\n[schedule]\nwarmup = 5\n", &o, &err), 0);
    static const char wsd[] = "[train]\nsteps = 5\n[schedule]\nkind = wsd\nwarmup = 2\ndecay_steps = 3\n";
    assert_int_equal(options_bind(wsd, &o, &err), 0);
    options_refused("[train]\nsteps = 5\n[schedule]\nwarmup = 6\n",
                    "schedule.warmup = 6 is longer than train.steps = 5");
    options_refused("[optimizer]\nlr = 1e-4\n[schedule]\nmin_lr = 2e-4\n",
                    "schedule.min_lr = 0.0002 is above the peak optimizer.lr = 0.0001");
    options_refused("[schedule]\nkind = wsd\n",
                    "schedule.decay_steps = 0 does not suit schedule.kind = wsd; it must be from 1 to 1000");
    options_refused("[train]\nsteps = 5\n[schedule]\nkind = wsd\nwarmup = 3\ndecay_steps = 3\n", "from 1 to 2");
    options_refused("[train]\nsteps = 5\n[schedule]\nwarmup = 3\ncooldown = 3\n",
                    "schedule.cooldown = 3 is longer than the 2 steps that train.steps = 5 and "
                    "schedule.warmup = 3 leave");
    options_refused("[schedule]\nkind = wsd\ndecay_steps = 3\ncooldown = 3\n",
                    "schedule.cooldown = 3 does not suit schedule.kind = wsd");
    options_refused("[schedule]\nkind = exponential\n", "schedule.half_life = 0");
    options_refused("[train]\nsteps = 0\n", "steps = 0");
    options_refused("[optimizer]\nbeta2 = 1\n", "beta2 = 1");
    options_refused("[schedule]\nkind = cosin\n", "did you mean cosine?");
    assert_int_equal(options_bind("[optimizer]\nlr = 0\n", &o, &err), 0);
    options_refused("[optimizer]\nlr = 0\ndecay_mode = detached\n",
                    "optimizer.lr = 0 does not suit optimizer.decay_mode = detached");
}

static void test_groups(void **state) {
    (void)state;
    struct run_options o;
    error err = {0};
    config *c = NULL;
    static const char text[] = "[group.a]\nmatch = *.D *.A_log\nlr_scale = 0\n[group.b]\nmatch = *\nclamp_max = 2\n";
    assert_int_equal(config_parse(&c, text, strlen(text), "test.ini", &err), 0);
    assert_int_equal(config_override(c, "group.b.weight_decay=0.5", &err), 0);
    assert_int_equal(run_options_bind(&o, c, &err), 0);
    assert_int_equal(o.optimizer.group_count, 2);
    const struct group_options *g = o.optimizer.groups;
    assert_string_equal(g[0].name, "a");
    assert_string_equal(g[0].match, "*.D *.A_log");
    assert_true(g[0].lr_scale == 0 && isnan(g[0].weight_decay) && isnan(g[0].clamp_min) && isnan(g[0].clamp_max));
    assert_true(isnan(g[1].lr_scale) && g[1].weight_decay == 0.5 && isnan(g[1].clamp_min) && g[1].clamp_max == 2);
    config_free(c);
    options_refused("[group.a]\nlr_scale = 2\n", "[group.a] match is missing");
    options_refused("[group.a]\nmatch = *\n", "[group.a] changes nothing; give it lr_scale");
    options_refused("[group.]\nmatch = *\nlr_scale = 2\n", "section [group.] has no name");
    options_refused("[group.a]\nmatch = *\nlr_scale = -1\n", "from 0 to 1000000, or empty");
    options_refused("[group.a]\nmatch = *\nclamp_min = nan\n", "clamp_min = nan");
    char many[4096] = "";
    for (int i = 0; i <= LIMIT_GROUPS; i++) {
        snprintf(many + strlen(many), sizeof many - strlen(many), "[group.g%d]\nmatch = *\nlr_scale = 2\n", i);
    }
    options_refused(many, "there are 65 [group.NAME] sections; at most 64 are possible");
}

static void check_split(int64_t batch, int64_t micro, int ranks, int64_t want_micro, int64_t want_accumulate) {
    struct run_options t = {.train = {.batch = batch, .micro_batch = micro}};
    int64_t m, a;
    error err = {0};
    assert_int_equal(ramp_make(&t.ramp, &(struct ramp_options){.stages = ""}, batch, 10, 1, &err), 0);
    assert_int_equal(run_options_split(&t, ranks, &m, &a, &err), 0);
    assert_int_equal(m, want_micro);
    assert_int_equal(a, want_accumulate);
}

static void check_split_refused(int64_t batch, int64_t micro, int ranks, const char *text) {
    struct run_options t = {.train = {.batch = batch, .micro_batch = micro}};
    int64_t m, a;
    error err = {0};
    assert_int_equal(ramp_make(&t.ramp, &(struct ramp_options){.stages = ""}, batch, 10, 1, &err), 0);
    unit_expect(run_options_split(&t, ranks, &m, &a, &err), &err, ERROR_INPUT, text);
}

static void test_split(void **state) {
    (void)state;
    check_split(8, 0, 1, 8, 1);
    check_split(8, 2, 1, 2, 4);
    check_split(12, 0, 3, 4, 1);
    check_split(12, 2, 3, 2, 2);
    check_split(1, 1, 1, 1, 1);
    check_split_refused(10, 0, 3,
                        "train.batch = 10 does not divide among 3 ranks; the nearest valid: train.batch = 9 or 12");
    check_split_refused(2, 0, 3, "train.batch = 2 does not divide among 3 ranks; the nearest valid: train.batch = 3");
    check_split_refused(10, 4, 1,
                        "train.batch = 10 is no multiple of ranks * train.micro_batch = 1 * 4 = 4; the nearest valid: "
                        "train.batch = 8 or 12, or train.micro_batch = 5");
    check_split_refused(6, 4, 4,
                        "train.batch = 6 is no multiple of ranks * train.micro_batch = 4 * 4 = 16; the nearest valid: "
                        "train.batch = 16");
    check_split_refused(8, 16, 2,
                        "train.batch = 8 is no multiple of ranks * train.micro_batch = 2 * 16 = 32; the nearest valid: "
                        "train.batch = 32, or train.micro_batch = 4");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_warmup),
        cmocka_unit_test(test_no_warmup),
        cmocka_unit_test(test_all_warmup),
        cmocka_unit_test(test_constant),
        cmocka_unit_test(test_cosine),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_wsd),
        cmocka_unit_test(test_exponential),
        cmocka_unit_test(test_cooldown),
        cmocka_unit_test(test_falls_and_is_bounded),
        cmocka_unit_test(test_option_rules),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_split),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
