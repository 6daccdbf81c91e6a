/* arena.h: one block of memory per lifetime, carved in order.
 *
 * The same carving code runs twice: first on an arena opened with arena_measure(), which hands out NULL and only
 * counts, then on one opened with arena_open() of the counted size. So a plan (`riverrun plan`) and the real run can't
 * disagree, and sizes are known before anything is allocated. After start-up nothing is allocated.
 *
 * Every piece starts on a 64-byte boundary (a cache line, an AVX-512 vector, and what BLAS likes). The memory comes
 * zeroed. The allocator is a pair of functions, so that a device can supply its own memory; NULL means host memory.
 */
#ifndef RIVERRUN_ARENA_H
#define RIVERRUN_ARENA_H

#include "common/error.h"
#include <stddef.h>
#include <stdint.h>

#define ARENA_ALIGN 64

struct arena_memory {                           /* where an arena's block comes from */
    void *(*allocate)(void *self, size_t size); /* zeroed, ARENA_ALIGN-aligned; NULL when there is none */
    void (*release)(void *self, void *block);
    void *self;
};

typedef struct arena {
    const char *name; /* for messages and the memory table: "parameters", "activations", ... */
    char *base;       /* NULL while measuring */
    size_t capacity;  /* bytes; SIZE_MAX while measuring */
    size_t used;      /* bytes handed out so far, alignment included */
    size_t peak;      /* the largest `used` ever seen: what a real run needs */
    const struct arena_memory *memory;
} arena;

/* An arena that only counts: arena_take returns NULL, arena.peak is the size to open. */
arena arena_measure(const char *name);

/* Allocate `capacity` bytes. Failure: ERROR_SYSTEM naming the arena and the size. */
int arena_open(arena *a, const char *name, size_t capacity, const struct arena_memory *memory, error *err);
void arena_close(arena *a);

/* The next `size` bytes (NULL while measuring). Taking more than the capacity is a programmer error. */
void *arena_take(arena *a, size_t size);

/* Stack discipline for scratch and for regions that are reused: remember `used`, go back to it. What is taken again
 * after a rewind holds whatever was left there (NaN in debug builds), not zeros. */
size_t arena_mark(const arena *a);
void arena_rewind(arena *a, size_t mark);

#endif
