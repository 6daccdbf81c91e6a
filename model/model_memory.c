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

static void carve_stream(struct layer_places *l, const struct ops *ops, int64_t R, int64_t D, arena *a) {
    l->residual = arena_take(a, elements(R, D, ops->real));
    l->normed = arena_take(a, elements(R, D, ops->act));
    l->rstd = arena_take(a, elements(R, 1, ops->real));
}

/* Size of a layer's own region; its scratch shows in the scratch arena's peak. */
static size_t measure_layer(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T, bool keep,
                            arena *scratch) {
    arena saved = arena_measure("activations of a layer");
    layer->mixer->carve(layer, ops, B, T, keep, &saved, scratch);
    return saved.used;
}

static void carve_activations(struct places *places, const struct model_config *mc, const struct ops *ops,
                              enum model_mode mode, int64_t B, int64_t T, arena areas[AREAS]) {
    arena *a = &areas[AREA_ACTIVATIONS];
    int64_t R = B * T, D = mc->options.d_model;
    bool train = mode == MODEL_TRAIN;
    struct layer_places shared = {.saved_size = 0};
    places->branch = arena_take(a, elements(R, D, ops->act));
    if (!train) carve_stream(&shared, ops, R, D, a);
    for (int i = 0; i <= mc->layer_count; i++) {
        struct layer_places *l = &places->layers[i];
        *l = shared;
        l->saved_size = i < mc->layer_count ? measure_layer(&mc->layers[i], ops, B, T, train, &areas[AREA_SCRATCH]) : 0;
        if (l->saved_size > shared.saved_size) shared.saved_size = l->saved_size;
        if (!train) continue;
        carve_stream(l, ops, R, D, a);
        l->saved = arena_take(a, l->saved_size);
    }
    if (train) return;
    shared.saved = arena_take(a, shared.saved_size);
    for (int i = 0; i <= mc->layer_count; i++) places->layers[i].saved = shared.saved;
}

static void carve_kept_scratch(struct places *places, const struct model_config *mc, const struct ops *ops,
                               enum model_mode mode, int64_t B, int64_t T, arena *scratch) {
    int64_t R = B * T, D = mc->options.d_model;
    size_t state = 0;
    for (int i = 0; i < mc->layer_count; i++) {
        size_t bytes = mixer_state_bytes(&mc->layers[i], ops, B);
        if (bytes > state) state = bytes;
    }
    places->state = arena_take(scratch, state);
    if (mode != MODEL_TRAIN) return;
    places->dnormed = arena_take(scratch, elements(R, D, ops->act));
    places->dresidual = arena_take(scratch, elements(R, D, ops->real));
    if (ops->act != ops->real) places->dbranch = arena_take(scratch, elements(R, D, ops->act));
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
    arena_take(scratch, ops->add_rmsnorm_backward_scratch(R, D));
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
    carve_kept_scratch(places, mc, ops, mode, B, T, &areas[AREA_SCRATCH]);
    measure_calls(mc, ops, mode, B * T, &areas[AREA_SCRATCH]);
    carve_activations(places, mc, ops, mode, B, T, areas);
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
    struct model_memory memory = {
        .parameters = areas[AREA_PARAMETERS].peak,
        .gradients = areas[AREA_GRADIENTS].peak,
        .optimizer = mode == MODEL_TRAIN ? 2 * elements(params.elements / ranks, 1, ops->real) : 0,
        .activations = areas[AREA_ACTIVATIONS].peak,
        .scratch = areas[AREA_SCRATCH].peak,
        .batch = areas[AREA_BATCH].peak,
    };
    memory.total =
        memory.parameters + memory.gradients + memory.optimizer + memory.activations + memory.scratch + memory.batch;
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
