/* wgmma.cuh: products that a warpgroup, four warps, asks for together and does not wait for; Hopper's (sm_90a), on no
 * other chip. Behind functions of their own like the instructions of mma.cuh, so that test/emulation can stand in for
 * them.
 *
 *   d (64 x 64) (+)= a (64 x 16) b (16 x 64), in fp32
 *
 * Warp w of the group has rows 16 w .. of d and of a: d[n] is mma's fragment d of its 16 rows and columns 8 n ..
 * (mma.cuh), a in registers is mma's fragment a. In shared memory a matrix is a *tile*: rows of 64 bf16, 128 bytes,
 * from an address aligned to TILE_ALIGN on; the 16 bytes of columns c .. c + 7 of row r lie at place c / 8 ^ r % 8 of
 * the row. `matrix` names one:
 *   a and `b by rows`: rows are m (or n), columns k; matrix_columns(x, k) are 16 columns from k on, a multiple of 16;
 *   `b by columns`, or both: rows are k, columns n (or m); matrix_rows(x, k) are rows from k on, a multiple of 16 (of 8
 *   for a's m).
 *
 * The order of a round: shared memory is written; every thread that wrote waits for its copies and calls
 * shared_for_products; a barrier; products_begin; products; products_end; products_wait<N>, after which at most the N
 * youngest rounds of the group are under way; of the others, arrived(d) gives the sums and arrived(a) the registers
 * back. Between products_begin and that, d and a are not touched. Every thread of the warpgroup takes part. */
#ifndef RIVERRUN_CUDA_WGMMA_CUH
#define RIVERRUN_CUDA_WGMMA_CUH

#include "kernels/cuda/mma.cuh"

#include <stdlib.h>
#include <string.h>

enum {
    WARPGROUP = 128,
    TILE_COLUMNS = 64,
    TILE_ALIGN = 1024,
};

/* Kernels of such products have no body in code for chips that lack them. */
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WITHOUT_WGMMA
#endif

#ifdef RIVERRUN_EMULATE
#include "test/emulation/wgmma.h"
#else

/* The hardware's descriptor: address, and 1024 bytes from eight rows to the next, in units of 16; exchange over 128. */
typedef uint64_t matrix;

__device__ __forceinline__ matrix matrix_at(const __nv_bfloat16 *tile) {
    return (uint64_t)(shared_address(tile) >> 4) | 1ull << 16 | (uint64_t)(TILE_ALIGN >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ matrix matrix_columns(matrix x, int k) {
    return x + (uint64_t)(k * 2 / 16);
}

__device__ __forceinline__ matrix matrix_rows(matrix x, int k) {
    return x + (uint64_t)(k * TILE_COLUMNS * 2 / 16);
}

/* The next address that a tile may start at. */
__device__ __forceinline__ __nv_bfloat16 *tile_start(__nv_bfloat16 *shared) {
    return shared + (-shared_address(shared) & (TILE_ALIGN - 1)) / sizeof *shared;
}

__device__ __forceinline__ void shared_for_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#ifndef WITHOUT_WGMMA
__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define WGMMA_SUMS                                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"      \
    "%29,%30,%31}"
#define WGMMA_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define WGMMA_REGISTERS                                                                                                \
    WGMMA_FOUR(0), WGMMA_FOUR(1), WGMMA_FOUR(2), WGMMA_FOUR(3), WGMMA_FOUR(4), WGMMA_FOUR(5), WGMMA_FOUR(6),           \
        WGMMA_FOUR(7)

/* Both from shared memory, b by rows; without `add`, d is overwritten. */
__device__ __forceinline__ void product_of_rows(float (&d)[8][4], matrix a, matrix b, bool add) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS ", %32, %33, add, 1, 1, 0, 0;\n\t}"
                 : WGMMA_REGISTERS
                 : "l"(a), "l"(b), "r"((int)add));
}

/* a from registers, b by rows. */
__device__ __forceinline__ void product_of_rows(float (&d)[8][4], const uint32_t (&a)[4], matrix b, bool add) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %37, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS ", {%32,%33,%34,%35}, %36, add, 1, "
                 "1, 0;\n\t}"
                 : WGMMA_REGISTERS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

/* a from registers, b by columns; d is added to. */
__device__ __forceinline__ void product_of_columns(float (&d)[8][4], const uint32_t (&a)[4], matrix b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.b32 add, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS ", {%32,%33,%34,%35}, %36, add, 1, "
                 "1, 1;\n\t}"
                 : WGMMA_REGISTERS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* Both from shared memory, b by columns. */
__device__ __forceinline__ void product_of_columns(float (&d)[8][4], matrix a, matrix b, bool add) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS ", %32, %33, add, 1, 1, 0, 1;\n\t}"
                 : WGMMA_REGISTERS
                 : "l"(a), "l"(b), "r"((int)add));
}

/* Both from shared memory, a by columns (rows are k, columns m), b by rows. */
__device__ __forceinline__ void product_of_columns_and_rows(float (&d)[8][4], matrix a, matrix b, bool add) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS ", %32, %33, add, 1, 1, 1, 0;\n\t}"
                 : WGMMA_REGISTERS
                 : "l"(a), "l"(b), "r"((int)add));
}

/* What a round wrote or read is looked at, or changed, only behind this. */
__device__ __forceinline__ void arrived(float (&d)[8][4]) {
    asm volatile("" : WGMMA_REGISTERS::"memory");
}

template <int N> __device__ __forceinline__ void arrived(uint32_t (&a)[N][4]) {
#pragma unroll
    for (int k = 0; k < N; k++)
        asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}
#endif
#endif

/* Can this GPU run a kernel of such products? The code may have been made for another chip. RIVERRUN_WGMMA=0 in the
 * environment does without. */
template <class K> static inline bool products_fit(K kernel) {
    const char *wanted = getenv("RIVERRUN_WGMMA");
    cudaFuncAttributes code;
    if (wanted && strcmp(wanted, "0") == 0) return false;
    bool fits = cudaFuncGetAttributes(&code, (const void *)kernel) == cudaSuccess && code.binaryVersion == 90 &&
                code.ptxVersion >= 90;
    if (!fits) cudaGetLastError(); /* no failure of later launches */
    return fits;
}

#endif
