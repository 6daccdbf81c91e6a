/* report.c: log.jsonl and the lines on the terminal, as report.h describes. Called by trainer.c, on rank 0.
 *
 * The log is appended to line by line, each in one write, so that a killed run leaves whole lines.
 */
#include "train/report.h"

#include "common/file.h"
#include "common/json.h"
#include "common/text.h"
#include "train/json_line.h"
#include "train/version.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct report {
    char path[LIMIT_PATH];
    file_appender *log;
    int64_t steps, log_every;
    const char *unit;
    bool started; /* a step of this session was reported */
    bool inexact; /* and one of them was told to be inexact */
    double flops_per_sequence, peak_flops;
    size_t planned;
    /* as of the last line on the terminal */
    double tokens, seconds;
    int64_t samples; /* sequences since then */
};

/* ---- writing ---------------------------------------------------------------------------------------------------- */

static void begin(struct json_line *l, const char *type, int64_t step) {
    json_line_begin(l);
    json_line_string(l, "type", type);
    json_line_int(l, "step", step);
}

static int end(struct report *r, struct json_line *l, error *err) {
    json_line_end(l);
    return file_append(r->log, l->text, l->used, err);
}

/* ---- opening: the log of earlier sessions ----------------------------------------------------------------------- */

/* One line of an earlier session. *keep is false for one beyond `step`, and for one that is no object with a step,
 * which ends the part that is kept: a machine that lost power may leave such. */
static int read_line(const char *text, size_t size, int64_t step, struct report_history *history, bool *keep,
                     error *err) {
    json_t *object = NULL;
    *keep = false;
    if (json_read_text(&object, text, size, "log.jsonl", err) != 0) return err->kind == ERROR_SYSTEM ? -1 : 0;
    const json_t *at = json_object_get(object, "step"), *type = json_object_get(object, "type");
    *keep = json_is_integer(at) && json_is_string(type) && json_integer_value(at) <= step;
    if (*keep && strcmp(json_string_value(type), "valid") == 0) {
        const json_t *loss = json_object_get(object, "loss");
        history->valid_step = json_integer_value(at);
        history->valid_loss = json_is_number(loss) ? json_number_value(loss) : NAN;
    }
    json_decref(object);
    return 0;
}

/* Reads the log up to the first line beyond `step`; *kept is the size of what comes before it. */
static int read_history(const char *path, int64_t step, struct report_history *history, off_t *kept, error *err) {
    *history = (struct report_history){.valid_step = -1, .valid_loss = NAN};
    *kept = 0;
    FILE *in = fopen(path, "rbe");
    if (!in) return errno == ENOENT ? 0 : error_system(err, "cannot read %s: %s", path, strerror(errno));
    char *line = NULL;
    size_t capacity = 0;
    int result = 0;
    for (bool keep = true; keep;) {
        ssize_t size = getline(&line, &capacity, in);
        if (size < 0 && !feof(in)) result = error_system(err, "cannot read %s: %s", path, strerror(errno));
        if (size <= 0 || line[size - 1] != '\n') break;
        result = read_line(line, (size_t)size, step, history, &keep, err);
        if (result != 0) break;
        if (keep) *kept += size;
    }
    free(line);
    fclose(in);
    return result;
}

int report_read_history(const char *run, int64_t step, struct report_history *history, error *err) {
    char path[LIMIT_PATH];
    off_t kept;
    TRY(file_join(path, sizeof path, run, "log.jsonl", err));
    return read_history(path, step, history, &kept, err);
}

int report_open(struct report **out, const char *run, int64_t step, int64_t steps, int64_t log_every, const char *unit,
                struct report_history *history, error *err) {
    *out = NULL;
    struct report *r = calloc(1, sizeof *r);
    if (!r) return error_system(err, "no memory for the log");
    *r = (struct report){.steps = steps, .log_every = log_every, .unit = unit};
    off_t kept;
    if (file_join(r->path, sizeof r->path, run, "log.jsonl", err) != 0 ||
        read_history(r->path, step, history, &kept, err) != 0) {
        goto fail;
    }
    /* Steps only grow along the file, so all that is to go lies behind `kept`. */
    if (file_append_open(&r->log, r->path, (uint64_t)kept, err) != 0) goto fail;
    *out = r;
    return 0;
fail:
    report_close(r);
    return -1;
}

