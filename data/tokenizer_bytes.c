/* tokenizer_bytes.c: the byte tokenizer, its tokenizer.json, and recognising that file again.
 *
 * In tokenizer.json the byte tokenizer is a byte-level BPE model without merges: the ByteLevel pre-tokenizer turns each
 * byte into one printable character (the table that GPT-2 introduced), the vocabulary gives that character the byte's
 * value as its id, and nothing is ever merged. `<|endoftext|>` is a special token with id 256. The text is laid out as
 * the Hugging Face library lays it out, so that loading and saving there gives back the same bytes and hence the same
 * identity.
 *
 * One difference is wanted: where a text holds the characters `<|endoftext|>`, Hugging Face's encoder makes them id
 * 256; riverrun's byte tokenizer encodes bytes, so they are 13 like any others, and only a document's end is id 256.
 *
 * Called by tokenizer.c.
 */
#include "data/tokenizer_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { JSON_CAPACITY = 8192 }; /* the byte tokenizer's tokenizer.json has about 5,000 bytes */

/* ---- the characters of bytes ------------------------------------------------------------------------------------- */

void byte_characters(unsigned characters[256]) {
    unsigned next = 256;
    for (unsigned b = 0; b < 256; b++) {
        bool shown = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        characters[b] = shown ? b : next++;
    }
}

size_t byte_character_utf8(char *out, unsigned c) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

/* ---- tokenizer.json ---------------------------------------------------------------------------------------------- */

static const char json_head[] = "{\n"
                                "  \"version\": \"1.0\",\n"
                                "  \"truncation\": null,\n"
                                "  \"padding\": null,\n"
                                "  \"added_tokens\": [\n"
                                "    {\n"
                                "      \"id\": 256,\n"
                                "      \"content\": \"" TOKENIZER_EOD_TEXT "\",\n"
                                "      \"single_word\": false,\n"
                                "      \"lstrip\": false,\n"
                                "      \"rstrip\": false,\n"
                                "      \"normalized\": false,\n"
                                "      \"special\": true\n"
                                "    }\n"
                                "  ],\n"
                                "  \"normalizer\": null,\n"
                                "  \"pre_tokenizer\": {\n"
                                "    \"type\": \"ByteLevel\",\n"
                                "    \"add_prefix_space\": false,\n"
                                "    \"trim_offsets\": false,\n"
                                "    \"use_regex\": false\n"
                                "  },\n"
                                "  \"post_processor\": null,\n"
                                "  \"decoder\": {\n"
                                "    \"type\": \"ByteLevel\",\n"
                                "    \"add_prefix_space\": true,\n"
                                "    \"trim_offsets\": true,\n"
                                "    \"use_regex\": true\n"
                                "  },\n"
                                "  \"model\": {\n"
                                "    \"type\": \"BPE\",\n"
                                "    \"dropout\": null,\n"
                                "    \"unk_token\": null,\n"
                                "    \"continuing_subword_prefix\": null,\n"
                                "    \"end_of_word_suffix\": null,\n"
                                "    \"fuse_unk\": false,\n"
                                "    \"byte_fallback\": false,\n"
                                "    \"ignore_merges\": false,\n"
                                "    \"vocab\": {\n";

static const char json_tail[] = "      \"" TOKENIZER_EOD_TEXT "\": 256\n"
                                "    },\n"
                                "    \"merges\": []\n"
                                "  }\n"
                                "}";

int tokenizer_make_bytes(tokenizer *t, error *err) {
    unsigned characters[256];
    byte_characters(characters);
    t->json = malloc(JSON_CAPACITY);
    if (!t->json) return error_system(err, "no memory for the byte tokenizer");
    TRY(tokenizer_reserve_text(t, BYTES_VOCAB, 256, err));
    char *out = stpcpy(t->json, json_head);
    for (unsigned b = 0; b < 256; b++) {
        char text[8] = {0}, byte = (char)b;
        size_t length = 0;
        if (b == '"' || b == '\\') text[length++] = '\\';
        byte_character_utf8(text + length, characters[b]);
        out += sprintf(out, "      \"%s\": %u,\n", text, b);
        tokenizer_set_text(t, (int32_t)b, &byte, 1);
    }
    tokenizer_set_text(t, BYTES_EOD, "", 0);
    out = stpcpy(out, json_tail);
    t->json_size = (size_t)(out - t->json);
    ASSERT(t->json_size < JSON_CAPACITY);
    t->eod = BYTES_EOD;
    t->eod_text = TOKENIZER_EOD_TEXT;
    strcpy(t->name, TOKENIZER_BYTES);
    return 0;
}

/* ---- recognising ------------------------------------------------------------------------------------------------- */

static bool is_byte_vocabulary(const json_t *vocab) {
    unsigned characters[256];
    byte_characters(characters);
    for (unsigned b = 0; b < 256; b++) {
        char text[4] = {0};
        byte_character_utf8(text, characters[b]);
        const json_t *id = json_object_get(vocab, text);
        if (!json_is_integer(id) || json_integer_value(id) != b) return false;
    }
    /* The end-of-document token may also be listed only among the added ones. */
    const json_t *eod = json_object_get(vocab, TOKENIZER_EOD_TEXT);
    if (!eod) return json_object_size(vocab) == 256;
    return json_object_size(vocab) == 257 && json_is_integer(eod) && json_integer_value(eod) == BYTES_EOD;
}

/* Whatever its spelling, does it encode every text as riverrun's byte tokenizer does? */
bool tokenizer_is_bytes(const json_t *root) {
    const json_t *model = json_object_get(root, "model"), *before = json_object_get(root, "pre_tokenizer");
    const json_t *added = json_object_get(root, "added_tokens"), *eod = json_array_get(added, 0);
    return tokenizer_has_string(model, "type", "BPE") && json_is_array(json_object_get(model, "merges")) &&
           json_array_size(json_object_get(model, "merges")) == 0 &&
           is_byte_vocabulary(json_object_get(model, "vocab")) &&
           tokenizer_has_null(model, "continuing_subword_prefix") && tokenizer_has_null(model, "end_of_word_suffix") &&
           tokenizer_has_null(root, "normalizer") && tokenizer_has_null(root, "post_processor") &&
           tokenizer_has_string(before, "type", "ByteLevel") &&
           json_is_false(json_object_get(before, "add_prefix_space")) &&
           json_is_false(json_object_get(before, "use_regex")) &&
           tokenizer_has_string(json_object_get(root, "decoder"), "type", "ByteLevel") && json_array_size(added) == 1 &&
           tokenizer_has_string(eod, "content", TOKENIZER_EOD_TEXT) &&
           json_integer_value(json_object_get(eod, "id")) == BYTES_EOD;
}
