/* norm.cu: residual add + RMSNorm, and the gated RMSNorm of Mamba-2; forward and backward of both.
 *
 *   r = residual + branch;  rstd = 1/sqrt(mean(r^2) + eps);  y = r rstd weight
 *   xh = r rstd;  wdy = weight dy;  c = mean(xh wdy);  dr = (wdy - xh c) rstd + dnext;  dweight += sum dy xh
 *   u = y silu(z);  rstd = 1/sqrt(mean(u^2) + eps);  g = u rstd weight, in groups of n = I / groups
 *   xh = u rstd;  wdg = weight dg;  c = mean(xh wdg);  du = (wdg - xh c) rstd
 *   dy = du silu(z);  dz = du y silu'(z);  dweight += sum dg xh
 *
 * A team of 1, 2, 4 or 8 warps takes a row (or a group of a row); a block is one team, or four of one warp or two. A
 * thread takes its elements in vectors of V.
 * Forward: a row a team, in registers; all of it is asked for before any of it is used.
 * Backward: a block takes rows in turns. The operands of its next rows are copied to shared memory without waiting
 * while it works on these, so some 100 KB a multiprocessor are on their way all the time, and registers hold only the
 * sums of dweight. These are added over a block's teams and over the blocks (reduce.cu), in an order that depends on R
 * and D only.
 * Bytes a row, with e bytes an activation: forward (8 + 2e) D, backward (12 + 2e) D; gated: forward 3eI, backward 5eI
 * (6eI with g again, which is written in the place of dg, so that no forward pass has to be run again).
 * All are bound by bandwidth; in bf16 at 3.0 TB/s, forward / backward: R 32,768, D 768 in 0.10 / 0.14 ms, I 1536 in
 * 0.10 / 0.17 ms; R 16,384, D 2048 in 0.13 / 0.18 ms, I 4096 in 0.13 / 0.23 ms.
 */
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

