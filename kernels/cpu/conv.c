/* conv.c: causal depthwise convolution on the CPU, with SiLU or without: forward, backward, one step.
 *
 *   c[t,k] = bias[k] + sum_{w<W} weight[k,w] x[t-(W-1)+w, k]        y[t,k] = silu(c[t,k]), or c[t,k]
 *   dc = dy silu'(c), or dy    dx[t] = sum_{s<W} weight[W-1-s] dc[t+s]
 *   dweight[w] = sum dc[t] x[t-(W-1)+w]    dbias = sum dc
 *
 * A tap that lies in another document, or before the row where there is no initial state, reads a row of zeros, so that
 * the inner loops have no conditions. In the same way dc of a later document is read as zeros by dx.
 *
 * Work is divided into blocks of CHANNELS channels of one batch row, whose weights are transposed into a small array
 * once. Forward is also divided along time, because every token stands alone; backward walks a row from its end and
 * keeps the last rows of dc. Its dweight and dbias are summed per batch row, then over batch rows in order, so the bits
 * don't depend on the number of threads. Memory bound: forward moves 2, backward 3 reals for every element; c is
 * computed again instead of saved.
 */
#include "kernels/cpu/cpu.h"

enum {
    TAPS_MAX = 8,
    CHANNELS = 128,       /* in a block */
    TIMES = 128,         /* in a block of forward */
    RING = 8,            /* rows of dc that backward keeps */
    AHEAD = 8,           /* tokens between asking for a row and using it */
    PARALLEL_MIN = 8192, /* elements; fewer are not worth waking threads */
};

static const real zeros[CHANNELS];

/* One batch row and one block of channels of a problem. Rows are addressed by time; times before 0 are in `initial`. */
struct strip {
    int64_t T, W, k0, count; /* channels k0 .. k0+count-1 */
    const real *x, *initial; /* initial: NULL when absent */
    const int32_t *doc;      /* NULL when absent */
    int64_t x_step, C;
    real taps[TAPS_MAX][CHANNELS], bias[CHANNELS]; /* taps transposed; channels past `count` are 0 */
};

static void strip_open(struct strip *s, tensor x, tensor weight, tensor bias, tensor initial, tensor doc, int64_t b,
                       int64_t k0) {
    int64_t C = x.dim[2], W = weight.dim[1];
    s->T = x.dim[1];
    s->W = W;
    s->C = C;
    s->k0 = k0;
    s->count = C - k0 < CHANNELS ? C - k0 : CHANNELS;
    s->x = (const real *)x.data + b * x.stride[0] + k0;
    s->x_step = x.stride[1];
    s->initial = tensor_given(initial) ? (const real *)initial.data + b * (W - 1) * C + k0 : NULL;
    s->doc = tensor_given(doc) ? (const int32_t *)doc.data + b * s->T : NULL;
    const real *rows = (const real *)weight.data + k0 * W, *shift = (const real *)bias.data + k0;
    memset(s->taps, 0, sizeof s->taps);
    memset(s->bias, 0, sizeof s->bias);
    for (int64_t k = 0; k < s->count; k++) {
        for (int64_t w = 0; w < W; w++) s->taps[w][k] = rows[k * W + w];
        s->bias[k] = shift[k];
    }
}

/* Number of the document at time t; times before the row belong to document 0. */
static int32_t strip_document(const struct strip *s, int64_t t) {
    return s->doc && t >= 0 ? s->doc[t] : 0;
}

/* The input at time `tap` as the token at time t sees it. */
static const real *strip_input(const struct strip *s, int64_t tap, int64_t t) {
    if (strip_document(s, tap) != strip_document(s, t)) return zeros;
    if (tap >= 0) return s->x + tap * s->x_step;
    return s->initial ? s->initial + (s->W - 1 + tap) * s->C : zeros;
}

/* The rows of a strip lie too far apart for the processor to guess the next one: ask for those of time t, if it exists.
 * `reads` and `writes` are where time 0 is read and written. (Always inline: gcc drops calls of a function that does
 * nothing but this.) */
__attribute__((always_inline)) static inline void
strip_prefetch(const struct strip *s, int64_t t, const real *reads, int64_t reads_step, const real *writes,
               int64_t writes_step) {
    if (t < 0 || t >= s->T) return;
    for (int64_t k = 0; k < s->count; k += (int64_t)(64 / sizeof(real))) {
        __builtin_prefetch(reads + t * reads_step + k, 0);
        __builtin_prefetch(writes + t * writes_step + k, 1);
    }
}

/* c of one token into out[0..n). `W` is a constant where this is inlined, so that the loop over taps is unrolled. */
static inline void convolve(const struct strip *s, const real *const *rows, int64_t W, int64_t n,
                            real *restrict out) {
    for (int64_t k = 0; k < n; k++) {
        real sum = s->bias[k];
        for (int64_t w = 0; w < W; w++) sum += s->taps[w][k] * rows[w][k];
        out[k] = sum;
    }
}

