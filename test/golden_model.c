/* test/golden_model.c: files hf-*: a small language model recorded from transformers: weights, a batch, logits, the
 * gradient of every weight, and three AdamW steps on that batch. The file's config says which architecture it is. Run
 * through model/ and the operations of the optimizer, as training does; the file's own rule says which weights decay.
 */
#include "test/golden.h"

#include "common/arena.h"
#include "model/architecture.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIMIT_VALUES 5e-5 /* logits and gradients */
#define LIMIT_INPUT_GATE 1e-3 /* gradient of the input gate's bias in an mLSTM: the norm behind it nearly cancels it */
#define LIMIT_NUMBERS 1e-4 /* losses and gradient norms */
#define LIMIT_UPDATE 5e-3 /* change of a weight by the steps: Adam divides small gradients by themselves */
#define LIMIT_UPDATE_LLAMA 1e-3 /* decay left out would show as 3e-3 there */
#define STEPS_MAX 64

struct optimizer_settings {
    double lr, beta1, beta2, eps, weight_decay, clip;
    int64_t steps;
    const json_t *decayed; /* names */
};

struct problem {
    struct golden *g;
    config *c;
    struct model_config *mc;
    struct model *m;
    struct optimizer_settings optimizer;
    int64_t B, T;
    double **before; /* weights as loaded, for each tensor of the table */
    /* of the optimizer, in device memory */
    arena memory;
    tensor moment1, moment2;
    double *sum;
    struct adamw_step *step;
    struct adamw_segment *segments; /* one for each tensor */
};

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    ASSERT(memory != NULL);
    return memory;
}

/* --- the model of the file ---------------------------------------------------------------------- */

/* The file's config is what a config.json says: it is read as `riverrun import` reads one. */
static int make_config(struct problem *p, const json_t *from, error *err) {
    TRY(config_load(&p->c, NULL, err));
    TRY(architecture_read(from, p->g->path, p->c, err));
    TRY(model_config_bind(&p->mc, p->c, 0, err));
    return config_finish(p->c, err);
}

static int load_weights(struct problem *p, error *err) {
    const struct params *table = model_params(p->m);
    p->before = allocate((size_t)table->count, sizeof *p->before);
    for (int i = 0; i < table->count; i++) {
        const struct param *t = &table->list[i];
        char name[LIMIT_NAME + 8];
        snprintf(name, sizeof name, "param.%s", t->name);
        const struct safetensors_entry *e = golden_entry(p->g, name, err);
        if (!e) return -1;
        bool same = e->ndim == t->ndim;
        for (int k = 0; same && k < t->ndim; k++) same = e->dim[k] == t->dim[k];
        if (!same) return error_input(err, "%s: the shape of %s is not the model's", p->g->path, name);
        p->before[i] = golden_inputs(p->g, e);
        model_write_param(p->m, i, p->before[i], DTYPE_F64);
    }
    return 0;
}

static int set_batch(struct problem *p, const struct safetensors_entry *ids, const struct safetensors_entry *labels,
                     error *err) {
    int64_t count = p->B * p->T;
    double *id = golden_values(ids), *label = golden_values(labels);
    int32_t *tokens = allocate((size_t)count, sizeof *tokens), *targets = allocate((size_t)count, sizeof *targets);
    int result = 0;
    for (int64_t i = 0; i < count; i++) {
        if (id[i] < 0 || id[i] >= (double)p->mc->rows || label[i] >= (double)p->mc->rows)
            result = error_input(err, "%s: input_ids or labels hold an id outside the vocabulary", p->g->path);
        tokens[i] = (int32_t)id[i];
        targets[i] = label[i] < 0 ? -1 : (int32_t)label[i];
    }
    if (result == 0) model_set_batch(p->m, tokens, targets, NULL, p->B, p->T);
    free(id);
    free(label);
    free(tokens);
    free(targets);
    return result;
}

static int open_model(struct problem *p, error *err) {
    const struct safetensors_entry *ids = golden_entry(p->g, "input_ids", err);
    const struct safetensors_entry *labels = ids ? golden_entry(p->g, "labels", err) : NULL;
    const json_t *from = json_object_get(p->g->meta, "config");
    if (!ids || !labels) return -1;
    if (!json_is_object(from)) return error_input(err, "%s: meta has no config", p->g->path);
    if (ids->ndim != 2 || labels->ndim != 2 || ids->dim[0] != labels->dim[0] || ids->dim[1] != labels->dim[1] ||
        !ids->count)
        return error_input(err, "%s: input_ids and labels must both be (batch, length)", p->g->path);
    p->B = ids->dim[0];
    p->T = ids->dim[1];
    TRY(make_config(p, from, err));
    TRY(model_open(&p->m, p->mc, p->g->dev, MODEL_TRAIN, p->B, p->T, 0, 1, err));
    TRY(load_weights(p, err));
    return set_batch(p, ids, labels, err);
}

