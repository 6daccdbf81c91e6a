/* swiglu.cu: h = silu(gate) * up on gate_up = [gate | up], and its backward. Elementwise, one thread four neighbours.
 * Bytes: forward 3eRF, backward 5eRF, e bytes an activation; bound by bandwidth. */
#include "kernels/cuda/launch.cuh"

enum { THREADS = 256 };

template <class T, int V> __global__ void swiglu_forward_kernel(T *h, const T *gate_up, int64_t R, int64_t F) {
    int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V, r = at / F, i = at % F;
    if (at >= R * F) return;
    float gate[V], up[V];
    load_floats<V>(gate, gate_up + r * 2 * F + i);
    load_floats<V>(up, gate_up + r * 2 * F + F + i);
#pragma unroll
    for (int j = 0; j < V; j++) up[j] *= silu_of(gate[j]);
    store_floats<V>(h + at, up);
}

template <class T, int V>
__global__ void swiglu_backward_kernel(T *dgate_up, const T *dh, const T *gate_up, int64_t R, int64_t F) {
    int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V, r = at / F, i = at % F;
    if (at >= R * F) return;
    float gate[V], up[V], d[V], to_gate[V];
    load_floats<V>(gate, gate_up + r * 2 * F + i);
    load_floats<V>(up, gate_up + r * 2 * F + F + i);
    load_floats<V>(d, dh + at);
#pragma unroll
    for (int j = 0; j < V; j++) {
        to_gate[j] = d[j] * up[j] * silu_slope(gate[j]);
        d[j] *= silu_of(gate[j]);
    }
    store_floats<V>(dgate_up + r * 2 * F + i, to_gate);
    store_floats<V>(dgate_up + r * 2 * F + F + i, d);
}

/* Four elements never cross a row where F is a multiple of four. */
static bool wide(tensor h, tensor gate_up) {
    return vectors_fit(h, 4) && vectors_fit(gate_up, 4) && h.dim[1] % 4 == 0;
}

static unsigned blocks(tensor h, int V) {
    return (unsigned)ceil_div(tensor_count(h), (int64_t)THREADS * V);
}

extern "C" void cuda_swiglu_forward(struct device *dev, tensor h, tensor gate_up) {
    int64_t R = h.dim[0], F = h.dim[1];
    ASSERT(tensor_is(gate_up, 2, R, 2 * F) && gate_up.dtype == h.dtype);
    with_type(h.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_width(wide(h, gate_up), [&](auto width) {
            constexpr int V = width.value;
            LAUNCH(dev, (swiglu_forward_kernel<T, V>), blocks(h, V), THREADS, 0, data_of<T>(h), data_of<T>(gate_up), R,
                   F);
        });
    });
}

extern "C" void cuda_swiglu_backward(struct device *dev, tensor dgate_up, tensor dh, tensor gate_up) {
    int64_t R = dh.dim[0], F = dh.dim[1];
    ASSERT(tensor_is(gate_up, 2, R, 2 * F) && tensor_is(dgate_up, 2, R, 2 * F) && gate_up.dtype == dh.dtype);
    with_type(dh.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_width(wide(dh, gate_up) && wide(dh, dgate_up), [&](auto width) {
            constexpr int V = width.value;
            LAUNCH(dev, (swiglu_backward_kernel<T, V>), blocks(dh, V), THREADS, 0, data_of<T>(dgate_up),
                   data_of<T>(dh), data_of<T>(gate_up), R, F);
        });
    });
}
