/* test_train_checkpoint_faults.c: kills and full disks during a save, at every operation that changes the disk.
 *
 * Whatever the moment, `latest` then points to a complete checkpoint that holds the step before or the one being saved,
 * bit for bit (or is absent, where there was none before), and the next save succeeds and leaves no rest behind. What
 * this can not show is that the syncs are there and in the right places: to a kill of the process, unlike a loss of
 * power, the disk's cache is the disk.
 *
 * RIVERRUN_TEST_FAULT is read once in a process, at its first change of the disk. So every save and every look runs in
 * a child, and the parent makes its copies of directories with cp; it starts no threads and changes nothing through
 * common/file.h until the end.
 */
#include "test/unit.h"

#include "test/support_checkpoint.h"
#include "train/conversion.h"
#include "train/commands.h"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef RIVERRUN_OPENMP
#include <omp.h>
#endif

static char directory[256];

struct job {
    const char *run;
    int64_t step, keep;
    int64_t found; /* what a look gives back: see look() */
};

/* Run `body` in a child with this fault ("" = none). Returns its exit code, or 128 + the signal that ended it. */
static int in_child(const char *fault, int (*body)(const struct job *job), const struct job *job) {
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (fault[0]) setenv("RIVERRUN_TEST_FAULT", fault, 1);
        else unsetenv("RIVERRUN_TEST_FAULT");
        int code = body(job);
        fflush(NULL);
        _exit(code);
    }
    int status;
    assert_true(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void shell(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void shell(const char *format, ...) {
    char command[2000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(command, sizeof command, format, arguments);
    va_end(arguments);
    assert_int_equal(system(command), 0);
}

/* ---- what children do -------------------------------------------------------------------------------------------- */

static int report(int result, const error *err) {
    if (result == 0) return 0;
    if (!err->text[0]) return 99; /* a failure without a sentence */
    return error_exit_code(err);
}

static int save(const struct job *job) {
    struct comm one;
    struct parts p;
    error err = {0};
    ASSERT(comm_open(&one, &err) == 0);
    parts_open(&p, &one, PRECISION_F32, parts_text);
    int result = parts_save(&p, job->run, job->step, job->keep, &err);
    parts_close(&p);
    return report(result, &err);
}

enum { LOOK_ABSENT = 100, LOOK_BROKEN = 101 };

/* Whatever has the name of a checkpoint is a complete one. */
static bool all_complete(const char *run) {
    char **names, path[500];
    size_t count;
    error err = {0};
    bool good = true;
    ASSERT(file_list(run, "", &names, &count, &err) == 0);
    for (size_t i = 0; i < count; i++) {
        struct checkpoint *c;
        if (strncmp(names[i], "step-", 5) != 0) continue;
        snprintf(path, sizeof path, "%s/%s", run, names[i]);
        if (checkpoint_open(&c, path, &err) == 0) {
            checkpoint_close(c);
        } else {
            fprintf(stderr, "%s\n", err.text);
            good = false;
        }
    }
    file_list_free(names, count);
    return good;
}

/* Exit code: the step that `latest` holds, once every bit of it is compared; LOOK_ABSENT without `latest`. */
static int look(const struct job *job) {
    char path[500];
    if (access(job->run, F_OK) == 0 && !all_complete(job->run)) return LOOK_BROKEN;
    struct comm one;
    struct parts p;
    error err = {0};
    struct trainer_state state;
    snprintf(path, sizeof path, "%s/latest", job->run);
    if (access(path, F_OK) != 0) return readlink(path, (char[8]){0}, 8) < 0 ? LOOK_ABSENT : LOOK_BROKEN;
    ASSERT(comm_open(&one, &err) == 0);
    parts_open(&p, &one, PRECISION_F32, parts_text);
    int code = LOOK_BROKEN;
    if (parts_load(&p, path, &state, &err) != 0) {
        fprintf(stderr, "%s\n", err.text);
    } else {
        uint64_t digest = parts_digest(&p);
        parts_fill(&p, state.step);
        parts_expect_state(&state, state.step);
        if (digest == parts_digest(&p)) code = (int)state.step;
    }
    parts_close(&p);
    return code;
}

/* Names in the run's directory, compared with those expected. */
static void expect_names(const char *run, const char *expected) {
    char text[1000] = "";
    char **names;
    size_t count;
    error err = {0};
    assert_int_equal(file_list(run, "", &names, &count, &err), 0);
    for (size_t i = 0; i < count; i++) snprintf(text + strlen(text), sizeof text - strlen(text), "%s ", names[i]);
    file_list_free(names, count);
    assert_string_equal(text, expected);
}

/* ---- every operation of a save ----------------------------------------------------------------------------------- */

struct scene {
    const char *name;
    int64_t before;         /* what `latest` holds before: a step, or LOOK_ABSENT */
    int64_t step, keep;     /* the save under test */
    const char *after;      /* the directory after the save that follows undisturbed */
};

static void check_after(const struct scene *s, const char *kind, int n, const char *run, bool *moved) {
    struct job job = {.run = run, .step = s->step, .keep = s->keep};
    int found = in_child("", look, &job);
    if (found != s->before && found != s->step)
        fail_msg("%s, %s:%d: latest holds %d, neither %d nor %d", s->name, kind, n, found, (int)s->before,
                 (int)s->step);
    /* Once it has moved, a later fault must not find it moved back. */
    if (found == s->step && s->before != s->step) *moved = true;
    else if (*moved && s->before != s->step) fail_msg("%s, %s:%d: latest had moved earlier already", s->name, kind, n);
    if (in_child("", save, &job) != 0) fail_msg("%s, %s:%d: the next save failed", s->name, kind, n);
    assert_int_equal(in_child("", look, &job), s->step);
    expect_names(run, s->after);
}

/* Children are slow to start with a sanitizer, which is not there to find what this test is after. */
#if defined __SANITIZE_ADDRESS__
enum { STRIDE = 5 };
#else
enum { STRIDE = 1 };
#endif

/* Faults at operation 1, 2, ... until the save gets through undisturbed. */
static void rehearse(const struct scene *s, const char *kind) {
    char run[500], fault[40];
    bool moved = false;
    int wanted = strcmp(kind, "kill") == 0 ? 128 + SIGKILL : 1;
    for (int n = 1;; n += STRIDE) {
        assert_true(n < 1000);
        snprintf(run, sizeof run, "%s/%s", directory, s->name);
        snprintf(fault, sizeof fault, "%s:%d", kind, n);
        shell("rm -rf '%s' && cp -a '%s/base-%s' '%s'", run, directory, s->name, run);
        struct job job = {.run = run, .step = s->step, .keep = s->keep};
        int code = in_child(fault, save, &job);
        if (code != wanted && code != 0) fail_msg("%s, %s: exit code %d", s->name, fault, code);
        check_after(s, kind, n, run, &moved);
        if (code != 0) continue;
        /* At least: a directory, nine files of two operations and more, two renames, a link. */
        assert_true(n > 25);
        print_message("%s, %s: %d operations\n", s->name, kind, n - STRIDE);
        return;
    }
}

static void must_save(const char *run, int64_t step) {
    struct job job = {.run = run, .step = step};
    assert_int_equal(in_child("", save, &job), 0);
}

/* The first save of a run: into a directory that is not there. */
static void the_first_save(void **state) {
    (void)state;
    struct scene s = {.name = "first", .before = LOOK_ABSENT, .step = 1, .after = "latest step-00000001 "};
    shell("mkdir '%s/base-first'", directory);
    rehearse(&s, "kill");
    rehearse(&s, "fail");
}

/* A later one, after which an old checkpoint goes. */
static void a_save_that_removes_old_ones(void **state) {
    (void)state;
    char base[400];
    struct scene s = {.name = "later", .before = 2, .step = 3, .keep = 1, .after = "latest step-00000003 "};
    snprintf(base, sizeof base, "%s/base-later", directory);
    must_save(base, 1);
    must_save(base, 2);
    rehearse(&s, "kill");
    rehearse(&s, "fail");
}

/* A kill came between the rename and `latest`, the run went on from the step before, and is here again. The directory
 * of this step is another save's (here of other contents), and a piece of a killed one lies about. */
static void a_save_of_a_step_that_is_there(void **state) {
    (void)state;
    char base[400];
    struct scene s = {
        .name = "again", .before = 2, .step = 3, .keep = 2, .after = "latest step-00000002 step-00000003 "};
    snprintf(base, sizeof base, "%s/base-again", directory);
    must_save(base, 1);
    must_save(base, 2);
    must_save(base, 4);
    shell("cd '%s' && mv step-00000004 step-00000003 && ln -sfn step-00000002 latest && cp -r step-00000001 "
          "tmp-step-00000003 && "
          "rm tmp-step-00000003/trainer.json",
          base);
    rehearse(&s, "kill");
    rehearse(&s, "fail");
}

/* ---- export: there or not there ---------------------------------------------------------------------------------- */

static int export_it(const struct job *job) {
    char from[500], out[500], command[] = "export", flag[] = "--out";
    error err = {0};
    snprintf(from, sizeof from, "%s/run", job->run);
    snprintf(out, sizeof out, "%s/out", job->run);
    char *arguments[] = {command, from, flag, out, NULL};
    return report(command_export(4, arguments, &err), &err);
}

/* Exit code 0: a complete model directory. */
static int open_export(const struct job *job) {
    char out[500];
    struct checkpoint *c;
    struct model_config *mc;
    error err = {0};
    snprintf(out, sizeof out, "%s/out", job->run);
    if (access(out, F_OK) != 0) return LOOK_ABSENT;
    int result = checkpoint_open(&c, out, &err);
    if (result == 0) result = model_config_bind(&mc, checkpoint_config(c), BYTES_VOCAB, &err);
    if (result == 0) result = weights_check(&c->weights, &mc->params, &err);
    return report(result, &err);
}

static void an_export_is_there_or_not(void **state) {
    (void)state;
    static const char *const kinds[] = {"kill", "fail"};
    char base[400], fault[40];
    snprintf(base, sizeof base, "%s/export", directory);
    shell("mkdir '%s'", base);
    char run[500];
    snprintf(run, sizeof run, "%s/run", base);
    must_save(run, 1);
    struct job job = {.run = base};
    for (int k = 0; k < 2; k++) {
        int code = 1;
        for (int n = 1; code != 0; n += STRIDE) {
            assert_true(n < 1000);
            snprintf(fault, sizeof fault, "%s:%d", kinds[k], n);
            code = in_child(fault, export_it, &job);
            if (code != 0) assert_int_equal(code, k ? 1 : 128 + SIGKILL);
            int found = in_child("", open_export, &job);
            if (found != 0 && (found != LOOK_ABSENT || code == 0))
                fail_msg("%s: code %d, found %d", fault, code, found);
            if (k == 1 && found == LOOK_ABSENT) expect_names(base, "run "); /* a failure cleans up behind itself */
            shell("rm -rf '%s/out'", base);
        }
        assert_int_equal(in_child("", export_it, &job), 0);
        expect_names(base, "out run ");
        shell("rm -rf '%s/out'", base);
    }
}

static int make_directory(void **state) {
    (void)state;
    parts_directory(directory);
    return 0;
}

static int remove_directory(void **state) {
    (void)state;
    unit_directory_remove(directory);
    return 0;
}

int main(void) {
#ifdef RIVERRUN_OPENMP
    omp_set_num_threads(1); /* hundreds of children start, and threads would be most of their work */
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_first_save),
        cmocka_unit_test(a_save_that_removes_old_ones),
        cmocka_unit_test(a_save_of_a_step_that_is_there),
        cmocka_unit_test(an_export_is_there_or_not),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
