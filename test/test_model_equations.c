/* test_model_equations.c: the language model against a second one, written here from the equations alone: one token
 * after the other, one head or channel after the other, no chunks, no shared code. It says what the parallel forward
 * has to compute: the order of in_proj's and x_proj's columns, of the convolution's taps and of B and C's groups, the
 * step size, the skip, the gates and their caps, the norms, documents, the MLPs and the head. */
#include "test/support_model.h"
#include "test/unit.h"

#include "model/attention.h"
#include "model/mamba.h"
#include "model/mamba2.h"
#include "model/mlp.h"
#include "model/mlstm.h"
#include "model/mlstm_preup.h"
#include "model/pararnn.h"
#include "model/rat.h"
#include "model/slstm.h"
#include <math.h>

/* --- the second implementation ------------------------------------------------------------------ */

static double *weights_at(const struct lm *lm, int index) {
    double *values = malloc((size_t)model_params(lm->m)->list[index].count * sizeof *values);
    model_read_param(lm->m, index, values, DTYPE_F64);
    return values;
}

static double *weights(const struct lm *lm, const char *format, int block) {
    char name[LIMIT_NAME];
    snprintf(name, sizeof name, format, block);
    int index = params_find(model_params(lm->m), name);
    assert_true(index >= 0);
    return weights_at(lm, index);
}

static double sigmoid(double v) {
    return 1 / (1 + exp(-v));
}

static double soft_cap(double v, double cap) {
    return cap > 0 ? cap * tanh(v / cap) : v;
}

static double silu(double v) {
    return v / (1 + exp(-v));
}

static void multiply(double *y, const double *w, const double *x, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        y[i] = 0;
        for (int64_t j = 0; j < columns; j++) y[i] += w[i * columns + j] * x[j];
    }
}

static void layer_norm(double *y, const double *x, const double *w, int64_t n, double eps) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) mean += x[i] / (double)n;
    for (int64_t i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean) / (double)n;
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) / sqrt(variance + eps) * w[i];
}

static void rms_norm(double *y, const double *x, const double *w, int64_t n, double eps) {
    double mean = 0;
    for (int64_t i = 0; i < n; i++) mean += x[i] * x[i] / (double)n;
    for (int64_t i = 0; i < n; i++) y[i] = x[i] / sqrt(mean + eps) * w[i];
}

/* The convolution at time t: of a channel whose inputs stand `stride` numbers apart in time. */
static double convolution(const double *input, int64_t stride, const double *taps, int64_t W, double bias,
                          const int32_t *doc, int64_t t) {
    double sum = bias;
    for (int64_t back = 0; back < W && back <= t; back++)
        if (doc[t - back] == doc[t]) sum += taps[W - 1 - back] * input[(t - back) * stride];
    return sum;
}

static double convolved(const double *input, int64_t stride, const double *taps, int64_t W, double bias,
                        const int32_t *doc, int64_t t) {
    return silu(convolution(input, stride, taps, W, bias, doc, t));
}

static bool starts_document(const int32_t *doc, int64_t t) {
    return t == 0 || doc[t] != doc[t - 1];
}

/* --- Mamba */

enum { IN, CONV, CONV_BIAS, X, DT, DT_BIAS, A_LOG, D_SKIP, OUT, MAMBA_WEIGHTS };

/* One token of one row: h is the state of all channels, `past` the projections of the tokens before, t its time. */
static void mamba_token(double *y, double *h, double *past, const int32_t *doc, int64_t t, const double *input,
                        const struct mamba_sizes *s, double *const w[MAMBA_WEIGHTS]) {
    int64_t I = s->I, N = s->N, R = s->rank;
    double *p = past + t * 2 * I, *x = calloc((size_t)(2 * I + s->X), sizeof *x), *low = x + I, *u = low + s->X;
    multiply(p, w[IN], input, 2 * I, s->D);
    for (int64_t i = 0; i < I; i++)
        x[i] = convolved(past + i, 2 * I, w[CONV] + i * s->W, s->W, w[CONV_BIAS][i], doc, t);
    multiply(low, w[X], x, s->X, I);
    const double *B = low + R, *C = B + N;
    for (int64_t i = 0; i < I; i++) {
        double raw = w[DT_BIAS][i], sum = w[D_SKIP][i] * x[i];
        for (int64_t r = 0; r < R; r++) raw += w[DT][i * R + r] * low[r];
        double delta = log1p(exp(raw));
        for (int64_t n = 0; n < N; n++) {
            double decay = starts_document(doc, t) ? 0 : exp(-exp(w[A_LOG][i * N + n]) * delta);
            h[i * N + n] = decay * h[i * N + n] + delta * B[n] * x[i];
            sum += C[n] * h[i * N + n];
        }
        u[i] = sum * silu(p[I + i]);
    }
    multiply(y, w[OUT], u, s->D, I);
    free(x);
}

/* The mixer over one row: x, y (T, D). */
static void mamba_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                      const struct lm *lm) {
    static const char *const names[MAMBA_WEIGHTS] = {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
        "dt_proj.bias", "A_log", "D", "out_proj.weight"};
    struct mamba_sizes s = mamba_sizes(layer->options, layer->context.d_model);
    double *w[MAMBA_WEIGHTS];
    for (int i = 0; i < MAMBA_WEIGHTS; i++) {
        char format[LIMIT_NAME];
        snprintf(format, sizeof format, "backbone.layers.%%d.mixer.%s", names[i]);
        w[i] = weights(lm, format, layer->block);
    }
    double *h = calloc((size_t)(s.I * s.N), sizeof *h), *past = calloc((size_t)(2 * T * s.I), sizeof *past);
    for (int64_t t = 0; t < T; t++) mamba_token(y + t * s.D, h, past, doc, t, x + t * s.D, &s, w);
    free(h);
    free(past);
    for (int i = 0; i < MAMBA_WEIGHTS; i++) free(w[i]);
}

