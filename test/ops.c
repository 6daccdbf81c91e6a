/* test/ops.c: the program that walks the table of operation cases (test/ops.h says how the rows are made).
 *
 *   ops test [--device cpu|cuda] [--precision fp32|fp64|bf16] [--seed N] [FILTER...]  against the double reference
 *   ops grad [--seed N] [FILTER...]                                          against finite differences, in double
 *   ops large [--device cpu|cuda] [--precision fp32|fp64|bf16] [FILTER...]   test, at sizes that fill a GPU
 *   ops perf [--device cpu|cuda] [--precision fp32|fp64|bf16] [FILTER...]    time, bytes, FLOPs
 *   ops list [FILTER...]                                                     the cases
 *
 * A FILTER is the name of a row, a part of a name, or a name followed by parameters ("ssd T=7 Q=3,16"), which runs
 * exactly the cases it says, whether they are in the table or not. --part 2/4 runs the second of every four cases, so
 * that four processes share the table. Exit code 0: all passed; 1: something failed; 2: bad usage.
 */
#include "common/text.h"
#include "test/ops_run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LIST_VALUES = 32, CASE_TEXT = 512 };

struct options {
    int mode;
    bool list;
    enum device_kind device;
    enum precision precision;
    uint64_t seed;
    int part, parts; /* the cases run are those whose number gives the remainder `part` when divided by `parts` */
    char **filters;
    int filter_count;
};

struct session {
    struct options options;
    struct op_report report;
    struct device *dev;    /* under test */
    struct device *oracle; /* the double CPU table */
    double gemm_rate;      /* FLOP/s of linear_forward on a large square, on `dev` */
    int64_t cases;         /* that were run */
    int64_t met;           /* those of other parts too */
};

typedef void case_function(struct session *s, const struct op_row *row, const int64_t *parameters);

/* --- cases -------------------------------------------------------------------------------------------------------- */

/* Read "T=1,2,3 Q=16" over the defaults into a list of values for each parameter. 0, or -1 with a sentence printed. */
static int lists_parse(const struct op_row *row, const char *line, int64_t lists[][LIST_VALUES], int *counts) {
    char names[OP_PARAMETERS][OP_NAME], name[OP_NAME];
    int64_t defaults[OP_PARAMETERS];
    int count = row_parameters(row, names, defaults), used;
    for (int i = 0; i < OP_PARAMETERS; i++) {
        lists[i][0] = i < count ? defaults[i] : 0;
        counts[i] = 1;
    }
    while (*(line += strspn(line, " "))) {
        int which = -1;
        if (sscanf(line, "%15[^= ]=%n", name, (used = 0, &used)) == 1 && used > 0)
            for (int i = 0; i < count; i++)
                if (strcmp(names[i], name) == 0) which = i;
        if (which < 0) {
            fprintf(stderr, "ops: '%s' does not start with NAME= for a parameter of %s, which are: %s\n", line,
                    row->name, row->parameters);
            return -1;
        }
        long long number;
        counts[which] = 0;
        for (line += used; sscanf(line, "%lld%n", &number, &used) == 1; line += *line == ',') {
            ASSERT(counts[which] < LIST_VALUES);
            lists[which][counts[which]++] = number;
            line += used;
        }
        if (counts[which] == 0 || (*line && *line != ' ')) {
            fprintf(stderr, "ops: %s= of %s must be an integer or a list like 1,2,3, not '%s'\n", name, row->name,
                    line);
            return -1;
        }
    }
    return 0;
}

/* Call `function` for every combination, the last parameter changing fastest. */
static int line_each(struct session *s, const struct op_row *row, const char *line, case_function *function) {
    int64_t lists[OP_PARAMETERS][LIST_VALUES], parameters[OP_PARAMETERS];
    int counts[OP_PARAMETERS], at[OP_PARAMETERS] = {0};
    if (lists_parse(row, line, lists, counts) != 0) return -1;
    for (int i = 0; i >= 0;) {
        for (int k = 0; k < OP_PARAMETERS; k++) parameters[k] = lists[k][at[k]];
        function(s, row, parameters);
        for (i = OP_PARAMETERS - 1; i >= 0 && ++at[i] == counts[i]; i--) at[i] = 0;
    }
    return 0;
}

static void case_describe(const struct op_row *row, const int64_t *parameters, char *text) {
    char names[OP_PARAMETERS][OP_NAME];
    int64_t defaults[OP_PARAMETERS];
    int count = row_parameters(row, names, defaults), used = 0;
    text[0] = 0;
    for (int i = 0; i < count; i++)
        used += snprintf(text + used, (size_t)(CASE_TEXT - used), "%s%s=%lld", i ? " " : "", names[i],
                         (long long)parameters[i]);
}

