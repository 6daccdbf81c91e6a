/* ssd_chunk_backward.cu: SSD in chunks on tensor cores, backward. ssd_chunk.cu has the equations of forward, factors
 * and walk.
 *
 * Two walks write, for every chunk and head, the state S that enters (again, from the saved ones) and the gradient G of
 * the state that leaves, as bf16. Then every chunk is by itself, here, or on Hopper in ssd_wgmma.cu. With
 * D_ij = dy_i . x_j, CB_ij = c_i . b_j, K_ij = L_ij CB_ij D_ij, V = B G^T, U = dy S:
 *
 *   dx_j  = sum_i CB_ij L_ij dt_j dy_i + leave_j dt_j V_j + d dy_j;    dd = sum_i D_ii
 *   dc_i  = sum_heads (sum_j L_ij dt_j D_ij b_j + enter_i U_i)
 *   db_j  = sum_heads (sum_i L_ij dt_j D_ij c_i + leave_j dt_j G^T x_j)
 *   ddt_j = sum_i K_ij + leave_j x_j . V_j
 *   da_t  = sum_(i>=t) (sum_(j<i) K_ij dt_j - dt_i sum_(j>i) K_ji) + sum_(i>=t) enter_i U_i . c_i
 *         + sum_(j<t) leave_j dt_j x_j . V_j + enter_Q <S, G>,   0 where a run begins
 *
 * The first sum of da, over the run of t, counts the pairs on both sides of t; what cancels are equal fp32 numbers of
 * one chunk.
 *
 * Blocks: one has a chunk of one batch row and some heads of a group, which it takes in turn: CB once, sums of dc, db
 * and of L dt D over the heads in registers; they leave as one partial row for each block and are added in order. 16
 * warps in 4 x 4: warp (r, s) has tokens 16r .. of every product, and columns 16s .. of 64 or 32s .. of 128. Warps
 * above the diagonal have no part of D; they form <S, G> and ddt, da. x, dy, S, G of the next head are copied
 * meanwhile, and what is read across the one barrier of a head has several places. That takes 163 KB; on chips that
 * give a block less, and for views that are not aligned, whose copies wait anyway, all has one place, a head is copied
 * when the one before is done, and 94 KB will do.
 *
 * Scratch: S and G, 2 x 2 bytes for each of chunks x H x P x N: as much as four arrays of the size of x; parts of db,
 * dc.
 *
 * Account, B 8, T 2048, H 64, P 64, N 128, bf16: walks 0.12 ms each; then 805 MB read (x, dy, S, G), 134 MB of dx,
 * 67 MB of parts written and read: 0.24 ms at 4.2 TB/s. A head's chunk, 124 of them a multiprocessor: 990 products
 * m16n8k16, 1,500 clocks; 450 KB in and out of shared memory, 3,600 clocks; 15,000 instructions of warps, 3,800 clocks:
 * 0.26 ms at 1.8 GHz. Expected, one block a multiprocessor: 0.4 ms; in all 0.65 ms.
 *
 * Reproducible: every sum has its order from the shape.
 */
#include "kernels/cuda/shared.cuh"
#include "kernels/cuda/ssd_chunk_backward.cuh"

enum {
    WARPS = 16,
    THREADS = WARPS * WARP,
    HEADS_LEAST = 4, /* heads of a block, if the group has so many */
    HEADS_MOST = 32,
    BLOCKS = 500,    /* wanted: a little less than four in turn on each multiprocessor of a large chip */
    IDLE = 6,        /* warps above the diagonal */
};

static int64_t heads_of_block(struct ssd_shape s) {
    int64_t heads = s.H / s.G, chunks = s.B * ssd_chunks(s) * s.G;
    heads = at_least(at_most(heads / ceil_div(BLOCKS, chunks), HEADS_MOST), HEADS_LEAST);
    return ceil_div(s.H / s.G, ceil_div(s.H / s.G, heads));
}

