/* test/ops_mlstm.c: rows of the mLSTM and its step, and of the soft cap of its gates. test/ops.h says what a row is;
 * the identities that hold for every sequence operation are in test/ops_sequence.c. The result, h in kernels/ops.h, is
 * called y here, as those expect; the states are "initial" (C), "initial_n" and "initial_m", and so on.
 *
 * Parameters of its own: i, f: the mean of the gates' arguments; rule: which mLSTM (see rule_of); star = 1: eps is 0,
 * and finite differences look at the final C and n times exp(m), because the gradients that backward takes are those at
 * a fixed m (kernels/ops.h). */
#include "test/ops_sequence.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXPONENTIAL, EXPONENTIAL_TRUNCATED, SIGMOID, SIGMOID_TRUNCATED, SIGMOID_PLAIN }; /* rule */

static struct mlstm_rule rule_of(const struct run *r) {
    int64_t rule = param(r, "rule");
    return (struct mlstm_rule){.sigmoid_input = rule >= SIGMOID,
                               .normalise = rule != SIGMOID_PLAIN,
                               .truncated = rule == EXPONENTIAL_TRUNCATED || rule == SIGMOID_TRUNCATED,
                               .eps = param(r, "star") ? 0 : 1e-6};
}

static struct mlstm_shape mlstm_shape(const struct run *r) {
    return (struct mlstm_shape){param(r, "B"), param(r, "T"), param(r, "H"),
                                param(r, "K"), param(r, "V"), param(r, "Q")};
}

/* --- values ------------------------------------------------------------------------------------------------------- */

static void fill_i(struct run *r, struct operand *o) {
    for (int64_t at = 0; at < o->count; at++) o->values[at] = (double)param(r, "i") + 1.5 * draw_normal(r, o, at);
}

/* Where a gate is shut, q and k don't matter: h = v, their gradient is the rounding of what cancels. So that this is
 * not all there is to compare, a mean of -20 is that of every third token only. */
static void fill_f(struct run *r, struct operand *o) {
    int64_t mean = param(r, "f");
    for (int64_t at = 0; at < o->count; at++) {
        bool open = mean <= -20 && at / param(r, "H") % 3 != 1;
        o->values[at] = (double)(open ? 2 : mean) + draw_normal(r, o, at);
    }
}

/* q: none so small that the step of a finite difference is large to it. */
static void fill_apart_from_0(struct run *r, struct operand *o) {
    for (int64_t at = 0; at < o->count; at++) {
        double drawn = draw_normal(r, o, at);
        o->values[at] = drawn + copysign(0.5, drawn);
    }
}

/* k and n: a sum of many is not much smaller than they are; else h would be a small number by a small number. */
static void fill_mostly_positive(struct run *r, struct operand *o) {
    for (int64_t at = 0; at < o->count; at++) o->values[at] = 1 + 0.4 * draw_normal(r, o, at);
}

/* Some are 0, as in a state that nothing was written to. */
static void fill_m(struct run *r, struct operand *o) {
    for (int64_t at = 0; at < o->count; at++)
        o->values[at] = rule_of(r).sigmoid_input || at % 5 == 4 ? 0 : 2 * draw_normal(r, o, at);
}

/* n goes from one token to the next, as the recurrence says; *m too. i and f: the token's. */
static void advance_n(const struct run *r, double *n, double *m, const double *k, double i, double f) {
    bool sigmoid = rule_of(r).sigmoid_input;
    double lf = -log1p(exp(-f)), next = sigmoid ? 0 : fmax(lf + *m, i);
    double keep = exp(lf + *m - next), weight = sigmoid ? 1 / (1 + exp(-i)) : exp(i - next);
    for (int64_t j = 0; j < param(r, "K"); j++) n[j] = keep * n[j] + weight * k[j];
    *m = next;
}

/* Move q (K) away from where |den| is as large as its floor, which is where gradients jump, and from where den is the
 * small difference of numbers much larger than the floor, which no float could get right. */
static void keep_clear(double *q, const double *n, double floor, int64_t K) {
    double den = 0, size_q = 0, size_n = 0;
    for (int64_t j = 0; j < K; j++) {
        den += q[j] * n[j] / sqrt((double)K);
        size_q += q[j] * q[j];
        size_n += n[j] * n[j];
    }
    double size = fabs(den), largest = sqrt(size_q * size_n / (double)K);
    double along = copysign(0.5 * sqrt(size_q / size_n), den);
    bool cancels = floor < 0.3 * largest && size < 0.4 * largest;
    bool near_floor = floor >= 0.3 * largest && size > 0.75 * floor && size < 1.3 * floor;
    for (int64_t j = 0; j < K && cancels; j++) q[j] += along * n[j];
    for (int64_t j = 0; j < K && near_floor; j++) q[j] *= 0.5;
}

