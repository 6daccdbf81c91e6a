/* test_common_file.c: writing, hashing, whole files, directories, and a durable save that is failed and killed at each
 * of its operations in turn. For the latter the program runs itself: `test_common_file save DIRECTORY`. */
#include "test/unit.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

static char directory[256]; /* of the running test */

static int enter(void **state) {
    (void)state;
    unit_directory(directory);
    return 0;
}

static int leave(void **state) {
    (void)state;
    unit_directory_remove(directory);
    return file_exists(directory) ? -1 : 0;
}

static const char *in_directory(const char *name) {
    return unit_path(directory, name);
}

static void assert_file(const char *path, const void *bytes, size_t size) {
    error err;
    char *got;
    size_t got_size;
    assert_int_equal(file_read_all(path, 64 << 20, &got, &got_size, &err), 0);
    assert_int_equal(got_size, size);
    assert_memory_equal(got, bytes, size);
    assert_int_equal(got[size], 0);
    free(got);
}

/* Bytes that differ along the way, so that a piece in the wrong place shows. */
static unsigned char *pattern(size_t size) {
    unsigned char *bytes = malloc(size);
    assert_non_null(bytes);
    for (size_t i = 0; i < size; i++) bytes[i] = (unsigned char)(i * 2654435761u >> 13);
    return bytes;
}

static void writes_in_any_portions(void **state) {
    (void)state;
    error err;
    enum { SIZE = (5 << 20) + 123 }; /* several buffers of the writer, and a tail */
    unsigned char *bytes = pattern(SIZE);
    static const size_t portions[] = {1, 3000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 7, 0, 1 << 21};
    const char *path = in_directory("portions");
    file_writer *w;
    assert_int_equal(file_create(&w, path, &err), 0);
    size_t at = 0;
    for (size_t i = 0; at < SIZE; i++) {
        size_t portion = portions[i % 8] < SIZE - at ? portions[i % 8] : SIZE - at;
        assert_int_equal(file_write(w, bytes + at, portion, &err), 0);
        at += portion;
        assert_int_equal(file_size_so_far(w), at);
        assert_int_equal(file_hash(w), XXH64(bytes, at, 0));
    }
    assert_int_equal(file_close_synced(w, &err), 0);
    assert_file(path, bytes, SIZE);

    uint64_t hash, size;
    assert_int_equal(file_hash_of(path, &hash, &size, &err), 0);
    assert_int_equal(size, SIZE);
    assert_int_equal(hash, XXH64(bytes, SIZE, 0));
    free(bytes);
}

static void the_hash_is_xxh64(void **state) {
    (void)state;
    error err;
    uint64_t hash, size;
    const char *path = in_directory("hashed");
    assert_int_equal(file_write_all(path, "", 0, &err), 0);
    assert_int_equal(file_hash_of(path, &hash, &size, &err), 0);
    assert_int_equal(size, 0);
    assert_int_equal(hash, UINT64_C(0xef46db3751d8e999)); /* the published value for no bytes, seed 0 */
    assert_int_equal(file_write_all(path, "abc", 3, &err), 0);
    assert_int_equal(file_hash_of(path, &hash, &size, &err), 0);
    assert_int_equal(hash, UINT64_C(0x44bc2cf5ad770999)); /* and for "abc" */
}

static void write_at_mends_a_header(void **state) {
    (void)state;
    error err;
    file_writer *w;
    const char *path = in_directory("mended");
    assert_int_equal(file_create(&w, path, &err), 0);
    assert_int_equal(file_write(w, "....body", 8, &err), 0);
    assert_int_equal(file_write_at(w, 0, "HEAD", 4, &err), 0);
    assert_int_equal(file_write(w, "-tail", 5, &err), 0); /* goes on at the end, not behind the header */
    assert_int_equal(file_size_so_far(w), 13);
    assert_int_equal(file_hash(w), XXH64("....body-tail", 13, 0));
    assert_int_equal(file_close_synced(w, &err), 0);
    assert_file(path, "HEADbody-tail", 13);
}

