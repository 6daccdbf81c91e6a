/* test_train_ladder.c: levels of solvers: how a layer climbs and comes down, the same whether reports come late or not;
 * steps whose solvers fail on one rank are skipped on all; a step that was recorded takes a new level; prompts whose
 * solvers fail are read again. */
#include "common/rng.h"
#include "test/support_model.h"
#include "test/support_ranks.h"
#include "test/unit.h"
#include "train/generate.h"
#include "train/ladder.h"
#include "train/step.h"

#include <math.h>

/* ---- one layer's rung ------------------------------------------------------------------------------------------- */

static const struct solver_options options = {.warn = 1e-3, .limit = 0.1, .hold = 5};

static void expect_rung(const struct rung *r, int level, int before, int64_t since) {
    assert_int_equal(r->level, level);
    assert_int_equal(r->before, before);
    assert_int_equal(r->since, since);
}

static void test_climbing(void **state) {
    (void)state;
    struct rung r = {0};
    assert_false(rung_judge(&r, 0, 0.1, true, 1, &options)); /* as much as may be */
    assert_true(rung_judge(&r, 1, 0.2, true, 1, &options));
    expect_rung(&r, SOLVER_MORE, SOLVER_CHOSEN, 3);
    assert_int_equal(rung_level(&r, 2), SOLVER_CHOSEN);
    assert_int_equal(rung_level(&r, 3), SOLVER_MORE);
    assert_false(rung_judge(&r, 2, INFINITY, true, 1, &options)); /* queued before that was known */
    assert_false(rung_judge(&r, 3, INFINITY, false, 1, &options)); /* not its fault */
    assert_true(rung_judge(&r, 4, (double)NAN, true, 1, &options));
    expect_rung(&r, SOLVER_SEQUENTIAL, SOLVER_MORE, 6);
    assert_false(rung_judge(&r, 6, INFINITY, true, 1, &options)); /* there is nothing above */
}

static void test_coming_down(void **state) {
    (void)state;
    struct rung r = {.level = SOLVER_SEQUENTIAL, .before = SOLVER_MORE, .since = 10};
    struct solver_options for_ever = options;
    for_ever.hold = 0;
    for (int64_t step = 10; step < 14; step++) assert_false(rung_judge(&r, step, 0, true, 0, &options));
    assert_true(rung_judge(&r, 14, 0, true, 0, &options)); /* steps 10 to 14 are five */
    expect_rung(&r, SOLVER_MORE, SOLVER_SEQUENTIAL, 15);
    for (int64_t step = 15; step < 100; step++) assert_false(rung_judge(&r, step, 0, true, 0, &for_ever));
    assert_true(rung_judge(&r, 19, 0, true, 0, &options));
    expect_rung(&r, SOLVER_CHOSEN, SOLVER_MORE, 20);
    assert_false(rung_judge(&r, 30, 0, true, 0, &options)); /* where the config has it */
}

static void test_judged(void **state) {
    (void)state;
    struct cell_report worst[4] = {{.residual = 0.5f}, {.residual = 0}, {.residual = 2}, {.residual = 1e-3f}};
    assert_int_equal(ladder_judged(worst, 4), 4);
    worst[1].residual = INFINITY;
    assert_int_equal(ladder_judged(worst, 4), 2); /* it is judged, those behind it are not */
    worst[0].residual = NAN;
    assert_int_equal(ladder_judged(worst, 4), 1);
}

/* Levels of `STEPS` steps with reports that come one step late, where before the steps marked in `stops` nothing is
 * queued ahead: what a save or a stop does. */
enum { STEPS = 40 };

static void walk(uint64_t stops, uint64_t seed, int64_t hold, enum solver_level levels[STEPS]) {
    struct rung r = {0};
    struct solver_options short_hold = options;
    short_hold.hold = hold;
    for (int64_t begun = 0, done = 0; done < STEPS;) {
        bool wait = begun > done && (begun - done == 2 || begun == STEPS || stops >> begun & 1);
        if (!wait) {
            levels[begun] = rung_level(&r, begun);
            begun++;
            continue;
        }
        double drawn = rng_uniform((rng_key){.seed = seed, .purpose = RNG_TEST}, (uint64_t)done);
        bool fails = drawn < (levels[done] == SOLVER_CHOSEN ? 0.5 : 0.3) && levels[done] != SOLVER_SEQUENTIAL;
        rung_judge(&r, done, fails, true, 1, &short_hold);
        done++;
    }
}

