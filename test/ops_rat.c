/* test/ops_rat.c: rows of RAT and its step. test/ops.h says what a row is; the identities that hold for every sequence
 * operation are in test/ops_sequence.c.
 *
 * Positions come from token_positions, which every call here makes first, into its scratch. The parameter `initial` is
 * the number of tokens before the row (0: no state), C the slots of the state, base the rotation's in tens. */
#include "test/ops_sequence.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POSITION_BYTES(r) (((size_t)(param(r, "B") * param(r, "T")) * sizeof(int32_t) + 255) / 256 * 256)

static tensor make_positions(struct run *r) {
    tensor before = value(r, "count");
    if (!tensor_given(value(r, "doc")) && !tensor_given(before)) return tensor_none();
    tensor positions = tensor_2d(r->scratch, DTYPE_I32, param(r, "B"), param(r, "T"));
    r->ops->token_positions(r->dev, positions, value(r, "doc"), before);
    return positions;
}

static void *work_of(struct run *r) {
    return (char *)r->scratch + POSITION_BYTES(r);
}

static double base_of(const struct run *r) {
    return 10 * (double)param(r, "base");
}

/* Rows differ in how much comes before them. */
static int32_t tokens_before(const struct run *r, int64_t b) {
    return (int32_t)(b % 2 == 0 ? param(r, "initial") : param(r, "initial") / 2);
}

static void fill_before(struct run *r, struct operand *o) {
    for (int64_t b = 0; b < o->count; b++) o->index[b] = tokens_before(r, b);
}

static void fill_nothing(struct run *r, struct operand *o) {
    (void)r;
    memset(o->values_before, 0, (size_t)o->count * sizeof(double));
}

static struct rat_shape shape_of(const struct run *r, int64_t T) {
    return (struct rat_shape){.B = param(r, "B"), .T = T, .H = param(r, "H"), .G = param(r, "G"), .P = param(r, "P"),
                              .Q = param(r, "Q"), .C = param(r, "initial") ? param(r, "C") : 0};
}

/* A state's operands: those of the state that comes in, and of the one that is left. */
static const char *const initial_names[] = {"state_k", "state_v", "state_running", "count"};
static const char *const step_names[] = {"state_k", "state_v", "state_running", "state_count"};
static const char *const final_names[] = {"final_k", "final_v", "final_running", "final_count"};

static void declare_state(struct run *r, const char *const names[4], bool changes) {
    int64_t B = param(r, "B"), C = param(r, "C"), H = param(r, "H"), P = param(r, "P");
    for (int i = 0; i < 4; i++) {
        const char *name = names[i];
        int ndim = i == 3 ? 1 : 4;
        const int64_t slots[] = {B, i == 2 ? 2 : C, H, P};
        if (i == 3 && !changes) {
            indices(r, name, ndim, slots, fill_before);
            continue;
        }
        struct operand *o = (changes ? state : input)(r, name, ndim, slots);
        o->type = i < 2 ? OPERAND_ACT : i == 2 ? OPERAND_REAL : OPERAND_I32;
        o->terms = i == 3 ? 1 : 4 * (double)(param(r, "Q") < 64 ? param(r, "Q") : 64); /* gates, then a sum, a token */
        if (i == 0) o->terms += 100; /* of a rotation's two products one may take away the other: their error stays */
        if (changes) o->fill = fill_nothing;
        else o->no_gradient = true;
    }
}

static struct rat_state state_of(struct run *r, const char *const names[4]) {
    if (!operand_find(r, names[0])) return (struct rat_state){tensor_none(), tensor_none(), tensor_none(), tensor_none()};
    return (struct rat_state){value(r, names[0]), value(r, names[1]), value(r, names[2]), value(r, names[3])};
}

/* What rat and its step have in common; `lead` are the dimensions before heads. */
static void declare_tokens(struct run *r, const int64_t *lead, int leads, double terms, double gradient_terms) {
    static const char *const names[] = {"y", "z", "v", "g", "q", "k"};
    int64_t H = param(r, "H"), G = param(r, "G"), P = param(r, "P");
    for (int i = 0; i < 6; i++) {
        int64_t dim[4] = {lead[0], lead[leads - 1]};
        dim[leads] = i < 4 ? H : G;
        dim[leads + 1] = P;
        struct operand *o = (i == 0 ? output : input)(r, names[i], leads + 2, dim);
        o->lead = leads;
        o->terms = terms;
        o->gradient_terms = i < 4 ? gradient_terms : 16 * gradient_terms; /* differences, which may cancel */
    }
    parameter(r, "bias", DIMS(H * P))->gradient_terms = 16 * gradient_terms * (double)lead[0];
}

