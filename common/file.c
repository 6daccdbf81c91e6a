/* file.c: every change riverrun makes to the disk, as file.h describes. Owns nothing beyond its file_writers.
 *
 * Each changing system call is preceded by fault_change or fault_write (common/fault.h), where tests make it fail.
 */
#include "common/file.h"

#include "common/fault.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { WRITE_BUFFER = 1 << 20, READ_BUFFER = 1 << 20 }; /* bytes: large enough that system calls cost nothing */

struct file_writer {
    char *path;
    int descriptor;
    char *buffer;
    size_t filled;       /* bytes waiting in the buffer */
    uint64_t appended;   /* bytes given to file_write */
    XXH64_state_t *hash; /* of those bytes */
};

/* ---- writing ---------------------------------------------------------------------------------------------------- */

static void writer_free(file_writer *w) {
    free(w->path);
    free(w->buffer);
    XXH64_freeState(w->hash);
    free(w);
}

int file_create(file_writer **out, const char *path, error *err) {
    *out = NULL;
    file_writer *w = calloc(1, sizeof *w);
    if (!w) return error_system(err, "no memory to write %s", path);
    w->path = strdup(path);
    w->buffer = malloc(WRITE_BUFFER);
    w->hash = XXH64_createState();
    if (!w->path || !w->buffer || !w->hash) {
        writer_free(w);
        return error_system(err, "no memory to write %s", path);
    }
    XXH64_reset(w->hash, 0);
    w->descriptor = fault_change(FAULT_NEEDS_ROOM) ? -1 : open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w->descriptor < 0) {
        error_system(err, "cannot create %s: %s", path, strerror(errno));
        writer_free(w);
        return -1;
    }
    *out = w;
    return 0;
}

