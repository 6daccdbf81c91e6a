/* test_train_checkpoint.c: a checkpoint gives back every bit, for any number of ranks; old ones go, the latest stays;
 * and damage of any file is told by a sentence that names it. What kills and full disks do is in
 * test_train_checkpoint_faults.c.
 */
#include "test/unit.h"

#include "test/support_checkpoint.h"
#include "test/support_ranks.h"
#include "train/checkpoint_internal.h"
#include "train/run_directory.h"
#include <limits.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

static char directory[256];
static struct comm one;

static int make_directory(void **state) {
    (void)state;
    error err = {0};
    parts_directory(directory);
    return comm_open(&one, &err);
}

static int remove_directory(void **state) {
    (void)state;
    unit_directory_remove(directory);
    return 0;
}

/* A path in the directory. */
#define at(...) unit_format(directory, __VA_ARGS__)

static void must_save(struct parts *p, const char *run, int64_t step, int64_t keep) {
    error err = {0};
    if (parts_save(p, run, step, keep, &err) != 0) fail_msg("%s", err.text);
}

/* What is in a run's directory, as one line. */
static const char *listing(const char *run) {
    static char text[1000];
    char **names;
    size_t count;
    error err = {0};
    text[0] = 0;
    assert_int_equal(file_list(run, "", &names, &count, &err), 0);
    for (size_t i = 0; i < count; i++) snprintf(text + strlen(text), sizeof text - strlen(text), "%s ", names[i]);
    file_list_free(names, count);
    return text;
}

static const char *latest(const char *run) {
    static char target[PATH_MAX];
    char path[500];
    snprintf(path, sizeof path, "%s/latest", run);
    ssize_t size = readlink(path, target, sizeof target - 1);
    target[size > 0 ? size : 0] = 0;
    return target;
}

/* The checkpoint opens and holds every bit of the step. */
static void expect_step(struct parts *p, const char *path, int64_t step) {
    error err = {0};
    struct trainer_state state;
    parts_fill(p, step);
    uint64_t wanted = parts_digest(p);
    parts_fill(p, step + 1000);
    assert_true(parts_digest(p) != wanted);
    if (parts_load(p, path, &state, &err) != 0) fail_msg("%s", err.text);
    parts_expect_state(&state, step);
    assert_true(parts_digest(p) == wanted);
}

/* ---- round trip -------------------------------------------------------------------------------------------------- */

static void every_bit_comes_back(void **state) {
    (void)state;
    struct parts p, q;
    error err = {0};
    parts_open(&p, &one, PRECISION_F32, parts_text);
    must_save(&p, at("bits"), 3, 0);
    must_save(&p, at("bits"), 4, 0);
    parts_open(&q, &one, PRECISION_F32, parts_text);
    expect_step(&q, at("bits/step-00000003"), 3);
    expect_step(&q, at("bits/step-00000004"), 4);
    expect_step(&q, at("bits/latest"), 4);
    expect_step(&q, at("bits"), 4);
    assert_string_equal(listing(at("bits")), "latest step-00000003 step-00000004 ");
    assert_string_equal(listing(at("bits/latest")),
                        "config.ini config.json generation_config.json model.safetensors "
                        "optimizer.safetensors tokenizer.json tokenizer_config.json trainer.json ");
    /* What else a checkpoint tells of itself. */
    struct checkpoint *c;
    tokenizer *t;
    struct model_config *mc;
    char resolved[PATH_MAX];
    assert_int_equal(checkpoint_open(&c, at("bits"), &err), 0);
    assert_true(checkpoint_is_ours(c));
    assert_non_null(realpath(at("bits/step-00000004"), resolved));
    assert_string_equal(checkpoint_path(c), resolved);
    assert_int_equal(checkpoint_tokenizer(c, &t, &err), 0);
    assert_true(tokenizer_identity(t) == tokenizer_identity(p.t));
    assert_int_equal(model_config_bind(&mc, checkpoint_config(c), tokenizer_vocab(t), &err), 0);
    assert_int_equal(config_finish(checkpoint_config(c), &err), 0);
    assert_int_equal(mc->rows, 272);
    assert_true(mc->params.total == p.mc->params.total);
    model_config_free(mc);
    tokenizer_close(t);
    checkpoint_close(c);
    parts_close(&q);
    parts_close(&p);
}

