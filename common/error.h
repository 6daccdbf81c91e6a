/* error.h: how riverrun reports failure.
 *
 * Three kinds of failure, three treatments:
 *   bad input     a config, option, file or data set that breaks a rule: ERROR_INPUT, exit code 2. The text is one
 *                 sentence that names the option or file, its value, the rule and what would be valid.
 *   environment   disk, memory, MPI, CUDA: ERROR_SYSTEM, exit code 1. The text names what was being done to what.
 *   programmer    a broken precondition inside riverrun: ASSERT, which prints the place and aborts.
 *
 * A function that can fail for the first two reasons takes `error *err` last, returns 0 on success, and on failure
 * fills *err and returns -1. The text has no final newline and no program name. Callers forward with TRY, or clean up
 * at a label and return -1; a caller may put words in front with error_context(). Nothing prints an error but main.
 */
#ifndef RIVERRUN_ERROR_H
#define RIVERRUN_ERROR_H

#include <stdbool.h>
#include <stddef.h>

enum error_kind { ERROR_NONE = 0, ERROR_INPUT, ERROR_SYSTEM };

typedef struct error {
    enum error_kind kind;
    char text[1024];
} error;

/* Fill *err and return -1, so that `return error_input(err, ...)` is the whole failure path. Control characters in what
 * is quoted come out as '?'. */
int error_input(error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));
int error_system(error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Put "WORDS: " in front of the text already in *err; returns -1. */
int error_context(error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The process exit code that belongs to *err: 0, 2 (input) or 1 (system). */
int error_exit_code(const error *err);

/* Forward a failure. */
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != 0) return -1;                                                                                    \
    } while (0)

/* A broken precondition is a bug in riverrun: say where and abort. On in every build; the condition is pure. */
#define ASSERT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) assert_failed(#condition, __FILE__, __LINE__);                                               \
    } while (0)
void assert_failed(const char *condition, const char *file, int line) __attribute__((noreturn));

#endif
