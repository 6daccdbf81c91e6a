/* scan_backward.cu: backward of the selective scan; scan.cu has the equations.
 *
 *   dy = dg silu(z);  dz = dg y silu'(z);  dh[t] = c[t] dy[t] + a[t+1] dh[t+1],  a = exp(delta A), 0 where a document
 *   starts;  s = sum_n dh b;  e = sum_n dh A (a h[t-1]);  dx = d dy + delta s;  draw = (x s + e) softplus'(v)
 *   db = sum_i dh delta x;  dc = sum_i dy h;  dA_log = A sum dh delta (a h[t-1]);  dd = sum dy x;  dbias = sum draw
 *
 * Pieces of PIECE tokens are walked from the last. In the walk a lane has four states of two channels, so a warp has 16
 * channels. What is one number a token and channel is computed for a whole piece before the walk, by threads that take
 * pairs of channels as they lie in memory, and passes through shared memory: delta, delta x and dy go in, and s, e, y
 * and dx come back in their places, from which the same threads then form draw and dz.
 * The states come back in two steps: from the piece's saved entering state to those that enter each SUB tokens (kept in
 * shared memory), and from these to the SUB states of one run, in registers with their a. Where a block can't have the
 * 109 KB that this takes, there is room for half of a piece's runs, and the halves are walked one after the other; over
 * the first half's tokens the states go once more, to those that enter the second.
 * Sums over states are shuffles between the four lanes of a pair, of two tokens at once. Sums over channels, a warp's
 * eight pairs, for db and dc, are products with ones on the tensor cores in bf16, added in fp32, for which the terms
 * change lanes in shared memory; in fp32 they are shuffles and end in the same lanes. (s and e by such products, too,
 * took an H100 1.87 ms, but their roundings show in dbias where many tokens cancel.) The block's warps are added in
 * shared memory, and each block writes 2 x 16 floats a token, which scan_channels_kernel adds in order. dA_log, dd and
 * dbias stay in registers over the walk and leave one row for each batch row and segment. So nothing is atomic, and
 * nothing is added in a changing order. Time is cut in segments as in forward (scan_carry.cu finds what comes in from
 * the right).
 *
 * Account, B 8, T 2048, D 4096, N 16, bf16, on 132 multiprocessors at 1.75 GHz, instructions for a token, channel and
 * state: 2 x 4.5 for the states, 10 for dh and what follows from it, 3.5 for the sums, 1 to read shared memory, 6.5 for
 * what is one number a token and channel: 30 x 1.07e9 at 29.6e12/s, 1.1 ms of issue slots; two exponentials, 0.6 ms,
 * and 1 GB, 0.25 ms, beside them. Registers (255 a thread, for the states of a run) leave room for eight warps a
 * multiprocessor. With both kinds of sums by shuffles and a branch a token between walks these filled 58 % of the slots
 * (ncu), and an H100 took 2.07 ms: a warp waits for its own results in a third of the rest, for exponentials and shared
 * memory in a sixth, for global memory in a seventh. Now it takes 1.88 ms. One channel a lane and 16 warps, built and
 * measured, took 2.4. With 12 warps (pieces of 32 tokens, runs of 4) the 512 blocks of this case would need two rounds
 * of which the second is a third full; it would suit shapes of at most 396 blocks.
 */
#include "kernels/cuda/scan.cuh"
#include "kernels/cuda/shared.cuh"

enum {
    STATES = SCAN_STATES,
    THREADS = SCAN_THREADS,
    WARPS = SCAN_WARPS,
    PIECE = SCAN_PIECE,
    PAIRS = SCAN_PAIRS,
    GROUP = SCAN_GROUP,
    SUB = 8,
    SUBS = PIECE / SUB,
    EACH = 4,   /* elements of b or c that a thread moves at a time */
    ROUNDS = 8, /* tokens of a thread that are on their way from memory at once */
    STRIDE = ROUNDS * WARPS,
    VALUES = 4 * 10, /* four matrices of eight rows, two rows of 16 bytes between them because of the banks */
};

