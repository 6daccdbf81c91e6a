/* shard_verify.c: reads every frame of a shard, on several threads, and checks what opening and reading do not.
 *
 * Threads take frames in order from a counter. Of several faults the one in the lowest frame is kept: all frames before
 * it have been taken, so the result does not depend on the threads. Called by `riverrun shards verify` and by tests.
 */
#include "data/shard.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct verification {
    const shard *shard;
    pthread_mutex_t lock;
    uint64_t next;   /* the next frame to take */
    uint64_t failed; /* the lowest frame with a fault, or UINT64_MAX */
    error err;       /* and its sentence */
};

static void keep_fault(struct verification *v, uint64_t frame, const error *err) {
    pthread_mutex_lock(&v->lock);
    if (frame < v->failed) {
        v->failed = frame;
        v->err = *err;
    }
    pthread_mutex_unlock(&v->lock);
}

/* The next frame that needs checking, or UINT64_MAX. Frames after a fault don't. */
static uint64_t take_frame(struct verification *v) {
    pthread_mutex_lock(&v->lock);
    uint64_t frame = v->next < shard_get_info(v->shard)->frames && v->next < v->failed ? v->next++ : UINT64_MAX;
    pthread_mutex_unlock(&v->lock);
    return frame;
}

/* A document that starts after a token of this frame must start after the end-of-document id. */
static int check_ends(const shard *s, uint64_t first, const int32_t *tokens, size_t count, error *err) {
    const struct shard_info *info = shard_get_info(s);
    const struct shard_document *documents = shard_documents(s);
    for (uint64_t d = shard_document_from(s, first + 1); d < info->documents && documents[d].start <= first + count;
         d++) {
        int32_t before = tokens[documents[d].start - 1 - first];
        if (info->eod >= 0 && before != info->eod) {
            return error_input(err,
                               "%s is no valid shard: the token before document %" PRIu64
                               " is %d, expected the end-of-document id %" PRId64,
                               info->path, d, before, info->eod);
        }
    }
    return 0;
}

static void *verify_frames(void *argument) {
    struct verification *v = argument;
    const struct shard_info *info = shard_get_info(v->shard);
    error err;
    shard_cursor *cursor = NULL;
    int32_t *tokens = malloc(info->frame_tokens * sizeof *tokens);
    if (!tokens || shard_cursor_open(&cursor, &err) != 0) {
        error_system(&err, "no memory to verify %s", info->path);
        keep_fault(v, 0, &err);
    }
    uint64_t frame;
    while ((frame = take_frame(v)) != UINT64_MAX) {
        uint64_t first = frame * info->frame_tokens, rest = info->tokens - first;
        size_t count = rest < info->frame_tokens ? rest : info->frame_tokens;
        if (shard_read(v->shard, cursor, first, count, tokens, NULL, &err) != 0 ||
            check_ends(v->shard, first, tokens, count, &err) != 0) {
            keep_fault(v, frame, &err);
        }
    }
    shard_cursor_close(cursor);
    free(tokens);
    return NULL;
}

static int verify_open(const shard *s, int threads, error *err) {
    struct verification v = {.shard = s, .failed = UINT64_MAX};
    pthread_mutex_init(&v.lock, NULL);
    pthread_t *others = calloc((size_t)threads, sizeof *others);
    int started = 0;
    /* A thread that can't be had only makes it slower: this one takes all frames that are left. */
    while (others && started < threads - 1 && pthread_create(&others[started], NULL, verify_frames, &v) == 0) started++;
    verify_frames(&v);
    for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
    free(others);
    pthread_mutex_destroy(&v.lock);
    if (v.failed == UINT64_MAX) return 0;
    *err = v.err;
    return -1;
}

int shard_verify_with(const char *path, int threads, struct shard_info *info, error *err) {
    ASSERT(threads >= 1);
    shard *s;
    TRY(shard_open(&s, path, err));
    int failed = verify_open(s, threads, err);
    if (!failed && info) *info = *shard_get_info(s);
    shard_close(s);
    return failed;
}

int shard_verify(const char *path, struct shard_info *info, error *err) {
    return shard_verify_with(path, 1, info, err);
}
