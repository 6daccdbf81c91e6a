/* test/ops_norm.c: rows of the norms: of the residual stream, gated, and of the heads of an xLSTM. test/ops.h says what
 * a row is. */
#include "test/ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- residual add + norm ------------------------------------------------------------------------------------------ */

/* In millionths. With a row of one element or two and the usual 1e-5, the gradient of a norm is almost nothing, the
 * difference of two equal numbers; and where the gates of a narrow group are all nearly closed, finite differences are
 * taken across a kink. So narrow rows are tested with an eps of 0.3 to 10, wide ones with the usual. */
static double norm_eps(const struct run *r) {
    return (double)param(r, "eps") * 1e-6;
}

static void add_norm_declare(struct run *r) {
    int64_t R = param(r, "R"), D = param(r, "D");
    bool in_place = param(r, "inplace") != 0, next = param(r, "dnext") != 0;
    struct operand *o = input(r, "residual", DIMS(R, D));
    o->type = OPERAND_REAL;
    set_terms(o, 1, D);
    if (in_place && next) o->alias_gradient = "r";
    o = output(r, "r", DIMS(R, D));
    o->type = OPERAND_REAL;
    o->no_gradient = !next;
    if (in_place) o->alias = "residual";
    set_terms(output(r, "y", DIMS(R, D)), D, 1);
    if (param(r, "layer")) set_terms(statistic(r, "mean", DIMS(R)), D, 1);
    else absent(r, "mean");
    set_terms(statistic(r, "rstd", DIMS(R)), D, 1);
    if (param(r, "branch")) {
        o = input(r, "branch", DIMS(R, D));
        set_terms(o, 1, D);
        o->no_gradient = !param(r, "dbranch");
    } else {
        absent(r, "branch");
    }
    o = parameter(r, "weight", DIMS(D));
    o->mean = 1;
    o->spread = 0.3;
    set_terms(o, 1, R + D / 64); /* of normed values, whose statistics are sums that a row's elements share */
    r->backward_scratch = r->ops->add_norm_backward_scratch(R, D);
}

static void add_norm_forward(struct run *r) {
    r->ops->add_norm_forward(r->dev, value(r, "r"), value(r, "y"), value(r, "mean"), value(r, "rstd"),
                             value(r, "residual"), tensor_none(), value(r, "branch"), value(r, "weight"), norm_eps(r));
}

static void add_norm_backward(struct run *r) {
    r->ops->add_norm_backward(r->dev, gradient(r, "residual"), gradient(r, "branch"), gradient(r, "weight"),
                              tensor_none(), gradient(r, "y"), gradient(r, "r"), value(r, "r"), value(r, "mean"),
                              value(r, "rstd"), value(r, "weight"), tensor_none(), r->scratch);
}

static void add_norm_flops(struct run *r, double *forward, double *backward) {
    double elements = (double)param(r, "R") * (double)param(r, "D");
    *forward = 5 * elements;
    *backward = 11 * elements;
}

/* Adding the branch first and calling without one gives the same bits. */
static void add_norm_sum_first(struct run *r) {
    struct operand *sum = operand_find(r, "r"), *y = operand_find(r, "y");
    struct run summed;
    run_open_like(&summed, r, "branch=0 inplace=0");
    memcpy(operand_find(&summed, "residual")->values, sum->values, (size_t)sum->count * sizeof(double));
    run_forward(&summed);
    op_expect(r, memcmp(operand_find(&summed, "y")->values, y->values, (size_t)y->count * sizeof(double)) == 0,
              "y differs when the branch is added before");
    run_close(&summed);
}

/* A LayerNorm doesn't see what is added to all elements of a row. */
static void add_norm_shift(struct run *r) {
    if (!param(r, "layer") || param(r, "D") < 7) return;
    struct operand *in = operand_find(r, "residual"), *y = operand_find(r, "y");
    struct run shifted;
    run_open_like(&shifted, r, "inplace=0");
    double *to = operand_find(&shifted, "residual")->values;
    for (int64_t i = 0; i < in->count; i++) to[i] = in->values[i] + 2;
    run_forward(&shifted);
    op_compare(r, "y of shifted rows", operand_find(&shifted, "y")->values, y->values, y->count, 64 * y->terms);
    run_close(&shifted);
}

