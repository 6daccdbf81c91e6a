/* head_loss.cu: the language-model head and its cross-entropy, a tile of rows at a time.
 *
 *   logits = x w^T, with a cap: cap tanh(x w^T / cap)
 *   lse = log sum exp(logits);  loss = lse - logits[target] + z_loss lse^2    (rows with target >= 0)
 *   dlogits = scale (p (1 + 2 z_loss lse) - [v == target]), p = exp(logits - lse);  dx = dlogits w;  dw += dlogits^T x
 *   with a cap dlogits is multiplied by 1 - (logits / cap)^2
 *
 * A tile's logits are the only ones in memory, in the activation type, their rows padded to whole vectors of 16 bytes:
 * TILE_BYTES of them. One block turns a row of logits into dlogits in place. A first pass keeps the row in shared
 * memory as it comes (what doesn't fit is read again) and finds the largest logit and the sum of exponentials: each
 * thread takes a vector's largest first, so that the sum so far is scaled once a vector, and the shares are joined
 * once.
 * A second pass writes. A cap is put on wherever a logit is looked at, in a kernel of its own. Whether the target is
 * the first of the largest is looked up only where its logit is as large. Losses of single rows go to scratch and one
 * block adds them up in double, in order. Rows without a target get dlogits 0.
 *
 * FLOPs 6 R V D (2 without gradients), 32,768 x 768 x 50,304: 7.6 TFLOP, 9.6 ms at 790 TFLOP/s. Bytes 5 e R V (the row
 * is written by one product, read and written here, read by two products; e = 2), of which the passes over rows have
 * 2 e R V: 2.2 ms there at 3.0 TB/s. Their 2.1 R V exponentials take 1.0 ms of all special function units, which
 * another block's loads and stores hide; a cap adds four a logit, 1.9 ms. dw in fp32 is read and written once a tile:
 * 0.1 ms each, so tiles are large.
 */
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/shared.cuh"

#define TILE_BYTES ((int64_t)512 << 20)
enum {
    TILE_STEP = 128,  /* rows of a tile are a multiple of what the products take at once */
    TILE_MAX = 16384,
    THREADS_MAX = 512, THREADS_MIN = 128,
    AHEAD = 4,        /* vectors of a thread on their way at once */
    CACHED_BYTES = 104 << 10, /* of a row in shared memory: 50,304 bf16 fit, and two blocks a multiprocessor */
    STATIC_BYTES = 1 << 10    /* more than what kernels have besides */
};

/* Elements from row to row of logits. */
static int64_t row_step(int64_t V) {
    return ceil_div(V, 8) * 8;
}

/* The most rows that a tile has for V columns of logits of `size` bytes. */
static int64_t tile_rows_most(int64_t V, size_t size) {
    int64_t most = TILE_BYTES / (row_step(V) * (int64_t)size) / TILE_STEP * TILE_STEP;
    if (most < TILE_STEP) most = TILE_STEP;
    return at_most(most, TILE_MAX);
}

/* Rows of a tile out of R: as many tiles as TILE_BYTES makes necessary, of one size. */
static int64_t tile_rows(int64_t R, int64_t V, size_t size) {
    int64_t most = tile_rows_most(V, size);
    if (R <= most) return R < 1 ? 1 : R;
    return ceil_div(ceil_div(R, ceil_div(R, most)), TILE_STEP) * TILE_STEP;
}

static size_t sums_size(int64_t R) {
    return (size_t)ceil_div(R * (int64_t)sizeof(struct loss_sums), 256) * 256;
}

/* The sums of all rows, then the logits of a tile. Room for R rows is room for fewer, too, whose tiles may be
 * higher. */
static size_t scratch_size(int64_t R, int64_t V, size_t size) {
    int64_t rows = at_most(R < 1 ? 1 : R, tile_rows_most(V, size));
    return sums_size(R) + (size_t)ceil_div(rows * row_step(V) * (int64_t)size, 256) * 256;
}

extern "C" size_t cuda_head_loss_scratch_f32(int64_t R, int64_t D, int64_t V) {
    (void)D;
    return scratch_size(R, V, sizeof(float));
}

