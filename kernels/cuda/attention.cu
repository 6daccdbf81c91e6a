/* attention.cu: causal attention within documents, with grouped heads, a window and a cache: the choice of a path, and
 * the path that serves everything: fp32, odd widths, unaligned rows. bf16 in regular shapes is attention_mma.cu's, or,
 * where a row is one document and nothing lies in a cache, cuDNN's if it is there (attention_cudnn.h). Documents are not
 * cuDNN's: it knows sequences of their own, whose number would be part of a plan, while a recorded step must serve any
 * number; and blocks here skip what another document makes invisible.
 *
 *   z_tj = s q_t . k_j;   lse_t = log sum_j exp(z_tj);   o_t = sum_j exp(z_tj - lse_t) v_j
 *   backward   p_tj = exp(z_tj - lse_t);  delta_t = do_t . o_t;  dz_tj = p_tj (do_t . v_j - delta_t)
 *              dq_t = s sum_j dz_tj k_j;   dk_j = s sum_t dz_tj q_t;   dv_j = sum_t p_tj do_t
 *
 * A token's visible keys are a range that ends with itself, and the beginnings of the ranges never decrease along a row
 * (first_key in attention.cuh), so what a block of queries sees is a range of keys, and what sees a block of keys a range
 * of queries: other documents and what lies outside the window cost nothing.
 *
 * Forward and dq: a block has TILE queries of one head and walks over their keys in tiles; a warp has ROWS queries, and
 * in it a lane is a key for scores, a channel (and that plus 32, ...) for sums. dk and dv: the same with queries and keys
 * exchanged, walking over the queries of all heads that share the keys. Tiles are fp32 in shared memory, one element of
 * padding a row. Every sum belongs to one lane and is added in a fixed order: two runs give the same bits. 2 B H T^2 P
 * FLOPs forward, 7 B H T^2 P backward (scores and dz are made twice) of full causal attention, at fp32's rate and
 * shared memory's pace: some 15 TFLOP/s, 9 ms for B 8, T 2048, 16 heads of 128 forward.
 *
 * One token: blocks of keys, each with a running softmax; then, where there are several, their sum weighted by what each
 * has seen. Bytes: the cache once. */
#include "have_cudnn.h"
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/attention_tile.cuh"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

attention_problem attention_problem_of(tensor q, tensor k, tensor positions, struct attention_cache cache,
                                       struct attention_rule rule) {
    attention_problem p = {};
    p.positions = data_of<int32_t>(positions);
    p.B = q.dim[0], p.T = q.dim[1], p.H = (int)q.dim[2], p.P = (int)q.dim[3], p.G = (int)k.dim[2];
    p.share = p.H / p.G;
    p.tiled = rule.tiled;
    p.scale = (float)(1 / sqrt((double)p.P));
    ASSERT(p.H % p.G == 0 && p.P <= WIDEST && p.T < INT32_MAX / 2 && k.dtype == q.dtype);
    if (tensor_given(cache.k)) {
        p.count = data_of<int32_t>(cache.count);
        p.C = cache.k.dim[1];
        ASSERT(tensor_given(positions) && tensor_contiguous(cache.k) && tensor_contiguous(cache.v));
    }
    p.window = rule.window > 0 ? at_most(rule.window, p.T + p.C) : p.T + p.C + 1;
    return p;
}

/* --- tiles -------------------------------------------------------------------------------------------------------- */

/* `rows` queries t0 .. of head h, or what has their shape. */
template <class T>
__device__ __forceinline__ void load_queries(float *tile, int rows, const attention_problem &p,
                                             const attention_rows<T> &x, int64_t b, int t0, int h) {
    for (int i = threadIdx.x / WARP; i < rows; i += (int)blockDim.x / WARP) {
        float *to = tile_row(tile, p.P, i);
        const T *from = x.at(b, t0 + i, h);
        for (int c = threadIdx.x % WARP; c < p.P; c += WARP) to[c] = t0 + i < p.T ? to_float(from[c]) : 0.0f;
    }
}

/* A tile of keys or values j0 .. of head g, before `end`. */
template <class T>
__device__ __forceinline__ void load_keys(float *tile, const attention_problem &p, const attention_rows<T> &x,
                                          const attention_rows<T> &cache, int64_t b, int j0, int end, int g) {
    for (int i = threadIdx.x / WARP; i < TILE; i += (int)blockDim.x / WARP) {
        float *to = tile_row(tile, p.P, i);
        const T *from = j0 + i < end ? key_at(p, x, cache, b, j0 + i, g) : NULL;
        for (int c = threadIdx.x % WARP; c < p.P; c += WARP) to[c] = from ? to_float(from[c]) : 0.0f;
    }
}

