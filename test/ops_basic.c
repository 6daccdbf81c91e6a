/* test/ops_basic.c: rows of the operations without recurrence: embedding, norms, linear, GLU, head with loss, and
 * the optimizer's passes. test/ops.h says what a row is. */
#include "test/ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Lengths of the sums behind an element of the value and of the gradient. The tolerance measures an element's rounding
 * by its own size and by the rms of its array. An element that is alone, or nearly, has no such company, and if its sum
 * happens to cancel, only a wider allowance is left: eight times. */
static void set_terms(struct operand *o, int64_t value_terms, int64_t gradient_terms) {
    double wider = o->count <= 2 ? 64 : 1;
    o->terms = wider * (double)value_terms;
    o->gradient_terms = wider * (double)gradient_terms;
}

/* --- embedding ---------------------------------------------------------------------------------------------------- */

/* hot: of ten tokens, so many are one and the same. */
static void fill_tokens(struct run *r, struct operand *o) {
    int64_t V = param(r, "V"), hot = param(r, "hot");
    for (int64_t i = 0; i < o->count; i++) {
        int64_t drawn = draw_below(r, o, i, 10 * V);
        o->index[i] = (int32_t)(drawn % 10 < hot ? 2 * V / 3 : drawn / 10);
    }
}

static void embedding_declare(struct run *r) {
    int64_t R = param(r, "R"), D = param(r, "D"), V = param(r, "V");
    output(r, "out", DIMS(R, D))->type = OPERAND_REAL;
    indices(r, "tokens", DIMS(R), fill_tokens);
    set_terms(weight(r, "table", DIMS(V, D)), 1, R);
    r->backward_scratch = r->ops->embedding_backward_scratch(R, D, V);
}

static void embedding_forward(struct run *r) {
    r->ops->embedding_forward(r->dev, value(r, "out"), value(r, "tokens"), value(r, "table"));
}

static void embedding_backward(struct run *r) {
    r->ops->embedding_backward(r->dev, gradient(r, "table"), gradient(r, "out"), value(r, "tokens"),
                               r->scratch);
}

/* Rows of tokens that don't occur keep their gradient to the bit. */
static void embedding_unused_rows(struct run *r) {
    struct operand *table = operand_find(r, "table"), *tokens = operand_find(r, "tokens");
    int64_t V = table->dim[0], D = table->dim[1];
    for (int64_t v = 0; v < V; v++) {
        bool used = false;
        for (int64_t i = 0; i < tokens->count; i++) used |= tokens->index[i] == v;
        size_t row = (size_t)D * sizeof(double);
        op_expect(r, used || memcmp(table->gradients + v * D, table->gradients_before + v * D, row) == 0,
                  "the gradient of row %lld changed, whose token does not occur", (long long)v);
    }
}

static const struct op_row embedding = {
    .name = "embedding",
    .parameters = "R=3 D=8 V=5 hot=0",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 D=1,7,16 V=1,5"},
                                       {OP_TEST, "R=0 D=4 V=3"},
                                       {OP_TEST, "R=311 D=257 V=13,257"},
                                       {OP_TEST, "R=4500 D=4 V=2,512,513 hot=0,2,10"},
                                       {OP_TEST, "R=300 D=4 V=70001,300001 hot=1"},
                                       {OP_TEST, "R=300 D=1028 V=300 hot=5"},
                                       {OP_PERF, "R=4096 D=768 V=257,50288"},
                                       {0, NULL}},
    .declare = embedding_declare,
    .forward = embedding_forward,
    .backward = embedding_backward,
    .identities = (const struct op_identity[]){{"unused rows keep their gradient", embedding_unused_rows},
                                               {NULL, NULL}},
};

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
    set_terms(o, 1, R);
    r->backward_scratch = r->ops->add_norm_backward_scratch(R, D);
}

static void add_norm_forward(struct run *r) {
    r->ops->add_norm_forward(r->dev, value(r, "r"), value(r, "y"), value(r, "mean"), value(r, "rstd"),
                             value(r, "residual"), value(r, "branch"), value(r, "weight"), norm_eps(r));
}

