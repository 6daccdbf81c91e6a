/* options.c: the option tables of [train], [ramp], [optimizer], [group.NAME], [schedule], [eval], [checkpoint],
 * [solver] and [comm], and the rules between options that no table can say. Called by every program that reads a
 * config. */
#include "train/options.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COUNT_MAX 1e12              /* steps, tokens: far above any run, far below where a double stops being exact */
#define SEED_MAX 9007199254740991.0 /* 2^53 - 1: bounds of an option are doubles, and up to here they are exact */
#define AT(type, field) offsetof(struct type, field)
/* What ends a table. */
#define END_OF_TABLE                                                                                                   \
    { NULL, OPTION_INT, 0, NULL, 0, 0, NULL, NULL, NULL }

static const char *const schedule_choices[] = {"constant", "cosine", "linear", "wsd", "exponential", NULL};
static const char *const decay_choices[] = {"table", "head", "all", NULL};
static const char *const decay_mode_choices[] = {"lr", "detached", NULL};
const char *const eval_mode_choices[] = {"window", "carry", NULL};
const char *const precision_choices[] = {"fp32", "fp64", "bf16", "auto", NULL};
const char *const device_choices[] = {"cpu", "cuda", "auto", NULL};

static const struct option train_options_table[] = {
    {"out", OPTION_STRING, AT(train_options, out), "", 0, 0, "",
     "Directory of the run: log, checkpoints, the effective config. Training needs it.", NULL},
    {"init", OPTION_STRING, AT(train_options, init), "", 0, 0, "",
     "Checkpoint whose weights start a fresh run; empty: weights are drawn as the papers of the model say.", NULL},
    {"steps", OPTION_INT, AT(train_options, steps), "1000", 1, COUNT_MAX, "steps", "Optimizer steps in the whole run.",
     NULL},
    {"batch", OPTION_INT, AT(train_options, batch), "8", 1, 1 << 30, "sequences",
     "Sequences in a step, over all ranks and micro-batches.", NULL},
    {"micro_batch", OPTION_INT, AT(train_options, micro_batch), "0", 0, 1 << 30, "sequences",
     "Sequences that a rank runs at once; gradients add up over batch / (ranks * micro_batch) of them. "
     "0: batch / ranks, or with a ramp what divides all its batches.",
     NULL},
    {"seed", OPTION_INT, AT(train_options, seed), "1", 0, SEED_MAX, "", "Key of the initial weights.", NULL},
    {"device", OPTION_CHOICE, AT(train_options, device), "auto", 0, 0, "",
     "What computes: the processor, or a GPU (in builds with CUDA). auto: a GPU if there is one.", device_choices},
    {"precision", OPTION_CHOICE, AT(train_options, precision), "auto", 0, 0, "",
     "Numbers that are computed with. auto: bf16 on a GPU, fp32 on the CPU. fp64 (CPU) is for checking: slow, and "
     "checkpoints hold fp32 all the same. bf16 "
     "(GPU): activations and the operands of products; weights, their gradients, states and sums stay fp32.",
     precision_choices},
    {"graph", OPTION_BOOL, AT(train_options, graph), "true", 0, 0, "",
     "On a GPU a step is recorded as a CUDA graph and replayed; false: launched piece by piece, as profilers that show "
     "named ranges want it. The results are the same.",
     NULL},
    {"log_every", OPTION_INT, AT(train_options, log_every), "10", 1, COUNT_MAX, "steps",
     "Steps between lines on the terminal; log.jsonl has every step.", NULL},
    {"resume", OPTION_BOOL, AT(train_options, resume), "true", 0, 0, "",
     "Continue from the latest checkpoint in train.out if there is one; false: refuse to start where there is one.",
     NULL},
    END_OF_TABLE,
};

