/* test_common_config.c: what a config may say, every sentence about what it may not, overrides, option tables, the
 * effective config, and the lengths at which inih's own line buffer would have cut. */
#include "test/unit.h"

#include "common/config.h"
#include "common/limits.h"
#include <limits.h>
#include <math.h>

static const char *const schedules[] = {"cosine", "linear", "wsd", NULL};

struct train {
    int64_t steps, batch, seed;
    double lr, floor, clip;
    bool tied;
    const char *name;
    int schedule;
};

#define AT(field) offsetof(struct train, field)
static const struct option train_options[] = {
    {"steps", OPTION_INT, AT(steps), NULL, 1, 1e9, "steps", "Length of the run.", NULL},
    {"batch", OPTION_INT, AT(batch), "64k", 1, INFINITY, "tokens", "Tokens in a batch.", NULL},
    {"seed", OPTION_INT, AT(seed), "0", 0, 0, "", "Seed of everything random.", NULL},
    {"lr", OPTION_FLOAT, AT(lr), "3e-4", 0, 1, "", "Peak learning rate.", NULL},
    {"floor", OPTION_FLOAT, AT(floor), "-1.5", 0, 0, "", "Unbounded | for the test.", NULL},
    {"clip", OPTION_FLOAT, AT(clip), "1", -HUGE_VAL, 2.5, "", "Largest norm.", NULL},
    {"tied", OPTION_BOOL, AT(tied), "yes", 0, 0, "", "Share the embedding.", NULL},
    {"name", OPTION_STRING, AT(name), "", 0, 0, "", "Name of the run.", NULL},
    {"schedule", OPTION_CHOICE, AT(schedule), "cosine", 0, 0, "", "Shape of the decay.", schedules},
    {0},
};

static config *parsed(const char *text) {
    error err = {0};
    config *c = NULL;
    if (config_parse(&c, text, strlen(text), "c.ini", &err) != 0) fail_msg("%s", err.text);
    return c;
}

/* Parse, bind [train] and finish: the first failure's text must be `sentence`; NULL for none. */
static void expect(const char *text, const char *override, const char *sentence) {
    error err = {0};
    config *c = NULL;
    struct train t;
    int result = config_parse(&c, text, strlen(text), "c.ini", &err);
    if (result != 0) assert_null(c);
    if (result == 0 && override) result = config_override(c, override, &err);
    if (result == 0) result = config_bind(c, "train", train_options, &t, &err);
    if (result == 0) result = config_finish(c, &err);
    config_free(c);
    if (!sentence) {
        if (result != 0) fail_msg("%s", err.text);
        return;
    }
    unit_expect(result, &err, ERROR_INPUT, sentence);
}

static struct train bound(config *c) {
    error err = {0};
    struct train t;
    if (config_bind(c, "train", train_options, &t, &err) != 0 || config_finish(c, &err) != 0) fail_msg("%s", err.text);
    return t;
}

/* ---- what is accepted ------------------------------------------------------------------------------------------- */

static void every_type_and_default(void **state) {
    (void)state;
    config *c = parsed("\xEF\xBB\xBF# a comment\r\n; another\n\n[train] # behind a section\r\n  steps =10\n\tlr= 1e-3 "
                       "; behind a value\n"
                       "name = a = b # c\n\n   [ other ]\nx=1\n[train]\nschedule=wsd\ntied = off");
    error err;
    assert_true(config_has(c, "train", "steps"));
    assert_false(config_has(c, "train", "batch"));
    assert_false(config_has(c, "absent", "steps"));
    struct train t;
    assert_int_equal(config_bind(c, "train", train_options, &t, &err), 0);
    assert_int_equal(t.steps, 10); /* an indented line is a line of its own */
    assert_int_equal(t.batch, 64000);
    assert_int_equal(t.seed, 0);
    assert_true(t.lr == 1e-3 && t.floor == -1.5 && t.clip == 1);
    assert_false(t.tied);
    assert_string_equal(t.name, "a = b");
    assert_int_equal(t.schedule, 2);
    const char *names[3];
    assert_int_equal(config_sections(c, "", NULL, 0), 2);
    assert_int_equal(config_sections(c, "", names, 3), 2);
    assert_string_equal(names[0], "train");
    assert_string_equal(names[1], "other");
    config_free(c);
    config_free(NULL);
}

