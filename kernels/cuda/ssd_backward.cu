/* ssd_backward.cu: backward of SSD on the GPU; ssd.cu has the recurrence and how a block holds a state.
 *
 *   dS[t] = dy[t] (outer) c[t] + exp(a[t+1]) dS[t+1]
 *   dx = dt dS b + d dy;   db = dt dS^T x;   dc = S^T dy;   ddt = x^T dS b;   da = <dS[t], exp(a[t]) S[t-1]>
 *
 * Two walks, each as in forward with a state in registers:
 *   from the left    S again, from the saved entering states, all pieces at once: dc of every head, and v = c . dc, which
 *                    is <dy, S c>
 *   from the right   dS: dx, db of every head, w = ddt, and dd; at the start of every piece also da itself, the product
 *                    of dS with the saved state that enters the piece
 * S and dS are never there together inside a piece. There da follows from <dS[t], S[t]> counted in two ways,
 *   da[t] = da[t+1] + v[t] - dt[t] w[t]
 * which adds roundings only over a piece, because each piece starts from the exact product of the next one. A document's
 * first token has da = 0, and so has what comes from behind it.
 *
 * db and dc of the heads of a group are written for each head (and block of its rows) and added in order. dd, a sum over
 * tokens, is added over a block's walk and then over the blocks.
 *
 * Account, B 8, T 2048, H 64, P 64, N 128: 110 + 150 instructions a warp and token, 2.3 ms; db and dc of heads 1.1 GB
 * written and read, 0.5 ms.
 */
#include "kernels/cuda/ssd_chunk.cuh"

/* Scratch in floats. */
struct backward_scratch {
    int64_t db, dc; /* (B, T, H blocks, N) each */
    int64_t v, w;   /* (B, T, H, blocks) each */
    int64_t exact;  /* (B, pieces, H, blocks): da of a piece's first token; then (B, H, blocks): <dfinal, final> */
    int64_t dd;     /* (B segments, H blocks) */
    int64_t adds, decays, sums, total;
};

static backward_scratch scratch_of(struct ssd_shape s) {
    backward_scratch r = {};
    int64_t blocks = ceil_div(s.P, SSD_HEAD), segments = ssd_segments(s);
    r.db = r.dc = s.B * s.T * s.H * blocks * s.N;
    r.v = r.w = s.B * s.T * s.H * blocks;
    r.exact = s.B * (ssd_pieces(s) + 1) * s.H * blocks;
    r.dd = s.B * segments * s.H * blocks;
    r.adds = segments > 1 ? s.B * segments * s.H * s.P * s.N : 0;
    r.decays = s.B * segments * s.H;
    r.sums = s.N > SSD_STATES_MAX ? s.B * s.T * s.H * s.P : 0;
    r.total = r.db + r.dc + r.v + r.w + r.exact + r.dd + r.adds + r.decays + r.sums;
    return r;
}

extern "C" size_t cuda_ssd_backward_scratch_f32(struct ssd_shape s) {
    return (size_t)scratch_of(s).total * sizeof(float);
}

extern "C" size_t cuda_ssd_backward_scratch_bf16(struct ssd_shape s) {
    return ssd_in_chunks(DTYPE_BF16, s) ? ssd_chunk_backward_scratch(s) : cuda_ssd_backward_scratch_f32(s);
}

struct backward_memory {
    float *db, *dc, *v, *w, *exact, *dd, *adds, *decays, *sums, *dinitial;
    const float *saved, *dfinal, *carries; /* carries: what comes in from the right of each segment; NULL uncut */
};

enum { TOKENS = 8 }; /* whose sums over rows are in shared memory at a time */

template <int NK> struct backward_room {
    enum { STAGE = NK > 4 ? (int)TOKENS : (int)SSD_STAGE }; /* tokens: not all chips give a block more than 99 KB */
    ssd_stage<NK, STAGE> stage;
    float rows[TOKENS][SSD_WARPS][NK * WARP]; /* sums over a warp's rows */
    float scalar[TOKENS][SSD_WARPS];
};

/* Add the warps' sums for TOKENS tokens: `to` (B,T,H blocks,N) receives them times dt if `scaled`, and `product`
 * (B,T,H,blocks) their product with the stage's b or c, which is added to what groups of columns before gave. A warp a
 * token. Call between barriers. */