static void add_norm_backward(struct run *r) {
    r->ops->add_norm_backward(r->dev, gradient(r, "residual"), gradient(r, "branch"), gradient(r, "weight"),
                              gradient(r, "y"), gradient(r, "r"), value(r, "r"), value(r, "mean"), value(r, "rstd"),
                              value(r, "weight"), r->scratch);
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

/* --- linear ------------------------------------------------------------------------------------------------------- */

static void linear_declare(struct run *r) {
    int64_t R = param(r, "R"), I = param(r, "I"), O = param(r, "O");
    struct operand *o = output(r, "y", DIMS(R, O));
    o->lead = 1;
    o->type = param(r, "real") ? OPERAND_REAL : OPERAND_ACT;
    o->act_gradient = true;
    set_terms(o, I, 1);
    o = input(r, "x", DIMS(R, I));
    o->lead = 1;
    o->mean = 1; /* x and w: so that a y of one element does not cancel to almost nothing */
    o->accumulate = param(r, "add") != 0;
    o->no_gradient = !param(r, "dx");
    set_terms(o, 1, O);
    o = weight(r, "w", DIMS(O, I));
    o->mean = 1;
    o->spread = 0.5;
    o->no_gradient = !param(r, "dw");
    set_terms(o, 1, R);
    if (param(r, "bias")) set_terms(parameter(r, "bias", DIMS(O)), 1, R);
    else absent(r, "bias");
}

static void linear_forward(struct run *r) {
    r->ops->linear_forward(r->dev, value(r, "y"), value(r, "x"), value(r, "w"), value(r, "bias"));
}

static void linear_backward(struct run *r) {
    r->ops->linear_backward(r->dev, gradient(r, "x"), param(r, "add") != 0, gradient(r, "w"), gradient(r, "bias"),
                            gradient(r, "y"), value(r, "x"), value(r, "w"));
}

static void linear_flops(struct run *r, double *forward, double *backward) {
    double product = 2 * (double)param(r, "R") * (double)param(r, "I") * (double)param(r, "O");
    *forward = product;
    *backward = product * (double)((param(r, "dx") != 0) + (param(r, "dw") != 0));
}

/* The first rows alone give the first rows of y. */
static void linear_rows_apart(struct run *r) {
    if (param(r, "R") < 2) return;
    struct operand *x = operand_find(r, "x"), *y = operand_find(r, "y"), *x_part;
    struct run part;
    char change[32];
    snprintf(change, sizeof change, "R=%lld", (long long)param(r, "R") / 2);
    run_open_like(&part, r, change);
    x_part = operand_find(&part, "x");
    memcpy(x_part->values, x->values, (size_t)x_part->count * sizeof(double));
    run_forward(&part);
    struct operand *y_part = operand_find(&part, "y");
    op_compare(r, "y of the first rows alone", y_part->values, y->values, y_part->count, y->terms);
    run_close(&part);
}

static const struct op_row linear = {
    .name = "linear",
    .parameters = "R=3 I=8 O=5 bias=1 add=0 dx=1 dw=1 real=0 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 I=1,7,16 O=1,5 bias=0,1 strided=0,1"},
                                       {OP_TEST, "R=1,17,131 I=7,64 O=1,8,67 bias=0,1 real=1 strided=0,1"},
                                       {OP_TEST | OP_GRAD, "R=5 I=7 O=3 add=0,1 dx=0,1 dw=0,1 strided=0,1"},
                                       {OP_TEST, "R=0 I=4 O=3"},
                                       {OP_TEST, "R=131 I=257 O=67 bias=0,1 strided=0,1"},
                                       {OP_TEST, "R=1,300 I=513 O=129 bias=0,1"},
                                       {OP_PERF, "R=2048 I=768 O=3352 bias=0"},
                                       {OP_PERF, "R=2048 I=1536 O=768 bias=0"},
                                       {OP_PERF, "R=1 I=768 O=3352 bias=0"},
                                       {0, NULL}},
    .declare = linear_declare,
    .forward = linear_forward,
    .backward = linear_backward,
    .flops = linear_flops,
    .identities = (const struct op_identity[]){{"rows are independent", linear_rows_apart}, {NULL, NULL}},
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
    set_terms(o, 1, R);
    if (param(r, "again")) { /* backward's own g, as the gradient of an input that nothing reads; 2: where dg lies */
        o = input(r, "again", DIMS(R, I));
        set_terms(o, 1, param(r, "n"));
        if (param(r, "again") == 2) o->alias_gradient = "g";
    }
    r->backward_scratch = r->ops->gated_rmsnorm_backward_scratch(R, I);
}

