/* test_model_lm.c: what must hold for any language model, whatever its layers: packed documents equal separate ones, a
 * split sequence with a carried state equals the whole, step by step equals the forward pass, rows and masked targets
 * don't leak, the future does not leak, micro-batches add up, buckets are announced once and complete, float (and bf16)
 * follows double. And: the plan is what is allocated. Limits are those of double; lm_limit() makes them the
 * device's. */
#include "test/support_model.h"
#include "test/unit.h"

#include <math.h>

enum { VOCAB = LM_VOCAB };

static void expect_close(const char *what, const double *got, const double *want, int64_t count, double limit) {
    double distance = relative_error(got, want, count), allowed = limit > 0 ? lm_limit(limit) : 0;
    if (!(distance <= allowed)) fail_msg("%s: relative difference %g, allowed %g", what, distance, allowed);
}

static double *doubles(int64_t count) {
    double *x = calloc((size_t)count, sizeof *x);
    assert_non_null(x);
    return x;
}

/* --- documents ---------------------------------------------------------------------------------- */

/* One row of documents of 1, 5, 0, 2 and 9 tokens, against each alone: losses of every target, and the gradients' sum.
 */
static void check_packed(const char *text) {
    static const int64_t lengths[] = {1, 5, 0, 2, 9};
    const int64_t T = 17;
    struct lm lm;
    lm_open(&lm, text, PRECISION_F64, MODEL_TRAIN, 1, T);
    struct tokens packed = tokens_draw(1, T, VOCAB, 5);
    int64_t at = 0;
    for (int d = 0; d < 5; d++)
        for (int64_t i = 0; i < lengths[d]; i++) packed.doc[at++] = d;
    double *losses = doubles(T), *alone = doubles(T);
    lm_loss(&lm, &packed, true, losses);
    model_zero_grads(lm.m);
    lm_grads(&lm, &packed, true, 1, 0.01);
    double *grads = lm_read_grads(&lm);
    model_zero_grads(lm.m);
    at = 0;
    for (int d = 0; d < 5; d++) {
        if (lengths[d] == 0) continue;
        struct tokens one = tokens_cut(&packed, 0, 1, at, lengths[d]);
        lm_loss(&lm, &one, false, alone + at);
        lm_grads(&lm, &one, false, 1, 0.01);
        tokens_free(&one);
        at += lengths[d];
    }
    double *sum = lm_read_grads(&lm);
    expect_close("losses of packed documents", losses, alone, T, 1e-12);
    expect_close("gradients of packed documents", grads, sum, model_params(lm.m)->elements, 1e-12);
    double *mixed = doubles(T);
    lm_loss(&lm, &packed, false, mixed);
    assert_true(relative_error(mixed, alone, T) > 1e-3); /* without document numbers they do influence each other */
    free(mixed);
    free(losses);
    free(alone);
    free(grads);
    free(sum);
    tokens_free(&packed);
    lm_close(&lm);
}

static void test_packed(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++) check_packed(lm_models[i]);
}

/* --- states ------------------------------------------------------------------------------------- */

/* Pieces of every kind of length; the state is carried in one object, in place, or from one to another. A row that goes
 * on with the document of the piece before has document number 0 first. */