static void values_keep_what_only_looks_like_a_comment(void **state) {
    (void)state;
    static const char *const kept[] = {
        "a#b;c", "|", "||", "a:b", "=x", "\"quoted\"", "a  b", "[x]", "\xc3\xa9\xe2\x82\xac", ""};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        char text[200];
        snprintf(text, sizeof text, "[train]\nsteps=1\nname = %s\n", kept[i]);
        config *c = parsed(text);
        assert_string_equal(bound(c).name, kept[i]);
        config_free(c);
    }
}

static void whole_numbers(void **state) {
    (void)state;
    static const struct {
        const char *text;
        int64_t value;
    } good[] = {{"0", 0},
                {"-7", -7},
                {"+7", 7},
                {"1_000_000", 1000000},
                {"64k", 64000},
                {"64Ki", 65536},
                {"-2m", -2000000},
                {"3Mi", 3 << 20},
                {"2g", 2000000000},
                {"2Gi", INT64_C(2) << 30},
                {"9223372036854775807", INT64_MAX},
                {"-9223372036854775808", INT64_MIN}};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        char text[100];
        snprintf(text, sizeof text, "[train]\nsteps=1\nseed=%s\n", good[i].text);
        config *c = parsed(text);
        assert_true(bound(c).seed == good[i].value);
        config_free(c);
    }
    static const char *const bad[] = {"", "x", "1.5", "1e3", "0x10", "1__0", "_1", "1_", "1 k", "64K", "64kk", "--1",
                                      "9223372036854775808", "-9223372036854775809", "9223372036854775807k",
                                      "18446744073709551617",
                                      "-18446744073709551617"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[100], sentence[200];
        snprintf(text, sizeof text, "[train]\nsteps=1\nseed=%s\n", bad[i]);
        snprintf(
            sentence, sizeof sentence,
            "c.ini:3: [train] seed = %s: must be a whole number; 64000 may be written 64_000 or 64k, and 64Ki is 65536",
            bad[i]);
        expect(text, NULL, sentence);
    }
}

static void real_numbers_and_booleans(void **state) {
    (void)state;
    static const char *const bad[] = {"", "x", "1e", "nan", "inf", "0x1p3", "1e999", "1,5", "1 2", "--1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[100], sentence[200];
        snprintf(text, sizeof text, "[train]\nsteps=1\nfloor=%s\n", bad[i]);
        snprintf(sentence, sizeof sentence, "c.ini:3: [train] floor = %s: must be a number, such as 0.1 or 3e-4",
                 bad[i]);
        expect(text, NULL, sentence);
    }
    static const char *const yes[] = {"true", "yes", "on", "1"}, *const no[] = {"false", "no", "off", "0"};
    for (int i = 0; i < 8; i++) {
        char text[100];
        snprintf(text, sizeof text, "[train]\nsteps=1\ntied=%s\n", i < 4 ? yes[i] : no[i - 4]);
        config *c = parsed(text);
        assert_int_equal(bound(c).tied, i < 4);
        config_free(c);
    }
    expect("[train]\nsteps=1\ntied=True\n", NULL, "c.ini:3: [train] tied = True: must be true or false");
}

/* ---- what is refused -------------------------------------------------------------------------------------------- */

static void bounds_name_the_nearest_value(void **state) {
    (void)state;
    expect("[train]\nsteps=0\n", NULL,
           "c.ini:2: [train] steps = 0: must be a whole number of steps from 1 to 1000000000; the nearest is 1");
    expect(
        "[train]\nsteps=2g\n", NULL,
        "c.ini:2: [train] steps = 2g: must be a whole number of steps from 1 to 1000000000; the nearest is 1000000000");
    expect("[train]\nsteps=1g\n", NULL, NULL);
    expect("[train]\nsteps=1\nbatch=0\n", NULL,
           "c.ini:3: [train] batch = 0: must be a whole number of tokens, at least 1; the nearest is 1");
    expect("[train]\nsteps=1\nlr=-1e-9\n", NULL,
           "c.ini:3: [train] lr = -1e-9: must be a number from 0 to 1; the nearest is 0");
    expect("[train]\nsteps=1\nlr=1.5\n", NULL,
           "c.ini:3: [train] lr = 1.5: must be a number from 0 to 1; the nearest is 1");
    expect("[train]\nsteps=1\nclip=2.6\n", NULL,
           "c.ini:3: [train] clip = 2.6: must be a number, at most 2.5; the nearest is 2.5");
    expect("[train]\nsteps=1\nclip=-1e300\n", NULL, NULL);
}

