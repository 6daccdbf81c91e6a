/* each_cell_block.h: the numbers of a block of channels of one cell: weights, tokens, states. */
#ifndef RIVERRUN_CPU_EACH_CELL_BLOCK_H
#define RIVERRUN_CPU_EACH_CELL_BLOCK_H

#include "kernels/cpu/each_cell.h"

/* Of functions that loop over lanes: gcc does not always make vectors of what it has inlined elsewhere. */
#define NOT_INLINED __attribute__((noinline))

/* What all tokens of a block share. */
struct channels {
    const struct cell_block *block;
    cell_lanes w[W], bias[U];
};

/* One token of a block. */
struct token {
    cell_lanes u[U];
    bool begins; /* a document */
};

static inline void channels_open(struct channels *c, const struct cell_block *block) {
    const struct cell_problem *p = block->p;
    memset(c, 0, sizeof *c);
    c->block = block;
    for (int k = 0; k < W; k++) cell_read(c->w[k], cell_row(block, p->weight, k), block->count);
    for (int k = 0; k < U && tensor_given(p->bias); k++)
        cell_read(c->bias[k], cell_row(block, p->bias, k), block->count);
}

static inline void token_open(struct token *token, const struct channels *c, int64_t t) {
    token->begins = cell_begins(c->block, t);
    for (int k = 0; k < U; k++) {
        cell_read(token->u[k], cell_input(c->block, c->block->p->u, t, k), c->block->count);
        for (int l = 0; l < CELL_LANES; l++) token->u[k][l] += c->bias[k][l];
    }
}

/* State k of token t in y or in others. */
static inline real *stored(const struct cell_block *block, int64_t t, int k) {
    const struct cell_problem *p = block->p;
    int64_t row = block->row * p->T + t;
    if (k == CELL_OUTPUT) return cell_row(block, p->y, row);
    return tensor_given(p->others) ? cell_row(block, p->others, row * (S - 1) + k - (k > CELL_OUTPUT)) : NULL;
}

/* Ask for a token's inputs and states, and for the row of `more` (none, or a view like u), if there is such a token:
 * rows lie too far apart for the processor to guess the next one. (Always inline: gcc drops calls of a function that
 * does nothing but this.) */
__attribute__((always_inline)) static inline void token_prefetch(const struct cell_block *block, int64_t t,
                                                                 tensor more) {
    enum { LINE = 64 / sizeof(real) };
    if (t < 0 || t >= block->p->T) return;
    for (int64_t l = 0; l < block->count; l += LINE) {
        for (int k = 0; k < U; k++) __builtin_prefetch(cell_input(block, block->p->u, t, k) + l, 0);
        for (int k = 0; k < U && tensor_given(more); k++) __builtin_prefetch(cell_input(block, more, t, k) + l, 1);
        for (int k = 0; k < S; k++)
            if (k == CELL_OUTPUT || tensor_given(block->p->others)) __builtin_prefetch(stored(block, t, k) + l, 1);
    }
}

/* Tokens ahead: as long as memory takes to answer. */
enum { AHEAD = 8 };

static inline void store(const struct cell_block *block, int64_t t, cell_lanes *state) {
    for (int k = 0; k < S; k++) {
        real *to = stored(block, t, k);
        if (to) memcpy(to, state[k], (size_t)block->count * sizeof *to);
    }
}

static inline void stored_state(const struct cell_block *block, int64_t t, cell_lanes *state) {
    for (int k = 0; k < S; k++) cell_read(state[k], stored(block, t, k), block->count);
}

static inline void initial_state(const struct cell_block *block, cell_lanes *state) {
    memset(state, 0, S * sizeof *state);
    if (!tensor_given(block->p->initial)) return;
    for (int k = 0; k < S; k++)
        cell_read(state[k], cell_row(block, block->p->initial, block->row * S + k), block->count);
}

/* The state before token t, as the row or the caller has it; 0 at a document's start. */
static inline void state_before(const struct cell_block *block, int64_t t, bool begins, cell_lanes *state) {
    if (begins) memset(state, 0, S * sizeof *state);
    else if (t == 0) initial_state(block, state);
    else stored_state(block, t - 1, state);
}

static inline void final_state(const struct cell_block *block, tensor final, cell_lanes *state) {
    if (!tensor_given(final)) return;
    for (int k = 0; k < S; k++)
        memcpy(cell_row(block, final, block->row * S + k), state[k], (size_t)block->count * sizeof(real));
}

#endif
