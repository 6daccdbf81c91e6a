/* test/ops_recurrent.c: rows of the recurrent operations: conv and its step, ssd_dt, ssd and its step. test/ops.h says
 * what a row is; the identities that hold for every sequence operation are in test/ops_sequence.c. */
#include "test/ops_sequence.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- causal convolution, with SiLU or without --------------------------------------------------------------------- */

static void conv_declare(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), C = param(r, "C"), W = param(r, "W");
    struct operand *o = output(r, "y", DIMS(B, T, C));
    o->lead = 2;
    o->terms = (double)W;
    o = input(r, "x", DIMS(B, T, C));
    o->lead = 2;
    o->gradient_terms = (double)(4 * W * W); /* c is rounded before its derivative is, products of normals are large */
    parameter(r, "weight", DIMS(C, W))->gradient_terms = (double)(B * T);
    parameter(r, "bias", DIMS(C))->gradient_terms = (double)(B * T);
    sequence_declare(r, DIMS(B, W - 1, C));
    if ((o = operand_find(r, "initial"))) o->gradient_terms = (double)(4 * W * W);
    r->backward_scratch = r->ops->conv_backward_scratch(B, T, C, W);
}

static void conv_forward(struct run *r) {
    r->ops->conv_forward(r->dev, value(r, "y"), value(r, "final"), value(r, "x"), value(r, "weight"), value(r, "bias"),
                         value(r, "initial"), value(r, "doc"), param(r, "silu") != 0);
}

static void conv_backward(struct run *r) {
    r->ops->conv_backward(r->dev, gradient(r, "x"), gradient(r, "initial"), gradient(r, "weight"), gradient(r, "bias"),
                          gradient(r, "y"), gradient(r, "final"), value(r, "x"), value(r, "weight"), value(r, "bias"),
                          value(r, "initial"), value(r, "doc"), param(r, "silu") != 0, r->scratch);
}

static void conv_step_declare(struct run *r) {
    int64_t B = param(r, "B"), C = param(r, "C"), W = param(r, "W");
    struct operand *o = output(r, "y", DIMS(B, C));
    o->lead = 1;
    o->terms = (double)(16 * W); /* there may be one element only, and its sum may cancel */
    state(r, "state", DIMS(B, W - 1, C));
    input(r, "x", DIMS(B, C))->lead = 1;
    parameter(r, "weight", DIMS(C, W));
    parameter(r, "bias", DIMS(C));
}

static void conv_step_forward(struct run *r) {
    r->ops->conv_step(r->dev, value(r, "y"), value(r, "state"), value(r, "x"), value(r, "weight"), value(r, "bias"),
                      param(r, "silu") != 0);
}

static const struct op_row conv_step = {
    .name = "conv_step",
    .parameters = "B=2 C=5 W=4 strided=0 silu=1",
    .cases = (const struct op_cases[]){{OP_TEST, "B=1,3 C=1,7,64,130 W=2,3,4,8 strided=0,1"},
                                       {OP_TEST, "B=3 C=7,130 W=2,4 silu=0"},
                                       {OP_PERF, "B=1,8 C=1792 W=4"},
                                       {0, NULL}},
    .declare = conv_step_declare,
    .forward = conv_step_forward,
};

static void conv_steps(struct run *r) {
    sequence_equals_steps(r, &conv_step, "B C W silu");
}

static const struct op_row conv = {
    .name = "conv",
    .parameters = "B=2 T=5 C=3 W=4 doc=0 initial=1 final=1 strided=0 silu=1",
    .cases = (const struct op_cases[]){
        {OP_TEST, "T=1,2,3,5,7,16,17,64,97 C=3 W=2,3,4,8 doc=0,1,2,3,4"},
        {OP_TEST, "T=2,17 C=5 doc=0,2,4 initial=0,1,2 final=0,1,2 strided=0,1"},
        {OP_TEST, "T=7,300 C=64,65,200 doc=0,4 strided=0,1"},
        {OP_TEST, "T=1,7,40 C=64 W=2,3,8 doc=0,4 strided=0,1"},
        {OP_GRAD, "T=1,2,3,7 C=2 W=2,4,8 doc=0,1,2,3,4 initial=0,1,2 final=0,1,2"},
        {OP_GRAD, "T=17 C=3,65 doc=0,4 strided=1"},
        {OP_TEST | OP_GRAD, "T=1,2,17 C=3 W=2,4,8 doc=0,4 silu=0"},
        {OP_TEST, "T=7,300 C=65,200 doc=0,4 strided=0,1 silu=0"},
        {OP_PERF, "B=8 T=512 C=640 initial=0 final=0"},
        {OP_PERF, "B=8 T=512 C=640 initial=0 final=0 doc=1 strided=1"},
        {OP_PERF, "B=2 T=2048 C=1792 initial=0 final=0"},
        {0, NULL}},
    .declare = conv_declare,
    .forward = conv_forward,
    .backward = conv_backward,
    .identities = (const struct op_identity[]){{"sequence = loop of steps", conv_steps},
                                               {"packed documents = documents run apart", sequence_packed},
                                               {"split with state = whole", sequence_split},
                                               {"causality", sequence_causal},
                                               {NULL, NULL}},
};

