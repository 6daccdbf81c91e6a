/* test/golden_cell.c: files op-para*: a cell of ParaRNN with its input projection: in.x, y, dy (B,T,D), in.B (H, D/H,
 * 3, N/H), in.A and in.b (3,N), of the LSTM in.C (2,N); grad.* of every in.*. y and grad.* are those of the exact
 * recurrence; y_newton3, and grad_newton3.* at those states, of three of Newton's iterations.
 *
 * Our weight is A, and C below it; our projection (block_linear) has its input last. The weights reach 1.4, so that
 * three iterations are seen not to be enough, but only in double: y_newton3 is within 1e-4 of y.
 */
#include "test/golden.h"

#include "common/arena.h"
#include "kernels/cells/cells.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { X, B, A, C, BIAS, DY, INPUTS };
static const char *const names[INPUTS] = {"x", "B", "A", "C", "b", NULL};

struct problem {
    const struct cell *cell;
    int64_t rows, T, H, D, P; /* H heads, each from D to P channels */
    const struct safetensors_entry *in[INPUTS]; /* C is NULL where the cell has none */
};

static int read_problem(struct golden *g, struct problem *p, error *err) {
    *p = (struct problem){.cell = cell_find(strncmp(g->base, "op-paralstm", 11) == 0 ? "lstm" : "gru")};
    for (int i = 0; i < INPUTS; i++) {
        char name[LIMIT_NAME];
        snprintf(name, sizeof name, names[i] ? "in.%s" : "dy", names[i]);
        if (i == C) p->in[i] = golden_optional(g, name);
        else if (!(p->in[i] = golden_entry(g, name, err))) return -1;
    }
    const struct safetensors_entry *x = p->in[X], *w = p->in[B];
    bool good = x->ndim == 3 && w->ndim == 4;
    if (good) {
        p->rows = x->dim[0], p->T = x->dim[1], p->H = w->dim[0], p->D = w->dim[1], p->P = w->dim[3];
        int64_t N = p->H * p->P, weights = (int64_t)(p->in[A]->count + (p->in[C] ? p->in[C]->count : 0));
        good = x->dim[2] == p->H * p->D && w->dim[2] == p->cell->inputs && weights == p->cell->weights * N &&
               (int64_t)p->in[BIAS]->count == p->cell->inputs * N && (int64_t)p->in[DY]->count == p->rows * p->T * N;
    }
    return good ? 0 : error_input(err, "%s: the shapes of its tensors do not go together", g->path);
}

/* All device memory of a run. */
struct memory {
    tensor x, dx, projection, dprojection;     /* (R, H D); (H, U P, D) */
    tensor u, du, y, dy, others;               /* (R, H U P); (B,T,N); (B,T,S-1,N) */
    tensor weight, dweight, bias, dbias;       /* (W,N); (U,N) */
    void *scratch;
};

static tensor take(arena *m, enum dtype dtype, int64_t a, int64_t b, int64_t c) {
    return tensor_3d(arena_take(m, (size_t)(a * b * c) * dtype_size(dtype)), dtype, a, b, c);
}

static struct cell_solver solver_of(enum cell_method method) {
    return (struct cell_solver){.method = method, .iterations = 3};
}

static void carve(struct memory *v, const struct problem *p, const struct ops *ops, arena *m) {
    const struct cell *cell = p->cell;
    int64_t R = p->rows * p->T, N = p->H * p->P, outputs = cell->inputs * p->P;
    struct cell_shape shape = {p->rows, p->T, N, cell};
    v->x = take(m, ops->act, 1, R, p->H * p->D);
    v->dx = take(m, ops->act, 1, R, p->H * p->D);
    v->projection = take(m, ops->act, p->H, outputs, p->D);
    v->dprojection = take(m, ops->real, p->H, outputs, p->D);
    v->u = take(m, ops->act, 1, R, p->H * outputs);
    v->du = take(m, ops->act, 1, R, p->H * outputs);
    v->y = take(m, ops->act, p->rows, p->T, N);
    v->dy = take(m, ops->act, p->rows, p->T, N);
    v->others = cell->states > 1 ? take(m, ops->act, p->rows, p->T, (cell->states - 1) * N) : tensor_none();
    v->weight = take(m, ops->real, 1, cell->weights, N);
    v->dweight = take(m, ops->real, 1, cell->weights, N);
    v->bias = take(m, ops->real, 1, cell->inputs, N);
    v->dbias = take(m, ops->real, 1, cell->inputs, N);
    size_t sizes[] = {ops->cell_forward_scratch(shape, solver_of(CELL_SEQUENTIAL)),
                      ops->cell_forward_scratch(shape, solver_of(CELL_NEWTON)), ops->cell_backward_scratch(shape),
                      ops->block_linear_backward_scratch(R, p->H, outputs, p->D)}, most = 0;
    for (int i = 0; i < 4; i++) most = sizes[i] > most ? sizes[i] : most;
    v->scratch = arena_take(m, most);
}

/* (H,D,O) to (H,O,D). */
static void turn(double *to, const double *from, int64_t H, int64_t D, int64_t O) {
    for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < D; i++)
            for (int64_t o = 0; o < O; o++) to[(h * O + o) * D + i] = from[(h * D + i) * O + o];
}

static double *doubles(int64_t count) {
    double *values = calloc((size_t)count, sizeof *values);
    ASSERT(values != NULL);
    return values;
}

