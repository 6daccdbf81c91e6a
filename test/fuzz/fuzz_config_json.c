/* fuzz_config_json.c: any bytes as a model's config.json. Besides what the sanitizers see: a refusal is bad input with
 * a sentence, and a model that can be made of it is written as a config.json from which the same tensors come back. */
#include "test/fuzz/fuzz.h"
#include "train/checkpoint_internal.h"

#include <sys/mman.h>
#include <unistd.h>

/* A config from an object, bound; NULL if it is refused. */
static struct model_config *read_model(const json_t *object, config **c) {
    error err = {0};
    struct model_config *mc = NULL;
    check(config_load(c, NULL, &err) == 0);
    int result = architecture_read(object, "fuzz", *c, &err);
    if (result == 0) result = model_config_bind(&mc, *c, BYTES_VOCAB, &err);
    check(result == 0 || (err.kind == ERROR_INPUT && err.text[0]));
    return mc;
}

static void expect_same(const struct params *a, const struct params *b) {
    check(a->count == b->count);
    for (int i = 0; i < a->count; i++) {
        check(strcmp(a->list[i].name, b->list[i].name) == 0 && a->list[i].ndim == b->list[i].ndim);
        check(memcmp(a->list[i].dim, b->list[i].dim, (size_t)a->list[i].ndim * sizeof *a->list[i].dim) == 0);
    }
}

static void go_round(const json_t *object) {
    config *c, *again;
    struct model_config *mc = read_model(object, &c);
    if (mc) {
        json_t *written = architecture_write(mc, c, 256);
        struct model_config *back = read_model(written, &again);
        check(back != NULL);
        expect_same(&mc->params, &back->params);
        model_config_free(back);
        config_free(again);
        json_decref(written);
    }
    model_config_free(mc);
    config_free(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    check(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    json_t *object;
    error err = {0};
    if (checkpoint_read_config_json(&object, path, &err) == 0) {
        go_round(object);
        json_decref(object);
    } else {
        check(err.kind == ERROR_INPUT && err.text[0] && !object);
    }
    close(fd);
    return 0;
}
