/* misuse.cu: does the emulated GPU notice what it is there to notice? Each kernel below is wrong in one way; those that
 * must end the program do so in a child, whose message is looked at. Exit code 0: every mistake is noticed. */
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static int failures;

/* --- what must end the program ------------------------------------------------------------------------------------ */

__global__ void lane_astray(int *to) {
    if (threadIdx.x == 40) __syncthreads();
    else to[threadIdx.x] = __shfl_xor_sync(FULL, (int)threadIdx.x, 1);
}

__global__ void barrier_for_more(int *to) {
    __barrier_sync_count(1, 96);
    to[threadIdx.x] = 0;
}

__global__ void mask_without_caller(int *to) {
    to[threadIdx.x] = __shfl_sync(0xffffu, (int)threadIdx.x, 0);
}

__global__ void different_masks(int *to) {
    to[threadIdx.x] = __any_sync(threadIdx.x < 16 ? 0xffffu : FULL, 1);
    __syncthreads();
}

__global__ void product_without_a_lane(int *to) {
    float d[4] = {0};
    const uint32_t a[4] = {0}, b[2] = {0};
    if (threadIdx.x == 31) return;
    mma_bf16_m16n8k16(d, a, b);
    to[threadIdx.x] = (int)d[0];
}

__global__ void fragments_misaligned(int *to) {
    __shared__ __align__(16) char room[1024];
    uint32_t fragment[4];
    room[threadIdx.x] = 0;
    ldmatrix_x4(fragment, room + 16 * (threadIdx.x % 32) + 2);
    to[threadIdx.x] = (int)fragment[0];
}

__global__ void fragments_from_global(int *to) {
    uint32_t fragment[2];
    ldmatrix_x2(fragment, to);
    to[threadIdx.x] = (int)fragment[0];
}

__global__ void copy_beyond_dynamic(int *to) {
    DYNAMIC_SHARED(char, room);
    cp_async_16(room + 16 * threadIdx.x, to);
    cp_async_commit();
    cp_async_wait<0>();
}

__global__ void copy_not_committed(int *to) {
    __shared__ float room[64];
    cp_async<4>(room + threadIdx.x, to + threadIdx.x);
    cp_async_wait<0>();
}

__global__ void cluster_without_a_thread(int *to) {
    if (cluster_rank() == 1 && threadIdx.x == 0) __syncthreads();
    cluster_arrive();
    cluster_wait();
    to[threadIdx.x] = 0;
}

__global__ void cluster_wait_alone(int *) {
    cluster_wait();
}

__global__ void place_beyond_the_cluster(int *to) {
    DYNAMIC_SHARED(char, room);
    to[threadIdx.x] = (int)(place_in(room, cluster_blocks()) - room);
}

__global__ void flag_of_fewer_bytes(int *) {
    DYNAMIC_SHARED(char, room);
    uint64_t *flag = reinterpret_cast<uint64_t *>(room);
    if (threadIdx.x == 0) flag_open(flag), flag_expect(flag, 16);
    cluster_arrive();
    cluster_wait();
    unsigned other = 1 - cluster_rank();
    if (threadIdx.x == 0) send_8(place_in(room + 16, other), make_float2(0, 0), place_in(flag, other));
    flag_wait(flag, 0);
}

__global__ void flag_not_opened(int *) {
    DYNAMIC_SHARED(char, room);
    flag_wait(reinterpret_cast<uint64_t *>(room), 0);
}

static void must_end(const char *name, void (*kernel)(int *), const char *sentence, unsigned cluster = 1) {
    int ends[2], status = 0;
    char text[4096];
    size_t used = 0;
    fflush(NULL);
    if (pipe(ends) != 0) abort();
    pid_t child = fork();
    if (child == 0) {
        int *to;
        dup2(ends[1], 2);
        if (cudaMalloc(&to, 64 * sizeof *to) == cudaSuccess)
            emulation::launch_clusters(name, kernel, cluster, 64, cluster, 512, to);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n; used + 1 < sizeof text && (n = read(ends[0], text + used, sizeof text - 1 - used)) > 0;)
        used += (size_t)n;
    text[used] = 0;
    close(ends[0]);
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status) && strstr(text, name) && strstr(text, sentence)) return;
    failures++;
    fprintf(stderr, "misuse: %s ends with status %d and without '%s': %s\n", name, status, sentence, text);
}

/* --- what must be seen in the result ------------------------------------------------------------------------------ */

__global__ void unwritten_kernel(float *to) {
    __shared__ float plain[64];
    DYNAMIC_SHARED(float, dynamic);
    if (threadIdx.x == 0) plain[0] = dynamic[0] = 1; /* else the compiler knows what lies there */
    __syncthreads();
    to[threadIdx.x] = plain[threadIdx.x] + dynamic[threadIdx.x];
}

