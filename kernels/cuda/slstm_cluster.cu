/* slstm_cluster.cu: the sLSTM over a whole sequence in one kernel: bf16, on chips with clusters (sm_90 on). slstm.cu is
 * the way for everything else.
 *
 * A cluster of blocks has one head of SLSTM_ROWS = 8 batch rows and walks all tokens; its blocks share the head's
 * units. r stays in registers for the whole walk, as fragments of mma, bf16. Clusters know nothing of each other, so
 * heads and groups of rows fill the chip side by side, several blocks on a multiprocessor where there are many.
 *
 * Forward. A block has `units` units, two warps eight of them with all four gates: two products of 16 x 8 (gates i, f
 * of eight units; gates z, o) x (8 rows), each warp over half of k. So a lane finds sums of all gates of unit lane/4
 * and of rows 2 (lane%4), + 1 in its own registers; the two warps exchange those of one of the rows, and then each lane
 * has one unit of one row to itself: the pointwise part, states in fp32, touches no other lane. y goes in bf16, 16
 * bytes a row and eight units, into the shared memory of every block of the cluster, where it waits as the other
 * operand of the next product. Nothing but these bytes synchronises the blocks: they raise a flag there when all P x 8
 * have come (cluster.cuh). Two buffers and flags in turns are enough, because nobody can send y[t+1] before everybody's
 * y[t] came, so before everybody has read y[t-1].
 *
 * Backward. The block has the same units, their draw (4 gates x units) is the operand, and its product with r^T is a
 * part of what comes to all P units of the head: each warp has a share of the rows of r^T and sends its sums, fp32, to
 * the blocks that own those units, which add up the parts in an order of their own. The chain from dy to draw is short
 * because forward left factors (slstm.cuh), which come through a ring of STAGES tokens in shared memory, as x does in
 * forward.
 *
 *   P up to     blocks   units of a block   warps   registers of r in a lane, forward / backward
 *   16, 32, 64  1, 2, 4  16                 4       16 / 32
 *   128         8        16                 4       32 / 32
 *   192         8        24                 6       48 / 48
 *   256         8        32                 8       64 / 64
 *   384         8        48                 12      96 / 96
 *   512         16       32                 8       128 / 128
 * P must be a multiple of 8, rows of x, y and their gradients aligned to 16 bytes, and the chip must grant the cluster
 * (16 blocks are beyond what every chip promises); otherwise it is slstm.cu.
 *
 * Account of one step, P 192, in cycles of 0.57 ns (1.75 GHz). Few warps share a scheduler, so each instruction of a
 * step costs two to three cycles, and their number counts as much as any latency: hence one unit a lane.
 *   forward, 263 instructions: flag seen 30, ldmatrix 45, 12 mma on four chains 100, exchange 70, pointwise 150
 *     (softplus 65, exponentials, 1/n), out 60, on the way to the other blocks 250 (3 KB arrive at a block, at about 16
 *     bytes a clock), during which factors, y and the next x are seen to: 700 = 0.4 us.
 *   backward, 373 instructions: flag 30, eight parts added 70, pointwise 30, draw to shared memory and barrier 60,
 *     ldmatrix 40, 12 mma 100, on the way 400 (6 KB): 730 = 0.42 us.
 * Bytes, B 16, T 1024, D 768: forward 226 (x) + 25 (y) + 252 (saved) MB, 0.17 ms; so the chain is what counts: 0.45 ms
 * for each direction, besides dr. Measured on an H100 with two units a lane and half of the warps (382 and 1001
 * instructions): 0.615 ms forward.
 *
 * Every sum has an order that the shape fixes.
 */
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/slstm.cuh"

enum {
    SLSTM_ROWS = 8, /* batch rows of a cluster: the columns of mma */
    SLSTM_EIGHT = 8, /* units of a group */
    SLSTM_SPLIT = 2, /* warps of a group */
    STAGES = 4,     /* tokens of x, or of factors, that are on their way or there */
    MATRIX = 128,   /* bytes of eight rows' eight bf16 */
};

typedef __nv_bfloat16 bf16;

/* How a head is laid out on a cluster. */
struct cluster_plan {
    unsigned blocks, units; /* units of a block */
    int tiles;              /* forward: k of a warp, in sixteens */
};

