/* each_cell_newton.cu: Newton's method for all tokens' states of a nonlinear recurrence (arXiv 2510.21450): a walk over
 * the tokens for each correction, in chunks of time; between walks, cell.cu's scan over the chunks.
 *
 *   guess    s[t] = f(0, u[t])
 *   correct  d[t] = r[t] + J[t] d[t-1],  r[t] = f(s[t-1], u[t]) - s[t],  J[t] = df/ds at (s[t-1], u[t]);  s[t] += d[t]
 *
 * To correct, a chunk has to know the d that enters it, for which the chunks before must have been assembled: run from
 * d = 0 for `rest`, with the product of their J. So walk k corrects for the k-th time and at once, with what comes of
 * it, assembles for the next; the first one assembles only, the last one corrects only and puts out the solution. Where
 * the states so far are the guess (walks 0 and 1) they are computed again.
 *
 * A thread has a channel of a chunk (each_cell.cuh). Bytes a token and channel, K corrections, e bytes an activation:
 * e U (K + 1) + 4 S (2 K - 2) + e S: 42 for the GRU in bf16 with K = 3, and 8 evaluations of the step: some five
 * times what each_cell_forward.cu's single walk takes. It is here to compare with, and for what its iterates are.
 */
#include "kernels/cells/residual.h"
#include "kernels/cuda/each_cell.cuh"

namespace {

/* States before the next token: as they were, and corrected by d; and the map of the next correction. */
struct newton_state {
    float old[S], fresh[S], d[S], rest[S], product[S * S];
    float worst, check;
};

template <class T>
__device__ __forceinline__ void enter(newton_state &s, const channel<T> &own, const cell_problem &p, const place &at,
                                      const cell_chunks &c, const cell_newton &n) {
    int64_t mine = at.of_chunk(p, at.chunk, S);
    zero(s.d), zero(s.rest), identity(s.product);
    s.worst = s.check = 0;
    if (at.chunk == 0) {
        own.initial(s.old, p, at);
        copy(s.fresh, s.old);
    } else if (n.correct) {
        load_column(s.old, c.before, mine, p.N, at.inside);
        load_column(s.fresh, c.corrected, mine, p.N, at.inside);
        load_column(s.d, c.d, mine, p.N, at.inside);
    } else {
        own.guess(s.old, p, at, at.begin - 1);
        copy(s.fresh, s.old);
        store_column(c.before + mine, s.old, p.N, at.inside);
    }
}

/* The token's states `now` as they are so far are corrected. */
__device__ __forceinline__ void correct(newton_state &s, float (&fresh)[S], const float (&now)[S], const float (&u)[U],
                                        const float (&w)[W], float bound) {
    float after[S], J[S * S];
    cell_jacobian(s.old, u, w, now, after, J);
    multiply<false>(s.d, J);
#pragma unroll
    for (int i = 0; i < S; i++) {
        fresh[i] = clamped(after[i] + s.d[i], bound); /* as now + d, but that a state that is reached keeps its bits */
        s.d[i] += after[i] - now[i];
    }
}

/* The map of the chunk goes on by the token that has the states `now` by now. */
__device__ __forceinline__ void assemble(newton_state &s, const float (&now)[S], const float (&u)[U],
                                         const float (&w)[W]) {
    float after[S], J[S * S];
    cell_jacobian(s.fresh, u, w, now, after, J);
    multiply<false>(s.rest, J), multiply<false>(s.product, J);
#pragma unroll
    for (int i = 0; i < S; i++) {
        float r = after[i] - now[i];
        s.rest[i] += r;
        s.worst = fmaxf(s.worst, fabsf(r));
        s.check += 0 * r;
    }
}

/* The guess, which goes on from `initial` where the row does. */
template <class T>
__device__ __forceinline__ void guess(float (&now)[S], const channel<T> &own, const float (&u)[U],
                                      const cell_problem &p, const place &at, int64_t t, bool starts) {
    float before[S];
    zero(before);
    if (t == 0 && !starts) own.initial(before, p, at);
    step(before, u, own.weight, now);
}

template <class T>
__device__ __forceinline__ void newton_token(newton_state &s, const channel<T> &own, const float (&u)[U],
                                             cell_outputs out, const cell_problem &p, const place &at,
                                             const cell_newton &n, int64_t t, bool starts) {
    float now[S], fresh[S];
    float *states = n.states + (at.b * p.T + t) * S * p.N + at.n;
    zero_if(starts, s.old), zero_if(starts, s.fresh), zero_if(starts, s.d);
    zero_if(starts, s.rest), zero_if(starts, s.product);
    if (n.guess) guess(now, own, u, p, at, t, starts);
    else load_column(now, states, 0, p.N, at.inside);
    copy(fresh, now);
    if (n.correct) correct(s, fresh, now, u, own.weight, p.bound);
    if (n.assemble) assemble(s, fresh, u, own.weight);
    copy(s.old, now), copy(s.fresh, fresh);
    if (!at.inside || !n.correct) return;
    if (n.assemble) store_column(states, fresh, p.N, true);
    else store_states<T>(out, p, at, t, fresh, s.check);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
newton_kernel(const __grid_constant__ cell_problem p, cell_outputs out, cell_chunks c, cell_newton n) {
    DYNAMIC_SHARED(char, memory);
    place at(p);
    channel<T> own(p, at);
    newton_state s;
    enter(s, own, p, at, c, n);
    walk_forward<T>(memory, own, p, at, [&](const float (&u)[U], int64_t t, bool starts) {
        newton_token(s, own, u, out, p, at, n, t, starts);
    });
    if (n.assemble && at.chunk + 1 < p.chunks) {
        store_column(c.rest + at.of_chunk(p, at.chunk, S), s.rest, p.N, at.inside);
        store_column(c.product + at.of_chunk(p, at.chunk, S * S), s.product, p.N, at.inside);
    }
    if (!n.assemble && out.final && at.chunk + 1 == p.chunks)
        store_column(out.final + at.b * S * p.N + at.n, s.fresh, p.N, at.inside);
    if (!out.residual || !n.report) return;
    report(out.residual, at.inside ? cell_newton_residual(s.worst) : 0, at.inside ? s.check : 0);
}

} // namespace

void NAMED(cell_newton_, CELL)(struct device *dev, const cell_problem &p, cell_outputs out, cell_chunks c,
                               cell_newton n) {
    with_type(p.act, [&](auto of_type) {
        using T = decltype(of_type);
        allow_ring(dev, newton_kernel<T>, forward_ring<T>);
        LAUNCH(dev, newton_kernel<T>, cell_grid(p), THREADS, forward_ring<T>, p, out, c, n);
    });
}
