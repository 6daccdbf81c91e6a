/* fuzz_json_scan.c: any bytes as a JSON line: taken exactly if jansson takes them, with the same string found; never a
 * crash. What jansson limits and json_scan does not (numbers, depth) is told by jansson's reason and passed over. */
#include "data/json_scan.h"

#include <jansson.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition) {
    if (!condition) abort();
}

static bool is_jansson_only(enum json_error_code code) {
    return code == json_error_numeric_overflow || code == json_error_stack_overflow ||
           code == json_error_null_byte_in_key;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *copy = malloc(size + (size == 0)), *found;
    require(copy != NULL);
    memcpy(copy, data, size);
    size_t found_size;
    error err = {0};
    int failed = json_scan_string(copy, size, "meta.text", &found, &found_size, &err);
    require(!failed || (err.kind == ERROR_INPUT && err.text[0]));
    json_error_t problem;
    json_t *tree = json_loadb((const char *)data, size, JSON_ALLOW_NUL, &problem);
    const json_t *text = json_object_get(json_object_get(tree, "meta"), "text");
    if (!failed && (tree || !is_jansson_only(json_error_code(&problem)))) {
        require(json_is_string(text) && json_string_length(text) == found_size);
        require(memcmp(json_string_value(text), found, found_size) == 0);
    }
    /* No JSON has a byte 0 that is not written as an escape. Jansson loses one behind a number or a word. */
    bool has_zero = size > 0 && memchr(data, 0, size);
    require(failed || !has_zero);
    /* Twice the same key, and depth: json_scan is stricter. */
    if (failed && json_is_string(text) && !has_zero)
        require(strstr(err.text, " twice") || strstr(err.text, "within each other"));
    json_decref(tree);
    free(copy);
    return 0;
}
