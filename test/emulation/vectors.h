/* vectors.h: CUDA's small vectors and dim3, for the emulation. */
#ifndef RIVERRUN_TEST_EMULATION_VECTORS_H
#define RIVERRUN_TEST_EMULATION_VECTORS_H

#define EMULATION_VECTORS(scalar, name, bytes)                                                                         \
    struct name##1 {                                                                                                   \
        scalar x;                                                                                                      \
    };                                                                                                                 \
    struct __attribute__((aligned(2 * bytes))) name##2 {                                                               \
        scalar x, y;                                                                                                   \
    };                                                                                                                 \
    struct name##3 {                                                                                                   \
        scalar x, y, z;                                                                                                \
    };                                                                                                                 \
    struct __attribute__((aligned(4 * bytes > 16 ? 16 : 4 * bytes))) name##4 {                                         \
        scalar x, y, z, w;                                                                                             \
    };                                                                                                                 \
    static inline name##1 make_##name##1(scalar x) {                                                                   \
        return {x};                                                                                                    \
    }                                                                                                                  \
    static inline name##2 make_##name##2(scalar x, scalar y) {                                                         \
        return {x, y};                                                                                                 \
    }                                                                                                                  \
    static inline name##3 make_##name##3(scalar x, scalar y, scalar z) {                                               \
        return {x, y, z};                                                                                              \
    }                                                                                                                  \
    static inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) {                                     \
        return {x, y, z, w};                                                                                           \
    }

EMULATION_VECTORS(signed char, char, 1)
EMULATION_VECTORS(unsigned char, uchar, 1)
EMULATION_VECTORS(short, short, 2)
EMULATION_VECTORS(unsigned short, ushort, 2)
EMULATION_VECTORS(int, int, 4)
EMULATION_VECTORS(unsigned, uint, 4)
EMULATION_VECTORS(long long, longlong, 8)
EMULATION_VECTORS(unsigned long long, ulonglong, 8)
EMULATION_VECTORS(float, float, 4)
EMULATION_VECTORS(double, double, 8)
#undef EMULATION_VECTORS

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    operator uint3() const {
        return {x, y, z};
    }
};

#endif
