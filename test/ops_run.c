/* test/ops_run.c: one case of one row on one device: operands, memory with guards, calls, comparison.
 *
 * Every buffer that an operation gets lies in a block of its own: 64 guard bytes, the rows (with gaps between them
 * where the case is strided), 64 guard bytes. Guards and gaps hold GUARD_BYTE and are checked after every call; what
 * the operation only reads is checked to be unchanged; what it must write is filled with poison before the call.
 * Host copies are contiguous doubles whatever the device computes in.
 */
#include "test/ops_run.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GUARD 64
#define GUARD_BYTE 0xA5
#define GAP_BEFORE 3 /* elements; odd, so that strided rows are not aligned ... */
#define GAP_AFTER 5
#define GAP_ALIGNED 8 /* ... unless the case asks for it, with strided=2 */
#define POISON_NAN 0xFF /* every float type reads it as NaN */

/* A buffer on the device. Payload: `rows` runs of row_bytes; row i starts at offset + (i / inner) * outer_step +
 * (i % inner) * row_step. */
struct block {
    const char *name, *of; /* "gradient of ", "x" */
    unsigned char *device;
    unsigned char *image; /* host copy of the whole block, as uploaded */
    size_t size, offset, row_bytes, row_step, outer_step;
    int64_t rows, inner;
    bool forward_writes, backward_writes;
};

static void *must_allocate(size_t size) {
    void *p = calloc(size ? size : 1, 1);
    ASSERT(p != NULL);
    return p;
}

/* --- parameters --------------------------------------------------------------------------------------------------- */

int row_parameters(const struct op_row *row, char names[OP_PARAMETERS][OP_NAME], int64_t defaults[OP_PARAMETERS]) {
    int count = 0, used = 0;
    long long number;
    for (const char *at = row->parameters; *at; at += used) {
        if (sscanf(at, " %15[^= ]=%lld%n", names[count], &number, &used) != 2) break;
        defaults[count++] = number;
        if (count == OP_PARAMETERS) break;
    }
    return count;
}

static int64_t *parameter_find(struct run *r, const char *name) {
    char names[OP_PARAMETERS][OP_NAME];
    int64_t defaults[OP_PARAMETERS];
    int count = row_parameters(r->row, names, defaults);
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0) return &r->parameter[i];
    return NULL;
}

int64_t param(const struct run *r, const char *name) {
    struct run copy = {.row = r->row};
    int64_t *found = parameter_find(&copy, name);
    ASSERT(found != NULL);
    return r->parameter[found - copy.parameter];
}

/* The parameter "strided", 0 where there is none. */
static int64_t run_strided(struct run *r) {
    int64_t *strided = parameter_find(r, "strided");
    return strided != NULL ? *strided : 0;
}

/* --- operands ----------------------------------------------------------------------------------------------------- */

static struct operand *operand_add(struct run *r, const char *name, enum operand_kind kind, int ndim,
                                   const int64_t *dim) {
    ASSERT(r->operands < OP_OPERANDS && ndim <= TENSOR_DIMS && operand_find(r, name) == NULL);
    struct operand *o = &r->operand[r->operands++];
    *o = (struct operand){.name = name, .kind = kind, .ndim = ndim, .count = 1, .spread = 1, .terms = 1,
                          .gradient_terms = 1, .value_block = -1, .gradient_block = -1};
    for (int i = 0; i < ndim; i++) {
        o->dim[i] = dim[i];
        o->count *= dim[i];
    }
    return o;
}

struct operand *input(struct run *r, const char *name, int ndim, const int64_t *dim) {
    return operand_add(r, name, OPERAND_INPUT, ndim, dim);
}

struct operand *parameter(struct run *r, const char *name, int ndim, const int64_t *dim) {
    struct operand *o = operand_add(r, name, OPERAND_INPUT, ndim, dim);
    o->type = OPERAND_REAL;
    o->accumulate = true;
    return o;
}

