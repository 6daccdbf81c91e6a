/* bench_cell.c: rows of the nonlinear recurrences for riverrun bench ops: the cell alone, and with the projection of
 * its input. bench_ops.h says what a row is; train/bench_cases.c gives rows their shapes. Called by bench_ops.c.
 *
 * Letters beside those of kernels/tensor.h: J (channels of a head, H J in all), K (inputs of a head), e (the cell: its
 * place in CELLS), m (how it is solved: 0 as the device chooses, 1 token after token, 2 Newton, 3 shooting, 4 a call of
 * cell_step for each token), k (iterations), c (shooting: tokens of a chunk; 0: as the device likes it). U, O and W are
 * numbers a channel: pre-activations, states that are not the output, weights. */
#include "train/bench_ops.h"

#include "kernels/cells/cells.h"
#include <math.h>
#include <string.h>

#define SIZE(letter) bench_size(p, #letter[0])
#define VALUE(name) bench_value(p, name)
#define GRADIENT(name) bench_gradient(p, name)

enum { CHOSEN, SEQUENTIAL, NEWTON, SHOOTING, STEPS };

static const struct cell *cell_of(const struct bench_problem *p) {
    int64_t e = SIZE(e);
    return cells[e < CELL_COUNT ? e : 0];
}

static struct cell_shape shape_of(const struct bench_problem *p) {
    return (struct cell_shape){SIZE(B), SIZE(T), SIZE(H) * SIZE(J), cell_of(p)};
}

static struct cell_solver solver_of(const struct bench_problem *p) {
    struct cell_solver s = p->ops->cell_choose(shape_of(p));
    if (SIZE(m) == CHOSEN && !p->reference) return s;
    s = (struct cell_solver){.method = CELL_SEQUENTIAL, .iterations = (int)SIZE(k), .chunk = SIZE(c), .bounded = true};
    if (p->reference) return s;
    if (SIZE(m) == NEWTON) s.method = CELL_NEWTON;
    if (SIZE(m) == SHOOTING) s.method = CELL_SHOOTING;
    return s;
}

/* Weights as after training: within the limit that keeps the recurrence from growing. */
static void declare_cell(struct bench_problem *p, bool given) {
    const struct cell *cell = cell_of(p);
    bool steps = SIZE(m) == STEPS;
    p->size['U'] = cell->inputs;
    p->size['O'] = cell->states - 1;
    p->size['W'] = cell->weights;
    if (given) bench_input(p, "u", "BTHUJ");
    bench_parameter(p, "bias", "UHJ")->spread = 0.1;
    bench_parameter(p, "weight", "WHJ")->spread = 0.15;
    bench_output(p, "y", steps ? "TBHJ" : "BTHJ");
    if (cell->states > 1 && !steps) bench_output(p, "others", "BTOHJ")->has_gradient = BENCH_NO_GRADIENT;
    for (int i = 0; steps && i < p->count; i++) p->operands[i].has_gradient = BENCH_NO_GRADIENT;
    p->solver = solver_of(p);
    p->reports = !steps;
}

static size_t scratch_of(const struct bench_problem *p) {
    struct cell_shape shape = shape_of(p);
    size_t forward = p->ops->cell_forward_scratch(shape, p->solver), backward = p->ops->cell_backward_scratch(shape);
    size_t state = (size_t)(shape.B * shape.N * shape.cell->states) * dtype_size(p->ops->real);
    return fmax((double)state, fmax((double)forward, (double)backward));
}

/* (U,H,J) and (W,H,J) as the operation has them: rows of all channels. */
static tensor channels(const struct bench_problem *p, tensor t) {
    return tensor_reshape(t, 2, (int64_t[]){t.dim[0], SIZE(H) * SIZE(J)});
}

/* (B,T,H,J) likewise, and (B,T,O,H,J). */
static tensor tokens_of(const struct bench_problem *p, tensor t) {
    if (!tensor_given(t)) return t;
    if (t.ndim == 4) return tensor_reshape(t, 3, (int64_t[]){t.dim[0], t.dim[1], SIZE(H) * SIZE(J)});
    return tensor_reshape(t, 4, (int64_t[]){t.dim[0], t.dim[1], t.dim[2], SIZE(H) * SIZE(J)});
}

/* One token of all rows: (B, ...) of (B,T, ...). */
static tensor token_at(tensor t, int64_t at) {
    tensor one = t;
    one.data = (char *)t.data + (size_t)(at * t.stride[1]) * dtype_size(t.dtype);
    one.ndim = t.ndim - 1;
    for (int i = 1; i < one.ndim; i++) {
        one.dim[i] = t.dim[i + 1];
        one.stride[i] = t.stride[i + 1];
    }
    return one;
}

/* The loop of who has no other way: a call for each token, from a state of zeros. */
static void run_steps(struct bench_problem *p, tensor u) {
    struct cell_shape s = shape_of(p);
    tensor state = tensor_3d(p->scratch, p->ops->real, s.B, s.cell->states, s.N), y = VALUE("y");
    device_zero(p->dev, state.data, (size_t)tensor_count(state) * dtype_size(state.dtype));
    for (int64_t t = 0; t < s.T; t++) {
        char *out = (char *)y.data + (size_t)(t * s.B * s.N) * dtype_size(y.dtype);
        p->ops->cell_step(p->dev, tensor_2d(out, y.dtype, s.B, s.N), state, token_at(u, t), channels(p, VALUE("bias")),
                          channels(p, VALUE("weight")), s.cell);
    }
}

