/* rat_walk.cu: RAT's recurrence on the fast path, bf16, along and back. rat.cu has the mathematics, rat_mma.cu what
 * lies between: attention over the ends of chunks.
 *
 * A walk is a segment of tokens' chunks: those that begin in it, each to its end, so that every chunk belongs to one
 * walk wherever documents begin. Per head of P channels, W / 8 lanes (W = 64 or 128) have eight channels each, four
 * and the four half a head further: both of a rotation's pair lie in one lane, and a query's product with a key is
 * added up by three or four shuffles. States stay in registers, in fp32; angles are found once a chunk. Columns of one
 * projection lie alike, so that z, v and g have one offset, q and k another: addresses would else be half of the work.
 *
 *   along    reads v, g (4D bytes a token for the width D), q, k; writes v~ (2D), own scores, and, at ends, the
 *            turned key and the value (4D / Q); the first heads of each group also the turned queries
 *   again    the same with z, dy and o (6D): writes do, dz (4D) and, for each head of a token, delta and what the own
 *            score's softmax and gradient are
 *   back     a block has the heads of a group, from the chunk's end to its beginning: reads g, v, do (6D), writes dv,
 *            dg (4D); the gradients of the query and the key that the heads share are added up over the lanes of a
 *            warp and then over its warps in order, two tokens at a time. k~ and v~ of a chunk's tokens are made once
 *            more before, each lane's into shared memory, rounded; where that has no room for them (with 8 heads of
 *            128 in a group from chunks of 17 tokens on), `again` writes them (4D) and they are read here (4D)
 *
 * Where chunks are long, up to a whole row, a walk is a part of one, and what goes into it is found before: each part's
 * recurrence from nothing (reach; 4D bytes a token, back too), then, a thread a channel, one part after the other.
 *
 * So 6.5D, 14D and 10D bytes a token, each a few fp32 instructions a channel under them: with D = 2048 and 16,384
 * tokens 0.22, 0.47 and 0.34 GB, or 0.08, 0.16 and 0.12 ms at 3 TB/s. No sum is atomic: two runs give the same bits. */
#include "kernels/cuda/rat.cuh"

typedef __nv_bfloat16 bf16;

enum { WALK_THREADS = 256, BACK_TOKENS = 2 };

/* --- a lane's channels -------------------------------------------------------------------------------------------- */

/* Four channels from `low` on and four from half + low. Lanes that have none read the first ones and write nothing. */
struct lane_place {
    int h, low, half;
    bool there;
};

template <int W> __device__ __forceinline__ lane_place lane_of(const rat_problem &p, int head, int heads) {
    lane_place l = {head, (int)threadIdx.x % (W / 8) * 4, p.half, false};
    l.there = head < heads && l.low < p.half;
    if (!l.there) l.h = 0, l.low = 0;
    return l;
}

/* Offsets of a lane's channels in rows of tokens: from + t step. */
struct lane_rows {
    int64_t from;
    int step;

    __device__ __forceinline__ int64_t at(int64_t t) const {
        return from + (int64_t)(int)t * step; /* one instruction */
    }
};

__device__ __forceinline__ lane_rows rows_of(const attention_rows<bf16> &x, int64_t b, int h, const lane_place &l) {
    return {b * x.row + h * x.head + l.low, (int)x.step};
}

/* Of an array by token with so many heads. */
__device__ __forceinline__ lane_rows rows_of(const rat_problem &p, int64_t b, int h, int heads, const lane_place &l) {
    return {(b * p.T * heads + h) * p.P + l.low, heads * p.P};
}

struct alignas(16) eight {
    pack<bf16, 4> low, high;
};

__device__ __forceinline__ eight read_eight(const bf16 *mine, const lane_place &l) {
    return {*reinterpret_cast<const pack<bf16, 4> *>(mine), *reinterpret_cast<const pack<bf16, 4> *>(mine + l.half)};
}

__device__ __forceinline__ void widen(float (&to)[8], const eight &from) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = to_float(from.low.v[i]), to[i + 4] = to_float(from.high.v[i]);
}

__device__ __forceinline__ void write_eight(bf16 *mine, const lane_place &l, const float (&from)[8]) {
    const float low[4] = {from[0], from[1], from[2], from[3]}, high[4] = {from[4], from[5], from[6], from[7]};
    if (!l.there) return;
    store_floats<4>(mine, low);
    store_floats<4>(mine + l.half, high);
}

__device__ __forceinline__ void read_floats(float (&to)[8], const float *row, const lane_place &l) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = row[l.low + i], to[i + 4] = row[l.half + l.low + i];
}

__device__ __forceinline__ void write_floats(float *row, const lane_place &l, const float (&from)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (l.there) row[l.low + i] = from[i], row[l.half + l.low + i] = from[i + 4];
}

