/* test/ops_sequence.c: operands and identities that all sequence operations share (see test/ops_sequence.h).
 *
 * The identities run pieces of a case (some batch rows, some tokens) as cases of their own, put the pieces' results
 * together, and compare with what the case as a whole gave.
 */
#include "test/ops_sequence.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- operands ----------------------------------------------------------------------------------------------------- */

/* Does a new document start at token t (i: its place in the array)? At least the kind decides; see the header. */
static bool starts_document(const struct run *r, const struct operand *o, int64_t i, int64_t t) {
    int64_t T = o->dim[1];
    switch (param(r, "doc")) {
    case 1: return draw_below(r, o, i, T) < 3;
    case 2: return t == 0 || t == T / 2;
    case 3: return t > 0;
    case 5: return t > 0 && (t % 64 == 0 || t % 128 == 1);
    default: return draw_below(r, o, i, 3) == 0;
    }
}

static void fill_doc(struct run *r, struct operand *o) {
    for (int64_t i = 0, number = 0; i < o->count; i++) {
        int64_t t = i % o->dim[1];
        if (t == 0) number = 0;
        if (starts_document(r, o, i, t)) number += param(r, "doc") == 2 ? 3 : t == 0 ? 1 : 1 + draw_below(r, o, -i, 2);
        o->index[i] = (int32_t)number;
    }
}

void sequence_declare_state(struct run *r, const char *initial, const char *final, int ndim, const int64_t *dim) {
    if (param(r, "initial")) {
        struct operand *o = input(r, initial, ndim, dim);
        o->type = OPERAND_REAL;
        o->no_gradient = param(r, "initial") == 2;
    } else {
        absent(r, initial);
    }
    if (param(r, "final")) {
        struct operand *o = output(r, final, ndim, dim);
        o->type = OPERAND_REAL;
        o->no_gradient = param(r, "final") == 2;
    } else {
        absent(r, final);
    }
}

void sequence_declare(struct run *r, int ndim, const int64_t *dim) {
    sequence_declare_state(r, "initial", "final", ndim, dim);
    sequence_declare_doc(r);
}

void sequence_declare_doc(struct run *r) {
    if (param(r, "doc")) indices(r, "doc", DIMS(param(r, "B"), param(r, "T")), fill_doc);
    else absent(r, "doc");
}

/* --- pieces ------------------------------------------------------------------------------------------------------- */

/* Batch rows row .. row+rows-1, tokens t .. t+tokens-1. */
struct piece {
    int64_t row, rows, t, tokens;
};

enum place { PLACE_TOKENS, PLACE_STATE, PLACE_SHARED };

/* What follows the prefix in the name of a state, or of a part of one: "_m" in "final_m" for "final"; else NULL. */
static const char *part_of_state(const struct operand *o, const char *prefix) {
    size_t length = strlen(prefix);
    if (strncmp(o->name, prefix, length) != 0) return NULL;
    return o->name[length] == 0 || o->name[length] == '_' ? o->name + length : NULL;
}

/* The operand of that prefix and part; NULL if absent. */
static struct operand *find_state(struct run *r, const char *prefix, const char *part) {
    char name[64];
    snprintf(name, sizeof name, "%s%s", prefix, part);
    return operand_find(r, name);
}

static enum place operand_place(const struct operand *o) {
    static const char *const tokens[] = {"y", "x", "dt", "a", "b", "c", "raw", "z", "q", "k", "v", "i", "f", "g", "u",
                                         "others", "doc"};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
        if (strcmp(o->name, tokens[i]) == 0) return PLACE_TOKENS;
    if (part_of_state(o, "initial") || part_of_state(o, "final")) return PLACE_STATE;
    static const char *const states[] = {"cache_k", "cache_v", "count", "state_k", "state_v", "state_running"};
    for (size_t i = 0; i < sizeof states / sizeof *states; i++)
        if (strcmp(o->name, states[i]) == 0) return PLACE_STATE;
    return PLACE_SHARED;
}

