/* scan.cuh: what the passes of the selective scan share: the problem, how time is cut, and how a block walks it.
 *
 * A block owns SCAN_BLOCK neighbouring channels of one batch row. In its walk over time a thread owns two
 * neighbouring channels and four of the GROUP = 16 states that are worked on at once, so a pair is in four neighbouring
 * lanes of a warp. What is one number for each token and channel (step size, gate, skip) is
 * computed between walks by threads that take pairs of channels as they lie in memory, a warp a token, and passes
 * through shared memory.
 *
 * A document's start is a token whose decay is 0. It costs nothing in the walk: the step size that decays are taken of
 * is SCAN_START there, beyond any that a state survives.
 */
#ifndef RIVERRUN_CUDA_SCAN_CUH
#define RIVERRUN_CUDA_SCAN_CUH

#include "kernels/cuda/launch.cuh"

#define SCAN_START 1e38f
#define SCAN_RATE_MIN 1e-35f /* slower decays are none in fp32; SCAN_START times it is still the end of any state */

enum {
    SCAN_GROUP = 16,                /* states of a channel that are worked on at once */
    SCAN_PIECE = 64,                /* tokens between saved states */
    SCAN_TILE = 16,                 /* tokens in shared memory at a time where nothing is read twice */
    SCAN_BLOCK = 64,                /* channels of a block: a warp for each token's pairs */
    SCAN_PAIRS = SCAN_BLOCK / 2,
    SCAN_STATES = 4,                /* of the group's, in a thread */
    SCAN_THREADS = SCAN_PAIRS * SCAN_GROUP / SCAN_STATES,
    SCAN_WARPS = SCAN_THREADS / WARP,
    SCAN_CHANNELS = 132 * 256,      /* channels times batch rows that fill a large chip: fewer have time cut */
};

/* Tokens of one row from some token on, of one channel on. A piece's tokens are found with 32-bit products. */
template <class T> struct scan_line {
    char *base;
    unsigned step; /* bytes */

    __device__ __forceinline__ T *at(int t) const {
        return reinterpret_cast<T *>(base + (uint64_t)(unsigned)t * step);
    }
    __device__ __forceinline__ void move(int tokens) {
        base += (int64_t)tokens * (int64_t)step;
    }
};

/* Rows of a strided view (B, T, ...), the last dimension contiguous. */
template <class T> struct scan_rows {
    T *data; /* NULL when absent */
    int64_t row, step;

    __device__ __forceinline__ T *at(int64_t b, int64_t t, int64_t i) const {
        return data + b * row + t * step + i;
    }
    __device__ __forceinline__ scan_line<T> line(int64_t b, int64_t t, int64_t i) const {
        return {reinterpret_cast<char *>(at(b, t, i)), (unsigned)(step * (int64_t)sizeof(T))};
    }
};

template <class T> static inline scan_rows<T> rows_of(tensor t) {
    ASSERT(t.stride[1] * (int64_t)sizeof(T) <= INT32_MAX); /* scan_line */
    return {data_of<T>(t), t.stride[0], t.stride[1]};
}

template <class T> struct scan_inputs {
    scan_rows<T> x, raw, b, c, z;
};

struct scan_problem {
    int64_t B, T, D, N;
    const float *bias, *A_log, *d, *initial; /* d, initial: NULL when absent */
    const int32_t *doc;                      /* NULL: one document a row */
    int64_t pieces, per_segment, segments;   /* a segment is per_segment pieces of SCAN_PIECE tokens */
    bool states_fit;                         /* four neighbours of b and of c may be read at once */
};

static inline int64_t scan_pieces(struct scan_shape s) {
    return ceil_div(s.T, SCAN_PIECE);
}

/* Pieces of a segment: all of them where the channels alone fill the chip. */
static inline int64_t scan_pieces_per_segment(struct scan_shape s) {
    int64_t pieces = scan_pieces(s), wanted = SCAN_CHANNELS / (s.B * s.D);
    if (wanted < 1) wanted = 1;
    if (wanted > pieces) wanted = pieces;
    return ceil_div(pieces, wanted);
}

static inline int64_t scan_segments(struct scan_shape s) {
    return ceil_div(scan_pieces(s), scan_pieces_per_segment(s));
}

static inline dim3 scan_grid(const scan_problem &p) {
    return dim3((unsigned)ceil_div(p.D, SCAN_BLOCK), (unsigned)p.segments, (unsigned)p.B);
}

scan_problem scan_problem_of(tensor g, tensor x, tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d,
                             tensor z, tensor initial, tensor doc);

/* Can pairs of channels be read and written at once in all of these? */
static inline bool scan_pairs_fit(tensor a, tensor b, tensor c, tensor d) {
    return vectors_fit(a, 2) && vectors_fit(b, 2) && vectors_fit(c, 2) && vectors_fit(d, 2);
}

