/* test/ops.h: the table of operation cases, from which `test`, `grad` and `perf` all derive.
 *
 * The program test/ops.c walks the rows below. A row describes one operation of kernels/ops.h: its parameters, its
 * operands as functions of the parameters, and how forward and backward are called through the table. From that alone:
 *
 *   ops test   runs the row on the device under test and on the double CPU table with the same inputs and compares
 *              every output and gradient, element by element, with the tolerance
 *                  |a - b| <= unit * (8 + 4 sqrt(terms)) * (|b| + rms(b)),
 *              unit = 2^-24 for f32, 2^-53 for f64, terms = the operand's reduction length (see operand.terms).
 *              It checks guards around every buffer and in the gaps of strided views, that inputs are untouched, that
 *              nothing reads memory nobody wrote (outputs, saved and scratch are poisoned with NaN, then with another
 *              pattern: both runs must give the same bits), and then the row's identities.
 *   ops grad   compares every gradient with finite differences, in double, of the scalar
 *                  sum over outputs of <weights, output>
 *              where the weights (random) are what backward receives as gradients of the outputs; then the identities,
 *              in double.
 *   ops large  is `ops test` with cases that a GPU needs and a CPU takes long over: sizes that fill a chip.
 *   ops perf   times forward and backward, and prints bytes, FLOPs and the share of a measured sgemm.
 *
 * How to add an operation: one row, that is
 *   1. a `struct op_row` with its name, its parameters with defaults ("R=3 D=8 branch=1") and its cases, lines like
 *      {OP_TEST | OP_GRAD, "R=1,2,17 D=8,9"}: a list stands for each of its values, a line for all combinations;
 *   2. `declare`: adds the operands with input(), parameter(), output(), ... in terms of param(r, "R"), and sets
 *      r->saved_bytes and the scratch sizes;
 *   3. `forward` and `backward`: one call each, with value(r, "x") and gradient(r, "x") as arguments;
 *   4. if it is to be timed: `flops`.
 * and its address in one of the lists at the end of this file. A parameter named "strided" is understood by the
 * program: when it is 1, operands that set `lead` lie in rows with gaps on both sides; when it is 2, the gaps keep rows
 * aligned to 16 bytes that are so by their length.
 */
#ifndef RIVERRUN_TEST_OPS_H
#define RIVERRUN_TEST_OPS_H

#include "common/arena.h"
#include "common/rng.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

#define OP_PARAMETERS 20
#define OP_OPERANDS 24

enum { OP_TEST = 1, OP_GRAD = 2, OP_PERF = 4, OP_LARGE = 8 };

enum operand_kind {
    OPERAND_INPUT,  /* real values; backward gives its gradient, unless no_gradient */
    OPERAND_OUTPUT, /* written by forward; backward receives its gradient, unless no_gradient */
    OPERAND_STATE,  /* real values that forward changes in place or adds to; compared, never differentiated */
    OPERAND_INDEX,  /* i32 that the operation reads */
    OPERAND_BYTES,  /* a struct that the operation reads from device memory */
};

enum operand_type {
    OPERAND_ACT,  /* the table's activation dtype */
    OPERAND_REAL, /* the table's real dtype */
    OPERAND_F64,  /* double on every table */
    OPERAND_I32,  /* whole numbers that the operation writes; up to 256, which every rounding leaves */
};

struct run;

/* One argument of an operation. declare() may set the fields of the first group. */
struct operand {
    const char *name;
    enum operand_kind kind;
    enum operand_type type;  /* OPERAND_ACT unless set */
    bool real_gradient;      /* the gradient is REAL whatever the value's type */
    bool act_gradient;       /* or ACT */
    int lead;                /* > 0: "strided": dimensions before `lead` are rows, those from `lead` on lie together */
    bool accumulate;         /* the gradient is added to what is there ("+=") */
    bool no_gradient;        /* backward neither gives nor takes a gradient (states never have one) */
    double mean, spread;     /* values are mean + spread * normal (0 and 1 unless set) */
    void (*fill)(struct run *r, struct operand *o); /* instead: writes o->values (or o->index) itself */
    bool (*held)(const struct run *r, const struct operand *o, int64_t i); /* this element's gradient is 0 by
                                                                            * definition */
    double terms;            /* the longest sum that ends in one element of the value ... */
    double gradient_terms;   /* ... and of the gradient (1 unless set) */
    const char *alias;       /* this output lies in the memory of that input (an update in place) */
    const char *alias_gradient; /* the gradient of this input lies in the memory of that output's gradient */

    /* The program's own. */
    int ndim;
    int64_t dim[TENSOR_DIMS], count;
    double *values;           /* contiguous, on the host: what goes in; of an output or state: what came out */
    double *values_before;    /* of a state: what goes in */
    double *gradients;        /* of an output: what goes in; of an input: what came out */
    double *gradients_before; /* of an input with "+=": what is there before the call */
    int32_t *index;           /* OPERAND_INDEX */
    void *bytes;              /* OPERAND_BYTES */
    size_t byte_count;
    int value_block, gradient_block;
    tensor value, gradient; /* on the device */
};

