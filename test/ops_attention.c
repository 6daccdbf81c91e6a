/* test/ops_attention.c: rows of attention, its cache and its step, and of rotary positions. test/ops.h says what a row
 * is; the identities that hold for every sequence operation are in test/ops_sequence.c.
 *
 * Positions come from token_positions, which every call here makes first, into its scratch. The parameter `initial` is
 * the number of tokens before the row, and C the slots of the cache they lie in (0 tokens: no cache). */
#include "test/ops_sequence.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- positions ---------------------------------------------------------------------------------------------------- */

#define POSITION_BYTES(r) (((size_t)(param(r, "B") * param(r, "T")) * sizeof(int32_t) + 255) / 256 * 256)

static tensor make_positions(struct run *r, tensor before) {
    if (!tensor_given(value(r, "doc")) && !tensor_given(before)) return tensor_none();
    tensor positions = tensor_2d(r->scratch, DTYPE_I32, param(r, "B"), param(r, "T"));
    r->ops->token_positions(r->dev, positions, value(r, "doc"), before);
    return positions;
}

static void *work_of(struct run *r) {
    return (char *)r->scratch + POSITION_BYTES(r);
}

/* Rows differ in how much comes before them. */
static int32_t tokens_before(const struct run *r, int64_t b) {
    return (int32_t)(b % 2 == 0 ? param(r, "initial") : param(r, "initial") / 2);
}

static void fill_before(struct run *r, struct operand *o) {
    for (int64_t b = 0; b < o->count; b++) o->index[b] = tokens_before(r, b);
}

/* The position of token t of row b by its definition. */
static int64_t position_of(struct run *r, int64_t b, int64_t t) {
    struct operand *doc = operand_find(r, "doc"), *before = operand_find(r, "count");
    const int32_t *row = doc ? doc->index + b * param(r, "T") : NULL;
    int64_t start = t;
    while (start > 0 && (!row || row[start - 1] == row[t])) start--;
    bool goes_on = start == 0 && (!row || row[0] == 0);
    return t - start + (goes_on && before ? before->index[b] : 0);
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

static struct attention_rule rule_of(const struct run *r) {
    return (struct attention_rule){.window = param(r, "window"), .tiled = param(r, "tiled")};
}

static struct attention_shape shape_of(const struct run *r, int64_t T) {
    return (struct attention_shape){.B = param(r, "B"), .T = T, .H = param(r, "H"), .G = param(r, "G"),
                                    .P = param(r, "P"), .C = param(r, "initial") ? param(r, "C") : 0};
}

static struct attention_cache cache_of(struct run *r) {
    return (struct attention_cache){value(r, "cache_k"), value(r, "cache_v"), value(r, "count")};
}

static void declare_cache(struct run *r) {
    int64_t B = param(r, "B"), G = param(r, "G"), P = param(r, "P"), C = param(r, "C");
    if (!param(r, "initial")) {
        absent(r, "cache_k");
        absent(r, "cache_v");
        absent(r, "count");
        return;
    }
    input(r, "cache_k", DIMS(B, C, G, P))->no_gradient = true;
    input(r, "cache_v", DIMS(B, C, G, P))->no_gradient = true;
    indices(r, "count", DIMS(B), fill_before);
}

static void attention_declare(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), H = param(r, "H"), G = param(r, "G"), P = param(r, "P");
    struct attention_shape s = shape_of(r, T);
    double terms = (double)(T + s.C + 4 * P), share = (double)(H / G);
    static const char *const names[] = {"y", "q", "k", "v"};
    for (int i = 0; i < 4; i++) {
        struct operand *o = (i == 0 ? output : input)(r, names[i], DIMS(B, T, i < 2 ? H : G, P));
        o->lead = 2;
        o->terms = terms;
        o->gradient_terms = 8 * (terms + share * (double)T); /* differences, which may cancel */
    }
    declare_cache(r);
    sequence_declare_doc(r);
    r->saved_bytes = param(r, "saved") ? (size_t)(B * H * T) * dtype_size(r->ops->real) : 0;
    r->forward_scratch = POSITION_BYTES(r) + r->ops->attention_forward_scratch(s);
    r->backward_scratch = POSITION_BYTES(r) + r->ops->attention_backward_scratch(s);
}

