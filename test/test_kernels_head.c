/* test/test_kernels_head.c: the head with its loss on the CPU against all logits of a row at once, in long double;
 * ties, large logits, masked rows, a tied table, numbers that are not finite. */
#include "test/unit_kernels.h"

struct head_case {
    int64_t R, D, V;
    double scale, z_loss, cap;
    int mask; /* every mask-th row has no target; 0: none is masked; 1: all */
};

struct head_operands {
    tensor x, w, dx, dw, dw_before, losses;
    int32_t *targets;
    void *scratch;
};

static struct head_operands head_open(struct device *dev, const struct head_case *c) {
    struct head_operands o = {
        .x = random_matrix(dev, c->R, c->D, 1, 2), .w = random_matrix(dev, c->V, c->D, 2, 1),
        .dx = random_matrix(dev, c->R, c->D, 3, 1), .dw = random_matrix(dev, c->V, c->D, 4, 1),
        .dw_before = random_matrix(dev, c->V, c->D, 4, 1), .losses = random_vector(dev, c->R, 5, 1),
        .targets = must_allocate((size_t)c->R * sizeof(int32_t)),
        .scratch = must_allocate(dev->ops->head_loss_scratch(c->R, c->D, c->V)),
    };
    for (int64_t r = 0; r < c->R; r++) {
        o.targets[r] = (int32_t)((double)c->V * (uniform(6, r) + 1) / 2);
        if (c->mask && r % c->mask == 0) o.targets[r] = -100;
    }
    return o;
}

static void head_close(struct head_operands *o) {
    free(o->x.data);
    free(o->w.data);
    free(o->dx.data);
    free(o->dw.data);
    free(o->dw_before.data);
    free(o->losses.data);
    free(o->targets);
    free(o->scratch);
}

/* One row by the definition: dlogits, and its part of the sums. */
static struct loss_sums reference_row(const struct head_case *c, const struct head_operands *o, int64_t r,
                                      long double *dlogits) {
    long double most = -INFINITY, sum = 0, cap = c->cap;
    int64_t argmax = 0, target = o->targets[r];
    for (int64_t v = 0; v < c->V; v++) {
        dlogits[v] = 0;
        for (int64_t i = 0; i < c->D; i++)
            dlogits[v] += (long double)get(o->x, r * c->D + i) * (long double)get(o->w, v * c->D + i);
        if (cap > 0) dlogits[v] = cap * tanhl(dlogits[v] / cap);
        if (dlogits[v] > most) {
            most = dlogits[v];
            argmax = v;
        }
    }
    long double at_target = dlogits[target];
    for (int64_t v = 0; v < c->V; v++) sum += expl(dlogits[v] - most);
    long double lse = most + logl(sum);
    for (int64_t v = 0; v < c->V; v++) {
        long double p = expl(dlogits[v] - lse), slope = cap > 0 ? 1 - dlogits[v] / cap * (dlogits[v] / cap) : 1;
        dlogits[v] = c->scale * (p - (v == target) + 2 * c->z_loss * lse * p) * slope;
    }
    return (struct loss_sums){(double)(lse - at_target), (double)(c->z_loss * lse * lse), 1, argmax == target};
}

/* dx (R,D), and dw (V,D) = dw_before + ..., by the definition, with all logits of a row in memory. */
static struct loss_sums reference(const struct head_case *c, const struct head_operands *o, long double *dx,
                                  long double *dw, double *losses) {
    struct loss_sums sums = {0};
    long double *dlogits = must_allocate((size_t)c->V * sizeof *dlogits);
    memset(dx, 0, (size_t)(c->R * c->D) * sizeof *dx);
    for (int64_t i = 0; i < c->V * c->D; i++) dw[i] = get(o->dw_before, i);
    for (int64_t r = 0; r < c->R; r++) {
        losses[r] = 0;
        if (o->targets[r] < 0) continue;
        struct loss_sums one = reference_row(c, o, r, dlogits);
        losses[r] = one.nll;
        sums = (struct loss_sums){sums.nll + one.nll, sums.z + one.z, sums.valid + 1, sums.correct + one.correct};
        for (int64_t v = 0; v < c->V; v++)
            for (int64_t i = 0; i < c->D; i++) {
                dx[r * c->D + i] += dlogits[v] * (long double)get(o->w, v * c->D + i);
                dw[v * c->D + i] += dlogits[v] * (long double)get(o->x, r * c->D + i);
            }
    }
    free(dlogits);
    return sums;
}

