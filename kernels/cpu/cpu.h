/* cpu.h: the CPU's operations under their own names, for one real type, and what they share.
 *
 * The contract of each is in kernels/ops.h; kernels/cpu/table.c puts them into the two tables. Also here: the checks of
 * arguments, the way rows are divided into blocks so that sums come out the same with any number of threads, and the
 * carving of scratch into pieces, some for each thread. */
#ifndef RIVERRUN_CPU_CPU_H
#define RIVERRUN_CPU_CPU_H

#include "common/error.h"
#include "kernels/cpu/real.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#ifdef RIVERRUN_OPENMP
#include <omp.h>
#endif

/* --- checks of arguments ------------------------------------------------------------------------------------------ */

/* t has these dimensions (-1 matches any) and this dtype, and lies contiguously (`dense`) or at least in contiguous
 * last dimensions. */
static inline bool view_is(tensor t, enum dtype dtype, bool dense, int ndim, const int64_t *dim) {
    if (!tensor_given(t) || t.dtype != dtype || t.ndim != ndim) return false;
    for (int i = 0; i < ndim; i++)
        if (dim[i] != -1 && dim[i] != t.dim[i]) return false;
    return dense ? tensor_contiguous(t) : t.dim[ndim - 1] <= 1 || t.stride[ndim - 1] == 1;
}

#define VIEW_DIMS(...) (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

/* CHECK_DENSE(y, R, D): y is a contiguous (R,D) view of the table's real type. CHECK_ROWS: its rows may have gaps.
 * CHECK_INDEX: contiguous i32. CHECK_OPTIONAL: absent or dense. */
#define CHECK_DENSE(t, ...) ASSERT(view_is((t), REAL_DTYPE, true, VIEW_DIMS(__VA_ARGS__)))
#define CHECK_ROWS(t, ...) ASSERT(view_is((t), REAL_DTYPE, false, VIEW_DIMS(__VA_ARGS__)))
#define CHECK_INDEX(t, ...) ASSERT(view_is((t), DTYPE_I32, true, VIEW_DIMS(__VA_ARGS__)))
#define CHECK_OPTIONAL(t, ...) ASSERT(!tensor_given(t) || view_is((t), REAL_DTYPE, true, VIEW_DIMS(__VA_ARGS__)))
#define CHECK_OPTIONAL_ROWS(t, ...) ASSERT(!tensor_given(t) || view_is((t), REAL_DTYPE, false, VIEW_DIMS(__VA_ARGS__)))

/* Row r of a view of two dimensions or more, counted along the first. */
static inline real *row_of(tensor t, int64_t r) {
    return (real *)t.data + r * t.stride[0];
}

/* --- blocks of rows ----------------------------------------------------------------------------------------------- */

/* A sum over rows (the gradient of a norm's weight, of a bias) is made of one partial sum per block of rows, added in
 * the order of the blocks. The number of blocks depends on the number of rows only, so the bits don't depend on the
 * number of threads; 64 of them feed as many threads. */
#define ROW_BLOCKS_MAX 64
#define ROW_BLOCK_MIN 16 /* rows; below this a block's partial sum would cost more than its rows */

static inline int64_t row_blocks(int64_t R) {
    int64_t blocks = (R + ROW_BLOCK_MIN - 1) / ROW_BLOCK_MIN;
    return blocks < ROW_BLOCKS_MAX ? blocks : ROW_BLOCKS_MAX;
}

/* First row of block b of `blocks`; row_block_first(R, blocks, blocks) == R. */
static inline int64_t row_block_first(int64_t R, int64_t blocks, int64_t b) {
    return R / blocks * b + (R % blocks < b ? R % blocks : b);
}

/* sum (n) += partial[0] + partial[1] + ... of `blocks` rows of n, in that order. */
#define add_partials OP(add_partials)
void add_partials(real *sum, const real *partial, int64_t blocks, int64_t n);

/* sum (n) += the sum over R rows of n elements, `stride` elements apart; rows in order, accumulated in double. */
#define add_column_sums OP(add_column_sums)
void add_column_sums(real *sum, const real *rows, int64_t R, int64_t n, int64_t stride);

/* --- scratch and threads ------------------------------------------------------------------------------------------ */

/* Carving of scratch: 64-byte aligned pieces; with base NULL it only counts. */
struct carver {
    char *base;
    size_t used;
};