static void choices_and_missing_options(void **state) {
    (void)state;
    expect("[train]\nsteps=1\nschedule=cosin\n", NULL,
           "c.ini:3: [train] schedule = cosin: must be one of cosine, linear, wsd; did you mean cosine?");
    expect("[train]\nsteps=1\nschedule=step\n", NULL,
           "c.ini:3: [train] schedule = step: must be one of cosine, linear, wsd");
    expect("[train]\n", NULL,
           "c.ini: [train] steps is missing, it must be a whole number of steps from 1 to 1000000000");
}

static void unknown_names_get_the_nearest(void **state) {
    (void)state;
    expect("[train]\nsteps=1\nsede=3\n", NULL,
           "c.ini:3: [train] sede = 3: [train] has no option sede; did you mean seed?");
    expect("[train]\nsteps=1\nxyzzy=3\n", NULL,
           "c.ini:3: [train] xyzzy = 3: [train] has no option xyzzy; known are steps, batch, seed, lr, floor, clip, "
           "tied, name, "
           "schedule");
    expect("[train]\nsteps=1\n[trian]\nseed=3\n", NULL, "c.ini:3: there is no section [trian]; did you mean [train]?");
    expect("[train]\nsteps=1\n[xyzzy]\n", NULL, "c.ini:3: there is no section [xyzzy]; known are [train]");
    expect("[train]\nsteps=1\n", "train.sede=3",
           "command line: train.sede=3: [train] has no option sede; did you mean seed?");
    expect("[train]\nsteps=1\n", "trian.seed=3", "command line: there is no section [trian]; did you mean [train]?");
    expect("[train]\nsteps=1\n", "train.lr=x",
           "command line: train.lr=x: must be a number from 0 to 1, such as 0.1 or 3e-4");

    static const struct option model_options[] = {{"width", OPTION_INT, 0, "8", 0, 0, "", "Width.", NULL}, {0}};
    config *c = parsed("[train]\nsteps=1\nwidth=9\n");
    error err;
    struct train t;
    int64_t width;
    assert_int_equal(config_bind(c, "model", model_options, &width, &err), 0);
    assert_int_equal(config_bind(c, "train", train_options, &t, &err), 0);
    unit_expect(config_finish(c, &err), &err, ERROR_INPUT,
                "c.ini:3: [train] width = 9: [train] has no option width; it belongs to [model]");
    config_free(c);
}

static void lines_that_are_nothing(void **state) {
    (void)state;
    expect("[train]\nsteps\n", NULL, "c.ini:2: 'steps' is neither a [section] nor key = value nor a comment");
    expect("[train]\nsteps: 3\n", NULL, "c.ini:2: 'steps: 3' is neither a [section] nor key = value nor a comment");
    expect("[train]\nsteps = 1\n   more\n", NULL,
           "c.ini:3: 'more' is neither a [section] nor key = value nor a comment");
    expect("steps = 1\n[train]\n", NULL,
           "c.ini:1: 'steps = 1' stands before the first [section], it must stand in one");
    static const char *const keys[] = {"= 1", "a b = 1", "a:b = 1", "a.b = 1", "\xc3\xa9 = 1"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        char text[100], sentence[200];
        snprintf(text, sizeof text, "[train]\n%s\n", keys[i]);
        snprintf(sentence, sizeof sentence,
                 "c.ini:2: '%s' does not begin with a key: up to 49 letters, digits, '_' and '-'", keys[i]);
        expect(text, NULL, sentence);
    }
    static const char *const sections[] = {"[train", "[]", "[a b]", "[train] steps = 1", "[a]]", "[a=b]"};
    for (size_t i = 0; i < sizeof sections / sizeof *sections; i++) {
        char sentence[200];
        snprintf(sentence, sizeof sentence,
                 "c.ini:1: %s is not a section: write a name of up to 49 letters, digits, '_', '-' and '.' in "
                 "brackets, such as "
                 "[block.m]",
                 sections[i]);
        expect(sections[i], NULL, sentence);
    }
    expect("[train]\nname=a\001b\n", NULL, "c.ini:2: the line holds the byte 0x01, a config is plain text");
    error err;
    config *c;
    unit_expect(config_parse(&c, "[train]\nsteps=1\0 2\n", 19, "c.ini", &err), &err, ERROR_INPUT,
                "c.ini:2: the line holds the byte 0x00, a config is plain text");
}

