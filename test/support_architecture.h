/* support_architecture.h: models there and back through config.json (model/architecture.h). Used by the tests of it. */
#ifndef RIVERRUN_SUPPORT_ARCHITECTURE_H
#define RIVERRUN_SUPPORT_ARCHITECTURE_H

#include "model/architecture.h"

/* A config and the model that it describes. */
struct bound {
    config *c;
    struct model_config *mc;
};
/* Of a config's text, with an override or NULL; of a config.json. */
struct bound bound_text(const char *text, const char *override);
struct bound bound_json(const json_t *object);
/* The same of a small config.json with one member changed; a value of NULL takes it away, a key of NULL leaves all. */
struct bound bound_altered(const char *json, const char *key, const char *value);
void unbind(struct bound *b);
void expect_same_tensors(const struct model_config *a, const struct model_config *b);

/* A model, the config.json that is written of it, and what is read from that: a model with the same tensors. */
struct journey {
    struct bound there, back;
    json_t *object;
};
struct journey journey_begin(const char *text, const char *override);
void journey_end(struct journey *j);

/* The config.json of a model is this. */
void expect_written(const struct bound *b, int64_t eod, const char *json);
/* With each of the changes transformers has no class for the model, which then has a tensor of this name (NULL: any),
 * and comes back all the same. */
void expect_no_class(const char *text, const char *const *changes, size_t count, const char *name);

struct refusal {
    const char *key, *value, *sentence;
};
/* A config.json with one member changed is refused so. */
void expect_refused(const char *json, const struct refusal *cases, size_t count);

#endif
