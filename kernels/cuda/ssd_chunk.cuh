/* ssd_chunk.cuh: SSD in chunks on tensor cores: what its forward and backward share. ssd_chunk.cu has the mathematics.
 *
 * A chunk is SSD_CHUNK tokens of one head. Its matrices lie in shared memory as tiles of bf16, padded with zeros to 64
 * tokens, 64 rows of the head and 128 states, so that every product has one shape; smaller heads and states work, at
 * the price of the full ones. Sums, states and decays are fp32.
 */
#ifndef RIVERRUN_CUDA_SSD_CHUNK_CUH
#define RIVERRUN_CUDA_SSD_CHUNK_CUH

#include "kernels/cuda/ssd.cuh"
#include "kernels/cuda/tile.cuh"

enum {
    SSD_CHUNK = 64,         /* tokens */
    SSD_P = 64,             /* rows of a head, padded */
    SSD_N = 128,            /* states, padded */
    SSD_WALKERS = 4,        /* warps of a block that walks over chunks: each has 16 rows of the state */
    SSD_WALKS = 132 * 4,    /* such blocks fill a large chip: fewer have time cut in segments ... */
    SSD_SEGMENT = 4,        /* ... of at least so many chunks */
    SSD_TILES = SSD_N / 8,  /* accumulators of eight columns in a warp's part of the state */
};

/* Which operands take this path: a matter of the table and the shape, never of addresses. */
static inline bool ssd_in_chunks(enum dtype act, struct ssd_shape s) {
    return act == DTYPE_BF16 && s.P <= SSD_P && s.N <= SSD_N;
}

static inline int64_t ssd_chunks(struct ssd_shape s) {
    return ceil_div(s.T, SSD_CHUNK);
}

static inline int64_t ssd_chunks_per_segment(struct ssd_shape s) {
    int64_t wanted = at_least(SSD_WALKS / (s.B * s.H), 1);
    return at_least(ceil_div(ssd_chunks(s), wanted), SSD_SEGMENT);
}

static inline int64_t ssd_chunk_segments(struct ssd_shape s) {
    return ceil_div(ssd_chunks(s), ssd_chunks_per_segment(s));
}

/* Of a state for every segment, head and batch row, in floats; 0 when time is not cut. */
static inline int64_t ssd_chunk_carries(struct ssd_shape s) {
    int64_t segments = ssd_chunk_segments(s);
    return segments > 1 ? s.B * segments * s.H * s.P * s.N : 0;
}

/* What the decays and documents of one head's chunk come down to, for each of its tokens. A run is what lies between
 * two tokens that the state does not pass, because a document starts or because exp(a) is nothing. */
struct ssd_factors {
    float log[SSD_CHUNK];   /* log2 of the decay since the chunk or the token's run began */
    float run[SSD_CHUNK];   /* number of the run, 0 for the one that comes into the chunk */
    float dt[SSD_CHUNK];    /* 0 beyond the row */
    float enter[SSD_CHUNK]; /* share of the entering state at the token; the last is the share that passes the chunk */
    float leave[SSD_CHUNK]; /* share of what the token adds that leaves the chunk */
};

/* A view whose row b, token t, part (head or group) k, column c is data[b row + t step + k width + c]. */
struct ssd_rows {
    __nv_bfloat16 *data;
    int64_t row, step;
    int width;
    bool aligned; /* every part of every token starts at 16 bytes, and so does what is behind it */
};

ssd_rows ssd_rows_of(tensor t);

struct ssd_chunked {
    int64_t B, T, H, P, G, N;
    int64_t chunks, per_segment, segments;
};

ssd_chunked ssd_chunked_of(struct ssd_shape s);

/* factors (B, chunks, H). (ssd_chunk.cu) */
void ssd_find_factors(struct device *dev, ssd_factors *factors, tensor dt, tensor a, tensor doc, const ssd_chunked &p);

/* A walk over chunks without outputs for tokens. To the right: S = pass S + sum_j leave_j dt_j x_j b_j^T; to the left:
 * G = pass G + sum_i enter_i dy_i c_i^T. */
struct ssd_walk {
    ssd_rows rows, columns;       /* x and b, or dy and c */
    const ssd_factors *factors;
    const float *from;            /* (B, segments, H, P, N): the state with which each segment's walk begins, or NULL */
    __nv_bfloat16 *states;        /* (B, chunks, H, SSD_P, SSD_N): the state as each chunk is met, or NULL */
    float *to;                    /* (B, segments, H, P, N): the state at the end of each segment's walk, or NULL */
    float *decays;                /* (B, segments, H): the share that passes each segment, or NULL */
    float *end;                   /* (B, H, P, N): the state at the end of all, or NULL */
};

/* (ssd_chunk.cu) */
void ssd_walk_chunks(struct device *dev, const ssd_walk &walk, const ssd_chunked &p, bool leftwards);

/* The states with which segments begin, in `carries`, of a walk that starts with `edge` (NULL: zero); decays is room
 * for (B, segments, H) floats. Only where time is cut. (ssd_chunk.cu) */
void ssd_carry_segments(struct device *dev, float *carries, float *decays, ssd_walk walk, const float *edge,
                        const ssd_chunked &p, bool leftwards);

size_t ssd_chunk_saved(struct ssd_shape s);
size_t ssd_chunk_forward_scratch(struct ssd_shape s);
size_t ssd_chunk_backward_scratch(struct ssd_shape s);
__typeof__(*((struct ops *)0)->ssd_forward) ssd_chunk_forward;
__typeof__(*((struct ops *)0)->ssd_backward) ssd_chunk_backward;

/* --- tiles -------------------------------------------------------------------------------------------------------- */

