/* conversion.c: reading one model directory and writing another. See conversion.h. Called by command_import.c and
 * command_export.c. */
#include "train/conversion.h"

#include "common/file.h"
#include <stdio.h>
#include <string.h>

#define TEMPORARY ".riverrun-tmp" /* behind the name of the directory to be */

static int open_tokenizer(struct conversion *v, const char *spec, error *err) {
    if (spec[0]) {
        if (tokenizer_open(&v->tokenizer, spec, err) != 0) return error_context(err, "--tokenizer");
        return v->from->ours ? 0 : checkpoint_set_vocabulary(v->from, v->tokenizer, err);
    }
    error why = {0};
    if (checkpoint_tokenizer(v->from, &v->tokenizer, &why) == 0) return 0;
    if (why.kind == ERROR_SYSTEM) { /* which says nothing about the directory */
        *err = why;
        return -1;
    }
    snprintf(v->why, sizeof v->why, "%s", why.text);
    return 0;
}

int conversion_open(struct conversion *v, const char *from, const char *tokenizer_spec, const char *out, error *err) {
    *v = (struct conversion){.out = out};
    char parent[LIMIT_PATH];
    if (file_exists(out)) return error_input(err, "--out %s exists already; give a name that is free", out);
    TRY(model_directory_parent(parent, sizeof parent, out, err));
    if (!file_is_directory(parent)) return error_input(err, "--out %s: there is no directory %s", out, parent);
    TRY(checkpoint_open(&v->from, from, err));
    TRY(open_tokenizer(v, tokenizer_spec, err));
    int64_t vocab = v->tokenizer ? tokenizer_vocab(v->tokenizer) : 0;
    if (model_config_bind(&v->model, v->from->config, vocab, err) != 0) return error_context(err, "%s", v->from->path);
    v->reader = (struct checkpoint_reader){.checkpoint = v->from, .params = &v->model->params};
    return weights_check(&v->from->weights, &v->model->params, err);
}

/* OUT without slashes at its end, and the suffix. */
static int temporary_path(char path[LIMIT_PATH], const char *out, error *err) {
    size_t length = strlen(out);
    while (length > 1 && out[length - 1] == '/') length--;
    if (length + sizeof TEMPORARY > LIMIT_PATH) return error_input(err, "--out %.200s... is too long", out);
    snprintf(path, LIMIT_PATH, "%.*s%s", (int)length, out, TEMPORARY);
    return 0;
}

int conversion_write(struct conversion *v, enum weight_form form, error *err) {
    char path[LIMIT_PATH];
    TRY(temporary_path(path, v->out, err));
    TRY(file_remove_tree(path, err)); /* of one that was killed */
    TRY(model_directory_begin(&v->directory, path, err));
    struct weight_source source = checkpoint_source(&v->reader);
    int64_t eod = v->tokenizer ? tokenizer_eod(v->tokenizer) : v->from->eod;
    TRY(model_directory_model(&v->directory, v->model, v->from->config, eod, &source, form, err));
    if (v->tokenizer) return model_directory_tokenizer(&v->directory, v->tokenizer, err);
    return model_directory_copy_tokenizer(&v->directory, v->from->path, err);
}

int conversion_finish(struct conversion *v, error *err) {
    TRY(model_directory_verify(&v->directory, err));
    TRY(model_directory_publish(&v->directory, v->out, err));
    v->directory.path[0] = 0;
    return 0;
}

void conversion_close(struct conversion *v) {
    error ignored;
    if (v->directory.path[0]) file_remove_tree(v->directory.path, &ignored);
    model_config_free(v->model);
    if (v->tokenizer) tokenizer_close(v->tokenizer);
    checkpoint_close(v->from);
}