/* The warp's rows, times `factor`, to tokens t0 .. of head h. */
template <class T>
__device__ __forceinline__ void store_rows(const attention_rows<T> &x, const attention_problem &p, int64_t b, int t0,
                                           int h, const float (&sum)[ROWS][PARTS], const float (&factor)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (t0 + r >= p.T) continue;
        T *to = x.at(b, t0 + r, h);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int c = threadIdx.x % WARP + i * WARP;
            if (c < p.P) to[c] = from_float<T>(sum[r][i] * factor[r]);
        }
    }
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

template <class T>
__global__ void __launch_bounds__(THREADS)
attention_forward_kernel(attention_rows<T> o, float *lse, attention_rows<T> q, attention_rows<T> k, attention_rows<T> v,
                         attention_rows<T> cache_k, attention_rows<T> cache_v, attention_problem p) {
    DYNAMIC_SHARED(float, memory);
    float *queries = memory, *keys = tile_row(queries, p.P, TILE), *values = tile_row(keys, p.P, TILE);
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = blockIdx.x * TILE, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * ROWS, end = (int)at_most(t0 + TILE, p.T), first[ROWS];
    float high[ROWS], total[ROWS], sum[ROWS][PARTS] = {};
    for (int r = 0; r < ROWS; r++) {
        first[r] = first_key(p, b, t0 + row + r);
        high[r] = -INFINITY, total[r] = 0;
    }
    load_queries(queries, TILE, p, q, b, t0, h);
    for (int j0 = first_key(p, b, t0); j0 < end; j0 += TILE) {
        __syncthreads();
        load_keys(keys, p, k, cache_k, b, j0, end, g);
        load_keys(values, p, v, cache_v, b, j0, end, g);
        __syncthreads();
        float z[ROWS];
        multiply(z, tile_row(queries, p.P, row), tile_row(keys, p.P, lane), p.P);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool sees = j0 + lane >= first[r] && j0 + lane <= t0 + row + r;
            z[r] = sees ? z[r] * p.scale : -INFINITY;
            float now = fmaxf(high[r], warp_max(z[r])), rest = now == -INFINITY ? 1.0f : expf(high[r] - now);
            z[r] = sees ? expf(z[r] - now) : 0.0f;
            total[r] = total[r] * rest + warp_sum(z[r]);
            high[r] = now;
#pragma unroll
            for (int i = 0; i < PARTS; i++) sum[r][i] *= rest;
        }
        add_rows(sum, z, values, p.P);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int t = t0 + row + r;
        if (lse && lane == 0 && t < p.T) lse[(b * p.H + h) * p.T + t] = high[r] + logf(total[r]);
        total[r] = 1.0f / total[r];
    }
    store_rows(o, p, b, t0 + row, h, sum, total);
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* dq, and delta (B,H,T) on the way. */
template <class T>
__global__ void __launch_bounds__(THREADS)
attention_dq_kernel(attention_rows<T> dq, float *delta, attention_rows<T> dout, attention_rows<T> o, const float *lse,
                    attention_rows<T> q, attention_rows<T> k, attention_rows<T> v, attention_rows<T> cache_k,
                    attention_rows<T> cache_v, attention_problem p) {
    DYNAMIC_SHARED(float, memory);
    int own = own_rows();
    float *queries = memory, *douts = tile_row(queries, p.P, own), *keys = tile_row(douts, p.P, own);
    float *values = tile_row(keys, p.P, TILE);
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = blockIdx.x * own, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * ROWS, end = (int)at_most(t0 + own, p.T), first[ROWS];
    float log_sum[ROWS], dot[ROWS], scale[ROWS], sum[ROWS][PARTS] = {};
    load_queries(queries, own, p, q, b, t0, h);
    load_queries(douts, own, p, dout, b, t0, h);
    load_queries(values, own, p, o, b, t0, h);
    __syncthreads();
    for (int r = 0; r < ROWS; r++) {
        int t = t0 + row + r;
        const float *a = tile_row(douts, p.P, row + r), *c = tile_row(values, p.P, row + r);
        first[r] = first_key(p, b, t);
        log_sum[r] = t < p.T ? lse[(b * p.H + h) * p.T + t] : 0.0f;
        dot[r] = 0;
        for (int i = lane; i < p.P; i += WARP) dot[r] += a[i] * c[i];
        dot[r] = warp_sum(dot[r]);
        if (lane == 0 && t < p.T) delta[(b * p.H + h) * p.T + t] = dot[r];
        scale[r] = p.scale;
    }
    for (int j0 = first_key(p, b, t0); j0 < end; j0 += TILE) {
        __syncthreads();
        load_keys(keys, p, k, cache_k, b, j0, end, g);
        load_keys(values, p, v, cache_v, b, j0, end, g);
        __syncthreads();
        float z[ROWS], dz[ROWS];
        multiply(z, tile_row(queries, p.P, row), tile_row(keys, p.P, lane), p.P);
        multiply(dz, tile_row(douts, p.P, row), tile_row(values, p.P, lane), p.P);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool sees = j0 + lane >= first[r] && j0 + lane <= t0 + row + r;
            dz[r] = sees ? expf(z[r] * p.scale - log_sum[r]) * (dz[r] - dot[r]) : 0.0f;
        }
        add_rows(sum, dz, keys, p.P);
    }
    store_rows(dq, p, b, t0 + row, h, sum, scale);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
