/* unit.h: what every cmocka program needs: cmocka with the headers it asks for, and a directory of one's own. */
#ifndef RIVERRUN_TEST_UNIT_H
#define RIVERRUN_TEST_UNIT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka last: it takes the types above as given. */
#include <cmocka.h>

#include "common/error.h"
#include "common/file.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Make a directory under TMPDIR (/tmp without it). Removed by unit_directory_remove. */
static inline void unit_directory(char out[256]) {
    const char *parent = getenv("TMPDIR");
    snprintf(out, 256, "%s/unit.XXXXXX", parent && *parent ? parent : "/tmp");
    assert_non_null(mkdtemp(out));
}

static inline void unit_directory_remove(const char *directory) {
    error err = {0};
    assert_int_equal(file_remove_tree(directory, &err), 0);
}

/* "DIRECTORY/NAME"; a result lives until the eighth call after it. */
static inline const char *unit_path(const char *directory, const char *name) {
    static char paths[8][4096];
    static int next;
    char *path = paths[next++ % 8];
    error err;
    assert_int_equal(file_join(path, 4096, directory, name, &err), 0);
    return path;
}

/* The same of a name that is put together. */
static inline __attribute__((format(printf, 2, 3))) const char *unit_format(const char *directory, const char *format,
                                                                            ...) {
    char name[400];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    assert_in_range(length, 0, sizeof name - 1);
    return unit_path(directory, name);
}

/* The call failed for this kind of reason, with exactly this text. */
static inline void unit_expect(int result, const error *err, enum error_kind kind, const char *text) {
    assert_int_equal(result, -1);
    assert_string_equal(err->text, text);
    assert_int_equal(err->kind, kind);
}

#endif