static void check_split(const char *text, bool in_place, bool documents) {
    static const int64_t pieces[] = {1, 4, 2, 1, 9};
    const int64_t B = 3, T = 17;
    error err = {0};
    struct lm lm;
    lm_open(&lm, text, PRECISION_F64, MODEL_INFER, B, T);
    struct tokens whole = tokens_draw(B, T, VOCAB, 9);
    struct model_state *from, *to;
    assert_int_equal(model_state_open(&from, lm.m, B, &err), 0);
    assert_int_equal(model_state_open(&to, lm.m, B, &err), 0);
    lm_set(&lm, &whole, documents);
    model_forward(lm.m, NULL, NULL, false);
    double *want = lm_read_logits(&lm, 0, B * T);
    int64_t at = 0, V = lm.mc->rows;
    for (size_t p = 0; p < sizeof pieces / sizeof *pieces; p++) {
        struct tokens piece = tokens_cut(&whole, 0, B, at, pieces[p]);
        for (int64_t b = 0; b < B; b++) {
            int32_t before = at > 0 ? whole.doc[b * T + at - 1] : 0;
            for (int64_t i = 0; i < pieces[p]; i++) piece.doc[b * pieces[p] + i] -= before;
        }
        lm_set(&lm, &piece, documents);
        model_forward(lm.m, from, in_place ? from : to, false);
        double *got = lm_read_logits(&lm, 0, B * pieces[p]);
        for (int64_t b = 0; b < B; b++)
            expect_close("logits of a piece", got + b * pieces[p] * V, want + (b * T + at) * V, pieces[p] * V, 1e-12);
        if (!in_place) {
            struct model_state *swap = from;
            from = to;
            to = swap;
        }
        free(got);
        tokens_free(&piece);
        at += pieces[p];
    }
    assert_int_equal(at, T);
    free(want);
    tokens_free(&whole);
    model_state_close(from);
    model_state_close(to);
    lm_close(&lm);
}

static void test_split(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++)
        for (int k = 0; k < 4; k++) check_split(lm_models[i], k & 1, k & 2);
}

/* Prefill of `prefill` tokens, then token by token: the logits of one forward pass. */
static void check_step(const char *text, enum precision precision, int64_t prefill, double limit) {
    const int64_t B = 2, T = 13;
    error err = {0};
    struct lm lm;
    lm_open(&lm, text, precision, MODEL_INFER, B, T);
    int64_t V = lm.mc->rows;
    struct tokens whole = tokens_draw(B, T, VOCAB, 31), start = tokens_cut(&whole, 0, B, 0, prefill ? prefill : 1);
    struct model_state *s;
    assert_int_equal(model_state_open(&s, lm.m, B, &err), 0);
    lm_set(&lm, &whole, false);
    model_forward(lm.m, NULL, NULL, false);
    double *want = lm_read_logits(&lm, 0, B * T);
    if (prefill > 0) {
        lm_set(&lm, &start, false);
        model_forward(lm.m, NULL, s, false);
    }
    double *got = doubles(B * V);
    for (int64_t t = prefill; t < T; t++) {
        int32_t ids[2] = {whole.ids[t], whole.ids[T + t]};
        lm_step(&lm, s, ids, B, got);
        for (int64_t b = 0; b < B; b++)
            expect_close("logits of a step", got + b * V, want + (b * T + t) * V, V, limit);
    }
    free(got);
    free(want);
    tokens_free(&whole);
    tokens_free(&start);
    model_state_close(s);
    lm_close(&lm);
}

static void test_step(void **state) {
    (void)state;
    static const int64_t prefills[] = {0, 1, 2, 3, 7};
    for (int i = 0; i < lm_model_count; i++) {
        for (size_t k = 0; k < 5; k++) check_step(lm_models[i], PRECISION_F64, prefills[k], 1e-12);
        check_step(lm_models[i], PRECISION_F32, 5, 1e-5);
    }
}

/* Resetting one sequence's state makes it a fresh one and leaves the other alone. */
static void check_state_reset(const char *text) {
    error err = {0};
    struct lm lm;
    lm_open(&lm, text, PRECISION_F64, MODEL_INFER, 2, 5);
    int64_t V = lm.mc->rows;
    struct tokens t = tokens_draw(2, 5, VOCAB, 3);
    struct model_state *s, *fresh;
    double *kept = doubles(2 * V), *reset = doubles(2 * V), *zero = doubles(2 * V);
    int32_t ids[2] = {4, 5};
    assert_int_equal(model_state_open(&s, lm.m, 2, &err), 0);
    assert_int_equal(model_state_open(&fresh, lm.m, 2, &err), 0);
    lm_step(&lm, fresh, ids, 2, zero);
    for (int pass = 0; pass < 3; pass++) {
        model_state_reset(s, -1);
        lm_set(&lm, &t, false);
        model_forward(lm.m, s, s, false);
        if (pass == 1) model_state_reset(s, 1);
        if (pass == 2) model_state_reset(s, -1);
        lm_step(&lm, s, ids, 2, pass == 0 ? kept : reset);
        if (pass == 0) continue;
        expect_close("the other row", reset, pass == 1 ? kept : zero, V, 0);
        expect_close("the reset row", reset + V, zero + V, V, 0);
    }
    assert_true(relative_error(kept, zero, 2 * V) > 1e-3);
    free(kept);
    free(reset);
    free(zero);
    model_state_close(s);
    model_state_close(fresh);
    tokens_free(&t);
    lm_close(&lm);
}

