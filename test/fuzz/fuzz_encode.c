/* fuzz_encode.c: any bytes as a text for byte-level BPE, by tokenizers that are opened once: without normalization it
 * comes back to the byte; the ids of its parts are those of the whole wherever a tokenizer says that it may be cut;
 * what an encoder has met before makes no difference. */
#include "data/tokenizer.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition) {
    if (!condition) abort();
}

struct opened {
    tokenizer *tokenizer;
    encoder *encoder;
};

/* The fuzzer calls one function again and again, so what is opened once must be kept here. */
static struct opened opened[3];

static void open_all(void) {
    static const char *const names[] = {"test/tokenizer/gpt2.json", "test/tokenizer/neox.json",
                                        "test/tokenizer/flags.json"};
    error err;
    for (int i = 0; i < 3; i++) {
        require(tokenizer_open(&opened[i].tokenizer, names[i], &err) == 0);
        require(encoder_open(&opened[i].encoder, opened[i].tokenizer, &err) == 0);
    }
}

static void expect_parts(const struct opened *o, const char *text, size_t size, const struct token_list *whole) {
    error err;
    for (size_t cut = size; (cut = tokenizer_last_cut(o->tokenizer, text, 0, cut)) > 0;) {
        struct token_list parts = {0};
        require(encoder_append(o->encoder, text, cut, &parts, &err) == 0);
        require(encoder_append(o->encoder, text + cut, size - cut, &parts, &err) == 0);
        require(parts.count == whole->count && memcmp(parts.ids, whole->ids, parts.count * sizeof *parts.ids) == 0);
        free(parts.ids);
        if (size > 500) break; /* one place is enough of a long text */
    }
}

static void expect_text(const tokenizer *t, const struct token_list *list, const char *text, size_t size) {
    size_t at = 0;
    for (size_t i = 0; i < list->count; i++) {
        size_t length;
        const char *bytes = tokenizer_decode(t, list->ids[i], &length);
        if (list->ids[i] == tokenizer_eod(t)) bytes = tokenizer_eod_text(t, &length);
        require(at + length <= size && memcmp(bytes, text + at, length) == 0);
        at += length;
    }
    require(at == size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *text = (const char *)data;
    if (!opened[0].tokenizer) open_all();
    for (int i = 0; i < 3; i++) {
        error err;
        struct token_list list = {0};
        require(encoder_append(opened[i].encoder, text, size, &list, &err) == 0);
        for (size_t k = 0; k < list.count; k++) {
            require(list.ids[k] >= 0 && list.ids[k] < tokenizer_vocab(opened[i].tokenizer));
        }
        if (i == 0) expect_text(opened[i].tokenizer, &list, text, size);
        expect_parts(&opened[i], text, size, &list);
        free(list.ids);
    }
    return 0;
}
