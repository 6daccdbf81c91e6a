/* conv.cu: causal depthwise convolution + SiLU: forward, backward, one step.
 *
 *   c[t,k] = bias[k] + sum_{w<W} weight[k,w] x[t-(W-1)+w, k]        y[t,k] = silu(c[t,k])
 *   dc = dy silu'(c)    dx[t] = sum_{s<W} weight[W-1-s] dc[t+s]
 *   dweight[w] = sum dc[t] x[t-(W-1)+w]    dbias = sum dc
 *
 * A thread owns V neighbouring channels and walks a run of tokens, the last W inputs in registers, so each input is
 * read once (and W-1 tokens before the run again). V channels are 16 bytes in forward and a half of that in backward,
 * which has four times the numbers to keep; STEP tokens are on their way from memory at once. Backward walks the run
 * and W-1 tokens behind it: c is computed again, dc[t..t+W-1] gives dx[t]. A tap of another document, or before the
 * row where there is no initial state, is 0; so is dc of a later document for dx. Documents are looked at only where
 * they are given. The sums for dweight and dbias stay in registers along the run, are added over the runs of a block
 * in shared memory, in order, and written as one partial row a block; a second kernel adds the rows to dweight and
 * dbias.
 *
 * Bytes an element with e bytes an activation: forward 2e (1 + 3/64 with the overlap of runs), backward 3e (1 + 6/128);
 * about 13 and 28 instructions. Bound by bandwidth: B 8, T 2048, C 4096 in bf16: 0.064 ms forward, 0.10 ms backward at
 * 4.2 TB/s; 0.09 and 0.14 at 3.0, where an H100 takes 0.10 and 0.26.
 */
#include "kernels/cuda/launch.cuh"

/* A block: LANES threads along channels, RUNS runs of tokens. Kernels are built for windows of TAPS, the width that all
 * published models have, and of TAPS_MAX, whose first taps are left out for narrower ones. */
enum { TAPS = 4, TAPS_MAX = 8, LANES = 32, RUNS = 4, STEP = 4, RUN_FORWARD = 32, RUN_BACKWARD = 64 };

struct conv_problem {
    int64_t B, T, C, W;
    int64_t x_row, x_step, y_row, y_step; /* strides of x and of y (or dy), over batch rows and over time */
    const float *weight, *bias, *initial; /* initial: NULL when absent */
    const int32_t *doc;                   /* NULL: one document a row */
    int64_t run, strips;                  /* tokens of a run; blocks along time of one batch row */
};

/* Where a thread works. */
struct conv_place {
    int64_t b, first, end, k; /* batch row, run of tokens, first channel */
    bool inside;
};

template <int V> __device__ conv_place place_of(const conv_problem &p) {
    conv_place at;
    at.b = blockIdx.y / p.strips;
    at.first = (blockIdx.y % p.strips * RUNS + threadIdx.y) * p.run;
    at.end = at.first + p.run < p.T ? at.first + p.run : p.T;
    at.k = ((int64_t)blockIdx.x * LANES + threadIdx.x) * V;
    at.inside = at.k < p.C && at.first < p.T;
    return at;
}

__device__ __forceinline__ int32_t document_at(const conv_problem &p, int64_t b, int64_t t) {
    return p.doc && t >= 0 ? p.doc[b * p.T + t] : 0;
}

