/* test_train_optimizer.c: AdamW over the ranks' slices against AdamW written out in double over whole tensors, for
 * one rank and for several (as threads): weights, moments, norm, clipping, decay, skipped steps, and the way
 * through a checkpoint. */
#include "common/rng.h"
#include "test/support_ranks.h"
#include "test/unit.h"
#include "train/optimizer.h"

#include <float.h>
#include <math.h>

#define NO NAN /* a number that a group does not give */

static const char model_text[] =
    "[model]\nd_model = 20\nvocab_size = 37\npad_vocab_to = 1\ntie_embeddings = false\npattern = m*2\n"
    "[block.m]\nmixer = mamba2\nmlp = swiglu\nmlp_width = 24\nd_state = 5\nhead_dim = 8\n";

enum { STEPS = 6, BUCKETS_MAX = 16, PARAMS_MAX = 64 };

/* What a run of the optimizer is to do, and what came out of it (written by rank 0). */
struct plan {
    enum precision precision;
    struct optimizer_options options;
    int bad_step, bad_rank; /* this rank's gradient holds an infinity then; -1: never */
    int not_finite_step;    /* the loss is said not to be finite then; -1: never */
    bool reload;            /* half-way through, m and v go to the host and into a new optimizer */

    double *weights[PARAMS_MAX], *m[PARAMS_MAX], *v[PARAMS_MAX];
    struct step_report reports[STEPS];
    int64_t steps_taken;
};

static struct model_config *model_config_make(config **c) {
    error err = {0};
    struct model_config *mc = NULL;
    ASSERT(config_parse(c, model_text, strlen(model_text), "test", &err) == 0);
    if (model_config_bind(&mc, *c, 0, &err) != 0) fail_msg("%s", err.text);
    return mc;
}

static double learning_rate(int step) { return 0.01 * (1 + step); }
static double valid_targets(int step) { return 37 + 11 * step; }
static const double scale = 1 / 64.0;

/* Element i of tensor `index` of rank r's gradient at a step: the sum over its targets, times scale. */
static double gradient(int rank, int step, int index, int64_t i) {
    rng_key key = {
        .seed = (uint64_t)(100 + rank), .purpose = RNG_TEST, .stream = (uint32_t)(step * PARAMS_MAX + index)};
    /* Different sizes at different steps, so that some are clipped and others are not. */
    return (float)(rng_normal(key, (uint64_t)i) * (step % 2 ? 0.002 : 0.06));
}

/* ---- the optimizer under test ----------------------------------------------------------------------------------- */

static void put_gradients(struct model *m, int rank, int step, bool bad) {
    const struct params *p = model_params(m);
    tensor grads = model_flat_grads(m);
    model_zero_grads(m);
    for (int index = 0; index < p->count; index++) {
        for (int64_t i = 0; i < p->list[index].count; i++) {
            double g = gradient(rank, step, index, i);
            if (bad && index == 3 && i == 1) g = INFINITY;
            if (grads.dtype == DTYPE_F64) ((double *)grads.data)[p->list[index].offset + i] = g;
            else ((float *)grads.data)[p->list[index].offset + i] = (float)g;
        }
    }
}

/* m (which = 0) or v of every tensor as doubles, on rank 0. */
static void read_moments(struct optimizer *o, struct model *m, const struct comm *c, int which, double **out) {
    const struct params *p = model_params(m);
    bool is_double = model_flat_grads(m).dtype == DTYPE_F64;
    for (int b = 0; b < p->bucket_count; b++) {
        const struct bucket *bucket = &p->buckets[b];
        char *all = c->rank == 0 ? malloc((size_t)bucket->count * sizeof(double)) : NULL;
        optimizer_gather(o, b, which, all);
        for (int index = bucket->first; index < bucket->first + bucket->params && c->rank == 0; index++) {
            int64_t at = p->list[index].offset - bucket->offset;
            out[index] = malloc((size_t)p->list[index].count * sizeof(double));
            for (int64_t i = 0; i < p->list[index].count; i++) {
                out[index][i] = is_double ? ((double *)(void *)all)[at + i] : (double)((float *)(void *)all)[at + i];
            }
        }
        free(all);
    }
}

