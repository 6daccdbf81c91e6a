/* support_options.h: the options of a run from a config's text. */
#ifndef RIVERRUN_SUPPORT_OPTIONS_H
#define RIVERRUN_SUPPORT_OPTIONS_H

#include "train/options.h"

/* run_options_bind of the text, which must parse. */
int options_bind(const char *text, struct run_options *o, error *err);
/* It refuses the text with a sentence that holds the words. */
void options_refused(const char *text, const char *words);

#endif