/* Two numbers a token and channel in each of the first two. Before the walk | after it: */
struct piece_room {
    float2 flow[PIECE][SCAN_BLOCK];  /* step size for decays, delta x | dx, s */
    float2 other[PIECE][SCAN_BLOCK]; /* dy, delta | y, e */
    float b[PIECE][GROUP], c[PIECE][GROUP];
    uint4 values[WARPS][2][VALUES]; /* of a token, of which sum_channels adds up what the lanes of a warp have */
    /* The states that enter a run, of the first and the second channel of a thread; | a warp's sums over its channels,
     * in the warp's own places: channels(). The last, because there may be room for half of it. */
    float4 entering[SUBS][2][THREADS];

    /* Two neighbouring channels at once. */
    __device__ __forceinline__ float4 *pair(float2 (&of)[PIECE][SCAN_BLOCK], int t, int first) {
        return reinterpret_cast<float4 *>(&of[t][first]);
    }
    /* Sums of token t over the channels of a warp, a value a lane. */
    template <int RUNS> __device__ __forceinline__ float *channels(int t, int warp) {
        return &entering[t / SUB % RUNS][t % SUB / 4][warp * WARP].x + t % 4 * WARP;
    }
};

/* With room for so many of a piece's runs. */
template <int RUNS>
constexpr size_t room_bytes = sizeof(piece_room) - (SUBS - RUNS) * 2 * THREADS * sizeof(float4);
static_assert(room_bytes<SUBS / 2> <= SHARED_LEAST, "what chips give");

/* Everything backward writes, and what only it reads. */
template <class T> struct scan_gradients {
    scan_rows<T> dx, draw, dz, dg;
    float *dinitial;
    const float *dfinal, *saved, *carries; /* carries (B, segments, N, D): what comes in from the right; NULL uncut */
    float *of_channels;                    /* (B, T, blocks, 2 GROUP) */
    float *dA_log, *dd, *dbias;            /* partial rows, one for each batch row and segment; dd may be NULL */
    float *sums;                           /* (4, B, T, D): dx, s, y and e of the groups before; for N > GROUP */
};

/* --- before the walk ---------------------------------------------------------------------------------------------- */

template <class T>
__device__ __forceinline__ void load_states_of_piece(piece_room &room, const scan_inputs<T> &in, const scan_problem &p,
                                                     int64_t row, int64_t t0, int n0) {
    int left = (int)at_most(p.T - t0, PIECE), n = threadIdx.x * EACH % GROUP;
    scan_line<T> b_line = in.b.line(row, t0, n0 + n), c_line = in.c.line(row, t0, n0 + n);
    for (int e = threadIdx.x * EACH; e < PIECE * GROUP; e += THREADS * EACH) {
        scan_some<T, EACH> b = load_states<T, EACH>(b_line, p, e / GROUP, left, n0 + n);
        scan_some<T, EACH> c = load_states<T, EACH>(c_line, p, e / GROUP, left, n0 + n);
        *reinterpret_cast<float4 *>(&room.b[e / GROUP][n]) = make_float4(b[0], b[1], b[2], b[3]);
        *reinterpret_cast<float4 *>(&room.c[e / GROUP][n]) = make_float4(c[0], c[1], c[2], c[3]);
    }
}

/* Of the tokens from `first` on, those that don't exist change nothing and those that start a document let nothing
 * through. Both are rare, and tokens that nothing is asked of are filled in beside each other. */
__device__ __forceinline__ void mend_stride(piece_room &room, const scan_pair &own, unsigned starts, int first,
                                            int left) {
#pragma unroll 1
    for (int local = threadIdx.x / WARP; local < STRIDE; local += WARPS) {
        float4 *flow = room.pair(room.flow, first + local, 2 * own.place);
        if (starts >> local & 1) flow->x = flow->z = SCAN_START;
        if (local < left) continue;
        *flow = *room.pair(room.other, first + local, 2 * own.place) = make_float4(0, 0, 0, 0);
    }
}

