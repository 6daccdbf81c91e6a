/* scan_carry.cu: what enters the segments into which the selective scan cuts time when there are too few channels to
 * fill the chip; scan.cu has the equations, scan_backward.cu those of the other direction.
 *
 *   forward   h[t] = a[t] h[t-1] + delta[t] b[t] x[t]     back   k[t] = a[t] (k[t+1] + c[t] dy[t]),  dy = dg silu(z)
 *
 * Every segment is run from zero for what it adds to the state that leaves it; the entering state is let through with
 * the decay exp(A sum delta). A short pass then carries states over the segments. Both directions walk alike, as
 * forward does in scan.cu, without outputs: 4 instructions and one exponential for a token, channel and state, so
 * about 0.8 of forward's time, for all segments but the one that nothing follows.
 */
#include "kernels/cuda/scan.cuh"

enum { TILE = SCAN_TILE, GROUP = SCAN_GROUP, PAIRS = SCAN_PAIRS, STATES = SCAN_STATES };
enum { TOKENS = SCAN_WARPS, ROUNDS = TILE / TOKENS };
enum { EACH = TILE * GROUP / SCAN_THREADS }; /* elements of b or c that a thread brings */

template <class T> struct carry_inputs {
    scan_rows<T> in, raw, gate, b; /* in: x, or dg with its gate z */
};

struct carry_room {
    float4 flow[TILE][PAIRS]; /* delta, and delta x or dy, of two channels */
    float b[TILE][GROUP];
};

/* What a thread brings of the tile at t0, on its way from memory. */
template <class T, bool WIDE> struct carry_tile {
    scan_two<T> in[ROUNDS], raw[ROUNDS], gate[ROUNDS];
    scan_some<T, EACH> b;
    scan_documents documents;
    int left; /* tokens that exist */

    __device__ __forceinline__ void load(const carry_inputs<T> &from, const scan_problem &p, const scan_pair &own,
                                         int64_t row, int64_t t0, int n0) {
        int e = threadIdx.x * EACH, n = n0 + e % GROUP;
        left = (int)at_most(p.T - t0, TILE);
        load_pairs<WIDE, TOKENS>(in, from.in.line(row, t0, own.there), own, left);
        load_pairs<WIDE, TOKENS>(raw, from.raw.line(row, t0, own.there), own, left);
        if (from.gate.data) load_pairs<WIDE, TOKENS>(gate, from.gate.line(row, t0, own.there), own, left);
        b = load_states<T, EACH>(from.b.line(row, t0, n), p, e / GROUP, left, n);
        documents.load(p, row, t0);
    }
};

template <bool BACK, class T, bool WIDE>
__device__ __forceinline__ void fill_room(carry_room &room, const carry_tile<T, WIDE> &tile, bool gated, float2 bias) {
    unsigned starts = tile.documents.starts();
#pragma unroll
    for (int k = 0; k < ROUNDS; k++) {
        int local = k * TOKENS + threadIdx.x / WARP;
        float2 v = tile.in[k].floats(), raw = tile.raw[k].floats();
        float4 flow = make_float4(softplus_of(raw.x + bias.x), v.x, softplus_of(raw.y + bias.y), v.y);
        if (!BACK) flow.y *= flow.x, flow.w *= flow.z;
        if (BACK && gated) {
            float2 z = tile.gate[k].floats();
            flow.y *= silu_of(z.x), flow.w *= silu_of(z.y);
        }
        if (starts >> local & 1) flow.x = flow.z = SCAN_START;
        if (local >= tile.left) flow = make_float4(0, 0, 0, 0);
        room.flow[local][threadIdx.x % WARP] = flow;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++)
        room.b[threadIdx.x * EACH / GROUP][threadIdx.x * EACH % GROUP + e] = tile.b[e];
}