__device__ __forceinline__ void clear(float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0;
}

/* Over the lanes of a head. */
template <int GROUP> __device__ __forceinline__ float head_sum(float v) {
#pragma unroll
    for (int offset = GROUP / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(FULL, v, offset);
    return v;
}

/* --- gates, rotations, chunks ------------------------------------------------------------------------------------- */

/* sigmoid(u) and sigmoid(-u) by one power: no digit of the second is lost where the first is close to 1. */
__device__ __forceinline__ void gates_of(float u, float *a, float *rest) {
    float power = -LOG2E * u;
    power = power_of_two(power > 126.0f ? 126.0f : power);
    *a = reciprocal(1.0f + power);
    *rest = power * *a;
}

/* Rotations of a lane's four pairs by a chunk's index. */
__device__ __forceinline__ void find_turns(float2 (&turn)[4], const rat_problem &p, int chunk, const lane_place &l) {
#pragma unroll
    for (int i = 0; i < 4; i++) turn[i] = turn_by(chunk, p.rates.v[l.low + i], 1);
}

__device__ __forceinline__ void turn_eight(float (&to)[8], const float (&from)[8], const float2 (&turn)[4],
                                           float direction) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float cosine = turn[i].x, sine = turn[i].y * direction, low = from[i], high = from[i + 4];
        to[i] = low * cosine - high * sine;
        to[i + 4] = high * cosine + low * sine;
    }
}

/* The first token from `from` on, a segment's beginning, that a walk can begin with; `limit` where there is none. */
__device__ __forceinline__ int64_t chunk_begin(const rat_problem &p, int64_t b, int64_t from, int64_t limit) {
    if (!p.positions) return at_most(from, limit);
    for (int64_t t0 = from; t0 < limit; t0 += WARP) {
        int64_t t = t0 + threadIdx.x % WARP;
        bool begins = t < limit && (t == 0 || p.positions[b * p.T + t] % p.Q == 0);
        unsigned votes = __ballot_sync(FULL, begins);
        if (votes) return t0 + __ffs((int)votes) - 1;
    }
    return limit;
}

/* The tokens of a segment's walk: none where first = stop. */
struct walk {
    int64_t first, stop;
};

__device__ __forceinline__ walk walk_of(const rat_arrays &a, const rat_problem &p, int64_t b, int64_t segment,
                                        int64_t length) {
    int64_t from = segment * length, to = at_most(from + length, p.T);
    if (a.reach) return {from, to};
    walk w = {chunk_begin(p, b, from, to), to};
    if (w.first < to) w.stop = chunk_begin(p, b, to, p.T);
    return w;
}

/* Where a token stands: its place in the chunk, and the chunk's index. */
struct standing {
    int place, chunk;
};

__device__ __forceinline__ standing standing_at(const rat_problem &p, int64_t b, int64_t t) {
    int position = position_at(p, b, t);
    return {position % p.Q, position / p.Q};
}

/* From token t - 1 to t. */
__device__ __forceinline__ void stand_next(standing *s, const rat_problem &p, int64_t b, int64_t t) {
    s->place++;
    if (s->place == p.Q) s->place = 0, s->chunk++;
    if (p.positions && p.positions[b * p.T + t] == 0) *s = {0, 0};
}

/* --- along -------------------------------------------------------------------------------------------------------- */

/* Where a lane's channels lie: in z, v and g; in q and k; in arrays of the heads' values by token; in turned queries;
 * in dz, dv and dg; in dy. */
struct lane_offsets {
    lane_rows wide, narrow, dense, queries, out, dy;
};

__device__ __forceinline__ lane_offsets offsets_of(const rat_operands<bf16> &x, const rat_gradients_of<bf16> &d,
                                                   const rat_arrays &a, const rat_problem &p, int64_t b,
                                                   const lane_place &l) {
    return {rows_of(x.v, b, l.h, l),
            rows_of(x.q, b, l.h % p.G, l),
            rows_of(p, b, l.h, p.H, l),
            rows_of(p, b, l.h, a.query_heads, l),
            rows_of(d.dv, b, l.h, l),
            rows_of(d.dy, b, l.h, l)};
}

/* One token's operands: of the recurrence, and of what backward looks at behind it. */
struct token {
    eight v, g, q, k;
};

struct token_back {
    eight z, dy, o;
};

__device__ __forceinline__ token read_token(const rat_operands<bf16> &x, const lane_offsets &at, int64_t t,
                                            const lane_place &l) {
    int64_t wide = at.wide.at(t), narrow = at.narrow.at(t);
    return {read_eight(x.v.data + wide, l), read_eight(x.g.data + wide, l), read_eight(x.q.data + narrow, l),
            read_eight(x.k.data + narrow, l)};
}

