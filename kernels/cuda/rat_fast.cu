/* rat_fast.cu: RAT in bf16, its parts put together: rat_walk.cu (the recurrence, and back along it) and, between,
 * rat_mma.cu (attention over the ends of chunks on tensor cores) or rat_fold.cu (the same by cuDNN, where a row is long
 * and one document); their memory, and the state that is left. rat.cu has the mathematics, and calls this.
 *
 * The account of a layer with D = 2048, 16 heads of 128, 2 groups, Q = 16, forward / forward and backward, at 3 TB/s
 * and 700 TFLOP/s, cuDNN at 600 and 400:
 *   B 4, T 4096     products 0.84 / 2.5 ms, walks 0.08 / 0.37, attention's bytes 0.11 / 0.2, its products 0.08 / 0.4,
 *                   the norm 0.06 / 0.2: 1.2 / 3.7 ms. Measured on an H100: 1.16 / 3.70
 *   B 1, T 65536    products 3.3 / 10 ms, walks 0.35 / 1.5, attention 1.8 / 8.7 by cuDNN, the merge 0.5, the norm
 *                   0.25 / 0.8: 6.2 / 21.5 ms. Measured: 5.97 / 21.4
 *   B 1, T 131072   products 6.7 / 20 ms, walks 0.7 / 3, attention 7.3 / 35 by cuDNN, the merge 1.1, the norm
 *                   0.5 / 1.6: 16.3 / 61 ms. Measured: 15.5 / 59.7 */
#include "kernels/cuda/rat.cuh"

#include <type_traits>

typedef __nv_bfloat16 bf16;

enum { THREADS = 256 };

static struct rat_shape shape_of(const rat_problem &p) {
    return {p.B, p.T, p.H, p.G, p.P, p.Q, 0};
}

size_t rat_arrays_at(rat_arrays *a, struct rat_shape s, void *base, bool backward) {
    size_t used = 0, tokens = (size_t)(s.B * s.T), wide = (size_t)(s.H * s.P) * sizeof(bf16);
    size_t ends = (size_t)(s.B * (s.T / s.Q + 1)) * wide, scalars = tokens * (size_t)s.H * sizeof(float);
    auto take = [&](auto **to, size_t bytes) {
        *to = base ? (std::remove_reference_t<decltype(**to)> *)((char *)base + used) : NULL;
        used += (bytes + 255) / 256 * 256;
    };
    bool folds = s.T / s.Q >= RAT_FOLDED_CHUNKS, keeps = !backward || !rat_walk_makes(s);
    size_t queries = folds ? tokens * wide : tokens * (size_t)(s.G * s.P) * sizeof(bf16);
    a->query_heads = a->dquery_heads = (int)(folds ? s.H : s.G);
    if (keeps) take(&a->values, tokens * wide);
    take(&a->queries, queries);
    if (folds) take(&a->folded, scalars);
    int64_t segments = s.B * ceil_div(s.T, rat_segment(s.Q));
    if (rat_long_chunks(s.Q)) take(&a->reach, 3 * (size_t)(segments * s.H * s.P) * sizeof(float));
    take(&a->end_keys, ends);
    take(&a->end_values, ends);
    if (!backward) {
        take(&a->own, scalars);
        take(&a->running, (size_t)(s.B * 2 * s.H * s.P) * sizeof(float));
        return used;
    }
    if (keeps) take(&a->keys, tokens * wide);
    take(&a->dout, tokens * wide);
    take(&a->dqueries, queries);
    take(&a->dend_keys, ends);
    take(&a->dend_values, ends);
    take(&a->log_sum, scalars);
    take(&a->delta, scalars);
    take(&a->share, scalars);
    take(&a->slope, scalars);
    take(&a->work, rat_fold_bytes(s));
    take(&a->partial, (size_t)(segments * s.H * s.P) * sizeof(float));
    return used;
}

