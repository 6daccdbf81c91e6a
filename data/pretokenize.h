/* pretokenize.h: text to words, as GPT-2's regular expression cuts it. */
#ifndef RIVERRUN_PRETOKENIZE_H
#define RIVERRUN_PRETOKENIZE_H

#include "data/unicode.h"

/* What the words are matches of; \s, \p{L} and \p{N} in the sense of Unicode. */
#define PRETOKENIZE_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* Bytes of the first word of text[0..size), size >= 1. What comes after the word does not depend on what came before
 * it, so a text is cut by calling this again and again. */
size_t pretokenize_word(const struct unicode *u, const char *text, size_t size);

/* The last place in (from, size) where text may be cut so that both parts by themselves give the words and the NFC of
 * the whole; 0 if there is none: a blank of ASCII behind a character that is no space. No word holds both, since blanks
 * only begin words or follow blanks. The words before end in a character that is no space, and the only alternative
 * that looks ahead, \s+(?!\S), asks about what follows a run of spaces. A blank of ASCII composes with nothing before
 * it. */
size_t pretokenize_last_cut(const struct unicode *u, const char *text, size_t from, size_t size);

#endif