static tensor lse_of(struct run *r) {
    if (!param(r, "saved")) return tensor_none();
    return tensor_3d(r->saved, r->ops->real, param(r, "B"), param(r, "H"), param(r, "T"));
}

static void attention_forward(struct run *r) {
    tensor positions = make_positions(r, value(r, "count"));
    r->ops->attention_forward(r->dev, value(r, "y"), lse_of(r), value(r, "q"), value(r, "k"), value(r, "v"), positions,
                              cache_of(r), rule_of(r), work_of(r));
}

static void attention_backward(struct run *r) {
    tensor positions = make_positions(r, value(r, "count"));
    r->ops->attention_backward(r->dev, gradient(r, "q"), gradient(r, "k"), gradient(r, "v"), gradient(r, "y"),
                               value(r, "y"), lse_of(r), value(r, "q"), value(r, "k"), value(r, "v"), positions,
                               cache_of(r), rule_of(r), work_of(r));
}

static void attention_flops(struct run *r, double *forward, double *backward) {
    double T = (double)param(r, "T"), window = (double)param(r, "window");
    double keys = window > 0 && window < T ? window - window * (window - 1) / (2 * T) : (T + 1) / 2;
    *forward = 4 * (double)(param(r, "B") * param(r, "H") * param(r, "P")) * T * keys;
    *backward = 2.5 * *forward;
}

/* Where what token t of row b sees `back` tokens before it lies: an element of k, or of the cache for the place behind;
 * -1 if it does not see that far. */
static const double *seen(struct run *r, const char *name, int64_t b, int64_t t, int64_t back, int64_t g) {
    int64_t T = param(r, "T"), G = param(r, "G"), P = param(r, "P"), C = param(r, "C"), window = param(r, "window");
    int64_t position = position_of(r, b, t);
    struct operand *count = operand_find(r, "count");
    if (back > position || (window > 0 && back >= window)) return NULL;
    if (back <= t) return operand_find(r, name)->values + ((b * T + t - back) * G + g) * P;
    if (!count || back - t > C) return NULL; /* the cache does not go back so far */
    const char *cached = name[0] == 'k' ? "cache_k" : "cache_v";
    return operand_find(r, cached)->values + ((b * C + (position - back) % C) * G + g) * P;
}

/* The definition, in double, for one token of one head. */
static void attend(struct run *r, double *out, int64_t b, int64_t t, int64_t h) {
    int64_t T = param(r, "T"), H = param(r, "H"), G = param(r, "G"), P = param(r, "P");
    int64_t g = param(r, "tiled") ? h % G : h * G / H;
    const double *q = operand_find(r, "q")->values + ((b * T + t) * H + h) * P, *key, *v;
    double total = 0;
    memset(out, 0, (size_t)P * sizeof *out);
    for (int64_t back = 0; (key = seen(r, "k", b, t, back, g)); back++) {
        double dot = 0;
        for (int64_t c = 0; c < P; c++) dot += q[c] * key[c];
        double share = exp(dot / sqrt((double)P));
        v = seen(r, "v", b, t, back, g);
        total += share;
        for (int64_t c = 0; c < P; c++) out[c] += share * v[c];
    }
    for (int64_t c = 0; c < P; c++) out[c] /= total;
}

static void attention_defined(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), H = param(r, "H"), P = param(r, "P");
    struct operand *y = operand_find(r, "y");
    double *want = malloc((size_t)y->count * sizeof *want);
    ASSERT(want != NULL);
    if (B * H * T * T * P > 1 << 22) { /* longer ones show nothing new, but take long */
        free(want);
        return;
    }
    for (int64_t i = 0; i < B * T * H; i++) attend(r, want + i * P, i / H / T, i / H % T, i % H);
    op_compare(r, "y by its definition", y->values, want, y->count, y->terms);
    free(want);
}

static void attention_unsaved(struct run *r) {
    sequence_same(r, "saved=0", false);
}

/* --- the cache ---------------------------------------------------------------------------------------------------- */

static void fill_count(struct run *r, struct operand *o) {
    for (int64_t b = 0; b < o->count; b++) o->values_before[b] = tokens_before(r, b);
}