/* --- the optimizer of the file ------------------------------------------------------------------ */

static bool listed(const json_t *names, const char *name) {
    for (size_t i = 0; i < json_array_size(names); i++)
        if (strcmp(json_string_value(json_array_get(names, i)), name) == 0) return true;
    return false;
}

static int read_settings(struct problem *p, error *err) {
    struct optimizer_settings *o = &p->optimizer;
    const json_t *from = json_object_get(p->g->meta, "optimizer");
    const char *path = p->g->path;
    const struct params *table = model_params(p->m);
    if (!json_is_object(from)) return error_input(err, "%s: meta has no optimizer", path);
    TRY(json_get_real(from, "lr", path, &o->lr, err));
    TRY(json_get_real(from, "beta1", path, &o->beta1, err));
    TRY(json_get_real(from, "beta2", path, &o->beta2, err));
    TRY(json_get_real(from, "eps", path, &o->eps, err));
    TRY(json_get_real(from, "weight_decay", path, &o->weight_decay, err));
    TRY(json_get_real(from, "clip", path, &o->clip, err));
    TRY(json_get_int(from, "steps", path, &o->steps, err));
    o->decayed = json_object_get(from, "decayed");
    if (o->steps < 1 || o->steps > STEPS_MAX || !json_is_array(o->decayed))
        return error_input(err, "%s: meta.optimizer needs 1 to %d steps and a list `decayed`", path, STEPS_MAX);
    for (size_t i = 0; i < json_array_size(o->decayed); i++) {
        const char *name = json_string_value(json_array_get(o->decayed, i));
        if (!name || params_find(table, name) < 0)
            return error_input(err, "%s: `decayed` names %s, which the model has not", path, name ? name : "no string");
    }
    return 0;
}

static void carve_optimizer(struct problem *p, arena *a) {
    enum dtype real = p->g->dev->ops->real;
    int64_t count = model_params(p->m)->elements;
    p->moment1 = tensor_1d(arena_take(a, (size_t)count * dtype_size(real)), real, count);
    p->moment2 = tensor_1d(arena_take(a, (size_t)count * dtype_size(real)), real, count);
    p->sum = arena_take(a, sizeof *p->sum);
    p->step = arena_take(a, sizeof *p->step);
}

static int open_optimizer(struct problem *p, error *err) {
    TRY(read_settings(p, err));
    arena measured = arena_measure("golden");
    carve_optimizer(p, &measured);
    TRY(arena_open(&p->memory, "golden", measured.peak, p->g->dev->memory, err));
    carve_optimizer(p, &p->memory);
    p->segments = allocate((size_t)model_params(p->m)->count, sizeof *p->segments);
    return 0;
}

static tensor run_of(tensor flat, int64_t from, int64_t count) {
    return tensor_1d((char *)flat.data + (size_t)from * dtype_size(flat.dtype), flat.dtype, count);
}

/* Norm of the mean gradient; gradients hold the sum over `valid` targets. */
static double grad_norm(struct problem *p, double valid) {
    struct device *dev = p->g->dev;
    double sum;
    device_zero(dev, p->sum, sizeof sum);
    dev->ops->sum_squares(dev, p->sum, model_flat_grads(p->m));
    device_read(dev, &sum, p->sum, sizeof sum);
    return sqrt(sum) / valid;
}

static void update_part(struct problem *p, int bucket, int kind) {
    const struct params *table = model_params(p->m);
    const struct bucket *b = &table->buckets[bucket];
    struct device *dev = p->g->dev;
    int64_t from = b->part[kind].offset, count = b->part[kind].count;
    int segments = 0;
    for (int i = b->first; i < b->first + b->params; i++) {
        if (table->list[i].part != kind) continue;
        float decay = listed(p->optimizer.decayed, table->list[i].name) ? (float)p->optimizer.weight_decay : 0;
        p->segments[segments++] = (struct adamw_segment){
            .offset = table->list[i].offset - from, .count = table->list[i].count, .decay = decay, .lr_scale = 1};
    }
    if (count == 0) return;
    struct adamw_slice slice = {
        .p = model_masters(p->m, bucket, kind),
        .m = run_of(p->moment1, from, count),
        .v = run_of(p->moment2, from, count),
        .g = run_of(model_flat_grads(p->m), from, count),
        .rounded = model_rounded(p->m, bucket, kind),
        .segments = p->segments,
        .count = segments,
    };
    dev->ops->adamw(dev, &slice, 1, p->step);
}

static void update(struct problem *p, int64_t t, double norm, double valid) {
    const struct optimizer_settings *o = &p->optimizer;
    struct device *dev = p->g->dev;
    struct adamw_step step = {
        .lr = o->lr,
        .decay_rate = o->lr,
        .beta1 = o->beta1,
        .beta2 = o->beta2,
        .eps = o->eps,
        .correction1 = 1 - pow(o->beta1, (double)t),
        .correction2 = 1 - pow(o->beta2, (double)t),
        .grad_scale = fmin(1, o->clip / (norm + 1e-6)) / valid,
    };
    device_write(dev, p->step, &step, sizeof step);
    for (int b = 0; b < model_params(p->m)->bucket_count; b++) {
        update_part(p, b, PART_ROUNDED);
        update_part(p, b, PART_REAL);
    }
}