static const struct option ramp_options_table[] = {
    {"stages", OPTION_STRING, AT(ramp_options, stages), "", 0, 0, "",
     "Batches before train.batch, as BATCH*STEPS: 128*2000 256*2000 is 2000 steps of 128 sequences, then 2000 of 256.",
     NULL},
    {"start", OPTION_INT, AT(ramp_options, start), "0", 0, 1 << 30, "sequences",
     "Batch of the first step, which then grows by equal increments. 0: no such ramp.", NULL},
    {"increment", OPTION_INT, AT(ramp_options, increment), "0", 0, 1 << 30, "sequences",
     "What the batch grows by at a time; must divide train.batch - start.", NULL},
    {"steps", OPTION_INT, AT(ramp_options, steps), "0", 0, COUNT_MAX, "steps",
     "Length of the ramp in steps: each batch lasts equally many. This or tokens goes with start.", NULL},
    {"tokens", OPTION_INT, AT(ramp_options, tokens), "0", 0, 1e15, "tokens",
     "Length of the ramp in tokens: the batch grows evenly with the tokens seen.", NULL},
    END_OF_TABLE,
};

static const struct option optimizer_options_table[] = {
    {"lr", OPTION_FLOAT, AT(optimizer_options, lr), "1e-3", 0, 100, "", "Peak learning rate of AdamW.", NULL},
    {"beta1", OPTION_FLOAT, AT(optimizer_options, beta1), "0.9", 0, 0.999999, "", "Decay of the mean of gradients.",
     NULL},
    {"beta2", OPTION_FLOAT, AT(optimizer_options, beta2), "0.95", 0, 0.999999, "",
     "Decay of the mean of squared gradients.", NULL},
    {"eps", OPTION_FLOAT, AT(optimizer_options, eps), "1e-8", 1e-30, 1, "", "Added to the root of the mean square.",
     NULL},
    {"weight_decay", OPTION_FLOAT, AT(optimizer_options, weight_decay), "0.1", 0, 100, "",
     "Share of a weight that a step takes off, times what decay_mode says.", NULL},
    {"clip", OPTION_FLOAT, AT(optimizer_options, clip), "1", 0, 1e30, "",
     "Largest norm of the mean gradient; above it the gradient is scaled down. 0: no clipping.", NULL},
    {"z_loss", OPTION_FLOAT, AT(optimizer_options, z_loss), "0", 0, 1, "",
     "Weight of the squared log of the softmax's denominator, which keeps logits near zero.", NULL},
    {"decay", OPTION_CHOICE, AT(optimizer_options, decay), "table", 0, 0, "",
     "What weight decay applies to. table: the layers' matrices and convolutions, as the tensor table marks them; "
     "head: these and the head's matrix, unless it is the embedding's; all: every parameter.",
     decay_choices},
    {"decay_mode", OPTION_CHOICE, AT(optimizer_options, decay_mode), "lr", 0, 0, "",
     "What weight decay is multiplied by. lr: the learning rate, the group's lr_scale included, as AdamW of PyTorch "
     "does; detached: only the learning rate's course, that is its share of the peak, so that the decay does not "
     "depend on the peak.",
     decay_mode_choices},
    END_OF_TABLE,
};

static const struct option group_options_table[] = {
    {"match", OPTION_STRING, AT(group_options, match), NULL, 0, 0, "",
     "Names of tensors, separated by blanks or commas; * stands for any text, ? for any character, [abc] for one of "
     "several. Each must match at least one tensor (riverrun plan --tensors lists them).",
     NULL},
    {"lr_scale", OPTION_FLOAT, AT(group_options, lr_scale), "", 0, 1e6, "",
     "The learning rate of these tensors is so many times that of the schedule.", NULL},
    {"weight_decay", OPTION_FLOAT, AT(group_options, weight_decay), "", 0, 100, "",
     "Weight decay of these tensors, whatever optimizer.weight_decay and optimizer.decay say.", NULL},
    {"clamp_min", OPTION_FLOAT, AT(group_options, clamp_min), "", -1e30, 1e30, "",
     "After every step weights below it are set to it.", NULL},
    {"clamp_max", OPTION_FLOAT, AT(group_options, clamp_max), "", -1e30, 1e30, "",
     "After every step weights above it are set to it.", NULL},
    END_OF_TABLE,
};

