/* conv.cu: causal depthwise convolution + SiLU: forward, backward, one step.
 *
 *   c[t,k] = bias[k] + sum_{w<W} weight[k,w] x[t-(W-1)+w, k]        y[t,k] = silu(c[t,k])
 *   dc = dy silu'(c)    dx[t] = sum_{s<W} weight[W-1-s] dc[t+s]
 *   dweight[w] = sum dc[t] x[t-(W-1)+w]    dbias = sum dc
 *
 * A thread owns V neighbouring channels and walks a run of tokens, the last W inputs in registers, so each input is read
 * once (and W-1 tokens before the run again). Backward walks the run and W-1 tokens behind it: c is computed again,
 * dc[t..t+W-1] gives dx[t]. A tap of another document, or before the row where there is no initial state, is 0; so is
 * dc of a later document for dx. The sums for dweight and dbias stay in registers along the run, are added over the runs
 * of a block in shared memory, in order, and written as one partial row a block for reduce.cu.
 * Bytes an element with e bytes an activation: forward 2e, backward 3e (+ partials, (W+1) 4 / 256). Bound by bandwidth:
 * B 8, T 2048, C 4096 in bf16: 0.064 ms forward, 0.10 ms backward at 4.2 TB/s.
 */
#include "kernels/cuda/launch.cuh"

/* A block: LANES threads along channels, RUNS runs of RUN tokens. Kernels are built for windows of TAPS, the width that
 * all published models have, and of TAPS_MAX, whose first taps are left out for narrower ones. */
enum { TAPS = 4, TAPS_MAX = 8, RUN = 32, LANES = 32, RUNS = 8 };

struct conv_problem {
    int64_t B, T, C, W;
    int64_t x_row, x_step, y_row, y_step; /* strides of x and of y (or dy), over batch rows and over time */
    const float *weight, *bias, *initial; /* initial: NULL when absent */
    const int32_t *doc;                   /* NULL: one document a row */
    int64_t strips;                       /* blocks along time of one batch row */
};

/* Where a thread works. */
template <int V> struct conv_place {
    int64_t b, first, end, k; /* batch row, run of tokens, first channel */
    bool inside;
};

template <int V> __device__ conv_place<V> place_of(const conv_problem &p) {
    conv_place<V> at;
    at.b = blockIdx.y / p.strips;
    at.first = (blockIdx.y % p.strips * RUNS + threadIdx.y) * RUN;
    at.end = at.first + RUN < p.T ? at.first + RUN : p.T;
    at.k = ((int64_t)blockIdx.x * LANES + threadIdx.x) * V;
    at.inside = at.k < p.C && at.first < p.T;
    return at;
}

__device__ __forceinline__ int32_t document_at(const conv_problem &p, int64_t b, int64_t t) {
    return p.doc && t >= 0 ? p.doc[b * p.T + t] : 0;
}

/* The input at time t of batch row b; times before the row are the initial state's, or 0. */
template <class T, int V>
__device__ __forceinline__ void input_at(float (&out)[V], const conv_problem &p, const T *x, int64_t b, int64_t t,
                                         int64_t k) {
    if (t >= 0) load_floats<V>(out, x + b * p.x_row + t * p.x_step + k);
    else if (p.initial && t >= -(p.W - 1)) load_floats<V>(out, p.initial + (b * (p.W - 1) + p.W - 1 + t) * p.C + k);
    else
#pragma unroll
        for (int j = 0; j < V; j++) out[j] = 0;
}

template <int V, int W>
__device__ __forceinline__ void taps_of(float (&taps)[W][V], float (&bias)[V], const conv_problem &p, int64_t k) {
    int skip = W - (int)p.W;
#pragma unroll
    for (int j = 0; j < V; j++) {
        bias[j] = p.bias[k + j];
#pragma unroll
        for (int w = 0; w < W; w++) taps[w][j] = w >= skip ? p.weight[(k + j) * p.W + w - skip] : 0;
    }
}

