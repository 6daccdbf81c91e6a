/* test_data_task.c: generated tasks: every kind against a solver that knows only the inputs, how samples are
 * distributed, that a sample depends on its key and number alone, rows written down, refusals, and tasks in the
 * loader. */
#include "common/rng.h"
#include "data/data_options.h"
#include "test/support_corpus.h"
#include "test/unit.h"

#include <math.h>

enum { ROW_MAX = 600, KINDS = 16 };

/* ---- a task and one of its rows ---------------------------------------------------------------------------------- */

struct subject {
    config *c;
    struct task_options o;
    row_source *rows[2]; /* by role */
    struct row_reader reader;
    int64_t T;
    int32_t tokens[ROW_MAX], targets[ROW_MAX], doc[ROW_MAX];
};

static int try_open(struct subject *s, const char *settings, error *err) {
    memset(s, 0, sizeof *s);
    char text[2000];
    snprintf(text, sizeof text, "[task.t]\n%s\n", settings);
    TRY(config_parse(&s->c, text, strlen(text), "test", err));
    TRY(task_options_bind(s->c, "task.t", &s->o, err));
    TRY(config_finish(s->c, err));
    for (int role = 0; role < 2; role++) TRY(task_open(&s->rows[role], "task:t", &s->o, (enum task_role)role, err));
    s->T = row_source_get_info(s->rows[0])->length;
    size_t size = row_source_scratch(s->rows[0], s->T);
    s->reader.scratch = malloc(size + 1);
    assert_non_null(s->reader.scratch);
    memset(s->reader.scratch, 0xA5, size + 1); /* nothing may be expected of it */
    return 0;
}

static void subject_open(struct subject *s, const char *settings) {
    error err = {0};
    if (try_open(s, settings, &err) != 0) fail_msg("%s: %s", settings, err.text);
}

static void subject_close(struct subject *s) {
    for (int role = 0; role < 2; role++) row_source_close(s->rows[role]);
    free(s->reader.scratch);
    config_free(s->c);
}

static void read_row(struct subject *s, enum task_role role, uint64_t sample) {
    error err = {0};
    assert_in_range(s->T, 1, ROW_MAX);
    memset(s->tokens, 0x5A, sizeof s->tokens);
    memset(s->targets, 0x5A, sizeof s->targets);
    const row_source *rows = s->rows[role];
    assert_int_equal(row_source_read(rows, &s->reader, sample, s->T, s->T, s->tokens, s->targets, s->doc, &err), 0);
}

/* ---- solvers: from the inputs to the answers --------------------------------------------------------------------- */

struct answers { /* what the targets must be: y[0..count) from position `at` on, -1 elsewhere */
    int64_t at, count;
    int32_t y[ROW_MAX];
};

/* Data tokens of a string: those before the first padding. */
static int64_t data_count(const struct subject *s) {
    int64_t n = 0;
    while (n < s->T && s->tokens[n] != 0) n++;
    for (int64_t i = n; i < s->T; i++) assert_int_equal(s->tokens[i], 0);
    return n;
}

static void in_range(const int32_t *x, int64_t n, int32_t least, int64_t most) {
    for (int64_t i = 0; i < n; i++) {
        if (x[i] >= least && x[i] <= most) continue;
        fail_msg("token %d at %lld is not from %d to %lld", x[i], (long long)i, least, (long long)most);
    }
}

static void solve_copying(const struct subject *s, struct answers *a) {
    int64_t room = s->o.length - s->o.tokens;
    a->at = room;
    for (int64_t i = 0; i < s->o.length; i++) {
        int32_t t = s->tokens[i];
        if (i >= room) assert_int_equal(t, s->o.vocab - 1);
        else if (t != 0) a->y[a->count++] = t;
    }
    in_range(a->y, a->count, 1, s->o.vocab - 2);
    assert_int_equal(a->count, s->o.tokens);
}

static void solve_induction(const struct subject *s, struct answers *a) {
    int64_t last = s->o.length - 2, trigger = s->o.vocab - 2, found = -1;
    assert_int_equal(s->tokens[last], trigger);
    for (int64_t i = 0; i < last; i++) {
        if (s->tokens[i] != trigger) continue;
        assert_true(found < 0 && i + 2 < last);
        found = i;
    }
    assert_true(found >= 0);
    in_range(s->tokens, last + 1, 0, trigger);
    *a = (struct answers){.at = last, .count = 1, .y = {s->tokens[found + 1]}};
}

static void solve_parity(const struct subject *s, struct answers *a) {
    int64_t n = data_count(s), value = 0;
    in_range(s->tokens, n, 1, s->o.vocab - 1);
    for (int64_t i = 0; i < n; i++) value += s->tokens[i] - 1;
    *a = (struct answers){.at = n - 1, .count = 1, .y = {(int32_t)(value % (s->o.vocab - 1)) + 1}};
}

