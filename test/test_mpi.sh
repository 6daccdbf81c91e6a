#!/bin/sh
# test_mpi.sh: several ranks under mpirun do what one does at the same global batch: losses, weights, evaluation;
# resuming on another number of ranks; a signal saves once; a rank that fails, is killed or hangs ends the job, and
# nothing is saved.
set -u
. "$(dirname "$0")/support.sh"
have_mpi || skip "mpirun is not installed, or this riverrun was built without MPI"
# The test programs lie beside the binary.
PROGRAMS=$(dirname "$RIVERRUN")/test
make_data
make_config "$WORK/c.ini"
# The schedule must not depend on train.steps, which changes below.
train_ranks() {
    count=$1
    shift
    mpi "$count" "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant "$@"
}

# Every communication call, with exact data; and a step against the same batch by hand, where ranks have very
# different numbers of valid targets.
for program in test_train_comm test_train_trainer; do
    for ranks in 2 3; do
        EXPECT_RANKS=$ranks mpi "$ranks" -x EXPECT_RANKS "$PROGRAMS/$program" > "$WORK/out" 2>&1 ||
            fail "$program, $ranks ranks: $(tail -n 20 "$WORK/out")"
    done
done

# close_curves WANT GOT TOLERANCE WHAT: losses, norms and validations agree, step by step.
close_curves() {
    for run in "$1" "$2"; do
        log=$run/log.jsonl
        sed -n 's/.*"type":"\(step\|valid\)","step":\([0-9]*\),"loss":\([^,]*\),.*/\1 \2 \3/p' "$log" > "$run.losses"
        sed -n 's/.*"type":"step","step":\([0-9]*\),.*"grad_norm":\([^,]*\),.*/norm \1 \2/p' "$log" >> "$run.losses"
    done
    paste -d ' ' "$1.losses" "$2.losses" | awk -v tolerance="$3" '
        $1 != $4 || $2 != $5 { print "lines differ: " $0; exit 1 }
        { d = $3 - $6; if (d < 0) d = -d; if (d > tolerance * $3) { print "too far apart: " $0; exit 1 } }
        END { if (NR < 60) { print "only " NR " lines"; exit 1 } }' > "$WORK/verdict" ||
            fail "$4: $(cat "$WORK/verdict")"
}

one=$WORK/one one64=$WORK/one64
train_ranks 1 train.out="$one" train.micro_batch=6 > /dev/null 2> "$WORK/err" || fail "one rank: $(cat "$WORK/err")"
train_ranks 1 train.out="$one64" train.micro_batch=6 train.precision=fp64 > /dev/null 2> "$WORK/err" ||
    fail "one rank, fp64: $(cat "$WORK/err")"
for ranks in 2 3; do
    micro=$((6 / ranks))
    train_ranks "$ranks" train.out="$WORK/r$ranks" train.micro_batch=$micro > "$WORK/out" 2> "$WORK/err" ||
        fail "$ranks ranks: $(cat "$WORK/err")"
    grep -q "^riverrun .*, $ranks ranks, " "$WORK/err" ||
        fail "$ranks ranks were not what ran: $(head -n 1 "$WORK/err")"
    [ "$(grep -c 'validation loss' "$WORK/out")" = 1 ] || fail "$ranks ranks print $(cat "$WORK/out")"
    close_curves "$one" "$WORK/r$ranks" 1e-5 "$ranks ranks in fp32"
    # In fp64 only the order of sums is left to differ, so a mistake can't hide in the tolerance.
    train_ranks "$ranks" train.out="$WORK/r${ranks}d" train.micro_batch=1 train.precision=fp64 > /dev/null 2>&1 ||
        fail "$ranks ranks, fp64"
    close_curves "$one64" "$WORK/r${ranks}d" 1e-11 "$ranks ranks in fp64 with accumulation"
    # Weights are stored in fp32: equal but for the last bits of a few.
    for run in "$one64" "$WORK/r${ranks}d"; do
        "$RIVERRUN" eval "$run" --data "$WORK/valid" | sed 's/.*"loss":\([0-9.]\{8\}\).*/\1/' > "$run.eval"
    done
    [ -s "$one64.eval" ] && cmp -s "$one64.eval" "$WORK/r${ranks}d.eval" ||
        fail "$ranks ranks: eval gives $(cat "$WORK/r${ranks}d.eval"), one rank $(cat "$one64.eval")"
