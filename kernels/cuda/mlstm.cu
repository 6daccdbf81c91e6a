/* mlstm.cu: the mLSTM on the GPU (arXiv 2405.04517; in chunks: arXiv 2503.13427, 2503.14376): its mathematics and plan,
 * forward, and one step.
 *
 * Per head, with chunks of L = 128 tokens, b_i = lf_1 + .. + lf_i inside a chunk, m the stabiliser, which follows from
 * the gates alone, and m_in, m_out its values at a chunk's ends:
 *
 *   D_ij = exp(b_i - b_j + i_j - m_i) for j <= i;     enter_i = exp(b_i + m_in - m_i);   leave_j = exp(b_L - b_j + i_j
 * - m_out)
 *   pass = exp(b_L + m_in - m_out);                   S_ij = s q_i . k_j,  s = K^-1/2
 *   C <- pass C + sum_j leave_j k_j v_j^T;            n <- pass n + sum_j leave_j k_j
 *   num_i = enter_i C^T s q_i + sum_j S_ij D_ij v_j;  den_i = enter_i n . s q_i + sum_j S_ij D_ij
 *   h_i = num_i / (max(|den_i|, exp(-m_i)) + eps)
 *
 * With sigmoid gates i is log sigmoid(i) and m = 0; without a normaliser h = num. Nothing passes between runs: D, enter
 * and leave are 0 across the first token of a document, b is counted from there.
 *
 *   mlstm_gates.cu     factors: b, m, enter, leave, pass for every chunk, from the gates; and the gates' gradients
 *   mlstm_walk.cu      C and n that enter each chunk, in order of time; dC and dn that leave it, backwards
 *   mlstm_output.cu    h of each chunk by itself; dv likewise
 *   mlstm_backward.cu  dq, dk of each chunk by itself
 *
 * Forward is factors, walk, outputs. Backward walks again (states are not saved: they would be 8 times the inputs'
 * bytes), walks backwards, then makes dv, and dq, dk. All of it is written once for both types of activations: in bf16
 * products run on tensor cores and stored states are bf16, in fp32 all is fp32 (tile_product.cuh). Sums, gates, m, den,
 * n and the running states are fp32. Any K and V: tiles of 128 are filled with zeros.
 *
 * Why L = 128: states cost 2 x 2 K V / L bytes a token and head to write and read, 4 KB for 256 x 512, products inside
 * the chunk 2 L (K + V) FLOP, half of it beyond the diagonal; q, k, v, h are 3 KB and 0.5 MFLOP. 64 would add 4 KB, 256
 * 0.1 MFLOP in steps that a block of 128 rows could not hold.
 *
 * saved: the factors, 37 bytes a token and head.
 *
 * Account, B 8, T 2048, H 4, K 256, V 512, bf16, H100 (3.0 TB/s):
 *   forward   factors 0.01 + walk 0.10 + outputs 0.15 = 0.26 ms expected; measured 0.31
 *   backward  delta 0.05 + walk 0.10 + walk 0.14 + dv 0.15 + dq, dk 0.30 + gates 0.01 = 0.75 ms expected; measured 0.92
 * Their bytes, as the kernels one by one must move them, are 0.57 GB forward and 1.6 GB backward, of them 0.27 and 0.8
 * the states: 0.19 and 0.54 ms; their products, 40 and 105 GFLOP. What stands above the bytes' time are products that
 * don't overlap with them, and the L2 cache, which hands every operand to several blocks. States in registers from
 * chunk to chunk, as ssd_chunk_forward.cu has them, would save forward 0.1 ms where K is 256 or less.
 * B 1, T 65536: 4 times that, and each walk is cut into segments and goes twice, the first time only over the chunks of
 * which something is left: measured 1.30 and 4.26 ms; 1.53 and 4.70 when it went over all. To ask for the states of
 * later steps ahead, into the L2 cache, was slower: 1.37 and 4.58 ms, and 0.98 instead of 0.92 backward above.
 *
 * One step is a pass over C: every thread has four columns of V for some rows k, the block's warps share the rows; n
 * and m, which all blocks of a head read, are renewed by a second kernel. 2 x 4 K V bytes a head: 4 MB for one row of
 * B, 4 heads of 256 x 512: 2 us at 3 TB/s, and two launches. Measured with B = 16: 0.032 ms, 2.1 TB/s.
 *
 * Reproducible: every sum has its order from the shape.
 */
#include "kernels/cuda/mlstm.cuh"

