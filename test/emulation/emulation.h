/* emulation.h: how kernels of CUDA run on the processor: what a `__global__` function sees of the machine that runs it.
 * Included through cuda_runtime.h; docs/testing.md says what this is for. In emulation.cc.
 *
 * The blocks of a launch run one after another, those of a cluster in turns. Each thread of a block is a fiber: it runs
 * until it has to wait for others, at a barrier of the block or where lanes of a warp exchange values, and then another
 * one runs. A warp goes as far as it gets before the next one runs, and so does each lane, so that what lacks a barrier
 * finds shared memory unwritten: at the start of a block it is filled with NaN. RIVERRUN_EMULATE_ORDER says which goes
 * first: forward (the default), reverse, or a number, the key of a random order.
 *
 * Misuse ends the program with a sentence that names kernel, block and thread: threads that wait for each other for
 * ever, lanes that exchange values with lanes that do something else, shared addresses that are not, misaligned copies.
 */
#ifndef RIVERRUN_TEST_EMULATION_H
#define RIVERRUN_TEST_EMULATION_H

#include <functional>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>

#include "vectors.h"

/* --- what qualifies functions and variables ----------------------------------------------------------------------- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static

/* Shared variables gather in a section of their own, so that they can be filled at the start of a block. The name that
 * the compiler sees ends in a number that the assembler takes for a comment: the compiler refuses to keep variables of
 * templates and of functions in one section. (Those of templates it puts elsewhere anyway; the Makefile's rule for .cu
 * files brings them back.) */
#define EMULATION_TEXT_OF(number) #number
#define EMULATION_TEXT(number) EMULATION_TEXT_OF(number)
#ifdef __x86_64__
#define EMULATION_COMMENT "#"
#else
#define EMULATION_COMMENT "//"
#endif
#define __shared__                                                                                                     \
    static __attribute__((section("emulation_shared,\"aw\",%nobits" EMULATION_COMMENT EMULATION_TEXT(__COUNTER__))))

#define DYNAMIC_SHARED(type, name) type *const name = (type *)emulation::dynamic_shared()

/* --- the thread's place ------------------------------------------------------------------------------------------- */

extern uint3 threadIdx, blockIdx; /* of the fiber that runs */
extern dim3 blockDim, gridDim;
static const int warpSize = 32;

struct emulated_stream; /* cuda_runtime.h */