/* --- Mamba-2 */

struct mamba2_weights {
    double *in, *conv, *conv_bias, *dt_bias, *A_log, *D, *norm, *out;
};

static struct mamba2_weights mamba2_weights(const struct lm *lm, int block) {
    return (struct mamba2_weights){
        weights(lm, "backbone.layers.%d.mixer.in_proj.weight", block),
        weights(lm, "backbone.layers.%d.mixer.conv1d.weight", block),
        weights(lm, "backbone.layers.%d.mixer.conv1d.bias", block),
        weights(lm, "backbone.layers.%d.mixer.dt_bias", block),
        weights(lm, "backbone.layers.%d.mixer.A_log", block),
        weights(lm, "backbone.layers.%d.mixer.D", block),
        weights(lm, "backbone.layers.%d.mixer.norm.weight", block),
        weights(lm, "backbone.layers.%d.mixer.out_proj.weight", block),
    };
}

static void mamba2_weights_free(struct mamba2_weights *w) {
    double *all[] = {w->in, w->conv, w->conv_bias, w->dt_bias, w->A_log, w->D, w->norm, w->out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* One token of one row: S is the state of all heads, `past` the projections of the tokens before, t its time. */
static void mamba2_token(double *y, double *S, const double *past, const int32_t *doc, int64_t t, const double *x_in,
                         const struct mamba2_options *o, const struct mamba2_weights *w, int64_t d_model, double eps) {
    struct mamba2_sizes s = mamba2_sizes(o, d_model);
    double *p = (double *)past + t * s.E, *conv = calloc((size_t)s.C, sizeof *conv),
           *u = calloc((size_t)s.I, sizeof *u);
    multiply(p, w->in, x_in, s.E, s.D);
    for (int64_t c = 0; c < s.C; c++)
        conv[c] = convolved(past + s.I + c, s.E, w->conv + c * s.W, s.W, w->conv_bias[c], doc, t);
    for (int64_t h = 0; h < s.H; h++) {
        double dt = log1p(exp(p[s.I + s.C + h] + w->dt_bias[h]));
        dt = fmax(dt, o->dt_limit_min);
        if (o->dt_limit_max > 0) dt = fmin(dt, o->dt_limit_max);
        double decay = starts_document(doc, t) ? 0 : exp(-exp(w->A_log[h]) * dt);
        const double *B = conv + s.I + h / (s.H / s.G) * s.N, *C = B + s.G * s.N;
        for (int64_t i = 0; i < s.P; i++) {
            double x = conv[h * s.P + i], sum = w->D[h] * x, *row = S + (h * s.P + i) * s.N;
            for (int64_t n = 0; n < s.N; n++) {
                row[n] = decay * row[n] + dt * x * B[n];
                sum += row[n] * C[n];
            }
            u[h * s.P + i] = sum * silu(p[h * s.P + i]);
        }
    }
    int64_t group = s.I / s.G;
    for (int64_t g = 0; g < s.G; g++) rms_norm(u + g * group, u + g * group, w->norm + g * group, group, eps);
    multiply(y, w->out, u, s.D, s.I);
    free(conv);
    free(u);
}

static void mamba2_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                       const struct lm *lm) {
    const struct mamba2_options *o = layer->options;
    struct mamba2_sizes s = mamba2_sizes(o, layer->context.d_model);
    struct mamba2_weights w = mamba2_weights(lm, layer->block);
    double *S = calloc((size_t)(s.I * s.N), sizeof *S), *past = calloc((size_t)(T * s.E), sizeof *past);
    for (int64_t t = 0; t < T; t++)
        mamba2_token(y + t * s.D, S, past, doc, t, x + t * s.D, o, &w, s.D, layer->context.norm_eps);
    free(S);
    free(past);
    mamba2_weights_free(&w);
}

/* --- mLSTM */

enum { W_Q, W_K, W_V, W_O, W_I, W_F, BIAS_I, BIAS_F, HEAD_NORM, W_OUT, MLSTM_WEIGHTS };

/* One head's memory after one more token, and what it reads there: the state without the scale exp(m) that keeps the
 * layer's in range, so that 1 is the normaliser's floor, and eps, which is given in the layer's units, is 0. */
static void mlstm_head(double *h, double *C, double *n, const double *q, const double *k, const double *v, double i,
                       double f, int64_t K, int64_t V, const struct mlstm_options *o) {
    double in = o->input_gate == MLSTM_GATE_SIGMOID ? sigmoid(i) : exp(i), keep = sigmoid(f), norm = 0;
    for (int64_t a = 0; a < K; a++) {
        n[a] = keep * n[a] + in * k[a];
        norm += n[a] * q[a] / sqrt((double)K);
        for (int64_t b = 0; b < V; b++) C[a * V + b] = keep * C[a * V + b] + in * k[a] * v[b];
    }
    for (int64_t b = 0; b < V; b++) {
        h[b] = 0;
        for (int64_t a = 0; a < K; a++) h[b] += C[a * V + b] * q[a] / sqrt((double)K);
        if (o->normalise) h[b] /= fmax(fabs(norm), 1);
    }
}

/* One token of one row: C and n are the states of all heads, behind each other. */
static void mlstm_token(double *y, double *C, double *n, const double *input, const struct layer *layer,
                        double *const w[MLSTM_WEIGHTS]) {
    const struct mlstm_options *o = layer->options;
    struct mlstm_sizes s = mlstm_sizes(o, layer->context.d_model);
    double *q = calloc((size_t)(s.E + 2 * s.H + s.HV), sizeof *q), *k = q + s.HK, *v = k + s.HK, *gate = v + s.HV;
    double *i = gate + s.HV, *f = i + s.H, *h = f + s.H;
    multiply(q, w[W_Q], input, s.HK, s.D);
    multiply(k, w[W_K], input, s.HK, s.D);
    multiply(v, w[W_V], input, s.HV, s.D);
    multiply(gate, w[W_O], input, s.HV, s.D);
    multiply(i, w[W_I], input, s.H, s.D);
    multiply(f, w[W_F], input, s.H, s.D);
    for (int64_t a = 0; a < s.H; a++) {
        i[a] = soft_cap(i[a] + w[BIAS_I][a], o->gate_soft_cap);
        f[a] = soft_cap(f[a] + w[BIAS_F][a], o->gate_soft_cap);
        mlstm_head(h + a * s.V, C + a * s.K * s.V, n + a * s.K, q + a * s.K, k + a * s.K, v + a * s.V, i[a], f[a], s.K,
                   s.V, o);
        layer_norm(h + a * s.V, h + a * s.V, w[HEAD_NORM] + a * s.V, s.V, layer->context.norm_eps);
    }
    for (int64_t b = 0; b < s.HV; b++) h[b] *= sigmoid(gate[b]);
    multiply(y, w[W_OUT], h, s.D, s.HV);
    free(q);
}

static void mlstm_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                      const struct lm *lm) {
    struct mlstm_sizes s = mlstm_sizes(layer->options, layer->context.d_model);
    double *w[MLSTM_WEIGHTS], *C = calloc((size_t)(s.HK * (s.V + 1)), sizeof *C), *n = C + s.HK * s.V;
    for (int i = 0; i < MLSTM_WEIGHTS; i++) w[i] = weights_at(lm, layer->first + i);
    for (int64_t t = 0; t < T; t++) {
        if (starts_document(doc, t)) memset(C, 0, (size_t)(s.HK * (s.V + 1)) * sizeof *C);
        mlstm_token(y + t * s.D, C, n, x + t * s.D, layer, w);
    }
    free(C);
    for (int i = 0; i < MLSTM_WEIGHTS; i++) free(w[i]);
}

