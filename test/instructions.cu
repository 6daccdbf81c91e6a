/* instructions.cu: does every function of kernels/cuda/mma.cuh, cluster.cuh and wgmma.cuh, and every exchange between
 * lanes, do what its comment says? Against plain loops on the host, with numbers whose sums are exact. Built by nvcc it
 * asks the GPU, in the emulated build the emulation: what passes both is the same in both, which is what the emulated
 * tests rest on.
 *
 *   instructions            exit code 0: all as said; 1: something differs; 77: there is no GPU
 */
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/wgmma.cuh"

#include <math.h>
#include <stdio.h>
#include <vector>

static int differences;

/* Device memory with the content of a host array, which fetch() brings up to date. */
template <class T> struct both {
    std::vector<T> host;
    T *device = NULL;

    explicit both(size_t count) : host(count) {
        if (cudaMalloc((void **)&device, count * sizeof(T)) != cudaSuccess) abort();
    }
    both(const both &) = delete;
    ~both() {
        cudaFree(device);
    }
    T *send() {
        cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
        return device;
    }
    void fetch() {
        cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost);
    }
};

static void expect(bool same, const char *what, int at, double got, double want) {
    if (same) return;
    if (++differences <= 20) fprintf(stderr, "instructions: %s [%d] is %.9g, should be %.9g\n", what, at, got, want);
}

/* --- products ----------------------------------------------------------------------------------------------------- */

enum form { FROM_REGISTERS, FROM_ROWS, FROM_COLUMNS, HALF_DEPTH };

/* d (16,8) = start + a (16,16) b (16,8). a is given by rows, b as n x k; FROM_COLUMNS: a as k x m, b as k x n. */
template <enum form FORM>
__global__ void product_kernel(float *d, const __nv_bfloat16 *a, const __nv_bfloat16 *b, const float *start) {
    __shared__ __align__(16) __nv_bfloat16 as[16 * 16], bs[16 * 8];
    int l = threadIdx.x, g = l / 4, q = l % 4;
    cp_async_16(as + 8 * l, a + 8 * l);
    if (l < 16) cp_async_16(bs + 8 * l, b + 8 * l);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t fa[4], fb[2];
    float sum[4];
    for (int e = 0; e < 4; e++) sum[e] = start[(g + 8 * (e / 2)) * 8 + 2 * q + e % 2];
    if (FORM == FROM_ROWS) {
        ldmatrix_x4(fa, as + l % 16 * 16 + 8 * (l / 16));
        ldmatrix_x2(fb, bs + l % 8 * 16 + 8 * (l / 8 % 2));
    } else if (FORM == FROM_COLUMNS) {
        ldmatrix_x4_transposed(fa, as + (l % 8 + 8 * (l / 16)) * 16 + 8 * (l / 8 % 2));
        ldmatrix_x2_transposed(fb, bs + l % 16 * 8);
    } else {
        for (int r = 0; r < 4; r++)
            fa[r] = *reinterpret_cast<uint32_t *>(as + (g + 8 * (r % 2)) * 16 + 2 * q + 8 * (r / 2));
        for (int r = 0; r < 2; r++) fb[r] = *reinterpret_cast<uint32_t *>(bs + g * 16 + 2 * q + 8 * r);
    }
    if (FORM == HALF_DEPTH) {
        const uint32_t low[2] = {fa[0], fa[1]}, high[2] = {fa[2], fa[3]};
        mma_bf16_m16n8k8(sum, low, fb[0]);
        mma_bf16_m16n8k8(sum, high, fb[1]);
    } else {
        mma_bf16_m16n8k16(sum, fa, fb);
    }
    for (int e = 0; e < 4; e++) d[(g + 8 * (e / 2)) * 8 + 2 * q + e % 2] = sum[e];
}