/* The last W inputs and their documents, oldest first, moved on by one token. The first `skip` are of no account. */
template <int V, int W> struct window {
    float x[W][V];
    int32_t doc[W];
    int skip;

    template <class T>
    __device__ __forceinline__ void push(const conv_problem &p, const T *in, int64_t b, int64_t t, int64_t k) {
#pragma unroll
        for (int w = 0; w + 1 < W; w++) {
            doc[w] = doc[w + 1];
#pragma unroll
            for (int j = 0; j < V; j++) x[w][j] = x[w + 1][j];
        }
        input_at<T, V>(x[W - 1], p, in, b, t, k);
        doc[W - 1] = document_at(p, b, t);
    }

    __device__ __forceinline__ void convolve(float (&c)[V], const float (&taps)[W][V], const float (&bias)[V]) const {
#pragma unroll
        for (int j = 0; j < V; j++) c[j] = bias[j];
#pragma unroll
        for (int w = 0; w < W; w++)
            if (w >= skip && doc[w] == doc[W - 1])
#pragma unroll
                for (int j = 0; j < V; j++) c[j] += taps[w][j] * x[w][j];
    }
};

template <class T, int V, int W>
__global__ void __launch_bounds__(LANES *RUNS) conv_forward_kernel(T *y, const T *x, conv_problem p) {
    conv_place<V> at = place_of<V>(p);
    if (!at.inside) return;
    float taps[W][V], bias[V];
    window<V, W> in;
    in.skip = W - (int)p.W;
    taps_of<V, W>(taps, bias, p, at.k);
    for (int64_t t = at.first - (W - 1); t < at.first; t++) in.push(p, x, at.b, t, at.k);
    for (int64_t t = at.first; t < at.end; t++) {
        float c[V];
        in.push(p, x, at.b, t, at.k);
        in.convolve(c, taps, bias);
#pragma unroll
        for (int j = 0; j < V; j++) c[j] = silu_of(c[j]);
        store_floats<V>(y + at.b * p.y_row + t * p.y_step + at.k, c);
    }
}

/* The last W-1 inputs as a token after the last would see them: one thread an element. */
template <class T> __global__ void conv_final_kernel(float *final, const T *x, conv_problem p) {
    int64_t k = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y, before = p.W - 1;
    int64_t t = p.T - before + blockIdx.z;
    if (k >= p.C) return;
    float v = 0;
    if (document_at(p, b, t) == document_at(p, b, p.T - 1)) {
        if (t >= 0) v = to_float(x[b * p.x_row + t * p.x_step + k]);
        else if (p.initial) v = p.initial[(b * before + before + t) * p.C + k];
    }
    final[(b * before + blockIdx.z) * p.C + k] = v;
}

