/* checkpoint_save.c: saves a run's state so that a kill or a full disk at any moment costs nothing that was saved
 * before. See checkpoint.h; the layout is specified in docs/checkpoint.md.
 *
 * In the run's directory, on rank 0:
 *   1. remove what earlier kills left under temporary names
 *   2. write everything to tmp-step-N; every file is synced as it is closed
 *   3. read every file back and compare its checksum; sync the directory
 *   4. rename tmp-step-N to step-N; sync the run's directory: the checkpoint is there
 *   5. let `latest` point to it, by renaming a new link over it; sync again
 *   6. remove old checkpoints, each renamed to a temporary name first
 * The other ranks take part in gathering weights and the optimizer's state, bucket by bucket, and learn how it went.
 */
#include "train/checkpoint_internal.h"

#include "common/file.h"
#include "common/safetensors.h"
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STEP_PREFIX "step-"
#define NEW_PREFIX "tmp-" STEP_PREFIX
#define OLD_PREFIX "tmp-old-" STEP_PREFIX
#define LATEST "latest"

struct save { /* of rank 0 */
    const char *run;
    const struct trainer_state *state;
    char name[LIMIT_STEP_NAME]; /* step-NNNNNNNN */
    char path[LIMIT_PATH]; /* RUN/step-NNNNNNNN */
    struct model_directory directory;
};

static int64_t largest_bucket(const struct params *params) {
    int64_t largest = 0;
    for (int b = 0; b < params->bucket_count; b++) {
        if (params->buckets[b].count > largest) largest = params->buckets[b].count;
    }
    return largest;
}

