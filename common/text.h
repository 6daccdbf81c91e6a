/* text.h: small text helpers for messages: nearest name, sizes and times for people. */
#ifndef RIVERRUN_TEXT_H
#define RIVERRUN_TEXT_H

#include <stddef.h>
#include <stdint.h>

/* The candidate with the smallest edit distance to `word`, or NULL if none is near enough to be a likely slip
 * (distance at most a third of the word's length, at least 1). candidates is NULL-terminated. */
const char *text_nearest(const char *word, const char *const *candidates);

/* Edit distance with a neighbouring swap counted as one; words above 64 bytes are cut. */
int text_distance(const char *a, const char *b);

/* "1.50 GiB", "12.3 k", "1h 02m" into the caller's buffer (24 bytes are enough); returns it. What is not a finite
 * number is written "?". */
char *text_bytes(char *out, size_t size, double bytes);
char *text_count(char *out, size_t size, double count);
char *text_duration(char *out, size_t size, double seconds);

/* The shortest decimal form of a finite number that strtod reads back to the very same double, and the number of
 * significant digits it needs (at most 17). */
char *text_real(char *out, size_t size, double value);
int text_real_digits(double value);

/* Monotonic seconds. */
double clock_seconds(void);
/* Since this process was started, to a hundredth of a second; NAN where the system does not say. */
double program_seconds(void);

#endif
