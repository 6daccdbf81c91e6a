/* test/golden_scan.c: files op-selective-scan*: the selective scan of Mamba with step size, skip and gate, recorded
 * channel by channel: u, delta (before bias and softplus), z, y and dy are (B,D,T), B and C (B,N,T), A (D,N) negative,
 * D and delta_bias (D); grad.* of every in.*.
 *
 * The operation has time before channels, so these are transposed; and it takes log(-A), so that the gradient it gives
 * is divided by A for the comparison.
 */
#include "test/golden.h"

#include "common/arena.h"
#include <math.h>
#include <stdlib.h>

enum input { U, DELTA, Z, B_IN, C_IN, A_IN, SKIP, BIAS, DY, INPUTS };

static const char *const names[INPUTS] = {"in.u", "in.delta", "in.z", "in.B", "in.C", "in.A", "in.D", "in.delta_bias",
                                          "dy"};
static const char *const gradient_names[INPUTS] = {"grad.u", "grad.delta", "grad.z", "grad.B", "grad.C", "grad.A",
                                                   "grad.D", "grad.delta_bias", NULL};

struct problem {
    struct scan_shape s;
    const struct safetensors_entry *in[INPUTS];
};

/* The dimensions of an input as recorded; returns how many. */
static int recorded_dims(const struct scan_shape *s, enum input i, int64_t *dim) {
    const int64_t by_state = i == B_IN || i == C_IN;
    if (i == SKIP || i == BIAS) return dim[0] = s->D, 1;
    if (i == A_IN) return dim[0] = s->D, dim[1] = s->N, 2;
    return dim[0] = s->B, dim[1] = by_state ? s->N : s->D, dim[2] = s->T, 3;
}

static int read_problem(struct golden *g, struct problem *p, error *err) {
    for (int i = 0; i < INPUTS; i++)
        if (!(p->in[i] = golden_entry(g, names[i], err))) return -1;
    if (p->in[U]->ndim != 3 || p->in[A_IN]->ndim != 2)
        return error_input(err, "%s: in.u must have three dimensions and in.A two", g->path);
    p->s = (struct scan_shape){p->in[U]->dim[0], p->in[U]->dim[2], p->in[U]->dim[1], p->in[A_IN]->dim[1]};
    for (int i = 0; i < INPUTS; i++) {
        int64_t dim[3];
        bool good = p->in[i]->ndim == recorded_dims(&p->s, (enum input)i, dim);
        for (int k = 0; good && k < p->in[i]->ndim; k++) good = p->in[i]->dim[k] == dim[k];
        if (!good)
            return error_input(err, "%s: the shape of %s does not go with those of in.u and in.A", g->path, names[i]);
    }
    return 0;
}

/* (B,rows,columns) to (B,columns,rows). */
static void transpose(double *to, const double *from, int64_t B, int64_t rows, int64_t columns) {
    for (int64_t b = 0; b < B; b++, to += rows * columns, from += rows * columns)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = 0; k < columns; k++) to[k * rows + i] = from[i * columns + k];
}

static double *doubles(int64_t count) {
    double *values = calloc((size_t)count, sizeof *values);
    ASSERT(values != NULL);
    return values;
}

/* All device memory of a run. */
struct memory {
    tensor in[INPUTS], gradient[INPUTS], y;
    void *saved, *forward_scratch, *backward_scratch;
};