/* Fill the room for the piece at t0, and add to dd. */
template <class T, bool WIDE>
__device__ __forceinline__ void enter_piece(piece_room &room, float2 &dd, const scan_inputs<T> &in,
                                            const scan_gradients<T> &d, const scan_problem &p, int64_t row, int64_t t0,
                                            int n0) {
    scan_pair own(p, WIDE);
    float2 bias = pair_of_vector(p.bias, own.i, own.count);
    load_states_of_piece(room, in, p, row, t0, n0);
#pragma unroll 1
    for (int first = 0; first < PIECE; first += STRIDE) {
        int left = (int)(p.T - t0 - first < STRIDE ? p.T - t0 - first : STRIDE);
        scan_two<T> xs[ROUNDS] = {}, raws[ROUNDS] = {}, zs[ROUNDS] = {}, dgs[ROUNDS] = {};
        scan_documents documents;
        if (left > 0) {
            load_pairs<WIDE, WARPS>(xs, in.x.line(row, t0 + first, own.there), own, left);
            load_pairs<WIDE, WARPS>(raws, in.raw.line(row, t0 + first, own.there), own, left);
            load_pairs<WIDE, WARPS>(dgs, d.dg.line(row, t0 + first, own.there), own, left);
            if (in.z.data) load_pairs<WIDE, WARPS>(zs, in.z.line(row, t0 + first, own.there), own, left);
        }
        documents.load(p, row, t0 + first);
        unsigned starts = documents.starts();
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            int local = k * WARPS + threadIdx.x / WARP;
            float2 x = xs[k].floats(), raw = raws[k].floats(), dy = dgs[k].floats();
            float2 delta = make_float2(softplus_of(raw.x + bias.x), softplus_of(raw.y + bias.y));
            if (in.z.data) {
                float2 z = zs[k].floats();
                dy.x *= silu_of(z.x), dy.y *= silu_of(z.y);
            }
            if (own.count < 2) dy.y = x.y = 0; /* channels that don't exist add nothing to db and dc */
            if (own.count < 1) dy.x = x.x = 0;
            *room.pair(room.flow, first + local, 2 * own.place) = make_float4(delta.x, delta.x * x.x, delta.y,
                                                                              delta.y * x.y);
            *room.pair(room.other, first + local, 2 * own.place) = make_float4(dy.x, delta.x, dy.y, delta.y);
            if (local < left) dd.x += dy.x * x.x, dd.y += dy.y * x.y;
        }
        if (starts || left < STRIDE) mend_stride(room, own, starts, first, left);
    }
}

template <class T>
__device__ __forceinline__ void prefetch_token(const scan_rows<T> &rows, const scan_problem &p, int64_t row,
                                               int64_t t) {
    int64_t first = (int64_t)blockIdx.x * SCAN_BLOCK;
    if (!rows.data) return;
    prefetch_line(rows.at(row, t, first));
    prefetch_line(rows.at(row, t, at_most(first + SCAN_BLOCK, p.D) - 1));
}

/* Have what the piece at t0 reads brought near while another is walked: a thread takes a token of two views. */
template <class T>
__device__ __forceinline__ void prefetch_piece(const scan_inputs<T> &in, const scan_gradients<T> &d,
                                               const scan_problem &p, int64_t row, int64_t t0) {
    static_assert(THREADS == 2 * PIECE, "a thread a token of two views");
    int64_t t = t0 + threadIdx.x % PIECE;
    if (threadIdx.x < PIECE) prefetch_token(in.x, p, row, t), prefetch_token(in.raw, p, row, t);
    else prefetch_token(d.dg, p, row, t), prefetch_token(in.z, p, row, t);
}

/* --- the walk ----------------------------------------------------------------------------------------------------- */

/* What a lane carries over the walk. */
struct walk {
    float rate[2][STATES];  /* A log2(e) */
    float carry[2][STATES]; /* a[t+1] dh[t+1] */
    float dA[2][STATES];    /* sum dh delta (a h) */
    float skip;             /* d of the channel whose sums the lane finishes; 0 but for the first group of states */
};

/* h of the next token from that of the one before; `decay` receives a. */
__device__ __forceinline__ void advance(float (&next)[2][STATES], float (&decay)[2][STATES],
                                        const float (&h)[2][STATES], const walk &w, piece_room &room, int t,
                                        const scan_place &at) {
    float b[STATES];
    float4 flow = *room.pair(room.flow, t, at.local);
    load_four(b, &room.b[t][at.n]);
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        decay[0][k] = power_of_two(flow.x * w.rate[0][k]);
        decay[1][k] = power_of_two(flow.z * w.rate[1][k]);
        next[0][k] = decay[0][k] * h[0][k] + flow.y * b[k];
        next[1][k] = decay[1][k] * h[1][k] + flow.w * b[k];
    }
}

/* What a lane has of a token: over its own states, sums of its two channels; over its two channels, the terms of db and
 * dc of its states. */