static const struct op_row add_norm = {
    .name = "add_norm",
    .parameters = "R=3 D=8 layer=0 branch=1 dbranch=1 dnext=1 inplace=0 eps=10",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 D=7,16 layer=0,1 branch=0,1 dnext=0,1"},
                                       {OP_TEST | OP_GRAD, "R=1,17 D=1,2 branch=0,1 dnext=0,1 eps=1000000"},
                                       {OP_TEST | OP_GRAD, "R=1,17 D=2,3 layer=1 branch=0,1 dnext=0,1 eps=1000000"},
                                       {OP_TEST, "R=0 D=4 layer=0,1"},
                                       {OP_TEST, "R=5,67 D=13,257 branch=0,1 dbranch=0,1 dnext=0,1 inplace=0,1"},
                                       {OP_TEST, "R=5,67 D=257 layer=1 dbranch=0,1 dnext=0,1 inplace=0,1"},
                                       {OP_TEST, "R=1,37 D=64,768 layer=0,1 branch=0,1 dbranch=0,1"},
                                       {OP_TEST, "R=37 D=1028,2560,4096 layer=0,1 dnext=0,1"},
                                       {OP_TEST, "R=1700 D=64,67 layer=0,1"},
                                       {OP_TEST, "R=601 D=1540 layer=0,1"},
                                       {OP_PERF, "R=4096 D=768,2560 layer=0,1 inplace=1 dbranch=0"},
                                       {0, NULL}},
    .declare = add_norm_declare,
    .forward = add_norm_forward,
    .backward = add_norm_backward,
    .flops = add_norm_flops,
    .identities = (const struct op_identity[]){{"branch added before = added inside", add_norm_sum_first},
                                               {"LayerNorm: a shift of a row changes nothing", add_norm_shift},
                                               {NULL, NULL}},
};

/* --- scaled residual + add + norm --------------------------------------------------------------------------------- */

/* Backward's scale is that of the addition above the one whose norm it goes through, so forward makes both: the sum and
 * its norm, then the next sum, scale * r + 0, whose own norm nothing reads. */
static void scaled_norm_declare(struct run *r) {
    int64_t R = param(r, "R"), D = param(r, "D");
    add_norm_declare(r);
    operand_find(r, "r")->no_gradient = true;
    struct operand *o = output(r, "next", DIMS(R, D));
    o->type = OPERAND_REAL;
    o = statistic(r, "next_rstd", DIMS(R));
    set_terms(o, D, 1);
    o = output(r, "next_y", DIMS(R, D));
    o->no_gradient = true;
    set_terms(o, D, 1);
    o = parameter(r, "scale", DIMS(D));
    o->mean = 1;
    o->spread = 0.5;
    set_terms(o, 1, R);
}

static void scaled_norm_forward(struct run *r) {
    add_norm_forward(r);
    r->ops->add_norm_forward(r->dev, value(r, "next"), value(r, "next_y"), tensor_none(), value(r, "next_rstd"),
                             value(r, "r"), value(r, "scale"), tensor_none(), value(r, "weight"), norm_eps(r));
}

static void scaled_norm_backward(struct run *r) {
    r->ops->add_norm_backward(r->dev, gradient(r, "residual"), gradient(r, "branch"), gradient(r, "weight"),
                              gradient(r, "scale"), gradient(r, "y"), gradient(r, "next"), value(r, "r"),
                              value(r, "mean"), value(r, "rstd"), value(r, "weight"), value(r, "scale"), r->scratch);
}

/* A scale of 1 changes no bit. */
static void scaled_norm_by_one(struct run *r) {
    struct run one;
    struct operand *next = operand_find(r, "next"), *sum = operand_find(r, "r");
    run_open_like(&one, r, "");
    double *scale = operand_find(&one, "scale")->values;
    for (int64_t i = 0; i < param(r, "D"); i++) scale[i] = 1;
    run_forward(&one);
    op_expect(r, memcmp(operand_find(&one, "next")->values, sum->values, (size_t)sum->count * sizeof(double)) == 0,
              "next differs from r with a scale of 1");
    run_close(&one);
    scale = operand_find(r, "scale")->values;
    double *want = malloc((size_t)(next->count + 1) * sizeof(double));
    ASSERT(want != NULL);
    for (int64_t i = 0; i < next->count; i++) want[i] = sum->values[i] * scale[i % param(r, "D")];
    op_compare(r, "next", next->values, want, next->count, 1);
    free(want);
}

static const struct op_row scaled_norm = {
    .name = "scaled_norm",
    .parameters = "R=3 D=8 layer=0 branch=1 dbranch=1 dnext=1 inplace=0 eps=10",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 D=7,16 layer=0,1 branch=0,1"},
                                       {OP_TEST, "R=0 D=4 layer=0,1"},
                                       {OP_TEST, "R=5,67 D=13,257 layer=0,1 dbranch=0,1"},
                                       {OP_TEST, "R=37 D=64,768,1028,2560,4096,8192 layer=0,1"},
                                       {OP_TEST, "R=1700 D=64,67 layer=0,1"},
                                       {0, NULL}},
    .declare = scaled_norm_declare,
    .forward = scaled_norm_forward,
    .backward = scaled_norm_backward,
    .identities = (const struct op_identity[]){{"a scale of 1 = none, and scaled is times scale", scaled_norm_by_one},
                                               {NULL, NULL}},
};

