/* trainer.c: the training loop, as trainer.h describes: steps, validations, saves, and the end.
 *
 * A step is a function of the weights, the optimizer's state and the step's number alone; all that is kept between
 * steps is in struct trainer_state and goes into checkpoints. Decisions (skip, stop) are taken from numbers that were
 * summed over the ranks, so every rank takes the same.
 */
#include "train/trainer_parts.h"

#include "common/file.h"
#include "common/text.h"
#include "train/signals.h"
#include <math.h>

static void reduce_bucket(void *self, int bucket) {
    struct trainer *t = self;
    optimizer_reduce(t->optimizer, bucket);
}

/* ---- one step --------------------------------------------------------------------------------------------------- */

/* Gradients and loss of one global batch: this rank's micro-batches, reduced over the ranks as the last one goes
 * back. */
static int run_batch(struct trainer *t, int64_t batch, double scale, error *err) {
    int64_t accumulate = batch / (t->comm->ranks * t->micro_batch);
    model_zero_grads(t->model);
    model_zero_sums(t->model);
    for (int64_t k = 0; k < accumulate; k++) {
        struct batch b;
        TRY(loader_next(t->loader, &b, err));
        model_set_batch(t->model, b.tokens, b.targets, b.doc, b.B, b.T);
        model_forward(t->model, NULL, NULL, true);
        model_loss(t->model, NULL, true, scale, t->options.optimizer.z_loss);
        model_backward(t->model, k + 1 == accumulate ? reduce_bucket : NULL, t);
    }
    return 0;
}

/* What the ranks tell each other about a step, in one sum. */
struct step_sums {
    double nll, z, valid, correct;
    double signals; /* ranks that were asked to stop */
};

static struct step_sums sum_over_ranks(struct trainer *t) {
    struct loss_sums own;
    model_read_sums(t->model, &own);
    double values[5] = {own.nll, own.z, own.valid, own.correct, signals_received() != 0};
    comm_sum_f64(t->comm, values, 5);
    return (struct step_sums){values[0], values[1], values[2], values[3], values[4]};
}

/* One step; *stop is set if a signal on any rank asks for the end. */
static int train_step(struct trainer *t, bool *stop, error *err) {
    const struct run_options *o = &t->options;
    struct trainer_state *state = &t->state;
    double begun = clock_seconds();
    /* The gradient is that of the sum over targets; a nominal count keeps it near the mean's size in floating point. */
    int64_t batch = ramp_batch(&o->ramp, state->step);
    double scale = 1 / ((double)batch * (double)o->data.T);
    TRY(run_batch(t, batch, scale, err));
    struct step_sums sums = sum_over_ranks(t);
    bool finite = isfinite(sums.nll) && isfinite(sums.z) && sums.valid > 0;
    double lr = schedule_lr(&o->schedule, o->optimizer.lr, o->train.steps, state->step);
    struct optimizer_report done = optimizer_step(t->optimizer, lr, scale, sums.valid, finite);
    TRY(device_check(t->dev, err));

    double seconds = clock_seconds() - begun;
    state->step++;
    state->optimizer_steps = optimizer_steps(t->optimizer);
    state->skipped += done.skipped;
    state->samples += (uint64_t)batch;
    state->tokens += sums.valid;
    state->seconds += seconds;
    *stop = sums.signals > 0;
    struct report_step line = {
        .step = state->step,
        .loss = sums.nll / sums.valid,
        .lr = lr,
        .grad_norm = done.grad_norm,
        .accuracy = sums.correct / sums.valid,
        .tokens = state->tokens,
        .valid = sums.valid,
        .batch = batch,
        .samples_left = ramp_samples(&o->ramp, o->train.steps) - state->samples,
        .step_seconds = seconds,
        .seconds = state->seconds,
        .skipped = done.skipped,
        .skipped_total = state->skipped,
    };
    return report_step(t->report, &line, err);
}

/* ---- between steps ---------------------------------------------------------------------------------------------- */

static bool validation_due(const struct trainer *t) {
    int64_t step = t->state.step, every = t->options.eval.every;
    return t->data.valid && step > 0 && (step == t->options.train.steps || (every > 0 && step % every == 0));
}

static int validate(struct trainer *t, error *err) {
    double begun = clock_seconds();
    struct evaluation e;
    if (evaluate(&e, t->model, t->data.valid, t->tokenizer, &t->eval, t->options.data.reset, t->comm, err) != 0) {
        return error_context(err, "validation");
    }
    t->history = (struct report_history){.valid_step = t->state.step, .valid_loss = e.loss};
    if (!(e.loss >= t->state.best_valid)) t->state.best_valid = e.loss;
    return report_valid(t->report, t->state.step, &e, clock_seconds() - begun, err);
}

static int save(struct trainer *t, error *err) {
    const char *run = t->options.train.out;
    double begun = clock_seconds();
    char name[32], path[LIMIT_PATH];
    snprintf(name, sizeof name, "step-%08lld", (long long)t->state.step);
    TRY(file_join(path, sizeof path, run, name, err));
    TRY(report_sync(t->report, err));
    TRY(checkpoint_save(run, &t->state, t->model, t->optimizer, t->config, t->tokenizer, t->comm,
                        t->options.checkpoint.keep, err));
    return report_save(t->report, t->state.step, path, clock_seconds() - begun, err);
}

/* A signal asked for the end: save and say how to go on. What else is due at this step is done by the next session. */
static int save_and_stop(struct trainer *t, error *err) {
    const char *name = signals_received() ? signals_name(signals_received()) : "a signal to another rank";
    if (t->comm->rank == 0) fprintf(stderr, "%s: saving\n", name);
    TRY(save(t, err));
    TRY(report_stop(t->report, t->state.step, name, err));
    if (t->comm->rank == 0) {
        fprintf(stderr, "stopped at step %lld of %lld; the same command goes on from there\n", (long long)t->state.step,
                (long long)t->options.train.steps);
    }
    return 0;
}

static int run_steps(struct trainer *t, error *err) {
    const struct run_options *o = &t->options;
    /* A session that a signal stopped may owe the validation of its last step. */
    if (validation_due(t) && t->history.valid_step != t->state.step) TRY(validate(t, err));
    while (t->state.step < o->train.steps) {
        bool stop = false;
        TRY(train_step(t, &stop, err));
        bool last = t->state.step == o->train.steps;
        if (stop && !last) return save_and_stop(t, err);
        if (validation_due(t)) TRY(validate(t, err));
        if (last || (o->checkpoint.every > 0 && t->state.step % o->checkpoint.every == 0)) TRY(save(t, err));
    }
    return 0;
}

/* ---- the run ---------------------------------------------------------------------------------------------------- */

int trainer_run(struct trainer *t, error *err) {
    int64_t steps = t->options.train.steps;
    if (t->state.step == steps && t->comm->rank == 0) {
        fprintf(stderr, "%s is finished: step %lld of %lld\n", t->options.train.out, (long long)t->state.step,
                (long long)steps);
    }
    if (t->state.step < steps) {
        signals_install();
        int result = run_steps(t, err);
        signals_restore();
        if (result != 0) return -1;
    }
    if (t->comm->rank == 0 && t->state.step == steps && t->history.valid_step == steps) {
        printf("validation loss %.3f %s\n", t->history.valid_loss, trainer_unit(t));
    }
    return 0;
}
