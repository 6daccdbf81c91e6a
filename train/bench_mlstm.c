/* bench_mlstm.c: rows of the mLSTM and of its gates' soft cap for riverrun bench ops. bench_ops.h says what a row is;
 * train/bench_cases.c gives rows their shapes. Called by bench_ops.c.
 *
 * Letters beside those of kernels/tensor.h: K and V (widths of q and k, and of v), d (1: with documents), p (elements
 * between rows of the views that a model cuts from the output of a product). */
#include "train/bench_ops.h"

#define SIZE(letter) bench_size(p, #letter[0])
#define VALUE(name) bench_value(p, name)
#define GRADIENT(name) bench_gradient(p, name)

enum { CHUNK = 64 };

static const struct mlstm_rule rule = {.normalise = true, .eps = 1e-6};

static struct bench_operand *spread(struct bench_operand *o, double mean, double size) {
    o->mean = mean;
    o->spread = size;
    return o;
}

static struct bench_operand *strided(struct bench_operand *o, int lead, int64_t pitch) {
    o->lead = pitch ? lead : 0;
    o->pitch = pitch;
    return o;
}

static struct bench_operand *real(struct bench_operand *o) {
    o->type = o->gradient_type = BENCH_REAL;
    return o;
}

static struct mlstm_shape mlstm_shape(const struct bench_problem *p) {
    return (struct mlstm_shape){SIZE(B), SIZE(T), SIZE(H), SIZE(K), SIZE(V), CHUNK};
}

/* q and k lean to one side: n . q is not the small difference of large numbers, and the check means something. */
static void mlstm_declare(struct bench_problem *p) {
    strided(spread(bench_input(p, "q", "BTHK"), 0.5, 1), 2, SIZE(p));
    strided(spread(bench_input(p, "k", "BTHK"), 0.5, 1), 2, SIZE(p));
    strided(bench_input(p, "v", "BTHV"), 2, SIZE(p));
    real(bench_input(p, "i", "BTH"));
    real(spread(bench_input(p, "f", "BTH"), 4, 1)); /* as in a model: memories of some dozens of tokens */
    bench_output(p, "h", "BTHV");
    if (SIZE(d)) bench_indices(p, "doc", "BT", BENCH_DOCUMENTS);
    size_t ahead = p->ops->mlstm_forward_scratch(mlstm_shape(p)), back = p->ops->mlstm_backward_scratch(mlstm_shape(p));
    p->saved_bytes = p->ops->mlstm_saved(mlstm_shape(p));
    p->scratch_bytes = ahead > back ? ahead : back;
}

static void mlstm_forward(struct bench_problem *p) {
    const struct mlstm_state none = {tensor_none(), tensor_none(), tensor_none()};
    p->ops->mlstm_forward(p->dev, VALUE("h"), none, p->saved, VALUE("q"), VALUE("k"), VALUE("v"), VALUE("i"),
                          VALUE("f"), none, VALUE("doc"), rule, CHUNK, p->scratch);
}

static void mlstm_backward(struct bench_problem *p) {
    const struct mlstm_state none = {tensor_none(), tensor_none(), tensor_none()};
    p->ops->mlstm_backward(p->dev, GRADIENT("q"), GRADIENT("k"), GRADIENT("v"), GRADIENT("i"), GRADIENT("f"), none,
                           GRADIENT("h"), none, p->saved, VALUE("h"), VALUE("q"), VALUE("k"), VALUE("v"), VALUE("i"),
                           VALUE("f"), none, VALUE("doc"), rule, CHUNK, p->scratch);
}

/* Products of the chunked form with chunks of Q = 64, for each token and head: q k^T and what it weighs of v, 2 Q K and
 * 2 Q V (half of it is above the diagonal, and is computed), into the state and out of it 2 K V each. Backward has q
 * k^T again, dh v^T, and a product of that size each for dq, dk, dv; with the state, one each for dC, dq, dk, dv. */
static void mlstm_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    double heads = (double)(SIZE(B) * SIZE(T) * SIZE(H)), K = (double)SIZE(K), V = (double)SIZE(V), Q = CHUNK;
    forward->products = heads * (2 * Q * (K + V) + 4 * K * V);
    both->products = forward->products + heads * (2 * Q * (3 * K + 2 * V) + 8 * K * V);
}

const struct bench_row bench_mlstm = {.name = "mlstm",
                                      .slice = "B=1 H=1 V=4",
                                      .declare = mlstm_declare,
                                      .forward = mlstm_forward,
                                      .backward = mlstm_backward,
                                      .work = mlstm_work};

/* ---- soft cap --------------------------------------------------------------------------------------------------- */

static const double cap = 15;

static void softcap_declare(struct bench_problem *p) {
    struct bench_operand *x = real(spread(bench_input(p, "x", "RN"), 0, 5));
    x->gradient_type = BENCH_ACT; /* it goes into products */
    bench_parameter(p, "bias", "N");
    real(bench_output(p, "y", "RN"));
    p->scratch_bytes = p->ops->softcap_backward_scratch(SIZE(R), SIZE(N));
}

static void softcap_forward(struct bench_problem *p) {
    p->ops->softcap_forward(p->dev, VALUE("y"), VALUE("x"), VALUE("bias"), cap);
}

static void softcap_backward(struct bench_problem *p) {
    p->ops->softcap_backward(p->dev, GRADIENT("x"), GRADIENT("bias"), GRADIENT("y"), VALUE("y"), cap, p->scratch);
}

const struct bench_row bench_softcap = {.name = "softcap",
                                        .slice = "N=2",
                                        .declare = softcap_declare,
                                        .forward = softcap_forward,
                                        .backward = softcap_backward};