attention_dkv_kernel(attention_rows<T> dk, attention_rows<T> dv, attention_rows<T> dout, const float *delta,
                     const float *lse, attention_rows<T> q, attention_rows<T> k, attention_rows<T> v,
                     attention_problem p) {
    DYNAMIC_SHARED(float, memory);
    int own = own_rows();
    float *queries = memory, *douts = tile_row(queries, p.P, TILE), *keys = tile_row(douts, p.P, TILE);
    float *values = tile_row(keys, p.P, own);
    int64_t b = blockIdx.z;
    int g = blockIdx.y, j0 = blockIdx.x * own, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * ROWS;
    float scale[ROWS], one[ROWS], sum_k[ROWS][PARTS] = {}, sum_v[ROWS][PARTS] = {};
    load_queries(keys, own, p, k, b, j0, g);
    load_queries(values, own, p, v, b, j0, g);
    for (int i = 0; i < p.share; i++) {
        int h = query_head(p, g, i);
        const float *lse_row = lse + (b * p.H + h) * p.T, *delta_row = delta + (b * p.H + h) * p.T;
        for (int t0 = j0; t0 < p.T && first_key(p, b, t0) < j0 + own; t0 += TILE) {
            __syncthreads();
            load_queries(queries, TILE, p, q, b, t0, h);
            load_queries(douts, TILE, p, dout, b, t0, h);
            __syncthreads();
            int t = t0 + lane, first = first_key(p, b, t);
            float z[ROWS], dz[ROWS], log_sum = t < p.T ? lse_row[t] : 0.0f, dot = t < p.T ? delta_row[t] : 0.0f;
            multiply(z, tile_row(keys, p.P, row), tile_row(queries, p.P, lane), p.P);
            multiply(dz, tile_row(values, p.P, row), tile_row(douts, p.P, lane), p.P);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                bool sees = j0 + row + r >= first && j0 + row + r <= t;
                z[r] = sees ? expf(z[r] * p.scale - log_sum) : 0.0f;
                dz[r] = z[r] * (dz[r] - dot);
            }
            add_rows(sum_v, z, douts, p.P);
            add_rows(sum_k, dz, queries, p.P);
        }
    }
    for (int r = 0; r < ROWS; r++) scale[r] = p.scale, one[r] = 1;
    store_rows(dk, p, b, j0 + row, g, sum_k, scale);
    store_rows(dv, p, b, j0 + row, g, sum_v, one);
}

/* --- one token ---------------------------------------------------------------------------------------------------- */

enum {
    STEP_KEYS = 256,                 /* of a block */
    STEP_LANES = 16,                 /* lanes that share a key */
    STEP_GROUPS = THREADS / STEP_LANES,
    STEP_CHANNELS = WIDEST / STEP_LANES, /* of a lane, at most */
};

struct step_problem {
    const int32_t *count;
    int64_t C, window;
    int H, G, P, share, pieces; /* pieces: blocks along the cache */
    bool tiled;
    float scale;
};

/* A running softmax: o = sum / total. */
struct step_sum {
    float high, total, sum[STEP_CHANNELS];
};

