/* test_data_tokenize.c: text to documents and back, byte for byte: separators in every position, every kind of input,
 * shard and frame boundaries anywhere, threads. What tokenize refuses and leaves behind is test_data_tokenize_disk.c's.
 */
#include "test/support_text.h"
#include "test/unit.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#define SEP "<|endoftext|>"

static char directory[256];
static char *paths[1000]; /* handed out by in_directory, freed with the directory */
static size_t path_count;

static int enter(void **state) {
    (void)state;
    unit_directory(directory);
    return 0;
}

static int leave(void **state) {
    (void)state;
    while (path_count > 0) free(paths[--path_count]);
    unit_directory_remove(directory);
    return 0;
}

static const char *in_directory(const char *name) {
    char path[4096];
    error err;
    assert_int_equal(file_join(path, 4096, directory, name, &err), 0);
    assert_true(path_count < sizeof paths / sizeof *paths);
    paths[path_count] = strdup(path);
    assert_non_null(paths[path_count]);
    return paths[path_count++];
}

static const char *write_input(const char *name, const char *bytes, size_t size) {
    error err;
    const char *path = in_directory(name);
    assert_int_equal(file_write_all(path, bytes, size, &err), 0);
    return path;
}

static void remove_output(void) {
    error err;
    assert_int_equal(file_remove_tree(in_directory("out"), &err), 0);
}

/* Tokenize files whose contents are given, and compare documents, counts and text with what they should be. */
static void check(const char *const *inputs, const struct text *contents, size_t count,
                  const struct tokenize_options *o) {
    error err = {0};
    struct tokenize_result result;
    struct text_documents got, expected = {0};
    struct text joined = {0};
    for (size_t i = 0; i < count; i++) {
        text_documents_split(&expected, contents[i].bytes, contents[i].size, o->separator);
        text_add(&joined, contents[i].bytes, contents[i].size);
    }
    if (text_tokenize(inputs, count, o, &result, &err) != 0) fail_msg("%s", err.text);
    text_documents_read(&got, o->out);
    text_documents_equal(&got, &expected);
    assert_int_equal(result.documents, expected.count);
    assert_int_equal(result.text_bytes, expected.all.size);
    assert_int_equal(result.tokens, expected.all.size + expected.count);
    struct text text = text_of(o->out);
    assert_int_equal(text.size, joined.size);
    assert_memory_equal(text.bytes, joined.bytes, text.size);
    text_free(&text);
    text_free(&joined);
    text_documents_free(&got);
    text_documents_free(&expected);
    remove_output();
}

/* All contents as the inputs of one run. */
static void check_contents(const struct text *contents, size_t count, const char *separator) {
    const char *inputs[100];
    assert_true(count <= 100);
    for (size_t i = 0; i < count; i++) {
        char name[32];
        snprintf(name, sizeof name, "in%zu", i);
        inputs[i] = write_input(name, contents[i].bytes, contents[i].size);
    }
    struct tokenize_options o = text_options(in_directory("out"));
    o.separator = separator;
    check(inputs, contents, count, &o);
}

static void check_one(const char *bytes, size_t size, const char *separator) {
    const struct text content = {.bytes = (char *)bytes, .size = size};
    check_contents(&content, 1, separator);
}

/* ---- documents --------------------------------------------------------------------------------------------------- */