struct token_sums {
    float s[2], e[2], y[2], channels[2 * STATES];
};

/* Sums over the eight pairs of a warp of v[0..7], of v[lane / 4] in each lane: each step halves the values that a lane
 * holds and doubles the lanes they are summed over. */
__device__ __forceinline__ float sum_channels(const float (&v)[8], int lane) {
    float four[4], two[2];
    bool upper = lane & 16;
#pragma unroll
    for (int j = 0; j < 4; j++)
        four[j] = (upper ? v[4 + j] : v[j]) + __shfl_xor_sync(FULL, upper ? v[j] : v[4 + j], 16);
    upper = lane & 8;
#pragma unroll
    for (int j = 0; j < 2; j++)
        two[j] = (upper ? four[2 + j] : four[j]) + __shfl_xor_sync(FULL, upper ? four[j] : four[2 + j], 8);
    upper = lane & 4;
    return (upper ? two[1] : two[0]) + __shfl_xor_sync(FULL, upper ? two[0] : two[1], 4);
}

/* The same for two tokens. In fp32 by shuffles. */
__device__ __forceinline__ void sum_channels(float (&sums)[2], const token_sums &early, const token_sums &late,
                                             uint4 (&)[2][VALUES], int lane, float) {
    sums[0] = sum_channels(early.channels, lane);
    sums[1] = sum_channels(late.channels, lane);
}

/* In bf16, added in fp32. The values of the four lanes of a pair are rows of four 8 x 8 matrices in shared memory, from
 * where they come back as columns, along k, and a product with ones adds them up: ones for the first half of k in
 * columns 0 and 2, which lanes 0 and 1 of four hold, for the second in columns 4 and 6. */
__device__ __forceinline__ void sum_channels(float (&sums)[2], const token_sums &early, const token_sums &late,
                                             uint4 (&values)[2][VALUES], int lane, __nv_bfloat16) {
    uint32_t ones = 0x3f803f80u, column = lane / 4;
    const uint32_t b[2] = {column == 0 || column == 2 ? ones : 0, column == 4 || column == 6 ? ones : 0};
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const float *v = (t ? late : early).channels;
        values[t][lane % 4 * 10 + lane / 4] = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                                         pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < 2; t++) {
        uint32_t a[4];
        float d[4] = {};
        ldmatrix_x4_transposed(a, &values[t][lane / 8 * 10 + lane % 8]);
        mma_bf16_m16n8k16(d, a, b);
        sums[t] = lane & 1 ? d[2] : d[0];
    }
    __syncwarp(); /* before the next values come there */
}

/* A number of two tokens' two channels, over all states: lane q of a pair gets it of channel q / 2 of token q % 2. */
__device__ __forceinline__ float sum_tokens(const float (&early)[2], const float (&late)[2], int lane) {
    const float v[4] = {early[0], late[0], early[1], late[1]};
    return sum_states(v, lane);
}

/* One token: from its dh on. */
__device__ __forceinline__ token_sums token_backward(walk &w, piece_room &room, const scan_place &at,
                                                     const float (&before)[2][STATES], const float (&h)[2][STATES],
                                                     const float (&decay)[2][STATES], int t) {
    float4 flow = *room.pair(room.flow, t, at.local), other = *room.pair(room.other, t, at.local);
    float b[STATES], c[STATES];
    token_sums out = {};
    load_four(b, &room.b[t][at.n]);
    load_four(c, &room.c[t][at.n]);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float inflow = j ? flow.w : flow.y, dy = j ? other.z : other.x, delta = j ? other.w : other.y;
#pragma unroll
        for (int k = 0; k < STATES; k++) {
            float dh = c[k] * dy + w.carry[j][k];
            w.carry[j][k] = decay[j][k] * dh;
            float through = w.carry[j][k] * before[j][k];
            out.channels[k] += dh * inflow;
            out.channels[STATES + k] += dy * h[j][k];
            out.s[j] += dh * b[k];
            out.e[j] += through * w.rate[j][k];
            out.y[j] += c[k] * h[j][k];
            w.dA[j][k] += through * delta;
        }
    }
    return out;
}

