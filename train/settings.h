/* settings.h: an effective config as a list of (section, key, value), for comparing two of them and for the log. */
#ifndef RIVERRUN_SETTINGS_H
#define RIVERRUN_SETTINGS_H

#include "common/config.h"

struct setting {
    const char *section, *key, *value; /* in settings.text */
};

struct settings {
    char *text; /* config_text's, cut up */
    struct setting *list;
    size_t count;
};

/* Of every option that was bound. */
int settings_of(struct settings *s, const config *c, error *err);
void settings_free(struct settings *s);
const char *settings_find(const struct settings *s, const char *section, const char *key); /* NULL if there is none */

/* What is allowed to differ between a checkpoint's config and the one that goes on from it. */
enum setting_change {
    CHANGE_FREE,    /* where to write, how often, how fast: no word about it */
    CHANGE_NOTED,   /* alters the rest of the run on purpose: allowed, and said on the terminal */
    CHANGE_REFUSED, /* would make it another run */
};
enum setting_change settings_change(const char *section, const char *key);

/* Compare a run's config with that of the checkpoint it goes on from. The first refused difference is ERROR_INPUT
 * naming the key and both values; `note` (may be NULL) is called for each noted one. */
int settings_compare(const struct settings *saved, const struct settings *now, const char *checkpoint,
                     void (*note)(const struct setting *saved, const struct setting *now), error *err);

#endif