/* Carves the scratch, or, from NULL, measures it. */
static size_t backward_carve(backward_memory *m, struct ssd_shape s, char *scratch) {
    size_t used = 0;
    auto take = [&](int64_t count, size_t size) {
        void *at = scratch + used;
        used += ((size_t)count * size + 15) / 16 * 16;
        return at;
    };
    int64_t chunks = s.B * ssd_chunks(s) * s.H, splits = ceil_div(s.H / s.G, heads_of_block(s));
    int64_t parts = s.B * s.T * s.G * splits * SSD_N;
    m->factors = (ssd_factors *)take(chunks, sizeof(ssd_factors));
    m->states = (__nv_bfloat16 *)take(chunks * SSD_P * SSD_N, sizeof(__nv_bfloat16));
    m->grads = (__nv_bfloat16 *)take(chunks * SSD_P * SSD_N, sizeof(__nv_bfloat16));
    m->db = (float *)take(parts, sizeof(float));
    m->dc = (float *)take(parts, sizeof(float));
    m->skips = (float *)take(chunks, sizeof(float));
    m->carries = (float *)take(ssd_chunk_carries(s), sizeof(float));
    m->decays = (float *)take(s.B * ssd_chunk_segments(s) * s.H, sizeof(float));
    return used;
}

size_t ssd_chunk_backward_scratch(struct ssd_shape s) {
    backward_memory m;
    return backward_carve(&m, s, NULL);
}

/* --- a chunk ------------------------------------------------------------------------------------------------------ */

/* Sums of one head that go on as numbers for each token: over a warp's j < i of K_ij dt_j, over its i > j of K_ij,
 * K_jj, and over a warp's columns U_i . c_i and x_j . V_j; then parts of <S, G> and of the sum of D_ii. */
struct head_sums {
    float pairs[5][SSD_CHUNK], own[SSD_CHUNK], enters[4][SSD_CHUNK], leaves[4][SSD_CHUNK];
    float through[IDLE], diagonal[4];

    /* By the warps (r, s): of token i those with s <= i / 16, of j those with r >= j / 16. Together they fill five
     * lines. */
    __device__ __forceinline__ float &row(int s, int i) {
        return pairs[s][i];
    }
    __device__ __forceinline__ float &column(int r, int j) {
        return pairs[r + 1][j];
    }
};

/* A head has a place of one; or of two, or three, in turn: what is still read when the head after the next is on its
 * way. */
template <int PLACES> struct backward_room {
    enum { LONGER = PLACES == 2 ? 3 : 1 };
    shared_tile<SSD_N> b, c, s[PLACES], g[PLACES];
    shared_tile<SSD_P> x[PLACES], dy[LONGER];
    shared_tile<SSD_P> weights[PLACES]; /* CB L dt, i x j; in the end the sum over heads of L dt D */
    ssd_factors f[LONGER];
    head_sums sums[PLACES];
};
static_assert(sizeof(backward_room<2>) <= 163 << 10 && sizeof(backward_room<1>) <= SHARED_LEAST, "what chips give");

/* One head's places. */
struct head_room {
    shared_tile<SSD_N> &s, &g;
    shared_tile<SSD_P> &x, &dy, &weights;
    ssd_factors &f;
    head_sums &sums;

    template <int PLACES>
    __device__ __forceinline__ head_room(backward_room<PLACES> &room, int k)
        : s(room.s[k % PLACES]), g(room.g[k % PLACES]), x(room.x[k % PLACES]), dy(room.dy[k % room.LONGER]),
          weights(room.weights[k % PLACES]), f(room.f[k % room.LONGER]), sums(room.sums[k % PLACES]) {
    }
};

/* Where a warp is in the 4 x 4, and a lane in its fragments. */
struct warp_place {
    int lane, g, q, r, s; /* g = lane / 4, q = 2 (lane % 4) */
    int idle;             /* number of a warp above the diagonal; else -1 */
};

/* Warps of a row change places so that the four schedulers, which have every fourth warp each, have as many of the
 * diagonal and below as can be. */
__device__ __forceinline__ warp_place place_of_warp(int lane, int warp) {
    int r = warp / 4, s = (warp + (r == 0 ? 3 : r == 1 ? 1 : 0)) % 4;
    return {lane, lane / 4, lane % 4 * 2, r, s, s <= r ? -1 : r == 0 ? s - 1 : r == 1 ? s + 1 : IDLE - 1};
}

/* What a warp keeps over the heads: its parts of CB and of the sums. */
struct chunk_sums {
    float cb[2][4], dcb[2][4], db[4][4], dc[4][4];
};