static void gated_rmsnorm_forward(struct run *r) {
    r->ops->gated_rmsnorm_forward(r->dev, value(r, "g"), value(r, "rstd"), value(r, "y"), value(r, "z"),
                                  value(r, "weight"), norm_eps(r));
}

static void gated_rmsnorm_backward(struct run *r) {
    tensor again = param(r, "again") ? gradient(r, "again") : tensor_none();
    r->ops->gated_rmsnorm_backward(r->dev, gradient(r, "y"), gradient(r, "z"), gradient(r, "weight"), again,
                                   gradient(r, "g"), value(r, "y"), value(r, "z"), value(r, "rstd"),
                                   value(r, "weight"), r->scratch);
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

/* Each group is a norm of its own. */
static void gated_rmsnorm_groups_apart(struct run *r) {
    int64_t groups = param(r, "groups"), n = param(r, "n"), R = param(r, "R");
    if (groups == 1 || R == 0) return;
    double *want = malloc((size_t)(R * n) * sizeof(double));
    ASSERT(want != NULL);
    for (int64_t k = 0; k < groups; k++) {
        struct run one;
        run_open_like(&one, r, "groups=1");
        static const char *const names[] = {"y", "z", "weight"};
        for (int i = 0; i < 3; i++) {
            struct operand *whole = operand_find(r, names[i]), *part = operand_find(&one, names[i]);
            group_columns(part->values, whole, whole->values, k, n);
            if (part->accumulate) group_columns(part->gradients_before, whole, whole->gradients_before, k, n);
        }
        struct operand *g = operand_find(r, "g"), *g_part = operand_find(&one, "g");
        group_columns(g_part->gradients, g, g->gradients, k, n);
        run_forward(&one);
        run_backward(&one);
        group_columns(want, g, g->values, k, n);
        op_compare(r, "g of one group alone", g_part->values, want, R * n, (double)n);
        for (int i = 0; i < 3; i++) {
            struct operand *whole = operand_find(r, names[i]), *part = operand_find(&one, names[i]);
            group_columns(want, whole, whole->gradients, k, n);
            op_compare(r, names[i], part->gradients, want, part->count, part->gradient_terms);
        }
        run_close(&one);
    }
    free(want);
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
    .parameters = "R=3 n=8 groups=1 eps=10 strided=0 again=0",
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

/* --- GLU ---------------------------------------------------------------------------------------------------------- */

static enum activation activation(const struct run *r) {
    return (enum activation)param(r, "act");
}

/* The slope of max(v, 0)^2 has a kink at 0, across which no finite difference may be taken. */
static void fill_activated(struct run *r, struct operand *o) {
    for (int64_t i = 0; i < o->count; i++) {
        double v = 3 * draw_normal(r, o, i);
        o->values[i] = fabs(v) < 0.01 ? 0.01 : v;
    }
}

static void glu_declare(struct run *r) {
    int64_t R = param(r, "R"), F = param(r, "F");
    output(r, "h", DIMS(R, F));
    input(r, "u", DIMS(R, param(r, "gated") ? 2 * F : F))->fill = fill_activated;
}

static void glu_forward(struct run *r) {
    r->ops->glu_forward(r->dev, value(r, "h"), value(r, "u"), activation(r));
}

static void glu_backward(struct run *r) {
    r->ops->glu_backward(r->dev, gradient(r, "u"), gradient(r, "h"), value(r, "u"), activation(r));
}

static void glu_flops(struct run *r, double *forward, double *backward) {
    double elements = (double)param(r, "R") * (double)param(r, "F");
    *forward = 7 * elements;
    *backward = 13 * elements;
}

static const struct op_row glu = {
    .name = "glu",
    .parameters = "R=3 F=8 gated=1 act=0",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 F=1,7,16 gated=0,1 act=0,1,2,3"},
                                       {OP_TEST, "R=0 F=4"},
                                       {OP_TEST, "R=131 F=257,264 gated=0,1 act=0,1,2,3"},
                                       {OP_PERF, "R=4096 F=2048 act=0,1"},
                                       {0, NULL}},
    .declare = glu_declare,
    .forward = glu_forward,
    .backward = glu_backward,
    .flops = glu_flops,
};

/* --- head with loss ----------------------------------------------------------------------------------------------- */

/* What is differentiated: sums.nll + sums.z, times HEAD_SCALE. forward computes the losses only, backward runs the
 * operation again with gradients, and puts its sums behind the scratch. */
#define HEAD_SCALE 0.37

static double z_loss_of(const struct run *r) {
    return (double)param(r, "zloss") * 1e-3;
}

/* mask=0: every row has a target; 1: about half; 2: none. */
static void fill_targets(struct run *r, struct operand *o) {
    for (int64_t i = 0; i < o->count; i++) {
        int64_t drawn = draw_below(r, o, i, 2 * param(r, "V"));
        bool masked = param(r, "mask") == 2 || (param(r, "mask") == 1 && drawn % 2 == 0);
        o->index[i] = masked ? (int32_t)(-1 - drawn) : (int32_t)(drawn / 2);
    }
}

static void head_loss_declare(struct run *r) {
    int64_t R = param(r, "R"), D = param(r, "D"), V = param(r, "V");
    struct operand *o = state(r, "sums", DIMS(4));
    o->type = OPERAND_F64;
    o->terms = (double)(R + D + V);
    if (param(r, "losses")) set_terms(statistic(r, "losses", DIMS(R)), D + V, 1);
    else absent(r, "losses");
    o = input(r, "x", DIMS(R, D));
    o->no_gradient = !param(r, "dx");
    set_terms(o, 1, D + V);
    o = weight(r, "w", DIMS(V, D));
    o->no_gradient = !param(r, "dx") || !param(r, "dw");
    set_terms(o, 1, R + D + V);
    o->spread = 3 / sqrt((double)D); /* logits of about 3, so that some probabilities are large */
    indices(r, "targets", DIMS(R), fill_targets);
    r->forward_scratch = r->ops->head_loss_scratch(R, D, V);
    r->backward_scratch = r->forward_scratch + sizeof(struct loss_sums);
}

static void head_loss_forward(struct run *r) {
    r->ops->head_loss(r->dev, value(r, "sums").data, value(r, "losses"), tensor_none(), tensor_none(), value(r, "x"),
                      value(r, "w"), value(r, "targets"), HEAD_SCALE, z_loss_of(r), (double)param(r, "cap"), r->scratch);
}

static void head_loss_backward(struct run *r) {
    char *scratch = r->scratch;
    r->ops->head_loss(r->dev, (struct loss_sums *)(scratch + r->forward_scratch), tensor_none(), gradient(r, "x"),
                      gradient(r, "w"), value(r, "x"), value(r, "w"), value(r, "targets"), HEAD_SCALE, z_loss_of(r),
                      (double)param(r, "cap"), scratch);
}

static double head_loss_scalar(struct run *r) {
    struct operand *sums = operand_find(r, "sums");
    return HEAD_SCALE * (sums->values[0] - sums->values_before[0] + sums->values[1] - sums->values_before[1]);
}

static void head_loss_flops(struct run *r, double *forward, double *backward) {
    double product = 2 * (double)param(r, "R") * (double)param(r, "D") * (double)param(r, "V");
    *forward = product;
    *backward = product * (double)(1 + (param(r, "dx") != 0) + (param(r, "dw") != 0));
}

/* Masked rows change nothing: other values in them leave every result as it is, and their own gradient is 0. */
static void head_loss_masked_rows(struct run *r) {
    int64_t R = param(r, "R"), D = param(r, "D");
    struct operand *targets = operand_find(r, "targets"), *x = operand_find(r, "x"), *w = operand_find(r, "w");
    struct run other;
    run_open_like(&other, r, "");
    for (int64_t i = 0; i < R * D; i++)
        if (targets->index[i / D] < 0) operand_find(&other, "x")->values[i] = 1e30;
    run_forward(&other);
    run_backward(&other);
    op_expect(r, memcmp(operand_find(&other, "sums")->values, operand_find(r, "sums")->values, 4 * sizeof(double)) == 0,
              "the sums depend on masked rows");
    if (x->no_gradient) {
        run_close(&other);
        return;
    }
    for (int64_t i = 0; i < R * D; i++)
        op_expect(r, targets->index[i / D] >= 0 || x->gradients[i] == 0, "dx is not 0 in the masked row %lld",
                  (long long)(i / D));
    op_expect(r, memcmp(operand_find(&other, "x")->gradients, x->gradients, (size_t)x->count * sizeof(double)) == 0,
              "dx depends on masked rows");
    if (!w->no_gradient)
        op_expect(r, memcmp(operand_find(&other, "w")->gradients, w->gradients, (size_t)w->count * sizeof(double)) == 0,
                  "dw depends on masked rows");
    run_close(&other);
}

static const struct op_row head_loss = {
    .name = "head_loss",
    .parameters = "R=3 D=8 V=11 mask=1 zloss=0 cap=0 losses=1 dx=1 dw=1",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 D=1,7 V=1,11 mask=0,1 zloss=0,30"},
                                       {OP_TEST | OP_GRAD, "R=5 D=7 V=11 zloss=30 losses=0,1 dx=0,1 dw=0,1"},
                                       {OP_TEST | OP_GRAD, "R=9 D=8 V=13 mask=2 zloss=30"},
                                       {OP_TEST | OP_GRAD, "R=5 D=7 V=1,13 zloss=0,30 cap=1,4,30"}, /* logits of 3 */
                                       {OP_TEST, "R=67 D=33 V=257,4104 zloss=1 cap=1,30"},
                                       {OP_TEST, "R=0 D=4 V=3"},
                                       {OP_TEST, "R=67,1500 D=33 V=257 mask=0,1 zloss=1"},
                                       {OP_TEST, "R=131 D=13 V=50021 zloss=1"},
                                       {OP_TEST, "R=3 D=8 V=1096,4104,61001 mask=0"},
                                       {OP_TEST, "R=17000 D=3 V=5 zloss=1"},
                                       {OP_PERF, "R=4096 D=256 V=257 mask=0"},
                                       {OP_PERF, "R=512 D=768 V=50288 mask=0"},
                                       {0, NULL}},
    .declare = head_loss_declare,
    .forward = head_loss_forward,
    .backward = head_loss_backward,
    .scalar = head_loss_scalar,
    .flops = head_loss_flops,
    .identities = (const struct op_identity[]){{"masked rows take no part", head_loss_masked_rows}, {NULL, NULL}},
};

