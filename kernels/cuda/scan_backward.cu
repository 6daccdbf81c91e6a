/* scan_backward.cu: backward of the selective scan; scan.cu has the equations.
 *
 *   dy = dg silu(z);  dz = dg y silu'(z);  dh[t] = c[t] dy[t] + a[t+1] dh[t+1],  a = exp(delta A), 0 where a document
 *   starts;  s = sum_n dh b;  e = sum_n dh A (a h[t-1]);  dx = d dy + delta s;  draw = (x s + e) softplus'(v)
 *   db = sum_i dh delta x;  dc = sum_i dy h;  dA_log = A sum dh delta (a h[t-1]);  dd = sum dy x;  dbias = sum draw
 *
 * Pieces of PIECE tokens are walked from the last. A block has CHANNELS channels, four lanes a channel, four states a
 * lane. A piece's x, delta, dy and dg silu'(z) are put into shared memory as floats, dx, draw and dz take their places and
 * go out in whole rows. The states come back in two steps: from the piece's saved entering state to those that enter
 * each SUB tokens (kept in shared memory), and from these to the SUB states of one run, in registers with their a.
 * Sums over states are shuffles between four lanes. Sums over channels, for db and dc: seven shuffles turn eight
 * channels' eight values into one value a lane, the block's warps are added in shared memory, and each block writes
 * 2 x 16 floats a token, which scan_channels_kernel adds in order. dA_log, dd and dbias stay in registers over the walk
 * and leave one row for each batch row and segment. So nothing is atomic, and nothing is added in a changing order.
 * Time is cut in segments as in forward: a first pass finds what comes in from the right.
 *
 * Account, B 8, T 2048, D 4096, N 16, bf16: 1.9 x 1.07e9 exponentials 0.55 ms, about 24 instructions for a token,
 * channel and state 0.9 ms, 1.3 GB 0.3 ms; expected 1.2 to 1.5 ms.
 */
#include "kernels/cuda/scan.cuh"

enum {
    THREADS = 256,
    STATES = 4,                      /* of a lane */
    CHANNELS = THREADS / STATES,     /* of a block */
    PIECE = SCAN_PIECE,
    GROUP = SCAN_GROUP,
    SUB = 8,
    SUBS = PIECE / SUB,
    WARPS = THREADS / WARP,
};

struct piece_room {
    float x[PIECE][CHANNELS], delta[PIECE][CHANNELS], dy[PIECE][CHANNELS], dz[PIECE][CHANNELS];
    float b[PIECE][GROUP], c[PIECE][GROUP];
    float entering[SUBS][THREADS][STATES];
    float channels[WARPS][SUB][WARP]; /* sums over a warp's channels: [token][value] */
    bool starts[PIECE];
};

/* Everything backward writes, and what only it reads. Strides as in the problem; NULL where absent. */
template <class T> struct scan_gradients {
    T *dx, *draw, *dz;
    int64_t dx_row, dx_step, draw_row, draw_step, dz_row, dz_step;
    const T *dg;
    float *dinitial;
    const float *dfinal, *saved, *carries; /* carries (B, segments, N, D): what comes in from the right; NULL uncut */
    float *of_channels;                    /* (B, T, blocks, 2 GROUP) */
    float *dA_log, *dd, *dbias;            /* partial rows, one for each batch row and segment; dd may be NULL */
    float *sums;                           /* (3, B, T, D): s, e and y of the groups before; for N > GROUP */
};