mlstm_problem mlstm_problem_of(struct mlstm_shape s, struct mlstm_rule rule, size_t element) {
    mlstm_problem p = {};
    ASSERT(rule.normalise || rule.sigmoid_input);
    p.B = s.B, p.T = s.T, p.H = s.H, p.K = (int)s.K, p.V = (int)s.V, p.wide = (int)mlstm_wide(s, element);
    p.k_tiles = (int)ceil_div(s.K, PRODUCT), p.v_tiles = (int)ceil_div(s.V, PRODUCT);
    p.chunks = mlstm_chunks(s);
    int64_t wanted = MLSTM_WALKS / (s.B * mlstm_walks(s));
    p.per_segment = at_least(ceil_div(p.chunks, wanted < MLSTM_CUT ? 1 : wanted), MLSTM_SEGMENT);
    p.segments = ceil_div(p.chunks, p.per_segment);
    p.sigmoid = rule.sigmoid_input, p.normalise = rule.normalise;
    p.scale = (float)(1 / sqrt((double)s.K)), p.eps = (float)rule.eps;
    return p;
}

/* A problem of B rows is cut into at most MLSTM_WALKS / walks segments in all. */
int64_t mlstm_segments_most(struct mlstm_shape s) {
    int64_t most = MLSTM_WALKS / mlstm_walks(s), segments = ceil_div(mlstm_chunks(s), MLSTM_SEGMENT);
    return most >= MLSTM_CUT && segments > 1 ? at_most(most, s.B * segments) : 0;
}

/* --- sizes -------------------------------------------------------------------------------------------------------- */

extern "C" size_t cuda_mlstm_saved(struct mlstm_shape s) {
    return (size_t)(s.B * mlstm_chunks(s) * s.H) * sizeof(mlstm_factors);
}

struct forward_memory {
    mlstm_factors *factors;
    float2 *summaries;
    void *states;
    float *normals;
    mlstm_carries carries;
};

/* Carves the scratch, or, from NULL, measures it. */
static size_t forward_carve(forward_memory *m, struct mlstm_shape s, size_t element, char *scratch) {
    mlstm_carver room = {scratch, 0};
    int64_t places = s.B * mlstm_chunks(s) * s.H;
    m->factors = (mlstm_factors *)room.take(places, sizeof(mlstm_factors)); /* for a forward that saves nothing */
    m->summaries = (float2 *)room.take(places, sizeof(float2));
    m->states = room.take(places * s.K * mlstm_wide(s, element), element);
    m->normals = (float *)room.take(places * s.K, sizeof(float));
    m->carries = mlstm_carve_carries(room, s);
    return room.used;
}

static size_t forward_scratch(struct mlstm_shape s, size_t element) {
    forward_memory m;
    return forward_carve(&m, s, element, NULL);
}

extern "C" size_t cuda_mlstm_forward_scratch_f32(struct mlstm_shape s) {
    return forward_scratch(s, sizeof(float));
}

extern "C" size_t cuda_mlstm_forward_scratch_bf16(struct mlstm_shape s) {
    return forward_scratch(s, sizeof(__nv_bfloat16));
}

extern "C" size_t cuda_mlstm_backward_scratch_f32(struct mlstm_shape s) {
    return mlstm_backward_scratch(s, sizeof(float));
}

extern "C" size_t cuda_mlstm_backward_scratch_bf16(struct mlstm_shape s) {
    return mlstm_backward_scratch(s, sizeof(__nv_bfloat16));
}

/* --- both passes -------------------------------------------------------------------------------------------------- */

static void check_operands(tensor q, tensor k, tensor v, tensor i, tensor f, tensor doc) {
    int64_t B = q.dim[0], T = q.dim[1], H = q.dim[2];
    ASSERT(tensor_is(k, 4, B, T, H, q.dim[3]) && tensor_is(v, 4, B, T, H, v.dim[3]));
    ASSERT(tensor_is(i, 3, B, T, H) && tensor_is(f, 3, B, T, H));
    ASSERT(q.dtype == k.dtype && q.dtype == v.dtype && (!tensor_given(doc) || tensor_is(doc, 2, B, T)));
}

