/* config_read.c: config files and overrides to a list of given keys. config.c looks them up.
 *
 * inih splits sections, keys and values; the reader that feeds it keeps it from being lenient. inih sees a line through
 * a buffer of fixed size (200 bytes in Debian), cuts section names at 49 bytes, takes an indented line for the
 * continuation of the value above, `:` for `=`, and passes duplicates on. So the reader checks each line of the file
 * first, and hands a value over in pieces that fit: the first behind its key, the others as continuation lines. Each
 * piece stands between two '|' so that inih trims nothing off it; the handler takes them away and joins the pieces.
 */
#include "common/config_internal.h"

#include "common/file.h"
#include "common/limits.h"
#include <ini.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct reading {
    config *c;
    const char *text, *end; /* what is left of the file */
    long line;              /* number of the line last taken */
    char key[LIMIT_CONFIG_NAME + 1];
    const char *value; /* of that line: all of it, and the part not yet given to inih */
    size_t value_size;
    const char *rest;
    size_t rest_size;
    bool has_section;
    struct config_entry *entry; /* being filled; NULL until the first piece has come */
    size_t filled;
    error *err;
    bool failed;
};

struct span {
    const char *at;
    size_t size;
};

/* ---- the lists -------------------------------------------------------------------------------------------------- */

void *config_grow(void *array, size_t count, size_t *capacity, size_t element, error *err) {
    if (count < *capacity) return array;
    size_t larger = *capacity ? 2 * *capacity : 32;
    void *grown = realloc(array, larger * element);
    if (!grown) {
        error_system(err, "no memory for a config");
        return NULL;
    }
    *capacity = larger;
    return grown;
}

struct config_entry *config_find(const config *c, const char *section, const char *key) {
    for (size_t i = 0; i < c->entry_count; i++) {
        struct config_entry *e = &c->entries[i];
        if (strcmp(e->key, key) == 0 && strcmp(e->section, section) == 0) return e;
    }
    return NULL;
}

struct config_section *config_find_section(const config *c, const char *name) {
    for (size_t i = 0; i < c->section_count; i++) {
        if (strcmp(c->sections[i].name, name) == 0) return &c->sections[i];
    }
    return NULL;
}

static int add_section(config *c, const char *name, long line, error *err) {
    if (config_find_section(c, name)) return 0;
    void *grown = config_grow(c->sections, c->section_count, &c->section_capacity, sizeof *c->sections, err);
    if (!grown) return -1;
    c->sections = grown;
    char *copy = strdup(name);
    if (!copy) return error_system(err, "no memory for a config");
    c->sections[c->section_count++] = (struct config_section){.name = copy, .line = line};
    return 0;
}

/* A new entry whose value is `value_size` zero bytes and the final 0, for the caller to fill. */
static struct config_entry *add_entry(config *c, const char *section, const char *key, size_t value_size, error *err) {
    void *grown = config_grow(c->entries, c->entry_count, &c->entry_capacity, sizeof *c->entries, err);
    if (!grown) return NULL;
    c->entries = grown;
    struct config_entry *e = &c->entries[c->entry_count];
    *e = (struct config_entry){.section = strdup(section), .key = strdup(key), .value = calloc(1, value_size + 1)};
    if (!e->section || !e->key || !e->value) {
        free(e->section);
        free(e->key);
        free(e->value);
        error_system(err, "no memory for a config");
        return NULL;
    }
    c->entry_count++;
    return e;
}

void config_place(const config *c, const struct config_entry *e, char out[CONFIG_PLACE]) {
    const char *more = strlen(e->value) > 100 ? "..." : "";
    switch (e->origin) {
    case CONFIG_FILE:
        snprintf(out, CONFIG_PLACE, "%.120s:%ld: [%s] %s = %.100s%s", c->name, e->line, e->section, e->key, e->value,
                 more);
        return;
    case CONFIG_COMMAND_LINE:
        snprintf(out, CONFIG_PLACE, "command line: %s.%s=%.100s%s", e->section, e->key, e->value, more);
        return;
    case CONFIG_PROGRAM:
        snprintf(out, CONFIG_PLACE, "%.120s: derived [%s] %s = %.100s%s", c->name, e->section, e->key, e->value, more);
        return;
    }
}

