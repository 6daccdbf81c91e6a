/* head_loss.cu: the language-model head and its cross-entropy, a tile of rows at a time.
 *
 *   logits = x w^T;  lse = log sum exp(logits);  loss = lse - logits[target] + z_loss lse^2    (rows with target >= 0)
 *   dlogits = scale (p (1 + 2 z_loss lse) - [v == target]), p = exp(logits - lse);  dx = dlogits w;  dw += dlogits^T x
 *
 * A tile's logits are the only ones in memory, in the activation type: TILE_BYTES of them. One block turns a row of
 * logits into dlogits in place: a first pass finds the largest and the sum of exponentials (each thread keeps both for
 * its share and they are joined once), a second writes; the row is still in the second cache. Losses of single rows go to
 * scratch and one block adds them up in double, in order. Rows without a target get dlogits 0.
 * FLOPs 6 R V D (2 without gradients); bytes about 8 e R V (the tile is written by the product, read twice, written, and
 * read by two products; e = 2), so bound by the products: 32,768 x 768 x 50,304 is 7.6 TFLOP, 9.6 ms at 790 TFLOP/s.
 */
#include "kernels/cuda/gemm.cuh"

#define TILE_BYTES ((int64_t)256 << 20)
enum { THREADS = 512, TILE_MIN = 128, TILE_MAX = 8192 };

/* Rows of a tile for V columns of logits of `size` bytes, out of R. */
static int64_t tile_rows(int64_t R, int64_t V, size_t size) {
    int64_t rows = TILE_BYTES / (V * (int64_t)size) / TILE_MIN * TILE_MIN;
    if (rows < TILE_MIN) rows = TILE_MIN;
    if (rows > TILE_MAX) rows = TILE_MAX;
    return R < 1 ? 1 : at_most(rows, R);
}

static size_t sums_size(int64_t rows) {
    return (size_t)ceil_div(rows * (int64_t)sizeof(struct loss_sums), 256) * 256;
}

/* The rows' sums, then the logits of a tile. */
static size_t scratch_size(int64_t R, int64_t V, size_t size) {
    int64_t rows = tile_rows(R, V, size);
    return sums_size(rows) + (size_t)ceil_div(rows * V * (int64_t)size, 256) * 256;
}

extern "C" size_t cuda_head_loss_scratch_f32(int64_t R, int64_t D, int64_t V) {
    (void)D;
    return scratch_size(R, V, sizeof(float));
}

extern "C" size_t cuda_head_loss_scratch_bf16(int64_t R, int64_t D, int64_t V) {
    (void)D;
    return scratch_size(R, V, sizeof(__nv_bfloat16));
}

/* The largest of some logits, its first place, and the sum of exp(logit - largest). */
struct share {
    float most, sum;
    int64_t at;
};

/* Of two shares. The first of equal places wins, so the order doesn't matter but for rounding, and that is fixed. */
__device__ __forceinline__ share join(share a, share b) {
    bool first = a.most > b.most || (a.most == b.most && a.at <= b.at) || isnan(a.most);
    share big = first ? a : b, small = first ? b : a;
    /* An empty share has most = -inf and sum 0: exp(-inf) = 0 unless both are empty. */
    if (small.sum != 0.0f) big.sum += small.sum * __expf(small.most - big.most);
    return big;
}

__device__ __forceinline__ share take(share s, float v, int64_t at) {
    share one = {v, 1.0f, at};
    return join(s, one);
}

__device__ share warp_join(share s) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        share other = {__shfl_xor_sync(FULL, s.most, offset), __shfl_xor_sync(FULL, s.sum, offset),
                       __shfl_xor_sync(FULL, s.at, offset)};
        bool lower = (threadIdx.x & offset) == 0; /* both lanes must join in the same order */
        s = lower ? join(s, other) : join(other, s);
    }
    return s;
}