static const struct option schedule_options_table[] = {
    {"kind", OPTION_CHOICE, AT(schedule_options, kind), "cosine", 0, 0, "",
     "Course of the learning rate after the warm-up; wsd stays at the peak and decays linearly at the end.",
     schedule_choices},
    {"warmup", OPTION_INT, AT(schedule_options, warmup), "0", 0, COUNT_MAX, "steps", "Linear rise to the peak.", NULL},
    {"min_lr", OPTION_FLOAT, AT(schedule_options, min_lr), "0", 0, 100, "",
     "Learning rate below which the decay does not go.", NULL},
    {"decay_steps", OPTION_INT, AT(schedule_options, decay_steps), "0", 0, COUNT_MAX, "steps",
     "wsd: length of the decay at the end. Others: length of the decay after the warm-up; 0: to the end of the run, "
     "or to the cool-down.",
     NULL},
    {"half_life", OPTION_FLOAT, AT(schedule_options, half_life), "0", 0, COUNT_MAX, "steps",
     "exponential: steps in which the distance to min_lr halves.", NULL},
    {"cooldown", OPTION_INT, AT(schedule_options, cooldown), "0", 0, COUNT_MAX, "steps",
     "Linear fall to 0, whatever min_lr is, over the last steps of the run; 0: none.", NULL},
    END_OF_TABLE,
};

const struct option eval_options_table[] = {
    {"every", OPTION_INT, AT(eval_options, every), "0", 0, COUNT_MAX, "steps",
     "Steps between validations on data.valid; 0: only after the last step.", NULL},
    {"mode", OPTION_CHOICE, AT(eval_options, mode), "window", 0, 0, "",
     "window: windows that each start from an empty state. carry: the state is carried through every document.",
     eval_mode_choices},
    {"window", OPTION_INT, AT(eval_options, window), "0", 0, 1 << 24, "tokens",
     "Length of a window, or of the pieces in which carry goes through the data; 0: data.seq_len.", NULL},
    {"batch", OPTION_INT, AT(eval_options, batch), "8", 1, 1 << 24, "windows",
     "Windows that a rank runs at once; during training at most its micro-batch. Does not change the result.", NULL},
    {"tokens", OPTION_INT, AT(eval_options, tokens), "0", 0, COUNT_MAX, "tokens",
     "Predict only this many tokens, from the start of the data; 0: all.", NULL},
    END_OF_TABLE,
};

static const struct option checkpoint_options_table[] = {
    {"every", OPTION_INT, AT(checkpoint_options, every), "1000", 0, COUNT_MAX, "steps",
     "Steps between saves; 0: only at the end and on a signal.", NULL},
    {"keep", OPTION_INT, AT(checkpoint_options, keep), "3", 0, 1e9, "checkpoints", "Newest ones kept; 0: all.", NULL},
    END_OF_TABLE,
};

static const struct option solver_options_table[] = {
    {"warn", OPTION_FLOAT, AT(solver_options, warn), "1e-3", 0, 1e30, "",
     "Residual of a layer's states above which a step is counted as inexact; the first one is told.", NULL},
    {"limit", OPTION_FLOAT, AT(solver_options, limit), "0.1", 0, 1e30, "",
     "Residual above which a step's gradient is not the model's: the step changes nothing, and the layer is raised, to "
     "3 more iterations at first, then to the sequential solver, which is exact.",
     NULL},
    {"hold", OPTION_INT, AT(solver_options, hold), "1000", 0, COUNT_MAX, "steps",
     "A raised layer is tried a level lower after so many steps; 0: it stays for the rest of the run.", NULL},
    END_OF_TABLE,
};

