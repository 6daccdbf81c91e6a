/* comm_nccl.cu: the calls of train/comm.h on the memory of GPUs, by NCCL. The library is loaded when a second rank asks
 * for it and not before.
 *
 * All communication goes through one stream of high priority beside the device's own, so that its few blocks get in
 * between those of large kernels. Two events a slot order the streams: `begun` lets communication wait for what the
 * device was given so far, `done` lets the device wait for the communication. Fork and join are events, and NCCL's
 * calls may be captured, so all of it can be recorded within a step:
 *
 *   device         ... backward of block 3 |begun 3| backward of block 2 |begun 2| ...        |done 0| update
 *   communication                              [reduce-scatter 3]   [reduce-scatter 2]  ...
 *
 * Bytes, S the length of the flat gradients, n ranks: reduce-scatter 4S (n-1)/n, all-gather 2S (n-1)/n (bf16) out of
 * and into each GPU in a step. At 300 GB/s and n = 2: 129 M parameters 0.86 + 0.43 ms, 1.34 G parameters 8.9 + 4.5 ms.
 *
 * Reproducibility: NCCL adds in an order that number of ranks, sizes and topology fix; the totals of a step, by which
 * all ranks decide, are gathered and added here in rank order, so they have the same bits everywhere.
 *
 * For the watchdog, a kernel of one thread before each call writes to pinned host memory which it is.
 */
extern "C" {
#include "train/comm_internal.h"
}
#include "kernels/cuda/launch.cuh"

#include <dlfcn.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NCCL_FUNCTIONS(F)                                                                                              \
    F(ncclGetUniqueId)                                                                                                 \
    F(ncclGetErrorString)                                                                                              \
    F(ncclGetLastError)                                                                                                \
    F(ncclCommInitRank)                                                                                                \
    F(ncclCommDestroy)                                                                                                 \
    F(ncclCommGetAsyncError)                                                                                           \
    F(ncclGroupStart)                                                                                                  \
    F(ncclGroupEnd)                                                                                                    \
    F(ncclReduceScatter)                                                                                               \
    F(ncclAllGather)

/* The library's functions under their own names. One for the process, filled by comm_nccl_load. */
static struct {
    void *file;
#define NCCL_MEMBER(name) decltype(&::name) name;
    NCCL_FUNCTIONS(NCCL_MEMBER)
#undef NCCL_MEMBER
} library;

enum operation { OPERATION_NONE, REDUCE_SCATTER, ALL_GATHER, SUM };

/* What the communication's stream has come to; pinned host memory that the GPU writes. */
struct seen {
    volatile unsigned long long count;
    volatile int operation, slot;
};

struct nccl {
    struct device *dev;
    ncclComm_t world;
    cudaStream_t stream;
    int slots;
    cudaEvent_t *begun, *done; /* one a slot, then one for sums */
    double *sums;              /* ranks * COMM_SUMS */
    struct seen *seen;
};

static struct nccl *nccl_of(struct comm *c) {
    return (struct nccl *)c->device_impl;
}

static void describe(char *out, size_t size, int operation, int slot) {
    if (operation == REDUCE_SCATTER) snprintf(out, size, "the reduce-scatter of gradients, load %d", slot);
    else if (operation == ALL_GATHER) snprintf(out, size, "the all-gather of weights, load %d", slot);
    else snprintf(out, size, "%s", operation == SUM ? "the sum of a step's totals" : "");
}

static void describe_failure(char *out, size_t size, ncclResult_t result) {
    const char *last = library.ncclGetLastError(NULL);
    snprintf(out, size, "NCCL: %s%s%s", library.ncclGetErrorString(result), last && last[0] ? ": " : "",
             last ? last : "");
    for (char *at = out; *at; at++)
        if (*at == '\n') *at = ' ';
}

/* ---- the calls --------------------------------------------------------------------------------------------------- */

__global__ void note_kernel(struct seen *seen, int operation, int slot) {
    seen->operation = operation;
    seen->slot = slot;
    seen->count = seen->count + 1;
}

/* values[i] = all[0][i] + all[1][i] + ... in this order; a thread a value. */
__global__ void add_ranks_kernel(double *values, const double *all, int ranks, int count) {
    int i = threadIdx.x;
    if (i >= count) return;
    double sum = all[i];
    for (int r = 1; r < ranks; r++) sum += all[r * count + i];
    values[i] = sum;
}

