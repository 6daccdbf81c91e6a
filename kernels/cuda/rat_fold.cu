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
 * which is 12D bytes a token. Backward: cuDNN takes probabilities from logarithms, and delta from o and do; given the
 * merged ones its gradients are those of the whole softmax, and nothing is left to merge. Its deterministic backward
 * has two bytes of memory for every score of a call: a call has some heads of a row, at the least one, which is 2.1 GB
 * with 8,192 chunks of 16. What takes more than WORK_MOST is rat_mma.cu's.
 *
 * 4.4 TFLOP forward for a row of 131,072 tokens, 16 heads of 128, Q = 16. cuDNN does 530 TFLOP/s forward and 360 back
 * at T 2048 on an H100: 8 to 9 ms, and 25 to 30 ms back, against 20 and 75 of rat_mma.cu. What folding costs beside
 * that, 8D bytes a token more than rat_mma.cu, is made up for from some 500 chunks on. */
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/rat.cuh"

#include <string.h>

typedef __nv_bfloat16 bf16;

enum { THREADS = 256, PART = 8 };

static const size_t WORK_MOST = (size_t)3 << 30, WORK_WANTED = (size_t)512 << 20, WORK_BESIDE = (size_t)1 << 20;

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
        if (!cuda_attention_cudnn_run(dev, &s, &row)) return false;
    }
    LAUNCH(dev, rat_merge_kernel, (unsigned)ceil_div(p.B * p.T * wide / PART, THREADS), THREADS, 0, y, o, lse, x.z, a,
           p);
    return true;
}

/* What backward of one head works in, by the sizes that cuDNN's frontend 1.32 asks for: scores, keys' and values'
 * gradients by place, a sum for each token. */
static size_t head_bytes(struct rat_shape s) {
    size_t chunks = (size_t)(s.T / s.Q - 1), Q = (size_t)s.Q;
    size_t pairs = (chunks + 63) / 64 * 64 * ((chunks + 127) / 128 * 128) * sizeof(bf16);
    return Q * (pairs + chunks * (2 * (size_t)s.P * sizeof(bf16) + sizeof(float)));
}

/* Heads of a call of backward; 0: not even one. */
static int64_t heads_at_once(struct rat_shape s) {
    size_t one = head_bytes(s);
    if (one > WORK_MOST) return 0;
    return at_most(at_least((int64_t)(WORK_WANTED / one), 1), s.H);
}

size_t rat_fold_bytes(struct rat_shape s) {
    if (s.T / s.Q < RAT_FOLDED_CHUNKS) return 0;
    int64_t heads = heads_at_once(s);
    return heads ? (size_t)heads * head_bytes(s) + WORK_BESIDE : 0;
}

bool rat_fold_backward(struct device *dev, const bf16 *o, const rat_arrays &a, const rat_problem &p) {
    int64_t wide = (int64_t)p.H * p.P, first = p.Q * wide, logs = p.Q * (p.T / p.Q - 1);
    struct rat_shape whole = {p.B, p.T, p.H, p.G, p.P, p.Q, 0};
    int64_t heads = heads_at_once(whole);
    attention_cudnn_shape s = shape_of(p, true);
    if (heads == 0) return false;
    for (int64_t b = 0; b < p.B; b++)
        for (int64_t h = 0; h < p.H; h += heads) {
            int64_t tokens = b * p.T * wide + first + h * p.P, ends = b * p.E * wide + h * p.P;
            attention_cudnn_operands part = {};
            s.B = at_most(heads, p.H - h);
            part.q = a.queries + tokens, part.o = (void *)(o + tokens), part.dout = a.dout + tokens;
            part.k = a.end_keys + ends, part.v = a.end_values + ends;
            part.dq = a.dqueries + tokens, part.dk = a.dend_keys + ends, part.dv = a.dend_values + ends;
            part.lse = a.folded + (b * p.H + h) * logs;
            part.workspace = a.work, part.workspace_bytes = rat_fold_bytes(whole);
            if (!cuda_attention_cudnn_run(dev, &s, &part)) return false;
        }
    return true;
}
