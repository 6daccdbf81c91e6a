/* bench_check.c: is what was measured right? A slice of a large problem is computed again in double on the CPU.
 *
 * What lies outside the slice must not matter to it. Forward that is so by itself: rows, channels and heads don't see
 * each other, and no token sees a later one. Backward it is made so: the gradients of the outputs are set to 0 outside
 * the slice, so that sums over rows, channels or tokens have terms from the slice alone. Then every value and gradient
 * within the slice is that of the small problem. bench_ops.h describes what calls this. */
#include "train/bench_ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Where the slice begins in each letter, and how many it takes. */
struct slice {
    int64_t from[128], count[128];
};

static int slice_of(const struct bench_problem *p, struct slice *s, struct bench_problem *small, error *err) {
    struct bench_problem cut = {0};
    TRY(bench_sizes(&cut, p->row->slice, err));
    for (int i = 0; i < 128; i++) {
        int64_t size = p->size[i], wanted = cut.size[i];
        s->count[i] = wanted && wanted < size ? wanted : size;
        s->from[i] = i == 'T' ? 0 : size - s->count[i];
        small->size[i] = s->count[i];
    }
    small->size['p'] = small->size['q'] = 0; /* the small problem's rows lie together */
    return 0;
}

static tensor cut_tensor(tensor t, const char *letters, const struct slice *s) {
    int64_t offset = 0;
    for (int i = 0; i < t.ndim; i++) {
        offset += s->from[(int)letters[i]] * t.stride[i];
        t.dim[i] = s->count[(int)letters[i]];
    }
    t.data = (char *)t.data + (size_t)offset * dtype_size(t.dtype);
    return t;
}

/* The offset of the element behind `at`, in the order of dimensions; at[] counts up. False behind the last. */
static bool next_element(tensor t, int64_t *at, int64_t *offset) {
    for (int i = t.ndim - 1; i >= 0; i--) {
        *offset += t.stride[i];
        if (++at[i] < t.dim[i]) return true;
        *offset -= t.dim[i] * t.stride[i];
        at[i] = 0;
    }
    return false;
}

/* What the device has from the first to the last element of a view. */
static void *read_span(struct device *dev, tensor t, error *err) {
    size_t bytes = (size_t)bench_span(t) * dtype_size(t.dtype);
    void *host = malloc(bytes);
    if (host) device_read(dev, host, t.data, bytes);
    else error_system(err, "no memory for results that are to be checked");
    return host;
}

/* Set everything outside the slice to 0, tokens to -1. */
static int mask(struct device *dev, tensor whole, tensor part, error *err) {
    size_t size = dtype_size(whole.dtype), bytes = (size_t)bench_span(part) * size;
    bool tokens = whole.dtype == DTYPE_I32;
    char *given = read_span(dev, part, err), *kept = given ? malloc(bytes) : NULL;
    char *none = kept && tokens ? malloc((size_t)bench_span(whole) * size) : NULL;
    bool room = kept && (none || !tokens);
    if (room) {
        memset(kept, tokens ? 0xff : 0, bytes);
        int64_t at[TENSOR_DIMS] = {0}, offset = 0;
        do memcpy(kept + (size_t)offset * size, given + (size_t)offset * size, size);
        while (next_element(part, at, &offset));
        if (tokens) {
            memset(none, 0xff, (size_t)bench_span(whole) * size);
            device_write(dev, whole.data, none, (size_t)bench_span(whole) * size);
        } else {
            device_zero(dev, whole.data, (size_t)bench_span(whole) * size);
        }
        device_write(dev, part.data, kept, bytes);
    }
    free(given);
    free(kept);
    free(none);
    return room ? 0 : error_system(err, "no memory for results that are to be checked");
}

/* Copy the slice of a view on the device into a dense view in host memory. */
static int copy_slice(struct device *dev, tensor part, tensor to, error *err) {
    char *given = read_span(dev, part, err);
    if (!given) return -1;
    int64_t at[TENSOR_DIMS] = {0}, offset = 0, k = 0;
    do bench_put_number(to.data, to.dtype, k++, bench_get_number(given, part.dtype, offset));
    while (next_element(part, at, &offset));
    free(given);
    return 0;
}

/* Fresh values in the large problem, masked where they have to be; the small one gets the slice of them. What will be
 * written or added to is 0 in both. */
