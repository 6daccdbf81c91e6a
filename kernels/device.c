/* device.c: opening a device and moving bytes to and from it. The CPU, in float and in double, is here: its memory is
 * the host's, nothing is queued and nothing can fail once the device is open. A GPU's part is kernels/cuda/device.cu,
 * in builds that have it. Called by model/ and train/. */
#include "kernels/device.h"

#include "common/text.h"
#ifdef RIVERRUN_CUDA
#include "kernels/cuda/cuda.h"
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

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

static int cpu_table(const struct ops **ops, enum precision precision, error *err) {
    if (precision != PRECISION_F32 && precision != PRECISION_F64)
        return error_input(err, "precision bf16 needs a GPU; the CPU computes in fp32 or fp64: choose one of them");
    *ops = precision == PRECISION_F64 ? &ops_cpu_f64 : &ops_cpu_f32;
    return 0;
}

#ifdef RIVERRUN_CUDA
static int cuda_table(const struct ops **ops, enum precision precision, error *err) {
    if (precision != PRECISION_F32 && precision != PRECISION_BF16)
        return error_input(err, "precision fp64 is the CPU's; a GPU computes in fp32 or bf16: choose one of them");
    *ops = precision == PRECISION_BF16 ? &ops_cuda_bf16 : &ops_cuda_f32;
    return 0;
}
#else
static int cuda_table(const struct ops **ops, enum precision precision, error *err) {
    (void)ops;
    (void)precision;
    return error_input(err, "device cuda is not in this build of riverrun, which computes on the CPU only: "
                            "choose device cpu");
}
#endif

int device_table(const struct ops **ops, enum device_kind kind, enum precision precision, error *err) {
    return (kind == DEVICE_CPU ? cpu_table : cuda_table)(ops, precision, err);
}

/* Can this machine run what this build computes with? */
static int open_machine(struct device *dev, int index, error *err) {
#ifdef RIVERRUN_CUDA
    if (dev->kind == DEVICE_CUDA) return cuda_device_open(dev, index, err);
#endif
    (void)dev;
    (void)index;
    if (!VECTORS_PRESENT)
        return error_input(err, "this riverrun was compiled for a processor with %s, which this machine lacks: build "
                                "it here, or with CPU_ARCH=x86-64-v2", VECTORS);
    return 0;
}

int device_open(struct device **dev, enum device_kind kind, enum precision precision, error *err) {
    return device_open_at(dev, kind, precision, 0, err);
}

int device_open_at(struct device **dev, enum device_kind kind, enum precision precision, int index, error *err) {
    *dev = NULL;
    struct device *opened = calloc(1, sizeof *opened);
    if (!opened) return error_system(err, "out of memory while opening a device");
    opened->kind = kind;
    opened->precision = precision;
    if (device_table(&opened->ops, kind, precision, err) != 0 || open_machine(opened, index, err) != 0) {
        free(opened);
        return -1;
    }
    *dev = opened;
    return 0;
}

/* Run the GPU's part of a function, in builds that have it; the statement that follows is what other devices do
 * instead. */
#ifdef RIVERRUN_CUDA
#define ON_CUDA(dev, ...)                                                                                              \
    if ((dev)->kind == DEVICE_CUDA) {                                                                                  \
        __VA_ARGS__;                                                                                                   \
    } else
#else
#define ON_CUDA(dev, ...)
#endif

void device_close(struct device *dev) {
    if (!dev) return;
#ifdef RIVERRUN_CUDA
    if (dev->kind == DEVICE_CUDA) cuda_device_close(dev);
#endif
    free(dev);
}

void device_write(struct device *dev, void *to_device, const void *from_host, size_t bytes) {
    (void)dev;
    ON_CUDA(dev, cuda_device_write(dev, to_device, from_host, bytes))
    if (bytes) memcpy(to_device, from_host, bytes);
}

void device_read(struct device *dev, void *to_host, const void *from_device, size_t bytes) {
    (void)dev;
    ON_CUDA(dev, cuda_device_read(dev, to_host, from_device, bytes))
    if (bytes) memcpy(to_host, from_device, bytes);
}

void device_fetch(struct device *dev, void *to_host, const void *from_device, size_t bytes) {
    (void)dev;
    ON_CUDA(dev, cuda_device_fetch(dev, to_host, from_device, bytes))
    if (bytes) memcpy(to_host, from_device, bytes);
}

uint64_t device_mark(struct device *dev) {
    (void)dev;
    ON_CUDA(dev, return cuda_device_mark(dev))
    return 0;
}

void device_wait(struct device *dev, uint64_t mark) {
    (void)dev, (void)mark;
    ON_CUDA(dev, cuda_device_wait(dev, mark)) {}
}

void device_fork(struct device *dev) {
    (void)dev;
    ON_CUDA(dev, cuda_device_fork(dev)) {}
}

void device_back(struct device *dev) {
    (void)dev;
    ON_CUDA(dev, cuda_device_back(dev)) {}
}

void device_join(struct device *dev) {
    (void)dev;
    ON_CUDA(dev, cuda_device_join(dev)) {}
}

void device_run(struct device *dev, struct device_record **r, void (*work)(void *self), void *self) {
    (void)dev, (void)r;
    ON_CUDA(dev, cuda_device_run(dev, r, work, self))
    work(self);
}

void device_record_close(struct device *dev, struct device_record *r) {
    (void)dev, (void)r;
    ON_CUDA(dev, cuda_device_record_close(dev, r)) {}
}

void device_range_push(struct device *dev, const char *name) {
    (void)dev, (void)name;
    ON_CUDA(dev, cuda_device_range_push(dev, name)) {}
}