static void separators_in_every_position(void **state) {
    (void)state;
#define CASE(literal) {.bytes = (char *)literal, .size = sizeof literal - 1}
    const struct text cases[] = {
        CASE(""),
        CASE("\n"),
        CASE("A"),
        CASE("A\n" SEP "\nB\n"),
        CASE("A\n" SEP "\nB"),
        CASE("A\n" SEP "\n"),
        CASE("A\n" SEP),
        CASE("A" SEP "\n"),
        CASE("A" SEP),
        CASE(SEP),
        CASE(SEP "\n"),
        CASE(SEP "\nA"),
        CASE(SEP "\n" SEP),
        CASE(SEP "\n" SEP "\n"),
        CASE(SEP "\n" SEP "\n" SEP "\nA\n" SEP "\n" SEP),
        CASE("\n" SEP "\n\n"),
        CASE(SEP " \n" SEP "\n"),
        CASE(" " SEP "\n" SEP "\n"),
        CASE(SEP SEP "\n" SEP),
        CASE("A\r\n" SEP "\r\nB\r\n" SEP "\r"),
        CASE(SEP "\r\n" SEP "\n\r\n"),
        CASE("\0\0\n\0" SEP "\n" SEP "\n\0"),
        CASE("\xFF\xFE\x80\n" SEP "\n\xC0\xAF\xED\xA0\x80"),
        CASE("<|endoftext|\n" SEP "\n|endoftext|>\n<|endoftext"),
        CASE("<|endoftext"),
        CASE("A\n<|endoftext|"),
    };
    const size_t count = sizeof cases / sizeof *cases;
    check_contents(cases, count, SEP);
    check_contents(cases, count, "");
    check_contents(cases, count, "A");
    /* Alone, an input is at the start and at the end of everything. */
    for (size_t i = 0; i < 12; i++) check_one(cases[i].bytes, cases[i].size, SEP);
}

/* The expected documents of two of these cases, spelled out: the comparison above is not its own witness. */
static void spelled_out(void **state) {
    (void)state;
    const char *inputs[] = {write_input("a", "one\n" SEP "\n" SEP "\ntwo", 35), write_input("b", SEP, 13)};
    struct tokenize_options o = text_options(in_directory("out"));
    struct text_documents got;
    error err;
    assert_int_equal(text_tokenize(inputs, 2, &o, NULL, &err), 0);
    text_documents_read(&got, o.out);
    assert_int_equal(got.count, 5);
    const uint32_t flags[] = {SHARD_DOC_FIRST_OF_INPUT, SHARD_DOC_SEPARATED, SHARD_DOC_SEPARATED,
                              SHARD_DOC_FIRST_OF_INPUT, SHARD_DOC_UNTERMINATED};
    const char *const texts[] = {"one\n", "", "two", "", ""};
    for (size_t i = 0; i < 5; i++) {
        assert_int_equal(got.list[i].flags, flags[i]);
        assert_int_equal(got.list[i].size, strlen(texts[i]));
        assert_memory_equal(got.all.bytes + got.list[i].start, texts[i], strlen(texts[i]));
    }
    text_documents_free(&got);
}

static void other_separators(void **state) {
    (void)state;
    char longest[256], text[1500];
    memset(longest, '=', 255);
    longest[255] = 0;
    int size = snprintf(text, sizeof text, "a\n%s\nb%s\n%s=\n%s\n%s", longest, longest, longest, longest + 1, longest);
    check_one(text, (size_t)size, longest);
    check_one("a\r\n--\r\n--\n--\r\n", 14, "--\r");
    check_one("x\nxx\nx\nx", 8, "x");
    check_one(" \n  \n \n", 7, " ");
    check_one("\xFF\n\xFF\xFF\n\xFF", 6, "\xFF");
}

/* Pieces that make and break separator lines, in random order. */
static void random_texts(void **state) {
    (void)state;
    const char *const pieces[] = {"\n",     SEP,  SEP "\n", "\n" SEP "\n", "text", "<|endof",
                                  "text|>", "\r", " ",      "\n\n",        "A\n"};
    uint64_t seed = 1;
    struct text texts[100] = {0};
    for (int i = 0; i < 100; i++) {
        for (int n = 0; n < 40; n++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            const char *piece = pieces[(seed >> 33) % 11];
            text_add(&texts[i], piece, strlen(piece));
        }
    }
    check_contents(texts, 100, SEP);
    for (int i = 0; i < 100; i++) text_free(&texts[i]);
}