static const struct option comm_options_table[] = {
    {"timeout", OPTION_FLOAT, AT(comm_options, timeout), "600", 0, 1e6, "seconds",
     "Without progress in a step for so long, a job of several ranks ends and says where it stood; 0: it waits on.",
     NULL},
    {"bucket_mib", OPTION_INT, AT(comm_options, bucket_mib), "64", 0, 1 << 20, "MiB",
     "Gradients travel when at least so many MiB of them are complete, and weights in the same portions; 0: block by "
     "block.",
     NULL},
    END_OF_TABLE,
};

const struct option_section run_sections[] = {
    {"train", "The run.", train_options_table},
    {"ramp",
     "Smaller batches at the start of the run, either as a list or by a rule. The learning rate's schedule\n"
     "counts steps, whatever they hold.",
     ramp_options_table},
    {"optimizer", "AdamW.", optimizer_options_table},
    {"group.NAME",
     "Tensors that the optimizer treats in a way of their own; NAME is yours to choose. A tensor may be in\n"
     "several groups, but takes each number from one: two groups that give it the same one are refused.",
     group_options_table},
    {"schedule", "The learning rate over the run.", schedule_options_table},
    {"data",
     "What is trained on. Either `train` names one data set, or `[source.NAME]` sections name several.",
     data_options_table},
    {"source.NAME", "One of several data sets, mixed by weight; NAME is yours to choose.", data_source_options_table},
    {"task.NAME",
     "A generated task (docs/tasks.md), which `task:NAME` in place of a path stands for; NAME is yours to\n"
     "choose. Beside the keys below it has those of its kind.",
     task_options_table},
    {"eval", "Validation during training, and the defaults of `riverrun eval`.", eval_options_table},
    {"checkpoint", "Saves.", checkpoint_options_table},
    {"solver",
     "What is done about layers whose recurrence is solved iteratively (docs/training.md), where it was not\n"
     "solved.",
     solver_options_table},
    {"comm", "Several ranks.", comm_options_table},
    {NULL, NULL, NULL},
};

static int check_schedule(const struct run_options *o, error *err) {
    const struct schedule_options *s = &o->schedule;
    int64_t steps = o->train.steps;
    if (s->warmup > steps) {
        return error_input(
            err, "schedule.warmup = %lld is longer than train.steps = %lld; at most the whole run can be warm-up",
            (long long)s->warmup, (long long)steps);
    }
    if (s->cooldown > steps - s->warmup) {
        return error_input(err,
                           "schedule.cooldown = %lld is longer than the %lld steps that train.steps = %lld and "
                           "schedule.warmup = %lld leave",
                           (long long)s->cooldown, (long long)(steps - s->warmup), (long long)steps,
                           (long long)s->warmup);
    }
    if (s->kind == SCHEDULE_WSD && s->cooldown > 0) {
        return error_input(err,
                           "schedule.cooldown = %lld does not suit schedule.kind = wsd, whose decay at the end is "
                           "decay_steps long; leave it out",
                           (long long)s->cooldown);
    }
    if (s->min_lr > o->optimizer.lr) {
        return error_input(err, "schedule.min_lr = %g is above the peak optimizer.lr = %g; it must be from 0 to %g",
                           s->min_lr, o->optimizer.lr, o->optimizer.lr);
    }
    if (s->kind == SCHEDULE_WSD && (s->decay_steps < 1 || s->decay_steps > steps - s->warmup)) {
        return error_input(
            err,
            "schedule.decay_steps = %lld does not suit schedule.kind = wsd; it must be from 1 to %lld, the steps "
            "that warm-up leaves",
            (long long)s->decay_steps, (long long)(steps - s->warmup));
    }
    if (s->kind == SCHEDULE_EXPONENTIAL && !(s->half_life > 0)) {
        return error_input(
            err, "schedule.half_life = %g does not suit schedule.kind = exponential; give a number of steps above 0",
            s->half_life);
    }
    return 0;
}

