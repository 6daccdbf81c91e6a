/* task_language.c: the formal languages of the xLSTM paper (arXiv 2405.04517, appendix B.1.1), as docs/tasks.md
 * defines them. Called through task.c's table of kinds.
 *
 * A sample is a string of data tokens x and the answer y that belongs to it. The model reads x and then token 0; where
 * it reads the last token of x it has to give the first token of y, and the rest of y at the positions that follow.
 * The number of tokens of x and y together is drawn evenly from the possible ones between min_length and length. */
#include "data/task.h"

#include "common/limits.h"
#include <inttypes.h>
#include <string.h>

struct sentence {
    int32_t *x, *y;   /* room for `length` tokens each */
    int64_t x_count;  /* data tokens */
    int64_t y_count;  /* tokens of the answer */
    uint32_t *counts; /* `vocab` numbers to work with, not set */
};

struct task_language {
    int64_t least, step; /* a sentence has least + n step tokens, x and y together; n = 0, 1, ... */
    /* Make a sentence of `size` tokens; one whose answer may be shorter counts with the longest. */
    void (*make)(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s);
};

/* ---- what the languages share ------------------------------------------------------------------------------------ */

/* The sizes that a language has between min_length and length: `count` from *first on. */
static int64_t sizes_of(const struct task_language *l, const struct task_options *o, int64_t *first) {
    int64_t below = o->min_length > l->least ? (o->min_length - l->least + l->step - 1) / l->step : 0;
    *first = l->least + below * l->step;
    return o->length < *first ? 0 : (o->length - *first) / l->step + 1;
}

static int check_language(const struct task_options *o, const char *section, error *err) {
    const struct task_kind *k = task_kind_at(o->kind);
    const struct task_language *l = k->language;
    int64_t first;
    if (o->min_length > o->length) {
        return error_input(err, "%s.min_length = %" PRId64 " is above %s.length = %" PRId64 "; it may be at most that",
                           section, o->min_length, section, o->length);
    }
    if (sizes_of(l, o, &first) > 0) return 0;
    return error_input(err,
                       "%s: no sample of kind %s has from %" PRId64 " to %" PRId64
                       " tokens; they have %" PRId64 " or a multiple of %" PRId64 " more, such as %" PRId64,
                       section, k->name, o->min_length, o->length, l->least, l->step, first);
}

static int64_t language_inputs(const struct task_options *o) { return o->length - 1; }

static size_t language_scratch(const struct task_options *o) {
    return (size_t)o->length * sizeof(int32_t) + (size_t)o->vocab * sizeof(uint32_t);
}

static void make_language(const struct task_kind *k, const struct task_options *o, struct task_draws *d, void *scratch,
                          int32_t *tokens, int32_t *targets) {
    int32_t *y = scratch;
    struct sentence s = {.x = tokens, .y = y, .counts = (uint32_t *)(y + o->length)};
    int64_t first, count = sizes_of(k->language, o, &first);
    int64_t size = first + k->language->step * (int64_t)task_below(d, (uint64_t)count);
    k->language->make(o, d, size, &s);
    ASSERT(s.x_count >= 1 && s.y_count >= 1 && s.x_count + s.y_count <= size);
    memcpy(targets + s.x_count - 1, y, (size_t)s.y_count * sizeof *y);
}

/* `count` tokens, each evenly from 1 to `most`. */
static void draw_tokens(struct task_draws *d, int32_t *out, int64_t count, int64_t most) {
    for (int64_t i = 0; i < count; i++) out[i] = 1 + (int32_t)task_below(d, (uint64_t)most);
}

/* x of size - 1 tokens from 1 to `most`, and one token to answer. */
static void draw_string(struct task_draws *d, struct sentence *s, int64_t size, int64_t most) {
    s->x_count = size - 1;
    s->y_count = 1;
    draw_tokens(d, s->x, s->x_count, most);
}

/* ---- one token to answer: strings -------------------------------------------------------------------------------- */

static void parity(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t sum = 0;
    draw_string(d, s, size, o->vocab - 1);
    for (int64_t i = 0; i < s->x_count; i++) sum += s->x[i] - 1;
    s->y[0] = 1 + (int32_t)(sum % (o->vocab - 1));
}

static void even_pairs(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    draw_string(d, s, size, o->vocab - 1);
    int32_t first = s->x[0], last = s->x[s->x_count - 1];
    s->y[0] = 1 + (last > first ? last - first : first - last);
}

/* Tokens 1, 2 and 3 stay, go on by one and go back by one; position p is token p + 4. */
static void cycle_navigation(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    static const int move[] = {0, 0, 1, -1};
    int64_t positions = o->vocab - 4, at = 0;
    draw_string(d, s, size, 3);
    for (int64_t i = 0; i < s->x_count; i++) at = (at + move[s->x[i]] + positions) % positions;
    s->y[0] = 4 + (int32_t)at;
}