/* with_pairs(fit, [&](auto pairs) { constexpr bool WIDE = pairs.value; ... }) */
template <class F> static inline void with_pairs(bool fit, F f) {
    if (fit) f(constant<1>());
    else f(constant<0>());
}

/* (scan_carry.cu) The states that enter the segments, (B, segments, N, D), from left to right into `entering`; and what
 * comes in from the right of each in backward. `decays` is of the same size, scratch. */
void cuda_scan_carry(struct device *dev, float *entering, float *decays, tensor x, tensor raw, tensor b,
                     const scan_problem &p);
void cuda_scan_carry_back(struct device *dev, float *entering, float *decays, tensor dg, tensor dfinal, tensor raw,
                          tensor c, tensor z, const scan_problem &p);

/* --- pairs of channels -------------------------------------------------------------------------------------------- */

/* Two neighbours as they lie in memory, in whole registers. */
template <class T> struct scan_two;
template <> struct scan_two<float> {
    float2 v;
    __device__ __forceinline__ float2 floats() const {
        return v;
    }
};
template <> struct scan_two<__nv_bfloat16> {
    uint32_t v;
    __device__ __forceinline__ float2 floats() const {
        return make_float2(low_bf16(v), high_bf16(v));
    }
};

/* Channels i and i + 1 of one token. Where rows of pairs fit, i is even and both exist; otherwise `second` tells. */
template <class T, bool WIDE> __device__ __forceinline__ scan_two<T> load_pair(const T *from, bool second) {
    if (WIDE) return *reinterpret_cast<const scan_two<T> *>(from);
    scan_two<T> two;
    T v[2] = {from[0], second ? from[1] : from_float<T>(0)};
    memcpy(&two, v, sizeof two);
    return two;
}

template <class T, bool WIDE> __device__ __forceinline__ void store_pair(T *to, float a, float b, int count) {
    const float both[2] = {a, b};
    if (WIDE) {
        if (count) store_floats<2>(to, both);
    } else {
        if (count > 0) to[0] = from_float<T>(a);
        if (count > 1) to[1] = from_float<T>(b);
    }
}

/* Two parameters of a pair, 0 where there is none. */
__device__ __forceinline__ float2 pair_of_vector(const float *v, int64_t i, int count) {
    return make_float2(v && count > 0 ? v[i] : 0, v && count > 1 ? v[i + 1] : 0);
}

/* The pair whose numbers a thread brings and takes away (a warp takes the pairs of a token); the walk has another. */
struct scan_pair {
    int64_t i, there; /* first channel; and one that exists, to read where i does not */
    int place, count; /* in the block; how many of the two exist */

    __device__ __forceinline__ scan_pair(const scan_problem &p, bool wide) {
        place = threadIdx.x % WARP;
        i = (int64_t)blockIdx.x * SCAN_BLOCK + 2 * place;
        count = i + 1 < p.D ? 2 : i < p.D ? 1 : 0;
        there = count ? i : p.D - (wide ? 2 : 1);
    }
};

/* Pairs of the tokens warp, warp + TOKENS, ... of a line; of the last token in place of those from `left` on. */
template <bool WIDE, int TOKENS, class T, int ROUNDS>
__device__ __forceinline__ void load_pairs(scan_two<T> (&to)[ROUNDS], const scan_line<T> &line, const scan_pair &own,
                                           int left) {
#pragma unroll
    for (int k = 0; k < ROUNDS; k++)
        to[k] = load_pair<T, WIDE>(line.at(min(k * TOKENS + (int)(threadIdx.x / WARP), left - 1)), own.count > 1);
}

/* Do documents start at the tokens t0, t0 + 1, ... of a warp's lanes, so that no state comes in? Asked in two steps,
 * because the answer has to come from memory. */
struct scan_documents {
    int32_t own, before;

    __device__ __forceinline__ void load(const scan_problem &p, int64_t row, int64_t t0) {
        int64_t t = t0 + threadIdx.x % WARP;
        own = before = 0;
        if (!p.doc || t >= p.T) return;
        own = p.doc[row * p.T + t];
        if (t > 0) before = p.doc[row * p.T + t - 1];
    }
    /* A bit a token. Every lane of a warp takes part. */
    __device__ __forceinline__ unsigned starts() const {
        return __ballot_sync(FULL, own != before);
    }
};

/* E neighbouring states of one token as they lie in memory: nothing may look at them before they are needed. */
template <class T, int E> struct alignas(E * sizeof(T)) scan_some {
    scan_two<T> two[E / 2];

    __device__ __forceinline__ float operator[](int e) const {
        float2 v = two[e / 2].floats();
        return e % 2 ? v.y : v.x;
    }
};

