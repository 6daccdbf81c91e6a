/* rope.cu: positions of tokens within their documents; rotary positions with an optional norm of each head before them.
 *
 *   u = x rstd weight (or x);   y_i = u_i cos a - u_j sin a;   y_j = u_j cos a + u_i sin a;
 *   a = p base^(-2i/P), j = i + P/2
 *   backward   du_i = dy_i cos a + dy_j sin a;  du_j = dy_j cos a - dy_i sin a;
 *              xh = x rstd;  wdu = weight du;  c = mean(xh wdu);  dx = (wdu - xh c) rstd;  dweight += sum du xh
 *
 * Angles are multiplied out in double, as turns, and reduced there: right at any position. Rates of turning come from
 * the host as a kernel's argument.
 *
 * Without a norm, and where rows are aligned (turn_kernel): a block has TOKENS tokens; their cosines and sines are made
 * once, into shared memory, and serve all heads, queries and keys alike. A thread turns 8 or 4 neighbouring pairs at a
 * time, 16 bytes from each half of a head. 2eRHP bytes, bound by bandwidth: 0.2 GB for 32,768 tokens, 24 heads of 64 in
 * bf16, 0.07 ms at 3 TB/s.
 * Else (head_kernel, head_backward_kernel): a warp has one head of one token, a lane the pairs lane, lane + 32, ...
 * The gradient of the weight is summed by each warp over the heads that it walks, then over warps, in order: how they
 * are divided depends on the shape only, so two runs give the same bits. */
#include "kernels/cuda/turn.cuh"

enum {
    TOKENS = 4, /* of a block of turn_kernel */
    THREADS = 256,
    WARPS = THREADS / WARP,
    PAIRS = HALF_MAX / WARP, /* of a lane, at most */
    BLOCKS_MAX = 1024,       /* of the kernels in which a warp walks */
};

/* Head h of token r of a (B,T,H,P) view is data[r / T * row + r % T * step + h * head]. */
template <class T> struct head_rows {
    T *data;
    int64_t row, step, head;

    __device__ __forceinline__ T *at(int64_t r, int64_t per_row, int64_t h) const {
        return data + r / per_row * row + r % per_row * step + h * head;
    }
};

template <class T> static head_rows<T> heads_of(tensor t) {
    return {data_of<T>(t), t.dim[0] > 1 ? t.stride[0] : 0, t.dim[1] > 1 ? t.stride[1] : 0, t.stride[2]};
}

/* What the kernels are told. */
struct rope {
    const int32_t *positions; /* NULL: within the row */
    int64_t R, T;
    int H, half;
    float direction; /* -1: backwards */
};

__device__ __forceinline__ float2 turn_of(const rope &p, double rate, int64_t r) {
    return turn_by(p.positions ? p.positions[r] : r % p.T, rate, p.direction);
}

/* --- positions ---------------------------------------------------------------------------------------------------- */

/* Document numbers never decrease along a row, so where a token's document starts is found by halving. */
__global__ void positions_kernel(int32_t *positions, const int32_t *doc, const int32_t *before, int64_t R, int64_t T) {
    int64_t r = (int64_t)blockIdx.x * THREADS + threadIdx.x, b = r / T, t = r % T;
    if (r >= R) return;
    int64_t start = 0, end = doc ? t : 0;
    const int32_t *row = doc + b * T;
    while (start < end) {
        int64_t middle = (start + end) / 2;
        if (row[middle] == row[t]) end = middle;
        else start = middle + 1;
    }
    bool goes_on = before && (!doc || row[t] == 0);
    positions[r] = (int32_t)(t - start) + (goes_on ? before[b] : 0);
}

extern "C" void cuda_token_positions(struct device *dev, tensor positions, tensor doc, tensor before) {
    int64_t B = positions.dim[0], T = positions.dim[1];
    ASSERT(positions.dtype == DTYPE_I32 && (!tensor_given(doc) || tensor_is(doc, 2, B, T)));
    LAUNCH(dev, positions_kernel, (unsigned)ceil_div(B * T, THREADS), THREADS, 0, data_of<int32_t>(positions),
           data_of<int32_t>(doc), data_of<int32_t>(before), B * T, T);
}

/* --- turning alone ------------------------------------------------------------------------------------------------ */

