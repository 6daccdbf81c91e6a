/* slstm.cu: the sLSTM (arXiv 2405.04517, section 2.2) on the GPU: the operation, and its plain way through the tokens.
 *
 *   raw_g[t] = x_g[t] + bias_g + r_g y[t-1];   state c, n, m and y by the gates (kernels/ops.h)
 *
 * The cell is a chain: token t needs all units of its head at token t - 1. Where clusters of blocks exist and bf16
 * heads of up to 512 units fit them, one kernel walks all tokens with r on the chip (slstm_cluster.cu). What is here is
 * right for every shape, in fp32, and on chips from sm_80 on: a launch a token, with r read from the L2 cache.
 *
 * Forward, for a token: a warp has one unit and PLAIN_ROWS batch rows; its lanes share the sum over k, the shuffles
 * that add them up give every lane all 4 x PLAIN_ROWS sums, and a lane for each row does the rest. Backward, for a
 * token: a block has 32 units k and PLAIN_ROWS rows; its warps share the sum over the 4 P gates j of r[j,k] draw[j],
 * which are added up in shared memory; then a warp has a row. States, y and draw pass from launch to launch in fp32 in
 * scratch, y and draw in two places in turns.
 *
 * The gradient of r is a product over all tokens afterwards, of dx and the y before, which is copied to its place first
 * (zeros where documents start); that of bias a sum of dx.
 *
 * Account, B 16, D 4 x 192: a launch is about 2 us on the GPU of which 1 us work: reads of r, 16/4 x 1.2 MB from L2,
 * and 2 x 9.4 M multiply-adds: T launches for each direction. Besides, 19 GFLOP for dr: 0.05 ms.
 *
 * Every sum is in an order that the shape alone fixes.
 */
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/slstm.cuh"

enum {
    PLAIN_ROWS = 4,  /* batch rows of a block */
    PLAIN_WARPS = 8, /* of a block; forward: as many units */
    PLAIN_UNITS = WARP, /* backward: units of a block */
};

/* --- sizes -------------------------------------------------------------------------------------------------------- */

/* Scratch, in floats; the pieces' sizes go up with B and T. */
struct scratch {
    float *y[2], *c, *n, *m;   /* forward: (B,D) */
    float *draw[2], *dc, *dn;  /* backward: draw (B,4,D), the others (B,D) */
    float *partials;           /* of dbias, rows of 4 D */
    float *pieces;             /* of dr, (pieces_of_dr, H,4P,P) */
    void *before;              /* (B,T,D) act: y[t-1] */
};

static size_t carve_forward(struct scratch *s, struct slstm_shape d, void *at) {
    int64_t BD = d.B * d.H * d.P;
    float *base = (float *)at;
    *s = {};
    s->y[0] = base, s->y[1] = base + BD, s->c = base + 2 * BD, s->n = base + 3 * BD, s->m = base + 4 * BD;
    return (size_t)(5 * BD) * sizeof(float);
}

/* The sums of dr run over all tokens of all rows, and its matrices are few: so the tokens are cut into up to so many
 * pieces, whose products run at once and are added up. Enough to fill a chip with tiles of 128 x 128. */
static int64_t pieces_of_dr(int64_t P, int64_t rows) {
    int64_t tiles = ceil_div(P, 128) * ceil_div(P, 128), pieces = 16;
    while (pieces > 1 && (pieces * tiles > 128 || rows / pieces < 256)) pieces /= 2;
    return pieces;
}

static size_t carve_backward(struct scratch *s, struct slstm_shape d, void *at) {
    int64_t D = d.H * d.P, BD = d.B * D;
    float *base = (float *)at;
    *s = {};
    s->draw[0] = base, s->draw[1] = base + 4 * BD, s->dc = base + 8 * BD, s->dn = base + 9 * BD;
    s->partials = base + 10 * BD;
    s->pieces = s->partials + slstm_cluster_partials(d) * 4 * D;
    int64_t pieces = pieces_of_dr(d.P, d.B * d.T);
    int64_t used = s->pieces - base + (pieces > 1 ? pieces * d.H * 4 * d.P * d.P : 0);
    used = ceil_div(used, 64) * 64;
    s->before = base + used;
    return (size_t)used * sizeof(float);
}

extern "C" size_t cuda_slstm_forward_scratch(struct slstm_shape d) {
    struct scratch s;
    return carve_forward(&s, d, NULL);
}

static size_t backward_scratch(struct slstm_shape d, size_t act) {
    struct scratch s;
    return carve_backward(&s, d, NULL) + (size_t)(d.B * d.T * d.H * d.P) * act;
}

