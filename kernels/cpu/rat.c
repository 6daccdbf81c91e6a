/* rat.c: RAT on the CPU: a gated recurrence within chunks and one softmax over the chunks' ends and the token's own
 * state: forward, backward, one token.
 *
 *   a = sigmoid(g + bias);   k~[t] = a k~[t-1] + (1 - a) k[t];   v~[t] = a v~[t-1] + (1 - a) v[t], from 0 in every chunk
 *   scores: s R_c q . K_j for the ends j < c of the document's chunks, s q . k~[t] for the own state (both are turned by
 *   the same angle, which drops out);   o = softmax-weighted V_j and v~[t];   y = sigmoid(z) o
 *   backward   do = sigmoid(z) dy;  delta = do . o;  p = exp(score - lse);  ds = p (do . value - delta)
 *              every score's ds goes to the query, and to the key and, p do, to the value, where these are tokens of the
 *              row; then back along each chunk:  l[t] = dk~[t] + a[t+1] l[t+1], m[t] likewise for v~;
 *              dk = (1 - a) l;  dv = (1 - a) m;  dg = (l (k~[t-1] - k) + m (v~[t-1] - v)) a (1 - a)
 *
 * Work is divided by rows and heads forward, by rows and groups backward, so that what heads of a group add to shared
 * queries and keys has an order; recurrences are computed again in backward. Saved: o, and the logarithms of the sums.
 * About B H T (T / Q) P multiply-adds forward for long rows of one document, and the recurrences. */
#include "kernels/cpu/turn.h"

/* The arguments of a problem, B .. C as in ops.h. */
struct problem {
    int64_t B, T, H, G, P, Q, C, half;
    tensor z, v, g, q, k, positions;
    const real *bias;
    struct rat_state initial;
    real scale;
    double rate[ROPE_HALF_MAX];
};

/* What one head of one row works with. */
struct room {
    real *keys, *values; /* (T+1, P): k~ and v~; row 0 is the state that comes in, row t + 1 token t */
    real *turned;        /* (T, P): R_c k~, at the ends of chunks only */
    real *gates;         /* (T, P): a */
    real *scores;        /* (T/Q + C + 2): of one token; the own one last */
    real *dkeys, *dvalues, *dturned; /* backward: (T, P) each */
    real *query, *dquery;            /* (P) */
};

static struct room room_carve(struct carver *c, struct rat_shape s, bool backward) {
    struct room r = {.keys = carve_reals(c, (s.T + 1) * s.P),     .values = carve_reals(c, (s.T + 1) * s.P),
                     .turned = carve_reals(c, s.T * s.P),         .gates = carve_reals(c, s.T * s.P),
                     .scores = carve_reals(c, s.T / s.Q + s.C + 2), .query = carve_reals(c, s.P),
                     .dquery = carve_reals(c, s.P)};
    if (!backward) return r;
    r.dkeys = carve_reals(c, s.T * s.P);
    r.dvalues = carve_reals(c, s.T * s.P);
    r.dturned = carve_reals(c, s.T * s.P);
    return r;
}

static struct rat_shape shape_of(const struct problem *p) {
    return (struct rat_shape){p->B, p->T, p->H, p->G, p->P, p->Q, p->C};
}

static struct room room_of(const struct problem *p, void *scratch, bool backward) {
    struct carver measured = {.base = NULL};
    room_carve(&measured, shape_of(p), backward);
    struct carver c = {.base = (char *)scratch + (size_t)worker_index() * measured.used};
    return room_carve(&c, shape_of(p), backward);
}

static size_t rooms(struct rat_shape s, bool backward) {
    struct carver c = {.base = NULL};
    room_carve(&c, s, backward);
    return c.used * WORKERS_MAX;
}

static real *row_at(tensor x, int64_t b, int64_t t, int64_t h) {
    return (real *)x.data + b * x.stride[0] + t * x.stride[1] + h * x.stride[2];
}

static int64_t position_of(const struct problem *p, int64_t b, int64_t t) {
    return tensor_given(p->positions) ? ((const int32_t *)p->positions.data)[b * p->T + t] : t;
}

static int64_t count_of(const struct problem *p, int64_t b) {
    return p->C ? ((const int32_t *)p->initial.count.data)[b] : 0;
}

static const real *running_of(tensor running, const struct problem *p, int64_t b, int part, int64_t h) {
    return (const real *)running.data + ((b * 2 + part) * p->H + h) * p->P;
}

static void turn_by(struct turn *turn, const struct problem *p, int64_t chunk) {
    turn_make(turn, p->rate, p->half, (double)chunk);
}