namespace emulation {

/* Print "NAME, block (x,y,z), thread (x,y,z): " and the sentence, and abort. */
[[noreturn]] void misuse(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* --- launches ----------------------------------------------------------------------------------------------------- */

/* Run `thread` once for each thread of the grid. `cluster` blocks, neighbours along x, run at the same time; their
 * shared memory must be dynamic, because shared variables exist once. */
void run_grid(const char *name, dim3 grid, dim3 block, unsigned cluster, size_t dynamic,
              const std::function<void()> &thread);
/* Would the device run such a launch? If not, the reason is kept for cudaGetLastError. (runtime.cc) */
bool launch_allowed(const void *kernel, dim3 grid, dim3 block, unsigned cluster, size_t dynamic);
/* Do now, or note in the graph that is being captured. (runtime.cc) */
void submit(std::function<void()> work);
/* The same once the stream waits for another. (runtime.cc) */
void submit_beside(struct ::emulated_stream *stream, std::function<void()> work);

template <class T> struct same {
    typedef T type;
};

template <class... P>
void launch_clusters(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster, size_t dynamic,
                     typename same<P>::type... arguments) {
    if (!launch_allowed((const void *)kernel, grid, block, cluster, dynamic)) return;
    std::tuple<P...> kept(arguments...);
    submit([=] {
        run_grid(name, grid, block, cluster, dynamic, [&] { std::apply(kernel, kept); });
    });
}

template <class... P>
void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic,
            typename same<P>::type... arguments) {
    launch_clusters(name, kernel, grid, block, 1, dynamic, arguments...);
}

void *dynamic_shared();
/* Do these bytes lie in the block's shared memory? */
bool is_shared(const void *at, size_t bytes);

/* --- waiting for others ------------------------------------------------------------------------------------------- */

enum { WARP_LANES = 32, BARRIERS = 16 };
static const unsigned ALL_LANES = 0xffffffffu;

/* Wait at barrier `id` of the block until `threads` are there; 0: all that have not returned. */
void barrier(int id, unsigned threads);
/* Barrier 0 that adds up a value of each thread. */
int barrier_sum(int value);

/* What a lane brings to a meeting of its warp's lanes: all[i] of lane i, NULL of those that do not take part or have
 * returned. The last lane to come does the work for all. */
typedef void meeting(void **all);
/* All lanes of `mask` that have not returned meet; `what` is the instruction's name, the same pointer for all. With
 * `whole`, all 32 must be there. */
void meet(const char *what, unsigned mask, void *mine, meeting *work, bool whole = false);
int lane();
unsigned lanes_left(); /* of the warp: those that have not returned */

/* --- clusters ----------------------------------------------------------------------------------------------------- */

enum { CLUSTER_PORTABLE = 8, CLUSTER_MOST = 16 };

unsigned cluster_rank();
unsigned cluster_blocks();
/* The place in block `rank` that corresponds to this one of the block's own. */
char *cluster_place(const void *shared, unsigned rank);
void cluster_arrive();
void cluster_wait();

/* A flag (kernels/cuda/cluster.cuh) takes eight bytes of shared memory. */
void flag_open(uint64_t *flag);
void flag_expect(uint64_t *flag, unsigned bytes);
void flag_wait(uint64_t *flag, unsigned parity);
/* Bytes to any block of the cluster, and so many less for the flag there to wait for. */
void flag_send(char *to, const void *from, size_t bytes, char *flag);

/* --- copies that don't wait --------------------------------------------------------------------------------------- */

/* The destination is undefined (NaN) from the start of a copy to the wait, when the bytes arrive. */
void copy_start(void *shared, const void *global, int size, int bytes);
void copy_commit();
void copy_wait(int groups);

} // namespace emulation

