/* optimizer.c: AdamW with its state spread over the ranks (ZeRO-1), as optimizer.h describes. Called by trainer.c;
 * its state is saved by checkpoint.c.
 *
 * A part of a bucket (model/params.h) is cut into as many slices as there are ranks. During the last backward of a step
 * each finished bucket is reduce-scattered, so that a rank's slices hold the sum of all ranks' gradients. Then each
 * rank updates its slices of the masters, for which alone it keeps m and v, and rounds them where products read rounded
 * weights. The slices are gathered again, in the type in which they are read, while the next step goes forward:
 *
 *   flat gradients             [ embedding: r0 | r1 | r2 ][ block 0, rounded: r0 | r1 | r2 ][ real: r0 | r1 | r2 ] ...
 *   masters, m and v of rank 1 [ r1 ][ r1 ][ r1 ] ...
 */
#include "train/optimizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What the host says before a step. */
struct word {
    struct step_rates rates;
    double signals;
};

/* The numbers of a step, in device memory. */
struct numbers {
    struct word word;
    struct step_totals totals;
    struct adamw_step step;
    struct step_report report;
    int64_t steps; /* taken */
};

struct slice {
    int64_t offset, count; /* elements of the flat array that this rank owns in a part of a bucket */
    int64_t moment;        /* where its m and v begin in theirs */
    int first, segments;   /* its entries in the list of segments */
};

/* Loads that the next forward needs first: gathered at the end of the step already. */
#define EARLY 2

struct optimizer {
    struct model *model;
    struct device *dev;
    struct comm *comm;
    struct optimizer_options options;
    arena memory;
    char *moments[2]; /* m and v of all slices of this rank, in device memory */
    struct numbers *now;
    struct slice *slices; /* PARTS a bucket */
    struct adamw_segment *segments;
    struct adamw_slice *updates; /* of the slices, for the call that updates them */
    char *staging; /* host memory for one slice, where device memory is not the host's */
    /* Loads: runs of buckets whose gradients, and later weights, travel in one call; the first bucket is one by itself.
     * A call keeps some multiprocessors from the kernels beside it, so few large ones disturb less than many small. */
    int load_count;
    int *loads;    /* first bucket of each, and behind the last one the number of buckets */
    int *load_of;  /* of each bucket */
    int *missing;  /* buckets of a load that are not complete yet in this step */
    bool *under_way; /* loads whose weights are being gathered */
    struct comm_piece *pieces; /* room for a load's */
    int reduced, last_reduced; /* buckets reduced since the last step, and the load that went last */
    /* Of each layer with a solver, in device memory: what every rank reports, rank by rank, and the worst of it. */
    int solvers;
    struct cell_report *reports, *worst;
};

/* ---- which elements are treated how ----------------------------------------------------------------------------- */

static struct adamw_segment segment_of(const struct treatment *t, int mode) {
    return (struct adamw_segment){
        .decay = (float)(mode == DECAY_DETACHED ? t->weight_decay : t->weight_decay * t->lr_scale),
        .lr_scale = (float)t->lr_scale,
        .clamp_min = (float)t->clamp_min,
        .clamp_max = (float)t->clamp_max,
        .clamped = t->clamp_min > -INFINITY || t->clamp_max < INFINITY,
    };
}

static bool same_kind(const struct adamw_segment *a, const struct adamw_segment *b) {
    return a->decay == b->decay && a->lr_scale == b->lr_scale && a->clamp_min == b->clamp_min &&
           a->clamp_max == b->clamp_max;
}

