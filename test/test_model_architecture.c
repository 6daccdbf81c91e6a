/* test_model_architecture.c: config.json of the models that transformers has a class for, and back: every key, what is
 * refused, and what keeps a model from its class. The others are test_model_architecture_own.c's. */
#include "test/unit.h"

#include "model/attention.h"
#include "model/mamba.h"
#include "model/mamba2.h"
#include "model/mlp.h"
#include "model/mlstm.h"
#include "test/support_architecture.h"

static const char mamba2_text[] =
    "[model]\nd_model = 40\nvocab_size = 257\npad_vocab_to = 16\nnorm_eps = 1e-6\npattern = a*2 b\n"
    "[block.a]\nmixer = mamba2\nd_state = 12\nhead_dim = 8\nexpand = 3\nd_conv = 3\nchunk = 32\n"
    "dt_min = 0.002\ndt_max = 0.2\ndt_init_floor = 1e-5\n"
    "[block.b]\nmixer = mamba2\nd_state = 12\nhead_dim = 8\nexpand = 3\nd_conv = 3\nA_init_max = 9\n";

/* ---- Mamba-2 ----------------------------------------------------------------------------------------------------- */

static void every_key_of_mamba2_is_written(void **state) {
    (void)state;
    struct bound b = bound_text(mamba2_text, NULL);
    assert_string_equal(architecture_class(b.mc), "Mamba2ForCausalLM");
    static const char text[] =
        "{\"architectures\": [\"Mamba2ForCausalLM\"], \"model_type\": \"mamba2\", \"vocab_size\": 272, "
        "\"hidden_size\": 40,"
        " \"num_heads\": 15, \"head_dim\": 8, \"state_size\": 12, \"num_hidden_layers\": 3, \"layer_norm_epsilon\": "
        "1e-6,"
        " \"pad_token_id\": 256, \"bos_token_id\": 256, \"eos_token_id\": 256, \"expand\": 3, \"conv_kernel\": 3,"
        " \"n_groups\": 1, \"chunk_size\": 256, \"use_bias\": false, \"use_conv_bias\": true, \"hidden_act\": \"silu\","
        " \"initializer_range\": 0.1, \"residual_in_fp32\": true, \"rms_norm\": true, \"time_step_rank\": 3,"
        " \"time_step_min\": 0.002, \"time_step_max\": 0.2, \"time_step_floor\": 1e-5, \"rescale_prenorm_residual\": "
        "false,"
        " \"use_cache\": true, \"tie_word_embeddings\": true, \"torch_dtype\": \"float32\"}";
    expect_written(&b, 256, text);
    json_t *object = architecture_write(b.mc, b.c, -1);
    assert_true(json_is_null(json_object_get(object, "eos_token_id")));
    json_decref(object);
    unbind(&b);
}

static void mamba2_comes_back(void **state) {
    (void)state;
    static const char *const changes[] = {NULL, "model.tie_embeddings=false", "model.d_model=8", "model.vocab_size=16"};
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        struct journey j = journey_begin(mamba2_text, changes[i]);
        const struct mamba2_options *o = j.back.mc->kinds[0].mixer_options;
        assert_true(o->dt_min == 0.002 && o->dt_max == 0.2 && o->dt_init_floor == 1e-5);
        assert_true(o->dt_limit_min == 0 && o->dt_limit_max == 0);
        journey_end(&j);
    }
}

/* Limits of the step size, which most models don't have. */
static void limits_are_written_and_read(void **state) {
    (void)state;
    static const struct {
        const char *change;
        double least, most;
    } cases[] = {{"block.m.dt_limit_min=0.25", 0.25, 0}, {"block.m.dt_limit_max=0.5", 0, 0.5}};
    static const char text[] =
        "[model]\nd_model = 8\nvocab_size = 9\npattern = m\n[block.m]\nmixer = mamba2\nhead_dim = 4\n";
    for (size_t i = 0; i < 2; i++) {
        struct journey j = journey_begin(text, cases[i].change);
        assert_int_equal(json_array_size(json_object_get(j.object, "time_step_limit")), 2);
        const struct mamba2_options *o = j.back.mc->kinds[0].mixer_options;
        assert_true(o->dt_limit_min == cases[i].least && o->dt_limit_max == cases[i].most);
        journey_end(&j);
    }
}