/* Fill the room for the piece at t0. Tokens beyond the row are delta = 0 and zeros: they change nothing. */
template <class T>
__device__ void load_piece(piece_room &room, const scan_problem &p, const scan_gradients<T> &d, const T *x, const T *raw,
                           const T *b, const T *c, const T *z, int64_t row, int64_t t0, int n0) {
    int64_t first = (int64_t)blockIdx.x * CHANNELS;
    for (int k = threadIdx.x; k < PIECE * CHANNELS; k += THREADS) {
        int t = k / CHANNELS, local = k % CHANNELS;
        int64_t now = t0 + t, i = first + local;
        float in = 0, delta = 0, dy = 0, dz = 0;
        if (now < p.T && i < p.D) {
            in = to_float(x[row * p.x_row + now * p.x_step + i]);
            delta = softplus_of(to_float(raw[row * p.raw_row + now * p.raw_step + i]) + p.bias[i]);
            dy = to_float(d.dg[row * p.g_row + now * p.g_step + i]);
            if (z) {
                float gate = to_float(z[row * p.z_row + now * p.z_step + i]);
                dz = dy * silu_slope(gate);
                dy *= silu_of(gate);
            }
        }
        room.x[t][local] = in;
        room.delta[t][local] = delta;
        room.dy[t][local] = dy;
        room.dz[t][local] = dz;
    }
    for (int k = threadIdx.x; k < PIECE * GROUP; k += THREADS) {
        int t = k / GROUP, n = n0 + k % GROUP;
        int64_t now = t0 + t;
        bool there = now < p.T && n < p.N;
        room.b[t][k % GROUP] = there ? to_float(b[row * p.b_row + now * p.b_step + n]) : 0;
        room.c[t][k % GROUP] = there ? to_float(c[row * p.c_row + now * p.c_step + n]) : 0;
    }
    for (int t = threadIdx.x; t < PIECE; t += THREADS) room.starts[t] = scan_starts(p, row, t0 + t);
}

__device__ __forceinline__ void load_states(float (&out)[STATES], const float *from) {
    float4 v = *reinterpret_cast<const float4 *>(from);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

/* h of the next token from that of the one before; `decay` receives a. */
__device__ __forceinline__ void advance(float (&next)[STATES], float (&decay)[STATES], const float (&h)[STATES],
                                        const float (&rate)[STATES], const piece_room &room, int t, int local, int q) {
    float b[STATES], delta = room.delta[t][local], inflow = delta * room.x[t][local];
    bool start = room.starts[t];
    load_states(b, &room.b[t][q * STATES]);
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        decay[k] = start ? 0.0f : power_of_two(delta * rate[k]);
        next[k] = decay[k] * h[k] + inflow * b[k];
    }
}

/* The sum over the four lanes of a channel, in all of them. */
__device__ __forceinline__ float channel_sum(float v) {
    v += __shfl_xor_sync(FULL, v, 8);
    return v + __shfl_xor_sync(FULL, v, 16);
}

/* Of eight values in each of eight neighbouring lanes: lane j receives the sum of value j over the lanes. */
__device__ __forceinline__ float transpose_sum(const float (&v)[8], int lane) {
    float four[4], two[2];
    bool upper = lane & 4;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float kept = upper ? v[4 + j] : v[j], given = upper ? v[j] : v[4 + j];
        four[j] = kept + __shfl_xor_sync(FULL, given, 4);
    }
    upper = lane & 2;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float kept = upper ? four[2 + j] : four[j], given = upper ? four[j] : four[2 + j];
        two[j] = kept + __shfl_xor_sync(FULL, given, 2);
    }
    upper = lane & 1;
    float kept = upper ? two[1] : two[0], given = upper ? two[0] : two[1];
    return kept + __shfl_xor_sync(FULL, given, 1);
}

/* What a lane carries over the walk. */
struct walk {
    float rate[STATES];  /* A log2(e) */
    float carry[STATES]; /* a[t+1] dh[t+1] */
    float dA[STATES];    /* sum dh delta (a h) */
    float dd, dbias, skip;
};

