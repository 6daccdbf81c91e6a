/* task_recall.c: the tasks that ask for tokens seen earlier: Selective Copying and Induction Heads (arXiv 2312.00752,
 * sections 4.1 and E.1) and multi-query associative recall (arXiv 2312.04927, in the harder form of arXiv 2405.21060).
 * docs/tasks.md defines them token by token. Called through task.c's table of kinds. */
#include "data/task.h"

#include "common/limits.h"
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

static size_t no_scratch(const struct task_options *o) {
    (void)o;
    return 0;
}

/* ---- selective copying ------------------------------------------------------------------------------------------- */

static const struct option copying_options[] = {
    {"length", OPTION_INT, TASK_FIELD(length), "4096", 2, TASK_LENGTH_MAX, "tokens",
     "Inputs of a sample, the markers at its end included.", NULL},
    {"vocab", OPTION_INT, TASK_FIELD(vocab), "16", 3, LIMIT_VOCAB, "ids",
     "Token ids: 0 is noise, the last one the marker, those between are data.", NULL},
    {"tokens", OPTION_INT, TASK_FIELD(tokens), "16", 1, TASK_LENGTH_MAX / 2, "tokens",
     "Data tokens to copy, and markers.", NULL},
    TASK_END,
};

static int check_copying(const struct task_options *o, const char *section, error *err) {
    if (2 * o->tokens <= o->length) return 0;
    return error_input(err,
                       "%s.tokens = %" PRId64 " data tokens and as many markers do not fit in %s.length = %" PRId64
                       "; at most %" PRId64 " do",
                       section, o->tokens, section, o->length, o->length / 2);
}

static int64_t whole_length(const struct task_options *o) { return o->length; }

static void make_copying(const struct task_kind *k, const struct task_options *o, struct task_draws *d, void *scratch,
                         int32_t *tokens, int32_t *targets) {
    (void)k;
    (void)scratch;
    int64_t room = o->length - o->tokens;
    /* Every set of `tokens` positions is equally probable (Floyd's sampling); 1 marks those taken so far. */
    for (int64_t last = room - o->tokens; last < room; last++) {
        int64_t at = (int64_t)task_below(d, (uint64_t)last + 1);
        tokens[tokens[at] ? last : at] = 1;
    }
    int64_t marker = room;
    for (int64_t i = 0; i < room; i++) {
        if (!tokens[i]) continue;
        tokens[i] = 1 + (int32_t)task_below(d, (uint64_t)o->vocab - 2);
        tokens[marker] = (int32_t)o->vocab - 1;
        targets[marker++] = tokens[i];
    }
}

const struct task_kind task_selective_copying = {
    .name = "selective_copying",
    .help = "Data tokens among noise, then as many markers: at the k-th marker the k-th data token is asked for.",
    .options = copying_options,
    .check = check_copying,
    .inputs = whole_length,
    .scratch = no_scratch,
    .make = make_copying,
};

/* ---- induction heads --------------------------------------------------------------------------------------------- */

static const struct option induction_options[] = {
    {"length", OPTION_INT, TASK_FIELD(length), "256", 5, TASK_LENGTH_MAX, "tokens",
     "Tokens of a sample, the answer included: the row needs one input less.", NULL},
    {"vocab", OPTION_INT, TASK_FIELD(vocab), "16", 4, LIMIT_VOCAB, "ids",
     "Token ids: the last but one is the trigger, the last one is never used, the others are ordinary.", NULL},
    TASK_END,
};

static int64_t all_but_answer(const struct task_options *o) { return o->length - 1; }

static void make_induction(const struct task_kind *k, const struct task_options *o, struct task_draws *d,
                           void *scratch, int32_t *tokens, int32_t *targets) {
    (void)k;
    (void)scratch;
    int64_t n = o->length - 2;
    int32_t trigger = (int32_t)o->vocab - 2;
    for (int64_t i = 0; i < n; i++) tokens[i] = (int32_t)task_below(d, (uint64_t)trigger);
    int64_t first = (int64_t)task_below(d, (uint64_t)n - 2);
    tokens[first] = tokens[n] = trigger;
    targets[n] = tokens[first + 1];
}

const struct task_kind task_induction_heads = {
    .name = "induction_heads",
    .help = "Ordinary tokens with one trigger among them, and the trigger again at the end: the token that followed\n"
            "the first one is asked for.",
    .options = induction_options,
    .inputs = all_but_answer,
    .scratch = no_scratch,
    .make = make_induction,
};

