/* embedding.cu: table lookup and its backward.
 *
 *   out[r] = table[token[r]]            dtable[v] += sum of dout[r] over the rows r with token[r] = v, r ascending
 *
 * Forward: one thread an element group of one row; bytes: 4RD written, the table's rows read.
 * Backward: a block owns a run of IDS ids and a strip of columns. It walks all R tokens, TOKENS at a time, and lists
 * those that are its own, in order; then each thread adds the listed rows of its column, which are thus added in the
 * order of rows without atomics or sorting. Every block reads all tokens (4R bytes, from the second cache), so the number
 * of ids in a run grows with V to bound that traffic. Bytes: 4RD read, 8D for each id that occurs.
 * Expected, R 32,768, D 768, V 50,304: forward 0.05 ms, backward about 0.1 ms (100 MB of dout).
 */
#include "kernels/cuda/launch.cuh"

template <class W, int V>
__global__ void embedding_forward_kernel(float *out, const int32_t *tokens, const W *table, int64_t D) {
    int64_t r = blockIdx.x;
    const W *row = table + tokens[r] * D;
    for (int64_t i = (int64_t)threadIdx.x * V; i < D; i += (int64_t)blockDim.x * V) {
        float v[V];
        load_floats<V>(v, row + i);
        store_floats<V>(out + r * D + i, v);
    }
}

extern "C" void cuda_embedding_forward(struct device *dev, tensor out, tensor tokens, tensor table) {
    int64_t R = out.dim[0], D = out.dim[1];
    ASSERT(tensor_is(tokens, 1, R) && tokens.dtype == DTYPE_I32 && table.dim[1] == D);
    bool wide = vectors_fit(out, 4) && vectors_fit(table, 4);
    with_type(table.dtype, [&](auto of_type) {
        using W = decltype(of_type);
        with_width(wide, [&](auto width) {
            LAUNCH(dev, (embedding_forward_kernel<W, width.value>), (unsigned)R, 128, 0, data_of<float>(out),
                   data_of<int32_t>(tokens), data_of<W>(table), D);
        });
    });
}

enum { THREADS = 128, TOKENS = 1024, IDS_MAX = 64 };

/* Block (run of ids, strip of THREADS columns). */
__global__ void __launch_bounds__(THREADS)
embedding_backward_kernel(float *dtable, const float *dout, const int32_t *tokens, int64_t R, int64_t D, int64_t V,
                          int ids) {
    __shared__ int32_t row[TOKENS];         /* of this piece of tokens: those in the run, in order */
    __shared__ unsigned char which[TOKENS]; /* and the id of each, counted from the run's first */
    __shared__ int warp_count[THREADS / WARP], listed;
    int64_t first = (int64_t)blockIdx.x * ids, column = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int64_t from = 0; from < R; from += TOKENS) {
        if (threadIdx.x == 0) listed = 0;
        __syncthreads();
        for (int64_t base = from; base < from + TOKENS && base < R; base += THREADS) {
            int64_t r = base + threadIdx.x;
            int64_t id = r < R ? tokens[r] - first : -1;
            bool mine = id >= 0 && id < ids;
            unsigned votes = __ballot_sync(FULL, mine);
            if (lane == 0) warp_count[warp] = __popc(votes);
            __syncthreads();
            int place = listed + __popc(votes & ((1u << lane) - 1)), all = 0;
            for (int w = 0; w < THREADS / WARP; w++) {
                place += w < warp ? warp_count[w] : 0;
                all += warp_count[w];
            }
            if (mine) {
                row[place] = (int32_t)(r - from);
                which[place] = (unsigned char)id;
            }
            __syncthreads();
            if (threadIdx.x == 0) listed += all;
            __syncthreads();
        }
        if (column < D) { /* rows of the same id that follow each other are added in a register */
            float sum = 0;
            int held = -1;
            for (int i = 0; i < listed; i++) {
                if (which[i] != held) {
                    if (held >= 0) dtable[(first + held) * D + column] = sum;
                    held = which[i];
                    sum = dtable[(first + held) * D + column];
                }
                sum += dout[(from + row[i]) * D + column];
            }
            if (held >= 0) dtable[(first + held) * D + column] = sum;
        }
        __syncthreads();
    }
}

extern "C" void cuda_embedding_backward(struct device *dev, tensor dtable, tensor dout, tensor tokens) {
    int64_t R = dout.dim[0], D = dout.dim[1], V = dtable.dim[0];
    ASSERT(tensor_is(tokens, 1, R) && dtable.dim[1] == D && dtable.dtype == DTYPE_F32 && dout.dtype == DTYPE_F32);
    int ids = (int)at_most(ceil_div(V, 1024), IDS_MAX);
    dim3 grid((unsigned)ceil_div(V, ids), (unsigned)ceil_div(D, THREADS));
    LAUNCH(dev, embedding_backward_kernel, grid, THREADS, 0, data_of<float>(dtable), data_of<float>(dout),
           data_of<int32_t>(tokens), R, D, V, ids);
}
