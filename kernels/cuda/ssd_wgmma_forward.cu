/* ssd_wgmma_forward.cu: SSD forward, the walk over chunks with outputs, by Hopper's products of groups of warps
 * (wgmma.cuh), which read an operand in shared memory once for all four warps. ssd_chunk_forward.cu has the equations,
 * C B^T and the same by products of single warps, each of which reads its own fragments of all of B and C: that is what
 * bounds it.
 *
 * A block, one warpgroup, walks over the chunks of one head, batch row and segment with the state S (P x N) as its
 * sums, 16 rows p of it in a warp. What stands on the left of a product may lie in registers, so y is made on its side,
 * rows p by tokens i:
 *   1. the weights M_ij = (c_i . b_j) L_ij dt_j, to shared memory as bf16
 *   2. y^T = (S C^T) enter + X^T M^T + d X^T, turned over, eight by eight; sums of S, rounded, are just what a product
 *      takes on its left, and fragments of X^T are what y^T has as sums
 *   3. S = pass S + (leave dt X)^T B
 * b is copied during 2.; behind it the copies of the next chunk's x and c are started, and 1. of the next chunk follows
 * 3., so that copies have that long. Which warp has which tokens in 1. changes from chunk to chunk, because their
 * triangle is not even.
 *
 * Three blocks a multiprocessor have 158 registers a thread, 96 of them sums of S and y^T. Where there are more blocks
 * than that, four have 128, and the products with S wait for each other: two rounds of blocks would take longer.
 *
 * Account, Mamba-2 129M (B 16, T 2048, H 24, P 64, N 128), bf16: bytes 101 MB of x, 101 of y: 0.07 ms at 3.0 TB/s; from
 * the L2 cache 50 KB a head's chunk (x, b, c and 10 of C B^T), 614 MB: 0.11 ms. A head's chunk, 93 of them a
 * multiprocessor: 20 products of 64 x 64 x 16, 640 clocks; 100 KB in and out of shared memory, 800 clocks; 3,000
 * instructions of warps, 760 clocks: 0.04 ms each. Expected 0.16 ms with C B^T and the factors, where
 * ssd_chunk_forward.cu takes 0.234 (H100).
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
    shared_tile<TILE_COLUMNS> x, weights, c[2], b[2];
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

/* y^T without d X^T, ROUND products with S at a time: each has four registers of it as its own. */
template <int ROUND>
__device__ __forceinline__ void outputs_find(float (&y)[TOKEN_TILES][4], group_room &room, const ssd_state &state,
                                             const float *enter, int lane) {
#pragma unroll
    for (int k = 0; k < SSD_TILES; k += 2 * ROUND) {
        uint32_t entering[ROUND][4];
#pragma unroll
        for (int i = 0; i < ROUND; i++) {
            const float *left = state.tile(k + 2 * i), *right = state.tile(k + 2 * i + 1);
            entering[i][0] = pack_bf16(left[0], left[1]), entering[i][1] = pack_bf16(left[2], left[3]);
            entering[i][2] = pack_bf16(right[0], right[1]), entering[i][3] = pack_bf16(right[2], right[3]);
        }
        products_begin();
#pragma unroll
        for (int i = 0; i < ROUND; i++)
            product_of_rows(y, entering[i], matrix_columns(matrix_at(room.c[k / 8].v), 8 * (k % 8 + 2 * i)), k + i > 0);
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
    products_begin();
#pragma unroll
    for (int k = 0; k < SSD_CHUNK; k += 16)
        product_of_columns_and_rows(y, matrix_rows(matrix_at(room.x.v), k),
                                    matrix_columns(matrix_at(room.weights.v), k), true);
    products_end();
    products_wait<0>();
    arrived(y);
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

/* y^T += d X^T, whose fragments come as y^T is. */
__device__ __forceinline__ void skip_add(float (&y)[TOKEN_TILES][4], group_room &room, int of_x, float skip) {
#pragma unroll
    for (int k = 0; k < TOKEN_TILES; k += 2) {
        uint32_t x[4];
        ldmatrix_x4_transposed(x, room.x.from(of_x, 8 * k, 0));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[k + i / 2][i % 2 * 2] += skip * low_bf16(x[i]);
            y[k + i / 2][i % 2 * 2 + 1] += skip * high_bf16(x[i]);
        }
    }
}

/* Step 2. */
template <int ROUND>
__device__ __forceinline__ void outputs_make(group_room &room, const ssd_state &state, const float *enter, int of_x,
                                             float skip, __nv_bfloat16 *to, int64_t step, int tokens, int columns,
                                             int warp, int lane) {
    float y[TOKEN_TILES][4];
    outputs_find<ROUND>(y, room, state, enter, lane);
    skip_add(y, room, of_x, skip);
    outputs_store(y, to, step, tokens, columns, warp, lane);
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

/* The copies of the k-th chunk but b, and of the factors of the one behind it. */
__device__ __forceinline__ void chunk_load(group_room &room, const forward_problem &f, const forward_place &at, int k) {
    int64_t chunk = at.first + k, t0 = chunk * SSD_CHUNK;
    tile_load<WARPGROUP, true>(room.x, f.x, at.row, at.head, t0, f.p.T);
    states_load(room.c, f.c, at.row, at.group, t0, f.p.T);
    if (chunk + 1 < at.end)
        factors_load<WARPGROUP>(room.factors[(k + 1) % 3], f.factors + at.of_factors(f.p, chunk + 1));
    cp_async_commit();
}
#endif

/* Grid: (heads, segments, batch rows). */
template <int BLOCKS>
__global__ void __launch_bounds__(WARPGROUP, BLOCKS) ssd_wgmma_forward_kernel(forward_problem f) {
#ifndef WITHOUT_WGMMA
    enum { ROUND = BLOCKS == 3 ? 4 : 1 };
    DYNAMIC_SHARED(__nv_bfloat16, room_of_tiles);
    group_room &room = *reinterpret_cast<group_room *>(tile_start(room_of_tiles));
    const ssd_chunked &p = f.p;
    forward_place at = forward_place_of(p);
    int lane = threadIdx.x % WARP, warp = warp_of_block(), count = (int)(at.end - at.first);
    int of_x = right_down<SSD_P>(0, 16 * warp, lane);
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
        cp_async_wait<0>();
        shared_for_products(); /* the copies, and the weights */
        __syncthreads();
        states_load(room.b, f.b, at.row, at.group, t0, p.T);
        cp_async_commit();
        outputs_make<ROUND>(room, state, now.enter, of_x, skip, f.y.data + at.of_outputs(f.y, t0), f.y.step,
                            (int)at_most(p.T - t0, SSD_CHUNK), f.y.width, warp, lane);
        uint32_t x[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) ldmatrix_x4_transposed(x[i], room.x.from(of_x, 16 * i, 0));
        cp_async_wait<0>();
        shared_for_products(); /* b */
        __syncthreads(); /* also, x, c and the weights have been read */
        if (k + 1 < count) chunk_load(room, f, at, k + 1);
        state_start(state, x, room.b, now, lane);
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
    bool three = (int64_t)grid.x * grid.y * grid.z <= 3 * cuda_impl(dev)->multiprocessors;
    auto kernel = three ? ssd_wgmma_forward_kernel<3> : ssd_wgmma_forward_kernel<4>;
    if (!products_fit(kernel)) return false;
    allow_shared(dev, kernel, size, "ssd_forward");
    LAUNCH(dev, kernel, grid, WARPGROUP, size, f);
    return true;
}
