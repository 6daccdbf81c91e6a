/* tensor.h: a view of memory: pointer, dtype, dimensions, strides. Views own nothing.
 *
 * Strides count elements. The last dimension is contiguous (stride 1) unless a comment says otherwise, so a view can be
 * a slice of columns: Mamba-2's in_proj output is one (rows, 2I+2GN+H) buffer and z, x, B, C, dt are views into it.
 * A view whose data is NULL stands for "absent" where an operation calls an argument optional; tensor_none() makes one.
 *
 * One alphabet of dimensions, here and in all comments:
 *   B batch rows    T time steps    R rows of a matrix (usually B*T)    D model width    I inner width    N state size
 *   H heads         P head width    G groups of heads that share B and C    W conv width    C channels of the conv
 *   Q chunk length  K number of chunks, ceil(T/Q)    V vocabulary rows (padded)    F MLP width    L layers
 */
#ifndef RIVERRUN_TENSOR_H
#define RIVERRUN_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dtype { DTYPE_F32 = 0, DTYPE_F64, DTYPE_BF16, DTYPE_F16, DTYPE_I32, DTYPE_I64, DTYPE_U8, DTYPE_COUNT };

size_t dtype_size(enum dtype dtype);      /* bytes of an element */
const char *dtype_name(enum dtype dtype); /* "f32", ... */

#define TENSOR_DIMS 5

typedef struct tensor {
    void *data;
    enum dtype dtype;
    int ndim;
    int64_t dim[TENSOR_DIMS];
    int64_t stride[TENSOR_DIMS]; /* in elements */
    bool empty; /* of a sum that an operation adds to: nothing is there yet, so that it may write instead of adding.
                 * Only operations whose contract says so look at it */
} tensor;

tensor tensor_none(void);
static inline bool tensor_given(tensor t) { return t.data != NULL; }

/* Contiguous views. */
tensor tensor_1d(void *data, enum dtype dtype, int64_t a);
tensor tensor_2d(void *data, enum dtype dtype, int64_t a, int64_t b);
tensor tensor_3d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c);
tensor tensor_4d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d);
tensor tensor_5d(void *data, enum dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e);

/* Columns [from, from+count) of the last dimension. */
tensor tensor_columns(tensor t, int64_t from, int64_t count);
/* Split the last dimension (contiguous) into a x b: (..., a*b) -> (..., a, b). */
tensor tensor_split_last(tensor t, int64_t a, int64_t b);
/* Split the first dimension into a x b: (a*b, ...) -> (a, b, ...). */
tensor tensor_split_first(tensor t, int64_t a, int64_t b);
/* Join the first two dimensions, which must be evenly spaced: (a, b, ...) -> (a*b, ...). */
tensor tensor_join_first(tensor t);
/* The same data under other contiguous dimensions (element counts must agree; t contiguous). */
tensor tensor_reshape(tensor t, int ndim, const int64_t *dim);

int64_t tensor_count(tensor t); /* elements */
bool tensor_contiguous(tensor t);
bool tensor_is(tensor t, int ndim, ...); /* ndim and each int64_t dimension match; -1 matches any. Cast literals:
                                          * (int64_t)4 */

#endif
