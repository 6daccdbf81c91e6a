/* rng.c: Philox4x32-10 and what riverrun draws from it, as rng.h describes. Keeps no state; called from everywhere.
 *
 * The 128-bit counter is (index, stream, purpose), the 64-bit key is the seed. Uniform, normal and bounded draws at one
 * index come from the same 128 bits, so a caller that needs two independent draws uses two indices.
 */
#include "common/rng.h"

#include "common/error.h"
#include <math.h>

void rng_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u; /* the key schedule: the golden ratio and the square root of 3 less 1, as 32-bit fractions */
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

static void draw(rng_key key, uint64_t index, uint32_t out[4]) {
    const uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32), key.stream, key.purpose};
    const uint32_t words[2] = {(uint32_t)key.seed, (uint32_t)(key.seed >> 32)};
    rng_philox(counter, words, out);
}

static uint64_t join(uint32_t low, uint32_t high) {
    return (uint64_t)high << 32 | low;
}

uint64_t rng_bits(rng_key key, uint64_t index) {
    uint32_t out[4];
    draw(key, index, out);
    return join(out[0], out[1]);
}

double rng_uniform(rng_key key, uint64_t index) {
    return (double)(rng_bits(key, index) >> 11) * 0x1p-53;
}

double rng_normal(rng_key key, uint64_t index) {
    uint32_t out[4];
    draw(key, index, out);
    /* The radius needs a number in (0, 1], so that its logarithm is finite. */
    double u = (double)((join(out[0], out[1]) >> 11) + 1) * 0x1p-53;
    double v = (double)(join(out[2], out[3]) >> 11) * 0x1p-53;
    return sqrt(-2.0 * log(u)) * cos(2.0 * M_PI * v);
}

uint64_t rng_below(rng_key key, uint64_t index, uint64_t bound) {
    ASSERT(bound >= 1);
    return (uint64_t)((unsigned __int128)rng_bits(key, index) * bound >> 64);
}

/* One pass of the Feistel network over numbers of 2 * half bits. Marking the purpose keeps its draws apart from
 * rng_bits under the same key. */
static uint64_t scramble(rng_key key, int half, uint64_t value) {
    enum { ROUNDS = 8 }; /* four give a pseudorandom permutation of a large set; small sets mix more slowly */
    const uint32_t words[2] = {(uint32_t)key.seed, (uint32_t)(key.seed >> 32)};
    uint32_t mask = (uint32_t)((UINT64_C(1) << half) - 1);
    uint32_t left = (uint32_t)(value >> half) & mask, right = (uint32_t)value & mask;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        const uint32_t counter[4] = {right, round, key.stream, key.purpose | 0x80000000u};
        uint32_t out[4];
        rng_philox(counter, words, out);
        uint32_t next = left ^ (out[0] & mask);
        left = right;
        right = next;
    }
    return (uint64_t)left << half | right;
}

uint64_t rng_permute(rng_key key, uint64_t n, uint64_t i) {
    ASSERT(n >= 1 && i < n);
    if (n == 1) return 0;
    int half = 1;
    while (half < 32 && UINT64_C(1) << (2 * half) < n) half++;
    /* The network permutes 0 .. 4^half - 1; following its cycle from i until it is below n again permutes 0 .. n-1.
     * The expected number of passes is at most 4. */
    do i = scramble(key, half, i);
    while (i >= n);
    return i;
}
