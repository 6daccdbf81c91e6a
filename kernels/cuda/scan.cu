/* scan.cu: the selective scan of Mamba (arXiv 2312.00752) with step size, skip and gate: forward and one step; backward
 * is scan_backward.cu, what enters the segments of a row that is cut scan_carry.cu.
 *
 *   delta = softplus(raw + bias);  A = -exp(A_log);  per channel i and state n
 *   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] b[t,n] x[t];   y[t] = sum_n c[t,n] h[t,n] + d x[t];   g = y silu(z)
 *
 * A block walks SCAN_BLOCK channels of one batch row over a segment of time in tiles of TILE tokens. What is one number
 * a token and channel is computed before and after a tile's walk by threads that take two neighbouring channels: delta
 * and delta x go to shared memory, y comes back from there; the next tile is on its way from memory meanwhile. In the
 * walk a thread has four states of two channels, and the four lanes that share a pair add their sums with two shuffles.
 * More than GROUP states are walked in groups, with y in scratch between them.
 *
 * Why two channels and four states: b and c are read from shared memory by every thread that needs them. One channel
 * and 16 states would read 8 bytes a token, channel and state, two and four read 6, and there are four times the
 * threads, which hide the latencies that eight independent recurrences don't.
 *
 * Time is cut into segments when there are too few channels to fill the chip (small B, long T). That costs a second set
 * of exponentials (scan_carry.cu). The cut depends on the shape only, so sums are always the same.
 *
 * saved: the states that enter each piece of SCAN_PIECE tokens, (B, ceil(T/SCAN_PIECE), N, D) fp32.
 *
 * Account, B 8, T 2048, D 4096, N 16, bf16, on 132 multiprocessors at 1.75 GHz: for each token, channel and state one
 * exponential and 6.5 instructions in all, four of them fp32 arithmetic; for each token and channel three more
 * exponentials and reciprocals and about 35 instructions. Special functions: 19/16 x 1.07e9 at 3.7e12/s, 0.34 ms; issue
 * slots: 8.7 x 1.07e9 at 29.6e12/s, 0.31 ms beside them; 4 x 134 MB and 33 MB saved, 0.14 ms beside both. So bound by
 * exponentials: 0.34 ms at best; an H100 takes 0.51. B 1, T 65536 is four times the work, run almost twice: 3.5 ms.
 */
#include "kernels/cuda/scan.cuh"

/* --- the problem -------------------------------------------------------------------------------------------------- */

scan_problem scan_problem_of(tensor g, tensor x, tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d,
                             tensor z, tensor initial, tensor doc) {
    scan_problem p = {};
    p.B = x.dim[0], p.T = x.dim[1], p.D = x.dim[2], p.N = b.dim[2];
    ASSERT(tensor_is(g, 3, p.B, p.T, p.D) && tensor_is(raw, 3, p.B, p.T, p.D) && tensor_is(c, 3, p.B, p.T, p.N));
    ASSERT(tensor_is(A_log, 2, p.D, p.N) && tensor_is(bias, 1, p.D) && x.dtype == b.dtype && x.dtype == raw.dtype);
    ASSERT(!tensor_given(z) || tensor_is(z, 3, p.B, p.T, p.D));
    p.bias = data_of<float>(bias), p.A_log = data_of<float>(A_log), p.d = data_of<float>(d);
    p.initial = data_of<float>(initial), p.doc = data_of<int32_t>(doc);
    struct scan_shape shape = {p.B, p.T, p.D, p.N};
    p.pieces = scan_pieces(shape);
    p.per_segment = scan_pieces_per_segment(shape);
    p.segments = scan_segments(shape);
    p.states_fit = vectors_fit(b, 4) && vectors_fit(c, 4);
    return p;
}

/* The states that enter the pieces, then for groups of states beyond the first the sums y (B,T,D), then what a segment
 * adds to its final state and by how much it lets the entering one decay, (B, segments, N, D) each. */
extern "C" size_t cuda_scan_saved(struct scan_shape s) {
    return (size_t)(s.B * scan_pieces(s) * s.N * s.D) * sizeof(float);
}

static size_t sums_size(struct scan_shape s) {
    return s.N > SCAN_GROUP ? (size_t)(s.B * s.T * s.D) * sizeof(float) : 0;
}

static size_t carry_size(struct scan_shape s) {
    int64_t segments = scan_segments(s);
    return segments > 1 ? (size_t)(s.B * segments * s.N * s.D) * sizeof(float) : 0;
}

