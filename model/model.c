/* model.c: the language model at work: opening, batches, forward, loss, backward, decoding (model.h). Owns the arenas
 * of a model and of its states, and the order in which layers are called; what a layer does is its mixer's. Written
 * once for all devices: everything that touches numbers goes through the device's table of operations. */
#include "model/model.h"
#include "model/model_parts.h"

#include "common/safetensors.h"

#include <stdlib.h>
#include <string.h>

/* What has been done with the current batch: each call below asks for the one before it. */
enum stage { STAGE_NONE, STAGE_BATCH, STAGE_FORWARD, STAGE_KEPT, STAGE_LOSS };

struct model {
    struct model_config *mc;
    struct device *dev;
    const struct ops *ops;
    enum model_mode mode;
    int64_t B_max, T_max;
    struct params params; /* laid out */
    tensor *w, *dw;       /* views of every tensor of the table as products see it; dw only in MODEL_TRAIN */
    int rank;             /* of params.ranks */
    arena areas[AREAS];
    struct places at;
    void *staging, *staging_rounded; /* PIECE elements of host memory: real (room for either type), and rounded */

    int64_t B, T; /* of the current batch */
    bool has_targets, has_doc;
    enum stage stage;
    const struct model_state *initial; /* of the forward that backward will follow */
    enum solver_level *levels;         /* of each layer with a solver */
    int span_first;                    /* first layer of the span whose streams lie in the shared places */
    void (*needed)(void *self, int bucket);
    void *needed_self;
};

struct model_state {
    const struct model *m;
    int64_t B;
    arena memory;
    void **layers; /* the state of each layer; a stateless one's is empty */
    /* For model_step: its recorded work, and what that works with. */
    struct device_record *record;
    struct model *stepping;
    bool one_piece; /* the logits of all sequences are computed at once, */
    void *logits;   /* here */
};

/* Values go to and from the device in pieces. */
#define PIECE (1 << 20)

static enum dtype part_dtype(const struct model *m, int part) {
    return part == PART_ROUNDED ? m->ops->act : m->ops->real;
}

/* What kernels read of element i of tensor `index`. */
static char *weight_at(const struct model *m, int index, int64_t i) {
    const struct param *t = &m->params.list[index];
    const struct part *part = &m->params.buckets[t->bucket].part[t->part];
    return (char *)m->at.parts[t->part] +
           (size_t)(part->place + t->offset - part->offset + i) * dtype_size(part_dtype(m, t->part));
}

/* --- opening ---------------------------------------------------------------------------------- */

static int open_areas(struct model *m, error *err) {
    arena measured[AREAS];
    for (int i = 0; i < AREAS; i++) measured[i] = arena_measure(area_names[i]);
    places_carve(&m->at, m->mc, &m->params, m->ops, m->mode, m->B_max, m->T_max, measured);
    for (int i = 0; i < AREAS; i++)
        if (measured[i].peak > 0) TRY(arena_open(&m->areas[i], area_names[i], measured[i].peak, m->dev->memory, err));
    places_carve(&m->at, m->mc, &m->params, m->ops, m->mode, m->B_max, m->T_max, m->areas);
    return 0;
}

static int open_views(struct model *m, error *err) {
    int count = m->params.count;
    m->w = calloc((size_t)count, sizeof *m->w);
    m->dw = calloc((size_t)count, sizeof *m->dw);
    if (!m->w || !m->dw) return error_system(err, "out of memory for the tensor table");
    for (int i = 0; i < count; i++) {
        const struct param *t = &m->params.list[i];
        m->w[i] = tensor_reshape(tensor_1d(weight_at(m, i, 0), part_dtype(m, t->part), t->count), t->ndim, t->dim);
        m->dw[i] = params_view(&m->params, i, m->at.grads, m->ops->real);
    }
    m->levels = calloc((size_t)m->mc->solver_count + 1, sizeof *m->levels);
    if (!m->levels) return error_system(err, "out of memory for the layers' solvers");
    m->staging = malloc(PIECE * sizeof(double));
    m->staging_rounded = malloc(PIECE * sizeof(uint16_t));
    return m->staging && m->staging_rounded ? 0 : error_system(err, "out of memory for a model's staging buffer");
}

