/* test_model_architecture_own.c: config.json of models that no other software has: they come back whole, bring their
 * Python with them, and what is no such file is refused. */
#include "test/unit.h"

#include "model/mlp.h"
#include "test/support_architecture.h"

static const char own_text[] = "[model]\nd_model = 16\nvocab_size = 30\npattern = (m a)*2 m\n"
                               "[block.m]\nmixer = mamba2\nd_state = 4\nhead_dim = 8\nmlp = swiglu\nmlp_width = 24\n"
                               "[block.a]\nmixer = mamba2\nd_state = 6\nhead_dim = 8\nn_groups = 2\n";

static void what_transformers_lacks_comes_back_too(void **state) {
    (void)state;
    struct bound b = bound_text(own_text, NULL);
    assert_null(architecture_class(b.mc));
    json_t *object = architecture_write(b.mc, b.c, 29);
    assert_string_equal(json_string_value(json_object_get(object, "model_type")), "riverrun");
    assert_int_equal(json_integer_value(json_object_get(object, "vocab_size")), 32);
    assert_int_equal(json_integer_value(json_object_get(object, "eos_token_id")), 29);
    json_t *settings = json_object_get(object, "settings"), *block = json_object_get(settings, "block.a");
    assert_true(json_is_true(json_object_get(json_object_get(settings, "model"), "tie_embeddings")));
    assert_string_equal(json_string_value(json_object_get(block, "mixer")), "mamba2");
    assert_int_equal(json_integer_value(json_object_get(block, "d_state")), 6);
    assert_true(json_real_value(json_object_get(block, "dt_max")) == 0.1);
    struct bound r = bound_json(object);
    expect_same_tensors(b.mc, r.mc);
    char *before = config_text(b.c), *after = config_text(r.c);
    assert_string_equal(before, after);
    free(before);
    free(after);
    unbind(&r);
    json_decref(object);
    unbind(&b);
    /* The number of ids, where the tokenizer gave it. */
    error err = {0};
    assert_int_equal(config_parse(&b.c, own_text, strlen(own_text), "test", &err), 0);
    assert_int_equal(config_override(b.c, "model.vocab_size=0", &err), 0);
    assert_int_equal(model_config_bind(&b.mc, b.c, 20, &err), 0);
    object = architecture_write(b.mc, b.c, 19);
    r = bound_json(object);
    assert_int_equal(r.mc->vocab, 20);
    unbind(&r);
    json_decref(object);
    unbind(&b);
}

/* Files of Python that name each other and the classes in config.json; none where transformers has a class. */
static void what_transformers_lacks_has_python(void **state) {
    (void)state;
    struct bound b = bound_text(own_text, NULL);
    json_t *object = architecture_write(b.mc, b.c, 29), *classes = json_object_get(object, "auto_map"), *class;
    const char *key;
    json_object_foreach(classes, key, class) {
        char file[64], *dot, wanted[80];
        assert_true(strlen(json_string_value(class)) < sizeof file);
        strcpy(file, json_string_value(class));
        assert_non_null(dot = strchr(file, '.'));
        snprintf(wanted, sizeof wanted, "class %s(", dot + 1);
        strcpy(dot, ".py");
        const struct architecture_file *f = architecture_files(b.mc);
        while (f->name && strcmp(f->name, file) != 0) f++;
        assert_non_null(f->name);
        assert_non_null(strstr(f->text, wanted));
        assert_int_equal(f->text[strlen(f->text) - 1], '\n');
    }
    assert_int_equal(json_object_size(classes), 3);
    json_decref(object);
    unbind(&b);
    b = bound_text("[model]\nd_model = 8\nvocab_size = 9\npattern = s\n[block.s]\nmixer = mamba\n", NULL);
    assert_non_null(architecture_class(b.mc));
    assert_null(architecture_files(b.mc)->name);
    unbind(&b);
}

/* The Python knows every mixer and every MLP. Cells it may lack, and then says so. */
static void every_layer_has_python(void **state) {
    (void)state;
    struct bound b = bound_text(own_text, NULL);
    const struct architecture_file *f = architecture_files(b.mc);
    while (strcmp(f->name, "mixers_riverrun.py") != 0) f++;
    const char *mixers = strstr(f->text, "MIXERS = {"), *mlps = strstr(f->text, "ACTIVATIONS = {");
    char entry[80];
    assert_non_null(mixers);
    assert_non_null(mlps);
    for (int i = 0; mixer_names[i]; i++) {
        snprintf(entry, sizeof entry, "\"%s\": ", mixer_names[i]);
        assert_non_null(strstr(mixers, entry));
    }
    for (int i = MLP_NONE + 1; mlp_names[i]; i++) {
        snprintf(entry, sizeof entry, "\"%s\": ", mlp_names[i]);
        assert_non_null(strstr(mlps, entry));
    }
    unbind(&b);
}

#define LONG_NAME "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" /* 69 */

/* A config.json is anybody's file: names must not reach the config unchecked. */
static void strange_settings_are_refused(void **state) {
    (void)state;
    static const char *const texts[] = {
        "{\"model_type\": \"riverrun\"}",
        "{\"model_type\": \"riverrun\", \"settings\": []}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": 1}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {}, \"train\": {}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {}, \"block.\": {}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {}, \"block.a b\": {}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {}, \"block.m\": []}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {\"\": \"1\"}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {\"a=b\": \"1\"}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {\"d_model\": null}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {\"d_model\": [1]}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {\"" LONG_NAME "\": \"1\"}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {}, \"block." LONG_NAME "\": {\"mlp\": \"none\"}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {\"pattern\": \"a\\nb\"}}}",
        "{\"model_type\": \"riverrun\", \"settings\": {\"model\": {\"pattern\": \"a ; b\"}}}",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        json_t *object;
        config *c;
        error err = {0};
        assert_int_equal(json_read_text(&object, texts[i], strlen(texts[i]), "c.json", &err), 0);
        assert_int_equal(config_load(&c, NULL, &err), 0);
        assert_int_equal(architecture_read(object, "c.json", c, &err), -1);
        assert_int_equal(err.kind, ERROR_INPUT);
        config_free(c);
        json_decref(object);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_transformers_lacks_comes_back_too),
        cmocka_unit_test(what_transformers_lacks_has_python),
        cmocka_unit_test(every_layer_has_python),
        cmocka_unit_test(strange_settings_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