/* y may be x: a thread reads both halves of its pairs before it writes them. */
template <class T, int V>
__global__ void turn_kernel(head_rows<T> y, head_rows<T> x, rope p, __grid_constant__ const turn_rates rates) {
    __shared__ float2 turns[TOKENS][HALF_MAX];
    int64_t r0 = (int64_t)blockIdx.x * TOKENS;
    int tokens = (int)at_most(TOKENS, p.R - r0), per_head = p.half / V, per_token = p.H * per_head;
    for (int i = threadIdx.x; i < tokens * p.half; i += THREADS)
        turns[i / p.half][i % p.half] = turn_of(p, rates.v[i % p.half], r0 + i / p.half);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * per_token; i += THREADS) {
        int token = i / per_token, h = i % per_token / per_head, c = i % per_head * V;
        float a[V], b[V];
        const T *from = x.at(r0 + token, p.T, h) + c;
        T *to = y.at(r0 + token, p.T, h) + c;
        load_floats<V>(a, from);
        load_floats<V>(b, from + p.half);
#pragma unroll
        for (int k = 0; k < V; k++) {
            float2 turn = turns[token][c + k];
            float u = a[k];
            a[k] = u * turn.x - b[k] * turn.y;
            b[k] = b[k] * turn.x + u * turn.y;
        }
        store_floats<V>(to, a);
        store_floats<V>(to + p.half, b);
    }
}

/* --- with a norm, or unaligned ------------------------------------------------------------------------------------ */

/* A lane's pairs of one head; zeros beyond the head's width. */
struct lane_pairs {
    float a[PAIRS], b[PAIRS];
};

template <class T> __device__ __forceinline__ lane_pairs load_pairs(const T *from, int half) {
    lane_pairs u;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        int i = threadIdx.x % WARP + k * WARP;
        u.a[k] = i < half ? to_float(from[i]) : 0.0f;
        u.b[k] = i < half ? to_float(from[i + half]) : 0.0f;
    }
    return u;
}

template <class T> __device__ __forceinline__ void store_pairs(T *to, const lane_pairs &u, int half) {
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        int i = threadIdx.x % WARP + k * WARP;
        if (i >= half) continue;
        to[i] = from_float<T>(u.a[k]);
        to[i + half] = from_float<T>(u.b[k]);
    }
}

__device__ __forceinline__ void turn_pairs(lane_pairs &u, const rope &p, const turn_rates &rates, int64_t r) {
#pragma unroll
    for (int k = 0; k < PAIRS; k++) {
        int i = threadIdx.x % WARP + k * WARP;
        if (i >= p.half) continue;
        float2 turn = turn_of(p, rates.v[i], r);
        float a = u.a[k];
        u.a[k] = a * turn.x - u.b[k] * turn.y;
        u.b[k] = u.b[k] * turn.x + a * turn.y;
    }
}

__device__ __forceinline__ float warp_dot(const lane_pairs &u, const lane_pairs &v) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) sum += u.a[k] * v.a[k] + u.b[k] * v.b[k];
    return warp_sum(sum);
}

template <class T>
__global__ void head_kernel(head_rows<T> y, float *rstd, head_rows<T> x, const float *weight, rope p,
                            __grid_constant__ const turn_rates rates, float eps) {
    int64_t warps = (int64_t)gridDim.x * WARPS;
    for (int64_t i = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP; i < p.R * p.H; i += warps) {
        int64_t r = i / p.H, h = i % p.H;
        lane_pairs u = load_pairs(x.at(r, p.T, h), p.half);
        if (weight) {
            float s = rsqrtf(warp_dot(u, u) / (2 * p.half) + eps);
            lane_pairs w = load_pairs(weight, p.half);
            if (threadIdx.x % WARP == 0) rstd[i] = s;
#pragma unroll
            for (int k = 0; k < PAIRS; k++) u.a[k] *= s * w.a[k], u.b[k] *= s * w.b[k];
        }
        turn_pairs(u, p, rates, r);
        store_pairs(y.at(r, p.T, h), u, p.half);
    }
}