enum {
    TEAM_WARPS = 8,            /* the most */
    THREADS_MAX = 256,         /* of a block */
    FORWARD_ELEMENTS = 48,     /* of a row in a thread, unless the row is longer than that of eight warps */
    ADD_ELEMENTS = 16,         /* the same in the backward passes, which want more warps */
    GATED_ELEMENTS = 24,
    ELEMENTS_MAX = 64,
    BLOCKS_MOST = 6,           /* of a backward pass on a multiprocessor */
    RUNS_MAX = 132 * BLOCKS_MOST, /* its blocks, and rows of partial sums */
    THREADS_TOGETHER = 768,    /* of its blocks on a multiprocessor: 80 registers each */
    SHARED_MOST = 225 << 10    /* bytes that they can have */
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

/* The sum over a team, in each of its threads. All of the block take part. `room` takes turns between two, which saves
 * a barrier a sum. */
struct team_room {
    float of_warp[THREADS_MAX / WARP];
};

__device__ __forceinline__ float team_sum(float v, team_room &room) {
    int warps = (int)blockDim.x / WARP;
    v = warp_sum(v);
    if (warps == 1) return v;
    float *mine = room.of_warp + threadIdx.y * warps;
    if (threadIdx.x % WARP == 0) mine[threadIdx.x / WARP] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < warps; w++) v += mine[w];
    return v;
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
 * number of blocks is a function of R and D, since it is how sums are cut; it may not depend on the device. */
struct staging {
    unsigned blocks;
    int slots, slot_bytes;
    size_t shared;
};

/* `bytes` an element of a row of n. */
static struct staging staging_of(int64_t R, int64_t n, int64_t bytes, dim3 block) {
    struct staging s;
    s.slot_bytes = (int)(ceil_div(n * bytes, 16) * 16);
    s.slots = 2 * (int64_t)s.slot_bytes * block.y > SHARED_MOST ? 1 : 2;
    s.shared = (size_t)(s.slots * s.slot_bytes) * block.y;
    size_t sums = (size_t)(block.y - 1) * (size_t)n * sizeof(float); /* add_teams's */
    if (s.shared < sums) s.shared = sums;
    int64_t fit = SHARED_MOST / ((int64_t)s.shared + 1280), blocks = at_most(fit, BLOCKS_MOST);
    blocks = at_most(blocks < 1 ? 1 : blocks, THREADS_TOGETHER / (block.x * block.y));
    s.blocks = (unsigned)at_most(ceil_div(R, block.y), RUNS_MAX / BLOCKS_MOST * blocks);
    return s;
}

/* Threads of a backward pass with few sums have so few registers that THREADS_TOGETHER fit. */
#define BACKWARD_BOUNDS __launch_bounds__(THREADS_MAX, ITEMS * V <= 24 ? THREADS_TOGETHER / THREADS_MAX : 1)

/* Allow a kernel the shared memory it is launched with. */
template <class K> static void allow_shared(struct device *dev, K *kernel, size_t bytes) {
    cuda_expect(dev, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
                "shared memory of a norm");
}

/* Copy one item without waiting. */
template <int V, class T> __device__ __forceinline__ void stage_item(T *shared, const T *global) {
    if constexpr (V * sizeof(T) >= 4) cp_async<V * (int)sizeof(T)>(shared, global);
    else *shared = *global;
}

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

/* --- residual add + RMSNorm --------------------------------------------------------------------------------------- */

template <class T, int V, int ITEMS>
__global__ void __launch_bounds__(THREADS_MAX)
add_rmsnorm_forward_kernel(float *out_residual, T *y, float *rstd, const float *residual, const T *branch,
                           const float *weight, int64_t R, int D, float eps) {
    __shared__ team_room room;
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, at = row * D;
    int end = row < R ? D : 0;
    pack<float, V> r[ITEMS];
    pack<T, V> more[ITEMS] = {};
    load_items(r, residual + at, end);
    if (branch) load_items(more, branch + at, end);
    float squares = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
#pragma unroll
        for (int j = 0; j < V; j++) {
            r[k].v[j] += to_float(more[k].v[j]);
            squares += r[k].v[j] * r[k].v[j];
        }
    if (branch || out_residual != residual) {
#pragma unroll
        for (int k = 0; k < ITEMS; k++)
            if (item_at<V>(k) < end) store_floats<V>(out_residual + at + item_at<V>(k), r[k].v);
    }
    float s = 1.0f / sqrtf(team_sum(squares, room) / (float)D + eps);
    if (threadIdx.x == 0 && row < R) rstd[row] = s;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int i = item_at<V>(k);
        if (i >= end) continue;
        float w[V];
        load_floats<V>(w, weight + i);
#pragma unroll
        for (int j = 0; j < V; j++) w[j] *= r[k].v[j] * s;
        store_floats<V>(y + at + i, w);
    }
}

extern "C" void cuda_add_rmsnorm_forward(struct device *dev, tensor out_residual, tensor y, tensor rstd,
                                         tensor residual, tensor branch, tensor weight, double eps) {
    int64_t R = residual.dim[0], D = residual.dim[1];
    ASSERT(tensor_is(y, 2, R, D) && tensor_is(out_residual, 2, R, D) && weight.dtype == DTYPE_F32);
    ASSERT(!tensor_given(branch) || branch.dtype == y.dtype);
    bool wide = vectors_fit(y, 4) && vectors_fit(residual, 4) && vectors_fit(branch, 4) && vectors_fit(weight, 4) &&
                vectors_fit(out_residual, 4);
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_row_shape<4, FORWARD_ELEMENTS>(wide, D, [&](auto width, auto items, dim3 block) {
            LAUNCH(dev, (add_rmsnorm_forward_kernel<T, width.value, items.value>), (unsigned)ceil_div(R, block.y),
                   block, 0, data_of<float>(out_residual), data_of<T>(y), data_of<float>(rstd),
                   data_of<float>(residual), data_of<T>(branch), data_of<float>(weight), R, (int)D, (float)eps);
        });
    });
}