/* Tokens t0 .. of one part into a tile, zeros beyond the row and the part's width. */
template <int THREADS, bool ALIGNED, int W>
__device__ __forceinline__ void tile_load(shared_tile<W> &tile, const ssd_rows &view, int64_t row, int64_t part,
                                          int64_t t0, int64_t T) {
    const __nv_bfloat16 *source = view.data + row * view.row + part * view.width + t0 * view.step;
    tile_fill<THREADS>(tile, source, view.step, (int)at_most(T - t0, 64), view.width, ALIGNED);
}

/* A chunk's state of a head, likewise. */
template <int THREADS> __device__ __forceinline__ void state_load(shared_tile<SSD_N> &tile, const __nv_bfloat16 *from) {
    enum { ACROSS = SSD_N / 8, DOWN = THREADS / ACROSS };
    __nv_bfloat16 *place = tile.at(threadIdx.x / ACROSS, threadIdx.x % ACROSS * 8);
    from += threadIdx.x * 8;
#pragma unroll
    for (int k = 0; k < SSD_P; k += DOWN) cp_async_16(place + k * SSD_N, from + k * SSD_N);
}

/* One chunk's factors, likewise. */
template <int THREADS> __device__ __forceinline__ void factors_load(ssd_factors &to, const ssd_factors *from) {
    enum { PIECES = sizeof(ssd_factors) / 16 };
    static_assert(PIECES <= THREADS, "a piece a thread");
    if (threadIdx.x < PIECES)
        cp_async_16((char *)&to + 16 * threadIdx.x, (const char *)from + 16 * threadIdx.x);
}

/* --- decays ------------------------------------------------------------------------------------------------------- */

/* exp of the decays after token j up to token i: 0 where the state does not come from j to i. */
__device__ __forceinline__ float decay_between(int i, float log_i, float run_i, int j, float log_j, float run_j) {
    return i >= j && run_i == run_j ? power_of_two(fminf(log_i - log_j, 0.0f)) : 0.0f;
}

/* --- states ------------------------------------------------------------------------------------------------------- */

/* Of 16 tokens from k on, as mma's fragment a of a matrix rows x tokens: each times its factor, which is one array's,
 * or the product of TWO. */
template <bool TWO>
__device__ __forceinline__ void tokens_scale(uint32_t (&a)[4], const float *factor, const float *second, int k,
                                             int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float2 f = two_at(factor, k + 8 * h + lane % 4 * 2);
        if (TWO) {
            float2 more = two_at(second, k + 8 * h + lane % 4 * 2);
            f.x *= more.x, f.y *= more.y;
        }
        a[2 * h] = pack_bf16(f.x * low_bf16(a[2 * h]), f.y * high_bf16(a[2 * h]));
        a[2 * h + 1] = pack_bf16(f.x * low_bf16(a[2 * h + 1]), f.y * high_bf16(a[2 * h + 1]));
    }
}

/* A warp's 16 rows of a state, from row 16 warp on: tile k has columns 8k .. 8k+7. In two halves, which are what
 * products of warpgroups take as sums. */
struct ssd_state {
    float s[2][SSD_TILES / 2][4];

    __device__ __forceinline__ float (&tile(int k))[4] {
        return s[k / (SSD_TILES / 2)][k % (SSD_TILES / 2)];
    }
    __device__ __forceinline__ const float (&tile(int k) const)[4] {
        return s[k / (SSD_TILES / 2)][k % (SSD_TILES / 2)];
    }
    /* f(element, row, column) for all elements that exist. */
    template <class F> __device__ __forceinline__ void each(const ssd_chunked &p, F f) {
        int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < SSD_TILES; k++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int64_t i = row + e / 2 * 8, n = 8 * k + column + e % 2;
                if (i < p.P && n < p.N) f(tile(k)[e], i * p.N + n);
            }
    }
    __device__ __forceinline__ void load(const ssd_chunked &p, const float *from) {
#pragma unroll
        for (int k = 0; k < SSD_TILES; k++)
#pragma unroll
            for (int e = 0; e < 4; e++) tile(k)[e] = 0.0f;
        if (from) each(p, [&](float &v, int64_t offset) { v = from[offset]; });
    }
    __device__ __forceinline__ void store(const ssd_chunked &p, float *to) {
        each(p, [&](float &v, int64_t offset) { to[offset] = v; });
    }
    __device__ __forceinline__ void scale(float pass) {
#pragma unroll
        for (int k = 0; k < SSD_TILES; k++)
#pragma unroll
            for (int e = 0; e < 4; e++) tile(k)[e] *= pass;
    }
    /* s = pass s + sum_j factor_j rows_j columns_j^T, the factors being one array, or the product of TWO. */
    template <bool TWO>
    __device__ __forceinline__ void update(shared_tile<SSD_P> &rows, shared_tile<SSD_N> &columns, float pass,
                                           const float *factor, const float *second) {
        int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16;
        int of_rows = right_down<SSD_P>(0, row, lane), of_columns = down_right<SSD_N>(0, 0, lane);
        scale(pass);
#pragma unroll
        for (int k = 0; k < SSD_CHUNK; k += 16) {
            uint32_t a[4];
            ldmatrix_x4_transposed(a, rows.from(of_rows, k, 0));
            tokens_scale<TWO>(a, factor, second, k, lane);
#pragma unroll
            for (int n = 0; n < SSD_TILES; n += 2) {
                uint32_t b[4];
                ldmatrix_x4_transposed(b, columns.from(of_columns, k, 8 * n));
                mma_two(tile(n), tile(n + 1), a, b);
            }
        }
    }
};

#endif