int model_open(struct model **out, struct model_config *mc, struct device *dev, enum model_mode mode, int64_t B,
               int64_t T, int rank, int ranks, error *err) {
    *out = NULL;
    TRY(model_check_batch(mc, B, T, err));
    struct model *m = calloc(1, sizeof *m);
    if (!m) return error_system(err, "out of memory for a model");
    *m = (struct model){.mc = mc, .dev = dev, .ops = dev->ops, .mode = mode, .B_max = B, .T_max = T, .rank = rank};
    if (params_copy(&m->params, &mc->params, err) != 0) {
        model_close(m);
        return -1;
    }
    params_layout(&m->params, ranks, m->ops->act != m->ops->real);
    if (open_areas(m, err) != 0 || open_views(m, err) != 0) {
        model_close(m);
        return -1;
    }
    *out = m;
    return 0;
}

void model_close(struct model *m) {
    if (!m) return;
    for (int i = 0; i < AREAS; i++) arena_close(&m->areas[i]);
    free(m->staging);
    free(m->staging_rounded);
    free(m->levels);
    free(m->w);
    free(m->dw);
    params_close(&m->params);
    free(m);
}

const struct params *model_params(const struct model *m) {
    return &m->params;
}

const struct model_config *model_get_config(const struct model *m) {
    return m->mc;
}

struct device *model_device(const struct model *m) {
    return m->dev;
}

tensor model_flat_grads(const struct model *m) {
    return tensor_1d(m->at.grads, m->ops->real, m->params.elements);
}

struct model_memory model_allocated(const struct model *m) {
    struct model_memory memory = {
        .parameters = m->areas[AREA_PARAMETERS].capacity,
        .gradients = m->areas[AREA_GRADIENTS].capacity,
        .activations = m->areas[AREA_ACTIVATIONS].capacity,
        .scratch = m->areas[AREA_SCRATCH].capacity,
        .batch = m->areas[AREA_BATCH].capacity,
    };
    memory.total = memory.parameters + memory.gradients + memory.activations + memory.scratch + memory.batch;
    return memory;
}

/* --- values of parameters --------------------------------------------------------------------- */

/* Where the master of an element of tensor `index` is; *count is cut to those that follow it there, or, where the
 * element is another rank's (NULL), to those that follow it in the tensor until the next rank's. */
static char *master_at(const struct model *m, int index, int64_t i, int64_t *count) {
    const struct param *t = &m->params.list[index];
    const struct part *part = &m->params.buckets[t->bucket].part[t->part];
    if (t->part == PART_REAL) return weight_at(m, index, i);
    int64_t slice = part->count / m->params.ranks, at = t->offset - part->offset + i, owner = at / slice;
    if (*count > (owner + 1) * slice - at) *count = (owner + 1) * slice - at;
    if (!m->at.masters || owner != m->rank) return NULL;
    return (char *)m->at.masters + (size_t)(part->place / m->params.ranks + at % slice) * dtype_size(m->ops->real);
}

tensor model_part(const struct model *m, int bucket, int part) {
    const struct part *p = &m->params.buckets[bucket].part[part];
    enum dtype dtype = part_dtype(m, part);
    return tensor_1d((char *)m->at.parts[part] + (size_t)p->place * dtype_size(dtype), dtype, p->count);
}

/* A rank's share of a whole part. */
static tensor slice_of(tensor whole, int rank, int ranks) {
    int64_t count = whole.dim[0] / ranks;
    return tensor_1d((char *)whole.data + (size_t)(rank * count) * dtype_size(whole.dtype), whole.dtype, count);
}

tensor model_masters(const struct model *m, int bucket, int part) {
    ASSERT(m->mode == MODEL_TRAIN);
    const struct part *p = &m->params.buckets[bucket].part[part];
    if (part == PART_REAL) return slice_of(model_part(m, bucket, part), m->rank, m->params.ranks);
    char *slice = (char *)m->at.masters + (size_t)(p->place / m->params.ranks) * dtype_size(m->ops->real);
    return tensor_1d(slice, m->ops->real, p->count / m->params.ranks);
}