int optimizer_segments(const struct params *p, int first, int params, int64_t offset, int64_t count,
                       const struct treatment *treatments, int mode, struct adamw_segment *segments) {
    struct adamw_segment last = {0};
    int found = 0;
    for (int i = first; i < first + params; i++) {
        const struct param *param = &p->list[i];
        int64_t from = param->offset > offset ? param->offset : offset;
        int64_t to = param->offset + param->count < offset + count ? param->offset + param->count : offset + count;
        if (from >= to) continue;
        struct adamw_segment s = segment_of(&treatments[i], mode);
        s.offset = from - offset;
        s.count = to - from;
        if (found > 0 && last.offset + last.count == s.offset && same_kind(&last, &s)) {
            last.count += s.count; /* neighbours of the same kind are one run */
        } else {
            last = s;
            found++;
        }
        if (segments) segments[found - 1] = last;
    }
    return found;
}

/* The slices and their segments; returns the number of elements in all slices. */
static int64_t make_slices(struct optimizer *o, const struct params *p, const struct treatment *treatments) {
    int64_t moment = 0;
    int total = 0;
    for (int i = 0; i < PARTS * p->bucket_count; i++) {
        struct slice *s = &o->slices[i];
        int b = i / PARTS;
        params_slice(p, b, i % PARTS, o->comm->rank, &s->offset, &s->count);
        s->moment = moment;
        moment += s->count;
        s->first = total;
        s->segments = optimizer_segments(p, p->buckets[b].first, p->buckets[b].params, s->offset, s->count, treatments,
                                         o->options.decay_mode, o->segments + total);
        total += s->segments;
    }
    return moment;
}

static int64_t largest_slice(const struct optimizer *o, int buckets) {
    int64_t largest = 0;
    for (int i = 0; i < PARTS * buckets; i++) largest = o->slices[i].count > largest ? o->slices[i].count : largest;
    return largest;
}

/* Runs of at least comm's least_bytes of gradients. The first bucket is the embedding: needed first, complete last. */
static int make_loads(struct optimizer *o, const struct params *p) {
    size_t buckets = (size_t)p->bucket_count;
    o->loads = calloc(buckets + 1, sizeof *o->loads);
    o->load_of = calloc(buckets, sizeof *o->load_of);
    o->missing = calloc(buckets, sizeof *o->missing);
    o->under_way = calloc(buckets, sizeof *o->under_way);
    o->pieces = calloc(PARTS * buckets, sizeof *o->pieces);
    if (!o->loads || !o->load_of || !o->missing || !o->under_way || !o->pieces) return -1;
    int64_t size = (int64_t)dtype_size(o->dev->ops->real), bytes = 0;
    for (int b = 0; b < p->bucket_count; b++) {
        bool full = b <= 1 || bytes >= o->comm->least_bytes;
        if (full) {
            o->loads[o->load_count++] = b;
            bytes = 0;
        }
        bytes += p->buckets[b].count * size;
        o->load_of[b] = o->load_count - 1;
        o->missing[o->load_count - 1]++;
    }
    o->loads[o->load_count] = p->bucket_count;
    return 0;
}

/* ---- opening ---------------------------------------------------------------------------------------------------- */

static void carve(struct optimizer *o, arena *a, int64_t elements) {
    size_t bytes = (size_t)elements * dtype_size(o->dev->ops->real);
    o->moments[0] = arena_take(a, bytes);
    o->moments[1] = arena_take(a, bytes);
    o->now = arena_take(a, sizeof *o->now);
    if (o->solvers == 0) return;
    o->reports = arena_take(a, (size_t)(o->solvers * o->comm->ranks) * sizeof *o->reports);
    o->worst = arena_take(a, (size_t)o->solvers * sizeof *o->worst);
}

int optimizer_slots(const struct model_config *mc) {
    return mc->params.bucket_count + 1; /* a load has at least a bucket; the last slot is that of the reports */
}