void device_range_pop(struct device *dev) {
    (void)dev;
    ON_CUDA(dev, cuda_device_range_pop(dev)) {}
}

void device_copy(struct device *dev, void *to, const void *from, size_t bytes) {
    (void)dev;
    ON_CUDA(dev, cuda_device_copy(dev, to, from, bytes))
    if (bytes) memcpy(to, from, bytes);
}

void device_zero(struct device *dev, void *memory, size_t bytes) {
    (void)dev;
    ON_CUDA(dev, cuda_device_zero(dev, memory, bytes))
    if (bytes) memset(memory, 0, bytes);
}

int device_count(const struct device *dev) {
    (void)dev;
    ON_CUDA(dev, return cuda_device_count())
    return 1;
}

uint64_t device_identity(const struct device *dev) {
    (void)dev;
    ON_CUDA(dev, return cuda_device_identity(dev))
    return 0;
}

int device_check(struct device *dev, error *err) {
    (void)dev, (void)err;
    ON_CUDA(dev, return cuda_device_check(dev, err))
    return 0;
}

int device_failure(struct device *dev, error *err) {
    (void)dev, (void)err;
    ON_CUDA(dev, return cuda_device_failure(dev, err))
    return 0;
}

struct device_memory_use device_memory(struct device *dev) {
    (void)dev;
    ON_CUDA(dev, return cuda_device_memory(dev))
    return (struct device_memory_use){0, 0};
}

double device_peak_flops(const struct device *dev) {
    (void)dev;
    ON_CUDA(dev, return cuda_device_peak_flops(dev))
    return 0;
}

size_t device_present(enum device_kind kind) {
#ifdef RIVERRUN_CUDA
    if (kind == DEVICE_CUDA) return cuda_device_present();
#endif
    return kind == DEVICE_CPU ? (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) : 0;
}

/* ---- timer ------------------------------------------------------------------------------------------------------ */

struct device_timer {
    struct device *dev;
    int laps;
    double *begun, *ended; /* of each lap, where the clock is the host's */
    void *events;          /* where it is the GPU's */
};

int device_timer_open(struct device_timer **timer, struct device *dev, int laps, error *err) {
    struct device_timer *t = *timer = calloc(1, sizeof *t);
    if (!t || !(t->begun = calloc(2 * (size_t)laps, sizeof *t->begun))) {
        free(t);
        *timer = NULL;
        return error_system(err, "no memory for a timer");
    }
    t->dev = dev;
    t->laps = laps;
    t->ended = t->begun + laps;
    ON_CUDA(dev, t->events = cuda_timer_open(dev, laps)) return 0;
    if (t->events) return 0;
    device_timer_close(t);
    *timer = NULL;
    return error_system(err, "the GPU has no events for a timer");
}

void device_timer_close(struct device_timer *t) {
    if (!t) return;
    ON_CUDA(t->dev, cuda_timer_close(t->events, t->laps)) {}
    free(t->begun);
    free(t);
}

void device_timer_start(struct device_timer *t, int lap) {
    ON_CUDA(t->dev, cuda_timer_mark(t->dev, t->events, 2 * lap))
    t->begun[lap] = clock_seconds();
}

void device_timer_stop(struct device_timer *t, int lap) {
    ON_CUDA(t->dev, cuda_timer_mark(t->dev, t->events, 2 * lap + 1))
    t->ended[lap] = clock_seconds();
}

double device_timer_seconds(struct device_timer *t, int lap) {
    ON_CUDA(t->dev, return cuda_timer_seconds(t->dev, t->events, lap))
    return t->ended[lap] - t->begun[lap];
}

/* ---- what is here ------------------------------------------------------------------------------------------------ */

#if defined(RIVERRUN_OPENBLAS) && defined(__x86_64__)
const char *device_better_blas(void) {
    /* Those of OpenBLAS's x86-64 cores that lack AVX2. */
    static const char *const old[] = {"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Atom", "Nano", "Generic",
                                      "Unknown", "Sandybridge", "Opteron", "Opteron_SSE3", "Barcelona", "Bobcat",
                                      "Bulldozer",
                                      "Piledriver", "Steamroller"};
    const char *core = openblas_get_corename();
    bool is_old = false;
    for (size_t i = 0; i < sizeof old / sizeof *old; i++) is_old = is_old || strcasecmp(core, old[i]) == 0;
    if (!is_old) return NULL;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return "SkylakeX";
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "Haswell" : NULL;
}
#else
const char *device_better_blas(void) {
    return NULL;
}
#endif

/* "OpenBLAS 0.3.21 (SkylakeX)": the first two words of what the library says about itself, and the processor that it
 * takes this one for. */
static void describe_blas(char *out, size_t size) {
#ifdef RIVERRUN_OPENBLAS
    char name[32], version[32];
    if (sscanf(openblas_get_config(), "%31s %31s", name, version) == 2)
        snprintf(out, size, "%s %s (%s)", name, version, openblas_get_corename());
    else
        snprintf(out, size, "OpenBLAS");
#else
    snprintf(out, size, "riverrun's own matrix product");
#endif
}

void device_describe(const struct device *dev, char *out, size_t size) {
    char blas[80];
    int threads = 1;
#ifdef RIVERRUN_CUDA
    if (dev->kind == DEVICE_CUDA) {
        cuda_device_describe(dev, out, size);
        return;
    }
#endif
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    (void)dev;
    describe_blas(blas, sizeof blas);
    snprintf(out, size, "%d thread%s, " VECTORS ", %s", threads, threads == 1 ? "" : "s", blas);
}
