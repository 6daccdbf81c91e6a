/* bench_attention.c: rows of attention and rotary positions for riverrun bench ops. bench_ops.h says what a row is;
 * train/bench_cases.c gives rows their shapes. Called by bench_ops.c.
 *
 * Letters beside those of kernels/tensor.h: d (1: with documents), w (window, 0: none), p (elements between rows of the
 * views that a model cuts from the output of a product). Every head has keys and values of its own. */
#include "train/bench_ops.h"

#include <math.h>

#define SIZE(letter) bench_size(p, #letter[0])
#define VALUE(name) bench_value(p, name)
#define GRADIENT(name) bench_gradient(p, name)

static struct bench_operand *strided(struct bench_operand *o, int64_t pitch) {
    o->lead = 2;
    o->pitch = pitch;
    return o;
}

/* Positions lie at the beginning of the scratch. */
static size_t position_bytes(const struct bench_problem *p) {
    return ((size_t)(SIZE(B) * SIZE(T)) * sizeof(int32_t) + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
}

static tensor positions(struct bench_problem *p) {
    if (!SIZE(d)) return tensor_none();
    tensor out = tensor_2d(p->scratch, DTYPE_I32, SIZE(B), SIZE(T));
    p->ops->token_positions(p->dev, out, VALUE("doc"), tensor_none());
    return out;
}

static void *work_of(struct bench_problem *p) {
    return (char *)p->scratch + position_bytes(p);
}

static struct attention_rule rule_of(const struct bench_problem *p) {
    return (struct attention_rule){.window = SIZE(w)};
}

static void attention_declare(struct bench_problem *p) {
    struct attention_shape s = {.B = SIZE(B), .T = SIZE(T), .H = SIZE(H), .G = SIZE(H), .P = SIZE(P)};
    strided(bench_input(p, "q", "BTHP"), SIZE(p));
    strided(bench_input(p, "k", "BTHP"), SIZE(p));
    strided(bench_input(p, "v", "BTHP"), SIZE(p));
    bench_output(p, "o", "BTHP");
    bench_statistic(p, "lse", "BHT");
    if (SIZE(d)) bench_indices(p, "doc", "BT", BENCH_DOCUMENTS);
    size_t forward = p->ops->attention_forward_scratch(s), backward = p->ops->attention_backward_scratch(s);
    p->scratch_bytes = position_bytes(p) + (forward > backward ? forward : backward);
}

static void attention_forward(struct bench_problem *p) {
    struct attention_cache none = {tensor_none(), tensor_none(), tensor_none()};
    p->ops->attention_forward(p->dev, VALUE("o"), VALUE("lse"), VALUE("q"), VALUE("k"), VALUE("v"), positions(p), none,
                              rule_of(p), work_of(p));
}

static void attention_backward(struct bench_problem *p) {
    struct attention_cache none = {tensor_none(), tensor_none(), tensor_none()};
    p->ops->attention_backward(p->dev, GRADIENT("q"), GRADIENT("k"), GRADIENT("v"), GRADIENT("o"), VALUE("o"),
                               VALUE("lse"), VALUE("q"), VALUE("k"), VALUE("v"), positions(p), none, rule_of(p),
                               work_of(p));
}

/* Of rows that are one document: what documents spare is not known here. */
static void attention_work(const struct bench_problem *p, struct bench_work *forward, struct bench_work *both) {
    double T = (double)SIZE(T), w = (double)SIZE(w), keys = w > 0 && w < T ? w - w * (w - 1) / (2 * T) : (T + 1) / 2;
    double pairs = (double)(SIZE(B) * SIZE(H)) * T * keys;
    forward->products = 4 * pairs * (double)SIZE(P);
    both->products = 3.5 * forward->products;
    forward->special = pairs;
    both->special = 2 * pairs;
}

const struct bench_row bench_attention = {.name = "attention",
                                          .slice = "B=1 T=512 H=1",
                                          .declare = attention_declare,
                                          .forward = attention_forward,
                                          .backward = attention_backward,
                                          .work = attention_work};

static void rope_declare(struct bench_problem *p) {
    strided(bench_input(p, "x", "BTHP"), SIZE(p));
    strided(bench_output(p, "y", "BTHP"), SIZE(p));
    if (SIZE(d)) bench_indices(p, "doc", "BT", BENCH_DOCUMENTS);
    p->scratch_bytes = position_bytes(p);
}

static void rope_forward(struct bench_problem *p) {
    tensor none = tensor_none();
    p->ops->rope_forward(p->dev, VALUE("y"), none, VALUE("x"), none, positions(p), 10000, 0);
}

static void rope_backward(struct bench_problem *p) {
    tensor none = tensor_none();
    p->ops->rope_backward(p->dev, GRADIENT("x"), none, GRADIENT("y"), none, none, none, positions(p), 10000, NULL);
}

const struct bench_row bench_rope = {.name = "rope",
                                     .slice = "B=1 T=512 H=1",
                                     .declare = rope_declare,
                                     .forward = rope_forward,
                                     .backward = rope_backward};