static const char mamba2_json[] = "{\"model_type\": \"mamba2\", \"vocab_size\": 50, \"hidden_size\": 16,"
                                  " \"num_heads\": 4, \"head_dim\": 8, \"state_size\": 6, \"num_hidden_layers\": 2,"
                                  " \"n_groups\": 1}";

static void what_is_left_out_has_the_default_of_transformers(void **state) {
    (void)state;
    struct bound r = bound_altered(mamba2_json, NULL, NULL);
    const struct mamba2_options *o = r.mc->kinds[0].mixer_options;
    assert_int_equal(o->expand, 2);
    assert_int_equal(o->d_conv, 4);
    assert_true(r.mc->options.norm_eps == 1e-5);
    assert_false(r.mc->options.tie_embeddings);
    assert_int_equal(r.mc->blocks, 2);
    unbind(&r);
    /* All of them: Codestral Mamba, but for its groups. */
    r = bound_altered("{\"model_type\": \"mamba2\", \"n_groups\": 1}", NULL, NULL);
    assert_int_equal(r.mc->options.d_model, 4096);
    assert_int_equal(r.mc->blocks, 64);
    assert_int_equal(r.mc->rows, 32768);
    unbind(&r);
    static const char *const harmless[][2] = {
        {"hidden_act", "\"swish\""}, {"use_bias", "false"}, {"use_conv_bias", "true"}, {"rms_norm", "true"},
        {"chunk_size", "99"}, {"residual_in_fp32", "false"}, {"unknown", "[1]"}, {"transformers_version", "\"9\""},
        {"time_step_limit", "[0.0, \"Infinity\"]"}, {"time_step_limit", "[0.0, {\"__float__\": \"Infinity\"}]"},
        {"time_step_limit", "[0, 1e30]"}, {"time_step_rank", "\"auto\""},
    };
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        r = bound_altered(mamba2_json, harmless[i][0], harmless[i][1]);
        o = r.mc->kinds[0].mixer_options;
        assert_true(o->dt_limit_min == 0 && o->dt_limit_max == 0);
        unbind(&r);
    }
}

static void what_the_layer_can_not_be_is_refused(void **state) {
    (void)state;
    static const struct refusal cases[] = {
        {"model_type", NULL, "c.json: 'model_type' is missing, it must be a string"},
        {"model_type", "\"gpt2\"",
         "c.json: model_type is 'gpt2'; riverrun reads mamba, mamba2, xlstm, llama, arcee, and its own, riverrun"},
        {"use_bias", "true", "c.json: 'use_bias' is true; riverrun's Mamba-2 needs false"},
        {"use_conv_bias", "false", "c.json: 'use_conv_bias' is false; riverrun's Mamba-2 needs true"},
        {"rms_norm", "false", "c.json: 'rms_norm' is false; riverrun's Mamba-2 needs true"},
        {"use_bias", "1", "c.json: 'use_bias' is an integer, it must be true or false"},
        {"hidden_act", "\"gelu\"", "c.json: 'hidden_act' is 'gelu'; riverrun's Mamba-2 needs silu"},
        {"n_groups", "2",
         "c.json: 'n_groups' is 2; riverrun reads models with 1, because transformers normalises several "
         "groups in two different ways"},
        {"n_groups", NULL,
         "c.json: 'n_groups' is 8; riverrun reads models with 1, because transformers normalises several "
         "groups in two different ways"},
        {"num_heads", "5", "c.json: 'num_heads' * 'head_dim' is 40; it must equal 'expand' * 'hidden_size', 32"},
        {"hidden_size", "0", "c.json: 'hidden_size' is 0; it must be from 1 to 65536"},
        {"num_hidden_layers", "-3", "c.json: 'num_hidden_layers' is -3; it must be from 1 to 1024"},
        {"state_size", "6.0", "c.json: 'state_size' is a real number, it must be an integer"},
        {"vocab_size", "100000000", "c.json: 'vocab_size' is 100000000; it must be from 1 to 16777216"},
        {"layer_norm_epsilon", "\"x\"", "c.json: 'layer_norm_epsilon' is a string, it must be a number"},
        {"tie_word_embeddings", "null", "c.json: 'tie_word_embeddings' is null, it must be true or false"},
        {"time_step_limit", "[0]", "c.json: 'time_step_limit' must be a list of two numbers"},
        {"time_step_limit", "[0, \"x\"]", "c.json: 'time_step_limit' must be a list of two numbers"},
        {"time_step_limit", "[2, 1]",
         "c.json: 'time_step_limit' is [2, 1]; the first must be at least 0 and at most the "
         "second, which must be above 0"},
        {"time_step_limit", "[-1, 1]",
         "c.json: 'time_step_limit' is [-1, 1]; the first must be at least 0 and at most the "
         "second, which must be above 0"},
        {"time_step_min", "[]", "c.json: 'time_step_min' is an array, it must be a number"},
    };
    expect_refused(mamba2_json, cases, sizeof cases / sizeof *cases);
}

