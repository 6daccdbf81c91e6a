/* test_train_flags.c: the command line of a command: what is taken, what is refused and in which words. */
#include "test/unit.h"
#include "train/flags.h"

struct values {
    int64_t count, rest;
    double share;
    const char *name;
    bool loud;
    int color;
};
static const char *const colors[] = {"red", "green", NULL};

#define AT(field) offsetof(struct values, field)
static const struct option table[] = {
    {"count", OPTION_INT, AT(count), "3", 1, 100, "things", "How many.", NULL},
    {"rest", OPTION_INT, AT(rest), "", 0, 9, "", "Left alone if it is not given.", NULL},
    {"share", OPTION_FLOAT, AT(share), "0.5", 0, 1, "", "How much.", NULL},
    {"name", OPTION_STRING, AT(name), NULL, 0, 0, "", "Whose.", NULL},
    {"loud", OPTION_BOOL, AT(loud), "false", 0, 0, "", "Whether.", NULL},
    {"color", OPTION_CHOICE, AT(color), "green", 0, 0, "", "Which.", colors},
    OPTIONS_END,
};
static const struct flags flags = {
    .command = "paint", .arguments = "WALL", .summary = "Paints.", .table = table, .least = 1, .most = 2};

static char *words[16];
static int count;
static uint64_t given;

/* Parse the words of `line`, cut at blanks. */
static int parse(const char *line, struct values *v, error *err) {
    static char copy[512];
    bool helped;
    int argc = 0;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *word = strtok(copy, " "); word; word = strtok(NULL, " ")) words[argc++] = word;
    words[argc] = NULL;
    *v = (struct values){.rest = 77};
    *err = (error){0};
    int result = flags_parse(&flags, argc, words, v, &count, &given, &helped, err);
    assert_false(helped);
    return result;
}

static void accept(const char *line, struct values *v) {
    error err;
    if (parse(line, v, &err) != 0) fail_msg("%s: %s", line, err.text);
}

static void refuse(const char *line, const char *text) {
    struct values v;
    error err;
    unit_expect(parse(line, &v, &err), &err, ERROR_INPUT, text);
}

static void test_accepted(void **state) {
    (void)state;
    struct values v;
    accept("paint wall --name x", &v);
    assert_true(v.count == 3 && v.rest == 77 && v.share == 0.5 && !v.loud && v.color == 1 && count == 1 && given == 8);
    assert_string_equal(words[1], "wall");
    accept("paint --count 7 one --name=a=b --share=0 two --loud --color red --rest 0", &v);
    assert_true(v.count == 7 && v.rest == 0 && v.share == 0 && v.loud && v.color == 0 && count == 2 && given == 63);
    assert_string_equal(v.name, "a=b");
    assert_string_equal(words[1], "one");
    assert_string_equal(words[2], "two");
    accept("paint --name -x -- --wall", &v); /* one dash may begin a value; behind -- nothing is a flag */
    assert_string_equal(v.name, "-x");
    assert_string_equal(words[1], "--wall");
    accept("paint - --name x --no-loud", &v);
    assert_string_equal(words[1], "-");
    assert_false(v.loud);
    accept("paint w --name=", &v);
    assert_string_equal(v.name, "");
}

static void test_refused(void **state) {
    (void)state;
    refuse("paint wall", "riverrun paint needs --name: Whose.");
    refuse("paint --name x", "riverrun paint takes WALL, but 0 arguments were given");
    refuse("paint --name x a b c", "riverrun paint takes WALL, but 3 arguments were given; one too many is c");
    refuse("paint w --nme x", "'--nme' is no option of riverrun paint; did you mean --name?");
    refuse("paint w --qqqqqq", "'--qqqqqq' is no option of riverrun paint; riverrun paint --help lists them");
    refuse("paint w -n x", "'-n' is no option of riverrun paint; options start with two dashes, --help lists them");
    refuse("paint w --name x --name y", "--name is given twice; give it once");
    refuse("paint w --loud --no-loud", "--loud is given twice; give it once");
    refuse("paint w --loud=yes", "--loud takes no value; write --loud or --no-loud");
    refuse("paint w --no-name x", "'--no-name' is no option of riverrun paint; riverrun paint --help lists them");
    refuse("paint w --name", "--name needs a value: a text");
    refuse("paint w --name --loud", "--name needs a value: a text; one that starts with dashes is written --key=VALUE");
    refuse("paint w --name x --count 0", "--count 0: must be a whole number of things from 1 to 100; the nearest is 1");
    refuse("paint w --name x --color gren", "--color gren: must be one of red, green; did you mean green?");
}

static void test_help(void **state) {
    (void)state;
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    flags_help(out, &flags);
    fclose(out);
    assert_string_equal(text,
                        "riverrun paint WALL [options]\n\nPaints.\n\n"
                        "  --count VALUE\n      How many. Valid: a whole number of things from 1 to 100. Default: 3.\n"
                        "  --rest VALUE\n      Left alone if it is not given. Valid: a whole number from 0 to 9.\n"
                        "  --share VALUE\n      How much. Valid: a number from 0 to 1. Default: 0.5.\n"
                        "  --name VALUE\n      Whose. Valid: a text. Must be given.\n"
                        "  --loud, --no-loud\n      Whether. Default: false.\n"
                        "  --color VALUE\n      Which. Valid: one of red, green. Default: green.\n");
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_accepted), cmocka_unit_test(test_refused),
                                       cmocka_unit_test(test_help)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