static void solve_even_pairs(const struct subject *s, struct answers *a) {
    int64_t n = data_count(s);
    in_range(s->tokens, n, 1, s->o.vocab - 1);
    *a = (struct answers){.at = n - 1, .count = 1, .y = {abs(s->tokens[n - 1] - s->tokens[0]) + 1}};
}

static void solve_cycle(const struct subject *s, struct answers *a) {
    int64_t n = data_count(s), forward = 0, m = s->o.vocab - 4;
    in_range(s->tokens, n, 1, 3);
    for (int64_t i = 0; i < n; i++) forward += s->tokens[i] == 2 ? 1 : s->tokens[i] == 3 ? m - 1 : 0;
    *a = (struct answers){.at = n - 1, .count = 1, .y = {(int32_t)(forward % m) + 4}};
}

/* A calculator for both kinds of expression: sums of products of digits and brackets, by recursive descent. */
struct calculator {
    const int32_t *at, *end;
    int32_t digit; /* the first id that is a digit */
    int64_t modulus;
};
static int64_t sum_of(struct calculator *c);
static int64_t factor_of(struct calculator *c) {
    assert_true(c->at < c->end);
    int32_t t = *c->at++;
    if (c->digit == 7 && t == 5) { /* ( */
        int64_t value = sum_of(c);
        assert_true(c->at < c->end && *c->at++ == 6); /* ) */
        return value;
    }
    assert_in_range(t, c->digit, c->digit + c->modulus - 1);
    return t - c->digit;
}
static int64_t product_of(struct calculator *c) {
    int64_t value = factor_of(c);
    while (c->at < c->end && *c->at == 3) {
        c->at++;
        value = value * factor_of(c) % c->modulus;
    }
    return value;
}
static int64_t sum_of(struct calculator *c) {
    int64_t value = product_of(c);
    while (c->at < c->end && (*c->at == 1 || *c->at == 2)) {
        int64_t sign = *c->at++ == 1 ? 1 : c->modulus - 1;
        value = (value + sign * product_of(c)) % c->modulus;
    }
    return value;
}

static void solve_arithmetic(const struct subject *s, struct answers *a, int32_t digit) {
    int64_t n = data_count(s);
    struct calculator c = {s->tokens, s->tokens + n - 1, digit, s->o.vocab - digit};
    assert_int_equal(s->tokens[n - 1], 4); /* = */
    int64_t value = sum_of(&c);
    assert_ptr_equal(c.at, c.end);
    *a = (struct answers){.at = n - 1, .count = 1, .y = {(int32_t)value + digit}};
}
static void solve_plain(const struct subject *s, struct answers *a) {
    for (int64_t i = 0; i < data_count(s); i++) assert_true((i % 2 == 0) == (s->tokens[i] >= 5));
    assert_int_equal((data_count(s) + 1) % 2, 1);
    solve_arithmetic(s, a, 5);
}
static void solve_brackets(const struct subject *s, struct answers *a) { solve_arithmetic(s, a, 7); }

static void solve_majority(const struct subject *s, struct answers *a) {
    int64_t n = data_count(s), best = 0, most = 0;
    in_range(s->tokens, n, 1, s->o.vocab - 1);
    for (int64_t v = s->o.vocab - 1; v > 0; v--) {
        int64_t times = 0;
        for (int64_t i = 0; i < n; i++) times += s->tokens[i] == v;
        if (times < most) continue;
        best = v;
        most = times;
    }
    bool count = strcmp(row_source_get_info(s->rows[0])->task, "majority_count") == 0;
    if (count) best = most < s->o.vocab ? most : s->o.vocab - 1;
    *a = (struct answers){.at = n - 1, .count = 1, .y = {(int32_t)best}};
}

