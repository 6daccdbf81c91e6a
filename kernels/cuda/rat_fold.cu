/* rat_fold.cu: RAT's attention over ends as attention that cuDNN has, for long rows of one document and whole chunks.
 * rat.cu has the mathematics, rat_mma.cu the same without cuDNN.
 *
 * The places of a chunk become heads of queries: for a head of RAT, query c of head l is token (c + 1) Q + l, key c is
 * the end of chunk c, and all Q heads share the keys and values. The first chunk has no query and the last end is no
 * key, which makes "the ends of earlier chunks" the causal mask. Only strides say so: nothing is moved but the turned
 * queries, which are written once for each head instead of each group. A call of cuDNN has heads of a row: they are
 * its batch.
 *
 * Forward: cuDNN leaves its result in y, and its logarithms in scratch; a kernel merges them with the own state,
 *   share = sigmoid(own - log);   o = (1 - share) o' + share v~;   lse = log(exp(log) + exp(own));   y = sigmoid(z) o,
 * which is 12D bytes a token.
 *
 * Backward: cuDNN takes probabilities from logarithms, and delta from o and do; given the merged ones its gradients
 * are those of the whole softmax, and nothing is left to merge. Its deterministic backward has two bytes of memory for
 * every score of a call, 134 MB for one place of one head with C = 8,192 chunks, so a row takes several calls: each has
 * some heads, or, where one does not fit, some places of a head, whose shares in the gradients of ends are then added
 * in order. A call has a block for 128 ends of a place, and the first of them see C / 128 times as many tokens as the
 * last: while the last blocks of a call end, most of the chip has nothing to do, a third of the time where a call is a
 * head with 4,096 chunks of 16, a sixth with 8,192. So calls go by turns into two streams: the blocks of one fill what
 * the other leaves empty. Two calls' memory fits into what rat.cu's plain path would need (7D bytes a token each),
 * where D is not small. Nothing is added in an order that time decides.
 *
 * 4.4 TFLOP forward for a row of 131,072 tokens, 16 heads of 128, Q = 16: 8 to 9 ms at cuDNN's 530 TFLOP/s, 15 by
 * rat_mma.cu; back 11 TFLOP, some 27 ms (57 by rat_mma.cu): 400 TFLOP/s. With two streams (and the
 * walk's k~ and v~ made again, and other tiles of linear layers) a layer of 65,536 tokens went from 23.9 ms to 21.4 on
 * an H100, one of 131,072, whose calls had 1,024 blocks before, from 61.8 to 59.7. What folding costs beside that,
 * 8D bytes a token more than rat_mma.cu, is made up for from some 500 chunks on. */
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/rat.cuh"

#include <string.h>

typedef __nv_bfloat16 bf16;

enum { THREADS = 256, PART = 8 };

static const size_t WORK_MOST = (size_t)3 << 30, WORK_WANTED = (size_t)320 << 20, WORK_BESIDE = (size_t)1 << 20;

/* A thread has PART channels of a head of a token. */
__global__ void rat_merge_kernel(attention_rows<bf16> y, bf16 *o, float *lse, attention_rows<bf16> z, rat_arrays a,
                                 __grid_constant__ const rat_problem p) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, parts = p.P / PART, t = i / parts / p.H % p.T;
    int64_t b = i / parts / p.H / p.T;
    int h = (int)(i / parts % p.H), c = (int)(i % parts) * PART, chunk = (int)t / p.Q;
    if (b >= p.B) return;
    int64_t head = b * p.H + h, at = place_of(p, b, t, h) + c;
    float own = a.own[head * p.T + t] * p.scale, log_sum = own, value[PART], other[PART], gate[PART];
    load_floats<PART>(value, a.values + at);
    load_floats<PART>(gate, z.at(b, t, h) + c);
    if (chunk > 0) {
        float log_ends = a.folded[(head * p.Q + t % p.Q) * (p.T / p.Q - 1) + chunk - 1], high = fmaxf(own, log_ends);
        float share = sigmoid_of(own - log_ends), rest = sigmoid_of(log_ends - own);
        log_sum = high + logf(expf(own - high) + expf(log_ends - high));
        load_floats<PART>(other, y.at(b, t, h) + c);
#pragma unroll
        for (int k = 0; k < PART; k++) value[k] = share * value[k] + rest * other[k];
    }
    if (o) store_floats<PART>(o + at, value);
    if (lse && c == 0) lse[head * p.T + t] = log_sum;