struct operand *weight(struct run *r, const char *name, int ndim, const int64_t *dim) {
    struct operand *o = operand_add(r, name, OPERAND_INPUT, ndim, dim);
    o->real_gradient = true;
    o->accumulate = true;
    return o;
}

struct operand *output(struct run *r, const char *name, int ndim, const int64_t *dim) {
    return operand_add(r, name, OPERAND_OUTPUT, ndim, dim);
}

struct operand *statistic(struct run *r, const char *name, int ndim, const int64_t *dim) {
    struct operand *o = operand_add(r, name, OPERAND_OUTPUT, ndim, dim);
    o->type = OPERAND_REAL;
    o->no_gradient = true;
    return o;
}

struct operand *state(struct run *r, const char *name, int ndim, const int64_t *dim) {
    struct operand *o = operand_add(r, name, OPERAND_STATE, ndim, dim);
    o->type = OPERAND_REAL;
    o->no_gradient = true;
    return o;
}

struct operand *indices(struct run *r, const char *name, int ndim, const int64_t *dim,
                        void (*fill)(struct run *r, struct operand *o)) {
    struct operand *o = operand_add(r, name, OPERAND_INDEX, ndim, dim);
    o->no_gradient = true;
    o->fill = fill;
    return o;
}

struct operand *bytes(struct run *r, const char *name, const void *content, size_t size) {
    struct operand *o = operand_add(r, name, OPERAND_BYTES, DIMS((int64_t)size));
    o->no_gradient = true;
    o->byte_count = size;
    o->bytes = must_allocate(size);
    memcpy(o->bytes, content, size);
    return o;
}

const void *host_bytes(struct run *r, const char *name) {
    return operand_find(r, name)->bytes;
}

/* Lengths of the sums behind an element of the value and of the gradient. The tolerance measures an element's rounding
 * by its own size and by the rms of its array. An element that is alone, or nearly, has no such company, and if its sum
 * happens to cancel, only a wider allowance is left: eight times. */
void set_terms(struct operand *o, int64_t value_terms, int64_t gradient_terms) {
    double wider = o->count <= 2 ? 64 : 1;
    o->terms = wider * (double)value_terms;
    o->gradient_terms = wider * (double)gradient_terms;
}

void absent(struct run *r, const char *name) {
    ASSERT(r->absents < OP_OPERANDS);
    r->absent[r->absents++] = name;
}

struct operand *operand_find(struct run *r, const char *name) {
    for (int i = 0; i < r->operands; i++)
        if (strcmp(r->operand[i].name, name) == 0) return &r->operand[i];
    return NULL;
}

static void must_be_absent(const struct run *r, const char *name) {
    for (int i = 0; i < r->absents; i++)
        if (strcmp(r->absent[i], name) == 0) return;
    fprintf(stderr, "ops: the row %s names an operand '%s' that it neither declares nor declares absent\n",
            r->row->name, name);
    abort();
}

tensor value(struct run *r, const char *name) {
    struct operand *o = operand_find(r, name);
    if (o == NULL) must_be_absent(r, name);
    return o ? o->value : tensor_none();
}

tensor gradient(struct run *r, const char *name) {
    struct operand *o = operand_find(r, name);
    if (o == NULL) must_be_absent(r, name);
    return o ? o->gradient : tensor_none();
}

/* --- keyed draws -------------------------------------------------------------------------------------------------- */

static rng_key draw_key(const struct run *r, const char *name, uint32_t what) {
    uint32_t hash = 2166136261u ^ what;
    for (const char *c = name; *c; c++) hash = (hash ^ (unsigned char)*c) * 16777619u;
    return (rng_key){.seed = r->seed, .purpose = RNG_TEST, .stream = hash};
}

double draw_normal(const struct run *r, const struct operand *o, int64_t i) {
    return rng_normal(draw_key(r, o->name, 0), (uint64_t)i);
}

