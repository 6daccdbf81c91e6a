#!/bin/sh
# parity.sh: which layers learn parity, and how far beyond the lengths they were trained on: every model of
# configs/tasks/parity-*.ini from several seeds, each evaluated at fixed lengths. Prints a table in Markdown.
#
#     sh scripts/parity.sh [section.key=value ...]      options for every training run, such as train.steps=500
#
# From the environment: MODELS ("slstm mlstm mamba mamba2"), SEEDS ("1 2 3"), LENGTHS ("40 64 128 256"), SAMPLES of
# each length (1024), DEVICE (auto), PRECISION (fp32), JOBS: runs at once (as many as there are processors), BUILD
# (build), OUT ($BUILD/parity), where runs and logs are left. A sample is one answer, so accuracy is the share of
# sequences that are right; a guess is right in half.
#
# Exit code 1 if a run fails, or if the best seed of a model is right less often than NEEDED says: a list of
# MODEL:LENGTH:SHARE, such as "slstm:40:0.99 slstm:256:0.95".
set -u
cd "$(dirname "$0")/.." || exit 1
BUILD=${BUILD:-build}
RIVERRUN=$BUILD/riverrun
OUT=${OUT:-$BUILD/parity}
MODELS=${MODELS:-slstm mlstm mamba mamba2}
SEEDS=${SEEDS:-1 2 3}
LENGTHS=${LENGTHS:-40 64 128 256}
SAMPLES=${SAMPLES:-1024}
DEVICE=${DEVICE:-auto}
PRECISION=${PRECISION:-fp32}
JOBS=${JOBS:-$(nproc 2>/dev/null || echo 1)}
NEEDED=${NEEDED:-}
export RIVERRUN OUT SAMPLES DEVICE PRECISION
[ "$JOBS" -gt 1 ] && export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

say() { echo "parity.sh: $*" >&2; }
[ -x "$RIVERRUN" ] || make -j"$(nproc)" BUILD="$BUILD" all >&2 || exit 1
mkdir -p "$OUT" || exit 1

# Lines of words, each a job for sh -c with the words as its arguments, JOBS at a time.
at_once() { xargs -P "$JOBS" -L 1 sh -c "$1" sh; }

# ---- training: OUT/MODEL-SEED
begun=$(date +%s)
for model in $MODELS; do
    for seed in $SEEDS; do
        rm -rf "${OUT:?}/$model-$seed"
        echo "$model" "$seed" "$@"
    done
done | at_once 'model=$1 seed=$2; shift 2
    "$RIVERRUN" train configs/tasks/parity-"$model".ini train.out="$OUT/$model-$seed" train.device="$DEVICE" \
        train.precision="$PRECISION" train.seed="$seed" data.seed="$seed" "$@" \
        > "$OUT/$model-$seed.out" 2>&1 < /dev/null ||
        { echo "parity.sh: $model-$seed failed: $(tail -n 1 "$OUT/$model-$seed.out")" >&2; exit 1; }' || exit 1
say "trained in $(($(date +%s) - begun)) s"

# ---- evaluation: OUT/MODEL-SEED-LENGTH.json
begun=$(date +%s)
for model in $MODELS; do
    for seed in $SEEDS; do
        for length in $LENGTHS; do echo "$model-$seed" "$length"; done
    done
done | at_once '"$RIVERRUN" eval "$OUT/$1" --device "$DEVICE" --precision "$PRECISION" --data task:fixed \
        task.fixed.kind=parity task.fixed.min_length="$2" task.fixed.length="$2" task.fixed.valid_samples="$SAMPLES" \
        > "$OUT/$1-$2.json" 2> "$OUT/$1-$2.err" < /dev/null ||
        { echo "parity.sh: eval of $1 at $2 failed: $(cat "$OUT/$1-$2.err")" >&2; exit 1; }' || exit 1
say "evaluated in $(($(date +%s) - begun)) s"

# ---- the table
# accuracy MODEL SEED LENGTH
accuracy() { sed -n 's/.*"sequence_accuracy":\([0-9.]*\).*/\1/p' "$OUT/$1-$2-$3.json"; }
# best_seed MODEL: the one that is right most often, all lengths together.
best_seed() {
    for seed in $SEEDS; do
        for length in $LENGTHS; do accuracy "$1" "$seed" "$length"; done |
            awk -v s="$seed" '{ a += $1 } END { print a, s }'
    done | sort -g | tail -n 1 | cut -d ' ' -f 2
}
per_cent() { awk -v a="$1" 'BEGIN { printf "%.1f %%", 100 * a }'; }
# parameters MODEL OPTION...: the plan's inner objects count memory.
parameters() {
    model=$1
    shift
    "$RIVERRUN" plan "configs/tasks/parity-$model.ini" "$@" --json |
        sed -e 's/:{[^}]*}/:0/g' -e 's/.*"parameters":\([0-9]*\).*/\1/'
}
{
    printf '| model | parameters | seed |'
    for length in $LENGTHS; do printf ' length %s |' "$length"; done
    printf '\n|---|---|---|'
    for length in $LENGTHS; do printf -- '---|'; done
    printf '\n'
    for model in $MODELS; do
        best=$(best_seed "$model")
        for seed in $SEEDS; do
            [ "$seed" = "$best" ] && mark=' (best)' || mark=
            printf '| %s | %s | %s%s |' "$model" "$(parameters "$model" "$@")" "$seed" "$mark"
            for length in $LENGTHS; do printf ' %s |' "$(per_cent "$(accuracy "$model" "$seed" "$length")")"; done
            printf '\n'
        done
    done
} | tee "$OUT/table.md"

code=0
for need in $NEEDED; do
    model=${need%%:*} share=${need##*:} length=${need#*:}
    length=${length%:*}
    reached=$(accuracy "$model" "$(best_seed "$model")" "$length")
    awk -v a="$reached" -v b="$share" 'BEGIN { exit !(a != "" && a >= b) }' || {
        say "$model at length $length: the best seed reaches $reached, not $share"
        code=1
    }
done
exit "$code"