static void a_key_given_twice(void **state) {
    (void)state;
    expect("[train]\nsteps=1\nlr=1\nsteps=1\n", NULL,
           "c.ini:4: [train] steps is given a second time, the first is in line 2");
    expect("[train]\nsteps=1\n[other]\n[train]\nsteps=2\n", NULL,
           "c.ini:5: [train] steps is given a second time, the first is in line 2");
    expect("[train]\nsteps=1\n[train]\nlr=0.5\n", NULL, NULL);
}

/* ---- lengths ---------------------------------------------------------------------------------------------------- */

/* A config whose line `name = xyz...` has `length` bytes; the value must come back whole. */
static void expect_line_length(size_t length, bool accepted) {
    char *text = malloc(length + 100), sentence[100];
    assert_non_null(text);
    size_t front = (size_t)sprintf(text, "[train]\nsteps = 1\nname = ");
    char *value = text + front;
    size_t size = length - strlen("name = ");
    for (size_t i = 0; i < size; i++) value[i] = "abc def|=#;"[i % 11];
    value[size - 1] = 'z';
    strcpy(value + size, "\nlr = 0.25\n");
    error err = {0};
    config *c = NULL;
    int result = config_parse(&c, text, strlen(text), "c.ini", &err);
    if (accepted) {
        if (result != 0) fail_msg("%s", err.text);
        struct train t = bound(c);
        assert_int_equal(strlen(t.name), size);
        assert_memory_equal(t.name, value, size);
        assert_true(t.lr == 0.25); /* the line behind is a line of its own */
        /* What is printed reads back, so a long value survives a checkpoint. */
        char *effective = config_text(c);
        config *again = parsed(effective);
        assert_string_equal(bound(again).name, t.name);
        config_free(again);
        free(effective);
    } else {
        snprintf(sentence, sizeof sentence, "c.ini:3: the line has %zu bytes, at most 4096 are allowed", length);
        unit_expect(result, &err, ERROR_INPUT, sentence);
    }
    config_free(c);
    free(text);
}

static void lines_beyond_the_parsers_buffer(void **state) {
    (void)state;
    for (size_t length = 8; length <= 1000; length++)
        expect_line_length(length, true); /* 198, 199, 200, 201 among them */
    expect_line_length(4095, true);
    expect_line_length(4096, true);
    expect_line_length(4097, false);
    expect_line_length(100000, false);
    /* A comment is a line, too. */
    char text[5000];
    memset(text, '#', sizeof text);
    error err;
    config *c;
    assert_int_equal(config_parse(&c, text, 4096, "c.ini", &err), 0);
    config_free(c);
    unit_expect(config_parse(&c, text, 4097, "c.ini", &err), &err, ERROR_INPUT,
                "c.ini:1: the line has 4097 bytes, at most 4096 are allowed");
}

static void names_up_to_49_bytes(void **state) {
    (void)state;
    char name[60], text[300];
    error err;
    for (int length = 47; length <= 51; length++) {
        memset(name, 'n', sizeof name);
        name[length] = 0;
        bool accepted = length <= LIMIT_CONFIG_NAME;
        config *c = NULL;
        snprintf(text, sizeof text, "[%s]\nk = v\n", name);
        assert_int_equal(config_parse(&c, text, strlen(text), "c.ini", &err), accepted ? 0 : -1);
        if (accepted) assert_true(config_has(c, name, "k")); /* whole, not cut */
        config_free(c);
        snprintf(text, sizeof text, "[s]\n%s = v\n", name);
        assert_int_equal(config_parse(&c, text, strlen(text), "c.ini", &err), accepted ? 0 : -1);
        if (accepted) assert_true(config_has(c, "s", name));
        config_free(c);
    }
}