/* `before`: prefix of the names of the state's parts, which like k, i, f and doc have their values already. */
static void fill_q(struct run *r, struct operand *q, const char *before, int64_t T) {
    struct operand *k = operand_find(r, "k"), *i = operand_find(r, "i"), *f = operand_find(r, "f");
    struct operand *doc = T > 1 || q->ndim == 4 ? operand_find(r, "doc") : NULL;
    int64_t H = param(r, "H"), K = param(r, "K");
    char name[2][32];
    snprintf(name[0], sizeof name[0], "%s_n", before);
    snprintf(name[1], sizeof name[1], "%s_m", before);
    struct operand *n0 = operand_find(r, name[0]), *m0 = operand_find(r, name[1]);
    double *n = calloc((size_t)K, sizeof *n);
    ASSERT(n != NULL);
    fill_apart_from_0(r, q);
    for (int64_t head = 0; rule_of(r).normalise && head < param(r, "B") * H; head++) {
        double m = m0 ? (m0->kind == OPERAND_STATE ? m0->values_before : m0->values)[head] : 0;
        const double *begin = n0 ? (n0->kind == OPERAND_STATE ? n0->values_before : n0->values) + head * K : NULL;
        for (int64_t j = 0; j < K; j++) n[j] = begin ? begin[j] : 0;
        for (int64_t t = 0; t < T; t++) {
            int64_t token = head / H * T + t, at = token * H + head % H;
            if (doc && doc->index[token] != (t > 0 ? doc->index[token - 1] : 0)) {
                memset(n, 0, (size_t)K * sizeof *n);
                m = 0;
            }
            advance_n(r, n, &m, k->values + at * K, i->values[at], f->values[at]);
            keep_clear(q->values + at * K, n, exp(-m), K);
        }
    }
    free(n);
}

static void fill_sequence_q(struct run *r, struct operand *o) {
    fill_q(r, o, "initial", o->dim[1]);
}

static void fill_step_q(struct run *r, struct operand *o) {
    fill_q(r, o, "state", 1);
}

/* --- mLSTM -------------------------------------------------------------------------------------------------------- */

/* What the sequence and the step have in common, but q; `lead` are the dimensions before H. */
static void mlstm_operands(struct run *r, const int64_t *lead, int leads, double terms, double gradient_terms) {
    int64_t H = param(r, "H"), K = param(r, "K"), V = param(r, "V");
    const struct {
        const char *name;
        int64_t width; /* 0: a gate */
        void (*fill)(struct run *r, struct operand *o);
    } table[] = {{"y", V, NULL}, {"k", K, fill_mostly_positive}, {"v", V, NULL}, {"i", 0, fill_i}, {"f", 0, fill_f}};
    for (int i = 0; i < 5; i++) {
        int64_t dim[4] = {lead[0], lead[leads - 1]};
        dim[leads] = H;
        dim[leads + 1] = table[i].width;
        struct operand *o = (i == 0 ? output : input)(r, table[i].name, leads + (table[i].width ? 2 : 1), dim);
        o->lead = leads;
        o->type = table[i].width ? OPERAND_ACT : OPERAND_REAL;
        o->fill = table[i].fill;
        o->terms = terms;
        o->gradient_terms = gradient_terms;
    }
}

static void q_operand(struct run *r, const int64_t *lead, int leads, double gradient_terms,
                      void (*fill)(struct run *r, struct operand *o)) {
    int64_t dim[4] = {lead[0], lead[leads - 1]};
    dim[leads] = param(r, "H");
    dim[leads + 1] = param(r, "K");
    struct operand *o = input(r, "q", leads + 2, dim);
    o->lead = leads;
    o->fill = fill;
    o->gradient_terms = gradient_terms;
}