/* All of o's state into a new optimizer, through the host memory of rank 0. */
static struct optimizer *reload(struct optimizer *old, struct model *m, struct comm *c,
                                const struct optimizer_options *options) {
    struct optimizer *o = NULL;
    error err = {0};
    ASSERT(optimizer_open(&o, m, c, options, &err) == 0);
    const struct params *p = model_params(m);
    for (int b = 0; b < p->bucket_count; b++) {
        for (int which = 0; which < 2; which++) {
            void *all = c->rank == 0 ? malloc((size_t)p->buckets[b].count * sizeof(double)) : NULL;
            optimizer_gather(old, b, which, all);
            optimizer_scatter(o, b, which, all);
            free(all);
        }
    }
    optimizer_set_steps(o, optimizer_steps(old));
    optimizer_close(old);
    return o;
}

static struct step_report take_step(struct optimizer *o, double lr, bool signalled) {
    struct step_report r;
    optimizer_begin(o, lr, signalled);
    optimizer_step(o, scale, 0.1);
    optimizer_fetch(o, &r, NULL);
    return r;
}

static void run_rank(struct comm *c, void *self) {
    struct plan *plan = self;
    error err = {0};
    config *cfg = NULL;
    struct model_config *mc = model_config_make(&cfg);
    struct device *dev = NULL;
    struct model *m = NULL;
    struct optimizer *o = NULL;
    ASSERT(device_open(&dev, DEVICE_CPU, plan->precision, &err) == 0);
    ASSERT(model_open(&m, mc, dev, MODEL_TRAIN, 1, 4, c->rank, c->ranks, &err) == 0);
    model_init(m, 5);
    ASSERT(optimizer_open(&o, m, c, &plan->options, &err) == 0);
    const struct params *p = model_params(m);
    for (int step = 0; step < STEPS; step++) {
        if (plan->reload && step == STEPS / 2) o = reload(o, m, c, &plan->options);
        if (step % 2) optimizer_settle(o);
        else optimizer_spread(o);
        for (int b = 0; b < p->bucket_count; b++) optimizer_await(o, b);
        put_gradients(m, c->rank, step, step == plan->bad_step && c->rank == plan->bad_rank);
        for (int b = p->bucket_count - 1; b >= 0; b--) optimizer_reduce(o, b);
        /* The targets lie with the last rank; a loss that is not finite, with the first. */
        *model_sums(m) = (struct loss_sums){
            .nll = step == plan->not_finite_step && c->rank == 0 ? NAN : 1,
            .valid = c->rank == c->ranks - 1 ? valid_targets(step) : 0,
        };
        struct step_report r = take_step(o, learning_rate(step), c->rank == step % c->ranks);
        if (c->rank == 0) plan->reports[step] = r;
        /* Every rank decides alike, and hears of one vote to stop. */
        double skipped = r.skipped;
        comm_sum_f64(c, &skipped, 1);
        ASSERT(skipped == (r.skipped ? c->ranks : 0) && r.totals.signals == 1);
        ASSERT(r.totals.loss.valid == valid_targets(step) && r.steps == optimizer_steps(o));
    }
    read_moments(o, m, c, 0, plan->m);
    read_moments(o, m, c, 1, plan->v);
    optimizer_settle(o);
    /* The last rank's weights: it got the others' slices by the gather. */
    for (int index = 0; index < p->count && c->rank == c->ranks - 1; index++) {
        plan->weights[index] = malloc((size_t)p->list[index].count * sizeof(double));
        model_read_param(m, index, plan->weights[index], DTYPE_F64);
    }
    if (c->rank == 0) plan->steps_taken = optimizer_steps(o);
    optimizer_close(o);
    model_close(m);
    device_close(dev);
    model_config_free(mc);
    config_free(cfg);
}

static void run_plan(struct plan *plan, int ranks) { ranks_run(ranks, run_rank, plan); }