/* Tokens t and t + 1: dx, s, y and e into their places in the room, each lane of a pair for a channel and token. */
template <class T, int RUNS>
__device__ __forceinline__ void finish_tokens(piece_room &room, const token_sums &early, const token_sums &late,
                                              const walk &w, const scan_place &at, int t) {
    int warp = threadIdx.x / WARP, mine = t + (at.quarter & 1), channel = at.local + (at.quarter >> 1);
    float s = sum_tokens(early.s, late.s, at.lane), e = sum_tokens(early.e, late.e, at.lane);
    float y = sum_tokens(early.y, late.y, at.lane), channels[2];
    sum_channels(channels, early, late, room.values[warp], at.lane, T());
    float2 other = room.other[mine][channel]; /* dy, delta */
    __syncwarp();                             /* what is written over has been read */
    room.flow[mine][channel] = make_float2(w.skip * other.x + other.y * s, s);
    room.other[mine][channel] = make_float2(y, e * (1.0f / LOG2E));
    room.channels<RUNS>(t, warp)[at.lane] = channels[0];
    room.channels<RUNS>(t + 1, warp)[at.lane] = channels[1];
}

/* The block's sums over its channels for RUNS runs, from token t0 of the row on. */
template <int RUNS, class T>
__device__ __forceinline__ void store_channels(piece_room &room, const scan_problem &p, const scan_gradients<T> &d,
                                               int64_t row, int64_t t0) {
    float *to = d.of_channels + ((row * p.T + t0) * gridDim.x + blockIdx.x) * 2 * GROUP + threadIdx.x % WARP;
    int left = (int)at_most(p.T - t0, RUNS * SUB);
#pragma unroll 4
    for (int t = threadIdx.x / WARP; t < left; t += WARPS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += room.channels<RUNS>(t, w)[threadIdx.x % WARP];
        to[(int64_t)t * gridDim.x * 2 * GROUP] = sum;
    }
}

/* The states that enter RUNS runs of SUB tokens of a piece, from run `first` on, from the one that enters the piece. */
template <int RUNS>
__device__ __forceinline__ void enter_runs(piece_room &room, float (&h)[2][STATES], const walk &w, const scan_place &at,
                                           int first) {
#pragma unroll 1
    for (int sub = 0; sub < first + RUNS; sub++) {
#pragma unroll
        for (int j = 0; j < 2 && sub >= first; j++)
            room.entering[sub % RUNS][j][threadIdx.x] = make_float4(h[j][0], h[j][1], h[j][2], h[j][3]);
        float decay[2][STATES];
        if (sub + 1 == first + RUNS) break;
#pragma unroll
        for (int t = 0; t < SUB; t++) advance(h, decay, h, w, room, sub * SUB + t, at);
    }
}

template <class T, bool WIDE, int RUNS>
__device__ __forceinline__ void walk_piece(walk &w, piece_room &room, const scan_gradients<T> &d, const scan_problem &p,
                                           const scan_place &at, int64_t piece, int n0) {
    float h[SUB + 1][2][STATES], decay[SUB][2][STATES];
    const float *saved = d.saved + (at.row * p.pieces + piece) * p.N * p.D;
#pragma unroll 1
    for (int first = SUBS - RUNS; first >= 0; first -= RUNS) {
#pragma unroll
        for (int k = 0; k < STATES; k++) h[0][0][k] = h[0][1][k] = 0;
        load_pairs_of_states<WIDE>(h[0], saved, p, at, n0);
        enter_runs<RUNS>(room, h[0], w, at, first);
#pragma unroll 1
        for (int sub = first + RUNS - 1; sub >= first; sub--) {
#pragma unroll
            for (int j = 0; j < 2; j++) load_four(h[0][j], &room.entering[sub % RUNS][j][threadIdx.x].x);
#pragma unroll
            for (int t = 0; t < SUB; t++) advance(h[t + 1], decay[t], h[t], w, room, sub * SUB + t, at);
#pragma unroll
            for (int t = SUB - 2; t >= 0; t -= 2) {
                token_sums late = token_backward(w, room, at, h[t + 1], h[t + 2], decay[t + 1], sub * SUB + t + 1);
                token_sums early = token_backward(w, room, at, h[t], h[t + 1], decay[t], sub * SUB + t);
                finish_tokens<T, RUNS>(room, early, late, w, at, sub * SUB + t);
            }
        }
        __syncthreads();
        store_channels<RUNS>(room, p, d, at.row, piece * PIECE + first * SUB);
        if (first > 0) __syncthreads(); /* its room is the next half's */
    }
}

