/* table.c: the CPU's table of operations, compiled once for float (ops_cpu_f32) and once for double (ops_cpu_f64).
 * device_open() hands out one of them. */
#include "kernels/cpu/cpu.h"

#ifdef REAL_IS_FLOAT
#define TABLE_NAME "cpu-f32"
#else
#define TABLE_NAME "cpu-f64"
#endif

#define ENTRY(name) .name = OP(name)

const struct ops OP(ops_cpu) = {
    .name = TABLE_NAME,
    .act = REAL_DTYPE,
    .real = REAL_DTYPE,
    .memory_page = 1,
    ENTRY(embedding_forward),
    ENTRY(embedding_backward),
    ENTRY(embedding_backward_scratch),
    ENTRY(add_rmsnorm_forward),
    ENTRY(add_rmsnorm_backward),
    ENTRY(add_rmsnorm_backward_scratch),
    ENTRY(linear_forward),
    ENTRY(linear_backward),
    ENTRY(conv_forward),
    ENTRY(conv_backward),
    ENTRY(conv_backward_scratch),
    ENTRY(conv_step),
    ENTRY(ssd_dt_forward),
    ENTRY(ssd_dt_backward),
    ENTRY(ssd_dt_backward_scratch),
    ENTRY(ssd_forward),
    ENTRY(ssd_backward),
    ENTRY(ssd_saved),
    ENTRY(ssd_forward_scratch),
    ENTRY(ssd_backward_scratch),
    ENTRY(ssd_step),
    ENTRY(scan_forward),
    ENTRY(scan_backward),
    ENTRY(scan_saved),
    ENTRY(scan_forward_scratch),
    ENTRY(scan_backward_scratch),
    ENTRY(scan_step),
    ENTRY(gated_rmsnorm_forward),
    ENTRY(gated_rmsnorm_backward),
    ENTRY(gated_rmsnorm_backward_scratch),
    ENTRY(softcap_forward),
    ENTRY(softcap_backward),
    ENTRY(softcap_backward_scratch),
    ENTRY(mlstm_forward),
    ENTRY(mlstm_backward),
    ENTRY(mlstm_saved),
    ENTRY(mlstm_forward_scratch),
    ENTRY(mlstm_backward_scratch),
    ENTRY(mlstm_step),
    ENTRY(slstm_forward),
    ENTRY(slstm_backward),
    ENTRY(slstm_saved),
    ENTRY(slstm_forward_scratch),
    ENTRY(slstm_backward_scratch),
    ENTRY(slstm_step),
    ENTRY(glu_forward),
    ENTRY(glu_backward),
    ENTRY(head_loss),
    ENTRY(head_loss_scratch),
    ENTRY(convert),
    ENTRY(sum_squares),
    ENTRY(step_scalars),
    ENTRY(adamw),
};
