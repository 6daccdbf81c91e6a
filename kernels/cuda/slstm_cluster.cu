/* slstm_cluster.cu: the sLSTM over a whole sequence in one kernel: bf16, on chips with clusters (sm_90 on). slstm.cu is
 * the way for everything else.
 *
 * A cluster of blocks has one head of SLSTM_ROWS = 8 batch rows and walks all tokens; its blocks share the head's units.
 * r stays in registers for the whole walk, as fragments of mma, bf16. Clusters know nothing of each other, so heads and
 * groups of rows fill the chip side by side, several blocks on a multiprocessor where there are many.
 *
 * Forward. A block has `units` units, a warp eight of them with all four gates: two products of 16 x 8 (gates i, f of
 * eight units; gates z, o) x (8 rows) over k. So a lane finds all gates of unit lane/4 and of rows 2 (lane%4), + 1 in its
 * own registers, and the pointwise part, states in fp32, touches no other lane. y goes in bf16, 16 bytes a row and eight
 * units, into the shared memory of every block of the cluster, where it waits as the other operand of the next product.
 * Nothing but these bytes synchronises: they raise a flag there when all P x 8 have come (cluster.cuh). Two buffers and
 * flags in turns are enough, because nobody can send y[t+1] before everybody's y[t] came, so before everybody has read
 * y[t-1]. Heads of more than 256 units have two warps for eight units, each with half of k; they exchange the sums of
 * one row of two, so that the pointwise part halves, too.
 *
 * Backward. The block has the same units, their draw (4 gates x units) is the operand, and its product with r^T is a part
 * of what comes to all P units of the head: 16 bytes... each warp has a share of the rows of r^T and sends its sums, fp32, to
 * the blocks that own those units, which add up the parts in the order of the blocks. The chain from dy to draw is
 * short because forward left factors (slstm.cuh), which come through a ring of STAGES tokens in shared memory, as x does
 * in forward.
 *
 *   P            blocks  units  warps  r in registers (a lane, forward / backward)
 *   <= 16, 32, 64  1, 2, 4   16    2      32 / 64
 *   <= 128         8         16    2      64 / 64
 *   <= 192         8         24    3      96 / 96
 *   <= 256         8         32    4      128 / 128
 *   <= 384         8         48    12     96 / 96
 *   <= 512         16        32    8      128 / 128    (16 blocks are more than every chip grants: else slstm.cu)
 *   P must be a multiple of 8, rows of x, y and their gradients aligned to 16 bytes.
 *
 * Account of one step, P 192, in cycles of 0.57 ns (H100 at 1.75 GHz):
 *   forward: flag seen 30, ldmatrix 45, 24 mma on four chains 200, pointwise 180 (softplus 65, two exponentials 45,
 *     1/n and products 50), staging 60, on the way to the other blocks 250 (3 KB arrive at a block, at about 16 bytes a
 *     clock): 770 = 0.44 us. x, saved factors and y to memory run beside it.
 *   backward: flag 30, eight parts added 70, pointwise 30, draw to shared memory and barrier 60, ldmatrix 40, 24 mma 200, on
 *     the way 400 (6 KB): 830 = 0.48 us.
 * Bytes, B 16, T 1024, D 768: forward 226 (x) + 25 (y) + 252 (saved) MB, 0.17 ms; so the chain is what counts: 0.45 and
 * 0.5 ms, besides dr.
 *
 * Every sum has an order that the shape fixes.
 */
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/slstm.cuh"

enum {
    SLSTM_ROWS = 8, /* batch rows of a cluster: the columns of mma */
    SLSTM_EIGHT = 8, /* units of a warp */
    STAGES = 4,     /* tokens of x, or of factors, that are on their way or there */
    MATRIX = 128,   /* bytes of eight rows' eight bf16 */
};

typedef __nv_bfloat16 bf16;

/* How a head is laid out on a cluster. */
struct cluster_plan {
    unsigned blocks, units; /* units of a block */
    int split;              /* warps for eight units */
    int tiles;              /* forward: k of a warp, in sixteens */
};

static cluster_plan plan_of(int64_t P) {
    cluster_plan c;
    c.blocks = P <= 16 ? 1 : P <= 32 ? 2 : P <= 64 ? 4 : P <= 384 ? 8 : 16;
    c.units = P <= 128 ? 16 : P <= 192 ? 24 : P > 256 && P <= 384 ? 48 : 32;
    c.split = P <= 256 ? 1 : 2;
    c.tiles = P <= 64 ? 4 : P <= 128 ? 8 : P <= 192 || (P > 256 && P <= 384) ? 12 : 16;
    return c;
}

static unsigned threads_of(cluster_plan c) {
    return c.units / SLSTM_EIGHT * (unsigned)c.split * WARP;
}

/* What both kernels are given. */
struct cluster_job {
    slstm_problem p;
    const bf16 *r;
    slstm_saved<bf16> saved;
    int units, active; /* of a block; blocks that have units */
};

