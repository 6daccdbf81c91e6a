/* rat.cu: RAT: a gated recurrence within chunks and one softmax over the chunks' ends and the token's own state.
 *
 *   a = sigmoid(g + bias);   k~[t] = a k~[t-1] + (1 - a) k[t];   v~[t] likewise, from 0 in every chunk
 *   scores: s R_c q . K_j for the ends j < c of the document's chunks, s q . k~[t] for the own state
 *   o = softmax-weighted V_j and v~[t];   y = sigmoid(z) o
 *   backward   do = sigmoid(z) dy;  delta = do . o;  p = exp(score - lse);  ds = p (do . value - delta);  back along
 *              each chunk l[t] = dk~[t] + a[t+1] l[t+1], m[t] likewise for v~;   dk = (1 - a) l;   dv = (1 - a) m;
 *              dg = (l (k~[t-1] - k) + m (v~[t-1] - v)) a (1 - a)
 *
 * Chunks are cut from each document's start, so where they end is found first: the ends of a row in a list, and for
 * each token how many lie before it (rank). The ends that a token sees are then a range of the list that stops at its
 * rank; those of an earlier row, in the state, count -1, -2, ... back. The beginnings of the ranges never decrease.
 *
 * Two paths. bf16 with heads of a multiple of 8 channels up to 128, in rows aligned to 16 bytes, goes by rat_fast.cu.
 * The rest, fp32 above all, by the kernels here.
 *
 * Here, the recurrence: a thread has a channel and walks along time, from the start of the chunk that its segment of
 * tokens begins in (whole rows where chunks are long). Attention over ends, in fp32 tiles (attention_tile.cuh):
 * forward and dq by blocks of queries, with the own state as the first thing seen; dk~ and dv~ of ends by blocks of
 * ends, which walk over the queries that see them; keys are turned as they are loaded. The gradients of queries and
 * keys that heads share are kept by head and added in order: no sum is atomic, and two runs give the same bits. k~ and
 * v~ are fp32, written once and read by what follows; 2 B H T (T / Q) P FLOPs of attention forward and 3.5 times as
 * many backward, at fp32's rate. */
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/rat.cuh"

#include <type_traits>

typedef __nv_bfloat16 bf16;

enum {
    SEGMENT = 256,    /* tokens of a thread's walk, where chunks are no longer than */
    WALK_CHUNK = 128, /* this */
    LIST_THREADS = 512,
    LIST_TOKENS = 4, /* of a thread at once */
};

/* --- ends of chunks ----------------------------------------------------------------------------------------------- */

/* The lists of a row: a block has one. */
__global__ void __launch_bounds__(LIST_THREADS)
rat_ends_kernel(int32_t *first, int32_t *rank, int32_t *ends, __grid_constant__ const rat_problem p) {
    __shared__ int counts[LIST_THREADS / WARP];
    int64_t b = blockIdx.x;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, before = 0;
    for (int64_t t0 = 0; t0 < p.T; t0 += LIST_THREADS * LIST_TOKENS) {
        int64_t mine = t0 + (int64_t)threadIdx.x * LIST_TOKENS;
        int position[LIST_TOKENS], here = 0, sum, number = before;
        for (int i = 0; i < LIST_TOKENS; i++) {
            position[i] = mine + i < p.T ? position_at(p, b, mine + i) : 0;
            here += mine + i < p.T && position[i] % p.Q == p.Q - 1;
        }
        sum = here;
        for (int offset = 1; offset < WARP; offset *= 2) {
            int other = __shfl_up_sync(FULL, sum, offset);
            if (lane >= offset) sum += other;
        }
        if (lane == WARP - 1) counts[warp] = sum;
        __syncthreads();
        for (int w = 0; w < LIST_THREADS / WARP; w++) {
            if (w < warp) number += counts[w];
            before += counts[w];
        }
        number += sum - here;
        for (int i = 0; i < LIST_TOKENS && mine + i < p.T; i++) {
            int at = (int)(mine + i), earlier = position[i] - at, closed = earlier > 0 ? earlier / p.Q : 0;
            rank[b * p.T + at] = number;
            first[b * p.T + at] = number - (position[i] / p.Q - closed) - (int)at_most(closed, p.C);
            if (position[i] % p.Q == p.Q - 1) ends[b * p.T + number++] = at;
        }
        __syncthreads();
    }
}

/* --- the recurrence ----------------------------------------------------------------------------------------------- */

static int64_t segments_of(int64_t T, int64_t Q) {
    return Q <= WALK_CHUNK ? ceil_div(T, SEGMENT) : 1;
}

