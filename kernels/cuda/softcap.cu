/* softcap.cu: the soft cap of gates and of logits.
 *
 *   y = cap tanh((x + bias) / cap), or x + bias where cap is 0
 *   dx = dy (1 - (y / cap)^2), or dy;   dbias += sum over rows of dx, before dx is rounded
 *
 * Forward a thread takes one element. Backward a block takes ROWS rows of up to WARP columns: with fewer columns (the
 * gates of a layer are 2 per head) a row has the power of two threads that holds them, and neighbours take neighbouring
 * rows. Its threads' sums are added in a tree, the blocks' in order by cuda_add_partials: the bits are always the same.
 * Bytes: 8 R N forward, 8 R N and those of dx backward. R 32,768, N 8: 2 MB, under 1 us; so what a pass takes is its
 * launches, one forward and two backward, of 2 to 4 us each.
 */
#include "kernels/cuda/launch.cuh"

enum { THREADS = 256, ROWS = 256 };

__global__ void __launch_bounds__(THREADS)
softcap_forward_kernel(float *y, const float *x, const float *bias, int64_t count, int64_t N, int64_t y_step,
                       int64_t x_step, float cap, float inverse) {
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, r = at / N, i = at % N;
    if (at >= count) return;
    float v = x[r * x_step + i];
    if (bias) v += bias[i];
    y[r * y_step + i] = cap > 0.0f ? cap * tanhf(v * inverse) : v;
}

extern "C" void cuda_softcap_forward(struct device *dev, tensor y, tensor x, tensor bias, double cap) {
    int64_t R = y.dim[0], N = y.dim[1];
    ASSERT(tensor_is(x, 2, R, N) && (!tensor_given(bias) || tensor_is(bias, 1, N)) && cap >= 0);
    LAUNCH(dev, softcap_forward_kernel, (unsigned)ceil_div(R * N, THREADS), THREADS, 0, data_of<float>(y),
           data_of<float>(x), data_of<float>(bias), R * N, N, y.stride[0], x.stride[0], (float)cap,
           cap > 0 ? (float)(1 / cap) : 0.0f);
}

/* partial (blocks of rows, N): sums of dx, unless NULL. `columns`: threads that take one row. */
template <class T>
__global__ void __launch_bounds__(THREADS)
softcap_backward_kernel(T *dx, float *partial, const float *dy, const float *y, int64_t R, int64_t N, int64_t dx_step,
                        int64_t dy_step, int64_t y_step, float inverse, int columns) {
    __shared__ float room[THREADS];
    int64_t i = (int64_t)blockIdx.y * columns + threadIdx.x % columns;
    int64_t end = min(R, ((int64_t)blockIdx.x + 1) * ROWS);
    float sum = 0;
    for (int64_t r = (int64_t)blockIdx.x * ROWS + threadIdx.x / columns; i < N && r < end; r += THREADS / columns) {
        float part = y[r * y_step + i] * inverse, d = dy[r * dy_step + i] * (1.0f - part * part);
        dx[r * dx_step + i] = from_float<T>(d);
        sum += d;
    }
    if (!partial) return;
    room[threadIdx.x] = sum;
    for (int half = THREADS / 2; half >= columns; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
    }
    if ((int)threadIdx.x < columns && i < N) partial[blockIdx.x * N + i] = room[threadIdx.x];
}

extern "C" size_t cuda_softcap_backward_scratch(int64_t R, int64_t N) {
    return (size_t)(ceil_div(R, ROWS) * N) * sizeof(float);
}

extern "C" void cuda_softcap_backward(struct device *dev, tensor dx, tensor dbias, tensor dy, tensor y, double cap,
                                      void *scratch) {
    int64_t R = dy.dim[0], N = dy.dim[1], blocks = ceil_div(R, ROWS);
    ASSERT(tensor_is(dx, 2, R, N) && tensor_is(y, 2, R, N) && (!tensor_given(dbias) || tensor_is(dbias, 1, N)));
    int columns = 1;
    while (columns < WARP && columns < N) columns *= 2;
    float *partial = tensor_given(dbias) ? (float *)scratch : NULL;
    with_type(dx.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, softcap_backward_kernel<T>, dim3((unsigned)blocks, (unsigned)ceil_div(N, columns)), THREADS, 0,
               data_of<T>(dx), partial, data_of<float>(dy), data_of<float>(y), R, N, dx.stride[0], dy.stride[0],
               y.stride[0], cap > 0 ? (float)(1 / cap) : 0.0f, columns);
    });
    if (partial) cuda_add_partials(dev, data_of<float>(dbias), partial, blocks, N);
}