/* Where a thread stands. */
template <int SPLIT> struct cluster_seat {
    enum { PAIRS = SPLIT == 1 ? 2 : 1, ROWS = SLSTM_ROWS / SPLIT };
    int lane, warp, group, groups, half; /* group: of eight units, of the block's groups */
    int g, q, rank;
    int64_t head, b0, bunch; /* bunch: which eight rows */
    int64_t j0, unit;        /* of the group's first unit, within the head; of the lane's, among all D */
    bool there;              /* the group has units */

    __device__ __forceinline__ cluster_seat(const cluster_job &a) {
        lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = warp / SPLIT, half = warp % SPLIT;
        groups = a.units / SLSTM_EIGHT, g = lane / 4, q = lane % 4, rank = (int)cluster_rank();
        int64_t cluster = blockIdx.x / cluster_blocks();
        head = cluster % a.p.H, bunch = cluster / a.p.H, b0 = bunch * SLSTM_ROWS;
        j0 = (int64_t)rank * a.units + group * SLSTM_EIGHT;
        unit = head * a.p.P + j0 + g;
        there = j0 < a.p.P;
    }
    /* Row, of the eight, of the lane's pair e. */
    __device__ __forceinline__ int row(int e) const {
        return 2 * q + (SPLIT == 1 ? e : half);
    }
    /* Does row `row` of the eight pass through this warp, where lanes take rows of eight units as a whole? */
    __device__ __forceinline__ bool has_row(int row) const {
        return SPLIT == 1 || row % 2 == half;
    }
};

/* Where documents start, looked up a token ahead. */
template <int PAIRS> struct cluster_documents {
    int now[PAIRS], next[PAIRS];

    /* Of the document numbers of token t. Rows that don't exist, and tokens before the first, have number 0. */
    template <class S>
    __device__ __forceinline__ void look(const slstm_problem &p, const S &s, int64_t t) {
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int64_t b = s.b0 + s.row(e);
            now[e] = next[e];
            next[e] = p.doc && b < p.B && t >= 0 && t < p.T ? p.doc[b * p.T + t] : 0;
        }
    }
};

/* --- forward ------------------------------------------------------------------------------------------------------ */

struct forward_job {
    cluster_job a;
    const bf16 *x;
    bf16 *y;
    float *final;
};

/* The block's shared memory, in bytes. */
template <int TILES, int SPLIT> struct forward_room {
    enum { Y = TILES * SPLIT * 2 * MATRIX, FLAGS = 2 * Y, RING = FLAGS + 128 };
    int warps;

    __host__ __device__ int ring(int stage, int warp) const {
        return RING + (stage * warps + warp) * SLSTM_GATES * MATRIX;
    }
    __host__ __device__ int staging(int warp) const {
        return ring(STAGES, 0) + warp * MATRIX;
    }
    __host__ __device__ int exchange(int group, int half, int turn) const {
        return staging(warps) + ((group * 2 + half) * 2 + turn) * WARP * 16;
    }
    __host__ __device__ int size() const {
        return exchange(SPLIT == 1 ? 0 : warps / SPLIT, 0, 0);
    }
};

/* a: gates 2m (rows 0..7) and 2m+1 of the group's units by k, for m = 0, 1; zeros beyond the head. */
template <int TILES>
__device__ __forceinline__ void load_r(uint32_t (&a)[2][TILES][4], const bf16 *r, const slstm_problem &p, int64_t head,
                                       int64_t unit, int k0, int q) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int64_t gate = 2 * m + e % 2, k = k0 + 16 * i + 2 * q + 8 * (e / 2);
                bool there = k < p.P && unit < p.P;
                const bf16 *at = r + ((head * SLSTM_GATES + gate) * p.P + unit) * p.P + k;
                a[m][i][e] = there ? *reinterpret_cast<const uint32_t *>(at) : 0;
            }
}

/* The initial y of the cluster's rows, all units of the head, as the operand of the first product; zeros elsewhere. */
template <int BYTES> __device__ __forceinline__ void fill_y(char *y, const slstm_problem &p, int64_t head, int64_t b0) {
    for (int i = threadIdx.x; i < 2 * BYTES / 2; i += blockDim.x) {
        int row = i / 8 % 8;
        int64_t k = (int64_t)(i / 64) * 8 + i % 8;
        bool there = p.initial && i < BYTES / 2 && k < p.P && b0 + row < p.B;
        float v = there ? p.initial[slstm_place(p, b0 + row, SLSTM_Y, head * p.P + k)] : 0.0f;
        reinterpret_cast<bf16 *>(y)[i] = __float2bfloat16_rn(v);
    }
}

/* The product of r and y: sums of gate g, pair e, in to[e][g]; with two warps for a group, of half of k. */
template <int TILES>
__device__ __forceinline__ void multiply_y(float (&to)[2][SLSTM_GATES], const uint32_t (&a)[2][TILES][4], const char *y,
                                           int lane) {
    uint32_t b[TILES / 2][4];
    float d[2][2][4] = {};
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) ldmatrix_x4(b[i], y + i * 4 * MATRIX + lane * 16);
#pragma unroll
    for (int i = 0; i < TILES / 2; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t two[2] = {b[i][2 * c], b[i][2 * c + 1]};
#pragma unroll
            for (int m = 0; m < 2; m++) mma_bf16_m16n8k16(d[m][c], a[m][2 * i + c], two);
        }