/* What keeps a model from being Mamba2ForCausalLM. */
static void mamba2_that_transformers_lacks(void **state) {
    (void)state;
    static const char *const changes[] = {"block.b.d_state=5",  "block.b.head_dim=4", "block.a.n_groups=3",
                                          "block.b.mlp=swiglu", "block.b.d_conv=4",   "block.a.dt_limit_max=1",
                                          "block.b.expand=2"};
    expect_no_class(mamba2_text, changes, sizeof changes / sizeof *changes, NULL);
}

/* ---- Mamba ------------------------------------------------------------------------------------------------------- */

static const char mamba_text[] =
    "[model]\nd_model = 40\nvocab_size = 257\npad_vocab_to = 8\nnorm_eps = 1e-6\npattern = a*2 b\n"
    "[block.a]\nmixer = mamba\nd_state = 12\nexpand = 3\nd_conv = 3\ndt_rank = 5\n"
    "dt_min = 0.002\ndt_max = 0.2\ndt_init_floor = 1e-5\ndt_scale = 0.5\n"
    "[block.b]\nmixer = mamba\nd_state = 12\nexpand = 3\nd_conv = 3\ndt_rank = 5\ndt_max = 0.3\n";

static void every_key_of_mamba_is_written(void **state) {
    (void)state;
    struct bound b = bound_text(mamba_text, NULL);
    assert_string_equal(architecture_class(b.mc), "MambaForCausalLM");
    static const char text[] =
        "{\"architectures\": [\"MambaForCausalLM\"], \"model_type\": \"mamba\", \"vocab_size\": 264,"
        " \"hidden_size\": 40, \"state_size\": 12, \"num_hidden_layers\": 3, \"layer_norm_epsilon\": 1e-6,"
        " \"pad_token_id\": 256, \"bos_token_id\": 256, \"eos_token_id\": 256, \"expand\": 3,"
        " \"intermediate_size\": 120, \"conv_kernel\": 3, \"use_bias\": false, \"use_conv_bias\": true,"
        " \"hidden_act\": \"silu\", \"initializer_range\": 0.1, \"residual_in_fp32\": true,"
        " \"time_step_rank\": 5, \"time_step_scale\": 0.5, \"time_step_min\": 0.002,"
        " \"time_step_max\": 0.2, \"time_step_init_scheme\": \"random\", \"time_step_floor\": 1e-5,"
        " \"rescale_prenorm_residual\": false, \"use_cache\": true, \"tie_word_embeddings\": true,"
        " \"torch_dtype\": \"float32\"}";
    expect_written(&b, 256, text);
    unbind(&b);
}

static void mamba_comes_back(void **state) {
    (void)state;
    static const char *const changes[] = {NULL, "model.tie_embeddings=false", "model.d_model=33", "block.a.d_state=12"};
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        struct journey j = journey_begin(mamba_text, changes[i]);
        const struct mamba_options *o = j.back.mc->kinds[0].mixer_options;
        assert_true(o->dt_min == 0.002 && o->dt_max == 0.2 && o->dt_init_floor == 1e-5 && o->dt_scale == 0.5);
        journey_end(&j);
    }
}

static const char mamba_json[] = "{\"model_type\": \"mamba\", \"vocab_size\": 50, \"hidden_size\": 17,"
                                 " \"state_size\": 6, \"num_hidden_layers\": 2, \"expand\": 2}";