static int ascending(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

static void solve_sort(const struct subject *s, struct answers *a) {
    *a = (struct answers){.count = data_count(s)};
    in_range(s->tokens, a->count, 1, s->o.vocab - 1);
    a->at = a->count - 1;
    memcpy(a->y, s->tokens, (size_t)a->count * sizeof *a->y);
    qsort(a->y, (size_t)a->count, sizeof *a->y, ascending);
}

static void solve_missing(const struct subject *s, struct answers *a) {
    int64_t n = data_count(s), half = n / 2, hidden = 0;
    assert_int_equal(n % 2, 0);
    in_range(s->tokens, half, 1, s->o.vocab - 2);
    *a = (struct answers){.at = n - 1, .count = 1};
    for (int64_t i = 0; i < half; i++) {
        if (s->tokens[half + i] == s->tokens[i]) continue;
        assert_int_equal(s->tokens[half + i], s->o.vocab - 1);
        a->y[0] = s->tokens[i];
        hidden++;
    }
    assert_int_equal(hidden, 1);
}

/* The string that is asked about by the last id; returns its length. */
static int64_t asked(const struct subject *s, struct answers *a) {
    int64_t n = data_count(s) - 1;
    in_range(s->tokens, n, 1, s->o.vocab - 2);
    assert_int_equal(s->tokens[n], s->o.vocab - 1);
    *a = (struct answers){.at = n, .count = n};
    return n;
}
static void solve_repetition(const struct subject *s, struct answers *a) {
    int64_t n = asked(s, a);
    for (int64_t i = 0; i < n; i++) a->y[i] = s->tokens[i];
}
static void solve_reverse(const struct subject *s, struct answers *a) {
    int64_t n = asked(s, a);
    for (int64_t i = 0; i < n; i++) a->y[n - 1 - i] = s->tokens[i];
}
static void solve_odds(const struct subject *s, struct answers *a) {
    int64_t n = asked(s, a), odd = (n + 1) / 2;
    for (int64_t i = 0; i < n; i++) a->y[i % 2 == 0 ? i / 2 : odd + i / 2] = s->tokens[i];
}
static void solve_set(const struct subject *s, struct answers *a) {
    int64_t n = asked(s, a);
    a->count = 0;
    for (int64_t i = 0; i < n; i++) {
        bool seen = false;
        for (int64_t k = 0; k < i; k++) seen |= s->tokens[k] == s->tokens[i];
        if (!seen) a->y[a->count++] = s->tokens[i];
    }
}

/* The queries can't be told from the inputs alone where random ids lie between them, so the targets' places are taken
 * as given and checked: each key once, behind the pairs, at an even distance, its own value. */
static void check_mqar(const struct subject *s) {
    int64_t K = s->o.pairs, half = s->o.vocab / 2, asked_for = 0;
    bool done[ROW_MAX] = {false};
    for (int64_t j = 0; j < K; j++) {
        in_range(s->tokens + 2 * j, 1, 1, half - 1);
        in_range(s->tokens + 2 * j + 1, 1, (int32_t)half, s->o.vocab - 1);
        for (int64_t i = 0; i < j; i++) {
            assert_true(s->tokens[2 * i] != s->tokens[2 * j] && s->tokens[2 * i + 1] != s->tokens[2 * j + 1]);
        }
    }
    for (int64_t t = 0; t < s->T; t++) {
        if (s->targets[t] < 0) {
            assert_int_equal(s->targets[t], -1);
            if (t >= 2 * K && !s->o.fill) assert_int_equal(s->tokens[t], 0);
            continue;
        }
        int64_t j = 0;
        while (j < K && s->tokens[2 * j] != s->tokens[t]) j++;
        assert_true(j < K && !done[j] && t >= 2 * K && t < s->o.length && t % 2 == 0);
        assert_int_equal(s->targets[t], s->tokens[2 * j + 1]);
        done[j] = true;
        asked_for++;
    }
    assert_int_equal(asked_for, K);
}

static const struct {
    const char *kind;
    void (*solve)(const struct subject *s, struct answers *a);
    const char *options[3];
} subjects[KINDS] = {
    {"selective_copying", solve_copying, {"length=40\ntokens=5", "length=16\nvocab=3\ntokens=8", "length=2\ntokens=1"}},
    {"induction_heads", solve_induction, {"length=64", "length=5\nvocab=4", "length=300\nvocab=7"}},
    {"mqar", NULL, {"length=64\npairs=16", "length=64\npairs=4\nvocab=10\nfill=false", "length=37\nvocab=65\npairs=1"}},
    {"parity", solve_parity, {"", "length=2\nmin_length=1", "length=50\nmin_length=50\nvocab=7"}},
    {"even_pairs", solve_even_pairs, {"", "length=3", "length=60\nmin_length=41\nvocab=9"}},
    {"cycle_navigation", solve_cycle, {"", "length=256\nvocab=6", "length=2\nmin_length=2"}},
    {"modular_arithmetic", solve_plain, {"", "length=3", "length=201\nmin_length=100\nvocab=7"}},
    {"modular_arithmetic_brackets", solve_brackets, {"", "length=5", "length=203\nmin_length=100\nvocab=9"}},
    {"majority", solve_majority, {"", "length=30\nvocab=3", "length=256\nmin_length=40\nvocab=5"}},
    {"majority_count", solve_majority, {"", "length=30\nvocab=3", "length=256\nmin_length=40\nvocab=5"}},
    {"bucket_sort", solve_sort, {"", "length=2\nmin_length=1", "length=256\nmin_length=40\nvocab=5"}},
    {"missing_duplicate", solve_missing, {"", "length=3", "length=255\nmin_length=41\nvocab=4"}},
    {"repetition", solve_repetition, {"", "length=3", "length=255\nmin_length=41\nvocab=4"}},
    {"reverse", solve_reverse, {"", "length=3", "length=256\nmin_length=41\nvocab=4"}},
    {"odds_first", solve_odds, {"", "length=3", "length=255\nmin_length=41\nvocab=4"}},
    {"set", solve_set, {"", "length=3", "length=255\nmin_length=41\nvocab=20"}},
};

static void subject_at(struct subject *s, int kind, int options) {
    char settings[400];
    snprintf(settings, sizeof settings, "kind=%s\n%s", subjects[kind].kind, subjects[kind].options[options]);
    subject_open(s, settings);
    assert_string_equal(row_source_get_info(s->rows[0])->task, subjects[kind].kind);
}

/* The row's targets are the solver's answers, and nothing else is a target. */
static void check_row(const struct subject *s, int kind) {
    struct answers a = {0};
    in_range(s->tokens, s->T, 0, s->o.vocab - 1);
    for (int64_t t = 0; t < s->T; t++) assert_int_equal(s->doc[t], 1);
    if (!subjects[kind].solve) {
        check_mqar(s);
        return;
    }
    subjects[kind].solve(s, &a);
    assert_in_range(a.count, 1, s->T);
    for (int64_t t = 0; t < s->T; t++) {
        int32_t want = t >= a.at && t < a.at + a.count ? a.y[t - a.at] : -1;
        if (s->targets[t] != want) {
            fail_msg("%s: target %lld is %d, not %d", subjects[kind].kind, (long long)t, s->targets[t], want);
        }
    }
}

static void test_answers(void **state) {
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        for (int options = 0; options < 3; options++) {
            struct subject s;
            subject_at(&s, kind, options);
            for (uint64_t i = 0; i < 200; i++) {
                read_row(&s, (enum task_role)(i % 2), i);
                check_row(&s, kind);
            }
            s.T += 9; /* a longer row is the same with padding */
            read_row(&s, TASK_TRAIN, 7);
            check_row(&s, kind);
            for (int64_t t = s.T - 9; t < s.T; t++) assert_true(s.tokens[t] == 0 && s.targets[t] == -1);
            subject_close(&s);
        }
    }
    assert_null(task_kind_names[KINDS]);
}

