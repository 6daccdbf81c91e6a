/* architecture_mamba2.c: Mamba-2 as transformers' Mamba2ForCausalLM. See architecture.h; the keys are those of
 * transformers' Mamba2Config, whose defaults describe Codestral Mamba and not the published models, so every key is
 * written. Reached through the table in architecture.c.
 *
 * Not expressible: an MLP, blocks of different shapes, and more than one group, for which transformers' two paths
 * normalise differently (over all channels, over each group's).
 */
#include "model/architecture.h"
#include "model/mamba2.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#define BLOCK "block.m"
/* Stands for "no limit" where a limit below needs a partner above: JSON has no infinity, and no step size reaches this.
 */
#define NO_LIMIT 1e30
#define LIMIT_MAX 1e6 /* the largest that mamba2's options take; one above it limits nothing */

static const struct mamba2_options *options_of(const struct model_config *mc, int kind) {
    return mc->kinds[kind].mixer_options;
}

/* Same tensors and same function: what only matters for initial weights or speed may differ. */
static bool same_layer(const struct mamba2_options *a, const struct mamba2_options *b) {
    return a->d_state == b->d_state && a->head_dim == b->head_dim && a->expand == b->expand &&
           a->n_groups == b->n_groups && a->d_conv == b->d_conv && a->dt_limit_min == b->dt_limit_min &&
           a->dt_limit_max == b->dt_limit_max;
}

