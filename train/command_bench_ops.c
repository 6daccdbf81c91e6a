/* command_bench_ops.c: `riverrun bench ops`: times of operations beside what the device could do and what others need.
 * What measures is train/bench_ops.c. Called by command_bench.c. */
#include "train/command_bench.h"

#include "common/file.h"
#include "common/text.h"
#include "train/bench_ops.h"
#include "train/options.h"
#include "train/version.h"
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

struct ops_flags {
    int device, precision;
    const char *csv, *shape;
    bool list, check;
};

#define OPS(field) offsetof(struct ops_flags, field)
static const struct option ops_table[] = {
    {"device", OPTION_CHOICE, OPS(device), "cpu", 0, 0, "", "What computes.", device_choices},
    {"precision", OPTION_CHOICE, OPS(precision), "fp32", 0, 0, "", "Numbers that are computed with.",
     precision_choices},
    {"csv", OPTION_STRING, OPS(csv), "", 0, 0, "", "File for a table of the results, a line for each case.", NULL},
    {"shape", OPTION_STRING, OPS(shape), "", 0, 0, "",
     "Other sizes for the letters of the shapes, such as \"B=2 T=512\"; with several sizes of a letter, \"T=128,512\", "
     "each case is measured at all of them.", NULL},
    {"check", OPTION_BOOL, OPS(check), "false", 0, 0, "", "Only check results, and time nothing.", NULL},
    {"list", OPTION_BOOL, OPS(list), "false", 0, 0, "", "Only print the cases.", NULL},
    OPTIONS_END,
};
#undef OPS

const struct flags bench_ops_flags = {
    .command = "bench ops",
    .arguments = "[FILTER...]",
    .summary =
        "Times every operation at the shapes of real models: forward, and forward + backward, median, least and\n"
        "most, beside what a device copy and a large product measured in the same run allow, and the times of the\n"
        "authors' code on an H200. A slice of each result is compared with the same computation in double on the\n"
        "CPU: a wrong result has no time. A FILTER is an operation (\"scan\"), or a part of a case's name or shape\n"
        "(\"129M\", \"T=65536\"), or both (\"scan/T=65536\"); an operation's own name means it alone.",
    .table = ops_table,
    .least = 0,
    .most = -1,
};

/* ---- which sizes ------------------------------------------------------------------------------------------------ */

enum { SHAPES_MAX = 4096 };

/* The sizes of one letter, "T=128,512", at `at`: how many there are; *end is behind them. */
static int64_t count_sizes(const char *at, const char **end) {
    int64_t count = 1;
    for (; *at && *at != ' '; at++) count += *at == ',';
    *end = at;
    return count;
}

/* How many shapes a text with several sizes stands for. */
static int64_t count_shapes(const char *text) {
    int64_t count = 1;
    for (const char *at = text; *at && count <= SHAPES_MAX; at += *at == ' ') count *= count_sizes(at, &at);
    return count;
}

/* One of them: the last letter's sizes follow each other fastest. */
static void shape_at(const char *text, int64_t index, char out[BENCH_SHAPE_TEXT]) {
    int64_t rest = count_shapes(text);
    int used = 0;
    for (const char *at = text, *end; *at; at = end + (*end == ' ')) {
        int64_t count = count_sizes(at, &end);
        rest /= count;
        const char *size = strchr(at, '=') + 1;
        for (int64_t skip = index / rest % count; skip > 0; skip--) size = strchr(size, ',') + 1;
        used += snprintf(out + used, (size_t)(BENCH_SHAPE_TEXT - used), "%s%c=%.*s", used ? " " : "", *at,
                         (int)strcspn(size, ", "), size);
    }
    out[used] = 0;
}

/* Every letter has an equals sign and sizes behind it, and there is room for all of it. */
static int check_shapes(const char *text, error *err) {
    struct bench_problem sizes = {0};
    char one[BENCH_SHAPE_TEXT];
    for (const char *at = text, *end; *at; at = end + (*end == ' ')) {
        count_sizes(at, &end);
        if (at[0] == ' ' || at[1] != '=' || strlen(text) >= BENCH_SHAPE_TEXT * 4)
            return error_input(err, "'%.100s' is no shape: write sizes behind letters, such as \"B=8 T=2048,4096\"",
                               text);
    }
    int64_t count = count_shapes(text);
    if (count > SHAPES_MAX) return error_input(err, "--shape stands for more than %d shapes", SHAPES_MAX);
    for (int64_t i = 0; i < count; i++) {
        shape_at(text, i, one);
        TRY(bench_sizes(&sizes, one, err));
    }
    return 0;
}

