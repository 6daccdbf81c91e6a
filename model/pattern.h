/* pattern.h: the order of a model's blocks, written as a pattern over block names: `m*24`, `(m*7 a)*4`.
 *
 *   pattern := item { item }      item := ( NAME | "(" pattern ")" ) [ "*" COUNT ]
 *
 * A name is letters, digits, "_" and "-" and starts with a letter or "_"; a count is 1 or more. Spaces separate names
 * and may stand anywhere else between these. At most LIMIT_LAYERS blocks and LIMIT_BLOCK_KINDS different names.
 */
#ifndef RIVERRUN_PATTERN_H
#define RIVERRUN_PATTERN_H

#include "common/error.h"
#include "common/limits.h"

#define PATTERN_NAME 64 /* bytes in a block's name, with the final 0 */

struct pattern {
    char names[LIMIT_BLOCK_KINDS][PATTERN_NAME]; /* the different names, in order of first appearance */
    int name_count;
    int blocks[LIMIT_LAYERS]; /* each an index into names */
    int block_count;
};

/* Refused with the position (characters, from 1) and what is expected there. */
int pattern_parse(struct pattern *p, const char *text, error *err);

#endif
