/* head_loss.c: the language-model head and its cross-entropy, a tile of rows at a time.
 *
 *   logits = x w^T                                             x (R,D), w (V,D); with a cap: cap tanh(x w^T / cap)
 *   lse    = log sum exp(logits)                               with the largest logit subtracted first
 *   loss   = lse - logits[target] + z_loss lse^2               for rows with target >= 0; others contribute nothing
 *   dlogits = scale (p (1 + 2 z_loss lse) - [v == target])     p = exp(logits - lse)
 *   with a cap dlogits is multiplied by 1 - (logits / cap)^2
 *   dx = dlogits w;   dw += dlogits^T x
 *
 * Only rows with a target are worked on: they are gathered into a tile of head_tile() rows, so that a task with a few
 * targets among thousands of tokens pays for a few. The tile's logits are the only ones in memory at a time.
 *
 * A tile takes TILE_BYTES of logits, more only to have TILE_ROWS_MIN rows. For each tile w passes through the caches
 * (and is packed by gemm) twice, dw once back and forth: 16 V D bytes against 6 rows V D FLOPs. With V = 50,288 in
 * float, 64 MiB are 333 rows, which run at 90 GFLOP/s a core where 16 MiB ran at 45 to 60 and a product of large
 * squares at 105.
 *
 * 6 R V D FLOPs (2 without gradients), R V exps (with a cap 2 R V, and R V tanhs); bytes about 16 V D R/tile + 20 R V.
 * Bound by arithmetic.
 * Deterministic for a fixed number of threads: rows are independent, their losses are added in row order, the tiles in
 * order; the products are gemm's. */
#include "kernels/cpu/cpu.h"

#define TILE_BYTES ((int64_t)64 << 20)
#define TILE_ROWS_MIN 64
#define TILE_ROWS_MAX 1024

/* Rows of a tile for V columns of logits, out of R. */
static int64_t head_tile(int64_t R, int64_t V) {
    int64_t rows = TILE_BYTES / ((int64_t)sizeof(real) * V);
    if (rows < TILE_ROWS_MIN) rows = TILE_ROWS_MIN;
    if (rows > TILE_ROWS_MAX) rows = TILE_ROWS_MAX;
    return rows < R ? rows : R;
}

/* One tile, carved out of scratch. */
struct tile {
    int64_t *row;           /* which row of x each row of the tile is */
    struct loss_sums *sums; /* of each row */
    real *logits;           /* (rows, V); turned into dlogits in place */
    real *x, *dx;           /* (rows, D) */
};

/* With base NULL only counts the bytes. */
static size_t carve(struct tile *t, char *base, int64_t rows, int64_t D, int64_t V) {
    size_t used = 0;
#define TAKE(field, bytes)                                                                                             \
    do {                                                                                                               \
        if (base) t->field = (void *)(base + used);                                                                    \
        used += ((size_t)(bytes) + 63) / 64 * 64;                                                                      \
    } while (0)
    TAKE(row, rows * (int64_t)sizeof *t->row);
    TAKE(sums, rows * (int64_t)sizeof *t->sums);
    TAKE(logits, rows * V * (int64_t)sizeof(real));
    TAKE(x, rows * D * (int64_t)sizeof(real));
    TAKE(dx, rows * D * (int64_t)sizeof(real));
#undef TAKE
    return used;
}

size_t OP(head_loss_scratch)(int64_t R, int64_t D, int64_t V) {
    return carve(&(struct tile){0}, NULL, head_tile(R, V), D, V);
}

static real largest(const real *v, int64_t n) {
    real most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = v[i] > most ? v[i] : most;
    return most;
}

#define SUM_BLOCK 1024

/* The differences are cut where exp would go below the normal numbers, which changes the sum by nothing and spares the
 * slow arithmetic there. The comparison lets NaN pass. */
static inline real exp_below(real v, real most) {
    real difference = v - most;
    return exp_real(difference < REAL_EXP_LOWEST ? REAL_EXP_LOWEST : difference);
}

/* exp(v - most) and its sum, blocks of it added up in double because V may be 10^5; the values are kept only for a
 * gradient. A NaN in v becomes a NaN sum. */
static double exponentials(real *v, real most, bool keep, int64_t n) {
    double total = 0;
    for (int64_t from = 0; from < n; from += SUM_BLOCK) {
        int64_t to = from + SUM_BLOCK < n ? from + SUM_BLOCK : n;
        real sum = 0;
        if (keep) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = from; i < to; i++) {
                real e = exp_below(v[i], most);
                v[i] = e;
                sum += e;
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = from; i < to; i++) sum += exp_below(v[i], most);
        }
        total += (double)sum;
    }
    return total;
}

/* v *= factor, where v was cut and where products fall below the normal numbers the result is 0: subnormal numbers
 * would slow down the matrix products that follow, and by far (20 times, with logits of some hundreds). */
static void scale_row(real *v, real factor, int64_t n) {
    real least = REAL_MIN / fabs_real(factor);
    least = least < 2 * REAL_MIN ? 2 * REAL_MIN : least; /* above exp(REAL_EXP_LOWEST) */
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real kept = v[i] < least ? 0 : v[i];
        v[i] = kept * factor;
    }
}

static void cap_row(real *v, real cap, int64_t n) {
    real inverse = 1 / cap;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) v[i] = cap * tanh_real(v[i] * inverse);
}

/* What exponentials() and scale_row() do together, times the derivative of the cap, for which v must last until
 * here. */
