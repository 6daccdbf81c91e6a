/* optimizer.cu: the sum of squares of the gradients, AdamW over all tensors of flat arrays, and the rounding of weights
 * for products.
 *
 * sum_squares: SUM_BLOCKS blocks of fixed shares, added in double (fp64 is cheap on the chips this is for), then one
 * block adds the blocks' sums in order. Bytes 4n.
 * adamw: a block takes SHARE elements of one segment, once, in vectors of four, all of them on their way before
 * anything else is done. Blocks that go on to further shares drift apart, and what they touch at a time no longer lies
 * together: 1.59 ms for 129 M parameters, where a bare kernel with one share a block takes 1.30 (H100).
 * The table of segments travels with the launch, TABLE of them at a time, so a model is a launch or two. Bytes: p, m, v
 * read and written, g read, and the rounded copy written, 28n + 2n in bf16; bound by bandwidth: 129 M parameters in
 * 1.3 ms at 3.0 TB/s, 0.9 ms at 4.2 TB/s. The step's scalars are read from device memory.
 * step_scalars: one thread, a few hundred operations in double: under 10 us, and no word from the host in a step.
 * worst_reports: one block, a thread a layer, which looks through the ranks: 8 bytes a layer and rank, a few us.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/step_decide.h"

/* A launch carries 32 KB from CUDA 12.1 on, 4 KB before. */
enum { THREADS = 256, ROUND = 2, SHARE = 4 * ROUND * THREADS, TABLE = CUDART_VERSION >= 12010 ? 256 : 40 };

__device__ double block_sum_double(double v) {
    __shared__ double room[WARP];
    for (int offset = WARP / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(FULL, v, offset);
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = v;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < (int)blockDim.x / WARP; w++) sum += room[w];
    return sum;
}

__global__ void square_kernel(double *partials, const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
        sum += (double)x[i] * (double)x[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void add_squares_kernel(double *sum, const double *partials, int blocks) {
    double mine = 0;
    for (int i = threadIdx.x; i < blocks; i += THREADS) mine += partials[i];
    mine = block_sum_double(mine);
    if (threadIdx.x == 0) *sum += mine;
}

extern "C" void cuda_sum_squares(struct device *dev, double *sum, tensor x) {
    int64_t n = tensor_count(x);
    int blocks = (int)at_most(ceil_div(n, THREADS * 4), SUM_BLOCKS);
    if (n == 0) return;
    LAUNCH(dev, square_kernel, blocks, THREADS, 0, cuda_impl(dev)->partials, data_of<float>(x), n);
    LAUNCH(dev, add_squares_kernel, 1, THREADS, 0, sum, cuda_impl(dev)->partials, blocks);
}

__global__ void step_scalars_kernel(struct adamw_step *step, struct step_report *report, int64_t *steps,
                                    const struct step_totals *totals, const struct step_rates *rates,
                                    struct step_rule rule) {
    step_decide(step, report, steps, totals, rates, &rule);
}

extern "C" void cuda_step_scalars(struct device *dev, struct adamw_step *step, struct step_report *report,
                                  int64_t *steps, const struct step_totals *totals, const struct step_rates *rates,
                                  const struct step_rule *rule) {
    LAUNCH(dev, step_scalars_kernel, 1, 1, 0, step, report, steps, totals, rates, *rule);
}

/* A layer is one thread's, and the largest of the threads' the block's: a maximum is the same in any order. */
__global__ void worst_reports_kernel(struct cell_report *worst, double *largest, const struct cell_report *reports,
                                     int64_t ranks, int64_t n) {
    __shared__ float room[THREADS];
    float mine = 0;
    for (int64_t i = threadIdx.x; i < n; i += THREADS) {
        struct cell_report of_layer = {worst_report(reports, ranks, n, i), 0};
        worst[i] = of_layer;
        mine = fmaxf(mine, of_layer.residual);
    }
    room[threadIdx.x] = mine;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) room[threadIdx.x] = fmaxf(room[threadIdx.x], room[threadIdx.x + half]);
    }
    if (threadIdx.x == 0) *largest = room[0];
}

