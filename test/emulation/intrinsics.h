/* intrinsics.h: functions that CUDA has for device code, for the emulation. Fast ones are computed as well as the
 * processor can, which is better than on a GPU: tests of their error belong on one. */
#ifndef RIVERRUN_TEST_EMULATION_INTRINSICS_H
#define RIVERRUN_TEST_EMULATION_INTRINSICS_H

#include "emulation.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* --- floats ------------------------------------------------------------------------------------------------------- */

template <class To, class From> static inline To emulation_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}

/* The C library has these names for itself. */
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
#define __powf powf
#define __exp10f exp10f

#define EMULATION_MATH(name, parameters, expression)                                                                   \
    static inline float name parameters {                                                                              \
        return expression;                                                                                             \
    }
EMULATION_MATH(__fdividef, (float v, float w), v / w)
EMULATION_MATH(fdividef, (float v, float w), v / w)
EMULATION_MATH(__fdiv_rn, (float v, float w), v / w)
EMULATION_MATH(__frcp_rn, (float v), 1.0f / v)
EMULATION_MATH(__fsqrt_rn, (float v), sqrtf(v))
EMULATION_MATH(__frsqrt_rn, (float v), (float)(1.0 / sqrt((double)v)))
EMULATION_MATH(rsqrtf, (float v), (float)(1.0 / sqrt((double)v)))
EMULATION_MATH(__fmaf_rn, (float u, float v, float w), fmaf(u, v, w))
EMULATION_MATH(__saturatef, (float v), v > 0 ? v < 1 ? v : 1 : 0)
EMULATION_MATH(__uint_as_float, (unsigned v), emulation_bits<float>(v))
EMULATION_MATH(__int_as_float, (int v), emulation_bits<float>(v))
#undef EMULATION_MATH

/* Rounded as said, never contracted into a multiply-add. */
static inline float __fmul_rn(float v, float w) {
    volatile float product = v * w;
    return product;
}
static inline float __fadd_rn(float v, float w) {
    volatile float a = v, sum = a + w;
    return sum;
}
static inline float __fsub_rn(float v, float w) {
    volatile float a = v, sum = a - w;
    return sum;
}
static inline double rsqrt(double v) {
    return 1.0 / sqrt(v);
}
static inline unsigned __float_as_uint(float v) {
    return emulation_bits<unsigned>(v);
}
static inline int __float_as_int(float v) {
    return emulation_bits<int>(v);
}
static inline long long __double_as_longlong(double v) {
    return emulation_bits<long long>(v);
}
static inline double __longlong_as_double(long long v) {
    return emulation_bits<double>(v);
}
static inline int __float2int_rn(float v) {
    return (int)nearbyintf(v);
}
static inline int __float2int_rd(float v) {
    return (int)floorf(v);
}
static inline float __int2float_rn(int v) {
    return (float)v;
}

/* --- integers ----------------------------------------------------------------------------------------------------- */

static inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
static inline int __popcll(unsigned long long v) {
    return __builtin_popcountll(v);
}
static inline int __clz(int v) {
    return v ? __builtin_clz((unsigned)v) : 32;
}
static inline int __ffs(int v) {
    return __builtin_ffs(v);
}
static inline int __ffsll(long long v) {
    return __builtin_ffsll(v);
}
static inline unsigned __brev(unsigned v) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (v >> i & 1) << (31 - i);
    return reversed;
}
static inline unsigned __umulhi(unsigned v, unsigned w) {
    return (unsigned)((uint64_t)v * w >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long v, unsigned long long w) {
    return (unsigned long long)((unsigned __int128)v * w >> 64);
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return (unsigned)((((uint64_t)high << 32 | low) << (by & 31)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31));
}
/* Byte i of the result is byte (selector >> 4 i) % 8 of (high, low); bit 3 of a selector repeats that byte's sign. */
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t both = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> 4 * i & 15, byte = (unsigned)(both >> 8 * (s & 7)) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

#define EMULATION_MIN_MAX(type)                                                                                        \
    static inline type min(type a, type b) {                                                                           \
        return b < a ? b : a;                                                                                          \
    }                                                                                                                  \
    static inline type max(type a, type b) {                                                                           \
        return a < b ? b : a;                                                                                          \
    }
EMULATION_MIN_MAX(int)
EMULATION_MIN_MAX(unsigned)
EMULATION_MIN_MAX(long)
EMULATION_MIN_MAX(unsigned long)
EMULATION_MIN_MAX(long long)
EMULATION_MIN_MAX(unsigned long long)
#undef EMULATION_MIN_MAX
static inline float min(float a, float b) {
    return fminf(a, b);
}
static inline float max(float a, float b) {
    return fmaxf(a, b);
}
static inline double min(double a, double b) {
    return fmin(a, b);
}
static inline double max(double a, double b) {
    return fmax(a, b);
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

#define EMULATION_LOAD(name)                                                                                           \
    template <class T> static inline T name(const T *from) {                                                           \
        return *from;                                                                                                  \
    }
EMULATION_LOAD(__ldg)
EMULATION_LOAD(__ldca)
EMULATION_LOAD(__ldcg)
EMULATION_LOAD(__ldcs)
EMULATION_LOAD(__ldcv)
EMULATION_LOAD(__ldlu)
#undef EMULATION_LOAD

#define EMULATION_STORE(name)                                                                                          \
    template <class T> static inline void name(T *to, typename emulation::same<T>::type value) {                       \
        *to = value;                                                                                                   \
    }
EMULATION_STORE(__stwb)
EMULATION_STORE(__stcg)
EMULATION_STORE(__stcs)
EMULATION_STORE(__stwt)
#undef EMULATION_STORE

static inline size_t __cvta_generic_to_shared(const void *at) {
    return (size_t)at;
}

/* One fiber runs at a time. */
#define EMULATION_ATOMIC(name, expression)                                                                             \
    template <class T> static inline T name(T *at, typename emulation::same<T>::type value) {                          \
        T before = *at;                                                                                                \
        *at = (T)(expression);                                                                                         \
        return before;                                                                                                 \
    }
EMULATION_ATOMIC(atomicAdd, before + value)
EMULATION_ATOMIC(atomicSub, before - value)
EMULATION_ATOMIC(atomicExch, value)
EMULATION_ATOMIC(atomicMin, value < before ? value : before)
EMULATION_ATOMIC(atomicMax, before < value ? value : before)
EMULATION_ATOMIC(atomicAnd, before & value)
EMULATION_ATOMIC(atomicOr, before | value)
EMULATION_ATOMIC(atomicXor, before ^ value)
EMULATION_ATOMIC(atomicInc, before >= value ? 0 : before + 1)
EMULATION_ATOMIC(atomicDec, before == 0 || before > value ? value : before - 1)
#undef EMULATION_ATOMIC
template <class T>
static inline T atomicCAS(T *at, typename emulation::same<T>::type expected, typename emulation::same<T>::type value) {
    T before = *at;
    if (before == expected) *at = value;
    return before;
}

[[noreturn]] static inline void __trap() {
    emulation::misuse("__trap()");
}

#endif
