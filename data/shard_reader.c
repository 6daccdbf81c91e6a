/* shard_reader.c: opens shards and reads tokens from them; believes no number of a file before it is checked.
 *
 * A shard is read with pread, so one descriptor serves any number of threads, and a file that shrinks while it is open
 * makes an error, not a signal. Opening checks the header and loads the two tables; sizes of allocations are bounded by
 * the file's size (tables) or by fixed limits (frames). Frames are checked when they are decompressed: where they lie,
 * their size, zstd's checksum, the XXH64 of the seek table, every id against the vocabulary.
 *
 * A cursor keeps the last few frames decompressed, each known by the shard's header hash (which covers, through the
 * tables' hashes, all of its content) and the frame's number. Called by data sets, verification and the loader's
 * threads.
 */
#include "data/shard.h"

#include "common/limits.h"
#include "data/shard_format.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

enum { CURSOR_FRAMES = 4 }; /* a sample touches one or two; neighbours in a sequential reading share one */

struct shard {
    int descriptor;
    uint64_t key; /* the header's hash: names the content */
    struct shard_info info;
    struct shard_seek *seek;
    struct shard_document *documents;
};

struct cached_frame {
    uint64_t key, number;
    uint64_t used; /* when, in reads of the cursor; 0 = never */
    int32_t *tokens;
    uint8_t *mask;
    size_t capacity; /* tokens that both arrays hold */
};

struct shard_cursor {
    ZSTD_DCtx *context;
    char *packed, *raw;
    size_t packed_capacity, raw_capacity;
    uint64_t clock;
    struct cached_frame frames[CURSOR_FRAMES];
};

/* ---- opening ----------------------------------------------------------------------------------------------------- */

/* A data set may have more shards than a process may open files at first; the system's own bound is far higher. */
static int open_descriptor(const char *path) {
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* without waiting, should it be a pipe */
    struct rlimit limit;
    if (descriptor < 0 && errno == EMFILE && getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        if (setrlimit(RLIMIT_NOFILE, &limit) == 0) {
            descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        } else {
            errno = EMFILE;
        }
    }
    return descriptor;
}

static int open_file(shard *s, const char *path, error *err) {
    if (strlen(path) >= sizeof s->info.path) {
        return error_input(err, "the path %.200s... is longer than %d bytes", path, LIMIT_PATH - 1);
    }
    s->descriptor = open_descriptor(path);
    if (s->descriptor < 0 && (errno == ENOENT || errno == ENOTDIR || errno == EACCES)) {
        return error_input(err, "cannot open shard %s: %s", path, strerror(errno));
    }
    if (s->descriptor < 0) return error_system(err, "cannot open shard %s: %s", path, strerror(errno));
    struct stat about;
    if (fstat(s->descriptor, &about) != 0) {
        return error_system(err, "cannot look at shard %s: %s", path, strerror(errno));
    }
    if (!S_ISREG(about.st_mode)) return error_input(err, "%s is no shard: it is not a regular file", path);
    strcpy(s->info.path, path);
    s->info.file_bytes = (uint64_t)about.st_size;
    return 0;
}

static int read_at(const shard *s, uint64_t offset, void *bytes, size_t size, error *err) {
    char *to = bytes;
    while (size > 0) {
        ssize_t got = pread(s->descriptor, to, size, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return error_system(err, "cannot read shard %s: %s", s->info.path, strerror(errno));
        if (got == 0) {
            return error_input(err, "%s ends at byte %" PRIu64 ", %zu bytes early: it was cut while it was open",
                               s->info.path, offset, size);
        }
        to += got;
        offset += (uint64_t)got;
        size -= (size_t)got;
    }
    return 0;
}

static bool all_zero(const char *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        if (bytes[i]) return false;
    }
    return true;
}

/* A string field: text, then zeros to its end, and at least one. */
static bool field_ends(const char *field, size_t size) {
    size_t length = strnlen(field, size);
    return length < size && all_zero(field + length, size - length);
}