/* --- test --------------------------------------------------------------------------------------------------------- */

static void compare_with_reference(struct run *got, struct run *want, bool backward) {
    for (int i = 0; i < got->operands; i++) {
        struct operand *a = &got->operand[i], *b = &want->operand[i];
        if (!backward && (a->kind == OPERAND_OUTPUT || a->kind == OPERAND_STATE))
            op_compare(got, a->name, a->values, b->values, a->count, a->terms);
        if (backward && a->kind == OPERAND_INPUT && !a->no_gradient) {
            char what[64];
            snprintf(what, sizeof what, "the gradient of %s", a->name);
            op_compare(got, what, a->gradients, b->gradients, a->count, a->gradient_terms);
        }
    }
}

/* Run again over memory poisoned with a large finite number: the same bits must come out. */
static void check_repeatable(struct run *first, bool backward) {
    struct run again;
    run_open_like(&again, first, "");
    again.poison = 0x7B;
    run_forward(&again);
    if (backward) run_backward(&again);
    for (int i = 0; i < first->operands; i++) {
        struct operand *a = &first->operand[i], *b = &again.operand[i];
        size_t size = (size_t)a->count * sizeof(double);
        if (a->kind == OPERAND_OUTPUT || a->kind == OPERAND_STATE)
            op_expect(first, memcmp(a->values, b->values, size) == 0,
                      "%s differs between two runs, or depends on what lay in the memory before", a->name);
        if (backward && a->kind == OPERAND_INPUT && !a->no_gradient)
            op_expect(first, memcmp(a->gradients, b->gradients, size) == 0,
                      "the gradient of %s differs between two runs, or depends on what lay in the memory before",
                      a->name);
    }
    run_close(&again);
}

static void check_identities(struct session *s, struct run *r) {
    for (const struct op_identity *identity = r->row->identities; identity && identity->name; identity++) {
        int before = s->report.case_failures;
        identity->check(r);
        if (s->report.case_failures > before) fprintf(stderr, "     identity: %s\n", identity->name);
    }
}

static void case_test(struct session *s, const struct op_row *row, const int64_t *parameters) {
    struct run got, want;
    bool backward = row->backward != NULL;
    run_open(&got, row, s->dev, parameters, s->options.seed, s->dev->ops->act, &s->report);
    run_open(&want, row, s->oracle, parameters, s->options.seed, s->dev->ops->act, &s->report);
    run_forward(&got);
    if (backward) run_backward(&got);
    if (s->dev->ops != s->oracle->ops) {
        run_forward(&want);
        compare_with_reference(&got, &want, false);
        if (backward) run_backward(&want);
        if (backward) compare_with_reference(&got, &want, true);
    }
    check_repeatable(&got, backward);
    check_identities(s, &got);
    run_close(&got);
    run_close(&want);
}

/* --- grad --------------------------------------------------------------------------------------------------------- */

/* The scalar whose gradient backward computes, and in *size the sum of the magnitudes it was added from. */
static double scalar_of(struct run *r, double *size) {
    double sum = 0;
    *size = 0;
    run_forward(r);
    if (r->row->scalar) {
        sum = r->row->scalar(r);
        *size = fabs(sum);
        return sum;
    }
    for (int i = 0; i < r->operands; i++) {
        struct operand *o = &r->operand[i];
        if (o->kind != OPERAND_OUTPUT || o->no_gradient) continue;
        for (int64_t k = 0; k < o->count; k++) {
            sum += o->gradients[k] * o->values[k];
            *size += fabs(o->gradients[k] * o->values[k]);
        }
    }
    return sum;
}

#define GRAD_STEP 0x1p-10

/* Derivative by the five-point rule, whose error is of order step^4. */
static double derivative(struct run *r, double *place, double *size) {
    static const double at[4] = {-2, -1, 1, 2}, weight[4] = {1, -8, 8, -1};
    double centre = *place, sum = 0, one;
    *size = 0;
    for (int i = 0; i < 4; i++) {
        *place = centre + at[i] * GRAD_STEP;
        sum += weight[i] * scalar_of(r, &one);
        *size = fmax(*size, one);
    }
    *place = centre;
    return sum / (12 * GRAD_STEP);
}

/* All elements of small operands, a keyed sample of large ones. Allowed: 1e-9 of the gradient (its own size plus the
 * operand's rms) for the rule's error, and the rounding of the scalar divided by the step. */