/* --- SSD step sizes ----------------------------------------------------------------------------------------------- */

/* Bounds that some of the values hit, in thousandths; 0 stands for none. Values near a bound or near 20, where finite
 * differences would cross a kink, are moved away. */
static double dt_bound(const struct run *r, const char *name) {
    return (double)param(r, name) * 1e-3;
}

static double dt_high(const struct run *r) {
    return param(r, "max") ? dt_bound(r, "max") : INFINITY;
}

static void fill_raw(struct run *r, struct operand *o) {
    const double kinks[] = {20, log(expm1(dt_bound(r, "min"))), log(expm1(dt_high(r)))};
    struct operand *bias = operand_find(r, "bias");
    for (int64_t i = 0; i < o->count; i++) {
        double shift = bias->values[i % bias->count], v;
        o->values[i] = (double)param(r, "spread") * draw_normal(r, o, i);
        for (int k = 0; k < 3; k++)
            if (fabs((v = o->values[i] + shift) - kinks[k]) < 0.01) o->values[i] += 0.05;
    }
}

static void ssd_dt_declare(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), H = param(r, "H");
    output(r, "dt", DIMS(B, T, H))->type = OPERAND_REAL;
    output(r, "a", DIMS(B, T, H))->type = OPERAND_REAL;
    parameter(r, "bias", DIMS(H))->gradient_terms = (double)(16 * B * T); /* one sum, which may cancel */
    parameter(r, "A_log", DIMS(H))->gradient_terms = (double)(16 * B * T);
    struct operand *raw = input(r, "raw", DIMS(B, T, H));
    raw->fill = fill_raw;
    raw->gradient_terms = 16; /* the rounding of raw + bias goes through the derivative of softplus */
    raw->lead = 2;
    r->backward_scratch = r->ops->ssd_dt_backward_scratch(B, T, H);
}

static void ssd_dt_forward(struct run *r) {
    r->ops->ssd_dt_forward(r->dev, value(r, "dt"), value(r, "a"), value(r, "raw"), value(r, "bias"), value(r, "A_log"),
                           dt_bound(r, "min"), dt_high(r));
}

static void ssd_dt_backward(struct run *r) {
    r->ops->ssd_dt_backward(r->dev, gradient(r, "raw"), gradient(r, "bias"), gradient(r, "A_log"), gradient(r, "dt"),
                            gradient(r, "a"), value(r, "raw"), value(r, "bias"), value(r, "A_log"),
                            dt_bound(r, "min"), dt_high(r), r->scratch);
}

/* The definition, in double. */
static void ssd_dt_defined(struct run *r) {
    struct operand *raw = operand_find(r, "raw"), *bias = operand_find(r, "bias"), *A_log = operand_find(r, "A_log");
    struct operand *dt = operand_find(r, "dt"), *a = operand_find(r, "a");
    double *want_dt = malloc((size_t)dt->count * sizeof *want_dt), *want_a = malloc((size_t)a->count * sizeof *want_a);
    ASSERT(want_dt != NULL && want_a != NULL);
    for (int64_t i = 0; i < dt->count; i++) {
        double v = raw->values[i] + bias->values[i % bias->count], plus = v > 20 ? v : log1p(exp(v));
        want_dt[i] = fmin(fmax(plus, dt_bound(r, "min")), dt_high(r));
        want_a[i] = -exp(A_log->values[i % bias->count]) * want_dt[i];
    }
    op_compare(r, "dt by its definition", dt->values, want_dt, dt->count, 16);
    op_compare(r, "a by its definition", a->values, want_a, a->count, 16);
    free(want_dt);
    free(want_a);
}