/* The most frequent token of x and its number; of several the smallest. */
static int32_t most_frequent(const struct task_options *o, const struct sentence *s, uint32_t *times) {
    memset(s->counts, 0, (size_t)o->vocab * sizeof *s->counts);
    for (int64_t i = 0; i < s->x_count; i++) s->counts[s->x[i]]++;
    int32_t best = 1;
    for (int32_t id = 2; id < o->vocab; id++) {
        if (s->counts[id] > s->counts[best]) best = id;
    }
    *times = s->counts[best];
    return best;
}

static void majority(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    uint32_t times;
    draw_string(d, s, size, o->vocab - 1);
    s->y[0] = most_frequent(o, s, &times);
}

static void majority_count(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    uint32_t times;
    draw_string(d, s, size, o->vocab - 1);
    most_frequent(o, s, &times);
    s->y[0] = times < o->vocab ? (int32_t)times : (int32_t)o->vocab - 1;
}

/* ---- one token to answer: arithmetic ----------------------------------------------------------------------------- */

enum { PLUS = 1, MINUS, TIMES, EQUALS, DIGIT, OPEN = 5, CLOSE, DIGIT_IN_BRACKETS };

/* x = digit (operator digit)* "=": the terms are added up from left to right, products being formed first. */
static void modular_arithmetic(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t modulus = o->vocab - DIGIT, sum = 0, term = 1, sign = 1;
    s->x_count = size - 1;
    s->y_count = 1;
    for (int64_t i = 0; i + 1 < s->x_count; i += 2) {
        int64_t digit = (int64_t)task_below(d, (uint64_t)modulus);
        s->x[i] = DIGIT + (int32_t)digit;
        term = term * digit % modulus;
        bool last = i + 2 == s->x_count;
        s->x[i + 1] = last ? EQUALS : PLUS + (int32_t)task_below(d, 3);
        if (s->x[i + 1] == TIMES) continue;
        sum = (sum + sign * term + modulus) % modulus;
        term = 1;
        sign = s->x[i + 1] == MINUS ? -1 : 1;
    }
    s->y[0] = DIGIT + (int32_t)sum;
}

/* Write an expression of `operands` digits, every operation but the outermost in brackets; returns its value. Which
 * operation is done last is drawn evenly. */
static int64_t draw_expression(struct task_draws *d, int64_t modulus, int64_t operands, bool brackets, int32_t **out) {
    if (operands == 1) {
        int64_t digit = (int64_t)task_below(d, (uint64_t)modulus);
        *(*out)++ = DIGIT_IN_BRACKETS + (int32_t)digit;
        return digit;
    }
    int64_t left = 1 + (int64_t)task_below(d, (uint64_t)operands - 1);
    int32_t operation = PLUS + (int32_t)task_below(d, 3);
    if (brackets) *(*out)++ = OPEN;
    int64_t a = draw_expression(d, modulus, left, true, out);
    *(*out)++ = operation;
    int64_t b = draw_expression(d, modulus, operands - left, true, out);
    if (brackets) *(*out)++ = CLOSE;
    int64_t value = operation == PLUS ? a + b : operation == MINUS ? a - b + modulus : a * b;
    return value % modulus;
}

/* n >= 2 digits, n - 1 operations, n - 2 pairs of brackets, "=" and the answer: 4 n - 3 tokens. */
static void modular_arithmetic_brackets(const struct task_options *o, struct task_draws *d, int64_t size,
                                        struct sentence *s) {
    int32_t *out = s->x;
    int64_t value = draw_expression(d, o->vocab - DIGIT_IN_BRACKETS, (size + 3) / 4, false, &out);
    *out++ = EQUALS;
    s->x_count = out - s->x;
    s->y_count = 1;
    s->y[0] = DIGIT_IN_BRACKETS + (int32_t)value;
}

/* ---- a string to answer ------------------------------------------------------------------------------------------ */

static void bucket_sort(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    s->x_count = s->y_count = size / 2;
    draw_tokens(d, s->x, s->x_count, o->vocab - 1);
    memset(s->counts, 0, (size_t)o->vocab * sizeof *s->counts);
    for (int64_t i = 0; i < s->x_count; i++) s->counts[s->x[i]]++;
    int64_t at = 0;
    for (int32_t id = 1; id < o->vocab; id++) {
        for (uint32_t n = 0; n < s->counts[id]; n++) s->y[at++] = id;
    }
}

/* A string twice; one token of the second is hidden by the last id, and asked for. */
static void missing_duplicate(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t n = size / 2;
    s->x_count = 2 * n;
    s->y_count = 1;
    draw_tokens(d, s->x, n, o->vocab - 2);
    memcpy(s->x + n, s->x, (size_t)n * sizeof *s->x);
    int64_t hidden = (int64_t)task_below(d, (uint64_t)n);
    s->y[0] = s->x[hidden];
    s->x[n + hidden] = (int32_t)o->vocab - 1;
}

