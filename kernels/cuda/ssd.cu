/* ssd.cu: SSD, the sequence operation of Mamba-2 (arXiv 2405.21060), on the GPU: forward and one step.
 *
 *   S[t] = exp(a[t]) S[t-1] + dt[t] x[t] (outer) b[t];   y[t] = S[t] c[t] + d x[t]
 *
 * Activations in bf16 with heads and states of the usual sizes go to ssd_chunk_forward.cu. What is here is the recurrence
 * itself on the ordinary cores, in fp32 whatever the activations are: a block holds SSD_HEAD rows
 * of one head's state in registers (a warp eight rows, a lane every 32nd column) and walks the tokens, which it takes
 * into shared memory SSD_STAGE at a time. y is a sum over columns: nine shuffles turn a warp's eight rows of partial sums
 * into eight sums. More than SSD_STATES_MAX columns are walked in groups, with y in scratch between them.
 *
 * Time is cut into segments where heads and batch rows don't fill the chip, as in scan.cu: segments are first run from
 * zero for what they add, the states are carried over them, then all run at once.
 *
 * saved: the states that enter each piece of SSD_PIECE tokens, (B, pieces, H, P, N) fp32.
 *
 * Account, B 8, T 2048, H 64, P 64, N 128, bf16: about 110 instructions a warp and token, 8.4 M warp-tokens a batch of
 * eight rows: 0.9e9 instructions at 4 x 132 a clock are 1.0 ms; bytes 0.1 ms. The products on tensor cores (chunks)
 * have their floor at 0.13 ms; this kernel is the one that is right for every shape and in fp32.
 */
#include "kernels/cuda/ssd_chunk.cuh"

ssd_problem ssd_problem_of(tensor y, tensor x, tensor dt, tensor a, tensor b, tensor c, tensor d, tensor initial,
                           tensor doc) {
    ssd_problem p = {};
    p.B = x.dim[0], p.T = x.dim[1], p.H = x.dim[2], p.P = x.dim[3], p.G = b.dim[2], p.N = b.dim[3];
    ASSERT(tensor_is(y, 4, p.B, p.T, p.H, p.P) && tensor_is(c, 4, p.B, p.T, p.G, p.N) && p.H % p.G == 0);
    ASSERT((x.stride[2] == p.P && y.stride[2] == p.P) || p.H == 1);
    ASSERT((b.stride[2] == p.N && c.stride[2] == p.N) || p.G == 1);
    ASSERT(tensor_is(dt, 3, p.B, p.T, p.H) && tensor_is(a, 3, p.B, p.T, p.H) && x.dtype == b.dtype);
    p.x_row = x.stride[0], p.x_step = x.stride[1], p.y_row = y.stride[0], p.y_step = y.stride[1];
    p.b_row = b.stride[0], p.b_step = b.stride[1], p.c_row = c.stride[0], p.c_step = c.stride[1];
    p.dt = data_of<float>(dt), p.a = data_of<float>(a), p.d = data_of<float>(d);
    p.initial = data_of<float>(initial), p.doc = data_of<int32_t>(doc);
    struct ssd_shape shape = {p.B, p.T, p.H, p.P, p.G, p.N, 0};
    p.blocks = ceil_div(p.P, SSD_HEAD);
    p.pieces = ssd_pieces(shape), p.per_segment = ssd_pieces_per_segment(shape), p.segments = ssd_segments(shape);
    return p;
}

extern "C" size_t cuda_ssd_saved_f32(struct ssd_shape s) {
    return (size_t)(s.B * ssd_pieces(s) * s.H * s.P * s.N) * sizeof(float);
}

/* In floats: y between groups of columns; what segments add; their decays. */
static int64_t sums_count(struct ssd_shape s) {
    return s.N > SSD_STATES_MAX ? s.B * s.T * s.H * s.P : 0;
}

static int64_t adds_count(struct ssd_shape s) {
    return ssd_segments(s) > 1 ? s.B * ssd_segments(s) * s.H * s.P * s.N : 0;
}

extern "C" size_t cuda_ssd_forward_scratch_f32(struct ssd_shape s) {
    return (size_t)(sums_count(s) + adds_count(s) + s.B * ssd_segments(s) * s.H) * sizeof(float);
}

extern "C" size_t cuda_ssd_saved_bf16(struct ssd_shape s) {
    return ssd_in_chunks(DTYPE_BF16, s) ? ssd_chunk_saved(s) : cuda_ssd_saved_f32(s);
}

