/* mixer.c: the table of mixers, and what all of them share about states and solvers. A new mixer is a line in each of
 * the two lists. Called by model_config.c (by name) and model.c. */
#include "model/mixer.h"

#include <string.h>

static const struct mixer *const mixers[] = {
    &mixer_mamba, &mixer_mamba2, &mixer_mlstm, &mixer_mlstm_preup, &mixer_slstm, &mixer_attention, &mixer_rat,
    &mixer_pararnn,
};

/* The choices of `mixer =`, in the order of the table. */
const char *const mixer_names[] = {"mamba",     "mamba2", "mlstm",   "mlstm_preup", "slstm",
                                   "attention", "rat",    "pararnn", NULL};

const struct mixer *mixer_find(const char *name) {
    for (size_t i = 0; i < sizeof mixers / sizeof *mixers; i++)
        if (strcmp(mixers[i]->name, name) == 0) return mixers[i];
    return NULL;
}

static size_t view_bytes(const tensor *view) {
    size_t bytes = (size_t)tensor_count(*view) * dtype_size(view->dtype);
    return (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
}

void mixer_state_view(tensor *views, int index, void *memory, enum dtype dtype, int ndim, const int64_t *dim) {
    ASSERT(index >= 0 && index < MIXER_STATES);
    size_t offset = 0;
    for (int i = 0; i < index; i++) offset += view_bytes(&views[i]);
    int64_t count = 1;
    for (int i = 0; i < ndim; i++) count *= dim[i];
    views[index] = tensor_reshape(tensor_1d(memory ? (char *)memory + offset : NULL, dtype, count), ndim, dim);
}

const char *const solver_method_names[] = {"sequential", "newton", "shooting", NULL};

struct cell_solver mixer_solver(const struct layer *layer, const struct ops *ops, int64_t B, int64_t T,
                                enum solver_level level) {
    struct cell_solver s = layer->mixer->solver(layer, ops, B, T);
    if (s.method == CELL_SEQUENTIAL || level == SOLVER_CHOSEN) return s;
    if (level == SOLVER_SEQUENTIAL) return (struct cell_solver){.method = CELL_SEQUENTIAL};
    s.iterations += SOLVER_MORE_ITERATIONS;
    return s;
}

size_t mixer_solver_scratch(const struct layer *layer, const struct ops *ops, struct cell_shape shape) {
    size_t most = 0;
    for (int level = SOLVER_CHOSEN; level <= SOLVER_SEQUENTIAL; level++) {
        struct cell_solver solver = mixer_solver(layer, ops, shape.B, shape.T, (enum solver_level)level);
        size_t bytes = ops->cell_forward_scratch(shape, solver);
        most = bytes > most ? bytes : most;
    }
    return most;
}

size_t mixer_state_bytes(const struct layer *layer, const struct ops *ops, int64_t B) {
    tensor views[MIXER_STATES];
    int count = layer->mixer->state(layer, ops, B, NULL, views);
    ASSERT(count >= 0 && count <= MIXER_STATES);
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += view_bytes(&views[i]);
    return bytes;
}