double draw_uniform(const struct run *r, const struct operand *o, int64_t i) {
    return rng_uniform(draw_key(r, o->name, 0), (uint64_t)i);
}

int64_t draw_below(const struct run *r, const struct operand *o, int64_t i, int64_t bound) {
    return (int64_t)rng_below(draw_key(r, o->name, 0), (uint64_t)i, (uint64_t)bound);
}

/* --- numbers on the device ---------------------------------------------------------------------------------------- */

static double number_load(const unsigned char *at, enum dtype dtype) {
    if (dtype == DTYPE_F64) {
        double v;
        memcpy(&v, at, sizeof v);
        return v;
    }
    if (dtype == DTYPE_I32) {
        int32_t whole;
        memcpy(&whole, at, sizeof whole);
        return whole;
    }
    float f;
    if (dtype == DTYPE_BF16) {
        uint16_t half;
        memcpy(&half, at, sizeof half);
        uint32_t word = (uint32_t)half << 16;
        memcpy(&f, &word, sizeof f);
        return f;
    }
    ASSERT(dtype == DTYPE_F32);
    memcpy(&f, at, sizeof f);
    return f;
}

/* Round to nearest, ties to even; the values of tests are finite. */
static uint16_t bf16_of(double v) {
    float f = (float)v;
    uint32_t word;
    memcpy(&word, &f, sizeof word);
    return (uint16_t)((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

static void number_store(unsigned char *at, enum dtype dtype, double v) {
    if (dtype == DTYPE_F64) {
        memcpy(at, &v, sizeof v);
    } else if (dtype == DTYPE_BF16) {
        uint16_t half = bf16_of(v);
        memcpy(at, &half, sizeof half);
    } else if (dtype == DTYPE_I32) {
        int32_t whole = (int32_t)v;
        memcpy(at, &whole, sizeof whole);
    } else {
        ASSERT(dtype == DTYPE_F32);
        float f = (float)v;
        memcpy(at, &f, sizeof f);
    }
}

static double number_round(double v, enum dtype dtype) {
    unsigned char place[8];
    number_store(place, dtype, v);
    return number_load(place, dtype);
}

/* --- blocks ------------------------------------------------------------------------------------------------------- */

static unsigned char *block_row(unsigned char *base, const struct block *b, int64_t row) {
    return base + b->offset + (size_t)(row / b->inner) * b->outer_step + (size_t)(row % b->inner) * b->row_step;
}

/* A contiguous block of `size` bytes. */
static struct block block_plain(const char *name, const char *of, size_t size) {
    return (struct block){.name = name, .of = of, .size = size + 2 * GUARD, .offset = GUARD, .row_bytes = size,
                          .row_step = size, .outer_step = size, .rows = size ? 1 : 0, .inner = 1};
}

/* The block of an operand, with gaps if it is strided, and the tensor that describes it (whose data comes later). */
static struct block block_of_operand(struct run *r, const char *name, const struct operand *o, enum dtype dtype,
                                     tensor *t) {
    size_t element = dtype_size(dtype);
    struct block b = block_plain(name, o->name, (size_t)o->count * element);
    *t = (tensor){.dtype = dtype, .ndim = o->ndim};
    int64_t step = 1;
    for (int i = o->ndim - 1; i >= 0; i--) {
        t->dim[i] = o->dim[i];
        t->stride[i] = step;
        step *= o->dim[i];
    }
    if (o->lead == 0 || !run_strided(r) || o->count == 0) return b;

    ASSERT(o->lead <= 2);
    int64_t row = 1;
    for (int i = o->lead; i < o->ndim; i++) row *= o->dim[i];
    b.rows = o->count / row;
    b.inner = o->dim[o->lead - 1];
    int64_t before = run_strided(r) == 2 ? GAP_ALIGNED : GAP_BEFORE;
    int64_t row_step = before + row + (run_strided(r) == 2 ? GAP_ALIGNED : GAP_AFTER);
    int64_t outer_step = row_step * (b.inner + (o->lead == 2)); /* a row of gap between batch rows */
    t->stride[o->lead - 1] = row_step;
    if (o->lead == 2) t->stride[0] = outer_step;
    b.row_bytes = (size_t)row * element;
    b.row_step = (size_t)row_step * element;
    b.outer_step = (size_t)outer_step * element;
    b.offset = GUARD + (size_t)before * element;
    b.size = 2 * GUARD + (size_t)(b.rows / b.inner) * b.outer_step;
    return b;
}

/* Build the image of a block: guards everywhere, `byte` in the payload, or the numbers given. */
static void block_image(struct block *b, int byte, const double *numbers, enum dtype dtype) {
    memset(b->image, GUARD_BYTE, b->size);
    size_t element = numbers ? dtype_size(dtype) : 1;
    for (int64_t row = 0; row < b->rows; row++) {
        unsigned char *at = block_row(b->image, b, row);
        if (numbers == NULL) memset(at, byte, b->row_bytes);
        else
            for (size_t i = 0; i < b->row_bytes / element; i++) number_store(at + i * element, dtype, *numbers++);
    }
}

static void block_image_raw(struct block *b, const void *content) {
    memset(b->image, GUARD_BYTE, b->size);
    if (b->row_bytes) memcpy(b->image + b->offset, content, b->row_bytes);
}

/* Offset of the first byte in [from, to) of the image that is not a guard byte; `to` if there is none. */
static size_t guard_broken(const struct block *b, size_t from, size_t to) {
    while (from < to && b->image[from] == GUARD_BYTE) from++;
    return from;
}

/* Offset of the first byte outside the payload that is not a guard byte; b->size if there is none. */
static size_t block_broken(const struct block *b) {
    size_t from = 0;
    for (int64_t row = 0; row < b->rows; row++) {
        size_t start = (size_t)(block_row(b->image, b, row) - b->image), broken = guard_broken(b, from, start);
        if (broken < start) return broken;
        from = start + b->row_bytes;
    }
    return guard_broken(b, from, b->size);
}

/* Read a block back into its image; check the guards and gaps and, unless the call writes it, that the payload is what
 * was uploaded. */
static void block_check(struct run *r, struct block *b, bool written, const char *call) {
    if (!written) {
        unsigned char *before = b->image;
        b->image = must_allocate(b->size);
        device_read(r->dev, b->image, b->device, b->size);
        if (memcmp(before, b->image, b->size) != 0)
            report_failure(r->report, "%s changed what it may only read: %s%s", call, b->name, b->of);
        free(before);
    } else {
        device_read(r->dev, b->image, b->device, b->size);
    }
    size_t broken = block_broken(b);
    if (broken < b->size)
        report_failure(r->report, "%s wrote outside its output: byte %lld of %s%s", call,
                       (long long)broken - (long long)b->offset, b->name, b->of);
}

/* The numbers in a block's image. */
static void block_numbers(const struct block *b, enum dtype dtype, double *numbers) {
    size_t element = dtype_size(dtype);
    for (int64_t row = 0; row < b->rows; row++)
        for (size_t i = 0; i < b->row_bytes / element; i++)
            *numbers++ = number_load(block_row(b->image, b, row) + i * element, dtype);
}

/* --- opening and closing ------------------------------------------------------------------------------------------ */

static enum dtype operand_dtype(const struct run *r, const struct operand *o) {
    if (o->kind == OPERAND_INDEX) return DTYPE_I32;
    if (o->kind == OPERAND_BYTES) return DTYPE_U8;
    if (o->type == OPERAND_F64) return DTYPE_F64;
    if (o->type == OPERAND_I32) return DTYPE_I32;
    return o->type == OPERAND_REAL ? r->ops->real : r->ops->act;
}

static bool has_gradient(const struct operand *o) {
    return !o->no_gradient && (o->kind == OPERAND_INPUT || o->kind == OPERAND_OUTPUT);
}

enum { SAVED_BLOCK = 0, FORWARD_SCRATCH_BLOCK, BACKWARD_SCRATCH_BLOCK };

static int block_push(struct run *r, struct block b) {
    r->blocks[r->block_count] = b;
    return r->block_count++;
}

/* Decide the blocks: three for memory without a type, one for every value, one for every gradient, less the aliases. */
static void run_lay_out(struct run *r) {
    r->blocks = must_allocate((2 * OP_OPERANDS + 3) * sizeof *r->blocks);
    block_push(r, block_plain("", "the saved memory", r->saved_bytes));
    block_push(r, block_plain("", "the forward scratch", r->forward_scratch));
    block_push(r, block_plain("", "the backward scratch", r->backward_scratch));
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        struct block values = block_of_operand(r, "", o, operand_dtype(r, o), &o->value);
        o->value_block = o->alias ? operand_find(r, o->alias)->value_block : block_push(r, values);
        if (!has_gradient(o)) continue;
        enum dtype dtype = o->real_gradient ? r->ops->real : o->act_gradient ? r->ops->act : operand_dtype(r, o);
        struct block gradients = block_of_operand(r, "the gradient of ", o, dtype, &o->gradient);
        if (o->alias_gradient == NULL) o->gradient_block = block_push(r, gradients);
    }
    r->blocks[SAVED_BLOCK].forward_writes = r->blocks[FORWARD_SCRATCH_BLOCK].forward_writes = true;
    r->blocks[BACKWARD_SCRATCH_BLOCK].backward_writes = true;
    for (int i = 0; i < r->operands; i++) { /* only now: an input may lend the gradient of an output declared later */
        struct operand *o = &r->operand[i];
        if (o->alias_gradient) o->gradient_block = operand_find(r, o->alias_gradient)->gradient_block;
        if (o->kind == OPERAND_OUTPUT || o->kind == OPERAND_STATE) r->blocks[o->value_block].forward_writes = true;
        if (has_gradient(o) && o->kind == OPERAND_INPUT) r->blocks[o->gradient_block].backward_writes = true;
    }
}

static void run_place(struct run *r) {
    arena measure = arena_measure("operands");
    for (int i = 0; i < r->block_count; i++) arena_take(&measure, r->blocks[i].size);
    error err = {0};
    if (arena_open(&r->memory, "operands", measure.peak, r->dev->memory, &err) != 0) {
        fprintf(stderr, "ops: %s\n", err.text);
        exit(1);
    }
    for (int i = 0; i < r->block_count; i++) {
        struct block *b = &r->blocks[i];
        b->device = arena_take(&r->memory, b->size);
        b->image = must_allocate(b->size);
    }
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        o->value.data = r->blocks[o->value_block].device + r->blocks[o->value_block].offset;
        struct block *g = has_gradient(o) ? &r->blocks[o->gradient_block] : NULL;
        if (g) o->gradient.data = g->device + g->offset;
    }
}

static void fill_normal(const struct run *r, const struct operand *o, double *numbers, uint32_t what, double mean,
                        double spread) {
    rng_key key = draw_key(r, o->name, what);
    for (int64_t i = 0; i < o->count; i++) numbers[i] = mean + spread * rng_normal(key, (uint64_t)i);
}

static void round_all(double *numbers, int64_t count, enum dtype dtype) {
    for (int64_t i = 0; i < count; i++) numbers[i] = number_round(numbers[i], dtype);
}

static void run_fill(struct run *r) {
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        size_t size = (size_t)o->count * sizeof(double);
        if (o->kind == OPERAND_BYTES) continue;
        if (o->kind == OPERAND_INDEX) {
            o->index = must_allocate((size_t)o->count * sizeof(int32_t));
            o->fill(r, o);
            continue;
        }
        o->values = must_allocate(size);
        if (o->kind == OPERAND_STATE) o->values_before = must_allocate(size);
        double *values = o->kind == OPERAND_STATE ? o->values_before : o->values;
        if (o->fill) o->fill(r, o);
        else fill_normal(r, o, values, 0, o->mean, o->spread);
        round_all(values, o->count, r->rounding);
        if (!has_gradient(o)) continue;
        o->gradients = must_allocate(size);
        o->gradients_before = must_allocate(size);
        double *given = o->kind == OPERAND_OUTPUT ? o->gradients : o->gradients_before;
        fill_normal(r, o, given, 1, 0, 1);
        round_all(given, o->count, r->rounding);
    }
}