template <class T>
__global__ void rat_scan_kernel(float *keys, float *values, attention_rows<T> v, attention_rows<T> g,
                                attention_rows<T> k, const float *running,
                                __grid_constant__ const rat_problem p, int64_t length) {
    int64_t b = blockIdx.z, t0 = blockIdx.y * length, t1 = at_most(t0 + length, p.T);
    int channel = blockIdx.x * THREADS + threadIdx.x, h = channel / p.P, i = channel % p.P;
    if (channel >= p.H * p.P) return;
    float bias = p.bias[channel], key = 0, value = 0;
    int64_t t = at_least(t0 - position_at(p, b, t0) % p.Q, 0);
    if (t == 0 && running && position_at(p, b, 0) % p.Q != 0) {
        key = running[(b * 2 * p.H + h) * p.P + i];
        value = running[((b * 2 + 1) * p.H + h) * p.P + i];
    }
    for (; t < t1; t++) {
        float u = to_float(g.at(b, t, h)[i]) + bias, a = sigmoid_of(u), rest = sigmoid_of(-u);
        bool starts = position_at(p, b, t) % p.Q == 0;
        key = (starts ? 0.0f : a * key) + rest * to_float(k.at(b, t, h % p.G)[i]);
        value = (starts ? 0.0f : a * value) + rest * to_float(v.at(b, t, h)[i]);
        if (t < t0) continue;
        keys[place_of(p, b, t, h) + i] = key;
        values[place_of(p, b, t, h) + i] = value;
    }
}

/* --- attention over ends ------------------------------------------------------------------------------------------ */

/* A row of a tile, turned: by a warp. */
template <class T>
__device__ __forceinline__ void turn_row(float *to, const T *from, const rat_problem &p, int chunk, float direction) {
    for (int i = threadIdx.x % WARP; i < p.half; i += WARP) {
        float2 turn = turn_by(chunk, p.rates.v[i], direction);
        float a = to_float(from[i]), b = to_float(from[i + p.half]);
        to[i] = a * turn.x - b * turn.y;
        to[i + p.half] = b * turn.x + a * turn.y;
    }
}

__device__ __forceinline__ void clear_row(float *to, int P) {
    for (int c = threadIdx.x % WARP; c < P; c += WARP) to[c] = 0;
}

template <class T> __device__ __forceinline__ void copy_row(float *to, const T *from, int P) {
    for (int c = threadIdx.x % WARP; c < P; c += WARP) to[c] = to_float(from[c]);
}

/* `rows` turned queries t0 .. of head h. */
template <class T>
__device__ __forceinline__ void load_queries(float *tile, int rows, const rat_problem &p, const attention_rows<T> &q,
                                             int64_t b, int t0, int h) {
    for (int i = threadIdx.x / WARP; i < rows; i += (int)blockDim.x / WARP) {
        float *to = tile_row(tile, p.P, i);
        if (t0 + i < p.T) turn_row(to, q.at(b, t0 + i, h % p.G), p, position_at(p, b, t0 + i) / p.Q, 1);
        else clear_row(to, p.P);
    }
}

/* Likewise rows of one of the arrays of floats. */
__device__ __forceinline__ void load_floats_of(float *tile, int rows, const rat_problem &p, const float *x, int64_t b,
                                               int t0, int h) {
    for (int i = threadIdx.x / WARP; i < rows; i += (int)blockDim.x / WARP) {
        float *to = tile_row(tile, p.P, i);
        if (t0 + i < p.T) copy_row(to, x + place_of(p, b, t0 + i, h), p.P);
        else clear_row(to, p.P);
    }
}

/* Turned keys and values of the ends e0 .. before `last`; beyond it zeros. */
template <class T>
__device__ __forceinline__ void load_ends(float *key_tile, float *value_tile, int rows, const rat_problem &p,
                                          const float *keys, const float *values, const attention_rows<T> &state_k,
                                          const attention_rows<T> &state_v, int64_t b, int e0, int last, int h) {
    for (int i = threadIdx.x / WARP; i < rows; i += (int)blockDim.x / WARP) {
        float *key = tile_row(key_tile, p.P, i), *value = tile_row(value_tile, p.P, i);
        int e = e0 + i;
        if (e >= last) {
            clear_row(key, p.P);
            clear_row(value, p.P);
        } else if (e >= 0) {
            int t = end_at(p, b, e);
            turn_row(key, keys + place_of(p, b, t, h), p, position_at(p, b, t) / p.Q, 1);
            copy_row(value, values + place_of(p, b, t, h), p.P);
        } else {
            int64_t slot = slot_of(p, b, e);
            copy_row(key, state_k.at(b, slot, h), p.P);
            copy_row(value, state_v.at(b, slot, h), p.P);
        }
    }
}

/* The score of a token with its own state: by a warp. */
template <class T>
__device__ __forceinline__ float own_score(const rat_problem &p, const attention_rows<T> &q, const float *keys,
                                           int64_t b, int64_t t, int h) {
    const T *query = q.at(b, t, h % p.G);
    const float *key = keys + place_of(p, b, t, h);
    float sum = 0;
    for (int c = threadIdx.x % WARP; c < p.P; c += WARP) sum += to_float(query[c]) * key[c];
    return p.scale * warp_sum(sum);
}

