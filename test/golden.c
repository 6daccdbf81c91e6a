/* test/golden.c: golden vectors: inputs, results and gradients recorded from public reference implementations, against
 * the operations that training calls.
 *
 *   build/test/golden [--device cpu|cuda] [--precision fp32|fp64|bf16] FILE...
 *
 * Prints a line for each tensor: its error and the limit. Exit code 0: all within their limits; 1: some are not, or a
 * tensor of a file was not compared; 2: bad arguments, an unknown kind of file, a device that is not there.
 *
 * In fp32 and fp64 the results are compared with the file's. In bf16 they are compared with the double CPU table's on
 * the same inputs, rounded to bf16: what rounding inputs does to a result is not the device's fault.
 */
#include "test/golden.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *prefix; /* of the base name */
    int (*check)(struct golden *g, error *err);
} kinds[] = {
    {"hf-", golden_model},
    {"op-ssd", golden_ssd},
    {"op-selective-scan", golden_scan},
    {"op-mlstm", golden_mlstm},
    {"op-slstm", golden_slstm},
    {"op-rat", golden_rat},
    {"op-para", golden_cell},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

/* --- what the kinds use ------------------------------------------------------------------------- */

const struct safetensors_entry *golden_optional(struct golden *g, const char *name) {
    for (size_t i = 0; i < safetensors_count(g->file); i++) {
        const struct safetensors_entry *e = safetensors_at(g->file, i);
        if (strcmp(e->name, name) != 0) continue;
        g->used[i] = true;
        return e;
    }
    return NULL;
}

const struct safetensors_entry *golden_entry(struct golden *g, const char *name, error *err) {
    const struct safetensors_entry *e = golden_optional(g, name);
    if (!e) error_input(err, "%s has no tensor %s", g->path, name);
    return e;
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    ASSERT(memory != NULL);
    return memory;
}

double golden_limit(const struct golden *g) {
    const struct safetensors_entry *y = safetensors_find(g->file, "y");
    return g->dev->precision == PRECISION_F64 && y && y->dtype == ST_F64 ? 1e-9 : 2e-5;
}

double *golden_values(const struct safetensors_entry *e) {
    double *values = allocate(e->count, sizeof *values);
    safetensors_to_f64(e, 0, e->count, values);
    return values;
}

static uint16_t bf16_of(double value) {
    union {
        float f;
        uint32_t bits;
    } u = {(float)value};
    return (uint16_t)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

static double of_bf16(uint16_t value) {
    union {
        uint32_t bits;
        float f;
    } u = {(uint32_t)value << 16};
    return u.f;
}

double *golden_inputs(const struct golden *g, const struct safetensors_entry *e) {
    double *values = golden_values(e);
    for (uint64_t i = 0; g->rounded && i < e->count; i++) values[i] = of_bf16(bf16_of(values[i]));
    return values;
}

static void report(struct golden *g, const char *name, const char *note, double measure, double limit) {
    bool good = measure <= limit; /* not a number is not good */
    double share = isfinite(measure) ? measure / limit : INFINITY;
    g->compared++;
    g->failed += !good;
    if (share >= g->worst) {
        g->worst = share;
        snprintf(g->worst_name, sizeof g->worst_name, "%s", name);
    }
    printf("%s %-52s %9.2e  limit %.0e%s%s\n", good ? "ok  " : "FAIL", name, measure, limit, *note ? "  " : "", note);
}

void golden_fail(struct golden *g, const char *name, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("FAIL %-52s ", name);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    g->failed++;
}

void golden_judge(struct golden *g, const char *name, const char *note, const double *got, const double *want,
                  int64_t count, double limit) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(got[i]) || !isfinite(want[i])) difference = INFINITY;
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    report(g, name, note, difference == 0 ? 0 : sqrt(difference / size), limit);
}

/* --- bf16 --------------------------------------------------------------------------------------- */

static struct golden_record *record_find(struct golden *g, const char *name, const char *note) {
    for (struct golden_record *r = g->records; r; r = r->next)
        if (strcmp(r->name, name) == 0 && strcmp(r->note, note) == 0) return r;
    return NULL;
}

static void record(struct golden *g, const char *name, const char *note, const double *got, int64_t count) {
    struct golden_record *r = allocate(1, sizeof *r);
    ASSERT(!record_find(g, name, note));
    snprintf(r->name, sizeof r->name, "%s", name);
    snprintf(r->note, sizeof r->note, "%s", note);
    r->values = allocate((size_t)count, sizeof *r->values);
    memcpy(r->values, got, (size_t)count * sizeof *got);
    r->count = count;
    r->next = g->records;
    g->records = r;
}

static void records_free(struct golden *g) {
    for (struct golden_record *r = g->records, *next; r; r = next) {
        next = r->next;
        free(r->values);
        free(r);
    }
}