static void store_declare(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), G = param(r, "G"), P = param(r, "P"), C = param(r, "C");
    state(r, "cache_k", DIMS(B, C, G, P))->type = OPERAND_ACT;
    state(r, "cache_v", DIMS(B, C, G, P))->type = OPERAND_ACT;
    struct operand *count = state(r, "count", DIMS(B));
    count->type = OPERAND_I32;
    count->fill = fill_count;
    input(r, "k", DIMS(B, T, G, P))->lead = 2;
    input(r, "v", DIMS(B, T, G, P))->lead = 2;
    sequence_declare_doc(r);
    r->forward_scratch = POSITION_BYTES(r);
}

static void store_forward(struct run *r) {
    tensor positions = make_positions(r, value(r, "count"));
    r->ops->attention_store(r->dev, cache_of(r), value(r, "k"), value(r, "v"), positions);
}

static const struct op_row attention_store = {
    .name = "attention_store",
    .parameters = "B=3 T=5 G=2 P=4 C=8 doc=0 initial=0 strided=0",
    .cases = (const struct op_cases[]){{OP_TEST, "T=1,5,8,19 C=1,8,40 doc=0,2,4 initial=0,3,13 strided=0,1"},
                                       {OP_TEST, "T=70 G=3 P=64 C=48 doc=0,4 initial=9 strided=0,2"},
                                       {0, NULL}},
    .declare = store_declare,
    .forward = store_forward,
};

static void step_declare(struct run *r) {
    int64_t B = param(r, "B"), H = param(r, "H"), P = param(r, "P");
    struct operand *y = output(r, "y", DIMS(B, H, P));
    y->lead = 1;
    y->terms = (double)(16 * (param(r, "C") + P)); /* one sum that may cancel */
    input(r, "q", DIMS(B, H, P))->lead = 1;
    declare_cache(r);
    struct attention_shape s = shape_of(r, 1);
    r->forward_scratch = r->ops->attention_step_scratch(s);
}

static void step_forward(struct run *r) {
    r->ops->attention_step(r->dev, value(r, "y"), value(r, "q"), cache_of(r), rule_of(r), r->scratch);
}

static const struct op_row attention_step = {
    .name = "attention_step",
    .parameters = "B=3 H=4 G=2 P=8 C=8 initial=5 window=0 tiled=0 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "G=1,2,4 P=2,8 C=8 initial=2,8,29 window=0,3 tiled=0,1 strided=0,1"},
        {OP_TEST, "B=1 H=2 G=1 P=64,80,256 C=300 initial=120,300,3000 window=0,260 strided=2"},
        {OP_PERF, "B=1,8 H=16 G=16 P=128 C=2048 initial=2048"},
        {0, NULL}},
    .declare = step_declare,
    .forward = step_forward,
};

/* One array's rows b, tokens from .. from+count-1, of B rows of T tokens, behind each other. */
static void cut(double *to, const double *whole, int64_t B, int64_t T, int64_t element, int64_t from, int64_t count) {
    size_t bytes = (size_t)(count * element) * sizeof(double);
    for (int64_t b = 0; b < B; b++) memcpy(to + b * count * element, whole + (b * T + from) * element, bytes);
}

/* Give `part` what belongs to tokens from .. of the whole: values of q, k, v and the gradient of y, as far as it has
 * them. */
static void give_tokens(struct run *part, struct run *whole, int64_t from, int64_t count) {
    static const char *const names[] = {"q", "k", "v", "y"};
    int64_t B = param(whole, "B"), T = param(whole, "T");
    for (int i = 0; i < 4; i++) {
        struct operand *o = operand_find(part, names[i]), *w = operand_find(whole, names[i]);
        if (!o) continue;
        int64_t element = w->count / (B * T);
        if (i < 3) cut(o->values, w->values, B, T, element, from, count);
        else if (o->gradients && w->gradients) cut(o->gradients, w->gradients, B, T, element, from, count);
    }
}

/* Document numbers of tokens from .. , where what comes before belongs to document 0. */
static void give_documents(struct run *part, struct run *whole, int64_t from, int64_t count) {
    struct operand *doc = operand_find(part, "doc"), *w = operand_find(whole, "doc");
    for (int64_t i = 0; doc && i < doc->count; i++) {
        const int32_t *row = w->index + i / count * param(whole, "T");
        doc->index[i] = row[from + i % count] - (from > 0 ? row[from - 1] : 0);
    }
}