#pragma unroll
    for (int k = 0; k < PART; k++) value[k] *= sigmoid_of(gate[k]);
    store_floats<PART>(y.at(b, t, h) + c, value);
}

/* Are there enough chunks, and is every one whole? */
bool rat_folds(struct device *dev, const rat_problem &p) {
    return !p.positions && p.T % p.Q == 0 && p.T / p.Q >= RAT_FOLDED_CHUNKS && cuda_attention_cudnn(dev) != NULL;
}

/* Of one row. Arrays by token have rows of `step` elements. */
static attention_cudnn_shape shape_of(const rat_problem &p, bool backward) {
    int64_t wide = (int64_t)p.H * p.P;
    const attention_cudnn_strides ends = {p.P, wide, wide}, tokens = {p.P, p.Q * wide, wide};
    attention_cudnn_shape s;
    memset(&s, 0, sizeof s);
    s.B = p.H, s.T = p.T / p.Q - 1, s.H = p.Q, s.G = 1, s.P = p.P;
    s.scale = p.scale;
    s.backward = backward, s.logarithms = !backward;
    s.q = s.o = tokens, s.k = s.v = ends;
    if (backward) s.dout = s.dq = tokens, s.dk = s.dv = ends;
    return s;
}

bool rat_fold_forward(struct device *dev, attention_rows<bf16> y, bf16 *o, float *lse, const rat_operands<bf16> &x,
                      const rat_arrays &a, const rat_problem &p) {
    int64_t wide = (int64_t)p.H * p.P, first = p.Q * wide, logs = (int64_t)p.H * p.Q * (p.T / p.Q - 1);
    attention_cudnn_shape s = shape_of(p, false);
    s.o = {y.head, p.Q * y.step, y.step};
    for (int64_t b = 0; b < p.B; b++) {
        attention_cudnn_operands row = {};
        row.q = a.queries + b * p.T * wide + first;
        row.k = a.end_keys + b * p.E * wide, row.v = a.end_values + b * p.E * wide;
        row.o = y.data + b * y.row + p.Q * y.step;
        row.lse = a.folded + b * logs;
        if (!cuda_attention_cudnn_run(cuda_attention_cudnn(dev), &s, &row)) return false;
    }
    LAUNCH(dev, rat_merge_kernel, (unsigned)ceil_div(p.B * p.T * wide / PART, THREADS), THREADS, 0, y, o, lse, x.z, a,
           p);
    return true;
}

/* --- backward ----------------------------------------------------------------------------------------------------- */

/* What backward of one place of a head works in, by the sizes that cuDNN's frontend 1.32 asks for: scores, a key's and
 * a value's gradient for each end, a sum for each token. */
static size_t place_bytes(struct rat_shape s) {
    size_t chunks = (size_t)(s.T / s.Q - 1);
    size_t pairs = (chunks + 63) / 64 * 64 * ((chunks + 127) / 128 * 128) * sizeof(bf16);
    return (pairs + chunks * (2 * (size_t)s.P * sizeof(bf16) + sizeof(float)) + 255) / 256 * 256;
}

/* What a call of backward may work in. */
static size_t call_most(struct rat_shape s) {
    size_t spare = 7 * (size_t)(s.T * s.H * s.P);
    return spare > WORK_WANTED ? spare : WORK_WANTED;
}

static int64_t divisor_within(int64_t n, int64_t most) {
    int64_t d = at_most(most, n);
    while (n % d != 0) d--;
    return d;
}

/* A call of backward: so many heads of a row, or some of the places of one; 0: none is for cuDNN. */
struct fold_call {
    int64_t heads, places;
    size_t bytes;
};

static fold_call call_of(struct rat_shape s) {
    if (s.T / s.Q < RAT_FOLDED_CHUNKS) return {0, 0, 0};
    size_t place = place_bytes(s);
    if (place > WORK_MOST) return {0, 0, 0};
    int64_t fit = at_least((int64_t)(call_most(s) / place), 1);
    fold_call c = {1, divisor_within(s.Q, fit), 0};
    if (c.places == s.Q) c.heads = divisor_within(s.H, fit / s.Q);
    c.bytes = (size_t)(c.heads * c.places) * place + WORK_BESIDE;
    return c;
}

/* Gradients of ends, keys and values, of all calls of a head but the first. */
static size_t share_bytes(struct rat_shape s, const fold_call &c) {
    size_t one = 2 * (size_t)(s.B * (s.T / s.Q + 1) * s.H * s.P) * sizeof(bf16);
    return (one * (size_t)(s.Q / c.places - 1) + 255) / 256 * 256;
}