static void rat_declare(struct run *r) {
    struct rat_shape s = shape_of(r, param(r, "T"));
    double terms = (double)(s.T + 4 * s.P + s.C), share = (double)(s.H / s.G);
    declare_tokens(r, (int64_t[]){s.B, s.T}, 2, terms, 4 * (terms + share * (double)s.T));
    if (param(r, "initial")) {
        declare_state(r, initial_names, false);
    } else {
        absent(r, "count");
    }
    if (param(r, "final")) declare_state(r, final_names, true);
    sequence_declare_doc(r);
    r->saved_bytes = param(r, "saved") ? r->ops->rat_saved(s) : 0;
    r->forward_scratch = POSITION_BYTES(r) + r->ops->rat_forward_scratch(s);
    r->backward_scratch = POSITION_BYTES(r) + r->ops->rat_backward_scratch(s);
}

static void rat_forward(struct run *r) {
    tensor positions = make_positions(r);
    r->ops->rat_forward(r->dev, value(r, "y"), state_of(r, final_names), r->saved, value(r, "z"), value(r, "v"),
                        value(r, "g"), value(r, "bias"), value(r, "q"), value(r, "k"), positions,
                        state_of(r, initial_names), param(r, "Q"), base_of(r), work_of(r));
}

static void rat_backward(struct run *r) {
    tensor positions = make_positions(r);
    r->ops->rat_backward(r->dev, gradient(r, "z"), gradient(r, "v"), gradient(r, "g"), gradient(r, "bias"),
                         gradient(r, "q"), gradient(r, "k"), gradient(r, "y"), r->saved, value(r, "z"), value(r, "v"),
                         value(r, "g"), value(r, "bias"), value(r, "q"), value(r, "k"), positions,
                         state_of(r, initial_names), param(r, "Q"), base_of(r), work_of(r));
}

static void step_declare(struct run *r) {
    struct rat_shape s = shape_of(r, 1);
    s.C = param(r, "C");
    declare_tokens(r, (int64_t[]){s.B}, 1, (double)(16 * (s.C + s.P)), 1);
    declare_state(r, step_names, true);
    r->forward_scratch = r->ops->rat_step_scratch(s);
}

static void step_forward(struct run *r) {
    r->ops->rat_step(r->dev, value(r, "y"), state_of(r, step_names), value(r, "z"), value(r, "v"), value(r, "g"),
                     value(r, "bias"), value(r, "q"), value(r, "k"), param(r, "Q"), base_of(r), r->scratch);
}

static const struct op_row rat_step = {
    .name = "rat_step",
    .parameters = "B=3 H=4 G=2 P=8 Q=3 C=8 base=1000 initial=0 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST, "H=4 G=1,2,4 P=2,8 Q=1,3 strided=0,1"},
                                       {OP_TEST, "H=2 P=64,128 Q=16 C=20 strided=2"},
                                       {0, NULL}},
    .declare = step_declare,
    .forward = step_forward,
};

/* --- identities --------------------------------------------------------------------------------------------------- */

/* The position of token t of row b, by its definition. */
static int64_t position_of(struct run *r, int64_t b, int64_t t) {
    struct operand *doc = operand_find(r, "doc"), *before = operand_find(r, "count");
    const int32_t *row = doc ? doc->index + b * param(r, "T") : NULL;
    int64_t start = t;
    while (start > 0 && (!row || row[start - 1] == row[t])) start--;
    bool goes_on = start == 0 && (!row || row[0] == 0);
    return t - start + (goes_on && before ? before->index[b] : 0);
}

/* The recurrence's value behind token t, of k (part 0) or v (part 1), by its definition. */
static double running(struct run *r, int part, int64_t b, int64_t t, int64_t h, int64_t i) {
    int64_t T = param(r, "T"), H = param(r, "H"), G = param(r, "G"), P = param(r, "P"), at = (b * T + t) * H + h;
    if (t < 0) return operand_find(r, "state_running")->values[((b * 2 + part) * H + h) * P + i];
    double a = 1 / (1 + exp(-operand_find(r, "g")->values[at * P + i] - operand_find(r, "bias")->values[h * P + i]));
    double now = part ? operand_find(r, "v")->values[at * P + i]
                      : operand_find(r, "k")->values[((b * T + t) * G + h % G) * P + i];
    bool starts = position_of(r, b, t) % param(r, "Q") == 0;
    return (starts ? 0 : a * running(r, part, b, t - 1, h, i)) + (1 - a) * now;
}