/* ---- which cases ------------------------------------------------------------------------------------------------ */

static bool names_row(const char *filter) {
    for (const struct bench_case *c = bench_cases; c->row; c++)
        if (strcmp(c->row->name, filter) == 0) return true;
    return false;
}

static bool matches(const struct bench_case *c, const char *filter) {
    const char *slash = strchr(filter, '/');
    size_t name = slash ? (size_t)(slash - filter) : 0;
    if (names_row(filter)) return strcmp(c->row->name, filter) == 0;
    if (slash && (strlen(c->row->name) != name || memcmp(c->row->name, filter, name) != 0)) return false;
    const char *part = slash ? slash + 1 : filter;
    return strstr(c->label, part) || strstr(c->shape, part) || (!slash && strstr(c->row->name, part));
}

static bool wanted(const struct bench_case *c, char **filters, int count) {
    for (int i = 0; i < count; i++)
        if (matches(c, filters[i])) return true;
    return count == 0;
}

static int check_filters(char **filters, int count, error *err) {
    for (int i = 0; i < count; i++) {
        bool any = false;
        for (const struct bench_case *c = bench_cases; c->row; c++) any |= wanted(c, filters + i, 1);
        if (any) continue;
        return error_input(err, "'%.100s' is no part of a case; riverrun bench ops --list prints all", filters[i]);
    }
    return 0;
}

/* ---- what is printed -------------------------------------------------------------------------------------------- */

struct session {
    const struct ops_flags *flags;
    struct device *dev, *oracle;
    struct bench_ceilings ceilings;
    char machine[160];
    FILE *csv;
    int wrong;
};

static const double unknown = NAN;

/* One of forward (0) and both (1) of a case, as numbers; NAN where there is none. */
struct figures {
    double ms, ms_min, ms_max, gb_per_s, tflop_per_s, floor_ms, share, theirs_ms, must_ms, aim_ms;
};
enum { FIGURES = sizeof(struct figures) / sizeof(double) };
static const char *const figure_names[FIGURES] = {"ms",       "ms_min", "ms_max",    "gb_per_s", "tflop_per_s",
                                                  "floor_ms", "share",  "theirs_ms", "must_ms",  "aim_ms"};

static double given(double ms) {
    return ms > 0 ? ms : unknown;
}

static struct figures figures_of(const struct session *s, const struct bench_case *c, const struct bench_measured *m,
                                 int which) {
    const struct bench_times *t = which ? &m->both : &m->forward;
    const struct bench_work *w = which ? &m->both_work : &m->forward_work;
    struct figures f;
    double least = bench_floor(w, &s->ceilings);
    for (int i = 0; i < FIGURES; i++) ((double *)&f)[i] = unknown;
    if (!*s->flags->shape && s->flags->precision == PRECISION_BF16) {
        f.theirs_ms = given(c->theirs[which]);
        f.must_ms = given(c->must[which]);
        f.aim_ms = given(c->aim[which]);
    }
    if (t->count == 0) return f;
    f.floor_ms = 1e3 * least;
    if (m->difference.wrong) return f;
    f.ms = 1e3 * t->median;
    f.ms_min = 1e3 * t->least;
    f.ms_max = 1e3 * t->most;
    f.gb_per_s = 1e-9 * w->bytes / t->median;
    f.tflop_per_s = w->products > 0 ? 1e-12 * w->products / t->median : unknown;
    f.share = least / t->median;
    return f;
}

void bench_put_solver(struct json_line *line, const struct bench_measured *m) {
    if (!m->solved) return;
    json_line_string(line, "solver", bench_solver_names[m->solver.method]);
    if (m->solver.method != CELL_SEQUENTIAL) json_line_int(line, "iterations", m->solver.iterations);
    if (m->solver.method == CELL_SHOOTING) json_line_int(line, "chunk", m->solver.chunk);
    json_line_real(line, "residual", m->residual);
}

