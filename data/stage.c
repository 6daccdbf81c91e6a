/* stage.c: the temporary directory of tokenize and its commit, as stage.h describes. Called by tokenize. */
#include "data/stage.h"

#include "common/file.h"
#include "common/limits.h"
#include "data/shard.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define TOKENIZER_FILE "tokenizer.json"

struct move {
    char *from, *to;
};

struct stage {
    char out[LIMIT_PATH], path[LIMIT_PATH], marker[LIMIT_PATH];
    char prefix[STAGE_PREFIX_MAX + 1];
    const tokenizer *tokenizer;
    int lock;     /* descriptor of `out`, locked */
    bool created; /* `out` was not there before */
    char **old;   /* shards of this prefix in `out` */
    size_t old_count;
    bool write_tokenizer, replace_tokenizer; /* tokenizer.json is missing, or another one's */
    struct move *moves;                      /* those done so far */
    size_t move_count;
};

/* ---- names ------------------------------------------------------------------------------------------------------- */

static int check_prefix(const char *prefix, error *err) {
    size_t length = strlen(prefix);
    if (length >= 1 && length <= STAGE_PREFIX_MAX && !strchr(prefix, '/') && prefix[0] != '.') return 0;
    return error_input(err, "the prefix '%.200s' must have 1 to %d bytes, no '/' and no '.' at its start", prefix,
                       STAGE_PREFIX_MAX);
}

/* PREFIX-NNNNN.rrs */
static bool is_shard_name(const char *name, const char *prefix) {
    size_t length = strlen(prefix);
    if (strncmp(name, prefix, length) != 0 || name[length] != '-') return false;
    const char *digits = name + length + 1;
    return strspn(digits, "0123456789") == 5 && strcmp(digits + 5, SHARD_SUFFIX) == 0;
}

