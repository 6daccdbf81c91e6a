/* trainer_open.c: the start of a run, as trainer.h describes. It goes in stages; each ends with all ranks agreeing
 * that it went well, so that no rank waits for one that has given up:
 *
 *   1. what the config says and what the data is   (no rank writes)
 *   2. the lock of a directory that exists already (rank 0)
 *   3. the checkpoint to go on from, and whether this config may go on from it
 *   4. device, loader, model, weights, optimizer   (all the memory of the run)
 *   5. directory, config.ini, log                  (rank 0)
 */
#include "train/trainer_parts.h"

#include "common/file.h"
#include "common/text.h"
#include "train/version.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *trainer_unit(const struct trainer *t) {
    bool bytes = t->tokenizer && strcmp(tokenizer_name(t->tokenizer), TOKENIZER_BYTES) == 0;
    return bytes ? "nats/byte" : "nats/token";
}

/* Tokens in the longest row that the model will see, in training or validation. */
static int64_t trainer_length(const struct trainer *t) {
    int64_t T = t->options.data.T;
    return t->data.valid && t->eval.window > T ? t->eval.window : T;
}

/* ---- 1. config and data ----------------------------------------------------------------------------------------- */

/* The tokenizer of the training data: from the tokenizer.json beside it, or by its name. The tokens of a task have
 * none: their number goes into the config, so that the checkpoint alone says how many there are. */
static int open_tokenizer(struct trainer *t, error *err) {
    const struct dataset_info *info = row_source_get_info(t->data.data[0])->shards;
    if (!info) {
        char vocab[24];
        snprintf(vocab, sizeof vocab, "%lld", (long long)data_options_vocab(&t->options.data));
        return config_set(t->config, "model", "vocab_size", vocab, err);
    }
    const char *spec = info->tokenizer_path[0] ? info->tokenizer_path : info->tokenizer_name;
    TRY(tokenizer_open(&t->tokenizer, spec, err));
    if (tokenizer_identity(t->tokenizer) == info->tokenizer_identity) return 0;
    return error_input(
        err, "the training data was made with another tokenizer '%s' (%016llx) than %s (%016llx); tokenize it again",
        info->tokenizer_name, (unsigned long long)info->tokenizer_identity, spec,
        (unsigned long long)tokenizer_identity(t->tokenizer));
}

/* Model and data. A key that nobody knows is told first: it may be why the data was not found. */
static int bind_all(struct trainer *t, error *err) {
    TRY(run_options_bind(&t->options, t->config, err));
    /* What was chosen goes into the run's config, so that a session on another machine does not choose otherwise. */
    TRY(config_choose(t->config, "train", "device", device_choices[t->options.train.device], err));
    TRY(config_choose(t->config, "train", "precision", precision_choices[t->options.train.precision], err));
    error data_error = {0};
    int data_result = data_sources_open(&t->data, &t->options.data, &data_error);
    if (data_result == 0) data_result = open_tokenizer(t, &data_error);
    t->vocab = data_options_vocab(&t->options.data);
    if (t->tokenizer) t->vocab = tokenizer_vocab(t->tokenizer);
    int64_t vocab = t->vocab ? t->vocab : BYTES_VOCAB;
    int model_result = model_config_bind(&t->model_config, t->config, vocab, err);
    if (model_result == 0) TRY(config_finish(t->config, err));
    if (model_result == 0) TRY(groups_check(&t->model_config->params, &t->options.optimizer, err));
    if (data_result != 0) {
        *err = data_error;
        return -1;
    }
    return model_result;
}

/* The same for generated tasks: a model of text, or of a task with another vocabulary, is not theirs. */
static int check_task(const struct trainer *t, struct checkpoint *from, error *err) {
    if (checkpoint_has_tokenizer(from)) {
        return error_input(err, "%s was trained on text, and the training data is a generated task; give data of text",
                           checkpoint_path(from));
    }
    struct data_options *theirs = malloc(sizeof *theirs);
    if (!theirs) return error_system(err, "no memory for the config");
    int result = data_options_bind(checkpoint_config(from), theirs, err);
    int64_t vocab = result == 0 ? data_options_vocab(theirs) : 0;
    free(theirs);
    if (result != 0 || vocab == 0 || vocab == t->vocab) return result;
    return error_input(
        err, "%s was trained on a task with %lld ids, the training data has %lld; give a task with as many",
        checkpoint_path(from), (long long)vocab, (long long)t->vocab);
}