static inline real *carve_reals(struct carver *c, int64_t count) {
    real *piece = c->base ? (real *)(c->base + c->used) : NULL;
    c->used += ((size_t)count * sizeof(real) + 63) / 64 * 64;
    return piece;
}

enum {
    WORKERS_MAX = 64,             /* threads that get scratch of their own */
    WORKERS_WORK_MIN = 100000,    /* multiply-adds; fewer are not worth waking threads, which costs some microseconds */
};

/* The calling thread's place in a parallel region, and how many threads a region gets: at most one an item, and only
 * one if all of it is small (size: multiply-adds). */
#ifdef RIVERRUN_OPENMP
static inline int worker_index(void) {
    return omp_get_thread_num();
}

static inline int worker_count(int64_t items, int64_t size) {
    int64_t most = items < WORKERS_MAX ? items : WORKERS_MAX;
    int threads = omp_get_max_threads();
    return size < WORKERS_WORK_MIN ? 1 : most < threads ? (int)most : threads;
}
#else
static inline int worker_index(void) {
    return 0;
}

static inline int worker_count(int64_t items, int64_t size) {
    (void)items;
    (void)size;
    return 1;
}
#endif

/* --- the operations, in the order of struct ops ------------------------------------------------------------------- */

void OP(embedding_forward)(struct device *dev, tensor out, tensor tokens, tensor table);
void OP(embedding_backward)(struct device *dev, tensor dtable, tensor dout, tensor tokens, void *scratch);
size_t OP(embedding_backward_scratch)(int64_t R, int64_t D, int64_t V);

void OP(add_norm_forward)(struct device *dev, tensor out_residual, tensor y, tensor mean, tensor rstd, tensor residual,
                          tensor scale, tensor branch, tensor weight, double eps);
void OP(add_norm_backward)(struct device *dev, tensor dresidual, tensor dbranch, tensor dweight, tensor dnext_scale,
                           tensor dy, tensor dnext, tensor residual, tensor mean, tensor rstd, tensor weight,
                           tensor next_scale, void *scratch);
size_t OP(add_norm_backward_scratch)(int64_t R, int64_t D);

void OP(linear_forward)(struct device *dev, tensor y, tensor x, tensor w, tensor bias);
void OP(linear_backward)(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dbias, tensor dy, tensor x,
                         tensor w);

void OP(conv_forward)(struct device *dev, tensor y, tensor final, tensor x, tensor weight, tensor bias, tensor initial,
                      tensor doc, bool with_silu);
void OP(conv_backward)(struct device *dev, tensor dx, tensor dinitial, tensor dweight, tensor dbias, tensor dy,
                       tensor dfinal, tensor x, tensor weight, tensor bias, tensor initial, tensor doc, bool with_silu,
                       void *scratch);
size_t OP(conv_backward_scratch)(int64_t B, int64_t T, int64_t C, int64_t W);
void OP(conv_step)(struct device *dev, tensor y, tensor state, tensor x, tensor weight, tensor bias, bool with_silu);

void OP(ssd_dt_forward)(struct device *dev, tensor dt, tensor a, tensor raw, tensor bias, tensor A_log, double dt_min,
                        double dt_max);
void OP(ssd_dt_backward)(struct device *dev, tensor draw, tensor dbias, tensor dA_log, tensor ddt, tensor da,
                         tensor raw, tensor bias, tensor A_log, double dt_min, double dt_max, void *scratch);
size_t OP(ssd_dt_backward_scratch)(int64_t B, int64_t T, int64_t H);

void OP(ssd_forward)(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor dt, tensor a, tensor b,
                     tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch);
void OP(ssd_backward)(struct device *dev, tensor dx, tensor ddt, tensor da, tensor db, tensor dc, tensor dinitial,
                      tensor dd, tensor dy, tensor dfinal, const void *saved, tensor x, tensor dt, tensor a, tensor b,
                      tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch);
size_t OP(ssd_saved)(struct ssd_shape shape);
size_t OP(ssd_forward_scratch)(struct ssd_shape shape);
size_t OP(ssd_backward_scratch)(struct ssd_shape shape);
void OP(ssd_step)(struct device *dev, tensor y, tensor state, tensor x, tensor dt, tensor a, tensor b, tensor c,
                  tensor d);