/* The recurrences of head h of row b, and the turned keys at the ends of chunks. */
static void recur(const struct problem *p, struct room *r, int64_t b, int64_t h) {
    int64_t P = p->P;
    bool comes_in = p->C > 0;
    for (int part = 0; part < 2; part++) {
        real *first = part ? r->values : r->keys;
        if (comes_in) memcpy(first, running_of(p->initial.running, p, b, part, h), (size_t)P * sizeof(real));
        else memset(first, 0, (size_t)P * sizeof(real));
    }
    for (int64_t t = 0; t < p->T; t++) {
        int64_t position = position_of(p, b, t);
        const real *k = row_at(p->k, b, t, h % p->G), *v = row_at(p->v, b, t, h), *g = row_at(p->g, b, t, h);
        real *a = r->gates + t * P, *key = r->keys + (t + 1) * P, *value = r->values + (t + 1) * P;
        bool starts = position % p->Q == 0;
        for (int64_t i = 0; i < P; i++) {
            a[i] = sigmoid(g[i] + p->bias[h * P + i]);
            real rest = sigmoid(-(g[i] + p->bias[h * P + i])), keep = starts ? 0 : a[i];
            key[i] = keep * key[i - P] + rest * k[i];
            value[i] = keep * value[i - P] + rest * v[i];
        }
        if (position % p->Q != p->Q - 1) continue;
        struct turn turn;
        turn_by(&turn, p, position / p->Q);
        turn_head(r->turned + t * P, key, &turn, p->half, 1);
    }
}

/* The end of chunk j, which token t of row b sees: its token in the row, or below 0, and then its key and value are in
 * the state. -2: the state does not go back so far. */
static int64_t end_of(const struct problem *p, int64_t b, int64_t t, int64_t j) {
    int64_t at = t - (position_of(p, b, t) - (j * p->Q + p->Q - 1));
    if (at >= 0) return at;
    return j >= count_of(p, b) / p->Q - p->C ? -1 : -2;
}

static const real *end_key(const struct problem *p, const struct room *r, int64_t at, int64_t b, int64_t j, int64_t h) {
    return at >= 0 ? r->turned + at * p->P : row_at(p->initial.k, b, j % p->C, h);
}

static const real *end_value(const struct problem *p, const struct room *r, int64_t at, int64_t b, int64_t j, int64_t h) {
    return at >= 0 ? r->values + (at + 1) * p->P : row_at(p->initial.v, b, j % p->C, h);
}

static real dot(const real *a, const real *b, int64_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void add_scaled(real *sum, const real *x, real factor, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) sum[i] += factor * x[i];
}

/* The scores of token t: of chunk ends 0 .. c-1, then its own, at index c, which is returned. Ends that are not there
 * have minus infinity. The turned query is left in r->query. */
static int64_t score(const struct problem *p, struct room *r, int64_t b, int64_t t, int64_t h, struct turn *turn) {
    int64_t c = position_of(p, b, t) / p->Q, first = c;
    const real *q = row_at(p->q, b, t, h % p->G);
    turn_by(turn, p, c);
    turn_head(r->query, q, turn, p->half, 1);
    while (first > 0 && end_of(p, b, t, first - 1) != -2) first--;
    real *scores = r->scores - first; /* counted from the first that is there */
    for (int64_t j = first; j < c; j++)
        scores[j] = p->scale * dot(r->query, end_key(p, r, end_of(p, b, t, j), b, j, h), p->P);
    scores[c] = p->scale * dot(q, r->keys + (t + 1) * p->P, p->P);
    return first;
}

static void forward_token(const struct problem *p, struct room *r, tensor y, real *o, real *lse, int64_t b, int64_t t,
                          int64_t h) {
    struct turn turn;
    int64_t P = p->P, c = position_of(p, b, t) / p->Q, first = score(p, r, b, t, h, &turn);
    real *scores = r->scores - first, high = scores[c], total = 0;
    for (int64_t j = first; j < c; j++) high = scores[j] > high ? scores[j] : high;
    memset(o, 0, (size_t)P * sizeof(real));
    for (int64_t j = first; j <= c; j++) {
        const real *value = j == c ? r->values + (t + 1) * P : end_value(p, r, end_of(p, b, t, j), b, j, h);
        real share = exp_real(scores[j] - high);
        total += share;
        add_scaled(o, value, share, P);
    }
    const real *z = row_at(p->z, b, t, h);
    real *out = row_at(y, b, t, h);
    for (int64_t i = 0; i < P; i++) {
        o[i] /= total;
        out[i] = sigmoid(z[i]) * o[i];
    }
    *lse = high + log_real(total);
}