static void print_json(const struct session *s, const struct bench_case *c, const struct bench_measured *m,
                       const struct figures f[2]) {
    struct json_line line;
    bench_begin_line(&line, "ops");
    json_line_string(&line, "machine", s->machine);
    json_line_string(&line, "device", device_choices[s->flags->device]);
    json_line_string(&line, "precision", precision_choices[s->flags->precision]);
    json_line_string(&line, "operation", c->row->name);
    json_line_string(&line, "label", c->label);
    json_line_string(&line, "shape", m->shape);
    for (int which = 0; which < 2; which++) {
        for (int i = 0; i < FIGURES; i++) {
            char key[48];
            snprintf(key, sizeof key, "%s_%s", which ? "both" : "forward", figure_names[i]);
            json_line_real(&line, key, ((const double *)&f[which])[i]);
        }
    }
    bench_put_solver(&line, m);
    json_line_real(&line, "difference", m->difference.worst);
    json_line_bool(&line, "right", !m->difference.wrong);
    bench_end_line(&line);
    fflush(stdout);
}

static void csv_header(const struct session *s) {
    if (!s->csv) return;
    fprintf(s->csv, "operation,label,shape,device,precision");
    for (int which = 0; which < 2; which++)
        for (int i = 0; i < FIGURES; i++) fprintf(s->csv, ",%s_%s", which ? "both" : "forward", figure_names[i]);
    fprintf(s->csv, ",difference,right,copy_gb_per_s,product_tflop_per_s,machine,commit\n");
}

static void print_csv(const struct session *s, const struct bench_case *c, const struct bench_measured *m,
                      const struct figures f[2]) {
    if (!s->csv) return;
    fprintf(s->csv, "%s,\"%s\",\"%s\",%s,%s", c->row->name, c->label, m->shape, device_choices[s->flags->device],
            precision_choices[s->flags->precision]);
    for (int which = 0; which < 2; which++) {
        for (int i = 0; i < FIGURES; i++) {
            double value = ((const double *)&f[which])[i];
            if (isfinite(value)) fprintf(s->csv, ",%.5g", value);
            else fprintf(s->csv, ",");
        }
    }
    fprintf(s->csv, ",%.3g,%s,%.5g,%.5g,\"%s\",%s\n", m->difference.worst, m->difference.wrong ? "no" : "yes",
            1e-9 * s->ceilings.bytes_per_s, 1e-12 * s->ceilings.products_per_s, s->machine, version_commit());
    fflush(s->csv);
}

/* "1.20 / 5.86", or "-". */
static const char *pair(char out[32], double forward, double both) {
    if (!isfinite(forward) && !isfinite(both)) return "-";
    if (!isfinite(both)) snprintf(out, 32, "%.3g", forward);
    else snprintf(out, 32, "%.3g / %.3g", forward, both);
    return out;
}

static void say_header(void) {
    fprintf(stderr, "%-13s  %-21s  %-40s  %15s  %11s  %9s  %7s  %15s  %11s  %10s  %10s  %s\n", "operation", "case",
            "shape", "ms fwd / both", "GB/s", "TFLOP/s", "roof %", "floor ms", "theirs", "must", "aim", "difference");
}

/* Where a wrong result is furthest off: its place in the slice that was compared, from 0. */
static void say_where(FILE *to, const struct bench_difference *d) {
    if (!d->wrong) return;
    fprintf(to, "      %s%s[", d->gradient ? "d" : "", d->name);
    for (int i = 0; i < d->ndim; i++) fprintf(to, "%s%lld", i ? ", " : "", (long long)d->at[i]);
    fprintf(to, "] of the slice is %.6g, and should be %.6g\n", d->got, d->want);
}

static void say_case(const struct bench_case *c, const struct bench_measured *m, const struct figures f[2]) {
    char room[8][32];
    struct figures a = f[0], b = f[1];
    fprintf(stderr, "%-13s  %-21s  %-40s  %15s  %11s  %9s  %7s  %15s  %11s  %10s  %10s", c->row->name, c->label,
            m->shape, pair(room[0], 1e3 * m->forward.median, m->both.count ? 1e3 * m->both.median : unknown),
            pair(room[1], round(a.gb_per_s), round(b.gb_per_s)),
            pair(room[2], round(a.tflop_per_s), round(b.tflop_per_s)),
            pair(room[3], round(100 * a.share), round(100 * b.share)), pair(room[4], a.floor_ms, b.floor_ms),
            pair(room[5], a.theirs_ms, b.theirs_ms), pair(room[6], a.must_ms, b.must_ms),
            pair(room[7], a.aim_ms, b.aim_ms));
    fprintf(stderr, "  %.1e %s%s%s\n", m->difference.worst, m->difference.wrong ? "WRONG: " : "",
            m->difference.gradient ? "d" : "", m->difference.name ? m->difference.name : "");
    say_where(stderr, &m->difference);
}

