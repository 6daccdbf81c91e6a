/* test_data_tokenize_disk.c: what tokenize refuses, and what it leaves on disk when it fails, is interrupted or
 * replaces shards. That no single failing or killed operation leaves a half-written data set is test_shards.sh's. */
#include "data/stage.h"
#include "test/support_text.h"
#include "test/unit.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#define SEP "<|endoftext|>"

static char directory[256], out[300], input[300];

static int enter(void **state) {
    (void)state;
    unit_directory(directory);
    snprintf(out, sizeof out, "%s/out", directory);
    snprintf(input, sizeof input, "%s/input", directory);
    return 0;
}

static int leave(void **state) {
    (void)state;
    unit_directory_remove(directory);
    return 0;
}

static const char *in_directory(const char *name) {
    return unit_path(directory, name);
}

static const char *write_file(const char *name, const char *bytes, size_t size) {
    error err;
    const char *path = in_directory(name);
    assert_int_equal(file_write_all(path, bytes, size, &err), 0);
    return path;
}

static int run(const char *text, const struct tokenize_options *o, error *err) {
    write_file("input", text, strlen(text));
    const char *inputs[] = {input};
    return text_tokenize(inputs, 1, o, NULL, err);
}

static void expect_text(const char *expected) {
    struct text text = text_of(out);
    assert_int_equal(text.size, strlen(expected));
    assert_memory_equal(text.bytes, expected, text.size);
    text_free(&text);
}

/* Names in `out`, joined by blanks; "none" if the directory is not there. */
static const char *listing(void) {
    static char line[1000];
    error err;
    char **names;
    size_t count;
    if (!file_exists(out)) return "none";
    assert_int_equal(file_list(out, "", &names, &count, &err), 0);
    line[0] = 0;
    for (size_t i = 0; i < count; i++) {
        assert_true(strlen(line) + strlen(names[i]) + 2 < sizeof line);
        if (i) strcat(line, " ");
        strcat(line, names[i]);
    }
    file_list_free(names, count);
    return line;
}