/* Write all of it, in as many calls as it takes: at `offset`, or at the descriptor's own position if offset is -1. */
static int write_fully(int descriptor, const char *path, const char *bytes, size_t size, off_t offset, error *err) {
    while (size > 0) {
        size_t now = size;
        ssize_t done = fault_write(&now) ? -1
                       : offset < 0 ? write(descriptor, bytes, now)
                                    : pwrite(descriptor, bytes, now, offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return error_system(err, "cannot write %s: %s", path, strerror(errno));
        bytes += done;
        size -= (size_t)done;
        if (offset >= 0) offset += done;
    }
    return 0;
}

static int flush(file_writer *w, error *err) {
    size_t size = w->filled;
    w->filled = 0;
    return write_fully(w->descriptor, w->path, w->buffer, size, -1, err);
}

int file_write(file_writer *w, const void *bytes, size_t size, error *err) {
    XXH64_update(w->hash, bytes, size);
    w->appended += size;
    if (size > WRITE_BUFFER - w->filled) TRY(flush(w, err));
    if (size >= WRITE_BUFFER) return write_fully(w->descriptor, w->path, bytes, size, -1, err);
    if (size > 0) memcpy(w->buffer + w->filled, bytes, size);
    w->filled += size;
    return 0;
}

int file_write_at(file_writer *w, uint64_t offset, const void *bytes, size_t size, error *err) {
    TRY(flush(w, err));
    if (offset > INT64_MAX - size) return error_system(err, "cannot write %s: offset too large", w->path);
    return write_fully(w->descriptor, w->path, bytes, size, (off_t)offset, err);
}

uint64_t file_hash(const file_writer *w) {
    return XXH64_digest(w->hash);
}

uint64_t file_size_so_far(const file_writer *w) {
    return w->appended;
}

/* fsync; what can't be synced (a pipe, /dev/null) needs no syncing. */
static int sync_descriptor(int descriptor) {
    if (fault_change(FAULT_NEEDS_NONE)) return -1;
    if (fsync(descriptor) == 0 || errno == EINVAL || errno == EROFS) return 0;
    return -1;
}

int file_close_synced(file_writer *w, error *err) {
    int result = flush(w, err);
    if (result == 0 && sync_descriptor(w->descriptor) != 0) {
        result = error_system(err, "cannot sync %s to disk: %s", w->path, strerror(errno));
    }
    if (close(w->descriptor) != 0 && result == 0) {
        result = error_system(err, "cannot close %s: %s", w->path, strerror(errno));
    }
    writer_free(w);
    return result;
}

void file_abandon(file_writer *w) {
    if (!w) return;
    close(w->descriptor);
    writer_free(w);
}

int file_write_out(int descriptor, const char *name, const void *bytes, size_t size, error *err) {
    return write_fully(descriptor, name, bytes, size, -1, err);
}

/* ---- appending -------------------------------------------------------------------------------------------------- */

struct file_appender {
    char *path;
    int descriptor;
    off_t size; /* of the file, all appended lines included */
};

static int cut(int descriptor, off_t size) {
    return fault_change(FAULT_NEEDS_NONE) != 0 ? -1 : ftruncate(descriptor, size);
}

int file_append_open(file_appender **out, const char *path, uint64_t keep, error *err) {
    *out = NULL;
    file_appender *a = calloc(1, sizeof *a);
    char *copy = strdup(path);
    if (!a || !copy) {
        free(a);
        free(copy);
        return error_system(err, "no memory to write %s", path);
    }
    *a = (file_appender){.path = copy, .size = (off_t)keep};
    a->descriptor =
        fault_change(FAULT_NEEDS_ROOM) != 0 ? -1 : open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    int result = 0;
    if (a->descriptor < 0) result = error_system(err, "cannot open %s: %s", path, strerror(errno));
    /* What can't be cut (a pipe, /dev/null) has nothing to be cut off. */
    else if (cut(a->descriptor, a->size) != 0 && errno != EINVAL)
        result = error_system(err, "cannot cut %s: %s", path, strerror(errno));
    if (result == 0) *out = a;
    else file_append_close(a);
    return result;
}

int file_append(file_appender *a, const void *bytes, size_t size, error *err) {
    if (write_fully(a->descriptor, a->path, bytes, size, -1, err) != 0) {
        /* Where this fails too, the next session cuts the line that has no end. */
        int ignored = cut(a->descriptor, a->size);
        (void)ignored;
        return -1;
    }
    a->size += (off_t)size;
    return 0;
}

int file_append_sync(file_appender *a, error *err) {
    if (sync_descriptor(a->descriptor) == 0) return 0;
    return error_system(err, "cannot sync %s to disk: %s", a->path, strerror(errno));
}

void file_append_close(file_appender *a) {
    if (!a) return;
    if (a->descriptor >= 0) close(a->descriptor);
    free(a->path);
    free(a);
}

/* ---- lock files ------------------------------------------------------------------------------------------------- */

int file_lock(int *descriptor, const char *path, const char *holder, bool *held, error *err) {
    *descriptor = -1;
    *held = false;
    int opened = fault_change(FAULT_NEEDS_ROOM) != 0 ? -1 : open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (opened < 0) return error_system(err, "cannot open %s: %s", path, strerror(errno));
    *descriptor = opened;
    if (flock(opened, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK) *held = true;
        else
            fprintf(stderr, "riverrun: %s can't be locked (%s); make sure that no other riverrun uses it\n", path,
                    strerror(errno));
        return 0;
    }
    int result = 0;
    if (cut(opened, 0) != 0) result = error_system(err, "cannot cut %s: %s", path, strerror(errno));
    else result = write_fully(opened, path, holder, strlen(holder), 0, err);
    if (result == 0) return 0;
    close(opened);
    *descriptor = -1;
    return -1;
}

/* ---- whole files ------------------------------------------------------------------------------------------------ */

/* A path that can't be opened for reading is the caller's input, unless the machine is what failed; errno tells. */
static int cannot_open(const char *what, const char *path, error *err) {
    const char *why = strerror(errno);
    bool machine = errno == EIO || errno == EMFILE || errno == ENFILE || errno == ENOMEM;
    return machine ? error_system(err, "cannot %s %s: %s", what, path, why)
                   : error_input(err, "cannot %s %s: %s", what, path, why);
}

static int open_for_reading(const char *path, int *descriptor, error *err) {
    *descriptor = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (*descriptor >= 0 && fstat(*descriptor, &about) == 0 && S_ISDIR(about.st_mode)) {
        close(*descriptor);
        return error_input(err, "cannot read %s: it is a directory where a file is needed", path);
    }
    if (*descriptor >= 0) return 0;
    return cannot_open("read", path, err);
}

/* Up to `size` bytes; fewer only at the end of the file; -1 on failure. */
static ssize_t read_fully(int descriptor, char *bytes, size_t size) {
    size_t total = 0;
    while (total < size) {
        ssize_t got = read(descriptor, bytes + total, size - total);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        total += (size_t)got;
    }
    return (ssize_t)total;
}

int file_read_all(const char *path, size_t limit, char **bytes, size_t *size, error *err) {
    *bytes = NULL;
    *size = 0;
    int descriptor;
    TRY(open_for_reading(path, &descriptor, err));
    struct stat about;
    size_t capacity = 1 << 16; /* for what has no size beforehand, such as a pipe */
    if (fstat(descriptor, &about) == 0 && S_ISREG(about.st_mode)) capacity = (size_t)about.st_size + 1;
    if (capacity > limit) capacity = limit + 1; /* one byte more than allowed tells that there is more */
    char *buffer = NULL;
    size_t filled = 0;
    for (;;) {
        char *larger = realloc(buffer, capacity + 1);
        ssize_t got = larger ? read_fully(descriptor, larger + filled, capacity - filled) : -1;
        if (larger) buffer = larger;
        if (got < 0) {
            error_system(err, "cannot read %s: %s", path, strerror(errno));
            goto fail;
        }
        filled += (size_t)got;
        if (filled > limit) {
            error_input(err, "cannot read %s: it is larger than the %zu bytes allowed here", path, limit);
            goto fail;
        }
        if (filled < capacity) break;
        capacity = capacity > limit / 2 ? limit + 1 : capacity * 2;
    }
    close(descriptor);
    buffer[filled] = 0;
    *bytes = buffer;
    *size = filled;
    return 0;
fail:
    free(buffer);
    close(descriptor);
    return -1;
}

int file_write_all(const char *path, const void *bytes, size_t size, error *err) {
    file_writer *w;
    TRY(file_create(&w, path, err));
    if (file_write(w, bytes, size, err) != 0) {
        file_abandon(w);
        return -1;
    }
    return file_close_synced(w, err);
}

int file_hash_of(const char *path, uint64_t *hash, uint64_t *size, error *err) {
    int descriptor;
    TRY(open_for_reading(path, &descriptor, err));
    char *buffer = malloc(READ_BUFFER);
    XXH64_state_t *state = XXH64_createState();
    int result = 0;
    if (!buffer || !state) {
        result = error_system(err, "no memory to read %s", path);
        goto done;
    }
    XXH64_reset(state, 0);
    *size = 0;
    ssize_t got;
    while ((got = read_fully(descriptor, buffer, READ_BUFFER)) > 0) {
        XXH64_update(state, buffer, (size_t)got);
        *size += (uint64_t)got;
    }
    if (got < 0) result = error_system(err, "cannot read %s: %s", path, strerror(errno));
    *hash = XXH64_digest(state);
done:
    XXH64_freeState(state);
    free(buffer);
    close(descriptor);
    return result;
}

/* ---- directories and names -------------------------------------------------------------------------------------- */

int file_make_directories(const char *path, error *err) {
    char *prefix = strdup(path);
    if (!prefix) return error_system(err, "no memory to make directory %s", path);
    int result = 0;
    for (char *end = prefix + 1; result == 0 && *prefix; end++) {
        char stop = *end;
        if (stop && stop != '/') continue;
        *end = 0;
        if (!file_is_directory(prefix)) {
            if (fault_change(FAULT_NEEDS_ROOM) != 0 || (mkdir(prefix, 0777) != 0 && errno != EEXIST)) {
                result = error_system(err, "cannot make directory %s: %s", prefix, strerror(errno));
            } else if (!file_is_directory(prefix)) {
                result = error_input(err, "cannot make directory %s: a file of that name is in the way", prefix);
            }
        }
        *end = stop;
        if (!stop) break;
    }
    free(prefix);
    return result;
}

int file_sync_directory(const char *path, error *err) {
    int descriptor = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return error_system(err, "cannot open directory %s: %s", path, strerror(errno));
    int result = 0;
    if (sync_descriptor(descriptor) != 0) {
        result = error_system(err, "cannot sync directory %s to disk: %s", path, strerror(errno));
    }
    close(descriptor);
    return result;
}

int file_rename(const char *from, const char *to, error *err) {
    if (fault_change(FAULT_NEEDS_NONE) != 0 || rename(from, to) != 0) {
        return error_system(err, "cannot rename %s to %s: %s", from, to, strerror(errno));
    }
    return 0;
}

/* Remove `name` in the open directory `parent`, with all below it. errno tells the failure. Links are not followed. */
static int remove_below(int parent, const char *name) {
    if (fault_change(FAULT_NEEDS_NONE) != 0) return -1;
    if (unlinkat(parent, name, 0) == 0 || errno == ENOENT) return 0;
    if (errno != EISDIR && errno != EPERM) return -1;
    int descriptor = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (descriptor < 0) return -1;
    DIR *directory = fdopendir(descriptor);
    if (!directory) {
        close(descriptor);
        return -1;
    }
    int result = 0;
    struct dirent *entry;
    while (result == 0 && (errno = 0, entry = readdir(directory))) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            result = remove_below(dirfd(directory), entry->d_name);
        }
    }
    if (errno != 0) result = -1;
    int why = errno;
    closedir(directory);
    errno = why;
    if (result != 0 || fault_change(FAULT_NEEDS_NONE) != 0) return -1;
    return unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT ? 0 : -1;
}

