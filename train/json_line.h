/* json_line.h: one line of JSON, an object, built without allocating: for the log and for results on standard
 * output. */
#ifndef RIVERRUN_JSON_LINE_H
#define RIVERRUN_JSON_LINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { JSON_LINE = 16 << 10 }; /* bytes: room for a few paths, each of whose bytes may take six */

struct json_line {
    char text[JSON_LINE];
    size_t used;
};

void json_line_begin(struct json_line *l);
/* Keys are plain words. A number that is not finite becomes null; others are written so that reading gives the
 * same double. */
void json_line_real(struct json_line *l, const char *key, double value);
void json_line_int(struct json_line *l, const char *key, int64_t value);
void json_line_bool(struct json_line *l, const char *key, bool value);
/* Escaped as JSON asks; a byte that is not part of UTF-8 becomes U+FFFD. What does not fit is left out whole. */
void json_line_string(struct json_line *l, const char *key, const char *value);
void json_line_end(struct json_line *l); /* closes the object and the line; text[0..used) is it */

#endif
