/* test_train_pararnn.c: a ParaRNN being trained: the limit of its cells' weights holds after every step, on every rank
 * that holds a share of them, and for nothing else. */
#include "test/support_model.h"
#include "test/support_ranks.h"
#include "test/unit.h"
#include "train/optimizer.h"

#include <math.h>

#define LIMIT 0.0625

static const char text[] = "[model]\nd_model = 16\nvocab_size = 29\npad_vocab_to = 8\npattern = g l n\n"
                           "[block.g]\nmixer = pararnn\ncell = gru\nweight_limit = 0.0625\n"
                           "[block.l]\nmixer = pararnn\ncell = lstm\nweight_limit = 0.0625\n"
                           "[block.n]\nmixer = pararnn\ncell = mgru\nweight_limit = 0\n";

/* Steps that go far, from the gradients of a batch of the rank's own. */
static void take_steps(struct lm *lm, struct optimizer *o, const struct comm *c) {
    const struct params *p = model_params(lm->m);
    for (int step = 0; step < 3; step++) {
        struct tokens t = tokens_draw(2, 12, LM_VOCAB, (uint64_t)(10 * step + c->rank));
        optimizer_settle(o);
        model_zero_grads(lm->m);
        model_zero_sums(lm->m);
        lm_grads(lm, &t, true, 1, 0);
        for (int b = p->bucket_count - 1; b >= 0; b--) optimizer_reduce(o, b);
        optimizer_begin(o, 0.05, false);
        optimizer_step(o, 1, INFINITY);
        tokens_free(&t);
    }
    optimizer_settle(o);
}

static void check_limits(const struct lm *lm) {
    const struct params *p = model_params(lm->m);
    for (int i = 0; i < p->count; i++) {
        const struct param *param = &p->list[i];
        int64_t at_limit = 0, beyond = 0;
        double *values = malloc((size_t)param->count * sizeof *values);
        model_read_param(lm->m, i, values, DTYPE_F64);
        for (int64_t k = 0; k < param->count; k++) {
            at_limit += fabs(values[k]) == LIMIT;
            beyond += fabs(values[k]) > LIMIT;
        }
        ASSERT(param->clamp > 0 ? at_limit > 0 && beyond == 0 : beyond > 0);
        free(values);
    }
}

static void run_rank(struct comm *c, void *self) {
    (void)self;
    error err = {0};
    struct lm lm = {0};
    struct optimizer *o = NULL;
    struct optimizer_options options = {.lr = 0.05, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 1e-3,
                                        .decay = DECAY_ALL, .decay_mode = DECAY_DETACHED, .clip = 1};
    lm.mc = lm_config(&lm.c, text);
    ASSERT(device_open(&lm.dev, DEVICE_CPU, PRECISION_F64, &err) == 0);
    ASSERT(model_open(&lm.m, lm.mc, lm.dev, MODEL_TRAIN, 2, 12, c->rank, c->ranks, &err) == 0);
    lm.real = sizeof(double);
    model_init(lm.m, 3);
    ASSERT(optimizer_open(&o, lm.m, c, &options, &err) == 0);
    take_steps(&lm, o, c);
    check_limits(&lm);
    optimizer_close(o);
    lm_close(&lm);
}

static void test_limit(void **state) {
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks += 2) ranks_run(ranks, run_rank, NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_limit)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
