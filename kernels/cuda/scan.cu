/* scan.cu: the selective scan of Mamba (arXiv 2312.00752) with step size, skip and gate: forward and one step; backward
 * is scan_backward.cu.
 *
 *   delta = softplus(raw + bias);  A = -exp(A_log);  per channel i and state n
 *   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] b[t,n] x[t];   y[t] = sum_n c[t,n] h[t,n] + d x[t];   g = y silu(z)
 *
 * A thread owns one channel and keeps GROUP = 16 states in registers, so 16 independent recurrences hide each other's
 * latency; neighbouring threads are neighbouring channels, so x, raw, z and g are read and written in rows of the (B,T,D)
 * layout that the projections use. b and c of a piece of PIECE tokens lie in shared memory and are read by all threads of
 * the block at once. More than 16 states are walked in groups of 16, and y is kept in scratch between them.
 *
 * Time is cut into segments when there are too few channels to fill the chip (small B, long T): every segment but the
 * last is first run from a zero state for what it adds to its final state, a short pass carries the states over the
 * segments, and then all segments run at once from their entering states. That costs a second set of exponentials. The
 * cut depends on the shape only.
 *
 * saved: the states that enter each piece of SCAN_PIECE tokens, (B, ceil(T/SCAN_PIECE), N, D) fp32.
 *
 * Account, B 8, T 2048, D 4096, N 16, bf16: 1.07e9 exponentials at 3.7e12/s are 0.29 ms, about 6.4e9 multiply-adds
 * 0.2 ms beside them, 4 x 134 MB 0.13 ms: bound by exponentials, floor 0.3 ms.
 */
#include "kernels/cuda/scan.cuh"

/* --- the problem -------------------------------------------------------------------------------------------------- */

scan_problem scan_problem_of(tensor g, tensor x, tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d,
                             tensor z, tensor initial, tensor doc) {
    scan_problem p = {};
    p.B = x.dim[0], p.T = x.dim[1], p.D = x.dim[2], p.N = b.dim[2];
    ASSERT(tensor_is(g, 3, p.B, p.T, p.D) && tensor_is(raw, 3, p.B, p.T, p.D) && tensor_is(c, 3, p.B, p.T, p.N));
    ASSERT(tensor_is(A_log, 2, p.D, p.N) && tensor_is(bias, 1, p.D) && x.dtype == b.dtype && x.dtype == raw.dtype);
    p.g_row = g.stride[0], p.g_step = g.stride[1];
    p.x_row = x.stride[0], p.x_step = x.stride[1];
    p.raw_row = raw.stride[0], p.raw_step = raw.stride[1];
    p.z_row = z.stride[0], p.z_step = z.stride[1];
    p.b_row = b.stride[0], p.b_step = b.stride[1];
    p.c_row = c.stride[0], p.c_step = c.stride[1];
    p.bias = data_of<float>(bias), p.A_log = data_of<float>(A_log), p.d = data_of<float>(d);
    p.initial = data_of<float>(initial), p.doc = data_of<int32_t>(doc);
    struct scan_shape shape = {p.B, p.T, p.D, p.N};
    p.pieces = scan_pieces(shape);
    p.per_segment = scan_pieces_per_segment(shape);
    p.segments = ceil_div(p.pieces, p.per_segment);
    return p;
}

/* The states that enter the pieces, then for groups of states beyond the first the sums y (B,T,D), then what a segment
 * adds to its final state and by how much it lets the entering one decay, (B, segments, N, D) each. */
extern "C" size_t cuda_scan_saved(struct scan_shape s) {
    return (size_t)(s.B * scan_pieces(s) * s.N * s.D) * sizeof(float);
}

static size_t sums_size(struct scan_shape s) {
    return s.N > SCAN_GROUP ? (size_t)(s.B * s.T * s.D) * sizeof(float) : 0;
}

static size_t carry_size(struct scan_shape s) {
    int64_t segments = ceil_div(scan_pieces(s), scan_pieces_per_segment(s));
    return segments > 1 ? (size_t)(s.B * segments * s.N * s.D) * sizeof(float) : 0;
}