static void test_stops_change_nothing(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 200; seed++) {
        enum solver_level whole[STEPS], stopped[STEPS];
        int64_t hold = 1 + (int64_t)seed % 7;
        uint64_t stops = rng_below((rng_key){.seed = 1, .purpose = RNG_TEST}, seed, UINT64_C(1) << STEPS);
        walk(0, seed, hold, whole);
        walk(stops, seed, hold, stopped);
        assert_memory_equal(whole, stopped, sizeof whole);
    }
}

/* ---- on several ranks ------------------------------------------------------------------------------------------- */

/* A mixer that says of itself what it is told to say: of each layer, at the level of the config, on this rank. */
static _Thread_local float said[2];
static struct mixer pretender;
static const struct mixer *inner;

static struct cell_solver pretend_solver(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T) {
    (void)layer, (void)ops, (void)B, (void)T;
    return (struct cell_solver){.method = CELL_NEWTON, .iterations = 3};
}

static void pretend_forward(const struct mixer_call *call) {
    float found = call->level == SOLVER_CHOSEN ? said[call->layer->solver] : 0;
    if (found > call->report->residual || isnan(found)) call->report->residual = found;
    inner->forward(call);
}

/* What each of three ranks says of two layers in a step, and what must come of it. */
static const struct {
    float of_rank[3][2];
    float worst[2];
    bool skipped;
} sayings[] = {
    {{{0, 0}, {0, 1e-4f}, {0, 0}}, {0, 1e-4f}, false},
    {{{0.2f, 0}, {0, 0.05f}, {0, 0.3f}}, {0.2f, 0.3f}, true},
    {{{0, 0}, {0, 0}, {0.1f, 0.1f}}, {0.1f, 0.1f}, false},
    {{{0, 0}, {0, NAN}, {3, 0}}, {3, INFINITY}, true},
    {{{INFINITY, 0}, {0, 0}, {0, 0}}, {INFINITY, 0}, true},
};
enum { SAYINGS = sizeof sayings / sizeof *sayings };

static void say_on_rank(struct comm *c, void *self) {
    (void)self;
    error err = {0};
    struct optimizer_options adamw = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8};
    config *text = NULL;
    struct model_config *mc = lm_config(&text, lm_models[0]);
    struct device *dev = NULL;
    struct model *m = NULL;
    struct optimizer *o = NULL;
    struct step *s = NULL;
    mc->solver_count = 2;
    for (int i = 0, solver = 0; i < mc->layer_count && solver < 2; i++) {
        mc->layers[i].mixer = &pretender;
        mc->layers[i].solver = solver++;
    }
    ASSERT(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err) == 0);
    ASSERT(model_open(&m, mc, dev, MODEL_TRAIN, 1, 5, c->rank, c->ranks, &err) == 0);
    model_init(m, 3);
    ASSERT(optimizer_open(&o, m, c, &adamw, &err) == 0);
    ASSERT(step_open(&s, m, o, c, 0.1, 0, 0.1f, &err) == 0);
    for (int64_t step = 0; step < 2 * SAYINGS; step++) { /* then once more, with both layers raised */
        const struct cell_report *worst;
        struct step_report report;
        int64_t k = step % SAYINGS;
        bool raised = step >= SAYINGS;
        for (int i = 0; i < 2; i++) said[i] = sayings[k].of_rank[c->rank][i];
        for (int i = 0; i < 2; i++) step_set_level(s, i, raised ? SOLVER_MORE : SOLVER_CHOSEN);
        step_begin(s, 1e-3, false);
        for (int part = 0; part < 2; part++) { /* the worst of a step's micro-batches, here the first */
            struct tokens t = tokens_draw(1, 5, LM_VOCAB, (uint64_t)(step + 100 * c->rank + part));
            step_batch(s, t.ids, t.targets, NULL, 1, 5, part == 1);
            tokens_free(&t);
            said[0] = said[1] = 0;
        }
        ASSERT(step_wait(s, &report, &worst, &err) == 0);
        ASSERT(report.skipped == (sayings[k].skipped && !raised));
        for (int i = 0; i < 2; i++) ASSERT(worst[i].residual == (raised ? 0 : sayings[k].worst[i]));
    }
    step_close(s);
    optimizer_close(o);
    model_close(m);
    device_close(dev);
    model_config_free(mc);
    config_free(text);
}

static void test_ranks(void **state) {
    (void)state;
    inner = mixer_find("mamba2");
    pretender = *inner;
    pretender.forward = pretend_forward;
    pretender.solver = pretend_solver;
    ranks_run(3, say_on_rank, NULL);
}