static void files_and_their_size(void **state) {
    (void)state;
    char directory[256], path[PATH_MAX], sentence[PATH_MAX + 200];
    unit_directory(directory);
    error err;
    config *c;
    assert_int_equal(file_join(path, sizeof path, directory, "c.ini", &err), 0);
    assert_int_equal(file_write_all(path, "[train]\nsteps = x\n", 18, &err), 0);
    assert_int_equal(config_load(&c, path, &err), 0);
    struct train t;
    assert_int_equal(config_bind(c, "train", train_options, &t, &err), -1);
    snprintf(sentence, sizeof sentence, "%s:2: [train] steps = x: must be", path);
    assert_memory_equal(err.text, sentence, strlen(sentence));
    config_free(c);
    assert_int_equal(file_join(path, sizeof path, directory, "none.ini", &err), 0);
    snprintf(sentence, sizeof sentence, "cannot read %s: No such file or directory", path);
    unit_expect(config_load(&c, path, &err), &err, ERROR_INPUT, sentence);
    assert_null(c);
    char *large = malloc(LIMIT_CONFIG_BYTES + 1);
    assert_non_null(large);
    memset(large, '\n', LIMIT_CONFIG_BYTES + 1);
    assert_int_equal(config_parse(&c, large, LIMIT_CONFIG_BYTES, "c.ini", &err), 0);
    config_free(c);
    unit_expect(config_parse(&c, large, LIMIT_CONFIG_BYTES + 1, "c.ini", &err), &err, ERROR_INPUT,
                "c.ini: the config has 1048577 bytes, at most 1048576 are allowed");
    free(large);
    unit_directory_remove(directory);
}

/* ---- other origins ---------------------------------------------------------------------------------------------- */

static void overrides_win(void **state) {
    (void)state;
    error err;
    config *c = parsed("[train]\nsteps = 1\nlr = 0.5\n");
    assert_int_equal(config_override(c, "train.steps=2", &err), 0);
    assert_int_equal(config_override(c, "train.steps= 3k ", &err), 0); /* the last one counts */
    assert_int_equal(config_override(c, "train.name=a=b.c", &err), 0);
    assert_int_equal(config_override(c, "block.m.width=5", &err), 0); /* the last dot parts section from key */
    assert_true(config_has(c, "block.m", "width"));
    struct train t;
    assert_int_equal(config_bind(c, "train", train_options, &t, &err), 0);
    assert_int_equal(t.steps, 3000);
    assert_true(t.lr == 0.5);
    assert_string_equal(t.name, "a=b.c");
    config_free(c);

    static const char *const wrong[] = {"",         "train",    "train.steps", "steps=1",
                                        ".steps=1", "train.=1", "a b.c=1",     "=a.b"};
    c = parsed("");
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char sentence[200];
        snprintf(sentence, sizeof sentence,
                 "'%s' is not an override: write section.key=value, such as train.steps=1000", wrong[i]);
        unit_expect(config_override(c, wrong[i], &err), &err, ERROR_INPUT, sentence);
    }
    unit_expect(config_override(c, "train.name=a #b", &err), &err, ERROR_INPUT,
                "the value of train.name holds a # or ; that would begin a comment in a config");
    unit_expect(config_override(c, "train.name=;", &err), &err, ERROR_INPUT,
                "the value of train.name holds a # or ; that would begin a comment in a config");
    unit_expect(config_override(c, "train.name=a\nb", &err), &err, ERROR_INPUT,
                "the value of train.name holds the byte 0x0a, a config is plain text");
    char *large = calloc(1, 5000);
    assert_non_null(large);
    memset(large, 'x', 4999);
    memcpy(large, "train.name=", 11);
    large[11 + 4096 - 7] = 0; /* 7 bytes of `name = ` make a line of 4096 */
    assert_int_equal(config_override(c, large, &err), 0);
    large[11 + 4096 - 7] = 'x';
    large[11 + 4097 - 7] = 0;
    unit_expect(config_override(c, large, &err), &err, ERROR_INPUT,
                "the value of train.name has 4090 bytes, a line of a config has at most 4096");
    free(large);
    config_free(c);
}