static bool printable(const char *text) {
    for (; *text; text++) {
        if ((unsigned char)*text < ' ' || *text == 127) return false;
    }
    return true;
}

/* Is this a whole header of our version? */
static int check_header_identity(const char *path, const struct shard_header *h, error *err) {
    if (memcmp(h->magic, SHARD_MAGIC, SHARD_MAGIC_BYTES) != 0) {
        return error_input(err,
                           "%s is no shard: its first bytes are not a shard's; riverrun tokenize makes shards of text "
                           "(of one that it made, the writing was not finished)",
                           path);
    }
    if (h->version != SHARD_VERSION) {
        return error_input(err, "%s is a shard of version %u; this riverrun reads version %d", path, h->version,
                           SHARD_VERSION);
    }
    uint64_t hash = XXH64(h, offsetof(struct shard_header, header_hash), 0);
    if (hash != h->header_hash) {
        return error_input(err, "%s is damaged: its header has checksum %016" PRIx64 ", expected %016" PRIx64, path,
                           hash, h->header_hash);
    }
    if (h->header_bytes != sizeof *h) {
        return error_input(err, "%s is no valid shard: it states a header of %u bytes, expected %zu", path,
                           h->header_bytes, sizeof *h);
    }
    if ((h->flags & ~(uint32_t)SHARD_FLAGS_KNOWN) != 0 || h->reserved_0 != 0 ||
        !all_zero(h->reserved_1, sizeof h->reserved_1)) {
        return error_input(
            err,
            "%s uses features that this riverrun does not know: flags 0x%x, expected at most 0x%x and zeros in "
            "what is reserved",
            path, h->flags, SHARD_FLAGS_KNOWN);
    }
    return 0;
}

/* What describes the tokens. */
static int check_header_tokens(const char *path, const struct shard_header *h, error *err) {
    if (h->token_bytes != 1 && h->token_bytes != 2 && h->token_bytes != 4) {
        return error_input(err, "%s is no valid shard: %u bytes a token, expected 1, 2 or 4", path, h->token_bytes);
    }
    if (h->vocab < 1 || h->vocab > LIMIT_VOCAB || shard_token_bytes(h->vocab) > h->token_bytes) {
        return error_input(err,
                           "%s is no valid shard: a vocabulary of %" PRIu64
                           " ids, expected 1 to what %u bytes hold, at most %d",
                           path, h->vocab, h->token_bytes, LIMIT_VOCAB);
    }
    if (h->eod < -1 || h->eod >= (int64_t)h->vocab) {
        return error_input(err, "%s is no valid shard: end-of-document id %" PRId64 ", expected -1 to %" PRIu64, path,
                           h->eod, h->vocab - 1);
    }
    if (h->frame_tokens < 1 || h->frame_tokens > SHARD_FRAME_TOKENS_MAX) {
        return error_input(err, "%s is no valid shard: %u tokens a frame, expected 1 to %d", path, h->frame_tokens,
                           SHARD_FRAME_TOKENS_MAX);
    }
    if (!field_ends(h->tokenizer_name, sizeof h->tokenizer_name) || !printable(h->tokenizer_name)) {
        return error_input(err, "%s is no valid shard: its tokenizer's name is not text of at most 63 bytes and zeros",
                           path);
    }
    if (!field_ends(h->separator, sizeof h->separator) || strchr(h->separator, '\n')) {
        return error_input(err, "%s is no valid shard: its separator is not a line of at most 255 bytes and zeros",
                           path);
    }
    return 0;
}

/* Counts and offsets, against each other and against the file. Written so that no sum can overflow: every count is
 * first compared with the file's size. */