/* --- the blocks of the xLSTM paper */

/* Block-diagonal: output j is made of the inputs of its own block alone. */
static void multiply_blocks(double *y, const double *w, const double *x, int64_t n, int64_t block) {
    for (int64_t b = 0; b < n / block; b++)
        multiply(y + b * block, w + b * block * block, x + b * block, block, block);
}

/* All tensors of a layer's mixer, in the table's order. */
enum { WEIGHTS_MAX = 16 };
static void layer_weights(double *w[WEIGHTS_MAX], const struct layer *layer, const struct lm *lm) {
    assert_true(layer->params <= WEIGHTS_MAX);
    for (int i = 0; i < WEIGHTS_MAX; i++) w[i] = NULL;
    for (int i = 0; i < layer->params; i++) w[i] = weights_at(lm, layer->first + i);
}

static void free_weights(double *w[WEIGHTS_MAX]) {
    for (int i = 0; i < WEIGHTS_MAX; i++) free(w[i]);
}

/* One token of the paper's mLSTM block: C and n are the states of all heads, n behind C; `past` holds what the
 * up-projection made of the tokens before, t is the token's time. */
static void mlstm_preup_token(double *y, double *C, double *n, double *past, const int32_t *doc, int64_t t,
                              const double *input, const struct mlstm_preup_sizes *s, double *const w[WEIGHTS_MAX],
                              double eps) {
    static const struct mlstm_options cell = {.normalise = true, .input_gate = MLSTM_GATE_EXP};
    enum { UP, CONV_W, CONV_B, Q, K, V, I_W, F_W, I_B, F_B, NORM, SKIP, DOWN };
    int64_t I = s->I, P = s->P;
    if (starts_document(doc, t)) memset(C, 0, (size_t)(I * (P + 1)) * sizeof *C);
    double *p = past + t * 2 * I, *xc = calloc((size_t)(5 * I), sizeof *xc), *qkv = xc + I, *g = qkv + 3 * I;
    multiply(p, w[UP], input, 2 * I, s->D);
    for (int64_t c = 0; c < I; c++)
        xc[c] = convolved(past + c, 2 * I, w[CONV_W] + c * s->W, s->W, w[CONV_B][c], doc, t);
    multiply_blocks(qkv, w[Q], xc, I, s->block);
    multiply_blocks(qkv + I, w[K], xc, I, s->block);
    multiply_blocks(qkv + 2 * I, w[V], p, I, s->block);
    for (int64_t h = 0; h < s->H; h++) {
        double i, f;
        multiply(&i, w[I_W] + h * 3 * I, qkv, 1, 3 * I);
        multiply(&f, w[F_W] + h * 3 * I, qkv, 1, 3 * I);
        mlstm_head(g + h * P, C + h * P * P, n + h * P, qkv + h * P, qkv + I + h * P, qkv + 2 * I + h * P,
                   i + w[I_B][h], f + w[F_B][h], P, P, &cell);
        layer_norm(g + h * P, g + h * P, w[NORM] + h * P, P, eps);
    }
    for (int64_t c = 0; c < I; c++) g[c] = (g[c] + w[SKIP][c] * xc[c]) * silu(p[I + c]);
    multiply(y, w[DOWN], g, s->D, I);
    free(xc);
}