static void what_a_program_sets_gives_way(void **state) {
    (void)state;
    error err;
    config *c = parsed("[train]\nsteps = 1\n");
    assert_int_equal(config_set(c, "train", "steps", "5", &err), 0); /* the file has it */
    assert_int_equal(config_set(c, "train", "batch", "5", &err), 0);
    assert_int_equal(config_set(c, "train", "batch", "6", &err), 0);
    assert_int_equal(config_set(c, "train", "seed", "7", &err), 0);
    assert_int_equal(config_override(c, "train.seed=8", &err), 0);
    assert_int_equal(config_set(c, "train", "seed", "9", &err), 0);
    struct train t = bound(c);
    assert_int_equal(t.steps, 1);
    assert_int_equal(t.batch, 6);
    assert_int_equal(t.seed, 8);
    config_free(c);
    c = parsed("");
    assert_int_equal(config_set(c, "train", "steps", "many", &err), 0);
    unit_expect(config_bind(c, "train", train_options, &t, &err), &err, ERROR_INPUT,
                "c.ini: derived [train] steps = many: must be a whole number of steps from 1 to 1000000000; 64000 may "
                "be written "
                "64_000 or 64k, and 64Ki is 65536");
    config_free(c);
}

static void no_file_at_all(void **state) {
    (void)state;
    error err;
    config *c;
    assert_int_equal(config_load(&c, NULL, &err), 0);
    struct train t;
    unit_expect(config_bind(c, "train", train_options, &t, &err), &err, ERROR_INPUT,
                "defaults: [train] steps is missing, it must be a whole number of steps from 1 to 1000000000");
    assert_int_equal(config_override(c, "train.steps=4", &err), 0);
    assert_int_equal(bound(c).steps, 4);
    config_free(c);
}

/* A number whose default is empty may be left out, and stays so through the effective config. */
static void numbers_that_may_be_empty(void **state) {
    (void)state;
    static const struct option options[] = {{"low", OPTION_FLOAT, 0, "", -2, 2, "", "Lowest.", NULL},
                                            {"high", OPTION_FLOAT, sizeof(double), "", 0, 0, "", "Highest.", NULL},
                                            {0}};
    double values[2];
    error err = {0};
    config *c = parsed("[a]\nhigh = 7\n[b]\nlow =\n[c]\nlow = 3\n");
    assert_int_equal(config_bind(c, "a", options, values, &err), 0);
    assert_true(isnan(values[0]) && values[1] == 7);
    assert_int_equal(config_bind(c, "b", options, values, &err), 0);
    assert_true(isnan(values[0]) && isnan(values[1]));
    assert_int_equal(config_bind(c, "c", options, values, &err), -1);
    assert_non_null(strstr(err.text, "must be a number from -2 to 2, or empty; the nearest is 2"));
    char *text = config_text(c);
    config_free(c);
    c = parsed(text);
    assert_int_equal(config_bind(c, "a", options, values, &err), 0);
    assert_true(isnan(values[0]) && values[1] == 7);
    config_free(c);
    free(text);
}

/* ---- output ----------------------------------------------------------------------------------------------------- */

static const struct option width_options[] = {{"width", OPTION_INT, 0, "8", 0, 0, "", "Width.", NULL}, {0}};
static const struct option depth_options[] = {{"depth", OPTION_FLOAT, 0, "0.1", 0, 0, "", "Depth.", NULL}, {0}};

/* Bind the two tables of a block (one section may have several), then [train]. */
static void bind_all(config *c, int64_t *width, double *depth, struct train *t) {
    error err = {0};
    if (config_bind(c, "block.m", width_options, width, &err) != 0 ||
        config_bind(c, "train", train_options, t, &err) != 0 ||
        config_bind(c, "block.m", depth_options, depth, &err) != 0 ||
        config_bind(c, "block.m", width_options, width, &err) != 0 ||
        config_bind(c, "block.e", (struct option[]){{0}}, t, &err) != 0 || config_finish(c, &err) != 0) {
        fail_msg("%s", err.text);
    }
}