/* One token: from its dh on. Overwrites the token's places in the room by dx, draw and dz. */
template <class T>
__device__ __forceinline__ void token_backward(walk &w, piece_room &room, const scan_problem &p,
                                               const scan_gradients<T> &d, const float (&before)[STATES],
                                               const float (&h)[STATES], const float (&decay)[STATES], int64_t row,
                                               int64_t t0, int t, int local, int q, int n0) {
    int lane = threadIdx.x % WARP;
    int64_t now = t0 + t, i = (int64_t)blockIdx.x * CHANNELS + local;
    float x = room.x[t][local], delta = room.delta[t][local], dy = room.dy[t][local];
    float b[STATES], c[STATES], values[8], s = 0, e = 0, y = 0;
    load_states(b, &room.b[t][q * STATES]);
    load_states(c, &room.c[t][q * STATES]);
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        float dh = c[k] * dy + w.carry[k], kept = decay[k] * before[k], through = dh * kept;
        values[k] = dh * delta * x;
        values[4 + k] = dy * h[k];
        s += dh * b[k];
        e += through * w.rate[k];
        y += c[k] * h[k];
        w.dA[k] += through * delta;
        w.carry[k] = decay[k] * dh;
    }
    room.channels[threadIdx.x / WARP][t % SUB][lane] = transpose_sum(values, lane);
    s = channel_sum(s), e = channel_sum(e), y = channel_sum(y);
    bool there = now < p.T && i < p.D;
    int64_t at = (row * p.T + now) * p.D + i, plane = p.B * p.T * p.D;
    if (d.sums && there && n0 > 0) s += d.sums[at], e += d.sums[plane + at], y += d.sums[2 * plane + at];
    if (n0 + GROUP < p.N) {
        if (there && q == 0) d.sums[at] = s, d.sums[plane + at] = e, d.sums[2 * plane + at] = y;
        return;
    }
    float draw = (x * s + e * (1.0f / LOG2E)) * -expm1f(-delta); /* softplus'(v) = 1 - exp(-softplus(v)) */
    w.dd += dy * x;
    w.dbias += draw;
    __syncwarp();
    if (q == 0) {
        room.x[t][local] = w.skip * dy + delta * s;
        room.delta[t][local] = draw;
        room.dz[t][local] *= y + w.skip * x;
    }
    __syncwarp();
}

/* The block's sums over its channels for SUB tokens; thread (token, value). */
template <class T>
__device__ void store_channels(const piece_room &room, const scan_problem &p, const scan_gradients<T> &d, int64_t row,
                               int64_t from) {
    int t = threadIdx.x / WARP, value = threadIdx.x % WARP;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += room.channels[w][t][value];
    if (from + t < p.T) d.of_channels[((row * p.T + from + t) * gridDim.x + blockIdx.x) * 2 * GROUP + value] = sum;
}

template <class T>
__device__ void store_piece(const piece_room &room, const scan_problem &p, const scan_gradients<T> &d, int64_t row,
                            int64_t t0) {
    for (int k = threadIdx.x; k < PIECE * CHANNELS; k += THREADS) {
        int t = k / CHANNELS, local = k % CHANNELS;
        int64_t now = t0 + t, i = (int64_t)blockIdx.x * CHANNELS + local;
        if (now >= p.T || i >= p.D) continue;
        d.dx[row * d.dx_row + now * d.dx_step + i] = from_float<T>(room.x[t][local]);
        d.draw[row * d.draw_row + now * d.draw_step + i] = from_float<T>(room.delta[t][local]);
        if (d.dz) d.dz[row * d.dz_row + now * d.dz_step + i] = from_float<T>(room.dz[t][local]);
    }
}

