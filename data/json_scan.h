/* json_scan.h: the string at one place of a JSON text, found in one pass and without a tree. */
#ifndef RIVERRUN_JSON_SCAN_H
#define RIVERRUN_JSON_SCAN_H

#include "common/error.h"
#include <stddef.h>

#define JSON_SCAN_KEY_MAX 255  /* bytes in a key */
#define JSON_SCAN_DEPTH_MAX 512 /* arrays and objects within each other */

/* A key names a member of the outermost object, "text", or through dots a member of an object in it, "meta.text"; a
 * name that itself holds a dot can't be said. A key that is empty, has an empty name or is too long is ERROR_INPUT. */
int json_scan_check_key(const char *key, error *err);

/* `text`: one JSON object with nothing but white space around it. *found gets the string at `key`, *size its bytes,
 * which lie in `text`: that is written to (escapes are decoded in place) and must stay as long as *found is used. All
 * of the text is checked: syntax by RFC 8259, UTF-8, escapes (half a surrogate pair is refused), the key there exactly
 * once and a string. Other keys may come twice. What is wrong is ERROR_INPUT, a sentence without a name in front;
 * columns count bytes from 1. */
int json_scan_string(char *text, size_t text_size, const char *key, char **found, size_t *size, error *err);

#endif
