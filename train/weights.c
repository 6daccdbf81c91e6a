/* weights.c: finds, checks and reads the tensors of a model directory. See weights.h. */
#include "train/weights.h"

#include "common/file.h"
#include "common/json.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define ONE_FILE "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define PICKLE "pytorch_model.bin"
#define EMBEDDING "backbone.embeddings.weight"
#define HEAD "lm_head.weight"

/* The embedding's name in the authors' own checkpoints: state-spaces/mamba's, NX-AI/xlstm's. */
static const char *const embedding_elsewhere[] = {"backbone.embedding.weight", "embedding.weight", NULL};

/* ---- opening ----------------------------------------------------------------------------------------------------- */

static int add_file(struct weights *w, const char *name, error *err) {
    char path[LIMIT_PATH];
    TRY(file_join(path, sizeof path, w->directory, name, err));
    safetensors **grown = realloc(w->files, (w->count + 1) * sizeof *grown);
    if (!grown) return error_system(err, "no memory to open %s", path);
    w->files = grown;
    TRY(safetensors_open(&w->files[w->count], path, err));
    w->count++;
    return 0;
}

/* Names are part of messages. */
static bool has_control(const char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < ' ' || *text == 127) return true;
    }
    return false;
}

/* Each different file that the map names; a name is a file beside the index, nothing else. */
static int add_indexed(struct weights *w, const json_t *map, const char *index, error *err) {
    json_t *seen = json_object(), *file;
    const char *name;
    int result = 0;
    json_object_foreach((json_t *)map, name, file) {
        const char *file_name = json_string_value(file);
        if (!file_name || !*file_name || strchr(file_name, '/') || has_control(file_name)) {
            result = error_input(err, "%s: 'weight_map' must give each tensor the plain name of a file", index);
        } else if (!json_object_get(seen, file_name)) {
            if (json_object_set_new(seen, file_name, json_true()) != 0)
                result = error_system(err, "no memory for the list of files in %s", index);
            else result = add_file(w, file_name, err);
        }
        if (result != 0) break;
    }
    json_decref(seen);
    return result;
}

/* No tensor may be in two files, and every one that the map names must be in one. */
static int check_index(const struct weights *w, const json_t *map, const char *index, error *err) {
    const char *name;
    json_t *file;
    json_object_foreach((json_t *)map, name, file) {
        if (has_control(name)) return error_input(err, "%s: a tensor's name holds a control character", index);
        int found = 0;
        for (size_t f = 0; f < w->count; f++) found += safetensors_find(w->files[f], name) != NULL;
        if (found != 1) {
            return error_input(err, "%s names tensor %.191s, which %s of its files", index, name,
                               found ? "is in two" : "is in none");
        }
    }
    return 0;
}

static int open_indexed(struct weights *w, const char *index, error *err) {
    json_t *root;
    TRY(json_read(&root, index, err));
    const json_t *map = json_object_get(root, "weight_map");
    int result = json_is_object(map) ? 0 : error_input(err, "%s: 'weight_map' must be an object", index);
    if (result == 0) result = add_indexed(w, map, index, err);
    if (result == 0) result = check_index(w, map, index, err);
    json_decref(root);
    return result;
}

static int open_any(struct weights *w, error *err) {
    char path[LIMIT_PATH];
    TRY(file_join(path, sizeof path, w->directory, ONE_FILE, err));
    if (file_exists(path)) return add_file(w, ONE_FILE, err);
    TRY(file_join(path, sizeof path, w->directory, INDEX, err));
    if (file_exists(path)) return open_indexed(w, path, err);
    TRY(file_join(path, sizeof path, w->directory, PICKLE, err));
    if (file_exists(path) ||
        (file_join(path, sizeof path, w->directory, PICKLE ".index.json", err) == 0 && file_exists(path))) {
        return error_input(err,
                           "%s holds its weights as " PICKLE
                           ", which can run programs when it is opened, so riverrun does "
                           "not read it; convert it in Python: AutoModelForCausalLM.from_pretrained('%s')"
                           ".save_pretrained('NEW', safe_serialization=True)",
                           w->directory, w->directory);
    }
    return error_input(err, "%s holds no weights: neither " ONE_FILE " nor " INDEX, w->directory);
}

int weights_open(struct weights *w, const char *directory, error *err) {
    *w = (struct weights){.count = 0};
    snprintf(w->directory, sizeof w->directory, "%s", directory);
    if (open_any(w, err) == 0) return 0;
    weights_close(w);
    return -1;
}

void weights_close(struct weights *w) {
    for (size_t f = 0; f < w->count; f++) safetensors_close(w->files[f]);
    free(w->files);
    *w = (struct weights){.count = 0};
}

/* ---- finding and checking ---------------------------------------------------------------------------------------- */

static const struct safetensors_entry *find_exactly(const struct weights *w, const char *name) {
    for (size_t f = 0; f < w->count; f++) {
        const struct safetensors_entry *e = safetensors_find(w->files[f], name);
        if (e) return e;
    }
    return NULL;
}

