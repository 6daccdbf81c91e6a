/* command_tokenize.c: `riverrun tokenize`: the command line of data/tokenize.h, its progress, and signals that stop it
 * cleanly. Called by main.c. */
#include "train/commands.h"

#include "common/text.h"
#include "data/shard.h"
#include "data/tokenize.h"
#include "train/flags.h"
#include "train/processors.h"
#include <inttypes.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct tokenize_flags {
    const char *out, *tokenizer, *separator, *jsonl_key, *prefix;
    int64_t shard_tokens, frame_tokens, level, threads;
    bool overwrite;
};

#define FIELD(name) offsetof(struct tokenize_flags, name)
static const struct option tokenize_table[] = {
    {"out", OPTION_STRING, FIELD(out), NULL, 0, 0, "", "Directory for the shards; made if it is not there.", NULL},
    {"tokenizer", OPTION_STRING, FIELD(tokenizer), TOKENIZER_BYTES, 0, 0, "",
     "Tokenizer: bytes; or a tokenizer.json of byte-level BPE, GPT-2's encoder.json, or a directory that holds one.",
     NULL},
    {"separator", OPTION_STRING, FIELD(separator), TOKENIZE_SEPARATOR, 0, 0, "",
     "The line between two documents of an input; --separator= (nothing) makes every input one document.", NULL},
    {"jsonl-key", OPTION_STRING, FIELD(jsonl_key), "", 0, 0, "",
     "Inputs are JSON lines: each line is a document, the string at this key, which may lead into objects: meta.text.",
     NULL},
    {"prefix", OPTION_STRING, FIELD(prefix), "shard", 0, 0, "", "Shards are named PREFIX-00000.rrs and so on.", NULL},
    {"shard-tokens", OPTION_INT, FIELD(shard_tokens), "128Mi", 1, (double)(INT64_C(1) << 40), "tokens",
     "A new shard begins after this many.", NULL},
    {"frame-tokens", OPTION_INT, FIELD(frame_tokens), "4Ki", 1, SHARD_FRAME_TOKENS_MAX, "tokens",
     "Tokens that are compressed together: larger frames are smaller on disk and slower to reach singly.", NULL},
    {"level", OPTION_INT, FIELD(level), "3", 1, 22, "", "Level of zstd compression.", NULL},
    {"threads", OPTION_INT, FIELD(threads), "0", 0, 1024, "threads",
     "Threads that encode, and as many that compress; 0 = as many as this process may run on. The shards do not depend "
     "on it.",
     NULL},
    {"overwrite", OPTION_BOOL, FIELD(overwrite), "false", 0, 0, "",
     "Replace the shards of this prefix that are in the directory.", NULL},
    OPTIONS_END,
};

static const struct flags tokenize_command = {
    .command = "tokenize",
    .arguments = "--out DIR INPUT...",
    .summary =
        "Turns text into shards of tokens. An INPUT is a file, plain or compressed with zstd or gzip, a directory\n"
        "(every file below it), or - for standard input. Each input begins a new document, and so does each\n"
        "separator line within it or, with --jsonl-key, each of its lines. The shards appear in DIR when all of\n"
        "them are complete.",
    .table = tokenize_table,
    .least = 1,
    .most = -1,
};

/* ---- signals ----------------------------------------------------------------------------------------------------- */

/* A signal handler reaches nothing but globals. */
static atomic_bool interrupted;

static void interrupt(int number) {
    (void)number;
    atomic_store(&interrupted, true);
}

/* The first signal asks tokenize to clean up and end; the second one kills, should that take too long. */
static void catch_signals(void) {
    struct sigaction action = {.sa_handler = interrupt, .sa_flags = (int)SA_RESETHAND};
    const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    atomic_store(&interrupted, false);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        struct sigaction before;
        /* What is ignored (nohup) stays ignored. */
        if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN) {
            sigaction(numbers[i], &action, NULL);
        }
    }
}