#pragma unroll
    for (int e = 0; e < 2; e++)
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) to[e][g] = d[g / 2][0][e + 2 * (g % 2)] + d[g / 2][1][e + 2 * (g % 2)];
}

/* Two warps have half of the sums each: a lane keeps row `half` of its two and gives the other away. */
template <int TILES>
__device__ __forceinline__ void exchange_halves(float (&sum)[2][SLSTM_GATES], char *shared,
                                                const forward_room<TILES, 2> &room, const cluster_seat<2> &s, int turn) {
    float give[4], take[4];
#pragma unroll
    for (int g = 0; g < SLSTM_GATES; g++) give[g] = s.half ? sum[0][g] : sum[1][g];
    store_floats<4>(reinterpret_cast<float *>(shared + room.exchange(s.group, 1 - s.half, turn) + s.lane * 16), give);
    __barrier_sync_count(1 + s.group, 2 * WARP);
    load_floats<4>(take, reinterpret_cast<float *>(shared + room.exchange(s.group, s.half, turn) + s.lane * 16));
#pragma unroll
    for (int g = 0; g < SLSTM_GATES; g++) {
        float own = s.half ? sum[1][g] : sum[0][g];
        sum[0][g] = s.half ? take[g] + own : own + take[g]; /* the lower half first, whoever adds */
    }
}