static void mlstm_preup_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                            const struct lm *lm) {
    struct mlstm_preup_sizes s = mlstm_preup_sizes(layer->options, layer->context.d_model);
    double *w[WEIGHTS_MAX], *C = calloc((size_t)(s.I * (s.P + 1)), sizeof *C), *n = C + s.I * s.P;
    double *past = calloc((size_t)(2 * T * s.I), sizeof *past);
    layer_weights(w, layer, lm);
    for (int64_t t = 0; t < T; t++)
        mlstm_preup_token(y + t * s.D, C, n, past, doc, t, x + t * s.D, &s, w, layer->context.norm_eps);
    free_weights(w);
    free(C);
    free(past);
}

/* One token of the sLSTM: x is the layer's whole row, t the token's time, `memory` y, c, n, m of all units. */
static void slstm_token(double *y, double *memory, const double *x, const int32_t *doc, int64_t t,
                        const struct slstm_sizes *s, double *const w[WEIGHTS_MAX], double eps) {
    enum { GATES, R = 4, BIAS, NORM, CONV_W, CONV_B };
    int64_t D = s->D, P = s->P;
    double *raw = calloc((size_t)(6 * D), sizeof *raw), *u = raw + 4 * D, *last = u + D;
    if (starts_document(doc, t)) memset(memory, 0, (size_t)(4 * D) * sizeof *memory);
    memcpy(last, memory, (size_t)D * sizeof *last);
    for (int64_t c = 0; c < D; c++)
        u[c] = s->W ? convolved(x + c, D, w[CONV_W] + c * s->W, s->W, w[CONV_B][c], doc, t) : x[t * D + c];
    for (int g = 0; g < 4; g++) multiply_blocks(raw + g * D, w[GATES + g], g < 2 ? u : x + t * D, D, P);
    for (int64_t j = 0; j < D; j++) {
        double *c = memory + D + j, *n = c + D, *m = n + D, v[4];
        for (int g = 0; g < 4; g++) {
            const double *row = w[R] + ((j / P * 4 + g) * P + j % P) * P;
            v[g] = raw[g * D + j] + w[BIAS][g * D + j];
            for (int64_t k = 0; k < P; k++) v[g] += row[k] * last[j / P * P + k];
        }
        double decayed = *m - log1p(exp(-v[1])), most = *n == 0 ? v[0] : fmax(v[0], decayed);
        double add = exp(v[0] - most), keep = *n == 0 ? 0 : exp(decayed - most);
        *c = keep * *c + add * tanh(v[2]);
        *n = keep * *n + add;
        *m = most;
        memory[j] = y[j] = sigmoid(v[3]) * *c / *n;
    }
    for (int64_t h = 0; h < s->H; h++) layer_norm(y + h * P, y + h * P, w[NORM] + h * P, P, eps);
    free(raw);
}

static void slstm_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                      const struct lm *lm) {
    struct slstm_sizes s = slstm_sizes(layer->options, layer->context.d_model);
    double *w[WEIGHTS_MAX], *memory = calloc((size_t)(4 * s.D), sizeof *memory);
    layer_weights(w, layer, lm);
    for (int64_t t = 0; t < T; t++) slstm_token(y + t * s.D, memory, x, doc, t, &s, w, layer->context.norm_eps);
    free_weights(w);
    free(memory);
}

/* --- attention */

/* One head, normed where there is a weight, and rotated by the token's position. */
static void turn_head(double *head, const double *weight, int64_t P, double base, int64_t position, double eps) {
    if (weight) rms_norm(head, head, weight, P, eps);
    for (int64_t i = 0; base > 0 && i < P / 2; i++) {
        double angle = (double)position * pow(base, -2 * (double)i / (double)P), a = head[i], b = head[i + P / 2];
        head[i] = a * cos(angle) - b * sin(angle);
        head[i + P / 2] = b * cos(angle) + a * sin(angle);
    }
}

/* Tokens [first, t] for one head: o = softmax(q . k) v. */
static void attend(double *o, const double *q, const double *k, const double *v, int64_t step, int64_t P, int64_t first,
                   int64_t t) {
    double total = 0;
    memset(o, 0, (size_t)P * sizeof *o);
    for (int64_t j = first; j <= t; j++) {
        double dot = 0;
        for (int64_t c = 0; c < P; c++) dot += q[c] * k[j * step + c];
        double share = exp(dot / sqrt((double)P));
        total += share;
        for (int64_t c = 0; c < P; c++) o[c] += share * v[j * step + c];
    }
    for (int64_t c = 0; c < P; c++) o[c] /= total;
}

