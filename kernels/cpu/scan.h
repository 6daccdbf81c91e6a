/* scan.h: what the forward and the backward pass of the selective scan on the CPU share: the problem, and one block of
 * channels of one batch row. Used by scan.c and scan_backward.c only. */
#ifndef RIVERRUN_CPU_SCAN_H
#define RIVERRUN_CPU_SCAN_H

#include "kernels/cpu/cpu.h"

/* The widest vectors of the machine that is compiled for. Where a loop carries numbers from token to token,
 * the compilers' own vector types keep them in registers; other loops over lanes are vectorised as elsewhere. */
#if defined(__AVX512F__)
#define SCAN_VECTOR_BYTES 64
#elif defined(__AVX__)
#define SCAN_VECTOR_BYTES 32
#else
#define SCAN_VECTOR_BYTES 16
#endif
typedef real scan_vector __attribute__((vector_size(SCAN_VECTOR_BYTES), aligned(sizeof(real)), may_alias));

enum {
    SCAN_WIDTH = SCAN_VECTOR_BYTES / sizeof(real),
    SCAN_VECTORS = 4,                       /* of a block: enough to hide how long an operation takes */
    SCAN_LANES = SCAN_VECTORS * SCAN_WIDTH, /* channels of a block */
    SCAN_CHUNK = 32, /* tokens of a chunk: its arrays stay near, and one state a chunk is saved */
};

/* Loops over lanes, in vectors of that width. */
#define SCAN_PRAGMA(text) _Pragma(#text)
#define SCAN_SIMD SCAN_PRAGMA(omp simd simdlen(SCAN_WIDTH))

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

/* One chunk of a row: tokens t0 .. t0+L-1. */
struct scan_chunk {
    int64_t t0, L;
    bool begins[SCAN_CHUNK]; /* the token starts a document: the state before it is another's */
};

struct scan_problem OP(scan_problem)(tensor x, tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d,
                                     tensor z, tensor initial, tensor doc);

/* rate: N lanes of memory that the block fills and keeps. */
void OP(scan_block)(struct scan_block *block, const struct scan_problem *p, int64_t row, int64_t index,
                    scan_lanes *rate);
struct scan_chunk OP(scan_chunk)(const struct scan_problem *p, int64_t row, int64_t index);

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

/* Vector v of lanes. */
static inline scan_vector *scan_at(const real *lanes, int v) {
    return (scan_vector *)lanes + v;
}

/* Ask for a row of the block, if it exists: rows lie too far apart for the processor to guess the next one. (Always
 * inline: gcc drops calls of a function that does nothing but this.) */
__attribute__((always_inline)) static inline void scan_prefetch(const struct scan_block *block, tensor t, int64_t time,
                                                                int for_write) {
    if (!tensor_given(t) || time < 0 || time >= block->p->T) return;
    const char *row = (const char *)scan_row(block, t, time), *end = row + (size_t)block->count * sizeof(real);
    for (; row < end; row += 64) {
        if (for_write) __builtin_prefetch(row, 1);
        else __builtin_prefetch(row, 0);
    }
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