static void what_mamba_leaves_out_has_the_default_of_transformers(void **state) {
    (void)state;
    static const struct {
        const char *key, *value;
        int64_t rank;
    } cases[] = {{NULL, NULL, 2}, {"time_step_rank", "\"auto\"", 2}, {"time_step_rank", "5", 5},
                 {"intermediate_size", "34", 2}, {"use_mambapy", "true", 2}, {"residual_in_fp32", "false", 2},
                 {"time_step_init_scheme", "\"constant\"", 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct bound r = bound_altered(mamba_json, cases[i].key, cases[i].value);
        const struct mamba_options *o = r.mc->kinds[0].mixer_options;
        assert_int_equal(o->dt_rank, cases[i].rank);
        assert_int_equal(o->d_conv, 4);
        assert_int_equal(r.mc->blocks, 2);
        assert_true(r.mc->options.norm_eps == 1e-5);
        assert_true(r.mc->options.tie_embeddings);
        unbind(&r);
    }
    struct bound r = bound_altered("{\"model_type\": \"mamba\"}", NULL, NULL);
    assert_int_equal(r.mc->options.d_model, 768);
    assert_int_equal(r.mc->blocks, 32);
    assert_int_equal(r.mc->rows, 50280);
    assert_int_equal(((const struct mamba_options *)r.mc->kinds[0].mixer_options)->d_state, 16);
    assert_int_equal(((const struct mamba_options *)r.mc->kinds[0].mixer_options)->dt_rank, 48);
    unbind(&r);
}

static void what_mamba_can_not_be_is_refused(void **state) {
    (void)state;
    static const struct refusal cases[] = {
        {"use_bias", "true", "c.json: 'use_bias' is true; riverrun's Mamba needs false"},
        {"use_conv_bias", "false", "c.json: 'use_conv_bias' is false; riverrun's Mamba needs true"},
        {"hidden_act", "\"relu\"", "c.json: 'hidden_act' is 'relu'; riverrun's Mamba needs silu"},
        {"intermediate_size", "35", "c.json: 'intermediate_size' is 35; it must equal 'expand' * 'hidden_size', 34"},
        {"time_step_rank", "\"half\"", "c.json: 'time_step_rank' is a string, it must be an integer"},
        {"time_step_rank", "0", "c.json: 'time_step_rank' is 0; it must be from 1 to 65536"},
        {"conv_kernel", "9", "c.json: 'conv_kernel' is 9; it must be from 2 to 8"},
        {"expand", "1.5", "c.json: 'expand' is a real number, it must be an integer"},
        {"time_step_scale", "true", "c.json: 'time_step_scale' is a boolean, it must be a number"},
    };
    expect_refused(mamba_json, cases, sizeof cases / sizeof *cases);
}

/* What keeps a model from being MambaForCausalLM. */
static void mamba_that_transformers_lacks(void **state) {
    (void)state;
    static const char *const changes[] = {"block.b.d_state=5", "block.b.dt_rank=4", "block.b.dt_rank=0",
                                          "block.b.mlp=swiglu", "block.b.expand=2",  "block.b.d_conv=4"};
    expect_no_class(mamba_text, changes, sizeof changes / sizeof *changes, NULL);
    static const char both[] = "[model]\nd_model = 8\nvocab_size = 9\npattern = m s\n"
                               "[block.m]\nmixer = mamba2\nhead_dim = 4\n[block.s]\nmixer = mamba\n";
    static const char *const as_it_is[] = {NULL};
    expect_no_class(both, as_it_is, 1, NULL);
}

/* ---- xLSTM ------------------------------------------------------------------------------------------------------- */

static const char xlstm_text[] =
    "[model]\nd_model = 48\nvocab_size = 257\npad_vocab_to = 8\nnorm_eps = 1e-5\ntie_embeddings = false\n"
    "logit_cap = 20\ninit = small\npattern = a*2 b\n"
    "[block.a]\nmixer = mlstm\nheads = 3\nqk_factor = 0.75\nv_factor = 2\ngate_soft_cap = 9\neps = 1e-4\n"
    "mlp = swiglu\nmlp_width = 128\n"
    "[block.b]\nmixer = mlstm\nheads = 3\nqk_factor = 0.75\nv_factor = 2\ngate_soft_cap = 9\neps = 1e-4\n"
    "mlp = swiglu\nmlp_width = 128\nchunk = 128\nbackward = truncated\nrecompute = scan\n";

static void every_key_of_xlstm_is_written(void **state) {
    (void)state;
    struct bound b = bound_text(xlstm_text, NULL);
    assert_string_equal(architecture_class(b.mc), "xLSTMForCausalLM");
    static const char text[] =
        "{\"architectures\": [\"xLSTMForCausalLM\"], \"model_type\": \"xlstm\", \"vocab_size\": 264,"
        " \"hidden_size\": 48, \"embedding_dim\": 48, \"num_hidden_layers\": 3, \"num_blocks\": 3, \"num_heads\": 3,"
        " \"use_bias\": false, \"norm_reduction_force_float32\": true, \"tie_word_embeddings\": false,"
        " \"add_out_norm\": true, \"norm_eps\": 1e-5, \"qk_dim_factor\": 0.75, \"v_dim_factor\": 2.0,"
        " \"chunkwise_kernel\": \"chunkwise--native_autograd\", \"sequence_kernel\": \"native_sequence__native\","
        " \"step_kernel\": \"native\", \"mode\": \"inference\", \"chunk_size\": 64, \"return_last_states\": true,"
        " \"autocast_kernel_dtype\": \"bfloat16\", \"eps\": 1e-4, \"inference_state_dtype\": \"float32\","
        " \"ffn_proj_factor\": 2.667, \"ffn_round_up_to_multiple_of\": 64, \"gate_soft_cap\": 9.0,"
        " \"output_logit_soft_cap\": 20.0, \"weight_mode\": \"single\", \"use_cache\": true, \"pad_token_id\": 256,"
        " \"bos_token_id\": 256, \"eos_token_id\": 256, \"max_inference_chunksize\": 16384,"
        " \"torch_dtype\": \"float32\"}";
    expect_written(&b, 256, text);
    unbind(&b);
}

static void xlstm_comes_back(void **state) {
    (void)state;
    static const char *const changes[] = {NULL, "model.d_model=36", "model.vocab_size=16", "model.norm_eps=1e-7"};
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        struct journey j = journey_begin(xlstm_text, changes[i]);
        const struct mlstm_options *o = j.back.mc->kinds[0].mixer_options;
        assert_true(j.back.mc->options.logit_cap == 20);
        assert_true(o->heads == 3 && o->qk_factor == 0.75 && o->v_factor == 2 && o->eps == 1e-4);
        assert_true(o->gate_soft_cap == 9);
        assert_int_equal(j.back.mc->options.init, MODEL_INIT_SMALL);
        assert_null(json_object_get(j.object, "settings"));
        journey_end(&j);
    }
}