/* --- behind the walk ---------------------------------------------------------------------------------------------- */

/* Add the sums of the groups of states before, and keep them unless this group is the last. */
template <class T>
__device__ void join_groups(float4 &flow, float4 &other, const scan_gradients<T> &d, const scan_problem &p,
                            const scan_pair &own, int64_t row, int64_t t, int n0) {
    int64_t at = (row * p.T + t) * p.D + own.i, plane = p.B * p.T * p.D;
    float *parts[4] = {d.sums + at, d.sums + plane + at, d.sums + 2 * plane + at, d.sums + 3 * plane + at};
    float *first[4] = {&flow.x, &flow.y, &other.x, &other.y}, *second[4] = {&flow.z, &flow.w, &other.z, &other.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (n0 > 0) {
            float2 before = pair_of_vector(parts[k], 0, own.count);
            *first[k] += before.x, *second[k] += before.y;
        }
        if (n0 + GROUP < p.N) store_pair<float, false>(parts[k], *first[k], *second[k], own.count);
    }
}

/* dx, draw and dz of a piece from what the walk left in the room; adds to dbias. */
template <class T, bool WIDE>
__device__ __forceinline__ void leave_piece(piece_room &room, float2 &dbias, const scan_inputs<T> &in,
                                            const scan_gradients<T> &d, const scan_problem &p, int64_t row, int64_t t0,
                                            int n0) {
    scan_pair own(p, WIDE);
    float2 bias = pair_of_vector(p.bias, own.i, own.count), skip = pair_of_vector(p.d, own.i, own.count);
#pragma unroll 1
    for (int first = 0; first < PIECE && t0 + first < p.T; first += STRIDE) {
        int left = (int)(p.T - t0 - first < STRIDE ? p.T - t0 - first : STRIDE);
        scan_two<T> xs[ROUNDS], raws[ROUNDS], zs[ROUNDS], dgs[ROUNDS];
        load_pairs<WIDE, WARPS>(xs, in.x.line(row, t0 + first, own.there), own, left);
        load_pairs<WIDE, WARPS>(raws, in.raw.line(row, t0 + first, own.there), own, left);
        if (d.dz.data) {
            load_pairs<WIDE, WARPS>(dgs, d.dg.line(row, t0 + first, own.there), own, left);
            load_pairs<WIDE, WARPS>(zs, in.z.line(row, t0 + first, own.there), own, left);
        }
        scan_line<T> dx = d.dx.line(row, t0 + first, own.i), draws = d.draw.line(row, t0 + first, own.i);
        scan_line<T> dzs = d.dz.line(row, t0 + first, own.i);
        /* PLAIN: there is a gate, and one group of states; then nothing is asked of a token. */
        auto tokens = [&](auto plain) {
            constexpr bool PLAIN = plain.value;
#pragma unroll
            for (int k = 0; k < ROUNDS; k++) {
                int local = k * WARPS + threadIdx.x / WARP, count = local < left ? own.count : 0;
                float4 flow = *room.pair(room.flow, first + local, 2 * own.place);
                float4 other = *room.pair(room.other, first + local, 2 * own.place);
                if (!PLAIN && d.sums && count) join_groups(flow, other, d, p, own, row, t0 + first + local, n0);
                if (!PLAIN && n0 + GROUP < p.N) continue;
                float2 x = xs[k].floats(), raw = raws[k].floats();
                float2 draw = make_float2((x.x * flow.y + other.y) * sigmoid_of(raw.x + bias.x),
                                          (x.y * flow.w + other.w) * sigmoid_of(raw.y + bias.y));
                if (local < left) dbias.x += draw.x, dbias.y += draw.y;
                store_pair<T, WIDE>(dx.at(local), flow.x, flow.z, count);
                store_pair<T, WIDE>(draws.at(local), draw.x, draw.y, count);
                if (!PLAIN && !d.dz.data) continue;
                float2 z = zs[k].floats(), dg = dgs[k].floats();
                store_pair<T, WIDE>(dzs.at(local), dg.x * silu_slope(z.x) * (other.x + skip.x * x.x),
                                    dg.y * silu_slope(z.y) * (other.z + skip.y * x.y), count);
            }
        };
        if (d.dz.data && !d.sums) tokens(constant<1>());
        else tokens(constant<0>());
    }
}