done

# The same with growing batches, groups of tensors and detached decay, over ranks that cut a group's tensors in two.
recipe='train.micro_batch=1 train.precision=fp64 ramp.start=2 ramp.increment=2 ramp.steps=20 optimizer.weight_decay=0.01
    optimizer.decay_mode=detached group.slow.match=*.A_log,*in_proj* group.slow.lr_scale=0.1
    group.bounded.match=*.D,*out_proj* group.bounded.clamp_max=0.9 group.bounded.clamp_min=-0.02'
for ranks in 1 2; do
    # shellcheck disable=SC2086
    train_ranks "$ranks" train.out="$WORK/recipe$ranks" $recipe > /dev/null 2> "$WORK/err" ||
        fail "a recipe, $ranks ranks: $(cat "$WORK/err")"
done
close_curves "$WORK/recipe1" "$WORK/recipe2" 1e-11 "a recipe on 2 ranks"

# The other layers, each with its state: xLSTM of both kinds, attention, RAT, ParaRNN. 2 ranks are one, and two parts
# are the whole.
sed -e 's/^pattern = m s/pattern = u y x a r p/' -e '/^\[block/,/^\[train/{/^\[train/!d}' "$WORK/c.ini" \
    > "$WORK/layers.ini"
cat >> "$WORK/layers.ini" <<CONFIG
[block.u]
mixer = mlstm_preup
heads = 2
chunk = 16
[block.y]
mixer = slstm
heads = 2
mlp = geglu
mlp_width = 24
[block.x]
mixer = mlstm
heads = 2
chunk = 16
[block.a]
mixer = attention
heads = 2
window = 20
[block.r]
mixer = rat
heads = 2
chunk = 8
[block.p]
mixer = pararnn
cell = lstm
residual_scale = true
weight_limit = 0.05
CONFIG
# train_layers RANKS RUN ARGUMENT...
train_layers() {
    count=$1 run=$2
    shift 2
    mpi "$count" "$RIVERRUN" train "$WORK/layers.ini" schedule.kind=constant model.norm_eps=0.1 train.micro_batch=3 \
        train.out="$WORK/layers-$run" "$@" > /dev/null 2> "$WORK/err" ||
        fail "the other layers, $run: $(cat "$WORK/err")"
}
train_layers 1 1 train.precision=fp64
train_layers 2 2 train.precision=fp64
train_layers 2 whole
train_layers 2 parts train.steps=21
train_layers 2 parts
close_curves "$WORK/layers-1" "$WORK/layers-2" 1e-10 "the other layers on 2 ranks"
same_weights "$WORK/layers-whole" "$WORK/layers-parts" "the other layers in two parts"
cmp -s "$one64.losses" "$WORK/recipe1.losses" && fail "a recipe changes nothing"

# The same number of ranks gives the same bits.
train_ranks 3 train.out="$WORK/r3again" train.micro_batch=2 > /dev/null 2>&1
same_weights "$WORK/r3" "$WORK/r3again" "3 ranks, repeated"
same_curve "$WORK/r3" "$WORK/r3again" "3 ranks, repeated"

# So does sending the gradients block by block, or many blocks at once.
train_ranks 3 train.out="$WORK/r3single" train.micro_batch=2 comm.bucket_mib=0 > /dev/null 2>&1
same_weights "$WORK/r3" "$WORK/r3single" "3 ranks, block by block"