#define START_CLUSTERS(kernel, grid, block, cluster, shared, stream, ...)                                              \
    ((void)(stream), emulation::launch_clusters(#kernel, kernel, grid, block, cluster, shared, ##__VA_ARGS__))
#define START_KERNEL(kernel, grid, block, shared, stream, ...)                                                         \
    ((void)(stream), emulation::launch(#kernel, kernel, grid, block, shared, ##__VA_ARGS__))

/* --- barriers ----------------------------------------------------------------------------------------------------- */

static inline void __syncthreads() {
    emulation::barrier(0, 0);
}
static inline int __syncthreads_count(int predicate) {
    return emulation::barrier_sum(predicate != 0);
}
static inline int __syncthreads_or(int predicate) {
    return emulation::barrier_sum(predicate != 0) != 0;
}
static inline int __syncthreads_and(int predicate) {
    return emulation::barrier_sum(predicate == 0) == 0;
}
static inline void __barrier_sync(unsigned id) {
    emulation::barrier((int)id, 0);
}
static inline void __barrier_sync_count(unsigned id, unsigned threads) {
    emulation::barrier((int)id, threads);
}
static inline void __threadfence_block() {
    __asm__ volatile("" ::: "memory");
}
static inline void __threadfence() {
    __asm__ volatile("" ::: "memory");
}
static inline void __threadfence_system() {
    __asm__ volatile("" ::: "memory");
}

/* --- lanes of a warp ---------------------------------------------------------------------------------------------- */

namespace emulation {

/* value and the lane it comes from; of a lane that is not there comes NaN. */
struct shuffle {
    uint64_t in, out;
    int from;
};

static inline void shuffle_all(void **all) {
    for (int i = 0; i < WARP_LANES; i++) {
        shuffle *to = (shuffle *)all[i];
        if (to) to->out = all[to->from] ? ((shuffle *)all[to->from])->in : ~(uint64_t)0;
    }
}

template <class T> T shuffled(const char *what, unsigned mask, T value, int from) {
    static_assert(sizeof(T) <= 8, "what a lane can pass on");
    shuffle s = {0, 0, from};
    memcpy(&s.in, &value, sizeof value);
    meet(what, mask, &s, shuffle_all);
    memcpy(&value, &s.out, sizeof value);
    return value;
}

/* A number of each lane, and what is made of all. */
struct vote {
    uint32_t in, out;
};

template <class F> static inline void vote_all(void **all, F of_all) {
    uint32_t out = 0;
    bool first = true;
    for (int i = 0; i < WARP_LANES; i++)
        if (all[i]) {
            uint32_t in = ((vote *)all[i])->in;
            out = of_all(first, out, in, i);
            first = false;
        }
    for (int i = 0; i < WARP_LANES; i++)
        if (all[i]) ((vote *)all[i])->out = out;
}

static inline uint32_t voted(const char *what, unsigned mask, uint32_t value, meeting *work) {
    vote v = {value, 0};
    meet(what, mask, &v, work);
    return v.out;
}

static inline int segment_start(int width) {
    return lane() & ~(width - 1);
}

} // namespace emulation

template <class T> static inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return emulation::shuffled("__shfl_sync", mask, value, emulation::segment_start(width) + (from & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int from = emulation::lane() ^ bits;
    if (from >= emulation::segment_start(width) + width) from = emulation::lane();
    return emulation::shuffled("__shfl_xor_sync", mask, value, from);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    int from = emulation::lane() - (int)by;
    if (from < emulation::segment_start(width)) from = emulation::lane();
    return emulation::shuffled("__shfl_up_sync", mask, value, from);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    int from = emulation::lane() + (int)by;
    if (from >= emulation::segment_start(width) + width) from = emulation::lane();
    return emulation::shuffled("__shfl_down_sync", mask, value, from);
}

static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulation::meet("__syncwarp", mask, &mask, [](void **) {});
}
static inline unsigned __activemask() {
    return emulation::lanes_left();
}

#define EMULATION_VOTE(type, name, in, expression)                                                                     \
    static inline type name(unsigned mask, type value) {                                                               \
        return (type)emulation::voted(#name, mask, (uint32_t)(in), [](void **all) {                                    \
            emulation::vote_all(all, [](bool first, uint32_t so_far, uint32_t one, int at) -> uint32_t {               \
                (void)first, (void)so_far, (void)one, (void)at;                                                        \
                return (uint32_t)(expression);                                                                         \
            });                                                                                                        \
        });                                                                                                            \
    }
EMULATION_VOTE(int, __any_sync, value != 0, so_far | one)
EMULATION_VOTE(int, __all_sync, value != 0, first ? one : so_far & one)
EMULATION_VOTE(unsigned, __reduce_add_sync, value, so_far + one)
EMULATION_VOTE(int, __reduce_add_sync, value, so_far + one)
EMULATION_VOTE(unsigned, __reduce_and_sync, value, first ? one : so_far & one)
EMULATION_VOTE(unsigned, __reduce_or_sync, value, so_far | one)
EMULATION_VOTE(unsigned, __reduce_xor_sync, value, so_far ^ one)
EMULATION_VOTE(unsigned, __reduce_min_sync, value, first || one < so_far ? one : so_far)
EMULATION_VOTE(unsigned, __reduce_max_sync, value, first || one > so_far ? one : so_far)
EMULATION_VOTE(int, __reduce_min_sync, value, first || (int32_t)one < (int32_t)so_far ? one : so_far)
EMULATION_VOTE(int, __reduce_max_sync, value, first || (int32_t)one > (int32_t)so_far ? one : so_far)

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulation::voted("__ballot_sync", mask, predicate != 0, [](void **all) {
        emulation::vote_all(all, [](bool, uint32_t so_far, uint32_t one, int at) { return so_far | one << at; });
    });
}

#endif
