/* mlstm_backward.cu: backward of the mLSTM (mlstm.cu has the plan): the rows' delta, and dq and dk. With D_ij the gates
 * between tokens, W_ij = inverse_i (dh_i . v_j + delta_i) D_ij for j <= i, the gradient of S_ij:
 *
 *   delta_i = -sign_i dh_i . h_i: inverse_i delta_i is the gradient of den_i; 0 in the truncated backward
 *   dq_i = s (enter_i inverse_i (C dh_i + delta_i n) + sum_j W_ij k_j)
 *   dk_j = leave_j (dC v_j + dn) + s sum_i W_ij q_i
 *
 * and on the way, from the accumulators, q_i . dq_i, k_j . dk_j and the latter's part with leave_j, of which
 * mlstm_gates.cu makes the gates' gradients.
 *
 * A block has a chunk of one head: W first, kept in shared memory; then, for each 128 columns of K, dq and dk. The dots
 * with q and k take their rows through the ring of stages, too.
 *
 * Account, B 8, T 2048, H 4, K 256, V 512, bf16: rows 134 MB, 0.05 ms, of which nothing where |den| is nowhere above
 * its floor. dq and dk: 512 blocks of 8 + 2 (8 + 1 + 2 + 8 + 2 + 2) steps, 54, of which 46 have products of 790 clocks,
 * two blocks at a time: 0.09 ms; bytes 201 MB of q, k, v, dh, 268 of states, 67 of dq, dk: 0.18 ms at 3.0 TB/s; through
 * the L2 cache 1.5 MB a block, 0.14 ms at 5.5 TB/s. Expected: 0.3 ms.
 *
 * Reproducible: every sum has its order from the shape.
 */
#include "kernels/cuda/mlstm.cuh"
#include "kernels/cuda/shared.cuh"

enum { ROW_WARPS = 8 };
template <class T> constexpr int STAGES = sizeof(T) == 2 ? 2 : 1;

template <class T> struct backward_room {
    product_stage<T> stages[STAGES<T>];
    product_triangle<T> weights;
    mlstm_factors f;
    float delta[MLSTM_CHUNK];
    float query[2][MLSTM_CHUNK], key[2][MLSTM_CHUNK], leave[2][MLSTM_CHUNK]; /* dots, of the columns of a warp */
};
static_assert(sizeof(backward_room<float>) <= SHARED_LEAST && sizeof(backward_room<__nv_bfloat16>) <= SHARED_LEAST,
              "what chips give");

template <class T> struct slopes_problem {
    mlstm_rows<T> dq, dk, q, k, v, dh;
    const T *states, *grads;       /* C that enters chunks, dC that leaves them */
    const float *normals, *slopes; /* n, dn; NULL where delta is 0 */
    const mlstm_factors *factors;
    const float *delta;            /* (B, chunks, H, MLSTM_CHUNK) or NULL: 0 */
    mlstm_slopes *to;
    bool left_edge, right_edge;    /* there is a state before the first chunk, and a gradient behind the last */
};

/* --- delta -------------------------------------------------------------------------------------------------------- */

/* A warp a token of one head. Grid: (chunks x MLSTM_CHUNK / ROW_WARPS, heads, batch rows). */
template <class T>
__global__ void __launch_bounds__(ROW_WARPS *WARP)
mlstm_delta_kernel(float *delta, mlstm_rows<T> dh, mlstm_rows<T> h, const mlstm_factors *factors, mlstm_problem p) {
    enum { PIECE = 16 / sizeof(T) };
    int64_t t = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / WARP, head = blockIdx.y, row = blockIdx.z;
    int64_t place = p.place(row, t / MLSTM_CHUNK, head);
    int lane = threadIdx.x % WARP, of_chunk = (int)(t % MLSTM_CHUNK);
    float sign = t < p.T ? factors[place].sign[of_chunk] : 0.0f, sum = 0;
    if (sign != 0) {
        const T *left = dh.at(row, t, head), *right = h.at(row, t, head);
        if (dh.aligned && h.aligned) {
            for (int c = lane * PIECE; c < p.V; c += WARP * PIECE) {
                float a[PIECE], b[PIECE];
                load_floats<PIECE>(a, left + c);
                load_floats<PIECE>(b, right + c);
#pragma unroll
                for (int i = 0; i < PIECE; i++) sum += a[i] * b[i];
            }
        } else {
            for (int c = lane; c < p.V; c += WARP) sum += to_float(left[c]) * to_float(right[c]);
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) delta[place * MLSTM_CHUNK + of_chunk] = -sign * sum;
}

/* --- dq, dk ------------------------------------------------------------------------------------------------------- */

template <class T>
__device__ __forceinline__ void weights_store(backward_room<T> &room, const product_sums &d, const product_place &at) {
    mlstm_each_gate<T>(room.f, at, [&](int i, int h, int n, int row, int column, float left, float right) {
        float inverse = room.f.inverse[row], delta = room.delta[row];
        left *= inverse * (d.v[i][n][2 * h] + delta), right *= inverse * (d.v[i][n][2 * h + 1] + delta);
        two_store(room.weights.at(row, column), left, right);
    });
}

/* Every row's accumulators plus `by` of the row times a vector over the columns, then times `factor` of the row. */
template <class F, class G>
__device__ __forceinline__ void add_vector(product_sums &d, const float *vector, int columns, const product_place &at,
                                           F by, G factor) {
    float v[8][2];
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int c = at.n0 + 8 * n + at.q + e;
            v[n][e] = vector && c < columns ? vector[c] : 0.0f;
        }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = at.m0 + 16 * i + 8 * h + at.g;
            float times = by(row), all = factor(row);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) d.v[i][n][2 * h + e] = all * (d.v[i][n][2 * h + e] + times * v[n][e]);
        }
}

