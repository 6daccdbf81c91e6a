/* cell.cu: nonlinear recurrences of single channels, s[t] = f(s[t-1], u[t] + bias; weight): how time is cut, what goes
 * from chunk to chunk, and which way is taken. The walks over tokens are each_cell_*.cu's, compiled for every cell.
 *
 * Sequential: one walk, a thread a channel: T steps one after the other, 137 ns each on an H100, and with less than
 * about 40,000 channels (N times the batch) the chip is not full. Shooting: the states S[j] before chunks of c tokens
 * are unknown, first guessed, then corrected by Newton's method (each_cell_forward.cu's sweep), and a last walk gives
 * the solution:
 *
 *   e[j] = where chunk j ends from S[j],  P[j] = de[j]/dS[j];   d[j+1] = (e[j] - S[j+1]) + P[j] d[j];   S += d
 *
 * What a correction leaves is of second order in what it found, and that has decayed over a chunk as the cell forgets.
 * A GRU with gates about 1/2 is exact after one correction with chunks of 64 tokens; one that forgets 1/50 a token is
 * off by 1e-2 then, 1e-5 after two corrections. So there are two, and chunks as long as will still fill the chip. A
 * chunk's first map (e, P) is made from the tokens next to its end alone where P is nothing by then, which the warp
 * finds out (tokens_of_map), and then its second is nothing: new cells take little more than one walk. Trained ones have
 * channels with a long memory in most warps, and with them every map takes its chunk, so that is three walks; which is
 * why one walk, that nothing needs to be reported of, is taken from FILL_WALK channels on, not from where it would be
 * faster with new cells.
 *
 * Backward is linear: one walk from right to left, or the chunks' maps, a scan, and a walk of all chunks at once.
 *
 * Bytes of the GRU in bf16 for each token and channel (DRAM; nothing stays in the second cache at these sizes), and
 * times in ms on an H100, where bytes pass at 3.0 TB/s; maps take 64 tokens of a chunk, or all if nothing is forgotten:
 *                                          B 8, T 2,048, N 2,048        B 1, T 65,536, N 2,048
 *                        bytes             floor    measured            floor    measured
 *   sequential           8                 0.09     0.28, its chain     0.36     8.7
 *   shooting             8 + 6 x 64/c      0.10     0.14                0.37     0.48
 *     nothing forgotten  20                0.23                         0.90
 *   backward, one walk   16                0.18     0.25
 *   backward in chunks   16 + 10 x 64/c    0.19     0.24                0.74     0.87
 *     nothing forgotten  26                                             1.16     1.6
 * The scan over chunks reads 12 bytes (GRU) or 32 (LSTM) a chunk and channel. Its chain is in chunks, so these are not
 * more than some square root of T.
 */
#include "kernels/cuda/cell.cuh"

#include <math.h>

enum {
    FILL = 132 * 20 * WARP,      /* threads that fill a large chip in forward: chunks are cut for that many */
    FILL_BACK = 132 * 16 * WARP, /* and in backward, which takes more registers */
    CHUNK_LEAST = 64,
    FILL_WALK = 12288,           /* channels from which one walk is faster than three of chunks */
    SCAN_THREADS = 64
};

/* The way that was fastest, by channels (N times the batch) and tokens: the first row that has no more of both. */
static const struct {
    int64_t channels, tokens;
    enum cell_method method;
} choices[] = {
    {FILL_WALK, 0, CELL_SEQUENTIAL},
    {0, 384, CELL_SHOOTING},
    {0, 0, CELL_SEQUENTIAL},
};

/* Backward walks in one piece from this many channels on. */
enum { CHANNELS_AT_ONCE = FILL_BACK / 2 + 1 };