/* With a norm. Each warp leaves its share of the weight's gradient in a row of `partial` (blocks WARPS, P). */
template <class T>
__global__ void head_backward_kernel(head_rows<T> dx, float *partial, head_rows<T> dy, const float *rstd,
                                     head_rows<T> x, const float *weight, rope p,
                                     __grid_constant__ const turn_rates rates) {
    int64_t warp = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP, warps = (int64_t)gridDim.x * WARPS;
    lane_pairs w = load_pairs(weight, p.half), dw = {};
    for (int64_t i = warp; i < p.R * p.H; i += warps) {
        int64_t r = i / p.H, h = i % p.H;
        lane_pairs du = load_pairs(dy.at(r, p.T, h), p.half), xh = load_pairs(x.at(r, p.T, h), p.half);
        float s = rstd[i];
        turn_pairs(du, p, rates, r);
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            xh.a[k] *= s, xh.b[k] *= s;
            dw.a[k] += du.a[k] * xh.a[k], dw.b[k] += du.b[k] * xh.b[k];
            du.a[k] *= w.a[k], du.b[k] *= w.b[k];
        }
        float c = warp_dot(du, xh) / (2 * p.half);
#pragma unroll
        for (int k = 0; k < PAIRS; k++) {
            du.a[k] = (du.a[k] - xh.a[k] * c) * s;
            du.b[k] = (du.b[k] - xh.b[k] * c) * s;
        }
        store_pairs(dx.at(r, p.T, h), du, p.half);
    }
    store_pairs(partial + warp * 2 * p.half, dw, p.half);
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

static unsigned walking_blocks(int64_t R, int64_t H) {
    return (unsigned)at_most(ceil_div(R * H, WARPS), BLOCKS_MAX);
}

static rope rope_of(tensor y, tensor positions, float direction) {
    int64_t B = y.dim[0], T = y.dim[1], P = y.dim[3];
    ASSERT(P % 2 == 0 && P <= 2 * HALF_MAX && (!tensor_given(positions) || tensor_is(positions, 2, B, T)));
    return {data_of<int32_t>(positions), B * T, T, (int)y.dim[2], (int)(P / 2), direction};
}

/* y = x turned, without a norm. */
template <class T> static void turn(struct device *dev, tensor y, tensor x, const rope &p, const turn_rates &rates) {
    constexpr int V = 16 / sizeof(T);
    head_rows<T> to = heads_of<T>(y), from = heads_of<T>(x);
    if (p.half % V == 0 && vectors_fit(y, V) && vectors_fit(x, V))
        LAUNCH(dev, (turn_kernel<T, V>), (unsigned)ceil_div(p.R, TOKENS), THREADS, 0, to, from, p, rates);
    else
        LAUNCH(dev, head_kernel<T>, walking_blocks(p.R, p.H), THREADS, 0, to, (float *)NULL, from, (const float *)NULL,
               p, rates, 0.0f);
}

extern "C" void cuda_rope_forward(struct device *dev, tensor y, tensor rstd, tensor x, tensor weight, tensor positions,
                                  double base, double eps) {
    rope p = rope_of(y, positions, 1);
    turn_rates rates = rates_of(y.dim[3], base);
    ASSERT(x.dtype == y.dtype && tensor_is(x, 4, y.dim[0], y.dim[1], y.dim[2], y.dim[3]));
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        if (!tensor_given(weight)) {
            turn<T>(dev, y, x, p, rates);
            return;
        }
        LAUNCH(dev, head_kernel<T>, walking_blocks(p.R, p.H), THREADS, 0, heads_of<T>(y), data_of<float>(rstd),
               heads_of<T>(x), data_of<float>(weight), p, rates, (float)eps);
    });
}

extern "C" void cuda_rope_backward(struct device *dev, tensor dx, tensor dweight, tensor dy, tensor rstd, tensor x,
                                   tensor weight, tensor positions, double base, void *scratch) {
    rope p = rope_of(dy, positions, -1);
    turn_rates rates = rates_of(dy.dim[3], base);
    ASSERT(dx.dtype == dy.dtype && tensor_is(dx, 4, dy.dim[0], dy.dim[1], dy.dim[2], dy.dim[3]));
    with_type(dy.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        if (!tensor_given(weight)) {
            turn<T>(dev, dx, dy, p, rates);
            return;
        }
        unsigned blocks = walking_blocks(p.R, p.H);
        LAUNCH(dev, head_backward_kernel<T>, blocks, THREADS, 0, heads_of<T>(dx), (float *)scratch, heads_of<T>(dy),
               data_of<float>(rstd), heads_of<T>(x), data_of<float>(weight), p, rates);
        cuda_add_partials(dev, data_of<float>(dweight), (const float *)scratch, (int64_t)blocks * WARPS, dy.dim[3]);
    });
}

extern "C" size_t cuda_rope_backward_scratch(int64_t R, int64_t H, int64_t P) {
    return (size_t)(walking_blocks(R, H) * WARPS * P) * sizeof(float);
}
