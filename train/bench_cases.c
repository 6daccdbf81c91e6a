/* bench_cases.c: the shapes at which riverrun bench ops measures, and the figures each is held against, milliseconds
 * for forward and for forward + backward in bf16 on one H200: the public implementation's (state-spaces/mamba,
 * causal-conv1d, NX-AI/mlstm_kernels), the time from which the work is worth using, and the time aimed at. What the
 * chip allows is computed from the row's bytes, products and special functions. */
#include "train/bench_ops.h"

const struct bench_case bench_cases[] = {
    /* The shapes of published comparisons: a model of width 2048. */
    {&bench_scan, "width 2048", "B=8 T=2048 D=4096 N=16", {1.20, 5.86}, {1.1, 3.5}, {0.5, 1.8}},
    {&bench_scan, "one long row", "B=1 T=65536 D=4096 N=16", {6.04, 26.5}, {5.0, 15}, {2.0, 7.5}},
    {&bench_conv, "width 2048", "B=8 T=2048 C=4096", {0.129, 0.715}, {0.12, 0.40}, {0.08, 0.25}},
    {&bench_ssd, "width 2048", "B=8 T=2048 H=64 P=64 N=128", {1.23, 4.04}, {0.7, 2.0}, {0.40, 1.4}},
    {&bench_ssd, "one long row", "B=1 T=65536 H=64 P=64 N=128", {2.66, 10.3}, {2.2, 7.5}, {1.5, 5.0}},
    {&bench_mlstm, "4 heads of 512", "B=8 T=2048 H=4 K=256 V=512", {0.85, 2.59}, {0.85, 2.6}, {0.40, 1.4}},
    {&bench_mlstm, "one long row", "B=1 T=65536 H=4 K=256 V=512", {3.86, 12.9}, {3.9, 13}, {1.8, 6.0}},
    {&bench_slstm, "4 heads of 192", "B=16 T=1024 H=4 P=192", {0}, {4, 10}, {2, 6}},

    {&bench_cell_projected, "ParaGRU, width 2048", "B=8 T=2048 H=4 J=512 K=512 e=0 m=0 k=3 c=0",
     {3.03, 12.6}, {1.2, 4.0}, {0.6, 2.0}},
    {&bench_cell_projected, "ParaLSTM, width 2048", "B=8 T=2048 H=4 J=512 K=512 e=1 m=0 k=3 c=0",
     {4.97, 15.8}, {1.6, 5.0}, {0.8, 2.6}},
    {&bench_cell_projected, "ParaGRU, one long row", "B=1 T=65536 H=4 J=512 K=512 e=0 m=0 k=3 c=0",
     {0}, {2.0, 6.0}, {1.0, 3.0}},
    {&bench_cell_projected, "ParaLSTM, one long row", "B=1 T=65536 H=4 J=512 K=512 e=1 m=0 k=3 c=0",
     {0}, {2.0, 6.0}, {1.0, 3.0}},

    {&bench_attention, "width 2048", "B=8 T=2048 H=16 P=128", {0.30, 1.21}, {0.33, 1.33}, {0.30, 1.21}},

    /* The cells alone, by each of their solvers. */
    {&bench_cell, "ParaGRU", "B=8 T=2048 H=4 J=512 e=0 m=1 k=3 c=0", {0}, {0}, {0}},
    {&bench_cell, "ParaGRU, Newton", "B=8 T=2048 H=4 J=512 e=0 m=2 k=3 c=0", {1.33, 0}, {0}, {0}},
    {&bench_cell, "ParaGRU, shooting", "B=8 T=2048 H=4 J=512 e=0 m=3 k=3 c=0", {0}, {0}, {0}},
    {&bench_cell, "ParaLSTM", "B=8 T=2048 H=4 J=512 e=1 m=1 k=3 c=0", {0}, {0}, {0}},
    {&bench_cell, "ParaLSTM, Newton", "B=8 T=2048 H=4 J=512 e=1 m=2 k=3 c=0", {2.71, 0}, {0}, {0}},
    {&bench_cell, "ParaLSTM, shooting", "B=8 T=2048 H=4 J=512 e=1 m=3 k=3 c=0", {0}, {0}, {0}},
    {&bench_cell, "ParaGRU, a call a token", "B=1 T=512 H=4 J=512 e=0 m=4 k=3 c=0", {0}, {0}, {0}},

    /* The operations of Mamba 129M and Mamba-2 129M, 16 rows of 2048 tokens, in the views that the models cut. */
    {&bench_scan, "Mamba 129M", "B=16 T=2048 D=1536 N=16 d=1 p=3072 q=80", {0}, {0}, {0}},
    {&bench_conv, "Mamba 129M", "B=16 T=2048 C=1536 d=1 p=3072", {0}, {0}, {0}},
    {&bench_conv, "Mamba-2 129M", "B=16 T=2048 C=1792 d=1 p=3392", {0}, {0}, {0}},
    {&bench_ssd, "Mamba-2 129M", "B=16 T=2048 H=24 P=64 N=128 d=1 p=1792", {0}, {0}, {0}},
    {&bench_ssd_dt, "Mamba-2 129M", "B=16 T=2048 H=24 p=3392", {0}, {0}, {0}},
    {&bench_gated_rmsnorm, "Mamba-2 129M", "R=32768 I=1536 p=3392", {0}, {0}, {0}},
    {&bench_add_norm, "both 129M", "R=32768 D=768", {0}, {0}, {0}},
    {&bench_add_norm, "LayerNorm, width 768", "R=32768 D=768 l=1", {0}, {0}, {0}},
    {&bench_embedding, "both 129M", "R=32768 D=768 V=50304", {0}, {0}, {0}},
    {&bench_head_loss, "both 129M", "R=32768 D=768 V=50304", {0}, {0}, {0}},
    {&bench_adamw, "both 129M", "n=129135360", {0}, {0}, {0}},
    {&bench_convert, "both 129M", "n=129135360", {0}, {0}, {0}},
    {&bench_linear, "Mamba 129M in_proj", "R=32768 I=768 O=3072", {0}, {0}, {0}},
    {&bench_linear, "Mamba 129M x_proj", "R=32768 I=1536 O=80", {0}, {0}, {0}},
    {&bench_linear, "Mamba 129M dt_proj", "R=32768 I=48 O=1536 p=80", {0}, {0}, {0}},
    {&bench_linear, "Mamba-2 129M in_proj", "R=32768 I=768 O=3352 q=3392", {0}, {0}, {0}},
    {&bench_linear, "both 129M out_proj", "R=32768 I=1536 O=768", {0}, {0}, {0}},
    {&bench_glu, "width 768", "R=32768 F=2048", {0}, {0}, {0}},
    {&bench_glu, "width 768, gelu", "R=32768 F=2048 a=1", {0}, {0}, {0}},

    /* Mamba-2 1.34B, 8 rows of 2048 tokens. */
    {&bench_linear, "Mamba-2 1.34B in_proj", "R=16384 I=2048 O=8512", {0}, {0}, {0}},
    {&bench_linear, "Mamba-2 1.34B out_proj", "R=16384 I=4096 O=2048", {0}, {0}, {0}},
    {&bench_gated_rmsnorm, "Mamba-2 1.34B", "R=16384 I=4096 p=8512", {0}, {0}, {0}},
    {&bench_add_norm, "Mamba-2 1.34B", "R=16384 D=2048", {0}, {0}, {0}},

    /* Llama 124M and 1.32B, in the views that the models cut. */
    {&bench_attention, "Llama 124M", "B=16 T=2048 H=12 P=64 p=2304", {0}, {0}, {0}},
    {&bench_attention, "Llama 124M, documents", "B=16 T=2048 H=12 P=64 d=1 p=2304", {0}, {0}, {0}},
    {&bench_attention, "Llama 1.32B", "B=8 T=2048 H=32 P=64 p=6144", {0}, {0}, {0}},
    {&bench_attention, "window", "B=8 T=2048 H=16 P=128 w=512", {0}, {0}, {0}},
    {&bench_rope, "Llama 124M", "B=16 T=2048 H=24 P=64 p=2304", {0}, {0}, {0}},

    /* The smaller operations of the xLSTM: 255M of the 7B architecture; 125M of arXiv 2405.04517 (the norm behind an
     * mLSTM and behind an sLSTM, q of an mLSTM, a gate of an sLSTM). */
    {&bench_mlstm, "xLSTM 255M", "B=16 T=2048 H=4 K=128 V=256 d=1", {0}, {0}, {0}},
    {&bench_mlstm, "xLSTM 125M", "B=16 T=2048 H=4 K=384 V=384 d=1", {0}, {0}, {0}},
    {&bench_softcap, "xLSTM 255M", "R=32768 N=8", {0}, {0}, {0}},
    {&bench_head_norm, "xLSTM 255M", "R=32768 I=1024 H=4 z=1 a=3", {0}, {0}, {0}},
    {&bench_head_norm, "xLSTM 125M, mLSTM", "R=32768 I=1536 H=4 s=1 z=1 p=3072", {0}, {0}, {0}},
    {&bench_head_norm, "xLSTM 125M, sLSTM", "R=32768 I=768 H=4", {0}, {0}, {0}},
    {&bench_block_linear, "xLSTM 125M, mLSTM", "R=32768 G=384 O=4 I=4", {0}, {0}, {0}},
    {&bench_block_linear, "xLSTM 125M, sLSTM", "R=32768 G=4 O=192 I=192", {0}, {0}, {0}},
    {&bench_slstm, "xLSTM 125M", "B=16 T=2048 H=4 P=192", {0}, {0}, {0}},
    {&bench_slstm, "xLSTM 350M", "B=16 T=2048 H=4 P=256", {0}, {0}, {0}},
    {&bench_slstm, "xLSTM 760M", "B=16 T=2048 H=4 P=384", {0}, {0}, {0}},
    {&bench_slstm, "xLSTM 1.3B", "B=8 T=2048 H=4 P=512", {0}, {0}, {0}},

    /* One token of 16 sequences. */
    {&bench_conv_step, "Mamba 129M", "B=16 C=1536 p=3072", {0}, {0}, {0}},
    {&bench_scan_step, "Mamba 129M", "B=16 D=1536 N=16 p=3072 q=80", {0}, {0}, {0}},
    {&bench_ssd_step, "Mamba-2 129M", "B=16 H=24 P=64 N=128 p=1792", {0}, {0}, {0}},
    {0},
};
