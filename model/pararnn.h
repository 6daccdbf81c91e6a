/* pararnn.h: the options and sizes of the ParaRNN layer (arXiv 2510.21450), for those who must know more of it than
 * mixer.h tells. */
#ifndef RIVERRUN_PARARNN_H
#define RIVERRUN_PARARNN_H

#include "kernels/cells/cells.h"
#include "model/mixer.h"

enum pararnn_solver { PARARNN_AUTO, PARARNN_SEQUENTIAL, PARARNN_NEWTON, PARARNN_SHOOTING };
enum pararnn_gate { PARARNN_GATE_FIRST, PARARNN_NORM_FIRST };
enum pararnn_init { PARARNN_INIT_PAPER, PARARNN_INIT_CODE };

struct pararnn_options { /* keys of [block.NAME] with mixer = pararnn */
    int cell;            /* place in cells[] */
    int64_t heads;       /* H */
    int64_t d_conv;      /* W; 0 = no convolution */
    bool conv_silu;
    int gate_order;      /* enum pararnn_gate */
    double weight_limit; /* of the cell's weights; 0 = none */
    int cell_init;       /* enum pararnn_init */
    int solver;          /* enum pararnn_solver */
    int64_t iterations, chunk;
    bool bounded;
};

/* The sizes that follow: D channels in and out, U numbers for each enter the cell, which has S states of it and V
 * weights. */
struct pararnn_sizes {
    int64_t D, H, W, U, S, V;
    const struct cell *cell;
};
struct pararnn_sizes pararnn_sizes(const struct pararnn_options *options, int64_t d_model);

#endif