/* Take `other` in, weighted by what it has seen. */
__device__ __forceinline__ void step_merge(step_sum &s, float high, float total, const float *sum, int stride) {
    float now = fmaxf(s.high, high);
    if (now == -INFINITY) return;
    float mine = expf(s.high - now), its = expf(high - now);
    s.total = s.total * mine + total * its;
    s.high = now;
#pragma unroll
    for (int i = 0; i < STEP_CHANNELS; i++) s.sum[i] = s.sum[i] * mine + sum[i * stride] * its;
}

/* V channels lie together: lane l of STEP_LANES has channels (l + STEP_LANES n) V .. + V - 1. The block's keys are the
 * newest but `blockIdx.x` STEP_KEYS. o itself is written where there is one piece, else (B,H,pieces,P + 2). */
template <class T, int V>
__global__ void __launch_bounds__(THREADS)
attention_step_kernel(attention_rows<T> o, float *parts, attention_rows<T> q, attention_rows<T> cache_k,
                      attention_rows<T> cache_v, step_problem p) {
    __shared__ float highs[STEP_GROUPS], totals[STEP_GROUPS], sums[STEP_GROUPS][WIDEST];
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = p.tiled ? h % p.G : h / p.share, lane = threadIdx.x % STEP_LANES;
    int group = threadIdx.x / STEP_LANES;
    int64_t count = p.count[b], seen = at_most(at_most(count, p.C), p.window);
    int64_t from = (int64_t)blockIdx.x * STEP_KEYS, end = at_most(from + STEP_KEYS, seen);
    float mine[STEP_CHANNELS];
    step_sum s = {-INFINITY, 0, {}};
    const T *query = q.at(b, 0, h);
#pragma unroll
    for (int n = 0; n < STEP_CHANNELS / V; n++) {
        int c = (lane + STEP_LANES * n) * V;
        float (&part)[V] = *reinterpret_cast<float (*)[V]>(mine + n * V);
        for (int i = 0; i < V; i++) part[i] = c + i < p.P ? to_float(query[c + i]) : 0.0f;
    }
    for (int64_t i = from; i < end; i += STEP_GROUPS) { /* the same number of rounds for all lanes of a warp */
        bool there = i + group < end;
        int64_t slot = (count - 1 - (there ? i + group : i)) % p.C;
        const T *key = cache_k.at(b, slot, g), *value = cache_v.at(b, slot, g);
        float dot = 0, part[V], values[STEP_CHANNELS];
#pragma unroll
        for (int n = 0; n < STEP_CHANNELS / V; n++) {
            int c = (lane + STEP_LANES * n) * V;
            if (c < p.P) load_floats<V>(part, key + c);
            for (int k = 0; k < V; k++) dot += c < p.P ? mine[n * V + k] * part[k] : 0.0f;
            if (c < p.P) load_floats<V>(part, value + c);
            for (int k = 0; k < V; k++) values[n * V + k] = c < p.P ? part[k] : 0.0f;
        }
#pragma unroll
        for (int offset = STEP_LANES / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(FULL, dot, offset);
        if (there) step_merge(s, dot * p.scale, 1.0f, values, 1);
    }
    if (lane == 0) highs[group] = s.high, totals[group] = s.total;
#pragma unroll
    for (int i = 0; i < STEP_CHANNELS; i++) sums[group][(lane + STEP_LANES * (i / V)) * V + i % V] = s.sum[i];
    __syncthreads();
    float high = -INFINITY, total = 0, sum = 0;
    int c = threadIdx.x;
    for (int i = 0; i < STEP_GROUPS; i++) high = fmaxf(high, highs[i]);
    for (int i = 0; i < STEP_GROUPS && high > -INFINITY; i++) {
        float share = expf(highs[i] - high);
        total += share * totals[i];
        sum += share * sums[i][c];
    }
    if (p.pieces == 1) {
        if (c < p.P) o.at(b, 0, h)[c] = from_float<T>(sum / total);
        return;
    }
    float *part = parts + ((b * p.H + h) * p.pieces + blockIdx.x) * (p.P + 2);
    if (c < p.P) part[2 + c] = sum;
    if (c == 0) part[0] = high, part[1] = total;
}

template <class T> __global__ void attention_step_sum_kernel(attention_rows<T> o, const float *parts, step_problem p) {
    int64_t b = blockIdx.y;
    int h = blockIdx.x, c = threadIdx.x;
    const float *part = parts + (b * p.H + h) * p.pieces * (p.P + 2);
    float high = -INFINITY, total = 0, sum = 0;
    for (int i = 0; i < p.pieces; i++) high = fmaxf(high, part[i * (p.P + 2)]);
    for (int i = 0; i < p.pieces; i++) {
        float share = expf(part[i * (p.P + 2)] - high);
        if (share == 0) continue;
        total += share * part[i * (p.P + 2) + 1];
        sum += c < p.P ? share * part[i * (p.P + 2) + 2 + c] : 0.0f;
    }
    if (c < p.P) o.at(b, 0, h)[c] = from_float<T>(sum / total);
}

/* --- the cache ---------------------------------------------------------------------------------------------------- */

/* A block has one token: the newest but blockIdx.x of its row. */
template <class T>
__global__ void attention_store_kernel(T *cache_k, T *cache_v, int32_t *count, attention_rows<T> k, attention_rows<T> v,
                                       const int32_t *positions, int64_t T_, int64_t C, int G, int P) {
    int64_t b = blockIdx.y, t = T_ - 1 - blockIdx.x;
    int64_t last = positions ? positions[b * T_ + T_ - 1] : T_ - 1, position = last - blockIdx.x;
    if (position < 0) return; /* of a document before the last */
    int64_t to = (b * C + position % C) * G * P;
    for (int i = threadIdx.x; i < G * P; i += THREADS) {
        cache_k[to + i] = k.at(b, t, i / P)[i % P];
        cache_v[to + i] = v.at(b, t, i / P)[i % P];
    }
    __syncthreads(); /* with one token, its position may lie where the count does */
    if (blockIdx.x == 0 && threadIdx.x == 0) count[b] = (int32_t)(last + 1);
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

/* cuDNN, opened when it is first asked for. RIVERRUN_CUDNN=0 in the environment does without; RIVERRUN_CUDNN=unordered
 * is for comparisons: its backward then may add in any order. */
#ifdef RIVERRUN_CUDNN
static bool cudnn_wanted(const char *how) {
    const char *wanted = getenv("RIVERRUN_CUDNN");
    return wanted && strcmp(wanted, how) == 0;
}

struct attention_cudnn *cuda_attention_cudnn(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    if (c->cudnn_version >= 0) return c->cudnn;
    c->cudnn_version = cudnn_wanted("0") ? 0 : attention_cudnn_open(&c->cudnn, c->stream);
    return c->cudnn;
}

void cuda_attention_close(struct cuda_device *c) {
    attention_cudnn_close(c->cudnn);
    c->cudnn = NULL;
}

/* Is it worth asking? Heads as they are tiled are cuDNN's only where there is one order. */
static bool cudnn_serves(struct device *dev, const attention_problem &p, bool aligned) {
    enum { SHORTEST = 128 }; /* below this there is nothing to gain */
    if (!aligned || p.positions || p.count || p.T < SHORTEST || (p.tiled && p.G > 1 && p.G < p.H)) return false;
    return cuda_attention_cudnn(dev) != NULL;
}

/* The deterministic backward has two bytes of memory for every pair of tokens that a head could have, T rounded up to 64
 * and to 128 (cuDNN's frontend 1.32, scaled_dot_product_flash_attention.h, "dP workspace"), and a sum for every token.
 * So it is called for some rows, or some heads of a row, at a time: as many as PAIRS_MOST holds, which is one head of
 * 23,000 tokens; longer rows are not for it. */
static const size_t PAIRS_MOST = (size_t)1 << 30, PAIRS_BESIDE = (size_t)1 << 20;

static size_t pair_bytes(int64_t T) {
    return 2 * (size_t)(ceil_div(T, 64) * 64) * (size_t)(ceil_div(T, 128) * 128);
}

/* Narrow heads go back by riverrun's own kernels: on an H100 16 x 2,048 tokens of 12 heads of 64 take them 0.94 ms, where
 * cuDNN takes 1.31; 128 channels take 1.3 and 0.95. */
static bool cudnn_goes_back(int64_t P) {
    return P > 64;
}

static size_t cudnn_workspace(struct attention_shape s) {
    if (!cudnn_goes_back(s.P)) return 0;
    size_t wanted = pair_bytes(s.T) < PAIRS_MOST ? (size_t)(s.B * s.H) * pair_bytes(s.T) : PAIRS_MOST;
    return (wanted < PAIRS_MOST ? wanted : PAIRS_MOST) + PAIRS_BESIDE;
}

/* Of `count` things, at most `most` at a time: how many, if all calls but the last have as many. */
static int64_t even_share(int64_t count, int64_t most) {
    return ceil_div(count, ceil_div(count, most));
}

/* What one call of backward is for. */
struct cudnn_part {
    int64_t rows, heads;
};

static cudnn_part cudnn_part_of(const attention_problem &p) {
    if (cudnn_wanted("unordered")) return {p.B, p.H};
    int64_t pairs = (int64_t)(PAIRS_MOST / pair_bytes(p.T));
    if (pairs >= p.H) return {even_share(p.B, at_most(pairs / p.H, p.B)), p.H};
    int64_t groups = pairs / p.share; /* heads that share keys stay together */
    return {1, groups > 0 ? even_share(p.G, groups) * p.share : 0};
}

static struct attention_cudnn_strides cudnn_strides(tensor t) {
    return {t.stride[0], t.stride[1], t.stride[2]};
}

static attention_cudnn_shape cudnn_shape(const attention_problem &p, tensor q, tensor k, tensor v, tensor o) {
    attention_cudnn_shape s;
    memset(&s, 0, sizeof s);
    s.B = p.B, s.T = p.T, s.H = p.H, s.G = p.G, s.P = p.P;
    s.window = p.window < p.T ? p.window : 0;
    s.scale = p.scale;
    s.q = cudnn_strides(q), s.k = cudnn_strides(k), s.v = cudnn_strides(v), s.o = cudnn_strides(o);
    return s;
}

struct attention_cudnn *cuda_attention_cudnn_fork(struct device *dev) {
    return attention_cudnn_fork(cuda_impl(dev)->cudnn);
}

void cuda_attention_cudnn_join(struct device *dev) {
    if (!attention_cudnn_join(cuda_impl(dev)->cudnn)) cuda_keep_failure(dev, "cuDNN", "its two streams can't be joined");
}

bool cuda_attention_cudnn_run(struct attention_cudnn *c, const attention_cudnn_shape *s,
                              const attention_cudnn_operands *x) {
    char why[256] = "";
    bool done = attention_cudnn_run(c, s, x, why, sizeof why);
    if (why[0])
        fprintf(stderr, "riverrun: cuDNN%s attention of %lld x %lld tokens, %lld heads of %lld: %s%s\n",
                done ? ", for" : " does not serve", (long long)s->B, (long long)s->T, (long long)s->H,
                (long long)s->P, why,
                done ? "" : "; riverrun's own kernels do");
    return done;
}

static bool cudnn_forward(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v,
                          const attention_problem &p) {
    attention_cudnn_shape s = cudnn_shape(p, q, k, v, o);
    s.logarithms = tensor_given(lse);
    attention_cudnn_operands x = {q.data, k.data, v.data, o.data, NULL, NULL, NULL, NULL, data_of<float>(lse), NULL, 0};
    return cuda_attention_cudnn_run(cuda_impl(dev)->cudnn, &s, &x);
}

/* Rows from b on and heads from h on of an operand. */
static void *cudnn_from(tensor t, int64_t b, int64_t h) {
    return (char *)t.data + (size_t)(b * t.stride[0] + h * t.stride[2]) * dtype_size(t.dtype);
}

static bool cudnn_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                           tensor q, tensor k, tensor v, const attention_problem &p, void *workspace, size_t bytes) {
    cudnn_part part = cudnn_part_of(p);
    attention_cudnn_shape s = cudnn_shape(p, q, k, v, o);
    s.backward = 1;
    s.unordered = cudnn_wanted("unordered");
    s.dq = cudnn_strides(dq), s.dk = cudnn_strides(dk), s.dv = cudnn_strides(dv), s.dout = cudnn_strides(dout);
    if (part.heads == 0 || (!s.unordered && !cudnn_goes_back(p.P))) return false;
    for (int64_t b = 0; b < p.B; b += part.rows)
        for (int64_t h = 0; h < p.H; h += part.heads) {
            int64_t g = h / p.share;
            s.B = at_most(part.rows, p.B - b);
            s.H = at_most(part.heads, p.H - h), s.G = s.H / p.share;
            attention_cudnn_operands x = {
                cudnn_from(q, b, h), cudnn_from(k, b, g), cudnn_from(v, b, g), cudnn_from(o, b, h),
                cudnn_from(dq, b, h), cudnn_from(dk, b, g), cudnn_from(dv, b, g), cudnn_from(dout, b, h),
                data_of<float>(lse) + (b * p.H + h) * p.T, workspace, bytes};
            if (!cuda_attention_cudnn_run(cuda_impl(dev)->cudnn, &s, &x)) return false;
        }
    return true;
}

void cuda_attention_describe(struct device *dev, char *out, size_t size) {
    if (dev->precision != PRECISION_BF16) return;
    if (!cuda_attention_cudnn(dev)) snprintf(out, size, ", attention by riverrun's own kernels");
    else snprintf(out, size, ", attention by cuDNN %d.%d%s where a row is one document",
                  (int)(cuda_impl(dev)->cudnn_version / 10000), (int)(cuda_impl(dev)->cudnn_version / 100 % 100),
                  cudnn_wanted("unordered") ? ", backward in any order," : "");
}
#else
struct attention_cudnn *cuda_attention_cudnn(struct device *) {
    return NULL;
}

struct attention_cudnn *cuda_attention_cudnn_fork(struct device *) {
    return NULL;
}

void cuda_attention_cudnn_join(struct device *) {}

bool cuda_attention_cudnn_run(struct attention_cudnn *, const attention_cudnn_shape *,
                              const attention_cudnn_operands *) {
    return false;
}

static bool cudnn_serves(struct device *, const attention_problem &, bool) {
    return false;
}

static bool cudnn_forward(struct device *, tensor, tensor, tensor, tensor, tensor, const attention_problem &) {
    return false;
}

static bool cudnn_backward(struct device *, tensor, tensor, tensor, tensor, tensor, tensor, tensor, tensor, tensor,
                           const attention_problem &, void *, size_t) {
    return false;
}

static size_t cudnn_workspace(struct attention_shape) {
    return 0;
}

void cuda_attention_close(struct cuda_device *) {}

void cuda_attention_describe(struct device *dev, char *out, size_t size) {
    if (dev->precision == PRECISION_BF16) snprintf(out, size, ", attention by riverrun's own kernels");
}
#endif

static dim3 tiles_grid(const attention_problem &p, unsigned rows, int heads) {
    return dim3((unsigned)ceil_div(p.T, rows), (unsigned)heads, (unsigned)p.B);
}

static void forward_plain(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v,
                          struct attention_cache cache, const attention_problem &p) {
    with_type(q.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        size_t bytes = rows_bytes(p.P, 3 * TILE);
        allow_shared(dev, attention_forward_kernel<T>, bytes, "attention");
        LAUNCH(dev, attention_forward_kernel<T>, tiles_grid(p, TILE, p.H), THREADS, bytes, attention_rows_of<T>(o),
               data_of<float>(lse), attention_rows_of<T>(q), attention_rows_of<T>(k), attention_rows_of<T>(v),
               attention_rows_of<T>(cache.k), attention_rows_of<T>(cache.v), p);
    });
}

