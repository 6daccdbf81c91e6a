/* conv.cu: causal depthwise convolution, with SiLU or without: forward, backward, one step.
 *
 *   c[t,k] = bias[k] + sum_{w<W} weight[k,w] x[t-(W-1)+w, k]        y[t,k] = silu(c[t,k]), or c[t,k]
 *   dc = dy silu'(c), or dy    dx[t] = sum_{s<W} weight[W-1-s] dc[t+s]
 *   dweight[w] = sum dc[t] x[t-(W-1)+w]    dbias = sum dc
 *
 * A thread owns V neighbouring channels and walks a run of tokens, the last W inputs in registers, so each input is
 * read once (and W-1 tokens before the run again). V channels are 16 bytes in forward and a half of that in backward,
 * which has four times the numbers to keep. What comes next is on its way to shared memory meanwhile, to places that
 * only the thread itself reads, so nothing waits for other threads: (STAGES-1) W tokens, some 50 KB a multiprocessor at
 * any time, which take no registers. Tokens are walked in groups of W, so that the window turns by whole groups and its
 * places are known when the kernel is compiled; most groups lie in one document and within the run, and are walked
 * without looking. Backward walks the run and W-1 tokens behind it: c is computed again, dc[t..t+W-1] gives dx[t]. A
 * tap of another document, or before the row where there is no initial state, is 0; so is dc of a later document for
 * dx. Documents are looked at only where they are given. The sums for dweight and dbias stay in registers along the
 * run, are added over the runs of a block in shared memory, in order, and written as one partial row a block; a second
 * kernel adds the rows to dweight and dbias.
 *
 * Bytes an element with e bytes an activation: forward 2e (1 + 3/64 with the overlap of runs), backward 3e (1 + 6/128);
 * about 13 and 28 instructions. Bound by bandwidth: B 8, T 2048, C 4096 in bf16: 0.064 ms forward, 0.10 ms backward at
 * 4.2 TB/s; 0.09 and 0.14 at 3.0. An H100 took 0.104 and 0.255 when a thread waited for its loads and moved its window
 * by a token at a time (57 instructions an element in backward, 0.13 ms of issue slots, next to nothing of it under the
 * loads), and 0.103 and 0.175 with both mended: three blocks a multiprocessor do 5.2 rounds, of which the last left the
 * chip idle for 15 and 18 % of the time (ncu). With four blocks, 3.9 rounds: 0.099 and 0.163. Where the last round
 * would be emptier, runs are longer (run_of): C 1792 of Mamba-2 129M, B 16, has 3.4 rounds of 64 tokens in backward,
 * or 3.0 of 76: 0.171 ms for 0.182, half of what the rounds say. Forward, bound by the memory, gains nothing by it.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared.cuh"

/* A block: LANES threads along channels, RUNS runs of tokens. Kernels are built for windows of TAPS, the width that all
 * published models have, and of TAPS_MAX, whose first taps are left out for narrower ones. */
enum { TAPS = 4, TAPS_MAX = 8, LANES = 32, RUNS = 4, STAGES = 3, RUN_FORWARD = 32, RUN_BACKWARD = 64 /* at least */ };

