/* actions.c: finds the action of a command that has several, as actions.h describes. */
#include "train/actions.h"

#include "common/text.h"
#include <stdio.h>
#include <string.h>

enum { ACTIONS_MAX = 16, LIST_TEXT = 256 };

/* "info, verify and cat", with `last` between the last two. */
static void list_names(char out[LIST_TEXT], const struct action *table, const char *last) {
    size_t used = 0;
    out[0] = 0;
    for (int i = 0; table[i].name; i++) {
        const char *between = i == 0 ? "" : table[i + 1].name ? ", " : last;
        int wanted = snprintf(out + used, LIST_TEXT - used, "%s%s", between, table[i].name);
        ASSERT(wanted >= 0 && (size_t)wanted < LIST_TEXT - used);
        used += (size_t)wanted;
    }
}

int actions_run(const char *command, const struct action *table, int argc, char **argv, error *err) {
    const char *names[ACTIONS_MAX + 1] = {NULL};
    char list[LIST_TEXT];
    if (argc >= 2 && flags_is_help(argv[1])) {
        for (int i = 0; table[i].name; i++) {
            if (i > 0) printf("\n");
            flags_help(stdout, table[i].flags);
        }
        return 0;
    }
    if (argc < 2) {
        list_names(list, table, " or ");
        return error_input(err, "riverrun %s needs an action: %s", command, list);
    }
    for (int i = 0; table[i].name; i++) {
        ASSERT(i < ACTIONS_MAX);
        if (strcmp(argv[1], table[i].name) == 0) return table[i].run(argc - 1, argv + 1, err);
        names[i] = table[i].name;
    }
    const char *nearest = text_nearest(argv[1], names);
    if (nearest)
        return error_input(err, "'%.100s' is no action of riverrun %s; did you mean %s?", argv[1], command, nearest);
    list_names(list, table, " and ");
    return error_input(err, "'%.100s' is no action of riverrun %s; %s are", argv[1], command, list);
}
