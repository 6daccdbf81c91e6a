/* test/ops_basic.c: rows of the operations without recurrence: embedding, linear, GLU, head with loss, and the
 * optimizer's passes. test/ops.h says what a row is. */
#include "test/ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    o->accumulate = param(r, "dw") == 1; /* 2: nothing is there yet */
    set_terms(o, 1, R);
    if (param(r, "bias")) set_terms(parameter(r, "bias", DIMS(O)), 1, R);
    else absent(r, "bias");
}

static void linear_forward(struct run *r) {
    r->ops->linear_forward(r->dev, value(r, "y"), value(r, "x"), value(r, "w"), value(r, "bias"));
}

static void linear_backward(struct run *r) {
    tensor dw = gradient(r, "w");
    dw.empty = param(r, "dw") == 2;
    r->ops->linear_backward(r->dev, gradient(r, "x"), param(r, "add") != 0, dw, gradient(r, "bias"), gradient(r, "y"),
                            value(r, "x"), value(r, "w"));
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
                                       {OP_TEST | OP_GRAD, "R=5 I=7 O=3 add=0,1 dx=0,1 dw=0,1,2 strided=0,1"},
                                       {OP_TEST, "R=0 I=4 O=3 dw=1,2"},
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

/* --- block-diagonal linear ---------------------------------------------------------------------------------------- */

static void block_linear_declare(struct run *r) {
    int64_t R = param(r, "R"), G = param(r, "G"), I = param(r, "I"), O = param(r, "O");
    struct operand *o = output(r, "y", DIMS(R, G * O));
    o->lead = 1;
    set_terms(o, I, 1);
    o = input(r, "x", DIMS(R, G * I));
    o->lead = 1;
    o->mean = 1; /* x and w: as for linear */
    o->accumulate = param(r, "add") != 0;
    set_terms(o, 1, O);
    o = weight(r, "w", DIMS(G, O, I));
    o->mean = 1;
    o->spread = 0.5;
    set_terms(o, 1, R);
    r->backward_scratch = r->ops->block_linear_backward_scratch(R, G, O, I);
}

static void block_linear_forward(struct run *r) {
    r->ops->block_linear_forward(r->dev, value(r, "y"), value(r, "x"), value(r, "w"));
}

static void block_linear_backward(struct run *r) {
    r->ops->block_linear_backward(r->dev, gradient(r, "x"), param(r, "add") != 0, gradient(r, "w"), gradient(r, "y"),
                                  value(r, "x"), value(r, "w"), r->scratch);
}

static void block_linear_flops(struct run *r, double *forward, double *backward) {
    *forward = 2 * (double)param(r, "R") * (double)param(r, "G") * (double)param(r, "I") * (double)param(r, "O");
    *backward = 2 * *forward;
}

/* The block-diagonal matrix, written out, in a linear gives the same y and dx. */
static void block_linear_written_out(struct run *r) {
    int64_t G = param(r, "G"), I = param(r, "I"), O = param(r, "O");
    if (G * O * G * I > 1 << 20 || param(r, "add")) return;
    struct operand *w = operand_find(r, "w"), *x = operand_find(r, "x"), *y = operand_find(r, "y"), *to;
    struct run whole;
    char changes[96];
    snprintf(changes, sizeof changes, "R=%lld I=%lld O=%lld bias=0", (long long)param(r, "R"), (long long)(G * I),
             (long long)(G * O));
    run_open_row(&whole, r, &linear, changes);
    to = operand_find(&whole, "w");
    memset(to->values, 0, (size_t)to->count * sizeof(double));
    for (int64_t g = 0; g < G; g++)
        for (int64_t o = 0; o < O; o++)
            memcpy(to->values + (g * O + o) * G * I + g * I, w->values + (g * O + o) * I, (size_t)I * sizeof(double));
    memcpy(operand_find(&whole, "x")->values, x->values, (size_t)x->count * sizeof(double));
    memcpy(operand_find(&whole, "y")->gradients, y->gradients, (size_t)y->count * sizeof(double));
    run_forward(&whole);
    run_backward(&whole);
    op_compare(r, "y of the matrix written out", operand_find(&whole, "y")->values, y->values, y->count, y->terms);
    op_compare(r, "dx of the matrix written out", operand_find(&whole, "x")->gradients, x->gradients, x->count,
               x->gradient_terms);
    run_close(&whole);
}

static const struct op_row block_linear = {
    .name = "block_linear",
    .parameters = "R=3 G=2 I=4 O=4 add=0 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 G=1,3 I=1,4,5 O=1,4,3 strided=0,1"},
                                       {OP_TEST | OP_GRAD, "R=5 G=2 I=4,12 O=4,9 add=0,1 strided=0,1,2"},
                                       {OP_TEST, "R=0 G=2"},
                                       {OP_TEST, "R=67,1700 G=33 I=4 O=4 add=0,1 strided=0,1"},
                                       {OP_TEST, "R=5 G=384 I=4 O=4"},
                                       {OP_TEST, "R=131 G=4 I=67,64 O=33,64 add=0,1 strided=0,1,2"},
                                       {OP_TEST, "R=300 G=2 I=192 O=192"},
                                       {OP_PERF, "R=4096 G=384 I=4 O=4"},
                                       {OP_PERF, "R=4096 G=4 I=192 O=192"},
                                       {0, NULL}},
    .declare = block_linear_declare,
    .forward = block_linear_forward,
    .backward = block_linear_backward,
    .flops = block_linear_flops,
    .identities = (const struct op_identity[]){{"= linear of the whole matrix", block_linear_written_out},
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
    o->accumulate = param(r, "dw") == 1; /* 2: nothing is there yet */
    set_terms(o, 1, R + D + V);
    o->spread = 3 / sqrt((double)D); /* logits of about 3, so that some probabilities are large */
    indices(r, "targets", DIMS(R), fill_targets);
    r->forward_scratch = r->ops->head_loss_scratch(R, D, V);
    r->backward_scratch = r->forward_scratch + sizeof(struct loss_sums);
}