/* The checkpoint stays the one that was opened when `latest` moves on. */
static void an_open_checkpoint_does_not_move(void **state) {
    (void)state;
    struct parts p;
    error err = {0};
    struct checkpoint *c;
    parts_open(&p, &one, PRECISION_F32, parts_text);
    must_save(&p, at("moves"), 1, 0);
    assert_int_equal(checkpoint_open(&c, at("moves"), &err), 0);
    must_save(&p, at("moves"), 2, 0);
    parts_fill(&p, 1);
    uint64_t wanted = parts_digest(&p);
    parts_fill(&p, 5);
    assert_int_equal(checkpoint_load_model(c, p.m, &err), 0);
    assert_int_equal(checkpoint_load_optimizer(c, p.o, &one, &err), 0);
    assert_true(parts_digest(&p) == wanted);
    checkpoint_close(c);
    parts_close(&p);
}

/* An f64 model is saved as f32, rounded once. */
static void an_f64_model_is_rounded(void **state) {
    (void)state;
    struct parts p, q;
    error err = {0};
    parts_open(&p, &one, PRECISION_F64, parts_text);
    must_save(&p, at("wide"), 6, 0);
    uint64_t wanted = parts_digest(&p);
    for (int precision = PRECISION_F32; precision <= PRECISION_F64; precision++) {
        parts_open(&q, &one, (enum precision)precision, parts_text);
        assert_int_equal(parts_load(&q, at("wide"), NULL, &err), 0);
        assert_true(parts_digest(&q) == wanted);
        parts_close(&q);
    }
    parts_close(&p);
}

struct ranks_job {
    const char *run;
    int64_t step;
    uint64_t digest; /* of what was loaded */
    int load, failed;
};

static void on_rank(struct comm *comm, void *self) {
    struct ranks_job *job = self;
    struct parts p;
    error err = {0};
    parts_open(&p, comm, PRECISION_F32, parts_text);
    int result;
    if (job->load) {
        parts_fill(&p, 99);
        result = parts_load(&p, job->run, NULL, &err);
        uint64_t digest = parts_digest(&p);
        if (comm->rank == 0) job->digest = digest;
    } else {
        result = parts_save(&p, job->run, job->step, 0, &err);
    }
    if (comm->rank == 0) job->failed = result;
    parts_close(&p);
}

static void any_number_of_ranks_saves_and_loads(void **state) {
    (void)state;
    static const int counts[] = {1, 2, 3, 5};
    struct parts p;
    parts_open(&p, &one, PRECISION_F32, parts_text);
    parts_fill(&p, 7);
    uint64_t wanted = parts_digest(&p);
    parts_close(&p);
    char *first = NULL;
    size_t first_size = 0;
    for (size_t i = 0; i < 4; i++) {
        char run[400];
        snprintf(run, sizeof run, "%s", at("ranks-%d", counts[i]));
        struct ranks_job job = {.run = run, .step = 7};
        ranks_run(counts[i], on_rank, &job);
        assert_int_equal(job.failed, 0);
        for (size_t k = 0; k < 4; k++) {
            job = (struct ranks_job){.run = run, .load = 1, .failed = -1};
            ranks_run(counts[k], on_rank, &job);
            assert_int_equal(job.failed, 0);
            assert_true(job.digest == wanted);
        }
        /* Whatever the number of ranks, the files are the same bytes: the manifest tells, but for the program's name.
         */
        char *bytes;
        size_t size;
        error err = {0};
        assert_int_equal(file_read_all(at("ranks-%d/latest/trainer.json", counts[i]), 1 << 20, &bytes, &size, &err), 0);
        if (!first) {
            first = bytes;
            first_size = size;
            continue;
        }
        assert_int_equal(size, first_size);
        assert_memory_equal(bytes, first, size);
        free(bytes);
    }
    free(first);
}

static void failing_rank(struct comm *comm, void *self) {
    struct ranks_job *job = self;
    struct parts p;
    error err = {0};
    parts_open(&p, comm, PRECISION_F32, parts_text);
    int result = job->load ? parts_load(&p, job->run, NULL, &err) : parts_save(&p, job->run, 1, 0, &err);
    /* All ranks fail alike; one of them has the sentence. */
    ASSERT(result == -1 && (err.kind == ERROR_SYSTEM || err.kind == ERROR_INPUT));
    ASSERT((comm->rank == 0) == (err.text[0] != 0) || job->load);
    parts_close(&p);
}

