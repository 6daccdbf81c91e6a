/* ops.h: the contract of every operation, named once.
 *
 * A device is a table of these functions (struct ops). There are four: the CPU in float (training), the CPU in double
 * (the oracle that everything else is compared with), a GPU in fp32 (for checking) and a GPU in bf16. The model is
 * written once against the table.
 *
 * Conventions
 *   Order of arguments: device, outputs, gradients-to-accumulate, inputs, sizes and constants, scratch.
 *   "=": the output is overwritten. "+=": the result is added to what is there (parameter gradients always).
 *   "optional": may be tensor_none().
 *   Activations have the device's activation dtype (act); residual stream, statistics, dt, states, gradients of
 *   parameters are "real": f32 on the float CPU and on CUDA, f64 in the oracle. Weights have the dtype of the view.
 *   On the CPU tables everything is the table's own real type.
 *   Rows are strided views where noted "strided"; all else is contiguous. Inputs and outputs don't overlap unless
 *   stated.
 *   Functions return nothing: on a device that can fail, the first failure is kept in the device and reported by
 *   device_check(). A broken shape is a programmer error (ASSERT).
 *   Scratch is caller-owned, uninitialised, at least OP_scratch(...) bytes; those functions are pure and need no
 *   device.
 *   Determinism: the same inputs on the same device with the same number of threads give the same bits.
 *
 * Documents: `doc` is (B, T) i32, non-decreasing along a row: the number of the document a token belongs to. State and
 *   taps never cross from one number to another. A carried-in (initial) state belongs to document 0, so a row whose
 *   first token starts a document has doc[0] = 1 and ignores the initial state. none = one document, number 0. The
 *   final state belongs to the row's last document.
 */
#ifndef RIVERRUN_OPS_H
#define RIVERRUN_OPS_H

#include "kernels/tensor.h"

struct device;
struct cell; /* kernels/cells/cells.h */

/* Shape of an SSD or conv problem, for the size functions. */
struct ssd_shape {
    int64_t B, T, H, P, G, N, Q;
};

/* Shape of a selective scan, for the size functions: D channels of N states. */
struct scan_shape {
    int64_t B, T, D, N;
};

/* Shape of an mLSTM problem, for the size functions: K = width of q and k, V = width of v, Q = chunk. */
struct mlstm_shape {
    int64_t B, T, H, K, V, Q;
};

/* The state of an mLSTM, or a gradient of it: see mlstm_forward. */
struct mlstm_state {
    tensor C, n, m;
};

/* Which mLSTM: constants of a layer. */
struct mlstm_rule {
    bool sigmoid_input; /* the input gate is sigmoid(i), and there is no stabiliser m (mLSTMsig) */
    bool normalise;     /* h = num / (N + eps); else h = num, and n is neither read nor written. False: sigmoid only */
    bool truncated;     /* backward takes N for a constant, as the published kernels do: dfinal.n is not read, and
                         * dinitial.n is 0; the default is exact */
    double eps;
};

/* Shape of an sLSTM problem, for the size functions: H heads of P units each. */
struct slstm_shape {
    int64_t B, T, H, P;
};

/* Shape of an attention problem, for the size functions: H heads and G heads of keys and values, P wide; C slots of a
 * cache, 0 = none. */
struct attention_shape {
    int64_t B, T, H, G, P, C;
};

/* Which keys a token sees, and which of the G heads of keys and values a head reads. */
struct attention_rule {
    int64_t window; /* the last `window` tokens of its document, itself included; 0 = all */
    bool tiled;     /* head h reads head h mod G; else floor(h / (H/G)) */
};

/* Keys and values of earlier tokens: of the document that goes on, the one at position p (counted from the document's
 * start) lies in slot p mod C, so the newest min(count, C) are there. A cache of zeros is empty. */
struct attention_cache {
    tensor k, v;  /* (B,C,G,P) act */
    tensor count; /* (B) i32: tokens of that document so far, those that are forgotten included */
};

/* Shape of a RAT problem, for the size functions: H heads of P channels, G groups of queries and keys, chunks of Q
 * tokens, C slots of a state, 0 = none. */
struct rat_shape {
    int64_t B, T, H, G, P, Q, C;
};

/* What a RAT layer carries on: of the document that goes on, the ends of its chunks (chunk j in slot j mod C, the
 * newest C of them) and where the recurrence stands. A state of zeros is empty. */
struct rat_state {
    tensor k, v;    /* (B,C,H,P) act: rotated keys and values at the ends of chunks */
    tensor running; /* (B,2,H,P) real: key and value behind the last token */
    tensor count;   /* (B) i32: tokens of that document so far */
};

/* Shape of a nonlinear recurrence, for the size functions: N channels, a cell of kernels/cells/. */
struct cell_shape {
    int64_t B, T, N;
    const struct cell *cell;
};