static void backward_plain(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                           tensor q, tensor k, tensor v, struct attention_cache cache, const attention_problem &p,
                           float *delta) {
    with_type(q.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        back_block block = back_block_of(dev, p.P);
        attention_rows<T> douts = attention_rows_of<T>(dout), queries = attention_rows_of<T>(q);
        attention_rows<T> keys = attention_rows_of<T>(k), values = attention_rows_of<T>(v);
        allow_shared(dev, attention_dq_kernel<T>, block.bytes, "attention");
        allow_shared(dev, attention_dkv_kernel<T>, block.bytes, "attention");
        LAUNCH(dev, attention_dq_kernel<T>, tiles_grid(p, block.rows, p.H), block.threads, block.bytes,
               attention_rows_of<T>(dq), delta, douts, attention_rows_of<T>(o), data_of<float>(lse), queries, keys,
               values, attention_rows_of<T>(cache.k), attention_rows_of<T>(cache.v), p);
        LAUNCH(dev, attention_dkv_kernel<T>, tiles_grid(p, block.rows, p.G), block.threads, block.bytes,
               attention_rows_of<T>(dk), attention_rows_of<T>(dv), douts, delta, data_of<float>(lse), queries, keys,
               values, p);
    });
}

extern "C" void cuda_attention_forward(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v,
                                       tensor positions, struct attention_cache cache, struct attention_rule rule,
                                       void *scratch) {
    (void)scratch;
    attention_problem p = attention_problem_of(q, k, positions, cache, rule);
    bool aligned = attention_mma_serves(q, k, v, o);
    if (cudnn_serves(dev, p, aligned) && cudnn_forward(dev, o, lse, q, k, v, p)) return;
    if (aligned) attention_mma_forward(dev, o, lse, q, k, v, cache, p);
    else forward_plain(dev, o, lse, q, k, v, cache, p);
}

