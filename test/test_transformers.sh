#!/bin/sh
# test_transformers.sh: transformers and riverrun see the same model. What riverrun trained is opened by transformers, from the
# checkpoint itself and from exports; what transformers saved is imported, trained for a step and opened there again.
# Skipped (77) where the Python environment can't be had; the last line says why.
set -u
BUILD=${BUILD:-build}
RIVERRUN=${RIVERRUN:-$BUILD/riverrun}
python=$(sh scripts/make_venv.sh)
code=$?
echo "$python"
[ $code = 0 ] || exit $code
python=$(echo "$python" | tail -n 1)

# Small models: threads would only wait for each other.
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
export OMP_NUM_THREADS OMP_WAIT_POLICY
work=$(mktemp -d "${TMPDIR:-/tmp}/transformers.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
must() {
    "$@" && return 0
    echo "FAIL  exit code $? from: $*"
    exit 1
}

cat >"$work/small.ini" <<TXT
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
must "$RIVERRUN" tokenize --out "$work/data" Makefile common

echo "== trained by riverrun, and exported"
must "$RIVERRUN" train "$work/small.ini" train.out="$work/run" data.train="$work/data"
must "$RIVERRUN" export "$work/run" --out "$work/f32"
must "$RIVERRUN" export "$work/run" --out "$work/bf16" --dtype bf16
must "$RIVERRUN" export "$work/run" --out "$work/bf16-all" --dtype bf16 --dtype-all
# Every key of config.json that has a say, away from its usual value.
must "$RIVERRUN" train "$work/small.ini" train.out="$work/unusual" data.train="$work/data" model.tie_embeddings=false \
    model.norm_eps=0.01 model.pad_vocab_to=50 block.m.d_conv=3 block.m.expand=4 block.m.head_dim=32 block.m.dt_limit_min=0.01
set -- "$work/run/latest" "$work/unusual/latest" "$work/f32" "$work/bf16" "$work/bf16-all"
# The same of Mamba.
sed -e 's/mamba2/mamba/' -e '/head_dim/d' "$work/small.ini" >"$work/mamba.ini"
must "$RIVERRUN" train "$work/mamba.ini" train.out="$work/mamba" data.train="$work/data"
must "$RIVERRUN" export "$work/mamba" --out "$work/mamba-bf16" --dtype bf16
must "$RIVERRUN" train "$work/mamba.ini" train.out="$work/mamba-unusual" data.train="$work/data" model.norm_eps=0.01 \
    model.tie_embeddings=false model.pad_vocab_to=50 block.m.d_conv=3 block.m.expand=3 block.m.dt_rank=5
set -- "$@" "$work/mamba/latest" "$work/mamba-bf16" "$work/mamba-unusual/latest"
# And of xLSTM.
sed -e 's/mamba2/mlstm/' -e '/head_dim/d' -e 's/^d_state.*/heads = 2\nmlp = swiglu\nmlp_width = 320/' -e 's/^d_model.*/d_model = 128/' \
    -e 's/^pattern/tie_embeddings = false\nlogit_cap = 30\nnorm_eps = 1e-6\npattern/' "$work/small.ini" >"$work/xlstm.ini"
must "$RIVERRUN" train "$work/xlstm.ini" train.out="$work/xlstm" data.train="$work/data"
must "$RIVERRUN" export "$work/xlstm" --out "$work/xlstm-bf16" --dtype bf16
must "$RIVERRUN" train "$work/xlstm.ini" train.out="$work/xlstm-unusual" data.train="$work/data" model.norm_eps=0.01 \
    model.logit_cap=0 model.pad_vocab_to=50 block.m.heads=4 block.m.qk_factor=1 block.m.v_factor=1.5 block.m.eps=1e-3 \
    block.m.gate_soft_cap=0 block.m.mlp_width=213
set -- "$@" "$work/xlstm/latest" "$work/xlstm-bf16" "$work/xlstm-unusual/latest"

# The same of Llama, and of its kin without a gate.
sed -e 's/mamba2/attention/' -e '/d_state/d' -e 's/head_dim = 16/heads = 6/' "$work/small.ini" >"$work/llama.ini"
must "$RIVERRUN" train "$work/llama.ini" train.out="$work/llama" data.train="$work/data" block.m.mlp=swiglu
must "$RIVERRUN" train "$work/llama.ini" train.out="$work/llama-unusual" data.train="$work/data" block.m.mlp=swiglu \
    model.norm_eps=0.01 model.tie_embeddings=false model.pad_vocab_to=50 block.m.kv_heads=2 block.m.head_dim=12 \
    block.m.rope_base=300 block.m.mlp_width=100
must "$RIVERRUN" train "$work/llama.ini" train.out="$work/arcee" data.train="$work/data" block.m.mlp=gelu
must "$RIVERRUN" train "$work/llama.ini" train.out="$work/arcee-unusual" data.train="$work/data" block.m.mlp=relu2 \
    model.tie_embeddings=false block.m.kv_heads=3
set -- "$@" "$work/llama/latest" "$work/llama-unusual/latest" "$work/arcee/latest" "$work/arcee-unusual/latest"

echo "== made by transformers, and imported"
must "$python" scripts/random_transformers_model.py "$work/hf"
for kind in untied tied bf16 sharded limited mamba mamba-unusual xlstm xlstm-unusual llama llama-unusual arcee; do
    must "$RIVERRUN" import "$work/hf/$kind" --tokenizer bytes --out "$work/import-$kind"
    set -- "$@" "$work/hf/$kind=$work/import-$kind"
done

echo "== imported, and trained further"
must "$RIVERRUN" train "$work/small.ini" train.out="$work/further" data.train="$work/data" model.tie_embeddings=false \
    train.init="$work/import-sharded"
if cmp -s "$work/further/latest/model.safetensors" "$work/import-sharded/model.safetensors"; then
    echo "FAIL  training left the weights as they were"
    exit 1
fi

echo "== compared"
must "$python" scripts/check_transformers.py --riverrun "$RIVERRUN" "$@" "$work/further/latest"