__device__ share block_join(share s) {
    __shared__ share room[THREADS / WARP];
    s = warp_join(s);
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = s;
    __syncthreads();
    s = room[0];
    for (int w = 1; w < THREADS / WARP; w++) s = join(s, room[w]);
    return s;
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS)
loss_row_kernel(T *logits, struct loss_sums *sums, float *losses, const int32_t *targets, int64_t columns, double scale,
                double z_loss, bool gradient) {
    T *row = logits + blockIdx.x * columns;
    int64_t target = targets[blockIdx.x];
    if (target < 0) {
        if (threadIdx.x == 0) {
            sums[blockIdx.x] = {0, 0, 0, 0};
            if (losses) losses[blockIdx.x] = 0;
        }
        const float zeros[V] = {};
        for (int64_t i = (int64_t)threadIdx.x * V; gradient && i < columns; i += THREADS * V)
            store_floats<V>(row + i, zeros);
        return;
    }
    share s = {-INFINITY, 0.0f, INT64_MAX};
    for (int64_t i = (int64_t)threadIdx.x * V; i < columns; i += THREADS * V) {
        float v[V];
        load_floats<V>(v, row + i);
#pragma unroll
        for (int j = 0; j < V; j++) s = take(s, v[j], i + j);
    }
    s = block_join(s);
    float at_target = to_float(row[target]);
    __syncthreads(); /* everyone has read the target's logit before it is overwritten */
    double log_sum = log((double)s.sum), lse = (double)s.most + log_sum, z_term = 2 * z_loss * lse;
    if (threadIdx.x == 0) {
        double nll = log_sum + ((double)s.most - (double)at_target);
        sums[blockIdx.x] = {nll, z_loss * lse * lse, 1, s.at == target ? 1.0 : 0.0};
        if (losses) losses[blockIdx.x] = (float)nll;
    }
    if (!gradient) return;
    float factor = (float)(scale * (1 + z_term) / (double)s.sum);
    for (int64_t i = (int64_t)threadIdx.x * V; i < columns; i += THREADS * V) {
        float v[V];
        load_floats<V>(v, row + i);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float p = __expf(v[j] - s.most);
            /* At the target in a form that keeps what is left of p - 1. */
            if (i + j == target) {
                double share = (double)p / (double)s.sum;
                v[j] = (float)(scale * (share - 1 + z_term * share));
            } else {
                v[j] = p * factor;
            }
        }
        store_floats<V>(row + i, v);
    }
}

/* *total += the sums of all rows: thread i takes every THREADS-th row, then a tree over the threads. */
__global__ void __launch_bounds__(THREADS) add_losses_kernel(struct loss_sums *total, const struct loss_sums *rows,
                                                             int64_t count) {
    __shared__ struct loss_sums room[THREADS];
    struct loss_sums s = {0, 0, 0, 0};
    for (int64_t r = threadIdx.x; r < count; r += THREADS)
        s = {s.nll + rows[r].nll, s.z + rows[r].z, s.valid + rows[r].valid, s.correct + rows[r].correct};
    room[threadIdx.x] = s;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x >= half) continue;
        struct loss_sums a = room[threadIdx.x], b = room[threadIdx.x + half];
        room[threadIdx.x] = {a.nll + b.nll, a.z + b.z, a.valid + b.valid, a.correct + b.correct};
    }
    if (threadIdx.x != 0) return;
    s = room[0];
    *total = {total->nll + s.nll, total->z + s.z, total->valid + s.valid, total->correct + s.correct};
}

static tensor rows_of(tensor t, int64_t from, int64_t count) {
    if (!tensor_given(t)) return t;
    t.data = (char *)t.data + from * t.stride[0] * (int64_t)dtype_size(t.dtype);
    t.dim[0] = count;
    return t;
}

extern "C" void cuda_head_loss(struct device *dev, struct loss_sums *sums, tensor losses, tensor dx, tensor dw, tensor x,
                               tensor w, tensor targets, double scale, double z_loss, void *scratch) {
    int64_t R = x.dim[0], D = x.dim[1], V = w.dim[0], tile = tile_rows(R, V, dtype_size(x.dtype));
    bool gradient = tensor_given(dx);
    ASSERT(w.dim[1] == D && tensor_is(targets, 1, R) && (gradient || !tensor_given(dw)));
    struct loss_sums *each = (struct loss_sums *)scratch;
    void *place = (char *)scratch + sums_size(tile);
    for (int64_t from = 0; from < R; from += tile) {
        int64_t rows = at_most(R - from, tile);
        tensor logits = tensor_2d(place, x.dtype, rows, V), in = rows_of(x, from, rows);
        tensor target = rows_of(targets, from, rows), loss = rows_of(losses, from, rows);
        cuda_gemm(dev, gemm_rows(in), gemm_transposed(w), gemm_rows(logits), rows, V, D, 1, 0);
        with_type(x.dtype, [&](auto of_type) {
            using T = decltype(of_type);
            with_width(vectors_fit(logits, 4), [&](auto width) {
                LAUNCH(dev, (loss_row_kernel<T, width.value>), (unsigned)rows, THREADS, 0, data_of<T>(logits), each,
                       data_of<float>(loss), data_of<int32_t>(target), V, scale, z_loss, gradient);
            });
        });
        LAUNCH(dev, add_losses_kernel, 1, THREADS, 0, sums, each, rows);
        if (!gradient) continue;
        cuda_gemm(dev, gemm_rows(logits), gemm_rows(w), gemm_rows(rows_of(dx, from, rows)), rows, D, V, 1, 0);
        if (tensor_given(dw)) cuda_gemm(dev, gemm_transposed(logits), gemm_rows(in), gemm_rows(dw), V, D, rows, 1, 1);
    }
}