static void expect_refusal(const struct tokenize_options *o, const char *const *inputs, size_t count,
                           const char *format, const char *name) {
    char text[6000];
    error err = {0};
    snprintf(text, sizeof text, format, name, name);
    unit_expect(text_tokenize(inputs, count, o, NULL, &err), &err, ERROR_INPUT, text);
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

static void refuses_options(void **state) {
    (void)state;
    const char *inputs[] = {write_file("input", "x", 1)};
    struct tokenize_options o = text_options(out);
    o.separator = "a\nb";
    expect_refusal(&o, inputs, 1,
                   "the separator must be one line of at most 255 bytes; this one has 3 bytes and a line end", "");
    char longest[257];
    memset(longest, '=', 256);
    longest[256] = 0;
    o.separator = longest;
    expect_refusal(&o, inputs, 1, "the separator must be one line of at most 255 bytes; this one has 256 bytes", "");
    o = text_options(out);
    o.shard_tokens = 0;
    expect_refusal(&o, inputs, 1, "a shard must have at least 1 token", "");
    o = text_options(out);
    o.threads = 0;
    expect_refusal(&o, inputs, 1, "0 threads; at least 1 is needed", "");
    o = text_options(out);
    o.frame_tokens = 0;
    expect_refusal(&o, inputs, 1, "%s: frames of 0 tokens; 1 to 4194304 are possible", out);
    o = text_options(out);
    o.zstd_level = 99;
    expect_refusal(&o, inputs, 1, "%s: zstd level 99; 1 to 22 are possible", out);
    o = text_options("");
    expect_refusal(&o, inputs, 1, "the output directory's name is empty", "");
    const char *const prefixes[] = {"", "a/b", ".a"};
    for (size_t i = 0; i < 3; i++) {
        o = text_options(out);
        o.prefix = prefixes[i];
        expect_refusal(&o, inputs, 1, "the prefix '%s' must have 1 to 128 bytes, no '/' and no '.' at its start",
                       prefixes[i]);
    }
    assert_string_equal(listing(), "none");
}

static void refuses_inputs(void **state) {
    (void)state;
    struct tokenize_options o = text_options(out);
    const char *good = write_file("good", "x", 1);
    expect_refusal(&o, NULL, 0, "no input: name files, directories, or - for standard input", "");
    const char *missing[] = {good, in_directory("missing")};
    expect_refusal(&o, missing, 2, "cannot read input %s: No such file or directory", missing[1]);
    const char *twice[] = {"-", good, "-"};
    expect_refusal(&o, twice, 3, "standard input (-) is named twice; it can be read once", "");
    const char *empty[] = {in_directory("empty")};
    assert_int_equal(mkdir(empty[0], 0700), 0);
    expect_refusal(&o, empty, 1, "the input directory %s has no regular file below it", empty[0]);
    assert_string_equal(listing(), "none");
    if (geteuid() == 0) return; /* root reads everything */
    const char *locked[] = {write_file("locked", "x", 1)};
    assert_int_equal(chmod(locked[0], 0), 0);
    expect_refusal(&o, locked, 1, "cannot read input %s: Permission denied", locked[0]);
}

/* Damage is met after much was written; nothing of that stays. */
static void damaged_inputs(void **state) {
    (void)state;
    enum { SIZE = 1 << 20 };
    static char text[SIZE], zst[SIZE + 1000], gz[SIZE + 1000];
    for (size_t i = 0; i < SIZE; i++) text[i] = (char)(i * 2654435761u >> 24);
    size_t zst_size = ZSTD_compress(zst, sizeof zst, text, SIZE, 1);
    assert_false(ZSTD_isError(zst_size));
    z_stream z = {.next_in = (unsigned char *)text,
                  .avail_in = SIZE,
                  .next_out = (unsigned char *)gz,
                  .avail_out = sizeof gz};
    assert_int_equal(deflateInit2(&z, 1, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    size_t gz_size = z.total_out;
    deflateEnd(&z);
    const char *inputs[] = {write_file("first", text, SIZE), in_directory("bad")};
    struct tokenize_options o = text_options(out);
    o.shard_tokens = 300000;
    const struct {
        const char *bytes;
        size_t cut;
        const char *text;
    } cut[] = {
        {zst, zst_size - 1, "input %s is cut off: it ends inside a zstd frame"},
        {zst, 5, "input %s is cut off: it ends inside a zstd frame"},
        {gz, gz_size - 1, "input %s is cut off: it ends inside gzip data"},
        {gz, 2, "input %s is cut off: it ends inside gzip data"},
    };
    for (size_t i = 0; i < 4; i++) {
        write_file("bad", cut[i].bytes, cut[i].cut);
        expect_refusal(&o, inputs, 2, cut[i].text, inputs[1]);
        assert_string_equal(listing(), "none");
    }
    memcpy(gz + gz_size, "tail", 4);
    write_file("bad", gz, gz_size + 4);
    expect_refusal(&o, inputs, 2, "input %s has bytes after its gzip data that are no gzip data", inputs[1]);
    write_file("bad", gz, gz_size + 1);
    expect_refusal(&o, inputs, 2, "input %s has bytes after its gzip data that are no gzip data", inputs[1]);
    gz[gz_size - 5] ^= 1; /* the checksum */
    write_file("bad", gz, gz_size);
    expect_refusal(&o, inputs, 2, "input %s is damaged gzip data: incorrect data check", inputs[1]);
    memcpy(zst + zst_size, "tail", 4);
    write_file("bad", zst, zst_size + 4);
    expect_refusal(&o, inputs, 2, "input %s is damaged zstd data: Unknown frame descriptor", inputs[1]);
    assert_string_equal(listing(), "none");
}

/* A window of 256 MiB, by the first bytes of a frame. */
static void too_large_windows(void **state) {
    (void)state;
    const char *inputs[] = {write_file("bad", "\x28\xB5\x2F\xFD\x00\x90\x01\x00\x00", 9)};
    struct tokenize_options o = text_options(out);
    expect_refusal(
        &o, inputs, 1,
        "input %s needs more than 128 MiB to decompress: compress it with --long=27 or less, or pipe it through "
        "zstd -d --long=31",
        inputs[0]);
}

/* ---- the output directory ---------------------------------------------------------------------------------------- */

static void makes_the_directory(void **state) {
    (void)state;
    error err;
    struct tokenize_options o = text_options(in_directory("out/of/many"));
    assert_int_equal(run("a\n", &o, &err), 0);
    assert_string_equal(listing(), "of");
    struct text text = text_of(o.out);
    assert_int_equal(text.size, 2);
    text_free(&text);
    o = text_options(input); /* a file */
    assert_int_equal(run("a\n", &o, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
}

static void keeps_what_is_there(void **state) {
    (void)state;
    error err;
    struct tokenize_options o = text_options(out);
    assert_int_equal(run("first\n", &o, &err), 0);
    assert_string_equal(listing(), "part-00000.rrs tokenizer.json");
    const char *inputs[] = {input};
    expect_refusal(
        &o, inputs, 1,
        "%s already holds shards (1, the first is part-00000.rrs): name another directory, or give --overwrite to "
        "replace those named part-*.rrs",
        out);
    o.prefix = "other";
    expect_refusal(
        &o, inputs, 1,
        "%s already holds shards (1, the first is part-00000.rrs): name another directory, or give --overwrite to "
        "replace those named other-*.rrs",
        out);
    expect_text("first\n");
}

static void overwrites_its_own_prefix(void **state) {
    (void)state;
    error err;
    struct tokenize_options o = text_options(out);
    o.shard_tokens = 2;
    assert_int_equal(run("first", &o, &err), 0);
    assert_string_equal(listing(), "part-00000.rrs part-00001.rrs part-00002.rrs tokenizer.json");
    o.overwrite = true;
    o.shard_tokens = 4;
    assert_int_equal(run("second", &o, &err), 0); /* fewer shards than before: none of the old ones stays */
    assert_string_equal(listing(), "part-00000.rrs part-00001.rrs tokenizer.json");
    expect_text("second");
    o.prefix = "part-00000"; /* not to be taken for the other prefix */
    assert_int_equal(run("more", &o, &err), 0);
    assert_string_equal(listing(),
                        "part-00000-00000.rrs part-00000-00001.rrs part-00000.rrs part-00001.rrs tokenizer.json");
    expect_text("moresecond");
    o.prefix = "part";
    o.shard_tokens = 1000;
    assert_int_equal(run("third", &o, &err), 0);
    expect_text("morethird");
}

static void failing_overwrite_changes_nothing(void **state) {
    (void)state;
    error err;
    struct tokenize_options o = text_options(out);
    assert_int_equal(run("first", &o, &err), 0);
    o.overwrite = true;
    const char *inputs[] = {input, write_file("bad", "\x1F\x8B", 2)};
    assert_int_equal(text_tokenize(inputs, 2, &o, NULL, &err), -1);
    assert_string_equal(listing(), "part-00000.rrs tokenizer.json");
    expect_text("first");
}

static void another_tokenizer_is_there(void **state) {
    (void)state;
    error err;
    assert_int_equal(mkdir(out, 0700), 0);
    write_file("out/tokenizer.json", "{}", 2);
    struct tokenize_options o = text_options(out);
    const char *inputs[] = {write_file("input", "x", 1)};
    expect_refusal(
        &o, inputs, 1,
        "%s/tokenizer.json is not this run's tokenizer: name another directory, or give --overwrite to replace it",
        out);
    o.overwrite = true;
    assert_int_equal(run("text", &o, &err), 0);
    expect_text("text");
    /* But not where shards would stay that were made with it. */
    struct shard_writer_options sample = {.token_bytes = 2,
                                          .frame_tokens = 16,
                                          .zstd_level = 1,
                                          .vocab = 300,
                                          .eod = -1,
                                          .tokenizer_identity = 5,
                                          .tokenizer_name = "other",
                                          .separator = ""};
    shard_writer *w;
    assert_int_equal(shard_writer_open(&w, in_directory("out/z.rrs"), &sample, 1, &err), 0);
    assert_int_equal(shard_writer_finish(w, NULL, &err), 0);
    expect_refusal(
        &o, inputs, 1,
        "%s/z.rrs was made with another tokenizer (0000000000000005) than this run's (18f8e12bf5b65336): write to "
        "another directory",
        out);
    assert_string_equal(listing(), "part-00000.rrs tokenizer.json z.rrs");
}

static void one_run_at_a_time(void **state) {
    (void)state;
    error err;
    assert_int_equal(mkdir(out, 0700), 0);
    int lock = open(out, O_RDONLY | O_DIRECTORY);
    assert_int_equal(flock(lock, LOCK_EX), 0);
    assert_int_equal(mkdir(in_directory("out/.part.tmp"), 0700), 0); /* the other run's: to be left alone */
    struct tokenize_options o = text_options(out);
    const char *inputs[] = {write_file("input", "x", 1)};
    expect_refusal(&o, inputs, 1, "another run is writing to %s: wait for it, or name another directory", out);
    assert_string_equal(listing(), ".part.tmp");
    close(lock);
    write_file("out/.part.tmp/part-00000.rrs", "left by a killed run", 20);
    assert_int_equal(run("text", &o, &err), 0);
    assert_string_equal(listing(), "part-00000.rrs tokenizer.json");
}

/* A run was killed in the middle of its commit: the next one brings order. */
static void clears_a_killed_commit(void **state) {
    (void)state;
    error err;
    struct tokenize_options o = text_options(out);
    assert_int_equal(run("first", &o, &err), 0);
    assert_int_equal(mkdir(in_directory("out/.part" DATASET_COMMIT_SUFFIX), 0700), 0);
    write_file("out/.part" DATASET_COMMIT_SUFFIX "/old-part-00000.rrs", "x", 1);
    dataset *d;
    assert_int_equal(dataset_open(&d, out, &err), -1);
    o.overwrite = true;
    assert_int_equal(run("second", &o, &err), 0);
    assert_string_equal(listing(), "part-00000.rrs tokenizer.json");
    expect_text("second");
}

static void too_many_shards(void **state) {
    (void)state;
    error err;
    stage *g;
    tokenizer *t;
    char path[4096];
    assert_int_equal(tokenizer_open(&t, "bytes", &err), 0);
    assert_int_equal(stage_open(&g, out, "part", false, t, &err), 0);
    assert_int_equal(stage_shard_path(g, 99999, path, sizeof path, &err), 0);
    assert_string_equal(path, in_directory("out/.part.tmp/part-99999.rrs"));
    unit_expect(stage_shard_path(g, 100000, path, sizeof path, &err), &err, ERROR_INPUT,
                "the output would have more than 100000 shards: give larger ones (--shard-tokens)");
    stage_abandon(g);
    tokenizer_close(t);
    assert_string_equal(listing(), "none");
}

/* ---- interruption ------------------------------------------------------------------------------------------------ */

static atomic_bool flag;

static void raise_flag(void *self, uint64_t text_bytes, uint64_t tokens, uint64_t documents) {
    (void)text_bytes, (void)tokens, (void)documents;
    ++*(int *)self;
    atomic_store(&flag, true);
}

static void expect_interruption(const char *path, const struct tokenize_options *o) {
    error err = {0};
    char text[400];
    snprintf(text, sizeof text, "interrupted by a signal; nothing was left in %s", out);
    unit_expect(text_tokenize(&path, 1, o, NULL, &err), &err, ERROR_SYSTEM, text);
    assert_string_equal(listing(), "none");
}

static void interrupted_at_work(void **state) {
    (void)state;
    size_t size = 4 << 20;
    int calls = 0;
    char *bytes = calloc(1, size);
    assert_non_null(bytes);
    const char *path = write_file("input", bytes, size);
    free(bytes);
    struct tokenize_options o = text_options(out);
    o.progress = raise_flag;
    o.progress_self = &calls;
    o.interrupted = &flag;
    atomic_store(&flag, false);
    expect_interruption(path, &o);
    assert_int_equal(calls, 1); /* 16 blocks are there; the first one was the last */
}

static void *raise_flag_later(void *argument) {
    (void)argument;
    usleep(150000);
    atomic_store(&flag, true);
    return NULL;
}

/* Waiting for a pipe that has no writer, and for one whose writer says no more. */
static void interrupted_while_waiting(void **state) {
    (void)state;
    const char *pipe = in_directory("pipe");
    assert_int_equal(mkfifo(pipe, 0600), 0);
    struct tokenize_options o = text_options(out);
    o.interrupted = &flag;
    for (int writer = 0; writer < 2; writer++) {
        int descriptor = writer ? open(pipe, O_RDWR) : -1;
        if (writer) assert_int_equal(write(descriptor, "some text", 9), 9);
        pthread_t thread;
        atomic_store(&flag, false);
        assert_int_equal(pthread_create(&thread, NULL, raise_flag_later, NULL), 0);
        expect_interruption(pipe, &o);
        pthread_join(thread, NULL);
        if (writer) close(descriptor);
    }
}

/* ---- detokenize -------------------------------------------------------------------------------------------------- */

static void detokenize_refuses(void **state) {
    (void)state;
    error err;
    tokenizer *t;
    shard_writer *w;
    char text[1000];
    struct shard_writer_options sample = {.token_bytes = 2,
                                          .frame_tokens = 16,
                                          .zstd_level = 1,
                                          .vocab = 300,
                                          .eod = -1,
                                          .tokenizer_identity = 5,
                                          .tokenizer_name = "other",
                                          .separator = ""};
    assert_int_equal(shard_writer_open(&w, in_directory("z.rrs"), &sample, 1, &err), 0);
    assert_int_equal(shard_writer_finish(w, NULL, &err), 0);
    assert_int_equal(tokenizer_open(&t, "bytes", &err), 0);
    snprintf(text, sizeof text,
             "%s was made with the tokenizer 'other' (0000000000000005), not with 'bytes' "
             "(18f8e12bf5b65336), so its text can't be given back",
             in_directory("z.rrs"));
    unit_expect(detokenize(t, in_directory("z.rrs"), STDOUT_FILENO, &err), &err, ERROR_INPUT, text);
    struct tokenize_options o = text_options(out);
    assert_int_equal(run("text", &o, &err), 0);
    int full = open("/dev/full", O_WRONLY);
    assert_true(full >= 0);
    unit_expect(detokenize(t, out, full, &err), &err, ERROR_SYSTEM, "cannot write text: No space left on device");
    close(full);
    tokenizer_close(t);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(refuses_options),
        TEST(refuses_inputs),
        TEST(damaged_inputs),
        TEST(too_large_windows),
        TEST(makes_the_directory),
        TEST(keeps_what_is_there),
        TEST(overwrites_its_own_prefix),
        TEST(failing_overwrite_changes_nothing),
        TEST(another_tokenizer_is_there),
        TEST(one_run_at_a_time),
        TEST(clears_a_killed_commit),
        TEST(too_many_shards),
        TEST(interrupted_at_work),
        TEST(interrupted_while_waiting),
        TEST(detokenize_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
