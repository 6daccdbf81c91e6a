/* config.h: configuration files, parsed by one table of options.
 *
 * A config is an .ini file: `[section]` lines, `key = value` lines, comments from `#` or `;` at the start of a line or
 * from " ;" or " #" after a value. Section names may have dots (`[block.m]`). Overrides on the command line are
 * `section.key=value` (the last dot before `=` parts section from key) and win over the file.
 *
 * The table is `struct option[]`: key, type, place in a struct, default, bounds, unit, help. Parsing (config_bind),
 * --help and docs (option_document) and the printed effective config (config_write) all derive from it. Whoever owns a
 * struct owns its table; this file knows no section by name.
 *
 * Refused, each with one sentence naming file and line: a key given twice in a section, a line that is too long
 * (LIMIT_CONFIG_LINE), a key outside a section, a line that is neither section, key nor comment, a value that does not
 * parse or is out of bounds, and, by config_finish, any section or key that nobody bound (with the nearest known name).
 * Built on inih; its line buffer and its silent acceptance of duplicates are covered here.
 */
#ifndef RIVERRUN_CONFIG_H
#define RIVERRUN_CONFIG_H

#include "common/error.h"
#include <stdint.h>
#include <stdio.h>

enum option_type {
    OPTION_INT,    /* int64_t; accepts 1_000_000, and the suffixes k, m, g (powers of 1000) and Ki, Mi, Gi (of 1024) */
    OPTION_FLOAT,  /* double; finite. One whose default is "" may be empty, and is then NAN: not given */
    OPTION_BOOL,   /* bool; true/false, yes/no, on/off, 1/0 */
    OPTION_STRING, /* const char *, owned by the config */
    OPTION_CHOICE, /* int: index into `choices` (NULL-terminated) */
};

struct option {
    const char *key; /* NULL ends the table */
    enum option_type type;
    size_t offset;              /* offsetof in the struct that config_bind fills */
    const char *fallback;       /* default, in the syntax of a value; NULL: the option must be given */
    double min, max;            /* inclusive bounds for INT and FLOAT; both 0: unbounded */
    const char *unit;           /* "tokens", "steps", ""... */
    const char *help;           /* one sentence */
    const char *const *choices; /* for OPTION_CHOICE */
};
/* The end of a table. */
#define OPTIONS_END                                                                                                    \
    { NULL, OPTION_INT, 0, NULL, 0, 0, NULL, NULL, NULL }

typedef struct config config;

/* Read a file. `path` NULL gives an empty config (defaults and overrides only). */
int config_load(config **c, const char *path, error *err);
/* Parse text already in memory; `name` stands for the file in messages. */
int config_parse(config **c, const char *text, size_t size, const char *name, error *err);
int config_override(config *c, const char *assignment, error *err); /* "section.key=value" */
void config_free(config *c);                                        /* NULL is fine */

/* Set, from a program, a value that neither file nor command line gave (what import derives from config.json). */
int config_set(config *c, const char *section, const char *key, const char *value, error *err);

/* Fill the struct at `out` from `section` by `table`; defaults where the config is silent. The same section may be
 * bound by several tables (common block options, then the mixer's). Messages name file, line, section and key. */
int config_bind(config *c, const char *section, const struct option *table, void *out, error *err);

/* Put in the effective config what the program chose for a bound option whose value left it the choice ("auto"). */
int config_choose(config *c, const char *section, const char *key, const char *value, error *err);

/* Names of the sections that start with `prefix` ("block."), in order of first appearance. Returned strings live as
 * long as the config. Returns the count; `names` may be NULL to ask for it. */
size_t config_sections(const config *c, const char *prefix, const char **names, size_t max);
bool config_has(const config *c, const char *section, const char *key);

/* After the last bind: every key must have been bound. */
int config_finish(config *c, error *err);

/* The effective config: every bound option with its value, defaults included, as a file that config_load reads back to
 * the same values. config_text mallocs. */
int config_write(const config *c, FILE *out);
char *config_text(const config *c);

/* One option table as help text for a terminal, or as a Markdown table for docs/. */
void option_help(FILE *out, const char *section, const struct option *table);
void option_document(FILE *out, const char *section, const struct option *table);

#endif
