/* transfer.cu: bytes between host and device, and marks in the stream. Called through kernels/device.c.
 *
 * Host memory that is not pinned would make each copy wait, so it goes through a ring of pinned slots: a write fills a
 * slot, queues the copy and returns; a slot is filled again once its copy is done. A large write thus overlaps filling
 * with copying. Reads go the same way back, two slots at a time, and wait. Peak rate: that of one core's memcpy, some
 * 10 GB/s, beside 25 to 50 GB/s of the bus.
 */
#include "kernels/cuda/launch.cuh"

#include <string.h>

int cuda_transfer_open(struct cuda_device *c, error *err) {
    cudaError_t result = cudaMallocHost((void **)&c->stage, STAGE_SLOTS * STAGE);
    for (int i = 0; i < STAGE_SLOTS && result == cudaSuccess; i++)
        result = cudaEventCreateWithFlags(&c->stage_done[i], cudaEventDisableTiming);
    for (int i = 0; i < MARKS && result == cudaSuccess; i++)
        result = cudaEventCreateWithFlags(&c->marks[i], cudaEventDisableTiming);
    if (result == cudaSuccess) return 0;
    return error_system(err, "opening the GPU: %s", cudaGetErrorString(result));
}

void cuda_transfer_close(struct cuda_device *c) {
    for (int i = 0; i < STAGE_SLOTS; i++)
        if (c->stage_done[i]) cudaEventDestroy(c->stage_done[i]);
    for (int i = 0; i < MARKS; i++)
        if (c->marks[i]) cudaEventDestroy(c->marks[i]);
    cudaFreeHost(c->stage);
}

/* --- to the device ------------------------------------------------------------------------------------------------ */

/* The ring's next slot, free to be filled. */
static void *stage(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    /* An event that was never recorded is done. */
    cuda_expect(dev, cudaEventSynchronize(c->stage_done[c->stage_slot]), "writing to the GPU");
    return c->stage + (size_t)c->stage_slot * STAGE;
}

/* Queue the copy of what is in it. */
static void send(struct device *dev, void *to_device, size_t bytes) {
    struct cuda_device *c = cuda_impl(dev);
    int slot = c->stage_slot;
    cuda_expect(dev, cudaMemcpyAsync(to_device, c->stage + (size_t)slot * STAGE, bytes, cudaMemcpyHostToDevice,
                                     c->stream), "writing to the GPU");
    cuda_expect(dev, cudaEventRecord(c->stage_done[slot], c->stream), "writing to the GPU");
    c->stage_slot = (slot + 1) % STAGE_SLOTS;
}

extern "C" void cuda_device_write(struct device *dev, void *to_device, const void *from_host, size_t bytes) {
    for (size_t from = 0; from < bytes; from += STAGE) {
        size_t part = bytes - from < STAGE ? bytes - from : STAGE;
        memcpy(stage(dev), (const char *)from_host + from, part);
        send(dev, (char *)to_device + from, part);
    }
}

/* --- from the device ---------------------------------------------------------------------------------------------- */

extern "C" void cuda_device_fetch(struct device *dev, void *to_host, const void *from_device, size_t bytes) {
    if (bytes)
        cuda_expect(dev, cudaMemcpyAsync(to_host, from_device, bytes, cudaMemcpyDeviceToHost, cuda_impl(dev)->stream),
                    "reading from the GPU");
}

/* Queue piece `from` of a read into the ring's next slot; the slot, or -1 behind the end. */
static int queue_piece(struct device *dev, const char *from_device, size_t from, size_t bytes) {
    struct cuda_device *c = cuda_impl(dev);
    if (from >= bytes) return -1;
    size_t part = bytes - from < STAGE ? bytes - from : STAGE;
    int slot = c->stage_slot;
    void *at = stage(dev);
    cuda_device_fetch(dev, at, from_device + from, part);
    cuda_expect(dev, cudaEventRecord(c->stage_done[slot], c->stream), "reading from the GPU");
    c->stage_slot = (slot + 1) % STAGE_SLOTS;
    return slot;
}

extern "C" void cuda_device_read(struct device *dev, void *to_host, const void *from_device, size_t bytes) {
    struct cuda_device *c = cuda_impl(dev);
    const char *device = (const char *)from_device;
    int slot = queue_piece(dev, device, 0, bytes);
    for (size_t from = 0; from < bytes; from += STAGE) {
        size_t part = bytes - from < STAGE ? bytes - from : STAGE;
        int next = queue_piece(dev, device, from + STAGE, bytes);
        cuda_expect(dev, cudaEventSynchronize(c->stage_done[slot]), "reading from the GPU");
        memcpy((char *)to_host + from, c->stage + (size_t)slot * STAGE, part);
        slot = next;
    }
    if (bytes == 0) cuda_expect(dev, cudaStreamSynchronize(c->stream), "reading from the GPU");
}

extern "C" void cuda_device_copy(struct device *dev, void *to, const void *from, size_t bytes) {
    if (bytes)
        cuda_expect(dev, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_impl(dev)->stream),
                    "copying on the GPU");
}

extern "C" void cuda_device_zero(struct device *dev, void *memory, size_t bytes) {
    if (bytes) cuda_expect(dev, cudaMemsetAsync(memory, 0, bytes, cuda_impl(dev)->stream), "clearing on the GPU");
}

/* --- marks -------------------------------------------------------------------------------------------------------- */

extern "C" uint64_t cuda_device_mark(struct device *dev) {
    struct cuda_device *c = cuda_impl(dev);
    uint64_t mark = ++c->marked;
    cuda_expect(dev, cudaEventRecord(c->marks[mark % MARKS], c->stream), "the GPU's work");
    return mark;
}

/* Where a later mark has taken the event over, this waits for that one: longer, never shorter. */
extern "C" void cuda_device_wait(struct device *dev, uint64_t mark) {
    if (mark) cuda_expect(dev, cudaEventSynchronize(cuda_impl(dev)->marks[mark % MARKS]), "the GPU's work");
}
