/* test_model_gradients.c: the gradients of the whole model, in double, against finite differences: every tensor of
 * several models, along a random direction through all of its elements and at single random elements. The loss includes
 * masked targets, documents, the z term and, in one case, a state carried in. On a GPU, which has no double, the
 * gradients of the same models are compared with the CPU's. */
#include "test/support_model.h"
#include "test/unit.h"

#include "common/rng.h"
#include <math.h>

enum { B = 2, T = 11, VOCAB = 13 };
static const double scale = 0.3, z_loss = 0.02;

struct problem {
    struct lm lm;
    struct tokens t;
    bool documents;
    struct model_state *initial; /* NULL: zero */
    struct problem *reference;   /* on a GPU: the same on the CPU, in double */
};

/* scale * (sum of losses + z terms) at the current weights. */
static double objective(struct problem *p) {
    struct loss_sums sums;
    lm_set(&p->lm, &p->t, p->documents);
    model_zero_sums(p->lm.m);
    model_forward(p->lm.m, p->initial, NULL, false);
    model_loss(p->lm.m, NULL, false, scale, z_loss);
    model_read_sums(p->lm.m, &sums);
    return scale * (sums.nll + sums.z);
}

/* A tensor's weights are moved along `direction`; returns the central difference. */
static double slope(struct problem *p, int index, const double *direction) {
    const double h = 1e-5;
    int64_t count = model_params(p->lm.m)->list[index].count;
    double *w = malloc((size_t)count * sizeof *w), *moved = malloc((size_t)count * sizeof *moved), values[2];
    model_read_param(p->lm.m, index, w, DTYPE_F64);
    for (int side = 0; side < 2; side++) {
        for (int64_t i = 0; i < count; i++) moved[i] = w[i] + (side ? h : -h) * direction[i];
        model_write_param(p->lm.m, index, moved, DTYPE_F64);
        values[side] = objective(p);
    }
    model_write_param(p->lm.m, index, w, DTYPE_F64);
    free(w);
    free(moved);
    return (values[1] - values[0]) / (2 * h);
}

static void expect_slope(struct problem *p, int index, const double *direction, const double *grad, const char *what) {
    const struct param *t = &model_params(p->lm.m)->list[index];
    double want = slope(p, index, direction), got = 0;
    for (int64_t i = 0; i < t->count; i++) got += grad[i] * direction[i];
    /* Rounding of two losses near 20, divided by 2h, and the third derivative times h^2. */
    double allowed = 3e-9 + 1e-8 * fabs(want);
    if (!(fabs(got - want) <= allowed))
        fail_msg("%s, %s: the gradient says %.12g, finite differences say %.12g", t->name, what, got, want);
}

static void check_tensor(struct problem *p, int index, const double *grad) {
    int64_t count = model_params(p->lm.m)->list[index].count;
    double *direction = calloc((size_t)count, sizeof *direction);
    rng_key key = {.seed = 3, .purpose = RNG_TEST, .stream = (uint32_t)index};
    for (int64_t i = 0; i < count; i++) direction[i] = rng_normal(key, (uint64_t)i) / sqrt((double)count);
    expect_slope(p, index, direction, grad, "all elements");
    for (int k = 0; k < 3; k++) {
        uint64_t element = rng_below(key, (uint64_t)(1000 + k), (uint64_t)count);
        memset(direction, 0, (size_t)count * sizeof *direction);
        direction[element] = 1;
        expect_slope(p, index, direction, grad, "one element");
    }
    free(direction);
}

static double *gradients(struct problem *p) {
    lm_set(&p->lm, &p->t, p->documents);
    model_zero_grads(p->lm.m);
    model_zero_sums(p->lm.m);
    model_forward(p->lm.m, p->initial, NULL, true);
    model_loss(p->lm.m, NULL, true, scale, z_loss);
    model_backward(p->lm.m, NULL, NULL);
    return lm_read_grads(&p->lm);
}

/* The few numbers of a small tensor may be long sums that nearly cancel. */
static void expect_same(const struct param *t, const double *got, const double *want) {
    double distance = relative_error(got, want, t->count), allowed = t->count < 16 ? 2.5 * lm_limit(0) : lm_limit(0);
    if (!(distance <= allowed)) fail_msg("%s: the GPU's gradient is %g from the CPU's", t->name, distance);
}

