/* ssd_chunk.cu: SSD in chunks of Q = 64 tokens on tensor cores (arXiv 2405.21060, section 6), for bf16 activations: its
 * mathematics, the decays, and the walk over chunks that both passes use. docs/mamba2.md derives it.
 *
 * Per head, with s_i = a_1 + .. + a_i inside a chunk, L_ij = exp(s_i - s_j) for j <= i, enter_i = exp(s_i),
 * leave_j = exp(s_Q - s_j):
 *
 *   forward    y_i = sum_j (c_i . b_j) L_ij dt_j x_j + enter_i S c_i + d x_i
 *              S <- enter_Q S + sum_j leave_j dt_j x_j b_j^T
 *   backward   G <- enter_Q G + sum_i enter_i dy_i c_i^T, from the last chunk to the first: the gradient of the state
 *              that leaves a chunk; then every chunk by itself (ssd_chunk_backward.cu)
 *
 * A token that the state does not pass (a document's first; or exp(a) is nothing) begins a new run: L_ij, enter and
 * leave are 0 across runs, and s is counted from the run's beginning, so that nothing large cancels in s_i - s_j.
 * Exponentials are of differences only, never of s and -s apart.
 *
 * Walk: a block has one head of one batch row and one segment of time; its four warps have 16 rows of the state each,
 * 64 fp32 accumulators a lane. Chunks come into shared memory by copies that don't wait, one ahead. Products:
 * (factor x)^T b, m = rows of the head, n = states, k = tokens. The states that chunks meet are written as bf16, which
 * is what every product takes them as.
 *
 * Where heads and batch rows don't fill the chip, time is cut into segments: each is walked from zero for what it adds,
 * beginning behind the chunks of which nothing is left at its end; the states are carried over segments, and then all
 * go at once.
 *
 * Account of a walk that writes states, B 8, T 2048, H 64, P 64, N 128: bytes 134 MB of x or dy, 268 MB of states:
 * 0.1 ms at 4.2 TB/s; 256 products m16n8k16 and 110 KB of shared memory read for a head's chunk, of which a
 * multiprocessor has 124: 0.06 ms. Expected: 0.12 ms.
 *
 * Reproducible: every sum has its order from the shape, and from where decays leave nothing.
 */
#include "kernels/cuda/ssd_chunk.cuh"

enum { THREADS = SSD_WALKERS * WARP, FACTOR_HEADS = 8 };

#define LOG2_E 1.44269504f
#define LOG2_NOTHING (-100.0f) /* decays beyond this power of two let nothing pass */

ssd_rows ssd_rows_of(tensor t) {
    ssd_rows r = {data_of<__nv_bfloat16>(t), t.stride[0], t.stride[1], (int)t.dim[3], false};
    r.aligned = (uintptr_t)t.data % 16 == 0 && r.row % 8 == 0 && r.step % 8 == 0 && r.width % 8 == 0;
    return r;
}

ssd_chunked ssd_chunked_of(struct ssd_shape s) {
    return {s.B, s.T, s.H, s.P, s.G, s.N, ssd_chunks(s), ssd_chunks_per_segment(s), ssd_chunk_segments(s)};
}

/* --- factors ------------------------------------------------------------------------------------------------------ */