void run_open(struct run *r, const struct op_row *row, struct device *dev, const int64_t *parameters, uint64_t seed,
              enum dtype rounding, struct op_report *report) {
    *r = (struct run){.row = row, .dev = dev, .ops = dev->ops, .seed = seed, .rounding = rounding,
                      .poison = POISON_NAN, .report = report};
    memcpy(r->parameter, parameters, sizeof r->parameter);
    row->declare(r);
    run_lay_out(r);
    run_place(r);
    run_fill(r);
}

static void apply_changes(struct run *r, const char *changes) {
    char name[OP_NAME];
    long long number;
    int used = 0;
    for (const char *at = changes; sscanf(at, " %15[^= ]=%lld%n", name, &number, &used) == 2; at += used) {
        int64_t *found = parameter_find(r, name);
        ASSERT(found != NULL);
        *found = number;
    }
}

void run_open_row(struct run *r, const struct run *like, const struct op_row *row, const char *changes) {
    char names[OP_PARAMETERS][OP_NAME];
    struct run wanted = {.row = row};
    row_parameters(row, names, wanted.parameter);
    apply_changes(&wanted, changes);
    run_open(r, row, like->dev, wanted.parameter, like->seed, like->rounding, like->report);
}

void run_open_like(struct run *r, const struct run *like, const char *changes) {
    struct run wanted = {.row = like->row};
    memcpy(wanted.parameter, like->parameter, sizeof wanted.parameter);
    apply_changes(&wanted, changes);
    run_open(r, like->row, like->dev, wanted.parameter, like->seed, like->rounding, like->report);
}