/* A cache that a store left, as the operand of the next operation. */
static void give_cache(struct run *to, struct run *store, bool as_state) {
    static const char *const names[] = {"cache_k", "cache_v"};
    for (int i = 0; i < 2; i++) {
        struct operand *o = operand_find(to, names[i]), *s = operand_find(store, names[i]);
        memcpy(as_state ? o->values_before : o->values, s->values, (size_t)o->count * sizeof(double));
    }
    struct operand *count = operand_find(to, "count"), *s = operand_find(store, "count");
    for (int64_t b = 0; b < s->count; b++) {
        if (as_state) count->values_before[b] = s->values[b];
        else count->index[b] = (int32_t)s->values[b];
    }
}

static void store_open(struct run *store, struct run *r, int64_t T, int64_t C, bool doc) {
    char changes[160];
    snprintf(changes, sizeof changes, "B=%lld T=%lld G=%lld P=%lld C=%lld doc=%d", (long long)param(r, "B"),
             (long long)T, (long long)param(r, "G"), (long long)param(r, "P"), (long long)C, doc);
    run_open_row(store, r, &attention_store, changes);
    for (int i = 0; i < store->operands; i++)
        if (store->operand[i].kind == OPERAND_STATE)
            memset(store->operand[i].values_before, 0, (size_t)store->operand[i].count * sizeof(double));
}

/* The second half of the row from a cache of the first gives the second half of values and gradients. */
static void split_with(struct run *r, int64_t C) {
    int64_t B = param(r, "B"), T = param(r, "T"), before = T / 2, after = T - before;
    struct run store, second;
    char changes[96];
    store_open(&store, r, before, C, param(r, "doc"));
    give_tokens(&store, r, 0, before);
    give_documents(&store, r, 0, before);
    run_forward(&store);
    snprintf(changes, sizeof changes, "T=%lld initial=1 C=%lld", (long long)after, (long long)C);
    run_open_like(&second, r, changes);
    give_cache(&second, &store, false);
    give_tokens(&second, r, before, after);
    give_documents(&second, r, before, after);
    run_forward(&second);
    run_backward(&second);
    static const char *const names[] = {"y", "q", "k", "v"};
    for (int i = 0; i < 4; i++) {
        struct operand *o = operand_find(&second, names[i]), *w = operand_find(r, names[i]);
        double *want = malloc((size_t)o->count * sizeof *want);
        ASSERT(want != NULL);
        cut(want, i == 0 ? w->values : w->gradients, B, T, w->count / (B * T), before, after);
        op_compare(r, names[i], i == 0 ? o->values : o->gradients, want, o->count, 2 * w->gradient_terms);
        free(want);
    }
    run_close(&store);
    run_close(&second);
}

static void attention_split(struct run *r) {
    int64_t T = param(r, "T"), window = param(r, "window");
    if (T < 2 || param(r, "initial")) return;
    split_with(r, T);
    if (window > 0) split_with(r, window);
}

/* Token by token through the cache. Only where the cache holds what a token sees. */
static void attention_steps(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), window = param(r, "window"), initial = param(r, "initial");
    int64_t C = initial ? param(r, "C") : window ? window : T;
    if (C < initial + T && !(window > 0 && window <= C)) return;
    struct operand *y = operand_find(r, "y"), *doc = operand_find(r, "doc");
    double *got = calloc((size_t)y->count, sizeof *got);
    ASSERT(got != NULL);
    struct run store, step;
    char changes[160];
    store_open(&store, r, 1, C, false);
    for (int64_t b = 0; initial && b < B; b++) operand_find(&store, "count")->values_before[b] = tokens_before(r, b);
    for (int i = 0; initial && i < 2; i++) {
        struct operand *o = operand_find(&store, i ? "cache_v" : "cache_k");
        memcpy(o->values_before, operand_find(r, o->name)->values, (size_t)o->count * sizeof(double));
    }
    snprintf(changes, sizeof changes, "B=%lld H=%lld G=%lld P=%lld C=%lld initial=1 window=%lld tiled=%lld",
             (long long)B, (long long)param(r, "H"), (long long)param(r, "G"), (long long)param(r, "P"), (long long)C,
             (long long)window, (long long)param(r, "tiled"));
    run_open_row(&step, r, &attention_step, changes);
    for (int64_t t = 0; t < T; t++) {
        for (int64_t b = 0; doc && b < B; b++)
            if (doc->index[b * T + t] != (t ? doc->index[b * T + t - 1] : 0))
                operand_find(&store, "count")->values_before[b] = 0;
        give_tokens(&store, r, t, 1);
        run_forward(&store);
        give_cache(&step, &store, false);
        give_tokens(&step, r, t, 1);
        run_forward(&step);
        give_cache(&store, &store, true);
        int64_t element = y->count / (B * T);
        for (int64_t b = 0; b < B; b++)
            memcpy(got + (b * T + t) * element, operand_find(&step, "y")->values + b * element,
                   (size_t)element * sizeof *got);
    }
    op_compare(r, "y by steps", got, y->values, y->count, 2 * y->terms);
    free(got);
    run_close(&store);
    run_close(&step);
}

