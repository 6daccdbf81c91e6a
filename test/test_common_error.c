/* test_common_error.c: kinds, texts, words put in front, and the place a broken precondition names. */
#include "test/unit.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void kinds_and_exit_codes(void **state) {
    (void)state;
    error err = {0};
    assert_int_equal(error_exit_code(&err), 0);
    assert_int_equal(error_input(&err, "lr = %s is no number", "x"), -1);
    assert_string_equal(err.text, "lr = x is no number");
    assert_int_equal(error_exit_code(&err), 2);
    assert_int_equal(error_system(&err, "disk %d is full", 3), -1);
    assert_string_equal(err.text, "disk 3 is full");
    assert_int_equal(error_exit_code(&err), 1);
}

static void context_goes_in_front(void **state) {
    (void)state;
    error err = {0};
    error_input(&err, "bad magic");
    assert_int_equal(error_context(&err, "shard %d", 7), -1);
    assert_string_equal(err.text, "shard 7: bad magic");
    assert_int_equal(err.kind, ERROR_INPUT);
}

static void control_characters_are_shown_as_question_marks(void **state) {
    (void)state;
    error err = {0};
    error_input(&err, "%s", "a\nb\x1b[1m\x7f\xc3\xa9");
    assert_string_equal(err.text, "a?b?[1m?\xc3\xa9");
    error_context(&err, "%s", "c\td");
    assert_string_equal(err.text, "c?d: a?b?[1m?\xc3\xa9");
}

static void long_texts_are_cut_and_terminated(void **state) {
    (void)state;
    char words[3000];
    memset(words, 'w', sizeof words);
    words[sizeof words - 1] = 0;
    error err = {0};
    error_input(&err, "%s", words);
    assert_int_equal(strlen(err.text), sizeof err.text - 1);
    error_context(&err, "front");
    assert_int_equal(strlen(err.text), sizeof err.text - 1);
    assert_memory_equal(err.text, "front: www", 10);
    error_context(&err, "%s", words); /* words in front that fill everything */
    assert_int_equal(strlen(err.text), sizeof err.text - 1);
}

static int forwards(int result, error *err) {
    TRY(result ? error_system(err, "inner") : 0);
    return 1;
}

static void try_forwards_failure_only(void **state) {
    (void)state;
    error err = {0};
    assert_int_equal(forwards(0, &err), 1);
    assert_int_equal(forwards(1, &err), -1);
    assert_string_equal(err.text, "inner");
}

static void assert_names_the_place_and_aborts(void **state) {
    (void)state;
    ASSERT(1 + 1 == 2);
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL); /* cmocka has its own */
        dup2(pipes[1], STDERR_FILENO);
        ASSERT(1 + 1 == 3);
        _exit(0);
    }
    close(pipes[1]);
    char text[512] = "";
    size_t size = 0;
    ssize_t got;
    while ((got = read(pipes[0], text + size, sizeof text - 1 - size)) > 0) size += (size_t)got;
    close(pipes[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    assert_non_null(strstr(text, "test/test_common_error.c:"));
    assert_non_null(strstr(text, "1 + 1 == 3"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kinds_and_exit_codes),
        cmocka_unit_test(context_goes_in_front),
        cmocka_unit_test(control_characters_are_shown_as_question_marks),
        cmocka_unit_test(long_texts_are_cut_and_terminated),
        cmocka_unit_test(try_forwards_failure_only),
        cmocka_unit_test(assert_names_the_place_and_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
