/* fuzz_tokenizer.c: any bytes as a tokenizer.json: refused with a sentence, or a tokenizer whose ids lie in its
 * vocabulary, whose cuts change nothing, and whose file opens again with the same identity; never a crash. */
#include "data/tokenizer.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition) {
    if (!condition) abort();
}

static void encode(const tokenizer *t, const char *text, size_t size) {
    error err;
    encoder *e;
    struct token_list whole = {0}, parts = {0};
    require(encoder_open(&e, t, &err) == 0);
    require(encoder_append(e, text, size, &whole, &err) == 0);
    for (size_t i = 0; i < whole.count; i++) {
        size_t length;
        require(whole.ids[i] >= 0 && whole.ids[i] < tokenizer_vocab(t) && tokenizer_decode(t, whole.ids[i], &length));
    }
    size_t cut = tokenizer_last_cut(t, text, 0, size);
    require(encoder_append(e, text, cut, &parts, &err) == 0);
    require(encoder_append(e, text + cut, size - cut, &parts, &err) == 0);
    require(parts.count == whole.count && memcmp(parts.ids, whole.ids, whole.count * sizeof *whole.ids) == 0);
    free(parts.ids);
    free(whole.ids);
    encoder_close(e);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char text[] =
        "It's the  river [L]  x <|endoftext|>[R]   9.5 e\xCC\x81\xFF caf\xC3\xA9\n\n wordy\xE3\x80\x80 aaaa";
    error err = {0};
    tokenizer *t, *again;
    if (tokenizer_open_json(&t, (const char *)data, size, "fuzz", &err) != 0) {
        require(!t && err.kind == ERROR_INPUT && err.text[0]);
        return 0;
    }
    size_t json_size, config_size;
    const char *json = tokenizer_json(t, &json_size);
    require(tokenizer_config_json(t, &config_size) && config_size > 0);
    require(tokenizer_eod(t) >= 0 && tokenizer_eod(t) < tokenizer_vocab(t));
    require(tokenizer_open_json(&again, json, json_size, "fuzz", &err) == 0);
    require(tokenizer_identity(t) == tokenizer_identity(again) && tokenizer_vocab(t) == tokenizer_vocab(again));
    encode(t, text, sizeof text - 1);
    encode(again, (const char *)data, size < 2000 ? size : 2000);
    tokenizer_close(again);
    tokenizer_close(t);
    return 0;
}
