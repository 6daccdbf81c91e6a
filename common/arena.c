/* arena.c: carves one block of memory in order, as arena.h describes. Owns the block.
 *
 * Under AddressSanitizer everything not handed out is poisoned, and a gap of one cache line follows every piece, so
 * that a write past a piece or into a piece given back stops at once. Debug builds on host memory also fill what
 * arena_rewind gives back with 0xFF bytes (a NaN in every float format), so that nobody lives on stale contents.
 */
#include "common/arena.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#define ARENA_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ARENA_ASAN 1
#endif
#endif

#ifdef ARENA_ASAN
#include <sanitizer/asan_interface.h>
#define ARENA_GAP ARENA_ALIGN
#define poison(at, size) __asan_poison_memory_region(at, size)
#define unpoison(at, size) __asan_unpoison_memory_region(at, size)
#else
#define ARENA_GAP 0
#define poison(at, size) ((void)(at), (void)(size))
#define unpoison(at, size) ((void)(at), (void)(size))
#endif

static void *host_allocate(void *self, size_t size) {
    (void)self;
    void *block = aligned_alloc(ARENA_ALIGN, size);
    /* Touching all of it now means that a machine without the memory says so at the start and not hours later. */
    if (block) memset(block, 0, size);
    return block;
}

static void host_release(void *self, void *block) {
    (void)self;
    free(block);
}

static const struct arena_memory host_memory = {host_allocate, host_release, NULL};

static bool on_host(const arena *a) {
    return a->memory == &host_memory;
}

/* `size` rounded up to whole ARENA_ALIGN units, or SIZE_MAX if that does not fit. */
static size_t align_up(size_t size) {
    return size > SIZE_MAX - ARENA_ALIGN ? SIZE_MAX : (size + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
}

arena arena_measure(const char *name) {
    return (arena){.name = name, .capacity = SIZE_MAX};
}

int arena_open(arena *a, const char *name, size_t capacity, const struct arena_memory *memory, error *err) {
    *a = (arena){.name = name, .memory = memory ? memory : &host_memory};
    size_t size = capacity ? align_up(capacity) : ARENA_ALIGN;
    a->base = size == SIZE_MAX ? NULL : a->memory->allocate(a->memory->self, size);
    if (!a->base)
        return error_system(err,
                            "cannot allocate %zu bytes (%.2f GiB) for %s; riverrun plan shows what a run takes, and "
                            "which batch fits",
                            capacity, capacity / 0x1p30, name);
    a->capacity = size;
    if (on_host(a)) poison(a->base, a->capacity);
    return 0;
}

void arena_close(arena *a) {
    if (a->base) {
        if (on_host(a)) unpoison(a->base, a->capacity);
        a->memory->release(a->memory->self, a->base);
    }
    *a = (arena){.name = a->name};
}

void *arena_take(arena *a, size_t size) {
    size_t whole = align_up(size);
    bool fits = whole <= SIZE_MAX - ARENA_GAP && whole + ARENA_GAP <= a->capacity - a->used;
    if (!fits) {
        fprintf(stderr, "riverrun: arena '%s': %zu bytes asked for, %zu of %zu are free\n", a->name, size,
                a->capacity - a->used, a->capacity);
    }
    ASSERT(fits);
    char *piece = a->base ? a->base + a->used : NULL;
    if (piece && on_host(a)) unpoison(piece, size);
    a->used += whole + ARENA_GAP;
    if (a->used > a->peak) a->peak = a->used;
    return piece;
}

size_t arena_mark(const arena *a) {
    return a->used;
}

void arena_rewind(arena *a, size_t mark) {
    ASSERT(mark <= a->used);
    if (a->base && on_host(a)) {
#ifdef RIVERRUN_DEBUG
        unpoison(a->base + mark, a->used - mark);
        memset(a->base + mark, 0xFF, a->used - mark);
#endif
        poison(a->base + mark, a->used - mark);
    }
    a->used = mark;
}