static void scale_capped_row(real *v, real most, real factor, real cap, int64_t n) {
    real inverse = 1 / cap;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real part = v[i] * inverse, e = exp_below(v[i], most), scaled = e * (factor * (1 - part * part));
        v[i] = e < 2 * REAL_MIN || fabs_real(scaled) < REAL_MIN ? 0 : scaled;
    }
}

static bool first_largest(const real *v, int64_t target, real most) {
    if (!(v[target] == most)) return false;
    for (int64_t i = 0; i < target; i++)
        if (v[i] == most) return false;
    return true;
}

/* One row: its sums, and with `gradient` its logits become dlogits. */
static struct loss_sums loss_row(real *logits, int64_t V, int64_t target, double z_loss, double cap, bool gradient,
                                 double scale) {
    if (cap > 0) cap_row(logits, (real)cap, V);
    real most = largest(logits, V), at_target = logits[target];
    bool correct = first_largest(logits, target, most);
    double sum = exponentials(logits, most, gradient && cap == 0, V), log_sum = log(sum), lse = (double)most + log_sum;
    if (gradient) {
        /* p (1 + z') - 1 at the target, in a form that keeps z' where p is 1. */
        double z_term = 2 * z_loss * lse, p = (double)exp_below(at_target, most) / sum;
        double part = cap > 0 ? (double)at_target / cap : 0;
        real factor = (real)(scale * (1 + z_term) / sum);
        if (cap > 0) scale_capped_row(logits, most, factor, (real)cap, V);
        else scale_row(logits, factor, V);
        logits[target] = (real)(scale * (p - 1 + z_term * p) * (1 - part * part));
    }
    return (struct loss_sums){
        .nll = log_sum + ((double)most - (double)at_target),
        .z = z_loss * lse * lse,
        .valid = 1,
        .correct = correct,
    };
}

/* Fill the tile with the next rows that have a target, from row *next on; returns how many. */
static int64_t gather(struct tile *t, int64_t capacity, int64_t *next, tensor x, const int32_t *target) {
    int64_t R = x.dim[0], rows = 0;
    for (; *next < R && rows < capacity; ++*next)
        if (target[*next] >= 0) t->row[rows++] = *next;
    for (int64_t i = 0; i < rows; i++)
        memcpy(t->x + i * x.dim[1], row_of(x, t->row[i]), (size_t)x.dim[1] * sizeof(real));
    return rows;
}

/* Losses and dlogits of all rows of a tile. */
static void loss_tile(struct tile *t, int64_t rows, int64_t V, const int32_t *target, tensor losses, double scale,
                      double z_loss, double cap, bool gradient) {
#pragma omp parallel for schedule(static) if (rows * V > 4096)
    for (int64_t i = 0; i < rows; i++) {
        t->sums[i] = loss_row(t->logits + i * V, V, target[t->row[i]], z_loss, cap, gradient, scale);
        if (tensor_given(losses)) ((real *)losses.data)[t->row[i]] = (real)t->sums[i].nll;
    }
}

void OP(head_loss)(struct device *dev, struct loss_sums *sums, tensor losses, tensor dx, tensor dw, tensor x, tensor w,
                   tensor targets, double scale, double z_loss, double cap, void *scratch) {
    (void)dev;
    int64_t R = x.dim[0], D = x.dim[1], V = w.dim[0];
    bool gradient = tensor_given(dx);
    CHECK_DENSE(x, R, D);
    CHECK_DENSE(w, V, D);
    CHECK_INDEX(targets, R);
    CHECK_OPTIONAL(losses, R);
    CHECK_OPTIONAL(dx, R, D);
    CHECK_OPTIONAL(dw, V, D);
    ASSERT((gradient || !tensor_given(dw)) && cap >= 0);
    const int32_t *target = targets.data;
    for (int64_t r = 0; r < R; r++) ASSERT(target[r] < V);

    struct tile t = {0};
    int64_t capacity = head_tile(R, V);
    carve(&t, scratch, capacity, D, V);
    if (gradient) memset(dx.data, 0, (size_t)(R * D) * sizeof(real));
    if (tensor_given(dw) && dw.empty) memset(dw.data, 0, (size_t)(V * D) * sizeof(real));
    if (tensor_given(losses)) memset(losses.data, 0, (size_t)R * sizeof(real));

    struct loss_sums total = {0};
    for (int64_t next = 0, rows; (rows = gather(&t, capacity, &next, x, target)) > 0;) {
        gemm(false, true, rows, V, D, 1, t.x, D, w.data, D, 0, t.logits, V);
        loss_tile(&t, rows, V, target, losses, scale, z_loss, cap, gradient);
        for (int64_t i = 0; i < rows; i++) {
            total.nll += t.sums[i].nll;
            total.z += t.sums[i].z;
            total.valid += t.sums[i].valid;
            total.correct += t.sums[i].correct;
        }
        if (!gradient) continue;
        gemm(false, false, rows, D, V, 1, t.logits, V, w.data, D, 0, t.dx, D);
        for (int64_t i = 0; i < rows; i++) memcpy(row_of(dx, t.row[i]), t.dx + i * D, (size_t)D * sizeof(real));
        if (tensor_given(dw)) gemm(true, false, V, D, rows, 1, t.logits, V, t.x, D, 1, dw.data, D);
    }
    sums->nll += total.nll;
    sums->z += total.z;
    sums->valid += total.valid;
    sums->correct += total.correct;
}
