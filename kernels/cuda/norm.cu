/* norm.cu: residual add + norm (RMSNorm or LayerNorm), and the gated RMSNorm of Mamba-2; forward and backward of both.
 *
 *   r = scale residual + branch;  rstd = 1/sqrt(mean((r - m)^2) + eps);  y = (r - m) rstd weight;
 *   LayerNorm: m = mean(r), RMSNorm: m = 0
 *   xh = (r - m) rstd;  wdy = weight dy;  c = mean(xh wdy);  dr = (wdy - b - xh c) rstd + next_scale dnext;
 *   dweight += sum dy xh;  dnext_scale += sum dnext r;  LayerNorm: b = mean(wdy), RMSNorm: b = 0
 *   u = y silu(z);  rstd = 1/sqrt(mean(u^2) + eps);  g = u rstd weight, in groups of n = I / groups
 *   xh = u rstd;  wdg = weight dg;  c = mean(xh wdg);  du = (wdg - xh c) rstd
 *   dy = du silu(z);  dz = du y silu'(z);  dweight += sum dg xh
 *   with the norm first: rstd of y instead of u, g = y silu(z) rstd weight; xh = y rstd;  wdg = weight dg silu(z);
 *   dy = (wdg - xh c) rstd;  dz = dg xh weight silu'(z);  dweight += sum dg silu(z) xh
 *
 * norm.cuh says how rows are dealt out to threads. One kernel serves both norms of the residual stream: whether there
 * is a mean is asked where a row is summed.
 * Bytes a row, with e bytes an activation: forward (8 + 2e) D, backward (12 + 2e) D, a scale adding none, since dnext
 * and r are read anyway; gated: forward 3eI, backward 5eI (6eI with g again, which is written in the place of dg, so
 * that no forward pass has to be run again).
 * All are bound by bandwidth; in bf16 at 3.0 TB/s, forward / backward: R 32,768, D 768 in 0.10 / 0.14 ms, I 1536 in
 * 0.10 / 0.17 ms; R 16,384, D 2048 in 0.13 / 0.18 ms, I 4096 in 0.13 / 0.23 ms.
 */
#include "kernels/cuda/norm.cuh"

enum { /* of a row in a thread, unless the row is longer than that of eight warps */
    FORWARD_ELEMENTS = 48,
    ADD_ELEMENTS = 16, /* backward, which wants more warps */
    GATED_ELEMENTS = 24
};

/* --- residual add + norm ------------------------------------------------------------------------------------------ */

template <class T, int V, int ITEMS>
__global__ void __launch_bounds__(THREADS_MAX)
add_norm_forward_kernel(float *out_residual, T *y, float *mean, float *rstd, const float *residual, const float *scale,
                        const T *branch, const float *weight, int64_t R, int D, float eps) {
    __shared__ team_room room[2];
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, at = row * D;
    int end = row < R ? D : 0;
    pack<float, V> r[ITEMS];
    pack<T, V> more[ITEMS] = {};
    load_items(r, residual + at, end);
    if (branch) load_items(more, branch + at, end);
    float total = 0, squares = 0, m = 0;
    if (scale) {
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            float s[V];
            if (item_at<V>(k) >= end) break;
            load_floats<V>(s, scale + item_at<V>(k));
#pragma unroll
            for (int j = 0; j < V; j++) r[k].v[j] *= s[j];
        }
    }
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
#pragma unroll
        for (int j = 0; j < V; j++) {
            r[k].v[j] += to_float(more[k].v[j]);
            total += r[k].v[j];
        }
    if (branch || scale || out_residual != residual) {
#pragma unroll
        for (int k = 0; k < ITEMS; k++)
            if (item_at<V>(k) < end) store_floats<V>(out_residual + at + item_at<V>(k), r[k].v);
    }
    if (mean) m = team_sum(total, room[0]) / (float)D;
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
#pragma unroll
        for (int j = 0; j < V; j++) {
            r[k].v[j] -= item_at<V>(k) < end ? m : 0;
            squares += r[k].v[j] * r[k].v[j];
        }
    float s = 1.0f / sqrtf(team_sum(squares, room[1]) / (float)D + eps);
    if (threadIdx.x == 0 && row < R) rstd[row] = s;
    if (threadIdx.x == 0 && row < R && mean) mean[row] = m;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int i = item_at<V>(k);
        if (i >= end) continue;
        float w[V];
        load_floats<V>(w, weight + i);
#pragma unroll
        for (int j = 0; j < V; j++) w[j] *= r[k].v[j] * s;
        store_floats<V>(y + at + i, w);
    }
}

