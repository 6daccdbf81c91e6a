/* mixture.c: shares out the places of a block among sources and finds the sample behind a global sample number, as
 * described in mixture.h. Called by the loader and its tests; owns nothing. */
#include "data/mixture.h"

#include "common/rng.h"
#include <math.h>

/* A key's stream has 32 bits: 6 for the source and 26 for the epoch. Epochs 2^26 apart share their order, which no
 * run on more than a handful of samples reaches. */
#define EPOCH_BITS 26
_Static_assert(LIMIT_SOURCES <= 1 << (32 - EPOCH_BITS), "a source's number must fit beside the epoch");
_Static_assert(LIMIT_SOURCES <= UINT8_MAX + 1, "mixture_block.source holds a source's number in a byte");
_Static_assert(LOADER_BLOCK <= UINT16_MAX + 1, "mixture_block.turn holds a place's number in 16 bits");

static int check_weights(const struct loader_source *sources, size_t count, error *err) {
    for (size_t s = 0; s < count; s++) {
        if (!isfinite(sources[s].weight) || sources[s].weight <= 0) {
            return error_input(err, "source '%s' has weight %g; a weight must be a finite number above 0",
                               sources[s].name, sources[s].weight);
        }
    }
    return 0;
}

/* places[s] = the source's share of LOADER_BLOCK by largest remainder: whole places first, then one more for the
 * sources with the largest fractions until all are given. */
static void share_places(uint32_t *places, const struct loader_source *sources, size_t count) {
    double remainder[LIMIT_SOURCES], largest = 0, sum = 0;
    for (size_t s = 0; s < count; s++) largest = fmax(largest, sources[s].weight);
    for (size_t s = 0; s < count; s++) sum += sources[s].weight / largest; /* so that the sum can't overflow */
    uint32_t given = 0;
    for (size_t s = 0; s < count; s++) {
        double share = sources[s].weight / largest / sum * LOADER_BLOCK;
        places[s] = (uint32_t)share;
        remainder[s] = share - places[s];
        given += places[s];
    }
    /* Rounding may put a share a hair above what is exact, never by a place, so `given` stays within the block. */
    ASSERT(given <= LOADER_BLOCK);
    for (; given < LOADER_BLOCK; given++) {
        size_t best = 0;
        for (size_t s = 1; s < count; s++) {
            if (remainder[s] > remainder[best]) best = s;
        }
        places[best]++;
        remainder[best] = -1;
    }
}

int mixture_make(struct mixture *m, const struct loader_source *sources, const uint64_t *samples, size_t count,
                 uint64_t seed, bool shuffle, error *err) {
    ASSERT(count >= 1 && count <= LIMIT_SOURCES);
    TRY(check_weights(sources, count, err));
    uint32_t places[LIMIT_SOURCES];
    share_places(places, sources, count);
    *m = (struct mixture){.seed = seed, .shuffle = shuffle, .count = count};
    for (size_t s = 0; s < count; s++) {
        ASSERT(samples[s] >= 1);
        if (places[s] == 0) {
            double others = 0;
            for (size_t o = 0; o < count; o++) others += o == s ? 0 : sources[o].weight;
            return error_input(
                err,
                "source '%s' has weight %g, too small beside the other sources' %g to get one of the %d samples "
                "of a block; a weight of %.3g is enough, or leave the source out",
                sources[s].name, sources[s].weight, others, LOADER_BLOCK, others / (LOADER_BLOCK - 1) * 1.01);
        }
        m->samples[s] = samples[s];
        m->first[s + 1] = m->first[s] + places[s];
    }
    return 0;
}

uint32_t mixture_places(const struct mixture *m, size_t source) {
    ASSERT(source < m->count);
    return m->first[source + 1] - m->first[source];
}

/* Place i of a block draws lot rng_permute(i), and lots belong to sources. */
static void draw_block(const struct mixture *m, struct mixture_block *block, uint64_t number) {
    uint8_t owner[LOADER_BLOCK];
    uint16_t turns[LIMIT_SOURCES] = {0};
    for (size_t s = 0; s < m->count; s++) {
        for (uint32_t lot = m->first[s]; lot < m->first[s + 1]; lot++) owner[lot] = (uint8_t)s;
    }
    rng_key key = {.seed = m->seed, .purpose = RNG_MIXTURE, .stream = (uint32_t)number};
    for (uint32_t i = 0; i < LOADER_BLOCK; i++) {
        uint8_t s = owner[rng_permute(key, LOADER_BLOCK, i)];
        block->source[i] = s;
        block->turn[i] = turns[s]++;
    }
    block->number = number;
}

struct loader_place mixture_locate(const struct mixture *m, struct mixture_block *block, uint64_t g) {
    uint64_t number = g / LOADER_BLOCK, place = g % LOADER_BLOCK;
    size_t source = 0;
    uint64_t turn = place;
    if (m->count > 1) { /* a single source has every place, in order */
        if (block->number != number) draw_block(m, block, number);
        source = block->source[place];
        turn = block->turn[place];
    }
    uint64_t visit = number * mixture_places(m, source) + turn;
    uint64_t epoch = visit / m->samples[source], position = visit % m->samples[source];
    if (m->shuffle) {
        uint32_t stream = (uint32_t)source << EPOCH_BITS | (uint32_t)(epoch & ((1u << EPOCH_BITS) - 1));
        rng_key key = {.seed = m->seed, .purpose = RNG_SHUFFLE, .stream = stream};
        position = rng_permute(key, m->samples[source], position);
    }
    return (struct loader_place){.source = source, .epoch = epoch, .sample = position};
}
