/* slstm.cuh: what the ways of the sLSTM share: the problem, one unit's step forward and backward, and what is saved
 * between.
 *
 * With y[t] = sigmoid(o) c/n and m held fixed, all that backward needs of a token and unit are factors of dy, dc and dn
 * that forward knows, so backward computes no exponentials and its chain from dy to the gates' gradients is three
 * operations long:
 *
 *   dc += out dy;  dn -= share dy;    out = sigmoid(o) / n,  share = y / n
 *   di = in_z dc + in dn;             in_z = i tanh(z),  in = i
 *   dz = slope dc;                    slope = i (1 - tanh(z)^2)
 *   df = keep_c dc + keep_n dn;       keep_c = f sigmoid(-raw_f) c[t-1], keep_n likewise
 *   do = gate dy;                     gate = (1 - sigmoid(o)) y
 *   dc = keep dc;  dn = keep dn       keep = f, for the token before
 *
 * saved: eight of them in the type of activations, as they are used once each; `keep`, which multiplies itself from
 * token to token, in fp32. So 20 bytes for a token's unit in bf16, 36 in fp32: (B,T,D) packs of eight, then (B,T,D)
 * keep.
 */
#ifndef RIVERRUN_CUDA_SLSTM_CUH
#define RIVERRUN_CUDA_SLSTM_CUH

#include "kernels/cuda/launch.cuh"

enum { SLSTM_GATES = 4, SLSTM_PARTS = 4 };

/* Rows of a strided view (B,T,...). */
struct slstm_rows {
    int64_t row, step; /* elements from row to row, from token to token */
};

struct slstm_problem {
    int64_t B, T, H, P, D;
    slstm_rows x, y; /* backward: dx, dy */
    const float *bias, *initial; /* initial: NULL when absent; forward's */
    const int32_t *doc;          /* NULL: one document a row */
};

/* Where units of a head are in a state (B,4,D). */
enum slstm_part { SLSTM_Y, SLSTM_C, SLSTM_N, SLSTM_M };

static __device__ __forceinline__ int64_t slstm_place(const slstm_problem &p, int64_t b, int part, int64_t unit) {
    return (b * SLSTM_PARTS + part) * p.D + unit;
}

static __device__ __forceinline__ bool slstm_begins(const slstm_problem &p, int64_t b, int64_t t) {
    return p.doc && p.doc[b * p.T + t] != (t > 0 ? p.doc[b * p.T + t - 1] : 0);
}

enum slstm_factor { SLSTM_OUT, SLSTM_SHARE, SLSTM_IN, SLSTM_IN_Z, SLSTM_SLOPE, SLSTM_KEEP_C, SLSTM_KEEP_N, SLSTM_GATE,
                    SLSTM_FACTORS };

struct slstm_factors {
    float of[SLSTM_FACTORS], keep;
};

/* `saved`, by parts. NULL parts where nothing is saved. */
template <class T> struct slstm_saved {
    T *packs;
    float *keep;

    slstm_saved(void *saved, const slstm_problem &p) {
        packs = (T *)saved;
        keep = saved ? (float *)(packs + p.B * p.T * p.D * SLSTM_FACTORS) : NULL;
    }
    __device__ __forceinline__ void store(int64_t place, const slstm_factors &f) const {
        store_floats<SLSTM_FACTORS>(packs + place * SLSTM_FACTORS, f.of);
        keep[place] = f.keep;
    }
    __device__ __forceinline__ void load(slstm_factors &f, int64_t place) const {
        load_floats<SLSTM_FACTORS>(f.of, packs + place * SLSTM_FACTORS);
        f.keep = keep[place];
    }
};

/* One unit's state, its y aside. */
struct slstm_unit {
    float c, n, m;
};

/* The functions as exactly as fp32 has them, or fast ones, good to some 2e-7. */
template <bool EXACT> __device__ __forceinline__ float slstm_exp(float v) {
    return EXACT ? expf(v) : power_of_two(LOG2E * v);
}

