/* run_directory.c: lock and config of a run's directory, as run_directory.h describes. Called by trainer_open.c,
 * on rank 0. */
#include "train/run_directory.h"

#include "common/file.h"
#include "common/limits.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int refuse_locked(int descriptor, const char *run, error *err) {
    char holder[200] = "";
    ssize_t size = pread(descriptor, holder, sizeof holder - 1, 0);
    if (size < 0) size = 0;
    holder[size] = '\0';
    holder[strcspn(holder, "\n")] = '\0';
    return error_input(
        err,
        "train.out = %s: another riverrun trains into this directory (%s); wait for it, stop it, or choose "
        "another directory",
        run, holder[0] ? holder : "it has not said which");
}

int run_lock(int *descriptor, const char *run, error *err) {
    char path[LIMIT_PATH], host[128] = "", holder[200];
    *descriptor = -1;
    TRY(file_join(path, sizeof path, run, "lock", err));
    /* Not through common/file.h: the lock is no content, and opening it must not disturb who holds it. */
    int opened = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (opened < 0) return error_system(err, "train.out = %s: cannot open %s: %s", run, path, strerror(errno));
    if (flock(opened, LOCK_EX | LOCK_NB) != 0) {
        int why = errno;
        int result = 0;
        if (why == EWOULDBLOCK) result = refuse_locked(opened, run, err);
        else
            fprintf(stderr, "riverrun: %s can't be locked (%s); make sure that no other riverrun uses it\n", run,
                    strerror(why));
        close(opened);
        return result;
    }
    gethostname(host, sizeof host - 1);
    int size = snprintf(holder, sizeof holder, "process %ld on %s\n", (long)getpid(), host);
    if (ftruncate(opened, 0) != 0 || pwrite(opened, holder, (size_t)size, 0) != size) {
        error_system(err, "cannot write %s: %s", path, strerror(errno));
        close(opened);
        return -1;
    }
    *descriptor = opened;
    return 0;
}

void run_unlock(int descriptor) {
    if (descriptor >= 0) close(descriptor);
}

bool run_has_checkpoint(const char *run) {
    char path[LIMIT_PATH];
    error ignored = {0};
    struct stat about;
    return file_join(path, sizeof path, run, "latest", &ignored) == 0 && lstat(path, &about) == 0;
}

int run_write_config(const char *run, const char *text, error *err) {
    char path[LIMIT_PATH], temporary[LIMIT_PATH];
    TRY(file_join(path, sizeof path, run, "config.ini", err));
    TRY(file_join(temporary, sizeof temporary, run, "config.ini.tmp", err));
    TRY(file_write_all(temporary, text, strlen(text), err));
    TRY(file_rename(temporary, path, err));
    return file_sync_directory(run, err);
}