/* All columns of the warp's rows. */
__device__ __forceinline__ void rows_fragment(uint32_t (&a)[4][4], shared_tile<SSD_P> &tile, const warp_place &at) {
    int of_rows = down_right<SSD_P>(16 * at.r, 0, at.lane);
#pragma unroll
    for (int k = 0; k < 4; k++) ldmatrix_x4(a[k], tile.from(of_rows, 0, 16 * k));
}

/* D, and what follows from it; `dy` has the warp's rows. For warps on or below the diagonal. */
__device__ __forceinline__ void inner_part(chunk_sums &sums, head_room &head, const uint32_t (&dy)[4][4],
                                           const warp_place &at) {
    float inner[2][4] = {}, rows[2] = {}, diagonal = 0;
    int of_x = right_down<SSD_P>(16 * at.s, 0, at.lane);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t b[4];
        ldmatrix_x4(b, head.x.from(of_x, 0, 16 * k));
        mma_two(inner[0], inner[1], dy[k], b);
    }
    const ssd_factors &f = head.f;
    int i[2] = {16 * at.r + at.g, 16 * at.r + at.g + 8};
    float log[2] = {f.log[i[0]], f.log[i[1]]}, run[2] = {f.run[i[0]], f.run[i[1]]};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        int j = 16 * at.s + 8 * n + at.q;
        float2 logs = two_at(f.log, j), runs = two_at(f.run, j), dts = two_at(f.dt, j);
        float columns[2] = {}, weights[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int h = e / 2, l = e % 2;
            float decay = decay_between(i[h], log[h], run[h], j + l, l ? logs.y : logs.x, l ? runs.y : runs.x);
            float dt = l ? dts.y : dts.x, product = decay * inner[n][e], pair = product * sums.cb[n][e];
            sums.dcb[n][e] += product * dt;
            weights[e] = sums.cb[n][e] * decay * dt;
            if (i[h] == j + l) {
                head.sums.own[j + l] = pair;
                diagonal += inner[n][e];
            } else {
                columns[l] += pair;
                rows[h] += pair * dt;
            }
        }
        head.weights.pair(i[0], j) = pack_bf16(weights[0], weights[1]);
        head.weights.pair(i[1], j) = pack_bf16(weights[2], weights[3]);
        columns[0] = column_sum(columns[0]), columns[1] = column_sum(columns[1]);
        if (at.g == 0) *reinterpret_cast<float2 *>(&head.sums.column(at.r, j)) = make_float2(columns[0], columns[1]);
    }
    rows[0] = quad_sum(rows[0]), rows[1] = quad_sum(rows[1]);
    if (at.q == 0) head.sums.row(at.s, i[0]) = rows[0], head.sums.row(at.s, i[1]) = rows[1];
    if (at.r != at.s) return;
    diagonal = warp_sum(diagonal);
    if (at.lane == 0) head.sums.diagonal[at.r] = diagonal;
}

/* d (16 tokens x 32 states) = rows (16 tokens x P) times a state. */
__device__ __forceinline__ void state_product(float (&d)[4][4], const uint32_t (&rows)[4][4], shared_tile<SSD_N> &state,
                                              const warp_place &at) {
    int of_state = down_right<SSD_N>(0, 32 * at.s, at.lane);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            uint32_t b[4];
            ldmatrix_x4_transposed(b, state.from(of_state, 16 * k, 8 * n));
            mma_two(d[n], d[n + 1], rows[k], b);
        }
}

/* U, its product with c, and its part of dc. */
__device__ __forceinline__ void enter_part(chunk_sums &sums, head_room &head, shared_tile<SSD_N> &c_tile,
                                           const uint32_t (&dy)[4][4], const warp_place &at) {
    float u[4][4] = {};
    state_product(u, dy, head.s, at);
    int of_c = shared_tile<SSD_N>::offset(16 * at.r + at.g, 32 * at.s + at.q);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int i = 16 * at.r + at.g + 8 * h;
        float dot = 0, enter = head.f.enter[i];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t c = *reinterpret_cast<uint32_t *>(c_tile.from(of_c, 8 * h, 8 * n));
            dot += u[n][2 * h] * low_bf16(c) + u[n][2 * h + 1] * high_bf16(c);
            sums.dc[n][2 * h] += enter * u[n][2 * h];
            sums.dc[n][2 * h + 1] += enter * u[n][2 * h + 1];
        }
        dot = quad_sum(dot);
        if (at.q == 0) head.sums.enters[at.s][i] = dot;
    }
}

