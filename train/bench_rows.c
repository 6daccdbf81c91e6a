/* bench_rows.c: one row for each operation that riverrun bench ops measures: its operands, its calls, and the work that
 * it can't avoid. bench_ops.h says what a row is; train/bench_cases.c gives rows their shapes. Called by bench_ops.c.
 *
 * Letters: those of kernels/tensor.h; also d (1: with documents), p and q (elements between rows of the views that a
 * model cuts from the output of a product; 0: rows lie together), n (elements of a flat array), S (of a small one), a
 * (the activation: its number in enum activation), l (1: LayerNorm), s and z (1: with skip, with gate). */
#include "train/bench_ops.h"

#include <math.h>
#include <string.h>

#define SIZE(letter) bench_size(p, #letter[0])
#define VALUE(name) bench_value(p, name)
#define GRADIENT(name) bench_gradient(p, name)

static struct bench_operand *strided(struct bench_operand *o, int lead, int64_t pitch) {
    o->lead = lead;
    o->pitch = pitch;
    return o;
}

static struct bench_operand *spread(struct bench_operand *o, double mean, double spread) {
    o->mean = mean;
    o->spread = spread;
    return o;
}

static struct bench_operand *square(struct bench_operand *o, double mean, double spread) {
    o->fill = BENCH_SQUARE;
    o->mean = mean;
    o->spread = spread;
    return o;
}

/* A tensor whose gradient, and perhaps value, is real on every table. */
static struct bench_operand *real(struct bench_operand *o) {
    o->type = o->gradient_type = BENCH_REAL;
    return o;
}

static void documents(struct bench_problem *p) {
    if (SIZE(d)) bench_indices(p, "doc", "BT", BENCH_DOCUMENTS);
}

static double tokens(const struct bench_problem *p) {
    return (double)SIZE(B) * (double)SIZE(T);
}

static double rows(const struct bench_problem *p) {
    return (double)SIZE(R);
}

/* ---- embedding -------------------------------------------------------------------------------------------------- */

static void embedding_declare(struct bench_problem *p) {
    bench_indices(p, "tokens", "R", BENCH_TOKENS);
    bench_parameter(p, "table", "VD");
    real(bench_output(p, "out", "RD"));
    p->scratch_bytes = p->ops->embedding_backward_scratch(SIZE(R), SIZE(D), SIZE(V));
}

static void embedding_forward(struct bench_problem *p) {
    p->ops->embedding_forward(p->dev, VALUE("out"), VALUE("tokens"), VALUE("table"));
}

static void embedding_backward(struct bench_problem *p) {
    p->ops->embedding_backward(p->dev, GRADIENT("table"), GRADIENT("out"), VALUE("tokens"), p->scratch);
}

/* Rows of the table are touched only where a token asks for them. */
static void embedding_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    double row = (double)SIZE(D) * (double)dtype_size(p->ops->real), touched = fmin(rows(p), (double)SIZE(V));
    forward->bytes = rows(p) * (row + 4) + touched * row;
    both->bytes = forward->bytes + rows(p) * (row + 4) + 2 * touched * row;
}

const struct bench_row bench_embedding = {.name = "embedding",
                                          .slice = "D=8",
                                          .declare = embedding_declare,
                                          .forward = embedding_forward,
                                          .backward = embedding_backward,
                                          .work = embedding_work};

/* ---- residual add + norm ---------------------------------------------------------------------------------------- */

static const double norm_eps = 1e-5;

static void add_norm_declare(struct bench_problem *p) {
    real(bench_input(p, "residual", "RD"));
    bench_input(p, "branch", "RD");
    spread(bench_parameter(p, "weight", "D"), 1, 0.1);
    real(bench_output(p, "out_residual", "RD"));
    bench_output(p, "y", "RD");
    if (SIZE(l)) bench_statistic(p, "mean", "R");
    bench_statistic(p, "rstd", "R");
    p->scratch_bytes = p->ops->add_norm_backward_scratch(SIZE(R), SIZE(D));
}