/* How a nonlinear recurrence is solved along time. Backward needs no such choice: its system is linear. */
enum cell_method {
    CELL_SEQUENTIAL, /* token after token: exact */
    CELL_NEWTON,     /* all tokens' states are unknown (arXiv 2510.21450) */
    CELL_SHOOTING,   /* only the states at chunks' starts are: multiple shooting */
};
struct cell_solver {
    enum cell_method method;
    int iterations; /* corrections of all unknown states, at least 1, each after an evaluation of every token; one more
                     * evaluation goes before them in Newton's method (the guess), after them in shooting (the
                     * solution). A linear cell gets one, whatever is asked for */
    int64_t chunk;  /* shooting: tokens of a chunk; 0 = as the device likes it */
    bool bounded;   /* corrected states are kept within the cell's bound, which a solution never leaves: s = clamp(s +
                     * d), where d, the correction, is solved for as if they were not. What is not a number stays so */
};

/* What a solver says of its solution; in device memory. */
struct cell_report {
    /* The solution's largest |f(state before, u) - state|; infinite where a state is not finite, else 0 if exact.
     * Shooting measures it. Newton's last correction is not evaluated again: what it leaves is estimated from the
     * residual that it started from (cell_newton_residual). */
    float residual;
    float unused;
};

/* Elementwise functions of an MLP or a gate. */
enum activation {
    ACTIVATION_SILU,
    ACTIVATION_GELU,    /* exact: x Phi(x) */
    ACTIVATION_RELU2,   /* max(x, 0)^2 */
    ACTIVATION_SIGMOID,
};

/* What head_loss adds up. Lives in device memory, f64 on every device; sums over the valid targets. */
struct loss_sums {
    double nll;     /* -log p(target), nats */
    double z;       /* z_loss * logsumexp^2 */
    double valid;   /* number of targets >= 0 */
    double correct; /* valid targets that are the argmax of the logits (lowest index wins a tie) */
};

/* One run of consecutive elements of a slice of the parameters that share a treatment. */
struct adamw_segment {
    int64_t offset; /* in elements, into the slice's arrays alike */
    int64_t count;
    float decay;    /* multiplies the step's decay_rate (0 for exempt tensors) */
    float lr_scale; /* multiplies the step's learning rate, and nothing else */
    float clamp_min, clamp_max; /* where `clamped`: the weights are kept within [clamp_min, clamp_max] */
    int32_t clamped;
    int32_t unused;
};

/* Parameters that lie together, one-dimensional, and what belongs to them; in device memory. */
struct adamw_slice {
    tensor p, m, v, g; /* real */
    tensor rounded;    /* act, optional */
    const struct adamw_segment *segments; /* in host memory, needed only during the call */
    int64_t count;                        /* of segments */
};

/* Scalars of one optimizer step; in device memory, so that a captured step can be replayed. */
struct adamw_step {
    double lr;
    double decay_rate;               /* share of a weight that a segment of decay 1 loses: the learning rate, or its
                                      * course alone (train/optimizer.h) */
    double beta1, beta2, eps;
    double correction1, correction2; /* 1 - beta^t, t counted from 1 over steps that were not skipped */
    double grad_scale;               /* multiplies every gradient: 1/valid tokens, and clipping */
    int32_t skip;                    /* non-zero: leave p, m, v untouched */
    int32_t unused;
};

/* What the ranks tell each other about a step, in one sum; in device memory. */
struct step_totals {
    struct loss_sums loss;
    double squares; /* of the gradients' elements, as they lie there */
    double signals; /* ranks that were asked to stop */
    /* Not a sum: the largest residual that a solver left, in any layer and on any rank; 0 where nothing is solved. */
    double residual;
};

/* What the host knows of the coming step; in device memory. */
struct step_rates {
    double lr, decay_rate; /* of struct adamw_step */
};

/* What is the same in all steps of a run. */
struct step_rule {
    double scale; /* gradients are those of the sum over targets times this */
    double clip;  /* largest norm of the mean gradient; 0 = no clipping */
    double beta1, beta2, eps;
    double residual_max; /* a step whose solvers left more than this computed no gradient of the model */
};

/* What came of a step; in device memory, for the host to read. */
struct step_report {
    struct step_totals totals;
    double grad_norm; /* of the mean gradient, before clipping */
    int64_t steps;    /* taken so far, this one included; skipped ones are not counted */
    int32_t skipped;  /* loss or norm was not finite, there was no valid target, or a solver failed: nothing changes */
    int32_t unused;
};

struct ops {
    const char *name; /* "cpu-f32", "cpu-f64", "cuda-f32", "cuda-bf16" */
    enum dtype act, real;
    size_t memory_page;     /* what is asked of the device's memory is rounded up to a multiple of it */
    size_t memory_overhead; /* what the device takes beside what is asked of it (docs/gpu.md) */
    size_t memory_peers;    /* and what it takes to talk to the devices of other ranks */

    /* --- embedding: out[r] = table[tokens[r]] --------------------------------------------------------------- */
    /* out (R,D) real =; tokens (R) i32 in [0,V); table (V,D) */
    void (*embedding_forward)(struct device *dev, tensor out, tensor tokens, tensor table);
    /* dtable (V,D) real += scatter of dout (R,D) real by token, in a fixed order */
    void (*embedding_backward)(struct device *dev, tensor dtable, tensor dout, tensor tokens, void *scratch);
    size_t (*embedding_backward_scratch)(int64_t R, int64_t D, int64_t V);

