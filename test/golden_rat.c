/* test/golden_rat.c: files op-rat*: a whole RAT layer: y = x + W_out RAT(W_in norm(x)), recorded with the norm's and
 * the projections' weights: in.x, y, dy (B,T,D), in.in_proj (3D + 2GP, D) with its rows in the order z, v, g, q, k,
 * in.gate_bias, in.input_norm (D), in.out_proj (D,D); grad.* of every in.*. `heads`, `groups` and `chunk` are in meta.
 */
#include "test/golden.h"

#include "common/arena.h"
#include <stdlib.h>

#define EPS 1e-6
#define BASE 10000

enum input { X, IN_PROJ, GATE_BIAS, INPUT_NORM, OUT_PROJ, DY, INPUTS };

static const char *const names[INPUTS] = {"in.x", "in.in_proj", "in.gate_bias", "in.input_norm", "in.out_proj", "dy"};
static const char *const gradient_names[] = {"grad.x", "grad.in_proj", "grad.gate_bias", "grad.input_norm",
                                             "grad.out_proj"};

struct problem {
    struct rat_shape s;
    int64_t D, E;
    const struct safetensors_entry *in[INPUTS];
};

static int read_problem(struct golden *g, struct problem *p, error *err) {
    for (int i = 0; i < INPUTS; i++)
        if (!(p->in[i] = golden_entry(g, names[i], err))) return -1;
    if (p->in[X]->ndim != 3) return error_input(err, "%s: in.x must have three dimensions", g->path);
    p->s = (struct rat_shape){.B = p->in[X]->dim[0], .T = p->in[X]->dim[1]};
    p->D = p->in[X]->dim[2];
    TRY(json_get_int(g->meta, "heads", g->path, &p->s.H, err));
    TRY(json_get_int(g->meta, "groups", g->path, &p->s.G, err));
    TRY(json_get_int(g->meta, "chunk", g->path, &p->s.Q, err));
    bool good = p->s.H > 0 && p->s.G > 0 && p->s.Q > 0 && p->s.H % p->s.G == 0 && p->D % p->s.H == 0;
    if (good) p->s.P = p->D / p->s.H;
    p->E = 3 * p->D + 2 * p->s.G * p->s.P;
    int64_t R = p->s.B * p->s.T, D = p->D, counts[INPUTS] = {R * D, p->E * D, D, D, D * D, R * D};
    for (int i = 0; good && i < INPUTS; i++) good = p->in[i]->count == (uint64_t)counts[i];
    return good ? 0 : error_input(err, "%s: shapes, heads, groups and chunk do not go together", g->path);
}

/* All device memory of a run. */
struct memory {
    tensor in[INPUTS], gradient[INPUTS];            /* as the operations have them; dy real */
    tensor normed, rstd, dnormed, projected, dprojected; /* (R,D), (R), (R,D), (R,E) twice */
    tensor rat, drat, branch, dbranch;              /* (R,D): RAT's output, its gradient; the layer's, likewise */
    void *saved, *work;
};

static tensor take(arena *m, enum dtype dtype, int64_t rows, int64_t columns) {
    return tensor_2d(arena_take(m, (size_t)(rows * columns) * dtype_size(dtype)), dtype, rows, columns);
}

static void carve(struct memory *v, const struct problem *p, const struct ops *ops, arena *m) {
    int64_t R = p->s.B * p->s.T, D = p->D;
    const int64_t rows[INPUTS] = {R, p->E, 1, 1, D, R};
    for (int i = 0; i < INPUTS; i++) {
        bool weight = i == IN_PROJ || i == OUT_PROJ;
        v->in[i] = take(m, weight ? ops->act : ops->real, rows[i], D);
        v->gradient[i] = take(m, ops->real, rows[i], D);
    }
    v->normed = take(m, ops->act, R, D);
    v->dnormed = take(m, ops->act, R, D);
    v->rstd = take(m, ops->real, 1, R);
    v->projected = take(m, ops->act, R, p->E);
    v->dprojected = take(m, ops->act, R, p->E);
    v->rat = take(m, ops->act, R, D);
    v->drat = take(m, ops->act, R, D);
    v->branch = take(m, ops->act, R, D);
    v->dbranch = take(m, ops->act, R, D);
    v->saved = arena_take(m, ops->rat_saved(p->s));
    size_t sizes[] = {ops->rat_forward_scratch(p->s), ops->rat_backward_scratch(p->s),
                      ops->add_norm_backward_scratch(R, D)}, work = 0;
    for (int i = 0; i < 3; i++) work = sizes[i] > work ? sizes[i] : work;
    v->work = arena_take(m, work);
}

