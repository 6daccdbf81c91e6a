/* norm.cu: residual add + RMSNorm, and the gated RMSNorm of Mamba-2; forward and backward of both.
 *
 *   r = residual + branch;  rstd = 1/sqrt(mean(r^2) + eps);  y = r rstd weight
 *   xh = r rstd;  wdy = weight dy;  c = mean(xh wdy);  dr = (wdy - xh c) rstd + dnext;  dweight += sum dy xh
 *   u = y silu(z);  rstd = 1/sqrt(mean(u^2) + eps);  g = u rstd weight, in groups of n = I / groups
 *   xh = u rstd;  wdg = weight dg;  c = mean(xh wdg);  du = (wdg - xh c) rstd
 *   dy = du silu(z);  dz = du y silu'(z);  dweight += sum dg xh
 *
 * One block a row (or a group of a row); a thread holds ITEMS vectors of V elements in registers, so every operand
 * crosses device memory once. Backward: a block takes a run of rows, and sums dweight of its columns in registers over
 * them; the runs' sums are added by reduce.cu. The runs depend on R only.
 * Bytes a row, with e bytes an activation: forward (8 + 2e) D, backward (12 + 2e) D; gated: forward 3eI, backward 5eI.
 * All are bound by bandwidth: at 4.2 TB/s R 16,384, D 2048 in bf16 takes 0.1 ms forward.
 */
#include "kernels/cuda/launch.cuh"

enum { RUNS_MAX = 528 }; /* of rows in a backward pass: four a multiprocessor of a large chip */

static int64_t run_length(int64_t R) {
    return R > RUNS_MAX ? ceil_div(R, RUNS_MAX) : 1;
}

static int64_t runs_of(int64_t R) {
    return ceil_div(R, run_length(R));
}

/* Threads of a block whose threads hold ITEMS vectors of V elements of a row of n. */
static int threads_for(int64_t n, int V, int items) {
    int64_t threads = ceil_div(ceil_div(ceil_div(n, V), items), WARP) * WARP;
    ASSERT(threads <= 1024);
    return (int)threads;
}

/* How a row is dealt out to the threads of its block: ITEMS vectors of V elements each. */
template <int VECTOR, int COUNT> struct row_shape {
    static constexpr int V = VECTOR, ITEMS = COUNT;
    static int threads(int64_t n) { return threads_for(n, V, ITEMS); }
};

/* Run f with the shape for views that can be read in vectors, or that cannot. */
template <class F> static void with_shape(enum dtype dtype, bool wide, F f) {
    with_type(dtype, [&](auto of_type) {
        if (wide) f(of_type, row_shape<4, 4>());
        else f(of_type, row_shape<1, 16>());
    });
}

/* The element at which item k of this thread starts. */
template <int V> __device__ __forceinline__ int64_t item_at(int k) {
    return ((int64_t)k * blockDim.x + threadIdx.x) * V;
}

/* --- residual add + RMSNorm --------------------------------------------------------------------------------------- */

template <class T, int V, int ITEMS>
__global__ void add_rmsnorm_forward_kernel(float *out_residual, T *y, float *rstd, const float *residual,
                                           const T *branch, const float *weight, int64_t D, float eps) {
    __shared__ float room[WARP];
    int64_t row = (int64_t)blockIdx.x * D;
    float r[ITEMS][V], squares = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int64_t i = item_at<V>(k);
        if (i >= D) continue;
        load_floats<V>(r[k], residual + row + i);
        if (branch) {
            float add[V];
            load_floats<V>(add, branch + row + i);
#pragma unroll
            for (int j = 0; j < V; j++) r[k][j] += add[j];
        }
#pragma unroll
        for (int j = 0; j < V; j++) squares += r[k][j] * r[k][j];
        if (branch || out_residual != residual) store_floats<V>(out_residual + row + i, r[k]);
    }
    float s = 1.0f / sqrtf(block_sum(squares, room) / (float)D + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = s;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int64_t i = item_at<V>(k);
        if (i >= D) continue;
        float w[V];
        load_floats<V>(w, weight + i);
#pragma unroll
        for (int j = 0; j < V; j++) w[j] *= r[k][j] * s;
        store_floats<V>(y + row + i, w);
    }
}

extern "C" void cuda_add_rmsnorm_forward(struct device *dev, tensor out_residual, tensor y, tensor rstd,
                                         tensor residual, tensor branch, tensor weight, double eps) {
    int64_t R = residual.dim[0], D = residual.dim[1];
    ASSERT(tensor_is(y, 2, R, D) && tensor_is(out_residual, 2, R, D) && weight.dtype == DTYPE_F32);
    ASSERT(!tensor_given(branch) || branch.dtype == y.dtype);
    bool wide = vectors_fit(y, 4) && vectors_fit(residual, 4) && vectors_fit(branch, 4) && vectors_fit(weight, 4) &&
                vectors_fit(out_residual, 4);
    with_shape(y.dtype, wide, [&](auto of_type, auto shape) {
        using T = decltype(of_type);
        LAUNCH(dev, (add_rmsnorm_forward_kernel<T, shape.V, shape.ITEMS>), (unsigned)R, shape.threads(D), 0,
               data_of<float>(out_residual), data_of<T>(y), data_of<float>(rstd), data_of<float>(residual),
               data_of<T>(branch), data_of<float>(weight), D, (float)eps);
    });
}

