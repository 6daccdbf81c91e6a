/* test_model_xlstm.c: the blocks of the xLSTM paper as a config makes them: the published sizes, names and shapes of
 * tensors, initial values, and every refusal with its sentence. */
#include "test/support_model.h"
#include "test/unit.h"

#include <math.h>

/* --- the published models ----------------------------------------------------------------------- */

static void test_published(void **state) {
    (void)state;
    static const struct {
        const char *path;
        int64_t params, d_model;
        int blocks, scalar; /* of them sLSTM's, which have an MLP */
    } models[] = {
        {"configs/xlstm/125m-1-0.ini", 163806144, 768, 24, 0},   {"configs/xlstm/125m-7-1.ini", 163690928, 768, 24, 2},
        {"configs/xlstm/350m-1-0.ini", 409290112, 1024, 48, 0},  {"configs/xlstm/350m-7-1.ini", 408436048, 1024, 48, 6},
        {"configs/xlstm/760m-1-0.ini", 840427392, 1536, 48, 0},  {"configs/xlstm/760m-7-1.ini", 839736144, 1536, 48, 6},
        {"configs/xlstm/1.3b-1-0.ini", 1422559616, 2048, 48, 0},
        {"configs/xlstm/1.3b-7-1.ini", 1420065104, 2048, 48, 6},
        {"configs/xlstm/2.7b-1-0.ini", 2788396032, 2560, 64, 0},
    };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        error err = {0};
        config *c = NULL;
        struct model_config *mc = NULL;
        const char *path = models[i].path;
        if (config_load(&c, path, &err) != 0 || model_config_bind(&mc, c, 0, &err) != 0) fail_msg("%s", err.text);
        assert_int_equal(mc->params.total, models[i].params);
        assert_int_equal(mc->blocks, models[i].blocks);
        assert_int_equal(mc->layer_count, models[i].blocks + models[i].scalar);
        assert_int_equal(mc->options.d_model, models[i].d_model);
        assert_int_equal(mc->rows, 50304);
        char kinds[LIMIT_LAYERS + 1] = "";
        for (int k = 0; k < mc->layer_count; k++) kinds[mc->layers[k].block] = mc->layers[k].block_name[0];
        const char *want = models[i].scalar == 0 ? NULL
                           : models[i].blocks == 24 ? "mmmsmmmmmmmmmmmmmmmmsmmm"
                                                    : "mmmsmsmsmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmsmsmsmmm";
        if (want) assert_string_equal(kinds, want);
        else assert_int_equal(strspn(kinds, "m"), models[i].blocks);
        model_config_free(mc);
        config_free(c);
    }
}

/* --- tensors ------------------------------------------------------------------------------------ */

static void test_mlstm_preup_tensors(void **state) {
    (void)state;
    config *c = NULL;
    struct model_config *mc = lm_config(&c, "[model]\nd_model = 24\nvocab_size = 61\npattern = x k\n"
                                            "[block.x]\nmixer = mlstm_preup\nheads = 2\nd_conv = 3\n"
                                            "[block.k]\nmixer = mlstm_preup\nexpand = 3\nqkv_block = 8\n");
    const struct params *p = &mc->params;
    static const char at[] = "backbone.layers.0.mixer.";
    char name[LIMIT_NAME];
    static const struct {
        const char *name;
        int64_t a, b, c;
        bool decay, keep_real;
    } tensors[] = {
        {"proj_up.weight", 128, 24, 0, true, false},    {"conv1d.weight", 64, 1, 3, true, true},
        {"conv1d.bias", 64, 0, 0, false, true},         {"q_proj.weight", 16, 4, 4, true, false},
        {"k_proj.weight", 16, 4, 4, true, false},       {"v_proj.weight", 16, 4, 4, true, false},
        {"igate.weight", 2, 192, 0, true, false},       {"fgate.weight", 2, 192, 0, true, false},
        {"igate.bias", 2, 0, 0, false, true},           {"fgate.bias", 2, 0, 0, false, true},
        {"outnorm.weight", 64, 0, 0, false, true},      {"learnable_skip", 64, 0, 0, false, true},
        {"proj_down.weight", 24, 64, 0, true, false},
    };
    for (int i = 0; i < 13; i++) {
        snprintf(name, sizeof name, "%s%s", at, tensors[i].name);
        expect_tensor(p, 2 + i, name, tensors[i].a, tensors[i].b, tensors[i].c, tensors[i].decay, tensors[i].keep_real);
    }
    expect_tensor(p, 16, "backbone.layers.1.mixer.proj_up.weight", 256, 24, 0, true, false); /* 72 becomes 128 */
    expect_tensor(p, 19, "backbone.layers.1.mixer.q_proj.weight", 16, 8, 8, true, false);
    expect_tensor(p, 22, "backbone.layers.1.mixer.igate.weight", 4, 384, 0, true, false);
    model_config_free(mc);
    config_free(c);
}

