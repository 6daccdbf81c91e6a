/* command_help.c: `riverrun help config`: every key a config may hold, as the Markdown page docs/config.md. All of
 * it comes from the option tables; a test compares the page with this output. Called by main.c. */
#include "train/commands.h"

#include "data/task.h"
#include "model/mixer.h"
#include "train/options.h"
#include <stdio.h>
#include <string.h>

static void section(const char *name, const char *about, const struct option *table) {
    printf("\n## [%s]\n\n%s\n\n", name, about);
    option_document(stdout, name, table);
}

static void task_section(const struct task_kind *k) {
    printf("\n### [task.NAME] with kind = %s\n\n%s\n\n", k->name, k->help);
    option_document(stdout, "task.NAME", k->options);
}

static void mixer_section(const struct mixer *m, const char *line) {
    printf("\n### %s\n\n%s\n\n", line, m->help);
    option_document(stdout, "block.NAME", m->options);
}

int command_help_config(void) {
    printf("# Config keys\n\n"
           "Every section and key of a config, from the tables that parse it. This page is the output of\n"
           "`riverrun help config`.\n\n"
           "A config holds `[section]` lines and `key = value` lines; a comment starts with `#` or `;` at the start\n"
           "of a line or behind a blank. On the command line `section.key=value` wins over the file. Whole numbers\n"
           "may be written `64_000`, `64k` (times 1000) or `64Ki` (times 1024). A key that is unknown, given twice or\n"
           "out of bounds is an error, never ignored.\n");
    for (const struct option_section *s = run_sections; s->name; s++) {
        section(s->name, s->help, s->table);
        for (int i = 0; s->table == task_options_table && task_kind_names[i]; i++) task_section(task_kind_at(i));
    }
    section("model", "The language model.", model_options_table);
    section("block.NAME",
            "A kind of block; NAME is how `model.pattern` calls it. Beside the keys below a block has those of its\n"
            "mixer, and those of its MLP if it has one.",
            block_options_table);
    for (const char *const *name = mixer_names; *name; name++) {
        char line[LIMIT_NAME];
        snprintf(line, sizeof line, "[block.NAME] with mixer = %s", *name);
        mixer_section(mixer_find(*name), line);
    }
    mixer_section(&mixer_mlp, "[block.NAME] with an MLP");
    return 0;
}
