/* commands.h: the commands of `riverrun NAME ...`, one file each (command_NAME.c). argv[0] is the command's name.
 * Each returns 0, or -1 with *err filled; main.c prints it and exits with error_exit_code. --help prints to
 * stdout, returns 0. */
#ifndef RIVERRUN_COMMANDS_H
#define RIVERRUN_COMMANDS_H

#include "common/error.h"

int command_train(int argc, char **argv, error *err);
int command_eval(int argc, char **argv, error *err);
int command_generate(int argc, char **argv, error *err);
int command_tokenize(int argc, char **argv, error *err);
int command_shards(int argc, char **argv, error *err);
int command_plan(int argc, char **argv, error *err);
int command_bench(int argc, char **argv, error *err);
int command_import(int argc, char **argv, error *err);
int command_export(int argc, char **argv, error *err);

/* `riverrun help config`: docs/config.md to standard output. */
int command_help_config(void);

#endif