tensor model_rounded(const struct model *m, int bucket, int part) {
    if (part == PART_REAL) return tensor_none();
    return slice_of(model_part(m, bucket, part), m->rank, m->params.ranks);
}

/* `count` elements of tensor `index` from element `from` on, whose real values are in m->staging: what kernels read. */
static void write_weights(struct model *m, int index, int64_t from, int64_t count) {
    enum dtype dtype = part_dtype(m, m->params.list[index].part);
    const void *values = m->staging;
    if (dtype == DTYPE_BF16) {
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)m->staging_rounded)[i] = safetensors_bf16(((const float *)m->staging)[i]);
        values = m->staging_rounded;
    }
    device_write(m->dev, weight_at(m, index, from), values, (size_t)count * dtype_size(dtype));
}

/* The same for this rank's share of the masters. */
static void write_masters(struct model *m, int index, int64_t from, int64_t count) {
    size_t size = dtype_size(m->ops->real);
    if (m->params.list[index].part == PART_REAL) return; /* they are the same memory */
    for (int64_t at = 0, run; at < count; at += run) {
        run = count - at;
        char *to = master_at(m, index, from + at, &run);
        if (to) device_write(m->dev, to, (const char *)m->staging + (size_t)at * size, (size_t)run * size);
    }
}

void model_init(struct model *m, uint64_t seed) {
    for (int i = 0; i < m->params.count; i++) {
        int64_t count = m->params.list[i].count;
        for (int64_t from = 0; from < count; from += PIECE) {
            int64_t part = count - from < PIECE ? count - from : PIECE;
            params_initial_part(&m->params, i, seed, from, part, m->staging, m->ops->real);
            write_weights(m, i, from, part);
            write_masters(m, i, from, part);
        }
    }
}

static void convert(void *to, enum dtype to_dtype, const void *from, enum dtype from_dtype, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        double value = from_dtype == DTYPE_F32 ? ((const float *)from)[i] : ((const double *)from)[i];
        if (to_dtype == DTYPE_F32)
            ((float *)to)[i] = (float)value;
        else
            ((double *)to)[i] = value;
    }
}

/* At most *count elements into m->staging, as real. */
static void read_values(const struct model *m, int index, int64_t from, int64_t *count) {
    bool masters = m->at.masters && m->params.ranks == 1;
    enum dtype dtype = masters ? m->ops->real : part_dtype(m, m->params.list[index].part);
    const char *at = masters ? master_at(m, index, from, count) : weight_at(m, index, from);
    if (dtype != DTYPE_BF16) {
        device_read(m->dev, m->staging, at, (size_t)*count * dtype_size(dtype));
        return;
    }
    device_read(m->dev, m->staging_rounded, at, (size_t)*count * dtype_size(dtype));
    for (int64_t i = 0; i < *count; i++) {
        uint32_t bits = (uint32_t)((const uint16_t *)m->staging_rounded)[i] << 16;
        memcpy((float *)m->staging + i, &bits, sizeof bits);
    }
}

void model_read_param(const struct model *m, int index, void *values, enum dtype dtype) {
    int64_t count = m->params.list[index].count;
    for (int64_t from = 0, part; from < count; from += part) {
        part = count - from < PIECE ? count - from : PIECE;
        read_values(m, index, from, &part);
        convert((char *)values + (size_t)from * dtype_size(dtype), dtype, m->staging, m->ops->real, part);
    }
}

void model_write_param(struct model *m, int index, const void *values, enum dtype dtype) {
    int64_t count = m->params.list[index].count;
    for (int64_t from = 0; from < count; from += PIECE) {
        int64_t part = count - from < PIECE ? count - from : PIECE;
        convert(m->staging, m->ops->real, (const char *)values + (size_t)from * dtype_size(dtype), dtype, part);
        write_weights(m, index, from, part);
        write_masters(m, index, from, part);
    }
}

/* --- solvers ---------------------------------------------------------------------------------- */

struct cell_report *model_reports(const struct model *m) {
    return m->at.reports;
}

void model_zero_reports(struct model *m) {
    if (m->mc->solver_count == 0) return;
    device_zero(m->dev, m->at.reports, (size_t)m->mc->solver_count * sizeof *m->at.reports);
}

