/* test/golden_mlstm.c: files op-mlstm*: the mLSTM with an exponential input gate, op-mlstm-siging* with a sigmoid one;
 * both with the normaliser, its gradient included.
 *
 *   in.q and in.k (B,H,T,K), in.v (B,H,T,V), in.i and in.f (B,H,T); y and dy (B,H,T,V); grad.*
 *
 * The operation wants tokens before heads, so the host swaps the two. Run with three chunk lengths: one that divides
 * nothing, one in the middle, one that is longer than the sequence.
 */
#include "test/golden.h"

#include "common/arena.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ARGUMENTS = 5 };
static const char *const input_names[ARGUMENTS] = {"in.q", "in.k", "in.v", "in.i", "in.f"};
static const char *const gradient_names[ARGUMENTS] = {"grad.q", "grad.k", "grad.v", "grad.i", "grad.f"};

struct problem {
    struct mlstm_shape s; /* Q is set from run to run */
    struct mlstm_rule rule;
    const struct safetensors_entry *in[ARGUMENTS], *dy;
};

/* Elements of one head of one token: of an argument, or of y where a is -1. */
static int64_t width(const struct problem *p, int a) {
    return a < 0 || a == 2 ? p->s.V : a < 2 ? p->s.K : 1;
}

static int expect_dims(struct golden *g, const struct problem *p, const struct safetensors_entry *e, int a,
                       error *err) {
    const int64_t dim[] = {p->s.B, p->s.H, p->s.T, width(p, a)};
    bool good = e->ndim == (a > 2 ? 3 : 4);
    for (int i = 0; good && i < e->ndim; i++) good = e->dim[i] == dim[i];
    return good ? 0 : error_input(err, "%s: the shape of %s does not go with that of in.q and in.v", g->path, e->name);
}

static int read_problem(struct golden *g, struct problem *p, error *err) {
    *p = (struct problem){0};
    for (int a = 0; a < ARGUMENTS; a++)
        if (!(p->in[a] = golden_entry(g, input_names[a], err))) return -1;
    if (!(p->dy = golden_entry(g, "dy", err))) return -1;
    const struct safetensors_entry *q = p->in[0], *v = p->in[2];
    if (q->ndim != 4 || v->ndim != 4) return error_input(err, "%s: in.q and in.v must have four dimensions", g->path);
    p->s = (struct mlstm_shape){.B = q->dim[0], .H = q->dim[1], .T = q->dim[2], .K = q->dim[3], .V = v->dim[3]};
    for (int a = 0; a < ARGUMENTS; a++) TRY(expect_dims(g, p, p->in[a], a, err));
    TRY(expect_dims(g, p, p->dy, -1, err));
    p->rule.sigmoid_input = strncmp(g->base, "op-mlstm-siging", 15) == 0;
    p->rule.normalise = true;
    return json_get_real_or(g->meta, "eps", g->path, 1e-6, &p->rule.eps, err);
}

/* All device memory of a run. */
struct memory {
    tensor in[ARGUMENTS], gradient[ARGUMENTS], y, dy;
    void *saved, *forward_scratch, *backward_scratch;
};

static tensor take(const struct problem *p, enum dtype dtype, int a, arena *m) {
    int64_t count = p->s.B * p->s.T * p->s.H * width(p, a);
    void *data = arena_take(m, (size_t)count * dtype_size(dtype));
    return a > 2 ? tensor_3d(data, dtype, p->s.B, p->s.T, p->s.H)
                 : tensor_4d(data, dtype, p->s.B, p->s.T, p->s.H, width(p, a));
}

static void carve(struct memory *v, const struct problem *p, const struct ops *ops, arena *m) {
    for (int a = 0; a < ARGUMENTS; a++) {
        v->in[a] = take(p, a > 2 ? ops->real : ops->act, a, m);
        v->gradient[a] = take(p, a > 2 ? ops->real : ops->act, a, m);
    }
    v->y = take(p, ops->act, -1, m);
    v->dy = take(p, ops->act, -1, m);
    v->saved = arena_take(m, ops->mlstm_saved(p->s));
    v->forward_scratch = arena_take(m, ops->mlstm_forward_scratch(p->s));
    v->backward_scratch = arena_take(m, ops->mlstm_backward_scratch(p->s));
}

/* A copy of (b, n, m, w) as (b, m, n, w). The caller frees. */
static double *swapped(const double *from, int64_t b, int64_t n, int64_t m, int64_t w) {
    double *to = malloc((size_t)(b * n * m * w) * sizeof *to);
    ASSERT(to != NULL);
    for (int64_t i = 0; i < b * n * m; i++) {
        int64_t batch = i / (n * m), row = i / m % n, column = i % m;
        memcpy(to + ((batch * m + column) * n + row) * w, from + i * w, (size_t)w * sizeof *to);
    }
    return to;
}

static void upload(struct golden *g, const struct problem *p, tensor to, const struct safetensors_entry *e, int a) {
    double *values = golden_inputs(g, e), *ordered = swapped(values, p->s.B, p->s.H, p->s.T, width(p, a));
    golden_upload(g, to.data, to.dtype, ordered, tensor_count(to));
    free(values);
    free(ordered);
}

static void compare(struct golden *g, const struct problem *p, const char *name, tensor t, int a, double limit) {
    char note[32];
    snprintf(note, sizeof note, "chunk %lld", (long long)p->s.Q);
    double *values = malloc((size_t)tensor_count(t) * sizeof *values);
    ASSERT(values != NULL);
    golden_download(g, values, t.data, t.dtype, tensor_count(t));
    double *ordered = swapped(values, p->s.B, p->s.T, p->s.H, width(p, a));
    golden_compare(g, name, note, ordered, tensor_count(t), limit);
    free(values);
    free(ordered);
}

static int run(struct golden *g, const struct problem *p, double limit, error *err) {
    const struct ops *ops = g->dev->ops;
    const struct mlstm_state none = {tensor_none(), tensor_none(), tensor_none()};
    struct memory v;
    arena measured = arena_measure("golden"), m;
    carve(&v, p, ops, &measured);
    TRY(arena_open(&m, "golden", measured.peak, g->dev->memory, err));
    carve(&v, p, ops, &m);
    for (int a = 0; a < ARGUMENTS; a++) upload(g, p, v.in[a], p->in[a], a);
    upload(g, p, v.dy, p->dy, -1);

    ops->mlstm_forward(g->dev, v.y, none, v.saved, v.in[0], v.in[1], v.in[2], v.in[3], v.in[4], none, tensor_none(),
                       p->rule, p->s.Q, v.forward_scratch);
    ops->mlstm_backward(g->dev, v.gradient[0], v.gradient[1], v.gradient[2], v.gradient[3], v.gradient[4], none, v.dy,
                        none, v.saved, v.y, v.in[0], v.in[1], v.in[2], v.in[3], v.in[4], none, tensor_none(), p->rule,
                        p->s.Q, v.backward_scratch);
    int result = device_check(g->dev, err);
    if (result == 0) compare(g, p, "y", v.y, -1, limit);
    for (int a = 0; result == 0 && a < ARGUMENTS; a++) compare(g, p, gradient_names[a], v.gradient[a], a, limit);
    arena_close(&m);
    return result;
}

int golden_mlstm(struct golden *g, error *err) {
    struct problem p;
    TRY(read_problem(g, &p, err));
    const int64_t chunks[] = {7, 16, 64};
    for (int i = 0; i < 3; i++) {
        p.s.Q = chunks[i];
        TRY(run(g, &p, golden_limit(g), err));
    }
    return 0;
}
