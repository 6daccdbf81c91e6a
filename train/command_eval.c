/* command_eval.c: `riverrun eval CHECKPOINT --data PATH`: how well a model predicts a data set, or solves a generated
 * task, as one JSON line.
 * The work is evaluate.c's; what is not said on the command line is as in the run that made the checkpoint, so
 * that the number is the one its validation gave. */
#include "train/commands.h"

#include "common/file.h"
#include "train/checkpoint.h"
#include "train/evaluate.h"
#include "train/flags.h"
#include "train/json_line.h"
#include <stdlib.h>
#include <string.h>

struct eval_flags {
    const char *data;
    int mode, device, precision;
    int64_t window, batch, tokens;
    bool reset;
};
/* Positions in the table: which flags were given. */
enum { GIVEN_DATA, GIVEN_MODE, GIVEN_WINDOW, GIVEN_BATCH, GIVEN_TOKENS, GIVEN_RESET, GIVEN_DEVICE, GIVEN_PRECISION };

#define AT(field) offsetof(struct eval_flags, field)
static const struct option eval_flags_table[] = {
    [GIVEN_DATA] = {"data", OPTION_STRING, AT(data), NULL, 0, 0, "",
                    "Data set: a directory of shards, one shard, or task:NAME.", NULL},
    [GIVEN_MODE] =
        {"mode", OPTION_CHOICE, AT(mode), "", 0, 0, "",
         "window: windows that each start from an empty state. carry: the state is carried through every document. "
         "If not given: eval.mode of the checkpoint's config.",
         eval_mode_choices},
    [GIVEN_WINDOW] =
        {"window", OPTION_INT, AT(window), "", 1, 1 << 24, "tokens",
         "Length of a window, or of the pieces in which carry goes through the data. If not given: eval.window, or "
         "data.seq_len where that is 0; for a task, its longest sample.",
         NULL},
    [GIVEN_BATCH] = {"batch", OPTION_INT, AT(batch), "", 1, 1 << 24, "windows",
                     "Windows at once; does not change the result. If not given: eval.batch.", NULL},
    [GIVEN_TOKENS] = {"tokens", OPTION_INT, AT(tokens), "", 0, 1e12, "tokens",
                      "Predict only this many, from the start of the data; 0: all. If not given: eval.tokens.", NULL},
    [GIVEN_RESET] = {"reset", OPTION_BOOL, AT(reset), "", 0, 0, "",
                     "Start every document with an empty state, or don't. If not given: data.reset.", NULL},
    [GIVEN_DEVICE] = {"device", OPTION_CHOICE, AT(device), "auto", 0, 0, "",
                      "What computes; auto: a GPU if there is one.", device_choices},
    [GIVEN_PRECISION] = {"precision", OPTION_CHOICE, AT(precision), "auto", 0, 0, "",
                         "Numbers that are computed with; auto: bf16 on a GPU, fp32 on the CPU.", precision_choices},
    [GIVEN_PRECISION + 1] = OPTIONS_END,
};

static const struct flags flags = {
    .command = "eval",
    .arguments = "CHECKPOINT [task.NAME.key=value ...]",
    .summary = "Loss (mean nats a token), perplexity, bits per byte and accuracy of a model on a data set, as one\n"
               "line of JSON on standard output. Every token but the first is predicted once. CHECKPOINT is a model\n"
               "directory, or that of a run: then its latest. Under mpirun the windows are dealt out to the\n"
               "processes. task:NAME is a generated task of the run's config, or one that task.NAME.key=value\n"
               "describes or changes; the share of samples that are right in every target is then told, too.",
    .table = eval_flags_table,
    .least = 1,
    .most = -1,
};

/* What an evaluation needs. */
struct evaluator {
    struct eval_flags flags;
    struct data_options *data_options; /* the checkpoint's, with what the command line says about tasks */
    struct eval_options options;       /* as they are used */
    bool reset;
    struct checkpoint *checkpoint;
    row_source *data;
    tokenizer *tokenizer;
    struct model_config *model_config;
    struct device *dev;
    struct model *model;
};

static void evaluator_close(struct evaluator *v) {
    model_close(v->model);
    if (v->dev) device_close(v->dev);
    if (v->model_config) model_config_free(v->model_config);
    if (v->tokenizer) tokenizer_close(v->tokenizer);
    row_source_close(v->data);
    free(v->data_options);
    if (v->checkpoint) checkpoint_close(v->checkpoint);
}

