/* each_cell.cuh: one cell (kernels/cells/cells.h) on the device, and how a warp walks over its tokens. Included by the
 * sources named each_cell*, which are compiled once for every cell.
 *
 * A thread has one channel of one chunk of one batch row; a warp, 32 neighbouring channels. What it reads of each token
 * (pre-activations; states and gradients in backward: `planes` of one number a channel) comes through a ring of stages
 * in shared memory that is the warp's own, so there is no barrier of blocks: while 8 tokens are worked on, those of the
 * next two or three stages are on their way. A lane copies 16 bytes at a time where all rows are aligned to that, else
 * its own channel's elements, at which it waits. Documents' numbers travel likewise, and become a mask of the tokens
 * that start one.
 */
#ifndef RIVERRUN_CUDA_EACH_CELL_CUH
#define RIVERRUN_CUDA_EACH_CELL_CUH

#include "kernels/cuda/cell.cuh"

#define PASTE_NAMES(a, b) a##b
#define NAMED(a, b) PASTE_NAMES(a, b)

namespace {

/* --- the cell ----------------------------------------------------------------------------------------------------- */

/* A number and its derivatives by D others. */
template <int D> struct dual {
    float v, d[D];

    __device__ __forceinline__ dual() {
    }
    __device__ __forceinline__ dual(float value) : v(value) {
        each([](int) { return 0.0f; });
    }
    template <class F> __device__ __forceinline__ dual &each(F f) {
#pragma unroll
        for (int i = 0; i < D; i++) d[i] = f(i);
        return *this;
    }
    /* value, with derivatives that are this one's times a slope */
    __device__ __forceinline__ dual through(float value, float slope) const {
        return dual(value).each([&](int i) { return d[i] * slope; });
    }
};

#define DUAL_OPERATOR(op, slope, float_first, float_last)                                                              \
    template <int D> __device__ __forceinline__ dual<D> operator op(const dual<D> &a, const dual<D> &b) {              \
        return dual<D>(a.v op b.v).each([&](int i) { return slope; });                                                 \
    }                                                                                                                  \
    template <int D> __device__ __forceinline__ dual<D> operator op(float a, const dual<D> &b) {                       \
        return dual<D>(a op b.v).each([&](int i) { return float_first; });                                             \
    }                                                                                                                  \
    template <int D> __device__ __forceinline__ dual<D> operator op(const dual<D> &a, float b) {                       \
        return dual<D>(a.v op b).each([&](int i) { return float_last; });                                              \
    }
DUAL_OPERATOR(+, a.d[i] + b.d[i], b.d[i], a.d[i])
DUAL_OPERATOR(-, a.d[i] - b.d[i], -b.d[i], a.d[i])
DUAL_OPERATOR(*, a.d[i] * b.v + a.v * b.d[i], a * b.d[i], a.d[i] * b)
DUAL_OPERATOR(/, (a.d[i] - a.v / b.v * b.d[i]) / b.v, -(a / b.v) * b.d[i] / b.v, a.d[i] / b)
#undef DUAL_OPERATOR

template <int D> __device__ __forceinline__ dual<D> operator-(const dual<D> &a) {
    return a.through(-a.v, -1);
}

/* Both are exact to 1e-7, absolutely. */
__device__ __forceinline__ float cell_sigmoid(float v) {
    return sigmoid_of(v);
}

__device__ __forceinline__ float cell_tanh(float v) {
    return fmaf(-2.0f, reciprocal(1.0f + power_of_two(2.0f * LOG2E * v)), 1.0f);
}

template <int D> __device__ __forceinline__ dual<D> cell_sigmoid(const dual<D> &x) {
    float y = cell_sigmoid(x.v);
    return x.through(y, y * (1 - y));
}

template <int D> __device__ __forceinline__ dual<D> cell_tanh(const dual<D> &x) {
    float y = cell_tanh(x.v);
    return x.through(y, 1 - y * y);
}

/* The header once with numbers, and where derivatives are missing once with dual ones, for its step alone. */
#define CELL_FN [[maybe_unused]] static __device__ __forceinline__
#define REAL float
#include CELL_HEADER
#undef REAL
#undef CELL_FN

#if !defined(CELL_HAS_JACOBIAN) || !defined(CELL_HAS_GRADIENT)
namespace automatic {
#define CELL_FN template <int D> static __device__ __forceinline__
#define REAL dual<D>
#include CELL_HEADER
#undef REAL
#undef CELL_FN
} // namespace automatic
#endif

enum { S = CELL_STATES, U = CELL_INPUTS, W = CELL_WEIGHTS, OUTPUT = CELL_OUTPUT };

/* `count` dual numbers whose derivatives are from place `first` on, or none. */
template <int D> __device__ __forceinline__ void vary(dual<D> *to, const float *from, int count, int first) {
#pragma unroll
    for (int k = 0; k < count; k++) to[k] = dual<D>(from[k]).each([&](int i) { return i == first + k ? 1.0f : 0.0f; });
}

__device__ __forceinline__ void cell_jacobian(const float (&before)[S], const float (&u)[U], const float (&w)[W],
                                              const float *now, float (&after)[S], float (&J)[S * S]) {
#ifdef CELL_HAS_JACOBIAN
    step_jacobian(before, u, w, now, after, J);
#else
    dual<S> b[S], inputs[U], weights[W], out[S];
    vary(b, before, S, 0), vary(inputs, u, U, S), vary(weights, w, W, S);
    automatic::step(b, inputs, weights, out);
#pragma unroll
    for (int i = 0; i < S; i++) {
        after[i] = out[i].v;
#pragma unroll
        for (int j = 0; j < S; j++) J[i * S + j] = out[i].d[j];
    }
#endif
}

__device__ __forceinline__ void cell_gradient(const float (&before)[S], const float (&u)[U], const float (&w)[W],
                                              const float (&now)[S], const float (&lambda)[S], float (&dbefore)[S],
                                              float (&du)[U], float (&dw)[W]) {
#ifdef CELL_HAS_GRADIENT
    step_gradient(before, u, w, now, lambda, dbefore, du, dw);
#else
    dual<S + U + W> b[S], inputs[U], weights[W], out[S];
    vary(b, before, S, 0), vary(inputs, u, U, S), vary(weights, w, W, S + U);
    automatic::step(b, inputs, weights, out);
    auto slope = [&](int k) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < S; i++) sum += lambda[i] * out[i].d[k];
        return sum;
    };