extern "C" size_t cuda_scan_forward_scratch(struct scan_shape s) {
    return sums_size(s) + 2 * carry_size(s);
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

enum { TILE = SCAN_TILE, GROUP = SCAN_GROUP, PAIRS = SCAN_PAIRS, STATES = SCAN_STATES };

/* How the threads of a block share a tile: a warp takes a token's pairs, EACH elements of b and of c a thread. */
enum { TOKENS = SCAN_WARPS, ROUNDS = TILE / TOKENS, EACH = TILE * GROUP / SCAN_THREADS };

struct forward_room {
    float4 flow[TILE][PAIRS]; /* delta and delta x of two channels */
    float y[TILE][SCAN_BLOCK];
    float b[TILE][GROUP], c[TILE][GROUP];
};

/* What a thread brings and takes away: where it lies for the current tile, and the numbers on their way from memory. */
template <class T, bool WIDE> struct forward_tile {
    scan_line<T> x_line, raw_line, z_line, b_line, c_line;
    scan_two<T> x[ROUNDS], raw[ROUNDS], z[ROUNDS];
    scan_some<T, EACH> b, c;
    scan_documents documents;

    __device__ __forceinline__ forward_tile(const scan_inputs<T> &in, const scan_pair &own, int64_t row, int64_t t,
                                            int n0) {
        int n = n0 + threadIdx.x * EACH % GROUP;
        x_line = in.x.line(row, t, own.there), raw_line = in.raw.line(row, t, own.there);
        z_line = in.z.line(row, t, own.there);
        b_line = in.b.line(row, t, n), c_line = in.c.line(row, t, n);
    }
    /* Send for the tile at t0, of which `left` tokens exist. */
    __device__ __forceinline__ void load(const scan_problem &p, const scan_pair &own, int64_t row, int64_t t0, int left,
                                         bool gated, int n0) {
        int e = threadIdx.x * EACH;
        load_pairs<WIDE, TOKENS>(x, x_line, own, left);
        load_pairs<WIDE, TOKENS>(raw, raw_line, own, left);
        if (gated) load_pairs<WIDE, TOKENS>(z, z_line, own, left);
        b = load_states<T, EACH>(b_line, p, e / GROUP, left, n0 + e % GROUP);
        c = load_states<T, EACH>(c_line, p, e / GROUP, left, n0 + e % GROUP);
        documents.load(p, row, t0);
    }
    __device__ __forceinline__ void move() {
        x_line.move(TILE), raw_line.move(TILE), z_line.move(TILE), b_line.move(TILE), c_line.move(TILE);
    }
};

/* Tokens that don't exist change nothing, those that start a document let nothing through: both are rare. */
__device__ __forceinline__ void mend_tile(forward_room &room, unsigned starts, int left) {
#pragma unroll 1
    for (int local = threadIdx.x / WARP; local < TILE; local += TOKENS) {
        float4 &flow = room.flow[local][threadIdx.x % WARP];
        if (starts >> local & 1) flow.x = flow.z = SCAN_START;
        if (local >= left) flow = make_float4(0, 0, 0, 0);
    }
}

template <class T, bool WIDE>
__device__ __forceinline__ void fill_room(forward_room &room, const forward_tile<T, WIDE> &tile, const scan_pair &own,
                                          float2 bias, int left) {
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        float2 x = tile.x[k].floats(), raw = tile.raw[k].floats();
        float first = softplus_of(raw.x + bias.x), second = softplus_of(raw.y + bias.y);
        room.flow[k * TOKENS + threadIdx.x / WARP][own.place] = make_float4(first, first * x.x, second, second * x.y);
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        int at = threadIdx.x * EACH + e;
        room.b[at / GROUP][at % GROUP] = tile.b[e];
        room.c[at / GROUP][at % GROUP] = tile.c[e];
    }
    unsigned starts = tile.documents.starts();
    if (starts || left < TILE) mend_tile(room, starts, left);
}

