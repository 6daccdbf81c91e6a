/* attention_wgmma.cu: attention by Hopper's products of groups of warps (wgmma.cuh): bf16, heads of a multiple of 8
 * channels up to 128, no cache. attention.cu has the mathematics; attention_mma.cu the same by the products of single
 * warps, whose operands all come from shared memory through registers, which is what bounds them; here second
 * operands are read where they lie, and products go on while other warps are busy with exponentials.
 *
 * Heads are padded with zeros to one or two tiles of 64 channels. Forward and dq: a group of warps has 64 queries of
 * one head; it walks over keys in tiles of 64, with the block's other groups. dk and dv: a group has 64 keys, walking
 * over the queries of all heads that share them, with scores transposed. Scores stay in registers and are, rounded,
 * the first operand of the next product. Scores and their gradients are made twice in backward, so that every sum
 * belongs to one group: nothing is added atomically, and two runs give the same bits. One group's exponentials hide
 * behind another's products: registers leave a multiprocessor four groups (two blocks of two) for forward and dq with
 * heads of 64, three (one block) with 128, and for dk and dv three and two, a block each: groups of one block that
 * shared the queries loaded less and waited for each other, 561 us for 513 on an H100.
 *
 * A group's own products hide, too: those that add a tile to the sums are asked for with the next tile's scores, and
 * go on behind its exponentials; in backward, the products of output gradients with values then go on behind the
 * second half of those. So no product waits alone but the scores'. (Registers allow no more: with heads of 64, a
 * thread may have 128, in dk and dv 168.)
 *
 * 64 x 64 scores are, in clocks of a multiprocessor: 128 for each product (forward 2, dq 3, dk and dv 4; twice that
 * with heads of 128), 256 for exponentials, and 310 (forward), 280 (dq) and 400 (dk and dv) of its four schedulers'
 * for all instructions of a warp; of shared memory 128 for a product of two operands from there, 64 with one in
 * registers, and with dk and dv 128 for copies and 64 for facts of queries, 576. Full causal attention of B 16, T 2048,
 * 12 heads of 64 has 101,000 of them, 770 a multiprocessor. Predicted from 450, 500 and 750 clocks: forward 0.2 ms, dq
 * 0.22, dk and dv 0.33; an H100 took 0.32, 0.36 and 0.43 (0.51 with 540 clocks of instructions and 768 of shared
 * memory). Documents leave tiles out. */
#include "kernels/cuda/attention_tensor.cuh"
#include "kernels/cuda/wgmma.cuh"

enum {
    SLOTS = 4, /* of tiles on their way and in use, forward and dq */
    TILE = KEYS * TILE_COLUMNS,
};

/* Groups of a block of forward and dq. */
__host__ __device__ constexpr int query_groups(int tiles) {
    return tiles == 1 ? 2 : 3;
}

/* Tiles on their way and in use, dk and dv. */
__host__ __device__ constexpr int dkv_slots(int tiles) {
    return tiles == 1 ? 3 : 2;
}

static_assert(KEYS == 64 && BACK_QUERIES == 64, "tiles are square");

#ifndef WITHOUT_WGMMA
/* Eight of an accumulator's groups of columns, from 8 t on. */
template <int N> __device__ __forceinline__ float (&columns_of(float (&sum)[N][4], int t))[8][4] {
    return *reinterpret_cast<float(*)[8][4]>(&sum[8 * t]);
}

/* A number that all lanes have, so that the compiler knows it, too: addresses made of it are a warp's, not a lane's. */
__device__ __forceinline__ int same_in_warp(int number) {
    return __shfl_sync(FULL, number, 0);
}

/* True. The compiler draws waits for products in front of arithmetic, which was to go on behind them; but not out of
 * the block behind a branch that it cannot foresee. */
__device__ __forceinline__ bool always(const attention_problem &p) {
    return p.T > 0;
}

