/* test_model_recompute.c: what backward computes a second time comes out as it was: gradients of every level of
 * recomputation and of every span are those of a model that keeps everything, bit for bit; each level keeps less. */
#include "test/support_model.h"
#include "test/unit.h"

#include <stdio.h>

enum { B = 3, T = 11 };

/* Blocks of several mixers, with an MLP and without, some with a scale on the stream, in a pattern in which some layers
 * are computed again, others not. */
static void write_text(char *out, size_t size, const char *level, const char *other, int span) {
    snprintf(out, size,
             "[model]\nd_model = 16\nvocab_size = 29\npad_vocab_to = 8\npattern = m s*2 k x l m*3 x g s\n"
             "recompute_span = %d\n"
             "[block.m]\nmixer = mamba2\nd_state = 8\nhead_dim = 8\nchunk = 4\nrecompute = %s\n"
             "[block.s]\nmixer = mamba\nd_state = 5\nrecompute = %s\nmlp = swiglu\nmlp_width = 24\n"
             "residual_scale = true\n"
             "[block.k]\nmixer = mamba2\nhead_dim = 16\nd_state = 4\nd_conv = 2\nrecompute = %s\n"
             "[block.x]\nmixer = mlstm\nheads = 2\nchunk = 4\nrecompute = %s\n"
             "[block.l]\nmixer = pararnn\ncell = lstm\nsolver = newton\nresidual_scale = true\nrecompute = %s\n"
             "[block.g]\nmixer = pararnn\ncell = gru\nsolver = shooting\nchunk = 4\nresidual_scale = true\n"
             "recompute = %s\nmlp = gelu\nmlp_width = 24\n",
             span, level, level, other, level, level, other);
}

static struct lm open_level(const char *level, const char *other, int span) {
    char text[2048];
    struct lm lm;
    write_text(text, sizeof text, level, other, span);
    lm_open(&lm, text, PRECISION_F32, MODEL_TRAIN, B, T);
    return lm;
}

static double *gradients(struct lm *lm) {
    struct tokens first = tokens_draw(B, T, LM_VOCAB, 1), second = tokens_draw(2, T - 4, LM_VOCAB, 2);
    model_zero_grads(lm->m);
    lm_grads(lm, &first, true, 1, 1e-3);
    lm_loss(lm, &first, false, NULL); /* a validation in between uses the same places */
    lm_grads(lm, &second, false, 0.5, 0);
    tokens_free(&first);
    tokens_free(&second);
    return lm_read_grads(lm);
}

/* The same with a state carried in, which the second computation reads again. */
static double *gradients_of_the_rest(struct lm *lm) {
    error err = {0};
    struct model_state *state;
    struct tokens all = tokens_draw(B, T, LM_VOCAB, 3), head = tokens_cut(&all, 0, B, 0, 4);
    struct tokens rest = tokens_cut(&all, 0, B, 4, T - 4);
    assert_int_equal(model_state_open(&state, lm->m, B, &err), 0);
    lm_set(lm, &head, true);
    model_forward(lm->m, NULL, state, false);
    model_zero_grads(lm->m);
    lm_set(lm, &rest, false);
    model_forward(lm->m, state, NULL, true);
    model_loss(lm->m, NULL, true, 1, 0);
    model_backward(lm->m, NULL, NULL);
    model_state_close(state);
    tokens_free(&all);
    tokens_free(&head);
    tokens_free(&rest);
    return lm_read_grads(lm);
}

static void compare(const char *level, const char *other, int span) {
    struct lm kept = open_level("none", "none", 1), again = open_level(level, other, span);
    int64_t count = model_params(kept.m)->elements;
    for (int carried = 0; carried < 2; carried++) {
        double *(*run)(struct lm *lm) = carried ? gradients_of_the_rest : gradients;
        double *want = run(&kept), *got = run(&again);
        for (int64_t i = 0; i < count; i++) {
            if (got[i] == want[i]) continue;
            fail_msg("recompute = %s, %s, span %d: gradient %lld is %g, not %g", level, other, span, (long long)i,
                     got[i], want[i]);
        }
        free(want);
        free(got);
    }
    lm_close(&kept);
    lm_close(&again);
}

static void test_levels(void **state) {
    (void)state;
    static const char *const levels[] = {"light", "scan", "layer"};
    for (int i = 0; i < 3; i++) {
        compare(levels[i], "none", 1);
        compare("none", levels[i], 1);
        compare(levels[i], levels[(i + 1) % 3], 1);
    }
}

static void test_spans(void **state) {
    (void)state;
    for (int span = 2; span <= 12; span++) {
        compare("layer", "layer", span);
        compare("layer", "none", span);
        compare("layer", "scan", span);
    }
}

static size_t activations(const char *level, int span) {
    struct lm lm = open_level(level, level, span);
    size_t bytes = model_allocated(lm.m).activations;
    lm_close(&lm);
    return bytes;
}

static void test_memory(void **state) {
    (void)state;
    assert_true(activations("light", 1) < activations("none", 1));
    assert_true(activations("scan", 1) < activations("light", 1));
    assert_true(activations("layer", 1) < activations("scan", 1));
    assert_true(activations("layer", 3) < activations("layer", 1));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_spans),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