static bool lie_alike(tensor s, tensor t) {
    return s.stride[0] == t.stride[0] && s.stride[1] == t.stride[1] && s.stride[2] == t.stride[2];
}

/* Vectors of 16 bytes, in bf16, shapes that the walks and tiles have, and operands as columns of one projection. */
bool rat_fast_serves(const rat_problem &p, tensor y, tensor z, tensor v, tensor g, tensor q, tensor k) {
    return y.dtype == DTYPE_BF16 && rat_walk_serves(p) && vectors_fit(y, 8) && vectors_fit(z, 8) && vectors_fit(v, 8) &&
           vectors_fit(g, 8) && vectors_fit(q, 8) && vectors_fit(k, 8) && lie_alike(v, z) && lie_alike(v, g) &&
           lie_alike(q, k);
}

/* Block x of a row: its x-th end from the last into the state; the block behind these: where the recurrence stands. */
__global__ void rat_store_ends_kernel(bf16 *state_k, bf16 *state_v, float *running, rat_arrays a,
                                      __grid_constant__ const rat_problem p, int64_t C, int ends) {
    int64_t b = blockIdx.y, wide = (int64_t)p.H * p.P;
    int last = position_at(p, b, p.T - 1), chunk = (last + 1) / p.Q - 1 - (int)blockIdx.x;
    int64_t t = p.T - 1 - (last - (chunk * p.Q + p.Q - 1)), e = ends_of(p, b) - 1 - (int64_t)blockIdx.x;
    if ((int)blockIdx.x == ends) {
        const float *from = a.running + b * 2 * wide;
        for (int64_t c = threadIdx.x; c < 2 * wide; c += THREADS) running[b * 2 * wide + c] = from[c];
    } else if (chunk >= 0 && t >= 0) {
        for (int64_t c = threadIdx.x; c < wide; c += THREADS) {
            state_k[(b * C + chunk % C) * wide + c] = a.end_keys[(b * p.E + e) * wide + c];
            state_v[(b * C + chunk % C) * wide + c] = a.end_values[(b * p.E + e) * wide + c];
        }
    }
}

void rat_fast_forward(struct device *dev, attention_rows<bf16> y, bf16 *o, float *lse, const rat_operands<bf16> &x,
                      rat_arrays *a, const rat_problem &p, void *memory) {
    bool folds = rat_folds(dev, p);
    rat_arrays_at(a, shape_of(p), memory, false);
    if (!folds) a->query_heads = p.G;
    rat_walk_forward(dev, x, *a, p);
    if (!folds || !rat_fold_forward(dev, y, o, lse, x, *a, p)) rat_mma_forward(dev, y, o, lse, x, *a, p);
}

void rat_fast_store(struct device *dev, struct rat_state final, const rat_arrays &a, const rat_problem &p,
                    int64_t ends) {
    LAUNCH(dev, rat_store_ends_kernel, dim3((unsigned)ends + 1, (unsigned)p.B), THREADS, 0, data_of<bf16>(final.k),
           data_of<bf16>(final.v), data_of<float>(final.running), a, p, final.k.dim[1], (int)ends);
}

void rat_fast_backward(struct device *dev, const rat_gradients_of<bf16> &to, float *dbias, const rat_operands<bf16> &x,
                       const rat_problem &p, void *memory) {
    rat_arrays a = {};
    bool folds = rat_folds(dev, p);
    rat_arrays_at(&a, shape_of(p), memory, true);
    if (!folds) a.query_heads = p.G, a.folded = NULL;
    rat_walk_again(dev, x, to, a, p);
    if (!folds || !rat_fold_backward(dev, to.o, a, p)) {
        a.dquery_heads = p.G, a.folded = NULL;
        rat_mma_backward(dev, x, a, p);
    }
    rat_walk_back(dev, x, to, a, p);
    cuda_add_partials(dev, dbias, a.partial, p.B * ceil_div(p.T, rat_segment(p.Q)), (int64_t)p.H * p.P);
}