static void test_slstm_tensors(void **state) {
    (void)state;
    config *c = NULL;
    struct model_config *mc = lm_config(&c, "[model]\nd_model = 24\nvocab_size = 61\npattern = y k\n"
                                            "[block.y]\nmixer = slstm\n"
                                            "[block.k]\nmixer = slstm\nheads = 3\nd_conv = 0\n");
    const struct params *p = &mc->params;
    expect_tensor(p, 2, "backbone.layers.0.mixer.igate.weight", 4, 6, 6, true, false);
    expect_tensor(p, 3, "backbone.layers.0.mixer.fgate.weight", 4, 6, 6, true, false);
    expect_tensor(p, 4, "backbone.layers.0.mixer.zgate.weight", 4, 6, 6, true, false);
    expect_tensor(p, 5, "backbone.layers.0.mixer.ogate.weight", 4, 6, 6, true, false);
    expect_tensor(p, 6, "backbone.layers.0.mixer.recurrent_kernel", 4, 24, 6, false, false);
    expect_tensor(p, 7, "backbone.layers.0.mixer.bias", 4, 24, 0, false, true);
    expect_tensor(p, 8, "backbone.layers.0.mixer.group_norm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 9, "backbone.layers.0.mixer.conv1d.weight", 24, 1, 4, true, true);
    expect_tensor(p, 10, "backbone.layers.0.mixer.conv1d.bias", 24, 0, 0, false, true);
    expect_tensor(p, 12, "backbone.layers.1.mixer.igate.weight", 3, 8, 8, true, false);
    expect_tensor(p, 16, "backbone.layers.1.mixer.recurrent_kernel", 3, 32, 8, false, false);
    assert_int_equal(mc->layers[1].params, 7); /* no convolution */
    model_config_free(mc);
    config_free(c);
}

/* --- initial values ----------------------------------------------------------------------------- */

/* Draws small and wang, biases of gates laid down in rows. */
static void test_init(void **state) {
    (void)state;
    error err = {0};
    config *c = NULL;
    struct model_config *mc = lm_config(&c, "[model]\nd_model=64\nvocab_size=100\npattern=x*2 y k\n"
                                            "[block.x]\nmixer=mlstm_preup\n[block.y]\nmixer=slstm\n"
                                            "[block.k]\nmixer=slstm\nheads=1\nrecurrent_init=uniform\n");
    struct device *dev;
    struct model *m;
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err), 0);
    assert_int_equal(model_open(&m, mc, dev, MODEL_INFER, 1, 1, 0, 1, &err), 0);
    model_init(m, 11);
    double small = sqrt(2 / (5 * 64.0)), wang = 2 / (4 * 8.0);
    expect_normal(m, "backbone.layers.1.mixer.proj_up.weight", small);
    expect_normal(m, "backbone.layers.1.mixer.q_proj.weight", small);
    expect_normal(m, "backbone.layers.1.mixer.v_proj.weight", small);
    expect_normal(m, "backbone.layers.1.mixer.proj_down.weight", wang);
    expect_range(m, "backbone.layers.1.mixer.conv1d.weight", -0.5, 0.5, 0.98);
    expect_range(m, "backbone.layers.1.mixer.conv1d.bias", -0.5, 0.5, 0.9);
    expect_range(m, "backbone.layers.1.mixer.igate.weight", 0, 0, 1);
    expect_range(m, "backbone.layers.1.mixer.fgate.weight", 0, 0, 1);
    expect_range(m, "backbone.layers.1.mixer.outnorm.weight", 1, 1, 1);
    expect_range(m, "backbone.layers.1.mixer.learnable_skip", 1, 1, 1);
    float bias[4], rows[256];
    model_read_param(m, params_find(&mc->params, "backbone.layers.1.mixer.fgate.bias"), bias, DTYPE_F32);
    for (int h = 0; h < 4; h++) assert_true(bias[h] == 3 + (float)h);
    model_read_param(m, params_find(&mc->params, "backbone.layers.1.mixer.igate.bias"), bias, DTYPE_F32);
    for (int h = 0; h < 4; h++) assert_true(bias[h] != 0 && fabsf(bias[h]) < 0.5f);
    expect_normal(m, "backbone.layers.2.mixer.zgate.weight", small);
    expect_range(m, "backbone.layers.2.mixer.recurrent_kernel", 0, 0, 1);
    expect_range(m, "backbone.layers.3.mixer.recurrent_kernel", -0.125, 0.125, 0.99);
    expect_range(m, "backbone.layers.3.mixer.group_norm.weight", 1, 1, 1);
    for (int block = 2; block < 4; block++) {
        int P = block == 2 ? 16 : 64;
        model_read_param(m, params_find(&mc->params, block == 2 ? "backbone.layers.2.mixer.bias"
                                                                : "backbone.layers.3.mixer.bias"), rows, DTYPE_F32);
        for (int i = 0; i < 256; i++) {
            double want = 5 - 12 * pow(i % P / (P - 1.0), 0.3 + 1.3 * block / 3);
            assert_true(i / 64 == 1 ? fabs(rows[i] - want) < 1e-5 : rows[i] == 0);
        }
    }
    model_close(m);
    device_close(dev);
    model_config_free(mc);
    config_free(c);
}