extern "C" void cuda_add_norm_forward(struct device *dev, tensor out_residual, tensor y, tensor mean, tensor rstd,
                                      tensor residual, tensor scale, tensor branch, tensor weight, double eps) {
    int64_t R = residual.dim[0], D = residual.dim[1];
    ASSERT(tensor_is(y, 2, R, D) && tensor_is(out_residual, 2, R, D) && weight.dtype == DTYPE_F32);
    ASSERT(!tensor_given(branch) || branch.dtype == y.dtype);
    bool wide = vectors_fit(y, 4) && vectors_fit(residual, 4) && vectors_fit(branch, 4) && vectors_fit(weight, 4) &&
                vectors_fit(scale, 4) && vectors_fit(out_residual, 4);
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_row_shape<4, FORWARD_ELEMENTS>(wide, D, [&](auto width, auto items, dim3 block) {
            LAUNCH(dev, (add_norm_forward_kernel<T, width.value, items.value>), (unsigned)ceil_div(R, block.y), block,
                   0, data_of<float>(out_residual), data_of<T>(y), data_of<float>(mean), data_of<float>(rstd),
                   data_of<float>(residual), data_of<float>(scale), data_of<T>(branch), data_of<float>(weight), R,
                   (int)D, (float)eps);
        });
    });
}

/* A slot: the row's residual (D floats), dnext (D floats), dy (D of T). SCALED: next_scale is given, and a second row
 * of partial sums behind those of all blocks is dnext_scale's. */
template <class T, int V, int ITEMS, bool SCALED>
__global__ void BACKWARD_BOUNDS
add_norm_backward_kernel(float *dresidual, T *dbranch, float *partial, const T *dy, const float *dnext,
                         const float *residual, const float *mean, const float *rstd, const float *weight,
                         const float *next_scale, int64_t R, int D, struct staging staging) {
    DYNAMIC_SHARED(char, memory);
    __shared__ team_room room[2];
    float sum[ITEMS][V] = {}, scale_sum[SCALED ? ITEMS : 1][V] = {};
    auto copy = [&](int64_t row, char *slot) {
        float *at = (float *)slot;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= D) break;
            stage_item<V>(at + i, residual + row * D + i);
            if (dnext) stage_item<V>(at + D + i, dnext + row * D + i);
            stage_item<V>((T *)(at + 2 * D) + i, dy + row * D + i);
        }
    };
    read_ahead rstds([&](int64_t row) { return rstd[row]; }, R);
    read_ahead means([&](int64_t row) { return mean ? mean[row] : 0.0f; }, R);
    staged_rows(R, memory, staging, copy, [&](int64_t row, const char *slot, int turn) {
        int end = row < R ? D : 0;
        float s = rstds.next(row), m = means.next(row), dot = 0, total = 0;
        const float *in = (const float *)slot, *next = in + D;
        const T *d = (const T *)(in + 2 * D);
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], g[V], w[V];
            load_floats<V>(x, in + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float product = g[j] * ((x[j] - m) * s);
                sum[k][j] += product;
                dot += product * w[j];
                total += g[j] * w[j];
            }
        }
        if (mean) team_sums(dot, total, room[turn]);
        else dot = team_sum(dot, room[turn]);
        float c = dot / (float)D * s, b = mean ? total / (float)D : 0.0f;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], g[V], w[V], out[V] = {};
            load_floats<V>(x, in + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + i);
            if (dnext) load_floats<V>(out, next + i);
            if constexpr (SCALED) {
                float scale[V];
                load_floats<V>(scale, next_scale + i);
#pragma unroll
                for (int j = 0; j < V; j++) {
                    scale_sum[k][j] += out[j] * x[j];
                    out[j] *= scale[j];
                }
            }
#pragma unroll
            for (int j = 0; j < V; j++) out[j] += (w[j] * g[j] - b - (x[j] - m) * c) * s;
            store_floats<V>(dresidual + row * D + i, out);
            if (dbranch) store_floats<V>(dbranch + row * D + i, out);
        }
    });
    add_teams(partial + (int64_t)blockIdx.x * D, sum, D, (float *)memory);
    if constexpr (SCALED) add_teams(partial + ((int64_t)gridDim.x + blockIdx.x) * D, scale_sum, D, (float *)memory);
}

extern "C" size_t cuda_add_norm_backward_scratch(int64_t R, int64_t D) {
    return 2 * (size_t)(at_most(R, RUNS_MAX) * D) * sizeof(float);
}