static void expect(struct comm *c, enum operation operation, int slot, ncclResult_t result) {
    char name[80], why[512];
    if (result == ncclSuccess) return;
    describe(name, sizeof name, operation, slot);
    describe_failure(why, sizeof why, result);
    comm_fail(c, name, why);
}

static void begin(struct comm *c, enum operation operation, int slot) {
    struct nccl *n = nccl_of(c);
    ASSERT(slot >= 0 && slot <= n->slots);
    cuda_expect(n->dev, cudaEventRecord(n->begun[slot], cuda_impl(n->dev)->stream), "an event before communication");
    cuda_expect(n->dev, cudaStreamWaitEvent(n->stream, n->begun[slot], 0), "communication's wait for the device");
    START_KERNEL(note_kernel, dim3(1), dim3(1), 0, n->stream, n->seen, (int)operation, slot);
    expect(c, operation, slot, library.ncclGroupStart());
}

static void end(struct comm *c, enum operation operation, int slot) {
    struct nccl *n = nccl_of(c);
    expect(c, operation, slot, library.ncclGroupEnd());
    cuda_expect(n->dev, cudaEventRecord(n->done[slot], n->stream), "an event behind communication");
}

static ncclDataType_t type_of(enum dtype dtype) {
    ASSERT(dtype == DTYPE_F32 || dtype == DTYPE_F64 || dtype == DTYPE_BF16);
    return dtype == DTYPE_F32 ? ncclFloat32 : dtype == DTYPE_F64 ? ncclFloat64 : ncclBfloat16;
}

static char *slice_of(const struct comm_piece *p, int rank) {
    return (char *)p->buffer + (size_t)(rank * p->count) * dtype_size(p->dtype);
}

static void nccl_reduce_scatter(struct comm *c, int slot, const struct comm_piece *pieces, int count) {
    struct nccl *n = nccl_of(c);
    begin(c, REDUCE_SCATTER, slot);
    for (int i = 0; i < count; i++) {
        const struct comm_piece *p = &pieces[i];
        expect(c, REDUCE_SCATTER, slot,
               library.ncclReduceScatter(p->buffer, slice_of(p, c->rank), (size_t)p->count, type_of(p->dtype), ncclSum,
                                         n->world, n->stream));
    }
    end(c, REDUCE_SCATTER, slot);
}

static void nccl_all_gather(struct comm *c, int slot, const struct comm_piece *pieces, int count) {
    struct nccl *n = nccl_of(c);
    begin(c, ALL_GATHER, slot);
    for (int i = 0; i < count; i++) {
        const struct comm_piece *p = &pieces[i];
        expect(c, ALL_GATHER, slot,
               library.ncclAllGather(slice_of(p, c->rank), p->buffer, (size_t)p->count, type_of(p->dtype), n->world,
                                     n->stream));
    }
    end(c, ALL_GATHER, slot);
}

static void nccl_wait(struct comm *c, int slot) {
    struct nccl *n = nccl_of(c);
    cuda_expect(n->dev, cudaStreamWaitEvent(cuda_impl(n->dev)->stream, n->done[slot], 0), "a wait for communication");
}

static void nccl_sum_f64(struct comm *c, double *values, int count) {
    struct nccl *n = nccl_of(c);
    int slot = n->slots;
    begin(c, SUM, slot);
    expect(c, SUM, slot, library.ncclAllGather(values, n->sums, (size_t)count, ncclFloat64, n->world, n->stream));
    end(c, SUM, slot);
    nccl_wait(c, slot);
    LAUNCH(n->dev, add_ranks_kernel, 1, COMM_SUMS, 0, values, n->sums, c->ranks, count);
}

static bool nccl_look(struct comm *c, uint64_t *progress, char *operation, size_t operation_size, char *text,
                      size_t size) {
    struct nccl *n = nccl_of(c);
    ncclResult_t result = ncclSuccess;
    *progress = n->seen->count;
    describe(operation, operation_size, n->seen->operation, n->seen->slot);
    if (library.ncclCommGetAsyncError(n->world, &result) != ncclSuccess) return false;
    if (result == ncclSuccess || result == ncclInProgress) return false;
    describe_failure(text, size, result);
    return true;
}

/* ---- opening ----------------------------------------------------------------------------------------------------- */

