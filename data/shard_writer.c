/* shard_writer.c: writes a shard as a stream, compressing its frames on worker threads.
 *
 * The caller's thread copies tokens into the slot at the head of a ring. A full slot (or the last one) is handed to the
 * workers, who turn tokens into bytes, hash and compress them. The caller's thread writes finished slots to the file
 * from the tail of the ring, in order, whenever it needs a free one; so the file does not depend on the number of
 * workers, and every failure comes out in a call of the owner. The file starts with zeros where the header goes: until
 * the header is written, last of all, the file is no shard even under its final name.
 *
 * Owns the temporary file, the ring and the threads. Called by tokenize and by whoever makes token data.
 */
#include "data/shard.h"

#include "common/file.h"
#include "common/limits.h"
#include "data/shard_format.h"
#include <libgen.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include <zstd.h>
#include <zstd_errors.h>

enum { SLOTS_PER_WORKER = 4 }; /* enough that a worker finds the next frame ready while the owner writes */

enum slot_state { SLOT_FREE, SLOT_READY, SLOT_TAKEN, SLOT_DONE };

struct slot {
    enum slot_state state;
    uint32_t count;  /* tokens in it */
    int32_t *tokens; /* frame_tokens */
    uint8_t *mask;   /* frame_tokens, a byte each; NULL without masks */
    char *raw, *packed;
    size_t packed_bytes; /* or an error code of zstd */
    uint64_t hash;       /* of raw */
};

struct shard_writer {
    char path[LIMIT_PATH], temporary[LIMIT_PATH];
    struct shard_writer_options options;
    char tokenizer_name[64], separator[256];
    file_writer *file;
    uint64_t tokens, text_bytes;
    struct shard_seek *seek;
    size_t frames, seek_capacity;
    struct shard_document *documents;
    size_t document_count, document_capacity;
    bool document_open; /* a document was announced that has no token yet */

    struct slot *slots;
    size_t slot_count, packed_capacity;
    uint64_t head, tail; /* slots handed out and slots written, counted from the start; head's slot is being filled */

    pthread_mutex_t lock;
    pthread_cond_t ready, done;
    uint64_t next; /* the next slot that a worker takes */
    bool stopping;
    pthread_t *workers;
    int worker_count;
};

uint32_t shard_token_bytes(uint64_t vocab) {
    return vocab <= 1u << 8 ? 1 : vocab <= 1u << 16 ? 2 : 4;
}

bool shard_planes_pay(uint64_t vocab) {
    /* Measured on English prose in frames of 8,192 tokens: bytes with an end-of-document id become 25 % smaller in
     * planes, ids of a vocabulary of 50,000 become 12 % larger. */
    return vocab > 256 && vocab <= 512;
}

/* ---- workers
 * --------------------------------------------------------------------------------------------------------- */

/* The bytes of a frame: tokens in the layout asked for, then mask bits. Returns their number. */
static size_t slot_pack(const struct shard_writer_options *o, const struct slot *s) {
    unsigned char *raw = (unsigned char *)s->raw;
    size_t count = s->count, width = o->token_bytes;
    for (size_t plane = 0; plane < width; plane++) {
        size_t start = o->planes ? plane * count : plane, stride = o->planes ? 1 : width;
        for (size_t i = 0; i < count; i++) {
            raw[start + i * stride] = (unsigned char)((uint32_t)s->tokens[i] >> (8 * plane));
        }
    }
    size_t size = count * width;
    if (!o->has_mask) return size;
    memset(raw + size, 0, (count + 7) / 8);
    for (size_t i = 0; i < count; i++) raw[size + i / 8] |= (unsigned char)((s->mask[i] != 0) << (i % 8));
    return size + (count + 7) / 8;
}

static void *worker_main(void *argument) {
    shard_writer *w = argument;
    ZSTD_CCtx *context = ZSTD_createCCtx();
    if (context) {
        ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, w->options.zstd_level);
        ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
        ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 1);
    }
    pthread_mutex_lock(&w->lock);
    for (;;) {
        struct slot *s = &w->slots[w->next % w->slot_count];
        if (s->state != SLOT_READY) {
            if (w->stopping) break;
            pthread_cond_wait(&w->ready, &w->lock);
            continue;
        }
        s->state = SLOT_TAKEN;
        w->next++;
        pthread_mutex_unlock(&w->lock);
        size_t size = slot_pack(&w->options, s);
        s->hash = XXH64(s->raw, size, 0);
        s->packed_bytes = context ? ZSTD_compress2(context, s->packed, w->packed_capacity, s->raw, size)
                                  : (size_t)-ZSTD_error_memory_allocation;
        pthread_mutex_lock(&w->lock);
        s->state = SLOT_DONE;
        pthread_cond_signal(&w->done);
    }
    pthread_mutex_unlock(&w->lock);
    ZSTD_freeCCtx(context);
    return NULL;
}

