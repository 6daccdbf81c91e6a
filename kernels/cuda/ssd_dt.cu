/* ssd_dt.cu: step sizes and decay exponents of SSD, and their backward.
 *
 *   v = raw + bias[h]    dt = clamp(softplus(v), dt_min, dt_max)    a = A[h] dt,  A = -exp(A_log)
 *   d = ddt + A da (0 where dt was clamped)    draw = d softplus'(v)    dbias += sum draw    dA_log += A sum da dt
 *
 * Elementwise over (B,T,H), H fastest. A block takes HEADS heads and TOKENS tokens; a thread takes one head of EACH of
 * them, all of which it asks for before it uses any. Backward: the sums over a block's tokens are added by reduce.cu.
 * Bytes a token and head, e an activation: 8 + e forward, 8 + 2e backward; B 16, T 2048, H 24 in bf16: 8 and 9 MB, 3 us
 * each at 3.0 TB/s, which a launch makes 5.
 */
#include "kernels/cuda/launch.cuh"

enum { HEADS = 32, ROWS = 8, EACH = 8, TOKENS = ROWS * EACH };

struct dt_problem {
    int64_t R, T, H;
    int64_t raw_row, raw_step; /* strides of raw over batch rows and time */
    const float *bias, *A_log;
    float low, high;
};

/* This thread's tokens: `count` of them, the i-th with index token(i) = b T + t. */
struct dt_place {
    int64_t first, h;
    int count;

    __device__ __forceinline__ dt_place(const dt_problem &p) {
        first = blockIdx.x * (int64_t)TOKENS + threadIdx.y;
        h = blockIdx.y * (int64_t)HEADS + threadIdx.x;
        int64_t left = p.R - first;
        count = h >= p.H || left <= 0 ? 0 : left > TOKENS - ROWS ? EACH : (int)((left + ROWS - 1) / ROWS);
    }

    __device__ __forceinline__ int64_t token(int i) const { return first + i * ROWS; }
};

/* Where the values of the tokens lie in a view with strides over batch rows and time: one division a thread. */
__device__ __forceinline__ void offsets_of(int64_t (&at)[EACH], const dt_place &place, int64_t T, int64_t row,
                                           int64_t step) {
    int64_t b = place.first / T, t = place.first - b * T;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        at[i] = b * row + t * step + place.h;
        for (t += ROWS; t >= T; t -= T) b++;
    }
}

template <class T>
__global__ void __launch_bounds__(HEADS *ROWS) dt_forward_kernel(float *dt, float *a, const T *raw, dt_problem p) {
    dt_place place(p);
    int64_t at[EACH];
    float v[EACH];
    offsets_of(at, place, p.T, p.raw_row, p.raw_step);
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] = i < place.count ? to_float(raw[at[i]]) : 0.0f;
    if (place.count == 0) return;
    float bias = p.bias[place.h], rate = -expf(p.A_log[place.h]);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i >= place.count) break;
        float size = fminf(fmaxf(softplus_of(v[i] + bias), p.low), p.high);
        dt[place.token(i) * p.H + place.h] = size;
        a[place.token(i) * p.H + place.h] = rate * size;
    }
}

static dt_problem problem_of(tensor raw, tensor bias, tensor A_log, double low, double high) {
    return {raw.dim[0] * raw.dim[1], raw.dim[1], raw.dim[2], raw.stride[0], raw.stride[1], data_of<float>(bias),
            data_of<float>(A_log), (float)low, (float)high};
}

static dim3 grid_of(const dt_problem &p) {
    return dim3((unsigned)ceil_div(p.R, TOKENS), (unsigned)ceil_div(p.H, HEADS));
}

extern "C" void cuda_ssd_dt_forward(struct device *dev, tensor dt, tensor a, tensor raw, tensor bias, tensor A_log,
                                    double dt_min, double dt_max) {
    dt_problem p = problem_of(raw, bias, A_log, dt_min, dt_max);
    with_type(raw.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, dt_forward_kernel<T>, grid_of(p), dim3(HEADS, ROWS), 0, data_of<float>(dt), data_of<float>(a),
               data_of<T>(raw), p);
    });
}

/* partial: for every block of TOKENS tokens (2, H), the sums of draw and of A da dt. */
template <class T>
__global__ void __launch_bounds__(HEADS *ROWS)
dt_backward_kernel(T *draw, int64_t draw_row, int64_t draw_step, float *partial, const float *ddt, const float *da,
                   const T *raw, dt_problem p) {
    __shared__ float sums[2][ROWS][HEADS];
    dt_place place(p);
    int64_t at[EACH], to[EACH];
    float in[EACH], to_dt[EACH], to_a[EACH], of_raw = 0, of_rate = 0;
    offsets_of(at, place, p.T, p.raw_row, p.raw_step);
    offsets_of(to, place, p.T, draw_row, draw_step);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        bool there = i < place.count;
        in[i] = there ? to_float(raw[at[i]]) : 0.0f;
        to_dt[i] = there ? ddt[place.token(i) * p.H + place.h] : 0.0f;
        to_a[i] = there ? da[place.token(i) * p.H + place.h] : 0.0f;
    }
    float bias = place.count ? p.bias[place.h] : 0.0f, rate = place.count ? -expf(p.A_log[place.h]) : 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i >= place.count) break;
        float v = in[i] + bias, dt = softplus_of(v);
        bool clamped = dt < p.low || dt > p.high;
        float d = clamped ? 0.0f : (to_dt[i] + rate * to_a[i]) * softplus_slope(v);
        draw[to[i]] = from_float<T>(d);
        of_raw += d;
        of_rate += rate * fminf(fmaxf(dt, p.low), p.high) * to_a[i];
    }
    sums[0][threadIdx.y][threadIdx.x] = of_raw;
    sums[1][threadIdx.y][threadIdx.x] = of_rate;
    __syncthreads();
    if (threadIdx.y >= 2 || place.h >= p.H) return;
    float sum = 0;
    for (int i = 0; i < ROWS; i++) sum += sums[threadIdx.y][i][threadIdx.x];
    partial[(blockIdx.x * (int64_t)2 + threadIdx.y) * p.H + place.h] = sum;
}

extern "C" size_t cuda_ssd_dt_backward_scratch(int64_t B, int64_t T, int64_t H) {
    return (size_t)(ceil_div(B * T, TOKENS) * 2 * H) * sizeof(float);
}

extern "C" void cuda_ssd_dt_backward(struct device *dev, tensor draw, tensor dbias, tensor dA_log, tensor ddt, tensor da,
                                     tensor raw, tensor bias, tensor A_log, double dt_min, double dt_max,
                                     void *scratch) {
    dt_problem p = problem_of(raw, bias, A_log, dt_min, dt_max);
    int64_t blocks = ceil_div(p.R, TOKENS);
    float *partial = (float *)scratch;
    with_type(raw.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, dt_backward_kernel<T>, grid_of(p), dim3(HEADS, ROWS), 0, data_of<T>(draw), draw.stride[0],
               draw.stride[1], partial, data_of<float>(ddt), data_of<float>(da), data_of<T>(raw), p);
    });
    struct sum_parts parts = {2, {{data_of<float>(dbias), 1}, {data_of<float>(dA_log), 1}}};
    cuda_add_partial_parts(dev, parts, partial, blocks, p.H);
}