/* ---- distributions ----------------------------------------------------------------------------------------------- */

/* `counts` of n draws against probabilities p (NULL: all equal): none further off than five standard deviations. */
static void check_counts(const char *what, const int64_t *counts, const double *p, int64_t cells, int64_t n) {
    for (int64_t i = 0; i < cells; i++) {
        double share = p ? p[i] : 1.0 / (double)cells, want = share * (double)n;
        double deviation = sqrt(want * (1 - share));
        if (fabs((double)counts[i] - want) > 5 * deviation + 1e-9) {
            fail_msg("%s %lld came %lld times of %lld, not about %.1f", what, (long long)i, (long long)counts[i],
                     (long long)n, want);
        }
    }
}

static void test_recall_distributions(void **state) {
    (void)state;
    struct subject s;
    int64_t at[20] = {0}, ids[4] = {0};
    double p[20];
    subject_open(&s, "kind=selective_copying\nlength=24\ntokens=4\nvocab=6");
    for (uint64_t i = 0; i < 20000; i++) {
        read_row(&s, TASK_TRAIN, i);
        for (int t = 0; t < 20; t++) at[t] += s.tokens[t] != 0;
        for (int t = 20; t < 24; t++) ids[s.targets[t] - 1]++;
    }
    subject_close(&s);
    for (int t = 0; t < 20; t++) p[t] = 0.2;
    check_counts("a data token at", at, p, 20, 20000);
    check_counts("data token", ids, NULL, 4, 80000);

    int64_t first[14] = {0}, ordinary[3] = {0};
    subject_open(&s, "kind=induction_heads\nlength=18\nvocab=5");
    for (uint64_t i = 0; i < 20000; i++) {
        read_row(&s, TASK_TRAIN, i);
        int64_t t = 0;
        while (s.tokens[t] != 3) t++;
        assert_in_range(t, 0, 13);
        first[t]++;
        ordinary[s.targets[16]]++;
    }
    subject_close(&s);
    check_counts("the trigger at", first, NULL, 14, 20000);
    check_counts("ordinary token", ordinary, NULL, 3, 20000);
}