/* The data must be of the tokens that the model was trained on. */
static int check_data(const struct evaluator *v, int64_t trained_vocab, error *err) {
    const struct row_source_info *data = row_source_get_info(v->data);
    const char *path = checkpoint_path(v->checkpoint);
    if (data->task) {
        int64_t vocab = trained_vocab ? trained_vocab : v->model_config->vocab;
        if (v->tokenizer) {
            return error_input(
                err, "--data %s is a generated task, but %s is a model of text; give a data set of its tokenizer",
                data->path, path);
        }
        if ((int64_t)data->vocab == vocab) return 0;
        return error_input(
            err, "--data %s has a vocabulary of %lld ids, %s was trained on one of %lld; give a task with that",
            data->path, (long long)data->vocab, path, (long long)vocab);
    }
    const struct dataset_info *info = data->shards;
    if (info->tokenizer_identity == tokenizer_identity(v->tokenizer)) return 0;
    return error_input(
        err, "--data %s was made with the tokenizer '%s' (%016llx), %s has '%s' (%016llx); give data made with that",
        data->path, info->tokenizer_name, (unsigned long long)info->tokenizer_identity, path,
        tokenizer_name(v->tokenizer), (unsigned long long)tokenizer_identity(v->tokenizer));
}

/* The vocabulary of the task that the model was trained on, whatever the command line says about tasks; 0: none. */
static int read_trained_vocab(const struct evaluator *v, int64_t *vocab, error *err) {
    *vocab = 0;
    if (!checkpoint_is_ours(v->checkpoint)) return 0;
    char path[LIMIT_PATH];
    config *saved = NULL;
    struct data_options *data = malloc(sizeof *data);
    if (!data) return error_system(err, "no memory for the config");
    int result = file_join(path, sizeof path, checkpoint_path(v->checkpoint), "config.ini", err);
    if (result == 0) result = config_load(&saved, path, err);
    if (result == 0) result = data_options_bind(saved, data, err);
    if (result == 0) *vocab = data_options_vocab(data);
    config_free(saved);
    free(data);
    return result;
}

/* What the command line says about tasks goes on top of the checkpoint's config; nothing else of that can change. */
static int check_words(int count, char **argv, error *err) {
    for (int i = 2; i <= count; i++) {
        if (strncmp(argv[i], "task.", 5) == 0) continue;
        return error_input(
            err, "'%.200s' is not about a task: behind the checkpoint only task.NAME.key=value may be given", argv[i]);
    }
    return 0;
}

/* Every key of the command line must be one of its task's. The keys of other sections are the checkpoint's own: they
 * are bound here only to be known. */
static int check_keys(config *c, error *err) {
    struct run_options *run = malloc(sizeof *run);
    if (!run) return error_system(err, "no memory for the config");
    int result = run_options_bind(run, c, err);
    free(run);
    return result == 0 ? config_finish(c, err) : -1;
}

/* The checkpoint's own options, then what the command line says. */
static int choose_options(struct evaluator *v, uint64_t given, error *err) {
    config *c = checkpoint_config(v->checkpoint);
    if (config_bind(c, "eval", eval_options_table, &v->options, err) != 0) {
        return error_context(err, "%s", checkpoint_path(v->checkpoint));
    }
    const struct eval_flags *f = &v->flags;
    if (row_source_get_info(v->data)->task) { /* the run's were for its own data */
        v->options.mode = EVAL_WINDOW;
        v->options.window = v->options.tokens = 0;
    }
    v->reset = v->data_options->reset;
    if (given >> GIVEN_MODE & 1) v->options.mode = f->mode;
    if (given >> GIVEN_WINDOW & 1) v->options.window = f->window;
    if (given >> GIVEN_BATCH & 1) v->options.batch = f->batch;
    if (given >> GIVEN_TOKENS & 1) v->options.tokens = f->tokens;
    if (given >> GIVEN_RESET & 1) v->reset = f->reset;
    if (v->options.window == 0) v->options.window = evaluate_window(v->data, v->data_options->T);
    TRY(evaluate_check(v->data, "--data", &v->options, err));
    /* Memory for no more than there is to do. */
    int64_t inputs = (int64_t)row_source_inputs(v->data, v->options.window);
    bool separate = row_source_get_info(v->data)->separate;
    if (v->options.tokens > 0 && v->options.tokens < inputs) inputs = v->options.tokens;
    if (v->options.window > inputs && !separate) v->options.window = inputs;
    int64_t windows = (inputs - 1) / v->options.window + 1;
    if (v->options.batch > windows) v->options.batch = windows;
    if (v->options.mode == EVAL_CARRY) v->options.batch = 1;
    return 0;
}