static cluster_plan plan_of(int64_t P) {
    cluster_plan c;
    c.blocks = P <= 16 ? 1 : P <= 32 ? 2 : P <= 64 ? 4 : P <= 384 ? 8 : 16;
    c.units = P <= 128 ? 16 : P <= 192 ? 24 : P > 256 && P <= 384 ? 48 : 32;
    c.tiles = P <= 64 ? 2 : P <= 128 ? 4 : P <= 192 ? 6 : P <= 256 ? 8 : P <= 384 ? 12 : 16;
    return c;
}

static unsigned threads_of(cluster_plan c) {
    return c.units / SLSTM_EIGHT * SLSTM_SPLIT * WARP;
}

/* What both kernels are given. */
struct cluster_job {
    slstm_problem p;
    const bf16 *r;
    slstm_saved<bf16> saved;
    int active; /* blocks that have units */
};

/* Where a thread stands. GROUPS: of eight units, in a block, two warps each. A lane has one unit and one row. */
template <int GROUPS> struct cluster_seat {
    int lane, warp, group, half, g, q, rank;
    int row;                 /* of the eight */
    int64_t head, b0, bunch; /* bunch: which eight rows */
    int64_t j0, b, unit;     /* of the group's first unit, within the head; the row; the unit, among all D */
    bool there, lives;       /* the group has units; and the row exists, too */

    __device__ __forceinline__ cluster_seat(const cluster_job &a) {
        lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = warp / SLSTM_SPLIT, half = warp % SLSTM_SPLIT;
        g = lane / 4, q = lane % 4, rank = (int)cluster_rank();
        int64_t cluster = blockIdx.x / cluster_blocks();
        head = cluster % a.p.H, bunch = cluster / a.p.H, b0 = bunch * SLSTM_ROWS;
        j0 = ((int64_t)rank * GROUPS + group) * SLSTM_EIGHT;
        row = 2 * q + half, b = b0 + row, unit = head * a.p.P + j0 + g;
        there = j0 < a.p.P, lives = there && b < a.p.B;
    }
    /* Does row `row` of the eight pass through this warp, where lanes take rows of eight units as a whole? */
    __device__ __forceinline__ bool has_row(int which) const {
        return which % 2 == half;
    }
};

/* Where documents start, looked up a token ahead: the numbers of a token and of the next one on the way. Rows that
 * don't exist, and tokens before the first, have number 0. */
struct cluster_documents {
    int now, next;

    template <class S>
    __device__ __forceinline__ void look(const slstm_problem &p, const S &s, int64_t t) {
        now = next, next = 0;
        if (p.doc && t >= 0 && t < p.T && s.lives) next = p.doc[s.b * p.T + t];
    }
};

/* --- forward ------------------------------------------------------------------------------------------------------ */

struct forward_job {
    cluster_job a;
    const bf16 *x;
    bf16 *y;
    float *final;
};

/* Groups of eight units in a block whose warps have so many tiles of k. */
constexpr int forward_groups(int tiles) {
    return tiles == 16 ? 4 : tiles <= 4 ? 2 : tiles / 2;
}

/* The block's shared memory, in bytes: y twice, flags, the ring of x, rows of y on their way out, and sums that two
 * warps of a group exchange. */
template <int TILES> struct forward_room {
    enum { GROUPS = forward_groups(TILES), WARPS = GROUPS * SLSTM_SPLIT, SUMS = WARP * 16,
           Y = TILES * SLSTM_SPLIT * 2 * MATRIX, FLAGS = 2 * Y, RING = FLAGS + 128,
           STAGE = WARPS * SLSTM_GATES * MATRIX,
           STAGING = RING + STAGES * STAGE, EXCHANGE = STAGING + WARPS * MATRIX,
           SIZE = EXCHANGE + GROUPS * 4 * SUMS };

    __device__ static __forceinline__ int exchange(int group, int half, int turn) {
        return EXCHANGE + ((group * 2 + half) * 2 + turn) * SUMS;
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

/* The product of r and y over the warp's half of k: the sums of gate g and row 2q + e in to[e][g]. */
template <int TILES>
__device__ __forceinline__ void multiply_y(float (&to)[2][SLSTM_GATES], const uint32_t (&a)[2][TILES][4], const char *y,
                                           int lane) {
    uint32_t b[3][4]; /* loaded two ahead */
    float d[2][2][4] = {};
    const char *row = y + lane * 16;
#pragma unroll
    for (int i = 0; i < 2 && i < TILES / 2; i++) ldmatrix_x4(b[i], row + i * 4 * MATRIX);
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
        if (i + 2 < TILES / 2) ldmatrix_x4(b[(i + 2) % 3], row + (i + 2) * 4 * MATRIX);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t two[2] = {b[i % 3][2 * c], b[i % 3][2 * c + 1]};
#pragma unroll
            for (int m = 0; m < 2; m++) mma_bf16_m16n8k16(d[m][c], a[m][2 * i + c], two);
        }
    }
#pragma unroll
    for (int e = 0; e < 2; e++)
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) to[e][g] = d[g / 2][0][e + 2 * (g % 2)] + d[g / 2][1][e + 2 * (g % 2)];
}

