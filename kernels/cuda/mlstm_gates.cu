/* mlstm_gates.cu: the gates of the mLSTM: the factors of chunks that follow from them before any product is made, and
 * their gradients, after all products.
 *
 * The stabiliser m[t] = max(lf + m[t-1], i[t]) is a chain of functions m -> max(g + m, a), which compose to functions
 * of the same kind: (g, a) then (g', a') is (g + g', max(a + g', a')). So m comes from a scan over the gates alone: a
 * warp has a chunk of one head, four tokens a lane, and finds what the chunk makes of m (summaries); then a warp for
 * each chunk again scans the summaries before it and writes its factors. A document's first token, where m, C and n are
 * 0, is the constant function max(lf, i): g = -inf. Sums of lf are made in double and kept in two floats: what counts
 * are their differences.
 *
 * Backward: with x_i, y_j what the states that enter and leave chunks have in q_i . dq_i and k_j . dk_j, and c_j the
 * rest of the latter, for a token t of a chunk
 *   dlf_t = pass <C, dC> + sum_{j < t} y_j + sum_{i >= t} (q_i . dq_i - c_i)     the last sum over the token's run
 * which needs no sum over more than a chunk (all that crosses t once; pairs behind t cancel to rounding in fp32), and
 *   df = sigma(-f) dlf, 0 where a run begins, also with nothing before it;   di = k . dk, times sigma(-i) with sigmoid
 * gates.
 *
 * Bytes: 8 a token and head in, 36 out; the factors of 65,536 tokens and heads are 2.4 MB. Expected: 3 us each.
 *
 * Reproducible: every sum has its order from the shape.
 */
#include "kernels/cuda/mlstm.cuh"

enum { HEADS = 4, LANE_TOKENS = MLSTM_CHUNK / WARP };

#define FORGOTTEN (-288.0f) /* a forget gate below this power of two lets nothing pass */

struct gate_views {
    mlstm_gates i, f;
    const int32_t *doc;
    const float *initial_m;
};

/* m -> max(g + m, a). */
struct top_chain {
    float g, a;
};

__device__ __forceinline__ top_chain then(top_chain first, top_chain second) {
    return {first.g + second.g, fmaxf(first.a + second.g, second.a)};
}

__device__ __forceinline__ top_chain chain_before(top_chain c, int lane) {
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        top_chain before = {__shfl_up_sync(FULL, c.g, offset), __shfl_up_sync(FULL, c.a, offset)};
        if (lane >= offset) c = then(before, c);
    }
    return c;
}

/* A lane's tokens, in logarithms of base 2. */
struct lane_gates {
    float forget[LANE_TOKENS], in[LANE_TOKENS];
    bool there[LANE_TOKENS], starts[LANE_TOKENS];
    top_chain chain[LANE_TOKENS]; /* from the lane's first token on */
};

__device__ __forceinline__ void gates_read(lane_gates &to, const gate_views &v, const mlstm_problem &p, int64_t row,
                                           int64_t chunk, int64_t head, int lane) {
    top_chain c = {0.0f, -INFINITY};
#pragma unroll
    for (int k = 0; k < LANE_TOKENS; k++) {
        int64_t t = chunk * MLSTM_CHUNK + LANE_TOKENS * lane + k;
        bool there = to.there[k] = t < p.T;
        float forget = 0, in = -INFINITY;
        if (there) {
            forget = -softplus_of(-v.f.at(row, t, head)) * LOG2E;
            in = v.i.at(row, t, head);
            in = (p.sigmoid ? -softplus_of(-in) : in) * LOG2E;
        }
        bool starts = there && v.doc && v.doc[row * p.T + t] != (t > 0 ? v.doc[row * p.T + t - 1] : 0);
        if (forget < FORGOTTEN) forget = FORGOTTEN, starts = true;
        to.forget[k] = forget, to.in[k] = in, to.starts[k] = starts;
        top_chain own = {forget, in};
        if (starts) own.g = -INFINITY, own.a = fmaxf(forget, in);
        to.chain[k] = c = then(c, own);
    }
}

/* Grid: (heads, chunks, batch rows), HEADS neighbouring heads a block. */
__global__ void __launch_bounds__(HEADS *WARP)
mlstm_summaries_kernel(float2 *summaries, gate_views v, mlstm_problem p) {
    int64_t head = (int64_t)blockIdx.x * HEADS + threadIdx.x / WARP, chunk = blockIdx.y, row = blockIdx.z;
    int lane = threadIdx.x % WARP;
    if (head >= p.H) return;
    lane_gates gates;
    gates_read(gates, v, p, row, chunk, head, lane);
    top_chain all = chain_before(gates.chain[LANE_TOKENS - 1], lane);
    if (lane == WARP - 1) summaries[p.place(row, chunk, head)] = make_float2(all.g, all.a);
}