/* --- optimizer ---------------------------------------------------------------------------------------------------- */

static void sum_squares_declare(struct run *r) {
    struct operand *o = state(r, "sum", DIMS(1));
    o->type = OPERAND_F64;
    o = input(r, "x", DIMS(param(r, "n")));
    o->type = OPERAND_REAL;
    o->no_gradient = true;
}

static void sum_squares_forward(struct run *r) {
    r->ops->sum_squares(r->dev, value(r, "sum").data, value(r, "x"));
}

static void sum_squares_flops(struct run *r, double *forward, double *backward) {
    *forward = 2 * (double)param(r, "n");
    *backward = 0;
}

static void convert_declare(struct run *r) {
    int64_t n = param(r, "n");
    output(r, "to", DIMS(n))->no_gradient = true;
    struct operand *o = parameter(r, "from", DIMS(n));
    o->no_gradient = true;
}

static void convert_forward(struct run *r) {
    r->ops->convert(r->dev, value(r, "to"), value(r, "from"));
}

static const struct op_row convert = {
    .name = "convert",
    .parameters = "n=5",
    .cases = (const struct op_cases[]){{OP_TEST, "n=0,1,17,1025,100003"}, {OP_PERF, "n=16000000"}, {0, NULL}},
    .declare = convert_declare,
    .forward = convert_forward,
};