static double turned(double a, double b, double angle, bool upper) {
    return upper ? b * cos(angle) + a * sin(angle) : a * cos(angle) - b * sin(angle);
}

/* Channel i of the key (turned) or value at the end of chunk j of token t's document. */
static double chunk_end(struct run *r, int part, int64_t b, int64_t t, int64_t j, int64_t h, int64_t i) {
    int64_t Q = param(r, "Q"), P = param(r, "P"), half = P / 2, C = param(r, "C"), low = i % half;
    int64_t end = t - (position_of(r, b, t) - (j * Q + Q - 1));
    if (end < 0)
        return operand_find(r, part ? "state_v" : "state_k")->values[((b * C + j % C) * param(r, "H") + h) * P + i];
    if (part) return running(r, 1, b, end, h, i);
    double angle = base_of(r) > 0 ? (double)j * pow(base_of(r), -(double)low / (double)half) : 0;
    return turned(running(r, 0, b, end, h, low), running(r, 0, b, end, h, low + half), angle, i >= half);
}

static void rat_token_defined(struct run *r, double *y, int64_t b, int64_t t, int64_t h) {
    int64_t T = param(r, "T"), H = param(r, "H"), G = param(r, "G"), P = param(r, "P"), Q = param(r, "Q"), half = P / 2;
    int64_t c = position_of(r, b, t) / Q, first = 0;
    struct operand *count = operand_find(r, "count");
    const double *q = operand_find(r, "q")->values + ((b * T + t) * G + h % G) * P;
    const double *z = operand_find(r, "z")->values + ((b * T + t) * H + h) * P;
    bool goes_on = count && position_of(r, b, t) - t == count->index[b] && position_of(r, b, 0) == count->index[b];
    if (goes_on && count->index[b] / Q > param(r, "C")) first = count->index[b] / Q - param(r, "C");
    double total = 0;
    memset(y, 0, (size_t)P * sizeof *y);
    for (int64_t j = first; j <= c; j++) {
        double dot = 0;
        for (int64_t i = 0; i < P; i++) {
            double angle = base_of(r) > 0 ? (double)c * pow(base_of(r), -(double)(i % half) / (double)half) : 0;
            double query = turned(q[i % half], q[i % half + half], angle, i >= half);
            dot += j == c ? q[i] * running(r, 0, b, t, h, i) : query * chunk_end(r, 0, b, t, j, h, i);
        }
        double share = exp(dot / sqrt((double)P));
        total += share;
        for (int64_t i = 0; i < P; i++)
            y[i] += share * (j == c ? running(r, 1, b, t, h, i) : chunk_end(r, 1, b, t, j, h, i));
    }
    for (int64_t i = 0; i < P; i++) y[i] *= 1 / (1 + exp(-z[i])) / total;
}

static void rat_defined(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), H = param(r, "H"), P = param(r, "P");
    struct operand *y = operand_find(r, "y");
    double *want = malloc((size_t)y->count * sizeof *want);
    ASSERT(want != NULL);
    if (B * H * T * T * P <= 1 << 14) { /* longer ones take long */
        for (int64_t i = 0; i < B * T * H; i++) rat_token_defined(r, want + i * P, i / H / T, i / H % T, i % H);
        op_compare(r, "y by its definition", y->values, want, y->count, y->terms);
    }
    free(want);
}

static void rat_unsaved(struct run *r) {
    sequence_same(r, "saved=0", false);
}

static const char *const token_names[] = {"z", "v", "g", "q", "k", "y"};

/* Tokens from .. of the whole for a part of so many tokens a row: values, and the gradient of y. */
static void give_tokens(struct run *part, struct run *whole, int64_t from, int64_t count) {
    int64_t B = param(whole, "B"), T = param(whole, "T");
    for (int i = 0; i < 6; i++) {
        struct operand *o = operand_find(part, token_names[i]), *w = operand_find(whole, token_names[i]);
        int64_t element = w->count / (B * T);
        double *to = i < 5 ? o->values : o->gradients, *all = i < 5 ? w->values : w->gradients;
        for (int64_t b = 0; to && all && b < B; b++)
            memcpy(to + b * count * element, all + (b * T + from) * element, (size_t)(count * element) * sizeof(double));
    }
    struct operand *bias = operand_find(part, "bias");
    memcpy(bias->values, operand_find(whole, "bias")->values, (size_t)bias->count * sizeof(double));
}

