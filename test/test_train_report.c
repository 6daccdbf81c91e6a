/* test_train_report.c: lines of JSON, the log of a run across sessions, and the comparison of configs. */
#include "common/json.h"
#include "test/unit.h"
#include "train/json_line.h"
#include "train/options.h"
#include "train/report.h"
#include "train/settings.h"

#include <math.h>
#include <unistd.h>

/* ---- json_line -------------------------------------------------------------------------------------------------- */

static json_t *parse_line(const struct json_line *l) {
    json_t *object = NULL;
    error err = {0};
    assert_int_equal(l->text[l->used], 0);
    assert_int_equal(l->text[l->used - 1], '\n');
    assert_null(memchr(l->text, '\n', l->used - 1));
    if (json_read_text(&object, l->text, l->used, "line", &err) != 0) fail_msg("%s: %s", err.text, l->text);
    return object;
}

static void test_line(void **state) {
    (void)state;
    struct json_line l;
    json_line_begin(&l);
    json_line_int(&l, "a", -7);
    json_line_real(&l, "b", 0.1);
    json_line_real(&l, "c", NAN);
    json_line_real(&l, "d", -INFINITY);
    json_line_bool(&l, "e", true);
    json_line_string(&l, "f", "x\"\\\n\t\x01/\xC3\xA9");
    json_line_real(&l, "g", 5e-324);
    json_line_end(&l);
    json_t *o = parse_line(&l);
    assert_int_equal(json_integer_value(json_object_get(o, "a")), -7);
    assert_true(json_real_value(json_object_get(o, "b")) == 0.1);
    assert_true(json_is_null(json_object_get(o, "c")) && json_is_null(json_object_get(o, "d")));
    assert_true(json_is_true(json_object_get(o, "e")));
    assert_string_equal(json_string_value(json_object_get(o, "f")), "x\"\\\n\t\x01/\xC3\xA9");
    assert_true(json_real_value(json_object_get(o, "g")) == 5e-324);
    json_decref(o);
}