static const struct op_row sum_squares = {
    .name = "sum_squares",
    .parameters = "n=8",
    .cases = (const struct op_cases[]){{OP_TEST, "n=0,1,7,1023,1024,1025,100003"}, {OP_PERF, "n=16000000"}, {0, NULL}},
    .declare = sum_squares_declare,
    .forward = sum_squares_forward,
    .flops = sum_squares_flops,
};

enum { ADAMW_GAP = 3 }; /* elements before the first segment and after each, which belong to none */

static void fill_second_moment(struct run *r, struct operand *o) {
    for (int64_t i = 0; i < o->count; i++) o->values_before[i] = 1e-4 * pow(draw_normal(r, o, i), 2);
}

static void adamw_declare(struct run *r) {
    int64_t n = param(r, "n"), count = param(r, "segments"), total = count * (n + ADAMW_GAP) + ADAMW_GAP;
    struct adamw_segment segments[300];
    struct adamw_step step = {.lr = 3e-3, .decay_rate = 2e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                              .grad_scale = 0.25, .correction1 = 1 - pow(0.9, 3), .correction2 = 1 - pow(0.95, 3),
                              .skip = (int32_t)param(r, "skip")};
    ASSERT(count <= 300);
    for (int64_t s = 0; s < count; s++)
        segments[s] = (struct adamw_segment){.offset = ADAMW_GAP + s * (n + ADAMW_GAP), .count = n,
                                             .decay = s % 2 ? 0 : 0.1f, .lr_scale = s % 3 ? 1 : 0.5f,
                                             .clamp_min = -0.5f, .clamp_max = 0.75f, .clamped = s % 4 == 2};
    state(r, "p", DIMS(total));
    state(r, "m", DIMS(total))->spread = 0.01;
    state(r, "v", DIMS(total))->fill = fill_second_moment;
    struct operand *g = input(r, "g", DIMS(total));
    g->type = OPERAND_REAL;
    g->spread = 0.05;
    g->no_gradient = true;
    if (param(r, "rounded")) state(r, "rounded", DIMS(total))->type = OPERAND_ACT;
    else absent(r, "rounded");
    bytes(r, "segments", segments, (size_t)count * sizeof *segments);
    bytes(r, "step", &step, sizeof step);
}