/* Those of token t of a line of b or c that starts at state n; 0 from the token `left` and the last state on. */
template <class T, int E>
__device__ __forceinline__ scan_some<T, E> load_states(const scan_line<T> &line, const scan_problem &p, int t, int left,
                                                       int64_t n) {
    scan_some<T, E> some = {};
    if (t >= left || n >= p.N) return some;
    const T *from = line.at(t);
    if (p.states_fit) {
        some = *reinterpret_cast<const scan_some<T, E> *>(from);
    } else {
        T v[E];
#pragma unroll
        for (int e = 0; e < E; e++) v[e] = n + e < p.N ? from[e] : from_float<T>(0);
        memcpy(&some, v, sizeof some);
    }
    return some;
}

/* --- the walk ----------------------------------------------------------------------------------------------------- */

/* Where a thread stands in the walk. */
struct scan_place {
    int64_t row, segment, i; /* i: the first channel of the pair */
    int lane, local, n;      /* local: the first channel, within the block; n: first state, within the group */
    int quarter;             /* which of the four lanes of the pair */

    __device__ __forceinline__ scan_place() {
        row = blockIdx.z, segment = blockIdx.y;
        lane = threadIdx.x % WARP;
        local = 2 * (int)(threadIdx.x / 4), quarter = lane % 4;
        n = quarter * SCAN_STATES;
        i = (int64_t)blockIdx.x * SCAN_BLOCK + local;
    }
};

/* A log2(e) of the thread's states, 0 beyond the last. */
__device__ __forceinline__ void load_rates(float (&rate)[2][SCAN_STATES], const scan_problem &p, const scan_place &at,
                                           int n0) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int k = 0; k < SCAN_STATES; k++) {
            int64_t n = n0 + at.n + k, i = at.i + j;
            bool there = i < p.D && n < p.N;
            rate[j][k] = there ? fminf(-LOG2E * expf(p.A_log[i * p.N + n]), -SCAN_RATE_MIN) : 0;
        }
}

/* f(state, channel, j, k) for the thread's states k of channels j that exist. */
template <class F>
__device__ __forceinline__ void each_state(const scan_problem &p, const scan_place &at, int n0, F f) {
#pragma unroll
    for (int k = 0; k < SCAN_STATES; k++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int64_t n = n0 + at.n + k, i = at.i + j;
            if (n < p.N && i < p.D) f(n, i, j, k);
        }
}

/* The thread's states from or to the (N, D) of one batch row and piece or segment; what does not exist stays. */
template <bool WIDE>
__device__ __forceinline__ void load_pairs_of_states(float (&h)[2][SCAN_STATES], const float *from,
                                                     const scan_problem &p, const scan_place &at, int n0) {
    if (WIDE && n0 + at.n + SCAN_STATES <= p.N && at.i < p.D) {
#pragma unroll
        for (int k = 0; k < SCAN_STATES; k++) {
            float2 v = *reinterpret_cast<const float2 *>(from + (n0 + at.n + k) * p.D + at.i);
            h[0][k] = v.x, h[1][k] = v.y;
        }
    } else {
        each_state(p, at, n0, [&](int64_t n, int64_t i, int j, int k) { h[j][k] = from[n * p.D + i]; });
    }
}

template <bool WIDE>
__device__ __forceinline__ void store_pairs_of_states(float *to, const float (&h)[2][SCAN_STATES],
                                                      const scan_problem &p, const scan_place &at, int n0) {
    if (WIDE && n0 + at.n + SCAN_STATES <= p.N && at.i < p.D) {
#pragma unroll
        for (int k = 0; k < SCAN_STATES; k++)
            *reinterpret_cast<float2 *>(to + (n0 + at.n + k) * p.D + at.i) = make_float2(h[0][k], h[1][k]);
    } else {
        each_state(p, at, n0, [&](int64_t n, int64_t i, int j, int k) { to[n * p.D + i] = h[j][k]; });
    }
}

/* The sum over the four lanes of a pair of v[q], in lane q of them. */
__device__ __forceinline__ float sum_states(const float (&v)[4], int lane) {
    bool upper = lane & 2, odd = lane & 1;
    float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(FULL, upper ? v[0] : v[2], 2);
    float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(FULL, upper ? v[1] : v[3], 2);
    return (odd ? b : a) + __shfl_xor_sync(FULL, odd ? a : b, 1);
}

/* The thread's states of a token's b or c in shared memory. */
__device__ __forceinline__ void load_four(float (&out)[SCAN_STATES], const float *from) {
    float4 v = *reinterpret_cast<const float4 *>(from);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

#endif