static void plan_free(struct plan *plan) {
    for (int i = 0; i < PARAMS_MAX; i++) {
        free(plan->weights[i]);
        free(plan->m[i]);
        free(plan->v[i]);
    }
}

/* ---- AdamW in double over whole tensors ------------------------------------------------------------------------- */

static double mean_gradient(int ranks, int step, int index, int64_t i) {
    double sum = 0;
    for (int r = 0; r < ranks; r++) sum += gradient(r, step, index, i);
    return sum / (scale * valid_targets(step));
}

/* What groups_of_test says, tensor by tensor. */
struct rule {
    double lr_scale, weight_decay, low, high;
};
static struct rule rule_of(const struct optimizer_options *o, const struct param *param) {
    struct rule r = {1, o->decay == DECAY_ALL || param->decay ? o->weight_decay : 0, -INFINITY, INFINITY};
    if (o->group_count == 0) return r;
    bool second = strncmp(param->name, "backbone.layers.1.", 18) == 0;
    const char *end = strrchr(param->name, '.') + 1;
    if (strcmp(end, "A_log") == 0 || strcmp(end, "dt_bias") == 0) r.lr_scale = 0.25;
    if (second && strstr(param->name, "in_proj")) r.lr_scale = 4;
    if (strcmp(end, "D") == 0) r.weight_decay = 0.5;
    if (strstr(param->name, "out_proj")) r.weight_decay = 0;
    if (strcmp(end, "D") == 0 || strstr(param->name, "norm_f")) r.high = 0.97;
    if (strstr(param->name, "mlp.")) {
        r.low = -0.125;
        r.high = 0.25;
    }
    return r;
}

static const struct group_options groups_of_test[] = {
    {"slow", "*.A_log *.dt_bias", 0.25, NO, NO, NO},
    {"fast", "backbone.layers.1.*in_proj.weight", 4, NO, NO, NO},
    {"skips", "*.D", NO, 0.5, NO, NO},
    {"outputs", "*out_proj*", NO, 0, NO, NO},
    {"below", "*.mixer.D,\tbackbone.norm_f.weight", NO, NO, NO, 0.97},
    {"mlp", "*.mlp.*", NO, NO, -0.125, 0.25},
};

static void add_groups(struct plan *plan) {
    plan->options.group_count = sizeof groups_of_test / sizeof *groups_of_test;
    memcpy(plan->options.groups, groups_of_test, sizeof groups_of_test);
}

static void update_tensor(struct plan *want, const struct param *param, int index, int ranks, int step, int64_t t,
                          double clipping) {
    const struct optimizer_options *o = &want->options;
    struct rule rule = rule_of(o, param);
    double lr = rule.lr_scale * learning_rate(step), wd = (float)rule.weight_decay;
    /* Detached decay knows the course of the learning rate, neither its height nor the tensor's scale. */
    double loss = o->decay_mode == DECAY_DETACHED ? learning_rate(step) / o->lr * wd : lr * wd;
    for (int64_t i = 0; i < param->count; i++) {
        double g = mean_gradient(ranks, step, index, i) * clipping, *w = &want->weights[index][i];
        double *m = &want->m[index][i], *v = &want->v[index][i];
        *m = o->beta1 * *m + (1 - o->beta1) * g;
        *v = o->beta2 * *v + (1 - o->beta2) * g * g;
        double mh = *m / (1 - pow(o->beta1, (double)t)), vh = *v / (1 - pow(o->beta2, (double)t));
        *w -= loss * *w + lr * mh / (sqrt(vh) + o->eps);
        *w = fmin(fmax(*w, (float)rule.low), (float)rule.high);
    }
}