static void adamw_forward(struct run *r) {
    struct adamw_slice slice = {value(r, "p"), value(r, "m"), value(r, "v"), value(r, "g"), value(r, "rounded"),
                                host_bytes(r, "segments"), param(r, "segments")};
    r->ops->adamw(r->dev, &slice, 1, value(r, "step").data);
}

static void adamw_flops(struct run *r, double *forward, double *backward) {
    *forward = 16 * (double)param(r, "n") * (double)param(r, "segments");
    *backward = 0;
}

/* What belongs to no segment keeps its bits, and with skip everything does. */
static void adamw_untouched(struct run *r) {
    static const char *const names[] = {"p", "m", "v", "rounded"};
    int64_t period = param(r, "n") + ADAMW_GAP;
    for (int k = 0; k < 3 + (param(r, "rounded") != 0); k++) {
        struct operand *o = operand_find(r, names[k]);
        for (int64_t i = 0; i < o->count; i++)
            op_expect(r, o->values[i] == o->values_before[i] || (i % period >= ADAMW_GAP && !param(r, "skip")),
                      "%s[%lld] changed, which %s", names[k], (long long)i,
                      param(r, "skip") ? "a skipped step must not do" : "no segment covers");
    }
}

static const struct op_row adamw = {
    .name = "adamw",
    .parameters = "n=5 segments=3 skip=0 rounded=1",
    .cases = (const struct op_cases[]){{OP_TEST, "n=0,1,16,257 segments=1,7 skip=0,1"},
                                       {OP_TEST, "n=40009 segments=1,2 rounded=0,1"},
                                       {OP_TEST, "n=21 segments=300"},
                                       {OP_PERF, "n=4000000 segments=4"},
                                       {0, NULL}},
    .declare = adamw_declare,
    .forward = adamw_forward,
    .flops = adamw_flops,
    .identities = (const struct op_identity[]){{"the rest is left alone", adamw_untouched}, {NULL, NULL}},
};

