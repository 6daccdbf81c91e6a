/* input_list.c: checks inputs and walks directories, as input_list.h describes. Called by tokenize. */
#include "data/input_list.h"

#include "common/file.h"
#include "common/limits.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct names {
    char **items;
    size_t count, capacity;
};

static int names_add(struct names *n, const char *name, error *err) {
    if (n->count == n->capacity) {
        size_t larger = n->capacity ? 2 * n->capacity : 64;
        char **grown = realloc(n->items, larger * sizeof *grown);
        if (!grown) return error_system(err, "no memory for a list of %zu inputs", larger);
        n->items = grown;
        n->capacity = larger;
    }
    n->items[n->count] = strdup(name);
    if (!n->items[n->count]) return error_system(err, "no memory for a list of %zu inputs", n->count);
    n->count++;
    return 0;
}

static void names_free(struct names *n) {
    for (size_t i = 0; i < n->count; i++) free(n->items[i]);
    free(n->items);
    *n = (struct names){0};
}

static int compare_paths(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b); /* compares bytes as unsigned */
}

static int check_readable(const char *path, error *err) {
    if (access(path, R_OK) == 0) return 0;
    return error_input(err, "cannot read input %s: %s", path, strerror(errno));
}

/* Put one entry of a directory where it belongs: files into `files`, directories into `pending`. */
static int sort_entry(const char *path, struct names *files, struct names *pending, error *err) {
    struct stat about;
    if (lstat(path, &about) != 0) return error_input(err, "cannot read input %s: %s", path, strerror(errno));
    if (S_ISDIR(about.st_mode)) return names_add(pending, path, err);
    if (S_ISLNK(about.st_mode) && stat(path, &about) != 0) return 0; /* points nowhere: not a file */
    if (!S_ISREG(about.st_mode)) return 0;
    TRY(check_readable(path, err));
    return names_add(files, path, err);
}

/* All files below `root`. Directories that wait to be listed are in `pending`, so depth costs neither stack nor
 * descriptors. */
static int walk(const char *root, struct names *files, struct names *pending, error *err) {
    char path[LIMIT_PATH];
    TRY(names_add(pending, root, err));
    while (pending->count > 0) {
        char *directory = pending->items[--pending->count];
        char **entries;
        size_t count;
        int failed = file_list(directory, "", &entries, &count, err);
        for (size_t i = 0; !failed && i < count; i++) {
            failed = file_join(path, sizeof path, directory, entries[i], err) != 0 ||
                     sort_entry(path, files, pending, err) != 0;
        }
        file_list_free(entries, count);
        free(directory);
        if (failed) return -1;
    }
    return 0;
}

static int add_directory(struct names *files, const char *root, error *err) {
    struct names pending = {0};
    size_t before = files->count;
    int failed = walk(root, files, &pending, err);
    names_free(&pending);
    if (failed) return -1;
    if (files->count == before) return error_input(err, "the input directory %s has no regular file below it", root);
    qsort(files->items + before, files->count - before, sizeof *files->items, compare_paths);
    return 0;
}

static int add_input(struct names *files, const char *input, error *err) {
    if (strcmp(input, INPUT_STANDARD) == 0) {
        for (size_t i = 0; i < files->count; i++) {
            if (strcmp(files->items[i], INPUT_STANDARD) == 0) {
                return error_input(err, "standard input (-) is named twice; it can be read once");
            }
        }
        return names_add(files, input, err);
    }
    struct stat about;
    if (stat(input, &about) != 0) return error_input(err, "cannot read input %s: %s", input, strerror(errno));
    if (S_ISDIR(about.st_mode)) return add_directory(files, input, err);
    TRY(check_readable(input, err));
    return names_add(files, input, err);
}

int input_list_make(struct input_list *list, const char *const *inputs, size_t count, error *err) {
    *list = (struct input_list){0};
    struct names files = {0};
    int failed = count > 0 ? 0 : error_input(err, "no input: name files, directories, or - for standard input");
    for (size_t i = 0; !failed && i < count; i++) failed = add_input(&files, inputs[i], err);
    if (failed) {
        names_free(&files);
        return -1;
    }
    *list = (struct input_list){.paths = files.items, .count = files.count};
    return 0;
}

void input_list_free(struct input_list *list) {
    struct names files = {.items = list->paths, .count = list->count};
    names_free(&files);
    *list = (struct input_list){0};
}
