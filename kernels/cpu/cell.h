/* cell.h: what cell.c and the code that is compiled for every cell (each_cell_*.c) share: a problem, and its blocks.
 *
 * Channels are independent of each other, so they stand side by side in vectors: a block is CELL_LANES channels of one
 * head of one batch row, or fewer at the head's end, where the rest of the lanes compute from zeros what nobody reads.
 */
#ifndef RIVERRUN_CPU_CELL_H
#define RIVERRUN_CPU_CELL_H

#include "kernels/cells/cells.h"
#include "kernels/cpu/cpu.h"

enum {
    CELL_LANES = 32,
    CELL_CHUNK = 16, /* tokens of a chunk of multiple shooting, where the caller leaves it open */
};
typedef real cell_lanes[CELL_LANES];

/* Arguments of cell_forward and cell_backward. H heads of P channels. */
struct cell_problem {
    int64_t B, T, H, P, N;
    tensor u, bias, weight, initial, doc;
    tensor y, others;
    const struct cell *cell;
};

struct cell_block {
    const struct cell_problem *p;
    int64_t row, head, first, count; /* channels first .. first + count - 1 of the head */
};

/* The first `count` lanes; others are 0. */
static inline void cell_read(real *lanes, const real *from, int64_t count) {
    if (count == CELL_LANES) {
        memcpy(lanes, from, sizeof(cell_lanes));
        return;
    }
    memset(lanes, 0, sizeof(cell_lanes));
    memcpy(lanes, from, (size_t)count * sizeof *lanes);
}

/* Place of a block's first channel in row `part` of a (.., parts, N) view with contiguous rows. */
static inline int64_t cell_channel(const struct cell_block *block) {
    return block->head * block->p->P + block->first;
}

/* Row `row` of N numbers of a contiguous tensor, where the block stands in it. */
static inline real *cell_row(const struct cell_block *block, tensor t, int64_t row) {
    return (real *)t.data + row * block->p->N + cell_channel(block);
}

/* Where the block's pre-activation k of a token stands in a view (B,T,H,U,P). */
static inline real *cell_input(const struct cell_block *block, tensor u, int64_t t, int64_t k) {
    return (real *)u.data + block->row * u.stride[0] + t * u.stride[1] + block->head * u.stride[2] + k * u.stride[3] +
           block->first;
}

/* The token is the first of its document, so that the state before it is another's. */
static inline bool cell_begins(const struct cell_block *block, int64_t t) {
    if (!tensor_given(block->p->doc)) return false;
    const int32_t *doc = (const int32_t *)block->p->doc.data + block->row * block->p->T;
    return doc[t] != (t > 0 ? doc[t - 1] : 0);
}

/* Where what a block finds goes. */
struct cell_found {
    tensor final;
    real residual; /* of Newton's last correction, of shooting's solution, 0 of what is exact; infinite if anything is
                    * not finite */
};

/* What a block adds to the gradients of one batch row. */
struct cell_gradients {
    tensor du, dinitial, dy, dfinal;
    real *dbias, *dweight; /* (B,U,N), (B,W,N) = */
};

/* Reals of scratch that a solver needs for a block. */
static inline int64_t cell_unknowns(const struct cell *cell, int64_t T, struct cell_solver solver) {
    int64_t chunk = solver.chunk > 0 ? solver.chunk : CELL_CHUNK;
    int64_t states = solver.method == CELL_NEWTON ? T : solver.method == CELL_SHOOTING ? (T + chunk - 1) / chunk : 0;
    return states * cell->states;
}

/* The code of every cell: NAME_forward, NAME_backward. unknowns: cell_unknowns() of lanes. */
#define CELL_CODE(name)                                                                                             \
    void OP(name##_forward)(const struct cell_block *block, struct cell_solver solver, cell_lanes *unknowns,           \
                            struct cell_found *found);                                                              \
    void OP(name##_backward)(const struct cell_block *block, const struct cell_gradients *gradients);
CELLS(CELL_CODE)

#endif
