/* mlstm_walk.cu: the states of the mLSTM, chunk by chunk: C from the left, and its gradient dC from the right.
 *
 *   C  <- pass C  + sum_j leave_j k_j v_j^T                      n  <- pass n  + sum_j leave_j k_j
 *   dC <- pass dC + sum_i enter_i s q_i (inverse_i dh_i)^T       dn <- pass dn + sum_i enter_i s q_i inverse_i delta_i
 *
 * A block has a tile of 128 x 128 of one head's state in the accumulators of its four warps and walks over the chunks
 * of one segment; a chunk is two steps of a product (tile_product.cuh) with k = tokens. What is beside k or q in the
 * sums is multiplied into the fragments of the first operand. n is one more column, which the warps with the first
 * columns of the state add up beside them. The state as each chunk is met goes to memory in the activations' type, as
 * every product takes it. Leftwards, C of the other walk comes through the ring as well: pass <C, dC> is what the
 * gates' gradients need.
 *
 * Where heads, batch rows and tiles don't fill the chip, time is cut into segments: each is walked from zero for what
 * it adds, beginning behind the chunks of which nothing is left at its end; the states are carried over segments, and
 * then all go at once.
 *
 * Account, B 8, T 2048, H 4, K 256, V 512, bf16: 256 blocks of two a multiprocessor. Bytes: 100 MB of k and v (268 MB
 * from the L2 cache), 134 MB of states: 0.08 ms at 3.0 TB/s; leftwards 134 MB more: 0.12 ms. Products 17 GFLOP, 32
 * steps of a block of 790 clocks, two blocks: 0.03 ms at 1.7 GHz. Expected: 0.10 and 0.14 ms.
 *
 * Reproducible: every sum has its order from the shape.
 */
#include "kernels/cuda/mlstm.cuh"
#include "kernels/cuda/shared.cuh"
#include "kernels/cuda/ssd.cuh"

enum { STAGES = 3 };

template <class T> struct walk_room {
    product_stage<T> stages[STAGES];
    float factor[2][MLSTM_CHUNK], value[2][MLSTM_CHUNK]; /* of a chunk's tokens; of the vector's column */
};
static_assert(sizeof(walk_room<float>) <= SHARED_LEAST && sizeof(walk_room<__nv_bfloat16>) <= SHARED_LEAST,
              "what chips give");

/* The tile of a block. Grid: (heads x tiles, segments, batch rows). */
struct walk_place {
    int64_t row, head, segment;
    int k0, v0, tile;
};

__device__ __forceinline__ walk_place walk_place_of(const mlstm_problem &p) {
    int tiles = p.k_tiles * p.v_tiles, tile = (int)(blockIdx.x % tiles);
    return {(int64_t)blockIdx.z, (int64_t)blockIdx.x / tiles, (int64_t)blockIdx.y, tile / p.v_tiles * PRODUCT,
            tile % p.v_tiles * PRODUCT, tile};
}

/* The state with which a walk begins, and its end: fp32, without the rounding up of rows. */
__device__ __forceinline__ void state_read(product_sums &d, product_column &n, const float *from, const float *from_n,
                                           const walk_place &w, const product_place &at, const mlstm_problem &p) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int k = w.k0 + at.m0 + 16 * i + 8 * h + at.g;
            n.v[i][2 * h] = from_n && k < p.K ? from_n[k] : 0.0f;
            n.v[i][2 * h + 1] = 0.0f;
#pragma unroll
            for (int c = 0; c < 16; c++) {
                int v = w.v0 + at.n0 + c / 2 * 8 + at.q + c % 2;
                d.v[i][c / 2][2 * h + c % 2] = from && k < p.K && v < p.V ? from[(int64_t)k * p.V + v] : 0.0f;
            }
        }
}

__device__ __forceinline__ void vector_write(float *to, const product_column &n, int k0, const product_place &at,
                                             int K) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int k = k0 + at.m0 + 16 * i + 8 * h + at.g;
            if (at.q == 0 && k < K) to[k] = n.v[i][2 * h];
        }
}

/* <C, dC> of the warp's part of the tile, from the step that has C, and n . dn. */
template <class T>
__device__ __forceinline__ float through_part(const product_sums &d, product_stage<T> &stage, int part,
                                              const product_place &at) {
    float sum = 0;
    product_row_dots(d, stage, part, at, [&](int, float dot) { sum += dot; });
    return sum;
}

