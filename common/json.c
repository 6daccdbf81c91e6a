/* json.c: jansson with riverrun's messages and durable writing. See json.h. */
#include "common/json.h"

#include "common/file.h"
#include "common/limits.h"
#include "common/text.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* ---- memory ----------------------------------------------------------------------------------------------------- */

/* Objects are built by long rows of jansson's calls, which leave out what they have no memory for. Rather than every
 * row looking at every call, jansson allocates through here, and what was built is looked at once: after memory has
 * failed jansson, no JSON is read or written any more, since nobody can tell what it would lack. */
static atomic_bool exhausted;

static void *allocate(size_t size) {
    void *memory = malloc(size);
    if (!memory) atomic_store(&exhausted, true);
    return memory;
}

__attribute__((constructor)) static void watch_jansson(void) {
    json_set_alloc_funcs(allocate, free);
}

bool json_exhausted(void) {
    return atomic_load(&exhausted);
}

char *json_text(const json_t *value, size_t flags, const char *name, error *err) {
    char *text = json_exhausted() ? NULL : json_dumps(value, flags);
    if (text && !json_exhausted()) return text;
    free(text);
    if (json_exhausted()) error_system(err, "no memory for the JSON of %s", name);
    else error_input(err, "%s can't be written as JSON: a value is not UTF-8, or a number not finite", name);
    return NULL;
}

/* ---- reading ---------------------------------------------------------------------------------------------------- */

int json_read_text(json_t **out, const char *text, size_t size, const char *name, error *err) {
    json_error_t problem;
    *out = json_loadb(text, size, JSON_REJECT_DUPLICATES, &problem);
    /* jansson's reader also goes on without memory, with strings cut short. */
    if (*out && !json_exhausted()) return 0;
    json_decref(*out);
    *out = NULL;
    if (json_exhausted()) return error_system(err, "no memory to read %s", name);
    return error_input(err, "%s:%d: is not valid JSON: %s (column %d)", name, problem.line, problem.text,
                       problem.column);
}

/* A number that JSON does not have, as Python writes it, in quotes: `text` gets them, and room must be there for them.
 */
static void quote_words(const char *text, size_t size, char *out) {
    static const char *const words[] = {"-Infinity", "Infinity", "NaN"};
    bool inside = false; /* a string */
    for (size_t i = 0; i < size;) {
        size_t length = 0;
        for (size_t w = 0; !inside && w < 3 && !length; w++) {
            if (strncmp(text + i, words[w], strlen(words[w])) == 0) length = strlen(words[w]);
        }
        if (length) {
            *out++ = '"';
            memcpy(out, text + i, length);
            out += length;
            *out++ = '"';
            i += length;
            continue;
        }
        if (inside && text[i] == '\\' && i + 1 < size) *out++ = text[i++];
        else if (text[i] == '"') inside = !inside;
        *out++ = text[i++];
    }
    *out = 0;
}

int json_read_python(json_t **out, const char *text, size_t size, const char *name, error *err) {
    *out = NULL;
    char *quoted = malloc(2 * size + 1); /* quotes add 2 bytes to words of at least 3 */
    if (!quoted) return error_system(err, "no memory to read %s", name);
    quote_words(text, size, quoted);
    int result = json_read_text(out, quoted, strlen(quoted), name, err);
    free(quoted);
    return result;
}

int json_read(json_t **out, const char *path, error *err) {
    *out = NULL;
    char *text;
    size_t size;
    TRY(file_read_all(path, LIMIT_JSON_BYTES, &text, &size, err));
    int result = json_read_text(out, text, size, path, err);
    free(text);
    return result;
}

static const char *type_name(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT: return "an object";
    case JSON_ARRAY: return "an array";
    case JSON_STRING: return "a string";
    case JSON_INTEGER: return "an integer";
    case JSON_REAL: return "a real number";
    case JSON_TRUE:
    case JSON_FALSE: return "a boolean";
    case JSON_NULL: return "null";
    }
    return "unknown";
}

