/* ssd_wgmma_forward.cu: SSD forward, the walk over chunks with outputs, by Hopper's products of groups of warps
 * (wgmma.cuh), which read an operand in shared memory once for all four warps. ssd_chunk_forward.cu has the equations,
 * C B^T and the same by products of single warps, each of which reads its own fragments of all of B and C: that is what
 * bounds it.
 *
 * A block, one warpgroup, walks over the chunks of one head, batch row and segment with the state S (P x N) as its
 * sums, 16 rows p of it in a warp. What stands on the left of a product lies in registers, so y is made on its side,
 * rows p by tokens i:
 *   1. the weights M_ij = (c_i . b_j) L_ij dt_j, to shared memory as bf16
 *   2. y^T = (S C^T) enter + X^T M^T + d X^T; sums of S, rounded, are just what a product takes on its left, and
 *      fragments of X^T are what y^T has as sums
 *   3. S = pass S + (leave dt X)^T B, from the same fragments; meanwhile y^T is turned over, eight by eight, and stored
 * Behind 2. the copies of the next chunk's x, c and b are started, b into a place of its own, and 1. of the next chunk
 * follows 3., so that copies have that long. Which warp has which tokens in 1. changes from chunk to chunk, because
 * their triangle is not even.
 *
 * Account, Mamba-2 129M (B 16, T 2048, H 24, P 64, N 128), bf16: bytes 101 MB of x, 101 of y: 0.07 ms at 3.0 TB/s; from
 * the L2 cache 50 KB a head's chunk (x, b, c and 10 of C B^T), 614 MB: 0.11 ms. A head's chunk, 93 of them a
 * multiprocessor: 20 products of 64 x 64 x 16, 640 clocks; 100 KB in and out of shared memory, 800 clocks; 3,000
 * instructions of warps, 760 clocks: 0.04 ms each. Measured on an H100, with C B^T and the factors: 0.160 ms
 * (0.234 by ssd_chunk_forward.cu). 168 registers a thread, 96 of them sums of S and y^T, and 69 KB of shared memory:
 * three blocks a multiprocessor, so that B 8 H 64, 512 blocks, which are less than two rounds of 396, gains nothing.
 *
 * Reproducible: every sum has its order from the shape. */
#include "kernels/cuda/shared.cuh"
#include "kernels/cuda/ssd_chunk_forward.cuh"
#include "kernels/cuda/wgmma.cuh"

enum { TOKEN_TILES = SSD_CHUNK / 8 };

static_assert((int)SSD_CHUNK == (int)TILE_COLUMNS && (int)SSD_P == (int)TILE_COLUMNS &&
                  (int)SSD_N == 2 * (int)TILE_COLUMNS && SSD_WALKERS * WARP == (int)WARPGROUP, "tiles of 64 x 64");

/* States of 128 columns are two tiles. */
struct alignas(TILE_ALIGN) group_room {
    shared_tile<TILE_COLUMNS> x, weights, c[2], b[2][2];
    ssd_factors factors[3];
};

#ifndef WITHOUT_WGMMA
__device__ __forceinline__ void states_load(shared_tile<TILE_COLUMNS> (&tiles)[2], const ssd_rows &view, int64_t row,
                                            int64_t part, int64_t t0, int64_t T) {
    const __nv_bfloat16 *source = view.data + row * view.row + part * view.width + t0 * view.step;
#pragma unroll
    for (int h = 0; h < 2; h++)
        tile_fill<WARPGROUP>(tiles[h], source + h * TILE_COLUMNS, view.step, (int)at_most(T - t0, SSD_CHUNK),
                             view.width - h * TILE_COLUMNS, true);
}

/* y^T without d X^T; x receives the fragments of X^T. */
__device__ __forceinline__ void outputs_find(float (&y)[TOKEN_TILES][4], uint32_t (&x)[4][4], group_room &room,
                                             const ssd_state &state, const float *enter, int warp, int lane) {
    int of_x = right_down<SSD_P>(0, 16 * warp, lane);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t entering[4][4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float *left = state.s[h][2 * k], *right = state.s[h][2 * k + 1];
            entering[k][0] = pack_bf16(left[0], left[1]), entering[k][1] = pack_bf16(left[2], left[3]);
            entering[k][2] = pack_bf16(right[0], right[1]), entering[k][3] = pack_bf16(right[2], right[3]);
        }
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++)
            product_of_rows(y, entering[k], matrix_columns(matrix_at(room.c[h].v), 16 * k), h > 0 || k > 0);
        products_end();
        products_wait<0>();
        arrived(y);
        arrived(entering);
    }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
        float2 by = two_at(enter, 8 * n + lane % 4 * 2);
        y[n][0] *= by.x, y[n][1] *= by.y, y[n][2] *= by.x, y[n][3] *= by.y;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) ldmatrix_x4_transposed(x[k], room.x.from(of_x, 16 * k, 0));
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++)
        product_of_rows(y, x[k], matrix_columns(matrix_at(room.weights.v), 16 * k), true);
    products_end();
    products_wait<0>();
    arrived(y);
    arrived(x);
}

