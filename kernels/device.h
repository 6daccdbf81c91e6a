/* device.h: where operations run: the table, the memory, and what the device keeps between calls (nothing on the CPU;
 * stream, library handles and the first error on CUDA). */
#ifndef RIVERRUN_DEVICE_H
#define RIVERRUN_DEVICE_H

#include "common/arena.h"
#include "common/error.h"
#include "kernels/ops.h"

enum device_kind { DEVICE_CPU = 0, DEVICE_CUDA };
enum precision { PRECISION_F32 = 0, PRECISION_F64, PRECISION_BF16 };

struct device {
    const struct ops *ops;
    enum device_kind kind;
    enum precision precision;
    const struct arena_memory *memory;      /* for arena_open; NULL = host memory */
    const struct arena_memory *host_memory; /* host memory that is copied from fastest; NULL = any */
    void *impl;
};

/* The operations of a device, without opening it: enough to plan memory. Fails like device_open for what this build does
 * not have, and does not look at the machine. */
int device_table(const struct ops **ops, enum device_kind kind, enum precision precision, error *err);

/* Open a device: the CPU in f32 or f64, a GPU in f32 or bf16. Asking for what this build or machine lacks is ERROR_INPUT
 * that says what is there. */
int device_open(struct device **dev, enum device_kind kind, enum precision precision, error *err);
void device_close(struct device *dev);

/* Between host and device memory (plain copies on the CPU). Counts are bytes. device_read waits for the work before it. */
void device_write(struct device *dev, void *to_device, const void *from_host, size_t bytes);
void device_read(struct device *dev, void *to_host, const void *from_device, size_t bytes);
/* Within device memory; the two don't overlap. */
void device_copy(struct device *dev, void *to, const void *from, size_t bytes);
void device_zero(struct device *dev, void *memory, size_t bytes);

/* Wait for everything submitted; 0, or the first failure since the last check. */
int device_check(struct device *dev, error *err);

/* The OPENBLAS_CORETYPE under which OpenBLAS would use this processor's vectors, where it does not by itself; NULL where
 * it does. A release older than the processor takes it for a very old one, and multiplies at a third of the speed: 0.3.21
 * (Debian 12) on an Intel Xeon of 2023 trained 2,900 tokens/s, and 9,100 when told SkylakeX. The variable counts when
 * the library is loaded, so it is main() that acts on this. */
const char *device_better_blas(void);

/* "2 threads, AVX-512, OpenBLAS 0.3.21 (SkylakeX)", or a GPU's name and size, for the log's first line. */
void device_describe(const struct device *dev, char *out, size_t size);

#endif