template <class T> __global__ void unwritten_template_kernel(T *to) {
    __shared__ T room[64];
    if (threadIdx.x == 0) room[0] = 1;
    __syncthreads();
    to[threadIdx.x] = room[threadIdx.x];
}

__global__ void copy_not_awaited_kernel(float *to) {
    __shared__ float room[64];
    cp_async<4>(room + threadIdx.x, to + threadIdx.x);
    cp_async_commit();
    cp_async_wait<1>();
    to[threadIdx.x] = room[threadIdx.x];
}

/* Neighbours' numbers, without the barrier between writing and reading them. */
__global__ void no_barrier_kernel(float *to) {
    __shared__ float room[64];
    room[threadIdx.x] = 1;
    to[threadIdx.x] = room[(threadIdx.x + 1) % 64] + room[(threadIdx.x + 32) % 64];
}

/* The first block's result, which the second needs and has no right to. */
__global__ void block_order_kernel(float *to) {
    if (blockIdx.x == 0) to[0] = 1;
    else to[63] = to[0];
}

/* How many of 64 results are NaN after two blocks of 64 threads, over memory that is NaN before. */
static int count_nan(const char *name, void (*kernel)(float *), const char *order) {
    float *to, host[64];
    int count = 0;
    setenv("RIVERRUN_EMULATE_ORDER", order, 1);
    if (cudaMalloc(&to, sizeof host) != cudaSuccess) abort();
    emulation::launch(name, kernel, 2, 64, 256, to);
    cudaMemcpy(host, to, sizeof host, cudaMemcpyDeviceToHost);
    cudaFree(to);
    for (float v : host) count += v != v;
    return count;
}

static void must_be_nan(const char *name, void (*kernel)(float *), const char *order, int least) {
    int count = count_nan(name, kernel, order);
    if (count >= least) return;
    failures++;
    fprintf(stderr, "misuse: %s, order %s: %d results are NaN, should be %d at least\n", name, order, count, least);
}

static void must_be_refused(const char *what, dim3 grid, dim3 block, size_t shared) {
    cudaGetLastError();
    emulation::launch("unwritten_kernel", unwritten_kernel, grid, block, shared, (float *)NULL);
    if (cudaGetLastError() != cudaSuccess) return;
    failures++;
    fprintf(stderr, "misuse: a launch with %s is not refused\n", what);
}

int main() {
    must_end("lane_astray", lane_astray, "wait for ever");
    must_end("barrier_for_more", barrier_for_more, "wait for ever");
    must_end("mask_without_caller", mask_without_caller, "lacks the lane that calls");
    must_end("different_masks", different_masks, "wait for ever");
    must_end("product_without_a_lane", product_without_a_lane, "needs all lanes");
    must_end("fragments_misaligned", fragments_misaligned, "not aligned to 16");
    must_end("fragments_from_global", fragments_from_global, "not shared");
    must_end("copy_beyond_dynamic", copy_beyond_dynamic, "not shared");
    must_end("copy_not_committed", copy_not_committed, "never committed");
    setenv("RIVERRUN_EMULATE_CHIP", "90", 1);
    must_end("cluster_without_a_thread", cluster_without_a_thread, "wait for ever", 2);
    must_end("cluster_wait_alone", cluster_wait_alone, "has not arrived", 2);
    must_end("place_beyond_the_cluster", place_beyond_the_cluster, "block 2 of a cluster of 2", 2);
    must_end("flag_of_fewer_bytes", flag_of_fewer_bytes, "wait for a flag", 2);
    must_end("flag_not_opened", flag_not_opened, "no flag", 2);
    must_be_nan("unwritten_kernel", unwritten_kernel, "forward", 63);
    must_be_nan("unwritten_template_kernel", unwritten_template_kernel<float>, "forward", 63);
    must_be_nan("copy_not_awaited_kernel", copy_not_awaited_kernel, "forward", 64);
    must_be_nan("no_barrier_kernel", no_barrier_kernel, "forward", 32);
    must_be_nan("no_barrier_kernel", no_barrier_kernel, "reverse", 32);
    must_be_nan("no_barrier_kernel", no_barrier_kernel, "1", 16);
    must_be_nan("block_order_kernel", block_order_kernel, "reverse", 63);
    must_be_refused("too many threads", 1, 1025, 0);
    must_be_refused("too large a grid", dim3(1, 65536), 32, 0);
    must_be_refused("more shared memory than was asked for", 1, 32, 64 << 10);
    if (failures == 0) printf("every mistake is noticed\n");
    return failures > 0;
}