/* z = a b^T over all channels of TILES tiles, which lie so many elements apart; to be ended and waited for. */
template <int TILES>
__device__ __forceinline__ void start_scores(float (&z)[8][4], matrix a, int a_apart, matrix b, int b_apart) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int k = 0; k < TILE_COLUMNS; k += 16)
            product_of_rows(z, matrix_columns(matrix_rows(a, t * a_apart / TILE_COLUMNS), k),
                            matrix_columns(matrix_rows(b, t * b_apart / TILE_COLUMNS), k), t > 0 || k > 0);
}

/* sum += a b. */
template <int TILES>
__device__ __forceinline__ void start_sums(float (&sum)[8 * TILES][4], const uint32_t (&a)[4][4], matrix b) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int k = 0; k < 4; k++) product_of_columns(columns_of(sum, t), a[k], matrix_rows(b, t * KEYS + 16 * k));
}

template <int TILES> __device__ __forceinline__ void all_arrived(float (&sum)[8 * TILES][4]) {
#pragma unroll
    for (int t = 0; t < TILES; t++) arrived(columns_of(sum, t));
}

/* Rows of a head into its tiles: `there` of ROWS, which lie `step` apart from `first` on. */
template <int N, int TILES, int ROWS>
__device__ __forceinline__ void load_tiles(bf16 *tiles, int P, const bf16 *first, int64_t step, int there) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
        load_rows<N, TILE_COLUMNS, ROWS>(tiles + t * ROWS * TILE_COLUMNS, P - t * TILE_COLUMNS,
                                         first + t * TILE_COLUMNS, step, there, threadIdx.x % N);
}

/* The keys and values of a head on their way into slots, tile by tile; behind the last there is nothing: a group of
 * copies either way. Group 0 asks for keys, group 1 for values. */
template <int TILES> struct key_loads {
    const bf16 *from;
    int64_t step;
    int group, left;

    __device__ __forceinline__ key_loads(const operands &x, int64_t b, int g, int start, int end, int group)
        : from(group == 0 ? x.k.at(b, start, g) : x.v.at(b, start, g)), step(group == 0 ? x.k.step : x.v.step),
          group(group), left(end - start) {
    }

    __device__ __forceinline__ void next(bf16 *slot, int P) {
        if (left > 0 && group < 2) load_tiles<WARPGROUP, TILES, KEYS>(slot + group * TILES * TILE, P, from, step, left);
        cp_async_commit();
        from += KEYS * step, left -= KEYS;
    }
};

/* Sums of 16 rows a warp to where they belong, through tiles that nobody reads any more. */
template <int TILES, class F>
__device__ __forceinline__ void store_sums(bf16 *tiles, int apart, int row, float (&sum)[8 * TILES][4], float upper,
                                           float lower, int P, F to) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
        store_sum<TILE_COLUMNS>(tiles + t * apart, row, columns_of(sum, t), upper, lower, P - t * TILE_COLUMNS,
                                [&](int i) { return to(i) ? to(i) + t * TILE_COLUMNS : (bf16 *)NULL; });
}
#endif

/* --- forward ------------------------------------------------------------------------------------------------------ */

/* A tile's values are multiplied with the next tile's scores on their way; with the first tile's, zeros are. So the
 * slot of the tile before last is free when all have passed a tile's barrier: whoever did has waited for its products.
 * Every group has a tile. */
