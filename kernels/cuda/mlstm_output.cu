/* mlstm_output.cu: what the tokens of a chunk get from it and from the state at its edge: h forward, dv backward. With
 * S_ij = s q_i . k_j, D_ij the gates between tokens (mlstm.cu), W_ij = S_ij D_ij for j <= i:
 *
 *   h_i  = inverse_i (enter_i s C^T q_i + sum_j W_ij v_j)
 *          den_i = enter_i s n . q_i + sum_j W_ij;  N_i = max(|den_i|, exp(-m_i));  inverse_i = 1 / (N_i + eps)
 *   dv_j = leave_j dC^T k_j + sum_i W_ij inverse_i dh_i
 *
 * A block has a chunk of one head: W first, which stays in shared memory as the first operand of products over the
 * chunk; then tile by tile of 128 columns of V the product with the state, and the one with v or dh. m is known from
 * the gates (mlstm_gates.cu), so nothing is rescaled on the way. A warp whose products all lie beyond the diagonal
 * skips them. All steps of a block are one sequence, whose loads are one step ahead of its products; two blocks of a
 * multiprocessor fill each other's gaps.
 *
 * Account, B 8, T 2048, H 4, K 256, V 512, bf16: 512 blocks of 28 steps of 790 clocks, two at a time on each of 132
 * multiprocessors: 0.05 ms; the weights' exponentials and masks, 40 instructions for each of 128 accumulators a thread,
 * behind the other block's products. Bytes: 134 MB of states, 201 of q, k, v, h: 0.11 ms at 3.0 TB/s; 0.4 GB through
 * the L2 cache, which gives 5.5 TB/s: 0.07 ms. Expected: 0.15 ms each.
 *
 * Reproducible: every sum has its order from the shape.
 */
#include "kernels/cuda/mlstm.cuh"
#include "kernels/cuda/shared.cuh"

template <class T> constexpr int STAGES = sizeof(T) == 2 ? 2 : 1;

template <class T> struct output_room {
    product_stage<T> stages[STAGES<T>];
    product_triangle<T> weights;
    mlstm_factors f;
    float rows[2][MLSTM_CHUNK]; /* sums of weights over the columns of a warp */
};
static_assert(sizeof(output_room<float>) <= SHARED_LEAST && sizeof(output_room<__nv_bfloat16>) <= SHARED_LEAST,
              "what chips give");

/* W, times inverse_i in backward; forward also its rows' sums. */
template <bool BACKWARD, class T>
__device__ __forceinline__ void weights_store(output_room<T> &room, const product_sums &d, float scale,
                                              const product_place &at) {
    float sum = 0;
    mlstm_each_gate<T>(room.f, at, [&](int i, int h, int n, int row, int column, float left, float right) {
        float by = BACKWARD ? scale * room.f.inverse[row] : scale;
        left *= by * d.v[i][n][2 * h], right *= by * d.v[i][n][2 * h + 1];
        two_store(room.weights.at(row, column), left, right);
        if (BACKWARD) return;
        sum = n == 0 ? left + right : sum + left + right;
        if (n < 7) return;
        sum = quad_sum(sum);
        if (at.q == 0) room.rows[at.n0 / 64][row] = sum;
    });
}

/* n . q over the columns of a step, for the row of this thread. */
template <class T>
__device__ __forceinline__ float normal_dot(product_stage<T> &stage, const float *n, int columns) {
    enum { DEPTH = product_shape<T>::DEPTH };
    float sum = 0;
#pragma unroll
    for (int c = 0; c < DEPTH; c += 2) {
        float2 q = two_of(stage.flat(0).at(threadIdx.x, c));
        if (c < columns) sum += q.x * n[c];
        if (c + 1 < columns) sum += q.y * n[c + 1];
    }
    return sum;
}

/* A thread's token: its normaliser, kept for backward. */
template <class T>
__device__ __forceinline__ void normalise(output_room<T> &room, mlstm_factors &kept, float from_state, bool there,
                                          const mlstm_problem &p) {
    int t = threadIdx.x;
    float inverse = there ? 1.0f : 0.0f, sign = 0;
    if (p.normalise && there) {
        float den = room.f.enter[t] * p.scale * from_state + room.rows[0][t] + (t < 64 ? 0.0f : room.rows[1][t]);
        float least = power_of_two(-room.f.top[t]);
        inverse = 1.0f / (fmaxf(fabsf(den), least) + p.eps);
        if (fabsf(den) > least) sign = den > 0 ? 1.0f : -1.0f;
        if (isnan(den)) inverse = den;
    }
    room.f.inverse[t] = kept.inverse[t] = inverse;
    kept.sign[t] = sign;
}

