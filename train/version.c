/* version.c: the only file that sees the generated version.h, so that a new commit recompiles nothing else. */
#include "train/version.h"

#include <version.h>

const char *version_number(void) { return "0.1.0"; }
const char *version_commit(void) { return RIVERRUN_COMMIT; }
const char *version_compiler(void) { return RIVERRUN_COMPILER; }
const char *version_parts(void) { return RIVERRUN_PARTS; }