/* Copy between the array of a whole operand and that of a piece, elements of `size` bytes. */
static void copy_piece(const struct operand *whole, struct piece p, void *whole_array, void *piece_array, size_t size,
                       bool to_piece) {
    enum place place = operand_place(whole);
    int64_t T = place == PLACE_TOKENS ? whole->dim[1] : 1, element = 1;
    for (int i = place == PLACE_TOKENS ? 2 : 1; i < whole->ndim; i++) element *= whole->dim[i];
    if (place == PLACE_SHARED) p = (struct piece){0, whole->dim[0], 0, 1};
    if (place == PLACE_STATE) p = (struct piece){p.row, p.rows, 0, 1};
    size_t bytes = (size_t)(p.tokens * element) * size;
    for (int64_t i = 0; i < p.rows; i++) {
        char *in_whole = (char *)whole_array + (size_t)(((p.row + i) * T + p.t) * element) * size;
        char *in_piece = (char *)piece_array + (size_t)i * bytes;
        memcpy(to_piece ? in_piece : in_whole, to_piece ? in_whole : in_piece, bytes);
    }
}

/* Give a piece's run the inputs of the whole: values, document numbers, gradients of outputs. */
static void piece_fill(struct run *part, struct run *whole, struct piece p) {
    for (int i = 0; i < part->operands; i++) {
        struct operand *o = &part->operand[i], *w = operand_find(whole, o->name);
        if (w == NULL) continue; /* a state between two pieces */
        if (o->kind == OPERAND_INDEX) copy_piece(w, p, w->index, o->index, sizeof *o->index, true);
        else if (o->kind == OPERAND_INPUT) copy_piece(w, p, w->values, o->values, sizeof(double), true);
        else if (tensor_given(o->gradient) && tensor_given(w->gradient))
            copy_piece(w, p, w->gradients, o->gradients, sizeof(double), true);
    }
}

/* Results put together from pieces: one array for each operand of the whole. */
struct assembly {
    double *values[OP_OPERANDS], *gradients[OP_OPERANDS];
};

static void assembly_open(struct assembly *a, const struct run *whole) {
    *a = (struct assembly){{NULL}, {NULL}};
    for (int i = 0; i < whole->operands; i++) {
        a->values[i] = calloc((size_t)whole->operand[i].count + 1, sizeof(double));
        a->gradients[i] = calloc((size_t)whole->operand[i].count + 1, sizeof(double));
        ASSERT(a->values[i] != NULL && a->gradients[i] != NULL);
    }
}

/* Take over a piece's results; gradients of shared parameters are added up, without what was there before. */
static void assembly_take(struct assembly *a, struct run *whole, struct run *part, struct piece p, bool backward) {
    for (int i = 0; i < whole->operands; i++) {
        struct operand *w = &whole->operand[i], *o = operand_find(part, w->name);
        if (o == NULL) continue;
        if (w->kind == OPERAND_OUTPUT) copy_piece(w, p, a->values[i], o->values, sizeof(double), false);
        if (!backward || w->kind != OPERAND_INPUT || !tensor_given(o->gradient)) continue;
        if (operand_place(w) != PLACE_SHARED) copy_piece(w, p, a->gradients[i], o->gradients, sizeof(double), false);
        for (int64_t k = 0; operand_place(w) == PLACE_SHARED && k < w->count; k++)
            a->gradients[i][k] += o->gradients[k] - o->gradients_before[k];
    }
}

/* Compare with the whole and free. */
static void assembly_close(struct assembly *a, struct run *whole, bool backward) {
    for (int i = 0; i < whole->operands; i++) {
        struct operand *w = &whole->operand[i];
        char what[64];
        if (w->kind == OPERAND_OUTPUT) op_compare(whole, w->name, a->values[i], w->values, w->count, 2 * w->terms);
        if (backward && w->kind == OPERAND_INPUT && tensor_given(w->gradient)) {
            snprintf(what, sizeof what, "the gradient of %s", w->name);
            for (int64_t k = 0; operand_place(w) == PLACE_SHARED && k < w->count; k++)
                a->gradients[i][k] += w->gradients_before[k];
            op_compare(whole, what, a->gradients[i], w->gradients, w->count, 2 * w->gradient_terms);
        }
        free(a->values[i]);
        free(a->gradients[i]);
    }
}

/* --- identities --------------------------------------------------------------------------------------------------- */

void sequence_same(struct run *r, const char *changes, bool backward) {
    struct run other;
    struct assembly a;
    struct piece all = {0, param(r, "B"), 0, param(r, "T")};
    run_open_like(&other, r, changes);
    run_forward(&other);
    if (backward) run_backward(&other);
    assembly_open(&a, r);
    assembly_take(&a, r, &other, all, backward);
    assembly_close(&a, r, backward);
    run_close(&other);
}

