/* each_cell_forward.cu: a nonlinear recurrence token after token, from where each chunk of time begins; cell.cu has the
 * equations and says when there is more than one chunk.
 *
 *   run     s[t] = f(s[t-1], u[t] + bias), y, the other states, and how far a chunk's end is from where the next begins
 *   sweep   the same without outputs, for the chunk's map of corrections: P = J[end] ... J[begin],
 *           rest = s[end] - (what the next chunk begins with). The second one leaves out where the first found that
 *           nothing of a chunk's start reaches its end: then what the next chunk begins with is right already.
 *
 * A thread has a channel of a chunk (each_cell.cuh) and its states in registers. Reading u is all there is to wait for,
 * and it does not depend on states, so it comes through the ring. Bytes a token and channel, with e those of an
 * activation: run e (U + S), or e (U + 1) without other states; sweep e U, of as few tokens as will do. Special
 * functions: two for each sigmoid or tanh, so 6 for the GRU and 8 for the LSTM, 1.6 and 2.2 ps on 132 multiprocessors
 * at 1.75 GHz, where bytes take 2.7 and 3.3 at 3.0 TB/s; 32 instructions in all for the GRU. The chain from s[t-1] to
 * s[t], four special functions one behind the other among other things, was measured as 137 ns for both cells: so long
 * does a row take for each token, and with fewer than about 20 warps a multiprocessor it is what all wait for.
 */
#include "kernels/cuda/each_cell.cuh"

namespace {

template <class T>
__global__ void __launch_bounds__(THREADS, 6)
run_kernel(const __grid_constant__ cell_problem p, cell_outputs out, const float *before) {
    DYNAMIC_SHARED(char, memory);
    place at(p);
    channel<T> own(p, at);
    float s[S], next[S], check = 0, worst = 0;
    bool compare = out.residual && at.chunk + 1 < p.chunks && !begins(p, at.b, at.end);
    if (at.chunk == 0) own.initial(s, p, at);
    else load_column(s, before, at.of_chunk(p, at.chunk, S), p.N, at.inside);
    load_column(next, before, at.of_chunk(p, at.chunk + 1, S), p.N, at.inside && compare);
    walk_forward<T>(memory, own, p, at, [&](const float (&u)[U], int64_t t, bool starts) {
        float after[S];
        zero_if(starts, s);
        step(s, u, own.weight, after);
        copy(s, after);
        if (at.inside) store_states<T>(out, p, at, t, s, check);
    });
    if (out.final && at.chunk + 1 == p.chunks) store_column(out.final + at.b * S * p.N + at.n, s, p.N, at.inside);
    if (!out.residual) return;
#pragma unroll
    for (int i = 0; i < S; i++)
        if (compare) worst = fmaxf(worst, fabsf(s[i] - next[i]));
    report(out.residual, at.inside ? worst : 0, at.inside ? check : 0);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 6)
sweep_kernel(const __grid_constant__ cell_problem p, cell_chunks c, int round) {
    DYNAMIC_SHARED(char, memory);
    place at(p);
    if (at.chunk + 1 == p.chunks) return; /* nothing follows */
    bool guess = round == 0;
    float s[S], next[S], product[S * S];
    int64_t mine = at.of_chunk(p, at.chunk, S), following = at.of_chunk(p, at.chunk + 1, S);
    int64_t map = at.of_chunk(p, at.chunk, S * S);
    if (round == 1) {
        load_column(product, c.product, map, p.N, at.inside);
        if (forgotten(product, at.inside)) {
            zero(s);
            store_column(c.rest + mine, s, p.N, at.inside);
            return;
        }
    }
    channel<T> own(p, at);
    place part = at;
    if (guess) {
        own.guess(next, p, at, at.end - 1);
        store_column(c.before + following, next, p.N, at.inside);
    } else load_column(next, c.before, following, p.N, at.inside);
    for (int64_t count = 0; count == 0 || (part.begin > at.begin && !forgotten(product, at.inside));) {
        count = guess ? tokens_of_map(at, count) : at.end - at.begin;
        part.begin = at.end - count;
        if (part.begin > at.begin || (guess && at.chunk > 0)) own.guess(s, p, at, part.begin - 1);
        else if (at.chunk == 0) own.initial(s, p, at);
        else load_column(s, c.before, mine, p.N, at.inside);
        identity(product);
        walk_forward<T>(memory, own, p, part, [&](const float (&u)[U], int64_t, bool starts) {
            float after[S], J[S * S];
            zero_if(starts, s), zero_if(starts, product);
            cell_jacobian(s, u, own.weight, after, after, J);
            multiply<false>(product, J);
            copy(s, after);
        });
    }
#pragma unroll
    for (int i = 0; i < S; i++) s[i] -= next[i];
    store_column(c.rest + mine, s, p.N, at.inside);
    store_column(c.product + map, product, p.N, at.inside);
}

template <class T> __global__ void step_kernel(const __grid_constant__ cell_problem p, T *y, float *state) {
    place at(p);
    if (!at.inside) return;
    channel<T> own(p, at);
    float s[S], u[U], after[S];
    load_column(s, state, at.b * S * p.N + at.n, p.N, true);
#pragma unroll
    for (int v = 0; v < U; v++) u[v] = to_float(own.inputs[v * p.width]) + own.bias[v];
    step(s, u, own.weight, after);
    store_column(state + at.b * S * p.N + at.n, after, p.N, true);
    y[at.b * p.N + at.n] = from_float<T>(after[OUTPUT]);
}

} // namespace

void NAMED(cell_run_, CELL)(struct device *dev, const cell_problem &p, cell_outputs out, const float *before) {
    with_type(p.act, [&](auto of_type) {
        using T = decltype(of_type);
        allow_ring(dev, run_kernel<T>, forward_ring<T>);
        LAUNCH(dev, run_kernel<T>, cell_grid(p), THREADS, forward_ring<T>, p, out, before);
    });
}

void NAMED(cell_sweep_, CELL)(struct device *dev, const cell_problem &p, cell_chunks c, int round) {
    with_type(p.act, [&](auto of_type) {
        using T = decltype(of_type);
        allow_ring(dev, sweep_kernel<T>, forward_ring<T>);
        LAUNCH(dev, sweep_kernel<T>, cell_grid(p), THREADS, forward_ring<T>, p, c, round);
    });
}

void NAMED(cell_step_, CELL)(struct device *dev, const cell_problem &p, void *y, float *state) {
    with_type(p.act, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, step_kernel<T>, cell_grid(p), THREADS, 0, p, (T *)y, state);
    });
}
