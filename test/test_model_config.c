/* test_model_config.c: from a config to layers and tensors: the published sizes, names and shapes, patterns, padding,
 * tying, MLPs, initialisation of a real model, and every refusal with its sentence. */
#include "test/support_model.h"
#include "test/support_published.h"
#include "test/unit.h"

#include "model/mamba2.h"
#include "model/mlp.h"
#include "model/pattern.h"
#include <math.h>

/* --- the published models ----------------------------------------------------------------------- */

static struct model_config *load(config **c, const char *path) {
    error err = {0};
    struct model_config *mc = NULL;
    if (config_load(c, path, &err) != 0 || model_config_bind(&mc, *c, 0, &err) != 0) fail_msg("%s: %s", path, err.text);
    return mc;
}

static void test_published(void **state) {
    (void)state;
    for (const struct published *p = published_models; p->path; p++) {
        config *c = NULL;
        struct model_config *mc = load(&c, p->path);
        assert_int_equal(mc->params.total, p->params);
        assert_int_equal(mc->blocks, p->blocks);
        assert_int_equal(mc->options.d_model, p->d_model);
        assert_int_equal(mc->rows, p->rows);
        int mixers = 0;
        for (int l = 0; l < mc->layer_count; l++) mixers += !mc->layers[l].is_mlp;
        assert_int_equal(mixers, p->blocks);
        int64_t vocab = mc->vocab;
        assert_true(vocab == 50277 || vocab == 50257 || vocab == 50304 || vocab == 32000);
        assert_int_equal(mc->head != mc->embedding, p->matrices == 2);
        assert_int_equal(mc->params.bucket_count, p->blocks + 1 + p->matrices);
        model_config_free(mc);
        config_free(c);
    }
}

/* Per token: products with every matrix, the convolution's taps, and the chunked scan. */
static void test_flops(void **state) {
    (void)state;
    config *c = NULL;
    struct model_config *mc = load(&c, "configs/mamba2/130m.ini");
    double per_layer = 2 * 768.0 * 3352 + 2 * 1536.0 * 768 + 2 * 4 * 1792.0;
    double scan = 2 * 64 * 128.0 + 24 * (2 * 64 * 64.0 + 4 * 64 * 128.0);
    double want = 24 * (per_layer + scan) + 2 * 768.0 * 50288;
    assert_true(fabs(model_forward_flops(mc, 2048) / want - 1) < 1e-12);
    assert_true(model_forward_flops(mc, 16) < want); /* a chunk is never longer than the sequence */
    model_config_free(mc);
    config_free(c);
    mc = load(&c, "configs/mamba/130m.ini");
    per_layer = 2 * 768.0 * 3072 + 2 * 1536.0 * (48 + 32) + 2 * 48.0 * 1536 + 2 * 1536.0 * 768 + 2 * 4 * 1536.0;
    scan = 6 * 1536 * 16.0;
    want = 24 * (per_layer + scan) + 2 * 768.0 * 50280;
    assert_true(fabs(model_forward_flops(mc, 2048) / want - 1) < 1e-12);
    model_config_free(mc);
    config_free(c);
    mc = load(&c, "configs/xlstm/165m.ini");
    per_layer = 2 * 768.0 * (2 * 384 + 2 * 768 + 8 + 768) + 6 * 768.0 * 2112;
    scan = 4 * (4 * 96 * 192.0 + 2 * 64 * (96 + 192.0) + 2 * 96 * 192 / 64.0);
    want = 12 * (per_layer + scan) + 2 * 768.0 * 50304;
    assert_true(fabs(model_forward_flops(mc, 2048) / want - 1) < 1e-12);
    model_config_free(mc);
    config_free(c);
}

/* --- tensors ------------------------------------------------------------------------------------ */

#define HYBRID                                                                                                         \
    "[model]\nd_model = 24\nvocab_size = 61\npad_vocab_to = 8\ntie_embeddings = false\npattern = a b\n"                \
    "[block.a]\nmixer = mamba2\nd_state = 5\nhead_dim = 12\nn_groups = 2\nd_conv = 3\n"                                \
    "[block.b]\nmixer = mamba2\nhead_dim = 8\nexpand = 1\nmlp = swiglu\nmlp_width = 40\n"