static void mlstm_declare(struct run *r) {
    struct mlstm_shape s = mlstm_shape(r);
    double terms = 4 * (double)(s.K + s.T), gradient_terms = 16 * (double)(s.T + s.K + s.V);
    static const char *const states[] = {"initial", "initial_n", "final", "final_n"};
    mlstm_operands(r, (int64_t[]){s.B, s.T}, 2, terms, gradient_terms);
    operand_find(r, "f")->gradient_terms = 16 * (double)(s.T * s.T + s.K + s.V); /* a sum over pairs of tokens */
    sequence_declare(r, DIMS(s.B, s.H, s.K, s.V));
    sequence_declare_state(r, "initial_m", "final_m", DIMS(s.B, s.H));
    if (rule_of(r).normalise) {
        sequence_declare_state(r, "initial_n", "final_n", DIMS(s.B, s.H, s.K));
    } else {
        absent(r, "initial_n");
        absent(r, "final_n");
    }
    for (int i = 0; i < 4; i++) {
        struct operand *o = operand_find(r, states[i]);
        if (o) o->terms = terms, o->gradient_terms = gradient_terms;
    }
    struct operand *m0 = operand_find(r, "initial_m"), *m = operand_find(r, "final_m"), *n0;
    if ((n0 = operand_find(r, "initial_n"))) n0->fill = fill_mostly_positive;
    if (m0) m0->no_gradient = true, m0->fill = fill_m;
    if (m) m->no_gradient = true, m->terms = (double)s.T;
    q_operand(r, (int64_t[]){s.B, s.T}, 2, gradient_terms, fill_sequence_q); /* last: it looks at the others */
    r->saved_bytes = param(r, "saved") ? r->ops->mlstm_saved(s) : 0;
    r->forward_scratch = r->ops->mlstm_forward_scratch(s);
    r->backward_scratch = r->ops->mlstm_backward_scratch(s);
}

static struct mlstm_state value_state(struct run *r, const char *C, const char *n, const char *m) {
    return (struct mlstm_state){value(r, C), value(r, n), value(r, m)};
}

static struct mlstm_state gradient_state(struct run *r, const char *C, const char *n) {
    return (struct mlstm_state){gradient(r, C), gradient(r, n), tensor_none()};
}

static void mlstm_forward(struct run *r) {
    r->ops->mlstm_forward(r->dev, value(r, "y"), value_state(r, "final", "final_n", "final_m"), r->saved, value(r, "q"),
                          value(r, "k"), value(r, "v"), value(r, "i"), value(r, "f"),
                          value_state(r, "initial", "initial_n", "initial_m"), value(r, "doc"), rule_of(r),
                          param(r, "Q"), r->scratch);
}

/* With star = 1, which is for the double CPU table: a copy of the gradient of a part of the final state (B,H,...) times
 * exp(m). To be freed; NULL, and nothing done, where there is no such gradient. */
static double *times_exp_m(struct run *r, tensor *gradient) {
    if (!param(r, "star") || !tensor_given(*gradient)) return NULL;
    int64_t count = tensor_count(*gradient), each = count / (param(r, "B") * param(r, "H"));
    const double *m = value(r, "final_m").data, *from = gradient->data;
    double *to = malloc((size_t)count * sizeof *to);
    ASSERT(to != NULL && gradient->dtype == DTYPE_F64);
    for (int64_t at = 0; at < count; at++) to[at] = from[at] * exp(m[at / each]);
    gradient->data = to;
    return to;
}

static void mlstm_backward(struct run *r) {
    struct mlstm_state dfinal = gradient_state(r, "final", "final_n");
    double *C = times_exp_m(r, &dfinal.C), *n = times_exp_m(r, &dfinal.n);
    r->ops->mlstm_backward(r->dev, gradient(r, "q"), gradient(r, "k"), gradient(r, "v"), gradient(r, "i"),
                           gradient(r, "f"), gradient_state(r, "initial", "initial_n"), gradient(r, "y"), dfinal,
                           r->saved, value(r, "y"), value(r, "q"), value(r, "k"), value(r, "v"), value(r, "i"),
                           value(r, "f"), value_state(r, "initial", "initial_n", "initial_m"), value(r, "doc"),
                           rule_of(r), param(r, "Q"), r->scratch);
    free(C);
    free(n);
}

/* What finite differences look at: y, and of the final state C exp(m) and n exp(m). */
static double mlstm_scalar(struct run *r) {
    static const char *const names[] = {"y", "final", "final_n"};
    struct operand *m = operand_find(r, "final_m");
    double sum = 0;
    for (int part = 0; part < 3; part++) {
        struct operand *o = operand_find(r, names[part]);
        if (o == NULL || o->no_gradient) continue;
        int64_t each = o->count / (param(r, "B") * param(r, "H"));
        for (int64_t at = 0; at < o->count; at++)
            sum += o->gradients[at] * o->values[at] * (part == 0 ? 1 : exp(m->values[at / each]));
    }
    return sum;
}

