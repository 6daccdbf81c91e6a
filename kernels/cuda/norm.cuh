/* norm.cuh: how norms of rows run on a GPU: teams of warps that take a row, and the rows of a backward pass on their
 * way through shared memory. Used by norm.cu and head_norm.cu.
 *
 * A team of 1, 2, 4 or 8 warps takes a row (or a group of a row); a block is one team, or four of one warp or two.
 * Short rows may have teams of 8 or 16 lanes (head_norm.cu). A thread takes its elements in vectors of V.
 * Forward: a row a team, in registers; all of it is asked for before any of it is used.
 * Backward (staged_rows): a block takes rows in turns. The operands of its next rows are copied to shared memory
 * without waiting while it works on these, so some 100 KB a multiprocessor are on their way all the time, and registers
 * hold only the sums of the weights' gradients. These are added over a block's teams and over the blocks (reduce.cu),
 * in an order that depends on the number of rows and their width only.
 */
#ifndef RIVERRUN_CUDA_NORM_CUH
#define RIVERRUN_CUDA_NORM_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared.cuh"

enum {
    TEAM_WARPS = 8,            /* the most */
    THREADS_MAX = 256,         /* of a block */
    ELEMENTS_MAX = 64,         /* of a row in a thread */
    BLOCKS_MOST = 6,           /* of a backward pass on a multiprocessor */
    RUNS_MAX = 132 * BLOCKS_MOST, /* its blocks, and rows of partial sums */
    THREADS_TOGETHER = 768,    /* of its blocks on a multiprocessor: 80 registers each */
    SHARED_MOST = 225 << 10,   /* bytes that they can have */
    SHARED_STATIC = 1 << 10    /* more than what a kernel has beside its rows */
};

/* --- teams -------------------------------------------------------------------------------------------------------- */

/* Warps of a team and the least of the numbers of elements that kernels are built for. */
template <int V, int MOST, class F> static void with_team(int64_t n, F f) {
    int warps = 1;
    auto elements = [&] { return ceil_div(n, (int64_t)WARP * warps * V) * V; };
    while (elements() > MOST && warps < TEAM_WARPS) warps *= 2;
    ASSERT(elements() <= ELEMENTS_MAX);
    dim3 block((unsigned)(WARP * warps), warps <= 2 ? 4 : 1);
    int64_t each = elements();
    if (each <= 16) f(constant<16 / V>(), block);
    else if (each <= 24) f(constant<24 / V>(), block);
    else if (each <= 32) f(constant<32 / V>(), block);
    else if (each <= 48) f(constant<48 / V>(), block);
    else f(constant<ELEMENTS_MAX / V>(), block);
}

/* Run f(V, ITEMS, block): rows of n, read in vectors of V elements if `wide`, else one at a time, are dealt out to
 * teams of block.x threads, block.y teams a block, each thread taking ITEMS vectors. */
template <int V, int MOST, class F> static void with_row_shape(bool wide, int64_t n, F f) {
    if (wide) with_team<V, MOST>(n, [&](auto items, dim3 block) { f(constant<V>(), items, block); });
    else with_team<1, MOST>(n, [&](auto items, dim3 block) { f(constant<1>(), items, block); });
}

/* The element at which item k of this thread starts. */
template <int V> __device__ __forceinline__ int item_at(int k) {
    return (int)(k * blockDim.x + threadIdx.x) * V;
}

/* The sum over a team's lanes in this thread's warp. */
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        if (offset < (int)blockDim.x) v += __shfl_xor_sync(FULL, v, offset);
    return v;
}

/* The sum over a team, in each of its threads. All of the block take part. `room` takes turns between two, which saves
 * a barrier a sum. */
struct team_room {
    float of_warp[THREADS_MAX / WARP], more[THREADS_MAX / WARP];
};

__device__ __forceinline__ float team_sum(float v, team_room &room) {
    int warps = (int)blockDim.x / WARP;
    v = lanes_sum(v);
    if (warps <= 1) return v;
    float *mine = room.of_warp + threadIdx.y * warps;
    if (threadIdx.x % WARP == 0) mine[threadIdx.x / WARP] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < warps; w++) v += mine[w];
    return v;
}

/* The same of two numbers. */
__device__ __forceinline__ void team_sums(float &a, float &b, team_room &room) {
    int warps = (int)blockDim.x / WARP, mine = (int)threadIdx.y * warps;
    a = lanes_sum(a);
    b = lanes_sum(b);
    if (warps <= 1) return;
    if (threadIdx.x % WARP == 0) {
        room.of_warp[mine + threadIdx.x / WARP] = a;
        room.more[mine + threadIdx.x / WARP] = b;
    }
    __syncthreads();
    a = b = 0;
    for (int w = 0; w < warps; w++) {
        a += room.of_warp[mine + w];
        b += room.more[mine + w];
    }
}

/* The items of this thread, of a row of n; what lies behind the end is 0. */
template <int ITEMS, int V, class T>
__device__ __forceinline__ void load_items(pack<T, V> (&items)[ITEMS], const T *row, int n) {
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int i = item_at<V>(k);
        if (i < n) items[k] = *reinterpret_cast<const pack<T, V> *>(row + i);
        else items[k] = {};
    }
}

/* --- rows in shared memory, of a backward pass -------------------------------------------------------------------- */

