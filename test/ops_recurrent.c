/* test/ops_recurrent.c: rows of the recurrent operations: conv, ssd_dt, ssd and their steps. */
#include "test/ops.h"

const struct op_row *const ops_recurrent_rows[] = {NULL};
