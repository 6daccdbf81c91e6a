/* fuzz_run_config.c: any text as the config of a run, with overrides behind it as in fuzz_config.c, through all its
 * tables: options, groups, ramp, tasks, pattern and mixers. What is accepted is printed as a config that means the
 * same. */
#include "data/tokenizer.h"
#include "model/model.h"
#include "test/fuzz/fuzz.h"
#include "train/groups.h"
#include "train/options.h"

/* The effective config; NULL with *err filled. */
static char *bind_run(config *c, error *err) {
    struct run_options *o = calloc(1, sizeof *o);
    struct model_config *mc = NULL;
    char *text = NULL;
    check(o != NULL);
    int result = run_options_bind(o, c, err);
    if (result == 0) result = model_config_bind(&mc, c, BYTES_VOCAB, err);
    if (result == 0) result = config_finish(c, err);
    if (result == 0) result = groups_check(&mc->params, &o->optimizer, err);
    if (result == 0) {
        int64_t micro, accumulate;
        error ignored = {0};
        if (run_options_split(o, 2, &micro, &accumulate, &ignored) != 0) check_refusal(&ignored);
        else check(micro >= 1 && accumulate >= 1 && micro * accumulate * 2 == o->train.batch);
        double lr = schedule_lr(&o->schedule, o->optimizer.lr, o->train.steps, o->train.steps / 2);
        check(lr >= 0 && lr < 1e300);
        check(model_check_batch(mc, 1, 1, &ignored) == 0);
        text = config_text(c);
        check(text != NULL);
    }
    model_config_free(mc);
    free(o);
    return text;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *text = (const char *)data, *end = text + size;
    const char *stop = size ? memchr(text, 0, size) : NULL;
    config *c, *again;
    error err = {0};
    if (config_parse(&c, text, stop ? (size_t)(stop - text) : size, "fuzz", &err) != 0) {
        check_refusal(&err);
        return 0;
    }
    for (const char *at = stop ? stop + 1 : end; at < end; at = stop + 1) {
        stop = memchr(at, 0, (size_t)(end - at));
        if (!stop) break;
        if (config_override(c, at, &err) != 0) check_refusal(&err);
    }
    char *first = bind_run(c, &err);
    if (first) {
        check(config_parse(&again, first, strlen(first), "again", &err) == 0);
        char *second = bind_run(again, &err);
        check(second && strcmp(first, second) == 0);
        free(second);
        config_free(again);
    } else {
        check_refusal(&err);
    }
    free(first);
    config_free(c);
    return 0;
}
