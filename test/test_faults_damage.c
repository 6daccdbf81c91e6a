/* test_faults_damage.c: the program's commands on files that were cut or have one bit flipped, at keyed places. Each
 * ends with exit code 2 and one sentence that names the file, and what is there stays as it is; or, where the damage
 * has no effect, with the very result of the whole file. Files without checksums (a config, other software's weights,
 * the log) can be damaged without being broken: there the command may also succeed with what they now say. Every byte
 * of a shard and every length is test_data_shard_damage.c's matter. FAULTS=all tries ten times as many places. */
#include "test/unit.h"

#include "common/rng.h"
#include "test/support_faults.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum damage_verdict {
    REFUSED,  /* or without effect */
    READABLE, /* may also be another, sound file */
    MENDED,   /* never refused */
};

struct damage_scene {
    struct fault_scene scene;
    const char *file; /* the one that is damaged */
    enum damage_verdict verdict;
};

static char directory[256];

/* ---- damage ------------------------------------------------------------------------------------------------------ */

static off_t size_of(const char *path) {
    struct stat about;
    assert_int_equal(stat(path, &about), 0);
    return about.st_size;
}

static void cut_at(const char *path, uint64_t size) {
    assert_int_equal(truncate(path, (off_t)size), 0);
}

static void flip(const char *path, uint64_t bit) {
    unsigned char byte;
    int descriptor = open(path, O_RDWR);
    assert_true(descriptor >= 0 && pread(descriptor, &byte, 1, (off_t)(bit / 8)) == 1);
    byte ^= (unsigned char)(1 << bit % 8);
    assert_int_equal(pwrite(descriptor, &byte, 1, (off_t)(bit / 8)), 1);
    close(descriptor);
}

/* ---- judging ----------------------------------------------------------------------------------------------------- */

/* Without the lock, which every session writes anew. */
static uint64_t everything(void) {
    faults_shell("rm -f w/run/lock");
    return faults_digest("w", true);
}

/* Whether all went as it must; if not, it is told. */
static bool attempt(const struct damage_scene *d, const struct fault_whole *whole, const char *what, int *code) {
    const char *base = strrchr(d->file, '/'), *reasons[] = {base ? base + 1 : d->file, NULL};
    bool train = d->scene.result == FAULT_RUN;
    char name[300];
    snprintf(name, sizeof name, "%s, %s %s", d->scene.name, d->file, what);
    uint64_t before = everything();
    *code = faults_run(d->scene.words, NULL);
    const char *wrong = NULL;
    if (*code != 0 && *code != 2) wrong = "neither success nor a refusal";
    else if (*code == 2 && d->verdict == MENDED) wrong = "refused";
    else if (*code == 2 && !faults_has_sentence(name, reasons)) return false;
    /* A training run that comes upon damage on its way has made its directory by then. */
    else if (*code == 2 && !train && everything() != before) wrong = "something is left behind";
    else if (*code == 0 && d->verdict == REFUSED && faults_digest("stdout", true) != whole->output)
        wrong = "exit code 0, but the output is another";
    else if (*code == 0 && d->verdict != READABLE && d->scene.result == FAULT_TREE &&
             faults_digest("w/out", false) != whole->after)
        wrong = "exit code 0, but the result is another";
    else if (*code == 0 && d->verdict != READABLE && train && faults_run_digest("w/run") != whole->after)
        wrong = "exit code 0, but the run is another";
    if (!wrong) return true;
    print_error("%s: exit code %d: %s\n", name, *code, wrong);
    faults_shell("tail -n 5 stderr >&2");
    return false;
}

#if defined __SANITIZE_ADDRESS__
enum { PLACES = 3 };
#else
enum { PLACES = 8 };
#endif

static void damage(const struct damage_scene *d, uint32_t stream) {
    struct fault_whole whole = faults_undisturbed(&d->scene);
    unsigned places = PLACES * (faults_all() ? 10 : 1), refused = 0, wrong = 0, tried = 0;
    rng_key key = {.seed = 2, .purpose = RNG_TEST, .stream = stream};
    for (unsigned i = 0; i < 2 * places; i++) {
        char what[64];
        int code;
        faults_prepare(&d->scene);
        uint64_t size = (uint64_t)size_of(d->file), at;
        assert_true(size > 0);
        if (i % 2) {
            at = rng_below(key, i, 8 * size);
            flip(d->file, at);
            snprintf(what, sizeof what, "with bit %llu flipped", (unsigned long long)at);
        } else {
            at = i == 0 ? 0 : i == 2 ? size - 1 : rng_below(key, i, size);
            cut_at(d->file, at);
            snprintf(what, sizeof what, "cut to %llu bytes", (unsigned long long)at);
        }
        wrong += !attempt(d, &whole, what, &code);
        refused += code == 2;
        tried++;
    }
    print_message("%s, %s: %u tried, %u refused\n", d->scene.name, d->file, tried, refused);
    assert_int_equal(wrong, 0);
    if (d->verdict == REFUSED) assert_true(10 * refused >= 8 * tried);
}

/* ---- checkpoints of riverrun's own ------------------------------------------------------------------------------- */

static const char *const own_files[] = {"config.json",    "generation_config.json", "model.safetensors",
                                        "tokenizer.json", "tokenizer_config.json",  "config.ini",
                                        "trainer.json",   "optimizer.safetensors"};

