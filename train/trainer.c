/* trainer.c: the training loop, as trainer.h describes: steps, validations, saves, and the end.
 *
 * A step is a function of the weights, the optimizer's state and the step's number alone; all that is kept between
 * steps is in struct trainer_state and goes into checkpoints. Decisions (skip, stop) are taken from numbers that were
 * summed over the ranks, so every rank takes the same. On a GPU they are known one step late (train/step.h): a signal
 * is obeyed a step later, and where a validation, a save or the end is due nothing more is queued before it.
 */
#include "train/trainer_parts.h"

#include "common/file.h"
#include "common/text.h"
#include "train/signals.h"
#include <signal.h>
#include <stdlib.h>

/* ---- one step --------------------------------------------------------------------------------------------------- */

static double step_lr(const struct trainer *t, int64_t step) {
    return schedule_lr(&t->options.schedule, t->options.optimizer.lr, t->options.train.steps, step);
}

/* Every layer with a solver to its level for a step. */
static void set_levels(struct trainer *t, int64_t step) {
    for (int i = 0; i < t->model_config->solver_count; i++)
        step_set_level(t->step, i, rung_level(&t->state.rungs[i], step));
}

/* Queue step number `step`: this rank's micro-batches, reduced over the ranks as the last one goes back. */
static int begin_step(struct trainer *t, int64_t step, error *err) {
    int64_t accumulate = ramp_batch(&t->options.ramp, step) / (t->comm->ranks * t->micro_batch);
    if (t->begun == t->state.step) t->waiting_since = clock_seconds(); /* nothing was under way */
    set_levels(t, step);
    step_begin(t->step, step_lr(t, step), signals_received() != 0);
    for (int64_t k = 0; k < accumulate; k++) {
        struct batch b;
        comm_note(t->comm, step + 1, "reading data");
        TRY(loader_next(t->loader, &b, err));
        comm_note(t->comm, step + 1, "forward and backward");
        step_batch(t->step, b.tokens, b.targets, b.doc, b.B, b.T, k + 1 == accumulate);
    }
    t->begun = step + 1;
    return 0;
}

static struct cell_solver solver_at(const struct trainer *t, int solver, enum solver_level level) {
    const struct layer *layer = model_solver_layer(t->model_config, solver);
    return mixer_solver(layer, t->dev->ops, t->micro_batch, t->options.data.T, level);
}

/* How the recurrences of step number `step` were solved, as far as it is told. */
static struct report_solvers describe_solvers(const struct trainer *t, int64_t step, const struct cell_report *worst) {
    struct report_solvers s = {.residual = -1};
    for (int i = 0; i < t->model_config->solver_count; i++) {
        enum solver_level level = rung_level(&t->state.rungs[i], step);
        struct cell_solver solver = solver_at(t, i, level);
        if (solver.method != CELL_SEQUENTIAL && solver.iterations > s.iterations) s.iterations = solver.iterations;
        s.raised += level != SOLVER_CHOSEN;
        if ((double)worst[i].residual <= s.residual) continue;
        s.residual = (double)worst[i].residual;
        s.layer = model_solver_layer(t->model_config, i);
    }
    s.inexact = s.residual > t->options.solver.warn;
    return s;
}

/* What the reports of step number `step` change for steps to come, told. */
static int judge_solvers(struct trainer *t, int64_t step, const struct cell_report *worst, error *err) {
    int count = t->model_config->solver_count, judged = ladder_judged(worst, count);
    for (int i = 0; i < count; i++) {
        struct rung *r = &t->state.rungs[i];
        double residual = (double)worst[i].residual;
        /* An exact solver whose states are not finite was given nothing better. */
        bool iterates = solver_at(t, i, rung_level(r, step)).method != CELL_SEQUENTIAL;
        if (!rung_judge(r, step, residual, iterates && i < judged, step_ahead(t->step), &t->options.solver)) continue;
        struct report_level line = {
            .step = step + 1,
            .first_step = r->since + 1,
            .layer = model_solver_layer(t->model_config, i),
            .residual = residual,
            .level = (enum solver_level)r->level,
            .before = (enum solver_level)r->before,
            .solver = solver_at(t, i, (enum solver_level)r->level),
        };
        TRY(report_level(t->report, &line, err));
    }
    return 0;
}

/* Wait for the oldest step under way and report it; *stop is set if a signal on any rank asks for the end. */
static int end_step(struct trainer *t, bool *stop, error *err) {
    const struct run_options *o = &t->options;
    struct trainer_state *state = &t->state;
    struct step_report done;
    const struct cell_report *worst;
    comm_note(t->comm, state->step + 1, "the wait for the device");
    TRY(step_wait(t->step, &done, &worst, err));
    struct report_solvers solvers = {0};
    if (worst) solvers = describe_solvers(t, state->step, worst);
    const struct loss_sums *sums = &done.totals.loss;
    double now = clock_seconds(), seconds = now - t->waiting_since, lr = step_lr(t, state->step);
    t->waiting_since = now;
    int64_t batch = ramp_batch(&o->ramp, state->step);
    state->step++;
    state->optimizer_steps = done.steps;
    state->skipped += done.skipped;
    state->inexact += solvers.inexact && !done.skipped;
    solvers.inexact_total = state->inexact;
    state->samples += (uint64_t)batch;
    state->tokens += sums->valid;
    state->seconds += seconds;
    *stop = done.totals.signals > 0;
    struct report_step line = {
        .step = state->step,
        .loss = sums->nll / sums->valid,
        .lr = lr,
        .grad_norm = done.grad_norm,
        .accuracy = sums->correct / sums->valid,
        .tokens = state->tokens,
        .valid = sums->valid,
        .batch = batch,
        .samples_left = ramp_samples(&o->ramp, o->train.steps) - state->samples,
        .step_seconds = seconds,
        .seconds = state->seconds,
        .skipped = done.skipped,
        .skipped_total = state->skipped,
        .solvers = worst ? &solvers : NULL,
    };
    TRY(report_step(t->report, &line, err));
    if (worst) TRY(judge_solvers(t, state->step - 1, worst, err));
    if (t->started) return 0;
    t->started = true;
    return report_start(t->report, state->step, program_seconds(), err);
}

