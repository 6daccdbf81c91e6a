/* model_memory.c: where everything of a model lies, and so how much memory it takes. One function carves; model_open
 * runs it on measuring arenas and then on real ones, `riverrun plan` on measuring ones only, so the two agree. Owns
 * nothing. */
#include "model/model_parts.h"

#include <inttypes.h>

const char *const area_names[AREAS] = {"parameters", "gradients", "activations", "scratch", "batch"};

#define LOGITS_TILE (1 << 21) /* elements of logits computed at once: a few tens of rows of a large vocabulary */

int64_t logits_tile(int64_t rows, int64_t vocabulary) {
    int64_t tile = LOGITS_TILE / vocabulary;
    if (tile < 1) tile = 1;
    return tile < rows ? tile : rows;
}

static size_t elements(int64_t rows, int64_t columns, enum dtype dtype) {
    return (size_t)(rows * columns) * dtype_size(dtype);
}

/* Size of a layer's own region; its scratch shows in the scratch arena's peak. */
static size_t measure_layer(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                            arena *scratch) {
    arena saved = arena_measure("activations of a layer");
    layer->mixer->carve(layer, ops, B, T, keep, &saved, scratch);
    return saved.used;
}

/* What is asked of the places that layers share: all of them in MODEL_INFER, else those that backward fills again. */
struct shared_need {
    bool normed;
    size_t saved; /* of the largest region */
    int64_t span; /* streams behind the first of a span */
};

static struct shared_need measure_shared(struct places *places, const struct model_config *mc, const struct ops *ops,
                                         bool train, int64_t B, int64_t T, arena *scratch) {
    struct shared_need need = {.normed = !train};
    for (int i = 0; i < mc->layer_count; i++) {
        const struct layer *layer = &mc->layers[i];
        size_t size = measure_layer(layer, ops, B, T, train, scratch);
        places->layers[i].saved_size = size;
        if (!train || layer->recompute == RECOMPUTE_LAYER) need.saved = size > need.saved ? size : need.saved;
        if (layer->recompute != RECOMPUTE_NONE) need.normed = true;
        if (layer->span > need.span) need.span = layer->span;
    }
    return need;
}

static void carve_statistics(struct layer_places *l, const struct model_config *mc, const struct ops *ops, int64_t R,
                             arena *a) {
    if (mc->options.norm == MODEL_NORM_LAYER) l->mean = arena_take(a, elements(R, 1, ops->real));
    l->rstd = arena_take(a, elements(R, 1, ops->real));
}

static void carve_activations(struct places *places, const struct model_config *mc, const struct ops *ops,
                              enum model_mode mode, int64_t B, int64_t T, arena areas[AREAS]) {
    arena *a = &areas[AREA_ACTIVATIONS];
    bool train = mode == MODEL_TRAIN;
    size_t stream = elements(B * T, mc->options.d_model, ops->real);
    size_t act = elements(B * T, mc->options.d_model, ops->act);
    struct shared_need need = measure_shared(places, mc, ops, train, B, T, &areas[AREA_SCRATCH]);
    struct layer_places shared = {.saved = NULL};
    places->branch = arena_take(a, act);
    /* Unless layers are computed again as a whole, backward puts out no branch, and its place is free. */
    if (train && ops->act != ops->real) places->dbranch = need.saved ? arena_take(a, act) : places->branch;
    if (need.normed) shared.normed = arena_take(a, act);
    if (need.saved) shared.saved = arena_take(a, need.saved);
    if (!train) shared.residual = arena_take(a, stream);
    if (!train) carve_statistics(&shared, mc, ops, B * T, a);
    /* The first stream is the embedding's rows: backward looks them up again, where the last stream has served. */
    void *ends = train ? arena_take(a, stream) : NULL;
    char *span = need.span ? arena_take(a, stream * (size_t)need.span) : NULL;
    for (int i = 0; i <= mc->layer_count; i++) {
        struct layer_places *l = &places->layers[i];
        bool top = i == mc->layer_count;
        enum recompute level = top ? RECOMPUTE_NONE : mc->layers[i].recompute;
        int behind = top ? 0 : mc->layers[i].span;
        shared.saved_size = l->saved_size;
        *l = shared;
        if (!train) continue;
        carve_statistics(l, mc, ops, B * T, a);
        if (i == 0 || top) l->residual = ends;
        else l->residual = behind ? (span ? span + stream * (size_t)(behind - 1) : NULL) : arena_take(a, stream);
        if (level == RECOMPUTE_NONE) l->normed = arena_take(a, act);
        if (level != RECOMPUTE_LAYER && !top) l->saved = arena_take(a, l->saved_size);
    }
}

static void carve_kept_scratch(struct places *places, const struct model_config *mc, const struct ops *ops,
                               enum model_mode mode, int64_t B, int64_t T, arena *scratch) {
    int64_t R = B * T, D = mc->options.d_model;
    size_t state = 0;
    for (int i = 0; i < mc->layer_count; i++) {
        size_t bytes = mc->layers[i].mixer->state_in_place ? 0 : mixer_state_bytes(&mc->layers[i], ops, B);
        if (bytes > state) state = bytes;
    }
    places->state = arena_take(scratch, state);
    if (mode != MODEL_TRAIN) return;
    places->dnormed = arena_take(scratch, elements(R, D, ops->act));
    places->dresidual = arena_take(scratch, elements(R, D, ops->real));
    places->norm_work = arena_take(scratch, ops->add_norm_backward_scratch(R, D));
}