template <class T, int V, int ITEMS>
__global__ void add_rmsnorm_backward_kernel(float *dresidual, T *dbranch, float *partial, const T *dy,
                                            const float *dnext, const float *residual, const float *rstd,
                                            const float *weight, int64_t R, int64_t D, int64_t length) {
    __shared__ float room[WARP];
    float w[ITEMS][V], sum[ITEMS][V] = {};
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
        if (item_at<V>(k) < D) load_floats<V>(w[k], weight + item_at<V>(k));
    int64_t first = blockIdx.x * length, end = first + length < R ? first + length : R;
    for (int64_t r = first; r < end; r++) {
        float s = rstd[r], dot = 0, xh[ITEMS][V], wdy[ITEMS][V];
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int64_t i = item_at<V>(k);
            if (i >= D) continue;
            load_floats<V>(xh[k], residual + r * D + i);
            load_floats<V>(wdy[k], dy + r * D + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                xh[k][j] *= s;
                sum[k][j] += wdy[k][j] * xh[k][j];
                wdy[k][j] *= w[k][j];
                dot += xh[k][j] * wdy[k][j];
            }
        }
        float c = block_sum(dot, room) / (float)D;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int64_t i = item_at<V>(k);
            if (i >= D) continue;
            float next[V] = {};
            if (dnext) load_floats<V>(next, dnext + r * D + i);
#pragma unroll
            for (int j = 0; j < V; j++) next[j] += (wdy[k][j] - xh[k][j] * c) * s;
            store_floats<V>(dresidual + r * D + i, next);
            if (dbranch) store_floats<V>(dbranch + r * D + i, next);
        }
    }
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
        if (item_at<V>(k) < D) store_floats<V>(partial + blockIdx.x * D + item_at<V>(k), sum[k]);
}

extern "C" size_t cuda_add_rmsnorm_backward_scratch(int64_t R, int64_t D) {
    return (size_t)(runs_of(R) * D) * sizeof(float);
}

extern "C" void cuda_add_rmsnorm_backward(struct device *dev, tensor dresidual, tensor dbranch, tensor dweight,
                                          tensor dy, tensor dnext, tensor residual, tensor rstd, tensor weight,
                                          void *scratch) {
    int64_t R = residual.dim[0], D = residual.dim[1];
    ASSERT(tensor_is(dy, 2, R, D) && tensor_is(dresidual, 2, R, D) && weight.dtype == DTYPE_F32);
    bool wide = vectors_fit(dy, 4) && vectors_fit(residual, 4) && vectors_fit(dnext, 4) && vectors_fit(weight, 4) &&
                vectors_fit(dresidual, 4) && vectors_fit(dbranch, 4) && (uintptr_t)scratch % 16 == 0;
    with_shape(dy.dtype, wide, [&](auto of_type, auto shape) {
        using T = decltype(of_type);
        LAUNCH(dev, (add_rmsnorm_backward_kernel<T, shape.V, shape.ITEMS>), (unsigned)runs_of(R), shape.threads(D), 0,
               data_of<float>(dresidual), data_of<T>(dbranch), (float *)scratch, data_of<T>(dy), data_of<float>(dnext),
               data_of<float>(residual), data_of<float>(rstd), data_of<float>(weight), R, D, run_length(R));
    });
    cuda_add_partials(dev, data_of<float>(dweight), (const float *)scratch, runs_of(R), D);
}

/* --- gated RMSNorm: block (row or run of rows, group) ------------------------------------------------------------- */

template <class T, int V, int ITEMS>
__global__ void gated_rmsnorm_forward_kernel(T *g, float *rstd, const T *y, const T *z, int64_t z_step,
                                             const float *weight, int64_t I, int64_t n, float eps) {
    __shared__ float room[WARP];
    int64_t r = blockIdx.x, group = blockIdx.y, at = group * n;
    float u[ITEMS][V], squares = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int64_t i = item_at<V>(k);
        if (i >= n) continue;
        float gate[V];
        load_floats<V>(u[k], y + r * I + at + i);
        load_floats<V>(gate, z + r * z_step + at + i);
#pragma unroll
        for (int j = 0; j < V; j++) {
            u[k][j] *= silu_of(gate[j]);
            squares += u[k][j] * u[k][j];
        }
    }
    float s = 1.0f / sqrtf(block_sum(squares, room) / (float)n + eps);
    if (threadIdx.x == 0) rstd[r * gridDim.y + group] = s;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int64_t i = item_at<V>(k);
        if (i >= n) continue;
        float w[V];
        load_floats<V>(w, weight + at + i);