    /* --- residual add + norm: LayerNorm where there is a mean, else RMSNorm --------------------------------------- */
    /* r = scale * residual + branch;  y = (r - m) * rstd * weight;  rstd = 1/sqrt(mean((r - m)^2) + eps).
     * m = mean(r) with `mean` (LayerNorm without a bias: the variance is that of all D), else 0 (RMSNorm).
     * out_residual (R,D) real = r, may be the same memory as residual; y (R,D) act =; mean (R) real optional =;
     * rstd (R) real =; residual (R,D) real; scale (D) optional (absent: 1); branch (R,D) act optional (absent: 0);
     * weight (D) */
    void (*add_norm_forward)(struct device *dev, tensor out_residual, tensor y, tensor mean, tensor rstd,
                             tensor residual, tensor scale, tensor branch, tensor weight, double eps);
    /* With xh = (r - m)*rstd, wdy = weight*dy, c = mean(xh*wdy), b = mean(wdy) with `mean`, else 0:
     *   dr = (wdy - b - xh*c)*rstd + next_scale * dnext;  dweight += sum dy*xh;  dnext_scale += sum dnext * r.
     * next_scale is that of the addition above, which read this r as its residual: what a layer's own scale multiplies
     * is at hand here. next_scale (D) and dnext_scale (D) real: both or neither (then 1), and only with dnext.
     * dresidual (R,D) real = dr (may be the memory of dnext); dbranch (R,D) act = dr rounded, optional (where act is
     * real the caller reads dresidual instead); dnext (R,D) real, the gradient arriving on r from above, optional;
     * residual = the r that forward put out. */
    void (*add_norm_backward)(struct device *dev, tensor dresidual, tensor dbranch, tensor dweight, tensor dnext_scale,
                              tensor dy, tensor dnext, tensor residual, tensor mean, tensor rstd, tensor weight,
                              tensor next_scale, void *scratch);
    size_t (*add_norm_backward_scratch)(int64_t R, int64_t D);

    /* --- linear: y = x w^T (+ bias) --------------------------------------------------------------------------- */
    /* y (R,O) strided =, act or real: where x and w are bf16 it may be f32, not rounded on the way (gates, logits);
     * x (R,I) strided; w (O,I); bias (O) optional */
    void (*linear_forward)(struct device *dev, tensor y, tensor x, tensor w, tensor bias);
    /* dx (R,I) strided, optional: = dy w, or += if add_dx; dw (O,I) real += dy^T x (= if empty), optional; dbias (O)
     * real += sum dy, optional; dy (R,O) strided; x (R,I) strided */
    void (*linear_backward)(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dbias, tensor dy, tensor x,
                            tensor w);

    /* --- causal depthwise convolution, with SiLU or without ----------------------------------------------------- */
    /* c[t,k] = bias[k] + sum_{w<W} weight[k,w] * x[t-(W-1)+w, k];  y = silu(c), or c without with_silu. The last tap
     * multiplies the current token; taps before the row read `initial` (its last row is the token just before), or 0;
     * taps of another document are 0.
     * y (B,T,C) strided =; final (B,W-1,C) real optional = the last W-1 inputs of the last document (0 where it is
     * shorter); x (B,T,C) strided; weight (C,W); bias (C); initial (B,W-1,C) optional; doc (B,T) optional. W in
     * 2..8. */
    void (*conv_forward)(struct device *dev, tensor y, tensor final, tensor x, tensor weight, tensor bias,
                         tensor initial, tensor doc, bool with_silu);
    /* dx (B,T,C) strided =; dinitial (B,W-1,C) optional =; dweight (C,W), dbias (C) real +=; dy strided; dfinal
     * optional */
    void (*conv_backward)(struct device *dev, tensor dx, tensor dinitial, tensor dweight, tensor dbias, tensor dy,
                          tensor dfinal, tensor x, tensor weight, tensor bias, tensor initial, tensor doc,
                          bool with_silu, void *scratch);
    size_t (*conv_backward_scratch)(int64_t B, int64_t T, int64_t C, int64_t W);
    /* One token: y (B,C) strided =; state (B,W-1,C) real is read and shifted; x (B,C) strided */
    void (*conv_step)(struct device *dev, tensor y, tensor state, tensor x, tensor weight, tensor bias, bool with_silu);

    /* --- SSD step sizes: dt = clamp(softplus(raw + bias), dt_min, dt_max);  a = -exp(A_log) * dt ----------------- */
    /* dt, a (B,T,H) real =; raw (B,T,H) strided; bias, A_log (H). softplus(v) = log1p(exp(v)) for v <= 20, else v. */
    void (*ssd_dt_forward)(struct device *dev, tensor dt, tensor a, tensor raw, tensor bias, tensor A_log,
                           double dt_min, double dt_max);
    /* draw (B,T,H) strided =; dbias, dA_log (H) real +=; ddt, da (B,T,H) real: gradients of dt and a as independent
     * values. Where dt was clamped its gradient is 0. */
    void (*ssd_dt_backward)(struct device *dev, tensor draw, tensor dbias, tensor dA_log, tensor ddt, tensor da,
                            tensor raw, tensor bias, tensor A_log, double dt_min, double dt_max, void *scratch);
    size_t (*ssd_dt_backward_scratch)(int64_t B, int64_t T, int64_t H);

