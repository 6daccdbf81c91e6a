/* command_export.c: `riverrun export CHECKPOINT --out DIRECTORY`: config.json, weights and tokenizer files for other
 * software, without the optimizer and the trainer's state. The work is conversion.c's. */
#include "train/commands.h"

#include "common/text.h"
#include "model/architecture.h"
#include "train/conversion.h"
#include "train/flags.h"
#include <stddef.h>

enum { DTYPE_CHOICE_F32, DTYPE_CHOICE_BF16 };
static const char *const dtype_choices[] = {"f32", "bf16", NULL};

struct export_flags {
    const char *out;
    int dtype;
    bool all;
};

#define FIELD(name) offsetof(struct export_flags, name)
static const struct option export_table[] = {
    {"out", OPTION_STRING, FIELD(out), NULL, 0, 0, "", "The directory to write; must not exist.", NULL},
    {"dtype", OPTION_CHOICE, FIELD(dtype), "f32", 0, 0, "",
     "Type of the weights. bf16 rounds to the nearest, but what a model is sensitive to stays f32: norms, "
     "convolutions, A_log, D and the bias of the step sizes.",
     dtype_choices},
    {"dtype-all", OPTION_BOOL, FIELD(all), "false", 0, 0, "", "bf16: these too, for software that wants one type.",
     NULL},
    OPTIONS_END,
};

static const struct flags flags = {
    .command = "export",
    .arguments = "CHECKPOINT --out DIRECTORY",
    .summary = "Writes the model of a checkpoint as a directory for other software, such as Hugging Face "
               "transformers:\n"
               "weights, config.json and tokenizer, without what only training needs. CHECKPOINT may be a run: then "
               "its latest.",
    .table = export_table,
    .least = 1,
    .most = 1,
};

static void tell(const struct conversion *v) {
    char total[24], size[24];
    const char *name = architecture_class(v->model);
    uint64_t bytes = 0;
    for (int i = 0; i < v->directory.count; i++) bytes += v->directory.files[i].size;
    fprintf(stderr, "%s: %s, %s parameters, %s, from %s\n", v->out, name ? name : "a model of riverrun's own",
            text_count(total, sizeof total, (double)v->model->params.total),
            text_bytes(size, sizeof size, (double)bytes), v->from->path);
    if (!name)
        fprintf(stderr,
                "note: transformers has no class for this model; with trust_remote_code=True it opens it by the "
                        "Python files in the directory.\n");
    const char *caveat = architecture_caveat(v->model);
    if (caveat) fprintf(stderr, "note: %s.\n", caveat);
}

static int export(struct conversion *v, const char *from, const struct export_flags *f, error *err) {
    enum weight_form form = WEIGHTS_F32;
    if (f->dtype == DTYPE_CHOICE_BF16) form = f->all ? WEIGHTS_BF16_ALL : WEIGHTS_BF16;
    else if (f->all)
        return error_input(err, "--dtype-all means nothing with --dtype f32; give --dtype bf16 or leave it out");
    TRY(conversion_open(v, from, "", f->out, err));
    TRY(conversion_write(v, form, err));
    TRY(conversion_finish(v, err));
    tell(v);
    return 0;
}

int command_export(int argc, char **argv, error *err) {
    struct export_flags f;
    struct conversion v = {.from = NULL};
    int count;
    bool helped = false;
    TRY(flags_parse(&flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    int result = export(&v, argv[1], &f, err);
    conversion_close(&v);
    return result;
}
