/* linear.cu: y = x w^T (+ bias) and its gradients, through cuBLASLt; and the matrix products of the other operations.
 *
 *   y = x w^T + bias          dx (+)= dy w          dw += dy^T x          dbias += column sums of dy
 *
 * fp32 is computed in fp32 (no TF32); bf16 operands are multiplied exactly and added in fp32. dw is fp32 with bf16
 * operands: the product adds to it in its epilogue.
 *
 * cuBLASLt counts columns first, so a row-major matrix is its transpose. A plan (descriptor, layouts, algorithm) is
 * made once for a shape, with its types, row steps and the alignment of its pointers, and kept for the life of the
 * device; the algorithm is one of the library's proposals for that shape, by a rule that depends on nothing measured at
 * run time (below). Several products of one shape whose matrices follow each other (block_linear.cu) are one call.
 * 2 R I O FLOPs for each product.
 */
#include "kernels/cuda/gemm.cuh"

#include <dlfcn.h>
#include <stdlib.h>

/* --- the library -------------------------------------------------------------------------------------------------- */

#define TEXT_OF(number) #number
#define LIBRARY_NAME(major) "libcublasLt.so." TEXT_OF(major)

int cublas_load(struct cublas *blas, error *err) {
    const char *name = LIBRARY_NAME(CUBLAS_VER_MAJOR);
    blas->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!blas->library)
        return error_system(err, "a GPU computes with CUDA's %s, which can't be loaded here (%s): install the CUDA "
                                 "toolkit's libraries, or choose device cpu", name, dlerror());