static void run_forward(struct bench_problem *p, tensor u) {
    tensor none = tensor_none();
    if (SIZE(m) == STEPS) {
        run_steps(p, u);
        return;
    }
    p->ops->cell_forward(p->dev, tokens_of(p, VALUE("y")), tokens_of(p, VALUE("others")), none, p->constant, u,
                         channels(p, VALUE("bias")), channels(p, VALUE("weight")), none, none, cell_of(p), p->solver,
                         p->scratch);
}

static void run_backward(struct bench_problem *p, tensor du, tensor u, void *scratch) {
    tensor none = tensor_none();
    p->ops->cell_backward(p->dev, du, channels(p, GRADIENT("bias")), channels(p, GRADIENT("weight")), none,
                          tokens_of(p, GRADIENT("y")), none, tokens_of(p, VALUE("y")), tokens_of(p, VALUE("others")), u,
                          channels(p, VALUE("bias")), channels(p, VALUE("weight")), none, none, cell_of(p), scratch);
}

/* One evaluation of every token, two special functions for each sigmoid or tanh: of the inputs and, as in the cells
 * that have more than one state, of what is put out. */
static void cell_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    const struct cell *cell = cell_of(p);
    double evaluations = (double)(SIZE(B) * SIZE(T)) * (double)(SIZE(H) * SIZE(J));
    forward->special = 2 * (cell->inputs + cell->states - 1) * evaluations;
    both->special = 2 * forward->special;
}

/* ---- the cell alone --------------------------------------------------------------------------------------------- */

static void cell_declare(struct bench_problem *p) {
    declare_cell(p, true);
    p->scratch_bytes = scratch_of(p);
}

static void cell_forward(struct bench_problem *p) {
    run_forward(p, VALUE("u"));
}

static void cell_backward(struct bench_problem *p) {
    if (SIZE(m) != STEPS) run_backward(p, GRADIENT("u"), VALUE("u"), p->scratch);
}

const struct bench_row bench_cell = {.name = "cell",
                                     .slice = "B=1 T=8192 H=1 J=4",
                                     .declare = cell_declare,
                                     .forward = cell_forward,
                                     .backward = cell_backward,
                                     .work = cell_work};

/* ---- with the projection of its input --------------------------------------------------------------------------- */

static size_t aligned(size_t bytes) {
    return (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
}

/* du lies before what the operations work with. */
static size_t gradient_bytes(const struct bench_problem *p) {
    return aligned((size_t)(SIZE(B) * SIZE(T) * SIZE(H) * SIZE(U) * SIZE(J)) * dtype_size(p->ops->act));
}

static void projected_declare(struct bench_problem *p) {
    struct bench_operand *w;
    p->size['U'] = cell_of(p)->inputs;
    bench_input(p, "x", "BTHK");
    w = bench_input(p, "w", "HUJK");
    w->spread = 1 / sqrt((double)SIZE(K));
    w->has_gradient = BENCH_ADDED;
    w->gradient_type = BENCH_REAL;
    bench_output(p, "u", "BTHUJ")->has_gradient = BENCH_NO_GRADIENT;
    declare_cell(p, false);
    size_t cell = scratch_of(p);
    size_t product = p->ops->block_linear_backward_scratch(SIZE(B) * SIZE(T), SIZE(H), SIZE(U) * SIZE(J), SIZE(K));
    p->scratch_bytes = gradient_bytes(p) + (cell > product ? cell : product);
}

/* (B,T,H,...) as rows of tokens, and (H,U,J,K) as a matrix for each head. */
static tensor rows_of(tensor t) {
    int64_t rows = t.dim[0] * t.dim[1];
    return tensor_reshape(t, 2, (int64_t[]){rows, tensor_count(t) / rows});
}

static tensor matrices(tensor w) {
    return tensor_reshape(w, 3, (int64_t[]){w.dim[0], w.dim[1] * w.dim[2], w.dim[3]});
}

static void projected_forward(struct bench_problem *p) {
    p->ops->block_linear_forward(p->dev, rows_of(VALUE("u")), rows_of(VALUE("x")), matrices(VALUE("w")));
    run_forward(p, VALUE("u"));
}

static void projected_backward(struct bench_problem *p) {
    tensor du = VALUE("u");
    char *scratch = (char *)p->scratch + gradient_bytes(p);
    if (SIZE(m) == STEPS) return;
    du.data = p->scratch;
    run_backward(p, du, VALUE("u"), scratch);
    p->ops->block_linear_backward(p->dev, rows_of(GRADIENT("x")), false, matrices(GRADIENT("w")), rows_of(du),
                                  rows_of(VALUE("x")), matrices(VALUE("w")), scratch);
}

static void projected_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    double tokens = (double)(SIZE(B) * SIZE(T));
    cell_work(p, forward, both);
    forward->products = 2 * tokens * (double)(SIZE(H) * SIZE(U) * SIZE(J) * SIZE(K));
    both->products = 3 * forward->products;
}

/* Few tokens, because every one of them takes part in products of the whole width. */
const struct bench_row bench_cell_projected = {.name = "cell_projected",
                                               .slice = "B=1 T=2048 H=1 J=4",
                                               .declare = projected_declare,
                                               .forward = projected_forward,
                                               .backward = projected_backward,
                                               .work = projected_work};
