/* each_cell_forward.c: the solvers of a nonlinear recurrence s[t] = f(s[t-1], u[t]) for one cell and one block of
 * channels.
 *
 * Sequential: token after token. Its cost is one step a token, and it is exact: on a CPU, where vectors of channels
 * fill the processor, nothing is faster. The other two are here as the reference of what a GPU does, and to be studied.
 *
 * Newton (arXiv 2510.21450): all s[t] are unknown. From a guess, a number of times, with J[t] the step's Jacobian at
 * s[t-1]:
 *   r[t] = f(s[t-1], u[t]) - s[t]     d[t] = J[t] d[t-1] + r[t], from 0     s[t] += d[t]
 * in one pass over the tokens, because a CPU solves the system for d in the order of time as well as in any. What is
 * written is f + J d, which is s + d with one rounding less, and makes a state that is reached keep its bits.
 *
 * Multiple shooting: only the states at the starts of chunks are unknown. A chunk is walked from its start S to its end
 * e with the product P of its Jacobians, then the next chunk's start is e + P (S' - S), S' the new start of this one.
 * After the last correction the chunks are walked once more, for the states within.
 *
 * At a document's start the state before is 0 whatever it was, so that nothing is corrected across it.
 */
#include "kernels/cpu/each_cell_block.h"

/* --- a token of all lanes ----------------------------------------------------------------------------------------- */

NOT_INLINED static void lanes_step(real (*restrict after)[CELL_LANES], const real (*restrict before)[CELL_LANES],
                                   const real (*restrict u)[CELL_LANES], const real (*restrict w)[CELL_LANES]) {
    for (int l = 0; l < CELL_LANES; l++) {
        real b[S], inputs[U], weights[W], a[S];
        UNROLL
        for (int k = 0; k < S; k++) b[k] = before[k][l];
        UNROLL
        for (int k = 0; k < U; k++) inputs[k] = u[k][l];
        UNROLL
        for (int k = 0; k < W; k++) weights[k] = w[k][l];
        step(b, inputs, weights, a);
        UNROLL
        for (int k = 0; k < S; k++) after[k][l] = a[k];
    }
}

/* One lane. The Jacobian at the states `before` and, where the cell's looks at it, `now`; or, if `exact`, at what
 * follows from `before`. */
static inline void lane_jacobian(int l, cell_lanes *after, cell_lanes *J, const cell_lanes *before,
                                 const cell_lanes *now, const cell_lanes *u, const cell_lanes *w, bool exact) {
    real b[S], n[S], inputs[U], weights[W], a[S], j[S * S];
    UNROLL
    for (int k = 0; k < S; k++) b[k] = before[k][l];
    UNROLL
    for (int k = 0; k < S; k++) n[k] = exact ? 0 : now[k][l];
    UNROLL
    for (int k = 0; k < U; k++) inputs[k] = u[k][l];
    UNROLL
    for (int k = 0; k < W; k++) weights[k] = w[k][l];
    own_jacobian(b, inputs, weights, exact ? a : n, a, j);
    UNROLL
    for (int k = 0; k < S; k++) after[k][l] = a[k];
    UNROLL
    for (int k = 0; k < S * S; k++) J[k][l] = j[k];
}

NOT_INLINED static void lanes_jacobian(real (*restrict after)[CELL_LANES], real (*restrict J)[CELL_LANES],
                                       const real (*restrict before)[CELL_LANES],
                                       const real (*restrict now)[CELL_LANES], const real (*restrict u)[CELL_LANES],
                                       const real (*restrict w)[CELL_LANES]) {
    for (int l = 0; l < CELL_LANES; l++) lane_jacobian(l, after, J, before, now, u, w, false);
}

NOT_INLINED static void lanes_exact_jacobian(real (*restrict after)[CELL_LANES], real (*restrict J)[CELL_LANES],
                                             const real (*restrict before)[CELL_LANES],
                                             const real (*restrict u)[CELL_LANES],
                                             const real (*restrict w)[CELL_LANES]) {
    for (int l = 0; l < CELL_LANES; l++) lane_jacobian(l, after, J, before, NULL, u, w, true);
}

/* --- residuals ---------------------------------------------------------------------------------------------------- */

/* worst = max(worst, |difference|), infinite where that or `number` is not finite. */
static void observe(real *restrict worst, const real *restrict difference, const real *restrict number) {
    for (int l = 0; l < CELL_LANES; l++) {
        real size = fabs_real(difference[l]) + 0 * number[l];
        size = size <= REAL_MAX ? size : (real)INFINITY; /* also what is not a number */
        worst[l] = worst[l] > size ? worst[l] : size;
    }
}