/* Two queries in four slots: drawn one after the other by weight (i + 1)^(power - 1), the first key's first. */
static void test_mqar_slots(void **state) {
    (void)state;
    struct subject s;
    int64_t counts[16] = {0}, keys[3] = {0}, values[4] = {0};
    double w[4], p[16], sum = 0;
    subject_open(&s, "kind=mqar\nlength=12\npairs=2\nvocab=8\npower=0.3\nfill=no");
    for (int i = 0; i < 4; i++) sum += w[i] = pow(i + 1, 0.3 - 1);
    for (int i = 0; i < 16; i++) p[i] = i / 4 == i % 4 ? 0 : w[i / 4] / sum * w[i % 4] / (sum - w[i / 4]);
    for (uint64_t i = 0; i < 40000; i++) {
        int64_t slot[2] = {0};
        read_row(&s, TASK_TRAIN, i);
        for (int64_t t = 4; t < 12; t += 2) {
            for (int j = 0; j < 2; j++) slot[j] = s.tokens[t] == s.tokens[2 * j] ? (t - 4) / 2 : slot[j];
        }
        counts[4 * slot[0] + slot[1]]++;
        keys[s.tokens[0] - 1]++;
        values[s.tokens[3] - 4]++;
    }
    subject_close(&s);
    check_counts("slots", counts, p, 16, 40000);
    check_counts("key", keys, NULL, 3, 40000);
    check_counts("value", values, NULL, 4, 40000);
    /* What lies between the queries is any id at all. */
    int64_t between[8] = {0};
    subject_open(&s, "kind=mqar\nlength=5\npairs=1\nvocab=8");
    for (uint64_t i = 0; i < 20000; i++) {
        read_row(&s, TASK_TRAIN, i);
        between[s.tokens[3]]++;
    }
    subject_close(&s);
    check_counts("a token between", between, NULL, 8, 20000);
}

static void test_language_distributions(void **state) {
    (void)state;
    struct subject s;
    int64_t sizes[12] = {0}, odd[2] = {0};
    subject_open(&s, "kind=parity\nlength=15\nmin_length=4");
    for (uint64_t i = 0; i < 20000; i++) {
        read_row(&s, TASK_TRAIN, i);
        sizes[data_count(&s) + 1 - 4]++;
        for (int t = 0; t < 14; t++) odd[0] += s.targets[t] == 1;
        odd[1] = (int64_t)i + 1 - odd[0];
    }
    subject_close(&s);
    check_counts("size", sizes, NULL, 12, 20000);
    check_counts("parity", odd, NULL, 2, 20000);

    int64_t lengths[5] = {0}, roots[3] = {0}; /* 7, 9, ... 15 tokens with the answer */
    subject_open(&s, "kind=modular_arithmetic\nlength=16\nmin_length=6");
    for (uint64_t i = 0; i < 20000; i++) {
        read_row(&s, TASK_TRAIN, i);
        lengths[(data_count(&s) + 1 - 7) / 2]++;
        roots[s.tokens[1] - 1]++;
    }
    subject_close(&s);
    check_counts("expression size", lengths, NULL, 5, 20000);
    check_counts("operator", roots, NULL, 3, 20000);

    int64_t left[4] = {0}; /* of four operands, how many stand left of the operation done last: 1, 2, 3 */
    subject_open(&s, "kind=modular_arithmetic_brackets\nlength=13\nmin_length=13");
    for (uint64_t i = 0; i < 20000; i++) {
        read_row(&s, TASK_TRAIN, i);
        int64_t depth = 0, digits = 0, t = 0;
        for (;; t++) {
            depth += (s.tokens[t] == 5) - (s.tokens[t] == 6);
            digits += s.tokens[t] >= 7;
            if (depth == 0 && s.tokens[t] <= 3) break;
        }
        left[digits - 1]++;
    }
    subject_close(&s);
    check_counts("operands on the left", left, NULL, 3, 20000);
}

/* ---- a sample depends on its key and number alone ---------------------------------------------------------------- */