const struct safetensors_entry *weights_find(const struct weights *w, const char *name) {
    const struct safetensors_entry *e = find_exactly(w, name);
    if (strcmp(name, EMBEDDING) != 0) return e;
    for (const char *const *other = embedding_elsewhere; *other && !e; other++) e = find_exactly(w, *other);
    return e;
}

/* Names for a message: the first few, and how many more there are. */
struct names {
    char text[400];
    int count, shown;
};

static void names_add(struct names *n, const char *name) {
    size_t used = strlen(n->text);
    n->count++;
    if (n->shown == 4 || used + strlen(name) + 3 > sizeof n->text) return;
    snprintf(n->text + used, sizeof n->text - used, "%s%s", n->shown ? ", " : "", name);
    n->shown++;
}

static const char *names_more(const struct names *n, char out[40]) {
    out[0] = 0;
    if (n->count > n->shown) snprintf(out, 40, " and %d more", n->count - n->shown);
    return out;
}

static void shape_text(char out[100], int ndim, const int64_t *dim) {
    size_t used = (size_t)snprintf(out, 100, "(");
    for (int i = 0; i < ndim && used < 70; i++) {
        used += (size_t)snprintf(out + used, 100 - used, "%s%" PRId64, i ? ", " : "", dim[i]);
    }
    snprintf(out + used, 100 - used, ")");
}

static int check_entry(const struct weights *w, const struct param *p, const struct safetensors_entry *e, error *err) {
    bool floating = e->dtype == ST_F64 || e->dtype == ST_F32 || e->dtype == ST_F16 || e->dtype == ST_BF16;
    if (!floating) {
        return error_input(err, "%s: tensor %s has dtype %s; weights must be F64, F32, F16 or BF16", w->directory,
                           e->name, safetensors_dtype_name(e->dtype));
    }
    bool same = e->ndim == p->ndim;
    for (int i = 0; same && i < p->ndim; i++) same = e->dim[i] == p->dim[i];
    if (same) return 0;
    char has[100], needs[100];
    shape_text(has, e->ndim, e->dim);
    shape_text(needs, p->ndim, p->dim);
    return error_input(err, "%s: tensor %s has shape %s; the model of the config needs %s", w->directory, e->name, has,
                       needs);
}

/* Whether two tensors of equal shape hold the same numbers. */
static bool equal_values(const struct safetensors_entry *a, const struct safetensors_entry *b) {
    float x[1024], y[1024];
    if (a->count != b->count) return false;
    for (uint64_t at = 0; at < a->count; at += 1024) {
        uint64_t part = a->count - at < 1024 ? a->count - at : 1024;
        safetensors_to_f32(a, at, part, x);
        safetensors_to_f32(b, at, part, y);
        if (memcmp(x, y, part * sizeof *x) != 0) return false;
    }
    return true;
}

/* What is there beyond the table. */
static int check_extra(const struct weights *w, const struct params *params, error *err) {
    struct names extra = {.count = 0};
    for (size_t f = 0; f < w->count; f++) {
        for (size_t i = 0; i < safetensors_count(w->files[f]); i++) {
            const struct safetensors_entry *e = safetensors_at(w->files[f], i);
            if (params_find(params, e->name) >= 0) {
                if (e == find_exactly(w, e->name)) continue;
                return error_input(err, "%s: tensor %s is in two of its files", w->directory, e->name);
            }
            const struct safetensors_entry *embedding = weights_find(w, params->list[0].name); /* the table's first */
            if (e == embedding) continue; /* under its other name */
            if (strcmp(e->name, HEAD) == 0) { /* the table has no head: it is the embedding */
                if (embedding && equal_values(e, embedding)) continue;
                return error_input(err,
                                   "%s: " HEAD " differs from the embedding, but the config says that they are tied",
                                   w->directory);
            }
            names_add(&extra, e->name);
        }
    }
    char more[40];
    if (extra.count == 0) return 0;
    return error_input(err, "%s holds tensors that the model of the config does not have: %s%s", w->directory,
                       extra.text, names_more(&extra, more));
}

int weights_check(const struct weights *w, const struct params *params, error *err) {
    struct names missing = {.count = 0};
    size_t found = 0, there = 0;
    for (int i = 0; i < params->count; i++) {
        const struct param *p = &params->list[i];
        const struct safetensors_entry *e = weights_find(w, p->name);
        if (!e) {
            names_add(&missing, p->name);
            continue;
        }
        TRY(check_entry(w, p, e, err));
        found++;
    }
    char more[40];
    if (missing.count) {
        return error_input(err, "%s lacks tensors that the model of the config has: %s%s", w->directory, missing.text,
                           names_more(&missing, more));
    }
    for (size_t f = 0; f < w->count; f++) there += safetensors_count(w->files[f]);
    return there == found ? 0 : check_extra(w, params, err);
}

void weights_read(const struct weights *w, const struct params *params, int index, float *values) {
    const struct safetensors_entry *e = weights_find(w, params->list[index].name);
    ASSERT(e && e->count == (uint64_t)params->list[index].count);
    safetensors_to_f32(e, 0, e->count, values);
}