template <class T, int V> __device__ __forceinline__ void unpack(float (&out)[V], const pack<T, V> &from) {
#pragma unroll
    for (int j = 0; j < V; j++) out[j] = to_float(from.v[j]);
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

/* A view's tokens from the start of a run on, of the thread's channels. Places in a run are 32-bit numbers. */
template <class T, int V> struct conv_line {
    char *base;
    int step; /* bytes */

    __device__ __forceinline__ conv_line(const T *data, int64_t row, int64_t elements, const conv_place &at) {
        base = (char *)(data + at.b * row + at.first * elements + at.k);
        step = (int)(elements * (int64_t)sizeof(T));
    }
    __device__ __forceinline__ pack<T, V> *at(int t) const {
        return reinterpret_cast<pack<T, V> *>(base + (int64_t)t * step);
    }
    /* STEP tokens from t on; from `end` on, the last before it again. */
    __device__ __forceinline__ void load(pack<T, V> (&to)[STEP], int t, int end) const {
#pragma unroll
        for (int s = 0; s < STEP; s++) to[s] = *at(min(t + s, end - 1));
    }
    __device__ __forceinline__ void store(int t, const float (&v)[V]) const {
        store_floats<V>(at(t)->v, v);
    }
};

/* The documents of STEP tokens from t on; from `end` on, that of the last before it again. */
__device__ __forceinline__ void load_documents(int32_t (&to)[STEP], const conv_problem &p, const conv_place &at, int t,
                                               int end) {
    const int32_t *from = p.doc ? p.doc + at.b * p.T + at.first : NULL;
#pragma unroll
    for (int s = 0; s < STEP; s++) to[s] = from ? from[min(t + s, end - 1)] : 0;
}

/* The taps and the bias of the thread's channels. The block's lie in one stretch of memory, which its threads fetch
 * together: each thread for itself would touch 32 lines with every load. Taps that a narrower window does not have
 * are 0. Every thread of the block takes part. */
template <int V, int W>
__device__ __forceinline__ void taps_of(float (&taps)[W][V], float (&bias)[V], const conv_problem &p) {
    __shared__ float shared[W + 1][LANES * V];
    int skip = W - (int)p.W, width = (int)p.W, own = threadIdx.x * V;
    int64_t first = (int64_t)blockIdx.x * LANES * V;
    int there = (int)at_most(p.C - first, LANES * V);
    for (int i = threadIdx.y * LANES + threadIdx.x; i < there * width; i += LANES * RUNS)
        shared[skip + i % width][i / width] = p.weight[first * width + i];
    for (int i = threadIdx.y * LANES + threadIdx.x; i < there; i += LANES * RUNS) shared[W][i] = p.bias[first + i];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; j++) {
        bool exists = own + j < there;
        bias[j] = exists ? shared[W][own + j] : 0;
#pragma unroll
        for (int w = 0; w < W; w++) taps[w][j] = exists && w >= skip ? shared[w][own + j] : 0;
    }
}

/* The last W inputs and their documents, oldest first. */
template <int V, int W, bool DOC> struct window {
    float x[W][V];
    int32_t doc[W];

    /* Make room for the next token: x[W-1] and doc[W-1] are to be set. */
    __device__ __forceinline__ void move() {
#pragma unroll
        for (int w = 0; w + 1 < W; w++) {
            if (DOC) doc[w] = doc[w + 1];
#pragma unroll
            for (int j = 0; j < V; j++) x[w][j] = x[w + 1][j];
        }
    }
    /* As the first token of a run finds it. */
    template <class T>
    __device__ __forceinline__ void start(const conv_problem &p, const T *in, const conv_place &at) {
#pragma unroll
        for (int w = 1; w < W; w++) {
            int64_t t = at.first - W + w;
            input_at<T, V>(x[w], p, in, at.b, t, at.k);
            if (DOC) doc[w] = document_at(p, at.b, t);
        }
    }
    /* f(w) for the tokens of the document of token `mine`. Numbers of documents do not decrease, so mostly two of them
     * tell that there is one document only. */
    template <class F> __device__ __forceinline__ void each_same(int mine, F f) const {
        if (!DOC || doc[0] == doc[W - 1]) {
#pragma unroll
            for (int w = 0; w < W; w++) f(w);
        } else {
#pragma unroll
            for (int w = 0; w < W; w++)
                if (doc[w] == doc[mine]) f(w);
        }
    }
    __device__ __forceinline__ void convolve(float (&c)[V], const float (&taps)[W][V], const float (&bias)[V]) const {
#pragma unroll
        for (int j = 0; j < V; j++) c[j] = bias[j];
        each_same(W - 1, [&](int w) {
#pragma unroll
            for (int j = 0; j < V; j++) c[j] += taps[w][j] * x[w][j];
        });
    }
};