/* A step's dots of rows, added to what is there: of a warp's columns. */
template <class T>
__device__ __forceinline__ void dots_add(float (&to)[2][MLSTM_CHUNK], const product_sums &d, product_stage<T> &stage,
                                         int part, const product_place &at) {
    product_row_dots(d, stage, part, at, [&](int row, float sum) {
        sum = quad_sum(sum);
        if (at.q == 0) to[at.n0 / 64][row] += sum;
    });
}

/* A block's steps: over V for the weights; then for each tile of K those of dq, then those of dk, which begin with the
 * product with a state. */
struct step_counts {
    int over_v, enters, leaves, leave_dots, query, key, all; /* query, key: steps of a tile's dq, and of its dk */
};

struct step_place {
    int k0, step; /* step: of dq or of dk; negative before them all, and behind */
    bool key, of_state;
};

__device__ __forceinline__ step_place step_place_of(int step, const step_counts &count) {
    int each = count.query + count.key;
    if (step < count.over_v || step >= count.all) return {0, -1, false, false};
    step -= count.over_v;
    step_place at = {step / each * PRODUCT, step % each, false, false};
    at.key = at.step >= count.query;
    if (at.key) at.step -= count.query;
    at.of_state = at.step < (at.key ? count.leaves : count.enters);
    return at;
}

template <class T>
__device__ __forceinline__ void slopes_load(int step, product_stage<T> &stage, const slopes_problem<T> &s,
                                            const step_counts &count, const mlstm_problem &p, int64_t row,
                                            int64_t chunk, int64_t head) {
    typedef product_shape<T> shape;
    int64_t t0 = chunk * MLSTM_CHUNK, state = p.place(row, chunk, head) * p.size();
    step_place at = step_place_of(step, count);
    if (at.step < 0) {
        mlstm_fill(stage.flat(0), s.dh, row, head, t0, p.T, step * shape::DEPTH);
        mlstm_fill(stage.flat(1), s.v, row, head, t0, p.T, step * shape::DEPTH);
        return;
    }
    if (at.of_state) {
        mlstm_fill(stage.flat(0), at.key ? s.v : s.dh, row, head, t0, p.T, at.step * shape::DEPTH);
        mlstm_fill_state(stage.flat(1), (at.key ? s.grads : s.states) + state, p, at.k0, at.step * shape::DEPTH);
        return;
    }
    step = at.step - (at.key ? count.leaves + count.leave_dots : count.enters);
    if (step >= 0 && step < shape::STEPS) {
        mlstm_fill(stage.deep(1), at.key ? s.q : s.k, row, head, t0 + step * shape::DEPTH, p.T, at.k0);
        return;
    }
    int part = step < 0 ? step + count.leave_dots : step - shape::STEPS;
    mlstm_fill(stage.part(), at.key ? s.k : s.q, row, head, t0 + part * shape::PART_ROWS, p.T, at.k0);
}

