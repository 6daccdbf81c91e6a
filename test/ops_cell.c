/* test/ops_cell.c: rows of the nonlinear cells (kernels/cells/) and their step. test/ops.h says what a row is; the
 * identities that hold for every sequence operation are in test/ops_sequence.c.
 *
 * Parameters of its own: cell, its place in CELLS; method, of enum cell_method, with K iterations and chunks of Q
 * tokens (bounded = 1: iterates are clamped); limit, of the weights, in tenths; others = 0: the states that are not the
 * output are not asked for; report = 1: what the solver says of its solution is compared, which makes sense where it is
 * large. */
#include "test/ops_sequence.h"

#include "kernels/cells/cells.h"
#include <stdio.h>
#include <string.h>

static const struct cell *cell_of(const struct run *r) {
    return cells[param(r, "cell")];
}

static struct cell_solver solver_of(const struct run *r) {
    return (struct cell_solver){.method = (enum cell_method)param(r, "method"), .iterations = (int)param(r, "K"),
                                .chunk = param(r, "Q"), .bounded = param(r, "bounded") != 0};
}

static int64_t channels_of(const struct run *r) {
    return param(r, "H") * param(r, "P");
}

static void fill_weight(struct run *r, struct operand *o) {
    double limit = 0.1 * (double)param(r, "limit");
    for (int64_t i = 0; i < o->count; i++) o->values[i] = limit * (2 * draw_uniform(r, o, i) - 1);
}

static void fill_report(struct run *r, struct operand *o) {
    (void)r;
    o->values[0] = 0;
    o->values[1] = 7; /* not to be touched */
}

/* What the sequence and the step have in common; `lead` are the dimensions before H and N. */
static void cell_operands(struct run *r, const int64_t *lead, int leads, double terms) {
    const struct cell *cell = cell_of(r);
    int64_t N = channels_of(r), dim[5] = {lead[0], lead[leads - 1]};
    double tokens = (double)(lead[0] * (leads > 1 ? lead[1] : 1));
    dim[leads] = N;
    output(r, "y", leads + 1, dim)->terms = terms;
    dim[leads] = param(r, "H"), dim[leads + 1] = cell->inputs, dim[leads + 2] = param(r, "P");
    struct operand *o = input(r, "u", leads + 3, dim);
    o->lead = leads;
    o->gradient_terms = 4 * terms;
    o = parameter(r, "weight", DIMS(cell->weights, N));
    o->fill = fill_weight;
    o->gradient_terms = 4 * tokens * terms;
    if (!param(r, "bias")) absent(r, "bias");
    else parameter(r, "bias", DIMS(cell->inputs, N))->gradient_terms = 4 * tokens * terms;
}

static struct cell_shape shape_of(const struct run *r) {
    return (struct cell_shape){param(r, "B"), param(r, "T"), channels_of(r), cell_of(r)};
}

static void cell_declare(struct run *r) {
    struct cell_shape s = shape_of(r);
    double terms = (double)(16 + 4 * s.T);
    cell_operands(r, (int64_t[]){s.B, s.T}, 2, terms);
    if (s.cell->states > 1 && param(r, "others")) {
        struct operand *o = output(r, "others", DIMS(s.B, s.T, s.cell->states - 1, s.N));
        o->terms = terms;
        o->no_gradient = true;
    } else {
        absent(r, "others");
    }
    sequence_declare(r, DIMS(s.B, s.cell->states, s.N));
    struct operand *o = operand_find(r, "initial");
    if (o) o->spread = 0.5, o->gradient_terms = 4 * terms;
    if ((o = operand_find(r, "final"))) o->terms = terms;
    if (param(r, "report")) {
        o = state(r, "report", DIMS(2));
        o->fill = fill_report;
        o->terms = 1000 * terms;
    } else {
        absent(r, "report");
    }
    r->forward_scratch = r->ops->cell_forward_scratch(s, solver_of(r));
    r->backward_scratch = r->ops->cell_backward_scratch(s);
}