void report_close(struct report *r) {
    if (!r) return;
    file_append_close(r->log);
    free(r);
}

int report_sync(struct report *r, error *err) {
    return r ? file_append_sync(r->log, err) : 0;
}

/* ---- the lines -------------------------------------------------------------------------------------------------- */

/* The config as an object of sections; every value is a string, in the syntax of a config. */
static json_t *config_object(const struct settings *settings) {
    json_t *all = json_object();
    for (size_t i = 0; i < settings->count; i++) {
        const struct setting *s = &settings->list[i];
        if (!json_object_get(all, s->section)) json_object_set_new(all, s->section, json_object());
        json_object_set_new(json_object_get(all, s->section), s->key, json_string(s->value));
    }
    return all;
}

/* FLOPs of training per token, by kinds of layers: {"m mamba2": ..., "head": ...}. */
static json_t *flops_object(const struct report_run *run) {
    json_t *all = json_object();
    char name[128];
    for (int i = 0; i < run->flop_kinds; i++) {
        const struct model_flops *f = &run->flops[i];
        snprintf(name, sizeof name, "%s%s%s", f->block, *f->block ? " " : "", f->layer);
        json_object_set_new(all, name, json_real(3 * f->count * f->forward));
    }
    return all;
}

/* {"g": {"method": "newton", ...}, ...} */
static json_t *solvers_object(const struct report_run *run) {
    json_t *all = json_object();
    for (int i = 0; i < run->solver_kinds; i++) {
        const struct cell_solver *s = &run->solvers[i].solver;
        json_object_set_new(all, run->solvers[i].layer->block_name,
                            json_pack("{s:s, s:i, s:I}", "method", solver_method_names[s->method], "iterations",
                                      s->iterations, "chunk", (json_int_t)s->chunk));
    }
    return all;
}

int report_run(struct report *r, const struct report_run *run, error *err) {
    if (!r) return 0;
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    r->flops_per_sequence = run->flops_per_sequence;
    r->peak_flops = run->peak_flops;
    r->planned = run->planned;
    json_t *line = json_pack("{s:s, s:I, s:s, s:s, s:s, s:s, s:s, s:s, s:i, s:I, s:I}", "type", "run", "step",
                             (json_int_t)run->step, "version", version_number(), "commit", version_commit(), "compiler",
                             version_compiler(), "host", name, "machine", run->machine, "precision", run->precision,
                             "ranks", run->ranks, "seed", (json_int_t)run->seed, "parameters",
                             (json_int_t)run->parameters);
    if (line) {
        json_object_set_new(line, "training_flops_per_token", json_real(run->flops_per_token));
        json_object_set_new(line, "flops", flops_object(run));
        if (run->solver_kinds > 0) json_object_set_new(line, "solvers", solvers_object(run));
        json_object_set_new(line, "peak_flops", run->peak_flops > 0 ? json_real(run->peak_flops) : json_null());
        json_object_set_new(line, "planned_bytes", json_integer((json_int_t)run->planned));
        json_object_set_new(line, "config", config_object(run->config));
    }
    char *text = json_text(line, JSON_COMPACT, r->path, err);
    json_decref(line);
    if (!text) return -1;
    size_t size = strlen(text);
    text[size] = '\n'; /* in place of the end; a line is appended in one piece */
    int result = file_append(r->log, text, size + 1, err);
    free(text);
    return result;
}

