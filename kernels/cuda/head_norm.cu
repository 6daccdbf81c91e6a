/* head_norm.cu: LayerNorm of every head's P = n channels, then skip and gate; forward and backward.
 *
 *   u = (y - mean) rstd weight;  v = u + skip x;  g = v act(z)
 *   dv = dg act(z);  dz = dg v act'(z);  dx = dv skip;  dskip += sum dv x
 *   yh = (y - mean) rstd;  wdv = weight dv;  b = mean(wdv);  c = mean(yh wdv);  dy = (wdv - b - yh c) rstd;
 *   dweight += sum dv yh
 *
 * norm.cuh says how rows are dealt out to threads; here a row is one head of a token, and a block's teams take
 * neighbouring heads forward, neighbouring tokens of one head (blockIdx.y) backward. Heads are short rows: with a warp
 * for each of 256, the sums over lanes and the start of blocks would take as long as the memory does (measured: 0.125
 * ms for what now is predicted as 0.07). So a team may be a part of a warp, 8 lanes or more, whose sums take
 * three steps, and a thread has up to 32 elements forward, 16 backward. Heads of more than 4096 are slower. Whether
 * there are skip and gate, and which gate, is asked once a vector. Backward computes the gate twice rather than keep
 * it.
 * Reproducible: the sums over tokens are cut by R, I and H only (norm.cuh).
 * Bytes, with e bytes an activation, per R I: forward 2e, backward 3e, and with a skip 1e and 2e more, with a gate 1e
 * and 2e. Bound by bandwidth; in bf16 at 3.0 TB/s, forward / backward: R 32,768, I 1024, gate 0.07 / 0.11 ms; I 1536,
 * skip and gate 0.13 / 0.23 ms.
 */
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/norm.cuh"

enum {
    FORWARD_ELEMENTS = 32,  /* of a head in a thread, unless it is wider than that of eight warps */
    BACKWARD_ELEMENTS = 16, /* the same backward, where they have two sums each */
    LANES_LEAST = 8,        /* of a team */
    THREADS = 128           /* of a block, unless a team is more */
};

/* Run f(V, ITEMS, block) for heads of n. Two sizes of ITEMS are enough: the fewest lanes that it takes are taken. */
template <int V, int MOST, class F> static void with_head_team(int64_t n, F f) {
    int lanes = LANES_LEAST;
    while ((int64_t)lanes * MOST < n && lanes < WARP * TEAM_WARPS) lanes *= 2;
    ASSERT((int64_t)lanes * ELEMENTS_MAX >= n);
    dim3 block((unsigned)lanes, (unsigned)at_least(THREADS / lanes, 1));
    if ((int64_t)lanes * MOST >= n) f(constant<V>(), constant<MOST / V>(), block);
    else f(constant<V>(), constant<ELEMENTS_MAX / V>(), block);
}

template <int V, int MOST, class F> static void with_head_shape(bool wide, int64_t n, F f) {
    if (wide) with_head_team<V, MOST>(n, f);
    else with_head_team<1, MOST>(n, f);
}

/* What both passes read. Rows of x and z are x_step and z_step elements apart; NULL: no skip, no gate. */
template <class T> struct head_inputs {
    const T *y, *x, *z;
    int64_t x_step, z_step;
    const float *weight, *skip;
    enum activation act;
};

template <class T>
static struct head_inputs<T> inputs_of(tensor y, tensor weight, tensor x, tensor skip, tensor z, enum activation act) {
    return {data_of<T>(y),      data_of<T>(x), data_of<T>(z), x.stride[0], z.stride[0], data_of<float>(weight),
            data_of<float>(skip), act};
}

/* --- forward ------------------------------------------------------------------------------------------------------ */

template <class T, int V, int ITEMS>
__global__ void __launch_bounds__(THREADS_MAX)
head_norm_forward_kernel(T *g, float *mean, float *rstd, const __grid_constant__ struct head_inputs<T> in,
                         int64_t heads, int H, int n, float eps) {
    __shared__ team_room room[2];
    int64_t head = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, row = head / H;
    int column = (int)(head - row * H) * n, end = head < heads ? n : 0;
    pack<T, V> own[ITEMS], beside[ITEMS] = {}, gate[ITEMS] = {};
    load_items(own, in.y + head * n, end);
    if (in.x) load_items(beside, in.x + row * in.x_step + column, end);
    if (in.z) load_items(gate, in.z + row * in.z_step + column, end);
    float total = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
#pragma unroll
        for (int j = 0; j < V; j++) total += to_float(own[k].v[j]);
    float m = team_sum(total, room[0]) / (float)n;
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
#pragma unroll
        for (int j = 0; j < V; j++) {
            float left = item_at<V>(k) < end ? to_float(own[k].v[j]) - m : 0;
            squares += left * left;
        }
    float s = 1.0f / sqrtf(team_sum(squares, room[1]) / (float)n + eps);
    if (threadIdx.x == 0 && head < heads) {
        mean[head] = m;
        rstd[head] = s;
    }
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int i = item_at<V>(k);
        if (i >= end) continue;
        float v[V], by[V];
        load_floats<V>(v, in.weight + column + i);
#pragma unroll
        for (int j = 0; j < V; j++) v[j] *= (to_float(own[k].v[j]) - m) * s;
        if (in.x) {
            load_floats<V>(by, in.skip + column + i);
#pragma unroll
            for (int j = 0; j < V; j++) v[j] += by[j] * to_float(beside[k].v[j]);
        }
        if (in.z) {
#pragma unroll
            for (int j = 0; j < V; j++) by[j] = to_float(gate[k].v[j]);
            activate(by, in.act);
#pragma unroll
            for (int j = 0; j < V; j++) v[j] *= by[j];
        }
        store_floats<V>(g + head * n + i, v);
    }
}