/* Two warps have half of the sums each: a lane keeps those of its own row and gives the others away. */
template <int TILES>
__device__ __forceinline__ void exchange_halves(float (&own)[SLSTM_GATES], const float (&sum)[2][SLSTM_GATES],
                                                char *shared, int group, int half, int lane, int turn) {
    typedef forward_room<TILES> room;
    float give[SLSTM_GATES], take[SLSTM_GATES];
#pragma unroll
    for (int g = 0; g < SLSTM_GATES; g++) give[g] = half ? sum[0][g] : sum[1][g];
    store_floats<4>(reinterpret_cast<float *>(shared + room::exchange(group, 1 - half, turn) + lane * 16), give);
    __barrier_sync_count(1 + group, 2 * WARP);
    load_floats<4>(take, reinterpret_cast<float *>(shared + room::exchange(group, half, turn) + lane * 16));
#pragma unroll
    for (int g = 0; g < SLSTM_GATES; g++) own[g] = (half ? sum[1][g] : sum[0][g]) + take[g];
}

/* What one thread takes through the tokens. */
template <int TILES> struct forward_walk {
    typedef forward_room<TILES> room;
    typedef cluster_seat<room::GROUPS> seat;
    enum { ROWS = SLSTM_ROWS / SLSTM_SPLIT, AT_ONCE = WARP / ROWS }; /* rows of a warp; blocks it sends to at once */

    const forward_job &a;
    const seat &s;
    char *shared;
    uint32_t r[2][TILES][4];
    slstm_unit unit;
    float bias[SLSTM_GATES], last;
    cluster_documents documents;
    const bf16 *x;        /* the lane's eight units of a gate and row, of the token that is fetched next */
    bf16 *y;              /* those of y that the lane writes, of the token that is next */
    int64_t place;        /* of the lane's unit, likewise */
    bool fetches, writes; /* these exist */
    cluster_place to[2];  /* where the lane's eight units of y go, in turn 0 */
    int to_flags;         /* from there to the first flag */

    __device__ __forceinline__ forward_walk(const forward_job &job, const seat &where, char *memory)
        : a(job), s(where), shared(memory) {}

    __device__ __forceinline__ void open() {
        const slstm_problem &p = a.a.p;
        load_r<TILES>(r, a.a.r, p, s.head, s.j0 + s.g, s.half * TILES * 16, s.q);
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) bias[g] = p.bias[g * p.D + s.unit];
        bool given = p.initial && s.lives;
        unit.c = given ? p.initial[slstm_place(p, s.b, SLSTM_C, s.unit)] : 0.0f;
        unit.n = given ? p.initial[slstm_place(p, s.b, SLSTM_N, s.unit)] : 0.0f;
        unit.m = given ? p.initial[slstm_place(p, s.b, SLSTM_M, s.unit)] : 0.0f;
        last = 0;
        int row = 2 * (s.lane % 4) + s.half, own = (int)(s.j0 / 8) * MATRIX + row * 16;
        to_flags = room::FLAGS - own;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int rank = s.lane / ROWS + i * AT_ONCE;
            to[i] = place_in(shared + own, rank < a.a.active ? rank : 0);
        }
        writes = s.lane < ROWS && s.b0 + row < p.B;
        y = a.y + (writes ? (s.b0 + row) * p.y.row : 0) + s.head * p.P + s.j0;
        row = s.lane % 8;
        fetches = s.has_row(row) && s.b0 + row < p.B;
        x = a.x + (fetches ? (s.b0 + row) * p.x.row : 0) + s.lane / 8 * p.D + s.head * p.P + s.j0;
        place = s.b * p.T * p.D + s.unit;
        documents.next = 0;
        documents.look(p, s, 0);
        for (int t = 0; t < STAGES - 1; t++) fetch(t);
    }
    __device__ __forceinline__ void fetch(int t) {
        char *to_ring = shared + room::RING + t % STAGES * room::STAGE + (s.warp * WARP + s.lane) * 16;
        if (s.has_row(s.lane % 8)) cp_async_16_or_zeros(to_ring, x, fetches && t < (int)a.a.p.T);
        cp_async_commit();
        x += a.a.p.x.step;
    }
    __device__ __forceinline__ void step(int t) {
        const slstm_problem &p = a.a.p;
        float raw[SLSTM_GATES], sums[2][SLSTM_GATES], sum[SLSTM_GATES];
        slstm_factors factors;
        int turn = t & 1;
        cp_async_wait<STAGES - 2>();
        __syncwarp();
        const bf16 *ring = reinterpret_cast<bf16 *>(shared + room::RING + t % STAGES * room::STAGE) +
                           (s.warp * SLSTM_GATES * SLSTM_ROWS + s.row) * SLSTM_EIGHT + s.g;
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) raw[g] = to_float(ring[g * SLSTM_ROWS * SLSTM_EIGHT]) + bias[g];
        bool begins = documents.next != documents.now;
        documents.look(p, s, t + 1);
        if (t > 0) arrived(t, turn);
        multiply_y<TILES>(sums, r, shared + turn * room::Y + s.half * TILES * 2 * MATRIX, s.lane);
        exchange_halves<TILES>(sum, sums, shared, s.group, s.half, s.lane, turn);
        if (begins) unit = {0, 0, 0};
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) raw[g] += begins ? 0.0f : sum[g];
        last = slstm_forward_unit<false>(unit, raw, factors);
        send(t);
        fetch(t + STAGES - 1);
        if (a.a.saved.packs && s.lives) a.a.saved.store(place, factors);
        place += p.D;
    }
    /* y[t-1] of all blocks is there. */
    __device__ __forceinline__ void arrived(int t, int turn) {
        uint64_t *flag = reinterpret_cast<uint64_t *>(shared + room::FLAGS) + turn;
        flag_wait(flag, (unsigned)((t - 1) >> 1 & 1));
        if (threadIdx.x == 0 && t + 1 < (int)a.a.p.T - 1) flag_expect(flag, (unsigned)(a.a.p.P * SLSTM_ROWS * 2));
    }
    /* Rows of eight units to all blocks and to memory. */
    __device__ __forceinline__ void send(int t) {
        bf16 *stage = reinterpret_cast<bf16 *>(shared + room::STAGING + s.warp * MATRIX);
        int turn = (t + 1) & 1;
        stage[s.q * SLSTM_EIGHT + s.g] = __float2bfloat16_rn(last);
        __syncwarp();
        uint4 mine = reinterpret_cast<const uint4 *>(stage)[s.lane % ROWS];
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (t + 1 < (int)a.a.p.T && s.lane / ROWS + i * AT_ONCE < a.a.active)
                send_16(to[i] + turn * room::Y, mine, to[i] + (to_flags + turn * 8));
        if (writes) *reinterpret_cast<uint4 *>(y) = mine;
        y += a.a.p.y.step;
    }
    __device__ __forceinline__ void close() {
        const slstm_problem &p = a.a.p;
        cp_async_wait<0>();
        if (!a.final || !s.lives) return;
        a.final[slstm_place(p, s.b, SLSTM_Y, s.unit)] = last;
        a.final[slstm_place(p, s.b, SLSTM_C, s.unit)] = unit.c;
        a.final[slstm_place(p, s.b, SLSTM_N, s.unit)] = unit.n;
        a.final[slstm_place(p, s.b, SLSTM_M, s.unit)] = unit.m;
    }
};

