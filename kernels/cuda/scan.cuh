/* scan.cuh: what the two passes of the selective scan share: the problem, and how time is cut. */
#ifndef RIVERRUN_CUDA_SCAN_CUH
#define RIVERRUN_CUDA_SCAN_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

#define LOG2E 1.4426950408889634f

enum {
    SCAN_GROUP = 16,         /* states of a channel that are worked on at once */
    SCAN_PIECE = 64,         /* tokens between saved states */
    SCAN_CHANNELS = 132 * 256, /* channels (times batch rows) that fill a large chip: fewer have time cut in segments */
};

struct scan_problem {
    int64_t B, T, D, N;
    int64_t g_row, g_step, x_row, x_step, raw_row, raw_step, z_row, z_step, b_row, b_step, c_row, c_step; /* strides */
    const float *bias, *A_log, *d, *initial; /* d, initial: NULL when absent */
    const int32_t *doc;                      /* NULL: one document a row */
    int64_t pieces, per_segment, segments;   /* a segment is per_segment pieces of SCAN_PIECE tokens */
};

static inline int64_t scan_pieces(struct scan_shape s) {
    return ceil_div(s.T, SCAN_PIECE);
}

/* Pieces of a segment: all of them where the channels alone fill the chip. */
static inline int64_t scan_pieces_per_segment(struct scan_shape s) {
    int64_t pieces = scan_pieces(s), wanted = SCAN_CHANNELS / (s.B * s.D);
    if (wanted < 1) wanted = 1;
    if (wanted > pieces) wanted = pieces;
    return ceil_div(pieces, wanted);
}

scan_problem scan_problem_of(tensor g, tensor x, tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d,
                             tensor z, tensor initial, tensor doc);

/* Does a document start at time t, so that no state comes in? */
__device__ __forceinline__ bool scan_starts(const scan_problem &p, int64_t row, int64_t t) {
    if (!p.doc || t >= p.T) return false;
    const int32_t *doc = p.doc + row * p.T;
    return doc[t] != (t > 0 ? doc[t - 1] : 0);
}

#endif
