/* config_text.h: what fuzzers of configs share. */
#ifndef RIVERRUN_FUZZ_CONFIG_TEXT_H
#define RIVERRUN_FUZZ_CONFIG_TEXT_H

#include "common/config.h"
#include "test/fuzz/fuzz.h"

/* The input as a config and overrides: the file's text up to the first zero byte, then overrides, each ended by a zero
 * byte. `effective` binds it and gives the effective config, or NULL with its *err filled. A refusal is bad input with
 * a sentence, and what is accepted is printed as a config that reads back to the same print. */
static inline void fuzz_config(const uint8_t *data, size_t size, char *(*effective)(config *c, error *err)) {
    const char *text = (const char *)data, *end = text + size;
    const char *stop = size ? memchr(text, 0, size) : NULL;
    config *c, *again;
    error err = {0};
    if (config_parse(&c, text, stop ? (size_t)(stop - text) : size, "fuzz", &err) != 0) {
        check_refusal(&err);
        return;
    }
    for (const char *at = stop ? stop + 1 : end; at < end; at = stop + 1) {
        stop = memchr(at, 0, (size_t)(end - at));
        if (!stop) break; /* an override that is not ended */
        if (config_override(c, at, &err) != 0) check_refusal(&err);
    }
    char *first = effective(c, &err);
    if (first) {
        check(config_parse(&again, first, strlen(first), "again", &err) == 0);
        char *second = effective(again, &err);
        check(second && strcmp(first, second) == 0);
        free(second);
        config_free(again);
    } else {
        check_refusal(&err);
    }
    free(first);
    config_free(c);
}

#endif
