/* main.c: the program: finds the command, runs it, prints its error, and turns it into an exit code. */
#include "common/text.h"
#include "kernels/device.h"
#include "train/commands.h"
#include "train/flags.h"
#include "train/version.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct command {
    const char *name;
    int (*run)(int argc, char **argv, error *err);
    const char *arguments, *help;
};

static const struct command commands[] = {
    {"train", command_train, "CONFIG [section.key=value ...]",
     "Train a model, or go on with a run; also under mpirun."},
    {"eval", command_eval, "CHECKPOINT --data SHARDS",
     "Loss, perplexity, bits per byte and accuracy, as one JSON line."},
    {"generate", command_generate, "CHECKPOINT --prompt TEXT", "Continue a text."},
    {"tokenize", command_tokenize, "--out DIR INPUT...", "Text to shards of tokens."},
    {"shards", command_shards, "info|verify|cat PATH...", "Look at shards, check them, turn them back into text."},
    {"plan", command_plan, "CONFIG [section.key=value ...]",
     "Parameters, memory and FLOPs of a run, without running it."},
    {"bench", command_bench, "ops|layer|train|gemm|...", "How fast this machine computes, trains and reads."},
    {"import", command_import, "DIRECTORY --out DIR", "A Hugging Face model directory to a checkpoint."},
    {"export", command_export, "CHECKPOINT --out DIR", "A checkpoint to a smaller directory for other software."},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void print_usage(FILE *out) {
    fprintf(out, "riverrun pretrains recurrent language models.\n\n");
    for (int i = 0; i < COMMANDS; i++) {
        char line[100];
        snprintf(line, sizeof line, "%s %s", commands[i].name, commands[i].arguments);
        fprintf(out, "  riverrun %-38s  %s\n", line, commands[i].help);
    }
    fprintf(out, "  riverrun %-38s  %s\n", "help config", "Every key of a config, as a page in Markdown.");
    fprintf(out, "\nriverrun COMMAND --help says more. --version tells what this binary is.\n");
}

static const struct command *find_command(const char *name, error *err) {
    const char *names[COMMANDS + 2];
    for (int i = 0; i < COMMANDS; i++) {
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
        names[i] = commands[i].name;
    }
    names[COMMANDS] = "help";
    names[COMMANDS + 1] = NULL;
    const char *nearest = text_nearest(name, names);
    if (nearest) error_input(err, "'%.100s' is no command; did you mean %s?", name, nearest);
    else error_input(err, "'%.100s' is no command; riverrun --help lists them", name);
    return NULL;
}

/* `riverrun help [config | COMMAND]`. */
static int run_help(int argc, char **argv, error *err) {
    if (argc > 2)
        return error_input(err, "riverrun help takes one word, config or a command, but there are %d", argc - 1);
    if (argc < 2 || strcmp(argv[1], "help") == 0 || flags_is_help(argv[1])) {
        print_usage(stdout);
        return 0;
    }
    if (strcmp(argv[1], "config") == 0) return command_help_config();
    const struct command *c = find_command(argv[1], err);
    if (!c) return -1;
    char help[] = "--help", *words[] = {argv[1], help, NULL};
    return c->run(2, words, err);
}

static int run(int argc, char **argv, error *err) {
    const char *word = argv[1];
    if (flags_is_help(word)) {
        print_usage(stdout);
        return 0;
    }
    if (strcmp(word, "--version") == 0) {
        printf("riverrun %s (%s), %s, with %s\n", version_number(), version_commit(), version_compiler(),
               version_parts());
        return 0;
    }
    if (strcmp(word, "help") == 0) return run_help(argc - 1, argv + 1, err);
    const struct command *c = find_command(word, err);
    return c ? c->run(argc - 1, argv + 1, err) : -1;
}

/* Start again with OpenBLAS told what the processor is, where it has not seen it; a user's own choice is left alone. */
static void choose_blas(char **argv) {
    const char *core = getenv("OPENBLAS_CORETYPE") ? NULL : device_better_blas();
    if (!core || setenv("OPENBLAS_CORETYPE", core, 1) != 0) return;
    execv("/proc/self/exe", argv); /* if that fails, go on slowly */
}

int main(int argc, char **argv) {
    error err = {0};
    choose_blas(argv);
    signal(SIGXFSZ, SIG_IGN); /* a limit on the size of files is told as a write that failed */
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    int result = run(argc, argv, &err);
    errno = 0;
    if (result == 0 && (fflush(stdout) != 0 || ferror(stdout))) {
        /* The reason of an earlier failure is not known any more. */
        result = error_system(&err, "cannot write to standard output: %s", errno ? strerror(errno) : "a write failed");
    }
    if (result == 0) return 0;
    /* A rank whose failure another rank has told already has nothing to say. */
    if (err.text[0]) fprintf(stderr, "riverrun: %s\n", err.text);
    return error_exit_code(&err);
}