/* Refuse a checkpoint whose tokens mean something else than the data's. */
static int check_tokenizer(const struct trainer *t, struct checkpoint *from, error *err) {
    tokenizer *theirs;
    if (!t->tokenizer) return check_task(t, from, err);
    TRY(checkpoint_tokenizer(from, &theirs, err));
    uint64_t identity = tokenizer_identity(theirs);
    tokenizer_close(theirs);
    if (identity == tokenizer_identity(t->tokenizer)) return 0;
    return error_input(
        err, "the tokenizer of %s (%016llx) is not that of the training data (%016llx); give data made with it",
        checkpoint_path(from), (unsigned long long)identity, (unsigned long long)tokenizer_identity(t->tokenizer));
}

static int check_inputs(struct trainer *t, error *err) {
    TRY(bind_all(t, err));
    TRY(settings_of(&t->settings, t->config, err));
    const struct run_options *o = &t->options;
    if (!o->train.out[0]) {
        return error_input(err, "train.out is empty; name the directory of the run, such as train.out=runs/a");
    }
    if (file_exists(o->train.out) && !file_is_directory(o->train.out)) {
        return error_input(err, "train.out = %s is a file; name a directory, or one that does not exist yet",
                           o->train.out);
    }
    TRY(run_options_split(o, t->comm->ranks, &t->micro_batch, &t->accumulate, err));
    t->eval = o->eval;
    if (t->eval.window == 0) t->eval.window = t->data.valid ? evaluate_window(t->data.valid, o->data.T) : o->data.T;
    if (t->eval.batch > t->micro_batch) t->eval.batch = t->micro_batch;
    if (t->data.valid) TRY(evaluate_check(t->data.valid, "data.valid", &t->eval, err));
    if (!o->train.init[0]) return 0;
    /* A directory with a checkpoint goes on from that; then train.init has had its effect already. */
    bool goes_on;
    TRY(run_has_checkpoint(&goes_on, o->train.out, err));
    if (goes_on) return 0;
    if (checkpoint_open(&t->from, o->train.init, err) != 0) return error_context(err, "train.init");
    return check_tokenizer(t, t->from, err);
}

/* ---- 2 and 3. the run's directory, and what it holds ------------------------------------------------------------ */

static int lock_if_there(struct trainer *t, error *err) {
    const char *run = t->options.train.out;
    if (t->comm->rank != 0 || !file_is_directory(run)) return 0;
    TRY(run_lock(&t->lock, run, err));
    /* Rank 0 looks, so that all ranks see the same. */
    TRY(run_has_checkpoint(&t->resumed, run, err));
    if (!t->resumed) return 0;
    if (t->options.train.resume) return checkpoint_mend_latest(run, err);
    return error_input(err,
                       "train.out = %s holds checkpoints and train.resume = false; choose another directory, or "
                       "train.resume=true to go on",
                       run);
}

static void note_change(const struct setting *saved, const struct setting *now) {
    fprintf(stderr, "from here on %s.%s = %s (it was %s)\n", now->section, now->key, now->value, saved->value);
}

/* Whether this run may go on from the checkpoint: the options of both, as this program understands them. */
static int compare_configs(struct trainer *t, error *err) {
    config *saved = checkpoint_config(t->from);
    struct run_options *options = malloc(sizeof *options);
    if (!options) return error_system(err, "no memory for the config");
    struct model_config *saved_model = NULL;
    struct settings settings = {0};
    int result = run_options_bind(options, saved, err);
    free(options);
    if (result == 0) result = model_config_bind(&saved_model, saved, t->vocab, err);
    if (result == 0) result = settings_of(&settings, saved, err);
    if (result != 0) {
        error_context(err, "%s", checkpoint_path(t->from));
    } else {
        result = settings_compare(&settings, &t->settings, checkpoint_path(t->from),
                                  t->comm->rank == 0 ? note_change : NULL, err);
    }
    settings_free(&settings);
    if (saved_model) model_config_free(saved_model);
    return result;
}