__device__ __forceinline__ float vector_dot(const product_column &n, const float *with, int k0, const product_place &at,
                                            int K) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int k = k0 + at.m0 + 16 * i + 8 * h + at.g;
            if (at.q == 0 && k < K) sum += n.v[i][2 * h] * with[k];
        }
    return sum;
}

/* What a token's row is multiplied with, and its part in the vector's column. */
template <bool LEFT, class T>
__device__ __forceinline__ float2 token_factor(const mlstm_walk<T> &walk, int64_t place, const mlstm_problem &p) {
    const mlstm_factors &f = walk.factors[place];
    int t = threadIdx.x;
    if (!LEFT) return make_float2(f.leave[t], 1.0f);
    return make_float2(f.enter[t] * f.inverse[t] * p.scale, walk.delta ? walk.delta[place * MLSTM_CHUNK + t] : 0.0f);
}

template <class T, bool LEFT>
__global__ void __launch_bounds__(PRODUCT_THREADS, sizeof(T) == 2 ? 2 : 1)
mlstm_walk_kernel(mlstm_walk<T> walk, mlstm_problem p) {
    typedef product_shape<T> shape;
    DYNAMIC_SHARED(char, memory);
    walk_room<T> &room = *reinterpret_cast<walk_room<T> *>(memory);
    walk_place w = walk_place_of(p);
    product_place at = product_place_of();
    int64_t first = w.segment * p.per_segment, end = at_most(first + p.per_segment, p.chunks);
    int64_t of_segment = (w.row * p.segments + w.segment) * p.H + w.head, size = (int64_t)p.K * p.V;
    int skipped = 0;
    if (walk.decays)
        skipped = chunks_without_trace((int)(end - first), at.lane, [&](int k) {
            return walk.factors[p.place(w.row, LEFT ? end - 1 - k : first + k, w.head)].pass;
        });
    (LEFT ? end : first) += LEFT ? -skipped : skipped;
    int count = (int)(end - first), dots = LEFT && walk.through ? shape::PARTS : 0, each = dots + shape::STEPS;
    bool at_end = walk.end && (LEFT ? w.segment == 0 : w.segment == p.segments - 1);
    bool whole = walk.to || at_end; /* else the last chunk is only met */
    bool vector = walk.vector && w.v0 == 0 && at.n0 == 0;
    auto chunk_of = [&](int k) { return LEFT ? end - 1 - k : first + k; };
    auto load = [&](int step, product_stage<T> &stage) {
        int64_t chunk = chunk_of(step / each), t0 = chunk * MLSTM_CHUNK + (step % each - dots) * shape::DEPTH;
        if (step % each < dots) {
            const T *met = walk.met + p.place(w.row, chunk, w.head) * p.size();
            mlstm_fill_state(stage.part(), met, p, w.k0 + step % each * shape::PART_ROWS, w.v0);
            return;
        }
        mlstm_fill(stage.deep(0), walk.rows, w.row, w.head, t0, p.T, w.k0);
        mlstm_fill(stage.deep(1), walk.columns, w.row, w.head, t0, p.T, w.v0);
    };
    product_ring<T, STAGES> ring(room.stages, count * each - (whole ? 0 : shape::STEPS), load);
    product_sums state;
    product_column column;
    column.value = NULL;
    state_read(state, column, walk.from ? walk.from + of_segment * size : NULL,
               walk.from_n && vector ? walk.from_n + of_segment * p.K : NULL, w, at, p);
    float total = skipped ? 0.0f : 1.0f, pass = walk.factors[p.place(w.row, chunk_of(0), w.head)].pass;
    float2 factor = token_factor<LEFT>(walk, p.place(w.row, chunk_of(0), w.head), p);
    for (int k = 0; k < count; k++) {
        int64_t place = p.place(w.row, chunk_of(k), w.head);
        if (walk.states)
            product_store(state, walk.states + place * p.size() + (int64_t)w.k0 * p.wide + w.v0, p.wide, p.K - w.k0,
                          p.wide - w.v0, true, at);
        if (walk.normals && vector) vector_write(walk.normals + place * p.K, column, w.k0, at, p.K);
        if (LEFT && dots) {
            float sum = vector && walk.met_n ? vector_dot(column, walk.met_n + place * p.K, w.k0, at, p.K) : 0.0f;
            for (int part = 0; part < shape::PARTS; part++) sum += through_part(state, ring.take(load), part, at);
            sum = warp_sum(sum);
            int parts = p.k_tiles * p.v_tiles * MLSTM_PARTS, own = w.tile * MLSTM_PARTS + (int)threadIdx.x / WARP;
            if (at.lane == 0) walk.through[place * parts + own] = sum;
        }
        if (k == count - 1 && !whole) break;
        room.factor[k % 2][threadIdx.x] = factor.x, room.value[k % 2][threadIdx.x] = factor.y;
        state.scale(pass);
#pragma unroll
        for (int i = 0; i < 4; i++) column.v[i][0] *= pass, column.v[i][2] *= pass;
        total *= pass;
        if (k + 1 < count) { /* on their way during the products */
            int64_t next = p.place(w.row, chunk_of(k + 1), w.head);
            factor = token_factor<LEFT>(walk, next, p), pass = walk.factors[next].pass;
        }
        for (int step = 0; step < shape::STEPS; step++) {
            product_stage<T> &stage = ring.take(load);
            column.value = vector ? room.value[k % 2] + step * shape::DEPTH : NULL;
            product_deep_deep(state, stage, at, room.factor[k % 2] + step * shape::DEPTH, column);
        }
    }
    if (walk.decays && w.tile == 0 && threadIdx.x == 0) walk.decays[of_segment] = total;
    float *to = walk.to ? walk.to + of_segment * size : at_end ? walk.end + (w.row * p.H + w.head) * size : NULL;
    float *to_n = walk.to_n ? walk.to_n + of_segment * p.K : NULL;
    if (at_end && walk.end_n) to_n = walk.end_n + (w.row * p.H + w.head) * p.K;
    if (to) product_store(state, to + (int64_t)w.k0 * p.V + w.v0, p.V, p.K - w.k0, p.V - w.v0, false, at);
    if (to_n && vector) vector_write(to_n, column, w.k0, at, p.K);
}

