/* each_cell_backward.c: the gradient of a nonlinear recurrence s[t] = f(s[t-1], u[t]) for one cell and one block of
 * channels.
 *
 * With lambda[t] the gradient of s[t] and J[t] the Jacobian of f at s[t-1]:
 *   lambda[t] = dy[t] + J[t+1]^T lambda[t+1]     du[t] = (df/du)^T lambda[t]     dw = sum over t of (df/dw)^T lambda[t]
 * in one walk from the last token to the first. Nothing of it was saved but the states: the gates are computed again.
 * Where a document starts, s[t-1] is 0 and nothing goes back.
 *
 * dw and dbias are sums over all tokens: first over SUM_TOKENS of them, then over those sums, so that no sum has
 * more than T / SUM_TOKENS terms that are much smaller than itself; then over batch rows in order, by the caller. So
 * the bits don't depend on the number of threads.
 */
#include "kernels/cpu/each_cell_block.h"

enum { SUM_TOKENS = 64, SUMS = W + U };

NOT_INLINED static void lanes_gradient(real (*restrict dbefore)[CELL_LANES], real (*restrict du)[CELL_LANES],
                                       real (*restrict dw)[CELL_LANES], const real (*restrict before)[CELL_LANES],
                                       const real (*restrict now)[CELL_LANES], const real (*restrict u)[CELL_LANES],
                                       const real (*restrict w)[CELL_LANES],
                                       const real (*restrict lambda)[CELL_LANES]) {
    for (int l = 0; l < CELL_LANES; l++) {
        real b[S], n[S], inputs[U], weights[W], in[S], db[S], dinputs[U], dweights[W];
        UNROLL
        for (int k = 0; k < S; k++) b[k] = before[k][l], n[k] = now[k][l], in[k] = lambda[k][l];
        UNROLL
        for (int k = 0; k < U; k++) inputs[k] = u[k][l];
        UNROLL
        for (int k = 0; k < W; k++) weights[k] = w[k][l];
        own_gradient(b, inputs, weights, n, in, db, dinputs, dweights);
        UNROLL
        for (int k = 0; k < S; k++) dbefore[k][l] = db[k];
        UNROLL
        for (int k = 0; k < U; k++) du[k][l] = dinputs[k];
        UNROLL
        for (int k = 0; k < W; k++) dw[k][l] = dweights[k];
    }
}

/* sum += part. */
static void add_lanes(cell_lanes *restrict sum, const real (*restrict part)[CELL_LANES], int count) {
    for (int k = 0; k < count; k++)
        for (int l = 0; l < CELL_LANES; l++) sum[k][l] += part[k][l];
}

/* Sums over tokens: of dw, then of du. */
struct sums {
    cell_lanes of_few[SUMS], of_all[SUMS];
};

static void sums_flush(struct sums *s) {
    add_lanes(s->of_all, s->of_few, SUMS);
    memset(s->of_few, 0, sizeof s->of_few);
}

static void sums_store(const struct cell_block *block, const struct sums *s, const struct cell_gradients *g) {
    const struct cell_problem *p = block->p;
    size_t size = (size_t)block->count * sizeof(real);
    for (int k = 0; k < W; k++)
        memcpy(g->dweight + (block->row * W + k) * p->N + cell_channel(block), s->of_all[k], size);
    for (int k = 0; k < U; k++)
        memcpy(g->dbias + (block->row * U + k) * p->N + cell_channel(block), s->of_all[W + k], size);
}

/* One token. lambda: what comes from the tokens after it; then what goes to those before. */
static void token_backward(const struct channels *c, const struct cell_gradients *g, int64_t t, cell_lanes *lambda,
                           struct sums *s) {
    const struct cell_block *block = c->block;
    const real *dy = (const real *)g->dy.data + (block->row * block->p->T + t) * block->p->N + cell_channel(block);
    struct token token;
    cell_lanes before[S], now[S], dbefore[S], du[U], dw[W];
    token_open(&token, c, t);
    state_before(block, t, token.begins, before);
    stored_state(block, t, now);
    for (int64_t l = 0; l < block->count; l++) lambda[CELL_OUTPUT][l] += dy[l];
    lanes_gradient(dbefore, du, dw, before, now, token.u, c->w, lambda);
    for (int k = 0; k < U; k++)
        memcpy(cell_input(block, g->du, t, k), du[k], (size_t)block->count * sizeof(real));
    add_lanes(s->of_few, dw, W);
    add_lanes(s->of_few + W, du, U);
    if (token.begins) memset(lambda, 0, S * sizeof *lambda);
    else memcpy(lambda, dbefore, sizeof dbefore);
}

void OWN(backward)(const struct cell_block *block, const struct cell_gradients *g) {
    struct channels c;
    struct sums s;
    cell_lanes lambda[S];
    channels_open(&c, block);
    memset(&s, 0, sizeof s);
    memset(lambda, 0, sizeof lambda);
    for (int k = 0; k < S && tensor_given(g->dfinal); k++)
        cell_read(lambda[k], cell_row(block, g->dfinal, block->row * S + k), block->count);
    for (int64_t t = block->p->T - 1; t >= 0; t--) {
        token_prefetch(block, t - AHEAD, g->du);
        token_backward(&c, g, t, lambda, &s);
        if (t % SUM_TOKENS == 0) sums_flush(&s);
    }
    sums_store(block, &s, g);
    final_state(block, g->dinitial, lambda);
}
