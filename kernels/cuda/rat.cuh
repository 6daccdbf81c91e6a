/* rat.cuh: what the files of RAT share: the problem as kernels see it, which ends of chunks a token sees, and the
 * arrays between the kernels of the fast path. rat.cu has the mathematics and the plain path. */
#ifndef RIVERRUN_CUDA_RAT_CUH
#define RIVERRUN_CUDA_RAT_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/turn.cuh"

struct rat_problem {
    const int32_t *positions, *count; /* count: NULL without a state */
    /* (B,T) each: the first end that a token sees, below 0: in the state; how many ends lie before it, which is one
     * beyond the last that it sees; the token that end e of the row is. NULL where a row is one document from its
     * start. */
    const int32_t *first, *rank, *ends;
    const float *bias;
    int64_t B, T, C, E; /* E: ends that a row has at most */
    int Q, H, G, P, half;
    float scale;
    turn_rates rates;
};

template <class T> struct rat_operands {
    attention_rows<T> z, v, g, q, k, state_k, state_v;
    const float *running;
};

/* The gradients that backward writes, and what it reads beside rat_operands: dy, and what forward saved. */
template <class T> struct rat_gradients_of {
    attention_rows<T> dz, dv, dg, dq, dk, dy;
    const T *o;
    const float *lse;
};

__device__ __forceinline__ int position_at(const rat_problem &p, int64_t b, int64_t t) {
    return p.positions ? p.positions[b * p.T + t] : (int)t;
}

__device__ __forceinline__ int64_t place_of(const rat_problem &p, int64_t b, int64_t t, int h) {
    return ((b * p.T + t) * p.H + h) * p.P;
}

/* Token t sees the ends first_end .. before last_end. Neither decreases along a row. */
__device__ __forceinline__ int first_end(const rat_problem &p, int64_t b, int64_t t) {
    return p.first ? p.first[b * p.T + t] : 0;
}

__device__ __forceinline__ int last_end(const rat_problem &p, int64_t b, int64_t t) {
    return p.rank ? p.rank[b * p.T + t] : (int)t / p.Q;
}

/* The token that is end e. */
__device__ __forceinline__ int end_at(const rat_problem &p, int64_t b, int e) {
    return p.ends ? p.ends[b * p.T + e] : e * p.Q + p.Q - 1;
}

/* How many ends row b has. */
__device__ __forceinline__ int ends_of(const rat_problem &p, int64_t b) {
    return last_end(p, b, p.T - 1) + (position_at(p, b, p.T - 1) % p.Q == p.Q - 1);
}

/* Slot of the state that holds end e < 0 of row b. */
__device__ __forceinline__ int slot_of(const rat_problem &p, int64_t b, int e) {
    return (p.count[b] / p.Q + e) % (int)p.C;
}

/* --- the fast path: bf16 on tensor cores -------------------------------------------------------------------------- */

enum { RAT_FOLDED_CHUNKS = 1024 }; /* from so many on attention goes by cuDNN, where it can */
enum { RAT_THREADS = 512 };       /* of a block that has the heads of a group, at most */

/* What the kernels hand on, in scratch. By token: (B,T,H,P) for values, keys and dout; (B,T,G,P) for queries, which are
 * turned, and dqueries, which are not yet turned back, with H in G's place where attention goes by cuDNN. By end:
 * (B,E,H,P); keys and their gradients are turned. Scalars: (B,H,T) for own, log_sum and delta, (B,T,H) for share and
 * slope. running: (B,2,H,P), of the last token. */
struct rat_arrays {
    __nv_bfloat16 *values, *queries, *end_keys, *end_values; /* values, keys: v~ and k~ */
    float *own, *running; /* own: scores, not scaled; of forward */
    /* backward's; values and keys are NULL where rat_walk_makes */
    __nv_bfloat16 *keys, *dout, *dqueries, *dend_keys, *dend_values;
    float *log_sum, *delta, *share, *slope; /* log_sum: base 2; slope: the own score's gradient, scaled */
    float *folded;                          /* natural logarithms as cuDNN has them: (B,H,Q,T / Q - 1); or NULL */
    float *partial;                         /* of dbias: (B, segments, H P) */
    float *reach; /* where chunks are long: (B, segments, 3, H, P), what goes into each segment; else NULL */
    char *work;                             /* rat_fold_bytes, for cuDNN */
    int query_heads, dquery_heads; /* of queries and dqueries: G, or H */
};

