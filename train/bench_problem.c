/* bench_problem.c: the operands of a measured operation: their memory, and random values made on the device.
 * bench_ops.h describes it. Owns a problem's memory between open and close. */
#include "train/bench_ops.h"

#include "common/rng.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- operands --------------------------------------------------------------------------------------------------- */

static struct bench_operand *add_operand(struct bench_problem *p, struct bench_operand o) {
    ASSERT(p->count < BENCH_OPERANDS);
    o.spread = 1;
    p->operands[p->count] = o;
    return &p->operands[p->count++];
}

/* clang-format off */
struct bench_operand *bench_input(struct bench_problem *p, const char *name, const char *letters) {
    return add_operand(p, (struct bench_operand){.name = name, .letters = letters, .kind = BENCH_INPUT,
                                                 .has_gradient = BENCH_GRADIENT});
}

struct bench_operand *bench_parameter(struct bench_problem *p, const char *name, const char *letters) {
    return add_operand(p, (struct bench_operand){.name = name, .letters = letters, .kind = BENCH_INPUT,
                                                 .type = BENCH_REAL, .gradient_type = BENCH_REAL,
                                                 .has_gradient = BENCH_ADDED});
}

struct bench_operand *bench_output(struct bench_problem *p, const char *name, const char *letters) {
    return add_operand(p, (struct bench_operand){.name = name, .letters = letters, .kind = BENCH_OUTPUT,
                                                 .has_gradient = BENCH_GRADIENT});
}

struct bench_operand *bench_statistic(struct bench_problem *p, const char *name, const char *letters) {
    return add_operand(p, (struct bench_operand){.name = name, .letters = letters, .kind = BENCH_OUTPUT,
                                                 .type = BENCH_REAL});
}

struct bench_operand *bench_state(struct bench_problem *p, const char *name, const char *letters) {
    return add_operand(p, (struct bench_operand){.name = name, .letters = letters, .kind = BENCH_STATE,
                                                 .type = BENCH_REAL});
}

struct bench_operand *bench_indices(struct bench_problem *p, const char *name, const char *letters,
                                    enum bench_fill fill) {
    return add_operand(p, (struct bench_operand){.name = name, .letters = letters, .kind = BENCH_INPUT,
                                                 .type = BENCH_INDEX, .fill = fill});
}
/* clang-format on */

static struct bench_operand *find(struct bench_problem *p, const char *name) {
    for (int i = 0; i < p->count; i++)
        if (strcmp(p->operands[i].name, name) == 0) return &p->operands[i];
    return NULL;
}

tensor bench_value(struct bench_problem *p, const char *name) {
    struct bench_operand *o = find(p, name);
    return o ? o->value : tensor_none();
}

tensor bench_gradient(struct bench_problem *p, const char *name) {
    struct bench_operand *o = find(p, name);
    return o ? o->gradient : tensor_none();
}

int bench_sizes(struct bench_problem *p, const char *shape, error *err) {
    const char *at = shape;
    while (*(at += strspn(at, " "))) {
        char letter;
        long long size;
        int used = 0;
        if (sscanf(at, "%c=%lld%n", &letter, &size, &used) != 2 || (signed char)letter < 0 || size < 0 ||
            (at[used] && at[used] != ' '))
            return error_input(err, "'%.100s' is no shape: write sizes behind letters, such as \"B=8 T=2048\"", shape);
        p->size[(int)letter] = size;
        at += used;
    }
    return 0;
}

/* ---- memory ----------------------------------------------------------------------------------------------------- */

static enum dtype type_of(const struct ops *ops, enum bench_type type) {
    switch (type) {
    case BENCH_ACT: return ops->act;
    case BENCH_REAL: return ops->real;
    case BENCH_F64: return DTYPE_F64;
    case BENCH_INDEX: break;
    }
    return DTYPE_I32;
}

/* A view of the operand's dimensions, without data. */
static tensor shape_of(const struct bench_problem *p, const struct bench_operand *o, enum bench_type type) {
    tensor t = {.dtype = type_of(p->ops, type), .ndim = (int)strlen(o->letters)};
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        t.dim[i] = bench_size(p, o->letters[i]);
        if (o->pitch && i == o->lead - 1) stride = o->pitch;
        t.stride[i] = stride;
        stride *= t.dim[i];
    }
    return t;
}

int64_t bench_span(tensor t) {
    int64_t last = 0;
    for (int i = 0; i < t.ndim; i++) {
        if (t.dim[i] == 0) return 0;
        last += (t.dim[i] - 1) * t.stride[i];
    }
    return last + 1;
}

