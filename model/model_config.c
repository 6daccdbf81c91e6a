/* model_config.c: from a config to the list of layers and the tensor table. Owns the option tables of [model] and of
 * what all [block.NAME] share, the structs they fill, and the order of tensors and buckets. Called wherever a model is
 * opened or planned; allocates a few kilobytes. */
#include "model/architecture.h"
#include "model/mixer_parts.h"
#include "model/mlp.h"
#include "model/model.h"
#include "model/pattern.h"

#include "common/text.h"
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

_Static_assert(sizeof(((struct block_kind *)0)->name) == PATTERN_NAME, "a block's name fits where it is kept");

#define FIELD(type, name) offsetof(struct type, name)

static const char *const norm_names[] = {"rms", "layer", NULL};
static const char *const init_names[] = {"default", "small", "open_lm", "normal", NULL};

const struct option model_options_table[] = {
    {"d_model", OPTION_INT, FIELD(model_options, d_model), NULL, 1, 65536, "", "Width D of the residual stream.", NULL},
    {"vocab_size", OPTION_INT, FIELD(model_options, vocab_size), "0", 0, LIMIT_VOCAB, "tokens",
     "Number of token ids; 0 = as many as the tokenizer or the task has.", NULL},
    {"pad_vocab_to", OPTION_INT, FIELD(model_options, pad_vocab_to), "16", 1, 65536, "rows",
     "The embedding's rows are rounded up to a multiple of it; the rows added are trained like all others.", NULL},
    {"tie_embeddings", OPTION_BOOL, FIELD(model_options, tie_embeddings), "true", 0, 0, "",
     "Whether the head uses the embedding's weights.", NULL},
    {"norm", OPTION_CHOICE, FIELD(model_options, norm), "rms", 0, 0, "",
     "The norm before every layer and before the head. rms: divided by the root of the mean square; layer: by the "
     "standard deviation, with the mean taken off first. Both have a gain and no bias.", norm_names},
    {"norm_eps", OPTION_FLOAT, FIELD(model_options, norm_eps), "1e-5", 1e-12, 1, "",
     "Added to the mean square, or the variance, in every norm.", NULL},
    {"logit_cap", OPTION_FLOAT, FIELD(model_options, logit_cap), "0", 0, 1e6, "",
     "Logits u become cap tanh(u / cap), in training and everywhere else; 0 = they stay as they are.", NULL},
    {"init", OPTION_CHOICE, FIELD(model_options, init), "default", 0, 0, "",
     "Initial values of embedding, head and MLPs. default: as Mamba's code draws them; small: as xLSTM's, normal with "
     "standard deviation sqrt(2 / (5 d_model)), and 2 / (blocks sqrt(d_model)) for the MLPs' last projections; "
     "open_lm: "
     "as open_lm's and DCLM's, normal within three standard deviations of 1 / sqrt(inputs), last projections divided "
     "by sqrt(2 (block + 1)); normal: all with standard deviation 0.02. Attention and ParaRNN follow it, too; other "
     "mixers have rules of their own.", init_names},
    {"pattern", OPTION_STRING, FIELD(model_options, pattern), NULL, 0, 0, "",
     "The blocks in order, by the names of their sections: m*24 is 24 blocks [block.m]; (m*7 a)*4 is 32 blocks.", NULL},
    {"recompute_span", OPTION_INT, FIELD(model_options, recompute_span), "1", 1, 4096, "layers",
     "Of neighbouring layers with recompute = layer, the residual stream is kept before every so-manieth only, and "
     "what lies between is computed a second time to find it.", NULL},
    OPTIONS_END,
};

static const char *const recompute_names[] = {"none", "light", "scan", "layer", NULL};