    /* --- SSD (Mamba-2, arXiv 2405.21060, chunked algorithm of its section 6) ----------------------------------- */
    /* Per head: S[t] = exp(a[t]) S[t-1] + dt[t] x[t] (outer) b[t];   y[t] = S[t] c[t] + d x[t].
     * y (B,T,H,P) strided =; final (B,H,P,N) real optional =; saved: ssd_saved() bytes that backward reads, or NULL
     * when no backward follows; x (B,T,H,P) strided; dt, a (B,T,H) real, a <= 0; b, c (B,T,G,N) strided, head h uses
     * group h / (H/G); d (H) optional; initial (B,H,P,N) optional; doc optional; chunk Q >= 1: any value gives the same
     * result up to rounding. */
    void (*ssd_forward)(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor dt, tensor a,
                        tensor b, tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch);
    /* dx strided =; ddt, da (B,T,H) real =; db, dc strided =; dinitial optional =; dd (H) real +=, optional;
     * dy strided; dfinal optional */
    void (*ssd_backward)(struct device *dev, tensor dx, tensor ddt, tensor da, tensor db, tensor dc, tensor dinitial,
                         tensor dd, tensor dy, tensor dfinal, const void *saved, tensor x, tensor dt, tensor a,
                         tensor b, tensor c, tensor d, tensor initial, tensor doc, int64_t chunk, void *scratch);
    size_t (*ssd_saved)(struct ssd_shape shape);
    size_t (*ssd_forward_scratch)(struct ssd_shape shape);
    size_t (*ssd_backward_scratch)(struct ssd_shape shape);
    /* One token: y (B,H,P) strided =; state (B,H,P,N) real updated; x (B,H,P), b, c (B,G,N) strided; dt, a (B,H) */
    void (*ssd_step)(struct device *dev, tensor y, tensor state, tensor x, tensor dt, tensor a, tensor b, tensor c,
                     tensor d);

    /* --- selective scan (Mamba, arXiv 2312.00752, its section 3.2) with step size, skip and gate ------------------ */
    /* delta = softplus(raw + bias);  A = -exp(A_log);  per channel i and state n
     *   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] b[t,n] x[t];   y[t] = sum_n c[t,n] h[t,n] + d x[t];
     * and g = y * silu(z), or g = y where z is none. softplus as in ssd_dt_forward.
     * g (B,T,D) strided =; final (B,D,N) real optional =; saved: scan_saved() bytes that backward reads, or NULL when
     * no backward follows; x, raw (B,T,D) strided; bias (D); A_log (D,N); b, c (B,T,N) strided, shared by all channels;
     * d (D) optional; z (B,T,D) strided optional; initial (B,D,N) optional; doc (B,T) optional. */
    void (*scan_forward)(struct device *dev, tensor g, tensor final, void *saved, tensor x, tensor raw, tensor bias,
                         tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial, tensor doc,
                         void *scratch);
    /* dx, draw (B,T,D) strided =; db, dc (B,T,N) strided =; dz strided =, none where z is none; dinitial (B,D,N)
     * optional =; dbias (D), dA_log (D,N) real +=; dd (D) real +=, optional; dg strided; dfinal optional */
    void (*scan_backward)(struct device *dev, tensor dx, tensor draw, tensor db, tensor dc, tensor dz, tensor dinitial,
                          tensor dbias, tensor dA_log, tensor dd, tensor dg, tensor dfinal, const void *saved, tensor x,
                          tensor raw, tensor bias, tensor A_log, tensor b, tensor c, tensor d, tensor z, tensor initial,
                          tensor doc, void *scratch);
    size_t (*scan_saved)(struct scan_shape shape);
    size_t (*scan_forward_scratch)(struct scan_shape shape);
    size_t (*scan_backward_scratch)(struct scan_shape shape);
    /* One token: g (B,D) strided =; state (B,D,N) real updated; x, raw, z (B,D) strided; b, c (B,N) strided */
    void (*scan_step)(struct device *dev, tensor g, tensor state, tensor x, tensor raw, tensor bias, tensor A_log,
                      tensor b, tensor c, tensor d, tensor z);

    /* --- gated RMSNorm: u = y * silu(z), normalised per group of I/groups channels, times weight ------------------ */
    /* norm_first: y is normalised, and the result times silu(z) and weight.
     * g (R,I) act =; rstd (R,groups) real =; y (R,I); z (R,I) strided; weight (I) */
    void (*gated_rmsnorm_forward)(struct device *dev, tensor g, tensor rstd, tensor y, tensor z, tensor weight,
                                  bool norm_first, double eps);
    /* dy (R,I) =; dz (R,I) strided =; dweight (I) real +=; g (R,I) act optional =: forward's again, bit for bit, for
     * who did not keep it; it may lie in dg's memory */
    void (*gated_rmsnorm_backward)(struct device *dev, tensor dy, tensor dz, tensor dweight, tensor g, tensor dg,
                                   tensor y, tensor z, tensor rstd, tensor weight, bool norm_first, void *scratch);
    size_t (*gated_rmsnorm_backward_scratch)(int64_t R, int64_t I);