/* Segment blockIdx.y of batch row blockIdx.z, CHANNELS channels, states n0 .. n0+GROUP-1. */
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
scan_backward_kernel(scan_gradients<T> d, const T *x, const T *raw, const T *b, const T *c, const T *z, scan_problem p,
                     int n0) {
    DYNAMIC_SHARED(char, memory);
    piece_room &room = *reinterpret_cast<piece_room *>(memory);
    int lane = threadIdx.x % WARP, q = lane / 8, local = threadIdx.x / WARP * 8 + lane % 8;
    int64_t row = blockIdx.z, segment = blockIdx.y, i = (int64_t)blockIdx.x * CHANNELS + local;
    int64_t first = segment * p.per_segment, last = first + p.per_segment < p.pieces ? first + p.per_segment : p.pieces;
    walk w = {};
    bool inside = i < p.D;
    w.skip = inside && p.d ? p.d[i] : 0;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        int64_t n = n0 + q * STATES + k;
        if (!inside || n >= p.N) continue;
        w.rate[k] = -LOG2E * expf(p.A_log[i * p.N + n]);
        if (d.carries) w.carry[k] = d.carries[((row * p.segments + segment) * p.N + n) * p.D + i];
        else if (d.dfinal) w.carry[k] = d.dfinal[(row * p.D + i) * p.N + n];
    }
    for (int64_t piece = last - 1; piece >= first; piece--) {
        int64_t t0 = piece * PIECE;
        float h[SUB + 1][STATES], decay[SUB][STATES];
        load_piece(room, p, d, x, raw, b, c, z, row, t0, n0);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STATES; k++) {
            int64_t n = n0 + q * STATES + k;
            h[0][k] = inside && n < p.N ? d.saved[((row * p.pieces + piece) * p.N + n) * p.D + i] : 0;
        }
        for (int sub = 0; sub < SUBS; sub++) {
#pragma unroll
            for (int k = 0; k < STATES; k++) room.entering[sub][threadIdx.x][k] = h[0][k];
            if (sub + 1 == SUBS) break;
#pragma unroll
            for (int t = 0; t < SUB; t++) advance(h[0], decay[0], h[0], w.rate, room, sub * SUB + t, local, q);
        }
        for (int sub = SUBS - 1; sub >= 0; sub--) {
            load_states(h[0], room.entering[sub][threadIdx.x]);
#pragma unroll
            for (int t = 0; t < SUB; t++) advance(h[t + 1], decay[t], h[t], w.rate, room, sub * SUB + t, local, q);
#pragma unroll
            for (int t = SUB - 1; t >= 0; t--)
                token_backward(w, room, p, d, h[t], h[t + 1], decay[t], row, t0, sub * SUB + t, local, q, n0);
            __syncthreads();
            store_channels(room, p, d, row, t0 + sub * SUB);
            __syncthreads();
        }
        if (n0 + GROUP >= p.N) store_piece(room, p, d, row, t0);
        __syncthreads();
    }
    if (!inside) return;
    int64_t part = row * p.segments + segment;
#pragma unroll
    for (int k = 0; k < STATES; k++) {
        int64_t n = n0 + q * STATES + k;
        if (n >= p.N) continue;
        d.dA_log[(part * p.D + i) * p.N + n] = w.dA[k] * w.rate[k] * (1.0f / LOG2E);
        if (d.dinitial && segment == 0) d.dinitial[(row * p.D + i) * p.N + n] = w.carry[k];
    }
    if (q != 0 || n0 + GROUP < p.N) return;
    d.dbias[part * p.D + i] = w.dbias;
    if (d.dd) d.dd[part * p.D + i] = w.dd;
}

/* What a segment adds to the carry that leaves it to the left, and by how much it lets the one from the right decay;
 * a thread a channel, all states of the group. */
template <class T>
__global__ void __launch_bounds__(128)
scan_totals_kernel(float *adds, float *decays, const T *dg, const T *raw, const T *c, const T *z, scan_problem p,
                   int n0) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, segment = blockIdx.y, row = blockIdx.z;
    if (i >= p.D) return;
    float rate[GROUP], carry[GROUP] = {}, bias = p.bias[i], total = 0;
    bool reset = false;
