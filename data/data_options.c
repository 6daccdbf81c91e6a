/* data_options.c: the option tables of [data] and [source.NAME], and the opening of the data sets and tasks they name.
 * Called by the programs that train, evaluate or plan. */
#include "data/data_options.h"

#include <string.h>

#define SOURCE_PREFIX "source."
#define TASK_SECTION "task."
#define SEED_MAX 9007199254740991.0 /* 2^53 - 1: bounds of options are doubles, which are exact up to here */

const struct option data_options_table[] = {
    {"train", OPTION_STRING, offsetof(struct data_options, train), "", 0, 0, "",
     "Data set to train on: a directory of shards, one shard, or task:NAME; several go into [source.NAME] sections "
     "instead.",
     NULL},
    {"valid", OPTION_STRING, offsetof(struct data_options, valid), "", 0, 0, "",
     "Data set or task:NAME for validation; without one there is no validation.", NULL},
    {"seq_len", OPTION_INT, offsetof(struct data_options, T), "2048", 1, 1 << 24, "tokens",
     "Length of a training row.", NULL},
    {"seed", OPTION_INT, offsetof(struct data_options, seed), "1", 0, SEED_MAX, "",
     "Key of the order of samples and of the mixture.", NULL},
    {"shuffle", OPTION_BOOL, offsetof(struct data_options, shuffle), "true", 0, 0, "",
     "Visit each source's samples in a new keyed order every epoch; false: in the order of the data.", NULL},
    {"reset", OPTION_BOOL, offsetof(struct data_options, reset), "true", 0, 0, "",
     "Start every document with an empty state; false: a row is one run of text.", NULL},
    {"threads", OPTION_INT, offsetof(struct data_options, threads), "1", 1, 256, "threads",
     "Threads of each rank that read and decompress ahead; they don't change what is read.", NULL},
    {"ahead", OPTION_INT, offsetof(struct data_options, ahead), "4", 1, 1024, "batches", "Batches prepared ahead.",
     NULL},
    OPTIONS_END,
};

const struct option data_source_options_table[] = {
    {"path", OPTION_STRING, offsetof(struct data_source_options, path), NULL, 0, 0, "",
     "Data set of this source: a directory of shards, one shard, or task:NAME.", NULL},
    {"weight", OPTION_FLOAT, offsetof(struct data_source_options, weight), "1", 1e-12, 1e12, "",
     "Share of the samples, relative to the weights of the other sources.", NULL},
    OPTIONS_END,
};

static int bind_tasks(config *c, struct data_options *o, error *err) {
    const char *sections[LIMIT_TASKS];
    o->task_count = config_sections(c, TASK_SECTION, sections, LIMIT_TASKS);
    if (o->task_count > LIMIT_TASKS) {
        return error_input(err, "there are %zu [task.NAME] sections; at most %d are possible", o->task_count,
                           LIMIT_TASKS);
    }
    for (size_t t = 0; t < o->task_count; t++) TRY(task_options_bind(c, sections[t], &o->tasks[t], err));
    return 0;
}

int data_options_bind(config *c, struct data_options *o, error *err) {
    memset(o, 0, sizeof *o);
    TRY(config_bind(c, "data", data_options_table, o, err));
    TRY(bind_tasks(c, o, err));
    const char *sections[LIMIT_SOURCES];
    size_t count = config_sections(c, SOURCE_PREFIX, sections, LIMIT_SOURCES);
    if (count > LIMIT_SOURCES) {
        return error_input(err, "there are %zu [source.NAME] sections; at most %d are possible", count,
                           LIMIT_SOURCES);
    }
    if (count > 0 && o->train[0]) {
        return error_input(err, "data.train = %s and section [%s] both name training data; keep one of the two ways",
                           o->train, sections[0]);
    }
    for (size_t s = 0; s < count; s++) {
        const char *name = sections[s] + strlen(SOURCE_PREFIX);
        if (name[0] == '\0') return error_input(err, "section [%s] has no name: write [source.NAME]", sections[s]);
        TRY(config_bind(c, sections[s], data_source_options_table, &o->sources[s], err));
        o->sources[s].name = name;
    }
    o->source_count = count;
    return 0;
}