enum solver_level model_level(const struct model *m, int solver) {
    ASSERT(solver >= 0 && solver < m->mc->solver_count);
    return m->levels[solver];
}

void model_set_level(struct model *m, int solver, enum solver_level level) {
    ASSERT(solver >= 0 && solver < m->mc->solver_count);
    m->levels[solver] = level;
}

struct cell_solver model_solver(const struct model *m, int solver, int64_t B, int64_t T) {
    return mixer_solver(model_solver_layer(m->mc, solver), m->ops, B, T, model_level(m, solver));
}

/* --- states ----------------------------------------------------------------------------------- */

static void carve_state(struct model_state *s, arena *a) {
    const struct model_config *mc = s->m->mc;
    for (int i = 0; i < mc->layer_count; i++)
        s->layers[i] = arena_take(a, mixer_state_bytes(&mc->layers[i], s->m->ops, s->B));
}

int model_state_open(struct model_state **out, const struct model *m, int64_t B, error *err) {
    *out = NULL;
    ASSERT(B >= 1);
    struct model_state *s = calloc(1, sizeof *s);
    if (s) *s = (struct model_state){.m = m, .B = B, .layers = calloc((size_t)m->mc->layer_count, sizeof *s->layers)};
    if (!s || !s->layers) {
        free(s);
        return error_system(err, "out of memory for a model's state");
    }
    arena measured = arena_measure("state");
    carve_state(s, &measured);
    if (arena_open(&s->memory, "state", measured.peak, m->dev->memory, err) != 0) {
        model_state_close(s);
        return -1;
    }
    carve_state(s, &s->memory);
    *out = s;
    return 0;
}

void model_state_close(struct model_state *s) {
    if (!s) return;
    device_record_close(s->m->dev, s->record);
    arena_close(&s->memory);
    free(s->layers);
    free(s);
}

void model_state_reset(struct model_state *s, int64_t row) {
    ASSERT(row < s->B);
    const struct model_config *mc = s->m->mc;
    for (int i = 0; i < mc->layer_count; i++) {
        tensor views[MIXER_STATES];
        int count = mc->layers[i].mixer->state(&mc->layers[i], s->m->ops, s->B, s->layers[i], views);
        for (int v = 0; v < count; v++) {
            size_t bytes = (size_t)(tensor_count(views[v]) / s->B) * dtype_size(views[v].dtype);
            char *data = views[v].data;
            if (row < 0)
                device_zero(s->m->dev, data, bytes * (size_t)s->B);
            else
                device_zero(s->m->dev, data + (size_t)row * bytes, bytes);
        }
    }
}

/* --- forward ---------------------------------------------------------------------------------- */

static void check_ids(const struct model *m, const int32_t *ids, int64_t count, bool masks) {
    for (int64_t i = 0; i < count; i++) ASSERT((masks || ids[i] >= 0) && ids[i] < m->mc->rows);
}

void model_set_batch(struct model *m, const int32_t *tokens, const int32_t *targets, const int32_t *doc, int64_t B,
                     int64_t T) {
    ASSERT(B >= 1 && B <= m->B_max && T >= 1 && T <= m->T_max);
    size_t bytes = (size_t)(B * T) * sizeof *tokens;
    check_ids(m, tokens, B * T, false);
    device_write(m->dev, m->at.tokens, tokens, bytes);
    if (targets) {
        check_ids(m, targets, B * T, true);
        device_write(m->dev, m->at.targets, targets, bytes);
    }
    if (doc) device_write(m->dev, m->at.doc, doc, bytes);
    m->has_targets = targets != NULL;
    m->has_doc = doc != NULL;
    m->B = B;
    m->T = T;
    m->stage = STAGE_BATCH;
}

static tensor matrix(void *place, enum dtype dtype, int64_t R, const struct model *m) {
    return tensor_2d(place, dtype, R, m->mc->options.d_model);
}

/* A layer's region as an arena of its own. It is carved from a piece that the big arena has handed out, so it has no
 * memory to release and nothing to guard. */
static arena region(const struct layer_places *l) {
    return (arena){.name = "activations of a layer", .base = l->saved, .capacity = l->saved_size};
}