/* Neighbours lie side by side, as the tensors of a model do, whose products take several matrices for one where they
 * can. */
static void carve(struct bench_problem *p, arena *a) {
    for (int i = 0; i < p->count; i++) {
        struct bench_operand *o = &p->operands[i];
        tensor value = shape_of(p, o, o->type);
        value.data = arena_take(a, (size_t)bench_span(value) * dtype_size(value.dtype));
        o->value = value;
    }
    for (int i = 0; i < p->count; i++) {
        struct bench_operand *o = &p->operands[i];
        if (o->has_gradient == BENCH_NO_GRADIENT) continue;
        tensor gradient = shape_of(p, o, o->gradient_type);
        gradient.data = arena_take(a, (size_t)bench_span(gradient) * dtype_size(gradient.dtype));
        o->gradient = gradient;
    }
    p->saved = p->saved_bytes ? arena_take(a, p->saved_bytes) : NULL;
    p->scratch = p->scratch_bytes ? arena_take(a, p->scratch_bytes) : NULL;
    p->constant = p->host_bytes ? arena_take(a, p->host_bytes) : NULL;
}

/* ---- values ----------------------------------------------------------------------------------------------------- */

/* Random numbers are drawn once, on the host; each operand gets them from a place of its own on, and over and over
 * behind that. PERIOD has no divisor that a row has but 8, which keeps copies aligned. */
enum { PERIOD = 262136 };

void bench_put_number(void *out, enum dtype dtype, int64_t at, double value) {
    union {
        float f;
        uint32_t bits;
    } u = {(float)value};
    switch (dtype) {
    case DTYPE_F64: ((double *)out)[at] = value; return;
    case DTYPE_BF16: ((uint16_t *)out)[at] = (uint16_t)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16); return;
    case DTYPE_I32: ((int32_t *)out)[at] = (int32_t)value; return;
    default: ((float *)out)[at] = u.f; return;
    }
}

double bench_get_number(const void *in, enum dtype dtype, int64_t at) {
    union {
        uint32_t bits;
        float f;
    } u;
    switch (dtype) {
    case DTYPE_F64: return ((const double *)in)[at];
    case DTYPE_BF16: u.bits = (uint32_t)((const uint16_t *)in)[at] << 16; return u.f;
    case DTYPE_I32: return ((const int32_t *)in)[at];
    default: return ((const float *)in)[at];
    }
}

/* Write `count` elements, which repeat after PERIOD: the first ones from the host, the others as copies of them. */
static void repeat(struct device *dev, void *to, const void *period, int64_t count, size_t element) {
    int64_t done = count < PERIOD ? count : PERIOD;
    device_write(dev, to, period, (size_t)done * element);
    while (done < count) {
        int64_t more = count - done < done ? count - done : done;
        device_copy(dev, (char *)to + (size_t)done * element, to, (size_t)more * element);
        done += more;
    }
}

/* The numbers behind a value (which = 0) or a gradient (1) of operand i. */
static void fill_reals(struct bench_problem *p, const double *normals, int i, int which, void *room) {
    struct bench_operand *o = &p->operands[i];
    tensor t = which ? o->gradient : o->value;
    int64_t from = (int64_t)(2 * i + which) * 10007 % PERIOD, count = bench_span(t);
    for (int64_t k = 0; k < PERIOD && k < count; k++) {
        double n = normals[(from + k) % PERIOD];
        if (!which) n = o->mean + o->spread * (o->fill == BENCH_SQUARE ? n * n : n);
        bench_put_number(room, t.dtype, k, n);
    }
    repeat(p->dev, t.data, room, count, dtype_size(t.dtype));
}

static void fill_given(struct bench_problem *p, const struct bench_operand *o, double *values, void *room) {
    int64_t count = bench_span(o->value), part;
    for (int64_t from = 0; from < count; from += part) {
        part = count - from < PERIOD ? count - from : PERIOD;
        p->row->given(p, o, from, part, values);
        for (int64_t k = 0; k < part; k++) bench_put_number(room, o->value.dtype, k, values[k]);
        size_t size = dtype_size(o->value.dtype);
        device_write(p->dev, (char *)o->value.data + (size_t)from * size, room, (size_t)part * size);
    }
}