static void check_state(struct rat_state s, const struct problem *p, int64_t C) {
    CHECK_DENSE(s.k, p->B, C, p->H, p->P);
    CHECK_DENSE(s.v, p->B, C, p->H, p->P);
    CHECK_DENSE(s.running, p->B, 2, p->H, p->P);
    CHECK_INDEX(s.count, p->B);
}

static struct problem problem_of(tensor z, tensor v, tensor g, tensor bias, tensor q, tensor k, tensor positions,
                                 struct rat_state initial, int64_t chunk, double base) {
    struct problem p = {.B = z.dim[0], .T = z.dim[1], .H = z.dim[2], .G = q.dim[2], .P = z.dim[3], .Q = chunk, .z = z,
                        .v = v, .g = g, .q = q, .k = k, .positions = positions, .bias = bias.data, .initial = initial};
    p.half = p.P / 2;
    p.scale = (real)(1 / sqrt((double)p.P));
    ASSERT(p.P % 2 == 0 && p.half <= ROPE_HALF_MAX && chunk >= 1 && p.H % p.G == 0);
    const tensor wide[] = {z, v, g};
    for (int i = 0; i < 3; i++) CHECK_ROWS(wide[i], p.B, p.T, p.H, p.P);
    CHECK_ROWS(q, p.B, p.T, p.G, p.P);
    CHECK_ROWS(k, p.B, p.T, p.G, p.P);
    CHECK_DENSE(bias, p.H * p.P);
    if (tensor_given(positions)) CHECK_INDEX(positions, p.B, p.T);
    if (tensor_given(initial.k)) {
        p.C = initial.k.dim[1];
        check_state(initial, &p, p.C);
        ASSERT(tensor_given(positions));
    }
    turn_rates(p.rate, p.half, base);
    return p;
}

/* Of head h: what the row leaves behind. */
static void store(const struct problem *p, const struct room *r, struct rat_state final, int64_t b, int64_t h) {
    int64_t P = p->P, last = position_of(p, b, p->T - 1), C = final.k.dim[1];
    for (int64_t j = (last + 1) / p->Q - 1, kept = 0; j >= 0 && kept < C; j--, kept++) {
        int64_t at = p->T - 1 - (last - (j * p->Q + p->Q - 1));
        if (at < 0) break; /* it was there before */
        memcpy(row_at(final.k, b, j % C, h), r->turned + at * P, (size_t)P * sizeof(real));
        memcpy(row_at(final.v, b, j % C, h), r->values + (at + 1) * P, (size_t)P * sizeof(real));
    }
    memcpy((real *)running_of(final.running, p, b, 0, h), r->keys + p->T * P, (size_t)P * sizeof(real));
    memcpy((real *)running_of(final.running, p, b, 1, h), r->values + p->T * P, (size_t)P * sizeof(real));
}

/* Slots that the row does not write hold what they held in the initial state. */
static void carry_over(const struct problem *p, struct rat_state final) {
    if (!tensor_given(final.k)) return;
    check_state(final, p, final.k.dim[1]);
    if (p->C && final.k.data != p->initial.k.data) {
        ASSERT(final.k.dim[1] == p->C);
        memcpy(final.k.data, p->initial.k.data, (size_t)tensor_count(final.k) * sizeof(real));
        memcpy(final.v.data, p->initial.v.data, (size_t)tensor_count(final.v) * sizeof(real));
    }
}

/* o (B,T,H,P), then lse (B,H,T); one row of each for a worker where nothing is saved. */
static size_t saved_reals(struct rat_shape s) {
    return (size_t)(s.B * s.T * s.H * s.P + s.B * s.H * s.T);
}