/* A slot: the row's residual (D floats), dnext (D floats), dy (D of T). */
template <class T, int V, int ITEMS>
__global__ void BACKWARD_BOUNDS
add_rmsnorm_backward_kernel(float *dresidual, T *dbranch, float *partial, const T *dy, const float *dnext,
                            const float *residual, const float *rstd, const float *weight, int64_t R, int D,
                            struct staging staging) {
    DYNAMIC_SHARED(char, memory);
    __shared__ team_room room[2];
    char *slots = memory + (int)threadIdx.y * staging.slots * staging.slot_bytes;
    auto fetch = [&](int64_t row, int slot) {
        float *at = (float *)(slots + slot * staging.slot_bytes);
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (row >= R || i >= D) break;
            stage_item<V>(at + i, residual + row * D + i);
            if (dnext) stage_item<V>(at + D + i, dnext + row * D + i);
            stage_item<V>((T *)(at + 2 * D) + i, dy + row * D + i);
        }
        cp_async_commit();
    };
    float sum[ITEMS][V] = {};
    int64_t first = (int64_t)blockIdx.x * blockDim.y, step = (int64_t)gridDim.x * blockDim.y;
    fetch(first + threadIdx.y, 0);
    float ahead = first + threadIdx.y < R ? rstd[first + threadIdx.y] : 0.0f;
    for (int turn = 0; first < R; first += step, turn ^= 1) {
        int64_t row = first + threadIdx.y;
        int end = row < R ? D : 0;
        float s = ahead, dot = 0;
        ahead = row + step < R ? rstd[row + step] : 0.0f;
        int slot = staging.slots == 2 ? turn : 0;
        if (staging.slots == 2) fetch(row + step, !slot);
        if (staging.slots == 2) cp_async_wait<1>();
        else cp_async_wait<0>();
        const float *in = (const float *)(slots + slot * staging.slot_bytes), *next = in + D;
        const T *d = (const T *)(in + 2 * D);
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], g[V], w[V];
            load_floats<V>(x, in + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float product = g[j] * (x[j] * s);
                sum[k][j] += product;
                dot += product * w[j];
            }
        }
        float c = team_sum(dot, room[turn]) / (float)D * s;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], g[V], w[V], out[V] = {};
            load_floats<V>(x, in + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + i);
            if (dnext) load_floats<V>(out, next + i);
#pragma unroll
            for (int j = 0; j < V; j++) out[j] += (w[j] * g[j] - x[j] * c) * s;
            store_floats<V>(dresidual + row * D + i, out);
            if (dbranch) store_floats<V>(dbranch + row * D + i, out);
        }
        if (staging.slots == 1) fetch(row + step, 0);
    }
    add_teams(partial + (int64_t)blockIdx.x * D, sum, D, (float *)memory);
}

extern "C" size_t cuda_add_rmsnorm_backward_scratch(int64_t R, int64_t D) {
    return (size_t)(at_most(R, RUNS_MAX) * D) * sizeof(float);
}

extern "C" void cuda_add_rmsnorm_backward(struct device *dev, tensor dresidual, tensor dbranch, tensor dweight,
                                          tensor dy, tensor dnext, tensor residual, tensor rstd, tensor weight,
                                          void *scratch) {
    int64_t R = residual.dim[0], D = residual.dim[1], runs = 0;
    ASSERT(tensor_is(dy, 2, R, D) && tensor_is(dresidual, 2, R, D) && weight.dtype == DTYPE_F32);
    bool wide = vectors_fit(dy, 4) && vectors_fit(residual, 4) && vectors_fit(dnext, 4) && vectors_fit(weight, 4) &&
                vectors_fit(dresidual, 4) && vectors_fit(dbranch, 4) && (uintptr_t)scratch % 16 == 0;
    with_type(dy.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_row_shape<4, ADD_ELEMENTS>(wide, D, [&](auto width, auto items, dim3 block) {
            struct staging staging = staging_of(R, D, 8 + (int64_t)sizeof(T), block);
            allow_shared(dev, add_rmsnorm_backward_kernel<T, width.value, items.value>, staging.shared);
            LAUNCH(dev, (add_rmsnorm_backward_kernel<T, width.value, items.value>), staging.blocks, block,
                   staging.shared, data_of<float>(dresidual), data_of<T>(dbranch), (float *)scratch, data_of<T>(dy),
                   data_of<float>(dnext), data_of<float>(residual), data_of<float>(rstd), data_of<float>(weight), R,
                   (int)D, staging);
            runs = staging.blocks;
        });
    });
    cuda_add_partials(dev, data_of<float>(dweight), (const float *)scratch, runs, D);
}