/* Memory for two calls, as much as they may take, so that it never shrinks as a row grows; for one if it is larger. */
static size_t calls_bytes(struct rat_shape s) {
    size_t place = place_bytes(s), all = (size_t)(s.H * s.Q) * place, most = call_most(s);
    size_t two = 2 * (most < all ? most : all);
    return (two > place ? two : place) + 2 * WORK_BESIDE;
}

size_t rat_fold_bytes(struct rat_shape s) {
    fold_call c = call_of(s);
    return c.heads ? share_bytes(s, c) + calls_bytes(s) : 0;
}

/* The sums of ends over the calls of a head, in the order of places; block (elements, keys or values, row). */
__global__ void rat_fold_sum_kernel(rat_arrays a, const bf16 *shares, int calls,
                                    __grid_constant__ const rat_problem p) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * PART, b = blockIdx.z, wide = (int64_t)p.H * p.P;
    if (i >= (p.T / p.Q - 1) * wide) return;
    bf16 *to = (blockIdx.y ? a.dend_values : a.dend_keys) + b * p.E * wide + i;
    float sum[PART], share[PART];
    load_floats<PART>(sum, to);
    for (int call = 1; call < calls; call++) {
        load_floats<PART>(share, shares + ((b * (calls - 1) + call - 1) * 2 + blockIdx.y) * p.E * wide + i);
#pragma unroll
        for (int k = 0; k < PART; k++) sum[k] += share[k];
    }
    store_floats<PART>(to, sum);
}

/* Heads h .. of row b, places l .. of each. */
static bool run_call(struct attention_cudnn *by, const fold_call &c, char *work, const bf16 *o, bf16 *shares,
                     const rat_arrays &a, const rat_problem &p, int64_t b, int64_t h, int64_t l) {
    int64_t wide = (int64_t)p.H * p.P, others = p.Q / c.places - 1, call = l / c.places;
    int64_t tokens = b * p.T * wide + (p.Q + l) * wide + h * p.P, ends = b * p.E * wide + h * p.P;
    attention_cudnn_shape s = shape_of(p, true);
    attention_cudnn_operands part = {};
    s.B = c.heads, s.H = c.places;
    part.q = a.queries + tokens, part.o = (void *)(o + tokens), part.dout = a.dout + tokens;
    part.k = a.end_keys + ends, part.v = a.end_values + ends;
    part.dq = a.dqueries + tokens;
    part.dk = a.dend_keys + ends, part.dv = a.dend_values + ends;
    if (call > 0) {
        bf16 *share = shares + (b * others + call - 1) * 2 * p.E * wide + h * p.P;
        part.dk = share, part.dv = share + p.E * wide;
    }
    part.lse = a.folded + ((b * p.H + h) * p.Q + l) * (p.T / p.Q - 1);
    part.workspace = work, part.workspace_bytes = c.bytes;
    return cuda_attention_cudnn_run(by, &s, &part);
}

bool rat_fold_backward(struct device *dev, const bf16 *o, const rat_arrays &a, const rat_problem &p) {
    struct rat_shape whole = {p.B, p.T, p.H, p.G, p.P, p.Q, 0};
    fold_call c = call_of(whole);
    if (c.heads == 0) return false;
    int64_t calls = p.Q / c.places, pieces = (p.T / p.Q - 1) * p.H * p.P / PART;
    bool two = p.B * (p.H / c.heads) * calls > 1 && 2 * c.bytes <= calls_bytes(whole), done = true;
    bf16 *shares = (bf16 *)a.work;
    char *work = a.work + share_bytes(whole, c);
    struct attention_cudnn *by[2] = {cuda_attention_cudnn(dev), two ? cuda_attention_cudnn_fork(dev) : NULL};
    int turn = 0;
    for (int64_t b = 0; b < p.B; b++)
        for (int64_t h = 0; h < p.H; h += c.heads)
            for (int64_t l = 0; l < p.Q && done; l += c.places, turn ^= by[1] != NULL)
                done = run_call(by[turn], c, work + turn * (int64_t)c.bytes, o, shares, a, p, b, h, l);
    if (by[1]) cuda_attention_cudnn_join(dev);
    if (done && calls > 1)
        LAUNCH(dev, rat_fold_sum_kernel, dim3((unsigned)ceil_div(pieces, THREADS), 2, (unsigned)p.B), THREADS, 0, a,
               shares, (int)calls, p);
    return done;
}