/* The norm behind an mLSTM divides by what may be small: its gradients are what rounding makes of them to a tenth. */
static bool of_xlstm(const struct golden *g) {
    return strncmp(g->base, "hf-xlstm", 8) == 0;
}

/* Outputs 2 %, gradients 5 %; those of decay rates and of the biases of step sizes are sums over all tokens that nearly
 * cancel, and that of the xLSTM's input gates does cancel but for rounding. */
static double bf16_limit(const struct golden *g, const char *name) {
    if (of_xlstm(g) && strstr(name, "igate_preact.bias")) return INFINITY;
    if (of_xlstm(g) && strncmp(name, "grad", 4) == 0) return name[4] == '.' ? 0.3 : 0.15;
    if (strncmp(name, "grad.", 5) != 0) return 2e-2;
    bool of_scan = strncmp(g->base, "op-selective-scan", 17) == 0;
    if (strstr(name, "A_log") || (of_scan && strcmp(name, "grad.A") == 0)) return 0.15;
    return strstr(name, "dt_bias") || strstr(name, "dt_proj.bias") || strstr(name, "delta_bias") ? 0.15 : 5e-2;
}

/* --- comparing ---------------------------------------------------------------------------------- */

/* What the file has under the name, if it has as many values. */
static double *wanted(struct golden *g, const char *name, const char *note, int64_t count) {
    const struct safetensors_entry *e = golden_optional(g, name);
    if (!e) golden_fail(g, name, "is not in the file");
    if (!e) return NULL;
    if (e->count != (uint64_t)count) {
        golden_fail(g, name, "has %llu values in the file, %lld were computed", (unsigned long long)e->count,
                    (long long)count);
        return NULL;
    }
    if (!g->rounded) return golden_values(e);
    struct golden_record *r = record_find(g, name, note);
    double *values = allocate((size_t)count, sizeof *values);
    ASSERT(r && r->count == count);
    memcpy(values, r->values, (size_t)count * sizeof *values);
    return values;
}

static void note_gradient(struct golden *g, const double *got, const double *want, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        g->gradient_difference += (got[i] - want[i]) * (got[i] - want[i]);
        g->gradient_size += want[i] * want[i];
    }
}

void golden_compare(struct golden *g, const char *name, const char *note, const double *got, int64_t count,
                    double limit) {
    if (g->recording) {
        record(g, name, note, got, count);
        return;
    }
    double *want = wanted(g, name, note, count);
    if (want) golden_judge(g, name, note, got, want, count, g->rounded ? bf16_limit(g, name) : limit);
    if (want && g->rounded && strncmp(name, "grad.", 5) == 0) note_gradient(g, got, want, count);
    free(want);
}

void golden_compare_each(struct golden *g, const char *name, const double *got, int64_t count, double limit) {
    if (g->recording) {
        record(g, name, "", got, count);
        return;
    }
    double *want = wanted(g, name, "", count), worst = 0;
    if (!want) return;
    for (int64_t i = 0; i < count; i++) {
        double difference = got[i] == want[i] ? 0 : fabs(got[i] - want[i]) / fabs(want[i]);
        if (!(difference <= worst)) worst = isfinite(difference) ? difference : INFINITY;
    }
    report(g, name, "", worst, g->rounded ? bf16_limit(g, name) : limit);
    free(want);
}

void golden_upload(struct golden *g, void *to, enum dtype dtype, const double *from, int64_t count) {
    ASSERT(dtype == DTYPE_F32 || dtype == DTYPE_F64 || dtype == DTYPE_BF16);
    float *single = allocate((size_t)count, sizeof *single);
    uint16_t *half = allocate((size_t)count, sizeof *half);
    for (int64_t i = 0; i < count; i++) single[i] = (float)from[i];
    for (int64_t i = 0; i < count; i++) half[i] = bf16_of(from[i]);
    const void *source = dtype == DTYPE_F64 ? (const void *)from : dtype == DTYPE_F32 ? (const void *)single : half;
    device_write(g->dev, to, source, (size_t)count * dtype_size(dtype));
    free(single);
    free(half);
}

void golden_download(struct golden *g, double *to, const void *from, enum dtype dtype, int64_t count) {
    ASSERT(dtype == DTYPE_F32 || dtype == DTYPE_F64 || dtype == DTYPE_BF16);
    void *raw = allocate((size_t)count, dtype_size(dtype));
    device_read(g->dev, raw, from, (size_t)count * dtype_size(dtype));
    for (int64_t i = 0; i < count; i++) {
        if (dtype == DTYPE_F64) to[i] = ((double *)raw)[i];
        else to[i] = dtype == DTYPE_F32 ? (double)((float *)raw)[i] : of_bf16(((uint16_t *)raw)[i]);
    }
    free(raw);
}