/* What one thread takes through the tokens. */
template <int TILES, int SPLIT> struct forward_walk {
    typedef cluster_seat<SPLIT> seat;
    enum { PAIRS = seat::PAIRS, ROWS = seat::ROWS, AT_ONCE = WARP / ROWS };

    const forward_job &a;
    const seat &s;
    char *shared;
    forward_room<TILES, SPLIT> room;
    uint32_t r[2][TILES][4];
    slstm_unit unit[PAIRS];
    float bias[SLSTM_GATES], last[PAIRS];
    cluster_documents<PAIRS> documents;
    cluster_place to[2]; /* where the lane's sixteen bytes of y go; flags lie in front by the same distance */
    int row;             /* of y, which the lane sends and writes */

    __device__ __forceinline__ forward_walk(const forward_job &job, const seat &place, char *memory, int warps)
        : a(job), s(place), shared(memory), room{warps} {}

    __device__ __forceinline__ void open() {
        const slstm_problem &p = a.a.p;
        load_r<TILES>(r, a.a.r, p, s.head, s.j0 + s.g, s.half * TILES * 16, s.q);
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) bias[g] = s.there ? p.bias[g * p.D + s.unit] : 0.0f;
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int64_t b = s.b0 + s.row(e);
            bool given = p.initial && s.there && b < p.B;
            unit[e].c = given ? p.initial[slstm_place(p, b, SLSTM_C, s.unit)] : 0.0f;
            unit[e].n = given ? p.initial[slstm_place(p, b, SLSTM_N, s.unit)] : 0.0f;
            unit[e].m = given ? p.initial[slstm_place(p, b, SLSTM_M, s.unit)] : 0.0f;
            documents.next[e] = last[e] = 0;
        }
        row = SPLIT == 1 ? s.lane % 8 : 2 * (s.lane % 4) + s.half;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int rank = s.lane / ROWS + i * AT_ONCE;
            to[i] = place_in(shared + s.j0 / 8 * MATRIX + row * 16, rank < a.a.active ? rank : 0);
        }
        documents.look(p, s, 0);
        for (int t = 0; t < STAGES - 1; t++) fetch(t);
    }
    /* Token t of x on its way: a lane has eight units of one gate and row. */
    __device__ __forceinline__ void fetch(int64_t t) {
        const slstm_problem &p = a.a.p;
        int which = s.lane % 8, gate = s.lane / 8;
        if (s.has_row(which)) {
            bool there = t < p.T && s.b0 + which < p.B;
            const bf16 *from = a.x + (s.b0 + which) * p.x.row + t * p.x.step + gate * p.D + s.head * p.P + s.j0;
            cp_async_16_or_zeros(shared + room.ring((int)(t % STAGES), s.warp) + s.lane * 16, there ? from : a.x, there);
        }
        cp_async_commit();
    }
    __device__ __forceinline__ void step(int64_t t) {
        const slstm_problem &p = a.a.p;
        float raw[PAIRS][SLSTM_GATES], sum[2][SLSTM_GATES], y[PAIRS];
        slstm_factors factors[PAIRS];
        bool begins[PAIRS];
        int turn = (int)(t & 1);
        cp_async_wait<STAGES - 2>();
        __syncwarp();
        const bf16 *x = reinterpret_cast<bf16 *>(shared + room.ring((int)(t % STAGES), s.warp));
#pragma unroll
        for (int e = 0; e < PAIRS; e++)
#pragma unroll
            for (int g = 0; g < SLSTM_GATES; g++)
                raw[e][g] = to_float(x[(g * SLSTM_ROWS + s.row(e)) * 8 + s.g]) + bias[g];
#pragma unroll
        for (int e = 0; e < PAIRS; e++) begins[e] = documents.next[e] != documents.now[e];
        documents.look(p, s, t + 1);
        if (t > 0) arrived(t, turn);
        multiply_y<TILES>(sum, r, shared + turn * room.Y + s.half * TILES * 2 * MATRIX, s.lane);
        merge(sum, turn);
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            if (begins[e]) unit[e] = {0, 0, 0};
#pragma unroll
            for (int g = 0; g < SLSTM_GATES; g++) raw[e][g] += begins[e] ? 0.0f : sum[e][g];
            y[e] = last[e] = slstm_forward_unit<false>(unit[e], raw[e], factors[e]);
        }
        send(t, y);
        fetch(t + STAGES - 1);
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int64_t b = s.b0 + s.row(e);
            if (a.a.saved.packs && b < p.B) a.a.saved.store((b * p.T + t) * p.D + s.unit, factors[e]);
        }
    }
    /* y[t-1] of all blocks is there. */
    __device__ __forceinline__ void arrived(int64_t t, int turn) {
        uint64_t *flag = reinterpret_cast<uint64_t *>(shared + room.FLAGS) + turn;
        flag_wait(flag, (unsigned)((t - 1) >> 1 & 1));
        if (threadIdx.x == 0 && t + 1 < a.a.p.T - 1) flag_expect(flag, (unsigned)(a.a.p.P * SLSTM_ROWS * 2));
    }
    __device__ __forceinline__ void merge(float (&sum)[2][SLSTM_GATES], int turn) {
        if constexpr (SPLIT == 2) exchange_halves<TILES>(sum, shared, room, s, turn);
    }
    /* Rows of eight units to all blocks and to memory. */
    __device__ __forceinline__ void send(int64_t t, const float (&y)[PAIRS]) {
        const slstm_problem &p = a.a.p;
        bf16 *stage = reinterpret_cast<bf16 *>(shared + room.staging(s.warp));
        int turn = (int)((t + 1) & 1);
#pragma unroll
        for (int e = 0; e < PAIRS; e++) stage[(SPLIT == 1 ? s.row(e) : s.q) * 8 + s.g] = __float2bfloat16_rn(y[e]);
        __syncwarp();
        uint4 mine = reinterpret_cast<const uint4 *>(stage)[s.lane % ROWS];
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (t + 1 < p.T && s.lane / ROWS + i * AT_ONCE < a.a.active)
                send_16(to[i] + turn * room.Y, mine, to[i] + (room.FLAGS + turn * 8 - (int)(s.j0 / 8 * MATRIX) - row * 16));
        int64_t b = s.b0 + row;
        if (s.lane < ROWS && b < p.B)
            *reinterpret_cast<uint4 *>(a.y + b * p.y.row + t * p.y.step + s.head * p.P + s.j0) = mine;
    }
    __device__ __forceinline__ void close() {
        const slstm_problem &p = a.a.p;
        cp_async_wait<0>();
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int64_t b = s.b0 + s.row(e);
            if (!a.final || b >= p.B) continue;
            a.final[slstm_place(p, b, SLSTM_Y, s.unit)] = last[e];
            a.final[slstm_place(p, b, SLSTM_C, s.unit)] = unit[e].c;
            a.final[slstm_place(p, b, SLSTM_N, s.unit)] = unit[e].n;
            a.final[slstm_place(p, b, SLSTM_M, s.unit)] = unit[e].m;
        }
    }
};

/* The most threads of a block that has so many tiles. */
constexpr int forward_threads(int tiles, int split) {
    return WARP * (split == 2 ? tiles == 12 ? 12 : 8 : tiles <= 8 ? 2 : tiles / 4);
}

