/* fuzz.h: what fuzzers share. */
#ifndef RIVERRUN_FUZZ_H
#define RIVERRUN_FUZZ_H

#include "common/error.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static inline void check(bool holds) {
    if (!holds) abort();
}

/* A refusal is bad input, told in one line. */
static inline void check_refusal(const error *err) {
    check(err->kind == ERROR_INPUT && err->text[0]);
    check(memchr(err->text, 0, sizeof err->text) && !strchr(err->text, '\n'));
}

static char fuzz_made[256] __attribute__((unused)); /* what fuzz_directory has made */

static inline void fuzz_clear(void) {
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", fuzz_made);
    if (system(command) != 0) fprintf(stderr, "%s is left behind\n", fuzz_made);
}

/* A directory of one's own below TMPDIR, called once; it goes when the fuzzer ends of itself. */
static inline void fuzz_directory(char out[256]) {
    const char *parent = getenv("TMPDIR");
    snprintf(out, 256, "%s/riverrun-fuzz.XXXXXX", parent && *parent ? parent : "/tmp");
    check(mkdtemp(out) != NULL);
    memcpy(fuzz_made, out, sizeof fuzz_made);
    atexit(fuzz_clear);
}

static inline void fuzz_write(const char *path, const void *bytes, size_t size) {
    FILE *out = fopen(path, "wb");
    check(out && fwrite(bytes, 1, size, out) == size && fclose(out) == 0);
}

#endif
