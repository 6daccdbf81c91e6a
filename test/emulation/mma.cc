/* mma.cc: products and fragments (mma.h), as the PTX manual lays them out. */
#include "mma.h"

namespace emulation {

enum { M = 16, N = 8, K_MOST = 16 };

static float half_of(uint32_t pair, int upper) {
    uint32_t bits = upper ? pair & 0xffff0000u : pair << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Register r of a's fragment holds row g (+ 8 for odd r), k = 2q (+ 8 from the third on); b's: k = 2q + 8r, column g. */
static void multiply(void **all, int K) {
    float a[M][K_MOST], b[K_MOST][N], d[M][N];
    for (int l = 0; l < WARP_LANES; l++) {
        const product *p = (const product *)all[l];
        int g = l / 4, q = l % 4;
        for (int r = 0; r < K / 4; r++)
            for (int e = 0; e < 2; e++) a[g + 8 * (r % 2)][2 * q + e + 8 * (r / 2)] = half_of(p->a[r], e);
        for (int r = 0; r < K / 8; r++)
            for (int e = 0; e < 2; e++) b[2 * q + e + 8 * r][g] = half_of(p->b[r], e);
        for (int e = 0; e < 4; e++) d[g + 8 * (e / 2)][2 * q + e % 2] = p->d[e];
    }
    for (int m = 0; m < M; m++) {
        float sum[N] = {0};
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) sum[n] += a[m][k] * b[k][n];
        for (int n = 0; n < N; n++) d[m][n] += sum[n];
    }
    for (int l = 0; l < WARP_LANES; l++)
        for (int e = 0; e < 4; e++) ((product *)all[l])->d[e] = d[l / 4 + 8 * (e / 2)][2 * (l % 4) + e % 2];
}

void product_k16(void **all) {
    multiply(all, 16);
}

void product_k8(void **all) {
    multiply(all, 8);
}

static void load(void **all, int matrices, bool transposed) {
    for (int j = 0; j < matrices; j++) {
        uint16_t matrix[8][8];
        for (int i = 0; i < 8; i++) {
            const void *row = ((const fragment *)all[8 * j + i])->row;
            if ((uintptr_t)row % 16 != 0) misuse("ldmatrix from %p, which is not aligned to 16 bytes", row);
            if (!is_shared(row, 16)) misuse("ldmatrix from memory that is not shared");
            memcpy(matrix[i], row, 16);
        }
        for (int l = 0; l < WARP_LANES; l++) {
            int g = l / 4, q = l % 4;
            uint16_t low = transposed ? matrix[2 * q][g] : matrix[g][2 * q];
            uint16_t high = transposed ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
            ((fragment *)all[l])->to[j] = (uint32_t)high << 16 | low;
        }
    }
}

void fragments_x4(void **all) {
    load(all, 4, false);
}

void fragments_x2(void **all) {
    load(all, 2, false);
}

void fragments_x4_transposed(void **all) {
    load(all, 4, true);
}

void fragments_x2_transposed(void **all) {
    load(all, 2, true);
}

} // namespace emulation
