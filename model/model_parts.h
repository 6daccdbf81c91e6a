/* model_parts.h: what model.c and model_memory.c share: where each piece of a model's memory lies. Included by no one
 * else. */
#ifndef RIVERRUN_MODEL_PARTS_H
#define RIVERRUN_MODEL_PARTS_H

#include "model/model.h"

/* One arena for each class of memory. */
enum { AREA_PARAMETERS, AREA_GRADIENTS, AREA_ACTIVATIONS, AREA_SCRATCH, AREA_BATCH, AREAS };
extern const char *const area_names[AREAS];

/* Activations of a layer, R = B*T rows. The final norm counts as a last layer without a mixer. What is computed again
 * before it is read (enum recompute) lies in places that layers share. */
struct layer_places {
    void *residual; /* (R,D) real: the stream after the layer's input was added */
    void *normed;   /* (R,D) act: the norm's output, what the mixer reads */
    void *mean;     /* (R) real: of the norm's input; NULL where it takes none off */
    void *rstd;     /* (R) real */
    void *saved;    /* the mixer's own region ... */
    size_t saved_size;
};

/* MODEL_INFER: all layers share one of each; MODEL_TRAIN: each its own. */
struct places {
    void *grads;                     /* the flat array, real; NULL in MODEL_INFER */
    void *parts[PARTS];              /* weights as kernels read them: all rounded parts, act; all real parts, real */
    void *masters;                   /* this rank's slices of the rounded parts, real; NULL in MODEL_INFER */
    void *branch;                    /* (R,D) act: output of the mixer that ran last */
    void *dnormed;                   /* (R,D) act: gradient at a norm's output; these three NULL in MODEL_INFER */
    void *dresidual;                 /* (R,D) real: gradient of the residual stream */
    void *norm_work;                 /* of add_norm_backward: a mixer's last products go on beside it, in scratch */
    void *dbranch;                   /* (R,D) act: the same, rounded; NULL where act is real */
    void *state;                     /* scratch for one layer's state, unless it is updated in place */
    int32_t *tokens, *targets, *doc; /* (B,T) */
    struct loss_sums *sums;
    struct cell_report *reports;     /* one a layer with a solver */
    struct layer_places layers[2 * LIMIT_LAYERS + 1];
};

/* Carve all of it. `params` is laid out; arenas may be measuring, then every place is NULL. On return the scratch arena
 * stands behind what is kept there; its peak covers every operation that follows. */
void places_carve(struct places *places, const struct model_config *mc, const struct params *params,
                  const struct ops *ops, enum model_mode mode, int64_t B, int64_t T, arena areas[AREAS]);

/* Rows of logits computed at once. */
int64_t logits_tile(int64_t rows, int64_t vocabulary);

#endif