extern "C" size_t cuda_slstm_backward_scratch_f32(struct slstm_shape d) {
    return backward_scratch(d, sizeof(float));
}

extern "C" size_t cuda_slstm_backward_scratch_bf16(struct slstm_shape d) {
    return backward_scratch(d, sizeof(__nv_bfloat16));
}

static size_t saved_size(struct slstm_shape d, size_t act) {
    return (size_t)(d.B * d.T * d.H * d.P) * (SLSTM_FACTORS * act + sizeof(float));
}

extern "C" size_t cuda_slstm_saved_f32(struct slstm_shape d) {
    return saved_size(d, sizeof(float));
}

extern "C" size_t cuda_slstm_saved_bf16(struct slstm_shape d) {
    return saved_size(d, sizeof(__nv_bfloat16));
}

/* --- forward, a token --------------------------------------------------------------------------------------------- */

/* The state between launches. */
struct plain_state {
    const float *before; /* y, (B,D) */
    float *after, *c, *n, *m, *final;
};

/* Of a warp's sums, those of row `lane`. */
__device__ __forceinline__ void pick_row(float (&raw)[SLSTM_GATES], const float (&sum)[PLAIN_ROWS][SLSTM_GATES],
                                         int lane) {
#pragma unroll
    for (int i = 0; i < PLAIN_ROWS; i++)
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++)
            if (lane == i) raw[g] = sum[i][g];
}

template <class T>
__global__ void slstm_token_kernel(slstm_problem p, int64_t t, T *y, const T *x, const T *r, plain_state s,
                                   slstm_saved<T> saved) {
    int lane = threadIdx.x % WARP;
    int64_t j = (int64_t)blockIdx.x * PLAIN_WARPS + threadIdx.x / WARP, h = blockIdx.y;
    int64_t b0 = (int64_t)blockIdx.z * PLAIN_ROWS;
    if (j >= p.P) return;
    float sum[PLAIN_ROWS][SLSTM_GATES] = {}, raw[SLSTM_GATES] = {};
    const T *of_unit = r + (h * SLSTM_GATES * p.P + j) * p.P;
    for (int64_t k = lane; k < p.P; k += WARP) {
        float weight[SLSTM_GATES];
        for (int g = 0; g < SLSTM_GATES; g++) weight[g] = to_float(of_unit[g * p.P * p.P + k]);
#pragma unroll
        for (int i = 0; i < PLAIN_ROWS; i++) {
            float v = b0 + i < p.B ? s.before[(b0 + i) * p.D + h * p.P + k] : 0.0f;
#pragma unroll
            for (int g = 0; g < SLSTM_GATES; g++) sum[i][g] += weight[g] * v;
        }
    }
#pragma unroll
    for (int i = 0; i < PLAIN_ROWS; i++)
#pragma unroll
        for (int g = 0; g < SLSTM_GATES; g++) sum[i][g] = warp_sum(sum[i][g]);
    int64_t b = b0 + lane, unit = h * p.P + j;
    if (lane >= PLAIN_ROWS || b >= p.B) return;
    pick_row(raw, sum, lane);
    int64_t place = b * p.D + unit;
    slstm_unit u = {s.c[place], s.n[place], s.m[place]};
    slstm_factors f;
    bool begins = slstm_begins(p, b, t);
    if (begins) u = {0, 0, 0};
    for (int g = 0; g < SLSTM_GATES; g++)
        raw[g] = to_float(x[b * p.x.row + t * p.x.step + g * p.D + unit]) + p.bias[g * p.D + unit] +
                 (begins ? 0.0f : raw[g]);
    float now = slstm_forward_unit<sizeof(T) == sizeof(float)>(u, raw, f);
    y[b * p.y.row + t * p.y.step + unit] = from_float<T>(now);
    s.after[place] = now, s.c[place] = u.c, s.n[place] = u.n, s.m[place] = u.m;
    if (saved.packs) saved.store((b * p.T + t) * p.D + unit, f);
    if (!s.final || t + 1 < p.T) return;
    s.final[slstm_place(p, b, SLSTM_Y, unit)] = now, s.final[slstm_place(p, b, SLSTM_C, unit)] = u.c;
    s.final[slstm_place(p, b, SLSTM_N, unit)] = u.n, s.final[slstm_place(p, b, SLSTM_M, unit)] = u.m;
}