/* The report is two floats on every device; where real is double, as on the host only, it is put there by hand. */
static void cell_forward(struct run *r) {
    tensor report = value(r, "report");
    struct cell_report here = {0, 0}, *there = report.data;
    bool copied = tensor_given(report) && report.dtype == DTYPE_F64;
    r->ops->cell_forward(r->dev, value(r, "y"), value(r, "others"), value(r, "final"), copied ? &here : there,
                         value(r, "u"), value(r, "bias"), value(r, "weight"), value(r, "initial"), value(r, "doc"),
                         cell_of(r), solver_of(r), r->scratch);
    if (copied) *(double *)report.data = (double)here.residual;
}

static void cell_backward(struct run *r) {
    r->ops->cell_backward(r->dev, gradient(r, "u"), gradient(r, "bias"), gradient(r, "weight"), gradient(r, "initial"),
                          gradient(r, "y"), gradient(r, "final"), value(r, "y"), value(r, "others"), value(r, "u"),
                          value(r, "bias"), value(r, "weight"), value(r, "initial"), value(r, "doc"), cell_of(r),
                          r->scratch);
}

/* An evaluation counts as two products for a weight or input and twenty for a nonlinear function of each input. */
static void cell_flops(struct run *r, double *forward, double *backward) {
    struct cell_shape s = shape_of(r);
    struct cell_solver solver = solver_of(r);
    double step = (double)(2 * s.cell->weights + 22 * s.cell->inputs), tokens = (double)(s.B * s.T * s.N);
    *forward = tokens * step * (solver.method == CELL_SEQUENTIAL ? 1 : 1 + 2 * solver.iterations);
    *backward = 2 * tokens * step;
}

static void cell_step_declare(struct run *r) {
    const struct cell *cell = cell_of(r);
    int64_t B = param(r, "B");
    cell_operands(r, (int64_t[]){B}, 1, 16);
    operand_find(r, "y")->type = OPERAND_ACT;
    struct operand *o = state(r, "state", DIMS(B, cell->states, channels_of(r)));
    o->spread = 0.5;
    o->terms = 16;
}

static void cell_step_forward(struct run *r) {
    r->ops->cell_step(r->dev, value(r, "y"), value(r, "state"), value(r, "u"), value(r, "bias"), value(r, "weight"),
                      cell_of(r));
}

static const struct op_row cell_step = {
    .name = "cell_step",
    .parameters = "cell=0 B=2 H=2 P=5 bias=1 limit=5 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST, "cell=0,1,2 B=1,3 H=1,3 P=1,32,67 bias=0,1 strided=0,2"},
                                       {OP_PERF, "cell=0,1,2 B=1,8 H=4 P=512"},
                                       {0, NULL}},
    .declare = cell_step_declare,
    .forward = cell_step_forward,
};

/* --- identities --------------------------------------------------------------------------------------------------- */

/* Nothing is left of the guess: every iteration makes another state, or another chunk's start, exact. */
static bool exact(const struct run *r) {
    int64_t T = param(r, "T"), Q = param(r, "Q"), K = param(r, "K");
    if (param(r, "method") == CELL_NEWTON) return K + 1 >= T;
    return param(r, "method") == CELL_SEQUENTIAL || (Q > 0 && (K + 1) * Q >= T);
}

static void cell_steps(struct run *r) {
    if (!exact(r)) return;
    sequence_equals_steps(r, &cell_step, "cell B H P bias limit");
}

/* Newton's iterates of a document don't depend on what else there is; where chunks begin does. */
static void cell_packed(struct run *r) {
    if (exact(r) || param(r, "method") == CELL_NEWTON) sequence_packed(r);
}

static void cell_split(struct run *r) {
    if (exact(r)) sequence_split(r);
}

/* However a solution is found, it is the same. */
static void cell_methods(struct run *r) {
    int64_t T = param(r, "T");
    char changes[64];
    if (!exact(r) || T > 40) return;
    sequence_same(r, "method=0", true);
    snprintf(changes, sizeof changes, "method=1 K=%lld", (long long)T);
    sequence_same(r, changes, true);
    snprintf(changes, sizeof changes, "method=2 Q=3 K=%lld", (long long)((T + 2) / 3));
    sequence_same(r, changes, true);
}