/* The structs of a step as the doubles that they are made of; whole numbers in them are compared by the identity. */
enum { STEP_DOUBLES = sizeof(struct adamw_step) / 8, REPORT_DOUBLES = sizeof(struct step_report) / 8 };

static void fill_totals(struct run *r, struct operand *o) {
    for (int64_t i = 0; i < o->count; i++) o->values[i] = 1 + draw_uniform(r, o, i);
    if (param(r, "skip")) o->values[2] = -1; /* as if there were no valid target, in numbers that can be compared */
    o->values[4] *= param(r, "large") ? 1e4 : 1e-4; /* squares */
}

static void fill_rates(struct run *r, struct operand *o) {
    for (int64_t i = 0; i < o->count; i++) o->values[i] = 1e-3 * (1 + draw_uniform(r, o, i));
}

/* A count as a double is so small a number that rounding it for a table in float leaves nothing: it begins at 0. */
static void fill_steps(struct run *r, struct operand *o) {
    (void)r;
    o->values[0] = 0;
}

static void step_scalars_operand(struct operand *o, void (*fill)(struct run *r, struct operand *o)) {
    o->type = OPERAND_F64;
    o->no_gradient = true;
    o->fill = fill;
}

static void step_scalars_declare(struct run *r) {
    step_scalars_operand(output(r, "step", DIMS(STEP_DOUBLES)), NULL);
    step_scalars_operand(output(r, "report", DIMS(REPORT_DOUBLES)), NULL);
    step_scalars_operand(state(r, "steps", DIMS(1)), fill_steps);
    step_scalars_operand(input(r, "totals", DIMS(sizeof(struct step_totals) / 8)), fill_totals);
    step_scalars_operand(input(r, "rates", DIMS(2)), fill_rates);
}

static void step_scalars_forward(struct run *r) {
    struct step_rule rule = {.scale = 0.125, .clip = param(r, "clip") ? 0.5 : 0, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8};
    r->ops->step_scalars(r->dev, value(r, "step").data, value(r, "report").data, value(r, "steps").data,
                         value(r, "totals").data, value(r, "rates").data, &rule);
}

static void step_scalars_decision(struct run *r) {
    struct adamw_step step;
    struct step_report report;
    int64_t steps;
    memcpy(&step, operand_find(r, "step")->values, sizeof step);
    memcpy(&report, operand_find(r, "report")->values, sizeof report);
    memcpy(&steps, operand_find(r, "steps")->values, sizeof steps);
    bool skip = param(r, "skip") != 0, clipped = param(r, "clip") && param(r, "large") && !skip;
    op_expect(r, step.skip == skip && report.skipped == skip, "a step is %s", skip ? "not skipped" : "skipped");
    op_expect(r, steps == !skip && report.steps == steps, "%lld steps are counted", (long long)steps);
    double mean = 1 / (0.125 * report.totals.loss.valid), norm = step.grad_scale / mean * report.grad_norm;
    op_expect(r, skip || fabs(norm / (clipped ? 0.5 : report.grad_norm) - 1) < 1e-5, "the norm is clipped to %g", norm);
}

static const struct op_row step_scalars = {
    .name = "step_scalars",
    .parameters = "skip=0 large=0 clip=1",
    .cases = (const struct op_cases[]){{OP_TEST, "skip=0,1 large=0,1 clip=0,1"}, {0, NULL}},
    .declare = step_scalars_declare,
    .forward = step_scalars_forward,
    .identities = (const struct op_identity[]){{"the decision", step_scalars_decision}, {NULL, NULL}},
};

const struct op_row *const ops_basic_rows[] = {&embedding, &add_norm, &linear,      &gated_rmsnorm, &glu,
                                               &head_loss, &convert, &sum_squares, &step_scalars, &adamw, NULL};