void run_close(struct run *r) {
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        free(o->values);
        free(o->values_before);
        free(o->gradients);
        free(o->gradients_before);
        free(o->index);
        free(o->bytes);
    }
    for (int i = 0; i < r->block_count; i++) free(r->blocks[i].image);
    free(r->blocks);
    arena_close(&r->memory);
}

/* --- calls -------------------------------------------------------------------------------------------------------- */

static void prepare_value(struct run *r, struct operand *o) {
    struct block *b = &r->blocks[o->value_block];
    if (o->kind == OPERAND_OUTPUT && o->alias) return; /* its memory holds the input */
    if (o->kind == OPERAND_INDEX) block_image_raw(b, o->index);
    else if (o->kind == OPERAND_BYTES) block_image_raw(b, o->bytes);
    else if (o->kind == OPERAND_OUTPUT) block_image(b, r->poison, NULL, DTYPE_U8);
    else block_image(b, 0, o->kind == OPERAND_STATE ? o->values_before : o->values, o->value.dtype);
}

void run_upload(struct run *r) {
    for (int i = SAVED_BLOCK; i <= BACKWARD_SCRATCH_BLOCK; i++) block_image(&r->blocks[i], r->poison, NULL, DTYPE_U8);
    for (int i = 0; i < r->operands; i++) prepare_value(r, &r->operand[i]);
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        if (!has_gradient(o) || (o->kind == OPERAND_INPUT && o->alias_gradient)) continue;
        struct block *b = &r->blocks[o->gradient_block];
        if (o->kind == OPERAND_OUTPUT) block_image(b, 0, o->gradients, o->gradient.dtype);
        else if (o->accumulate) block_image(b, 0, o->gradients_before, o->gradient.dtype);
        else block_image(b, r->poison, NULL, DTYPE_U8);
    }
    for (int i = 0; i < r->block_count; i++)
        device_write(r->dev, r->blocks[i].device, r->blocks[i].image, r->blocks[i].size);
}