static void test_state_reset(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++) check_state_reset(lm_models[i]);
}

/* --- what must not leak ------------------------------------------------------------------------- */

static void test_causal(void **state) {
    (void)state;
    const int64_t B = 2, T = 12;
    for (int i = 0; i < lm_model_count; i++) {
        struct lm lm;
        lm_open(&lm, lm_models[i], PRECISION_F64, MODEL_INFER, B, T);
        struct tokens t = tokens_draw(B, T, VOCAB, 8);
        for (int64_t k = 0; k < B * T; k++) t.targets[k] = (int32_t)(k % VOCAB);
        double *before = doubles(B * T), *after = doubles(B * T);
        lm_loss(&lm, &t, false, before);
        for (int64_t at = 0; at < T; at++) {
            int32_t id = t.ids[at]; /* of the first row */
            t.ids[at] = (id + 1) % VOCAB;
            lm_loss(&lm, &t, false, after);
            expect_close("losses before the change", after, before, at, 1e-13);
            expect_close("losses of the other row", after + T, before + T, T, 1e-13);
            /* In float a far influence may be less than the loss's last bit. */
            for (int64_t k = at; k < T && !lm_on_gpu(); k++) assert_true(fabs(after[k] - before[k]) > 1e-9);
            t.ids[at] = id;
        }
        free(before);
        free(after);
        tokens_free(&t);
        lm_close(&lm);
    }
}

/* Rows alone give what they give together: losses, and gradients that add up. */
static void test_rows(void **state) {
    (void)state;
    const int64_t B = 3, T = 7;
    for (int i = 0; i < lm_model_count; i++) {
        struct lm lm;
        lm_open(&lm, lm_models[i], PRECISION_F64, MODEL_TRAIN, B, T);
        struct tokens t = tokens_draw(B, T, VOCAB, 12);
        double *together = doubles(B * T), *alone = doubles(B * T);
        lm_loss(&lm, &t, true, together);
        model_zero_grads(lm.m);
        struct loss_sums sums = lm_grads(&lm, &t, true, 0.5, 0);
        double *grads = lm_read_grads(&lm), nll = 0, valid = 0, correct = 0;
        model_zero_grads(lm.m);
        for (int64_t b = 0; b < B; b++) {
            struct tokens row = tokens_cut(&t, b, 1, 0, T);
            lm_loss(&lm, &row, true, alone + b * T);
            struct loss_sums part = lm_grads(&lm, &row, true, 0.5, 0);
            nll += part.nll;
            valid += part.valid;
            correct += part.correct;
            tokens_free(&row);
        }
        double *sum = lm_read_grads(&lm);
        expect_close("losses of single rows", alone, together, B * T, 1e-13);
        expect_close("gradients of single rows", sum, grads, model_params(lm.m)->elements, 1e-13);
        assert_true(fabs(nll / sums.nll - 1) < lm_limit(1e-13));
        assert_true(valid == sums.valid && correct == sums.correct);
        free(together);
        free(alone);
        free(grads);
        free(sum);
        tokens_free(&t);
        lm_close(&lm);
    }
}

