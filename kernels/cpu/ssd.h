/* ssd.h: what the forward and the backward pass of SSD on the CPU share: the problem, its chunks, and the decays of one
 * head in one chunk. Used by ssd.c and ssd_backward.c only. */
#ifndef RIVERRUN_CPU_SSD_H
#define RIVERRUN_CPU_SSD_H

#include "kernels/cpu/cpu.h"

enum {
    SSD_ROWS = 64,  /* rows of a tile of the L x L products in a chunk: it stays in cache, half of them is skipped */
    SSD_PIVOT = 16, /* rows of a tile that share a pivot (see ssd_tile_decay) */
};

/* A smaller decay counts as 0: it would only bring subnormal numbers, which are slow, into the products. */
#ifdef REAL_IS_FLOAT
#define SSD_DECAY_MIN 1e-30f
#else
#define SSD_DECAY_MIN 1e-290
#endif

/* The arguments of a problem, with B..N as in ops.h, Q the chunk length (at most T) and K the number of chunks. */
struct ssd_problem {
    int64_t B, T, H, P, G, N, Q, K;
    tensor x, dt, a, b, c, d, initial, doc;
};

/* A chunk of one batch row: positions 0..L-1, which are times t0..t0+L-1. Document numbers never decrease, so the
 * masks are ranges. */
struct ssd_chunk {
    int64_t row, t0, L;
    const int32_t *doc; /* of its positions; NULL: all the same */
    int64_t entering;   /* positions before this one see the state that enters the chunk */
    int64_t leaving;    /* positions from this one on reach the state that leaves it */
    bool open;          /* the entering state itself reaches the state that leaves: one document all through */
};

/* Decays of one head in one chunk, each L long. */
struct ssd_decay {
    real *a, *dt;
    real *step; /* exp(a[i]) */
    real *into; /* exp(a[0] + ... + a[i]) where the entering state is seen, else 0 */
    real *out;  /* exp(a[j+1] + ... + a[L-1]) where the leaving state is reached, else 0; without dt[j] */
    real *work; /* for ssd_tile_decay */
    real whole; /* exp(a[0] + ... + a[L-1]) if the chunk is open, else 0 */
};

struct ssd_problem OP(ssd_problem)(tensor x, tensor dt, tensor a, tensor b, tensor c, tensor d, tensor initial,
                                   tensor doc, int64_t chunk);
struct ssd_chunk OP(ssd_chunk)(const struct ssd_problem *p, int64_t row, int64_t index);
void OP(ssd_decay)(struct ssd_decay *decay, const struct ssd_problem *p, const struct ssd_chunk *k, int64_t h);

/* First position of the chunk in the document of position i. */
int64_t OP(ssd_document_start)(const struct ssd_chunk *k, int64_t i);

/* e (i1-i0, i1-j0): exp(a[j+1] + ... + a[i]) for rows i0..i1-1 and columns j0..i1-1 where j <= i and both are in one
 * document, else 0. i0 is a multiple of SSD_PIVOT, i1 - i0 at most SSD_ROWS, j0 = ssd_document_start(i0). */
void OP(ssd_tile_decay)(real *e, const struct ssd_decay *decay, const struct ssd_chunk *k, int64_t i0, int64_t i1,
                        int64_t j0);

/* out (count,N) = rows (count,N) times scale[i] (times again[i] unless NULL). */
void OP(ssd_scale_rows)(real *out, const real *rows, int64_t step, const real *scale, const real *again, int64_t count,
                        int64_t N);

/* The vectors of one head in a chunk of Q. */
static inline struct ssd_decay ssd_carve_decay(struct carver *c, int64_t Q) {
    return (struct ssd_decay){.a = carve_reals(c, Q), .dt = carve_reals(c, Q), .step = carve_reals(c, Q),
                              .into = carve_reals(c, Q), .out = carve_reals(c, Q), .work = carve_reals(c, Q)};
}

/* Strided (B,T,...) arguments: the rows of one batch row from time t0 on, at offset `at` in the row. */
static inline real *ssd_rows(tensor t, int64_t row, int64_t t0, int64_t at) {
    return (real *)t.data + row * t.stride[0] + t0 * t.stride[1] + at;
}

/* The state (P,N) of head h in a (B,H,P,N) array. */
static inline real *ssd_state(const struct ssd_problem *p, void *states, int64_t row, int64_t h) {
    return (real *)states + (row * p->H + h) * p->P * p->N;
}

static inline int64_t ssd_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* `count` rounded up to whole vectors, at most `limit`: for loops over rows whose end holds zeros anyway. */
static inline int64_t ssd_whole(int64_t count, int64_t limit) {
    return ssd_min((count + SSD_PIVOT - 1) / SSD_PIVOT * SSD_PIVOT, limit);
}

/* exp(v) for an exponent that is at most 0 but for rounding; 0 where it is negligible. */
static inline real ssd_exp(real v) {
    real e = exp_real(v < 0 ? v : 0);
    return e < SSD_DECAY_MIN ? 0 : e;
}

#endif
