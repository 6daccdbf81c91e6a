/* cublas.cuh: cuBLASLt, loaded when a GPU is opened and not before: the library has half a gigabyte, and a program that
 * links it takes a quarter of a second to start, on machines without a GPU, too. */
#ifndef RIVERRUN_CUDA_CUBLAS_CUH
#define RIVERRUN_CUDA_CUBLAS_CUH

extern "C" {
#include "common/error.h"
}

#include <cublasLt.h>

#define CUBLAS_FUNCTIONS(F)                                                                                            \
    F(cublasLtCreate)                                                                                                  \
    F(cublasLtDestroy)                                                                                                 \
    F(cublasLtGetStatusString)                                                                                         \
    F(cublasLtMatmul)                                                                                                  \
    F(cublasLtMatmulAlgoConfigGetAttribute)                                                                            \
    F(cublasLtMatmulAlgoGetHeuristic)                                                                                  \
    F(cublasLtMatmulDescCreate)                                                                                        \
    F(cublasLtMatmulDescDestroy)                                                                                       \
    F(cublasLtMatmulDescSetAttribute)                                                                                  \
    F(cublasLtMatmulPreferenceCreate)                                                                                  \
    F(cublasLtMatmulPreferenceDestroy)                                                                                 \
    F(cublasLtMatmulPreferenceSetAttribute)                                                                            \
    F(cublasLtMatrixLayoutCreate)                                                                                      \
    F(cublasLtMatrixLayoutDestroy)                                                                                     \
    F(cublasLtMatrixLayoutSetAttribute)

/* The library's functions under their own names. */
struct cublas {
    void *library;
#define CUBLAS_MEMBER(name) decltype(&::name) name;
    CUBLAS_FUNCTIONS(CUBLAS_MEMBER)
#undef CUBLAS_MEMBER
};

/* ERROR_SYSTEM that says which file is missing. Never unloaded: the CUDA runtime may still hold on to it. */
int cublas_load(struct cublas *blas, error *err);

#endif
