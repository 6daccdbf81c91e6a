/* test/ops_slstm.c: rows of the sLSTM and its step. test/ops.h says what a row is; the identities that hold for every
 * sequence operation are in test/ops_sequence.c.
 *
 * Parameters of its own: clip, in tenths; zeros = 1: some units of the initial state have n = 0, as at a start; star
 * = 1: finite differences of the final c and n times exp(m), because the gradients that backward takes are those at
 * a fixed m (kernels/ops.h). */
#include "test/ops_sequence.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PARTS = 4, PART_C = 1, PART_N = 2, PART_M = 3 }; /* of a state (B,4,D): y, c, n, m */

static struct slstm_shape slstm_shape(const struct run *r) {
    return (struct slstm_shape){param(r, "B"), param(r, "T"), param(r, "H"), param(r, "P")};
}

static int64_t part_of(const struct run *r, int64_t i) {
    return i / (param(r, "H") * param(r, "P")) % PARTS;
}

/* n is a sum of what is positive. A unit whose n is 0 has c = 0. */
static void fill_state(struct run *r, struct operand *o) {
    int64_t D = param(r, "H") * param(r, "P");
    for (int64_t i = 0; i < o->count; i++) {
        int64_t part = part_of(r, i), unit = i / (PARTS * D) * D + i % D;
        o->values[i] = draw_normal(r, o, i);
        if (part == PART_N) o->values[i] = 0.5 + fabs(o->values[i]);
        if (param(r, "zeros") && unit % 3 == 1 && (part == PART_C || part == PART_N)) o->values[i] = 0;
    }
}

static bool is_m(const struct run *r, const struct operand *o, int64_t i) {
    (void)o;
    return part_of(r, i) == PART_M;
}

/* What the sequence and the step have in common; `lead` are the dimensions before D. */
static void slstm_operands(struct run *r, const int64_t *lead, int leads, double terms) {
    int64_t H = param(r, "H"), P = param(r, "P"), D = H * P, dim[3] = {lead[0], lead[leads - 1]};
    dim[leads] = 4 * D;
    struct operand *o = input(r, "x", leads + 1, dim);
    o->lead = leads;
    o->spread = 0.1 * (double)param(r, "spread");
    o->gradient_terms = 4 * terms;
    dim[leads] = D;
    o = output(r, "y", leads + 1, dim);
    o->lead = leads;
    o->terms = terms;
    o = weight(r, "r", DIMS(H, 4 * P, P));
    o->spread = 0.7 / sqrt((double)P);
    o->gradient_terms = 4 * terms * (double)(lead[0] * lead[leads - 1]);
    parameter(r, "bias", DIMS(4, D))->gradient_terms = o->gradient_terms;
}

static void slstm_declare(struct run *r) {
    struct slstm_shape s = slstm_shape(r);
    double terms = (double)(4 * s.P + 4 * s.T);
    slstm_operands(r, (int64_t[]){s.B, s.T}, 2, terms);
    sequence_declare(r, DIMS(s.B, PARTS, s.H * s.P));
    struct operand *o = operand_find(r, "initial");
    if (o) {
        o->fill = fill_state;
        o->held = is_m;
        o->gradient_terms = 4 * terms;
    }
    if ((o = operand_find(r, "final"))) o->terms = terms;
    r->saved_bytes = param(r, "saved") ? r->ops->slstm_saved(s) : 0;
    r->forward_scratch = r->ops->slstm_forward_scratch(s);
    r->backward_scratch = r->ops->slstm_backward_scratch(s);
}

static void slstm_forward(struct run *r) {
    r->ops->slstm_forward(r->dev, value(r, "y"), value(r, "final"), r->saved, value(r, "x"), value(r, "r"),
                          value(r, "bias"), value(r, "initial"), value(r, "doc"), r->scratch);
}

/* With star = 1, which is for the double CPU table: the final c and n times exp(m), m fixed. */
static void to_gradients_of_c_and_n(struct run *r, double *gradients) {
    const double *final = value(r, "final").data;
    int64_t D = param(r, "H") * param(r, "P");
    for (int64_t i = 0; i < param(r, "B") * PARTS * D; i++)
        if (part_of(r, i) == PART_C || part_of(r, i) == PART_N)
            gradients[i] *= exp(final[i + (PART_M - part_of(r, i)) * D]);
}

static void slstm_backward(struct run *r) {
    tensor dfinal = gradient(r, "final");
    double *kept = NULL;
    size_t size = 0;
    if (param(r, "star") && tensor_given(dfinal)) {
        size = (size_t)tensor_count(dfinal) * sizeof *kept;
        kept = malloc(size);
        ASSERT(kept != NULL && dfinal.dtype == DTYPE_F64);
        memcpy(kept, dfinal.data, size);
        to_gradients_of_c_and_n(r, dfinal.data);
    }
    r->ops->slstm_backward(r->dev, gradient(r, "x"), gradient(r, "r"), gradient(r, "bias"), gradient(r, "initial"),
                           gradient(r, "y"), dfinal, r->saved, value(r, "y"), value(r, "x"), value(r, "r"),
                           value(r, "bias"), value(r, "initial"), value(r, "doc"), 0.1 * (double)param(r, "clip"),
                           r->scratch);
    if (kept) memcpy(dfinal.data, kept, size);
    free(kept);
}

/* What finite differences look at: y, and of the final state y, c exp(m) and n exp(m). */
static double slstm_scalar(struct run *r) {
    struct operand *y = operand_find(r, "y"), *final = operand_find(r, "final");
    int64_t D = param(r, "H") * param(r, "P");
    double sum = 0;
    for (int64_t i = 0; i < y->count; i++) sum += y->gradients[i] * y->values[i];
    if (final == NULL || final->no_gradient) return sum;
    for (int64_t i = 0; i < final->count; i++) {
        int64_t part = part_of(r, i);
        double scale = part == 0 ? 1 : part == PART_M ? 0 : exp(final->values[i + (PART_M - part) * D]);
        sum += final->gradients[i] * final->values[i] * scale;
    }
    return sum;
}

