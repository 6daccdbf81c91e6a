/* test/golden_ssd.c: files op-ssd*: the SSD recurrence with its inputs already multiplied by the step size: X = dt x,
 * A = dt * (decay rate), B and C for every head (or group). So dt is 1 here and a is A: the operation's inputs dt and a
 * are independent of each other.
 *
 *   in.X (B,T,H,P), in.A (B,T,H), in.B and in.C (B,T,G,N), in.S0 (B,1,H,P,N) if there is one; y and dy (B,T,H,P);
 * grad.*
 *
 * Run with three chunk lengths: that of the layer's default, that of the recording, and one that divides nothing.
 */
#include "test/golden.h"

#include "common/arena.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct problem {
    int64_t B, T, H, P, G, N;
    const struct safetensors_entry *X, *A, *Bm, *C, *S0, *dy;
};

static int expect_dims(struct golden *g, const struct safetensors_entry *e, int ndim, const int64_t *dim, error *err) {
    bool good = e->ndim == ndim;
    for (int i = 0; good && i < ndim; i++) good = e->dim[i] == dim[i];
    return good ? 0 : error_input(err, "%s: the shape of %s does not go with that of in.X and in.B", g->path, e->name);
}

static int read_problem(struct golden *g, struct problem *p, error *err) {
    static const char *const names[] = {"in.X", "in.A", "in.B", "in.C", "dy"};
    const struct safetensors_entry **places[] = {&p->X, &p->A, &p->Bm, &p->C, &p->dy};
    for (int i = 0; i < 5; i++)
        if (!(*places[i] = golden_entry(g, names[i], err))) return -1;
    p->S0 = golden_optional(g, "in.S0");
    if (p->X->ndim != 4 || p->Bm->ndim != 4)
        return error_input(err, "%s: in.X and in.B must have four dimensions", g->path);
    *p = (struct problem){.B = p->X->dim[0],
                          .T = p->X->dim[1],
                          .H = p->X->dim[2],
                          .P = p->X->dim[3],
                          .G = p->Bm->dim[2],
                          .N = p->Bm->dim[3],
                          .X = p->X,
                          .A = p->A,
                          .Bm = p->Bm,
                          .C = p->C,
                          .S0 = p->S0,
                          .dy = p->dy};
    if (p->G < 1 || p->H % p->G != 0) return error_input(err, "%s: in.B has %lld groups for %lld heads", g->path,
                                                         (long long)p->G, (long long)p->H);
    TRY(expect_dims(g, p->A, 3, (int64_t[]){p->B, p->T, p->H}, err));
    TRY(expect_dims(g, p->Bm, 4, (int64_t[]){p->B, p->T, p->G, p->N}, err));
    TRY(expect_dims(g, p->C, 4, (int64_t[]){p->B, p->T, p->G, p->N}, err));
    TRY(expect_dims(g, p->dy, 4, (int64_t[]){p->B, p->T, p->H, p->P}, err));
    if (p->S0) TRY(expect_dims(g, p->S0, 5, (int64_t[]){p->B, 1, p->H, p->P, p->N}, err));
    return 0;
}

/* All device memory of a run. */
struct memory {
    tensor x, dt, a, b, c, initial, y, dy, dx, ddt, da, db, dc, dinitial;
    void *saved, *forward_scratch, *backward_scratch;
};

static tensor take(arena *m, enum dtype dtype, int ndim, const int64_t *dim) {
    int64_t count = 1;
    for (int i = 0; i < ndim; i++) count *= dim[i];
    return tensor_reshape(tensor_1d(arena_take(m, (size_t)count * dtype_size(dtype)), dtype, count), ndim, dim);
}