template <int NK>
__device__ void store_rows(backward_room<NK> &room, const ssd_problem &p, const ssd_place &at, int n0, int64_t t0,
                           int from, float *to, float *product, const float (*with)[NK * WARP], bool scaled) {
    int t = at.warp;
    int64_t now = t0 + from + t, of_token = (at.row * p.T + now) * p.H * p.blocks + blockIdx.x;
    float dot = 0, scale = scaled ? room.stage.dt[from + t] : 1.0f;
#pragma unroll
    for (int k = 0; k < NK; k++) {
        int j = at.lane + WARP * k;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < SSD_WARPS; w++) sum += room.rows[t][w][j];
        dot += sum * with[from + t][j];
        if (now < p.T && n0 + j < p.N) to[of_token * p.N + n0 + j] = scale * sum;
    }
    dot = warp_sum(dot);
    if (at.lane == 0 && now < p.T) product[of_token] = dot + (n0 > 0 ? product[of_token] : 0);
}

/* The product of two states, one of them in memory, added over the block into *to. */
template <int NK>
__device__ void store_product(backward_room<NK> &room, const ssd_part<NK> &part, const ssd_problem &p,
                            const ssd_place &at, int n0, const float *state, float *to) {
    ssd_part<NK> other;
    other.load(p, at, n0, state);
    float sum = 0;
#pragma unroll
    for (int r = 0; r < SSD_ROWS; r++)
#pragma unroll
        for (int k = 0; k < NK; k++) sum += part.s[r][k] * other.s[r][k];
    sum = warp_sum(sum);
    __syncthreads();
    if (at.lane == 0) room.scalar[0][at.warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    sum = n0 > 0 ? *to : 0;
    for (int w = 0; w < SSD_WARPS; w++) sum += room.scalar[0][w];
    *to = sum;
}

/* From the left: block (head and rows, piece, batch row). */
template <class T, int NK>
__global__ void __launch_bounds__(SSD_WARPS *WARP)
ssd_left_kernel(backward_memory m, const T *dy, const T *x, const T *b, const T *c, ssd_problem p, int n0) {
    DYNAMIC_SHARED(char, memory);
    backward_room<NK> &room = *reinterpret_cast<backward_room<NK> *>(memory);
    enum { STAGE = backward_room<NK>::STAGE };
    ssd_place at = ssd_place_of(p);
    ssd_part<NK> state;
    int64_t piece = blockIdx.y, end = (piece + 1) * SSD_PIECE;
    state.load(p, at, n0, m.saved + ((at.row * p.pieces + piece) * p.H + at.head) * p.P * p.N);
    for (int64_t t0 = piece * SSD_PIECE; t0 < end && t0 < p.T; t0 += STAGE) {
        __syncthreads();
        ssd_fill<T>(room.stage, p, at, n0, t0, x, dy, b, c);
        __syncthreads();
        for (int from = 0; from < STAGE; from += TOKENS) {
            for (int t = from; t < from + TOKENS; t++) {
                float keep = room.stage.decay[t], dt = room.stage.dt[t], sums[NK] = {};
#pragma unroll
                for (int r = 0; r < SSD_ROWS; r++) {
                    float inflow = dt * room.stage.x[t][at.warp * SSD_ROWS + r];
                    float out = room.stage.dy[t][at.warp * SSD_ROWS + r];
#pragma unroll
                    for (int k = 0; k < NK; k++) {
                        state.s[r][k] = keep * state.s[r][k] + inflow * room.stage.b[t][at.lane + WARP * k];
                        sums[k] += out * state.s[r][k];
                    }
                }
#pragma unroll
                for (int k = 0; k < NK; k++) room.rows[t - from][at.warp][at.lane + WARP * k] = sums[k];
            }
            __syncthreads();
            store_rows<NK>(room, p, at, n0, t0, from, m.dc, m.v, room.stage.c, false);
            __syncthreads();
        }
    }
    if (m.dfinal && piece + 1 == p.pieces)
        store_product(room, state, p, at, n0, m.dfinal + (at.row * p.H + at.head) * p.P * p.N,
                      m.exact + (p.B * p.pieces + at.row) * p.H * p.blocks + blockIdx.x);
}

/* From the right: block (head and rows, segment, batch row). TOTALS: only what the segment adds to the gradient of the
 * state that enters it, and its decay. */
template <class T, int NK, bool TOTALS>
__global__ void __launch_bounds__(SSD_WARPS *WARP)
ssd_right_kernel(T *dx, int64_t dx_row, int64_t dx_step, backward_memory m, const T *dy, const T *x, const T *b,
                 const T *c, ssd_problem p, int n0) {
    DYNAMIC_SHARED(char, memory);
    backward_room<NK> &room = *reinterpret_cast<backward_room<NK> *>(memory);
    enum { STAGE = backward_room<NK>::STAGE };
    ssd_stage<NK, STAGE> &stage = room.stage;
    ssd_place at = ssd_place_of(p);
    ssd_part<NK> carry; /* exp(a[t+1]) dS[t+1] */
    int64_t size = p.P * p.N, of_segment = ((at.row * p.segments + at.segment) * p.H + at.head) * size;
    if (TOTALS) carry.load(p, at, n0, NULL);
    else if (m.carries) carry.load(p, at, n0, m.carries + of_segment);
    else carry.load(p, at, n0, m.dfinal ? m.dfinal + (at.row * p.H + at.head) * size : NULL);
    float total = 1, skip = p.d ? p.d[at.head] : 0, dd = 0;
    bool final_group = n0 + SSD_STATES_MAX >= p.N;
    int64_t first = at.segment * p.per_segment;
    int64_t last = first + p.per_segment < p.pieces ? first + p.per_segment : p.pieces;
    int64_t end = last * SSD_PIECE < p.T ? last * SSD_PIECE : p.T;
    for (int64_t t0 = (end - 1) / STAGE * STAGE; t0 >= first * SSD_PIECE; t0 -= STAGE) {
        __syncthreads();
        ssd_fill<T>(stage, p, at, n0, t0, TOTALS ? NULL : x, dy, TOTALS ? NULL : b, c);
        __syncthreads();
        for (int from = STAGE - TOKENS; from >= 0; from -= TOKENS) {
            for (int t = from + TOKENS - 1; t >= from; t--) {
                float keep = stage.decay[t], dt = stage.dt[t], sums[NK] = {}, of_x[SSD_ROWS] = {};
                total *= keep;
#pragma unroll
                for (int r = 0; r < SSD_ROWS; r++) {
                    float out = stage.dy[t][at.warp * SSD_ROWS + r];
                    float in = TOTALS ? 0 : stage.x[t][at.warp * SSD_ROWS + r];
#pragma unroll
                    for (int k = 0; k < NK; k++) {
                        float dS = carry.s[r][k] + out * stage.c[t][at.lane + WARP * k];
                        if (!TOTALS) {
                            of_x[r] += dS * stage.b[t][at.lane + WARP * k];
                            sums[k] += dS * in;
                        }
                        carry.s[r][k] = keep * dS;
                    }
                }
                if constexpr (!TOTALS) {
#pragma unroll
                    for (int k = 0; k < NK; k++) room.rows[t - from][at.warp][at.lane + WARP * k] = sums[k];
                    int r = at.lane / 4 % SSD_ROWS;
                    float sum = dt * ssd_row_sums(of_x, at.lane);
                    int64_t now = t0 + t, i = at.p0 + at.warp * SSD_ROWS + r;
                    if (at.lane % 4 != 0 || now >= p.T || i >= p.P) continue;
                    float out = stage.dy[t][at.warp * SSD_ROWS + r];
                    int64_t between = ((at.row * p.T + now) * p.H + at.head) * p.P + i;
                    if (n0 > 0) sum += m.sums[between];
                    if (final_group) {
                        dx[at.row * dx_row + now * dx_step + at.head * p.P + i] = from_float<T>(sum + skip * out);
                        dd += out * stage.x[t][at.warp * SSD_ROWS + r];
                    } else {
                        m.sums[between] = sum;
                    }
                }
            }
            if (TOTALS) continue;
            __syncthreads();
            store_rows<NK>(room, p, at, n0, t0, from, m.db, m.w, stage.b, true);
            __syncthreads();
        }
        if (TOTALS || t0 % SSD_PIECE != 0) continue;
        int64_t of_piece = (at.row * p.pieces + t0 / SSD_PIECE) * p.H + at.head;
        store_product(room, carry, p, at, n0, m.saved + of_piece * size,
                    m.exact + of_piece * p.blocks + blockIdx.x % p.blocks);
    }
    if (TOTALS) {
        carry.store(p, at, n0, m.adds + of_segment);
        if (threadIdx.x == 0) m.decays[(at.row * p.segments + at.segment) * p.H + at.head] = total;
        return;
    }
    if (m.dinitial && at.segment == 0) carry.store(p, at, n0, m.dinitial + (at.row * p.H + at.head) * size);
    if (!final_group || !m.dd) return;
    dd = warp_sum(dd);
    __syncthreads();
    if (at.lane == 0) room.scalar[0][at.warp] = dd;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float sum = 0;
    for (int w = 0; w < SSD_WARPS; w++) sum += room.scalar[0][w];
    m.dd[(at.row * p.segments + at.segment) * p.H * p.blocks + blockIdx.x] = sum;
}

/* --- after the walks ---------------------------------------------------------------------------------------------- */

/* The sum over the blocks of a head. */
__device__ __forceinline__ float blocks_sum(const float *from, int64_t at, int64_t blocks) {
    float sum = 0;
    for (int64_t k = 0; k < blocks; k++) sum += from[at * blocks + k];
    return sum;
}

/* ddt and da of one piece: a thread a head, walking from the right. */
__global__ void ssd_decay_kernel(float *ddt, float *da, backward_memory m, ssd_problem p) {
    int64_t head = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, piece = blockIdx.y, row = blockIdx.z;
    if (head >= p.H) return;
    int64_t first = piece * SSD_PIECE, end = first + SSD_PIECE < p.T ? first + SSD_PIECE : p.T;
    /* What comes from behind the piece: da of the next one's first token, or <dfinal, final>. */
    float next = 0;
    if (end < p.T) next = blocks_sum(m.exact, (row * p.pieces + piece + 1) * p.H + head, p.blocks);
    else if (m.dfinal) next = blocks_sum(m.exact, (p.B * p.pieces + row) * p.H + head, p.blocks);
    for (int64_t t = end - 1; t >= first; t--) {
        int64_t at = (row * p.T + t) * p.H + head;
        float w = blocks_sum(m.w, at, p.blocks), v = blocks_sum(m.v, at, p.blocks);
        float here = ssd_starts(p, row, t) ? 0.0f : next + v - p.dt[at] * w;
        if (t == first) here = blocks_sum(m.exact, (row * p.pieces + piece) * p.H + head, p.blocks);
        ddt[at] = w;
        da[at] = here;
        next = here;
    }
}

/* d (B,T,G,N) = the heads' parts, added in order; a thread a token and column. */
template <class T>
__global__ void ssd_heads_kernel(T *d, int64_t d_row, int64_t d_step, const float *parts, ssd_problem p) {
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y + (int64_t)blockIdx.z * gridDim.y;
    if (n >= p.G * p.N || token >= p.B * p.T) return;
    int64_t heads = p.H / p.G * p.blocks, group = n / p.N;
    const float *from = parts + (token * p.H * p.blocks + group * heads) * p.N + n % p.N;
    float sum = 0;
    for (int64_t h = 0; h < heads; h++) sum += from[h * p.N];
    d[token / p.T * d_row + token % p.T * d_step + n] = from_float<T>(sum);
}

/* dd (H) += the parts (rows, H blocks). */
__global__ void ssd_skip_kernel(float *dd, const float *parts, int64_t rows, int64_t H, int64_t blocks) {
    int64_t head = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= H) return;
    float sum = 0;
    for (int64_t r = 0; r < rows; r++) sum += blocks_sum(parts + r * H * blocks, head, blocks);
    dd[head] += sum;
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

template <class T, int NK>
static void launch_walks(struct device *dev, tensor dx, const backward_memory &m, tensor dy, tensor x, tensor b, tensor c,
                         const ssd_problem &p) {
    int size = (int)sizeof(backward_room<NK>);
    const T *in = data_of<T>(x), *out = data_of<T>(dy), *bs = data_of<T>(b), *cs = data_of<T>(c);
    dim3 left((unsigned)(p.H * p.blocks), (unsigned)p.pieces, (unsigned)p.B), right = left;
    right.y = (unsigned)p.segments;
    cuda_expect(dev, cudaFuncSetAttribute(ssd_left_kernel<T, NK>, cudaFuncAttributeMaxDynamicSharedMemorySize, size),
                "ssd_backward");
    cuda_expect(dev, cudaFuncSetAttribute(ssd_right_kernel<T, NK, true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          size), "ssd_backward");
    cuda_expect(dev, cudaFuncSetAttribute(ssd_right_kernel<T, NK, false>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          size), "ssd_backward");
    for (int n0 = 0; n0 < p.N; n0 += SSD_STATES_MAX)
        LAUNCH(dev, (ssd_left_kernel<T, NK>), left, SSD_WARPS * WARP, size, m, out, in, bs, cs, p, n0);
    for (int n0 = 0; p.segments > 1 && n0 < p.N; n0 += SSD_STATES_MAX)
        LAUNCH(dev, (ssd_right_kernel<T, NK, true>), right, SSD_WARPS * WARP, size, data_of<T>(dx), dx.stride[0],
               dx.stride[1], m, out, in, bs, cs, p, n0);
    if (p.segments > 1) ssd_carry(dev, m.adds, m.decays, m.dfinal, p, true);
    for (int n0 = 0; n0 < p.N; n0 += SSD_STATES_MAX)
        LAUNCH(dev, (ssd_right_kernel<T, NK, false>), right, SSD_WARPS * WARP, size, data_of<T>(dx), dx.stride[0],
               dx.stride[1], m, out, in, bs, cs, p, n0);
}

template <class T>
static void add_heads(struct device *dev, tensor d, const float *parts, const ssd_problem &p) {
    dim3 grid((unsigned)ceil_div(p.G * p.N, 128), (unsigned)at_most(p.B * p.T, 32768), 1);
    grid.z = (unsigned)ceil_div(p.B * p.T, grid.y);
    LAUNCH(dev, ssd_heads_kernel<T>, grid, 128, 0, data_of<T>(d), d.stride[0], d.stride[1], parts, p);
}

extern "C" void cuda_ssd_backward(struct device *dev, tensor dx, tensor ddt, tensor da, tensor db, tensor dc,
                                  tensor dinitial, tensor dd, tensor dy, tensor dfinal, const void *saved, tensor x,
                                  tensor dt, tensor a, tensor b, tensor c, tensor d, tensor initial, tensor doc,
                                  int64_t chunk, void *scratch) {
    if (ssd_in_chunks(x.dtype, {x.dim[0], x.dim[1], x.dim[2], x.dim[3], b.dim[2], b.dim[3], chunk})) {
        ssd_chunk_backward(dev, dx, ddt, da, db, dc, dinitial, dd, dy, dfinal, saved, x, dt, a, b, c, d, initial, doc,
                           chunk, scratch);
        return;
    }
    ssd_problem p = ssd_problem_of(dy, x, dt, a, b, c, d, initial, doc);
    backward_scratch size = scratch_of({p.B, p.T, p.H, p.P, p.G, p.N, 0});
    backward_memory m = {};
    m.db = (float *)scratch, m.dc = m.db + size.db, m.v = m.dc + size.dc, m.w = m.v + size.v;
    m.exact = m.w + size.w;
    float *skips = m.exact + size.exact;
    m.adds = skips + size.dd, m.decays = m.adds + size.adds, m.sums = m.decays + size.decays;
    m.dd = tensor_given(dd) ? skips : NULL;
    m.dinitial = data_of<float>(dinitial), m.dfinal = data_of<float>(dfinal);
    m.saved = (const float *)saved, m.carries = p.segments > 1 ? m.adds : NULL;
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        ssd_with_columns(p.N, [&](auto columns) { launch_walks<T, columns.value>(dev, dx, m, dy, x, b, c, p); });
        add_heads<T>(dev, db, m.db, p);
        add_heads<T>(dev, dc, m.dc, p);
    });
    dim3 grid((unsigned)ceil_div(p.H, 32), (unsigned)p.pieces, (unsigned)p.B);
    LAUNCH(dev, ssd_decay_kernel, grid, 32, 0, data_of<float>(ddt), data_of<float>(da), m, p);
    if (tensor_given(dd))
        LAUNCH(dev, ssd_skip_kernel, (unsigned)ceil_div(p.H, 32), 32, 0, data_of<float>(dd), skips, p.B * p.segments,
               p.H, p.blocks);
}
