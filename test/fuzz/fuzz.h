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
    check(err->kind == ERROR_INPUT && err->text[0] && memchr(err->text, 0, sizeof err->text) && !strchr(err->text, '\n'));
}

/* A directory in memory where there is one, which the system clears or whoever runs fuzzers by hand. */
static inline void fuzz_directory(char out[256]) {
    snprintf(out, 256, "%s/riverrun-fuzz.XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    check(mkdtemp(out) != NULL);
}

static inline void fuzz_write(const char *path, const void *bytes, size_t size) {
    FILE *out = fopen(path, "wb");
    check(out && fwrite(bytes, 1, size, out) == size && fclose(out) == 0);
}

#endif