/* Grid: (heads, chunks, batch rows). */
template <class T>
__global__ void __launch_bounds__(PRODUCT_THREADS, sizeof(T) == 2 ? 2 : 1)
mlstm_slopes_kernel(slopes_problem<T> s, mlstm_problem p) {
    typedef product_shape<T> shape;
    DYNAMIC_SHARED(char, memory);
    backward_room<T> &room = *reinterpret_cast<backward_room<T> *>(memory);
    product_place at = product_place_of();
    int64_t head = blockIdx.x, chunk = blockIdx.y, row = blockIdx.z, t0 = chunk * MLSTM_CHUNK;
    int64_t place = p.place(row, chunk, head);
    int over_v = (p.V + shape::DEPTH - 1) / shape::DEPTH, tokens = (int)at_most(p.T - t0, PRODUCT);
    bool entered = s.left_edge || chunk > 0, left = s.right_edge || chunk + 1 < p.chunks;
    step_counts count = {over_v, entered ? over_v : 0, left ? over_v : 0, left ? shape::PARTS : 0, 0, 0, 0};
    count.query = count.enters + shape::STEPS + shape::PARTS;
    count.key = count.leaves + count.leave_dots + shape::STEPS + shape::PARTS;
    count.all = over_v + p.k_tiles * (count.query + count.key);
    auto load = [&](int step, product_stage<T> &stage) {
        slopes_load(step, stage, s, count, p, row, chunk, head);
    };
    mlstm_factors_load(room.f, s.factors + place);
    room.delta[threadIdx.x] = s.delta ? s.delta[place * MLSTM_CHUNK + threadIdx.x] : 0.0f;
    for (int w = 0; w < 2; w++)
        room.query[w][threadIdx.x] = room.key[w][threadIdx.x] = room.leave[w][threadIdx.x] = 0;
    product_ring<T, STAGES<T>> ring(room.stages, count.all, load);
    product_sums d;
    d.clear();
    for (int step = 0; step < over_v; step++) {
        product_stage<T> &stage = ring.take(load);
        if (at.m0 >= at.n0) product_flat_flat(d, stage, at);
    }
    if (at.m0 >= at.n0) weights_store(room, d, at);
    for (int k0 = 0; k0 < p.K; k0 += PRODUCT) {
        d.clear();
        for (int step = 0; step < count.enters; step++) product_flat_flat(d, ring.take(load), at);
        if (entered)
            add_vector(d, s.normals ? s.normals + place * p.K + k0 : NULL, p.K - k0, at,
                       [&](int t) { return room.delta[t]; },
                       [&](int t) { return room.f.enter[t] * room.f.inverse[t]; });
        for (int step = 0; step < shape::STEPS; step++)
            product_of_triangle<false>(d, room.weights, step * shape::DEPTH, ring.take(load), at);
        d.scale(p.scale);
        for (int part = 0; part < shape::PARTS; part++) dots_add(room.query, d, ring.take(load), part, at);
        product_store(d, s.dq.at(row, t0, head) + k0, s.dq.step, tokens, p.K - k0, s.dq.aligned, at);

        d.clear();
        for (int step = 0; step < count.leaves; step++) product_flat_flat(d, ring.take(load), at);
        if (left) {
            add_vector(d, s.slopes ? s.slopes + place * p.K + k0 : NULL, p.K - k0, at, [&](int) { return 1.0f; },
                       [&](int t) { return room.f.leave[t]; });
            for (int part = 0; part < shape::PARTS; part++) dots_add(room.leave, d, ring.take(load), part, at);
            d.scale(1 / p.scale);
        }
        for (int step = 0; step < shape::STEPS; step++)
            product_of_triangle<true>(d, room.weights, step * shape::DEPTH, ring.take(load), at);
        d.scale(p.scale);
        for (int part = 0; part < shape::PARTS; part++) dots_add(room.key, d, ring.take(load), part, at);
        product_store(d, s.dk.at(row, t0, head) + k0, s.dk.step, tokens, p.K - k0, s.dk.aligned, at);
    }
    __syncthreads();
    int t = threadIdx.x;
    s.to[place].query[t] = room.query[0][t] + room.query[1][t];
    s.to[place].key[t] = room.key[0][t] + room.key[1][t];
    s.to[place].leave[t] = room.leave[0][t] + room.leave[1][t];
}

/* --- launching ---------------------------------------------------------------------------------------------------- */

struct backward_memory {
    void *states, *grads;
    float *normals, *slopes, *delta, *through;
    mlstm_slopes *sums;
    mlstm_carries carries;
};

/* Carves the scratch, or, from NULL, measures it. */
static size_t backward_carve(backward_memory *m, struct mlstm_shape s, size_t element, char *scratch) {
    mlstm_carver room = {scratch, 0};
    int64_t places = s.B * mlstm_chunks(s) * s.H;
    int64_t tiles = ceil_div(s.K, PRODUCT) * ceil_div(s.V, PRODUCT);
    m->states = room.take(places * s.K * mlstm_wide(s, element), element);
    m->grads = room.take(places * s.K * mlstm_wide(s, element), element);
    m->normals = (float *)room.take(places * s.K, sizeof(float));
    m->slopes = (float *)room.take(places * s.K, sizeof(float));
    m->delta = (float *)room.take(places * MLSTM_CHUNK, sizeof(float));
    m->through = (float *)room.take(places * tiles * MLSTM_PARTS, sizeof(float));
    m->sums = (mlstm_slopes *)room.take(places, sizeof(mlstm_slopes));
    m->carries = mlstm_carve_carries(room, s);
    return room.used;
}

