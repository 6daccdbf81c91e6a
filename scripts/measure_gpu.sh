#!/bin/sh
# measure_gpu.sh: the measurements of docs/measurements/gpu.md, made here. Each part can be run by itself.
#
#     sh scripts/measure_gpu.sh [PART...]        (default: all of these)
#
#   data          prose.{train,valid}.txt[.zst] of TEXTS to shards, by TOKENIZER and byte by byte
#   ops           riverrun bench ops in bf16 and fp32: ops-bf16.csv, ops-fp32.csv                            2 minutes
#   steps         riverrun train on these shards, documents reset, STEPS steps: Mamba 129M, Mamba-2 129M, xLSTM 255M,
#                 Llama 124M (16 rows of 2048 a GPU), Mamba-2 1.34B, Llama 1.32B (8 rows; or ROWS of all):
#                 steps-*.jsonl                                                                              5 minutes
#   layers        RAT and attention of width 2048, nonlinear cells, at the shapes of docs/measurements/layer-figures.csv
#                 and train/bench_cases.c: layers.jsonl, cells.csv                                           1 minute
#   rat           layers of RAT and attention, 4,096 to 262,144 tokens, training and generation: rat.jsonl   2 minutes
#   pararnn       nonlinear cells by each solver, 128 to 1,048,576 tokens, and by batch: pararnn.jsonl       2 minutes
#   precision     1,000 steps of the byte models of configs/bytes in fp32 and in bf16: precision-*.jsonl     4 minutes
#   prose         configs/prose/mamba2-130m.ini to its end: prose-N.jsonl, N the number of GPUs              5 minutes
#   transformers  the loss of prose's checkpoint by transformers and by riverrun eval: transformers.jsonl    2 minutes
#   tables        Markdown and PNG of all that is there: gpu.md, *.png (matplotlib)
#
# From the environment: BUILD (build); RESULTS ($BUILD/gpu), where everything named above appears; RUNS ($RESULTS/runs),
# which needs 20 GB for checkpoints; TEXTS, a directory; TOKENIZER, a tokenizer.json of GPT-NeoX-20B; DATA
# ($RESULTS/data) for shards, which are used again; GPUS (1): ranks of steps and prose, under mpirun if several; STEPS
# (120); PYTHON. Every command with its commit, chip, time and exit code is in $RESULTS/commands.txt. A part that fails
# does not keep the others from running; exit code 1 then.
set -u
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
RIVERRUN=$BUILD/riverrun
RESULTS=${RESULTS:-$BUILD/gpu}
RUNS=${RUNS:-$RESULTS/runs}
DATA=${DATA:-$RESULTS/data}
GPUS=${GPUS:-1}
STEPS=${STEPS:-120}
PYTHON=${PYTHON:-python3}
failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

say() { echo "measure_gpu.sh: $*" >&2; }
problem() {
    say "$*"
    failed=1
}
[ -x "$RIVERRUN" ] || make -j"$(nproc)" BUILD="$BUILD" all >&2 || exit 1
mkdir -p "$RESULTS" "$RUNS" "$DATA" || exit 1
commit=$("$RIVERRUN" --version | sed -n '1s/^[^(]*(\([^ ,)]*\).*/\1/p')
chip=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sort | uniq -c | tr -s ' ' |
    tr '\n' ';')

# noted COMMAND...: run it, and note how that went.
noted() {
    begun=$(date +%s)
    "$@"
    code=$?
    echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) commit $commit, GPUs$chip exit code $code, $(($(date +%s) - begun)) s: $*" \
        >> "$RESULTS/commands.txt"
    [ "$code" = 0 ] || problem "exit code $code: $*"
    return "$code"
}

# train NAME CONFIG OPTION...: a run from its beginning; its log is $RESULTS/NAME.jsonl, the most memory that a GPU had
# in use meanwhile, in MiB, by nvidia-smi, $RESULTS/NAME.memory.
train() {
    name=$1
    shift
    rm -rf "${RUNS:?}/$name"
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 200 > "$RUNS/$name.used" 2>/dev/null &
    watch=$!
    launch=''
    [ "$GPUS" -gt 1 ] && launch="mpirun -np $GPUS"
    # shellcheck disable=SC2086  # two words or none
    noted $launch "$RIVERRUN" train "$@" train.device=cuda train.out="$RUNS/$name" > "$RESULTS/$name.out"
    kill "$watch" 2>/dev/null
    wait "$watch" 2>/dev/null
    sort -n "$RUNS/$name.used" | tail -n 1 > "$RESULTS/$name.memory"
    cp "$RUNS/$name/log.jsonl" "$RESULTS/$name.jsonl"
}

