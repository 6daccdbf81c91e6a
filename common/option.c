/* option.c: one option of a table: its value from text and back, and its help. Called by config.c and by main. */
#include "common/config_internal.h"

#include "common/text.h"
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { NUMBER = 40 }; /* bytes for a number as text */

/* Append to a buffer of OPTION_TEXT bytes; what does not fit is left out. */
static void append(char out[OPTION_TEXT], const char *format, ...) __attribute__((format(printf, 2, 3)));
static void append(char out[OPTION_TEXT], const char *format, ...) {
    size_t length = strlen(out);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(out + length, OPTION_TEXT - length, format, arguments);
    va_end(arguments);
}

/* Bounds that bound: both 0 means none, and so does what int64_t or double can't exceed anyway. */
static bool has_min(const struct option *o) {
    return (o->min != 0 || o->max != 0) && o->min > (o->type == OPTION_INT ? -0x1p63 : -HUGE_VAL);
}

static bool has_max(const struct option *o) {
    return (o->min != 0 || o->max != 0) && o->max < (o->type == OPTION_INT ? 0x1p63 : HUGE_VAL);
}

/* A bound as a person writes it: 1048576, not 1.04858e+06. */
static const char *bound_text(char out[NUMBER], double bound) {
    if (bound == floor(bound) && fabs(bound) < 1e15)
        snprintf(out, NUMBER, "%.0f", bound);
    else
        text_real(out, NUMBER, bound);
    return out;
}

/* Whether a number may be left empty. */
static bool may_be_empty(const struct option *o) {
    return o->type == OPTION_FLOAT && o->fallback && !*o->fallback;
}

void option_rule(const struct option *o, char out[OPTION_TEXT]) {
    char low[NUMBER], high[NUMBER];
    out[0] = 0;
    switch (o->type) {
    case OPTION_INT:
    case OPTION_FLOAT:
        append(out, o->type == OPTION_INT ? "a whole number" : "a number");
        if (o->unit && *o->unit) append(out, " of %s", o->unit);
        if (has_min(o) && has_max(o))
            append(out, " from %s to %s", bound_text(low, o->min), bound_text(high, o->max));
        else if (has_min(o))
            append(out, ", at least %s", bound_text(low, o->min));
        else if (has_max(o))
            append(out, ", at most %s", bound_text(high, o->max));
        if (may_be_empty(o)) append(out, ", or empty");
        return;
    case OPTION_BOOL: append(out, "true or false"); return;
    case OPTION_STRING: append(out, "a text"); return;
    case OPTION_CHOICE:
        append(out, o->choices[1] ? "one of " : "");
        for (size_t i = 0; o->choices[i]; i++) append(out, "%s%s", i ? ", " : "", o->choices[i]);
        return;
    }
}

/* ---- text to value ---------------------------------------------------------------------------------------------- */