extern "C" size_t cuda_head_loss_scratch_bf16(int64_t R, int64_t D, int64_t V) {
    (void)D;
    return scratch_size(R, V, sizeof(__nv_bfloat16));
}

/* --- a row of logits ---------------------------------------------------------------------------------------------- */

#define LOWEST (-1e38f) /* below every logit, and finite: the difference of two is a number */

/* The largest of some logits, and the sum of exp(logit - largest). A logit that is not a number makes the sum so. */
struct share {
    float most, sum;
};

#define LOG2_E 1.44269504f

/* exp(v) for v <= 0, exactly 1 for 0; what would be subnormal is 0. */
__device__ __forceinline__ float exp_of(float v) {
    return power_of_two(v * LOG2_E);
}

template <int V> __device__ __forceinline__ void take(share &s, const float (&v)[V]) {
    float most = s.most;
#pragma unroll
    for (int j = 0; j < V; j++) most = fmaxf(most, v[j]);
    s.sum *= exp_of(s.most - most);
    s.most = most;
#pragma unroll
    for (int j = 0; j < V; j++) s.sum += exp_of(v[j] - most);
}

/* The shares of a warp joined; of a sum of two the order doesn't matter, so all lanes get the same. */
__device__ __forceinline__ share warp_join(share s) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        share other = {__shfl_xor_sync(FULL, s.most, offset), __shfl_xor_sync(FULL, s.sum, offset)};
        float most = fmaxf(s.most, other.most);
        s = {most, s.sum * exp_of(s.most - most) + other.sum * exp_of(other.most - most)};
    }
    return s;
}

/* The share of the block, from those of its threads; the same in every thread. */
__device__ __forceinline__ share block_join(share s) {
    __shared__ share room[WARP];
    int lane = threadIdx.x % WARP;
    s = warp_join(s);
    if (lane == 0) room[threadIdx.x / WARP] = s;
    __syncthreads();
    s = {LOWEST, 0.0f};
    if (lane < (int)blockDim.x / WARP) s = room[lane];
    return warp_join(s);
}

/* The cap of logits; without one nothing is left of it in the code. */
template <bool CAPPED> struct soft_cap {
    float cap, inverse;

    /* tanh(v / cap). In bf16 within 1e-7, far below the rounding of the product that v is. */
    template <class T> __device__ __forceinline__ float part(float v) const {
        return sizeof(T) == sizeof(float) ? tanhf(v * inverse) : 2.0f * sigmoid_of(2.0f * inverse * v) - 1.0f;
    }

    /* Rounded here, so that comparisons see the same value everywhere. */
    template <class T> __device__ __forceinline__ float of(float v) const {
        return CAPPED ? __fmul_rn(cap, part<T>(v)) : v;
    }

    /* d of(v) / dv where of(v) is `value`. */
    __device__ __forceinline__ float slope(float value) const {
        return CAPPED ? 1.0f - value * inverse * (value * inverse) : 1.0f;
    }
};

/* A row: its vectors, of which the first `cached` are also in shared memory once they have been read, by the thread
 * that read them. What lies behind the last column reads as LOWEST. */
template <class T, bool CAPPED> struct logit_row {
    static constexpr int V = vector_of<T>;
    T *global;
    pack<T, V> *shared;
    int columns, vectors, cached;
    soft_cap<CAPPED> cap;

    __device__ __forceinline__ void floats(float (&v)[V], const pack<T, V> &from, int i) const {
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = cap.template of<T>(to_float(from.v[j]));
        if ((i + 1) * V <= columns) return;
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = i * V + j < columns ? v[j] : LOWEST;
    }

    __device__ __forceinline__ pack<T, V> read(int i) const {
        return *reinterpret_cast<const pack<T, V> *>(global + (int64_t)i * V);
    }

    __device__ __forceinline__ void again(float (&v)[V], int i) const {
        floats(v, i < cached ? shared[i] : read(i), i);
    }
};