text() { # text SPLIT: the file
    for file in "$TEXTS/prose.$1.txt" "$TEXTS/prose.$1.txt.zst"; do
        [ -e "$file" ] && echo "$file" && return
    done
    say "TEXTS has no prose.$1.txt"
    return 1
}

measure_data() {
    [ -e "$DATA/done" ] && return
    : "${TEXTS:?is the directory that holds prose.train.txt and prose.valid.txt}"
    : "${TOKENIZER:?is the tokenizer.json of GPT-NeoX-20B}"
    for split in train valid; do
        file=$(text $split) || { failed=1; return; }
        noted "$RIVERRUN" tokenize --overwrite --out "$DATA/neox/$split" --tokenizer "$TOKENIZER" "$file" || return
        noted "$RIVERRUN" tokenize --overwrite --out "$DATA/bytes/$split" "$file" || return
    done
    touch "$DATA/done"
}

measure_ops() {
    for precision in bf16 fp32; do
        noted "$RIVERRUN" bench ops --device cuda --precision $precision --csv "$RESULTS/ops-$precision.csv" \
            > "$RESULTS/ops-$precision.jsonl"
    done
}

layers=configs/bench/layers.ini
measure_layers() {
    noted "$RIVERRUN" bench layer $layers --what train --block rat16 --batch 4,1,1 --seq 4096,65536,131072 \
        > "$RESULTS/layers.jsonl"
    noted env RIVERRUN_CUDNN=unordered "$RIVERRUN" bench layer $layers --what train --block attention --batch 4,1,1 \
        --seq 4096,65536,131072 >> "$RESULTS/layers.jsonl"
    noted "$RIVERRUN" bench ops --device cuda --precision bf16 --csv "$RESULTS/cells.csv" cell_projected cell \
        > "$RESULTS/cells.jsonl"
}

# As many tokens in all at every length, as in the paper's figure; then a token of 512 and of 16 sequences. Attention is
# cuDNN's at its fastest, which adds in any order: the deterministic one is not for long rows (docs/attention.md).
measure_rat() {
    lengths=4096,8192,16384,32768,65536,131072,262144
    : > "$RESULTS/rat.jsonl"
    export RIVERRUN_CUDNN=unordered
    for block in rat16 rat64 attention; do
        noted "$RIVERRUN" bench layer $layers --what train --block $block --batch 64,32,16,8,4,2,1 --seq $lengths \
            >> "$RESULTS/rat.jsonl"
        for batch in 512 16; do
            [ "$block$batch" = rat6416 ] && continue # which says nothing that the others don't
            noted "$RIVERRUN" bench layer $layers --what generate --block $block --batch $batch --seq $lengths \
                >> "$RESULTS/rat.jsonl"
        done
    done
    unset RIVERRUN_CUDNN
}

# Of a case of bench ops, at other sizes: one row of 2,048 channels by all solvers; a call a token, which takes as long
# for each token however many there are; rows of 2,048 tokens, 2,048 to 262,144 channels of them.
measure_pararnn() {
    all=128,256,512,1024,2048,4096,8192,16384,32768,65536,131072,262144,524288,1048576
    for shape in "B=1 e=0,1 m=0,1,2,3 T=$all" 'B=1 e=0,1 m=4 T=128,512,2048,8192' \
        'B=2,4,8,16,32,64,128 e=0,1 m=0,1,2,3 T=2048'; do
        noted "$RIVERRUN" bench ops --device cuda --precision bf16 --shape "$shape" 'cell/J=512 e=0 m=1 '
    done > "$RESULTS/pararnn.jsonl"
}

# The vocabulary is padded to 50,304 in all. The learning rate is that of the batch: these are no 300 billion tokens.
measure_steps() {
    while read -r name config rows; do
        rows=${ROWS:-$rows}
        train "steps-$name-${GPUS}x$rows" "$config" data.train="$DATA/neox/train" data.reset=true \
            model.pad_vocab_to=64 train.precision=bf16 train.batch=$((rows * GPUS)) train.micro_batch="$rows" \
            train.steps="$STEPS" \
            schedule.warmup=20 optimizer.lr=1e-3 eval.every=0 checkpoint.every=0 train.log_every=20
        rm -rf "${RUNS:?}/steps-$name-${GPUS}x$rows"
    done <<RUNS
mamba-129m configs/mamba/130m.ini 16
mamba2-129m configs/mamba2/130m.ini 16
mamba2-1.3b configs/mamba2/1.3b.ini 8
xlstm-255m configs/bench/xlstm.ini 16
llama-124m configs/bench/llama-124m.ini 16
llama-1.3b configs/bench/llama-1.3b.ini 8
RUNS
}