/* ---- what a line may hold --------------------------------------------------------------------------------------- */

static bool is_blank(char c) {
    return c == ' ' || c == '\t' || c == '\r';
}

static struct span trim(struct span s) {
    while (s.size > 0 && is_blank(s.at[0])) s.at++, s.size--;
    while (s.size > 0 && is_blank(s.at[s.size - 1])) s.size--;
    return s;
}

/* A name of a section (where dots are allowed) or of a key. */
static bool is_name(struct span s, bool dots) {
    if (s.size == 0 || s.size > LIMIT_CONFIG_NAME) return false;
    for (size_t i = 0; i < s.size; i++) {
        char c = s.at[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        if (!letter && !(c >= '0' && c <= '9') && c != '_' && c != '-' && !(dots && c == '.')) return false;
    }
    return true;
}

/* Where a comment begins in `s`: at # or ; behind a blank, or at the very start. s.size if there is none. */
static size_t comment_start(struct span s) {
    for (size_t i = 0; i < s.size; i++) {
        if ((s.at[i] == '#' || s.at[i] == ';') && (i == 0 || is_blank(s.at[i - 1]))) return i;
    }
    return s.size;
}

/* The first byte that has no place in plain text, or -1. */
static int control_character(struct span s) {
    for (size_t i = 0; i < s.size; i++) {
        unsigned char c = (unsigned char)s.at[i];
        if ((c < ' ' && c != '\t') || c == 127) return c;
    }
    return -1;
}

static void copy_name(char out[LIMIT_CONFIG_NAME + 1], struct span name) {
    memcpy(out, name.at, name.size);
    out[name.size] = 0;
}

/* ---- the reader that feeds inih --------------------------------------------------------------------------------- */

/* The next line without its end; false at the end of the text. */
static bool take_line(struct reading *r, struct span *line) {
    if (r->text == r->end) return false;
    const char *newline = memchr(r->text, '\n', (size_t)(r->end - r->text));
    const char *stop = newline ? newline : r->end;
    *line = (struct span){r->text, (size_t)(stop - r->text)};
    r->text = newline ? newline + 1 : r->end;
    r->line++;
    return true;
}

static int read_section(struct reading *r, struct span line, char name[LIMIT_CONFIG_NAME + 1]) {
    const char *close = memchr(line.at, ']', line.size);
    if (close) {
        struct span inside = trim((struct span){line.at + 1, (size_t)(close - line.at - 1)});
        struct span behind = trim((struct span){close + 1, (size_t)(line.at + line.size - close - 1)});
        if (is_name(inside, true) && comment_start(behind) == 0) {
            copy_name(name, inside);
            r->has_section = true;
            return add_section(r->c, name, r->line, r->err);
        }
    }
    return error_input(r->err,
                       "%s:%ld: %.*s is not a section: write a name of up to %d letters, digits, '_', '-' and '.' in "
                       "brackets, such as [block.m]",
                       r->c->name, r->line, line.size > 80 ? 80 : (int)line.size, line.at, LIMIT_CONFIG_NAME);
}

static int read_key(struct reading *r, struct span line) {
    const char *name = r->c->name;
    int shown = line.size > 80 ? 80 : (int)line.size;
    const char *equals = memchr(line.at, '=', line.size);
    if (!equals) {
        return error_input(r->err, "%s:%ld: '%.*s' is neither a [section] nor key = value nor a comment", name, r->line,
                           shown, line.at);
    }
    struct span key = trim((struct span){line.at, (size_t)(equals - line.at)});
    if (!is_name(key, false)) {
        return error_input(r->err, "%s:%ld: '%.*s' does not begin with a key: up to %d letters, digits, '_' and '-'",
                           name, r->line, shown, line.at, LIMIT_CONFIG_NAME);
    }
    if (!r->has_section) {
        return error_input(r->err, "%s:%ld: '%.*s' stands before the first [section], it must stand in one", name,
                           r->line, shown, line.at);
    }
    copy_name(r->key, key);
    struct span value = {equals + 1, (size_t)(line.at + line.size - equals - 1)};
    value.size = comment_start(value);
    value = trim(value);
    r->value = r->rest = value.at;
    r->value_size = r->rest_size = value.size;
    r->entry = NULL;
    r->filled = 0;
    return 0;
}

/* Put the next piece of the value behind `front` into inih's buffer. */
static void give_piece(struct reading *r, char *out, size_t room, const char *front) {
    size_t fixed = strlen(front) + 2 + 1 + 1; /* the two '|', the end of the line, the final 0 */
    ASSERT(room > fixed);
    size_t size = r->rest_size < room - fixed ? r->rest_size : room - fixed;
    snprintf(out, room, "%s|%.*s|\n", front, (int)size, r->rest);
    r->rest += size;
    r->rest_size -= size;
}

/* inih's view of the file: called for one line after the other, like fgets. */
static char *read_line(char *out, int room, void *user) {
    struct reading *r = user;
    if (r->failed) return NULL;
    if (r->rest_size > 0) {
        give_piece(r, out, (size_t)room, " ");
        return out;
    }
    struct span line;
    if (!take_line(r, &line)) return NULL;
    if (line.size > LIMIT_CONFIG_LINE) {
        error_input(r->err, "%s:%ld: the line has %zu bytes, at most %d are allowed", r->c->name, r->line, line.size,
                    LIMIT_CONFIG_LINE);
        r->failed = true;
        return NULL;
    }
    line = trim(line);
    int control = control_character(line);
    char front[LIMIT_CONFIG_NAME + 3];
    int result = 0;
    if (control >= 0) {
        result = error_input(r->err, "%s:%ld: the line holds the byte 0x%02x, a config is plain text", r->c->name,
                             r->line, (unsigned)control);
    } else if (comment_start(line) == 0) { /* empty lines, too */
        snprintf(out, (size_t)room, "\n");
    } else if (line.at[0] == '[') {
        result = read_section(r, line, r->key);
        snprintf(out, (size_t)room, "[%s]\n", r->key);
    } else {
        result = read_key(r, line);
        snprintf(front, sizeof front, "%s=", r->key);
        if (result == 0) give_piece(r, out, (size_t)room, front);
    }
    r->failed = result != 0;
    return r->failed ? NULL : out;
}

/* inih's call for each piece of a value. */
static int take_piece(void *user, const char *section, const char *key, const char *piece) {
    struct reading *r = user;
    if (r->failed) return 0;
    if (!r->entry) {
        const struct config_entry *twin = config_find(r->c, section, key);
        if (twin) {
            error_input(r->err, "%s:%ld: [%s] %s is given a second time, the first is in line %ld", r->c->name, r->line,
                        section, key, twin->line);
        } else {
            r->entry = add_entry(r->c, section, key, r->value_size, r->err);
        }
        r->failed = r->entry == NULL;
        if (r->failed) return 0;
        r->entry->origin = CONFIG_FILE;
        r->entry->line = r->line;
    }
    size_t size = strlen(piece);
    ASSERT(size >= 2 && piece[0] == '|' && piece[size - 1] == '|' && r->filled + size - 2 <= r->value_size);
    memcpy(r->entry->value + r->filled, piece + 1, size - 2);
    r->filled += size - 2;
    return 1;
}

/* ---- entry points ----------------------------------------------------------------------------------------------- */

static int config_new(config **c, const char *name, error *err) {
    *c = calloc(1, sizeof **c);
    if (*c) (*c)->name = strdup(name);
    if (*c && (*c)->name) return 0;
    config_free(*c);
    *c = NULL;
    return error_system(err, "no memory for a config");
}

int config_parse(config **c, const char *text, size_t size, const char *name, error *err) {
    TRY(config_new(c, name, err));
    int result = 0;
    if (size > LIMIT_CONFIG_BYTES) {
        result =
            error_input(err, "%s: the config has %zu bytes, at most %d are allowed", name, size, LIMIT_CONFIG_BYTES);
    } else {
        struct reading r = {.c = *c, .text = text, .end = text + size, .err = err};
        if (size >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) r.text += 3; /* the mark some editors put in front */
        int line = ini_parse_stream(read_line, &r, take_piece, &r);
        if (r.failed) {
            result = -1;
        } else if (line != 0) {
            result =
                error_system(err, "%s: inih refused its line %d, it must be built with multi-line values", name, line);
        }
    }
    if (result != 0) {
        config_free(*c);
        *c = NULL;
    }
    return result;
}

int config_load(config **c, const char *path, error *err) {
    *c = NULL;
    if (!path) return config_new(c, "defaults", err);
    char *text;
    size_t size;
    TRY(file_read_all(path, LIMIT_CONFIG_BYTES, &text, &size, err));
    int result = config_parse(c, text, size, path, err);
    free(text);
    return result;
}

void config_free(config *c) {
    if (!c) return;
    for (size_t i = 0; i < c->entry_count; i++) {
        free(c->entries[i].section);
        free(c->entries[i].key);
        free(c->entries[i].value);
    }
    for (size_t i = 0; i < c->section_count; i++) free(c->sections[i].name);
    for (size_t i = 0; i < c->binding_count; i++) {
        free(c->bindings[i].section);
        free(c->bindings[i].value);
    }
    free(c->entries);
    free(c->sections);
    free(c->bindings);
    free(c->name);
    free(c);
}

/* Give a key a value that no line of the file gave. The names are valid. */
static int give(config *c, const char *section, const char *key, struct span value, enum config_origin origin,
                error *err) {
    struct config_entry *e = config_find(c, section, key);
    if (e && e->origin > origin) return 0;
    ASSERT(!e || !e->bound); /* whoever bound it would not see the new value */
    if (value.size + strlen(key) + strlen(" = ") > LIMIT_CONFIG_LINE) {
        return error_input(err, "the value of %s.%s has %zu bytes, a line of a config has at most %d", section, key,
                           value.size, LIMIT_CONFIG_LINE);
    }
    int control = control_character(value);
    if (control >= 0) {
        return error_input(err, "the value of %s.%s holds the byte 0x%02x, a config is plain text", section, key,
                           (unsigned)control);
    }
    if (comment_start(value) < value.size) {
        return error_input(err, "the value of %s.%s holds a # or ; that would begin a comment in a config", section,
                           key);
    }
    char *copy = strndup(value.at, value.size);
    if (!copy) return error_system(err, "no memory for a config");
    if (!e && (add_section(c, section, 0, err) != 0 || !(e = add_entry(c, section, key, 0, err)))) {
        free(copy);
        return -1;
    }
    free(e->value);
    e->value = copy;
    e->origin = origin;
    e->line = 0;
    return 0;
}

int config_override(config *c, const char *assignment, error *err) {
    const char *equals = strchr(assignment, '=');
    const char *dot = equals ? memrchr(assignment, '.', (size_t)(equals - assignment)) : NULL;
    struct span section = {0}, key = {0};
    if (dot) {
        section = (struct span){assignment, (size_t)(dot - assignment)};
        key = (struct span){dot + 1, (size_t)(equals - dot - 1)};
    }
    if (!dot || !is_name(section, true) || !is_name(key, false)) {
        return error_input(err, "'%.200s' is not an override: write section.key=value, such as train.steps=1000",
                           assignment);
    }
    char section_name[LIMIT_CONFIG_NAME + 1], key_name[LIMIT_CONFIG_NAME + 1];
    copy_name(section_name, section);
    copy_name(key_name, key);
    struct span value = trim((struct span){equals + 1, strlen(equals + 1)});
    return give(c, section_name, key_name, value, CONFIG_COMMAND_LINE, err);
}

int config_set(config *c, const char *section, const char *key, const char *value, error *err) {
    ASSERT(is_name((struct span){section, strlen(section)}, true) && is_name((struct span){key, strlen(key)}, false));
    return give(c, section, key, trim((struct span){value, strlen(value)}), CONFIG_PROGRAM, err);
}