/* Fill `want` with what `plan` has to give. */
static void reference(struct plan *want, const struct plan *plan, int ranks) {
    config *cfg = NULL;
    struct model_config *mc = model_config_make(&cfg);
    const struct params *p = &mc->params;
    *want = (struct plan){.options = plan->options};
    ASSERT(p->count <= PARAMS_MAX);
    for (int index = 0; index < p->count; index++) {
        size_t count = (size_t)p->list[index].count;
        want->weights[index] = calloc(count, sizeof(double));
        want->m[index] = calloc(count, sizeof(double));
        want->v[index] = calloc(count, sizeof(double));
        params_initial(p, index, 5, want->weights[index], DTYPE_F64);
    }
    for (int step = 0; step < STEPS; step++) {
        double squares = 0;
        for (int index = 0; index < p->count; index++) {
            for (int64_t i = 0; i < p->list[index].count; i++) squares += pow(mean_gradient(ranks, step, index, i), 2);
        }
        want->reports[step] = (struct step_report){.grad_norm = sqrt(squares)};
        want->reports[step].skipped = step == plan->bad_step || step == plan->not_finite_step;
        if (want->reports[step].skipped) continue;
        double clipping = plan->options.clip > 0 ? fmin(1, plan->options.clip / (sqrt(squares) + 1e-6)) : 1;
        int64_t t = ++want->steps_taken;
        for (int index = 0; index < p->count; index++)
            update_tensor(want, &p->list[index], index, ranks, step, t, clipping);
    }
    model_config_free(mc);
    config_free(cfg);
}

static void compare_tensors(const char *what, double *const *got, double *const *want, double tolerance) {
    config *cfg = NULL;
    struct model_config *mc = model_config_make(&cfg);
    for (int index = 0; index < mc->params.count; index++) {
        double worst = 0, size = 1e-300;
        for (int64_t i = 0; i < mc->params.list[index].count; i++) {
            worst = fmax(worst, fabs(got[index][i] - want[index][i]));
            size = fmax(size, fabs(want[index][i]));
            assert_true(isfinite(got[index][i]));
        }
        if (worst > tolerance * size)
            fail_msg("%s of %s is off by %g of %g", what, mc->params.list[index].name, worst, size);
    }
    model_config_free(mc);
    config_free(cfg);
}

static void check_plan(struct plan plan, int ranks) {
    struct plan want;
    double tolerance = plan.precision == PRECISION_F64 ? 1e-12 : 3e-6;
    reference(&want, &plan, ranks);
    run_plan(&plan, ranks);
    for (int step = 0; step < STEPS; step++) {
        assert_int_equal(plan.reports[step].skipped, want.reports[step].skipped);
        if (step == plan.bad_step) assert_false(isfinite(plan.reports[step].grad_norm));
        else assert_true(fabs(plan.reports[step].grad_norm / want.reports[step].grad_norm - 1) < tolerance);
    }
    assert_int_equal(plan.steps_taken, want.steps_taken);
    compare_tensors("m", plan.m, want.m, tolerance);
    compare_tensors("v", plan.v, want.v, tolerance);
    compare_tensors("the value", plan.weights, want.weights, tolerance);
    plan_free(&plan);
    plan_free(&want);
}

static struct plan plan_make(enum precision precision) {
    return (struct plan){
        .precision = precision,
        .options =
            {.lr = 1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1, .decay = DECAY_TABLE},
        .bad_step = -1,
        .not_finite_step = -1,
    };
}

/* ---- tests ------------------------------------------------------------------------------------------------------ */

static void test_clip_matters(void **state) {
    (void)state;
    /* The test's gradients are clipped at some steps and not at others, or the comparisons below say nothing about
     * it. */
    struct plan plan = plan_make(PRECISION_F64), want;
    reference(&want, &plan, 1);
    assert_true(want.reports[0].grad_norm > 1.5 && want.reports[1].grad_norm < 0.9);
    plan_free(&want);
}

static void test_against_double(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++) {
        check_plan(plan_make(PRECISION_F64), ranks);
        check_plan(plan_make(PRECISION_F32), ranks);
    }
}