template <enum form FORM> static void check_product(const char *what) {
    both<__nv_bfloat16> a(16 * 16), b(16 * 8);
    both<float> start(16 * 8), d(16 * 8);
    float A[16][16], B[16][8];
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++) {
            A[m][k] = (float)((m * 37 + k * 101 + m * k) % 31 - 15);
            a.host[(size_t)(FORM == FROM_COLUMNS ? k * 16 + m : m * 16 + k)] = __float2bfloat16_rn(A[m][k]);
        }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) {
            B[k][n] = (float)((k * 53 + n * 17 + k * n) % 29 - 14);
            b.host[(size_t)(FORM == FROM_COLUMNS ? k * 8 + n : n * 16 + k)] = __float2bfloat16_rn(B[k][n]);
        }
    for (int i = 0; i < 16 * 8; i++) start.host[(size_t)i] = (float)(i * 7 % 64);
    START_KERNEL(product_kernel<FORM>, 1, 32, 0, (cudaStream_t)0, d.device, a.send(), b.send(), start.send());
    d.fetch();
    for (int i = 0; i < 16 * 8; i++) {
        float want = start.host[(size_t)i];
        for (int k = 0; k < 16; k++) want += A[i / 8][k] * B[k][i % 8];
        expect(d.host[(size_t)i] == want, what, i, d.host[(size_t)i], want);
    }
}

/* --- copies ------------------------------------------------------------------------------------------------------- */

enum { SIZES = 3, COPIED = 32 * (4 + 8 + 16) };

/* Lane l copies l % (SIZE + 1) bytes of each SIZE, in a group for each; the next is started before the last is read. */
__global__ void copy_kernel(unsigned char *to, const unsigned char *from) {
    __shared__ __align__(16) unsigned char room[COPIED];
    int l = threadIdx.x;
    cp_async<16>(room + 16 * l, from + 16 * l, l % 17);
    cp_async_commit();
    cp_async<8>(room + 512 + 8 * l, from + 512 + 8 * l, l % 9);
    cp_async_commit();
    cp_async<4>(room + 768 + 4 * l, from + 768 + 4 * l, l % 5);
    cp_async_commit();
    cp_async_wait<2>();
    for (int i = 0; i < 16; i++) to[16 * l + i] = room[16 * l + i];
    cp_async_wait<0>();
    __syncthreads();
    for (int i = 512 + l; i < COPIED; i += 32) to[i] = room[i];
}

static void check_copies() {
    both<unsigned char> from(COPIED), to(COPIED);
    for (int i = 0; i < COPIED; i++) from.host[(size_t)i] = (unsigned char)(1 + i % 255);
    START_KERNEL(copy_kernel, 1, 32, 0, (cudaStream_t)0, to.device, from.send());
    to.fetch();
    for (int i = 0; i < COPIED; i++) {
        int size = i < 512 ? 16 : i < 768 ? 8 : 4, start = i < 512 ? 0 : i < 768 ? 512 : 768;
        int l = (i - start) / size, there = l % (size + 1);
        int want = (i - start) % size < there ? 1 + i % 255 : 0;
        expect(to.host[(size_t)i] == want, "cp_async, byte", i, to.host[(size_t)i], want);
    }
}

/* --- numbers ------------------------------------------------------------------------------------------------------ */

__global__ void number_kernel(uint32_t *packed, float *low, float *high, float *powers, float *inverses, const float *v,
                              int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    if (i >= n) return;
    packed[i] = pack_bf16(v[i], v[(i + 1) % n]);
    low[i] = low_bf16(packed[i]);
    high[i] = high_bf16(packed[i]);
    powers[i] = power_of_two(v[i]);
    inverses[i] = reciprocal(v[i]);
}

/* Nearest of the two neighbours, by their distance; the even one on a tie. */
static uint32_t nearest_bf16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    if (v != v) return 0x7fff;
    uint32_t down = bits >> 16, rest = bits & 0xffff;
    return rest > 0x8000 || (rest == 0x8000 && (down & 1)) ? down + 1 : down;
}