template <int TILES, int SPLIT>
__global__ void __launch_bounds__(forward_threads(TILES, SPLIT)) slstm_walk_kernel(forward_job a) {
#ifndef WITHOUT_CLUSTERS
    DYNAMIC_SHARED(char, shared);
    typedef forward_room<TILES, SPLIT> room_of;
    const slstm_problem &p = a.a.p;
    const cluster_seat<SPLIT> s(a.a);
    uint64_t *flags = reinterpret_cast<uint64_t *>(shared + room_of::FLAGS);
    forward_walk<TILES, SPLIT> walk(a, s, shared, (int)(blockDim.x / WARP));
    fill_y<room_of::Y>(shared, p, s.head, s.b0);
    if (threadIdx.x == 0) {
        flag_open(flags), flag_open(flags + 1);
        flags_opened();
        if (p.T > 1) flag_expect(flags + 1, (unsigned)(p.P * SLSTM_ROWS * 2));
        if (p.T > 2) flag_expect(flags, (unsigned)(p.P * SLSTM_ROWS * 2));
    }
    cluster_arrive();
    if (s.there) walk.open();
    cluster_wait();
    if (s.there) {
        for (int64_t t = 0; t < p.T; t++) walk.step(t);
        walk.close();
    }
    cluster_arrive(); /* nobody leaves before all have what they wait for */
    cluster_wait();
#endif
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

struct backward_job {
    cluster_job a;
    bf16 *dx;
    const bf16 *dy;
    const float *dfinal;
    float *dinitial, *partials, clip;
};

/* The block's shared memory, in bytes. `draw` and `parts` twice, in turns. */
template <int TILES, int SPLIT> struct backward_room {
    enum { PAIRS = SPLIT == 1 ? 2 : 1, DRAW = TILES * 2 * MATRIX, FLAGS = 2 * DRAW, PARTS = FLAGS + 128,
           PART = WARP * 8, PACKS = PAIRS * WARP * 16, KEEP = PAIRS * WARP * 4, STAGE = PACKS + KEEP + MATRIX };
    int warps, groups, blocks;

    __host__ __device__ int part(int turn, int from, int group) const {
        return PARTS + ((turn * blocks + from) * groups + group) * PART;
    }
    __host__ __device__ int ring(int stage, int warp) const {
        return part(2, 0, 0) + (stage * warps + warp) * STAGE;
    }
    __host__ __device__ int size() const {
        return ring(STAGES, 0);
    }
};

/* a: rows of r^T, units of the head in sixteens from tile m0 on, by the block's own gates and units; zeros beyond. */
template <int ROWS, int TILES>
__device__ __forceinline__ void load_r_turned(uint32_t (&a)[ROWS][TILES][4], const cluster_job &job, int64_t head, int rank,
                                              int m0, int g, int q) {
    int groups = job.units / SLSTM_EIGHT;
    int64_t P = job.p.P;
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int eight = 2 * i + e / 2, gate = eight / groups;
                int64_t k = 16 * (m0 + m) + g + 8 * (e % 2);
                int64_t j = (int64_t)rank * job.units + eight % groups * SLSTM_EIGHT + 2 * q;
                bool there = gate < SLSTM_GATES && j < P && k < P;
                const bf16 *at = job.r + ((head * SLSTM_GATES + gate) * P + j) * P + k;
                uint32_t low = there ? reinterpret_cast<const uint16_t *>(at)[0] : 0;
                uint32_t high = there ? reinterpret_cast<const uint16_t *>(at)[P] : 0;
                a[m][i][e] = low | high << 16;
            }
}

template <int ROWS, int TILES>
__device__ __forceinline__ void multiply_draw(float (&d)[ROWS][4], const uint32_t (&a)[ROWS][TILES][4], const char *draw,
                                              int lane) {
    uint32_t b[TILES / 2][4];
    float odd[ROWS][4] = {};
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) ldmatrix_x4(b[i], draw + i * 4 * MATRIX + lane * 16);
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[m][e] = 0;
#pragma unroll
    for (int i = 0; i < TILES / 2; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t two[2] = {b[i][2 * c], b[i][2 * c + 1]};
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                if (ROWS < 4 && c) mma_bf16_m16n8k16(odd[m], a[m][2 * i + c], two); /* four chains at least */
                else mma_bf16_m16n8k16(d[m], a[m][2 * i + c], two);
            }
        }
#pragma unroll
    for (int m = 0; ROWS < 4 && m < ROWS; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[m][e] += odd[m][e];
}

/* Numbers of factors as they lie in shared memory. */
__device__ __forceinline__ void unpack_factors(slstm_factors &f, uint4 pack, float keep) {
    const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
    for (int i = 0; i < 4; i++) f.of[2 * i] = low_bf16(words[i]), f.of[2 * i + 1] = high_bf16(words[i]);
    f.keep = keep;
}