static int open_data(struct evaluator *v, int count, char **argv, error *err) {
    config *c = checkpoint_config(v->checkpoint);
    for (int i = 2; i <= count; i++) TRY(config_override(c, argv[i], err));
    v->data_options = malloc(sizeof *v->data_options);
    if (!v->data_options) return error_system(err, "no memory for the config");
    TRY(data_options_bind(c, v->data_options, err));
    if (data_open(&v->data, v->data_options, v->flags.data, TASK_VALID, err) != 0) return error_context(err, "--data");
    return 0;
}

static int evaluator_open(struct evaluator *v, int argc, char **argv, struct comm *comm, error *err) {
    int count;
    uint64_t given;
    bool helped;
    int64_t trained_vocab;
    TRY(flags_parse(&flags, argc, argv, &v->flags, &count, &given, &helped, err));
    TRY(check_words(count, argv, err));
    TRY(checkpoint_open(&v->checkpoint, argv[1], err));
    TRY(read_trained_vocab(v, &trained_vocab, err));
    TRY(open_data(v, count, argv, err));
    /* A task needs no tokenizer; where there is one, the model is one of text. */
    bool task = row_source_get_info(v->data)->task != NULL;
    if (!task || checkpoint_has_tokenizer(v->checkpoint)) TRY(checkpoint_tokenizer(v->checkpoint, &v->tokenizer, err));
    int64_t vocab = v->tokenizer ? tokenizer_vocab(v->tokenizer) : trained_vocab;
    TRY(model_config_bind(&v->model_config, checkpoint_config(v->checkpoint), vocab, err));
    if (count > 1) TRY(check_keys(checkpoint_config(v->checkpoint), err));
    TRY(check_data(v, trained_vocab, err));
    TRY(choose_options(v, given, err));
    TRY(device_choose(&v->flags.device, &v->flags.precision, err));
    TRY(device_open_at(&v->dev, (enum device_kind)v->flags.device, (enum precision)v->flags.precision,
                       comm_device_index(comm), err));
    TRY(model_open(&v->model, v->model_config, v->dev, MODEL_INFER, v->options.batch, v->options.window, comm->rank,
                   comm->ranks, err));
    return checkpoint_load_model(v->checkpoint, v->model, err);
}

static void print_result(const struct evaluator *v, const struct evaluation *e) {
    struct json_line l;
    json_line_begin(&l);
    json_line_real(&l, "loss", e->loss);
    json_line_real(&l, "perplexity", e->perplexity);
    json_line_real(&l, "bits_per_byte", e->bits_per_byte);
    json_line_real(&l, "accuracy", e->accuracy);
    json_line_int(&l, "tokens", (int64_t)e->tokens);
    json_line_int(&l, "bytes", (int64_t)e->bytes);
    if (row_source_get_info(v->data)->separate) {
        json_line_int(&l, "sequences", (int64_t)e->sequences);
        json_line_real(&l, "sequence_accuracy", e->sequence_accuracy);
    }
    evaluation_log_solvers(e, &l);
    json_line_string(&l, "mode", eval_mode_choices[v->options.mode]);
    json_line_int(&l, "window", v->options.window);
    json_line_bool(&l, "reset", v->reset);
    json_line_string(&l, "precision", precision_choices[v->flags.precision]);
    json_line_int(&l, "step", checkpoint_state(v->checkpoint)->step);
    json_line_string(&l, "checkpoint", checkpoint_path(v->checkpoint));
    json_line_string(&l, "data", v->flags.data);
    json_line_end(&l);
    fwrite(l.text, 1, l.used, stdout);
}

static int run_eval(struct evaluator *v, struct comm *comm, int argc, char **argv, error *err) {
    TRY(comm_agree(comm, evaluator_open(v, argc, argv, comm, err), err));
    struct evaluation e;
    if (evaluate(&e, v->model, v->data, v->tokenizer, &v->options, v->reset, comm, err) != 0) {
        if (comm->ranks == 1) return -1;
        fprintf(stderr, "riverrun: rank %d: %s\n", comm->rank, err->text);
        comm_abort(comm, error_exit_code(err));
    }
    if (comm->rank == 0) print_result(v, &e);
    return 0;
}

int command_eval(int argc, char **argv, error *err) {
    for (int i = 1; i < argc; i++) {
        if (flags_is_help(argv[i])) {
            flags_help(stdout, &flags);
            return 0;
        }
    }
    struct comm comm;
    struct evaluator v = {0};
    TRY(comm_open(&comm, err));
    int result = run_eval(&v, &comm, argc, argv, err);
    evaluator_close(&v);
    if (result != 0) comm_tell(&comm, err);
    comm_close(&comm);
    return result;
}