static void test_options(void **state) {
    (void)state;
    struct plan plan = plan_make(PRECISION_F64);
    plan.options.decay = DECAY_ALL;
    check_plan(plan, 3);
    plan.options.weight_decay = 0;
    plan.options.clip = 0;
    check_plan(plan, 3);
    plan.options.beta1 = 0;
    plan.options.beta2 = 0;
    plan.options.eps = 1e-3;
    check_plan(plan, 1);
}

static void test_skipped(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++) {
        struct plan plan = plan_make(PRECISION_F64);
        plan.bad_step = 2;
        plan.bad_rank = ranks - 1;
        check_plan(plan, ranks);
        plan.bad_step = -1;
        plan.not_finite_step = 0;
        check_plan(plan, ranks);
    }
}

static void test_no_valid_target(void **state) {
    (void)state;
    config *cfg = NULL;
    error err = {0};
    struct comm c;
    struct device *dev = NULL;
    struct model *m = NULL;
    struct optimizer *o = NULL;
    struct model_config *mc = model_config_make(&cfg);
    struct plan plan = plan_make(PRECISION_F32);
    assert_int_equal(comm_open(&c, &err), 0);
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err), 0);
    assert_int_equal(model_open(&m, mc, dev, MODEL_TRAIN, 1, 4, 0, 1, &err), 0);
    assert_int_equal(optimizer_open(&o, m, &c, &plan.options, &err), 0);
    model_zero_grads(m);
    for (int b = 0; b < model_params(m)->bucket_count; b++) optimizer_reduce(o, b);
    model_zero_sums(m);
    assert_true(take_step(o, 1, false).skipped);
    assert_int_equal(optimizer_steps(o), 0);
    optimizer_close(o);
    model_close(m);
    device_close(dev);
    model_config_free(mc);
    config_free(cfg);
    comm_close(&c);
}

static void test_through_a_checkpoint(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++) {
        struct plan plan = plan_make(PRECISION_F32), straight = plan_make(PRECISION_F32);
        plan.reload = true;
        run_plan(&plan, ranks);
        run_plan(&straight, ranks);
        compare_tensors("the value", plan.weights, straight.weights, 0); /* bit for bit */
        compare_tensors("v", plan.v, straight.v, 0);
        plan_free(&plan);
        plan_free(&straight);
    }
}

/* Groups that overlap without contradiction, on cuts of the tensors by several ranks, in both modes of decay. */
static void test_groups(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++) {
        for (int mode = DECAY_WITH_LR; mode <= DECAY_DETACHED; mode++) {
            struct plan plan = plan_make(ranks == 3 ? PRECISION_F32 : PRECISION_F64);
            plan.options.decay_mode = mode;
            plan.options.lr = 0.08; /* the peak of learning_rate would be 0.06 */
            if (ranks == 2) plan.options.decay = DECAY_ALL;
            check_plan(plan, ranks);
            add_groups(&plan);
            check_plan(plan, ranks);
        }
    }
}

/* The clamp of the comparison above is at work, and the two modes of decay differ. */
static void test_groups_matter(void **state) {
    (void)state;
    config *cfg = NULL;
    struct model_config *mc = model_config_make(&cfg);
    struct plan plan = plan_make(PRECISION_F64), want;
    add_groups(&plan);
    reference(&want, &plan, 1);
    int at_low = 0, at_high = 0, inside = 0;
    for (int index = 0; index < mc->params.count; index++) {
        if (!strstr(mc->params.list[index].name, "mlp.")) continue;
        for (int64_t i = 0; i < mc->params.list[index].count; i++) {
            at_low += want.weights[index][i] == -0.125;
            at_high += want.weights[index][i] == 0.25;
            inside += want.weights[index][i] > -0.125 && want.weights[index][i] < 0.25;
        }
    }
    assert_true(at_low > 10 && at_high > 10 && inside > 10);
    plan_free(&want);
    model_config_free(mc);
    config_free(cfg);
}