int optimizer_open(struct optimizer **out, struct model *m, struct comm *comm, const struct optimizer_options *options,
                   error *err) {
    const struct params *p = model_params(m);
    ASSERT(p->ranks == comm->ranks);
    *out = NULL;
    struct optimizer *o = calloc(1, sizeof *o);
    if (!o) return error_system(err, "no memory for the optimizer");
    *o = (struct optimizer){.model = m, .dev = model_device(m), .comm = comm, .options = *options};
    o->solvers = model_get_config(m)->solver_count;
    o->slices = calloc(PARTS * (size_t)p->bucket_count, sizeof *o->slices);
    o->segments = calloc((size_t)p->count, sizeof *o->segments); /* at most one a tensor */
    o->updates = calloc(PARTS * (size_t)p->bucket_count, sizeof *o->updates);
    struct treatment *treatments = calloc((size_t)p->count, sizeof *treatments);
    if (!o->slices || !o->segments || !o->updates || make_loads(o, p) != 0 || !treatments) {
        free(treatments);
        error_system(err, "no memory for the optimizer");
        goto fail;
    }
    int refused = groups_treat(treatments, p, options, err);
    int64_t elements = refused ? 0 : make_slices(o, p, treatments);
    free(treatments);
    if (refused) goto fail;
    arena counted = arena_measure("optimizer");
    carve(o, &counted, elements);
    if (arena_open(&o->memory, "optimizer", counted.peak, o->dev->memory, err) != 0) goto fail;
    carve(o, &o->memory, elements);
    if (o->dev->kind != DEVICE_CPU) {
        o->staging = malloc((size_t)largest_slice(o, p->bucket_count) * dtype_size(o->dev->ops->real));
        if (!o->staging) {
            error_system(err, "no memory for the optimizer's staging buffer");
            goto fail;
        }
    }
    *out = o;
    return 0;
fail:
    optimizer_close(o);
    return -1;
}

void optimizer_close(struct optimizer *o) {
    if (!o) return;
    if (o->memory.base) arena_close(&o->memory);
    free(o->slices);
    free(o->loads);
    free(o->load_of);
    free(o->missing);
    free(o->under_way);
    free(o->pieces);
    free(o->segments);
    free(o->updates);
    free(o->staging);
    free(o);
}

/* ---- weights on their way ---------------------------------------------------------------------------------------- */

/* Pieces of every bucket of a load: what travels in one call. */
static int list_pieces(struct optimizer *o, int load, bool weights) {
    const struct params *p = model_params(o->model);
    tensor grads = model_flat_grads(o->model);
    int count = 0;
    for (int i = PARTS * o->loads[load]; i < PARTS * o->loads[load + 1]; i++) {
        const struct part *part = &p->buckets[i / PARTS].part[i % PARTS];
        if (part->count == 0) continue;
        tensor whole = model_part(o->model, i / PARTS, i % PARTS);
        char *gradient = (char *)grads.data + part->offset * (int64_t)dtype_size(grads.dtype);
        o->pieces[count++] = weights ? (struct comm_piece){whole.data, part->count / o->comm->ranks, whole.dtype}
                                     : (struct comm_piece){gradient, part->count / o->comm->ranks, grads.dtype};
    }
    return count;
}

/* A load has a slot of its own among the calls of comm.h: its gradients and its weights never travel at once. */
static void gather_weights(struct optimizer *o, int load) {
    comm_all_gather(o->comm, load, o->pieces, list_pieces(o, load, true));
    o->under_way[load] = true;
}

static void await_load(struct optimizer *o, int load) {
    if (o->under_way[load]) comm_wait(o->comm, load);
    o->under_way[load] = false;
}

void optimizer_await(struct optimizer *o, int bucket) {
    await_load(o, o->load_of[bucket]);
}

void optimizer_spread(struct optimizer *o) {
    for (int l = EARLY; l < o->load_count; l++) gather_weights(o, l);
}

void optimizer_settle(struct optimizer *o) {
    optimizer_spread(o);
    for (int l = EARLY; l < o->load_count; l++) await_load(o, l);
}

/* ---- a step ----------------------------------------------------------------------------------------------------- */