static void head_loss_forward(struct run *r) {
    r->ops->head_loss(r->dev, value(r, "sums").data, value(r, "losses"), tensor_none(), tensor_none(), value(r, "x"),
                      value(r, "w"), value(r, "targets"), HEAD_SCALE, z_loss_of(r), (double)param(r, "cap"),
                      r->scratch);
}

static void head_loss_backward(struct run *r) {
    char *scratch = r->scratch;
    tensor dw = gradient(r, "w");
    dw.empty = param(r, "dw") == 2;
    r->ops->head_loss(r->dev, (struct loss_sums *)(scratch + r->forward_scratch), tensor_none(), gradient(r, "x"),
                      dw, value(r, "x"), value(r, "w"), value(r, "targets"), HEAD_SCALE, z_loss_of(r),
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
    o->values[6] += param(r, "unsolved"); /* residual: from 1 to 2, or from 2 to 3 */
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
    struct step_rule rule = {.scale = 0.125, .clip = param(r, "clip") ? 0.5 : 0, .beta1 = 0.9, .beta2 = 0.95,
                             .eps = 1e-8, .residual_max = 2};
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
    bool skip = param(r, "skip") || param(r, "unsolved"), clipped = param(r, "clip") && param(r, "large") && !skip;
    op_expect(r, step.skip == skip && report.skipped == skip, "a step is %s", skip ? "not skipped" : "skipped");
    op_expect(r, steps == !skip && report.steps == steps, "%lld steps are counted", (long long)steps);
    double mean = 1 / (0.125 * report.totals.loss.valid), norm = step.grad_scale / mean * report.grad_norm;
    op_expect(r, skip || fabs(norm / (clipped ? 0.5 : report.grad_norm) - 1) < 1e-5, "the norm is clipped to %g", norm);
}

static const struct op_row step_scalars = {
    .name = "step_scalars",
    .parameters = "skip=0 large=0 clip=1 unsolved=0",
    .cases = (const struct op_cases[]){{OP_TEST, "skip=0,1 large=0,1 clip=0,1 unsolved=0,1"}, {0, NULL}},
    .declare = step_scalars_declare,
    .forward = step_scalars_forward,
    .identities = (const struct op_identity[]){{"the decision", step_scalars_decision}, {NULL, NULL}},
};

/* Reports are drawn, and of the last layer, on the last rank, one is infinite (odd = 1) or not a number (2). */
enum { REPORTS = 4096 };

static void worst_reports_declare(struct run *r) {
    static struct cell_report reports[REPORTS];
    int64_t n = param(r, "n"), count = param(r, "ranks") * n;
    struct operand *o = output(r, "largest", DIMS(1));
    ASSERT(count <= REPORTS && sizeof *reports == sizeof(double));
    step_scalars_operand(o, NULL);
    step_scalars_operand(output(r, "worst", DIMS(n)), NULL); /* structs, read as if they were doubles */
    for (int64_t i = 0; i < count; i++) reports[i] = (struct cell_report){.residual = (float)draw_uniform(r, o, i)};
    if (param(r, "odd")) reports[count - 1].residual = param(r, "odd") == 1 ? INFINITY : NAN;
    bytes(r, "reports", reports, (size_t)count * sizeof *reports);
}

static void worst_reports_forward(struct run *r) {
    r->ops->worst_reports(r->dev, value(r, "worst").data, value(r, "largest").data, value(r, "reports").data,
                          param(r, "ranks"), param(r, "n"));
}

static void worst_reports_maximum(struct run *r) {
    const struct cell_report *reports = host_bytes(r, "reports");
    int64_t n = param(r, "n");
    double largest = 0, found = operand_find(r, "largest")->values[0];
    for (int64_t i = 0; i < n; i++) {
        double worst = 0;
        struct cell_report of_layer;
        for (int64_t k = 0; k < param(r, "ranks"); k++) worst = fmax(worst, (double)reports[k * n + i].residual);
        if (param(r, "odd") && i + 1 == n) worst = INFINITY;
        memcpy(&of_layer, &operand_find(r, "worst")->values[i], sizeof of_layer);
        op_expect(r, (double)of_layer.residual == worst, "the worst of layer %lld is %g", (long long)i, worst);
        largest = fmax(largest, worst);
    }
    op_expect(r, found == largest, "the largest of all is %g, not %g", largest, found);
}

/* Apart from the comparison of devices, which takes nothing that is not finite. */
static void worst_reports_odd(struct run *r) {
    static const char *const changes[] = {"odd=1", "odd=2"};
    for (int i = 0; i < 2; i++) {
        struct run odd;
        run_open_like(&odd, r, changes[i]);
        run_forward(&odd);
        worst_reports_maximum(&odd);
        run_close(&odd);
    }
}

static const struct op_row worst_reports = {
    .name = "worst_reports",
    .parameters = "ranks=2 n=3 odd=0",
    .cases = (const struct op_cases[]){{OP_TEST, "ranks=1,2,7 n=1,2,33,257"}, {0, NULL}},
    .declare = worst_reports_declare,
    .forward = worst_reports_forward,
    .identities = (const struct op_identity[]){{"the largest", worst_reports_maximum},
                                               {"what is not finite", worst_reports_odd},
                                               {NULL, NULL}},
};

const struct op_row *const ops_basic_rows[] = {&embedding,   &linear,       &block_linear,  &glu,   &head_loss,
                                                &convert, &sum_squares, &step_scalars, &worst_reports, &adamw, NULL};