static void test_determinism(void **state) {
    (void)state;
    error err = {0};
    for (int kind = 0; kind < KINDS; kind++) {
        struct subject a, b;
        subject_at(&a, kind, 0);
        subject_at(&b, kind, 0);
        for (uint64_t i = 0; i < 20; i++) { /* in another order, from another reader, in a longer row */
            uint64_t sample = (i * 7) % 20;
            read_row(&a, TASK_TRAIN, sample);
            b.T = a.T + (int64_t)i;
            read_row(&b, TASK_TRAIN, 19 - i);
            read_row(&b, TASK_TRAIN, sample);
            assert_memory_equal(a.tokens, b.tokens, (size_t)a.T * sizeof *a.tokens);
            assert_memory_equal(a.targets, b.targets, (size_t)a.T * sizeof *a.targets);
        }
        b.T = a.T;
        read_row(&a, TASK_TRAIN, 3);
        read_row(&b, TASK_VALID, 3);
        assert_memory_not_equal(a.tokens, b.tokens, (size_t)a.T * sizeof *a.tokens);
        read_row(&b, TASK_TRAIN, 4);
        assert_memory_not_equal(a.tokens, b.tokens, (size_t)a.T * sizeof *a.tokens);
        /* A row cut short keeps its tokens and loses targets. */
        int64_t cut = a.T / 2 + 1;
        assert_int_equal(
            row_source_read(b.rows[0], &b.reader, 3, a.T, cut, b.tokens, b.targets, NULL, &err), 0);
        for (int64_t t = 0; t < a.T; t++) assert_int_equal(b.targets[t], t < cut ? a.targets[t] : -1);
        assert_memory_equal(a.tokens, b.tokens, (size_t)cut * sizeof *a.tokens);
        subject_close(&a);
        subject_close(&b);
    }
}

static void test_seed_and_numbers(void **state) {
    (void)state;
    struct subject a, b;
    subject_open(&a, "kind=parity\nlength=60\nmin_length=60");
    subject_open(&b, "kind=parity\nlength=60\nmin_length=60\nseed=2");
    read_row(&a, TASK_TRAIN, 0);
    read_row(&b, TASK_TRAIN, 0);
    assert_memory_not_equal(a.tokens, b.tokens, 59 * sizeof *a.tokens);
    /* Sample numbers count in all their bits. */
    for (int bit = 0; bit < 38; bit++) {
        read_row(&b, TASK_TRAIN, UINT64_C(1) << bit);
        read_row(&a, TASK_TRAIN, bit ? (UINT64_C(1) << bit) - 1 : 2);
        assert_memory_not_equal(a.tokens, b.tokens, 59 * sizeof *a.tokens);
    }
    assert_int_equal(row_source_inputs(a.rows[TASK_TRAIN], 60) / 60, TASK_SAMPLES_MAX);
    assert_int_equal(row_source_inputs(a.rows[TASK_VALID], 60) / 60, 1024);
    subject_close(&a);
    subject_close(&b);
}

#include "test/golden_tasks.h"

static void test_golden_rows(void **state) {
    (void)state;
    assert_int_equal(sizeof golden_tasks / sizeof *golden_tasks, KINDS);
    for (int kind = 0; kind < KINDS; kind++) {
        struct subject s;
        char settings[400];
        assert_string_equal(golden_tasks[kind].kind, subjects[kind].kind);
        snprintf(settings, sizeof settings, "kind=%s\nseed=11\n%s", subjects[kind].kind, golden_tasks[kind].options);
        subject_open(&s, settings);
        for (int i = 0; i < 2; i++) {
            char got[2000] = "";
            read_row(&s, TASK_TRAIN, (uint64_t)i);
            for (int64_t t = 0; t < s.T; t++) {
                size_t used = strlen(got);
                snprintf(got + used, sizeof got - used, s.targets[t] < 0 ? "%s%d" : "%s%d>%d", t ? " " : "",
                         s.tokens[t], s.targets[t]);
            }
            assert_string_equal(got, golden_tasks[kind].rows[i]);
        }
        subject_close(&s);
    }
}

/* ---- options ----------------------------------------------------------------------------------------------------- */

