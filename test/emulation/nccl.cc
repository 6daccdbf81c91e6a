/* nccl.cc: see nccl.h. A group is a piece of shared memory: a counter of arrivals, which is the barrier, and room for a
 * piece of each rank's data. Every call goes piece by piece: put one's own there, wait for all, take what is one's due,
 * wait again. Sums are in rank order. Calls are submitted like kernels, so they can be captured and repeated. */
#include "nccl.h"
#include "dlfcn.h"

#include <atomic>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t PIECE = 1 << 16; /* bytes */

struct shared {
    std::atomic<uint64_t> arrivals;
    char data[];
};

struct emulated_group {
    int rank, ranks;
    size_t size;
    struct shared *shared;
};

static void meet(emulated_group *g) {
    uint64_t ranks = (uint64_t)g->ranks, number = g->shared->arrivals.fetch_add(1) / ranks;
    while (g->shared->arrivals.load() < (number + 1) * ranks) sched_yield();
}

static char *room_of(emulated_group *g, int rank) {
    return g->shared->data + (size_t)rank * PIECE;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int made;
    *id = {};
    snprintf(id->internal, sizeof id->internal, "/riverrun-emulated-%d-%d", (int)getpid(), made++);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclSystemError ? "no shared memory" : "invalid argument";
}

const char *ncclGetLastError(ncclComm_t) {
    return "";
}

ncclResult_t ncclCommInitRank(ncclComm_t *to, int ranks, ncclUniqueId id, int rank) {
    size_t size = sizeof(struct shared) + (size_t)ranks * PIECE;
    int file = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
    if (file < 0) return ncclSystemError;
    void *memory = ftruncate(file, (off_t)size) == 0 ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
                                                     : MAP_FAILED;
    close(file);
    if (memory == MAP_FAILED) return ncclSystemError;
    *to = new emulated_group{rank, ranks, size, (struct shared *)memory};
    meet(*to);
    if (rank == 0) shm_unlink(id.internal);
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t g) {
    munmap(g->shared, g->size);
    delete g;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *result) {
    *result = ncclSuccess;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    return ncclSuccess;
}

static size_t size_of(ncclDataType_t type) {
    return type == ncclFloat64 ? 8 : type == ncclFloat32 ? 4 : 2;
}

template <class T> static void add(T *to, const T *from, size_t count) {
    for (size_t i = 0; i < count; i++) to[i] += from[i];
}

/* Slice r of this rank's values goes to rank r, which adds what it gets; all slices but one's own are in turn. */
static void reduce_scatter(emulated_group *g, const char *from, char *to, size_t count, ncclDataType_t type) {
    size_t size = size_of(type), most = PIECE / size;
    for (int owner = 0; owner < g->ranks; owner++) {
        for (size_t at = 0; at < count; at += most) {
            size_t n = count - at < most ? count - at : most;
            memcpy(room_of(g, g->rank), from + ((size_t)owner * count + at) * size, n * size);
            meet(g);
            for (int r = 0; r < g->ranks && g->rank == owner; r++) {
                if (r == 0) memcpy(to + at * size, room_of(g, 0), n * size);
                else if (type == ncclFloat32) add((float *)(to + at * size), (const float *)room_of(g, r), n);
                else add((double *)(to + at * size), (const double *)room_of(g, r), n);
            }
            meet(g);
        }
    }
}

static void all_gather(emulated_group *g, const char *from, char *to, size_t bytes) {
    for (size_t at = 0; at < bytes; at += PIECE) {
        size_t n = bytes - at < PIECE ? bytes - at : PIECE;
        memcpy(room_of(g, g->rank), from + at, n);
        meet(g);
        for (int r = 0; r < g->ranks; r++) memcpy(to + (size_t)r * bytes + at, room_of(g, r), n);
        meet(g);
    }
}

ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation,
                               ncclComm_t group, cudaStream_t) {
    if (operation != ncclSum || type == ncclBfloat16) return ncclInvalidArgument;
    emulation::submit([=] { reduce_scatter(group, (const char *)from, (char *)to, count, type); });
    return ncclSuccess;
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t group,
                           cudaStream_t) {
    emulation::submit([=] { all_gather(group, (const char *)from, (char *)to, count * size_of(type)); });
    return ncclSuccess;
}

const struct emulated_function emulated_nccl[] = {
#define FUNCTION(name) {#name, (void *)name}
    FUNCTION(ncclGetUniqueId), FUNCTION(ncclGetErrorString), FUNCTION(ncclGetLastError), FUNCTION(ncclCommInitRank),
    FUNCTION(ncclCommDestroy), FUNCTION(ncclCommGetAsyncError), FUNCTION(ncclGroupStart), FUNCTION(ncclGroupEnd),
    FUNCTION(ncclReduceScatter), FUNCTION(ncclAllGather),
#undef FUNCTION
    {NULL, NULL},
};
