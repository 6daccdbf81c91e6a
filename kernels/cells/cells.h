/* cells.h: the nonlinear cells of kernels/ops.h's cell_forward: what each is, in numbers, and their list.
 *
 * A cell is one header of this directory (docs/adding-a-cell.md) and one line in CELLS. From these come every solver,
 * the gradient, the step of decoding, on every device, and a self-test.
 */
#ifndef RIVERRUN_CELLS_H
#define RIVERRUN_CELLS_H

#include <stdint.h>

#define CELLS(CELL) CELL(gru) CELL(lstm)

#define CELL_STATES_MAX 4
#define CELL_INPUTS_MAX 8
#define CELL_WEIGHTS_MAX 8

struct cell {
    const char *name, *help; /* as written in a config; one sentence */
    int states, inputs, weights; /* numbers a channel: S, U, W */
    int output;                  /* which state is the output */
    double bound;                /* no state of an exact recurrence that starts within +-bound leaves it; 0 = unbounded */
    int64_t id;                  /* place in CELLS */
};

/* The list, `cell_count` long, in the order of CELLS; by name, NULL if unknown. */
extern const struct cell cells[];
extern const int cell_count;
const struct cell *cell_find(const char *name);

#endif