static void add_norm_forward(struct bench_problem *p) {
    p->ops->add_norm_forward(p->dev, VALUE("out_residual"), VALUE("y"), VALUE("mean"), VALUE("rstd"), VALUE("residual"),
                             tensor_none(), VALUE("branch"), VALUE("weight"), norm_eps);
}

static void add_norm_backward(struct bench_problem *p) {
    p->ops->add_norm_backward(p->dev, GRADIENT("residual"), GRADIENT("branch"), GRADIENT("weight"), tensor_none(),
                              GRADIENT("y"), GRADIENT("out_residual"), VALUE("out_residual"), VALUE("mean"),
                              VALUE("rstd"), VALUE("weight"), tensor_none(), p->scratch);
}

/* Backward reads the sum in place of the two that were added. */
static void add_norm_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    (void)forward;
    both->bytes -= rows(p) * (double)SIZE(D) * (double)dtype_size(p->ops->act);
}

const struct bench_row bench_add_norm = {.name = "add_norm",
                                         .slice = "R=64",
                                         .declare = add_norm_declare,
                                         .forward = add_norm_forward,
                                         .backward = add_norm_backward,
                                         .work = add_norm_work};

/* ---- linear ----------------------------------------------------------------------------------------------------- */

static struct bench_operand *weight(struct bench_problem *p, const char *name, const char *letters, double inputs) {
    struct bench_operand *o = spread(bench_input(p, name, letters), 0, 1 / sqrt(inputs));
    o->has_gradient = BENCH_ADDED;
    o->gradient_type = BENCH_REAL;
    return o;
}

static void linear_declare(struct bench_problem *p) {
    strided(bench_input(p, "x", "RI"), 1, SIZE(p));
    weight(p, "w", "OI", (double)SIZE(I));
    strided(bench_output(p, "y", "RO"), 1, SIZE(q));
}

static void linear_forward(struct bench_problem *p) {
    p->ops->linear_forward(p->dev, VALUE("y"), VALUE("x"), VALUE("w"), tensor_none());
}

static void linear_backward(struct bench_problem *p) {
    p->ops->linear_backward(p->dev, GRADIENT("x"), false, GRADIENT("w"), tensor_none(), GRADIENT("y"), VALUE("x"),
                            VALUE("w"));
}

static void linear_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->products = 2 * rows(p) * (double)SIZE(I) * (double)SIZE(O);
    both->products = 3 * forward->products;
}

const struct bench_row bench_linear = {.name = "linear",
                                       .slice = "R=32 O=32",
                                       .declare = linear_declare,
                                       .forward = linear_forward,
                                       .backward = linear_backward,
                                       .work = linear_work};

/* ---- block-diagonal linear -------------------------------------------------------------------------------------- */

static void block_linear_declare(struct bench_problem *p) {
    p->size['M'] = SIZE(G) * SIZE(I);
    p->size['N'] = SIZE(G) * SIZE(O);
    bench_input(p, "x", "RM");
    weight(p, "w", "GOI", (double)SIZE(I));
    bench_output(p, "y", "RN");
    p->scratch_bytes = p->ops->block_linear_backward_scratch(SIZE(R), SIZE(G), SIZE(O), SIZE(I));
}

static void block_linear_forward(struct bench_problem *p) {
    p->ops->block_linear_forward(p->dev, VALUE("y"), VALUE("x"), VALUE("w"));
}

static void block_linear_backward(struct bench_problem *p) {
    p->ops->block_linear_backward(p->dev, GRADIENT("x"), false, GRADIENT("w"), GRADIENT("y"), VALUE("x"), VALUE("w"),
                                  p->scratch);
}

static void block_linear_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->products = 2 * rows(p) * (double)(SIZE(G) * SIZE(O) * SIZE(I));
    both->products = 3 * forward->products;
}

const struct bench_row bench_block_linear = {.name = "block_linear",
                                             .slice = "R=64",
                                             .declare = block_linear_declare,
                                             .forward = block_linear_forward,
                                             .backward = block_linear_backward,
                                             .work = block_linear_work};

/* ---- convolution + SiLU ----------------------------------------------------------------------------------------- */