/* A warp a chunk of one head, two tokens a lane; a block has neighbouring heads, which lie next to each other in dt. */
__global__ void __launch_bounds__(FACTOR_HEADS *WARP)
ssd_factors_kernel(ssd_factors *factors, const float *dt, const float *a, const int32_t *doc, ssd_chunked p) {
    int64_t head = (int64_t)blockIdx.x * FACTOR_HEADS + threadIdx.x / WARP, chunk = blockIdx.y, row = blockIdx.z;
    int lane = threadIdx.x % WARP;
    if (head >= p.H) return;
    float log[2], step[2], run[2], sum, runs;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t t = chunk * SSD_CHUNK + 2 * lane + k, of_row = row * p.T;
        bool there = t < p.T;
        log[k] = there ? fminf(a[(of_row + t) * p.H + head], 0.0f) * LOG2_E : 0.0f;
        step[k] = there ? dt[(of_row + t) * p.H + head] : 0.0f;
        bool starts = there && doc && doc[of_row + t] != (t > 0 ? doc[of_row + t - 1] : 0);
        run[k] = there && (starts || log[k] < LOG2_NOTHING) ? 1.0f : 0.0f;
        if (run[k] != 0) log[k] = 0;
    }
    if (run[1] == 0) log[1] += log[0];
    run[1] += run[0];
    sum = log[1], runs = run[1]; /* since the last run began, and how many did, over more and more lanes */
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        float sum_before = __shfl_up_sync(FULL, sum, offset), runs_before = __shfl_up_sync(FULL, runs, offset);
        if (lane >= offset && runs == 0) sum += sum_before;
        if (lane >= offset) runs += runs_before;
    }
    float last = __shfl_sync(FULL, sum, WARP - 1), last_run = __shfl_sync(FULL, runs, WARP - 1);
    sum = __shfl_up_sync(FULL, sum, 1), runs = __shfl_up_sync(FULL, runs, 1);
    float2 enter, leave;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (lane > 0 && run[k] == 0) log[k] += sum;
        if (lane > 0) run[k] += runs;
        (k ? enter.y : enter.x) = run[k] == 0 ? power_of_two(log[k]) : 0.0f;
        (k ? leave.y : leave.x) = run[k] == last_run ? power_of_two(fminf(last - log[k], 0.0f)) : 0.0f;
    }
    ssd_factors &to = factors[(row * p.chunks + chunk) * p.H + head];
    *reinterpret_cast<float2 *>(to.log + 2 * lane) = make_float2(log[0], log[1]);
    *reinterpret_cast<float2 *>(to.run + 2 * lane) = make_float2(run[0], run[1]);
    *reinterpret_cast<float2 *>(to.dt + 2 * lane) = make_float2(step[0], step[1]);
    *reinterpret_cast<float2 *>(to.enter + 2 * lane) = enter;
    *reinterpret_cast<float2 *>(to.leave + 2 * lane) = leave;
}

void ssd_find_factors(struct device *dev, ssd_factors *factors, tensor dt, tensor a, tensor doc, const ssd_chunked &p) {
    dim3 grid((unsigned)ceil_div(p.H, FACTOR_HEADS), (unsigned)p.chunks, (unsigned)p.B);
    LAUNCH(dev, ssd_factors_kernel, grid, FACTOR_HEADS *WARP, 0, factors, data_of<float>(dt), data_of<float>(a),
           data_of<int32_t>(doc), p);
}

/* --- the walk ----------------------------------------------------------------------------------------------------- */

struct walk_stage {
    shared_tile<SSD_P> rows;
    shared_tile<SSD_N> columns;
    ssd_factors factors;
};

template <bool ALIGNED>
__device__ __forceinline__ void walk_load(walk_stage &stage, const ssd_walk &walk, const ssd_chunked &p, int64_t chunk,
                                          int64_t head, int64_t row) {
    tile_load<THREADS, ALIGNED>(stage.rows, walk.rows, row, head, chunk * SSD_CHUNK, p.T);
    tile_load<THREADS, ALIGNED>(stage.columns, walk.columns, row, head / (p.H / p.G), chunk * SSD_CHUNK, p.T);
    factors_load<THREADS>(stage.factors, walk.factors + (row * p.chunks + chunk) * p.H + head);
}

/* A warp's rows of the state into a chunk's place. */
__device__ __forceinline__ void state_write(const ssd_state &state, __nv_bfloat16 *to) {
    int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 4;
    to += row * SSD_N + row_of_16_column(lane);
#pragma unroll
    for (int k = 0; k < SSD_TILES; k += 2)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float *left = state.tile(k) + 2 * h, *right = state.tile(k + 1) + 2 * h;
            uint2 four = row_of_16(pack_bf16(left[0], left[1]), pack_bf16(right[0], right[1]), lane);
            *reinterpret_cast<uint2 *>(to + 8 * h * SSD_N + 8 * k) = four;
        }
}