static void test_tensors(void **state) {
    (void)state;
    config *c = NULL;
    struct model_config *mc = lm_config(&c, HYBRID);
    const struct params *p = &mc->params;
    assert_int_equal(mc->rows, 64);
    assert_int_equal(mc->layer_count, 3);
    expect_tensor(p, 0, "backbone.embeddings.weight", 64, 24, 0, false, false);
    expect_tensor(p, 1, "backbone.layers.0.norm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 2, "backbone.layers.0.mixer.in_proj.weight", 2 * 48 + 20 + 4, 24, 0, true, false);
    expect_tensor(p, 3, "backbone.layers.0.mixer.conv1d.weight", 68, 1, 3, true, true);
    expect_tensor(p, 4, "backbone.layers.0.mixer.conv1d.bias", 68, 0, 0, false, true);
    expect_tensor(p, 5, "backbone.layers.0.mixer.dt_bias", 4, 0, 0, false, true);
    expect_tensor(p, 6, "backbone.layers.0.mixer.A_log", 4, 0, 0, false, true);
    expect_tensor(p, 7, "backbone.layers.0.mixer.D", 4, 0, 0, false, true);
    expect_tensor(p, 8, "backbone.layers.0.mixer.norm.weight", 48, 0, 0, false, true);
    expect_tensor(p, 9, "backbone.layers.0.mixer.out_proj.weight", 24, 48, 0, true, false);
    expect_tensor(p, 10, "backbone.layers.1.norm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 19, "backbone.layers.1.norm2.weight", 24, 0, 0, false, true);
    expect_tensor(p, 20, "backbone.layers.1.mlp.gate.weight", 40, 24, 0, true, false);
    expect_tensor(p, 21, "backbone.layers.1.mlp.up.weight", 40, 24, 0, true, false);
    expect_tensor(p, 22, "backbone.layers.1.mlp.down.weight", 24, 40, 0, true, false);
    expect_tensor(p, 23, "backbone.norm_f.weight", 24, 0, 0, false, true);
    expect_tensor(p, 24, "lm_head.weight", 64, 24, 0, false, false);
    assert_int_equal(p->count, 25);
    assert_int_equal(p->bucket_count, 5); /* embedding, two blocks, final norm, head */
    assert_int_equal(p->list[22].bucket, p->list[10].bucket);
    assert_true(mc->layers[2].is_mlp && mc->layers[2].block == 1 && mc->layers[2].norm == 19 &&
                mc->layers[2].first == 20 && mc->layers[2].params == 3);
    assert_string_equal(mc->layers[2].block_name, "b");
    assert_int_equal(mc->head, 24);
    for (int i = 0; i < p->count; i++) assert_int_equal(p->list[i].head, i == 24);
    model_config_free(mc);
    config_free(c);
}

/* Mamba's names and shapes; a rank of 0 stands for ceil(d_model / 16). */
static void test_mamba_tensors(void **state) {
    (void)state;
    config *c = NULL;
    struct model_config *mc = lm_config(&c, "[model]\nd_model = 24\nvocab_size = 61\npattern = s k\n"
                                            "[block.s]\nmixer = mamba\nd_state = 5\nd_conv = 3\nexpand = 3\n"
                                            "[block.k]\nmixer = mamba\ndt_rank = 7\n");
    const struct params *p = &mc->params;
    expect_tensor(p, 2, "backbone.layers.0.mixer.in_proj.weight", 144, 24, 0, true, false);
    expect_tensor(p, 3, "backbone.layers.0.mixer.conv1d.weight", 72, 1, 3, true, true);
    expect_tensor(p, 4, "backbone.layers.0.mixer.conv1d.bias", 72, 0, 0, false, true);
    expect_tensor(p, 5, "backbone.layers.0.mixer.x_proj.weight", 2 + 10, 72, 0, true, false);
    expect_tensor(p, 6, "backbone.layers.0.mixer.dt_proj.weight", 72, 2, 0, true, false);
    expect_tensor(p, 7, "backbone.layers.0.mixer.dt_proj.bias", 72, 0, 0, false, true);
    expect_tensor(p, 8, "backbone.layers.0.mixer.A_log", 72, 5, 0, false, true);
    expect_tensor(p, 9, "backbone.layers.0.mixer.D", 72, 0, 0, false, true);
    expect_tensor(p, 10, "backbone.layers.0.mixer.out_proj.weight", 24, 72, 0, true, false);
    expect_tensor(p, 15, "backbone.layers.1.mixer.x_proj.weight", 7 + 32, 48, 0, true, false);
    expect_tensor(p, 16, "backbone.layers.1.mixer.dt_proj.weight", 48, 7, 0, true, false);
    expect_tensor(p, 18, "backbone.layers.1.mixer.A_log", 48, 16, 0, false, true);
    model_config_free(mc);
    config_free(c);
}

/* The xLSTM 7B architecture has transformers' names; as a part of another model, its layers have riverrun's. */
static void test_mlstm_tensors(void **state) {
    (void)state;
    config *c = NULL;
    struct model_config *mc =
        lm_config(&c, "[model]\nd_model = 24\nvocab_size = 61\ntie_embeddings = false\npattern = x k\n"
                      "[block.x]\nmixer = mlstm\nheads = 3\nmlp = swiglu\nmlp_width = 40\n"
                      "[block.k]\nmixer = mlstm\nheads = 3\nchunk = 16\nbackward = truncated\n"
                      "mlp = swiglu\nmlp_width = 40\n");
    const struct params *p = &mc->params;
    expect_tensor(p, 0, "backbone.embeddings.weight", 64, 24, 0, false, false);
    expect_tensor(p, 1, "backbone.blocks.0.norm_mlstm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 2, "backbone.blocks.0.mlstm_layer.q.weight", 12, 24, 0, true, false);
    expect_tensor(p, 3, "backbone.blocks.0.mlstm_layer.k.weight", 12, 24, 0, true, false);
    expect_tensor(p, 4, "backbone.blocks.0.mlstm_layer.v.weight", 24, 24, 0, true, false);
    expect_tensor(p, 5, "backbone.blocks.0.mlstm_layer.ogate_preact.weight", 24, 24, 0, true, false);
    expect_tensor(p, 6, "backbone.blocks.0.mlstm_layer.igate_preact.weight", 3, 24, 0, true, false);
    expect_tensor(p, 7, "backbone.blocks.0.mlstm_layer.fgate_preact.weight", 3, 24, 0, true, false);
    expect_tensor(p, 8, "backbone.blocks.0.mlstm_layer.igate_preact.bias", 3, 0, 0, false, true);
    expect_tensor(p, 9, "backbone.blocks.0.mlstm_layer.fgate_preact.bias", 3, 0, 0, false, true);
    expect_tensor(p, 10, "backbone.blocks.0.mlstm_layer.multihead_norm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 11, "backbone.blocks.0.mlstm_layer.out_proj.weight", 24, 24, 0, true, false);
    expect_tensor(p, 12, "backbone.blocks.0.norm_ffn.weight", 24, 0, 0, false, true);
    expect_tensor(p, 13, "backbone.blocks.0.ffn.proj_up_gate.weight", 40, 24, 0, true, false);
    expect_tensor(p, 14, "backbone.blocks.0.ffn.proj_up.weight", 40, 24, 0, true, false);
    expect_tensor(p, 15, "backbone.blocks.0.ffn.proj_down.weight", 24, 40, 0, true, false);
    expect_tensor(p, 31, "backbone.out_norm.weight", 24, 0, 0, false, true);
    expect_tensor(p, 32, "lm_head.weight", 64, 24, 0, false, false);
    assert_int_equal(p->count, 33);
    model_config_free(mc);
    config_free(c);
    mc = lm_config(&c, "[model]\nd_model = 20\nvocab_size = 61\npattern = x\n"
                       "[block.x]\nmixer = mlstm\nheads = 2\nqk_factor = 0.33\nv_factor = 1.5\n"
                       "mlp = relu2\nmlp_width = 40\n");
    p = &mc->params;
    expect_tensor(p, 2, "backbone.layers.0.mixer.q.weight", 6, 20, 0, true, false);
    expect_tensor(p, 4, "backbone.layers.0.mixer.v.weight", 30, 20, 0, true, false);
    expect_tensor(p, 11, "backbone.layers.0.mixer.out_proj.weight", 20, 30, 0, true, false);
    expect_tensor(p, 13, "backbone.layers.0.mlp.up.weight", 40, 20, 0, true, false);
    expect_tensor(p, 14, "backbone.layers.0.mlp.down.weight", 20, 40, 0, true, false);
    expect_tensor(p, 15, "backbone.norm_f.weight", 20, 0, 0, false, true);
    assert_int_equal(p->count, 16);
    model_config_free(mc);
    config_free(c);
}

static void test_mlp_width(void **state) {
    (void)state;
    static const struct {
        const char *d_model, *mlp;
        int64_t width;
    } cases[] = {{"48", "swiglu", 128}, {"49", "geglu", 256}, {"768", "swiglu", 2048}, {"2560", "swiglu", 6912},
                 {"49", "gelu", 196},   {"768", "relu2", 3072}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error err = {0};
        config *c = NULL;
        struct model_config *mc = NULL;
        char text[200];
        snprintf(text, sizeof text,
                 "[model]\nd_model=%s\nvocab_size=9\npattern=m\n[block.m]\nmixer=mamba2\nhead_dim=1\nmlp=%s\n",
                 cases[i].d_model, cases[i].mlp);
        assert_int_equal(config_parse(&c, text, strlen(text), "test", &err), 0);
        assert_int_equal(model_config_bind(&mc, c, 0, &err), 0);
        assert_int_equal(((const struct mlp_options *)mc->kinds[0].mlp_options)->width, cases[i].width);
        model_config_free(mc);
        config_free(c);
    }
}

static void test_vocabulary(void **state) {
    (void)state;
    error err = {0};
    config *c = NULL;
    struct model_config *mc = NULL;
    const char *text = "[model]\nd_model=8\npattern=m\n[block.m]\nmixer=mamba2\nhead_dim=4\n";
    assert_int_equal(config_parse(&c, text, strlen(text), "test", &err), 0);
    assert_int_equal(model_config_bind(&mc, c, 257, &err), 0);
    assert_int_equal(mc->vocab, 257);
    assert_int_equal(mc->rows, 272);
    assert_int_equal(mc->head, mc->embedding);
    /* The config may go first. */
    config_free(c);
    assert_string_equal(mc->options.pattern, "m");
    assert_string_equal(mc->layers[0].block_name, "m");
    model_config_free(mc);
}

/* --- initialisation of a model -------------------------------------------------------------------- */

static void test_init(void **state) {
    (void)state;
    error err = {0};
    config *c = NULL;
    const char *text = "[model]\nd_model=64\nvocab_size=100\ntie_embeddings=false\npattern=m*2 s*2\n"
                       "[block.m]\nmixer=mamba2\nhead_dim=2\nd_state=16\nmlp=swiglu\nmlp_width=96\n"
                       "[block.s]\nmixer=mamba\nd_state=7\ndt_scale=0.5\n";
    struct model_config *mc = lm_config(&c, text);
    struct device *dev;
    struct model *m[2];
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(model_open(&m[i], mc, dev, MODEL_INFER, 1, 1, 0, i == 0 ? 1 : 3, &err), 0);
        model_init(m[i], 11);
    }
    double in = 1 / sqrt(64), out = 1 / sqrt(128) / 2, out2 = 1 / sqrt(96) / 2;
    expect_range(m[0], "backbone.layers.1.mixer.in_proj.weight", -in, in, 0.99);
    expect_range(m[0], "backbone.layers.1.mixer.conv1d.weight", -0.5, 0.5, 0.98);
    expect_range(m[0], "backbone.layers.1.mixer.conv1d.bias", -0.5, 0.5, 0.9);
    expect_range(m[0], "backbone.layers.1.mixer.A_log", 0, log(16), 0.7);
    expect_range(m[0], "backbone.layers.1.mixer.dt_bias", log(expm1(0.001)), log(expm1(0.1)), 0.8);
    expect_range(m[0], "backbone.layers.1.mixer.D", 1, 1, 1);
    expect_range(m[0], "backbone.layers.1.mixer.norm.weight", 1, 1, 1);
    expect_range(m[0], "backbone.layers.1.mixer.out_proj.weight", -out, out, 0.99);
    expect_range(m[0], "backbone.layers.1.norm2.weight", 1, 1, 1);
    expect_range(m[0], "backbone.layers.1.mlp.gate.weight", -in, in, 0.99);
    expect_range(m[0], "backbone.layers.1.mlp.up.weight", -in, in, 0.99);
    expect_range(m[0], "backbone.layers.1.mlp.down.weight", -out2, out2, 0.99);
    expect_range(m[0], "backbone.layers.2.mixer.in_proj.weight", -in, in, 0.99);
    expect_range(m[0], "backbone.layers.2.mixer.conv1d.weight", -0.5, 0.5, 0.98);
    expect_range(m[0], "backbone.layers.2.mixer.conv1d.bias", -0.5, 0.5, 0.9);
    expect_range(m[0], "backbone.layers.2.mixer.x_proj.weight", -1 / sqrt(128), 1 / sqrt(128), 0.98);
    expect_range(m[0], "backbone.layers.2.mixer.dt_proj.weight", -0.25, 0.25, 0.98); /* rank 4 */
    expect_range(m[0], "backbone.layers.2.mixer.dt_proj.bias", log(expm1(0.001)), log(expm1(0.1)), 0.9);
    expect_range(m[0], "backbone.layers.2.mixer.D", 1, 1, 1);
    expect_range(m[0], "backbone.layers.2.mixer.out_proj.weight", -out, out, 0.99);
    float A_log[128 * 7];
    model_read_param(m[0], params_find(&mc->params, "backbone.layers.2.mixer.A_log"), A_log, DTYPE_F32);
    for (int i = 0; i < 128 * 7; i++) assert_true(A_log[i] == (float)log(1 + i % 7));
    expect_range(m[0], "backbone.norm_f.weight", 1, 1, 1);
    expect_range(m[0], "lm_head.weight", -in, in, 0.99);
    expect_range(m[0], "backbone.embeddings.weight", -0.12, 0.12, 0.6);
    /* Ranks change where a tensor lies, not what it holds; layers differ. */
    for (int i = 0; i < mc->params.count; i++) {
        int64_t count = mc->params.list[i].count;
        float *a = malloc((size_t)count * sizeof *a), *b = malloc((size_t)count * sizeof *b);
        model_read_param(m[0], i, a, DTYPE_F32);
        model_read_param(m[1], i, b, DTYPE_F32);
        assert_memory_equal(a, b, (size_t)count * sizeof *a);
        free(a);
        free(b);
    }
    float first[64], second[64]; /* heads */
    model_read_param(m[0], params_find(&mc->params, "backbone.layers.0.mixer.A_log"), first, DTYPE_F32);
    model_read_param(m[0], params_find(&mc->params, "backbone.layers.1.mixer.A_log"), second, DTYPE_F32);
    for (int i = 0; i < 64; i++) assert_true(first[i] != second[i]);
    for (int i = 0; i < 2; i++) model_close(m[i]);
    device_close(dev);
    model_config_free(mc);
    config_free(c);
}

/* With model.init = small, and the mLSTM in any case: the initialisation of the xLSTM 7B run. */
static void test_small_init(void **state) {
    (void)state;
    error err = {0};
    config *c = NULL;
    struct model_config *mc =
        lm_config(&c, "[model]\nd_model=64\nvocab_size=100\ntie_embeddings=false\ninit=small\npattern=x*3\n"
                      "[block.x]\nmixer=mlstm\nheads=4\nmlp=swiglu\nmlp_width=192\n");
    struct device *dev;
    struct model *m;
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err), 0);
    assert_int_equal(model_open(&m, mc, dev, MODEL_INFER, 1, 1, 0, 1, &err), 0);
    model_init(m, 11);
    double small = sqrt(2 / (5 * 64.0)), wang = 2 / (3 * sqrt(64));
    static const char *const smalls[] = {"embeddings",     "blocks.1.mlstm_layer.q",      "blocks.1.mlstm_layer.k",
                                         "blocks.1.mlstm_layer.v", "blocks.1.ffn.proj_up_gate", "blocks.1.ffn.proj_up"};
    char name[LIMIT_NAME];
    for (size_t i = 0; i < sizeof smalls / sizeof *smalls; i++) {
        snprintf(name, sizeof name, "backbone.%s.weight", smalls[i]);
        expect_normal(m, name, small);
    }
    expect_normal(m, "lm_head.weight", small);
    expect_normal(m, "backbone.blocks.2.mlstm_layer.out_proj.weight", wang);
    expect_normal(m, "backbone.blocks.2.ffn.proj_down.weight", wang);
    for (const char *const *gate = (const char *const[]){"i", "f", "o", NULL}; *gate; gate++) {
        snprintf(name, sizeof name, "backbone.blocks.0.mlstm_layer.%sgate_preact.weight", *gate);
        expect_range(m, name, 0, 0, 1);
    }
    expect_range(m, "backbone.blocks.0.mlstm_layer.igate_preact.bias", -10, -10, 1);
    expect_range(m, "backbone.blocks.0.mlstm_layer.multihead_norm.weight", 1, 1, 1);
    float bias[4];
    model_read_param(m, params_find(&mc->params, "backbone.blocks.2.mlstm_layer.fgate_preact.bias"), bias, DTYPE_F32);
    for (int h = 0; h < 4; h++) assert_true(bias[h] == 3 + (float)h);
    model_close(m);
    device_close(dev);
    model_config_free(mc);
    config_free(c);
}

/* With model.init = normal all that is left to it is alike: RAT's baseline. */
static void test_normal_init(void **state) {
    (void)state;
    error err = {0};
    config *c = NULL;
    struct model_config *mc =
        lm_config(&c, "[model]\nd_model=64\nvocab_size=100\ntie_embeddings=false\ninit=normal\npattern=a*3\n"
                      "[block.a]\nmixer=attention\nheads=4\nrope_base=0\nmlp=gelu\nmlp_width=192\n");
    struct device *dev;
    struct model *m;
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err), 0);
    assert_int_equal(model_open(&m, mc, dev, MODEL_INFER, 1, 1, 0, 1, &err), 0);
    model_init(m, 11);
    static const char *const names[] = {"backbone.embeddings.weight",           "lm_head.weight",
                                        "backbone.layers.0.mixer.q_proj.weight",
                                         "backbone.layers.2.mixer.o_proj.weight",
                                        "backbone.layers.2.mlp.up.weight",       "backbone.layers.2.mlp.down.weight"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) expect_normal(m, names[i], 0.02);
    model_close(m);
    device_close(dev);
    model_config_free(mc);
    config_free(c);
}