    /* --- soft cap: y = cap tanh((x + bias) / cap), or x + bias where cap is 0 ---------------------------------- */
    /* y (R,N) real strided =, may be the memory of x; x (R,N) real strided; bias (N) optional */
    void (*softcap_forward)(struct device *dev, tensor y, tensor x, tensor bias, double cap);
    /* dx (R,N) strided =, act or real: rounded for the products that follow; dbias (N) real +=, optional, from values
     * that are not rounded; dy, y (R,N) real strided: y as forward put it out */
    void (*softcap_backward)(struct device *dev, tensor dx, tensor dbias, tensor dy, tensor y, double cap,
                             void *scratch);
    size_t (*softcap_backward_scratch)(int64_t R, int64_t N);

    /* --- mLSTM (xLSTM, arXiv 2405.04517, its section 2.3; in chunks: arXiv 2503.13427, 2503.14376) ---------------- */
    /* Per head, with lf = log sigmoid(f[t]), s = K^-1/2 and a state C (K,V), n (K), m that starts at 0:
     *   m[t] = max(lf + m[t-1], i[t]);  f' = exp(lf + m[t-1] - m[t]);  i' = exp(i[t] - m[t])
     *   C[t] = f' C[t-1] + i' k[t] (outer) v[t]; n[t] = f' n[t-1] + i' k[t];  num = C[t]^T s q[t];  den = n[t] . s q[t]
     *   h[t] = num / (max(|den|, exp(-m[t])) + eps)
     * With rule.sigmoid_input i' = sigmoid(i), f' = sigmoid(f), there is no m (it is left 0) and the floor of |den| is
     * 1; without rule.normalise h = num. A document starts with C = 0, n = 0, m = 0.
     * h (B,T,H,V) strided =; C (B,H,K,V), n (B,H,K), m (B,H) real: final =, initial, each three or none; saved:
     * mlstm_saved() bytes that backward reads, or NULL when no backward follows; q, k (B,T,H,K), v (B,T,H,V) strided;
     * i, f (B,T,H) real strided, what enters the gates; doc optional; chunk Q >= 1: any value gives the same result up
     * to rounding, and a device may take another. K and V from 1 to 2048. */
    void (*mlstm_forward)(struct device *dev, tensor h, struct mlstm_state final, void *saved, tensor q, tensor k,
                          tensor v, tensor i, tensor f, struct mlstm_state initial, tensor doc, struct mlstm_rule rule,
                          int64_t chunk, void *scratch);
    /* dq, dk, dv strided =; di, df (B,T,H) real strided =; dinitial.C, dinitial.n optional = (m is held fixed); dh
     * strided; dfinal.C, dfinal.n optional; h as forward put it out; the rest as in forward */
    void (*mlstm_backward)(struct device *dev, tensor dq, tensor dk, tensor dv, tensor di, tensor df,
                           struct mlstm_state dinitial, tensor dh, struct mlstm_state dfinal, const void *saved,
                           tensor h, tensor q, tensor k, tensor v, tensor i, tensor f, struct mlstm_state initial,
                           tensor doc, struct mlstm_rule rule, int64_t chunk, void *scratch);
    size_t (*mlstm_saved)(struct mlstm_shape shape);
    size_t (*mlstm_forward_scratch)(struct mlstm_shape shape);
    size_t (*mlstm_backward_scratch)(struct mlstm_shape shape);
    /* One token: h (B,H,V) strided =; state is read and updated; q, k (B,H,K), v (B,H,V), i, f (B,H) strided */
    void (*mlstm_step)(struct device *dev, tensor h, struct mlstm_state state, tensor q, tensor k, tensor v, tensor i,
                       tensor f, struct mlstm_rule rule);

    /* --- sLSTM (xLSTM, arXiv 2405.04517, its section 2.2) --------------------------------------------------------- */
    /* D = H P units; head h has units h P .. h P + P - 1 and sees only itself. For the gates g = i, f, z, o, in this
     * order,
     *   raw_g[t,j] = x[t,g,j] + bias[g,j] + sum_k r[h, g P + j, k] y[t-1,k]          (j, k within head h)
     *   lfm = log sigmoid(raw_f) + m[t-1];  m[t] = raw_i where n[t-1] = 0, else max(raw_i, lfm)
     *   ig = min(1, exp(raw_i - m[t]));  fg = min(1, exp(lfm - m[t]))
     *   c[t] = fg c[t-1] + ig tanh(raw_z);  n[t] = fg n[t-1] + ig;  y[t] = sigmoid(raw_o) c[t] / n[t]
     * A state is (B,4,D) real: y, c, n, m in this order; it starts as 0, as does every document.
     * y (B,T,D) strided =; final optional =; saved: slstm_saved() bytes that backward reads, or NULL when no backward
     * follows; x (B,T,4D) strided, columns g D + j; r (H,4P,P); bias (4,D) real; initial optional; doc optional. */
    void (*slstm_forward)(struct device *dev, tensor y, tensor final, void *saved, tensor x, tensor r, tensor bias,
                          tensor initial, tensor doc, void *scratch);
    /* dx (B,T,4D) strided =; dr (H,4P,P), dbias (4,D) real +=; dinitial (B,4,D) optional = (0 for m, which carries no
     * gradient); dy strided; dfinal optional, of m nothing is read. clip > 0: what comes to y[t-1] through r is kept
     * within [-clip, clip], element by element; 0: as it is. y as forward put it out. */
    void (*slstm_backward)(struct device *dev, tensor dx, tensor dr, tensor dbias, tensor dinitial, tensor dy,
                           tensor dfinal, const void *saved, tensor y, tensor x, tensor r, tensor bias, tensor initial,
                           tensor doc, double clip, void *scratch);
    size_t (*slstm_saved)(struct slstm_shape shape);
    size_t (*slstm_forward_scratch)(struct slstm_shape shape);
    size_t (*slstm_backward_scratch)(struct slstm_shape shape);
    /* One token: y (B,D) strided =; state (B,4,D) real is read and updated; x (B,4D) strided; scratch as forward's of
     * one token, slstm_forward_scratch with T = 1 */
    void (*slstm_step)(struct device *dev, tensor y, tensor state, tensor x, tensor r, tensor bias, void *scratch);