/* Two micro-batches from gradients that a step begins, whatever lay there before, are those from zeros. */
static void test_begin_grads(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++) {
        struct lm lm;
        lm_open(&lm, lm_models[i], PRECISION_F32, MODEL_TRAIN, 2, 7);
        struct tokens t = tokens_draw(2, 7, VOCAB, 14);
        size_t count = (size_t)model_params(lm.m)->elements, size = count * lm.real;
        double *grads[2];
        void *rubbish = malloc(size);
        memset(rubbish, 0xff, size); /* not a number */
        for (int begun = 0; begun < 2; begun++) {
            device_write(lm.dev, model_flat_grads(lm.m).data, rubbish, size);
            (begun ? model_begin_grads : model_zero_grads)(lm.m);
            lm_grads(&lm, &t, true, 0.5, 0.01);
            lm_grads(&lm, &t, false, 0.25, 0);
            grads[begun] = lm_read_grads(&lm);
        }
        for (size_t k = 0; k < count; k++)
            if (grads[0][k] != grads[1][k]) fail_msg("gradient %zu: %g from zeros, %g", k, grads[0][k], grads[1][k]);
        free(rubbish);
        free(grads[0]);
        free(grads[1]);
        tokens_free(&t);
        lm_close(&lm);
    }
}

/* A masked target has no loss, no count and no gradient: the gradients of a set of targets and of the others add up to
 * those of all. */
static void test_masks(void **state) {
    (void)state;
    const int64_t B = 2, T = 9;
    struct lm lm;
    lm_open(&lm, lm_models[0], PRECISION_F64, MODEL_TRAIN, B, T);
    struct tokens t = tokens_draw(B, T, VOCAB, 2);
    double *grads[3], losses[2 * 9], *sum;
    int32_t all[2 * 9];
    for (int i = 0; i < 18; i++) all[i] = (i * 7) % VOCAB;
    for (int part = 0; part < 3; part++) {
        for (int i = 0; i < 18; i++) t.targets[i] = part == 2 || (i % 3 == 0) == (part == 0) ? all[i] : -1;
        struct loss_sums sums = lm_loss(&lm, &t, true, losses);
        double total = 0;
        for (int i = 0; i < 18; i++) {
            assert_true(t.targets[i] < 0 ? losses[i] == 0 : losses[i] > 0);
            total += losses[i];
        }
        assert_true(sums.valid == (part == 0 ? 6 : part == 1 ? 12 : 18));
        assert_true(fabs(sums.nll - total) < lm_limit(1e-12) * total);
        model_zero_grads(lm.m);
        lm_grads(&lm, &t, true, 1, 0.01);
        grads[part] = lm_read_grads(&lm);
    }
    int64_t count = model_params(lm.m)->elements;
    sum = doubles(count);
    for (int64_t i = 0; i < count; i++) sum[i] = grads[0][i] + grads[1][i];
    expect_close("gradients of two sets of targets", sum, grads[2], count, 1e-13);
    for (int i = 0; i < 18; i++) t.targets[i] = -1;
    model_zero_grads(lm.m);
    struct loss_sums sums = lm_grads(&lm, &t, true, 1, 0.01);
    free(grads[0]);
    grads[0] = lm_read_grads(&lm);
    for (int64_t i = 0; i < count; i++) assert_true(grads[0][i] == 0);
    assert_true(sums.valid == 0 && sums.nll == 0 && sums.z == 0);
    for (int part = 0; part < 3; part++) free(grads[part]);
    free(sum);
    tokens_free(&t);
    lm_close(&lm);
}