/* How the rows of a backward pass are dealt out: blocks, and `slots` places for a row, two or one, for each team. The
 * number of blocks is a function of R and D, since it is how sums are cut; it may not depend on the device. What a chip
 * has less of shared memory costs places. */
struct staging {
    unsigned blocks;
    int slots, slot_bytes;
    size_t shared;
};

/* `bytes` an element of a row of n. The blocks of `groups` groups of a row share the multiprocessors. */
static struct staging staging_of(struct device *dev, int64_t R, int64_t n, int64_t bytes, dim3 block,
                                 int64_t groups = 1) {
    struct staging s;
    s.slot_bytes = (int)(ceil_div(n * bytes, 16) * 16);
    s.slots = 2 * (int64_t)s.slot_bytes * block.y > SHARED_MOST ? 1 : 2;
    s.shared = (size_t)(s.slots * s.slot_bytes) * block.y;
    size_t sums = (size_t)(block.y - 1) * (size_t)n * sizeof(float); /* add_teams's */
    if (s.shared < sums) s.shared = sums;
    int64_t fit = SHARED_MOST / ((int64_t)s.shared + 1280), blocks = at_most(fit, BLOCKS_MOST);
    blocks = at_most(blocks < 1 ? 1 : blocks, THREADS_TOGETHER / (block.x * block.y));
    s.blocks = (unsigned)at_most(ceil_div(R, block.y), ceil_div(RUNS_MAX / BLOCKS_MOST * blocks, groups));
    if (s.shared + SHARED_STATIC > cuda_shared_most(dev)) s.slots = 1, s.shared = (size_t)s.slot_bytes * block.y;
    if (s.shared < sums) s.shared = sums;
    return s;
}

/* Threads of a backward pass with few sums have so few registers that THREADS_TOGETHER fit. */
#define BACKWARD_BOUNDS __launch_bounds__(THREADS_MAX, ITEMS * V <= 24 ? THREADS_TOGETHER / THREADS_MAX : 1)

/* Copy one item without waiting. */
template <int V, class T> __device__ __forceinline__ void stage_item(T *shared, const T *global) {
    if constexpr (V * sizeof(T) >= 4) cp_async<V * (int)sizeof(T)>(shared, global);
    else *shared = *global;
}

/* The rows of this thread's team, one after another: copy(row, room) starts copying this thread's items of a row into
 * the team's room in shared memory, with stage_item; work(row, room, turn) is called when they are there, by all
 * threads of the block, also where row >= R for some; `turn` is 0 and 1 alternately. */
template <class Copy, class Work>
__device__ __forceinline__ void staged_rows(int64_t R, char *memory, struct staging staging, Copy copy, Work work) {
    char *slots = memory + (int)threadIdx.y * staging.slots * staging.slot_bytes;
    auto fetch = [&](int64_t row, int slot) {
        if (row < R) copy(row, slots + slot * staging.slot_bytes);
        cp_async_commit();
    };
    int64_t first = (int64_t)blockIdx.x * blockDim.y, step = (int64_t)gridDim.x * blockDim.y;
    fetch(first + threadIdx.y, 0);
    for (int turn = 0; first < R; first += step, turn ^= 1) {
        int64_t row = first + threadIdx.y;
        int slot = staging.slots == 2 ? turn : 0;
        if (staging.slots == 2) fetch(row + step, !slot);
        if (staging.slots == 2) cp_async_wait<1>();
        else cp_async_wait<0>();
        work(row, slots + slot * staging.slot_bytes, turn);
        if (staging.slots == 1) fetch(row + step, 0);
    }
}

/* A number a row, read a turn before it is needed: next(row) is at(row), asked for when the row before was. */
template <class At> struct read_ahead {
    At at;
    int64_t R, step;
    float ahead;

    __device__ __forceinline__ read_ahead(At number_at, int64_t rows)
        : at(number_at), R(rows), step((int64_t)gridDim.x * blockDim.y) {
        int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
        ahead = row < R ? at(row) : 0.0f;
    }

    __device__ __forceinline__ float next(int64_t row) {
        float now = ahead;
        ahead = row + step < R ? at(row + step) : 0.0f;
        return now;
    }
};

/* The sums of columns that the teams of a block hold, added in the order of the teams into `partial`, a row of n.
 * `room` is the shared memory of the rows, no longer needed. */
template <int ITEMS, int V>
__device__ __forceinline__ void add_teams(float *partial, float (&sum)[ITEMS][V], int n, float *room) {
    if (blockDim.y > 1) __syncthreads();
    if (threadIdx.y > 0) {
#pragma unroll
        for (int k = 0; k < ITEMS; k++)
            if (item_at<V>(k) < n) store_floats<V>(room + (threadIdx.y - 1) * n + item_at<V>(k), sum[k]);
    }
    if (blockDim.y > 1) __syncthreads();
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int i = item_at<V>(k);
        if (i >= n) continue;
        for (int team = 1; team < (int)blockDim.y; team++) {
            float more[V];
            load_floats<V>(more, room + (team - 1) * n + i);
#pragma unroll
            for (int j = 0; j < V; j++) sum[k][j] += more[j];
        }
        store_floats<V>(partial + i, sum[k]);
    }
}

/* Can each group of each row be read in vectors of V elements? */
static bool groups_fit(int64_t n, int V, int count, const tensor *views) {
    for (int i = 0; i < count; i++)
        if (!vectors_fit(views[i], V)) return false;
    return n % V == 0;
}

#endif