static void stop_workers(shard_writer *w) {
    pthread_mutex_lock(&w->lock);
    w->stopping = true;
    pthread_cond_broadcast(&w->ready);
    pthread_mutex_unlock(&w->lock);
    for (int i = 0; i < w->worker_count; i++) pthread_join(w->workers[i], NULL);
    w->worker_count = 0;
}

/* ---- opening
 * --------------------------------------------------------------------------------------------------------- */

int shard_writer_check(const struct shard_writer_options *o, const char *path, error *err) {
    if (o->token_bytes != 1 && o->token_bytes != 2 && o->token_bytes != 4) {
        return error_input(err, "%s: %u bytes a token; 1, 2 or 4 are possible", path, o->token_bytes);
    }
    if (o->vocab < 1 || o->vocab > LIMIT_VOCAB || shard_token_bytes(o->vocab) > o->token_bytes) {
        return error_input(err, "%s: a vocabulary of %llu ids does not go into %u-byte tokens (and %d is the most)",
                           path, (unsigned long long)o->vocab, o->token_bytes, LIMIT_VOCAB);
    }
    if (o->eod < -1 || o->eod >= (int64_t)o->vocab) {
        return error_input(err,
                           "%s: the end-of-document id %lld is not one of the vocabulary's %llu ids, nor -1 for none",
                           path, (long long)o->eod, (unsigned long long)o->vocab);
    }
    if (o->frame_tokens < 1 || o->frame_tokens > SHARD_FRAME_TOKENS_MAX) {
        return error_input(err, "%s: frames of %u tokens; 1 to %d are possible", path, o->frame_tokens,
                           SHARD_FRAME_TOKENS_MAX);
    }
    if (o->zstd_level < 1 || o->zstd_level > ZSTD_maxCLevel()) {
        return error_input(err, "%s: zstd level %d; 1 to %d are possible", path, o->zstd_level, ZSTD_maxCLevel());
    }
    if (strlen(o->tokenizer_name) >= sizeof((struct shard_header *)0)->tokenizer_name) {
        return error_input(err, "%s: the tokenizer's name '%.80s' has more than 63 bytes", path, o->tokenizer_name);
    }
    if (strlen(o->separator) >= sizeof((struct shard_header *)0)->separator || strchr(o->separator, '\n')) {
        return error_input(err, "%s: a separator must be one line of at most 255 bytes", path);
    }
    return 0;
}

static void slots_free(shard_writer *w) {
    for (size_t i = 0; w->slots && i < w->slot_count; i++) {
        free(w->slots[i].tokens);
        free(w->slots[i].mask);
        free(w->slots[i].raw);
        free(w->slots[i].packed);
    }
    free(w->slots);
}

static int slots_make(shard_writer *w, int threads, error *err) {
    const struct shard_writer_options *o = &w->options;
    size_t raw = shard_frame_bytes(o->frame_tokens, o->token_bytes, o->has_mask);
    w->slot_count = (size_t)threads * SLOTS_PER_WORKER;
    w->packed_capacity = ZSTD_compressBound(raw);
    w->slots = calloc(w->slot_count, sizeof *w->slots);
    bool complete = w->slots != NULL;
    for (size_t i = 0; complete && i < w->slot_count; i++) {
        struct slot *s = &w->slots[i];
        s->tokens = malloc(o->frame_tokens * sizeof *s->tokens);
        s->mask = o->has_mask ? malloc(o->frame_tokens) : NULL;
        s->raw = malloc(raw);
        s->packed = malloc(w->packed_capacity);
        complete = s->tokens && s->raw && s->packed && (s->mask || !o->has_mask);
    }
    return complete ? 0
                    : error_system(err, "no memory for %zu frames of %u tokens to write %s", w->slot_count,
                                   o->frame_tokens, w->path);
}

static int start_workers(shard_writer *w, int threads, error *err) {
    w->workers = calloc((size_t)threads, sizeof *w->workers);
    if (!w->workers) return error_system(err, "no memory to write %s", w->path);
    while (w->worker_count < threads) {
        int failed = pthread_create(&w->workers[w->worker_count], NULL, worker_main, w);
        if (failed) return error_system(err, "cannot start a thread to write %s: %s", w->path, strerror(failed));
        w->worker_count++;
    }
    return 0;
}