const struct option block_options_table[] = {
    {"mixer", OPTION_CHOICE, FIELD(block_options, mixer), NULL, 0, 0, "", "What mixes along time.", mixer_names},
    {"mlp", OPTION_CHOICE, FIELD(block_options, mlp), "none", 0, 0, "",
     "The second layer of the block, with a norm of its own.", mlp_names},
    {"recompute", OPTION_CHOICE, FIELD(block_options, recompute), "none", 0, 0, "",
     "What backward computes a second time, to save memory: light: what elementwise operations made (norms, "
     "convolution, gates); scan: the recurrence, too; layer: everything but the residual stream. The results are the "
     "same, bit for bit.", recompute_names},
    {"residual_scale", OPTION_BOOL, FIELD(block_options, residual_scale), "false", 0, 0, "",
     "Whether the residual stream is multiplied by a vector of weights, which starts as 1, when the mixer's output is "
     "added to it; an MLP's output is added to the stream as it is.", NULL},
    OPTIONS_END,
};

/* --- sections --------------------------------------------------------------------------------- */

static void *allocate(size_t count, size_t size, error *err) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    if (!memory) error_system(err, "out of memory for the model's configuration");
    return memory;
}

static bool has_option(const struct option *table, const char *key) {
    for (const struct option *o = table; o->key; o++)
        if (strcmp(o->key, key) == 0) return true;
    return false;
}

/* The names of the mixers that have the option, with commas between them. */
static void mixers_with(const char *key, char *out, size_t size) {
    size_t used = 0;
    out[0] = 0;
    for (int i = 0; mixer_names[i]; i++) {
        if (!has_option(mixer_find(mixer_names[i])->options, key) || used >= size) continue;
        used += (size_t)snprintf(out + used, size - used, "%s%s", used ? ", " : "", mixer_names[i]);
    }
}

/* Keys that only other mixers have, which would be called unknown: true, but no help to whom has changed the mixer. */
static int refuse_others_keys(const struct mixer *mixer, const config *c, const char *section, error *err) {
    char names[200];
    for (int i = 0; mixer_names[i]; i++) {
        for (const struct option *o = mixer_find(mixer_names[i])->options; o->key; o++) {
            if (!config_has(c, section, o->key) || has_option(mixer->options, o->key)) continue;
            mixers_with(o->key, names, sizeof names);
            return error_input(err, "%s.%s means nothing with mixer = %s, but with %s; leave it out", section, o->key,
                               mixer->name, names);
        }
    }
    return 0;
}

static int bind_kind(struct block_kind *kind, config *c, const char *name, const struct layer_context *context,
                     error *err) {
    char section[PATTERN_NAME + 8];
    snprintf(section, sizeof section, "block.%s", name);
    snprintf(kind->name, sizeof kind->name, "%s", name);
    TRY(config_bind(c, section, block_options_table, &kind->options, err));
    kind->mixer = mixer_find(mixer_names[kind->options.mixer]);
    ASSERT(kind->mixer != NULL);
    kind->mixer_options = allocate(1, kind->mixer->options_size, err);
    if (!kind->mixer_options) return -1;
    TRY(config_bind(c, section, kind->mixer->options, kind->mixer_options, err));
    TRY(kind->mixer->check(kind->mixer_options, context, section, err));
    TRY(refuse_others_keys(kind->mixer, c, section, err));
    if (kind->options.mlp == MLP_NONE) {
        /* Without the MLP its keys would be called unknown, which is true but no help. */
        for (const struct option *o = mixer_mlp.options; o->key; o++)
            if (config_has(c, section, o->key))
                return error_input(err, "%s.%s means nothing with mlp = none; set mlp = swiglu or leave it out",
                                   section, o->key);
        return 0;
    }
    kind->mlp_options = allocate(1, mixer_mlp.options_size, err);
    if (!kind->mlp_options) return -1;
    TRY(config_bind(c, section, mixer_mlp.options, kind->mlp_options, err));
    ((struct mlp_options *)kind->mlp_options)->kind = (enum mlp_kind)kind->options.mlp;
    return mixer_mlp.check(kind->mlp_options, context, section, err);
}

