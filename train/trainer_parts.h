/* trainer_parts.h: the struct that trainer_open.c fills and trainer.c runs. Nobody else includes it. */
#ifndef RIVERRUN_TRAINER_PARTS_H
#define RIVERRUN_TRAINER_PARTS_H

#include "data/loader.h"
#include "train/checkpoint.h"
#include "train/optimizer.h"
#include "train/report.h"
#include "train/run_directory.h"
#include "train/step.h"
#include "train/trainer.h"

struct trainer {
    config *config;
    struct comm *comm;
    struct run_options options;
    struct settings settings;   /* the effective config */
    struct eval_options eval;   /* with window and batch as they are used */
    int64_t micro_batch, accumulate;

    struct data_sources data;
    tokenizer *tokenizer;       /* NULL where the data is generated tasks */
    int64_t vocab;              /* ids of the data */
    struct model_config *model_config;
    struct device *dev;
    struct model *model;
    struct optimizer *optimizer;
    struct step *step;
    loader *loader;

    struct checkpoint *from;    /* what the weights come from while opening: the run's latest, or train.init; or NULL */
    bool resumed;               /* `from` is the run's latest */
    struct trainer_state state; /* of steps that were waited for */
    int64_t begun;              /* steps queued so far: as many as state.step, or more */
    bool started;               /* a step of this session was reported */
    double waiting_since;       /* when the last report came, or the step was begun: the start of a step's time */
    struct report *report;      /* rank 0 */
    struct report_history history; /* the same on all ranks */
    int lock;                   /* rank 0; -1: none */
};

/* "nats/byte" where a token is a byte. */
const char *trainer_unit(const struct trainer *t);

#endif