/* G^T x, into db. */
__device__ __forceinline__ void leave_part(chunk_sums &sums, head_room &head, const warp_place &at) {
    float d[4][4] = {};
    uint32_t x[4][4];
    rows_fragment(x, head.x, at);
    state_product(d, x, head.g, at);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int j = 16 * at.r + at.g + 8 * h;
        float leave = head.f.leave[j] * head.f.dt[j];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            sums.db[n][2 * h] += leave * d[n][2 * h];
            sums.db[n][2 * h + 1] += leave * d[n][2 * h + 1];
        }
    }
}

/* V and its product with x; then dx without the weights' part, in its place. */
__device__ __forceinline__ void value_part(float (&v)[2][4], head_room &head, shared_tile<SSD_N> &b_tile, float skip,
                                           const warp_place &at) {
    int of_b = down_right<SSD_N>(16 * at.r, 0, at.lane), of_g = right_down<SSD_N>(16 * at.s, 0, at.lane);
    int of_pair = shared_tile<SSD_P>::offset(16 * at.r + at.g, 16 * at.s + at.q);
    float odd[2][4] = {}; /* products in two chains wait less for each other */
#pragma unroll
    for (int k = 0; k < SSD_N; k += 32) {
        uint32_t a[2][4], b[2][4];
        ldmatrix_x4(a[0], b_tile.from(of_b, 0, k));
        ldmatrix_x4(b[0], head.g.from(of_g, 0, k));
        ldmatrix_x4(a[1], b_tile.from(of_b, 0, k + 16));
        ldmatrix_x4(b[1], head.g.from(of_g, 0, k + 16));
        mma_two(v[0], v[1], a[0], b[0]);
        mma_two(odd[0], odd[1], a[1], b[1]);
    }
#pragma unroll
    for (int e = 0; e < 8; e++) v[e / 4][e % 4] += odd[e / 4][e % 4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int j = 16 * at.r + at.g + 8 * h;
        float dot = 0, leave = head.f.leave[j] * head.f.dt[j];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t x = *reinterpret_cast<uint32_t *>(head.x.from(of_pair, 8 * h, 8 * n));
            uint32_t dy = *reinterpret_cast<uint32_t *>(head.dy.from(of_pair, 8 * h, 8 * n));
            float &left = v[n][2 * h], &right = v[n][2 * h + 1];
            dot += left * low_bf16(x) + right * high_bf16(x);
            left = leave * left + skip * low_bf16(dy);
            right = leave * right + skip * high_bf16(dy);
        }
        dot = quad_sum(dot);
        if (at.q == 0) head.sums.leaves[at.s][j] = dot;
    }
}

/* <S, G>, by the warps that have nothing of D; both lie in the same order. */
__device__ __forceinline__ void through_part(head_room &head, const warp_place &at) {
    float sum = 0;
    for (int i = at.idle * WARP + at.lane; i < SSD_P * SSD_N / 8; i += IDLE * WARP) {
        uint4 s = *reinterpret_cast<const uint4 *>(head.s.v + 8 * i);
        uint4 g = *reinterpret_cast<const uint4 *>(head.g.v + 8 * i);
        sum += low_bf16(s.x) * low_bf16(g.x) + high_bf16(s.x) * high_bf16(g.x);
        sum += low_bf16(s.y) * low_bf16(g.y) + high_bf16(s.y) * high_bf16(g.y);
        sum += low_bf16(s.z) * low_bf16(g.z) + high_bf16(s.z) * high_bf16(g.z);
        sum += low_bf16(s.w) * low_bf16(g.w) + high_bf16(s.w) * high_bf16(g.w);
    }
    sum = warp_sum(sum);
    if (at.lane == 0) head.sums.through[at.idle] = sum;
}

