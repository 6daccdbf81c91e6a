/* command_train.c: `riverrun train CONFIG [section.key=value ...]`, alone or under mpirun. The work is trainer.c's. */
#include "train/commands.h"

#include "train/flags.h"
#include "train/options.h"
#include "train/trainer.h"
#include <stdlib.h>

static const struct option no_options[] = {OPTIONS_END};

static const struct flags flags = {
    .command = "train",
    .arguments = "CONFIG [section.key=value ...]",
    .summary = "Train the model that CONFIG describes, or go on with the run in train.out. What is given as\n"
               "section.key=value wins over the file. Under mpirun every process takes its share of each batch.\n"
               "SIGTERM, SIGINT and SIGUSR1 save after the current step and end the run; the same command goes on\n"
               "from there.",
    .table = no_options,
    .least = 1,
    .most = -1,
};

static void print_help(void) {
    flags_help(stdout, &flags);
    printf("\nThe options of a run; those of the model are in `riverrun help config`.\n\n");
    for (const struct option_section *s = run_sections; s->name; s++) option_help(stdout, s->name, s->table);
}

static int read_config(config **c, int argc, char **argv, error *err) {
    int count;
    bool helped;
    TRY(flags_parse(&flags, argc, argv, NULL, &count, NULL, &helped, err));
    TRY(config_load(c, argv[1], err));
    for (int i = 2; i <= count; i++) TRY(config_override(*c, argv[i], err));
    return 0;
}

static int train(config **c, struct comm *comm, int argc, char **argv, error *err) {
    struct trainer *t;
    TRY(comm_agree(comm, read_config(c, argc, argv, err), err));
    TRY(trainer_open(&t, *c, comm, err));
    int result = trainer_run(t, err);
    if (result != 0 && comm->ranks > 1) {
        /* The others can't know and may wait in a collective call for ever. */
        fprintf(stderr, "riverrun: rank %d: %s\n", comm->rank, err->text);
        comm_abort(comm, error_exit_code(err));
    }
    trainer_close(t);
    return result;
}

int command_train(int argc, char **argv, error *err) {
    for (int i = 1; i < argc; i++) {
        if (flags_is_help(argv[i])) {
            print_help();
            return 0;
        }
    }
    struct comm comm;
    config *c = NULL;
    TRY(comm_open(&comm, err));
    int result = train(&c, &comm, argc, argv, err);
    config_free(c);
    if (result != 0) comm_tell(&comm, err);
    comm_close(&comm);
    return result;
}
