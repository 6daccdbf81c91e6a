/* bench_ops.h: times of single operations at the shapes of real models, and whether their results are right.
 *
 * A row (train/bench_rows.c) names an operation's operands, calls forward and backward through the device's table, and
 * counts the products and special functions. A case (train/bench_cases.c) is a row at one shape, with the figures it is
 * held against. For each case, train/bench_ops.c makes the operands on the device, times forward and forward +
 * backward, and then checks a slice: the same operation on the same numbers, in double on the CPU, for a few rows,
 * channels or heads of the large problem (train/bench_check.c). Called by command_bench_ops.c.
 */
#ifndef RIVERRUN_BENCH_OPS_H
#define RIVERRUN_BENCH_OPS_H

#include "common/arena.h"
#include "kernels/device.h"
#include "train/bench.h"

enum { BENCH_OPERANDS = 40 };

enum bench_kind {
    BENCH_INPUT,  /* read */
    BENCH_OUTPUT, /* written by forward; backward reads its gradient, if it has one */
    BENCH_STATE,  /* changed in place */
};

enum bench_type { BENCH_ACT, BENCH_REAL, BENCH_F64, BENCH_INDEX }; /* as the table says; double; i32 */

enum bench_gradient {
    BENCH_NO_GRADIENT,
    BENCH_GRADIENT, /* of an input: overwritten; of an output: given */
    BENCH_ADDED,    /* of an input: added to */
};

enum bench_fill { BENCH_NORMAL, BENCH_SQUARE, BENCH_TOKENS, BENCH_DOCUMENTS, BENCH_GIVEN };

/* One argument. Its dimensions are letters ("BTD"), whose sizes are the problem's. */
struct bench_operand {
    const char *name, *letters;
    enum bench_kind kind;
    enum bench_type type, gradient_type; /* gradient_type: as type unless set */
    enum bench_gradient has_gradient;
    enum bench_fill fill; /* normal: mean + spread n; square: mean + spread n^2, of normal n; given: by row->given */
    int index;            /* given: which, to row->given */
    double mean, spread;  /* 0 and 1 unless set */
    bool masked;          /* an input: while the slice is checked, 0 (a token: -1) outside it */
    int lead;             /* with pitch: the dimensions before `lead` are rows, `pitch` elements apart; 0: all dense */
    int64_t pitch;
    tensor value, gradient;
};

/* What an operation has to do at least. */
struct bench_work {
    double bytes;    /* every operand moved once */
    double products; /* FLOPs of matrix products */
    double special;  /* exponentials, logarithms, reciprocals */
};

struct bench_problem {
    const struct bench_row *row;
    void *context;  /* what a row may be told beside sizes */
    bool reference; /* others are compared with it, and give it their values: whatever can be exact is */
    bool filled;    /* what is given lies there, and stays */
    struct device *dev;
    const struct ops *ops;
    int64_t size[128]; /* of a letter */
    int count;
    struct bench_operand operands[BENCH_OPERANDS];
    bool reports;              /* set by declare: a nonlinear recurrence is solved so, */
    struct cell_solver solver; /* which leaves its report in `constant` */
    size_t saved_bytes, scratch_bytes, host_bytes; /* set by declare; host_bytes: of `constant`, at most 128 */
    void *saved, *scratch, *constant;              /* on the device; row->constant writes host_bytes there */
    arena memory;
};

struct bench_row {
    const char *name;
    const char *slice; /* sizes of the letters that are cut for the check: "B=1 D=4"; T is cut at its end, others at
                        * their beginning, so that the slice reaches the last element */
    void (*declare)(struct bench_problem *p);
    void (*forward)(struct bench_problem *p);
    void (*backward)(struct bench_problem *p); /* NULL: forward is all there is */
    void (*both)(struct bench_problem *p);     /* instead of forward and then backward, where one call does both */
    /* Adds products and special functions, and corrects the bytes where operands aren't moved once; optional. */
    void (*work)(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both);
    void (*constant)(const struct bench_problem *p, void *out);
    /* Elements [from, from + count) of an operand whose values are given. */
    void (*given)(const struct bench_problem *p, const struct bench_operand *o, int64_t from, int64_t count,
                  double *values);
    double tolerance; /* of the check, as a multiple of what a single operation is allowed; 0 = 1 */
};

struct bench_case {
    const struct bench_row *row;
    const char *label; /* what has this shape */
    const char *shape; /* "B=8 T=2048 D=4096 N=16" */
    /* Milliseconds, forward and forward + backward, in bf16 on one H200; 0 where there is no such figure. */
    double theirs[2], must[2], aim[2];
};

extern const struct bench_case bench_cases[]; /* ends with row NULL */
extern const struct bench_row bench_embedding, bench_add_norm, bench_linear, bench_conv, bench_conv_step, bench_ssd_dt,
    bench_ssd, bench_ssd_step, bench_scan, bench_scan_step, bench_gated_rmsnorm, bench_glu, bench_head_norm,
    bench_block_linear, bench_mlstm, bench_softcap, bench_slstm, bench_attention, bench_rope, bench_cell,
    bench_cell_projected, bench_head_loss, bench_convert, bench_adamw;