__device__ __forceinline__ token_back read_back(const rat_operands<bf16> &x, const rat_gradients_of<bf16> &d,
                                                const lane_offsets &at, int64_t t, const lane_place &l) {
    return {read_eight(x.z.data + at.wide.at(t), l), read_eight(d.dy.data + at.dy.at(t), l),
            read_eight(d.o + at.dense.at(t), l)};
}

/* What backward needs to know of a head of a token; own: its score, not scaled. do counts as it is rounded. */
template <int GROUP>
__device__ __forceinline__ void find_slopes(const token_back &x, const float (&value)[8], float own,
                                            const rat_gradients_of<bf16> &d, const rat_arrays &a, const rat_problem &p,
                                            const lane_offsets &at, int64_t b, int64_t t, standing s,
                                            const lane_place &l) {
    float z[8], dy[8], o[8], dz[8], dout[8], delta = 0, along = 0;
    widen(z, x.z);
    widen(dy, x.dy);
    widen(o, x.o);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float gate = sigmoid_of(z[i]);
        dz[i] = dy[i] * o[i] * gate * (1 - gate);
        dout[i] = to_float(from_float<bf16>(dy[i] * gate));
        delta += dout[i] * o[i];
        along += dout[i] * value[i];
    }
    if (!l.there) delta = 0, along = 0;
    delta = head_sum<GROUP>(delta);
    along = head_sum<GROUP>(along);
    write_eight(d.dz.data + at.out.at(t), l, dz);
    write_eight(a.dout + at.dense.at(t), l, dout);
    if (!l.there || l.low != 0) return;
    int64_t by_head = (b * p.H + l.h) * p.T + t, by_token = (b * p.T + t) * p.H + l.h;
    float log_sum = d.lse[by_head], share = power_of_two((own * p.scale - log_sum) * LOG2E);
    /* A token that sees nothing else is not moved by its score, whatever the rounding of o. */
    bool alone = p.first ? p.first[b * p.T + t] == p.rank[b * p.T + t] : s.chunk == 0;
    a.log_sum[by_head] = log_sum * LOG2E;
    a.delta[by_head] = delta;
    a.share[by_token] = share;
    a.slope[by_token] = alone ? 0.0f : share * (along - delta) * p.scale;
    if (a.folded && s.chunk > 0)
        a.folded[((b * p.H + l.h) * p.Q + s.place) * (p.T / p.Q - 1) + s.chunk - 1] = log_sum;
}

/* A lane's states. */
struct recurrence {
    float key[8], value[8];
};

/* A token's step. */
__device__ __forceinline__ void go_on(recurrence *r, const float (&v)[8], const float (&g)[8], const float (&k)[8],
                                      const float (&bias)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float gate, rest;
        gates_of(g[i] + bias[i], &gate, &rest);
        r->key[i] = gate * r->key[i] + rest * k[i];
        r->value[i] = gate * r->value[i] + rest * v[i];
    }
}

/* The same with what is written of it. */
template <int GROUP, bool AGAIN>
__device__ __forceinline__ void take_token(recurrence *r, const token &x, const token_back &y, const float (&bias)[8],
                                           const float2 (&turn)[4], const rat_gradients_of<bf16> &d,
                                           const rat_arrays &a, const rat_problem &p, const lane_offsets &at,
                                           int64_t b, int64_t t, standing s, const lane_place &l) {
    float v[8], g[8], q[8], k[8], own = 0, turned[8];
    widen(v, x.v);
    widen(g, x.g);
    widen(q, x.q);
    widen(k, x.k);
    go_on(r, v, g, k, bias);
#pragma unroll
    for (int i = 0; i < 8; i++) own += q[i] * r->key[i];
    own = head_sum<GROUP>(l.there ? own : 0.0f);
    if (!AGAIN || a.keys) write_eight(a.values + at.dense.at(t), l, r->value);
    if constexpr (AGAIN) {
        if (a.keys) write_eight(a.keys + at.dense.at(t), l, r->key);
        find_slopes<GROUP>(y, r->value, own, d, a, p, at, b, t, s, l);
    } else if (l.there && l.low == 0) {
        a.own[(b * p.H + l.h) * p.T + t] = own;
    }
    if (l.h < a.query_heads) {
        turn_eight(turned, q, turn, 1);
        write_eight(a.queries + at.queries.at(t), l, turned);
    }
    if (s.place == p.Q - 1) {
        int64_t end = ((b * p.E + last_end(p, b, t)) * p.H + l.h) * p.P + l.low;
        turn_eight(turned, r->key, turn, 1);
        write_eight(a.end_keys + end, l, turned);
        write_eight(a.end_values + end, l, r->value);
    }
    if (!AGAIN && t == p.T - 1) {
        write_floats(a.running + (b * 2 * p.H + l.h) * p.P, l, r->key);
        write_floats(a.running + ((b * 2 + 1) * p.H + l.h) * p.P, l, r->value);
    }
}