static void a_failure_reaches_all_ranks(void **state) {
    (void)state;
    error err = {0};
    assert_int_equal(file_write_all(at("a-file"), "x", 1, &err), 0);
    struct ranks_job job = {.run = at("a-file/run")};
    ranks_run(3, failing_rank, &job);
    /* A checkpoint without an optimizer: every rank opens it, rank 0 finds out. */
    struct parts p;
    parts_open(&p, &one, PRECISION_F32, parts_text);
    struct trainer_state s = parts_state(1);
    parts_fill(&p, 1);
    assert_int_equal(checkpoint_save(at("bare"), &s, p.m, NULL, p.c, p.t, &one, 0, &err), 0);
    parts_close(&p);
    job = (struct ranks_job){.run = at("bare"), .load = 1};
    ranks_run(3, failing_rank, &job);
}

/* ---- which ones stay --------------------------------------------------------------------------------------------- */

static void the_newest_are_kept(void **state) {
    (void)state;
    struct parts p;
    parts_open(&p, &one, PRECISION_F32, parts_text);
    for (int64_t step = 1; step <= 3; step++) must_save(&p, at("keep"), step, 2);
    assert_string_equal(listing(at("keep")), "latest step-00000002 step-00000003 ");
    must_save(&p, at("keep"), 4, 1);
    assert_string_equal(listing(at("keep")), "latest step-00000004 ");
    for (int64_t step = 99999999; step <= 100000001; step++) must_save(&p, at("keep"), step, 0);
    assert_string_equal(listing(at("keep")), "latest step-00000004 step-100000000 step-100000001 step-99999999 ");
    must_save(&p, at("keep"), 100000002, 3); /* by number, not by name */
    assert_string_equal(listing(at("keep")), "latest step-100000000 step-100000001 step-100000002 ");
    assert_string_equal(latest(at("keep")), "step-100000002");
    parts_close(&p);
}

/* Other names are nobody's business; leftovers of killed saves go. */
static void what_is_not_ours_stays(void **state) {
    (void)state;
    struct parts p;
    error err = {0};
    static const char *const names[] = {"step-best", "step-1", "step-0000000x", "notes", "tmp-mine"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        assert_int_equal(file_make_directories(at("mixed/%s", names[i]), &err), 0);
    }
    assert_int_equal(file_make_directories(at("mixed/tmp-step-00000001"), &err), 0);
    assert_int_equal(file_make_directories(at("mixed/tmp-old-step-00000000/more"), &err), 0);
    parts_open(&p, &one, PRECISION_F32, parts_text);
    must_save(&p, at("mixed"), 2, 1);
    must_save(&p, at("mixed"), 3, 1);
    assert_string_equal(listing(at("mixed")), "latest notes step-00000003 step-0000000x step-1 step-best tmp-mine ");
    parts_close(&p);
}

/* Somebody points `latest` to an earlier step and goes on from there. */
static void a_run_that_was_set_back(void **state) {
    (void)state;
    struct parts p;
    error err = {0};
    parts_open(&p, &one, PRECISION_F32, parts_text);
    for (int64_t step = 10; step <= 40; step += 10) must_save(&p, at("back"), step, 0);
    assert_int_equal(file_link_atomically("step-00000020", at("back/latest"), &err), 0);
    must_save(&p, at("back"), 25, 2);
    assert_string_equal(listing(at("back")), "latest step-00000020 step-00000025 step-00000030 step-00000040 ");
    assert_string_equal(latest(at("back")), "step-00000025");
    /* Step 30 comes again, with other contents. */
    must_save(&p, at("back"), 30, 2);
    assert_string_equal(listing(at("back")), "latest step-00000025 step-00000030 step-00000040 ");
    expect_step(&p, at("back"), 30);
    parts_close(&p);
}

/* Killed before `latest` was made, or copied without links: the newest step counts, by its number. A `latest` that is
 * no link, as copies have it that follow links, is refused. */
