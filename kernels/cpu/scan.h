/* scan.h: what the forward and the backward pass of the selective scan on the CPU share: the problem, and one block of
 * channels of one batch row. Used by scan.c and scan_backward.c only. */
#ifndef RIVERRUN_CPU_SCAN_H
#define RIVERRUN_CPU_SCAN_H

#include "kernels/cpu/cpu.h"

enum {
    SCAN_LANES = 32, /* channels of a block: they stand side by side in vectors */
    SCAN_CHUNK = 32, /* tokens of a chunk: its arrays stay in the first cache, and one state a chunk is saved */
};

#define SCAN_LOG2_E ((real)1.4426950408889634)
#define SCAN_LN_2 ((real)0.6931471805599453)

/* The channels of a block, one number for each; those past its end are 0. */
typedef real scan_lanes[SCAN_LANES];

/* The arguments of a problem, with B..N as in ops.h, K the number of chunks of a row and M that of blocks. */
struct scan_problem {
    int64_t B, T, D, N, K, M;
    tensor x, raw, bias, A_log, b, c, d, z, initial, doc;
};

/* One block of channels of one batch row. */
struct scan_block {
    const struct scan_problem *p;
    int64_t row, first, count; /* channels first .. first+count-1 */
    scan_lanes bias, skip;     /* skip: d, 0 where there is none */
    scan_lanes *rate;          /* N of them: A log2(e), so that a decay is 2^(delta rate) */
};

/* One chunk of a block: tokens t0 .. t0+L-1. */
struct scan_chunk {
    int64_t t0, L;
    int starts; /* tokens that start a document, counted from t0 */
    uint8_t start[SCAN_CHUNK];
};

struct scan_problem OP(scan_problem)(tensor x, tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d,
                                     tensor z, tensor initial, tensor doc);

/* rate: N lanes of memory that the block fills and keeps. */
void OP(scan_block)(struct scan_block *block, const struct scan_problem *p, int64_t row, int64_t index,
                    scan_lanes *rate);
struct scan_chunk OP(scan_chunk)(const struct scan_problem *p, int64_t row, int64_t index);

/* decay[i] = exp(delta[i] A[n]), or 0 where a document starts, so that nothing of the state before is left. */
void OP(scan_decays)(scan_lanes *decay, const struct scan_block *block, const struct scan_chunk *k,
                     const scan_lanes *delta, int64_t n);

/* Between a (B,D,N) array (absent: zeros) and the block's N lanes. */
void OP(scan_state_read)(scan_lanes *state, const struct scan_block *block, tensor from);
void OP(scan_state_write)(tensor to, const struct scan_block *block, const scan_lanes *state);

/* Where a block's states at the starts of chunks are saved: N lanes for chunk `index`. */
static inline scan_lanes *scan_saved_state(const struct scan_block *block, const void *saved, int64_t index) {
    const struct scan_problem *p = block->p;
    return (scan_lanes *)saved + (((block->row * p->M + block->first / SCAN_LANES) * p->K) + index) * p->N;
}

/* The block's channels in a strided (B,T,D) view. */
static inline real *scan_row(const struct scan_block *block, tensor t, int64_t time) {
    return (real *)t.data + block->row * t.stride[0] + time * t.stride[1] + block->first;
}

static inline void scan_read(real *out, const real *in, int64_t count) {
    if (count == SCAN_LANES) memcpy(out, in, sizeof(scan_lanes));
    else for (int64_t l = 0; l < SCAN_LANES; l++) out[l] = l < count ? in[l] : 0;
}

static inline void scan_write(real *out, const real *in, int64_t count) {
    if (count == SCAN_LANES) memcpy(out, in, sizeof(scan_lanes));
    else for (int64_t l = 0; l < count; l++) out[l] = in[l];
}

static inline int64_t scan_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline scan_lanes *scan_carve(struct carver *c, int64_t count) {
    return (scan_lanes *)carve_reals(c, count * SCAN_LANES);
}

#endif
