/* device.cu: opening a GPU, its memory, and moving bytes to and from it. One stream carries everything, so what is
 * submitted runs in order; reading waits for it. (Work that may go beside other work is forked from it and joined to it
 * again: beside.cu, rat_fold.cu.) Called through kernels/device.c. */
#include "kernels/cuda/shared.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLAS_WORKSPACE = 32 << 20 };

void cuda_keep_failure(struct device *dev, const char *what, const char *why) {
    struct cuda_device *c = cuda_impl(dev);
    if (c->failed) return;
    c->failed = true;
    snprintf(c->failure, sizeof c->failure, "%s: %s", what, why);
}

/* RIVERRUN_SHARED=99 in the environment: as on a chip that gives a block so many KB. */
size_t cuda_shared_most(struct device *dev) {
    const char *wanted = getenv("RIVERRUN_SHARED");
    int most = 0, told = wanted ? atoi(wanted) << 10 : 0;
    cuda_expect(dev, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda_impl(dev)->index),
                "the GPU's shared memory");
    return (size_t)(told > 0 && told < most ? told : most);
}

void cuda_allow_shared(struct device *dev, const void *kernel, size_t bytes, const char *what) {
    size_t most = cuda_shared_most(dev);
    cudaError_t result = cudaErrorInvalidValue;
    char why[128];
    if (bytes <= most)
        result = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (result == cudaSuccess) return;
    snprintf(why, sizeof why, "a block needs %zu bytes of shared memory, and gets %zu at most on this GPU (%s)", bytes,
             most, cudaGetErrorString(result));
    cuda_keep_failure(dev, what, why);
}

static void *memory_allocate(void *self, size_t size) {
    struct device *dev = (struct device *)self;
    void *block = NULL;
    if (cudaMalloc(&block, size ? size : 1) != cudaSuccess) {
        cudaGetLastError(); /* the caller reports it; it is no failure of later launches */
        return NULL;
    }
    cuda_expect(dev, cudaMemsetAsync(block, 0, size, cuda_impl(dev)->stream), "clearing memory");
    cuda_device_memory(dev);
    return block;
}

static void memory_release(void *self, void *block) {
    struct device *dev = (struct device *)self;
    cudaStreamSynchronize(cuda_impl(dev)->stream);
    cudaFree(block);
}

/* Pinned: copies from it need no staging. */
static void *host_allocate(void *self, size_t size) {
    (void)self;
    void *block = NULL;
    if (cudaMallocHost(&block, size ? size : 1) != cudaSuccess) {
        cudaGetLastError();
        return NULL;
    }
    memset(block, 0, size);
    return block;
}

static void host_release(void *self, void *block) {
    (void)self;
    cudaFreeHost(block);
}

/* Is there code in this binary that this GPU can run? */
__global__ void probe_kernel() {}

static int check_device(int *index, error *err) {
    int count = 0;
    cudaError_t found = cudaGetDeviceCount(&count);
    if (found != cudaSuccess || count == 0)
        return error_input(err,
                           "device cuda asks for an NVIDIA GPU and this machine offers none (%s): choose device cpu",
                           found != cudaSuccess ? cudaGetErrorString(found) : "no device");
    *index %= count;
    cudaError_t chosen = cudaSetDevice(*index);
    if (chosen != cudaSuccess) return error_system(err, "choosing GPU %d: %s", *index, cudaGetErrorString(chosen));
    cudaFuncAttributes attributes;
    cudaError_t runs = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (runs != cudaSuccess) {
        cudaGetLastError();
        return error_input(err, "this riverrun has no code for the GPU here (%s): build it on this machine, or with "
                                "CUDA_ARCH=", cudaGetErrorString(runs));
    }
    return 0;
}

size_t cuda_device_present(void) {
    int count = 0;
    cudaDeviceProp properties;
    bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    if (found && cudaGetDeviceProperties(&properties, 0) == cudaSuccess) return properties.totalGlobalMem;
    cudaGetLastError();
    return 0;
}

static int open_blas(struct cuda_device *c, error *err) {
    TRY(cublas_load(&c->library, err));
    cublasStatus_t status = c->library.cublasLtCreate(&c->blas);
    if (status == CUBLAS_STATUS_SUCCESS) return 0;
    return error_system(err, "opening cuBLASLt: %s", c->library.cublasLtGetStatusString(status));
}

int cuda_transfer_open(struct cuda_device *c, error *err);
void cuda_transfer_close(struct cuda_device *c);
cudaError_t cuda_beside_open(struct cuda_device *c);
void cuda_beside_close(struct cuda_device *c);

int cuda_device_open(struct device *dev, int index, error *err) {
    TRY(check_device(&index, err));
    struct cuda_device *c = (struct cuda_device *)calloc(1, sizeof *c);
    if (!c) return error_system(err, "out of memory while opening the GPU");
    dev->impl = c;
    c->index = index;
    c->cudnn_version = -1;
    c->workspace_size = BLAS_WORKSPACE;
    cudaDeviceProp properties;
    cudaError_t result = cudaGetDeviceProperties(&properties, index);
    if (result == cudaSuccess) result = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    if (result == cudaSuccess) result = cuda_beside_open(c);
    if (result == cudaSuccess) result = cudaMalloc(&c->workspace, c->workspace_size);
    if (result == cudaSuccess) result = cudaMalloc((void **)&c->partials, SUM_BLOCKS * sizeof *c->partials);
    if (result != cudaSuccess) error_system(err, "opening the GPU: %s", cudaGetErrorString(result));
    if (result != cudaSuccess || cuda_transfer_open(c, err) != 0 || open_blas(c, err) != 0) {
        cuda_device_close(dev);
        return -1;
    }
    c->multiprocessors = properties.multiProcessorCount;
    c->memory = {memory_allocate, memory_release, dev};
    dev->memory = &c->memory;
    c->host_memory = {host_allocate, host_release, dev};
    dev->host_memory = &c->host_memory;
    return 0;
}

