/* ssd_wgmma.cu: SSD backward, a chunk by itself, by Hopper's products of groups of warps (wgmma.cuh), which read
 * operands where they lie in shared memory, once. ssd_chunk_backward.cu has the equations, and the same by products
 * of single warps, each of which reads its own fragments: that is what bounds it.
 *
 * A block has a chunk of one batch row and some heads of a group, which it takes in turn, one a step, with four
 * groups of warps, each of which makes all 64 rows of its products:
 *   ENTER   U = dy S, its product with c, and the sum of dc over the heads
 *   LEAVE   x G, the sum of db over the heads; <S, G>
 *   INNER   D^T = x dy^T and what follows from it: the weights M = (CB L dt)^T, to shared memory; ddt, da of the head
 *           two steps ago; the sum of L dt D over the heads, which ENTER and LEAVE multiply with b and c in the end
 *   VALUE   of the head one step ago: V = b G^T, dx = leave dt V + d dy + M dy
 * A step ends with a barrier; the copies of the next head are under way meanwhile: heads have a place of three in
 * turn.
 *
 * Account, B 8, T 2048, H 64, P 64, N 128, bf16: 805 MB read (x, dy, S, G), 134 MB of dx, 67 MB of parts of db and
 * dc: 0.24 ms at 4.2 TB/s. A head's chunk, 124 of them a multiprocessor: 32 products of 64 x 64 x 16 each of ENTER,
 * LEAVE and VALUE, 16 of INNER: 1,000 clocks; 150 KB of shared memory: 1,200 clocks; 4,000 instructions of warps:
 * 1,000 clocks. 0.09 ms at 1.75 GHz if all overlapped; expected 0.25 ms, bound by the bytes. SSD's whole backward
 * took 0.77 ms on an H100, 0.94 with the kernel of ssd_chunk_backward.cu.
 *
 * Reproducible: every sum has its order from the shape. */
#include "kernels/cuda/ssd_chunk_backward.cuh"
#include "kernels/cuda/wgmma.cuh"

enum {
    GROUPS = 4,
    THREADS = GROUPS * WARPGROUP,
    TILE = SSD_CHUNK * TILE_COLUMNS,
    HEADS = 3,   /* places of heads */
    NUMBERS = 4, /* places of what steps later is still read of a head */
};

enum group { ENTER, LEAVE, INNER, VALUE };

static_assert((int)SSD_CHUNK == (int)TILE_COLUMNS && (int)SSD_P == (int)TILE_COLUMNS &&
                  (int)SSD_N == 2 * (int)TILE_COLUMNS, "tiles of 64 x 64");

/* Sums of one head that go on as numbers for each token (token_sums). */
struct head_sums {
    float rows[4][SSD_CHUNK], columns[SSD_CHUNK], own[SSD_CHUNK], enters[SSD_CHUNK], leaves[SSD_CHUNK];
    float through[4], diagonal[4];
};

/* States of 128 columns are two tiles. */
struct head_place {
    __nv_bfloat16 x[TILE], dy[TILE], s[2 * TILE], g[2 * TILE];
};

struct alignas(TILE_ALIGN) group_room {
    head_place heads[HEADS];
    __nv_bfloat16 b[2 * TILE], c[2 * TILE];
    __nv_bfloat16 weights[2 * TILE]; /* two places; in the end the sums of L dt D, both ways */
    ssd_factors factors[NUMBERS];
    head_sums sums[NUMBERS];
};

#ifndef WITHOUT_WGMMA
/* Where a thread is in its group, and a lane in its accumulators: rows row and row + 8, columns q, q + 1 of every
 * eight. */
struct group_place {
    int thread, lane, warp, row, q;
};

/* --- loads -------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ int tile_place(int row, int column) {
    return row * TILE_COLUMNS + ((column / 8 ^ row % 8) * 8) + column % 8;
}

/* Tokens t0 .. of a part, columns from `from` on. */
__device__ __forceinline__ void rows_load(__nv_bfloat16 *tile, const ssd_rows &view, int64_t row, int64_t part,
                                          int64_t t0, int64_t T, int from) {
    const __nv_bfloat16 *source = view.data + row * view.row + part * view.width + t0 * view.step + from;
    int r = threadIdx.x / 8, c = threadIdx.x % 8 * 8;
    bool there = t0 + r < T && from + c < view.width;
    cp_async_16_or_zeros(tile + tile_place(r, c), source + r * view.step + c, there);
}

