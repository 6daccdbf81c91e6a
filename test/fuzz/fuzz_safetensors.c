/* fuzz_safetensors.c: any bytes as a safetensors file: refused or readable to the last element, never a crash. */
#include "common/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_everything(const safetensors *s) {
    float values[64];
    double doubles[64];
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct safetensors_entry *e = safetensors_at(s, i);
        if (safetensors_find(s, e->name) != e) abort();
        for (uint64_t at = 0; at < e->count; at += 64) {
            uint64_t part = e->count - at < 64 ? e->count - at : 64;
            safetensors_to_f32(e, at, part, values);
            safetensors_to_f64(e, at, part, doubles);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    safetensors *s;
    error err = {0};
    if (safetensors_open(&s, path, &err) == 0) {
        read_everything(s);
        safetensors_metadata(s, "format");
        safetensors_close(s);
    } else if (!err.text[0] || s) {
        abort();
    }
    close(fd);
    return 0;
}
