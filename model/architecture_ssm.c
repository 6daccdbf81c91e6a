/* architecture_ssm.c: what the config.json of Mamba and of Mamba-2 have in common. See architecture_ssm.h. */
#include "model/architecture_ssm.h"

#include <inttypes.h>
#include <string.h>

bool ssm_expresses(const struct model_config *mc, const struct mixer *mixer,
                   bool (*same)(const void *first, const void *other)) {
    for (int k = 0; k < mc->kind_count; k++) {
        const struct block_kind *kind = &mc->kinds[k];
        if (kind->mixer != mixer || kind->mlp_options) return false;
        if (!same(mc->kinds[0].mixer_options, kind->mixer_options)) return false;
    }
    return mc->kind_count > 0;
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

json_t *ssm_write(const struct architecture *a, const struct model_config *mc, int64_t eod,
                  const struct ssm_options *o) {
    json_t *object = json_pack("{s: [s], s: s}", "architectures", a->class_name, "model_type", a->model_type);
    architecture_put_int(object, "vocab_size", mc->rows);
    architecture_put_int(object, "hidden_size", mc->options.d_model);
    architecture_put_int(object, "state_size", o->d_state);
    architecture_put_int(object, "num_hidden_layers", mc->blocks);
    architecture_put_real(object, "layer_norm_epsilon", mc->options.norm_eps);
    architecture_put_ids(object, eod);
    architecture_put_int(object, "expand", o->expand);
    architecture_put_int(object, "conv_kernel", o->d_conv);
    architecture_put_bool(object, "use_bias", false);
    architecture_put_bool(object, "use_conv_bias", true);
    architecture_put_text(object, "hidden_act", "silu");
    architecture_put_real(object, "initializer_range", 0.1);
    architecture_put_bool(object, "residual_in_fp32", true);
    architecture_put_int(object, "time_step_rank", o->dt_rank);
    architecture_put_real(object, "time_step_min", o->dt_min);
    architecture_put_real(object, "time_step_max", o->dt_max);
    architecture_put_real(object, "time_step_floor", o->dt_init_floor);
    architecture_put_bool(object, "rescale_prenorm_residual", false);
    architecture_put_bool(object, "use_cache", true);
    architecture_put_bool(object, "tie_word_embeddings", mc->options.tie_embeddings);
    architecture_put_text(object, "torch_dtype", "float32");
    return object;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

int ssm_read_real(const json_t *object, const char *name, const char *key, const char *option, config *c, error *err) {
    double value;
    if (!json_object_get(object, key)) return 0;
    TRY(json_get_real(object, key, name, &value, err));
    return architecture_set_real(c, SSM_BLOCK, option, value, err);
}

static int check_activation(const json_t *object, const char *name, const char *layer, error *err) {
    const char *activation = "silu";
    char shown[65];
    if (json_object_get(object, "hidden_act")) TRY(json_get_string(object, "hidden_act", name, &activation, err));
    if (strcmp(activation, "silu") == 0 || strcmp(activation, "swish") == 0) return 0;
    return error_input(err, "%s: 'hidden_act' is '%s'; riverrun's %s needs silu", name,
                       architecture_shown(activation, shown), layer);
}

int ssm_read(const json_t *object, const char *name, const struct mixer *mixer, const char *layer, int64_t blocks,
             bool tied, config *c, error *err) {
    double eps;
    char pattern[32];
    TRY(architecture_check_flag(object, name, "use_bias", false, false, layer, err));
    TRY(architecture_check_flag(object, name, "use_conv_bias", true, true, layer, err));
    TRY(check_activation(object, name, layer, err));
    TRY(json_get_real_or(object, "layer_norm_epsilon", name, 1e-5, &eps, err));
    TRY(json_get_bool_or(object, "tie_word_embeddings", name, tied, &tied, err));
    snprintf(pattern, sizeof pattern, "m*%" PRId64, blocks);
    TRY(architecture_set_int(c, "model", "pad_vocab_to", 1, err));
    TRY(config_set(c, "model", "tie_embeddings", tied ? "true" : "false", err));
    TRY(architecture_set_real(c, "model", "norm_eps", eps, err));
    TRY(config_set(c, "model", "pattern", pattern, err));
    TRY(config_set(c, SSM_BLOCK, "mixer", mixer->name, err));
    /* Initial step sizes matter only to a model that is to be drawn anew. */
    TRY(ssm_read_real(object, name, "time_step_min", "dt_min", c, err));
    TRY(ssm_read_real(object, name, "time_step_max", "dt_max", c, err));
    return ssm_read_real(object, name, "time_step_floor", "dt_init_floor", c, err);
}