struct loader_options data_loader_options(const struct data_options *o) {
    return (struct loader_options){
        .seed = (uint64_t)o->seed,
        .T = o->T,
        .shuffle = o->shuffle,
        .reset = o->reset,
        .threads = (int)o->threads,
        .ahead = (int)o->ahead,
        .B = 1,
        .ranks = 1,
    };
}

static bool is_task(const char *path) { return strncmp(path, TASK_PREFIX, strlen(TASK_PREFIX)) == 0; }

static const struct task_options *find_task(const struct data_options *o, const char *path) {
    for (size_t t = 0; is_task(path) && t < o->task_count; t++) {
        if (strcmp(o->tasks[t].name, path + strlen(TASK_PREFIX)) == 0) return &o->tasks[t];
    }
    return NULL;
}

int64_t data_options_vocab(const struct data_options *o) {
    const struct task_options *task = find_task(o, o->source_count > 0 ? o->sources[0].path : o->train);
    return task ? task->vocab : 0;
}

int data_open(row_source **s, const struct data_options *o, const char *path, enum task_role role, error *err) {
    *s = NULL;
    if (!is_task(path)) return row_source_open_shards(s, path, err);
    const struct task_options *task = find_task(o, path);
    if (!task) {
        return error_input(err, "%.200s names a generated task, but there is no section [task.%.200s] to describe it",
                           path, path + strlen(TASK_PREFIX));
    }
    return task_open(s, path, task, role, err);
}

/* Open one data set; messages name the option that gave the path. */
static int open_named(row_source **d, const struct data_options *o, const char *path, enum task_role role,
                      const char *option, error *err) {
    *d = NULL;
    if (path[0] == '\0') return error_input(err, "%s is empty; give a directory of shards or task:NAME", option);
    if (data_open(d, o, path, role, err) != 0) return error_context(err, "%s", option);
    return 0;
}

static int open_all(struct data_sources *s, const struct data_options *o, error *err) {
    const char *first_path = o->source_count > 0 ? o->sources[0].path : o->train;
    if (o->source_count == 0) {
        if (o->train[0] == '\0') {
            return error_input(err, "no training data: give data.train, or [source.NAME] sections with a path each");
        }
        TRY(open_named(&s->data[0], o, o->train, TASK_TRAIN, "data.train", err));
        s->train[0] = (struct loader_source){.name = "train", .rows = s->data[0], .weight = 1};
        s->count = 1;
    }
    for (size_t i = 0; i < o->source_count; i++) {
        const struct data_source_options *source = &o->sources[i];
        char option[LIMIT_NAME];
        snprintf(option, sizeof option, SOURCE_PREFIX "%s.path", source->name);
        TRY(open_named(&s->data[i], o, source->path, TASK_TRAIN, option, err));
        s->train[i] = (struct loader_source){.name = source->name, .rows = s->data[i], .weight = source->weight};
        s->count++;
        if (i > 0) TRY(row_source_same_tokens(s->data[0], first_path, s->data[i], source->path, err));
    }
    if (o->valid[0]) {
        TRY(open_named(&s->valid, o, o->valid, TASK_VALID, "data.valid", err));
        TRY(row_source_same_tokens(s->data[0], first_path, s->valid, o->valid, err));
    }
    return 0;
}

int data_sources_open(struct data_sources *s, const struct data_options *o, error *err) {
    memset(s, 0, sizeof *s);
    if (open_all(s, o, err) != 0) {
        data_sources_close(s);
        return -1;
    }
    return 0;
}

void data_sources_close(struct data_sources *s) {
    for (size_t i = 0; i < s->count; i++) row_source_close(s->data[i]);
    row_source_close(s->valid);
    memset(s, 0, sizeof *s);
}