/* A separator line at each distance from where the splitter's buffer of 256 KiB ends, in the middle of the input and
 * as its last line. Alone, some also meet the ends of blocks, which are as large. */
static void around_buffer_ends(void **state) {
    (void)state;
    enum { BUFFER = 1 << 18, STARTS = 19 };
    static char bytes[2 * STARTS][BUFFER + 64];
    for (int newline = 0; newline < 2; newline++) {
        struct text texts[2 * STARTS];
        for (size_t i = 0; i < STARTS; i++) {
            size_t start = BUFFER - 16 + i;
            char *text = bytes[i];
            memset(text, 'x', start);
            for (size_t n = 100; n < start; n += 101) text[n] = '\n';
            text[start - 1] = newline ? '\n' : 'y';
            memcpy(text + start, SEP "\nrest", 18);
            texts[2 * i] = (struct text){.bytes = text, .size = start + 18};
            texts[2 * i + 1] = (struct text){.bytes = text, .size = start + 13};
        }
        check_contents(texts, 2 * STARTS, SEP);
        for (size_t i = 14; i < STARTS; i++) check_one(texts[2 * i].bytes, texts[2 * i].size, SEP);
    }
}

/* One line of 3 MB, and as many documents: neither fits into a block. */
static void longer_than_any_buffer(void **state) {
    (void)state;
    size_t size = 3000000;
    char *bytes = malloc(size);
    assert_non_null(bytes);
    memset(bytes, 'x', size);
    check_one(bytes, size, SEP);
    for (size_t i = 0; i < size; i++) bytes[i] = i % 2 ? '\n' : '|';
    check_one(bytes, 100000, "|"); /* fifty thousand empty documents */
    free(bytes);
}

/* ---- shards and threads ------------------------------------------------------------------------------------------ */

static struct text sample_text(void) {
    struct text t = {0};
    for (int i = 0; i < 40000; i++) {
        char line[64];
        int size =
            snprintf(line, sizeof line, i % 97 == 5 ? SEP "\n" : "line %d of the text, %d\n", i, i * 7919 % 1000);
        text_add(&t, line, (size_t)size);
    }
    return t;
}

static void shards_of_any_size(void **state) {
    (void)state;
    const uint64_t shard_tokens[] = {2, 7, 64, 65, 1000};
    const uint32_t frame_tokens[] = {1, 2, 64, 65, 5000};
    const char bytes[] = "one\n" SEP "\n" SEP "\ntwo and more of it\n" SEP "\n\n\n" SEP;
    struct text content = {.bytes = (char *)bytes, .size = sizeof bytes - 1};
    const char *inputs[] = {write_input("a", bytes, sizeof bytes - 1), write_input("b", bytes, sizeof bytes - 1)};
    const struct text contents[] = {content, content};
    for (size_t s = 0; s < sizeof shard_tokens / sizeof *shard_tokens; s++) {
        struct tokenize_options o = text_options(in_directory("out"));
        o.shard_tokens = shard_tokens[s];
        o.frame_tokens = frame_tokens[s % 5];
        check(inputs, contents, 2, &o);
    }
    struct text large = sample_text();
    inputs[0] = write_input("a", large.bytes, large.size);
    struct tokenize_options o = text_options(in_directory("out"));
    o.shard_tokens = 99991;
    check(inputs, &large, 1, &o);
    text_free(&large);
}