/* One part of a state (B,4,D) to (B,D), or zeros. */
static void take_part(struct device *dev, float *to, const float *state, enum slstm_part part, const slstm_problem &p) {
    size_t row = (size_t)p.D * sizeof(float);
    cudaStream_t stream = cuda_impl(dev)->stream;
    if (state)
        cuda_expect(dev, cudaMemcpy2DAsync(to, row, state + part * p.D, SLSTM_PARTS * row, row, (size_t)p.B,
                                           cudaMemcpyDeviceToDevice, stream), "slstm");
    else cuda_expect(dev, cudaMemsetAsync(to, 0, (size_t)p.B * row, stream), "slstm");
}

static void plain_forward(struct device *dev, const slstm_problem &p, tensor y, tensor final, void *saved, tensor x,
                          tensor r, struct scratch s) {
    take_part(dev, s.y[0], p.initial, SLSTM_Y, p);
    take_part(dev, s.c, p.initial, SLSTM_C, p);
    take_part(dev, s.n, p.initial, SLSTM_N, p);
    take_part(dev, s.m, p.initial, SLSTM_M, p);
    dim3 grid((unsigned)ceil_div(p.P, PLAIN_WARPS), (unsigned)p.H, (unsigned)ceil_div(p.B, PLAIN_ROWS));
    with_type(x.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        for (int64_t t = 0; t < p.T; t++) {
            plain_state state = {s.y[t % 2], s.y[(t + 1) % 2], s.c, s.n, s.m, data_of<float>(final)};
            LAUNCH(dev, slstm_token_kernel<T>, grid, PLAIN_WARPS * WARP, 0, p, t, data_of<T>(y), data_of<T>(x),
                   data_of<T>(r), state, slstm_saved<T>(saved, p));
        }
    });
}

static slstm_problem problem_of(tensor x, tensor y, tensor r, tensor bias, tensor initial, tensor doc) {
    slstm_problem p = {};
    p.B = x.dim[0], p.T = x.dim[1], p.H = r.dim[0], p.P = r.dim[2], p.D = p.H * p.P;
    ASSERT(tensor_is(x, 3, p.B, p.T, SLSTM_GATES * p.D) && tensor_is(y, 3, p.B, p.T, p.D));
    ASSERT(tensor_is(r, 3, p.H, SLSTM_GATES * p.P, p.P) && tensor_contiguous(r) && r.dtype == x.dtype);
    ASSERT(tensor_is(bias, 2, (int64_t)SLSTM_GATES, p.D) && bias.dtype == DTYPE_F32 && y.dtype == x.dtype);
    p.x = {x.stride[0], x.stride[1]}, p.y = {y.stride[0], y.stride[1]};
    p.bias = data_of<float>(bias), p.initial = data_of<float>(initial), p.doc = data_of<int32_t>(doc);
    return p;
}

extern "C" void cuda_slstm_forward(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor r,
                                   tensor bias, tensor initial, tensor doc, void *scratch) {
    slstm_problem p = problem_of(x, y, r, bias, initial, doc);
    struct scratch s;
    carve_forward(&s, {p.B, p.T, p.H, p.P}, scratch);
    if (!slstm_cluster_forward(dev, p, y, final, saved, x, r)) plain_forward(dev, p, y, final, saved, x, r, s);
}

extern "C" void cuda_slstm_step(struct device *dev, tensor y, tensor state, tensor x, tensor r, tensor bias,
                                void *scratch) {
    int64_t B = x.dim[0];
    tensor token = tensor_split_first(x, B, 1), out = tensor_split_first(y, B, 1);
    slstm_problem p = problem_of(token, out, r, bias, state, tensor_none());
    struct scratch s;
    carve_forward(&s, {p.B, p.T, p.H, p.P}, scratch);
    plain_forward(dev, p, out, state, NULL, token, r, s);
}

/* --- backward, a token -------------------------------------------------------------------------------------------- */

struct plain_gradients {
    const float *after;          /* draw of the token after, (B,4,D) */
    float *draw, *dc, *dn;
    const float *dfinal;
    float *dinitial, clip;
};

/* What comes to y[t] of unit k of row b from beyond: through r, or the final state's gradient. `sum`: through r. */
__device__ __forceinline__ void enter(const slstm_problem &p, const plain_gradients &g, int64_t b, int64_t t,
                                      int64_t unit, float sum, float *dy, slstm_carry *carry) {
    if (t + 1 < p.T) {
        *dy = slstm_clipped(sum, g.clip);
        *carry = {g.dc[b * p.D + unit], g.dn[b * p.D + unit]};
        if (slstm_begins(p, b, t + 1)) *dy = 0, *carry = {0, 0};
    } else {
        *dy = g.dfinal ? g.dfinal[slstm_place(p, b, SLSTM_Y, unit)] : 0.0f;
        *carry = {0, 0};
        if (g.dfinal) *carry = {g.dfinal[slstm_place(p, b, SLSTM_C, unit)], g.dfinal[slstm_place(p, b, SLSTM_N, unit)]};
    }
}

