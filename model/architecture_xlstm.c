/* architecture_xlstm.c: the xLSTM 7B architecture as transformers' xLSTMForCausalLM. See architecture.h; the keys are
 * those of transformers' xLSTMConfig, all of which are written. Reached through the table in architecture.c.
 *
 * Not expressible: blocks that are not one mLSTM and one SwiGLU of equal shapes each, LayerNorm, a tied head (the class
 * has two matrices), the sigmoid input gate. What is spelt as no cap here is a huge one there, which has no way to say
 * none.
 */
#include "model/architecture.h"
#include "model/mlp.h"
#include "model/mlstm.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#define BLOCK "block.m"
#define NO_CAP 1e30 /* stands for "no cap": no value comes near it */
#define CAP_MAX 1e6 /* the largest that riverrun's options take; one above it caps nothing */
#define WIDTH_MAX (1 << 20) /* of the MLP */
#define FACTOR 2.667
#define UNIT 64 /* transformers' defaults for the MLP's width: FACTOR times d_model, rounded up to a multiple of UNIT */

static const struct architecture_name names[] = {
    {"backbone.layers.#.norm.", "backbone.blocks.#.norm_mlstm."},
    {"backbone.layers.#.norm2.", "backbone.blocks.#.norm_ffn."},
    {"backbone.layers.#.mixer.", "backbone.blocks.#.mlstm_layer."},
    {"backbone.layers.#.mlp.gate.", "backbone.blocks.#.ffn.proj_up_gate."},
    {"backbone.layers.#.mlp.up.", "backbone.blocks.#.ffn.proj_up."},
    {"backbone.layers.#.mlp.down.", "backbone.blocks.#.ffn.proj_down."},
    {"backbone.norm_f.", "backbone.out_norm."},
    {NULL, NULL},
};

/* The same tensors and the same function; what only matters for speed or gradients may differ. */
static bool same_layer(const struct mlstm_options *a, const struct mlstm_options *b) {
    return a->heads == b->heads && a->qk_factor == b->qk_factor && a->v_factor == b->v_factor &&
           a->gate_soft_cap == b->gate_soft_cap && a->eps == b->eps && b->input_gate == MLSTM_GATE_EXP;
}

static bool expresses(const struct model_config *mc) {
    for (int k = 0; k < mc->kind_count; k++) {
        const struct block_kind *kind = &mc->kinds[k], *first = &mc->kinds[0];
        const struct mlp_options *mlp = kind->mlp_options, *first_mlp = first->mlp_options;
        if (kind->mixer != &mixer_mlstm || !mlp || mlp->kind != MLP_SWIGLU) return false;
        if (mlp->width != first_mlp->width || !same_layer(first->mixer_options, kind->mixer_options)) return false;
    }
    return mc->kind_count > 0 && !mc->options.tie_embeddings && mc->options.norm == MODEL_NORM_RMS;
}

