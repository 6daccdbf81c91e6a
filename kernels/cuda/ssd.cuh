/* ssd.cuh: what the two passes of SSD on the GPU share: the problem, how it is cut, and how a block holds a state. */
#ifndef RIVERRUN_CUDA_SSD_CUH
#define RIVERRUN_CUDA_SSD_CUH

#include "kernels/cuda/launch.cuh"

enum {
    SSD_WARPS = 8,
    SSD_ROWS = 8,                          /* rows p of the state in a warp */
    SSD_HEAD = SSD_WARPS * SSD_ROWS,       /* rows in a block: wider heads take several blocks */
    SSD_STATES_MAX = 256,                  /* columns n in a launch: more are walked in groups */
    SSD_PIECE = 256,                       /* tokens between saved states */
    SSD_STAGE = 16,                        /* tokens in shared memory at a time */
    SSD_BLOCKS = 132 * 4,                  /* that fill a large chip: fewer have time cut in segments */
};

struct ssd_problem {
    int64_t B, T, H, P, G, N;
    int64_t x_row, x_step, y_row, y_step, b_row, b_step, c_row, c_step; /* strides over batch rows and time */
    const float *dt, *a, *d, *initial;                                  /* d, initial: NULL when absent */
    const int32_t *doc;                                                 /* NULL: one document a row */
    int64_t blocks;                                                     /* of a head */
    int64_t pieces, per_segment, segments;                              /* a segment is per_segment pieces */
};

static inline int64_t ssd_pieces(struct ssd_shape s) {
    return ceil_div(s.T, SSD_PIECE);
}

static inline int64_t ssd_pieces_per_segment(struct ssd_shape s) {
    int64_t pieces = ssd_pieces(s), wanted = SSD_BLOCKS / (s.B * s.H * ceil_div(s.P, SSD_HEAD));
    if (wanted < 1) wanted = 1;
    if (wanted > pieces) wanted = pieces;
    return ceil_div(pieces, wanted);
}

static inline int64_t ssd_segments(struct ssd_shape s) {
    return ceil_div(ssd_pieces(s), ssd_pieces_per_segment(s));
}

ssd_problem ssd_problem_of(tensor y, tensor x, tensor dt, tensor a, tensor b, tensor c, tensor d, tensor initial,
                           tensor doc);

/* Place of the thread's block in the problem. Grid: (heads x blocks of a head, segments, batch rows). */
struct ssd_place {
    int64_t row, head, group, p0, segment; /* p0: the block's first row of the head */
    int warp, lane;
};

__device__ __forceinline__ ssd_place ssd_place_of(const ssd_problem &p) {
    ssd_place at;
    at.row = blockIdx.z, at.segment = blockIdx.y;
    at.head = blockIdx.x / p.blocks, at.p0 = blockIdx.x % p.blocks * SSD_HEAD;
    at.group = at.head / (p.H / p.G);
    at.warp = threadIdx.x / WARP, at.lane = threadIdx.x % WARP;
    return at;
}

/* A lane's part of a state: rows p0 + warp SSD_ROWS + r, columns n0 + lane + WARP k. */
template <int NK> struct ssd_part {
    float s[SSD_ROWS][NK];

    /* Offset of row r, column k in a (P,N) matrix, or -1 where there is none. */
    __device__ __forceinline__ static int64_t offset(const ssd_problem &p, const ssd_place &at, int n0, int r, int k) {
        int64_t i = at.p0 + at.warp * SSD_ROWS + r, n = n0 + at.lane + WARP * k;
        return i < p.P && n < p.N ? i * p.N + n : -1;
    }
    __device__ __forceinline__ void load(const ssd_problem &p, const ssd_place &at, int n0, const float *from) {
#pragma unroll
        for (int r = 0; r < SSD_ROWS; r++)
#pragma unroll
            for (int k = 0; k < NK; k++) {
                int64_t o = from ? offset(p, at, n0, r, k) : -1;
                s[r][k] = o >= 0 ? from[o] : 0.0f;
            }
    }
    __device__ __forceinline__ void store(const ssd_problem &p, const ssd_place &at, int n0, float *to) const {
#pragma unroll
        for (int r = 0; r < SSD_ROWS; r++)
#pragma unroll
            for (int k = 0; k < NK; k++) {
                int64_t o = offset(p, at, n0, r, k);
                if (o >= 0) to[o] = s[r][k];
            }
    }
};