void sequence_chunks(struct run *r) {
    const int64_t lengths[] = {1, 5, param(r, "T")};
    char changes[32];
    for (int i = 0; i < 3; i++) {
        snprintf(changes, sizeof changes, "Q=%lld", (long long)lengths[i]);
        sequence_same(r, changes, true);
    }
    sequence_same(r, "saved=0", false);
}

static int32_t document_of(const struct operand *doc, int64_t row, int64_t t) {
    return t < 0 ? 0 : doc->index[row * doc->dim[1] + t];
}

void sequence_packed(struct run *r) {
    struct operand *doc = operand_find(r, "doc");
    if (doc == NULL) return;
    struct assembly a;
    assembly_open(&a, r);
    for (int64_t row = 0; row < param(r, "B"); row++) {
        for (int64_t t = 0, end, T = param(r, "T"); t < T; t = end) {
            for (end = t + 1; end < T && document_of(doc, row, end) == document_of(doc, row, t);) end++;
            struct piece p = {row, 1, t, end - t};
            struct run part;
            char changes[96];
            bool first = t == 0 && document_of(doc, row, 0) == 0; /* goes on with the initial state */
            snprintf(changes, sizeof changes, "B=1 T=%lld doc=0 initial=%lld final=%lld", (long long)p.tokens,
                     (long long)(first ? param(r, "initial") : 0), (long long)(end == T ? param(r, "final") : 0));
            run_open_like(&part, r, changes);
            piece_fill(&part, r, p);
            run_forward(&part);
            run_backward(&part);
            assembly_take(&a, r, &part, p, true);
            run_close(&part);
        }
    }
    assembly_close(&a, r, true);
}

/* Hand the first half's final state to the second half, or the gradient of that state back. */
static void hand_over(struct run *first, struct run *second, bool back) {
    for (int i = 0; i < first->operands; i++) {
        struct operand *given = &first->operand[i];
        const char *part = part_of_state(given, "final");
        if (part == NULL) continue;
        struct operand *taken = find_state(second, "initial", part);
        size_t size = (size_t)given->count * sizeof(double);
        if (!back) memcpy(taken->values, given->values, size);
        else if (!given->no_gradient) memcpy(given->gradients, taken->gradients, size);
    }
}

void sequence_split(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), middle = T / 2;
    if (middle == 0) return;
    struct piece before = {0, B, 0, middle}, after = {0, B, middle, T - middle};
    struct run first, second;
    struct assembly a;
    char changes[64];
    snprintf(changes, sizeof changes, "T=%lld final=1", (long long)middle);
    run_open_like(&first, r, changes);
    snprintf(changes, sizeof changes, "T=%lld initial=1", (long long)(T - middle));
    run_open_like(&second, r, changes);
    piece_fill(&first, r, before);
    piece_fill(&second, r, after);
    struct operand *doc = operand_find(&second, "doc");
    for (int64_t i = 0; doc && i < doc->count; i++) /* the state that is handed over belongs to document 0 */
        doc->index[i] -= document_of(operand_find(r, "doc"), i / doc->dim[1], middle - 1);

    run_forward(&first);
    hand_over(&first, &second, false);
    run_forward(&second);
    run_backward(&second);
    hand_over(&first, &second, true);
    run_forward(&first); /* again, because the gradients go up with the values */
    run_backward(&first);

    assembly_open(&a, r);
    assembly_take(&a, r, &second, after, true);
    assembly_take(&a, r, &first, before, true);
    for (int i = 0; i < r->operands; i++) { /* both have a final state: the whole's is the second's */
        struct operand *w = &r->operand[i];
        struct operand *o = operand_find(&second, w->name);
        if (part_of_state(w, "final")) memcpy(a.values[i], o->values, (size_t)w->count * sizeof(double));
    }
    assembly_close(&a, r, true);
    run_close(&first);
    run_close(&second);
}