static void check_head(struct device *dev, const struct head_case *c) {
    struct head_operands o = head_open(dev, c);
    long double *dx = must_allocate((size_t)(c->R * c->D) * sizeof *dx);
    long double *dw = must_allocate((size_t)(c->V * c->D) * sizeof *dw);
    double *losses = must_allocate((size_t)c->R * sizeof *losses), unit = unit_of(dev);
    struct loss_sums want = reference(c, &o, dx, dw, losses), got = {10, 20, 30, 40}, only = {0};
    tensor targets = tensor_1d(o.targets, DTYPE_I32, c->R), none = tensor_none();

    dev->ops->head_loss(dev, &got, o.losses, o.dx, o.dw, o.x, o.w, targets, c->scale, c->z_loss, c->cap, o.scratch);
    dev->ops->head_loss(dev, &only, none, none, none, o.x, o.w, targets, c->scale, c->z_loss, c->cap, o.scratch);
    double share = 100 * unit * sqrt((double)(c->V + c->R));
    assert_close(got.nll - 10, want.nll, share, share, "nll", 0);
    assert_close(got.z - 20, want.z, share, share, "z", 0);
    assert_true(got.valid - 30 == want.valid && got.correct - 40 == want.correct);
    assert_close(only.nll, want.nll, share, share, "nll without gradients", 0);
    assert_close(only.z, want.z, share, share, "z without gradients", 0);
    assert_true(only.valid == want.valid && only.correct == want.correct);
    for (int64_t r = 0; r < c->R; r++) assert_close(get(o.losses, r), losses[r], share, share, "losses", r);
    for (int64_t i = 0; i < c->R * c->D; i++)
        assert_close(get(o.dx, i), (double)dx[i], share, share * c->scale, "dx", i);
    for (int64_t i = 0; i < c->V * c->D; i++)
        assert_close(get(o.dw, i), (double)dw[i], share, share * c->scale, "dw", i);
    free(dx);
    free(dw);
    free(losses);
    head_close(&o);
}

static void test_head_loss(void **state) {
    (void)state;
    static const struct head_case cases[] = {
        {.R = 1, .D = 1, .V = 1, .scale = 1, .z_loss = 0.1},
        {.R = 7, .D = 5, .V = 13, .scale = 0.25, .z_loss = 0, .mask = 3},
        {.R = 7, .D = 5, .V = 13, .scale = 0.25, .z_loss = 0.02, .mask = 2},
        {.R = 9, .D = 8, .V = 11, .scale = 3, .z_loss = 0.02, .mask = 1},
        {.R = 7, .D = 5, .V = 13, .scale = 0.25, .z_loss = 0.02, .cap = 2, .mask = 3}, /* half the logits beyond it */
        {.R = 9, .D = 8, .V = 300, .scale = 3, .z_loss = 0, .cap = 30},
        {.R = 1237, .D = 6, .V = 257, .scale = 1e-3, .z_loss = 1e-4, .mask = 5}, /* more rows than a tile */
        {.R = 180, .D = 2, .V = 50021, .scale = 1e-2, .z_loss = 1e-4}, /* more rows than the bytes of a tile allow */
    };
    for (int p = 0; p < 2; p++) {
        struct device *dev = open_cpu(p ? PRECISION_F64 : PRECISION_F32);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
            if (p == 1 || cases[i].V < 10000) check_head(dev, &cases[i]); /* the large one takes seconds */
        device_close(dev);
    }
}

/* Rows of w that are equal give equal logits: only the lowest index counts as the argmax. */
static void test_head_ties(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    float x[3 * 2] = {1, 0, 1, 0, 1, 0}, w[4 * 2] = {0, 0, 2, 5, 2, -5, 1, 0};
    int32_t targets[3] = {1, 2, 3};
    struct loss_sums sums = {0};
    void *scratch = must_allocate(dev->ops->head_loss_scratch(3, 2, 4));
    dev->ops->head_loss(dev, &sums, tensor_none(), tensor_none(), tensor_none(), tensor_2d(x, DTYPE_F32, 3, 2),
                        tensor_2d(w, DTYPE_F32, 4, 2), tensor_1d(targets, DTYPE_I32, 3), 1, 0, 0, scratch);
    assert_true(sums.valid == 3 && sums.correct == 1);
    free(scratch);
    device_close(dev);
}

/* Logits of hundreds and thousands: the largest is subtracted before exp, so nothing overflows. */
static void test_head_large_logits(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    float x[2] = {1000, -1000}, w[3] = {1, 2, 2.5f}, losses[2], dx[2];
    int32_t targets[2] = {2, 2};
    struct loss_sums sums = {0};
    void *scratch = must_allocate(dev->ops->head_loss_scratch(2, 1, 3));
    dev->ops->head_loss(dev, &sums, tensor_1d(losses, DTYPE_F32, 2), tensor_2d(dx, DTYPE_F32, 2, 1), tensor_none(),
                        tensor_2d(x, DTYPE_F32, 2, 1), tensor_2d(w, DTYPE_F32, 3, 1), tensor_1d(targets, DTYPE_I32, 2),
                        1, 0, 0, scratch);
    assert_true(losses[0] == 0 && losses[1] == 1500);
    assert_true(dx[0] == 0 && dx[1] == 1 - 2.5f);
    free(scratch);
    device_close(dev);
}