void cuda_linear_close(struct cuda_device *c);
void cuda_attention_close(struct cuda_device *c);
void cuda_attention_describe(struct device *dev, char *out, size_t size);

void cuda_device_close(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    if (!c) return;
    if (c->stream) cudaStreamSynchronize(c->stream);
    cuda_linear_close(c);
    cuda_attention_close(c);
    cuda_transfer_close(c);
    cuda_beside_close(c);
    if (c->blas) c->library.cublasLtDestroy(c->blas);
    cudaFree(c->workspace);
    cudaFree(c->partials);
    if (c->stream) cudaStreamDestroy(c->stream);
    free(c);
    dev->impl = NULL;
}

void *cuda_timer_open(struct device *dev, int laps) {
    cudaEvent_t *events = (cudaEvent_t *)calloc(2 * (size_t)laps, sizeof *events);
    for (int i = 0; events && i < 2 * laps; i++) cuda_expect(dev, cudaEventCreate(&events[i]), "making a timer");
    return events;
}

void cuda_timer_close(void *events, int laps) {
    cudaEvent_t *e = (cudaEvent_t *)events;
    for (int i = 0; e && i < 2 * laps; i++)
        if (e[i]) cudaEventDestroy(e[i]);
    free(e);
}

void cuda_timer_mark(struct device *dev, void *events, int event) {
    cuda_expect(dev, cudaEventRecord(((cudaEvent_t *)events)[event], cuda_impl(dev)->stream), "marking a time");
}

double cuda_timer_seconds(struct device *dev, void *events, int lap) {
    cudaEvent_t *e = (cudaEvent_t *)events;
    float ms = 0;
    cuda_expect(dev, cudaEventElapsedTime(&ms, e[2 * lap], e[2 * lap + 1]), "reading a time");
    return 1e-3 * ms;
}

int cuda_device_check(struct device *dev, error *err) {
    struct cuda_device *c = cuda_impl(dev);
    cuda_expect(dev, cudaStreamSynchronize(c->stream), "the GPU's work");
    return cuda_device_failure(dev, err);
}

int cuda_device_failure(struct device *dev, error *err) {
    struct cuda_device *c = cuda_impl(dev);
    if (!c->failed) return 0;
    c->failed = false;
    return error_system(err, "on the GPU: %s", c->failure);
}

static int cuda_index(const struct device *dev) {
    return ((const struct cuda_device *)dev->impl)->index;
}

int cuda_device_count(void) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

struct device_memory_use cuda_device_memory(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    size_t left = 0, all = 0;
    if (cudaMemGetInfo(&left, &all) != cudaSuccess) cudaGetLastError();
    size_t now = all - left;
    if (now > c->memory_peak) c->memory_peak = now;
    return {now, c->memory_peak};
}

/* Dense bf16 products, without sparsity, by NVIDIA's data sheets. */
double cuda_device_peak_flops(const struct device *dev) {
    static const struct {
        const char *name;
        double flops;
    } chips[] = {{"H100 PCIe", 756e12}, {"H100 NVL", 835e12}, {"H100", 989.4e12}, {"H200 NVL", 835e12},
                 {"H200", 989.4e12},    {"GH200", 989.4e12},  {"A100", 312e12},   {"A800", 312e12},
                 {"H800", 989.4e12}};
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, cuda_index(dev)) != cudaSuccess) return 0;
    for (size_t i = 0; i < sizeof chips / sizeof *chips; i++)
        if (strstr(p.name, chips[i].name)) return chips[i].flops;
    return 0;
}

/* Of the unique identity that each GPU has, what fits. */
uint64_t cuda_device_identity(const struct device *dev) {
    cudaDeviceProp p;
    uint64_t halves[2];
    if (cudaGetDeviceProperties(&p, cuda_index(dev)) != cudaSuccess) return 0;
    memcpy(halves, p.uuid.bytes, sizeof halves);
    return halves[0] ^ halves[1];
}

void cuda_device_describe(const struct device *dev, char *out, size_t size) {
    cudaDeviceProp p;
    int runtime = 0;
    cudaRuntimeGetVersion(&runtime);
    if (cudaGetDeviceProperties(&p, cuda_index(dev)) != cudaSuccess) {
        snprintf(out, size, "a GPU that does not answer");
        return;
    }
    snprintf(out, size, "%s, %d multiprocessors, %.0f GiB, CUDA %d.%d", p.name, p.multiProcessorCount,
             (double)p.totalGlobalMem / (1 << 30), runtime / 1000, runtime % 1000 / 10);
    size_t used = strlen(out);
    cuda_attention_describe((struct device *)dev, out + used, size - used);
}