static const struct op_row ssd_dt = {
    .name = "ssd_dt",
    .parameters = "B=2 T=5 H=3 min=0 max=0 spread=2 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "B=1,2 T=1,7,97 H=1,3,8 min=0,100 max=0,900 spread=1,30 strided=0,1"},
        {OP_GRAD, "T=1,7 H=1,3 min=0,100 max=0,900 spread=1,30 strided=0,1"},
        {OP_PERF, "B=8 T=512 H=8 strided=1"},
        {0, NULL}},
    .declare = ssd_dt_declare,
    .forward = ssd_dt_forward,
    .backward = ssd_dt_backward,
    .identities = (const struct op_identity[]){{"values by definition", ssd_dt_defined}, {NULL, NULL}},
};

/* --- SSD ---------------------------------------------------------------------------------------------------------- */

static void fill_dt(struct run *r, struct operand *o) {
    for (int64_t i = 0; i < o->count; i++) o->values[i] = 0.05 + draw_uniform(r, o, i);
}

/* From hardly any decay to a factor of 1/20 in a step. With extreme=1, one token in four has none at all, and one in
 * eight lets nothing pass that a float can hold, or nothing by far. */
static void fill_a(struct run *r, struct operand *o) {
    bool extreme = param(r, "extreme");
    for (int64_t i = 0; i < o->count; i++) {
        double u = draw_uniform(r, o, i), part = 8 * u - floor(8 * u);
        o->values[i] = -0.01 - 3 * pow(u, 4);
        if (extreme && part < 0.25) o->values[i] = 0;
        else if (extreme && part > 0.875) o->values[i] = part < 0.92 ? -90 : part < 0.96 ? -110 : -1e30;
    }
}

static struct ssd_shape ssd_shape(const struct run *r) {
    return (struct ssd_shape){param(r, "B"), param(r, "T"), param(r, "H"), param(r, "P"),
                              param(r, "G"), param(r, "N"), param(r, "Q")};
}

static void ssd_operands(struct run *r, const int64_t *lead, int leads, double terms, double gradient_terms) {
    int64_t H = param(r, "H"), P = param(r, "P"), G = param(r, "G"), N = param(r, "N");
    const struct {
        const char *name;
        int64_t a, b; /* the last dimensions; b = 0: one only, real and contiguous */
        void (*fill)(struct run *r, struct operand *o);
    } table[] = {{"y", H, P, NULL}, {"x", H, P, NULL}, {"dt", H, 0, fill_dt}, {"a", H, 0, fill_a}, {"b", G, N, NULL},
                 {"c", G, N, NULL}};
    for (int i = 0; i < 6; i++) {
        int64_t dim[4] = {lead[0], lead[leads - 1]};
        dim[leads] = table[i].a;
        dim[leads + 1] = table[i].b;
        int ndim = leads + (table[i].b ? 2 : 1);
        struct operand *o = (i == 0 ? output : input)(r, table[i].name, ndim, dim);
        o->lead = table[i].b ? leads : 0;
        o->type = table[i].b ? OPERAND_ACT : OPERAND_REAL;
        o->fill = table[i].fill;
        o->terms = terms;
        o->gradient_terms = gradient_terms;
    }
    if (param(r, "d")) parameter(r, "d", DIMS(H))->gradient_terms = gradient_terms;
    else absent(r, "d");
}

static void ssd_declare(struct run *r) {
    struct ssd_shape s = ssd_shape(r);
    double terms = (double)(s.N + s.T), heads = (double)(s.H / s.G), across = (double)(s.T * s.T + s.N + s.P);
    ssd_operands(r, (int64_t[]){s.B, s.T}, 2, terms, 2 * heads * (double)(s.T + s.N + s.P));
    operand_find(r, "a")->gradient_terms = across; /* a sum over pairs of tokens */
    struct operand *d = operand_find(r, "d"), *o;
    if (d) d->gradient_terms = (double)(s.B * s.T * s.P);
    sequence_declare(r, DIMS(s.B, s.H, s.P, s.N));
    if ((o = operand_find(r, "initial"))) o->gradient_terms = terms;
    if ((o = operand_find(r, "final"))) o->terms = terms;
    r->saved_bytes = param(r, "saved") ? r->ops->ssd_saved(s) : 0;
    r->forward_scratch = r->ops->ssd_forward_scratch(s);
    r->backward_scratch = r->ops->ssd_backward_scratch(s);
}

