/* support_checkpoint.c: see support_checkpoint.h. */
#include "test/support_checkpoint.h"

#include "common/rng.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

void parts_directory(char out[256]) {
    const char *parent = getenv("TMPDIR");
    if (access("/dev/shm", W_OK) == 0) parent = "/dev/shm";
    snprintf(out, 256, "%s/unit.XXXXXX", parent && *parent ? parent : "/tmp");
    ASSERT(mkdtemp(out) != NULL);
}

#define MUST(call)                                                                                                     \
    do {                                                                                                               \
        if ((call) != 0) {                                                                                             \
            fprintf(stderr, "%s: %s\n", #call, err.text);                                                              \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

const char parts_text[] = "[model]\nd_model = 12\nvocab_size = 0\npad_vocab_to = 16\npattern = m*2\n"
                          "[block.m]\nmixer = mamba2\nd_state = 5\nhead_dim = 8\nchunk = 8\n";

static const struct optimizer_options options = {.lr = 0.001, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};

void parts_open(struct parts *p, struct comm *comm, enum precision precision, const char *text) {
    error err = {0};
    *p = (struct parts){.comm = comm};
    MUST(tokenizer_open(&p->t, TOKENIZER_BYTES, &err));
    MUST(config_parse(&p->c, text, strlen(text), "test", &err));
    MUST(model_config_bind(&p->mc, p->c, tokenizer_vocab(p->t), &err));
    MUST(device_open(&p->dev, DEVICE_CPU, precision, &err));
    MUST(model_open(&p->m, p->mc, p->dev, MODEL_TRAIN, 1, 8, comm->rank, comm->ranks, &err));
    MUST(optimizer_open(&p->o, p->m, comm, &options, &err));
}

void parts_close(struct parts *p) {
    optimizer_close(p->o);
    model_close(p->m);
    device_close(p->dev);
    model_config_free(p->mc);
    config_free(p->c);
    tokenizer_close(p->t);
}

/* A bucket in flat order: what there is in the gaps stays zero. */
static void fill_bucket(struct parts *p, int bucket, int which, int64_t step) {
    const struct params *params = model_params(p->m);
    const struct bucket *b = &params->buckets[bucket];
    bool wide = p->dev->ops->real == DTYPE_F64;
    char *host = calloc((size_t)b->count, sizeof(double));
    for (int i = b->first; i < b->first + b->params; i++) {
        const struct param *t = &params->list[i];
        rng_key key = {.seed = (uint64_t)step, .purpose = RNG_TEST, .stream = (uint32_t)(2 * i + which)};
        for (int64_t k = 0; k < t->count; k++) {
            double x = rng_normal(key, (uint64_t)k);
            int64_t at = t->offset - b->offset + k;
            if (wide) ((double *)(void *)host)[at] = x;
            else ((float *)(void *)host)[at] = (float)x;
        }
    }
    optimizer_scatter(p->o, bucket, which, p->comm->rank == 0 ? host : NULL);
    free(host);
}

void parts_fill(struct parts *p, int64_t step) {
    model_init(p->m, (uint64_t)step);
    for (int b = 0; b < model_params(p->m)->bucket_count; b++) {
        fill_bucket(p, b, 0, step);
        fill_bucket(p, b, 1, step);
    }
}

struct trainer_state parts_state(int64_t step) {
    struct trainer_state s = {
        .step = step,
        .optimizer_steps = step > 0 ? step - 1 : 0,
        .skipped = step > 0,
        .samples = (uint64_t)step * 7 + (UINT64_C(1) << 53) + 1, /* no double holds it */
        .tokens = (double)step * 100,
        .seconds = 0.1 * (double)step,
        .best_valid = step % 2 ? NAN : 1.0 / 3,
    };
    if (step % 2) return s;
    s.inexact = 4 * step;
    s.rungs[1] = (struct rung){.level = SOLVER_MORE, .since = step + 1};
    s.rungs[LIMIT_LAYERS - 1] = (struct rung){.before = SOLVER_SEQUENTIAL, .since = step + 1};
    return s;
}

void parts_expect_state(const struct trainer_state *s, int64_t step) {
    struct trainer_state e = parts_state(step);
    ASSERT(s->step == e.step && s->optimizer_steps == e.optimizer_steps && s->skipped == e.skipped);
    ASSERT(s->samples == e.samples && s->tokens == e.tokens && s->seconds == e.seconds);
    ASSERT(s->inexact == e.inexact && memcmp(s->rungs, e.rungs, sizeof e.rungs) == 0);
    ASSERT(isnan(e.best_valid) ? isnan(s->best_valid) : s->best_valid == e.best_valid);
}

/* The tensors of a gathered bucket as f32. */
static void digest_bucket(XXH64_state_t *state, const struct parts *p, int bucket, const char *host) {
    const struct params *params = model_params(p->m);
    const struct bucket *b = &params->buckets[bucket];
    for (int i = b->first; i < b->first + b->params; i++) {
        const struct param *t = &params->list[i];
        for (int64_t k = 0; k < t->count; k++) {
            int64_t at = t->offset - b->offset + k;
            float x = p->dev->ops->real == DTYPE_F64 ? (float)((const double *)(const void *)host)[at]
                                                     : ((const float *)(const void *)host)[at];
            XXH64_update(state, &x, sizeof x);
        }
    }
}

uint64_t parts_digest(struct parts *p) {
    const struct params *params = model_params(p->m);
    XXH64_state_t *state = XXH64_createState();
    XXH64_reset(state, 0);
    for (int i = 0; i < params->count; i++) {
        float *values = malloc((size_t)params->list[i].count * sizeof *values);
        model_read_param(p->m, i, values, DTYPE_F32);
        XXH64_update(state, values, (size_t)params->list[i].count * sizeof *values);
        free(values);
    }
    for (int b = 0; b < params->bucket_count; b++) {
        for (int which = 0; which < 2; which++) {
            char *host = p->comm->rank == 0 ? malloc((size_t)params->buckets[b].count * sizeof(double)) : NULL;
            optimizer_gather(p->o, b, which, host);
            if (host) digest_bucket(state, p, b, host);
            free(host);
        }
    }
    uint64_t digest = XXH64_digest(state);
    XXH64_freeState(state);
    return p->comm->rank == 0 ? digest : 0;
}

int parts_save(struct parts *p, const char *run, int64_t step, int64_t keep, error *err) {
    struct trainer_state state = parts_state(step);
    parts_fill(p, step);
    return checkpoint_save(run, &state, p->m, p->o, p->c, p->t, p->comm, keep, err);
}

int parts_load(struct parts *p, const char *path, struct trainer_state *state, error *err) {
    struct checkpoint *c;
    TRY(checkpoint_open(&c, path, err));
    int result = checkpoint_load_model(c, p->m, err);
    if (result == 0) result = checkpoint_load_optimizer(c, p->o, p->comm, err);
    if (state) *state = *checkpoint_state(c);
    checkpoint_close(c);
    return result;
}