/* saved: o, dense, and lse (B,H,T), or NULL. */
template <class T>
__global__ void __launch_bounds__(THREADS)
rat_forward_kernel(attention_rows<T> y, T *saved_o, float *lse, rat_operands<T> x, const float *keys,
                   const float *values, __grid_constant__ const rat_problem p) {
    DYNAMIC_SHARED(float, memory);
    float *queries = memory, *key_tile = tile_row(queries, p.P, TILE), *value_tile = tile_row(key_tile, p.P, TILE);
    int64_t b = blockIdx.z;
    int h = blockIdx.y, t0 = blockIdx.x * TILE, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * ROWS;
    int last_token = (int)at_most(t0 + TILE, p.T) - 1, last = last_end(p, b, last_token);
    int first[ROWS], stop[ROWS];
    float high[ROWS], total[ROWS], sum[ROWS][PARTS];
    for (int r = 0; r < ROWS; r++) {
        int t = (int)at_most(t0 + row + r, p.T - 1); /* rows beyond the last token repeat it, and go nowhere */
        first[r] = first_end(p, b, t);
        stop[r] = last_end(p, b, t);
        high[r] = own_score(p, x.q, keys, b, t, h);
        total[r] = 1;
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            sum[r][i] = lane + i * WARP < p.P ? values[place_of(p, b, t, h) + lane + i * WARP] : 0.0f;
    }
    load_queries(queries, TILE, p, x.q, b, t0, h);
    for (int e0 = first_end(p, b, t0); e0 < last; e0 += TILE) {
        __syncthreads();
        load_ends(key_tile, value_tile, TILE, p, keys, values, x.state_k, x.state_v, b, e0, last, h);
        __syncthreads();
        float s[ROWS];
        multiply(s, tile_row(queries, p.P, row), tile_row(key_tile, p.P, lane), p.P);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool sees = e0 + lane >= first[r] && e0 + lane < stop[r];
            s[r] = sees ? s[r] * p.scale : -INFINITY;
            float now = fmaxf(high[r], warp_max(s[r])), rest = expf(high[r] - now);
            s[r] = sees ? expf(s[r] - now) : 0.0f;
            total[r] = total[r] * rest + warp_sum(s[r]);
            high[r] = now;
#pragma unroll
            for (int i = 0; i < PARTS; i++) sum[r][i] *= rest;
        }
        add_rows(sum, s, value_tile, p.P);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int t = t0 + row + r;
        if (t >= p.T) continue;
        if (saved_o && lane == 0) lse[(b * p.H + h) * p.T + t] = high[r] + logf(total[r]);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int c = lane + i * WARP;
            if (c >= p.P) continue;
            float o = sum[r][i] / total[r];
            if (saved_o) saved_o[place_of(p, b, t, h) + c] = from_float<T>(o);
            y.at(b, t, h)[c] = from_float<T>(sigmoid_of(to_float(x.z.at(b, t, h)[c])) * o);
        }
    }
}

/* --- the state that is left --------------------------------------------------------------------------------------- */

/* Block x of a row: its x-th end from the last; the block behind these: where the recurrence stands. */
template <class T>
__global__ void rat_store_kernel(T *state_k, T *state_v, float *running, const float *keys, const float *values,
                                 rat_problem p, int64_t C, int ends) {
    int64_t b = blockIdx.y;
    int last = position_at(p, b, p.T - 1), warp = threadIdx.x / WARP;
    if ((int)blockIdx.x == ends) {
        for (int c = threadIdx.x; c < p.H * p.P; c += THREADS) {
            running[b * 2 * p.H * p.P + c] = keys[place_of(p, b, p.T - 1, 0) + c];
            running[(b * 2 + 1) * p.H * p.P + c] = values[place_of(p, b, p.T - 1, 0) + c];
        }
        return;
    }
    int chunk = (last + 1) / p.Q - 1 - (int)blockIdx.x;
    int64_t t = p.T - 1 - (last - (chunk * p.Q + p.Q - 1));
    if (chunk < 0 || t < 0) return;
    for (int h = warp; h < p.H; h += WARPS) {
        int64_t to = ((b * C + chunk % C) * p.H + h) * p.P;
        const float *key = keys + place_of(p, b, t, h), *value = values + place_of(p, b, t, h);
        for (int i = threadIdx.x % WARP; i < p.half; i += WARP) {
            float2 turn = turn_by(chunk, p.rates.v[i], 1);
            state_k[to + i] = from_float<T>(key[i] * turn.x - key[i + p.half] * turn.y);
            state_k[to + i + p.half] = from_float<T>(key[i + p.half] * turn.x + key[i] * turn.y);
            state_v[to + i] = from_float<T>(value[i]);
            state_v[to + i + p.half] = from_float<T>(value[i + p.half]);
        }
    }
}

