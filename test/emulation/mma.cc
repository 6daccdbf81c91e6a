/* mma.cc: products and fragments (mma.h, wgmma.h), as the PTX manual lays them out. */
#include "mma.h"

#include "cuda_bf16.h"
#include "kernels/cuda/wgmma.cuh"

#include <stdlib.h>
#include <vector>

namespace emulation {

enum { M = 16, N = 8, K_MOST = 16 };

static float half_of(uint32_t pair, int upper) {
    uint32_t bits = upper ? pair & 0xffff0000u : pair << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Register r of a's fragment holds row g (+ 8 for odd r) and k = 2q (+ 8 from the third on); b's holds k = 2q + 8r and
 * column g. */
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

void fragment_turned(void **all) {
    uint16_t matrix[8][8];
    for (int l = 0; l < WARP_LANES; l++)
        for (int e = 0; e < 2; e++) matrix[l / 4][l % 4 * 2 + e] = (uint16_t)(*(uint32_t *)all[l] >> 16 * e);
    for (int l = 0; l < WARP_LANES; l++) {
        int g = l / 4, q = l % 4;
        *(uint32_t *)all[l] = (uint32_t)matrix[2 * q + 1][g] << 16 | matrix[2 * q][g];
    }
}

/* --- products of a warpgroup -------------------------------------------------------------------------------------- */

/* What a warp asked for: its lanes' operands, round by round. */
struct round_of_warp {
    std::vector<std::vector<group_product>> products;
    bool ended = false;
};

static std::vector<round_of_warp> &rounds_of_warp() {
    static std::vector<round_of_warp> all[32];
    return all[threadIdx.x / WARP_LANES];
}

static bool at_once() {
    const char *order = getenv("RIVERRUN_EMULATE_ORDER");
    return !order || strcmp(order, "forward") == 0;
}

static float tile_element(const matrix &x, int row, int column) {
    row += x.row, column += x.column;
    if ((uintptr_t)x.tile % TILE_ALIGN != 0)
        misuse("a tile at %p, which is not aligned to %d", (void *)x.tile, TILE_ALIGN);
    if (column < 0 || column >= TILE_COLUMNS) misuse("column %d of a tile", column);
    const char *at = x.tile + row * TILE_COLUMNS * 2 + ((column / 8 ^ row % 8) * 8 + column % 8) * 2;
    if (!is_shared(at, 2)) misuse("a product's row %d, column %d, in memory that is not shared", row, column);
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return half_of((uint32_t)bits << 16, 1);
}

static void multiply_group(const std::vector<group_product> &lanes) {
    float a[M][K_MOST];
    const group_product &first = lanes[0];
    int warp = (int)threadIdx.x / WARP_LANES % 4;
    for (int l = 0; l < WARP_LANES && first.from; l++)
        for (int r = 0; r < 4; r++)
            for (int e = 0; e < 2; e++)
                a[l / 4 + 8 * (r % 2)][2 * (l % 4) + e + 8 * (r / 2)] = half_of(lanes[l].from[r], e);
    for (int m = 0; m < M && !first.from; m++)
        for (int k = 0; k < K_MOST; k++)
            a[m][k] = first.a_columns ? tile_element(first.a, k, 16 * warp + m)
                                      : tile_element(first.a, 16 * warp + m, k);
    for (int n = 0; n < TILE_COLUMNS; n++) {
        float b[K_MOST];
        for (int k = 0; k < K_MOST; k++)
            b[k] = first.columns ? tile_element(first.b, k, n) : tile_element(first.b, n, k);
        for (int m = 0; m < M; m++) {
            float sum = 0, &d = lanes[m % 8 * 4 + n % 8 / 2].d[n / 8][m / 8 * 2 + n % 2];
            for (int k = 0; k < K_MOST; k++) sum += a[m][k] * b[k];
            d = first.add ? d + sum : sum;
        }
    }
}

void group_product_all(void **all) {
    std::vector<group_product> lanes;
    for (int l = 0; l < WARP_LANES; l++) lanes.push_back(*(group_product *)all[l]);
    std::vector<round_of_warp> &rounds = rounds_of_warp();
    if (rounds.empty() || rounds.back().ended) rounds.emplace_back();
    if (at_once()) multiply_group(lanes);
    else rounds.back().products.push_back(lanes);
}

void group_end_all(void **) {
    std::vector<round_of_warp> &rounds = rounds_of_warp();
    if (rounds.empty() || rounds.back().ended) rounds.emplace_back();
    rounds.back().ended = true;
}

void group_wait_all(void **all) {
    std::vector<round_of_warp> &rounds = rounds_of_warp();
    if (!rounds.empty() && !rounds.back().ended) misuse("a wait for products that products_end did not end");
    for (int left = *(int *)all[0]; (int)rounds.size() > left; rounds.erase(rounds.begin()))
        for (const std::vector<group_product> &lanes : rounds[0].products) multiply_group(lanes);
}

} // namespace emulation
