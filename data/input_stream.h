/* input_stream.h: the bytes of one input, decompressed. */
#ifndef RIVERRUN_INPUT_STREAM_H
#define RIVERRUN_INPUT_STREAM_H

#include "common/error.h"
#include <stdatomic.h>
#include <stddef.h>

typedef struct input_stream input_stream;

/* `path`: a file, or INPUT_STANDARD. zstd and gzip are told by their first bytes, whatever the name, but a file
 * named .zst or .gz that does not begin so is refused; several compressed
 * streams one after the other are one text. Waiting for input (a pipe, a terminal) ends when *stop becomes true. */
int input_open(input_stream **s, const char *path, const atomic_bool *stop, error *err);

/* Up to `capacity` (>= 1) bytes; *got = 0 only at the end. Compressed input that is damaged or cut is ERROR_INPUT. */
int input_read(input_stream *s, char *bytes, size_t capacity, size_t *got, error *err);

const char *input_name(const input_stream *s); /* for messages: its path, or "standard input" */

void input_close(input_stream *s); /* NULL is fine; standard input stays open */

#endif