static void strip_convolve(const struct strip *s, int64_t t, const real **rows, real *out) {
    for (int64_t w = 0; w < s->W; w++) rows[w] = strip_input(s, t - (s->W - 1) + w, t);
    if (s->W == 4) convolve(s, rows, 4, s->count, out);
    else convolve(s, rows, s->W, s->count, out);
}

static void check_conv(tensor y, tensor x, tensor weight, tensor bias, tensor initial, tensor state, tensor doc) {
    int64_t B = x.dim[0], T = x.dim[1], C = x.dim[2], W = weight.dim[1];
    ASSERT(W >= 2 && W <= TAPS_MAX && B >= 1 && T >= 1 && C >= 1);
    CHECK_ROWS(x, B, T, C);
    CHECK_ROWS(y, B, T, C);
    CHECK_DENSE(weight, C, W);
    CHECK_DENSE(bias, C);
    CHECK_OPTIONAL(initial, B, W - 1, C);
    CHECK_OPTIONAL(state, B, W - 1, C);
    if (tensor_given(doc)) CHECK_INDEX(doc, B, T);
}

/* The last W-1 inputs, as a token after the last one would see them. */
static void store_final(tensor final, const struct strip *s, int64_t b) {
    for (int64_t j = 0; j < s->W - 1; j++) {
        real *out = (real *)final.data + (b * (s->W - 1) + j) * s->C + s->k0;
        memcpy(out, strip_input(s, s->T - (s->W - 1) + j, s->T - 1), (size_t)s->count * sizeof(real));
    }
}

void OP(conv_forward)(struct device *dev, tensor y, tensor final, tensor x, tensor weight, tensor bias, tensor initial,
                      tensor doc, bool with_silu) {
    (void)dev;
    check_conv(y, x, weight, bias, initial, final, doc);
    int64_t B = x.dim[0], T = x.dim[1], C = x.dim[2];
#pragma omp parallel for collapse(3) schedule(static) if (B * T * C >= PARALLEL_MIN)
    for (int64_t b = 0; b < B; b++) {
        for (int64_t t0 = 0; t0 < T; t0 += TIMES) {
            for (int64_t k0 = 0; k0 < C; k0 += CHANNELS) {
                struct strip s;
                const real *rows[TAPS_MAX];
                real c[CHANNELS];
                strip_open(&s, x, weight, bias, initial, doc, b, k0);
                for (int64_t t = t0; t < T && t < t0 + TIMES; t++) {
                    real *first = (real *)y.data + b * y.stride[0] + k0, *out = first + t * y.stride[1];
                    strip_prefetch(&s, t + AHEAD, s.x, s.x_step, first, y.stride[1]);
                    strip_convolve(&s, t, rows, c);
                    for (int64_t k = 0; k < s.count; k++) out[k] = with_silu ? silu(c[k]) : c[k];
                }
                if (tensor_given(final) && t0 == 0) store_final(final, &s, b);
            }
        }
    }
}

/* What the input at time t receives from the tokens that read it, dc of which is in the ring, and, where it is among
 * the last W-1, from the final state. */
static void input_gradient(const struct strip *s, int64_t t, const real (*ring)[CHANNELS], const real *dfinal,
                           real *out) {
    real sum[CHANNELS] = {0};
    for (int64_t shift = 0; shift < s->W; shift++) {
        int64_t reader = t + shift;
        if (reader < 0 || reader >= s->T || strip_document(s, reader) != strip_document(s, t)) continue;
        const real *dc = ring[reader % RING], *tap = s->taps[s->W - 1 - shift];
        for (int64_t k = 0; k < CHANNELS; k++) sum[k] += tap[k] * dc[k];
    }
    int64_t place = t - (s->T - (s->W - 1));
    if (dfinal && place >= 0 && strip_document(s, t) == strip_document(s, s->T - 1))
        for (int64_t k = 0; k < s->count; k++) sum[k] += dfinal[place * s->C + k];
    memcpy(out, sum, (size_t)s->count * sizeof(real));
}

struct conv_gradients {
    tensor dx, dinitial, dy, dfinal;
    bool with_silu;
    real *partial; /* (B, W+1, C): dweight transposed, then dbias, of one batch row */
};

/* dc of the token at time t into the ring; its part of dweight and dbias. */
static void token_gradient(const struct strip *s, int64_t t, const real *dy, bool with_silu, real (*ring)[CHANNELS],
                           real (*dtaps)[CHANNELS], real *dbias) {
    const real *rows[TAPS_MAX];
    real c[CHANNELS], *dc = ring[t % RING];
    strip_convolve(s, t, rows, c);
    for (int64_t k = 0; k < s->count; k++) dc[k] = with_silu ? dy[k] * silu_derivative(c[k]) : dy[k];
    for (int64_t w = 0; w < s->W; w++)
        for (int64_t k = 0; k < s->count; k++) dtaps[w][k] += dc[k] * rows[w][k];
    for (int64_t k = 0; k < s->count; k++) dbias[k] += dc[k];
}

