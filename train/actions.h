/* actions.h: commands that are several: `riverrun shards info`, `riverrun bench ops`. Called by their command_*.c. */
#ifndef RIVERRUN_ACTIONS_H
#define RIVERRUN_ACTIONS_H

#include "train/flags.h"

struct action {
    const char *name;
    int (*run)(int argc, char **argv, error *err); /* argv[0] is the action's name */
    const struct flags *flags;
};

/* Run the action that argv[1] names, or print the help of all of them. `table` ends with name NULL. */
int actions_run(const char *command, const struct action *table, int argc, char **argv, error *err);

#endif
