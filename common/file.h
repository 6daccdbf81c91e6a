/* file.h: the thin layer through which riverrun changes the disk.
 *
 * Everything that writes goes through these functions, so that messages are uniform and tests can rehearse failure: the
 * environment variable RIVERRUN_TEST_FAULT makes the N-th change fail, come short, or kill the process
 * (common/fault.h).
 *
 * A durable save is: write files under a temporary directory name, file_close_synced each, file_sync_directory,
 * file_rename, file_sync_directory of the parent.
 */
#ifndef RIVERRUN_FILE_H
#define RIVERRUN_FILE_H

#include "common/error.h"
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* A file being written: a path (owned copy) for messages, a descriptor, a buffer, and the running XXH64 (seed 0) of the
 * bytes written in order. */
typedef struct file_writer file_writer;

int file_create(file_writer **w, const char *path, error *err);             /* truncates */
int file_write(file_writer *w, const void *bytes, size_t size, error *err); /* appends; buffered */
/* Not hashed; flushes first, and file_write goes on where it was. */
int file_write_at(file_writer *w, uint64_t offset, const void *bytes, size_t size, error *err);
uint64_t file_hash(const file_writer *w); /* XXH64 of all file_write bytes so far */
uint64_t file_size_so_far(const file_writer *w);
int file_close_synced(file_writer *w, error *err); /* flush, fsync, close, free; frees on failure too */
void file_abandon(file_writer *w);                 /* close and free, keep what is on disk; NULL is fine */

/* All of `bytes` to a descriptor that is the caller's, such as standard output; `name` stands for it in messages. */
int file_write_out(int descriptor, const char *name, const void *bytes, size_t size, error *err);

/* A file that grows line by line. Opening makes it if need be and cuts it to `keep` bytes; each file_append is one
 * write where the system allows it, so that a killed run leaves whole lines, and one that fails is taken back. */
typedef struct file_appender file_appender;
int file_append_open(file_appender **a, const char *path, uint64_t keep, error *err);
int file_append(file_appender *a, const void *bytes, size_t size, error *err);
int file_append_sync(file_appender *a, error *err);
void file_append_close(file_appender *a); /* NULL is fine */

/* Make the file `path` if need be, lock it, and write the line `holder` into it. The lock goes with *descriptor, which
 * the caller closes (-1: none). *held: another process has the lock; then *descriptor is only good for reading who. A
 * file system without locks is warned of and locked by nobody. */
int file_lock(int *descriptor, const char *path, const char *holder, bool *held, error *err);

/* Whole files. file_read_all allocates *bytes (one extra 0 byte behind it); the caller frees. A file above `limit`
 * bytes is ERROR_INPUT. */
int file_read_all(const char *path, size_t limit, char **bytes, size_t *size, error *err);
int file_write_all(const char *path, const void *bytes, size_t size, error *err); /* create, write, sync, close */
int file_hash_of(const char *path, uint64_t *hash, uint64_t *size, error *err);   /* XXH64 by streaming */

int file_make_directories(const char *path, error *err); /* like mkdir -p */
int file_sync_directory(const char *path, error *err);
int file_rename(const char *from, const char *to, error *err);
int file_remove_tree(const char *path, error *err); /* like rm -rf; a missing path is fine */
/* A symlink via a temporary name and rename: at any moment there is the old one or the new one. */
int file_link_atomically(const char *target, const char *link_path, error *err);
bool file_exists(const char *path);
bool file_is_directory(const char *path);

/* Join "a" and "b" as "a/b" into out[PATH_MAX]; a result that does not fit is ERROR_INPUT. */
int file_join(char *out, size_t out_size, const char *a, const char *b, error *err);

/* Names (not paths) in a directory that end with `suffix`, sorted bytewise; *names and each name are malloc'ed. */
int file_list(const char *directory, const char *suffix, char ***names, size_t *count, error *err);
void file_list_free(char **names, size_t count);

#endif
