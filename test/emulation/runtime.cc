/* runtime.cc: see cuda_runtime.h. The device has few multiprocessors, so that kernels which give each of them
 * several pieces of work do so for small problems, too; RIVERRUN_EMULATE_PROCESSORS=N sets their number. It calls
 * itself sm_80, or what RIVERRUN_EMULATE_CHIP says, and has that chip's shared memory. */
#include "cuda_runtime.h"

#include <map>
#include <set>
#include <time.h>
#include <unistd.h>
#include <vector>

/* Work that goes beside that of another stream is put off until its own stream waits for the other, as late as a GPU may
 * do it: if its operands do not last so long, the tests see it. */
struct emulated_stream {
    std::vector<std::function<void()>> put_off;
};

struct emulated_event {
    struct timespec at;
};

struct emulated_graph {
    std::vector<std::function<void()>> work;
    int uses; /* the graph and what was instantiated from it */
};

enum { SHARED_USUAL = 48 << 10, THREADS_MOST = 1024 };

static cudaError_t last_error;
static emulated_graph *captured; /* NULL: nothing is being captured */
static size_t allocated;
static const size_t TOTAL = (size_t)8 << 30;

/* Dynamic shared memory that a kernel was allowed. */
static std::map<const void *, int> &allowances() {
    static std::map<const void *, int> all;
    return all;
}

/* Kernels that were allowed clusters of more than CLUSTER_PORTABLE blocks. */
static std::set<const void *> &wide_clusters() {
    static std::set<const void *> all;
    return all;
}

/* Chips by ten times their compute capability: shared memory that a block gets if it asks, and the code they run of a
 * binary for sm_80, sm_90a and PTX of compute_80, as their driver tells it. */
struct emulated_chip {
    int capability, shared_most, binary, ptx;
};

static emulated_chip chip() {
    static const emulated_chip chips[] = {{80, 163 << 10, 80, 80}, {86, 99 << 10, 80, 80},
                                          {89, 99 << 10, 80, 80},  {90, 227 << 10, 90, 90},
                                          {100, 227 << 10, 100, 80}, {120, 99 << 10, 120, 80}};
    const char *wish = getenv("RIVERRUN_EMULATE_CHIP");
    for (const emulated_chip &c : chips)
        if (wish && atoi(wish) == c.capability) return c;
    return chips[0];
}

static cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    }
    return "unknown error";
}

const char *cudaGetErrorName(cudaError_t error) {
    return cudaGetErrorString(error);
}

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() {
    return last_error;
}

namespace emulation {

bool launch_allowed(const void *kernel, dim3 grid, dim3 block, unsigned cluster, size_t dynamic) {
    std::map<const void *, int>::iterator found = allowances().find(kernel);
    size_t most = found == allowances().end() ? (size_t)SHARED_USUAL : (size_t)found->second;
    bool blocks_fit = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
                      grid.z <= 65535;
    bool threads_fit = block.x > 0 && block.y > 0 && block.z > 0 && block.z <= 64 &&
                       (size_t)block.x * block.y * block.z <= THREADS_MOST;
    unsigned cluster_most = wide_clusters().count(kernel) ? CLUSTER_MOST : CLUSTER_PORTABLE;
    if (chip().capability < 90) cluster_most = 1;
    bool clusters_fit = cluster >= 1 && cluster <= cluster_most && grid.x % cluster == 0;
    if (!blocks_fit || !threads_fit || !clusters_fit) result(cudaErrorInvalidConfiguration);
    else if (dynamic > most) result(cudaErrorInvalidValue);
    else return true;
    return false;
}

void submit(std::function<void()> work) {
    if (captured) captured->work.push_back(work);
    else work();
}

void submit_beside(cudaStream_t stream, std::function<void()> work) {
    stream->put_off.push_back(work);
}

static void catch_up(cudaStream_t stream) {
    std::vector<std::function<void()>> work;
    work.swap(stream->put_off);
    for (const std::function<void()> &w : work) submit(w);
}

} // namespace emulation

using emulation::submit;

/* --- the device --------------------------------------------------------------------------------------------------- */

static int processors() {
    const char *wish = getenv("RIVERRUN_EMULATE_PROCESSORS");
    int number = wish ? atoi(wish) : 0;
    return number > 0 ? number : 4;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return result(device == 0 ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *to, int device) {
    if (device != 0) return result(cudaErrorInvalidValue);
    *to = {};
    snprintf(to->name, sizeof to->name, "emulated GPU");
    to->totalGlobalMem = TOTAL;
    to->sharedMemPerBlock = SHARED_USUAL;
    to->sharedMemPerBlockOptin = (size_t)chip().shared_most;
    to->sharedMemPerMultiprocessor = (size_t)chip().shared_most + 1024;
    to->major = chip().capability / 10, to->minor = chip().capability % 10;
    snprintf(to->uuid.bytes, sizeof to->uuid.bytes, "%d", (int)getpid()); /* each process has a device of its own */
    to->multiProcessorCount = processors();
    to->warpSize = emulation::WARP_LANES;
    to->maxThreadsPerBlock = THREADS_MOST;
    to->maxThreadsPerMultiProcessor = 2048;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *to, enum cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error != cudaSuccess) return error;
    switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *to = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMultiProcessorCount: *to = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *to = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *to = p.minor; break;
    }
    return cudaSuccess;
}

