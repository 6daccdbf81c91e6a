/* test_data_options.c: [data] and [source.NAME]: defaults, what is refused and in which words, opening what they
 * name. */
#include "data/data_options.h"
#include "test/support_corpus.h"
#include "test/unit.h"

static config *parse(const char *text) {
    config *c = NULL;
    error err = {.kind = ERROR_NONE};
    if (config_parse(&c, text, strlen(text), "test.ini", &err) != 0) fail_msg("%s", err.text);
    return c;
}

static config *bind(const char *text, struct data_options *o) {
    config *c = parse(text);
    error err = {.kind = ERROR_NONE};
    if (data_options_bind(c, o, &err) != 0 || config_finish(c, &err) != 0) fail_msg("%s", err.text);
    return c;
}

static void check_words(const error *err, const char *words) {
    assert_int_equal(err->kind, ERROR_INPUT);
    if (!strstr(err->text, words)) fail_msg("'%s' does not say '%s'", err->text, words);
}

static void check_bind_refused(const char *text, const char *words) {
    config *c = parse(text);
    struct data_options o;
    error err = {.kind = ERROR_NONE};
    assert_int_equal(data_options_bind(c, &o, &err), -1);
    check_words(&err, words);
    config_free(c);
}

static void check_open_refused(const char *text, const char *words) {
    struct data_options o;
    struct data_sources s;
    config *c = bind(text, &o);
    error err = {.kind = ERROR_NONE};
    assert_int_equal(data_sources_open(&s, &o, &err), -1);
    check_words(&err, words);
    config_free(c);
}

static void test_defaults(void **state) {
    (void)state;
    struct data_options o;
    config *c = bind("", &o);
    assert_string_equal(o.train, "");
    assert_string_equal(o.valid, "");
    assert_int_equal(o.source_count, 0);
    struct loader_options l = data_loader_options(&o);
    assert_true(l.T == 2048 && l.seed == 1 && l.shuffle && l.reset && l.threads == 1 && l.ahead == 4);
    assert_true(l.B == 1 && l.rank == 0 && l.ranks == 1 && l.start == 0 && l.memory == NULL);
    config_free(c);
}

static void test_values(void **state) {
    (void)state;
    struct data_options o;
    config *c =
        bind("[data]\nvalid = v\nseq_len = 512\nseed = 99\nshuffle = no\nreset = false\nthreads = 3\nahead = 8\n"
             "[source.books]\npath = b\nweight = 2.5\n[source.code.c]\npath = c\n",
             &o);
    struct loader_options l = data_loader_options(&o);
    assert_true(l.T == 512 && l.seed == 99 && !l.shuffle && !l.reset && l.threads == 3 && l.ahead == 8);
    assert_string_equal(o.valid, "v");
    assert_int_equal(o.source_count, 2);
    assert_string_equal(o.sources[0].name, "books");
    assert_string_equal(o.sources[0].path, "b");
    assert_true(o.sources[0].weight == 2.5);
    assert_string_equal(o.sources[1].name, "code.c");
    assert_true(o.sources[1].weight == 1);
    config_free(c);
}

static void test_refused_options(void **state) {
    (void)state;
    check_bind_refused("[data]\ntrain = a\n[source.x]\npath = b\n",
                       "data.train = a and section [source.x] both name training data");
    check_bind_refused("[source.x]\nweight = 1\n", "path");
    check_bind_refused("[source.x]\npath = b\nweight = 0\n", "weight");
    check_bind_refused("[source.x]\npath = b\nweight = -2\n", "weight");
    check_bind_refused("[source.]\npath = b\n", "section [source.] has no name");
    check_bind_refused("[data]\nseq_len = 0\n", "seq_len");
    check_bind_refused("[data]\nthreads = 0\n", "threads");
    check_bind_refused("[data]\nahead = 0\n", "ahead");
    check_bind_refused("[data]\nseed = -1\n", "seed");
    char many[64 * (LIMIT_SOURCES + 1)] = "";
    for (int i = 0; i <= LIMIT_SOURCES; i++) sprintf(many + strlen(many), "[source.s%d]\npath = p\n", i);
    check_bind_refused(many, "there are 65 [source.NAME] sections; at most 64");
}

static void test_opening(void **state) {
    (void)state;
    char directory[256], path[512], text[2048];
    unit_directory(directory);
    struct corpus a, b, stranger;
    snprintf(path, sizeof path, "%s/a", directory);
    corpus_make(&a, &(struct corpus_plan){.directory = path, .tokens = 100, .vocab = 300});
    snprintf(path, sizeof path, "%s/b", directory);
    corpus_make(&b, &(struct corpus_plan){.directory = path, .tokens = 200, .vocab = 300});
    snprintf(path, sizeof path, "%s/stranger", directory);
    corpus_make(&stranger,
                &(struct corpus_plan){.directory = path, .tokens = 50, .vocab = 300, .tokenizer_identity = 5});

    struct data_options o;
    struct data_sources s;
    error err = {.kind = ERROR_NONE};
    snprintf(text, sizeof text, "[data]\ntrain = %s/a\nvalid = %s/b\nseq_len = 10\n", directory, directory);
    config *c = bind(text, &o);
    if (data_sources_open(&s, &o, &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(s.count, 1);
    assert_string_equal(s.train[0].name, "train");
    assert_int_equal(row_source_get_info(s.train[0].rows)->shards->tokens, 100);
    assert_int_equal(row_source_get_info(s.valid)->shards->tokens, 200);
    loader *l;
    struct loader_options options = data_loader_options(&o);
    if (loader_open(&l, s.train, s.count, &options, &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(loader_samples(l, 0), 9);
    loader_close(l);
    data_sources_close(&s);
    config_free(c);

    snprintf(text, sizeof text, "[source.x]\npath = %s/a\nweight = 3\n[source.y]\npath = %s/b\n", directory,
             directory);
    c = bind(text, &o);
    if (data_sources_open(&s, &o, &err) != 0) fail_msg("%s", err.text);
    assert_true(s.count == 2 && s.valid == NULL && s.train[0].weight == 3 && s.train[1].weight == 1);
    assert_string_equal(s.train[1].name, "y");
    assert_int_equal(row_source_get_info(s.train[1].rows)->shards->tokens, 200);
    data_sources_close(&s);
    config_free(c);

    check_open_refused("", "no training data: give data.train, or [source.NAME] sections");
    snprintf(text, sizeof text, "[data]\nvalid = %s/b\n", directory);
    check_open_refused(text, "no training data");
    check_open_refused("[source.x]\npath =\n", "source.x.path is empty");
    snprintf(text, sizeof text, "[data]\ntrain = %s/none\n", directory);
    check_open_refused(text, "data.train: ");
    snprintf(text, sizeof text, "[data]\ntrain = %s/a\nvalid = %s/none\n", directory, directory);
    check_open_refused(text, "data.valid: ");
    snprintf(text, sizeof text, "[source.x]\npath = %s/a\n[source.y]\npath = %s/none\n", directory, directory);
    check_open_refused(text, "source.y.path: ");
    snprintf(text, sizeof text, "[source.x]\npath = %s/a\n[source.y]\npath = %s/stranger\n", directory, directory);
    check_open_refused(text, "stranger were made with different tokenizers");
    snprintf(text, sizeof text, "[data]\ntrain = %s/a\nvalid = %s/stranger\n", directory, directory);
    check_open_refused(text, "stranger were made with different tokenizers");
    corpus_free(&a);
    corpus_free(&b);
    corpus_free(&stranger);
    unit_directory_remove(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_refused_options),
        cmocka_unit_test(test_opening),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