static void a_run_without_latest(void **state) {
    (void)state;
    struct parts p;
    error err = {0};
    bool has;
    char sentence[1000];
    struct checkpoint *c;
    parts_open(&p, &one, PRECISION_F32, parts_text);
    assert_int_equal(run_has_checkpoint(&has, at("unlinked"), &err), 0);
    assert_false(has);
    must_save(&p, at("unlinked"), 99999998, 0);
    must_save(&p, at("unlinked"), 100000000, 0);
    must_save(&p, at("unlinked"), 99999999, 0);
    assert_int_equal(unlink(at("unlinked/latest")), 0);
    assert_int_equal(file_make_directories(at("unlinked/step-best"), &err), 0);
    assert_int_equal(run_has_checkpoint(&has, at("unlinked"), &err), 0);
    assert_true(has);
    expect_step(&p, at("unlinked"), 100000000);
    must_save(&p, at("unlinked"), 100000001, 0);
    assert_string_equal(latest(at("unlinked")), "step-100000001");
    expect_step(&p, at("unlinked"), 100000001);

    assert_int_equal(unlink(at("unlinked/latest")), 0);
    assert_int_equal(file_make_directories(at("unlinked/latest"), &err), 0);
    snprintf(sentence, sizeof sentence,
             "%s is no link, as it is where riverrun saves; remove it, and the run stands at its newest checkpoint, "
             "step-100000001",
             at("unlinked/latest"));
    unit_expect(checkpoint_open(&c, at("unlinked"), &err), &err, ERROR_INPUT, sentence);
    parts_close(&p);
}

static void the_same_step_twice(void **state) {
    (void)state;
    struct parts p;
    error err = {0};
    parts_open(&p, &one, PRECISION_F32, parts_text);
    must_save(&p, at("twice"), 5, 0);
    struct stat before, after;
    assert_int_equal(stat(at("twice/latest/model.safetensors"), &before), 0);
    must_save(&p, at("twice"), 5, 0); /* the same contents: nothing to do */
    assert_int_equal(stat(at("twice/latest/model.safetensors"), &after), 0);
    assert_true(before.st_ino == after.st_ino);
    assert_string_equal(listing(at("twice")), "latest step-00000005 ");
    /* Other contents: the complete checkpoint that `latest` points to is not given up. */
    struct trainer_state s = parts_state(5);
    char sentence[600];
    parts_fill(&p, 6);
    snprintf(sentence, sizeof sentence,
             "%s/twice/step-00000005 exists with other contents, and it is the latest checkpoint of "
             "its run; a new run needs another directory",
             directory);
    unit_expect(checkpoint_save(at("twice"), &s, p.m, p.o, p.c, p.t, &one, 0, &err), &err, ERROR_INPUT, sentence);
    assert_string_equal(listing(at("twice")), "latest step-00000005 ");
    expect_step(&p, at("twice"), 5);
    /* A damaged one is replaced. */
    assert_int_equal(file_write_all(at("twice/latest/config.ini"), "x", 1, &err), 0);
    parts_fill(&p, 5);
    assert_int_equal(checkpoint_save(at("twice"), &s, p.m, p.o, p.c, p.t, &one, 0, &err), 0);
    expect_step(&p, at("twice"), 5);
    assert_string_equal(listing(at("twice")), "latest step-00000005 ");
    parts_close(&p);
}

/* ---- damage ------------------------------------------------------------------------------------------------------ */

static char resolved_run[PATH_MAX]; /* of "damage/step-00000001" */

static void expect_refusal(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void expect_refusal(const char *format, ...) {
    error err = {0};
    struct checkpoint *c;
    char sentence[2000];
    int length = snprintf(sentence, sizeof sentence, "%s", resolved_run);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence + length, sizeof sentence - (size_t)length, format, arguments);
    va_end(arguments);
    unit_expect(checkpoint_open(&c, at("damage"), &err), &err, ERROR_INPUT, sentence);
    assert_null(c);
}

static void write_plainly(const char *path, const char *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
}

/* Each file that trainer.json lists: changed in one bit, cut, lengthened, gone. */
static void damage_file(const char *name) {
    error err = {0};
    char *bytes;
    size_t size;
    char path[500];
    snprintf(path, sizeof path, "%s", at("damage/latest/%s", name));
    assert_int_equal(file_read_all(path, 1 << 22, &bytes, &size, &err), 0);
    struct manifest m;
    assert_int_equal(manifest_read(&m, at("damage/latest"), &err), 0);
    uint64_t hash = manifest_find(&m, name)->hash, changed, changed_size;
    for (size_t at_byte = 0; at_byte < size; at_byte += size / 5 + 1) {
        bytes[at_byte] ^= 4;
        write_plainly(path, bytes, size);
        assert_int_equal(file_hash_of(path, &changed, &changed_size, &err), 0);
        expect_refusal("/%s is damaged: its checksum is %016llx, trainer.json says %016llx", name,
                       (unsigned long long)changed, (unsigned long long)hash);
        bytes[at_byte] ^= 4;
    }
    write_plainly(path, bytes, size - 1);
    expect_refusal("/%s is damaged: it has %zu bytes, trainer.json says %zu", name, size - 1, size);
    write_plainly(path, bytes, size + 1); /* the terminating zero */
    expect_refusal("/%s is damaged: it has %zu bytes, trainer.json says %zu", name, size + 1, size);
    assert_int_equal(unlink(path), 0);
    expect_refusal("/%s is missing, but trainer.json lists it", name);
    write_plainly(path, bytes, size);
    free(bytes);
}

