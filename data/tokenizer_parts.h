/* tokenizer_parts.h: what the files that make up the tokenizers share. Not for others: data/tokenizer.h is. */
#ifndef RIVERRUN_TOKENIZER_PARTS_H
#define RIVERRUN_TOKENIZER_PARTS_H

#include "common/json.h"
#include "data/added_tokens.h"
#include "data/bpe.h"
#include "data/pretokenize.h"
#include "data/tokenizer.h"

#define TOKENIZER_EOD_TEXT "<|endoftext|>"

/* Whole words that are tokens, for a vocabulary in which these come before merging; places < 0 are empty. */
struct whole_words {
    int32_t *ids;
    size_t mask; /* places - 1 */
};

/* What encoding takes besides bytes. */
struct bpe_tokenizer {
    struct bpe bpe;
    bool split; /* into words; otherwise each text is one */
    bool nfc;
    bool normalizes;          /* there is something that unicode_normalize has to look at */
    bool interesting[256];    /* at these bytes */
    bool replaced[256];       /* bytes without a token: U+FFFD stands for them */
    bool cuttable;            /* documents may be cut where pretokenize_last_cut says */
    struct whole_words words; /* ids is NULL: merging makes all words */
    struct added_tokens raw, normalized;
    struct unicode *unicode;
};

struct tokenizer {
    char name[64];
    char *json, *config;
    size_t json_size, config_size;
    uint64_t identity;
    int64_t vocab;
    int32_t eod;
    const char *eod_text;
    struct bpe_tokenizer *bpe; /* NULL: an id is a byte */
    char *text;                /* of all ids, one after the other */
    uint32_t *starts;          /* vocab + 1: where each id's text begins */
};

/* The character that stands for a byte in vocabularies: itself where it is printable and no space, else the next one
 * from U+0100 on; and its UTF-8, at most two bytes, whose number is returned. */
void byte_characters(unsigned characters[256]);
size_t byte_character_utf8(char *out, unsigned character);

/* A member that is absent counts as null, as it does for the Hugging Face library. */
bool tokenizer_has_null(const json_t *object, const char *key);
bool tokenizer_has_string(const json_t *object, const char *key, const char *value);

/* tokenizer_bytes.c: the byte tokenizer, into a tokenizer that is all zero; and whether a tokenizer.json is its. */
int tokenizer_make_bytes(tokenizer *t, error *err);
bool tokenizer_is_bytes(const json_t *root);

/* tokenizer_read.c: a byte-level BPE tokenizer from the parsed tokenizer.json; `name` stands for it in messages. */
int tokenizer_read_bpe(tokenizer *t, const json_t *root, const char *name, error *err);

/* tokenizer_gpt2.c: the text of a tokenizer.json from encoder.json (vocab.json) and vocab.bpe (merges.txt). Both take
 * the path of either file: whether that is what its name says, and the text, which the caller frees. */
bool tokenizer_is_gpt2_path(const char *path);
int tokenizer_read_gpt2(const char *path, char **text, size_t *size, error *err);

/* tokenizer.c: make room for `vocab` texts of `bytes` in all; the texts are then given in the order of the ids. */
int tokenizer_reserve_text(tokenizer *t, int64_t vocab, size_t bytes, error *err);
void tokenizer_set_text(tokenizer *t, int32_t id, const char *bytes, size_t size);

#endif