static int find_checkpoint(struct trainer *t, error *err) {
    const struct train_options *o = &t->options.train;
    t->state = (struct trainer_state){.best_valid = NAN};
    t->history = (struct report_history){.valid_step = -1, .valid_loss = NAN};
    if (!t->resumed) return 0;
    TRY(checkpoint_open(&t->from, o->out, err));
    if (!checkpoint_is_ours(t->from)) {
        return error_input(
            err,
            "%s holds no trainer's state, so a run can't go on from it; give it as train.init with another train.out",
            checkpoint_path(t->from));
    }
    TRY(check_tokenizer(t, t->from, err));
    t->state = *checkpoint_state(t->from);
    if (t->state.step > o->steps) {
        return error_input(err, "train.steps = %lld, but %s stands at step %lld already; give at least that many",
                           (long long)o->steps, checkpoint_path(t->from), (long long)t->state.step);
    }
    TRY(compare_configs(t, err));
    if (t->state.samples != ramp_samples(&t->options.ramp, t->state.step)) {
        return error_input(err, "%s says that %llu sequences were read in %lld steps, but by its config it is %llu",
                           checkpoint_path(t->from), (unsigned long long)t->state.samples, (long long)t->state.step,
                           (unsigned long long)ramp_samples(&t->options.ramp, t->state.step));
    }
    return report_read_history(o->out, t->state.step, &t->history, err);
}

/* ---- 4. what the run computes with ------------------------------------------------------------------------------ */

/* The loader comes first: it finds data too short for a row, before gigabytes are taken for a model. */
static int open_loader(struct trainer *t, error *err) {
    const struct train_options *o = &t->options.train;
    TRY(device_open_at(&t->dev, (enum device_kind)o->device, (enum precision)o->precision,
                       comm_device_index(t->comm), err));
    t->dev->direct = !o->graph;
    struct loader_options options = data_loader_options(&t->options.data);
    options.B = t->micro_batch;
    options.rank = t->comm->rank;
    options.ranks = t->comm->ranks;
    options.start = t->state.samples;
    options.memory = t->dev->host_memory;
    return loader_open(&t->loader, t->data.train, t->data.count, &options, err);
}

static int open_model(struct trainer *t, error *err) {
    const struct run_options *o = &t->options;
    TRY(model_open(&t->model, t->model_config, t->dev, MODEL_TRAIN, t->micro_batch, trainer_length(t), t->comm->rank,
                   t->comm->ranks, err));
    t->comm->least_bytes = o->comm.bucket_mib << 20;
    TRY(optimizer_open(&t->optimizer, t->model, t->comm, &o->optimizer, err));
    /* The gradient is that of the sum over targets; a nominal count keeps it near the mean's size in floating point. */
    double scale = 1 / ((double)o->train.batch * (double)o->data.T);
    TRY(step_open(&t->step, t->model, t->optimizer, t->comm, scale, o->optimizer.z_loss,
                  o->solver.limit, err));
    if (!t->from) {
        model_init(t->model, (uint64_t)o->train.seed);
        return 0;
    }
    if (checkpoint_load_model(t->from, t->model, err) == 0) return 0;
    return t->resumed ? -1 : error_context(err, "train.init");
}

static int load_optimizer(struct trainer *t, error *err) {
    if (!t->resumed) return 0;
    TRY(checkpoint_load_optimizer(t->from, t->optimizer, t->comm, err));
    optimizer_set_steps(t->optimizer, t->state.optimizer_steps);
    return 0;
}

/* ---- 5. directory and log --------------------------------------------------------------------------------------- */

