/* command_bench_gemm.c: `riverrun bench gemm`: products of square matrices. What measures is train/bench.c. Called by
 * command_bench.c. */
#include "train/command_bench.h"

#include <stddef.h>
#include <stdio.h>

struct gemm_flags {
    int64_t size, repeats;
    int device, precision;
};

static const struct option gemm_table[] = {
    {"size", OPTION_INT, offsetof(struct gemm_flags, size), "2048", 1, PRODUCT_MAX, "rows",
     "Size of the square matrices.", NULL},
    {"repeats", OPTION_INT, offsetof(struct gemm_flags, repeats), "20", 1, BENCH_REPEATS_MAX, "products",
     "Products that are timed, after one that is not.", NULL},
    {"device", OPTION_CHOICE, offsetof(struct gemm_flags, device), "cpu", 0, 0, "", "What computes.", device_choices},
    {"precision", OPTION_CHOICE, offsetof(struct gemm_flags, precision), "fp32", 0, 0, "",
     "Numbers that are computed with.", precision_choices},
    OPTIONS_END,
};

const struct flags bench_gemm_flags = {
    .command = "bench gemm",
    .arguments = "",
    .summary = "Times products of square matrices through the operation that training multiplies with.",
    .table = gemm_table,
    .least = 0,
    .most = 0,
};

int command_bench_gemm(int argc, char **argv, error *err) {
    struct gemm_flags f;
    int count;
    bool helped;
    TRY(flags_parse(&bench_gemm_flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    struct device *dev;
    struct bench_times times;
    struct json_line line;
    char machine[160];
    double size = (double)f.size, flops = 2 * size * size * size;
    TRY(device_choose(&f.device, &f.precision, err));
    TRY(device_open(&dev, (enum device_kind)f.device, (enum precision)f.precision, err));
    device_describe(dev, machine, sizeof machine);
    int result = bench_product(dev, f.size, (int)f.repeats, &times, err);
    device_close(dev);
    if (result != 0) return -1;
    fprintf(stderr, "machine         %s, %s\n", machine, precision_choices[f.precision]);
    bench_say_times("product", &times);
    bench_say_rate("rate", flops, times.median);
    bench_begin_line(&line, "gemm");
    json_line_string(&line, "machine", machine);
    json_line_string(&line, "precision", precision_choices[f.precision]);
    json_line_int(&line, "size", f.size);
    json_line_int(&line, "repeats", times.count);
    bench_put_times(&line, "product", &times);
    json_line_real(&line, "flops_per_s", flops / times.median);
    bench_end_line(&line);
    return 0;
}
