/* manifest.c: writes and reads trainer.json. See manifest.h; the members are specified in docs/checkpoint.md. */
#include "train/manifest.h"

#include "common/file.h"
#include "common/json.h"
#include "train/version.h"
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define FORMAT "riverrun checkpoint"
#define VERSION 1

/* The object's checksum: XXH64 of its compact text with sorted keys, so that it depends on the values alone. */
static int object_hash(const json_t *object, const char *name, uint64_t *hash, error *err) {
    char *text = json_text(object, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17), name, err);
    if (!text) return -1;
    *hash = XXH64(text, strlen(text), 0);
    free(text);
    return 0;
}

static json_t *hash_text(uint64_t hash) {
    char text[20];
    snprintf(text, sizeof text, "%016" PRIx64, hash);
    return json_string(text);
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

static json_t *files_object(const struct model_directory *d) {
    json_t *files = json_object();
    for (int i = 0; i < d->count; i++) {
        json_t *file = json_object();
        json_object_set_new(file, "size", json_integer((json_int_t)d->files[i].size));
        json_object_set_new(file, "xxh64", hash_text(d->files[i].hash));
        json_object_set_new(files, d->files[i].name, file);
    }
    return files;
}

/* Where layers stand that are not, or not yet, where their config says. */
static json_t *rungs_array(const struct trainer_state *state) {
    json_t *array = json_array();
    for (int i = 0; i < LIMIT_LAYERS; i++) {
        const struct rung *r = &state->rungs[i];
        if (r->level == SOLVER_CHOSEN && (r->before == SOLVER_CHOSEN || r->since <= state->step)) continue;
        json_array_append_new(array, json_pack("{s:i, s:s, s:s, s:I}", "solver", i, "level",
                                               solver_level_names[r->level], "before", solver_level_names[r->before],
                                               "since", (json_int_t)r->since));
    }
    return array;
}

int manifest_write(struct model_directory *d, const struct trainer_state *state, error *err) {
    char program[200];
    snprintf(program, sizeof program, "%s (%s)", version_number(), version_commit());
    ASSERT(state->samples <= INT64_MAX && isfinite(state->tokens) && isfinite(state->seconds));
    json_t *object = json_object();
    json_object_set_new(object, "format", json_string(FORMAT));
    json_object_set_new(object, "version", json_integer(VERSION));
    json_object_set_new(object, "riverrun", json_string(program));
    json_object_set_new(object, "step", json_integer(state->step));
    json_object_set_new(object, "optimizer_steps", json_integer(state->optimizer_steps));
    json_object_set_new(object, "skipped", json_integer(state->skipped));
    json_object_set_new(object, "samples", json_integer((json_int_t)state->samples));
    json_object_set_new(object, "tokens", json_real(state->tokens));
    json_object_set_new(object, "seconds", json_real(state->seconds));
    json_object_set_new(object, "best_valid", isfinite(state->best_valid) ? json_real(state->best_valid) : json_null());
    if (state->inexact > 0) json_object_set_new(object, "inexact", json_integer(state->inexact));
    json_t *rungs = rungs_array(state);
    if (json_array_size(rungs) > 0) json_object_set(object, "solvers", rungs);
    json_decref(rungs);
    json_object_set_new(object, "files", files_object(d));
    uint64_t hash;
    int result = object_hash(object, MANIFEST_NAME, &hash, err);
    if (result == 0) {
        json_object_set_new(object, "xxh64", hash_text(hash));
        result = model_directory_json(d, MANIFEST_NAME, object, err);
    }
    json_decref(object);
    return result;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

/* 16 hexadecimal digits. */
static int read_hash(const json_t *object, const char *name, uint64_t *hash, error *err) {
    const char *text;
    TRY(json_get_string(object, "xxh64", name, &text, err));
    char *end;
    *hash = strtoull(text, &end, 16);
    if (strlen(text) == 16 && strspn(text, "0123456789abcdef") == 16 && !*end) return 0;
    return error_input(err, "%s: 'xxh64' must be 16 hexadecimal digits", name);
}

static int check_self(json_t *object, const char *name, error *err) {
    uint64_t hash, found;
    TRY(read_hash(object, name, &hash, err));
    json_object_del(object, "xxh64");
    TRY(object_hash(object, name, &found, err));
    if (hash == found) return 0;
    return error_input(err, "%s is damaged: its own checksum does not match", name);
}

static int read_files(struct manifest *m, const json_t *files, const char *name, error *err) {
    if (!json_is_object(files)) return error_input(err, "%s: 'files' must be an object", name);
    if (json_object_size(files) > MODEL_DIRECTORY_FILES) {
        return error_input(err, "%s lists %zu files; at most %d are possible", name, json_object_size(files),
                           MODEL_DIRECTORY_FILES);
    }
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)files, key, value) {
        struct model_file *f = &m->files[m->count];
        int64_t size;
        if (!*key || strlen(key) >= sizeof f->name || strchr(key, '/')) {
            return error_input(err, "%s: 'files' must give the plain name of each file", name);
        }
        TRY(json_get_int(value, "size", name, &size, err));
        TRY(read_hash(value, name, &f->hash, err));
        snprintf(f->name, sizeof f->name, "%s", key);
        f->size = (uint64_t)size;
        m->count++;
    }
    return 0;
}