/* *to and the next: the sums over the block's warps of a pair's two numbers. */
__device__ __forceinline__ void store_warps(float *to, float2 v, piece_room &room, const scan_pair &own) {
    float2 *parts = &room.flow[0][0];
    __syncthreads();
    parts[threadIdx.x] = v;
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    float2 sum = make_float2(0, 0);
    for (int w = 0; w < WARPS; w++) sum.x += parts[w * WARP + own.place].x, sum.y += parts[w * WARP + own.place].y;
    store_pair<float, false>(to, sum.x, sum.y, own.count);
}

/* Segment blockIdx.y of batch row blockIdx.z, states n0 .. n0+GROUP-1. */
template <class T, bool WIDE, int RUNS>
__global__ void __launch_bounds__(THREADS, 2)
scan_backward_kernel(scan_gradients<T> d, scan_inputs<T> in, scan_problem p, int n0) {
    DYNAMIC_SHARED(char, memory);
    piece_room &room = *reinterpret_cast<piece_room *>(memory);
    scan_place at;
    float2 dd = make_float2(0, 0), dbias = dd;
    int64_t first = at.segment * p.per_segment, last = at_most(first + p.per_segment, p.pieces);
    int64_t part = at.row * p.segments + at.segment, channel = at.i + (at.quarter >> 1);
    walk w = {};
    w.skip = p.d && n0 == 0 && channel < p.D ? p.d[channel] : 0;
    load_rates(w.rate, p, at, n0);
    each_state(p, at, n0, [&](int64_t n, int64_t i, int j, int k) {
        if (d.carries) w.carry[j][k] = d.carries[(part * p.N + n) * p.D + i];
        else if (d.dfinal) w.carry[j][k] = d.dfinal[(at.row * p.D + i) * p.N + n];
    });
    for (int64_t piece = last - 1; piece >= first; piece--) {
        enter_piece<T, WIDE>(room, dd, in, d, p, at.row, piece * PIECE, n0);
        __syncthreads();
        if (piece > first) prefetch_piece(in, d, p, at.row, (piece - 1) * PIECE);
        walk_piece<T, WIDE, RUNS>(w, room, d, p, at, piece, n0);
        leave_piece<T, WIDE>(room, dbias, in, d, p, at.row, piece * PIECE, n0);
        __syncthreads();
    }
    each_state(p, at, n0, [&](int64_t n, int64_t i, int j, int k) {
        d.dA_log[(part * p.D + i) * p.N + n] = w.dA[j][k] * w.rate[j][k] * (1.0f / LOG2E);
        if (d.dinitial && at.segment == 0) d.dinitial[(at.row * p.D + i) * p.N + n] = w.carry[j][k];
    });
    scan_pair own(p, WIDE);
    if (d.dd && n0 == 0) store_warps(d.dd + part * p.D + own.i, dd, room, own);
    if (n0 + GROUP >= p.N) store_warps(d.dbias + part * p.D + own.i, dbias, room, own);
}

