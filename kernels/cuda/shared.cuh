/* shared.cuh: shared memory beyond the 48 KB that a block gets unasked. The most that it can have, static and dynamic
 * together, differs among chips: 227 KB on compute capability 9.0 and 10.0, 163 KB on 8.0, 99 KB on 8.6, 8.9 and 12.0.
 */
#ifndef RIVERRUN_CUDA_SHARED_CUH
#define RIVERRUN_CUDA_SHARED_CUH

#include "kernels/cuda/launch.cuh"

#define SHARED_LEAST (99 << 10) /* that every chip gives a block which asks */

/* The most that a block can have on this GPU, in bytes. (device.cu) */
size_t cuda_shared_most(struct device *dev);
/* Let a kernel be launched with so many bytes of dynamic shared memory; where a block can't have them, that is kept as
 * the device's failure. `what` is the operation. (device.cu) */
void cuda_allow_shared(struct device *dev, const void *kernel, size_t bytes, const char *what);

template <class... P>
static inline void allow_shared(struct device *dev, void (*kernel)(P...), size_t bytes, const char *what) {
    cuda_allow_shared(dev, (const void *)kernel, bytes, what);
}

#endif