static void print_set(const char *front, const char *name, const row_source *d) {
    const struct dataset_info *info = row_source_get_info(d)->shards;
    char tokens[24];
    if (!info) {
        const struct row_source_info *task = row_source_get_info(d);
        fprintf(stderr, "%-12s%s: %s, %s, samples of at most %lld inputs\n", front, name, task->path, task->task,
                (long long)task->length);
        return;
    }
    text_count(tokens, sizeof tokens, (double)info->tokens);
    fprintf(stderr, "%-12s%s: %s tokens, %llu document%s\n", front, name, tokens, (unsigned long long)info->documents,
            info->documents == 1 ? "" : "s");
}

static void print_data(const struct trainer *t) {
    for (size_t i = 0; i < t->data.count; i++) print_set(i ? "" : "data", t->data.train[i].name, t->data.data[i]);
    if (t->data.valid) print_set("", "validation", t->data.valid);
}

static void print_ramp(const struct ramp *r) {
    if (r->count == 1) return;
    const struct ramp_stage *first = &r->stages[0], *last = &r->stages[r->count - 1];
    fprintf(stderr, "            %lld sequences at first, %d batch sizes in all, the last from step %lld on\n",
            (long long)first->batch, r->count, (long long)last->step);
}

static void print_solvers(const struct trainer *t) {
    struct model_solving list[LIMIT_BLOCK_KINDS];
    int count = model_list_solvers(t->model_config, t->dev->ops, t->micro_batch, t->options.data.T, list);
    for (int i = 0; i < count; i++) {
        const struct cell_solver *s = &list[i].solver;
        fprintf(stderr, "%-12s%s: %s", i ? "" : "solver", list[i].layer->block_name, solver_method_names[s->method]);
        if (s->method != CELL_SEQUENTIAL) fprintf(stderr, ", %d iterations", s->iterations);
        fprintf(stderr, "\n");
    }
}

/* What this run is, for a person who has just started it. */
static void print_summary(const struct trainer *t, const struct model_memory *memory) {
    const struct run_options *o = &t->options;
    const struct model_config *mc = t->model_config;
    char machine[160], total[24], parts[4][24];
    device_describe(t->dev, machine, sizeof machine);
    fprintf(stderr, "riverrun %s (%s), %d rank%s, %s, %s\n", version_number(), version_commit(), t->comm->ranks,
            t->comm->ranks == 1 ? "" : "s", machine, precision_choices[o->train.precision]);
    text_count(total, sizeof total, (double)mc->params.total);
    fprintf(stderr, "model       %s parameters (%lld): %s, width %lld, vocabulary %lld\n", total,
            (long long)mc->params.total, mc->options.pattern, (long long)mc->options.d_model, (long long)mc->rows);
    print_data(t);
    fprintf(stderr, "batch       %lld sequences of %lld tokens: %lld micro-batch%s of %lld on each rank\n",
            (long long)o->train.batch, (long long)o->data.T, (long long)t->accumulate, t->accumulate == 1 ? "" : "es",
            (long long)t->micro_batch);
    print_ramp(&o->ramp);
    print_solvers(t);
    fprintf(stderr, "memory      %s a rank: parameters and gradients %s, optimizer %s, activations %s, scratch %s\n",
            text_bytes(total, sizeof total, (double)memory->total),
            text_bytes(parts[0], sizeof parts[0], (double)(memory->parameters + memory->gradients)),
            text_bytes(parts[1], sizeof parts[1], (double)memory->optimizer),
            text_bytes(parts[2], sizeof parts[2], (double)memory->activations),
            text_bytes(parts[3], sizeof parts[3], (double)(memory->scratch + memory->batch)));
    fprintf(stderr, "run         %s: ", o->train.out);
    if (t->resumed)
        fprintf(stderr, "goes on from step %lld of %lld\n", (long long)t->state.step, (long long)o->train.steps);
    else
        fprintf(stderr, "%lld steps%s%s\n", (long long)o->train.steps, t->from ? ", weights from " : "",
                t->from ? o->train.init : "");
}

