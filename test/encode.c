/* encode.c: a tokenizer from the command line, for the tests that compare with other software and for measuring.
 *
 *   encode TOKENIZER          reads records from standard input, each a 4-byte little-endian size and that many bytes,
 *                             and writes the ids of each on a line; with --cut, of the text cut wherever it may be
 *   encode TOKENIZER --speed FILE    encodes the file five times and prints the fastest, in MB/s of processor time
 */
#include "common/file.h"
#include "data/tokenizer.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int fail(const error *err) {
    fprintf(stderr, "encode: %s\n", err->text);
    return error_exit_code(err);
}

static int encode_cut(encoder *e, const tokenizer *t, const char *text, size_t size, bool cut, struct token_list *list,
                      error *err) {
    size_t place = cut ? tokenizer_last_cut(t, text, 0, size) : 0;
    if (place > 0 && place < size) {
        TRY(encode_cut(e, t, text, place, cut, list, err));
        return encode_cut(e, t, text + place, size - place, false, list, err);
    }
    return encoder_append(e, text, size, list, err);
}

static int run_records(encoder *e, const tokenizer *t, bool cut, error *err) {
    uint32_t size;
    struct token_list list = {0};
    int failed = 0;
    while (!failed && fread(&size, sizeof size, 1, stdin) == 1) {
        char *text = malloc((size_t)size + 1);
        if (!text || fread(text, 1, size, stdin) != size) failed = error_input(err, "a record is cut");
        list.count = 0;
        if (!failed) failed = encode_cut(e, t, text, size, cut, &list, err);
        free(text);
        for (size_t i = 0; !failed && i < list.count; i++) printf(i > 0 ? " %d" : "%d", (int)list.ids[i]);
        if (!failed) putchar('\n');
    }
    free(list.ids);
    return failed;
}

static double processor_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int run_speed(encoder *e, const char *path, error *err) {
    char *text;
    size_t size;
    TRY(file_read_all(path, SIZE_MAX / 2, &text, &size, err));
    struct token_list list = {0};
    double best = 0;
    int failed = 0;
    for (int i = 0; i < 5 && !failed; i++) {
        double start = processor_seconds();
        list.count = 0;
        failed = encoder_append(e, text, size, &list, err);
        double rate = (double)size / 1e6 / (processor_seconds() - start);
        best = rate > best ? rate : best;
    }
    if (!failed) printf("%s: %zu bytes, %zu ids, %.1f MB/s\n", path, size, list.count, best);
    free(list.ids);
    free(text);
    return failed;
}

int main(int argc, char **argv) {
    bool speed = argc == 4 && strcmp(argv[2], "--speed") == 0, cut = argc == 3 && strcmp(argv[2], "--cut") == 0;
    if (argc != 2 && !speed && !cut) {
        fputs("usage: encode TOKENIZER [--cut | --speed FILE]\n", stderr);
        return 2;
    }
    error err = {0};
    tokenizer *t;
    encoder *e = NULL;
    if (tokenizer_open(&t, argv[1], &err) != 0) return fail(&err);
    int failed = encoder_open(&e, t, &err);
    if (!failed) failed = speed ? run_speed(e, argv[3], &err) : run_records(e, t, cut, &err);
    encoder_close(e);
    tokenizer_close(t);
    return failed ? fail(&err) : 0;
}
