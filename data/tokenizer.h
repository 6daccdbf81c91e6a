/* tokenizer.h: text to token ids and back.
 *
 * The built-in tokenizer "bytes": id b is the byte b (0..255), id 256 is the end of a document, written `<|endoftext|>`
 * in tokenizer.json. Any byte string is encoded losslessly. Other tokenizers are read from a tokenizer.json.
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

/* `spec`: "bytes", or the path of a tokenizer.json, or of a directory that holds one. The byte tokenizer's own
 * tokenizer.json is recognised and opens as "bytes"; any other kind is refused by name in this version. */
int tokenizer_open(tokenizer **t, const char *spec, error *err);
void tokenizer_close(tokenizer *t);

const char *tokenizer_name(const tokenizer *t);  /* "bytes" */
uint64_t tokenizer_identity(const tokenizer *t); /* XXH64 of tokenizer_json */
int64_t tokenizer_vocab(const tokenizer *t);     /* number of ids, before a model pads its rows */
int32_t tokenizer_eod(const tokenizer *t);       /* id that ends a document */

/* The bytes of tokenizer.json: what Hugging Face's AutoTokenizer opens, giving equal ids. Owned by the tokenizer. */
const char *tokenizer_json(const tokenizer *t, size_t *size);
/* The bytes of tokenizer_config.json that goes with it. */
const char *tokenizer_config_json(const tokenizer *t, size_t *size);

/* Encode one document's text (no end-of-document token is added). ids has room for `max`; returns the number of ids,
 * at most size for any tokenizer. */
size_t tokenizer_encode(const tokenizer *t, const char *text, size_t size, int32_t *ids, size_t max);

/* The bytes that `id` stands for; the end-of-document id and ids outside the vocabulary stand for none (*size = 0). */
const char *tokenizer_decode(const tokenizer *t, int32_t id, size_t *size);

#endif