/* The suffix behind a whole number; 0 if there is no such suffix. */
static int64_t multiplier(const char *suffix) {
    static const struct {
        const char *suffix;
        int64_t factor;
    } known[] = {{"", 1},         {"k", 1000},     {"m", 1000000}, {"g", 1000000000},
                 {"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(suffix, known[i].suffix) == 0) return known[i].factor;
    }
    return 0;
}

/* A whole number, digits grouped by single underscores, with a suffix. False if `text` is none or above int64_t. */
static bool parse_int(const char *text, int64_t *out) {
    bool negative = *text == '-';
    if (*text == '-' || *text == '+') text++;
    int64_t value = 0;
    if (!isdigit((unsigned char)*text)) return false;
    for (; isdigit((unsigned char)*text) || (*text == '_' && isdigit((unsigned char)text[1])); text++) {
        if (*text == '_') continue;
        int digit = *text - '0';
        /* Built up on the negative side, which has room for one more value than the positive. */
        if (__builtin_mul_overflow(value, 10, &value) || __builtin_sub_overflow(value, digit, &value)) return false;
    }
    int64_t factor = multiplier(text);
    if (factor == 0 || __builtin_mul_overflow(value, factor, &value)) return false;
    return negative ? (*out = value, true) : !__builtin_sub_overflow((int64_t)0, value, out);
}

static bool parse_float(const char *text, double *out) {
    /* strtod knows more than numbers people mean: hexadecimal, infinity, nan. */
    if (!*text || strspn(text, "0123456789+-.eE") != strlen(text)) return false;
    char *end;
    *out = strtod(text, &end);
    return *end == 0 && isfinite(*out);
}

static bool parse_bool(const char *text, bool *out) {
    static const char *const yes[] = {"true", "yes", "on", "1"}, *const no[] = {"false", "no", "off", "0"};
    for (size_t i = 0; i < sizeof yes / sizeof *yes; i++) {
        *out = strcmp(text, yes[i]) == 0;
        if (*out || strcmp(text, no[i]) == 0) return true;
    }
    return false;
}

static int refuse(const struct option *o, char problem[OPTION_TEXT]) {
    char rule[OPTION_TEXT];
    option_rule(o, rule);
    snprintf(problem, OPTION_TEXT, "must be %s", rule);
    return -1;
}

static int parse_choice(const struct option *o, const char *text, int *out, char problem[OPTION_TEXT]) {
    for (int i = 0; o->choices[i]; i++) {
        if (strcmp(text, o->choices[i]) == 0) {
            *out = i;
            return 0;
        }
    }
    refuse(o, problem);
    const char *nearest = text_nearest(text, o->choices);
    if (nearest) append(problem, "; did you mean %s?", nearest);
    return -1;
}

/* Refuse a number outside its bounds, naming the nearest one inside. */
static int check_bounds(const struct option *o, double value, char problem[OPTION_TEXT]) {
    char nearest[NUMBER];
    bool low = has_min(o) && value < o->min, high = has_max(o) && value > o->max;
    if (!low && !high) return 0;
    double bound = low ? o->min : o->max;
    if (o->type == OPTION_INT) bound = low ? ceil(bound) : floor(bound);
    refuse(o, problem);
    append(problem, "; the nearest is %s", bound_text(nearest, bound));
    return -1;
}

int option_parse(const struct option *o, const char *text, void *out, char problem[OPTION_TEXT]) {
    void *field = (char *)out + o->offset;
    switch (o->type) {
    case OPTION_INT: {
        int64_t value;
        if (!parse_int(text, &value)) {
            refuse(o, problem);
            append(problem, "; 64000 may be written 64_000 or 64k, and 64Ki is 65536");
            return -1;
        }
        *(int64_t *)field = value;
        return check_bounds(o, (double)value, problem);
    }
    case OPTION_FLOAT: {
        double value;
        if (!*text && may_be_empty(o)) {
            *(double *)field = NAN;
            return 0;
        }
        if (!parse_float(text, &value)) {
            refuse(o, problem);
            append(problem, ", such as 0.1 or 3e-4");
            return -1;
        }
        *(double *)field = value;
        return check_bounds(o, value, problem);
    }
    case OPTION_BOOL: return parse_bool(text, field) ? 0 : refuse(o, problem);
    case OPTION_STRING: *(const char **)field = text; return 0;
    case OPTION_CHOICE: return parse_choice(o, text, field, problem);
    }
    return refuse(o, problem);
}

/* ---- value to text ---------------------------------------------------------------------------------------------- */

char *option_text(const struct option *o, const void *in) {
    const void *field = (const char *)in + o->offset;
    char number[NUMBER];
    switch (o->type) {
    case OPTION_INT: snprintf(number, sizeof number, "%lld", (long long)*(const int64_t *)field); return strdup(number);
    case OPTION_FLOAT:
        if (isnan(*(const double *)field)) return strdup("");
        return strdup(text_real(number, sizeof number, *(const double *)field));
    case OPTION_BOOL: return strdup(*(const bool *)field ? "true" : "false");
    case OPTION_STRING: return strdup(*(const char *const *)field);
    case OPTION_CHOICE: return strdup(o->choices[*(const int *)field]);
    }
    return NULL;
}

void option_help(FILE *out, const char *section, const struct option *table) {
    char rule[OPTION_TEXT];
    fprintf(out, "[%s]\n", section);
    for (const struct option *o = table; o->key; o++) {
        option_rule(o, rule);
        if (o->fallback)
            fprintf(out, "  %s = %s\n", o->key, o->fallback);
        else
            fprintf(out, "  %s (must be given)\n", o->key);
        fprintf(out, "      %s Valid: %s.\n", o->help, rule);
    }
}

/* A cell of a Markdown table: a bar would end it. */
static void print_cell(FILE *out, const char *text) {
    for (; *text; text++) fprintf(out, *text == '|' ? "\\%c" : "%c", *text);
}

void option_document(FILE *out, const char *section, const struct option *table) {
    char rule[OPTION_TEXT];
    fprintf(out, "| `[%s]` | default | valid | meaning |\n|---|---|---|---|\n", section);
    for (const struct option *o = table; o->key; o++) {
        option_rule(o, rule);
        fprintf(out, "| `%s` | ", o->key);
        if (o->fallback && *o->fallback)
            fprintf(out, "`%s`", o->fallback);
        else
            fprintf(out, o->fallback ? "empty" : "must be given");
        fprintf(out, " | ");
        print_cell(out, rule);
        fprintf(out, " | ");
        print_cell(out, o->help);
        fprintf(out, " |\n");
    }
}
