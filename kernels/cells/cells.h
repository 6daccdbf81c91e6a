/* cells.h: the nonlinear cells of kernels/ops.h's cell_forward: what each is, in numbers, and their list.
 *
 * A cell is one header of this directory and its name in CELLS (docs/adding-a-cell.md). From these come every solver,
 * the gradient, the step of decoding, on every device, and a self-test: the Makefile compiles each source that is named
 * each_cell* once for every header, with CELL (its name), CELL_TEXT (the same as a string) and CELL_HEADER.
 *
 * A cell's header defines
 *   CELL_HELP           one sentence for people
 *   CELL_STATES         S: numbers a channel carries from token to token
 *   CELL_INPUTS         U: pre-activations a channel gets with every token
 *   CELL_WEIGHTS        W: recurrent weights of a channel
 *   CELL_OUTPUT         which of the states is the output
 *   CELL_BOUND          no state of a recurrence that starts within +-CELL_BOUND leaves it; 0 = unbounded
 *   CELL_LIMIT          with weights within +-CELL_LIMIT three Newton iterations are enough
 *   CELL_LINEAR         optional: 1 where the step is linear in the state, so that one Newton iteration is exact
 *   CELL_HAS_JACOBIAN   optional: 1 where there is a step_jacobian; else it is made of dual numbers
 *   CELL_HAS_GRADIENT   optional: 1 where there is a step_gradient; else likewise
 * and functions headed CELL_FN of numbers REAL, of which only the first is mandatory:
 *   step(before, u, w, after)
 *       The recurrence for one token of one channel: states before (S), pre-activations u (U), their bias included,
 *       weights w (W), states after (S).
 *   step_jacobian(before, u, w, now, after, J)
 *       The same, and J[i S + j] = d after[i] / d before[j] (S,S). `now` (S) are the states behind this token as the
 *       solver has them so far: where J needs a state behind the token it may take that one, which saves nothing but is
 *       how the published ParaLSTM does it. `now` may be the memory of `after`: write `after` first, read `now` then.
 *   step_gradient(before, u, w, now, lambda, dbefore, du, dw)
 *       Given the gradient lambda (S) of the states behind the token, those of what went in, all three written, not
 *       added to: dbefore (S) = J^T lambda, du (U), dw (W). `now`: the stored states behind the token.
 * Their text is compiled as C, with REAL a real type and then a complex one, whose imaginary part carries derivatives,
 * and as CUDA C++ templates. So it may use + - * / of REALs, whole numbers as constants, or (REAL) of others,
 * cell_sigmoid and cell_tanh; not compare numbers, nor keep anything between calls. A header is included several times:
 * no include guard.
 */
#ifndef RIVERRUN_CELLS_H
#define RIVERRUN_CELLS_H

#include <stdbool.h>
#include <stdint.h>

#define CELLS(CELL) CELL(gru) CELL(lstm) CELL(mgru)

#define CELL_STATES_MAX 4
#define CELL_INPUTS_MAX 8
#define CELL_WEIGHTS_MAX 8

#define CELL_ID(name) CELL_ID_##name,
enum { CELLS(CELL_ID) CELL_COUNT };

/* The functions of a cell for one channel in double, on the host: for tests and tables of measurements. */
struct cell_functions {
    void (*step)(const double *before, const double *u, const double *w, double *after);
    void (*jacobian)(const double *before, const double *u, const double *w, const double *now, double *after,
                     double *J);
    void (*gradient)(const double *before, const double *u, const double *w, const double *now, const double *lambda,
                     double *dbefore, double *du, double *dw);
};

struct cell {
    const char *name, *help;     /* as written in a config; one sentence */
    int id;                      /* place in CELLS */
    int states, inputs, weights; /* numbers a channel: S, U, W */
    int output;                  /* which state is the output */
    bool linear;
    double bound, limit; /* CELL_BOUND, CELL_LIMIT */
    struct cell_functions own, automatic; /* as the solvers use them; by dual numbers throughout */
};

/* The list, CELL_COUNT long, in the order of CELLS; by name, NULL if unknown. */
extern const struct cell *const cells[];
const struct cell *cell_find(const char *name);

#endif