static struct mixer_call call_of(struct model *m, int i, int64_t B, int64_t T, arena *saved) {
    const struct layer *layer = &m->mc->layers[i];
    bool solves = layer->solver >= 0;
    *saved = region(&m->at.layers[i]);
    return (struct mixer_call){
        .dev = m->dev,
        .layer = layer,
        .B = B,
        .T = T,
        .doc = tensor_none(),
        .w = &m->w[layer->first],
        .saved = saved,
        .scratch = &m->areas[AREA_SCRATCH],
        .x = matrix(m->at.layers[i].normed, m->ops->act, B * T, m),
        .y = matrix(m->at.branch, m->ops->act, B * T, m),
        .level = solves ? m->levels[layer->solver] : SOLVER_CHOSEN,
        .report = solves ? &m->at.reports[layer->solver] : NULL,
    };
}

static tensor batch_doc(const struct model *m) {
    return m->has_doc ? tensor_2d(m->at.doc, DTYPE_I32, m->B, m->T) : tensor_none();
}

void model_on_needed(struct model *m, void (*needed)(void *self, int bucket), void *self) {
    m->needed = needed;
    m->needed_self = self;
}

/* The weights of tensor `index`, and of its bucket, are read next. */
static void need(struct model *m, int index) {
    if (m->needed) m->needed(m->needed_self, m->params.list[index].bucket);
}

/* Of the rows of a norm's input; none where the norm has none. */
static tensor statistic(const struct model *m, void *place, int64_t R) {
    return tensor_1d(place, m->ops->real, R);
}

/* What the stream before layer i is multiplied by when the layer's output is added, or that of another array of tensors
 * in the place of the weights'. */
static tensor scale_of(const struct model *m, const tensor *w, int i) {
    bool scaled = i >= 0 && i < m->mc->layer_count && m->mc->layers[i].scale >= 0;
    return scaled ? w[m->mc->layers[i].scale] : tensor_none();
}

/* The norm before layer i: adds what the layer before put out, and leaves the stream and its norm in layer i's places.
 */
static void enter_layer(struct model *m, int i, int64_t R) {
    const struct layer_places *l = &m->at.layers[i], *before = &m->at.layers[i > 0 ? i - 1 : 0];
    int norm = i < m->mc->layer_count ? m->mc->layers[i].norm : m->mc->final_norm;
    need(m, norm);
    tensor residual = matrix(before->residual, m->ops->real, R, m);
    tensor branch = i > 0 ? matrix(m->at.branch, m->ops->act, R, m) : tensor_none();
    m->ops->add_norm_forward(m->dev, matrix(l->residual, m->ops->real, R, m), matrix(l->normed, m->ops->act, R, m),
                             statistic(m, l->mean, R), statistic(m, l->rstd, R), residual, scale_of(m, m->w, i - 1),
                             branch, m->w[norm], m->mc->options.norm_eps);
}

static void embed(struct model *m, int64_t R) {
    need(m, m->mc->embedding);
    m->ops->embedding_forward(m->dev, matrix(m->at.layers[0].residual, m->ops->real, R, m),
                              tensor_1d(m->at.tokens, DTYPE_I32, R), m->w[m->mc->embedding]);
}

void model_forward(struct model *m, const struct model_state *initial, struct model_state *final, bool keep) {
    ASSERT(m->stage != STAGE_NONE && (!keep || m->mode == MODEL_TRAIN));
    ASSERT(!initial || (initial->m == m && initial->B == m->B));
    ASSERT(!final || (final->m == m && final->B == m->B));
    bool in_place = initial && initial == final;
    ASSERT(!(keep && in_place));
    int64_t R = m->B * m->T;
    device_range_push(m->dev, "forward");
    embed(m, R);
    for (int i = 0; i < m->mc->layer_count; i++) {
        arena saved;
        struct mixer_call call = call_of(m, i, m->B, m->T, &saved);
        size_t state = final || initial ? mixer_state_bytes(call.layer, m->ops, m->B) : 0;
        enter_layer(m, i, R);
        if (call.layer->span > 0) m->span_first = i - call.layer->span;
        call.keep = keep && call.layer->recompute != RECOMPUTE_LAYER;
        call.doc = batch_doc(m);
        call.initial = initial && state ? initial->layers[i] : NULL;
        bool aside = in_place && state && !call.layer->mixer->state_in_place;
        call.final = final && state ? (aside ? m->at.state : final->layers[i]) : NULL;
        device_range_push(m->dev, call.layer->mixer->name);
        call.layer->mixer->forward(&call);
        device_range_pop(m->dev);
        if (aside) device_copy(m->dev, final->layers[i], m->at.state, state);
    }
    enter_layer(m, m->mc->layer_count, R);
    device_range_pop(m->dev);
    m->initial = initial;
    m->stage = keep ? STAGE_KEPT : STAGE_FORWARD;
}