/* All steps up to number `end`, or, after a signal, those that are under way. The next one is queued before the one
 * before is waited for, where the device works by itself. */
static int take_steps(struct trainer *t, int64_t end, bool *stop, error *err) {
    *stop = false;
    t->begun = t->state.step;
    while (t->state.step < end) {
        while (t->begun < end && t->begun - t->state.step <= step_ahead(t->step)) TRY(begin_step(t, t->begun, err));
        TRY(end_step(t, stop, err));
        if (*stop) end = t->begun;
    }
    return 0;
}

/* ---- between steps ---------------------------------------------------------------------------------------------- */

/* Is what is done every so many steps due behind this one? 0 = never. */
static bool falls_due(int64_t step, int64_t every) {
    return every > 0 && step % every == 0;
}

static bool validation_due(const struct trainer *t, int64_t step) {
    return t->data.valid && step > 0 && (step == t->options.train.steps || falls_due(step, t->options.eval.every));
}

static bool save_due(const struct trainer *t, int64_t step) {
    return step == t->options.train.steps || falls_due(step, t->options.checkpoint.every);
}

/* The next step behind which more is to be done than the next one. */
static int64_t next_pause(const struct trainer *t) {
    int64_t step = t->state.step + 1;
    while (!validation_due(t, step) && !save_due(t, step)) step++;
    return step;
}

static int validate(struct trainer *t, error *err) {
    double begun = clock_seconds();
    struct evaluation e;
    comm_note(t->comm, t->state.step, "validation");
    comm_watch(t->comm, 0); /* carrying the state, rank 0 works alone */
    optimizer_settle(t->optimizer);
    set_levels(t, t->state.step);
    if (evaluate(&e, t->model, t->data.valid, t->tokenizer, &t->eval, t->options.data.reset, t->comm, err) != 0) {
        return error_context(err, "validation");
    }
    comm_watch(t->comm, t->options.comm.timeout);
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
    comm_note(t->comm, t->state.step, "saving");
    comm_watch(t->comm, 0); /* the others wait while rank 0 writes, and a disk may be slow */
    TRY(checkpoint_save(run, &t->state, t->model, t->optimizer, t->config, t->tokenizer, t->comm,
                        t->options.checkpoint.keep, err));
    comm_watch(t->comm, t->options.comm.timeout);
    return report_save(t->report, t->state.step, path, clock_seconds() - begun, err);
}

/* Open MPI kills its ranks a moment after it has passed SIGTERM on, unless it was told to wait. It tells its ranks what
 * it was told by their environment. */
static const char *warn_of_launcher(void) {
    bool hurried = signals_received() == SIGTERM && getenv("OMPI_COMM_WORLD_SIZE") &&
                   !getenv("OMPI_MCA_odls_base_sigkill_timeout");
    return hurried ? " (mpirun may end this job before it is done: scripts/launch-mpirun.sh gives it the time, or send "
                     "SIGUSR1 instead)"
                   : "";
}

/* A signal asked for the end: save and say how to go on. What else is due at this step is done by the next session. */
static int save_and_stop(struct trainer *t, error *err) {
    const char *name = signals_received() ? signals_name(signals_received()) : "a signal to another rank";
    if (t->comm->rank == 0) fprintf(stderr, "%s: saving%s\n", name, warn_of_launcher());
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
    if (validation_due(t, t->state.step) && t->history.valid_step != t->state.step) TRY(validate(t, err));
    while (t->state.step < o->train.steps) {
        bool stop;
        TRY(take_steps(t, next_pause(t), &stop, err));
        int64_t step = t->state.step;
        if (stop && step < o->train.steps) return save_and_stop(t, err);
        if (validation_due(t, step)) TRY(validate(t, err));
        if (save_due(t, step)) TRY(save(t, err));
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
        comm_watch(t->comm, t->options.comm.timeout);
        int result = run_steps(t, err);
        if (result == 0) result = report_memory(t->report, t->state.step, device_memory(t->dev).peak, err);
        comm_watch(t->comm, 0);
        signals_restore();
        if (result != 0) return -1;
    }
    if (t->comm->rank == 0 && t->state.step == steps && t->history.valid_step == steps) {
        printf("validation loss %.3f %s\n", t->history.valid_loss, trainer_unit(t));
    }
    return 0;
}
