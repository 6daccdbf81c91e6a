/* support_text.c: see support_text.h. The expected documents are found here in memory, line by line, without any of the
 * code under test. */
#include "test/support_text.h"

#include "test/unit.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

void text_add(struct text *t, const char *bytes, size_t size) {
    if (t->size + size >= t->capacity) {
        t->capacity = 2 * (t->size + size) + 64;
        t->bytes = realloc(t->bytes, t->capacity);
        assert_non_null(t->bytes);
    }
    memcpy(t->bytes + t->size, bytes, size);
    t->size += size;
    t->bytes[t->size] = 0;
}

void text_free(struct text *t) {
    free(t->bytes);
    *t = (struct text){0};
}

static void begin(struct text_documents *d, uint32_t flags) {
    if (d->count == d->capacity) {
        d->capacity = d->capacity ? 2 * d->capacity : 16;
        d->list = realloc(d->list, d->capacity * sizeof *d->list);
        assert_non_null(d->list);
    }
    d->list[d->count++] = (struct text_document){.flags = flags, .start = d->all.size};
}

static void add(struct text_documents *d, const char *bytes, size_t size) {
    text_add(&d->all, bytes, size);
    d->list[d->count - 1].size += size;
}

void text_documents_free(struct text_documents *d) {
    text_free(&d->all);
    free(d->list);
    *d = (struct text_documents){0};
}

void text_documents_split(struct text_documents *d, const char *bytes, size_t size, const char *separator) {
    size_t length = strlen(separator);
    begin(d, SHARD_DOC_FIRST_OF_INPUT);
    for (size_t at = 0; at < size;) {
        const char *newline = memchr(bytes + at, '\n', size - at);
        size_t line = newline ? (size_t)(newline - bytes) - at : size - at;
        if (length > 0 && line == length && memcmp(bytes + at, separator, length) == 0) {
            begin(d, newline ? SHARD_DOC_SEPARATED : SHARD_DOC_UNTERMINATED);
        } else {
            add(d, bytes + at, line + (newline != NULL));
        }
        at += line + (newline != NULL);
    }
}

static void read_shard(struct text_documents *d, const shard *s, shard_cursor *c) {
    error err;
    const struct shard_info *info = shard_get_info(s);
    uint64_t document = 0, text_bytes = 0;
    int32_t *ids = malloc(info->tokens * sizeof *ids + 1);
    assert_non_null(ids);
    assert_int_equal(shard_read(s, c, 0, info->tokens, ids, NULL, &err), 0);
    for (uint64_t i = 0; i < info->tokens; i++) {
        if (document < info->documents && shard_documents(s)[document].start == i) {
            begin(d, shard_documents(s)[document].flags);
            document++;
        }
        char byte = (char)ids[i];
        if (ids[i] < 256) add(d, &byte, 1);
        text_bytes += ids[i] < 256;
        /* Documents end, and only documents end, with 256. */
        bool last = document < info->documents ? shard_documents(s)[document].start == i + 1 : false;
        if (i + 1 < info->tokens) assert_int_equal(ids[i] == 256, last);
    }
    assert_int_equal(document, info->documents);
    assert_int_equal(text_bytes, info->text_bytes);
    free(ids);
}

void text_documents_read(struct text_documents *d, const char *directory) {
    error err;
    dataset *data;
    shard_cursor *c;
    *d = (struct text_documents){0};
    assert_int_equal(dataset_open(&data, directory, &err), 0);
    assert_int_equal(shard_cursor_open(&c, &err), 0);
    for (size_t i = 0; i < dataset_get_info(data)->shards; i++) {
        assert_int_equal(shard_verify(shard_get_info(dataset_shard(data, i))->path, NULL, &err), 0);
        read_shard(d, dataset_shard(data, i), c);
    }
    shard_cursor_close(c);
    dataset_close(data);
}

void text_documents_equal(const struct text_documents *got, const struct text_documents *expected) {
    for (size_t i = 0; i < got->count && i < expected->count; i++) {
        const struct text_document *g = &got->list[i], *e = &expected->list[i];
        if (g->flags != e->flags || g->size != e->size ||
            (g->size && memcmp(got->all.bytes + g->start, expected->all.bytes + e->start, g->size) != 0)) {
            fail_msg("document %zu has flags %u and %zu bytes, expected flags %u and %zu bytes, or the text differs", i,
                     g->flags, g->size, e->flags, e->size);
        }
    }
    assert_int_equal(got->count, expected->count);
}

struct text text_of(const char *directory) {
    error err;
    tokenizer *t;
    struct text text = {0};
    int descriptor = memfd_create("text", MFD_CLOEXEC);
    assert_true(descriptor >= 0);
    assert_int_equal(tokenizer_open(&t, TOKENIZER_BYTES, &err), 0);
    assert_int_equal(detokenize(t, directory, descriptor, &err), 0);
    tokenizer_close(t);
    off_t size = lseek(descriptor, 0, SEEK_END);
    text.bytes = malloc((size_t)size + 1);
    assert_non_null(text.bytes);
    text.size = (size_t)size;
    assert_int_equal(pread(descriptor, text.bytes, text.size, 0), size);
    close(descriptor);
    return text;
}

struct tokenize_options text_options(const char *out) {
    return (struct tokenize_options){.out = out,
                                     .prefix = "part",
                                     .separator = TOKENIZE_SEPARATOR,
                                     .shard_tokens = UINT64_C(1) << 30,
                                     .frame_tokens = 1000,
                                     .zstd_level = 1,
                                     .threads = 2};
}

int text_tokenize(const char *const *inputs, size_t count, const struct tokenize_options *options,
                  struct tokenize_result *result, error *err) {
    tokenizer *t;
    assert_int_equal(tokenizer_open(&t, TOKENIZER_BYTES, err), 0);
    int failed = tokenize(t, inputs, count, options, result, err);
    tokenizer_close(t);
    return failed;
}