size_t mlstm_backward_scratch(struct mlstm_shape s, size_t element) {
    backward_memory m;
    return backward_carve(&m, s, element, NULL);
}

template <class T>
void mlstm_backward_pass(struct device *dev, tensor dq, tensor dk, tensor dv, tensor di, tensor df,
                         struct mlstm_state dinitial, tensor dh, struct mlstm_state dfinal, const void *saved, tensor h,
                         tensor q, tensor k, tensor v, tensor i, tensor f, struct mlstm_state initial,
                         struct mlstm_rule rule, void *scratch) {
    struct mlstm_shape shape = {q.dim[0], q.dim[1], q.dim[2], q.dim[3], v.dim[3], 0};
    mlstm_problem p = mlstm_problem_of(shape, rule, sizeof(T));
    const mlstm_factors *factors = (const mlstm_factors *)saved;
    bool exact = rule.normalise && !rule.truncated;
    backward_memory m;
    backward_carve(&m, shape, sizeof(T), (char *)scratch);
    mlstm_rows<T> of_h = mlstm_rows_of<T>(h), of_dh = mlstm_rows_of<T>(dh);
    dim3 rows((unsigned)(p.chunks * MLSTM_CHUNK / ROW_WARPS), (unsigned)p.H, (unsigned)p.B);
    if (exact) LAUNCH(dev, mlstm_delta_kernel<T>, rows, ROW_WARPS *WARP, 0, m.delta, of_dh, of_h, factors, p);
    mlstm_walk<T> right = {}, left = {};
    right.rows = mlstm_rows_of<T>(k), right.columns = mlstm_rows_of<T>(v), right.factors = factors;
    right.vector = rule.normalise, right.states = (T *)m.states, right.normals = m.normals;
    mlstm_walk_chunks(dev, right, data_of<float>(initial.C), data_of<float>(initial.n), m.carries, p, false);
    left.rows = mlstm_rows_of<T>(q), left.columns = of_dh, left.factors = factors;
    left.vector = rule.normalise, left.delta = exact ? m.delta : NULL;
    left.states = (T *)m.grads, left.normals = m.slopes;
    left.end = data_of<float>(dinitial.C), left.end_n = data_of<float>(dinitial.n);
    left.met = right.states, left.met_n = right.normals, left.through = m.through;
    const float *dfinal_n = rule.truncated ? NULL : data_of<float>(dfinal.n);
    mlstm_walk_chunks(dev, left, data_of<float>(dfinal.C), dfinal_n, m.carries, p, true);
    mlstm_output<T> o = {mlstm_rows_of<T>(dv), mlstm_rows_of<T>(q), mlstm_rows_of<T>(k), of_dh, left.states, NULL,
                         (mlstm_factors *)saved, tensor_given(dfinal.C)};
    mlstm_outputs(dev, o, p, true);
    slopes_problem<T> s = {mlstm_rows_of<T>(dq), mlstm_rows_of<T>(dk), mlstm_rows_of<T>(q), mlstm_rows_of<T>(k),
                           mlstm_rows_of<T>(v), of_dh, right.states, left.states, rule.normalise ? m.normals : NULL,
                           rule.normalise ? m.slopes : NULL, factors, left.delta, m.sums, tensor_given(initial.C),
                           tensor_given(dfinal.C)};
    size_t size = sizeof(backward_room<T>);
    allow_shared(dev, mlstm_slopes_kernel<T>, size, "mlstm_backward");
    dim3 chunks((unsigned)p.H, (unsigned)p.chunks, (unsigned)p.B);
    LAUNCH(dev, mlstm_slopes_kernel<T>, chunks, PRODUCT_THREADS, size, s, p);
    mlstm_gates_backward(dev, di, df, i, f, factors, m.sums, m.through, p.k_tiles * p.v_tiles * MLSTM_PARTS,
                         s.left_edge, p);
}

template void mlstm_backward_pass<float>(struct device *, tensor, tensor, tensor, tensor, tensor, struct mlstm_state,
                                         tensor, struct mlstm_state, const void *, tensor, tensor, tensor, tensor,
                                         tensor, tensor, struct mlstm_state, struct mlstm_rule, void *);
template void mlstm_backward_pass<__nv_bfloat16>(struct device *, tensor, tensor, tensor, tensor, tensor,
                                                 struct mlstm_state, tensor, struct mlstm_state, const void *, tensor,
                                                 tensor, tensor, tensor, tensor, tensor, struct mlstm_state,
                                                 struct mlstm_rule, void *);