/* dinitial (optional) is written by the threads of the first run. */
template <class T, int V, int W>
__global__ void __launch_bounds__(LANES *RUNS)
conv_backward_kernel(T *dx, int64_t dx_row, int64_t dx_step, float *dinitial, float *partial, const T *dy,
                     const float *dfinal, const T *x, conv_problem p) {
    DYNAMIC_SHARED(float, shared); /* (RUNS, W+1, LANES*V) */
    conv_place<V> at = place_of<V>(p);
    float dtaps[W][V] = {}, dbias[V] = {};
    if (at.inside) {
        float taps[W][V], bias[V], dc[W][V]; /* dc of the last W tokens, oldest first */
        window<V, W> in;
        in.skip = W - (int)p.W;
        taps_of<V, W>(taps, bias, p, at.k);
#pragma unroll
        for (int w = 0; w < W; w++)
#pragma unroll
            for (int j = 0; j < V; j++) dc[w][j] = 0;
        for (int64_t t = at.first - (W - 1); t < at.first; t++) in.push(p, x, at.b, t, at.k);
        int64_t last = at.end + W - 1; /* tokens behind the run, whose dc reaches into it */
        for (int64_t t = at.first; t < last; t++) {
#pragma unroll
            for (int w = 0; w + 1 < W; w++)
#pragma unroll
                for (int j = 0; j < V; j++) dc[w][j] = dc[w + 1][j];
            if (t < p.T) {
                float c[V], d[V];
                in.push(p, x, at.b, t, at.k);
                in.convolve(c, taps, bias);
                load_floats<V>(d, dy + at.b * p.y_row + t * p.y_step + at.k);
#pragma unroll
                for (int j = 0; j < V; j++) dc[W - 1][j] = d[j] * silu_slope(c[j]);
            } else {
#pragma unroll
                for (int j = 0; j < V; j++) dc[W - 1][j] = 0;
            }
            if (t < at.end) {
#pragma unroll
                for (int w = 0; w < W; w++)
#pragma unroll
                    for (int j = 0; j < V; j++)
                        dtaps[w][j] += in.doc[w] == in.doc[W - 1] ? dc[W - 1][j] * in.x[w][j] : 0.0f;
#pragma unroll
                for (int j = 0; j < V; j++) dbias[j] += dc[W - 1][j];
            }
            /* Now dc[s] is of token tx + s, tx = t - (W-1): dx[tx] is complete. */
            int64_t tx = t - (W - 1);
            bool before = tx < 0 && tx > -p.W && at.first == 0 && dinitial != NULL;
            if (tx < at.first && !before) continue;
            float sum[V] = {};
            int32_t own = document_at(p, at.b, tx);
#pragma unroll
            for (int s = 0; s < W; s++) {
                bool reads = s < p.W && tx + s >= 0 && tx + s < p.T && document_at(p, at.b, tx + s) == own;
#pragma unroll
                for (int j = 0; j < V; j++) sum[j] += reads ? taps[W - 1 - s][j] * dc[s][j] : 0.0f;
            }
            int64_t kept = tx - (p.T - (p.W - 1)); /* place in the final state */
            if (dfinal && kept >= 0 && own == document_at(p, at.b, p.T - 1)) {
                float more[V];
                load_floats<V>(more, dfinal + (at.b * (p.W - 1) + kept) * p.C + at.k);
#pragma unroll
                for (int j = 0; j < V; j++) sum[j] += more[j];
            }
            if (before) store_floats<V>(dinitial + (at.b * (p.W - 1) + p.W - 1 + tx) * p.C + at.k, sum);
            else store_floats<V>(dx + at.b * dx_row + tx * dx_step + at.k, sum);
        }
    }
    float *mine = shared + ((int64_t)threadIdx.y * (W + 1) * LANES + threadIdx.x) * V;
#pragma unroll
    for (int w = 0; w <= W; w++)
#pragma unroll
        for (int j = 0; j < V; j++) mine[w * LANES * V + j] = w < W ? dtaps[w < W ? w : 0][j] : dbias[j];
    __syncthreads();
    /* The block's row of partials: (W+1, C), dweight transposed and dbias. */
    for (int i = threadIdx.y * LANES + threadIdx.x; i < (W + 1) * LANES * V; i += LANES * RUNS) {
        int64_t k = (int64_t)blockIdx.x * LANES * V + i % (LANES * V), w = i / (LANES * V) - (W - p.W);
        float sum = 0;
        for (int run = 0; run < RUNS; run++) sum += shared[run * (W + 1) * LANES * V + i];
        if (k < p.C && w >= 0) partial[(blockIdx.y * (p.W + 1) + w) * p.C + k] = sum;
    }
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

static int64_t strips_of(int64_t T) {
    return ceil_div(T, RUN * RUNS);
}

static conv_problem problem_of(tensor x, tensor y, tensor weight, tensor bias, tensor initial, tensor doc) {
    int64_t B = x.dim[0], T = x.dim[1], C = x.dim[2], W = weight.dim[1];
    ASSERT(W >= 2 && W <= TAPS_MAX && tensor_is(y, 3, B, T, C) && y.dtype == x.dtype && weight.dtype == DTYPE_F32);
    return {B, T, C, W, x.stride[0], x.stride[1], y.stride[0], y.stride[1], data_of<float>(weight),
            data_of<float>(bias), data_of<float>(initial), data_of<int32_t>(doc), strips_of(T)};
}

/* f(constant<size of the window>). */
template <class F> static void with_taps(int64_t W, F f) {
    if (W == TAPS) f(constant<TAPS>());
    else f(constant<TAPS_MAX>());
}

static dim3 grid_of(const conv_problem &p, int V) {
    return dim3((unsigned)ceil_div(p.C, LANES * V), (unsigned)(p.B * p.strips));
}

extern "C" void cuda_conv_forward(struct device *dev, tensor y, tensor final, tensor x, tensor weight, tensor bias,
                                  tensor initial, tensor doc) {
    conv_problem p = problem_of(x, y, weight, bias, initial, doc);
    int W = (int)weight.dim[1];
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = vectors_fit(x, 4) && vectors_fit(y, 4) && vectors_fit(initial, 4);
        with_width(wide, [&](auto width) {
            with_taps(W, [&](auto taps) {
                constexpr int V = width.value, WINDOW = taps.value;
                LAUNCH(dev, (conv_forward_kernel<T, V, WINDOW>), grid_of(p, V), dim3(LANES, RUNS), 0, data_of<T>(y),
                       data_of<T>(x), p);
            });
        });
        if (!tensor_given(final)) return;
        dim3 grid((unsigned)ceil_div(p.C, 128), (unsigned)p.B, (unsigned)(W - 1));
        LAUNCH(dev, conv_final_kernel<T>, grid, 128, 0, data_of<float>(final), data_of<T>(x), p);
    });
}

