/* fuzz_shard.c: any bytes as a shard: refused with a sentence, or readable to the last token; never a crash. The bytes
 * are tried as they are, and once more with their checksums put right, so that what lies behind these is reached. */
#include "test/support_shard.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition) {
    if (!condition) abort();
}

/* What was refused has a sentence; what was not holds what its header says. */
static void read_everything(const shard *s) {
    const struct shard_info *info = shard_get_info(s);
    const struct shard_document *documents = shard_documents(s);
    for (uint64_t d = 0; d < info->documents; d++) {
        require(documents[d].start < info->tokens && shard_document_from(s, documents[d].start) == d);
    }
    error err = {0};
    shard_cursor *c;
    int32_t ids[300];
    uint8_t mask[300];
    require(shard_cursor_open(&c, &err) == 0);
    for (uint64_t at = 0; at < info->tokens; at += 299) {
        size_t count = info->tokens - at < 300 ? info->tokens - at : 300;
        if (shard_read(s, c, at, count, ids, mask, &err) != 0) {
            require(err.text[0] != 0);
            break;
        }
        for (size_t i = 0; i < count; i++) require(ids[i] >= 0 && (uint64_t)ids[i] < info->vocab && mask[i] <= 1);
    }
    shard_cursor_close(c);
}

static void try_bytes(const uint8_t *data, size_t size) {
    int descriptor = memfd_create("fuzz", MFD_CLOEXEC);
    require(descriptor >= 0 && write(descriptor, data, size) == (ssize_t)size);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    error err = {0};
    shard *s;
    if (shard_open(&s, path, &err) == 0) {
        read_everything(s);
        shard_close(s);
    } else {
        require(err.text[0] && !s);
    }
    err.text[0] = 0;
    require(shard_verify(path, NULL, &err) == 0 || err.text[0]);
    close(descriptor);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    try_bytes(data, size);
    unsigned char *sealed = malloc(size ? size : 1);
    require(sealed != NULL);
    if (size) memcpy(sealed, data, size);
    shard_reseal(sealed, size);
    try_bytes(sealed, size);
    free(sealed);
    return 0;
}
