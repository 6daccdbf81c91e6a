/* error.c: fills the error values described in error.h. Owns nothing; called from everywhere. */
#include "common/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Messages quote what users and files contain; a control character in it must not reach a terminal. */
static void make_printable(char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < ' ' || *text == 127) *text = '?';
    }
}

static void error_fill(error *err, enum error_kind kind, const char *format, va_list arguments) {
    err->kind = kind;
    vsnprintf(err->text, sizeof err->text, format, arguments);
    make_printable(err->text);
}

int error_input(error *err, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    error_fill(err, ERROR_INPUT, format, arguments);
    va_end(arguments);
    return -1;
}

int error_system(error *err, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    error_fill(err, ERROR_SYSTEM, format, arguments);
    va_end(arguments);
    return -1;
}

int error_context(error *err, const char *format, ...) {
    char text[sizeof err->text];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    /* Where both don't fit, the end of the older text is what is lost: the words in front say where it happened. */
    if (length >= 0 && (size_t)length < sizeof text) {
        snprintf(text + length, sizeof text - (size_t)length, ": %s", err->text);
    }
    make_printable(text);
    memcpy(err->text, text, sizeof text);
    return -1;
}

int error_exit_code(const error *err) {
    switch (err->kind) {
    case ERROR_NONE: return 0;
    case ERROR_INPUT: return 2;
    case ERROR_SYSTEM: return 1;
    }
    return 1;
}

void assert_failed(const char *condition, const char *file, int line) {
    fprintf(stderr, "riverrun: bug: %s:%d: the condition (%s) does not hold\n", file, line, condition);
    abort();
}
