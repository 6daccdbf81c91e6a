/* flags.c: reads the command line of a command by its option table, as flags.h describes. Called by the
 * command_*.c files. */
#include "train/flags.h"

#include "common/config_internal.h"
#include "common/text.h"
#include <string.h>

enum { FLAGS_MAX = 64 };

/* The option that `name` (size bytes) names, or -1. `no-key` names a yes-or-no option too, and sets *negated. */
static int find_option(const struct option *table, const char *name, size_t size, bool *negated) {
    *negated = false;
    for (int i = 0; table[i].key; i++) {
        if (strlen(table[i].key) == size && memcmp(table[i].key, name, size) == 0) return i;
    }
    if (size > 3 && memcmp(name, "no-", 3) == 0) {
        int i = find_option(table, name + 3, size - 3, negated);
        *negated = true;
        return i >= 0 && table[i].type == OPTION_BOOL ? i : -1;
    }
    return -1;
}

static int unknown_flag(const struct flags *f, const char *given, size_t size, error *err) {
    const char *names[FLAGS_MAX + 2];
    int count = 0;
    while (f->table[count].key) {
        names[count] = f->table[count].key;
        count++;
    }
    names[count] = "help";
    names[count + 1] = NULL;
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)(size < 63 ? size : 63), given);
    const char *nearest = text_nearest(name, names);
    if (nearest) {
        return error_input(err, "'--%s' is no option of riverrun %s; did you mean --%s?", name, f->command, nearest);
    }
    bool overrides = strstr(f->arguments, "section.key=value") != NULL;
    return error_input(err, "'--%s' is no option of riverrun %s; riverrun %s --help lists them%s", name, f->command,
                       f->command, overrides ? ", and what a config holds is given as section.key=value" : "");
}

static int set_value(const struct option *o, const char *value, void *out, error *err) {
    char problem[OPTION_TEXT];
    if (option_parse(o, value, out, problem) == 0) return 0;
    return error_input(err, "--%s %.200s: %s", o->key, value, problem);
}

/* One flag at argv[*at]; moves *at to the last word that belongs to it. */
static int parse_flag(const struct flags *f, int argc, char **argv, int *at, void *out, uint64_t *given, error *err) {
    const char *name = argv[*at] + 2;
    const char *equals = strchr(name, '=');
    size_t size = equals ? (size_t)(equals - name) : strlen(name);
    bool negated;
    int index = find_option(f->table, name, size, &negated);
    if (index < 0) return unknown_flag(f, name, size, err);
    const struct option *o = &f->table[index];
    if (*given >> index & 1) return error_input(err, "--%s is given twice; give it once", o->key);
    *given |= (uint64_t)1 << index;
    if (o->type == OPTION_BOOL) {
        if (equals)
            return error_input(err, "--%.*s takes no value; write --%s or --no-%s", (int)size, name, o->key, o->key);
        return set_value(o, negated ? "false" : "true", out, err);
    }
    if (equals) return set_value(o, equals + 1, out, err);
    if (*at + 1 >= argc || strncmp(argv[*at + 1], "--", 2) == 0) {
        char rule[OPTION_TEXT];
        option_rule(o, rule);
        return error_input(err, "--%s needs a value: %s%s", o->key, rule,
                           *at + 1 < argc ? "; one that starts with dashes is written --key=VALUE" : "");
    }
    *at += 1;
    return set_value(o, argv[*at], out, err);
}

int flags_parse(const struct flags *f, int argc, char **argv, void *out, int *count, uint64_t *given, bool *helped,
                error *err) {
    uint64_t seen = 0;
    bool flags_ended = false;
    *count = 0;
    *helped = false;
    for (int i = 1; i < argc && !*helped; i++) *helped = flags_is_help(argv[i]);
    if (*helped) {
        flags_help(stdout, f);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        if (!flags_ended && strcmp(argv[i], "--") == 0) {
            flags_ended = true;
        } else if (!flags_ended && argv[i][0] == '-' && argv[i][1] == '-') {
            TRY(parse_flag(f, argc, argv, &i, out, &seen, err));
        } else if (!flags_ended && argv[i][0] == '-' && argv[i][1]) {
            return error_input(err,
                               "'%.200s' is no option of riverrun %s; options start with two dashes, --help lists them",
                               argv[i], f->command);
        } else {
            argv[++*count] = argv[i];
        }
    }
    for (int i = 0; f->table[i].key; i++) {
        const struct option *o = &f->table[i];
        if (seen >> i & 1) continue;
        if (!o->fallback) return error_input(err, "riverrun %s needs --%s: %s", f->command, o->key, o->help);
        if (o->type == OPTION_STRING || *o->fallback) TRY(set_value(o, o->fallback, out, err));
    }
    if (*count < f->least || (f->most >= 0 && *count > f->most)) {
        bool beyond = f->most >= 0 && *count > f->most;
        return error_input(err, "riverrun %s takes %s, but %d argument%s given%s%.200s", f->command,
                           *f->arguments ? f->arguments : "no arguments", *count, *count == 1 ? " was" : "s were",
                           beyond ? "; one too many is " : "", beyond ? argv[f->most + 1] : "");
    }
    if (given) *given = seen;
    return 0;
}

bool flags_is_help(const char *word) { return strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0; }

void flags_help(FILE *out, const struct flags *f) {
    fprintf(out, "riverrun %s%s%s%s\n\n%s\n", f->command, *f->arguments ? " " : "", f->arguments,
            f->table[0].key ? " [options]" : "", f->summary);
    if (f->table[0].key) fprintf(out, "\n");
    for (const struct option *o = f->table; o->key; o++) {
        char rule[OPTION_TEXT];
        option_rule(o, rule);
        if (o->type == OPTION_BOOL) {
            fprintf(out, "  --%s, --no-%s\n      %s", o->key, o->key, o->help);
        } else {
            fprintf(out, "  --%s VALUE\n      %s Valid: %s.", o->key, o->help, rule);
        }
        if (!o->fallback) fprintf(out, " Must be given.");
        else if (*o->fallback) fprintf(out, " Default: %s.", o->fallback);
        fprintf(out, "\n");
    }
}
