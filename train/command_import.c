/* command_import.c: `riverrun import DIRECTORY --out CHECKPOINT`: a model directory of other software becomes a
 * checkpoint of riverrun: the same weights, a config.ini, checksums, no optimizer. The work is conversion.c's. */
#include "train/commands.h"

#include "common/text.h"
#include "model/architecture.h"
#include "train/conversion.h"
#include "train/flags.h"
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

struct import_flags {
    const char *out, *tokenizer;
};

#define FIELD(name) offsetof(struct import_flags, name)
static const struct option import_table[] = {
    {"out", OPTION_STRING, FIELD(out), NULL, 0, 0, "", "The checkpoint to write; must not exist.", NULL},
    {"tokenizer", OPTION_STRING, FIELD(tokenizer), "", 0, 0, "",
     "Tokenizer of the model: bytes, or a tokenizer.json; without it the one in DIRECTORY.", NULL},
    OPTIONS_END,
};

static const struct flags flags = {
    .command = "import",
    .arguments = "DIRECTORY --out CHECKPOINT",
    .summary =
        "Makes a checkpoint of a directory that Hugging Face transformers has saved (config.json and safetensors).\n"
        "`riverrun train CONFIG train.init=CHECKPOINT` trains it further, `riverrun generate CHECKPOINT` uses it.",
    .table = import_table,
    .least = 1,
    .most = 1,
};

static int write_config_ini(struct conversion *v, error *err) {
    if (config_finish(v->from->config, err) != 0) return error_context(err, "%s", v->from->path);
    char *text = config_text(v->from->config);
    if (!text) return error_system(err, "%s: no memory for the config", v->out);
    int result = model_directory_text(&v->directory, CONFIG_NAME, text, strlen(text), err);
    free(text);
    return result;
}

static void tell(const struct conversion *v) {
    char total[24];
    const char *name = architecture_class(v->model);
    fprintf(stderr, "%s: %s, %s parameters, from %s\n", v->out, name ? name : "a model of riverrun's own",
            text_count(total, sizeof total, (double)v->model->params.total), v->from->path);
    if (v->tokenizer) return;
    fprintf(stderr,
            "note: %s. The checkpoint can be exported again, with its tokenizer files as they were; train, eval and "
            "generate need a tokenizer that riverrun reads (--tokenizer).\n",
            v->why);
}

static int import(struct conversion *v, const char *from, const struct import_flags *f, error *err) {
    TRY(conversion_open(v, from, f->tokenizer, f->out, err));
    if (v->from->ours) {
        return error_input(err,
                           "%s is a checkpoint of riverrun already; train.init, eval and generate take it as it is",
                           v->from->path);
    }
    TRY(conversion_write(v, WEIGHTS_F32, err));
    TRY(write_config_ini(v, err));
    struct trainer_state state = {.best_valid = NAN};
    TRY(manifest_write(&v->directory, &state, err));
    TRY(conversion_finish(v, err));
    tell(v);
    return 0;
}

int command_import(int argc, char **argv, error *err) {
    struct import_flags f;
    struct conversion v = {.from = NULL};
    int count;
    bool helped = false;
    TRY(flags_parse(&flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    int result = import(&v, argv[1], &f, err);
    conversion_close(&v);
    return result;
}
