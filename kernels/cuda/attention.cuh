/* attention.cuh: what the files of attention share: the problem as kernels see it, which keys a token sees, and which
 * path serves which operands. attention.cu has the mathematics. */
#ifndef RIVERRUN_CUDA_ATTENTION_CUH
#define RIVERRUN_CUDA_ATTENTION_CUH

#include "kernels/cuda/launch.cuh"

/* Head h of token t of batch row b is data[b row + t step + h head]; elements of a head lie together. */
template <class T> struct attention_rows {
    T *data;
    int64_t row, step, head;

    __device__ __forceinline__ T *at(int64_t b, int64_t t, int64_t h) const {
        return data + b * row + t * step + h * head;
    }
};

template <class T> static inline attention_rows<T> attention_rows_of(tensor t) {
    if (!tensor_given(t)) return {NULL, 0, 0, 0};
    return {data_of<T>(t), t.stride[0], t.stride[1], t.stride[2]};
}

struct attention_problem {
    const int32_t *positions; /* (B,T), or NULL: tokens count from the row's start */
    const int32_t *count;     /* (B), or NULL: no cache */
    int64_t B, T, C, window;  /* window: T + C at most; what is longer limits nothing */
    int H, G, P, share;       /* share = H / G */
    bool tiled;
    float scale;              /* of scores, and for powers of two */
};

/* The head of keys and values that head h reads, and the i-th of those that read head g. */
__device__ __forceinline__ int key_head(const attention_problem &p, int h) {
    return p.tiled ? h % p.G : h / p.share;
}

__device__ __forceinline__ int query_head(const attention_problem &p, int g, int i) {
    return p.tiled ? g + i * p.G : g * p.share + i;
}

/* How many keys of the cache there are for row b. */
__device__ __forceinline__ int cached_keys(const attention_problem &p, int64_t b) {
    return p.count ? (int)at_most(p.count[b], p.C) : 0;
}

/* The first key that token t sees, which is the position-th of its document; below 0 for one in the cache. It never
 * decreases along a row. Nothing for tokens beyond the row. */
__device__ __forceinline__ int first_key(const attention_problem &p, int64_t b, int t, int position) {
    if (t >= p.T) return t + 1;
    int back = position >= p.window ? (int)p.window - 1 : position;
    return t - (int)at_most(back, t + cached_keys(p, b));
}

__device__ __forceinline__ int first_key(const attention_problem &p, int64_t b, int t) {
    return first_key(p, b, t, p.positions && t < p.T ? p.positions[b * p.T + t] : t);
}

/* Key or value j of row b, which may lie in the cache (B,C,G,P). */
template <class T>
__device__ __forceinline__ const T *key_at(const attention_problem &p, const attention_rows<T> &row,
                                           const attention_rows<T> &cache, int64_t b, int j, int g) {
    if (j >= 0) return row.at(b, j, g);
    return cache.at(b, (p.count[b] + j) % p.C, g);
}

attention_problem attention_problem_of(tensor q, tensor k, tensor positions, struct attention_cache cache,
                                       struct attention_rule rule);

/* Tensor cores: bf16, heads of a multiple of 8 up to 128, rows that start at 16 bytes. (attention_mma.cu) */
bool attention_mma_serves(tensor q, tensor k, tensor v, tensor o);
void attention_mma_forward(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v,
                           struct attention_cache cache, const attention_problem &p);
void attention_mma_backward(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                            tensor q, tensor k, tensor v, struct attention_cache cache, const attention_problem &p,
                            float *delta);

#endif