static void check_numbers() {
    static const float some[] = {0.0f, -0.0f, 1.0f, 1.00390625f, 1.01171875f, 1.0039063f, 3.4e38f, INFINITY, -INFINITY,
                                 NAN, 1e-40f, -126.0f, -126.5f, -127.0f, -149.0f, 127.0f, 127.99f, 128.0f, 1e-30f};
    const int n = 1024;
    both<float> v(n), low(n), high(n), powers(n), inverses(n);
    both<uint32_t> packed(n);
    for (int i = 0; i < n; i++)
        v.host[(size_t)i] = i < (int)(sizeof some / sizeof *some) ? some[i] : ldexpf(sinf((float)i), i % 15 - 7);
    START_KERNEL(number_kernel, 9, 128, 0, (cudaStream_t)0, packed.device, low.device, high.device, powers.device,
                 inverses.device, v.send(), n);
    packed.fetch(), low.fetch(), high.fetch(), powers.fetch(), inverses.fetch();
    for (int i = 0; i < n; i++) {
        size_t at = (size_t)i;
        uint32_t want = nearest_bf16(v.host[at]) | nearest_bf16(v.host[(at + 1) % n]) << 16;
        expect(packed.host[at] == want, "pack_bf16", i, packed.host[at], want);
        uint32_t parts[2] = {want << 16, want & 0xffff0000u};
        expect(memcmp(&low.host[at], &parts[0], 4) == 0, "low_bf16", i, low.host[at], v.host[at]);
        expect(memcmp(&high.host[at], &parts[1], 4) == 0, "high_bf16", i, high.host[at], v.host[(at + 1) % n]);
        double power = exp2((double)v.host[at]), got = powers.host[at];
        if (power < 0x1p-126) power = 0;
        if (power > 0x1.fffffep127) power = INFINITY;
        expect(got == power || fabs(got - power) <= 4e-7 * power || (got != got && power != power), "power_of_two", i,
               got, power);
        float argument = fabsf(v.host[at]) < 0x1p-126f ? copysignf(0, v.host[at]) : v.host[at];
        double inverse = 1 / (double)argument;
        got = inverses.host[at];
        if (fabs(inverse) < 0x1p-126) inverse = copysign(0, inverse);
        expect(got == inverse || fabs(got - inverse) <= 2e-7 * fabs(inverse) || (got != got && inverse != inverse),
               "reciprocal", i, got, inverse);
    }
}

/* --- lanes -------------------------------------------------------------------------------------------------------- */

enum { EXCHANGES = 18 };

__global__ void lanes_kernel(int *to, const int *from) {
    int l = threadIdx.x, v = from[l];
    unsigned half = l < 16 ? 0x0000ffffu : 0xffff0000u;
    int results[EXCHANGES] = {
        __shfl_sync(FULL, v, 5),
        __shfl_sync(FULL, v, l + 3),
        __shfl_sync(FULL, v, 9, 8),
        __shfl_xor_sync(FULL, v, 11),
        __shfl_xor_sync(FULL, v, 9, 8),
        __shfl_up_sync(FULL, v, 3),
        __shfl_up_sync(FULL, v, 3, 8),
        __shfl_down_sync(FULL, v, 3),
        __shfl_down_sync(FULL, v, 3, 16),
        __shfl_xor_sync(half, v, 7),
        (int)__ballot_sync(FULL, v % 3 == 0),
        (int)__ballot_sync(half, v % 3 == 0),
        __any_sync(FULL, v == from[7]),
        __all_sync(FULL, v != from[7]),
        (int)__reduce_add_sync(half, v),
        __reduce_min_sync(FULL, v),
        __reduce_max_sync(half, v),
        (int)__reduce_xor_sync(FULL, (unsigned)v),
    };
    for (int i = 0; i < EXCHANGES; i++) to[i * 32 + l] = results[i];
}

/* The same, of lane l, from all values. */
static void lanes_expected(int (&want)[EXCHANGES], const int *v, int l) {
    int first = l < 16 ? 0 : 16, group = l & ~7;
    int fixed[EXCHANGES] = {v[5], v[(l + 3) % 32], v[group + 1], v[l ^ 11],
                            v[(l ^ 9) < group + 8 ? l ^ 9 : l], /* lanes of a later group: its own value */
                            v[l >= 3 ? l - 3 : l], v[l % 8 >= 3 ? l - 3 : l], v[l < 29 ? l + 3 : l],
                            v[l % 16 < 13 ? l + 3 : l], v[l ^ 7], 0, 0, 1, 0, 0, v[0], v[first], 0};
    for (int i = 0; i < 32; i++) {
        bool near = i >= first && i < first + 16;
        if (v[i] % 3 == 0) fixed[10] |= (int)(1u << i);
        if (v[i] % 3 == 0 && near) fixed[11] |= (int)(1u << i);
        if (near) fixed[14] += v[i];
        if (v[i] < fixed[15]) fixed[15] = v[i];
        if (near && v[i] > fixed[16]) fixed[16] = v[i];
        fixed[17] ^= v[i];
    }
    memcpy(want, fixed, sizeof want);
}

