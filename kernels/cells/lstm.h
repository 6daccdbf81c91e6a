/* lstm.h: ParaLSTM (arXiv 2510.21450, equation 3.1b): an LSTM whose input gate is 1 - f, with diagonal recurrent
 * matrices and peepholes; the output gate's peephole sees the new c.
 *
 *   f = sigmoid(u0 + w0 h + w3 c)   q = tanh(u2 + w2 h)   c' = f c + (1 - f) q
 *   o = sigmoid(u1 + w1 h + w4 c')  h' = o tanh(c')
 *
 * c' lies between c and q, so both states stay within +-1.
 *
 * The Jacobian and the gradient take o and tanh(c') at the c' that the solver has, as the published implementation
 * does: away from the solution the Jacobian is then off by something proportional to the residual, so that Newton's
 * method stays quadratic, and at the solution it is exact.
 */
#define CELL_HELP                                                                                                      \
    "ParaLSTM: forget gate f, output gate o, candidate q; weights in this order, then peepholes of f and o"
#define CELL_STATES 2
#define CELL_INPUTS 3
#define CELL_WEIGHTS 5
#define CELL_OUTPUT 1
#define CELL_BOUND 1
#define CELL_LIMIT 0.5
#define CELL_HAS_JACOBIAN 1
#define CELL_HAS_GRADIENT 1

CELL_FN void step(const REAL *before, const REAL *u, const REAL *w, REAL *after) {
    REAL c = before[0], h = before[1];
    REAL f = cell_sigmoid(u[0] + w[0] * h + w[3] * c), q = cell_tanh(u[2] + w[2] * h);
    after[0] = f * c + (1 - f) * q;
    after[1] = cell_sigmoid(u[1] + w[1] * h + w[4] * after[0]) * cell_tanh(after[0]);
}

CELL_FN void step_jacobian(const REAL *before, const REAL *u, const REAL *w, const REAL *now, REAL *after, REAL *J) {
    REAL c = before[0], h = before[1];
    REAL f = cell_sigmoid(u[0] + w[0] * h + w[3] * c), q = cell_tanh(u[2] + w[2] * h);
    REAL fresh = f * c + (1 - f) * q;
    after[0] = fresh;
    after[1] = cell_sigmoid(u[1] + w[1] * h + w[4] * fresh) * cell_tanh(fresh);
    REAL o = cell_sigmoid(u[1] + w[1] * h + w[4] * now[0]), t = cell_tanh(now[0]);
    REAL to_f = (c - q) * f * (1 - f), to_o = t * o * (1 - o); /* d c' / d pre-activation of f; d h' / d that of o */
    REAL rise = o * (1 - t * t) + w[4] * to_o;                 /* d h' / d c' */
    J[0] = f + to_f * w[3];
    J[1] = to_f * w[0] + (1 - f) * (1 - q * q) * w[2];
    J[2] = rise * J[0];
    J[3] = rise * J[1] + to_o * w[1];
}

CELL_FN void step_gradient(const REAL *before, const REAL *u, const REAL *w, const REAL *now, const REAL *lambda,
                           REAL *dbefore, REAL *du, REAL *dw) {
    REAL c = before[0], h = before[1];
    REAL f = cell_sigmoid(u[0] + w[0] * h + w[3] * c), q = cell_tanh(u[2] + w[2] * h);
    REAL o = cell_sigmoid(u[1] + w[1] * h + w[4] * now[0]), t = cell_tanh(now[0]);
    du[1] = lambda[1] * t * o * (1 - o);
    REAL dc = lambda[0] + lambda[1] * o * (1 - t * t) + du[1] * w[4]; /* of c' */
    du[0] = dc * (c - q) * f * (1 - f);
    du[2] = dc * (1 - f) * (1 - q * q);
    dw[0] = du[0] * h;
    dw[1] = du[1] * h;
    dw[2] = du[2] * h;
    dw[3] = du[0] * c;
    dw[4] = du[1] * now[0];
    dbefore[0] = dc * f + du[0] * w[3];
    dbefore[1] = du[0] * w[0] + du[1] * w[1] + du[2] * w[2];
}
