/* optimizer.cu: the sum of squares of the gradients, AdamW over all tensors of a flat array, and the rounding of weights
 * for products.
 *
 * sum_squares: SUM_BLOCKS blocks of fixed shares, added in double (fp64 is cheap on the chips this is for), then one
 * block adds the blocks' sums in order. Bytes 4n.
 * adamw: a block takes CHUNK elements of one segment; the table of segments travels with the launch, TABLE of them at a
 * time, so a bucket of tensors is one launch. Bytes: p, m, v read and written, g read, 28n; bound by bandwidth: 129 M
 * parameters in 0.9 ms at 4.2 TB/s. The step's scalars are read from device memory.
 * step_scalars: one thread, a few hundred operations in double: under 10 us, and no word from the host in a step.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/step_decide.h"

enum { THREADS = 256, CHUNK = 4096, TABLE = 64 };

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

template <class T> __global__ void convert_kernel(T *to, const float *from, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) to[i] = from_float<T>(from[i]);
}

extern "C" void cuda_convert(struct device *dev, tensor to, tensor from) {
    int64_t n = tensor_count(from);
    ASSERT(tensor_is(to, 1, n) && from.dtype == DTYPE_F32);
    with_type(to.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, convert_kernel<T>, (unsigned)ceil_div(n, THREADS), THREADS, 0, data_of<T>(to), data_of<float>(from),
               n);
    });
}

struct segment_table {
    int count;
    int64_t first[TABLE]; /* number of the segment's first chunk among those of the launch */
    struct adamw_segment segment[TABLE];
};

__global__ void __launch_bounds__(THREADS)
adamw_kernel(float *p, float *m, float *v, const float *g, const __grid_constant__ struct segment_table table,
             const struct adamw_step *step) {
    if (step->skip) return;
    int s = 0;
    while (s + 1 < table.count && table.first[s + 1] <= blockIdx.x) s++;
    struct adamw_segment segment = table.segment[s];
    int64_t from = (blockIdx.x - table.first[s]) * CHUNK, end = from + CHUNK;
    if (end > segment.count) end = segment.count;
    float scale = (float)step->grad_scale, b1 = (float)step->beta1, b2 = (float)step->beta2, eps = (float)step->eps;
    double lr = step->lr * (double)segment.lr_scale;
    float shrink = (float)(step->decay_rate * (double)segment.decay), rate = (float)(lr / step->correction1);
    float unbias = (float)(1.0 / sqrt(step->correction2));
    float low = segment.clamped ? segment.clamp_min : -INFINITY, high = segment.clamped ? segment.clamp_max : INFINITY;
    for (int64_t i = segment.offset + from + threadIdx.x; i < segment.offset + end; i += THREADS) {
        float gradient = scale * g[i];
        float mean = b1 * m[i] + (1.0f - b1) * gradient, square = b2 * v[i] + (1.0f - b2) * gradient * gradient;
        m[i] = mean;
        v[i] = square;
        float moved = p[i] - (shrink * p[i] + rate * mean / (sqrtf(square) * unbias + eps));
        /* Comparisons that are false for what is not a number, so that a clamp hides no failure. */
        moved = moved < low ? low : moved;
        p[i] = moved > high ? high : moved;
    }
}

extern "C" void cuda_adamw(struct device *dev, tensor p, tensor m, tensor v, tensor g,
                           const struct adamw_segment *segments, int64_t count, const struct adamw_step *step) {
    for (int64_t from = 0; from < count; from += TABLE) {
        struct segment_table table;
        int64_t chunks = 0;
        table.count = (int)at_most(count - from, TABLE);
        for (int i = 0; i < table.count; i++) {
            table.segment[i] = segments[from + i];
            table.first[i] = chunks;
            chunks += ceil_div(segments[from + i].count, CHUNK);
        }
        if (chunks == 0) continue;
        LAUNCH(dev, adamw_kernel, (unsigned)chunks, THREADS, 0, data_of<float>(p), data_of<float>(m), data_of<float>(v),
               data_of<float>(g), table, step);
    }
}