/* Any width of the MLP can be said by a factor and a unit; no cap is a huge one. */
static void widths_and_caps_come_back(void **state) {
    (void)state;
    static const char format[] = "[model]\nd_model = %d\nvocab_size = 9\ntie_embeddings = false\npattern = m\n"
                                 "[block.m]\nmixer = mlstm\nheads = 1\nv_factor = 0.5\neps = 0\ngate_soft_cap = 0\n"
                                 "mlp = swiglu\nmlp_width = %d\n";
    static const int sizes[][2] = {{768, 2048}, {768, 2112}, {4096, 10944}, {2, 1},  {3, 64},
                                   {7, 96},     {49, 1000},  {127, 333},    {64, 2}, {1000, 4097}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char text[300];
        snprintf(text, sizeof text, format, sizes[i][0], sizes[i][1]);
        struct journey j = journey_begin(text, NULL);
        assert_int_equal(((const struct mlp_options *)j.back.mc->kinds[0].mlp_options)->width, sizes[i][1]);
        assert_true(((const struct mlstm_options *)j.back.mc->kinds[0].mixer_options)->gate_soft_cap == 0);
        assert_true(j.back.mc->options.logit_cap == 0);
        assert_true(json_real_value(json_object_get(j.object, "gate_soft_cap")) == 1e30);
        bool usual = json_real_value(json_object_get(j.object, "ffn_proj_factor")) == 2.667;
        assert_true(usual == (i == 0 || i == 2 || i == 4));
        journey_end(&j);
    }
}

static const char xlstm_json[] = "{\"model_type\": \"xlstm\", \"vocab_size\": 50, \"hidden_size\": 16,"
                                 " \"num_heads\": 2, \"num_hidden_layers\": 2}";