static void observe_finite(real *worst, cell_lanes *state) {
    static const cell_lanes zeros;
    for (int k = 0; k < S; k++) observe(worst, zeros, state[k]);
}

static real worst_of(const real *worst, int64_t count) {
    real most = 0;
    for (int64_t l = 0; l < count; l++) most = worst[l] > most ? worst[l] : most;
    return most;
}

/* A corrected state. */
static inline real clamped(real v, bool bounded) {
    const real bound = CELL_BOUND;
    if (!bounded || bound == 0) return v;
    return v > bound ? bound : v < -bound ? -bound : v;
}

/* --- sequential --------------------------------------------------------------------------------------------------- */

/* Walk tokens from..to-1 from `state`, which is left behind the last; the states are written. */
static void walk(const struct channels *c, int64_t from, int64_t to, cell_lanes *state, real *worst) {
    struct token token;
    for (int64_t t = from; t < to; t++) {
        cell_lanes after[S];
        token_prefetch(c->block, t + AHEAD, tensor_none());
        token_open(&token, c, t);
        if (token.begins) memset(state, 0, S * sizeof *state);
        lanes_step(after, state, token.u, c->w);
        memcpy(state, after, sizeof after);
        store(c->block, t, state);
        observe_finite(worst, state);
    }
}

/* --- Newton ------------------------------------------------------------------------------------------------------- */

/* What a state is taken for at first: f(0, u), or f(initial, u) of the first token of a row that goes on. */
static void guess(const struct channels *c, int64_t t, cell_lanes *state) {
    struct token token;
    cell_lanes before[S];
    token_open(&token, c, t);
    memset(before, 0, sizeof before);
    if (t == 0 && !token.begins) initial_state(c->block, before);
    lanes_step(state, before, token.u, c->w);
}

/* One correction: d = f + J d_before - state, and that is added. `after`, J: f and the Jacobian. */
static void correct(real (*restrict state)[CELL_LANES], real (*restrict d)[CELL_LANES],
                    const real (*restrict d_before)[CELL_LANES], const real (*restrict after)[CELL_LANES],
                    const real (*restrict J)[CELL_LANES], bool bounded) {
    for (int i = 0; i < S; i++)
        for (int l = 0; l < CELL_LANES; l++) {
            real corrected = after[i][l];
            UNROLL
            for (int j = 0; j < S; j++) corrected += J[i * S + j][l] * d_before[j][l];
            d[i][l] = corrected - state[i][l];
            state[i][l] = clamped(corrected, bounded);
        }
}

/* One correction of all states; x: T times S. */
static void iterate(const struct channels *c, cell_lanes *x, bool bounded, real *worst) {
    struct token token;
    cell_lanes before[S], d[S];
    memset(d, 0, sizeof d);
    initial_state(c->block, before);
    memset(worst, 0, sizeof(cell_lanes));
    for (int64_t t = 0; t < c->block->p->T; t++, x += S) {
        cell_lanes after[S], J[S * S], old[S], d_before[S];
        token_open(&token, c, t);
        if (token.begins) memset(before, 0, sizeof before), memset(d, 0, sizeof d);
        memcpy(old, x, sizeof old);
        memcpy(d_before, d, sizeof d);
        lanes_jacobian(after, J, before, old, token.u, c->w);
        correct(x, d, d_before, after, J, bounded);
        for (int k = 0; k < S; k++) {
            cell_lanes residual;
            for (int l = 0; l < CELL_LANES; l++) residual[l] = after[k][l] - old[k][l];
            observe(worst, residual, d[k]); /* what the bound cuts off counts, too */
        }
        memcpy(before, old, sizeof before);
    }
}

static void newton(const struct channels *c, struct cell_solver solver, cell_lanes *x, real *worst) {
    int64_t T = c->block->p->T;
    for (int64_t t = 0; t < T; t++) guess(c, t, x + t * S);
    for (int i = 0; i < solver.iterations; i++) iterate(c, x, solver.bounded, worst);
    for (int64_t t = 0; t < T; t++) store(c->block, t, x + t * S);
}

/* --- multiple shooting -------------------------------------------------------------------------------------------- */

struct chunks {
    int64_t length, count;
    bool bounded;
    cell_lanes *start; /* count times S: the states before the chunks' first tokens */
};

/* Chunk j's start is unknown: it is neither the row's nor a document's. */
static bool unknown(const struct channels *c, const struct chunks *k, int64_t j) {
    return j > 0 && j < k->count && !cell_begins(c->block, j * k->length);
}