#define KERNELS(name)                                                                                                  \
    {cell_run_##name,    cell_sweep_##name,  cell_step_##name,                                                         \
     cell_newton_##name, cell_totals_##name, cell_gradients_##name},
static const struct cell_kernels kernels[CELL_COUNT] = {CELLS(KERNELS)};

/* --- how time is cut ---------------------------------------------------------------------------------------------- */

/* Tokens of a chunk where the device chooses: a row's, in as many parts as leave no more than `fill` threads, but not
 * so few that the chain over the chunks gets longer than that within one. */
static int64_t chunk_of(struct cell_shape s, int64_t fill) {
    int64_t parts = at_least(fill / (s.B * s.N), 1), balanced = (int64_t)sqrt(0.6 * (double)s.T);
    return ceil_div(at_least(ceil_div(s.T, parts), at_least(balanced, CHUNK_LEAST)), 8) * 8;
}

/* Not less than B N times the chunks; never shrinks where B or T grow. */
static int64_t channels_of_chunks(struct cell_shape s, int64_t chunk, int64_t fill) {
    if (chunk > 0) return s.B * s.N * ceil_div(s.T, chunk);
    return at_most(s.B * s.N * ceil_div(s.T, CHUNK_LEAST), fill + s.B * s.N);
}

extern "C" struct cell_solver cuda_cell_choose(struct cell_shape s) {
    struct cell_solver solver = {};
    int i = 0;
    while (s.B * s.N < choices[i].channels || s.T < choices[i].tokens) i++;
    solver.method = choices[i].method;
    solver.bounded = s.cell->bound > 0;
    solver.chunk = solver.method == CELL_SHOOTING ? chunk_of(s, FILL) : 0;
    solver.iterations = 2;
    return solver;
}

/* --- from chunk to chunk ------------------------------------------------------------------------------------------ */

struct chain_problem {
    int64_t chunks, N;
    const float *outer; /* what enters the first, or from the right the last; (B, S, N), or NULL for zeros */
    float bound;        /* of corrected states; 0: unbounded */
};

/* d = rest + product d; no correction stays none, whatever it is multiplied with. */
template <int S>
__device__ __forceinline__ void apply(float (&d)[S], const float (&rest)[S], const float (&product)[S * S]) {
    float old[S];
#pragma unroll
    for (int i = 0; i < S; i++) old[i] = d[i];
#pragma unroll
    for (int i = 0; i < S; i++) {
        d[i] = rest[i];
#pragma unroll
        for (int k = 0; k < S; k++) d[i] += old[k] == 0 ? 0 : product[i * S + k] * old[k];
    }
}

/* A thread a channel. Forward, to the right: d[j+1] from chunk j's map, and where `before` is given, the states before
 * chunk j + 1 corrected by it. BACK: d[j-1] from chunk j's. */
template <int S, bool BACK>
__global__ void __launch_bounds__(SCAN_THREADS) cell_scan_kernel(cell_chunks c, chain_problem p) {
    constexpr int EACH = S == 1 ? 8 : S == 2 ? 4 : 2; /* chunks on their way at once */
    int64_t n = (int64_t)blockIdx.x * SCAN_THREADS + threadIdx.x, b = blockIdx.y;
    if (n >= p.N) return;
    auto place = [&](int64_t k, int count) { /* of the k-th chunk in this direction */
        return (b * p.chunks + (BACK ? p.chunks - 1 - k : k)) * count * p.N + n;
    };
    float d[S];
#pragma unroll
    for (int i = 0; i < S; i++) d[i] = p.outer ? p.outer[(b * S + i) * p.N + n] : 0;
    if (BACK)
        for (int i = 0; i < S; i++) c.d[place(0, S) + i * p.N] = d[i];
    for (int64_t first = 0; first < p.chunks - 1; first += EACH) {
        float rest[EACH][S], product[EACH][S * S], before[EACH][S];
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            bool there = first + k < p.chunks - 1;
#pragma unroll
            for (int i = 0; i < S * S; i++)
                product[k][i] = there ? c.product[place(first + k, S * S) + i * p.N] : 0;
#pragma unroll
            for (int i = 0; i < S; i++) {
                rest[k][i] = there ? c.rest[place(first + k, S) + i * p.N] : 0;
                before[k][i] = there && !BACK ? c.before[place(first + k + 1, S) + i * p.N] : 0;
            }
        }
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            if (first + k >= p.chunks - 1) break;
            apply(d, rest[k], product[k]);
#pragma unroll
            for (int i = 0; i < S; i++) {
                int64_t to = place(first + k + 1, S) + i * p.N;
                float v = before[k][i] + d[i];
                if (c.d) c.d[to] = d[i];
                if (p.bound > 0) v = v > p.bound ? p.bound : v < -p.bound ? -p.bound : v; /* not a number stays so */
                if (!BACK) c.corrected[to] = v;
            }
        }
    }
}

template <bool BACK>
static void scan(struct device *dev, const cell_problem &p, int states, cell_chunks c, chain_problem scan) {
    dim3 grid((unsigned)ceil_div(p.N, SCAN_THREADS), (unsigned)p.B);
    if (p.chunks == 1 && !BACK) return;
    switch (states) {
    case 1: LAUNCH(dev, (cell_scan_kernel<1, BACK>), grid, SCAN_THREADS, 0, c, scan); break;
    case 2: LAUNCH(dev, (cell_scan_kernel<2, BACK>), grid, SCAN_THREADS, 0, c, scan); break;
    case 3: LAUNCH(dev, (cell_scan_kernel<3, BACK>), grid, SCAN_THREADS, 0, c, scan); break;
    default: LAUNCH(dev, (cell_scan_kernel<4, BACK>), grid, SCAN_THREADS, 0, c, scan); break;
    }
}

/* --- the problem -------------------------------------------------------------------------------------------------- */