int file_remove_tree(const char *path, error *err) {
    if (remove_below(AT_FDCWD, path) != 0) return error_system(err, "cannot remove %s: %s", path, strerror(errno));
    return 0;
}

int file_link_atomically(const char *target, const char *link_path, error *err) {
    char *temporary = NULL;
    if (asprintf(&temporary, "%s.new", link_path) < 0) return error_system(err, "no memory to link %s", link_path);
    int result = 0;
    /* A link left behind by a killed run is replaced. */
    if (fault_change(FAULT_NEEDS_NONE) != 0 || (unlink(temporary) != 0 && errno != ENOENT)) {
        result = error_system(err, "cannot remove %s: %s", temporary, strerror(errno));
    } else if (fault_change(FAULT_NEEDS_ROOM) != 0 || symlink(target, temporary) != 0) {
        result = error_system(err, "cannot link %s to %s: %s", temporary, target, strerror(errno));
    } else {
        result = file_rename(temporary, link_path, err);
        if (result != 0) unlink(temporary);
    }
    free(temporary);
    return result;
}

bool file_exists(const char *path) {
    struct stat about;
    return stat(path, &about) == 0;
}

bool file_is_directory(const char *path) {
    struct stat about;
    return stat(path, &about) == 0 && S_ISDIR(about.st_mode);
}

