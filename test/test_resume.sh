#!/bin/sh
# test_resume.sh: a run that is stopped by a signal, or killed, and started again with the same command ends with the
# same weights, the same optimizer state and the same logged curve, bit for bit, as one that was never interrupted.
# With accumulation and validations in between, at several moments. And what may and may not change on the way.
set -u
. "$(dirname "$0")/support.sh"
make_data
make_config "$WORK/c.ini"
# Steps long enough for a signal to come between two of them on a fast machine.
sed -i 's/^d_model = 16$/d_model = 96/' "$WORK/c.ini"

train() { "$RIVERRUN" train "$WORK/c.ini" "$@"; }
# start ARGUMENT...: in the background, as process $pid; standard error goes to $WORK/err.
start() {
    "$RIVERRUN" train "$WORK/c.ini" "$@" > /dev/null 2> "$WORK/err" &
    pid=$!
    STARTED="$STARTED $pid"
}
# Until a process has opened its log and begun to compute.
await_begin() {
    while kill -0 "$pid" 2>/dev/null && ! grep -q '"type":"run"' "$1/log.jsonl" 2>/dev/null; do sleep 0.02; done
}
listing() { ls -l --time-style=full-iso "$1" | grep -v ' lock$'; }

train train.out="$WORK/whole" > "$WORK/whole.out" 2> "$WORK/whole.err" ||
    fail "the uninterrupted run failed: $(cat "$WORK/whole.err")"
[ "$(steps_logged "$WORK/whole")" = 40 ] || fail "the log has $(steps_logged "$WORK/whole") steps, not 40"
tail -n 1 "$WORK/whole.out" | grep -Eqx 'validation loss [0-9]+\.[0-9]{3} nats/byte' ||
    fail "the last line is $(tail -n 1 "$WORK/whole.out")"
[ "$(grep -c '"type":"valid"' "$WORK/whole/log.jsonl")" = 7 ] ||
    fail "there are not 7 validations, at 6, 12, ... 36 and 40"
[ "$(ls -d "$WORK"/whole/step-* | wc -l)" = 2 ] || fail "keep = 2 left $(ls "$WORK/whole")"

# Two runs of the same command give the same bits, or nothing below means anything.
train train.out="$WORK/again" > /dev/null 2>&1 || fail "the second uninterrupted run failed"
same_weights "$WORK/whole" "$WORK/again" "repeated"
same_curve "$WORK/whole" "$WORK/again" "repeated"

# interrupted NAME SIGNAL STEP...: with the options in $MORE, whose uninterrupted run is $WANT, send the signal once
# so many steps are logged, and at least one by this session; start again, and so on; then to the end.
interrupted() {
    name=$1 signal=$2
    shift 2
    for step in "$@"; do
        logged=$(steps_logged "$WORK/$name")
        [ "${logged:-0}" -lt "$step" ] || step=$((logged + 1))
        start train.out="$WORK/$name" $MORE
        await_steps "$WORK/$name" "$step" "$pid"
        kill -s "$signal" "$pid" 2>/dev/null
        wait "$pid"
        code=$?
        if [ "$signal" = KILL ]; then
            [ "$code" = 137 ] || fail "$name: exit code $code after SIGKILL at step $step"
        else
            [ "$code" = 0 ] || fail "$name: exit code $code after SIG$signal at step $step: $(cat "$WORK/err")"
            grep -q "the same command goes on from there" "$WORK/err" ||
                fail "$name: no word on how to go on: $(tail -n 2 "$WORK/err")"
            tail -n 1 "$WORK/$name/log.jsonl" | grep -q "\"type\":\"stop\".*\"signal\":\"SIG$signal\"" ||
                fail "$name: the log does not end with the signal"
            [ "$(steps_logged "$WORK/$name")" -lt 40 ] || fail "$name: it was over before the signal came"
        fi
    done
    train train.out="$WORK/$name" $MORE > "$WORK/out" 2> "$WORK/err" ||
        fail "$name: the last session failed: $(cat "$WORK/err")"
    grep -q "goes on from step" "$WORK/err" || fail "$name: the last session did not go on: $(cat "$WORK/err")"
    same_weights "$WORK/$WANT" "$WORK/$name" "$name"
    same_curve "$WORK/$WANT" "$WORK/$name" "$name"
    cmp -s "$WORK/$WANT.out" "$WORK/out" || fail "$name: another last line: $(cat "$WORK/out")"
}
WANT=whole MORE=''
interrupted term TERM 3 5 6 18
interrupted int INT 12
interrupted usr1 USR1 8
interrupted killed KILL 10 9 25

# Where every step is followed by a validation, a session that a signal ended owes one to the next.
WANT=often MORE='eval.every=1 eval.tokens=60'
train train.out="$WORK/often" $MORE > "$WORK/often.out" 2> "$WORK/err" ||
    fail "validation after every step: $(cat "$WORK/err")"
interrupted owed TERM 4 15

# The same with all that a recipe may say: growing batches, groups of tensors, detached decay, a cool-down.
WANT=recipe
MORE='ramp.start=2 ramp.increment=2 ramp.steps=26 optimizer.decay_mode=detached optimizer.weight_decay=0.01
    group.slow.match=*.A_log,*.dt_bias group.slow.lr_scale=0.1 group.D.match=*.D group.D.clamp_max=1.001
    schedule.cooldown=10'