    /* --- positions of tokens within their documents --------------------------------------------------------------- */
    /* positions (B,T) i32 =: how many tokens of its document come before each token. before (B) i32 optional: tokens of
     * document 0 that came before the row; doc optional. Where neither is given, positions are 0 .. T-1, which the
     * operations below take none for. */
    void (*token_positions)(struct device *dev, tensor positions, tensor doc, tensor before);

    /* --- rotary positions (arXiv 2104.09864), and a norm of each head before them --------------------------------- */
    /* u = x rstd weight, rstd = 1/sqrt(mean over the head's P channels of x^2 + eps); without weight u = x. With p the
     * token's position and a_i = p base^(-2i/P), for each pair of channels i and j = i + P/2:
     *   y_i = u_i cos a_i - u_j sin a_i;   y_j = u_j cos a_i + u_i sin a_i.     base = 0: no rotation, y = u.
     * y (B,T,H,P) strided =, the same memory as x where there is no weight, if wanted; rstd (B,T,H) real =, with weight
     * only; x (B,T,H,P) strided; weight (P) real, shared by all heads, optional; positions (B,T) i32 optional. P even,
     * at most 256. */
    void (*rope_forward)(struct device *dev, tensor y, tensor rstd, tensor x, tensor weight, tensor positions,
                         double base, double eps);
    /* dx strided =, the same memory as dy if wanted; with weight: dweight (P) real +=, and rstd and x as in forward,
     * else none; dy strided */
    void (*rope_backward)(struct device *dev, tensor dx, tensor dweight, tensor dy, tensor rstd, tensor x,
                          tensor weight, tensor positions, double base, void *scratch);
    size_t (*rope_backward_scratch)(int64_t R, int64_t H, int64_t P); /* 0 is what it takes without a weight */

    /* --- attention: causal, within documents, with grouped heads, a window, a cache (arXiv 1706.03762, 2205.14135) */
    /* For every head h, whose keys and values are those of head g (rule), and s = P^-1/2: token t sees the tokens j of
     * its document with max(0, p_t - window + 1) <= p_j <= p_t, p the positions; those before the row are in the cache,
     * as far as it goes back:
     *   z_tj = s q_t . k_j;   lse_t = log sum_j exp(z_tj);   o_t = sum_j exp(z_tj - lse_t) v_j.
     * o (B,T,H,P) strided =; lse (B,H,T) real =, natural logarithms, optional when no backward follows; q (B,T,H,P), k,
     * v (B,T,G,P) strided; positions (B,T) i32 optional, with a cache from token_positions with its count; cache:
     * earlier tokens of document 0, all none where there are none. P at most 256. */
    void (*attention_forward)(struct device *dev, tensor o, tensor lse, tensor q, tensor k, tensor v, tensor positions,
                              struct attention_cache cache, struct attention_rule rule, void *scratch);
    /* dq (B,T,H,P), dk, dv (B,T,G,P) strided =; dout strided; o, lse as forward put them out. The cache is held fixed:
     * it gets no gradient, but dq knows of it. */
    void (*attention_backward)(struct device *dev, tensor dq, tensor dk, tensor dv, tensor dout, tensor o, tensor lse,
                               tensor q, tensor k, tensor v, tensor positions, struct attention_cache cache,
                               struct attention_rule rule, void *scratch);
    size_t (*attention_forward_scratch)(struct attention_shape shape);
    size_t (*attention_backward_scratch)(struct attention_shape shape);
    /* Put a row's keys and values into the cache that its first document goes on from: those of the last document, as
     * far as there are slots; count = its tokens. k, v (B,T,G,P) strided; positions (B,T) i32 optional. */
    void (*attention_store)(struct device *dev, struct attention_cache cache, tensor k, tensor v, tensor positions);
    /* One token, whose key and value are the cache's newest: o (B,H,P) strided =; q (B,H,P) strided */
    void (*attention_step)(struct device *dev, tensor o, tensor q, struct attention_cache cache,
                           struct attention_rule rule, void *scratch);
    size_t (*attention_step_scratch)(struct attention_shape shape);

