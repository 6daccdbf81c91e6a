/* encode_pipeline.c: the threads of tokenize, up to the token ids; see encode_pipeline.h.
 *
 * Blocks form a ring. The reading thread fills the block at `head`, encoders take filled blocks in order, the caller
 * takes encoded blocks at `tail`. Whoever changes a block's state holds the lock; its contents belong to one thread at
 * a time by its state. Called by tokenize.
 */
#include "data/encode_pipeline.h"

#include "data/input_stream.h"
#include "data/jsonl.h"
#include "data/split.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    BLOCK_BYTES = 1 << 18,  /* text in a block, as long as there are places to cut: a few milliseconds of work */
    BLOCK_PIECES = 1 << 14, /* documents and parts of documents in a block */
    BLOCKS_PER_THREAD = 3,
    WAKE_MS = 100, /* how often the waiting caller looks at `interrupted` */
};
#define BLOCK_BYTES_MAX (UINT32_C(1) << 30) /* a block grows so far to hold a text that can't be cut */

/* A part of one document's text. Pieces without text carry only a beginning or an end. */
struct piece {
    uint32_t offset, size; /* in the block's text */
    uint32_t flags;        /* of the document, if it begins here */
    bool begins, ends;
};

enum block_state { BLOCK_FREE, BLOCK_FILLED, BLOCK_TAKEN, BLOCK_ENCODED };

struct block {
    enum block_state state;
    char *text;
    size_t size, capacity;
    size_t searched; /* bytes at the start, all of one document, that hold no place to cut */
    struct piece pieces[BLOCK_PIECES];
    size_t piece_count;
    struct token_list ids;
    struct document_mark marks[BLOCK_PIECES];
    struct encoded_block result;
};

struct encode_pipeline {
    const tokenizer *tokenizer;
    const struct input_list *inputs;
    const char *separator, *jsonl_key;
    const atomic_bool *interrupted;
    struct block *blocks;
    size_t block_count;
    struct block *filling; /* the reading thread's block, or NULL */

    pthread_mutex_t lock;
    pthread_cond_t freed, filled, encoded;
    uint64_t head, next, tail; /* blocks filled, taken by encoders, taken by the caller; counted from the start */
    bool lent;                 /* the caller holds the block before `tail` */
    bool ended;                /* the reading thread has handed over its last block */
    bool failed;               /* and why is in `err` */
    error err;
    atomic_bool stop;

    pthread_t reader, *encoders;
    bool reader_started;
    int encoders_started;
};

/* ---- the reading thread ------------------------------------------------------------------------------------------ */

static int resize_text(struct block *b, size_t capacity, error *err) {
    char *text = realloc(b->text, capacity);
    if (!text) return error_system(err, "no memory for %zu bytes of text", capacity);
    b->text = text;
    b->capacity = capacity;
    return 0;
}

/* Wait for the block that comes `ahead` blocks after those handed over, and empty it. */
static int take_free(encode_pipeline *p, uint64_t ahead, struct block **out, error *err) {
    struct block *b = &p->blocks[(p->head + ahead) % p->block_count];
    pthread_mutex_lock(&p->lock);
    while (b->state != BLOCK_FREE && !atomic_load(&p->stop)) pthread_cond_wait(&p->freed, &p->lock);
    pthread_mutex_unlock(&p->lock);
    if (atomic_load(&p->stop)) return error_system(err, "tokenizing was stopped");
    b->size = b->piece_count = b->searched = 0;
    *out = b;
    return b->capacity == BLOCK_BYTES ? 0 : resize_text(b, BLOCK_BYTES, err);
}

/* Give the filled block to the encoders; `next`, which may be NULL, is filled from now on. */
static void hand_over(encode_pipeline *p, struct block *next) {
    pthread_mutex_lock(&p->lock);
    p->filling->state = BLOCK_FILLED;
    p->head++;
    pthread_cond_signal(&p->filled);
    pthread_mutex_unlock(&p->lock);
    p->filling = next;
}

/* A new piece at the end of the text, in a block that has room for it. */
static int add_piece(encode_pipeline *p, struct piece **piece, error *err) {
    if (p->filling && p->filling->piece_count == BLOCK_PIECES) hand_over(p, NULL);
    if (!p->filling) TRY(take_free(p, 0, &p->filling, err));
    struct block *b = p->filling;
    *piece = &b->pieces[b->piece_count++];
    **piece = (struct piece){.offset = (uint32_t)b->size};
    return 0;
}

static int begin_document(void *self, uint32_t flags, error *err) {
    struct piece *piece;
    TRY(add_piece(self, &piece, err));
    piece->begins = true;
    piece->flags = flags;
    return 0;
}

/* Make room in a full block whose last piece goes on: what is behind the last place to cut moves to the next block. A
 * block without such a place grows; then only its new part is to be searched. */
