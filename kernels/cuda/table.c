/* table.c: the two tables of the CUDA device. They differ in the type of activations, and in what depends on its size;
 * device_open() hands out one of them. */
#include "kernels/cuda/cuda.h"

/* cudaMalloc hands out pages of 2 MiB. Beside that: the context, the code of the kernels and of cuBLASLt's, its
 * workspace, recorded steps; for several ranks, what NCCL takes. Measured on one and on two H100 (docs/gpu.md). */
#define MEMORY                                                                                                         \
    .memory_page = (size_t)2 << 20, .memory_overhead = (size_t)560 << 20, .memory_peers = (size_t)873 << 20

#define ENTRY(name) .name = cuda_##name
#define ENTRIES                                                                                                        \
    ENTRY(embedding_forward), ENTRY(embedding_backward), ENTRY(embedding_backward_scratch),                            \
        ENTRY(add_norm_forward), ENTRY(add_norm_backward), ENTRY(add_norm_backward_scratch),                           \
        ENTRY(linear_forward), ENTRY(linear_backward), ENTRY(conv_forward), ENTRY(conv_backward),                      \
        ENTRY(conv_backward_scratch), ENTRY(conv_step), ENTRY(ssd_dt_forward), ENTRY(ssd_dt_backward),                 \
        ENTRY(ssd_dt_backward_scratch), ENTRY(ssd_forward), ENTRY(ssd_backward), ENTRY(ssd_step),                      \
        ENTRY(mlstm_forward), ENTRY(mlstm_backward), ENTRY(mlstm_saved), ENTRY(mlstm_step),                            \
        ENTRY(scan_forward), ENTRY(scan_backward), ENTRY(scan_saved), ENTRY(scan_forward_scratch),                     \
        ENTRY(scan_backward_scratch), ENTRY(scan_step), ENTRY(slstm_forward), ENTRY(slstm_backward),                   \
        ENTRY(slstm_forward_scratch), ENTRY(slstm_step), ENTRY(gated_rmsnorm_forward), ENTRY(gated_rmsnorm_backward),  \
        ENTRY(gated_rmsnorm_backward_scratch), ENTRY(head_norm_forward), ENTRY(head_norm_backward),                    \
        ENTRY(head_norm_backward_scratch), ENTRY(block_linear_forward), ENTRY(block_linear_backward),                  \
        ENTRY(block_linear_backward_scratch), ENTRY(softcap_forward), ENTRY(softcap_backward),                         \
        ENTRY(softcap_backward_scratch), ENTRY(glu_forward), ENTRY(glu_backward), ENTRY(head_loss),                    \
        ENTRY(token_positions), ENTRY(rope_forward), ENTRY(rope_backward), ENTRY(rope_backward_scratch),               \
        ENTRY(attention_forward), ENTRY(attention_backward),                                                           \
        ENTRY(attention_forward_scratch), ENTRY(attention_backward_scratch),                                           \
        ENTRY(rat_forward), ENTRY(rat_backward), ENTRY(rat_forward_scratch), ENTRY(rat_backward_scratch),              \
        ENTRY(rat_step), ENTRY(rat_step_scratch),                                                                      \
        ENTRY(attention_store), ENTRY(attention_step), ENTRY(attention_step_scratch),                                  \
        ENTRY(cell_forward), ENTRY(cell_backward), ENTRY(cell_forward_scratch), ENTRY(cell_backward_scratch),          \
        ENTRY(cell_choose), ENTRY(cell_step), ENTRY(convert), ENTRY(sum_squares), ENTRY(step_scalars),                 \
        ENTRY(worst_reports), ENTRY(adamw)

const struct ops ops_cuda_f32 = {
    .name = "cuda-f32",
    .act = DTYPE_F32,
    .real = DTYPE_F32,
    MEMORY,
    ENTRIES,
    .head_loss_scratch = cuda_head_loss_scratch_f32,
    .rat_saved = cuda_rat_saved_f32,
    .ssd_saved = cuda_ssd_saved_f32,
    .ssd_forward_scratch = cuda_ssd_forward_scratch_f32,
    .ssd_backward_scratch = cuda_ssd_backward_scratch_f32,
    .mlstm_forward_scratch = cuda_mlstm_forward_scratch_f32,
    .mlstm_backward_scratch = cuda_mlstm_backward_scratch_f32,
    .slstm_saved = cuda_slstm_saved_f32,
    .slstm_backward_scratch = cuda_slstm_backward_scratch_f32,
};

const struct ops ops_cuda_bf16 = {
    .name = "cuda-bf16",
    .act = DTYPE_BF16,
    .real = DTYPE_F32,
    MEMORY,
    ENTRIES,
    .head_loss_scratch = cuda_head_loss_scratch_bf16,
    .rat_saved = cuda_rat_saved_bf16,
    .ssd_saved = cuda_ssd_saved_bf16,
    .ssd_forward_scratch = cuda_ssd_forward_scratch_bf16,
    .ssd_backward_scratch = cuda_ssd_backward_scratch_bf16,
    .mlstm_forward_scratch = cuda_mlstm_forward_scratch_bf16,
    .mlstm_backward_scratch = cuda_mlstm_backward_scratch_bf16,
    .slstm_saved = cuda_slstm_saved_bf16,
    .slstm_backward_scratch = cuda_slstm_backward_scratch_bf16,
};