/* --- gated RMSNorm ------------------------------------------------------------------------------------------------ */

static void gated_rmsnorm_declare(struct run *r) {
    int64_t R = param(r, "R"), groups = param(r, "groups"), I = groups * param(r, "n");
    set_terms(output(r, "g", DIMS(R, I)), param(r, "n"), 1);
    set_terms(statistic(r, "rstd", DIMS(R, groups)), param(r, "n"), 1);
    /* An element that dominates its group cancels in wdg - xh c, where xh may be sqrt(n) times the rest. */
    set_terms(input(r, "y", DIMS(R, I)), 1, 4 * param(r, "n"));
    struct operand *o = input(r, "z", DIMS(R, I));
    o->lead = 1;
    o->mean = 1;
    o->spread = 2; /* so that the gate is also seen nearly closed */
    set_terms(o, 1, 4 * param(r, "n"));
    o = parameter(r, "weight", DIMS(I));
    o->mean = 1;
    o->spread = 0.3;
    set_terms(o, 1, R + param(r, "n") / 16); /* the statistics are sums that a group's elements share */
    if (param(r, "again")) { /* backward's own g, as the gradient of an input that nothing reads; 2: where dg lies */
        o = input(r, "again", DIMS(R, I));
        set_terms(o, 1, param(r, "n"));
        if (param(r, "again") == 2) o->alias_gradient = "g";
    }
    r->backward_scratch = r->ops->gated_rmsnorm_backward_scratch(R, I);
}

static void gated_rmsnorm_forward(struct run *r) {
    r->ops->gated_rmsnorm_forward(r->dev, value(r, "g"), value(r, "rstd"), value(r, "y"), value(r, "z"),
                                  value(r, "weight"), param(r, "first") != 0, norm_eps(r));
}

static void gated_rmsnorm_backward(struct run *r) {
    tensor again = param(r, "again") ? gradient(r, "again") : tensor_none();
    r->ops->gated_rmsnorm_backward(r->dev, gradient(r, "y"), gradient(r, "z"), gradient(r, "weight"), again,
                                   gradient(r, "g"), value(r, "y"), value(r, "z"), value(r, "rstd"),
                                   value(r, "weight"), param(r, "first") != 0, r->scratch);
}

static void gated_rmsnorm_flops(struct run *r, double *forward, double *backward) {
    double elements = (double)param(r, "R") * (double)param(r, "groups") * (double)param(r, "n");
    *forward = 10 * elements;
    *backward = 25 * elements;
}

/* Copy the columns of group k: from (R, groups*n) to (R, n), or a part of a vector. */
static void group_columns(double *to, const struct operand *from, const double *numbers, int64_t k, int64_t n) {
    int64_t width = from->dim[from->ndim - 1], rows = from->count / width;
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * n, numbers + i * width + k * n, (size_t)n * sizeof(double));
}

/* The row with one group (`change`) gives for each group of n columns what it gave for all of them: g, and the
 * gradients of the operands called names, those that there are. */
static void groups_apart(struct run *r, const char *change, int64_t groups, int64_t n, const char *const *names,
                         int count) {
    int64_t R = param(r, "R");
    double *want = malloc((size_t)(R * n) * sizeof(double));
    ASSERT(want != NULL);
    for (int64_t k = 0; k < groups; k++) {
        struct run one;
        run_open_like(&one, r, change);
        for (int i = 0; i < count; i++) {
            struct operand *whole = operand_find(r, names[i]), *part = operand_find(&one, names[i]);
            if (!whole) continue;
            group_columns(part->values, whole, whole->values, k, n);
            if (part->accumulate) group_columns(part->gradients_before, whole, whole->gradients_before, k, n);
        }
        struct operand *g = operand_find(r, "g"), *g_part = operand_find(&one, "g");
        group_columns(g_part->gradients, g, g->gradients, k, n);
        run_forward(&one);
        run_backward(&one);
        group_columns(want, g, g->values, k, n);
        op_compare(r, "g of one group alone", g_part->values, want, R * n, (double)n);
        for (int i = 0; i < count; i++) {
            struct operand *whole = operand_find(r, names[i]), *part = operand_find(&one, names[i]);
            if (!whole) continue;
            group_columns(want, whole, whole->gradients, k, n);
            op_compare(r, names[i], part->gradients, want, part->count, part->gradient_terms);
        }
        run_close(&one);
    }
    free(want);
}