/* Grid: (heads, chunks, batch rows). */
template <class T, bool BACKWARD>
__global__ void __launch_bounds__(PRODUCT_THREADS, sizeof(T) == 2 ? 2 : 1)
mlstm_output_kernel(mlstm_output<T> o, mlstm_problem p) {
    enum { DEPTH = product_shape<T>::DEPTH, STEPS = product_shape<T>::STEPS };
    DYNAMIC_SHARED(char, memory);
    output_room<T> &room = *reinterpret_cast<output_room<T> *>(memory);
    product_place at = product_place_of();
    int64_t head = blockIdx.x, chunk = blockIdx.y, row = blockIdx.z, t0 = chunk * MLSTM_CHUNK;
    int64_t place = p.place(row, chunk, head);
    const T *state = o.states + place * p.size();
    const float *normal = o.normals ? o.normals + place * p.K : NULL;
    bool from_state = o.edge || (BACKWARD ? chunk + 1 < p.chunks : chunk > 0);
    int over_k = (p.K + DEPTH - 1) / DEPTH, of_state = from_state ? over_k : 0, each = of_state + STEPS;
    auto load = [&](int step, product_stage<T> &stage) {
        int k0 = step * DEPTH;
        if (step < over_k) {
            mlstm_fill(stage.flat(0), o.q, row, head, t0, p.T, k0);
            mlstm_fill(stage.flat(1), o.k, row, head, t0, p.T, k0);
            return;
        }
        int v0 = (step - over_k) / each * PRODUCT;
        k0 = (step - over_k) % each * DEPTH;
        if (k0 < of_state * DEPTH) {
            mlstm_fill(stage.flat(0), BACKWARD ? o.k : o.q, row, head, t0, p.T, k0);
            mlstm_fill_state(stage.deep(1), state, p, k0, v0);
        } else {
            mlstm_fill(stage.deep(1), o.values, row, head, t0 + k0 - of_state * DEPTH, p.T, v0);
        }
    };
    mlstm_factors_load(room.f, o.factors + place);
    product_ring<T, STAGES<T>> ring(room.stages, over_k + p.v_tiles * each, load);
    product_sums d;
    float from_normal = 0;
    d.clear();
    for (int step = 0; step < over_k; step++) {
        product_stage<T> &stage = ring.take(load);
        if (at.m0 >= at.n0) product_flat_flat(d, stage, at);
        if (!BACKWARD && p.normalise && from_state)
            from_normal += normal_dot(stage, normal + step * DEPTH, p.K - step * DEPTH);
    }
    if (at.m0 >= at.n0) weights_store<BACKWARD>(room, d, p.scale, at);
    if (!BACKWARD) {
        __syncthreads();
        normalise(room, o.factors[place], from_normal, t0 + threadIdx.x < p.T, p);
    }
    for (int v0 = 0; v0 < p.V; v0 += PRODUCT) {
        d.clear();
        for (int step = 0; step < of_state; step++) product_flat_deep(d, ring.take(load), at);
        if (of_state)
            d.scale_rows(at, [&](int t) { return BACKWARD ? room.f.leave[t] : room.f.enter[t] * p.scale; });
        for (int step = 0; step < STEPS; step++) {
            product_stage<T> &stage = ring.take(load);
            product_of_triangle<BACKWARD>(d, room.weights, step * DEPTH, stage, at);
        }
        if (!BACKWARD) d.scale_rows(at, [&](int t) { return room.f.inverse[t]; });
        product_store(d, o.to.at(row, t0, head) + v0, o.to.step, (int)at_most(p.T - t0, PRODUCT), p.V - v0,
                      o.to.aligned, at);
    }
}

template <class T, bool BACKWARD>
static void launch_outputs(struct device *dev, const mlstm_output<T> &o, const mlstm_problem &p) {
    auto kernel = mlstm_output_kernel<T, BACKWARD>;
    size_t size = sizeof(output_room<T>);
    allow_shared(dev, kernel, size, "mlstm");
    LAUNCH(dev, kernel, dim3((unsigned)p.H, (unsigned)p.chunks, (unsigned)p.B), PRODUCT_THREADS, size, o, p);
}

template <class T>
void mlstm_outputs(struct device *dev, const mlstm_output<T> &o, const mlstm_problem &p, bool backward) {
    if (backward) launch_outputs<T, true>(dev, o, p);
    else launch_outputs<T, false>(dev, o, p);
}

template void mlstm_outputs(struct device *, const mlstm_output<float> &, const mlstm_problem &, bool);
template void mlstm_outputs(struct device *, const mlstm_output<__nv_bfloat16> &, const mlstm_problem &, bool);
