/* config.c: binds option tables to what config_read.c has read, and prints the effective config. See config.h. */
#include "common/config_internal.h"

#include "common/text.h"
#include <stdlib.h>
#include <string.h>

/* ---- binding ---------------------------------------------------------------------------------------------------- */

static struct config_binding *find_binding(const config *c, const char *section, const char *key) {
    for (size_t i = 0; i < c->binding_count; i++) {
        struct config_binding *b = &c->bindings[i];
        if (strcmp(b->option->key, key) == 0 && strcmp(b->section, section) == 0) return b;
    }
    return NULL;
}

/* Remember an option and its value for config_write and for the nearest names. */
static int remember(config *c, const char *section, const struct option *o, const void *out, error *err) {
    char *value = option_text(o, out);
    if (!value) return error_system(err, "no memory for a config");
    struct config_binding *b = find_binding(c, section, o->key);
    if (b) { /* bound twice: the same entry, so the same value */
        free(b->value);
        b->value = value;
        return 0;
    }
    void *grown = config_grow(c->bindings, c->binding_count, &c->binding_capacity, sizeof *c->bindings, err);
    char *name = grown ? strdup(section) : NULL;
    if (grown) c->bindings = grown;
    if (!name) {
        free(value);
        return error_system(err, "no memory for a config");
    }
    c->bindings[c->binding_count++] = (struct config_binding){.section = name, .option = o, .value = value};
    return 0;
}

static int bind_option(config *c, const char *section, const struct option *o, void *out, error *err) {
    char problem[OPTION_TEXT], place[CONFIG_PLACE];
    struct config_entry *e = config_find(c, section, o->key);
    if (!e && !o->fallback) {
        option_rule(o, problem);
        return error_input(err, "%.200s: [%s] %s is missing, it must be %s", c->name, section, o->key, problem);
    }
    if (option_parse(o, e ? e->value : o->fallback, out, problem) != 0) {
        ASSERT(e); /* a default that breaks its own rule */
        config_place(c, e, place);
        return error_input(err, "%s: %s", place, problem);
    }
    if (e) e->bound = true;
    return remember(c, section, o, out, err);
}

int config_bind(config *c, const char *section, const struct option *table, void *out, error *err) {
    struct config_section *s = config_find_section(c, section);
    if (s) s->bound = true;
    for (const struct option *o = table; o->key; o++) TRY(bind_option(c, section, o, out, err));
    return 0;
}

int config_choose(config *c, const char *section, const char *key, const char *value, error *err) {
    struct config_binding *b = find_binding(c, section, key);
    ASSERT(b);
    char *copy = strdup(value);
    if (!copy) return error_system(err, "no memory for a config");
    free(b->value);
    b->value = copy;
    return 0;
}

size_t config_sections(const config *c, const char *prefix, const char **names, size_t max) {
    size_t count = 0;
    for (size_t i = 0; i < c->section_count; i++) {
        if (strncmp(c->sections[i].name, prefix, strlen(prefix)) != 0) continue;
        if (names && count < max) names[count] = c->sections[i].name;
        count++;
    }
    return count;
}

bool config_has(const config *c, const char *section, const char *key) {
    return config_find(c, section, key) != NULL;
}

/* ---- what nobody bound ------------------------------------------------------------------------------------------ */

/* The bound sections or, with `section` given, the bound keys of that one; NULL-terminated, to be freed. */
static const char **known_names(const config *c, const char *section) {
    const char **names = calloc(c->binding_count + 1, sizeof *names);
    size_t count = 0;
    for (size_t i = 0; names && i < c->binding_count; i++) {
        const struct config_binding *b = &c->bindings[i];
        bool repeated = false;
        for (size_t k = 0; !section && k < count; k++) repeated |= strcmp(names[k], b->section) == 0;
        if (section ? strcmp(b->section, section) == 0 : !repeated)
            names[count++] = section ? b->option->key : b->section;
    }
    return names;
}

