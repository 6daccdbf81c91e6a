/* settings.c: effective configs as lists, and what may change in one when a run goes on. Called by resume.c and
 * report.c. */
#include "train/settings.h"

#include <stdlib.h>
#include <string.h>

/* Cut `text` up in place; with a NULL list only count. The text is config_write's: `[section]`, `key = value`,
 * empty lines. */
static size_t cut(char *text, struct setting *list) {
    size_t count = 0;
    const char *section = "";
    for (char *line = text, *next; *line; line = next) {
        char *end = strchr(line, '\n');
        next = end ? end + 1 : line + strlen(line);
        char *equals = line[0] == '[' ? NULL : memchr(line, '=', (size_t)(next - line));
        if (!list) {
            count += equals != NULL;
            continue;
        }
        if (end) *end = '\0';
        if (line[0] == '[') {
            section = line + 1;
            line[strlen(line) - 1] = '\0';
        } else if (equals) {
            /* "key = value", or "key = " where the value is empty */
            equals[-1] = '\0';
            list[count++] = (struct setting){section, line, equals + (equals[1] == ' ' ? 2 : 1)};
        }
    }
    return count;
}

int settings_of(struct settings *s, const config *c, error *err) {
    *s = (struct settings){.text = config_text(c)};
    if (!s->text) return error_system(err, "no memory for the config");
    s->list = calloc(cut(s->text, NULL) + 1, sizeof *s->list);
    if (!s->list) {
        settings_free(s);
        return error_system(err, "no memory for the config");
    }
    s->count = cut(s->text, s->list);
    return 0;
}

void settings_free(struct settings *s) {
    free(s->text);
    free(s->list);
    *s = (struct settings){0};
}

static const struct setting *find(const struct settings *s, const char *section, const char *key) {
    for (size_t i = 0; i < s->count; i++) {
        if (strcmp(s->list[i].section, section) == 0 && strcmp(s->list[i].key, key) == 0) return &s->list[i];
    }
    return NULL;
}

const char *settings_find(const struct settings *s, const char *section, const char *key) {
    const struct setting *found = find(s, section, key);
    return found ? found->value : NULL;
}

enum setting_change settings_change(const char *section, const char *key) {
    /* A key of NULL stands for all keys of the section. What is not listed is refused. */
    static const struct {
        const char *section, *key;
        enum setting_change change;
    } rules[] = {
        {"train", "out", CHANGE_FREE},    {"train", "micro_batch", CHANGE_FREE}, {"train", "log_every", CHANGE_FREE},
        {"train", "resume", CHANGE_FREE}, {"train", "steps", CHANGE_NOTED},      {"schedule", NULL, CHANGE_NOTED},
        {"eval", NULL, CHANGE_FREE},      {"checkpoint", NULL, CHANGE_FREE},     {"data", "threads", CHANGE_FREE},
        {"data", "ahead", CHANGE_FREE},   {"data", "valid", CHANGE_FREE},        {"data", "train", CHANGE_NOTED},
        {"model", "recompute_span", CHANGE_FREE}, {"comm", NULL, CHANGE_FREE},   {"train", "graph", CHANGE_FREE},
        {"solver", NULL, CHANGE_NOTED},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        if (strcmp(rules[i].section, section) == 0 && (!rules[i].key || strcmp(rules[i].key, key) == 0))
            return rules[i].change;
    }
    if (strncmp(section, "block.", 6) == 0 && strcmp(key, "recompute") == 0) return CHANGE_FREE;
    /* Data sets may be moved; their weights may not change. */
    bool source = strncmp(section, "source.", 7) == 0;
    if (source && strcmp(key, "path") == 0) return CHANGE_NOTED;
    bool task = strncmp(section, "task.", 5) == 0;
    return task && strcmp(key, "valid_samples") == 0 ? CHANGE_FREE : CHANGE_REFUSED;
}

/* A value in a sentence. */
static const char *shown(const char *value) {
    return *value ? value : "(empty)";
}

static int refuse(const struct setting *saved, const struct setting *now, const char *checkpoint, error *err) {
    static const char advice[] = "put it back, or start another run with train.init and another train.out";
    const struct setting *any = saved ? saved : now;
    if (!now) {
        return error_input(err,
                           "%s.%s = %.100s in %.200s is not in this config, and can't change in a run that goes on; %s",
                           any->section, any->key, shown(any->value), checkpoint, advice);
    }
    if (!saved) {
        return error_input(err,
                           "%s.%s = %.100s is not in the config of %.200s, and can't change in a run that goes on; %s",
                           any->section, any->key, shown(any->value), checkpoint, advice);
    }
    return error_input(err,
                       "%s.%s = %.100s differs from the %.100s of %.200s, and can't change in a run that goes on; %s",
                       any->section, any->key, shown(now->value), shown(saved->value), checkpoint, advice);
}

int settings_compare(const struct settings *saved, const struct settings *now, const char *checkpoint,
                     void (*note)(const struct setting *saved, const struct setting *now), error *err) {
    for (size_t i = 0; i < now->count; i++) {
        const struct setting *n = &now->list[i], *s = find(saved, n->section, n->key);
        if (s && strcmp(s->value, n->value) == 0) continue;
        if (settings_change(n->section, n->key) == CHANGE_REFUSED) return refuse(s, n, checkpoint, err);
    }
    for (size_t i = 0; i < saved->count; i++) {
        const struct setting *s = &saved->list[i];
        if (find(now, s->section, s->key) || settings_change(s->section, s->key) != CHANGE_REFUSED) continue;
        return refuse(s, NULL, checkpoint, err);
    }
    for (size_t i = 0; i < now->count && note; i++) {
        const struct setting *n = &now->list[i], *s = find(saved, n->section, n->key);
        if (s && strcmp(s->value, n->value) != 0 && settings_change(n->section, n->key) == CHANGE_NOTED) note(s, n);
    }
    return 0;
}
