/* command_plan.c: `riverrun plan`: what a run will take, told from its config alone: parameters, FLOPs, state, memory,
 * and the largest micro-batch that fits. Opens no device and allocates nothing of the model's size: sizes come from the
 * code that carves the real arenas, run on arenas that only count. Called by main.c. */
#include "train/commands.h"

#include "common/json.h"
#include "common/text.h"
#include "train/flags.h"
#include "train/groups.h"
#include "train/options.h"
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct plan_options {
    double memory; /* GiB; 0 = this machine's */
    int64_t batch, seq, ranks;
    int device, precision;
    bool json, tensors;
};

#define FIELD(name) offsetof(struct plan_options, name)
static const struct option plan_table[] = {
    {"memory", OPTION_FLOAT, FIELD(memory), "0", 0, 1e5, "GiB",
     "Memory of a rank, for the largest batch that fits; 0 = all of this machine's, or of its GPU (80 GiB, where there "
     "is none to ask).", NULL},
    {"batch", OPTION_INT, FIELD(batch), "0", 0, 1 << 30, "sequences",
     "Sequences that a rank runs at once; 0 = what the config says.", NULL},
    {"seq", OPTION_INT, FIELD(seq), "0", 0, 1 << 24, "tokens", "Length of a sequence; 0 = the config's data.seq_len.",
     NULL},
    {"ranks", OPTION_INT, FIELD(ranks), "1", 1, LIMIT_RANKS, "ranks", "Processes that share the optimizer's state.",
     NULL},
    {"device", OPTION_CHOICE, FIELD(device), "auto", 0, 0, "",
     "What computes; where it is not given, the config's train.device counts.", device_choices},
    {"precision", OPTION_CHOICE, FIELD(precision), "auto", 0, 0, "",
     "Numbers that are computed with; where it is not given, the config's train.precision counts.", precision_choices},
    {"json", OPTION_BOOL, FIELD(json), "false", 0, 0, "", "Print one JSON object.", NULL},
    {"tensors", OPTION_BOOL, FIELD(tensors), "false", 0, 0, "",
     "Print every tensor too: name, shape, and how the optimizer treats it.", NULL},
    OPTIONS_END,
};
enum { GIVEN_DEVICE = 4, GIVEN_PRECISION }; /* their places in the table */

static const struct flags plan_flags = {
    .command = "plan",
    .arguments = "CONFIG [section.key=value ...]",
    .summary = "Prints what a run with this config takes: parameters, FLOPs per token, state per sequence, memory per\n"
               "rank, and the largest batch that fits. Needs neither data nor a GPU, and no memory to speak of.",
    .table = plan_table,
    .least = 1,
    .most = -1,
};

struct plan {
    const struct model_config *mc;
    const struct ops *ops;
    const char *config, *precision;
    int64_t B, T;
    int ranks;
    double limit; /* bytes of a rank */
    struct model_memory memory;
    int64_t largest;                   /* micro-batch that fits; 0 = none */
    struct model_memory largest_takes; /* or what one sequence takes, if none fits */
    int64_t embedding_params;
    double forward_flops;
    size_t state;
    int64_t steps;    /* of the run */
    double sequences; /* in all its steps */
    int64_t length;   /* tokens in each of them */
    struct treatment *treatments; /* of every tensor */
    bool tensors;                 /* print them */
};

/* --- working it out --------------------------------------------------------------------------- */

static int memory_for(struct model_memory *memory, const struct plan *p, int64_t B, error *err) {
    return model_plan(memory, p->mc, p->ops, MODEL_TRAIN, B, p->T, p->ranks, err);
}

static int fits(const struct plan *p, int64_t B, bool *yes, error *err) {
    error ignored;
    struct model_memory memory;
    *yes = false;
    if (model_check_batch(p->mc, B, p->T, &ignored) != 0) return 0;
    TRY(memory_for(&memory, p, B, err));
    *yes = (double)memory.total <= p->limit;
    return 0;
}

/* Memory grows with the batch, so: double until it does not fit, then halve the interval. */
static int find_largest_batch(struct plan *p, error *err) {
    int64_t good = 0, bad = 1;
    bool yes;
    TRY(fits(p, bad, &yes, err));
    while (yes) {
        good = bad;
        bad *= 2;
        TRY(fits(p, bad, &yes, err));
    }
    while (bad - good > 1) {
        int64_t middle = good + (bad - good) / 2;
        TRY(fits(p, middle, &yes, err));
        if (yes) good = middle;
        else bad = middle;
    }
    p->largest = good;
    return 0;
}