extern "C" size_t cuda_attention_backward_scratch(struct attention_shape s) {
    return (size_t)(s.B * s.H * s.T) * sizeof(float) + cudnn_workspace(s); /* delta, or cuDNN's sums */
}

extern "C" void cuda_attention_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o,
                                        tensor lse, tensor q, tensor k, tensor v, tensor positions,
                                        struct attention_cache cache, struct attention_rule rule, void *scratch) {
    attention_problem p = attention_problem_of(q, k, positions, cache, rule);
    bool aligned = attention_mma_serves(dq, dk, dv, o) && attention_mma_serves(q, k, v, dout);
    size_t bytes = cuda_attention_backward_scratch({p.B, p.T, p.H, p.G, p.P, 0});
    if (cudnn_serves(dev, p, aligned) && cudnn_backward(dev, dq, dk, dv, dout, o, lse, q, k, v, p, scratch, bytes))
        return;
    if (aligned) attention_mma_backward(dev, dq, dk, dv, dout, o, lse, q, k, v, cache, p, (float *)scratch);
    else backward_plain(dev, dq, dk, dv, dout, o, lse, q, k, v, cache, p, (float *)scratch);
}

extern "C" size_t cuda_attention_forward_scratch(struct attention_shape shape) {
    (void)shape;
    return 0;
}

