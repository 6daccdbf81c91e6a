/* tensor.c: tensor views: making them, cutting them, asking about them. Nothing here touches the elements.
 *
 * A view over NULL (an absent argument, or an arena that only measures) stays NULL whatever is cut from it, so that the
 * code which carves memory can run on an arena that only counts. Called from every layer above common/. */
#include "kernels/tensor.h"
#include "common/error.h"
#include <stdarg.h>

static const struct {
    size_t size;
    const char *name;
} dtypes[DTYPE_COUNT] = {
    [DTYPE_F32] = {4, "f32"}, [DTYPE_F64] = {8, "f64"}, [DTYPE_BF16] = {2, "bf16"}, [DTYPE_F16] = {2, "f16"},
    [DTYPE_I32] = {4, "i32"}, [DTYPE_I64] = {8, "i64"}, [DTYPE_U8] = {1, "u8"},
};

size_t dtype_size(enum dtype dtype) {
    ASSERT((unsigned)dtype < DTYPE_COUNT);
    return dtypes[dtype].size;
}

const char *dtype_name(enum dtype dtype) {
    ASSERT((unsigned)dtype < DTYPE_COUNT);
    return dtypes[dtype].name;
}

tensor tensor_none(void) {
    return (tensor){.data = NULL};
}

static tensor contiguous(void *data, enum dtype dtype, int ndim, const int64_t *dim) {
    ASSERT(ndim >= 1 && ndim <= TENSOR_DIMS);
    tensor t = {.data = data, .dtype = dtype, .ndim = ndim};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        ASSERT(dim[i] >= 0);
        t.dim[i] = dim[i];
        t.stride[i] = stride;
        stride *= dim[i];
    }
    return t;
}

tensor tensor_1d(void *data, enum dtype dtype, int64_t a) {
    return contiguous(data, dtype, 1, (int64_t[]){a});
}

tensor tensor_2d(void *data, enum dtype dtype, int64_t a, int64_t b) {
    return contiguous(data, dtype, 2, (int64_t[]){a, b});
}

tensor tensor_3d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c) {
    return contiguous(data, dtype, 3, (int64_t[]){a, b, c});
}

tensor tensor_4d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d) {
    return contiguous(data, dtype, 4, (int64_t[]){a, b, c, d});
}

tensor tensor_5d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e) {
    return contiguous(data, dtype, 5, (int64_t[]){a, b, c, d, e});
}

tensor tensor_columns(tensor t, int64_t from, int64_t count) {
    int last = t.ndim - 1;
    ASSERT(last >= 0 && from >= 0 && count >= 0 && count <= t.dim[last] - from);
    if (t.data) t.data = (char *)t.data + from * t.stride[last] * (int64_t)dtype_size(t.dtype);
    t.dim[last] = count;
    return t;
}

tensor tensor_split_last(tensor t, int64_t a, int64_t b) {
    int last = t.ndim - 1;
    ASSERT(last >= 0 && t.ndim < TENSOR_DIMS && t.stride[last] == 1);
    ASSERT(a >= 0 && b >= 0 && a * b == t.dim[last]);
    t.ndim++;
    t.dim[last] = a;
    t.stride[last] = b;
    t.dim[last + 1] = b;
    t.stride[last + 1] = 1;
    return t;
}

tensor tensor_split_first(tensor t, int64_t a, int64_t b) {
    ASSERT(t.ndim >= 1 && t.ndim < TENSOR_DIMS && a >= 0 && b >= 0 && a * b == t.dim[0]);
    for (int i = t.ndim; i > 0; i--) {
        t.dim[i] = t.dim[i - 1];
        t.stride[i] = t.stride[i - 1];
    }
    t.ndim++;
    t.dim[0] = a;
    t.dim[1] = b;
    t.stride[0] = b * t.stride[1];
    return t;
}

tensor tensor_join_first(tensor t) {
    ASSERT(t.ndim >= 2);
    /* With one outer element, or none, there is no step whose width could be wrong. */
    ASSERT(t.dim[0] <= 1 || t.dim[1] == 0 || t.stride[0] == t.dim[1] * t.stride[1]);
    t.dim[1] *= t.dim[0];
    t.ndim--;
    for (int i = 0; i < t.ndim; i++) {
        t.dim[i] = t.dim[i + 1];
        t.stride[i] = t.stride[i + 1];
    }
    t.dim[t.ndim] = t.stride[t.ndim] = 0;
    return t;
}

tensor tensor_reshape(tensor t, int ndim, const int64_t *dim) {
    ASSERT(tensor_contiguous(t));
    tensor reshaped = contiguous(t.data, t.dtype, ndim, dim);
    ASSERT(tensor_count(reshaped) == tensor_count(t));
    return reshaped;
}

int64_t tensor_count(tensor t) {
    int64_t count = t.ndim > 0;
    for (int i = 0; i < t.ndim; i++) count *= t.dim[i];
    return count;
}

bool tensor_contiguous(tensor t) {
    if (tensor_count(t) == 0) return true;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
        /* The stride of a dimension of one element is never taken. */
        if (t.dim[i] != 1 && t.stride[i] != stride) return false;
        stride *= t.dim[i];
    }
    return true;
}

bool tensor_is(tensor t, int ndim, ...) {
    va_list dims;
    bool matches = t.ndim == ndim;
    va_start(dims, ndim);
    for (int i = 0; i < ndim && matches; i++) {
        int64_t want = va_arg(dims, int64_t);
        matches = want == -1 || want == t.dim[i];
    }
    va_end(dims);
    return matches;
}
