/* test_data_shard_damage.c: shards that are damaged, cut, or lie: each is refused with one sentence, or holds the very
 * same tokens; never a crash. The committed samples test/golden/shard-*.rrs are checked here, too. */
#include "test/support_forge.h"
#include "test/unit.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

/* Thousands of files are made here: in memory (the descriptor), except where it matters that they are files. */
static char directory[256], path[300];
static int descriptor;

static int enter(void **state) {
    (void)state;
    unit_directory(directory);
    descriptor = memfd_create("shard", MFD_CLOEXEC);
    snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    return descriptor < 0 ? -1 : 0;
}

static int leave(void **state) {
    (void)state;
    close(descriptor);
    unit_directory_remove(directory);
    return 0;
}

static const struct sample small = {2, 25, true, true, 300, 60, 13};

static void write_bytes(const void *bytes, size_t size) {
    assert_int_equal(ftruncate(descriptor, 0), 0);
    assert_int_equal(pwrite(descriptor, bytes, size, 0), size);
}

/* Refused as bad input, with a sentence that begins with the path; or the same content. Returns whether refused. */
static bool refused_or_same(const struct sample *s) {
    error err = {0};
    struct shard_info info;
    if (shard_verify(path, &info, &err) == 0) {
        sample_expect(s, path);
        return false;
    }
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_memory_equal(err.text, path, strlen(path));
    assert_true(strlen(err.text) > strlen(path) + 10);
    assert_null(strchr(err.text, '\n'));
    return true;
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

static void flip_every_byte(const struct sample *s) {
    static struct forgery f;
    forge(&f, s, NULL, NULL, NULL);
    const unsigned char masks[] = {0x01, 0x10, 0x80, 0xFF};
    size_t same = 0;
    for (size_t i = 0; i < f.size; i++) {
        for (size_t m = 0; m < sizeof masks; m++) {
            f.bytes[i] ^= masks[m];
            write_bytes(f.bytes, f.size);
            f.bytes[i] ^= masks[m];
            if (refused_or_same(s)) continue;
            /* zstd has bits without a meaning: one in a frame's descriptor, two where a block states its modes. */
            if (i < 512 || i >= f.header.seek_offset) {
                fail_msg("byte %zu changed by %02x makes no difference", i, masks[m]);
            }
            same++;
        }
    }
    assert_in_range(same, f.frame_count, 2 * f.frame_count);
}

static void every_byte_counts(void **state) {
    (void)state;
    const struct sample others[] = {small, {1, 16, false, false, 200, 50, 7}, {4, 10, true, false, 70000, 31, 5}};
    for (size_t i = 0; i < 3; i++) flip_every_byte(&others[i]);
}

static void every_length_counts(void **state) {
    (void)state;
    static struct forgery f;
    forge(&f, &small, NULL, NULL, NULL);
    for (size_t size = 0; size < f.size; size++) {
        write_bytes(f.bytes, size);
        assert_true(refused_or_same(&small));
        /* Also with a header that knows of no more: only the tables can tell then. */
        unsigned char *cut = malloc(size + 1);
        assert_non_null(cut);
        memcpy(cut, f.bytes, size);
        if (size >= 512) {
            uint64_t stated = size;
            memcpy(cut + offsetof(struct shard_header, file_bytes), &stated, 8);
            shard_reseal(cut, size);
        }
        write_bytes(cut, size);
        assert_true(refused_or_same(&small));
        free(cut);
    }
    for (size_t more = 1; more < 40; more++) {
        memset(f.bytes + f.size, 0, more);
        write_bytes(f.bytes, f.size + more);
        assert_true(refused_or_same(&small));
    }
}

static void swapped_frames(void **state) {
    (void)state;
    static struct forgery f;
    static unsigned char bytes[sizeof f.bytes];
    forge(&f, &small, NULL, NULL, NULL);
    memcpy(bytes, f.bytes, f.size);
    memcpy(bytes + 512, f.frames[1].packed, f.frames[1].packed_size);
    memcpy(bytes + 512 + f.frames[1].packed_size, f.frames[0].packed, f.frames[0].packed_size);
    write_bytes(bytes, f.size);
    assert_true(refused_or_same(&small));
}

static void cut_while_open(void **state) {
    (void)state;
    error err;
    char text[400];
    shard *s;
    shard_cursor *c;
    int32_t ids[60];
    static struct forgery f;
    forge(&f, &small, NULL, NULL, NULL);
    write_bytes(f.bytes, f.size);
    assert_int_equal(shard_open(&s, path, &err), 0);
    assert_int_equal(shard_cursor_open(&c, &err), 0);
    assert_int_equal(shard_read(s, c, 0, 25, ids, NULL, &err), 0);
    assert_int_equal(ftruncate(descriptor, 512), 0);
    assert_int_equal(shard_read(s, c, 0, 25, ids, NULL, &err), 0); /* still known to the cursor */
    assert_int_equal(shard_read(s, c, 20, 25, ids, NULL, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    snprintf(text, sizeof text, "%s ends at byte ", path);
    assert_memory_equal(err.text, text, strlen(text));
    shard_cursor_close(c);
    shard_close(s);
}

/* ---- what is no shard at all ------------------------------------------------------------------------------------- */

static void no_shards(void **state) {
    (void)state;
    error err;
    shard *s;
    char text[400];
    char file[300];
    snprintf(file, sizeof file, "%s/a.rrs", directory);
    snprintf(text, sizeof text, "cannot open shard %s: No such file or directory", file);
    unit_expect(shard_open(&s, file, &err), &err, ERROR_INPUT, text);
    assert_null(s);
    snprintf(text, sizeof text, "%s is no shard: it is not a regular file", directory);
    unit_expect(shard_open(&s, directory, &err), &err, ERROR_INPUT, text);
    assert_int_equal(mkfifo(file, 0600), 0); /* must not wait for a writer */
    snprintf(text, sizeof text, "%s is no shard: it is not a regular file", file);
    unit_expect(shard_open(&s, file, &err), &err, ERROR_INPUT, text);
    write_bytes("", 0);
    snprintf(text, sizeof text, "%s is no shard: it has 0 bytes, expected at least the 512 of a header", path);
    unit_expect(shard_open(&s, path, &err), &err, ERROR_INPUT, text);
    unsigned char noise[3000];
    for (uint64_t seed = 0; seed < 50; seed++) {
        for (size_t i = 0; i < sizeof noise; i++) {
            noise[i] = (unsigned char)((i + seed * 7919) * 0x9E3779B97F4A7C15u >> 50);
        }
        write_bytes(noise, sizeof noise);
        assert_true(refused_or_same(&small));
    }
}

/* ---- lies: good checksums over wrong numbers --------------------------------------------------------------------- */

#define LIE(name, change)                 \
    static void name(struct forgery *f) { \
        change;                           \
    }

LIE(version, f->header.version = 2)
LIE(header_bytes, f->header.header_bytes = 511)
LIE(unknown_flag, f->header.flags |= 4)
LIE(reserved_0, f->header.reserved_0 = 1)
LIE(reserved_1, f->header.reserved_1[55] = 1)
LIE(token_bytes_3, f->header.token_bytes = 3)
LIE(token_bytes_1, f->header.token_bytes = 1)
LIE(vocab_0, f->header.vocab = 0)
LIE(vocab_large, f->header.vocab = UINT64_C(1) << 62)
LIE(eod_outside, f->header.eod = 300)
LIE(eod_negative, f->header.eod = INT64_MIN)
LIE(frame_tokens_0, f->header.frame_tokens = 0)
LIE(frame_tokens_large, f->header.frame_tokens = UINT32_MAX)
LIE(name_full, memset(f->header.tokenizer_name, 'x', 64))
LIE(name_after_zero, f->header.tokenizer_name[63] = 'x')
LIE(name_control, f->header.tokenizer_name[0] = '\033')
LIE(separator_full, memset(f->header.separator, 'x', 256))
LIE(separator_line, f->header.separator[3] = '\n')
LIE(file_longer, f->header.file_bytes++)
LIE(file_shorter, f->header.file_bytes--)
LIE(tokens_one_more, f->header.tokens = 76)
LIE(tokens_huge, f->header.tokens = UINT64_MAX; f->header.frames = UINT64_MAX / 25 + 1)
LIE(tokens_0, f->header.tokens = 0; f->header.frames = 0)
LIE(frames_fewer, f->header.frames = 2)
LIE(documents_many, f->header.documents = 61)
LIE(documents_huge, f->header.documents = UINT64_MAX)
LIE(seek_early, f->header.seek_offset -= 8)
LIE(seek_far, f->header.seek_offset = UINT64_MAX - 16)
LIE(document_late, f->header.document_offset += 8)
LIE(tables_too_large, f->header.tokens = 25 * 40; f->header.frames = 40; f->header.documents = 16)
LIE(offset_before, f->seek[0].offset = 0)
LIE(offset_overlap, f->seek[1].offset--)
LIE(offset_huge, f->seek[2].offset = UINT64_MAX - 3)
LIE(frame_bytes_0, f->seek[1].bytes = 0)
LIE(frame_bytes_huge, f->seek[1].bytes = UINT64_MAX)
LIE(frame_bytes_less, f->seek[2].bytes--)
LIE(frame_bytes_shifted, f->seek[1].bytes++; f->seek[2].offset++; f->seek[2].bytes--)
LIE(frame_hash, f->seek[1].hash ^= 1)
LIE(document_not_ascending, f->documents[2].start = f->documents[1].start)
LIE(document_outside, f->documents[4].start = 60)
LIE(document_flags, f->documents[1].flags = 3)
LIE(document_reserved, f->documents[1].flags = 0; f->documents[1].reserved = 1)
LIE(document_inside, f->documents[1].start = 12)
LIE(document_at_frame, f->documents[2].start = 25)
LIE(id_outside, f->frames[1].raw[25 + 4] = 2) /* the high byte of a token: 512 and more */
LIE(id_first, f->frames[2].raw[10] = 0xFF)
LIE(mask_tail, f->frames[2].raw[20 + 1] |= 0x04) /* 10 tokens: the mask's second byte has two bits */
LIE(other_tokens, f->frames[1].raw[0] ^= 1; forge_pack(&f->frames[1]); f->frames[1].raw[0] ^= 1)
LIE(raw_shorter, f->frames[1].raw_size--)
LIE(raw_longer, f->frames[1].raw_size++)

static void two_frames(struct forgery *f) {
    struct forged_frame *whole = &f->frames[1];
    static struct forged_frame a, b;
    a.raw_size = 20;
    b.raw_size = whole->raw_size - 20;
    memcpy(a.raw, whole->raw, a.raw_size);
    memcpy(b.raw, whole->raw + 20, b.raw_size);
    forge_pack(&a);
    forge_pack(&b);
    memcpy(whole->packed, a.packed, a.packed_size);
    memcpy(whole->packed + a.packed_size, b.packed, b.packed_size);
    whole->packed_size = a.packed_size + b.packed_size;
}

static void skippable_behind(struct forgery *f) {
    static const unsigned char skippable[] = {0x50, 0x2A, 0x4D, 0x18, 1, 0, 0, 0, 0};
    memcpy(f->frames[1].packed + f->frames[1].packed_size, skippable, sizeof skippable);
    f->frames[1].packed_size += sizeof skippable;
}

static void size_not_stated(struct forgery *f) {
    struct forged_frame *frame = &f->frames[1];
    ZSTD_CCtx *context = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 0);
    frame->packed_size = ZSTD_compress2(context, frame->packed, FORGE_BYTES, frame->raw, frame->raw_size);
    ZSTD_freeCCtx(context);
    assert_false(ZSTD_isError(frame->packed_size));
}

enum step { TOKENS, FRAMES, NUMBERS };

static const struct {
    const char *name;
    enum step step;
    forge_lie *lie;
    const char *text; /* behind the path; "..." at its end: what follows depends on zstd's version */
} lies[] = {
#define ROW(step, lie, text) {#lie, step, lie, text}
    ROW(NUMBERS, version, " is a shard of version 2; this riverrun reads version 1"),
    ROW(NUMBERS, header_bytes, " is no valid shard: it states a header of 511 bytes, expected 512"),
    ROW(NUMBERS, unknown_flag,
        " uses features that this riverrun does not know: flags 0x7, expected at most 0x3 and zeros in "
        "what is reserved"),
    ROW(NUMBERS, reserved_0,
        " uses features that this riverrun does not know: flags 0x3, expected at most 0x3 and zeros in "
        "what is reserved"),
    ROW(NUMBERS, reserved_1,
        " uses features that this riverrun does not know: flags 0x3, expected at most 0x3 and zeros in "
        "what is reserved"),
    ROW(NUMBERS, token_bytes_3, " is no valid shard: 3 bytes a token, expected 1, 2 or 4"),
    ROW(NUMBERS, token_bytes_1,
        " is no valid shard: a vocabulary of 300 ids, expected 1 to what 1 bytes hold, at most 16777216"),
    ROW(NUMBERS, vocab_0,
        " is no valid shard: a vocabulary of 0 ids, expected 1 to what 2 bytes hold, at most 16777216"),
    ROW(NUMBERS, vocab_large,
        " is no valid shard: a vocabulary of 4611686018427387904 ids, expected 1 to what 2 bytes hold, "
        "at most 16777216"),
    ROW(NUMBERS, eod_outside, " is no valid shard: end-of-document id 300, expected -1 to 299"),
    ROW(NUMBERS, eod_negative, " is no valid shard: end-of-document id -9223372036854775808, expected -1 to 299"),
    ROW(NUMBERS, frame_tokens_0, " is no valid shard: 0 tokens a frame, expected 1 to 4194304"),
    ROW(NUMBERS, frame_tokens_large, " is no valid shard: 4294967295 tokens a frame, expected 1 to 4194304"),
    ROW(NUMBERS, name_full, " is no valid shard: its tokenizer's name is not text of at most 63 bytes and zeros"),
    ROW(NUMBERS, name_after_zero, " is no valid shard: its tokenizer's name is not text of at most 63 bytes and zeros"),
    ROW(NUMBERS, name_control, " is no valid shard: its tokenizer's name is not text of at most 63 bytes and zeros"),
    ROW(NUMBERS, separator_full, " is no valid shard: its separator is not a line of at most 255 bytes and zeros"),
    ROW(NUMBERS, separator_line, " is no valid shard: its separator is not a line of at most 255 bytes and zeros"),
    ROW(NUMBERS, file_longer, " is cut off: it has..."),
    ROW(NUMBERS, file_shorter, " is damaged: it has..."),
    ROW(NUMBERS, tokens_one_more, " is no valid shard: 3 frames, expected 4 for its 76 tokens"),
    ROW(NUMBERS, tokens_huge, " is no valid shard: 737869762948382065 frames and 5 documents, more than its..."),
    ROW(NUMBERS, tokens_0, " is no valid shard: 5 documents, expected at most one a token, 0"),
    ROW(NUMBERS, frames_fewer, " is no valid shard: 2 frames, expected 3 for its 60 tokens"),
    ROW(NUMBERS, documents_many, " is no valid shard: 61 documents, expected at most one a token, 60"),
    ROW(NUMBERS, documents_huge,
        " is no valid shard: 18446744073709551615 documents, expected at most one a token, 60"),
    ROW(NUMBERS, seek_early, " is no valid shard: tables at bytes..."),
    ROW(NUMBERS, seek_far, " is no valid shard: tables at bytes 18446744073709551599 and..."),
    ROW(NUMBERS, document_late, " is no valid shard: tables at bytes..."),
    ROW(NUMBERS, tables_too_large, " is no valid shard: ..."),
    ROW(NUMBERS, offset_before, " is no valid shard: frame 0 has..."),
    ROW(NUMBERS, offset_overlap, " is no valid shard: frame 1 has..."),
    ROW(NUMBERS, offset_huge, " is no valid shard: frame 2 has..."),
    ROW(NUMBERS, frame_bytes_0, " is no valid shard: frame 1 has 0 bytes at byte..."),
    ROW(NUMBERS, frame_bytes_huge, " is no valid shard: frame 1 has 18446744073709551615 bytes at byte..."),
    ROW(NUMBERS, frame_bytes_less, " is no valid shard: its frames end at byte..."),
    ROW(NUMBERS, frame_bytes_shifted, " is damaged: frame 1 is not one zstd frame of..."),
    ROW(NUMBERS, frame_hash, " is damaged: frame 1 has checksum..."),
    ROW(NUMBERS, document_not_ascending, " is no valid shard: document 2 starts at token 13, expected 14 to 59"),
    ROW(NUMBERS, document_outside, " is no valid shard: document 4 starts at token 60, expected 40 to 59"),
    ROW(NUMBERS, document_flags, " is no valid shard: document 1 has flags 3 and 0, expected at most 2 and 0"),
    ROW(NUMBERS, document_reserved, " is no valid shard: document 1 has flags 0 and 1, expected at most 2 and 0"),
    ROW(NUMBERS, document_inside, " is no valid shard: the token before document 1 is..."),
    ROW(NUMBERS, document_at_frame, " is no valid shard: the token before document 2 is..."),
    ROW(TOKENS, id_outside, " is no valid shard: frame 1 has token id..."),
    ROW(TOKENS, id_first, " is no valid shard: frame 2 has token id..."),
    ROW(TOKENS, mask_tail, " is no valid shard: frame 2 has mask bits after its last token, expected zeros"),
    ROW(TOKENS, raw_shorter, " is damaged: frame 1 is not one zstd frame of..."),
    ROW(TOKENS, raw_longer, " is damaged: frame 1 is not one zstd frame of..."),
    ROW(FRAMES, other_tokens, " is damaged: frame 1 has checksum..."),
    ROW(FRAMES, two_frames, " is damaged: frame 1 is not one zstd frame of..."),
    ROW(FRAMES, skippable_behind, " is damaged: frame 1 is not one zstd frame of..."),
    ROW(FRAMES, size_not_stated, " is damaged: frame 1 is not one zstd frame of..."),
};

/* Does `text` match `pattern`, of which an ending "..." stands for anything? */
static bool matches(const char *text, const char *pattern) {
    size_t length = strlen(pattern);
    if (length >= 3 && strcmp(pattern + length - 3, "...") == 0) return strncmp(text, pattern, length - 3) == 0;
    return strcmp(text, pattern) == 0;
}

static void lies_are_found(void **state) {
    (void)state;
    static struct forgery f;
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            error err = {0};
            forge(&f, &small, lies[i].step == TOKENS ? lies[i].lie : NULL, lies[i].step == FRAMES ? lies[i].lie : NULL,
                  lies[i].step == NUMBERS ? lies[i].lie : NULL);
            write_bytes(f.bytes, f.size);
            int result = shard_verify_with(path, threads, NULL, &err);
            if (result != -1 || err.kind != ERROR_INPUT || strncmp(err.text, path, strlen(path)) != 0 ||
                !matches(err.text + strlen(path), lies[i].text)) {
                fail_msg("%s: expected '%s', got %d, '%s'", lies[i].name, lies[i].text, result, err.text);
            }
        }
    }
}