static void attention_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                          const struct lm *lm) {
    const struct attention_options *options = layer->options;
    struct attention_sizes s = attention_sizes(options, layer->context.d_model);
    enum { Q, K, V, O, Q_NORM, K_NORM };
    double *w[WEIGHTS_MAX], *k = calloc((size_t)(2 * T * s.GP + 2 * s.HP), sizeof *k), *v = k + T * s.GP;
    double *q = v + T * s.GP, *o = q + s.HP, eps = layer->context.norm_eps;
    layer_weights(w, layer, lm);
    for (int64_t t = 0, start = 0; t < T; t++) {
        if (starts_document(doc, t)) start = t;
        multiply(q, w[Q], x + t * s.D, s.HP, s.D);
        multiply(k + t * s.GP, w[K], x + t * s.D, s.GP, s.D);
        multiply(v + t * s.GP, w[V], x + t * s.D, s.GP, s.D);
        for (int64_t h = 0; h < s.H; h++) turn_head(q + h * s.P, w[Q_NORM], s.P, options->rope_base, t - start, eps);
        for (int64_t g = 0; g < s.G; g++)
            turn_head(k + t * s.GP + g * s.P, w[K_NORM], s.P, options->rope_base, t - start, eps);
        int64_t first = options->window > 0 && t - options->window >= start ? t - options->window + 1 : start;
        for (int64_t h = 0; h < s.H; h++) {
            int64_t g = h * s.G / s.H;
            attend(o + h * s.P, q + h * s.P, k + g * s.P, v + g * s.P, s.GP, s.P, first, t);
        }
        multiply(y + t * s.D, w[O], o, s.D, s.HP);
    }
    free_weights(w);
    free(k);
}

/* --- RAT */

/* The score of a query with a key, both turned by their chunks. */
static double rat_score(const double *q, const double *k, int64_t P, double base, int64_t q_chunk, int64_t k_chunk) {
    double turned_q[64], turned_k[64], dot = 0;
    assert_true(P <= 64);
    memcpy(turned_q, q, (size_t)P * sizeof *q);
    memcpy(turned_k, k, (size_t)P * sizeof *k);
    turn_head(turned_q, NULL, P, base, q_chunk, 0);
    turn_head(turned_k, NULL, P, base, k_chunk, 0);
    for (int64_t c = 0; c < P; c++) dot += turned_q[c] * turned_k[c];
    return exp(dot / sqrt((double)P));
}

static void rat_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                    const struct lm *lm) {
    const struct rat_options *options = layer->options;
    struct rat_sizes s = rat_sizes(options, layer->context.d_model);
    double *w[WEIGHTS_MAX], *p = calloc((size_t)(s.E + s.D), sizeof *p), *out = p + s.E;
    double *keys = calloc((size_t)(2 * T * s.D), sizeof *keys), *values = keys + T * s.D;
    layer_weights(w, layer, lm);
    for (int64_t t = 0, start = 0; t < T; t++) {
        if (starts_document(doc, t)) start = t;
        int64_t chunk = (t - start) / s.Q;
        bool first = (t - start) % s.Q == 0;
        multiply(p, w[0], x + t * s.D, s.E, s.D);
        for (int64_t i = 0; i < s.D; i++) {
            double a = sigmoid(p[2 * s.D + i] + w[1][i]), k = p[3 * s.D + s.G * s.P + i / s.P % s.G * s.P + i % s.P];
            keys[t * s.D + i] = (first ? 0 : a * keys[(t - 1) * s.D + i]) + (1 - a) * k;
            values[t * s.D + i] = (first ? 0 : a * values[(t - 1) * s.D + i]) + (1 - a) * p[s.D + i];
        }
        for (int64_t h = 0; h < s.H; h++) {
            double total = 0, o[64] = {0};
            for (int64_t j = 0; j <= chunk; j++) {
                int64_t at = j == chunk ? t : start + j * s.Q + s.Q - 1;
                const double *q = p + 3 * s.D + h % s.G * s.P;
                double share = rat_score(q, keys + at * s.D + h * s.P, s.P, options->rope_base, chunk, j);
                total += share;
                for (int64_t c = 0; c < s.P; c++) o[c] += share * values[at * s.D + h * s.P + c];
            }
            for (int64_t c = 0; c < s.P; c++) out[h * s.P + c] = sigmoid(p[h * s.P + c]) * o[c] / total;
        }
        multiply(y + t * s.D, w[2], out, s.D, s.D);
    }
    free_weights(w);
    free(p);
    free(keys);
}

/* --- ParaRNN */

/* One channel's step: state s (c, h of the LSTM), what enters in u, weights in w. The LSTM's output gate sees the new
 * c. */
static double cell_token(const char *cell, double s[2], const double u[3], const double w[5]) {
    if (strcmp(cell, "gru") == 0) {
        double z = sigmoid(w[0] * s[0] + u[0]), r = sigmoid(w[1] * s[0] + u[1]), c = tanh(w[2] * (r * s[0]) + u[2]);
        return s[0] = z * c + (1 - z) * s[0];
    }
    if (strcmp(cell, "mgru") == 0) {
        double f = sigmoid(w[0] * s[0] + u[0]), c = tanh(w[1] * s[0] + u[1]);
        return s[0] = (1 - f) * s[0] + f * c;
    }
    double f = sigmoid(w[0] * s[1] + w[3] * s[0] + u[0]), q = tanh(w[2] * s[1] + u[2]);
    s[0] = f * s[0] + (1 - f) * q;
    double o = sigmoid(w[1] * s[1] + w[4] * s[0] + u[1]);
    return s[1] = o * tanh(s[0]);
}