static void check_gradient(struct run *r, struct operand *o) {
    enum { SAMPLE = 48 };
    int64_t count = o->count < SAMPLE ? o->count : SAMPLE;
    double got[SAMPLE], want[SAMPLE], size = 0, one;
    rng_key key = {.seed = r->seed, .purpose = RNG_TEST, .stream = 77};
    for (int64_t i = 0; i < count; i++) {
        int64_t at = count == o->count ? i : (int64_t)rng_permute(key, (uint64_t)o->count, (uint64_t)i);
        want[i] = derivative(r, &o->values[at], &one);
        if (o->held && o->held(r, o, at)) want[i] = 0;
        got[i] = o->gradients[at] - (o->accumulate ? o->gradients_before[at] : 0);
        size = fmax(size, one);
    }
    char what[64];
    snprintf(what, sizeof what, "the gradient of %s", o->name);
    compare_arrays(r->report, what, got, want, count, 1e-9, 64 * dtype_unit(DTYPE_F64) * (1 + size) / GRAD_STEP);
}

static void case_grad(struct session *s, const struct op_row *row, const int64_t *parameters) {
    struct run r;
    if (row->backward == NULL) return;
    run_open(&r, row, s->oracle, parameters, s->options.seed, DTYPE_F64, &s->report);
    run_forward(&r);
    run_backward(&r);
    for (int i = 0; i < r.operands; i++)
        if (r.operand[i].kind == OPERAND_INPUT && !r.operand[i].no_gradient) check_gradient(&r, &r.operand[i]);
    run_forward(&r); /* once more, because the values are those of the last finite difference */
    check_identities(s, &r);
    run_close(&r);
}

/* --- perf --------------------------------------------------------------------------------------------------------- */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds of a call, over at least 5 and at most 200 calls or about 0.4 s. On a busy machine the two lie far apart. */
struct timing {
    double median, best;
};

static struct timing time_call(struct run *r, void (*call)(struct run *)) {
    enum { MOST = 200 };
    double seconds[MOST], start = clock_seconds();
    error err = {0};
    int count = 0;
    do {
        double before = clock_seconds();
        call(r);
        device_check(r->dev, &err);
        seconds[count++] = clock_seconds() - before;
    } while (count < 5 || (count < MOST && clock_seconds() - start < 0.4));
    qsort(seconds, (size_t)count, sizeof *seconds, compare_doubles);
    return (struct timing){seconds[count / 2], seconds[0]};
}

/* Bytes that a call has to move at least: every operand it reads or writes once, states and "+=" twice. */
static double bytes_moved(const struct run *r, bool backward) {
    double sum = (double)r->saved_bytes;
    for (int i = 0; i < r->operands; i++) {
        const struct operand *o = &r->operand[i];
        double values = (double)o->count * (double)dtype_size(o->value.dtype);
        if (o->kind == OPERAND_STATE) sum += backward ? 0 : 2 * values;
        else if (o->kind != OPERAND_OUTPUT || !backward || o->no_gradient) sum += values;
        if (backward && tensor_given(o->gradient)) sum += values * (o->accumulate ? 2 : 1);
    }
    return sum;
}

static void print_speed(const struct session *s, const struct run *r, bool backward, struct timing time, double flops) {
    double seconds = time.median;
    printf("  %-8s %10.3f ms (best %.3f) %8.2f GB/s", backward ? "backward" : "forward", seconds * 1e3, time.best * 1e3,
           bytes_moved(r, backward) / seconds * 1e-9);
    if (flops > 0)
        printf(" %8.1f GFLOP/s %6.1f %% of gemm", flops / seconds * 1e-9, 100 * flops / seconds / s->gemm_rate);
    printf("\n");
    fflush(stdout);
}

static void case_perf(struct session *s, const struct op_row *row, const int64_t *parameters) {
    struct run r;
    double forward = 0, backward = 0;
    run_open(&r, row, s->dev, parameters, s->options.seed, s->dev->ops->act, &s->report);
    if (row->flops) row->flops(&r, &forward, &backward);
    run_forward(&r); /* checks guards, and warms up */
    printf("%s %s\n", row->name, s->report.case_text);
    print_speed(s, &r, false, time_call(&r, run_call_forward), forward);
    if (row->backward) {
        run_forward(&r);
        run_backward(&r);
        print_speed(s, &r, true, time_call(&r, run_call_backward), backward);
    }
    run_close(&r);
}