/* A hint behind the sentence about an unknown name: the nearest known one, or the list of them. */
static void hint(char *out, size_t size, const char *word, const char *const *names, const char *before,
                 const char *after) {
    const char *nearest = text_nearest(word, names);
    size_t used = 0;
    if (nearest) {
        snprintf(out, size, "; did you mean %s%s%s?", before, nearest, after);
        return;
    }
    used += (size_t)snprintf(out, size, "%s", names[0] ? "; known are " : "");
    for (size_t i = 0; names[i] && used < size; i++) {
        used += (size_t)snprintf(out + used, size - used, "%s%s%s%s", i ? ", " : "", before, names[i], after);
    }
}

static int unknown_section(const config *c, const struct config_section *s, error *err) {
    char more[400] = "";
    const char **names = known_names(c, NULL);
    if (names) hint(more, sizeof more, s->name, names, "[", "]");
    free(names);
    if (s->line == 0) return error_input(err, "command line: there is no section [%s]%s", s->name, more);
    return error_input(err, "%.200s:%ld: there is no section [%s]%s", c->name, s->line, s->name, more);
}

static int unknown_key(const config *c, const struct config_entry *e, error *err) {
    char more[400] = "", place[CONFIG_PLACE];
    const char *elsewhere = NULL;
    for (size_t i = 0; i < c->binding_count && !elsewhere; i++) {
        if (strcmp(c->bindings[i].option->key, e->key) == 0) elsewhere = c->bindings[i].section;
    }
    /* [block.s] may have a key that [block.m], with another mixer, has not: that is no place to move it to. */
    size_t family = strcspn(e->section, ".") + 1;
    if (elsewhere && strncmp(elsewhere, e->section, family) == 0) elsewhere = NULL;
    const char **names = known_names(c, e->section);
    if (elsewhere)
        snprintf(more, sizeof more, "; it belongs to [%s]", elsewhere);
    else if (names)
        hint(more, sizeof more, e->key, names, "", "");
    free(names);
    config_place(c, e, place);
    return error_input(err, "%s: [%s] has no option %s%s", place, e->section, e->key, more);
}

int config_finish(config *c, error *err) {
    /* Sections first: in an unknown section every key is unknown, and the section is what to correct. */
    for (size_t i = 0; i < c->section_count; i++) {
        if (!c->sections[i].bound) return unknown_section(c, &c->sections[i], err);
    }
    for (size_t i = 0; i < c->entry_count; i++) {
        if (!c->entries[i].bound) return unknown_key(c, &c->entries[i], err);
    }
    return 0;
}

/* ---- the effective config --------------------------------------------------------------------------------------- */

static bool section_printed_before(const config *c, size_t binding) {
    for (size_t i = 0; i < binding; i++) {
        if (strcmp(c->bindings[i].section, c->bindings[binding].section) == 0) return true;
    }
    return false;
}

/* A section without options is still part of the config: `[block.m]` alone may say that there is a block m. */
static bool section_has_options(const config *c, const char *name) {
    for (size_t i = 0; i < c->binding_count; i++) {
        if (strcmp(c->bindings[i].section, name) == 0) return true;
    }
    return false;
}

int config_write(const config *c, FILE *out) {
    const char *gap = "";
    for (size_t i = 0; i < c->binding_count; i++) {
        if (section_printed_before(c, i)) continue;
        fprintf(out, "%s[%s]\n", gap, c->bindings[i].section);
        gap = "\n";
        for (size_t k = i; k < c->binding_count; k++) {
            const struct config_binding *b = &c->bindings[k];
            if (strcmp(b->section, c->bindings[i].section) == 0) fprintf(out, "%s = %s\n", b->option->key, b->value);
        }
    }
    for (size_t i = 0; i < c->section_count; i++) {
        if (section_has_options(c, c->sections[i].name)) continue;
        fprintf(out, "%s[%s]\n", gap, c->sections[i].name);
        gap = "\n";
    }
    return ferror(out) ? -1 : 0;
}

char *config_text(const config *c) {
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (!out) return NULL;
    int result = config_write(c, out);
    if (fclose(out) == 0 && result == 0) return text;
    free(text);
    return NULL;
}