__device__ __forceinline__ void states_load(__nv_bfloat16 *tiles, const __nv_bfloat16 *from) {
    int r = threadIdx.x / 8, c = threadIdx.x % 8 * 8;
#pragma unroll
    for (int h = 0; h < 2; h++)
        cp_async_16(tiles + h * TILE + tile_place(r, c), from + r * SSD_N + h * TILE_COLUMNS + c);
}

static_assert((int)THREADS == (int)SSD_CHUNK * 8, "a piece a thread");

/* Start the copies of the k-th head. */
__device__ __forceinline__ void head_load(group_room &room, const backward_problem &b, int64_t row, int64_t chunk,
                                          int64_t first, int k, int heads) {
    if (k < heads) {
        head_place &head = room.heads[k % HEADS];
        int64_t place = (row * b.p.chunks + chunk) * b.p.H + first + k, t0 = chunk * SSD_CHUNK;
        rows_load(head.dy, b.dy, row, first + k, t0, b.p.T, 0);
        rows_load(head.x, b.x, row, first + k, t0, b.p.T, 0);
        states_load(head.s, b.m.states + place * (SSD_P * SSD_N));
        states_load(head.g, b.m.grads + place * (SSD_P * SSD_N));
        factors_load<THREADS>(room.factors[k % NUMBERS], b.m.factors + place);
    }
    cp_async_commit();
}

/* --- products ----------------------------------------------------------------------------------------------------- */

/* d (+)= a b over 64, b by columns. */
__device__ __forceinline__ void start_columns(float (&d)[8][4], const __nv_bfloat16 *a, const __nv_bfloat16 *b,
                                              bool add) {
#pragma unroll
    for (int k = 0; k < TILE_COLUMNS; k += 16)
        product_of_columns(d, matrix_columns(matrix_at(a), k), matrix_rows(matrix_at(b), k), add || k > 0);
}

/* d = a b over 64 TILES, both by rows. */
template <int TILES>
__device__ __forceinline__ void start_rows(float (&d)[8][4], const __nv_bfloat16 *a, const __nv_bfloat16 *b) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int k = 0; k < TILE_COLUMNS; k += 16)
            product_of_rows(d, matrix_columns(matrix_at(a + t * TILE), k), matrix_columns(matrix_at(b + t * TILE), k),
                            t > 0 || k > 0);
}

__device__ __forceinline__ void finish(float (&d)[8][4]) {
    products_end();
    products_wait<0>();
    arrived(d);
}

__device__ __forceinline__ float2 pair_at(const __nv_bfloat16 *tile, int row, int column) {
    uint32_t pair = *reinterpret_cast<const uint32_t *>(tile + tile_place(row, column));
    return make_float2(low_bf16(pair), high_bf16(pair));
}

/* --- what the groups do ------------------------------------------------------------------------------------------- */

/* sums += factor of a row times (rows of the head times a state); with c: its product with the rows of c, to `dots`. */
template <bool DOTS>
__device__ __forceinline__ void state_part(float (&sums)[2][8][4], const __nv_bfloat16 *rows,
                                           const __nv_bfloat16 *state, const float *factor, const float *second,
                                           const __nv_bfloat16 *c, float *dots, const group_place &at) {
    float dot[2] = {0, 0}, by[2];
#pragma unroll
    for (int h = 0; h < 2; h++) by[h] = factor[at.row + 8 * h] * (DOTS ? 1.0f : second[at.row + 8 * h]);
#pragma unroll
    for (int t = 0; t < 2; t++) {
        float d[8][4];
        products_begin();
        start_columns(d, rows, state + t * TILE, false);
        finish(d);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (DOTS) {
                    float2 with = pair_at(c + t * TILE, at.row + 8 * h, 8 * n + at.q);
                    dot[h] += d[n][2 * h] * with.x + d[n][2 * h + 1] * with.y;
                }
                sums[t][n][2 * h] += by[h] * d[n][2 * h];
                sums[t][n][2 * h + 1] += by[h] * d[n][2 * h + 1];
            }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (DOTS) dot[h] = quad_sum(dot[h]);
        if (DOTS && at.q == 0) dots[at.row + 8 * h] = dot[h];
    }
}