static void truth_is_what_the_writer_writes(void **state) {
    (void)state;
    static struct forgery f;
    const struct sample others[] = {small, {1, 16, false, false, 200, 50, 7}, {4, 10, true, false, 70000, 31, 5}};
    for (size_t i = 0; i < 3; i++) {
        error err;
        char *bytes;
        size_t size;
        forge(&f, &others[i], NULL, NULL, NULL);
        char file[300];
        snprintf(file, sizeof file, "%s/a.rrs", directory);
        sample_write(&others[i], file, 2, 0);
        assert_int_equal(file_read_all(file, 1 << 20, &bytes, &size, &err), 0);
        assert_int_equal(size, f.size);
        assert_memory_equal(bytes, f.bytes, size);
        free(bytes);
    }
}

/* Several faults: the first is told, whatever the number of threads and whoever comes first. The frames are large, so
 * that threads are at work on several bad ones at a time. */
static void the_first_fault_is_told(void **state) {
    (void)state;
    const struct sample large = {2, 150000, false, true, 300, 24 * 150000, 0};
    error err;
    char file[300], text[400], *bytes;
    size_t size;
    snprintf(file, sizeof file, "%s/a.rrs", directory);
    sample_write(&large, file, 2, 0);
    assert_int_equal(file_read_all(file, 1 << 30, &bytes, &size, &err), 0);
    struct shard_header h;
    memcpy(&h, bytes, sizeof h);
    for (uint64_t n = 10; n < h.frames; n++) {
        bytes[h.seek_offset + n * sizeof(struct shard_seek) + offsetof(struct shard_seek, hash)] ^= 1;
    }
    shard_reseal((unsigned char *)bytes, size);
    write_bytes(bytes, size);
    free(bytes);
    snprintf(text, sizeof text, "%s is damaged: frame 10 has checksum ", path);
    for (int i = 0; i < 40; i++) {
        assert_int_equal(shard_verify_with(path, 1 + i % 8, NULL, &err), -1);
        assert_memory_equal(err.text, text, strlen(text));
    }
}

