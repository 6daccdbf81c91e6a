#!/bin/sh
# test_gpu_train.sh: train, eval and generate on a GPU, end to end, in fp32 and in bf16: the same command gives the same
# bits, an interrupted run ends like a whole one, losses are the CPU's, and a checkpoint of either device is evaluated
# and continued alike on both.
set -u
. "$(dirname "$0")/support.sh"
need_gpu
make_data
make_config "$WORK/c.ini"

train() { "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant "$@" > "$WORK/out" 2> "$WORK/err"; }
# losses RUN: the training loss of every step.
losses() { sed -n 's/.*"type":"step".*"loss":\([^,}]*\).*/\1/p' "$1/log.jsonl"; }
# near LIMIT WHAT: the two columns of standard input differ by at most so much, relatively, and there are some.
near() {
    awk -v limit="$1" '
        { n++; d = $1 - $2; if (d < 0) d = -d; if (!(d <= limit * $2)) { print "line " n ": " $0; bad = 1 } }
        END { exit bad || n == 0 }' > "$WORK/near" || fail "$2: $(head -n 3 "$WORK/near")"
}
# eval_loss CHECKPOINT OPTION...
eval_loss() {
    "$RIVERRUN" eval "$@" --data "$WORK/valid" 2> "$WORK/err" | sed -n 's/.*"loss":\([^,}]*\).*/\1/p'
}

train train.out="$WORK/cpu" || fail "training on the CPU: $(cat "$WORK/err")"
for precision in fp32 bf16; do
    gpu="train.device=cuda train.precision=$precision"
    for run in one two; do
        train $gpu train.out="$WORK/$precision-$run" || fail "training in $precision: $(cat "$WORK/err")"
    done
    same_weights "$WORK/$precision-one" "$WORK/$precision-two" "$precision, the same command twice"
    same_curve "$WORK/$precision-one" "$WORK/$precision-two" "$precision, the same command twice"

    train $gpu train.steps=13 train.out="$WORK/$precision-parts" || fail "13 steps in $precision: $(cat "$WORK/err")"
    train $gpu train.out="$WORK/$precision-parts" || fail "going on in $precision: $(cat "$WORK/err")"
    same_weights "$WORK/$precision-one" "$WORK/$precision-parts" "$precision, in two parts"

    limit=1e-4
    [ "$precision" = bf16 ] && limit=2e-2
    losses "$WORK/cpu" > "$WORK/want"
    losses "$WORK/$precision-one" | paste - "$WORK/want" | near $limit "$precision: losses of training, GPU and CPU"
    for checkpoint in "$WORK/cpu" "$WORK/$precision-one"; do
        for mode in window carry; do
            want=$(eval_loss "$checkpoint" --mode $mode)
            got=$(eval_loss "$checkpoint" --mode $mode --device cuda --precision "$precision")
            echo "$got $want" | near $limit "$precision: eval --mode $mode of $checkpoint, GPU and CPU"
        done
    done
done

# In fp32 the most probable token is the same one, but for a tie that rounding decides.
continue_text() {
    "$RIVERRUN" generate "$WORK/fp32-one" --prompt 'the and of river' --tokens 40 --ignore-eod "$@" \
        2> "$WORK/err" || fail "generate $*: $(cat "$WORK/err")" >&2
}
continue_text --temperature 0 > "$WORK/want"
continue_text --temperature 0 --device cuda > "$WORK/got"
cmp "$WORK/want" "$WORK/got" || fail "generate: the GPU continues another text than the CPU"
continue_text --temperature 0 --device cuda --precision bf16 > "$WORK/got"
[ "$(wc -c < "$WORK/got")" -ge 40 ] || fail "generate in bf16 writes $(wc -c < "$WORK/got") bytes"
for draw in one two; do
    continue_text --device cuda --precision bf16 --temperature 1 --seed 7 > "$WORK/drawn-$draw"
done
cmp "$WORK/drawn-one" "$WORK/drawn-two" || fail "generate: one seed gives two texts"
finish