/* Grid: (heads, segments, batch rows). */
template <bool LEFTWARDS, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, 4) ssd_walk_kernel(ssd_walk walk, ssd_chunked p) {
    DYNAMIC_SHARED(char, memory);
    walk_stage *stages = reinterpret_cast<walk_stage *>(memory);
    int64_t head = blockIdx.x, segment = blockIdx.y, row = blockIdx.z, size = p.P * p.N;
    int64_t first = segment * p.per_segment, end = at_most(first + p.per_segment, p.chunks);
    int64_t of_segment = (row * p.segments + segment) * p.H + head;
    int count = (int)(end - first), skipped = 0;
    ssd_state state;
    state.load(p, walk.from ? walk.from + of_segment * size : NULL);
    if (walk.decays)
        skipped = chunks_without_trace(count, threadIdx.x % WARP, [&](int k) {
            int64_t chunk = LEFTWARDS ? end - 1 - k : first + k;
            return walk.factors[(row * p.chunks + chunk) * p.H + head].enter[SSD_CHUNK - 1];
        });
    float total = skipped ? 0.0f : 1.0f;
    walk_load<ALIGNED>(stages[skipped % 2], walk, p, LEFTWARDS ? end - 1 - skipped : first + skipped, head, row);
    cp_async_commit();
    for (int k = skipped; k < count; k++) {
        int64_t chunk = LEFTWARDS ? end - 1 - k : first + k;
        int64_t next = LEFTWARDS ? chunk - 1 : chunk + 1;
        if (k + 1 < count) walk_load<ALIGNED>(stages[(k + 1) % 2], walk, p, next, head, row);
        cp_async_commit();
        if (walk.states)
            state_write(state, walk.states + ((row * p.chunks + chunk) * p.H + head) * (SSD_P * SSD_N));
        cp_async_wait<1>();
        __syncthreads();
        walk_stage &stage = stages[k % 2];
        float pass = stage.factors.enter[SSD_CHUNK - 1];
        total *= pass;
        state.update<!LEFTWARDS>(stage.rows, stage.columns, pass,
                                 LEFTWARDS ? stage.factors.enter : stage.factors.leave, stage.factors.dt);
        __syncthreads();
    }
    if (walk.to) state.store(p, walk.to + of_segment * size);
    if (walk.decays && threadIdx.x == 0) walk.decays[of_segment] = total;
    if (walk.end && (LEFTWARDS ? segment == 0 : segment == p.segments - 1))
        state.store(p, walk.end + (row * p.H + head) * size);
}

template <bool LEFTWARDS, bool ALIGNED>
static void launch_walk(struct device *dev, const ssd_walk &walk, const ssd_chunked &p) {
    int size = 2 * (int)sizeof(walk_stage);
    auto kernel = ssd_walk_kernel<LEFTWARDS, ALIGNED>;
    cuda_expect(dev, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size), "ssd");
    LAUNCH(dev, kernel, dim3((unsigned)p.H, (unsigned)p.segments, (unsigned)p.B), THREADS, size, walk, p);
}

void ssd_walk_chunks(struct device *dev, const ssd_walk &walk, const ssd_chunked &p, bool leftwards) {
    bool aligned = walk.rows.aligned && walk.columns.aligned;
    if (leftwards && aligned) launch_walk<true, true>(dev, walk, p);
    else if (leftwards) launch_walk<true, false>(dev, walk, p);
    else if (aligned) launch_walk<false, true>(dev, walk, p);
    else launch_walk<false, false>(dev, walk, p);
}

void ssd_carry_segments(struct device *dev, float *carries, float *decays, ssd_walk walk, const float *edge,
                        const ssd_chunked &p, bool leftwards) {
    walk.from = NULL, walk.states = NULL, walk.end = NULL;
    walk.to = carries, walk.decays = decays;
    ssd_walk_chunks(dev, walk, p, leftwards);
    ssd_problem problem = {};
    problem.B = p.B, problem.H = p.H, problem.P = p.P, problem.N = p.N, problem.segments = p.segments;
    ssd_carry(dev, carries, decays, edge, problem, leftwards);
}