static void the_effective_config_reads_back(void **state) {
    (void)state;
    error err;
    config *c = parsed("[train]\nsteps=64Ki\nlr=0.30000000000000004\nname= two words \n[block.m]\n[block.e]\n");
    assert_int_equal(config_override(c, "block.m.depth=1e-7", &err), 0);
    int64_t width, width_again;
    double depth, depth_again;
    struct train t, again;
    bind_all(c, &width, &depth, &t);
    char *text = config_text(c);
    assert_string_equal(text, "[block.m]\nwidth = 8\ndepth = 1e-07\n\n[train]\nsteps = 65536\nbatch = 64000\nseed = 0\n"
                              "lr = 0.30000000000000004\nfloor = -1.5\nclip = 1\ntied = true\nname = two words\n"
                              "schedule = cosine\n\n[block.e]\n");
    config *back = parsed(text);
    bind_all(back, &width_again, &depth_again, &again);
    assert_int_equal(width, width_again);
    assert_true(depth == depth_again && t.lr == again.lr && t.floor == again.floor && t.clip == again.clip);
    assert_int_equal(t.steps, again.steps);
    assert_int_equal(t.batch, again.batch);
    assert_int_equal(t.tied, again.tied);
    assert_string_equal(t.name, again.name);
    assert_int_equal(t.schedule, again.schedule);
    char *text_again = config_text(back);
    assert_string_equal(text, text_again);
    free(text);
    free(text_again);
    config_free(c);
    config_free(back);
}

/* What `print` writes for the options of [train]. The caller frees. */
static char *printed(void (*print)(FILE *, const char *, const struct option *)) {
    char *text;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    print(out, "train", train_options);
    fclose(out);
    return text;
}

static void help_and_documents_come_from_the_table(void **state) {
    (void)state;
    char *help = printed(option_help);
    const char *start =
        "[train]\n  steps (must be given)\n      Length of the run. Valid: a whole number of steps from 1 to "
        "1000000000.\n  batch = 64k\n      Tokens in a batch. Valid: a whole number of tokens, at least 1.\n";
    assert_memory_equal(help, start, strlen(start));
    assert_non_null(
        strstr(help, "  schedule = cosine\n      Shape of the decay. Valid: one of cosine, linear, wsd.\n"));
    free(help);
    char *page = printed(option_document);
    start = "| `[train]` | default | valid | meaning |\n|---|---|---|---|\n"
            "| `steps` | must be given | a whole number of steps from 1 to 1000000000 | Length of the run. |\n";
    assert_memory_equal(page, start, strlen(start));
    assert_non_null(strstr(page, "| `floor` | `-1.5` | a number | Unbounded \\| for the test. |\n"));
    assert_non_null(strstr(page, "| `name` | empty | a text | Name of the run. |\n"));
    free(page);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_and_default),
        cmocka_unit_test(values_keep_what_only_looks_like_a_comment),
        cmocka_unit_test(whole_numbers),
        cmocka_unit_test(real_numbers_and_booleans),
        cmocka_unit_test(numbers_that_may_be_empty),
        cmocka_unit_test(bounds_name_the_nearest_value),
        cmocka_unit_test(choices_and_missing_options),
        cmocka_unit_test(unknown_names_get_the_nearest),
        cmocka_unit_test(lines_that_are_nothing),
        cmocka_unit_test(a_key_given_twice),
        cmocka_unit_test(lines_beyond_the_parsers_buffer),
        cmocka_unit_test(names_up_to_49_bytes),
        cmocka_unit_test(files_and_their_size),
        cmocka_unit_test(overrides_win),
        cmocka_unit_test(what_a_program_sets_gives_way),
        cmocka_unit_test(no_file_at_all),
        cmocka_unit_test(the_effective_config_reads_back),
        cmocka_unit_test(help_and_documents_come_from_the_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