#pragma unroll
    for (int n = 0; n < GROUP; n++) rate[n] = n0 + n < p.N ? -LOG2E * expf(p.A_log[i * p.N + n0 + n]) : 0;
    int64_t first = segment * p.per_segment * PIECE, end = first + p.per_segment * PIECE;
    for (int64_t t = (end < p.T ? end : p.T) - 1; t >= first; t--) {
        float dy = to_float(dg[row * p.g_row + t * p.g_step + i]);
        if (z) dy *= silu_of(to_float(z[row * p.z_row + t * p.z_step + i]));
        float delta = softplus_of(to_float(raw[row * p.raw_row + t * p.raw_step + i]) + bias);
        bool start = scan_starts(p, row, t);
        total += delta;
        reset = reset || start;
#pragma unroll
        for (int n = 0; n < GROUP; n++) {
            float weight = n0 + n < p.N ? to_float(c[row * p.c_row + t * p.c_step + n0 + n]) : 0;
            carry[n] = start ? 0 : power_of_two(delta * rate[n]) * (weight * dy + carry[n]);
        }
    }
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
        if (n0 + n >= p.N) continue;
        int64_t at = ((row * p.segments + segment) * p.N + n0 + n) * p.D + i;
        adds[at] = carry[n];
        decays[at] = reset ? 0 : power_of_two(total * rate[n]);
    }
}

/* From what the segments add to what comes in from the right of each, in place of the sums. */
__global__ void scan_carry_back_kernel(float *adds, const float *decays, const float *dfinal, scan_problem p) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y, row = blockIdx.z;
    if (i >= p.D) return;
    float carry = dfinal ? dfinal[(row * p.D + i) * p.N + n] : 0;
    for (int64_t segment = p.segments - 1; segment >= 0; segment--) {
        int64_t at = ((row * p.segments + segment) * p.N + n) * p.D + i;
        float add = adds[at], decay = decays[at];
        adds[at] = carry;
        carry = decay * carry + add;
    }
}