int stage_shard_path(const stage *g, size_t index, char *path, size_t size, error *err) {
    if (index >= STAGE_SHARDS_MAX) {
        return error_input(err, "the output would have more than %d shards: give larger ones (--shard-tokens)",
                           STAGE_SHARDS_MAX);
    }
    char name[STAGE_PREFIX_MAX + 32];
    snprintf(name, sizeof name, "%s-%05zu%s", g->prefix, index, SHARD_SUFFIX);
    return file_join(path, size, g->path, name, err);
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

/* A shard of another prefix that stays in `out` must have been made with the same tokenizer. */
static int check_neighbour(const stage *g, const char *name, error *err) {
    char path[LIMIT_PATH];
    shard *s;
    TRY(file_join(path, sizeof path, g->out, name, err));
    TRY(shard_open(&s, path, err));
    uint64_t identity = shard_get_info(s)->tokenizer_identity;
    shard_close(s);
    if (identity == tokenizer_identity(g->tokenizer)) return 0;
    return error_input(err,
                       "%s was made with another tokenizer (%016" PRIx64 ") than this run's (%016" PRIx64
                       "): write to another directory",
                       path, identity, tokenizer_identity(g->tokenizer));
}

/* What `out` holds already decides whether we may write there. */
static int look_at_shards(stage *g, bool overwrite, error *err) {
    char **names;
    size_t count;
    TRY(file_list(g->out, SHARD_SUFFIX, &names, &count, err));
    int failed = 0;
    if (count > 0 && !overwrite) {
        failed =
            error_input(err,
                        "%s already holds shards (%zu, the first is %s): name another directory, or give --overwrite "
                        "to replace those named %s-*%s",
                        g->out, count, names[0], g->prefix, SHARD_SUFFIX);
    }
    g->old = calloc(count ? count : 1, sizeof *g->old);
    if (!failed && !g->old) failed = error_system(err, "no memory for %zu names", count);
    for (size_t i = 0; !failed && i < count; i++) {
        if (is_shard_name(names[i], g->prefix)) {
            g->old[g->old_count++] = names[i];
            names[i] = NULL; /* now ours */
        } else {
            failed = check_neighbour(g, names[i], err);
        }
    }
    file_list_free(names, count);
    return failed;
}

static int look_at_tokenizer(stage *g, bool overwrite, error *err) {
    char path[LIMIT_PATH];
    uint64_t hash, size;
    TRY(file_join(path, sizeof path, g->out, TOKENIZER_FILE, err));
    g->write_tokenizer = !file_exists(path);
    if (g->write_tokenizer) return 0;
    TRY(file_hash_of(path, &hash, &size, err));
    g->replace_tokenizer = hash != tokenizer_identity(g->tokenizer);
    if (!g->replace_tokenizer || overwrite) return 0;
    return error_input(err, "%s is not this run's tokenizer: name another directory, or give --overwrite to replace it",
                       path);
}

static int lock_directory(stage *g, error *err) {
    g->lock = open(g->out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (g->lock < 0) return error_system(err, "cannot open directory %s: %s", g->out, strerror(errno));
    /* A file system without locks is no reason not to work. */
    if (flock(g->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        close(g->lock);
        g->lock = -1; /* so that nothing there is taken for ours */
        return error_input(err, "another run is writing to %s: wait for it, or name another directory", g->out);
    }
    return 0;
}

static int open_all(stage *g, const char *out, const char *prefix, bool overwrite, error *err) {
    char name[STAGE_PREFIX_MAX + 32];
    TRY(check_prefix(prefix, err));
    if (out[0] == '\0') return error_input(err, "the output directory's name is empty");
    snprintf(name, sizeof name, ".%s.tmp", prefix);
    TRY(file_join(g->path, sizeof g->path, out, name, err));
    strcpy(g->out, out); /* shorter than what just fitted */
    strcpy(g->prefix, prefix);
    snprintf(name, sizeof name, ".%s%s", prefix, DATASET_COMMIT_SUFFIX);
    TRY(file_join(g->marker, sizeof g->marker, out, name, err));
    bool created = !file_exists(out);
    TRY(file_make_directories(out, err));
    TRY(lock_directory(g, err));
    g->created = created; /* from here on the directory is ours to remove */
    TRY(look_at_shards(g, overwrite, err));
    TRY(look_at_tokenizer(g, overwrite, err));
    TRY(file_remove_tree(g->path, err)); /* what a killed run left */
    return file_make_directories(g->path, err);
}

int stage_open(stage **out, const char *directory, const char *prefix, bool overwrite, const tokenizer *t, error *err) {
    *out = NULL;
    stage *g = calloc(1, sizeof *g);
    if (!g) return error_system(err, "no memory to write to %s", directory);
    g->tokenizer = t;
    g->lock = -1;
    if (open_all(g, directory, prefix, overwrite, err) != 0) {
        stage_abandon(g);
        return -1;
    }
    *out = g;
    return 0;
}

/* ---- leaving ----------------------------------------------------------------------------------------------------- */

static bool is_empty(const char *directory) {
    error ignored;
    char **names;
    size_t count;
    if (file_list(directory, "", &names, &count, &ignored) != 0) return false;
    file_list_free(names, count);
    return count == 0;
}

static void stage_free(stage *g) {
    if (g->lock >= 0) close(g->lock); /* which unlocks */
    for (size_t i = 0; i < g->old_count; i++) free(g->old[i]);
    free(g->old);
    for (size_t i = 0; i < g->move_count; i++) {
        free(g->moves[i].from);
        free(g->moves[i].to);
    }
    free(g->moves);
    free(g);
}

void stage_abandon(stage *g) {
    if (!g) return;
    error ignored; /* the caller has the error that matters */
    if (g->lock >= 0) file_remove_tree(g->path, &ignored);
    if (g->created && is_empty(g->out)) file_remove_tree(g->out, &ignored);
    stage_free(g);
}

/* ---- committing -------------------------------------------------------------------------------------------------- */

/* Rename a/name_a to b/name_b and remember it. */
static int move(stage *g, const char *a, const char *name_a, const char *b, const char *name_b, error *err) {
    char from[LIMIT_PATH], to[LIMIT_PATH];
    TRY(file_join(from, sizeof from, a, name_a, err));
    TRY(file_join(to, sizeof to, b, name_b, err));
    struct move *m = &g->moves[g->move_count];
    *m = (struct move){strdup(from), strdup(to)};
    int failed = m->from && m->to ? file_rename(from, to, err) : error_system(err, "no memory to rename %s", from);
    if (failed) {
        free(m->from);
        free(m->to);
        return -1;
    }
    g->move_count++;
    return 0;
}

static int move_all(stage *g, size_t shards, error *err) {
    char name[STAGE_PREFIX_MAX + 32], old[STAGE_PREFIX_MAX + 64];
    for (size_t i = 0; i < g->old_count; i++) {
        snprintf(old, sizeof old, "old-%s", g->old[i]);
        TRY(move(g, g->out, g->old[i], g->path, old, err));
    }
    if (g->replace_tokenizer) TRY(move(g, g->out, TOKENIZER_FILE, g->path, "old-" TOKENIZER_FILE, err));
    for (size_t i = 0; i < shards; i++) {
        snprintf(name, sizeof name, "%s-%05zu%s", g->prefix, i, SHARD_SUFFIX);
        TRY(move(g, g->path, name, g->out, name, err));
    }
    if (g->write_tokenizer || g->replace_tokenizer) TRY(move(g, g->path, TOKENIZER_FILE, g->out, TOKENIZER_FILE, err));
    return file_sync_directory(g->out, err);
}

/* Undo the moves, the last one first. Where that fails too, the marker and the old files stay where they are. */
static int undo(stage *g, error *err) {
    error second;
    for (; g->move_count > 0; g->move_count--) {
        struct move *m = &g->moves[g->move_count - 1];
        if (file_rename(m->to, m->from, &second) != 0) {
            error_context(err, "%s is left incomplete, its former shards are in %s", g->out, g->path);
            return -1;
        }
        free(m->from);
        free(m->to);
    }
    return 0;
}

static int write_tokenizer(const stage *g, error *err) {
    char path[LIMIT_PATH];
    size_t size;
    const char *json = tokenizer_json(g->tokenizer, &size);
    TRY(file_join(path, sizeof path, g->path, TOKENIZER_FILE, err));
    TRY(file_write_all(path, json, size, err));
    return file_sync_directory(g->path, err);
}

/* Set the marker, move, take the marker away: the last step is the one that makes the new state valid. A marker that a
 * killed run left serves as well, and is removed with what it holds. */
static int commit(stage *g, size_t shards, error *err) {
    char temporary[LIMIT_PATH];
    bool stale = file_exists(g->marker);
    strcpy(temporary, g->path);
    if (!stale) {
        TRY(file_rename(g->path, g->marker, err));
        strcpy(g->path, g->marker);
    }
    if (move_all(g, shards, err) == 0) {
        int failed = stale ? file_remove_tree(g->marker, err) : file_rename(g->path, temporary, err);
        if (!failed) {
            strcpy(g->path, temporary);
            return 0;
        }
    }
    return undo(g, err) == 0 ? -1 : -2;
}

int stage_commit(stage *g, size_t shards, error *err) {
    g->moves = calloc(g->old_count + shards + 2, sizeof *g->moves);
    int failed = g->moves ? 0 : error_system(err, "no memory to rename %zu shards", shards);
    if (!failed) failed = write_tokenizer(g, err);
    if (!failed) failed = commit(g, shards, err);
    if (failed == -2) { /* what could not be undone must not be removed */
        stage_free(g);
        return -1;
    }
    if (failed) {
        stage_abandon(g);
        return -1;
    }
    error ignored;
    /* The shards are in place and valid; a leftover of the temporary directory is harmless, the next run removes it. */
    file_sync_directory(g->out, &ignored);
    file_remove_tree(g->path, &ignored);
    stage_free(g);
    return 0;
}