static bool pattern_has(const struct pattern *p, const char *name) {
    for (int i = 0; i < p->name_count; i++)
        if (strcmp(p->names[i], name) == 0) return true;
    return false;
}

/* Sections and names of the pattern must be the same set. */
static int match_sections(const struct pattern *p, const config *c, const char *text, error *err) {
    const char *names[LIMIT_BLOCK_KINDS + 1] = {NULL};
    size_t count = config_sections(c, "block.", names, LIMIT_BLOCK_KINDS);
    if (count > LIMIT_BLOCK_KINDS)
        return error_input(err, "the config has %zu [block.NAME] sections; at most %d are possible", count,
                           LIMIT_BLOCK_KINDS);
    for (size_t s = 0; s < count; s++) names[s] += strlen("block.");
    for (int i = 0; i < p->name_count; i++) {
        bool found = false;
        for (size_t s = 0; s < count; s++) found = found || strcmp(names[s], p->names[i]) == 0;
        if (found) continue;
        const char *nearest = text_nearest(p->names[i], names);
        return error_input(
            err, "model.pattern = '%.200s' names the block %s, but the config has no section [block.%s]%s%s%s", text,
            p->names[i], p->names[i], nearest ? "; there is [block." : "", nearest ? nearest : "", nearest ? "]" : "");
    }
    for (size_t s = 0; s < count; s++) {
        if (pattern_has(p, names[s])) continue;
        return error_input(err,
                           "[block.%s] is not used: model.pattern = '%.200s' does not name %s; name it there or "
                           "remove the section",
                           names[s], text, names[s]);
    }
    return 0;
}

static int set_vocabulary(struct model_config *mc, int64_t tokenizer_vocab, error *err) {
    int64_t given = mc->options.vocab_size;
    if (given == 0 && tokenizer_vocab == 0)
        return error_input(
            err, "model.vocab_size = 0 takes the number of token ids from the tokenizer, and here there is none; give "
                 "the number, for instance model.vocab_size=257 for bytes");
    if (given != 0 && given < tokenizer_vocab)
        return error_input(err,
                           "model.vocab_size = %" PRId64 " is less than the tokenizer's %" PRId64
                           " ids; it must be at least "
                           "that, and 0 takes it",
                           given, tokenizer_vocab);
    mc->vocab = given ? given : tokenizer_vocab;
    if (mc->vocab > LIMIT_VOCAB)
        return error_input(err, "the tokenizer has %" PRId64 " ids; at most %d are possible", mc->vocab, LIMIT_VOCAB);
    int64_t pad = mc->options.pad_vocab_to;
    mc->rows = (mc->vocab + pad - 1) / pad * pad;
    return 0;
}

/* --- layers and tensors ----------------------------------------------------------------------- */

static void declare_layer(struct model_config *mc, struct layer *layer) {
    struct params *p = &mc->params;
    struct init one = {INIT_CONSTANT, 1, 0, 0};
    char prefix[64];
    layer->norm = params_add(p, 1, &mc->options.d_model, one, false, true, "backbone.layers.%d.%s.weight", layer->block,
                             layer->is_mlp ? "norm2" : "norm");
    layer->scale = -1;
    if (layer->scaled)
        layer->scale = params_add(p, 1, &mc->options.d_model, one, false, true, "backbone.layers.%d.residual_scale",
                                  layer->block);
    snprintf(prefix, sizeof prefix, "backbone.layers.%d.%s.", layer->block, layer->is_mlp ? "mlp" : "mixer");
    layer->first = p->count;
    layer->mixer->declare(layer, p, prefix);
    layer->params = p->count - layer->first;
}

/* Cut neighbouring layers that are computed again as a whole into spans. */
static void mark_spans(struct model_config *mc) {
    for (int i = 1; i < mc->layer_count; i++) {
        struct layer *layer = &mc->layers[i], *before = &mc->layers[i - 1];
        if (layer->recompute != RECOMPUTE_LAYER || before->recompute != RECOMPUTE_LAYER) continue;
        layer->span = before->span + 1 < mc->options.recompute_span ? before->span + 1 : 0;
    }
}