/* The thread's share of a row it sees for the first time. */
template <class T, bool CAPPED> __device__ __forceinline__ share first_pass(const logit_row<T, CAPPED> &row) {
    share s = {LOWEST, 0.0f};
    for (int first = threadIdx.x; first < row.vectors; first += AHEAD * blockDim.x) {
        pack<T, row.V> p[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (first + a * (int)blockDim.x < row.vectors) p[a] = row.read(first + a * blockDim.x);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int i = first + a * blockDim.x;
            if (i >= row.vectors) break;
            if (i < row.cached) row.shared[i] = p[a];
            float v[row.V];
            row.floats(v, p[a], i);
            take(s, v);
        }
    }
    return s;
}

/* Is `most`, which the target's logit equals, in no earlier column? The same in every thread. */
template <class T, bool CAPPED>
__device__ bool first_of_largest(const logit_row<T, CAPPED> &row, float most, int target) {
    int earlier = 0;
    for (int i = threadIdx.x; i * row.V < target; i += blockDim.x) {
        float v[row.V];
        row.again(v, i);
#pragma unroll
        for (int j = 0; j < row.V; j++) earlier |= v[j] == most && i * row.V + j < target;
    }
    return !__syncthreads_or(earlier);
}

/* exp(logit - most) factor in the place of every logit, but at_target in that of the target's. */
template <class T, bool CAPPED>
__device__ __forceinline__ void second_pass(const logit_row<T, CAPPED> &row, float most, float factor, int target,
                                            float at_target) {
    float shift = -most * LOG2_E; /* its rounding scales all of a row alike, by less than 1e-7 |most| */
    for (int i = threadIdx.x; i < row.vectors; i += blockDim.x) {
        float v[row.V];
        row.again(v, i);
#pragma unroll
        for (int j = 0; j < row.V; j++) v[j] = power_of_two(v[j] * LOG2_E + shift) * factor * row.cap.slope(v[j]);
        store_floats<row.V>(row.global + (int64_t)i * row.V, v);
        if (target / row.V == i) row.global[target] = from_float<T>(at_target);
    }
}

/* A row without a target. */
template <class T, bool CAPPED>
__device__ void pass_over(const logit_row<T, CAPPED> &row, struct loss_sums *sums, float *loss, bool gradient) {
    if (threadIdx.x == 0) {
        *sums = {0, 0, 0, 0};
        if (loss) *loss = 0;
    }
    const float zeros[row.V] = {};
    for (int i = threadIdx.x; gradient && i < row.vectors; i += blockDim.x)
        store_floats<row.V>(row.global + (int64_t)i * row.V, zeros);
}

template <class T, bool CAPPED>
__global__ void __launch_bounds__(THREADS_MAX, 2)
loss_row_kernel(T *logits, struct loss_sums *sums, float *losses, const int32_t *targets, int columns, int64_t step,
                int cached, double scale, double z_loss, soft_cap<CAPPED> cap, bool gradient) {
    DYNAMIC_SHARED(char, memory);
    __shared__ float factor, at_target;
    constexpr int V = vector_of<T>;
    logit_row<T, CAPPED> row = {logits + blockIdx.x * step, reinterpret_cast<pack<T, V> *>(memory), columns,
                                (columns + V - 1) / V, cached, cap};
    int target = targets[blockIdx.x];
    float *loss = losses ? losses + blockIdx.x : NULL;
    if (target < 0) {
        pass_over(row, sums + blockIdx.x, loss, gradient);
        return;
    }
    float logit = cap.template of<T>(to_float(row.global[target]));
    share s = block_join(first_pass(row)); /* behind its barrier everyone has read the target's logit */
    bool correct = logit == s.most && first_of_largest(row, s.most, target);
    if (threadIdx.x == 0) {
        double sum = s.sum, log_sum = log(sum), lse = (double)s.most + log_sum, z_term = 2 * z_loss * lse;
        double nll = log_sum + ((double)s.most - (double)logit), p = (double)exp_of(logit - s.most) / sum;
        sums[blockIdx.x] = {nll, z_loss * lse * lse, 1, correct ? 1.0 : 0.0};
        if (loss) *loss = (float)nll;
        factor = (float)(scale * (1 + z_term) / sum);
        /* In a form that keeps what is left of p - 1. */
        at_target = (float)(scale * (p - 1 + z_term * p) * (double)cap.slope(logit));
    }
    if (!gradient) return;
    __syncthreads();
    second_pass(row, s.most, factor, target, at_target);
}

