/* support_published.h: the configs of models, most of them published, and what they hold: by the papers or the
 * checkpoints where these say it. */
#ifndef RIVERRUN_SUPPORT_PUBLISHED_H
#define RIVERRUN_SUPPORT_PUBLISHED_H

#include <stdint.h>

struct published {
    const char *path;
    int64_t params, rows, d_model;
    int blocks, matrices; /* matrices: embedding and head, 1 where they are one */
    int64_t seq;
};
extern const struct published published_models[]; /* ends with path NULL */

#endif