/* Every shard but the last is full, and they are numbered. */
static void shards_are_full(void **state) {
    (void)state;
    error err;
    struct tokenize_result result;
    struct text large = sample_text();
    const char *input = write_input("a", large.bytes, large.size);
    struct tokenize_options o = text_options(in_directory("out"));
    o.shard_tokens = 100000;
    assert_int_equal(text_tokenize(&input, 1, &o, &result, &err), 0);
    assert_int_equal(result.shards, (result.tokens + 99999) / 100000);
    assert_true(result.shards > 5);
    uint64_t file_bytes = 0;
    for (uint64_t i = 0; i < result.shards; i++) {
        char name[64];
        struct shard_info info;
        snprintf(name, sizeof name, "out/part-%05d.rrs", (int)i);
        assert_int_equal(shard_verify(in_directory(name), &info, &err), 0);
        assert_int_equal(info.tokens, i + 1 < result.shards ? 100000 : result.tokens - 100000 * i);
        assert_string_equal(info.separator, SEP);
        assert_string_equal(info.tokenizer_name, "bytes");
        assert_int_equal(info.token_bytes, 2);
        assert_int_equal(info.vocab, 257);
        assert_int_equal(info.eod, 256);
        file_bytes += info.file_bytes;
    }
    assert_int_equal(file_bytes, result.file_bytes);
    text_free(&large);
}

/* A document table is bounded: after four million documents a shard ends. */
static void shards_end_after_many_documents(void **state) {
    (void)state;
    error err;
    size_t documents = TOKENIZE_SHARD_DOCUMENTS + 1000;
    struct tokenize_result result;
    char *bytes = malloc(2 * documents);
    assert_non_null(bytes);
    for (size_t i = 0; i < documents; i++) memcpy(bytes + 2 * i, "|\n", 2);
    const char *input = write_input("a", bytes, 2 * documents);
    struct tokenize_options o = text_options(in_directory("out"));
    o.separator = "|";
    o.frame_tokens = 8192;
    assert_int_equal(text_tokenize(&input, 1, &o, &result, &err), 0);
    assert_int_equal(result.shards, 2);
    assert_int_equal(result.documents, documents + 1);
    struct shard_info info;
    assert_int_equal(shard_verify(in_directory("out/part-00000.rrs"), &info, &err), 0);
    assert_int_equal(info.documents, TOKENIZE_SHARD_DOCUMENTS);
    struct text text = text_of(o.out);
    assert_int_equal(text.size, 2 * documents);
    assert_memory_equal(text.bytes, bytes, text.size);
    text_free(&text);
    free(bytes);
}

static void assert_same_files(const char *a, const char *b) {
    error err;
    char **names, **others, path[4096];
    size_t count, other_count;
    assert_int_equal(file_list(a, "", &names, &count, &err), 0);
    assert_int_equal(file_list(b, "", &others, &other_count, &err), 0);
    assert_int_equal(count, other_count);
    for (size_t i = 0; i < count; i++) {
        uint64_t hash[2], size;
        assert_string_equal(names[i], others[i]);
        assert_int_equal(file_join(path, sizeof path, a, names[i], &err), 0);
        assert_int_equal(file_hash_of(path, &hash[0], &size, &err), 0);
        assert_int_equal(file_join(path, sizeof path, b, names[i], &err), 0);
        assert_int_equal(file_hash_of(path, &hash[1], &size, &err), 0);
        assert_int_equal(hash[0], hash[1]);
    }
    file_list_free(names, count);
    file_list_free(others, other_count);
}

static void threads_leave_no_trace(void **state) {
    (void)state;
    error err;
    struct text large = sample_text();
    const char *input = write_input("a", large.bytes, large.size);
    const int threads[] = {1, 2, 3, 8};
    for (int i = 0; i < 4; i++) {
        struct tokenize_options o = text_options(in_directory(i ? "out" : "first"));
        o.threads = threads[i];
        o.shard_tokens = 300001;
        assert_int_equal(text_tokenize(&input, 1, &o, NULL, &err), 0);
        if (i == 0) continue;
        assert_same_files(in_directory("first"), in_directory("out"));
        remove_output();
    }
    text_free(&large);
}

/* ---- kinds of input ---------------------------------------------------------------------------------------------- */

static struct text text_from(const char *string) {
    struct text t = {0};
    text_add(&t, string, strlen(string));
    return t;
}

