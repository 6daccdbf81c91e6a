/* test/ops_scan.c: rows of the selective scan and its step. test/ops.h says what a row is; the identities that hold for
 * every sequence operation are in test/ops_sequence.c. The result, g in kernels/ops.h, is called y here, as those
 * expect. */
#include "test/ops_sequence.h"

#include <math.h>
#include <stdio.h>

/* Some values may lie beyond 20, where softplus changes its form; none so near that a finite difference crosses it. */
static void fill_raw(struct run *r, struct operand *o) {
    struct operand *bias = operand_find(r, "bias");
    for (int64_t i = 0; i < o->count; i++) {
        double shift = bias->values[i % bias->count];
        o->values[i] = (double)param(r, "spread") * draw_normal(r, o, i);
        if (fabs(o->values[i] + shift - 20) < 0.01) o->values[i] += 0.05;
    }
}

static struct scan_shape scan_shape(const struct run *r) {
    return (struct scan_shape){param(r, "B"), param(r, "T"), param(r, "D"), param(r, "N")};
}

/* What the scan and its step have in common; `lead` are the dimensions before D and N. */
static void scan_operands(struct run *r, const int64_t *lead, int leads, double terms, double gradient_terms) {
    int64_t D = param(r, "D"), N = param(r, "N");
    static const char *const names[] = {"y", "x", "z", "b", "c", "raw"};
    parameter(r, "bias", DIMS(D)); /* before raw, whose values look at it */
    parameter(r, "A_log", DIMS(D, N));
    for (int i = 0; i < 6; i++) {
        int64_t dim[3] = {lead[0], lead[leads - 1]};
        dim[leads] = i == 3 || i == 4 ? N : D;
        if (i == 2 && !param(r, "z")) {
            absent(r, "z");
            continue;
        }
        struct operand *o = (i == 0 ? output : input)(r, names[i], leads + 1, dim);
        o->lead = leads;
        o->terms = terms;
        o->gradient_terms = gradient_terms;
        o->fill = i == 5 ? fill_raw : NULL;
    }
    if (param(r, "d")) parameter(r, "d", DIMS(D));
    else absent(r, "d");
}

static void scan_declare(struct run *r) {
    struct scan_shape s = scan_shape(r);
    double terms = (double)(s.N + s.T), tokens = (double)(s.B * s.T);
    scan_operands(r, (int64_t[]){s.B, s.T}, 2, terms, 4 * (terms + (double)s.D));
    operand_find(r, "bias")->gradient_terms = 4 * tokens * terms;
    operand_find(r, "A_log")->gradient_terms = 4 * tokens * terms;
    struct operand *o = operand_find(r, "d");
    if (o) o->gradient_terms = 16 * tokens; /* one sum, which may cancel */
    sequence_declare(r, DIMS(s.B, s.D, s.N));
    if ((o = operand_find(r, "initial"))) o->gradient_terms = terms;
    if ((o = operand_find(r, "final"))) o->terms = terms;
    r->saved_bytes = param(r, "saved") ? r->ops->scan_saved(s) : 0;
    r->forward_scratch = r->ops->scan_forward_scratch(s);
    r->backward_scratch = r->ops->scan_backward_scratch(s);
}

static void scan_forward(struct run *r) {
    r->ops->scan_forward(r->dev, value(r, "y"), value(r, "final"), r->saved, value(r, "x"), value(r, "raw"),
                         value(r, "bias"), value(r, "A_log"), value(r, "b"), value(r, "c"), value(r, "d"),
                         value(r, "z"), value(r, "initial"), value(r, "doc"), r->scratch);
}

static void scan_backward(struct run *r) {
    r->ops->scan_backward(r->dev, gradient(r, "x"), gradient(r, "raw"), gradient(r, "b"), gradient(r, "c"),
                          gradient(r, "z"), gradient(r, "initial"), gradient(r, "bias"), gradient(r, "A_log"),
                          gradient(r, "d"), gradient(r, "y"), gradient(r, "final"), r->saved, value(r, "x"),
                          value(r, "raw"), value(r, "bias"), value(r, "A_log"), value(r, "b"), value(r, "c"),
                          value(r, "d"), value(r, "z"), value(r, "initial"), value(r, "doc"), r->scratch);
}

