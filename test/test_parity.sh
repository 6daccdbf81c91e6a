#!/bin/sh
# test_parity.sh: scripts/parity.sh at a small size: the sLSTM learns parity from samples of up to 12 tokens and knows
# it at 40, which takes what its recurrent weights do: without them the same run fails, and the script says so.
set -u
. "$(dirname "$0")/support.sh"
cd "$(dirname "$0")/.." || exit 1

# parity NAME OPTION...: two seeds at once; the table in $WORK/NAME.md.
parity() {
    name=$1
    shift
    BUILD=$(dirname "$RIVERRUN") OUT=$WORK/$name MODELS=slstm SEEDS='1 2' LENGTHS='12 40' SAMPLES=256 \
        DEVICE=cpu JOBS=2 \
        NEEDED='slstm:12:0.99 slstm:40:0.9' sh scripts/parity.sh model.d_model=32 block.y.mlp_width=64 \
        task.upto24.length=12 task.upto40.length=12 data.seq_len=11 data.valid=task:upto12 train.steps=300 \
        train.batch=32 train.micro_batch=32 optimizer.lr=3e-3 schedule.warmup=50 eval.every=0 "$@" \
        > "$WORK/$name.md" 2> "$WORK/err"
}

parity whole || fail "parity is not learned: $(cat "$WORK/err" "$WORK/whole.md")"
[ "$(wc -l < "$WORK/whole.md")" = 4 ] && grep -q '^| slstm | [0-9]* | [12] (best) | .* % |$' "$WORK/whole.md" ||
    fail "not a table of two seeds: $(cat "$WORK/whole.md")"

parity cut block.y.recurrent_init=zeros 'group.fixed.match=*.recurrent_kernel' group.fixed.lr_scale=0 \
    group.fixed.weight_decay=0 && fail "parity is learned without recurrent weights: $(cat "$WORK/cut.md")"
grep -q 'slstm at length 40: the best seed reaches 0\.[0-9]*, not 0\.9$' "$WORK/err" ||
    fail "what was not learned is not said: $(cat "$WORK/err")"

parity no model.d_mdel=3 && fail 'a wrong option is no failure'
grep -q 'parity.sh: slstm-1 failed: .*d_mdel' "$WORK/err" || fail "a failed run: $(cat "$WORK/err")"
finish