template <int TILES>
__global__ void __launch_bounds__(WARPGROUP * query_groups(TILES), TILES == 1 ? 2 : 1)
wgmma_forward_kernel(attention_rows<bf16> o, float *lse, operands x, attention_problem p) {
#ifndef WITHOUT_WGMMA
    constexpr int SLOT = 2 * TILES * TILE, ROWS = 64 * query_groups(TILES), QUERY_TILE = ROWS * TILE_COLUMNS;
    constexpr int THREADS = WARPGROUP * query_groups(TILES);
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = tile_start(memory), *slots = queries + TILES * QUERY_TILE;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = (int)(gridDim.x - 1 - blockIdx.x) * ROWS, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * 16, t = t0 + row + lane / 4, end = (int)at_most(t0 + ROWS, p.T);
    int group = same_in_warp(threadIdx.x / WARPGROUP * 64), last = t0 + group + 63;
    int start = same_in_warp(first_key(p, b, t0));
    int group_first = first_key(p, b, (int)at_most(t0 + group, p.T - 1));
    int last_first = first_key(p, b, (int)at_most(last, p.T - 1));
    int first[2] = {first_key(p, b, t), first_key(p, b, t + 8)};
    float high[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, sum[1][8 * TILES][4] = {};
    uint32_t a[4][4] = {}; /* the tile before's probabilities */
    const bf16 *before = NULL;
    load_tiles<THREADS, TILES, ROWS>(queries, p.P, x.q.at(b, t0, h), x.q.step, end - t0);
    key_loads<TILES> loads(x, b, g, start, end, group / 64);
    loads.next(slots, p.P);
    loads.next(slots + SLOT, p.P);
    for (int j0 = start, n = 0; j0 < end; j0 += KEYS, n++) {
        const bf16 *slot = slots + n % SLOTS * SLOT;
        cp_async_wait<1>();
        shared_for_products();
        __syncthreads();
        loads.next(slots + (n + 2) % SLOTS * SLOT, p.P);
        if (j0 > last || j0 + KEYS <= group_first) continue;
        float z[1][8][4], rest[2];
        products_begin();
        start_scores<TILES>(z[0], matrix_rows(matrix_at(queries), group), QUERY_TILE, matrix_at(slot), TILE);
        products_end();
        products_begin();
        start_sums<TILES>(sum[0], a, matrix_at((before ? before : slot) + TILES * TILE));
        products_end();
        before = slot;
        products_wait<1>();
        arrived(z[0]);
        if (j0 + KEYS > t0 + group + 1 || j0 < last_first || last >= p.T) hide_scores<1>(z, first, t, j0);
        if (always(p)) raise_scores<1>(z, rest, high, total, p.scale * LOG2E);
        products_wait<0>();
        all_arrived<TILES>(sum[0]);
        arrived(a);
        scale_sums<1, TILES * TILE_COLUMNS>(sum, rest);
#pragma unroll
        for (int k = 0; k < 4; k++) pack_scores(a[k], z[0], k);
    }
    products_begin();
    start_sums<TILES>(sum[0], a, matrix_at(before + TILES * TILE));
    products_end();
    products_wait<0>();
    all_arrived<TILES>(sum[0]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] = row_sum(total[r]);
        if (lse && lane % 4 == 0 && t + 8 * r < p.T)
            lse[(b * p.H + h) * p.T + t + 8 * r] = high[r] * p.scale + logf(total[r]);
        total[r] = 1.0f / total[r];
    }
    __syncthreads(); /* nobody reads queries any more */
    store_sums<TILES>(queries, QUERY_TILE, row, sum[0], total[0], total[1], p.P,
                      [&](int i) { return t0 + i < p.T ? o.at(b, t0 + i, h) : (bf16 *)NULL; });
#endif
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* The product of two rows of at most `width`, as far as a lane of four has it. */
__device__ __forceinline__ float part_of_delta(const bf16 *x, const bf16 *y, int P, int width) {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < width; c += 32) {
        float left[8], right[8];
        int at = c + threadIdx.x % 4 * 8;
        if (at >= P) continue;
        load_floats<8>(left, x + at);
        load_floats<8>(right, y + at);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += left[k] * right[k];
    }
    return sum;
}