/* --- computing again ---------------------------------------------------------------------------- */

/* The norm before layer i once more, from the stream that is there: the same operation on the same numbers. */
static void enter_again(struct model *m, int i, int64_t R) {
    const struct layer_places *l = &m->at.layers[i];
    tensor residual = matrix(l->residual, m->ops->real, R, m);
    m->ops->add_norm_forward(m->dev, residual, matrix(l->normed, m->ops->act, R, m), statistic(m, l->mean, R),
                             statistic(m, l->rstd, R), residual, tensor_none(), tensor_none(),
                             m->w[m->mc->layers[i].norm], m->mc->options.norm_eps);
}

/* Layer i once more, from its normed input. */
static void forward_again(struct model *m, int i, bool keep) {
    arena saved;
    struct mixer_call call = call_of(m, i, m->B, m->T, &saved);
    call.keep = keep;
    call.doc = batch_doc(m);
    if (m->initial && mixer_state_bytes(call.layer, m->ops, m->B) > 0) call.initial = m->initial->layers[i];
    call.layer->mixer->forward(&call);
}

/* What backward through layer i reads, where forward left it to be computed again. The streams within a span lie in
 * places that all spans share: those of the span that ran last are there. */
static void restore_layer(struct model *m, int i) {
    const struct layer *layer = &m->mc->layers[i];
    int64_t R = m->B * m->T;
    if (layer->recompute == RECOMPUTE_NONE) return;
    int first = i - layer->span;
    if (layer->span > 0 && m->span_first != first) {
        enter_again(m, first, R);
        for (int j = first; j < i; j++) {
            forward_again(m, j, false);
            enter_layer(m, j + 1, R);
        }
        m->span_first = first;
    } else {
        enter_again(m, i, R);
    }
    if (layer->recompute == RECOMPUTE_LAYER) forward_again(m, i, true);
}

/* --- loss and backward ------------------------------------------------------------------------ */

static tensor final_normed(const struct model *m, int64_t from, int64_t count) {
    size_t row = (size_t)m->mc->options.d_model * dtype_size(m->ops->act);
    return matrix((char *)m->at.layers[m->mc->layer_count].normed + (size_t)from * row, m->ops->act, count, m);
}

void model_loss(struct model *m, void *losses, bool backward, double scale, double z_loss) {
    ASSERT(m->has_targets && (backward ? m->stage == STAGE_KEPT : m->stage >= STAGE_FORWARD));
    arena *scratch = &m->areas[AREA_SCRATCH];
    size_t mark = arena_mark(scratch);
    int64_t R = m->B * m->T, D = m->mc->options.d_model;
    tensor each = tensor_none(), dx = tensor_none(), dw = tensor_none();
    if (losses) each = tensor_1d(arena_take(scratch, (size_t)R * dtype_size(m->ops->real)), m->ops->real, R);
    if (backward) {
        dx = matrix(m->at.dnormed, m->ops->act, R, m);
        dw = m->dw[m->mc->head];
    }
    void *work = arena_take(scratch, m->ops->head_loss_scratch(R, D, m->mc->rows));
    need(m, m->mc->head);
    device_range_push(m->dev, "head");
    m->ops->head_loss(m->dev, m->at.sums, each, dx, dw, final_normed(m, 0, R), m->w[m->mc->head],
                      tensor_1d(m->at.targets, DTYPE_I32, R), scale, z_loss, m->mc->options.logit_cap,
                      work);
    device_range_pop(m->dev);
    if (losses) device_read(m->dev, losses, each.data, (size_t)R * dtype_size(m->ops->real));
    arena_rewind(scratch, mark);
    if (backward) m->stage = STAGE_LOSS;
}