/* ---- committed samples ------------------------------------------------------------------------------------------- */

static void golden_samples(void **state) {
    (void)state;
    const struct sample good = {2, 25, true, true, 300, 60, 13};
    sample_expect(&good, "test/golden/shard-good.rrs");
    const struct {
        const char *path, *text;
    } bad[] = {
        {"test/golden/shard-bad-cut.rrs", " is cut off: it has 700 bytes, expected 819"},
        {"test/golden/shard-bad-header.rrs", " is damaged: its header has checksum..."},
        {"test/golden/shard-bad-frame.rrs", " is damaged: frame 1 does not decompress: ..."},
        {"test/golden/shard-bad-version.rrs", " is a shard of version 2; this riverrun reads version 1"},
        {"test/golden/shard-bad-id.rrs", " is no valid shard: frame 1 has token id 599, expected ids below 300"},
        {"test/golden/shard-bad-offset.rrs",
         " is no valid shard: frame 1 has 59 bytes at byte 572, expected 1 to 94 at byte 573"},
        {"test/golden/shard-bad-count.rrs",
         " is no valid shard: 737869762948382065 frames and 5 documents, more than its 819 bytes "
         "hold"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        error err = {0};
        assert_int_equal(shard_verify(bad[i].path, NULL, &err), -1);
        if (!matches(err.text + strlen(bad[i].path), bad[i].text)) fail_msg("%s", err.text);
    }
}

/* `test_data_shard_damage golden DIRECTORY` writes those samples anew: needed when the format's version changes. */
static void write_golden(const char *to) {
    static struct forgery f;
    const struct {
        const char *name;
        forge_lie *tokens, *numbers;
        size_t cut, flip;
    } samples[] = {
        {"good", NULL, NULL, 0, 0},
        {"bad-cut", NULL, NULL, 700, 0},
        {"bad-header", NULL, NULL, 0, 40},
        {"bad-frame", NULL, NULL, 0, 600},
        {"bad-version", NULL, version, 0, 0},
        {"bad-id", id_outside, NULL, 0, 0},
        {"bad-offset", NULL, offset_overlap, 0, 0},
        {"bad-count", NULL, tokens_huge, 0, 0},
    };
    for (size_t i = 0; i < sizeof samples / sizeof *samples; i++) {
        forge(&f, &small, samples[i].tokens, NULL, samples[i].numbers);
        if (samples[i].flip) f.bytes[samples[i].flip] ^= 0x40;
        error err;
        snprintf(path, sizeof path, "%s/shard-%s.rrs", to, samples[i].name);
        assert_int_equal(file_write_all(path, f.bytes, samples[i].cut ? samples[i].cut : f.size, &err), 0);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "golden") == 0) {
        write_golden(argv[2]);
        return 0;
    }
    const struct CMUnitTest tests[] = {
        TEST(every_byte_counts),
        TEST(every_length_counts),
        TEST(swapped_frames),
        TEST(cut_while_open),
        TEST(no_shards),
        TEST(lies_are_found),
        TEST(truth_is_what_the_writer_writes),
        TEST(the_first_fault_is_told),
        cmocka_unit_test(golden_samples),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