/* Leaves delta for the kernel behind it. */
template <int TILES>
__global__ void __launch_bounds__(WARPGROUP * query_groups(TILES), TILES == 1 ? 2 : 1)
wgmma_dq_kernel(attention_rows<bf16> dq, float *delta, attention_rows<bf16> dout, attention_rows<bf16> o,
                const float *lse, operands x, attention_problem p) {
#ifndef WITHOUT_WGMMA
    constexpr int SLOT = 2 * TILES * TILE, ROWS = 64 * query_groups(TILES), QUERY_TILE = ROWS * TILE_COLUMNS;
    constexpr int THREADS = WARPGROUP * query_groups(TILES);
    DYNAMIC_SHARED(bf16, memory);
    bf16 *queries = tile_start(memory), *douts = queries + TILES * QUERY_TILE, *slots = douts + TILES * QUERY_TILE;
    int64_t b = blockIdx.z;
    int h = blockIdx.y, g = key_head(p, h), t0 = (int)(gridDim.x - 1 - blockIdx.x) * ROWS, lane = threadIdx.x % WARP;
    int row = threadIdx.x / WARP * 16, t = t0 + row + lane / 4, end = (int)at_most(t0 + ROWS, p.T);
    int group = same_in_warp(threadIdx.x / WARPGROUP * 64), last = t0 + group + 63;
    int start = same_in_warp(first_key(p, b, t0));
    int group_first = first_key(p, b, (int)at_most(t0 + group, p.T - 1));
    int last_first = first_key(p, b, (int)at_most(last, p.T - 1));
    int first[2] = {first_key(p, b, t), first_key(p, b, t + 8)};
    float log_sum[2], dot[2], sum[8 * TILES][4] = {};
    uint32_t a[4][4] = {}; /* the tile before's gradients */
    const bf16 *before = NULL;
    load_tiles<THREADS, TILES, ROWS>(queries, p.P, x.q.at(b, t0, h), x.q.step, end - t0);
    load_tiles<THREADS, TILES, ROWS>(douts, p.P, dout.at(b, t0, h), dout.step, end - t0);
    key_loads<TILES> loads(x, b, g, start, end, group / 64);
    loads.next(slots, p.P);
    loads.next(slots + SLOT, p.P);
    for (int r = 0; r < 2; r++) {
        bool there = t + 8 * r < p.T;
        const bf16 *d_row = dout.at(b, t + 8 * r, h), *o_row = o.at(b, t + 8 * r, h);
        float part = there ? part_of_delta(d_row, o_row, p.P, TILES * TILE_COLUMNS) : 0;
        log_sum[r] = there ? lse[(b * p.H + h) * p.T + t + 8 * r] * LOG2E : 0.0f;
        dot[r] = row_sum(part);
        if (there && lane % 4 == 0) delta[(b * p.H + h) * p.T + t + 8 * r] = dot[r];
    }
    for (int j0 = start, n = 0; j0 < end; j0 += KEYS, n++) {
        const bf16 *slot = slots + n % SLOTS * SLOT;
        cp_async_wait<1>();
        shared_for_products();
        __syncthreads();
        loads.next(slots + (n + 2) % SLOTS * SLOT, p.P);
        if (j0 > last || j0 + KEYS <= group_first) continue;
        float z[8][4], dz[8][4];
        products_begin();
        start_scores<TILES>(z, matrix_rows(matrix_at(queries), group), QUERY_TILE, matrix_at(slot), TILE);
        products_end();
        products_begin();
        start_sums<TILES>(sum, a, matrix_at(before ? before : slot));
        products_end();
        before = slot;
        products_wait<1>();
        arrived(z);
        if (always(p)) {
#pragma unroll
            for (int i = 0; i < 16; i++)
                z[i / 4][i % 4] = power_of_two(z[i / 4][i % 4] * (p.scale * LOG2E) - log_sum[i / 2 % 2]);
        }
        products_wait<0>();
        all_arrived<TILES>(sum);
        arrived(a);
        products_begin();
        start_scores<TILES>(dz, matrix_rows(matrix_at(douts), group), QUERY_TILE, matrix_at(slot + TILES * TILE), TILE);
        products_end();
#pragma unroll
        for (int i = 16; i < 32; i++)
            z[i / 4][i % 4] = power_of_two(z[i / 4][i % 4] * (p.scale * LOG2E) - log_sum[i / 2 % 2]);
        if (j0 + KEYS > t0 + group + 1 || j0 < last_first || last >= p.T) {
#pragma unroll
            for (int i = 0; i < 32; i++) {
                int r = i / 2 % 2, j = j0 + i / 4 * 8 + 2 * (lane % 4) + i % 2;
                if (j < first[r] || j > t + 8 * r) z[i / 4][i % 4] = 0.0f;
            }
        }
        products_wait<0>();
        arrived(dz);
#pragma unroll
        for (int i = 0; i < 32; i++) z[i / 4][i % 4] *= dz[i / 4][i % 4] - dot[i / 2 % 2];
#pragma unroll
        for (int k = 0; k < 4; k++) pack_scores(a[k], z, k);
    }
    products_begin();
    start_sums<TILES>(sum, a, matrix_at(before));
    products_end();
    products_wait<0>();
    all_arrived<TILES>(sum);
    __syncthreads(); /* nobody reads queries any more */
    store_sums<TILES>(queries, QUERY_TILE, row, sum, p.scale, p.scale, p.P,
                      [&](int i) { return t0 + i < p.T ? dq.at(b, t0 + i, h) : (bf16 *)NULL; });
#endif
}

