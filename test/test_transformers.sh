#!/bin/sh
# test_transformers.sh: transformers and riverrun see the same model. What riverrun trained is opened by transformers,
# from the checkpoint itself and from exports; what transformers saved is imported, trained for a step and opened there
# again. Skipped (77) where the Python environment can't be had; the last line says why.
set -u
# Small models: threads would only wait for each other.
OMP_NUM_THREADS=1
. test/support_python.sh
need_python

cat >"$WORK/small.ini" <<TXT
[model]
d_model = 48
pattern = m*3
[block.m]
mixer = mamba2
d_state = 24
head_dim = 16
[train]
steps = 4
batch = 4
[data]
seq_len = 64
[optimizer]
lr = 0.02
TXT
must "$RIVERRUN" tokenize --out "$WORK/data" Makefile common

echo "== trained by riverrun, and exported"
must "$RIVERRUN" train "$WORK/small.ini" train.out="$WORK/run" data.train="$WORK/data"
must "$RIVERRUN" export "$WORK/run" --out "$WORK/f32"
must "$RIVERRUN" export "$WORK/run" --out "$WORK/bf16" --dtype bf16
must "$RIVERRUN" export "$WORK/run" --out "$WORK/bf16-all" --dtype bf16 --dtype-all
# Every key of config.json that has a say, away from its usual value.
must "$RIVERRUN" train "$WORK/small.ini" train.out="$WORK/unusual" data.train="$WORK/data" model.tie_embeddings=false \
    model.norm_eps=0.01 model.pad_vocab_to=50 block.m.d_conv=3 block.m.expand=4 block.m.head_dim=32 \
    block.m.dt_limit_min=0.01
set -- "$WORK/run/latest" "$WORK/unusual/latest" "$WORK/f32" "$WORK/bf16" "$WORK/bf16-all"
# The same of Mamba.
sed -e 's/mamba2/mamba/' -e '/head_dim/d' "$WORK/small.ini" >"$WORK/mamba.ini"
must "$RIVERRUN" train "$WORK/mamba.ini" train.out="$WORK/mamba" data.train="$WORK/data"
must "$RIVERRUN" export "$WORK/mamba" --out "$WORK/mamba-bf16" --dtype bf16
must "$RIVERRUN" train "$WORK/mamba.ini" train.out="$WORK/mamba-unusual" data.train="$WORK/data" model.norm_eps=0.01 \
    model.tie_embeddings=false model.pad_vocab_to=50 block.m.d_conv=3 block.m.expand=3 block.m.dt_rank=5
set -- "$@" "$WORK/mamba/latest" "$WORK/mamba-bf16" "$WORK/mamba-unusual/latest"
# And of xLSTM.
sed -e 's/mamba2/mlstm/' -e '/head_dim/d' -e 's/^d_state.*/heads = 2\nmlp = swiglu\nmlp_width = 320/' \
    -e 's/^d_model.*/d_model = 128/' \
    -e 's/^pattern/tie_embeddings = false\nlogit_cap = 30\nnorm_eps = 1e-6\npattern/' "$WORK/small.ini" \
    >"$WORK/xlstm.ini"
must "$RIVERRUN" train "$WORK/xlstm.ini" train.out="$WORK/xlstm" data.train="$WORK/data"
must "$RIVERRUN" export "$WORK/xlstm" --out "$WORK/xlstm-bf16" --dtype bf16
must "$RIVERRUN" train "$WORK/xlstm.ini" train.out="$WORK/xlstm-unusual" data.train="$WORK/data" model.norm_eps=0.01 \
    model.logit_cap=0 model.pad_vocab_to=50 block.m.heads=4 block.m.qk_factor=1 block.m.v_factor=1.5 block.m.eps=1e-3 \
    block.m.gate_soft_cap=0 block.m.mlp_width=213
set -- "$@" "$WORK/xlstm/latest" "$WORK/xlstm-bf16" "$WORK/xlstm-unusual/latest"

# The same of Llama, and of its kin without a gate.
sed -e 's/mamba2/attention/' -e '/d_state/d' -e 's/head_dim = 16/heads = 6/' "$WORK/small.ini" >"$WORK/llama.ini"
must "$RIVERRUN" train "$WORK/llama.ini" train.out="$WORK/llama" data.train="$WORK/data" block.m.mlp=swiglu
must "$RIVERRUN" train "$WORK/llama.ini" train.out="$WORK/llama-unusual" data.train="$WORK/data" block.m.mlp=swiglu \
    model.norm_eps=0.01 model.tie_embeddings=false model.pad_vocab_to=50 block.m.kv_heads=2 block.m.head_dim=12 \
    block.m.rope_base=300 block.m.mlp_width=100
must "$RIVERRUN" train "$WORK/llama.ini" train.out="$WORK/arcee" data.train="$WORK/data" block.m.mlp=gelu
must "$RIVERRUN" train "$WORK/llama.ini" train.out="$WORK/arcee-unusual" data.train="$WORK/data" block.m.mlp=relu2 \
    model.tie_embeddings=false block.m.kv_heads=3
set -- "$@" "$WORK/llama/latest" "$WORK/llama-unusual/latest" "$WORK/arcee/latest" "$WORK/arcee-unusual/latest"

echo "== made by transformers, and imported"
must "$python" scripts/random_transformers_model.py "$WORK/hf"
for kind in untied tied bf16 sharded limited mamba mamba-unusual xlstm xlstm-unusual llama llama-unusual arcee; do
    must "$RIVERRUN" import "$WORK/hf/$kind" --tokenizer bytes --out "$WORK/import-$kind"
    set -- "$@" "$WORK/hf/$kind=$WORK/import-$kind"
done

echo "== imported, and trained further"
must "$RIVERRUN" train "$WORK/small.ini" train.out="$WORK/further" data.train="$WORK/data" model.tie_embeddings=false \
    train.init="$WORK/import-sharded"
if cmp -s "$WORK/further/latest/model.safetensors" "$WORK/import-sharded/model.safetensors"; then
    echo "FAIL  training left the weights as they were"
    exit 1
fi

echo "== compared"
"$python" scripts/check_transformers.py --riverrun "$RIVERRUN" "$@" "$WORK/further/latest"