static void gemm_declare(struct run *r) {
    int64_t n = param(r, "n");
    output(r, "y", DIMS(n, n));
    input(r, "x", DIMS(n, n));
    input(r, "w", DIMS(n, n));
}

static void gemm_forward(struct run *r) {
    r->ops->linear_forward(r->dev, value(r, "y"), value(r, "x"), value(r, "w"), tensor_none());
}

/* The yardstick of perf: y = x w^T of 1024 x 1024 matrices through the same table. */
static double measure_gemm(struct session *s) {
    static const struct op_row row = {.name = "gemm", .parameters = "n=1024", .declare = gemm_declare,
                                      .forward = gemm_forward};
    const int64_t parameters[OP_PARAMETERS] = {1024};
    struct run r;
    run_open(&r, &row, s->dev, parameters, s->options.seed, s->dev->ops->act, &s->report);
    run_upload(&r);
    run_call_forward(&r);
    double rate = 2 * 1024.0 * 1024.0 * 1024.0 / time_call(&r, run_call_forward).median;
    run_close(&r);
    return rate;
}

/* --- the walk ----------------------------------------------------------------------------------------------------- */

static void case_run(struct session *s, const struct op_row *row, const int64_t *parameters) {
    char text[CASE_TEXT];
    if (s->met++ % s->options.parts != s->options.part) return;
    case_describe(row, parameters, text);
    s->report.row = row->name;
    s->report.case_text = text;
    s->report.case_failures = 0;
    s->cases++;
    if (s->options.list) printf("%s %s\n", row->name, text);
    else if (s->options.mode & (OP_TEST | OP_LARGE)) case_test(s, row, parameters);
    else if (s->options.mode == OP_GRAD) case_grad(s, row, parameters);
    else case_perf(s, row, parameters);
}

/* Run the cases of the table for a row and say how they went. */
static void row_run(struct session *s, const struct op_row *row, const char *line) {
    int64_t cases = s->cases, checks = s->report.checks, failures = s->report.failures;
    s->report.worst = 0;
    s->report.worst_where[0] = 0;
    double start = clock_seconds();
    for (const struct op_cases *c = row->cases; line == NULL && c->modes; c++)
        if ((c->modes & s->options.mode) && line_each(s, row, c->line, case_run) != 0) exit(2);
    if (line && line_each(s, row, line, case_run) != 0) exit(2);
    if (s->options.list || s->options.mode == OP_PERF || s->cases == cases) return;
    printf("%-4s %-16s %6lld cases %8lld checks %6.1f s", s->report.failures == failures ? "ok" : "FAIL", row->name,
           (long long)(s->cases - cases), (long long)(s->report.checks - checks), clock_seconds() - start);
    if (s->report.worst_where[0]) printf("   worst %.2f of the tolerance: %s", s->report.worst, s->report.worst_where);
    printf("\n");
    fflush(stdout);
}

static const struct op_row *const *const all_rows[] = {ops_basic_rows, ops_norm_rows,  ops_recurrent_rows,
                                                   ops_scan_rows, ops_mlstm_rows, ops_slstm_rows, ops_attention_rows,
                                                   ops_rat_rows, ops_cell_rows};
enum { ROW_LISTS = sizeof all_rows / sizeof *all_rows };

static bool row_named(const char *name, size_t length) {
    for (int l = 0; l < ROW_LISTS; l++)
        for (const struct op_row *const *row = all_rows[l]; *row; row++)
            if (strlen((*row)->name) == length && strncmp((*row)->name, name, length) == 0) return true;
    return false;
}

/* Walk the rows that a filter names (NULL: all). Returns how many. */
static int filter_run(struct session *s, const char *filter) {
    size_t length = filter ? strcspn(filter, " ") : 0;
    bool exact = filter && row_named(filter, length);
    const char *line = filter && filter[length] ? filter + length : NULL;
    int count = 0;
    for (int l = 0; l < ROW_LISTS; l++) {
        for (const struct op_row *const *row = all_rows[l]; *row; row++) {
            bool match = !filter || (exact ? strlen((*row)->name) == length && !strncmp((*row)->name, filter, length)
                                           : strstr((*row)->name, filter) != NULL);
            if (!match) continue;
            row_run(s, *row, line);
            count++;
        }
    }
    return count;
}

/* --- the command line --------------------------------------------------------------------------------------------- */

static int usage(const char *problem, const char *what) {
    fprintf(stderr,
            "ops: %s%s%s; usage: ops test|large|grad|perf|list [--device cpu|cuda] [--precision fp32|fp64|bf16] "
            "[--seed N] [--part I/N] [FILTER...]\n",
            problem, *what ? " " : "", what);
    return 2;
}