/* dx, behind the barrier that completes the weights. */
template <bool ALIGNED>
__device__ __forceinline__ void input_part(float (&v)[2][4], head_room &head, const backward_problem &b, int64_t row,
                                           int64_t of_head, int64_t t0, const warp_place &at) {
    int of_weights = right_down<SSD_P>(0, 16 * at.r, at.lane), of_dy = down_right<SSD_P>(0, 16 * at.s, at.lane);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k < at.r) continue;
        uint32_t m[4], dy[4];
        ldmatrix_x4_transposed(m, head.weights.from(of_weights, 16 * k, 0));
        ldmatrix_x4_transposed(dy, head.dy.from(of_dy, 16 * k, 0));
        mma_two(v[0], v[1], m, dy);
    }
    int column = 16 * at.s + row_of_16_column(at.lane);
    int64_t t = t0 + 16 * at.r + at.g;
    __nv_bfloat16 *to = b.dx.data + row * b.dx.row + t * b.dx.step + of_head * b.dx.width + column;
    rows_store<ALIGNED>(to, b.dx.step, (int)at_most(b.p.T - t, SSD_CHUNK), b.dx.width - column, v[0], v[1], at.lane);
}

/* The numbers of a head's tokens, by one warp, behind the same barrier. */
__device__ __forceinline__ void steps_store(head_sums &sums, const ssd_factors &f, const backward_problem &b,
                                            int64_t row, int64_t chunk, int64_t head, int lane) {
    token_sums two[2];
    float through = 0;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int i = 2 * lane + k;
        two[k] = {0, 0, sums.own[i], 0, 0};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            if (w <= i / 16) two[k].rows += sums.row(w, i);
            if (w >= i / 16) two[k].columns += sums.column(w, i);
            two[k].enters += sums.enters[w][i];
            two[k].leaves += sums.leaves[w][i];
        }
    }
    for (int w = 0; w < IDLE; w++) through += sums.through[w];
    float diagonal = sums.diagonal[0] + sums.diagonal[1] + sums.diagonal[2] + sums.diagonal[3];
    ssd_steps_store(two, through, diagonal, f, b, row, chunk, head, lane);
}

/* Start the copies of the k-th head; empty where there is none. */
template <bool ALIGNED, int PLACES>
__device__ __forceinline__ void head_load(backward_room<PLACES> &room, const backward_problem &b, int64_t row,
                                          int64_t chunk, int64_t first, int k, int heads) {
    if (k < heads) {
        head_room head(room, k);
        int64_t place = (row * b.p.chunks + chunk) * b.p.H + first + k;
        tile_load<THREADS, ALIGNED>(head.dy, b.dy, row, first + k, chunk * SSD_CHUNK, b.p.T);
        tile_load<THREADS, ALIGNED>(head.x, b.x, row, first + k, chunk * SSD_CHUNK, b.p.T);
        state_load<THREADS>(head.s, b.m.states + place * (SSD_P * SSD_N));
        state_load<THREADS>(head.g, b.m.grads + place * (SSD_P * SSD_N));
        factors_load<THREADS>(head.f, b.m.factors + place);
    }
    cp_async_commit();
}

/* CB of the warp's 16 x 16. */
template <int PLACES>
__device__ __forceinline__ void group_start(chunk_sums &sums, backward_room<PLACES> &room, const warp_place &at) {
    int of_c = down_right<SSD_N>(16 * at.r, 0, at.lane), of_b = right_down<SSD_N>(16 * at.s, 0, at.lane);
#pragma unroll
    for (int k = 0; k < SSD_N; k += 16) {
        uint32_t a[4], b[4];
        ldmatrix_x4(a, room.c.from(of_c, 0, k));
        ldmatrix_x4(b, room.b.from(of_b, 0, k));
        mma_two(sums.cb[0], sums.cb[1], a, b);
    }
}

