/* cluster.cuh: clusters of blocks, from sm_90 on: up to 8 blocks (16 where the chip allows more than the portable
 * number) that run at the same time on neighbouring multiprocessors and write into each other's shared memory. Behind
 * functions of their own like the instructions of mma.cuh, so that test/emulation can stand in for them.
 *
 * A flag is what a block waits at for data from others. It lies in shared memory, goes up when the bytes that it was
 * told to expect have come, and with that is down again for the next ones: so a wait names the parity of the time, 0
 * for the first, third, ... Bytes may come before they are expected, but not before the flag went up the time before.
 * What came may be read by whoever waited; no barrier is needed, nor a fence.
 *
 * A kernel of clusters keeps all its shared memory dynamic, the same layout in every block.
 */
#ifndef RIVERRUN_CUDA_CLUSTER_CUH
#define RIVERRUN_CUDA_CLUSTER_CUH

#include "kernels/cuda/launch.cuh"

/* Kernels of clusters have no body in code for chips that lack them. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define WITHOUT_CLUSTERS
#endif

#ifdef RIVERRUN_EMULATE
#include "test/emulation/cluster.h"
#else

/* A place in the shared memory of some block of the cluster; offsets are bytes. */
typedef uint32_t cluster_place;

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ unsigned cluster_blocks() {
    unsigned blocks;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}

/* The place in block `rank` that corresponds to this one of the block's own. */
__device__ __forceinline__ cluster_place place_in(const void *shared, unsigned rank) {
    cluster_place place;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(place) : "r"(shared_address(shared)), "r"(rank));
    return place;
}

/* The barrier of all threads of the cluster, in two halves; what was written before the first is seen after the
 * second. */
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* By one thread; then flags_opened by it, and the cluster's barrier before anybody sends. */
__device__ __forceinline__ void flag_open(uint64_t *flag) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(flag)) : "memory");
}

__device__ __forceinline__ void flags_opened() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* By one thread, once each time. */
__device__ __forceinline__ void flag_expect(uint64_t *flag, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(flag)), "r"(bytes)
                : "memory");
}

__device__ __forceinline__ void flag_wait(uint64_t *flag, unsigned parity) {
    asm volatile("{\n\t.reg .pred up;\n\t"
                "AGAIN:\n\t"
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 up, [%0], %1;\n\t"
                "@up bra DONE;\n\t"
                "bra AGAIN;\n\t"
                "DONE:\n\t}" ::"r"(shared_address(flag)), "r"(parity)
                : "memory");
}

/* Send bytes to a place of any block, its own too; the flag lies in the same block. Aligned to what is sent. */
__device__ __forceinline__ void send_16(cluster_place to, uint4 v, cluster_place flag) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
                "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(flag)
                : "memory");
}

__device__ __forceinline__ void send_8(cluster_place to, float2 v, cluster_place flag) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(to),
                "f"(v.x), "f"(v.y), "r"(flag)
                : "memory");
}

/* Launch clusters of `cluster` blocks, neighbours along x. */
template <class... P, class... A>
static inline cudaError_t start_clusters(cudaStream_t stream, void (*kernel)(P...), dim3 grid, dim3 block,
                                         unsigned cluster, size_t shared, A... arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute size = {};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster, size.val.clusterDim.y = 1, size.val.clusterDim.z = 1;
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &size, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

#define START_CLUSTERS(kernel, grid, block, cluster, shared, stream, ...)                                              \
    (void)start_clusters((stream), (kernel), (grid), (block), (cluster), (shared), __VA_ARGS__)
#endif

#define LAUNCH_CLUSTERS(dev, kernel, grid, block, cluster, shared, ...)                                                \
    do {                                                                                                               \
        START_CLUSTERS(kernel, (grid), (block), (cluster), (shared), cuda_impl(dev)->stream, __VA_ARGS__);             \
        cuda_expect((dev), cudaPeekAtLastError(), #kernel);                                                            \
    } while (0)

/* Can this GPU run the kernel in clusters of so many blocks, at least one at a time? Prepares the kernel for it. The
 * code may have been made for an older chip, and a chip may lack a group of multiprocessors that is large enough. */
template <class... P>
static inline bool clusters_fit(void (*kernel)(P...), unsigned threads, unsigned cluster, size_t shared) {
    cudaFuncAttributes code;
    if (cudaFuncGetAttributes(&code, kernel) != cudaSuccess || code.ptxVersion < 90) return false;
    bool fits = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared) == cudaSuccess;
    if (cluster > 8)
        fits = fits && cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
#ifndef RIVERRUN_EMULATE
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute size = {};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster, size.val.clusterDim.y = 1, size.val.clusterDim.z = 1;
    config.gridDim = dim3(cluster), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
    config.attrs = &size, config.numAttrs = 1;
    int at_once = 0;
    fits = fits && cudaOccupancyMaxActiveClusters(&at_once, kernel, &config) == cudaSuccess && at_once > 0;
#endif
    (void)threads;
    if (!fits) cudaGetLastError(); /* no failure of later launches */
    return fits;
}

#endif
