/* input_list.h: from the inputs that a user names to the files that are read. */
#ifndef RIVERRUN_INPUT_LIST_H
#define RIVERRUN_INPUT_LIST_H

#include "common/error.h"
#include <stddef.h>

#define INPUT_STANDARD "-" /* standard input */

struct input_list {
    char **paths; /* malloc'ed, as is each; INPUT_STANDARD stands for itself */
    size_t count;
};

/* Inputs in the order given; a directory becomes all regular files below it, in bytewise order of their paths. Below a
 * directory, links to files are followed and links to directories are not, so there are no loops; what is neither file
 * nor directory is passed over. Everything is checked to exist and to be readable; standard input may be named once; a
 * directory without any file is refused. */
int input_list_make(struct input_list *list, const char *const *inputs, size_t count, error *err);
void input_list_free(struct input_list *list);

#endif