/* Where the queries that see some of the keys j0 .. of row b end, in whole tiles: the same for all heads. */
__device__ __forceinline__ int queries_end(const attention_problem &p, int64_t b, int j0) {
    int end = j0, seen;
    do {
        int t = end + (int)threadIdx.x * BACK_QUERIES;
        seen = __syncthreads_count(t < p.T && first_key(p, b, t) < j0 + KEYS);
        end += seen * BACK_QUERIES;
    } while (seen == WARPGROUP);
    return end;
}

/* The queries of a block of keys on their way: those that see any, of all heads that share the keys, tile by tile. */
template <int TILES> struct query_loads {
    int i, t0, end;           /* the head and first token of the next tile; where a head's tokens end */
    const bf16 *query, *dout; /* what the thread copies first of it */
    const float *fact;        /* lse or delta of a query */

    __device__ __forceinline__ void point(const operands &x, const attention_rows<bf16> &douts, const float *delta,
                                          const float *lse, const attention_problem &p, int64_t b, int g, int j0) {
        int h = query_head(p, g, i), row = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
        t0 = j0;
        query = x.q.at(b, t0, h) + row * x.q.step + column;
        dout = douts.at(b, t0, h) + row * douts.step + column;
        fact = (threadIdx.x < BACK_QUERIES ? lse : delta) + (b * p.H + h) * p.T + t0 + threadIdx.x % BACK_QUERIES;
    }

    /* Rows row, row + 16 .. of a tile: the exchange of columns is the same for all of them. */
    __device__ __forceinline__ void start_rows(bf16 *tiles, const bf16 *from, int64_t step, int there, int P) {
        int row = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
        bf16 *to = tiles + place<TILE_COLUMNS>(row, column);
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int k = 0; k < BACK_QUERIES; k += 16)
                cp_async_16_or_zeros(to + t * TILE + k * TILE_COLUMNS, from + k * step + t * TILE_COLUMNS,
                                     row + k < there && column + t * TILE_COLUMNS < P);
    }

    __device__ __forceinline__ void start(bf16 *slot, query_facts &facts, const operands &x,
                                          const attention_rows<bf16> &douts, const attention_problem &p, int64_t b) {
        int there = (int)p.T - t0, i = threadIdx.x % BACK_QUERIES, bytes = i < there ? 4 : 0;
        start_rows(slot, query, x.q.step, there, p.P);
        start_rows(slot + TILES * TILE, dout, douts.step, there, p.P);
        cp_async<4>(threadIdx.x < BACK_QUERIES ? &facts.log_sum[i] : &facts.dot[i], fact, bytes);
        if (threadIdx.x >= BACK_QUERIES) return;
        if (p.positions) cp_async<4>(&facts.position[i], p.positions + b * p.T + t0 + i, bytes);
        else facts.position[i] = t0 + i;
    }
};

