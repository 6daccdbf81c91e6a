/* rng.h: random numbers as a pure function of a key: no stream, no state.
 *
 * A draw is named by (seed, purpose, stream, index): the run's seed, what the number is for, a number within the
 * purpose (a tensor, a data source, a step) and the position. The generator is Philox4x32-10 (Salmon et al., SC 2011),
 * so any draw can be computed in any order, by any rank or thread, and comes out the same.
 */
#ifndef RIVERRUN_RNG_H
#define RIVERRUN_RNG_H

#include <stdint.h>

/* Purposes are fixed numbers: changing one changes every run made with it. */
enum rng_purpose {
    RNG_INIT = 1,    /* initial weights; stream = index of the tensor in the tensor table */
    RNG_SHUFFLE = 2, /* order of samples; stream = source and epoch */
    RNG_MIXTURE = 3, /* interleaving of sources; stream = block of samples */
    RNG_SAMPLE = 4,  /* generation; stream = sequence, index = position */
    RNG_TEST = 5,    /* test data */
    RNG_TASK = 6,    /* generated tasks */
};

typedef struct rng_key {
    uint64_t seed;
    uint32_t purpose;
    uint32_t stream;
} rng_key;

/* The generator itself: 128 random bits for a 128-bit counter under a 64-bit key. */
void rng_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

uint64_t rng_bits(rng_key key, uint64_t index);  /* 64 uniform bits */
double rng_uniform(rng_key key, uint64_t index); /* [0, 1), 53 bits */
double rng_normal(rng_key key, uint64_t index);  /* mean 0, variance 1 (Box-Muller) */
/* 0 <= result < bound; bound >= 1, bias below 2^-64 bound. */
uint64_t rng_below(rng_key key, uint64_t index, uint64_t bound);

/* A keyed permutation of 0..n-1: where position i goes. A Feistel network over the next power of four, walked until it
 * lands below n: O(1) memory, so a data set of any size is shuffled without a table. n >= 1, i < n. */
uint64_t rng_permute(rng_key key, uint64_t n, uint64_t i);

#endif
