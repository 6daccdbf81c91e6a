/* mma.cuh: instructions that CUDA C++ has no name for, each behind a function of its own: products of small matrices on
 * tensor cores, loads of their fragments from shared memory, copies from global to shared memory that don't wait, and a
 * fast power of two. All exist from sm_80 on. No other file of this directory but cluster.cuh and wgmma.cuh holds assembly,
 * so that test/emulation can stand in for all of it on machines without a GPU.
 *
 * Fragments of mma, for lane l of a warp, with g = l / 4 and q = l % 4. A register holds two bf16 that lie next to each
 * other along k; the one with the lower index is in the lower 16 bits.
 *
 *   a (16 x 16, m x k)   a[0]: row g,     k = 2q, 2q+1        a[2]: row g,     k = 2q+8, 2q+9
 *                        a[1]: row g + 8, k = 2q, 2q+1        a[3]: row g + 8, k = 2q+8, 2q+9
 *   b (16 x 8, k x n)    b[0]: k = 2q, 2q+1, column g         b[1]: k = 2q+8, 2q+9, column g
 *   d (16 x 8, m x n)    d[0], d[1]: row g, columns 2q, 2q+1  d[2], d[3]: row g + 8, columns 2q, 2q+1
 *
 * Fragments of ldmatrix: the address that lane 8j + i gives is that of row i of matrix j: eight bf16, 16 bytes, aligned to
 * 16. Of each 8 x 8 matrix, lane l receives row g, columns 2q and 2q+1; from the transposed forms, column g, rows 2q and
 * 2q+1. x2 looks at the addresses of lanes 0 to 15 only. So with rows of m and columns of k in memory,
 *   ldmatrix_x4 with lane l giving (row l % 16, k = 8 (l / 16)) loads a whole a;
 *   ldmatrix_x2 with lane l giving (row n = l % 8, k = 8 (l / 8 % 2)) loads b from memory that is n x k;
 *   ldmatrix_x2_transposed with lane l giving (row k = l % 16, n = 0) loads b from memory that is k x n.
 *
 * An 8 x 8 matrix that a warp has in a register each, as ldmatrix gives it, is turned over by transposed.
 *
 * Every lane of a warp takes part in mma, ldmatrix and transposed.
 */
#ifndef RIVERRUN_CUDA_MMA_CUH
#define RIVERRUN_CUDA_MMA_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

/* --- pairs of bf16 in a register ---------------------------------------------------------------------------------- */

/* Rounded to nearest, even on a tie; `low` goes to the lower 16 bits. */
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ __forceinline__ float low_bf16(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float high_bf16(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

/* --- the instructions --------------------------------------------------------------------------------------------- */

#ifdef RIVERRUN_EMULATE
#include "test/emulation/mma.h"
#else

/* d += a b, added in fp32. */
__device__ __forceinline__ void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* d += a b with the first eight k only: a[0], a[1] and b[0] of the fragments above. */
__device__ __forceinline__ void mma_bf16_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

/* The address of shared memory as the instructions below take it. */
__device__ __forceinline__ uint32_t shared_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(shared)));
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&to)[2], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(shared)));
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&to)[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(shared)));
}

__device__ __forceinline__ void ldmatrix_x2_transposed(uint32_t (&to)[2], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(shared)));
}

/* Row g, columns 2q and 2q+1 of a matrix, for column g, rows 2q and 2q+1. */
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
    uint32_t to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
    return to;
}

/* Copy SIZE = 4, 8 or 16 bytes without waiting, both addresses aligned to them; only the first `bytes` are read, zeros
 * are written for the others. What is copied may be read after cp_async_wait by the thread that copied, and by others
 * behind a barrier after that. 16 bytes go past the L1 cache. */
template <int SIZE> __device__ __forceinline__ void cp_async(void *shared, const void *global, int bytes = SIZE) {
    static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16, "the sizes there are");
    if (SIZE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                     "n"(SIZE), "r"(bytes) : "memory");
}

/* 16 bytes likewise, or zeros: then nothing is read, wherever the address points. Cheaper than a count of bytes. */
__device__ __forceinline__ void cp_async_16_or_zeros(void *shared, const void *global, bool there) {
    asm volatile("{\n\t.reg .pred nothing;\n\tsetp.eq.s32 nothing, %2, 0;\n\t"
                 "cp.async.cg.shared.global [%0], [%1], 16, nothing;\n\t}" ::"r"(shared_address(shared)),
                 "l"(global), "r"((int)there) : "memory");
}

/* The same, and the whole 256 bytes about the address come into the L2 cache: for warps that read pieces of rows, whose
 * neighbours read the next pieces at about the same time. */
__device__ __forceinline__ void cp_async_16_or_zeros_of_row(void *shared, const void *global, bool there) {
    asm volatile("{\n\t.reg .pred nothing;\n\tsetp.eq.s32 nothing, %2, 0;\n\t"
                 "cp.async.cg.shared.global.L2::256B [%0], [%1], 16, nothing;\n\t}" ::"r"(shared_address(shared)),
                 "l"(global), "r"((int)there) : "memory");
}

/* The copies of this thread since its last commit become a group. */
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Wait until at most the N youngest groups of this thread are still on their way. */
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Bring the line of this address into the L2 cache; nothing waits for it. */
__device__ __forceinline__ void prefetch_line(const void *global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

/* 2^v to about two units in the last place; what would be subnormal is 0. */
__device__ __forceinline__ float power_of_two(float v) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}

/* 1 / v to about one unit in the last place; of what is beyond 2^126, 0. */
__device__ __forceinline__ float reciprocal(float v) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}

#endif

__device__ __forceinline__ void cp_async_16(void *shared, const void *global, int bytes = 16) {
    cp_async<16>(shared, global, bytes);
}

#endif