static void ssd_forward(struct run *r) {
    r->ops->ssd_forward(r->dev, value(r, "y"), value(r, "final"), r->saved, value(r, "x"), value(r, "dt"),
                        value(r, "a"), value(r, "b"), value(r, "c"), value(r, "d"), value(r, "initial"),
                        value(r, "doc"), param(r, "Q"), r->scratch);
}

static void ssd_backward(struct run *r) {
    r->ops->ssd_backward(r->dev, gradient(r, "x"), gradient(r, "dt"), gradient(r, "a"), gradient(r, "b"),
                         gradient(r, "c"), gradient(r, "initial"), gradient(r, "d"), gradient(r, "y"),
                         gradient(r, "final"), r->saved, value(r, "x"), value(r, "dt"), value(r, "a"), value(r, "b"),
                         value(r, "c"), value(r, "d"), value(r, "initial"), value(r, "doc"), param(r, "Q"), r->scratch);
}

/* Useful FLOPs: the lower triangle only, of the L x L products inside chunks. */
static void ssd_flops(struct run *r, double *forward, double *backward) {
    struct ssd_shape s = ssd_shape(r);
    double Q = (double)(s.Q < s.T ? s.Q : s.T), tokens = (double)(s.B * s.T), P = (double)s.P, N = (double)s.N;
    double triangle = (Q + 1) / 2, G = (double)s.G, H = (double)s.H;
    *forward = tokens * (G * 2 * N * triangle + H * (2 * P * triangle + 4 * P * N));
    *backward = tokens * (G * 6 * N * triangle + H * (4 * P * triangle + 8 * P * N));
}

static void ssd_step_declare(struct run *r) {
    int64_t B = param(r, "B"), H = param(r, "H"), P = param(r, "P"), N = param(r, "N");
    ssd_operands(r, (int64_t[]){B}, 1, (double)N, 1);
    state(r, "state", DIMS(B, H, P, N));
}

static void ssd_step_forward(struct run *r) {
    r->ops->ssd_step(r->dev, value(r, "y"), value(r, "state"), value(r, "x"), value(r, "dt"), value(r, "a"),
                     value(r, "b"), value(r, "c"), value(r, "d"));
}

static const struct op_row ssd_step = {
    .name = "ssd_step",
    .parameters = "B=2 H=2 P=3 G=1 N=5 d=1 strided=0 extreme=0",
    .cases = (const struct op_cases[]){{OP_TEST, "B=1,3 H=1,4 P=1,5,64 N=1,7,64 d=0,1 strided=0,1"},
                                       {OP_TEST, "H=4 G=2,4"},
                                       {OP_PERF, "B=1,8 H=8 P=64 N=64,128"},
                                       {0, NULL}},
    .declare = ssd_step_declare,
    .forward = ssd_step_forward,
};

static void ssd_steps(struct run *r) {
    sequence_equals_steps(r, &ssd_step, "B H P G N d");
}

/* <final, dfinal> of one head; in *size the sum of the magnitudes. */
static double final_weight(struct run *r, int64_t head, double *size) {
    struct operand *final = operand_find(r, "final");
    int64_t count = param(r, "P") * param(r, "N");
    double sum = 0;
    *size = 0;
    for (int64_t i = head * count; final && !final->no_gradient && i < (head + 1) * count; i++) {
        sum += final->values[i] * final->gradients[i];
        *size += fabs(final->values[i] * final->gradients[i]);
    }
    return sum;
}

/* da = the reverse cumulative sum, within each document, of dy . (y - d x) - dt ddt, plus <final, dfinal>: equal in
 * exact arithmetic to the sum that ssd_backward forms, but it cancels; so only in double, and relative to the size of
 * what cancels. */