# Evaluation under mpirun, in both modes.
for mode in window carry; do
    for ranks in 2 3; do
        mpi "$ranks" "$RIVERRUN" eval "$one" --data "$WORK/valid" --mode "$mode" --precision fp64 --tokens 0 \
            > "$WORK/many.json" 2> "$WORK/err" ||
            fail "eval with $ranks ranks: $(cat "$WORK/err")"
        "$RIVERRUN" eval "$one" --data "$WORK/valid" --mode "$mode" --precision fp64 --tokens 0 > "$WORK/single.json"
        [ "$(wc -l < "$WORK/many.json")" = 1 ] ||
            fail "eval with $ranks ranks prints more than a line: $(cat "$WORK/many.json")"
        for file in many single; do
            sed 's/\("[a-z_]*":[0-9]*\.[0-9]\{11\}\)[0-9]*/\1/g' "$WORK/$file.json" > "$WORK/$file.short"
        done
        cmp -s "$WORK/many.short" "$WORK/single.short" ||
            fail "eval with $ranks ranks: $(cat "$WORK/many.short") is not $(cat "$WORK/single.short")"
    done
done

# From 2 ranks to 3 to 1: the same samples, the same curve up to rounding.
train_ranks 2 train.out="$WORK/moved" train.micro_batch=1 train.steps=15 > /dev/null 2> "$WORK/err" ||
    fail "moved, 2 ranks: $(cat "$WORK/err")"
train_ranks 3 train.out="$WORK/moved" train.micro_batch=2 train.steps=29 > /dev/null 2> "$WORK/err" ||
    fail "moved, 3 ranks: $(cat "$WORK/err")"
train_ranks 1 train.out="$WORK/moved" train.micro_batch=3 > /dev/null 2> "$WORK/err" ||
    fail "moved, 1 rank: $(cat "$WORK/err")"
grep -v -e '"type":"valid","step":15,' -e '"type":"valid","step":29,' "$WORK/moved/log.jsonl" > "$WORK/kept.jsonl"
mv "$WORK/kept.jsonl" "$WORK/moved/log.jsonl"
close_curves "$one" "$WORK/moved" 1e-5 "2, then 3, then 1 rank"

# start_ranks RANKS RUN ARGUMENT...: in the background; $pid is mpirun itself.
start_ranks() {
    ranks=$1 run=$2
    shift 2
    set_mpi_environment
    mpirun -np "$ranks" "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant train.out="$run" "$@" \
        > "$WORK/out" 2> "$WORK/err" &
    pid=$!
    STARTED="$STARTED $pid"
}

# A signal to the job saves once, on the step that all ranks agreed on. mpirun hands SIGUSR1 on to the ranks. (SIGTERM
# is the launch script's, below. Straight to mpirun it mostly works, too, but once in ten times the ranks ended without
# a save, for a reason that was not found.)
run=$WORK/signalled
start_ranks 2 "$run" train.micro_batch=3 train.steps=50000
await_steps "$run" 9 "$pid"
kill -USR1 "$pid"
wait "$pid"
[ "$(grep -c "the same command goes on from there" "$WORK/err")" = 1 ] ||
    fail "SIGUSR1 to mpirun: $(tail -n 5 "$WORK/err")"
stopped=$(steps_logged "$run")
[ "$stopped" -lt 50000 ] || fail "SIGUSR1: it was over before the signal came"
[ "$(readlink "$run/latest")" = "$(printf 'step-%08d' "$stopped")" ] ||
    fail "SIGUSR1: latest is $(readlink "$run/latest") after $stopped steps"
tail -n 1 "$run/log.jsonl" | grep -q '"type":"stop"' || fail "SIGUSR1: the log ends with $(tail -n 1 "$run/log.jsonl")"

# Bad input: one line, though several ranks find it.
train_ranks 2 train.out="$WORK/bad" train.batch=5 train.micro_batch=0 > "$WORK/out" 2> "$WORK/err"
code=$?
[ "$code" = 2 ] || fail "a batch that does not divide: exit code $code"
[ "$(grep -c '^riverrun: ' "$WORK/err")" = 1 ] || fail "a batch that does not divide: $(cat "$WORK/err")"
grep -q 'train.batch = 5 does not divide among 2 ranks; the nearest valid: train.batch = 4 or 6' "$WORK/err" ||
    fail "it says $(cat "$WORK/err")"
