/* support_shard.c: makes and compares the shards of support_shard.h. */
#include "test/support_shard.h"

#include "test/unit.h"

int32_t sample_id(const struct sample *s, uint64_t position) {
    if (s->document_tokens && position % s->document_tokens == s->document_tokens - 1) return (int32_t)(s->vocab - 1);
    /* Text repeats itself, so a third of the tokens do; the others take every value. */
    uint64_t from = position % 3 == 0 ? position % 7 : position;
    return (int32_t)((from * 0x9E3779B97F4A7C15u >> 20) % s->vocab);
}

uint8_t sample_mask(const struct sample *s, uint64_t position) {
    return !s->has_mask || (position * 0xD6E8FEB86659FD93u >> 40) % 3 != 0;
}

uint64_t sample_documents(const struct sample *s) {
    return s->document_tokens ? (s->tokens + s->document_tokens - 1) / s->document_tokens : 0;
}

static uint32_t sample_flags(uint64_t document) {
    return (uint32_t)(document % 3 == 0   ? SHARD_DOC_FIRST_OF_INPUT
                      : document % 3 == 1 ? SHARD_DOC_SEPARATED
                                          : SHARD_DOC_UNTERMINATED);
}

struct shard_writer_options sample_options(const struct sample *s) {
    return (struct shard_writer_options){
        .token_bytes = s->token_bytes,
        .frame_tokens = s->frame_tokens,
        .zstd_level = 3,
        .has_mask = s->has_mask,
        .planes = s->planes,
        .vocab = s->vocab,
        .eod = s->document_tokens ? (int64_t)s->vocab - 1 : -1,
        .tokenizer_identity = 0x0123456789ABCDEF,
        .tokenizer_name = "sample",
        .separator = "<|endoftext|>",
    };
}

void sample_write(const struct sample *s, const char *path, int threads, size_t piece) {
    error err;
    shard_writer *w;
    struct shard_info info;
    struct shard_writer_options options = sample_options(s);
    int32_t *ids = malloc(4096 * sizeof *ids);
    uint8_t *mask = malloc(4096);
    assert_true(ids && mask && piece <= 4096);
    assert_int_equal(shard_writer_open(&w, path, &options, threads, &err), 0);
    size_t size = piece ? piece : 1;
    for (uint64_t at = 0; at < s->tokens;) {
        uint64_t end = at + size < s->tokens ? at + size : s->tokens;
        if (s->document_tokens) {
            if (at % s->document_tokens == 0) {
                assert_int_equal(shard_writer_document(w, sample_flags(at / s->document_tokens), &err), 0);
            }
            uint64_t next = at - at % s->document_tokens + s->document_tokens;
            if (end > next) end = next;
        }
        for (uint64_t i = at; i < end; i++) {
            ids[i - at] = sample_id(s, i);
            mask[i - at] = sample_mask(s, i);
        }
        assert_int_equal(shard_writer_append(w, ids, s->has_mask ? mask : NULL, end - at, &err), 0);
        at = end;
        if (!piece) size = size * 3 % 4093 + 1;
    }
    shard_writer_text_bytes(w, 3 * s->tokens);
    assert_int_equal(shard_writer_finish(w, &info, &err), 0);
    assert_int_equal(info.tokens, s->tokens);
    free(ids);
    free(mask);
}

static void expect_info(const struct sample *s, const struct shard_info *info, const char *path) {
    assert_string_equal(info->path, path);
    assert_int_equal(info->version, SHARD_VERSION);
    assert_int_equal(info->token_bytes, s->token_bytes);
    assert_int_equal(info->frame_tokens, s->frame_tokens);
    assert_int_equal(info->has_mask, s->has_mask);
    assert_int_equal(info->planes, s->planes);
    assert_int_equal(info->tokens, s->tokens);
    assert_int_equal(info->documents, sample_documents(s));
    assert_int_equal(info->frames, (s->tokens + s->frame_tokens - 1) / s->frame_tokens);
    assert_int_equal(info->text_bytes, 3 * s->tokens);
    assert_int_equal(info->vocab, s->vocab);
    assert_int_equal(info->eod, s->document_tokens ? (int64_t)s->vocab - 1 : -1);
    assert_int_equal(info->tokenizer_identity, 0x0123456789ABCDEF);
    assert_string_equal(info->tokenizer_name, "sample");
    assert_string_equal(info->separator, "<|endoftext|>");
}

void sample_expect(const struct sample *s, const char *path) {
    error err;
    shard *opened;
    shard_cursor *cursor;
    assert_int_equal(shard_open(&opened, path, &err), 0);
    assert_int_equal(shard_cursor_open(&cursor, &err), 0);
    expect_info(s, shard_get_info(opened), path);
    const struct shard_document *documents = shard_documents(opened);
    for (uint64_t d = 0; d < sample_documents(s); d++) {
        assert_int_equal(documents[d].start, d * s->document_tokens);
        assert_int_equal(documents[d].flags, sample_flags(d));
    }
    int32_t *ids = malloc(s->tokens * sizeof *ids + 1);
    uint8_t *mask = malloc(s->tokens + 1);
    assert_true(ids && mask);
    assert_int_equal(shard_read(opened, cursor, 0, s->tokens, ids, mask, &err), 0);
    for (uint64_t i = 0; i < s->tokens; i++) {
        if (ids[i] != sample_id(s, i) || mask[i] != sample_mask(s, i)) {
            fail_msg("%s: token %llu is %d with mask %d, expected %d with mask %d", path, (unsigned long long)i, ids[i],
                     mask[i], sample_id(s, i), sample_mask(s, i));
        }
    }
    free(ids);
    free(mask);
    shard_cursor_close(cursor);
    shard_close(opened);
    assert_int_equal(shard_verify_with(path, 3, NULL, &err), 0);
}