void model_read_sums(struct model *m, struct loss_sums *sums) {
    device_read(m->dev, sums, m->at.sums, sizeof *sums);
}

void model_zero_sums(struct model *m) {
    device_zero(m->dev, m->at.sums, sizeof *m->at.sums);
}

struct loss_sums *model_sums(const struct model *m) {
    return m->at.sums;
}

void model_zero_grads(struct model *m) {
    ASSERT(m->mode == MODEL_TRAIN);
    device_zero(m->dev, m->at.grads, (size_t)m->params.elements * dtype_size(m->ops->real));
}

void model_begin_grads(struct model *m) {
    ASSERT(m->mode == MODEL_TRAIN);
    size_t size = dtype_size(m->ops->real);
    for (int64_t from = 0, count;; from += count) {
        from = params_unfilled(&m->params, from, &count);
        if (count == 0) break;
        device_zero(m->dev, (char *)m->at.grads + (size_t)from * size, (size_t)count * size);
    }
    for (int i = 0; i < m->params.count; i++) m->dw[i].empty = m->params.list[i].filled;
}

/* Back through the norm before layer i: dnormed is the gradient at its output; dresidual, the stream's gradient from
 * above (none above the final norm), becomes the one below, which is also that of the output of layer i-1. On its way
 * it passes the layer's scale, whose gradient needs the same two arrays. */
static void leave_layer(struct model *m, int i, int64_t R) {
    const struct layer_places *l = &m->at.layers[i];
    bool top = i == m->mc->layer_count;
    int norm = top ? m->mc->final_norm : m->mc->layers[i].norm;
    tensor dresidual = matrix(m->at.dresidual, m->ops->real, R, m);
    tensor dbranch = m->at.dbranch && i > 0 ? matrix(m->at.dbranch, m->ops->act, R, m) : tensor_none();
    m->ops->add_norm_backward(m->dev, dresidual, dbranch, m->dw[norm], scale_of(m, m->dw, i),
                              matrix(m->at.dnormed, m->ops->act, R, m), top ? tensor_none() : dresidual,
                              matrix(l->residual, m->ops->real, R, m), statistic(m, l->mean, R),
                              statistic(m, l->rstd, R), m->w[norm], scale_of(m, m->w, i),
                              m->at.norm_work);
}

static void layer_backward(struct model *m, int i) {
    arena saved;
    restore_layer(m, i);
    struct mixer_call call = call_of(m, i, m->B, m->T, &saved);
    call.keep = true;
    call.doc = batch_doc(m);
    call.dw = &m->dw[call.layer->first];
    call.dy = matrix(m->at.dbranch ? m->at.dbranch : m->at.dresidual, m->ops->act, m->B * m->T, m);
    call.dx = matrix(m->at.dnormed, m->ops->act, m->B * m->T, m);
    if (m->initial && mixer_state_bytes(call.layer, m->ops, m->B) > 0) call.initial = m->initial->layers[i];
    device_range_push(m->dev, call.layer->mixer->name);
    call.layer->mixer->backward(&call);
    device_range_pop(m->dev);
}

void model_backward(struct model *m, void (*ready)(void *self, int bucket), void *self) {
    ASSERT(m->stage == STAGE_LOSS);
    const struct param *list = m->params.list;
    int64_t R = m->B * m->T;
    device_range_push(m->dev, "backward");
    if (ready && m->mc->head != m->mc->embedding) ready(self, list[m->mc->head].bucket);
    leave_layer(m, m->mc->layer_count, R);
    embed(m, R); /* the first stream has lain where the last one does */
    if (ready) ready(self, list[m->mc->final_norm].bucket);
    for (int i = m->mc->layer_count - 1; i >= 0; i--) {
        layer_backward(m, i);
        leave_layer(m, i, R);
        device_join(m->dev); /* what the mixer's last products forked */
        if (ready && !m->mc->layers[i].is_mlp) ready(self, list[m->mc->layers[i].norm].bucket);
    }
    arena *scratch = &m->areas[AREA_SCRATCH];
    size_t mark = arena_mark(scratch);
    void *work = arena_take(scratch, m->ops->embedding_backward_scratch(R, m->mc->options.d_model, m->mc->rows));
    m->ops->embedding_backward(m->dev, m->dw[m->mc->embedding], matrix(m->at.dresidual, m->ops->real, R, m),
                               tensor_1d(m->at.tokens, DTYPE_I32, R), work);
    arena_rewind(scratch, mark);
    if (ready) ready(self, list[m->mc->embedding].bucket);
    for (int i = 0; i < m->params.count; i++) m->dw[i].empty = false;
    device_range_pop(m->dev);
    m->stage = STAGE_FORWARD;
}