extern "C" size_t cuda_scan_forward_scratch(struct scan_shape s) {
    return sums_size(s) + 2 * carry_size(s);
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

enum { THREADS = 128, PIECE = SCAN_PIECE, GROUP = SCAN_GROUP };

/* b (and c) of a piece: shared[t * GROUP + n], 0 beyond the last state. */
template <class T>
__device__ void load_piece(float *shared, const T *from, int64_t row, int64_t step, const scan_problem &p, int64_t b,
                           int64_t t0, int count, int n0) {
    for (int i = threadIdx.x; i < count * GROUP; i += blockDim.x) {
        int t = i / GROUP, n = n0 + i % GROUP;
        shared[i] = n < p.N ? to_float(from[b * row + (t0 + t) * step + n]) : 0.0f;
    }
}

/* One token of one channel: all states of the group. Returns their sum with c. */
__device__ __forceinline__ float advance(float (&h)[GROUP], const float (&rate)[GROUP], float delta, float x,
                                         const float *b, const float *c) {
    float inflow = delta * x, y = 0;
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
        h[n] = power_of_two(delta * rate[n]) * h[n] + inflow * b[n];
        y += c[n] * h[n];
    }
    return y;
}

/* Segment blockIdx.y of batch row blockIdx.z, states n0 .. n0+GROUP-1. TOTALS: only what the segment adds to its final
 * state and the sum of its delta, for scan_carry_kernel; otherwise the outputs, from the segment's entering state. */
template <class T, bool TOTALS>
__global__ void __launch_bounds__(THREADS)
scan_forward_kernel(T *g, float *final, float *saved, float *sums, float *adds, float *decays, const float *entering,
                    const T *x, const T *raw, const T *b, const T *c, const T *z, scan_problem p, int n0) {
    __shared__ float bs[PIECE * GROUP], cs[PIECE * GROUP];
    int64_t row = blockIdx.z, segment = blockIdx.y, i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    bool inside = i < p.D;
    float rate[GROUP], h[GROUP], bias = inside ? p.bias[i] : 0, skip = inside && p.d ? p.d[i] : 0, total = 0;
    const float *start = TOTALS ? NULL : entering;
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
        bool real_state = inside && n0 + n < p.N;
        rate[n] = real_state ? -LOG2E * expf(p.A_log[i * p.N + n0 + n]) : 0;
        h[n] = real_state && start ? start[((row * p.segments + segment) * p.N + n0 + n) * p.D + i] : 0;
        if (real_state && !TOTALS && !start && p.initial) h[n] = p.initial[(row * p.D + i) * p.N + n0 + n];
    }
    int64_t first = segment * p.per_segment, last = first + p.per_segment < p.pieces ? first + p.per_segment : p.pieces;
    bool reset = false; /* a document has started in the segment: the entering state reaches nothing behind it */
    for (int64_t piece = first; piece < last; piece++) {
        int64_t t0 = piece * PIECE;
        int count = (int)(t0 + PIECE < p.T ? PIECE : p.T - t0);
        __syncthreads();
        load_piece(bs, b, p.b_row, p.b_step, p, row, t0, count, n0);
        if (!TOTALS) load_piece(cs, c, p.c_row, p.c_step, p, row, t0, count, n0);
        __syncthreads();
        if (!inside) continue;
        if (!TOTALS && saved)
#pragma unroll
            for (int n = 0; n < GROUP; n++)
                if (n0 + n < p.N) saved[((row * p.pieces + piece) * p.N + n0 + n) * p.D + i] = h[n];
        for (int t = 0; t < count; t++) {
            int64_t now = t0 + t;
            float in = to_float(x[row * p.x_row + now * p.x_step + i]);
            float delta = softplus_of(to_float(raw[row * p.raw_row + now * p.raw_step + i]) + bias);
            if (scan_starts(p, row, now)) {
                reset = true;
#pragma unroll
                for (int n = 0; n < GROUP; n++) h[n] = 0;
            }
            float y = advance(h, rate, delta, in, bs + t * GROUP, cs + t * GROUP);
            if (TOTALS) {
                total += delta;
                continue;
            }
            int64_t at = (row * p.T + now) * p.D + i;
            if (n0 > 0) y += sums[at];
            if (n0 + GROUP < p.N) {
                sums[at] = y;
                continue;
            }
            y += skip * in;
            if (z) y *= silu_of(to_float(z[row * p.z_row + now * p.z_step + i]));
            g[row * p.g_row + now * p.g_step + i] = from_float<T>(y);
        }
    }
    if (!inside) return;
#pragma unroll
    for (int n = 0; n < GROUP; n++) {
        if (n0 + n >= p.N) continue;
        int64_t at = ((row * p.segments + segment) * p.N + n0 + n) * p.D + i;
        if (TOTALS) {
            adds[at] = h[n];
            decays[at] = reset ? 0.0f : power_of_two(total * rate[n]);
        } else if (final && last == p.pieces) {
            final[(row * p.D + i) * p.N + n0 + n] = h[n];
        }
    }
}

