#!/bin/sh
# test_hub.sh: models that transformers has no class for open in it by the Python files that riverrun writes beside
# their weights (model/hub/): equal logits, equal generation, the same from a state as at once, and saved again from
# there. Skipped (77) where the Python environment can't be had; the last line says why.
set -u
# Small models: threads would only wait for each other.
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export HF_HUB_OFFLINE
. test/support_python.sh
need_python

must "$RIVERRUN" tokenize --out "$WORK/data" Makefile
cat >"$WORK/run.ini" <<TXT
[train]
steps = 1
batch = 2
[data]
train = $WORK/data
seq_len = 32
[model]
d_model = 32
TXT
names=''
# model NAME: a model of the [model] keys and blocks on standard input, trained for a step and exported.
model() {
    cat "$WORK/run.ini" - >"$WORK/$1.ini"
    must "$RIVERRUN" train "$WORK/$1.ini" train.out="$WORK/$1-run"
    must "$RIVERRUN" export "$WORK/$1-run" --out "$WORK/$1"
    names="$names $1"
}

# RAT with local attention, and its recurrence alone, as in the paper's tables.
model rat-local <<TXT
norm_eps = 1e-6
pattern = (r a)*2
[block.r]
mixer = rat
heads = 4
chunk = 5
mlp = gelu
[block.a]
mixer = attention
heads = 4
window = 9
mlp = gelu
TXT
model rat-extremes <<TXT
pattern = recurrence attention
tie_embeddings = false
[block.recurrence]
mixer = rat
heads = 2
groups = 1
chunk = 4096
mlp = swiglu
[block.attention]
mixer = rat
heads = 4
groups = 4
chunk = 1
rope_base = 0
TXT
# States that are full: what came long ago is forgotten, here as there.
model forgetful <<TXT
pattern = r a
[block.r]
mixer = rat
heads = 4
chunk = 3
context = 10
rope_base = 100
[block.a]
mixer = attention
heads = 2
context = 20
TXT
# Attention in all its forms, with the other norm, a cap and the other MLPs.
model attention <<TXT
norm = layer
norm_eps = 0.01
logit_cap = 3
pad_vocab_to = 50
tie_embeddings = false
pattern = a b c
[block.a]
mixer = attention
heads = 6
kv_heads = 2
head_dim = 10
qk_norm = true
mlp = geglu
mlp_width = 40
[block.b]
mixer = attention
heads = 2
rope_base = 0
window = 30
mlp = relu2
[block.c]
mixer = attention
heads = 4
kv_heads = 1
window = 16
qk_norm = true
rope_base = 500
TXT
# Mamba and attention, a few of these among many of those.
model jamba <<TXT
pattern = (m*3 a)*2
[block.m]
mixer = mamba
d_state = 5
d_conv = 3
dt_rank = 3
mlp = swiglu
[block.a]
mixer = attention
heads = 4
kv_heads = 2
mlp = swiglu
TXT
model mamba2 <<TXT
pattern = m n
[block.m]
mixer = mamba2
d_state = 6
head_dim = 8
n_groups = 2
dt_limit_min = 0.02
dt_limit_max = 0.5
mlp = swiglu
[block.n]
mixer = mamba2
d_state = 7
head_dim = 16
expand = 3
d_conv = 2
TXT
model xlstm <<TXT
norm = layer
init = small
pattern = (p*2 s)*2 t
[block.p]
mixer = mlstm_preup
heads = 2
[block.s]
mixer = slstm
mlp = geglu
[block.t]
mixer = slstm
heads = 2
d_conv = 0
TXT
model mlstm <<TXT
norm_eps = 0.1
pattern = m n o
[block.m]
mixer = mlstm
heads = 2
mlp = swiglu
[block.n]
mixer = mlstm
input_gate = sigmoid
normalise = false
gate_soft_cap = 0
v_factor = 1.5
[block.o]
mixer = mlstm
input_gate = sigmoid
qk_factor = 1
gate_soft_cap = 2
eps = 0.01
TXT
model pararnn <<TXT
norm = layer
init = open_lm
pattern = g l m
[block.g]
mixer = pararnn
cell = gru
residual_scale = true
mlp = swiglu
[block.l]
mixer = pararnn
cell = lstm
heads = 2
d_conv = 3
conv_silu = false
gate_order = norm_first
mlp = gelu
[block.m]
mixer = pararnn
cell = mgru
heads = 1
d_conv = 0
residual_scale = true
TXT
model everything <<TXT
pattern = mamba mamba2 mlstm preup slstm attention rat pararnn
[block.mamba]
mixer = mamba
[block.mamba2]
mixer = mamba2
d_state = 16
head_dim = 16
[block.mlstm]
mixer = mlstm
[block.preup]
mixer = mlstm_preup
qkv_block = 8
expand = 3
d_conv = 3
[block.slstm]
mixer = slstm
[block.attention]
mixer = attention
heads = 4
[block.rat]
mixer = rat
heads = 4
[block.pararnn]
mixer = pararnn
cell = lstm
residual_scale = true
TXT

# Tests of equality must not be those of zeros.
for name in $names; do set -- "$@" "$WORK/$name"; done
must "$python" scripts/stir_weights.py "$@"

# What was imported is the same model; and in bf16 the weights are others, but it opens.
must "$RIVERRUN" import "$WORK/everything" --tokenizer bytes --out "$WORK/import"
must "$RIVERRUN" export "$WORK/import" --out "$WORK/bf16" --dtype bf16
HF_HOME=$WORK/hf "$python" scripts/check_transformers.py --riverrun "$RIVERRUN" "$@" "$WORK/everything=$WORK/import" \
    "$WORK/bf16"