static void check_lanes() {
    both<int> from(32), to(EXCHANGES * 32);
    for (int l = 0; l < 32; l++) from.host[(size_t)l] = (l * 7919 + 13) % 1009 - 500;
    START_KERNEL(lanes_kernel, 1, 32, 0, (cudaStream_t)0, to.device, from.send());
    to.fetch();
    for (int l = 0; l < 32; l++) {
        int want[EXCHANGES];
        lanes_expected(want, from.host.data(), l);
        for (int i = 0; i < EXCHANGES; i++) {
            char what[48];
            snprintf(what, sizeof what, "exchange %d of lanes_kernel, lane", i);
            expect(to.host[(size_t)(i * 32 + l)] == want[i], what, l, to.host[(size_t)(i * 32 + l)], want[i]);
        }
    }
}

/* --- the block ---------------------------------------------------------------------------------------------------- */

/* Reversal of a block through shared memory; the last warp's upper half returns early, and counts as having come. */
__global__ void block_kernel(int *to, int *odd, const int *from, int n) {
    DYNAMIC_SHARED(int, room);
    int i = (int)(threadIdx.x + blockDim.x * threadIdx.y);
    room[i] = from[i];
    __syncthreads();
    if (i >= n) return;
    int v = room[n - 1 - i];
    odd[i] = __syncthreads_count(v % 2 != 0);
    to[i] = v;
}

static void check_block() {
    const int threads = 96, n = 80;
    both<int> from((size_t)threads), to((size_t)n), odd((size_t)n);
    int want = 0;
    for (int i = 0; i < threads; i++) from.host[(size_t)i] = i * i % 37;
    for (int i = 0; i < n; i++) want += i * i % 37 % 2;
    START_KERNEL(block_kernel, 1, dim3(16, 6), threads * sizeof(int), (cudaStream_t)0, to.device, odd.device,
                 from.send(), n);
    to.fetch(), odd.fetch();
    for (int i = 0; i < n; i++) {
        int reversed = (n - 1 - i) * (n - 1 - i) % 37;
        expect(to.host[(size_t)i] == reversed, "a value behind __syncthreads", i, to.host[(size_t)i], reversed);
        expect(odd.host[(size_t)i] == want, "__syncthreads_count", i, odd.host[(size_t)i], want);
    }
}

/* --- clusters ----------------------------------------------------------------------------------------------------- */

enum { CLUSTER_ROUNDS = 5, CLUSTER_MOST = 8 };

/* Shared memory of a block: what comes from each block in two turns, and the flags. */
struct cluster_room {
    uint4 wide[2][CLUSTER_MOST][WARP];
    float2 narrow[2][CLUSTER_MOST][WARP];
    uint64_t flags[2];
};

/* Round after round each lane's number becomes the sum of that lane's numbers in all blocks, modulo 97; warp 0 sends
 * pairs, warp 1 the same in sixteen bytes. to: the numbers of both warps; odd: how much that came was not what was
 * sent. */