void sequence_causal(struct run *r) {
    int64_t B = param(r, "B"), T = param(r, "T"), from = T / 2;
    struct operand *y = operand_find(r, "y");
    struct run other;
    run_open_like(&other, r, "");
    for (int i = 0; i < other.operands; i++) {
        struct operand *o = &other.operand[i];
        if (o->kind != OPERAND_INPUT || operand_place(o) != PLACE_TOKENS) continue;
        int64_t element = o->count / (B * T);
        for (int64_t k = 0; k < o->count; k++)
            if (k / element % T >= from) o->values[k] *= 1.5;
    }
    run_forward(&other);
    struct operand *changed = operand_find(&other, "y");
    int64_t element = y->count / (B * T);
    bool same = true, moved = false;
    for (int64_t k = 0; k < y->count; k++) {
        bool equal = memcmp(&y->values[k], &changed->values[k], sizeof(double)) == 0;
        if (k / element % T < from) same &= equal;
        else moved |= !equal;
    }
    op_expect(r, same, "values before token %lld changed when only inputs from there on did", (long long)from);
    op_expect(r, moved, "no value from token %lld on changed when the inputs from there on did", (long long)from);
    run_close(&other);
}

/* The inputs of one token for the step. */
static void step_fill(struct run *step, struct run *r, int64_t t) {
    struct piece p = {0, param(r, "B"), t, 1};
    for (int i = 0; i < step->operands; i++) {
        struct operand *o = &step->operand[i], *w = operand_find(r, o->name);
        if (w && o->kind == OPERAND_INPUT) copy_piece(w, p, w->values, o->values, sizeof(double), true);
    }
}

/* The state before the first step: the initial one, or 0. */
static void states_begin(struct run *step, struct run *r) {
    for (int i = 0; i < step->operands; i++) {
        struct operand *state = &step->operand[i];
        const char *part = part_of_state(state, "state");
        if (part == NULL) continue;
        struct operand *initial = find_state(r, "initial", part);
        size_t size = (size_t)state->count * sizeof(double);
        if (initial) memcpy(state->values_before, initial->values, size);
        else memset(state->values_before, 0, size);
    }
}

/* What a step left is what the next one finds; but 0 in the rows where token t starts a document. */
static void states_go_on(struct run *step, struct run *r, int64_t t) {
    struct operand *doc = operand_find(r, "doc");
    int64_t B = param(r, "B");
    for (int i = 0; i < step->operands; i++) {
        struct operand *state = &step->operand[i];
        if (part_of_state(state, "state") == NULL) continue;
        int64_t size = state->count / B;
        if (t > 0) memcpy(state->values_before, state->values, (size_t)state->count * sizeof(double));
        for (int64_t row = 0; doc && row < B; row++)
            if (document_of(doc, row, t) != document_of(doc, row, t - 1))
                memset(state->values_before + row * size, 0, (size_t)size * sizeof(double));
    }
}

/* "B=2 H=4" of "B H", by the run's values. */
static void write_parameters(char out[256], struct run *r, const char *names) {
    size_t used = 0;
    out[0] = 0;
    while (*names) {
        char name[32];
        size_t length = strcspn(names, " ");
        ASSERT(length > 0 && length < sizeof name);
        snprintf(name, sizeof name, "%.*s", (int)length, names);
        used += (size_t)snprintf(out + used, 256 - used, "%s%s=%lld", used ? " " : "", name, (long long)param(r, name));
        ASSERT(used < 256);
        names += length;
        names += strspn(names, " ");
    }
}

void sequence_equals_steps(struct run *r, const struct op_row *step_row, const char *parameters) {
    struct operand *y = operand_find(r, "y");
    int64_t B = param(r, "B"), T = param(r, "T");
    struct run step;
    double *got = calloc((size_t)y->count, sizeof *got);
    ASSERT(got != NULL);
    char changes[256];
    write_parameters(changes, r, parameters);
    run_open_row(&step, r, step_row, changes);
    states_begin(&step, r);
    for (int64_t t = 0; t < T; t++) {
        states_go_on(&step, r, t);
        step_fill(&step, r, t);
        run_forward(&step);
        copy_piece(y, (struct piece){0, B, t, 1}, got, operand_find(&step, "y")->values, sizeof(double), false);
    }
    op_compare(r, "y by steps", got, y->values, y->count, 2 * y->terms);
    for (int i = 0; i < r->operands; i++) {
        struct operand *final = &r->operand[i];
        const char *part = part_of_state(final, "final");
        if (part == NULL) continue;
        op_compare(r, "final by steps", find_state(&step, "state", part)->values, final->values, final->count,
                   2 * final->terms);
    }
    free(got);
    run_close(&step);
}