/* --- gated RMSNorm: blockIdx.y is the group ----------------------------------------------------------------------- */

template <class T, int V, int ITEMS>
__global__ void __launch_bounds__(THREADS_MAX)
gated_rmsnorm_forward_kernel(T *g, float *rstd, const T *y, const T *z, int64_t z_step, const float *weight, int64_t R,
                             int64_t I, int n, float eps) {
    __shared__ team_room room;
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, group = (int64_t)blockIdx.y * n, at = row * I + group;
    int end = row < R ? n : 0;
    pack<T, V> in[ITEMS], gate[ITEMS];
    load_items(in, y + at, end);
    load_items(gate, z + row * z_step + group, end);
    float u[ITEMS][V], squares = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
#pragma unroll
        for (int j = 0; j < V; j++) {
            u[k][j] = to_float(in[k].v[j]) * silu_of(to_float(gate[k].v[j]));
            squares += u[k][j] * u[k][j];
        }
    float s = 1.0f / sqrtf(team_sum(squares, room) / (float)n + eps);
    if (threadIdx.x == 0 && row < R) rstd[row * gridDim.y + blockIdx.y] = s;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int i = item_at<V>(k);
        if (i >= end) continue;
        float w[V];
        load_floats<V>(w, weight + group + i);
#pragma unroll
        for (int j = 0; j < V; j++) w[j] *= u[k][j] * s;
        store_floats<V>(g + at + i, w);
    }
}

/* Can each group of each row be read in vectors of V elements? */
static bool groups_fit(int64_t n, int V, int count, const tensor *views) {
    for (int i = 0; i < count; i++)
        if (!vectors_fit(views[i], V)) return false;
    return n % V == 0;
}

extern "C" void cuda_gated_rmsnorm_forward(struct device *dev, tensor g, tensor rstd, tensor y, tensor z, tensor weight,
                                           double eps) {
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1], n = I / groups;
    ASSERT(tensor_is(g, 2, R, I) && tensor_is(z, 2, R, I) && I % groups == 0 && weight.dtype == DTYPE_F32);
    const tensor views[] = {g, y, z, weight};
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = groups_fit(n, vector_of<T>, 4, views);
        with_row_shape<vector_of<T>, FORWARD_ELEMENTS>(wide, n, [&](auto width, auto items, dim3 block) {
            dim3 grid((unsigned)ceil_div(R, block.y), (unsigned)groups);
            LAUNCH(dev, (gated_rmsnorm_forward_kernel<T, width.value, items.value>), grid, block, 0, data_of<T>(g),
                   data_of<float>(rstd), data_of<T>(y), data_of<T>(z), z.stride[0], data_of<float>(weight), R, I,
                   (int)n, (float)eps);
        });
    });
}

/* A slot: y, z and dg of a row's group, n of T each. `again`: g, or NULL; it may be dg, whose row has been read before
 * g's is written. */
