/* test_model_pararnn.c: what is particular to ParaRNN and the backbone around it: the tensors' names and initial
 * values, the limit of the cell's weights, the solvers and their reports, the scale of the residual stream. That it
 * computes what its equations say is in test_model_equations.c; what holds for every layer, in the tests of
 * lm_models. */
#include "test/support_model.h"
#include "test/unit.h"

#include "model/pararnn.h"
#include <math.h>

#define MODEL "[model]\nd_model = 16\nvocab_size = 29\npad_vocab_to = 8\n"

static void test_tensors(void **state) {
    (void)state;
    config *c = NULL;
    struct model_config *mc =
        lm_config(&c, "[model]\nd_model = 24\nvocab_size = 61\ntie_embeddings = false\npattern = g l n\n"
                      "[block.g]\nmixer = pararnn\ncell = gru\nheads = 3\nresidual_scale = true\nmlp = swiglu\n"
                      "mlp_width = 40\n"
                      "[block.l]\nmixer = pararnn\ncell = lstm\nd_conv = 0\nweight_limit = 0.9\n"
                      "[block.n]\nmixer = pararnn\ncell = mgru\nd_conv = 3\nweight_limit = 0\n");
    const struct params *p = &mc->params;
    expect_tensor(p, 1, "backbone.layers.0.norm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 2, "backbone.layers.0.residual_scale", 24, 0, 0, false, true);
    expect_tensor(p, 3, "backbone.layers.0.mixer.in_proj.weight", 48, 24, 0, true, false);
    expect_tensor(p, 4, "backbone.layers.0.mixer.cell.in_proj.weight", 3, 24, 8, true, false);
    expect_tensor(p, 5, "backbone.layers.0.mixer.cell.bias", 3, 24, 0, false, true);
    expect_tensor(p, 6, "backbone.layers.0.mixer.cell.weight", 3, 24, 0, false, true);
    expect_tensor(p, 7, "backbone.layers.0.mixer.norm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 8, "backbone.layers.0.mixer.out_proj.weight", 24, 24, 0, true, false);
    expect_tensor(p, 9, "backbone.layers.0.mixer.conv1d.weight", 24, 1, 4, true, true);
    expect_tensor(p, 10, "backbone.layers.0.mixer.conv1d.bias", 24, 0, 0, false, true);
    expect_tensor(p, 11, "backbone.layers.0.norm2.weight", 24, 0, 0, false, true);
    expect_tensor(p, 16, "backbone.layers.1.mixer.in_proj.weight", 48, 24, 0, true, false);
    expect_tensor(p, 17, "backbone.layers.1.mixer.cell.in_proj.weight", 4, 18, 6, true, false);
    expect_tensor(p, 19, "backbone.layers.1.mixer.cell.weight", 5, 24, 0, false, true);
    expect_tensor(p, 24, "backbone.layers.2.mixer.cell.in_proj.weight", 4, 12, 6, true, false);
    expect_tensor(p, 26, "backbone.layers.2.mixer.cell.weight", 2, 24, 0, false, true);
    expect_tensor(p, 29, "backbone.layers.2.mixer.conv1d.weight", 24, 1, 3, true, true);
    for (int i = 0; i < p->count; i++)
        assert_true(p->list[i].clamp == (i == 6 ? 0.5 : i == 19 ? 0.9 : 0));
    /* Of the layers only the first is scaled, and an MLP never is. */
    for (int i = 0; i < mc->layer_count; i++) assert_int_equal(mc->layers[i].scale, i == 0 ? 2 : -1);
    assert_int_equal(mc->solver_count, 3);
    model_config_free(mc);
    config_free(c);
}

/* --- initial values --------------------------------------------------------------------------------- */

struct opened {
    config *c;
    struct model_config *mc;
    struct device *dev;
    struct model *m;
};

static void open_fresh(struct opened *o, const char *text) {
    error err = {0};
    o->mc = lm_config(&o->c, text);
    assert_int_equal(device_open(&o->dev, DEVICE_CPU, PRECISION_F32, &err), 0);
    assert_int_equal(model_open(&o->m, o->mc, o->dev, MODEL_INFER, 2, 64, 0, 1, &err), 0);
    model_init(o->m, 11);
}

static void close_fresh(struct opened *o) {
    model_close(o->m);
    device_close(o->dev);
    model_config_free(o->mc);
    config_free(o->c);
}

#define WIDE                                                                                                           \
    "[model]\nd_model = 64\nvocab_size = 100\ntie_embeddings = false\npattern = g*2 l\n"                               \
    "[block.g]\nmixer = pararnn\ncell = gru\nresidual_scale = true\nmlp = swiglu\nmlp_width = 256\n"                   \
    "[block.l]\nmixer = pararnn\ncell = lstm\n"

/* As the paper's language models began: its appendix C.1. */
static void test_paper_init(void **state) {
    (void)state;
    struct opened o;
    open_fresh(&o, WIDE);
    double kaiming = sqrt(3 / 16.0), in = 1 / sqrt(64), out = in / sqrt(3);
    expect_range(o.m, "backbone.layers.0.residual_scale", 1, 1, 1);
    expect_range(o.m, "backbone.layers.1.mixer.cell.in_proj.weight", -kaiming, kaiming, 0.99);
    expect_range(o.m, "backbone.layers.1.mixer.cell.bias", 0, 0, 1);
    expect_range(o.m, "backbone.layers.1.mixer.cell.weight", -0.5, 0.5, 0.5);
    expect_normal(o.m, "backbone.layers.1.mixer.cell.weight", 1 / sqrt(64));
    expect_normal(o.m, "backbone.layers.2.mixer.cell.weight", 1 / sqrt(64));
    expect_range(o.m, "backbone.layers.1.mixer.norm.weight", 1, 1, 1);
    expect_range(o.m, "backbone.layers.1.mixer.in_proj.weight", -in, in, 0.99);
    expect_range(o.m, "backbone.layers.1.mixer.out_proj.weight", -out, out, 0.99);
    close_fresh(&o);
}

/* As the published code's defaults have it; its LSTM counts the outputs of a head, its GRU those of all. */
static void test_code_init(void **state) {
    (void)state;
    struct opened o;
    float bias[3][64];
    open_fresh(&o, WIDE "cell_init = code\n");
    double of_head = sqrt(6 / (16.0 + 16));
    expect_range(o.m, "backbone.layers.2.mixer.cell.in_proj.weight", -of_head, of_head, 0.99);
    expect_normal(o.m, "backbone.layers.2.mixer.cell.weight", 2 / sqrt(5 * 64.0));
    model_read_param(o.m, params_find(&o.mc->params, "backbone.layers.2.mixer.cell.bias"), bias, DTYPE_F32);
    for (int v = 0; v < 3; v++)
        for (int i = 0; i < 64; i++) assert_true(fabs((double)bias[v][i] + (v == 0 ? i / 63.0 : 0)) < 1e-7);
    close_fresh(&o);
    open_fresh(&o, "[model]\nd_model = 64\nvocab_size = 100\npattern = g\n"
                   "[block.g]\nmixer = pararnn\ncell = gru\ncell_init = code\n");
    double of_all = sqrt(6 / (16.0 + 64));
    expect_range(o.m, "backbone.layers.0.mixer.cell.in_proj.weight", -of_all, of_all, 0.99);
    close_fresh(&o);
}

/* DCLM's backbone: normal within three deviations, projections into the stream smaller with depth. */
static void test_open_lm_init(void **state) {
    (void)state;
    struct opened o;
    open_fresh(&o, "[model]\nd_model = 64\nvocab_size = 100\ntie_embeddings = false\ninit = open_lm\npattern = g*2 a\n"
                   "[block.g]\nmixer = pararnn\ncell = gru\nmlp = swiglu\nmlp_width = 256\n"
                   "[block.a]\nmixer = attention\nheads = 4\n");
    static const char *const ins[] = {"backbone.embeddings", "lm_head", "backbone.layers.1.mixer.in_proj",
                                      "backbone.layers.1.mlp.gate", "backbone.layers.1.mlp.up",
                                      "backbone.layers.2.mixer.q_proj"};
    static const struct {
        const char *name;
        int inputs, block;
    } outs[] = {{"layers.0.mixer.out_proj", 64, 0}, {"layers.1.mixer.out_proj", 64, 1}, {"layers.0.mlp.down", 256, 0},
                {"layers.1.mlp.down", 256, 1}, {"layers.2.mixer.o_proj", 64, 2}};
    char name[LIMIT_NAME];
    for (size_t i = 0; i < sizeof ins / sizeof *ins; i++) {
        snprintf(name, sizeof name, "%s.weight", ins[i]);
        expect_normal(o.m, name, 1 / sqrt(64));
        expect_range(o.m, name, -3 / sqrt(64), 3 / sqrt(64), 0.9);
    }
    for (size_t i = 0; i < sizeof outs / sizeof *outs; i++) {
        double deviation = 1 / sqrt(outs[i].inputs) / sqrt(2.0 * (outs[i].block + 1));
        snprintf(name, sizeof name, "backbone.%s.weight", outs[i].name);
        expect_normal(o.m, name, deviation);
        expect_range(o.m, name, -3 * deviation, 3 * deviation, 0.9);
    }
    close_fresh(&o);
}

/* Weights start within their limit. */
static void test_limit_from_the_start(void **state) {
    (void)state;
    struct opened o;
    open_fresh(&o, "[model]\nd_model = 16\nvocab_size = 29\npattern = g\n"
                   "[block.g]\nmixer = pararnn\ncell = lstm\nweight_limit = 0.125\n");
    expect_range(o.m, "backbone.layers.0.mixer.cell.weight", -0.125, 0.125, 1);
    close_fresh(&o);
}

/* --- solvers ---------------------------------------------------------------------------------------- */

/* Logits of a batch of which documents start anywhere, and the largest residual that its layers report. */
static double *solve(const char *text, double *residual) {
    struct lm lm;
    const int64_t B = 2, T = 64;
    lm_open(&lm, text, PRECISION_F64, MODEL_INFER, B, T);
    struct tokens t = tokens_draw(B, T, LM_VOCAB, 5);
    lm_set(&lm, &t, true);
    model_zero_reports(lm.m);
    model_forward(lm.m, NULL, NULL, false);
    struct cell_report reports[8];
    device_read(lm.dev, reports, model_reports(lm.m), (size_t)lm.mc->solver_count * sizeof *reports);
    *residual = 0;
    for (int i = 0; i < lm.mc->solver_count; i++) *residual = fmax(*residual, (double)reports[i].residual);
    double *logits = lm_read_logits(&lm, 0, B * T);
    tokens_free(&t);
    lm_close(&lm);
    return logits;
}

/* However it is solved, the result is the same, as far as the solver says that it is. */
static void test_solvers(void **state) {
    (void)state;
    static const char *const cells_of[] = {"gru", "lstm", "mgru"};
    static const char *const solvers[] = {"newton\niterations = 8\n", "shooting\niterations = 6\nchunk = 5\n",
                                          "newton\niterations = 12\nbounded = false\n", "auto\n"};
    for (size_t k = 0; k < sizeof cells_of / sizeof *cells_of; k++) {
        char text[600];
        double residual;
        static const char *const form = MODEL "pattern = p*2\n[block.p]\nmixer = pararnn\ncell = %s\nsolver = %s\n";
        snprintf(text, sizeof text, form, cells_of[k], "sequential");
        double *exact = solve(text, &residual);
        assert_true(residual == 0);
        for (size_t i = 0; i < sizeof solvers / sizeof *solvers; i++) {
            snprintf(text, sizeof text, form, cells_of[k], solvers[i]);
            double *got = solve(text, &residual), distance = relative_error(got, exact, 2 * 64 * 32);
            if (!(distance < lm_limit(1e-9)) || !(residual < 1e-4))
                fail_msg("logits differ by %g, with a residual of %g:\n%s", distance, residual, text);
            free(got);
        }
        /* One correction is too few, and the report says so. */
        snprintf(text, sizeof text, form, cells_of[k], "newton\niterations = 1");
        double *rough = solve(text, &residual);
        assert_true(residual > 1e-4 && relative_error(rough, exact, 2 * 64 * 32) > 1e-6);
        free(rough);
        free(exact);
    }
}

/* --- the scale of the residual stream --------------------------------------------------------------- */

/* A scale of 1 is none; one of 0 forgets what came before the layer. */
static void test_residual_scale(void **state) {
    (void)state;
    struct lm lm[2];
    const int64_t B = 2, T = 9;
    static const char *const texts[2] = {
        MODEL "pattern = p*2\n[block.p]\nmixer = pararnn\ncell = gru\nmlp = swiglu\nmlp_width = 8\n",
        MODEL "pattern = p*2\n[block.p]\nmixer = pararnn\ncell = gru\nmlp = swiglu\nmlp_width = 8\n"
              "residual_scale = true\n"};
    double *logits[2], scale[16];
    for (int i = 0; i < 2; i++) {
        lm_open(&lm[i], texts[i], PRECISION_F64, MODEL_INFER, B, T);
        struct tokens t = tokens_draw(B, T, LM_VOCAB, 5);
        const struct params *p = model_params(lm[i].m), *from = model_params(lm[0].m);
        for (int k = 0; i > 0 && k < p->count; k++) {
            double *values = malloc((size_t)p->list[k].count * sizeof *values);
            int there = params_find(from, p->list[k].name);
            for (int64_t j = 0; j < p->list[k].count; j++) values[j] = 1;
            if (there >= 0) model_read_param(lm[0].m, there, values, DTYPE_F64);
            model_write_param(lm[i].m, k, values, DTYPE_F64);
            free(values);
        }
        lm_set(&lm[i], &t, false);
        model_forward(lm[i].m, NULL, NULL, false);
        logits[i] = lm_read_logits(&lm[i], 0, B * T);
        tokens_free(&t);
    }
    assert_true(relative_error(logits[1], logits[0], B * T * 32) == 0);
    for (int i = 0; i < 16; i++) scale[i] = 2;
    int index = params_find(model_params(lm[1].m), "backbone.layers.1.residual_scale");
    model_write_param(lm[1].m, index, scale, DTYPE_F64);
    model_forward(lm[1].m, NULL, NULL, false);
    double *scaled = lm_read_logits(&lm[1], 0, B * T);
    assert_true(relative_error(scaled, logits[0], B * T * 32) > 1e-3);
    free(scaled);
    for (int i = 0; i < 2; i++) {
        free(logits[i]);
        lm_close(&lm[i]);
    }
}

static void test_refusals(void **state) {
    (void)state;
    static const struct {
        const char *lines, *sentence;
    } cases[] = {
        {"cell = gru\nheads = 3\n", "block.p.heads = 3 must divide d_model = 16; the nearest that does is 2"},
        {"cell = gru\nd_conv = 1\n", "block.p.d_conv = 1 is no convolution; 0 leaves it out, and the narrowest is 2"},
        {"heads = 2\n", "test: [block.p] cell is missing, it must be one of gru, lstm, mgru"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[300];
        error err = {0};
        config *c = NULL;
        struct model_config *mc = NULL;
        snprintf(text, sizeof text, MODEL "pattern = p\n[block.p]\nmixer = pararnn\n%s", cases[i].lines);
        assert_int_equal(config_parse(&c, text, strlen(text), "test", &err), 0);
        unit_expect(model_config_bind(&mc, c, 0, &err), &err, ERROR_INPUT, cases[i].sentence);
        config_free(c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tensors),      cmocka_unit_test(test_paper_init),
        cmocka_unit_test(test_code_init),    cmocka_unit_test(test_open_lm_init),
        cmocka_unit_test(test_solvers),      cmocka_unit_test(test_residual_scale),
        cmocka_unit_test(test_refusals),     cmocka_unit_test(test_limit_from_the_start),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