static void conv_declare(struct bench_problem *p) {
    p->size['W'] = 4;
    strided(bench_input(p, "x", "BTC"), 2, SIZE(p));
    spread(bench_parameter(p, "weight", "CW"), 0, 0.5);
    bench_parameter(p, "bias", "C");
    bench_output(p, "y", "BTC");
    documents(p);
    p->scratch_bytes = p->ops->conv_backward_scratch(SIZE(B), SIZE(T), SIZE(C), SIZE(W));
}

static void conv_forward(struct bench_problem *p) {
    p->ops->conv_forward(p->dev, VALUE("y"), tensor_none(), VALUE("x"), VALUE("weight"), VALUE("bias"), tensor_none(),
                         VALUE("doc"), true);
}

static void conv_backward(struct bench_problem *p) {
    p->ops->conv_backward(p->dev, GRADIENT("x"), tensor_none(), GRADIENT("weight"), GRADIENT("bias"), GRADIENT("y"),
                          tensor_none(), VALUE("x"), VALUE("weight"), VALUE("bias"), tensor_none(), VALUE("doc"),
                          true, p->scratch);
}

/* An exponential and a reciprocal for each sigmoid. */
static void conv_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->special = 2 * tokens(p) * (double)SIZE(C);
    both->special = 2 * forward->special;
}

const struct bench_row bench_conv = {.name = "conv",
                                     .slice = "B=1 C=4",
                                     .declare = conv_declare,
                                     .forward = conv_forward,
                                     .backward = conv_backward,
                                     .work = conv_work};

static void conv_step_declare(struct bench_problem *p) {
    p->size['W'] = 4;
    p->size['K'] = 3;
    strided(bench_input(p, "x", "BC"), 1, SIZE(p));
    spread(bench_parameter(p, "weight", "CW"), 0, 0.5);
    bench_parameter(p, "bias", "C");
    bench_state(p, "state", "BKC");
    bench_output(p, "y", "BC");
}

static void conv_step_forward(struct bench_problem *p) {
    p->ops->conv_step(p->dev, VALUE("y"), VALUE("state"), VALUE("x"), VALUE("weight"), VALUE("bias"), true);
}

const struct bench_row bench_conv_step = {
    .name = "conv_step", .slice = "B=2", .declare = conv_step_declare, .forward = conv_step_forward};

/* ---- SSD step sizes --------------------------------------------------------------------------------------------- */

static void ssd_dt_declare(struct bench_problem *p) {
    strided(bench_input(p, "raw", "BTH"), 2, SIZE(p));
    spread(bench_parameter(p, "bias", "H"), -4, 1);
    spread(bench_parameter(p, "A_log", "H"), 1.9, 0.6);
    real(bench_output(p, "dt", "BTH"));
    real(bench_output(p, "a", "BTH"));
    p->scratch_bytes = p->ops->ssd_dt_backward_scratch(SIZE(B), SIZE(T), SIZE(H));
}

static void ssd_dt_forward(struct bench_problem *p) {
    p->ops->ssd_dt_forward(p->dev, VALUE("dt"), VALUE("a"), VALUE("raw"), VALUE("bias"), VALUE("A_log"), 0, HUGE_VAL);
}

static void ssd_dt_backward(struct bench_problem *p) {
    p->ops->ssd_dt_backward(p->dev, GRADIENT("raw"), GRADIENT("bias"), GRADIENT("A_log"), GRADIENT("dt"), GRADIENT("a"),
                            VALUE("raw"), VALUE("bias"), VALUE("A_log"), 0, HUGE_VAL, p->scratch);
}

const struct bench_row bench_ssd_dt = {.name = "ssd_dt",
                                       .slice = "B=1 H=2",
                                       .declare = ssd_dt_declare,
                                       .forward = ssd_dt_forward,
                                       .backward = ssd_dt_backward};

/* ---- SSD -------------------------------------------------------------------------------------------------------- */

enum { SSD_CHUNK = 64 }; /* of configs/mamba2 */

static struct ssd_shape ssd_shape(const struct bench_problem *p) {
    return (struct ssd_shape){SIZE(B), SIZE(T), SIZE(H), SIZE(P), SIZE(G), SIZE(N), SSD_CHUNK};
}