static void check_model(struct problem *p) {
    double *grads = gradients(p), *want = p->reference ? gradients(p->reference) : NULL;
    const struct params *table = model_params(p->lm.m);
    for (int i = 0; i < table->count; i++) {
        const double *grad = grads + table->list[i].offset;
        double size = 0;
        for (int64_t k = 0; k < table->list[i].count; k++) size += grad[k] * grad[k];
        assert_true(size > 0); /* no tensor is left out */
        if (want) expect_same(&table->list[i], grad, want + table->list[i].offset);
        else check_tensor(p, i, grad);
    }
    free(grads);
    free(want);
}

static void open_problem(struct problem *p, const char *text, int64_t length, bool documents) {
    *p = (struct problem){.t = tokens_draw(B, length, VOCAB, 17), .documents = documents};
    lm_open(&p->lm, text, PRECISION_F64, MODEL_TRAIN, B, length);
    if (!lm_on_gpu()) return;
    p->reference = calloc(1, sizeof *p->reference);
    *p->reference = (struct problem){.t = tokens_draw(B, length, VOCAB, 17), .documents = documents};
    lm_open_cpu(&p->reference->lm, text, PRECISION_F64, MODEL_TRAIN, B, length);
    lm_copy_params(&p->reference->lm, &p->lm);
}

static void close_problem(struct problem *p) {
    if (p->reference) close_problem(p->reference);
    free(p->reference);
    model_state_close(p->initial);
    tokens_free(&p->t);
    lm_close(&p->lm);
}

#define MODEL "[model]\nd_model = 8\nvocab_size = 13\npad_vocab_to = 4\n"
#define BLOCK "[block.m]\nmixer = mamba2\nd_state = 5\nhead_dim = 4\nchunk = 4\n"
#define MAMBA "[block.s]\nmixer = mamba\nd_state = 3\n"
#define MLSTM "[block.x]\nmixer = mlstm\nheads = 2\neps = 0\nchunk = 4\n"
/* See STEADY in support_model.c. */
#define PREUP "norm_eps = 0.1\npattern = u*2\n[block.u]\nmixer = mlstm_preup\nheads = 2\nchunk = 4\neps = 0\n"
#define PARARNN "[block.p]\nmixer = pararnn\n"
#define SLSTM "norm = layer\npattern = y*2\n[block.y]\nmixer = slstm\nheads = 2\n"

/* The models of every other test, with documents and without. */
static void test_listed(void **state) {
    (void)state;
    for (int i = 0; i < 2 * lm_model_count; i++) {
        struct problem p;
        open_problem(&p, lm_models[i / 2], 6, i % 2);
        check_model(&p);
        close_problem(&p);
    }
}

static void test_tied(void **state) {
    (void)state;
    for (int documents = 0; documents < 2; documents++) {
        struct problem p;
        open_problem(&p, MODEL "pattern = m*2\n" BLOCK, T, documents);
        check_model(&p);
        close_problem(&p);
    }
}

/* Mamba beside Mamba-2, with wide and with low ranks of the step sizes. */
static void test_mamba(void **state) {
    (void)state;
    static const char *const models[] = {
        MODEL "pattern = s*2\n" MAMBA,
        MODEL "tie_embeddings = false\npattern = s m\n" MAMBA "dt_rank = 5\nd_conv = 3\nmlp = swiglu\nmlp_width = 6\n"
              BLOCK,
    };
    for (int i = 0; i < 4; i++) {
        struct problem p;
        open_problem(&p, models[i / 2], T, i % 2);
        check_model(&p);
        close_problem(&p);
    }
}

static void test_untied_mlp_groups(void **state) {
    (void)state;
    struct problem p;
    open_problem(&p, MODEL "tie_embeddings = false\npattern = m k\n" BLOCK "n_groups = 2\nmlp = swiglu\nmlp_width = 6\n"
                           "[block.k]\nmixer = mamba2\nhead_dim = 16\nd_state = 3\nd_conv = 2\nchunk = 16\n", T, true);
    check_model(&p);
    close_problem(&p);
}

/* Clamped step sizes pass no gradient to dt's columns; a large eps shows in the norms. */
static void test_limits(void **state) {
    (void)state;
    struct problem p;
    open_problem(&p, MODEL "norm_eps = 0.05\npattern = m\n" BLOCK "dt_limit_min = 0.01\ndt_limit_max = 0.04\n", T,
                 true);
    check_model(&p);
    close_problem(&p);
}