/* y, of which `tokens` and `columns` exist; `to` is the chunk's first token. */
__device__ __forceinline__ void outputs_store(const float (&y)[TOKEN_TILES][4], __nv_bfloat16 *to, int64_t step,
                                              int tokens, int columns, int warp, int lane) {
    int column = 16 * warp + row_of_16_column(lane);
    tokens = column < columns ? tokens - lane / 4 : 0;
    to += lane / 4 * step + column;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++, to += 8 * step) {
        uint32_t pair = transposed(pack_bf16(y[n][0], y[n][1])), next = transposed(pack_bf16(y[n][2], y[n][3]));
        uint2 four = row_of_16(pair, next, lane);
        if (8 * n < tokens) *reinterpret_cast<uint2 *>(to) = four;
    }
}

/* y^T += d X^T. */
__device__ __forceinline__ void skip_add(float (&y)[TOKEN_TILES][4], const uint32_t (&x)[4][4], float skip) {
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t pair = x[n / 2][n % 2 * 2 + h];
            y[n][2 * h] += skip * low_bf16(pair);
            y[n][2 * h + 1] += skip * high_bf16(pair);
        }
}

/* Step 3 is asked for, from the fragments of X^T. */
__device__ __forceinline__ void state_start(ssd_state &state, uint32_t (&x)[4][4],
                                            const shared_tile<TILE_COLUMNS> (&b)[2], const ssd_factors &now, int lane) {
#pragma unroll
    for (int k = 0; k < 4; k++) tokens_scale<true>(x[k], now.leave, now.dt, 16 * k, lane);
    state.scale(now.enter[SSD_CHUNK - 1]);
    products_begin();
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            product_of_columns(state.s[h], x[k], matrix_rows(matrix_at(b[h].v), 16 * k));
    products_end();
}

/* The copies of the k-th chunk, and of the factors of the one behind it. */
__device__ __forceinline__ void chunk_load(group_room &room, const forward_problem &f, const forward_place &at, int k) {
    int64_t chunk = at.first + k, t0 = chunk * SSD_CHUNK;
    tile_load<WARPGROUP, true>(room.x, f.x, at.row, at.head, t0, f.p.T);
    states_load(room.c, f.c, at.row, at.group, t0, f.p.T);
    states_load(room.b[k % 2], f.b, at.row, at.group, t0, f.p.T);
    if (chunk + 1 < at.end)
        factors_load<WARPGROUP>(room.factors[(k + 1) % 3], f.factors + at.of_factors(f.p, chunk + 1));
    cp_async_commit();
}
#endif

/* Grid: (heads, segments, batch rows). */
__global__ void __launch_bounds__(WARPGROUP, 3) ssd_wgmma_forward_kernel(forward_problem f) {
#ifndef WITHOUT_WGMMA
    DYNAMIC_SHARED(__nv_bfloat16, room_of_tiles);
    group_room &room = *reinterpret_cast<group_room *>(tile_start(room_of_tiles));
    const ssd_chunked &p = f.p;
    forward_place at = forward_place_of(p);
    int lane = threadIdx.x % WARP, warp = warp_of_block(), count = (int)(at.end - at.first);
    float skip = f.d ? f.d[at.head] : 0;
    ssd_state state;
    state.load(p, f.entering ? f.entering + at.of_segment * p.P * p.N : NULL);
    factors_load<WARPGROUP>(room.factors[0], f.factors + at.of_factors(p, at.first));
    cp_async_commit();
    for (int i = threadIdx.x; i < SSD_CHUNK * SSD_CHUNK / 8; i += WARPGROUP) /* above the diagonal nobody writes */
        reinterpret_cast<uint4 *>(room.weights.v)[i] = make_uint4(0, 0, 0, 0);
    cp_async_wait<0>();
    __syncthreads();
    chunk_load(room, f, at, 0);
    weights_store(room.weights, room.factors[0], f.products + at.of_products(p, at.first), warp, lane);
    for (int k = 0; k < count; k++) {
        int64_t t0 = (at.first + k) * SSD_CHUNK;
        const ssd_factors &now = room.factors[k % 3];
        float y[TOKEN_TILES][4];
        uint32_t x[4][4];
        cp_async_wait<0>();
        shared_for_products(); /* the copies, and the weights */
        __syncthreads();
        outputs_find(y, x, room, state, now.enter, warp, lane);
        skip_add(y, x, skip);
        __syncthreads(); /* x, c and the weights have been read */
        if (k + 1 < count) chunk_load(room, f, at, k + 1);
        state_start(state, x, room.b[k % 2], now, lane);
        outputs_store(y, f.y.data + at.of_outputs(f.y, t0), f.y.step, (int)at_most(p.T - t0, SSD_CHUNK), f.y.width,
                      warp, lane);
        if (k + 1 < count)
            weights_store(room.weights, room.factors[(k + 1) % 3], f.products + at.of_products(p, at.first + k + 1),
                          (warp + k + 1) % SSD_WALKERS, lane);
        products_wait<0>();
        arrived(state.s[0]);
        arrived(state.s[1]);
        arrived(x);
    }
    if (f.final && at.end == p.chunks) state.store(p, f.final + (at.row * p.H + at.head) * p.P * p.N);
#endif
}

bool ssd_wgmma_forward(struct device *dev, const forward_problem &f, dim3 grid) {
    size_t size = TILE_ALIGN + sizeof(group_room);
    if (!products_fit(ssd_wgmma_forward_kernel)) return false;
    allow_shared(dev, ssd_wgmma_forward_kernel, size, "ssd_forward");
    LAUNCH(dev, ssd_wgmma_forward_kernel, grid, WARPGROUP, size, f);
    return true;
}