static cell_problem problem_of(tensor u, tensor bias, tensor weight, tensor initial, tensor doc,
                               const struct cell *cell) {
    cell_problem p = {};
    bool step = u.ndim == 4; /* (B,H,U,N/H) */
    int at = step ? 1 : 2;
    ASSERT(u.ndim == at + 3 && u.dim[at + 1] == cell->inputs && cell->states <= CELL_STATES_MAX);
    p.B = u.dim[0], p.T = step ? 1 : u.dim[1], p.width = u.dim[at + 2], p.N = u.dim[at] * p.width;
    ASSERT(p.N <= INT32_MAX && u.stride[at + 1] == p.width && u.stride[at] == cell->inputs * p.width);
    p.chunk = p.T, p.chunks = 1;
    p.u = u.data, p.u_row = u.stride[0], p.u_step = step ? 0 : u.stride[1];
    p.bias = data_of<float>(bias), p.weight = data_of<float>(weight), p.initial = data_of<float>(initial);
    p.doc = data_of<int32_t>(doc);
    p.act = u.dtype;
    p.wide = vectors_fit(u, 16 / (int)dtype_size(u.dtype));
    ASSERT(tensor_is(weight, 2, (int64_t)cell->weights, p.N) && weight.dtype == DTYPE_F32);
    ASSERT(!p.bias || (tensor_is(bias, 2, (int64_t)cell->inputs, p.N) && bias.dtype == DTYPE_F32));
    ASSERT(!p.initial || tensor_is(initial, 3, p.B, (int64_t)cell->states, p.N));
    ASSERT(!p.doc || (tensor_is(doc, 2, p.B, p.T) && tensor_contiguous(doc)));
    return p;
}