/* All that the device has; where there is no GPU to ask, what an A100 or H100 has. */
static double memory_of(enum device_kind device) {
    size_t bytes = device_present(device);
    return bytes > 0 ? (double)bytes : 80 * 0x1p30;
}

static int work_out(struct plan *p, error *err) {
    const struct model_config *mc = p->mc;
    TRY(model_check_batch(mc, p->B, p->T, err));
    TRY(model_check_batch(mc, 1, p->T, err));
    TRY(memory_for(&p->memory, p, p->B, err));
    TRY(find_largest_batch(p, err));
    TRY(memory_for(&p->largest_takes, p, p->largest ? p->largest : 1, err));
    p->forward_flops = model_forward_flops(mc, p->T);
    p->state = model_state_bytes(mc, p->ops, 1);
    p->embedding_params = mc->params.list[mc->embedding].count;
    if (mc->head != mc->embedding) p->embedding_params += mc->params.list[mc->head].count;
    return 0;
}

/* --- telling it ------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    size_t offset;
} classes[] = {
    {"parameters", offsetof(struct model_memory, parameters)},
    {"gradients", offsetof(struct model_memory, gradients)},
    {"optimizer", offsetof(struct model_memory, optimizer)},
    {"activations", offsetof(struct model_memory, activations)},
    {"scratch", offsetof(struct model_memory, scratch)},
    {"batch", offsetof(struct model_memory, batch)},
    {"device", offsetof(struct model_memory, device)},
    {"total", offsetof(struct model_memory, total)},
};
enum { CLASSES = sizeof classes / sizeof *classes };

static size_t class_bytes(const struct model_memory *memory, int i) {
    return *(const size_t *)((const char *)memory + classes[i].offset);
}

/* 2702599680 as 2,702,599,680. */
static char *grouped(char out[32], int64_t number) {
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%" PRId64, number), at = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0) out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = 0;
    return out;
}

static void print_flops(const struct plan *p) {
    struct model_flops list[MODEL_FLOPS_MAX];
    int count = model_list_flops(p->mc, p->T, list);
    char one[24];
    for (int i = 0; i < count; i++) {
        const struct model_flops *f = &list[i];
        text_count(one, sizeof one, f->forward);
        printf("  %s%s%s", f->block, *f->block ? " " : "", f->layer);
        printf("%*s%5.1f %%  %s", (int)(14 - strlen(f->block) - (*f->block ? 1 : 0) - strlen(f->layer)), "",
               100 * f->count * f->forward / p->forward_flops, one);
        printf(f->count > 1 ? " in each of %d\n" : "\n", f->count);
    }
}

static void print_model(const struct plan *p) {
    const struct model_config *mc = p->mc;
    int64_t total = mc->params.total;
    char number[32], text[24], text2[24];
    printf("%s: %d blocks (%s) of width %" PRId64 ", %" PRId64 " token ids in %" PRId64 " rows\n", p->config,
           mc->blocks, mc->options.pattern, mc->options.d_model, mc->vocab, mc->rows);
    printf("parameters          %17s\n", grouped(number, total));
    printf("  embedding%s  %17s\n", mc->head == mc->embedding ? "       " : " + head",
           grouped(number, p->embedding_params));
    printf("  other             %17s\n", grouped(number, total - p->embedding_params));
    printf("FLOPs per token     forward %s, training %s", text_count(text, sizeof text, p->forward_flops),
           text_count(text2, sizeof text2, 3 * p->forward_flops));
    printf(" (6 x parameters: %s)\n", text_count(text, sizeof text, 6 * (double)total));
    print_flops(p);
    printf("state per sequence  %s\n", text_bytes(text, sizeof text, (double)p->state));
    double tokens = p->sequences * (double)p->length;
    printf("the whole run       %" PRId64 " steps, %s tokens, %.3g FLOPs\n", p->steps,
           text_count(text, sizeof text, tokens), 3 * p->forward_flops * tokens);
}

static void print_memory(const struct plan *p) {
    char text[24], text2[24];
    printf("memory of a rank, %s, %" PRId64 " sequence%s of %" PRId64 " tokens at once, %d rank%s\n", p->precision,
           p->B, p->B == 1 ? "" : "s", p->T, p->ranks, p->ranks == 1 ? "" : "s");
    for (int i = 0; i < CLASSES; i++) {
        if (class_bytes(&p->memory, i) == 0) continue;
        printf("  %-12s %12s\n", classes[i].name, text_bytes(text, sizeof text, (double)class_bytes(&p->memory, i)));
    }
    text_bytes(text, sizeof text, p->limit);
    text_bytes(text2, sizeof text2, (double)p->largest_takes.total);
    if (p->largest)
        printf("largest batch in %s: %" PRId64 " sequence%s at once on each rank, taking %s\n", text, p->largest,
               p->largest == 1 ? "" : "s", text2);
    else
        printf("nothing fits in %s: one sequence at once takes %s\n", text, text2);
}

