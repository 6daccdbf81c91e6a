/* support_options.c: see support_options.h. */
#include "test/unit.h"

#include "test/support_options.h"

int options_bind(const char *text, struct run_options *o, error *err) {
    config *c = NULL;
    assert_int_equal(config_parse(&c, text, strlen(text), "test.ini", err), 0);
    int result = run_options_bind(o, c, err);
    config_free(c);
    return result;
}

void options_refused(const char *text, const char *words) {
    struct run_options o;
    error err = {0};
    assert_int_equal(options_bind(text, &o, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    if (!strstr(err.text, words)) fail_msg("'%s' does not say '%s'", err.text, words);
}
