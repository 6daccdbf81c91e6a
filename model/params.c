/* params.c: the tensor table described in params.h: appending, layout for a number of ranks, initial values. Owns its
 * lists of tensors and buckets, not the arrays of values. Called by model/ (declare, layout), train/ and the tests
 * (reading). */
#include "model/params.h"

#include "common/rng.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* `list` with room for `count` elements. Without the memory it stays as it is, and the table is marked. */
static void *grow(struct params *p, void *list, int count, size_t size) {
    void *grown = p->exhausted ? NULL : realloc(list, (size_t)count * size);
    if (!grown) p->exhausted = true;
    return grown;
}

void params_open(struct params *p) {
    *p = (struct params){.ranks = 0};
    params_next_bucket(p);
}

void params_close(struct params *p) {
    free(p->list);
    free(p->buckets);
    *p = (struct params){.ranks = 0};
}

int params_check(const struct params *p, error *err) {
    return p->exhausted ? error_system(err, "no memory for the table of the model's tensors") : 0;
}

int params_copy(struct params *to, const struct params *from, error *err) {
    *to = *from;
    to->capacity = from->count > 0 ? from->count : 1;
    to->list = grow(to, NULL, to->capacity, sizeof *to->list);
    to->buckets = grow(to, NULL, from->bucket_count, sizeof *to->buckets);
    if (!to->exhausted) {
        if (from->count) memcpy(to->list, from->list, (size_t)from->count * sizeof *to->list);
        memcpy(to->buckets, from->buckets, (size_t)from->bucket_count * sizeof *to->buckets);
    }
    if (params_check(to, err) == 0) return 0;
    params_close(to);
    return -1;
}

int params_add(struct params *p, int ndim, const int64_t *dim, struct init init, bool decay, bool keep_real,
               const char *name_format, ...) {
    ASSERT(ndim >= 1 && ndim <= PARAM_DIMS && p->elements == 0);
    if (p->count == p->capacity) {
        int larger = p->capacity ? 2 * p->capacity : 32;
        struct param *grown = grow(p, p->list, larger, sizeof *p->list);
        if (!grown) return 0;
        p->list = grown;
        p->capacity = larger;
    }
    if (p->bucket_count == 0) return 0; /* there was no memory for the first */
    struct param *t = &p->list[p->count];
    *t = (struct param){.ndim = ndim, .init = init, .decay = decay, .keep_real = keep_real, .offset = -1};
    va_list arguments;
    va_start(arguments, name_format);
    int length = vsnprintf(t->name, sizeof t->name, name_format, arguments);
    va_end(arguments);
    ASSERT(length > 0 && (size_t)length < sizeof t->name);
    t->count = 1;
    for (int i = 0; i < ndim; i++) {
        ASSERT(dim[i] >= 1);
        t->dim[i] = dim[i];
        t->count *= dim[i];
    }
    t->bucket = p->bucket_count - 1;
    p->buckets[t->bucket].params++;
    p->total += t->count;
    return p->count++;
}

void params_filled(struct params *p, int count) {
    for (int i = p->count - 1; i >= 0 && i >= p->count - count; i--) p->list[i].filled = true;
}

void params_clamp(struct params *p, double limit) {
    if (p->count > 0) p->list[p->count - 1].clamp = limit;
}

void params_next_bucket(struct params *p) {
    if (p->bucket_count > 0 && p->buckets[p->bucket_count - 1].params == 0)
        return; /* an empty one is started already */
    struct bucket *grown = grow(p, p->buckets, p->bucket_count + 1, sizeof *p->buckets);
    if (!grown) return;
    p->buckets = grown;
    p->buckets[p->bucket_count++] = (struct bucket){.first = p->count};
}

