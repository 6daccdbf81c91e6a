/* record.cu: work that is recorded once and replayed, as CUDA graphs, and ranges for a profiler. Called through
 * kernels/device.c.
 *
 * The first time the work runs as it is: that loads the code of its kernels, which may not happen while a stream is
 * captured, and makes the plans of its products. The second time it is captured, in the mode that leaves other threads
 * alone, and replayed from then on. A capture that fails is told in one line, and the work goes on as single launches:
 * it gives the same bits, more slowly.
 */
#include "kernels/cuda/launch.cuh"

#include <stdio.h>
#include <stdlib.h>

#if !defined(RIVERRUN_EMULATE) && __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define RANGES 1
#endif

struct device_record {
    int runs;    /* so far, 2 at most */
    bool direct; /* it could not be recorded */
    cudaGraphExec_t graph;
};

static cudaError_t record(struct device *dev, struct device_record *r, void (*work)(void *self), void *self) {
    cudaStream_t stream = cuda_impl(dev)->stream;
    cudaGraph_t graph = NULL;
    cudaError_t result = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    if (result != cudaSuccess) return result;
    work(self);
    result = cudaStreamEndCapture(stream, &graph);
    if (result == cudaSuccess) result = cudaGraphInstantiate(&r->graph, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    return result;
}

static void replay(struct device *dev, struct device_record *r) {
    cuda_expect(dev, cudaGraphLaunch(r->graph, cuda_impl(dev)->stream), "replaying recorded work");
}

static void discard(struct device_record *r) {
    if (r->graph) cudaGraphExecDestroy(r->graph);
}

/* Record the work; a failure in it is that of the recording, not of the device. */
static void try_record(struct device *dev, struct device_record *r, void (*work)(void *self), void *self) {
    struct cuda_device *c = cuda_impl(dev);
    bool failed = c->failed;
    cudaError_t result = record(dev, r, work, self);
    cuda_device_memory(dev);
    if (result == cudaSuccess && c->failed == failed) return;
    cudaGetLastError();
    fprintf(stderr, "riverrun: the GPU's work can't be recorded (%s); it goes on in single launches, more slowly\n",
            c->failed && !failed ? c->failure : cudaGetErrorString(result));
    c->failed = failed;
    discard(r);
    r->graph = NULL;
    r->direct = true;
}

extern "C" void cuda_device_run(struct device *dev, struct device_record **place, void (*work)(void *self),
                                void *self) {
    if (!*place && !dev->direct) *place = (struct device_record *)calloc(1, sizeof **place);
    struct device_record *r = *place;
    if (r && r->runs == 1 && !r->direct) try_record(dev, r, work, self);
    if (r && r->runs < 2) r->runs++;
    if (r && r->runs == 2 && !r->direct)
        replay(dev, r);
    else
        work(self);
}

extern "C" void cuda_device_record_close(struct device *dev, struct device_record *r) {
    if (!r) return;
    cudaStreamSynchronize(cuda_impl(dev)->stream);
    discard(r);
    free(r);
}

extern "C" void cuda_device_range_push(struct device *dev, const char *name) {
    (void)dev, (void)name;
#ifdef RANGES
    nvtxRangePushA(name);
#endif
}

extern "C" void cuda_device_range_pop(struct device *dev) {
    (void)dev;
#ifdef RANGES
    nvtxRangePop();
#endif
}