/* Waiting for a stream while something is captured is an error on a GPU. */
static cudaError_t wait_for_all() {
    return result(captured ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}

cudaError_t cudaDeviceSynchronize() {
    return wait_for_all();
}

cudaError_t cudaDeviceReset() {
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    return cudaRuntimeGetVersion(version);
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = TOTAL;
    *free = TOTAL - allocated;
    return cudaSuccess;
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

static std::map<void *, size_t> &blocks() {
    static std::map<void *, size_t> all;
    return all;
}

/* Filled with NaN: nothing may depend on what lies in new memory. */
cudaError_t cudaMalloc(void **to, size_t size) {
    *to = NULL;
    if (size == 0) return cudaSuccess;
    if (captured) return result(cudaErrorStreamCaptureUnsupported);
    if (size > TOTAL - allocated || posix_memalign(to, 256, size) != 0) return result(cudaErrorMemoryAllocation);
    memset(*to, 0xff, size);
    blocks()[*to] = size;
    allocated += size;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    if (!memory) return cudaSuccess;
    std::map<void *, size_t>::iterator found = blocks().find(memory);
    if (found == blocks().end()) return result(cudaErrorInvalidValue);
    allocated -= found->second;
    blocks().erase(found);
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **to, size_t size) {
    *to = NULL;
    return result(posix_memalign(to, 256, size ? size : 1) == 0 ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaHostAlloc(void **to, size_t size, unsigned) {
    return cudaMallocHost(to, size);
}

cudaError_t cudaFreeHost(void *memory) {
    free(memory);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind, cudaStream_t) {
    submit([=] { memmove(to, from, size); });
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    cudaError_t error = wait_for_all();
    return error == cudaSuccess ? cudaMemcpyAsync(to, from, size, kind) : error;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind, cudaStream_t) {
    if (to_pitch < width || from_pitch < width) return result(cudaErrorInvalidValue);
    submit([=] {
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t) {
    submit([=] { memset(to, value, size); });
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size) {
    return cudaMemsetAsync(to, value, size);
}

cudaError_t cudaMemset2DAsync(void *to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    if (pitch < width) return result(cudaErrorInvalidValue);
    submit([=] {
        for (size_t i = 0; i < height; i++) memset((char *)to + i * pitch, value, width);
    });
    return cudaSuccess;
}

/* --- streams and events ------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreate(cudaStream_t *to) {
    *to = new emulated_stream();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *to, unsigned) {
    return cudaStreamCreate(to);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *to, unsigned, int) {
    return cudaStreamCreate(to);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream->put_off.empty()) emulation::misuse("a stream is destroyed whose work nobody has waited for");
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return wait_for_all();
}

cudaError_t cudaStreamQuery(cudaStream_t) {
    return wait_for_all();
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
    if (stream) emulation::catch_up(stream);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
    submit([=] { function(data); });
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *to) {
    *to = new emulated_event();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *to, unsigned) {
    return cudaEventCreate(to);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    clock_gettime(CLOCK_MONOTONIC, &event->at);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return wait_for_all();
}

cudaError_t cudaEventQuery(cudaEvent_t) {
    return wait_for_all();
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = (float)((double)(to->at.tv_sec - from->at.tv_sec) * 1e3 +
                            (double)(to->at.tv_nsec - from->at.tv_nsec) * 1e-6);
    return cudaSuccess;
}

/* --- graphs ------------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamBeginCapture(cudaStream_t, enum cudaStreamCaptureMode) {
    if (captured) return result(cudaErrorStreamCaptureUnsupported);
    captured = new emulated_graph();
    captured->uses = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *to) {
    *to = captured;
    captured = NULL;
    return result(*to ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, enum cudaStreamCaptureStatus *status) {
    *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *to, cudaGraph_t graph, unsigned long long) {
    graph->uses++;
    *to = graph;
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    for (const std::function<void()> &work : graph->work) submit(work);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    if (--graph->uses == 0) delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    return cudaGraphDestroy(graph);
}

/* --- kernels ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *to, const void *) {
    *to = {};
    to->maxThreadsPerBlock = THREADS_MOST;
    to->maxDynamicSharedSizeBytes = SHARED_USUAL;
    to->ptxVersion = chip().ptx, to->binaryVersion = chip().binary;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed && value) wide_clusters().insert(kernel);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > chip().shared_most) return result(cudaErrorInvalidValue);
    allowances()[kernel] = value;
    return cudaSuccess;
}