template <class T, bool LEFT>
static void launch_walk(struct device *dev, const mlstm_walk<T> &walk, const mlstm_problem &p) {
    auto kernel = mlstm_walk_kernel<T, LEFT>;
    size_t size = sizeof(walk_room<T>);
    allow_shared(dev, kernel, size, "mlstm");
    dim3 grid((unsigned)(p.H * p.k_tiles * p.v_tiles), (unsigned)p.segments, (unsigned)p.B);
    LAUNCH(dev, kernel, grid, PRODUCT_THREADS, size, walk, p);
}

/* In place of what segments add, the states with which they begin: `size` elements a head. */
static void carry(struct device *dev, float *adds, const float *decays, const float *edge, int64_t size,
                  const mlstm_problem &p, bool from_right) {
    ssd_problem problem = {};
    problem.B = p.B, problem.H = p.H, problem.P = size, problem.N = 1, problem.segments = p.segments;
    ssd_carry(dev, adds, decays, edge, problem, from_right);
}

template <class T>
void mlstm_walk_chunks(struct device *dev, mlstm_walk<T> walk, const float *edge, const float *edge_n,
                       const mlstm_carries &carries, const mlstm_problem &p, bool leftwards) {
    walk.from = edge, walk.from_n = edge_n;
    if (p.segments > 1) {
        mlstm_walk<T> adds = walk;
        adds.from = adds.from_n = NULL, adds.states = NULL, adds.normals = NULL, adds.through = NULL;
        adds.end = adds.end_n = NULL;
        adds.to = carries.states, adds.to_n = walk.vector ? carries.normals : NULL, adds.decays = carries.decays;
        if (leftwards) launch_walk<T, true>(dev, adds, p);
        else launch_walk<T, false>(dev, adds, p);
        carry(dev, carries.states, carries.decays, edge, (int64_t)p.K * p.V, p, leftwards);
        if (walk.vector) carry(dev, carries.normals, carries.decays, edge_n, p.K, p, leftwards);
        walk.from = carries.states, walk.from_n = walk.vector ? carries.normals : NULL;
    }
    if (leftwards) launch_walk<T, true>(dev, walk, p);
    else launch_walk<T, false>(dev, walk, p);
}

template void mlstm_walk_chunks(struct device *, mlstm_walk<float>, const float *, const float *, const mlstm_carries &,
                                const mlstm_problem &, bool);
template void mlstm_walk_chunks(struct device *, mlstm_walk<__nv_bfloat16>, const float *, const float *,
                                const mlstm_carries &, const mlstm_problem &, bool);