/* Each group is a norm of its own. */
static void gated_rmsnorm_groups_apart(struct run *r) {
    if (param(r, "groups") == 1 || param(r, "R") == 0) return;
    static const char *const names[] = {"y", "z", "weight"};
    groups_apart(r, "groups=1", param(r, "groups"), param(r, "n"), names, 3);
}

/* The g that backward writes is forward's. */
static void gated_rmsnorm_g_again(struct run *r) {
    struct operand *g = operand_find(r, "g");
    if (!param(r, "again")) return;
    op_expect(r, memcmp(g->values, operand_find(r, "again")->gradients, (size_t)g->count * sizeof(double)) == 0,
              "backward's g is not forward's");
}

static const struct op_row gated_rmsnorm = {
    .name = "gated_rmsnorm",
    .parameters = "R=3 n=8 groups=1 eps=10 strided=0 again=0 first=0",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 n=7,16 groups=1,2,4 eps=300000 strided=0,1"},
                                       {OP_TEST | OP_GRAD, "R=1,17 n=1,2 groups=1,2,4 eps=10000000"},
                                       {OP_TEST, "R=0 n=4"},
                                       {OP_TEST | OP_GRAD, "R=3 n=67 groups=2"},
                                       {OP_TEST, "R=131 n=67 groups=1,2,4 strided=0,1"},
                                       {OP_TEST, "R=1,37 n=64,768 groups=1,2"},
                                       {OP_TEST, "R=37 n=1536,2568,4096"},
                                       {OP_TEST, "R=1700 n=64,67"},
                                       {OP_TEST, "R=601 n=1544"},
                                       {OP_TEST, "R=2,37 n=7,64,1544 groups=1,2 strided=0,1 again=1,2"},
                                       {OP_TEST | OP_GRAD, "R=1,17 n=7,16 groups=1,2 eps=300000 strided=0,1 first=1"},
                                       {OP_TEST, "R=37 n=67,768,2568 groups=1,2 first=1"},
                                       {OP_TEST, "R=2,37 n=7,64,1544 strided=0,1 again=1,2 first=1"},
                                       {OP_PERF, "R=4096 n=1536 strided=1"},
                                       {OP_PERF, "R=4096 n=640 groups=8 strided=1"},
                                       {0, NULL}},
    .declare = gated_rmsnorm_declare,
    .forward = gated_rmsnorm_forward,
    .backward = gated_rmsnorm_backward,
    .flops = gated_rmsnorm_flops,
    .identities = (const struct op_identity[]){{"a group = a norm of its own", gated_rmsnorm_groups_apart},
                                               {"g again = g", gated_rmsnorm_g_again},
                                               {NULL, NULL}},
};

/* --- head norm ---------------------------------------------------------------------------------------------------- */

static void head_norm_declare(struct run *r) {
    int64_t R = param(r, "R"), H = param(r, "H"), P = param(r, "P"), I = H * P;
    set_terms(output(r, "g", DIMS(R, I)), P, 1);
    set_terms(statistic(r, "mean", DIMS(R, H)), P, 1);
    set_terms(statistic(r, "rstd", DIMS(R, H)), P, 1);
    struct operand *o = input(r, "y", DIMS(R, I));
    o->mean = 0.5;
    set_terms(o, 1, 4 * P); /* as for the gated norm */
    o = parameter(r, "weight", DIMS(I));
    o->mean = 1;
    o->spread = 0.3;
    set_terms(o, 1, R + P / 16); /* of normed values, whose statistics are sums that a head's elements share */
    if (param(r, "skip")) {
        input(r, "x", DIMS(R, I))->lead = 1;
        o = parameter(r, "skip", DIMS(I));
        o->mean = 1;
        o->spread = 0.3;
        set_terms(o, 1, R);
    } else {
        absent(r, "x");
        absent(r, "skip");
    }
    if (param(r, "gate")) {
        o = input(r, "z", DIMS(R, I));
        o->lead = 1;
        o->spread = 2; /* so that the gate is also seen nearly closed */
        set_terms(o, 1, 4 * P);
    } else {
        absent(r, "z");
    }
    r->backward_scratch = r->ops->head_norm_backward_scratch(R, I, H);
}

static enum activation head_norm_act(const struct run *r) {
    return param(r, "sigmoid") ? ACTIVATION_SIGMOID : ACTIVATION_SILU;
}