static int check_header_layout(const char *path, const struct shard_header *h, uint64_t size, error *err) {
    if (h->file_bytes != size) {
        return error_input(err, "%s is %s: it has %" PRIu64 " bytes, expected %" PRIu64, path,
                           size < h->file_bytes ? "cut off" : "damaged", size, h->file_bytes);
    }
    uint64_t frames = h->tokens / h->frame_tokens + (h->tokens % h->frame_tokens != 0);
    if (h->frames != frames) {
        return error_input(err,
                           "%s is no valid shard: %" PRIu64 " frames, expected %" PRIu64 " for its %" PRIu64 " tokens",
                           path, h->frames, frames, h->tokens);
    }
    if (h->documents > h->tokens) {
        return error_input(err, "%s is no valid shard: %" PRIu64 " documents, expected at most one a token, %" PRIu64,
                           path, h->documents, h->tokens);
    }
    uint64_t most_frames = size / sizeof(struct shard_seek), most_documents = size / sizeof(struct shard_document);
    if (h->frames > most_frames || h->documents > most_documents) {
        return error_input(err,
                           "%s is no valid shard: %" PRIu64 " frames and %" PRIu64 " documents, more than its %" PRIu64
                           " bytes hold",
                           path, h->frames, h->documents, size);
    }
    uint64_t tables = h->frames * sizeof(struct shard_seek) + h->documents * sizeof(struct shard_document);
    uint64_t seek_offset = tables <= size - sizeof *h ? size - tables : 0;
    if (seek_offset == 0 || h->seek_offset != seek_offset ||
        h->document_offset != seek_offset + h->frames * sizeof(struct shard_seek)) {
        return error_input(err,
                           "%s is no valid shard: tables at bytes %" PRIu64 " and %" PRIu64 ", expected %" PRIu64
                           " and %" PRIu64,
                           path, h->seek_offset, h->document_offset, seek_offset,
                           seek_offset + h->frames * sizeof(struct shard_seek));
    }
    return 0;
}

void shard_info_fill(struct shard_info *info, const char *path, const struct shard_header *h) {
    *info = (struct shard_info){
        .version = h->version,
        .token_bytes = h->token_bytes,
        .frame_tokens = h->frame_tokens,
        .has_mask = (h->flags & SHARD_HAS_MASK) != 0,
        .planes = (h->flags & SHARD_PLANES) != 0,
        .tokens = h->tokens,
        .documents = h->documents,
        .frames = h->frames,
        .text_bytes = h->text_bytes,
        .file_bytes = h->file_bytes,
        .vocab = h->vocab,
        .eod = h->eod,
        .tokenizer_identity = h->tokenizer_identity,
    };
    snprintf(info->path, sizeof info->path, "%s", path);
    memcpy(info->tokenizer_name, h->tokenizer_name, sizeof info->tokenizer_name);
    memcpy(info->separator, h->separator, sizeof info->separator);
}

static int open_header(shard *s, const char *path, struct shard_header *h, error *err) {
    uint64_t size = s->info.file_bytes;
    if (size < sizeof *h) {
        return error_input(err, "%s is no shard: it has %" PRIu64 " bytes, expected at least the %zu of a header", path,
                           size, sizeof *h);
    }
    TRY(read_at(s, 0, h, sizeof *h, err));
    TRY(check_header_identity(path, h, err));
    TRY(check_header_tokens(path, h, err));
    TRY(check_header_layout(path, h, size, err));
    shard_info_fill(&s->info, path, h);
    s->key = h->header_hash;
    return 0;
}

/* ---- tables ------------------------------------------------------------------------------------------------------ */

static int load_table(const shard *s, const char *name, uint64_t offset, size_t size, uint64_t expected, void **table,
                      error *err) {
    *table = malloc(size ? size : 1);
    if (!*table) return error_system(err, "no memory for the %zu bytes of the %s of %s", size, name, s->info.path);
    TRY(read_at(s, offset, *table, size, err));
    uint64_t hash = XXH64(*table, size, 0);
    if (hash == expected) return 0;
    return error_input(err, "%s is damaged: its %s has checksum %016" PRIx64 ", expected %016" PRIx64, s->info.path,
                       name, hash, expected);
}

