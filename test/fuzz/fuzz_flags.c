/* fuzz_flags.c: any words as a command line: each ended by a zero byte. What is accepted keeps its bounds, what is left
 * over are words that were given, and everything without a fallback was. */
#include "test/fuzz/fuzz.h"
#include "train/flags.h"

struct fields {
    int64_t whole, bounded;
    double real;
    bool flag;
    const char *text, *needed;
    int choice;
};

static const char *const choices[] = {"one", "two", "three", NULL};

static const struct option table[] = {
    {"whole", OPTION_INT, offsetof(struct fields, whole), "64Ki", 0, 0, "", "A number.", NULL},
    {"bounded", OPTION_INT, offsetof(struct fields, bounded), "1", 1, 100, "steps", "A number in bounds.", NULL},
    {"real-one", OPTION_FLOAT, offsetof(struct fields, real), "0.5", 0, 1, "", "A real.", NULL},
    {"flag", OPTION_BOOL, offsetof(struct fields, flag), "false", 0, 0, "", "A flag.", NULL},
    {"text", OPTION_STRING, offsetof(struct fields, text), "", 0, 0, "", "A text.", NULL},
    {"needed", OPTION_STRING, offsetof(struct fields, needed), NULL, 0, 0, "", "A text that must be given.", NULL},
    {"choice", OPTION_CHOICE, offsetof(struct fields, choice), "two", 0, 0, "", "A choice.", choices},
    {0},
};

static const struct flags flags = {.command = "fuzz", .arguments = "WORD...", .summary = "Takes words.", .table = table,
                                   .least = 1, .most = 3};

enum { WORDS = 40 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *copy = malloc(size + 1), program[] = "fuzz", *words[WORDS + 1] = {program};
    check(copy != NULL);
    memcpy(copy, data, size);
    copy[size] = '\0';
    int argc = 1, count;
    bool helped = false;
    for (char *at = copy; at < copy + size && argc < WORDS; at += strlen(at) + 1) {
        if (flags_is_help(at)) helped = true; /* which prints */
        words[argc++] = at;
    }
    words[argc] = NULL;
    struct fields f = {0};
    error err = {0};
    uint64_t given = 0;
    if (helped) {
        free(copy);
        return 0;
    }
    if (flags_parse(&flags, argc, words, &f, &count, &given, &helped, &err) != 0) {
        check_refusal(&err);
    } else {
        check(count >= 1 && count <= 3 && f.needed && f.text && (given & 1 << 5));
        check(f.bounded >= 1 && f.bounded <= 100 && f.real >= 0 && f.real <= 1 && f.choice >= 0 && f.choice < 3);
        for (int i = 1; i <= count; i++) check(words[i] >= copy && words[i] <= copy + size);
    }
    free(copy);
    return 0;
}