static int64_t round_up(int64_t value, int64_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* The tensors of one kind in a bucket, one behind the other from element `from` of the flat array on. */
static struct part lay_part(struct params *p, const struct bucket *bucket, int kind, int64_t from, bool rounds) {
    int64_t end = from;
    for (int i = bucket->first; i < bucket->first + bucket->params; i++) {
        struct param *t = &p->list[i];
        if ((rounds && !t->keep_real ? PART_ROUNDED : PART_REAL) != kind) continue;
        t->part = kind;
        t->offset = end;
        end += round_up(t->count, PARAM_ALIGN);
    }
    struct part part = {.offset = from,
                        .count = round_up(end - from, (int64_t)PARAM_ALIGN * p->ranks),
                        .place = p->part_elements[kind]};
    p->part_elements[kind] += part.count;
    return part;
}

void params_layout(struct params *p, int ranks, bool rounds) {
    ASSERT(ranks >= 1 && p->count > 0 && p->elements == 0 && p->buckets[p->bucket_count - 1].params > 0);
    p->ranks = ranks;
    int64_t end = 0;
    for (int b = 0; b < p->bucket_count; b++) {
        struct bucket *bucket = &p->buckets[b];
        bucket->offset = end;
        for (int kind = 0; kind < PARTS; kind++) {
            bucket->part[kind] = lay_part(p, bucket, kind, end, rounds);
            end += bucket->part[kind].count;
        }
        bucket->count = end - bucket->offset;
    }
    p->elements = end;
}

int64_t params_unfilled(const struct params *p, int64_t from, int64_t *count) {
    for (;;) {
        int64_t end = p->elements, behind = end; /* of the run, and of the filled tensor there */
        for (int i = 0; i < p->count; i++) {
            const struct param *t = &p->list[i];
            if (!t->filled || t->offset < from || t->offset >= end) continue;
            end = t->offset;
            behind = end + t->count;
        }
        *count = end - from;
        if (end > from || end == p->elements) return from;
        from = behind;
    }
}

int params_find(const struct params *p, const char *name) {
    for (int i = 0; i < p->count; i++)
        if (strcmp(p->list[i].name, name) == 0) return i;
    return -1;
}

tensor params_view(const struct params *p, int index, void *flat, enum dtype dtype) {
    ASSERT(index >= 0 && index < p->count && p->list[index].offset >= 0);
    const struct param *t = &p->list[index];
    char *data = flat ? (char *)flat + (size_t)t->offset * dtype_size(dtype) : NULL;
    return tensor_reshape(tensor_1d(data, dtype, t->count), t->ndim, t->dim);
}

void params_slice(const struct params *p, int bucket, int part, int rank, int64_t *offset, int64_t *count) {
    ASSERT(bucket >= 0 && bucket < p->bucket_count && part >= 0 && part < PARTS && rank >= 0 && rank < p->ranks);
    const struct part *whole = &p->buckets[bucket].part[part];
    *count = whole->count / p->ranks;
    *offset = whole->offset + rank * *count;
}

/* --- initial values --------------------------------------------------------------------------- */

/* Evenly from a to b: number i of `count`. */
static double between(double a, double b, uint64_t i, uint64_t count) {
    return count > 1 ? a + (b - a) * (double)i / (double)(count - 1) : a;
}

/* The bias b for which softplus(b) = dt: b = ln(e^dt - 1) = dt + ln(1 - e^-dt). */
static double inverse_softplus(double dt) {
    return dt + log(-expm1(-dt));
}

/* The draws of an element lie 2^48 apart, which is more than the elements of any tensor. One in 370 is drawn again at
 * three deviations; the last draw of a hopeless interval is cut off. */
static double truncated_normal(double deviation, double bound, rng_key key, uint64_t element) {
    double value = 0;
    for (uint64_t attempt = 0; attempt < 256; attempt++) {
        value = deviation * rng_normal(key, element + (attempt << 48));
        if (fabs(value) <= bound) return value;
    }
    return fmin(fmax(value, -bound), bound);
}

static double initial_value(struct init init, rng_key key, uint64_t element) {
    switch (init.kind) {
    case INIT_CONSTANT: return init.a;
    case INIT_NORMAL: return init.a * rng_normal(key, element);
    case INIT_TRUNCATED: return truncated_normal(init.a, init.b, key, element);
    case INIT_UNIFORM: return init.a + (init.b - init.a) * rng_uniform(key, element);
    case INIT_LOG_UNIFORM: return log(init.a + (init.b - init.a) * rng_uniform(key, element));
    case INIT_LOG_COUNT: return log((double)(element % (uint64_t)init.a + 1));
    case INIT_DT_BIAS:
        return inverse_softplus(
            fmax(exp(log(init.a) + (log(init.b) - log(init.a)) * rng_uniform(key, element)), init.c));
    case INIT_LINSPACE: return between(init.a, init.b, element % (uint64_t)init.c, (uint64_t)init.c);
    case INIT_FIRST_ROW: return element < (uint64_t)init.c ? between(init.a, init.b, element, (uint64_t)init.c) : 0;
    case INIT_SLSTM_BIAS:
        if (element / (uint64_t)init.b != 1) return 0;
        return 5 - 12 * pow(between(0, 1, element % (uint64_t)init.c, (uint64_t)init.c), init.a);
    }
    ASSERT(!"an init_kind");
    return 0;
}

void params_initial_part(const struct params *p, int index, uint64_t seed, int64_t from, int64_t count, void *values,
                         enum dtype dtype) {
    ASSERT(index >= 0 && index < p->count && from >= 0 && count >= 0 && from <= p->list[index].count - count);
    ASSERT(dtype == DTYPE_F32 || dtype == DTYPE_F64);
    struct init init = p->list[index].init;
    double clamp = p->list[index].clamp;
    rng_key key = {.seed = seed, .purpose = RNG_INIT, .stream = (uint32_t)index};
    /* Each value is a function of its number alone, so threads don't change it. */
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        double value = initial_value(init, key, (uint64_t)(from + i));
        if (clamp > 0) value = fmin(fmax(value, -clamp), clamp);
        if (dtype == DTYPE_F32)
            ((float *)values)[i] = (float)value;
        else
            ((double *)values)[i] = value;
    }
}

void params_initial(const struct params *p, int index, uint64_t seed, void *values, enum dtype dtype) {
    params_initial_part(p, index, seed, 0, p->list[index].count, values, dtype);
}