static void copy_values(struct operand *to, const struct operand *from, bool as_before) {
    memcpy(as_before ? to->values_before : to->values, from->values, (size_t)to->count * sizeof(double));
}

/* The step's state as that with which row b of the whole begins, or emptied. */
static void begin_row(struct run *step, struct run *whole, int64_t b, bool empty) {
    for (int i = 0; i < 4; i++) {
        struct operand *o = operand_find(step, step_names[i]), *w = operand_find(whole, initial_names[i]);
        int64_t size = o->count / param(step, "B");
        for (int64_t k = b * size; k < (b + 1) * size; k++)
            o->values_before[k] = empty || !w ? 0 : i == 3 ? w->index[b] : w->values[k];
    }
}

/* Token by token. With a state, also the second half from the state behind the first. */
static void rat_by_steps(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), Q = param(r, "Q"), initial = param(r, "initial"), C = param(r, "C");
    struct operand *y = operand_find(r, "y"), *doc = operand_find(r, "doc");
    if (initial + T > Q * C) return; /* a row remembers more ends than a state holds */
    double *got = calloc((size_t)y->count, sizeof *got);
    ASSERT(got != NULL);
    struct run step;
    char changes[160];
    snprintf(changes, sizeof changes, "B=%lld H=%lld G=%lld P=%lld Q=%lld C=%lld base=%lld", (long long)B,
             (long long)param(r, "H"), (long long)param(r, "G"), (long long)param(r, "P"), (long long)Q, (long long)C,
             (long long)param(r, "base"));
    run_open_row(&step, r, &rat_step, changes);
    for (int64_t b = 0; b < B; b++) begin_row(&step, r, b, false);
    int64_t element = y->count / (B * T);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t b = 0; doc && b < B; b++)
            if (doc->index[b * T + t] != (t ? doc->index[b * T + t - 1] : 0)) begin_row(&step, r, b, true);
        give_tokens(&step, r, t, 1);
        run_forward(&step);
        for (int i = 0; i < step.operands; i++)
            if (step.operand[i].kind == OPERAND_STATE) copy_values(&step.operand[i], &step.operand[i], true);
        for (int64_t b = 0; b < B; b++)
            memcpy(got + (b * T + t) * element, operand_find(&step, "y")->values + b * element,
                   (size_t)element * sizeof *got);
    }
    op_compare(r, "y by steps", got, y->values, y->count, 2 * y->terms);
    if (param(r, "final")) {
        struct operand *s = operand_find(&step, "state_running"), *f = operand_find(r, "final_running");
        op_compare(r, "final running by steps", s->values, f->values, f->count, 2 * y->terms);
        s = operand_find(&step, "state_count"), f = operand_find(r, "final_count");
        op_compare(r, "final count by steps", s->values, f->values, f->count, 1);
        s = operand_find(&step, "state_k"), f = operand_find(r, "final_k");
        if (!doc) op_compare(r, "final keys by steps", s->values, f->values, f->count, 2 * y->terms);
    }
    free(got);
    run_close(&step);
}