/* db and dc of the group's states: the blocks' sums, in order. A thread a token and value. */
template <class T>
__global__ void scan_channels_kernel(T *db, int64_t db_row, int64_t db_step, T *dc, int64_t dc_row, int64_t dc_step,
                                     const float *of_channels, int64_t blocks, scan_problem p, int n0) {
    int64_t token = (int64_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, row = token / p.T, t = token % p.T;
    int value = threadIdx.x % WARP, n = n0 + value / 8 * STATES + value % 4;
    if (token >= p.B * p.T) return;
    float sum = 0;
    for (int64_t k = 0; k < blocks; k++) sum += of_channels[(token * blocks + k) * 2 * GROUP + value];
    if (n >= p.N) return;
    if (value % 8 < 4) db[row * db_row + t * db_step + n] = from_float<T>(sum);
    else dc[row * dc_row + t * dc_step + n] = from_float<T>(sum);
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

/* Scratch in floats: sums over channels; partial rows of dA_log, dd and dbias; carries and decays of segments; s, e, y. */
struct scan_scratch {
    int64_t blocks, segments, channels, dA_log, vector, carry, sums, total;
};

static scan_scratch scratch_of(struct scan_shape s) {
    scan_scratch r = {};
    r.blocks = ceil_div(s.D, CHANNELS);
    r.segments = ceil_div(scan_pieces(s), scan_pieces_per_segment(s));
    r.channels = s.B * s.T * r.blocks * 2 * GROUP;
    r.dA_log = s.B * r.segments * s.D * s.N;
    r.vector = s.B * r.segments * s.D;
    r.carry = r.segments > 1 ? r.dA_log : 0;
    r.sums = s.N > GROUP ? 3 * s.B * s.T * s.D : 0;
    r.total = r.channels + r.dA_log + 2 * r.vector + 2 * r.carry + r.sums;
    return r;
}

extern "C" size_t cuda_scan_backward_scratch(struct scan_shape s) {
    return (size_t)scratch_of(s).total * sizeof(float);
}

template <class T>
static void find_carries(struct device *dev, float *adds, float *decays, tensor dg, tensor dfinal, tensor raw, tensor c,
                         tensor z, const scan_problem &p) {
    dim3 grid((unsigned)ceil_div(p.D, 128), (unsigned)p.segments, (unsigned)p.B);
    for (int n0 = 0; n0 < p.N; n0 += GROUP)
        LAUNCH(dev, scan_totals_kernel<T>, grid, 128, 0, adds, decays, data_of<T>(dg), data_of<T>(raw), data_of<T>(c),
               data_of<T>(z), p, n0);
    grid.y = (unsigned)p.N;
    LAUNCH(dev, scan_carry_back_kernel, grid, 128, 0, adds, decays, data_of<float>(dfinal), p);
}

extern "C" void cuda_scan_backward(struct device *dev, tensor dx, tensor draw, tensor db, tensor dc, tensor dz,
                                   tensor dinitial, tensor dbias, tensor dA_log, tensor dd, tensor dg, tensor dfinal,
                                   const void *saved, tensor x, tensor raw, tensor bias, tensor A_log, tensor b,
                                   tensor c, tensor d, tensor z, tensor initial, tensor doc, void *scratch) {
    scan_problem p = scan_problem_of(dg, x, raw, bias, A_log, b, c, d, z, initial, doc);
    scan_scratch size = scratch_of({p.B, p.T, p.D, p.N});
    float *channels = (float *)scratch, *of_A = channels + size.channels, *of_d = of_A + size.dA_log;
    float *of_bias = of_d + size.vector, *adds = of_bias + size.vector, *decays = adds + size.carry;
    float *sums = decays + size.carry;
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        scan_gradients<T> g = {};
        g.dx = data_of<T>(dx), g.draw = data_of<T>(draw), g.dz = data_of<T>(dz), g.dg = data_of<T>(dg);
        g.dx_row = dx.stride[0], g.dx_step = dx.stride[1], g.draw_row = draw.stride[0], g.draw_step = draw.stride[1];
        g.dz_row = dz.stride[0], g.dz_step = dz.stride[1];
        g.dinitial = data_of<float>(dinitial), g.dfinal = data_of<float>(dfinal), g.saved = (const float *)saved;
        g.carries = p.segments > 1 ? adds : NULL;
        g.of_channels = channels, g.dA_log = of_A, g.dbias = of_bias;
        g.dd = tensor_given(dd) ? of_d : NULL;
        g.sums = p.N > GROUP ? sums : NULL;
        if (p.segments > 1) find_carries<T>(dev, adds, decays, dg, dfinal, raw, c, z, p);
        cuda_expect(dev, cudaFuncSetAttribute(scan_backward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)sizeof(piece_room)), "scan_backward");
        dim3 grid((unsigned)size.blocks, (unsigned)p.segments, (unsigned)p.B);
        for (int n0 = 0; n0 < p.N; n0 += GROUP) {
            LAUNCH(dev, scan_backward_kernel<T>, grid, THREADS, sizeof(piece_room), g, data_of<T>(x), data_of<T>(raw),
                   data_of<T>(b), data_of<T>(c), data_of<T>(z), p, n0);
            LAUNCH(dev, scan_channels_kernel<T>, (unsigned)ceil_div(p.B * p.T, 8), 8 * WARP, 0, data_of<T>(db),
                   db.stride[0], db.stride[1], data_of<T>(dc), dc.stride[0], dc.stride[1], channels, size.blocks, p,
                   n0);
        }
    });
    int64_t parts = p.B * p.segments;
    cuda_add_partials(dev, data_of<float>(dA_log), of_A, parts, p.D * p.N);
    cuda_add_partials(dev, data_of<float>(dbias), of_bias, parts, p.D);
    if (tensor_given(dd)) cuda_add_partials(dev, data_of<float>(dd), of_d, parts, p.D);
}