/* One case of one row on one device. */
struct run {
    const struct op_row *row;
    struct device *dev;
    const struct ops *ops; /* dev->ops */
    uint64_t seed;
    int64_t parameter[OP_PARAMETERS];
    int operands;
    struct operand operand[OP_OPERANDS];
    const char *absent[OP_OPERANDS];
    int absents;
    size_t saved_bytes, forward_scratch, backward_scratch; /* set by declare */
    void *saved, *scratch;                                 /* for forward and backward to pass on */
    enum dtype rounding; /* values are rounded to this type, so that the tables compared see the same ones */
    unsigned char poison; /* byte that fills what a call must write before anyone reads it */
    struct op_report *report; /* where failures go */
    struct block *blocks;     /* the buffers on the device, with their guards */
    int block_count;
    arena memory;
};

/* An identity: runs after forward and backward of a case of a row; opens further runs and reports with op_expect. */
struct op_identity {
    const char *name;
    void (*check)(struct run *r);
};

struct op_cases {
    int modes;
    const char *line; /* "B=2 T=1,7 Q=3" */
};

struct op_row {
    const char *name;
    const char *parameters;       /* names and defaults: "B=1 T=5 C=3 doc=0" */
    const struct op_cases *cases; /* ends with modes 0 */
    void (*declare)(struct run *r);
    void (*forward)(struct run *r);
    void (*backward)(struct run *r);                                 /* optional */
    double (*scalar)(struct run *r);                                 /* optional: what grad differentiates instead */
    void (*flops)(struct run *r, double *forward, double *backward); /* optional */
    const struct op_identity *identities;                            /* optional; ends with name NULL */
};

/* --- for declare -------------------------------------------------------------------------------------------------- */

int64_t param(const struct run *r, const char *name);

#define DIMS(...) (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

struct operand *input(struct run *r, const char *name, int ndim, const int64_t *dim);
struct operand *parameter(struct run *r, const char *name, int ndim, const int64_t *dim); /* REAL, gradient "+=" */
struct operand *weight(struct run *r, const char *name, int ndim, const int64_t *dim); /* ACT, gradient REAL, "+=" */
struct operand *output(struct run *r, const char *name, int ndim, const int64_t *dim);
struct operand *statistic(struct run *r, const char *name, int ndim, const int64_t *dim); /* REAL output, no_gradient */
struct operand *state(struct run *r, const char *name, int ndim, const int64_t *dim);     /* REAL */
struct operand *indices(struct run *r, const char *name, int ndim, const int64_t *dim,
                        void (*fill)(struct run *r, struct operand *o)); /* fill writes o->index */
struct operand *bytes(struct run *r, const char *name, const void *content, size_t size); /* copied */
const void *host_bytes(struct run *r, const char *name); /* the copy that stays on the host */
/* Lengths of the sums behind an element of the value and of the gradient. */
void set_terms(struct operand *o, int64_t value_terms, int64_t gradient_terms);
void absent(struct run *r, const char *name); /* value() and gradient() of this name are tensor_none() */

/* For fill functions: keyed draws, different for every operand, case seed and position. */
double draw_normal(const struct run *r, const struct operand *o, int64_t i);
double draw_uniform(const struct run *r, const struct operand *o, int64_t i);
int64_t draw_below(const struct run *r, const struct operand *o, int64_t i, int64_t bound);

/* --- for forward and backward ------------------------------------------------------------------------------------- */

tensor value(struct run *r, const char *name);    /* name was declared, or declared absent */
tensor gradient(struct run *r, const char *name); /* none for operands without a gradient */

/* --- for identities ----------------------------------------------------------------------------------------------- */

struct operand *operand_find(struct run *r, const char *name); /* NULL if absent */

/* The same row on the same device with other parameters ("T=3 doc=0"), filled from the same seed. The caller
 * overwrites values of inputs, gradients of outputs and what is there "before" as it likes, calls run_forward and
 * run_backward, and closes. */
void run_open_like(struct run *r, const struct run *like, const char *changes);
/* A run of another row (an identity that needs a second operation), with its default parameters and `changes`. */
void run_open_row(struct run *r, const struct run *like, const struct op_row *row, const char *changes);
void run_close(struct run *r);
void run_forward(struct run *r);  /* upload, poison, call, check guards, download: outputs are in operand.values */
void run_backward(struct run *r); /* after run_forward, likewise: gradients of inputs are in operand.gradients */

/* Compare two host arrays with the tolerance of `ops test`; a difference is a failure of the current case. */
void op_compare(struct run *r, const char *what, const double *got, const double *want, int64_t count, double terms);
/* Report a failure of the current case unless `good`. */
void op_expect(struct run *r, bool good, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* --- the rows ----------------------------------------------------------------------------------------------------- */

/* Each list ends with NULL. */
extern const struct op_row *const ops_basic_rows[];     /* test/ops_basic.c */
extern const struct op_row *const ops_norm_rows[];      /* test/ops_norm.c */
extern const struct op_row *const ops_recurrent_rows[]; /* test/ops_recurrent.c */
extern const struct op_row *const ops_scan_rows[];      /* test/ops_scan.c */
extern const struct op_row *const ops_mlstm_rows[];     /* test/ops_mlstm.c */
extern const struct op_row *const ops_slstm_rows[];     /* test/ops_slstm.c */
extern const struct op_row *const ops_attention_rows[]; /* test/ops_attention.c */
extern const struct op_row *const ops_rat_rows[];       /* test/ops_rat.c */
extern const struct op_row *const ops_cell_rows[];      /* test/ops_cell.c */

#endif
