/* cell.c: nonlinear diagonal recurrences on the CPU (kernels/ops.h; ParaRNN, arXiv 2510.21450): checks, blocks,
 * scratch. What is computed is in each_cell_forward.c and each_cell_backward.c, which are compiled for every cell.
 *
 * Work is divided into blocks of CELL_LANES channels of one batch row, each of which walks its tokens by itself.
 * Memory: forward reads U and writes S reals for a token's channel, backward moves 2U + S + 1; nothing is saved but the
 * states.
 */
#include "kernels/cpu/cell.h"

#include "kernels/cells/residual.h"

/* --- the cells' code ---------------------------------------------------------------------------------------------- */

static const struct code {
    void (*forward)(const struct cell_block *, struct cell_solver, cell_lanes *, struct cell_found *);
    void (*backward)(const struct cell_block *, const struct cell_gradients *);
} codes[] = {
#define CODE(name) [CELL_ID_##name] = {OP(name##_forward), OP(name##_backward)},
    CELLS(CODE)
};

/* --- the problem and its blocks ----------------------------------------------------------------------------------- */

static struct cell_problem problem_of(tensor u, tensor bias, tensor weight, tensor initial, tensor doc, tensor y,
                                      tensor others, const struct cell *cell) {
    ASSERT(u.ndim == 5);
    struct cell_problem p = {.B = u.dim[0], .T = u.dim[1], .H = u.dim[2], .P = u.dim[4], .u = u, .bias = bias,
                             .weight = weight, .initial = initial, .doc = doc, .y = y, .others = others, .cell = cell};
    p.N = p.H * p.P;
    ASSERT(p.B >= 1 && p.T >= 1 && p.N >= 1);
    CHECK_ROWS(u, p.B, p.T, p.H, cell->inputs, p.P);
    CHECK_OPTIONAL(bias, cell->inputs, p.N);
    CHECK_DENSE(weight, cell->weights, p.N);
    CHECK_OPTIONAL(initial, p.B, cell->states, p.N);
    if (tensor_given(doc)) CHECK_INDEX(doc, p.B, p.T);
    CHECK_DENSE(y, p.B, p.T, p.N);
    ASSERT(!tensor_given(others) || cell->states > 1);
    CHECK_OPTIONAL(others, p.B, p.T, cell->states - 1, p.N);
    return p;
}

/* Blocks of a head; of everything. */
static int64_t blocks_of_head(const struct cell_problem *p) {
    return (p->P + CELL_LANES - 1) / CELL_LANES;
}

static int64_t block_count(const struct cell_problem *p) {
    return p->B * p->H * blocks_of_head(p);
}

static struct cell_block block_at(const struct cell_problem *p, int64_t i) {
    int64_t M = blocks_of_head(p), first = i % M * CELL_LANES, left = p->P - first;
    return (struct cell_block){.p = p, .row = i / (M * p->H), .head = i / M % p->H, .first = first,
                               .count = left < CELL_LANES ? left : CELL_LANES};
}

/* Multiply-adds of an evaluation, about: two nonlinear functions and some products. */
enum { STEP_WORK = 50 };

/* --- scratch ------------------------------------------------------------------------------------------------------ */

/* Every thread's unknown states. How many blocks the channels make depends on heads, which are not known here. */
static int64_t slots(struct cell_shape s) {
    return s.B * s.N < WORKERS_MAX ? s.B * s.N : WORKERS_MAX;
}

size_t OP(cell_forward_scratch)(struct cell_shape shape, struct cell_solver solver) {
    return (size_t)(slots(shape) * cell_unknowns(shape.cell, shape.T, solver)) * sizeof(cell_lanes);
}

struct partials {
    real *dweight, *dbias; /* of every batch row */
    size_t size;
};

static struct partials lay_out(struct cell_shape s, void *scratch) {
    struct carver c = {.base = scratch};
    struct partials l = {.dweight = carve_reals(&c, s.B * s.cell->weights * s.N)};
    l.dbias = carve_reals(&c, s.B * s.cell->inputs * s.N);
    l.size = c.used;
    return l;
}

size_t OP(cell_backward_scratch)(struct cell_shape shape) {
    return lay_out(shape, NULL).size;
}