/* Useful FLOPs: the lower triangle only, of the L x L products inside chunks. */
static void mlstm_flops(struct run *r, double *forward, double *backward) {
    struct mlstm_shape s = mlstm_shape(r);
    double Q = (double)(s.Q < s.T ? s.Q : s.T), heads = (double)(s.B * s.T * s.H), K = (double)s.K, V = (double)s.V;
    *forward = heads * (4 * K * V + (Q + 1) * (K + V));
    *backward = heads * (8 * K * V + (Q + 1) * (3 * K + 2 * V));
}

static void mlstm_step_declare(struct run *r) {
    int64_t B = param(r, "B"), H = param(r, "H"), K = param(r, "K"), V = param(r, "V");
    double terms = 4 * (double)K;
    mlstm_operands(r, (int64_t[]){B}, 1, terms, 1);
    state(r, "state", DIMS(B, H, K, V));
    if (rule_of(r).normalise) state(r, "state_n", DIMS(B, H, K));
    else absent(r, "state_n");
    state(r, "state_m", DIMS(B, H))->fill = fill_m;
    q_operand(r, (int64_t[]){B}, 1, 1, fill_step_q);
}

static void mlstm_step_forward(struct run *r) {
    r->ops->mlstm_step(r->dev, value(r, "y"), value_state(r, "state", "state_n", "state_m"), value(r, "q"),
                       value(r, "k"), value(r, "v"), value(r, "i"), value(r, "f"), rule_of(r));
}

static const struct op_row mlstm_step = {
    .name = "mlstm_step",
    .parameters = "B=2 H=2 K=5 V=3 rule=0 i=0 f=3 star=0 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST, "B=1,3 H=1,4 K=1,7,64 V=1,5,96 rule=0,2,4 strided=0,1"},
                                       {OP_TEST, "K=16 V=24 rule=0,2,4 i=-10,0,10 f=-20,0,6"},
                                       {OP_TEST, "B=1 H=2 K=256,300 V=512,520 rule=0,4 strided=2"},
                                       {OP_PERF, "B=1,8 H=4 K=256 V=512"},
                                       {0, NULL}},
    .declare = mlstm_step_declare,
    .forward = mlstm_step_forward,
};

/* --- identities --------------------------------------------------------------------------------------------------- */

static void mlstm_steps(struct run *r) {
    sequence_equals_steps(r, &mlstm_step, "B H K V rule star");
}

/* These hand gradients of a state on as they are. */
static void mlstm_packed(struct run *r) {
    if (!param(r, "star")) sequence_packed(r);
}

static void mlstm_split(struct run *r) {
    if (!param(r, "star")) sequence_split(r);
}

/* The gradient of y that comes out of a norm over each head's V channels, without weight and eps, when g comes in. */
static void behind_norm(double *dy, const double *y, const double *g, int64_t V) {
    double mean = 0, variance = 0, mean_g = 0, along = 0;
    for (int64_t j = 0; j < V; j++) mean += y[j] / (double)V;
    for (int64_t j = 0; j < V; j++) variance += (y[j] - mean) * (y[j] - mean) / (double)V;
    double rstd = variance > 0 ? 1 / sqrt(variance) : 0;
    for (int64_t j = 0; j < V; j++) {
        mean_g += g[j] / (double)V;
        along += g[j] * (y[j] - mean) * rstd / (double)V;
    }
    for (int64_t j = 0; j < V; j++) dy[j] = (g[j] - mean_g - (y[j] - mean) * rstd * along) * rstd;
}

/* Behind a norm, which does not see how long h is, the truncated gradients are the exact ones; by themselves they are
 * not, where |den| is above its floor anywhere. In double, for the norm magnifies the rounding of y. */