static bool expresses(const struct model_config *mc) {
    for (int k = 0; k < mc->kind_count; k++) {
        const struct block_kind *kind = &mc->kinds[k];
        if (kind->mixer != &mixer_mamba2 || kind->mlp_options || options_of(mc, k)->n_groups != 1) return false;
        if (!same_layer(options_of(mc, 0), options_of(mc, k))) return false;
    }
    return mc->kind_count > 0;
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

static void put_int(json_t *object, const char *key, int64_t value) {
    json_object_set_new(object, key, json_integer(value));
}
static void put_real(json_t *object, const char *key, double value) {
    json_object_set_new(object, key, json_real(value));
}
static void put_bool(json_t *object, const char *key, bool value) {
    json_object_set_new(object, key, json_boolean(value));
}
static void put_text(json_t *object, const char *key, const char *value) {
    json_object_set_new(object, key, json_string(value));
}

static json_t *write_config(const struct model_config *mc, int64_t eod) {
    const struct mamba2_options *o = options_of(mc, 0);
    struct mamba2_sizes s = mamba2_sizes(o, mc->options.d_model);
    json_t *object = json_object(), *names = json_array();
    json_array_append_new(names, json_string(architecture_mamba2.class_name));
    json_object_set_new(object, "architectures", names);
    put_text(object, "model_type", architecture_mamba2.model_type);
    put_int(object, "vocab_size", mc->rows);
    put_int(object, "hidden_size", s.D);
    put_int(object, "num_heads", s.H);
    put_int(object, "head_dim", s.P);
    put_int(object, "state_size", s.N);
    put_int(object, "num_hidden_layers", mc->blocks);
    put_real(object, "layer_norm_epsilon", mc->options.norm_eps);
    architecture_put_ids(object, eod);
    put_int(object, "expand", o->expand);
    put_int(object, "conv_kernel", s.W);
    put_int(object, "n_groups", s.G);
    put_int(object, "chunk_size", 256); /* transformers' own way of cutting; ours is no matter of theirs */
    put_bool(object, "use_bias", false);
    put_bool(object, "use_conv_bias", true);
    put_text(object, "hidden_act", "silu");
    put_real(object, "initializer_range", 0.1);
    put_bool(object, "residual_in_fp32", true);
    put_bool(object, "rms_norm", true);
    put_int(object, "time_step_rank", (s.D + 15) / 16);
    put_real(object, "time_step_min", o->dt_min);
    put_real(object, "time_step_max", o->dt_max);
    put_real(object, "time_step_floor", o->dt_init_floor);
    if (o->dt_limit_min != 0 || o->dt_limit_max != 0) { /* left out otherwise: the default's infinity is no JSON */
        double most = o->dt_limit_max != 0 ? o->dt_limit_max : NO_LIMIT;
        json_object_set_new(object, "time_step_limit", json_pack("[f, f]", o->dt_limit_min, most));
    }
    put_bool(object, "rescale_prenorm_residual", false);
    put_bool(object, "use_cache", true);
    put_bool(object, "tie_word_embeddings", mc->options.tie_embeddings);
    put_text(object, "torch_dtype", "float32");
    return object;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

/* Flags that change what is computed and that riverrun's layer has in one way only. */
static int check_flags(const json_t *object, const char *name, error *err) {
    static const struct {
        const char *key;
        bool fallback, wanted;
    } flags[] = {{"use_bias", false, false}, {"use_conv_bias", true, true}, {"rms_norm", true, true}};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        bool value;
        TRY(json_get_bool_or(object, flags[i].key, name, flags[i].fallback, &value, err));
        if (value != flags[i].wanted)
            return error_input(err, "%s: '%s' is %s; riverrun's Mamba-2 needs %s", name, flags[i].key,
                               value ? "true" : "false", value ? "false" : "true");
    }
    const char *activation = "silu";
    char shown[65];
    if (json_object_get(object, "hidden_act")) TRY(json_get_string(object, "hidden_act", name, &activation, err));
    if (strcmp(activation, "silu") != 0 && strcmp(activation, "swish") != 0)
        return error_input(err, "%s: 'hidden_act' is '%s'; riverrun's Mamba-2 needs silu", name,
                           architecture_shown(activation, shown));
    return 0;
}

/* One end of time_step_limit. Infinity is written as {"__float__": "Infinity"}, by older versions as a bare word, which
 * whoever reads config.json has turned into a string. */
static int read_limit(const json_t *value, const char *name, double *out, error *err) {
    const json_t *wrapped = json_object_get(value, "__float__");
    const char *word = json_string_value(wrapped ? wrapped : value);
    if (json_is_number(value)) *out = json_number_value(value);
    else if (word && strcmp(word, "Infinity") == 0) *out = INFINITY;
    else return error_input(err, "%s: 'time_step_limit' must be a list of two numbers", name);
    return 0;
}

static int read_limits(const json_t *object, const char *name, config *c, error *err) {
    const json_t *limits = json_object_get(object, "time_step_limit");
    if (!limits) return 0;
    double least = 0, most = INFINITY;
    if (json_array_size(limits) != 2)
        return error_input(err, "%s: 'time_step_limit' must be a list of two numbers", name);
    TRY(read_limit(json_array_get(limits, 0), name, &least, err));
    TRY(read_limit(json_array_get(limits, 1), name, &most, err));
    if (!(least >= 0 && most > 0 && least <= most) || isinf(least))
        return error_input(
            err,
            "%s: 'time_step_limit' is [%g, %g]; the first must be at least 0 and at most the second, which "
            "must be above 0",
            name, least, most);
    TRY(architecture_set_real(c, BLOCK, "dt_limit_min", least, err));
    return architecture_set_real(c, BLOCK, "dt_limit_max", most > LIMIT_MAX ? 0 : most, err);
}

/* Initial step sizes: they matter only to a model that is to be drawn anew. */
static int read_initial(const json_t *object, const char *name, config *c, error *err) {
    static const char *const keys[][2] = {
        {"time_step_min", "dt_min"}, {"time_step_max", "dt_max"}, {"time_step_floor", "dt_init_floor"}};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (!json_object_get(object, keys[i][0])) continue;
        double value;
        TRY(json_get_real(object, keys[i][0], name, &value, err));
        TRY(architecture_set_real(c, BLOCK, keys[i][1], value, err));
    }
    return 0;
}