/* From what the segments add to the states that enter them, in place of the sums; a thread a channel and state. */
__global__ void scan_carry_kernel(float *adds, const float *decays, scan_problem p) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y, row = blockIdx.z;
    if (i >= p.D) return;
    float h = p.initial ? p.initial[(row * p.D + i) * p.N + n] : 0;
    for (int64_t segment = 0; segment < p.segments; segment++) {
        int64_t at = ((row * p.segments + segment) * p.N + n) * p.D + i;
        float add = adds[at], decay = decays[at];
        adds[at] = h;
        h = decay * h + add;
    }
}

extern "C" void cuda_scan_forward(struct device *dev, tensor g, tensor final, void *saved, tensor x, tensor raw,
                                  tensor bias, tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial,
                                  tensor doc, void *scratch) {
    scan_problem p = scan_problem_of(g, x, raw, bias, A_log, b, c, d, z, initial, doc);
    struct scan_shape shape = {p.B, p.T, p.D, p.N};
    float *sums = (float *)scratch, *adds = (float *)((char *)scratch + sums_size(shape));
    float *decays = (float *)((char *)adds + carry_size(shape)), *none = NULL;
    bool cut = p.segments > 1;
    dim3 grid((unsigned)ceil_div(p.D, THREADS), (unsigned)p.segments, (unsigned)p.B);
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        for (int n0 = 0; cut && n0 < p.N; n0 += GROUP)
            LAUNCH(dev, (scan_forward_kernel<T, true>), grid, THREADS, 0, data_of<T>(g), none, none, none, adds, decays,
                   none, data_of<T>(x), data_of<T>(raw), data_of<T>(b), data_of<T>(c), data_of<T>(z), p, n0);
        if (cut)
            LAUNCH(dev, scan_carry_kernel, dim3((unsigned)ceil_div(p.D, 128), (unsigned)p.N, (unsigned)p.B), 128, 0,
                   adds, decays, p);
        for (int n0 = 0; n0 < p.N; n0 += GROUP)
            LAUNCH(dev, (scan_forward_kernel<T, false>), grid, THREADS, 0, data_of<T>(g), data_of<float>(final),
                   (float *)saved, sums, none, none, cut ? adds : none, data_of<T>(x), data_of<T>(raw), data_of<T>(b),
                   data_of<T>(c), data_of<T>(z), p, n0);
    });
}

/* --- one token: a thread a channel -------------------------------------------------------------------------------- */

struct step_strides {
    int64_t g, x, raw, b, c, z;
};

template <class T>
__global__ void scan_step_kernel(T *g, float *state, const T *x, const T *raw, const float *bias, const float *A_log,
                                 const T *b, const T *c, const float *d, const T *z, int64_t D, int64_t N,
                                 step_strides s) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (i >= D) return;
    float in = to_float(x[row * s.x + i]), delta = softplus_of(to_float(raw[row * s.raw + i]) + bias[i]);
    float *h = state + (row * D + i) * N, y = d ? d[i] * in : 0;
    for (int64_t n = 0; n < N; n++) {
        h[n] = power_of_two(-LOG2E * delta * expf(A_log[i * N + n])) * h[n] + delta * in * to_float(b[row * s.b + n]);
        y += to_float(c[row * s.c + n]) * h[n];
    }
    if (z) y *= silu_of(to_float(z[row * s.z + i]));
    g[row * s.g + i] = from_float<T>(y);
}

extern "C" void cuda_scan_step(struct device *dev, tensor g, tensor state, tensor x, tensor raw, tensor bias,
                               tensor A_log, tensor b, tensor c, tensor d, tensor z) {
    int64_t B = x.dim[0], D = x.dim[1], N = b.dim[1];
    ASSERT(tensor_is(state, 3, B, D, N) && tensor_is(g, 2, B, D) && tensor_is(c, 2, B, N));
    step_strides s = {g.stride[0], x.stride[0], raw.stride[0], b.stride[0], c.stride[0], z.stride[0]};
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, scan_step_kernel<T>, dim3((unsigned)ceil_div(D, 128), (unsigned)B), 128, 0, data_of<T>(g),
               data_of<float>(state), data_of<T>(x), data_of<T>(raw), data_of<float>(bias), data_of<float>(A_log),
               data_of<T>(b), data_of<T>(c), data_of<float>(d), data_of<T>(z), D, N, s);
    });
}