/* ---- the action ------------------------------------------------------------------------------------------------- */

static int check_case(struct session *s, const struct bench_case *c, const char *shape, error *err) {
    struct bench_measured m;
    double begun = clock_seconds();
    TRY(bench_operation(c->row, c->shape, shape, false, s->dev, s->oracle, &m, err));
    printf("%-5s %-13s  %s: %s%s differs by %.1e, %.1f s\n", m.difference.wrong ? "WRONG" : "ok", c->row->name, m.shape,
           m.difference.gradient ? "d" : "", m.difference.name, m.difference.worst, clock_seconds() - begun);
    say_where(stdout, &m.difference);
    fflush(stdout);
    s->wrong += m.difference.wrong;
    return 0;
}

static int measure_case(struct session *s, const struct bench_case *c, const char *shape, error *err) {
    struct bench_measured m;
    TRY(bench_operation(c->row, c->shape, shape, true, s->dev, s->oracle, &m, err));
    struct figures f[2] = {figures_of(s, c, &m, 0), figures_of(s, c, &m, 1)};
    say_case(c, &m, f);
    print_json(s, c, &m, f);
    print_csv(s, c, &m, f);
    s->wrong += m.difference.wrong;
    return 0;
}

static int run_cases(struct session *s, char **filters, int count, error *err) {
    if (!s->flags->check) {
        TRY(bench_ceilings(s->dev, &s->ceilings, err));
        fprintf(stderr, "%s, %s: copy %.0f GB/s, product %.4g TFLOP/s\n", s->machine,
                precision_choices[s->flags->precision], 1e-9 * s->ceilings.bytes_per_s,
                1e-12 * s->ceilings.products_per_s);
        say_header();
        csv_header(s);
    }
    for (const struct bench_case *c = bench_cases; c->row; c++) {
        if (!wanted(c, filters, count)) continue;
        for (int64_t i = 0; i < count_shapes(s->flags->shape); i++) {
            char shape[BENCH_SHAPE_TEXT];
            shape_at(s->flags->shape, i, shape);
            TRY((s->flags->check ? check_case : measure_case)(s, c, shape, err));
        }
    }
    if (s->wrong == 0) return 0;
    return error_system(err, "%d of the operations gave wrong results", s->wrong);
}

static int close_csv(struct session *s, error *err) {
    if (!s->csv) return 0;
    bool bad = ferror(s->csv) != 0;
    if (fclose(s->csv) == 0 && !bad) return 0;
    return error_system(err, "cannot write %s: %s", s->flags->csv, strerror(errno));
}

int command_bench_ops(int argc, char **argv, error *err) {
    struct ops_flags f;
    struct session s = {.flags = &f};
    int count;
    bool helped;
    TRY(flags_parse(&bench_ops_flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    TRY(check_filters(argv + 1, count, err));
    TRY(check_shapes(f.shape, err));
    if (f.list) {
        for (const struct bench_case *c = bench_cases; c->row; c++)
            if (wanted(c, argv + 1, count)) printf("%-16s%-24s%s\n", c->row->name, c->label, c->shape);
        return 0;
    }
    TRY(device_choose(&f.device, &f.precision, err));
    TRY(device_open(&s.dev, (enum device_kind)f.device, (enum precision)f.precision, err));
    device_describe(s.dev, s.machine, sizeof s.machine);
    int status = device_open(&s.oracle, DEVICE_CPU, PRECISION_F64, err);
    if (status == 0 && *f.csv && !(s.csv = fopen(f.csv, "w")))
        status = error_system(err, "cannot write %s: %s", f.csv, strerror(errno));
    if (status == 0) status = run_cases(&s, argv + 1, count, err);
    if (status == 0) status = close_csv(&s, err);
    else if (s.csv) fclose(s.csv);
    device_close(s.oracle);
    device_close(s.dev);
    return status;
}