template <int TILES>
__global__ void __launch_bounds__(WARP * SLSTM_SPLIT * forward_groups(TILES)) slstm_walk_kernel(forward_job a) {
#ifndef WITHOUT_CLUSTERS
    DYNAMIC_SHARED(char, shared);
    typedef forward_walk<TILES> walk_of;
    const slstm_problem &p = a.a.p;
    const typename walk_of::seat s(a.a);
    uint64_t *flags = reinterpret_cast<uint64_t *>(shared + walk_of::room::FLAGS);
    walk_of walk(a, s, shared);
    fill_y<walk_of::room::Y>(shared, p, s.head, s.b0);
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
#pragma unroll 1
        for (int t = 0; t < (int)p.T; t++) walk.step(t);
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

/* The block's shared memory, in bytes: draw twice, flags, the ring of factors and dy, and parts of dy, from each
 * block two in turns. */
template <int TILES> struct backward_room {
    enum { GROUPS = TILES / 2, WARPS = GROUPS * SLSTM_SPLIT, PART = WARP * 8,
           DRAW = TILES * 2 * MATRIX, FLAGS = 2 * DRAW, RING = FLAGS + 128,
           PACKS = WARP * 16, KEEP = WARP * 4, OF_WARP = PACKS + KEEP + MATRIX,
           STAGE = WARPS * OF_WARP, PARTS = RING + STAGES * STAGE, OF_BLOCK = 2 * GROUPS * PART };

    static int size(unsigned blocks) {
        return PARTS + (int)blocks * OF_BLOCK;
    }
};

/* a: rows of r^T, units of the head in sixteens from tile m0 on, by the block's own gates and units; zeros beyond. */
template <int ROWS, int TILES>
__device__ __forceinline__ void load_r_turned(uint32_t (&a)[ROWS][TILES][4], const cluster_job &job, int64_t head,
                                              int rank, int m0, int g, int q) {
    constexpr int groups = TILES / 2;
    int64_t P = job.p.P;
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int eight = 2 * i + e / 2, gate = eight / groups;
                int64_t k = 16 * (m0 + m) + g + 8 * (e % 2);
                int64_t j = ((int64_t)rank * groups + eight % groups) * SLSTM_EIGHT + 2 * q;
                bool there = gate < SLSTM_GATES && j < P && k < P;
                const bf16 *at = job.r + ((head * SLSTM_GATES + gate) * P + j) * P + k;
                uint32_t low = there ? reinterpret_cast<const uint16_t *>(at)[0] : 0;
                uint32_t high = there ? reinterpret_cast<const uint16_t *>(at)[P] : 0;
                a[m][i][e] = low | high << 16;
            }
}