static void create_truncates_and_abandon_keeps(void **state) {
    (void)state;
    error err;
    const char *path = in_directory("again");
    assert_int_equal(file_write_all(path, "a long first text", 17, &err), 0);
    assert_int_equal(file_write_all(path, "short", 5, &err), 0);
    assert_file(path, "short", 5);
    file_writer *w;
    assert_int_equal(file_create(&w, path, &err), 0);
    file_abandon(w);
    assert_file(path, "", 0);
    file_abandon(NULL);
}

static void special_files_are_written(void **state) {
    (void)state;
    error err;
    assert_int_equal(file_write_all("/dev/null", "x", 1, &err), 0); /* can't be synced, which is no failure */
}

static void unwritable_places_are_system_errors(void **state) {
    (void)state;
    error err;
    char text[1200];
    const char *path = in_directory("missing/file");
    snprintf(text, sizeof text, "cannot create %s: No such file or directory", path);
    unit_expect(file_write_all(path, "x", 1, &err), &err, ERROR_SYSTEM, text);
    snprintf(text, sizeof text, "cannot create %s: Is a directory", directory);
    unit_expect(file_write_all(directory, "x", 1, &err), &err, ERROR_SYSTEM, text);
    /* A real full device. */
    unit_expect(file_write_all("/dev/full", "x", 1, &err), &err, ERROR_SYSTEM,
                "cannot write /dev/full: No space left on device");
}

static void unreadable_files_are_bad_input(void **state) {
    (void)state;
    error err;
    char *bytes, text[1200];
    size_t size;
    uint64_t hash, hashed;
    const char *path = in_directory("nothing");
    snprintf(text, sizeof text, "cannot read %s: No such file or directory", path);
    unit_expect(file_read_all(path, 10, &bytes, &size, &err), &err, ERROR_INPUT, text);
    unit_expect(file_hash_of(path, &hash, &hashed, &err), &err, ERROR_INPUT, text);
    snprintf(text, sizeof text, "cannot read %s: it is a directory where a file is needed", directory);
    unit_expect(file_read_all(directory, 10, &bytes, &size, &err), &err, ERROR_INPUT, text);
}

static void the_read_limit_is_exact(void **state) {
    (void)state;
    error err;
    char *bytes, text[1200];
    size_t size;
    const char *path = in_directory("ten");
    assert_int_equal(file_write_all(path, "0123456789", 10, &err), 0);
    assert_int_equal(file_read_all(path, 10, &bytes, &size, &err), 0);
    assert_string_equal(bytes, "0123456789");
    free(bytes);
    snprintf(text, sizeof text, "cannot read %s: it is larger than the 9 bytes allowed here", path);
    unit_expect(file_read_all(path, 9, &bytes, &size, &err), &err, ERROR_INPUT, text);
    assert_null(bytes);
}

struct feed {
    int descriptor;
    const unsigned char *bytes;
    size_t size;
};

static void *feed_pipe(void *argument) {
    struct feed *f = argument;
    size_t at = 0;
    while (at < f->size) {
        ssize_t done = write(f->descriptor, f->bytes + at, f->size - at);
        if (done <= 0) break;
        at += (size_t)done;
    }
    close(f->descriptor);
    return NULL;
}

/* Read `size` bytes through a pipe, which has no size to ask for beforehand. */
static int read_through_pipe(size_t size, size_t limit, char **got, size_t *got_size, error *err) {
    signal(SIGPIPE, SIG_IGN);
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    unsigned char *bytes = pattern(size);
    struct feed f = {pipes[1], bytes, size};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, feed_pipe, &f), 0);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", pipes[0]);
    int result = file_read_all(path, limit, got, got_size, err);
    close(pipes[0]);
    pthread_join(thread, NULL);
    if (result == 0) assert_memory_equal(*got, bytes, size);
    free(bytes);
    return result;
}