static void check(tensor y, tensor mean, tensor rstd, tensor weight, tensor x, tensor skip, tensor z) {
    int64_t R = y.dim[0], I = y.dim[1], H = mean.dim[1];
    ASSERT(H > 0 && I % H == 0 && tensor_is(mean, 2, R, H) && tensor_is(rstd, 2, R, H));
    ASSERT(tensor_is(weight, 1, I) && weight.dtype == DTYPE_F32 && tensor_given(x) == tensor_given(skip));
    ASSERT(!tensor_given(x) || (tensor_is(x, 2, R, I) && x.dtype == y.dtype && skip.dtype == DTYPE_F32));
    ASSERT(!tensor_given(z) || (tensor_is(z, 2, R, I) && z.dtype == y.dtype));
}

extern "C" void cuda_head_norm_forward(struct device *dev, tensor g, tensor mean, tensor rstd, tensor y, tensor weight,
                                       tensor x, tensor skip, tensor z, enum activation act, double eps) {
    int64_t R = y.dim[0], I = y.dim[1], H = mean.dim[1], n = I / H;
    check(y, mean, rstd, weight, x, skip, z);
    ASSERT(tensor_is(g, 2, R, I) && g.dtype == y.dtype);
    const tensor views[] = {g, y, weight, x, skip, z};
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        constexpr int V = vector_of<T>;
        with_head_shape<V, FORWARD_ELEMENTS>(groups_fit(n, V, 6, views), n, [&](auto width, auto items, dim3 block) {
            LAUNCH(dev, (head_norm_forward_kernel<T, width.value, items.value>), (unsigned)ceil_div(R * H, block.y),
                   block, 0, data_of<T>(g), data_of<float>(mean), data_of<float>(rstd),
                   inputs_of<T>(y, weight, x, skip, z, act), R * H, (int)H, (int)n, (float)eps);
        });
    });
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

template <class T> struct head_gradients {
    T *dy, *dx, *dz;
    int64_t dx_step, dz_step;
    const T *dg;
    float *partial; /* of a block: dweight's row of I, then with a skip dskip's */
};