/* The walk back: ROWS sixteens of r^T and TILES sixteens of the block's own gates and units in a warp. */
template <int ROWS, int TILES, int SPLIT> struct backward_walk {
    typedef cluster_seat<SPLIT> seat;
    typedef backward_room<TILES, SPLIT> room_of;
    enum { PAIRS = seat::PAIRS };

    const backward_job &a;
    const seat &s;
    char *shared;
    room_of room;
    uint32_t r[ROWS][TILES][4];
    cluster_place to[ROWS][2]; /* where the sums of eight units go, in turn 0 */
    slstm_carry carry[PAIRS];
    float dbias[SLSTM_GATES];
    cluster_documents<PAIRS> documents;
    int64_t sends; /* how often sums go to the blocks */
    unsigned awaited; /* bytes that come each time */

    __device__ __forceinline__ backward_walk(const backward_job &job, const seat &place, char *memory, int warps)
        : a(job), s(place), shared(memory), room{warps, place.groups, (int)cluster_blocks()} {
        const slstm_problem &p = a.a.p;
        int64_t first = (int64_t)s.rank * a.a.units, left = p.P > first ? p.P - first : 0;
        sends = p.T - (a.dinitial ? 0 : 1);
        awaited = (unsigned)(at_most(left, a.a.units) / SLSTM_EIGHT) * (unsigned)a.a.active * room.PART;
    }
    __device__ __forceinline__ void open() {
        const slstm_problem &p = a.a.p;
        load_r_turned<ROWS, TILES>(r, a.a, s.head, s.rank, s.warp * ROWS, s.g, s.q);
#pragma unroll
        for (int m = 0; m < ROWS; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int eight = 2 * (s.warp * ROWS + m) + i, owner = eight / s.groups;
                bool there = eight * SLSTM_EIGHT < p.P;
                to[m][i] = place_in(shared + room.part(0, s.rank, there ? eight % s.groups : 0) + s.lane * 8,
                                    there ? owner : 0);
            }
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) dbias[g] = 0;
#pragma unroll
        for (int e = 0; e < PAIRS; e++) documents.next[e] = 0;
        if (!s.there) return;
        documents.look(p, s, p.T - 1);
        for (int t = 0; t < STAGES - 1; t++) fetch(p.T - 1 - t, t);
    }
    /* Factors and dy of token t on their way to the ring's stage. */
    __device__ __forceinline__ void fetch(int64_t t, int stage) {
        const slstm_problem &p = a.a.p;
        char *to_stage = shared + room.ring(stage, s.warp);
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int64_t b = s.b0 + s.row(e), place = (b * p.T + t) * p.D + s.unit;
            bool there = t >= 0 && b < p.B;
            cp_async_16_or_zeros(to_stage + (e * WARP + s.lane) * 16, a.a.saved.packs + (there ? place * SLSTM_FACTORS : 0),
                                 there);
            cp_async<4>(to_stage + room.PACKS + (e * WARP + s.lane) * 4, a.a.saved.keep + (there ? place : 0), there ? 4 : 0);
        }
        if (s.lane < SLSTM_ROWS && s.has_row(s.lane)) {
            int64_t b = s.b0 + s.lane;
            bool there = t >= 0 && b < p.B;
            const bf16 *from = a.dy + b * p.y.row + t * p.y.step + s.head * p.P + s.j0;
            cp_async_16_or_zeros(to_stage + room.PACKS + room.KEEP + s.lane * 16, there ? from : a.dy, there);
        }
        cp_async_commit();
    }
    /* What comes to y of token t from the token after, or from the final state; the carry with it. round: how many tokens
     * are done. */
    __device__ __forceinline__ void enter(float (&dy)[PAIRS], int64_t round) {
        const slstm_problem &p = a.a.p;
        bool begins[PAIRS];
#pragma unroll
        for (int e = 0; e < PAIRS; e++) begins[e] = documents.next[e] != documents.now[e];
        documents.look(p, s, p.T - 2 - round);
        if (round > 0) {
            take_parts(dy, round);
#pragma unroll
            for (int e = 0; e < PAIRS; e++) {
                dy[e] = begins[e] ? 0.0f : slstm_clipped(dy[e], a.clip);
                if (begins[e]) carry[e] = {0, 0};
            }
            return;
        }
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int64_t b = s.b0 + s.row(e);
            bool given = a.dfinal && b < p.B;
            dy[e] = given ? a.dfinal[slstm_place(p, b, SLSTM_Y, s.unit)] : 0.0f;
            carry[e].dc = given ? a.dfinal[slstm_place(p, b, SLSTM_C, s.unit)] : 0.0f;
            carry[e].dn = given ? a.dfinal[slstm_place(p, b, SLSTM_N, s.unit)] : 0.0f;
        }
    }
    /* The blocks' sums for the lane's unit and rows, added in their order. */
    __device__ __forceinline__ void take_parts(float (&dy)[PAIRS], int64_t round) {
        int turn = (int)((round - 1) & 1);
        uint64_t *flag = reinterpret_cast<uint64_t *>(shared + room.FLAGS) + turn;
        flag_wait(flag, (unsigned)((round - 1) >> 1 & 1));
        if (threadIdx.x == 0 && round + 1 < sends) flag_expect(flag, awaited);
        const char *parts = shared + room.part(turn, 0, s.group) + s.lane * 8;
        int step = s.groups * room.PART;
#pragma unroll
        for (int e = 0; e < PAIRS; e++) dy[e] = 0;
        for (int from = 0; from < a.a.active; from += 8) {
            float2 part[8];
#pragma unroll
            for (int i = 0; i < 8; i++)
                part[i] = from + i < a.a.active ? *reinterpret_cast<const float2 *>(parts + (from + i) * step)
                                                : make_float2(0, 0);
#pragma unroll
            for (int i = 0; i < 8; i += 2) part[i].x += part[i + 1].x, part[i].y += part[i + 1].y;
            float2 all = make_float2((part[0].x + part[2].x) + (part[4].x + part[6].x),
                                     (part[0].y + part[2].y) + (part[4].y + part[6].y));
            if (SPLIT == 1) dy[0] += all.x, dy[PAIRS - 1] += all.y;
            else dy[0] += s.half ? all.y : all.x;
        }
    }
    __device__ __forceinline__ void step(int64_t round) {
        const slstm_problem &p = a.a.p;
        char *draws = shared + (round & 1) * room.DRAW;
        if (s.there) {
            float dy[PAIRS];
            slstm_factors f[PAIRS];
            bf16 *place = reinterpret_cast<bf16 *>(draws);
            cp_async_wait<STAGES - 2>();
            __syncwarp();
            const char *stage = shared + room.ring((int)(round % STAGES), s.warp);
#pragma unroll
            for (int e = 0; e < PAIRS; e++)
                unpack_factors(f[e], reinterpret_cast<const uint4 *>(stage)[e * WARP + s.lane],
                               reinterpret_cast<const float *>(stage + room.PACKS)[e * WARP + s.lane]);
            enter(dy, round);
#pragma unroll
            for (int e = 0; e < PAIRS; e++) {
                float draw[SLSTM_GATES];
                const bf16 *given = reinterpret_cast<const bf16 *>(stage + room.PACKS + room.KEEP);
                slstm_backward_unit(carry[e], draw, f[e], dy[e] + to_float(given[s.row(e) * 8 + s.g]));
#pragma unroll
                for (int g = 0; g < SLSTM_GATES; g++) {
                    place[((g * s.groups + s.group) * SLSTM_ROWS + s.row(e)) * 8 + s.g] = __float2bfloat16_rn(draw[g]);
                    dbias[g] += draw[g];
                }
            }
        }
        __syncthreads();
        if (round < sends) send(draws, (int)(round & 1));
        if (!s.there) return;
        int which = s.lane % 8, gate = s.lane / 8;
        int64_t b = s.b0 + which, t = p.T - 1 - round;
        if (s.has_row(which) && b < p.B)
            *reinterpret_cast<uint4 *>(a.dx + b * p.x.row + t * p.x.step + gate * p.D + s.head * p.P + s.j0) =
                reinterpret_cast<const uint4 *>(draws)[(gate * s.groups + s.group) * SLSTM_ROWS + which];
        fetch(t - (STAGES - 1), (int)((round + STAGES - 1) % STAGES));
    }
    /* The block's part of what comes to the token before, to the blocks that have the units. */
    __device__ __forceinline__ void send(const char *draws, int turn) {
        float d[ROWS][4];
        multiply_draw<ROWS, TILES>(d, r, draws, s.lane);
        int shift = turn * room.blocks * s.groups * room.PART;
#pragma unroll
        for (int m = 0; m < ROWS; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int eight = 2 * (s.warp * ROWS + m) + i;
                if (eight * SLSTM_EIGHT >= a.a.p.P) continue;
                int own = room.part(0, s.rank, eight % s.groups) + s.lane * 8;
                send_8(to[m][i] + shift, make_float2(d[m][2 * i], d[m][2 * i + 1]), to[m][i] + (room.FLAGS + turn * 8 - own));
            }
    }
    __device__ __forceinline__ void close() {
        const slstm_problem &p = a.a.p;
        float dy[PAIRS];
        cp_async_wait<0>();
        if (a.dinitial) enter(dy, p.T);
#pragma unroll
        for (int e = 0; e < PAIRS; e++) {
            int64_t b = s.b0 + s.row(e);
            if (!a.dinitial || b >= p.B) continue;
            a.dinitial[slstm_place(p, b, SLSTM_Y, s.unit)] = dy[e];
            a.dinitial[slstm_place(p, b, SLSTM_C, s.unit)] = carry[e].dc;
            a.dinitial[slstm_place(p, b, SLSTM_N, s.unit)] = carry[e].dn;
            a.dinitial[slstm_place(p, b, SLSTM_M, s.unit)] = 0;
        }
        /* Over the lane's rows it is added already. */
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) {
            float v = dbias[g] + __shfl_xor_sync(FULL, dbias[g], 1);
            v += __shfl_xor_sync(FULL, v, 2);
            if (s.q == 0) a.partials[((s.bunch * SPLIT + s.half) * SLSTM_GATES + g) * p.D + s.unit] = v;
        }
    }
};