measure_precision() {
    all_gpus=$GPUS
    GPUS=1
    for model in mamba mamba2; do
        for precision in fp32 bf16; do
            train "precision-$model-$precision" configs/bytes/$model.ini data.train="$DATA/bytes/train" \
                data.valid="$DATA/bytes/valid" train.steps=1000 train.precision=$precision
        done
    done
    GPUS=$all_gpus
}

measure_prose() {
    train "prose-$GPUS" configs/prose/mamba2-130m.ini data.train="$DATA/neox/train" data.valid="$DATA/neox/valid" \
        train.precision=bf16
}

measure_transformers() {
    noted "$PYTHON" scripts/check_transformers_loss.py "$RUNS/prose-$GPUS/latest" "$DATA/neox/valid" \
        --riverrun "$RIVERRUN" --device cuda > "$RESULTS/transformers.jsonl"
}

# table TITLE SCRIPT COMMAND...: a section of gpu.md.
table() {
    printf '## %s\n\n' "$1" >> "$RESULTS/gpu.md"
    script=scripts/$2.py
    shift 2
    noted "$PYTHON" "$script" "$@" >> "$RESULTS/gpu.md"
    echo >> "$RESULTS/gpu.md"
}

measure_tables() {
    : > "$RESULTS/gpu.md"
    for precision in bf16 fp32; do
        [ -e "$RESULTS/ops-$precision.csv" ] &&
            table "Operations, $precision" plot_bench ops "$RESULTS/ops-$precision.csv" \
                --png "$RESULTS/ops-$precision.png"
    done
    [ -e "$RESULTS/layers.jsonl" ] && table "Layers" plot_lengths layers "$RESULTS/layers.jsonl"
    [ -e "$RESULTS/cells.csv" ] && table "Nonlinear cells" plot_bench ops "$RESULTS/cells.csv"
    for part in rat pararnn; do
        [ -e "$RESULTS/$part.jsonl" ] &&
            table "Against the length: $part" plot_lengths $part "$RESULTS/$part.jsonl" --png "$RESULTS/$part.png"
    done
    set --
    for log in "$RESULTS"/steps-*.jsonl; do
        case $log in
        *mamba-129m*) set -- "$@" "Mamba 129M=$log" ;;
        *mamba2-129m*) set -- "$@" "Mamba-2 129M=$log" ;;
        *mamba2-1.3b*) set -- "$@" "Mamba-2 1.34B=$log" ;;
        *xlstm-255m*) set -- "$@" "xLSTM 255M=$log" ;;
        *llama-124m*) set -- "$@" "Llama 124M=$log" ;;
        *llama-1.3b*) set -- "$@" "Llama 1.32B=$log" ;;
        esac
    done
    [ $# -gt 0 ] && table "Training steps" plot_bench steps "$@" --png "$RESULTS/steps.png"
    for model in mamba mamba2; do
        log=$RESULTS/precision-$model
        [ -e "$log-fp32.jsonl" ] && [ -e "$log-bf16.jsonl" ] &&
            table "bf16 after fp32, configs/bytes/$model.ini" plot_bench compare fp32="$log-fp32.jsonl" \
                bf16="$log-bf16.jsonl" --png "$log.png"
    done
    set --
    for log in "$RESULTS"/prose-*.jsonl; do
        gpus=${log##*prose-}
        [ -e "$log" ] && set -- "$@" "Mamba-2 129M on prose, GPUs: ${gpus%.jsonl}=$log"
    done
    [ $# -gt 0 ] && table "Mamba-2 129M on prose" plot_bench curves "$@" --png "$RESULTS/prose.png"
    return 0
}

[ $# -gt 0 ] || set -- data ops layers rat pararnn steps precision prose transformers tables
for part in "$@"; do
    case $part in
    data | ops | layers | rat | pararnn | steps | precision | prose | transformers | tables)
        say "$part"
        "measure_$part"
        ;;
    *) say "there is no part $part" && exit 2 ;;
    esac
done
exit $failed