/* ---- progress ---------------------------------------------------------------------------------------------------- */

struct progress {
    bool terminal;
    double start, last; /* seconds */
};

static void show_progress(void *self, uint64_t bytes, uint64_t tokens, uint64_t documents) {
    struct progress *p = self;
    double now = clock_seconds();
    if (now - p->last < (p->terminal ? 0.2 : 5.0)) return;
    p->last = now;
    char size[24], count[24], rate[24];
    fprintf(stderr, "%s%s of text, %s tokens, %" PRIu64 " documents, %s/s%s", p->terminal ? "\r\033[K" : "",
            text_bytes(size, sizeof size, (double)bytes), text_count(count, sizeof count, (double)tokens), documents,
            text_bytes(rate, sizeof rate, (double)bytes / (now - p->start)), p->terminal ? "" : "\n");
    fflush(stderr);
}

static void show_summary(const struct progress *p, const struct tokenize_result *r, const char *out) {
    char size[24], disk[24], rate[24], time[24];
    double seconds = clock_seconds() - p->start;
    fprintf(stderr,
            "%s%s: %" PRIu64 " token%s, %" PRIu64 " document%s, %" PRIu64
            " shard%s; %s of text in %s on disk; %s, %s/s\n",
            p->terminal ? "\r\033[K" : "", out, r->tokens, r->tokens == 1 ? "" : "s", r->documents,
            r->documents == 1 ? "" : "s", r->shards, r->shards == 1 ? "" : "s",
            text_bytes(size, sizeof size, (double)r->text_bytes), text_bytes(disk, sizeof disk, (double)r->file_bytes),
            text_duration(time, sizeof time, seconds),
            text_bytes(rate, sizeof rate, (double)r->text_bytes / (seconds > 1e-6 ? seconds : 1e-6)));
}

/* ---- the command ------------------------------------------------------------------------------------------------- */

static bool was_given(uint64_t given, const char *key) {
    for (size_t i = 0; tokenize_table[i].key; i++) {
        if (strcmp(tokenize_table[i].key, key) == 0) return given >> i & 1;
    }
    return false;
}

int command_tokenize(int argc, char **argv, error *err) {
    struct tokenize_flags f;
    int count;
    uint64_t given;
    bool helped;
    TRY(flags_parse(&tokenize_command, argc, argv, &f, &count, &given, &helped, err));
    if (helped) return 0;
    bool jsonl = was_given(given, "jsonl-key");
    if (jsonl && was_given(given, "separator")) {
        return error_input(err, "--separator %s does not go with --jsonl-key %s: in JSON lines each line is a document",
                           f.separator, f.jsonl_key);
    }
    tokenizer *t;
    if (tokenizer_open(&t, f.tokenizer, err) != 0) return error_context(err, "--tokenizer");
    struct progress progress = {.terminal = isatty(STDERR_FILENO), .start = clock_seconds(), .last = clock_seconds()};
    struct tokenize_options options = {
        .out = f.out,
        .prefix = f.prefix,
        .separator = f.separator,
        .jsonl_key = jsonl ? f.jsonl_key : NULL,
        .shard_tokens = (uint64_t)f.shard_tokens,
        .frame_tokens = (uint32_t)f.frame_tokens,
        .zstd_level = (int)f.level,
        .threads = f.threads ? (int)f.threads : processors_available(),
        .overwrite = f.overwrite,
        .progress = show_progress,
        .progress_self = &progress,
        .interrupted = &interrupted,
    };
    struct tokenize_result result;
    catch_signals();
    int failed = tokenize(t, (const char *const *)(argv + 1), (size_t)count, &options, &result, err);
    tokenizer_close(t);
    if (failed) {
        if (progress.terminal) fprintf(stderr, "\r\033[K"); /* the error takes the progress line's place */
        return -1;
    }
    show_summary(&progress, &result, f.out);
    return 0;
}