template <class T, int V, int W, bool DOC>
__global__ void __launch_bounds__(LANES *RUNS, 3) conv_forward_kernel(T *y, const T *x, conv_problem p) {
    conv_place at = place_of<V>(p);
    float taps[W][V], bias[V];
    window<V, W, DOC> in;
    taps_of<V, W>(taps, bias, p);
    if (!at.inside) return;
    in.start(p, x, at);
    conv_line<T, V> from(x, p.x_row, p.x_step, at), to(y, p.y_row, p.y_step, at);
    int length = (int)(at.end - at.first);
    for (int t = 0; t < length; t += STEP) {
        pack<T, V> ahead[STEP];
        int32_t documents[STEP];
        from.load(ahead, t, length);
        if (DOC) load_documents(documents, p, at, t, length);
#pragma unroll
        for (int s = 0; s < STEP; s++) {
            float c[V];
            if (t + s >= length) break;
            in.move();
            unpack(in.x[W - 1], ahead[s]);
            if (DOC) in.doc[W - 1] = documents[s];
            in.convolve(c, taps, bias);
#pragma unroll
            for (int j = 0; j < V; j++) c[j] = silu_of(c[j]);
            to.store(t + s, c);
        }
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

/* What a thread of backward carries along its run: dc of the last W tokens, oldest first, and the sums. */
template <int V, int W> struct conv_sums {
    float dc[W][V], dtaps[W][V], dbias[V];

    /* c of the newest token, d its dy: its dc, and, where it belongs to the run, its part of the sums. */
    template <bool DOC>
    __device__ __forceinline__ void add(const window<V, W, DOC> &in, const float (&c)[V], const float (&d)[V],
                                        bool there, bool counts) {
#pragma unroll
        for (int j = 0; j < V; j++) {
#pragma unroll
            for (int w = 0; w + 1 < W; w++) dc[w][j] = dc[w + 1][j];
            dc[W - 1][j] = there ? d[j] * silu_slope(c[j]) : 0.0f;
        }
        if (!counts) return;
#pragma unroll
        for (int j = 0; j < V; j++) dbias[j] += dc[W - 1][j];
        in.each_same(W - 1, [&](int w) {
#pragma unroll
            for (int j = 0; j < V; j++) dtaps[w][j] += dc[W - 1][j] * in.x[w][j];
        });
    }
};

/* dx of the oldest token of the window, which is `tx`; before the row, of the initial state. */
template <class T, int V, int W, bool DOC>
__device__ __forceinline__ void store_dx(const conv_line<T, V> &dx, float *dinitial, const float *dfinal,
                                         const float (&taps)[W][V], const conv_sums<V, W> &sums,
                                         const window<V, W, DOC> &in, const conv_problem &p, const conv_place &at,
                                         int64_t tx) {
    float sum[V] = {};
    in.each_same(0, [&](int s) {
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += taps[W - 1 - s][j] * sums.dc[s][j];
    });
    int64_t kept = tx - (p.T - (p.W - 1)); /* place in the final state */
    if (dfinal && kept >= 0 && (!DOC || in.doc[0] == document_at(p, at.b, p.T - 1))) {
        float more[V];
        load_floats<V>(more, dfinal + (at.b * (p.W - 1) + kept) * p.C + at.k);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += more[j];
    }
    if (tx < 0) store_floats<V>(dinitial + (at.b * (p.W - 1) + p.W - 1 + tx) * p.C + at.k, sum);
    else dx.store((int)(tx - at.first), sum);
}

/* The block's row of partials, (W+1, C): dweight transposed and dbias. `shared` is (RUNS, W+1, LANES V). */
template <int V, int W>
__device__ __forceinline__ void store_partials(float *partial, float *shared, const conv_sums<V, W> &sums,
                                               const conv_problem &p) {
    float *mine = shared + ((int64_t)threadIdx.y * (W + 1) * LANES + threadIdx.x) * V;
#pragma unroll
    for (int j = 0; j < V; j++) {
#pragma unroll
        for (int w = 0; w < W; w++) mine[w * LANES * V + j] = sums.dtaps[w][j];
        mine[W * LANES * V + j] = sums.dbias[j];
    }
    __syncthreads();
    for (int i = threadIdx.y * LANES + threadIdx.x; i < (W + 1) * LANES * V; i += LANES * RUNS) {
        int64_t k = (int64_t)blockIdx.x * LANES * V + i % (LANES * V), w = i / (LANES * V) - (W - p.W);
        float sum = 0;
        for (int run = 0; run < RUNS; run++) sum += shared[run * (W + 1) * LANES * V + i];
        if (k < p.C && w >= 0) partial[(blockIdx.y * (p.W + 1) + w) * p.C + k] = sum;
    }
}

/* dinitial (optional) is written by the threads of the first run. */
template <class T, int V, int W, bool DOC>
__global__ void __launch_bounds__(LANES *RUNS, W == TAPS ? 3 : 2)
conv_backward_kernel(T *dx, int64_t dx_row, int64_t dx_step, float *dinitial, float *partial, const T *dy,
                     const float *dfinal, const T *x, conv_problem p) {
    DYNAMIC_SHARED(float, shared);
    conv_place at = place_of<V>(p);
    conv_sums<V, W> sums = {};
    float taps[W][V], bias[V];
    taps_of<V, W>(taps, bias, p);
    if (at.inside) {
        window<V, W, DOC> in;
        in.start(p, x, at);
        conv_line<T, V> from(x, p.x_row, p.x_step, at), from_dy(dy, p.y_row, p.y_step, at);
        conv_line<T, V> to(dx, dx_row, dx_step, at);
        /* The walk goes W-1 tokens on behind the run: their dc reaches into it. */
        int length = (int)(at.end - at.first), there = (int)at_most(p.T - at.first, length + W - 1);
        int lead = at.first > 0 || !dinitial ? W - 1 : W - (int)p.W; /* steps before the first dx */
        for (int t = 0; t < length + W - 1; t += STEP) {
            pack<T, V> ahead[STEP], ahead_dy[STEP];
            int32_t documents[STEP];
            if (DOC) load_documents(documents, p, at, t, there);
            from.load(ahead, t, there);
            from_dy.load(ahead_dy, t, there);
#pragma unroll
            for (int s = 0; s < STEP; s++) {
                int now = t + s;
                float c[V], d[V];
                if (now >= length + W - 1) break;
                in.move();
                unpack(in.x[W - 1], ahead[s]);
                unpack(d, ahead_dy[s]);
                if (DOC) in.doc[W - 1] = documents[s];
                in.convolve(c, taps, bias);
                sums.add(in, c, d, now < there, now < length);
                if (now >= lead)
                    store_dx<T, V, W, DOC>(to, dinitial, dfinal, taps, sums, in, p, at, at.first + now - (W - 1));
            }
        }
    }
    store_partials(partial, shared, sums, p);
}

/* dweight (C,W) += the transpose of the sums of the first W rows of the partials (rows, W+1, C), dbias (C) += the
 * others'. A block takes WARP columns; its warps take the partials in turn, and their sums are added in order. */
__global__ void __launch_bounds__(LANES *RUNS)
conv_add_kernel(float *dweight, float *dbias, const float *partial, int64_t rows, int64_t C, int W) {
    __shared__ float part[RUNS][LANES];
    int64_t k = (int64_t)blockIdx.x * LANES + threadIdx.x;
    int w = blockIdx.y;
    float sum = 0;
    for (int64_t r = threadIdx.y; k < C && r < rows; r += RUNS) sum += partial[(r * (W + 1) + w) * C + k];
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || k >= C) return;
    float *to = w < W ? dweight + k * W + w : dbias + k;
    sum = *to;
    for (int run = 0; run < RUNS; run++) sum += part[run][threadIdx.x];
    *to = sum;
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

static int64_t strips_of(int64_t T, int64_t run) {
    return ceil_div(T, run * RUNS);
}

static conv_problem problem_of(tensor x, tensor y, tensor weight, tensor bias, tensor initial, tensor doc,
                               int64_t run) {
    int64_t B = x.dim[0], T = x.dim[1], C = x.dim[2], W = weight.dim[1];
    ASSERT(W >= 2 && W <= TAPS_MAX && tensor_is(y, 3, B, T, C) && y.dtype == x.dtype && weight.dtype == DTYPE_F32);
    ASSERT((x.stride[1] > y.stride[1] ? x.stride[1] : y.stride[1]) * 4 <= INT32_MAX); /* conv_line */
    return {B, T, C, W, x.stride[0], x.stride[1], y.stride[0], y.stride[1], data_of<float>(weight),
            data_of<float>(bias), data_of<float>(initial), data_of<int32_t>(doc), run, strips_of(T, run)};
}

/* f(constant<size of the window>, constant<1 where documents are given>). */
template <class F> static void with_taps(const conv_problem &p, F f) {
    if (p.W == TAPS && p.doc) f(constant<TAPS>(), constant<1>());
    else if (p.W == TAPS) f(constant<TAPS>(), constant<0>());
    else f(constant<TAPS_MAX>(), constant<1>());
}

static dim3 grid_of(const conv_problem &p, int V) {
    return dim3((unsigned)ceil_div(p.C, LANES * V), (unsigned)(p.B * p.strips));
}

extern "C" void cuda_conv_forward(struct device *dev, tensor y, tensor final, tensor x, tensor weight, tensor bias,
                                  tensor initial, tensor doc) {
    conv_problem p = problem_of(x, y, weight, bias, initial, doc, RUN_FORWARD);
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        constexpr int MOST = 16 / sizeof(T);
        bool fit = vectors_fit(x, MOST) && vectors_fit(y, MOST) && vectors_fit(initial, MOST);
        with_taps(p, [&](auto taps, auto documents) {
            constexpr int WINDOW = taps.value, WIDE = WINDOW == TAPS ? MOST : 4;
            constexpr bool DOC = documents.value;
            if (fit)
                LAUNCH(dev, (conv_forward_kernel<T, WIDE, WINDOW, DOC>), grid_of(p, WIDE), dim3(LANES, RUNS), 0,
                       data_of<T>(y), data_of<T>(x), p);
            else
                LAUNCH(dev, (conv_forward_kernel<T, 1, WINDOW, DOC>), grid_of(p, 1), dim3(LANES, RUNS), 0,
                       data_of<T>(y), data_of<T>(x), p);
        });
        if (!tensor_given(final)) return;
        dim3 grid((unsigned)ceil_div(p.C, 128), (unsigned)p.B, (unsigned)(p.W - 1));
        LAUNCH(dev, conv_final_kernel<T>, grid, 128, 0, data_of<float>(final), data_of<T>(x), p);
    });
}

