/* model_directory.c: writes and verifies model directories. See model_directory.h. */
#include "train/model_directory.h"

#include "common/file.h"
#include "common/safetensors.h"
#include "model/architecture.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

int model_directory_begin(struct model_directory *d, const char *path, error *err) {
    *d = (struct model_directory){.count = 0};
    if (strlen(path) >= sizeof d->path) return error_input(err, "the path %.200s... is too long", path);
    snprintf(d->path, sizeof d->path, "%s", path);
    if (file_exists(path)) return error_input(err, "%s exists already", path);
    return file_make_directories(path, err);
}

void model_directory_add(struct model_directory *d, const char *name, uint64_t size, uint64_t hash) {
    ASSERT(d->count < MODEL_DIRECTORY_FILES && strlen(name) < sizeof d->files[0].name);
    struct model_file *f = &d->files[d->count++];
    snprintf(f->name, sizeof f->name, "%s", name);
    f->size = size;
    f->hash = hash;
}

int model_directory_text(struct model_directory *d, const char *name, const char *text, size_t size, error *err) {
    char path[LIMIT_PATH];
    TRY(file_join(path, sizeof path, d->path, name, err));
    TRY(file_write_all(path, text, size, err));
    model_directory_add(d, name, size, XXH64(text, size, 0));
    return 0;
}

/* json_write chooses how numbers are spelt, so the bytes to expect are those on disk once they mean `value`. */
int model_directory_json(struct model_directory *d, const char *name, const json_t *value, error *err) {
    char path[LIMIT_PATH];
    uint64_t size, hash;
    json_t *back;
    TRY(file_join(path, sizeof path, d->path, name, err));
    TRY(json_write(value, path, err));
    TRY(file_hash_of(path, &hash, &size, err));
    TRY(json_read(&back, path, err));
    bool same = json_equal(back, value);
    json_decref(back);
    if (!same) return error_system(err, "%s does not read back as it was written", path);
    model_directory_add(d, name, size, hash);
    return 0;
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

static int write_generation_config(struct model_directory *d, int64_t eod, error *err) {
    json_t *object = json_object();
    json_object_set_new(object, "_from_model_config", json_true());
    architecture_put_ids(object, eod);
    int result = model_directory_json(d, "generation_config.json", object, err);
    json_decref(object);
    return result;
}

static int write_config(struct model_directory *d, const struct model_config *mc, const config *c, int64_t eod,
                        enum weight_form form, error *err) {
    json_t *object = architecture_write(mc, c, eod);
    json_object_set_new(object, "torch_dtype", json_string(form == WEIGHTS_F32 ? "float32" : "bfloat16"));
    int result = model_directory_json(d, "config.json", object, err);
    json_decref(object);
    return result;
}

static bool stays_f32(const struct param *p, enum weight_form form) {
    return form == WEIGHTS_F32 || (form == WEIGHTS_BF16 && p->keep_real);
}

/* The order of the tensors in the file: that of the table, f32 before bf16. */
static void order_tensors(const struct params *params, enum weight_form form, int *order) {
    int at = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < params->count; i++) {
            if (stays_f32(&params->list[i], form) == (pass == 0)) order[at++] = i;
        }
    }
}

static int append_tensor(safetensors_writer *w, float *values, int64_t count, bool f32, error *err) {
    if (f32) return safetensors_append(w, values, (size_t)count * sizeof *values, err);
    uint16_t piece[4096];
    for (int64_t at = 0; at < count; at += 4096) {
        int64_t part = count - at < 4096 ? count - at : 4096;
        for (int64_t i = 0; i < part; i++) piece[i] = safetensors_bf16(values[at + i]);
        TRY(safetensors_append(w, piece, (size_t)part * sizeof *piece, err));
    }
    return 0;
}

/* The header, then tensor after tensor through `values`. */
static int stream_weights(const char *path, const struct weight_source *source, enum weight_form form, const int *order,
                          struct safetensors_entry *entries, float *values, struct model_file *written, error *err) {
    static const char *const metadata[] = {"format", "pt", NULL};
    const struct params *params = source->params;
    for (int i = 0; i < params->count; i++) {
        const struct param *p = &params->list[order[i]];
        struct safetensors_entry *e = &entries[i];
        snprintf(e->name, sizeof e->name, "%s", p->name);
        e->dtype = stays_f32(p, form) ? ST_F32 : ST_BF16;
        e->ndim = p->ndim;
        for (int k = 0; k < p->ndim; k++) e->dim[k] = p->dim[k];
    }
    safetensors_writer *w;
    TRY(safetensors_create(&w, path, entries, (size_t)params->count, metadata, err));
    for (int i = 0; i < params->count; i++) {
        const struct param *p = &params->list[order[i]];
        source->read(source->self, order[i], values);
        if (append_tensor(w, values, p->count, stays_f32(p, form), err) != 0) {
            safetensors_abandon(w);
            return -1;
        }
    }
    return safetensors_finish(w, &written->size, &written->hash, err);
}