static void cut(cell_problem &p, int64_t chunk) {
    p.chunk = at_most(chunk, p.T);
    p.chunks = ceil_div(p.T, p.chunk);
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

extern "C" size_t cuda_cell_forward_scratch(struct cell_shape s, struct cell_solver solver) {
    int64_t S = s.cell->states;
    bool newton = solver.method == CELL_NEWTON;
    /* The sequential walk takes none; but a smaller shape may be solved otherwise, or in other chunks, and must not
     * take more. */
    int64_t asked = solver.method == CELL_SHOOTING ? solver.chunk : 0;
    int64_t chunks = at_least(channels_of_chunks(s, asked, FILL), channels_of_chunks(s, 0, FILL));
    int64_t each = 2 * S + S * S + (newton ? 2 * S : 0), states = newton ? s.B * s.T * s.N * S : 0;
    return (size_t)(chunks * each + states) * sizeof(float);
}

static void shoot(struct device *dev, const cell_problem &p, const cell_kernels &of, int S, int iterations,
                  cell_outputs out, float *scratch) {
    int64_t channels = p.B * p.chunks * p.N;
    cell_chunks c = {};
    c.before = c.corrected = scratch, c.rest = c.before + channels * S, c.product = c.rest + channels * S;
    for (int i = 0; i < iterations && p.chunks > 1; i++) {
        of.sweep(dev, p, c, i);
        scan<false>(dev, p, S, c, {p.chunks, p.N, NULL, p.bound});
    }
    of.run(dev, p, out, c.before);
}

static void newton(struct device *dev, const cell_problem &p, const cell_kernels &of, int S, int iterations,
                   cell_outputs out, float *scratch) {
    int64_t channels = p.B * p.chunks * p.N;
    cell_chunks c = {};
    c.before = scratch, c.corrected = c.before + channels * S, c.d = c.corrected + channels * S;
    c.rest = c.d + channels * S, c.product = c.rest + channels * S;
    cell_newton n = {};
    n.states = c.product + channels * S * S;
    for (int i = 0; i <= iterations; i++) {
        n.guess = i <= 1, n.correct = i > 0, n.assemble = i < iterations, n.report = i >= iterations - 1;
        of.newton(dev, p, out, c, n);
        if (i > 0) { /* what was corrected is what the next correction starts from */
            float *old = c.before;
            c.before = c.corrected, c.corrected = old;
        }
        if (n.assemble) scan<false>(dev, p, S, c, {p.chunks, p.N, NULL, p.bound});
    }
}

extern "C" void cuda_cell_forward(struct device *dev, tensor y, tensor others, tensor final, struct cell_report *report,
                                  tensor u, tensor bias, tensor weight, tensor initial, tensor doc,
                                  const struct cell *cell, struct cell_solver solver, void *scratch) {
    cell_problem p = problem_of(u, bias, weight, initial, doc, cell);
    int S = cell->states, iterations = cell->linear ? 1 : solver.iterations;
    ASSERT(tensor_is(y, 3, p.B, p.T, p.N) && tensor_contiguous(y) && y.dtype == p.act);
    ASSERT(!tensor_given(others) || (tensor_is(others, 4, p.B, p.T, (int64_t)S - 1, p.N) && others.dtype == p.act));
    ASSERT(!tensor_given(final) || tensor_is(final, 3, p.B, (int64_t)S, p.N));
    if (p.B == 0 || p.T == 0 || p.N == 0) return;
    cell_outputs out = {y.data, others.data, data_of<float>(final), report ? (unsigned *)&report->residual : NULL};
    p.bound = solver.bounded ? (float)cell->bound : 0;
    if (solver.method == CELL_SEQUENTIAL) {
        kernels[cell->id].run(dev, p, out, NULL);
        return;
    }
    ASSERT(iterations >= 1);
    bool shooting = solver.method == CELL_SHOOTING;
    cut(p, shooting && solver.chunk > 0 ? solver.chunk : chunk_of({p.B, p.T, p.N, cell}, FILL));
    (shooting ? shoot : newton)(dev, p, kernels[cell->id], S, iterations, out, (float *)scratch);
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

extern "C" size_t cuda_cell_backward_scratch(struct cell_shape s) {
    int64_t S = s.cell->states, each = 2 * S + S * S + s.cell->inputs + s.cell->weights;
    return (size_t)(channels_of_chunks(s, 0, FILL_BACK) * each) * sizeof(float);
}

/* The chunks' sums into dbias and dweight, in one launch. */
static void add_sums(struct device *dev, const cell_problem &p, tensor dbias, tensor dweight, const float *sums,
                     const struct cell *cell) {
    static_assert(CELL_INPUTS_MAX + CELL_WEIGHTS_MAX <= SUM_PARTS, "the parts of one launch");
    struct sum_parts parts = {};
    for (int i = 0; i < cell->inputs + cell->weights; i++)
        parts.part[parts.count++] = i >= cell->inputs
                                        ? sum_part{data_of<float>(dweight) + (i - cell->inputs) * p.N, 1}
                                        : sum_part{tensor_given(dbias) ? data_of<float>(dbias) + i * p.N : NULL, 1};
    cuda_add_partial_parts(dev, parts, sums, p.B * p.chunks, p.N);
}

extern "C" void cuda_cell_backward(struct device *dev, tensor du, tensor dbias, tensor dweight, tensor dinitial,
                                   tensor dy, tensor dfinal, tensor y, tensor others, tensor u, tensor bias,
                                   tensor weight, tensor initial, tensor doc, const struct cell *cell, void *scratch) {
    cell_problem p = problem_of(u, bias, weight, initial, doc, cell);
    const cell_kernels &of = kernels[cell->id];
    int S = cell->states, V = 16 / (int)dtype_size(u.dtype);
    ASSERT(du.ndim == 5 && du.dtype == p.act && dy.dtype == p.act && y.dtype == p.act && tensor_contiguous(dy));
    ASSERT(tensor_contiguous(y) && (S == 1 || tensor_is(others, 4, p.B, p.T, (int64_t)S - 1, p.N)));
    if (p.N == 0) return;
    p.wide = p.wide && vectors_fit(dy, V) && vectors_fit(y, V) && vectors_fit(others, V);
    if (p.B * p.N < CHANNELS_AT_ONCE) cut(p, chunk_of({p.B, p.T, p.N, cell}, FILL_BACK));
    int64_t channels = p.B * p.chunks * p.N;
    cell_chunks c = {};
    c.rest = (float *)scratch, c.d = c.rest + channels * S, c.product = c.d + channels * S;
    cell_gradients g = {du.data, du.stride[0], du.stride[1], dy.data, y.data, others.data, data_of<float>(dinitial),
                        c.product + channels * S * S};
    if (p.chunks > 1) {
        of.totals(dev, p, g, c);
        scan<true>(dev, p, S, c, {p.chunks, p.N, data_of<float>(dfinal), 0});
    }
    of.gradients(dev, p, g, p.chunks > 1 ? c.d : data_of<float>(dfinal));
    add_sums(dev, p, dbias, dweight, g.sums, cell);
}

/* --- one token ---------------------------------------------------------------------------------------------------- */

extern "C" void cuda_cell_step(struct device *dev, tensor y, tensor state, tensor u, tensor bias, tensor weight,
                               const struct cell *cell) {
    cell_problem p = problem_of(u, bias, weight, tensor_none(), tensor_none(), cell);
    ASSERT(tensor_is(y, 2, p.B, p.N) && tensor_contiguous(y) && y.dtype == p.act);
    ASSERT(tensor_is(state, 3, p.B, (int64_t)cell->states, p.N) && state.dtype == DTYPE_F32);
    kernels[cell->id].step(dev, p, y.data, data_of<float>(state));
}
