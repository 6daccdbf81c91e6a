/* support_model.c: the small models of the tests, see support_model.h. */
#include "test/support_model.h"
#include "test/unit.h"

#include "common/rng.h"
#include <math.h>

#define MUST(call, err)                                                                                                \
    do {                                                                                                               \
        if ((call) != 0) fail_msg("%s: %s", #call, (err).text);                                                        \
    } while (0)

#define MODEL "[model]\nd_model = 16\nvocab_size = 29\npad_vocab_to = 8\n"
#define BLOCK "[block.m]\nmixer = mamba2\nd_state = 8\nhead_dim = 8\nchunk = 4\n"
#define MAMBA "[block.s]\nmixer = mamba\nd_state = 5\n"
/* What the small heads put out is small beside what the usual eps of the norm behind them leaves room for, and then all
 * derivatives are large. The mLSTM's own eps keeps its gradient from being exact: what it is measured by is held fixed.
 */
#define STEADY "norm_eps = 0.1\n"
#define PREUP "[block.u]\nmixer = mlstm_preup\nheads = 2\nchunk = 4\neps = 0\n"
#define SLSTM "[block.y]\nmixer = slstm\nheads = 2\n"
#define MLSTM "[block.x]\nmixer = mlstm\nheads = 2\neps = 0\nchunk = 4\n"
#define RAT "[block.r]\nmixer = rat\nheads = 4\nchunk = 3\n"
#define PARARNN "[block.p]\nmixer = pararnn\n"
#define ATTENTION "[block.a]\nmixer = attention\nheads = 4\n"
const char *const lm_models[] = {
    MODEL "pattern = m*2\n" BLOCK,
    MODEL "tie_embeddings = false\npattern = m k\n" BLOCK "n_groups = 2\nmlp = swiglu\nmlp_width = 24\n"
          "[block.k]\nmixer = mamba2\nhead_dim = 16\nd_state = 4\nd_conv = 2\nchunk = 64\n",
    MODEL "pattern = s*2\n" MAMBA,
    MODEL "tie_embeddings = false\npattern = s m\n" MAMBA "dt_rank = 3\nd_conv = 2\nmlp = swiglu\nmlp_width = 24\n"
          BLOCK,
    MODEL STEADY "tie_embeddings = false\nlogit_cap = 3\npattern = x*2\n" MLSTM "mlp = swiglu\nmlp_width = 24\n",
    MODEL STEADY "norm = layer\npattern = x s k\n" MLSTM "input_gate = sigmoid\nnormalise = false\nqk_factor = 1\n"
          "mlp = gelu\nmlp_width = 20\n" MAMBA "mlp = relu2\nmlp_width = 24\n"
          "[block.k]\nmixer = mlstm\nheads = 4\neps = 0\nv_factor = 0.5\ninput_gate = sigmoid\ngate_soft_cap = 0\n"
          "mlp = geglu\nmlp_width = 24\n",
    MODEL STEADY "pattern = u*2\n" PREUP,
    MODEL STEADY "norm = layer\ntie_embeddings = false\npattern = u y m\n"
          "[block.u]\nmixer = mlstm_preup\nheads = 4\nd_conv = 2\nqkv_block = 8\neps = 0\n"
          SLSTM "mlp = geglu\nmlp_width = 24\n" BLOCK,
    MODEL "pattern = y*2\n[block.y]\nmixer = slstm\nheads = 4\nd_conv = 0\nrecurrent_init = uniform\n",
    MODEL "tie_embeddings = false\npattern = a*2\n" ATTENTION "kv_heads = 2\nmlp = swiglu\nmlp_width = 24\n",
    MODEL "pattern = r*2\n" RAT,
    MODEL "tie_embeddings = false\npattern = r a s\n[block.r]\nmixer = rat\nheads = 4\ngroups = 4\nchunk = 5\n"
          "rope_base = 100\nmlp = gelu\nmlp_width = 24\n" ATTENTION "window = 4\n" MAMBA,
    MODEL "pattern = a m a\n" ATTENTION "window = 5\nkv_heads = 1\nhead_dim = 6\nqk_norm = true\n" BLOCK
          "mlp = gelu\nmlp_width = 24\n",
    MODEL "pattern = p*2\n" PARARNN "cell = gru\nsolver = sequential\nresidual_scale = true\n",
    MODEL STEADY "norm = layer\ntie_embeddings = false\ninit = open_lm\npattern = p q*2 s\n"
          PARARNN "cell = lstm\nheads = 2\nsolver = newton\niterations = 16\ngate_order = norm_first\n"
          "residual_scale = true\nmlp = swiglu\nmlp_width = 24\n"
          "[block.q]\nmixer = pararnn\ncell = gru\nheads = 8\nd_conv = 2\nconv_silu = false\nsolver = shooting\n"
          "chunk = 4\niterations = 8\nresidual_scale = true\n" MAMBA,
    MODEL "pattern = p a p\n" PARARNN "cell = mgru\nheads = 1\nd_conv = 0\nbounded = false\nsolver = newton\n"
          "iterations = 16\nmlp = gelu\nmlp_width = 24\n" ATTENTION "residual_scale = true\n",
};
const int lm_model_count = sizeof lm_models / sizeof *lm_models;

struct model_config *lm_config(config **c, const char *text) {
    error err = {0};
    struct model_config *mc = NULL;
    MUST(config_parse(c, text, strlen(text), "test", &err), err);
    MUST(model_config_bind(&mc, *c, 0, &err), err);
    MUST(config_finish(*c, &err), err);
    return mc;
}

bool lm_on_gpu(void) {
    const char *device = getenv("RIVERRUN_TEST_DEVICE");
    return device && strcmp(device, "cuda") == 0;
}

double lm_limit(double of_f64) {
    const double of_f32 = 2e-5;
    return lm_on_gpu() && of_f64 < of_f32 ? of_f32 : of_f64;
}

static void open_on(struct lm *lm, const char *text, enum device_kind kind, enum precision precision,
                    enum model_mode mode, int64_t B, int64_t T) {
    error err = {0};
    lm->mc = lm_config(&lm->c, text);
    MUST(device_open(&lm->dev, kind, precision, &err), err);
    MUST(model_open(&lm->m, lm->mc, lm->dev, mode, B, T, 0, 1, &err), err);
    lm->real = dtype_size(lm->dev->ops->real);
    lm_jitter(lm, 1);
}

void lm_open(struct lm *lm, const char *text, enum precision precision, enum model_mode mode, int64_t B, int64_t T) {
    if (lm_on_gpu() && precision == PRECISION_F64) precision = PRECISION_F32;
    open_on(lm, text, lm_on_gpu() ? DEVICE_CUDA : DEVICE_CPU, precision, mode, B, T);
}

void lm_open_cpu(struct lm *lm, const char *text, enum precision precision, enum model_mode mode, int64_t B,
                 int64_t T) {
    open_on(lm, text, DEVICE_CPU, precision, mode, B, T);
}

void lm_close(struct lm *lm) {
    error err = {0};
    MUST(device_check(lm->dev, &err), err); /* a kernel that did not start leaves what was there */
    model_close(lm->m);
    device_close(lm->dev);
    model_config_free(lm->mc);
    config_free(lm->c);
}

void lm_jitter(struct lm *lm, uint64_t seed) {
    model_init(lm->m, seed);
    const struct params *p = model_params(lm->m);
    for (int i = 0; i < p->count; i++) {
        double *values = malloc((size_t)p->list[i].count * sizeof *values);
        rng_key key = {.seed = seed, .purpose = RNG_TEST, .stream = (uint32_t)i};
        model_read_param(lm->m, i, values, DTYPE_F64);
        /* Input gates that start closed would hide what is behind them. */
        double scale = strstr(p->list[i].name, "igate") ? 0.1 : 1;
        for (int64_t k = 0; k < p->list[i].count; k++)
            values[k] = (float)(scale * values[k] + 0.1 * rng_normal(key, (uint64_t)k));
        model_write_param(lm->m, i, values, DTYPE_F64);
        free(values);
    }
}

void lm_copy_params(struct lm *to, const struct lm *from) {
    const struct params *p = model_params(from->m);
    for (int i = 0; i < p->count; i++) {
        double *values = malloc((size_t)p->list[i].count * sizeof *values);
        model_read_param(from->m, i, values, DTYPE_F64);
        model_write_param(to->m, i, values, DTYPE_F64);
        free(values);
    }
}

void lm_round(struct lm *lm) {
    const struct params *p = model_params(lm->m);
    for (int i = 0; i < p->count; i++) {
        float *values = malloc((size_t)p->list[i].count * sizeof *values);
        model_read_param(lm->m, i, values, DTYPE_F32);
        for (int64_t k = 0; k < p->list[i].count; k++) {
            uint32_t bits;
            memcpy(&bits, &values[k], sizeof bits);
            bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u; /* to even */
            memcpy(&values[k], &bits, sizeof bits);
        }
        model_write_param(lm->m, i, values, DTYPE_F32);
        free(values);
    }
}

/* --- batches ------------------------------------------------------------------------------------ */

static struct tokens tokens_new(int64_t B, int64_t T) {
    size_t bytes = (size_t)(B * T) * sizeof(int32_t);
    return (struct tokens){.B = B, .T = T, .ids = malloc(bytes), .targets = malloc(bytes), .doc = malloc(bytes)};
}

struct tokens tokens_draw(int64_t B, int64_t T, int64_t vocab, uint64_t seed) {
    struct tokens t = tokens_new(B, T);
    rng_key key = {.seed = seed, .purpose = RNG_TEST, .stream = 1000};
    uint64_t draw = 0;
    for (int64_t b = 0; b < B; b++) {
        int32_t doc = (int32_t)rng_below(key, draw++, 2);
        for (int64_t i = b * T; i < (b + 1) * T; i++) {
            if (i > b * T && rng_below(key, draw++, 4) == 0) doc += 1 + (int32_t)rng_below(key, draw++, 2);
            t.ids[i] = (int32_t)rng_below(key, draw++, (uint64_t)vocab);
            t.targets[i] = rng_below(key, draw++, 7) == 0 ? -1 : (int32_t)rng_below(key, draw++, (uint64_t)vocab);
            t.doc[i] = doc;
        }
    }
    return t;
}

void tokens_free(struct tokens *t) {
    free(t->ids);
    free(t->targets);
    free(t->doc);
}

struct tokens tokens_cut(const struct tokens *t, int64_t row, int64_t B, int64_t from, int64_t T) {
    struct tokens cut = tokens_new(B, T);
    for (int64_t b = 0; b < B; b++) {
        for (int64_t i = 0; i < T; i++) {
            int64_t source = (row + b) * t->T + from + i, target = b * T + i;
            cut.ids[target] = t->ids[source];
            cut.targets[target] = t->targets[source];
            cut.doc[target] = t->doc[source];
        }
    }
    return cut;
}

/* --- running ------------------------------------------------------------------------------------ */

void lm_set(struct lm *lm, const struct tokens *t, bool documents) {
    model_set_batch(lm->m, t->ids, t->targets, documents ? t->doc : NULL, t->B, t->T);
}

static void widen(double *out, const void *in, int64_t count, enum dtype dtype) {
    for (int64_t i = 0; i < count; i++) out[i] = dtype == DTYPE_F32 ? ((const float *)in)[i] : ((const double *)in)[i];
}

struct loss_sums lm_loss(struct lm *lm, const struct tokens *t, bool documents, double *losses) {
    struct loss_sums sums;
    void *each = malloc((size_t)(t->B * t->T) * lm->real);
    lm_set(lm, t, documents);
    model_zero_sums(lm->m);
    model_forward(lm->m, NULL, NULL, false);
    model_loss(lm->m, each, false, 1, 0);
    model_read_sums(lm->m, &sums);
    if (losses) widen(losses, each, t->B * t->T, lm->dev->ops->real);
    free(each);
    return sums;
}

struct loss_sums lm_grads(struct lm *lm, const struct tokens *t, bool documents, double scale, double z_loss) {
    struct loss_sums sums;
    lm_set(lm, t, documents);
    model_zero_sums(lm->m);
    model_forward(lm->m, NULL, NULL, true);
    model_loss(lm->m, NULL, true, scale, z_loss);
    model_backward(lm->m, NULL, NULL);
    model_read_sums(lm->m, &sums);
    return sums;
}

double *lm_read_grads(const struct lm *lm) {
    int64_t count = model_params(lm->m)->elements;
    void *raw = malloc((size_t)count * lm->real);
    double *grads = malloc((size_t)count * sizeof *grads);
    device_read(lm->dev, raw, model_flat_grads(lm->m).data, (size_t)count * lm->real);
    widen(grads, raw, count, lm->dev->ops->real);
    free(raw);
    return grads;
}

double *lm_read_logits(struct lm *lm, int64_t from, int64_t count) {
    int64_t elements = count * lm->mc->rows;
    void *raw = malloc((size_t)elements * lm->real);
    double *logits = malloc((size_t)elements * sizeof *logits);
    model_logits(lm->m, from, count, raw);
    widen(logits, raw, elements, lm->dev->ops->real);
    free(raw);
    return logits;
}

void lm_step(struct lm *lm, struct model_state *s, const int32_t *ids, int64_t B, double *logits) {
    int64_t elements = B * lm->mc->rows;
    void *raw = malloc((size_t)elements * lm->real);
    model_step(lm->m, s, ids, raw);
    widen(logits, raw, elements, lm->dev->ops->real);
    free(raw);
}

double relative_error(const double *a, const double *b, int64_t count) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(a[i]) || !isfinite(b[i])) return INFINITY;
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        size += b[i] * b[i];
    }
    if (difference == 0) return 0;
    return sqrt(difference / size);
}