void OP(rat_forward)(struct device *dev, tensor y, struct rat_state final, void *saved, tensor z, tensor v, tensor g,
                     tensor bias, tensor q, tensor k, tensor positions, struct rat_state initial, int64_t chunk,
                     double base, void *scratch) {
    (void)dev;
    struct problem p = problem_of(z, v, g, bias, q, k, positions, initial, chunk, base);
    CHECK_ROWS(y, p.B, p.T, p.H, p.P);
    carry_over(&p, final);
    real *lse = saved ? (real *)saved + p.B * p.T * p.H * p.P : NULL;
    int workers = worker_count(p.B * p.H, p.B * p.H * p.T * p.P * 16);
    (void)workers;
#pragma omp parallel for schedule(dynamic) num_threads(workers)
    for (int64_t i = 0; i < p.B * p.H; i++) {
        struct room r = room_of(&p, scratch, false);
        int64_t b = i / p.H, h = i % p.H;
        real own[2 * ROPE_HALF_MAX], sum;
        recur(&p, &r, b, h);
        for (int64_t t = 0; t < p.T; t++) {
            real *o = saved ? (real *)saved + ((b * p.T + t) * p.H + h) * p.P : own;
            forward_token(&p, &r, y, o, saved ? lse + i * p.T + t : &sum, b, t, h);
        }
        if (tensor_given(final.k)) store(&p, &r, final, b, h);
    }
    for (int64_t b = 0; tensor_given(final.k) && b < p.B; b++)
        ((int32_t *)final.count.data)[b] = (int32_t)(position_of(&p, b, p.T - 1) + 1);
}

size_t OP(rat_saved)(struct rat_shape shape) {
    return saved_reals(shape) * sizeof(real);
}

size_t OP(rat_forward_scratch)(struct rat_shape shape) {
    return rooms(shape, false);
}

/* Gradients of token t's scores: to its query, its own state, and the ends it sees. r->gates etc. as recur left them. */
static void backward_token(const struct problem *p, struct room *r, const real *dout, const real *o, real lse, int64_t b,
                           int64_t t, int64_t h, real *dq) {
    struct turn turn;
    int64_t P = p->P, c = position_of(p, b, t) / p->Q, first = score(p, r, b, t, h, &turn);
    const real *scores = r->scores - first, *q = row_at(p->q, b, t, h % p->G);
    real delta = dot(dout, o, P);
    memset(r->dquery, 0, (size_t)P * sizeof(real));
    for (int64_t j = first; j < c; j++) {
        int64_t at = end_of(p, b, t, j);
        real share = exp_real(scores[j] - lse), ds = share * (dot(dout, end_value(p, r, at, b, j, h), P) - delta);
        add_scaled(r->dquery, end_key(p, r, at, b, j, h), p->scale * ds, P);
        if (at < 0) continue;
        add_scaled(r->dturned + at * P, r->query, p->scale * ds, P);
        add_scaled(r->dvalues + at * P, dout, share, P);
    }
    turn_head(r->dquery, r->dquery, &turn, p->half, -1);
    real share = exp_real(scores[c] - lse), ds = share * (dot(dout, r->values + (t + 1) * P, P) - delta);
    if (first == c) ds = 0; /* a token that sees nothing else is not moved by its score */
    add_scaled(r->dquery, r->keys + (t + 1) * P, p->scale * ds, P);
    add_scaled(r->dkeys + t * P, q, p->scale * ds, P);
    add_scaled(r->dvalues + t * P, dout, share, P);
    add_scaled(dq, r->dquery, 1, P);
}

struct gradients {
    tensor dz, dv, dg, dq, dk, dy;
    const real *o, *lse;
    real *dbias; /* (B, H P): of one row */
};

/* Back along the chunks of head h: from dkeys, dvalues and dturned to the gradients of k, v and g. */
static void recur_back(const struct problem *p, const struct gradients *d, struct room *r, int64_t b, int64_t h) {
    int64_t P = p->P;
    real l[2 * ROPE_HALF_MAX] = {0}, m[2 * ROPE_HALF_MAX] = {0}, *dbias = d->dbias + (b * p->H + h) * P;
    memset(dbias, 0, (size_t)P * sizeof(real));
    for (int64_t t = p->T - 1; t >= 0; t--) {
        int64_t position = position_of(p, b, t);
        const real *a = r->gates + t * P, *k = row_at(p->k, b, t, h % p->G), *v = row_at(p->v, b, t, h);
        const real *key = r->keys + t * P, *value = r->values + t * P; /* those of the token before */
        real *dk = row_at(d->dk, b, t, h % p->G), *dv = row_at(d->dv, b, t, h), *dg = row_at(d->dg, b, t, h);
        bool starts = position % p->Q == 0;
        if (position % p->Q == p->Q - 1) {
            struct turn turn;
            turn_by(&turn, p, position / p->Q);
            turn_head(r->dturned + t * P, r->dturned + t * P, &turn, p->half, -1);
            add_scaled(r->dkeys + t * P, r->dturned + t * P, 1, P);
        }
        for (int64_t i = 0; i < P; i++) {
            real rest = 1 - a[i], was_key = starts ? 0 : key[i], was_value = starts ? 0 : value[i];
            l[i] += r->dkeys[t * P + i];
            m[i] += r->dvalues[t * P + i];
            dk[i] += rest * l[i];
            dv[i] = rest * m[i];
            dg[i] = (l[i] * (was_key - k[i]) + m[i] * (was_value - v[i])) * a[i] * rest;
            dbias[i] += dg[i];
            l[i] = starts ? 0 : l[i] * a[i];
            m[i] = starts ? 0 : m[i] * a[i];
        }
    }
}