#pragma unroll
    for (int k = 0; k < S; k++) dbefore[k] = slope(k);
#pragma unroll
    for (int k = 0; k < U; k++) du[k] = slope(S + k);
#pragma unroll
    for (int k = 0; k < W; k++) dw[k] = slope(S + U + k);
#endif
}

/* --- places ------------------------------------------------------------------------------------------------------- */

enum { WARPS = 4, THREADS = WARPS * WARP, TOKENS = 8 /* of a stage */ };

inline dim3 cell_grid(const cell_problem &p) {
    ASSERT(p.B <= 65535 && p.chunks * ceil_div(p.N, THREADS) <= INT32_MAX);
    return dim3((unsigned)(p.chunks * ceil_div(p.N, THREADS)), (unsigned)p.B);
}

/* Where this thread is; blocks of one chunk follow each other. */
struct place {
    int64_t b, n, chunk, begin, end; /* row, channel, chunk and its tokens */
    int lane;
    bool inside; /* the channel exists */

    __device__ __forceinline__ place(const cell_problem &p) {
        unsigned blocks = (unsigned)((p.N + THREADS - 1) / THREADS);
        lane = (int)(threadIdx.x % WARP);
        b = blockIdx.y, chunk = blockIdx.x / blocks, n = (int64_t)(blockIdx.x % blocks) * THREADS + threadIdx.x;
        begin = chunk * p.chunk, end = at_most(begin + p.chunk, p.T);
        inside = n < p.N;
    }
    /* In an array (B, chunks, count, N). */
    __device__ __forceinline__ int64_t of_chunk(const cell_problem &p, int64_t of, int count) const {
        return (b * p.chunks + of) * count * p.N + n;
    }
};

/* u's place of a channel within a token, its first number. */
__device__ __forceinline__ int64_t input_place(const cell_problem &p, int64_t n) {
    int64_t head = (unsigned)n / (unsigned)p.width;
    return head * U * p.width + (n - head * p.width);
}

