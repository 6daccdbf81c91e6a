/* mlstm.cuh: the mLSTM on the GPU: what its kernels share. mlstm.cu has the mathematics and the plan.
 *
 * A chunk is MLSTM_CHUNK tokens of one head, as many as a product has rows (tile_product.cuh). K is the width of q and
 * k, V that of v and h; a state is K x V.
 */
#ifndef RIVERRUN_CUDA_MLSTM_CUH
#define RIVERRUN_CUDA_MLSTM_CUH

#include "kernels/cuda/tile_product.cuh"

enum {
    MLSTM_CHUNK = PRODUCT,    /* tokens */
    MLSTM_WALKS = 132 * 2,    /* blocks that walk over chunks fill a large chip: fewer have time cut in segments ... */
    MLSTM_SEGMENT = 4,        /* ... of at least so many chunks, where that makes ... */
    MLSTM_CUT = 4,            /* ... at least so many of a row: a walk that is cut goes twice */
    MLSTM_PARTS = 4,          /* parts of <C, dC> from each tile of a state: one from a warp */
};

/* What the gates, documents and normalisers of one head's chunk come down to, for each of its tokens. Logarithms are of
 * base 2. A run is what lies between two tokens that the state does not pass, because a document starts there or
 * because the forget gate leaves nothing. */
struct mlstm_factors {
    float log[MLSTM_CHUNK];     /* of the forget gates' product since the chunk or the token's run began */
    float low[MLSTM_CHUNK];     /* what rounding took from it */
    float run[MLSTM_CHUNK];     /* number of the run, 0 for the one that comes into the chunk */
    float in[MLSTM_CHUNK];      /* log of the input gate, -inf beyond the row */
    float top[MLSTM_CHUNK];     /* the stabiliser m, 0 with sigmoid gates */
    float enter[MLSTM_CHUNK];   /* share of the entering state at the token */
    float leave[MLSTM_CHUNK];   /* share of what the token adds that leaves the chunk */
    float inverse[MLSTM_CHUNK]; /* 1 / (N + eps), 1 without a normaliser, 0 beyond the row (mlstm_output.cu) */
    float sign[MLSTM_CHUNK];    /* of den where N = |den|, else 0 (mlstm_output.cu) */
    float pass;                 /* share of the entering state that leaves the chunk */
    float unused[3];
};

/* A view whose row b, token t, head h, column c is data[b row + t step + h width + c]. */
template <class T> struct mlstm_rows {
    T *data;
    int64_t row, step;
    int width;
    bool aligned; /* every head of every token starts at 16 bytes, and so does what is behind it */

    __device__ __forceinline__ T *at(int64_t b, int64_t t, int64_t head) const {
        return data + b * row + t * step + head * width;
    }
};

template <class T> static inline mlstm_rows<T> mlstm_rows_of(tensor t) {
    const int piece = 16 / (int)sizeof(T);
    mlstm_rows<T> r = {data_of<T>(t), t.stride[0], t.stride[1], (int)t.dim[3], false};
    ASSERT(t.stride[2] == t.dim[3] || t.dim[2] == 1);
    r.aligned = (uintptr_t)t.data % 16 == 0 && r.row % piece == 0 && r.step % piece == 0 && r.width % piece == 0;
    return r;
}

/* Real gates or their gradients, (B,T,H) with any strides. */
struct mlstm_gates {
    float *data;
    int64_t row, step, head;

    __device__ __forceinline__ float &at(int64_t b, int64_t t, int64_t h) const {
        return data[b * row + t * step + h * head];
    }
};

static inline mlstm_gates mlstm_gates_of(tensor t) {
    return {data_of<float>(t), t.stride[0], t.stride[1], t.stride[2]};
}

struct mlstm_problem {
    int64_t B, T, H;
    int K, V, wide;                        /* wide: elements of a row of a stored state, V rounded up to 16 bytes */
    int k_tiles, v_tiles;                  /* of a state */
    int64_t chunks, per_segment, segments; /* a segment is per_segment chunks */
    bool sigmoid, normalise;
    float scale, eps;                      /* K^-1/2 */

    /* Number of a head's chunk. */
    __device__ __forceinline__ int64_t place(int64_t b, int64_t chunk, int64_t head) const {
        return (b * chunks + chunk) * H + head;
    }
    __device__ __forceinline__ int64_t size() const {
        return (int64_t)K * wide;
    }
};

