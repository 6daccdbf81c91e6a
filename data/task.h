/* task.h: generated tasks: samples with known answers, made from a seed, as a source of rows.
 *
 * A [task.NAME] section of a config describes one; `task:NAME` stands where the path of a data set may stand. What the
 * kinds are, token by token, is in docs/tasks.md.
 *
 * Sample i is a pure function of the task's options, its role and i: no files, no state, so that ranks, threads and
 * resumed runs agree. A row of T inputs holds one sample from its start; what is left of the row is token 0, and only
 * the answers are targets. Training samples and validation samples are drawn under different keys.
 */
#ifndef RIVERRUN_TASK_H
#define RIVERRUN_TASK_H

#include "common/config.h"
#include "common/rng.h"
#include "data/row_source.h"

#define TASK_PREFIX "task:" /* of a path */
/* Samples of a task whose training set has no end: more than any run reads, few enough that rows count in 63 bits. */
#define TASK_SAMPLES_MAX (INT64_C(1) << 38)

struct task_options { /* [task.NAME] */
    const char *name; /* NAME */
    int kind;         /* index into task_kind_names */
    int64_t seed, samples, valid_samples;
    /* what a kind does not have is 0 */
    int64_t length, min_length, vocab;
    int64_t tokens; /* selective_copying */
    int64_t pairs;  /* mqar */
    double power;
    bool fill;
};

enum task_role { TASK_TRAIN, TASK_VALID };

/* Bind a section; `section` is "task.NAME" and lives as long as the options. Refuses what can't be made: too little
 * room for the tokens to remember, more pairs than keys... */
int task_options_bind(config *c, const char *section, struct task_options *o, error *err);

/* The task as a source; `path` (for messages) and the options must outlive it. */
int task_open(row_source **s, const char *path, const struct task_options *o, enum task_role role, error *err);

/* ---- kinds ------------------------------------------------------------------------------------------------------- */

/* The draws of one sample, in order. */
struct task_draws {
    rng_key key;
    uint64_t first; /* index of the sample's first draw */
    uint64_t count; /* draws so far */
};
uint64_t task_below(struct task_draws *d, uint64_t bound); /* uniform, 0 <= result < bound */
double task_uniform(struct task_draws *d);                 /* [0, 1) */

struct task_language; /* what the kinds of task_language.c add */

struct task_kind {
    const char *name, *help;
    const struct option *options; /* beside task_options_table */
    /* What the tables can't say; `section` for messages. NULL: nothing. */
    int (*check)(const struct task_options *o, const char *section, error *err);
    /* Inputs that the longest sample takes, up to the one that predicts the last answer. */
    int64_t (*inputs)(const struct task_options *o);
    size_t (*scratch)(const struct task_options *o); /* bytes */
    /* Write a sample: tokens (zeros before) and targets (-1 before), both from index 0, at most `inputs` of each. */
    void (*make)(const struct task_kind *k, const struct task_options *o, struct task_draws *d, void *scratch,
                 int32_t *tokens, int32_t *targets);
    const struct task_language *language; /* NULL for others */
};

extern const struct task_kind task_selective_copying, task_induction_heads, task_mqar; /* task_recall.c */
extern const struct task_kind task_parity, task_even_pairs, task_cycle_navigation, task_modular_arithmetic,
    task_modular_arithmetic_brackets, task_majority, task_majority_count, task_bucket_sort, task_missing_duplicate,
    task_repetition, task_reverse, task_odds_first, task_set; /* task_language.c */

extern const struct option task_options_table[]; /* the keys that all kinds have */
extern const char *const task_kind_names[];      /* NULL-terminated */
const struct task_kind *task_kind_at(int index);

/* Rows of the kinds' option tables. */
#define TASK_FIELD(field) offsetof(struct task_options, field)
#define TASK_LENGTH_MAX (1 << 24)
#define TASK_END                                                                                                       \
    { NULL, OPTION_INT, 0, NULL, 0, 0, NULL, NULL, NULL }

#endif
