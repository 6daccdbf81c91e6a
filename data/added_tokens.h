/* added_tokens.h: the tokens of a tokenizer.json that are looked for in the text itself, before it is cut into words.
 *
 * The leftmost match counts, of those that begin there the longest, and the search goes on behind it. There are two
 * sets: tokens looked for in the text as it is, and those that are `normalized`, in what normalizing made of the rest.
 */
#ifndef RIVERRUN_ADDED_TOKENS_H
#define RIVERRUN_ADDED_TOKENS_H

#include "data/unicode.h"

struct added_token {
    char *content; /* owned by the set */
    size_t size;   /* >= 1 */
    int32_t id;
    bool single_word;    /* not where a letter, digit or mark touches it */
    bool lstrip, rstrip; /* the spaces before, or after it belong to it */
};

struct added_tokens {
    struct added_token *tokens; /* in bytewise order of content once the set is sealed */
    size_t count, capacity;
    bool begins[256];    /* with these bytes tokens begin */
    uint8_t pairs[8192]; /* a bit for each two bytes with which tokens begin, or could with one byte and the next */
};

/* Copies the content. */
int added_tokens_add(struct added_tokens *a, const struct added_token *token, error *err);

/* To be called once, when all are there; false if two have the same content. */
bool added_tokens_seal(struct added_tokens *a);
void added_tokens_free(struct added_tokens *a);

/* A search through one text. All zero at first. */
struct added_search {
    size_t at;   /* where to look next */
    size_t done; /* the text before this was handed out, as text or as part of a token */
};

struct added_match {
    size_t text, text_size; /* text before the token that is to be encoded, which may be empty */
    const struct added_token *token;
};

/* The next token and the text before it; false when there is none: then text from s->done on is what is left. */
bool added_tokens_next(const struct added_tokens *a, const struct unicode *u, const char *text, size_t size,
                       struct added_search *s, struct added_match *match);

/* May texts be cut at any place that pretokenize_last_cut names, without cutting through a token or what it reaches? */
bool added_tokens_can_be_cut(const struct added_tokens *a, const struct unicode *u);

#endif
