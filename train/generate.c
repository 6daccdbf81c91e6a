/* generate.c: drawing tokens from a model, as generate.h describes. Called by command_generate.c. */
#include "train/generate.h"

#include "common/rng.h"
#include "train/ladder.h"
#include <math.h>
#include <stdlib.h>

/* Index of the largest logit, the lowest of equals; -1 if there is no largest one that is a number. */
static int64_t largest(const double *logits, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 0; i < count; i++) {
        if (isnan(logits[i])) return -1;
        if (logits[i] > logits[best]) best = i;
    }
    return isfinite(logits[best]) ? best : -1;
}

/* Most probable first; of equals the lower token, so that the order is one. */
static int by_logit(const void *left, const void *right) {
    const struct generate_candidate *a = left, *b = right;
    if (a->logit != b->logit) return a->logit > b->logit ? -1 : 1;
    return a->token < b->token ? -1 : 1;
}

/* Keep only the fewest of the first *kept candidates, sorted, that have the share `top_p` of them all; returns
 * their weight. */
static double cut_to_share(const struct generate_candidate *candidates, int64_t *kept, double top_p) {
    double all = 0, total = 0;
    for (int64_t i = 0; i < *kept; i++) all += candidates[i].weight;
    for (int64_t i = 0; i < *kept; i++) {
        total += candidates[i].weight;
        if (top_p < 1 && total >= top_p * all) *kept = i + 1;
    }
    return total;
}

int32_t generate_pick(const double *logits, int64_t count, const struct generate_options *options, uint64_t position,
                      struct generate_candidate *scratch) {
    int64_t best = largest(logits, count);
    if (best < 0 || options->temperature == 0) return (int32_t)best;
    double total = 0;
    for (int64_t i = 0; i < count; i++) {
        double weight = exp((logits[i] - logits[best]) / options->temperature);
        scratch[i] = (struct generate_candidate){.logit = logits[i], .weight = weight, .token = (int32_t)i};
        total += weight;
    }
    int64_t kept = count;
    if (options->top_k > 0 || options->top_p < 1) {
        qsort(scratch, (size_t)count, sizeof *scratch, by_logit);
        if (options->top_k > 0 && options->top_k < kept) kept = options->top_k;
        total = cut_to_share(scratch, &kept, options->top_p);
    }
    double drawn = rng_uniform((rng_key){options->seed, RNG_SAMPLE, 0}, position) * total;
    for (int64_t i = 0; i < kept; i++) {
        drawn -= scratch[i].weight;
        if (drawn < 0) return scratch[i].token;
    }
    /* Rounding ate the last bit of the sum: the draw belongs to the last token that can be drawn at all. */
    while (kept > 1 && scratch[kept - 1].weight == 0) kept--;
    return scratch[kept - 1].token;
}

/* What a run of generate needs besides the model: memory for one row of logits, in both forms. */
struct generator {
    struct model_state *state;
    void *row; /* the model's own number type, padding columns included */
    double *logits;
    struct generate_candidate *scratch;
};

static void generator_close(struct generator *g) {
    if (g->state) model_state_close(g->state);
    free(g->row);
    free(g->logits);
    free(g->scratch);
}

static int generator_open(struct generator *g, struct model *m, error *err) {
    const struct model_config *mc = model_get_config(m);
    g->row = calloc((size_t)mc->rows, sizeof(double));
    g->logits = calloc((size_t)mc->rows, sizeof *g->logits);
    g->scratch = calloc((size_t)mc->rows, sizeof *g->scratch);
    if (!g->row || !g->logits || !g->scratch)
        return error_system(err, "no memory for %lld logits", (long long)mc->rows);
    return model_state_open(&g->state, m, 1, err);
}

/* The prompt through the model once; its last logits are left in g->row. */
static void read_once(struct generator *g, struct model *m, const int32_t *prompt, size_t count, int64_t piece) {
    for (size_t at = 0; at < count;) {
        int64_t T = count - at < (size_t)piece ? (int64_t)(count - at) : piece;
        model_set_batch(m, prompt + at, NULL, NULL, 1, T);
        model_forward(m, g->state, g->state, false);
        at += (size_t)T;
        if (at == count) model_logits(m, T - 1, 1, g->row);
    }
}

/* The same, and again if a layer's recurrence was not solved. */
static int read_prompt(struct generator *g, struct model *m, const int32_t *prompt, size_t count, int64_t piece,
                       error *err) {
    struct comm alone;
    struct guard guard;
    comm_open_alone(&alone);
    TRY(guard_open(&guard, m, err));
    do {
        model_state_reset(g->state, -1);
        read_once(g, m, prompt, count, piece);
    } while (guard_repeat(&guard, &alone, "the prompt"));
    guard_close(&guard);
    comm_close(&alone);
    return 0;
}

static int32_t pick(struct generator *g, struct model *m, const struct generate_options *options, uint64_t position) {
    int64_t vocab = model_get_config(m)->vocab;
    bool is_double = model_device(m)->ops->real == DTYPE_F64;
    for (int64_t i = 0; i < vocab; i++) g->logits[i] = is_double ? ((double *)g->row)[i] : (double)((float *)g->row)[i];
    return generate_pick(g->logits, vocab, options, position, g->scratch);
}

static int generate_all(struct generator *g, struct model *m, const int32_t *prompt, size_t count,
                        const struct generate_options *options, int (*emit)(void *self, int32_t token), void *self,
                        error *err) {
    TRY(read_prompt(g, m, prompt, count, options->piece, err));
    for (int64_t i = 0; i < options->tokens; i++) {
        TRY(device_check(model_device(m), err));
        int32_t token = pick(g, m, options, (uint64_t)i);
        if (token < 0) {
            return error_input(err, "the model's logits behind token %lld are not numbers; its weights are damaged",
                               (long long)count + i - 1);
        }
        if (options->stop_at_eod && token == options->eod) return 0;
        if (emit(self, token) != 0 || i + 1 == options->tokens) return 0;
        model_step(m, g->state, &token, g->row);
    }
    return 0;
}

int generate(struct model *m, const int32_t *prompt, size_t count, const struct generate_options *options,
             int (*emit)(void *self, int32_t token), void *self, error *err) {
    ASSERT(count > 0 && options->piece > 0);
    struct generator g = {0};
    int result = generator_open(&g, m, err);
    if (result == 0) result = generate_all(&g, m, prompt, count, options, emit, self, err);
    generator_close(&g);
    return result;
}