static void print_step(struct report *r, const struct report_step *s) {
    char rate[24], flops[24], left[24], share[24] = "";
    double seconds = s->seconds - r->seconds, tokens = s->tokens - r->tokens;
    text_count(rate, sizeof rate, seconds > 0 ? tokens / seconds : 0);
    /* A step of a ramp is shorter than those to come, so what is left is counted in sequences. */
    text_duration(left, sizeof left, seconds / (double)r->samples * (double)s->samples_left);
    double per_second = seconds > 0 ? (double)r->samples * r->flops_per_sequence / seconds : 0;
    text_count(flops, sizeof flops, per_second);
    if (r->peak_flops > 0) snprintf(share, sizeof share, "  MFU %.1f %%", 100 * per_second / r->peak_flops);
    fprintf(stderr,
            "step %lld/%lld  loss %.4f  ppl %.2f  lr %.2e  norm %.3f  %s tokens/s  %sFLOP/s%s  left %s",
            (long long)s->step, (long long)r->steps, s->loss, exp(s->loss), s->lr, s->grad_norm, rate, flops, share,
            left);
    if (s->solvers) fprintf(stderr, "  residual %.2g  iterations %d", s->solvers->residual, s->solvers->iterations);
    if (s->solvers && s->solvers->inexact_total > 0) {
        fprintf(stderr, "  inexact %lld", (long long)s->solvers->inexact_total);
    }
    if (s->skipped_total > 0) fprintf(stderr, "  skipped %lld", (long long)s->skipped_total);
    fprintf(stderr, "\n");
}

/* What a person should hear of at once. Inexact steps may be many: the first of a session is told, then they are
 * counted. */
static void tell_oddities(struct report *r, const struct report_step *s) {
    const struct report_solvers *v = s->solvers;
    if (s->skipped) {
        fprintf(stderr, "step %lld was skipped: loss %g, gradient norm %g", (long long)s->step, s->loss, s->grad_norm);
        if (v) fprintf(stderr, ", residual %.2g in block %d (%s)", v->residual, v->layer->block, v->layer->block_name);
        fprintf(stderr, "; nothing was changed\n");
    } else if (v && v->inexact && !r->inexact) {
        r->inexact = true;
        fprintf(stderr,
                "step %lld: the solver of block %d (%s) left a residual of %.2g, above solver.warn; such steps are "
                        "counted as inexact\n",
                (long long)s->step, v->layer->block, v->layer->block_name, v->residual);
    }
}

int report_step(struct report *r, const struct report_step *s, error *err) {
    if (!r) return 0;
    struct json_line l;
    begin(&l, "step", s->step);
    json_line_real(&l, "loss", s->loss);
    json_line_real(&l, "perplexity", exp(s->loss));
    json_line_real(&l, "lr", s->lr);
    json_line_real(&l, "grad_norm", s->grad_norm);
    json_line_real(&l, "accuracy", s->accuracy);
    json_line_int(&l, "tokens", (int64_t)s->tokens);
    json_line_int(&l, "valid", (int64_t)s->valid);
    json_line_int(&l, "batch", s->batch);
    json_line_real(&l, "tokens_per_s", round(s->step_seconds > 0 ? s->valid / s->step_seconds : 0));
    double flops = s->step_seconds > 0 ? (double)s->batch * r->flops_per_sequence / s->step_seconds : 0;
    json_line_real(&l, "flops_per_s", round(flops));
    if (r->peak_flops > 0) json_line_real(&l, "mfu", round(1e4 * flops / r->peak_flops) / 1e4);
    json_line_bool(&l, "skipped", s->skipped);
    if (s->solvers) {
        json_line_real(&l, "residual", s->solvers->residual);
        json_line_int(&l, "residual_block", s->solvers->layer->block);
        json_line_int(&l, "iterations", s->solvers->iterations);
        json_line_int(&l, "raised", s->solvers->raised);
    }
    json_line_real(&l, "seconds", round(s->seconds * 1e3) / 1e3);
    TRY(end(r, &l, err));
    if (!r->started) { /* rates count from the start of the session */
        r->tokens = s->tokens - s->valid;
        r->seconds = s->seconds - s->step_seconds;
    }
    r->samples += s->batch;
    tell_oddities(r, s);
    if (s->step % r->log_every == 0 || s->step == r->steps || !r->started) {
        print_step(r, s);
        r->samples = 0;
        r->tokens = s->tokens;
        r->seconds = s->seconds;
    }
    r->started = true;
    return 0;
}

