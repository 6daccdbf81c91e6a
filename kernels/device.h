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
    bool direct; /* device_run records nothing */
    void *impl;
};

/* Is there such a device in this machine, for this build? 0 if not, else its bytes of memory. Opens nothing. */
size_t device_present(enum device_kind kind);

/* The operations of a device, without opening it: enough to plan memory. Fails like device_open for what this build
 * does not have, and does not look at the machine. */
int device_table(const struct ops **ops, enum device_kind kind, enum precision precision, error *err);

/* Open a device: the CPU in f32 or f64, a GPU in f32 or bf16. Asking for what this build or machine lacks is
 * ERROR_INPUT that says what is there. */
int device_open(struct device **dev, enum device_kind kind, enum precision precision, error *err);
/* The same on the GPU of this number, counted around where there are fewer. */
int device_open_at(struct device **dev, enum device_kind kind, enum precision precision, int index, error *err);
void device_close(struct device *dev);
/* GPUs that this process sees (1 on the CPU), and a number that tells the one in use from all others anywhere. */
int device_count(const struct device *dev);
uint64_t device_identity(const struct device *dev);

/* Between host and device memory (plain copies on the CPU). Counts are bytes. device_write is queued: the device sees
 * the bytes in turn, and the caller may change them at once, since they go through pinned memory of the device's own.
 * device_read waits for the work before it. Neither belongs into recorded work. */
void device_write(struct device *dev, void *to_device, const void *from_host, size_t bytes);
void device_read(struct device *dev, void *to_host, const void *from_device, size_t bytes);

/* Queue a copy to host memory that was taken from dev->host_memory; it is there once a mark set behind it is
 * reached. */
void device_fetch(struct device *dev, void *to_host, const void *from_device, size_t bytes);

/* A mark behind all that has been queued; device_wait returns when the device has come to it. Marks may be forgotten.
 * On the CPU everything has been done already. */
uint64_t device_mark(struct device *dev);
void device_wait(struct device *dev, uint64_t mark);

/* Work that is done again and again, with the same shapes at the same places: the first device_run does it, the second
 * one records what it queues, and that and each later one replay the record, which costs the host one call. So what
 * differs between runs lies in device memory, and what the work does on the host it does twice at most. `work` may not
 * wait for the device nor move bytes between host and device memory. A device that records nothing (the CPU), or that
 * fails to, does the work each time. *r is NULL at first, and the caller's to close before the device. */
struct device_record;
void device_run(struct device *dev, struct device_record **r, void (*work)(void *self), void *self);
void device_record_close(struct device *dev, struct device_record *r);

/* Work beside work: what is queued between device_fork and device_back comes after all that was queued before, and may
 * run at the same time as what is queued from device_back to device_join; what follows comes after both. So what is
 * queued from back to join writes nothing that the forked work reads, and does not touch what it writes. One fork at a
 * time; a join with none is nothing. Only matrix products may be forked, which leave some of the GPU to the other work,
 * and only operations (ops.h), which no product is part of, may be queued until the join. A device may do all in the
 * order of the calls: the CPU does, and a GPU with products for which that is faster. */
void device_fork(struct device *dev);
void device_back(struct device *dev);
void device_join(struct device *dev);

/* Names for a profiler's time line, around what is queued between the two. They nest. */
void device_range_push(struct device *dev, const char *name);
void device_range_pop(struct device *dev);
/* Within device memory; the two don't overlap. */
void device_copy(struct device *dev, void *to, const void *from, size_t bytes);
void device_zero(struct device *dev, void *memory, size_t bytes);

/* Wait for everything submitted; 0, or the first failure since the last check. */
int device_check(struct device *dev, error *err);
/* The same without waiting: failures that are known by now. */
int device_failure(struct device *dev, error *err);

/* Bytes of device memory that are taken now, by everything on the device, and the most that were ever seen here; 0 on
 * the CPU. */
struct device_memory_use {
    size_t now, peak;
};
struct device_memory_use device_memory(struct device *dev);
/* FLOP/s of dense bf16 products by the data sheet of the device, 0 where it is not known. */
double device_peak_flops(const struct device *dev);

/* How long the device takes for pieces of work, by its own clock: CUDA events among what is submitted, which wait for
 * nothing on the host; on the CPU a monotonic clock. A timer has `laps` places; between start and stop of a lap lies
 * the work that it times. The seconds of a lap are there after a device_check() behind its stop. */
struct device_timer;
int device_timer_open(struct device_timer **timer, struct device *dev, int laps, error *err);
void device_timer_close(struct device_timer *timer);
void device_timer_start(struct device_timer *timer, int lap);
void device_timer_stop(struct device_timer *timer, int lap);
double device_timer_seconds(struct device_timer *timer, int lap);

/* The OPENBLAS_CORETYPE under which OpenBLAS would use this processor's vectors, where it does not by itself; NULL
 * where it does. A release older than the processor takes it for a very old one, and multiplies at a third of the
 * speed: 0.3.21 (Debian 12) on an Intel Xeon of 2023 trained 2,900 tokens/s, and 9,100 when told SkylakeX. The variable
 * counts when the library is loaded, so it is main() that acts on this. */
const char *device_better_blas(void);

/* "2 threads, AVX-512, OpenBLAS 0.3.21 (SkylakeX)", or a GPU's name and size, for the log's first line. */
void device_describe(const struct device *dev, char *out, size_t size);

#endif