static void slstm_flops(struct run *r, double *forward, double *backward) {
    struct slstm_shape s = slstm_shape(r);
    *forward = 8.0 * (double)(s.B * s.T * s.H) * (double)(s.P * s.P);
    *backward = 2 * *forward;
}

static void slstm_step_declare(struct run *r) {
    int64_t B = param(r, "B"), H = param(r, "H"), P = param(r, "P");
    slstm_operands(r, (int64_t[]){B}, 1, (double)(8 * P));
    struct operand *o = state(r, "state", DIMS(B, PARTS, H * P));
    o->fill = fill_state;
    o->terms = (double)(8 * P);
    r->forward_scratch = r->ops->slstm_forward_scratch((struct slstm_shape){B, 1, H, P});
}

static void slstm_step_forward(struct run *r) {
    r->ops->slstm_step(r->dev, value(r, "y"), value(r, "state"), value(r, "x"), value(r, "r"), value(r, "bias"),
                       r->scratch);
}

static const struct op_row slstm_step = {
    .name = "slstm_step",
    .parameters = "B=2 H=2 P=5 zeros=1 spread=10 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST, "B=1,3,9 H=1,2 P=1,5,16,67 strided=0,1"},
                                       {OP_TEST, "spread=100 zeros=0,1"},
                                       {OP_PERF, "B=1,8 H=4 P=192"},
                                       {0, NULL}},
    .declare = slstm_step_declare,
    .forward = slstm_step_forward,
};

/* --- identities --------------------------------------------------------------------------------------------------- */

static void slstm_steps(struct run *r) {
    sequence_equals_steps(r, &slstm_step, "B H P spread");
}

/* The same values when nothing is saved. */
static void slstm_unsaved(struct run *r) {
    sequence_same(r, "saved=0", false);
}

/* These hand gradients of a state on as they are. */
static void slstm_packed(struct run *r) {
    if (!param(r, "star")) sequence_packed(r);
}

static void slstm_split(struct run *r) {
    if (!param(r, "star")) sequence_split(r);
}

/* A clip that nothing reaches changes nothing, and one that much reaches changes something. */
static void slstm_clipped(struct run *r) {
    if (param(r, "clip") || param(r, "T") < 3 || param(r, "doc")) return;
    sequence_same(r, "clip=1000000000000000000", true);
    struct run other;
    run_open_like(&other, r, "clip=1");
    run_forward(&other);
    run_backward(&other);
    struct operand *a = operand_find(r, "x"), *b = operand_find(&other, "x");
    op_expect(r, memcmp(a->gradients, b->gradients, (size_t)a->count * sizeof(double)) != 0,
              "gradients clipped at 0.1 are those that are not clipped");
    run_close(&other);
}

static const struct op_row slstm = {
    .name = "slstm",
    .parameters = "B=2 T=7 H=2 P=5 doc=0 initial=1 final=1 saved=1 clip=0 zeros=1 star=0 spread=10 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "T=1,2,3,7,33 H=1,3 P=1,5 doc=0,4"},
        {OP_TEST, "T=7 P=3,16 doc=0,2 initial=0,1,2 final=0,1,2 clip=0,3"},
        {OP_TEST, "T=1,7 P=8 doc=1,3 initial=0,1 final=0,1"},
        {OP_TEST, "T=17 P=8,17 doc=4 strided=1,2 clip=0,3 spread=10,100"},
        {OP_TEST, "B=3 T=40 H=2 P=64,67 doc=0"}, /* several threads */
        {OP_TEST, "B=1,8,9 T=5 H=1 P=8,24,40 doc=4 strided=0,2"}, /* edges of a GPU's tiles */
        {OP_TEST, "B=2 T=5 H=1 P=72,128,192,256 doc=2 clip=3 strided=2"},
        {OP_TEST, "B=1 T=3 H=1 P=264,384,512 doc=0"},
        {OP_LARGE, "B=16,17 T=600 H=4 P=192 doc=0,4"},
        {OP_LARGE, "B=33 T=64 H=4 P=64,256,384,512 doc=4 clip=3 strided=2"},
        {OP_GRAD, "B=1 T=1,2,7 H=2 P=3 doc=0,2,4 initial=0 final=0"},
        {OP_GRAD, "T=7 P=2 doc=0,2 initial=0,1,2 final=0,1,2 zeros=0 star=1"},
        {OP_GRAD, "T=5 doc=0,4 zeros=1 initial=2 star=1 spread=10,60"},
        {OP_GRAD, "T=33 H=3 P=4 doc=0,4 initial=0 final=0 strided=1"},
        {OP_PERF, "B=4 T=128 H=4 P=192 initial=0 final=0"},
        {OP_PERF, "B=16 T=1024 H=4 P=192 initial=0 final=0"},
        {0, NULL}},
    .declare = slstm_declare,
    .forward = slstm_forward,
    .backward = slstm_backward,
    .scalar = slstm_scalar,
    .flops = slstm_flops,
    .identities = (const struct op_identity[]){{"sequence = loop of steps", slstm_steps},
                                               {"the same when nothing is saved", slstm_unsaved},
                                               {"packed documents = documents run apart", slstm_packed},
                                               {"split with state = whole", slstm_split},
                                               {"causality", sequence_causal},
                                               {"clipping", slstm_clipped},
                                               {NULL, NULL}},
};

const struct op_row *const ops_slstm_rows[] = {&slstm, &slstm_step, NULL};