static void ssd_declare(struct bench_problem *p) {
    p->size['G'] = 1;
    strided(bench_input(p, "x", "BTHP"), 2, SIZE(p));
    square(real(bench_input(p, "dt", "BTH")), 0.002, 0.02); /* as after training: most near 0, some long steps */
    square(real(bench_input(p, "a", "BTH")), -0.002, -0.1);
    strided(bench_input(p, "b", "BTGN"), 2, SIZE(p));
    strided(bench_input(p, "c", "BTGN"), 2, SIZE(p));
    bench_parameter(p, "d", "H");
    bench_output(p, "y", "BTHP");
    documents(p);
    size_t ahead = p->ops->ssd_forward_scratch(ssd_shape(p)), back = p->ops->ssd_backward_scratch(ssd_shape(p));
    p->saved_bytes = p->ops->ssd_saved(ssd_shape(p));
    p->scratch_bytes = ahead > back ? ahead : back;
}

static void ssd_forward(struct bench_problem *p) {
    p->ops->ssd_forward(p->dev, VALUE("y"), tensor_none(), p->saved, VALUE("x"), VALUE("dt"), VALUE("a"), VALUE("b"),
                        VALUE("c"), VALUE("d"), tensor_none(), VALUE("doc"), SSD_CHUNK, p->scratch);
}

static void ssd_backward(struct bench_problem *p) {
    p->ops->ssd_backward(p->dev, GRADIENT("x"), GRADIENT("dt"), GRADIENT("a"), GRADIENT("b"), GRADIENT("c"),
                         tensor_none(), GRADIENT("d"), GRADIENT("y"), tensor_none(), p->saved, VALUE("x"), VALUE("dt"),
                         VALUE("a"), VALUE("b"), VALUE("c"), VALUE("d"), tensor_none(), VALUE("doc"), SSD_CHUNK,
                         p->scratch);
}

/* Products of the chunked form with chunks of Q = 64, for each token and head: with the chunk before it 2 Q P (half of
 * it is above the diagonal, and is computed), into the state and out of it 2 N P each; for each group c b^T, 2 Q N.
 * Backward has each of the first kind twice, those with the state four times in all, and the states once more. */
static void ssd_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    double heads = tokens(p) * (double)SIZE(H), groups = tokens(p) * (double)SIZE(G);
    double P = (double)SIZE(P), N = (double)SIZE(N), Q = 64;
    forward->products = heads * (2 * Q * P + 4 * N * P) + groups * 2 * Q * N;
    both->products = forward->products + heads * (4 * Q * P + 8 * N * P) + groups * 6 * Q * N;
}

const struct bench_row bench_ssd = {.name = "ssd",
                                    .slice = "B=1 H=1 P=4",
                                    .declare = ssd_declare,
                                    .forward = ssd_forward,
                                    .backward = ssd_backward,
                                    .work = ssd_work};

static void ssd_step_declare(struct bench_problem *p) {
    p->size['G'] = 1;
    strided(bench_input(p, "x", "BHP"), 1, SIZE(p));
    square(real(bench_input(p, "dt", "BH")), 0.002, 0.02);
    square(real(bench_input(p, "a", "BH")), -0.002, -0.1);
    strided(bench_input(p, "b", "BGN"), 1, SIZE(p));
    strided(bench_input(p, "c", "BGN"), 1, SIZE(p));
    bench_parameter(p, "d", "H");
    bench_state(p, "state", "BHPN");
    bench_output(p, "y", "BHP");
}

static void ssd_step_forward(struct bench_problem *p) {
    p->ops->ssd_step(p->dev, VALUE("y"), VALUE("state"), VALUE("x"), VALUE("dt"), VALUE("a"), VALUE("b"), VALUE("c"),
                     VALUE("d"));
}

const struct bench_row bench_ssd_step = {
    .name = "ssd_step", .slice = "B=2", .declare = ssd_step_declare, .forward = ssd_step_forward};

/* ---- selective scan --------------------------------------------------------------------------------------------- */

