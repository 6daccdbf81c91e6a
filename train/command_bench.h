/* command_bench.h: what the actions of `riverrun bench` share: their entries, and what each of them prints. A table for
 * people goes to standard error, one JSON object (a line for each operation) to standard output. */
#ifndef RIVERRUN_COMMAND_BENCH_H
#define RIVERRUN_COMMAND_BENCH_H

#include "train/bench.h"
#include "train/flags.h"
#include "train/json_line.h"

#define PRODUCT_MAX 32768 /* three matrices of it are 12 GiB in float */

extern const struct flags bench_ops_flags, bench_layer_flags, bench_train_flags, bench_gemm_flags, bench_loader_flags,
    bench_verify_flags;
int command_bench_ops(int argc, char **argv, error *err);
int command_bench_layer(int argc, char **argv, error *err);
int command_bench_train(int argc, char **argv, error *err);
int command_bench_gemm(int argc, char **argv, error *err);
int command_bench_loader(int argc, char **argv, error *err);
int command_bench_verify(int argc, char **argv, error *err);

/* A line of JSON: what was measured, with which riverrun; and to standard output with it. */
void bench_begin_line(struct json_line *line, const char *action);
void bench_end_line(struct json_line *line);
/* Median, least and most seconds and the mean processor time, under names that start with `what`. */
void bench_put_times(struct json_line *line, const char *what, const struct bench_times *times);
/* How a nonlinear recurrence was solved, where one was. */
struct bench_measured;
void bench_put_solver(struct json_line *line, const struct bench_measured *m);
/* The same as bench_put_times for people. */
void bench_say_times(const char *what, const struct bench_times *times);
void bench_say_rate(const char *what, double flops, double seconds);

#endif