__global__ void cluster_kernel(float *to, int *odd) {
#ifndef WITHOUT_CLUSTERS
    DYNAMIC_SHARED(char, memory);
    cluster_room *room = reinterpret_cast<cluster_room *>(memory);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int rank = (int)cluster_rank(), blocks = (int)cluster_blocks();
    unsigned bytes = (unsigned)(blocks * WARP * (sizeof(uint4) + sizeof(float2)));
    float v = (float)(blockIdx.x * WARP + lane);
    int wrong = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) flag_open(&room->flags[i]);
        flags_opened();
        for (int i = 0; i < 2; i++) flag_expect(&room->flags[i], bytes);
    }
    cluster_arrive();
    cluster_wait();
    for (int round = 0; round < CLUSTER_ROUNDS; round++) {
        int turn = round % 2;
        for (int b = 0; b < blocks; b++) {
            cluster_place flag = place_in(&room->flags[turn], (unsigned)b);
            if (warp == 0)
                send_8(place_in(&room->narrow[turn][rank][lane], (unsigned)b), make_float2(v, (float)round), flag);
            else
                send_16(place_in(&room->wide[turn][rank][lane], (unsigned)b),
                        make_uint4((unsigned)rank, (unsigned)lane, (unsigned)round, __float_as_uint(v)), flag);
        }
        flag_wait(&room->flags[turn], (unsigned)(round / 2 % 2));
        if (threadIdx.x == 0 && round + 2 < CLUSTER_ROUNDS) flag_expect(&room->flags[turn], bytes);
        v = 0;
        for (int b = 0; b < blocks; b++) {
            float2 narrow = room->narrow[turn][b][lane];
            uint4 wide = room->wide[turn][b][lane];
            wrong += narrow.y != (float)round || wide.x != (unsigned)b || wide.y != (unsigned)lane ||
                     wide.z != (unsigned)round || __uint_as_float(wide.w) != narrow.x;
            v += narrow.x;
        }
        v = fmodf(v, 97.0f);
    }
    to[(blockIdx.x * 2 + warp) * WARP + lane] = v;
    odd[blockIdx.x * 2 * WARP + threadIdx.x] = wrong;
    cluster_arrive();
    cluster_wait();
#endif
}

static void check_clusters(unsigned blocks) {
    enum { CLUSTERS = 3 };
    unsigned grid = CLUSTERS * blocks;
    both<float> to(grid * 2 * WARP);
    both<int> odd(grid * 2 * WARP);
    if (!clusters_fit(cluster_kernel, 2 * WARP, blocks, sizeof(cluster_room))) return; /* a chip without */
    START_CLUSTERS(cluster_kernel, grid, 2 * WARP, blocks, sizeof(cluster_room), (cudaStream_t)0, to.device,
                   odd.device);
    to.fetch();
    odd.fetch();
    for (unsigned i = 0; i < grid * 2 * WARP; i++) {
        unsigned first = i / (2 * WARP) / blocks * blocks, lane = i % WARP;
        float want = 0;
        for (unsigned b = 0; b < blocks; b++) want += (float)((first + b) * WARP + lane);
        want = fmodf(want, 97.0f);
        for (int round = 1; round < CLUSTER_ROUNDS; round++) want = fmodf(want * (float)blocks, 97.0f);
        expect(to.host[i] == want, "a sum over a cluster", (int)i, to.host[i], want);
        expect(odd.host[i] == 0, "what came to a cluster's block", (int)i, odd.host[i], 0);
    }
}

/* --- products of a warpgroup -------------------------------------------------------------------------------------- */

enum { SIDE = TILE_COLUMNS };

/* scores = a b^T; sums = scores + scores, rounded, times b; shared = a b. All 64 x 64. */
__global__ void __launch_bounds__(WARPGROUP)
group_kernel(float *scores, float *sums, float *shared, const __nv_bfloat16 *a, const __nv_bfloat16 *b) {
#ifndef WITHOUT_WGMMA
    DYNAMIC_SHARED(__nv_bfloat16, room_of_group);
    __nv_bfloat16 *tile_a = tile_start(room_of_group), *tile_b = tile_a + SIDE * SIDE;
    for (int i = threadIdx.x; i < SIDE * SIDE / 8; i += WARPGROUP) {
        int row = i / 8, at = row * SIDE + (i % 8 ^ row % 8) * 8;
        cp_async_16(tile_a + at, a + 8 * i);
        cp_async_16(tile_b + at, b + 8 * i);
    }
    cp_async_commit();
    cp_async_wait<0>();
    shared_for_products();
    __syncthreads();
    float z[8][4], sum[8][4], both_shared[8][4];
    uint32_t first[4][4];
    products_begin();
#pragma unroll
    for (int k = 0; k < SIDE; k += 16)
        product_of_rows(z, matrix_columns(matrix_at(tile_a), k), matrix_columns(matrix_at(tile_b), k), k > 0);
    products_end();
    products_begin();
#pragma unroll
    for (int k = 0; k < SIDE; k += 16)
        product_of_rows(sum, matrix_columns(matrix_at(tile_a), k), matrix_columns(matrix_at(tile_b), k), k > 0);
    products_end();
    products_wait<1>();
    arrived(z);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            first[k][r] = pack_bf16(z[2 * k + r / 2][r % 2 * 2], z[2 * k + r / 2][r % 2 * 2 + 1]);
    products_wait<0>();
    arrived(sum);
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) product_of_columns(sum, first[k], matrix_rows(matrix_at(tile_b), 16 * k));
#pragma unroll
    for (int k = 0; k < SIDE; k += 16)
        product_of_columns(both_shared, matrix_columns(matrix_at(tile_a), k), matrix_rows(matrix_at(tile_b), k), k > 0);
    products_end();
    products_wait<0>();
    arrived(sum);
    arrived(both_shared);
    arrived(first);
    for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++) {
            int row = threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4 + e / 2 * 8;
            int at = row * SIDE + 8 * n + 2 * (threadIdx.x % 4) + e % 2;
            scores[at] = z[n][e], sums[at] = sum[n][e], shared[at] = both_shared[n][e];
        }