void optimizer_reduce(struct optimizer *o, int bucket) {
    int load = o->load_of[bucket];
    o->reduced++;
    if (--o->missing[load] > 0) return;
    o->missing[load] = o->loads[load + 1] - o->loads[load];
    comm_reduce_scatter(o->comm, load, o->pieces, list_pieces(o, load, false));
    o->last_reduced = load;
}

void optimizer_share_reports(struct optimizer *o) {
    if (o->solvers == 0) return;
    struct cell_report *mine = o->reports + o->solvers * o->comm->rank;
    struct comm_piece all = {o->reports, o->solvers * (int64_t)(sizeof *mine / sizeof(float)), DTYPE_F32};
    device_copy(o->dev, mine, model_reports(o->model), (size_t)o->solvers * sizeof *mine);
    comm_all_gather(o->comm, o->load_count, &all, 1);
}

/* The largest residual of each layer and of all: nothing that is added up, so every rank looks for it. */
static void find_worst(struct optimizer *o) {
    struct step_totals *totals = &o->now->totals;
    if (o->solvers == 0) {
        device_zero(o->dev, &totals->residual, sizeof totals->residual);
        return;
    }
    comm_wait(o->comm, o->load_count);
    o->dev->ops->worst_reports(o->dev, o->worst, &totals->residual, o->reports, o->comm->ranks, o->solvers);
}

/* `count` elements of a flat array from element `at` on. */
static tensor run_of(void *flat, enum dtype dtype, int64_t at, int64_t count) {
    return tensor_1d((char *)flat + at * (int64_t)dtype_size(dtype), dtype, count);
}

/* Squares of this rank's slices, the model's sums and the host's vote, then all of it over the ranks. */
static void sum_totals(struct optimizer *o) {
    const struct params *p = model_params(o->model);
    tensor grads = model_flat_grads(o->model);
    struct step_totals *totals = &o->now->totals;
    device_copy(o->dev, &totals->loss, model_sums(o->model), sizeof totals->loss);
    device_copy(o->dev, &totals->signals, &o->now->word.signals, sizeof totals->signals);
    device_zero(o->dev, &totals->squares, sizeof totals->squares);
    /* Neighbouring slices (with one rank, all of them) are one run. */
    for (int i = 0, next; i < PARTS * p->bucket_count; i = next) {
        int64_t offset = o->slices[i].offset, count = o->slices[i].count;
        for (next = i + 1; next < PARTS * p->bucket_count && o->slices[next].offset == offset + count; next++)
            count += o->slices[next].count;
        o->dev->ops->sum_squares(o->dev, &totals->squares, run_of(grads.data, grads.dtype, offset, count));
    }
    _Static_assert(offsetof(struct step_totals, residual) == 6 * sizeof(double),
                   "the ranks add up what lies before it");
    comm_sum_device(o->comm, &totals->loss.nll, 6);
    find_worst(o);
}

/* The slices of buckets [first, end): of the parameters, with what belongs to them. */
static void update_slices(struct optimizer *o, int first, int end) {
    tensor grads = model_flat_grads(o->model);
    int count = 0;
    for (int i = PARTS * first; i < PARTS * end; i++) {
        const struct slice *s = &o->slices[i];
        if (s->count == 0) continue;
        o->updates[count++] = (struct adamw_slice){
            .p = model_masters(o->model, i / PARTS, i % PARTS),
            .m = run_of(o->moments[0], grads.dtype, s->moment, s->count),
            .v = run_of(o->moments[1], grads.dtype, s->moment, s->count),
            .g = run_of(grads.data, grads.dtype, s->offset, s->count),
            .rounded = model_rounded(o->model, i / PARTS, i % PARTS),
            .segments = o->segments + s->first,
            .count = s->segments,
        };
    }
    o->dev->ops->adamw(o->dev, o->updates, count, &o->now->step);
}

