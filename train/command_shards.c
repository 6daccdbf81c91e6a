/* command_shards.c: `riverrun shards info|verify|cat PATH...`: what is in shards, whether it is sound, and the text
 * they were made from. A PATH is a directory of shards or one shard. Called by main.c. */
#include "train/commands.h"

#include "common/file.h"
#include "common/limits.h"
#include "data/shard.h"
#include "data/tokenize.h"
#include "train/actions.h"
#include "train/flags.h"
#include "train/json_line.h"
#include "train/processors.h"
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const struct option no_options[] = {OPTIONS_END};

/* ---- info -------------------------------------------------------------------------------------------------------- */

struct info_flags {
    bool json;
};

static const struct option info_table[] = {
    {"json", OPTION_BOOL, offsetof(struct info_flags, json), "false", 0, 0, "",
     "One JSON object a shard, each on a line.", NULL},
    OPTIONS_END,
};

static const struct flags info_command = {
    .command = "shards info",
    .arguments = "PATH...",
    .summary = "Prints what shards hold, from their headers: nothing is decompressed.",
    .table = info_table,
    .least = 1,
    .most = -1,
};

static void print_json(const struct shard_info *i) {
    char identity[17];
    struct json_line line;
    snprintf(identity, sizeof identity, "%016" PRIx64, i->tokenizer_identity);
    json_line_begin(&line);
    json_line_string(&line, "path", i->path);
    json_line_int(&line, "version", i->version);
    json_line_int(&line, "tokens", (int64_t)i->tokens);
    json_line_int(&line, "documents", (int64_t)i->documents);
    json_line_int(&line, "frames", (int64_t)i->frames);
    json_line_int(&line, "text_bytes", (int64_t)i->text_bytes);
    json_line_int(&line, "file_bytes", (int64_t)i->file_bytes);
    json_line_int(&line, "token_bytes", i->token_bytes);
    json_line_int(&line, "frame_tokens", i->frame_tokens);
    json_line_bool(&line, "mask", i->has_mask);
    json_line_bool(&line, "planes", i->planes);
    json_line_int(&line, "vocab", (int64_t)i->vocab);
    json_line_int(&line, "eod", i->eod);
    json_line_string(&line, "tokenizer", i->tokenizer_name);
    json_line_string(&line, "tokenizer_identity", identity);
    json_line_string(&line, "separator", i->separator);
    json_line_end(&line);
    fwrite(line.text, 1, line.used, stdout);
}

static void print_row(const char *name, uint64_t tokens, uint64_t documents, uint64_t text, uint64_t file) {
    printf("  %-32s %16" PRIu64 " %12" PRIu64 " %16" PRIu64 " %16" PRIu64 "  %6.2f\n", name, tokens, documents, text,
           file, file ? (double)text / (double)file : 0.0);
}

static void print_table(const char *path, const dataset *d) {
    const struct dataset_info *all = dataset_get_info(d);
    const struct shard_info *first = shard_get_info(dataset_shard(d, 0));
    uint64_t file_bytes = 0;
    printf("%s\n  tokenizer %s (%016" PRIx64 ", %s), %" PRIu64 " ids", path, all->tokenizer_name,
           all->tokenizer_identity, all->tokenizer_path[0] ? all->tokenizer_path : "no tokenizer.json here",
           all->vocab);
    if (all->eod >= 0) printf(", end of document %" PRId64, all->eod);
    printf("\n  %u byte%s a token%s, frames of %u tokens, %s, separator ", first->token_bytes,
           first->token_bytes == 1 ? "" : "s", first->planes ? " in planes" : "", first->frame_tokens,
           all->has_mask ? "with target masks" : "no target masks");
    if (first->separator[0]) {
        printf("'%s'\n", first->separator);
    } else {
        printf("none\n");
    }
    printf("  %-32s %16s %12s %16s %16s  %6s\n", "shard", "tokens", "documents", "text bytes", "file bytes", "ratio");
    for (size_t i = 0; i < all->shards; i++) {
        const struct shard_info *s = shard_get_info(dataset_shard(d, i));
        const char *slash = strrchr(s->path, '/');
        print_row(slash ? slash + 1 : s->path, s->tokens, s->documents, s->text_bytes, s->file_bytes);
        file_bytes += s->file_bytes;
    }
    if (all->shards > 1) print_row("all", all->tokens, all->documents, all->text_bytes, file_bytes);
}

static int info(int argc, char **argv, error *err) {
    struct info_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&info_command, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    for (int i = 1; i <= count; i++) {
        dataset *d;
        TRY(dataset_open(&d, argv[i], err));
        if (f.json) {
            size_t shards = dataset_get_info(d)->shards;
            for (size_t n = 0; n < shards; n++) print_json(shard_get_info(dataset_shard(d, n)));
        } else {
            print_table(argv[i], d);
        }
        dataset_close(d);
    }
    return 0;
}

