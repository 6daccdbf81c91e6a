/* conversion.h: what import and export have in common: a model directory to read, and one that is written complete or
 * not at all.
 */
#ifndef RIVERRUN_CONVERSION_H
#define RIVERRUN_CONVERSION_H

#include "train/checkpoint_internal.h"

struct conversion {
    struct checkpoint *from;
    tokenizer *tokenizer; /* NULL where there is none that riverrun reads */
    char why[1024];       /* then: the reason, a sentence */
    struct model_config *model;
    struct checkpoint_reader reader;
    struct model_directory directory; /* under a temporary name */
    const char *out;
};

/* Open `from`, bind its model, check that its weights are complete. `tokenizer_spec` "" takes the directory's own
 * tokenizer. `out` must not exist. On failure too, conversion_close is to be called. */
int conversion_open(struct conversion *v, const char *from, const char *tokenizer_spec, const char *out, error *err);

/* config.json, weights and tokenizer files to a temporary directory beside `out`. */
int conversion_write(struct conversion *v, enum weight_form form, error *err);

/* Verify, and give the directory its name. */
int conversion_finish(struct conversion *v, error *err);

void conversion_close(struct conversion *v); /* removes what conversion_finish has not published */

#endif