__device__ __forceinline__ bool begins(const cell_problem &p, int64_t b, int64_t t) {
    return p.doc && p.doc[b * p.T + t] != (t > 0 ? p.doc[b * p.T + t - 1] : 0);
}

/* --- numbers of a channel ----------------------------------------------------------------------------------------- */

template <int COUNT> __device__ __forceinline__ void zero(float (&v)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = 0;
}

template <int COUNT> __device__ __forceinline__ void copy(float (&to)[COUNT], const float (&from)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = from[i];
}

/* COUNT numbers, N apart, from place `at` of an array on; zeros where the channel does not exist, or the array. */
template <int COUNT>
__device__ __forceinline__ void load_column(float (&to)[COUNT], const float *from, int64_t at, int64_t N, bool there) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = there && from ? from[at + i * N] : 0;
}

template <int COUNT>
__device__ __forceinline__ void store_column(float *to, const float (&from)[COUNT], int64_t N, bool there) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (there) to[i * N] = from[i];
}

/* m (S, COLUMNS) = J m, or J^T m. */
template <bool TRANSPOSED, int COUNT>
__device__ __forceinline__ void multiply(float (&m)[COUNT], const float (&J)[S * S]) {
    constexpr int COLUMNS = COUNT / S;
    float old[COUNT];
    copy(old, m);
#pragma unroll
    for (int i = 0; i < S; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            float sum = J[TRANSPOSED ? i : i * S] * old[j];
#pragma unroll
            for (int k = 1; k < S; k++) sum += J[TRANSPOSED ? k * S + i : i * S + k] * old[k * COLUMNS + j];
            m[i * COLUMNS + j] = sum;
        }
}

__device__ __forceinline__ void identity(float (&product)[S * S]) {
#pragma unroll
    for (int i = 0; i < S * S; i++) product[i] = i % (S + 1) == 0 ? 1.0f : 0.0f;
}

/* The tokens of a chunk that a map is made of. Most cells forget within some dozens of tokens: then the map's product
 * is nothing to fp32, and its rest does not depend on where the walk begins, so that the few tokens next to where it
 * ends will do. A walk over few says whether they did; if not, there are more. In forward that goes for the first map,
 * which is made from a guess anyway; later ones start from corrected states, and are made of all tokens, so that with
 * as many corrections as there are chunks any cell is solved. */
enum { FEW_TOKENS = 64, MORE_TIMES = 4 };

__device__ __forceinline__ int64_t tokens_of_map(const place &at, int64_t tried) {
    int64_t all = at.end - at.begin, next = tried ? tried * MORE_TIMES : FEW_TOKENS;
    return 2 * next > all ? all : next;
}

/* Has every channel of the warp forgotten what was before? Then nothing at all comes through. */
__device__ __forceinline__ bool forgotten(float (&product)[S * S], bool inside) {
    bool small = true;
#pragma unroll
    for (int i = 0; i < S * S; i++) small = small && fabsf(product[i]) < 1e-9f;
    if (!__all_sync(FULL, small || !inside)) return false;
    zero(product);
    return true;
}

/* A document starts here: nothing of what was comes through. */
template <int COUNT> __device__ __forceinline__ void zero_if(bool starts, float (&v)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) v[i] = starts ? 0 : v[i];
}

/* What is not a number stays so. */
__device__ __forceinline__ float clamped(float v, float bound) {
    return !(bound > 0) ? v : v > bound ? bound : v < -bound ? -bound : v;
}

/* A channel's constants, and the guess of its states. */
template <class T> struct channel {
    float bias[U], weight[W];
    const T *inputs; /* at the row's first token, this channel's first number */

    __device__ __forceinline__ channel(const cell_problem &p, const place &at) {
        load_column(bias, p.bias, at.n, p.N, at.inside);
        load_column(weight, p.weight, at.n, p.N, at.inside);
        inputs = (const T *)p.u + at.b * p.u_row + input_place(p, at.inside ? at.n : 0);
    }
    __device__ __forceinline__ void initial(float (&s)[S], const cell_problem &p, const place &at) const {
        load_column(s, p.initial, at.b * S * p.N + at.n, p.N, at.inside);
    }
    /* f(0, u[t]), of a row's first token that goes on f(initial, u[t]). */
    __device__ __forceinline__ void guess(float (&s)[S], const cell_problem &p, const place &at, int64_t t) const {
        float before[S], u[U];
        zero(before);
        if (t == 0 && !begins(p, at.b, 0)) initial(before, p, at);
#pragma unroll
        for (int v = 0; v < U; v++) u[v] = to_float(inputs[t * p.u_step + v * p.width]) + bias[v];
        step(before, u, weight, s);
    }
};

