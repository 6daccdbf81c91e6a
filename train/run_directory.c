/* run_directory.c: lock and config of a run's directory, as run_directory.h describes. Called by trainer_open.c,
 * on rank 0. */
#include "train/run_directory.h"

#include "common/file.h"
#include "common/limits.h"
#include "train/checkpoint.h"

#include <stdio.h>
#include <string.h>
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
    bool held;
    *descriptor = -1;
    TRY(file_join(path, sizeof path, run, "lock", err));
    gethostname(host, sizeof host - 1);
    snprintf(holder, sizeof holder, "process %ld on %s\n", (long)getpid(), host);
    if (file_lock(descriptor, path, holder, &held, err) != 0) return error_context(err, "train.out = %s", run);
    if (!held) return 0;
    refuse_locked(*descriptor, run, err);
    close(*descriptor);
    *descriptor = -1;
    return -1;
}

void run_unlock(int descriptor) {
    if (descriptor >= 0) close(descriptor);
}

int run_has_checkpoint(bool *has, const char *run, error *err) {
    char path[LIMIT_PATH], newest[LIMIT_STEP_NAME];
    struct stat about;
    TRY(file_join(path, sizeof path, run, "latest", err));
    *has = lstat(path, &about) == 0;
    if (*has) return 0;
    TRY(checkpoint_newest(run, newest, err));
    *has = newest[0] != 0;
    return 0;
}

int run_write_config(const char *run, const char *text, error *err) {
    char path[LIMIT_PATH], temporary[LIMIT_PATH];
    TRY(file_join(path, sizeof path, run, "config.ini", err));
    TRY(file_join(temporary, sizeof temporary, run, "config.ini.tmp", err));
    TRY(file_write_all(temporary, text, strlen(text), err));
    TRY(file_rename(temporary, path, err));
    return file_sync_directory(run, err);
}