/* --- logits and decoding ---------------------------------------------------------------------- */

/* Logits of rows [from, from+count) of the final norm's output into `piece`, in device memory. */
static void compute_logits(struct model *m, int64_t from, int64_t count, void *piece) {
    tensor logits = tensor_2d(piece, m->ops->real, count, m->mc->rows);
    m->ops->linear_forward(m->dev, logits, final_normed(m, from, count), m->w[m->mc->head], tensor_none());
    double cap = m->mc->options.logit_cap;
    if (cap > 0) m->ops->softcap_forward(m->dev, logits, logits, tensor_none(), cap);
}

static void read_logits(struct model *m, int64_t from, int64_t count, void *logits) {
    arena *scratch = &m->areas[AREA_SCRATCH];
    size_t mark = arena_mark(scratch), row = (size_t)m->mc->rows * dtype_size(m->ops->real);
    int64_t tile = logits_tile(m->B_max * m->T_max, m->mc->rows);
    void *piece = arena_take(scratch, (size_t)tile * row);
    for (int64_t done = 0; done < count; done += tile) {
        int64_t rows = count - done < tile ? count - done : tile;
        compute_logits(m, from + done, rows, piece);
        device_read(m->dev, (char *)logits + (size_t)done * row, piece, (size_t)rows * row);
    }
    arena_rewind(scratch, mark);
}

void model_logits(struct model *m, int64_t from, int64_t count, void *logits) {
    ASSERT(m->stage >= STAGE_FORWARD && from >= 0 && count >= 0 && count <= m->B * m->T - from);
    read_logits(m, from, count, logits);
}

/* A token through all layers, from the ids on the device to its logits, if they are computed in one piece. */
static void step_layers(void *self) {
    struct model_state *s = self;
    struct model *m = s->stepping;
    embed(m, s->B);
    for (int i = 0; i < m->mc->layer_count; i++) {
        arena saved;
        struct mixer_call call = call_of(m, i, s->B, 1, &saved);
        enter_layer(m, i, s->B);
        call.final = s->layers[i];
        call.layer->mixer->step(&call);
    }
    enter_layer(m, m->mc->layer_count, s->B);
    if (!s->one_piece) return;
    /* Always at the same place, so that a replay leaves them there, too. */
    s->logits = arena_take(&m->areas[AREA_SCRATCH], (size_t)(s->B * m->mc->rows) * dtype_size(m->ops->real));
    compute_logits(m, 0, s->B, s->logits);
}

void model_step(struct model *m, struct model_state *s, const int32_t *tokens, void *logits) {
    ASSERT(s->m == m && s->B <= m->B_max);
    arena *scratch = &m->areas[AREA_SCRATCH];
    size_t mark = arena_mark(scratch);
    check_ids(m, tokens, s->B, false);
    device_write(m->dev, m->at.tokens, tokens, (size_t)s->B * sizeof *tokens);
    m->stage = STAGE_NONE;
    s->stepping = m;
    s->one_piece = s->B <= logits_tile(m->B_max * m->T_max, m->mc->rows);
    device_run(m->dev, &s->record, step_layers, s);
    if (s->one_piece)
        device_read(m->dev, logits, s->logits, (size_t)(s->B * m->mc->rows) * dtype_size(m->ops->real));
    arena_rewind(scratch, mark);
    if (!s->one_piece) read_logits(m, 0, s->B, logits);
}
