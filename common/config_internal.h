/* config_internal.h: what config_read.c, config.c and option.c share. Nobody else includes it. */
#ifndef RIVERRUN_CONFIG_INTERNAL_H
#define RIVERRUN_CONFIG_INTERNAL_H

#include "common/config.h"
#include <stdbool.h>
#include <stddef.h>

/* Who gave a value; a later one in this list wins over an earlier one. */
enum config_origin { CONFIG_PROGRAM, CONFIG_FILE, CONFIG_COMMAND_LINE };

struct config_entry { /* one given key */
    char *section, *key, *value;
    long line; /* in the file; 0 for the other origins */
    enum config_origin origin;
    bool bound; /* a table has this key */
};

struct config_section { /* in order of first appearance */
    char *name;
    long line;
    bool bound; /* a table was bound to it */
};

struct config_binding { /* one option of a table that was bound: what the effective config consists of */
    char *section;
    const struct option *option;
    char *value; /* in the form config_write prints */
};

struct config {
    char *name; /* of the file, for messages */
    struct config_entry *entries;
    size_t entry_count, entry_capacity;
    struct config_section *sections;
    size_t section_count, section_capacity;
    struct config_binding *bindings;
    size_t binding_count, binding_capacity;
};

/* config_read.c */
struct config_entry *config_find(const config *c, const char *section, const char *key);
struct config_section *config_find_section(const config *c, const char *name);
/* Room for one more element in an array; NULL, and *err filled, when memory is short. */
void *config_grow(void *array, size_t count, size_t *capacity, size_t element, error *err);
/* Where a value comes from, for the front of a message: `a.ini:3: [train] lr = x` or `command line: train.lr=x`. */
enum { CONFIG_PLACE = 400 };
void config_place(const config *c, const struct config_entry *entry, char out[CONFIG_PLACE]);

/* option.c */
enum { OPTION_TEXT = 300 };
/* Parse `text` by `option` into the struct at `out`. On failure -1, with the rest of the sentence ("must be ...") in
 * `problem`. A string is stored as the pointer `text`. */
int option_parse(const struct option *option, const char *text, void *out, char problem[OPTION_TEXT]);
/* "a whole number of steps from 1 to 10": what a valid value is. */
void option_rule(const struct option *option, char out[OPTION_TEXT]);
/* The value in the struct at `in` as config_write prints it; malloc'ed, NULL when memory is short. */
char *option_text(const struct option *option, const void *in);

#endif