static struct scan_shape scan_shape(const struct bench_problem *p) {
    return (struct scan_shape){SIZE(B), SIZE(T), SIZE(D), SIZE(N)};
}

static void scan_parameters(struct bench_problem *p) {
    spread(bench_parameter(p, "bias", "D"), -4, 1); /* step sizes around 0.02, as the papers initialise them */
    spread(bench_parameter(p, "A_log", "DN"), 1.9, 0.6);
    bench_parameter(p, "d", "D");
}

static void scan_declare(struct bench_problem *p) {
    bench_input(p, "x", "BTD");
    bench_input(p, "raw", "BTD");
    scan_parameters(p);
    strided(bench_input(p, "b", "BTN"), 2, SIZE(q));
    strided(bench_input(p, "c", "BTN"), 2, SIZE(q));
    strided(bench_input(p, "z", "BTD"), 2, SIZE(p));
    bench_output(p, "g", "BTD");
    documents(p);
    size_t ahead = p->ops->scan_forward_scratch(scan_shape(p)), back = p->ops->scan_backward_scratch(scan_shape(p));
    p->saved_bytes = p->ops->scan_saved(scan_shape(p));
    p->scratch_bytes = ahead > back ? ahead : back;
}

static void scan_forward(struct bench_problem *p) {
    p->ops->scan_forward(p->dev, VALUE("g"), tensor_none(), p->saved, VALUE("x"), VALUE("raw"), VALUE("bias"),
                         VALUE("A_log"), VALUE("b"), VALUE("c"), VALUE("d"), VALUE("z"), tensor_none(), VALUE("doc"),
                         p->scratch);
}

static void scan_backward(struct bench_problem *p) {
    p->ops->scan_backward(p->dev, GRADIENT("x"), GRADIENT("raw"), GRADIENT("b"), GRADIENT("c"), GRADIENT("z"),
                          tensor_none(), GRADIENT("bias"), GRADIENT("A_log"), GRADIENT("d"), GRADIENT("g"),
                          tensor_none(), p->saved, VALUE("x"), VALUE("raw"), VALUE("bias"), VALUE("A_log"), VALUE("b"),
                          VALUE("c"), VALUE("d"), VALUE("z"), tensor_none(), VALUE("doc"), p->scratch);
}

/* For each token and channel N decays, a softplus (two) and a gate (two); all once more backward. */
static void scan_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->special = tokens(p) * (double)SIZE(D) * (double)(SIZE(N) + 4);
    both->special = 2 * forward->special;
}

const struct bench_row bench_scan = {.name = "scan",
                                     .slice = "B=1 D=2",
                                     .declare = scan_declare,
                                     .forward = scan_forward,
                                     .backward = scan_backward,
                                     .work = scan_work};

static void scan_step_declare(struct bench_problem *p) {
    bench_input(p, "x", "BD");
    bench_input(p, "raw", "BD");
    scan_parameters(p);
    strided(bench_input(p, "b", "BN"), 1, SIZE(q));
    strided(bench_input(p, "c", "BN"), 1, SIZE(q));
    strided(bench_input(p, "z", "BD"), 1, SIZE(p));
    bench_state(p, "state", "BDN");
    bench_output(p, "g", "BD");
}

static void scan_step_forward(struct bench_problem *p) {
    p->ops->scan_step(p->dev, VALUE("g"), VALUE("state"), VALUE("x"), VALUE("raw"), VALUE("bias"), VALUE("A_log"),
                      VALUE("b"), VALUE("c"), VALUE("d"), VALUE("z"));
}

const struct bench_row bench_scan_step = {
    .name = "scan_step", .slice = "B=2", .declare = scan_step_declare, .forward = scan_step_forward};

/* ---- sLSTM ------------------------------------------------------------------------------------------------------ */

static struct slstm_shape slstm_shape(const struct bench_problem *p) {
    return (struct slstm_shape){SIZE(B), SIZE(T), SIZE(H), SIZE(P)};
}

