/* tokenizer.h: text to token ids and back.
 *
 * The built-in tokenizer "bytes": id b is the byte b (0..255), id 256 is the end of a document, written `<|endoftext|>`
 * in tokenizer.json. Other tokenizers are byte-level BPE, read from a tokenizer.json or from GPT-2's two files, and
 * give the ids that Hugging Face's library gives (docs/tokenizers.md says what is read, and what else is promised).
 *
 * Identity: XXH64 (seed 0) of the exact bytes of tokenizer.json. Shards and checkpoints carry name and identity, so a
 * model is never fed or evaluated with another tokenizer's ids unnoticed.
 */
#ifndef RIVERRUN_TOKENIZER_H
#define RIVERRUN_TOKENIZER_H

#include "common/error.h"
#include <stdint.h>

#define TOKENIZER_BYTES "bytes"
#define BYTES_VOCAB 257
#define BYTES_EOD 256

typedef struct tokenizer tokenizer;

/* `spec`: "bytes"; or the path of a tokenizer.json; or of one of GPT-2's files, named ...encoder.json, ...vocab.bpe,
 * ...vocab.json or ...merges.txt, with the other beside it; or of a directory that holds one of these. The byte
 * tokenizer's own tokenizer.json is recognised and opens as "bytes". What would encode in a way that riverrun does not
 * know is refused by name. */
int tokenizer_open(tokenizer **t, const char *spec, error *err);

/* The same from the bytes of a tokenizer.json, which `name` stands for in messages. */
int tokenizer_open_json(tokenizer **t, const char *text, size_t size, const char *name, error *err);
void tokenizer_close(tokenizer *t);

const char *tokenizer_name(const tokenizer *t);  /* "bytes", or "bpe-50257" after the number of ids */
uint64_t tokenizer_identity(const tokenizer *t); /* XXH64 of tokenizer_json */
int64_t tokenizer_vocab(const tokenizer *t);     /* number of ids, before a model pads its rows */
int32_t tokenizer_eod(const tokenizer *t);       /* id that ends a document */

/* The bytes of tokenizer.json: what Hugging Face's AutoTokenizer opens, giving equal ids. Owned by the tokenizer. */
const char *tokenizer_json(const tokenizer *t, size_t *size);
/* The bytes of tokenizer_config.json that goes with it. */
const char *tokenizer_config_json(const tokenizer *t, size_t *size);

/* The bytes that `id` stands for; the end-of-document id and ids outside the vocabulary stand for none (*size = 0).
 * `tokenizer_text_bytes`: the number of all bytes that these ids stand for. */
const char *tokenizer_decode(const tokenizer *t, int32_t id, size_t *size);
uint64_t tokenizer_text_bytes(const tokenizer *t, const int32_t *ids, size_t count);

/* How the end of a document is written in tokenizer.json: `<|endoftext|>`. */
const char *tokenizer_eod_text(const tokenizer *t, size_t *size);

/* The last place p in from < p <= size where text[0..size), the beginning of a document that goes on, may be cut such
 * that the ids of both parts are those of the whole, whatever follows; 0 if there is none. */
size_t tokenizer_last_cut(const tokenizer *t, const char *text, size_t from, size_t size);

/* ---- encoding ---------------------------------------------------------------------------------------------------- */

/* Ids that grow in number; `ids` is freed by whoever owns the list. All zero is an empty one. */
struct token_list {
    int32_t *ids;
    size_t count, capacity;
};

/* What one thread needs to encode: buffers, and the words met lately. The tokenizer outlives it. */
typedef struct encoder encoder;
int encoder_open(encoder **e, const tokenizer *t, error *err);
void encoder_close(encoder *e); /* NULL is fine */

/* Append the ids of one document's text (no end-of-document token is added). The tokenizer may normalize, so there can
 * be more ids than bytes. What an encoder encoded before makes no difference. */
int encoder_append(encoder *e, const char *text, size_t size, struct token_list *list, error *err);

/* Append one id. */
int token_list_add(struct token_list *list, int32_t id, error *err);

#endif
