/* test/golden_slstm.c: files op-slstm*: the sLSTM cell from a zero state: in.x (T,B,4D), gates i, f, z, o; in.b (4D);
 * in.R (H,4P,P); y and dy (T+1,B,D), whose row 0 is the zero state; grad.x, grad.b, grad.R.
 *
 * The operation has rows before time, so these are transposed; what comes to the zero state's y has no effect.
 */
#include "test/golden.h"

#include "common/arena.h"
#include <stdlib.h>
#include <string.h>

struct problem {
    struct slstm_shape s;
    const struct safetensors_entry *x, *b, *R, *dy;
};

static int read_problem(struct golden *g, struct problem *p, error *err) {
    static const char *const names[] = {"in.x", "in.b", "in.R", "dy"};
    const struct safetensors_entry **places[] = {&p->x, &p->b, &p->R, &p->dy};
    for (int i = 0; i < 4; i++)
        if (!(*places[i] = golden_entry(g, names[i], err))) return -1;
    bool good = p->x->ndim == 3 && p->R->ndim == 3 && p->b->ndim == 1 && p->dy->ndim == 3;
    if (good) {
        p->s = (struct slstm_shape){p->x->dim[1], p->x->dim[0], p->R->dim[0], p->R->dim[2]};
        int64_t D = p->s.H * p->s.P;
        good = p->R->dim[1] == 4 * p->s.P && p->x->dim[2] == 4 * D && p->b->dim[0] == 4 * D &&
               p->dy->dim[0] == p->s.T + 1 && p->dy->dim[1] == p->s.B && p->dy->dim[2] == D;
    }
    return good ? 0 : error_input(err, "%s: the shapes of in.x, in.b, in.R and dy do not go together", g->path);
}

/* All device memory of a run. */
struct memory {
    tensor x, y, dx, dy, r, dr, bias, dbias;
    void *saved, *forward_scratch, *backward_scratch;
};

static void carve(struct memory *v, const struct problem *p, const struct ops *ops, arena *m) {
    struct slstm_shape s = p->s;
    int64_t D = s.H * s.P;
    tensor *wide[] = {&v->x, &v->dx}, *narrow[] = {&v->y, &v->dy}, *vectors[] = {&v->bias, &v->dbias};
    for (int i = 0; i < 2; i++) {
        *wide[i] = tensor_3d(arena_take(m, (size_t)(s.B * s.T * 4 * D) * dtype_size(ops->act)), ops->act, s.B, s.T,
                             4 * D);
        *narrow[i] = tensor_3d(arena_take(m, (size_t)(s.B * s.T * D) * dtype_size(ops->act)), ops->act, s.B, s.T, D);
        *vectors[i] = tensor_2d(arena_take(m, (size_t)(4 * D) * dtype_size(ops->real)), ops->real, 4, D);
    }
    size_t count = (size_t)(s.H * 4 * s.P * s.P);
    v->r = tensor_3d(arena_take(m, count * dtype_size(ops->act)), ops->act, s.H, 4 * s.P, s.P);
    v->dr = tensor_3d(arena_take(m, count * dtype_size(ops->real)), ops->real, s.H, 4 * s.P, s.P);
    v->saved = arena_take(m, ops->slstm_saved(s));
    v->forward_scratch = arena_take(m, ops->slstm_forward_scratch(s));
    v->backward_scratch = arena_take(m, ops->slstm_backward_scratch(s));
}

/* (A,B,width) to (B,A,width). */
static void swap_first(double *to, const double *from, int64_t A, int64_t B, int64_t width) {
    for (int64_t a = 0; a < A; a++)
        for (int64_t b = 0; b < B; b++)
            memcpy(to + (b * A + a) * width, from + (a * B + b) * width, (size_t)width * sizeof *to);
}

static double *doubles(int64_t count) {
    double *values = calloc((size_t)count, sizeof *values);
    ASSERT(values != NULL);
    return values;
}

/* A recorded input without its first `skip` numbers; with `swap`, time and rows change places. */
static void upload(struct golden *g, tensor to, const struct safetensors_entry *e, int64_t skip, bool swap) {
    int64_t count = tensor_count(to);
    double *values = golden_inputs(g, e), *ours = doubles(count);
    if (swap) swap_first(ours, values + skip, to.dim[1], to.dim[0], to.dim[2]);
    else memcpy(ours, values, (size_t)count * sizeof *ours);
    golden_upload(g, to.data, to.dtype, ours, count);
    free(values);
    free(ours);
}

/* `zeros` numbers of the zero state in front. */
static void compare(struct golden *g, const char *name, tensor t, int64_t zeros, bool swap, double limit) {
    int64_t count = tensor_count(t);
    double *ours = doubles(count), *theirs = doubles(zeros + count);
    golden_download(g, ours, t.data, t.dtype, count);
    if (swap) swap_first(theirs + zeros, ours, t.dim[0], t.dim[1], t.dim[2]);
    else memcpy(theirs, ours, (size_t)count * sizeof *ours);
    golden_compare(g, name, "", theirs, zeros + count, limit);
    free(ours);
    free(theirs);
}

int golden_slstm(struct golden *g, error *err) {
    struct problem p;
    struct memory v;
    TRY(read_problem(g, &p, err));
    double limit = golden_limit(g);
    const struct ops *ops = g->dev->ops;
    const tensor none = tensor_none();
    arena measured = arena_measure("golden"), m;
    carve(&v, &p, ops, &measured);
    TRY(arena_open(&m, "golden", measured.peak, g->dev->memory, err));
    carve(&v, &p, ops, &m);
    int64_t zeros = p.s.B * p.s.H * p.s.P;
    upload(g, v.x, p.x, 0, true);
    upload(g, v.dy, p.dy, zeros, true);
    upload(g, v.r, p.R, 0, false);
    upload(g, v.bias, p.b, 0, false);
    device_zero(g->dev, v.dr.data, (size_t)tensor_count(v.dr) * dtype_size(ops->real)); /* gradients are added */
    device_zero(g->dev, v.dbias.data, (size_t)tensor_count(v.dbias) * dtype_size(ops->real));
    ops->slstm_forward(g->dev, v.y, none, v.saved, v.x, v.r, v.bias, none, none, v.forward_scratch);
    ops->slstm_backward(g->dev, v.dx, v.dr, v.dbias, none, v.dy, none, v.saved, v.y, v.x, v.r, v.bias, none, none, 0,
                        v.backward_scratch);
    int result = device_check(g->dev, err);
    if (result == 0) {
        compare(g, "y", v.y, zeros, true, limit);
        compare(g, "grad.x", v.dx, 0, true, limit);
        compare(g, "grad.R", v.dr, 0, false, limit);
        compare(g, "grad.b", v.dbias, 0, false, limit);
    }
    arena_close(&m);
    return result;
}