/* ---- multi-query associative recall ------------------------------------------------------------------------------ */

static const struct option mqar_options[] = {
    {"length", OPTION_INT, TASK_FIELD(length), "256", 4, TASK_LENGTH_MAX, "tokens", "Inputs of a sample.", NULL},
    {"vocab", OPTION_INT, TASK_FIELD(vocab), "8192", 4, LIMIT_VOCAB, "ids",
     "Token ids: keys are below half of it, values above.", NULL},
    {"pairs", OPTION_INT, TASK_FIELD(pairs), "16", 1, TASK_LENGTH_MAX / 4, "pairs",
     "Keys with their values at the start of a sample; each key is asked for once.", NULL},
    {"power", OPTION_FLOAT, TASK_FIELD(power), "0.01", 1e-6, 100, "",
     "Slot i of the queries is drawn with a weight proportional to (i + 1) to this power less 1: small is early.",
     NULL},
    {"fill", OPTION_BOOL, TASK_FIELD(fill), "true", 0, 0, "",
     "Put random ids where there is no query; false: token 0.", NULL},
    TASK_END,
};

static int check_mqar(const struct task_options *o, const char *section, error *err) {
    int64_t room = o->length / 4, keys = o->vocab / 2 - 1, most = room < keys ? room : keys;
    if (o->pairs <= most) return 0;
    return error_input(err,
                       "%s.pairs = %" PRId64 " is too many: a length of %" PRId64 " has room for %" PRId64
                       " (a quarter), and a vocabulary of %" PRId64 " has %" PRId64 " keys; at most %" PRId64
                       " are possible",
                       section, o->pairs, o->length, room, o->vocab, keys, most);
}

struct slot { /* one place for a query, and when it would be drawn */
    double time;
    int64_t index;
};

static int64_t slots_of(const struct task_options *o) { return (o->length - 2 * o->pairs) / 2; }

static size_t mqar_scratch(const struct task_options *o) {
    size_t ids = (size_t)(o->vocab - o->vocab / 2) * sizeof(int32_t);
    size_t slots = (size_t)slots_of(o) * sizeof(struct slot);
    return ids > slots ? ids : slots;
}

/* `count` different ids of `range` from `first` on, in random order, to every second place of `out`. */
static void draw_ids(struct task_draws *d, int32_t *all, int64_t first, int64_t range, int32_t *out, int64_t count) {
    for (int64_t i = 0; i < range; i++) all[i] = (int32_t)(first + i);
    for (int64_t i = 0; i < count; i++) {
        int64_t other = i + (int64_t)task_below(d, (uint64_t)(range - i));
        int32_t id = all[other];
        all[other] = all[i];
        out[2 * i] = all[i] = id;
    }
}

static int earlier(const void *a, const void *b) {
    const struct slot *x = a, *y = b;
    if (x->time != y->time) return x->time < y->time ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

static void make_mqar(const struct task_kind *k, const struct task_options *o, struct task_draws *d, void *scratch,
                      int32_t *tokens, int32_t *targets) {
    (void)k;
    int64_t half = o->vocab / 2, pairs = o->pairs, count = slots_of(o);
    draw_ids(d, scratch, 1, half - 1, tokens, pairs);
    draw_ids(d, scratch, half, o->vocab - half, tokens + 1, pairs);
    /* Slots drawn one after the other by weight, without replacement, come in the order of independent exponential
     * times whose rates are the weights. */
    struct slot *slots = scratch;
    for (int64_t i = 0; i < count; i++) {
        slots[i] = (struct slot){-log1p(-task_uniform(d)) * pow((double)(i + 1), 1 - o->power), i};
    }
    qsort(slots, (size_t)count, sizeof *slots, earlier);
    for (int64_t j = 0; j < pairs; j++) {
        int64_t at = 2 * pairs + 2 * slots[j].index;
        tokens[at] = tokens[2 * j];
        targets[at] = tokens[2 * j + 1];
    }
    for (int64_t i = 2 * pairs; o->fill && i < o->length; i++) {
        if (targets[i] < 0) tokens[i] = (int32_t)task_below(d, (uint64_t)o->vocab);
    }
}

const struct task_kind task_mqar = {
    .name = "mqar",
    .help = "Multi-query associative recall: pairs of keys and values, then the keys again among random tokens: at\n"
            "each key its value is asked for.",
    .options = mqar_options,
    .check = check_mqar,
    .inputs = whole_length,
    .scratch = mqar_scratch,
    .make = make_mqar,
};
