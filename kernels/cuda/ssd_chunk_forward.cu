/* ssd_chunk_forward.cu: SSD in chunks on tensor cores, forward. ssd_chunk.cu has the equations, factors and walk.
 *
 * C B^T is made first, once for all heads of a group, in the layout of accumulators: fp32, 16 KB a chunk, which stays
 * in the L2 cache. Then a block walks over the chunks of one head, batch row and segment with the state S (P x N) in
 * the accumulators of its four warps, 16 rows p each. For each chunk, while x, b, c are on their way:
 *   1. a warp has 16 tokens i: C B^T on and below the diagonal, times L_ij dt_j, to shared memory as bf16: weights M
 * and behind the barrier for both
 *   2. a warp has 16 columns p of y, all tokens: C S^T, where accumulators of S, rounded, are just what the product
 *      takes as its second operand; times enter_i; plus M X; plus d x
 *   3. S = pass S + (leave dt X)^T B
 * Which warp has which tokens in 1. changes from chunk to chunk, because their triangle is not even.
 *
 * saved: the states that enter each segment, (B, segments, H, P, N) fp32; nothing where time is not cut: backward walks
 * from there, which costs it no more than reading states would.
 *
 * Account, B 8, T 2048, H 64, P 64, N 128, bf16: bytes 134 MB of x, 134 of y, the rest from the L2 cache: 0.07 ms at
 * 4.2 TB/s. A head's chunk, 124 of them a multiprocessor: 600 products m16n8k16, 900 clocks; 250 KB in and out of
 * shared memory, most of it fragments of b and c, which all four warps read: 2,000 clocks, 0.14 ms at 1.8 GHz; 6,000
 * instructions of warps, 1,500 clocks. Expected: 0.2 ms, by shared memory. On Hopper ssd_wgmma_forward.cu takes its
 * place, whose products read operands once.
 *
 * Reproducible: every sum has its order from the shape.
 */
#include "kernels/cuda/shared.cuh"
#include "kernels/cuda/ssd_chunk_forward.cuh"

enum { THREADS = SSD_WALKERS * WARP };

struct forward_room {
    shared_tile<SSD_P> x, weights;
    shared_tile<SSD_N> b, c;
    ssd_factors factors[2];
};

/* Sizes in floats: the factors, the products, then the carries where nothing is saved, then the decays of segments. */
static int64_t factors_count(struct ssd_shape s) {
    return s.B * ssd_chunks(s) * s.H * (int64_t)(sizeof(ssd_factors) / sizeof(float));
}

static int64_t products_count(struct ssd_shape s) {
    return s.B * ssd_chunks(s) * s.G * 4 * PRODUCTS;
}

size_t ssd_chunk_saved(struct ssd_shape s) {
    return (size_t)ssd_chunk_carries(s) * sizeof(float);
}

size_t ssd_chunk_forward_scratch(struct ssd_shape s) {
    int64_t decays = s.B * ssd_chunk_segments(s) * s.H;
    return (size_t)(factors_count(s) + products_count(s) + ssd_chunk_carries(s) + decays) * sizeof(float);
}

/* C B^T on and below the diagonal: a warp 16 tokens. Grid: (groups, chunks, batch rows). */
template <bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
ssd_products_kernel(float4 *products, ssd_rows b, ssd_rows c, ssd_chunked p) {
    DYNAMIC_SHARED(char, memory);
    shared_tile<SSD_N> *tiles = reinterpret_cast<shared_tile<SSD_N> *>(memory);
    int64_t group = blockIdx.x, chunk = blockIdx.y, row = blockIdx.z;
    int lane = threadIdx.x % WARP, warp = warp_of_block();
    tile_load<THREADS, ALIGNED>(tiles[0], c, row, group, chunk * SSD_CHUNK, p.T);
    tile_load<THREADS, ALIGNED>(tiles[1], b, row, group, chunk * SSD_CHUNK, p.T);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float cb[8][4] = {};
    int of_c = down_right<SSD_N>(16 * warp, 0, lane), of_b = right_down<SSD_N>(0, 0, lane);
#pragma unroll
    for (int k = 0; k < SSD_N; k += 16) {
        uint32_t two[4], a[4];
        ldmatrix_x4(a, tiles[0].from(of_c, 0, k));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j > warp) continue;
            ldmatrix_x4(two, tiles[1].from(of_b, 16 * j, k));
            mma_two(cb[2 * j], cb[2 * j + 1], a, two);
        }
    }
    products += ((row * p.chunks + chunk) * p.G + group) * PRODUCTS + warp * 8 * WARP + lane;
#pragma unroll
    for (int n = 0; n < 8; n++)
        if (n / 2 <= warp) products[n * WARP] = make_float4(cb[n][0], cb[n][1], cb[n][2], cb[n][3]);
}

/* Step 2 for the columns from p0 on; `to` is the chunk's first token in y. */
template <bool ALIGNED>
__device__ __forceinline__ void outputs_store(forward_room &room, const float *enter, const ssd_state &state,
                                              __nv_bfloat16 *to, int64_t step, int tokens, int width, float skip,
                                              int p0, int lane) {
    float y[4][2][4] = {};
    int of_c = down_right<SSD_N>(0, 0, lane), of_weights = down_right<SSD_P>(0, 0, lane);
    int of_x = down_right<SSD_P>(0, p0, lane);
#pragma unroll
    for (int k = 0; k < SSD_TILES; k += 2) {
        const float *left = state.tile(k), *right = state.tile(k + 1);
        uint32_t b[4] = {pack_bf16(left[0], left[1]), pack_bf16(right[0], right[1]), pack_bf16(left[2], left[3]),
                         pack_bf16(right[2], right[3])};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t a[4];
            ldmatrix_x4(a, room.c.from(of_c, 16 * i, 8 * k));
            mma_two(y[i][0], y[i][1], a, b);
        }
    }
    enter += lane / 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) y[i][e / 4][e % 4] *= enter[16 * i + e % 4 / 2 * 8];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4], b[4];
        ldmatrix_x4_transposed(b, room.x.from(of_x, 16 * k, 0));
