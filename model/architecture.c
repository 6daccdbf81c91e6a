/* architecture.c: the table of architectures, and what they share. Models that none of them expresses are
 * architecture_own.c's. See architecture.h. Owns no state. */
#include "model/architecture.h"

#include "common/json.h"
#include "common/text.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const struct architecture *const architectures[] = {&architecture_mamba, &architecture_mamba2,
                                                           &architecture_xlstm,
                                                         &architecture_llama, &architecture_arcee};
#define ARCHITECTURES (sizeof architectures / sizeof *architectures)

static const struct architecture *architecture_of(const struct model_config *mc) {
    for (int i = 0; i < mc->layer_count; i++)
        if (mc->layers[i].scaled) return NULL; /* which none of them knows */
    for (size_t i = 0; i < ARCHITECTURES; i++) {
        if (architectures[i]->expresses(mc)) return architectures[i];
    }
    return NULL;
}

const char *architecture_class(const struct model_config *mc) {
    const struct architecture *a = architecture_of(mc);
    return a ? a->class_name : NULL;
}

const char *architecture_caveat(const struct model_config *mc) {
    const struct architecture *a = architecture_of(mc);
    return a && a->caveat ? a->caveat(mc) : NULL;
}

/* What follows the prefix in a name, and the block's number as text; NULL if the name does not start so. */
static const char *behind_prefix(const char *name, const char *prefix, char number[16]) {
    for (; *prefix; prefix++) {
        size_t length = *prefix == '#' ? strspn(name, "0123456789") : *name == *prefix;
        if (length == 0 || length >= 16) return NULL;
        if (*prefix == '#') snprintf(number, 16, "%.*s", (int)length, name);
        name += length;
    }
    return name;
}

static void name_tensor(struct param *t, const struct architecture_name *names) {
    char number[16] = "", renamed[LIMIT_NAME];
    const char *rest = NULL;
    for (; names->ours && !rest; names++) rest = behind_prefix(t->name, names->ours, number);
    if (!rest) return;
    const char *theirs = names[-1].theirs, *hash = strchr(theirs, '#');
    int until = hash ? (int)(hash - theirs) : (int)strlen(theirs);
    const char *after = hash ? hash + 1 : "";
    int length = snprintf(renamed, sizeof renamed, "%.*s%s%s%s", until, theirs, hash ? number : "", after, rest);
    ASSERT(length > 0 && (size_t)length < sizeof renamed);
    memcpy(t->name, renamed, (size_t)length + 1);
}

void architecture_name_tensors(struct model_config *mc) {
    const struct architecture *a = architecture_of(mc);
    if (!a || !a->names) return;
    for (int i = 0; i < mc->params.count; i++) name_tensor(&mc->params.list[i], a->names);
}

int architecture_set_int(config *c, const char *section, const char *key, int64_t value, error *err) {
    char text[32];
    snprintf(text, sizeof text, "%" PRId64, value);
    return config_set(c, section, key, text, err);
}

int architecture_set_real(config *c, const char *section, const char *key, double value, error *err) {
    char text[40];
    return config_set(c, section, key, text_real(text, sizeof text, value), err);
}

void architecture_put_int(json_t *object, const char *key, int64_t value) {
    json_object_set_new(object, key, json_integer(value));
}

void architecture_put_real(json_t *object, const char *key, double value) {
    json_object_set_new(object, key, json_real(value));
}

void architecture_put_bool(json_t *object, const char *key, bool value) {
    json_object_set_new(object, key, json_boolean(value));
}

void architecture_put_text(json_t *object, const char *key, const char *value) {
    json_object_set_new(object, key, json_string(value));
}

void architecture_put_ids(json_t *object, int64_t eod) {
    static const char *const keys[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    for (int i = 0; i < 3; i++) json_object_set_new(object, keys[i], eod < 0 ? json_null() : json_integer(eod));
}

const char *architecture_shown(const char *text, char out[65]) {
    size_t length = strnlen(text, 64);
    for (size_t i = 0; i < length; i++) out[i] = (unsigned char)text[i] < ' ' || text[i] == 127 ? '?' : text[i];
    out[length] = 0;
    return out;
}

int architecture_read_ints(const json_t *object, const char *name, const struct architecture_int *ints, int count,
                           int64_t *values, config *c, error *err) {
    for (int i = 0; i < count; i++) {
        TRY(json_get_int_or(object, ints[i].key, name, ints[i].fallback, &values[i], err));
        if (values[i] < ints[i].least || values[i] > ints[i].most)
            return error_input(err, "%s: '%s' is %" PRId64 "; it must be from %" PRId64 " to %" PRId64, name,
                               ints[i].key, values[i], ints[i].least, ints[i].most);
        if (ints[i].section) TRY(architecture_set_int(c, ints[i].section, ints[i].option, values[i], err));
    }
    return 0;
}

int architecture_check_flag(const json_t *object, const char *name, const char *key, bool fallback, bool wanted,
                            const char *layer, error *err) {
    bool value;
    TRY(json_get_bool_or(object, key, name, fallback, &value, err));
    if (value == wanted) return 0;
    return error_input(err, "%s: '%s' is %s; riverrun's %s needs %s", name, key, value ? "true" : "false", layer,
                       wanted ? "true" : "false");
}

json_t *architecture_write(const struct model_config *mc, const config *c, int64_t eod) {
    const struct architecture *a = architecture_of(mc);
    json_t *object = a ? a->write(mc, eod) : architecture_write_own(mc, c, eod);
    ASSERT(object != NULL || json_exhausted()); /* which who writes it will find */
    return object;
}

int architecture_read(const json_t *object, const char *name, config *c, error *err) {
    const char *type;
    char shown[65];
    TRY(json_get_string(object, "model_type", name, &type, err));
    if (strcmp(type, ARCHITECTURE_OWN_TYPE) == 0) return architecture_read_own(object, name, c, err);
    char known[256] = "";
    for (size_t i = 0; i < ARCHITECTURES; i++) {
        if (strcmp(type, architectures[i]->model_type) == 0) return architectures[i]->read(object, name, c, err);
        snprintf(known + strlen(known), sizeof known - strlen(known), "%s, ", architectures[i]->model_type);
    }
    return error_input(err, "%s: model_type is '%s'; riverrun reads %sand its own, " ARCHITECTURE_OWN_TYPE, name,
                       architecture_shown(type, shown), known);
}