template <int ROWS, int TILES>
__device__ __forceinline__ void multiply_draw(float (&d)[ROWS][4], const uint32_t (&a)[ROWS][TILES][4],
                                              const char *draw, int lane) {
    uint32_t b[2][4]; /* loaded one ahead */
    float odd[ROWS][4] = {};
    const char *row = draw + lane * 16;
    ldmatrix_x4(b[0], row);
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[m][e] = 0;
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
        if (i + 1 < TILES / 2) ldmatrix_x4(b[(i + 1) % 2], row + (i + 1) * 4 * MATRIX);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t two[2] = {b[i % 2][2 * c], b[i % 2][2 * c + 1]};
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                if (ROWS < 4 && c) mma_bf16_m16n8k16(odd[m], a[m][2 * i + c], two); /* four chains at least */
                else mma_bf16_m16n8k16(d[m], a[m][2 * i + c], two);
            }
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
template <int ROWS, int TILES> struct backward_walk {
    typedef backward_room<TILES> room;
    typedef cluster_seat<room::GROUPS> seat;

    const backward_job &a;
    const seat &s;
    char *shared;
    uint32_t r[ROWS][TILES][4];
    cluster_place to[ROWS][2]; /* where the sums of eight units go, in turn 0 */
    unsigned locals;           /* which group of their block they are, four bits each */
    slstm_carry carry;
    float dbias[SLSTM_GATES];
    cluster_documents documents;
    int64_t place;        /* of the lane's unit, at the token that is fetched next */
    const bf16 *dy;       /* eight units of a row, likewise */
    bf16 *dx;             /* eight units of a gate and row, of the token that is next */
    bool fetches, writes; /* these exist */
    int sends;            /* how often sums go to the blocks */
    unsigned awaited;     /* bytes that come each time */

    __device__ __forceinline__ backward_walk(const backward_job &job, const seat &where, char *memory)
        : a(job), s(where), shared(memory) {
        const slstm_problem &p = a.a.p;
        int64_t left = at_least(p.P / SLSTM_EIGHT - (int64_t)s.rank * room::GROUPS, 0);
        sends = (int)p.T - (a.dinitial ? 0 : 1);
        awaited = (unsigned)at_most(left, room::GROUPS) * (unsigned)a.a.active * room::PART;
    }
    __device__ __forceinline__ void open() {
        const slstm_problem &p = a.a.p;
        load_r_turned<ROWS, TILES>(r, a.a, s.head, s.rank, s.warp * ROWS, s.g, s.q);
        locals = 0;
#pragma unroll
        for (int i = 0; i < 2 * ROWS; i++) {
            int eight = 2 * s.warp * ROWS + i, local = eight % room::GROUPS;
            bool there = eight * SLSTM_EIGHT < p.P;
            const char *own = shared + room::PARTS + s.rank * room::OF_BLOCK + local * room::PART + s.lane * 8;
            to[i / 2][i % 2] = place_in(own, there ? eight / room::GROUPS : 0);
            locals |= (unsigned)local << 4 * i;
        }
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) dbias[g] = 0;
        if (!s.there) return;
        documents.next = 0;
        documents.look(p, s, p.T - 1);
        int row = s.lane % 8;
        fetches = s.lane < SLSTM_ROWS && s.has_row(row) && s.b0 + row < p.B;
        writes = s.has_row(row) && s.b0 + row < p.B;
        int64_t b = s.b0 + row, first = s.head * p.P + s.j0;
        dy = a.dy + first + (fetches ? b * p.y.row + (p.T - 1) * p.y.step : 0);
        dx = a.dx + first + s.lane / 8 * p.D + (writes ? b * p.x.row + (p.T - 1) * p.x.step : 0);
        place = (s.b * p.T + p.T - 1) * p.D + s.unit;
        for (int i = 0; i < STAGES - 1; i++) fetch(i);
    }
    /* Factors and dy of a token on their way: the one for round `round`. */
    __device__ __forceinline__ void fetch(int round) {
        const slstm_problem &p = a.a.p;
        char *ring = shared + room::RING + round % STAGES * room::STAGE + s.warp * room::OF_WARP;
        bool there = round < (int)p.T && s.lives;
        int64_t at = there ? place : 0;
        cp_async_16_or_zeros(ring + s.lane * 16, a.a.saved.packs + at * SLSTM_FACTORS, there);
        cp_async<4>(ring + room::PACKS + s.lane * 4, a.a.saved.keep + at, there ? 4 : 0);
        if (s.lane < SLSTM_ROWS && s.has_row(s.lane))
            cp_async_16_or_zeros(ring + room::PACKS + room::KEEP + s.lane * 16, dy, fetches && round < (int)p.T);
        cp_async_commit();
        place -= p.D, dy -= p.y.step;
    }
    /* What comes to y of a token from the token after, or from the final state; the carry with it. round: how many
     * tokens are done. */
    __device__ __forceinline__ float enter(int round) {
        const slstm_problem &p = a.a.p;
        bool begins = documents.next != documents.now;
        documents.look(p, s, p.T - 2 - round);
        if (round > 0) {
            float into = slstm_clipped(take_parts(round), a.clip);
            if (begins) carry = {0, 0};
            return begins ? 0.0f : into;
        }
        bool given = a.dfinal && s.lives;
        carry.dc = given ? a.dfinal[slstm_place(p, s.b, SLSTM_C, s.unit)] : 0.0f;
        carry.dn = given ? a.dfinal[slstm_place(p, s.b, SLSTM_N, s.unit)] : 0.0f;
        return given ? a.dfinal[slstm_place(p, s.b, SLSTM_Y, s.unit)] : 0.0f;
    }
    /* The blocks' sums for the lane's unit and row, added in an order of their own. */
    __device__ __forceinline__ float take_parts(int round) {
        int turn = (round - 1) & 1;
        uint64_t *flag = reinterpret_cast<uint64_t *>(shared + room::FLAGS) + turn;
        flag_wait(flag, (unsigned)((round - 1) >> 1 & 1));
        if (threadIdx.x == 0 && round + 1 < sends) flag_expect(flag, awaited);
        const char *parts = shared + room::PARTS + (turn * room::GROUPS + s.group) * room::PART;
        parts += s.lane * 8 + s.half * 4;
        float all = 0;
#pragma unroll
        for (int first = 0; first < 16; first += 8) {
            if (first >= a.a.active) break;
            float part[8];
#pragma unroll
            for (int i = 0; i < 8; i++)
                part[i] = first + i < a.a.active
                              ? *reinterpret_cast<const float *>(parts + (first + i) * room::OF_BLOCK) : 0.0f;
            all += ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
        }
        return all;
    }
    /* draw of the thread's unit, to shared memory. */
    __device__ __forceinline__ void gradients(char *draws, int round) {
        slstm_factors f;
        float draw[SLSTM_GATES];
        bf16 *to_draws = reinterpret_cast<bf16 *>(draws) + (s.group * SLSTM_ROWS + s.row) * SLSTM_EIGHT + s.g;
        cp_async_wait<STAGES - 2>();
        __syncwarp();
        const char *ring = shared + room::RING + round % STAGES * room::STAGE + s.warp * room::OF_WARP;
        unpack_factors(f, reinterpret_cast<const uint4 *>(ring)[s.lane],
                       reinterpret_cast<const float *>(ring + room::PACKS)[s.lane]);
        const bf16 *given = reinterpret_cast<const bf16 *>(ring + room::PACKS + room::KEEP);
        float above = to_float(given[s.row * SLSTM_EIGHT + s.g]);
        slstm_backward_unit(carry, draw, f, enter(round) + above);
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) {
            to_draws[g * room::GROUPS * SLSTM_ROWS * SLSTM_EIGHT] = __float2bfloat16_rn(draw[g]);
            dbias[g] += draw[g];
        }
    }
    __device__ __forceinline__ void step(int round) {
        char *draws = shared + (round & 1) * room::DRAW;
        if (s.there) gradients(draws, round);
        __syncthreads();
        if (round < sends) send(draws, round & 1);
        if (!s.there) return;
        if (writes)
            *reinterpret_cast<uint4 *>(dx) = reinterpret_cast<const uint4 *>(
                draws)[(s.lane / 8 * room::GROUPS + s.group) * SLSTM_ROWS + s.lane % 8];
        dx -= a.a.p.x.step;
        fetch(round + STAGES - 1);
    }
    /* The block's part of what comes to the token before, to the blocks that have the units. */
    __device__ __forceinline__ void send(const char *draws, int turn) {
        float d[ROWS][4];
        multiply_draw<ROWS, TILES>(d, r, draws, s.lane);
        int to_flag = room::FLAGS + turn * 8 - (room::PARTS + s.rank * room::OF_BLOCK + s.lane * 8);
#pragma unroll
        for (int i = 0; i < 2 * ROWS; i++) {
            if ((2 * s.warp * ROWS + i) * SLSTM_EIGHT >= (int)a.a.p.P) continue;
            cluster_place place_of_sums = to[i / 2][i % 2];
            float2 sums = make_float2(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
            send_8(place_of_sums + turn * room::GROUPS * room::PART, sums,
                   place_of_sums + (to_flag - (int)(locals >> 4 * i & 15) * room::PART));
        }
    }
    __device__ __forceinline__ void close() {
        const slstm_problem &p = a.a.p;
        cp_async_wait<0>();
        float into = a.dinitial ? enter((int)p.T) : 0.0f;
        if (a.dinitial && s.lives) {
            a.dinitial[slstm_place(p, s.b, SLSTM_Y, s.unit)] = into;
            a.dinitial[slstm_place(p, s.b, SLSTM_C, s.unit)] = carry.dc;
            a.dinitial[slstm_place(p, s.b, SLSTM_N, s.unit)] = carry.dn;
            a.dinitial[slstm_place(p, s.b, SLSTM_M, s.unit)] = 0;
        }
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) {
            float v = dbias[g] + __shfl_xor_sync(FULL, dbias[g], 1);
            v += __shfl_xor_sync(FULL, v, 2);
            if (s.q == 0) a.partials[((s.bunch * SLSTM_SPLIT + s.half) * SLSTM_GATES + g) * p.D + s.unit] = v;
        }
    }
};