static void upload(struct golden *g, const struct problem *p, struct memory *v) {
    for (int i = 0; i < INPUTS; i++) {
        int64_t count = tensor_count(v->in[i]);
        double *values = golden_inputs(g, p->in[i]), *zeros = calloc((size_t)count, sizeof *zeros);
        ASSERT(zeros != NULL);
        golden_upload(g, v->in[i].data, v->in[i].dtype, values, count);
        golden_upload(g, v->gradient[i].data, v->gradient[i].dtype, zeros, count);
        if (i == DY) golden_upload(g, v->dbranch.data, v->dbranch.dtype, values, count);
        free(values);
        free(zeros);
    }
}

static tensor row_of(tensor t) {
    return tensor_1d(t.data, t.dtype, tensor_count(t));
}

/* Columns of the projection, or of its gradient, as heads; `from` counts heads of P. */
static tensor heads(const struct problem *p, tensor rows, int64_t from, int64_t count) {
    tensor columns = tensor_columns(rows, from * p->s.P, count * p->s.P);
    return tensor_split_first(tensor_split_last(columns, count, p->s.P), p->s.B, p->s.T);
}

struct columns {
    tensor z, v, g, q, k;
};

static struct columns cut(const struct problem *p, tensor rows) {
    int64_t H = p->s.H, G = p->s.G;
    return (struct columns){heads(p, rows, 0, H), heads(p, rows, H, H), heads(p, rows, 2 * H, H),
                            heads(p, rows, 3 * H, G), heads(p, rows, 3 * H + G, G)};
}

static void run(struct golden *g, const struct problem *p, struct memory *v) {
    const struct ops *ops = g->dev->ops;
    const tensor none = tensor_none(), *in = v->in, *d = v->gradient;
    const struct rat_state nothing = {none, none, none, none};
    struct columns c = cut(p, v->projected), dc = cut(p, v->dprojected);
    tensor y = heads(p, v->rat, 0, p->s.H), dy = heads(p, v->drat, 0, p->s.H);
    ops->add_norm_forward(g->dev, in[X], v->normed, none, row_of(v->rstd), in[X], none, none,
                          row_of(in[INPUT_NORM]), EPS);
    ops->linear_forward(g->dev, v->projected, v->normed, in[IN_PROJ], none);
    ops->rat_forward(g->dev, y, nothing, v->saved, c.z, c.v, c.g, row_of(in[GATE_BIAS]), c.q, c.k, none, nothing,
                     p->s.Q, BASE, v->work);
    ops->linear_forward(g->dev, v->branch, v->rat, in[OUT_PROJ], none);

    ops->linear_backward(g->dev, v->drat, false, d[OUT_PROJ], none, v->dbranch, v->rat, in[OUT_PROJ]);
    ops->rat_backward(g->dev, dc.z, dc.v, dc.g, row_of(d[GATE_BIAS]), dc.q, dc.k, dy, v->saved, c.z, c.v, c.g,
                      row_of(in[GATE_BIAS]), c.q, c.k, none, nothing, p->s.Q, BASE, v->work);
    ops->linear_backward(g->dev, v->dnormed, false, d[IN_PROJ], none, v->dprojected, v->normed, in[IN_PROJ]);
    ops->add_norm_backward(g->dev, d[X], none, row_of(d[INPUT_NORM]), none, v->dnormed, in[DY], in[X], none,
                           row_of(v->rstd), row_of(in[INPUT_NORM]), none, v->work);
}

/* The stream is x and what the layer adds to it. */
static void compare(struct golden *g, const struct memory *v, double limit) {
    int64_t count = tensor_count(v->branch);
    double *sum = calloc(2 * (size_t)count, sizeof *sum), *x = sum + count;
    ASSERT(sum != NULL);
    golden_download(g, sum, v->branch.data, v->branch.dtype, count);
    golden_download(g, x, v->in[X].data, v->in[X].dtype, count);
    for (int64_t i = 0; i < count; i++) sum[i] += x[i];
    golden_compare(g, "y", "", sum, count, limit);
    for (int i = 0; i < DY; i++) {
        double *values = calloc((size_t)tensor_count(v->gradient[i]), sizeof *values);
        ASSERT(values != NULL);
        golden_download(g, values, v->gradient[i].data, v->gradient[i].dtype, tensor_count(v->gradient[i]));
        golden_compare(g, gradient_names[i], "", values, tensor_count(v->gradient[i]), limit);
        free(values);
    }
    free(sum);
}

int golden_rat(struct golden *g, error *err) {
    struct problem p;
    struct memory v;
    TRY(read_problem(g, &p, err));
    double limit = golden_limit(g);
    arena measured = arena_measure("golden"), m;
    carve(&v, &p, g->dev->ops, &measured);
    TRY(arena_open(&m, "golden", measured.peak, g->dev->memory, err));
    carve(&v, &p, g->dev->ops, &m);
    upload(g, &p, &v);
    run(g, &p, &v);
    int result = device_check(g->dev, err);
    if (result == 0) compare(g, &v, limit);
    arena_close(&m);
    return result;
}