/* A segment's part of reach: 0: the product of its gates, or 0 where a chunk begins in it; 1, 2: its key and value from
 * nothing, and then what goes into it. The block's x is the segment. */
__device__ __forceinline__ float *reach_of(const rat_arrays &a, const rat_problem &p, int64_t b, int part,
                                           const lane_place &l) {
    return a.reach + (((b * gridDim.x + blockIdx.x) * 3 + part) * p.H + l.h) * p.P;
}

/* Of long chunks: block (segment, heads, row). */
template <int W>
__global__ void __launch_bounds__(WALK_THREADS, 2)
rat_reach_kernel(rat_operands<bf16> x, rat_arrays a, __grid_constant__ const rat_problem p, int64_t length) {
    int64_t b = blockIdx.z;
    lane_place l = lane_of<W>(p, (int)((blockIdx.y * blockDim.x + threadIdx.x) / (W / 8)), p.H);
    walk w = walk_of(a, p, b, blockIdx.x, length);
    standing s = standing_at(p, b, w.first);
    lane_offsets at = offsets_of(x, {}, a, p, b, l);
    float product[8], bias[8];
    recurrence r;
    clear(r.key);
    clear(r.value);
    read_floats(bias, p.bias + l.h * p.P, l);
#pragma unroll
    for (int i = 0; i < 8; i++) product[i] = 1;
#pragma unroll 2
    for (int64_t t = w.first; t < w.stop; t++) {
        token now = read_token(x, at, t, l);
        float v[8], g[8], k[8];
        widen(v, now.v);
        widen(g, now.g);
        widen(k, now.k);
        if (t > w.first) stand_next(&s, p, b, t);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float gate, rest;
            gates_of(g[i] + bias[i], &gate, &rest);
            if (s.place == 0) gate = 0;
            product[i] *= gate;
            r.key[i] = gate * r.key[i] + rest * k[i];
            r.value[i] = gate * r.value[i] + rest * v[i];
        }
    }
    write_floats(reach_of(a, p, b, 0, l), l, product);
    write_floats(reach_of(a, p, b, 1, l), l, r.key);
    write_floats(reach_of(a, p, b, 2, l), l, r.value);
}

/* A thread has a channel of a row, and goes over the segments, from the last on the way back: what each hands on is
 * exchanged for what goes into it. running: what goes into the first, or NULL. */
__global__ void rat_join_kernel(float *reach, const float *running, int64_t channels, int64_t segments, bool back) {
    enum { AHEAD = 8 }; /* read at once */
    int64_t b = blockIdx.y, c = (int64_t)blockIdx.x * WALK_THREADS + threadIdx.x;
    if (c >= channels) return;
    float key = running ? running[b * 2 * channels + c] : 0.0f;
    float value = running ? running[(b * 2 + 1) * channels + c] : 0.0f;
    for (int64_t n = 0; n < segments; n += AHEAD) {
        float its[AHEAD][3];
        auto part_of = [&](int i, int part) {
            int64_t segment = back ? segments - 1 - n - i : n + i;
            return reach + ((b * segments + segment) * 3 + part) * channels + c;
        };
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int part = 0; part < 3; part++) its[i][part] = n + i < segments ? *part_of(i, part) : 0.0f;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (n + i >= segments) break;
            *part_of(i, 1) = key, *part_of(i, 2) = value;
            key = its[i][0] * key + its[i][1];
            value = its[i][0] * value + its[i][2];
        }
    }
}