static bool begins(const char *text, const char *prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* ---- 1 and 2: the files ------------------------------------------------------------------------------------------ */

static int remove_leftovers(const char *run, error *err) {
    char **names, path[LIMIT_PATH];
    size_t count;
    TRY(file_list(run, "", &names, &count, err));
    int result = 0;
    for (size_t i = 0; result == 0 && i < count; i++) {
        if (!begins(names[i], NEW_PREFIX) && !begins(names[i], OLD_PREFIX)) continue;
        result = file_join(path, sizeof path, run, names[i], err);
        if (result == 0) result = file_remove_tree(path, err);
    }
    file_list_free(names, count);
    return result;
}

/* The weights of a model whose masters are spread over the ranks. Rank 0 asks for a bucket when it writes a tensor of
 * it; the others wait to be asked, and for the word that it was the last. */
struct gathered {
    struct model *model;
    struct optimizer *optimizer;
    struct comm *comm;
    char *host; /* rank 0: room for the largest bucket, in the model's real type */
    int64_t bucket; /* what `host` holds; -1: nothing */
};

static void ask(struct gathered *g, int64_t bucket) {
    comm_broadcast(g->comm, &bucket, sizeof bucket, 0);
    g->bucket = bucket;
    if (bucket >= 0) optimizer_gather(g->optimizer, (int)bucket, OPTIMIZER_WEIGHTS, g->host);
}

static void answer(struct gathered *g) {
    do ask(g, -1);
    while (g->bucket >= 0);
}

static void read_gathered(void *self, int index, float *values) {
    struct gathered *g = self;
    const struct params *params = model_params(g->model);
    const struct param *p = &params->list[index];
    if (g->bucket != p->bucket) ask(g, p->bucket);
    int64_t at = p->offset - params->buckets[p->bucket].offset;
    if (model_device(g->model)->ops->real == DTYPE_F32) {
        memcpy(values, (const float *)g->host + at, (size_t)p->count * sizeof *values);
    } else {
        for (int64_t i = 0; i < p->count; i++) values[i] = (float)((const double *)g->host)[at + i];
    }
}

static void read_model_tensor(void *self, int index, float *values) {
    model_read_param(self, index, values, DTYPE_F32);
}

static int write_config_ini(struct model_directory *d, const config *c, error *err) {
    char *text = config_text(c);
    if (!text) return error_system(err, "%s: no memory for the config", d->path);
    int result = model_directory_text(d, CONFIG_NAME, text, strlen(text), err);
    free(text);
    return result;
}

/* Everything but the optimizer and trainer.json. */
static int begin(struct save *s, struct gathered *g, const config *c, const tokenizer *t, error *err) {
    struct model *m = g->model;
    char temporary[LIMIT_PATH], name[64];
    snprintf(s->name, sizeof s->name, STEP_PREFIX "%08" PRId64, s->state->step);
    snprintf(name, sizeof name, "tmp-%s", s->name);
    TRY(file_join(s->path, sizeof s->path, s->run, s->name, err));
    TRY(file_join(temporary, sizeof temporary, s->run, name, err));
    TRY(file_make_directories(s->run, err));
    TRY(remove_leftovers(s->run, err));
    TRY(model_directory_begin(&s->directory, temporary, err));
    struct weight_source source = {.params = model_params(m), .read = read_model_tensor, .self = m};
    if (g->optimizer) {
        source.read = read_gathered;
        source.self = g;
        g->host = malloc((size_t)largest_bucket(model_params(m)) * dtype_size(model_device(m)->ops->real));
        if (!g->host) return error_system(err, "%s: no memory to gather the weights", s->path);
    }
    int64_t eod = t ? tokenizer_eod(t) : -1;
    TRY(model_directory_model(&s->directory, model_get_config(m), c, eod, &source, WEIGHTS_F32, err));
    if (t) TRY(model_directory_tokenizer(&s->directory, t, err));
    return write_config_ini(&s->directory, c, err);
}

/* ---- the optimizer's state --------------------------------------------------------------------------------------- */

/* m of a bucket's tensors, then v of them, bucket by bucket: the order in which they are gathered. */
static void list_moments(const struct params *params, struct safetensors_entry *entries) {
    int at = 0;
    for (int b = 0; b < params->bucket_count; b++) {
        const struct bucket *bucket = &params->buckets[b];
        for (int which = 0; which < 2; which++) {
            for (int i = bucket->first; i < bucket->first + bucket->params; i++) {
                const struct param *p = &params->list[i];
                struct safetensors_entry *e = &entries[at++];
                int length = snprintf(e->name, sizeof e->name, "%c.%s", which ? 'v' : 'm', p->name);
                ASSERT(length > 0 && (size_t)length < sizeof e->name);
                e->dtype = ST_F32;
                e->ndim = p->ndim;
                for (int k = 0; k < p->ndim; k++) e->dim[k] = p->dim[k];
            }
        }
    }
}

struct moments_file { /* of rank 0 */
    safetensors_writer *writer;
    char *host; /* the largest bucket, in the model's real type */
};

static int moments_open(struct moments_file *f, const struct save *s, const struct params *params, enum dtype real,
                        error *err) {
    char path[LIMIT_PATH];
    TRY(file_join(path, sizeof path, s->directory.path, OPTIMIZER_NAME, err));
    f->host = malloc((size_t)largest_bucket(params) * dtype_size(real));
    struct safetensors_entry *entries = calloc(2 * (size_t)params->count, sizeof *entries);
    int result = f->host && entries ? 0 : error_system(err, "%s: no memory to write it", path);
    if (result == 0) {
        list_moments(params, entries);
        result = safetensors_create(&f->writer, path, entries, 2 * (size_t)params->count, NULL, err);
    }
    free(entries);
    return result;
}

/* What was gathered of a bucket, tensor by tensor. */
static int moments_append(struct moments_file *f, const struct params *params, int bucket, enum dtype real,
                          error *err) {
    const struct bucket *b = &params->buckets[bucket];
    float *single = (float *)f->host;
    if (real == DTYPE_F64) { /* in place: what is read lies at or behind what is written */
        for (int64_t i = 0; i < b->count; i++) {
            double x;
            memcpy(&x, f->host + (size_t)i * sizeof x, sizeof x);
            single[i] = (float)x;
        }
    }
    for (int i = b->first; i < b->first + b->params; i++) {
        const struct param *p = &params->list[i];
        TRY(safetensors_append(f->writer, single + (p->offset - b->offset), (size_t)p->count * sizeof *single, err));
    }
    return 0;
}

/* All ranks: gather and, on rank 0, stream to the file. A failing rank 0 goes on gathering, so that nobody waits for
 * it. */
static int gather_moments(struct moments_file *f, struct model *m, struct optimizer *o, struct comm *comm, error *err) {
    const struct params *params = model_params(m);
    enum dtype real = model_device(m)->ops->real;
    int result = 0;
    for (int b = 0; b < params->bucket_count; b++) {
        for (int which = 0; which < 2; which++) {
            optimizer_gather(o, b, which, f->host);
            if (comm->rank == 0 && result == 0) result = moments_append(f, params, b, real, err);
        }
    }
    return result;
}

static int moments_finish(struct moments_file *f, struct save *s, error *err) {
    uint64_t size, hash;
    safetensors_writer *writer = f->writer;
    f->writer = NULL;
    TRY(safetensors_finish(writer, &size, &hash, err));
    model_directory_add(&s->directory, OPTIMIZER_NAME, size, hash);
    return 0;
}

static int save_moments(struct save *s, struct model *m, struct optimizer *o, struct comm *comm, error *err) {
    struct moments_file f = {.writer = NULL};
    int result = 0;
    if (comm->rank == 0) result = moments_open(&f, s, model_params(m), model_device(m)->ops->real, err);
    result = comm_agree(comm, result, err);
    if (result == 0) {
        result = gather_moments(&f, m, o, comm, err);
        if (comm->rank == 0 && result == 0) result = moments_finish(&f, s, err);
        result = comm_agree(comm, result, err);
    }
    safetensors_abandon(f.writer);
    free(f.host);
    return result;
}

/* ---- 3 to 5: under its name -------------------------------------------------------------------------------------- */

/* The name that `latest` points to; "" if there is no such link. */
static void read_latest(const char *run, char out[LIMIT_PATH]) {
    char path[LIMIT_PATH];
    error ignored;
    ssize_t size = file_join(path, sizeof path, run, LATEST, &ignored) == 0 ? readlink(path, out, LIMIT_PATH - 1) : -1;
    out[size > 0 ? size : 0] = 0;
}

/* Whether the checkpoint at `path` holds what was just written: all but trainer.json, which knows the time. */
static bool same_content(const struct manifest *there, const struct model_directory *d) {
    if (there->count + 1 != d->count) return false;
    for (int i = 0; i < d->count; i++) {
        const struct model_file *f = &d->files[i];
        if (strcmp(f->name, MANIFEST_NAME) == 0) continue;
        const struct model_file *other = manifest_find(there, f->name);
        if (!other || other->size != f->size || other->hash != f->hash) return false;
    }
    return true;
}

/* A checkpoint of this step may be there: a kill came between 4 and 5, and the run was resumed from the one before. It
 * is moved aside, but never while it is complete and `latest` points to it: then it stays, and *keep_it is set if it is
 * the same. */
static int make_room(const struct save *s, bool *keep_it, error *err) {
    char latest[LIMIT_PATH], aside[LIMIT_PATH], name[64];
    struct manifest there;
    error ignored = {0};
    *keep_it = false;
    if (!file_exists(s->path)) return 0;
    read_latest(s->run, latest);
    bool is_latest = strcmp(latest, s->name) == 0;
    if (is_latest && manifest_read(&there, s->path, &ignored) == 0 &&
        manifest_verify(&there, s->path, &ignored) == 0) {
        *keep_it = same_content(&there, &s->directory);
        if (*keep_it) return 0;
        return error_input(err,
                           "%s exists with other contents, and it is the latest checkpoint of its run; a new run needs "
                           "another directory",
                           s->path);
    }
    /* What could not be read for want of memory may well be complete. */
    if (is_latest && ignored.kind == ERROR_SYSTEM) {
        *err = ignored;
        return -1;
    }
    snprintf(name, sizeof name, "tmp-old-%s", s->name);
    TRY(file_join(aside, sizeof aside, s->run, name, err));
    return file_rename(s->path, aside, err);
}

static int point_latest(const char *run, const char *name, error *err) {
    char latest[LIMIT_PATH];
    TRY(file_join(latest, sizeof latest, run, LATEST, err));
    TRY(file_link_atomically(name, latest, err));
    return file_sync_directory(run, err);
}

/* ---- 6: the old ones --------------------------------------------------------------------------------------------- */

/* The N of step-N; -1 for any other name. */
static int64_t step_of(const char *name) {
    if (!begins(name, STEP_PREFIX)) return -1;
    const char *digits = name + strlen(STEP_PREFIX);
    size_t length = strlen(digits);
    if (length < 8 || length > 18 || strspn(digits, "0123456789") != length) return -1;
    return strtoll(digits, NULL, 10);
}

static int compare_steps(const void *a, const void *b) {
    int64_t x = step_of(*(char *const *)a), y = step_of(*(char *const *)b);
    return x < y ? 1 : x > y ? -1 : 0; /* newest first, other names last */
}

int checkpoint_newest(const char *run, char name[LIMIT_STEP_NAME], error *err) {
    char **names;
    size_t count;
    int64_t newest = -1;
    name[0] = 0;
    if (!file_is_directory(run)) return 0;
    TRY(file_list(run, "", &names, &count, err));
    for (size_t i = 0; i < count; i++) {
        if (step_of(names[i]) <= newest) continue;
        newest = step_of(names[i]);
        snprintf(name, LIMIT_STEP_NAME, "%s", names[i]);
    }
    file_list_free(names, count);
    return 0;
}

int checkpoint_mend_latest(const char *run, error *err) {
    char latest[LIMIT_PATH], newest[LIMIT_STEP_NAME];
    struct stat about;
    TRY(file_join(latest, sizeof latest, run, LATEST, err));
    if (lstat(latest, &about) == 0) return 0;
    TRY(checkpoint_newest(run, newest, err));
    return newest[0] ? point_latest(run, newest, err) : 0;
}

static int remove_checkpoint(const char *run, const char *name, error *err) {
    char path[LIMIT_PATH], aside[LIMIT_PATH], temporary[300];
    snprintf(temporary, sizeof temporary, "tmp-old-%s", name);
    TRY(file_join(path, sizeof path, run, name, err));
    TRY(file_join(aside, sizeof aside, run, temporary, err));
    TRY(file_rename(path, aside, err));
    return file_remove_tree(aside, err);
}

/* Later ones than `step` are not counted and not touched: somebody has set the run back. */
int checkpoint_prune(const char *run, int64_t step, int64_t keep, error *err) {
    char **names, latest[LIMIT_PATH];
    size_t count;
    TRY(remove_leftovers(run, err));
    if (keep == 0) return 0;
    TRY(file_list(run, "", &names, &count, err));
    if (count > 0) qsort(names, count, sizeof *names, compare_steps);
    read_latest(run, latest);
    int64_t kept = 0;
    int result = 0;
    for (size_t i = 0; result == 0 && i < count; i++) {
        int64_t at = step_of(names[i]);
        if (at < 0 || at > step) continue;
        if (kept++ < keep || strcmp(names[i], latest) == 0) continue;
        result = remove_checkpoint(run, names[i], err);
    }
    file_list_free(names, count);
    return result;
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

static int finish(struct save *s, int64_t keep, error *err) {
    bool keep_it;
    TRY(manifest_write(&s->directory, s->state, err));
    TRY(model_directory_verify(&s->directory, err));
    TRY(make_room(s, &keep_it, err));
    if (!keep_it) {
        TRY(model_directory_publish(&s->directory, s->path, err));
        TRY(point_latest(s->run, s->name, err));
    }
    return checkpoint_prune(s->run, s->state->step, keep, err);
}

/* A failed save gives its disk space back as far as the disk lets it; the error that is told is the first one. */
static void discard(const struct save *s) {
    error ignored;
    if (s->directory.path[0]) file_remove_tree(s->directory.path, &ignored);
}

int checkpoint_save(const char *run, const struct trainer_state *state, struct model *m, struct optimizer *optimizer,
                    const config *c, const tokenizer *t, struct comm *comm, int64_t keep, error *err) {
    struct save s = {.run = run, .state = state};
    ASSERT(state->step >= 0 && keep >= 0);
    struct gathered g = {.model = m, .optimizer = optimizer, .comm = comm, .bucket = -1};
    int result = 0;
    if (comm->rank == 0) {
        result = begin(&s, &g, c, t, err);
        if (optimizer) ask(&g, -1);
    } else if (optimizer) {
        answer(&g);
    }
    free(g.host);
    result = comm_agree(comm, result, err);
    if (result == 0 && optimizer) result = save_moments(&s, m, optimizer, comm, err);
    if (result == 0) result = comm_agree(comm, comm->rank == 0 ? finish(&s, keep, err) : 0, err);
    if (result != 0 && comm->rank == 0) discard(&s);
    return result;
}