static void check_groups_refused(const struct group_options *groups, size_t count, const char *text) {
    config *cfg = NULL;
    error err = {0};
    struct model_config *mc = model_config_make(&cfg);
    struct optimizer_options options = {.lr = 1, .group_count = count};
    memcpy(options.groups, groups, count * sizeof *groups);
    assert_int_equal(groups_check(&mc->params, &options, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    if (strncmp(err.text, text, strlen(text)) != 0) fail_msg("'%s' does not start with '%s'", err.text, text);
    model_config_free(mc);
    config_free(cfg);
}

static void test_groups_refused(void **state) {
    (void)state;
    check_groups_refused((struct group_options[]){{"a", "*.A_lgo", 2, NO, NO, NO}}, 1,
                         "[group.a] match: no tensor has a name like *.A_lgo; the nearest is "
                         "backbone.layers.0.mixer.A_log; riverrun plan --tensors lists them");
    check_groups_refused((struct group_options[]){{"a", "*.bias backbone.layers.0.mixer.inproj.weight", 2, NO, NO, NO}},
                         1,
                         "[group.a] match: no tensor has a name like backbone.layers.0.mixer.inproj.weight; the "
                         "nearest is backbone.layers.0.mixer.in_proj.weight; ");
    check_groups_refused((struct group_options[]){{"a", "*mixer.norm.wieght", 2, NO, NO, NO}}, 1,
                         "[group.a] match: no tensor has a name like *mixer.norm.wieght; the nearest is "
                         "backbone.layers.0.mixer.norm.weight; ");
    check_groups_refused((struct group_options[]){{"a", "*.layers.7.*", 2, NO, NO, NO}}, 1,
                         "[group.a] match: no tensor has a name like *.layers.7.*; riverrun plan");
    check_groups_refused((struct group_options[]){{"a", " , ", 2, NO, NO, NO}}, 1, "[group.a] match is empty");
    struct group_options twice[] = {{"a", "*.D", 2, NO, NO, NO}, {"b", "*.dt_bias *layers.1.*", 1, NO, NO, NO}};
    check_groups_refused(twice, 2,
                         "[group.a] and [group.b] both give lr_scale to backbone.layers.1.mixer.D; leave it to one");
    struct group_options empty[] = {{"a", "*.D", NO, NO, 1, NO}, {"b", "*.D", NO, NO, NO, 0.5}};
    check_groups_refused(empty, 2, "clamp_min = 1 is above clamp_max = 0.5 for backbone.layers.0.mixer.D");
}

/* What a segment says about one element, in a byte that is different for the treatments of the test below. */
static uint8_t mark(double decay, double lr_scale, double high) {
    return (uint8_t)(1 + (decay == 0.5) + 2 * (lr_scale == 0.25) + 4 * (high == 2));
}

static void mark_slice(const struct params *p, int b, int part, int rank, const struct treatment *treatments,
                       uint8_t *seen) {
    const struct bucket *bucket = &p->buckets[b];
    struct adamw_segment segments[PARAMS_MAX];
    int64_t offset, count;
    params_slice(p, b, part, rank, &offset, &count);
    int n = optimizer_segments(p, bucket->first, bucket->params, offset, count, treatments, DECAY_DETACHED, segments);
    assert_int_equal(n, optimizer_segments(p, bucket->first, bucket->params, offset, count, treatments, DECAY_DETACHED,
                                           NULL));
    for (int s = 0; s < n; s++) {
        const struct adamw_segment *g = &segments[s];
        assert_true(g->offset >= 0 && g->offset + g->count <= count);
        assert_int_equal(g->clamped, g->clamp_max == 2);
        for (int64_t i = 0; i < g->count; i++) {
            assert_int_equal(seen[offset + g->offset + i], 0);
            seen[offset + g->offset + i] = mark(g->decay, g->lr_scale, g->clamp_max);
        }
    }
}

static void check_segments(const struct model_config *mc, const struct treatment *treatments, int ranks, bool rounds) {
    struct params p;
    assert_int_equal(params_copy(&p, &mc->params, &(error){0}), 0);
    params_layout(&p, ranks, rounds);
    uint8_t *seen = calloc((size_t)p.elements, 1);
    for (int b = 0; b < p.bucket_count; b++) {
        for (int r = 0; r < PARTS * ranks; r++) mark_slice(&p, b, r % PARTS, r / PARTS, treatments, seen);
    }
    int64_t covered = 0;
    for (int index = 0; index < p.count; index++) {
        const char *name = p.list[index].name;
        bool slow = strstr(name, "A_log") || strstr(name, "in_proj");
        bool below = strstr(name, "mixer.D") || strstr(name, "conv1d.bias") || strstr(name, "norm");
        uint8_t want = mark(p.list[index].decay ? 0.5 : 0, slow ? 0.25 : 1, below ? 2 : INFINITY);
        for (int64_t i = 0; i < p.list[index].count; i++) assert_int_equal(seen[p.list[index].offset + i], want);
        covered += p.list[index].count;
    }
    for (int64_t i = 0; i < p.elements; i++) covered -= seen[i] != 0;
    assert_int_equal(covered, 0); /* nothing between the tensors */
    free(seen);
    params_close(&p);
}

/* Segments of every possible cut cover what the tensors hold, once each, with their tensor's treatment. */
static void test_segments(void **state) {
    (void)state;
    config *cfg = NULL;
    error err = {0};
    struct model_config *mc = model_config_make(&cfg);
    struct optimizer_options options = {.weight_decay = 0.5, .group_count = 2,
                                        .groups = {{"a", "*.A_log *in_proj*", 0.25, NO, NO, NO},
                                                   {"b", "*.D *conv1d.bias *norm*", NO, NO, NO, 2}}};
    struct treatment treatments[PARAMS_MAX];
    assert_int_equal(groups_treat(treatments, &mc->params, &options, &err), 0);
    for (int ranks = 1; ranks <= 7; ranks += 3) {
        for (int rounds = 0; rounds < 2; rounds++) check_segments(mc, treatments, ranks, rounds);
    }
    model_config_free(mc);
    config_free(cfg);
}

/* Tensors without a gap between them: one run where all is alike, another wherever one number differs. */
static void test_neighbours(void **state) {
    (void)state;
    struct params p;
    params_open(&p);
    for (int i = 0; i < 7; i++) {
        params_add(&p, 1, (int64_t[]){PARAM_ALIGN}, (struct init){INIT_CONSTANT, 0, 0, 0}, false, true, "t%d", i);
    }
    params_layout(&p, 1, false);
    struct treatment treatments[7];
    for (int i = 0; i < 7; i++) treatments[i] = (struct treatment){1, 0.5, -INFINITY, INFINITY};
    treatments[0].clamp_max = 3;
    treatments[2].lr_scale = 2; /* in detached mode the decay of it is that of its neighbours */
    treatments[3].weight_decay = 0;
    treatments[4].weight_decay = 0;
    treatments[4].clamp_min = -1;
    treatments[5].clamp_max = 1;
    treatments[6].clamp_max = 1;
    struct adamw_segment segments[7];
    int n = optimizer_segments(&p, 0, 7, 0, p.elements, treatments, DECAY_DETACHED, segments);
    static const int64_t want[6] = {1, 1, 1, 1, 1, 2};
    assert_int_equal(n, 6);
    for (int s = 0; s < n; s++) assert_int_equal(segments[s].count, want[s] * PARAM_ALIGN);
    assert_true(segments[2].lr_scale == 2 && segments[2].decay == 0.5f);
    assert_true(segments[4].clamped && segments[4].clamp_min == -1 && isinf(segments[4].clamp_max));
    assert_true(segments[5].clamped && segments[5].clamp_max == 1 && !segments[3].clamped);
    params_close(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clip_matters),    cmocka_unit_test(test_against_double),
        cmocka_unit_test(test_options),         cmocka_unit_test(test_skipped),
        cmocka_unit_test(test_no_valid_target), cmocka_unit_test(test_through_a_checkpoint),
        cmocka_unit_test(test_segments),        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_groups_matter),   cmocka_unit_test(test_groups_refused),
        cmocka_unit_test(test_neighbours),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