static void *block_payload(struct run *r, int id) {
    struct block *b = &r->blocks[id];
    return b->row_bytes ? b->device + b->offset : NULL;
}

void run_call_forward(struct run *r) {
    r->saved = block_payload(r, SAVED_BLOCK);
    r->scratch = block_payload(r, FORWARD_SCRATCH_BLOCK);
    r->row->forward(r);
}

void run_call_backward(struct run *r) {
    r->scratch = block_payload(r, BACKWARD_SCRATCH_BLOCK);
    r->row->backward(r);
}

static void check_device(struct run *r, const char *call) {
    error err = {0};
    if (device_check(r->dev, &err) != 0) report_failure(r->report, "%s: %s", call, err.text);
}

void run_forward(struct run *r) {
    run_upload(r);
    run_call_forward(r);
    check_device(r, "forward");
    for (int i = 0; i < r->block_count; i++) block_check(r, &r->blocks[i], r->blocks[i].forward_writes, "forward");
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        if (o->kind == OPERAND_OUTPUT || o->kind == OPERAND_STATE)
            block_numbers(&r->blocks[o->value_block], o->value.dtype, o->values);
    }
}

void run_backward(struct run *r) {
    run_call_backward(r);
    check_device(r, "backward");
    for (int i = 0; i < r->block_count; i++) block_check(r, &r->blocks[i], r->blocks[i].backward_writes, "backward");
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        if (has_gradient(o) && o->kind == OPERAND_INPUT)
            block_numbers(&r->blocks[o->gradient_block], o->gradient.dtype, o->gradients);
    }
}