__global__ void rat_count_kernel(int32_t *count, __grid_constant__ const rat_problem p) {
    int64_t b = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (b < p.B) count[b] = position_at(p, b, p.T - 1) + 1;
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* What backward keeps in scratch, (B,T,H,P) each but delta (B,H,T). */
struct rat_gradients {
    float *keys, *values, *dout, *dkeys, *dvalues, *dquery, *delta;
    const float *lse;
};

/* A warp has a head of a token: dz, do, delta, and what the token's own score gives. */
template <class T>
__global__ void rat_own_backward_kernel(attention_rows<T> dz, attention_rows<T> dy, const T *saved_o, rat_operands<T> x,
                                        rat_gradients d, __grid_constant__ const rat_problem p) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / WARP, t = i / p.H % p.T, b = i / p.H / p.T;
    int h = (int)(i % p.H), lane = threadIdx.x % WARP;
    if (b >= p.B) return;
    int64_t at = place_of(p, b, t, h);
    const T *z = x.z.at(b, t, h), *gradient = dy.at(b, t, h), *query = x.q.at(b, t, h % p.G);
    float delta = 0, along = 0;
    for (int c = lane; c < p.P; c += WARP) {
        float s = sigmoid_of(to_float(z[c])), o = to_float(saved_o[at + c]), given = to_float(gradient[c]);
        dz.at(b, t, h)[c] = from_float<T>(given * o * s * (1 - s));
        d.dout[at + c] = given * s;
        delta += given * s * o;
        along += given * s * d.values[at + c];
    }
    delta = warp_sum(delta);
    float score = own_score(p, x.q, d.keys, b, t, h), share = expf(score - d.lse[(b * p.H + h) * p.T + t]);
    /* A token that sees nothing else is not moved by its score, whatever the rounding of o. */
    bool alone = first_end(p, b, t) == last_end(p, b, t);
    float ds = share * (warp_sum(along) - delta) * p.scale;
    if (alone) ds = 0;
    if (lane == 0) d.delta[(b * p.H + h) * p.T + t] = delta;
    for (int c = lane; c < p.P; c += WARP) {
        d.dquery[at + c] = ds * d.keys[at + c];
        d.dkeys[at + c] = ds * to_float(query[c]);
        d.dvalues[at + c] = share * d.dout[at + c];
    }
}

/* A warp's rows of a sum, turned back and added to rows of one of the arrays. `room` has rows for them. */
template <class F>
__device__ __forceinline__ void add_turned_back(float *room, const float (&sum)[ROWS][PARTS], const rat_problem &p,
                                                F to) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float *row = tile_row(room, p.P, r);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (lane + i * WARP < p.P) row[lane + i * WARP] = sum[r][i] * p.scale;
        __syncwarp();
        int chunk = 0;
        float *target = to(r, &chunk);
        if (target) {
            turn_row(row, row, p, chunk, -1);
            __syncwarp();
            for (int c = lane; c < p.P; c += WARP) target[c] += row[c];
        }
        __syncwarp();
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
rat_dq_kernel(rat_operands<T> x, rat_gradients d, __grid_constant__ const rat_problem p) {
    DYNAMIC_SHARED(float, memory);
    int own = own_rows();
    float *queries = memory, *douts = tile_row(queries, p.P, own), *key_tile = tile_row(douts, p.P, own);
    float *value_tile = tile_row(key_tile, p.P, TILE);
    int64_t b = blockIdx.z;
    int h = blockIdx.y, t0 = blockIdx.x * own, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * ROWS;
    int last = last_end(p, b, at_most(t0 + own, p.T) - 1), first[ROWS], stop[ROWS];
    float log_sum[ROWS], delta[ROWS], sum[ROWS][PARTS] = {};
    for (int r = 0; r < ROWS; r++) {
        int64_t t = at_most(t0 + row + r, p.T - 1), at = (b * p.H + h) * p.T + t;
        first[r] = first_end(p, b, (int)t);
        stop[r] = last_end(p, b, t);
        log_sum[r] = d.lse[at];
        delta[r] = d.delta[at];
    }
    load_queries(queries, own, p, x.q, b, t0, h);
    load_floats_of(douts, own, p, d.dout, b, t0, h);
    for (int e0 = first_end(p, b, t0); e0 < last; e0 += TILE) {
        __syncthreads();
        load_ends(key_tile, value_tile, TILE, p, d.keys, d.values, x.state_k, x.state_v, b, e0, last, h);
        __syncthreads();
        float s[ROWS], ds[ROWS];
        multiply(s, tile_row(queries, p.P, row), tile_row(key_tile, p.P, lane), p.P);
        multiply(ds, tile_row(douts, p.P, row), tile_row(value_tile, p.P, lane), p.P);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool sees = e0 + lane >= first[r] && e0 + lane < stop[r];
            ds[r] = sees ? expf(s[r] * p.scale - log_sum[r]) * (ds[r] - delta[r]) : 0.0f;
        }
        add_rows(sum, ds, key_tile, p.P);
    }
    __syncthreads();
    add_turned_back(tile_row(queries, p.P, row), sum, p, [&](int r, int *chunk) {
        int t = t0 + row + r;
        if (t >= p.T) return (float *)NULL;
        *chunk = position_at(p, b, t) / p.Q;
        return d.dquery + place_of(p, b, t, h);
    });
}