static inline int64_t mlstm_chunks(struct mlstm_shape s) {
    return ceil_div(s.T, MLSTM_CHUNK);
}

/* Blocks of a walk without a cut. */
static inline int64_t mlstm_walks(struct mlstm_shape s) {
    return s.H * ceil_div(s.K, PRODUCT) * ceil_div(s.V, PRODUCT);
}

static inline int64_t mlstm_wide(struct mlstm_shape s, size_t element) {
    int64_t piece = 16 / (int64_t)element;
    return ceil_div(s.V, piece) * piece;
}

mlstm_problem mlstm_problem_of(struct mlstm_shape s, struct mlstm_rule rule, size_t element);

/* Most segments, over all batch rows, that a problem of this size or a smaller one is cut into; 0 where none is. */
int64_t mlstm_segments_most(struct mlstm_shape s);

/* factors (B, chunks, H) but for inverse and sign; m (B,H) is the final stabiliser, or NULL; summaries is room for
 * (B, chunks, H). (mlstm_gates.cu) */
void mlstm_find_factors(struct device *dev, mlstm_factors *factors, float2 *summaries, float *m, tensor i, tensor f,
                        const float *initial_m, tensor doc, const mlstm_problem &p);

/* What the gates' gradients are made from, for the tokens of a head's chunk. */
struct mlstm_slopes {
    float query[MLSTM_CHUNK]; /* q . dq */
    float key[MLSTM_CHUNK];   /* k . dk */
    float leave[MLSTM_CHUNK]; /* that part of k . dk which comes from the state that leaves the chunk */
};

/* through: (B, chunks, H, parts) of <C, dC>; edge: there is a state before the first token. (mlstm_gates.cu) */
void mlstm_gates_backward(struct device *dev, tensor di, tensor df, tensor i, tensor f, const mlstm_factors *factors,
                          const mlstm_slopes *slopes, const float *through, int parts, bool edge,
                          const mlstm_problem &p);

/* A walk over chunks. To the right: C = pass C + sum_j leave_j k_j v_j^T, n = pass n + sum_j leave_j k_j; to the left:
 * dC = pass dC + sum_i enter_i s q_i (inverse_i dh_i)^T, dn = pass dn + sum_i enter_i s q_i inverse_i delta_i. */
template <class T> struct mlstm_walk {
    mlstm_rows<T> rows, columns;  /* k and v, or q and dh */
    const mlstm_factors *factors;
    bool vector;                  /* n, or dn, is wanted */
    const float *delta;           /* (B, chunks, H, MLSTM_CHUNK), to the left with a vector */
    const float *from, *from_n;   /* (B, segments, H, K, V), (.., K): what each segment's walk begins with, or NULL */
    T *states;                    /* (B, chunks, H, K, wide): the state as each chunk is met, or NULL */
    float *normals;               /* (B, chunks, H, K), or NULL */
    float *to, *to_n, *decays;    /* the same and (B, segments, H) at the end of each segment's walk, or NULL */
    float *end, *end_n;           /* (B,H,K,V), (B,H,K): at the end of all, or NULL */
    const T *met;                 /* to the left: the states of the walk to the right, for <C, dC> */
    const float *met_n;
    float *through;               /* (B, chunks, H, tiles, MLSTM_PARTS), or NULL */
};

/* Room for a walk that is cut. */
struct mlstm_carries {
    float *states, *normals, *decays; /* (B, segments, H, K, V), (.., K), (B, segments, H) */
};

/* The whole walk; where time is cut, each segment first walks from zero for what it adds, from which, carried over
 * segments, follow the states that each begins with. edge, edge_n: what the first begins with, or NULL. (mlstm_walk.cu)
 * */
template <class T>
void mlstm_walk_chunks(struct device *dev, mlstm_walk<T> walk, const float *edge, const float *edge_n,
                       const mlstm_carries &carries, const mlstm_problem &p, bool leftwards);

/* h from q, k, v and the states that enter chunks; or dv from q, k, dh and the gradients of those that leave them
 * (mlstm_output.cu). */
template <class T> struct mlstm_output {
    mlstm_rows<T> to, q, k, values; /* values: v, or dh */
    const T *states;
    const float *normals;
    mlstm_factors *factors;         /* forward fills in inverse and sign */
    bool edge;                      /* there is a state before the first chunk; or a gradient behind the last */
};