template <int ROWS, int TILES>
__global__ void __launch_bounds__(WARP * SLSTM_SPLIT * TILES / 2) slstm_walk_back_kernel(backward_job a) {
#ifndef WITHOUT_CLUSTERS
    DYNAMIC_SHARED(char, shared);
    typedef backward_walk<ROWS, TILES> walk_of;
    const typename walk_of::seat s(a.a);
    uint64_t *flags = reinterpret_cast<uint64_t *>(shared + walk_of::room::FLAGS);
    walk_of walk(a, s, shared);
    for (int i = threadIdx.x; i < 2 * walk_of::room::DRAW / 4; i += blockDim.x)
        reinterpret_cast<uint32_t *>(shared)[i] = 0;
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
#pragma unroll 1
        for (int round = 0; round < (int)a.a.p.T; round++) walk.step(round);
        if (s.there) walk.close();
    }
    cluster_arrive();
    cluster_wait();
#endif
}

/* --- the choice --------------------------------------------------------------------------------------------------- */

/* with_forward(plan, [&](auto kernel, int shared) { ... }): the kernel and its shared memory. */
template <class F> static bool with_forward(cluster_plan c, F f) {
    switch (c.tiles) {
    case 2: return f(slstm_walk_kernel<2>, forward_room<2>::SIZE);
    case 4: return f(slstm_walk_kernel<4>, forward_room<4>::SIZE);
    case 6: return f(slstm_walk_kernel<6>, forward_room<6>::SIZE);
    case 8: return f(slstm_walk_kernel<8>, forward_room<8>::SIZE);
    case 12: return f(slstm_walk_kernel<12>, forward_room<12>::SIZE);
    default: return f(slstm_walk_kernel<16>, forward_room<16>::SIZE);
    }
}

