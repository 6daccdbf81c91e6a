/* cluster.h: the instructions of kernels/cuda/cluster.cuh, which includes this in its place and says what they do. */
#ifndef RIVERRUN_TEST_EMULATION_CLUSTER_H
#define RIVERRUN_TEST_EMULATION_CLUSTER_H

#include "emulation.h"

typedef char *cluster_place;

static inline unsigned cluster_rank() {
    return emulation::cluster_rank();
}
static inline unsigned cluster_blocks() {
    return emulation::cluster_blocks();
}
static inline cluster_place place_in(const void *shared, unsigned rank) {
    return emulation::cluster_place(shared, rank);
}
static inline void cluster_arrive() {
    emulation::cluster_arrive();
}
static inline void cluster_wait() {
    emulation::cluster_wait();
}
static inline void flag_open(uint64_t *flag) {
    emulation::flag_open(flag);
}
static inline void flags_opened() {
}
static inline void flag_expect(uint64_t *flag, unsigned bytes) {
    emulation::flag_expect(flag, bytes);
}
static inline void flag_wait(uint64_t *flag, unsigned parity) {
    emulation::flag_wait(flag, parity);
}
static inline void send_16(cluster_place to, uint4 v, cluster_place flag) {
    emulation::flag_send(to, &v, sizeof v, flag);
}
static inline void send_8(cluster_place to, float2 v, cluster_place flag) {
    emulation::flag_send(to, &v, sizeof v, flag);
}

#endif
