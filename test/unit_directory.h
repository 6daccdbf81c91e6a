/* unit_directory.h: for programs whose tests each have an empty directory: enter and leave are their setup and
 * teardown. */
#ifndef RIVERRUN_TEST_UNIT_DIRECTORY_H
#define RIVERRUN_TEST_UNIT_DIRECTORY_H

#include "test/unit.h"

static char directory[256];

static inline int enter(void **state) {
    (void)state;
    unit_directory(directory);
    return 0;
}

static inline int leave(void **state) {
    (void)state;
    unit_directory_remove(directory);
    return 0;
}

/* See unit_path. */
static inline const char *in_directory(const char *name) {
    return unit_path(directory, name);
}

#endif