static const struct op_row attention = {
    .name = "attention",
    .parameters = "B=2 T=7 H=2 G=2 P=4 window=0 tiled=0 doc=0 initial=0 final=0 C=8 saved=1 strided=0",
    .cases = (const struct op_cases[]){
        /* Where all tokens see one key only, the gradients of q and k are sums that cancel to nothing: not tested. */
        {OP_TEST, "T=3,7,33,65 H=4 G=1,2 P=4 doc=0,4"},
        {OP_TEST, "T=17,70 H=4 G=2 P=2 window=2,17,64 tiled=0,1 doc=4 strided=1"},
        {OP_TEST, "B=3 T=9,40 H=4 G=2 P=8 doc=2,4 initial=5,13 C=8,60 window=0,4"},
        {OP_TEST, "B=3 T=1 H=4 G=2 P=8 initial=5,13 C=8,60 window=0,4"},
        {OP_TEST, "B=1 T=70 H=2 P=16,80,256 doc=0,4 strided=1"},
        {OP_TEST, "B=1 T=70 H=2 P=40,64,128 doc=4 strided=2"},
        {OP_TEST, "B=1 T=129,257 H=2 G=1 P=64,128 window=0,100 doc=5 strided=2"}, /* edges of a GPU's tiles */
        {OP_TEST, "B=2 T=130 H=2 G=1 P=64,128 doc=4 initial=90 C=70 window=0,66 strided=2"},
        {OP_LARGE, "B=4 T=1000 H=8 G=2 P=64,128 doc=0,1 window=0,300 strided=2"},
        {OP_LARGE, "B=2 T=2048 H=12 G=12 P=64 doc=0,1 strided=2"},
        {OP_GRAD, "B=1 T=1,2,7 G=1,2 P=2 window=0,1,3 doc=0,2,4"},
        {OP_GRAD, "T=70 H=4 G=2 tiled=0,1 doc=4 window=0,9 strided=1"},
        {OP_GRAD, "T=7 initial=3,13 window=0,4 doc=0,2"},
        {OP_PERF, "B=2 T=512 H=8 G=8 P=64 strided=2"},
        {OP_PERF, "B=1 T=2048 H=4 G=4 P=128 window=0,512 strided=2"},
        {0, NULL}},
    .declare = attention_declare,
    .forward = attention_forward,
    .backward = attention_backward,
    .flops = attention_flops,
    .identities = (const struct op_identity[]){{"values by definition", attention_defined},
                                               {"the same when nothing is saved", attention_unsaved},
                                               {"sequence = loop of steps", attention_steps},
                                               {"packed documents = documents run apart", sequence_packed},
                                               {"split with a cache = whole", attention_split},
                                               {"causality", sequence_causal},
                                               {NULL, NULL}},
};

/* --- rotary positions --------------------------------------------------------------------------------------------- */