/* --- the ring ----------------------------------------------------------------------------------------------------- */

template <class T, int PLANES> struct stage {
    T of[PLANES][TOKENS][WARP];
    int32_t doc[TOKENS + 4]; /* doc[k + 1]: of token k; [0]: of the one before the stage */

    /* Bit k: token k starts a document. */
    __device__ __forceinline__ unsigned starts(const cell_problem &p, int lane) const {
        return p.doc ? __ballot_sync(FULL, lane < TOKENS && doc[lane + 1] != doc[lane]) : 0;
    }
    __device__ __forceinline__ void load_inputs(float (&u)[U], const float (&bias)[U], int k, int lane) const {
#pragma unroll
        for (int v = 0; v < U; v++) u[v] = to_float(of[v][k][lane]) + bias[v];
    }
};

/* One lane's share in filling stages. */
template <class T> struct copier {
    enum { V = vector_of<T>, PIECES = WARP / V, ROWS = WARP / PIECES };
    bool wide, there;
    int row, column; /* within a plane; row: 0 where a lane copies its own channel only */
    int64_t n;       /* the first channel of what it copies */
    const T *from;   /* its place among the inputs, at the row's first token */

    __device__ __forceinline__ copier(const cell_problem &p, const place &at) {
        wide = p.wide;
        row = wide ? at.lane / PIECES : 0, column = wide ? at.lane % PIECES * V : at.lane;
        n = at.n - at.lane + column;
        there = n < p.N;
        if (!there) n = 0;
        from = (const T *)p.u + at.b * p.u_row + input_place(p, n);
    }
    /* The tokens `first` to `left` - 1 of a stage; `from` is where the channel n of its token 0 lies, or would. */
    __device__ __forceinline__ void plane(T (*to)[WARP], const T *from, int64_t step, int first, int left) const {
        if (wide) {
#pragma unroll
            for (int k = 0; k < TOKENS; k += ROWS)
                cp_async_16_or_zeros_of_row(&to[k + row][column], from + (k + row) * step,
                                            there && k + row >= first && k + row < left);
        } else {
            T v[TOKENS];
#pragma unroll
            for (int k = 0; k < TOKENS; k++)
                if (there && k >= first && k < left) v[k] = from[k * step];
#pragma unroll
            for (int k = 0; k < TOKENS; k++)
                if (there && k >= first && k < left) to[k][column] = v[k];
        }
    }
    __device__ __forceinline__ void inputs(T (*to)[TOKENS][WARP], const cell_problem &p, int64_t t0, int left) const {
#pragma unroll
        for (int v = 0; v < U; v++) plane(to[v], from + t0 * p.u_step + v * p.width, p.u_step, 0, left);
    }
    __device__ __forceinline__ void documents(int32_t *to, const cell_problem &p, const place &at, int64_t t0,
                                              int left) const {
        int64_t t = t0 - 1 + at.lane;
        bool given = t >= 0 && at.lane <= left;
        if (p.doc && at.lane <= TOKENS) cp_async<4>(to + at.lane, p.doc + (given ? at.b * p.T + t : 0), given ? 4 : 0);
    }
};

/* Walk over the batches of TOKENS tokens of a chunk, in turn or, BACK, from the last to the first:
 * fill(stage, t0, left) brings `left` tokens from t0 on, use(stage, t0, left) works on them. */