/* x = a string of (size - 1) / 2 tokens from 1 to vocab - 2, then the last id, which asks for the answer. Returns the
 * string's length. */
static int64_t draw_asked(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t n = (size - 1) / 2;
    draw_tokens(d, s->x, n, o->vocab - 2);
    s->x[n] = (int32_t)o->vocab - 1;
    s->x_count = n + 1;
    s->y_count = n;
    return n;
}

static void repetition(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t n = draw_asked(o, d, size, s);
    memcpy(s->y, s->x, (size_t)n * sizeof *s->y);
}

static void reverse(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t n = draw_asked(o, d, size, s);
    for (int64_t i = 0; i < n; i++) s->y[i] = s->x[n - 1 - i];
}

/* Positions count from 1: the first, third, fifth..., then the second, fourth... */
static void odds_first(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t n = draw_asked(o, d, size, s), at = 0;
    for (int64_t start = 0; start < 2; start++) {
        for (int64_t i = start; i < n; i += 2) s->y[at++] = s->x[i];
    }
}

static void set(const struct task_options *o, struct task_draws *d, int64_t size, struct sentence *s) {
    int64_t n = draw_asked(o, d, size, s);
    memset(s->counts, 0, (size_t)o->vocab * sizeof *s->counts);
    s->y_count = 0;
    for (int64_t i = 0; i < n; i++) {
        if (s->counts[s->x[i]]++ == 0) s->y[s->y_count++] = s->x[i];
    }
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* A kind: its name, the vocabulary that is usual and the smallest, sizes (least + n step), help. */
#define LANGUAGE(NAME, VOCAB, VOCAB_MIN, LEAST, STEP, HELP)                                                            \
    static const struct option NAME##_options[] = {                                                                    \
        {"length", OPTION_INT, TASK_FIELD(length), "40", LEAST, TASK_LENGTH_MAX, "tokens",                             \
         "Most tokens of a sample, the answer included: the row needs one input less.", NULL},                         \
        {"min_length", OPTION_INT, TASK_FIELD(min_length), "3", 1, TASK_LENGTH_MAX, "tokens",                          \
         "Fewest tokens of a sample, the answer included.", NULL},                                                     \
        {"vocab", OPTION_INT, TASK_FIELD(vocab), VOCAB, VOCAB_MIN, LIMIT_VOCAB, "ids", "Token ids; 0 is padding.",     \
         NULL},                                                                                                        \
        TASK_END,                                                                                                      \
    };                                                                                                                 \
    static const struct task_language NAME##_language = {.least = LEAST, .step = STEP, .make = NAME};                  \
    const struct task_kind task_##NAME = {                                                                             \
        .name = #NAME,                                                                                                 \
        .help = HELP,                                                                                                  \
        .options = NAME##_options,                                                                                     \
        .check = check_language,                                                                                       \
        .inputs = language_inputs,                                                                                     \
        .scratch = language_scratch,                                                                                   \
        .make = make_language,                                                                                         \
        .language = &NAME##_language,                                                                                  \
    }

LANGUAGE(parity, "3", 3, 2, 1, "Whether the number of 2s in a string of 1s and 2s is odd; with more tokens, a sum.");
LANGUAGE(even_pairs, "3", 3, 3, 1, "Whether the first and the last token of a string are the same.");
LANGUAGE(cycle_navigation, "9", 6, 2, 1, "Steps forward, backward or none on a circle: the position at the end.");
LANGUAGE(modular_arithmetic, "10", 7, 3, 2, "The value of digits joined by +, - and *, modulo the number of digits.");
LANGUAGE(modular_arithmetic_brackets, "12", 9, 5, 4, "The same, with brackets in place of precedence.");
LANGUAGE(majority, "64", 3, 2, 1, "The most frequent token of a string; of several the smallest.");
LANGUAGE(majority_count, "64", 3, 2, 1, "How often the most frequent token of a string is there.");
LANGUAGE(bucket_sort, "11", 3, 2, 2, "A string's tokens in ascending order.");
LANGUAGE(missing_duplicate, "11", 4, 3, 2, "A string twice, with one token of the second hidden: the hidden token.");
LANGUAGE(repetition, "12", 4, 3, 2, "A string once more.");
LANGUAGE(reverse, "12", 4, 3, 2, "A string from its end to its start.");
LANGUAGE(odds_first, "12", 4, 3, 2, "A string's tokens at odd positions, then those at even ones.");
LANGUAGE(set, "128", 4, 3, 2, "A string's different tokens in the order in which they first come.");