/* The tensor table in the order of the forward pass; a bucket each for the embedding, every block, the norm, the head.
 */
static void declare_model(struct model_config *mc) {
    struct params *p = &mc->params;
    int64_t shape[2] = {mc->rows, mc->options.d_model};
    double bound = 1 / sqrt((double)shape[1]);
    struct init embedding = {INIT_NORMAL, 0.02, 0, 0}, head = {INIT_UNIFORM, -bound, bound, 0};
    if (mc->options.init == MODEL_INIT_SMALL) embedding = head = mixer_small_init(shape[1]);
    if (mc->options.init == MODEL_INIT_OPEN_LM) embedding = head = mixer_open_lm_init(shape[1]);
    if (mc->options.init == MODEL_INIT_NORMAL) embedding = head = mixer_normal_init();
    mc->embedding = params_add(p, 2, shape, embedding, false, false, "backbone.embeddings.weight");
    if (mc->options.tie_embeddings) params_filled(p, 1); /* by the head; the lookup's gradient is added to that */
    for (int i = 0; i < mc->layer_count; i++) {
        if (!mc->layers[i].is_mlp) params_next_bucket(p);
        declare_layer(mc, &mc->layers[i]);
    }
    params_next_bucket(p);
    mc->final_norm =
        params_add(p, 1, &shape[1], (struct init){INIT_CONSTANT, 1, 0, 0}, false, true, "backbone.norm_f.weight");
    mc->head = mc->embedding;
    if (mc->options.tie_embeddings) return;
    params_next_bucket(p);
    mc->head = params_add(p, 2, shape, head, false, false, "lm_head.weight");
    params_filled(p, 1);
    if (mc->head < p->count) p->list[mc->head].head = true;
}

static int list_layers(struct model_config *mc, const struct pattern *p, const struct layer_context *context,
                       error *err) {
    mc->layers = allocate(2 * (size_t)p->block_count, sizeof *mc->layers, err);
    if (!mc->layers) return -1;
    for (int b = 0; b < p->block_count; b++) {
        const struct block_kind *kind = &mc->kinds[p->blocks[b]];
        struct layer layer = {.mixer = kind->mixer,
                              .options = kind->mixer_options,
                              .block = b,
                              .block_name = kind->name,
                              .recompute = (enum recompute)kind->options.recompute,
                              .scaled = kind->options.residual_scale,
                              .context = *context};
        layer.solver = kind->mixer->solver ? mc->solver_count++ : -1;
        mc->layers[mc->layer_count++] = layer;
        if (!kind->mlp_options) continue;
        layer.mixer = &mixer_mlp;
        layer.solver = -1;
        layer.options = kind->mlp_options;
        layer.is_mlp = true;
        layer.scaled = false;
        mc->layers[mc->layer_count++] = layer;
    }
    return 0;
}

static int bind_all(struct model_config *mc, config *c, int64_t tokenizer_vocab, error *err) {
    struct pattern p;
    struct model_options options;
    TRY(config_bind(c, "model", model_options_table, &options, err));
    char *text = strdup(options.pattern); /* a copy: the config may go before the model does */
    if (!text) return error_system(err, "out of memory for the model's configuration");
    mc->options = options;
    mc->options.pattern = text;
    TRY(set_vocabulary(mc, tokenizer_vocab, err));
    TRY(pattern_parse(&p, text, err));
    TRY(match_sections(&p, c, text, err));
    mc->blocks = p.block_count;
    struct layer_context context = {.d_model = mc->options.d_model,
                                    .blocks = mc->blocks,
                                    .norm_eps = mc->options.norm_eps,
                                    .init = mc->options.init};
    mc->kinds = allocate((size_t)p.name_count, sizeof *mc->kinds, err);
    if (!mc->kinds) return -1;
    for (int k = 0; k < p.name_count; k++) {
        mc->kind_count = k + 1;
        TRY(bind_kind(&mc->kinds[k], c, p.names[k], &context, err));
    }
    TRY(list_layers(mc, &p, &context, err));
    mark_spans(mc);
    declare_model(mc);
    TRY(params_check(&mc->params, err));
    architecture_name_tensors(mc);
    return 0;
}