static void carve(struct memory *v, const struct problem *p, const struct ops *ops, int64_t chunk, arena *m) {
    const int64_t x[] = {p->B, p->T, p->H, p->P}, h[] = {p->B, p->T, p->H}, b[] = {p->B, p->T, p->G, p->N};
    const int64_t s[] = {p->B, p->H, p->P, p->N};
    const struct ssd_shape shape = {.B = p->B, .T = p->T, .H = p->H, .P = p->P, .G = p->G, .N = p->N, .Q = chunk};
    tensor *wide[] = {&v->x, &v->y, &v->dy, &v->dx}, *steps[] = {&v->dt, &v->a, &v->ddt, &v->da};
    tensor *inputs[] = {&v->b, &v->c, &v->db, &v->dc}, *states[] = {&v->initial, &v->dinitial};
    for (int i = 0; i < 4; i++) {
        *wide[i] = take(m, ops->act, 4, x);
        *steps[i] = take(m, ops->real, 3, h);
        *inputs[i] = take(m, ops->act, 4, b);
    }
    for (int i = 0; i < 2; i++) *states[i] = p->S0 ? take(m, ops->real, 4, s) : tensor_none();
    v->saved = arena_take(m, ops->ssd_saved(shape));
    v->forward_scratch = arena_take(m, ops->ssd_forward_scratch(shape));
    v->backward_scratch = arena_take(m, ops->ssd_backward_scratch(shape));
}

static void upload(struct golden *g, tensor to, const struct safetensors_entry *e) {
    double *values = golden_inputs(g, e);
    golden_upload(g, to.data, to.dtype, values, tensor_count(to));
    free(values);
}

static void compare(struct golden *g, const char *name, tensor t, int64_t chunk, double limit) {
    char note[32];
    snprintf(note, sizeof note, "chunk %lld", (long long)chunk);
    double *values = malloc((size_t)tensor_count(t) * sizeof *values);
    ASSERT(values != NULL);
    golden_download(g, values, t.data, t.dtype, tensor_count(t));
    golden_compare(g, name, note, values, tensor_count(t), limit);
    free(values);
}

static int run(struct golden *g, const struct problem *p, int64_t chunk, double limit, error *err) {
    const struct ops *ops = g->dev->ops;
    struct memory v;
    arena measured = arena_measure("golden"), m;
    carve(&v, p, ops, chunk, &measured);
    TRY(arena_open(&m, "golden", measured.peak, g->dev->memory, err));
    carve(&v, p, ops, chunk, &m);
    upload(g, v.x, p->X);
    upload(g, v.a, p->A);
    upload(g, v.b, p->Bm);
    upload(g, v.c, p->C);
    upload(g, v.dy, p->dy);
    if (p->S0) upload(g, v.initial, p->S0);
    double *ones = malloc((size_t)tensor_count(v.dt) * sizeof *ones);
    ASSERT(ones != NULL);
    for (int64_t i = 0; i < tensor_count(v.dt); i++) ones[i] = 1;
    golden_upload(g, v.dt.data, v.dt.dtype, ones, tensor_count(v.dt));
    free(ones);

    const tensor none = tensor_none();
    ops->ssd_forward(g->dev, v.y, none, v.saved, v.x, v.dt, v.a, v.b, v.c, none, v.initial, none, chunk,
                     v.forward_scratch);
    ops->ssd_backward(g->dev, v.dx, v.ddt, v.da, v.db, v.dc, v.dinitial, none, v.dy, none, v.saved, v.x, v.dt, v.a, v.b,
                      v.c, none, v.initial, none, chunk, v.backward_scratch);
    int result = device_check(g->dev, err);
    if (result == 0) {
        compare(g, "y", v.y, chunk, limit);
        compare(g, "grad.X", v.dx, chunk, limit);
        compare(g, "grad.A", v.da, chunk, limit);
        compare(g, "grad.B", v.db, chunk, limit);
        compare(g, "grad.C", v.dc, chunk, limit);
        if (p->S0) compare(g, "grad.S0", v.dinitial, chunk, limit);
    }
    arena_close(&m);
    return result;
}

int golden_ssd(struct golden *g, error *err) {
    struct problem p;
    int64_t recorded;
    TRY(read_problem(g, &p, err));
    TRY(json_get_int_or(g->meta, "block_len", g->path, 16, &recorded, err));
    if (recorded < 1) return error_input(err, "%s: block_len in meta is %lld", g->path, (long long)recorded);
    const int64_t chunks[] = {64, recorded, 7};
    for (int i = 0; i < 3; i++) TRY(run(g, &p, chunks[i], golden_limit(g), err));
    return 0;
}