/* The sums are what the logits say: loss, z term, number of targets, and how many are the largest logit. */
static void test_sums(void **state) {
    (void)state;
    const int64_t B = 2, T = 21;
    struct lm lm;
    lm_open(&lm, lm_models[1], PRECISION_F64, MODEL_INFER, B, T);
    struct tokens t = tokens_draw(B, T, VOCAB, 14);
    lm_set(&lm, &t, true);
    model_zero_sums(lm.m);
    model_forward(lm.m, NULL, NULL, false);
    double *logits = lm_read_logits(&lm, 0, B * T), nll = 0, z = 0, valid = 0, correct = 0;
    for (int64_t i = 0; i < B * T; i++) {
        const double *row = logits + i * lm.mc->rows;
        int64_t best = 0;
        double sum = 0;
        for (int64_t v = 0; v < lm.mc->rows; v++) { /* padding rows take part */
            sum += exp(row[v]);
            if (row[v] > row[best]) best = v;
        }
        if (i % 3 == 0) t.targets[i] = (int32_t)best < VOCAB ? (int32_t)best : -1;
        if (t.targets[i] < 0) continue;
        nll += log(sum) - row[t.targets[i]];
        z += 0.25 * log(sum) * log(sum);
        valid++;
        correct += t.targets[i] == best;
    }
    lm_set(&lm, &t, true);
    model_forward(lm.m, NULL, NULL, false);
    for (int twice = 1; twice <= 2; twice++) { /* they add up until they are zeroed */
        struct loss_sums sums;
        model_loss(lm.m, NULL, false, 1, 0.25);
        model_read_sums(lm.m, &sums);
        double allowed = lm_limit(1e-13);
        assert_true(fabs(sums.nll / (twice * nll) - 1) < allowed && fabs(sums.z / (twice * z) - 1) < allowed);
        assert_true(sums.valid == twice * valid && sums.correct == twice * correct && correct > 0);
    }
    free(logits);
    tokens_free(&t);
    lm_close(&lm);
}

/* --- gradients over several calls --------------------------------------------------------------- */

static void check_accumulate(const char *text) {
    struct lm lm;
    lm_open(&lm, text, PRECISION_F64, MODEL_TRAIN, 3, 8);
    int64_t count = model_params(lm.m)->elements;
    struct tokens a = tokens_draw(2, 8, VOCAB, 1), b = tokens_draw(3, 5, VOCAB, 2); /* the second one is ragged */
    double *alone[2], *sum = doubles(count);
    for (int i = 0; i < 2; i++) {
        model_zero_grads(lm.m);
        lm_grads(&lm, i ? &b : &a, true, 1, 0);
        alone[i] = lm_read_grads(&lm);
        for (int64_t k = 0; k < count; k++) sum[k] += alone[i][k];
    }
    model_zero_grads(lm.m);
    lm_grads(&lm, &a, true, 1, 0);
    lm_grads(&lm, &b, true, 1, 0);
    double *both = lm_read_grads(&lm);
    expect_close("gradients of two micro-batches", both, sum, count, 1e-14);
    free(alone[0]);
    free(alone[1]);
    free(sum);
    free(both);
    tokens_free(&a);
    tokens_free(&b);
    lm_close(&lm);
}

static void test_accumulate(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++) check_accumulate(lm_models[i]);
}

struct announced {
    const struct lm *lm;
    int order[16], count;
    double *at_ready; /* flat: each bucket as it was when announced */
};

static void on_ready(void *self, int bucket) {
    struct announced *a = self;
    const struct bucket *b = &model_params(a->lm->m)->buckets[bucket];
    assert_true(a->count < 16);
    a->order[a->count++] = bucket;
    double *now = lm_read_grads(a->lm);
    memcpy(a->at_ready + b->offset, now + b->offset, (size_t)b->count * sizeof *now);
    free(now);
}

/* Tied: norm, last block ... first, embedding. Untied: the head before these. Complete means: as they are at the end.
 */
static void test_buckets(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++) {
        struct lm lm;
        lm_open(&lm, lm_models[i], PRECISION_F64, MODEL_TRAIN, 2, 6);
        struct tokens t = tokens_draw(2, 6, VOCAB, 4);
        struct announced a = {.lm = &lm, .at_ready = doubles(model_params(lm.m)->elements)};
        lm_set(&lm, &t, true);
        model_forward(lm.m, NULL, NULL, true);
        model_loss(lm.m, NULL, true, 1, 0);
        model_backward(lm.m, on_ready, &a);
        assert_int_equal(a.count, model_params(lm.m)->bucket_count);
        for (int k = 0; k < a.count; k++) assert_int_equal(a.order[k], a.count - 1 - k);
        double *end = lm_read_grads(&lm);
        assert_memory_equal(a.at_ready, end, (size_t)model_params(lm.m)->elements * sizeof *end);
        free(end);
        free(a.at_ready);
        tokens_free(&t);
        lm_close(&lm);
    }
}