int model_config_bind(struct model_config **out, config *c, int64_t tokenizer_vocab, error *err) {
    *out = NULL;
    struct model_config *mc = allocate(1, sizeof *mc, err);
    if (!mc) return -1;
    params_open(&mc->params);
    if (bind_all(mc, c, tokenizer_vocab, err) != 0) {
        model_config_free(mc);
        return -1;
    }
    *out = mc;
    return 0;
}

void model_config_free(struct model_config *mc) {
    if (!mc) return;
    for (int k = 0; k < mc->kind_count; k++) {
        free(mc->kinds[k].mixer_options);
        free(mc->kinds[k].mlp_options);
    }
    free(mc->kinds);
    free(mc->layers);
    free((char *)mc->options.pattern);
    params_close(&mc->params);
    free(mc);
}

const struct layer *model_least_context(const struct model_config *mc, int64_t *tokens) {
    const struct layer *least = NULL;
    for (int i = 0; i < mc->layer_count; i++) {
        const struct layer *layer = &mc->layers[i];
        int64_t here = layer->mixer->context ? layer->mixer->context(layer) : 0;
        if (here == 0 || (least && here >= *tokens)) continue;
        least = layer;
        *tokens = here;
    }
    return least;
}

const struct layer *model_solver_layer(const struct model_config *mc, int solver) {
    int i = 0;
    ASSERT(solver >= 0 && solver < mc->solver_count);
    while (mc->layers[i].solver != solver) i++;
    return &mc->layers[i];
}

int model_list_solvers(const struct model_config *mc, const struct ops *ops, int64_t B, int64_t T,
                       struct model_solving list[LIMIT_BLOCK_KINDS]) {
    int count = 0;
    for (int i = 0; i < mc->solver_count; i++) {
        const struct layer *layer = model_solver_layer(mc, i);
        int known = 0;
        while (known < count && strcmp(list[known].layer->block_name, layer->block_name) != 0) known++;
        if (known < count) continue;
        list[count++] = (struct model_solving){layer, mixer_solver(layer, ops, B, T, SOLVER_CHOSEN)};
    }
    return count;
}

static struct model_flops *flops_of(struct model_flops *list, int *count, const struct layer *layer) {
    for (int i = 0; i < *count; i++)
        if (strcmp(list[i].block, layer->block_name) == 0 && strcmp(list[i].layer, layer->mixer->name) == 0)
            return &list[i];
    list[*count] = (struct model_flops){.block = layer->block_name, .layer = layer->mixer->name};
    return &list[(*count)++];
}

int model_list_flops(const struct model_config *mc, int64_t T, struct model_flops list[MODEL_FLOPS_MAX]) {
    int count = 0;
    for (int i = 0; i < mc->layer_count; i++) {
        struct model_flops *kind = flops_of(list, &count, &mc->layers[i]);
        if (kind->count++ == 0) kind->forward = mc->layers[i].mixer->forward_flops(&mc->layers[i], T);
    }
    /* Looking up an embedding is free. */
    double head = 2 * (double)mc->options.d_model * (double)mc->rows;
    list[count++] = (struct model_flops){.block = "", .layer = "head", .count = 1, .forward = head};
    return count;
}

double model_forward_flops(const struct model_config *mc, int64_t T) {
    struct model_flops list[MODEL_FLOPS_MAX];
    double flops = 0;
    int count = model_list_flops(mc, T, list);
    for (int i = 0; i < count; i++) flops += list[i].count * list[i].forward;
    return flops;
}