/* A block has the ends e0 .. of a row. */
template <class T>
__global__ void __launch_bounds__(THREADS)
rat_dkv_kernel(rat_operands<T> x, rat_gradients d, __grid_constant__ const rat_problem p) {
    DYNAMIC_SHARED(float, memory);
    float *queries = memory, *douts = tile_row(queries, p.P, TILE), *key_tile = tile_row(douts, p.P, TILE);
    int own = own_rows();
    float *value_tile = tile_row(key_tile, p.P, own);
    int64_t b = blockIdx.z;
    int h = blockIdx.y, e0 = blockIdx.x * own, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * ROWS;
    int count = ends_of(p, b);
    int last = (int)at_most(e0 + own, count);
    float sum_k[ROWS][PARTS] = {}, sum_v[ROWS][PARTS] = {};
    if (e0 >= count) return;
    load_ends(key_tile, value_tile, own, p, d.keys, d.values, x.state_k, x.state_v, b, e0, last, h);
    for (int t0 = end_at(p, b, e0) + 1; t0 < p.T && first_end(p, b, t0) < last; t0 += TILE) {
        __syncthreads();
        load_queries(queries, TILE, p, x.q, b, t0, h);
        load_floats_of(douts, TILE, p, d.dout, b, t0, h);
        __syncthreads();
        int t = t0 + lane;
        bool there = t < p.T;
        int first = there ? first_end(p, b, t) : 0, stop = there ? last_end(p, b, t) : 0;
        float s[ROWS], ds[ROWS], log_sum = there ? d.lse[(b * p.H + h) * p.T + t] : 0.0f;
        float delta = there ? d.delta[(b * p.H + h) * p.T + t] : 0.0f;
        multiply(s, tile_row(key_tile, p.P, row), tile_row(queries, p.P, lane), p.P);
        multiply(ds, tile_row(value_tile, p.P, row), tile_row(douts, p.P, lane), p.P);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bool sees = there && e0 + row + r >= first && e0 + row + r < stop;
            s[r] = sees ? expf(s[r] * p.scale - log_sum) : 0.0f;
            ds[r] = s[r] * (ds[r] - delta);
        }
        add_rows(sum_v, s, douts, p.P);
        add_rows(sum_k, ds, queries, p.P);
    }
    __syncthreads();
    add_turned_back(tile_row(queries, p.P, row), sum_k, p, [&](int r, int *chunk) {
        int e = e0 + row + r;
        if (e >= last) return (float *)NULL;
        int t = end_at(p, b, e);
        *chunk = position_at(p, b, t) / p.Q;
        return d.dkeys + place_of(p, b, t, h);
    });
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (e0 + row + r >= last) continue;
        float *target = d.dvalues + place_of(p, b, end_at(p, b, e0 + row + r), h);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (lane + i * WARP < p.P) target[lane + i * WARP] += sum_v[r][i];
    }
}

/* Back along the chunks: a thread has a channel of a segment, and begins at the end of the chunk that the segment ends
 * in. dk by head takes do's place. partial (B segments, H P): the segment's share of the bias's gradient. */
template <class T>
__global__ void rat_scan_backward_kernel(attention_rows<T> dv, attention_rows<T> dg, float *partial, rat_operands<T> x,
                                         rat_gradients d, __grid_constant__ const rat_problem p, int64_t length) {
    int64_t b = blockIdx.z, t0 = blockIdx.y * length, t1 = at_most(t0 + length, p.T), t = t1 - 1;
    int channel = blockIdx.x * THREADS + threadIdx.x, h = channel / p.P, i = channel % p.P;
    if (channel >= p.H * p.P) return;
    float bias = p.bias[channel], l = 0, m = 0, dbias = 0;
    while (t + 1 < p.T && position_at(p, b, t + 1) % p.Q != 0) t++;
    for (; t >= t0; t--) {
        bool starts = position_at(p, b, t) % p.Q == 0;
        int64_t at = place_of(p, b, t, h) + i, past = at - (int64_t)p.H * p.P;
        float u = to_float(x.g.at(b, t, h)[i]) + bias, a = sigmoid_of(u), rest = sigmoid_of(-u);
        float was_key = 0, was_value = 0;
        l += d.dkeys[at];
        m += d.dvalues[at];
        if (t < t1) {
            if (!starts && t > 0) was_key = d.keys[past], was_value = d.values[past];
            if (!starts && t == 0 && x.running) {
                was_key = x.running[(b * 2 * p.H + h) * p.P + i];
                was_value = x.running[((b * 2 + 1) * p.H + h) * p.P + i];
            }
            float k = to_float(x.k.at(b, t, h % p.G)[i]), v = to_float(x.v.at(b, t, h)[i]);
            float gate = (l * (was_key - k) + m * (was_value - v)) * a * rest;
            dv.at(b, t, h)[i] = from_float<T>(rest * m);
            dg.at(b, t, h)[i] = from_float<T>(gate);
            d.dout[at] = rest * l;
            dbias += gate;
        }
        l = starts ? 0.0f : l * a;
        m = starts ? 0.0f : m * a;
    }
    partial[(b * gridDim.y + blockIdx.y) * p.H * p.P + channel] = dbias;
}