    /* --- RAT: a gated recurrence within chunks, attention over their ends (arXiv 2507.04416) ---------------------- */
    /* Chunks are cut from each document's start: a token at position p has the place p mod Q in chunk c = floor(p / Q).
     * Per channel of head h, with the query and key of group h mod G, R_c the rotation of rope_forward by the position
     * c:
     *   a = sigmoid(g + bias);   k~[t] = a k~[t-1] + (1 - a) k[t];   v~[t] = a v~[t-1] + (1 - a) v[t],
     * from 0 at the place 0. With s = P^-1/2, K_j = R_j k~ and V_j = v~ at the end of chunk j of the token's document:
     *   o = softmax over {s R_c q . K_j, j < c} and {s q . k~[t]} of V_j and v~[t];   y = sigmoid(z) o.
     * y (B,T,H,P) strided =; final: the state behind the last token =, all none or none; it may be initial's memory;
     * saved: rat_saved() bytes that backward reads, or NULL when no backward follows; z, v, g (B,T,H,P), q, k (B,T,G,P)
     * strided; bias (H P); positions (B,T) i32 optional, with an initial state from token_positions with its count;
     * initial: of document 0, all none where there is none; chunk Q >= 1; base as in rope_forward. P even, at most
     * 256. */
    void (*rat_forward)(struct device *dev, tensor y, struct rat_state final, void *saved, tensor z, tensor v, tensor g,
                        tensor bias, tensor q, tensor k, tensor positions, struct rat_state initial, int64_t chunk,
                        double base, void *scratch);
    /* dz, dv, dg, dq, dk strided =; dbias (H P) real +=; dy strided. The initial state is held fixed: it gets no
     * gradient, but dq and dg know of it. */
    void (*rat_backward)(struct device *dev, tensor dz, tensor dv, tensor dg, tensor dbias, tensor dq, tensor dk,
                         tensor dy, const void *saved, tensor z, tensor v, tensor g, tensor bias, tensor q, tensor k,
                         tensor positions, struct rat_state initial, int64_t chunk, double base, void *scratch);
    size_t (*rat_saved)(struct rat_shape shape);
    size_t (*rat_forward_scratch)(struct rat_shape shape);
    size_t (*rat_backward_scratch)(struct rat_shape shape);
    /* One token: y (B,H,P) strided =; state is read and updated; z, v, g (B,H,P), q, k (B,G,P) strided */
    void (*rat_step)(struct device *dev, tensor y, struct rat_state state, tensor z, tensor v, tensor g, tensor bias,
                     tensor q, tensor k, int64_t chunk, double base, void *scratch);
    size_t (*rat_step_scratch)(struct rat_shape shape);

    /* --- nonlinear diagonal recurrences: the cells of kernels/cells/ (ParaRNN, arXiv 2510.21450) ------------------ */
    /* Every channel is a recurrence of its own, s[t] = f(s[t-1], u[t] + bias; weight), with S states, U inputs and W
     * weights, as the cell has them (kernels/cells/cells.h); y is the state that is the cell's output. At a document's
     * start s[t-1] = 0.
     * Unknown states are first guessed as f(0, u + bias), a row's first, if it goes on, as f(initial, u + bias):
     * Newton's at all tokens, shooting's at the token before each chunk; where a chunk starts a document there is none.
     * y (B,T,N) act =; others (B,T,S-1,N) act =: the states that are not the output, in their order; none where S = 1,
     * or where no backward follows; final (B,S,N) real optional =; report (device memory) optional: residual =
     * max(itself, what is found); u (B,T,H,U,N/H) strided: channel n = h N/H + j; bias (U,N) optional; weight (W,N);
     * initial (B,S,N) real optional; doc optional. */
    void (*cell_forward)(struct device *dev, tensor y, tensor others, tensor final, struct cell_report *report,
                         tensor u, tensor bias, tensor weight, tensor initial, tensor doc, const struct cell *cell,
                         struct cell_solver solver, void *scratch);
    /* The gradient of the exact recurrence at the states that are given: lambda[t] = dy[t] + J[t+1]^T lambda[t+1], J
     * the step's Jacobian, and from it du, dbias, dweight (section 2 of the paper).
     * du strided =; dbias (U,N), dweight (W,N) real +=; dinitial (B,S,N) real optional =; dy (B,T,N); dfinal (B,S,N)
     * real optional; y, others as forward put them out. */
    void (*cell_backward)(struct device *dev, tensor du, tensor dbias, tensor dweight, tensor dinitial, tensor dy,
                          tensor dfinal, tensor y, tensor others, tensor u, tensor bias, tensor weight, tensor initial,
                          tensor doc, const struct cell *cell, void *scratch);
    size_t (*cell_forward_scratch)(struct cell_shape shape, struct cell_solver solver);
    size_t (*cell_backward_scratch)(struct cell_shape shape);
    /* The fastest method that is known for a shape, with its iterations and chunk: by a table of measurements. */
    struct cell_solver (*cell_choose)(struct cell_shape shape);
    /* One token: y (B,N) =; state (B,S,N) real updated; u (B,H,U,N/H) strided */
    void (*cell_step)(struct device *dev, tensor y, tensor state, tensor u, tensor bias, tensor weight,
                      const struct cell *cell);