void OP(scan_forward)(struct device *dev, tensor g, tensor final, void *saved, tensor x, tensor raw, tensor bias,
                      tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial, tensor doc,
                      void *scratch);
void OP(scan_backward)(struct device *dev, tensor dx, tensor draw, tensor db, tensor dc, tensor dz, tensor dinitial,
                       tensor dbias, tensor dA_log, tensor dd, tensor dg, tensor dfinal, const void *saved, tensor x,
                       tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial,
                       tensor doc, void *scratch);
size_t OP(scan_saved)(struct scan_shape shape);
size_t OP(scan_forward_scratch)(struct scan_shape shape);
size_t OP(scan_backward_scratch)(struct scan_shape shape);
void OP(scan_step)(struct device *dev, tensor g, tensor state, tensor x, tensor raw, tensor bias, tensor A_log,
                   tensor b, tensor c, tensor d, tensor z);

void OP(gated_rmsnorm_forward)(struct device *dev, tensor g, tensor rstd, tensor y, tensor z, tensor weight,
                               bool norm_first, double eps);
void OP(gated_rmsnorm_backward)(struct device *dev, tensor dy, tensor dz, tensor dweight, tensor g, tensor dg, tensor y,
                                tensor z, tensor rstd, tensor weight, bool norm_first, void *scratch);
size_t OP(gated_rmsnorm_backward_scratch)(int64_t R, int64_t I);

void OP(softcap_forward)(struct device *dev, tensor y, tensor x, tensor bias, double cap);
void OP(softcap_backward)(struct device *dev, tensor dx, tensor dbias, tensor dy, tensor y, double cap, void *scratch);
size_t OP(softcap_backward_scratch)(int64_t R, int64_t N);

void OP(mlstm_forward)(struct device *dev, tensor h, struct mlstm_state final, void *saved, tensor q, tensor k,
                       tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc, struct mlstm_rule rule,
                       int64_t chunk, void *scratch);
void OP(mlstm_backward)(struct device *dev, tensor dq, tensor dk, tensor dv, tensor di, tensor df,
                        struct mlstm_state dinitial, tensor dh, struct mlstm_state dfinal, const void *saved, tensor h,
                        tensor q, tensor k, tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc,
                        struct mlstm_rule rule, int64_t chunk, void *scratch);
size_t OP(mlstm_saved)(struct mlstm_shape shape);
size_t OP(mlstm_forward_scratch)(struct mlstm_shape shape);
size_t OP(mlstm_backward_scratch)(struct mlstm_shape shape);
void OP(mlstm_step)(struct device *dev, tensor h, struct mlstm_state state, tensor q, tensor k, tensor v, tensor i,
                    tensor f, struct mlstm_rule rule);
void OP(slstm_forward)(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor r, tensor bias,
                       tensor initial, tensor doc, void *scratch);
void OP(slstm_backward)(struct device *dev, tensor dx, tensor dr, tensor dbias, tensor dinitial, tensor dy,
                        tensor dfinal, const void *saved, tensor y, tensor x, tensor r, tensor bias, tensor initial,
                        tensor doc, double clip, void *scratch);
size_t OP(slstm_saved)(struct slstm_shape shape);
size_t OP(slstm_forward_scratch)(struct slstm_shape shape);
size_t OP(slstm_backward_scratch)(struct slstm_shape shape);
void OP(slstm_step)(struct device *dev, tensor y, tensor state, tensor x, tensor r, tensor bias, void *scratch);

void OP(head_norm_forward)(struct device *dev, tensor g, tensor mean, tensor rstd, tensor y, tensor weight, tensor x,
                           tensor skip, tensor z, enum activation act, double eps);
void OP(head_norm_backward)(struct device *dev, tensor dy, tensor dx, tensor dz, tensor dweight, tensor dskip,
                            tensor dg, tensor y, tensor mean, tensor rstd, tensor weight, tensor x, tensor skip,
                            tensor z, enum activation act, void *scratch);
size_t OP(head_norm_backward_scratch)(int64_t R, int64_t I, int64_t H);

void OP(block_linear_forward)(struct device *dev, tensor y, tensor x, tensor w);
void OP(block_linear_backward)(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dy, tensor x, tensor w,
                               void *scratch);
size_t OP(block_linear_backward_scratch)(int64_t R, int64_t G, int64_t O, int64_t I);

