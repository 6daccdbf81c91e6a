/* test/golden.h: what the checks of golden vectors share: one file of recorded inputs and results, and the comparison.
 *
 * A file's kind is told by its base name. A kind is a function that feeds the file's inputs to the operations under
 * test and hands every result to golden_compare. Everything in the file has to be used, as an input or in a comparison:
 * what is left over at the end is a failure.
 */
#ifndef RIVERRUN_TEST_GOLDEN_H
#define RIVERRUN_TEST_GOLDEN_H

#include "common/json.h"
#include "common/safetensors.h"
#include "kernels/device.h"

/* A result of the double CPU table, which one of bf16 is compared with. */
struct golden_record {
    char name[LIMIT_NAME], note[32];
    double *values;
    int64_t count;
    struct golden_record *next;
};

struct golden {
    const char *path, *base;
    safetensors *file;
    json_t *meta; /* the JSON text under __metadata__.meta */
    struct device *dev;
    bool *used; /* for each entry of the file */
    int compared, failed;
    double worst; /* largest share of a limit */
    char worst_name[LIMIT_NAME];
    /* In bf16 the file's own results say little: inputs are rounded. So the kind runs twice, on the double CPU table
     * and then on the device, both times with every input rounded to bf16; the second is compared with the first. */
    bool rounded;   /* inputs are rounded, and what the file records is not compared */
    bool recording; /* this is the first run */
    struct golden_record *records;
    double gradient_difference, gradient_size; /* squared norms, over all gradients */
};

/* Kinds. Return 0, or -1 with *err filled if the file can't be run at all. */
int golden_ssd(struct golden *g, error *err);   /* op-ssd*: test/golden_ssd.c */
int golden_scan(struct golden *g, error *err);  /* op-selective-scan*: test/golden_scan.c */
int golden_mlstm(struct golden *g, error *err); /* op-mlstm*: test/golden_mlstm.c */
int golden_slstm(struct golden *g, error *err); /* op-slstm*: test/golden_slstm.c */
int golden_rat(struct golden *g, error *err);   /* op-rat*: test/golden_rat.c */
int golden_cell(struct golden *g, error *err);  /* op-para*: test/golden_cell.c */
int golden_model(struct golden *g, error *err); /* hf-*: test/golden_model.c */

/* An entry of the file, marked as used; absent: NULL with *err filled. `optional`: NULL and no error. */
const struct safetensors_entry *golden_entry(struct golden *g, const char *name, error *err);
const struct safetensors_entry *golden_optional(struct golden *g, const char *name);

/* The limit of an operation's results, y and gradients: that of double only where both sides are. */
double golden_limit(const struct golden *g);
/* All values of an entry as doubles; the caller frees. */
double *golden_values(const struct safetensors_entry *e);
/* The same of an input: rounded to bf16 where inputs are. */
double *golden_inputs(const struct golden *g, const struct safetensors_entry *e);

/* Compare `got` with what the file has under `name`, print a line, count. The measure is ||got - want|| / ||want||;
 * exact zeros must be matched exactly, and nothing may be other than finite. A missing or differently sized entry
 * fails. Where inputs are rounded, `got` is compared with the double CPU table's, and the limit is that of bf16 for
 * this name. */
void golden_compare(struct golden *g, const char *name, const char *note, const double *got, int64_t count,
                    double limit);
/* The same for numbers that each have to agree: the largest relative difference of any. */
void golden_compare_each(struct golden *g, const char *name, const double *got, int64_t count, double limit);
/* A comparison whose two sides the caller has made: a change of weights, say. */
void golden_judge(struct golden *g, const char *name, const char *note, const double *got, const double *want,
                  int64_t count, double limit);
void golden_fail(struct golden *g, const char *name, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Host doubles to and from device memory of f32, f64 or bf16. */
void golden_upload(struct golden *g, void *to, enum dtype dtype, const double *from, int64_t count);
void golden_download(struct golden *g, double *to, const void *from, enum dtype dtype, int64_t count);

#endif
