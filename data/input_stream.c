/* input_stream.c: reads plain, zstd and gzip input as a stream, with a fixed buffer.
 *
 * Owns the descriptor and the decompressor. Called by the reading thread of tokenize.
 */
#include "data/input_stream.h"

#include "data/input_list.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

enum {
    BUFFER_BYTES = 1 << 18,
    TEXT_BYTES = 1 << 17,
    LONGEST_MAGIC = 4,
    WAIT_MS = 100, /* how late a request to stop may be noticed while waiting for a pipe */
};

enum input_kind { INPUT_UNKNOWN, INPUT_PLAIN, INPUT_ZSTD, INPUT_GZIP };

struct input_stream {
    const char *path; /* the caller's */
    const atomic_bool *stop;
    int descriptor;
    bool ended; /* the descriptor has no more bytes */
    enum input_kind kind;
    char buffer[BUFFER_BYTES];
    size_t start, end; /* bytes of the buffer that are still to be used */
    ZSTD_DStream *zstd;
    char text[TEXT_BYTES]; /* what zstd made of it: what it says of damage depends on the room it is given */
    size_t text_start, text_end;
    z_stream gzip;
    bool between; /* the last compressed frame or member is complete */
};

int input_open(input_stream **out, const char *path, const atomic_bool *stop, error *err) {
    *out = NULL;
    bool standard = strcmp(path, INPUT_STANDARD) == 0;
    input_stream *s = malloc(sizeof *s);
    if (!s) return error_system(err, "no memory to read input %s", path);
    memset(s, 0, offsetof(struct input_stream, buffer));
    s->start = s->end = 0;
    s->text_start = s->text_end = 0;
    s->zstd = NULL;
    s->gzip = (z_stream){0};
    s->between = false;
    s->path = standard ? "standard input" : path;
    s->stop = stop;
    /* Without O_NONBLOCK opening a named pipe would wait for its writer, out of reach of `stop`. */
    s->descriptor = standard ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (s->descriptor < 0) {
        free(s);
        return error_input(err, "cannot read input %s: %s", path, strerror(errno));
    }
    *out = s;
    return 0;
}

const char *input_name(const input_stream *s) {
    return s->path;
}

void input_close(input_stream *s) {
    if (!s) return;
    if (s->descriptor != STDIN_FILENO) close(s->descriptor);
    ZSTD_freeDStream(s->zstd);
    if (s->kind == INPUT_GZIP) inflateEnd(&s->gzip);
    free(s);
}

