/* evaluate.c: the loss of a model on a data set, as evaluate.h describes. Called by the trainer's validation and
 * `riverrun eval`. */
#include "train/evaluate.h"

#include "train/ladder.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LOGITS (1 << 16) /* numbers looked at together where a task's answers are checked */

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
    void *logits;                    /* of `logit_rows` targets, for a task; else NULL */
    int64_t logit_rows;
    double sequences, solved; /* samples of a task so far, and those of which every target is the argmax */
};

static void pass_close(struct pass *p) {
    row_reader_close(&p->reader);
    free(p->reader.scratch);
    free(p->tokens);
    free(p->targets);
    free(p->doc);
    free(p->logits);
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
    TRY(row_reader_open(&p->reader, err));
    if (!row_source_get_info(p->data)->separate) return 0;
    int64_t columns = model_get_config(p->model)->rows;
    p->logit_rows = columns < LOGITS ? LOGITS / columns : 1;
    p->logits = calloc((size_t)(p->logit_rows * columns), dtype_size(model_device(p->model)->ops->real));
    return p->logits ? 0 : error_system(err, "no memory for the logits of %lld ids", (long long)columns);
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

/* Is the target the largest of the row's logits, the lowest index winning a tie? So head_loss counts, too. */
static bool is_argmax(const void *logits, enum dtype real, int64_t columns, int32_t target) {
    const float *single = logits;
    const double *twice = logits;
    int64_t best = 0;
    for (int64_t v = 1; v < columns; v++) {
        if (real == DTYPE_F32 ? single[v] > single[best] : twice[v] > twice[best]) best = v;
    }
    return best == target;
}

/* Count row b as a sample, and as a solved one if all its targets are right. Only where there are targets are logits
 * asked for. */
static void count_sample(struct pass *p, int64_t b) {
    enum dtype real = model_device(p->model)->ops->real;
    int64_t columns = model_get_config(p->model)->rows;
    const int32_t *targets = p->targets + b * p->T;
    bool any = false, solved = true;
    for (int64_t t = 0, end; t < p->T && solved; t = end) {
        for (end = t; end < p->T && end - t < p->logit_rows && targets[end] >= 0;) end++;
        if (end > t) model_logits(p->model, b * p->T + t, end - t, p->logits);
        for (int64_t i = t; i < end && solved; i++) {
            const char *row = (const char *)p->logits + (size_t)((i - t) * columns) * dtype_size(real);
            solved = is_argmax(row, real, columns, targets[i]);
        }
        any |= end > t;
        if (end == t) end++; /* a masked one */
    }
    p->sequences += any; /* options->tokens may have cut all targets off */
    p->solved += any && solved;
}

static void run(struct pass *p, int64_t rows, struct model_state *state) {
    model_set_batch(p->model, p->tokens, p->targets, p->doc, rows, p->T);
    model_forward(p->model, state, state, false);
    model_loss(p->model, NULL, false, 1, 0);
    for (int64_t b = 0; p->logits && b < rows; b++) count_sample(p, b);
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

/* Everything once, and what came of it on this rank. */
static int run_pass(struct pass *p, int64_t inputs, bool carry, struct comm *comm, struct loss_sums *sums, error *err) {
    p->bytes = p->sequences = p->solved = 0;
    model_zero_sums(p->model);
    if (!carry) TRY(run_windows(p, inputs, comm, err));
    if (carry && comm->rank == 0) TRY(run_carried(p, inputs, err));
    model_read_sums(p->model, sums);
    return device_check(model_device(p->model), err);
}

static void summarise(struct evaluation *e, const double sums[6]) {
    double nll = sums[0], targets = sums[1], correct = sums[2], bytes = sums[3];
    e->loss = nll / targets; /* NaN if nothing counts */
    e->perplexity = exp(e->loss);
    e->accuracy = correct / targets;
    e->bits_per_byte = bytes > 0 ? nll / log(2) / bytes : NAN;
    e->tokens = targets;
    e->bytes = bytes;
    e->sequences = sums[4];
    e->sequence_accuracy = sums[4] > 0 ? sums[5] / sums[4] : NAN;
}

void evaluation_log_solvers(const struct evaluation *e, struct json_line *l) {
    if (e->solvers == 0) return;
    json_line_real(l, "residual", e->residual);
    json_line_int(l, "sequential", e->sequential);
}

int64_t evaluate_window(const row_source *d, int64_t T) {
    const struct row_source_info *info = row_source_get_info(d);
    return info->separate ? info->length : T;
}

int evaluate_check(const row_source *d, const char *name, const struct eval_options *options, error *err) {
    if (row_source_inputs(d, options->window) == 0) {
        return error_input(err, "%s (%s) has fewer than 2 tokens, so none can be predicted", name,
                           row_source_get_info(d)->path);
    }
    if (!row_source_get_info(d)->separate) return 0;
    if (options->mode == EVAL_CARRY) {
        return error_input(err,
                           "%s: %s has samples that stand alone, so there is no state to carry; evaluate it in mode "
                           "window",
                           name, row_source_get_info(d)->path);
    }
    return row_source_check(d, name, options->window, err);
}

int evaluate(struct evaluation *e, struct model *m, const row_source *d, const tokenizer *t,
             const struct eval_options *options, bool reset, struct comm *comm, error *err) {
    ASSERT(options->window > 0 && options->batch > 0);
    bool carry = options->mode == EVAL_CARRY;
    TRY(evaluate_check(d, "the data to evaluate on", options, err));
    int64_t inputs = (int64_t)row_source_inputs(d, options->window);
    if (options->tokens > 0 && options->tokens < inputs) inputs = options->tokens;
    struct pass p = {
        .model = m, .data = d, .tokenizer = t, .B = carry ? 1 : options->batch, .T = options->window, .reset = reset};
    struct guard guard;
    struct loss_sums sums = {0};
    TRY(guard_open(&guard, m, err));
    int result = pass_open(&p, err);
    do {
        if (result == 0) result = run_pass(&p, inputs, carry, comm, &sums, err);
    } while (result == 0 && guard_repeat(&guard, comm, "the evaluation"));
    e->solvers = model_get_config(m)->solver_count;
    e->residual = guard.residual;
    e->sequential = guard.raised;
    guard_close(&guard);
    pass_close(&p);
    if (result != 0) return -1;
    double all[6] = {sums.nll, sums.valid, sums.correct, p.bytes, p.sequences, p.solved};
    comm_sum_f64(comm, all, 6);
    summarise(e, all);
    return 0;
}