/* --- patterns ----------------------------------------------------------------------------------- */

static void expect_pattern(const char *text, const char *want) {
    error err = {0};
    struct pattern p;
    if (pattern_parse(&p, text, &err) != 0) fail_msg("'%s': %s", text, err.text);
    char got[LIMIT_LAYERS + 1];
    for (int i = 0; i < p.block_count; i++) got[i] = p.names[p.blocks[i]][0]; /* names of one letter */
    got[p.block_count] = 0;
    assert_string_equal(got, want);
}

static void test_patterns(void **state) {
    (void)state;
    expect_pattern("m", "m");
    expect_pattern("m*4", "mmmm");
    expect_pattern("(m*3 a)*2", "mmmammma");
    expect_pattern(" m a ", "ma");
    expect_pattern("m * 2 a", "mma");
    expect_pattern("((a b)*2 c)*2", "ababcababc");
    expect_pattern("_x b-2*2", "_bb");
    expect_pattern("(((m)))", "m");
    struct pattern p;
    error err = {0};
    assert_int_equal(pattern_parse(&p, "m*1024", &err), 0);
    assert_int_equal(p.block_count, LIMIT_LAYERS);
}

static void test_pattern_errors(void **state) {
    (void)state;
    static const struct {
        const char *text, *sentence;
    } cases[] = {
        {"", "model.pattern = '': expected a block's name or '(' at its end, character 1"},
        {"m)", "model.pattern = 'm)': expected a block's name, '(', '*' or the end at character 2, not ')'"},
        {"(m", "model.pattern = '(m': expected a block's name, '(' or ')' at its end, character 3"},
        {"()", "model.pattern = '()': expected a block's name or '(' at character 2, not ')'"},
        {"m*", "model.pattern = 'm*': expected a count at its end, character 3"},
        {"m*0", "model.pattern = 'm*0': expected a count of 1 or more at character 3, not '0'"},
        {"m*2a", "model.pattern = 'm*2a': expected a space at character 4, not 'a'"},
        {"m**2", "model.pattern = 'm**2': expected a count at character 3, not '*'"},
        {"m, a", "model.pattern = 'm, a': expected a block's name, '(', '*' or the end at character 2, not ','"},
        {"2m", "model.pattern = '2m': expected a block's name or '(' at character 1, not '2'"},
        {"m*1025", "model.pattern = 'm*1025' stands for more than 1024 blocks, the most a model may have"},
        {"m*1024 a", "model.pattern = 'm*1024 a' stands for more than 1024 blocks, the most a model may have"},
        {"(m*100)*11", "model.pattern = '(m*100)*11' stands for more than 1024 blocks, the most a model may have"},
        {"m*99999999999999999999",
         "model.pattern = 'm*99999999999999999999' stands for more than 1024 blocks, the most a model may have"},
        {"a b c d e f g h i j k l m n o p q",
         "model.pattern = 'a b c d e f g h i j k l m n o p q' names more than 16 different blocks"},
        {"(((((((((((((((((((((((((((((((((m", "model.pattern has more than 32 parentheses within each other"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error err = {0};
        struct pattern p;
        unit_expect(pattern_parse(&p, cases[i].text, &err), &err, ERROR_INPUT, cases[i].sentence);
    }
}

/* --- refusals ----------------------------------------------------------------------------------- */

static void test_config_errors(void **state) {
    (void)state;
    static const struct {
        const char *settings, *sentence; /* `;` between settings, which replace those of a valid config */
    } cases[] = {
        {"block.m.head_dim=9", "block.m.head_dim = 9 must divide expand * d_model = 32; the nearest that does is 8"},
        {"block.m.n_groups=3", "block.m.n_groups = 3 must divide the number of heads, expand * d_model / head_dim = 8; "
                               "the nearest that does is 2"},
        {"block.m.n_groups=1000", "block.m.n_groups = 1000 must divide the number of heads, expand * d_model / "
                                  "head_dim = 8; the nearest that does is 8"},
        {"block.m.dt_min=0.2", "block.m.dt_min = 0.2 must not be above dt_max = 0.1; it may be at most that"},
        {"block.m.A_init_min=17", "block.m.A_init_min = 17 must not be above A_init_max = 16; it may be at most that"},
        {"block.m.dt_limit_max=0.5;block.m.dt_limit_min=0.6",
         "block.m.dt_limit_min = 0.6 must not be above dt_limit_max = 0.5; it may be at most that, and dt_limit_max = "
         "0 sets no limit"},
        {"block.m.d_conv=9",
         "command line: block.m.d_conv=9: must be a whole number of tokens from 2 to 8; the nearest is 8"},
        {"block.m.d_conv=1",
         "command line: block.m.d_conv=1: must be a whole number of tokens from 2 to 8; the nearest is 2"},
        {"block.m.chunk=0",
         "command line: block.m.chunk=0: must be a whole number of tokens from 1 to 4096; the nearest is 1"},
        {"block.m.mixer=mamba3",
         "command line: block.m.mixer=mamba3: must be one of mamba, mamba2, mlstm, mlstm_preup, slstm, attention, rat, "
         "pararnn; did you "
         "mean mamba?"},
        {"block.m.mixer=mlstm;block.m.heads=3;model.d_model=20",
         "block.m.heads = 3 must divide qk_factor * d_model = 10 and v_factor * d_model = 20; the nearest that does is "
         "2"},
        {"block.m.mixer=mlstm;block.m.qk_factor=0.01",
         "block.m.qk_factor = 0.01 leaves no width; it must be at least 1 / d_model = 0.0625"},
        {"block.m.mixer=mlstm;model.d_model=8192;block.m.heads=3",
         "block.m.v_factor = 1 makes heads 2730 wide; they may be 2048 wide, with heads = 4 or more"},
        {"block.m.mixer=mlstm;block.m.normalise=false",
         "block.m.normalise = false needs input_gate = sigmoid: what input_gate = exp gathers has no scale without the "
         "normaliser"},
        {"block.m.mixer=mamba;block.m.head_dim=4;block.m.dt_max=1e-4",
         "block.m.dt_min = 0.001 must not be above dt_max = 0.0001; it may be at most that"},
        {"block.m.mlp=silu", "command line: block.m.mlp=silu: must be one of none, swiglu, geglu, gelu, relu2"},
        {"model.norm=rmsnorm", "command line: model.norm=rmsnorm: must be one of rms, layer"},
        {"model.logit_cap=-1",
         "command line: model.logit_cap=-1: must be a number from 0 to 1000000; the nearest is 0"},
        {"block.m.mlp_width=64", "block.m.mlp_width means nothing with mlp = none; set mlp = swiglu or leave it out"},
        {"block.m.mixer=attention;block.m.heads=4;block.m.head_dim=3",
         "block.m.head_dim = 3 is odd, but rotary positions turn pairs of channels; the nearest that is possible is 4"},
        {"block.m.mixer=attention;block.m.head_dim=0;block.m.heads=16",
         "block.m.heads = 16 makes heads 1 wide, d_model being 16; they must be an even number of channels wide, at "
         "most 256: give another number of heads, or head_dim"},
        {"block.m.mixer=rat;block.m.heads=4;block.m.window=8",
         "block.m.head_dim means nothing with mixer = rat, but with mamba2, attention; leave it out"},
        {"block.m.window=8", "block.m.window means nothing with mixer = mamba2, but with attention; leave it out"},
        {"block.q.mixer=mamba2",
         "[block.q] is not used: model.pattern = 'm*2' does not name q; name it there or remove the section"},
        {"model.pattern=m q",
         "model.pattern = 'm q' names the block q, but the config has no section [block.q]; there is [block.m]"},
        {"model.pattern=m*x", "model.pattern = 'm*x': expected a count at character 3, not 'x'"},
        {"model.vocab_size=0", "model.vocab_size = 0 takes the number of token ids from the tokenizer, and here there "
                               "is none; give the number, for instance model.vocab_size=257 for bytes"},
        {"model.vocab_size=200",
         "model.vocab_size = 200 is less than the tokenizer's 257 ids; it must be at least that, and 0 takes it"},
        {"model.d_model=0", "command line: model.d_model=0: must be a whole number from 1 to 65536; the nearest is 1"},
        {"model.norm_eps=0", "command line: model.norm_eps=0: must be a number from 1e-12 to 1; the nearest is 1e-12"},
        {"model.pad_vocab_to=0",
         "command line: model.pad_vocab_to=0: must be a whole number of rows from 1 to 65536; the nearest is 1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error err = {0};
        config *c = NULL;
        struct model_config *mc = NULL;
        const char *text = "[model]\nd_model=16\nvocab_size=300\npattern=m*2\n[block.m]\nmixer=mamba2\nhead_dim=4\n";
        char settings[200];
        snprintf(settings, sizeof settings, "%s", cases[i].settings);
        assert_int_equal(config_parse(&c, text, strlen(text), "test", &err), 0);
        for (char *s = strtok(settings, ";"); s; s = strtok(NULL, ";"))
            assert_int_equal(config_override(c, s, &err), 0);
        int64_t tokenizer = strstr(cases[i].settings, "vocab_size=0") ? 0 : 257;
        unit_expect(model_config_bind(&mc, c, tokenizer, &err), &err, ERROR_INPUT, cases[i].sentence);
        assert_null(mc);
        config_free(c);
    }
}

/* A key that mixer and block don't know is left for config_finish, which names it. */
static void test_unknown_key(void **state) {
    (void)state;
    error err = {0};
    config *c = NULL;
    struct model_config *mc = NULL;
    const char *text =
        "[model]\nd_model=16\nvocab_size=300\npattern=m\n[block.m]\nmixer=mamba2\nhead_dim=4\nd_stat=8\n";
    assert_int_equal(config_parse(&c, text, strlen(text), "test", &err), 0);
    assert_int_equal(model_config_bind(&mc, c, 0, &err), 0);
    assert_int_equal(config_finish(c, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_non_null(strstr(err.text, "[block.m] has no option d_stat; did you mean d_state?"));
    model_config_free(mc);
    config_free(c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_published),      cmocka_unit_test(test_flops),     cmocka_unit_test(test_tensors),
        cmocka_unit_test(test_mamba_tensors),  cmocka_unit_test(test_mlp_width), cmocka_unit_test(test_vocabulary),
        cmocka_unit_test(test_init),           cmocka_unit_test(test_patterns),  cmocka_unit_test(test_pattern_errors),
        cmocka_unit_test(test_config_errors),  cmocka_unit_test(test_unknown_key),
        cmocka_unit_test(test_mlstm_tensors),  cmocka_unit_test(test_small_init), cmocka_unit_test(test_normal_init),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