static void test_refusals(void **state) {
    (void)state;
    static const struct {
        const char *settings, *words;
    } cases[] = {
        {"", "[task.t] kind is missing, it must be one of selective_copying, induction_heads"},
        {"kind=parties", "must be one of"},
        {"kind=parity\nlengt=4", "[task.t] has no option lengt; did you mean length?"},
        {"kind=parity\npairs=4", "has no option pairs"},
        {"kind=parity\nvocab=2", "vocab = 2"},
        {"kind=parity\nmin_length=41", "task.t.min_length = 41 is above task.t.length = 40; it may be at most that"},
        {"kind=modular_arithmetic\nlength=8\nmin_length=8",
         "task.t: no sample of kind modular_arithmetic has from 8 to 8 tokens; they have 3 or a multiple of 2 more, "
         "such as 9"},
        {"kind=modular_arithmetic_brackets\nlength=12\nmin_length=10",
         "they have 5 or a multiple of 4 more, such as 13"},
        {"kind=selective_copying\nlength=31", "task.t.tokens = 16 data tokens and as many markers do not fit in "
                                              "task.t.length = 31; at most 15 do"},
        {"kind=mqar\npairs=65", "task.t.pairs = 65 is too many: a length of 256 has room for 64"},
        {"kind=mqar\npairs=5\nvocab=10", "a vocabulary of 10 has 4 keys; at most 4 are possible"},
        {"kind=mqar\npower=0", "power = 0"},
        {"kind=induction_heads\nlength=4", "length = 4"},
        {"kind=set\nvalid_samples=0", "valid_samples = 0"},
        {"kind=set\nsamples=-1", "samples = -1"},
        {"kind=set\nlength=16777217", "length = 16777217"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct subject s;
        error err = {0};
        assert_int_equal(try_open(&s, cases[i].settings, &err), -1);
        assert_int_equal(err.kind, ERROR_INPUT);
        if (!strstr(err.text, cases[i].words)) fail_msg("'%s' does not say '%s'", err.text, cases[i].words);
        subject_close(&s);
    }
}

/* Whatever the options, they are refused in one sentence or make samples that are in order. */
static void test_any_options(void **state) {
    (void)state;
    static const char *const keys[] = {"length", "min_length", "vocab", "tokens", "pairs", "power"};
    rng_key key = {.seed = 5, .purpose = RNG_TEST};
    int good = 0, refused = 0;
    for (uint64_t n = 0; n < 4000; n++) {
        char settings[400];
        int used = snprintf(settings, sizeof settings, "kind=%s\n", subjects[n % KINDS].kind);
        for (uint64_t k = 0; k < 6; k++) {
            bool has = k == 0 || k == 2 || (k == 1 ? n % KINDS > 2 : k == 3 ? n % KINDS == 0 : n % KINDS == 2);
            if (!has || rng_below(key, 20 * n + k, 4) == 0) continue;
            uint64_t top = UINT64_C(2) << rng_below(key, 20 * n + k + 6, 9);
            used += snprintf(settings + used, sizeof settings - (size_t)used, "%s = %d\n", keys[k],
                             (int)rng_below(key, 20 * n + k + 12, top));
        }
        struct subject s;
        error err = {0};
        if (try_open(&s, settings, &err) != 0) {
            assert_int_equal(err.kind, ERROR_INPUT);
            assert_true(strlen(err.text) > 10 && !strchr(err.text, '\n'));
            refused++;
        } else if (s.T <= ROW_MAX) {
            for (uint64_t i = 0; i < 3; i++) {
                read_row(&s, TASK_VALID, i);
                check_row(&s, (int)(n % KINDS));
            }
            good++;
        }
        subject_close(&s);
    }
    assert_true(good > 500 && refused > 500);
}

/* ---- in the loader ----------------------------------------------------------------------------------------------- */

static const char mixture_text[] =
    "[source.a]\npath=task:short\nweight=3\n[source.b]\npath=task:long\n"
    "[task.short]\nkind=mqar\nlength=32\npairs=4\nvocab=64\n[task.long]\nkind=mqar\nlength=48\npairs=8\nvocab=64\n"
    "[data]\nvalid=task:long\nseq_len=48\n";

static config *bind_text(const char *text, struct data_options *o, error *err) {
    config *c;
    if (config_parse(&c, text, strlen(text), "test", err) != 0) return NULL;
    if (data_options_bind(c, o, err) == 0) return c;
    config_free(c);
    return NULL;
}

static void test_loader(void **state) {
    (void)state;
    error err = {0};
    struct data_options *o = malloc(sizeof *o);
    config *c = bind_text(mixture_text, o, &err);
    struct data_sources s;
    assert_non_null(c);
    assert_int_equal(data_options_vocab(o), 64);
    assert_int_equal(data_sources_open(&s, o, &err), 0);
    enum { T = 48, ROWS = 48 };
    struct row_reader reader = {.scratch = malloc(row_source_scratch(s.data[1], T) + row_source_scratch(s.data[0], T))};
    int from[2] = {0};
    for (int ranks = 1; ranks <= 2; ranks++) {
        for (int rank = 0; rank < ranks; rank++) {
            for (int threads = 1; threads <= 3; threads += 2) {
                struct loader_options options = data_loader_options(o);
                options.B = 4;
                options.rank = rank;
                options.ranks = ranks;
                options.threads = threads;
                options.start = 40; /* as a resumed run does */
                loader *l;
                assert_int_equal(loader_open(&l, s.train, s.count, &options, &err), 0);
                for (uint64_t g = 40; g < 40 + ROWS; g += (uint64_t)(4 * ranks)) {
                    struct batch batch;
                    assert_int_equal(loader_next(l, &batch, &err), 0);
                    for (int b = 0; b < 4; b++) {
                        struct loader_place place = loader_locate(l, g + (uint64_t)(4 * rank + b));
                        int32_t tokens[T], targets[T];
                        from[place.source]++;
                        assert_int_equal(place.epoch, 0);
                        assert_int_equal(row_source_read(s.data[place.source], &reader, place.sample, T, T, tokens,
                                                         targets, NULL, &err),
                                         0);
                        assert_memory_equal(batch.tokens + b * T, tokens, sizeof tokens);
                        assert_memory_equal(batch.targets + b * T, targets, sizeof targets);
                    }
                }
                loader_close(l);
            }
        }
    }
    assert_true(from[0] > 2 * from[1] && from[1] > 0);
    /* Validation has samples of its own. */
    struct subject twin;
    int32_t tokens[T], targets[T];
    subject_open(&twin, "kind=mqar\nlength=48\npairs=8\nvocab=64");
    read_row(&twin, TASK_VALID, 5);
    assert_int_equal(row_source_read(s.valid, &reader, 5, T, T, tokens, targets, NULL, &err), 0);
    assert_memory_equal(tokens, twin.tokens, sizeof tokens);
    read_row(&twin, TASK_TRAIN, 5);
    assert_int_equal(row_source_read(s.data[1], &reader, 5, T, T, tokens, targets, NULL, &err), 0);
    assert_memory_equal(tokens, twin.tokens, sizeof tokens);
    subject_close(&twin);
    free(reader.scratch);
    data_sources_close(&s);
    config_free(c);
    free(o);
}

static void test_sources_refused(void **state) {
    (void)state;
    char directory[256], text[2000];
    unit_directory(directory);
    struct corpus corpus;
    char path[300];
    snprintf(path, sizeof path, "%s/text", directory);
    corpus_make(&corpus, &(struct corpus_plan){.directory = path, .tokens = 100, .vocab = 3});
    static const char *const task = "[task.p]\nkind=parity\n[task.q]\nkind=set\n[task.r]\nkind=even_pairs\n";
    const struct {
        const char *data, *words;
    } cases[] = {
        {"[data]\ntrain=task:x\n", "data.train: task:x names a generated task, but there is no section [task.x]"},
        {"[source.a]\npath=task:p\n[source.b]\npath=task:q\n", "task:p and task:q have vocabularies of 3 and 128 ids"},
        {"[data]\ntrain=task:p\nvalid=task:q\n", "task:p and task:q have vocabularies of 3 and 128 ids"},
        {"[data]\ntrain=task:p\nvalid=TEXT\n", "task:p is a generated task and TEXT is text"},
        {"[source.a]\npath=TEXT\n[source.b]\npath=task:p\n", "TEXT is text and task:p is a generated task"},
        {"[data]\ntrain=task:p\nvalid=task:r\nseq_len=39\n", NULL},
        {"[data]\ntrain=task:p\nseq_len=38\n", "rows of 38 tokens (data.seq_len, in evaluation the window) do not suit "
                                               "task:p, whose samples take 39 inputs; rows may have from 39 to"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *at = strstr(cases[i].data, "TEXT");
        if (at) snprintf(text, sizeof text, "%.*s%s%s%s", (int)(at - cases[i].data), cases[i].data, path, at + 4, task);
        else snprintf(text, sizeof text, "%s%s", cases[i].data, task);
        error err = {0};
        struct data_options *o = malloc(sizeof *o);
        config *c = bind_text(text, o, &err);
        struct data_sources s;
        loader *l = NULL;
        if (!c) fail_msg("%s", err.text);
        int result = data_sources_open(&s, o, &err);
        struct loader_options options = data_loader_options(o);
        if (result == 0) {
            result = loader_open(&l, s.train, s.count, &options, &err);
            if (result == 0) loader_close(l);
            data_sources_close(&s);
        }
        char want[600] = "";
        const char *words = cases[i].words, *place = words ? strstr(words, "TEXT") : NULL;
        if (place) snprintf(want, sizeof want, "%.*s%s%s", (int)(place - words), words, path, place + 4);
        else snprintf(want, sizeof want, "%s", words ? words : "");
        assert_int_equal(result, words ? -1 : 0);
        if (words && (err.kind != ERROR_INPUT || !strstr(err.text, want))) fail_msg("'%s' is not '%s'", err.text, want);
        config_free(c);
        free(o);
    }
    error err = {0};
    struct data_options *o = malloc(sizeof *o);
    assert_null(bind_text("[task.]\nkind=parity\n", o, &err));
    assert_string_equal(err.text, "section [task.] has no name: write [task.NAME]");
    free(o);
    corpus_free(&corpus);
    unit_directory_remove(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers),
        cmocka_unit_test(test_recall_distributions),
        cmocka_unit_test(test_mqar_slots),
        cmocka_unit_test(test_language_distributions),
        cmocka_unit_test(test_determinism),
        cmocka_unit_test(test_seed_and_numbers),
        cmocka_unit_test(test_golden_rows),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_any_options),
        cmocka_unit_test(test_loader),
        cmocka_unit_test(test_sources_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
