/* architecture_llama.c: Transformers as transformers' LlamaForCausalLM (SwiGLU) and ArceeForCausalLM (an MLP without a
 * gate). See architecture.h; the keys are those of LlamaConfig and ArceeConfig, every one that has a say is written.
 * Reached through the table in architecture.c.
 *
 * Not expressible: blocks that are not one attention layer and one MLP of equal shapes each, windows, norms of queries
 * and keys, no positions, LayerNorm, GEGLU, capped logits. Positions that are scaled for longer contexts, and biases,
 * are refused when read.
 */
#include "model/architecture.h"
#include "model/attention.h"
#include "model/mlp.h"

#include <inttypes.h>
#include <string.h>

#define BLOCK "block.m"
#define BASE 10000.0 /* of rotary positions, where nothing is said */

static const struct architecture_name names[] = {
    {"backbone.embeddings.", "model.embed_tokens."},
    {"backbone.layers.#.norm.", "model.layers.#.input_layernorm."},
    {"backbone.layers.#.norm2.", "model.layers.#.post_attention_layernorm."},
    {"backbone.layers.#.mixer.", "model.layers.#.self_attn."},
    {"backbone.layers.#.mlp.gate.", "model.layers.#.mlp.gate_proj."},
    {"backbone.layers.#.mlp.up.", "model.layers.#.mlp.up_proj."},
    {"backbone.layers.#.mlp.down.", "model.layers.#.mlp.down_proj."},
    {"backbone.norm_f.", "model.norm."},
    {NULL, NULL},
};

/* The same tensors and the same function of a token's past. */
static bool same_layer(const struct attention_options *a, const struct attention_options *b) {
    return a->heads == b->heads && a->kv_heads == b->kv_heads && a->head_dim == b->head_dim &&
           a->rope_base == b->rope_base && b->rope_base > 0 && b->window == 0 && !b->qk_norm;
}

static bool all_blocks(const struct model_config *mc, bool (*takes)(enum mlp_kind kind)) {
    for (int k = 0; k < mc->kind_count; k++) {
        const struct block_kind *kind = &mc->kinds[k], *first = &mc->kinds[0];
        const struct mlp_options *mlp = kind->mlp_options, *first_mlp = first->mlp_options;
        if (kind->mixer != &mixer_attention || !mlp || !takes(mlp->kind)) return false;
        if (mlp->kind != first_mlp->kind || mlp->width != first_mlp->width) return false;
        if (!same_layer(first->mixer_options, kind->mixer_options)) return false;
    }
    return mc->kind_count > 0 && mc->options.norm == MODEL_NORM_RMS && mc->options.logit_cap == 0;
}

static bool is_llama(enum mlp_kind kind) {
    return kind == MLP_SWIGLU;
}

static bool is_arcee(enum mlp_kind kind) {
    return kind == MLP_GELU || kind == MLP_RELU2;
}

static bool llama_expresses(const struct model_config *mc) {
    return all_blocks(mc, is_llama);
}