enum { HIDDEN, LAYERS, VOCAB, HEADS, HEAD_DIM, STATE, GROUPS, EXPAND, CONV, INTS };

static int read_ints(const json_t *object, const char *name, int64_t v[INTS], error *err) {
    static const struct {
        const char *key;
        int64_t fallback, most;
    } ints[INTS] = {
        [HIDDEN] = {"hidden_size", 4096, 65536}, [LAYERS] = {"num_hidden_layers", 64, LIMIT_LAYERS},
        [VOCAB] = {"vocab_size", 32768, LIMIT_VOCAB}, [HEADS] = {"num_heads", 128, 1 << 20},
        [HEAD_DIM] = {"head_dim", 64, 4096}, [STATE] = {"state_size", 128, 4096}, [GROUPS] = {"n_groups", 8, 1024},
        [EXPAND] = {"expand", 2, 16}, [CONV] = {"conv_kernel", 4, 8}};
    for (int i = 0; i < INTS; i++) {
        TRY(json_get_int_or(object, ints[i].key, name, ints[i].fallback, &v[i], err));
        if (v[i] < 1 || v[i] > ints[i].most)
            return error_input(err, "%s: '%s' is %" PRId64 "; it must be from 1 to %" PRId64, name, ints[i].key, v[i],
                               ints[i].most);
    }
    if (v[GROUPS] != 1)
        return error_input(err,
                           "%s: 'n_groups' is %" PRId64
                           "; riverrun reads models with 1, because transformers normalises "
                           "several groups in two different ways",
                           name, v[GROUPS]);
    if (v[HEADS] * v[HEAD_DIM] != v[EXPAND] * v[HIDDEN])
        return error_input(
            err, "%s: 'num_heads' * 'head_dim' is %" PRId64 "; it must equal 'expand' * 'hidden_size', %" PRId64, name,
            v[HEADS] * v[HEAD_DIM], v[EXPAND] * v[HIDDEN]);
    return 0;
}

static int read_config(const json_t *object, const char *name, config *c, error *err) {
    int64_t v[INTS];
    double eps;
    bool tied;
    char pattern[32];
    TRY(read_ints(object, name, v, err));
    TRY(check_flags(object, name, err));
    TRY(json_get_real_or(object, "layer_norm_epsilon", name, 1e-5, &eps, err));
    TRY(json_get_bool_or(object, "tie_word_embeddings", name, false, &tied, err));
    snprintf(pattern, sizeof pattern, "m*%" PRId64, v[LAYERS]);
    TRY(architecture_set_int(c, "model", "d_model", v[HIDDEN], err));
    TRY(architecture_set_int(c, "model", "vocab_size", v[VOCAB], err));
    TRY(architecture_set_int(c, "model", "pad_vocab_to", 1, err));
    TRY(config_set(c, "model", "tie_embeddings", tied ? "true" : "false", err));
    TRY(architecture_set_real(c, "model", "norm_eps", eps, err));
    TRY(config_set(c, "model", "pattern", pattern, err));
    TRY(config_set(c, BLOCK, "mixer", mixer_mamba2.name, err));
    TRY(architecture_set_int(c, BLOCK, "d_state", v[STATE], err));
    TRY(architecture_set_int(c, BLOCK, "head_dim", v[HEAD_DIM], err));
    TRY(architecture_set_int(c, BLOCK, "expand", v[EXPAND], err));
    TRY(architecture_set_int(c, BLOCK, "n_groups", v[GROUPS], err));
    TRY(architecture_set_int(c, BLOCK, "d_conv", v[CONV], err));
    TRY(read_initial(object, name, c, err));
    return read_limits(object, name, c, err);
}

const struct architecture architecture_mamba2 = {
    .model_type = "mamba2",
    .class_name = "Mamba2ForCausalLM",
    .expresses = expresses,
    .write = write_config,
    .read = read_config,
};