template <int STAGES, bool BACK, class STAGE, class FILL, class USE>
__device__ __forceinline__ void walk_tokens(char *memory, const place &at, FILL fill, USE use) {
    STAGE *ring = reinterpret_cast<STAGE *>(memory) + threadIdx.x / WARP * STAGES;
    int batches = (int)((at.end - at.begin + TOKENS - 1) / TOKENS), slot = 0, next = STAGES - 1;
    auto first_of = [&](int i) { return at.begin + (int64_t)(BACK ? batches - 1 - i : i) * TOKENS; };
    auto bring = [&](int i, int to) {
        int64_t t0 = first_of(i);
        if (i < batches) fill(ring[to], t0, (int)at_most(at.end - t0, TOKENS));
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) bring(i, i);
    for (int i = 0; i < batches; i++) {
        cp_async_wait<STAGES - 2>();
        __syncwarp(); /* all lanes' copies are there, and all have left the stage that is filled next */
        bring(i + STAGES - 1, next);
        int64_t t0 = first_of(i);
        use(ring[slot], t0, (int)at_most(at.end - t0, TOKENS));
        slot = slot + 1 < STAGES ? slot + 1 : 0, next = next + 1 < STAGES ? next + 1 : 0;
    }
    cp_async_wait<0>();
    __syncwarp(); /* the ring is free */
}

/* each_token<BACK>(left, f): f(k) for the tokens of a stage, without a test for each of a full one. */
template <bool BACK, class F> __device__ __forceinline__ void each_token(int left, F f) {
    if (left == TOKENS) {
#pragma unroll
        for (int k = 0; k < TOKENS; k++) f(BACK ? TOKENS - 1 - k : k);
    } else {
#pragma unroll 1
        for (int k = 0; k < left; k++) f(BACK ? left - 1 - k : k);
    }
}

/* --- forward walks ------------------------------------------------------------------------------------------------ */

enum { FORWARD_STAGES = 4 };

template <class T> constexpr size_t forward_ring = WARPS * FORWARD_STAGES * sizeof(stage<T, U>);

/* advance(u, t, whether t starts a document) for the chunk's tokens in turn. */
template <class T, class STEP>
__device__ __forceinline__ void walk_forward(char *memory, const channel<T> &own, const cell_problem &p,
                                             const place &at, STEP advance) {
    copier<T> copies(p, at);
    auto fill = [&](stage<T, U> &to, int64_t t0, int left) {
        copies.inputs(to.of, p, t0, left);
        copies.documents(to.doc, p, at, t0, left);
    };
    auto use = [&](const stage<T, U> &from, int64_t t0, int left) {
        unsigned starts = from.starts(p, at.lane);
        each_token<false>(left, [&](int k) {
            float u[U];
            from.load_inputs(u, own.bias, k, at.lane);
            advance(u, t0 + k, (starts >> k & 1) != 0);
        });
    };
    walk_tokens<FORWARD_STAGES, false, stage<T, U>>(memory, at, fill, use);
}

/* A token's states, where they belong; `check` becomes not a number where one is not finite. */
template <class T>
__device__ __forceinline__ void store_states(const cell_outputs &out, const cell_problem &p, const place &at, int64_t t,
                                             const float (&s)[S], float &check) {
    int64_t token = at.b * p.T + t;
    ((T *)out.y)[token * p.N + at.n] = from_float<T>(s[OUTPUT]);
#pragma unroll
    for (int i = 0; i < S; i++) {
        check += 0 * s[i];
        if (i != OUTPUT && out.others)
            ((T *)out.others)[(token * (S - 1) + i - (i > OUTPUT)) * p.N + at.n] = from_float<T>(s[i]);
    }
}

/* --- the report --------------------------------------------------------------------------------------------------- */

/* The largest number of a warp into the report; not a number counts as infinite. The largest of several is the same
 * in any order. */
__device__ __forceinline__ void report(unsigned *residual, float worst, float check) {
    if (!(worst <= 3.4028235e38f) || check != 0) worst = __int_as_float(0x7f800000); /* check: 0, or not a number */
    unsigned most = __reduce_max_sync(FULL, __float_as_uint(worst));
    if (threadIdx.x % WARP == 0 && most > *(volatile unsigned *)residual) atomicMax(residual, most);
}

/* LAUNCH with the ring of a kernel, which may take more than is granted unasked. */
template <class K> inline void allow_ring(struct device *dev, K kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return;
    cudaError_t result = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    cuda_expect(dev, result, CELL_TEXT);
}

} // namespace

#endif