static void what_xlstm_leaves_out_has_the_default_of_transformers(void **state) {
    (void)state;
    struct bound r = bound_altered("{\"model_type\": \"xlstm\"}", NULL, NULL);
    const struct mlstm_options *o = r.mc->kinds[0].mixer_options;
    assert_int_equal(r.mc->params.total, 6865424896);
    assert_true(o->heads == 8 && o->gate_soft_cap == 15 && o->eps == 1e-6 && r.mc->options.norm_eps == 1e-6);
    assert_true(r.mc->options.logit_cap == 30);
    unbind(&r);
    static const char *const harmless[][2] = {
        {"embedding_dim", "16"}, {"num_blocks", "2"},     {"num_blocks", "null"},
        {"chunk_size", "99"},    {"mode", "\"train\""},   {"weight_mode", "\"single\""},
        {"use_cache", "false"},  {"unknown", "[1]"},      {"norm_reduction_force_float32", "false"},
    };
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        r = bound_altered(xlstm_json, harmless[i][0], harmless[i][1]);
        assert_true(r.mc->options.d_model == 16 && r.mc->blocks == 2);
        unbind(&r);
    }
    /* Its other name. */
    r = bound_altered("{\"model_type\": \"xlstm\", \"num_heads\": 2, \"embedding_dim\": 16}", NULL, NULL);
    assert_int_equal(r.mc->options.d_model, 16);
    unbind(&r);
    r = bound_altered(xlstm_json, "gate_soft_cap", "null");
    assert_true(((const struct mlstm_options *)r.mc->kinds[0].mixer_options)->gate_soft_cap == 0);
    unbind(&r);
}

static void what_xlstm_can_not_be_is_refused(void **state) {
    (void)state;
    static const struct refusal cases[] = {
        {"use_bias", "true", "c.json: 'use_bias' is true; riverrun's xLSTM needs false"},
        {"add_out_norm", "false", "c.json: 'add_out_norm' is false; riverrun's xLSTM needs true"},
        {"tie_word_embeddings", "true", "c.json: 'tie_word_embeddings' is true; riverrun's xLSTM needs false"},
        {"weight_mode", "\"fused\"",
         "c.json: 'weight_mode' is 'fused'; riverrun reads single, one tensor for each projection: cut qkv_opreact, "
         "ifgate_preact and proj_up_gate_z along their rows first"},
        {"embedding_dim", "17", "c.json: 'embedding_dim' is 17 and 'hidden_size' is 16; they must be equal"},
        {"num_blocks", "3", "c.json: 'num_blocks' is 3 and 'num_hidden_layers' is 2; they must be equal"},
        {"num_heads", "0", "c.json: 'num_heads' is 0; it must be from 1 to 4096"},
        {"qk_dim_factor", "0", "c.json: 'qk_dim_factor' is 0; it must be from 1e-6 to 16"},
        {"v_dim_factor", "17", "c.json: 'v_dim_factor' is 17; it must be from 1e-6 to 16"},
        {"ffn_proj_factor", "0", "c.json: 'ffn_proj_factor' is 0; times 'hidden_size' it must be from 1 to 1048576"},
        {"ffn_proj_factor", "1e99",
         "c.json: 'ffn_proj_factor' is 1e+99; times 'hidden_size' it must be from 1 to 1048576"},
        {"ffn_round_up_to_multiple_of", "0",
         "c.json: 'ffn_round_up_to_multiple_of' is 0; it must be from 1 to 1048576"},
        {"gate_soft_cap", "0", "c.json: 'gate_soft_cap' is 0; it must be above 0, or null for none"},
        {"output_logit_soft_cap", "-1", "c.json: 'output_logit_soft_cap' is -1; it must be above 0, or null for none"},
        {"norm_eps", "0", "c.json: 'norm_eps' is 0; it must be from 1e-12 to 1"},
        {"eps", "-1", "c.json: 'eps' is -1; it must be from 0 to 1"},
        {"eps", "[]", "c.json: 'eps' is an array, it must be a number"},
    };
    expect_refused(xlstm_json, cases, sizeof cases / sizeof *cases);
}

/* What keeps a model from being xLSTMForCausalLM; its tensors then have riverrun's names. */
/* Its cache knows multiples of 64 only. */
static void xlstm_that_its_class_fails_with(void **state) {
    (void)state;
    static const char wide[] = "[model]\nd_model = 128\nvocab_size = 257\ntie_embeddings = false\npattern = a\n"
                               "[block.a]\nmixer = mlstm\nheads = 2\nmlp = swiglu\n";
    struct bound b = bound_text(wide, NULL);
    assert_null(architecture_caveat(b.mc));
    unbind(&b);
    b = bound_text(xlstm_text, NULL);
    assert_non_null(strstr(architecture_caveat(b.mc), "no multiple of 64"));
    unbind(&b);
}

