/* cuda.h: the CUDA device as the C side of kernels/ sees it: opening, memory, and one launcher for each operation of
 * kernels/ops.h. Used by kernels/device.c and table.c here; nothing above kernels/ includes it. The launchers have
 * exactly the types of struct ops' members, so they are declared from them. One launcher serves both activation types:
 * it looks at the views it is given.
 */
#ifndef RIVERRUN_CUDA_H
#define RIVERRUN_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/device.h"

/* fp32: every product in full float, no TF32: the checking path. bf16: activations and the operands of products. */
extern const struct ops ops_cuda_f32, ops_cuda_bf16;

/* Fill in impl and memory of a device whose kind, precision and ops are set. ERROR_INPUT when there is no GPU that this
 * build has code for. */
int cuda_device_open(struct device *dev, int index, error *err);
void cuda_device_close(struct device *dev);
void cuda_device_write(struct device *dev, void *to_device, const void *from_host, size_t bytes);
void cuda_device_read(struct device *dev, void *to_host, const void *from_device, size_t bytes);
void cuda_device_copy(struct device *dev, void *to, const void *from, size_t bytes);
void cuda_device_zero(struct device *dev, void *memory, size_t bytes);
size_t cuda_device_present(void);
void cuda_device_fetch(struct device *dev, void *to_host, const void *from_device, size_t bytes);
uint64_t cuda_device_mark(struct device *dev);
void cuda_device_wait(struct device *dev, uint64_t mark);
void cuda_device_run(struct device *dev, struct device_record **r, void (*work)(void *self), void *self);
void cuda_device_record_close(struct device *dev, struct device_record *r);
void cuda_device_fork(struct device *dev);
void cuda_device_back(struct device *dev);
void cuda_device_join(struct device *dev);
void cuda_device_range_push(struct device *dev, const char *name);
void cuda_device_range_pop(struct device *dev);
int cuda_device_failure(struct device *dev, error *err);
struct device_memory_use cuda_device_memory(struct device *dev);
double cuda_device_peak_flops(const struct device *dev);
int cuda_device_check(struct device *dev, error *err);
int cuda_device_count(void);
uint64_t cuda_device_identity(const struct device *dev);
void cuda_device_describe(const struct device *dev, char *out, size_t size);

/* Two events for each lap of a device_timer. NULL when there is no memory for them. */
void *cuda_timer_open(struct device *dev, int laps);
void cuda_timer_close(void *events, int laps);
void cuda_timer_mark(struct device *dev, void *events, int event);
double cuda_timer_seconds(struct device *dev, void *events, int lap);

#define CUDA_OP(name) __typeof__(*((struct ops *)0)->name) cuda_##name
CUDA_OP(embedding_forward);
CUDA_OP(embedding_backward);
CUDA_OP(embedding_backward_scratch);
CUDA_OP(add_norm_forward);
CUDA_OP(add_norm_backward);
CUDA_OP(add_norm_backward_scratch);
CUDA_OP(linear_forward);
CUDA_OP(linear_backward);
CUDA_OP(conv_forward);
CUDA_OP(conv_backward);
CUDA_OP(conv_backward_scratch);
CUDA_OP(conv_step);
CUDA_OP(ssd_dt_forward);
CUDA_OP(ssd_dt_backward);
CUDA_OP(ssd_dt_backward_scratch);
CUDA_OP(ssd_forward);
CUDA_OP(ssd_backward);
__typeof__(*((struct ops *)0)->ssd_saved) cuda_ssd_saved_f32, cuda_ssd_saved_bf16, cuda_ssd_forward_scratch_f32,
    cuda_ssd_forward_scratch_bf16, cuda_ssd_backward_scratch_f32, cuda_ssd_backward_scratch_bf16;
CUDA_OP(ssd_step);
CUDA_OP(mlstm_forward);
CUDA_OP(mlstm_backward);
CUDA_OP(mlstm_saved);
__typeof__(*((struct ops *)0)->mlstm_saved) cuda_mlstm_forward_scratch_f32, cuda_mlstm_forward_scratch_bf16,
    cuda_mlstm_backward_scratch_f32, cuda_mlstm_backward_scratch_bf16;
CUDA_OP(mlstm_step);
CUDA_OP(scan_forward);
CUDA_OP(scan_backward);
CUDA_OP(scan_saved);
CUDA_OP(scan_forward_scratch);
CUDA_OP(scan_backward_scratch);
CUDA_OP(scan_step);
CUDA_OP(slstm_forward);
CUDA_OP(slstm_backward);
CUDA_OP(slstm_forward_scratch);
CUDA_OP(slstm_step);
__typeof__(*((struct ops *)0)->slstm_saved) cuda_slstm_saved_f32, cuda_slstm_saved_bf16,
    cuda_slstm_backward_scratch_f32, cuda_slstm_backward_scratch_bf16;
CUDA_OP(gated_rmsnorm_forward);
CUDA_OP(gated_rmsnorm_backward);
CUDA_OP(gated_rmsnorm_backward_scratch);
CUDA_OP(head_norm_forward);
CUDA_OP(head_norm_backward);
CUDA_OP(head_norm_backward_scratch);
CUDA_OP(block_linear_forward);
CUDA_OP(block_linear_backward);
CUDA_OP(block_linear_backward_scratch);
CUDA_OP(softcap_forward);
CUDA_OP(softcap_backward);
CUDA_OP(softcap_backward_scratch);
CUDA_OP(glu_forward);
CUDA_OP(glu_backward);
CUDA_OP(token_positions);
CUDA_OP(rope_forward);
CUDA_OP(rope_backward);
CUDA_OP(rope_backward_scratch);
CUDA_OP(attention_forward);
CUDA_OP(attention_backward);
CUDA_OP(attention_forward_scratch);
CUDA_OP(attention_backward_scratch);
CUDA_OP(attention_store);
CUDA_OP(attention_step);
CUDA_OP(attention_step_scratch);
CUDA_OP(rat_forward);
CUDA_OP(rat_backward);
CUDA_OP(rat_forward_scratch);
CUDA_OP(rat_backward_scratch);
CUDA_OP(rat_step);
CUDA_OP(rat_step_scratch);
__typeof__(*((struct ops *)0)->rat_saved) cuda_rat_saved_f32, cuda_rat_saved_bf16;
CUDA_OP(cell_forward);
CUDA_OP(cell_backward);
CUDA_OP(cell_forward_scratch);
CUDA_OP(cell_backward_scratch);
CUDA_OP(cell_choose);
CUDA_OP(cell_step);
CUDA_OP(head_loss);
__typeof__(*((struct ops *)0)->head_loss_scratch) cuda_head_loss_scratch_f32, cuda_head_loss_scratch_bf16;
CUDA_OP(convert);
CUDA_OP(sum_squares);
CUDA_OP(step_scalars);
CUDA_OP(worst_reports);
CUDA_OP(adamw);
#undef CUDA_OP

#ifdef __cplusplus
}
#endif

#endif