/* Block (segment, heads, row). */
template <int W, bool AGAIN>
__global__ void __launch_bounds__(WALK_THREADS, 2)
rat_walk_kernel(rat_operands<bf16> x, rat_gradients_of<bf16> d, rat_arrays a, __grid_constant__ const rat_problem p,
                int64_t length) {
    constexpr int GROUP = W / 8;
    int64_t b = blockIdx.z;
    lane_place l = lane_of<W>(p, (int)((blockIdx.y * blockDim.x + threadIdx.x) / GROUP), p.H);
    walk w = walk_of(a, p, b, blockIdx.x, length);
    if (w.first == w.stop) return;
    standing s = standing_at(p, b, w.first);
    recurrence r;
    float bias[8];
    float2 turn[4];
    lane_offsets at = offsets_of(x, d, a, p, b, l);
    clear(r.key);
    clear(r.value);
    read_floats(bias, p.bias + l.h * p.P, l);
    find_turns(turn, p, s.chunk, l);
    if (s.place != 0 && (x.running || a.reach)) {
        const float *before = a.reach ? reach_of(a, p, b, 1, l) : x.running + (b * 2 * p.H + l.h) * p.P;
        read_floats(r.key, before, l);
        read_floats(r.value, before + p.H * p.P, l);
    }
    token now, next = read_token(x, at, w.first, l);
    for (int64_t t = w.first; t < w.stop; t++) {
        token_back behind = {};
        if constexpr (AGAIN) behind = read_back(x, d, at, t, l);
        now = next;
        next = read_token(x, at, at_most(t + 1, w.stop - 1), l); /* on its way while this one is computed */
        if (t > w.first) stand_next(&s, p, b, t);
        if (s.place == 0 && t > w.first) {
            clear(r.key);
            clear(r.value);
            find_turns(turn, p, s.chunk, l);
        }
        take_token<GROUP, AGAIN>(&r, now, behind, bias, turn, d, a, p, at, b, t, s, l);
    }
}

/* --- back --------------------------------------------------------------------------------------------------------- */

/* What comes back along a chunk, and the sums of a walk. */
struct returning {
    float key[8], value[8], bias[8];
};

/* What a chunk's first token in the row has before it: nothing, or, where the chunk has begun before the row, what the
 * state has. */
__device__ __forceinline__ void read_start(recurrence *to, const rat_operands<bf16> &x, const rat_problem &p, int64_t b,
                                           bool begun, const lane_place &l) {
    clear(to->key);
    clear(to->value);
    if (!begun) return;
    read_floats(to->key, x.running + (b * 2 * p.H + l.h) * p.P, l);
    read_floats(to->value, x.running + ((b * 2 + 1) * p.H + l.h) * p.P, l);
}

/* k~ and v~ of a chunk's tokens in the row, first .. t, made again for this lane alone: token first + i has place i. */
struct made_states {
    eight *states;
    int64_t first;

    __device__ __forceinline__ eight *at(int64_t t, int part) const {
        return states + ((t - first) * 2 + part) * blockDim.x + threadIdx.x;
    }
};

__device__ __forceinline__ eight round_eight(const float (&from)[8]) {
    eight e;
#pragma unroll
    for (int i = 0; i < 4; i++) e.low.v[i] = from_float<bf16>(from[i]), e.high.v[i] = from_float<bf16>(from[i + 4]);
    return e;
}

__device__ __forceinline__ void make_states(made_states *made, const rat_operands<bf16> &x, const float (&bias)[8],
                                            const rat_problem &p, const lane_offsets &at, int64_t b, int64_t t,
                                            int place, const lane_place &l) {
    enum { AHEAD = 4 }; /* tokens that are on their way together */
    recurrence r;
    made->first = at_least(t - place, 0);
    read_start(&r, x, p, b, t < place, l);
    for (int64_t u = made->first; u <= t; u += AHEAD) {
        eight from[AHEAD][3];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int64_t its = at_most(u + j, t);
            from[j][0] = read_eight(x.v.data + at.wide.at(its), l);
            from[j][1] = read_eight(x.g.data + at.wide.at(its), l);
            from[j][2] = read_eight(x.k.data + at.narrow.at(its), l);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (u + j > t) break;
            float v[8], g[8], k[8];
            widen(v, from[j][0]);
            widen(g, from[j][1]);
            widen(k, from[j][2]);
            go_on(&r, v, g, k, bias);
            *made->at(u + j, 0) = round_eight(r.key);
            *made->at(u + j, 1) = round_eight(r.value);
        }
    }
}

/* A token's k~ and v~ before it. */
template <bool MAKES>
__device__ __forceinline__ void read_before(recurrence *to, const made_states &made, const rat_operands<bf16> &x,
                                            const rat_arrays &a, const rat_problem &p, const lane_offsets &at,
                                            int64_t b, int64_t t, standing s, const lane_place &l) {
    if (s.place == 0 || t == 0) {
        read_start(to, x, p, b, s.place != 0, l);
    } else {
        widen(to->key, MAKES ? *made.at(t - 1, 0) : read_eight(a.keys + at.dense.at(t - 1), l));
        widen(to->value, MAKES ? *made.at(t - 1, 1) : read_eight(a.values + at.dense.at(t - 1), l));
    }
}

/* What the tokens that see this one as an end give to it. */
__device__ __forceinline__ void add_end(returning *back, const rat_arrays &a, const rat_problem &p, int64_t b,
                                        int64_t t, const float2 (&turn)[4], const lane_place &l) {
    int64_t end = ((b * p.E + last_end(p, b, t)) * p.H + l.h) * p.P + l.low;
    float turned[8], key[8], value[8];
    widen(turned, read_eight(a.dend_keys + end, l));
    widen(value, read_eight(a.dend_values + end, l));
    turn_eight(key, turned, turn, -1);
#pragma unroll
    for (int i = 0; i < 8; i++) back->key[i] += key[i], back->value[i] += value[i];
}