/* The state that another batch leaves. */
static void carry_in(struct problem *p) {
    error err = {0};
    struct tokens before = tokens_draw(B, T, VOCAB, 23);
    assert_int_equal(model_state_open(&p->initial, p->lm.m, B, &err), 0);
    lm_set(&p->lm, &before, false);
    model_forward(p->lm.m, NULL, p->initial, false);
    tokens_free(&before);
}

/* A state from before the batch enters the gradients of the convolution, of A and of C. */
static void check_initial_state(const char *text) {
    for (int documents = 0; documents < 2; documents++) {
        struct problem p;
        open_problem(&p, text, T, documents);
        carry_in(&p);
        if (p.reference) carry_in(p.reference);
        double with = objective(&p);
        struct model_state *kept = p.initial;
        p.initial = NULL;
        assert_true(fabs(objective(&p) - with) > 1e-6);
        p.initial = kept;
        check_model(&p);
        close_problem(&p);
    }
}

static void test_initial_state(void **state) {
    (void)state;
    check_initial_state(MODEL "pattern = m*2\n" BLOCK);
    check_initial_state(MODEL "pattern = s*2\n" MAMBA);
    check_initial_state(MODEL "norm_eps = 0.1\npattern = x*2\n" MLSTM);
    /* Widths that keep neighbouring weights from being one matrix. */
    check_initial_state("[model]\nd_model = 12\nvocab_size = 13\npad_vocab_to = 4\nnorm_eps = 0.1\n"
                        "pattern = x*2\n" MLSTM "input_gate = sigmoid\nmlp = swiglu\nmlp_width = 6\n");
    check_initial_state(MODEL PREUP);
    check_initial_state(MODEL SLSTM);
    check_initial_state(MODEL "norm_eps = 0.1\npattern = p*2\n" PARARNN
                              "cell = lstm\nsolver = newton\niterations = 16\n");
    check_initial_state(MODEL "norm_eps = 0.1\npattern = p*2\n" PARARNN
                              "cell = gru\nresidual_scale = true\nsolver = shooting\nchunk = 3\niterations = 8\n");
}

static double norm_of(const double *values, int64_t count) {
    double squares = 0;
    for (int64_t i = 0; i < count; i++) squares += values[i] * values[i];
    return sqrt(squares);
}

/* What is nothing but rounding on the CPU, which computes in double, must be next to nothing on the GPU. */
static void expect_same_or_nothing(const struct params *table, int index, const double *got, const double *want) {
    const struct param *t = &table->list[index];
    double whole = norm_of(want, table->elements);
    if (norm_of(want + t->offset, t->count) > 1e-9 * whole) expect_same(t, got + t->offset, want + t->offset);
    else if (!(norm_of(got + t->offset, t->count) <= lm_limit(0) * whole))
        fail_msg("%s: the GPU's gradient is %g, but there is none", t->name, norm_of(got + t->offset, t->count));
}

/* One token: decays of a state do nothing, and so does the input gate of an mLSTM whose normaliser it cancels from. */
static void check_one_token(const char *text) {
    struct problem p;
    open_problem(&p, text, 1, false);
    for (int i = 0; i < B; i++) p.t.targets[i] = 1 + i;
    if (p.reference) memcpy(p.reference->t.targets, p.t.targets, B * sizeof *p.t.targets);
    double *grads = gradients(&p), *want = p.reference ? gradients(p.reference) : NULL;
    const struct params *table = model_params(p.lm.m);
    for (int i = 0; i < table->count; i++) {
        if (want) expect_same_or_nothing(table, i, grads, want);
        else check_tensor(&p, i, grads + table->list[i].offset);
    }
    free(grads);
    free(want);
    close_problem(&p);
}

static void test_one_token(void **state) {
    (void)state;
    check_one_token(MODEL "pattern = m\n" BLOCK);
    check_one_token(MODEL "pattern = s\n" MAMBA);
    check_one_token(MODEL "norm_eps = 0.1\npattern = x\n" MLSTM);
    check_one_token(MODEL PREUP);
    check_one_token(MODEL SLSTM);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_listed),    cmocka_unit_test(test_tied),   cmocka_unit_test(test_untied_mlp_groups),
        cmocka_unit_test(test_mamba),     cmocka_unit_test(test_limits), cmocka_unit_test(test_initial_state),
        cmocka_unit_test(test_one_token),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