/* Logits far beyond the cap all become the cap: equal, so that the first of them is the argmax, without a gradient. */
static void test_head_capped_extremes(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F32);
    float x[2] = {1000, -1000}, w[3] = {1, 2, 2.5f}, losses[2], dx[2];
    int32_t targets[2] = {2, 0};
    struct loss_sums sums = {0};
    void *scratch = must_allocate(dev->ops->head_loss_scratch(2, 1, 3));
    dev->ops->head_loss(dev, &sums, tensor_1d(losses, DTYPE_F32, 2), tensor_2d(dx, DTYPE_F32, 2, 1), tensor_none(),
                        tensor_2d(x, DTYPE_F32, 2, 1), tensor_2d(w, DTYPE_F32, 3, 1), tensor_1d(targets, DTYPE_I32, 2),
                        1, 0, 30, scratch);
    for (int i = 0; i < 2; i++) assert_close(losses[i], log(3), 1e-6, 0, "losses", i);
    assert_true(dx[0] == 0 && dx[1] == 0 && sums.correct == 1);
    free(scratch);
    device_close(dev);
}

/* Scratch is a tile: it must not grow with the number of rows, nor hold R x V logits. */
static void test_head_scratch(void **state) {
    (void)state;
    for (int t = 0; t < 2; t++) {
        const struct ops *ops = t ? &ops_cpu_f64 : &ops_cpu_f32;
        assert_true(ops->head_loss_scratch(1 << 20, 768, 50288) == ops->head_loss_scratch(4096, 768, 50288));
        assert_true(ops->head_loss_scratch(1 << 20, 768, 50288) < (size_t)80 << 20);
        assert_true(ops->head_loss_scratch(1 << 20, 256, 257) < (size_t)16 << 20);
        assert_true(ops->head_loss_scratch(1, 8, 257) < 8192);
    }
}

/* A NaN in one row of x makes that row's loss and gradient NaN, and the total; it does not spread to others. */
static void test_head_not_finite(void **state) {
    (void)state;
    for (int p = 0; p < 2; p++) {
        struct device *dev = open_cpu(p ? PRECISION_F64 : PRECISION_F32);
        struct head_case c = {.R = 5, .D = 4, .V = 37, .scale = 1, .z_loss = 1e-3};
        struct head_operands o = head_open(dev, &c);
        struct loss_sums sums = {0};
        set(o.x, 1 * c.D + 2, NAN);
        set(o.x, 3 * c.D + 1, INFINITY);
        dev->ops->head_loss(dev, &sums, o.losses, o.dx, o.dw, o.x, o.w, tensor_1d(o.targets, DTYPE_I32, c.R), 1,
                            c.z_loss, 0, o.scratch);
        assert_true(isnan(sums.nll) && isnan(sums.z));
        for (int64_t r = 0; r < c.R; r++) {
            bool sick = r == 1 || r == 3;
            assert_true(isfinite(get(o.losses, r)) == !sick);
            assert_true(isfinite(get(o.dx, r * c.D)) == !sick);
        }
        assert_true(isnan(get(o.dw, 0)));
        head_close(&o);
        device_close(dev);
    }
}

/* A tied table gets its gradient from the head, then from the embedding, onto what is there. */
static void test_tied_gradient(void **state) {
    (void)state;
    struct device *dev = open_cpu(PRECISION_F64);
    struct head_case c = {.R = 6, .D = 3, .V = 5, .scale = 1, .z_loss = 0};
    struct head_operands o = head_open(dev, &c);
    tensor tokens = tensor_1d(o.targets, DTYPE_I32, c.R), apart = random_matrix(dev, c.V, c.D, 0, 0);
    struct loss_sums sums = {0};
    dev->ops->head_loss(dev, &sums, tensor_none(), o.dx, apart, o.x, o.w, tokens, 1, 0, 0, o.scratch);
    dev->ops->embedding_backward(dev, apart, o.dx, tokens, NULL);
    dev->ops->head_loss(dev, &sums, tensor_none(), o.dx, o.dw, o.x, o.w, tokens, 1, 0, 0, o.scratch);
    dev->ops->embedding_backward(dev, o.dw, o.dx, tokens, NULL);
    for (int64_t i = 0; i < c.V * c.D; i++)
        assert_close(get(o.dw, i), get(o.dw_before, i) + get(apart, i), 1e-14, 1e-14, "dw", i);
    free(apart.data);
    head_close(&o);
    device_close(dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_loss),
        cmocka_unit_test(test_head_ties),
        cmocka_unit_test(test_head_large_logits),
        cmocka_unit_test(test_head_capped_extremes),
        cmocka_unit_test(test_head_scratch),
        cmocka_unit_test(test_head_not_finite),
        cmocka_unit_test(test_tied_gradient),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