int report_level(struct report *r, const struct report_level *v, error *err) {
    if (!r) return 0;
    struct json_line l;
    bool sequential = v->solver.method == CELL_SEQUENTIAL;
    int iterations = sequential ? 0 : v->solver.iterations;
    begin(&l, "solver", v->step);
    json_line_int(&l, "block", v->layer->block);
    json_line_real(&l, "residual", v->residual);
    json_line_string(&l, "level", solver_level_names[v->level]);
    json_line_string(&l, "before", solver_level_names[v->before]);
    json_line_int(&l, "first_step", v->first_step);
    json_line_string(&l, "method", solver_method_names[v->solver.method]);
    json_line_int(&l, "iterations", iterations);
    TRY(end(r, &l, err));
    fprintf(stderr, "block %d (%s) ", v->layer->block, v->layer->block_name);
    if (v->level < v->before) fprintf(stderr, "was raised for solver.hold steps");
    else fprintf(stderr, "left a residual of %.2g", v->residual);
    fprintf(stderr, ": from step %lld on ", (long long)v->first_step);
    if (sequential) fprintf(stderr, "it is solved token after token\n");
    else fprintf(stderr, "%s takes %d iterations\n", solver_method_names[v->solver.method], iterations);
    return 0;
}

int report_start(struct report *r, int64_t step, double seconds, error *err) {
    if (!r) return 0;
    struct json_line l;
    begin(&l, "start", step);
    json_line_real(&l, "seconds", round(seconds * 1e2) / 1e2);
    fprintf(stderr, "the first step was done %.2f s after the start of the program\n", seconds);
    return end(r, &l, err);
}

int report_memory(struct report *r, int64_t step, size_t peak, error *err) {
    if (!r || peak == 0) return 0;
    struct json_line l;
    char used[24], planned[24];
    begin(&l, "memory", step);
    json_line_int(&l, "peak_bytes", (int64_t)peak);
    json_line_int(&l, "planned_bytes", (int64_t)r->planned);
    TRY(end(r, &l, err));
    fprintf(stderr, "memory      at most %s of the GPU's were in use; the plan said %s\n",
            text_bytes(used, sizeof used, (double)peak), text_bytes(planned, sizeof planned, (double)r->planned));
    return 0;
}

int report_valid(struct report *r, int64_t step, const struct evaluation *e, double seconds, error *err) {
    if (!r) return 0;
    struct json_line l;
    begin(&l, "valid", step);
    json_line_real(&l, "loss", e->loss);
    json_line_real(&l, "perplexity", e->perplexity);
    json_line_real(&l, "bits_per_byte", e->bits_per_byte);
    json_line_real(&l, "accuracy", e->accuracy);
    json_line_int(&l, "tokens", (int64_t)e->tokens);
    if (e->sequences > 0) {
        json_line_int(&l, "sequences", (int64_t)e->sequences);
        json_line_real(&l, "sequence_accuracy", e->sequence_accuracy);
    }
    evaluation_log_solvers(e, &l);
    json_line_real(&l, "seconds", round(seconds * 1e3) / 1e3);
    TRY(end(r, &l, err));
    fprintf(stderr, "step %lld/%lld  validation loss %.4f %s  ppl %.2f  accuracy %.1f %%", (long long)step,
            (long long)r->steps, e->loss, r->unit, e->perplexity, 100 * e->accuracy);
    if (e->sequences > 0) fprintf(stderr, "  of whole samples %.1f %%", 100 * e->sequence_accuracy);
    fprintf(stderr, "\n");
    return 0;
}

int report_save(struct report *r, int64_t step, const char *path, double seconds, error *err) {
    if (!r) return 0;
    struct json_line l;
    begin(&l, "save", step);
    json_line_string(&l, "path", path);
    json_line_real(&l, "seconds", round(seconds * 1e3) / 1e3);
    TRY(end(r, &l, err));
    fprintf(stderr, "step %lld/%lld  saved %s\n", (long long)step, (long long)r->steps, path);
    return 0;
}

int report_stop(struct report *r, int64_t step, const char *signal, error *err) {
    if (!r) return 0;
    struct json_line l;
    begin(&l, "stop", step);
    json_line_string(&l, "signal", signal);
    return end(r, &l, err);
}
