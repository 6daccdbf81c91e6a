/* json.h: the few things riverrun adds to jansson: reading with a clear sentence, writing durably, typed look-ups. */
#ifndef RIVERRUN_JSON_H
#define RIVERRUN_JSON_H

#include "common/error.h"
#include <jansson.h>
#include <stdint.h>

/* Parse; duplicate keys are refused. `name` stands for the file in messages. The caller json_decref's *out. */
int json_read(json_t **out, const char *path, error *err);
int json_read_text(json_t **out, const char *text, size_t size, const char *name, error *err);
/* The same, but for the bare words Infinity, -Infinity and NaN that Python writes, which become strings. */
int json_read_python(json_t **out, const char *text, size_t size, const char *name, error *err);

/* Typed members of an object. A missing or wrongly typed one is ERROR_INPUT naming `name` and the key; with `fallback`
 * variants a missing one takes the fallback, a wrongly typed one is still an error. A real may be written as an
 * integer. */
int json_get_int(const json_t *object, const char *key, const char *name, int64_t *out, error *err);
int json_get_real(const json_t *object, const char *key, const char *name, double *out, error *err);
int json_get_bool(const json_t *object, const char *key, const char *name, bool *out, error *err);
int json_get_string(const json_t *object, const char *key, const char *name, const char **out, error *err);
int json_get_int_or(const json_t *object, const char *key, const char *name, int64_t fallback, int64_t *out,
                    error *err);
int json_get_real_or(const json_t *object, const char *key, const char *name, double fallback, double *out, error *err);
int json_get_bool_or(const json_t *object, const char *key, const char *name, bool fallback, bool *out, error *err);

/* Building: jansson's own calls, whose results need no look each. A value that lacked memory leaves its place empty,
 * and json_text and json_write, through which all JSON goes out, refuse from then on. */

/* The text of `value` in jansson's flags, or NULL with the reason. The caller frees it. `name` says in messages what it
 * is of. */
char *json_text(const json_t *value, size_t flags, const char *name, error *err);
/* jansson has once lacked memory in this process. */
bool json_exhausted(void);

/* Write `value` (indented, a final newline, keys in insertion order) through common/file.h: created, synced, closed. */
int json_write(const json_t *value, const char *path, error *err);

#endif