static int64_t chunk_end(const struct channels *c, const struct chunks *k, int64_t j) {
    int64_t T = c->block->p->T, end = (j + 1) * k->length;
    return end < T ? end : T;
}

/* P = J P. */
static void multiply(real (*restrict P)[CELL_LANES], const real (*restrict J)[CELL_LANES]) {
    for (int j = 0; j < S; j++)
        for (int l = 0; l < CELL_LANES; l++) {
            real column[S];
            UNROLL
            for (int i = 0; i < S; i++) column[i] = P[i * S + j][l];
            UNROLL
            for (int i = 0; i < S; i++) {
                real sum = 0;
                UNROLL
                for (int m = 0; m < S; m++) sum += J[i * S + m][l] * column[m];
                P[i * S + j][l] = sum;
            }
        }
}

/* Walk chunk j: `state` goes from its start to its end, and P says how the end answers to the start. Returns false
 * where it does not, because a document starts within. */
static bool shoot(const struct channels *c, const struct chunks *k, int64_t j, cell_lanes *state, cell_lanes *P) {
    struct token token;
    bool answers = true;
    for (int i = 0; i < S * S; i++)
        for (int l = 0; l < CELL_LANES; l++) P[i][l] = i % (S + 1) == 0;
    for (int64_t t = j * k->length; t < chunk_end(c, k, j); t++) {
        cell_lanes after[S], J[S * S];
        token_open(&token, c, t);
        if (token.begins) memset(state, 0, S * sizeof *state), answers = false;
        lanes_exact_jacobian(after, J, state, token.u, c->w);
        multiply(P, J);
        memcpy(state, after, sizeof after);
    }
    return answers;
}

/* One correction of all starts, first to last: the end of the chunk before, walked from its old start, and P d, where d
 * is that start's own correction. */
static void shoot_all(const struct channels *c, const struct chunks *k) {
    cell_lanes state[S], d[S], next[S];
    memset(d, 0, sizeof d);
    memcpy(state, k->start, sizeof state);
    for (int64_t j = 0; j + 1 < k->count; j++) {
        cell_lanes P[S * S], *start = k->start + (j + 1) * S, old[S];
        memcpy(old, start, sizeof old);
        if (!shoot(c, k, j, state, P)) memset(d, 0, sizeof d);
        memset(next, 0, sizeof next);
        if (unknown(c, k, j + 1)) correct(start, next, d, state, P, k->bounded);
        memcpy(d, next, sizeof d);
        memcpy(state, old, sizeof state);
    }
}

static void shooting(const struct channels *c, struct cell_solver solver, cell_lanes *start, cell_lanes *state,
                     real *worst) {
    int64_t T = c->block->p->T, length = solver.chunk > 0 ? solver.chunk : CELL_CHUNK;
    struct chunks k = {length, (T + length - 1) / length, solver.bounded, start};
    initial_state(c->block, start);
    for (int64_t j = 1; j < k.count; j++) {
        if (unknown(c, &k, j)) guess(c, j * length - 1, start + j * S);
        else memset(start + j * S, 0, S * sizeof *start);
    }
    for (int i = 0; i < solver.iterations; i++) shoot_all(c, &k);
    for (int64_t j = 0; j < k.count; j++) {
        memcpy(state, start + j * S, S * sizeof *state);
        walk(c, j * length, chunk_end(c, &k, j), state, worst);
        for (int i = 0; i < S && unknown(c, &k, j + 1); i++) {
            cell_lanes mismatch;
            for (int l = 0; l < CELL_LANES; l++) mismatch[l] = state[i][l] - start[(j + 1) * S + i][l];
            observe(worst, mismatch, state[i]);
        }
    }
}

/* --- all of them -------------------------------------------------------------------------------------------------- */

void OWN(forward)(const struct cell_block *block, struct cell_solver solver, cell_lanes *unknowns,
                  struct cell_found *found) {
    struct channels c;
    cell_lanes state[S], worst = {0};
    channels_open(&c, block);
    initial_state(block, state);
    if (solver.method == CELL_NEWTON) {
        newton(&c, solver, unknowns, worst);
        memcpy(state, unknowns + (block->p->T - 1) * S, sizeof state);
    } else if (solver.method == CELL_SHOOTING) {
        shooting(&c, solver, unknowns, state, worst);
    } else {
        walk(&c, 0, block->p->T, state, worst);
    }
    final_state(block, found->final, state);
    found->residual = worst_of(worst, block->count);
}