/* Tokens below V; documents of 1 to 1,200 tokens, the first of which starts with the row. */
static void fill_indices(struct bench_problem *p, struct bench_operand *o, int32_t *out) {
    int64_t count = bench_span(o->value), T = o->value.dim[o->value.ndim - 1];
    rng_key key = {5, RNG_TEST, (uint32_t)o->fill};
    int64_t next = 0;
    for (int64_t k = 0; k < count; k++) {
        if (o->fill == BENCH_TOKENS) {
            out[k] = (int32_t)rng_below(key, (uint64_t)k, (uint64_t)bench_size(p, 'V'));
            continue;
        }
        bool starts = k % T == 0 || k == next;
        if (starts) next = k + 1 + (int64_t)rng_below(key, (uint64_t)k, 1200);
        out[k] = (k % T == 0 ? 0 : out[k - 1]) + starts;
    }
}

static int fill_operands(struct bench_problem *p, error *err) {
    double *normals = malloc(PERIOD * sizeof *normals), *values = malloc(PERIOD * sizeof *values);
    char *room = malloc(PERIOD * sizeof(double));
    int status = normals && values && room ? 0 : error_system(err, "no memory for random numbers");
    rng_key key = {5, RNG_TEST, 0};
    for (int64_t k = 0; status == 0 && k < PERIOD; k++) normals[k] = rng_normal(key, (uint64_t)k);
    for (int i = 0; status == 0 && i < p->count; i++) {
        struct bench_operand *o = &p->operands[i];
        if (o->type == BENCH_INDEX) {
            int64_t bytes = bench_span(o->value) * (int64_t)sizeof(int32_t);
            int32_t *index = malloc((size_t)bytes);
            if (!index) {
                status = error_system(err, "no memory for tokens");
                break;
            }
            fill_indices(p, o, index);
            device_write(p->dev, o->value.data, index, (size_t)bytes);
            free(index);
        } else if (o->fill == BENCH_GIVEN) {
            if (!p->filled && !p->reference) fill_given(p, o, values, room);
        } else if (o->kind != BENCH_OUTPUT) {
            fill_reals(p, normals, i, 0, room);
        } else if (o->has_gradient) {
            fill_reals(p, normals, i, 1, room);
        }
    }
    p->filled = true;
    free(normals);
    free(values);
    free(room);
    return status;
}

static void fill_constant(struct bench_problem *p) {
    double content[16]; /* 128 bytes, aligned for any struct of numbers */
    ASSERT(p->host_bytes <= sizeof content);
    if (p->reports) device_zero(p->dev, p->constant, p->host_bytes);
    if (p->reports || !p->host_bytes) return;
    p->row->constant(p, content);
    device_write(p->dev, p->constant, content, p->host_bytes);
}

int bench_problem_fill(struct bench_problem *p, error *err) {
    fill_constant(p);
    return fill_operands(p, err);
}

int bench_problem_size(struct bench_problem *p, size_t *bytes, error *err) {
    p->ops = p->dev->ops;
    p->count = 0;
    p->row->declare(p);
    if (p->reports) p->host_bytes = sizeof(struct cell_report);
    for (int i = 0; i < p->count; i++)
        for (const char *letter = p->operands[i].letters; *letter; letter++)
            if (bench_size(p, *letter) < 1)
                return error_input(err, "the shape of %s needs a size for %c, at least 1", p->row->name, *letter);
    arena counted = arena_measure("operands");
    carve(p, &counted);
    *bytes = counted.peak;
    return 0;
}

int bench_problem_open(struct bench_problem *p, error *err) {
    size_t bytes;
    TRY(bench_problem_size(p, &bytes, err));
    TRY(arena_open(&p->memory, "operands", bytes, p->dev->memory, err));
    carve(p, &p->memory);
    return bench_problem_fill(p, err);
}

void bench_problem_close(struct bench_problem *p) {
    arena_close(&p->memory);
}

void bench_problem_bytes(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    double ahead = 0, back = 0;
    for (int i = 0; i < p->count; i++) {
        const struct bench_operand *o = &p->operands[i];
        double value = (double)tensor_count(o->value) * (double)dtype_size(o->value.dtype), gradient = 0;
        if (o->has_gradient) gradient = (double)tensor_count(o->gradient) * (double)dtype_size(o->gradient.dtype);
        ahead += o->kind == BENCH_STATE ? 2 * value : value;
        if (o->kind == BENCH_INPUT) back += value + (o->has_gradient == BENCH_ADDED ? 2 : 1) * gradient;
        else back += gradient;
    }
    forward->bytes = ahead;
    both->bytes = p->row->both ? back : ahead + back;
}

void bench_call_both(struct bench_problem *p) {
    if (p->row->both) {
        p->row->both(p);
    } else {
        p->row->forward(p);
        if (p->row->backward) p->row->backward(p);
    }
}
