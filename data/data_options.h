/* data_options.h: what a config says about data, and the data sets and tasks it names.
 *
 * [data] holds what every run needs and may name one data set to train on; [source.NAME] sections name several, mixed
 * by weight. The two exclude each other. `task:NAME` in place of a path is the generated task of section [task.NAME].
 * Reading the options opens nothing, so that `riverrun plan` works without data.
 */
#ifndef RIVERRUN_DATA_OPTIONS_H
#define RIVERRUN_DATA_OPTIONS_H

#include "common/config.h"
#include "common/limits.h"
#include "data/loader.h"
#include "data/task.h"

struct data_source_options { /* [source.NAME] */
    const char *name;        /* NAME */
    const char *path;
    double weight;
};

struct data_options {          /* [data], then the sources and tasks */
    const char *train, *valid; /* "" = not given */
    int64_t T;
    int64_t seed;
    bool shuffle, reset;
    int64_t threads, ahead;
    size_t source_count;
    struct data_source_options sources[LIMIT_SOURCES];
    size_t task_count;
    struct task_options tasks[LIMIT_TASKS];
};

extern const struct option data_options_table[];        /* [data] */
extern const struct option data_source_options_table[]; /* [source.NAME] */

/* Bind [data], every [source.NAME] and every [task.NAME]. Strings live as long as the config. Refuses data.train
 * beside sources, a section without a name, more than LIMIT_SOURCES or LIMIT_TASKS. That no training data is named is
 * no error here. */
int data_options_bind(config *c, struct data_options *o, error *err);

/* The part of the loader's options that the config decides; the caller sets B, rank, ranks, start and memory. */
struct loader_options data_loader_options(const struct data_options *o);

/* Number of ids of the training data if that is known without opening it: a task's. 0: not known. */
int64_t data_options_vocab(const struct data_options *o);

/* Open what `path` names: a data set, or task:NAME in the role that the caller gives it. The options and the path must
 * outlive the source. */
int data_open(row_source **s, const struct data_options *o, const char *path, enum task_role role, error *err);

/* The data sets of a run, open. */
struct data_sources {
    size_t count;
    struct loader_source train[LIMIT_SOURCES]; /* `count` of them; a lone data.train is called "train" */
    row_source *data[LIMIT_SOURCES];           /* what train[] reads: these are owned here */
    row_source *valid;                         /* data.valid, or NULL; owned too */
};

/* Open what the options name, and check that all agree on tokenizer and vocabulary. Refuses options without training
 * data. The options must outlive the sources (names and paths are theirs). On failure nothing stays open. */
int data_sources_open(struct data_sources *s, const struct data_options *o, error *err);
void data_sources_close(struct data_sources *s);

#endif
