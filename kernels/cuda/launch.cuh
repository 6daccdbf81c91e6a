/* launch.cuh: what the kernels of this directory share: the device's handles, launching with errors kept, activation
 * types, vector loads, sums over a warp and a block, and sums of partial rows. Included by the .cu files only.
 *
 * Reproducibility: no floating-point atomics anywhere; every sum is cut by sizes that depend on the problem only, and
 * added in a fixed order, so two runs of one binary on one kind of chip give the same bits.
 */
#ifndef RIVERRUN_CUDA_LAUNCH_CUH
#define RIVERRUN_CUDA_LAUNCH_CUH

#include "kernels/cuda/cublas.cuh"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/mma.cuh"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

struct gemm_plan;

enum { STAGE_SLOTS = 4, MARKS = 8 };
constexpr size_t STAGE = (size_t)4 << 20; /* bytes of a slot */

/* device.impl */
struct cuda_device {
    int index; /* of the GPU; every thread that calls CUDA has to choose it */
    cudaStream_t stream; /* where work is queued now: main, or from device_back to device_join beside (beside.cu) */
    cudaStream_t main, beside;
    cudaEvent_t forked, joined;
    bool aside; /* between device_fork and device_back */
    struct cublas library;
    cublasLtHandle_t blas;
    void *workspace; /* of the matrix products */
    size_t workspace_size;
    double *partials;        /* SUM_BLOCKS doubles, for sums over flat arrays */
    char *stage;             /* pinned: STAGE_SLOTS slots of STAGE bytes (transfer.cu) */
    cudaEvent_t stage_done[STAGE_SLOTS];
    int stage_slot; /* the next one to be filled */
    cudaEvent_t marks[MARKS];
    uint64_t marked;      /* marks so far */
    size_t memory_peak;   /* bytes taken on the device, as far as it was looked at */
    struct gemm_plan *plans; /* list of what linear.cu has set up */
    struct attention_cudnn *cudnn; /* once attention has asked for it, and where there is one */
    int64_t cudnn_version;         /* 0: none; -1: nobody has asked */
    int multiprocessors;
    bool failed;
    char failure[512]; /* the first failure since the last check, if failed */
    struct arena_memory memory, host_memory;
};

#define SUM_BLOCKS 1024
#define WARP 32
#define FULL 0xffffffffu
#define LOG2E 1.4426950408889634f

static inline struct cuda_device *cuda_impl(struct device *dev) {
    return (struct cuda_device *)dev->impl;
}

/* Keep the first failure; `what` is the operation. */
void cuda_keep_failure(struct device *dev, const char *what, const char *why);

static inline void cuda_expect(struct device *dev, cudaError_t result, const char *what) {
    if (result != cudaSuccess) cuda_keep_failure(dev, what, cudaGetErrorString(result));
}

/* The two things that only nvcc can say: a launch, and shared memory whose size the launch gives. test/emulation has
 * its own, with which these kernels run in the tests on machines without a GPU. */
#ifndef RIVERRUN_EMULATE
#define START_KERNEL(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

/* Launch on the device's stream; an empty grid is nothing to do, a launch that is refused is kept as the device's
 * failure. */