static void slstm_declare(struct bench_problem *p) {
    p->size['G'] = 4;
    p->size['N'] = 4 * SIZE(P);
    p->size['D'] = SIZE(H) * SIZE(P);
    p->size['M'] = 4 * SIZE(D);
    bench_input(p, "x", "BTM");
    weight(p, "r", "HNP", (double)SIZE(P));
    bench_parameter(p, "bias", "GD");
    bench_output(p, "y", "BTD");
    documents(p);
    size_t ahead = p->ops->slstm_forward_scratch(slstm_shape(p)), back = p->ops->slstm_backward_scratch(slstm_shape(p));
    p->saved_bytes = p->ops->slstm_saved(slstm_shape(p));
    p->scratch_bytes = ahead > back ? ahead : back;
}

static void slstm_forward(struct bench_problem *p) {
    p->ops->slstm_forward(p->dev, VALUE("y"), tensor_none(), p->saved, VALUE("x"), VALUE("r"), VALUE("bias"),
                          tensor_none(), VALUE("doc"), p->scratch);
}

static void slstm_backward(struct bench_problem *p) {
    p->ops->slstm_backward(p->dev, GRADIENT("x"), GRADIENT("r"), GRADIENT("bias"), tensor_none(), GRADIENT("y"),
                           tensor_none(), p->saved, VALUE("y"), VALUE("x"), VALUE("r"), VALUE("bias"), tensor_none(),
                           VALUE("doc"), 0, p->scratch);
}

/* For each token and unit two gates by exponentials, a softplus, a tanh, a sigmoid and a quotient. What counts, the
 * tokens' chain of T steps, is in no roofline: the times divided by T say what a step takes. */
static void slstm_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->products = 8 * tokens(p) * (double)SIZE(D) * (double)SIZE(P);
    both->products = 3 * forward->products;
    forward->special = both->special = 9 * tokens(p) * (double)SIZE(D);
}

const struct bench_row bench_slstm = {.name = "slstm",
                                      .slice = "B=1",
                                      .declare = slstm_declare,
                                      .forward = slstm_forward,
                                      .backward = slstm_backward,
                                      .work = slstm_work};

/* ---- gated RMSNorm ---------------------------------------------------------------------------------------------- */

static void gated_rmsnorm_declare(struct bench_problem *p) {
    p->size['G'] = 1;
    bench_input(p, "y", "RI");
    strided(bench_input(p, "z", "RI"), 1, SIZE(p));
    spread(bench_parameter(p, "weight", "I"), 1, 0.1);
    bench_output(p, "g", "RI");
    bench_statistic(p, "rstd", "RG");
    p->scratch_bytes = p->ops->gated_rmsnorm_backward_scratch(SIZE(R), SIZE(I));
}

static void gated_rmsnorm_forward(struct bench_problem *p) {
    p->ops->gated_rmsnorm_forward(p->dev, VALUE("g"), VALUE("rstd"), VALUE("y"), VALUE("z"), VALUE("weight"), false,
                                  norm_eps);
}

static void gated_rmsnorm_backward(struct bench_problem *p) {
    p->ops->gated_rmsnorm_backward(p->dev, GRADIENT("y"), GRADIENT("z"), GRADIENT("weight"), tensor_none(),
                                   GRADIENT("g"), VALUE("y"), VALUE("z"), VALUE("rstd"), VALUE("weight"), false,
                                   p->scratch);
}

static void gated_rmsnorm_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->special = 2 * rows(p) * (double)SIZE(I);
    both->special = 2 * forward->special;
}

const struct bench_row bench_gated_rmsnorm = {.name = "gated_rmsnorm",
                                              .slice = "R=64",
                                              .declare = gated_rmsnorm_declare,
                                              .forward = gated_rmsnorm_forward,
                                              .backward = gated_rmsnorm_backward,
                                              .work = gated_rmsnorm_work};

/* ---- head norm -------------------------------------------------------------------------------------------------- */

static enum activation activation(const struct bench_problem *p) {
    return (enum activation)SIZE(a);
}

