/* mixture.h: which sample of which source stands at global sample number g. Pure arithmetic, no data, no threads.
 *
 * Global samples are counted in blocks of LOADER_BLOCK. In every block source s has a fixed number of places, its
 * share of the weights by largest remainder (ties go to the earlier source); which places those are is drawn anew for
 * each block. The k-th place of source s in block n is visit n * places(s) + k of that source, and visit v is
 * position v % samples of epoch v / samples. A position is a sample number by a keyed permutation of its epoch, or
 * itself without shuffling.
 *
 * The drawing of a block is kept in a struct mixture_block by whoever locates many samples (each prefetching thread
 * has its own); it is a cache and never changes an answer.
 */
#ifndef RIVERRUN_MIXTURE_H
#define RIVERRUN_MIXTURE_H

#include "common/limits.h"
#include "data/loader.h"

struct mixture {
    uint64_t seed;
    bool shuffle;
    size_t count;                      /* sources */
    uint64_t samples[LIMIT_SOURCES];   /* in one epoch of a source, >= 1 */
    uint32_t first[LIMIT_SOURCES + 1]; /* source s has lots [first[s], first[s+1]) of every block's LOADER_BLOCK */
};

struct mixture_block {
    uint64_t number; /* the block that is drawn here; MIXTURE_NO_BLOCK at first */
    uint8_t source[LOADER_BLOCK];
    uint16_t turn[LOADER_BLOCK]; /* how many earlier places of the block belong to the same source */
};
#define MIXTURE_NO_BLOCK UINT64_MAX

/* `samples[s]` >= 1 is the number of samples of source s. Refuses weights that are not finite and positive, and a
 * weight whose share gets no place in a block: such a source would never be read. */
int mixture_make(struct mixture *m, const struct loader_source *sources, const uint64_t *samples, size_t count,
                 uint64_t seed, bool shuffle, error *err);

/* Places of source s in every block. */
uint32_t mixture_places(const struct mixture *m, size_t source);

struct loader_place mixture_locate(const struct mixture *m, struct mixture_block *block, uint64_t g);

#endif
