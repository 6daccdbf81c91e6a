/* support_architecture.c: see support_architecture.h. */
#include "test/unit.h"

#include "test/support_architecture.h"

struct bound bound_text(const char *text, const char *override) {
    struct bound b;
    error err = {0};
    assert_int_equal(config_parse(&b.c, text, strlen(text), "test", &err), 0);
    if (override) assert_int_equal(config_override(b.c, override, &err), 0);
    if (model_config_bind(&b.mc, b.c, 0, &err) != 0) fail_msg("%s", err.text);
    return b;
}

struct bound bound_json(const json_t *object) {
    struct bound b;
    error err = {0};
    assert_int_equal(config_load(&b.c, NULL, &err), 0);
    if (architecture_read(object, "c.json", b.c, &err) != 0) fail_msg("%s", err.text);
    if (model_config_bind(&b.mc, b.c, 0, &err) != 0) fail_msg("%s", err.text);
    assert_int_equal(config_finish(b.c, &err), 0);
    return b;
}

static json_t *altered(const char *text, const char *key, const char *value) {
    json_t *object, *member = NULL;
    error err = {0};
    assert_int_equal(json_read_text(&object, text, strlen(text), "base", &err), 0);
    if (value) {
        json_error_t problem;
        member = json_loads(value, JSON_DECODE_ANY, &problem);
        assert_non_null(member);
    }
    if (member) json_object_set_new(object, key, member);
    else if (key) json_object_del(object, key);
    return object;
}

struct bound bound_altered(const char *json, const char *key, const char *value) {
    json_t *object = altered(json, key, value);
    struct bound b = bound_json(object);
    json_decref(object);
    return b;
}

void unbind(struct bound *b) {
    model_config_free(b->mc);
    config_free(b->c);
}

void expect_same_tensors(const struct model_config *a, const struct model_config *b) {
    assert_int_equal(a->params.count, b->params.count);
    for (int i = 0; i < a->params.count; i++) {
        const struct param *x = &a->params.list[i], *y = &b->params.list[i];
        assert_string_equal(x->name, y->name);
        assert_int_equal(x->ndim, y->ndim);
        assert_memory_equal(x->dim, y->dim, (size_t)x->ndim * sizeof *x->dim);
    }
}

struct journey journey_begin(const char *text, const char *override) {
    struct journey j = {.there = bound_text(text, override)};
    j.object = architecture_write(j.there.mc, j.there.c, 0);
    j.back = bound_json(j.object);
    expect_same_tensors(j.there.mc, j.back.mc);
    assert_int_equal(j.back.mc->rows, j.there.mc->rows);
    assert_true(j.back.mc->options.norm_eps == j.there.mc->options.norm_eps);
    assert_true(j.back.mc->options.tie_embeddings == j.there.mc->options.tie_embeddings);
    return j;
}

void journey_end(struct journey *j) {
    unbind(&j->back);
    json_decref(j->object);
    unbind(&j->there);
}

void expect_written(const struct bound *b, int64_t eod, const char *json) {
    json_t *object = architecture_write(b->mc, b->c, eod), *wanted;
    error err = {0};
    assert_int_equal(json_read_text(&wanted, json, strlen(json), "wanted", &err), 0);
    if (!json_equal(object, wanted)) fail_msg("%s", json_dumps(object, 0));
    json_decref(wanted);
    json_decref(object);
}

void expect_no_class(const char *text, const char *const *changes, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++) {
        struct journey j = journey_begin(text, changes[i]);
        assert_null(architecture_class(j.there.mc));
        if (name) assert_true(params_find(&j.there.mc->params, name) > 0);
        journey_end(&j);
    }
}

void expect_refused(const char *json, const struct refusal *cases, size_t count) {
    for (size_t i = 0; i < count; i++) {
        json_t *object = altered(json, cases[i].key, cases[i].value);
        config *c;
        error err = {0};
        assert_int_equal(config_load(&c, NULL, &err), 0);
        unit_expect(architecture_read(object, "c.json", c, &err), &err, ERROR_INPUT, cases[i].sentence);
        config_free(c);
        json_decref(object);
    }
}