/* --- the operations ----------------------------------------------------------------------------------------------- */

/* Vectors of channels fill the processor whatever the shape is, so that nothing needs another method. */
struct cell_solver OP(cell_choose)(struct cell_shape shape) {
    (void)shape;
    return (struct cell_solver){.method = CELL_SEQUENTIAL, .iterations = 1};
}

static void report_add(struct cell_report *report, struct cell_solver solver, real residual) {
    float found = (float)residual;
    if (solver.method == CELL_NEWTON) found = cell_newton_residual(found);
    if (found > report->residual) report->residual = found;
}

void OP(cell_forward)(struct device *dev, tensor y, tensor others, tensor final, struct cell_report *report, tensor u,
                      tensor bias, tensor weight, tensor initial, tensor doc, const struct cell *cell,
                      struct cell_solver solver, void *scratch) {
    (void)dev;
    struct cell_problem p = problem_of(u, bias, weight, initial, doc, y, others, cell);
    CHECK_OPTIONAL(final, p.B, cell->states, p.N);
    ASSERT(solver.method == CELL_SEQUENTIAL || solver.iterations >= 1);
    if (cell->linear) solver.iterations = 1;
    int64_t blocks = block_count(&p), unknowns = cell_unknowns(cell, p.T, solver);
    real residual = 0;
    int workers = worker_count(blocks, p.B * p.T * p.N * STEP_WORK);
#pragma omp parallel for schedule(static) num_threads(workers) reduction(max : residual)
    for (int64_t i = 0; i < blocks; i++) {
        struct cell_block block = block_at(&p, i);
        struct cell_found found = {.final = final};
        codes[cell->id].forward(&block, solver, (cell_lanes *)scratch + worker_index() * unknowns, &found);
        if (found.residual > residual) residual = found.residual;
    }
    if (report) report_add(report, solver, residual);
}

void OP(cell_step)(struct device *dev, tensor y, tensor state, tensor u, tensor bias, tensor weight,
                   const struct cell *cell) {
    int64_t B = u.dim[0];
    tensor tokens = u;
    ASSERT(u.ndim == 4);
    tokens.ndim = 5;
    for (int i = 4; i > 1; i--) tokens.dim[i] = u.dim[i - 1], tokens.stride[i] = u.stride[i - 1];
    tokens.dim[1] = 1;
    OP(cell_forward)(dev, tensor_split_first(y, B, 1), tensor_none(), state, NULL, tokens, bias, weight, state,
                     tensor_none(), cell, (struct cell_solver){.method = CELL_SEQUENTIAL}, NULL);
}

void OP(cell_backward)(struct device *dev, tensor du, tensor dbias, tensor dweight, tensor dinitial, tensor dy,
                       tensor dfinal, tensor y, tensor others, tensor u, tensor bias, tensor weight, tensor initial,
                       tensor doc, const struct cell *cell, void *scratch) {
    (void)dev;
    struct cell_problem p = problem_of(u, bias, weight, initial, doc, y, others, cell);
    ASSERT(cell->states == 1 || tensor_given(others));
    CHECK_ROWS(du, p.B, p.T, p.H, cell->inputs, p.P);
    CHECK_OPTIONAL(dbias, cell->inputs, p.N);
    CHECK_DENSE(dweight, cell->weights, p.N);
    CHECK_OPTIONAL(dinitial, p.B, cell->states, p.N);
    CHECK_DENSE(dy, p.B, p.T, p.N);
    CHECK_OPTIONAL(dfinal, p.B, cell->states, p.N);
    struct partials sums = lay_out((struct cell_shape){p.B, p.T, p.N, cell}, scratch);
    struct cell_gradients g = {du, dinitial, dy, dfinal, sums.dbias, sums.dweight};
    int64_t blocks = block_count(&p);
    int workers = worker_count(blocks, p.B * p.T * p.N * STEP_WORK);
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int64_t i = 0; i < blocks; i++) {
        struct cell_block block = block_at(&p, i);
        codes[cell->id].backward(&block, &g);
    }
    add_partials(dweight.data, sums.dweight, p.B, cell->weights * p.N);
    if (tensor_given(dbias)) add_partials(dbias.data, sums.dbias, p.B, cell->inputs * p.N);
}
