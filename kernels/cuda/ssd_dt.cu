/* ssd_dt.cu: step sizes and decay exponents of SSD, and their backward.
 *
 *   v = raw + bias[h]    dt = clamp(softplus(v), dt_min, dt_max)    a = A[h] dt,  A = -exp(A_log)
 *   d = ddt + A da (0 where dt was clamped)    draw = d softplus'(v)    dbias += sum draw    dA_log += A sum da dt
 *
 * Elementwise over (B,T,H), H fastest; a block takes TOKENS tokens and sums over them, heads across its threads; the
 * blocks' sums are added by reduce.cu. A few bytes a token and head: small beside the scan itself.
 */
#include "kernels/cuda/launch.cuh"

enum { HEADS = 32, ROWS = 8, TOKENS = 64 };

struct dt_problem {
    int64_t R, T, H;
    int64_t raw_row, raw_step; /* strides of raw over batch rows and time */
    const float *bias, *A_log;
    float low, high;
};

template <class T> __device__ float raw_at(const dt_problem &p, const T *raw, int64_t r, int64_t h) {
    return to_float(raw[r / p.T * p.raw_row + r % p.T * p.raw_step + h]);
}

template <class T> __global__ void dt_forward_kernel(float *dt, float *a, const T *raw, dt_problem p) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, h = i % p.H;
    if (i >= p.R * p.H) return;
    float v = softplus_of(raw_at(p, raw, i / p.H, h) + p.bias[h]);
    v = fminf(fmaxf(v, p.low), p.high);
    dt[i] = v;
    a[i] = -expf(p.A_log[h]) * v;
}

static dt_problem problem_of(tensor raw, tensor bias, tensor A_log, double low, double high) {
    return {raw.dim[0] * raw.dim[1], raw.dim[1], raw.dim[2], raw.stride[0], raw.stride[1], data_of<float>(bias),
            data_of<float>(A_log), (float)low, (float)high};
}

extern "C" void cuda_ssd_dt_forward(struct device *dev, tensor dt, tensor a, tensor raw, tensor bias, tensor A_log,
                                    double dt_min, double dt_max) {
    dt_problem p = problem_of(raw, bias, A_log, dt_min, dt_max);
    with_type(raw.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, dt_forward_kernel<T>, (unsigned)ceil_div(p.R * p.H, 256), 256, 0, data_of<float>(dt),
               data_of<float>(a), data_of<T>(raw), p);
    });
}

/* partial: for every block of TOKENS tokens (2, H), the sums of draw and of A da dt. */
template <class T>
__global__ void dt_backward_kernel(T *draw, int64_t draw_row, int64_t draw_step, float *partial, const float *ddt,
                                   const float *da, const T *raw, dt_problem p) {
    __shared__ float sums[2][ROWS][HEADS];
    int64_t h = blockIdx.x * (int64_t)HEADS + threadIdx.x, first = blockIdx.y * (int64_t)TOKENS;
    float of_raw = 0, of_rate = 0;
    if (h < p.H) {
        float rate = -expf(p.A_log[h]);
        for (int64_t r = first + threadIdx.y; r < first + TOKENS && r < p.R; r += ROWS) {
            float v = raw_at(p, raw, r, h) + p.bias[h], dt = softplus_of(v), towards = da[r * p.H + h];
            bool clamped = dt < p.low || dt > p.high;
            float d = clamped ? 0.0f : (ddt[r * p.H + h] + rate * towards) * softplus_slope(v);
            draw[r / p.T * draw_row + r % p.T * draw_step + h] = from_float<T>(d);
            of_raw += d;
            of_rate += rate * fminf(fmaxf(dt, p.low), p.high) * towards;
        }
    }
    sums[0][threadIdx.y][threadIdx.x] = of_raw;
    sums[1][threadIdx.y][threadIdx.x] = of_rate;
    __syncthreads();
    if (threadIdx.y >= 2 || h >= p.H) return;
    float sum = 0;
    for (int i = 0; i < ROWS; i++) sum += sums[threadIdx.y][i][threadIdx.x];
    partial[(blockIdx.y * 2 + threadIdx.y) * p.H + h] = sum;
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
    dim3 grid((unsigned)ceil_div(p.H, HEADS), (unsigned)blocks);
    with_type(raw.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, dt_backward_kernel<T>, grid, dim3(HEADS, ROWS), 0, data_of<T>(draw), draw.stride[0], draw.stride[1],
               partial, data_of<float>(ddt), data_of<float>(da), data_of<T>(raw), p);
    });
    struct sum_parts parts = {2, {{data_of<float>(dbias), 1}, {data_of<float>(dA_log), 1}}};
    cuda_add_partial_parts(dev, parts, partial, blocks, p.H);
}