static int prepare(struct bench_problem *p, const struct slice *s, struct bench_problem *small, error *err) {
    TRY(bench_problem_fill(p, err));
    for (int i = 0; i < p->count; i++) {
        struct bench_operand *o = &p->operands[i], *of_small = &small->operands[i];
        tensor value = cut_tensor(o->value, o->letters, s);
        size_t bytes = (size_t)bench_span(o->value) * dtype_size(o->value.dtype);
        if (o->kind == BENCH_OUTPUT) device_zero(p->dev, o->value.data, bytes);
        if (o->masked) TRY(mask(p->dev, o->value, value, err));
        if (o->kind != BENCH_OUTPUT) TRY(copy_slice(p->dev, value, of_small->value, err));
        if (!o->has_gradient) continue;
        tensor gradient = cut_tensor(o->gradient, o->letters, s);
        bytes = (size_t)bench_span(o->gradient) * dtype_size(o->gradient.dtype);
        if (o->kind != BENCH_OUTPUT) {
            device_zero(p->dev, o->gradient.data, bytes);
            device_zero(small->dev, of_small->gradient.data,
                        (size_t)tensor_count(of_small->gradient) * dtype_size(of_small->gradient.dtype));
            continue;
        }
        TRY(mask(p->dev, o->gradient, gradient, err));
        TRY(copy_slice(p->dev, gradient, of_small->gradient, err));
    }
    return 0;
}

/* Rounding to bf16 inside an operation leaves half a percent of a result, fp32 far less. A few elements may be further
 * off than the norm is. */
static double limit_of(const struct device *dev) {
    return dev->precision == PRECISION_BF16 ? 2e-2 : dev->precision == PRECISION_F32 ? 2e-4 : 1e-10;
}

/* What three iterations of a solver may leave. */
static const double unsolved = 1e-5;

static double allowed(const struct bench_problem *p) {
    double limit = limit_of(p->dev);
    if (p->row->tolerance > 0) limit *= p->row->tolerance;
    return p->reports && p->solver.method != CELL_SEQUENTIAL ? fmax(limit, unsolved) : limit;
}

static double root_mean_square(tensor t, int64_t from, int64_t count) {
    double sum = 0;
    for (int64_t k = from; k < from + count; k++) sum += pow(bench_get_number(t.data, t.dtype, k), 2);
    return sqrt(sum / (double)count);
}

/* Compare what the device has of one result with what the CPU has: as a whole, and element by element. One element may
 * be small where terms nearly cancel whose rounding is not: it is held against the others of its row, too. (dq of an
 * mLSTM is ten times as large as elsewhere at a document's second token, where the normaliser takes most of it away.) */
static int compare(const struct bench_problem *p, const struct bench_operand *o, tensor part, tensor want,
                   struct bench_difference *d, bool gradient, error *err) {
    char *given = read_span(p->dev, part, err);
    if (!given) return -1;
    struct bench_difference found = {.name = o->name, .gradient = gradient, .ndim = part.ndim};
    int64_t count = tensor_count(part), width = part.dim[part.ndim - 1], at[TENSOR_DIMS] = {0}, offset = 0;
    double apart = 0, limit = allowed(p), furthest = 0, rms = root_mean_square(want, 0, count), scale = rms;
    for (int64_t k = 0; k < count; k++, next_element(part, at, &offset)) {
        double got = bench_get_number(given, part.dtype, offset), right = bench_get_number(want.data, want.dtype, k);
        if (k % width == 0) scale = fmax(rms, root_mean_square(want, k, width));
        double beyond = fabs(got - right) - 8 * limit * (fabs(right) + scale);
        apart += (got - right) * (got - right);
        if (isnan(beyond)) beyond = HUGE_VAL;
        found.wrong |= beyond > 0;
        if (k > 0 && beyond <= furthest) continue;
        furthest = beyond, found.got = got, found.want = right;
        memcpy(found.at, at, sizeof at);
    }
    free(given);
    apart = sqrt(apart / (double)count);
    found.worst = rms > 0 ? apart / rms : apart > 0 ? HUGE_VAL : 0;
    found.wrong |= !(found.worst <= limit);
    if (d->name && (d->wrong > found.wrong || (d->wrong == found.wrong && !(found.worst > d->worst)))) return 0;
    *d = found;
    return 0;
}

static int compare_all(struct bench_problem *p, const struct slice *s, const struct bench_problem *small,
                       struct bench_difference *d, error *err) {
    *d = (struct bench_difference){0};
    for (int i = 0; i < p->count; i++) {
        const struct bench_operand *o = &p->operands[i], *right = &small->operands[i];
        tensor value = cut_tensor(o->value, o->letters, s), gradient = cut_tensor(o->gradient, o->letters, s);
        if (o->kind != BENCH_INPUT) TRY(compare(p, o, value, right->value, d, false, err));
        if (o->kind == BENCH_INPUT && o->has_gradient && (p->row->backward || p->row->both))
            TRY(compare(p, o, gradient, right->gradient, d, true, err));
    }
    return 0;
}

int bench_check(struct bench_problem *p, struct device *oracle, struct bench_difference *difference, error *err) {
    struct bench_problem small = {.row = p->row, .context = p->context, .reference = true, .dev = oracle};
    struct slice s;
    TRY(slice_of(p, &s, &small, err));
    int status = bench_problem_open(&small, err);
    if (status == 0) status = prepare(p, &s, &small, err);
    if (status == 0) {
        bench_call_both(&small);
        bench_call_both(p);
        status = device_check(p->dev, err);
    }
    if (status == 0) status = compare_all(p, &s, &small, difference, err);
    bench_problem_close(&small);
    return status;
}
