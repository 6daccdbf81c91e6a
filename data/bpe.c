/* bpe.c: the table of merges and the two ways of applying it, as bpe.h describes. Called by the encoder.
 *
 * A short word is kept as two arrays, ids and the ranks of neighbouring pairs, and searched from end to end for each
 * merge. A long one (a genome is a single word) is a linked list with a heap of the merges that may come, so that its
 * time grows with n log n.
 */
#include "data/bpe.h"

#include <stdlib.h>
#include <string.h>

enum { SHORT_WORD = 64 };
#define NO_PAIR UINT64_MAX
#define NO_RANK UINT32_MAX
#define END UINT32_MAX

/* ---- the table --------------------------------------------------------------------------------------------------- */

int bpe_open(struct bpe *b, size_t merges, error *err) {
    unsigned bits = 4;
    while (((size_t)1 << bits) < 2 * merges) bits++;
    size_t places = (size_t)1 << bits;
    b->shift = 64 - bits;
    b->mask = places - 1;
    b->table = malloc(places * sizeof *b->table);
    if (!b->table) return error_system(err, "no memory for the %zu merges of a tokenizer", merges);
    for (size_t i = 0; i < places; i++) b->table[i].pair = NO_PAIR;
    return 0;
}

void bpe_close(struct bpe *b) {
    free(b->table);
}

static struct bpe_merge *find(const struct bpe *b, uint64_t pair) {
    size_t at = (size_t)((pair * UINT64_C(0x9E3779B97F4A7C15)) >> b->shift);
    while (b->table[at].pair != pair && b->table[at].pair != NO_PAIR) at = (at + 1) & b->mask;
    return &b->table[at];
}

static uint64_t pair_of(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* The merge of two neighbours, or one of rank NO_RANK. */
static struct bpe_merge merge_of(const struct bpe *b, int32_t left, int32_t right) {
    struct bpe_merge found = *find(b, pair_of(left, right));
    if (found.pair == NO_PAIR) found.rank = NO_RANK;
    return found;
}

bool bpe_add(struct bpe *b, const struct bpe_merge *merge) {
    struct bpe_merge *place = find(b, merge->pair);
    if (place->pair != NO_PAIR) return false;
    *place = *merge;
    return true;
}

/* ---- short words ------------------------------------------------------------------------------------------------- */

static size_t encode_short(const struct bpe *b, const char *word, size_t size, int32_t *ids) {
    uint32_t ranks[SHORT_WORD]; /* ranks[i] of the pair i, i + 1 */
    size_t count = size;
    for (size_t i = 0; i < size; i++) ids[i] = b->byte_ids[(unsigned char)word[i]];
    for (size_t i = 0; i + 1 < size; i++) ranks[i] = merge_of(b, ids[i], ids[i + 1]).rank;
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; i++) best = ranks[i] < ranks[best] ? i : best;
        if (ranks[best] == NO_RANK) break;
        ids[best] = merge_of(b, ids[best], ids[best + 1]).id;
        count--;
        for (size_t i = best + 1; i < count; i++) ids[i] = ids[i + 1];
        for (size_t i = best + 1; i + 1 < count; i++) ranks[i] = ranks[i + 1];
        if (best > 0) ranks[best - 1] = merge_of(b, ids[best - 1], ids[best]).rank;
        if (best + 1 < count) ranks[best] = merge_of(b, ids[best], ids[best + 1]).rank;
    }
    return count;
}

/* ---- long words -------------------------------------------------------------------------------------------------- */

/* A token of the word; END where there is no neighbour. One that was merged into its left neighbour has id -1. */
struct symbol {
    int32_t id;
    uint32_t before, after;
};

struct long_word {
    const struct bpe *bpe;
    struct symbol *symbols;
    uint64_t *heap; /* rank << 32 | index of the left symbol: the smallest is the next merge */
    size_t heap_size;
};

static void heap_push(struct long_word *w, uint64_t key) {
    size_t at = w->heap_size++;
    while (at > 0 && w->heap[(at - 1) / 2] > key) {
        w->heap[at] = w->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    w->heap[at] = key;
}

static uint64_t heap_pop(struct long_word *w) {
    uint64_t top = w->heap[0], key = w->heap[--w->heap_size];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= w->heap_size) break;
        if (child + 1 < w->heap_size && w->heap[child + 1] < w->heap[child]) child++;
        if (w->heap[child] >= key) break;
        w->heap[at] = w->heap[child];
        at = child;
    }
    w->heap[at] = key;
    return top;
}

/* Note that the symbol `left` may be merged with the one after it, if it may. */
static void propose(struct long_word *w, uint32_t left) {
    uint32_t right = left == END ? END : w->symbols[left].after;
    if (right == END) return;
    uint32_t rank = merge_of(w->bpe, w->symbols[left].id, w->symbols[right].id).rank;
    if (rank != NO_RANK) heap_push(w, (uint64_t)rank << 32 | left);
}

static void merge_all(struct long_word *w) {
    while (w->heap_size > 0) {
        uint64_t key = heap_pop(w);
        uint32_t at = (uint32_t)key;
        struct symbol *left = &w->symbols[at];
        if (left->id < 0 || left->after == END) continue;
        struct symbol *right = &w->symbols[left->after];
        struct bpe_merge merge = merge_of(w->bpe, left->id, right->id);
        if (merge.rank != key >> 32) continue; /* proposed for neighbours that are no more */
        left->id = merge.id;
        left->after = right->after;
        right->id = -1;
        if (left->after != END) w->symbols[left->after].before = at;
        propose(w, left->before);
        propose(w, at);
    }
}

static int encode_long(const struct bpe *b, struct bpe_scratch *s, const char *word, size_t size, int32_t *ids,
                       size_t *count, error *err) {
    if (size >= END) return error_input(err, "a word of %zu bytes is too long to be encoded", size);
    /* A pair at first for every symbol, and two for each of fewer than `size` merges. */
    size_t need = size * (3 * sizeof(uint64_t) + sizeof(struct symbol));
    if (s->capacity < need) {
        free(s->memory);
        s->memory = malloc(need);
        s->capacity = s->memory ? need : 0;
        if (!s->memory) return error_system(err, "no memory to encode a word of %zu bytes", size);
    }
    struct long_word w = {.bpe = b, .heap = s->memory, .symbols = (struct symbol *)((uint64_t *)s->memory + 3 * size)};
    for (uint32_t i = 0; i < size; i++) {
        w.symbols[i] =
            (struct symbol){b->byte_ids[(unsigned char)word[i]], i > 0 ? i - 1 : END, i + 1 < size ? i + 1 : END};
    }
    for (uint32_t i = 0; i < size; i++) propose(&w, i);
    merge_all(&w);
    size_t found = 0;
    for (uint32_t at = 0; at != END; at = w.symbols[at].after) ids[found++] = w.symbols[at].id;
    *count = found;
    return 0;
}

int bpe_encode(const struct bpe *b, struct bpe_scratch *s, const char *word, size_t size, int32_t *ids, size_t *count,
               error *err) {
    ASSERT(size >= 1);
    if (size > SHORT_WORD) return encode_long(b, s, word, size, ids, count, err);
    *count = encode_short(b, word, size, ids);
    return 0;
}