/* Four tokens at a time: what one of them stores would keep the reads of the next waiting. */
__device__ __forceinline__ void walk_tile(float (&h)[2][STATES], const float (&rate)[2][STATES], forward_room &room,
                                          const scan_place &at) {
    static_assert(TILE % 4 == 0, "tokens are walked in fours");
#pragma unroll 1
    for (int t0 = 0; t0 < TILE; t0 += 4) {
        float first[4] = {}, second[4] = {};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            float b[STATES], c[STATES];
            float4 flow = room.flow[t0 + t][at.local / 2];
            load_four(b, &room.b[t0 + t][at.n]);
            load_four(c, &room.c[t0 + t][at.n]);
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                h[0][n] = power_of_two(flow.x * rate[0][n]) * h[0][n] + flow.y * b[n];
                h[1][n] = power_of_two(flow.z * rate[1][n]) * h[1][n] + flow.w * b[n];
                first[t] += c[n] * h[0][n];
                second[t] += c[n] * h[1][n];
            }
        }
        const float even[4] = {first[0], first[2], second[0], second[2]};
        const float odd[4] = {first[1], first[3], second[1], second[3]};
        int t = t0 + 2 * (at.quarter & 1), channel = at.local + (at.quarter >> 1);
        room.y[t][channel] = sum_states(even, at.lane);
        room.y[t + 1][channel] = sum_states(odd, at.lane);
    }
}

/* Add the sums of the groups of states before, and keep them unless this group is the last. */
__device__ __forceinline__ void join_groups(float2 &y, float *sums, const scan_pair &own, bool first, bool last) {
    if (!first) {
        float2 before = pair_of_vector(sums, 0, own.count);
        y.x += before.x, y.y += before.y;
    }
    if (!last) store_pair<float, false>(sums, y.x, y.y, own.count);
}

/* g of a tile from its y. `sums` is NULL where all states are in one group. Where there is a gate as well, nothing is
 * asked of a token, and the tokens of a thread are worked on beside each other. */
template <class T, bool WIDE>
__device__ __forceinline__ void store_tile(const scan_line<T> &g, float *sums, const forward_room &room,
                                           const scan_two<T> (&xs)[ROUNDS], const scan_two<T> (&zs)[ROUNDS], bool gated,
                                           const scan_problem &p, const scan_pair &own, float2 skip, int left, int n0) {
    auto tokens = [&](auto plain) {
        constexpr bool PLAIN = plain.value;
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            int local = k * TOKENS + threadIdx.x / WARP, count = local < left ? own.count : 0;
            float2 y = *reinterpret_cast<const float2 *>(&room.y[local][2 * own.place]), x = xs[k].floats();
            if (!PLAIN && sums && count) {
                bool last = n0 + GROUP >= p.N;
                join_groups(y, sums + local * p.D, own, n0 == 0, last);
                if (!last) continue;
            }
            y.x += skip.x * x.x, y.y += skip.y * x.y;
            if (PLAIN || gated) {
                float2 z = zs[k].floats();
                y.x *= silu_of(z.x), y.y *= silu_of(z.y);
            }
            store_pair<T, WIDE>(g.at(local), y.x, y.y, count);
        }
    };
    if (gated && !sums) tokens(constant<1>());
    else tokens(constant<0>());
}

/* Segment blockIdx.y of batch row blockIdx.z, states n0 .. n0+GROUP-1. `entering` (B, segments, N, D): what
 * scan_carry.cu found; NULL when time is not cut. `sums` (B, T, D): y of the groups before. */
template <class T, bool WIDE>
__global__ void __launch_bounds__(SCAN_THREADS, 4)
scan_forward_kernel(scan_rows<T> g, float *final, float *saved, float *sums, const float *entering, scan_inputs<T> in,
                    scan_problem p, int n0) {
    __shared__ forward_room room;
    scan_place at;
    scan_pair own(p, WIDE);
    float2 bias = pair_of_vector(p.bias, own.i, own.count), skip = pair_of_vector(p.d, own.i, own.count);
    float rate[2][STATES], h[2][STATES] = {};
    load_rates(rate, p, at, n0);
    if (entering)
        load_pairs_of_states<WIDE>(h, entering + (at.row * p.segments + at.segment) * p.N * p.D, p, at, n0);
    else if (p.initial)
        each_state(p, at, n0, [&](int64_t n, int64_t i, int j, int k) {
            h[j][k] = p.initial[(at.row * p.D + i) * p.N + n];
        });
    int64_t first = at.segment * p.per_segment * SCAN_PIECE, end = first + p.per_segment * SCAN_PIECE;
    if (end > p.T) end = p.T;
    bool gated = in.z.data != NULL;
    forward_tile<T, WIDE> tile(in, own, at.row, first, n0);
    scan_line<T> to = g.line(at.row, first, own.i);
    if (sums) sums += (at.row * p.T + first) * p.D + own.i;
    tile.load(p, own, at.row, first, (int)at_most(end - first, TILE), gated, n0);
    for (int64_t t0 = first; t0 < end; t0 += TILE) {
        int left = (int)at_most(end - t0, TILE);
        scan_two<T> xs[ROUNDS], zs[ROUNDS]; /* of this tile, while the next is on its way */
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) xs[k] = tile.x[k], zs[k] = tile.z[k];
        fill_room(room, tile, own, bias, left);
        __syncthreads();
        tile.move();
        if (t0 + TILE < end) tile.load(p, own, at.row, t0 + TILE, (int)at_most(end - t0 - TILE, TILE), gated, n0);
        if (saved && t0 % SCAN_PIECE == 0) {
            float *piece = saved + (at.row * p.pieces + t0 / SCAN_PIECE) * p.N * p.D;
            store_pairs_of_states<WIDE>(piece, h, p, at, n0);
        }
        walk_tile(h, rate, room, at);
        __syncthreads();
        store_tile<T, WIDE>(to, sums, room, xs, zs, gated, p, own, skip, left, n0);
        to.move(TILE);
        if (sums) sums += TILE * p.D;
    }
    if (final && end == p.T)
        each_state(p, at, n0, [&](int64_t n, int64_t i, int j, int k) {
            final[(at.row * p.D + i) * p.N + n] = h[j][k];
        });
}