void OP(rat_forward)(struct device *dev, tensor y, struct rat_state final, void *saved, tensor z, tensor v, tensor g,
                     tensor bias, tensor q, tensor k, tensor positions, struct rat_state initial, int64_t chunk,
                     double base, void *scratch);
void OP(rat_backward)(struct device *dev, tensor dz, tensor dv, tensor dg, tensor dbias, tensor dq, tensor dk,
                      tensor dy, const void *saved, tensor z, tensor v, tensor g, tensor bias, tensor q, tensor k,
                      tensor positions, struct rat_state initial, int64_t chunk, double base, void *scratch);
size_t OP(rat_saved)(struct rat_shape shape);
size_t OP(rat_forward_scratch)(struct rat_shape shape);
size_t OP(rat_backward_scratch)(struct rat_shape shape);
void OP(rat_step)(struct device *dev, tensor y, struct rat_state state, tensor z, tensor v, tensor g, tensor bias,
                  tensor q, tensor k, int64_t chunk, double base, void *scratch);
size_t OP(rat_step_scratch)(struct rat_shape shape);

void OP(cell_forward)(struct device *dev, tensor y, tensor others, tensor final, struct cell_report *report, tensor u,
                      tensor bias, tensor weight, tensor initial, tensor doc, const struct cell *cell,
                      struct cell_solver solver, void *scratch);
void OP(cell_backward)(struct device *dev, tensor du, tensor dbias, tensor dweight, tensor dinitial, tensor dy,
                       tensor dfinal, tensor y, tensor others, tensor u, tensor bias, tensor weight, tensor initial,
                       tensor doc, const struct cell *cell, void *scratch);
size_t OP(cell_forward_scratch)(struct cell_shape shape, struct cell_solver solver);
size_t OP(cell_backward_scratch)(struct cell_shape shape);
struct cell_solver OP(cell_choose)(struct cell_shape shape);
void OP(cell_step)(struct device *dev, tensor y, tensor state, tensor u, tensor bias, tensor weight,
                   const struct cell *cell);

void OP(glu_forward)(struct device *dev, tensor h, tensor u, enum activation act);
void OP(glu_backward)(struct device *dev, tensor du, tensor dh, tensor u, enum activation act);
void OP(token_positions)(struct device *dev, tensor positions, tensor doc, tensor before);
void OP(rope_forward)(struct device *dev, tensor y, tensor rstd, tensor x, tensor weight, tensor positions,
                      double base, double eps);
void OP(rope_backward)(struct device *dev, tensor dx, tensor dweight, tensor dy, tensor rstd, tensor x, tensor weight,
                       tensor positions, double base, void *scratch);
size_t OP(rope_backward_scratch)(int64_t R, int64_t H, int64_t P);
void OP(attention_forward)(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v, tensor positions,
                           struct attention_cache cache, struct attention_rule rule, void *scratch);
void OP(attention_backward)(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                            tensor q, tensor k, tensor v, tensor positions, struct attention_cache cache,
                            struct attention_rule rule, void *scratch);
size_t OP(attention_forward_scratch)(struct attention_shape shape);
size_t OP(attention_backward_scratch)(struct attention_shape shape);
void OP(attention_store)(struct device *dev, struct attention_cache cache, tensor k, tensor v, tensor positions);
void OP(attention_step)(struct device *dev, tensor o, tensor q, struct attention_cache cache,
                        struct attention_rule rule, void *scratch);
size_t OP(attention_step_scratch)(struct attention_shape shape);


void OP(head_loss)(struct device *dev, struct loss_sums *sums, tensor losses, tensor dx, tensor dw, tensor x, tensor w,
                   tensor targets, double scale, double z_loss, double cap, void *scratch);
size_t OP(head_loss_scratch)(int64_t R, int64_t D, int64_t V);

void OP(convert)(struct device *dev, tensor to, tensor from);

void OP(sum_squares)(struct device *dev, double *sum, tensor x);
void OP(step_scalars)(struct device *dev, struct adamw_step *step, struct step_report *report, int64_t *steps,
                      const struct step_totals *totals, const struct step_rates *rates, const struct step_rule *rule);
void OP(worst_reports)(struct device *dev, struct cell_report *worst, double *largest,
                       const struct cell_report *reports, int64_t ranks, int64_t n);
void OP(adamw)(struct device *dev, const struct adamw_slice *slices, int64_t count, const struct adamw_step *step);

#endif