/* db and dc of the group's states: the blocks' sums, in order. A thread a token and value. */
template <class T>
__global__ void scan_channels_kernel(scan_rows<T> db, scan_rows<T> dc, const float *of_channels, int64_t blocks,
                                     scan_problem p, int n0) {
    int64_t token = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, row = token / p.T, t = token % p.T;
    int value = threadIdx.x % WARP, place = value / 4; /* finish_tokens' lane, and its value of eight */
    int64_t n = n0 + value % 4 * STATES + place % STATES;
    if (token >= p.B * p.T) return;
    const float *from = of_channels + token * blocks * 2 * GROUP + value;
    float sum = 0;
#pragma unroll 8
    for (int64_t k = 0; k < blocks; k++) sum += from[k * 2 * GROUP];
    if (n >= p.N) return;
    *(place < STATES ? db : dc).at(row, t, n) = from_float<T>(sum);
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

/* Scratch in floats: sums over channels; partial rows of dA_log, dd and dbias; carries and decays of segments; sums. */
struct scan_scratch {
    int64_t blocks, channels, dA_log, vector, carry, sums, total;
};

static scan_scratch scratch_of(struct scan_shape s) {
    scan_scratch r = {};
    int64_t segments = scan_segments(s);
    r.blocks = ceil_div(s.D, SCAN_BLOCK);
    r.channels = s.B * s.T * r.blocks * 2 * GROUP;
    r.dA_log = s.B * segments * s.D * s.N;
    r.vector = s.B * segments * s.D;
    r.carry = segments > 1 ? r.dA_log : 0;
    r.sums = s.N > GROUP ? 4 * s.B * s.T * s.D : 0;
    r.total = r.channels + r.dA_log + 2 * r.vector + 2 * r.carry + r.sums;
    return r;
}

extern "C" size_t cuda_scan_backward_scratch(struct scan_shape s) {
    return (size_t)scratch_of(s).total * sizeof(float);
}

template <class T>
static void backward_groups(struct device *dev, const scan_gradients<T> &g, const scan_inputs<T> &in, scan_rows<T> db,
                            scan_rows<T> dc, int64_t blocks, bool fit, const scan_problem &p) {
    auto launch = [&](void (*kernel)(scan_gradients<T>, scan_inputs<T>, scan_problem, int), size_t bytes) {
        allow_shared(dev, kernel, bytes, "scan_backward");
        for (int n0 = 0; n0 < p.N; n0 += GROUP) {
            LAUNCH(dev, kernel, scan_grid(p), THREADS, bytes, g, in, p, n0);
            LAUNCH(dev, scan_channels_kernel<T>, (unsigned)ceil_div(p.B * p.T, 8), 8 * WARP, 0, db, dc, g.of_channels,
                   blocks, p, n0);
        }
    };
    bool whole = cuda_shared_most(dev) >= room_bytes<SUBS>;
    with_pairs(fit, [&](auto pairs) {
        constexpr bool WIDE = pairs.value;
        if (whole) launch(scan_backward_kernel<T, WIDE, SUBS>, room_bytes<SUBS>);
        else launch(scan_backward_kernel<T, WIDE, SUBS / 2>, room_bytes<SUBS / 2>);
    });
}

extern "C" void cuda_scan_backward(struct device *dev, tensor dx, tensor draw, tensor db, tensor dc, tensor dz,
                                   tensor dinitial, tensor dbias, tensor dA_log, tensor dd, tensor dg, tensor dfinal,
                                   const void *saved, tensor x, tensor raw, tensor bias, tensor A_log, tensor b,
                                   tensor c, tensor d, tensor z, tensor initial, tensor doc, void *scratch) {
    scan_problem p = scan_problem_of(dg, x, raw, bias, A_log, b, c, d, z, initial, doc);
    scan_scratch size = scratch_of({p.B, p.T, p.D, p.N});
    float *channels = (float *)scratch, *of_A = channels + size.channels, *of_d = of_A + size.dA_log;
    float *of_bias = of_d + size.vector, *carries = of_bias + size.vector, *decays = carries + size.carry;
    if (p.segments > 1) cuda_scan_carry_back(dev, carries, decays, dg, dfinal, raw, c, z, p);
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        scan_gradients<T> g = {};
        g.dx = rows_of<T>(dx), g.draw = rows_of<T>(draw), g.dz = rows_of<T>(dz), g.dg = rows_of<T>(dg);
        g.dinitial = data_of<float>(dinitial), g.dfinal = data_of<float>(dfinal), g.saved = (const float *)saved;
        g.carries = p.segments > 1 ? carries : NULL;
        g.of_channels = channels, g.dA_log = of_A, g.dbias = of_bias;
        g.dd = tensor_given(dd) ? of_d : NULL;
        g.sums = p.N > GROUP ? decays + size.carry : NULL;
        scan_inputs<T> in = {rows_of<T>(x), rows_of<T>(raw), rows_of<T>(b), rows_of<T>(c), rows_of<T>(z)};
        bool fit = scan_pairs_fit(dg, x, raw, z) && scan_pairs_fit(dx, draw, dz, dz);
        backward_groups<T>(dev, g, in, rows_of<T>(db), rows_of<T>(dc), size.blocks, fit, p);
    });
    int64_t parts = p.B * p.segments;
    cuda_add_partials(dev, data_of<float>(dA_log), of_A, parts, p.D * p.N);
    cuda_add_partials(dev, data_of<float>(dbias), of_bias, parts, p.D);
    if (tensor_given(dd)) cuda_add_partials(dev, data_of<float>(dd), of_d, parts, p.D);
}
