/* support_forge.c: the steps of support_forge.h, written from docs/formats.md rather than from the writer. */
#include "test/support_forge.h"

#include "test/unit.h"
#include <zstd.h>

static void put_tokens(struct forgery *f, const struct sample *s) {
    f->frame_count = (s->tokens + s->frame_tokens - 1) / s->frame_tokens;
    assert_true(f->frame_count <= FORGE_FRAMES);
    for (size_t n = 0; n < f->frame_count; n++) {
        struct forged_frame *frame = &f->frames[n];
        uint64_t first = n * s->frame_tokens, rest = s->tokens - first;
        size_t count = rest < s->frame_tokens ? rest : s->frame_tokens;
        for (size_t i = 0; i < count; i++) {
            uint32_t id = (uint32_t)sample_id(s, first + i);
            for (size_t b = 0; b < s->token_bytes; b++) {
                frame->raw[s->planes ? b * count + i : i * s->token_bytes + b] = (unsigned char)(id >> 8 * b);
            }
        }
        frame->raw_size = count * s->token_bytes;
        if (!s->has_mask) continue;
        for (size_t i = 0; i < count; i++) {
            if (sample_mask(s, first + i)) frame->raw[frame->raw_size + i / 8] |= (unsigned char)(1 << i % 8);
        }
        frame->raw_size += (count + 7) / 8;
    }
}

static void put_documents(struct forgery *f, const struct sample *s) {
    const uint32_t flags[] = {SHARD_DOC_FIRST_OF_INPUT, SHARD_DOC_SEPARATED, SHARD_DOC_UNTERMINATED};
    f->document_count = sample_documents(s);
    assert_true(f->document_count <= FORGE_DOCUMENTS);
    for (size_t d = 0; d < f->document_count; d++) {
        f->documents[d] = (struct shard_document){.start = d * s->document_tokens, .flags = flags[d % 3]};
    }
}

void forge_pack(struct forged_frame *frame) {
    ZSTD_CCtx *context = ZSTD_createCCtx();
    assert_non_null(context);
    ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, 3);
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
    frame->packed_size = ZSTD_compress2(context, frame->packed, FORGE_BYTES, frame->raw, frame->raw_size);
    assert_false(ZSTD_isError(frame->packed_size));
    ZSTD_freeCCtx(context);
}

static void put_header(struct forgery *f, const struct sample *s) {
    struct shard_header *h = &f->header;
    memcpy(h->magic, "\x89RRS\r\n\x1a\n", 8);
    h->version = 1;
    h->header_bytes = 512;
    h->flags = s->has_mask + 2u * s->planes;
    h->token_bytes = s->token_bytes;
    h->frame_tokens = s->frame_tokens;
    h->tokens = s->tokens;
    h->documents = f->document_count;
    h->frames = f->frame_count;
    h->text_bytes = 3 * s->tokens;
    h->vocab = s->vocab;
    h->eod = s->document_tokens ? (int64_t)s->vocab - 1 : -1;
    h->tokenizer_identity = 0x0123456789ABCDEF;
    strcpy(h->tokenizer_name, "sample");
    strcpy(h->separator, "<|endoftext|>");
}

static void lay_out(struct forgery *f) {
    uint64_t offset = 512;
    for (size_t n = 0; n < f->frame_count; n++) {
        const struct forged_frame *frame = &f->frames[n];
        f->seek[n] = (struct shard_seek){offset, frame->packed_size, XXH64(frame->raw, frame->raw_size, 0)};
        offset += frame->packed_size;
    }
    f->header.seek_offset = offset;
    f->header.document_offset = offset + 24 * f->frame_count;
    f->header.file_bytes = f->header.document_offset + 16 * f->document_count;
}

static void add(struct forgery *f, const void *bytes, size_t size) {
    memcpy(f->bytes + f->size, bytes, size);
    f->size += size;
}

void forge(struct forgery *f, const struct sample *s, forge_lie *about_tokens, forge_lie *about_frames,
           forge_lie *about_numbers) {
    memset(f, 0, sizeof *f);
    put_tokens(f, s);
    put_documents(f, s);
    put_header(f, s);
    if (about_tokens) about_tokens(f);
    for (size_t n = 0; n < f->frame_count; n++) forge_pack(&f->frames[n]);
    if (about_frames) about_frames(f);
    lay_out(f);
    if (about_numbers) about_numbers(f);
    add(f, &f->header, 512);
    for (size_t n = 0; n < f->frame_count; n++) add(f, f->frames[n].packed, f->frames[n].packed_size);
    add(f, f->seek, 24 * f->frame_count);
    add(f, f->documents, 16 * f->document_count);
    struct shard_header h;
    memcpy(&h, f->bytes, sizeof h);
    h.seek_hash = XXH64(f->seek, 24 * f->frame_count, 0);
    h.document_hash = XXH64(f->documents, 16 * f->document_count, 0);
    h.header_hash = XXH64(&h, 504, 0);
    memcpy(f->bytes, &h, sizeof h);
}