static void damage_of_every_file_is_told(void **state) {
    (void)state;
    struct parts p;
    parts_open(&p, &one, PRECISION_F32, parts_text);
    must_save(&p, at("damage"), 1, 0);
    assert_non_null(realpath(at("damage/latest"), resolved_run));
    static const char *const names[] = {"config.ini", "config.json", "generation_config.json", "model.safetensors",
                                        "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) damage_file(names[i]);
    expect_step(&p, at("damage"), 1);
    parts_close(&p);
}

/* trainer.json itself: no byte of it can change unnoticed. */
static void damage_of_the_manifest_is_told(void **state) {
    (void)state;
    error err = {0};
    struct checkpoint *c;
    char *bytes;
    size_t size;
    char path[500];
    snprintf(path, sizeof path, "%s", at("damage/latest/trainer.json"));
    assert_int_equal(file_read_all(path, 1 << 20, &bytes, &size, &err), 0);
    for (size_t i = 0; i < size; i++) {
        for (int bit = 0; bit < 8; bit += 3) {
            bytes[i] ^= (char)(1 << bit);
            write_plainly(path, bytes, size);
            if (checkpoint_open(&c, at("damage"), &err) == 0) {
                /* Only where white space became other white space. */
                checkpoint_close(c);
                if (!strchr(" \n\t\r", bytes[i])) fail_msg("byte %zu became '%c' unnoticed", i, bytes[i]);
            } else {
                assert_int_equal(err.kind, ERROR_INPUT);
                assert_non_null(strstr(err.text, "trainer.json"));
            }
            bytes[i] ^= (char)(1 << bit);
        }
        if (i % 16 == 0) { /* cut there */
            write_plainly(path, bytes, i);
            assert_int_equal(checkpoint_open(&c, at("damage"), &err), -1);
        }
    }
    write_plainly(path, bytes, size);
    /* Sentences of their own. */
    char *number = strstr(bytes, "\"step\": 1");
    assert_non_null(number);
    number[8] = '2';
    write_plainly(path, bytes, size);
    expect_refusal("/trainer.json is damaged: its own checksum does not match");
    number[8] = '1';
    char *version = strstr(bytes, "\"version\": 1");
    assert_non_null(version);
    version[11] = '2';
    write_plainly(path, bytes, size);
    expect_refusal("/trainer.json has version 2 of the checkpoint format; this riverrun reads version 1");
    version[11] = '1';
    write_plainly(path, bytes, size);
    free(bytes);
    assert_int_equal(checkpoint_open(&c, at("damage"), &err), 0);
    checkpoint_close(c);
}

/* A manifest that tells no lie about the files, and yet makes no checkpoint. */
static void an_incomplete_checkpoint_is_refused(void **state) {
    (void)state;
    struct model_directory d;
    struct trainer_state s = parts_state(1);
    error err = {0};
    struct checkpoint *c;
    char sentence[600];
    assert_int_equal(model_directory_begin(&d, at("half"), &err), 0);
    assert_int_equal(model_directory_text(&d, "config.json", "{}", 2, &err), 0);
    assert_int_equal(manifest_write(&d, &s, &err), 0);
    snprintf(sentence, sizeof sentence,
             "%s/half/trainer.json does not list model.safetensors, which every checkpoint has",
             realpath(directory, (char[PATH_MAX]){0}));
    unit_expect(checkpoint_open(&c, at("half"), &err), &err, ERROR_INPUT, sentence);
}

static void paths_without_a_checkpoint(void **state) {
    (void)state;
    error err = {0};
    struct checkpoint *c;
    char sentence[1000];
    snprintf(sentence, sizeof sentence, "there is no checkpoint %s", at("nowhere"));
    unit_expect(checkpoint_open(&c, at("nowhere"), &err), &err, ERROR_INPUT, sentence);
    snprintf(sentence, sizeof sentence,
             "%s is a file; a checkpoint is a directory, such as the one that this file is in",
             at("damage/latest/model.safetensors"));
    unit_expect(checkpoint_open(&c, at("damage/latest/model.safetensors"), &err), &err, ERROR_INPUT, sentence);
    assert_int_equal(file_make_directories(at("empty"), &err), 0);
    snprintf(sentence, sizeof sentence, "%s/empty is no checkpoint: it holds no config.json",
             realpath(directory, (char[PATH_MAX]){0}));
    unit_expect(checkpoint_open(&c, at("empty"), &err), &err, ERROR_INPUT, sentence);
    assert_int_equal(file_link_atomically("step-00000009", at("empty/latest"), &err), 0);
    snprintf(sentence, sizeof sentence, "%s points to a directory that is not there", at("empty/latest"));
    unit_expect(checkpoint_open(&c, at("empty"), &err), &err, ERROR_INPUT, sentence);
}

/* ---- the wrong model --------------------------------------------------------------------------------------------- */

static void another_model_is_refused(void **state) {
    (void)state;
    static const char wider[] = "[model]\nd_model = 20\nvocab_size = 0\npattern = m*2\n"
                                "[block.m]\nmixer = mamba2\nd_state = 5\nhead_dim = 8\n";
    static const char deeper[] = "[model]\nd_model = 12\nvocab_size = 0\npattern = m*3\n"
                                 "[block.m]\nmixer = mamba2\nd_state = 5\nhead_dim = 8\n";
    static const char shallower[] = "[model]\nd_model = 12\nvocab_size = 0\npattern = m\n"
                                    "[block.m]\nmixer = mamba2\nd_state = 5\nhead_dim = 8\n";
    static const struct {
        const char *text, *sentence;
    } cases[] = {
        {wider, ": tensor backbone.embeddings.weight has shape (272, 12); the model of the config needs (272, 20)"},
        {deeper, " lacks tensors that the model of the config has: backbone.layers.2.norm.weight, "
                 "backbone.layers.2.mixer.in_proj.weight, backbone.layers.2.mixer.conv1d.weight, "
                 "backbone.layers.2.mixer.conv1d.bias and 5 more"},
        {shallower, " holds tensors that the model of the config does not have: backbone.layers.1.norm.weight, "
                    "backbone.layers.1.mixer.in_proj.weight, backbone.layers.1.mixer.conv1d.weight, "
                    "backbone.layers.1.mixer.conv1d.bias and 5 more"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct parts p;
        struct checkpoint *c;
        error err = {0};
        char sentence[1000];
        parts_open(&p, &one, PRECISION_F32, cases[i].text);
        assert_int_equal(checkpoint_open(&c, at("damage"), &err), 0);
        snprintf(sentence, sizeof sentence, "%s%s", resolved_run, cases[i].sentence);
        unit_expect(checkpoint_load_model(c, p.m, &err), &err, ERROR_INPUT, sentence);
        checkpoint_close(c);
        parts_close(&p);
    }
}

/* A checkpoint saved without an optimizer starts a run, but a run does not go on from it. */
static void without_optimizer(void **state) {
    (void)state;
    struct parts p;
    error err = {0};
    struct checkpoint *c;
    char sentence[1000];
    parts_open(&p, &one, PRECISION_F32, parts_text);
    assert_int_equal(checkpoint_open(&c, at("bare"), &err), 0);
    assert_int_equal(checkpoint_load_model(c, p.m, &err), 0);
    snprintf(sentence, sizeof sentence,
             "%s holds no optimizer state, so a run can't go on from it; train.init starts a new one "
             "with its weights",
             checkpoint_path(c));
    unit_expect(checkpoint_load_optimizer(c, p.o, &one, &err), &err, ERROR_INPUT, sentence);
    checkpoint_close(c);
    parts_close(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_bit_comes_back),
        cmocka_unit_test(an_open_checkpoint_does_not_move),
        cmocka_unit_test(an_f64_model_is_rounded),
        cmocka_unit_test(any_number_of_ranks_saves_and_loads),
        cmocka_unit_test(a_failure_reaches_all_ranks),
        cmocka_unit_test(the_newest_are_kept),
        cmocka_unit_test(what_is_not_ours_stays),
        cmocka_unit_test(a_run_that_was_set_back),
        cmocka_unit_test(a_run_without_latest),
        cmocka_unit_test(the_same_step_twice),
        cmocka_unit_test(damage_of_every_file_is_told),
        cmocka_unit_test(damage_of_the_manifest_is_told),
        cmocka_unit_test(an_incomplete_checkpoint_is_refused),
        cmocka_unit_test(paths_without_a_checkpoint),
        cmocka_unit_test(another_model_is_refused),
        cmocka_unit_test(without_optimizer),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