/* A slot: y, dg, with a skip x, with a gate z: n of T each. */
template <class T, int V, int ITEMS>
__global__ void BACKWARD_BOUNDS
head_norm_backward_kernel(const __grid_constant__ struct head_gradients<T> out,
                          const __grid_constant__ struct head_inputs<T> in, const float *mean, const float *rstd,
                          int64_t R, int64_t I, int n, struct staging staging) {
    DYNAMIC_SHARED(char, memory);
    __shared__ team_room room[2];
    int64_t column = (int64_t)blockIdx.y * n;
    int gate_at = in.x ? 3 * n : 2 * n;
    float sum[ITEMS][V] = {}, skip_sum[ITEMS][V] = {};
    auto copy = [&](int64_t row, char *slot) {
        T *at = (T *)slot;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= n) break;
            stage_item<V>(at + i, in.y + row * I + column + i);
            stage_item<V>(at + n + i, out.dg + row * I + column + i);
            if (in.x) stage_item<V>(at + 2 * n + i, in.x + row * in.x_step + column + i);
            if (in.z) stage_item<V>(at + gate_at + i, in.z + row * in.z_step + column + i);
        }
    };
    read_ahead means([&](int64_t row) { return mean[row * gridDim.y + blockIdx.y]; }, R);
    read_ahead rstds([&](int64_t row) { return rstd[row * gridDim.y + blockIdx.y]; }, R);
    staged_rows(R, memory, staging, copy, [&](int64_t row, const char *slot, int turn) {
        const T *own = (const T *)slot, *gate = own + gate_at;
        int end = row < R ? n : 0;
        float m = means.next(row), s = rstds.next(row), total = 0, dot = 0;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float yh[V], v[V], d[V], w[V], by[V], skip[V];
            load_floats<V>(yh, own + i);
            load_floats<V>(d, own + n + i);
            load_floats<V>(w, in.weight + column + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                yh[j] = (yh[j] - m) * s;
                v[j] = yh[j] * w[j];
            }
            if (in.x) {
                load_floats<V>(skip, in.skip + column + i);
                load_floats<V>(by, own + 2 * n + i);
#pragma unroll
                for (int j = 0; j < V; j++) v[j] += skip[j] * by[j];
            }
            if (in.z) {
                float open[V], slope[V];
                load_floats<V>(open, gate + i);
                activate_with_slope(open, slope, in.act);
#pragma unroll
                for (int j = 0; j < V; j++) {
                    v[j] *= d[j] * slope[j];
                    d[j] *= open[j];
                }
                store_floats<V>(out.dz + row * out.dz_step + column + i, v);
            }
            if (in.x) {
#pragma unroll
                for (int j = 0; j < V; j++) {
                    skip_sum[k][j] += d[j] * by[j];
                    skip[j] *= d[j];
                }
                store_floats<V>(out.dx + row * out.dx_step + column + i, skip);
            }
#pragma unroll
            for (int j = 0; j < V; j++) {
                float product = d[j] * yh[j];
                sum[k][j] += product;
                total += w[j] * d[j];
                dot += w[j] * product;
            }
        }
        team_sums(total, dot, room[turn]);
        float b = total / (float)n, c = dot / (float)n;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float yh[V], d[V], w[V], open[V];
            load_floats<V>(yh, own + i);
            load_floats<V>(d, own + n + i);
            load_floats<V>(w, in.weight + column + i);
            if (in.z) {
                load_floats<V>(open, gate + i);
                activate(open, in.act);
#pragma unroll
                for (int j = 0; j < V; j++) d[j] *= open[j];
            }
#pragma unroll
            for (int j = 0; j < V; j++) d[j] = (w[j] * d[j] - b - (yh[j] - m) * s * c) * s;
            store_floats<V>(out.dy + row * I + column + i, d);
        }
    });
    float *partial = out.partial + (int64_t)blockIdx.x * (in.x ? 2 * I : I) + column;
    add_teams(partial, sum, n, (float *)memory);
    if (in.x) add_teams(partial + I, skip_sum, n, (float *)memory);
}

extern "C" size_t cuda_head_norm_backward_scratch(int64_t R, int64_t I, int64_t H) {
    (void)H;
    return (size_t)(at_most(R, RUNS_MAX) * 2 * I) * sizeof(float);
}

extern "C" void cuda_head_norm_backward(struct device *dev, tensor dy, tensor dx, tensor dz, tensor dweight,
                                        tensor dskip, tensor dg, tensor y, tensor mean, tensor rstd, tensor weight,
                                        tensor x, tensor skip, tensor z, enum activation act, void *scratch) {
    int64_t R = y.dim[0], I = y.dim[1], H = mean.dim[1], n = I / H, runs = 0;
    bool skips = tensor_given(x), gated = tensor_given(z);
    check(y, mean, rstd, weight, x, skip, z);
    ASSERT(tensor_is(dy, 2, R, I) && tensor_is(dg, 2, R, I) && dg.dtype == y.dtype && dy.dtype == y.dtype);
    ASSERT(tensor_given(dx) == skips && tensor_given(dskip) == skips && tensor_given(dz) == gated);
    const tensor views[] = {dy, dx, dz, dg, y, weight, x, skip, z};
    int64_t copied = 2 + skips + gated;
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = groups_fit(n, 4, 9, views) && (uintptr_t)scratch % 16 == 0;
        with_head_shape<4, BACKWARD_ELEMENTS>(wide, n, [&](auto width, auto items, dim3 block) {
            struct staging staging = staging_of(dev, R, n, copied * (int64_t)sizeof(T), block, H);
            struct head_gradients<T> out = {data_of<T>(dy), data_of<T>(dx),  data_of<T>(dz), dx.stride[0],
                                            dz.stride[0],   data_of<T>(dg), (float *)scratch};
            allow_shared(dev, head_norm_backward_kernel<T, width.value, items.value>, staging.shared,
                         "head_norm_backward");
            LAUNCH(dev, (head_norm_backward_kernel<T, width.value, items.value>), dim3(staging.blocks, (unsigned)H),
                   block, staging.shared, out, inputs_of<T>(y, weight, x, skip, z, act), data_of<float>(mean),
                   data_of<float>(rstd), R, I, (int)n, staging);
            runs = staging.blocks;
        });
    });
    struct sum_parts parts = {skips ? 2 : 1, {{data_of<float>(dweight), 1}, {data_of<float>(dskip), 1}}};
    cuda_add_partial_parts(dev, parts, (const float *)scratch, runs, I);
}
