/* unit_kernels.h: what the cmocka programs of single operations on the CPU share: random tensors, their elements, and
 * the comparison of numbers. */
#ifndef RIVERRUN_TEST_UNIT_KERNELS_H
#define RIVERRUN_TEST_UNIT_KERNELS_H

#include "common/rng.h"
#include "kernels/device.h"
#include "test/unit.h"

#include <math.h>

static inline struct device *open_cpu(enum precision precision) {
    struct device *dev;
    error err = {0};
    assert_int_equal(device_open(&dev, DEVICE_CPU, precision, &err), 0);
    return dev;
}

static inline double uniform(uint32_t stream, int64_t i) {
    return 2 * rng_uniform((rng_key){.seed = 7, .purpose = RNG_TEST, .stream = stream}, (uint64_t)i) - 1;
}

static inline void *must_allocate(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 64) / 64 * 64);
    assert_non_null(p);
    return p;
}

static inline double get(tensor t, int64_t i) {
    return t.dtype == DTYPE_F64 ? ((double *)t.data)[i] : (double)((float *)t.data)[i];
}

static inline void set(tensor t, int64_t i, double v) {
    if (t.dtype == DTYPE_F64) ((double *)t.data)[i] = v;
    else ((float *)t.data)[i] = (float)v;
}

/* A contiguous (a,b) tensor of the device's type with values scale * uniform(stream). Freed by the caller. */
static inline tensor random_matrix(struct device *dev, int64_t a, int64_t b, uint32_t stream, double scale) {
    tensor t = tensor_2d(must_allocate((size_t)(a * b) * 8), dev->ops->real, a, b);
    for (int64_t i = 0; i < a * b; i++) set(t, i, scale * uniform(stream, i));
    return t;
}

static inline tensor random_vector(struct device *dev, int64_t n, uint32_t stream, double scale) {
    tensor t = random_matrix(dev, 1, n, stream, scale);
    return tensor_1d(t.data, t.dtype, n);
}

static inline void assert_close(double got, double want, double share, double floor, const char *what, int64_t i) {
    if (fabs(got - want) <= share * fabs(want) + floor) return;
    fail_msg("%s[%lld] is %.17g, should be %.17g", what, (long long)i, got, want);
}

static inline double unit_of(const struct device *dev) {
    return dev->precision == PRECISION_F64 ? 0x1p-53 : 0x1p-24;
}

#endif