/* What model.c's own calls take from scratch for a moment. */
static void measure_calls(const struct model_config *mc, const struct ops *ops, enum model_mode mode, int64_t R,
                          arena *scratch) {
    int64_t D = mc->options.d_model;
    size_t mark = arena_mark(scratch);
    arena_take(scratch, elements(R, 1, ops->real)); /* losses of single targets */
    arena_take(scratch, ops->head_loss_scratch(R, D, mc->rows));
    arena_rewind(scratch, mark);
    arena_take(scratch, elements(logits_tile(R, mc->rows), mc->rows, ops->real));
    arena_rewind(scratch, mark);
    if (mode != MODEL_TRAIN) return;
    arena_take(scratch, ops->embedding_backward_scratch(R, D, mc->rows));
    arena_rewind(scratch, mark);
}

static void carve_parameters(struct places *places, const struct params *params, const struct ops *ops,
                             enum model_mode mode, arena areas[AREAS]) {
    arena *a = &areas[AREA_PARAMETERS];
    int64_t rounded = params->part_elements[PART_ROUNDED];
    places->parts[PART_REAL] = arena_take(a, elements(params->part_elements[PART_REAL], 1, ops->real));
    if (rounded > 0) places->parts[PART_ROUNDED] = arena_take(a, elements(rounded, 1, ops->act));
    if (mode != MODEL_TRAIN) return;
    if (rounded > 0) places->masters = arena_take(a, elements(rounded / params->ranks, 1, ops->real));
    places->grads = arena_take(&areas[AREA_GRADIENTS], elements(params->elements, 1, ops->real));
}

void places_carve(struct places *places, const struct model_config *mc, const struct params *params,
                  const struct ops *ops, enum model_mode mode, int64_t B, int64_t T, arena areas[AREAS]) {
    arena *batch = &areas[AREA_BATCH];
    size_t ids = elements(B, T, DTYPE_I32);
    *places = (struct places){.grads = NULL};
    carve_parameters(places, params, ops, mode, areas);
    places->tokens = arena_take(batch, ids);
    places->targets = arena_take(batch, ids);
    places->doc = arena_take(batch, ids);
    places->sums = arena_take(batch, sizeof *places->sums);
    places->reports = arena_take(batch, (size_t)mc->solver_count * sizeof *places->reports);
    carve_kept_scratch(places, mc, ops, mode, B, T, &areas[AREA_SCRATCH]);
    measure_calls(mc, ops, mode, B * T, &areas[AREA_SCRATCH]);
    carve_activations(places, mc, ops, mode, B, T, areas);
}

/* What asking the device for it takes. */
static size_t rounded_up(size_t bytes, const struct ops *ops) {
    return (bytes + ops->memory_page - 1) / ops->memory_page * ops->memory_page;
}

int model_plan(struct model_memory *out, const struct model_config *mc, const struct ops *ops, enum model_mode mode,
               int64_t B, int64_t T, int ranks, error *err) {
    struct params params;
    struct places places;
    arena areas[AREAS];
    TRY(params_copy(&params, &mc->params, err));
    params_layout(&params, ranks, ops->act != ops->real);
    for (int i = 0; i < AREAS; i++) areas[i] = arena_measure(area_names[i]);
    places_carve(&places, mc, &params, ops, mode, B, T, areas);
    size_t moments = mode == MODEL_TRAIN ? 2 * elements(params.elements / ranks, 1, ops->real) : 0;
    struct model_memory memory = {
        .parameters = rounded_up(areas[AREA_PARAMETERS].peak, ops),
        .gradients = rounded_up(areas[AREA_GRADIENTS].peak, ops),
        .optimizer = rounded_up(moments, ops),
        .activations = rounded_up(areas[AREA_ACTIVATIONS].peak, ops),
        .scratch = rounded_up(areas[AREA_SCRATCH].peak, ops),
        .batch = rounded_up(areas[AREA_BATCH].peak, ops),
        .device = ops->memory_overhead + (ranks > 1 ? ops->memory_peers : 0),
    };
    memory.total = memory.parameters + memory.gradients + memory.optimizer + memory.activations + memory.scratch +
                   memory.batch + memory.device;
    params_close(&params);
    *out = memory;
    return 0;
}

/* Every number that is kept for a token costs at least a few FLOPs to make, so a bound on FLOPs bounds the bytes: 2^57
 * of them are below 2^62 bytes. */
int model_check_batch(const struct model_config *mc, int64_t B, int64_t T, error *err) {
    ASSERT(B >= 1 && T >= 1);
    double tokens = 0x1p57 / model_forward_flops(mc, T);
    if ((double)B * (double)T <= tokens) return 0;
    return error_input(err,
                       "a micro-batch of %" PRId64 " sequences of %" PRId64
                       " tokens is beyond any machine for this model; at "
                       "most %.0f tokens can be asked for",
                       B, T, tokens);
}

size_t model_state_bytes(const struct model_config *mc, const struct ops *ops, int64_t B) {
    size_t bytes = 0;
    for (int i = 0; i < mc->layer_count; i++) bytes += mixer_state_bytes(&mc->layers[i], ops, B);
    return bytes;
}