int shard_writer_open(shard_writer **out, const char *path, const struct shard_writer_options *options, int threads,
                      error *err) {
    *out = NULL;
    ASSERT(threads >= 1);
    TRY(shard_writer_check(options, path, err));
    if (strlen(path) + sizeof ".tmp" > LIMIT_PATH) {
        return error_input(err, "the path %.200s... is longer than %d bytes", path, LIMIT_PATH);
    }
    shard_writer *w = calloc(1, sizeof *w);
    if (!w) return error_system(err, "no memory to write %s", path);
    strcpy(w->path, path);
    stpcpy(stpcpy(w->temporary, path), ".tmp");
    w->options = *options;
    strcpy(w->tokenizer_name, options->tokenizer_name);
    strcpy(w->separator, options->separator);
    w->options.tokenizer_name = w->tokenizer_name;
    w->options.separator = w->separator;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->ready, NULL);
    pthread_cond_init(&w->done, NULL);
    const struct shard_header blank = {0};
    if (slots_make(w, threads, err) != 0 || file_create(&w->file, w->temporary, err) != 0 ||
        file_write(w->file, &blank, sizeof blank, err) != 0 || start_workers(w, threads, err) != 0) {
        shard_writer_abandon(w);
        return -1;
    }
    *out = w;
    return 0;
}

/* ---- writing
 * --------------------------------------------------------------------------------------------------------- */

static void *grown(void *array, size_t used, size_t *capacity, size_t element) {
    if (used < *capacity) return array;
    size_t larger = *capacity ? *capacity * 2 : 256;
    void *moved = realloc(array, larger * element);
    if (moved) *capacity = larger;
    return moved;
}

/* Wait for the slot at the tail and put it into the file. */
static int write_tail(shard_writer *w, error *err) {
    struct slot *s = &w->slots[w->tail % w->slot_count];
    pthread_mutex_lock(&w->lock);
    while (s->state != SLOT_DONE) pthread_cond_wait(&w->done, &w->lock);
    pthread_mutex_unlock(&w->lock);
    if (ZSTD_isError(s->packed_bytes)) {
        return error_system(err, "cannot compress frame %zu of %s: %s", w->frames, w->path,
                            ZSTD_getErrorName(s->packed_bytes));
    }
    struct shard_seek *seek = grown(w->seek, w->frames, &w->seek_capacity, sizeof *seek);
    if (!seek) return error_system(err, "no memory for the seek table of %s", w->path);
    w->seek = seek;
    seek[w->frames++] = (struct shard_seek){file_size_so_far(w->file), s->packed_bytes, s->hash};
    TRY(file_write(w->file, s->packed, s->packed_bytes, err));
    pthread_mutex_lock(&w->lock);
    s->count = 0;
    s->state = SLOT_FREE;
    pthread_mutex_unlock(&w->lock);
    w->tail++;
    return 0;
}

/* Hand the slot being filled to the workers and make the next one free. */
static int seal(shard_writer *w, error *err) {
    pthread_mutex_lock(&w->lock);
    w->slots[w->head % w->slot_count].state = SLOT_READY;
    pthread_cond_signal(&w->ready);
    pthread_mutex_unlock(&w->lock);
    w->head++;
    return w->head - w->tail == w->slot_count ? write_tail(w, err) : 0;
}

int shard_writer_document(shard_writer *w, uint32_t flags, error *err) {
    ASSERT(flags <= SHARD_DOC_UNTERMINATED);
    if (w->document_open) {
        return error_input(err, "%s: document %zu has no token; every document needs at least one", w->path,
                           w->document_count - 1);
    }
    struct shard_document *documents = grown(w->documents, w->document_count, &w->document_capacity, sizeof *documents);
    if (!documents) return error_system(err, "no memory for the document table of %s", w->path);
    w->documents = documents;
    documents[w->document_count++] = (struct shard_document){.start = w->tokens, .flags = flags};
    w->document_open = true;
    return 0;
}

static int check_ids(const shard_writer *w, const int32_t *tokens, size_t count, error *err) {
    uint32_t largest = 0; /* a negative id is a huge unsigned one */
    for (size_t i = 0; i < count; i++) largest = (uint32_t)tokens[i] > largest ? (uint32_t)tokens[i] : largest;
    if (largest < w->options.vocab) return 0;
    return error_input(err, "%s: token id %d is not one of the vocabulary's %llu ids", w->path, (int32_t)largest,
                       (unsigned long long)w->options.vocab);
}