static void head_norm_declare(struct bench_problem *p) {
    bench_input(p, "y", "RI");
    spread(bench_parameter(p, "weight", "I"), 1, 0.1);
    if (SIZE(s)) {
        bench_input(p, "x", "RI");
        spread(bench_parameter(p, "skip", "I"), 1, 0.1);
    }
    if (SIZE(z)) strided(bench_input(p, "z", "RI"), 1, SIZE(p));
    bench_output(p, "g", "RI");
    bench_statistic(p, "mean", "RH");
    bench_statistic(p, "rstd", "RH");
    p->scratch_bytes = p->ops->head_norm_backward_scratch(SIZE(R), SIZE(I), SIZE(H));
}

static void head_norm_forward(struct bench_problem *p) {
    p->ops->head_norm_forward(p->dev, VALUE("g"), VALUE("mean"), VALUE("rstd"), VALUE("y"), VALUE("weight"), VALUE("x"),
                              VALUE("skip"), VALUE("z"), activation(p), norm_eps);
}

static void head_norm_backward(struct bench_problem *p) {
    p->ops->head_norm_backward(p->dev, GRADIENT("y"), GRADIENT("x"), GRADIENT("z"), GRADIENT("weight"),
                               GRADIENT("skip"), GRADIENT("g"), VALUE("y"), VALUE("mean"), VALUE("rstd"),
                               VALUE("weight"), VALUE("x"), VALUE("skip"), VALUE("z"), activation(p), p->scratch);
}

static void head_norm_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->special = SIZE(z) ? 2 * rows(p) * (double)SIZE(I) : 0;
    both->special = 2 * forward->special;
}

const struct bench_row bench_head_norm = {.name = "head_norm",
                                          .slice = "R=64",
                                          .declare = head_norm_declare,
                                          .forward = head_norm_forward,
                                          .backward = head_norm_backward,
                                          .work = head_norm_work};

/* ---- GLU -------------------------------------------------------------------------------------------------------- */

static void glu_declare(struct bench_problem *p) {
    p->size['E'] = 2 * SIZE(F);
    bench_input(p, "u", "RE");
    bench_output(p, "h", "RF");
}

static void glu_forward(struct bench_problem *p) {
    p->ops->glu_forward(p->dev, VALUE("h"), VALUE("u"), activation(p));
}

static void glu_backward(struct bench_problem *p) {
    p->ops->glu_backward(p->dev, GRADIENT("u"), GRADIENT("h"), VALUE("u"), activation(p));
}

static void glu_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->special = 2 * rows(p) * (double)SIZE(F);
    both->special = 2 * forward->special;
}

const struct bench_row bench_glu = {.name = "glu",
                                    .slice = "R=64",
                                    .declare = glu_declare,
                                    .forward = glu_forward,
                                    .backward = glu_backward,
                                    .work = glu_work};

/* ---- head + loss ------------------------------------------------------------------------------------------------ */

static void head_loss_declare(struct bench_problem *p) {
    p->size['S'] = sizeof(struct loss_sums) / sizeof(double);
    bench_state(p, "sums", "S")->type = BENCH_F64;
    bench_input(p, "x", "RD");
    weight(p, "w", "VD", (double)SIZE(D));
    bench_indices(p, "targets", "R", BENCH_TOKENS)->masked = true;
    p->scratch_bytes = p->ops->head_loss_scratch(SIZE(R), SIZE(D), SIZE(V));
}

static void head_loss(struct bench_problem *p, tensor dx, tensor dw) {
    /* As if of a thousand targets: gradients near 1, whatever the slice. */
    p->ops->head_loss(p->dev, VALUE("sums").data, tensor_none(), dx, dw, VALUE("x"), VALUE("w"), VALUE("targets"),
                      1e-3, 1e-4, 0, p->scratch);
}

static void head_loss_forward(struct bench_problem *p) {
    head_loss(p, tensor_none(), tensor_none());
}

static void head_loss_both(struct bench_problem *p) {
    head_loss(p, GRADIENT("x"), GRADIENT("w"));
}

static void head_loss_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    forward->products = 2 * rows(p) * (double)SIZE(D) * (double)SIZE(V);
    both->products = 3 * forward->products;
    forward->special = rows(p) * (double)SIZE(V);
    both->special = 2 * forward->special;
}

