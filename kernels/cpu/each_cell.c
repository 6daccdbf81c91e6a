/* each_cell.c: the entry of one cell in the list of kernels/cells/cells.c. Compiled once for every cell; what it holds
 * is in double, so that the compilation for float leaves nothing. */
#include "kernels/cpu/each_cell.h"

#ifdef REAL_IS_DOUBLE

#ifndef CELL_LINEAR
#define CELL_LINEAR 0
#endif

#define PASTE(a, b) a##b
#define NAMED(a, b) PASTE(a, b)
extern const struct cell NAMED(cell_, CELL);
const struct cell NAMED(cell_, CELL) = {
    .name = CELL_TEXT,
    .help = CELL_HELP,
    .id = NAMED(CELL_ID_, CELL),
    .states = S, .inputs = U, .weights = W,
    .output = CELL_OUTPUT,
    .linear = CELL_LINEAR,
    .bound = CELL_BOUND, .limit = CELL_LIMIT,
    .own = {step, own_jacobian, own_gradient},
    .automatic = {step, automatic_jacobian, automatic_gradient},
};

#endif