extern "C" size_t cuda_ssd_forward_scratch_bf16(struct ssd_shape s) {
    return ssd_in_chunks(DTYPE_BF16, s) ? ssd_chunk_forward_scratch(s) : cuda_ssd_forward_scratch_f32(s);
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

struct forward_memory {
    float *final, *saved, *sums, *adds, *decays;
    const float *entering;
};

/* TOTALS: only what the segment adds to its final state, and its decay. */
template <class T, int NK, bool TOTALS>
__global__ void __launch_bounds__(SSD_WARPS *WARP)
ssd_forward_kernel(T *y, forward_memory m, const T *x, const T *b, const T *c, ssd_problem p, int n0) {
    DYNAMIC_SHARED(char, memory);
    ssd_stage<NK> &stage = *reinterpret_cast<ssd_stage<NK> *>(memory);
    ssd_place at = ssd_place_of(p);
    ssd_part<NK> state;
    int64_t size = p.P * p.N, of_segment = ((at.row * p.segments + at.segment) * p.H + at.head) * size;
    if (TOTALS) state.load(p, at, n0, NULL);
    else if (m.entering) state.load(p, at, n0, m.entering + of_segment);
    else state.load(p, at, n0, p.initial ? p.initial + (at.row * p.H + at.head) * size : NULL);
    float total = 1, skip = p.d ? p.d[at.head] : 0;
    int64_t first = at.segment * p.per_segment;
    int64_t last = first + p.per_segment < p.pieces ? first + p.per_segment : p.pieces;
    bool final_group = n0 + SSD_STATES_MAX >= p.N;
    for (int64_t t0 = first * SSD_PIECE; t0 < last * SSD_PIECE && t0 < p.T; t0 += SSD_STAGE) {
        if (!TOTALS && m.saved && t0 % SSD_PIECE == 0)
            state.store(p, at, n0, m.saved + ((at.row * p.pieces + t0 / SSD_PIECE) * p.H + at.head) * size);
        __syncthreads();
        ssd_fill<T>(stage, p, at, n0, t0, x, NULL, b, TOTALS ? NULL : c);
        __syncthreads();
        for (int t = 0; t < SSD_STAGE; t++) {
            float keep = stage.decay[t], dt = stage.dt[t], sums[SSD_ROWS] = {};
            total *= keep;
#pragma unroll
            for (int r = 0; r < SSD_ROWS; r++) {
                float inflow = dt * stage.x[t][at.warp * SSD_ROWS + r];
#pragma unroll
                for (int k = 0; k < NK; k++) {
                    state.s[r][k] = keep * state.s[r][k] + inflow * stage.b[t][at.lane + WARP * k];
                    if (!TOTALS) sums[r] += state.s[r][k] * stage.c[t][at.lane + WARP * k];
                }
            }
            if (TOTALS) continue;
            int r = at.lane / 4 % SSD_ROWS;
            float sum = ssd_row_sums(sums, at.lane);
            int64_t now = t0 + t, i = at.p0 + at.warp * SSD_ROWS + r;
            if (at.lane % 4 != 0 || now >= p.T || i >= p.P) continue;
            int64_t between = ((at.row * p.T + now) * p.H + at.head) * p.P + i;
            if (n0 > 0) sum += m.sums[between];
            if (final_group)
                y[at.row * p.y_row + now * p.y_step + at.head * p.P + i] =
                    from_float<T>(sum + skip * stage.x[t][at.warp * SSD_ROWS + r]);
            else m.sums[between] = sum;
        }
    }
    if (TOTALS) {
        state.store(p, at, n0, m.adds + of_segment);
        if (threadIdx.x == 0) m.decays[(at.row * p.segments + at.segment) * p.H + at.head] = total;
    } else if (m.final && last == p.pieces) {
        state.store(p, at, n0, m.final + (at.row * p.H + at.head) * size);
    }
}

__global__ void ssd_carry_kernel(float *adds, const float *decays, const float *edge, ssd_problem p, bool from_right) {
    int64_t size = p.P * p.N, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, row = blockIdx.z;
    if (i >= size) return;
    float state = edge ? edge[(row * p.H + head) * size + i] : 0;
    for (int64_t k = 0; k < p.segments; k++) {
        int64_t at = (row * p.segments + (from_right ? p.segments - 1 - k : k)) * p.H + head;
        float add = adds[at * size + i];
        adds[at * size + i] = state;
        state = decays[at] * state + add;
    }
}

void ssd_carry(struct device *dev, float *adds, const float *decays, const float *edge, const ssd_problem &p,
               bool from_right) {
    LAUNCH(dev, ssd_carry_kernel, dim3((unsigned)ceil_div(p.P * p.N, 256), (unsigned)p.H, (unsigned)p.B), 256, 0, adds,
           decays, edge, p, from_right);
}

template <class T, int NK, bool TOTALS>
static void launch_forward(struct device *dev, T *y, const forward_memory &m, tensor x, tensor b, tensor c,
                           const ssd_problem &p) {
    dim3 grid((unsigned)(p.H * p.blocks), (unsigned)p.segments, (unsigned)p.B);
    cuda_expect(dev, cudaFuncSetAttribute(ssd_forward_kernel<T, NK, TOTALS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          (int)sizeof(ssd_stage<NK>)), "ssd_forward");
    for (int n0 = 0; n0 < p.N; n0 += SSD_STATES_MAX)
        LAUNCH(dev, (ssd_forward_kernel<T, NK, TOTALS>), grid, SSD_WARPS * WARP, sizeof(ssd_stage<NK>), y, m,
               data_of<T>(x), data_of<T>(b), data_of<T>(c), p, n0);
}

extern "C" void cuda_ssd_forward(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor dt, tensor a,
                                 tensor b, tensor c, tensor d, tensor initial, tensor doc, int64_t chunk,
                                 void *scratch) {
    if (ssd_in_chunks(x.dtype, {x.dim[0], x.dim[1], x.dim[2], x.dim[3], b.dim[2], b.dim[3], chunk})) {
        ssd_chunk_forward(dev, y, final, saved, x, dt, a, b, c, d, initial, doc, chunk, scratch);
        return;
    }
    ssd_problem p = ssd_problem_of(y, x, dt, a, b, c, d, initial, doc);
    struct ssd_shape shape = {p.B, p.T, p.H, p.P, p.G, p.N, 0};
    float *sums = (float *)scratch, *adds = sums + sums_count(shape), *decays = adds + adds_count(shape);
    bool cut = p.segments > 1;
    forward_memory m = {data_of<float>(final), (float *)saved, sums, adds, decays, cut ? adds : NULL};
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        ssd_with_columns(p.N, [&](auto columns) {
            if (cut) {
                launch_forward<T, columns.value, true>(dev, data_of<T>(y), m, x, b, c, p);
                ssd_carry(dev, adds, decays, p.initial, p, false);
            }
            launch_forward<T, columns.value, false>(dev, data_of<T>(y), m, x, b, c, p);
        });
    });
}