/* After all heads: what L dt D brings to dc and db, and both to memory. */
template <int PLACES>
__device__ __forceinline__ void group_end(chunk_sums &sums, backward_room<PLACES> &room, const backward_problem &b,
                                          int64_t row, int64_t t0, int64_t part, const warp_place &at) {
    shared_tile<SSD_P> &weights = room.weights[0];
    __syncthreads();
    if (at.idle < 0) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                weights.pair(16 * at.r + at.g + 8 * h, 16 * at.s + 8 * n + at.q) =
                    pack_bf16(sums.dcb[n][2 * h], sums.dcb[n][2 * h + 1]);
    }
    __syncthreads();
    int of_rows = down_right<SSD_P>(16 * at.r, 0, at.lane), of_columns = right_down<SSD_P>(0, 16 * at.r, at.lane);
    int of_states = down_right<SSD_N>(0, 32 * at.s, at.lane);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4], two[4];
        if (k <= at.r) {
            ldmatrix_x4(a, weights.from(of_rows, 0, 16 * k));
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                ldmatrix_x4_transposed(two, room.b.from(of_states, 16 * k, 8 * n));
                mma_two(sums.dc[n], sums.dc[n + 1], a, two);
            }
        }
        if (k >= at.r) {
            ldmatrix_x4_transposed(a, weights.from(of_columns, 16 * k, 0));
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                ldmatrix_x4_transposed(two, room.c.from(of_states, 16 * k, 8 * n));
                mma_two(sums.db[n], sums.db[n + 1], a, two);
            }
        }
    }
    int64_t parts = b.p.G * b.splits;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int64_t t = t0 + 16 * at.r + at.g + 8 * h;
        int64_t place = ((row * b.p.T + t) * parts + part) * SSD_N + 32 * at.s + at.q;
        if (t >= b.p.T) continue;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            *reinterpret_cast<float2 *>(b.m.db + place + 8 * n) = make_float2(sums.db[n][2 * h], sums.db[n][2 * h + 1]);
            *reinterpret_cast<float2 *>(b.m.dc + place + 8 * n) = make_float2(sums.dc[n][2 * h], sums.dc[n][2 * h + 1]);
        }
    }
}

/* Grid: (groups x splits, chunks, batch rows). */
template <bool ALIGNED, int PLACES>
__global__ void __launch_bounds__(THREADS, 1) ssd_chunk_backward_kernel(backward_problem b) {
    DYNAMIC_SHARED(char, memory);
    backward_room<PLACES> &room = *reinterpret_cast<backward_room<PLACES> *>(memory);
    int64_t part = blockIdx.x, chunk = blockIdx.y, row = blockIdx.z, t0 = chunk * SSD_CHUNK, T = b.p.T;
    int64_t group = part / b.splits, in_group = b.p.H / b.p.G;
    int64_t first = part % b.splits * b.heads;
    int heads = (int)at_most(b.heads, in_group - first);
    int lane = threadIdx.x % WARP;
    warp_place at = place_of_warp(lane, warp_of_block());
    chunk_sums sums = {};
    first += group * in_group;
    tile_load<THREADS, ALIGNED>(room.b, b.b, row, group, t0, T);
    tile_load<THREADS, ALIGNED>(room.c, b.c, row, group, t0, T);
    head_load<ALIGNED>(room, b, row, chunk, first, 0, heads);
    if (PLACES == 2) head_load<ALIGNED>(room, b, row, chunk, first, 1, heads);
    cp_async_wait<PLACES - 1>();
    __syncthreads();
    if (at.idle < 0) group_start(sums, room, at);
    for (int k = 0; k < heads; k++) {
        head_room head(room, k);
        uint32_t dy[4][4];
        float v[2][4] = {};
        rows_fragment(dy, head.dy, at);
        if (at.idle < 0) inner_part(sums, head, dy, at);
        else through_part(head, at);
        enter_part(sums, head, room.c, dy, at);
        leave_part(sums, head, at);
        value_part(v, head, room.b, b.d ? b.d[first + k] : 0.0f, at);
        cp_async_wait<0>();
        __syncthreads(); /* the weights and sums of this head, and the copies of the next */
        if (PLACES == 2) head_load<ALIGNED>(room, b, row, chunk, first, k + 2, heads);
        input_part<ALIGNED>(v, head, b, row, first + k, t0, at);
        if (at.idle == IDLE / 2 + k % (IDLE / 2)) steps_store(head.sums, head.f, b, row, chunk, first + k, lane);
        if (PLACES == 2) continue;
        __syncthreads();
        head_load<ALIGNED>(room, b, row, chunk, first, k + 1, heads);
        cp_async_wait<0>();
        __syncthreads();
    }
    group_end(sums, room, b, row, t0, part, at);
}