int file_join(char *out, size_t out_size, const char *a, const char *b, error *err) {
    size_t length = strlen(a);
    const char *between = length == 0 || a[length - 1] == '/' ? "" : "/";
    int needed = snprintf(out, out_size, "%s%s%s", a, between, b);
    if (needed < 0 || (size_t)needed >= out_size) {
        return error_input(err, "the path %.200s%s%.200s has more than %zu bytes", a, between, b, out_size - 1);
    }
    return 0;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static bool ends_with(const char *name, const char *suffix) {
    size_t length = strlen(name), tail = strlen(suffix);
    return length >= tail && strcmp(name + length - tail, suffix) == 0;
}

int file_list(const char *path, const char *suffix, char ***names, size_t *count, error *err) {
    *names = NULL;
    *count = 0;
    DIR *directory = opendir(path);
    if (!directory) return cannot_open("list directory", path, err);
    size_t capacity = 0;
    struct dirent *entry;
    while (errno = 0, entry = readdir(directory)) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || !ends_with(name, suffix)) continue;
        if (*count == capacity) {
            size_t larger = capacity ? 2 * capacity : 64;
            char **grown = realloc(*names, larger * sizeof *grown);
            if (!grown) break;
            *names = grown;
            capacity = larger;
        }
        char *copy = strdup(name);
        if (!copy) break;
        (*names)[(*count)++] = copy;
    }
    int why = entry ? ENOMEM : errno;
    closedir(directory);
    if (why != 0) {
        file_list_free(*names, *count);
        *names = NULL;
        *count = 0;
        return error_system(err, "cannot list directory %s: %s", path, strerror(why));
    }
    if (*count > 0) qsort(*names, *count, sizeof **names, compare_names);
    return 0;
}

void file_list_free(char **names, size_t count) {
    for (size_t i = 0; i < count; i++) free(names[i]);
    free(names);
}