static void ssd_shortcut(struct run *r) {
    if (r->ops->act != DTYPE_F64) return;
    struct operand *y = operand_find(r, "y"), *x = operand_find(r, "x"), *dt = operand_find(r, "dt");
    struct operand *d = operand_find(r, "d"), *doc = operand_find(r, "doc"), *a = operand_find(r, "a");
    struct ssd_shape s = ssd_shape(r);
    for (int64_t bh = 0; bh < s.B * s.H; bh++) {
        int64_t row = bh / s.H, h = bh % s.H;
        double size, sum = final_weight(r, bh, &size);
        for (int64_t t = s.T - 1; t >= 0; t--) {
            int64_t at = (row * s.T + t) * s.H + h;
            if (doc && t + 1 < s.T && doc->index[row * s.T + t] != doc->index[row * s.T + t + 1]) sum = 0;
            for (int64_t i = at * s.P; i < (at + 1) * s.P; i++) {
                double inner = y->gradients[i] * (y->values[i] - (d ? d->values[h] * x->values[i] : 0));
                sum += inner;
                size += fabs(inner);
            }
            sum -= dt->values[at] * dt->gradients[at];
            size += fabs(dt->values[at] * dt->gradients[at]);
            op_expect(r, fabs(a->gradients[at] - sum) <= 1e-13 * size,
                      "da of token %lld, head %lld is %.15g, by the shortcut %.15g", (long long)t, (long long)h,
                      a->gradients[at], sum);
        }
    }
}

static const struct op_row ssd = {
    .name = "ssd",
    .parameters = "B=2 T=7 H=2 P=3 G=1 N=5 Q=3 doc=0 initial=1 final=1 d=1 saved=1 strided=0 extreme=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "T=1,2,3,5,7,16,17,64,97 G=1,2 Q=1,2,3,16,64,256 doc=0,4"},
        {OP_TEST, "T=17,97 H=4 P=5 G=2 N=7 Q=3,16,64 doc=1,2,3 initial=0,1,2 final=0,1,2"},
        {OP_TEST, "T=5,17 Q=3,16 doc=0,2 initial=0,1 final=0,1 d=0,1 strided=1"},
        {OP_TEST, "B=1 T=130 H=4 P=64 G=1,4 N=33 Q=64,128 doc=0,4 strided=1"}, /* several tiles, several threads */
        {OP_TEST, "T=200 H=2 P=16 N=32 Q=64,128,256 doc=0,1,4"},
        {OP_TEST, "B=1 T=63,65,128,129,192 H=6 P=8 N=16 Q=64 doc=0,5 strided=0,2"}, /* edges of chunks */
        {OP_TEST, "B=1 T=70 H=14 P=24 G=1,7 N=40,100 Q=64 doc=4"}, /* tiles that are not full */
        {OP_TEST, "B=1 T=255,256,257,520 H=2 P=8 N=24 Q=64 doc=1 extreme=0,1"}, /* edges of pieces and segments */
        {OP_TEST, "T=97 H=3 P=64 N=128 Q=16 doc=0,4 extreme=1 strided=2"},
        {OP_LARGE, "B=16 T=330 H=36 P=4 N=8 Q=64 doc=1"}, /* heads fill a GPU: several pieces in one segment */
        {OP_LARGE, "B=16 T=520 H=36 P=8 N=8 Q=64"},
        {OP_GRAD, "B=1 T=1,2,3,7,17 H=2 P=2 G=1,2 N=3 Q=1,3,16 doc=0,2,4"},
        {OP_GRAD, "T=7 P=2 N=2 Q=2,3,7 doc=0,1,2,3,4 initial=0,1,2 final=0,1,2 d=0,1"},
        {OP_GRAD, "T=97 H=4 G=2 Q=16,97 doc=0,4 strided=1"},
        {OP_PERF, "B=8 T=512 H=8 P=64 N=64 Q=32,64,128,256 initial=0 final=0"},
        {OP_PERF, "B=8 T=512 H=8 P=64 N=128 Q=64,128 initial=0 final=0"},
        {OP_PERF, "B=2 T=2048 H=24 P=64 N=128 Q=64,256 initial=0 final=0"},
        {0, NULL}},
    .declare = ssd_declare,
    .forward = ssd_forward,
    .backward = ssd_backward,
    .flops = ssd_flops,
    .identities = (const struct op_identity[]){{"chunked = loop of steps", ssd_steps},
                                               {"the same for every chunk length", sequence_chunks},
                                               {"packed documents = documents run apart", sequence_packed},
                                               {"split with state = whole", sequence_split},
                                               {"causality", sequence_causal},
                                               {"da = its shortcut, in double", ssd_shortcut},
                                               {NULL, NULL}},
};

const struct op_row *const ops_recurrent_rows[] = {&conv, &conv_step, &ssd_dt, &ssd, &ssd_step, NULL};