static void release(struct nccl *n) {
    for (int i = 0; n->begun && i <= n->slots; i++)
        if (n->begun[i]) cudaEventDestroy(n->begun[i]);
    for (int i = 0; n->done && i <= n->slots; i++)
        if (n->done[i]) cudaEventDestroy(n->done[i]);
    if (n->stream) cudaStreamDestroy(n->stream);
    cudaFree(n->sums);
    cudaFreeHost(n->seen);
    free(n->begun);
    free(n->done);
    free(n);
}

static void nccl_detach(struct comm *c) {
    struct nccl *n = nccl_of(c);
    cudaStreamSynchronize(cuda_impl(n->dev)->stream);
    cudaStreamSynchronize(n->stream);
    library.ncclCommDestroy(n->world);
    release(n);
    c->device_impl = NULL;
}

static const struct comm_device nccl_functions = {
    .detach = nccl_detach,
    .reduce_scatter = nccl_reduce_scatter,
    .all_gather = nccl_all_gather,
    .wait = nccl_wait,
    .sum_f64 = nccl_sum_f64,
    .look = nccl_look,
};

extern "C" int comm_nccl_load(error *err) {
    static const char name[] = "libnccl.so.2";
    if (library.file) return 0;
    void *handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return error_system(err,
                            "GPUs talk to each other by NVIDIA's %s, which can't be loaded here (%s): install NCCL, "
                                 "or start one process", name, dlerror());
#define NCCL_FIND(function)                                                                                            \
    library.function = (decltype(library.function))dlsym(handle, #function);                                           \
    if (!library.function) return error_system(err, "%s lacks the function %s: it is too old", name, #function);
    NCCL_FUNCTIONS(NCCL_FIND)
#undef NCCL_FIND
    library.file = handle;
    return 0;
}

extern "C" int comm_nccl_name(char name[COMM_NCCL_NAME], error *err) {
    ncclUniqueId id;
    char why[512];
    static_assert(sizeof id == COMM_NCCL_NAME, "NCCL's identity of a group");
    ncclResult_t result = library.ncclGetUniqueId(&id);
    if (result == ncclSuccess) {
        memcpy(name, &id, sizeof id);
        return 0;
    }
    describe_failure(why, sizeof why, result);
    return error_system(err, "%s", why);
}

static cudaError_t allocate(struct nccl *n, int ranks) {
    int least, greatest;
    cudaError_t result = cudaDeviceGetStreamPriorityRange(&least, &greatest);
    if (result == cudaSuccess) result = cudaStreamCreateWithPriority(&n->stream, cudaStreamNonBlocking, greatest);
    for (int i = 0; i <= n->slots && result == cudaSuccess; i++) {
        result = cudaEventCreateWithFlags(&n->begun[i], cudaEventDisableTiming);
        if (result == cudaSuccess) result = cudaEventCreateWithFlags(&n->done[i], cudaEventDisableTiming);
    }
    if (result == cudaSuccess) result = cudaMalloc((void **)&n->sums, (size_t)ranks * COMM_SUMS * sizeof *n->sums);
    if (result == cudaSuccess) result = cudaMallocHost((void **)&n->seen, sizeof *n->seen);
    if (result == cudaSuccess) memset((void *)n->seen, 0, sizeof *n->seen);
    return result;
}

extern "C" int comm_nccl_open(struct comm *c, const struct comm_device **table, struct device *dev, int slots,
                              const char name[COMM_NCCL_NAME], error *err) {
    char why[512];
    ncclUniqueId id;
    memcpy(&id, name, sizeof id);
    struct nccl *n = (struct nccl *)calloc(1, sizeof *n);
    if (!n) comm_fail(c, "NCCL's start", "no memory");
    n->dev = dev;
    n->slots = slots;
    n->begun = (cudaEvent_t *)calloc((size_t)slots + 1, sizeof *n->begun);
    n->done = (cudaEvent_t *)calloc((size_t)slots + 1, sizeof *n->done);
    if (!n->begun || !n->done) comm_fail(c, "NCCL's start", "no memory");
    cudaError_t allocated = allocate(n, c->ranks);
    if (allocated != cudaSuccess) comm_fail(c, "NCCL's start", cudaGetErrorString(allocated));
    ncclResult_t result = library.ncclCommInitRank(&n->world, c->ranks, id, c->rank);
    if (result != ncclSuccess) {
        describe_failure(why, sizeof why, result);
        release(n);
        return error_system(err, "%s", why);
    }
    c->device_impl = n;
    *table = &nccl_functions;
    return 0;
}
