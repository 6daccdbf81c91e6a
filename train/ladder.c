/* ladder.c: levels of solvers, as ladder.h describes. Owns what a guard remembers. */
#include "train/ladder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- training --------------------------------------------------------------------------------------------------- */

const char *const solver_level_names[] = {"chosen", "more", "sequential", NULL};

enum solver_level rung_level(const struct rung *r, int64_t step) {
    return (enum solver_level)(step >= r->since ? r->level : r->before);
}

bool rung_judge(struct rung *r, int64_t step, double residual, bool judged, int ahead,
                const struct solver_options *options) {
    int64_t next = step + 1 + ahead;
    int level = r->level;
    /* A step from before the last change says nothing of the level that holds now. */
    if (judged && step >= r->since && !(residual <= options->limit)) level++;
    else if (options->hold > 0 && next - r->since >= options->hold) level--;
    if (level < SOLVER_CHOSEN || level > SOLVER_SEQUENTIAL || level == r->level) return false;
    *r = (struct rung){.level = level, .before = r->level, .since = next};
    return true;
}

int ladder_judged(const struct cell_report *worst, int count) {
    for (int i = 0; i < count; i++)
        if (!isfinite(worst[i].residual)) return i + 1;
    return count;
}

/* ---- beside training -------------------------------------------------------------------------------------------- */

static int count_of(const struct guard *g) {
    return model_get_config(g->model)->solver_count;
}

int guard_open(struct guard *g, struct model *m, error *err) {
    *g = (struct guard){.model = m};
    size_t count = (size_t)count_of(g);
    if (count == 0) return 0;
    g->levels = calloc(count, sizeof *g->levels);
    g->reports = calloc(count, sizeof *g->reports);
    g->worst = calloc(count, sizeof *g->worst);
    if (!g->levels || !g->reports || !g->worst) {
        guard_close(g);
        return error_system(err, "no memory for the reports of solvers");
    }
    for (size_t i = 0; i < count; i++) g->levels[i] = model_level(m, (int)i);
    model_zero_reports(m);
    return 0;
}

void guard_close(struct guard *g) {
    for (int i = 0; g->raised && i < count_of(g); i++) model_set_level(g->model, i, g->levels[i]);
    free(g->levels);
    free(g->reports);
    free(g->worst);
    *g = (struct guard){.model = g->model};
}

/* Residuals are not negative, and the bits of such floats have their order as whole numbers, infinity included. */
static int64_t bits_of(float residual) {
    float known = residual >= 0 ? residual : INFINITY;
    int32_t bits;
    memcpy(&bits, &known, sizeof bits);
    return bits;
}

static float residual_of(int64_t bits) {
    int32_t narrow = (int32_t)bits;
    float residual;
    memcpy(&residual, &narrow, sizeof residual);
    return residual;
}

static void read_worst(struct guard *g, struct comm *comm) {
    int count = count_of(g);
    device_read(model_device(g->model), g->reports, model_reports(g->model), (size_t)count * sizeof *g->reports);
    for (int i = 0; i < count; i++) g->worst[i] = bits_of(g->reports[i].residual);
    for (int i = 0; i < count; i += COMM_VOTES)
        comm_max_i64(comm, g->worst + i, count - i < COMM_VOTES ? count - i : COMM_VOTES);
}

/* Raise what failed, on any rank; returns how many layers. */
static int raise_failed(struct guard *g) {
    int raised = 0;
    g->residual = 0;
    for (int i = 0; i < count_of(g); i++) {
        double residual = (double)residual_of(g->worst[i]);
        g->residual = fmax(g->residual, residual);
        if (residual <= GUARD_RESIDUAL || model_level(g->model, i) == SOLVER_SEQUENTIAL) continue;
        model_set_level(g->model, i, SOLVER_SEQUENTIAL);
        raised++;
    }
    return raised;
}

bool guard_repeat(struct guard *g, struct comm *comm, const char *what) {
    if (count_of(g) == 0) return false;
    read_worst(g, comm);
    int raised = raise_failed(g);
    if (raised == 0) return false;
    if (comm->rank == 0) {
        fprintf(stderr, "%s is computed again, %d layer%s token after token: the largest residual was %.2g\n", what,
                raised, raised == 1 ? "" : "s", g->residual);
    }
    model_zero_reports(g->model);
    g->raised += raised;
    return true;
}