template <bool EXACT> __device__ __forceinline__ float slstm_sigmoid(float v) {
    return EXACT ? 1.0f / (1.0f + expf(-v)) : sigmoid_of(v);
}

template <bool EXACT> __device__ __forceinline__ float slstm_tanh(float v) {
    return EXACT ? tanhf(v) : 2.0f * sigmoid_of(2.0f * v) - 1.0f;
}

template <bool EXACT> __device__ __forceinline__ float slstm_log_sigmoid(float v) {
    return EXACT ? fminf(v, 0.0f) - log1pf(expf(-fabsf(v))) : -softplus_of(-v);
}

/* One token: raw are the four numbers that enter the gates. Returns y. */
template <bool EXACT>
__device__ __forceinline__ float slstm_forward_unit(slstm_unit &s, const float (&raw)[SLSTM_GATES], slstm_factors &f) {
    float kept = slstm_log_sigmoid<EXACT>(raw[1]) + s.m;
    float m = s.n == 0.0f ? raw[0] : fmaxf(raw[0], kept);
    float in = slstm_exp<EXACT>(raw[0] - m), keep = slstm_exp<EXACT>(kept - m);
    if (keep > 1.0f) keep = 1.0f; /* only where n was 0; what is not a number stays so, here and in the clip */
    float z = slstm_tanh<EXACT>(raw[2]), o = slstm_sigmoid<EXACT>(raw[3]);
    float c = keep * s.c + in * z, n = keep * s.n + in;
    float over_n = EXACT ? 1.0f / n : reciprocal(n), y = o * c * over_n;
    float slope = keep * slstm_sigmoid<EXACT>(-raw[1]);
    f.keep = keep;
    f.of[SLSTM_OUT] = o * over_n;
    f.of[SLSTM_SHARE] = y * over_n;
    f.of[SLSTM_IN] = in;
    f.of[SLSTM_IN_Z] = in * z;
    f.of[SLSTM_SLOPE] = in * (1.0f - z * z);
    f.of[SLSTM_KEEP_C] = slope * s.c;
    f.of[SLSTM_KEEP_N] = slope * s.n;
    f.of[SLSTM_GATE] = (1.0f - o) * y;
    s.c = c, s.n = n, s.m = m;
    return y;
}

/* What backward carries from a token to the one before. */
struct slstm_carry {
    float dc, dn;
};

__device__ __forceinline__ void slstm_backward_unit(slstm_carry &s, float (&draw)[SLSTM_GATES], const slstm_factors &f,
                                                    float dy) {
    float dc = s.dc + f.of[SLSTM_OUT] * dy, dn = s.dn - f.of[SLSTM_SHARE] * dy;
    draw[0] = f.of[SLSTM_IN_Z] * dc + f.of[SLSTM_IN] * dn;
    draw[1] = f.of[SLSTM_KEEP_C] * dc + f.of[SLSTM_KEEP_N] * dn;
    draw[2] = f.of[SLSTM_SLOPE] * dc;
    draw[3] = f.of[SLSTM_GATE] * dy;
    s.dc = f.keep * dc, s.dn = f.keep * dn;
}

__device__ __forceinline__ float slstm_clipped(float v, float clip) {
    return !(clip > 0.0f) ? v : v > clip ? clip : v < -clip ? -clip : v;
}

/* (slstm_cluster.cu) The sequence in one kernel, where the shape and the GPU allow it; false: they don't, and
 * nothing was done. Backward leaves dx, dinitial, and in `partials` rows of 4 D floats that add up to dbias: how
 * many it returns in *rows, slstm_cluster_partials at most. */
bool slstm_cluster_forward(struct device *dev, const slstm_problem &p, tensor y, tensor final, void *saved, tensor x,
                           tensor r);
bool slstm_cluster_backward(struct device *dev, const slstm_problem &p, tensor dx, tensor dinitial, tensor dy,
                            tensor dfinal, const void *saved, tensor r, float clip, float *partials, int64_t *rows);
int64_t slstm_cluster_partials(struct slstm_shape s);

#endif