/* The stabiliser that enters a chunk. Every warp scans the chunks before it in the same order, so that all agree. */
__device__ __forceinline__ float top_entering(const float2 *summaries, const gate_views &v, const mlstm_problem &p,
                                              int64_t row, int64_t chunk, int64_t head, int lane) {
    float m = v.initial_m ? v.initial_m[row * p.H + head] * LOG2E : 0.0f;
    if (p.sigmoid) return 0.0f;
    for (int64_t first = 0; first < chunk; first += WARP) {
        float2 c = first + lane < chunk ? summaries[p.place(row, first + lane, head)] : make_float2(0.0f, -INFINITY);
        top_chain all = chain_before({c.x, c.y}, lane);
        m = __shfl_sync(FULL, fmaxf(all.g + m, all.a), WARP - 1);
    }
    return m;
}

/* Sums of the forget gates since the chunk or the run began, and the number of the run. */
__device__ __forceinline__ void sums_find(double (&log)[LANE_TOKENS], float (&run)[LANE_TOKENS],
                                          const lane_gates &gates, int lane) {
    double sum = 0;
    float runs = 0;
#pragma unroll
    for (int k = 0; k < LANE_TOKENS; k++) {
        if (gates.starts[k]) sum = 0, runs++;
        else sum += gates.forget[k];
        log[k] = sum, run[k] = runs;
    }
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        double sum_before = __shfl_up_sync(FULL, sum, offset);
        float runs_before = __shfl_up_sync(FULL, runs, offset);
        if (lane >= offset && runs == 0) sum += sum_before;
        if (lane >= offset) runs += runs_before;
    }
    sum = __shfl_up_sync(FULL, sum, 1), runs = __shfl_up_sync(FULL, runs, 1);
#pragma unroll
    for (int k = 0; k < LANE_TOKENS; k++) {
        if (lane == 0) continue;
        if (run[k] == 0) log[k] += sum;
        run[k] += runs;
    }
}

__device__ __forceinline__ void four_store(float *to, const float (&v)[LANE_TOKENS], int lane) {
    *reinterpret_cast<float4 *>(to + LANE_TOKENS * lane) = make_float4(v[0], v[1], v[2], v[3]);
}

/* Grid as above. */
__global__ void __launch_bounds__(HEADS *WARP)
mlstm_factors_kernel(mlstm_factors *factors, float *m, const float2 *summaries, gate_views v, mlstm_problem p) {
    int64_t head = (int64_t)blockIdx.x * HEADS + threadIdx.x / WARP, chunk = blockIdx.y, row = blockIdx.z;
    int lane = threadIdx.x % WARP;
    if (head >= p.H) return;
    lane_gates gates;
    double log[LANE_TOKENS];
    float run[LANE_TOKENS], high[LANE_TOKENS], low[LANE_TOKENS];
    float top[LANE_TOKENS], enter[LANE_TOKENS], leave[LANE_TOKENS];
    gates_read(gates, v, p, row, chunk, head, lane);
    float entering = top_entering(summaries, v, p, row, chunk, head, lane);
    sums_find(log, run, gates, lane);
    top_chain before = chain_before(gates.chain[LANE_TOKENS - 1], lane);
    before.g = __shfl_up_sync(FULL, before.g, 1), before.a = __shfl_up_sync(FULL, before.a, 1);
#pragma unroll
    for (int k = 0; k < LANE_TOKENS; k++) {
        top_chain c = lane > 0 ? then(before, gates.chain[k]) : gates.chain[k];
        top[k] = p.sigmoid ? 0.0f : fmaxf(c.g + entering, c.a);
    }
    double last = __shfl_sync(FULL, log[LANE_TOKENS - 1], WARP - 1);
    float last_run = __shfl_sync(FULL, run[LANE_TOKENS - 1], WARP - 1);
    float leaving = __shfl_sync(FULL, top[LANE_TOKENS - 1], WARP - 1);
#pragma unroll
    for (int k = 0; k < LANE_TOKENS; k++) {
        high[k] = (float)log[k], low[k] = (float)(log[k] - (double)high[k]);
        bool enters = gates.there[k] && run[k] == 0, leaves = gates.there[k] && run[k] == last_run;
        enter[k] = enters ? power_of_two((float)(log[k] + (double)(entering - top[k]))) : 0.0f;
        leave[k] = leaves ? power_of_two((float)(last - log[k]) + (gates.in[k] - leaving)) : 0.0f;
    }
    mlstm_factors &to = factors[p.place(row, chunk, head)];
    four_store(to.log, high, lane);
    four_store(to.low, low, lane);
    four_store(to.run, run, lane);
    four_store(to.in, gates.in, lane);
    four_store(to.top, top, lane);
    four_store(to.enter, enter, lane);
    four_store(to.leave, leave, lane);
    if (lane != 0) return;
    to.pass = last_run == 0 ? power_of_two((float)(last + (double)(entering - leaving))) : 0.0f;
    if (m && chunk == p.chunks - 1) m[row * p.H + head] = leaving / LOG2E;
}

