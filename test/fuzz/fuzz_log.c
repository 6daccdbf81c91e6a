/* fuzz_log.c: any bytes as the log of earlier sessions; the first byte is the step that the run goes on from. Opening
 * never refuses: it cuts what can't be kept. What stays are whole lines from the start, and reading it again finds the
 * same; a line is appended behind it. */
#include "common/file.h"
#include "common/limits.h"
#include "test/fuzz/fuzz.h"
#include "train/report.h"

static bool same_history(const struct report_history *a, const struct report_history *b) {
    bool equal = a->valid_loss == b->valid_loss || (a->valid_loss != a->valid_loss && b->valid_loss != b->valid_loss);
    return a->valid_step == b->valid_step && equal;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char directory[256], path[300];
    if (!directory[0]) {
        fuzz_directory(directory);
        snprintf(path, sizeof path, "%s/log.jsonl", directory);
    }
    if (size == 0) return 0;
    fuzz_write(path, data + 1, size - 1);
    struct report_history first, second, third;
    struct report *r;
    error err = {0};
    check(report_read_history(directory, data[0], &first, &err) == 0);
    check(first.valid_step <= data[0]);
    check(report_open(&r, directory, data[0], 1000, 10, "nats/byte", &second, &err) == 0);
    check(same_history(&first, &second));
    char *kept;
    size_t kept_size;
    check(file_read_all(path, SIZE_MAX / 2, &kept, &kept_size, &err) == 0);
    check(kept_size < size && (kept_size == 0 || memcmp(kept, data + 1, kept_size) == 0));
    check(kept_size == 0 || kept[kept_size - 1] == '\n');
    free(kept);
    check(report_stop(r, data[0], "SIGTERM", &err) == 0);
    report_close(r);
    check(report_read_history(directory, data[0], &third, &err) == 0);
    check(same_history(&first, &third));
    return 0;
}