extern "C" void cuda_scan_forward(struct device *dev, tensor g, tensor final, void *saved, tensor x, tensor raw,
                                  tensor bias, tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial,
                                  tensor doc, void *scratch) {
    scan_problem p = scan_problem_of(g, x, raw, bias, A_log, b, c, d, z, initial, doc);
    struct scan_shape shape = {p.B, p.T, p.D, p.N};
    float *sums = p.N > GROUP ? (float *)scratch : NULL, *entering = NULL;
    if (p.segments > 1) {
        entering = (float *)((char *)scratch + sums_size(shape));
        cuda_scan_carry(dev, entering, (float *)((char *)entering + carry_size(shape)), x, raw, b, p);
    }
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        scan_inputs<T> in = {rows_of<T>(x), rows_of<T>(raw), rows_of<T>(b), rows_of<T>(c), rows_of<T>(z)};
        with_pairs(scan_pairs_fit(g, x, raw, z), [&](auto pairs) {
            constexpr bool WIDE = pairs.value;
            for (int n0 = 0; n0 < p.N; n0 += GROUP)
                LAUNCH(dev, (scan_forward_kernel<T, WIDE>), scan_grid(p), SCAN_THREADS, 0, rows_of<T>(g),
                       data_of<float>(final), (float *)saved, sums, entering, in, p, n0);
        });
    });
}

/* --- one token: a thread a channel -------------------------------------------------------------------------------- */

struct step_strides {
    int64_t g, x, raw, b, c, z;
};

template <class T>
__global__ void scan_step_kernel(T *g, float *state, const T *x, const T *raw, const float *bias, const float *A_log,
                                 const T *b, const T *c, const float *d, const T *z, int64_t D, int64_t N,
                                 step_strides s) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (i >= D) return;
    float in = to_float(x[row * s.x + i]), delta = softplus_of(to_float(raw[row * s.raw + i]) + bias[i]);
    float *h = state + (row * D + i) * N, y = d ? d[i] * in : 0;
    for (int64_t n = 0; n < N; n++) {
        h[n] = power_of_two(-LOG2E * delta * expf(A_log[i * N + n])) * h[n] + delta * in * to_float(b[row * s.b + n]);
        y += to_float(c[row * s.c + n]) * h[n];
    }
    if (z) y *= silu_of(to_float(z[row * s.z + i]));
    g[row * s.g + i] = from_float<T>(y);
}

extern "C" void cuda_scan_step(struct device *dev, tensor g, tensor state, tensor x, tensor raw, tensor bias,
                               tensor A_log, tensor b, tensor c, tensor d, tensor z) {
    int64_t B = x.dim[0], D = x.dim[1], N = b.dim[1];
    ASSERT(tensor_is(state, 3, B, D, N) && tensor_is(g, 2, B, D) && tensor_is(c, 2, B, N));
    step_strides s = {g.stride[0], x.stride[0], raw.stride[0], b.stride[0], c.stride[0], z.stride[0]};
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, scan_step_kernel<T>, dim3((unsigned)ceil_div(D, 128), (unsigned)B), 128, 0, data_of<T>(g),
               data_of<float>(state), data_of<T>(x), data_of<T>(raw), data_of<float>(bias), data_of<float>(A_log),
               data_of<T>(b), data_of<T>(c), data_of<float>(d), data_of<T>(z), D, N, s);
    });
}