template <class T, int V, int ITEMS>
__global__ void BACKWARD_BOUNDS
gated_rmsnorm_backward_kernel(T *dy, T *dz, int64_t dz_step, float *partial, T *again, const T *dg, const T *y,
                              const T *z, int64_t z_step, const float *rstd, const float *weight, int64_t R, int64_t I,
                              int n, struct staging staging) {
    DYNAMIC_SHARED(char, memory);
    __shared__ team_room room[2];
    int64_t group = (int64_t)blockIdx.y * n;
    char *slots = memory + (int)threadIdx.y * staging.slots * staging.slot_bytes;
    auto fetch = [&](int64_t row, int slot) {
        T *at = (T *)(slots + slot * staging.slot_bytes);
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (row >= R || i >= n) break;
            stage_item<V>(at + i, y + row * I + group + i);
            stage_item<V>(at + n + i, z + row * z_step + group + i);
            stage_item<V>(at + 2 * n + i, dg + row * I + group + i);
        }
        cp_async_commit();
    };
    float sum[ITEMS][V] = {};
    int64_t first = (int64_t)blockIdx.x * blockDim.y, step = (int64_t)gridDim.x * blockDim.y;
    fetch(first + threadIdx.y, 0);
    auto rstd_of = [&](int64_t row) { return row < R ? rstd[row * gridDim.y + blockIdx.y] : 0.0f; };
    float ahead = rstd_of(first + threadIdx.y);
    for (int turn = 0; first < R; first += step, turn ^= 1) {
        int64_t row = first + threadIdx.y;
        int end = row < R ? n : 0;
        float s = ahead, dot = 0;
        ahead = rstd_of(row + step);
        int slot = staging.slots == 2 ? turn : 0;
        if (staging.slots == 2) fetch(row + step, !slot);
        if (staging.slots == 2) cp_async_wait<1>();
        else cp_async_wait<0>();
        const T *in = (const T *)(slots + slot * staging.slot_bytes), *gate = in + n, *d = gate + n;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], v[V], g[V], w[V];
            load_floats<V>(x, in + i);
            load_floats<V>(v, gate + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + group + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float product = g[j] * x[j] * silu_of(v[j]);
                sum[k][j] += product * s;
                dot += product * w[j];
            }
        }
        float c = team_sum(dot, room[turn]) * s * s / (float)n;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], v[V], g[V], w[V];
            load_floats<V>(x, in + i);
            load_floats<V>(v, gate + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + group + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float open = sigmoid_of(v[j]), silu = v[j] * open, u = x[j] * silu;
                float du = (w[j] * g[j] - u * c) * s;
                v[j] = du * x[j] * (open + silu * (1.0f - open));
                x[j] = du * silu;
                w[j] *= u * s;
            }
            if (again) store_floats<V>(again + row * I + group + i, w);
            store_floats<V>(dy + row * I + group + i, x);
            store_floats<V>(dz + row * dz_step + group + i, v);
        }
        if (staging.slots == 1) fetch(row + step, 0);
    }
    add_teams(partial + (int64_t)blockIdx.x * I + group, sum, n, (float *)memory);
}

extern "C" size_t cuda_gated_rmsnorm_backward_scratch(int64_t R, int64_t I) {
    return (size_t)(at_most(R, RUNS_MAX) * I) * sizeof(float);
}

extern "C" void cuda_gated_rmsnorm_backward(struct device *dev, tensor dy, tensor dz, tensor dweight, tensor g,
                                            tensor dg, tensor y, tensor z, tensor rstd, tensor weight, void *scratch) {
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1], n = I / groups, runs = 0;
    ASSERT(tensor_is(dg, 2, R, I) && tensor_is(z, 2, R, I) && tensor_is(dz, 2, R, I) && tensor_is(dy, 2, R, I));
    ASSERT(!tensor_given(g) || tensor_is(g, 2, R, I));
    const tensor views[] = {dy, dz, g, dg, y, z, weight};
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = groups_fit(n, vector_of<T>, 7, views) && (uintptr_t)scratch % 16 == 0;
        with_row_shape<vector_of<T>, GATED_ELEMENTS>(wide, n, [&](auto width, auto items, dim3 block) {
            struct staging staging = staging_of(R, n, 3 * (int64_t)sizeof(T), block);
            allow_shared(dev, gated_rmsnorm_backward_kernel<T, width.value, items.value>, staging.shared);
            LAUNCH(dev, (gated_rmsnorm_backward_kernel<T, width.value, items.value>),
                   dim3(staging.blocks, (unsigned)groups), block, staging.shared, data_of<T>(dy), data_of<T>(dz),
                   dz.stride[0], (float *)scratch, data_of<T>(g), data_of<T>(dg), data_of<T>(y), data_of<T>(z),
                   z.stride[0], data_of<float>(rstd), data_of<float>(weight), R, I, (int)n, staging);
            runs = staging.blocks;
        });
    });
    cuda_add_partials(dev, data_of<float>(dweight), (const float *)scratch, runs, I);
}