/* t = -1: only what goes to the initial state. */
template <class T>
__global__ void slstm_token_back_kernel(slstm_problem p, int64_t t, T *dx, const T *dy, const T *r, plain_gradients g,
                                        slstm_saved<T> saved) {
    __shared__ float room[PLAIN_WARPS][PLAIN_ROWS][PLAIN_UNITS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t k = (int64_t)blockIdx.x * PLAIN_UNITS + lane, h = blockIdx.y, b0 = (int64_t)blockIdx.z * PLAIN_ROWS;
    float sum[PLAIN_ROWS] = {};
    for (int gate = 0; t + 1 < p.T && gate < SLSTM_GATES; gate++) {
        const T *of_gate = r + (h * SLSTM_GATES + gate) * p.P * p.P + (k < p.P ? k : 0);
        const float *draw = g.after + (b0 * SLSTM_GATES + gate) * p.D + h * p.P;
#pragma unroll 4
        for (int j = warp; j < (int)p.P; j += PLAIN_WARPS) {
            float weight = to_float(of_gate[j * p.P]);
#pragma unroll
            for (int row = 0; row < PLAIN_ROWS; row++)
                if (b0 + row < p.B) sum[row] += weight * draw[row * SLSTM_GATES * p.D + j];
        }
    }
#pragma unroll
    for (int row = 0; row < PLAIN_ROWS; row++) room[warp][row][lane] = sum[row];
    __syncthreads();
    int64_t b = b0 + warp, unit = h * p.P + k;
    if (warp >= PLAIN_ROWS || b >= p.B || k >= p.P) return;
    float whole = 0, into;
    for (int w = 0; w < PLAIN_WARPS; w++) whole += room[w][warp][lane];
    slstm_carry carry;
    enter(p, g, b, t, unit, whole, &into, &carry);
    if (t < 0) {
        g.dinitial[slstm_place(p, b, SLSTM_Y, unit)] = into, g.dinitial[slstm_place(p, b, SLSTM_C, unit)] = carry.dc;
        g.dinitial[slstm_place(p, b, SLSTM_N, unit)] = carry.dn, g.dinitial[slstm_place(p, b, SLSTM_M, unit)] = 0;
        return;
    }
    slstm_factors f;
    float draw[SLSTM_GATES];
    saved.load(f, (b * p.T + t) * p.D + unit);
    slstm_backward_unit(carry, draw, f, into + to_float(dy[b * p.y.row + t * p.y.step + unit]));
    g.dc[b * p.D + unit] = carry.dc, g.dn[b * p.D + unit] = carry.dn;
    for (int i = 0; i < SLSTM_GATES; i++) {
        g.draw[(b * SLSTM_GATES + i) * p.D + unit] = draw[i];
        dx[b * p.x.row + t * p.x.step + i * p.D + unit] = from_float<T>(draw[i]);
    }
}

static void plain_backward(struct device *dev, const slstm_problem &p, tensor dx, tensor dinitial, tensor dy,
                           tensor dfinal, const void *saved, tensor r, float clip, struct scratch s) {
    dim3 grid((unsigned)ceil_div(p.P, PLAIN_UNITS), (unsigned)p.H, (unsigned)ceil_div(p.B, PLAIN_ROWS));
    with_type(dx.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        for (int64_t t = p.T - 1; t >= (tensor_given(dinitial) ? -1 : 0); t--) {
            plain_gradients g = {s.draw[(t + 1) & 1], s.draw[t & 1], s.dc, s.dn, data_of<float>(dfinal),
                                 data_of<float>(dinitial), clip};
            LAUNCH(dev, slstm_token_back_kernel<T>, grid, PLAIN_WARPS * WARP, 0, p, t, data_of<T>(dx), data_of<T>(dy),
                   data_of<T>(r), g, slstm_saved<T>((void *)saved, p));
        }
    });
}

/* --- gradients of r and bias -------------------------------------------------------------------------------------- */