/* The same as rat_reach_kernel on the way back. Block (segment, heads, row). */
template <int W>
__global__ void __launch_bounds__(WALK_THREADS, 2)
rat_reach_back_kernel(rat_operands<bf16> x, rat_arrays a, __grid_constant__ const rat_problem p, int64_t length) {
    int64_t b = blockIdx.z;
    lane_place l = lane_of<W>(p, (int)((blockIdx.y * blockDim.x + threadIdx.x) / (W / 8)), p.H);
    walk w = walk_of(a, p, b, blockIdx.x, length);
    lane_offsets at = offsets_of(x, {}, a, p, b, l);
    float product[8], bias[8];
    returning back = {};
    read_floats(bias, p.bias + l.h * p.P, l);
#pragma unroll
    for (int i = 0; i < 8; i++) product[i] = 1;
    for (int64_t t = w.stop - 1; t >= w.first; t--) {
        standing s = standing_at(p, b, t);
        int64_t scalars = (b * p.T + t) * p.H + l.h;
        float g[8], q[8], dout[8], slope = a.slope[scalars], share = a.share[scalars];
        widen(g, read_eight(x.g.data + at.wide.at(t), l));
        widen(q, read_eight(x.q.data + at.narrow.at(t), l));
        widen(dout, read_eight(a.dout + at.dense.at(t), l));
        if (s.place == p.Q - 1 && t + 1 < p.T) {
            float2 turn[4];
            find_turns(turn, p, s.chunk, l);
            add_end(&back, a, p, b, t, turn, l);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float gate, rest;
            gates_of(g[i] + bias[i], &gate, &rest);
            if (s.place == 0) gate = 0;
            product[i] *= gate;
            back.key[i] = gate * (back.key[i] + slope * q[i]);
            back.value[i] = gate * (back.value[i] + share * dout[i]);
        }
    }
    write_floats(reach_of(a, p, b, 0, l), l, product);
    write_floats(reach_of(a, p, b, 1, l), l, back.key);
    write_floats(reach_of(a, p, b, 2, l), l, back.value);
}

/* A token of a head, from its end: dv, dg; its shares in the gradients of query and key. now: k~ of the token, before:
 * that of the one before it. */
__device__ __forceinline__ void return_token(returning *back, float (&dq)[8], float (&dk)[8], const float (&now)[8],
                                             const recurrence &before, const float (&bias)[8], const float2 (&turn)[4],
                                             const rat_operands<bf16> &x, const rat_gradients_of<bf16> &d,
                                             const rat_arrays &a, const rat_problem &p, const lane_offsets &at,
                                             int64_t b, int64_t t, const lane_place &l) {
    float v[8], g[8], q[8], k[8], dout[8], dv[8], dg[8];
    int64_t scalars = (b * p.T + t) * p.H + l.h, wide = at.wide.at(t), narrow = at.narrow.at(t), out = at.out.at(t);
    float slope = a.slope[scalars], share = a.share[scalars];
    widen(g, read_eight(x.g.data + wide, l));
    widen(v, read_eight(x.v.data + wide, l));
    widen(k, read_eight(x.k.data + narrow, l));
    widen(q, read_eight(x.q.data + narrow, l));
    widen(dout, read_eight(a.dout + at.dense.at(t), l));
    clear(dq);
    if (l.h < a.dquery_heads && !(a.folded && t < p.Q)) { /* cuDNN leaves out the first chunk */
        float turned[8];
        widen(turned, read_eight(a.dqueries + at.queries.at(t), l));
        turn_eight(dq, turned, turn, -1);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float gate, rest, key = back->key[i] + slope * q[i], value = back->value[i] + share * dout[i];
        gates_of(g[i] + bias[i], &gate, &rest);
        dg[i] = (key * (before.key[i] - k[i]) + value * (before.value[i] - v[i])) * gate * rest;
        dv[i] = rest * value;
        dk[i] = rest * key;
        dq[i] += slope * now[i];
        back->bias[i] += dg[i];
        back->key[i] = gate * key;
        back->value[i] = gate * value;
    }
    write_eight(d.dv.data + out, l, dv);
    write_eight(d.dg.data + out, l, dg);
}

