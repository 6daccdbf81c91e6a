/* beside.cu: matrix products beside other work. Called through kernels/device.c, by model/.
 *
 * Norms, activations and their gradients move bytes and leave the tensor cores idle; gradients of weights are products
 * that nothing waits for but the end of the layer. So the two run at the same time: the product takes three quarters of
 * the multiprocessors (linear.cu), and a kernel bound by memory makes do with the rest until it is done.
 *
 * The product has to get its multiprocessors first: once the other kernel's blocks are everywhere, it waits for all of
 * them. What follows in the same stream starts sooner than what waits for an event, so the product stays in the main
 * stream, and it is the other work that goes into a second one, from device_back to device_join. (With the product in
 * the second stream steps were 1 to 3 % longer than without any of this, with high priority or not.) Recorded as a
 * graph, the two are branches of it.
 *
 * A product on three quarters of the multiprocessors takes a third longer, so it has to be at most about three times as
 * long as what goes beside it. That grows with the weights, while the norm's bytes grow with the width alone: gradients
 * of 8 M weights and more stay as they are (linear.cu takes the fork back).
 *
 * Account, on an H100: the gradient of Mamba-2 129M's in_proj takes 0.22 ms on 132 multiprocessors and 0.28 on 99; a
 * kernel of 503 MB, 0.17 ms alone, ends 0.08 ms after it: 0.03 ms saved, 0.10 with 110 multiprocessors or with three
 * such kernels. Predicted were up to 3.5 of the 79 ms of that model's step; it is 1.0, and 1.6 of Llama 124M's 64.
 * Without the bound, models of width 2,048 became 3 to 4 % slower under a load that lasts.
 *
 * RIVERRUN_BESIDE=0 in the environment keeps everything in one stream, for comparisons.
 */
#include "kernels/cuda/launch.cuh"

#include <stdlib.h>
#include <string.h>

cudaError_t cuda_beside_open(struct cuda_device *c) {
    const char *wanted = getenv("RIVERRUN_BESIDE");
    c->main = c->stream;
    if (wanted && strcmp(wanted, "0") == 0) return cudaSuccess;
    cudaError_t result = cudaStreamCreateWithFlags(&c->beside, cudaStreamNonBlocking);
    if (result == cudaSuccess) result = cudaEventCreateWithFlags(&c->forked, cudaEventDisableTiming);
    if (result == cudaSuccess) result = cudaEventCreateWithFlags(&c->joined, cudaEventDisableTiming);
    return result;
}

void cuda_beside_close(struct cuda_device *c) {
    if (c->beside) cudaStreamDestroy(c->beside);
    if (c->forked) cudaEventDestroy(c->forked);
    if (c->joined) cudaEventDestroy(c->joined);
}

extern "C" void cuda_device_fork(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    ASSERT(!c->aside && c->stream == c->main);
    if (!c->beside) return;
    cuda_expect(dev, cudaEventRecord(c->forked, c->main), "forking work");
    c->aside = true;
}

extern "C" void cuda_device_back(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    if (!c->aside) return;
    cuda_expect(dev, cudaStreamWaitEvent(c->beside, c->forked, 0), "forking work");
    c->stream = c->beside;
    c->aside = false;
}

extern "C" void cuda_device_join(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    ASSERT(!c->aside);
    if (c->stream == c->main) return;
    cuda_expect(dev, cudaEventRecord(c->joined, c->beside), "joining work");
    cuda_expect(dev, cudaStreamWaitEvent(c->main, c->joined, 0), "joining work");
    c->stream = c->main;
}
