/* options.h: every option of a training run beside the model's: sections, structs, tables.
 *
 * [data] and [source.*] are data/data_options.h's, [model] and [block.*] are model/'s. A program binds all of them
 * and then calls config_finish, so an unknown key anywhere is refused before anything happens. `riverrun help config`
 * prints all tables; docs/config.md is that output.
 */
#ifndef RIVERRUN_OPTIONS_H
#define RIVERRUN_OPTIONS_H

#include "common/config.h"
#include "common/limits.h"
#include "data/data_options.h"
#include "model/model.h"
#include "train/ramp.h"

enum schedule_kind { SCHEDULE_CONSTANT, SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_EXPONENTIAL };
enum decay_policy { DECAY_TABLE, DECAY_HEAD, DECAY_ALL };
enum decay_mode { DECAY_WITH_LR, DECAY_DETACHED };
enum eval_mode { EVAL_WINDOW, EVAL_CARRY };

struct train_options { /* [train] */
    const char *out;     /* run directory: log.jsonl, config.ini, step-NNNNNNNN/, latest; "" = not given */
    const char *init;    /* a checkpoint whose weights start a fresh run; "" = the papers' initialisation */
    int64_t steps;       /* optimizer steps in the whole run */
    int64_t batch;       /* sequences in a global batch, over all ranks */
    int64_t micro_batch; /* sequences a rank runs at once; 0 = batch / ranks */
    int64_t seed;        /* of the initial weights; data has its own */
    int device;          /* enum device_kind, or DEVICE_AUTO before it is chosen; precision likewise */
    int precision;       /* enum precision; what is computed in. Checkpoints hold f32 */
    bool graph;          /* a step is recorded and replayed, where the device can */
    int64_t log_every;   /* steps between terminal lines; every step goes to log.jsonl */
    bool resume;         /* continue from `latest` in out if there is one */
};
struct group_options { /* [group.NAME]; a number that is NAN is not given */
    const char *name;
    const char *match; /* globs over names of tensors */
    double lr_scale;
    double weight_decay;
    double clamp_min, clamp_max;
};
struct optimizer_options { /* [optimizer], then the groups */
    double lr, beta1, beta2, eps, weight_decay;
    double clip;         /* largest norm of the mean gradient; 0 = no clipping */
    double z_loss;
    int decay;           /* enum decay_policy */
    int decay_mode;      /* enum decay_mode */
    size_t group_count;
    struct group_options groups[LIMIT_GROUPS];
};
struct schedule_options { /* [schedule] */
    int kind;            /* enum schedule_kind */
    int64_t warmup;      /* steps of linear warm-up: step t < warmup runs at (t + 1) / warmup of the peak */
    double min_lr;       /* floor, absolute */
    int64_t decay_steps; /* WSD: length of the final decay; cosine, linear, exponential: 0 = to the end of the run */
    double half_life;    /* exponential: steps in which lr - min_lr halves */
    int64_t cooldown;    /* steps of a linear fall to 0 at the end of the run */
};
struct eval_options { /* [eval] */
    int64_t every;       /* steps between validations; 0 = never; the last step always if there is validation data */
    int mode;            /* enum eval_mode */
    int64_t window;      /* tokens in a window or, carrying, in a piece; 0 = data.seq_len */
    int64_t batch;       /* windows at once on each rank; a trainer runs at most its micro-batch */
    int64_t tokens;      /* predict at most this many tokens; 0 = all */
};
struct checkpoint_options { /* [checkpoint] */
    int64_t every;       /* steps between saves; 0 = only at the end and on a signal */
    int64_t keep;        /* newest ones kept; 0 = all */
};

struct solver_options { /* [solver]: what is done about recurrences that were not solved: train/ladder.h */
    double warn, limit; /* residuals from which on a step is counted, and from which on it is skipped */
    int64_t hold;       /* steps after which a raised layer is tried a level lower; 0 = never */
};

struct comm_options { /* [comm] */
    double timeout;     /* seconds without progress after which a job of several ranks is given up; 0 = never */
    int64_t bucket_mib; /* gradients travel when at least so many MiB of them are complete */
};

/* What --help and docs/config.md say of the sections of a run, [data]'s among them, in their order. */
struct option_section {
    const char *name, *help; /* NULL ends the list; help: sentences, lines cut by hand */
    const struct option *table;
};
extern const struct option_section run_sections[];
extern const struct option eval_options_table[];

struct run_options {
    struct train_options train;
    struct ramp ramp; /* [ramp] and train.batch */
    struct optimizer_options optimizer;
    struct schedule_options schedule;
    struct data_options data;
    struct eval_options eval;
    struct checkpoint_options checkpoint;
    struct solver_options solver;
    struct comm_options comm;
};

/* The choices of --precision and train.precision, and of --device and train.device, in the order of their enums, with
 * "auto" behind them. */
enum { DEVICE_AUTO = DEVICE_CUDA + 1, PRECISION_AUTO = PRECISION_BF16 + 1 };
extern const char *const precision_choices[], *const device_choices[], *const eval_mode_choices[];

/* Put what "auto" stands for here in its place: a GPU if there is one, unless the precision is the CPU's alone; bf16 on
 * a GPU, fp32 on the CPU. RIVERRUN_DEVICE=cpu or cuda in the environment says what a device of "auto" is. Refuses bf16
 * in a build without GPUs, and other words in the environment. */
int device_choose(int *device, int *precision, error *err);

/* Bind all sections but the model's, check what tables can't (warm-up within steps, ...). Device and precision come out
 * chosen, never as "auto". */
int run_options_bind(struct run_options *o, config *c, error *err);

/* How the global batch is dealt out: sequences a rank runs at once, and micro-batches in a step of train.batch
 * sequences; a step of the ramp has fewer micro-batches of the same size. Batches that do not divide are refused with
 * the nearest ones that do. */
int run_options_split(const struct run_options *o, int ranks, int64_t *micro_batch, int64_t *accumulate, error *err);

/* Learning rate of step t, counted from 0: a pure function.
 * With w = warmup, c = cooldown, e = steps - w - c or decay_steps, u = min(1, (t - w) / e):
 *   t < w         peak (t + 1) / w
 *   constant      peak
 *   cosine        min + (peak - min) (1 + cos(pi u)) / 2
 *   linear        min + (peak - min) (1 - u)
 *   wsd           peak, and in the last decay_steps steps min + (peak - min) (steps - t) / decay_steps
 *   exponential   min + (peak - min) 2^(-(t - w) / half_life); from decay_steps on, if given, it stays where it is
 * and in the last c steps (steps - t) / c of what it is at step steps - c. */
double schedule_lr(const struct schedule_options *s, double peak, int64_t steps, int64_t t);

#endif