const struct bench_row bench_head_loss = {.name = "head_loss",
                                          .slice = "R=16",
                                          .declare = head_loss_declare,
                                          .forward = head_loss_forward,
                                          .both = head_loss_both,
                                          .work = head_loss_work};

/* ---- conversion ------------------------------------------------------------------------------------------------- */

static void convert_declare(struct bench_problem *p) {
    real(bench_input(p, "from", "n"))->has_gradient = BENCH_NO_GRADIENT;
    bench_output(p, "to", "n")->has_gradient = BENCH_NO_GRADIENT;
}

static void convert_forward(struct bench_problem *p) {
    p->ops->convert(p->dev, VALUE("to"), VALUE("from"));
}

const struct bench_row bench_convert = {
    .name = "convert", .slice = "n=4096", .declare = convert_declare, .forward = convert_forward};

/* ---- optimizer -------------------------------------------------------------------------------------------------- */

enum { LAYERS = 24, LAYER_PARTS = 10, SEGMENTS = 1 + LAYERS * LAYER_PARTS };

/* Cut a flat array as Mamba 129M's: the embedding is 30 % of it, a layer ten tensors of very different sizes. */
static int64_t cut_segments(int64_t n, struct adamw_segment segments[SEGMENTS]) {
    static const double shares[LAYER_PARTS] = {.62, .002, .001, .035, .02, .001, .007, .001, .001, .3};
    int64_t at = 0, count = 0;
    for (int i = 0; i < SEGMENTS && at < n; i++) {
        double share = i == 0 ? 0.3 : 0.7 / LAYERS * shares[(i - 1) % LAYER_PARTS];
        int64_t size = i == SEGMENTS - 1 ? n - at : (int64_t)(share * (double)n / 64) * 64;
        if (size == 0) continue;
        segments[count++] = (struct adamw_segment){.offset = at, .count = size, .decay = 1, .lr_scale = 1};
        at += size;
    }
    return count;
}

static void adamw_declare(struct bench_problem *p) {
    p->size['S'] = 1;
    bench_state(p, "sum", "S")->type = BENCH_F64;
    spread(bench_state(p, "p", "n"), 0, 0.02);
    spread(bench_state(p, "m", "n"), 0, 1e-3);
    square(bench_state(p, "v", "n"), 0, 1e-6);
    struct bench_operand *g = real(bench_input(p, "g", "n"));
    g->has_gradient = BENCH_NO_GRADIENT;
    g->masked = true;
    bench_output(p, "rounded", "n")->has_gradient = BENCH_NO_GRADIENT;
    p->host_bytes = sizeof(struct adamw_step);
}

static void adamw_constant(const struct bench_problem *p, void *out) {
    (void)p;
    *(struct adamw_step *)out = (struct adamw_step){.lr = 1e-2, /* large: a check sees an update that is missing */
                                                    .decay_rate = 1e-3,
                                                    .beta1 = 0.9,
                                                    .beta2 = 0.95,
                                                    .eps = 1e-8,
                                                    .correction1 = 0.9,
                                                    .correction2 = 0.8,
                                                    .grad_scale = 1e-3};
}

static void adamw_forward(struct bench_problem *p) {
    struct adamw_segment segments[SEGMENTS];
    int64_t count = cut_segments(SIZE(n), segments);
    p->ops->sum_squares(p->dev, VALUE("sum").data, VALUE("g"));
    struct adamw_slice slice = {VALUE("p"), VALUE("m"), VALUE("v"), VALUE("g"), VALUE("rounded"), segments, count};
    p->ops->adamw(p->dev, &slice, 1, p->constant);
}

/* Clipping reads the gradient a second time. */
static void adamw_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    (void)both;
    forward->bytes += (double)SIZE(n) * (double)dtype_size(p->ops->real);
}

const struct bench_row bench_adamw = {.name = "adamw",
                                      .slice = "n=4096",
                                      .declare = adamw_declare,
                                      .forward = adamw_forward,
                                      .constant = adamw_constant,
                                      .work = adamw_work};
