/* evaluate.c: the loss of a model on a data set, as evaluate.h describes. Called by the trainer's validation and
 * `riverrun eval`. */
#include "train/evaluate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a pass over the data needs: rows of `T` inputs, `B` of them at once. */
struct pass {
    struct model *model;
    const row_source *data;
    const tokenizer *tokenizer; /* NULL for a task, whose tokens have no bytes */
    struct row_reader reader;
    int64_t B, T;
    bool reset;
    int32_t *tokens, *targets, *doc; /* (B, T); doc is NULL without reset */
    double bytes;                    /* of text that the targets so far stand for */
};

static void pass_close(struct pass *p) {
    row_reader_close(&p->reader);
    free(p->reader.scratch);
    free(p->tokens);
    free(p->targets);
    free(p->doc);
}

static int pass_open(struct pass *p, error *err) {
    size_t all = (size_t)p->B * (size_t)p->T;
    p->reader.scratch = calloc(row_source_scratch(p->data, p->T) + 1, 1);
    p->tokens = calloc(all, sizeof *p->tokens);
    p->targets = calloc(all, sizeof *p->targets);
    if (p->reset) p->doc = calloc(all, sizeof *p->doc);
    if (!p->reader.scratch || !p->tokens || !p->targets || (p->reset && !p->doc)) {
        return error_system(err, "no memory for %lld windows of %lld tokens", (long long)p->B, (long long)p->T);
    }
    return row_reader_open(&p->reader, err);
}

/* Row b: the first `count` inputs of a sample. What is left of the row is no target; it comes behind all that counts,
 * and nothing flows backwards. */
static int fill_row(struct pass *p, int64_t b, int64_t sample, int64_t count, error *err) {
    int32_t *targets = p->targets + b * p->T;
    TRY(row_source_read(p->data, &p->reader, (uint64_t)sample, p->T, count, p->tokens + b * p->T, targets,
                        p->doc ? p->doc + b * p->T : NULL, err));
    for (int64_t i = 0; p->tokenizer && i < count; i++) {
        size_t size;
        if (targets[i] < 0) continue;
        tokenizer_decode(p->tokenizer, targets[i], &size);
        p->bytes += (double)size;
    }
    return 0;
}

static void run(struct pass *p, int64_t rows, struct model_state *state) {
    model_set_batch(p->model, p->tokens, p->targets, p->doc, rows, p->T);
    model_forward(p->model, state, state, false);
    model_loss(p->model, NULL, false, 1, 0);
}

/* Windows of T inputs, `inputs` in all, each from a zero state: batch k goes to rank k modulo ranks. */
static int run_windows(struct pass *p, int64_t inputs, const struct comm *comm, error *err) {
    int64_t windows = (inputs + p->T - 1) / p->T;
    for (int64_t first = comm->rank * p->B; first < windows; first += comm->ranks * p->B) {
        int64_t rows = windows - first < p->B ? windows - first : p->B;
        for (int64_t b = 0; b < rows; b++) {
            int64_t left = inputs - (first + b) * p->T;
            TRY(fill_row(p, b, first + b, left < p->T ? left : p->T, err));
        }
        run(p, rows, NULL);
    }
    return 0;
}

/* One row through all inputs, in pieces of T, the state carried from piece to piece. */
static int run_carried(struct pass *p, int64_t inputs, error *err) {
    struct model_state *state;
    TRY(model_state_open(&state, p->model, 1, err));
    int result = 0;
    for (int64_t piece = 0; piece * p->T < inputs && result == 0; piece++) {
        int64_t left = inputs - piece * p->T;
        result = fill_row(p, 0, piece, left < p->T ? left : p->T, err);
        if (result == 0) run(p, 1, state);
    }
    model_state_close(state);
    return result;
}

static void summarise(struct evaluation *e, const double sums[4]) {
    double nll = sums[0], targets = sums[1], correct = sums[2], bytes = sums[3];
    e->loss = nll / targets; /* NaN if nothing counts */
    e->perplexity = exp(e->loss);
    e->accuracy = correct / targets;
    e->bits_per_byte = bytes > 0 ? nll / log(2) / bytes : NAN;
    e->tokens = targets;
    e->bytes = bytes;
}

int evaluate(struct evaluation *e, struct model *m, const row_source *d, const tokenizer *t,
             const struct eval_options *options, bool reset, struct comm *comm, error *err) {
    ASSERT(options->window > 0 && options->batch > 0);
    bool carry = options->mode == EVAL_CARRY;
    int64_t inputs = (int64_t)row_source_inputs(d, options->window);
    if (inputs < 1)
        return error_input(err, "the data set to evaluate on has fewer than 2 tokens, so none can be predicted");
    if (options->tokens > 0 && options->tokens < inputs) inputs = options->tokens;
    struct pass p = {
        .model = m, .data = d, .tokenizer = t, .B = carry ? 1 : options->batch, .T = options->window, .reset = reset};
    model_zero_sums(m);
    int result = pass_open(&p, err);
    if (result == 0 && !carry) result = run_windows(&p, inputs, comm, err);
    if (result == 0 && carry && comm->rank == 0) result = run_carried(&p, inputs, err);
    struct loss_sums sums = {0};
    if (result == 0) {
        model_read_sums(m, &sums);
        result = device_check(model_device(m), err);
    }
    pass_close(&p);
    if (result != 0) return -1;
    double all[4] = {sums.nll, sums.valid, sums.correct, p.bytes};
    comm_sum_f64(comm, all, 4);
    summarise(e, all);
    return 0;
}
