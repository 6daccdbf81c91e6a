/* each_cell_backward.cu: the gradient of a nonlinear recurrence: one linear recurrence from right to left; cell.cu says
 * how time is cut.
 *
 *   lambda[t] = dy[t] (of the output) + J[t+1]^T lambda[t+1];   du[t], dweight from lambda[t];   J and gates computed
 *   again from u and the stored states
 *
 *   totals     of each chunk but the first: what leaves it to the left if nothing comes from the right, and the product
 *              J[begin]^T ... J[end]^T that takes through what does
 *   gradients  from what comes from the right: du, and the sums over the chunk's tokens that add up to dbias, dweight
 *
 * A thread has a channel of a chunk (each_cell.cuh); lambda is nowhere but in its registers. The gates of a token don't
 * depend on lambda, so tokens overlap and the walk is bound by bytes and instructions, not by its chain. Bytes a token
 * and channel, with e those of an activation: totals e (U + S + 1), gradients e (2 U + S + 1): for the GRU in bf16 10
 * and 16. Some 100 instructions of the GRU for both halves of a token: 3 ps on 132 multiprocessors that are full. The
 * sums are added token by token within eight, then those, in an order that depends on the shape only.
 */
#include "kernels/cuda/each_cell.cuh"

namespace {

/* Planes of a stage: u of the token, dy of the token, the states before it. */
enum { STAGES = 3, OF_DY = U, OF_STATES = U + 1, PLANES = U + 1 + S };

template <class T> using backward_stage = stage<T, PLANES>;
template <class T> constexpr size_t ring_bytes = WARPS * STAGES * sizeof(backward_stage<T>);

/* Where state i of a row's first token lies, and from token to token; i is a constant. */
template <class T> __device__ __forceinline__ const T *states_of(const cell_gradients &g, const cell_problem &p,
                                                                 int64_t b, int64_t n, int i) {
    if (i == OUTPUT) return (const T *)g.y + b * p.T * p.N + n;
    return (const T *)g.others + (b * p.T * (S - 1) + i - (i > OUTPUT)) * p.N + n;
}

__device__ __forceinline__ int64_t states_step(const cell_problem &p, int i) {
    return i == OUTPUT ? p.N : (S - 1) * p.N;
}

/* The tokens of a chunk from right to left: advance(u, before, now, dy, t, whether t starts a document) with the states
 * before and behind it; `before` is 0 where it starts a document. done() is called behind each stage. */
template <class T, class STEP, class DONE>
__device__ __forceinline__ void walk_backward(char *memory, const channel<T> &own, const cell_problem &p,
                                              const place &at, const cell_gradients &g, STEP advance, DONE done) {
    copier<T> copies(p, at);
    float now[S], initial[S];
    own.initial(initial, p, at);
#pragma unroll
    for (int i = 0; i < S; i++)
        now[i] = at.inside ? to_float(states_of<T>(g, p, at.b, at.n, i)[(at.end - 1) * states_step(p, i)]) : 0;
    auto fill = [&](backward_stage<T> &to, int64_t t0, int left) {
        copies.inputs(to.of, p, t0, left);
        copies.plane(to.of[OF_DY], (const T *)g.dy + (at.b * p.T + t0) * p.N + copies.n, p.N, 0, left);
#pragma unroll
        for (int i = 0; i < S; i++)
            copies.plane(to.of[OF_STATES + i], states_of<T>(g, p, at.b, copies.n, i) + (t0 - 1) * states_step(p, i),
                         states_step(p, i), t0 == 0, left);
        copies.documents(to.doc, p, at, t0, left);
    };
    auto use = [&](const backward_stage<T> &from, int64_t t0, int left) {
        unsigned starts = from.starts(p, at.lane);
        each_token<true>(left, [&](int k) {
            float u[U], before[S], used[S];
            from.load_inputs(u, own.bias, k, at.lane);
#pragma unroll
            for (int i = 0; i < S; i++) before[i] = to_float(from.of[OF_STATES + i][k][at.lane]);
            if (k == 0 && t0 == 0) copy(before, initial);
            copy(used, before);
            zero_if(starts >> k & 1, used);
            advance(u, used, now, to_float(from.of[OF_DY][k][at.lane]), t0 + k, (starts >> k & 1) != 0);
            copy(now, before);
        });
        done();
    };
    walk_tokens<STAGES, true, backward_stage<T>>(memory, at, fill, use);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
totals_kernel(const __grid_constant__ cell_problem p, const __grid_constant__ cell_gradients g, cell_chunks c) {
    DYNAMIC_SHARED(char, memory);
    place at(p);
    if (at.chunk == 0) return; /* nothing lies to the left */
    channel<T> own(p, at);
    place part = at;
    float rest[S] = {}, product[S * S];
    auto advance = [&](const float (&u)[U], const float (&before)[S], const float (&now)[S], float dy, int64_t,
                       bool starts) {
        float after[S], J[S * S];
        cell_jacobian(before, u, own.weight, now, after, J);
        rest[OUTPUT] += dy;
        multiply<true>(rest, J), multiply<true>(product, J);
        zero_if(starts, rest), zero_if(starts, product);
    };
    for (int64_t count = 0; count == 0 || (part.end < at.end && !forgotten(product, at.inside));) {
        count = tokens_of_map(at, count);
        part.end = at.begin + count;
        zero(rest), identity(product);
        walk_backward<T>(memory, own, p, part, g, advance, [] {});
    }
    store_column(c.rest + at.of_chunk(p, at.chunk, S), rest, p.N, at.inside);
    store_column(c.product + at.of_chunk(p, at.chunk, S * S), product, p.N, at.inside);
}

template <int COUNT> __device__ __forceinline__ void add(float (&sum)[COUNT], const float (&v)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum[i] += v[i];
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
gradients_kernel(const __grid_constant__ cell_problem p, const __grid_constant__ cell_gradients g, const float *d) {
    DYNAMIC_SHARED(char, memory);
    place at(p);
    channel<T> own(p, at);
    float carry[S], of_bias[U], of_weight[W], few_bias[U], few_weight[W];
    T *to = (T *)g.du + at.b * g.du_row + input_place(p, at.n);
    load_column(carry, d, at.of_chunk(p, at.chunk, S), p.N, at.inside);
    zero(of_bias), zero(of_weight), zero(few_bias), zero(few_weight);
    auto advance = [&](const float (&u)[U], const float (&before)[S], const float (&now)[S], float dy, int64_t t,
                       bool starts) {
        float du[U], dw[W], lambda[S];
        copy(lambda, carry);
        lambda[OUTPUT] += dy;
        cell_gradient(before, u, own.weight, now, lambda, carry, du, dw);
        zero_if(starts, carry);
        add(few_bias, du), add(few_weight, dw);
#pragma unroll
        for (int v = 0; v < U; v++)
            if (at.inside) to[t * g.du_step + v * p.width] = from_float<T>(du[v]);
    };
    auto done = [&] {
        add(of_bias, few_bias), add(of_weight, few_weight);
        zero(few_bias), zero(few_weight);
    };
    walk_backward<T>(memory, own, p, at, g, advance, done);
    float *sums = g.sums + at.of_chunk(p, at.chunk, U + W);
    store_column(sums, of_bias, p.N, at.inside);
    store_column(sums + U * p.N, of_weight, p.N, at.inside);
    if (g.dinitial && at.chunk == 0) store_column(g.dinitial + at.b * S * p.N + at.n, carry, p.N, at.inside);
}

} // namespace

void NAMED(cell_totals_, CELL)(struct device *dev, const cell_problem &p, cell_gradients g, cell_chunks c) {
    with_type(p.act, [&](auto of_type) {
        using T = decltype(of_type);
        allow_ring(dev, totals_kernel<T>, ring_bytes<T>);
        LAUNCH(dev, totals_kernel<T>, cell_grid(p), THREADS, ring_bytes<T>, p, g, c);
    });
}

void NAMED(cell_gradients_, CELL)(struct device *dev, const cell_problem &p, cell_gradients g, const float *d) {
    with_type(p.act, [&](auto of_type) {
        using T = decltype(of_type);
        allow_ring(dev, gradients_kernel<T>, ring_bytes<T>);
        LAUNCH(dev, gradients_kernel<T>, cell_grid(p), THREADS, ring_bytes<T>, p, g, d);
    });
}