static dim3 gate_grid(const mlstm_problem &p) {
    return dim3((unsigned)ceil_div(p.H, HEADS), (unsigned)p.chunks, (unsigned)p.B);
}

void mlstm_find_factors(struct device *dev, mlstm_factors *factors, float2 *summaries, float *m, tensor i, tensor f,
                        const float *initial_m, tensor doc, const mlstm_problem &p) {
    gate_views v = {mlstm_gates_of(i), mlstm_gates_of(f), data_of<int32_t>(doc), initial_m};
    if (p.chunks > 1) LAUNCH(dev, mlstm_summaries_kernel, gate_grid(p), HEADS *WARP, 0, summaries, v, p);
    LAUNCH(dev, mlstm_factors_kernel, gate_grid(p), HEADS *WARP, 0, factors, m, summaries, v, p);
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void four_load(float (&v)[LANE_TOKENS], const float *from, int lane) {
    float4 four = *reinterpret_cast<const float4 *>(from + LANE_TOKENS * lane);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

struct slope_views {
    mlstm_gates di, df, i, f;
    const mlstm_factors *factors;
    const mlstm_slopes *slopes;
    const float *through;
    int parts;
    bool edge; /* there is a state before the first token */
};

/* Grid as above. */
__global__ void __launch_bounds__(HEADS *WARP) mlstm_gates_backward_kernel(slope_views v, mlstm_problem p) {
    int64_t head = (int64_t)blockIdx.x * HEADS + threadIdx.x / WARP, chunk = blockIdx.y, row = blockIdx.z;
    int lane = threadIdx.x % WARP;
    if (head >= p.H) return;
    int64_t place = p.place(row, chunk, head);
    const mlstm_slopes &slopes = v.slopes[place];
    float query[LANE_TOKENS], key[LANE_TOKENS], leave[LANE_TOKENS], run[LANE_TOKENS], behind[LANE_TOKENS];
    four_load(query, slopes.query, lane);
    four_load(key, slopes.key, lane);
    four_load(leave, slopes.leave, lane);
    four_load(run, v.factors[place].run, lane);
    float through = 0, sum = 0, first = 0, into = 0;
    for (int k = lane; k < v.parts; k += WARP) through += v.through[place * v.parts + k];
    through = warp_sum(through) * v.factors[place].pass;
    /* Within the lane, from each token on to the end of its run; first: over the lane's tokens of its first run. */
#pragma unroll
    for (int k = LANE_TOKENS - 1; k >= 0; k--) {
        if (k < LANE_TOKENS - 1 && run[k] != run[k + 1]) sum = 0;
        behind[k] = sum += query[k] - (key[k] - leave[k]);
        into += leave[k];
    }
    first = behind[0];
    float run_behind = __shfl_down_sync(FULL, run[0], 1), run_before = __shfl_up_sync(FULL, run[LANE_TOKENS - 1], 1);
    bool last_on = lane < WARP - 1 && run[LANE_TOKENS - 1] == run_behind;
    float after = __shfl_down_sync(FULL, sum_behind(first, last_on && run[0] == run[LANE_TOKENS - 1], lane), 1);
    float before = __shfl_up_sync(FULL, sum_before(into, lane), 1);
    if (lane == 0) before = 0, run_before = 0;
#pragma unroll
    for (int k = 0; k < LANE_TOKENS; k++) {
        int64_t t = chunk * MLSTM_CHUNK + LANE_TOKENS * lane + k;
        bool begins = run[k] != (k > 0 ? run[k > 0 ? k - 1 : 0] : run_before) || (t == 0 && !v.edge);
        float dlf = through + before + behind[k];
        if (last_on && run[k] == run[LANE_TOKENS - 1]) dlf += after;
        before += leave[k];
        if (t >= p.T) continue;
        v.df.at(row, t, head) = begins ? 0.0f : sigmoid_of(-v.f.at(row, t, head)) * dlf;
        v.di.at(row, t, head) = p.sigmoid ? key[k] * sigmoid_of(-v.i.at(row, t, head)) : key[k];
    }
}

void mlstm_gates_backward(struct device *dev, tensor di, tensor df, tensor i, tensor f, const mlstm_factors *factors,
                          const mlstm_slopes *slopes, const float *through, int parts, bool edge,
                          const mlstm_problem &p) {
    slope_views v = {mlstm_gates_of(di), mlstm_gates_of(df), mlstm_gates_of(i), mlstm_gates_of(f), factors, slopes,
                     through, parts, edge};
    LAUNCH(dev, mlstm_gates_backward_kernel, gate_grid(p), HEADS *WARP, 0, v, p);
}