template <class T>
static void forward_pass(struct device *dev, tensor h, struct mlstm_state final, void *saved, tensor q, tensor k,
                         tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc, struct mlstm_rule rule,
                         void *scratch) {
    struct mlstm_shape shape = {q.dim[0], q.dim[1], q.dim[2], q.dim[3], v.dim[3], 0};
    mlstm_problem p = mlstm_problem_of(shape, rule, sizeof(T));
    forward_memory m;
    forward_carve(&m, shape, sizeof(T), (char *)scratch);
    if (saved) m.factors = (mlstm_factors *)saved;
    mlstm_find_factors(dev, m.factors, m.summaries, data_of<float>(final.m), i, f, data_of<float>(initial.m), doc, p);
    mlstm_walk<T> walk = {};
    walk.rows = mlstm_rows_of<T>(k), walk.columns = mlstm_rows_of<T>(v), walk.factors = m.factors;
    walk.vector = rule.normalise, walk.states = (T *)m.states, walk.normals = m.normals;
    walk.end = data_of<float>(final.C), walk.end_n = data_of<float>(final.n);
    mlstm_walk_chunks(dev, walk, data_of<float>(initial.C), data_of<float>(initial.n), m.carries, p, false);
    mlstm_output<T> o = {mlstm_rows_of<T>(h), mlstm_rows_of<T>(q), mlstm_rows_of<T>(k), walk.columns, walk.states,
                         m.normals, m.factors, tensor_given(initial.C)};
    mlstm_outputs(dev, o, p, false);
}

extern "C" void cuda_mlstm_forward(struct device *dev, tensor h, struct mlstm_state final, void *saved, tensor q,
                                   tensor k, tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc,
                                   struct mlstm_rule rule, int64_t chunk, void *scratch) {
    (void)chunk; /* one length for all shapes */
    check_operands(q, k, v, i, f, doc);
    with_type(q.dtype, [&](auto of_type) {
        forward_pass<decltype(of_type)>(dev, h, final, saved, q, k, v, i, f, initial, doc, rule, scratch);
    });
}

extern "C" void cuda_mlstm_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor di, tensor df,
                                    struct mlstm_state dinitial, tensor dh, struct mlstm_state dfinal,
                                    const void *saved, tensor h, tensor q, tensor k, tensor v, tensor i, tensor f,
                                    struct mlstm_state initial, tensor doc, struct mlstm_rule rule, int64_t chunk,
                                    void *scratch) {
    (void)chunk;
    check_operands(q, k, v, i, f, doc);
    with_type(q.dtype, [&](auto of_type) {
        mlstm_backward_pass<decltype(of_type)>(dev, dq, dk, dv, di, df, dinitial, dh, dfinal, saved, h, q, k, v, i, f,
                                               initial, rule, scratch);
    });
}

/* --- one token ---------------------------------------------------------------------------------------------------- */

/* STEP_ACROSS lanes of a warp have columns of V side by side, the others further rows. */
enum { STEP_WARPS = 16, STEP_ACROSS = 8 };

struct step_views {
    int64_t h, q, k, v, i, f; /* strides over batch rows */
    int64_t i_head, f_head;   /* over heads */
    int64_t H, K, V;
    float scale, eps;
    bool sigmoid, normalise;
};

/* How a token's gates change the state of a head: C = keep C + add k v^T. */
struct step_gates {
    float keep, add, m;
};

/* Exact to rounding: an error of keep that always has the same sign would grow from step to step. */
__device__ __forceinline__ step_gates step_gates_of(const float *i, const float *f, const float *m, const step_views &s,
                                                    int64_t row, int64_t head) {
    float in = i[row * s.i + head * s.i_head], forget = f[row * s.f + head * s.f_head];
    if (s.sigmoid) return {1.0f / (1.0f + expf(-forget)), 1.0f / (1.0f + expf(-in)), 0.0f};
    float before = m[row * s.H + head] - softplus_of(-forget), top = fmaxf(before, in);
    return {expf(before - top), expf(in - top), top};
}

