/* fuzz_run_config.c: any bytes as the config of a run and overrides, through all its tables: options, groups, ramp,
 * tasks, pattern and mixers. */
#include "data/tokenizer.h"
#include "model/model.h"
#include "test/fuzz/config_text.h"
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
    fuzz_config(data, size, bind_run);
    return 0;
}