static int write_weights(struct model_directory *d, const struct weight_source *source, enum weight_form form,
                         error *err) {
    static const char name[] = "model.safetensors";
    char path[LIMIT_PATH];
    TRY(file_join(path, sizeof path, d->path, name, err));
    const struct params *params = source->params;
    int64_t largest = 0;
    for (int i = 0; i < params->count; i++) {
        if (params->list[i].count > largest) largest = params->list[i].count;
    }
    float *values = malloc((size_t)largest * sizeof *values);
    int *order = calloc((size_t)params->count, sizeof *order);
    struct safetensors_entry *entries = calloc((size_t)params->count, sizeof *entries);
    struct model_file written = {.size = 0};
    int result = -1;
    if (!values || !order || !entries) {
        error_system(err, "%s: no memory to write it", path);
    } else {
        order_tensors(params, form, order);
        result = stream_weights(path, source, form, order, entries, values, &written, err);
    }
    free(entries);
    free(order);
    free(values);
    if (result == 0) model_directory_add(d, name, written.size, written.hash);
    return result;
}

int model_directory_model(struct model_directory *d, const struct model_config *mc, const config *c, int64_t eod,
                          const struct weight_source *source, enum weight_form form, error *err) {
    TRY(write_config(d, mc, c, eod, form, err));
    for (const struct architecture_file *f = architecture_files(mc); f->name; f++)
        TRY(model_directory_text(d, f->name, f->text, strlen(f->text), err));
    TRY(write_generation_config(d, eod, err));
    return write_weights(d, source, form, err);
}

/* ---- tokenizers -------------------------------------------------------------------------------------------------- */

int model_directory_tokenizer(struct model_directory *d, const tokenizer *t, error *err) {
    size_t size;
    const char *text = tokenizer_json(t, &size);
    TRY(model_directory_text(d, "tokenizer.json", text, size, err));
    text = tokenizer_config_json(t, &size);
    return model_directory_text(d, "tokenizer_config.json", text, size, err);
}

int model_directory_copy_tokenizer(struct model_directory *d, const char *from, error *err) {
    /* What transformers' tokenizers are saved as. */
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                        "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
                                        "chat_template.jinja"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[LIMIT_PATH], *text;
        size_t size;
        TRY(file_join(path, sizeof path, from, names[i], err));
        if (!file_exists(path)) continue;
        TRY(file_read_all(path, LIMIT_JSON_BYTES, &text, &size, err));
        int result = model_directory_text(d, names[i], text, size, err);
        free(text);
        if (result != 0) return -1;
    }
    return 0;
}

/* ---- the end ----------------------------------------------------------------------------------------------------- */

int model_directory_verify(const struct model_directory *d, error *err) {
    for (int i = 0; i < d->count; i++) {
        const struct model_file *f = &d->files[i];
        char path[LIMIT_PATH];
        uint64_t size, hash;
        TRY(file_join(path, sizeof path, d->path, f->name, err));
        TRY(file_hash_of(path, &hash, &size, err));
        if (size != f->size || hash != f->hash) {
            return error_system(err, "%s does not read back as it was written: %" PRIu64 " bytes with XXH64 %016" PRIx64
                                " in place of %" PRIu64 " with %016" PRIx64, path, size, hash, f->size, f->hash);
        }
    }
    return file_sync_directory(d->path, err);
}

int model_directory_parent(char *out, size_t out_size, const char *path, error *err) {
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') length--;
    while (length > 0 && path[length - 1] != '/') length--;
    while (length > 1 && path[length - 1] == '/') length--;
    if (length >= out_size) return error_input(err, "the path %.200s... is too long", path);
    if (length == 0) snprintf(out, out_size, ".");
    else snprintf(out, out_size, "%.*s", (int)length, path);
    return 0;
}

int model_directory_publish(const struct model_directory *d, const char *path, error *err) {
    char parent[LIMIT_PATH];
    TRY(model_directory_parent(parent, sizeof parent, path, err));
    TRY(file_rename(d->path, path, err));
    return file_sync_directory(parent, err);
}