#define LAUNCH(dev, kernel, grid, block, shared, ...)                                                                  \
    do {                                                                                                               \
        dim3 blocks_of_launch(grid);                                                                                   \
        if (blocks_of_launch.x == 0 || blocks_of_launch.y == 0 || blocks_of_launch.z == 0) break;                      \
        START_KERNEL(kernel, blocks_of_launch, (block), (shared), cuda_impl(dev)->stream, __VA_ARGS__);                \
        cuda_expect((dev), cudaPeekAtLastError(), #kernel);                                                            \
    } while (0)

/* with_type(x.dtype, [&](auto of_type) { using T = decltype(of_type); ... }): run with T the C++ type of a dtype. */
template <class F> static inline void with_type(enum dtype dtype, F f) {
    ASSERT(dtype == DTYPE_F32 || dtype == DTYPE_BF16);
    if (dtype == DTYPE_BF16) f(__nv_bfloat16());
    else f(float());
}

/* with_width(wide, [&](auto width) { constexpr int V = width.value; ... }): vectors of four elements, or single. */
template <int N> struct constant {
    static constexpr int value = N;
};

template <class F> static inline void with_width(bool wide, F f) {
    if (wide) f(constant<4>());
    else f(constant<1>());
}

/* Elements that 16 bytes hold. */
template <class T> static constexpr int vector_of = 16 / (int)sizeof(T);

/* The same with vectors of 16 bytes of T. */
template <class T, class F> static inline void with_vectors(bool wide, F f) {
    if (wide) f(constant<vector_of<T>>());
    else f(constant<1>());
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static inline __host__ __device__ int64_t at_most(int64_t a, int64_t most) {
    return a < most ? a : most;
}

static inline __host__ __device__ int64_t at_least(int64_t a, int64_t least) {
    return a > least ? a : least;
}

template <class T> static inline T *data_of(tensor t) {
    return (T *)t.data;
}

/* --- numbers ------------------------------------------------------------------------------------------------------ */

template <class T> __device__ __forceinline__ float to_float(T v);
template <> __device__ __forceinline__ float to_float<float>(float v) {
    return v;
}
template <> __device__ __forceinline__ float to_float<__nv_bfloat16>(__nv_bfloat16 v) {
    return __bfloat162float(v);
}
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

/* V neighbours, moved together when V * sizeof(T) is a width the memory system has. */
template <class T, int V> struct alignas(sizeof(T) * V > 16 ? 16 : sizeof(T) * V) pack {
    T v[V];
};

template <int V, class T> __device__ __forceinline__ void load_floats(float (&out)[V], const T *from) {
    pack<T, V> p = *reinterpret_cast<const pack<T, V> *>(from);
#pragma unroll
    for (int i = 0; i < V; i++) out[i] = to_float(p.v[i]);
}

template <int V, class T> __device__ __forceinline__ void store_floats(T *to, const float (&in)[V]) {
    pack<T, V> p;
#pragma unroll
    for (int i = 0; i < V; i++) p.v[i] = from_float<T>(in[i]);
    *reinterpret_cast<pack<T, V> *>(to) = p;
}

/* Can rows of these views be read V elements at a time? Data pointers, row steps and widths must agree. */
static inline bool vectors_fit(tensor t, int V) {
    if (!tensor_given(t)) return true;
    int64_t bytes = (int64_t)dtype_size(t.dtype) * V;
    int64_t align = bytes > 16 ? 16 : bytes;
    if ((uintptr_t)t.data % (uintptr_t)align != 0 || t.dim[t.ndim - 1] % V != 0) return false;
    for (int i = 0; i + 1 < t.ndim; i++)
        if (t.stride[i] * (int64_t)dtype_size(t.dtype) % align != 0) return false;
    return true;
}

/* The quick division is off by two units in the last place at most, and 0 where the divisor is infinite. */
__device__ __forceinline__ float sigmoid_of(float v) {
    return reciprocal(1.0f + power_of_two(-LOG2E * v));
}

__device__ __forceinline__ float silu_of(float v) {
    return v * sigmoid_of(v);
}

__device__ __forceinline__ float silu_slope(float v) {
    float s = sigmoid_of(v);
    return s * (1.0f + v * (1.0f - s));
}

/* log1p(exp(v)) = max(v, 0) + log1p(u) with u = exp(-|v|) <= 1, and log1p(u) = u times a polynomial: the best of
 * degree 8 on [0, 1], to 2e-7 of the value in fp32 also where the value is small. Beyond 20, u vanishes beside v. */
__device__ __forceinline__ float softplus_of(float v) {
    float u = power_of_two(-LOG2E * fabsf(v)), p = 0.00523269409f;
    p = p * u - 0.0295052379f;
    p = p * u + 0.0782259479f;
    p = p * u - 0.136632457f;
    p = p * u + 0.191060066f;
    p = p * u - 0.24842982f;
    p = p * u + 0.333190978f;
    p = p * u - 0.499994934f;
    p = p * u + 0.99999994f;
    return fmaxf(v, 0.0f) + u * p;
}

/* Its derivative. */

__device__ __forceinline__ float softplus_slope(float v) {
    return v <= 20.0f ? sigmoid_of(v) : 1.0f;
}

/* --- sums --------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(FULL, v, offset);
    return v;
}

/* The sum over a block of whole warps, in every thread. `room` is WARP floats of shared memory, free again after the
 * next barrier. */
__device__ __forceinline__ float block_sum(float v, float *room) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    v = warp_sum(v);
    if (warps == 1) return v;
    __syncthreads();
    if (lane == 0) room[warp] = v;
    __syncthreads();
    return warp_sum(lane < warps ? room[lane] : 0.0f);
}

/* sum (n) += partial[0] + partial[1] + ... of `rows` rows of n floats, in a fixed order. (reduce.cu) */
void cuda_add_partials(struct device *dev, float *sum, const float *partial, int64_t rows, int64_t n);
/* The same where a row is `count` parts of n columns each, in one launch: column j of part i is added to
 * part[i].sum[j * part[i].step]; a part whose sum is NULL is passed over. (reduce.cu) */
enum { SUM_PARTS = 16 };

struct sum_part {
    float *sum;
    int64_t step;
};

struct sum_parts {
    int count;
    struct sum_part part[SUM_PARTS];
};

void cuda_add_partial_parts(struct device *dev, struct sum_parts parts, const float *partial, int64_t rows, int64_t n);
/* sum (n) += the sums of the columns of `rows` (R, n), act or real, `stride` elements apart. (reduce.cu) */
void cuda_add_column_sums(struct device *dev, float *sum, tensor rows);

#endif
