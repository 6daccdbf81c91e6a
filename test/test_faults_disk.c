/* test_faults_disk.c: every command that writes, with the disk failing at each of its changes in turn: that it refuses
 * (full, over quota, broken, forbidden), is full from then on, or takes only half of a write. What must hold is said in
 * test/support_faults.h. Kills are test_train_checkpoint_faults.c's and test_kill.sh's. FAULTS=all tries every reason
 * at every change; without it reasons take turns, and under a sanitizer changes do too. */
#include "test/unit.h"

#include "common/fault.h"
#include "test/support_faults.h"
#include <sys/mman.h>
#include <unistd.h>

static char directory[256];
static unsigned long *changes; /* of the command, told by the child */

static void count_changes(void) {
    *changes = fault_changes();
}

/* How many changes an undisturbed run makes. */
static unsigned long count(const struct fault_scene *s) {
    struct fault none = {.disk = "fail:1000000000", .disarm = count_changes};
    faults_prepare(s);
    assert_int_equal(faults_run(s->words, &none), 0);
    return *changes;
}

/* Every `stride`-th change fails like this. */
static void sweep(const struct fault_scene *s, const char *kind, const char *reason, const char *const *reasons,
                  unsigned long first, unsigned long stride) {
    struct fault_whole whole = faults_undisturbed(s);
    unsigned long all = count(s), failed = 0, tried = 0, wrong = 0;
    for (unsigned long n = first; n <= all; n += stride, tried++) {
        char text[64];
        snprintf(text, sizeof text, "%s:%lu%s", kind, n, reason);
        struct fault f = {.disk = text};
        int code = faults_attempt(s, &whole, &f, text, reasons);
        failed += code == 1;
        wrong += code == -1;
    }
    print_message("%s, %s:N%s: %lu changes, %lu tried, %lu refused\n", s->name, kind, reason, all, tried, failed);
    assert_int_equal(wrong, 0);
    if (strcmp(kind, "short") == 0) assert_int_equal(failed, 0);
    /* Failing to remove what is of no use any more is no failure of the command. */
    else assert_true(tried == 0 || 3 * failed > tried);
}

#if defined __SANITIZE_ADDRESS__
enum { SLOWER = 6 };
#else
enum { SLOWER = 1 };
#endif

static void each_change(const char *kind, bool turns) {
    static const char *const names[] = {":ENOSPC", ":EIO", ":EDQUOT", ":EACCES"};
    static const char *const texts[][2] = {{"No space left on device"},
                                           {"Input/output error"},
                                           {"Disk quota exceeded"},
                                           {"Permission denied"}};
    for (const struct fault_scene *s = fault_scenes; s->name; s++) {
        if (s->reads_only && strcmp(s->name, "shards cat") != 0) continue;
        for (unsigned long i = 0; i < (turns ? 4 : 1); i++) {
            unsigned long stride = (turns && !faults_all() ? 4 : 1) * (faults_all() ? 1 : SLOWER);
            sweep(s, kind, turns ? names[i] : "", texts[i], turns && !faults_all() ? 1 + i : 1, stride);
        }
    }
}

static void a_change_that_fails(void **state) {
    (void)state;
    each_change("fail", true);
}

static void a_disk_that_is_full_from_here_on(void **state) {
    (void)state;
    each_change("full", false);
}

static void a_write_that_comes_short(void **state) {
    (void)state;
    each_change("short", false);
}

/* Results that are printed and can't be: /dev/full takes nothing. */
static void standard_output_that_is_full(void **state) {
    (void)state;
    static const char *const reasons[] = {"No space left on device", NULL};
    for (const struct fault_scene *s = fault_scenes; s->name; s++) {
        if (!s->reads_only) continue;
        faults_shell("rm -f stdout && ln -s /dev/full stdout");
        int code = faults_run(s->words, NULL);
        faults_shell("rm -f stdout");
        if (code != 1) {
            faults_shell("cat stderr >&2");
            fail_msg("%s: exit code %d", s->name, code);
        }
        assert_true(faults_has_sentence(s->name, reasons));
    }
}

static int enter(void **state) {
    (void)state;
    changes = mmap(NULL, sizeof *changes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(changes != MAP_FAILED);
    faults_enter(directory);
    return 0;
}

static int leave(void **state) {
    (void)state;
    munmap(changes, sizeof *changes);
    faults_leave(directory);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_change_that_fails),
        cmocka_unit_test(a_disk_that_is_full_from_here_on),
        cmocka_unit_test(a_write_that_comes_short),
        cmocka_unit_test(standard_output_that_is_full),
    };
    return cmocka_run_group_tests(tests, enter, leave);
}