template <class T>
void mlstm_outputs(struct device *dev, const mlstm_output<T> &o, const mlstm_problem &p, bool backward);

/* In bytes, for activations of so many bytes an element. (mlstm_backward.cu) */
size_t mlstm_backward_scratch(struct mlstm_shape s, size_t element);

/* ops.h's mlstm_backward for activations of one type; problem and documents as in saved. (mlstm_backward.cu) */
template <class T>
void mlstm_backward_pass(struct device *dev, tensor dq, tensor dk, tensor dv, tensor di, tensor df,
                         struct mlstm_state dinitial, tensor dh, struct mlstm_state dfinal, const void *saved, tensor h,
                         tensor q, tensor k, tensor v, tensor i, tensor f, struct mlstm_state initial,
                         struct mlstm_rule rule, void *scratch);

/* --- scratch ------------------------------------------------------------------------------------------------------ */

/* Places one behind the other, each at 16 bytes; from NULL they are only measured. */
struct mlstm_carver {
    char *memory;
    size_t used;

    void *take(int64_t count, size_t size) {
        void *at = memory ? memory + used : NULL;
        used += ((size_t)count * size + 15) / 16 * 16;
        return at;
    }
};

static inline mlstm_carries mlstm_carve_carries(mlstm_carver &room, struct mlstm_shape s) {
    int64_t most = mlstm_segments_most(s) * s.H;
    mlstm_carries c;
    c.states = (float *)room.take(most * s.K * s.V, sizeof(float));
    c.normals = (float *)room.take(most * s.K, sizeof(float));
    c.decays = (float *)room.take(most, sizeof(float));
    return c;
}

/* --- within kernels ----------------------------------------------------------------------------------------------- */

/* One chunk's factors, by copies that don't wait. */
__device__ __forceinline__ void mlstm_factors_load(mlstm_factors &to, const mlstm_factors *from) {
    for (int i = threadIdx.x; i < (int)(sizeof(mlstm_factors) / 16); i += PRODUCT_THREADS)
        cp_async_16((char *)&to + 16 * i, (const char *)from + 16 * i);
}

/* A step's operand: rows t0 .. of a head as they lie, columns from c0 on; to a flat or a deep side. */
template <class T, class TILE>
__device__ __forceinline__ void mlstm_fill(TILE &tile, const mlstm_rows<T> &view, int64_t b, int64_t head, int64_t t0,
                                           int64_t T_, int c0) {
    tile_fill<PRODUCT_THREADS>(tile, (const T *)view.at(b, t0, head) + c0, view.step, (int)at_most(T_ - t0, PRODUCT),
                               view.width - c0, view.aligned);
}

/* The same from a stored state, K x wide. */
template <class T, class TILE>
__device__ __forceinline__ void mlstm_fill_state(TILE &tile, const T *state, const mlstm_problem &p, int k0, int v0) {
    tile_fill<PRODUCT_THREADS>(tile, state + (int64_t)k0 * p.wide + v0, p.wide, p.K - k0, p.wide - v0, true);
}

/* use(i, h, n, row, column, left, right): all accumulators of a tile whose rows and columns are the chunk's tokens, in
 * pairs v[i][n][2 h], v[i][n][2 h + 1] at (row, column) and (row, column + 1), with the products of the gates that lead
 * from the input at the column's token to the output at the row's: 0 where nothing does. A row's pairs follow each
 * other. */
template <class T, class F>
__device__ __forceinline__ void mlstm_each_gate(const mlstm_factors &f, const product_place &at, F use) {
    constexpr bool exact = sizeof(T) == 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = at.m0 + 16 * i + 8 * h + at.g;
            float log = f.log[row], run = f.run[row], top = f.top[row], low = exact ? f.low[row] : 0.0f;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                int column = at.n0 + 8 * n + at.q;
                float2 logs = two_at(f.log, column), runs = two_at(f.run, column), ins = two_at(f.in, column);
                float2 lows = exact ? two_at(f.low, column) : make_float2(0.0f, 0.0f);
                float left = log - logs.x, right = log - logs.y;
                if (exact) left += low - lows.x, right += low - lows.y;
                left = row >= column && run == runs.x ? power_of_two(left + (ins.x - top)) : 0.0f;
                right = row > column && run == runs.y ? power_of_two(right + (ins.y - top)) : 0.0f;
                use(i, h, n, row, column, left, right);
            }
        }
}

#endif