/* What heads that share a query and a key give to them, added in the order of the heads. */
template <class T>
__global__ void rat_share_kernel(attention_rows<T> dq, attention_rows<T> dk, rat_gradients d,
                                 __grid_constant__ const rat_problem p) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, c = i % p.P, group = i / p.P % p.G;
    int64_t t = i / p.P / p.G % p.T, b = i / p.P / p.G / p.T;
    if (b >= p.B) return;
    float of_query = 0, of_key = 0;
    for (int h = (int)group; h < p.H; h += p.G) {
        of_query += d.dquery[place_of(p, b, t, h) + c];
        of_key += d.dout[place_of(p, b, t, h) + c];
    }
    dq.at(b, t, group)[c] = from_float<T>(of_query);
    dk.at(b, t, group)[c] = from_float<T>(of_key);
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

static size_t array_bytes(struct rat_shape s) {
    return (size_t)(s.B * s.T * s.H * s.P) * sizeof(float);
}

static size_t list_bytes(struct rat_shape s) {
    return ((size_t)(s.B * s.T) * sizeof(int32_t) + 255) / 256 * 256;
}

static struct rat_shape shape_of(const rat_problem &p) {
    return {p.B, p.T, p.H, p.G, p.P, p.Q, 0};
}

static rat_problem rat_problem_of(tensor z, tensor bias, tensor q, tensor positions, struct rat_state initial,
                                  int64_t chunk, double base, void *scratch) {
    rat_problem p = {};
    p.positions = data_of<int32_t>(positions);
    p.bias = data_of<float>(bias);
    p.B = z.dim[0], p.T = z.dim[1], p.H = (int)z.dim[2], p.P = (int)z.dim[3], p.G = (int)q.dim[2];
    p.half = p.P / 2;
    p.Q = (int)at_most(chunk, INT32_MAX / 2);
    p.E = p.T / p.Q + 1; /* with what a state has begun */
    p.scale = (float)(1 / sqrt((double)p.P));
    p.rates = rates_of(p.P, base);
    ASSERT(p.P % 2 == 0 && p.P <= WIDEST && p.H % p.G == 0 && p.T < INT32_MAX / 2 && chunk >= 1);
    if (tensor_given(initial.k)) {
        p.count = data_of<int32_t>(initial.count);
        p.C = initial.k.dim[1];
        ASSERT(tensor_given(positions) && tensor_contiguous(initial.k) && tensor_contiguous(initial.v));
    }
    if (!p.positions) return p;
    size_t bytes = list_bytes(shape_of(p));
    p.first = (int32_t *)scratch;
    p.rank = (int32_t *)((char *)scratch + bytes);
    p.ends = (int32_t *)((char *)scratch + 2 * bytes);
    return p;
}

/* Behind the lists. */
static void *arrays_in(void *scratch, const rat_problem &p) {
    return (char *)scratch + 3 * list_bytes(shape_of(p));
}

static rat_gradients arrays_of(const rat_problem &p, void *scratch, bool backward) {
    float *first = (float *)arrays_in(scratch, p);
    int64_t size = p.B * p.T * p.H * p.P;
    rat_gradients d = {};
    d.keys = first, d.values = first + size;
    if (!backward) return d;
    d.dout = first + 2 * size, d.dkeys = first + 3 * size, d.dvalues = first + 4 * size, d.dquery = first + 5 * size;
    d.delta = first + 6 * size;
    return d;
}

template <class T>
static rat_operands<T> rat_operands_of(tensor z, tensor v, tensor g, tensor q, tensor k, struct rat_state initial) {
    return {attention_rows_of<T>(z),         attention_rows_of<T>(v),         attention_rows_of<T>(g),
            attention_rows_of<T>(q),         attention_rows_of<T>(k),         attention_rows_of<T>(initial.k),
            attention_rows_of<T>(initial.v), data_of<float>(initial.running)};
}

static dim3 walks_of(const rat_problem &p) {
    return dim3((unsigned)ceil_div(p.H * p.P, THREADS), (unsigned)segments_of(p.T, p.Q), (unsigned)p.B);
}