/* The second half from the final state of the first: values, and gradients of what only it makes. */
static void rat_split(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), middle = T / 2, after = T - middle, C = T / param(r, "Q") + 1;
    if (middle == 0 || param(r, "initial")) return;
    struct operand *doc = operand_find(r, "doc");
    struct run first, second;
    char changes[96];
    snprintf(changes, sizeof changes, "T=%lld final=1 C=%lld", (long long)middle, (long long)C);
    run_open_like(&first, r, changes);
    snprintf(changes, sizeof changes, "T=%lld initial=1 final=0 C=%lld", (long long)after, (long long)C);
    run_open_like(&second, r, changes);
    give_tokens(&first, r, 0, middle);
    give_tokens(&second, r, middle, after);
    for (int64_t b = 0; doc && b < B; b++) {
        for (int64_t t = 0; t < middle; t++) operand_find(&first, "doc")->index[b * middle + t] = doc->index[b * T + t];
        for (int64_t t = middle; t < T; t++)
            operand_find(&second, "doc")->index[b * after + t - middle] =
                doc->index[b * T + t] - doc->index[b * T + middle - 1];
    }
    run_forward(&first);
    copy_values(operand_find(&second, "state_k"), operand_find(&first, "final_k"), false);
    copy_values(operand_find(&second, "state_v"), operand_find(&first, "final_v"), false);
    copy_values(operand_find(&second, "state_running"), operand_find(&first, "final_running"), false);
    for (int64_t b = 0; b < B; b++)
        operand_find(&second, "count")->index[b] = (int32_t)operand_find(&first, "final_count")->values[b];
    run_forward(&second);
    run_backward(&second);
    for (int i = 0; i < 6; i++) {
        struct operand *o = operand_find(&second, token_names[i]), *w = operand_find(r, token_names[i]);
        int64_t element = w->count / (B * T);
        for (int64_t b = 0; b < B; b++) {
            const double *got = i == 5 ? o->values : o->gradients, *want = i == 5 ? w->values : w->gradients;
            op_compare(r, token_names[i], got + b * after * element, want + (b * T + middle) * element, after * element,
                       4 * w->gradient_terms);
        }
    }
    run_close(&first);
    run_close(&second);
}

static const struct op_row rat = {
    .name = "rat",
    .parameters = "B=2 T=7 H=4 G=2 P=4 Q=3 doc=0 initial=0 final=0 C=16 base=1000 saved=1 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "T=1,2,3,7,12,33 H=4 G=1,2,4 Q=1,3,16 doc=0,4"},
        {OP_TEST, "T=12,29 H=2 G=1 P=2,6 Q=2,5,64 doc=2,4 final=1 C=32 base=0,1000 strided=0,1"},
        {OP_TEST, "B=3 T=1,9,40 H=2 Q=2,5 doc=0,2,4 initial=1,5,13 final=0,1 C=3,32"},
        {OP_TEST, "B=1 T=70 H=2 G=2 P=40,128 Q=16 doc=0,4 strided=1,2"},
        {OP_TEST, "B=1 T=130 H=2 G=1 P=64 Q=4,16 doc=5 strided=2"},
        {OP_TEST, "B=1 T=140 H=2 G=1,2 P=64 Q=2 doc=0,4 strided=2"},
        {OP_TEST, "B=1 T=70 H=2 G=1 P=8,128 Q=1 doc=0,5 final=1 C=8 strided=2"},
        {OP_TEST, "B=1 T=40 H=2 P=72 Q=2 initial=300 final=1 C=70 doc=0,3 strided=2"},
        {OP_TEST, "B=1 T=270 H=1 G=1 P=8 Q=70,260 doc=0,3 initial=0,90 C=4 strided=2"},
        {OP_GRAD, "B=1 T=1,2,7 H=2 G=1,2 P=2 Q=1,2,3 doc=0,2,4"},
        {OP_GRAD, "T=29 H=4 G=2 Q=4 doc=0,4 base=0,1000 strided=1"},
        {OP_GRAD, "T=9 H=2 G=1 initial=4,13 Q=3 C=2,16 doc=0,2"},
        {OP_LARGE, "B=2 T=4096 H=2 G=1 P=64,128 Q=4 strided=2"},
        {OP_LARGE, "B=1 T=8192 H=6 G=6 P=32 Q=2 strided=2"},  /* cuDNN, in two calls of three heads */
        {OP_LARGE, "B=1 T=26624 H=2 G=2 P=16 Q=4 strided=2"}, /* ... of two places of a head */
        {OP_LARGE, "B=2 T=3000 H=4 G=2 P=64,128 Q=8 doc=0,5 final=1 C=400 strided=2"},
        {OP_LARGE, "B=1 T=1000 H=16 G=1 P=128 Q=16,256 doc=0,3 strided=2"},
        {OP_PERF, "B=2 T=512 H=8 G=2 P=64 Q=16 strided=2"},
        {0, NULL}},
    .declare = rat_declare,
    .forward = rat_forward,
    .backward = rat_backward,
    .identities = (const struct op_identity[]){{"values by definition", rat_defined},
                                               {"the same when nothing is saved", rat_unsaved},
                                               {"sequence = loop of steps", rat_by_steps},
                                               {"packed documents = documents run apart", sequence_packed},
                                               {"split with a state = whole", rat_split},
                                               {"causality", sequence_causal},
                                               {NULL, NULL}},
};

const struct op_row *const ops_rat_rows[] = {&rat, &rat_step, NULL};
