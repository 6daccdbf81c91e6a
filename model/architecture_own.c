/* architecture_own.c: models that no architecture of transformers expresses: their config.json, which holds the model's
 * sections of the config, and the Python files that let transformers open them (model/hub/, as text in the program, so
 * that a checkpoint needs nothing but itself). See architecture.h. Owns no state. */
#include "model/architecture.h"

#include "common/text.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define SETTINGS "settings" /* the member of such a config.json that holds [model] and [block.*] */

/* ---- the Python -------------------------------------------------------------------------------------------------- */

/* Every line of the files as a string; the Makefile makes them so. */
static const char configuration[] =
#include "model/hub/configuration_riverrun.py.inc"
    ;
static const char mixers[] =
#include "model/hub/mixers_riverrun.py.inc"
    ;
static const char modeling[] =
#include "model/hub/modeling_riverrun.py.inc"
    ;

const struct architecture_file *architecture_files(const struct model_config *mc) {
    static const struct architecture_file none = {NULL, NULL}, files[] = {
        {"configuration_riverrun.py", configuration},
        {"mixers_riverrun.py", mixers},
        {"modeling_riverrun.py", modeling},
        {NULL, NULL},
    };
    return architecture_class(mc) ? &none : files;
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

static bool describes_model(const char *section) {
    return strcmp(section, "model") == 0 || strncmp(section, "block.", 6) == 0;
}

/* A value of the config: numbers and truth values as what they are, the rest as text. */
static json_t *setting_of(const char *text) {
    json_t *value = json_loads(text, JSON_DECODE_ANY, NULL);
    if (json_is_number(value) || json_is_boolean(value)) return value;
    json_decref(value);
    return json_string(text);
}

/* The lines `[section]` and `key = value` of the effective config as {section: {key: value}}, sections of the model
 * only. */
static json_t *settings_of(const config *c) {
    json_t *settings = json_object(), *section = NULL;
    char *text = config_text(c), *rest = text;
    ASSERT(text != NULL);
    for (char *line; (line = strsep(&rest, "\n"));) {
        char *end = strchr(line, ']'), *equals = strstr(line, " = ");
        if (line[0] == '[' && end) {
            *end = 0;
            section = NULL;
            if (!describes_model(line + 1)) continue;
            section = json_object();
            json_object_set_new(settings, line + 1, section);
        } else if (section && equals) {
            *equals = 0;
            json_object_set_new(section, line, setting_of(equals + 3));
        }
    }
    free(text);
    return settings;
}

json_t *architecture_write_own(const struct model_config *mc, const config *c, int64_t eod) {
    json_t *object = json_object(), *settings = settings_of(c);
    json_object_set_new(object, "architectures", json_pack("[s]", "RiverrunForCausalLM"));
    json_object_set_new(object, "auto_map",
                        json_pack("{s: s, s: s, s: s}", "AutoConfig", "configuration_riverrun.RiverrunConfig",
                                  "AutoModel", "modeling_riverrun.RiverrunModel", "AutoModelForCausalLM",
                                  "modeling_riverrun.RiverrunForCausalLM"));
    architecture_put_text(object, "model_type", ARCHITECTURE_OWN_TYPE);
    architecture_put_int(object, "vocab_size", mc->rows);
    architecture_put_int(object, "hidden_size", mc->options.d_model);
    architecture_put_int(object, "num_hidden_layers", mc->blocks);
    architecture_put_bool(object, "tie_word_embeddings", mc->options.tie_embeddings);
    architecture_put_ids(object, eod);
    architecture_put_text(object, "torch_dtype", "float32");
    /* The file must be enough without a tokenizer, which may have given the number of ids. */
    architecture_put_int(json_object_get(settings, "model"), "vocab_size", mc->vocab);
    json_object_set_new(object, SETTINGS, settings);
    return object;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

/* What config_set takes as a name, and what the config's own files can say: letters, digits, "_" and "-". */
static bool plain_name(const char *name) {
    size_t length = strlen(name);
    return length > 0 && length <= LIMIT_CONFIG_NAME &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") == length;
}

static bool model_section(const char *name) {
    if (strcmp(name, "model") == 0) return true;
    return strncmp(name, "block.", 6) == 0 && plain_name(name + 6) && strlen(name) <= LIMIT_CONFIG_NAME;
}

/* A setting as the config has it: `room` holds what is no text there. NULL: it is neither. */
static const char *text_of(const json_t *value, char *room, size_t size) {
    if (json_is_string(value)) return json_string_value(value);
    if (json_is_boolean(value)) return json_is_true(value) ? "true" : "false";
    if (json_is_real(value)) return text_real(room, size, json_real_value(value));
    if (!json_is_integer(value)) return NULL;
    snprintf(room, size, "%" PRId64, (int64_t)json_integer_value(value));
    return room;
}

int architecture_read_own(const json_t *object, const char *name, config *c, error *err) {
    json_t *settings = json_object_get(object, SETTINGS);
    const char *section, *key;
    json_t *members, *value;
    char shown[65], room[40];
    if (!json_is_object(json_object_get(settings, "model")))
        return error_input(err, "%s: a model of type " ARCHITECTURE_OWN_TYPE " must have '" SETTINGS
                                "' with an object 'model' in it", name);
    json_object_foreach(settings, section, members) {
        if (!model_section(section) || !json_is_object(members))
            return error_input(err, "%s: '%s' in '" SETTINGS "' must be an object called model or block.NAME", name,
                               architecture_shown(section, shown));
        json_object_foreach(members, key, value) {
            const char *text = text_of(value, room, sizeof room);
            if (!plain_name(key) || !text)
                return error_input(err,
                                   "%s: '%s' in '" SETTINGS ".%s' must be a plain name with a number, a text, true or "
                                        "false", name, architecture_shown(key, shown), section);
            TRY(config_set(c, section, key, text, err));
        }
    }
    return 0;
}