/* --- comparison --------------------------------------------------------------------------------- */

static void compare_logits(struct problem *p) {
    enum dtype real = p->g->dev->ops->real;
    int64_t rows = p->B * p->T, count = rows * p->mc->rows;
    void *raw = allocate((size_t)count, dtype_size(real));
    double *logits = allocate((size_t)count, sizeof *logits);
    model_logits(p->m, 0, rows, raw);
    for (int64_t i = 0; i < count; i++) logits[i] = real == DTYPE_F32 ? ((float *)raw)[i] : ((double *)raw)[i];
    golden_compare(p->g, "logits", "", logits, count, LIMIT_VALUES);
    free(raw);
    free(logits);
}

static void compare_grads(struct problem *p, double valid) {
    const struct params *table = model_params(p->m);
    tensor flat = model_flat_grads(p->m);
    for (int i = 0; i < table->count; i++) {
        const struct param *t = &table->list[i];
        char name[LIMIT_NAME + 8];
        double *grad = allocate((size_t)t->count, sizeof *grad);
        snprintf(name, sizeof name, "grad.%s", t->name);
        golden_download(p->g, grad, params_view(table, i, flat.data, flat.dtype).data, flat.dtype, t->count);
        for (int64_t k = 0; k < t->count; k++) grad[k] /= valid;
        golden_compare(p->g, name, "", grad, t->count,
                       strstr(name, "igate_preact.bias") ? LIMIT_INPUT_GATE : LIMIT_VALUES);
        free(grad);
    }
}

static double update_limit(const struct golden *g) {
    return strncmp(g->base, "hf-llama", 8) == 0 ? LIMIT_UPDATE_LLAMA : LIMIT_UPDATE;
}

/* The change of every weight over all steps. */
static void compare_updates(struct problem *p) {
    const struct params *table = model_params(p->m);
    for (int i = 0; i < table->count; i++) {
        int64_t count = table->list[i].count;
        char name[LIMIT_NAME + 8];
        snprintf(name, sizeof name, "after.%s", table->list[i].name);
        const struct safetensors_entry *e = golden_optional(p->g, name);
        if (!e || e->count != (uint64_t)count) {
            golden_fail(p->g, name, e ? "has another number of values than the weight" : "is not in the file");
            continue;
        }
        if (p->g->rounded) continue; /* Adam makes steps of one size of gradients that rounding alone decides */
        double *want = golden_values(e), *got = allocate((size_t)count, sizeof *got);
        model_read_param(p->m, i, got, DTYPE_F64);
        for (int64_t k = 0; k < count; k++) {
            got[k] -= p->before[i][k];
            want[k] -= p->before[i][k];
        }
        golden_judge(p->g, name, "change of the weight", got, want, count, update_limit(p->g));
        free(want);
        free(got);
    }
}

static int train(struct problem *p, error *err) {
    double losses[STEPS_MAX + 1], norms[STEPS_MAX];
    int64_t steps = p->optimizer.steps;
    struct loss_sums sums;
    for (int64_t s = 0; s <= steps; s++) {
        bool last = s == steps;
        model_zero_sums(p->m);
        model_zero_grads(p->m);
        model_forward(p->m, NULL, NULL, !last);
        if (s == 0) compare_logits(p);
        model_loss(p->m, NULL, !last, 1, 0);
        model_read_sums(p->m, &sums);
        if (sums.valid < 1) return error_input(err, "%s: all labels are masked", p->g->path);
        losses[s] = sums.nll / sums.valid;
        if (last) break;
        model_backward(p->m, NULL, NULL);
        if (s == 0) compare_grads(p, sums.valid);
        norms[s] = grad_norm(p, sums.valid);
        update(p, s + 1, norms[s], sums.valid);
    }
    golden_compare_each(p->g, "losses", losses, steps + 1, LIMIT_NUMBERS);
    golden_compare_each(p->g, "grad_norms", norms, steps, LIMIT_NUMBERS);
    compare_updates(p);
    return device_check(p->g->dev, err);
}

static void close_problem(struct problem *p) {
    if (p->before)
        for (int i = 0; i < model_params(p->m)->count; i++) free(p->before[i]);
    free(p->before);
    free(p->segments);
    arena_close(&p->memory);
    model_close(p->m);
    model_config_free(p->mc);
    config_free(p->c);
}

int golden_model(struct golden *g, error *err) {
    struct problem p = {.g = g};
    int result = open_model(&p, err);
    if (result == 0) result = open_optimizer(&p, err);
    if (result == 0) result = train(&p, err);
    close_problem(&p);
    return result;
}