static void rope_declare(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), H = param(r, "H"), P = param(r, "P");
    struct operand *x = input(r, "x", DIMS(B, T, H, P)), *y = output(r, "y", DIMS(B, T, H, P)); /* y may lie in x */
    y->lead = x->lead = 2;
    y->terms = param(r, "norm") ? (double)(4 * P) : 4;
    x->gradient_terms = param(r, "norm") ? (double)(32 * P + 32) : 4; /* what is left of terms that cancel */
    if (param(r, "norm")) {
        x->mean = 2; /* heads of two channels near zero would have steep gradients */
        statistic(r, "rstd", DIMS(B, T, H))->terms = (double)P;
        struct operand *weight = parameter(r, "weight", DIMS(P));
        weight->mean = 1;
        weight->gradient_terms = (double)(16 * B * T * H);
    } else {
        absent(r, "rstd");
        absent(r, "weight");
    }
    if (param(r, "in_place")) {
        y->alias = "x";
        x->alias_gradient = "y";
    }
    if (param(r, "initial")) indices(r, "count", DIMS(B), fill_before);
    else absent(r, "count");
    sequence_declare_doc(r);
    r->forward_scratch = POSITION_BYTES(r);
    r->backward_scratch =
        POSITION_BYTES(r) + (param(r, "norm") ? r->ops->rope_backward_scratch(B * T, H, P) : 0);
}

static void rope_forward(struct run *r) {
    tensor positions = make_positions(r, value(r, "count"));
    r->ops->rope_forward(r->dev, value(r, "y"), value(r, "rstd"), value(r, "x"), value(r, "weight"), positions,
                         (double)param(r, "base"), 1e-5);
}

static void rope_backward(struct run *r) {
    tensor positions = make_positions(r, value(r, "count"));
    bool norm = param(r, "norm");
    r->ops->rope_backward(r->dev, gradient(r, "x"), gradient(r, "weight"), gradient(r, "y"), value(r, "rstd"),
                          norm ? value(r, "x") : tensor_none(), value(r, "weight"), positions, (double)param(r, "base"),
                          norm ? work_of(r) : NULL);
}

static void rope_defined(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), H = param(r, "H"), P = param(r, "P"), half = P / 2;
    struct operand *x = operand_find(r, "x"), *y = operand_find(r, "y"), *w = operand_find(r, "weight");
    double *want = malloc((size_t)y->count * sizeof *want), base = (double)param(r, "base");
    ASSERT(want != NULL);
    for (int64_t at = 0; at < B * T * H; at++) {
        const double *from = x->values + at * P;
        double squares = 0, rstd = 1;
        for (int64_t i = 0; i < P; i++) squares += from[i] * from[i];
        if (w) rstd = 1 / sqrt(squares / (double)P + 1e-5);
        double position = (double)position_of(r, at / H / T, at / H % T);
        for (int64_t i = 0; i < half; i++) {
            double angle = base > 0 ? position * pow(base, -2.0 * (double)i / (double)P) : 0;
            double a = from[i] * rstd * (w ? w->values[i] : 1);
            double b = from[i + half] * rstd * (w ? w->values[i + half] : 1);
            want[at * P + i] = a * cos(angle) - b * sin(angle);
            want[at * P + i + half] = b * cos(angle) + a * sin(angle);
        }
    }
    double last = (double)(param(r, "initial") + T); /* the angle's rounding grows with the position */
    op_compare(r, "y by its definition", y->values, want, y->count, y->terms + last * last);
    free(want);
}

static const struct op_row rope = {
    .name = "rope",
    .parameters = "B=2 T=5 H=3 P=4 norm=0 in_place=0 doc=0 initial=0 base=10000 strided=0",
    .cases = (const struct op_cases[]){
        {OP_TEST, "T=1,7,65 H=1,3 P=2,6,16 norm=0,1 doc=0,2,4 initial=0,100000 base=0,10000 strided=0,1"},
        {OP_TEST, "T=7 in_place=1 doc=0,4 strided=0,1"},
        {OP_TEST, "T=40 H=5 P=64,80,128,256 norm=0,1 doc=0,4 base=10000 strided=0,2"},
        {OP_TEST, "T=40 H=24 P=128 in_place=1 doc=4 strided=2"},
        {OP_LARGE, "B=8 T=2048 H=32 P=64 norm=0,1 doc=1 strided=2"},
        {OP_GRAD, "T=1,7 P=2,6 norm=0,1 doc=0,2 initial=0,5 base=0,10000 strided=1"},
        {OP_PERF, "B=8 T=512 H=24 P=64 in_place=1 strided=2"},
        {0, NULL}},
    .declare = rope_declare,
    .forward = rope_forward,
    .backward = rope_backward,
    .identities = (const struct op_identity[]){{"values by definition", rope_defined}, {NULL, NULL}},
};

const struct op_row *const ops_attention_rows[] = {&attention, &attention_store, &attention_step, &rope, NULL};