static struct text zstd_of(const struct text *t, bool checksum) {
    struct text out = {.bytes = malloc(ZSTD_compressBound(t->size))};
    assert_non_null(out.bytes);
    ZSTD_CCtx *c = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, checksum);
    out.size = ZSTD_compress2(c, out.bytes, ZSTD_compressBound(t->size), t->bytes, t->size);
    assert_false(ZSTD_isError(out.size));
    ZSTD_freeCCtx(c);
    return out;
}

static struct text gzip_of(const struct text *t) {
    z_stream z = {0};
    assert_int_equal(deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    size_t bound = deflateBound(&z, t->size);
    struct text out = {.bytes = malloc(bound)};
    assert_non_null(out.bytes);
    z.next_in = (unsigned char *)t->bytes;
    z.avail_in = (unsigned)t->size;
    z.next_out = (unsigned char *)out.bytes;
    z.avail_out = (unsigned)bound;
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    out.size = z.total_out;
    deflateEnd(&z);
    return out;
}

/* Compressed inputs are told by their content: the names say nothing. Twice in one file is twice the text. */
static void compressed_inputs(void **state) {
    (void)state;
    const struct text texts[] = {sample_text(), text_from(""), text_from("A\n" SEP "\n")};
    for (size_t i = 0; i < 3; i++) {
        struct text packed[] = {zstd_of(&texts[i], true), gzip_of(&texts[i]), zstd_of(&texts[i], false)};
        const struct text contents[] = {texts[i], texts[i], texts[i]};
        const char *inputs[3];
        for (size_t k = 0; k < 3; k++) {
            inputs[k] = write_input(k == 0 ? "a.gz" : k == 1 ? "b.txt" : "c", packed[k].bytes, packed[k].size);
        }
        struct tokenize_options o = text_options(in_directory("out"));
        check(inputs, contents, 3, &o);
        for (size_t k = 0; k < 3; k++) {
            struct text twice = {0}, unpacked = {0};
            text_add(&twice, packed[k].bytes, packed[k].size);
            text_add(&twice, packed[k].bytes, packed[k].size);
            text_add(&unpacked, texts[i].bytes, texts[i].size);
            text_add(&unpacked, texts[i].bytes, texts[i].size);
            inputs[0] = write_input("twice", twice.bytes, twice.size);
            check(inputs, &unpacked, 1, &o);
            text_free(&twice);
            text_free(&unpacked);
            text_free(&packed[k]);
        }
    }
    for (size_t i = 0; i < 3; i++) free(texts[i].bytes);
}

/* gzip members that end where the reader's buffer does, so that the next one's first bytes arrive apart. */
static void gzip_members_around_buffer_ends(void **state) {
    (void)state;
    struct text noise = {0};
    uint64_t seed = 7;
    for (int i = 0; i < (1 << 18) - 60; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        char byte = (char)(seed >> 40);
        text_add(&noise, &byte, 1);
    }
    struct text tail = text_from("tail\n");
    struct text packed_tail = gzip_of(&tail);
    size_t checked = 0;
    for (size_t cut = 0; cut < 200; cut++) {
        struct text head = {.bytes = noise.bytes, .size = noise.size - cut}, packed = gzip_of(&head), whole = {0};
        if (packed.size + 4 < 1 << 18 || packed.size > (1 << 18) + 4) {
            text_free(&packed);
            continue;
        }
        text_add(&packed, packed_tail.bytes, packed_tail.size);
        text_add(&whole, head.bytes, head.size);
        text_add(&whole, tail.bytes, tail.size);
        const char *input = write_input("in", packed.bytes, packed.size);
        struct tokenize_options o = text_options(in_directory("out"));
        check(&input, &whole, 1, &o);
        text_free(&packed);
        text_free(&whole);
        checked++;
    }
    assert_int_equal(checked, 9); /* else zlib has changed, and the noise above must be of another length */
    text_free(&packed_tail);
    text_free(&tail);
    text_free(&noise);
}

static void directories(void **state) {
    (void)state;
    error err;
    const char *const made[] = {"d", "d/a", "d/a/deep", "d/b", "d/empty"};
    for (size_t i = 0; i < 5; i++) assert_int_equal(mkdir(in_directory(made[i]), 0700), 0);
    /* In bytewise order of the whole path: '-' and '.' come before '/', capitals before small letters. */
    const char *const files[] = {"d/.hidden", "d/B", "d/a-b", "d/a.txt", "d/a/deep/x", "d/a/z", "d/b/y", "d/\xC3\xA9"};
    for (size_t i = 0; i < 8; i++) write_input(files[i], files[i], strlen(files[i]));
    assert_int_equal(symlink("../outside", in_directory("d/link")), 0); /* to a file: read */
    write_input("outside", "outside", 7);
    assert_int_equal(symlink("..", in_directory("d/a/loop")), 0); /* to a directory: not followed */
    assert_int_equal(symlink("nowhere", in_directory("d/dangling")), 0);
    assert_int_equal(mkfifo(in_directory("d/pipe"), 0600), 0);
    const char *inputs[] = {in_directory("outside"), in_directory("d"), in_directory("d/b")};
    const char *const order[] = {"outside", "d/.hidden", "d/B",     "d/a-b",      "d/a.txt", "d/a/deep/x",
                                 "d/a/z",   "d/b/y",     "outside", "d/\xC3\xA9", "d/b/y"};
    struct tokenize_options o = text_options(in_directory("out"));
    struct text_documents got, expected = {0};
    for (size_t i = 0; i < 11; i++) text_documents_split(&expected, order[i], strlen(order[i]), SEP);
    if (text_tokenize(inputs, 3, &o, NULL, &err) != 0) fail_msg("%s", err.text);
    text_documents_read(&got, o.out);
    text_documents_equal(&got, &expected);
    text_documents_free(&got);
    text_documents_free(&expected);
}

/* A pipe whose writer writes bytes one by one, and one whose writer comes late. */
struct feeding {
    const char *path;
    const struct text *text;
    size_t step;
};

static void *feed(void *argument) {
    const struct feeding *f = argument;
    usleep(50000);
    int descriptor = open(f->path, O_WRONLY | O_CLOEXEC);
    for (size_t at = 0; descriptor >= 0 && at < f->text->size;) {
        size_t rest = f->text->size - at;
        ssize_t size = write(descriptor, f->text->bytes + at, rest < f->step ? rest : f->step);
        if (size <= 0) break;
        at += (size_t)size;
    }
    close(descriptor);
    return NULL;
}

static void pipes(void **state) {
    (void)state;
    struct text large = sample_text();
    struct text small = text_from("A\n" SEP "\n" SEP), packed = gzip_of(&small);
    const struct {
        const struct text *sent, *text;
        size_t step;
    } cases[] = {{&small, &small, 1}, {&packed, &small, 1}, {&large, &large, 4097}};
    for (size_t i = 0; i < 3; i++) {
        pthread_t thread;
        const char *pipe = in_directory("pipe");
        assert_int_equal(mkfifo(pipe, 0600), 0);
        struct feeding f = {pipe, cases[i].sent, cases[i].step};
        assert_int_equal(pthread_create(&thread, NULL, feed, &f), 0);
        struct tokenize_options o = text_options(in_directory("out"));
        check(&pipe, cases[i].text, 1, &o);
        pthread_join(thread, NULL);
        unlink(pipe);
    }
    text_free(&large);
    text_free(&small);
    text_free(&packed);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, enter, leave)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(separators_in_every_position),
        TEST(spelled_out),
        TEST(other_separators),
        TEST(random_texts),
        TEST(around_buffer_ends),
        TEST(longer_than_any_buffer),
        TEST(shards_of_any_size),
        TEST(shards_are_full),
        TEST(shards_end_after_many_documents),
        TEST(threads_leave_no_trace),
        TEST(compressed_inputs),
        TEST(gzip_members_around_buffer_ends),
        TEST(directories),
        TEST(pipes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
