/* optimizer.c: the two passes over the flat parameter arrays: the sum of squares for the gradient norm, and AdamW.
 *
 *   sum_squares   *sum += sum x[i]^2, squared and added in double
 *   adamw         g' = grad_scale g;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
 *                 p -= decay_rate decay p + lr lr_scale (m/correction1) / (sqrt(v/correction2) + eps);
 *                 p = min(max(p, clamp_min), clamp_max) in segments that are clamped
 *
 * Elements of memory traffic: n, and 7n (read p, m, v, g; write p, m, v), 8n with the copy for other ranks; 2 and about
 * 15 FLOPs an element, a division and a square root among them. Bound by memory bandwidth. Deterministic, whatever the
 * number of threads: sum_squares adds SUM_CHUNKS partial sums in order, adamw's elements are independent. */
#include "kernels/cpu/cpu.h"
#include "kernels/step_decide.h"

#define SUM_CHUNKS 1024
#define ADAMW_BLOCK 16384 /* elements a thread takes at a time */

/* The CPU's tables have one type, so nothing is rounded. */
void OP(convert)(struct device *dev, tensor to, tensor from) {
    (void)dev;
    int64_t n = tensor_count(from);
    CHECK_DENSE(from, n);
    CHECK_DENSE(to, n);
    memcpy(to.data, from.data, (size_t)n * sizeof(real));
}

void OP(sum_squares)(struct device *dev, double *sum, tensor x) {
    (void)dev;
    int64_t n = x.dim[0];
    CHECK_DENSE(x, n);
    double partial[SUM_CHUNKS];

#pragma omp parallel for schedule(static) if (n > 16384)
    for (int64_t chunk = 0; chunk < SUM_CHUNKS; chunk++) {
        const real *at = (const real *)x.data + row_block_first(n, SUM_CHUNKS, chunk);
        int64_t count = row_block_first(n, SUM_CHUNKS, chunk + 1) - row_block_first(n, SUM_CHUNKS, chunk);
        double squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < count; i++) squares += (double)at[i] * (double)at[i];
        partial[chunk] = squares;
    }
    double total = 0;
    for (int64_t chunk = 0; chunk < SUM_CHUNKS; chunk++) total += partial[chunk];
    *sum += total;
}

void OP(step_scalars)(struct device *dev, struct adamw_step *step, struct step_report *report, int64_t *steps,
                      const struct step_totals *totals, const struct step_rates *rates, const struct step_rule *rule) {
    (void)dev;
    step_decide(step, report, steps, totals, rates, rule);
}

void OP(worst_reports)(struct device *dev, struct cell_report *worst, double *largest,
                       const struct cell_report *reports, int64_t ranks, int64_t n) {
    (void)dev;
    ASSERT(ranks > 0 && n > 0);
    *largest = 0;
    for (int64_t i = 0; i < n; i++) {
        worst[i] = (struct cell_report){.residual = worst_report(reports, ranks, n, i)};
        *largest = worst[i].residual > *largest ? worst[i].residual : *largest;
    }
}

/* The step's scalars as the loop wants them, for one segment. */
struct adamw_constants {
    real beta1, rest1, beta2, rest2, eps, grad_scale;
    real decay; /* decay_rate decay */
    real rate;  /* lr lr_scale / correction1 */
    real root2; /* 1 / sqrt(correction2) */
    real low, high; /* infinite where nothing is clamped */
};

static struct adamw_constants constants_of(const struct adamw_step *step, const struct adamw_segment *segment) {
    double lr = step->lr * (double)segment->lr_scale;
    return (struct adamw_constants){
        .beta1 = (real)step->beta1,
        .rest1 = (real)(1 - step->beta1),
        .beta2 = (real)step->beta2,
        .rest2 = (real)(1 - step->beta2),
        .eps = (real)step->eps,
        .grad_scale = (real)step->grad_scale,
        .decay = (real)(step->decay_rate * (double)segment->decay),
        .rate = (real)(lr / step->correction1),
        .root2 = (real)(1 / sqrt(step->correction2)),
        .low = segment->clamped ? (real)segment->clamp_min : -(real)INFINITY,
        .high = segment->clamped ? (real)segment->clamp_max : (real)INFINITY,
    };
}

/* Moments below the smallest normal number become 0: a row of an embedding whose token is no longer seen would
 * otherwise keep subnormal moments for ever, on which arithmetic is a hundred times slower. */
static inline real flush(real v) {
    return fabs_real(v) < REAL_MIN ? 0 : v;
}

static void adamw_block(real *restrict p, real *restrict m, real *restrict v, const real *restrict g, int64_t n,
                        const struct adamw_constants *constants) {
    const struct adamw_constants c = *constants;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real grad = g[i] * c.grad_scale;
        real m1 = flush(c.beta1 * m[i] + c.rest1 * grad);
        real v1 = flush(c.beta2 * v[i] + c.rest2 * grad * grad);
        m[i] = m1;
        v[i] = v1;
        /* Both parts in one subtraction: p is rounded once, and 1 - decay, which may round to 1, never arises. */
        real p1 = p[i] - (c.decay * p[i] + c.rate * m1 / (sqrt_real(v1) * c.root2 + c.eps));
        /* Comparisons that are false for what is not a number, so that a clamp hides no failure. */
        p1 = p1 < c.low ? c.low : p1;
        p[i] = p1 > c.high ? c.high : p1;
    }
}

static void adamw_slice(const struct adamw_slice *slice, const struct adamw_step *step) {
    int64_t n = slice->p.dim[0];
    CHECK_DENSE(slice->p, n);
    CHECK_DENSE(slice->m, n);
    CHECK_DENSE(slice->v, n);
    CHECK_DENSE(slice->g, n);
    if (tensor_given(slice->rounded)) CHECK_DENSE(slice->rounded, n);
    const struct adamw_segment *segments = slice->segments;
    for (int64_t s = 0; s < slice->count; s++)
        ASSERT(segments[s].offset >= 0 && segments[s].count >= 0 && segments[s].offset <= n - segments[s].count);
    if (step->skip) return;

    real *p = slice->p.data, *m = slice->m.data, *v = slice->v.data, *rounded = slice->rounded.data;
    const real *g = slice->g.data;
#pragma omp parallel
    for (int64_t s = 0; s < slice->count; s++) {
        struct adamw_constants c = constants_of(step, &segments[s]);
#pragma omp for schedule(static) nowait
        for (int64_t from = 0; from < segments[s].count; from += ADAMW_BLOCK) {
            int64_t left = segments[s].count - from, at = segments[s].offset + from;
            int64_t count = left < ADAMW_BLOCK ? left : ADAMW_BLOCK;
            adamw_block(p + at, m + at, v + at, g + at, count, &c);
            if (rounded) memcpy(rounded + at, p + at, (size_t)count * sizeof(real));
        }
    }
}

void OP(adamw)(struct device *dev, const struct adamw_slice *slices, int64_t count, const struct adamw_step *step) {
    (void)dev;
    for (int64_t i = 0; i < count; i++) adamw_slice(&slices[i], step);
}
