/* gru.h: ParaGRU (arXiv 2510.21450, equation 3.1a): a GRU whose recurrent matrices are diagonal.
 *
 *   z = sigmoid(u0 + w0 h)   r = sigmoid(u1 + w1 h)   c = tanh(u2 + w2 h r)
 *   h' = z c + (1 - z) h
 *
 * z = 1 overwrites, r = 0 forgets for the candidate. h' lies between h and c, so it stays within +-1.
 */
#define CELL_HELP "ParaGRU: update gate z, reset gate r, candidate c; weights and inputs in this order"
#define CELL_STATES 1
#define CELL_INPUTS 3
#define CELL_WEIGHTS 3
#define CELL_OUTPUT 0
#define CELL_BOUND 1
#define CELL_LIMIT 0.5
#define CELL_HAS_JACOBIAN 1
#define CELL_HAS_GRADIENT 1

CELL_FN void step(const REAL *before, const REAL *u, const REAL *w, REAL *after) {
    REAL h = before[0];
    REAL z = cell_sigmoid(u[0] + w[0] * h), r = cell_sigmoid(u[1] + w[1] * h), c = cell_tanh(u[2] + w[2] * h * r);
    after[0] = z * c + (1 - z) * h;
}

CELL_FN void step_jacobian(const REAL *before, const REAL *u, const REAL *w, const REAL *now, REAL *after, REAL *J) {
    REAL h = before[0];
    REAL z = cell_sigmoid(u[0] + w[0] * h), r = cell_sigmoid(u[1] + w[1] * h), c = cell_tanh(u[2] + w[2] * h * r);
    (void)now;
    after[0] = z * c + (1 - z) * h;
    J[0] = (1 - z) + (c - h) * z * (1 - z) * w[0] + z * (1 - c * c) * w[2] * r * (1 + h * (1 - r) * w[1]);
}

CELL_FN void step_gradient(const REAL *before, const REAL *u, const REAL *w, const REAL *now, const REAL *lambda,
                           REAL *dbefore, REAL *du, REAL *dw) {
    REAL h = before[0];
    REAL z = cell_sigmoid(u[0] + w[0] * h), r = cell_sigmoid(u[1] + w[1] * h), c = cell_tanh(u[2] + w[2] * h * r);
    (void)now;
    du[0] = lambda[0] * (c - h) * z * (1 - z);
    du[2] = lambda[0] * z * (1 - c * c);
    du[1] = du[2] * w[2] * h * r * (1 - r);
    dw[0] = du[0] * h;
    dw[1] = du[1] * h;
    dw[2] = du[2] * h * r;
    dbefore[0] = lambda[0] * (1 - z) + du[0] * w[0] + du[1] * w[1] + du[2] * w[2] * r;
}