static int bind_groups(struct optimizer_options *o, config *c, error *err) {
    static const char prefix[] = "group.";
    const char *sections[LIMIT_GROUPS];
    size_t count = config_sections(c, prefix, sections, LIMIT_GROUPS);
    if (count > LIMIT_GROUPS) {
        return error_input(err, "there are %zu [group.NAME] sections; at most %d are possible", count, LIMIT_GROUPS);
    }
    for (size_t i = 0; i < count; i++) {
        struct group_options *g = &o->groups[i];
        TRY(config_bind(c, sections[i], group_options_table, g, err));
        g->name = sections[i] + strlen(prefix);
        if (!g->name[0]) return error_input(err, "section [%s] has no name: write [group.NAME]", sections[i]);
        if (isnan(g->lr_scale) && isnan(g->weight_decay) && isnan(g->clamp_min) && isnan(g->clamp_max)) {
            return error_input(
                err, "[%s] changes nothing; give it lr_scale, weight_decay, clamp_min or clamp_max, or remove it",
                sections[i]);
        }
    }
    o->group_count = count;
    return 0;
}

static int check_solver(const struct solver_options *o, error *err) {
    if (o->warn <= o->limit) return 0;
    return error_input(err,
                       "solver.warn = %g is above solver.limit = %g, where steps are skipped; it must be from 0 to %g",
                       o->warn, o->limit, o->limit);
}

static int check_optimizer(const struct optimizer_options *o, error *err) {
    if (o->decay_mode == DECAY_DETACHED && !(o->lr > 0)) {
        return error_input(err,
                           "optimizer.lr = 0 does not suit optimizer.decay_mode = detached, which follows the learning "
                           "rate's share of its peak; give a peak above 0, or decay_mode = lr");
    }
    return 0;
}

/* What RIVERRUN_DEVICE in the environment says, DEVICE_AUTO where it is not set. */
static int device_told(int *device, error *err) {
    const char *told = getenv("RIVERRUN_DEVICE");
    *device = told && *told ? -1 : DEVICE_AUTO;
    for (int i = 0; device_choices[i] && *device < 0; i++)
        if (strcmp(told, device_choices[i]) == 0) *device = i;
    if (*device >= 0) return 0;
    return error_input(err, "RIVERRUN_DEVICE = %.60s in the environment: must be cpu, cuda or auto", told);
}

int device_choose(int *device, int *precision, error *err) {
    int told;
    const struct ops *ops;
    TRY(device_told(&told, err));
    if (*device == DEVICE_AUTO && *precision == PRECISION_BF16) {
        *device = DEVICE_CUDA;
        if (device_table(&ops, DEVICE_CUDA, PRECISION_BF16, err) == 0) return 0;
        return error_input(err, "precision bf16 needs a GPU, and this build of riverrun computes on the CPU only: "
                                "choose precision fp32");
    }
    if (*device == DEVICE_AUTO && *precision == PRECISION_F64) *device = DEVICE_CPU;
    if (*device == DEVICE_AUTO) *device = told;
    if (*device == DEVICE_AUTO) *device = device_present(DEVICE_CUDA) > 0 ? DEVICE_CUDA : DEVICE_CPU;
    if (*precision == PRECISION_AUTO) *precision = *device == DEVICE_CUDA ? PRECISION_BF16 : PRECISION_F32;
    return 0;
}

int run_options_bind(struct run_options *o, config *c, error *err) {
    memset(o, 0, sizeof *o);
    TRY(config_bind(c, "train", train_options_table, &o->train, err));
    TRY(device_choose(&o->train.device, &o->train.precision, err));
    struct ramp_options ramp;
    TRY(config_bind(c, "ramp", ramp_options_table, &ramp, err));
    TRY(config_bind(c, "optimizer", optimizer_options_table, &o->optimizer, err));
    TRY(bind_groups(&o->optimizer, c, err));
    TRY(config_bind(c, "schedule", schedule_options_table, &o->schedule, err));
    TRY(data_options_bind(c, &o->data, err));
    TRY(config_bind(c, "eval", eval_options_table, &o->eval, err));
    TRY(config_bind(c, "checkpoint", checkpoint_options_table, &o->checkpoint, err));
    TRY(config_bind(c, "solver", solver_options_table, &o->solver, err));
    TRY(config_bind(c, "comm", comm_options_table, &o->comm, err));
    TRY(ramp_make(&o->ramp, &ramp, o->train.batch, o->train.steps, o->data.T, err));
    TRY(check_optimizer(&o->optimizer, err));
    TRY(check_solver(&o->solver, err));
    return check_schedule(o, err);
}

