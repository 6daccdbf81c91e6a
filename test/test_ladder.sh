#!/bin/sh
# test_ladder.sh: solvers that fail are noticed, and training goes on (train/ladder.h). The weights of ParaGRU and
# ParaLSTM are clamped to 6 by the first step, where Newton's method diverges: the second step is skipped, more
# iterations do not help, the third is skipped, and from the fourth on the layers are solved sequentially; after
# solver.hold steps it is tried again. The same on two ranks, and after a stop at any step; evaluations and prompts are
# computed again.
set -u
. "$(dirname "$0")/support.sh"

cat > "$WORK/c.ini" <<'INI'
[train]
steps = 11
batch = 4
precision = fp32
device = cpu
[optimizer]
lr = 1e-2
[schedule]
kind = constant
[group.wild]
match = *cell.weight
clamp_min = 6
clamp_max = 6
[data]
train = task:copy
valid = task:copy
seq_len = 48
[task.copy]
kind = selective_copying
length = 48
tokens = 4
valid_samples = 32
[solver]
hold = 5
[eval]
every = 3
batch = 4
[checkpoint]
every = 1
keep = 0
[model]
d_model = 16
pattern = g l
[block.g]
mixer = pararnn
cell = gru
solver = newton
recompute = scan
[block.l]
mixer = pararnn
cell = lstm
solver = shooting
chunk = 4
iterations = 2
INI
train() { "$RIVERRUN" train "$WORK/c.ini" "$@"; }
# What the log says of solvers: steps, changes of level, validations.
log_of() {
    solved='"skipped":\([a-z]*\),"residual":\([^,]*\),.*"iterations":\([0-9]*\),"raised":\([0-9]*\),'
    sed -n 's/.*"type":"step","step":\([0-9]*\),"loss":\([^,]*\),.*'"$solved"'.*/\1 \2 \3 \4 \5 \6/p
            s/.*"type":"solver",\(.*\)}/\1/p; s/.*"type":"valid",\(.*\),"seconds".*/\1/p' "$1/log.jsonl"
}
# What was decided: step, skipped, iterations, layers raised.
decisions() {
    solved='"skipped":\([a-z]*\),.*"iterations":\([0-9]*\),"raised":\([0-9]*\),'
    sed -n 's/.*"type":"step","step":\([0-9]*\),.*'"$solved"'.*/\1 \2 \3 \4/p' "$1/log.jsonl"
}

train train.out="$WORK/whole" > "$WORK/out" 2> "$WORK/err" || fail "a run whose solvers fail: $(cat "$WORK/err")"
cat > "$WORK/want" <<'END'
1 false 3 0
2 true 3 0
3 true 6 2
4 false 0 2
5 false 0 2
6 false 0 2
7 false 0 2
8 false 0 2
9 true 6 2
10 false 0 2
11 false 0 2
END
decisions "$WORK/whole" | cmp -s "$WORK/want" - || fail "decisions: $(decisions "$WORK/whole")"
grep -q '"loss":null' "$WORK/whole/log.jsonl" && fail "a loss is not finite: $(log_of "$WORK/whole")"
changed() { grep -q "\"type\":\"solver\",\"step\":$1,\"block\":$2,.*$3}" "$WORK/whole/log.jsonl"; }
changed 2 0 '"level":"more","before":"chosen","first_step":3,"method":"newton","iterations":6' ||
    fail "the second step raises nothing: $(log_of "$WORK/whole")"
changed 8 1 '"level":"more","before":"sequential","first_step":9,"method":"shooting","iterations":5' ||
    fail "the eighth step lowers nothing: $(log_of "$WORK/whole")"
grep -q '^block 1 (l) left a residual of .*: from step 4 on it is solved token after token$' "$WORK/err" ||
    fail "nobody is told: $(cat "$WORK/err")"
grep -q '"level": "sequential"' "$WORK/whole/latest/trainer.json" || fail "trainer.json does not say where layers stand"

# A session that stops behind any step and goes on does the same, bit for bit.
log_of "$WORK/whole" > "$WORK/whole.log"
for step in 1 2 3 5 8 9; do
    rm -rf "$WORK/again"
    cp -r "$WORK/whole" "$WORK/again"
    ln -sfn "step-0000000$step" "$WORK/again/latest"
    train train.out="$WORK/again" > /dev/null 2> "$WORK/err" || fail "after step $step: $(cat "$WORK/err")"
    grep -q "goes on from step $step of 11" "$WORK/err" || fail "it did not go on from step $step: $(cat "$WORK/err")"
    log_of "$WORK/again" | cmp -s "$WORK/whole.log" - ||
        fail "from step $step on: $(log_of "$WORK/again" | diff "$WORK/whole.log" - | head -n 4)"
    same_weights "$WORK/whole" "$WORK/again" "from step $step on"
done

# Skips and levels are those of all ranks, and so is a validation that has to be repeated.
if have_mpi; then
    mpi 2 "$RIVERRUN" train "$WORK/c.ini" train.out="$WORK/two" > /dev/null 2> "$WORK/err" ||
        fail "two ranks: $(cat "$WORK/err")"
    decisions "$WORK/two" | cmp -s "$WORK/want" - || fail "two ranks decide: $(decisions "$WORK/two")"
    [ "$(grep -c 'was skipped' "$WORK/err")" = 3 ] || fail "two ranks tell: $(cat "$WORK/err")"
    mpi 2 "$RIVERRUN" eval "$WORK/two" --data task:copy > "$WORK/two.json" 2> "$WORK/err" ||
        fail "evaluation on two ranks: $(cat "$WORK/err")"
    [ "$(grep -c 'computed again, 2 layers' "$WORK/err")" = 1 ] || fail "two ranks evaluate: $(cat "$WORK/err")"
    grep -q '"residual":0,"sequential":2' "$WORK/two.json" || fail "two ranks evaluate: $(cat "$WORK/two.json")"
fi

# The config alone would have Newton's method evaluate; what comes out is what the sequential solver says.
"$RIVERRUN" eval "$WORK/whole" --data task:copy > "$WORK/out" 2> "$WORK/err" ||
    fail "evaluation: $(cat "$WORK/err")"
grep -q '^the evaluation is computed again, 2 layers token after token' "$WORK/err" ||
    fail "evaluation: $(cat "$WORK/err")"
loss() { sed -n 's/.*"loss":\([0-9.]*\),.*/\1/p'; }
want=$(grep '"type":"valid","step":11,' "$WORK/whole/log.jsonl" | loss)
[ "$(loss < "$WORK/out")" = "$want" ] || fail "evaluation says $(cat "$WORK/out"), validation said $want"

# A limit that nothing keeps only counts, and one that all keep changes nothing.
train train.out="$WORK/counted" train.steps=3 solver.warn=0 group.wild.clamp_min=-1 group.wild.clamp_max=1 \
    > /dev/null 2> "$WORK/err" || fail "solver.warn = 0: $(cat "$WORK/err")"
grep -q '"inexact": 3' "$WORK/counted/latest/trainer.json" || fail "inexact steps are not counted"
[ "$(grep -c 'above solver.warn' "$WORK/err")" = 1 ] || fail "inexact steps: $(cat "$WORK/err")"
train train.out="$WORK/none" solver.warn=1 > "$WORK/out" 2> "$WORK/err"
[ $? = 2 ] && grep -q "solver.warn = 1 is above solver.limit = 0.1" "$WORK/err" ||
    fail "solver.warn: $(cat "$WORK/err")"
finish
