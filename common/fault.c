/* fault.c: rehearsed failures, as fault.h describes. The counter and what was read from the environment are the one
 * piece of state that common/ keeps outside its arguments; both are only used with RIVERRUN_TEST_FAULT set. */
#include "common/fault.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static enum fault_kind { FAULT_OFF, FAULT_KILL, FAULT_FAIL, FAULT_FULL, FAULT_SHORT } fault_kind;
static unsigned long fault_at;
static int fault_reason = ENOSPC;
static atomic_ulong fault_count;
static pthread_once_t fault_once = PTHREAD_ONCE_INIT;

static const struct {
    const char *name;
    enum fault_kind kind;
} kinds[] = {{"kill:", FAULT_KILL}, {"fail:", FAULT_FAIL}, {"full:", FAULT_FULL}, {"short:", FAULT_SHORT}};

static const struct {
    const char *name;
    int reason;
} reasons[] = {{"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EDQUOT", EDQUOT}, {"EACCES", EACCES}};

static bool read_reason(const char *text) {
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++) {
        if (strcmp(text, reasons[i].name) != 0) continue;
        fault_reason = reasons[i].reason;
        return true;
    }
    return false;
}

static bool read_fault(const char *text) {
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        size_t size = strlen(kinds[i].name);
        if (strncmp(text, kinds[i].name, size) != 0) continue;
        char *end;
        fault_at = strtoul(text + size, &end, 10);
        fault_kind = kinds[i].kind;
        if (end == text + size || fault_at == 0) return false;
        return *end == '\0' || (*end == ':' && fault_kind == FAULT_FAIL && read_reason(end + 1));
    }
    return false;
}

static void read_environment(void) {
    const char *text = getenv("RIVERRUN_TEST_FAULT");
    if (!text || read_fault(text)) return;
    /* A test that misspells its fault must not pass for want of one. */
    fprintf(stderr,
            "riverrun: RIVERRUN_TEST_FAULT=%s is none of kill:N, fail:N, fail:N:ENOSPC (or EIO, EDQUOT, EACCES), "
            "full:N and short:N with N >= 1\n",
            text);
    exit(2);
}

/* Counts a change; true if it is the one (or, on a full disk, beyond the one) that the test names. */
static bool is_due(void) {
    pthread_once(&fault_once, read_environment);
    if (fault_kind == FAULT_OFF) return false;
    unsigned long count = atomic_fetch_add(&fault_count, 1) + 1;
    return fault_kind == FAULT_FULL ? count >= fault_at : count == fault_at;
}

int fault_change(enum fault_change change) {
    if (!is_due() || fault_kind == FAULT_SHORT) return 0;
    if (fault_kind == FAULT_FULL && change == FAULT_NEEDS_NONE) return 0;
    if (fault_kind == FAULT_KILL) raise(SIGKILL);
    errno = fault_reason;
    return -1;
}

int fault_write(size_t *size) {
    if (!is_due()) return 0;
    if (fault_kind == FAULT_KILL) raise(SIGKILL);
    if (fault_kind == FAULT_SHORT) {
        if (*size > 1) *size /= 2;
        return 0;
    }
    errno = fault_reason;
    return -1;
}

unsigned long fault_changes(void) {
    return atomic_load(&fault_count);
}