static void checkpoints(void **state) {
    (void)state;
    static const struct fault_scene export = {.name = "export", .base = "halfway", .result = FAULT_TREE,
                                              .words = {"export", "w/run", "--out", "w/out"}};
    static const struct fault_scene going_on = {.name = "train, going on", .base = "halfway", .result = FAULT_RUN,
                                                .words = {"train", "c.ini", "train.out=w/run"}};
    for (uint32_t i = 0; i < sizeof own_files / sizeof *own_files; i++) {
        char file[200];
        snprintf(file, sizeof file, "w/run/step-00000002/%s", own_files[i]);
        struct damage_scene d = {.scene = export, .file = file};
        damage(&d, i);
        d.scene = going_on;
        damage(&d, 20 + i);
    }
}

/* What docs/training.md says of a damaged latest checkpoint: the run does not go on from another on its own; once
 * `latest` points to the one before, it does, and ends where it would have. */
static void a_damaged_latest_checkpoint(void **state) {
    (void)state;
    static const struct fault_scene scene = {.name = "set back", .base = "halfway", .result = FAULT_RUN,
                                             .words = {"train", "c.ini", "train.out=w/run", "checkpoint.keep=0"}};
    static const char *const reasons[] = {"step-00000004/model.safetensors is damaged", NULL};
    static const char *const further[] = {"train", "c.ini", "train.out=w/run", "checkpoint.keep=0", "train.steps=6",
                                          NULL};
    faults_prepare(&scene);
    assert_int_equal(faults_run(scene.words, NULL), 0);
    assert_int_equal(faults_run(further, NULL), 0);
    uint64_t whole = faults_run_digest("w/run");
    faults_prepare(&scene);
    assert_int_equal(faults_run(scene.words, NULL), 0);
    flip("w/run/step-00000004/model.safetensors", 8 * 5000 + 3);
    uint64_t before = everything();
    assert_int_equal(faults_run(further, NULL), 2);
    assert_true(faults_has_sentence(scene.name, reasons));
    assert_true(everything() == before);
    faults_shell("ln -sfn step-00000002 w/run/latest");
    assert_int_equal(faults_run(further, NULL), 0);
    assert_true(faults_run_digest("w/run") == whole);
}

/* ---- other files ------------------------------------------------------------------------------------------------- */

static const struct damage_scene others[] = {
    {{.name = "import", .base = "sets", .result = FAULT_TREE, .words = {"import", "w/hf", "--out", "w/out"}},
     "w/hf/config.json", READABLE},
    {{.name = "import", .base = "sets", .result = FAULT_TREE, .words = {"import", "w/hf", "--out", "w/out"}},
     "w/hf/model.safetensors", READABLE},
    {{.name = "import", .base = "sets", .result = FAULT_TREE,
      .words = {"import", "w/hf", "--out", "w/out", "--tokenizer", "w/hf/tokenizer.json"}},
     "w/hf/tokenizer.json", READABLE},
    {{.name = "shards verify", .base = "sets", .result = FAULT_OUTPUT, .words = {"shards", "verify", "w/data"}},
     "w/data/shard-00001.rrs", REFUSED},
    {{.name = "shards cat", .base = "sets", .result = FAULT_OUTPUT, .words = {"shards", "cat", "w/data"}},
     "w/data/shard-00001.rrs", REFUSED},
    {{.name = "shards info", .base = "sets", .result = FAULT_OUTPUT, .words = {"shards", "info", "w/data"}},
     "w/data/tokenizer.json", REFUSED},
    {{.name = "eval", .base = "sets", .result = FAULT_OUTPUT, .words = {"eval", "run", "--data", "w/valid"}},
     "w/valid/shard-00000.rrs", REFUSED},
    {{.name = "train", .base = "sets", .result = FAULT_RUN,
      .words = {"train", "c.ini", "train.out=w/run", "data.train=w/data/shard-00000.rrs"}},
     "w/data/shard-00000.rrs", REFUSED},
    {{.name = "tokenize", .base = "sets", .result = FAULT_TREE, .words = {"tokenize", "--out", "w/out", "w/text.zst"}},
     "w/text.zst", REFUSED},
    {{.name = "tokenize", .base = "sets", .result = FAULT_TREE, .words = {"tokenize", "--out", "w/out", "w/text.gz"}},
     "w/text.gz", REFUSED},
    {{.name = "tokenize", .base = "sets", .result = FAULT_TREE,
      .words = {"tokenize", "--out", "w/out", "--tokenizer", "w/hf/tokenizer.json", "text"}},
     "w/hf/tokenizer.json", READABLE},
    {{.name = "plan", .base = "sets", .result = FAULT_OUTPUT, .words = {"plan", "w/c.ini", "model.vocab_size=257"}},
     "w/c.ini", READABLE},
    {{.name = "train, going on", .base = "halfway", .result = FAULT_RUN,
      .words = {"train", "c.ini", "train.out=w/run"}},
     "w/run/log.jsonl", MENDED},
};

static void other_files(void **state) {
    (void)state;
    for (uint32_t i = 0; i < sizeof others / sizeof *others; i++) damage(&others[i], 100 + i);
}

static int enter(void **state) {
    (void)state;
    faults_enter(directory);
    faults_shell("mkdir sets && cp -a hf data valid c.ini text.zst text.gz sets");
    return 0;
}

static int leave(void **state) {
    (void)state;
    faults_leave(directory);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(checkpoints),
        cmocka_unit_test(a_damaged_latest_checkpoint),
        cmocka_unit_test(other_files),
    };
    return cmocka_run_group_tests(tests, enter, leave);
}
