/* command_bench.c: `riverrun bench ops|layer|train|gemm|loader|verify`: how fast this machine computes, trains,
 * multiplies and reads. Chooses the action, and holds what all of them print (command_bench.h). Called by main.c. */
#include "train/command_bench.h"

#include "train/actions.h"
#include "train/commands.h"
#include "train/version.h"
#include <stdio.h>

void bench_begin_line(struct json_line *line, const char *action) {
    json_line_begin(line);
    json_line_string(line, "bench", action);
    json_line_string(line, "version", version_number());
    json_line_string(line, "commit", version_commit());
}

void bench_end_line(struct json_line *line) {
    json_line_end(line);
    fwrite(line->text, 1, line->used, stdout);
}

void bench_put_times(struct json_line *line, const char *what, const struct bench_times *times) {
    char key[48];
    const struct {
        const char *name;
        double value;
    } values[] = {{"s", times->median}, {"s_min", times->least}, {"s_max", times->most}, {"cpu_s", times->cpu}};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        snprintf(key, sizeof key, "%s_%s", what, values[i].name);
        json_line_real(line, key, values[i].value);
    }
}

void bench_say_times(const char *what, const struct bench_times *times) {
    fprintf(stderr, "%-16s%.2f ms median of %d (%.2f to %.2f), %.2f ms of processor time\n", what, 1e3 * times->median,
            times->count, 1e3 * times->least, 1e3 * times->most, 1e3 * times->cpu);
}

void bench_say_rate(const char *what, double flops, double seconds) {
    fprintf(stderr, "%-16s%.1f GFLOP/s\n", what, 1e-9 * flops / seconds);
}

static const struct action table[] = {{"ops", command_bench_ops, &bench_ops_flags},
                                      {"layer", command_bench_layer, &bench_layer_flags},
                                      {"train", command_bench_train, &bench_train_flags},
                                      {"gemm", command_bench_gemm, &bench_gemm_flags},
                                      {"loader", command_bench_loader, &bench_loader_flags},
                                      {"verify", command_bench_verify, &bench_verify_flags},
                                      {0}};

int command_bench(int argc, char **argv, error *err) {
    return actions_run("bench", table, argc, argv, err);
}