/* --- refusals ----------------------------------------------------------------------------------- */

static void test_errors(void **state) {
    (void)state;
    static const struct {
        const char *text, *sentence; /* the rest of [model], and [block.m] */
    } cases[] = {
        {"d_model = 16\n[block.m]\nmixer = mlstm_preup\nheads = 3\n",
         "block.m.heads = 3 must divide the inner width, expand * d_model rounded up to a multiple of 64, = 64; "
         "the nearest that does is 2"},
        {"d_model = 16\n[block.m]\nmixer = mlstm_preup\nqkv_block = 5\n",
         "block.m.qkv_block = 5 must divide the inner width, expand * d_model rounded up to a multiple of 64, = 64; "
         "the nearest that does is 4"},
        {"d_model = 4096\n[block.m]\nmixer = mlstm_preup\nheads = 2\n",
         "block.m.heads = 2 makes heads 4096 wide; they may be 2048 wide at most"},
        {"d_model = 16\n[block.m]\nmixer = slstm\nheads = 3\n",
         "block.m.heads = 3 must divide d_model = 16; the nearest that does is 2"},
        {"d_model = 16\n[block.m]\nmixer = slstm\nd_conv = 1\n",
         "block.m.d_conv = 1 is no convolution; 0 leaves it out, and the narrowest is 2"},
        {"d_model = 16\n[block.m]\nmixer = slstm\nrecurrent_init = small\n",
         "test:7: [block.m] recurrent_init = small: must be one of zeros, uniform"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error err = {0};
        config *c = NULL;
        struct model_config *mc = NULL;
        char text[300];
        snprintf(text, sizeof text, "[model]\nvocab_size=300\npattern=m\n%s", cases[i].text);
        assert_int_equal(config_parse(&c, text, strlen(text), "test", &err), 0);
        unit_expect(model_config_bind(&mc, c, 0, &err), &err, ERROR_INPUT, cases[i].sentence);
        assert_null(mc);
        config_free(c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_published), cmocka_unit_test(test_mlstm_preup_tensors),
        cmocka_unit_test(test_slstm_tensors), cmocka_unit_test(test_init), cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