template <class F> static bool with_backward(cluster_plan c, F f) {
    if (c.blocks == 16) return f(slstm_walk_back_kernel<4, 8>, backward_room<8>::size(c.blocks));
    switch (c.units) {
    case 16: return f(slstm_walk_back_kernel<2, 4>, backward_room<4>::size(c.blocks));
    case 24: return f(slstm_walk_back_kernel<2, 6>, backward_room<6>::size(c.blocks));
    case 32: return f(slstm_walk_back_kernel<2, 8>, backward_room<8>::size(c.blocks));
    default: return f(slstm_walk_back_kernel<2, 12>, backward_room<12>::size(c.blocks));
    }
}

static bool shape_fits(const slstm_problem &p) {
    return p.P % SLSTM_EIGHT == 0 && p.P <= 512 && p.T < INT32_MAX / 2;
}

static cluster_job job_of(const slstm_problem &p, tensor r, void *saved, cluster_plan c) {
    return {p, data_of<bf16>(r), slstm_saved<bf16>(saved, p), (int)ceil_div(p.P, c.units)};
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
    return SLSTM_SPLIT * ceil_div(s.B, SLSTM_ROWS);
}

bool slstm_cluster_backward(struct device *dev, const slstm_problem &p, tensor dx, tensor dinitial, tensor dy,
                            tensor dfinal, const void *saved, tensor r, float clip, float *partials, int64_t *rows) {
    if (dx.dtype != DTYPE_BF16 || !shape_fits(p) || !vectors_fit(dx, 8) || !vectors_fit(dy, 8)) return false;
    cluster_plan c = plan_of(p.P);
    backward_job job = {job_of(p, r, (void *)saved, c), data_of<bf16>(dx), data_of<bf16>(dy), data_of<float>(dfinal),
                        data_of<float>(dinitial), partials, clip};
    *rows = SLSTM_SPLIT * ceil_div(p.B, SLSTM_ROWS);
    return with_backward(c, [&](auto kernel, int shared) {
        if (!clusters_fit(kernel, threads_of(c), c.blocks, (size_t)shared)) return false;
        LAUNCH_CLUSTERS(dev, kernel, grid_of(p, c), threads_of(c), c.blocks, (size_t)shared, job);
        return true;
    });
}
