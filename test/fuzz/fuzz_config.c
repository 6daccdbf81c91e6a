/* fuzz_config.c: any bytes as a config and overrides, with a table of every type of option. */
#include "test/fuzz/config_text.h"

struct fields {
    int64_t whole, bounded;
    double real, share;
    bool flag;
    const char *text;
    int choice;
};

static const char *const choices[] = {"one", "two", "three", NULL};

static const struct option table[] = {
    {"whole", OPTION_INT, offsetof(struct fields, whole), "64k", 0, 0, "", "A number.", NULL},
    {"bounded", OPTION_INT, offsetof(struct fields, bounded), "1", 1, 100, "steps", "A number in bounds.", NULL},
    {"real", OPTION_FLOAT, offsetof(struct fields, real), "0.5", 0, 0, "", "A real.", NULL},
    {"share", OPTION_FLOAT, offsetof(struct fields, share), "0.5", 0, 1, "", "A share.", NULL},
    {"flag", OPTION_BOOL, offsetof(struct fields, flag), "no", 0, 0, "", "A flag.", NULL},
    {"text", OPTION_STRING, offsetof(struct fields, text), "", 0, 0, "", "A text.", NULL},
    {"choice", OPTION_CHOICE, offsetof(struct fields, choice), "two", 0, 0, "", "A choice.", choices},
    OPTIONS_END,
};

/* Bind [a] and every section that starts with "block."; the effective config, or NULL with *err filled. */
static char *effective(config *c, error *err) {
    struct fields f;
    const char *names[8];
    size_t count = config_sections(c, "block.", names, 8);
    int result = config_bind(c, "a", table, &f, err);
    for (size_t i = 0; result == 0 && i < count && i < 8; i++) result = config_bind(c, names[i], table, &f, err);
    if (result == 0) result = config_finish(c, err);
    if (result != 0) return NULL;
    check(f.bounded >= 1 && f.bounded <= 100 && f.share >= 0 && f.share <= 1 && f.choice >= 0 && f.choice < 3);
    check(strlen(f.text) < 5000);
    char *text = config_text(c);
    check(text != NULL);
    return text;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_config(data, size, effective);
    return 0;
}