/* ---- with recurrences that Newton's method does not solve -------------------------------------------------------- */

enum { B = 2, T = 40 };
#define WILD(solver)                                                                                                   \
    "[model]\nd_model = 16\nvocab_size = 29\npad_vocab_to = 1\npattern = g l\n"                                       \
    "[block.g]\nmixer = pararnn\ncell = gru\nsolver = " solver "\n"                                                   \
    "[block.l]\nmixer = pararnn\ncell = lstm\nsolver = " solver "\n"

/* The cells' weights at 6, where the recurrence expands. */
static void make_wild(struct lm *lm) {
    const struct params *p = model_params(lm->m);
    for (int i = 0; i < p->count; i++) {
        if (!strstr(p->list[i].name, "cell.weight")) continue;
        double *values = malloc((size_t)p->list[i].count * sizeof *values);
        for (int64_t k = 0; k < p->list[i].count; k++) values[k] = 6;
        model_write_param(lm->m, i, values, DTYPE_F64);
        free(values);
    }
}

/* On a GPU the second and third step are recorded and replayed, and so are the last two. */
static void test_recorded_steps(void **state) {
    (void)state;
    error err = {0};
    struct lm lm;
    struct comm comm;
    struct optimizer *o = NULL;
    struct step *s = NULL;
    struct optimizer_options adamw = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8};
    lm_open(&lm, WILD("newton"), PRECISION_F32, MODEL_TRAIN, B, T);
    make_wild(&lm);
    comm_open_alone(&comm);
    assert_int_equal(optimizer_open(&o, lm.m, &comm, &adamw, &err), 0);
    assert_int_equal(step_open(&s, lm.m, o, &comm, 1.0 / (B * T), 0, 0.1, &err), 0);
    for (int step = 0; step < 6; step++) {
        struct tokens t = tokens_draw(B, T, LM_VOCAB, 7);
        const struct cell_report *worst;
        struct step_report report;
        if (step == 3) {
            for (int i = 0; i < 2; i++) step_set_level(s, i, SOLVER_SEQUENTIAL);
            assert_int_equal(model_solver(lm.m, 1, B, T).method, CELL_SEQUENTIAL);
        }
        step_begin(s, 1e-3, false);
        step_batch(s, t.ids, t.targets, t.doc, B, T, true);
        assert_int_equal(step_wait(s, &report, &worst, &err), 0);
        assert_int_equal(report.skipped, step < 3);
        assert_true(step < 3 ? report.totals.residual > 0.1 : report.totals.residual == 0);
        assert_true(isfinite(report.totals.loss.nll) || step < 3);
        for (int i = 0; i < 2; i++) assert_true((double)worst[i].residual <= report.totals.residual);
        tokens_free(&t);
    }
    step_close(s);
    optimizer_close(o);
    comm_close(&comm);
    lm_close(&lm);
}

struct text {
    int32_t tokens[8];
    int count;
};

static int collect(void *self, int32_t token) {
    struct text *t = self;
    t->tokens[t->count++] = token;
    return 0;
}

/* A prompt that the config's solver can't read gives what the sequential one gives, and leaves the model as it was. */
static void test_prompt(void **state) {
    (void)state;
    static const char *const texts[] = {WILD("sequential"), WILD("newton"), WILD("shooting")};
    struct text out[3] = {{.count = 0}};
    struct generate_options greedy = {.tokens = 8, .top_p = 1, .piece = 16, .eod = -1};
    struct tokens t = tokens_draw(1, T, LM_VOCAB, 11);
    for (int i = 0; i < 3; i++) {
        error err = {0};
        struct lm lm;
        lm_open(&lm, texts[i], PRECISION_F32, MODEL_INFER, 1, 16);
        make_wild(&lm);
        assert_int_equal(generate(lm.m, t.ids, T, &greedy, collect, &out[i], &err), 0);
        assert_int_equal(out[i].count, 8);
        assert_memory_equal(out[i].tokens, out[0].tokens, sizeof out[0].tokens);
        for (int k = 0; k < 2; k++) assert_int_equal(model_level(lm.m, k), SOLVER_CHOSEN);
        lm_close(&lm);
    }
    tokens_free(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_climbing),
        cmocka_unit_test(test_coming_down),
        cmocka_unit_test(test_judged),
        cmocka_unit_test(test_stops_change_nothing),
        cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_recorded_steps),
        cmocka_unit_test(test_prompt),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