/* --- the program -------------------------------------------------------------------------------- */

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int kind_of(const char *path, error *err) {
    const char *base = base_name(path);
    for (int k = 0; k < KINDS; k++)
        if (strncmp(base, kinds[k].prefix, strlen(kinds[k].prefix)) == 0) return k;
    char known[256] = "";
    for (int k = 0; k < KINDS; k++) {
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", k ? ", " : "", kinds[k].prefix);
    }
    return error_input(err, "%s: the base name %s tells no kind of golden file; known are names that begin with %s",
                       path, base, known);
}

static int read_meta(struct golden *g, error *err) {
    const char *meta = safetensors_metadata(g->file, "meta");
    if (!meta) return error_input(err, "%s has no meta in its __metadata__", g->path);
    return json_read_python(&g->meta, meta, strlen(meta), g->path, err);
}

/* The double CPU table's results on rounded inputs. */
static int record_results(struct golden *g, int kind, error *err) {
    struct device *dev = g->dev;
    TRY(device_open(&g->dev, DEVICE_CPU, PRECISION_F64, err));
    g->rounded = g->recording = true;
    int result = kinds[kind].check(g, err);
    g->recording = false;
    device_close(g->dev);
    g->dev = dev;
    return result;
}

static int check_file(struct golden *g, int kind, error *err) {
    TRY(safetensors_open(&g->file, g->path, err));
    g->used = allocate(safetensors_count(g->file), sizeof *g->used);
    TRY(read_meta(g, err));
    if (g->dev->precision == PRECISION_BF16) TRY(record_results(g, kind, err));
    TRY(kinds[kind].check(g, err));
    if (g->rounded)
        report(g, "all gradients as one", "", sqrt(g->gradient_difference / g->gradient_size),
               of_xlstm(g) ? 0.15 : 2e-2);
    for (size_t i = 0; i < safetensors_count(g->file); i++)
        if (!g->used[i]) golden_fail(g, safetensors_at(g->file, i)->name, "is in the file but was not compared");
    return 0;
}

/* Returns the number of failures, or -1 with *err filled. */
static int run_file(const char *path, struct device *dev, error *err) {
    int kind = kind_of(path, err);
    if (kind < 0) return -1;
    struct golden g = {.path = path, .base = base_name(path), .dev = dev};
    printf("%s, %s\n", path, dev->ops->name);
    int result = check_file(&g, kind, err);
    if (result == 0)
        printf("%s: %d compared, %d failed; worst %.3g of its limit (%s)\n", g.base, g.compared, g.failed, g.worst,
               g.worst_name);
    json_decref(g.meta);
    records_free(&g);
    free(g.used);
    safetensors_close(g.file);
    return result == 0 ? g.failed : -1;
}

static int choose(const char *option, const char *value, const char *const *names, int *out, error *err) {
    for (int i = 0; names[i]; i++) {
        if (!value || strcmp(names[i], value) != 0) continue;
        *out = i;
        return 0;
    }
    char list[64] = "";
    for (int i = 0; names[i]; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "", names[i]);
    return error_input(err, "%s %s: it must be one of %s", option, value ? value : "(nothing)", list);
}

static int run(int argc, char **argv, error *err) {
    static const char *const devices[] = {"cpu", "cuda", NULL}, *const precisions[] = {"fp32", "fp64", "bf16", NULL};
    int device = DEVICE_CPU, precision = PRECISION_F32, first = 1, failed = 0;
    for (; first < argc && strncmp(argv[first], "--", 2) == 0; first += 2) {
        if (strcmp(argv[first], "--device") == 0)
            TRY(choose("--device", argv[first + 1], devices, &device, err));
        else if (strcmp(argv[first], "--precision") == 0)
            TRY(choose("--precision", argv[first + 1], precisions, &precision, err));
        else
            return error_input(err, "%s is no option; there are --device and --precision", argv[first]);
    }
    if (first >= argc)
        return error_input(err, "usage: golden [--device cpu|cuda] [--precision fp32|fp64|bf16] FILE...");
    for (int i = first; i < argc; i++)
        if (kind_of(argv[i], err) < 0) return -1; /* before any of them takes its time */
    struct device *dev;
    TRY(device_open(&dev, (enum device_kind)device, (enum precision)precision, err));
    for (int i = first; i < argc && failed >= 0; i++) {
        int failures = run_file(argv[i], dev, err);
        failed = failures < 0 ? -1 : failed + failures;
    }
    device_close(dev);
    return failed;
}

int main(int argc, char **argv) {
    error err = {0};
    int failed = run(argc, argv, &err);
    if (failed < 0) fprintf(stderr, "golden: %s\n", err.text);
    return failed < 0 ? error_exit_code(&err) : failed > 0;
}
