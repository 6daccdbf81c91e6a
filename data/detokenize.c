/* detokenize.c: a data set's text, written back as tokenize read it. Called by `riverrun shards cat`.
 *
 * A document's flags say what stood before it: nothing (it began an input), a separator line, or a separator line that
 * ended the input without a newline. The end-of-document id at a document's end stands for no text; one inside a
 * document stands for how it is written, which a tokenizer may have found in the text.
 */
#include "common/file.h"
#include "data/shard.h"
#include "data/tokenize.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { READ_TOKENS = 1 << 15, WRITE_BYTES = 1 << 16 };

struct text_writer {
    int descriptor;
    bool ended; /* the last token was an end-of-document id, and what it stands for is not yet known */
    size_t filled;
    char buffer[WRITE_BYTES];
};

static int flush(struct text_writer *w, error *err) {
    size_t size = w->filled;
    w->filled = 0;
    return file_write_out(w->descriptor, "text", w->buffer, size, err);
}

static int put(struct text_writer *w, const char *bytes, size_t size, error *err) {
    while (size > 0) {
        if (w->filled == WRITE_BYTES) TRY(flush(w, err));
        size_t room = WRITE_BYTES - w->filled, now = size < room ? size : room;
        memcpy(w->buffer + w->filled, bytes, now);
        w->filled += now;
        bytes += now;
        size -= now;
    }
    return 0;
}

static int put_tokens(struct text_writer *w, const tokenizer *t, const int32_t *ids, size_t count, error *err) {
    size_t size;
    int32_t eod = tokenizer_eod(t);
    for (size_t i = 0; i < count; i++) {
        if (w->ended) {
            const char *text = tokenizer_eod_text(t, &size);
            TRY(put(w, text, size, err));
        }
        w->ended = ids[i] == eod;
        const char *bytes = tokenizer_decode(t, ids[i], &size);
        if (size == 1 && w->filled < WRITE_BYTES) {
            w->buffer[w->filled++] = *bytes; /* spares most tokens a call that copies one byte */
        } else {
            TRY(put(w, bytes, size, err));
        }
    }
    return 0;
}

static int put_separator(struct text_writer *w, const struct shard_info *info, uint32_t flags, error *err) {
    if (flags == SHARD_DOC_FIRST_OF_INPUT) return 0;
    TRY(put(w, info->separator, strlen(info->separator), err));
    return flags == SHARD_DOC_UNTERMINATED ? 0 : put(w, "\n", 1, err);
}

static int put_shard(struct text_writer *w, const tokenizer *t, const shard *s, shard_cursor *c, int32_t *ids,
                     error *err) {
    const struct shard_info *info = shard_get_info(s);
    const struct shard_document *documents = shard_documents(s);
    uint64_t document = 0;
    for (uint64_t at = 0; at < info->tokens;) {
        if (document < info->documents && documents[document].start == at) {
            w->ended = false;
            TRY(put_separator(w, info, documents[document].flags, err));
            document++;
        }
        uint64_t end = document < info->documents ? documents[document].start : info->tokens;
        size_t count = end - at < READ_TOKENS ? end - at : READ_TOKENS;
        TRY(shard_read(s, c, at, count, ids, NULL, err));
        TRY(put_tokens(w, t, ids, count, err));
        at += count;
    }
    return 0;
}

static int put_dataset(struct text_writer *w, const tokenizer *t, const dataset *d, shard_cursor *c, int32_t *ids,
                       error *err) {
    const struct dataset_info *info = dataset_get_info(d);
    if (info->tokenizer_identity != tokenizer_identity(t)) {
        return error_input(err,
                           "%s was made with the tokenizer '%s' (%016" PRIx64 "), not with '%s' (%016" PRIx64
                           "), so its text can't be given back",
                           shard_get_info(dataset_shard(d, 0))->path, info->tokenizer_name, info->tokenizer_identity,
                           tokenizer_name(t), tokenizer_identity(t));
    }
    for (size_t i = 0; i < info->shards; i++) TRY(put_shard(w, t, dataset_shard(d, i), c, ids, err));
    return flush(w, err);
}

int detokenize(const tokenizer *t, const char *dataset_path, int descriptor, error *err) {
    dataset *d;
    TRY(dataset_open(&d, dataset_path, err));
    shard_cursor *cursor = NULL;
    struct text_writer *w = malloc(sizeof *w);
    int32_t *ids = malloc(READ_TOKENS * sizeof *ids);
    int failed = w && ids ? shard_cursor_open(&cursor, err) : error_system(err, "no memory to read %s", dataset_path);
    if (!failed) {
        w->descriptor = descriptor;
        w->filled = 0;
        w->ended = false;
        failed = put_dataset(w, t, d, cursor, ids, err);
    }
    shard_cursor_close(cursor);
    free(ids);
    free(w);
    dataset_close(d);
    return failed;
}
