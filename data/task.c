/* task.c: generated tasks as a source of rows: the options of [task.NAME], the keys of the draws, and the row around
 * a sample. What a sample is, is said in task_recall.c and task_language.c. Called by the data options. */
#include "data/task.h"

#include "common/limits.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define SEED_MAX 9007199254740991.0 /* 2^53 - 1: bounds of options are doubles, which are exact up to here */
#define DRAW_BITS 26                /* a sample may draw four times for each of its 2^24 tokens */
_Static_assert(TASK_SAMPLES_MAX <= INT64_C(1) << (64 - DRAW_BITS), "every draw of every sample has an index");
_Static_assert(TASK_LENGTH_MAX <= 1 << (DRAW_BITS - 2), "the draws of a sample must fit");

/* ---- kinds and options ------------------------------------------------------------------------------------------- */

/* In the order in which they count in rng keys: new ones come last. */
static const struct task_kind *const kinds[] = {
    &task_selective_copying,
    &task_induction_heads,
    &task_mqar,
    &task_parity,
    &task_even_pairs,
    &task_cycle_navigation,
    &task_modular_arithmetic,
    &task_modular_arithmetic_brackets,
    &task_majority,
    &task_majority_count,
    &task_bucket_sort,
    &task_missing_duplicate,
    &task_repetition,
    &task_reverse,
    &task_odds_first,
    &task_set,
};
const char *const task_kind_names[] = {
    "selective_copying",
    "induction_heads",
    "mqar",
    "parity",
    "even_pairs",
    "cycle_navigation",
    "modular_arithmetic",
    "modular_arithmetic_brackets",
    "majority",
    "majority_count",
    "bucket_sort",
    "missing_duplicate",
    "repetition",
    "reverse",
    "odds_first",
    "set",
    NULL,
};
_Static_assert(sizeof task_kind_names / sizeof *task_kind_names == sizeof kinds / sizeof *kinds + 1,
               "every kind has a name");

const struct task_kind *task_kind_at(int index) {
    ASSERT(index >= 0 && (size_t)index < sizeof kinds / sizeof *kinds);
    ASSERT(strcmp(kinds[index]->name, task_kind_names[index]) == 0);
    return kinds[index];
}

const struct option task_options_table[] = {
    {"kind", OPTION_CHOICE, TASK_FIELD(kind), NULL, 0, 0, "", "What is to be solved.", task_kind_names},
    {"seed", OPTION_INT, TASK_FIELD(seed), "1", 0, SEED_MAX, "", "Key of the samples.", NULL},
    {"samples", OPTION_INT, TASK_FIELD(samples), "0", 0, (double)TASK_SAMPLES_MAX, "samples",
     "Different samples for training, visited again every epoch; 0: fresh ones without end.", NULL},
    {"valid_samples", OPTION_INT, TASK_FIELD(valid_samples), "1024", 1, (double)TASK_SAMPLES_MAX, "samples",
     "Samples for validation and `riverrun eval`, drawn under another key than those for training.", NULL},
    TASK_END,
};

int task_options_bind(config *c, const char *section, struct task_options *o, error *err) {
    const char *dot = strchr(section, '.');
    ASSERT(dot != NULL);
    *o = (struct task_options){.name = dot + 1};
    if (!o->name[0]) return error_input(err, "section [%s] has no name: write [task.NAME]", section);
    TRY(config_bind(c, section, task_options_table, o, err));
    const struct task_kind *k = task_kind_at(o->kind);
    TRY(config_bind(c, section, k->options, o, err));
    return k->check ? k->check(o, section, err) : 0;
}

/* ---- draws ------------------------------------------------------------------------------------------------------- */

static uint64_t next_index(struct task_draws *d) {
    ASSERT(d->count < UINT64_C(1) << DRAW_BITS);
    return d->first + d->count++;
}

uint64_t task_below(struct task_draws *d, uint64_t bound) { return rng_below(d->key, next_index(d), bound); }

double task_uniform(struct task_draws *d) { return rng_uniform(d->key, next_index(d)); }

/* ---- the source -------------------------------------------------------------------------------------------------- */

struct task_rows {
    row_source base;
    const struct task_options *options;
    const struct task_kind *kind;
    rng_key key;
    uint64_t samples;
};

static const struct task_rows *task_of(const row_source *s) { return (const struct task_rows *)s; }

static void close_task(row_source *s) { free(s); }

static uint64_t task_inputs(const row_source *s, int64_t T) { return task_of(s)->samples * (uint64_t)T; }

static size_t task_scratch(const row_source *s, int64_t T) {
    (void)T;
    const struct task_rows *t = task_of(s);
    return t->kind->scratch(t->options);
}

static int task_check(const row_source *s, const char *name, int64_t T, error *err) {
    if (T >= s->info.length && T <= TASK_LENGTH_MAX) return 0;
    return error_input(err,
                       "%s: rows of %" PRId64 " tokens (data.seq_len, in evaluation the window) do not suit %s, whose "
                       "samples take %" PRId64 " inputs; rows may have from %" PRId64 " to %d",
                       name, T, s->info.path, s->info.length, s->info.length, TASK_LENGTH_MAX);
}

static int task_read(const row_source *s, struct row_reader *r, uint64_t sample, int64_t T, int64_t count,
                     int32_t *tokens, int32_t *targets, int32_t *doc, error *err) {
    (void)err;
    const struct task_rows *t = task_of(s);
    ASSERT(T >= s->info.length && sample < t->samples);
    struct task_draws draws = {.key = t->key, .first = sample << DRAW_BITS};
    memset(tokens, 0, (size_t)T * sizeof *tokens);
    for (int64_t i = 0; i < T; i++) targets[i] = -1;
    t->kind->make(t->kind, t->options, &draws, r->scratch, tokens, targets);
    for (int64_t i = count; i < T; i++) targets[i] = -1;
    for (int64_t i = 0; doc && i < T; i++) doc[i] = 1; /* a sample is a document, and the row starts it */
    return 0;
}

int task_open(row_source **out, const char *path, const struct task_options *o, enum task_role role, error *err) {
    static const struct row_source_class class = {
        .close = close_task,
        .inputs = task_inputs,
        .scratch = task_scratch,
        .check = task_check,
        .read = task_read,
    };
    *out = NULL;
    struct task_rows *t = calloc(1, sizeof *t);
    if (!t) return error_system(err, "no memory for %s", path);
    int64_t train = o->samples ? o->samples : TASK_SAMPLES_MAX;
    t->kind = task_kind_at(o->kind);
    t->options = o;
    t->key = (rng_key){.seed = (uint64_t)o->seed, .purpose = RNG_TASK, .stream = (uint32_t)(2 * o->kind + (int)role)};
    t->samples = (uint64_t)(role == TASK_TRAIN ? train : o->valid_samples);
    t->base.class = &class;
    t->base.info = (struct row_source_info){
        .path = path,
        .vocab = (uint64_t)o->vocab,
        .length = t->kind->inputs(o),
        .separate = true,
        .task = t->kind->name,
    };
    *out = &t->base;
    return 0;
}