/* --- one token: a warp a row of the state -------------------------------------------------------------------------- */

struct step_strides {
    int64_t y, x, b, c;
};

template <class T>
__global__ void ssd_step_kernel(T *y, float *state, const T *x, const float *dt, const float *a, const T *b, const T *c,
                                const float *d, int64_t H, int64_t P, int64_t G, int64_t N, step_strides s) {
    int64_t i = (int64_t)blockIdx.x * SSD_WARPS + threadIdx.x / WARP, head = blockIdx.y, row = blockIdx.z;
    int lane = threadIdx.x % WARP;
    if (i >= P) return;
    int64_t group = head / (H / G), scalar = row * H + head;
    float in = to_float(x[row * s.x + head * P + i]), keep = __expf(fminf(a[scalar], 0.0f)), inflow = dt[scalar] * in;
    float *line = state + (scalar * P + i) * N, sum = 0;
    for (int64_t n = lane; n < N; n += WARP) {
        float v = keep * line[n] + inflow * to_float(b[row * s.b + group * N + n]);
        line[n] = v;
        sum += v * to_float(c[row * s.c + group * N + n]);
    }
    sum = warp_sum(sum);
    if (lane == 0) y[row * s.y + head * P + i] = from_float<T>(sum + (d ? d[head] * in : 0));
}

extern "C" void cuda_ssd_step(struct device *dev, tensor y, tensor state, tensor x, tensor dt, tensor a, tensor b,
                              tensor c, tensor d) {
    int64_t B = x.dim[0], H = x.dim[1], P = x.dim[2], G = b.dim[1], N = b.dim[2];
    ASSERT(tensor_is(state, 4, B, H, P, N) && tensor_is(y, 3, B, H, P) && H % G == 0);
    step_strides s = {y.stride[0], x.stride[0], b.stride[0], c.stride[0]};
    dim3 grid((unsigned)ceil_div(P, SSD_WARPS), (unsigned)H, (unsigned)B);
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, ssd_step_kernel<T>, grid, SSD_WARPS * WARP, 0, data_of<T>(y), data_of<float>(state), data_of<T>(x),
               data_of<float>(dt), data_of<float>(a), data_of<T>(b), data_of<T>(c), data_of<float>(d), H, P, G, N, s);
    });
}