#define CUBLAS_FIND(function)                                                                                          \
    blas->function = (decltype(blas->function))dlsym(blas->library, #function);                                        \
    if (!blas->function) return error_system(err, "%s lacks the function %s", name, #function);
    CUBLAS_FUNCTIONS(CUBLAS_FIND)
#undef CUBLAS_FIND
    return 0;
}

/* --- plans -------------------------------------------------------------------------------------------------------- */

/* What a plan is made for. Compared as bytes, so it is zeroed before it is filled. */
struct gemm_key {
    int64_t m, n, k;
    int64_t lda, ldb, ldc;
    int64_t count, next_a, next_b, next_c;
    int32_t trans_a, trans_b, type_ab, type_c;
    int32_t align_a, align_b, align_c;
    int32_t processors; /* multiprocessors to be taken; 0: all */
};

struct gemm_plan {
    struct gemm_key key;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
    struct gemm_plan *next;
};

void cuda_linear_close(struct cuda_device *c) {
    const struct cublas *lt = &c->library;
    for (struct gemm_plan *p = c->plans, *next; p; p = next) {
        next = p->next;
        lt->cublasLtMatmulDescDestroy(p->operation);
        lt->cublasLtMatrixLayoutDestroy(p->a);
        lt->cublasLtMatrixLayoutDestroy(p->b);
        lt->cublasLtMatrixLayoutDestroy(p->c);
        free(p);
    }
    c->plans = NULL;
}

/* The largest power of two up to 256 that divides the addresses of all `count` matrices. */
static int32_t alignment(struct gemm_operand o, int64_t count) {
    uintptr_t address = (uintptr_t)o.data | 256;
    if (count > 1) address |= (uintptr_t)o.next * dtype_size(o.dtype);
    return (int32_t)(address & (~address + 1));
}

static cudaDataType type_of(enum dtype dtype) {
    ASSERT(dtype == DTYPE_F32 || dtype == DTYPE_BF16);
    return dtype == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

#define TRY_BLAS(call)                                                                                                 \
    do {                                                                                                               \
        cublasStatus_t status = (call);                                                                                \
        if (status != CUBLAS_STATUS_SUCCESS) return status;                                                            \
    } while (0)

static cublasStatus_t layout_create(cublasLtMatrixLayout_t *to, const struct cublas *lt, cudaDataType type,
                                    int64_t rows, int64_t columns, int64_t step, int64_t count, int64_t next) {
    int32_t batch = (int32_t)count;
    TRY_BLAS(lt->cublasLtMatrixLayoutCreate(to, type, (uint64_t)rows, (uint64_t)columns, step));
    if (count == 1) return CUBLAS_STATUS_SUCCESS;
    TRY_BLAS(lt->cublasLtMatrixLayoutSetAttribute(*to, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
    return lt->cublasLtMatrixLayoutSetAttribute(*to, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &next, sizeof next);
}

/* cuBLASLt's view: C^T (n x m) = op(B)^T op(A)^T, all column-major, so its first operand is our b. */
static cublasStatus_t plan_describe(struct gemm_plan *p, const struct cublas *lt) {
    const struct gemm_key *k = &p->key;
    cublasOperation_t first = k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cudaDataType ab = (cudaDataType)k->type_ab, c = (cudaDataType)k->type_c;
    TRY_BLAS(lt->cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    TRY_BLAS(lt->cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
    TRY_BLAS(lt->cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
    if (k->processors)
        TRY_BLAS(lt->cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, &k->processors,
                                                    sizeof k->processors));
    int64_t a_rows = k->trans_a ? k->m : k->k, a_columns = k->trans_a ? k->k : k->m;
    int64_t b_rows = k->trans_b ? k->k : k->n, b_columns = k->trans_b ? k->n : k->k;
    TRY_BLAS(layout_create(&p->a, lt, ab, a_rows, a_columns, k->lda, k->count, k->next_a));
    TRY_BLAS(layout_create(&p->b, lt, ab, b_rows, b_columns, k->ldb, k->count, k->next_b));
    return layout_create(&p->c, lt, c, k->n, k->m, k->ldc, k->count, k->next_c);
}

/* --- the choice of an algorithm -----------------------------------------------------------------------------------
 *
 * The library proposes up to eight algorithms, first what its own model of the chip likes best. Others are taken by
 * what was measured on H100s under a load that lasts, where power bounds the clock; a proposal is known by its tile.
 *
 * - Short sums into a large matrix: with k of 768 to 2,048 a tile of 192 x 192 or 256 x 128 of bf16 is stored for a
 *   tenth and more of the time it is computed in, and its multiprocessor waits; fp32 that is added to what is there has
 *   four times the bytes, so it does with k of 5,000. Of tiles of 128 x 128 to 176 x 128 two are at work on a
 *   multiprocessor in turns, one stored while the other is computed: 7 to 18 % less time for bf16, 4 % for fp32. Of
 *   several such tiles the largest is best. With few tiles to a multiprocessor, or long sums, larger ones stay better.
 * - 128 x 256 in place of 256 x 128: up to 8 % less time, never more than 0.2 % more.
 */
enum { PROPOSALS = 8, MULTIPROCESSORS = 132 /* whatever the device has: the choice is part of the result's bits */ };

/* Tiles by their numbers in cublasLtMatmulTile_t, for some of which older headers have no names. */
enum { TILE_128X256 = 23, TILE_256X128 = 24 };
static const struct {
    int id, rows, columns;
} paired_tiles[] = {{20, 128, 128}, {29, 128, 160}, {197, 168, 128}, {201, 176, 128}};

/* Waves of tiles of 256 x 128 that a result has at least. */
static bool has_waves(const struct gemm_key *k, int64_t waves) {
    return k->count == 1 && k->m * k->n >= waves * MULTIPROCESSORS * 256 * 128;
}

static bool stores_much(const struct gemm_key *k) {
    return k->k <= (k->type_c == CUDA_R_16BF ? 2048 : 8192) && has_waves(k, 8);
}

static int tile_of(const struct cublas *lt, const cublasLtMatmulAlgo_t *algorithm) {
    int tile = 0;
    size_t written;
    lt->cublasLtMatmulAlgoConfigGetAttribute(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile, &written);
    return tile;
}

/* How many tiles that work in pairs a matrix has; of others, more than any. The library's rows are our columns. */
static int64_t paired_count(const struct gemm_key *k, int tile) {
    for (const auto &t : paired_tiles)
        if (t.id == tile) return ceil_div(k->n, t.rows) * ceil_div(k->m, t.columns);
    return INT64_MAX;
}

/* The proposal to take. */
static int choose(const struct cublas *lt, const struct gemm_key *k, const cublasLtMatmulHeuristicResult_t *proposals,
                  int found) {
    int best = 0;
    int64_t fewest = INT64_MAX;
    if (k->type_ab != CUDA_R_16BF) return 0;
    bool turned = tile_of(lt, &proposals[0].algo) == TILE_256X128 && has_waves(k, 1) &&
                  ceil_div(k->n, 128) * ceil_div(k->m, 256) <= ceil_div(k->n, 256) * ceil_div(k->m, 128);
    for (int i = 0; i < found; i++) {
        int tile = tile_of(lt, &proposals[i].algo);
        int64_t tiles = stores_much(k) ? paired_count(k, tile) : INT64_MAX;
        if (tiles < fewest) fewest = tiles, best = i;
        if (turned && best == 0 && tile == TILE_128X256) best = i;
    }
    return best;
}

static cublasStatus_t plan_choose(struct gemm_plan *p, struct cuda_device *c) {
    const struct cublas *lt = &c->library;
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t proposals[PROPOSALS];
    int found = 0;
    uint32_t a = (uint32_t)p->key.align_b, b = (uint32_t)p->key.align_a, out = (uint32_t)p->key.align_c;
    TRY_BLAS(lt->cublasLtMatmulPreferenceCreate(&wish));
    cublasStatus_t status = lt->cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                                 &c->workspace_size, sizeof c->workspace_size);
    const cublasLtMatmulPreferenceAttributes_t names[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    const uint32_t values[4] = {a, b, out, out};
    for (int i = 0; i < 4 && status == CUBLAS_STATUS_SUCCESS; i++)
        status = lt->cublasLtMatmulPreferenceSetAttribute(wish, names[i], &values[i], sizeof values[i]);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = lt->cublasLtMatmulAlgoGetHeuristic(c->blas, p->operation, p->b, p->a, p->c, p->c, wish, PROPOSALS,
                                                    proposals, &found);
    lt->cublasLtMatmulPreferenceDestroy(wish);
    if (status == CUBLAS_STATUS_SUCCESS && found == 0) status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (status == CUBLAS_STATUS_SUCCESS) p->algorithm = proposals[choose(lt, &p->key, proposals, found)].algo;
    return status;
}

static struct gemm_plan *plan_for(struct device *dev, const struct gemm_key *key) {
    struct cuda_device *c = cuda_impl(dev);
    for (struct gemm_plan *p = c->plans; p; p = p->next)
        if (memcmp(&p->key, key, sizeof *key) == 0) return p;
    struct gemm_plan *p = (struct gemm_plan *)calloc(1, sizeof *p);
    if (!p) {
        cuda_keep_failure(dev, "a matrix product", "out of host memory");
        return NULL;
    }
    p->key = *key;
    p->next = c->plans;
    c->plans = p;
    cublasStatus_t status = plan_describe(p, &c->library);
    if (status == CUBLAS_STATUS_SUCCESS) status = plan_choose(p, c);
    if (status == CUBLAS_STATUS_SUCCESS) return p;
    cuda_keep_failure(dev, "setting up a matrix product", c->library.cublasLtGetStatusString(status));
    return NULL;
}

void cuda_gemm(struct device *dev, struct gemm_operand a, struct gemm_operand b, struct gemm_operand to, int64_t m,
               int64_t n, int64_t k, float alpha, float beta, int64_t count) {
    struct cuda_device *c = cuda_impl(dev);
    if (m == 0 || n == 0 || count == 0) return;
    ASSERT(a.dtype == b.dtype);
    if (k == 0) { /* an empty sum, which the library doesn't know */
        size_t size = dtype_size(to.dtype);
        for (int64_t i = 0; beta == 0 && i < count; i++)
            cuda_expect(dev, cudaMemset2DAsync((char *)to.data + (size_t)(i * to.next) * size, (size_t)to.step * size,
                                               0, (size_t)n * size, (size_t)m, c->stream), "a matrix product");
        return;
    }
    struct gemm_key key;
    memset(&key, 0, sizeof key);
    key.m = m, key.n = n, key.k = k;
    key.lda = a.step, key.ldb = b.step, key.ldc = to.step;
    key.count = count;
    if (count > 1) key.next_a = a.next, key.next_b = b.next, key.next_c = to.next;
    key.trans_a = a.transposed, key.trans_b = b.transposed;
    key.type_ab = type_of(a.dtype), key.type_c = type_of(to.dtype);
    key.align_a = alignment(a, count), key.align_b = alignment(b, count), key.align_c = alignment(to, count);
    if (c->aside) key.processors = c->multiprocessors * 3 / 4; /* beside.cu */
    struct gemm_plan *p = plan_for(dev, &key);
    if (!p) return;
    cublasStatus_t status = c->library.cublasLtMatmul(c->blas, p->operation, &alpha, b.data, p->b, a.data, p->a, &beta,
                                           to.data, p->c, to.data, p->c, &p->algorithm, c->workspace, c->workspace_size,
                                           c->stream);
    if (status != CUBLAS_STATUS_SUCCESS)
        cuda_keep_failure(dev, "a matrix product", c->library.cublasLtGetStatusString(status));
}

/* --- the operation ------------------------------------------------------------------------------------------------ */

template <class T> __global__ void add_bias_kernel(T *y, const float *bias, int64_t step, int64_t O) {
    T *row = y + blockIdx.x * step;
    for (int64_t i = threadIdx.x; i < O; i += blockDim.x) row[i] = from_float<T>(to_float(row[i]) + bias[i]);
}

extern "C" void cuda_linear_forward(struct device *dev, tensor y, tensor x, tensor w, tensor bias) {
    int64_t R = x.dim[0], I = x.dim[1], O = w.dim[0];
    ASSERT(tensor_is(y, 2, R, O) && w.dim[1] == I && (!tensor_given(bias) || tensor_is(bias, 1, O)));
    cuda_gemm(dev, gemm_rows(x), gemm_transposed(w), gemm_rows(y), R, O, I, 1, 0);
    if (!tensor_given(bias)) return;
    ASSERT(bias.dtype == DTYPE_F32);
    with_type(y.dtype, [&](auto of_type) {
        using T = decltype(of_type);
        LAUNCH(dev, add_bias_kernel<T>, (unsigned)R, 256, 0, data_of<T>(y), data_of<float>(bias), y.stride[0], O);
    });
}

enum { MANY_TOKENS = 8192, BESIDE_MOST = 1 << 23 };

/* The first rows of dw (O, I) that take whole waves: turns of all multiprocessors, a tile of 128 rows and 256 columns
 * each. All rows, unless that leaves a last wave with few tiles, whose time is that of a full one. */
static int64_t whole_waves(int64_t O, int64_t I) {
    int64_t across = ceil_div(I, 256), tiles = ceil_div(O, 128) * across, waves = tiles / MULTIPROCESSORS;
    int64_t rows = waves * MULTIPROCESSORS / across * 128;
    return 4 * (tiles - waves * MULTIPROCESSORS) < MULTIPROCESSORS && rows < O && rows > 0 ? rows : O;
}

/* dw (+)= dy^T x, over many tokens in two parts: rows that take whole waves, and the rest, for which the library has
 * smaller tiles or parts of sums. 8,512 x 2,048 goes in 8,448 and 64 rows, four waves and 0.04 ms instead of five. */
static void weight_gradient(struct device *dev, tensor dw, tensor dy, tensor x) {
    int64_t R = x.dim[0], I = x.dim[1], O = dw.dim[0], most = O;
    if (O * I >= BESIDE_MOST) cuda_impl(dev)->aside = false; /* too much to go beside other work: beside.cu */
    if (x.dtype == DTYPE_BF16 && R >= MANY_TOKENS) most = whole_waves(O, I);
    for (int64_t from = 0; from < O; from += most) {
        int64_t count = at_most(O - from, most);
        struct gemm_operand rows = gemm_transposed(tensor_columns(dy, from, count)), to = gemm_rows(dw);
        to.data = data_of<float>(dw) + from * to.step;
        cuda_gemm(dev, rows, gemm_rows(x), to, count, I, R, 1, dw.empty ? 0 : 1);
    }
}

extern "C" void cuda_linear_backward(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dbias, tensor dy,
                                     tensor x, tensor w) {
    int64_t R = x.dim[0], I = x.dim[1], O = w.dim[0];
    ASSERT(tensor_is(dy, 2, R, O) && w.dim[1] == I);
    if (tensor_given(dx)) cuda_gemm(dev, gemm_rows(dy), gemm_rows(w), gemm_rows(dx), R, I, O, 1, add_dx ? 1 : 0);
    if (tensor_given(dw)) weight_gradient(dev, dw, dy, x);
    if (tensor_given(dbias)) cuda_add_column_sums(dev, data_of<float>(dbias), dy);
}