/* <S, G>: both lie in the same order. */
__device__ __forceinline__ void through_part(const head_place &head, head_sums &to, const group_place &at) {
    float sum = 0;
#pragma unroll 2
    for (int i = at.thread; i < 2 * TILE / 8; i += WARPGROUP) {
        uint4 s = *reinterpret_cast<const uint4 *>(head.s + 8 * i);
        uint4 g = *reinterpret_cast<const uint4 *>(head.g + 8 * i);
        sum += low_bf16(s.x) * low_bf16(g.x) + high_bf16(s.x) * high_bf16(g.x);
        sum += low_bf16(s.y) * low_bf16(g.y) + high_bf16(s.y) * high_bf16(g.y);
        sum += low_bf16(s.z) * low_bf16(g.z) + high_bf16(s.z) * high_bf16(g.z);
        sum += low_bf16(s.w) * low_bf16(g.w) + high_bf16(s.w) * high_bf16(g.w);
    }
    sum = warp_sum(sum);
    if (at.lane == 0) to.through[at.warp] = sum;
}

/* D^T, tokens j by i: the weights, the sums over pairs, and what is summed over heads. sums: (CB)^T, then L dt D. */
__device__ __forceinline__ void inner_part(float (&sums)[2][8][4], const head_place &head, __nv_bfloat16 *weights,
                                           const ssd_factors &f, head_sums &to, const group_place &at) {
    float d[8][4], columns[2] = {0, 0}, diagonal = 0;
    products_begin();
    start_rows<1>(d, head.x, head.dy);
    int j[2] = {at.row, at.row + 8};
    float log[2] = {f.log[j[0]], f.log[j[1]]}, run[2] = {f.run[j[0]], f.run[j[1]]}, dt[2] = {f.dt[j[0]], f.dt[j[1]]};
    finish(d);
#pragma unroll
    for (int n = 0; n < 8; n++) {
        int i = 8 * n + at.q;
        float weight[4] = {0, 0, 0, 0}, rows[2] = {0, 0};
        if (8 * n + 7 >= 16 * at.warp) { /* else all i are before all j */
            float2 logs = two_at(f.log, i), runs = two_at(f.run, i);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int h = e / 2, l = e % 2;
                float decay = decay_between(i + l, l ? logs.y : logs.x, l ? runs.y : runs.x, j[h], log[h], run[h]);
                float product = decay * d[n][e], pair = product * sums[0][n][e];
                sums[1][n][e] += product * dt[h];
                weight[e] = sums[0][n][e] * decay * dt[h];
                if (i + l == j[h]) {
                    to.own[i + l] = pair;
                    diagonal += d[n][e];
                } else {
                    columns[h] += pair;
                    rows[l] += pair * dt[h];
                }
            }
        }
        *reinterpret_cast<uint32_t *>(weights + tile_place(j[0], i)) = pack_bf16(weight[0], weight[1]);
        *reinterpret_cast<uint32_t *>(weights + tile_place(j[1], i)) = pack_bf16(weight[2], weight[3]);
        rows[0] = column_sum(rows[0]), rows[1] = column_sum(rows[1]);
        if (at.lane < 4) *reinterpret_cast<float2 *>(&to.rows[at.warp][i]) = make_float2(rows[0], rows[1]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        columns[h] = quad_sum(columns[h]);
        if (at.q == 0) to.columns[j[h]] = columns[h];
    }
    diagonal = warp_sum(diagonal);
    if (at.lane == 0) to.diagonal[at.warp] = diagonal;
}