static int missing(const char *key, const char *name, const char *wanted, error *err) {
    return error_input(err, "%s: '%s' is missing, it must be %s", name, key, wanted);
}

static int wrong_type(const json_t *value, const char *key, const char *name, const char *wanted, error *err) {
    return error_input(err, "%s: '%s' is %s, it must be %s", name, key, type_name(value), wanted);
}

int json_get_int(const json_t *object, const char *key, const char *name, int64_t *out, error *err) {
    const json_t *value = json_object_get(object, key);
    if (!value) return missing(key, name, "an integer", err);
    if (!json_is_integer(value)) return wrong_type(value, key, name, "an integer", err);
    *out = json_integer_value(value);
    return 0;
}

int json_get_real(const json_t *object, const char *key, const char *name, double *out, error *err) {
    const json_t *value = json_object_get(object, key);
    if (!value) return missing(key, name, "a number", err);
    if (!json_is_number(value)) return wrong_type(value, key, name, "a number", err);
    *out = json_number_value(value);
    return 0;
}

int json_get_bool(const json_t *object, const char *key, const char *name, bool *out, error *err) {
    const json_t *value = json_object_get(object, key);
    if (!value) return missing(key, name, "true or false", err);
    if (!json_is_boolean(value)) return wrong_type(value, key, name, "true or false", err);
    *out = json_is_true(value);
    return 0;
}

int json_get_string(const json_t *object, const char *key, const char *name, const char **out, error *err) {
    const json_t *value = json_object_get(object, key);
    if (!value) return missing(key, name, "a string", err);
    if (!json_is_string(value)) return wrong_type(value, key, name, "a string", err);
    *out = json_string_value(value);
    return 0;
}

int json_get_int_or(const json_t *object, const char *key, const char *name, int64_t fallback, int64_t *out,
                    error *err) {
    *out = fallback;
    return json_object_get(object, key) ? json_get_int(object, key, name, out, err) : 0;
}

int json_get_real_or(const json_t *object, const char *key, const char *name, double fallback, double *out,
                     error *err) {
    *out = fallback;
    return json_object_get(object, key) ? json_get_real(object, key, name, out, err) : 0;
}

int json_get_bool_or(const json_t *object, const char *key, const char *name, bool fallback, bool *out, error *err) {
    *out = fallback;
    return json_object_get(object, key) ? json_get_bool(object, key, name, out, err) : 0;
}

/* The significant digits that the neediest real number in `value` needs to be read back exactly. jansson has one
 * precision for a whole text; this one keeps 0.1 from being written as 0.10000000000000001 where nothing needs that. */
static int digits_needed(const json_t *value) {
    int most = 1;
    if (json_is_real(value)) return text_real_digits(json_real_value(value));
    if (json_is_array(value)) {
        for (size_t i = 0; i < json_array_size(value); i++) {
            int digits = digits_needed(json_array_get(value, i));
            if (digits > most) most = digits;
        }
    }
    if (json_is_object(value)) {
        const char *key;
        json_t *member;
        /* The cast: jansson's iterator takes no const, though it only reads. */
        json_object_foreach((json_t *)value, key, member) {
            int digits = digits_needed(member);
            if (digits > most) most = digits;
        }
    }
    return most;
}

int json_write(const json_t *value, const char *path, error *err) {
    size_t flags = JSON_INDENT(2) | JSON_ENCODE_ANY | JSON_REAL_PRECISION((size_t)digits_needed(value));
    char *text = json_text(value, flags, path, err);
    if (!text) return -1;
    file_writer *w;
    int result = file_create(&w, path, err);
    if (result == 0) {
        if (file_write(w, text, strlen(text), err) != 0 || file_write(w, "\n", 1, err) != 0) {
            file_abandon(w);
            result = -1;
        } else {
            result = file_close_synced(w, err);
        }
    }
    free(text);
    return result;
}