static void backward_head(const struct problem *p, const struct gradients *d, struct room *r, int64_t b, int64_t h) {
    int64_t P = p->P;
    size_t bytes = (size_t)(p->T * P) * sizeof(real);
    real dout[2 * ROPE_HALF_MAX];
    recur(p, r, b, h);
    memset(r->dkeys, 0, bytes);
    memset(r->dvalues, 0, bytes);
    memset(r->dturned, 0, bytes);
    for (int64_t t = 0; t < p->T; t++) {
        const real *z = row_at(p->z, b, t, h), *dy = row_at(d->dy, b, t, h), *o = d->o + ((b * p->T + t) * p->H + h) * P;
        real *dz = row_at(d->dz, b, t, h);
        for (int64_t i = 0; i < P; i++) {
            real s = sigmoid(z[i]);
            dz[i] = dy[i] * o[i] * s * (1 - s);
            dout[i] = dy[i] * s;
        }
        backward_token(p, r, dout, o, d->lse[(b * p->H + h) * p->T + t], b, t, h, row_at(d->dq, b, t, h % p->G));
    }
    recur_back(p, d, r, b, h);
}

void OP(rat_backward)(struct device *dev, tensor dz, tensor dv, tensor dg, tensor dbias, tensor dq, tensor dk, tensor dy,
                      const void *saved, tensor z, tensor v, tensor g, tensor bias, tensor q, tensor k, tensor positions,
                      struct rat_state initial, int64_t chunk, double base, void *scratch) {
    (void)dev;
    struct problem p = problem_of(z, v, g, bias, q, k, positions, initial, chunk, base);
    const tensor wide[] = {dz, dv, dg, dy};
    for (int i = 0; i < 4; i++) CHECK_ROWS(wide[i], p.B, p.T, p.H, p.P);
    CHECK_ROWS(dq, p.B, p.T, p.G, p.P);
    CHECK_ROWS(dk, p.B, p.T, p.G, p.P);
    CHECK_DENSE(dbias, p.H * p.P);
    size_t of_rooms = rooms(shape_of(&p), true);
    struct gradients d = {.dz = dz, .dv = dv, .dg = dg, .dq = dq, .dk = dk, .dy = dy, .o = saved};
    d.lse = d.o + p.B * p.T * p.H * p.P;
    d.dbias = (real *)((char *)scratch + of_rooms);
    int workers = worker_count(p.B * p.G, p.B * p.H * p.T * p.P * 32);
    (void)workers;
#pragma omp parallel for schedule(dynamic) num_threads(workers)
    for (int64_t i = 0; i < p.B * p.G; i++) {
        struct room r = room_of(&p, scratch, true);
        int64_t b = i / p.G, group = i % p.G;
        for (int64_t t = 0; t < p.T; t++) {
            memset(row_at(dq, b, t, group), 0, (size_t)p.P * sizeof(real));
            memset(row_at(dk, b, t, group), 0, (size_t)p.P * sizeof(real));
        }
        for (int64_t h = group; h < p.H; h += p.G) backward_head(&p, &d, &r, b, h);
    }
    add_partials(dbias.data, d.dbias, p.B, p.H * p.P);
}

size_t OP(rat_backward_scratch)(struct rat_shape shape) {
    return rooms(shape, true) + (size_t)(shape.B * shape.H * shape.P) * sizeof(real);
}

/* (B, ...) as rows of one token. */
static tensor one_token(tensor t) {
    return tensor_split_first(t, t.dim[0], 1);
}

/* A token is a row of length one whose final state is its initial one. */
void OP(rat_step)(struct device *dev, tensor y, struct rat_state state, tensor z, tensor v, tensor g, tensor bias,
                  tensor q, tensor k, int64_t chunk, double base, void *scratch) {
    tensor positions = tensor_reshape(state.count, 2, (int64_t[]){state.count.dim[0], 1});
    OP(rat_forward)(dev, one_token(y), state, NULL, one_token(z), one_token(v), one_token(g), bias, one_token(q),
                    one_token(k), positions, state, chunk, base, scratch);
}

size_t OP(rat_step_scratch)(struct rat_shape shape) {
    shape.T = 1;
    return rooms(shape, false);
}