static int read_level(const json_t *object, const char *key, const char *name, int32_t *level, error *err) {
    const char *text;
    TRY(json_get_string(object, key, name, &text, err));
    for (*level = SOLVER_CHOSEN; *level <= SOLVER_SEQUENTIAL; ++*level)
        if (strcmp(text, solver_level_names[*level]) == 0) return 0;
    return error_input(err, "%s: '%s' of a solver must be one of chosen, more, sequential", name, key);
}

/* "inexact" and "solvers" are there only where they say something. */
static int read_solvers(struct trainer_state *s, const json_t *object, const char *name, error *err) {
    const json_t *rungs = json_object_get(object, "solvers"), *item;
    size_t i;
    if (json_object_get(object, "inexact")) TRY(json_get_int(object, "inexact", name, &s->inexact, err));
    if (rungs && !json_is_array(rungs)) return error_input(err, "%s: 'solvers' must be an array", name);
    json_array_foreach(rungs, i, item) {
        int64_t solver;
        struct rung r;
        TRY(json_get_int(item, "solver", name, &solver, err));
        TRY(read_level(item, "level", name, &r.level, err));
        TRY(read_level(item, "before", name, &r.before, err));
        TRY(json_get_int(item, "since", name, &r.since, err));
        if (solver < 0 || solver >= LIMIT_LAYERS || r.since < 0) {
            return error_input(err, "%s: 'solver' must be from 0 to %d, and 'since' not negative", name,
                               LIMIT_LAYERS - 1);
        }
        s->rungs[solver] = r;
    }
    return 0;
}

static int read_state(struct trainer_state *s, const json_t *object, const char *name, error *err) {
    int64_t samples;
    TRY(json_get_int(object, "step", name, &s->step, err));
    TRY(json_get_int(object, "optimizer_steps", name, &s->optimizer_steps, err));
    TRY(json_get_int(object, "skipped", name, &s->skipped, err));
    TRY(json_get_int(object, "samples", name, &samples, err));
    TRY(json_get_real(object, "tokens", name, &s->tokens, err));
    TRY(json_get_real(object, "seconds", name, &s->seconds, err));
    s->samples = (uint64_t)samples;
    s->best_valid = NAN;
    if (!json_is_null(json_object_get(object, "best_valid"))) {
        TRY(json_get_real(object, "best_valid", name, &s->best_valid, err));
    }
    TRY(read_solvers(s, object, name, err));
    if (s->step >= 0 && s->optimizer_steps >= 0 && s->skipped >= 0 && samples >= 0 && s->inexact >= 0) return 0;
    return error_input(err, "%s: step, optimizer_steps, skipped, inexact and samples must not be negative", name);
}

static int read_object(struct manifest *m, json_t *object, const char *name, error *err) {
    const char *format;
    int64_t version;
    TRY(json_get_string(object, "format", name, &format, err));
    if (strcmp(format, FORMAT) != 0) return error_input(err, "%s: 'format' is not '" FORMAT "'", name);
    TRY(json_get_int(object, "version", name, &version, err));
    if (version != VERSION) {
        return error_input(err, "%s has version %" PRId64 " of the checkpoint format; this riverrun reads version %d",
                           name, version, VERSION);
    }
    TRY(check_self(object, name, err));
    TRY(read_state(&m->state, object, name, err));
    return read_files(m, json_object_get(object, "files"), name, err);
}

int manifest_read(struct manifest *m, const char *directory, error *err) {
    *m = (struct manifest){.count = 0};
    char path[LIMIT_PATH];
    json_t *object;
    TRY(file_join(path, sizeof path, directory, MANIFEST_NAME, err));
    TRY(json_read(&object, path, err));
    int result = read_object(m, object, path, err);
    json_decref(object);
    return result;
}

int manifest_verify(const struct manifest *m, const char *directory, error *err) {
    for (int i = 0; i < m->count; i++) {
        const struct model_file *f = &m->files[i];
        char path[LIMIT_PATH];
        uint64_t size, hash;
        TRY(file_join(path, sizeof path, directory, f->name, err));
        if (!file_exists(path)) return error_input(err, "%s is missing, but " MANIFEST_NAME " lists it", path);
        TRY(file_hash_of(path, &hash, &size, err));
        if (size != f->size) {
            return error_input(err, "%s is damaged: it has %" PRIu64 " bytes, " MANIFEST_NAME " says %" PRIu64, path,
                               size, f->size);
        }
        if (hash != f->hash) {
            return error_input(err, "%s is damaged: its checksum is %016" PRIx64 ", " MANIFEST_NAME " says %016" PRIx64,
                               path, hash, f->hash);
        }
    }
    return 0;
}

const struct model_file *manifest_find(const struct manifest *m, const char *name) {
    for (int i = 0; i < m->count; i++) {
        if (strcmp(m->files[i].name, name) == 0) return &m->files[i];
    }
    return NULL;
}