/* db or dc (B,T,G,N): the splits' parts added in order; a thread four states of a token. */
__global__ void ssd_parts_kernel(ssd_rows to, const float *parts, ssd_chunked p, int splits) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, token = i / (p.G * (SSD_N / 4));
    int64_t group = i / (SSD_N / 4) % p.G, n = i % (SSD_N / 4) * 4;
    if (token >= p.B * p.T || n >= p.N) return;
    const float *from = parts + (token * p.G + group) * splits * SSD_N + n;
    float sum[4] = {};
    for (int k = 0; k < splits; k++) {
        float4 v = *reinterpret_cast<const float4 *>(from + k * SSD_N);
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    __nv_bfloat16 *at = to.data + token / p.T * to.row + token % p.T * to.step + group * to.width + n;
    if (to.aligned && n + 4 <= p.N) store_floats<4>(at, sum);
    else
        for (int k = 0; k < 4 && n + k < p.N; k++) at[k] = __float2bfloat16_rn(sum[k]);
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

/* The states that enter chunks, and the gradients of those that leave them. */
static void find_states(struct device *dev, const backward_problem &b, const float *saved, const float *initial,
                        float *dinitial, const float *dfinal) {
    ssd_walk right = {}, left = {};
    right.rows = b.x, right.columns = b.b, right.factors = b.m.factors, right.states = b.m.states;
    right.from = b.p.segments > 1 ? saved : initial;
    ssd_walk_chunks(dev, right, b.p, false);
    left.rows = b.dy, left.columns = b.c, left.factors = b.m.factors;
    if (b.p.segments > 1) ssd_carry_segments(dev, b.m.carries, b.m.decays, left, dfinal, b.p, true);
    left.from = b.p.segments > 1 ? b.m.carries : dfinal;
    left.states = b.m.grads, left.end = dinitial;
    ssd_walk_chunks(dev, left, b.p, true);
}

void ssd_chunk_backward(struct device *dev, tensor dx, tensor ddt, tensor da, tensor db, tensor dc, tensor dinitial,
                        tensor dd, tensor dy, tensor dfinal, const void *saved, tensor x, tensor dt, tensor a, tensor b,
                        tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch) {
    (void)chunk; /* one length for all shapes */
    struct ssd_shape shape = {x.dim[0], x.dim[1], x.dim[2], x.dim[3], b.dim[2], b.dim[3], 0};
    backward_problem problem = {};
    ssd_chunked &p = problem.p = ssd_chunked_of(shape);
    problem.heads = (int)heads_of_block(shape), problem.splits = (int)ceil_div(p.H / p.G, problem.heads);
    problem.d = data_of<float>(d), problem.ddt = data_of<float>(ddt), problem.da = data_of<float>(da);
    problem.dx = ssd_rows_of(dx), problem.dy = ssd_rows_of(dy), problem.x = ssd_rows_of(x);
    problem.b = ssd_rows_of(b), problem.c = ssd_rows_of(c), problem.dd = tensor_given(dd);
    backward_carve(&problem.m, shape, (char *)scratch);
    ssd_find_factors(dev, problem.m.factors, dt, a, doc, p);
    find_states(dev, problem, (const float *)saved, data_of<float>(initial), data_of<float>(dinitial),
                data_of<float>(dfinal));
    bool aligned = problem.dx.aligned && problem.dy.aligned && problem.x.aligned;
    aligned = aligned && problem.b.aligned && problem.c.aligned;
    bool two = aligned && cuda_shared_most(dev) >= sizeof(backward_room<2>);
    size_t size = two ? sizeof(backward_room<2>) : sizeof(backward_room<1>);
    auto kernel = two ? ssd_chunk_backward_kernel<true, 2>
                  : aligned ? ssd_chunk_backward_kernel<true, 1> : ssd_chunk_backward_kernel<false, 1>;
    dim3 grid((unsigned)(p.G * problem.splits), (unsigned)p.chunks, (unsigned)p.B);
    if (!aligned || !ssd_wgmma_backward(dev, problem, grid)) {
        allow_shared(dev, kernel, size, "ssd_backward");
        LAUNCH(dev, kernel, grid, THREADS, size, problem);
    }
    dim3 tokens((unsigned)ceil_div(p.B * p.T * p.G * (SSD_N / 4), 256));
    LAUNCH(dev, ssd_parts_kernel, tokens, 256, 0, ssd_rows_of(db), problem.m.db, p, problem.splits);
    LAUNCH(dev, ssd_parts_kernel, tokens, 256, 0, ssd_rows_of(dc), problem.m.dc, p, problem.splits);
    if (problem.dd) cuda_add_partials(dev, data_of<float>(dd), problem.m.skips, p.B * p.chunks, p.H);
}