static void scan_step_declare(struct run *r) {
    int64_t B = param(r, "B"), D = param(r, "D"), N = param(r, "N");
    scan_operands(r, (int64_t[]){B}, 1, (double)(16 * N), 1); /* one element of a sum that may cancel */
    state(r, "state", DIMS(B, D, N));
}

static void scan_step_forward(struct run *r) {
    r->ops->scan_step(r->dev, value(r, "y"), value(r, "state"), value(r, "x"), value(r, "raw"), value(r, "bias"),
                      value(r, "A_log"), value(r, "b"), value(r, "c"), value(r, "d"), value(r, "z"));
}

static const struct op_row scan_step = {
    .name = "scan_step",
    .parameters = "B=2 D=5 N=4 d=1 z=1 spread=1 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST, "B=1,3 D=1,2,33,130 N=1,7,16,256 d=0,1 z=0,1 strided=0,1"},
                                       {OP_TEST, "spread=30"},
                                       {OP_PERF, "B=1,8 D=1536 N=16"},
                                       {0, NULL}},
    .declare = scan_step_declare,
    .forward = scan_step_forward,
};

static void scan_steps(struct run *r) {
    sequence_equals_steps(r, &scan_step, "B D N d z spread");
}

/* The same values when nothing is saved. */
static void scan_unsaved(struct run *r) {
    sequence_same(r, "saved=0", false);
}

/* Lengths around the chunk's, channels around the block's. */
static const struct op_row scan = {
    .name = "scan",
    .parameters = "B=2 T=7 D=3 N=4 doc=0 initial=1 final=1 d=1 z=1 saved=1 spread=1 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "T=1,2,3,7,31,32,33,65,97 D=1,5,33 N=4 doc=0,1,4"},
        {OP_TEST, "T=1,7,33 D=5 N=3 doc=0,2,3 initial=0,1,2 final=0,1,2 d=0,1 z=0,1"},
        {OP_TEST, "T=40 D=31,32,64,65 N=1,16 doc=0,2,4 strided=0,1"},
        {OP_TEST, "T=40 D=40 N=256 doc=4 strided=1"},
        {OP_TEST, "B=3 T=130 D=200 N=16 doc=4 spread=1,30 strided=1"}, /* several blocks, several threads */
        {OP_TEST, "B=1,70 T=33 D=70 N=5 doc=4"},                       /* fewer and more rows than threads may be */
        {OP_TEST, "B=1 T=16,17,64,129 D=62,66,129 N=16 doc=4 strided=0,1"}, /* edges of a GPU's tiles and pieces */
        {OP_LARGE, "B=17 T=200 D=2048 N=16 doc=0,4"}, /* time is not cut: several saved states in a segment */
        {OP_LARGE, "B=9 T=270 D=4001 N=20 doc=4 strided=1"},
        {OP_GRAD, "B=1 T=1,2,7 D=2 N=3 doc=0,2,4 spread=1,30"},
        {OP_GRAD, "T=7 D=2 N=2 doc=0,2 initial=0,1,2 final=0,1,2 d=0,1 z=0,1"},
        {OP_GRAD, "T=70 D=33 N=16 doc=0,4 strided=1"},
        {OP_PERF, "B=8 T=512 D=512 N=16 initial=0 final=0"},
        {OP_PERF, "B=2 T=2048 D=1536 N=16 initial=0 final=0 strided=1"},
        {OP_PERF, "B=1 T=2048 D=5120 N=16 initial=0 final=0 doc=1 strided=1"},
        {OP_PERF, "B=2 T=512 D=512 N=64 initial=0 final=0"},
        {0, NULL}},
    .declare = scan_declare,
    .forward = scan_forward,
    .backward = scan_backward,
    .identities = (const struct op_identity[]){{"sequence = loop of steps", scan_steps},
                                               {"the same when nothing is saved", scan_unsaved},
                                               {"packed documents = documents run apart", sequence_packed},
                                               {"split with state = whole", sequence_split},
                                               {"causality", sequence_causal},
                                               {NULL, NULL}},
};

const struct op_row *const ops_scan_rows[] = {&scan, &scan_step, NULL};