static void head_norm_forward(struct run *r) {
    r->ops->head_norm_forward(r->dev, value(r, "g"), value(r, "mean"), value(r, "rstd"), value(r, "y"),
                              value(r, "weight"), value(r, "x"), value(r, "skip"), value(r, "z"), head_norm_act(r),
                              norm_eps(r));
}

static void head_norm_backward(struct run *r) {
    r->ops->head_norm_backward(r->dev, gradient(r, "y"), gradient(r, "x"), gradient(r, "z"), gradient(r, "weight"),
                               gradient(r, "skip"), gradient(r, "g"), value(r, "y"), value(r, "mean"), value(r, "rstd"),
                               value(r, "weight"), value(r, "x"), value(r, "skip"), value(r, "z"), head_norm_act(r),
                               r->scratch);
}

static void head_norm_flops(struct run *r, double *forward, double *backward) {
    double elements = (double)param(r, "R") * (double)param(r, "H") * (double)param(r, "P");
    *forward = 15 * elements;
    *backward = 30 * elements;
}

/* Each head is a norm of its own. */
static void head_norm_heads_apart(struct run *r) {
    if (param(r, "H") == 1 || param(r, "R") == 0) return;
    static const char *const names[] = {"y", "weight", "x", "skip", "z"};
    groups_apart(r, "H=1", param(r, "H"), param(r, "P"), names, 5);
}

/* One head without skip and gate is LayerNorm. */
static void head_norm_plain(struct run *r) {
    if (param(r, "H") != 1 || param(r, "skip") || param(r, "gate") || param(r, "R") == 0) return;
    struct run norm;
    char changes[64];
    snprintf(changes, sizeof changes, "R=%lld D=%lld eps=%lld layer=1 branch=0 dnext=0", (long long)param(r, "R"),
             (long long)param(r, "P"), (long long)param(r, "eps"));
    run_open_row(&norm, r, &add_norm, changes);
    struct operand *y = operand_find(r, "y"), *weight = operand_find(r, "weight"), *g = operand_find(r, "g");
    memcpy(operand_find(&norm, "residual")->values, y->values, (size_t)y->count * sizeof(double));
    memcpy(operand_find(&norm, "weight")->values, weight->values, (size_t)weight->count * sizeof(double));
    memcpy(operand_find(&norm, "y")->gradients, g->gradients, (size_t)g->count * sizeof(double));
    run_forward(&norm);
    run_backward(&norm);
    op_compare(r, "g of add_norm", operand_find(&norm, "y")->values, g->values, g->count, g->terms);
    op_compare(r, "dy of add_norm", operand_find(&norm, "residual")->gradients, y->gradients, y->count,
               y->gradient_terms);
    run_close(&norm);
}

static const struct op_row head_norm = {
    .name = "head_norm",
    .parameters = "R=3 H=2 P=8 skip=1 gate=1 sigmoid=0 eps=10 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 H=1,3 P=7,16 skip=0,1 gate=0,1 eps=300000"},
                                       {OP_TEST | OP_GRAD, "R=2,17 H=1,3 P=7,16 skip=0,1 sigmoid=1 eps=300000"},
                                       {OP_TEST | OP_GRAD, "R=17 H=1,2 P=2,3 eps=10000000 strided=0,1"},
                                       {OP_TEST | OP_GRAD, "R=5 H=2 P=67 skip=0,1 gate=0,1 strided=1,2"},
                                       {OP_TEST, "R=0 H=2 P=4"},
                                       {OP_TEST, "R=37 H=2,4 P=64,192,256 skip=0,1 gate=0,1 strided=0,2"},
                                       {OP_TEST, "R=37 H=2 P=384,512,1280,2048 skip=0,1 sigmoid=1"},
                                       {OP_TEST, "R=5 H=1 P=4104,8193 skip=0,1 sigmoid=1"},
                                       {OP_TEST, "R=1700 H=2 P=64,67 skip=0,1"},
                                       {OP_PERF, "R=4096 H=4 P=256 skip=0 sigmoid=1"},
                                       {OP_PERF, "R=4096 H=4 P=384 strided=1"},
                                       {0, NULL}},
    .declare = head_norm_declare,
    .forward = head_norm_forward,
    .backward = head_norm_backward,
    .flops = head_norm_flops,
    .identities = (const struct op_identity[]){{"a head = a norm of its own", head_norm_heads_apart},
                                               {"one head alone = LayerNorm", head_norm_plain},
                                               {NULL, NULL}},
};

const struct op_row *const ops_norm_rows[] = {&add_norm, &scaled_norm, &gated_rmsnorm, &head_norm, NULL};