/* before (B,T,D) = the y that token t is given through r. */
template <class T> __global__ void slstm_before_kernel(slstm_problem p, T *before, const T *y, slstm_rows of_y) {
    int64_t t = blockIdx.x, b = blockIdx.y;
    bool begins = slstm_begins(p, b, t);
    for (int64_t i = threadIdx.x; i < p.D; i += blockDim.x) {
        T v = from_float<T>(0);
        if (!begins && t > 0) v = y[b * of_y.row + (t - 1) * of_y.step + i];
        else if (!begins && p.initial) v = from_float<T>(p.initial[slstm_place(p, b, SLSTM_Y, i)]);
        before[(b * p.T + t) * p.D + i] = v;
    }
}

/* dr (H,4P,P) += the products over `rows` rows of dx and `before`: in pieces, all of a gate and head in one call;
 * or, where rows can't be cut evenly, all heads of a gate. */
static void add_dr(struct device *dev, const slstm_problem &p, tensor dr, char *dx, int64_t dx_step, char *before,
                   enum dtype dtype, int64_t rows, float *pieces) {
    int64_t size = (int64_t)dtype_size(dtype), count = pieces_of_dr(p.P, rows), square = p.P * p.P;
    while (rows % count != 0) count /= 2;
    int64_t length = rows / count;
    for (int64_t i = 0; i < SLSTM_GATES * (count > 1 ? p.H : 1); i++) {
        int64_t g = i % SLSTM_GATES, h = i / SLSTM_GATES;
        struct gemm_operand a = {dx + (g * p.D + h * p.P) * size, dtype, dx_step, true, p.P};
        struct gemm_operand b = {before + h * p.P * size, dtype, p.D, false, p.P};
        struct gemm_operand to = {data_of<float>(dr) + i * square, DTYPE_F32, p.P, false, SLSTM_GATES * square};
        if (count == 1) {
            cuda_gemm(dev, a, b, to, p.P, p.P, rows, 1, 1, p.H);
        } else {
            a.next = length * dx_step, b.next = length * p.D;
            to.data = pieces + i * square, to.next = p.H * SLSTM_GATES * square;
            cuda_gemm(dev, a, b, to, p.P, p.P, length, 1, 0, count);
        }
    }
    if (count > 1) cuda_add_partials(dev, data_of<float>(dr), pieces, count, p.H * SLSTM_GATES * square);
}

extern "C" void cuda_slstm_backward(struct device *dev, tensor dx, tensor dr, tensor dbias, tensor dinitial, tensor dy,
                                    tensor dfinal, const void *saved, tensor y, tensor x, tensor r, tensor bias,
                                    tensor initial, tensor doc, double clip, void *scratch) {
    slstm_problem p = problem_of(dx, dy, r, bias, initial, doc);
    struct scratch s;
    int64_t partials = 0;
    ASSERT(tensor_is(x, 3, p.B, p.T, SLSTM_GATES * p.D) && tensor_is(y, 3, p.B, p.T, p.D) && y.dtype == dx.dtype);
    ASSERT(tensor_is(dr, 3, p.H, SLSTM_GATES * p.P, p.P) && tensor_is(dbias, 2, (int64_t)SLSTM_GATES, p.D));
    carve_backward(&s, {p.B, p.T, p.H, p.P}, scratch);
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, slstm_before_kernel<T>, dim3((unsigned)p.T, (unsigned)p.B), 256, 0, p, (T *)s.before, data_of<T>(y),
               slstm_rows{y.stride[0], y.stride[1]});
    });
    bool summed = slstm_cluster_backward(dev, p, dx, dinitial, dy, dfinal, saved, r, (float)clip, s.partials,
                                         &partials);
    if (!summed) plain_backward(dev, p, dx, dinitial, dy, dfinal, saved, r, (float)clip, s);
    bool joined = p.B == 1 || dx.stride[0] == p.T * dx.stride[1]; /* all rows in one product */
    int64_t size = (int64_t)dtype_size(dx.dtype), rows = joined ? p.B * p.T : p.T;
    for (int64_t b = 0; b < (joined ? 1 : p.B); b++) {
        char *gates = (char *)dx.data + b * dx.stride[0] * size;
        tensor all = tensor_2d(gates, dx.dtype, rows, SLSTM_GATES * p.D);
        all.stride[0] = dx.stride[1];
        char *before = (char *)s.before + b * p.T * p.D * size;
        add_dr(dev, p, dr, gates, dx.stride[1], before, dx.dtype, rows, s.pieces);
        if (!summed) cuda_add_column_sums(dev, data_of<float>(dbias), all);
    }
    if (summed) cuda_add_partials(dev, data_of<float>(dbias), s.partials, partials, SLSTM_GATES * p.D);
}