/* The first loads travel while the others are updated. */
static void update_and_gather(struct optimizer *o) {
    int early = o->load_count < EARLY ? o->load_count : EARLY;
    for (int l = 0; l < early; l++) {
        update_slices(o, o->loads[l], o->loads[l + 1]);
        gather_weights(o, l);
    }
    update_slices(o, o->loads[early], model_params(o->model)->bucket_count);
    for (int l = 0; l < early; l++) await_load(o, l);
}

void optimizer_begin(struct optimizer *o, double lr, bool signalled) {
    struct word word = {
        .rates = {.lr = lr, .decay_rate = o->options.decay_mode == DECAY_DETACHED ? lr / o->options.lr : lr},
        .signals = signalled,
    };
    device_write(o->dev, &o->now->word, &word, sizeof word);
}

void optimizer_step(struct optimizer *o, double scale, double residual_max) {
    ASSERT(o->reduced == model_params(o->model)->bucket_count);
    o->reduced = 0;
    struct step_rule rule = {.scale = scale,
                             .clip = o->options.clip,
                             .beta1 = o->options.beta1,
                             .beta2 = o->options.beta2,
                             .eps = o->options.eps,
                             .residual_max = residual_max};
    struct numbers *now = o->now;
    comm_wait(o->comm, o->last_reduced); /* they went one after the other */
    device_range_push(o->dev, "optimizer");
    sum_totals(o);
    o->dev->ops->step_scalars(o->dev, &now->step, &now->report, &now->steps, &now->totals, &now->word.rates, &rule);
    update_and_gather(o);
    device_range_pop(o->dev);
}

void optimizer_fetch(struct optimizer *o, struct step_report *report, struct cell_report *worst) {
    device_fetch(o->dev, report, &o->now->report, sizeof *report);
    if (worst && o->solvers > 0) device_fetch(o->dev, worst, o->worst, (size_t)o->solvers * sizeof *worst);
}

int64_t optimizer_steps(const struct optimizer *o) {
    int64_t steps;
    device_read(o->dev, &steps, &o->now->steps, sizeof steps);
    return steps;
}

void optimizer_set_steps(struct optimizer *o, int64_t steps) {
    device_write(o->dev, &o->now->steps, &steps, sizeof steps);
}

/* ---- the state, for checkpoints --------------------------------------------------------------------------------- */

/* This rank's slice of m (0), v (1) or the masters. */
static char *state_at(const struct optimizer *o, int slice, int which) {
    if (which == OPTIMIZER_WEIGHTS) return model_masters(o->model, slice / PARTS, slice % PARTS).data;
    return o->moments[which] + o->slices[slice].moment * (int64_t)dtype_size(o->dev->ops->real);
}

void optimizer_gather(struct optimizer *o, int bucket, int which, void *host_all) {
    enum dtype real = o->dev->ops->real;
    char *to = host_all;
    for (int i = PARTS * bucket; i < PARTS * (bucket + 1); i++) {
        const struct slice *s = &o->slices[i];
        if (s->count == 0) continue;
        size_t bytes = (size_t)s->count * dtype_size(real);
        char *mine = state_at(o, i, which);
        if (o->staging) {
            device_read(o->dev, o->staging, mine, bytes);
            mine = o->staging;
        }
        comm_gather(o->comm, to, mine, s->count, real);
        if (to) to += bytes * (size_t)o->comm->ranks;
    }
}

void optimizer_scatter(struct optimizer *o, int bucket, int which, const void *host_all) {
    enum dtype real = o->dev->ops->real;
    const char *from = host_all;
    for (int i = PARTS * bucket; i < PARTS * (bucket + 1); i++) {
        const struct slice *s = &o->slices[i];
        if (s->count == 0) continue;
        size_t bytes = (size_t)s->count * dtype_size(real);
        char *mine = state_at(o, i, which);
        comm_scatter(o->comm, o->staging ? o->staging : mine, from, s->count, real);
        if (o->staging) device_write(o->dev, mine, o->staging, bytes);
        if (from) from += bytes * (size_t)o->comm->ranks;
    }
}