/* What enters channel i of the cell with the convolution's output c: from the channels of its head. */
static void cell_inputs(double u[3], const double *c, const double *w, const double *bias, int64_t i,
                        const struct pararnn_sizes *s) {
    int64_t P = s->D / s->H, h = i / P;
    for (int64_t v = 0; v < s->U; v++) {
        u[v] = bias[v * s->D + i];
        for (int64_t k = 0; k < P; k++) u[v] += w[((h * s->U + v) * P + i % P) * P + k] * c[h * P + k];
    }
}

static void pararnn_row(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                        const struct lm *lm) {
    enum { AZ, PROJ, BIAS, CELL, GAIN, BACK, TAPS, SHIFT };
    const struct pararnn_options *options = layer->options;
    struct pararnn_sizes s = pararnn_sizes(options, layer->context.d_model);
    double *w[WEIGHTS_MAX], *p = calloc((size_t)(2 * (T + 3) * s.D), sizeof *p), *c = p + 2 * T * s.D;
    double *out = c + s.D, *state = out + s.D;
    bool norm_first = options->gate_order == PARARNN_NORM_FIRST;
    layer_weights(w, layer, lm);
    for (int64_t t = 0; t < T; t++) {
        double *a = p + t * 2 * s.D, *z = a + s.D;
        multiply(a, w[AZ], x + t * s.D, 2 * s.D, s.D);
        for (int64_t i = 0; i < s.D; i++) {
            double v = s.W > 0 ? convolution(p + i, 2 * s.D, w[TAPS] + i * s.W, s.W, w[SHIFT][i], doc, t) : a[i];
            c[i] = s.W > 0 && options->conv_silu ? silu(v) : v;
        }
        for (int64_t i = 0; i < s.D; i++) {
            double u[3], weight[5];
            for (int64_t v = 0; v < s.V; v++) weight[v] = w[CELL][v * s.D + i];
            if (starts_document(doc, t)) state[2 * i] = state[2 * i + 1] = 0;
            cell_inputs(u, c, w[PROJ], w[BIAS], i, &s);
            out[i] = cell_token(s.cell->name, state + 2 * i, u, weight);
        }
        for (int64_t i = 0; i < s.D && !norm_first; i++) out[i] *= silu(z[i]);
        rms_norm(out, out, w[GAIN], s.D, layer->context.norm_eps);
        for (int64_t i = 0; i < s.D && norm_first; i++) out[i] *= silu(z[i]);
        multiply(y + t * s.D, w[BACK], out, s.D, s.D);
    }
    free_weights(w);
    free(p);
}

/* --- the rest of the model */

typedef void row_function(double *y, const double *x, const int32_t *doc, int64_t T, const struct layer *layer,
                          const struct lm *lm);
static const struct {
    const struct mixer *mixer;
    row_function *row;
} mixer_rows[] = {
    {&mixer_mamba, mamba_row},
    {&mixer_mamba2, mamba2_row},
    {&mixer_mlstm, mlstm_row},
    {&mixer_mlstm_preup, mlstm_preup_row},
    {&mixer_slstm, slstm_row},
    {&mixer_attention, attention_row},
    {&mixer_rat, rat_row},
    {&mixer_pararnn, pararnn_row},
};

static row_function *row_of(const struct mixer *mixer) {
    for (size_t i = 0; i < sizeof mixer_rows / sizeof *mixer_rows; i++)
        if (mixer_rows[i].mixer == mixer) return mixer_rows[i].row;
    fail_msg("%s has no second implementation", mixer->name);
    return NULL;
}

static double activated(double v, enum mlp_kind kind) {
    if (kind == MLP_RELU2) return fmax(v, 0) * fmax(v, 0);
    return kind == MLP_SWIGLU ? silu(v) : v * erfc(-v / sqrt(2)) / 2;
}

