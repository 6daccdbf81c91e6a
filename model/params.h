/* params.h: the tensor table: every parameter of a model, once.
 *
 * Initialisation, the optimizer, norm clipping, sharding, checkpoints, export and the tests all iterate over this
 * table; a new tensor is one line in its owner's `declare`. Names and shapes are those of the checkpoint (Hugging
 * Face's, where transformers has the architecture); kernels see other shapes of the same bytes (conv1d.weight (C,1,W)
 * as (C,W)).
 *
 * Gradients live in one flat array, cut into buckets, the unit of communication: embedding, one per block, final norm,
 * head. A bucket has two parts, by the type in which products and kernels read its weights:
 *
 *   flat:  [ bucket 0: rounded | real ][ bucket 1: rounded | real ] ...        a part:  [ rank 0 | rank 1 | ... ]
 *
 * rounded: matrices, where compute weights are bf16; real: the table's keep_real tensors, and everything where compute
 * weights are not rounded. Each part's length is a multiple of PARAM_ALIGN * ranks, so that rank r owns the r-th equal
 * slice of each (ZeRO-1), and each tensor starts on a multiple of PARAM_ALIGN; the gaps hold zeros. The weights that
 * kernels read lie in an array for each part, in the same order. Offsets therefore depend on the number of ranks and on
 * the precision, checkpoints don't: they store logical tensors.
 */
#ifndef RIVERRUN_PARAMS_H
#define RIVERRUN_PARAMS_H

#include "common/error.h"
#include "common/limits.h"
#include "kernels/tensor.h"

#define PARAM_ALIGN 16 /* elements: 64 bytes of f32 */
#define PARAM_DIMS 4

enum init_kind {
    INIT_CONSTANT,    /* a */
    INIT_NORMAL,      /* mean 0, standard deviation a */
    INIT_TRUNCATED,   /* INIT_NORMAL, drawn again until it lies within [-b, b] */
    INIT_UNIFORM,     /* [a, b) */
    INIT_LOG_UNIFORM, /* ln of Uniform[a, b): Mamba-2's A_log */
    INIT_LOG_COUNT,   /* ln of 1, 2, ..., a, over and over: Mamba's A_log, each row */
    INIT_DT_BIAS,     /* inverse softplus of max(exp(Uniform[ln a, ln b)), c) */
    INIT_LINSPACE,    /* c values evenly from a to b, both included; c = 1: a */
    INIT_FIRST_ROW,   /* c values evenly from a to b in the first row, as INIT_LINSPACE, and 0 in the others */
    INIT_SLSTM_BIAS,  /* sLSTM's (4, b): in row f, the second, 5 - 12 (j / (c-1))^a for j = 0 .. c-1, over and over */
};
struct init {
    enum init_kind kind;
    double a, b, c;
};

struct param {
    char name[LIMIT_NAME];
    int ndim;
    int64_t dim[PARAM_DIMS];
    struct init init;
    bool decay;     /* weight decay applies under the table's policy: 2-D projections and conv weights only */
    bool head;      /* the head's matrix, where it is not the embedding's; `decay` is false for it */
    bool keep_real; /* stays f32 where compute weights are bf16: A_log, D, dt_bias, norms, conv */
    double clamp;   /* after every step, and from the start, weights are kept within [-clamp, clamp]; 0 = as they are */
    bool filled;    /* one product gives its gradient, in every backward pass: params_filled */
    int bucket;
    int64_t count;  /* elements */
    int part;       /* enum part_kind; this and the next after params_layout */
    int64_t offset; /* elements from the start of the flat array; -1 before */
};

enum part_kind { PART_ROUNDED, PART_REAL, PARTS };
struct part {
    int64_t offset, count; /* elements of the flat array; count includes the padding, and may be 0 */
    int64_t place;         /* where its weights begin in the array of all parts of its kind */
};

struct bucket {
    int64_t offset, count; /* elements: both parts */
    struct part part[PARTS];
    int first, params; /* its entries in the table */
};

struct params {
    struct param *list;
    int count, capacity;
    struct bucket *buckets;
    int bucket_count;
    int64_t elements; /* of the flat array, padding included; after params_layout */
    int64_t part_elements[PARTS]; /* those of all parts of a kind */
    int64_t total;                /* logical parameters */
    int ranks;
    bool exhausted; /* there was no memory for a tensor or a bucket */
};

void params_open(struct params *p);
void params_close(struct params *p);
/* A table of its own with the same tensors and buckets: what a model lays out for its number of ranks. */
int params_copy(struct params *to, const struct params *from, error *err);
/* Whether everything that was added found memory; once, after the last params_add. */
int params_check(const struct params *p, error *err);

/* Append a tensor to the current bucket; returns its index. The name is formatted; dims given as an array. Without
 * memory nothing is added, and params_check tells. */
int params_add(struct params *p, int ndim, const int64_t *dim, struct init init, bool decay, bool keep_real,
               const char *name_format, ...) __attribute__((format(printf, 7, 8)));
/* The `count` tensors added last have gradients that a single linear_backward or head_loss adds to, before anything
 * else does and to all of it: the first micro-batch of a step need not find zeros there. */
void params_filled(struct params *p, int count);
/* The tensor added last is kept within [-limit, limit]; 0: not at all. */
void params_clamp(struct params *p, double limit);
/* Start a new bucket: the tensors added from now on belong to it. */
void params_next_bucket(struct params *p);
/* Fix offsets for this many ranks; `rounds`: products read weights rounded, so that there are two kinds of part. Called
 * once, after the last params_add. */
void params_layout(struct params *p, int ranks, bool rounds);

/* The next run at or behind element `from` of the flat array that no product fills: where it starts, and *count, 0 at
 * the end. */
int64_t params_unfilled(const struct params *p, int64_t from, int64_t *count);

int params_find(const struct params *p, const char *name); /* index, or -1 */

/* View of tensor `index` in a flat array of the given dtype, under its logical shape. */
tensor params_view(const struct params *p, int index, void *flat, enum dtype dtype);

/* Rank's slice of a part: the elements of the flat array that it owns. */
void params_slice(const struct params *p, int bucket, int part, int rank, int64_t *offset, int64_t *count);

/* Fill host memory `values` (count elements of `dtype`, f32 or f64) with tensor `index`'s initial values: a pure
 * function of (seed, index in table, element), so it does not depend on ranks, threads or dtype (up to rounding). */
void params_initial(const struct params *p, int index, uint64_t seed, void *values, enum dtype dtype);
/* The same for elements [from, from+count) only. */
void params_initial_part(const struct params *p, int index, uint64_t seed, int64_t from, int64_t count, void *values,
                         enum dtype dtype);

#endif