/* Places of the arrays in memory from `base` on; the bytes they take. (rat_fast.cu, as what follows) */
size_t rat_arrays_at(rat_arrays *a, struct rat_shape s, void *base, bool backward);

/* For these operands, or their gradients in the same places? */
bool rat_fast_serves(const rat_problem &p, tensor y, tensor z, tensor v, tensor g, tensor q, tensor k);
void rat_fast_forward(struct device *dev, attention_rows<__nv_bfloat16> y, __nv_bfloat16 *o, float *lse,
                      const rat_operands<__nv_bfloat16> &x, rat_arrays *a, const rat_problem &p, void *memory);
/* Into a state, the newest `ends` ends at most and where the recurrence stands. */
void rat_fast_store(struct device *dev, struct rat_state final, const rat_arrays &a, const rat_problem &p,
                    int64_t ends);
void rat_fast_backward(struct device *dev, const rat_gradients_of<__nv_bfloat16> &to, float *dbias,
                       const rat_operands<__nv_bfloat16> &x, const rat_problem &p, void *memory);

/* Tokens of a walk along the recurrence: whole chunks, or, of long ones, parts. */
static inline bool rat_long_chunks(int64_t Q) {
    enum { LONGEST_WALK = 256 };
    return Q > LONGEST_WALK;
}

static inline int64_t rat_segment(int64_t Q) {
    enum { SHORTEST_WALK = 16, PART_OF_CHUNK = 128 };
    if (rat_long_chunks(Q)) return PART_OF_CHUNK;
    return Q >= SHORTEST_WALK ? Q : Q * ceil_div(SHORTEST_WALK, Q);
}

/* The recurrence (rat_walk.cu), and attention over ends (rat_mma.cu). lse NULL: nothing is saved. */
bool rat_walk_serves(const rat_problem &p);
bool rat_walk_makes(struct rat_shape s); /* are chunks so short that they are made again on the way back? */
void rat_walk_forward(struct device *dev, const rat_operands<__nv_bfloat16> &x, const rat_arrays &a,
                      const rat_problem &p);
void rat_walk_again(struct device *dev, const rat_operands<__nv_bfloat16> &x, const rat_gradients_of<__nv_bfloat16> &d,
                    const rat_arrays &a, const rat_problem &p);
void rat_walk_back(struct device *dev, const rat_operands<__nv_bfloat16> &x, const rat_gradients_of<__nv_bfloat16> &d,
                   const rat_arrays &a, const rat_problem &p);
void rat_mma_forward(struct device *dev, attention_rows<__nv_bfloat16> y, __nv_bfloat16 *o, float *lse,
                     const rat_operands<__nv_bfloat16> &x, const rat_arrays &a, const rat_problem &p);
void rat_mma_backward(struct device *dev, const rat_operands<__nv_bfloat16> &x, const rat_arrays &a,
                      const rat_problem &p);

/* By cuDNN (rat_fold.cu): with query_heads = dquery_heads = H, and `folded`. False: it does not serve the shape. Bytes:
 * what backward works in. */
size_t rat_fold_bytes(struct rat_shape s);
bool rat_folds(struct device *dev, const rat_problem &p);
bool rat_fold_forward(struct device *dev, attention_rows<__nv_bfloat16> y, __nv_bfloat16 *o, float *lse,
                      const rat_operands<__nv_bfloat16> &x, const rat_arrays &a, const rat_problem &p);
bool rat_fold_backward(struct device *dev, const __nv_bfloat16 *o, const rat_arrays &a, const rat_problem &p);

#endif
