/* fuzz_checkpoint.c: any bytes as one file of a checkpoint, which the first byte chooses; trainer.json's checksums are
 * put right, so that what lies behind them is reached. Also the index of a directory whose weights are in several
 * files.
 * It is refused, or it loads: model and optimizer. */
#include "common/file.h"
#include "common/json.h"
#include "test/fuzz/fuzz.h"
#include "train/checkpoint_internal.h"
#include <inttypes.h>
#include <xxhash.h>

static const char base_config[] = "[model]\nd_model = 4\npattern = m\nvocab_size = 0\n"
                                  "[block.m]\nmixer = mamba2\nd_state = 2\nhead_dim = 4\nchunk = 4\n";

static const char *const names[] = {"config.json",    "model.safetensors",     "config.ini", "optimizer.safetensors",
                                    "tokenizer.json", "tokenizer_config.json", "trainer.json"};
enum { FILES = sizeof names / sizeof *names, MANIFEST = FILES - 1, INDEX = FILES };

struct base {
    char run[256], own[300], foreign[300];
    char *files[FILES];
    size_t sizes[FILES];
    struct model *model;
    struct optimizer *optimizer;
    struct comm comm;
};

static void open_model(struct base *b, config **c, tokenizer **t) {
    static const struct optimizer_options options = {.lr = 0.001, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    struct model_config *mc;
    struct device *dev;
    error err = {0};
    check(comm_open(&b->comm, &err) == 0 && tokenizer_open(t, TOKENIZER_BYTES, &err) == 0);
    check(config_parse(c, base_config, strlen(base_config), "fuzz", &err) == 0);
    check(model_config_bind(&mc, *c, tokenizer_vocab(*t), &err) == 0);
    check(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err) == 0);
    check(model_open(&b->model, mc, dev, MODEL_TRAIN, 1, 4, 0, 1, &err) == 0);
    check(optimizer_open(&b->optimizer, b->model, &b->comm, &options, &err) == 0);
    model_init(b->model, 1);
}

/* A checkpoint, and beside it a directory with its config.json and weights under another name. */
static struct base *make_base(void) {
    struct base *b = calloc(1, sizeof *b);
    struct trainer_state state = {.step = 1, .optimizer_steps = 1, .samples = 2, .tokens = 8, .best_valid = 1.5};
    config *c;
    tokenizer *t;
    char path[400];
    error err = {0};
    check(b != NULL);
    open_model(b, &c, &t);
    fuzz_directory(b->run);
    check(checkpoint_save(b->run, &state, b->model, b->optimizer, c, t, &b->comm, 0, &err) == 0);
    snprintf(b->own, sizeof b->own, "%s/step-00000001", b->run);
    snprintf(b->foreign, sizeof b->foreign, "%s/foreign", b->run);
    check(file_make_directories(b->foreign, &err) == 0);
    for (int i = 0; i < FILES; i++) {
        snprintf(path, sizeof path, "%s/%s", b->own, names[i]);
        check(file_read_all(path, 1 << 24, &b->files[i], &b->sizes[i], &err) == 0);
    }
    snprintf(path, sizeof path, "%s/config.json", b->foreign);
    fuzz_write(path, b->files[0], b->sizes[0]);
    snprintf(path, sizeof path, "%s/part-1.safetensors", b->foreign);
    fuzz_write(path, b->files[1], b->sizes[1]);
    config_free(c);
    tokenizer_close(t);
    return b;
}

static json_t *hash_text(const void *bytes, size_t size) {
    char text[20];
    snprintf(text, sizeof text, "%016" PRIx64, (uint64_t)XXH64(bytes, size, 0));
    return json_string(text);
}

/* trainer.json with the size and checksum of file `i`, and its own. The bytes as they are if they are no object. */
static void write_manifest(const struct base *b, int i, const char *bytes, size_t size) {
    char path[400];
    const char *text = i == MANIFEST ? bytes : b->files[MANIFEST];
    json_t *object = json_loadb(text, i == MANIFEST ? size : b->sizes[MANIFEST], JSON_REJECT_DUPLICATES, NULL);
    snprintf(path, sizeof path, "%s/trainer.json", b->own);
    if (!json_is_object(object)) {
        fuzz_write(path, bytes, size);
        json_decref(object);
        return;
    }
    json_t *file = i == MANIFEST ? NULL : json_object_get(json_object_get(object, "files"), names[i]);
    if (file) {
        json_object_set_new(file, "size", json_integer((json_int_t)size));
        json_object_set_new(file, "xxh64", hash_text(bytes, size));
    }
    json_object_del(object, "xxh64");
    char *compact = json_dumps(object, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (compact) json_object_set_new(object, "xxh64", hash_text(compact, strlen(compact)));
    char *whole = json_dumps(object, 0);
    if (whole) fuzz_write(path, whole, strlen(whole));
    free(compact);
    free(whole);
    json_decref(object);
}

static void try_directory(struct base *b, const char *path) {
    struct checkpoint *c;
    tokenizer *t;
    error err = {0};
    if (checkpoint_open(&c, path, &err) != 0) {
        check_refusal(&err);
        return;
    }
    if (checkpoint_tokenizer(c, &t, &err) == 0) tokenizer_close(t);
    else check_refusal(&err);
    if (checkpoint_load_model(c, b->model, &err) != 0) check_refusal(&err);
    else if (checkpoint_load_optimizer(c, b->optimizer, &b->comm, &err) != 0) check_refusal(&err);
    checkpoint_close(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct base *b;
    char path[400];
    if (!b) b = make_base();
    if (size == 0) return 0;
    int i = data[0] % (FILES + 1);
    const char *bytes = (const char *)data + 1;
    if (i == INDEX) {
        snprintf(path, sizeof path, "%s/model.safetensors.index.json", b->foreign);
        fuzz_write(path, bytes, size - 1);
        try_directory(b, b->foreign);
        return 0;
    }
    snprintf(path, sizeof path, "%s/%s", b->own, names[i]);
    if (i != MANIFEST) fuzz_write(path, bytes, size - 1);
    write_manifest(b, i, bytes, size - 1);
    try_directory(b, b->own);
    fuzz_write(path, b->files[i], b->sizes[i]);
    return 0;
}