/* V and its product with x, then dx. */
__device__ __forceinline__ void value_part(const group_room &room, const head_place &head, const __nv_bfloat16 *weights,
                                           const ssd_factors &f, head_sums &to, float skip, const backward_problem &b,
                                           int64_t row, int64_t of_head, int64_t t0, const group_place &at) {
    float v[8][4];
    products_begin();
    start_rows<2>(v, room.b, head.g);
    finish(v);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int j = at.row + 8 * h;
        float dot = 0, leave = f.leave[j] * f.dt[j];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float2 x = pair_at(head.x, j, 8 * n + at.q), dy = pair_at(head.dy, j, 8 * n + at.q);
            float &left = v[n][2 * h], &right = v[n][2 * h + 1];
            dot += left * x.x + right * x.y;
            left = leave * left + skip * dy.x;
            right = leave * right + skip * dy.y;
        }
        dot = quad_sum(dot);
        if (at.q == 0) to.leaves[j] = dot;
    }
    products_begin();
    start_columns(v, weights, head.dy, true);
    finish(v);
    int64_t t = t0 + at.row;
    int column = row_of_16_column(at.lane);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        __nv_bfloat16 *target = b.dx.data + row * b.dx.row + t * b.dx.step + of_head * b.dx.width + column + 8 * n;
        rows_store<true>(target, b.dx.step, (int)at_most(b.p.T - t, SSD_CHUNK), b.dx.width - column - 8 * n, v[n],
                         v[n + 1], at.lane);
    }
}

__device__ __forceinline__ void steps_store(const head_sums &sums, const ssd_factors &f, const backward_problem &b,
                                            int64_t row, int64_t chunk, int64_t head, int lane) {
    token_sums two[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int i = 2 * lane + k;
        float rows = sums.rows[0][i] + sums.rows[1][i] + sums.rows[2][i] + sums.rows[3][i];
        two[k] = {rows, sums.columns[i], sums.own[i], sums.enters[i], sums.leaves[i]};
    }
    float through = sums.through[0] + sums.through[1] + sums.through[2] + sums.through[3];
    float diagonal = sums.diagonal[0] + sums.diagonal[1] + sums.diagonal[2] + sums.diagonal[3];
    ssd_steps_store(two, through, diagonal, f, b, row, chunk, head, lane);
}

/* The sums of L dt D over heads as two tiles: j by i, and i by j. */
__device__ __forceinline__ void pairs_store(const float (&sum)[8][4], __nv_bfloat16 *weights, const group_place &at) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = 8 * n + at.q, j = at.row + 8 * h;
            *reinterpret_cast<uint32_t *>(weights + tile_place(j, i)) = pack_bf16(sum[n][2 * h], sum[n][2 * h + 1]);
            weights[TILE + tile_place(i, j)] = __float2bfloat16_rn(sum[n][2 * h]);
            weights[TILE + tile_place(i + 1, j)] = __float2bfloat16_rn(sum[n][2 * h + 1]);
        }
}

/* What pairs bring to dc or db, and that to memory. */
__device__ __forceinline__ void parts_store(float (&sums)[2][8][4], const __nv_bfloat16 *pairs,
                                            const __nv_bfloat16 *with, float *to, const backward_problem &b,
                                            int64_t row, int64_t t0, int64_t part, const group_place &at) {
#pragma unroll
    for (int t = 0; t < 2; t++) {
        products_begin();
        start_columns(sums[t], pairs, with + t * TILE, true);
        finish(sums[t]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int64_t token = t0 + at.row + 8 * h;
            float *place = to + ((row * b.p.T + token) * b.p.G * b.splits + part) * SSD_N + t * TILE_COLUMNS + at.q;
            if (token >= b.p.T) continue;
#pragma unroll
            for (int n = 0; n < 8; n++)
                *reinterpret_cast<float2 *>(place + 8 * n) = make_float2(sums[t][n][2 * h], sums[t][n][2 * h + 1]);
        }
    }
}