/* One or two recorded inputs, one behind the other. */
static void upload(struct golden *g, tensor to, const struct safetensors_entry *a, const struct safetensors_entry *b) {
    double *ours = doubles(tensor_count(to)), *values = golden_inputs(g, a);
    memcpy(ours, values, (size_t)a->count * sizeof *ours);
    free(values);
    if (b) {
        values = golden_inputs(g, b);
        memcpy(ours + a->count, values, (size_t)b->count * sizeof *ours);
        free(values);
    }
    golden_upload(g, to.data, to.dtype, ours, tensor_count(to));
    free(ours);
}

static void upload_all(struct golden *g, const struct problem *p, struct memory *v) {
    int64_t count = tensor_count(v->projection);
    double *ours = doubles(count), *values = golden_inputs(g, p->in[B]);
    turn(ours, values, p->H, p->D, p->cell->inputs * p->P);
    golden_upload(g, v->projection.data, v->projection.dtype, ours, count);
    free(values);
    free(ours);
    upload(g, v->x, p->in[X], NULL);
    upload(g, v->dy, p->in[DY], NULL);
    upload(g, v->weight, p->in[A], p->in[C]);
    upload(g, v->bias, p->in[BIAS], NULL);
}

static tensor matrix(tensor t) {
    return tensor_2d(t.data, t.dtype, t.dim[1], t.dim[2]);
}

/* (R, H U P) as (B,T,H,U,P). */
static tensor tokens(const struct problem *p, tensor u) {
    return tensor_5d(u.data, u.dtype, p->rows, p->T, p->H, p->cell->inputs, p->P);
}

static void run(struct golden *g, const struct problem *p, struct memory *v, enum cell_method method) {
    const struct ops *ops = g->dev->ops;
    const tensor none = tensor_none(), sums[] = {v->dprojection, v->dweight, v->dbias};
    tensor u = tokens(p, v->u), others = v->others;
    if (tensor_given(others)) others = tensor_split_last(others, p->cell->states - 1, p->H * p->P);
    for (int i = 0; i < 3; i++)
        device_zero(g->dev, sums[i].data, (size_t)tensor_count(sums[i]) * dtype_size(ops->real));
    ops->block_linear_forward(g->dev, matrix(v->u), matrix(v->x), v->projection);
    ops->cell_forward(g->dev, v->y, others, none, NULL, u, matrix(v->bias), matrix(v->weight), none, none, p->cell,
                      solver_of(method), v->scratch);
    ops->cell_backward(g->dev, tokens(p, v->du), matrix(v->dbias), matrix(v->dweight), none, v->dy, none, v->y, others,
                       u, matrix(v->bias), matrix(v->weight), none, none, p->cell, v->scratch);
    ops->block_linear_backward(g->dev, matrix(v->dx), false, v->dprojection, matrix(v->du), matrix(v->x), v->projection,
                               v->scratch);
}

/* Part of a result, from element `from` on. */
static void compare(struct golden *g, const char *prefix, const char *name, tensor t, int64_t from, int64_t count,
                    double limit) {
    char whole[LIMIT_NAME];
    double *ours = doubles(tensor_count(t));
    snprintf(whole, sizeof whole, "%s%s", prefix, name);
    golden_download(g, ours, t.data, t.dtype, tensor_count(t));
    golden_compare(g, whole, "", ours + from, count, limit);
    free(ours);
}

static void compare_all(struct golden *g, const struct problem *p, const struct memory *v, enum cell_method method,
                        double limit) {
    const char *prefix = method == CELL_NEWTON ? "grad_newton3." : "grad.";
    int64_t count = tensor_count(v->dprojection), of_A = (int64_t)p->in[A]->count;
    compare(g, method == CELL_NEWTON ? "y_newton3" : "y", "", v->y, 0, tensor_count(v->y), limit);
    compare(g, prefix, names[X], v->dx, 0, tensor_count(v->dx), limit);
    compare(g, prefix, names[BIAS], v->dbias, 0, tensor_count(v->dbias), limit);
    compare(g, prefix, names[A], v->dweight, 0, of_A, limit);
    if (p->in[C]) compare(g, prefix, names[C], v->dweight, of_A, (int64_t)p->in[C]->count, limit);
    double *ours = doubles(2 * count), *theirs = ours + count;
    char whole[LIMIT_NAME];
    golden_download(g, ours, v->dprojection.data, v->dprojection.dtype, count);
    turn(theirs, ours, p->H, p->cell->inputs * p->P, p->D);
    snprintf(whole, sizeof whole, "%s%s", prefix, names[B]);
    golden_compare(g, whole, "", theirs, count, limit);
    free(ours);
}

int golden_cell(struct golden *g, error *err) {
    struct problem p;
    struct memory v;
    TRY(read_problem(g, &p, err));
    double limit = golden_limit(g);
    arena measured = arena_measure("golden"), m;
    carve(&v, &p, g->dev->ops, &measured);
    TRY(arena_open(&m, "golden", measured.peak, g->dev->memory, err));
    carve(&v, &p, g->dev->ops, &m);
    upload_all(g, &p, &v);
    int result = 0;
    for (enum cell_method method = CELL_SEQUENTIAL; result == 0 && method <= CELL_NEWTON; method++) {
        run(g, &p, &v, method);
        result = device_check(g->dev, err);
        if (result == 0) compare_all(g, &p, &v, method, limit);
    }
    arena_close(&m);
    return result;
}