/* In the order of enum device_kind and enum precision. */
static const char *const devices[] = {"cpu", "cuda", NULL}, *const precisions[] = {"fp32", "fp64", "bf16", NULL};

static int choose(const char *text, const char *const *choices, int *choice) {
    for (*choice = 0; choices[*choice]; ++*choice)
        if (strcmp(text, choices[*choice]) == 0) return 0;
    return -1;
}

static int options_parse(struct options *o, int argc, char **argv) {
    static const char *const modes[] = {"test", "grad", "perf", "large"}; /* in the order of their bits */
    int choice;
    *o = (struct options){.precision = PRECISION_F32, .seed = 1, .parts = 1};
    if (argc < 2) return usage("a mode is missing", "");
    for (int i = 0; i < 4; i++)
        if (strcmp(argv[1], modes[i]) == 0) o->mode = 1 << i;
    o->list = strcmp(argv[1], "list") == 0;
    if (o->list) o->mode = OP_TEST | OP_GRAD | OP_PERF | OP_LARGE;
    if (o->mode == 0) return usage("there is no mode", argv[1]);
    int i = 2;
    for (; i < argc && strncmp(argv[i], "--", 2) == 0; i += 2) {
        const char *v = i + 1 < argc ? argv[i + 1] : "";
        char *end = "";
        if (strcmp(argv[i], "--device") == 0) {
            if (choose(v, devices, &choice) != 0) return usage("--device must be cpu or cuda, not", v);
            o->device = (enum device_kind)choice;
        } else if (strcmp(argv[i], "--precision") == 0) {
            if (choose(v, precisions, &choice) != 0) return usage("--precision must be fp32, fp64 or bf16, not", v);
            o->precision = (enum precision)choice;
        } else if (strcmp(argv[i], "--seed") == 0) {
            o->seed = strtoull(v, &end, 10);
            if (*v == 0 || *end) return usage("--seed must be a whole number, not", v);
        } else if (strcmp(argv[i], "--part") == 0) {
            int used = 0;
            if (sscanf(v, "%d/%d%n", &o->part, &o->parts, &used) < 2 || v[used] || o->part < 1 || o->part > o->parts)
                return usage("--part must be like 2/4, not", v);
            o->part--;
        } else {
            return usage("there is no option", argv[i]);
        }
    }
    o->filters = argv + i;
    o->filter_count = argc - i;
    return 0;
}

static int session_run(struct session *s) {
    const struct options *o = &s->options;
    if (o->mode == OP_PERF) {
        char machine[256];
        device_describe(s->dev, machine, sizeof machine);
        s->gemm_rate = measure_gemm(s);
        printf("%s, %s: y = x w^T of 1024 x 1024 runs at %.1f GFLOP/s\n", s->dev->ops->name, machine,
               s->gemm_rate * 1e-9);
    }
    for (int i = 0; i < (o->filter_count ? o->filter_count : 1); i++) {
        const char *filter = o->filter_count ? o->filters[i] : NULL;
        if (filter_run(s, filter) == 0) {
            fprintf(stderr, "ops: no row of the table is named '%s'; `ops list` shows the cases\n", filter);
            return 2;
        }
    }
    if (o->list) return 0;
    if (o->mode != OP_PERF || s->report.failures)
        printf("%s: %lld cases, %lld checks, %lld failures\n", s->report.mode, (long long)s->cases,
               (long long)s->report.checks, (long long)s->report.failures);
    return s->report.failures ? 1 : 0;
}

int main(int argc, char **argv) {
    struct session s = {0};
    char replay[64];
    error err = {0};
    int code = options_parse(&s.options, argc, argv);
    if (code != 0) return code;
    snprintf(replay, sizeof replay, " --device %s --precision %s --seed %llu", devices[s.options.device],
             precisions[s.options.precision], (unsigned long long)s.options.seed);
    s.report = (struct op_report){.program = argv[0], .mode = argv[1], .options = replay, .row = "gemm",
                                  .case_text = ""};
    if (device_open(&s.dev, s.options.device, s.options.precision, &err) != 0 ||
        device_open(&s.oracle, DEVICE_CPU, PRECISION_F64, &err) != 0) {
        fprintf(stderr, "ops: %s\n", err.text);
        device_close(s.dev);
        return error_exit_code(&err);
    }
    code = session_run(&s);
    device_close(s.oracle);
    device_close(s.dev);
    return code;
}