/* One step of a group: heads k, k - 1 and k - 2. */
__device__ __forceinline__ void group_step(float (&sums)[2][8][4], enum group group, group_room &room,
                                           const backward_problem &b, int64_t row, int64_t chunk, int64_t first, int k,
                                           int heads, const group_place &at) {
    head_place &head = room.heads[k % HEADS];
    const ssd_factors &f = room.factors[k % NUMBERS];
    head_sums &to = room.sums[k % NUMBERS];
    if (group == ENTER && k < heads)
        state_part<true>(sums, head.dy, head.s, f.enter, NULL, room.c, to.enters, at);
    if (group == LEAVE && k < heads) {
        state_part<false>(sums, head.x, head.g, f.leave, f.dt, NULL, NULL, at);
        through_part(head, to, at);
    }
    if (group == INNER) {
        if (k == 0) {
            products_begin();
            start_rows<2>(sums[0], room.b, room.c);
            finish(sums[0]);
        }
        if (k < heads) inner_part(sums, head, room.weights + k % 2 * TILE, f, to, at);
        if (k >= 2 && at.warp == k % 4)
            steps_store(room.sums[(k - 2) % NUMBERS], room.factors[(k - 2) % NUMBERS], b, row, chunk, first + k - 2,
                        at.lane);
    }
    if (group == VALUE && k >= 1 && k <= heads) {
        int64_t of_head = first + k - 1;
        value_part(room, room.heads[(k - 1) % HEADS], room.weights + (k - 1) % 2 * TILE,
                   room.factors[(k - 1) % NUMBERS], room.sums[(k - 1) % NUMBERS], b.d ? b.d[of_head] : 0.0f, b,
                   row, of_head, chunk * SSD_CHUNK, at);
    }
}
#endif

/* Grid: (groups x splits, chunks, batch rows). */
__global__ void __launch_bounds__(THREADS, 1) ssd_wgmma_backward_kernel(backward_problem b) {
#ifndef WITHOUT_WGMMA
    DYNAMIC_SHARED(__nv_bfloat16, room_of_tiles);
    group_room &room = *reinterpret_cast<group_room *>(tile_start(room_of_tiles));
    int64_t part = blockIdx.x, chunk = blockIdx.y, row = blockIdx.z, t0 = chunk * SSD_CHUNK, T = b.p.T;
    int64_t of_group = part / b.splits, in_group = b.p.H / b.p.G, first = part % b.splits * b.heads;
    int heads = (int)at_most(b.heads, in_group - first), warp = warp_of_block(), lane = threadIdx.x % WARP;
    enum group group = (enum group)(warp / 4);
    group_place at = {(int)threadIdx.x % WARPGROUP, lane, warp % 4, warp % 4 * 16 + lane / 4, lane % 4 * 2};
    float sums[2][8][4] = {};
    first += of_group * in_group;
    for (int h = 0; h < 2; h++) {
        rows_load(room.b + h * TILE, b.b, row, of_group, t0, T, h * TILE_COLUMNS);
        rows_load(room.c + h * TILE, b.c, row, of_group, t0, T, h * TILE_COLUMNS);
    }
    head_load(room, b, row, chunk, first, 0, heads);
    for (int k = 0; k < heads + 2; k++) {
        cp_async_wait<0>();
        shared_for_products(); /* the copies, and the weights of the head before */
        __syncthreads();
        head_load(room, b, row, chunk, first, k + 1, heads);
        group_step(sums, group, room, b, row, chunk, first, k, heads, at);
    }
    __syncthreads();
    if (group == INNER) pairs_store(sums[1], room.weights, at);
    shared_for_products();
    __syncthreads();
    if (group == ENTER) parts_store(sums, room.weights + TILE, room.b, b.m.dc, b, row, t0, part, at);
    if (group == LEAVE) parts_store(sums, room.weights, room.c, b.m.db, b, row, t0, part, at);
#endif
}

bool ssd_wgmma_backward(struct device *dev, const backward_problem &b, dim3 grid) {
    int size = TILE_ALIGN + (int)sizeof(group_room);
    if (!products_fit(ssd_wgmma_backward_kernel)) return false;
    cuda_expect(dev, cudaFuncSetAttribute(ssd_wgmma_backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size),
                "ssd_backward");
    LAUNCH(dev, ssd_wgmma_backward_kernel, grid, THREADS, size, b);
    return true;
}
