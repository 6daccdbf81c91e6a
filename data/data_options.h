/* data_options.h: what a config says about data, and the data sets it names.
 *
 * [data] holds what every run needs and may name one data set to train on; [source.NAME] sections name several, mixed
 * by weight. The two exclude each other. Reading the options opens nothing, so that `riverrun plan` works without
 * data.
 */
#ifndef RIVERRUN_DATA_OPTIONS_H
#define RIVERRUN_DATA_OPTIONS_H

#include "common/config.h"
#include "common/limits.h"
#include "data/loader.h"

struct data_source_options { /* [source.NAME] */
    const char *name;        /* NAME */
    const char *path;
    double weight;
};

struct data_options {          /* [data], then the sources */
    const char *train, *valid; /* "" = not given */
    int64_t T;
    int64_t seed;
    bool shuffle, reset;
    int64_t threads, ahead;
    size_t source_count;
    struct data_source_options sources[LIMIT_SOURCES];
};

extern const struct option data_options_table[];        /* [data] */
extern const struct option data_source_options_table[]; /* [source.NAME] */

/* Bind [data] and every [source.NAME]. Strings live as long as the config. Refuses data.train beside sources, a
 * source without a name, more than LIMIT_SOURCES. That no training data is named is no error here. */
int data_options_bind(config *c, struct data_options *o, error *err);

/* The part of the loader's options that the config decides; the caller sets B, rank, ranks, start and memory. */
struct loader_options data_loader_options(const struct data_options *o);

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