/* The sums of a tile go on behind the next one's scores, as above. Of three slots, that of the tile before last is
 * free; of two, that of the tile before when all have waited for its sums. */
template <int TILES>
__global__ void __launch_bounds__(WARPGROUP, TILES == 1 ? 3 : 2)
wgmma_dkv_kernel(attention_rows<bf16> dk, attention_rows<bf16> dv, attention_rows<bf16> dout, const float *delta,
                 const float *lse, operands x, attention_problem p) {
#ifndef WITHOUT_WGMMA
    constexpr int SLOT = 2 * TILES * TILE, SLOTS = dkv_slots(TILES);
    DYNAMIC_SHARED(bf16, memory);
    bf16 *keys = tile_start(memory), *values = keys + TILES * TILE, *slots = values + TILES * TILE;
    query_facts *facts = (query_facts *)(slots + SLOTS * SLOT);
    int64_t b = blockIdx.z;
    int g = blockIdx.y, j0 = blockIdx.x * KEYS, lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16;
    float sum_k[8 * TILES][4] = {}, sum_v[8 * TILES][4] = {};
    uint32_t a[4][4] = {}, da[4][4] = {}; /* the tile before's probabilities and gradients */
    load_tiles<WARPGROUP, TILES, KEYS>(keys, p.P, x.k.at(b, j0, g), x.k.step, (int)at_most(KEYS, p.T - j0));
    load_tiles<WARPGROUP, TILES, KEYS>(values, p.P, x.v.at(b, j0, g), x.v.step, (int)at_most(KEYS, p.T - j0));
    query_loads<TILES> loads = {0, j0, 0, NULL, NULL, NULL};
    loads.point(x, dout, delta, lse, p, b, g, j0);
    loads.start(slots, facts[0], x, dout, p, b);
    loads.end = same_in_warp(queries_end(p, b, j0));
    int now = j0, turn = 0, before = 0; /* the first token and slot of the tile at work; the slot before */
    for (int left = p.share * ((loads.end - j0) / BACK_QUERIES); left > 0; left--, now = loads.t0) {
        const bf16 *slot = slots + turn * SLOT, *last = slots + before * SLOT;
        const query_facts &its = facts[turn];
        cp_async_commit();
        cp_async_wait<0>();
        shared_for_products();
        __syncthreads();
        float z[8][4], dz[8][4];
        products_begin();
        start_scores<TILES>(z, matrix_at(keys), TILE, matrix_at(slot), TILE);
        products_end();
        products_begin();
        start_sums<TILES>(sum_v, a, matrix_at(last + TILES * TILE));
        start_sums<TILES>(sum_k, da, matrix_at(last));
        products_end();
        products_wait<1>();
        arrived(z);
        if (always(p)) raise_back_scores<0, 16>(z, its, p.scale * LOG2E);
        products_wait<0>();
        all_arrived<TILES>(sum_v);
        all_arrived<TILES>(sum_k);
        arrived(a);
        arrived(da);
        if (SLOTS == 2) __syncthreads(); /* nobody reads the tile before any more */
        products_begin();
        start_scores<TILES>(dz, matrix_at(values), TILE, matrix_at(slot + TILES * TILE), TILE);
        products_end();
        before = turn, turn = turn + 1 == SLOTS ? 0 : turn + 1;
        if (left > 1) {
            loads.t0 += BACK_QUERIES, loads.fact += BACK_QUERIES;
            loads.query += BACK_QUERIES * x.q.step, loads.dout += BACK_QUERIES * dout.step;
            if (loads.t0 >= loads.end) loads.i++, loads.point(x, dout, delta, lse, p, b, g, j0);
            loads.start(slots + turn * SLOT, facts[turn], x, dout, p, b);
        }
        raise_back_scores<16, 16>(z, its, p.scale * LOG2E);
        if (back_masks(its, p, j0, KEYS, now)) hide_back_scores(z, its, p, j0 + row + lane / 4, now);
        products_wait<0>();
        arrived(dz);
        take_back_gradients(dz, z, its);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            pack_scores(a[k], z, k);
            pack_scores(da[k], dz, k);
        }
    }
    const bf16 *last = slots + before * SLOT;
    products_begin();
    start_sums<TILES>(sum_v, a, matrix_at(last + TILES * TILE));
    start_sums<TILES>(sum_k, da, matrix_at(last));
    products_end();
    products_wait<0>();
    all_arrived<TILES>(sum_v);
    all_arrived<TILES>(sum_k);
    __syncthreads(); /* nobody reads keys and values any more */
    store_sums<TILES>(keys, TILE, row, sum_k, p.scale, p.scale, p.P,
                      [&](int i) { return j0 + i < p.T ? dk.at(b, j0 + i, g) : (bf16 *)NULL; });
    store_sums<TILES>(values, TILE, row, sum_v, 1, 1, p.P,
                      [&](int i) { return j0 + i < p.T ? dv.at(b, j0 + i, g) : (bf16 *)NULL; });
