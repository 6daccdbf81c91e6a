/* architecture_mamba2.c: Mamba-2 as transformers' Mamba2ForCausalLM. See architecture.h; the keys are those of
 * transformers' Mamba2Config, whose defaults describe Codestral Mamba and not the published models, so every key is
 * written. Reached through the table in architecture.c.
 *
 * Not expressible: an MLP, blocks of different shapes, and more than one group, for which transformers' two paths
 * normalise differently (over all channels, over each group's).
 */
#include "model/architecture_ssm.h"
#include "model/mamba2.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Stands for "no limit" where a limit below needs a partner above: JSON has no infinity, and no step size reaches this.
 */
#define NO_LIMIT 1e30
#define LIMIT_MAX 1e6 /* the largest that mamba2's options take; one above it limits nothing */

static bool same_layer(const void *first, const void *other) {
    const struct mamba2_options *a = first, *b = other;
    return a->d_state == b->d_state && a->head_dim == b->head_dim && a->expand == b->expand && a->n_groups == 1 &&
           b->n_groups == 1 && a->d_conv == b->d_conv && a->dt_limit_min == b->dt_limit_min &&
           a->dt_limit_max == b->dt_limit_max;
}

static bool expresses(const struct model_config *mc) {
    return ssm_expresses(mc, &mixer_mamba2, same_layer);
}

static json_t *write_config(const struct model_config *mc, int64_t eod) {
    const struct mamba2_options *o = mc->kinds[0].mixer_options;
    struct mamba2_sizes s = mamba2_sizes(o, mc->options.d_model);
    json_t *object = ssm_write(&architecture_mamba2, mc, eod,
                               &(struct ssm_options){.d_state = o->d_state,
                                                     .expand = o->expand,
                                                     .d_conv = o->d_conv,
                                                     .dt_rank = (s.D + 15) / 16, /* written, but read by no one */
                                                     .dt_min = o->dt_min,
                                                     .dt_max = o->dt_max,
                                                     .dt_init_floor = o->dt_init_floor});
    architecture_put_int(object, "num_heads", s.H);
    architecture_put_int(object, "head_dim", s.P);
    architecture_put_int(object, "n_groups", s.G);
    architecture_put_int(object, "chunk_size", 256); /* transformers' own way of cutting; ours is no matter of theirs */
    architecture_put_bool(object, "rms_norm", true);
    if (o->dt_limit_min != 0 || o->dt_limit_max != 0) { /* left out otherwise: the default's infinity is no JSON */
        double most = o->dt_limit_max != 0 ? o->dt_limit_max : NO_LIMIT;
        json_object_set_new(object, "time_step_limit", json_pack("[f, f]", o->dt_limit_min, most));
    }
    return object;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

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
    TRY(architecture_set_real(c, SSM_BLOCK, "dt_limit_min", least, err));
    return architecture_set_real(c, SSM_BLOCK, "dt_limit_max", most > LIMIT_MAX ? 0 : most, err);
}

enum { HIDDEN, LAYERS, VOCAB, HEADS, HEAD_DIM, STATE, GROUPS, EXPAND, CONV, INTS };
static const struct architecture_int ints[INTS] = {
    [HIDDEN] = {"hidden_size", 4096, 1, 65536, "model", "d_model"},
    [LAYERS] = {"num_hidden_layers", 64, 1, LIMIT_LAYERS, NULL, NULL},
    [VOCAB] = {"vocab_size", 32768, 1, LIMIT_VOCAB, "model", "vocab_size"},
    [HEADS] = {"num_heads", 128, 1, 1 << 20, NULL, NULL},
    [HEAD_DIM] = {"head_dim", 64, 1, 4096, SSM_BLOCK, "head_dim"},
    [STATE] = {"state_size", 128, 1, 4096, SSM_BLOCK, "d_state"},
    [GROUPS] = {"n_groups", 8, 1, 1024, SSM_BLOCK, "n_groups"},
    [EXPAND] = {"expand", 2, 1, 16, SSM_BLOCK, "expand"},
    [CONV] = {"conv_kernel", 4, 2, 8, SSM_BLOCK, "d_conv"},
};

static int read_config(const json_t *object, const char *name, config *c, error *err) {
    int64_t v[INTS];
    TRY(architecture_read_ints(object, name, ints, INTS, v, c, err));
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
    TRY(architecture_check_flag(object, name, "rms_norm", true, true, "Mamba-2", err));
    TRY(ssm_read(object, name, &mixer_mamba2, "Mamba-2", v[LAYERS], false, c, err));
    return read_limits(object, name, c, err);
}

const struct architecture architecture_mamba2 = {
    .model_type = "mamba2",
    .class_name = "Mamba2ForCausalLM",
    .expresses = expresses,
    .write = write_config,
    .read = read_config,
};
