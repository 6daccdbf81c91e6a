/* flags.h: the command line of one command: `--key VALUE` flags by an option table, and positional arguments.
 *
 * A flag is `--key VALUE` or `--key=VALUE`; a yes-or-no option is `--key` or `--no-key`. A value that starts with two
 * dashes has to be written `--key=VALUE`. `--` ends the flags. Types, defaults, bounds and help are those of
 * common/config.h's option tables, so --help derives from the table that parses.
 */
#ifndef RIVERRUN_FLAGS_H
#define RIVERRUN_FLAGS_H

#include "common/config.h"

struct flags {
    const char *command;        /* "eval" */
    const char *arguments;      /* as --help shows them: "CHECKPOINT" */
    const char *summary;        /* what the command does, in whole sentences, lines cut by hand */
    const struct option *table; /* at most 64 options */
    int least, most;            /* number of positional arguments; most < 0: any number */
};

/* Fill the struct at `out` by the table: what is given, else the defaults; a number, choice or yes-or-no whose
 * default is "" is left as it is. The positional arguments are moved to argv[1..], and *count is their number.
 * *given gets bit i if option i was given; NULL if that does not matter. `--help` prints to standard output and
 * sets *helped: then the command has nothing more to do. */
int flags_parse(const struct flags *f, int argc, char **argv, void *out, int *count, uint64_t *given, bool *helped,
                error *err);

bool flags_is_help(const char *word); /* --help or -h */
void flags_help(FILE *out, const struct flags *f);

#endif