static void xlstm_that_transformers_lacks(void **state) {
    (void)state;
    static const char *const changes[] = {
        "block.b.heads=6",     "block.b.qk_factor=0.5",         "block.b.v_factor=1", "block.b.gate_soft_cap=8",
        "block.b.eps=1e-5",    "block.b.input_gate=sigmoid",    "block.b.mlp=geglu",  "block.b.mlp_width=64",
        "model.norm=layer",    "model.tie_embeddings=true",     "block.a.mlp=relu2",  "block.a.input_gate=sigmoid",
    };
    expect_no_class(xlstm_text, changes, sizeof changes / sizeof *changes,
                    "backbone.layers.2.mixer.igate_preact.bias");
}

/* ---- Llama, and its kin without a gate --------------------------------------------------------------------------- */

#define LLAMA_BLOCK(name, mlp)                                                                                         \
    "[block." name "]\nmixer = attention\nheads = 6\nkv_heads = 2\nhead_dim = 12\nrope_base = 500\ncontext = 300\n"    \
    "mlp = " mlp "\nmlp_width = 100\n"
#define LLAMA_TEXT(mlp)                                                                                                \
    "[model]\nd_model = 48\nvocab_size = 257\npad_vocab_to = 8\nnorm_eps = 1e-6\npattern = a*2 b\n"                    \
    LLAMA_BLOCK("a", mlp) LLAMA_BLOCK("b", mlp) "recompute = scan\n"
static const char llama_text[] = LLAMA_TEXT("swiglu");

static void every_key_of_llama_is_written(void **state) {
    (void)state;
    struct bound b = bound_text(llama_text, NULL);
    assert_string_equal(architecture_class(b.mc), "LlamaForCausalLM");
    static const char text[] =
        "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"vocab_size\": 264, "
        "\"hidden_size\": 48, \"intermediate_size\": 100, \"num_hidden_layers\": 3, \"num_attention_heads\": 6, "
        "\"num_key_value_heads\": 2, \"head_dim\": 12, \"hidden_act\": \"silu\", "
        "\"max_position_embeddings\": 300, \"rms_norm_eps\": 1e-6,"
        " \"rope_theta\": 500.0, \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 500.0},"
        " \"attention_bias\": false, \"mlp_bias\": false, \"attention_dropout\": 0.0, \"initializer_range\": 0.02,"
        " \"tie_word_embeddings\": true, \"use_cache\": true, \"pad_token_id\": 256, \"bos_token_id\": 256,"
        " \"eos_token_id\": 256, \"torch_dtype\": \"float32\"}";
    expect_written(&b, 256, text);
    unbind(&b);
}

static void llama_comes_back(void **state) {
    (void)state;
    static const struct {
        const char *text, *change, *class_name;
    } cases[] = {{llama_text, NULL, "LlamaForCausalLM"},
                 {llama_text, "model.tie_embeddings=false", "LlamaForCausalLM"},
                 {llama_text, "model.d_model=36", "LlamaForCausalLM"},
                 {LLAMA_TEXT("gelu"), NULL, "ArceeForCausalLM"},
                 {LLAMA_TEXT("relu2"), NULL, "ArceeForCausalLM"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct journey j = journey_begin(cases[i].text, cases[i].change);
        assert_string_equal(architecture_class(j.there.mc), cases[i].class_name);
        const struct attention_options *o = j.back.mc->kinds[0].mixer_options;
        assert_true(o->rope_base == 500 && o->context == 300);
        assert_true(o->heads == 6 && o->kv_heads == 2 && o->head_dim == 12 && o->window == 0 && !o->qk_norm);
        assert_int_equal(j.back.mc->kinds[0].options.mlp, j.there.mc->kinds[0].options.mlp);
        journey_end(&j);
    }
}

static const char llama_json[] = "{\"model_type\": \"llama\", \"vocab_size\": 50, \"hidden_size\": 16,"
                                 " \"num_attention_heads\": 4, \"num_hidden_layers\": 2, \"intermediate_size\": 40}";

static void what_llama_leaves_out_has_the_default_of_transformers(void **state) {
    (void)state;
    static const char *const changes[][2] = {
        {"num_key_value_heads", "null"}, {"head_dim", "null"},     {"head_dim", "4"},
        {"rope_scaling", "null"},        {"rope_theta", "10000"},  {"rope_parameters", "{\"rope_theta\": 10000.0}"},
        {"unknown", "[1]"},              {"use_cache", "false"},   {"rope_scaling", "{\"type\": \"default\"}"},
    };
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        struct bound r = bound_altered(llama_json, changes[i][0], changes[i][1]);
        const struct attention_options *o = r.mc->kinds[0].mixer_options;
        assert_true(o->kv_heads == 4 && o->head_dim == 4 && o->rope_base == 10000 && o->context == 2048);
        assert_true(r.mc->options.norm_eps == 1e-6 && !r.mc->options.tie_embeddings && r.mc->head != r.mc->embedding);
        unbind(&r);
    }
}