#pragma unroll
        for (int j = 0; j < V; j++) w[j] *= u[k][j] * s;
        store_floats<V>(g + r * I + at + i, w);
    }
}

/* Can each group of each row be read four elements at a time? */
static bool groups_fit(int64_t n, int count, const tensor *views) {
    for (int i = 0; i < count; i++)
        if (!vectors_fit(views[i], 4)) return false;
    return n % 4 == 0;
}

extern "C" void cuda_gated_rmsnorm_forward(struct device *dev, tensor g, tensor rstd, tensor y, tensor z, tensor weight,
                                           double eps) {
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1], n = I / groups;
    ASSERT(tensor_is(g, 2, R, I) && tensor_is(z, 2, R, I) && I % groups == 0 && weight.dtype == DTYPE_F32);
    const tensor views[] = {g, y, z, weight};
    bool wide = groups_fit(n, 4, views);
    dim3 grid((unsigned)R, (unsigned)groups);
    with_shape(y.dtype, wide, [&](auto of_type, auto shape) {
        using T = decltype(of_type);
        LAUNCH(dev, (gated_rmsnorm_forward_kernel<T, shape.V, shape.ITEMS>), grid, shape.threads(n), 0, data_of<T>(g),
               data_of<float>(rstd), data_of<T>(y), data_of<T>(z), z.stride[0], data_of<float>(weight), I, n,
               (float)eps);
    });
}

template <class T, int V, int ITEMS>
__global__ void gated_rmsnorm_backward_kernel(T *dy, T *dz, int64_t dz_step, float *partial, const T *dg, const T *y,
                                              const T *z, int64_t z_step, const float *rstd, const float *weight,
                                              int64_t R, int64_t I, int64_t n, int64_t length) {
    __shared__ float room[WARP];
    int64_t group = blockIdx.y, at = group * n;
    float sum[ITEMS][V] = {};
    int64_t first = blockIdx.x * length, end = first + length < R ? first + length : R;
    for (int64_t r = first; r < end; r++) {
        float s = rstd[r * gridDim.y + group], dot = 0, in[ITEMS][V], gate[ITEMS][V], wdg[ITEMS][V];
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int64_t i = item_at<V>(k);
            if (i >= n) continue;
            float w[V];
            load_floats<V>(in[k], y + r * I + at + i);
            load_floats<V>(gate[k], z + r * z_step + at + i);
            load_floats<V>(wdg[k], dg + r * I + at + i);
            load_floats<V>(w, weight + at + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float u = in[k][j] * silu_of(gate[k][j]);
                sum[k][j] += wdg[k][j] * u * s;
                wdg[k][j] *= w[j];
                dot += u * wdg[k][j];
            }
        }
        float c = block_sum(dot, room) * s / (float)n;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int64_t i = item_at<V>(k);
            if (i >= n) continue;
            float to_y[V], to_z[V];
#pragma unroll
            for (int j = 0; j < V; j++) {
                float open = silu_of(gate[k][j]), xh = in[k][j] * open * s, du = (wdg[k][j] - xh * c) * s;
                to_y[j] = du * open;
                to_z[j] = du * in[k][j] * silu_slope(gate[k][j]);
            }
            store_floats<V>(dy + r * I + at + i, to_y);
            store_floats<V>(dz + r * dz_step + at + i, to_z);
        }
    }
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
        if (item_at<V>(k) < n) store_floats<V>(partial + blockIdx.x * I + at + item_at<V>(k), sum[k]);
}

extern "C" size_t cuda_gated_rmsnorm_backward_scratch(int64_t R, int64_t I) {
    return (size_t)(runs_of(R) * I) * sizeof(float);
}

extern "C" void cuda_gated_rmsnorm_backward(struct device *dev, tensor dy, tensor dz, tensor dweight, tensor dg,
                                            tensor y, tensor z, tensor rstd, tensor weight, void *scratch) {
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1], n = I / groups;
    ASSERT(tensor_is(dg, 2, R, I) && tensor_is(z, 2, R, I) && tensor_is(dz, 2, R, I) && tensor_is(dy, 2, R, I));
    const tensor views[] = {dy, dz, dg, y, z, weight};
    bool wide = groups_fit(n, 6, views) && (uintptr_t)scratch % 16 == 0;
    dim3 grid((unsigned)runs_of(R), (unsigned)groups);
    with_shape(y.dtype, wide, [&](auto of_type, auto shape) {
        using T = decltype(of_type);
        LAUNCH(dev, (gated_rmsnorm_backward_kernel<T, shape.V, shape.ITEMS>), grid, shape.threads(n), 0, data_of<T>(dy),
               data_of<T>(dz), dz.stride[0], (float *)scratch, data_of<T>(dg), data_of<T>(y), data_of<T>(z),
               z.stride[0], data_of<float>(rstd), data_of<float>(weight), R, I, n, run_length(R));
    });
    cuda_add_partials(dev, data_of<float>(dweight), (const float *)scratch, runs_of(R), I);
}