static uint32_t frame_count(const struct shard_info *info, uint64_t frame) {
    uint64_t rest = info->tokens - frame * info->frame_tokens;
    return rest < info->frame_tokens ? (uint32_t)rest : info->frame_tokens;
}

/* Frames must lie back to back between header and tables, and none may be larger than zstd would make it. */
static int check_seek(const shard *s, uint64_t end, error *err) {
    uint64_t offset = sizeof(struct shard_header);
    for (uint64_t f = 0; f < s->info.frames; f++) {
        size_t raw = shard_frame_bytes(frame_count(&s->info, f), s->info.token_bytes, s->info.has_mask);
        const struct shard_seek *e = &s->seek[f];
        uint64_t most = end - offset < ZSTD_compressBound(raw) ? end - offset : ZSTD_compressBound(raw);
        if (e->offset != offset || e->bytes < 1 || e->bytes > most) {
            return error_input(err,
                               "%s is no valid shard: frame %" PRIu64 " has %" PRIu64 " bytes at byte %" PRIu64
                               ", expected 1 to %" PRIu64 " at byte %" PRIu64,
                               s->info.path, f, e->bytes, e->offset, most, offset);
        }
        offset += e->bytes;
    }
    if (offset == end) return 0;
    return error_input(err, "%s is no valid shard: its frames end at byte %" PRIu64 ", expected %" PRIu64, s->info.path,
                       offset, end);
}

static int check_documents(const shard *s, error *err) {
    uint64_t least = 0; /* where the next document can start at the earliest */
    for (uint64_t d = 0; d < s->info.documents; d++) {
        const struct shard_document *e = &s->documents[d];
        if (e->start < least || e->start >= s->info.tokens) {
            return error_input(err,
                               "%s is no valid shard: document %" PRIu64 " starts at token %" PRIu64
                               ", expected %" PRIu64 " to %" PRIu64,
                               s->info.path, d, e->start, least, s->info.tokens - 1);
        }
        if (e->flags > SHARD_DOC_UNTERMINATED || e->reserved != 0) {
            return error_input(err,
                               "%s is no valid shard: document %" PRIu64
                               " has flags %u and %u, expected at most %d and 0",
                               s->info.path, d, e->flags, e->reserved, SHARD_DOC_UNTERMINATED);
        }
        least = e->start + 1;
    }
    return 0;
}

static int open_all(shard *s, const char *path, error *err) {
    struct shard_header h;
    TRY(open_file(s, path, err));
    TRY(open_header(s, path, &h, err));
    void *table;
    int failed = load_table(s, "seek table", h.seek_offset, h.frames * sizeof *s->seek, h.seek_hash, &table, err);
    s->seek = table;
    if (failed) return -1;
    failed = load_table(s, "document table", h.document_offset, h.documents * sizeof *s->documents, h.document_hash,
                        &table, err);
    s->documents = table;
    if (failed) return -1;
    TRY(check_seek(s, h.seek_offset, err));
    return check_documents(s, err);
}

int shard_open(shard **out, const char *path, error *err) {
    *out = NULL;
    shard *s = calloc(1, sizeof *s);
    if (!s) return error_system(err, "no memory to open shard %s", path);
    s->descriptor = -1;
    if (open_all(s, path, err) != 0) {
        shard_close(s);
        return -1;
    }
    *out = s;
    return 0;
}

void shard_close(shard *s) {
    if (!s) return;
    if (s->descriptor >= 0) close(s->descriptor);
    free(s->seek);
    free(s->documents);
    free(s);
}

const struct shard_info *shard_get_info(const shard *s) {
    return &s->info;
}

const struct shard_document *shard_documents(const shard *s) {
    return s->documents;
}