train train.out="$WORK/recipe" $MORE > "$WORK/recipe.out" 2> "$WORK/err" || fail "a recipe: $(cat "$WORK/err")"
batches=$(sed -n 's/.*"type":"step".*"batch":\([0-9]*\),.*/\1/p' "$WORK/recipe/log.jsonl" | uniq -c | tr -s '\n ' ' ')
[ "$batches" = ' 13 2 13 4 14 6 ' ] || fail "the ramp's batches are$batches"
tail=$(sed -n 's/.*"type":"step","step":40,.*"lr":\([^,]*\),.*/\1/p' "$WORK/recipe/log.jsonl")
[ "$tail" = 1e-05 ] || fail "the cool-down from min_lr = 1e-4 ends with $tail, not a tenth of it"
interrupted recipe_term TERM 12 20
interrupted recipe_killed KILL 14 24

# A finished run says so, changes nothing, and ends with the same line.
before=$(listing "$WORK/whole")
train train.out="$WORK/whole" > "$WORK/out" 2> "$WORK/err" || fail "a finished run fails: $(cat "$WORK/err")"
grep -q 'is finished: step 40 of 40' "$WORK/err" || fail "a finished run says: $(cat "$WORK/err")"
cmp -s "$WORK/whole.out" "$WORK/out" || fail "a finished run's last line is $(cat "$WORK/out")"
[ "$before" = "$(listing "$WORK/whole")" ] || fail "starting a finished run changed its directory"

# Another split of the batch is another rounding, not another run.
train train.out="$WORK/split" train.steps=40 train.micro_batch=6 > /dev/null 2>&1 || fail "micro_batch = 6 failed"
for run in whole split; do
    sed -n 's/.*"type":"step".*"loss":\([^,]*\),.*/\1/p' "$WORK/$run/log.jsonl" > "$WORK/$run.losses"
done
paste "$WORK/whole.losses" "$WORK/split.losses" |
    awk '{ d = $1 - $2; if (d < 0) d = -d; if (d > 2e-5 * $1) bad = 1 } END { exit bad || NR != 40 }' ||
        fail "accumulation changes the losses"

# What may change when a run goes on, and what may not.
cp -R "$WORK/whole" "$WORK/more"
train train.out="$WORK/more" train.steps=44 eval.every=11 checkpoint.keep=1 data.threads=2 train.micro_batch=3 \
    > /dev/null 2> "$WORK/err" ||
    fail "more steps are refused: $(cat "$WORK/err")"
grep -q 'from here on train.steps = 44 (it was 40)' "$WORK/err" || fail "no word about train.steps: $(cat "$WORK/err")"
[ "$(steps_logged "$WORK/more")" = 44 ] || fail "the longer run has $(steps_logged "$WORK/more") steps"
refused() {
    want=$1
    shift
    train train.out="$WORK/whole" "$@" > "$WORK/out" 2> "$WORK/err"
    code=$?
    [ "$code" = 2 ] || fail "$*: exit code $code"
    [ "$(wc -l < "$WORK/err")" = 1 ] || fail "$*: not one line: $(cat "$WORK/err")"
    grep -q -- "$want" "$WORK/err" || fail "$*: $(cat "$WORK/err") does not say '$want'"
}
refused 'train.batch = 12 differs from the 6 of' train.batch=12
refused 'ramp.stages = 2\*3 differs from the (empty) of' ramp.stages='2*3'
refused 'group.a.match = \*.D is not in the config of' group.a.match='*.D' group.a.lr_scale=2
refused 'optimizer.decay_mode = detached differs from the lr of' optimizer.decay_mode=detached
refused "\[group.a\] match: no tensor has a name like [*].DD" group.a.match='*.DD' group.a.lr_scale=2
refused 'data.seed = 2 differs from the 1 of' data.seed=2
refused 'data.seq_len = 32 differs from the 48 of' data.seq_len=32
refused 'model.d_model = 32 differs from the 96 of' model.d_model=32
refused 'block.m.d_state = 4 differs from the 8 of' block.m.d_state=4
refused 'optimizer.lr = 0.001 differs from the 0.005 of' optimizer.lr=1e-3
refused 'train.seed = 7 differs from the 1 of' train.seed=7
refused 'train.steps = 39, but .* stands at step 40 already' train.steps=39
refused 'train.resume = false' train.resume=false
[ "$before" = "$(listing "$WORK/whole")" ] || fail "a refused start changed the run's directory"

# train.init starts a fresh run from trained weights: its first loss is near the old run's last one.
train train.out="$WORK/init" train.init="$WORK/whole" train.steps=2 schedule.warmup=0 > /dev/null 2> "$WORK/err" ||
    fail "train.init failed: $(cat "$WORK/err")"
awk -v first="$(sed -n 's/.*"step":1,"loss":\([^,]*\),.*/\1/p' "$WORK/init/log.jsonl")" \
    -v last="$(tail -n 1 "$WORK/whole.losses")" -v fresh="$(head -n 1 "$WORK/whole.losses")" \
    'BEGIN { exit !(first != "" && first < (last + fresh) / 2) }' ||
        fail "train.init did not start from the weights"

# A second SIGINT does not wait for the step. A large batch makes the step take seconds.
start train.out="$WORK/twice" train.batch=6000 train.micro_batch=6000
await_begin "$WORK/twice"
sleep 0.2
kill -s INT "$pid"
sleep 0.2
kill -s INT "$pid"
wait "$pid"
code=$?
[ "$code" = 130 ] || fail "exit code $code after the second SIGINT: $(cat "$WORK/err")"
[ ! -e "$WORK/twice/latest" ] || fail "the second SIGINT waited for a save"

# One directory, one process.
start train.out="$WORK/shared" train.batch=6000 train.micro_batch=6000
await_begin "$WORK/shared"
train train.out="$WORK/shared" > /dev/null 2> "$WORK/err"
code=$?
kill -9 "$pid"
wait "$pid" 2>/dev/null
[ "$code" = 2 ] && grep -q "another riverrun trains into this directory (process $pid on " "$WORK/err" ||
    fail "a shared directory: $code, $(cat "$WORK/err")"
finish