/* Grid: (tiles of STEP_ACROSS W columns, heads, batch rows). */
template <class T, int W>
__global__ void __launch_bounds__(STEP_WARPS *WARP)
mlstm_step_kernel(T *h, float *C, const float *n, const float *m, const T *q, const T *k, const T *v, const float *i,
                  const float *f, step_views s) {
    __shared__ float sums[STEP_WARPS][STEP_ACROSS * W], dens[STEP_WARPS];
    int64_t head = blockIdx.y, row = blockIdx.z;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, side = lane % STEP_ACROSS;
    int64_t column = ((int64_t)blockIdx.x * STEP_ACROSS + side) * W;
    step_gates gates = step_gates_of(i, f, m, s, row, head);
    q += row * s.q + head * s.K, k += row * s.k + head * s.K, v += row * s.v + head * s.V;
    float in[W], sum[W] = {}, den = 0;
#pragma unroll
    for (int c = 0; c < W; c++) in[c] = column + c < s.V ? gates.add * to_float(v[column + c]) : 0.0f;
    C += (row * s.H + head) * s.K * s.V + column, n += (row * s.H + head) * s.K;
    for (int64_t r = warp * (WARP / STEP_ACROSS) + lane / STEP_ACROSS; r < s.K; r += STEP_WARPS * WARP / STEP_ACROSS) {
        float key = to_float(k[r]), query = to_float(q[r]) * s.scale;
        if (s.normalise) den += query * (gates.keep * n[r] + gates.add * key);
        if (column >= s.V) continue;
        float state[W];
        load_floats<W>(state, C + r * s.V);
#pragma unroll
        for (int c = 0; c < W; c++) state[c] = gates.keep * state[c] + key * in[c], sum[c] += query * state[c];
        store_floats<W>(C + r * s.V, state);
    }
    den = warp_sum(den) / STEP_ACROSS;
#pragma unroll
    for (int c = 0; c < W; c++) {
        for (int offset = STEP_ACROSS; offset < WARP; offset *= 2) sum[c] += __shfl_xor_sync(FULL, sum[c], offset);
        if (lane < STEP_ACROSS) sums[warp][side * W + c] = sum[c];
    }
    if (lane == 0) dens[warp] = den;
    __syncthreads();
    int64_t of_head = (int64_t)blockIdx.x * STEP_ACROSS * W + threadIdx.x;
    if (threadIdx.x >= STEP_ACROSS * W || of_head >= s.V) return;
    float num = 0, all = 0;
    for (int w = 0; w < STEP_WARPS; w++) num += sums[w][threadIdx.x], all += dens[w];
    float least = expf(-gates.m);
    if (s.normalise) num *= 1.0f / (fmaxf(fabsf(all), least) + s.eps);
    h[row * s.h + head * s.V + of_head] = from_float<T>(num);
}

/* n and m of a head. Grid: (heads, batch rows). */
template <class T>
__global__ void mlstm_step_vector_kernel(float *n, float *m, const T *k, const float *i, const float *f, step_views s) {
    int64_t head = blockIdx.x, row = blockIdx.y;
    step_gates gates = step_gates_of(i, f, m, s, row, head);
    if (s.normalise)
        for (int64_t r = threadIdx.x; r < s.K; r += blockDim.x) {
            float &to = n[(row * s.H + head) * s.K + r];
            to = gates.keep * to + gates.add * to_float(k[row * s.k + head * s.K + r]);
        }
    __syncthreads(); /* all have read m */
    if (threadIdx.x == 0) m[row * s.H + head] = gates.m;
}

extern "C" void cuda_mlstm_step(struct device *dev, tensor h, struct mlstm_state state, tensor q, tensor k, tensor v,
                                tensor i, tensor f, struct mlstm_rule rule) {
    int64_t B = q.dim[0], H = q.dim[1], K = q.dim[2], V = v.dim[2];
    ASSERT(tensor_is(state.C, 4, B, H, K, V) && tensor_is(h, 3, B, H, V) && tensor_is(k, 3, B, H, K));
    ASSERT(tensor_is(i, 2, B, H) && tensor_is(f, 2, B, H));
    step_views s = {h.stride[0], q.stride[0], k.stride[0], v.stride[0], i.stride[0], f.stride[0], i.stride[1],
                    f.stride[1], H, K, V, (float)(1 / sqrt((double)K)), (float)rule.eps, rule.sigmoid_input,
                    rule.normalise};
    float *C = data_of<float>(state.C), *n = data_of<float>(state.n), *m = data_of<float>(state.m);
    with_type(q.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_width(vectors_fit(state.C, 4), [&](auto width) {
            constexpr int W = width.value;
            dim3 grid((unsigned)ceil_div(V, STEP_ACROSS * W), (unsigned)H, (unsigned)B);
            LAUNCH(dev, (mlstm_step_kernel<T, W>), grid, STEP_WARPS *WARP, 0, data_of<T>(h), C, n, m, data_of<T>(q),
                   data_of<T>(k), data_of<T>(v), data_of<float>(i), data_of<float>(f), s);
        });
        LAUNCH(dev, mlstm_step_vector_kernel<T>, dim3((unsigned)H, (unsigned)B), 256, 0, n, m, data_of<T>(k),
               data_of<float>(i), data_of<float>(f), s);
    });
}