int shard_writer_append(shard_writer *w, const int32_t *tokens, const uint8_t *mask, size_t count, error *err) {
    ASSERT(!mask || w->options.has_mask);
    TRY(check_ids(w, tokens, count, err));
    while (count > 0) {
        struct slot *s = &w->slots[w->head % w->slot_count];
        size_t room = w->options.frame_tokens - s->count, now = count < room ? count : room;
        memcpy(s->tokens + s->count, tokens, now * sizeof *tokens);
        if (mask) {
            memcpy(s->mask + s->count, mask, now);
            mask += now;
        } else if (s->mask) {
            memset(s->mask + s->count, 1, now);
        }
        s->count += (uint32_t)now;
        w->tokens += now;
        tokens += now;
        count -= now;
        w->document_open = false;
        if (now == room) TRY(seal(w, err));
    }
    return 0;
}

int shard_writer_text_bytes(shard_writer *w, uint64_t bytes) {
    w->text_bytes += bytes;
    return 0;
}

/* ---- finishing
 * ------------------------------------------------------------------------------------------------------- */

static struct shard_header make_header(const shard_writer *w) {
    const struct shard_writer_options *o = &w->options;
    uint64_t seek_bytes = w->frames * sizeof *w->seek, document_bytes = w->document_count * sizeof *w->documents;
    uint64_t end = file_size_so_far(w->file);
    struct shard_header h = {
        .version = SHARD_VERSION,
        .header_bytes = sizeof h,
        .flags = (o->has_mask ? SHARD_HAS_MASK : 0u) | (o->planes ? SHARD_PLANES : 0u),
        .token_bytes = o->token_bytes,
        .frame_tokens = o->frame_tokens,
        .tokens = w->tokens,
        .documents = w->document_count,
        .frames = w->frames,
        .text_bytes = w->text_bytes,
        .vocab = o->vocab,
        .eod = o->eod,
        .tokenizer_identity = o->tokenizer_identity,
        .seek_offset = end - document_bytes - seek_bytes,
        .document_offset = end - document_bytes,
        .file_bytes = end,
        .seek_hash = XXH64(w->seek, seek_bytes, 0),
        .document_hash = XXH64(w->documents, document_bytes, 0),
    };
    memcpy(h.magic, SHARD_MAGIC, SHARD_MAGIC_BYTES);
    strcpy(h.tokenizer_name, o->tokenizer_name);
    strcpy(h.separator, o->separator);
    h.header_hash = XXH64(&h, offsetof(struct shard_header, header_hash), 0);
    return h;
}

static int write_rest(shard_writer *w, struct shard_header *header, error *err) {
    if (w->document_open) {
        return error_input(err, "%s: document %zu has no token; every document needs at least one", w->path,
                           w->document_count - 1);
    }
    if (w->slots[w->head % w->slot_count].count > 0) TRY(seal(w, err));
    while (w->tail < w->head) TRY(write_tail(w, err));
    TRY(file_write(w->file, w->seek, w->frames * sizeof *w->seek, err));
    TRY(file_write(w->file, w->documents, w->document_count * sizeof *w->documents, err));
    *header = make_header(w);
    TRY(file_write_at(w->file, 0, header, sizeof *header, err));
    file_writer *file = w->file;
    w->file = NULL; /* closing frees it, whether or not it succeeds */
    TRY(file_close_synced(file, err));
    TRY(file_rename(w->temporary, w->path, err));
    char directory[LIMIT_PATH];
    strcpy(directory, w->path);
    return file_sync_directory(dirname(directory), err);
}

static void writer_free(shard_writer *w) {
    stop_workers(w);
    slots_free(w);
    free(w->workers);
    free(w->seek);
    free(w->documents);
    pthread_cond_destroy(&w->done);
    pthread_cond_destroy(&w->ready);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

int shard_writer_finish(shard_writer *w, struct shard_info *info, error *err) {
    struct shard_header header;
    if (write_rest(w, &header, err) != 0) {
        shard_writer_abandon(w);
        return -1;
    }
    if (info) shard_info_fill(info, w->path, &header);
    writer_free(w);
    return 0;
}

void shard_writer_abandon(shard_writer *w) {
    if (!w) return;
    error ignored; /* the caller has a better one, or wants none */
    file_abandon(w->file);
    file_remove_tree(w->temporary, &ignored);
    writer_free(w);
}