/* --- precision, repetition, memory ---------------------------------------------------------------- */

/* Whether a tensor's gradient is a long sum that nearly cancels: those of decay rates, of step sizes and of gates. */
static bool sum_cancels(const char *name) {
    return strstr(name, "A_log") || strstr(name, "dt_") || (strstr(name, "gate") && strstr(name, "bias"));
}

/* The sums and every gradient against double on the CPU. `limit` is a gradient's; one that nearly cancels may be six
 * times as far off. In bf16 both models have the rounded weights. */
static void check_precision(const char *text, enum precision precision, double limit_of_loss, double limit) {
    struct lm lm, exact;
    lm_open(&lm, text, precision, MODEL_TRAIN, 2, 33);
    lm_open_cpu(&exact, text, PRECISION_F64, MODEL_TRAIN, 2, 33);
    if (precision == PRECISION_BF16) lm_round(&lm);
    lm_copy_params(&exact, &lm);
    struct tokens t = tokens_draw(2, 33, VOCAB, 6);
    struct loss_sums a = lm_grads(&lm, &t, true, 1, 0.01), b = lm_grads(&exact, &t, true, 1, 0.01);
    assert_true(fabs(a.nll / b.nll - 1) < limit_of_loss && fabs(a.z / b.z - 1) < 10 * limit_of_loss);
    double *ga = lm_read_grads(&lm), *gb = lm_read_grads(&exact);
    /* Weights that are rounded to bf16 lie in another place than they do in double. */
    const struct param *p = model_params(lm.m)->list, *q = model_params(exact.m)->list;
    for (int k = 0; k < model_params(lm.m)->count; k++) {
        expect_close(p[k].name, ga + p[k].offset, gb + q[k].offset, p[k].count,
                     sum_cancels(p[k].name) ? 6 * limit : limit);
    }
    free(ga);
    free(gb);
    tokens_free(&t);
    lm_close(&lm);
    lm_close(&exact);
}

static void test_float(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++) check_precision(lm_models[i], PRECISION_F32, 1e-6, 2e-5);
}

static void test_bf16(void **state) {
    (void)state;
    if (!lm_on_gpu()) return; /* there is no bf16 on the CPU */
    for (int i = 0; i < lm_model_count; i++) check_precision(lm_models[i], PRECISION_BF16, 2e-3, 5e-2);
}

/* Two runs give the same bits, also after other work; T = 1 to 9 in a model opened for more. */
static void check_repeats(const char *text) {
    struct lm lm;
    lm_open(&lm, text, PRECISION_F32, MODEL_TRAIN, 3, 9);
    size_t bytes = (size_t)model_params(lm.m)->elements * sizeof(double);
    for (int64_t T = 1; T <= 9; T++) {
        struct tokens t = tokens_draw(3, T, VOCAB, (uint64_t)T), other = tokens_draw(2, 9, VOCAB, 99);
        double *grads[2];
        for (int i = 0; i < 2; i++) {
            model_zero_grads(lm.m);
            lm_grads(&lm, &t, true, 1, 0);
            grads[i] = lm_read_grads(&lm);
            lm_grads(&lm, &other, false, 1, 0);
        }
        assert_memory_equal(grads[0], grads[1], bytes);
        free(grads[0]);
        free(grads[1]);
        tokens_free(&t);
        tokens_free(&other);
    }
    lm_close(&lm);
}

static void test_repeats(void **state) {
    (void)state;
    for (int i = 0; i < lm_model_count; i++) check_repeats(lm_models[i]);
}