extern "C" void cuda_worst_reports(struct device *dev, struct cell_report *worst, double *largest,
                                   const struct cell_report *reports, int64_t ranks, int64_t n) {
    ASSERT(ranks > 0 && n > 0);
    LAUNCH(dev, worst_reports_kernel, 1, THREADS, 0, worst, largest, reports, ranks, n);
}

/* --- AdamW and rounding ------------------------------------------------------------------------------------------- */

template <class T, int V>
__global__ void __launch_bounds__(THREADS) convert_kernel(T *to, const float *from, int64_t n) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    if (i >= n) return;
    float v[V];
    load_floats<V>(v, from + i);
    store_floats<V>(to + i, v);
}

extern "C" void cuda_convert(struct device *dev, tensor to, tensor from) {
    int64_t n = tensor_count(from);
    ASSERT(tensor_is(to, 1, n) && from.dtype == DTYPE_F32);
    with_type(to.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_width(vectors_fit(to, 4) && vectors_fit(from, 4), [&](auto width) {
            int64_t blocks = ceil_div(n, (int64_t)THREADS * width.value);
            LAUNCH(dev, (convert_kernel<T, width.value>), (unsigned)blocks, THREADS, 0, data_of<T>(to),
                   data_of<float>(from), n);
        });
    });
}

/* A segment of a slice, with what the launch knows of it. */
struct run_of_weights {
    float *p, *m, *v;
    const float *g;
    void *rounded; /* or NULL */
    int64_t count, first; /* `first`: number of its first block among those of the launch */
    float decay, lr_scale, low, high;
    bool wide; /* all lie on whole vectors */
};

struct run_table {
    int count;
    struct run_of_weights run[TABLE];
};

/* The step's scalars as the loop wants them, for one segment. */
struct adamw_constants {
    float scale, b1, rest1, b2, rest2, eps, shrink, rate, unbias;
};

__device__ struct adamw_constants constants_of(const struct adamw_step *step, const struct run_of_weights &run) {
    struct adamw_constants c;
    c.scale = (float)step->grad_scale, c.eps = (float)step->eps;
    c.b1 = (float)step->beta1, c.rest1 = (float)(1 - step->beta1);
    c.b2 = (float)step->beta2, c.rest2 = (float)(1 - step->beta2);
    c.shrink = (float)(step->decay_rate * (double)run.decay);
    c.rate = (float)(step->lr * (double)run.lr_scale / step->correction1);
    c.unbias = (float)(1.0 / sqrt(step->correction2));
    return c;
}

/* V neighbours of a run. */
template <int V> struct weights {
    float p[V], m[V], v[V], g[V];
};

template <int V> __device__ __forceinline__ void load(weights<V> &w, const struct run_of_weights &run, int64_t i) {
    load_floats<V>(w.p, run.p + i);
    load_floats<V>(w.m, run.m + i);
    load_floats<V>(w.v, run.v + i);
    load_floats<V>(w.g, run.g + i);
}

/* The root and the division are the quick ones, a few units in the last place off: the exact ones branch, and four in a
 * row would wait for each other. */
template <class T, int V>
__device__ __forceinline__ void update(weights<V> &w, const struct run_of_weights &run, const struct adamw_constants &c,
                                       int64_t i) {
#pragma unroll
    for (int j = 0; j < V; j++) {
        float gradient = c.scale * w.g[j];
        w.m[j] = c.b1 * w.m[j] + c.rest1 * gradient;
        w.v[j] = c.b2 * w.v[j] + c.rest2 * gradient * gradient;
        float root = w.v[j] > 0 ? w.v[j] * rsqrtf(w.v[j]) : w.v[j];
        float moved = w.p[j] - (c.shrink * w.p[j] + __fdividef(c.rate * w.m[j], root * c.unbias + c.eps));
        /* Comparisons that are false for what is not a number, so that a clamp hides no failure. */
        moved = moved < run.low ? run.low : moved;
        w.p[j] = moved > run.high ? run.high : moved;
    }
    store_floats<V>(run.p + i, w.p);
    store_floats<V>(run.m + i, w.m);
    store_floats<V>(run.v + i, w.v);
    T *rounded = (T *)run.rounded + i;
    if constexpr (sizeof(T) == 2 && V == 4) { /* in one piece, which the compiler doesn't see by itself */
        uint64_t four = (uint64_t)pack_bf16(w.p[2], w.p[3]) << 32 | pack_bf16(w.p[0], w.p[1]);
        if (run.rounded) *reinterpret_cast<uint64_t *>(rounded) = four;
    } else if (run.rounded) {
        store_floats<V>(rounded, w.p);
    }
}