static int open_directory(struct trainer *t, error *err) {
    if (t->comm->rank != 0) return 0;
    const struct train_options *o = &t->options.train;
    TRY(file_make_directories(o->out, err));
    if (t->lock < 0) TRY(run_lock(&t->lock, o->out, err));
    char *text = config_text(t->config);
    if (!text) return error_system(err, "no memory for the config");
    int result = run_write_config(o->out, text, err);
    free(text);
    if (result != 0) return -1;
    TRY(report_open(&t->report, o->out, t->state.step, o->steps, o->log_every, trainer_unit(t), &t->history, err));
    char machine[160];
    device_describe(t->dev, machine, sizeof machine);
    const struct model_config *mc = t->model_config;
    struct model_flops flops[MODEL_FLOPS_MAX];
    struct model_solving solvers[LIMIT_BLOCK_KINDS];
    struct model_memory memory;
    int64_t T = t->options.data.T;
    TRY(model_plan(&memory, mc, t->dev->ops, MODEL_TRAIN, t->micro_batch, trainer_length(t), t->comm->ranks, err));
    struct report_run run = {
        .step = t->state.step,
        .machine = machine,
        .precision = precision_choices[o->precision],
        .ranks = t->comm->ranks,
        .seed = o->seed,
        .parameters = mc->params.total,
        .flops_per_token = 3 * model_forward_flops(mc, T),
        .flops_per_sequence = 3 * model_forward_flops(mc, T) * (double)T,
        .flops = flops,
        .flop_kinds = model_list_flops(mc, T, flops),
        .solvers = solvers,
        .solver_kinds = model_list_solvers(mc, t->dev->ops, t->micro_batch, T, solvers),
        .peak_flops = o->precision == PRECISION_BF16 ? t->comm->ranks * device_peak_flops(t->dev) : 0,
        .planned = memory.total,
        .config = &t->settings,
    };
    TRY(report_run(t->report, &run, err));
    print_summary(t, &memory);
    return 0;
}

/* ---- all of it -------------------------------------------------------------------------------------------------- */

/* Of a run that is finished: there is nothing to compute, but its last save may have failed to remove old ones. */
static int clear_up(const struct trainer *t, error *err) {
    const struct run_options *o = &t->options;
    return t->comm->rank == 0 ? checkpoint_prune(o->train.out, t->state.step, o->checkpoint.keep, err) : 0;
}

static int open_stages(struct trainer *t, error *err) {
    struct comm *comm = t->comm;
    TRY(comm_agree(comm, check_inputs(t, err), err));
    TRY(comm_agree(comm, lock_if_there(t, err), err));
    comm_broadcast(comm, &t->resumed, sizeof t->resumed, 0);
    TRY(comm_agree(comm, find_checkpoint(t, err), err));
    comm_broadcast(comm, &t->history, sizeof t->history, 0);
    if (t->state.step == t->options.train.steps) return comm_agree(comm, clear_up(t, err), err);
    TRY(comm_agree(comm, open_loader(t, err), err));
    TRY(comm_agree(comm, comm_attach(comm, t->dev, optimizer_slots(t->model_config), err), err));
    TRY(comm_agree(comm, open_model(t, err), err));
    TRY(comm_agree(comm, load_optimizer(t, err), err));
    TRY(comm_agree(comm, open_directory(t, err), err));
    checkpoint_close(t->from);
    t->from = NULL;
    return 0;
}

int trainer_open(struct trainer **out, config *c, struct comm *comm, error *err) {
    *out = NULL;
    struct trainer *t = calloc(1, sizeof *t);
    if (!t) return error_system(err, "no memory for the trainer");
    t->config = c;
    t->comm = comm;
    t->lock = -1;
    if (open_stages(t, err) != 0) {
        trainer_close(t);
        return -1;
    }
    *out = t;
    return 0;
}

void trainer_close(struct trainer *t) {
    if (!t) return;
    if (t->comm) comm_watch(t->comm, 0);
    report_close(t->report);
    loader_close(t->loader);
    step_close(t->step);
    comm_detach(t->comm);
    optimizer_close(t->optimizer);
    model_close(t->model);
    if (t->dev) device_close(t->dev);
    if (t->from) checkpoint_close(t->from);
    if (t->model_config) model_config_free(t->model_config);
    if (t->tokenizer) tokenizer_close(t->tokenizer);
    data_sources_close(&t->data);
    settings_free(&t->settings);
    run_unlock(t->lock);
    free(t);
}