#endif
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

static bool serves(const attention_problem &p) {
    return !p.count && products_fit(wgmma_forward_kernel<1>);
}

/* with_tiles(P, [&](auto tiles) { constexpr int TILES = tiles.value; ... }) */
template <class F> static void with_tiles(int P, F f) {
    if (P <= TILE_COLUMNS) f(constant<1>());
    else f(constant<2>());
}

bool attention_wgmma_forward(struct device *dev, tensor o, tensor lse, const operands &x, const attention_problem &p) {
    if (!serves(p)) return false;
    with_tiles(p.P, [&](auto tiles) {
        constexpr int TILES = tiles.value;
        constexpr int ROWS = 64 * query_groups(TILES);
        size_t bytes = TILE_ALIGN + TILES * (ROWS + SLOTS * 2 * KEYS) * TILE_COLUMNS * sizeof(bf16);
        allow_shared(dev, wgmma_forward_kernel<TILES>, bytes, "attention");
        LAUNCH(dev, wgmma_forward_kernel<TILES>, grid_of(p, ROWS, p.H), 2 * ROWS, bytes, attention_rows_of<bf16>(o),
               data_of<float>(lse), x, p);
    });
    return true;
}

bool attention_wgmma_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                              const operands &x, const attention_problem &p, float *delta) {
    if (!serves(p)) return false;
    attention_rows<bf16> douts = attention_rows_of<bf16>(dout);
    with_tiles(p.P, [&](auto tiles) {
        constexpr int TILES = tiles.value;
        constexpr int ROWS = 64 * query_groups(TILES);
        size_t of_dq = TILE_ALIGN + TILES * (2 * ROWS + SLOTS * 2 * KEYS) * TILE_COLUMNS * sizeof(bf16);
        size_t of_dkv = TILE_ALIGN + TILES * (1 + dkv_slots(TILES)) * 2 * TILE * sizeof(bf16);
        of_dkv += dkv_slots(TILES) * sizeof(query_facts);
        allow_shared(dev, wgmma_dq_kernel<TILES>, of_dq, "attention");
        allow_shared(dev, wgmma_dkv_kernel<TILES>, of_dkv, "attention");
        LAUNCH(dev, wgmma_dq_kernel<TILES>, grid_of(p, ROWS, p.H), 2 * ROWS, of_dq, attention_rows_of<bf16>(dq),
               delta, douts, attention_rows_of<bf16>(o), data_of<float>(lse), x, p);
        LAUNCH(dev, wgmma_dkv_kernel<TILES>, grid_of(p, KEYS, p.G), WARPGROUP, of_dkv, attention_rows_of<bf16>(dk),
               attention_rows_of<bf16>(dv), douts, delta, data_of<float>(lse), x, p);
    });
    return true;
}