static bool arcee_expresses(const struct model_config *mc) {
    return all_blocks(mc, is_arcee);
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

static const char *activation_name(enum mlp_kind kind) {
    return kind == MLP_GELU ? "gelu" : kind == MLP_RELU2 ? "relu2" : "silu";
}

static json_t *write_as(const struct architecture *a, const struct model_config *mc, int64_t eod) {
    const struct attention_options *o = mc->kinds[0].mixer_options;
    const struct mlp_options *mlp = mc->kinds[0].mlp_options;
    json_t *object = json_pack("{s: [s], s: s}", "architectures", a->class_name, "model_type", a->model_type);
    architecture_put_int(object, "vocab_size", mc->rows);
    architecture_put_int(object, "hidden_size", mc->options.d_model);
    architecture_put_int(object, "intermediate_size", mlp->width);
    architecture_put_int(object, "num_hidden_layers", mc->blocks);
    architecture_put_int(object, "num_attention_heads", o->heads);
    architecture_put_int(object, "num_key_value_heads", o->kv_heads);
    architecture_put_int(object, "head_dim", o->head_dim);
    architecture_put_text(object, "hidden_act", activation_name(mlp->kind));
    architecture_put_int(object, "max_position_embeddings", o->context);
    architecture_put_real(object, "rms_norm_eps", mc->options.norm_eps);
    /* The base by its old and by its new name: either is read by some version. */
    architecture_put_real(object, "rope_theta", o->rope_base);
    json_object_set_new(object, "rope_parameters",
                        json_pack("{s: s, s: f}", "rope_type", "default", "rope_theta", o->rope_base));
    architecture_put_bool(object, "attention_bias", false);
    architecture_put_bool(object, "mlp_bias", false);
    architecture_put_real(object, "attention_dropout", 0);
    architecture_put_real(object, "initializer_range", 0.02);
    architecture_put_bool(object, "tie_word_embeddings", mc->options.tie_embeddings);
    architecture_put_bool(object, "use_cache", true);
    architecture_put_ids(object, eod);
    architecture_put_text(object, "torch_dtype", "float32");
    return object;
}

static json_t *llama_write(const struct model_config *mc, int64_t eod) {
    return write_as(&architecture_llama, mc, eod);
}

static json_t *arcee_write(const struct model_config *mc, int64_t eod) {
    return write_as(&architecture_arcee, mc, eod);
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

enum { HIDDEN, LAYERS, VOCAB, WIDTH, HEADS, CONTEXT, INTS };
#define INTS_OF(hidden, width, context)                                                                                \
    {                                                                                                                  \
        [HIDDEN] = {"hidden_size", hidden, 1, 65536, "model", "d_model"},                                              \
        [LAYERS] = {"num_hidden_layers", 32, 1, LIMIT_LAYERS, NULL, NULL},                                             \
        [VOCAB] = {"vocab_size", 32000, 1, LIMIT_VOCAB, "model", "vocab_size"},                                        \
        [WIDTH] = {"intermediate_size", width, 1, 1 << 20, BLOCK, "mlp_width"},                                        \
        [HEADS] = {"num_attention_heads", 32, 1, 4096, BLOCK, "heads"},                                                \
        [CONTEXT] = {"max_position_embeddings", context, 1, 1 << 24, BLOCK, "context"},                                \
    }
static const struct architecture_int llama_ints[INTS] = INTS_OF(4096, 11008, 2048);
static const struct architecture_int arcee_ints[INTS] = INTS_OF(2560, 18432, 4096);

/* A number that may be null or missing, which stands for a rule that riverrun's 0 stands for, too. */
static int read_optional(const json_t *object, const char *name, const char *key, int64_t most, const char *option,
                         config *c, error *err) {
    int64_t value;
    if (!json_object_get(object, key) || json_is_null(json_object_get(object, key))) return 0;
    TRY(json_get_int(object, key, name, &value, err));
    if (value < 1 || value > most)
        return error_input(err, "%s: '%s' is %" PRId64 "; it must be from 1 to %" PRId64 ", or null", name, key, value,
                           most);
    return architecture_set_int(c, BLOCK, option, value, err);
}

/* Positions: the base, in an object of its own or as older versions have it; nothing that scales them. */
static int read_positions(const json_t *object, const char *name, config *c, error *err) {
    static const char *const places[] = {"rope_scaling", "rope_parameters"};
    double base = BASE;
    char shown[65];
    TRY(json_get_real_or(object, "rope_theta", name, BASE, &base, err));
    for (int i = 0; i < 2; i++) {
        const json_t *rules = json_object_get(object, places[i]);
        const char *type = "default";
        double share = 1;
        if (!rules || json_is_null(rules)) continue;
        if (!json_is_object(rules)) return error_input(err, "%s: '%s' must be an object", name, places[i]);
        if (json_object_get(rules, "rope_type")) TRY(json_get_string(rules, "rope_type", name, &type, err));
        else if (json_object_get(rules, "type")) TRY(json_get_string(rules, "type", name, &type, err));
        TRY(json_get_real_or(rules, "rope_theta", name, base, &base, err));
        TRY(json_get_real_or(rules, "partial_rotary_factor", name, 1, &share, err));
        if (strcmp(type, "default") != 0)
            return error_input(err, "%s: '%s' scales positions (%s); riverrun has the default only", name, places[i],
                               architecture_shown(type, shown));
        if (share != 1)
            return error_input(err, "%s: 'partial_rotary_factor' is %g; riverrun turns whole heads", name, share);
    }
    if (!(base >= 1e-3 && base <= 1e12))
        return error_input(err, "%s: 'rope_theta' is %g; it must be from 0.001 to 1e12", name, base);
    return architecture_set_real(c, BLOCK, "rope_base", base, err);
}

static int read_activation(const json_t *object, const char *name, bool (*takes)(enum mlp_kind kind),
                           const char *fallback, config *c, error *err) {
    static const enum mlp_kind kinds[] = {MLP_SWIGLU, MLP_GELU, MLP_RELU2};
    const char *act = fallback;
    char shown[65];
    if (json_object_get(object, "hidden_act")) TRY(json_get_string(object, "hidden_act", name, &act, err));
    for (int i = 0; i < 3; i++)
        if (takes(kinds[i]) && strcmp(act, activation_name(kinds[i])) == 0)
            return config_set(c, BLOCK, "mlp", mlp_names[kinds[i]], err);
    return error_input(err, "%s: 'hidden_act' is '%s'; riverrun's MLP of that shape has %s", name,
                       architecture_shown(act, shown), takes(MLP_SWIGLU) ? "silu" : "gelu or relu2");
}

static int read_as(const json_t *object, const char *name, const struct architecture_int *ints, double eps, config *c,
                   error *err) {
    int64_t v[INTS];
    char pattern[32];
    bool tied;
    TRY(architecture_check_flag(object, name, "attention_bias", false, false, "attention", err));
    TRY(architecture_check_flag(object, name, "mlp_bias", false, false, "MLP", err));
    TRY(config_set(c, BLOCK, "mixer", mixer_attention.name, err));
    TRY(architecture_read_ints(object, name, ints, INTS, v, c, err));
    TRY(read_optional(object, name, "num_key_value_heads", 4096, "kv_heads", c, err));
    TRY(read_optional(object, name, "head_dim", 256, "head_dim", c, err));
    snprintf(pattern, sizeof pattern, "m*%" PRId64, v[LAYERS]);
    TRY(config_set(c, "model", "pattern", pattern, err));
    TRY(json_get_bool_or(object, "tie_word_embeddings", name, false, &tied, err));
    TRY(config_set(c, "model", "tie_embeddings", tied ? "true" : "false", err));
    TRY(architecture_set_int(c, "model", "pad_vocab_to", 1, err));
    TRY(json_get_real_or(object, "rms_norm_eps", name, eps, &eps, err));
    if (!(eps >= 1e-12 && eps <= 1))
        return error_input(err, "%s: 'rms_norm_eps' is %g; it must be from 1e-12 to 1", name, eps);
    TRY(architecture_set_real(c, "model", "norm_eps", eps, err));
    return read_positions(object, name, c, err);
}

static int llama_read(const json_t *object, const char *name, config *c, error *err) {
    TRY(read_activation(object, name, is_llama, "silu", c, err));
    return read_as(object, name, llama_ints, 1e-6, c, err);
}

static int arcee_read(const json_t *object, const char *name, config *c, error *err) {
    TRY(read_activation(object, name, is_arcee, "relu2", c, err));
    return read_as(object, name, arcee_ints, 1e-5, c, err);
}

const struct architecture architecture_llama = {
    .model_type = "llama",
    .class_name = "LlamaForCausalLM",
    .names = names,
    .expresses = llama_expresses,
    .write = llama_write,
    .read = llama_read,
};

const struct architecture architecture_arcee = {
    .model_type = "arcee",
    .class_name = "ArceeForCausalLM",
    .names = names,
    .expresses = arcee_expresses,
    .write = arcee_write,
    .read = arcee_read,
};
