/* fuzz_dataset.c: any bytes as a directory of two shards. The first two bytes say how many of the others belong to the
 * first, and whether there is a tokenizer.json; checksums are put right. It is refused, or its numbers are the sums of
 * the shards', and every token, also across the border, is an id. */
#include "data/shard.h"
#include "data/tokenizer.h"
#include "test/fuzz/fuzz.h"
#include "test/support_shard.h"

enum { READ_MOST = 100000, PIECE = 251 };

static void read_everything(const dataset *d) {
    const struct dataset_info *info = dataset_get_info(d);
    uint64_t tokens = 0, documents = 0, starts[64];
    for (size_t i = 0; i < info->shards; i++) {
        tokens += shard_get_info(dataset_shard(d, i))->tokens;
        documents += shard_get_info(dataset_shard(d, i))->documents;
    }
    check(tokens == info->tokens && documents == info->documents);
    int32_t ids[PIECE];
    uint8_t mask[PIECE];
    error err = {0};
    shard_cursor *c;
    check(shard_cursor_open(&c, &err) == 0);
    for (uint64_t at = 0; at < tokens && at < READ_MOST; at += PIECE - 1) {
        size_t count = tokens - at < PIECE ? (size_t)(tokens - at) : PIECE;
        if (dataset_read(d, c, at, count, ids, mask, &err) != 0) {
            check_refusal(&err);
            break;
        }
        for (size_t i = 0; i < count; i++) check(ids[i] >= 0 && (uint64_t)ids[i] < info->vocab && mask[i] <= 1);
        size_t found = dataset_document_starts(d, at, count, starts, 64);
        for (size_t i = 0; i < found && i < 64; i++) check(starts[i] >= at && starts[i] < at + count);
    }
    shard_cursor_close(c);
}

static void write_shard(const char *path, const uint8_t *data, size_t size) {
    unsigned char *sealed = malloc(size ? size : 1);
    check(sealed != NULL);
    if (size) memcpy(sealed, data, size);
    shard_reseal(sealed, size);
    fuzz_write(path, sealed, size);
    free(sealed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char directory[256], paths[3][300];
    if (!directory[0]) {
        fuzz_directory(directory);
        snprintf(paths[0], sizeof paths[0], "%s/a.rrs", directory);
        snprintf(paths[1], sizeof paths[1], "%s/b.rrs", directory);
        snprintf(paths[2], sizeof paths[2], "%s/tokenizer.json", directory);
    }
    if (size < 2) return 0;
    size_t first = data[0] + 256 * (size_t)(data[1] & 127);
    if (first > size - 2) first = size - 2;
    write_shard(paths[0], data + 2, first);
    write_shard(paths[1], data + 2 + first, size - 2 - first);
    unlink(paths[2]);
    error err = {0};
    if (data[1] & 128) {
        tokenizer *t;
        size_t length;
        check(tokenizer_open(&t, TOKENIZER_BYTES, &err) == 0);
        const char *json = tokenizer_json(t, &length);
        fuzz_write(paths[2], json, length);
        tokenizer_close(t);
    }
    dataset *d;
    if (dataset_open(&d, directory, &err) == 0) {
        read_everything(d);
        dataset_close(d);
    } else {
        check_refusal(&err);
        check(!d);
    }
    return 0;
}