[ ! -e "$WORK/bad" ] || fail "a refused start made its directory"

# A damaged frame of the data, which one rank reads: it is named, the job ends, and nothing is saved after it.
mkdir "$WORK/damaged"
cp "$WORK/train/"* "$WORK/damaged/"
shard=$(ls "$WORK/damaged/"*.rrs | head -n 1)
printf 'XXXXXXXX' | dd of="$shard" bs=1 seek=$(($(wc -c < "$shard") / 2)) conv=notrunc 2>/dev/null
train_ranks 2 train.out="$WORK/broken" train.micro_batch=3 train.steps=400 data.train="$WORK/damaged" \
    checkpoint.every=0 > "$WORK/out" 2> "$WORK/err"
code=$?
[ "$code" != 0 ] || fail "damaged data: exit code 0"
grep -q '^riverrun: rank [01]: .*\.rrs' "$WORK/err" || fail "damaged data: $(cat "$WORK/err")"
[ ! -e "$WORK/broken/latest" ] || fail "damaged data: the failure was followed by a save"

# A rank that is killed ends the job; one that hangs (here: is stopped), too, after comm.timeout. Either is told in one
# line that names rank, operation and step, and nothing is saved.
for signal in KILL STOP; do
    run=$WORK/victim$signal
    start_ranks 2 "$run" train.micro_batch=3 train.steps=50000 checkpoint.every=0 eval.every=0 comm.timeout=3
    await_steps "$run" 5 "$pid"
    child=$(last_child "$pid")
    kill -s "$signal" $child
    signalled=$(date +%s)
    wait "$pid"
    code=$?
    [ "$code" != 0 ] || fail "SIG$signal to a rank: exit code 0"
    lasted=$(($(date +%s) - signalled))
    [ $lasted -le 30 ] || fail "SIG$signal to a rank: the job lasted $lasted s more"
    [ ! -e "$run/latest" ] || fail "SIG$signal to a rank was followed by a save"
    [ "$(grep -c '^riverrun: ' "$WORK/err")" = 1 ] || fail "SIG$signal to a rank: $(grep '^riverrun: ' "$WORK/err")"
    want='rank 1: killed or crashed in .* at step [0-9]*; the job ends$'
    [ "$signal" = KILL ] || want='rank 0: no progress for 3 s (comm.timeout) in .* at step [0-9].*; the job ends$'
    grep -q "^riverrun: $want" "$WORK/err" || fail "SIG$signal to a rank: $(grep '^riverrun: ' "$WORK/err")"
done

# The launch script passes SIGTERM on in a way that leaves all the time that a save takes.
set_mpi_environment
sh "$(dirname "$0")/../scripts/launch-mpirun.sh" -n 2 "$RIVERRUN" train "$WORK/c.ini" schedule.kind=constant \
    train.out="$WORK/launched" train.micro_batch=3 train.steps=50000 > "$WORK/out" 2> "$WORK/err" &
pid=$!
STARTED="$STARTED $pid"
await_steps "$WORK/launched" 9 "$pid"
kill -TERM "$pid"
wait "$pid"
code=$?
[ "$code" = 0 ] || fail "SIGTERM to launch-mpirun.sh: exit code $code, $(tail -n 5 "$WORK/err")"
[ "$(grep -c "the same command goes on from there" "$WORK/err")" = 1 ] ||
    fail "SIGTERM to launch-mpirun.sh: $(tail -n 5 "$WORK/err")"
[ "$(readlink "$WORK/launched/latest")" = "$(printf 'step-%08d' "$(steps_logged "$WORK/launched")")" ] ||
    fail "SIGTERM to launch-mpirun.sh: latest is $(readlink "$WORK/launched/latest")"
finish