/* The block's constants, by its first thread. */
__device__ __forceinline__ struct adamw_constants shared_constants(const struct adamw_step *step,
                                                                   const struct run_of_weights &run) {
    __shared__ struct adamw_constants shared;
    if (threadIdx.x == 0) shared = constants_of(step, run);
    __syncthreads();
    return shared;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
adamw_kernel(const __grid_constant__ struct run_table table, const struct adamw_step *step) {
    if (step->skip) return;
    int s = 0;
    for (int beyond = table.count; s + 1 < beyond;) { /* the last run that begins at this block or before */
        int middle = (s + beyond) / 2;
        if (table.run[middle].first <= blockIdx.x) s = middle;
        else beyond = middle;
    }
    const struct run_of_weights run = table.run[s];
    int64_t from = (blockIdx.x - run.first) * (int64_t)SHARE, end = at_most(from + SHARE, run.count);
    int64_t whole = run.wide ? from + (end - from) / 4 * 4 : from;
    weights<4> w[ROUND];
#pragma unroll
    for (int k = 0; k < ROUND; k++) {
        int64_t i = from + 4 * (k * THREADS + (int)threadIdx.x);
        if (i < whole) load(w[k], run, i);
    }
    const struct adamw_constants c = shared_constants(step, run);
#pragma unroll
    for (int k = 0; k < ROUND; k++) {
        int64_t i = from + 4 * (k * THREADS + (int)threadIdx.x);
        if (i < whole) update<T>(w[k], run, c, i);
    }
    for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) {
        weights<1> one;
        load(one, run, i);
        update<T>(one, run, c, i);
    }
}

static struct run_of_weights run_of(const struct adamw_slice *slice, const struct adamw_segment *segment) {
    struct run_of_weights run = {};
    int64_t at = segment->offset;
    ASSERT(at >= 0 && segment->count >= 0 && at + segment->count <= slice->p.dim[0]);
    run.p = data_of<float>(slice->p) + at, run.m = data_of<float>(slice->m) + at;
    run.v = data_of<float>(slice->v) + at, run.g = data_of<float>(slice->g) + at;
    uintptr_t together = (uintptr_t)run.p | (uintptr_t)run.m | (uintptr_t)run.v | (uintptr_t)run.g;
    if (tensor_given(slice->rounded)) {
        size_t size = dtype_size(slice->rounded.dtype);
        run.rounded = (char *)slice->rounded.data + (size_t)at * size;
        together |= (uintptr_t)run.rounded * (sizeof(float) / size); /* 8 bytes of bf16 are a whole vector */
    }
    run.wide = together % 16 == 0;
    run.count = segment->count;
    run.decay = segment->decay, run.lr_scale = segment->lr_scale;
    run.low = segment->clamped ? segment->clamp_min : -INFINITY;
    run.high = segment->clamped ? segment->clamp_max : INFINITY;
    return run;
}

/* Launch for what is in the table, of `blocks` blocks, and empty it. */
static void update_runs(struct device *dev, struct run_table *table, int64_t blocks, const struct adamw_step *step) {
    with_type(dev->ops->act, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, adamw_kernel<T>, (unsigned)blocks, THREADS, 0, *table, step);
    });
    table->count = 0;
}

extern "C" void cuda_adamw(struct device *dev, const struct adamw_slice *slices, int64_t count,
                           const struct adamw_step *step) {
    struct run_table table;
    int64_t blocks = 0;
    table.count = 0;
    for (int64_t s = 0; s < count; s++) {
        for (int64_t i = 0; i < slices[s].count; i++) {
            struct run_of_weights run = run_of(&slices[s], &slices[s].segments[i]);
            if (run.count == 0) continue;
            run.first = blocks;
            blocks += ceil_div(run.count, SHARE);
            table.run[table.count++] = run;
            if (table.count < TABLE) continue;
            update_runs(dev, &table, blocks, step);
            blocks = 0;
        }
    }
    if (table.count > 0) update_runs(dev, &table, blocks, step);
}
