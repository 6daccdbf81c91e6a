/* architecture_mamba.c: Mamba as transformers' MambaForCausalLM. See architecture.h; the keys are those of
 * transformers' MambaConfig. Its defaults have changed from version to version, so every key is written. Reached
 * through the table in architecture.c.
 *
 * Not expressible: an MLP, and blocks of different shapes.
 */
#include "model/architecture_ssm.h"
#include "model/mamba.h"

#include <inttypes.h>
#include <string.h>

static bool same_layer(const void *first, const void *other) {
    const struct mamba_options *a = first, *b = other;
    return a->d_state == b->d_state && a->expand == b->expand && a->d_conv == b->d_conv && a->dt_rank == b->dt_rank;
}

static bool expresses(const struct model_config *mc) {
    return ssm_expresses(mc, &mixer_mamba, same_layer);
}

static json_t *write_config(const struct model_config *mc, int64_t eod) {
    const struct mamba_options *o = mc->kinds[0].mixer_options;
    json_t *object = ssm_write(&architecture_mamba, mc, eod,
                               &(struct ssm_options){.d_state = o->d_state,
                                                     .expand = o->expand,
                                                     .d_conv = o->d_conv,
                                                     .dt_rank = o->dt_rank,
                                                     .dt_min = o->dt_min,
                                                     .dt_max = o->dt_max,
                                                     .dt_init_floor = o->dt_init_floor});
    architecture_put_int(object, "intermediate_size", o->expand * mc->options.d_model);
    architecture_put_real(object, "time_step_scale", o->dt_scale);
    architecture_put_text(object, "time_step_init_scheme", "random");
    return object;
}

enum { HIDDEN, LAYERS, VOCAB, STATE, EXPAND, CONV, INTS };
static const struct architecture_int ints[INTS] = {
    [HIDDEN] = {"hidden_size", 768, 1, 65536, "model", "d_model"},
    [LAYERS] = {"num_hidden_layers", 32, 1, LIMIT_LAYERS, NULL, NULL},
    [VOCAB] = {"vocab_size", 50280, 1, LIMIT_VOCAB, "model", "vocab_size"},
    [STATE] = {"state_size", 16, 1, 4096, SSM_BLOCK, "d_state"},
    [EXPAND] = {"expand", 2, 1, 16, SSM_BLOCK, "expand"},
    [CONV] = {"conv_kernel", 4, 2, 8, SSM_BLOCK, "d_conv"},
};

/* A number, or "auto". */
static int read_rank(const json_t *object, const char *name, int64_t hidden, config *c, error *err) {
    const json_t *value = json_object_get(object, "time_step_rank");
    if (json_is_string(value) && strcmp(json_string_value(value), "auto") == 0) value = NULL;
    if (!value) return architecture_set_int(c, SSM_BLOCK, "dt_rank", mamba_dt_rank(hidden), err);
    const struct architecture_int rank = {"time_step_rank", 0, 1, 65536, SSM_BLOCK, "dt_rank"};
    return architecture_read_ints(object, name, &rank, 1, &hidden, c, err);
}

static int read_config(const json_t *object, const char *name, config *c, error *err) {
    int64_t v[INTS], inner;
    TRY(architecture_read_ints(object, name, ints, INTS, v, c, err));
    TRY(json_get_int_or(object, "intermediate_size", name, v[EXPAND] * v[HIDDEN], &inner, err));
    if (inner != v[EXPAND] * v[HIDDEN])
        return error_input(err,
                           "%s: 'intermediate_size' is %" PRId64 "; it must equal 'expand' * 'hidden_size', %" PRId64,
                           name, inner, v[EXPAND] * v[HIDDEN]);
    TRY(read_rank(object, name, v[HIDDEN], c, err));
    TRY(ssm_read_real(object, name, "time_step_scale", "dt_scale", c, err));
    return ssm_read(object, name, &mixer_mamba, "Mamba", v[LAYERS], true, c, err);
}

const struct architecture architecture_mamba = {
    .model_type = "mamba",
    .class_name = "MambaForCausalLM",
    .expresses = expresses,
    .write = write_config,
    .read = read_config,
};
