/* fuzz_input.c: any bytes as an input of tokenize: plain, zstd or gzip, damaged or not. The first byte says how much is
 * read at once and where documents end. Reading gives the same text in pieces of any size, and the documents with their
 * separators are that text. */
#include "data/input_stream.h"
#include "data/shard.h"
#include "data/split.h"
#include "test/fuzz/fuzz.h"
#include <sys/mman.h>

enum { TEXT_MAX = 1 << 22 }; /* a few bytes may stand for gigabytes: what is beyond is not read */

struct text {
    char *bytes;
    size_t size;
    bool cut;
    const char *separator;
    uint64_t begun, ended;
};

static int add(void *self, const char *bytes, size_t size, error *err) {
    struct text *t = self;
    if (t->size + size > TEXT_MAX) {
        t->cut = true;
        return error_system(err, "enough");
    }
    memcpy(t->bytes + t->size, bytes, size);
    t->size += size;
    return 0;
}

static int begin(void *self, uint32_t flags, error *err) {
    struct text *t = self;
    check(t->begun++ == t->ended && (flags == SHARD_DOC_FIRST_OF_INPUT) == (t->begun == 1));
    if (flags == SHARD_DOC_FIRST_OF_INPUT) return 0;
    if (add(t, t->separator, strlen(t->separator), err) != 0) return -1;
    return flags == SHARD_DOC_UNTERMINATED ? 0 : add(t, "\n", 1, err);
}

static int end(void *self, error *err) {
    (void)err;
    struct text *t = self;
    check(++t->ended == t->begun);
    return 0;
}

static int read_all(input_stream *s, size_t piece, struct text *t, error *err) {
    static char buffer[1 << 16];
    for (;;) {
        size_t got;
        TRY(input_read(s, buffer, piece, &got, err));
        check(got <= piece);
        if (got == 0) return 0;
        TRY(add(t, buffer, got, err));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char bytes[2][TEXT_MAX];
    static const char *const separators[] = {"", "<|endoftext|>", "a", "%%"};
    if (size == 0) return 0;
    atomic_bool stop = false;
    char path[64];
    int descriptor = memfd_create("fuzz", MFD_CLOEXEC);
    check(descriptor >= 0 && write(descriptor, data + 1, size - 1) == (ssize_t)(size - 1));
    snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    error err[2] = {0};
    struct text whole = {.bytes = bytes[0]}, split = {.bytes = bytes[1], .separator = separators[data[0] & 3]};
    struct split_sink sink = {begin, add, end, &split};
    input_stream *s;
    check(input_open(&s, path, &stop, &err[0]) == 0);
    int failed = read_all(s, data[0] & 4 ? 1 + (data[0] >> 3) : 1 << 16, &whole, &err[0]);
    input_close(s);
    check(input_open(&s, path, &stop, &err[1]) == 0);
    int failed_too = split_documents(s, split.separator, &sink, &err[1]);
    input_close(s);
    close(descriptor);
    if (whole.cut || split.cut) return 0;
    check(failed == failed_too);
    if (failed) {
        check_refusal(&err[0]);
        check(strcmp(err[0].text, err[1].text) == 0);
    } else {
        check(split.size == whole.size && memcmp(bytes[0], bytes[1], whole.size) == 0);
        check(split.begun == split.ended);
    }
    return 0;
}