constexpr int backward_threads(int tiles, int split) {
    return WARP * (split == 2 ? tiles == 12 ? 12 : 8 : tiles / 2);
}

template <int ROWS, int TILES, int SPLIT>
__global__ void __launch_bounds__(backward_threads(TILES, SPLIT)) slstm_walk_back_kernel(backward_job a) {
#ifndef WITHOUT_CLUSTERS
    DYNAMIC_SHARED(char, shared);
    typedef backward_room<TILES, SPLIT> room_of;
    const cluster_seat<SPLIT> s(a.a);
    uint64_t *flags = reinterpret_cast<uint64_t *>(shared + room_of::FLAGS);
    backward_walk<ROWS, TILES, SPLIT> walk(a, s, shared, (int)(blockDim.x / WARP));
    for (int i = threadIdx.x; i < 2 * room_of::DRAW / 4; i += blockDim.x) reinterpret_cast<uint32_t *>(shared)[i] = 0;
    if (threadIdx.x == 0) {
        flag_open(flags), flag_open(flags + 1);
        flags_opened();
        if (walk.sends > 0) flag_expect(flags, walk.awaited);
        if (walk.sends > 1) flag_expect(flags + 1, walk.awaited);
    }
    cluster_arrive();
    if (s.rank < a.a.active) walk.open();
    cluster_wait();
    if (s.rank < a.a.active) {
        for (int64_t round = 0; round < a.a.p.T; round++) walk.step(round);
        if (s.there) walk.close();
    }
    cluster_arrive();
    cluster_wait();
#endif
}