static void what_llama_can_not_be_is_refused(void **state) {
    (void)state;
    static const struct refusal cases[] = {
        {"attention_bias", "true", "c.json: 'attention_bias' is true; riverrun's attention needs false"},
        {"mlp_bias", "true", "c.json: 'mlp_bias' is true; riverrun's MLP needs false"},
        {"hidden_act", "\"gelu\"", "c.json: 'hidden_act' is 'gelu'; riverrun's MLP of that shape has silu"},
        {"num_key_value_heads", "0", "c.json: 'num_key_value_heads' is 0; it must be from 1 to 4096, or null"},
        {"head_dim", "300", "c.json: 'head_dim' is 300; it must be from 1 to 256, or null"},
        {"rms_norm_eps", "0", "c.json: 'rms_norm_eps' is 0; it must be from 1e-12 to 1"},
        {"rope_theta", "0", "c.json: 'rope_theta' is 0; it must be from 0.001 to 1e12"},
        {"rope_scaling", "1", "c.json: 'rope_scaling' must be an object"},
        {"rope_scaling", "{\"type\": \"linear\", \"factor\": 2.0}",
         "c.json: 'rope_scaling' scales positions (linear); riverrun has the default only"},
        {"rope_parameters", "{\"rope_type\": \"llama3\"}",
         "c.json: 'rope_parameters' scales positions (llama3); riverrun has the default only"},
        {"rope_parameters", "{\"partial_rotary_factor\": 0.5}",
         "c.json: 'partial_rotary_factor' is 0.5; riverrun turns whole heads"},
    };
    expect_refused(llama_json, cases, sizeof cases / sizeof *cases);
}

/* What keeps a model from being LlamaForCausalLM. */
static void llama_that_transformers_lacks(void **state) {
    (void)state;
    static const char *const changes[] = {"block.b.heads=2",     "block.b.window=7",       "block.b.qk_norm=true",
                                          "block.b.rope_base=0", "block.b.mlp=geglu",      "block.b.mlp=relu2",
                                          "block.b.mlp_width=8", "block.b.rope_base=1000", "model.norm=layer",
                                          "model.logit_cap=9"};
    expect_no_class(llama_text, changes, sizeof changes / sizeof *changes, "backbone.layers.2.mixer.q_proj.weight");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_key_of_mamba2_is_written),
        cmocka_unit_test(mamba2_comes_back),
        cmocka_unit_test(limits_are_written_and_read),
        cmocka_unit_test(what_is_left_out_has_the_default_of_transformers),
        cmocka_unit_test(what_the_layer_can_not_be_is_refused),
        cmocka_unit_test(mamba2_that_transformers_lacks),
        cmocka_unit_test(every_key_of_mamba_is_written),
        cmocka_unit_test(mamba_comes_back),
        cmocka_unit_test(what_mamba_leaves_out_has_the_default_of_transformers),
        cmocka_unit_test(what_mamba_can_not_be_is_refused),
        cmocka_unit_test(mamba_that_transformers_lacks),
        cmocka_unit_test(every_key_of_xlstm_is_written),
        cmocka_unit_test(xlstm_comes_back),
        cmocka_unit_test(widths_and_caps_come_back),
        cmocka_unit_test(what_xlstm_leaves_out_has_the_default_of_transformers),
        cmocka_unit_test(what_xlstm_can_not_be_is_refused),
        cmocka_unit_test(xlstm_that_its_class_fails_with),
        cmocka_unit_test(xlstm_that_transformers_lacks),
        cmocka_unit_test(every_key_of_llama_is_written),
        cmocka_unit_test(llama_comes_back),
        cmocka_unit_test(what_llama_leaves_out_has_the_default_of_transformers),
        cmocka_unit_test(what_llama_can_not_be_is_refused),
        cmocka_unit_test(llama_that_transformers_lacks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