extern "C" void cuda_add_norm_backward(struct device *dev, tensor dresidual, tensor dbranch, tensor dweight,
                                       tensor dnext_scale, tensor dy, tensor dnext, tensor residual, tensor mean,
                                       tensor rstd, tensor weight, tensor next_scale, void *scratch) {
    int64_t R = residual.dim[0], D = residual.dim[1], runs = 0;
    bool scaled = tensor_given(next_scale);
    ASSERT(tensor_is(dy, 2, R, D) && tensor_is(dresidual, 2, R, D) && weight.dtype == DTYPE_F32);
    ASSERT(tensor_given(dnext_scale) == scaled && (!scaled || tensor_given(dnext)));
    bool wide = vectors_fit(dy, 4) && vectors_fit(residual, 4) && vectors_fit(dnext, 4) && vectors_fit(weight, 4) &&
                vectors_fit(dresidual, 4) && vectors_fit(dbranch, 4) && vectors_fit(next_scale, 4) &&
                (uintptr_t)scratch % 16 == 0;
    with_type(dy.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        with_row_shape<4, ADD_ELEMENTS>(wide, D, [&](auto width, auto items, dim3 block) {
            struct staging staging = staging_of(dev, R, D, 8 + (int64_t)sizeof(T), block);
            auto launch = [&](auto add_norm_backward) {
                allow_shared(dev, add_norm_backward, staging.shared, "add_norm_backward");
                LAUNCH(dev, add_norm_backward, staging.blocks, block, staging.shared, data_of<float>(dresidual),
                       data_of<T>(dbranch), (float *)scratch, data_of<T>(dy), data_of<float>(dnext),
                       data_of<float>(residual), data_of<float>(mean), data_of<float>(rstd), data_of<float>(weight),
                       data_of<float>(next_scale), R, (int)D, staging);
            };
            if (scaled) launch(add_norm_backward_kernel<T, width.value, items.value, true>);
            else launch(add_norm_backward_kernel<T, width.value, items.value, false>);
            runs = staging.blocks;
        });
    });
    cuda_add_partials(dev, data_of<float>(dweight), (const float *)scratch, runs, D);
    if (scaled) cuda_add_partials(dev, data_of<float>(dnext_scale), (const float *)scratch + runs * D, runs, D);
}

/* --- gated RMSNorm: blockIdx.y is the group ----------------------------------------------------------------------- */

template <class T, int V, int ITEMS>
__global__ void __launch_bounds__(THREADS_MAX)
gated_rmsnorm_forward_kernel(T *g, float *rstd, const T *y, const T *z, int64_t z_step, const float *weight,
                             bool norm_first, int64_t R, int64_t I, int n, float eps) {
    __shared__ team_room room;
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, group = (int64_t)blockIdx.y * n, at = row * I + group;
    int end = row < R ? n : 0;
    pack<T, V> in[ITEMS], gate[ITEMS];
    load_items(in, y + at, end);
    load_items(gate, z + row * z_step + group, end);
    float u[ITEMS][V], squares = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++)
#pragma unroll
        for (int j = 0; j < V; j++) {
            u[k][j] = to_float(in[k].v[j]) * silu_of(to_float(gate[k].v[j]));
            float normed = norm_first ? to_float(in[k].v[j]) : u[k][j];
            squares += normed * normed;
        }
    float s = 1.0f / sqrtf(team_sum(squares, room) / (float)n + eps);
    if (threadIdx.x == 0 && row < R) rstd[row * gridDim.y + blockIdx.y] = s;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        int i = item_at<V>(k);
        if (i >= end) continue;
        float w[V];
        load_floats<V>(w, weight + group + i);
#pragma unroll
        for (int j = 0; j < V; j++) w[j] *= u[k][j] * s;
        store_floats<V>(g + at + i, w);
    }
}

extern "C" void cuda_gated_rmsnorm_forward(struct device *dev, tensor g, tensor rstd, tensor y, tensor z, tensor weight,
                                           bool norm_first, double eps) {
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1], n = I / groups;
    ASSERT(tensor_is(g, 2, R, I) && tensor_is(z, 2, R, I) && I % groups == 0 && weight.dtype == DTYPE_F32);
    const tensor views[] = {g, y, z, weight};
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = groups_fit(n, vector_of<T>, 4, views);
        with_row_shape<vector_of<T>, FORWARD_ELEMENTS>(wide, n, [&](auto width, auto items, dim3 block) {
            dim3 grid((unsigned)ceil_div(R, block.y), (unsigned)groups);
            LAUNCH(dev, (gated_rmsnorm_forward_kernel<T, width.value, items.value>), grid, block, 0, data_of<T>(g),
                   data_of<float>(rstd), data_of<T>(y), data_of<T>(z), z.stride[0], data_of<float>(weight),
                   norm_first, R, I, (int)n, (float)eps);
        });
    });
}

/* A slot: y, z and dg of a row's group, n of T each. `again`: g, or NULL; it may be dg, whose row has been read before
 * g's is written. */