extern "C" size_t cuda_conv_backward_scratch(int64_t B, int64_t T, int64_t C, int64_t W) {
    return (size_t)(B * strips_of(T) * (W + 1) * C) * sizeof(float);
}

extern "C" void cuda_conv_backward(struct device *dev, tensor dx, tensor dinitial, tensor dweight, tensor dbias,
                                   tensor dy, tensor dfinal, tensor x, tensor weight, tensor bias, tensor initial,
                                   tensor doc, void *scratch) {
    conv_problem p = problem_of(x, dy, weight, bias, initial, doc);
    int W = (int)weight.dim[1];
    ASSERT(tensor_is(dx, 3, p.B, p.T, p.C));
    float *partial = (float *)scratch;
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = vectors_fit(x, 4) && vectors_fit(dx, 4) && vectors_fit(dy, 4) && vectors_fit(initial, 4) &&
                    vectors_fit(dfinal, 4) && vectors_fit(dinitial, 4);
        with_width(wide, [&](auto width) {
            with_taps(W, [&](auto taps) {
                constexpr int V = width.value, WINDOW = taps.value;
                size_t room = (size_t)RUNS * (WINDOW + 1) * LANES * V * sizeof(float);
                LAUNCH(dev, (conv_backward_kernel<T, V, WINDOW>), grid_of(p, V), dim3(LANES, RUNS), room, data_of<T>(dx),
                       dx.stride[0], dx.stride[1], data_of<float>(dinitial), partial, data_of<T>(dy),
                       data_of<float>(dfinal), data_of<T>(x), p);
            });
        });
    });
    struct sum_parts parts = {W + 1, {}}; /* dweight (C,W) is the transpose of the first W parts */
    for (int w = 0; w < W; w++) parts.part[w] = {data_of<float>(dweight) + w, W};
    parts.part[W] = {data_of<float>(dbias), 1};
    cuda_add_partial_parts(dev, parts, partial, p.B * p.strips, p.C);
}

/* --- one token ---------------------------------------------------------------------------------------------------- */

template <class T>
__global__ void conv_step_kernel(T *y, int64_t y_step, float *state, const T *x, int64_t x_step, const float *weight,
                                 const float *bias, int64_t C, int W) {
    int64_t k = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
    if (k >= C) return;
    float *past = state + b * (W - 1) * C + k, now = to_float(x[b * x_step + k]), c = bias[k];
    for (int w = 0; w < W - 1; w++) {
        c += weight[k * W + w] * past[w * C];
        past[w * C] = w + 1 < W - 1 ? past[(w + 1) * C] : now;
    }
    y[b * y_step + k] = from_float<T>(silu_of(c + weight[k * W + W - 1] * now));
}

extern "C" void cuda_conv_step(struct device *dev, tensor y, tensor state, tensor x, tensor weight, tensor bias) {
    int64_t B = x.dim[0], C = x.dim[1], W = weight.dim[1];
    ASSERT(W >= 2 && W <= TAPS_MAX && tensor_is(state, 3, B, W - 1, C) && tensor_is(y, 2, B, C));
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, conv_step_kernel<T>, dim3((unsigned)ceil_div(C, 128), (unsigned)B), 128, 0, data_of<T>(y),
               y.stride[0], data_of<float>(state), data_of<T>(x), x.stride[0], data_of<float>(weight),
               data_of<float>(bias), C, (int)W);
    });
}