static void mlstm_truncated(struct run *r) {
    bool exact = param(r, "rule") == EXPONENTIAL || param(r, "rule") == SIGMOID;
    if (r->ops->act != DTYPE_F64 || !exact || param(r, "final") == 1 || param(r, "V") < 3) return;
    static const char *const names[] = {"q", "k", "v", "i", "f", "initial"};
    struct operand *y = operand_find(r, "y");
    int64_t V = param(r, "V");
    struct run normed, truncated, bare;
    char change[16];
    snprintf(change, sizeof change, "rule=%lld", (long long)param(r, "rule") + 1);
    run_open_like(&normed, r, "");
    run_open_like(&truncated, r, change);
    run_open_like(&bare, r, change);
    for (int64_t at = 0; at < y->count; at += V) {
        behind_norm(operand_find(&normed, "y")->gradients + at, y->values + at, y->gradients + at, V);
        behind_norm(operand_find(&truncated, "y")->gradients + at, y->values + at, y->gradients + at, V);
    }
    struct run *runs[] = {&normed, &truncated, &bare};
    for (int i = 0; i < 3; i++) run_forward(runs[i]), run_backward(runs[i]);
    for (int i = 0; i < 6; i++) {
        struct operand *a = operand_find(&normed, names[i]), *b = operand_find(&truncated, names[i]);
        char what[64];
        snprintf(what, sizeof what, "the gradient of %s behind a norm, truncated", names[i]);
        if (a && !a->no_gradient) op_compare(r, what, b->gradients, a->gradients, a->count, 1e6);
    }
    struct operand *dv = operand_find(r, "v"), *dv_bare = operand_find(&bare, "v"), *dk = operand_find(r, "k");
    bool same = memcmp(dk->gradients, operand_find(&bare, "k")->gradients, (size_t)dk->count * sizeof(double)) == 0;
    op_expect(r, memcmp(dv->gradients, dv_bare->gradients, (size_t)dv->count * sizeof(double)) == 0,
              "the gradient of v depends on the truncation");
    op_expect(r, !same || param(r, "i") < 0, "the truncated gradient of k is the exact one");
    for (int i = 0; i < 3; i++) run_close(runs[i]);
}

static const struct op_row mlstm = {
    .name = "mlstm",
    .parameters = "B=2 T=7 H=2 K=5 V=3 Q=3 rule=0 i=0 f=3 star=0 doc=0 initial=1 final=1 saved=1 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "T=1,2,7,16,17,97 Q=1,3,16,64,256 rule=0,2 doc=4"},
        {OP_TEST, "T=17 H=1,3 K=8 V=7 Q=3 rule=0,1,2,3,4 doc=2 initial=0,2 final=0,2"},
        {OP_TEST, "T=97 K=8 V=7 Q=16 rule=0,2,4 doc=1,3 initial=0,1 final=1"},
        /* Not rule=0 i=10 f=-20, where h is the last v alone, and not rule=2 i=-10 initial=1, where it is of the
         * initial state alone: gradients that cancel to nothing are all that is left. */
        {OP_TEST, "T=17 K=8 V=12 Q=16 rule=0,1,2,4 i=0 f=-20,0,6 doc=0,4"},
        {OP_TEST, "T=17 K=8 V=12 Q=16 rule=0,1,2,4 i=10 f=0,6 doc=0,4"},
        {OP_TEST, "T=17 K=8 V=12 Q=16 rule=0,1,4 i=-10 f=-20,0,6 doc=0,4"},
        {OP_TEST, "T=17 K=8 V=12 Q=16 rule=2,4 i=-10,10 f=-20,0,6 doc=0,4 initial=0"},
        {OP_TEST, "T=5,17 K=2,9 V=1,7 Q=3 rule=0,4 doc=2 strided=1"},
        {OP_TEST, "T=17 K=1 V=1,5 rule=4 doc=4"}, /* with a normaliser, h would not depend on q */
        {OP_TEST, "B=1 T=130 H=4 K=33 V=96 Q=64 rule=0,1,2 doc=0,4 strided=1"}, /* tiles, threads */
        {OP_TEST, "B=1 T=63,65,128,129 H=2 K=16 V=32 Q=64 rule=0,4 doc=0,5 strided=0,2"}, /* edges of chunks */
        {OP_TEST, "B=1 T=150 H=1 K=128,256 V=264 Q=64 rule=0 doc=4 strided=2"},
        {OP_TEST, "B=1 T=520 H=2 K=8 V=24 Q=64 rule=0,2 i=0,10 f=0,6 doc=1"},
        {OP_LARGE, "B=8 T=330 H=8 K=64 V=128 Q=64 rule=0,1,2,4 doc=1"},
        {OP_LARGE, "B=2 T=200 H=4 K=256,512 V=512 Q=64 rule=0 doc=4 strided=2"},
        {OP_LARGE, "B=1 T=150 H=2 K=384,768,1280,2048 V=384,768,1280,2048 Q=64 rule=0 doc=4"},
        {OP_GRAD, "B=1 T=1,2,3,7,17 H=2 K=2 V=2 Q=1,3,16 rule=0,2,4 star=1 doc=0,2,4"},
        {OP_GRAD, "T=7 K=2 V=2 Q=2,3,7 rule=0,2,4 star=1 doc=0,1,2,3,4 initial=0,1,2 final=0,1,2"},
        {OP_GRAD, "B=1 T=7 K=3 V=3 Q=4 rule=0,2 star=1 i=-10,0 f=-20,0,6 doc=0,2"},
        {OP_GRAD, "B=1 T=7 K=3 V=3 Q=4 rule=0,2 star=1 i=10 f=0,6 doc=0,2"},
        {OP_GRAD, "T=97 H=3 K=4 Q=16,97 rule=0,2,4 star=1 doc=0,4 strided=1"},
        {OP_PERF, "B=4 T=512 H=4 K=64 V=128 Q=32,64,128,256 initial=0 final=0"},
        {OP_PERF, "B=1 T=2048 H=4 K=256 V=512 Q=64,128,256 initial=0 final=0"},
        {0, NULL}},
    .declare = mlstm_declare,
    .forward = mlstm_forward,
    .backward = mlstm_backward,
    .scalar = mlstm_scalar,
    .flops = mlstm_flops,
    .identities = (const struct op_identity[]){{"chunked = loop of steps", mlstm_steps},
                                               {"the same for every chunk length", sequence_chunks},
                                               {"packed documents = documents run apart", mlstm_packed},
                                               {"split with state = whole", mlstm_split},
                                               {"causality", sequence_causal},
                                               {"truncated = exact behind a norm", mlstm_truncated},
                                               {NULL, NULL}},
};