/* Read what there is, at least one byte, or find the end. */
static int read_some(input_stream *s, char *bytes, size_t capacity, size_t *got, error *err) {
    *got = 0;
    for (;;) {
        if (atomic_load(s->stop)) return error_system(err, "reading %s was stopped", s->path);
        struct pollfd wait = {.fd = s->descriptor, .events = POLLIN};
        int ready = poll(&wait, 1, WAIT_MS);
        if (ready == 0 || (ready < 0 && errno == EINTR)) continue;
        ssize_t size = ready < 0 ? -1 : read(s->descriptor, bytes, capacity);
        if (size < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (size < 0) return error_system(err, "cannot read %s: %s", s->path, strerror(errno));
        if (size == 0) s->ended = true;
        *got = (size_t)size;
        return 0;
    }
}

/* More bytes behind those in the buffer. */
static int fill(input_stream *s, error *err) {
    if (s->start == s->end) s->start = s->end = 0;
    if (s->end == BUFFER_BYTES || s->ended) return 0;
    size_t got;
    TRY(read_some(s, s->buffer + s->end, BUFFER_BYTES - s->end, &got, err));
    s->end += got;
    return 0;
}

static bool ends_with(const char *name, const char *suffix) {
    size_t length = strlen(name), tail = strlen(suffix);
    return length >= tail && strcmp(name + length - tail, suffix) == 0;
}

/* What counts is how the data begins. But a file that is called compressed and does not begin so is damaged, or
 * misnamed. */
static int check_name(const input_stream *s, error *err) {
    const char *format = ends_with(s->path, ".zst") ? "zstd" : ends_with(s->path, ".gz") ? "gzip" : NULL;
    if (!format || s->kind != INPUT_PLAIN) return 0;
    return error_input(err, "input %s does not begin as %s data does: it is damaged, or plain text under a wrong name",
                       s->path, format);
}

static int recognise(input_stream *s, error *err) {
    while (s->end - s->start < LONGEST_MAGIC && !s->ended) TRY(fill(s, err));
    const unsigned char *first = (const unsigned char *)s->buffer + s->start;
    size_t size = s->end - s->start;
    if (size >= 4 && first[0] == 0x28 && first[1] == 0xB5 && first[2] == 0x2F && first[3] == 0xFD) {
        s->zstd = ZSTD_createDStream();
        if (!s->zstd) return error_system(err, "no memory to decompress %s", s->path);
        s->kind = INPUT_ZSTD;
    } else if (size >= 2 && first[0] == 0x1F && first[1] == 0x8B) {
        /* 16 more than the largest window says: with gzip's header. */
        if (inflateInit2(&s->gzip, 15 + 16) != Z_OK) return error_system(err, "no memory to decompress %s", s->path);
        s->kind = INPUT_GZIP;
    } else {
        s->kind = INPUT_PLAIN;
    }
    return check_name(s, err);
}

static int read_plain(input_stream *s, char *bytes, size_t capacity, size_t *got, error *err) {
    size_t there = s->end - s->start;
    if (there == 0) return read_some(s, bytes, capacity, got, err);
    *got = capacity < there ? capacity : there;
    memcpy(bytes, s->buffer + s->start, *got);
    s->start += *got;
    return 0;
}

static int zstd_failure(const input_stream *s, size_t code, error *err) {
    if (ZSTD_getErrorCode(code) == ZSTD_error_frameParameter_windowTooLarge) {
        return error_input(
            err,
            "input %s needs more than 128 MiB to decompress: compress it with --long=27 or less, or pipe it "
            "through zstd -d --long=31",
            s->path);
    }
    if (ZSTD_getErrorCode(code) == ZSTD_error_memory_allocation) {
        return error_system(err, "no memory to decompress %s", s->path);
    }
    return error_input(err, "input %s is damaged zstd data: %s", s->path, ZSTD_getErrorName(code));
}

/* More text, none only at the end. */
static int decompress(input_stream *s, error *err) {
    ZSTD_outBuffer out = {s->text, TEXT_BYTES, 0};
    while (out.pos == 0) {
        if (s->start == s->end) TRY(fill(s, err));
        bool exhausted = s->start == s->end; /* only at the end of the file */
        if (exhausted && s->between) break;
        ZSTD_inBuffer in = {s->buffer, s->end, s->start};
        size_t code = ZSTD_decompressStream(s->zstd, &out, &in);
        if (ZSTD_isError(code)) return zstd_failure(s, code, err);
        s->start = in.pos;
        s->between = code == 0;
        if (exhausted && !s->between && out.pos == 0) {
            return error_input(err, "input %s is cut off: it ends inside a zstd frame", s->path);
        }
    }
    s->text_start = 0;
    s->text_end = out.pos;
    return 0;
}

static int read_zstd(input_stream *s, char *bytes, size_t capacity, size_t *got, error *err) {
    if (s->text_start == s->text_end) TRY(decompress(s, err));
    size_t there = s->text_end - s->text_start;
    *got = capacity < there ? capacity : there;
    memcpy(bytes, s->text + s->text_start, *got);
    s->text_start += *got;
    return 0;
}

/* After a complete member: is there another one? */
static int next_member(input_stream *s, error *err) {
    while (s->end - s->start < 2 && !s->ended) {
        /* One byte at the buffer's end must move to its start to make room for the next. */
        if (s->end == BUFFER_BYTES && s->start > 0) {
            memmove(s->buffer, s->buffer + s->start, s->end - s->start);
            s->end -= s->start;
            s->start = 0;
        }
        TRY(fill(s, err));
    }
    if (s->start == s->end) return 0;
    const unsigned char *first = (const unsigned char *)s->buffer + s->start;
    if (s->end - s->start < 2 || first[0] != 0x1F || first[1] != 0x8B) {
        return error_input(err, "input %s has bytes after its gzip data that are no gzip data", s->path);
    }
    inflateReset(&s->gzip);
    s->between = false;
    return 0;
}

static int read_gzip(input_stream *s, char *bytes, size_t capacity, size_t *got, error *err) {
    size_t made = 0;
    while (made < capacity) {
        if (s->between) {
            TRY(next_member(s, err));
            if (s->between) break;
        }
        if (s->start == s->end) TRY(fill(s, err));
        size_t now = capacity - made < BUFFER_BYTES ? capacity - made : BUFFER_BYTES; /* zlib counts in 32 bits */
        s->gzip.next_in = (unsigned char *)s->buffer + s->start;
        s->gzip.avail_in = (unsigned)(s->end - s->start);
        s->gzip.next_out = (unsigned char *)bytes + made;
        s->gzip.avail_out = (unsigned)now;
        bool exhausted = s->start == s->end;
        int code = inflate(&s->gzip, Z_NO_FLUSH);
        size_t fresh = now - s->gzip.avail_out;
        s->start = s->end - s->gzip.avail_in;
        made += fresh;
        if (code == Z_MEM_ERROR) return error_system(err, "no memory to decompress %s", s->path);
        if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR) {
            return error_input(err, "input %s is damaged gzip data: %s", s->path,
                               s->gzip.msg ? s->gzip.msg : "no reason given");
        }
        s->between = code == Z_STREAM_END;
        if (exhausted && !s->between && fresh == 0) {
            return error_input(err, "input %s is cut off: it ends inside gzip data", s->path);
        }
    }
    *got = made;
    return 0;
}

int input_read(input_stream *s, char *bytes, size_t capacity, size_t *got, error *err) {
    *got = 0;
    if (s->kind == INPUT_UNKNOWN) TRY(recognise(s, err));
    switch (s->kind) {
    case INPUT_ZSTD: return read_zstd(s, bytes, capacity, got, err);
    case INPUT_GZIP: return read_gzip(s, bytes, capacity, got, err);
    default: return read_plain(s, bytes, capacity, got, err);
    }
}
