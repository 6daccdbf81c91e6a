/* test_train_step.c: a step as queued work: reports that are read late are those that are read at once, in their order;
 * a step without a valid target, or whose loss is not finite, is skipped by its own word and changes nothing. */
#include "test/support_model.h"
#include "test/unit.h"
#include "train/step.h"

#include <math.h>

enum { STEPS = 7, ACCUMULATE = 3, B = 2, T = 9, MASKED = 2, SIGNALLED = 4 };

struct run {
    struct lm lm;
    struct comm comm;
    struct optimizer *optimizer;
    struct step *step;
    struct step_report reports[STEPS];
    int reported;
    double *weights;
};

static void run_open(struct run *r) {
    error err = {0};
    struct optimizer_options options = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    *r = (struct run){.reported = 0};
    lm_open(&r->lm, lm_models[0], PRECISION_F32, MODEL_TRAIN, B, T);
    comm_open_alone(&r->comm);
    assert_int_equal(optimizer_open(&r->optimizer, r->lm.m, &r->comm, &options, &err), 0);
    assert_int_equal(step_open(&r->step, r->lm.m, r->optimizer, &r->comm, 1.0 / (ACCUMULATE * B * T), 1e-4, 0.1,
                               &err), 0);
}

static void run_close(struct run *r) {
    step_close(r->step);
    optimizer_close(r->optimizer);
    lm_close(&r->lm);
    comm_close(&r->comm);
    free(r->weights);
}

static double *read_weights(const struct lm *lm) {
    const struct params *p = model_params(lm->m);
    double *all = malloc((size_t)p->total * sizeof *all), *at = all;
    for (int i = 0; i < p->count; at += p->list[i++].count) model_read_param(lm->m, i, at, DTYPE_F64);
    return all;
}

/* Step number `number`; of step MASKED no target is valid. */
static void begin(struct run *r, int number) {
    step_begin(r->step, 0.01 * (number + 1), number == SIGNALLED);
    for (int k = 0; k < ACCUMULATE; k++) {
        struct tokens t = tokens_draw(B, T, LM_VOCAB, (uint64_t)(number * ACCUMULATE + k));
        for (int i = 0; number == MASKED && i < B * T; i++) t.targets[i] = -1;
        step_batch(r->step, t.ids, t.targets, t.doc, t.B, t.T, k + 1 == ACCUMULATE);
        tokens_free(&t); /* the arrays are ours again at once */
    }
}

static void finish(struct run *r) {
    error err = {0};
    assert_int_equal(step_wait(r->step, &r->reports[r->reported++], NULL, &err), 0);
}

/* All steps, each waited for when `ahead` more are queued. */
static void take_steps(struct run *r, int ahead) {
    for (int number = 0; number < STEPS; number++) {
        begin(r, number);
        if (number >= ahead) finish(r);
    }
    while (r->reported < STEPS) finish(r);
    r->weights = read_weights(&r->lm);
}

static void test_late_reports(void **state) {
    (void)state;
    struct run at_once, late;
    run_open(&at_once);
    run_open(&late);
    take_steps(&at_once, 0);
    take_steps(&late, 1);
    for (int i = 0; i < STEPS; i++) {
        const struct step_report *a = &at_once.reports[i], *b = &late.reports[i];
        assert_memory_equal(&a->totals, &b->totals, sizeof a->totals);
        assert_int_equal(a->skipped, i == MASKED);
        assert_int_equal(b->skipped, i == MASKED);
        assert_int_equal(a->steps, i < MASKED ? i + 1 : i);
        assert_int_equal(b->steps, a->steps);
        assert_true(a->totals.signals == (i == SIGNALLED));
        assert_true(i == MASKED || a->grad_norm == b->grad_norm);
    }
    assert_memory_equal(at_once.weights, late.weights, (size_t)model_params(late.lm.m)->total * sizeof(double));
    run_close(&at_once);
    run_close(&late);
}

static void test_not_finite(void **state) {
    (void)state;
    struct run r;
    run_open(&r);
    int norm = model_get_config(r.lm.m)->final_norm;
    int64_t count = model_params(r.lm.m)->list[norm].count;
    double *kept = malloc((size_t)count * sizeof *kept), *broken = malloc((size_t)count * sizeof *broken);
    begin(&r, 0);
    finish(&r);
    assert_false(r.reports[0].skipped);
    model_read_param(r.lm.m, norm, kept, DTYPE_F64);
    for (int64_t i = 0; i < count; i++) broken[i] = i ? kept[i] : INFINITY;
    model_write_param(r.lm.m, norm, broken, DTYPE_F64);
    double *before = read_weights(&r.lm);
    begin(&r, 1);
    finish(&r);
    assert_true(r.reports[1].skipped && r.reports[1].steps == 1);
    double *after = read_weights(&r.lm);
    assert_memory_equal(before, after, (size_t)model_params(r.lm.m)->total * sizeof *before);
    model_write_param(r.lm.m, norm, kept, DTYPE_F64);
    begin(&r, 3);
    finish(&r);
    assert_true(!r.reports[2].skipped && r.reports[2].steps == 2 && optimizer_steps(r.optimizer) == 2);
    free(before);
    free(after);
    free(kept);
    free(broken);
    run_close(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_late_reports),
        cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