#endif
}

static void check_groups() {
    both<float> scores(SIDE * SIDE), sums(SIDE * SIDE), shared(SIDE * SIDE);
    both<__nv_bfloat16> a(SIDE * SIDE), b(SIDE * SIDE);
    if (!products_fit(group_kernel)) return; /* a chip without */
    for (int i = 0; i < SIDE * SIDE; i++) {
        a.host[i] = (float)((i * 7 + i / SIDE) % 4 == 0) * (float)(i % 3 - 1);
        b.host[i] = (float)((i * 5 + i / SIDE * 3) % 11 % 3 - 1);
    }
    size_t bytes = TILE_ALIGN + 2 * SIDE * SIDE * sizeof(__nv_bfloat16);
    START_KERNEL(group_kernel, 1, WARPGROUP, bytes, (cudaStream_t)0, scores.device, sums.device, shared.device,
                 a.send(), b.send());
    scores.fetch();
    sums.fetch();
    shared.fetch();
    for (int i = 0; i < SIDE; i++) {
        float row[SIDE] = {0};
        for (int j = 0; j < SIDE; j++) {
            for (int k = 0; k < SIDE; k++) row[j] += (float)a.host[i * SIDE + k] * (float)b.host[j * SIDE + k];
            expect(scores.host[i * SIDE + j] == row[j], "product_of_rows, element", i * SIDE + j,
                   scores.host[i * SIDE + j], row[j]);
        }
        for (int n = 0; n < SIDE; n++) {
            float sum = row[n];
            for (int j = 0; j < SIDE; j++) sum += row[j] * (float)b.host[j * SIDE + n];
            expect(sums.host[i * SIDE + n] == sum, "product_of_columns, element", i * SIDE + n, sums.host[i * SIDE + n],
                   sum);
            sum = 0;
            for (int j = 0; j < SIDE; j++) sum += (float)a.host[i * SIDE + j] * (float)b.host[j * SIDE + n];
            expect(shared.host[i * SIDE + n] == sum, "product_of_columns, both shared, element", i * SIDE + n,
                   shared.host[i * SIDE + n], sum);
        }
    }
}

int main() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("there is no GPU\n");
        return 77;
    }
    check_product<FROM_REGISTERS>("mma_bf16_m16n8k16, element");
    check_product<FROM_ROWS>("ldmatrix_x4, ldmatrix_x2 and mma, element");
    check_product<FROM_COLUMNS>("ldmatrix_x4_transposed, ldmatrix_x2_transposed and mma, element");
    check_product<HALF_DEPTH>("mma_bf16_m16n8k8, element");
    check_copies();
    check_numbers();
    check_lanes();
    check_block();
    for (unsigned blocks = 1; blocks <= CLUSTER_MOST; blocks++) check_clusters(blocks);
    check_groups();
    cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) fprintf(stderr, "instructions: %s\n", cudaGetErrorString(error));
    if (differences > 0) fprintf(stderr, "instructions: %d differences\n", differences);
    else if (error == cudaSuccess) printf("all instructions do what is said of them\n");
    return differences > 0 || error != cudaSuccess;
}