/* ---- for rows --------------------------------------------------------------------------------------------------- */

static inline int64_t bench_size(const struct bench_problem *p, char letter) { return p->size[(int)letter]; }

struct bench_operand *bench_input(struct bench_problem *p, const char *name, const char *letters);
struct bench_operand *bench_parameter(struct bench_problem *p, const char *name, const char *letters); /* real, added */
struct bench_operand *bench_output(struct bench_problem *p, const char *name, const char *letters);
struct bench_operand *bench_statistic(struct bench_problem *p, const char *name, const char *letters); /* real output */
struct bench_operand *bench_state(struct bench_problem *p, const char *name, const char *letters); /* real */
struct bench_operand *bench_indices(struct bench_problem *p, const char *name, const char *letters,
                                    enum bench_fill fill);
tensor bench_value(struct bench_problem *p, const char *name); /* none if it wasn't declared */
tensor bench_gradient(struct bench_problem *p, const char *name);

/* ---- problems (bench_problem.c) --------------------------------------------------------------------------------- */

/* Set the sizes that "B=8 T=2048" names. ERROR_INPUT for what is no such text. */
int bench_sizes(struct bench_problem *p, const char *shape, error *err);
/* Bytes that the operands will take; needs row, dev and size. */
int bench_problem_size(struct bench_problem *p, size_t *bytes, error *err);
/* Make the operands, with random values everywhere (gradients of outputs too). */
int bench_problem_open(struct bench_problem *p, error *err);
void bench_problem_close(struct bench_problem *p);
/* Bytes of its operands, moved once: forward, and forward + backward. */
void bench_problem_bytes(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both);

void bench_call_both(struct bench_problem *p);

struct bench_difference {
    double worst;     /* the largest |got - want| / |want|, norms over a slice, of any result */
    const char *name; /* of that result */
    bool gradient;
    bool wrong;       /* beyond what rounding explains */
    int64_t at[TENSOR_DIMS]; /* where in the slice one element is furthest beyond what is allowed to one */
    int ndim;
    double got, want; /* there */
};

/* Write those values (and gradients) anew; the constant too. */
int bench_problem_fill(struct bench_problem *p, error *err);
/* Elements from the first of a view to behind its last. */
int64_t bench_span(tensor t);
void bench_put_number(void *out, enum dtype dtype, int64_t at, double value);
double bench_get_number(const void *in, enum dtype dtype, int64_t at);

/* ---- the check (bench_check.c) ---------------------------------------------------------------------------------- */

/* Run the row once more with masked gradients and compare every result within the slice with the double CPU table. */
int bench_check(struct bench_problem *p, struct device *oracle, struct bench_difference *difference, error *err);

/* ---- times (bench_stand.c) -------------------------------------------------------------------------------------- */

/* What times work on a device: a timer, and memory that a GPU reads between repetitions, so that nothing of the
 * operands stays in its cache, which then holds lines that need not be written back, and so that the host has the time
 * to submit the next repetition whole. */
enum { BENCH_STAND_MOST = 60 }; /* repetitions of a measurement */
struct bench_stand {
    struct device *dev;
    struct device_timer *timer;
    arena memory;
    tensor flush;
    double *sum;
};
int bench_stand_open(struct bench_stand *s, struct device *dev, error *err);
void bench_stand_close(struct bench_stand *s);
/* As many repetitions as fit a tenth of a second, at least 5, or 2 of what takes very long, after some that tell how
 * long one takes. */
int bench_take_times(struct bench_stand *s, void (*work)(void *self), void *self, struct bench_times *times,
                     error *err);

/* ---- measuring (bench_ops.c) ------------------------------------------------------------------------------------ */

struct bench_ceilings {
    double bytes_per_s;    /* a large copy on the device, read and written bytes */
    double products_per_s; /* FLOP/s of a large product in the device's activation type */
    double special_per_s;
};

enum { BENCH_SHAPE_TEXT = 128 };

struct bench_measured {
    char shape[BENCH_SHAPE_TEXT]; /* with its changes */
    struct bench_times forward, both;    /* both.count = 0 where there is no backward */
    struct bench_work forward_work, both_work;
    struct bench_difference difference;
    bool solved;               /* a nonlinear recurrence, by `solver`, with this residual */
    struct cell_solver solver;
    double residual;
};
extern const char *const bench_solver_names[]; /* by method */

int bench_ceilings(struct device *dev, struct bench_ceilings *ceilings, error *err);
/* Seconds that the work takes at the ceilings, whichever of the three is longest. */
double bench_floor(const struct bench_work *work, const struct bench_ceilings *ceilings);
/* Open a problem, time it (unless not `timed`), check it and close it. */
int bench_problem_measure(struct bench_problem *p, bool timed, struct device *oracle, struct bench_measured *measured,
                          error *err);
/* The same for one row at one shape, with some of its letters changed: any that the shape names. Views of other sizes
 * than the case's are dense. */
int bench_operation(const struct bench_row *row, const char *shape, const char *changes, bool timed,
                    struct device *dev, struct device *oracle, struct bench_measured *measured, error *err);

#endif