struct conv_problem {
    int64_t B, T, C, W;
    int64_t x_row, x_step, y_row, y_step; /* strides of x and of y (or dy), over batch rows and over time */
    const float *weight, *bias, *initial; /* initial: NULL when absent */
    const int32_t *doc;                   /* NULL: one document a row */
    int64_t run, strips;                  /* tokens of a run; blocks along time of one batch row */
    bool silu;
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

template <class T, int V> __device__ __forceinline__ void unpack(float (&out)[V], pack<T, V> from) {
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
    __device__ __forceinline__ void store(int t, const float (&v)[V]) const {
        store_floats<V>(at(t)->v, v);
    }
};

/* Tokens on their way to shared memory: of ARRAYS lines, STAGES groups of W tokens, a thread's own vectors of each. */
template <class T, int V, int W, int ARRAYS> struct conv_ring {
    pack<T, V> *own;

    __device__ __forceinline__ explicit conv_ring(void *shared) {
        own = (pack<T, V> *)shared + threadIdx.y * LANES + threadIdx.x;
    }
    __device__ __forceinline__ pack<T, V> *at(int stage, int array, int s) const {
        return own + ((stage * ARRAYS + array) * W + s) * (LANES * RUNS);
    }
    /* Send for a group of a line from t on; from `end` on, for the last before it again. */
    __device__ __forceinline__ void send(int stage, int array, const conv_line<T, V> &line, int t, int end) const {
#pragma unroll
        for (int s = 0; s < W; s++) {
            const pack<T, V> *from = line.at(min(t + s, end - 1));
            if constexpr (sizeof *from >= 4) cp_async<(int)sizeof *from>(at(stage, array, s), from);
            else *at(stage, array, s) = *from;
        }
    }
    static constexpr size_t size = sizeof(pack<T, V>) * STAGES * ARRAYS * W * LANES * RUNS;
};

/* Walk over `length` tokens in groups of W: send(stage, t) sends for the group from t on, take(stage, t) has it. */
template <int W, class SEND, class TAKE> __device__ __forceinline__ void walk_ahead(int length, SEND send, TAKE take) {
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) {
        if (k * W < length) send(k, k * W);
        cp_async_commit();
    }
    int stage = 0, free = STAGES - 1;
    for (int t = 0; t < length; t += W) {
        cp_async_wait<STAGES - 2>();
        if (t + (STAGES - 1) * W < length) send(free, t + (STAGES - 1) * W);
        cp_async_commit();
        take(stage, t);
        free = stage;
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
}

/* The documents of W tokens from t on; from `end` on, that of the last before it again. */
template <int W>
__device__ __forceinline__ void load_documents(int32_t (&to)[W], const conv_problem &p, const conv_place &at, int t,
                                               int end) {
    const int32_t *from = p.doc ? p.doc + at.b * p.T + at.first : NULL;
#pragma unroll
    for (int s = 0; s < W; s++) to[s] = from ? from[min(t + s, end - 1)] : 0;
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

/* The last W inputs and their documents, in a circle: token s of a group of W takes place s, and those before it lie in
 * the places behind, the oldest first. */
template <int W> __device__ __forceinline__ constexpr int place_in_circle(int newest, int w) {
    return (newest + 1 + w) % W;
}

template <int V, int W, bool DOC> struct window {
    float x[W][V];
    int32_t doc[W];

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
    /* Does all of the window behind a group of these documents belong to one? Their numbers do not decrease. */
    __device__ __forceinline__ bool one_document(const int32_t (&group)[W]) const {
        return !DOC || doc[1] == group[W - 1];
    }
    /* f(w, place) for the tokens w, from the oldest on, of the document of token `mine`. PLAIN: that is all of them. */
    template <bool PLAIN, class F> __device__ __forceinline__ void each_same(int newest, int mine, F f) const {
#pragma unroll
        for (int w = 0; w < W; w++) {
            int place = place_in_circle<W>(newest, w);
            if (PLAIN || !DOC || doc[place] == doc[place_in_circle<W>(newest, mine)]) f(w, place);
        }
    }
    /* Take token s of a group and convolve. */
    template <bool PLAIN, class T>
    __device__ __forceinline__ void take(float (&c)[V], int s, pack<T, V> input, int32_t document,
                                         const float (&taps)[W][V], const float (&bias)[V]) {
        unpack(x[s], input);
        if (DOC) doc[s] = document;
#pragma unroll
        for (int j = 0; j < V; j++) c[j] = bias[j];
        each_same<PLAIN>(s, W - 1, [&](int w, int place) {
#pragma unroll
            for (int j = 0; j < V; j++) c[j] += taps[w][j] * x[place][j];
        });
    }
};

template <class T, int V, int W, bool DOC>
__global__ void __launch_bounds__(LANES *RUNS, W == TAPS ? 4 : 3)
conv_forward_kernel(T *y, const T *x, conv_problem p) {
    DYNAMIC_SHARED(char, shared);
    conv_place at = place_of<V>(p);
    conv_ring<T, V, W, 1> ring(shared);
    float taps[W][V], bias[V];
    window<V, W, DOC> in;
    taps_of<V, W>(taps, bias, p);
    if (!at.inside) return;
    conv_line<T, V> from(x, p.x_row, p.x_step, at), to(y, p.y_row, p.y_step, at);
    int length = (int)(at.end - at.first);
    int32_t documents[W], next[W]; /* of the group, and of the next one */
    in.start(p, x, at);
    if (DOC) load_documents(next, p, at, 0, length);
    walk_ahead<W>(length, [&](int stage, int t) { ring.send(stage, 0, from, t, length); }, [&](int stage, int t) {
#pragma unroll
        for (int s = 0; s < W; s++) documents[s] = next[s];
        if (DOC) load_documents(next, p, at, t + W, length);
        auto group = [&](auto plain) {
#pragma unroll
            for (int s = 0; s < W; s++) {
                float c[V];
                if (!plain.value && t + s >= length) break;
                in.template take<plain.value>(c, s, *ring.at(stage, 0, s), documents[s], taps, bias);
#pragma unroll
                for (int j = 0; j < V; j++) c[j] = p.silu ? silu_of(c[j]) : c[j];
                to.store(t + s, c);
            }
        };
        if (t + W <= length && in.one_document(documents)) group(constant<1>());
        else group(constant<0>());
    });
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

/* What a thread of backward carries along its run: dc of the last W tokens, placed as in the window, and the sums. */
template <int V, int W> struct conv_sums {
    float dc[W][V], dtaps[W][V], dbias[V];

    /* c of token s of a group, d its dy, through a SiLU or not: its dc, and, where it belongs to the run, its part of
     * the sums. */
    template <bool PLAIN, bool DOC>
    __device__ __forceinline__ void add(const window<V, W, DOC> &in, int s, const float (&c)[V], const float (&d)[V],
                                        bool silu, bool there, bool counts) {
#pragma unroll
        for (int j = 0; j < V; j++) dc[s][j] = there ? d[j] * (silu ? silu_slope(c[j]) : 1.0f) : 0.0f;
        if (!counts) return;
#pragma unroll
        for (int j = 0; j < V; j++) dbias[j] += dc[s][j];
        in.template each_same<PLAIN>(s, W - 1, [&](int w, int place) {
#pragma unroll
            for (int j = 0; j < V; j++) dtaps[w][j] += dc[s][j] * in.x[place][j];
        });
    }
};

/* dx of the oldest token of the window, which is `tx`; before the row, of the initial state. PLAIN: it is in the row,
 * and no final state has a gradient. */
template <bool PLAIN, class T, int V, int W, bool DOC>
__device__ __forceinline__ void store_dx(const conv_line<T, V> &dx, float *dinitial, const float *dfinal,
                                         const float (&taps)[W][V], const conv_sums<V, W> &sums,
                                         const window<V, W, DOC> &in, int newest, const conv_problem &p,
                                         const conv_place &at, int64_t tx) {
    float sum[V] = {};
    in.template each_same<PLAIN>(newest, 0, [&](int w, int place) {
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += taps[W - 1 - w][j] * sums.dc[place][j];
    });
    if (PLAIN) {
        dx.store((int)(tx - at.first), sum);
        return;
    }
    int64_t kept = tx - (p.T - (p.W - 1)); /* place in the final state */
    int32_t document = in.doc[place_in_circle<W>(newest, 0)];
    if (dfinal && kept >= 0 && (!DOC || document == document_at(p, at.b, p.T - 1))) {
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
__global__ void __launch_bounds__(LANES *RUNS, W == TAPS ? 4 : 2)
conv_backward_kernel(T *dx, int64_t dx_row, int64_t dx_step, float *dinitial, float *partial, const T *dy,
                     const float *dfinal, const T *x, conv_problem p) {
    DYNAMIC_SHARED(char, shared);
    conv_place at = place_of<V>(p);
    conv_ring<T, V, W, 2> ring(shared);
    conv_sums<V, W> sums = {};
    float taps[W][V], bias[V];
    taps_of<V, W>(taps, bias, p);
    if (at.inside) {
        window<V, W, DOC> in;
        conv_line<T, V> from(x, p.x_row, p.x_step, at), from_dy(dy, p.y_row, p.y_step, at);
        conv_line<T, V> to(dx, dx_row, dx_step, at);
        /* The walk goes W-1 tokens on behind the run: their dc reaches into it. */
        int length = (int)(at.end - at.first), there = (int)at_most(p.T - at.first, length + W - 1);
        int lead = at.first > 0 || !dinitial ? W - 1 : W - (int)p.W; /* steps before the first dx */
        int32_t documents[W], next[W]; /* of the group, and of the next one */
        in.start(p, x, at);
        if (DOC) load_documents(next, p, at, 0, there);
        auto send = [&](int stage, int t) {
            ring.send(stage, 0, from, t, there);
            ring.send(stage, 1, from_dy, t, there);
        };
        walk_ahead<W>(length + W - 1, send, [&](int stage, int t) {
#pragma unroll
            for (int s = 0; s < W; s++) documents[s] = next[s];
            if (DOC) load_documents(next, p, at, t + W, there);
            auto group = [&](auto plain) {
                constexpr bool PLAIN = plain.value;
#pragma unroll
                for (int s = 0; s < W; s++) {
                    int now = t + s;
                    float c[V], d[V];
                    if (!PLAIN && now >= length + W - 1) break;
                    in.template take<PLAIN>(c, s, *ring.at(stage, 0, s), documents[s], taps, bias);
                    unpack(d, *ring.at(stage, 1, s));
                    sums.template add<PLAIN>(in, s, c, d, p.silu, PLAIN || now < there, PLAIN || now < length);
                    if (PLAIN || now >= lead)
                        store_dx<PLAIN>(to, dinitial, dfinal, taps, sums, in, s, p, at, at.first + now - (W - 1));
                }
            };
            if (t >= W && t + W <= length && !dfinal && in.one_document(documents)) group(constant<1>());
            else group(constant<0>());
        });
    }
    __syncthreads(); /* the sums come where tokens were */
    store_partials(partial, (float *)shared, sums, p);
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

/* Tokens of a run where a block takes LANES V channels: from `least` to half as much again, whichever makes the rounds
 * shortest in which a large chip does the blocks. The least may leave the last round nearly empty. */
static int64_t run_of(int64_t least, int64_t B, int64_t T, int64_t C, int V) {
    enum { AT_ONCE = 4 * 132, BEGINNING = 4 /* what a run costs before its first token, in tokens */ };
    int64_t columns = B * ceil_div(C, LANES * V), best = least, shortest = INT64_MAX;
    for (int64_t run = least; run <= least * 3 / 2; run += TAPS) {
        int64_t time = ceil_div(columns * strips_of(T, run), AT_ONCE) * (run + BEGINNING);
        if (time < shortest) best = run, shortest = time;
    }
    return best;
}

static conv_problem problem_of(tensor x, tensor y, tensor weight, tensor bias, tensor initial, tensor doc,
                               bool silu, int64_t least, int V) {
    int64_t B = x.dim[0], T = x.dim[1], C = x.dim[2], W = weight.dim[1];
    ASSERT(W >= 2 && W <= TAPS_MAX && tensor_is(y, 3, B, T, C) && y.dtype == x.dtype && weight.dtype == DTYPE_F32);
    ASSERT((x.stride[1] > y.stride[1] ? x.stride[1] : y.stride[1]) * 4 <= INT32_MAX); /* conv_line */
    int64_t run = W == TAPS ? run_of(least, B, T, C, V) : least;
    return {B, T, C, W, x.stride[0], x.stride[1], y.stride[0], y.stride[1], data_of<float>(weight),
            data_of<float>(bias), data_of<float>(initial), data_of<int32_t>(doc), run, strips_of(T, run), silu};
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

/* Has a block room for four channels a thread in backward? Up to eight taps of fp32 take 96 KB of ring, and the taps
 * themselves 5: more than some chips give it. */
template <class T> static bool room_for_four(struct device *dev, const conv_problem &p) {
    return sizeof(T) == 2 || p.W == TAPS || cuda_shared_most(dev) >= 101 << 10;
}

template <class T, int V, int WINDOW, bool DOC>
static void launch_forward(struct device *dev, tensor y, tensor x, const conv_problem &p) {
    constexpr size_t ring = conv_ring<T, V, WINDOW, 1>::size;
    allow_shared(dev, conv_forward_kernel<T, V, WINDOW, DOC>, ring, "conv_forward");
    LAUNCH(dev, (conv_forward_kernel<T, V, WINDOW, DOC>), grid_of(p, V), dim3(LANES, RUNS), ring, data_of<T>(y),
           data_of<T>(x), p);
}

extern "C" void cuda_conv_forward(struct device *dev, tensor y, tensor final, tensor x, tensor weight, tensor bias,
                                  tensor initial, tensor doc, bool with_silu) {
    int most = 16 / (int)dtype_size(x.dtype);
    conv_problem p = problem_of(x, y, weight, bias, initial, doc, with_silu, RUN_FORWARD, most);
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        constexpr int MOST = 16 / sizeof(T);
        bool fit = vectors_fit(x, MOST) && vectors_fit(y, MOST) && vectors_fit(initial, MOST);
        with_taps(p, [&](auto taps, auto documents) {
            constexpr int WINDOW = taps.value, WIDE = WINDOW == TAPS ? MOST : 4;
            constexpr bool DOC = documents.value;
            if (fit) launch_forward<T, WIDE, WINDOW, DOC>(dev, y, x, p);
            else launch_forward<T, 1, WINDOW, DOC>(dev, y, x, p);
        });
        if (!tensor_given(final)) return;
        dim3 grid((unsigned)ceil_div(p.C, 128), (unsigned)p.B, (unsigned)(p.W - 1));
        LAUNCH(dev, conv_final_kernel<T>, grid, 128, 0, data_of<float>(final), data_of<T>(x), p);
    });
}

/* The partials of all blocks, of which longer runs have fewer. */
extern "C" size_t cuda_conv_backward_scratch(int64_t B, int64_t T, int64_t C, int64_t W) {
    return (size_t)(B * strips_of(T, RUN_BACKWARD) * (W + 1) * C) * sizeof(float);
}

extern "C" void cuda_conv_backward(struct device *dev, tensor dx, tensor dinitial, tensor dweight, tensor dbias,
                                   tensor dy, tensor dfinal, tensor x, tensor weight, tensor bias, tensor initial,
                                   tensor doc, bool with_silu, void *scratch) {
    conv_problem p = problem_of(x, dy, weight, bias, initial, doc, with_silu, RUN_BACKWARD, 4);
    ASSERT(tensor_is(dx, 3, p.B, p.T, p.C) && dx.stride[1] * 4 <= INT32_MAX);
    float *partial = (float *)scratch;
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = vectors_fit(x, 4) && vectors_fit(dx, 4) && vectors_fit(dy, 4) && vectors_fit(initial, 4) &&
                    vectors_fit(dfinal, 4) && vectors_fit(dinitial, 4) && room_for_four<T>(dev, p);
        with_width(wide, [&](auto width) {
            with_taps(p, [&](auto taps, auto documents) {
                constexpr int V = width.value, WINDOW = taps.value;
                constexpr bool DOC = documents.value;
                size_t room = (size_t)RUNS * (WINDOW + 1) * LANES * V * sizeof(float);
                size_t ring = conv_ring<T, V, WINDOW, 2>::size;
                if (room < ring) room = ring;
                allow_shared(dev, conv_backward_kernel<T, V, WINDOW, DOC>, room, "conv_backward");
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
                                 const float *bias, bool silu, int64_t C, int W) {
    int64_t k = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
    if (k >= C) return;
    float *past = state + b * (W - 1) * C + k, now = to_float(x[b * x_step + k]), c = bias[k];
    for (int w = 0; w < W - 1; w++) {
        c += weight[k * W + w] * past[w * C];
        past[w * C] = w + 1 < W - 1 ? past[(w + 1) * C] : now;
    }
    c += weight[k * W + W - 1] * now;
    y[b * y_step + k] = from_float<T>(silu ? silu_of(c) : c);
}

extern "C" void cuda_conv_step(struct device *dev, tensor y, tensor state, tensor x, tensor weight, tensor bias,
                               bool with_silu) {
    int64_t B = x.dim[0], C = x.dim[1], W = weight.dim[1];
    ASSERT(W >= 2 && W <= TAPS_MAX && tensor_is(state, 3, B, W - 1, C) && tensor_is(y, 2, B, C));
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, conv_step_kernel<T>, dim3((unsigned)ceil_div(C, 128), (unsigned)B), 128, 0, data_of<T>(y),
               y.stride[0], data_of<float>(state), data_of<T>(x), x.stride[0], data_of<float>(weight),
               data_of<float>(bias), with_silu, C, (int)W);
    });
}