/* Run over the rows of a tile. */
template <bool CAPPED>
static void loss_rows(struct device *dev, tensor logits, struct loss_sums *sums, tensor losses, tensor targets,
                      double scale, double z_loss, double cap, bool gradient) {
    int64_t columns = logits.dim[1];
    soft_cap<CAPPED> soft = {(float)cap, (float)(1 / cap)};
    int64_t most = at_most(CACHED_BYTES, (int64_t)cuda_shared_most(dev) - STATIC_BYTES);
    with_type(logits.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        int64_t vectors = ceil_div(columns, vector_of<T>), cached = gradient ? at_most(vectors, most / 16) : 0;
        int threads = vectors > THREADS_MIN * AHEAD * 2 ? THREADS_MAX : THREADS_MIN;
        allow_shared(dev, loss_row_kernel<T, CAPPED>, (size_t)most, "head_loss");
        LAUNCH(dev, (loss_row_kernel<T, CAPPED>), (unsigned)logits.dim[0], threads, (size_t)cached * 16,
               data_of<T>(logits), sums, data_of<float>(losses), data_of<int32_t>(targets), (int)columns,
               logits.stride[0], (int)cached, scale, z_loss, soft, gradient);
    });
}

/* --- all rows ----------------------------------------------------------------------------------------------------- */

enum { ADDERS = 1024 };

/* *total += the sums of all rows: thread i takes every ADDERS-th row, then a tree over the threads. */
__global__ void __launch_bounds__(ADDERS) add_losses_kernel(struct loss_sums *total, const struct loss_sums *rows,
                                                            int64_t count) {
    __shared__ struct loss_sums room[ADDERS];
    struct loss_sums s = {0, 0, 0, 0};
#pragma unroll 4
    for (int64_t r = threadIdx.x; r < count; r += ADDERS) {
        struct loss_sums one = rows[r];
        s = {s.nll + one.nll, s.z + one.z, s.valid + one.valid, s.correct + one.correct};
    }
    room[threadIdx.x] = s;
    for (int half = ADDERS / 2; half > 0; half /= 2) {
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

extern "C" void cuda_head_loss(struct device *dev, struct loss_sums *sums, tensor losses, tensor dx, tensor dw,
                               tensor x, tensor w, tensor targets, double scale, double z_loss, double cap,
                               void *scratch) {
    int64_t R = x.dim[0], D = x.dim[1], V = w.dim[0], tile = tile_rows(R, V, dtype_size(x.dtype));
    bool gradient = tensor_given(dx);
    ASSERT(w.dim[1] == D && tensor_is(targets, 1, R) && (gradient || !tensor_given(dw)) && V < INT32_MAX / 2);
    ASSERT(cap >= 0 && (R > 0 || !dw.empty));
    struct loss_sums *each = (struct loss_sums *)scratch;
    void *place = (char *)scratch + sums_size(R);
    for (int64_t from = 0; from < R; from += tile) {
        int64_t rows = at_most(R - from, tile);
        tensor logits = tensor_2d(place, x.dtype, rows, V), in = rows_of(x, from, rows);
        logits.stride[0] = row_step(V);
        cuda_gemm(dev, gemm_rows(in), gemm_transposed(w), gemm_rows(logits), rows, V, D, 1, 0);
        (cap > 0 ? loss_rows<true> : loss_rows<false>)(dev, logits, each + from, rows_of(losses, from, rows),
                                                       rows_of(targets, from, rows), scale, z_loss, cap, gradient);
        if (!gradient) continue;
        cuda_gemm(dev, gemm_rows(logits), gemm_rows(w), gemm_rows(rows_of(dx, from, rows)), rows, D, V, 1, 0);
        float before = dw.empty && from == 0 ? 0.0f : 1.0f;
        if (tensor_given(dw))
            cuda_gemm(dev, gemm_transposed(logits), gemm_rows(in), gemm_rows(dw), V, D, rows, 1, before);
    }
    if (R > 0) LAUNCH(dev, add_losses_kernel, 1, ADDERS, 0, sums, each, R);
}