/* Over the heads of a warp; its first head's lanes write the sums, W floats of queries and W of keys. */
template <int W>
__device__ __forceinline__ void share_out(float *to, float (&dq)[8], float (&dk)[8], const lane_place &l) {
    constexpr int GROUP = W / 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (!l.there) dq[i] = 0, dk[i] = 0;
#pragma unroll
        for (int offset = GROUP; offset < WARP; offset *= 2) {
            dq[i] += __shfl_xor_sync(FULL, dq[i], offset);
            dk[i] += __shfl_xor_sync(FULL, dk[i], offset);
        }
    }
    int lane = threadIdx.x % WARP, low = lane * 4;
    if (lane >= GROUP || low >= l.half) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[low + i] = dq[i], to[l.half + low + i] = dq[i + 4];
        to[W + low + i] = dk[i], to[W + l.half + low + i] = dk[i + 4];
    }
}

/* The warps' sums of `count` tokens, t and before, in order. */
template <int W>
__device__ __forceinline__ void write_shared(const float *sums, const rat_gradients_of<bf16> &d, const rat_problem &p,
                                             int64_t b, int64_t t, int count, int group) {
    int warps = (int)blockDim.x / WARP;
    for (int i = threadIdx.x; i < count * p.P; i += blockDim.x) {
        int back = i / p.P, c = i % p.P * 2, of_key = c >= p.P;
        if (of_key) c -= p.P;
        float sum[2] = {0, 0};
        for (int w = 0; w < warps; w++) {
            const float *from = sums + ((back * warps + w) * 2 + of_key) * W + c;
            sum[0] += from[0], sum[1] += from[1];
        }
        store_floats<2>((of_key ? d.dk : d.dq).at(b, t - back, group) + c, sum);
    }
}

/* Block (segment, group, row): the lanes of all heads of a group. MAKES: k~ and v~ are not in memory, but made again, a
 * chunk at a time. */
template <int W, bool MAKES>
__global__ void __launch_bounds__(RAT_THREADS)
rat_walk_back_kernel(rat_operands<bf16> x, rat_gradients_of<bf16> d, rat_arrays a,
                     __grid_constant__ const rat_problem p, int64_t length) {
    constexpr int GROUP = W / 8;
    DYNAMIC_SHARED(float, sums);
    int64_t b = blockIdx.z;
    int group = blockIdx.y, warp = threadIdx.x / WARP, warps = (int)blockDim.x / WARP;
    made_states made = {(eight *)(sums + BACK_TOKENS * warps * 2 * W), 0};
    lane_place l = lane_of<W>(p, group + (int)threadIdx.x / GROUP * p.G, p.H);
    if (!l.there) l.h = group;
    lane_offsets at = offsets_of(x, d, a, p, b, l);
    at.queries = rows_of(p, b, l.h, a.dquery_heads, l);
    walk w = walk_of(a, p, b, blockIdx.x, length);
    standing s = {0, 0};
    returning back = {};
    recurrence before;
    float now[8], bias[8];
    float2 turn[4];
    read_floats(bias, p.bias + l.h * p.P, l);
    for (int64_t t0 = w.stop - 1; t0 >= w.first; t0 -= BACK_TOKENS) {
#pragma unroll 1
        for (int i = 0; i < BACK_TOKENS; i++) {
            int64_t t = t0 - i;
            if (t < w.first) break;
            if (s.place == 0) { /* into a chunk */
                s = standing_at(p, b, t);
                find_turns(turn, p, s.chunk, l);
                clear(back.key);
                clear(back.value);
                if (a.reach && t == w.stop - 1) {
                    read_floats(back.key, reach_of(a, p, b, 1, l), l);
                    read_floats(back.value, reach_of(a, p, b, 2, l), l);
                }
                if (MAKES) make_states(&made, x, bias, p, at, b, t, s.place, l);
                widen(now, MAKES ? *made.at(t, 0) : read_eight(a.keys + at.dense.at(t), l));
                if (s.place == p.Q - 1 && t + 1 < p.T) add_end(&back, a, p, b, t, turn, l);
            } else {
                s.place--;
            }
            float dq[8], dk[8];
            read_before<MAKES>(&before, made, x, a, p, at, b, t, s, l);
            return_token(&back, dq, dk, now, before, bias, turn, x, d, a, p, at, b, t, l);
            share_out<W>(sums + (i * warps + warp) * 2 * W, dq, dk, l);
#pragma unroll
            for (int c = 0; c < 8; c++) now[c] = before.key[c];
        }
        __syncthreads();
        write_shared<W>(sums, d, p, b, t0, (int)at_most(BACK_TOKENS, t0 - w.first + 1), group);
        __syncthreads();
    }
    write_floats(a.partial + ((b * gridDim.x + blockIdx.x) * p.H + l.h) * p.P, l, back.bias);
}

/* --- launches ----------------------------------------------------------------------------------------------------- */

/* Lanes of a head. */
static int lanes_of(int64_t P) {
    return P <= 64 ? 8 : 16;
}

