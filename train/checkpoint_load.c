/* checkpoint_load.c: from an open checkpoint into a model and an optimizer. See checkpoint.h. */
#include "train/checkpoint_internal.h"

#include "common/file.h"
#include <stdlib.h>
#include <string.h>

static void read_tensor(void *self, int index, float *values) {
    const struct checkpoint_reader *reader = self;
    weights_read(&reader->checkpoint->weights, reader->params, index, values);
}

struct weight_source checkpoint_source(struct checkpoint_reader *reader) {
    return (struct weight_source){.params = reader->params, .read = read_tensor, .self = reader};
}

int checkpoint_load_model(struct checkpoint *c, struct model *m, error *err) {
    const struct params *params = model_params(m);
    TRY(weights_check(&c->weights, params, err));
    int64_t largest = 0;
    for (int i = 0; i < params->count; i++) {
        if (params->list[i].count > largest) largest = params->list[i].count;
    }
    float *values = malloc((size_t)largest * sizeof *values);
    if (!values) return error_system(err, "no memory to load %s", c->path);
    for (int i = 0; i < params->count; i++) {
        weights_read(&c->weights, params, i, values);
        model_write_param(m, i, values, DTYPE_F32);
    }
    free(values);
    c->model = m;
    return 0;
}

/* ---- the optimizer ----------------------------------------------------------------------------------------------- */

static const struct safetensors_entry *find_moment(const safetensors *s, int which, const char *parameter) {
    char name[LIMIT_NAME + 2];
    snprintf(name, sizeof name, "%c.%s", which ? 'v' : 'm', parameter);
    return safetensors_find(s, name);
}

/* Two tensors for each of the table, in f32, and nothing else. */
static int check_moments(const safetensors *s, const char *path, const struct params *params, error *err) {
    for (int i = 0; i < 2 * params->count; i++) {
        const struct param *p = &params->list[i / 2];
        const struct safetensors_entry *e = find_moment(s, i % 2, p->name);
        if (!e) return error_input(err, "%s lacks tensor %c.%s", path, i % 2 ? 'v' : 'm', p->name);
        bool same = e->ndim == p->ndim && e->dtype == ST_F32;
        for (int k = 0; same && k < p->ndim; k++) same = e->dim[k] == p->dim[k];
        if (!same) return error_input(err, "%s: tensor %s must be F32 in the shape of its parameter", path, e->name);
    }
    if (safetensors_count(s) == 2 * (size_t)params->count) return 0;
    return error_input(err, "%s has %zu tensors; two for each of the model's %d are needed", path, safetensors_count(s),
                       params->count);
}

/* One bucket in flat order, gaps zero, in the model's real type. */
static void fill_bucket(const safetensors *s, const struct params *params, int bucket, int which, enum dtype real,
                        char *host) {
    const struct bucket *b = &params->buckets[bucket];
    size_t size = dtype_size(real);
    memset(host, 0, (size_t)b->count * size);
    for (int i = b->first; i < b->first + b->params; i++) {
        const struct param *p = &params->list[i];
        const struct safetensors_entry *e = find_moment(s, which, p->name);
        char *at = host + (size_t)(p->offset - b->offset) * size;
        if (real == DTYPE_F64) safetensors_to_f64(e, 0, e->count, (double *)at);
        else safetensors_to_f32(e, 0, e->count, (float *)at);
    }
}

/* Rank 0's part before anything is sent: the file and room for the largest bucket. */
static int open_moments(struct checkpoint *c, const struct params *params, enum dtype real, safetensors **s,
                        char **host, error *err) {
    char path[LIMIT_PATH];
    TRY(file_join(path, sizeof path, c->path, OPTIMIZER_NAME, err));
    if (!c->ours || !file_exists(path)) {
        return error_input(
            err,
            "%s holds no optimizer state, so a run can't go on from it; train.init starts a new one with "
            "its weights",
            c->path);
    }
    TRY(safetensors_open(s, path, err));
    TRY(check_moments(*s, path, params, err));
    int64_t largest = 0;
    for (int b = 0; b < params->bucket_count; b++) {
        if (params->buckets[b].count > largest) largest = params->buckets[b].count;
    }
    *host = malloc((size_t)largest * dtype_size(real));
    return *host ? 0 : error_system(err, "no memory to load %s", path);
}

int checkpoint_load_optimizer(struct checkpoint *c, struct optimizer *o, struct comm *comm, error *err) {
    ASSERT(c->model != NULL);
    const struct params *params = model_params(c->model);
    enum dtype real = model_device(c->model)->ops->real;
    safetensors *s = NULL;
    char *host = NULL;
    int64_t failed = 0; /* the kind of error, known to all ranks before any of them waits for data */
    if (comm->rank == 0 && open_moments(c, params, real, &s, &host, err) != 0) failed = err->kind;
    comm_broadcast(comm, &failed, sizeof failed, 0);
    for (int b = 0; failed == 0 && b < params->bucket_count; b++) {
        for (int which = 0; which < 2; which++) {
            if (comm->rank == 0) fill_bucket(s, params, b, which, real, host);
            optimizer_scatter(o, b, which, host);
        }
    }
    free(host);
    safetensors_close(s);
    if (failed == 0) return 0;
    if (comm->rank != 0) { /* rank 0 tells it */
        err->kind = (enum error_kind)failed;
        err->text[0] = 0;
    }
    return -1;
}