/* --- soft cap ----------------------------------------------------------------------------------------------------- */

/* spread: in tenths of the cap. Far beyond the cap y, which is what backward sees, says nothing in float of how far. */

static void softcap_declare(struct run *r) {
    int64_t R = param(r, "R"), N = param(r, "N");
    if (param(r, "bias")) parameter(r, "bias", DIMS(N))->gradient_terms = (double)(16 * R); /* one sum, may cancel */
    else absent(r, "bias");
    struct operand *o = input(r, "x", DIMS(R, N));
    o->lead = 1;
    o->type = OPERAND_REAL;
    o->act_gradient = !param(r, "real");
    o->spread = 0.1 * (double)(param(r, "spread") * (param(r, "cap") ? param(r, "cap") : 1));
    o->gradient_terms = 64; /* the rounding of y goes through 1 - (y / cap)^2 */
    o = output(r, "y", DIMS(R, N));
    o->lead = 1;
    o->type = OPERAND_REAL;
    o->alias = param(r, "inplace") ? "x" : NULL;
    r->backward_scratch = r->ops->softcap_backward_scratch(R, N);
}

static void softcap_forward(struct run *r) {
    r->ops->softcap_forward(r->dev, value(r, "y"), value(r, "x"), value(r, "bias"), (double)param(r, "cap"));
}

static void softcap_backward(struct run *r) {
    r->ops->softcap_backward(r->dev, gradient(r, "x"), gradient(r, "bias"), gradient(r, "y"), value(r, "y"),
                             (double)param(r, "cap"), r->scratch);
}

static const struct op_row softcap = {
    .name = "softcap",
    .parameters = "R=5 N=8 bias=1 cap=15 spread=5 real=0 inplace=0 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST | OP_GRAD, "R=1,2,17 N=1,7,8 bias=0,1 cap=0,1,15 real=0,1 strided=0,1"},
                                       {OP_TEST | OP_GRAD, "cap=2,30 spread=1,5 inplace=0,1"},
                                       {OP_GRAD, "R=17 cap=2,30 spread=30"},
                                       {OP_TEST, "R=255,256,257,1500 N=3,8,32,33,100 strided=0,1"},
                                       {OP_TEST, "R=70000 N=2"},
                                       {OP_PERF, "R=16384 N=8,64"},
                                       {0, NULL}},
    .declare = softcap_declare,
    .forward = softcap_forward,
    .backward = softcap_backward,
};

const struct op_row *const ops_mlstm_rows[] = {&mlstm, &mlstm_step, &softcap, NULL};