/* Some tokens in shared memory, as floats; zeros beyond the row, the head and the states. */
template <int NK, int TOKENS = SSD_STAGE> struct ssd_stage {
    float x[TOKENS][SSD_HEAD], dy[TOKENS][SSD_HEAD];
    float b[TOKENS][NK * WARP], c[TOKENS][NK * WARP];
    float dt[TOKENS], decay[TOKENS]; /* exp(a); 0 where a document starts, 1 beyond the row */
};

__device__ __forceinline__ bool ssd_starts(const ssd_problem &p, int64_t row, int64_t t) {
    if (!p.doc || t >= p.T) return false;
    const int32_t *doc = p.doc + row * p.T;
    return doc[t] != (t > 0 ? doc[t - 1] : 0);
}

/* A (token, column) array of TOKENS rows of WIDTH from strided rows. */
template <class T, int TOKENS, int WIDTH>
__device__ __forceinline__ void ssd_stage_rows(float (&to)[TOKENS][WIDTH], const T *from, int64_t step, int64_t t0,
                                               int64_t T_, int64_t columns) {
    for (int i = threadIdx.x; i < TOKENS * WIDTH; i += SSD_WARPS * WARP) {
        int t = i / WIDTH, j = i % WIDTH;
        to[t][j] = t0 + t < T_ && j < columns ? to_float(from[(t0 + t) * step + j]) : 0.0f;
    }
}

/* Fill the stage with the tokens from t0 on; pointers may be NULL for what is not wanted. Call between barriers. */
template <class T, int NK, int TOKENS>
__device__ __forceinline__ void ssd_fill(ssd_stage<NK, TOKENS> &s, const ssd_problem &p, const ssd_place &at, int n0,
                                         int64_t t0, const T *x, const T *dy, const T *b, const T *c) {
    int64_t head = at.head * p.P + at.p0, group = at.group * p.N + n0;
    if (x) ssd_stage_rows(s.x, x + at.row * p.x_row + head, p.x_step, t0, p.T, p.P - at.p0);
    if (dy) ssd_stage_rows(s.dy, dy + at.row * p.y_row + head, p.y_step, t0, p.T, p.P - at.p0);
    if (b) ssd_stage_rows(s.b, b + at.row * p.b_row + group, p.b_step, t0, p.T, p.N - n0);
    if (c) ssd_stage_rows(s.c, c + at.row * p.c_row + group, p.c_step, t0, p.T, p.N - n0);
    if (threadIdx.x < TOKENS) {
        int64_t t = t0 + threadIdx.x, i = (at.row * p.T + t) * p.H + at.head;
        bool there = t < p.T;
        s.dt[threadIdx.x] = there ? p.dt[i] : 0.0f;
        s.decay[threadIdx.x] = !there ? 1.0f : ssd_starts(p, at.row, t) ? 0.0f : __expf(fminf(p.a[i], 0.0f));
    }
}

/* Of eight values in each lane: the sum over all lanes of value (lane / 4) % 8, in that lane. */
__device__ __forceinline__ float ssd_row_sums(const float (&v)[SSD_ROWS], int lane) {
    float four[4], two[2];
    bool upper = lane & 16;
#pragma unroll
    for (int j = 0; j < 4; j++) four[j] = (upper ? v[4 + j] : v[j]) + __shfl_xor_sync(FULL, upper ? v[j] : v[4 + j], 16);
    upper = lane & 8;
#pragma unroll
    for (int j = 0; j < 2; j++)
        two[j] = (upper ? four[2 + j] : four[j]) + __shfl_xor_sync(FULL, upper ? four[j] : four[2 + j], 8);
    upper = lane & 4;
    float one = (upper ? two[1] : two[0]) + __shfl_xor_sync(FULL, upper ? two[0] : two[1], 4);
    one += __shfl_xor_sync(FULL, one, 2);
    return one + __shfl_xor_sync(FULL, one, 1);
}

/* f(constant<NK>) for the columns of a launch. */
template <class F> static inline void ssd_with_columns(int64_t N, F f) {
    if (N <= 1 * WARP) f(constant<1>());
    else if (N <= 2 * WARP) f(constant<2>());
    else if (N <= 4 * WARP) f(constant<4>());
    else f(constant<8>());
}

/* From what segments add to a state and by how much they let it decay to the states that enter them, in place of the
 * sums; from the left, or from the right. edge (B,H,P,N): what comes in at the end, or NULL. (ssd.cu) */
void ssd_carry(struct device *dev, float *adds, const float *decays, const float *edge, const ssd_problem &p,
               bool from_right);

#endif