static void find_ends(struct device *dev, const rat_problem &p) {
    if (!p.positions) return;
    LAUNCH(dev, rat_ends_kernel, (unsigned)p.B, LIST_THREADS, 0, (int32_t *)p.first, (int32_t *)p.rank,
           (int32_t *)p.ends, p);
}

/* k~ and v~ into scratch. */
template <class T>
static void rat_scan(struct device *dev, const rat_operands<T> &x, const rat_gradients &d, const rat_problem &p) {
    LAUNCH(dev, rat_scan_kernel<T>, walks_of(p), THREADS, 0, d.keys, d.values, x.v, x.g, x.k, x.running, p,
           ceil_div(p.T, segments_of(p.T, p.Q)));
}

/* What is common to both paths when a state is left: slots that keep what they had, and the count; the ends that a
 * state may need. */
static int64_t begin_store(struct device *dev, struct rat_state final, struct rat_state initial, const rat_problem &p) {
    int64_t C = final.k.dim[1];
    if (p.C && final.k.data != initial.k.data) {
        size_t bytes = (size_t)tensor_count(final.k) * dtype_size(final.k.dtype);
        ASSERT(C == p.C);
        cuda_device_copy(dev, final.k.data, initial.k.data, bytes);
        cuda_device_copy(dev, final.v.data, initial.v.data, bytes);
    }
    return at_most(C, p.T / p.Q + 1);
}

static void end_store(struct device *dev, struct rat_state final, const rat_problem &p) {
    LAUNCH(dev, rat_count_kernel, (unsigned)ceil_div(p.B, THREADS), THREADS, 0, data_of<int32_t>(final.count), p);
}

template <class T>
static void forward_plain(struct device *dev, tensor y, struct rat_state final, T *saved_o, float *lse,
                          const rat_operands<T> &x, struct rat_state initial, const rat_problem &p, void *scratch) {
    rat_gradients d = arrays_of(p, scratch, false);
    size_t bytes = rows_bytes(p.P, 3 * TILE);
    rat_scan<T>(dev, x, d, p);
    allow_shared(dev, rat_forward_kernel<T>, bytes, "rat");
    LAUNCH(dev, rat_forward_kernel<T>, dim3((unsigned)ceil_div(p.T, TILE), (unsigned)p.H, (unsigned)p.B), THREADS,
           bytes, attention_rows_of<T>(y), saved_o, lse, x, d.keys, d.values, p);
    if (!tensor_given(final.k)) return;
    int64_t ends = begin_store(dev, final, initial, p);
    LAUNCH(dev, rat_store_kernel<T>, dim3((unsigned)ends + 1, (unsigned)p.B), THREADS, 0, data_of<T>(final.k),
           data_of<T>(final.v), data_of<float>(final.running), d.keys, d.values, p, final.k.dim[1], (int)ends);
    end_store(dev, final, p);
}

template <class T>
static void backward_plain(struct device *dev, const rat_gradients_of<T> &to, float *dbias, const rat_operands<T> &x,
                           const rat_problem &p, void *scratch) {
    rat_gradients d = arrays_of(p, scratch, true);
    float *partial = d.delta + p.B * p.H * p.T;
    back_block block = back_block_of(dev, p.P);
    d.lse = to.lse;
    rat_scan<T>(dev, x, d, p);
    allow_shared(dev, rat_dq_kernel<T>, block.bytes, "rat");
    allow_shared(dev, rat_dkv_kernel<T>, block.bytes, "rat");
    LAUNCH(dev, rat_own_backward_kernel<T>, (unsigned)ceil_div(p.B * p.T * p.H, WARPS), THREADS, 0, to.dz, to.dy, to.o,
           x, d, p);
    LAUNCH(dev, rat_dq_kernel<T>, dim3((unsigned)ceil_div(p.T, block.rows), (unsigned)p.H, (unsigned)p.B),
           block.threads, block.bytes, x, d, p);
    LAUNCH(dev, rat_dkv_kernel<T>, dim3((unsigned)ceil_div(p.T / p.Q + 1, block.rows), (unsigned)p.H, (unsigned)p.B),
           block.threads, block.bytes, x, d, p);
    LAUNCH(dev, rat_scan_backward_kernel<T>, walks_of(p), THREADS, 0, to.dv, to.dg, partial, x, d, p,
           ceil_div(p.T, segments_of(p.T, p.Q)));
    LAUNCH(dev, rat_share_kernel<T>, (unsigned)ceil_div(p.B * p.T * p.G * p.P, THREADS), THREADS, 0, to.dq, to.dk, d,
           p);
    cuda_add_partials(dev, dbias, partial, p.B * segments_of(p.T, p.Q), (int64_t)p.H * p.P);
}