/* The divisor of n that is nearest to x; of two equally near the smaller one. */
static int64_t nearest_divisor(int64_t n, int64_t x) {
    int64_t best = 1;
    for (int64_t d = 1; d <= n / d; d++) {
        if (n % d != 0) continue;
        int64_t pair[2] = {d, n / d};
        for (int i = 0; i < 2; i++) {
            int64_t distance = pair[i] > x ? pair[i] - x : x - pair[i], least = best > x ? best - x : x - best;
            if (distance < least || (distance == least && pair[i] < best)) best = pair[i];
        }
    }
    return best;
}

/* Every batch of the ramp must divide as train.batch does. */
static int check_ramp(const struct run_options *o, int ranks, int64_t micro_batch, error *err) {
    const struct ramp *r = &o->ramp;
    int64_t unit = ranks * micro_batch;
    for (int i = 0; i < r->count; i++) {
        if (r->stages[i].batch % unit == 0) continue;
        return error_input(err,
                           "[ramp] has a batch of %lld sequences from step %lld on, which is no multiple of ranks * "
                           "train.micro_batch = %d * %lld = %lld",
                           (long long)r->stages[i].batch, (long long)r->stages[i].step, ranks, (long long)micro_batch,
                           (long long)unit);
    }
    return 0;
}

/* Sequences that a rank runs at once where the config leaves it open. */
static int choose_micro_batch(const struct run_options *o, int ranks, int64_t *micro_batch, error *err) {
    int64_t divisor = ramp_divisor(&o->ramp);
    *micro_batch = divisor / ranks;
    if (divisor % ranks == 0) return 0;
    return error_input(err,
                       "the batches of [ramp], from %lld to %lld sequences, do not all divide among %d ranks; their "
                       "greatest common divisor is %lld, and the number of ranks must divide it",
                       (long long)o->ramp.stages[0].batch, (long long)o->train.batch, ranks, (long long)divisor);
}

int run_options_split(const struct run_options *o, int ranks, int64_t *micro_batch, int64_t *accumulate, error *err) {
    const struct train_options *t = &o->train;
    int64_t unit = ranks * (t->micro_batch ? t->micro_batch : 1);
    if (t->batch % unit == 0) {
        *micro_batch = t->micro_batch;
        if (*micro_batch == 0) TRY(choose_micro_batch(o, ranks, micro_batch, err));
        *accumulate = t->batch / (ranks * *micro_batch);
        return check_ramp(o, ranks, *micro_batch, err);
    }
    int64_t below = t->batch / unit * unit, above = below + unit;
    char valid[160];
    if (below > 0) {
        snprintf(valid, sizeof valid, "train.batch = %lld or %lld", (long long)below, (long long)above);
    } else {
        snprintf(valid, sizeof valid, "train.batch = %lld", (long long)above);
    }
    if (t->micro_batch == 0) {
        return error_input(err, "train.batch = %lld does not divide among %d ranks; the nearest valid: %s",
                           (long long)t->batch, ranks, valid);
    }
    if (t->batch % ranks == 0) {
        size_t used = strlen(valid);
        snprintf(valid + used, sizeof valid - used, ", or train.micro_batch = %lld",
                 (long long)nearest_divisor(t->batch / ranks, t->micro_batch));
    }
    return error_input(
        err, "train.batch = %lld is no multiple of ranks * train.micro_batch = %d * %lld = %lld; the nearest valid: %s",
        (long long)t->batch, ranks, (long long)t->micro_batch, (long long)unit, valid);
}