template <class T, int V, int ITEMS>
__global__ void BACKWARD_BOUNDS
gated_rmsnorm_backward_kernel(T *dy, T *dz, int64_t dz_step, float *partial, T *again, const T *dg, const T *y,
                              const T *z, int64_t z_step, const float *rstd, const float *weight, bool norm_first,
                              int64_t R, int64_t I, int n, struct staging staging) {
    DYNAMIC_SHARED(char, memory);
    __shared__ team_room room[2];
    int64_t group = (int64_t)blockIdx.y * n;
    float sum[ITEMS][V] = {};
    auto copy = [&](int64_t row, char *slot) {
        T *at = (T *)slot;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= n) break;
            stage_item<V>(at + i, y + row * I + group + i);
            stage_item<V>(at + n + i, z + row * z_step + group + i);
            stage_item<V>(at + 2 * n + i, dg + row * I + group + i);
        }
    };
    read_ahead rstds([&](int64_t row) { return rstd[row * gridDim.y + blockIdx.y]; }, R);
    staged_rows(R, memory, staging, copy, [&](int64_t row, const char *slot, int turn) {
        int end = row < R ? n : 0;
        float s = rstds.next(row), dot = 0;
        const T *in = (const T *)slot, *gate = in + n, *d = gate + n;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], v[V], g[V], w[V];
            load_floats<V>(x, in + i);
            load_floats<V>(v, gate + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + group + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float product = g[j] * x[j] * silu_of(v[j]);
                sum[k][j] += product * s;
                dot += product * w[j];
            }
        }
        float c = team_sum(dot, room[turn]) * s * s / (float)n;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            int i = item_at<V>(k);
            if (i >= end) break;
            float x[V], v[V], g[V], w[V];
            load_floats<V>(x, in + i);
            load_floats<V>(v, gate + i);
            load_floats<V>(g, d + i);
            load_floats<V>(w, weight + group + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float open = sigmoid_of(v[j]), silu = v[j] * open, u = x[j] * silu;
                float dn = w[j] * g[j] * s, du = (w[j] * g[j] - u * c) * s;
                v[j] = (norm_first ? dn : du) * x[j] * (open + silu * (1.0f - open));
                x[j] = norm_first ? dn * silu - x[j] * c * s : du * silu;
                w[j] *= u * s;
            }
            if (again) store_floats<V>(again + row * I + group + i, w);
            store_floats<V>(dy + row * I + group + i, x);
            store_floats<V>(dz + row * dz_step + group + i, v);
        }
    });
    add_teams(partial + (int64_t)blockIdx.x * I + group, sum, n, (float *)memory);
}

extern "C" size_t cuda_gated_rmsnorm_backward_scratch(int64_t R, int64_t I) {
    return (size_t)(at_most(R, RUNS_MAX) * I) * sizeof(float);
}

extern "C" void cuda_gated_rmsnorm_backward(struct device *dev, tensor dy, tensor dz, tensor dweight, tensor g,
                                            tensor dg, tensor y, tensor z, tensor rstd, tensor weight, bool norm_first,
                                            void *scratch) {
    int64_t R = y.dim[0], I = y.dim[1], groups = rstd.dim[1], n = I / groups, runs = 0;
    ASSERT(tensor_is(dg, 2, R, I) && tensor_is(z, 2, R, I) && tensor_is(dz, 2, R, I) && tensor_is(dy, 2, R, I));
    ASSERT(!tensor_given(g) || tensor_is(g, 2, R, I));
    const tensor views[] = {dy, dz, g, dg, y, z, weight};
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        bool wide = groups_fit(n, vector_of<T>, 7, views) && (uintptr_t)scratch % 16 == 0;
        with_row_shape<vector_of<T>, GATED_ELEMENTS>(wide, n, [&](auto width, auto items, dim3 block) {
            struct staging staging = staging_of(dev, R, n, 3 * (int64_t)sizeof(T), block);
            allow_shared(dev, gated_rmsnorm_backward_kernel<T, width.value, items.value>, staging.shared,
                         "gated_rmsnorm_backward");
            LAUNCH(dev, (gated_rmsnorm_backward_kernel<T, width.value, items.value>),
                   dim3(staging.blocks, (unsigned)groups), block, staging.shared, data_of<T>(dy), data_of<T>(dz),
                   dz.stride[0], (float *)scratch, data_of<T>(g), data_of<T>(dg), data_of<T>(y), data_of<T>(z),
                   z.stride[0], data_of<float>(rstd), data_of<float>(weight), norm_first, R, I, (int)n,
                   staging);
            runs = staging.blocks;
        });
    });
    cuda_add_partials(dev, data_of<float>(dweight), (const float *)scratch, runs, I);
}