static void carve(struct memory *v, const struct problem *p, const struct ops *ops, arena *m) {
    for (int i = 0; i <= INPUTS; i++) { /* the last is y */
        int64_t dim[3], count = 1;
        int ndim = recorded_dims(&p->s, i < INPUTS ? (enum input)i : DY, dim);
        for (int k = 0; k < ndim; k++) count *= dim[k];
        if (ndim == 3) { /* as the operation has it: time before channels or states */
            int64_t time = dim[2];
            dim[2] = dim[1];
            dim[1] = time;
        }
        enum dtype dtype = ndim == 3 ? ops->act : ops->real;
        for (int copy = 0; copy < 2; copy++) {
            tensor t = tensor_1d(arena_take(m, (size_t)count * dtype_size(dtype)), dtype, count);
            *(i == INPUTS ? &v->y : copy ? &v->gradient[i] : &v->in[i]) = tensor_reshape(t, ndim, dim);
        }
    }
    v->saved = arena_take(m, ops->scan_saved(p->s));
    v->forward_scratch = arena_take(m, ops->scan_forward_scratch(p->s));
    v->backward_scratch = arena_take(m, ops->scan_backward_scratch(p->s));
}

static void upload(struct golden *g, const struct problem *p, enum input i, tensor to, tensor gradient) {
    int64_t count = tensor_count(to);
    double *values = golden_inputs(g, p->in[i]), *ours = doubles(count);
    if (p->in[i]->ndim == 3) transpose(ours, values, p->s.B, p->in[i]->dim[1], p->s.T);
    for (int64_t k = 0; p->in[i]->ndim < 3 && k < count; k++) ours[k] = i == A_IN ? log(-values[k]) : values[k];
    golden_upload(g, to.data, to.dtype, ours, count);
    for (int64_t k = 0; k < count; k++) ours[k] = 0; /* gradients of parameters are added to what is there */
    golden_upload(g, gradient.data, gradient.dtype, ours, count);
    free(values);
    free(ours);
}

static void compare(struct golden *g, const struct problem *p, const char *name, enum input i, tensor t, double limit) {
    int64_t count = tensor_count(t);
    double *ours = doubles(count), *theirs = doubles(count), *A = golden_inputs(g, p->in[A_IN]);
    golden_download(g, ours, t.data, t.dtype, count);
    if (p->in[i]->ndim == 3) transpose(theirs, ours, p->s.B, p->s.T, p->in[i]->dim[1]);
    for (int64_t k = 0; p->in[i]->ndim < 3 && k < count; k++) theirs[k] = i == A_IN ? ours[k] / A[k] : ours[k];
    golden_compare(g, name, "", theirs, count, limit);
    free(ours);
    free(theirs);
    free(A);
}

static void run(struct golden *g, struct memory *v) {
    const struct ops *ops = g->dev->ops;
    const tensor none = tensor_none(), *in = v->in, *d = v->gradient;
    ops->scan_forward(g->dev, v->y, none, v->saved, in[U], in[DELTA], in[BIAS], in[A_IN], in[B_IN], in[C_IN], in[SKIP],
                      in[Z], none, none, v->forward_scratch);
    ops->scan_backward(g->dev, d[U], d[DELTA], d[B_IN], d[C_IN], d[Z], none, d[BIAS], d[A_IN], d[SKIP], in[DY], none,
                       v->saved, in[U], in[DELTA], in[BIAS], in[A_IN], in[B_IN], in[C_IN], in[SKIP], in[Z], none, none,
                       v->backward_scratch);
}

int golden_scan(struct golden *g, error *err) {
    struct problem p;
    struct memory v;
    TRY(read_problem(g, &p, err));
    double limit = golden_limit(g);
    arena measured = arena_measure("golden"), m;
    carve(&v, &p, g->dev->ops, &measured);
    TRY(arena_open(&m, "golden", measured.peak, g->dev->memory, err));
    carve(&v, &p, g->dev->ops, &m);
    for (int i = 0; i < INPUTS; i++) upload(g, &p, (enum input)i, v.in[i], v.gradient[i]);
    run(g, &v);
    int result = device_check(g->dev, err);
    if (result == 0) compare(g, &p, "y", DY, v.y, limit);
    for (int i = 0; result == 0 && i < INPUTS; i++)
        if (gradient_names[i]) compare(g, &p, gradient_names[i], (enum input)i, v.gradient[i], limit);
    arena_close(&m);
    return result;
}