static int make_room(encode_pipeline *p, error *err) {
    struct block *b = p->filling, *next;
    struct piece *piece = &b->pieces[b->piece_count - 1];
    size_t from = b->searched > 0 && piece->offset == 0 ? b->searched - 1 : 0;
    size_t cut = tokenizer_last_cut(p->tokenizer, b->text + piece->offset, from, piece->size);
    if (cut == 0 && piece->offset == 0) {
        b->searched = b->size;
        if (b->capacity < BLOCK_BYTES_MAX) return resize_text(b, 2 * b->capacity, err);
        return error_input(err,
                           "a document has %u bytes in which there is no place to cut it, such as a space; more than "
                           "that can't be encoded at once",
                           piece->size);
    }
    TRY(take_free(p, 1, &next, err));
    uint32_t rest = piece->size - (uint32_t)cut;
    if (rest > next->capacity) TRY(resize_text(next, b->capacity, err));
    memcpy(next->text, b->text + b->size - rest, rest);
    next->pieces[next->piece_count++] = (struct piece){.size = rest};
    next->size = next->searched = rest;
    piece->size = (uint32_t)cut;
    b->size -= rest;
    if (cut == 0) { /* all of the piece has moved, its beginning too */
        next->pieces[0].begins = piece->begins;
        next->pieces[0].flags = piece->flags;
        b->piece_count--;
    }
    hand_over(p, next);
    return 0;
}

static int add_text(void *self, const char *bytes, size_t size, error *err) {
    encode_pipeline *p = self;
    ASSERT(p->filling && p->filling->piece_count > 0); /* a document is open while it gets text */
    while (size > 0) {
        if (p->filling->size == p->filling->capacity) {
            TRY(make_room(p, err));
            continue;
        }
        struct block *b = p->filling;
        size_t room = b->capacity - b->size, now = size < room ? size : room;
        memcpy(b->text + b->size, bytes, now);
        b->pieces[b->piece_count - 1].size += (uint32_t)now;
        b->size += now;
        bytes += now;
        size -= now;
    }
    return 0;
}

static int end_document(void *self, error *err) {
    encode_pipeline *p = self;
    (void)err;
    ASSERT(p->filling); /* a block is handed over only to make room for what follows in the next one */
    p->filling->pieces[p->filling->piece_count - 1].ends = true;
    return 0;
}

static int read_input(encode_pipeline *p, const char *path, error *err) {
    const struct split_sink sink = {begin_document, add_text, end_document, p};
    input_stream *stream;
    TRY(input_open(&stream, path, &p->stop, err));
    int failed = p->jsonl_key ? jsonl_documents(stream, p->jsonl_key, &sink, err)
                              : split_documents(stream, p->separator, &sink, err);
    input_close(stream);
    return failed;
}