/* The same values when other states are not asked for. */
static void cell_alone(struct run *r) {
    struct run other;
    run_open_like(&other, r, "others=0");
    run_forward(&other);
    struct operand *y = operand_find(r, "y");
    op_compare(r, "y alone", operand_find(&other, "y")->values, y->values, y->count, y->terms);
    run_close(&other);
}

static const struct op_row cell = {
    .name = "cell",
    .parameters = "cell=0 method=0 K=3 Q=0 bounded=0 B=2 T=7 H=2 P=5 doc=0 initial=1 final=1 bias=1 others=1 limit=5 "
                  "report=0 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "cell=0,1,2 T=1,2,7,33,70 doc=0,4"},
        {OP_TEST, "cell=0,1,2 method=1 K=1,3 T=1,7,33 doc=0,4"},
        {OP_TEST, "cell=0,1,2 method=2 K=1,3 Q=1,4,9 T=7,33 doc=0,4"},
        {OP_TEST, "cell=0,1,2 method=2 Q=0 T=1,2,33 doc=0,4"}, /* chunks as the device has them, so to convergence */
        {OP_TEST, "cell=1,2 method=1,2 K=7 Q=4 doc=0,2 initial=0,1,2 final=0,1"},
        {OP_TEST, "cell=0,1 doc=0,2,3 initial=0,1,2 final=0,1,2 bias=0"},
        {OP_TEST, "cell=0,1 T=17 H=1,3 P=1,32,33,70 doc=4 strided=0,1,2"}, /* edges of blocks of channels */
        {OP_TEST, "cell=0,1,2 method=1,2 K=2 Q=3 T=17 P=1,33 doc=4 strided=1"},
        {OP_TEST, "cell=0,1 method=1,2 K=40 Q=5 T=33 limit=14 bounded=0,1 doc=0,4"}, /* far from contractive */
        {OP_TEST, "cell=0,1,2 method=1,2 K=1 Q=4 T=33 limit=14 report=1 doc=0,4"},
        {OP_TEST, "cell=0,1,2 method=0,1,2 B=3 T=200 H=2 P=70 doc=5 strided=1"}, /* several threads, sums of sums */
        {OP_TEST, "cell=0,1 B=1,70 T=20 H=1 P=40 doc=4"}, /* fewer and more rows than threads */
        {OP_LARGE, "cell=0,1,2 method=0,1,2 B=2,17 T=700 H=4 P=256 doc=0,4"},
        {OP_LARGE, "cell=0,1 method=0,1,2 Q=64 B=1 T=4099 H=3 P=333 doc=1 strided=1"},
        {OP_GRAD, "cell=0,1,2 B=1 T=1,2,7 H=2 P=3 doc=0,2,4"},
        {OP_GRAD, "cell=0,1,2 T=7 P=2 doc=0,2 initial=0,1,2 final=0,1 bias=0,1"},
        {OP_GRAD, "cell=0,1,2 method=1,2 K=7 Q=3 T=7 P=2 doc=0,2,4"},
        {OP_GRAD, "cell=0,1 T=70 H=1 P=33 limit=14 doc=4 strided=1"},
        {OP_PERF, "cell=0,1,2 B=4 T=1024 H=4 P=256 initial=0 final=0"},
        {OP_PERF, "cell=0,1 B=1 T=2048 H=4 P=512 method=0,1,2 initial=0 final=0"},
        {0, NULL}},
    .declare = cell_declare,
    .forward = cell_forward,
    .backward = cell_backward,
    .flops = cell_flops,
    .identities = (const struct op_identity[]){{"sequence = loop of steps", cell_steps},
                                               {"packed documents = documents run apart", cell_packed},
                                               {"split with state = whole", cell_split},
                                               {"causality", sequence_causal},
                                               {"every method finds the same", cell_methods},
                                               {"the same without other states", cell_alone},
                                               {NULL, NULL}},
};

const struct op_row *const ops_cell_rows[] = {&cell, &cell_step, NULL};