double largest_difference(const double *a, const double *b, int64_t count) {
    double largest = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = fabs(a[i] - b[i]);
        if (!(difference <= largest)) largest = isfinite(difference) ? difference : INFINITY;
    }
    return largest;
}

/* --- the tensor table and initial values ---------------------------------------------------------- */

void expect_tensor(const struct params *p, int index, const char *name, int64_t a, int64_t b, int64_t c,
                          bool decay, bool keep_real) {
    const struct param *t = &p->list[index];
    int64_t dims[3] = {a, b, c};
    assert_string_equal(t->name, name);
    assert_int_equal(t->ndim, c ? 3 : b ? 2 : 1);
    for (int i = 0; i < t->ndim; i++) assert_int_equal(t->dim[i], dims[i]);
    assert_int_equal(t->decay, decay);
    assert_int_equal(t->keep_real, keep_real);
}

static void range(const double *x, int64_t count, double *low, double *high) {
    *low = *high = x[0];
    for (int64_t i = 1; i < count; i++) {
        *low = fmin(*low, x[i]);
        *high = fmax(*high, x[i]);
    }
}

void expect_range(const struct model *m, const char *name, double low, double high, double reach) {
    int index = params_find(model_params(m), name);
    assert_true(index >= 0);
    int64_t count = model_params(m)->list[index].count;
    double *x = malloc((size_t)count * sizeof *x), least, most;
    model_read_param(m, index, x, DTYPE_F64);
    range(x, count, &least, &most);
    double slack = 1e-6 * (fabs(low) + fabs(high));
    if (least < low - slack || most > high + slack || least > low + (1 - reach) * (high - low) ||
        most < high - (1 - reach) * (high - low))
        fail_msg("%s lies in [%g, %g], not in and nearly filling [%g, %g]", name, least, most, low, high);
    free(x);
}

void expect_normal(const struct model *m, const char *name, double deviation) {
    int index = params_find(model_params(m), name);
    assert_true(index >= 0);
    int64_t count = model_params(m)->list[index].count;
    double *x = malloc((size_t)count * sizeof *x), sum = 0, squares = 0;
    model_read_param(m, index, x, DTYPE_F64);
    for (int64_t i = 0; i < count; i++) sum += x[i];
    for (int64_t i = 0; i < count; i++) squares += x[i] * x[i];
    double slack = 4 / sqrt((double)count), got = sqrt(squares / (double)count);
    if (fabs(got / deviation - 1) > slack || fabs(sum / (double)count) > slack * deviation)
        fail_msg("%s has the deviation %g and the mean %g, not %g and 0", name, got, sum / (double)count, deviation);
    free(x);
}
