/* groups.c: matches [group.NAME] sections with the tensor table, as groups.h describes. */
#include "train/groups.h"

#include "common/text.h"
#include <fnmatch.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- globs ------------------------------------------------------------------------------------------------------ */

#define SEPARATORS " \t,"

/* The next glob of a list into `out`, and *list behind it; false at the end. A glob that is longer than any name is
 * cut, and then matches none. */
static bool next_glob(const char **list, char out[LIMIT_NAME]) {
    const char *from = *list + strspn(*list, SEPARATORS);
    size_t length = strcspn(from, SEPARATORS);
    *list = from + length;
    snprintf(out, LIMIT_NAME, "%.*s", (int)(length < LIMIT_NAME ? length : LIMIT_NAME - 1), from);
    return length > 0;
}

static bool matches(const char *list, const char *name) {
    char glob[LIMIT_NAME];
    while (next_glob(&list, glob)) {
        if (fnmatch(glob, name, 0) == 0) return true;
    }
    return false;
}

/* The end of `name` that has as many parts as `text`, which may start with a dot. */
static const char *same_parts(const char *name, const char *text) {
    size_t dots = text[0] != '.';
    for (const char *c = text; *c; c++) dots += *c == '.';
    for (const char *c = name + strlen(name); c > name; c--) {
        if (c[-1] == '.' && --dots == 0) return text[0] == '.' ? c - 1 : c;
    }
    return name;
}

/* A tensor whose name ends nearly as the glob does, behind its last star; NULL if there is none. */
static const char *nearest_tensor(const struct params *p, const char *glob) {
    const char *star = strrchr(glob, '*'), *text = star ? star + 1 : glob, *nearest = NULL;
    const char **ends = calloc((size_t)p->count + 1, sizeof *ends);
    for (int i = 0; i < p->count && ends; i++) ends[i] = star ? same_parts(p->list[i].name, text) : p->list[i].name;
    const char *end = ends && *text ? text_nearest(text, ends) : NULL;
    for (int i = 0; i < p->count && end && !nearest; i++) nearest = ends[i] == end ? p->list[i].name : NULL;
    free(ends);
    return nearest;
}

static int check_globs(const struct group_options *g, const struct params *p, error *err) {
    char glob[LIMIT_NAME];
    const char *list = g->match;
    int globs = 0;
    for (; next_glob(&list, glob); globs++) {
        bool found = false;
        for (int i = 0; i < p->count && !found; i++) found = fnmatch(glob, p->list[i].name, 0) == 0;
        if (found) continue;
        const char *nearest = nearest_tensor(p, glob);
        return error_input(err, "[group.%s] match: no tensor has a name like %s%s%s; riverrun plan --tensors lists "
                           "them",
                           g->name, glob, nearest ? "; the nearest is " : "", nearest ? nearest : "");
    }
    if (globs == 0) return error_input(err, "[group.%s] match is empty; name tensors, such as *.bias", g->name);
    return 0;
}

/* ---- treatments ------------------------------------------------------------------------------------------------- */

/* The numbers that a group may give. */
static const struct {
    const char *key;
    size_t from, to;
} numbers[] = {
    {"lr_scale", offsetof(struct group_options, lr_scale), offsetof(struct treatment, lr_scale)},
    {"weight_decay", offsetof(struct group_options, weight_decay), offsetof(struct treatment, weight_decay)},
    {"clamp_min", offsetof(struct group_options, clamp_min), offsetof(struct treatment, clamp_min)},
    {"clamp_max", offsetof(struct group_options, clamp_max), offsetof(struct treatment, clamp_max)},
};
enum { NUMBERS = sizeof numbers / sizeof *numbers };

static int treat(struct treatment *out, const struct param *param, const struct optimizer_options *o, error *err) {
    const struct group_options *givers[NUMBERS] = {NULL};
    bool decays = o->decay == DECAY_ALL || (o->decay == DECAY_HEAD && param->head) || param->decay;
    double clamp = param->clamp > 0 ? param->clamp : INFINITY;
    *out = (struct treatment){
        .lr_scale = 1, .weight_decay = decays ? o->weight_decay : 0, .clamp_min = -clamp, .clamp_max = clamp};
    for (size_t i = 0; i < o->group_count; i++) {
        const struct group_options *g = &o->groups[i];
        if (!matches(g->match, param->name)) continue;
        for (int k = 0; k < NUMBERS; k++) {
            double value = *(const double *)((const char *)g + numbers[k].from);
            if (isnan(value)) continue;
            if (givers[k]) {
                return error_input(err, "[group.%s] and [group.%s] both give %s to %s; leave it to one of them",
                                   givers[k]->name, g->name, numbers[k].key, param->name);
            }
            givers[k] = g;
            *(double *)((char *)out + numbers[k].to) = value;
        }
    }
    if (out->clamp_min <= out->clamp_max) return 0;
    return error_input(err, "clamp_min = %g is above clamp_max = %g for %s; no weight can be between them",
                       out->clamp_min, out->clamp_max, param->name);
}

int groups_treat(struct treatment *out, const struct params *p, const struct optimizer_options *options, error *err) {
    for (size_t i = 0; i < options->group_count; i++) TRY(check_globs(&options->groups[i], p, err));
    for (int i = 0; i < p->count; i++) TRY(treat(&out[i], &p->list[i], options, err));
    return 0;
}

int groups_check(const struct params *p, const struct optimizer_options *options, error *err) {
    struct treatment *all = calloc((size_t)p->count, sizeof *all);
    if (!all) return error_system(err, "no memory for the optimizer's groups");
    int result = groups_treat(all, p, options, err);
    free(all);
    return result;
}
