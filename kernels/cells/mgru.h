/* mgru.h: a minimal gated recurrent unit: one gate, one candidate. docs/adding-a-cell.md makes it from nothing.
 *
 *   f = sigmoid(u0 + w0 h)   c = tanh(u1 + w1 h)   h' = (1 - f) h + f c
 *
 * h' lies between h and c, so it stays within +-1. There is no more to it: the Jacobian and the gradient come from the
 * step.
 */
#define CELL_HELP "Minimal gated recurrent unit: gate f, candidate c; weights and inputs in this order"
#define CELL_STATES 1
#define CELL_INPUTS 2
#define CELL_WEIGHTS 2
#define CELL_OUTPUT 0
#define CELL_BOUND 1
#define CELL_LIMIT 0.5

CELL_FN void step(const REAL *before, const REAL *u, const REAL *w, REAL *after) {
    REAL f = cell_sigmoid(u[0] + w[0] * before[0]), c = cell_tanh(u[1] + w[1] * before[0]);
    after[0] = (1 - f) * before[0] + f * c;
}
