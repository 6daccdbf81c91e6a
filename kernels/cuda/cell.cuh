/* cell.cuh: what the files of the nonlinear recurrences share: the problem, how time is cut into chunks, what lies
 * between chunks, and what each_cell_*.cu has for each cell. cell.cu calls them, and has the scan over chunks.
 */
#ifndef RIVERRUN_CUDA_CELL_CUH
#define RIVERRUN_CUDA_CELL_CUH

#include "kernels/cuda/launch.cuh"

extern "C" {
#include "kernels/cells/cells.h"
}

struct cell_problem {
    int64_t B, T, N, width;       /* width: channels of a head, N / H */
    int64_t chunk, chunks;        /* tokens of a chunk; chunks of a row */
    const void *u;                /* act */
    int64_t u_row, u_step;        /* elements from row to row, from token to token */
    const float *bias, *initial;  /* NULL when absent */
    const float *weight;
    const int32_t *doc;           /* NULL: one document a row */
    enum dtype act;
    bool wide; /* 16 bytes of everything that is read or written by token may be moved at once */
    float bound; /* of corrected states; 0: unbounded */
};

/* What forward puts out. */
struct cell_outputs {
    void *y, *others;   /* act; others: NULL when absent */
    float *final;       /* NULL when absent */
    unsigned *residual; /* of the report, as bits: those of positive floats are ordered as they are. NULL when absent */
};

/* What lies between chunks, in scratch: arrays (B, chunks, S, N), `product` (B, chunks, S, S, N). For chunk j, forward:
 * `before` are the unknown states before its first token as they are so far; `rest` and `product` say what a correction
 * d of these does to the states before the next chunk: it corrects those by rest + product d. Backward: the gradient
 * that goes to the left of the chunk is rest + product times the one that comes from the right, which is in `d`. */
struct cell_chunks {
    float *before, *rest, *product;
    float *d, *corrected; /* Newton: the corrections, and `before` with them, clamped; else corrected is `before` */
};

/* What a walk of Newton's method does; each_cell_newton.cu. */
struct cell_newton {
    float *states; /* (B, T, S, N) */
    bool guess;    /* the states so far are the guess, which is computed again instead of read */
    bool correct, assemble;
    bool report;   /* its residuals are what the last correction starts from */
};

struct cell_gradients {
    void *du; /* act */
    int64_t du_row, du_step;
    const void *dy, *y, *others; /* act */
    float *dinitial;             /* NULL when absent */
    float *sums;                 /* (B, chunks, U + W, N): what adds up to dbias and to dweight */
};

/* One cell's launchers. */
struct cell_kernels {
    /* From the states before each chunk but the first to the solution. */
    void (*run)(struct device *dev, const cell_problem &p, cell_outputs out, const float *before);
    /* From there to `rest` and `product`; in round 0 `before` is guessed, and put out. */
    void (*sweep)(struct device *dev, const cell_problem &p, cell_chunks c, int round);
    void (*step)(struct device *dev, const cell_problem &p, void *y, float *state);
    void (*newton)(struct device *dev, const cell_problem &p, cell_outputs out, cell_chunks c, cell_newton n);
    /* Backward: rest and product of each chunk, from right to left; then gradients, from d. */
    void (*totals)(struct device *dev, const cell_problem &p, cell_gradients g, cell_chunks c);
    void (*gradients)(struct device *dev, const cell_problem &p, cell_gradients g, const float *d);
};

#define CELL_LAUNCHERS(name)                                                                                           \
    void cell_run_##name(struct device *, const cell_problem &, cell_outputs, const float *);                          \
    void cell_sweep_##name(struct device *, const cell_problem &, cell_chunks, int);                                   \
    void cell_step_##name(struct device *, const cell_problem &, void *, float *);                                     \
    void cell_newton_##name(struct device *, const cell_problem &, cell_outputs, cell_chunks, cell_newton);            \
    void cell_totals_##name(struct device *, const cell_problem &, cell_gradients, cell_chunks);                       \
    void cell_gradients_##name(struct device *, const cell_problem &, cell_gradients, const float *);
CELLS(CELL_LAUNCHERS)
#undef CELL_LAUNCHERS

#endif
