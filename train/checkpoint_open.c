/* checkpoint_open.c: opens model directories, riverrun's own and others'. See checkpoint.h. */
#include "train/checkpoint_internal.h"

#include "common/file.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- finding the directory --------------------------------------------------------------------------------------- */

static bool holds(const char *directory, const char *name) {
    char path[LIMIT_PATH];
    error ignored;
    return file_join(path, sizeof path, directory, name, &ignored) == 0 && file_exists(path);
}

static bool is_link(const char *path) {
    char target[LIMIT_PATH];
    return readlink(path, target, sizeof target) >= 0;
}

/* Where the run in `path` stands: what its `latest` points to or, where a kill or a copy left no `latest`, its newest
 * step. `path` itself where it is no run's directory. */
static int find_in_run(char out[LIMIT_PATH], const char *path, error *err) {
    char name[LIMIT_STEP_NAME];
    TRY(file_join(out, LIMIT_PATH, path, "latest", err));
    if (is_link(out)) {
        return file_is_directory(out) ? 0 : error_input(err, "%s points to a directory that is not there", out);
    }
    TRY(checkpoint_newest(path, name, err));
    if (name[0] && file_exists(out)) {
        return error_input(err,
                           "%s is no link, as it is where riverrun saves; remove it, and the run stands at its newest "
                           "checkpoint, %s",
                           out, name);
    }
    return name[0] ? file_join(out, LIMIT_PATH, path, name, err) : file_join(out, LIMIT_PATH, path, ".", err);
}

/* `path`, or where the run in it stands, without links in it: the directory stays the same one should `latest` move. */
static int resolve(char out[LIMIT_PATH], const char *path, error *err) {
    char inside[LIMIT_PATH];
    if (!file_exists(path)) return error_input(err, "there is no checkpoint %s", path);
    if (!file_is_directory(path)) {
        return error_input(err, "%s is a file; a checkpoint is a directory, such as the one that this file is in",
                           path);
    }
    if (!holds(path, "config.json")) {
        TRY(find_in_run(inside, path, err));
        path = inside;
    }
    char *resolved = realpath(path, NULL);
    if (!resolved) return error_system(err, "cannot find out where %s is: %s", path, strerror(errno));
    int result = snprintf(out, LIMIT_PATH, "%s", resolved) < LIMIT_PATH
                     ? 0
                     : error_input(err, "the path of %.200s is too long", path);
    free(resolved);
    return result;
}

/* ---- riverrun's own ---------------------------------------------------------------------------------------------- */

static int open_own(struct checkpoint *c, error *err) {
    static const char *const needed[] = {"config.json", "model.safetensors", CONFIG_NAME};
    struct manifest manifest;
    char path[LIMIT_PATH];
    TRY(manifest_read(&manifest, c->path, err));
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        if (manifest_find(&manifest, needed[i])) continue;
        return error_input(err, "%s/" MANIFEST_NAME " does not list %s, which every checkpoint has", c->path,
                           needed[i]);
    }
    TRY(manifest_verify(&manifest, c->path, err));
    TRY(file_join(path, sizeof path, c->path, CONFIG_NAME, err));
    TRY(config_load(&c->config, path, err));
    c->ours = true;
    c->state = manifest.state;
    return 0;
}

/* ---- others' ----------------------------------------------------------------------------------------------------- */

int checkpoint_read_config_json(json_t **object, const char *path, error *err) {
    char *text;
    size_t size;
    *object = NULL;
    TRY(file_read_all(path, LIMIT_CONFIG_BYTES, &text, &size, err));
    int result = json_read_python(object, text, size, path, err);
    free(text);
    return result;
}

/* transformers allows several ids there; the first one is taken. */
static int64_t first_id(const json_t *value) {
    if (json_is_array(value)) value = json_array_get(value, 0);
    return json_is_integer(value) && json_integer_value(value) >= 0 ? json_integer_value(value) : -1;
}

static int read_ids(struct checkpoint *c, const char *directory, config *settings, error *err) {
    char path[LIMIT_PATH];
    json_t *object;
    TRY(file_join(path, sizeof path, directory, "config.json", err));
    TRY(checkpoint_read_config_json(&object, path, err));
    c->eod = first_id(json_object_get(object, "eos_token_id"));
    c->rows = json_integer_value(json_object_get(object, "vocab_size"));
    int result = settings ? architecture_read(object, path, settings, err) : 0;
    json_decref(object);
    return result;
}

int checkpoint_set_vocabulary(struct checkpoint *c, const tokenizer *t, error *err) {
    int64_t vocab = tokenizer_vocab(t), pad = 1;
    if (vocab >= c->rows) return 0; /* too few rows is told where the model is made */
    while (pad <= 65536 && (vocab + pad - 1) / pad * pad != c->rows) pad *= 2;
    if (pad > 65536) pad = c->rows;
    if (pad > 65536) return 0;
    TRY(architecture_set_int(c->config, "model", "vocab_size", vocab, err));
    return architecture_set_int(c->config, "model", "pad_vocab_to", pad, err);
}

static int open_foreign(struct checkpoint *c, error *err) {
    TRY(config_parse(&c->config, "", 0, "config.json", err));
    TRY(read_ids(c, c->path, c->config, err));
    tokenizer *t;
    if (checkpoint_tokenizer(c, &t, err) != 0) {
        return err->kind == ERROR_SYSTEM ? -1 : 0; /* what it lacks is told to whoever needs one */
    }
    int result = checkpoint_set_vocabulary(c, t, err);
    tokenizer_close(t);
    return result;
}

/* ---- checkpoint.h ------------------------------------------------------------------------------------------------ */

static int open_checked(struct checkpoint *c, const char *path, error *err) {
    TRY(resolve(c->path, path, err));
    if (holds(c->path, MANIFEST_NAME)) {
        TRY(open_own(c, err));
        TRY(read_ids(c, c->path, NULL, err));
    } else if (holds(c->path, "config.json")) {
        TRY(open_foreign(c, err));
    } else {
        return error_input(err, "%s is no checkpoint: it holds no config.json", c->path);
    }
    return weights_open(&c->weights, c->path, err);
}

int checkpoint_open(struct checkpoint **out, const char *path, error *err) {
    *out = NULL;
    struct checkpoint *c = calloc(1, sizeof *c);
    if (!c) return error_system(err, "no memory to open %s", path);
    if (open_checked(c, path, err) != 0) {
        checkpoint_close(c);
        return -1;
    }
    *out = c;
    return 0;
}

void checkpoint_close(struct checkpoint *c) {
    if (!c) return;
    weights_close(&c->weights);
    config_free(c->config);
    free(c);
}

config *checkpoint_config(struct checkpoint *c) {
    return c->config;
}

const char *checkpoint_path(const struct checkpoint *c) {
    return c->path;
}

bool checkpoint_is_ours(const struct checkpoint *c) {
    return c->ours;
}

const struct trainer_state *checkpoint_state(const struct checkpoint *c) {
    return &c->state;
}

bool checkpoint_has_tokenizer(const struct checkpoint *c) {
    return holds(c->path, "tokenizer.json");
}

int checkpoint_tokenizer(struct checkpoint *c, tokenizer **t, error *err) {
    *t = NULL;
    if (!checkpoint_has_tokenizer(c)) {
        return error_input(err,
                           "%s holds no tokenizer.json, so what its tokens mean is not known (those of generated tasks "
                           "have no text)",
                           c->path);
    }
    return tokenizer_open(t, c->path, err);
}