static void *reader_main(void *argument) {
    encode_pipeline *p = argument;
    error err;
    int failed = 0;
    for (size_t i = 0; !failed && i < p->inputs->count; i++) failed = read_input(p, p->inputs->paths[i], &err);
    if (!failed && p->filling) hand_over(p, NULL);
    pthread_mutex_lock(&p->lock);
    p->ended = true;
    if (failed && !p->failed) {
        p->failed = true;
        p->err = err;
    }
    pthread_cond_broadcast(&p->encoded);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* ---- encoding threads -------------------------------------------------------------------------------------------- */

static int encode_block(const tokenizer *t, encoder *e, struct block *b, error *err) {
    int32_t eod = tokenizer_eod(t);
    size_t marks = 0;
    b->ids.count = 0;
    for (size_t i = 0; i < b->piece_count; i++) {
        const struct piece *piece = &b->pieces[i];
        if (piece->begins) b->marks[marks++] = (struct document_mark){.at = b->ids.count, .flags = piece->flags};
        TRY(encoder_append(e, b->text + piece->offset, piece->size, &b->ids, err));
        if (piece->ends) TRY(token_list_add(&b->ids, eod, err));
    }
    uint64_t bytes = tokenizer_text_bytes(t, b->ids.ids, b->ids.count);
    b->result = (struct encoded_block){b->ids.ids, b->ids.count, b->marks, marks, bytes};
    return 0;
}

/* Encode blocks as they come; with the lock held but while encoding. */
static int encode_blocks(encode_pipeline *p, encoder *e, error *err) {
    while (!atomic_load(&p->stop)) {
        struct block *b = &p->blocks[p->next % p->block_count];
        if (b->state != BLOCK_FILLED) {
            pthread_cond_wait(&p->filled, &p->lock);
            continue;
        }
        b->state = BLOCK_TAKEN;
        p->next++;
        pthread_mutex_unlock(&p->lock);
        int failed = encode_block(p->tokenizer, e, b, err);
        pthread_mutex_lock(&p->lock);
        if (failed) return -1;
        b->state = BLOCK_ENCODED;
        pthread_cond_broadcast(&p->encoded);
    }
    return 0;
}

static void *encoder_main(void *argument) {
    encode_pipeline *p = argument;
    error err;
    encoder *e;
    int failed = encoder_open(&e, p->tokenizer, &err);
    pthread_mutex_lock(&p->lock);
    if (!failed) failed = encode_blocks(p, e, &err);
    if (failed && !p->failed) {
        p->failed = true;
        p->err = err;
    }
    if (failed) pthread_cond_broadcast(&p->encoded);
    pthread_mutex_unlock(&p->lock);
    encoder_close(e);
    return NULL;
}

/* ---- the caller -------------------------------------------------------------------------------------------------- */

static int start_threads(encode_pipeline *p, int threads, error *err) {
    p->encoders = calloc((size_t)threads, sizeof *p->encoders);
    if (!p->encoders) return error_system(err, "no memory for %d threads", threads);
    int failed = 0;
    while (!failed && p->encoders_started < threads) {
        failed = pthread_create(&p->encoders[p->encoders_started], NULL, encoder_main, p);
        p->encoders_started += !failed;
    }
    if (!failed) {
        failed = pthread_create(&p->reader, NULL, reader_main, p);
        p->reader_started = !failed;
    }
    return failed ? error_system(err, "cannot start a thread to tokenize: %s", strerror(failed)) : 0;
}

int encode_pipeline_open(encode_pipeline **out, const tokenizer *t, const struct input_list *inputs,
                         const char *separator, const char *jsonl_key, int threads, const atomic_bool *interrupted,
                         error *err) {
    *out = NULL;
    ASSERT(threads >= 1);
    encode_pipeline *p = calloc(1, sizeof *p);
    if (!p) return error_system(err, "no memory to tokenize");
    p->tokenizer = t;
    p->inputs = inputs;
    p->separator = separator;
    p->jsonl_key = jsonl_key;
    p->interrupted = interrupted;
    p->block_count = (size_t)threads * BLOCKS_PER_THREAD + 2;
    atomic_init(&p->stop, false);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->freed, NULL);
    pthread_cond_init(&p->filled, NULL);
    pthread_cond_init(&p->encoded, &monotonic);
    pthread_condattr_destroy(&monotonic);
    p->blocks = calloc(p->block_count, sizeof *p->blocks);
    int failed = p->blocks ? 0 : error_system(err, "no memory for %zu blocks of text", p->block_count);
    if (!failed) failed = start_threads(p, threads, err);
    if (failed) {
        encode_pipeline_close(p);
        return -1;
    }
    *out = p;
    return 0;
}

static bool is_interrupted(const encode_pipeline *p) {
    return p->interrupted && atomic_load(p->interrupted);
}

/* Wait, with the lock held, until something may have changed or it is time to look at `interrupted`. */
static void wait_a_little(encode_pipeline *p) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += WAKE_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_cond_timedwait(&p->encoded, &p->lock, &until);
}

int encode_pipeline_next(encode_pipeline *p, const struct encoded_block **block, error *err) {
    *block = NULL;
    pthread_mutex_lock(&p->lock);
    if (p->lent) {
        p->blocks[(p->tail - 1) % p->block_count].state = BLOCK_FREE;
        p->lent = false;
        pthread_cond_signal(&p->freed);
    }
    struct block *b = &p->blocks[p->tail % p->block_count];
    bool over = false;
    while (!p->failed && b->state != BLOCK_ENCODED && !is_interrupted(p)) {
        over = p->ended && p->tail == p->head;
        if (over) break;
        wait_a_little(p);
    }
    int result = 0;
    if (is_interrupted(p)) {
        result = error_system(err, "interrupted by a signal");
    } else if (p->failed) {
        *err = p->err;
        result = -1;
    } else if (!over) {
        p->tail++;
        p->lent = true;
        *block = &b->result;
    }
    pthread_mutex_unlock(&p->lock);
    return result;
}

void encode_pipeline_close(encode_pipeline *p) {
    if (!p) return;
    atomic_store(&p->stop, true);
    pthread_mutex_lock(&p->lock);
    pthread_cond_broadcast(&p->freed);
    pthread_cond_broadcast(&p->filled);
    pthread_mutex_unlock(&p->lock);
    if (p->reader_started) pthread_join(p->reader, NULL);
    for (int i = 0; i < p->encoders_started; i++) pthread_join(p->encoders[i], NULL);
    for (size_t i = 0; p->blocks && i < p->block_count; i++) {
        free(p->blocks[i].text);
        free(p->blocks[i].ids.ids);
    }
    free(p->encoders);
    free(p->blocks);
    pthread_cond_destroy(&p->encoded);
    pthread_cond_destroy(&p->filled);
    pthread_cond_destroy(&p->freed);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
