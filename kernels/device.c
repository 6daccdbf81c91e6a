/* device.c: opening a device and moving bytes to and from it. This version has the CPU in float and in double; its
 * memory is the host's, nothing is queued and nothing can fail once the device is open. Called by model/ and train/. */
#include "kernels/device.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef RIVERRUN_OPENBLAS
#include <cblas.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* The widest vector instructions that this binary was compiled to use. */
#if defined(__AVX512F__)
#define VECTORS "AVX-512"
#define VECTORS_PRESENT (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
#elif defined(__AVX2__)
#define VECTORS "AVX2"
#define VECTORS_PRESENT (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#elif defined(__x86_64__)
#define VECTORS "SSE2"
#define VECTORS_PRESENT 1
#elif defined(__ARM_FEATURE_SVE)
#define VECTORS "SVE"
#define VECTORS_PRESENT 1
#elif defined(__ARM_NEON)
#define VECTORS "NEON"
#define VECTORS_PRESENT 1
#else
#define VECTORS "no vector instructions"
#define VECTORS_PRESENT 1
#endif

int device_open(struct device **dev, enum device_kind kind, enum precision precision, error *err) {
    *dev = NULL;
    if (kind != DEVICE_CPU)
        return error_input(err, "device cuda is not in this build of riverrun, which computes on the CPU only: "
                                "choose device cpu");
    if (precision != PRECISION_F32 && precision != PRECISION_F64)
        return error_input(err, "precision bf16 needs a GPU; the CPU computes in fp32 or fp64: choose one of them");
    if (!VECTORS_PRESENT)
        return error_input(err, "this riverrun was compiled for a processor with %s, which this machine lacks: build "
                                "it here, or with CPU_ARCH=x86-64-v2", VECTORS);
    struct device *opened = calloc(1, sizeof *opened);
    if (!opened) return error_system(err, "out of memory while opening the CPU device");
    opened->ops = precision == PRECISION_F64 ? &ops_cpu_f64 : &ops_cpu_f32;
    opened->kind = kind;
    opened->precision = precision;
    *dev = opened;
    return 0;
}

void device_close(struct device *dev) {
    free(dev);
}

void device_write(struct device *dev, void *to_device, const void *from_host, size_t bytes) {
    (void)dev;
    if (bytes) memcpy(to_device, from_host, bytes);
}

void device_read(struct device *dev, void *to_host, const void *from_device, size_t bytes) {
    (void)dev;
    if (bytes) memcpy(to_host, from_device, bytes);
}

void device_zero(struct device *dev, void *memory, size_t bytes) {
    (void)dev;
    if (bytes) memset(memory, 0, bytes);
}

int device_check(struct device *dev, error *err) {
    (void)dev;
    (void)err;
    return 0;
}

/* "OpenBLAS 0.3.21": the first two words of what the library says about itself. */
static void describe_blas(char *out, size_t size) {
#ifdef RIVERRUN_OPENBLAS
    char name[32], version[32];
    if (sscanf(openblas_get_config(), "%31s %31s", name, version) == 2)
        snprintf(out, size, "%s %s", name, version);
    else
        snprintf(out, size, "OpenBLAS");
#else
    snprintf(out, size, "riverrun's own matrix product");
#endif
}

void device_describe(const struct device *dev, char *out, size_t size) {
    char blas[80];
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    (void)dev;
    describe_blas(blas, sizeof blas);
    snprintf(out, size, "%d thread%s, " VECTORS ", %s", threads, threads == 1 ? "" : "s", blas);
}