/* "768 x 1 x 4" */
static char *shape_text(char out[96], const struct param *t) {
    int used = 0;
    for (int d = 0; d < t->ndim; d++) {
        used += snprintf(out + used, 96 - (size_t)used, "%s%" PRId64, d ? " x " : "", t->dim[d]);
    }
    return out;
}

static void print_tensors(const struct plan *p) {
    const struct params *table = &p->mc->params;
    char shape[96], low[40], high[40];
    int width = 48; /* of names */
    for (int i = 0; i < table->count; i++) {
        int length = (int)strlen(table->list[i].name);
        width = length > width ? length : width;
    }
    printf("%-*s %-18s %9s %12s  %s\n", width, "tensor", "shape", "lr_scale", "weight_decay", "clamped to");
    for (int i = 0; i < table->count; i++) {
        const struct treatment *t = &p->treatments[i];
        printf("%-*s %-18s %9g %12g", width, table->list[i].name, shape_text(shape, &table->list[i]), t->lr_scale,
               t->weight_decay);
        low[0] = high[0] = '\0';
        if (!isinf(t->clamp_min)) snprintf(low, sizeof low, "from %g", t->clamp_min);
        if (!isinf(t->clamp_max)) snprintf(high, sizeof high, "to %g", t->clamp_max);
        printf("%s%s%s%s\n", *low || *high ? "  " : "", low, *low && *high ? " " : "", high);
    }
}

static json_t *tensors_json(const struct plan *p) {
    const struct params *table = &p->mc->params;
    json_t *list = json_array();
    for (int i = 0; i < table->count; i++) {
        const struct param *param = &table->list[i];
        const struct treatment *t = &p->treatments[i];
        json_t *shape = json_array();
        for (int d = 0; d < param->ndim; d++) json_array_append_new(shape, json_integer(param->dim[d]));
        json_t *o = json_pack("{s:s, s:o, s:f, s:f}", "name", param->name, "shape", shape, "lr_scale", t->lr_scale,
                              "weight_decay", t->weight_decay);
        if (o && !isinf(t->clamp_min)) json_object_set_new(o, "clamp_min", json_real(t->clamp_min));
        if (o && !isinf(t->clamp_max)) json_object_set_new(o, "clamp_max", json_real(t->clamp_max));
        json_array_append_new(list, o);
    }
    return list;
}

static json_t *memory_json(const struct model_memory *memory) {
    json_t *object = json_object();
    for (int i = 0; i < CLASSES; i++)
        json_object_set_new(object, classes[i].name, json_integer((json_int_t)class_bytes(memory, i)));
    return object;
}

/* Forward FLOPs per token by kinds of layers. */
static json_t *flops_json(const struct plan *p) {
    struct model_flops list[MODEL_FLOPS_MAX];
    int count = model_list_flops(p->mc, p->T, list);
    json_t *all = json_array();
    for (int i = 0; i < count; i++)
        json_array_append_new(all, json_pack("{s:s, s:s, s:i, s:f}", "block", list[i].block, "layer", list[i].layer,
                                             "count", list[i].count, "forward", list[i].forward));
    return all;
}