extern "C" void cuda_attention_store(struct device *dev, struct attention_cache cache, tensor k, tensor v,
                                     tensor positions) {
    int64_t B = k.dim[0], T = k.dim[1], G = k.dim[2], P = k.dim[3], C = cache.k.dim[1];
    ASSERT(tensor_is(cache.k, 4, B, C, G, P) && tensor_contiguous(cache.k) && cache.k.dtype == k.dtype);
    with_type(k.dtype, [&](auto of_type) {
        using E = decltype(of_type);
        LAUNCH(dev, attention_store_kernel<E>, dim3((unsigned)at_most(T, C), (unsigned)B), THREADS, 0,
               data_of<E>(cache.k), data_of<E>(cache.v), data_of<int32_t>(cache.count), attention_rows_of<E>(k),
               attention_rows_of<E>(v), data_of<int32_t>(positions), T, C, (int)G, (int)P);
    });
}

static int64_t step_pieces(int64_t C) {
    return ceil_div(C, STEP_KEYS);
}

/* (B,H,P) as rows of one token. */
static tensor one_token(tensor t) {
    return tensor_split_first(t, t.dim[0], 1);
}

extern "C" void cuda_attention_step(struct device *dev, tensor o, tensor q, struct attention_cache cache,
                                    struct attention_rule rule, void *scratch) {
    int64_t B = q.dim[0], H = q.dim[1], P = q.dim[2], C = cache.k.dim[1], G = cache.k.dim[2];
    ASSERT(tensor_is(o, 3, B, H, P) && H % G == 0 && P <= WIDEST && tensor_contiguous(cache.k));
    step_problem p = {data_of<int32_t>(cache.count), C, rule.window > 0 ? rule.window : C, (int)H, (int)G, (int)P,
                      (int)(H / G), (int)step_pieces(C), rule.tiled, (float)(1 / sqrt((double)P))};
    with_type(q.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        attention_rows<T> out = attention_rows_of<T>(one_token(o));
        with_width(P % 4 == 0, [&](auto width) {
            constexpr int V = width.value;
            LAUNCH(dev, (attention_step_kernel<T, V>), dim3((unsigned)p.pieces, (unsigned)H, (unsigned)B), THREADS, 0, out,
                   (float *)scratch, attention_rows_of<T>(one_token(q)), attention_rows_of<T>(cache.k),
                   attention_rows_of<T>(cache.v), p);
        });
        if (p.pieces > 1)
            LAUNCH(dev, attention_step_sum_kernel<T>, dim3((unsigned)H, (unsigned)B), THREADS, 0, out,
                   (const float *)scratch, p);
    });
}

extern "C" size_t cuda_attention_step_scratch(struct attention_shape s) {
    return s.C > STEP_KEYS ? (size_t)(s.B * s.H * step_pieces(s.C) * (s.P + 2)) * sizeof(float) : 0;
}