/* --- comparison --------------------------------------------------------------------------------------------------- */

double dtype_unit(enum dtype dtype) {
    return dtype == DTYPE_F64 ? 0x1p-53 : dtype == DTYPE_F32 ? 0x1p-24 : 0x1p-9;
}

void report_failure(struct op_report *report, const char *format, ...) {
    enum { SHOWN = 6 }; /* failures printed of one case */
    report->failures++;
    if (report->case_failures++ >= SHOWN) return;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "FAIL %s %s: ", report->row, report->case_text);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n     replay: %s %s%s '%s %s'\n", report->program, report->mode, report->options, report->row,
            report->case_text);
}

void compare_arrays(struct op_report *report, const char *what, const double *got, const double *want, int64_t count,
                    double share, double floor) {
    double squares = 0, worst = -1;
    int64_t worst_at = 0;
    for (int64_t i = 0; i < count; i++) squares += want[i] * want[i];
    double rms = count ? sqrt(squares / (double)count) : 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = fabs(got[i] - want[i]), allowed = share * (fabs(want[i]) + rms) + floor;
        double ratio = difference == 0 ? 0 : difference / allowed;
        if (!isfinite(got[i]) || !isfinite(want[i])) ratio = INFINITY;
        if (ratio > worst) {
            worst = ratio;
            worst_at = i;
        }
    }
    report->checks++;
    if (worst > report->worst) {
        report->worst = worst;
        snprintf(report->worst_where, sizeof report->worst_where, "%s of %s %s", what, report->row, report->case_text);
    }
    if (worst > 1)
        report_failure(report, "%s: element %lld is %.9g, should be %.9g (%.3g times what is allowed)", what,
                       (long long)worst_at, got[worst_at], want[worst_at], worst);
}

void op_compare(struct run *r, const char *what, const double *got, const double *want, int64_t count, double terms) {
    double share = dtype_unit(r->ops->act) * (8 + 4 * sqrt(terms));
    compare_arrays(r->report, what, got, want, count, share, 0);
}

void op_expect(struct run *r, bool good, const char *format, ...) {
    r->report->checks++;
    if (good) return;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    report_failure(r->report, "%s", text);
}