template <class F> static void with_lanes(const rat_problem &p, F f) {
    if (p.P <= 64) f(constant<64>());
    else f(constant<128>());
}

static unsigned whole_warps(int lanes) {
    return (unsigned)ceil_div(lanes, WARP) * WARP;
}

bool rat_walk_serves(const rat_problem &p) {
    return p.P % 8 == 0 && p.P <= 128 && p.H / p.G * lanes_of(p.P) <= RAT_THREADS;
}

/* A chunk's states of the heads of a group. */
static size_t made_bytes(struct rat_shape s) {
    return (size_t)s.Q * 2 * sizeof(eight) * whole_warps((int)(s.H / s.G) * lanes_of(s.P));
}

bool rat_walk_makes(struct rat_shape s) {
    enum { MOST = 64 << 10 }; /* three blocks share a multiprocessor */
    return !rat_long_chunks(s.Q) && made_bytes(s) <= MOST;
}

/* A grid of (segment, heads, row), and the lanes of a block. */
static dim3 walks_of(struct device *dev, const rat_problem &p, unsigned *block) {
    unsigned lanes = whole_warps(p.H * lanes_of(p.P));
    int64_t segments = ceil_div(p.T, rat_segment(p.Q));
    *block = (unsigned)at_most(lanes, WALK_THREADS);
    while (*block > WARP && segments * p.B * ceil_div(lanes, *block) < cuda_impl(dev)->multiprocessors)
        *block = whole_warps((int)*block / 2); /* there are few walks, and each is on its way for long */
    return dim3((unsigned)segments, (unsigned)ceil_div(lanes, *block), (unsigned)p.B);
}

static void join(struct device *dev, const float *running, const rat_arrays &a, const rat_problem &p, bool back) {
    int64_t channels = (int64_t)p.H * p.P;
    dim3 grid((unsigned)ceil_div(channels, WALK_THREADS), (unsigned)p.B);
    LAUNCH(dev, rat_join_kernel, grid, WALK_THREADS, 0, a.reach, running, channels, ceil_div(p.T, rat_segment(p.Q)),
           back);
}

template <bool AGAIN>
static void walk_along(struct device *dev, const rat_operands<bf16> &x, const rat_gradients_of<bf16> &d,
                       const rat_arrays &a, const rat_problem &p) {
    int64_t length = rat_segment(p.Q);
    unsigned block;
    dim3 grid = walks_of(dev, p, &block);
    with_lanes(p, [&](auto width) {
        constexpr int W = decltype(width)::value;
        if (a.reach) {
            LAUNCH(dev, rat_reach_kernel<W>, grid, block, 0, x, a, p, length);
            join(dev, x.running, a, p, false);
        }
        LAUNCH(dev, (rat_walk_kernel<W, AGAIN>), grid, block, 0, x, d, a, p, length);
    });
}

void rat_walk_forward(struct device *dev, const rat_operands<bf16> &x, const rat_arrays &a, const rat_problem &p) {
    walk_along<false>(dev, x, {}, a, p);
}

void rat_walk_again(struct device *dev, const rat_operands<bf16> &x, const rat_gradients_of<bf16> &d,
                    const rat_arrays &a, const rat_problem &p) {
    walk_along<true>(dev, x, d, a, p);
}

void rat_walk_back(struct device *dev, const rat_operands<bf16> &x, const rat_gradients_of<bf16> &d,
                   const rat_arrays &a, const rat_problem &p) {
    int64_t length = rat_segment(p.Q);
    unsigned block = whole_warps(p.H / p.G * lanes_of(p.P));
    dim3 grid((unsigned)ceil_div(p.T, length), (unsigned)p.G, (unsigned)p.B);
    with_lanes(p, [&](auto width) {
        constexpr int W = decltype(width)::value;
        size_t bytes = (size_t)BACK_TOKENS * (block / WARP) * 2 * W * sizeof(float);
        if (a.reach) {
            unsigned lanes;
            dim3 walks = walks_of(dev, p, &lanes);
            LAUNCH(dev, rat_reach_back_kernel<W>, walks, lanes, 0, x, a, p, length);
            join(dev, NULL, a, p, true);
        }
        if (a.keys) {
            LAUNCH(dev, (rat_walk_back_kernel<W, false>), grid, block, bytes, x, d, a, p, length);
        } else {
            bytes += made_bytes({p.B, p.T, p.H, p.G, p.P, p.Q, 0});
            cuda_expect(dev, cudaFuncSetAttribute(rat_walk_back_kernel<W, true>,
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), "rat");
            LAUNCH(dev, (rat_walk_back_kernel<W, true>), grid, block, bytes, x, d, a, p, length);
        }
    });
}