/* ---- verify ------------------------------------------------------------------------------------------------------ */

struct verify_flags {
    int64_t threads;
};

static const struct option verify_table[] = {
    {"threads", OPTION_INT, offsetof(struct verify_flags, threads), "0", 0, 1024, "threads",
     "Threads that decompress and check; 0 = as many as this process may run on.", NULL},
    OPTIONS_END,
};

static const struct flags verify_command = {
    .command = "shards verify",
    .arguments = "PATH...",
    .summary =
        "Reads shards from the first byte to the last and checks everything that can be checked. Prints a line for\n"
        "each shard, 'ok' or 'bad' and why; ends with exit code 0 only if all are sound and belong together.",
    .table = verify_table,
    .least = 1,
    .most = -1,
};

struct verdict {
    int threads;
    uint64_t good, bad;
    error first; /* of the bad ones */
};

static void note_bad(struct verdict *v, const error *err) {
    printf("bad  %s\n", err->text);
    if (v->bad++ == 0) v->first = *err;
}

/* What the machine fails to read or to print is no verdict on the shard. */
static int verify_shard(struct verdict *v, const char *path, error *err) {
    struct shard_info info;
    if (shard_verify_with(path, v->threads, &info, err) != 0) {
        if (err->kind == ERROR_SYSTEM) return -1;
        note_bad(v, err);
    } else {
        v->good++;
        printf("ok   %s: %" PRIu64 " tokens, %" PRIu64 " documents, %" PRIu64 " frames\n", path, info.tokens,
               info.documents, info.frames);
    }
    if (fflush(stdout) != 0) return error_system(err, "cannot write to standard output: %s", strerror(errno));
    return 0;
}

/* Every shard of a directory for itself, then, if all are sound, all of them as a data set. */
static int verify_path(struct verdict *v, const char *path, error *err) {
    uint64_t bad = v->bad;
    if (file_is_directory(path)) {
        char **names, shard_path[LIMIT_PATH];
        size_t count;
        TRY(file_list(path, SHARD_SUFFIX, &names, &count, err));
        int failed = 0;
        for (size_t i = 0; !failed && i < count; i++) {
            failed = file_join(shard_path, sizeof shard_path, path, names[i], err);
            if (!failed) failed = verify_shard(v, shard_path, err);
        }
        file_list_free(names, count);
        if (failed) return -1;
    } else {
        TRY(verify_shard(v, path, err));
    }
    dataset *d;
    error together;
    if (v->bad == bad) {
        if (dataset_open(&d, path, &together) == 0) {
            dataset_close(d);
        } else if (together.kind == ERROR_SYSTEM) {
            *err = together;
            return -1;
        } else {
            note_bad(v, &together);
        }
    }
    return 0;
}

static int verify(int argc, char **argv, error *err) {
    struct verify_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&verify_command, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    struct verdict v = {.threads = f.threads ? (int)f.threads : processors_available()};
    for (int i = 1; i <= count; i++) TRY(verify_path(&v, argv[i], err));
    if (v.bad == 0) return 0;
    *err = v.first;
    if (v.bad > 1) return error_context(err, "%" PRIu64 " faults, of which the first", v.bad);
    return -1;
}

/* ---- cat --------------------------------------------------------------------------------------------------------- */

static const struct flags cat_command = {
    .command = "shards cat",
    .arguments = "PATH...",
    .summary =
        "Writes the text that shards were made from to standard output, separator lines included: byte for byte\n"
        "what riverrun tokenize read (several inputs come one after the other).",
    .table = no_options,
    .least = 1,
    .most = -1,
};

static int cat_path(const char *path, error *err) {
    dataset *d;
    TRY(dataset_open(&d, path, err));
    const struct dataset_info info = *dataset_get_info(d);
    dataset_close(d);
    tokenizer *t;
    TRY(tokenizer_open(&t, info.tokenizer_path[0] ? info.tokenizer_path : info.tokenizer_name, err));
    int failed = detokenize(t, path, STDOUT_FILENO, err);
    tokenizer_close(t);
    return failed;
}

static int cat(int argc, char **argv, error *err) {
    int count;
    bool helped;
    TRY(flags_parse(&cat_command, argc, argv, NULL, &count, NULL, &helped, err));
    if (helped) return 0;
    for (int i = 1; i <= count; i++) TRY(cat_path(argv[i], err));
    return 0;
}

/* ---- the command ------------------------------------------------------------------------------------------------- */

static const struct action table[] = {
    {"info", info, &info_command}, {"verify", verify, &verify_command}, {"cat", cat, &cat_command}, {0}};

int command_shards(int argc, char **argv, error *err) {
    return actions_run("shards", table, argc, argv, err);
}
