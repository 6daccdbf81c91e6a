/* attention_cudnn.h: attention by cuDNN, behind plain C: attention_cudnn.cpp is the one C++ host file of riverrun,
 * because cuDNN's frontend is C++ headers. Only in builds that found them (RIVERRUN_CUDNN); the last four functions
 * always. Called by attention.cu, and through it by rat_fold.cu. */
#ifndef RIVERRUN_ATTENTION_CUDNN_H
#define RIVERRUN_ATTENTION_CUDNN_H

#ifdef __cplusplus
extern "C" {
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* An operand (B,T,heads,P) of bf16: elements from row to row, token to token, head to head. */
struct attention_cudnn_strides {
    int64_t row, token, head;
};

/* What a plan is made for: compared as bytes, so it is zeroed before it is filled. Backward has strides for all,
 * forward for the first four. */
struct attention_cudnn_shape {
    int64_t B, T, H, G, P;
    int64_t window; /* keys that a token sees at most, itself included; 0 = all before it */
    int64_t backward, logarithms; /* whether it is a backward; whether a forward leaves the logarithms of its sums */
    int64_t unordered;            /* a backward may add in any order: no two runs need give the same bits */
    double scale;
    struct attention_cudnn_strides q, k, v, o, dq, dk, dv, dout;
};

/* Its operands in device memory, as ops.h has them. */
struct attention_cudnn_operands {
    const void *q, *k, *v;
    void *o, *dq, *dk, *dv;
    const void *dout;
    float *lse;
    void *workspace; /* memory to work in, which stays there as long as the operands */
    size_t workspace_bytes;
};

/* cuDNN of this machine, such as 91900, and its handle for a stream; 0 where it can't be loaded. Nothing is loaded
 * before this is called. */
struct attention_cudnn;
int64_t attention_cudnn_open(struct attention_cudnn **c, void *stream);
void attention_cudnn_close(struct attention_cudnn *c);

/* Another of the same machine, with a stream, plans and memory of its own, for work that may go on beside what the
 * first is given: behind all that the first's stream has by now. NULL: there is none. Join: the first's stream goes on
 * when that work is done. False: it can't be waited for. The first fork opens it, and may not happen while a stream is
 * captured; later ones become branches of what is captured. */
struct attention_cudnn *attention_cudnn_fork(struct attention_cudnn *c);
bool attention_cudnn_join(struct attention_cudnn *c);

/* Queue the work. The first call for a shape makes its plan, and takes memory of its own if the workspace is too small,
 * which takes a second and may not happen while a stream is captured. False, with nothing queued: cuDNN does not serve
 * this shape, now and later. `why`, of `size` bytes, says why the first time, or what memory was taken if that is more
 * than a MiB; else it is empty. */
bool attention_cudnn_run(struct attention_cudnn *c, const struct attention_cudnn_shape *shape,
                         const struct attention_cudnn_operands *x, char *why, size_t size);

/* The device's, opened when it is first asked for; NULL: there is none, or this build does without. A run of it or of
 * what was forked from it, which says once on stderr why a shape is not served. Fork and join of it. (attention.cu) */
struct device;
struct attention_cudnn *cuda_attention_cudnn(struct device *dev);
bool cuda_attention_cudnn_run(struct attention_cudnn *c, const struct attention_cudnn_shape *shape,
                              const struct attention_cudnn_operands *x);
struct attention_cudnn *cuda_attention_cudnn_fork(struct device *dev);
void cuda_attention_cudnn_join(struct device *dev);

#ifdef __cplusplus
}
#endif

#endif