    /* --- head norm: LayerNorm of every head's P = I/H channels, skip and gate ------------------------------------- */
    /* u = (y - mean) rstd weight;  rstd = 1/sqrt(variance + eps), the variance that of all P (biased);
     * g = (u + skip x) act(z); without x there is no skip, without z no gate.
     * g (R,I) act =; mean, rstd (R,H) real =, which also say H; y (R,I); weight (I); x (R,I) strided and skip (I), both
     * or neither; z (R,I) strided optional; act: silu or sigmoid */
    void (*head_norm_forward)(struct device *dev, tensor g, tensor mean, tensor rstd, tensor y, tensor weight, tensor x,
                              tensor skip, tensor z, enum activation act, double eps);
    /* dy (R,I) =; dx, dz (R,I) strided =, none where x, z are none; dweight, dskip (I) real += */
    void (*head_norm_backward)(struct device *dev, tensor dy, tensor dx, tensor dz, tensor dweight, tensor dskip,
                               tensor dg, tensor y, tensor mean, tensor rstd, tensor weight, tensor x, tensor skip,
                               tensor z, enum activation act, void *scratch);
    size_t (*head_norm_backward_scratch)(int64_t R, int64_t I, int64_t H);

    /* --- block-diagonal linear: y[r, g O + o] = sum_i w[g,o,i] x[r, g I + i] -------------------------------------- */
    /* y (R,G O) strided =; x (R,G I) strided; w (G,O,I). From many blocks of 4 x 4 to a few of hundreds. */
    void (*block_linear_forward)(struct device *dev, tensor y, tensor x, tensor w);
    /* dx (R,G I) strided: = or += if add_dx; dw (G,O,I) real +=; dy (R,G O) strided */
    void (*block_linear_backward)(struct device *dev, tensor dx, bool add_dx, tensor dw, tensor dy, tensor x, tensor w,
                                  void *scratch);
    size_t (*block_linear_backward_scratch)(int64_t R, int64_t G, int64_t O, int64_t I);

    /* --- GLU: h = act(gate) * up with u (R,2F) = [gate | up]; or h = act(u) with u (R,F) -------------------------- */
    /* h (R,F) = */
    void (*glu_forward)(struct device *dev, tensor h, tensor u, enum activation act);
    /* du, shaped like u, = */
    void (*glu_backward)(struct device *dev, tensor du, tensor dh, tensor u, enum activation act);

    /* --- language-model head + cross-entropy, tile by tile: the R x V logits never exist at once ------------------ */
    /* logits = x w^T, or cap tanh(x w^T / cap) where cap > 0;
     * for each row with target >= 0: loss = lse(logits) - logits[target] + z_loss * lse^2.
     * sums: += (device memory). losses (R) real optional =: -log p(target) (0 for masked rows; without the z term).
     * dx (R,D) act optional =: d(scale * sum of losses)/dx; dw (V,D) real optional += (= if empty): the same for w
     * (only with dx).
     * x (R,D); w (V,D); targets (R) i32, negative = masked. */
    void (*head_loss)(struct device *dev, struct loss_sums *sums, tensor losses, tensor dx, tensor dw, tensor x,
                      tensor w, tensor targets, double scale, double z_loss, double cap, void *scratch);
    size_t (*head_loss_scratch)(int64_t R, int64_t D, int64_t V);

    /* --- conversion: to (n) = from (n), rounded to the nearest value of its type, ties to even -------------------- */
    void (*convert)(struct device *dev, tensor to, tensor from);

    /* --- optimizer ---------------------------------------------------------------------------------------------- */
    /* *sum (device memory, f64) += sum of x[i]^2 over the flat real array x (n), in a fixed order, accumulated in
     * f64 */
    void (*sum_squares)(struct device *dev, double *sum, tensor x);
    /* Decide a step from its totals: with c = 1/(scale valid), norm = c sqrt(squares), and t = *steps + 1,
     *   skip unless nll, z and norm are finite, valid > 0 and residual <= residual_max;  grad_scale = c min(1,
     *   clip/(norm + 1e-6)), or c without clipping;  correction_i = 1 - beta_i^t;  *steps = t unless skipped.
     * step = (for a skipped one: skip alone counts); report =; all pointers are device memory, rule is not. */
    void (*step_scalars)(struct device *dev, struct adamw_step *step, struct step_report *report, int64_t *steps,
                         const struct step_totals *totals, const struct step_rates *rates,
                         const struct step_rule *rule);
    /* Of the reports of n layers on every rank, (ranks,n): worst[i] = the largest residual of layer i, and *largest
     * that of all. What is not a number counts as infinite. ranks and n > 0; all in device memory. */
    void (*worst_reports)(struct device *dev, struct cell_report *worst, double *largest,
                          const struct cell_report *reports, int64_t ranks, int64_t n);
    /* For every element of every segment, with g' = grad_scale*g:  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
     * p -= decay_rate*decay*p + lr*lr_scale * (m/correction1) / (sqrt(v/correction2) + eps), with the old p on the
     * right; then, where the segment is clamped, p = min(max(p, clamp_min), clamp_max), which leaves what is not a
     * number; and rounded = p, rounded as by convert (Loshchilov & Hutter, arXiv 1711.05101). The slices are in host
     * memory, needed only during the call; step is in device memory. */
    void (*adamw)(struct device *dev, const struct adamw_slice *slices, int64_t count, const struct adamw_step *step);
};

/* The CPU tables (OpenMP threads, BLAS). */
extern const struct ops ops_cpu_f32;
extern const struct ops ops_cpu_f64;

#endif
