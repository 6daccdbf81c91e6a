/* cublas.cc: see cublasLt.h and dlfcn.h. */
#include "cublasLt.h"
#include "cuda_bf16.h"
#include "dlfcn.h"

#include <vector>

struct emulated_blas {
    int unused;
};

struct emulated_product {
    int32_t trans_a, trans_b, device_scalars, epilogue, bias_type, processors;
    const void *bias;
};

struct emulated_layout {
    cudaDataType type;
    int64_t rows, columns, step, batch, batch_step;
};

struct emulated_preference {
    uint64_t align[4]; /* of a, b, c, d */
};

const char *cublasLtGetStatusString(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED (by the emulation)";
    }
    return "an unknown status";
}

/* --- descriptions ------------------------------------------------------------------------------------------------- */

/* Set *to from an attribute's value if that has the right size. */
template <class T> static cublasStatus_t take(T *to, const void *value, size_t size) {
    if (size != sizeof *to) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *to) {
    *to = new emulated_blas();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t blas) {
    delete blas;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion() {
    return 0;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *to, cublasComputeType_t compute, cudaDataType_t scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    *to = new emulated_product{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_POINTER_MODE_HOST, CUBLASLT_EPILOGUE_DEFAULT, -1,
                               0, NULL};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) {
    delete product;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t what,
                                              const void *value, size_t size) {
    switch (what) {
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET: return take(&product->processors, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSA: return take(&product->trans_a, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return take(&product->trans_b, value, size);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return take(&product->device_scalars, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return take(&product->epilogue, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return take(&product->bias, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return take(&product->bias_type, value, size);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *to, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t step) {
    if (type != CUDA_R_32F && type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (step < (int64_t)rows) return CUBLAS_STATUS_INVALID_VALUE;
    *to = new emulated_layout{type, (int64_t)rows, (int64_t)columns, step, 1, 0};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t what,
                                                const void *value, size_t size) {
    int32_t count;
    cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) return take(&layout->batch_step, value, size);
    if (what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) status = take(&count, value, size);
    if (status == CUBLAS_STATUS_SUCCESS) layout->batch = count;
    return status;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *to) {
    *to = new emulated_preference{{256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t what, const void *value,
                                                    size_t size) {
    if (what < CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) return CUBLAS_STATUS_SUCCESS;
    uint32_t align;
    cublasStatus_t status = take(&align, value, size);
    if (status == CUBLAS_STATUS_SUCCESS) preference->align[what - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES] = align;
    return status;
}

/* --- the product -------------------------------------------------------------------------------------------------- */

static bool shapes_fit(const emulated_product *p, const emulated_layout *a, const emulated_layout *b,
                       const emulated_layout *c, const emulated_layout *d) {
    int64_t a_rows = p->trans_a ? a->columns : a->rows, a_columns = p->trans_a ? a->rows : a->columns;
    int64_t b_rows = p->trans_b ? b->columns : b->rows, b_columns = p->trans_b ? b->rows : b->columns;
    return a_rows == d->rows && a_columns == b_rows && b_columns == d->columns && c->rows == d->rows &&
           c->columns == d->columns && a->batch == d->batch && b->batch == d->batch && c->batch == d->batch &&
           a->type == b->type && c->type == d->type;
}

/* What an algorithm keeps: the alignments that were promised for it, and its tile, by number. */
enum { ALGO_TILE = 4 };

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t what, void *value, size_t size,
                                                    size_t *written) {
    int32_t tile = (int32_t)algo->data[ALGO_TILE];
    if (what != CUBLASLT_ALGO_CONFIG_TILE_ID || size != sizeof tile) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(value, &tile, sizeof tile);
    *written = sizeof tile;
    return CUBLAS_STATUS_SUCCESS;
}

/* Several proposals, alike but for the number of their tile. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = 0;
    if (most < 1 || !shapes_fit(product, a, b, c, d)) return CUBLAS_STATUS_INVALID_VALUE;
    if (product->epilogue != CUBLASLT_EPILOGUE_DEFAULT && product->epilogue != CUBLASLT_EPILOGUE_BIAS)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    static const uint64_t tiles[] = {24, 209, 29, 201, 23};
    for (; *found < most && *found < (int)(sizeof tiles / sizeof *tiles); ++*found) {
        cublasLtMatmulHeuristicResult_t *result = &results[*found];
        memset(result, 0, sizeof *result);
        memcpy(result->algo.data, preference->align, sizeof preference->align);
        result->algo.data[ALGO_TILE] = tiles[*found];
    }
    return CUBLAS_STATUS_SUCCESS;
}

static float element(const void *data, cudaDataType type, int64_t at) {
    return type == CUDA_R_32F ? ((const float *)data)[at] : (float)((const __nv_bfloat16 *)data)[at];
}

static void set_element(void *data, cudaDataType type, int64_t at, float v) {
    if (type == CUDA_R_32F) ((float *)data)[at] = v;
    else ((__nv_bfloat16 *)data)[at] = __nv_bfloat16(v);
}

/* What a call computes, by value: it may be kept in a graph. */
struct blas_call {
    emulated_product product;
    emulated_layout a, b, c, d;
    const void *a_data, *b_data, *c_data, *alpha, *beta;
    void *d_data;
    float alpha_value, beta_value; /* unless the scalars are on the device */
};

/* op(X) (rows, columns), row-major, in float. */
static std::vector<float> gather(const void *data, const emulated_layout &x, bool transposed, int64_t batch) {
    int64_t rows = transposed ? x.columns : x.rows, columns = transposed ? x.rows : x.columns;
    int64_t down = transposed ? x.step : 1, across = transposed ? 1 : x.step;
    std::vector<float> matrix((size_t)(rows * columns));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            matrix[(size_t)(i * columns + j)] = element(data, x.type, batch * x.batch_step + i * down + j * across);
    return matrix;
}

static void multiply(const blas_call &call, int64_t batch) {
    enum { PIECE = 256 };
    const emulated_layout &c = call.c, &d = call.d;
    bool on_device = call.product.device_scalars;
    float alpha = on_device ? *(const float *)call.alpha : call.alpha_value;
    float beta = on_device ? *(const float *)call.beta : call.beta_value;
    std::vector<float> a = gather(call.a_data, call.a, call.product.trans_a, batch);
    std::vector<float> b = gather(call.b_data, call.b, call.product.trans_b, batch);
    int64_t rows = d.rows, columns = d.columns, K = (int64_t)a.size() / rows;
    cudaDataType bias_type = call.product.bias_type < 0 ? d.type : (cudaDataType)call.product.bias_type;
    std::vector<float> sum((size_t)columns), piece((size_t)columns);
    for (int64_t i = 0; i < rows; i++) {
        float bias = call.product.epilogue == CUBLASLT_EPILOGUE_BIAS ? element(call.product.bias, bias_type, i) : 0;
        for (float &s : sum) s = 0;
        for (int64_t k0 = 0; k0 < K; k0 += PIECE) { /* sums of pieces, as a GPU's: fp32 loses less in them */
            for (float &s : piece) s = 0;
            for (int64_t k = k0; k < K && k < k0 + PIECE; k++) {
                float one = a[(size_t)(i * K + k)];
                const float *row = &b[(size_t)(k * columns)];
                for (int64_t j = 0; j < columns; j++) piece[(size_t)j] += one * row[j];
            }
            for (int64_t j = 0; j < columns; j++) sum[(size_t)j] += piece[(size_t)j];
        }
        for (int64_t j = 0; j < columns; j++) {
            float before = beta != 0 ? beta * element(call.c_data, c.type, batch * c.batch_step + i + j * c.step) : 0;
            set_element(call.d_data, d.type, batch * d.batch_step + i + j * d.step,
                        alpha * sum[(size_t)j] + before + bias);
        }
    }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *, size_t,
                              cudaStream_t stream) {
    if (!shapes_fit(product, a_layout, b_layout, c_layout, d_layout)) return CUBLAS_STATUS_INVALID_VALUE;
    const void *data[4] = {a, b, c, d};
    for (int i = 0; algo && i < 4; i++)
        if ((uintptr_t)data[i] % algo->data[i] != 0)
            emulation::misuse("cublasLtMatmul: operand %c at %p is not aligned to the %d bytes that were promised",
                              "abcd"[i], data[i], (int)algo->data[i]);
    blas_call call = {*product, *a_layout, *b_layout, *c_layout, *d_layout, a, b, c, alpha, beta, d, 0, 0};
    if (!product->device_scalars) {
        call.alpha_value = *(const float *)alpha;
        call.beta_value = *(const float *)beta;
    }
    std::function<void()> work = [call] {
        for (int64_t batch = 0; batch < call.d.batch; batch++) multiply(call, batch);
    };
    /* One that leaves multiprocessors free is meant to go beside other work. */
    if (product->processors) emulation::submit_beside(stream, work);
    else emulation::submit(work);
    return CUBLAS_STATUS_SUCCESS;
}

/* --- loading ------------------------------------------------------------------------------------------------------ */

static const struct emulated_function functions[] = {
#define FUNCTION(name) {#name, (void *)name}
    FUNCTION(cublasLtCreate), FUNCTION(cublasLtDestroy), FUNCTION(cublasLtGetStatusString),
    FUNCTION(cublasLtGetVersion), FUNCTION(cublasLtMatmul), FUNCTION(cublasLtMatmulAlgoConfigGetAttribute),
    FUNCTION(cublasLtMatmulAlgoGetHeuristic), FUNCTION(cublasLtMatmulDescCreate), FUNCTION(cublasLtMatmulDescDestroy),
    FUNCTION(cublasLtMatmulDescSetAttribute), FUNCTION(cublasLtMatmulPreferenceCreate),
    FUNCTION(cublasLtMatmulPreferenceDestroy), FUNCTION(cublasLtMatmulPreferenceSetAttribute),
    FUNCTION(cublasLtMatrixLayoutCreate), FUNCTION(cublasLtMatrixLayoutDestroy),
    FUNCTION(cublasLtMatrixLayoutSetAttribute),
#undef FUNCTION
    {NULL, NULL},
};

/* A library is its list of functions. */
void *emulated_dlopen(const char *name, int) {
    if (strncmp(name, "libcublasLt.so", 14) == 0) return (void *)functions;
    return strncmp(name, "libnccl.so", 10) == 0 ? (void *)emulated_nccl : NULL;
}

void *emulated_dlsym(void *library, const char *name) {
    for (const struct emulated_function *f = (const struct emulated_function *)library; f->name; f++)
        if (strcmp(f->name, name) == 0) return f->function;
    return NULL;
}

const char *emulated_dlerror() {
    return "the emulated device has no such library";
}

int emulated_dlclose(void *) {
    return 0;
}