static void forward_fast(struct device *dev, tensor y, struct rat_state final, bf16 *saved_o, float *lse,
                         const rat_operands<bf16> &x, struct rat_state initial, const rat_problem &p, void *scratch) {
    rat_arrays a = {};
    rat_fast_forward(dev, attention_rows_of<bf16>(y), saved_o, lse, x, &a, p, arrays_in(scratch, p));
    if (!tensor_given(final.k)) return;
    int64_t ends = begin_store(dev, final, initial, p);
    rat_fast_store(dev, final, a, p, ends);
    end_store(dev, final, p);
}

/* --- the table's entries ------------------------------------------------------------------------------------------ */

extern "C" void cuda_rat_forward(struct device *dev, tensor y, struct rat_state final, void *saved, tensor z, tensor v,
                                 tensor g, tensor bias, tensor q, tensor k, tensor positions, struct rat_state initial,
                                 int64_t chunk, double base, void *scratch) {
    rat_problem p = rat_problem_of(z, bias, q, positions, initial, chunk, base, scratch);
    int64_t size = p.B * p.T * p.H * p.P;
    find_ends(dev, p);
    if (rat_fast_serves(p, y, z, v, g, q, k)) {
        float *lse = saved ? (float *)((bf16 *)saved + size) : NULL;
        forward_fast(dev, y, final, (bf16 *)saved, lse, rat_operands_of<bf16>(z, v, g, q, k, initial), initial, p,
                     scratch);
        return;
    }
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        float *lse = saved ? (float *)((T *)saved + size) : NULL;
        forward_plain<T>(dev, y, final, (T *)saved, lse, rat_operands_of<T>(z, v, g, q, k, initial), initial, p,
                         scratch);
    });
}

extern "C" void cuda_rat_backward(struct device *dev, tensor dz, tensor dv, tensor dg, tensor dbias, tensor dq,
                                  tensor dk, tensor dy, const void *saved, tensor z, tensor v, tensor g, tensor bias,
                                  tensor q, tensor k, tensor positions, struct rat_state initial, int64_t chunk,
                                  double base, void *scratch) {
    rat_problem p = rat_problem_of(z, bias, q, positions, initial, chunk, base, scratch);
    bool fast = rat_fast_serves(p, dy, z, v, g, q, k) && rat_fast_serves(p, dy, dz, dv, dg, dq, dk);
    find_ends(dev, p);
    with_type(dy.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        rat_operands<T> x = rat_operands_of<T>(z, v, g, q, k, initial);
        rat_gradients_of<T> to = {attention_rows_of<T>(dz), attention_rows_of<T>(dv), attention_rows_of<T>(dg),
                                  attention_rows_of<T>(dq), attention_rows_of<T>(dk), attention_rows_of<T>(dy),
                                  (const T *)saved, (const float *)((const T *)saved + p.B * p.T * p.H * p.P)};
        if constexpr (std::is_same<T, bf16>::value) {
            if (fast) {
                rat_fast_backward(dev, to, data_of<float>(dbias), x, p, arrays_in(scratch, p));
                return;
            }
        }
        backward_plain<T>(dev, to, data_of<float>(dbias), x, p, scratch);
    });
}

extern "C" size_t cuda_rat_saved_f32(struct rat_shape s) {
    return array_bytes(s) + (size_t)(s.B * s.H * s.T) * sizeof(float);
}

extern "C" size_t cuda_rat_saved_bf16(struct rat_shape s) {
    return array_bytes(s) / 2 + (size_t)(s.B * s.H * s.T) * sizeof(float);
}

/* Either path's. */
extern "C" size_t cuda_rat_forward_scratch(struct rat_shape s) {
    rat_arrays a = {};
    size_t plain = 2 * array_bytes(s), fast = rat_arrays_at(&a, s, NULL, false);
    return 3 * list_bytes(s) + (plain > fast ? plain : fast);
}

extern "C" size_t cuda_rat_backward_scratch(struct rat_shape s) {
    rat_arrays a = {};
    size_t small = (size_t)(s.B * s.H * s.T + s.B * segments_of(s.T, s.Q) * s.H * s.P) * sizeof(float);
    size_t plain = 6 * array_bytes(s) + small, fast = rat_arrays_at(&a, s, NULL, true);
    return 3 * list_bytes(s) + (plain > fast ? plain : fast);
}

/* A token is a row of length one whose final state is its initial one. */
extern "C" void cuda_rat_step(struct device *dev, tensor y, struct rat_state state, tensor z, tensor v, tensor g,
                              tensor bias, tensor q, tensor k, int64_t chunk, double base, void *scratch) {
    int64_t B = y.dim[0];
    const int64_t row[2] = {B, 1};
    auto one = [&](tensor t) { return tensor_split_first(t, B, 1); };
    cuda_rat_forward(dev, one(y), state, NULL, one(z), one(v), one(g), bias, one(q), one(k),
                     tensor_reshape(state.count, 2, row), state, chunk, base, scratch);
}

extern "C" size_t cuda_rat_step_scratch(struct rat_shape s) {
    s.T = 1;
    return cuda_rat_forward_scratch(s);
}