static void strip_backward(const struct strip *s, const struct conv_gradients *g, int64_t b) {
    real ring[RING][CHANNELS] = {{0}}, dtaps[TAPS_MAX][CHANNELS] = {{0}}, dbias[CHANNELS] = {0};
    int64_t before = s->W - 1;
    const real *dfinal = tensor_given(g->dfinal) ? (const real *)g->dfinal.data + b * before * s->C + s->k0 : NULL;
    const real *dy = (const real *)g->dy.data + b * g->dy.stride[0] + s->k0;
    real *dx = (real *)g->dx.data + b * g->dx.stride[0] + s->k0;
    for (int64_t t = s->T - 1; t >= 0; t--) {
        strip_prefetch(s, t - AHEAD, dy, g->dy.stride[1], dx, g->dx.stride[1]);
        strip_prefetch(s, t - AHEAD, s->x, s->x_step, dx, g->dx.stride[1]);
        token_gradient(s, t, dy + t * g->dy.stride[1], g->with_silu, ring, dtaps, dbias);
        input_gradient(s, t, (const real(*)[CHANNELS])ring, dfinal, dx + t * g->dx.stride[1]);
    }
    for (int64_t t = -1; tensor_given(g->dinitial) && t >= -before; t--) {
        real *out = (real *)g->dinitial.data + (b * before + before + t) * s->C + s->k0;
        input_gradient(s, t, (const real(*)[CHANNELS])ring, dfinal, out);
    }
    real *partial = g->partial + b * (s->W + 1) * s->C + s->k0;
    for (int64_t w = 0; w < s->W; w++) memcpy(partial + w * s->C, dtaps[w], (size_t)s->count * sizeof(real));
    memcpy(partial + s->W * s->C, dbias, (size_t)s->count * sizeof(real));
}

void OP(conv_backward)(struct device *dev, tensor dx, tensor dinitial, tensor dweight, tensor dbias, tensor dy,
                       tensor dfinal, tensor x, tensor weight, tensor bias, tensor initial, tensor doc, bool with_silu,
                       void *scratch) {
    (void)dev;
    int64_t B = x.dim[0], T = x.dim[1], C = x.dim[2], W = weight.dim[1];
    check_conv(dy, x, weight, bias, initial, dfinal, doc);
    check_conv(dx, x, dweight, dbias, dinitial, dfinal, doc);
    struct conv_gradients g = {dx, dinitial, dy, dfinal, with_silu, scratch};
    _Static_assert(RING >= TAPS_MAX, "the ring holds dc of every token that reads an input");
#pragma omp parallel for collapse(2) schedule(static) if (B * T * C >= PARALLEL_MIN)
    for (int64_t b = 0; b < B; b++) {
        for (int64_t k0 = 0; k0 < C; k0 += CHANNELS) {
            struct strip s;
            strip_open(&s, x, weight, bias, initial, doc, b, k0);
            strip_backward(&s, &g, b);
        }
    }
    real *sum_weight = dweight.data, *sum_bias = dbias.data;
    for (int64_t b = 0; b < B; b++) {
        const real *partial = g.partial + b * (W + 1) * C;
        for (int64_t k = 0; k < C; k++)
            for (int64_t w = 0; w < W; w++) sum_weight[k * W + w] += partial[w * C + k];
        for (int64_t k = 0; k < C; k++) sum_bias[k] += partial[W * C + k];
    }
}

size_t OP(conv_backward_scratch)(int64_t B, int64_t T, int64_t C, int64_t W) {
    (void)T;
    return (size_t)(B * (W + 1) * C) * sizeof(real);
}

void OP(conv_step)(struct device *dev, tensor y, tensor state, tensor x, tensor weight, tensor bias, bool with_silu) {
    (void)dev;
    int64_t B = x.dim[0], C = x.dim[1], W = weight.dim[1];
    ASSERT(W >= 2 && W <= TAPS_MAX);
    CHECK_ROWS(x, B, C);
    CHECK_ROWS(y, B, C);
    CHECK_DENSE(state, B, W - 1, C);
    CHECK_DENSE(weight, C, W);
    CHECK_DENSE(bias, C);
    const real *taps = weight.data, *shift = bias.data;
    for (int64_t b = 0; b < B; b++) {
        const real *now = row_of(x, b);
        real *out = row_of(y, b), *past = (real *)state.data + b * (W - 1) * C;
        for (int64_t k = 0; k < C; k++) {
            real sum = shift[k];
            for (int64_t w = 0; w < W - 1; w++) sum += taps[k * W + w] * past[w * C + k];
            sum += taps[k * W + W - 1] * now[k];
            out[k] = with_silu ? silu(sum) : sum;
        }
        memmove(past, past + C, (size_t)((W - 2) * C) * sizeof(real));
        memcpy(past + (W - 2) * C, now, (size_t)C * sizeof(real));
    }
}