/* --- the choice --------------------------------------------------------------------------------------------------- */

/* with_forward(plan, [&](auto kernel, int shared) { ... }): the kernel and its shared memory. */
template <class F> static bool with_forward(cluster_plan c, F f) {
    int warps = (int)threads_of(c) / WARP;
    if (c.split == 2 && c.tiles == 12) return f(slstm_walk_kernel<12, 2>, forward_room<12, 2>{warps}.size());
    if (c.split == 2) return f(slstm_walk_kernel<16, 2>, forward_room<16, 2>{warps}.size());
    if (c.tiles == 4) return f(slstm_walk_kernel<4, 1>, forward_room<4, 1>{warps}.size());
    if (c.tiles == 8) return f(slstm_walk_kernel<8, 1>, forward_room<8, 1>{warps}.size());
    if (c.tiles == 12) return f(slstm_walk_kernel<12, 1>, forward_room<12, 1>{warps}.size());
    return f(slstm_walk_kernel<16, 1>, forward_room<16, 1>{warps}.size());
}

template <class F> static bool with_backward(cluster_plan c, F f) {
    int warps = (int)threads_of(c) / WARP, groups = (int)(c.units / SLSTM_EIGHT), blocks = (int)c.blocks;
    if (c.split == 2 && c.units > 32)
        return f(slstm_walk_back_kernel<2, 12, 2>, backward_room<12, 2>{warps, groups, blocks}.size());
    if (c.split == 2) return f(slstm_walk_back_kernel<4, 8, 2>, backward_room<8, 2>{warps, groups, blocks}.size());
    if (c.units <= 16) return f(slstm_walk_back_kernel<4, 4, 1>, backward_room<4, 1>{warps, groups, blocks}.size());
    if (c.units <= 24) return f(slstm_walk_back_kernel<4, 6, 1>, backward_room<6, 1>{warps, groups, blocks}.size());
    return f(slstm_walk_back_kernel<4, 8, 1>, backward_room<8, 1>{warps, groups, blocks}.size());
}

static bool shape_fits(const slstm_problem &p) {
    return p.P % SLSTM_EIGHT == 0 && p.P <= 512;
}

static cluster_job job_of(const slstm_problem &p, tensor r, void *saved, cluster_plan c) {
    return {p, data_of<bf16>(r), slstm_saved<bf16>(saved, p), (int)c.units, (int)ceil_div(p.P, c.units)};
}

static unsigned grid_of(const slstm_problem &p, cluster_plan c) {
    return (unsigned)(c.blocks * p.H * ceil_div(p.B, SLSTM_ROWS));
}

bool slstm_cluster_forward(struct device *dev, const slstm_problem &p, tensor y, tensor final, void *saved, tensor x,
                           tensor r) {
    if (x.dtype != DTYPE_BF16 || !shape_fits(p) || !vectors_fit(x, 8) || !vectors_fit(y, 8) || !vectors_fit(r, 8))
        return false;
    cluster_plan c = plan_of(p.P);
    forward_job job = {job_of(p, r, saved, c), data_of<bf16>(x), data_of<bf16>(y), data_of<float>(final)};
    return with_forward(c, [&](auto kernel, int shared) {
        if (!clusters_fit(kernel, threads_of(c), c.blocks, (size_t)shared)) return false;
        LAUNCH_CLUSTERS(dev, kernel, grid_of(p, c), threads_of(c), c.blocks, (size_t)shared, job);
        return true;
    });
}

int64_t slstm_cluster_partials(struct slstm_shape s) {
    return 2 * ceil_div(s.B, SLSTM_ROWS);
}

bool slstm_cluster_backward(struct device *dev, const slstm_problem &p, tensor dx, tensor dinitial, tensor dy,
                            tensor dfinal, const void *saved, tensor r, float clip, float *partials, int64_t *rows) {
    if (dx.dtype != DTYPE_BF16 || !shape_fits(p) || !vectors_fit(dx, 8) || !vectors_fit(dy, 8)) return false;
    cluster_plan c = plan_of(p.P);
    backward_job job = {job_of(p, r, (void *)saved, c), data_of<bf16>(dx), data_of<bf16>(dy), data_of<float>(dfinal),
                        data_of<float>(dinitial), partials, clip};
    *rows = c.split * ceil_div(p.B, SLSTM_ROWS);
    return with_backward(c, [&](auto kernel, int shared) {
        if (!clusters_fit(kernel, threads_of(c), c.blocks, (size_t)shared)) return false;
        LAUNCH_CLUSTERS(dev, kernel, grid_of(p, c), threads_of(c), c.blocks, (size_t)shared, job);
        return true;
    });
}