static void pipes_are_read_to_their_end(void **state) {
    (void)state;
    error err;
    char *got;
    size_t size;
    assert_int_equal(read_through_pipe(1000000, 1000000, &got, &size, &err), 0);
    assert_int_equal(size, 1000000);
    free(got);
    assert_int_equal(read_through_pipe(1000001, 1000000, &got, &size, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_int_equal(read_through_pipe(0, 10, &got, &size, &err), 0);
    assert_int_equal(size, 0);
    free(got);
}

static void directories_are_made_whole(void **state) {
    (void)state;
    error err;
    char text[1200];
    const char *deep = in_directory("a/b//c/");
    assert_int_equal(file_make_directories(deep, &err), 0);
    assert_true(file_is_directory(deep));
    assert_int_equal(file_make_directories(deep, &err), 0); /* there already */
    assert_int_equal(file_sync_directory(deep, &err), 0);
    assert_int_equal(file_write_all(in_directory("a/plain"), "x", 1, &err), 0);
    const char *blocked = in_directory("a/plain");
    snprintf(text, sizeof text, "cannot make directory %s: a file of that name is in the way", blocked);
    unit_expect(file_make_directories(blocked, &err), &err, ERROR_INPUT, text);
    assert_int_equal(file_make_directories(in_directory("a/plain/below"), &err), -1);
    assert_true(file_exists(blocked) && !file_is_directory(blocked));
}

static void trees_are_removed_links_are_not_followed(void **state) {
    (void)state;
    error err;
    assert_int_equal(file_make_directories(in_directory("tree/one/two"), &err), 0);
    assert_int_equal(file_make_directories(in_directory("outside"), &err), 0);
    assert_int_equal(file_write_all(in_directory("outside/kept"), "k", 1, &err), 0);
    assert_int_equal(file_write_all(in_directory("tree/one/file"), "f", 1, &err), 0);
    assert_int_equal(symlink("../../outside", in_directory("tree/one/link")), 0);
    assert_int_equal(symlink("nowhere", in_directory("tree/dangling")), 0);
    assert_int_equal(file_remove_tree(in_directory("tree"), &err), 0);
    assert_false(file_exists(in_directory("tree")));
    assert_file(in_directory("outside/kept"), "k", 1);
    assert_int_equal(file_remove_tree(in_directory("tree"), &err), 0); /* missing is fine */
    assert_int_equal(file_remove_tree(in_directory("outside/kept"), &err), 0);
    assert_false(file_exists(in_directory("outside/kept")));
}

static void links_move_at_once(void **state) {
    (void)state;
    error err;
    char target[64];
    const char *link = in_directory("latest");
    assert_int_equal(file_link_atomically("step-1", link, &err), 0);
    assert_int_equal(symlink("stale", in_directory("latest.new")), 0); /* left by a killed run */
    assert_int_equal(file_link_atomically("step-2", link, &err), 0);
    ssize_t size = readlink(link, target, sizeof target - 1);
    assert_int_equal(size, 6);
    assert_memory_equal(target, "step-2", 6);
    struct stat about;
    assert_int_equal(lstat(in_directory("latest.new"), &about), -1);
    assert_int_equal(file_link_atomically("x", in_directory("no/where"), &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
}

static void renames(void **state) {
    (void)state;
    error err;
    char text[2600];
    const char *from = in_directory("from"), *to = in_directory("to");
    assert_int_equal(file_write_all(from, "new", 3, &err), 0);
    assert_int_equal(file_write_all(to, "old", 3, &err), 0);
    assert_int_equal(file_rename(from, to, &err), 0);
    assert_file(to, "new", 3);
    snprintf(text, sizeof text, "cannot rename %s to %s: No such file or directory", from, to);
    unit_expect(file_rename(from, to, &err), &err, ERROR_SYSTEM, text);
}

static void paths_join(void **state) {
    (void)state;
    error err;
    char out[8];
    assert_int_equal(file_join(out, sizeof out, "a", "b", &err), 0);
    assert_string_equal(out, "a/b");
    assert_int_equal(file_join(out, sizeof out, "a/", "b", &err), 0);
    assert_string_equal(out, "a/b");
    assert_int_equal(file_join(out, sizeof out, "", "b", &err), 0);
    assert_string_equal(out, "b");
    assert_int_equal(file_join(out, sizeof out, "abc", "def", &err), 0);
    assert_string_equal(out, "abc/def");
    unit_expect(file_join(out, sizeof out, "abcd", "def", &err), &err, ERROR_INPUT,
                "the path abcd/def has more than 7 bytes");
}

static void lists_are_sorted_and_filtered(void **state) {
    (void)state;
    error err;
    char **names;
    size_t count;
    assert_int_equal(file_list(directory, "", &names, &count, &err), 0);
    assert_int_equal(count, 0);
    file_list_free(names, count);
    for (int i = 150; i > 0; i--) {
        char name[32];
        snprintf(name, sizeof name, "shard-%03d.%s", i, i % 3 ? "bin" : "txt");
        assert_int_equal(file_write_all(in_directory(name), "", 0, &err), 0);
    }
    assert_int_equal(file_list(directory, ".bin", &names, &count, &err), 0);
    assert_int_equal(count, 100);
    assert_string_equal(names[0], "shard-001.bin");
    assert_string_equal(names[99], "shard-149.bin");
    for (size_t i = 1; i < count; i++) assert_true(strcmp(names[i - 1], names[i]) < 0);
    file_list_free(names, count);
    assert_int_equal(file_list(in_directory("none"), "", &names, &count, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_null(names);
}

/* ---- files that grow, locks -------------------------------------------------------------------------------------- */

static void lines_are_appended(void **state) {
    (void)state;
    error err = {0};
    file_appender *a;
    const char *path = in_directory("log");
    assert_int_equal(file_append_open(&a, path, 0, &err), 0);
    assert_int_equal(file_append(a, "one\n", 4, &err), 0);
    assert_int_equal(file_append(a, "two\nthr", 7, &err), 0);
    assert_int_equal(file_append_sync(a, &err), 0);
    file_append_close(a);
    assert_file(path, "one\ntwo\nthr", 11);
    assert_int_equal(file_append_open(&a, path, 8, &err), 0); /* without the line that has no end */
    assert_int_equal(file_append(a, "three\n", 6, &err), 0);
    file_append_close(a);
    assert_file(path, "one\ntwo\nthree\n", 14);
    assert_int_equal(file_append_open(&a, in_directory("none/log"), 0, &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
    assert_null(a);
    assert_int_equal(file_append_open(&a, "/dev/full", 0, &err), 0);
    assert_int_equal(file_append(a, "x", 1, &err), -1);
    assert_string_equal(err.text, "cannot write /dev/full: No space left on device");
    file_append_close(a);
    file_append_close(NULL);
}

/* What is in front stays when an append comes short of room in the middle of a line. */
static void an_append_that_fails_is_taken_back(void **state) {
    (void)state;
    const char *path = in_directory("log");
    pid_t child = fork();
    if (child == 0) {
        error err = {0};
        file_appender *a;
        const struct rlimit limit = {.rlim_cur = 10, .rlim_max = RLIM_INFINITY};
        signal(SIGXFSZ, SIG_IGN);
        bool right = file_append_open(&a, path, 0, &err) == 0 && file_append(a, "first\n", 6, &err) == 0 &&
                     setrlimit(RLIMIT_FSIZE, &limit) == 0 && file_append(a, "second\n", 7, &err) == -1 &&
                     strstr(err.text, strerror(EFBIG));
        file_append_close(a);
        _exit(right ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_file(path, "first\n", 6);
}

static void a_lock_has_one_holder(void **state) {
    (void)state;
    error err = {0};
    int first, second;
    bool held;
    const char *path = in_directory("lock");
    assert_int_equal(file_lock(&first, path, "the first and longer\n", &held, &err), 0);
    assert_true(first >= 0 && !held);
    assert_int_equal(file_lock(&second, path, "second\n", &held, &err), 0);
    assert_true(second >= 0 && held);
    close(second);
    assert_file(path, "the first and longer\n", 21);
    close(first);
    assert_int_equal(file_lock(&second, path, "second\n", &held, &err), 0);
    assert_true(second >= 0 && !held);
    assert_file(path, "second\n", 7);
    close(second);
    assert_int_equal(file_lock(&second, in_directory("none/lock"), "x", &held, &err), -1);
    assert_int_equal(err.kind, ERROR_SYSTEM);
}

/* ---- rehearsed failures ----------------------------------------------------------------------------------------- */

enum { SAVED = (2 << 20) + 5 }; /* bytes in the file of a save: three buffers */

/* A durable save as file.h describes it. Byte `fill` tells one save from another. */
static int save(const char *root, int fill, error *err) {
    char temporary[PATH_MAX], final[PATH_MAX], path[PATH_MAX], link[PATH_MAX], name[32];
    snprintf(name, sizeof name, "save-%d", fill);
    TRY(file_join(temporary, sizeof temporary, root, "unfinished", err));
    TRY(file_join(final, sizeof final, root, name, err));
    TRY(file_join(path, sizeof path, temporary, "weights", err));
    TRY(file_join(link, sizeof link, root, "latest", err));
    TRY(file_remove_tree(temporary, err));
    TRY(file_make_directories(temporary, err));
    file_writer *w;
    TRY(file_create(&w, path, err));
    char *bytes = malloc(SAVED);
    if (bytes) memset(bytes, fill, SAVED);
    int result = bytes ? 0 : error_system(err, "no memory");
    for (size_t at = 0; result == 0 && at < SAVED; at += 100000) {
        result = file_write(w, bytes + at, SAVED - at < 100000 ? SAVED - at : 100000, err);
    }
    if (result == 0) result = file_write_at(w, 0, bytes, 1, err);
    free(bytes);
    if (result != 0) {
        file_abandon(w);
        return -1;
    }
    TRY(file_close_synced(w, err));
    TRY(file_sync_directory(temporary, err));
    TRY(file_rename(temporary, final, err));
    TRY(file_sync_directory(root, err));
    TRY(file_link_atomically(name, link, err));
    return file_sync_directory(root, err);
}

/* Run `save` number `fill` in a process of its own with this fault; its wait status. */
static int save_with(const char *fault, int fill) {
    char number[16];
    snprintf(number, sizeof number, "%d", fill);
    pid_t child = fork();
    if (child == 0) {
        if (fault) setenv("RIVERRUN_TEST_FAULT", fault, 1);
        if (!freopen("/dev/null", "w", stderr)) _exit(9);
        execl("/proc/self/exe", "test_common_file", "save", directory, number, (char *)NULL);
        _exit(9);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

/* `latest` leads to a whole save, number `least` or later; its number. */
static int latest_is_whole(int least) {
    char target[64];
    error err;
    ssize_t size = readlink(in_directory("latest"), target, sizeof target - 1);
    assert_true(size > 5);
    target[size] = 0;
    int fill = atoi(target + 5);
    assert_true(fill >= least);
    char *bytes = malloc(SAVED);
    assert_non_null(bytes);
    memset(bytes, fill, SAVED);
    char path[PATH_MAX];
    assert_int_equal(file_join(path, sizeof path, in_directory("latest"), "weights", &err), 0);
    assert_file(path, bytes, SAVED);
    free(bytes);
    return fill;
}

/* Fail or kill operation 1, 2, ... of a save until a save gets through untouched; how many operations there were. */
static int rehearse(const char *kind) {
    assert_int_equal(save_with(NULL, 1), 0);
    int done = latest_is_whole(1);
    for (int n = 1; n < 100; n++) {
        char fault[32];
        snprintf(fault, sizeof fault, "%s:%d", kind, n);
        int status = save_with(fault, done + 1);
        if (status == 0) {
            assert_int_equal(latest_is_whole(done + 1), done + 1);
            return n - 1;
        }
        if (strcmp(kind, "kill") == 0)
            assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        else
            assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
        done = latest_is_whole(done);
        char again[32]; /* a name taken by a save whose link never moved is cleared, as a new start would */
        snprintf(again, sizeof again, "save-%d", done + 1);
        unit_directory_remove(in_directory(again));
    }
    fail_msg("the save never got through");
    return 0;
}

/* remove (1), make directory, create, write * 3 (the last by write_at's flush), write_at, sync, sync directory, rename,
 * sync directory, link, rename, sync directory. What a failed save leaves behind adds to the first. */
enum { OPERATIONS_LEAST = 14 };

static void a_failed_save_loses_nothing(void **state) {
    (void)state;
    assert_true(rehearse("fail") >= OPERATIONS_LEAST);
}

static void a_killed_save_loses_nothing(void **state) {
    (void)state;
    assert_true(rehearse("kill") >= OPERATIONS_LEAST);
}

/* A disk that stays full refuses all but removing and renaming, so what fails is cleared up. */
static void a_full_disk_loses_nothing(void **state) {
    (void)state;
    assert_true(rehearse("full") >= OPERATIONS_LEAST - 3); /* the last that needs room is the link */
}

static void a_short_write_is_completed(void **state) {
    (void)state;
    for (int n = 1; n <= OPERATIONS_LEAST + 3; n++) {
        char fault[32];
        snprintf(fault, sizeof fault, "short:%d", n);
        assert_int_equal(save_with(fault, n), 0);
        assert_int_equal(latest_is_whole(n), n);
    }
}

static void a_misspelt_fault_is_refused(void **state) {
    (void)state;
    static const char *const wrong[] = {"fial:1", "fail", "fail:", "fail:x", "fail:0", "kill:1x", "",
                                        "fail:1:", "fail:1:ENOENT", "fail:1EIO", "kill:1:EIO", "short:", "full:1:EIO"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        int status = save_with(wrong[i], 1);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 2);
    }
}

int main(int count, char **arguments) {
    if (count == 4 && strcmp(arguments[1], "save") == 0) {
        error err = {0};
        if (save(arguments[2], atoi(arguments[3]), &err) == 0) return 0;
        /* Every injected failure must come out as one about the machine, with the reason in it. */
        return err.kind == ERROR_SYSTEM && strstr(err.text, strerror(ENOSPC)) ? 1 : 3;
    }
#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)
    const struct CMUnitTest tests[] = {
        TEST(writes_in_any_portions),
        TEST(the_hash_is_xxh64),
        TEST(write_at_mends_a_header),
        TEST(create_truncates_and_abandon_keeps),
        TEST(special_files_are_written),
        TEST(unwritable_places_are_system_errors),
        TEST(unreadable_files_are_bad_input),
        TEST(the_read_limit_is_exact),
        TEST(pipes_are_read_to_their_end),
        TEST(directories_are_made_whole),
        TEST(trees_are_removed_links_are_not_followed),
        TEST(links_move_at_once),
        TEST(renames),
        TEST(paths_join),
        TEST(lists_are_sorted_and_filtered),
        TEST(lines_are_appended),
        TEST(an_append_that_fails_is_taken_back),
        TEST(a_lock_has_one_holder),
        TEST(a_failed_save_loses_nothing),
        TEST(a_killed_save_loses_nothing),
        TEST(a_full_disk_loses_nothing),
        TEST(a_short_write_is_completed),
        TEST(a_misspelt_fault_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