/* Its cache has room for widths that are rounded up to multiples of 64; its layer does not round. */
static const char *caveat(const struct model_config *mc) {
    struct mlstm_sizes s = mlstm_sizes(mc->kinds[0].mixer_options, mc->options.d_model);
    enum { CACHE_UNIT = 64 };
    return s.HK % CACHE_UNIT == 0 && s.HV % CACHE_UNIT == 0
               ? NULL
               : "xLSTMForCausalLM fails with its cache where qk_factor or v_factor times d_model is no multiple of "
                 "64, as here; call it with use_cache=False, or train such widths";
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

/* transformers' rule for the MLP's width. */
static int64_t width_of(int64_t d_model, double factor, int64_t unit) {
    return (int64_t)(floor(((double)d_model * factor + (double)unit - 1) / (double)unit) * (double)unit);
}

/* A factor and a unit that make `width` by that rule: the usual ones where they do; else as large a unit as divides it,
 * which leaves room for the factor's last digit, and half an element of room where there is no such unit. */
static void put_width(json_t *object, int64_t d_model, int64_t width) {
    double factor = FACTOR;
    int64_t unit = UNIT;
    if (width_of(d_model, factor, unit) != width) {
        while (width % unit != 0) unit /= 2;
        factor = ((double)width + (unit == 1 ? 0.5 : 0)) / (double)d_model;
    }
    ASSERT(width_of(d_model, factor, unit) == width);
    architecture_put_real(object, "ffn_proj_factor", factor);
    architecture_put_int(object, "ffn_round_up_to_multiple_of", unit);
}

static void put_cap(json_t *object, const char *key, double cap) {
    architecture_put_real(object, key, cap > 0 ? cap : NO_CAP);
}

/* How transformers computes it: its own code, which is there without further packages. */
static void put_ways(json_t *object) {
    architecture_put_text(object, "chunkwise_kernel", "chunkwise--native_autograd");
    architecture_put_text(object, "sequence_kernel", "native_sequence__native");
    architecture_put_text(object, "step_kernel", "native");
    architecture_put_text(object, "mode", "inference");
    architecture_put_int(object, "chunk_size", 64);
    architecture_put_bool(object, "return_last_states", true);
    architecture_put_text(object, "autocast_kernel_dtype", "bfloat16");
    architecture_put_text(object, "inference_state_dtype", "float32");
    architecture_put_text(object, "weight_mode", "single");
    architecture_put_bool(object, "use_cache", true);
    architecture_put_int(object, "max_inference_chunksize", 16384);
}

static json_t *write_config(const struct model_config *mc, int64_t eod) {
    const struct mlstm_options *o = mc->kinds[0].mixer_options;
    const struct mlp_options *mlp = mc->kinds[0].mlp_options;
    int64_t D = mc->options.d_model;
    json_t *object = json_pack("{s: [s], s: s}", "architectures", architecture_xlstm.class_name, "model_type",
                               architecture_xlstm.model_type);
    architecture_put_int(object, "vocab_size", mc->rows);
    architecture_put_int(object, "hidden_size", D);
    architecture_put_int(object, "embedding_dim", D);
    architecture_put_int(object, "num_hidden_layers", mc->blocks);
    architecture_put_int(object, "num_blocks", mc->blocks);
    architecture_put_int(object, "num_heads", o->heads);
    architecture_put_bool(object, "use_bias", false);
    architecture_put_bool(object, "norm_reduction_force_float32", true);
    architecture_put_bool(object, "tie_word_embeddings", false);
    architecture_put_bool(object, "add_out_norm", true);
    architecture_put_real(object, "norm_eps", mc->options.norm_eps);
    architecture_put_real(object, "qk_dim_factor", o->qk_factor);
    architecture_put_real(object, "v_dim_factor", o->v_factor);
    architecture_put_real(object, "eps", o->eps);
    put_width(object, D, mlp->width);
    put_cap(object, "gate_soft_cap", o->gate_soft_cap);
    put_cap(object, "output_logit_soft_cap", mc->options.logit_cap);
    put_ways(object);
    architecture_put_ids(object, eod);
    architecture_put_text(object, "torch_dtype", "float32");
    return object;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

enum { HIDDEN, LAYERS, VOCAB, HEADS, UNIT_KEY, INTS };
static const struct architecture_int ints[INTS] = {
    [HIDDEN] = {"hidden_size", 4096, 1, 65536, "model", "d_model"},
    [LAYERS] = {"num_hidden_layers", 32, 1, LIMIT_LAYERS, NULL, NULL},
    [VOCAB] = {"vocab_size", 50304, 1, LIMIT_VOCAB, "model", "vocab_size"},
    [HEADS] = {"num_heads", 8, 1, 4096, BLOCK, "heads"},
    [UNIT_KEY] = {"ffn_round_up_to_multiple_of", UNIT, 1, 1 << 20, NULL, NULL},
};

/* A size that goes by two names: the one takes the other's place, and both must say the same. */
static int read_mirror(const json_t *object, const char *name, const char *key, struct architecture_int *main,
                       error *err) {
    int64_t value, same;
    if (!json_object_get(object, key) || json_is_null(json_object_get(object, key))) return 0;
    TRY(json_get_int(object, key, name, &value, err));
    TRY(json_get_int_or(object, main->key, name, value, &same, err));
    if (same != value)
        return error_input(err, "%s: '%s' is %" PRId64 " and '%s' is %" PRId64 "; they must be equal", name, key, value,
                           main->key, same);
    main->fallback = value;
    return 0;
}

/* A factor of d_model. */
static int read_factor(const json_t *object, const char *name, const char *key, double fallback, const char *option,
                       config *c, error *err) {
    double value;
    TRY(json_get_real_or(object, key, name, fallback, &value, err));
    if (!(value >= 1e-6 && value <= 16))
        return error_input(err, "%s: '%s' is %g; it must be from 1e-6 to 16", name, key, value);
    return architecture_set_real(c, BLOCK, option, value, err);
}

static int read_cap(const json_t *object, const char *name, const char *key, double fallback, const char *section,
                    const char *option, config *c, error *err) {
    double value = 0; /* null is none */
    if (!json_is_null(json_object_get(object, key))) {
        TRY(json_get_real_or(object, key, name, fallback, &value, err));
        if (!(value > 0))
            return error_input(err, "%s: '%s' is %g; it must be above 0, or null for none", name, key, value);
    }
    return architecture_set_real(c, section, option, value > CAP_MAX ? 0 : value, err);
}

static int read_eps(const json_t *object, const char *name, const char *key, double least, const char *section,
                    const char *option, config *c, error *err) {
    double value;
    TRY(json_get_real_or(object, key, name, 1e-6, &value, err));
    if (!(value >= least && value <= 1))
        return error_input(err, "%s: '%s' is %g; it must be from %g to 1", name, key, value, least);
    return architecture_set_real(c, section, option, value, err);
}

static int read_width(const json_t *object, const char *name, int64_t d_model, int64_t unit, config *c, error *err) {
    double factor;
    TRY(json_get_real_or(object, "ffn_proj_factor", name, FACTOR, &factor, err));
    int64_t width = factor > 0 && factor <= WIDTH_MAX ? width_of(d_model, factor, unit) : 0;
    if (width < 1 || width > WIDTH_MAX)
        return error_input(err, "%s: 'ffn_proj_factor' is %g; times 'hidden_size' it must be from 1 to %d", name,
                           factor, WIDTH_MAX);
    return architecture_set_int(c, BLOCK, "mlp_width", width, err);
}

static int check_weights(const json_t *object, const char *name, error *err) {
    const char *mode = "single";
    char shown[65];
    if (json_object_get(object, "weight_mode")) TRY(json_get_string(object, "weight_mode", name, &mode, err));
    if (strcmp(mode, "single") == 0) return 0;
    return error_input(err, "%s: 'weight_mode' is '%s'; riverrun reads single, one tensor for each projection: cut "
                       "qkv_opreact, ifgate_preact and proj_up_gate_z along their rows first", name,
                       architecture_shown(mode, shown));
}

static int check_flags(const json_t *object, const char *name, error *err) {
    TRY(architecture_check_flag(object, name, "use_bias", false, false, "xLSTM", err));
    TRY(architecture_check_flag(object, name, "add_out_norm", true, true, "xLSTM", err));
    TRY(architecture_check_flag(object, name, "tie_word_embeddings", false, false, "xLSTM", err));
    return check_weights(object, name, err);
}

static int read_config(const json_t *object, const char *name, config *c, error *err) {
    struct architecture_int sizes[INTS];
    int64_t v[INTS];
    char pattern[32];
    memcpy(sizes, ints, sizeof sizes);
    TRY(check_flags(object, name, err));
    TRY(read_mirror(object, name, "embedding_dim", &sizes[HIDDEN], err));
    TRY(read_mirror(object, name, "num_blocks", &sizes[LAYERS], err));
    TRY(config_set(c, BLOCK, "mixer", mixer_mlstm.name, err));
    TRY(config_set(c, BLOCK, "mlp", mlp_names[MLP_SWIGLU], err));
    TRY(architecture_read_ints(object, name, sizes, INTS, v, c, err));
    snprintf(pattern, sizeof pattern, "m*%" PRId64, v[LAYERS]);
    TRY(config_set(c, "model", "pattern", pattern, err));
    TRY(config_set(c, "model", "tie_embeddings", "false", err));
    TRY(config_set(c, "model", "init", "small", err));
    TRY(architecture_set_int(c, "model", "pad_vocab_to", 1, err));
    TRY(read_eps(object, name, "norm_eps", 1e-12, "model", "norm_eps", c, err));
    TRY(read_eps(object, name, "eps", 0, BLOCK, "eps", c, err));
    TRY(read_factor(object, name, "qk_dim_factor", 0.5, "qk_factor", c, err));
    TRY(read_factor(object, name, "v_dim_factor", 1, "v_factor", c, err));
    TRY(read_cap(object, name, "gate_soft_cap", 15, BLOCK, "gate_soft_cap", c, err));
    TRY(read_cap(object, name, "output_logit_soft_cap", 30, "model", "logit_cap", c, err));
    return read_width(object, name, v[HIDDEN], v[UNIT_KEY], c, err);
}

const struct architecture architecture_xlstm = {
    .model_type = "xlstm",
    .class_name = "xLSTMForCausalLM",
    .names = names,
    .expresses = expresses,
    .caveat = caveat,
    .write = write_config,
    .read = read_config,
};