/* Segment blockIdx.y of batch row blockIdx.z, states n0 .. n0+GROUP-1. BACK: from the right. */
template <class T, bool WIDE, bool BACK>
__global__ void __launch_bounds__(SCAN_THREADS, 4)
scan_totals_kernel(float *adds, float *decays, carry_inputs<T> in, scan_problem p, int n0) {
    __shared__ carry_room room;
    scan_place at;
    if (at.segment == (BACK ? 0 : p.segments - 1)) return; /* nothing follows */
    float rate[2][STATES], h[2][STATES] = {}, total[2] = {};
    scan_pair own(p, WIDE);
    float2 bias = pair_of_vector(p.bias, own.i, own.count);
    load_rates(rate, p, at, n0);
    int64_t first = at.segment * p.per_segment * SCAN_PIECE, end = first + p.per_segment * SCAN_PIECE;
    int64_t tiles = ((end < p.T ? end : p.T) - first + TILE - 1) / TILE;
    carry_tile<T, WIDE> tile;
    tile.load(in, p, own, at.row, first + (BACK ? tiles - 1 : 0) * TILE, n0);
    for (int64_t k = 0; k < tiles; k++) {
        int64_t place = BACK ? tiles - 1 - k : k;
        fill_room<BACK>(room, tile, in.gate.data != NULL, bias);
        __syncthreads();
        if (k + 1 < tiles) tile.load(in, p, own, at.row, first + (BACK ? place - 1 : place + 1) * TILE, n0);
#pragma unroll 4
        for (int s = 0; s < TILE; s++) {
            int t = BACK ? TILE - 1 - s : s;
            float b[STATES];
            float4 flow = room.flow[t][at.local / 2];
            load_four(b, &room.b[t][at.n]);
            total[0] += flow.x, total[1] += flow.z;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                float a0 = power_of_two(flow.x * rate[0][n]), a1 = power_of_two(flow.z * rate[1][n]);
                h[0][n] = BACK ? a0 * (h[0][n] + flow.y * b[n]) : a0 * h[0][n] + flow.y * b[n];
                h[1][n] = BACK ? a1 * (h[1][n] + flow.w * b[n]) : a1 * h[1][n] + flow.w * b[n];
            }
        }
        __syncthreads();
    }
    int64_t base = (at.row * p.segments + at.segment) * p.N * p.D;
    each_state(p, at, n0, [&](int64_t n, int64_t i, int j, int k) {
        adds[base + n * p.D + i] = h[j][k];
        decays[base + n * p.D + i] = power_of_two(total[j] * rate[j][k]);
    });
}

/* From what the segments add to what enters them, in place of the sums; a thread a channel and state. `outer` is
 * (B, D, N): the state that enters the first segment, or NULL. */
__global__ void scan_carry_kernel(float *adds, const float *decays, const float *outer, scan_problem p, bool back) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y, row = blockIdx.z;
    if (i >= p.D) return;
    float h = outer ? outer[(row * p.D + i) * p.N + n] : 0;
    for (int64_t k = 0; k < p.segments; k++) {
        int64_t segment = back ? p.segments - 1 - k : k, at = ((row * p.segments + segment) * p.N + n) * p.D + i;
        float add = 0, decay = 0;
        if (k + 1 < p.segments) add = adds[at], decay = decays[at];
        adds[at] = h;
        h = decay * h + add;
    }
}

template <bool BACK>
static void find_carries(struct device *dev, float *entering, float *decays, tensor in, const float *outer, tensor raw,
                         tensor b, tensor z, const scan_problem &p) {
    with_type(in.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        carry_inputs<T> inputs = {rows_of<T>(in), rows_of<T>(raw), rows_of<T>(z), rows_of<T>(b)};
        with_pairs(scan_pairs_fit(in, raw, z, z), [&](auto pairs) {
            constexpr bool WIDE = pairs.value;
            for (int n0 = 0; n0 < p.N; n0 += GROUP)
                LAUNCH(dev, (scan_totals_kernel<T, WIDE, BACK>), scan_grid(p), SCAN_THREADS, 0, entering, decays,
                       inputs, p, n0);
        });
    });
    LAUNCH(dev, scan_carry_kernel, dim3((unsigned)ceil_div(p.D, 128), (unsigned)p.N, (unsigned)p.B), 128, 0, entering,
           decays, outer, p, BACK);
}

void cuda_scan_carry(struct device *dev, float *entering, float *decays, tensor x, tensor raw, tensor b,
                     const scan_problem &p) {
    find_carries<false>(dev, entering, decays, x, p.initial, raw, b, tensor_none(), p);
}

void cuda_scan_carry_back(struct device *dev, float *entering, float *decays, tensor dg, tensor dfinal, tensor raw,
                          tensor c, tensor z, const scan_problem &p) {
    find_carries<true>(dev, entering, decays, dg, data_of<float>(dfinal), raw, c, z, p);
}
