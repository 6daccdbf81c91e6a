/* test/ops_run.h: what test/ops.c needs of test/ops_run.c beyond test/ops.h. Those who write rows don't need it. */
#ifndef RIVERRUN_TEST_OPS_RUN_H
#define RIVERRUN_TEST_OPS_RUN_H

#include "test/ops.h"

/* What the checks of the current case found. */
struct op_report {
    const char *program, *mode, *options; /* the command that replays a case: "build/test/ops", "test", " --seed 3" */
    const char *row, *case_text;          /* the current case */
    int case_failures;                    /* of the current case */
    int64_t checks, failures;             /* of everything so far */
    double worst;                         /* the largest difference so far, as a share of what was allowed */
    char worst_where[512];
};

/* Allocate, lay out with guards, fill. parameters has OP_PARAMETERS places in the order of row->parameters. */
void run_open(struct run *r, const struct op_row *row, struct device *dev, const int64_t *parameters, uint64_t seed,
              enum dtype rounding, struct op_report *report);

/* The steps of run_forward and run_backward, for timing and for what needs only part of them. */
void run_upload(struct run *r);
void run_call_forward(struct run *r);
void run_call_backward(struct run *r);

/* The parameters of a row: names and defaults. Returns their number. */
#define OP_NAME 16
int row_parameters(const struct op_row *row, char names[OP_PARAMETERS][OP_NAME], int64_t defaults[OP_PARAMETERS]);

/* Relative unit of a difference: half the spacing of the dtype at 1. */
double dtype_unit(enum dtype dtype);

/* Compare with an allowance for each element of share * (|want| + rms(want)) + floor; reports the worst. */
void compare_arrays(struct op_report *report, const char *what, const double *got, const double *want, int64_t count,
                    double share, double floor);
void report_failure(struct op_report *report, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