uint64_t shard_document_from(const shard *s, uint64_t position) {
    uint64_t low = 0, high = s->info.documents;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (s->documents[middle].start < position) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* ---- frames ------------------------------------------------------------------------------------------------------ */

int shard_cursor_open(shard_cursor **c, error *err) {
    *c = calloc(1, sizeof **c);
    if (*c) (*c)->context = ZSTD_createDCtx();
    if (*c && (*c)->context) return 0;
    free(*c);
    *c = NULL;
    return error_system(err, "no memory to read shards");
}

void shard_cursor_close(shard_cursor *c) {
    if (!c) return;
    for (int i = 0; i < CURSOR_FRAMES; i++) {
        free(c->frames[i].tokens);
        free(c->frames[i].mask);
    }
    ZSTD_freeDCtx(c->context);
    free(c->packed);
    free(c->raw);
    free(c);
}

static int reserve(char **buffer, size_t *capacity, size_t size, const char *path, error *err) {
    if (size <= *capacity) return 0;
    char *larger = realloc(*buffer, size);
    if (!larger) return error_system(err, "no memory for a frame of %zu bytes of %s", size, path);
    *buffer = larger;
    *capacity = size;
    return 0;
}

/* Read and decompress a frame into the cursor's raw buffer: exactly one zstd frame of exactly the size it must have. */
static int unpack(const shard *s, shard_cursor *c, uint64_t frame, size_t size, error *err) {
    const struct shard_seek *e = &s->seek[frame];
    const char *path = s->info.path;
    TRY(reserve(&c->packed, &c->packed_capacity, e->bytes, path, err));
    TRY(reserve(&c->raw, &c->raw_capacity, size, path, err));
    TRY(read_at(s, e->offset, c->packed, e->bytes, err));
    unsigned long long stated = ZSTD_getFrameContentSize(c->packed, e->bytes);
    size_t extent = ZSTD_findFrameCompressedSize(c->packed, e->bytes);
    if (stated != size || ZSTD_isError(extent) || extent != e->bytes) {
        return error_input(err,
                           "%s is damaged: frame %" PRIu64 " is not one zstd frame of %" PRIu64
                           " bytes that states its size, %zu",
                           path, frame, e->bytes, size);
    }
    size_t got = ZSTD_decompressDCtx(c->context, c->raw, size, c->packed, e->bytes);
    if (ZSTD_isError(got) || got != size) {
        return error_input(err, "%s is damaged: frame %" PRIu64 " does not decompress: %s", path, frame,
                           ZSTD_isError(got) ? ZSTD_getErrorName(got) : "wrong size");
    }
    uint64_t hash = XXH64(c->raw, size, 0);
    if (hash == e->hash) return 0;
    return error_input(err, "%s is damaged: frame %" PRIu64 " has checksum %016" PRIx64 ", expected %016" PRIx64, path,
                       frame, hash, e->hash);
}

/* Tokens of either layout as int32. */
static void widen(const char *bytes, uint32_t count, uint32_t width, bool planes, int32_t *tokens) {
    const unsigned char *raw = (const unsigned char *)bytes;
    if (width == 1) {
        for (uint32_t i = 0; i < count; i++) tokens[i] = raw[i];
    } else if (width == 2 && planes) {
        for (uint32_t i = 0; i < count; i++) tokens[i] = raw[i] | raw[count + i] << 8;
    } else if (width == 2) {
        for (uint32_t i = 0; i < count; i++) tokens[i] = raw[2 * (size_t)i] | raw[2 * (size_t)i + 1] << 8;
    } else {
        size_t step = planes ? count : 1, stride = planes ? 1 : 4;
        for (size_t i = 0; i < count; i++) {
            const unsigned char *t = raw + i * stride;
            tokens[i] = (int32_t)((uint32_t)t[0] | (uint32_t)t[step] << 8 | (uint32_t)t[2 * step] << 16 |
                                  (uint32_t)t[3 * step] << 24);
        }
    }
}

/* Mask bits to bytes. The bits after the last token must be zero. */
static int widen_mask(const shard *s, uint64_t frame, const char *bytes, uint32_t count, uint8_t *mask, error *err) {
    const unsigned char *raw = (const unsigned char *)bytes;
    for (uint32_t i = 0; i < count; i++) mask[i] = raw[i / 8] >> (i % 8) & 1;
    if (count % 8 == 0 || raw[count / 8] >> (count % 8) == 0) return 0;
    return error_input(err,
                       "%s is no valid shard: frame %" PRIu64 " has mask bits after its last token, expected zeros",
                       s->info.path, frame);
}

static int check_ids(const shard *s, uint64_t frame, const int32_t *tokens, uint32_t count, error *err) {
    uint32_t largest = 0; /* ids of 2^31 and more have become negative: as unsigned numbers they are large again */
    for (uint32_t i = 0; i < count; i++) largest = (uint32_t)tokens[i] > largest ? (uint32_t)tokens[i] : largest;
    if (largest < s->info.vocab) return 0;
    return error_input(err, "%s is no valid shard: frame %" PRIu64 " has token id %u, expected ids below %" PRIu64,
                       s->info.path, frame, largest, s->info.vocab);
}

static int load_frame(const shard *s, shard_cursor *c, uint64_t frame, struct cached_frame *slot, error *err) {
    const struct shard_info *info = &s->info;
    uint32_t count = frame_count(info, frame);
    slot->used = 0; /* not to be found until it is complete */
    if (slot->capacity < count) {
        free(slot->tokens);
        free(slot->mask);
        slot->tokens = malloc(count * sizeof *slot->tokens);
        slot->mask = malloc(count);
        slot->capacity = slot->tokens && slot->mask ? count : 0;
        if (slot->capacity == 0) {
            return error_system(err, "no memory for a frame of %u tokens of %s", count, info->path);
        }
    }
    TRY(unpack(s, c, frame, shard_frame_bytes(count, info->token_bytes, info->has_mask), err));
    widen(c->raw, count, info->token_bytes, info->planes, slot->tokens);
    TRY(check_ids(s, frame, slot->tokens, count, err));
    if (info->has_mask) {
        TRY(widen_mask(s, frame, c->raw + (size_t)count * info->token_bytes, count, slot->mask, err));
    } else {
        memset(slot->mask, 1, count);
    }
    slot->key = s->key;
    slot->number = frame;
    return 0;
}

/* The frame, from the cache or into the place that was used longest ago. */
static int find_frame(const shard *s, shard_cursor *c, uint64_t frame, struct cached_frame **found, error *err) {
    struct cached_frame *oldest = &c->frames[0];
    *found = NULL;
    for (int i = 0; i < CURSOR_FRAMES && !*found; i++) {
        struct cached_frame *f = &c->frames[i];
        if (f->used > 0 && f->key == s->key && f->number == frame) *found = f;
        if (f->used < oldest->used) oldest = f;
    }
    if (!*found) {
        TRY(load_frame(s, c, frame, oldest, err));
        *found = oldest;
    }
    (*found)->used = ++c->clock;
    return 0;
}

int shard_read(const shard *s, shard_cursor *c, uint64_t from, size_t count, int32_t *tokens, uint8_t *mask,
               error *err) {
    if (from > s->info.tokens || count > s->info.tokens - from) {
        return error_input(err, "cannot read %zu tokens from token %" PRIu64 " of %s: it has %" PRIu64, count, from,
                           s->info.path, s->info.tokens);
    }
    while (count > 0) {
        struct cached_frame *f;
        uint64_t frame = from / s->info.frame_tokens;
        TRY(find_frame(s, c, frame, &f, err));
        size_t first = from % s->info.frame_tokens, there = frame_count(&s->info, frame) - first;
        size_t now = count < there ? count : there;
        memcpy(tokens, f->tokens + first, now * sizeof *tokens);
        tokens += now;
        if (mask) {
            memcpy(mask, f->mask + first, now);
            mask += now;
        }
        from += now;
        count -= now;
    }
    return 0;
}