/* The partials of all blocks. */
extern "C" size_t cuda_conv_backward_scratch(int64_t B, int64_t T, int64_t C, int64_t W) {
    return (size_t)(B * strips_of(T, RUN_BACKWARD) * (W + 1) * C) * sizeof(float);
}

extern "C" void cuda_conv_backward(struct device *dev, tensor dx, tensor dinitial, tensor dweight, tensor dbias,
                                   tensor dy, tensor dfinal, tensor x, tensor weight, tensor bias, tensor initial,
                                   tensor doc, void *scratch) {
    conv_problem p = problem_of(x, dy, weight, bias, initial, doc, RUN_BACKWARD);
    ASSERT(tensor_is(dx, 3, p.B, p.T, p.C) && dx.stride[1] * 4 <= INT32_MAX);
    float *partial = (float *)scratch;
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = vectors_fit(x, 4) && vectors_fit(dx, 4) && vectors_fit(dy, 4) && vectors_fit(initial, 4) &&
                    vectors_fit(dfinal, 4) && vectors_fit(dinitial, 4);
        with_width(wide, [&](auto width) {
            with_taps(p, [&](auto taps, auto documents) {
                constexpr int V = width.value, WINDOW = taps.value;
                constexpr bool DOC = documents.value;
                size_t room = (size_t)RUNS * (WINDOW + 1) * LANES * V * sizeof(float);
                LAUNCH(dev, (conv_backward_kernel<T, V, WINDOW, DOC>), grid_of(p, V), dim3(LANES, RUNS), room,
                       data_of<T>(dx), dx.stride[0], dx.stride[1], data_of<float>(dinitial), partial, data_of<T>(dy),
                       data_of<float>(dfinal), data_of<T>(x), p);
            });
        });
    });
    LAUNCH(dev, conv_add_kernel, dim3((unsigned)ceil_div(p.C, LANES), (unsigned)(p.W + 1)), dim3(LANES, RUNS), 0,
           data_of<float>(dweight), data_of<float>(dbias), partial, p.B * p.strips, p.C, (int)p.W);
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