static int print_json(const struct plan *p, error *err) {
    const struct model_config *mc = p->mc;
    json_t *o = json_object();
    json_object_set_new(o, "config", json_string(p->config));
    json_object_set_new(o, "blocks", json_integer(mc->blocks));
    json_object_set_new(o, "d_model", json_integer(mc->options.d_model));
    json_object_set_new(o, "vocab_size", json_integer(mc->vocab));
    json_object_set_new(o, "vocab_rows", json_integer(mc->rows));
    json_object_set_new(o, "parameters", json_integer(mc->params.total));
    json_object_set_new(o, "embedding_parameters", json_integer(p->embedding_params));
    json_object_set_new(o, "other_parameters", json_integer(mc->params.total - p->embedding_params));
    json_object_set_new(o, "forward_flops_per_token", json_real(p->forward_flops));
    json_object_set_new(o, "training_flops_per_token", json_real(3 * p->forward_flops));
    json_object_set_new(o, "flops", flops_json(p));
    json_object_set_new(o, "state_bytes_per_sequence", json_integer((json_int_t)p->state));
    json_object_set_new(o, "steps", json_integer(p->steps));
    json_object_set_new(o, "tokens", json_real(p->sequences * (double)p->length));
    json_object_set_new(o, "precision", json_string(p->precision));
    json_object_set_new(o, "batch", json_integer(p->B));
    json_object_set_new(o, "seq", json_integer(p->T));
    json_object_set_new(o, "ranks", json_integer(p->ranks));
    json_object_set_new(o, "memory", memory_json(&p->memory));
    json_object_set_new(o, "memory_limit", json_real(p->limit));
    json_object_set_new(o, "largest_batch", json_integer(p->largest));
    json_object_set_new(o, p->largest ? "largest_batch_memory" : "one_sequence_memory", memory_json(&p->largest_takes));
    if (p->tensors) json_object_set_new(o, "tensors", tensors_json(p));
    char *text = json_text(o, JSON_COMPACT | JSON_PRESERVE_ORDER, "the plan", err);
    json_decref(o);
    if (!text) return -1;
    printf("%s\n", text);
    free(text);
    return 0;
}

/* --- the command ------------------------------------------------------------------------------ */

static int read_config(config **c, int count, char **argv, error *err) {
    TRY(config_load(c, argv[1], err));
    for (int i = 2; i <= count; i++) TRY(config_override(*c, argv[i], err));
    return 0;
}

static int find_treatments(struct plan *p, const struct optimizer_options *o, error *err) {
    p->treatments = calloc((size_t)p->mc->params.count, sizeof *p->treatments);
    if (!p->treatments) return error_system(err, "out of memory for the list of tensors");
    return groups_treat(p->treatments, &p->mc->params, o, err);
}

static int plan_config(const struct plan_options *o, uint64_t given, config *c, const char *path, error *err) {
    struct run_options *run = calloc(1, sizeof *run);
    struct model_config *mc = NULL;
    if (!run) return error_system(err, "out of memory for the options of a run");
    bool says_device = config_has(c, "train", "device"), says_precision = config_has(c, "train", "precision");
    int result = run_options_bind(run, c, err);
    if (result == 0) result = model_config_bind(&mc, c, data_options_vocab(&run->data), err);
    if (result == 0) result = config_finish(c, err);
    /* What neither the command nor the config says is chosen to go with what they do say. */
    int device = given >> GIVEN_DEVICE & 1 ? o->device : says_device ? run->train.device : DEVICE_AUTO;
    int precision = says_precision ? run->train.precision : PRECISION_AUTO;
    if (given >> GIVEN_PRECISION & 1) precision = o->precision;
    const struct ops *ops = NULL;
    if (result == 0) result = device_choose(&device, &precision, err);
    if (result == 0) result = device_table(&ops, (enum device_kind)device, (enum precision)precision, err);
    struct plan p = {
        .mc = mc,
        .ops = ops,
        .config = path,
        .precision = precision_choices[precision],
        .B = o->batch,
        .T = o->seq ? o->seq : run->data.T,
        .ranks = (int)o->ranks,
        .limit = o->memory > 0 ? o->memory * 0x1p30 : memory_of((enum device_kind)device),
        .tensors = o->tensors,
        .steps = run->train.steps,
        .sequences = result == 0 ? (double)ramp_samples(&run->ramp, run->train.steps) : 0,
        .length = run->data.T,
    };
    int64_t accumulate;
    if (result == 0) result = find_treatments(&p, &run->optimizer, err);
    if (result == 0 && p.B == 0) result = run_options_split(run, p.ranks, &p.B, &accumulate, err);
    if (result == 0) result = work_out(&p, err);
    if (result == 0 && o->json) result = print_json(&p, err);
    if (result == 0 && !o->json) {
        print_model(&p);
        print_memory(&p);
        if (o->tensors) print_tensors(&p);
    }
    free(p.treatments);
    model_config_free(mc);
    free(run);
    return result;
}

int command_plan(int argc, char **argv, error *err) {
    struct plan_options o;
    uint64_t given;
    int count;
    bool helped;
    ASSERT(strcmp(plan_table[GIVEN_PRECISION].key, "precision") == 0);
    TRY(flags_parse(&plan_flags, argc, argv, &o, &count, &given, &helped, err));
    if (helped) return 0;
    config *c = NULL;
    int result = read_config(&c, count, argv, err);
    if (result == 0) result = plan_config(&o, given, c, argv[1], err);
    config_free(c);
    return result;
}