static void test_plan(void **state) {
    (void)state;
    error err = {0};
    for (int k = 0; k < lm_model_count * 8; k++) {
        config *c = NULL;
        struct model_config *mc = lm_config(&c, lm_models[k % lm_model_count]);
        int way = k / lm_model_count;
        enum model_mode mode = way & 1 ? MODEL_TRAIN : MODEL_INFER;
        enum precision precision = way & 2 ? PRECISION_F64 : PRECISION_F32;
        int ranks = way & 4 ? 3 : 1;
        struct device *dev;
        struct model *m;
        assert_int_equal(device_open(&dev, DEVICE_CPU, precision, &err), 0);
        struct model_memory plan;
        assert_int_equal(model_plan(&plan, mc, dev->ops, mode, 3, 37, ranks, &err), 0);
        assert_int_equal(model_open(&m, mc, dev, mode, 3, 37, 0, ranks, &err), 0);
        struct model_memory real = model_allocated(m);
        assert_int_equal(plan.parameters, real.parameters);
        assert_int_equal(plan.gradients, real.gradients);
        assert_int_equal(plan.activations, real.activations);
        assert_int_equal(plan.scratch, real.scratch);
        assert_int_equal(plan.batch, real.batch);
        assert_int_equal(plan.total, real.total + plan.optimizer);
        size_t flat = (size_t)model_params(m)->elements * dtype_size(dev->ops->real);
        assert_true(plan.parameters >= flat && plan.parameters <= flat + ARENA_ALIGN); /* a gap under sanitizers */
        assert_int_equal(plan.optimizer, mode == MODEL_TRAIN ? 2 * flat / (size_t)ranks : 0);
        assert_int_equal(plan.gradients, mode == MODEL_TRAIN ? plan.parameters : 0);
        model_close(m);
        device_close(dev);
        model_config_free(mc);
        config_free(c);
    }
}

/* A large vocabulary over small layers: the head is what needs most scratch. */
static void test_wide_head(void **state) {
    (void)state;
    const int64_t B = 2, T = 20;
    for (int mode = 0; mode < 2; mode++) {
        struct lm lm;
        lm_open(&lm,
                "[model]\nd_model = 4\nvocab_size = 4000\npattern = m\n[block.m]\nmixer = mamba2\nhead_dim = 4\n"
                "d_state = 2\nchunk = 2\n",
                PRECISION_F32, mode ? MODEL_TRAIN : MODEL_INFER, B, T);
        struct tokens t = tokens_draw(B, T, 4000, 1);
        double losses[40];
        struct loss_sums sums = lm_loss(&lm, &t, true, losses), again = sums;
        if (mode) again = lm_grads(&lm, &t, true, 1, 0);
        assert_true(isfinite(sums.nll) && again.nll == sums.nll);
        tokens_free(&t);
        lm_close(&lm);
    }
}

/* Sizes that no machine holds are refused before anything is allocated or overflows. */
static void test_absurd_batch(void **state) {
    (void)state;
    error err = {0};
    config *c = NULL;
    struct model_config *mc = lm_config(&c, lm_models[0]);
    struct device *dev;
    struct model *m;
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F32, &err), 0);
    assert_int_equal(model_open(&m, mc, dev, MODEL_TRAIN, 1 << 30, 1 << 24, 0, 1, &err), -1);
    assert_int_equal(err.kind, ERROR_INPUT);
    assert_non_null(strstr(err.text, "a micro-batch of 1073741824 sequences of 16777216 tokens is beyond any machine"));
    assert_null(m);
    device_close(dev);
    model_config_free(mc);
    config_free(c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_packed),     cmocka_unit_test(test_split),   cmocka_unit_test(test_step),
        cmocka_unit_test(test_state_reset), cmocka_unit_test(test_causal),  cmocka_unit_test(test_rows),
        cmocka_unit_test(test_masks),      cmocka_unit_test(test_accumulate), cmocka_unit_test(test_buckets),
        cmocka_unit_test(test_begin_grads),
        cmocka_unit_test(test_float),      cmocka_unit_test(test_bf16),   cmocka_unit_test(test_repeats),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_absurd_batch), cmocka_unit_test(test_sums), cmocka_unit_test(test_wide_head),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