static void test_line_bad_text(void **state) {
    (void)state;
    static const struct {
        const char *text, *want;
    } cases[] = {
        {"\xFF", "\xEF\xBF\xBD"},                                                 /* no UTF-8 at all */
        {"a\xC3", "a\xEF\xBF\xBD"},                                               /* cut off by the end */
        {"\xC0\xAF", "\xEF\xBF\xBD\xEF\xBF\xBD"},                                 /* an overlong slash */
        {"\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},                 /* a surrogate */
        {"\xF4\x90\x80\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"}, /* beyond Unicode */
        {"\xF0\x9F\x98\x80", "\xF0\x9F\x98\x80"},
        {"", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct json_line l;
        json_line_begin(&l);
        json_line_string(&l, "t", cases[i].text);
        json_line_end(&l);
        json_t *o = parse_line(&l);
        assert_string_equal(json_string_value(json_object_get(o, "t")), cases[i].want);
        json_decref(o);
    }
}

static void test_line_too_long(void **state) {
    (void)state;
    char *text = malloc(JSON_LINE + 10);
    int whole = 0, left_out = 0;
    for (size_t size = JSON_LINE - 2200; size < JSON_LINE + 8; size++) {
        memset(text, 'x', size);
        text[size] = '\0';
        if (size % 3 == 0) text[size - 1] = '\n'; /* two bytes more */
        struct json_line l;
        json_line_begin(&l);
        json_line_int(&l, "a", 1);
        json_line_string(&l, "text", text);
        json_line_string(&l, "again", text);
        for (int i = 0; i < 20; i++) json_line_real(&l, "a_number_behind_it", -1.2345678901234567e-300);
        json_line_bool(&l, "z", true);
        json_line_end(&l);
        json_error_t problem;
        json_t *o = json_loadb(l.text, l.used, 0, &problem); /* without our refusal of equal keys */
        if (!o) fail_msg("%s: %s", problem.text, l.text);
        const char *got = json_string_value(json_object_get(o, "text"));
        assert_true(got == NULL || strcmp(got, text) == 0); /* whole or not at all */
        assert_null(json_object_get(o, "again"));
        assert_true(json_is_true(json_object_get(o, "z")));
        whole += got != NULL;
        left_out += got == NULL;
        json_decref(o);
    }
    assert_true(whole > 50 && left_out > 50);
    free(text);
}

/* ---- the log ---------------------------------------------------------------------------------------------------- */

static void write_text(const char *path, const char *text) {
    error err = {0};
    assert_int_equal(file_write_all(path, text, strlen(text), &err), 0);
}

static void check_text(const char *path, const char *want) {
    char *text;
    size_t size;
    error err = {0};
    assert_int_equal(file_read_all(path, 1 << 20, &text, &size, &err), 0);
    assert_string_equal(text, want);
    free(text);
}

static const char log_text[] = "{\"type\":\"run\",\"step\":0}\n"
                               "{\"type\":\"step\",\"step\":1,\"loss\":5}\n"
                               "{\"type\":\"step\",\"step\":2,\"loss\":4}\n"
                               "{\"type\":\"valid\",\"step\":2,\"loss\":4.5}\n"
                               "{\"type\":\"save\",\"step\":2}\n"
                               "{\"type\":\"step\",\"step\":3,\"loss\":3}\n"
                               "{\"type\":\"valid\",\"step\":3,\"loss\":3.5}\n";

/* The log as it is after a session from `step` has opened it, given what was there before. */
static struct report_history reopen(const char *directory, const char *before, int64_t step, size_t kept) {
    char path[400], want[4096];
    error err = {0};
    struct report *r = NULL;
    struct report_history history, read_only;
    snprintf(path, sizeof path, "%s/log.jsonl", directory);
    write_text(path, before);
    assert_int_equal(report_read_history(directory, step, &read_only, &err), 0);
    check_text(path, before);
    assert_int_equal(report_open(&r, directory, step, 10, 5, "nats/byte", &history, &err), 0);
    assert_int_equal(history.valid_step, read_only.valid_step);
    report_close(r);
    snprintf(want, sizeof want, "%.*s", (int)kept, before);
    check_text(path, want);
    return history;
}

static size_t length_until(const char *what) { return (size_t)(strstr(log_text, what) - log_text); }

static void test_log_is_cut(void **state) {
    (void)state;
    char directory[256], damaged[1024];
    unit_directory(directory);
    size_t until_one = length_until("{\"type\":\"step\",\"step\":1"),
           until_three = length_until("{\"type\":\"step\",\"step\":3");
    assert_int_equal(reopen(directory, log_text, 0, until_one).valid_step, -1);
    struct report_history history = reopen(directory, log_text, 2, until_three);
    assert_int_equal(history.valid_step, 2);
    assert_true(history.valid_loss == 4.5);
    history = reopen(directory, log_text, 3, strlen(log_text));
    assert_true(history.valid_step == 3 && history.valid_loss == 3.5);
    reopen(directory, "", 3, 0);
    /* A last line without an end, and one that is none, go too. */
    snprintf(damaged, sizeof damaged, "%s{\"type\":\"step\",\"st", log_text);
    reopen(directory, damaged, 9, strlen(log_text));
    snprintf(damaged, sizeof damaged, "%s{\"type\":\"step\"}\n{\"type\":\"step\",\"step\":4}\n", log_text);
    reopen(directory, damaged, 9, strlen(log_text));
    snprintf(damaged, sizeof damaged, "%s}{\n{\"type\":\"step\",\"step\":4}\n", log_text);
    reopen(directory, damaged, 9, strlen(log_text));
    unit_directory_remove(directory);
}

static void test_no_log(void **state) {
    (void)state;
    char directory[256], path[400];
    error err = {0};
    struct report_history history;
    unit_directory(directory);
    assert_int_equal(report_read_history(directory, 5, &history, &err), 0);
    assert_int_equal(history.valid_step, -1);
    snprintf(path, sizeof path, "%s/log.jsonl", directory);
    assert_false(file_exists(path));
    unit_directory_remove(directory);
}

/* Standard error is for people; a test has no use for it. */
static int silence(void) {
    int kept = dup(2);
    assert_non_null(freopen("/dev/null", "w", stderr));
    return kept;
}

static void speak(int kept) {
    fflush(stderr);
    dup2(kept, 2);
    close(kept);
}

static void test_log_lines(void **state) {
    (void)state;
    char directory[256], path[400], *text;
    size_t size;
    error err = {0};
    struct report *r = NULL;
    struct report_history history;
    unit_directory(directory);
    assert_int_equal(report_open(&r, directory, 0, 10, 5, "nats/byte", &history, &err), 0);
    struct report_step step = {.step = 1,
                               .loss = 2.5,
                               .lr = 1e-3,
                               .grad_norm = 0.1,
                               .accuracy = 0.25,
                               .tokens = 64,
                               .valid = 64,
                               .batch = 4,
                               .samples_left = 36,
                               .step_seconds = 0.5,
                               .seconds = 0.5};
    struct report_step bad = {.step = 2, .batch = 4, .loss = NAN, .grad_norm = INFINITY, .skipped = true,
                              .skipped_total = 1};
    struct layer layer = {.block = 3, .block_name = "g"};
    struct report_solvers solvers = {.residual = 0.5, .layer = &layer, .iterations = 3, .raised = 2, .inexact = true};
    struct report_level level = {.step = 2, .first_step = 4, .layer = &layer, .residual = INFINITY,
                                 .level = SOLVER_MORE, .solver = {.method = CELL_SHOOTING, .iterations = 5}};
    bad.solvers = &solvers;
    struct evaluation e = {.loss = 2, .perplexity = exp(2), .bits_per_byte = NAN, .accuracy = 0.5, .tokens = 10};
    int kept = silence();
    assert_int_equal(report_step(r, &step, &err), 0);
    assert_int_equal(report_start(r, 1, 2.3456, &err), 0);
    assert_int_equal(report_step(r, &bad, &err), 0);
    assert_int_equal(report_level(r, &level, &err), 0);
    assert_int_equal(report_valid(r, 2, &e, 1.25, &err), 0);
    e.sequences = 4; /* a task's */
    e.solvers = 2;
    e.residual = 1e-6;
    e.sequential = 1;
    e.sequence_accuracy = 0.25;
    assert_int_equal(report_valid(r, 2, &e, 1, &err), 0);
    assert_int_equal(report_save(r, 2, "a/b", 0.5, &err), 0);
    assert_int_equal(report_memory(r, 2, 0, &err), 0); /* no GPU, no line */
    assert_int_equal(report_memory(r, 2, 1000, &err), 0);
    assert_int_equal(report_stop(r, 2, "SIGTERM", &err), 0);
    speak(kept);
    assert_int_equal(report_sync(r, &err), 0);
    report_close(r);
    snprintf(path, sizeof path, "%s/log.jsonl", directory);
    assert_int_equal(file_read_all(path, 1 << 20, &text, &size, &err), 0);
    assert_string_equal(
        text,
        "{\"type\":\"step\",\"step\":1,\"loss\":2.5,\"perplexity\":12.182493960703473,\"lr\":0.001,"
        "\"grad_norm\":0.1,\"accuracy\":0.25,\"tokens\":64,\"valid\":64,\"batch\":4,\"tokens_per_s\":128,"
        "\"flops_per_s\":0,\"skipped\":false,"
        "\"seconds\":0.5}\n"
        "{\"type\":\"start\",\"step\":1,\"seconds\":2.35}\n"
        "{\"type\":\"step\",\"step\":2,\"loss\":null,\"perplexity\":null,\"lr\":0,\"grad_norm\":null,\"accuracy\":0,"
        "\"tokens\":0,\"valid\":0,\"batch\":4,\"tokens_per_s\":0,\"flops_per_s\":0,\"skipped\":true,"
        "\"residual\":0.5,\"residual_block\":3,\"iterations\":3,\"raised\":2,\"seconds\":0}\n"
        "{\"type\":\"solver\",\"step\":2,\"block\":3,\"residual\":null,\"level\":\"more\",\"before\":\"chosen\","
        "\"first_step\":4,\"method\":\"shooting\",\"iterations\":5}\n"
        "{\"type\":\"valid\",\"step\":2,\"loss\":2,\"perplexity\":7.38905609893065,\"bits_per_byte\":null,"
        "\"accuracy\":0.5,\"tokens\":10,\"seconds\":1.25}\n"
        "{\"type\":\"valid\",\"step\":2,\"loss\":2,\"perplexity\":7.38905609893065,\"bits_per_byte\":null,"
        "\"accuracy\":0.5,\"tokens\":10,\"sequences\":4,\"sequence_accuracy\":0.25,\"residual\":1e-06,"
        "\"sequential\":1,\"seconds\":1}\n"
        "{\"type\":\"save\",\"step\":2,\"path\":\"a/b\",\"seconds\":0.5}\n"
        "{\"type\":\"memory\",\"step\":2,\"peak_bytes\":1000,\"planned_bytes\":0}\n"
        "{\"type\":\"stop\",\"step\":2,\"signal\":\"SIGTERM\"}\n");
    free(text);
    /* Ranks above 0 have no report. */
    assert_int_equal(report_step(NULL, &step, &err), 0);
    report_close(NULL);
    unit_directory_remove(directory);
}

/* ---- settings --------------------------------------------------------------------------------------------------- */

static config *bound(const char *text) {
    config *c = NULL;
    error err = {0};
    struct run_options o;
    assert_int_equal(config_parse(&c, text, strlen(text), "test.ini", &err), 0);
    if (run_options_bind(&o, c, &err) != 0) fail_msg("%s", err.text);
    return c;
}

static int noted;
static void count_note(const struct setting *saved, const struct setting *now) {
    assert_string_equal(saved->key, now->key);
    assert_string_not_equal(saved->value, now->value);
    noted++;
}

static int compare(const char *saved_text, const char *now_text, error *err) {
    config *saved = bound(saved_text), *now = bound(now_text);
    struct settings a, b;
    assert_int_equal(settings_of(&a, saved, err), 0);
    assert_int_equal(settings_of(&b, now, err), 0);
    noted = 0;
    int result = settings_compare(&a, &b, "run/step-5", count_note, err);
    settings_free(&a);
    settings_free(&b);
    config_free(saved);
    config_free(now);
    return result;
}

static void test_settings(void **state) {
    (void)state;
    error err = {0};
    config *c = bound("[train]\nout = a b = c\nsteps = 7\n[source.x]\npath = p\n");
    struct settings s;
    assert_int_equal(settings_of(&s, c, &err), 0);
    assert_string_equal(settings_find(&s, "train", "out"), "a b = c");
    assert_string_equal(settings_find(&s, "train", "steps"), "7");
    assert_string_equal(settings_find(&s, "train", "init"), ""); /* empty, but there */
    assert_string_equal(settings_find(&s, "source.x", "path"), "p");
    assert_null(settings_find(&s, "train", "path"));
    assert_null(settings_find(&s, "x", "path"));
    settings_free(&s);
    config_free(c);
}

static void test_compare(void **state) {
    (void)state;
    error err = {0};
    static const char plain[] = "[train]\nsteps = 7\n[data]\ntrain = d\n";
    assert_int_equal(compare(plain, plain, &err), 0);
    assert_int_equal(noted, 0);
    /* A key written out with its default is the same config. */
    assert_int_equal(compare(plain, "[train]\nsteps = 7\nbatch = 8\n[data]\ntrain = d\n", &err), 0);
    assert_int_equal(
        compare(plain,
                "[train]\nsteps = 7\nout = x\nlog_every = 3\nmicro_batch = 2\n[data]\ntrain = d\nthreads = 3\n"
                "ahead = 9\nvalid = v\n[eval]\nevery = 2\n[checkpoint]\nkeep = 9\n",
                &err),
        0);
    assert_int_equal(noted, 0);
    assert_int_equal(compare(plain, "[train]\nsteps = 8\n[data]\ntrain = moved\n[schedule]\nkind = constant\n", &err),
                     0);
    assert_int_equal(noted, 3);
    unit_expect(compare(plain, "[train]\nsteps = 8\nbatch = 16\n[data]\ntrain = d\n", &err), &err, ERROR_INPUT,
                "train.batch = 16 differs from the 8 of run/step-5, and can't change in a run that goes on; put it "
                "back, or start "
                "another run with train.init and another train.out");
    assert_int_equal(noted, 0); /* nothing is said of a start that is refused */
    assert_int_equal(compare(plain, "[optimizer]\nbeta1 = 0.8\n[train]\nsteps = 7\n[data]\ntrain = d\n", &err), -1);
    /* A recipe's numbers make the run what it is; the course of the learning rate may be changed on purpose. */
    static const char recipe[] = "[ramp]\nstages = 2*3\n[group.g]\nmatch = *.D\nlr_scale = 2\n";
    assert_int_equal(compare(recipe, recipe, &err), 0);
    assert_int_equal(compare(recipe, "[ramp]\nstages = 2*4\n[group.g]\nmatch = *.D\nlr_scale = 2\n", &err), -1);
    assert_non_null(strstr(err.text, "ramp.stages = 2*4 differs from the 2*3 of run/step-5"));
    assert_int_equal(compare(recipe, "[ramp]\nstages = 2*3\n[group.g]\nmatch = *.D\nlr_scale = 1\n", &err), -1);
    assert_int_equal(compare(recipe, "[ramp]\nstages = 2*3\n", &err), -1);
    assert_non_null(strstr(err.text, "group.g.match = *.D in run/step-5 is not in this config"));
    assert_int_equal(compare(plain, "[train]\nsteps = 7\n[data]\ntrain = d\n[optimizer]\ndecay_mode = detached\n",
                             &err),
                     -1);
    assert_int_equal(compare(plain, "[train]\nsteps = 7\n[data]\ntrain = d\n[schedule]\ncooldown = 3\n", &err), 0);
    assert_int_equal(noted, 1);
    /* A task's samples are data; only how many there are for validation may change. */
    static const char task[] = "[task.t]\nkind = parity\n[data]\ntrain = task:t\n";
    assert_int_equal(compare(task, "[task.t]\nkind = parity\nvalid_samples = 9\n[data]\ntrain = task:t\n", &err), 0);
    assert_int_equal(compare(task, "[task.t]\nkind = parity\nlength = 41\n[data]\ntrain = task:t\n", &err), -1);
    assert_non_null(strstr(err.text, "task.t.length = 41 differs from the 40 of run/step-5"));
    /* Sources: paths may move, weights and the set of them not. */
    static const char two[] = "[source.a]\npath = p\n[source.b]\npath = q\n";
    assert_int_equal(compare(two, "[source.a]\npath = p2\n[source.b]\npath = q\n", &err), 0);
    assert_int_equal(noted, 1);
    assert_int_equal(compare(two, "[source.a]\npath = p\nweight = 2\n[source.b]\npath = q\n", &err), -1);
    assert_int_equal(compare(two, "[source.a]\npath = p\n", &err), -1);
    assert_non_null(strstr(err.text, "source.b.weight = 1 in run/step-5 is not in this config"));
    assert_int_equal(compare("[source.a]\npath = p\n", two, &err), -1);
    assert_non_null(strstr(err.text, "source.b.weight = 1 is not in the config of run/step-5"));
}

/* What report_run says of FLOPs and the device's peak is what steps are held against. */
static void test_flops(void **state) {
    (void)state;
    char directory[256], *text;
    size_t size;
    error err = {0};
    struct report *r = NULL;
    struct report_history history;
    struct settings nothing = {0};
    struct model_flops flops[] = {{.block = "m", .layer = "mamba", .count = 24, .forward = 1e6},
                                  {.block = "", .layer = "head", .count = 1, .forward = 5e6}};
    struct report_run run = {.machine = "a chip", .precision = "bf16", .ranks = 1, .flops_per_sequence = 8e9,
                             .flops_per_token = 87e6, .flops = flops, .flop_kinds = 2, .peak_flops = 1e12,
                             .planned = 12, .config = &nothing};
    struct report_step step = {.step = 1, .loss = 1, .valid = 4, .tokens = 4, .batch = 20, .step_seconds = 0.5,
                               .seconds = 0.5};
    unit_directory(directory);
    assert_int_equal(report_open(&r, directory, 0, 10, 5, "nats/byte", &history, &err), 0);
    int kept = silence();
    assert_int_equal(report_run(r, &run, &err), 0);
    assert_int_equal(report_step(r, &step, &err), 0);
    speak(kept);
    report_close(r);
    assert_int_equal(file_read_all(unit_path(directory, "log.jsonl"), 1 << 20, &text, &size, &err), 0);
    assert_non_null(strstr(text, "\"training_flops_per_token\":87000000.0,\"flops\":{\"m mamba\":72000000.0,"
                                 "\"head\":15000000.0},\"peak_flops\":1000000000000.0,\"planned_bytes\":12,"));
    assert_non_null(strstr(text, "\"flops_per_s\":3.2e+11,\"mfu\":0.32,"));
    free(text);
    unit_directory_remove(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_line),       cmocka_unit_test(test_line_bad_text), cmocka_unit_test(test_line_too_long),
        cmocka_unit_test(test_log_is_cut), cmocka_unit_test(test_no_log),        cmocka_unit_test(test_log_lines),
        cmocka_unit_test(test_flops), cmocka_unit_test(test_settings),   cmocka_unit_test(test_compare),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