static void mlp_row(double *y, const double *x, int64_t T, const struct layer *layer, const struct lm *lm) {
    const struct mlp_options *o = layer->options;
    int64_t F = o->width, D = layer->context.d_model;
    bool gated = mlp_gated(o);
    double *gate = gated ? weights_at(lm, layer->first) : NULL, *up = weights_at(lm, layer->first + gated);
    double *down = weights_at(lm, layer->first + gated + 1), *h = calloc((size_t)(2 * F), sizeof *h), *g = h + F;
    for (int64_t t = 0; t < T; t++) {
        multiply(h, up, x + t * D, F, D);
        if (gated) multiply(g, gate, x + t * D, F, D);
        for (int64_t i = 0; i < F; i++) h[i] = gated ? activated(g[i], o->kind) * h[i] : activated(h[i], o->kind);
        multiply(y + t * D, down, h, D, F);
    }
    double *all[] = {gate, up, down, h};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Logits (T, rows) of one row of tokens. */
static void second_model(double *logits, const struct lm *lm, const int32_t *ids, const int32_t *doc, int64_t T) {
    const struct model_config *mc = lm->mc;
    int64_t D = mc->options.d_model;
    void (*normalise)(double *, const double *, const double *, int64_t, double) =
        mc->options.norm == MODEL_NORM_LAYER ? layer_norm : rms_norm;
    double *E = weights_at(lm, mc->embedding), *head = weights_at(lm, mc->head);
    double *final = weights_at(lm, mc->final_norm);
    double *r = calloc((size_t)(T * D), sizeof *r), *x = calloc((size_t)(T * D), sizeof *x);
    double *y = calloc((size_t)(T * D), sizeof *y);
    for (int64_t t = 0; t < T; t++) memcpy(r + t * D, E + ids[t] * D, (size_t)D * sizeof *r);
    for (int i = 0; i < mc->layer_count; i++) {
        const struct layer *layer = &mc->layers[i];
        double *norm = weights_at(lm, layer->norm);
        for (int64_t t = 0; t < T; t++) normalise(x + t * D, r + t * D, norm, D, mc->options.norm_eps);
        if (layer->is_mlp) mlp_row(y, x, T, layer, lm);
        else row_of(layer->mixer)(y, x, doc, T, layer, lm);
        double *scale = layer->scale >= 0 ? weights_at(lm, layer->scale) : NULL;
        for (int64_t k = 0; k < T * D; k++) r[k] = (scale ? scale[k % D] : 1) * r[k] + y[k];
        free(scale);
        free(norm);
    }
    for (int64_t t = 0; t < T; t++) {
        double *row = logits + t * mc->rows;
        normalise(x + t * D, r + t * D, final, D, mc->options.norm_eps);
        multiply(row, head, x + t * D, mc->rows, D);
        for (int64_t v = 0; v < mc->rows; v++) row[v] = soft_cap(row[v], mc->options.logit_cap);
    }
    double *all[] = {E, head, final, r, x, y};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* --- comparison --------------------------------------------------------------------------------- */

#define MODEL "[model]\nd_model = 12\nvocab_size = 19\npad_vocab_to = 4\n"
#define BLOCK "[block.m]\nmixer = mamba2\nd_state = 6\nhead_dim = 4\nchunk = 5\n"
#define MAMBA "[block.s]\nmixer = mamba\nd_state = 5\n"
#define PREUP "[block.u]\nmixer = mlstm_preup\nheads = 2\neps = 0\nchunk = 5\n"
#define PARARNN "[block.p]\nmixer = pararnn\n"
#define SLSTM "[block.y]\nmixer = slstm\nheads = 3\n"
#define MLSTM "[block.x]\nmixer = mlstm\nheads = 2\neps = 0\nchunk = 5\n"

static void compare(const char *text, enum precision precision, int64_t T, double limit) {
    struct lm lm;
    const int64_t B = 2;
    lm_open(&lm, text, precision, MODEL_INFER, B, T);
    for (int documents = 0; documents < 2; documents++) {
        struct tokens t = tokens_draw(B, T, 19, (uint64_t)T);
        if (!documents) memset(t.doc, 0, (size_t)(B * T) * sizeof *t.doc);
        double *want = malloc((size_t)(B * T * lm.mc->rows) * sizeof *want);
        for (int64_t b = 0; b < B; b++) second_model(want + b * T * lm.mc->rows, &lm, t.ids + b * T, t.doc + b * T, T);
        lm_set(&lm, &t, documents);
        model_forward(lm.m, NULL, NULL, false);
        double *got = lm_read_logits(&lm, 0, B * T);
        double distance = relative_error(got, want, B * T * lm.mc->rows);
        if (!(distance < lm_limit(limit)))
            fail_msg("T = %d%s: logits differ by %g, allowed %g:\n%s", (int)T, documents ? " with documents" : "",
                     distance, lm_limit(limit), text);
        free(got);
        free(want);
        tokens_free(&t);
    }
    lm_close(&lm);
}

static void compare_lengths(const char *text) {
    static const int64_t lengths[] = {1, 2, 4, 5, 6, 11, 23, 67};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) compare(text, PRECISION_F64, lengths[i], 1e-12);
    compare(text, PRECISION_F32, 23, 1e-5);
}

static void test_plain(void **state) {
    (void)state;
    compare_lengths(MODEL "pattern = m*3\n" BLOCK);
}

static void test_groups_and_conv(void **state) {
    (void)state;
    compare_lengths(MODEL "pattern = m*2\n" BLOCK "n_groups = 3\nd_conv = 2\n");
    compare_lengths(
        MODEL
        "pattern = m\n"
        "[block.m]\nmixer = mamba2\nd_state = 3\nchunk = 4\nn_groups = 2\nexpand = 1\nd_conv = 8\nhead_dim = 1\n");
}

static void test_mlp_and_untied(void **state) {
    (void)state;
    compare_lengths(MODEL "tie_embeddings = false\npattern = m k\n" BLOCK "mlp = swiglu\nmlp_width = 10\n"
                          "[block.k]\nmixer = mamba2\nhead_dim = 24\nd_state = 1\nchunk = 1\n");
}

static void test_limits_and_eps(void **state) {
    (void)state;
    compare_lengths(MODEL "norm_eps = 0.1\npattern = m*2\n" BLOCK "dt_limit_min = 0.01\ndt_limit_max = 0.04\n");
}

static void test_mamba(void **state) {
    (void)state;
    compare_lengths(MODEL "pattern = s*3\n" MAMBA);
    compare_lengths(MODEL "norm_eps = 0.1\ntie_embeddings = false\npattern = s\n" MAMBA
                          "expand = 3\nd_conv = 2\ndt_rank = 7\nmlp = swiglu\nmlp_width = 10\n");
}

static void test_mlstm(void **state) {
    (void)state;
    compare_lengths(MODEL "tie_embeddings = false\nlogit_cap = 3\npattern = x*3\n" MLSTM
                          "mlp = swiglu\nmlp_width = 10\n");
    compare_lengths(MODEL "pattern = x k\n" MLSTM "input_gate = sigmoid\nnormalise = false\nqk_factor = 1.5\n"
                          "[block.k]\nmixer = mlstm\nheads = 3\neps = 0\nv_factor = 0.5\ninput_gate = sigmoid\n"
                          "gate_soft_cap = 0.5\nchunk = 64\n");
    compare_lengths(MODEL "pattern = x\n" MLSTM "gate_soft_cap = 0\n");
}

static void test_mlstm_preup(void **state) {
    (void)state;
    compare_lengths(MODEL "norm = layer\npattern = u*3\n" PREUP);
    compare_lengths(MODEL "norm_eps = 0.1\ntie_embeddings = false\npattern = u\n" PREUP
                          "expand = 6\nd_conv = 2\nqkv_block = 8\n");
}

static void test_slstm(void **state) {
    (void)state;
    compare_lengths(MODEL "norm = layer\npattern = y*3\n" SLSTM "mlp = geglu\nmlp_width = 10\n");
    compare_lengths(MODEL "norm_eps = 0.1\npattern = y*2\n" SLSTM "d_conv = 0\n");
    compare_lengths(MODEL "pattern = y\n[block.y]\nmixer = slstm\nheads = 1\nd_conv = 3\nrecurrent_init = uniform\n");
}

static void test_norm_and_cap(void **state) {
    (void)state;
    compare_lengths(MODEL "norm = layer\nlogit_cap = 0.5\npattern = s m\n" MAMBA BLOCK);
    compare_lengths(MODEL "norm = layer\nnorm_eps = 0.1\ntie_embeddings = false\npattern = m\n" BLOCK);
}

static void test_mlps(void **state) {
    (void)state;
    compare_lengths(MODEL "pattern = m k s\n" BLOCK "mlp = geglu\nmlp_width = 10\n"
                          "[block.k]\nmixer = mamba2\nhead_dim = 24\nd_state = 1\nmlp = gelu\nmlp_width = 7\n" MAMBA
                          "mlp = relu2\nmlp_width = 16\n");
}

static void test_attention(void **state) {
    (void)state;
    compare_lengths(MODEL "tie_embeddings = false\npattern = a*2\n[block.a]\nmixer = attention\nheads = 3\n"
                          "mlp = swiglu\nmlp_width = 16\n");
    compare_lengths(MODEL "norm_eps = 0.1\npattern = a b m\n[block.a]\nmixer = attention\nheads = 6\nkv_heads = 2\n"
                          "head_dim = 4\nwindow = 5\nrope_base = 50\n"
                          "[block.b]\nmixer = attention\nheads = 2\nkv_heads = 1\nqk_norm = true\n" BLOCK);
    compare_lengths(MODEL "pattern = a\n[block.a]\nmixer = attention\nheads = 2\nrope_base = 0\nwindow = 1\n");
}

static void test_rat(void **state) {
    (void)state;
    compare_lengths(MODEL "pattern = r*2\n[block.r]\nmixer = rat\nheads = 2\nchunk = 4\nmlp = gelu\nmlp_width = 16\n");
    compare_lengths(MODEL "tie_embeddings = false\npattern = r a q\n[block.r]\nmixer = rat\nheads = 6\ngroups = 3\n"
                          "chunk = 1\nrope_base = 20\n[block.a]\nmixer = attention\nheads = 3\nwindow = 3\n"
                          "[block.q]\nmixer = rat\nheads = 1\ngroups = 1\nchunk = 100\nrope_base = 0\n");
}

static void test_pararnn(void **state) {
    (void)state;
    compare_lengths(MODEL "pattern = p*2\n" PARARNN "cell = gru\nheads = 3\nsolver = sequential\n");
    compare_lengths(MODEL "norm = layer\ntie_embeddings = false\npattern = p q m\n"
                          PARARNN "cell = lstm\nheads = 4\nresidual_scale = true\nsolver = newton\niterations = 20\n"
                          "mlp = swiglu\nmlp_width = 16\n"
                          "[block.q]\nmixer = pararnn\ncell = mgru\nheads = 1\nd_conv = 0\ngate_order = norm_first\n"
                          "residual_scale = true\nsolver = shooting\nchunk = 6\niterations = 12\n" BLOCK
                          "residual_scale = true\n");
    compare_lengths(MODEL "pattern = p\n" PARARNN "cell = gru\nheads = 12\nd_conv = 3\nconv_silu = false\n");
}

static void test_hybrid(void **state) {
    (void)state;
    compare_lengths(MODEL "pattern = (u y)*2 m\n" PREUP SLSTM "mlp = geglu\nmlp_width = 6\n" BLOCK);
    compare_lengths(MODEL "pattern = (s m x)*2 s\n" BLOCK "mlp = swiglu\nmlp_width = 6\n" MAMBA MLSTM);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_groups_and_conv),
        cmocka_unit_test(test_mlp_and_untied),
        cmocka_unit_test(test_limits_and_eps),
        cmocka_unit_test(test_mamba),
        cmocka_unit_test(test_mlstm),
        cmocka_unit_test(test_norm_and_cap),
        cmocka_unit_test(test_mlps),
        cmocka_unit_test(test_mlstm_preup),
        cmocka_unit_test(test_slstm),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_rat),
        cmocka_unit_test(test_pararnn),
        cmocka_unit_test(test_hybrid),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