#pragma unroll
        for (int i = k; i < 4; i++) {
            ldmatrix_x4(a, room.weights.from(of_weights, 16 * i, 16 * k));
            mma_two(y[i][0], y[i][1], a, b);
        }
    }
    int column = p0 + row_of_16_column(lane), of_pair = shared_tile<SSD_P>::offset(lane / 4, p0 + lane % 4 * 2);
    tokens -= lane / 4, to += lane / 4 * step + column;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) { /* pairs of columns: two accumulators, two rows each */
            uint32_t x = *reinterpret_cast<uint32_t *>(room.x.from(of_pair, 16 * i + e % 2 * 8, e / 2 * 8));
            y[i][e / 2][e % 2 * 2] += skip * low_bf16(x);
            y[i][e / 2][e % 2 * 2 + 1] += skip * high_bf16(x);
        }
        rows_store<ALIGNED>(to, step, tokens - 16 * i, width - column, y[i][0], y[i][1], lane);
    }
}

/* Grid: (heads, segments, batch rows). */
template <bool ALIGNED> __global__ void __launch_bounds__(THREADS, 4) ssd_chunk_forward_kernel(forward_problem f) {
    DYNAMIC_SHARED(char, memory);
    forward_room &room = *reinterpret_cast<forward_room *>(memory);
    const ssd_chunked &p = f.p;
    forward_place at = forward_place_of(p);
    int lane = threadIdx.x % WARP, warp = warp_of_block();
    float skip = f.d ? f.d[at.head] : 0;
    ssd_state state;
    state.load(p, f.entering ? f.entering + at.of_segment * p.P * p.N : NULL);
    factors_load<THREADS>(room.factors[0], f.factors + at.of_factors(p, at.first));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int64_t chunk = at.first; chunk < at.end; chunk++) {
        int64_t t0 = chunk * SSD_CHUNK, k = chunk - at.first;
        const ssd_factors &now = room.factors[k % 2];
        tile_load<THREADS, ALIGNED>(room.x, f.x, at.row, at.head, t0, p.T);
        tile_load<THREADS, ALIGNED>(room.c, f.c, at.row, at.group, t0, p.T);
        tile_load<THREADS, ALIGNED>(room.b, f.b, at.row, at.group, t0, p.T);
        if (chunk + 1 < at.end)
            factors_load<THREADS>(room.factors[(k + 1) % 2], f.factors + at.of_factors(p, chunk + 1));
        cp_async_commit();
        weights_store(room.weights, now, f.products + at.of_products(p, chunk), (warp + (int)chunk) % SSD_WALKERS,
                      lane);
        cp_async_wait<0>();
        __syncthreads();
        outputs_store<ALIGNED>(room, now.enter, state, f.y.data + at.of_outputs(f.y, t0), f.y.step,
                               (int)at_most(p.T - t0, SSD_CHUNK), f.y.width, skip, 16 * warp, lane);
        state.update<true>(room.x, room.b, now.enter[SSD_CHUNK - 1], now.leave, now.dt);
        __syncthreads();
    }
    if (f.final && at.end == p.chunks) state.store(p, f.final + (at.row * p.H + at.head) * p.P * p.N);
}

void ssd_chunk_forward(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor dt, tensor a, tensor b,
                       tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch) {
    (void)chunk; /* one length for all shapes */
    struct ssd_shape shape = {x.dim[0], x.dim[1], x.dim[2], x.dim[3], b.dim[2], b.dim[3], 0};
    ssd_chunked p = ssd_chunked_of(shape);
    ssd_factors *factors = (ssd_factors *)scratch;
    float4 *products = (float4 *)((float *)scratch + factors_count(shape));
    float *carries = (float *)(products + products_count(shape) / 4), *decays = carries + ssd_chunk_carries(shape);
    if (saved) carries = (float *)saved;
    ssd_find_factors(dev, factors, dt, a, doc, p);
    const float *entering = data_of<float>(initial);
    if (p.segments > 1) {
        ssd_walk walk = {};
        walk.rows = ssd_rows_of(x), walk.columns = ssd_rows_of(b), walk.factors = factors;
        ssd_carry_segments(dev, carries, decays, walk, entering, p, false);
        entering = carries;
    }
    forward_problem f = {p, ssd_rows_of(y), ssd_rows_of(x), ssd_rows_of(b), ssd_rows_of(c), data_of<float>(d), entering,
                         data_of<float>(final), factors, products};
    int size = (int)sizeof(forward_room), two = 2 * (int)sizeof(shared_tile<SSD_N>);
    bool aligned = f.y.aligned && f.x.aligned && f.b.aligned && f.c.aligned;
    LAUNCH(dev, (aligned ? ssd_products_kernel<true> : ssd_products_kernel<false>),
           dim3((unsigned)p.G, (unsigned)p.chunks, (unsigned)p.B), THREADS, two, products, f.b, f.c, p);
    dim3 grid((unsigned)p.H, (unsigned)p.segments, (unsigned)p.B);
    if (aligned && ssd_wgmma_forward(dev, f, grid)) return;
    auto kernel = aligned ? ssd_chunk_forward_kernel<true> : ssd_chunk_forward_kernel<false>;
    allow_shared(dev, kernel, (size_t)size, "ssd_forward");
    LAUNCH(dev, kernel, grid, THREADS, size, f);
}
